"""A ledger whose file is removed, replaced or damaged under the daemon, or finds no room."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from spoold.clock import SystemClock
from spoold.errors import LedgerUnavailable
from spoold.ledger import Ledger
from spoold.ledger.file import LedgerFile, keep_reserve
from tests.nth import Fail, Hand, refuses
from tests.parts import RECORD, Bench, captured, told


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def offered(bench: Bench, record: str = RECORD) -> None:
    bench.write(f"{record}/original/cat.jpg")
    assert bench.offer(record) is not None


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_that_is_not_found_once_is_not_put_back(bench: Bench, which: int) -> None:
    """Whoever reads the ledger would read a file that nobody writes to any more."""
    inode = bench.ledger_file.stat().st_ino

    fault = Fail("os", which, refuses(errno.ENOENT), only=lambda op: op.name == "stat")
    with captured() as lines, Hand(fault):
        offered(bench)

    assert fault.hit is not None
    assert inode == bench.ledger_file.stat().st_ino
    assert [] == told(lines, "ledger.restored")


def unlink(bench: Bench) -> None:
    bench.ledger_file.unlink()


def unlink_all(bench: Bench) -> None:
    for path in bench.directory.glob("ledger.db*"):
        path.unlink()


def unlink_log(bench: Bench) -> None:
    Path(f"{bench.ledger_file}-wal").unlink()


def replace_by_another(bench: Bench) -> None:
    unlink_all(bench)
    Ledger(f"sqlite:///{bench.ledger_file}", clock=SystemClock()).close()


def replace_by_rubbish(bench: Bench) -> None:
    bench.ledger_file.rename(bench.directory / "elsewhere.db")
    bench.ledger_file.write_bytes(b"not a database" * 1000)


def replace_by_backup(bench: Bench) -> None:
    backup = bench.directory / "backup.db"
    with sqlite3.connect(bench.ledger_file) as connection, sqlite3.connect(backup) as copy:
        connection.backup(copy)
    copy.close()
    connection.close()
    offered(bench, "avatars/7")
    backup.rename(bench.ledger_file)


@pytest.mark.parametrize(
    "harm",
    [unlink, unlink_all, unlink_log, replace_by_another, replace_by_rubbish, replace_by_backup],
    ids=lambda f: f.__name__,
)
def test_a_ledger_that_is_taken_away_is_put_back_with_all_that_it_had(bench: Bench, harm: object) -> None:
    """SQLite itself goes on writing into a file that has no name any more (FACTS 28)."""
    offered(bench)

    with captured() as lines:
        harm(bench)  # type: ignore[operator]
        offered(bench, "avatars/43")

    assert 1 == len(told(lines, "ledger.restored"))
    reopened = Ledger(f"sqlite:///{bench.ledger_file}", clock=SystemClock(), create=False)
    known = {row["path"] for row in bench.rows("SELECT path FROM record_status")}
    assert {RECORD, "avatars/43"} <= known
    assert (harm is replace_by_backup) == ("avatars/7" in known)  # which the backup lacked
    assert bench.ledger.id == reopened.id
    reopened.close()


def test_what_lay_in_its_place_is_kept_and_named(bench: Bench) -> None:
    offered(bench)
    replace_by_rubbish(bench)

    with captured() as lines:
        offered(bench, "avatars/43")

    [found] = bench.directory.glob("ledger.db.found-*Z")
    assert b"not a database" * 1000 == found.read_bytes()
    assert str(found) in told(lines, "ledger.restored")[0]["hint"]


def test_of_two_daemons_one_puts_it_back_and_the_other_takes_what_is_there(bench: Bench) -> None:
    offered(bench)
    other = Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock)
    bench.ledger_file.unlink()
    offered(bench, "avatars/43")

    with captured() as lines:
        other.hold("uploads", LedgerUnavailable("only to write something"))

    assert (1, 0) == (len(told(lines, "ledger.reopened")), len(told(lines, "ledger.restored")))
    assert {"uploads"} == set(bench.ledger.held())
    other.close()


def test_while_it_cannot_be_put_back_nothing_is_certain_and_it_is_told_once(bench: Bench) -> None:
    offered(bench)

    with captured() as lines:
        with bench.ledger_away():
            for _ in range(3):
                with pytest.raises(LedgerUnavailable):
                    offered(bench, "avatars/43")
            with pytest.raises(LedgerUnavailable):
                bench.ledger.demand_certain()
        offered(bench, "avatars/44")
        with pytest.raises(LedgerUnavailable):
            bench.ledger.demand_certain()  # one change that found room says little
        bench.clock.advance(5)
        offered(bench, "avatars/45")
        bench.ledger.demand_certain()

    assert ["ledger.unavailable", "ledger.available"] == [
        line["event"] for line in lines if line["event"].startswith("ledger.")
    ]  # fmt: skip


def test_a_file_that_was_removed_since_the_last_change_is_not_certain(bench: Bench) -> None:
    """Nothing is let go on its word, though it still answers."""
    offered(bench)
    bench.ledger_file.unlink()

    with pytest.raises(LedgerUnavailable, match="removed or replaced"):
        bench.ledger.demand_certain()


def test_a_disk_that_does_not_answer_is_no_reason_to_replace_the_file(bench: Bench) -> None:
    """It may be there and sound: a second one beside it would be written to by one daemon of two."""
    offered(bench)
    before = bench.ledger_file.stat().st_ino

    for number in (1, 2, 3, 4):
        hand = Hand(Fail("os", number, refuses(errno.EIO), only=lambda op: op.name == "stat"))
        with captured() as lines, hand, pytest.raises(LedgerUnavailable):
            bench.ledger.hold("uploads", LedgerUnavailable("only to write something"))
        assert [] == told(lines, "ledger.restored")

    bench.ledger.hold("uploads", LedgerUnavailable("only to write something"))
    assert before == bench.ledger_file.stat().st_ino
    assert [] == list(bench.directory.glob("ledger.db.found-*"))


# Damage


def damage(path: Path, *, spare: int = 0) -> None:
    """Overwrite a database, all but its first bytes."""
    for each in (path, Path(f"{path}-wal")):
        if each.exists():
            with open(each, "r+b") as file:
                file.seek(spare)
                file.write(b"\xff" * (each.stat().st_size - spare))


def test_a_damaged_ledger_is_kept_and_lost(bench: Bench) -> None:
    """It is made anew by a new daemon: what this one believes of claims and batches holds no more."""
    offered(bench)
    damage(bench.ledger_file)

    with captured() as lines, pytest.raises(LedgerUnavailable):
        for _ in range(50):  # SQLite has some of it in memory
            offered(bench, "avatars/43")
            bench.ledger._disconnect()

    assert bench.ledger.is_lost
    [kept] = bench.directory.glob("ledger.db.damaged-*Z")
    assert str(kept) == told(lines, "ledger.damaged")[0]["path"]
    assert not bench.ledger_file.exists()
    with pytest.raises(LedgerUnavailable, match="damaged"):
        bench.ledger.demand_certain()
    with pytest.raises(LedgerUnavailable, match="damaged"):
        offered(bench, "avatars/44")
    assert not bench.ledger_file.exists()


@pytest.mark.parametrize("how", ["removed", "damaged", "empty"])
def test_a_ledger_that_is_lost_between_two_starts_is_begun_anew_under_its_old_name(tmp_path: Path, how: str) -> None:
    """So its spools are still its own."""
    path = tmp_path / "spoold.db"
    before = Ledger(f"sqlite:///{path}", clock=SystemClock())
    before.close()
    if how == "removed":
        path.unlink()
    elif how == "damaged":
        damage(path)
    else:
        path.write_bytes(b"")

    with captured() as lines:
        after = Ledger(f"sqlite:///{path}", clock=SystemClock())

    assert before.id == after.id
    assert ["uploads"] == after.to_rebuild(["uploads"])
    assert 1 == len(told(lines, "ledger.lost"))
    assert (how == "damaged") == bool(told(lines, "ledger.damaged"))
    after.close()


def test_a_first_ledger_is_not_taken_for_a_lost_one(tmp_path: Path) -> None:
    with captured() as lines:
        ledger = Ledger(f"sqlite:///{tmp_path / 'spoold.db'}", clock=SystemClock())

    assert [] == ledger.to_rebuild(["uploads"]) == told(lines, "ledger.lost")
    assert ledger.id == LedgerFile(str(tmp_path / "spoold.db")).known_id
    ledger.close()


def test_a_command_leaves_a_damaged_ledger_to_the_daemon(bench: Bench) -> None:
    bench.ledger.close()
    damage(bench.ledger_file)

    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(f"sqlite:///{bench.ledger_file}", clock=SystemClock(), create=False)

    assert "makes the ledger anew by itself" in caught.value.hint
    assert bench.ledger_file.exists()


def test_a_command_makes_no_file_where_the_ledger_was_removed(bench: Bench) -> None:
    ledger = Ledger(f"sqlite:///{bench.ledger_file}", clock=SystemClock(), create=False)
    ledger._disconnect()
    unlink_all(bench)

    with pytest.raises(LedgerUnavailable):
        ledger.counts()

    assert not bench.ledger_file.exists()
    ledger.close()


# Room


def test_the_reserve_is_pages_that_are_written_and_free(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")

    keep_reserve(connection)
    pages = connection.execute("PRAGMA freelist_count").fetchone()[0]
    blocks = (tmp_path / "a.db").stat().st_blocks * 512
    keep_reserve(connection)

    assert pages * 4096 >= 8 << 20 <= blocks
    assert pages == connection.execute("PRAGMA freelist_count").fetchone()[0]
    connection.close()


def test_a_reserve_that_was_begun_when_the_process_died_is_made_anew(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.execute("CREATE TABLE reserve AS SELECT randomblob(?) AS bytes", (8 << 20,))

    keep_reserve(connection)

    assert [] == connection.execute("SELECT name FROM sqlite_master").fetchall()
    assert connection.execute("PRAGMA freelist_count").fetchone()[0] * 4096 >= 8 << 20
    connection.close()


def test_a_backup_is_put_back_whole_or_not_at_all(bench: Bench) -> None:
    offered(bench)
    shutil.copy(bench.ledger_file, bench.directory / "other.db")
    before = {path.name for path in bench.directory.iterdir()}

    with bench.ledger_away(), pytest.raises(LedgerUnavailable):
        offered(bench, "avatars/43")

    assert before == {path.name for path in bench.directory.iterdir()}
