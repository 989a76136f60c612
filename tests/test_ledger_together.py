"""Changes that share a commit: each is durable when its verb returns, and one that fails takes no other with it."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from spoold.errors import LedgerUnavailable
from spoold.ledger import Ledger
from spoold.ledger.schema import about
from spoold.model import Answer
from tests.nth import Fail, Hand, Op, ledger_says
from tests.parts import NAME, RECORD, Bench, captured, told


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def note(ledger: Ledger, name: str) -> None:
    """Write something down, and say so."""
    with ledger.write() as change:
        change.execute(sqlalchemy.insert(about), {"name": name, "value": ""})
        change.tell("noted", path=name)


def noted(bench: Bench) -> list[str]:
    """Ask the file itself what is durable."""
    return sorted(row["name"] for row in bench.rows("SELECT name FROM about WHERE value = ''"))


def commits(bench: Bench) -> list[str]:
    """Return a list to which each commit from now on is added."""
    seen: list[str] = []
    bench.ledger.close()  # what is opened from now on tells what it runs
    sqlalchemy.event.listen(
        bench.ledger._engine, "connect",
        lambda connection, _: connection.set_trace_callback(lambda text: seen.append(text) if text == "COMMIT" else None),
    )  # fmt: skip
    return seen


def test_what_is_done_together_is_durable_at_the_end_with_one_commit(bench: Bench) -> None:
    seen = commits(bench)

    with captured() as lines:
        with bench.ledger.together():
            note(bench.ledger, "a")
            note(bench.ledger, "b")
            before = ([], [], noted(bench)) == (seen, told(lines, "noted"), [])
        after = [line["path"] for line in told(lines, "noted")]

    assert before, "nothing is told before it is durable"
    assert (["a", "b"], ["a", "b"], ["COMMIT"]) == (noted(bench), after, seen)


def test_one_that_fails_takes_no_other_with_it(bench: Bench) -> None:
    with captured() as lines, bench.ledger.together():
        note(bench.ledger, "a")
        with pytest.raises(ZeroDivisionError), bench.ledger.write() as change:
            change.execute(sqlalchemy.insert(about), {"name": "b", "value": ""})
            change.tell("noted", path="b")
            1 / 0  # noqa: B018
        note(bench.ledger, "c")

    assert ["a", "c"] == noted(bench) == [line["path"] for line in told(lines, "noted")]


def is_release(op: Op) -> bool:
    return op.name.startswith("RELEASE")


@pytest.mark.parametrize("fails", [is_release, lambda op: op.name.startswith("INSERT INTO history")], ids=["end", "middle"])
def test_one_that_the_database_does_not_take_is_trouble_though_the_others_stand(
    bench: Bench, fails: Callable[[Op], bool]
) -> None:
    """Nothing is let go on a ledger that did not take all of it, and what its verb said has failed is not there."""
    bench.ledger.close()  # connections that are made from now on are in the hand
    with Hand(Fail("ledger", 2, ledger_says("disk I/O error"), moment="before", only=fails)), bench.ledger.together():
        note(bench.ledger, "a")
        with pytest.raises(LedgerUnavailable, match="disk I/O error"):
            note(bench.ledger, "b")
        note(bench.ledger, "c")

    assert ["a", "c"] == noted(bench)
    with pytest.raises(LedgerUnavailable, match="disk I/O error"):
        bench.ledger.demand_certain()


def test_the_first_may_fail(bench: Bench) -> None:
    with bench.ledger.together():
        with pytest.raises(ZeroDivisionError), bench.ledger.write():
            1 / 0  # noqa: B018
        note(bench.ledger, "b")

    assert ["b"] == noted(bench)


def test_where_the_database_takes_all_back_everybody_is_told(bench: Bench) -> None:
    """SQLite does so where the disk is full. What comes after must not begin a transaction of its own unawares."""
    with pytest.raises(LedgerUnavailable, match="took back"), bench.ledger.together():
        with bench.ledger.write() as change:
            change.execute(sqlalchemy.insert(about), {"name": "a", "value": ""})
            session = change.session
        session._driver.rollback()
        with pytest.raises(LedgerUnavailable, match="took back"):
            note(bench.ledger, "b")
    note(bench.ledger, "c")

    assert ["c"] == noted(bench)


def test_changes_that_wait_for_their_turn_share_a_commit(bench: Bench) -> None:
    """Ten threads that all write, while the first of them is not done yet: then two commits are enough for all."""
    seen = commits(bench)
    names = [f"{number:02}" for number in range(10)]
    with bench.ledger.write() as change:
        others = [threading.Thread(target=note, args=(bench.ledger, name)) for name in names[1:]]
        for other in others:
            other.start()
        while bench.ledger._waiting < len(others):
            threading.Event().wait(0.001)
        change.execute(sqlalchemy.insert(about), {"name": names[0], "value": ""})
    durable_when_the_first_ended = noted(bench)
    for other in others:
        other.join()

    assert names == durable_when_the_first_ended, "the last of those who waited made it durable for all"
    assert ["COMMIT"] == seen


def test_a_commit_that_fails_is_told_to_all_of_its_group(bench: Bench) -> None:
    bench.ledger.close()  # connections that are made from now on are in the hand
    faults: list[LedgerUnavailable] = []
    has_begun = threading.Event()

    def first() -> None:
        try:
            with bench.ledger.write() as change:
                change.tell("noted", path="a")
                has_begun.set()
                while not bench.ledger._waiting:
                    threading.Event().wait(0.001)
        except LedgerUnavailable as fault:
            faults.append(fault)

    is_change = lambda op: op.name == "COMMIT" and op.is_effect  # noqa: E731
    with Hand(Fail("ledger", 2, ledger_says("disk I/O error"), moment="before", only=is_change)), captured() as lines:
        note(bench.ledger, "the first")
        other = threading.Thread(target=first)
        other.start()
        has_begun.wait()
        with pytest.raises(LedgerUnavailable, match="disk I/O error"):
            note(bench.ledger, "b")
        other.join()
    note(bench.ledger, "c")

    assert ["c", "the first"] == noted(bench)
    assert ["the first"] == [line["path"] for line in told(lines, "noted")]
    assert ["disk I/O error"] == [str(fault).rpartition(": ")[2] for fault in faults]


def test_a_commit_that_fails_leaves_no_lock(bench: Bench) -> None:
    """SQLite keeps a connection that was closed for as long as there is a statement of it; we waited for ourselves for ever."""
    bench.ledger.done(bench.batch_stored({"original/cat.jpg": b"a cat"}), None)
    (bench.root / RECORD / "original/cat.jpg").unlink()
    bench.ledger.done(bench.batch_stored({"original/dog.jpg": b"a dog"}), None)
    bench.clock.advance(2 * 86400.0)
    [key] = bench.ledger.replaced_due([NAME])
    intent = bench.ledger.intend_delete(key)
    assert intent is not None
    bench.ledger.close()  # connections that are made from now on are in the hand

    is_change = lambda op: op.name == "COMMIT" and op.is_effect  # noqa: E731
    with Hand(Fail("ledger", 1, ledger_says("disk I/O error"), only=is_change)), captured():
        with pytest.raises(LedgerUnavailable, match="disk I/O error") as kept:
            bench.ledger.deleted(key, intent, Answer.CONFIRMED)
        with contextlib.closing(sqlite3.connect(bench.ledger_file, timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")  # while somebody still has the fault, and with it all that was going on

    assert kept.value.__traceback__ is not None
    assert [key] == bench.ledger.replaced_due([NAME])
