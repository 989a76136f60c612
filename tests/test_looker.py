"""Where files become batches: what is offered, what waits, and when it is looked at again."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spoold.errors import LedgerUnavailable, SpoolBroken, Unfinished
from spoold.looker import Looker, Next
from spoold.model import State
from tests.nth import Fail, Hand, refuses
from tests.paperclip import picture
from tests.parts import (
    NAME,
    PATH,
    RECORD,
    Bench,
    alone,
    captured,
    in_a_world,
    mount_tmpfs,
    told,
    with_own_mounts,
    without_leases,
    without_root_powers,
)

STYLES = ("original", "thumb")
WITHIN_S = 600.0
JPEG = picture(24, 18)
CAT = ("original/cat.jpg", "thumb/cat.jpg")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def save(bench: Bench, *paths: str, content: bytes = JPEG, record: str = RECORD) -> None:
    for path in paths:
        bench.write(f"{record}/{path}", content)


def settled(bench: Bench, looker: Looker, *, seconds: float = 5.0) -> Next:
    """Look, let time pass, and look again: what the watcher does of a record that is quiet."""
    alone(looker.look(RECORD))
    bench.clock.advance(seconds)
    return alone(looker.look(RECORD))


def batches(bench: Bench) -> list[tuple[str, set[str]]]:
    """Return the state and the files of every batch, oldest first, paths below the record."""
    rows = bench.rows(
        "SELECT b.id, b.state, f.path FROM batch b JOIN batch_file f ON f.batch_id = b.id WHERE NOT f.is_marker ORDER BY b.id"
    )
    return [
        (next(row["state"] for row in rows if row["id"] == number),
         {row["path"].removeprefix(f"{RECORD}/") for row in rows if row["id"] == number})
        for number in dict.fromkeys(row["id"] for row in rows)
    ]  # fmt: skip


def decided_by(bench: Bench) -> list[str]:
    return [row["decided_by"] for row in bench.rows("SELECT decided_by FROM batch ORDER BY id")]


def reason(bench: Bench) -> str:
    found: str = bench.rows("SELECT reason FROM sighting")[0]["reason"]
    return found


# What is offered


def test_a_complete_record_is_offered_once_it_is_quiet(bench: Bench) -> None:
    offers: list[int] = []
    looker = bench.looker(styles=STYLES, on_offer=lambda: offers.append(1))
    save(bench, *CAT)
    first = alone(looker.look(RECORD))
    waiting = bench.state()

    bench.clock.advance(1.0)
    second = alone(looker.look(RECORD))

    assert (Next(1.0, is_settling=True), "receiving") == (first, waiting)
    assert (Next(), "queued", [1]) == (second, bench.state(), offers)
    assert ["styles"] == decided_by(bench)


def test_a_record_is_offered_once_however_often_it_is_looked_at(bench: Bench) -> None:
    looker = bench.looker()
    save(bench, *CAT)

    for _ in range(3):
        settled(bench, looker)

    assert [("pending", set(CAT))] == batches(bench)


def test_there_is_nothing_to_say_of_a_record_that_was_never_there(bench: Bench) -> None:
    assert Next() == alone(bench.looker().look(RECORD))
    assert {} == bench.status()


def test_rule_1_a_complete_basename_goes_up_while_another_one_waits(bench: Bench) -> None:
    save(bench, *CAT, "original/dog.jpg")

    again = settled(bench, bench.looker(styles=STYLES))

    assert [("pending", set(CAT))] == batches(bench)
    assert "receiving" == bench.state()
    assert "dog: style thumb missing" == reason(bench)
    assert again.in_s is not None


def test_rule_1_what_waited_joins_the_batch_that_still_has_its_files_here(bench: Bench) -> None:
    """The newer batch takes the older one's place, and must answer for its files too."""
    looker = bench.looker(styles=STYLES)
    save(bench, *CAT, "original/dog.jpg")
    settled(bench, looker)

    save(bench, "thumb/dog.jpg")
    settled(bench, looker)

    both = {*CAT, "original/dog.jpg", "thumb/dog.jpg"}
    assert [("superseded", set(CAT)), ("pending", both)] == batches(bench)
    assert "queued" == bench.state()


def test_a_file_that_is_written_again_makes_a_new_batch(bench: Bench) -> None:
    looker = bench.looker()
    save(bench, *CAT)
    settled(bench, looker)

    save(bench, "original/cat.jpg", content=picture(24, 18, seed=1))
    settled(bench, looker)

    assert [("superseded", set(CAT)), ("pending", set(CAT))] == batches(bench)


def test_a_file_that_is_about_to_be_set_aside_is_not_taken_for_a_new_one(bench: Bench) -> None:
    """Between the ledger's word and the rename, or where that is refused; the record was `receiving` again for a moment."""
    looker = bench.looker()
    claim = bench.batch_stored(dict.fromkeys(CAT, JPEG))
    bench.ledger.set_aside(claim, [replace(file, aside_name=f"1.{file.id}.x") for file in claim.batch.files])

    again = alone(looker.look(RECORD))

    assert (Next(), "uploaded") == (again, bench.status()["state"])
    assert [("stored", set(CAT))] == batches(bench)


def test_what_takes_the_place_of_a_file_that_lies_aside_is_new(bench: Bench) -> None:
    looker = bench.looker()
    claim = bench.batch_stored({"original/cat.jpg": JPEG})
    bench.ledger.set_aside(claim, [replace(file, aside_name=f"1.{file.id}.x") for file in claim.batch.files])
    path = bench.spool.root / RECORD / "original/cat.jpg"
    path.rename(path.with_name("elsewhere"))
    path.with_name("elsewhere").rename(path)  # the very same file, back again

    settled(bench, looker)

    assert "queued" == bench.status()["state"]


def test_a_style_made_again_later_goes_up_alone(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, *CAT)
    settled(bench, looker)
    claim = bench.stored(bench.claimed())
    bench.ledger.let_go(claim, claim.batch.files, deleted=True)
    bench.ledger.done(claim, None)
    for path in CAT:
        (bench.root / RECORD / path).unlink()

    save(bench, "thumb/cat.jpg", content=picture(12, 9))
    settled(bench, looker)

    assert ("pending", {"thumb/cat.jpg"}) == batches(bench)[-1]
    assert ["styles", "quiet"] == decided_by(bench)


def test_the_marker_goes_with_its_batch(tmp_path: Path) -> None:
    with Bench(tmp_path, marker=".done") as bench:
        looker = bench.looker()
        save(bench, *CAT)
        settled(bench, looker)
        before = bench.state()

        save(bench, ".done", content=b"")
        settled(bench, looker)

        assert ("receiving", "queued") == (before, bench.state())
        rows = bench.rows("SELECT path, is_marker FROM batch_file WHERE is_marker")
        assert [f"{RECORD}/.done"] == [row["path"] for row in rows]
        assert ["marker"] == decided_by(bench)


# The vetoes


def test_rule_2_an_image_that_stops_before_its_end_is_a_veto(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, "original/cat.jpg")
    save(bench, "thumb/cat.jpg", content=JPEG[:-100])

    again = settled(bench, looker)

    assert ("receiving", []) == (bench.state(), batches(bench))
    assert reason(bench).startswith("cat: thumb/cat.jpg: ")
    assert again.in_s is not None and again.in_s <= 30


def test_rule_2_an_empty_file_that_claims_to_be_an_image_is_incomplete(bench: Bench) -> None:
    save(bench, "original/cat.jpg", content=b"")

    settled(bench, bench.looker())

    assert ("receiving", []) == (bench.state(), batches(bench))


def test_nobody_looks_at_images_where_the_configuration_says_none(bench: Bench) -> None:
    save(bench, "original/cat.jpg", content=JPEG[:-100])

    settled(bench, bench.looker(images="none"))

    assert "queued" == bench.state()


def test_rule_2_a_writer_is_a_veto_whatever_the_image_looks_like(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES, images="none")
    save(bench, *CAT)

    with open(bench.root / RECORD / "thumb/cat.jpg", "r+b"):
        again = settled(bench, looker)
        while_open = bench.state()
        why = reason(bench)
    bench.clock.advance(again.in_s or 0)
    alone(looker.look(RECORD))

    assert ("receiving", "cat: thumb/cat.jpg is open for writing") == (while_open, why)
    assert again.in_s is not None and again.in_s <= 30
    assert "queued" == bench.state()


def test_rule_2_where_the_kernel_knows_no_leases_writers_are_no_veto(bench: Bench) -> None:
    looker = bench.looker(images="none")
    save(bench, *CAT)

    with open(bench.root / RECORD / "thumb/cat.jpg", "r+b"):
        in_a_world(lambda: settled(bench, looker), without_leases())

    assert "queued" == bench.state()


def test_a_veto_of_one_basename_does_not_hold_back_another(bench: Bench) -> None:
    save(bench, *CAT)
    save(bench, "original/dog.jpg", content=JPEG[:-100])

    settled(bench, bench.looker())

    assert [("pending", set(CAT))] == batches(bench)


def test_a_file_that_may_not_be_read_yet_waits(bench: Bench) -> None:
    """Paperclip's files are 0600 for a moment."""
    save(bench, "original/cat.jpg")
    path = bench.root / RECORD / "original/cat.jpg"
    path.chmod(0)
    looker = bench.looker()

    again = in_a_world(lambda: settled(bench, looker), without_root_powers)
    while_shut = bench.state()
    path.chmod(0o644)
    in_a_world(lambda: settled(bench, looker), without_root_powers)

    assert ("receiving", "queued") == (while_shut, bench.state())
    assert again.in_s is not None and again.in_s <= 30


def test_a_file_that_a_lease_is_held_on_waits_and_the_watcher_lives(bench: Bench) -> None:
    save(bench, "original/cat.jpg")
    looker = bench.looker()
    holder = os.open(bench.root / RECORD / "original/cat.jpg", os.O_RDWR)
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    settled(bench, looker)
    while_held, why = bench.state(), reason(bench)
    os.close(holder)
    settled(bench, looker)

    assert "receiving" == while_held and "lease" in why
    assert "queued" == bench.state()


def test_of_very_many_that_are_incomplete_the_first_few_are_named(bench: Bench) -> None:
    for number in range(500):
        save(bench, f"original/cat{number:03}.jpg")

    settled(bench, bench.looker(styles=["thumb"]))

    assert "cat000: style thumb missing; cat001: " in reason(bench)
    assert reason(bench).endswith("; and 480 more")


def decode_fails(bench: Bench, basename: str) -> None:
    """Have the walk find that one image of its batch does not decode."""
    claim = bench.claimed()
    bench.ledger.withdraw(claim, Unfinished(f"decode {basename}: truncated", [basename]), vetoed=[basename])


def test_a_snapshot_that_did_not_decode_is_not_offered_again(bench: Bench) -> None:
    looker = bench.looker(images="decode")
    save(bench, *CAT)
    settled(bench, looker)
    decode_fails(bench, "cat")

    again = settled(bench, looker)

    assert [("superseded", set(CAT))] == batches(bench)
    assert "cat: an image in it does not decode" == reason(bench)
    assert again.in_s is not None


def test_a_file_that_did_not_decode_is_offered_again_once_it_changes(bench: Bench) -> None:
    looker = bench.looker(images="decode")
    save(bench, *CAT)
    settled(bench, looker)
    decode_fails(bench, "cat")

    save(bench, "thumb/cat.jpg", content=picture(12, 9))
    settled(bench, looker)

    assert "queued" == bench.state()


def test_rule_1_an_image_that_does_not_decode_does_not_hold_back_the_others(bench: Bench) -> None:
    looker = bench.looker(images="decode")
    save(bench, *CAT, "original/dog.jpg")
    settled(bench, looker)
    decode_fails(bench, "dog")

    settled(bench, looker)

    assert ("pending", set(CAT)) == batches(bench)[-1]
    assert ("receiving", "dog: an image in it does not decode") == (bench.state(), reason(bench))


def test_several_images_that_do_not_decode_are_all_remembered(bench: Bench) -> None:
    """Else each would be offered again because of the other, for ever."""
    looker = bench.looker(images="decode")
    save(bench, "original/cat.jpg", "original/dog.jpg")
    settled(bench, looker)
    decode_fails(bench, "dog")
    settled(bench, looker)
    decode_fails(bench, "cat")

    settled(bench, looker)

    assert [("superseded", {"original/cat.jpg", "original/dog.jpg"}), ("superseded", {"original/cat.jpg"})] == batches(bench)


def test_what_a_person_wants_as_it_lies_is_offered_without_styles_and_image_ends(bench: Bench) -> None:
    looker = bench.looker(styles=("original", "thumb"))
    save(bench, "original/cat.jpg", content=JPEG[:-100])
    settled(bench, looker)

    bench.ledger.retry([RECORD], as_is=True)
    settled(bench, looker)

    assert [("pending", {"original/cat.jpg"})] == batches(bench)
    assert ["as-is"] == decided_by(bench)


def test_what_a_person_wants_as_it_lies_still_waits_for_a_writer(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, "original/cat.jpg")
    settled(bench, looker)
    bench.ledger.retry([RECORD], as_is=True)

    with open(bench.root / RECORD / "original/cat.jpg", "r+b"):
        settled(bench, looker)
        while_open = bench.state()
    settled(bench, looker)

    assert ("receiving", "queued") == (while_open, bench.state())


# What waits


def test_an_incomplete_record_is_stalled_after_a_while_and_its_files_stay(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES, within_s=WITHIN_S)
    save(bench, "original/cat.jpg")
    first = settled(bench, looker, seconds=5)
    before = bench.state()

    bench.clock.advance(first.in_s or 0)
    last = alone(looker.look(RECORD))

    assert ("receiving", WITHIN_S - 5) == (before, first.in_s)
    assert ("stalled", Next()) == (bench.state(), last)
    assert "cat: style thumb missing" == bench.status()["error"]
    assert [f"{RECORD}/original/cat.jpg"] == bench.files()


def test_a_stalled_record_goes_on_when_the_missing_style_comes(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES, within_s=WITHIN_S)
    save(bench, "original/cat.jpg")
    settled(bench, looker, seconds=WITHIN_S)
    stalled = bench.state()

    save(bench, "thumb/cat.jpg")
    settled(bench, looker)

    assert ("stalled", "queued") == (stalled, bench.state())


def test_how_long_it_has_been_quiet_is_no_news(bench: Bench) -> None:
    """A look at a record that is being written must not cost a commit each time."""
    looker = bench.looker(settle_s=60)
    save(bench, *CAT)
    alone(looker.look(RECORD))
    before = bench.rows("SELECT * FROM sighting"), bench.status()["updated_at"]

    for _ in range(5):
        bench.clock.advance(7)
        alone(looker.look(RECORD))

    assert before == (bench.rows("SELECT * FROM sighting"), bench.status()["updated_at"])
    assert ["record.seen"] == bench.events()


def test_a_record_that_the_app_removed_is_gone(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, "original/cat.jpg")
    alone(looker.look(RECORD))
    (bench.root / RECORD / "original/cat.jpg").unlink()

    alone(looker.look(RECORD))

    assert "gone" == bench.state()


def test_a_batch_whose_files_the_app_removed_is_gone(bench: Bench) -> None:
    looker = bench.looker()
    save(bench, *CAT)
    settled(bench, looker)
    for path in CAT:
        (bench.root / RECORD / path).unlink()

    alone(looker.look(RECORD))

    assert "gone" == bench.state()
    assert bench.claim() is None


def test_an_incomplete_basename_that_the_app_removed_waits_no_longer(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, *CAT, "original/dog.jpg")
    settled(bench, looker)
    before = bench.state()
    (bench.root / RECORD / "original/dog.jpg").unlink()

    alone(looker.look(RECORD))

    assert ("receiving", "queued") == (before, bench.state())


@pytest.mark.parametrize("how_far", ["receiving", "queued"])
@pytest.mark.parametrize("place", [RECORD, f"{RECORD}/original"])
def test_what_may_not_be_looked_at_is_not_taken_for_gone(bench: Bench, how_far: str, place: str) -> None:
    """Deletion inferred from an unreadable source has emptied buckets elsewhere (FACTS 37)."""
    looker = bench.looker(styles=STYLES if how_far == "receiving" else None)
    save(bench, "original/cat.jpg")
    settled(bench, looker)
    (bench.root / place).chmod(0)

    with captured() as lines:
        in_a_world(lambda: alone(looker.look(RECORD)), without_root_powers)

    assert how_far == bench.state()
    assert [place] == [line["path"] for line in told(lines, "path.ignored")]
    (bench.root / place).chmod(0o755)
    assert "queued" == (settled(bench, bench.looker()) and bench.state())


def test_rule_12_what_a_mount_hides_is_not_taken_for_gone(bench: Bench) -> None:
    save(bench, "original/cat.jpg")
    settled(bench, bench.looker())

    def work() -> None:
        mount_tmpfs(bench.root / RECORD)
        alone(bench.looker().look(RECORD))

    in_a_world(work, with_own_mounts)

    assert "queued" == bench.state()


@pytest.mark.parametrize("how_far", ["receiving", "queued"])
def test_what_lay_in_another_root_is_not_taken_for_gone_until_it_was_met_again(bench: Bench, how_far: str) -> None:
    """A filesystem that is not mounted is no app that removed its files."""
    looker = bench.looker(styles=STYLES if how_far == "receiving" else None)
    bench.ledger.enter(NAME, "a house")
    save(bench, "original/cat.jpg")
    settled(bench, looker)
    bench.ledger.enter(NAME, "another house")
    (bench.root / RECORD).rename(bench.directory / "away")

    states = []
    alone(looker.look(RECORD))
    states.append(bench.state())
    (bench.directory / "away").rename(bench.root / RECORD)
    alone(looker.look(RECORD))
    states.append(bench.state())
    (bench.root / RECORD / "original/cat.jpg").unlink()
    alone(looker.look(RECORD))
    states.append(bench.state())

    assert [how_far, how_far, "gone"] == states


def test_nothing_is_taken_for_gone_in_a_root_that_was_not_entered_yet(bench: Bench) -> None:
    """It was replaced a moment ago, and the watcher has not seen it yet."""
    looker = bench.looker(styles=STYLES)
    save(bench, "original/cat.jpg")
    settled(bench, looker)
    looker.root = bench.spool.root_identity()
    bench.root.rename(bench.directory / "away")
    bench.root.mkdir()

    again = alone(looker.look(RECORD))

    assert "receiving" == bench.state()
    assert again.in_s is not None and again.in_s <= 1.0


# What can have no key

LONG = "x" * 200  # with the prefix of the key below, over 1024 bytes


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Bench]:
    """A spool in which names may not be long."""
    with Bench(tmp_path, key="y" * 850 + "/" + PATH) as bench:
        yield bench


def test_a_file_that_can_have_no_key_is_dead_at_once(narrow: Bench) -> None:
    save(narrow, f"original/{LONG}.jpg")

    settled(narrow, narrow.looker())

    assert [("pending", {f"original/{LONG}.jpg"})] == batches(narrow)
    assert ["refused"] == decided_by(narrow)


def test_a_file_that_can_have_no_key_keeps_no_other_from_going_up(narrow: Bench) -> None:
    looker = narrow.looker()
    save(narrow, *CAT, f"original/{LONG}.jpg")

    for _ in range(4):
        settled(narrow, looker)

    assert ("pending", set(CAT)) == batches(narrow)[-1]
    assert 1 == len(batches(narrow)), "and the two do not take turns"


@pytest.mark.parametrize("deletes", [True, False])
def test_a_file_that_can_have_no_key_is_for_a_person_once_all_others_are_done(narrow: Bench, deletes: bool) -> None:
    looker = narrow.looker()
    save(narrow, *CAT, f"original/{LONG}.jpg")
    settled(narrow, looker)
    claim = narrow.stored(narrow.claimed())
    if deletes:
        for path in CAT:
            (narrow.root / RECORD / path).unlink()
        narrow.ledger.let_go(claim, claim.batch.files, deleted=True)
    narrow.ledger.done(claim, None)

    for _ in range(4):
        settled(narrow, looker)

    status = narrow.status()
    assert status["processing"] == 1, "the app must not believe that all is well"
    assert {f"{RECORD}/{path}" for path in CAT} == set(narrow.objects())
    assert narrow.rows("SELECT count(*) AS n FROM batch")[0]["n"] <= 2, "nothing takes turns"


# What is odd


def test_rule_12_what_is_odd_is_reported_once(bench: Bench) -> None:
    save(bench, *CAT)
    (bench.root / RECORD / "original/link.jpg").symlink_to("/etc/passwd")
    looker = bench.looker()

    with captured() as lines:
        for _ in range(3):
            settled(bench, looker)

    assert [(NAME, f"{RECORD}/original/link.jpg", "it is a symbolic link")] == [
        (line["spool"], line["path"], line["detail"]) for line in told(lines, "path.ignored")
    ]
    assert "queued" == bench.state()


def test_rule_12_a_name_that_is_no_utf_8_can_be_reported(bench: Bench) -> None:
    """As JSON, on a terminal, anywhere."""
    bench.write(os.fsdecode(b"avatars/42/original/\xff.jpg"), JPEG)

    with captured() as lines:
        alone(bench.looker().look(RECORD))

    [line] = told(lines, "path.ignored")
    assert "avatars/42/original/\\udcff.jpg" == line["path"]
    assert line["path"].encode("utf-8")


# Faults


def test_a_root_that_is_gone_is_told_and_nothing_is_inferred(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    save(bench, "original/cat.jpg")
    alone(looker.look(RECORD))
    bench.root.rename(bench.directory / "elsewhere")

    with pytest.raises(SpoolBroken):
        alone(looker.look(RECORD))

    assert "receiving" == bench.state()


def test_a_ledger_that_is_gone_is_told(bench: Bench) -> None:
    save(bench, "original/cat.jpg")

    with bench.ledger_away(), pytest.raises(LedgerUnavailable):
        alone(bench.looker().look(RECORD))


def test_a_file_that_goes_away_under_our_eyes_waits_for_another_look(bench: Bench) -> None:
    """Between the look and the opening for the vetoes."""
    looker = bench.looker()
    save(bench, *CAT)
    alone(looker.look(RECORD))
    bench.clock.advance(5)
    known = bench.ledger.known(NAME, RECORD)
    snapshot = bench.spool.look(RECORD)
    from spoold.looker import verdicts_of, with_veto

    [verdict] = verdicts_of(bench.spool, looker._rules, snapshot, known, age_s=bench.ages.age_s)
    (bench.root / RECORD / "thumb/cat.jpg").unlink()

    found = with_veto(bench.spool, "ends", snapshot.files, verdict)

    assert ("quiet", False) == (found.vetoed_by, found.is_complete)
    assert State.PENDING is not known.state


@pytest.mark.parametrize("call", ["pread", "fcntl", "open", "openat2", "fstat"])
def test_a_file_that_cannot_be_read_is_waited_for_and_in_nobodys_way(bench: Bench, call: str) -> None:
    """A bad sector ended the watcher's thread, and with it the daemon, at every start again."""
    looker = bench.looker()
    save(bench, "original/cat.jpg", "original/dog.jpg")
    alone(looker.look(RECORD))
    bench.clock.advance(5.0)

    # What is opened first is the root, then the record's directories, and the files come then.
    is_of_a_file = {"open": 3, "openat2": 3, "fstat": 9}.get(call, 1)
    with Hand(Fail("os", is_of_a_file, refuses(errno.EIO), only=lambda op: op.name == call)) as hand:
        again = alone(looker.look(RECORD))

    assert isinstance(hand.plan, Fail) and hand.plan.hit is not None
    if batches(bench):
        assert [("pending", {"original/dog.jpg"})] == batches(bench)
        assert "cat" in bench.rows("SELECT reason FROM sighting")[0]["reason"]
    bench.clock.advance(again.in_s or 0.0)
    alone(looker.look(RECORD))
    assert {"original/cat.jpg", "original/dog.jpg"} == batches(bench)[-1][1]


def test_what_is_complete_at_first_sight_is_told_as_seen_all_the_same(bench: Bench) -> None:
    """A record's lines begin with its being seen, also if nothing is waited for, or if that could not be written down."""
    save(bench, *CAT)

    alone(bench.looker(settle_s=0.0).look(RECORD))

    assert ["record.seen", "batch.settled"] == bench.events()


# After a power cut


@pytest.fixture
def emptied(bench: Bench) -> Looker:
    """A file that the app never synced came back empty; look at it when the machine is up again."""
    save(bench, "original/paper.pdf", content=b"")
    bench.clock.boot()
    looker = bench.looker()
    settled(bench, looker)
    return looker


def test_a_file_that_a_power_cut_emptied_stalls_at_once_with_the_reason(bench: Bench, emptied: Looker) -> None:
    assert "stalled" == bench.state()
    assert "original/paper.pdf: it is empty, since before the boot; a power cut leaves such files" in reason(bench)
    assert [] == batches(bench)


def test_what_the_app_writes_anew_after_a_power_cut_goes_up(bench: Bench, emptied: Looker) -> None:
    save(bench, "original/paper.pdf", content=b"")
    settled(bench, emptied)

    assert [("pending", {"original/paper.pdf"})] == batches(bench)


def test_what_a_person_wants_as_it_lies_after_a_power_cut_goes_up(bench: Bench, emptied: Looker) -> None:
    bench.ledger.retry([RECORD], as_is=True)
    settled(bench, emptied)

    assert [("pending", {"original/paper.pdf"})] == batches(bench)


def test_a_whole_file_from_before_the_boot_goes_up(bench: Bench) -> None:
    save(bench, "original/paper.pdf", content=b"all of it")
    bench.clock.boot()

    settled(bench, bench.looker())

    assert [("pending", {"original/paper.pdf"})] == batches(bench)


def test_a_file_that_the_ledger_knew_with_this_size_was_not_cut_off(bench: Bench) -> None:
    """Its other styles are new, so that all of them are judged again."""
    save(bench, "original/paper.pdf", content=b"x" * 4096)
    settled(bench, bench.looker())
    save(bench, "text/paper.txt", content=b"in words")
    bench.clock.boot()

    settled(bench, bench.looker())

    assert {"original/paper.pdf", "text/paper.txt"} == batches(bench)[-1][1]
