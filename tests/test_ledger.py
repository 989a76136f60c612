"""What is true of every batch and object, and who is at it."""

from __future__ import annotations

import dataclasses
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from spoold.clock import iso
from spoold.errors import (
    BadPath,
    Changed,
    ClaimLost,
    KeyTaken,
    LedgerUnavailable,
    ObjectRefused,
    SpoolBroken,
    StoreDenied,
    StoreUnavailable,
    Unfinished,
)
from spoold.ledger import STATES, Ledger, schema
from spoold.model import Answer, Claim, Identity, Put, PutResult, Snapshot, State
from tests.nth import Fail, Hand, Moment, ledger_says
from tests.parts import (
    BUCKET,
    LEASE_S,
    NAME,
    RECORD,
    Bench,
    ManualClock,
    captured,
    confirmed,
    told,
)

CAT = {"original/cat.jpg": b"a cat", "thumb/cat.jpg": b"cat"}
DOG = {"original/dog.jpg": b"a dog", "thumb/dog.jpg": b"dog"}
CAT_KEYS = {f"{RECORD}/{path}" for path in CAT}
DOG_KEYS = {f"{RECORD}/{path}" for path in DOG}
DAY_S = 86400.0
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def write(bench: Bench, files: dict[str, bytes], record: str = RECORD) -> None:
    for path, content in files.items():
        bench.write(f"{record}/{path}", content)


def offered(bench: Bench, files: dict[str, bytes] = CAT, record: str = RECORD) -> int:
    write(bench, files, record)
    batch = bench.offer(record)
    assert batch is not None, "nothing new"
    return batch


def see(bench: Bench, *, state: str = "receiving", reason: str = "style thumb missing", record: str = RECORD) -> None:
    snapshot = bench.spool.look(record)
    bench.ledger.see(NAME, snapshot, snapshot.files, state=state, reason=reason)


def done(bench: Bench, claim: Claim) -> None:
    bench.ledger.done(claim, None)


def doubtful(puts: list[Put], at: float) -> list[PutResult]:
    """Return what became of PUTs that nobody answered."""
    return [PutResult(put, Answer.DOUBT, doubt_at=at, error=StoreUnavailable("put: timeout")) for put in puts]


def refused(puts: list[Put]) -> list[PutResult]:
    return [PutResult(put, Answer.REFUSED, error=StoreDenied("put: 403")) for put in puts]


def replace_with(bench: Bench, files: dict[str, bytes], gone: dict[str, bytes]) -> Claim:
    """Let the app replace an upload by another one, and have it stored."""
    for path in gone:
        (bench.root / RECORD / path).unlink(missing_ok=True)
    return bench.batch_stored(files)


# From seen to done


def test_a_record_that_nobody_has_seen_has_no_row(bench: Bench) -> None:
    assert {} == bench.status()
    assert {} == bench.ledger.counts()


def test_a_record_goes_all_the_way(bench: Bench) -> None:
    states = []

    def note() -> None:
        status = bench.status()
        states.append((status["state"], status["processing"]))

    write(bench, CAT)
    see(bench)
    note()
    bench.offer()
    note()
    claim = bench.claimed()
    note()
    claim = bench.stored(claim)
    note()
    done(bench, claim)
    note()

    assert [("receiving", 1), ("queued", 1), ("uploading", 1), ("uploaded", 0), ("done", 0)] == states
    assert ["record.seen", "batch.settled", "batch.claimed", "batch.stored", "record.cleared"] == bench.events()


def test_a_stalled_record_that_goes_on_is_receiving_again_and_says_so(bench: Bench) -> None:
    """It was stalled twice in a row, by its lines: an app that waits for the second one had heard of no change."""
    write(bench, CAT)

    for state in ("receiving", "stalled", "receiving", "receiving", "stalled"):
        see(bench, state=state)

    assert ["record.seen", "record.stalled", "record.seen", "record.stalled"] == bench.events()


def test_a_record_that_was_not_complete_for_long_is_stalled_and_says_why(bench: Bench) -> None:
    write(bench, CAT)
    see(bench)

    see(bench, state="stalled", reason="cat: style thumb missing")

    status = bench.status()
    assert ("stalled", 1, "Stalled", "cat: style thumb missing") == (
        status["state"], status["processing"], status["error_code"], status["error"],
    )  # fmt: skip
    assert ["record.seen", "record.stalled"] == bench.events()


def test_looking_again_at_the_same_thing_is_no_news(bench: Bench) -> None:
    write(bench, CAT)
    for _ in range(3):
        see(bench)
    for _ in range(3):
        see(bench, state="stalled")

    assert ["record.seen", "record.stalled"] == bench.events()


def test_a_record_that_the_app_removed_before_it_was_complete_is_gone(bench: Bench) -> None:
    write(bench, CAT)
    see(bench)

    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    assert ("gone", 0) == (bench.status()["state"], bench.status()["processing"])
    assert ["record.seen", "record.gone"] == bench.events()


def test_a_record_that_the_app_removed_before_it_was_uploaded_is_gone(bench: Bench) -> None:
    offered(bench)

    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    assert "gone" == bench.state()
    assert ["batch.settled", "batch.superseded", "record.gone"] == bench.events()
    assert bench.claim() is None


def test_a_record_that_was_uploaded_is_not_gone_when_its_files_are(bench: Bench) -> None:
    bench.batch_stored(CAT)

    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    assert "uploaded" == bench.state()


def test_a_record_that_is_gone_and_comes_back_is_seen_again(bench: Bench) -> None:
    write(bench, CAT)
    see(bench)
    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    see(bench)

    assert "receiving" == bench.state()
    assert ["record.seen", "record.gone", "record.seen"] == bench.events()


def test_what_waits_no_longer_says_so(bench: Bench) -> None:
    """A second basename, of a save that was rolled back, is removed by hand."""
    bench.batch_stored(CAT)
    bench.write(f"{RECORD}/original/dog.jpg")
    see(bench)
    before = bench.state()

    bench.ledger.nothing_waits(NAME, RECORD, is_empty=False)

    assert ("receiving", "uploaded") == (before, bench.state())


def test_nothing_is_said_of_a_record_that_nobody_knows(bench: Bench) -> None:
    bench.ledger.nothing_waits(NAME, "avatars/77", is_empty=True)

    assert {} == bench.status("avatars/77")


def test_the_same_files_are_not_accepted_twice(bench: Bench) -> None:
    """Another daemon was quicker, or a sweep met them again."""
    offered(bench)

    again = bench.offer()

    assert again is None
    assert ["batch.settled"] == bench.events()


@pytest.mark.parametrize("state", ["pending", "dead", "stored"])
def test_a_newer_batch_takes_the_place_of_the_one_before(bench: Bench, state: str) -> None:
    old = offered(bench)
    if state == "dead":
        bench.ledger.bury(bench.claimed(), BadPath("put: no"))
    elif state == "stored":
        bench.stored(bench.claimed())

    new = offered(bench, {"original/cat.jpg": b"another cat"})

    states = {row["id"]: row["state"] for row in bench.rows("SELECT id, state FROM batch")}
    assert {old: "superseded", new: "pending"} == states
    assert "queued" == bench.state()
    assert ["batch.settled", "batch.superseded"] == bench.events()[-2:]


def test_a_batch_that_is_done_stays_done_when_a_newer_one_comes(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))

    offered(bench, DOG)

    assert ["done", "pending"] == [row["state"] for row in bench.rows("SELECT state FROM batch ORDER BY id")]
    assert "queued" == bench.state()


def test_the_sighting_ends_when_all_of_the_record_is_accepted(bench: Bench) -> None:
    write(bench, CAT)
    see(bench)

    bench.offer(is_all=False)
    while_some_waits = bench.state()
    bench.ledger.nothing_waits(NAME, RECORD, is_empty=False)

    assert ("receiving", "queued") == (while_some_waits, bench.state())


def test_what_is_known_of_a_record_is_what_its_current_batch_answers_for(bench: Bench) -> None:
    offered(bench)

    known = bench.ledger.known(NAME, RECORD)

    assert {file.path: file.identity for file in bench.spool.look(RECORD).files} == known.files
    assert (State.PENDING, False) == (known.state, known.has_original)


def test_what_is_gone_is_not_known_any_more(bench: Bench) -> None:
    """If it appears at its place again, it is somebody's new file."""
    claim = bench.batch_stored(CAT)
    bench.ledger.let_go(claim, claim.batch.files, deleted=False)

    known = bench.ledger.known(NAME, RECORD)

    assert {} == known.files
    assert (State.STORED, True) == (known.state, known.has_original)


def test_nothing_is_known_of_a_record_that_was_never_seen(bench: Bench) -> None:
    known = bench.ledger.known(NAME, RECORD)

    assert ({}, None, False, None) == (known.files, known.state, known.has_original, known.sighted)


def test_a_sweep_learns_what_it_should_have_met(bench: Bench) -> None:
    for number, state in enumerate(["receiving", "pending", "dead", "stored", "done", "gone"]):
        record = f"avatars/{number}"
        write(bench, CAT, record)
        if state in ("receiving", "gone"):
            see(bench, record=record)
        if state == "gone":
            bench.ledger.nothing_waits(NAME, record, is_empty=True)
        if state in ("dead", "stored", "done"):
            bench.offer(record)
            claim = bench.claimed()
            if state == "dead":
                bench.ledger.bury(claim, BadPath("put: no"))
            else:
                claim = bench.stored(claim)
            if state == "done":
                done(bench, claim)
    bench.offer("avatars/1")

    assert {"avatars/0", "avatars/1", "avatars/2"} == set(bench.ledger.unfinished(NAME))
    assert [] == bench.ledger.unfinished("elsewhere")


# What apps read


def put_into(bench: Bench, state: str, record: str) -> None:
    """Bring a record into one of the contract's states."""
    write(bench, CAT, record)
    if state in ("receiving", "stalled"):
        return see(bench, state=state, record=record)
    if state == "gone":
        see(bench, record=record)
        return bench.ledger.nothing_waits(NAME, record, is_empty=True)
    bench.offer(record)
    if state == "queued":
        return None
    claim = bench.claimed()
    assert record == claim.batch.record
    match state:
        case "retrying":
            bench.ledger.defer(claim, StoreUnavailable("put: 503", hint="wait"), 60)
        case "dead":
            bench.ledger.bury(claim, BadPath("put: no"))
        case "uploaded" | "done":
            claim = bench.stored(claim)
            if state == "done":
                done(bench, claim)
            else:
                bench.ledger.come_back(claim, bench.clock.now() + 1000, "grace")
    return None


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_read(bench: Bench, state: str) -> None:
    put_into(bench, state, RECORD)

    status = bench.status()

    assert (NAME, "avatars", "42", RECORD, state) == tuple(
        status[name] for name in ("spool", "attachment", "record_id", "path", "state")
    )
    assert (state not in ("uploaded", "done", "gone")) == bool(status["processing"])
    assert (state in ("uploaded", "done")) == (status["uploaded_at"] is not None)
    assert (state == "done") == (status["done_at"] is not None)
    assert (state in ("stalled", "retrying", "dead")) == (status["error"] is not None) == (status["error_code"] is not None)
    assert (state == "retrying") == (status["next_attempt_at"] is not None)
    moments = [value for name, value in status.items() if name.endswith("_at") and value is not None]
    assert len(moments) >= 2
    assert all(TIMESTAMP.fullmatch(moment) for moment in moments)
    assert {NAME: {state: 1}} == bench.ledger.counts()


@pytest.mark.parametrize("state", ["receiving", "stalled"])
@pytest.mark.parametrize("batch", ["queued", "uploading", "retrying", "dead", "uploaded", "done"])
def test_a_record_is_as_far_as_the_least_advanced_of_its_files(bench: Bench, state: str, batch: str) -> None:
    put_into(bench, batch, RECORD)
    bench.write(f"{RECORD}/original/dog.jpg")

    see(bench, state=state)

    assert (state, 1) == (bench.status()["state"], bench.status()["processing"])


@pytest.mark.parametrize("state", ["uploaded", "done"])
def test_a_newer_version_is_processing_again(bench: Bench, state: str) -> None:
    put_into(bench, state, RECORD)

    offered(bench, {"original/cat.jpg": b"another cat"})

    assert ("queued", 1) == (bench.status()["state"], bench.status()["processing"])


def test_states_are_counted_by_spool_the_least_advanced_first(bench: Bench) -> None:
    for state in reversed(STATES):  # what waits must not be there yet when another one is claimed
        put_into(bench, state, f"avatars/{state}")

    counts = bench.ledger.counts()

    assert list(STATES) == list(counts[NAME])
    assert {1} == set(counts[NAME].values())


def test_files_and_bytes_are_those_live_and_on_their_way(bench: Bench) -> None:
    def sums() -> tuple[int, int]:
        return bench.status()["files"], bench.status()["bytes"]

    write(bench, CAT)
    see(bench)
    receiving = sums()
    bench.offer()
    queued = sums()
    done(bench, bench.stored(bench.claimed()))
    uploaded = sums()
    offered(bench, {"thumb/cat.jpg": b"a much larger thumb", "retina/cat.jpg": b"new"})
    restyled = sums()
    bench.stored(bench.claimed())

    cat = len(b"a cat" + b"cat")
    more = len(b"a cat" + b"a much larger thumb" + b"new")
    assert [(2, cat), (2, cat), (2, cat), (3, more), (3, more)] == [receiving, queued, uploaded, restyled, sums()]


def test_a_style_that_is_made_again_counts_once_while_it_is_received(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    write(bench, {"thumb/cat.jpg": b"a much larger thumb"})

    see(bench)

    row = bench.status()
    assert ("receiving", 2, len(b"a cat" + b"a much larger thumb")) == (row["state"], row["files"], row["bytes"])


def test_a_stored_batch_that_lost_its_way_is_not_walked_again_at_once(bench: Bench) -> None:
    """Else a batch whose object and file disagree would be walked in a circle, as fast as the machine can."""
    claim = bench.batch_stored(CAT)

    bench.ledger.withdraw(claim, ClaimLost("clear: a newer version of it is live"))

    assert bench.claim() is None
    bench.clock.advance(2)
    assert bench.claim() is not None


def test_the_version_counts_new_content_by_digest(bench: Bench) -> None:
    def version() -> int:
        found: int = bench.status()["version"]
        return found

    write(bench, CAT)
    see(bench)
    seen = version()
    bench.offer()
    done(bench, bench.stored(bench.claimed()))
    first = version()
    done(bench, replace_with(bench, {"original/cat.jpg": b"another cat"}, {}))
    second = version()
    replace_with(bench, DOG, CAT)

    assert [1, 1, 2, 3] == [seen, first, second, version()]


def test_the_same_bytes_again_are_no_new_version(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    os.utime(bench.root / RECORD / "original/cat.jpg", (0, 0))

    bench.offer()
    bench.stored(bench.claimed())

    assert 1 == bench.status()["version"]


def test_another_attempt_at_the_same_content_is_no_new_version(bench: Bench) -> None:
    offered(bench)
    claim = bench.claimed()
    bench.ledger.answered(refused(bench.intended(claim)))
    bench.ledger.defer(claim, StoreUnavailable("put: 503"), 0)

    bench.stored(bench.claimed())

    assert 1 == bench.status()["version"]


def test_a_style_made_again_is_a_new_version(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))

    bench.batch_stored({"thumb/cat.jpg": b"another thumb"})

    assert 2 == bench.status()["version"]


def test_an_objects_row_has_what_the_store_confirmed(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    row = bench.objects()[f"{RECORD}/original/cat.jpg"]

    md5 = bench.puts(claim)[0].digests.md5
    assert {
        "spool": NAME, "path": RECORD, "style": "original", "filename": "cat.jpg", "bucket": BUCKET, "url": None,
        "key": f"{RECORD}/original/cat.jpg", "size": 5, "content_type": "image/jpeg", "width": None, "height": None,
        "etag": md5, "checksum_algorithm": None, "checksum": None, "version_id": None,
    } == {name: value for name, value in row.items() if name != "uploaded_at"}  # fmt: skip
    assert TIMESTAMP.fullmatch(row["uploaded_at"])


def test_the_views_have_the_contracts_columns(bench: Bench) -> None:
    put_into(bench, "uploaded", RECORD)

    assert [
        "spool", "attachment", "record_id", "path", "state", "processing", "version", "files", "bytes", "attempts",
        "next_attempt_at", "error_code", "error", "first_seen_at", "uploaded_at", "done_at", "updated_at",
    ] == list(bench.rows("SELECT * FROM record_status")[0])  # fmt: skip
    assert [
        "spool", "path", "style", "filename", "bucket", "key", "url", "size", "content_type", "width", "height", "etag",
        "checksum_algorithm", "checksum", "version_id", "uploaded_at",
    ] == list(bench.rows("SELECT * FROM record_object")[0])  # fmt: skip


def test_what_was_wrong_is_forgotten_once_all_is_well(bench: Bench) -> None:
    """The view's error is null when nothing is wrong; a hitch while clearing must not stand there for ever."""
    claim = bench.batch_stored(CAT)
    bench.ledger.defer(claim, StoreUnavailable("head: 503"), 0)
    while_deferred = bench.status()["error_code"]

    done(bench, bench.claimed())

    status = bench.status()
    assert "StoreUnavailable" == while_deferred
    assert ("done", 0, None, None, None) == tuple(
        status[name] for name in ("state", "attempts", "next_attempt_at", "error_code", "error")
    )


def test_what_was_wrong_is_forgotten_when_the_batch_merely_waits_again(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.ledger.defer(claim, StoreUnavailable("head: 503"), 0)

    bench.ledger.come_back(bench.claimed(), bench.clock.now() + 10, "grace")

    assert (None, None, 0) == tuple(bench.status()[name] for name in ("next_attempt_at", "error_code", "attempts"))


# The log and the history


def test_events_are_told_once_they_are_durable_and_stand_in_the_history(bench: Bench) -> None:
    with captured() as lines:
        bench.batch_stored(CAT)

    history = bench.ledger.record_history(RECORD, spool=NAME)
    assert [line["event"] for line in lines] == [row["event"] for row in history]
    assert {("uploads", RECORD)} == {(line["spool"], line["record"]) for line in lines}
    assert all(TIMESTAMP.fullmatch(row["at"]) for row in history)
    [stored] = told(lines, "batch.stored")
    assert (2, 8, 0.1) == (stored["files"], stored["size_bytes"], stored["elapsed_s"])


def test_an_event_whose_change_did_not_happen_is_not_told(bench: Bench) -> None:
    with captured() as lines, pytest.raises(ValueError, match="on purpose"), bench.ledger.write() as change:
        change.tell("record.seen", spool=NAME, record=RECORD)
        raise ValueError("on purpose")

    assert [] == lines
    assert [] == bench.rows("SELECT * FROM history")


def test_files_that_come_and_go_are_told_but_not_kept_in_the_history(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    with captured() as lines:
        bench.ledger.set_aside(claim, [dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")])
        bench.ledger.let_go(claim, [claim.batch.files[0]], deleted=True)

    assert [("file.set_aside", "debug"), ("file.deleted", "debug")] == [(line["event"], line["log_level"]) for line in lines]
    assert "file.deleted" not in bench.events()


@pytest.mark.parametrize(
    ("event", "level"),
    [("record.stalled", "warning"), ("batch.deferred", "warning"), ("batch.dead", "error"), ("batch.stored", "info")],
)
def test_an_event_is_as_loud_as_it_is_bad(bench: Bench, event: str, level: str) -> None:
    states = {"record.stalled": "stalled", "batch.deferred": "retrying", "batch.dead": "dead", "batch.stored": "uploaded"}

    with captured() as lines:
        put_into(bench, states[event], RECORD)

    assert [level] == [line["log_level"] for line in told(lines, event)]


def test_old_history_is_forgotten(bench: Bench) -> None:
    offered(bench)
    bench.clock.advance(40 * DAY_S)
    bench.stored(bench.claimed())

    bench.ledger.prune(older_than_s=30 * DAY_S)

    assert ["batch.claimed", "batch.stored"] == bench.events()


# Claims


def test_a_record_is_claimed_once(bench: Bench) -> None:
    offered(bench)

    first, second = bench.claim("me"), bench.claim("you")

    assert first is not None
    assert ("me", RECORD, State.PENDING) == (first.owner, first.batch.record, first.batch.state)
    assert second is None


def test_nobody_claims_what_is_not_due(bench: Bench) -> None:
    offered(bench)
    bench.ledger.defer(bench.claimed(), StoreUnavailable("put: 503"), 60)

    too_early = bench.claim()
    bench.clock.advance(60)

    assert too_early is None
    assert bench.claim() is not None


def test_nobody_claims_another_spools_records(bench: Bench) -> None:
    offered(bench)

    assert [] == bench.ledger.claim("me", ["elsewhere"], lease_s=LEASE_S, crashes=3)


def test_uploads_come_before_clearing_unless_somebody_asks_otherwise(bench: Bench) -> None:
    bench.ledger.come_back(bench.batch_stored(CAT, record="avatars/1"), bench.clock.now(), "grace")
    offered(bench, record="avatars/2")

    [clearing] = bench.ledger.claim("me", [NAME], lease_s=LEASE_S, crashes=3, uploads_first=False)
    bench.ledger.put_back(clearing)
    uploading = bench.claimed()

    assert ("avatars/1", "avatars/2") == (clearing.batch.record, uploading.batch.record)


def test_who_waits_longest_is_claimed_first(bench: Bench) -> None:
    for number in (3, 1, 2):
        offered(bench, record=f"avatars/{number}")

    assert ["avatars/3", "avatars/1", "avatars/2"] == [bench.claimed().batch.record for _ in range(3)]


def test_the_fence_only_rises(bench: Bench) -> None:
    offered(bench)
    fences = []
    for owner in ("me", "you", "me"):
        claim = bench.claimed(owner)
        fences.append(claim.fence)
        bench.ledger.put_back(claim)
    fences.append(bench.ledger.claim_record(claim.batch.record_key, "me", lease_s=LEASE_S) or 0)

    assert sorted(set(fences)) == fences


def test_a_claim_runs_out_and_is_taken_over(bench: Bench) -> None:
    offered(bench)
    frozen = bench.claimed("frozen")
    bench.clock.advance(LEASE_S - 1)
    too_early = bench.claim("me")
    bench.clock.advance(2)

    mine = bench.claimed("me")

    assert too_early is None
    assert mine.fence > frozen.fence


def test_a_claim_that_is_renewed_does_not_run_out(bench: Bench) -> None:
    offered(bench)
    bench.claimed("me")
    for _ in range(5):
        bench.clock.advance(LEASE_S - 1)
        bench.ledger.renew("me", lease_s=LEASE_S)

    assert bench.claim("you") is None


def test_rule_4_a_claim_of_the_time_before_the_clock_jumped_back_has_run_out(bench: Bench) -> None:
    """Else nobody would touch its record for as long as the clock was wrong."""
    bench.clock.jump(365 * DAY_S)
    offered(bench)
    bench.claimed("frozen")
    bench.clock.jump(-365 * DAY_S)
    with bench.ledger.write() as change:
        change.execute(sqlalchemy.update(schema.batch).values(due_at=change.now))

    assert bench.claim("me") is not None


def test_rule_4_waits_that_were_begun_before_the_clock_jumped_back_can_be_shortened(bench: Bench) -> None:
    """Nobody waits for a year because a clock was a year ahead when the wait began."""
    bench.clock.jump(365 * DAY_S)
    offered(bench)
    bench.clock.jump(-365 * DAY_S)
    before = bench.claim("me")

    bench.ledger.shorten_waits(NAME, keep_for_s=0, at_most_s={"attempt": 0.0})

    assert before is None
    assert bench.claim("me") is not None


def test_what_is_kept_for_a_while_is_kept_no_longer_than_the_settings_say_now(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.ledger.come_back(claim, bench.clock.now() + 7 * DAY_S, "keep_for")

    bench.ledger.shorten_waits(NAME, keep_for_s=3600, at_most_s={})
    bench.clock.advance(3500)
    too_early = bench.claim()
    bench.clock.advance(200)

    assert too_early is None
    assert bench.claim() is not None


def test_waits_are_never_made_longer(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.ledger.come_back(claim, bench.clock.now() + 10, "grace")

    bench.ledger.shorten_waits(NAME, keep_for_s=9999, at_most_s={"grace": 9999})
    bench.clock.advance(11)

    assert bench.claim() is not None


Verb = Callable[[Bench, Claim], Any]

VERBS: dict[str, Verb] = {
    "intend": lambda bench, claim: bench.ledger.intend(claim, []),
    "mark_hashed": lambda bench, claim: bench.ledger.mark_hashed(claim, claim.batch.files[0], "0"),
    "stored": lambda bench, claim: bench.ledger.stored(claim, [], replaced_after_s=None, elapsed_s=0.0),
    "come_back": lambda bench, claim: bench.ledger.come_back(claim, 0.0, "grace"),
    "defer": lambda bench, claim: bench.ledger.defer(claim, StoreUnavailable("put: 503"), 1.0),
    "bury": lambda bench, claim: bench.ledger.bury(claim, BadPath("put: no")),
    "reopen": lambda bench, claim: bench.ledger.reopen(claim, [], StoreUnavailable("gone")),
    "done": lambda bench, claim: bench.ledger.done(claim, None),
    "set_aside": lambda bench, claim: bench.ledger.set_aside(
        claim, [dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")]
    ),
}
QUIET_VERBS: dict[str, Verb] = {
    "put_back": lambda bench, claim: bench.ledger.put_back(claim),
    "withdraw": lambda bench, claim: bench.ledger.withdraw(claim, Changed("read: it was written")),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("lost_by", ["taken over", "bereaved", "given back"])
def test_who_lost_the_claim_changes_nothing(bench: Bench, verb: str, lost_by: str) -> None:
    """Whoever was frozen and wakes up works on what another one has long finished."""
    bench.batch_stored(CAT) if verb in ("reopen", "done", "set_aside", "come_back") else offered(bench)
    bench.clock.advance(2 * LEASE_S)
    frozen = bench.claimed("frozen")
    match lost_by:
        case "taken over":
            bench.clock.advance(2 * LEASE_S)
            bench.claimed("me")
        case "bereaved":
            bench.ledger.bereave("frozen")
        case "given back":
            bench.ledger.put_back(frozen)
    before = bench.rows("SELECT * FROM batch"), bench.rows("SELECT * FROM batch_file"), bench.rows("SELECT * FROM claim")

    with pytest.raises(ClaimLost):
        VERBS[verb](bench, frozen)

    after = bench.rows("SELECT * FROM batch"), bench.rows("SELECT * FROM batch_file"), bench.rows("SELECT * FROM claim")
    assert before == after


@pytest.mark.parametrize("verb", QUIET_VERBS)
def test_who_lost_the_claim_has_nothing_to_give_back(bench: Bench, verb: str) -> None:
    offered(bench)
    frozen = bench.claimed("frozen")
    bench.clock.advance(2 * LEASE_S)
    bench.claimed("me")

    QUIET_VERBS[verb](bench, frozen)

    assert ["me"] == [row["owner"] for row in bench.rows("SELECT owner FROM claim")]
    assert "uploading" == bench.state()


@pytest.mark.parametrize("verb", ["intend", "stored", "bury", "mark_hashed"])
def test_a_batch_that_gave_way_to_a_newer_one_goes_no_further(bench: Bench, verb: str) -> None:
    offered(bench)
    claim = bench.claimed()
    offered(bench, {"original/cat.jpg": b"another cat"})

    with pytest.raises(ClaimLost, match="a newer batch took its place"):
        VERBS[verb](bench, claim)


def test_a_newer_batch_waits_until_the_claim_on_its_record_is_given_back(bench: Bench) -> None:
    """At most one claim per record: a walk of the old batch may still have a PUT under way."""
    offered(bench)
    old = bench.claimed()
    new = offered(bench, {"original/cat.jpg": b"another cat"})
    while_claimed = bench.claim("you")
    bench.ledger.withdraw(old, ClaimLost("a newer batch took its place"))

    assert while_claimed is None
    assert new == bench.claimed().batch.id


def test_a_dead_daemons_claims_are_free_at_once(bench: Bench) -> None:
    offered(bench)
    bench.claimed("dead")
    owners = bench.ledger.owners()

    bench.ledger.bereave("dead")

    assert ["dead"] == owners
    assert bench.claim("me") is not None


def test_rule_11_the_records_of_a_held_spool_are_not_claimed(bench: Bench) -> None:
    offered(bench)
    bench.ledger.hold(NAME, StoreDenied("put: 403", hint="renew the credentials"))
    while_held = bench.claim()

    bench.ledger.release(NAME)

    assert while_held is None
    assert bench.claim() is not None


def test_rule_11_a_hold_is_told_once_until_its_reason_changes(bench: Bench) -> None:
    with captured() as lines:
        for fault in (StoreDenied("put: 403"), StoreDenied("put: 403 again"), SpoolBroken("open root: gone")):
            bench.ledger.hold(NAME, fault)
        bench.ledger.release(NAME)
        bench.ledger.release(NAME)

    assert [("spool.held", "StoreDenied"), ("spool.held", "SpoolBroken"), ("spool.released", None)] == [
        (line["event"], line.get("error")) for line in lines
    ]


def test_rule_11_a_hold_says_since_when_and_why(bench: Bench) -> None:
    before = iso(bench.clock.now())
    bench.ledger.hold(NAME, StoreDenied("put: 403", hint="renew the credentials"))
    bench.clock.advance(60)
    bench.ledger.hold(NAME, StoreDenied("put: 401", hint="renew the credentials"))

    held = bench.ledger.held()[NAME]

    assert ("StoreDenied", "put: 401", "renew the credentials") == (held.error_code, held.error, held.hint)
    assert before <= held.since < iso(bench.clock.now() - 30)


def test_crashes_are_counted_until_the_batch_is_dead(bench: Bench) -> None:
    """A file that kills whoever reads it must not be walked for ever (FACTS 31)."""
    offered(bench)
    for _ in range(3):
        bench.claimed("crashing")
        bench.ledger.bereave("crashing")

    with captured() as lines:
        fourth = bench.claim()

    assert fourth is None
    assert ("dead", "Crashed") == (bench.status()["state"], bench.status()["error_code"])
    assert "3 walks of it ended with the daemon's process" in bench.status()["error"]
    assert ["batch.dead"] == [line["event"] for line in lines]


def test_a_batch_that_crashes_does_not_hold_up_the_others(bench: Bench) -> None:
    offered(bench, record="avatars/1")
    for _ in range(3):
        bench.claimed("crashing")
        bench.ledger.bereave("crashing")
    offered(bench, record="avatars/2")

    assert "avatars/2" == bench.claimed().batch.record


def test_what_was_under_way_in_a_daemon_that_died_is_walked_one_at_a_time(bench: Bench) -> None:
    """One of them may be what killed it. All at once, the innocent among them would be counted with it, and be dead with it."""
    for number in range(3):
        offered(bench, record=f"avatars/{number}")
        bench.claimed("crashing")
    bench.ledger.bereave("crashing")
    offered(bench, record="avatars/fresh")

    claims = [bench.claim(), bench.claim(), bench.claim()]

    first, fresh, none = claims
    assert first is not None and fresh is not None and none is None
    assert {"avatars/0", "avatars/fresh"} == {first.batch.record, fresh.batch.record}
    bench.stored(first if first.batch.record == "avatars/0" else fresh)
    assert "avatars/1" == bench.claimed().batch.record


def test_another_daemon_walks_one_of_its_own(bench: Bench) -> None:
    for number in range(3):
        offered(bench, record=f"avatars/{number}")
        bench.claimed("crashing")
    bench.ledger.bereave("crashing")

    mine, yours = bench.claimed("me"), bench.claimed("you")

    assert {"avatars/0", "avatars/1"} == {mine.batch.record, yours.batch.record}
    assert bench.claim("me") is None and bench.claim("you") is None


def test_a_claim_that_ran_out_holds_back_no_other(bench: Bench) -> None:
    for number in range(2):
        offered(bench, record=f"avatars/{number}")
        bench.claimed("crashing")
    bench.ledger.bereave("crashing")
    bench.claimed()

    bench.clock.advance(LEASE_S + 1)

    assert bench.claim() is not None


def test_the_one_that_kills_is_dead_and_the_others_are_not(bench: Bench) -> None:
    """One of eight records kills the process as soon as all are under way that may be; the next daemon goes on."""
    guilty = "avatars/2"
    for number in range(8):
        offered(bench, record=f"avatars/{number}")

    for _ in range(5):
        while under_way := list(iter(lambda: bench.claim("crashing"), None)):
            if guilty in {claim.batch.record for claim in under_way}:
                break
            for claim in under_way:
                done(bench, bench.stored(claim))
        bench.ledger.bereave("crashing")

    dead = [row["path"] for row in bench.rows("SELECT path FROM record_status WHERE state = 'dead'")]
    assert [guilty] == dead
    assert 7 == len(bench.rows("SELECT path FROM record_status WHERE state = 'done'"))


def test_it_takes_many_kills_from_outside_until_an_innocent_is_dead(bench: Bench) -> None:
    """Whoever was under way comes last next time: three power cuts in a row must not always hit the same one."""
    for number in range(4):
        offered(bench, record=f"avatars/{number}")
        bench.claimed("crashing")
    bench.ledger.bereave("crashing")

    hit = []
    for _ in range(4):
        hit.append(bench.claimed("crashing").batch.record)
        bench.ledger.bereave("crashing")

    assert [f"avatars/{number}" for number in range(4)] == hit
    assert not bench.rows("SELECT path FROM record_status WHERE state = 'dead'")


@pytest.mark.parametrize("ending", ["defer", "put_back", "stored"])
def test_a_walk_that_ends_in_good_order_is_no_crash(bench: Bench, ending: str) -> None:
    offered(bench)
    for _ in range(2):
        bench.claimed("crashing")
        bench.ledger.bereave("crashing")
    claim = bench.claimed()

    match ending:
        case "defer":
            bench.ledger.defer(claim, StoreUnavailable("put: 503"), 0)
        case "put_back":
            bench.ledger.put_back(claim)
        case "stored":
            bench.stored(claim)

    assert [0] == [row["crashes"] for row in bench.rows("SELECT crashes FROM batch")]


def test_clearing_that_is_killed_is_no_crash_of_the_upload(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.ledger.come_back(claim, bench.clock.now(), "grace")
    for _ in range(5):
        bench.claimed("crashing")
        bench.ledger.bereave("crashing")

    assert bench.claim() is not None


def test_a_record_may_be_claimed_without_a_batch(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    key = claim.batch.record_key
    taken = bench.ledger.claim_record(key, "me", lease_s=LEASE_S)
    done(bench, claim)

    fence = bench.ledger.claim_record(key, "me", lease_s=LEASE_S)
    assert fence is not None
    again = bench.ledger.claim_record(key, "you", lease_s=LEASE_S)
    bench.ledger.release_record(key, "me", fence - 1)
    still = bench.ledger.claim_record(key, "you", lease_s=LEASE_S)
    bench.ledger.release_record(key, "me", fence)

    assert [None, None, None] == [taken, again, still]
    assert bench.ledger.claim_record(key, "you", lease_s=LEASE_S) is not None


# Intents, answers, doubts


def intents(bench: Bench) -> list[dict[str, Any]]:
    return bench.rows("SELECT key, kind, digest, answer, doubt_at, upload_id FROM intent ORDER BY id")


def test_rule_6_key_and_digest_are_in_the_ledger_before_a_put_starts(bench: Bench) -> None:
    offered(bench)
    claim = bench.claimed()

    puts = bench.intended(claim)

    assert [(put.key, "put", put.digests.sha256, None) for put in puts] == [
        (row["key"], row["kind"], row["digest"], row["answer"]) for row in intents(bench)
    ]
    assert all(put.intent > 0 and put.adopted is None for put in puts)


def test_rule_6_a_put_under_way_when_its_daemon_dies_is_in_doubt(bench: Bench) -> None:
    offered(bench)
    bench.intended(bench.claimed("dead"))
    before = bench.clock.now()

    bench.ledger.bereave("dead")

    assert ["doubt", "doubt"] == [row["answer"] for row in intents(bench)]
    assert all(before <= row["doubt_at"] <= bench.clock.now() for row in intents(bench))


def test_rule_6_a_put_under_way_when_its_claim_runs_out_is_in_doubt(bench: Bench) -> None:
    offered(bench)
    bench.intended(bench.claimed("frozen"))
    bench.clock.advance(2 * LEASE_S)

    bench.claimed("me")

    assert ["doubt", "doubt"] == [row["answer"] for row in intents(bench)]


def doubts(bench: Bench, claim: Claim) -> set[str]:
    return set(bench.ledger.clearance(claim).doubts)


def test_rule_6_an_older_doubt_of_other_content_is_a_doubt_of_the_newer_version(bench: Bench) -> None:
    offered(bench)
    old = bench.claimed()
    bench.ledger.answered(doubtful(bench.intended(old), bench.clock.now()))
    offered(bench, {"original/cat.jpg": b"another cat"})
    bench.ledger.withdraw(old, Changed("read: it was written"))

    claim = bench.stored(bench.claimed())

    assert {f"{RECORD}/original/cat.jpg"} == doubts(bench, claim)


def test_rule_6_a_doubt_of_the_same_content_is_none(bench: Bench) -> None:
    """Repeating a PUT with the same bytes is harmless."""
    offered(bench)
    claim = bench.claimed()
    bench.ledger.answered(doubtful(bench.intended(claim), bench.clock.now()))
    bench.ledger.defer(claim, StoreUnavailable("put: timeout"), 0)

    claim = bench.stored(bench.claimed())

    assert set() == doubts(bench, claim)


def test_rule_6_a_confirmed_put_with_an_unanswered_try_before_it_is_still_a_doubt(bench: Bench) -> None:
    """The earlier try may land once more, over what comes next."""
    offered(bench, {"original/cat.jpg": b"a cat"})
    claim = bench.claimed()
    results = [dataclasses.replace(result, doubt_at=bench.clock.now()) for result in confirmed(bench.intended(claim))]
    bench.ledger.answered(results)
    done(bench, bench.ledger.stored(claim, results, replaced_after_s=None, elapsed_s=0.0))

    claim = bench.batch_stored({"original/cat.jpg": b"another cat"})

    assert {f"{RECORD}/original/cat.jpg"} == doubts(bench, claim)


def test_rule_6_a_refused_put_with_an_unanswered_try_before_it_is_still_a_doubt(bench: Bench) -> None:
    offered(bench, {"original/cat.jpg": b"a cat"})
    old = bench.claimed()
    at = bench.clock.now()
    bench.ledger.answered([dataclasses.replace(each, doubt_at=at) for each in refused(bench.intended(old))])
    offered(bench, {"original/cat.jpg": b"another cat"})
    bench.ledger.withdraw(old, Changed("read: it was written"))

    claim = bench.stored(bench.claimed())

    assert {f"{RECORD}/original/cat.jpg"} == doubts(bench, claim)


def test_rule_6_a_put_that_was_answered_is_no_doubt(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))

    claim = bench.batch_stored({"original/cat.jpg": b"another cat"})

    assert set() == doubts(bench, claim)


def test_rule_6_an_answer_that_comes_after_a_newer_put_began_leaves_the_order_unknown(bench: Bench) -> None:
    """The frozen daemon wakes up: its PUT was confirmed, but before or after the newer one?"""
    offered(bench, {"original/cat.jpg": b"a cat"})
    frozen = bench.claimed("frozen")
    late = bench.intended(frozen)
    bench.clock.advance(2 * LEASE_S)
    offered(bench, {"original/cat.jpg": b"another cat"})
    claim = bench.stored(bench.claimed("me"))
    bench.clock.advance(100)

    bench.ledger.answered(confirmed(late))

    [(key, since)] = bench.ledger.clearance(claim).doubts.items()
    assert f"{RECORD}/original/cat.jpg" == key
    assert bench.clock.now() - 10 < since


def test_rule_6_a_doubt_is_settled_once_its_time_is_over(bench: Bench) -> None:
    offered(bench, {"original/cat.jpg": b"a cat"})
    old = bench.claimed()
    at = bench.clock.now()
    bench.ledger.answered(doubtful(bench.intended(old), at))
    offered(bench, {"original/cat.jpg": b"another cat"})
    bench.ledger.withdraw(old, Changed("read: it was written"))
    claim = bench.stored(bench.claimed())

    bench.ledger.settle_doubts(claim, doubts(bench, claim), before=at - 1)
    too_early = doubts(bench, claim)
    bench.ledger.settle_doubts(claim, too_early, before=at)

    assert {f"{RECORD}/original/cat.jpg"} == too_early
    assert set() == doubts(bench, claim)


def test_rule_6_a_multipart_uploads_id_is_written_down_and_handed_to_the_next_walk(bench: Bench) -> None:
    """Its parts cost money until somebody aborts it; nobody is told twice."""
    offered(bench, {"original/cat.jpg": b"a cat"})
    claim = bench.claimed("dead")
    [put] = bench.intended(claim)
    bench.ledger.note_upload(put.intent, "upload-1")
    bench.ledger.bereave("dead")
    claim = bench.claimed()

    [first] = bench.intended(claim)
    bench.ledger.defer(claim, StoreUnavailable("put: 503"), 0)
    [second] = bench.intended(bench.claimed())

    assert (("upload-1",), ()) == (first.abandoned, second.abandoned)


def test_the_same_bytes_again_are_adopted(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    uploaded_at = bench.objects()[f"{RECORD}/original/cat.jpg"]["uploaded_at"]
    bench.clock.advance(60)
    os.utime(bench.root / RECORD / "original/cat.jpg", (0, 0))
    bench.offer()
    claim = bench.claimed()

    puts = bench.intended(claim)
    bench.ledger.stored(claim, confirmed(puts), replaced_after_s=None, elapsed_s=0.0)

    assert all(put.adopted is not None for put in puts)
    assert [put.digests.md5 for put in puts] == [put.adopted.etag for put in puts if put.adopted]
    assert 2 == len(intents(bench))
    assert uploaded_at == bench.objects()[f"{RECORD}/original/cat.jpg"]["uploaded_at"]


def test_rule_6_nothing_is_adopted_while_a_put_of_other_content_is_in_doubt(bench: Bench) -> None:
    cat = {"original/cat.jpg": b"a cat"}
    offered(bench, {"original/cat.jpg": b"an older cat"})
    old = bench.claimed()
    bench.ledger.answered(doubtful(bench.intended(old), bench.clock.now()))
    write(bench, cat)
    bench.offer()
    bench.ledger.withdraw(old, Changed("read: it was written"))
    done(bench, bench.stored(bench.claimed()))
    os.utime(bench.root / RECORD / "original/cat.jpg", (0, 0))
    bench.offer()

    [put] = bench.intended(bench.claimed())

    assert put.adopted is None


@pytest.mark.parametrize("answer", ["doubt", "refused", "none"])
def test_nothing_is_adopted_that_was_not_confirmed(bench: Bench, answer: str) -> None:
    offered(bench)
    claim = bench.claimed()
    puts = bench.intended(claim)
    if answer != "none":
        bench.ledger.answered(doubtful(puts, bench.clock.now()) if answer == "doubt" else refused(puts))
    bench.ledger.defer(claim, StoreUnavailable("put: timeout"), 0)

    again = bench.intended(bench.claimed())

    assert [None, None] == [put.adopted for put in again]


def test_nothing_is_adopted_that_was_overwritten_since(bench: Bench) -> None:
    for content in (b"a cat", b"another cat"):
        done(bench, bench.batch_stored({"original/cat.jpg": content}))
    offered(bench, {"original/cat.jpg": b"a cat"})

    [put] = bench.intended(bench.claimed())

    assert put.adopted is None


def test_what_the_bucket_lost_is_put_again(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    lost = f"{RECORD}/thumb/cat.jpg"

    with captured() as lines:
        bench.ledger.reopen(claim, [lost], StoreUnavailable("head: it is not there", hint="who deletes here?"))
    status = bench.status()
    puts = bench.intended(bench.claimed())

    assert ["batch.deferred"] == [line["event"] for line in lines]
    assert ("retrying", 1, "StoreUnavailable", "head: it is not there") == tuple(
        status[name] for name in ("state", "processing", "error_code", "error")
    )
    assert [lost] == [put.key for put in puts if put.adopted is None]


# Rule 8


def test_rule_8_a_key_that_belongs_to_another_record_is_taken(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT, record="avatars/1"))
    offered(bench, CAT, "avatars/2")
    claim = bench.claimed()
    clash = [
        dataclasses.replace(put, key=put.key.replace("avatars/2", "avatars/1")) for put in bench.puts(claim)
    ]  # as two ids that a key template cannot tell apart

    with pytest.raises(KeyTaken) as caught:
        bench.ledger.intend(claim, clash)

    assert "belongs to record avatars/1 of spool uploads" in str(caught.value)
    assert "tells the two apart" in caught.value.hint
    assert 2 == len(intents(bench)), "nothing of it was written down"


def test_rule_8_a_key_is_a_records_own_from_its_first_intent_on(bench: Bench) -> None:
    """Two records that are on their way at once must not overwrite one another either."""
    offered(bench, CAT, "avatars/1")
    bench.intended(bench.claimed())
    offered(bench, CAT, "avatars/2")
    claim = bench.claimed()
    clash = [dataclasses.replace(put, key=put.key.replace("avatars/2", "avatars/1")) for put in bench.puts(claim)]

    with pytest.raises(KeyTaken):
        bench.ledger.intend(claim, clash)


def test_rule_8_the_same_key_in_another_bucket_is_another_key(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT, record="avatars/1"))
    offered(bench, CAT, "avatars/2")
    claim = bench.claimed()
    elsewhere = [
        dataclasses.replace(put, bucket="elsewhere", key=put.key.replace("avatars/2", "avatars/1")) for put in bench.puts(claim)
    ]

    bench.ledger.intend(claim, elsewhere)

    assert 4 == len(intents(bench))


# Rule 7


def due(bench: Bench) -> set[str]:
    return {key.key for key in bench.ledger.replaced_due([NAME])}


def test_rule_7_replaced_keys_are_due_once_their_time_has_passed(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))

    at_once = due(bench)
    bench.clock.advance(DAY_S - 1)
    too_early = due(bench)
    bench.clock.advance(2)

    assert (set(), set(), CAT_KEYS) == (at_once, too_early, due(bench))
    assert DOG_KEYS == set(bench.objects())


def test_rule_7_keys_are_replaced_only_by_a_proven_original(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    offered(bench, DOG)
    bench.intended(bench.claimed())
    bench.clock.advance(2 * DAY_S)

    assert set() == due(bench)
    assert CAT_KEYS == set(bench.objects())


def test_rule_3_a_style_made_again_replaces_no_other_key(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    for path in CAT:
        (bench.root / RECORD / path).unlink()

    done(bench, bench.batch_stored({"retina/cat.jpg": b"a sharp cat"}))
    bench.clock.advance(2 * DAY_S)

    assert set() == due(bench)
    assert CAT_KEYS | {f"{RECORD}/retina/cat.jpg"} == set(bench.objects())


def test_rule_3_an_original_with_fewer_styles_replaces_the_styles_it_lacks_only_if_it_is_new(bench: Bench) -> None:
    """The same original again, on its own, is no newer one: absence is never deletion."""
    done(bench, bench.batch_stored(CAT))
    (bench.root / RECORD / "thumb/cat.jpg").unlink()
    os.utime(bench.root / RECORD / "original/cat.jpg", (0, 0))
    bench.offer()

    done(bench, bench.stored(bench.claimed()))
    bench.clock.advance(2 * DAY_S)

    assert set() == due(bench)
    assert CAT_KEYS == set(bench.objects())


def stored_alone(bench: Bench, *paths: str) -> None:
    """Have only these of a record's files offered and stored, as if the others could not be seen at this moment."""
    snapshot = bench.spool.look(RECORD)
    files = [file for file in snapshot.files if file.path in {f"{RECORD}/{path}" for path in paths}]
    bench.ledger.offer(NAME, dataclasses.replace(snapshot, files=tuple(files)), files, decided_by="quiet", is_all=True)
    done(bench, bench.stored(bench.claimed()))


@pytest.mark.parametrize("name", ["cat", "dog"])
def test_rule_7_a_style_that_came_before_its_original_is_not_replaced_by_it(bench: Bench, name: str) -> None:
    """A directory that cannot be read for a moment hides the original: the styles go up first."""
    done(bench, bench.batch_stored({**CAT, "medium/cat.jpg": b"a large cat"}))
    for path in (*CAT, "medium/cat.jpg"):
        (bench.root / RECORD / path).unlink()
    write(bench, {f"original/{name}.jpg": b"a new one", f"thumb/{name}.jpg": b"new"})

    stored_alone(bench, f"thumb/{name}.jpg")
    stored_alone(bench, f"original/{name}.jpg")
    bench.clock.advance(2 * DAY_S)

    new = {f"{RECORD}/original/{name}.jpg", f"{RECORD}/thumb/{name}.jpg"}
    assert new == set(bench.objects())
    assert (CAT_KEYS | {f"{RECORD}/medium/cat.jpg"}) - new == due(bench)


def test_rule_7_a_first_original_that_comes_late_replaces_nothing(bench: Bench) -> None:
    """Nothing that is there was made of an original before it."""
    done(bench, bench.batch_stored({"thumb/cat.jpg": b"cat"}))
    (bench.root / RECORD / "thumb/cat.jpg").unlink()

    done(bench, bench.batch_stored({"original/cat.jpg": b"a cat"}))
    bench.clock.advance(2 * DAY_S)

    assert set() == due(bench)
    assert CAT_KEYS == set(bench.objects())


def test_rule_7_nothing_is_replaced_where_the_configuration_keeps_it(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    offered(bench, DOG)

    bench.stored(bench.claimed(), replaced_after_s=None)
    bench.clock.advance(1000 * DAY_S)

    assert set() == due(bench)


def test_rule_7_a_key_that_is_live_again_is_not_due(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    was_due = due(bench)

    done(bench, replace_with(bench, CAT, DOG))

    assert (CAT_KEYS, set()) == (was_due, due(bench))


@pytest.mark.parametrize("how_far", ["offered", "claimed", "intended", "dead"])
def test_rule_7_a_key_that_a_pending_manifest_may_hold_is_not_due(bench: Bench, how_far: str) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    [some] = bench.ledger.replaced_due([NAME])[:1]
    for path in DOG:
        (bench.root / RECORD / path).unlink()

    offered(bench, CAT)
    if how_far != "offered":
        claim = bench.claimed()
        if how_far in ("intended", "dead"):
            bench.intended(claim)
        if how_far == "dead":
            bench.ledger.bury(claim, BadPath("put: no"))

    assert set() == due(bench)
    assert bench.ledger.intend_delete(some) is None


@pytest.mark.parametrize("answer", ["doubt", "none", "confirmed"])
def test_rule_7_keys_that_an_abandoned_version_may_have_written_join_the_list(bench: Bench, answer: str) -> None:
    offered(bench, CAT)
    claim = bench.claimed("dead")
    puts = bench.intended(claim)
    if answer == "doubt":
        bench.ledger.answered(doubtful(puts, bench.clock.now()))
    elif answer == "confirmed":
        bench.ledger.answered(confirmed(puts))
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    offered(bench, DOG)
    bench.ledger.bereave("dead")

    done(bench, bench.stored(bench.claimed()))
    bench.clock.advance(2 * DAY_S)

    assert CAT_KEYS == due(bench)


def test_rule_7_keys_that_an_abandoned_version_surely_did_not_write_are_left_alone(bench: Bench) -> None:
    offered(bench, CAT)
    claim = bench.claimed()
    bench.ledger.answered(refused(bench.intended(claim)))
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    offered(bench, DOG)
    bench.ledger.withdraw(claim, ClaimLost("a newer batch took its place"))

    done(bench, bench.stored(bench.claimed()))
    bench.clock.advance(2 * DAY_S)

    assert set() == due(bench)


def test_rule_7_a_deleted_key_is_forgotten_and_free_for_others(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    with captured() as lines:
        for key in bench.ledger.replaced_due([NAME]):
            intent = bench.ledger.intend_delete(key)
            assert intent is not None
            bench.ledger.deleted(key, intent, Answer.CONFIRMED)

    offered(bench, CAT, "avatars/2")
    claim = bench.claimed()
    taken = [dataclasses.replace(put, key=put.key.replace("avatars/2", RECORD)) for put in bench.puts(claim)]

    assert set() == due(bench)
    assert ["object.deleted"] * 2 == [line["event"] for line in lines]
    assert [None, None] == [put.adopted for put in bench.ledger.intend(claim, taken)]


def test_rule_7_a_replaced_key_tells_of_the_put_that_may_still_write_it(bench: Bench) -> None:
    """Landing after the DELETE, it would bring back what nobody looks at any more."""
    offered(bench, CAT)
    claim = bench.claimed()
    at = bench.clock.now()
    results = [dataclasses.replace(result, doubt_at=at) for result in confirmed(bench.intended(claim))]
    bench.ledger.answered(results)
    done(bench, bench.ledger.stored(claim, results, replaced_after_s=DAY_S, elapsed_s=0.1))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)

    keys = bench.ledger.replaced_due([NAME])

    assert CAT_KEYS == {key.key for key in keys}
    assert [at, at] == [key.doubt_at for key in keys]
    assert None not in [bench.ledger.intend_delete(key) for key in keys], "whoever saw it has waited"


def test_rule_7_a_put_that_turns_out_to_be_in_doubt_holds_a_deletion_back(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    for path in DOG:
        (bench.root / RECORD / path).unlink()
    offered(bench, dict.fromkeys(CAT, b"another cat"))
    bench.intended(bench.claimed("dead"))
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)
    keys = bench.ledger.replaced_due([NAME])

    bench.ledger.bereave("dead")

    assert ([None, None], [None, None]) == ([key.doubt_at for key in keys], [bench.ledger.intend_delete(key) for key in keys])
    assert None not in [key.doubt_at for key in bench.ledger.replaced_due([NAME])]


@pytest.mark.parametrize("answer", [Answer.DOUBT, Answer.REFUSED])
def test_rule_7_a_deletion_that_was_not_confirmed_is_tried_again_later(bench: Bench, answer: Answer) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    for key in bench.ledger.replaced_due([NAME]):
        bench.ledger.deleted(key, bench.ledger.intend_delete(key) or 0, answer)

    at_once = due(bench)
    bench.clock.advance(600)

    assert (set(), CAT_KEYS) == (at_once, due(bench))


def test_rule_6_a_deletion_in_doubt_is_a_doubt_of_what_is_put_there_next(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    for key in bench.ledger.replaced_due([NAME]):
        bench.ledger.deleted(key, bench.ledger.intend_delete(key) or 0, Answer.DOUBT)

    claim = replace_with(bench, CAT, DOG)

    assert CAT_KEYS == doubts(bench, claim)


def test_rule_6_a_deletion_under_way_when_its_daemon_dies_is_in_doubt(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    claim = replace_with(bench, DOG, CAT)
    done(bench, claim)
    bench.clock.advance(2 * DAY_S)
    fence = bench.ledger.claim_record(claim.batch.record_key, "dead", lease_s=LEASE_S)
    assert fence is not None
    for key in bench.ledger.replaced_due([NAME]):
        bench.ledger.intend_delete(key)
    bench.ledger.bereave("dead")

    claim = replace_with(bench, CAT, DOG)

    assert CAT_KEYS == doubts(bench, claim)


def test_rule_6_a_deletion_that_is_confirmed_after_a_newer_put_began_leaves_the_order_unknown(bench: Bench) -> None:
    """The daemon that sent it was frozen; meanwhile another one put the key anew."""
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    key = next(key for key in bench.ledger.replaced_due([NAME]) if "original" in key.key)
    fence = bench.ledger.claim_record(key.record_key, "frozen", lease_s=LEASE_S)
    intent = bench.ledger.intend_delete(key)
    assert intent is not None and fence is not None
    bench.clock.advance(2 * LEASE_S)
    claim = replace_with(bench, CAT, DOG)
    bench.ledger.settle_doubts(claim, doubts(bench, claim), before=bench.clock.now())
    bench.clock.advance(100)

    bench.ledger.deleted(key, intent, Answer.CONFIRMED)

    assert {key.key} == doubts(bench, claim)
    assert CAT_KEYS == set(bench.objects())
    assert CAT_KEYS <= {row["key"] for row in bench.rows("SELECT key FROM key_owner")}, "it is still this record's"


def test_deletions_of_the_last_hour_are_counted_by_spool(bench: Bench) -> None:
    done(bench, bench.batch_stored(CAT))
    done(bench, replace_with(bench, DOG, CAT))
    bench.clock.advance(2 * DAY_S)
    for key in bench.ledger.replaced_due([NAME]):
        bench.ledger.deleted(key, bench.ledger.intend_delete(key) or 0, Answer.CONFIRMED)

    now = bench.ledger.deletes_in_last_hour(NAME), bench.ledger.deletes_in_last_hour("elsewhere")
    bench.clock.advance(3601)

    assert (2, 0) == now
    assert 0 == bench.ledger.deletes_in_last_hour(NAME)


# How a walk ends


def test_a_deferred_batch_says_when_and_why(bench: Bench) -> None:
    offered(bench)
    claim = bench.claimed()

    bench.ledger.defer(claim, StoreUnavailable("put: 503 SlowDown", hint="wait"), 60.0)

    status = bench.status()
    assert ("retrying", 1, "StoreUnavailable", "put: 503 SlowDown") == tuple(
        status[name] for name in ("state", "attempts", "error_code", "error")
    )
    assert iso(bench.clock.now() + 50) < status["next_attempt_at"] <= iso(bench.clock.now() + 60)


def test_attempts_add_up(bench: Bench) -> None:
    offered(bench)
    for _ in range(3):
        bench.ledger.defer(bench.claimed(), StoreUnavailable("put: 503"), 0)

    assert 3 == bench.status()["attempts"]
    assert 3 == bench.claimed().batch.attempts


def test_rule_11_a_batch_that_is_put_back_spent_no_attempt(bench: Bench) -> None:
    offered(bench)

    bench.ledger.put_back(bench.claimed())

    assert ("queued", 0) == (bench.status()["state"], bench.status()["attempts"])
    assert bench.claim() is not None


def test_a_dead_batch_is_not_walked_until_somebody_says_retry(bench: Bench) -> None:
    put_into(bench, "dead", RECORD)
    bench.clock.advance(DAY_S)
    before = bench.claim()

    retried = bench.ledger.retry([RECORD])

    assert before is None
    assert [RECORD] == retried
    assert ("queued", 0, None, None) == tuple(bench.status()[name] for name in ("state", "attempts", "error_code", "error"))
    assert bench.claim() is not None


def test_a_retrying_batch_is_due_at_once_when_somebody_says_retry(bench: Bench) -> None:
    put_into(bench, "retrying", RECORD)

    bench.ledger.retry([RECORD])

    assert bench.claim() is not None


def test_a_batch_that_crashed_gets_its_chances_again_when_somebody_says_retry(bench: Bench) -> None:
    offered(bench)
    for _ in range(3):
        bench.claimed("crashing")
        bench.ledger.bereave("crashing")
    bench.claim()

    bench.ledger.retry(None)

    assert bench.claim() is not None


def test_retry_takes_the_records_that_were_named(bench: Bench) -> None:
    for number in (1, 2):
        put_into(bench, "dead", f"avatars/{number}")
    put_into(bench, "done", "avatars/3")

    retried = bench.ledger.retry(["avatars/1", "avatars/3", "avatars/4"])

    assert ["avatars/1"] == retried
    assert ["queued", "dead", "done"] == [bench.state(f"avatars/{number}") for number in (1, 2, 3)]


def test_retry_leaves_other_spools_alone(bench: Bench) -> None:
    put_into(bench, "dead", RECORD)

    assert [] == bench.ledger.retry(None, spool="elsewhere")
    assert [RECORD] == bench.ledger.retry(None, spool=NAME)


@pytest.mark.parametrize("state", ["receiving", "stalled"])
def test_an_incomplete_record_is_wanted_as_it_lies_only_if_somebody_says_so(bench: Bench, state: str) -> None:
    put_into(bench, state, RECORD)
    bench.ledger.retry([RECORD])
    before = bench.ledger.wanted_as_is(NAME)

    bench.ledger.retry([RECORD], as_is=True)

    assert ([], [RECORD]) == (before, bench.ledger.wanted_as_is(NAME))
    assert bench.ledger.known(NAME, RECORD).as_is


def test_a_record_that_was_taken_as_it_lies_is_wanted_no_longer(bench: Bench) -> None:
    put_into(bench, "stalled", RECORD)
    bench.ledger.retry([RECORD], as_is=True)

    bench.offer(decided_by="as-is")

    assert [] == bench.ledger.wanted_as_is(NAME)
    assert bench.ledger.was_taken_as_is(bench.claimed())


def test_a_withdrawn_batch_is_no_more_and_its_record_is_looked_at_again(bench: Bench) -> None:
    offered(bench)

    bench.ledger.withdraw(bench.claimed(), Changed("read original/cat.jpg: it was written meanwhile"))

    assert "receiving" == bench.state()
    assert {} == bench.ledger.known(NAME, RECORD).files
    assert ["batch.superseded", "record.seen"] == bench.events()[-2:]
    assert bench.claim() is None


def test_a_snapshot_that_did_not_decode_is_remembered(bench: Bench) -> None:
    offered(bench)
    claim = bench.claimed()
    mark = bench.rows("SELECT fingerprint FROM batch")[0]["fingerprint"]

    bench.ledger.withdraw(claim, Unfinished("decode: truncated", ["cat"]), vetoed=["cat"])

    assert mark in bench.ledger.known(NAME, RECORD).vetoed


def test_a_snapshot_that_did_not_decode_may_be_taken_as_it_lies(bench: Bench) -> None:
    offered(bench)
    mark = bench.rows("SELECT fingerprint FROM batch")[0]["fingerprint"]
    bench.ledger.withdraw(bench.claimed(), Unfinished("decode: truncated", ["cat"]), vetoed=["cat"])

    bench.ledger.retry([RECORD], as_is=True)

    known = bench.ledger.known(NAME, RECORD)
    assert (False, True) == (mark in known.vetoed, known.as_is)


def test_a_batch_that_gave_way_is_walked_on_while_files_of_it_lie_aside(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.ledger.set_aside(claim, [dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")])
    bench.ledger.come_back(claim, bench.clock.now() + 10, "grace")
    new = offered(bench, {"original/cat.jpg": b"another cat"})
    bench.stored(bench.claimed())
    bench.ledger.bereave("me")
    claims = {claim.batch.id: claim.batch for claim in (bench.claimed(), bench.claim("you")) if claim}
    bench.ledger.bereave("me")
    bench.ledger.bereave("you")
    again = {}
    for _ in range(2):
        if found := bench.claim():
            again[found.batch.id] = found.batch.state
            bench.ledger.come_back(found, bench.clock.now() + 1000, "grace")

    assert claims.keys() <= {new, claim.batch.id}
    assert {claim.batch.id: State.SUPERSEDED, new: State.STORED} == again


def test_what_is_left_to_do_is_told_by_what_it_waits_for(bench: Bench) -> None:
    for state in reversed(STATES):  # what waits must not be there yet when another one is claimed
        put_into(bench, state, f"avatars/{state}")

    mine = bench.ledger.unfinished_work([NAME], owner="me")
    yours = bench.ledger.unfinished_work([NAME], owner="you")

    assert {"receiving": 2, "attempt": 2, "retry": 1, "dead": 1, "grace": 1} == mine
    assert {"receiving": 2, "attempt": 1, "elsewhere": 1, "retry": 1, "dead": 1, "grace": 1} == yours
    assert {} == bench.ledger.unfinished_work(["elsewhere"], owner="me")


# Letting go


def test_what_lies_aside_is_known_by_the_batch_in_its_name(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    file = dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")
    bench.ledger.set_aside(claim, [file])

    known = bench.ledger.aside_file(claim.batch.id, file.id)

    assert known is not None
    assert (RECORD, True, file) == (known.record, known.was_stored, known.file)
    assert [known] == bench.ledger.all_aside(NAME)
    assert bench.ledger.aside_file(claim.batch.id, 999) is None
    assert bench.ledger.aside_file(999, file.id) is None


def test_a_file_that_was_given_back_unchanged_is_the_batchs_again(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    file = dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")
    bench.ledger.set_aside(claim, [file])
    identity = Identity(1, 2, 3, 4, 5)

    bench.ledger.given_back(claim.batch.id, file, spool=NAME, record=RECORD, reason="somebody opened it", still_ours=identity)

    assert identity == bench.ledger.known(NAME, RECORD).files[file.file.path]
    assert "file.given_back" == bench.events()[-1]


def test_a_file_that_was_given_back_changed_is_somebodys_new_file(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    file = dataclasses.replace(claim.batch.files[0], aside_name="1.1.x")
    bench.ledger.set_aside(claim, [file])

    bench.ledger.given_back(claim.batch.id, file, spool=NAME, record=RECORD, reason="it is not it", still_ours=None)

    assert file.file.path not in bench.ledger.known(NAME, RECORD).files


def test_a_file_that_lies_aside_again_has_its_batch_walked(bench: Bench) -> None:
    """An unsynced unlink comes back after a power cut, of a batch that was done long ago."""
    claim = bench.batch_stored(CAT)
    file = claim.batch.files[0]
    bench.ledger.let_go(claim, claim.batch.files, deleted=True)
    done(bench, claim)

    bench.ledger.lies_aside(claim.batch.id, file.id, "1.1.x")

    again = bench.claimed().batch
    assert (State.DONE, "1.1.x", False) == (again.state, again.files[0].aside_name, again.files[0].is_gone)


def test_it_says_which_of_many_paths_are_records_that_it_knows(bench: Bench) -> None:
    offered(bench)

    assert [RECORD] == bench.ledger.known_among(NAME, {RECORD, *(f"photos/{number}" for number in range(1200))})
    assert [] == bench.ledger.known_among("another spool", {RECORD})


# Which directory the root is


def test_while_the_root_is_the_same_nothing_is_elsewhere(bench: Bench) -> None:
    offered(bench)

    for _ in range(2):
        bench.ledger.enter(NAME, "a house")

    assert [] == bench.ledger.elsewhere(NAME)


@pytest.mark.parametrize("how_far", ["receiving", "stalled", "queued", "dead"])
def test_when_the_root_is_another_directory_what_is_unfinished_was_last_seen_elsewhere(bench: Bench, how_far: str) -> None:
    bench.ledger.enter(NAME, "a house")
    if how_far in ("receiving", "stalled"):
        write(bench, CAT)
        see(bench, state=how_far)
    else:
        offered(bench)
    if how_far == "dead":
        bench.ledger.bury(bench.claimed(), ObjectRefused("put: no"))

    bench.ledger.enter(NAME, "another house")

    assert [RECORD] == bench.ledger.elsewhere(NAME)
    assert (True, how_far) == (bench.ledger.known(NAME, RECORD).is_elsewhere, bench.state())


def test_what_is_uploaded_or_gone_or_of_another_spool_is_not_elsewhere(bench: Bench) -> None:
    bench.ledger.enter(NAME, "a house")
    bench.batch_stored(CAT)
    write(bench, CAT, record="avatars/43")
    see(bench, record="avatars/43")
    bench.ledger.nothing_waits(NAME, "avatars/43", is_empty=True)
    write(bench, CAT, record="avatars/44")
    see(bench, record="avatars/44")

    bench.ledger.enter("another spool", "a house")
    bench.ledger.enter("another spool", "another house")
    before = bench.ledger.elsewhere(NAME)
    bench.ledger.enter(NAME, "another house")

    assert ([], ["avatars/44"]) == (before, bench.ledger.elsewhere(NAME))


def test_what_is_met_is_not_elsewhere_any_more_and_the_rest_still_is_whatever_the_root_becomes(bench: Bench) -> None:
    bench.ledger.enter(NAME, "a house")
    for record in ("avatars/1", "avatars/2"):
        write(bench, CAT, record=record)
        see(bench, record=record)
    bench.ledger.enter(NAME, "another house")

    bench.ledger.met(NAME, "avatars/1")
    before = bench.ledger.elsewhere(NAME)
    bench.ledger.enter(NAME, "a house")

    assert ["avatars/2"] == before
    assert {"avatars/1", "avatars/2"} == set(bench.ledger.elsewhere(NAME))


# The database itself


def indexes(engine: sqlalchemy.Engine) -> dict[str, str]:
    """Return what each index was made with, without what does not tell one from another."""
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        return {row.name: re.sub(r"batch\.|\s", "", row.sql) for row in rows}


def test_the_migrations_make_exactly_the_indexes_that_queries_need(bench: Bench) -> None:
    """Alembic does not compare those on expressions."""
    migrated = sqlalchemy.create_engine(f"sqlite:///{bench.ledger_file}")
    made = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    schema.metadata.create_all(made)

    assert indexes(made) == indexes(migrated)

    migrated.dispose()
    made.dispose()


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_the_migrations_make_exactly_the_schema_that_queries_need(bench: Bench) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{bench.ledger_file}")

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, schema.metadata)
        revision = context.get_current_revision()

    engine.dispose()
    assert [] == [change for change in differences if "alembic_version" not in str(change)]
    assert schema.REVISION == revision


def pragma(ledger: Ledger, name: str) -> Any:
    with ledger.read() as connection:
        return connection.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar()


@pytest.mark.parametrize(("uploads_first", "index"), [(True, "batch_uploads"), (False, "batch_rest")])
def test_what_is_claimed_next_costs_the_same_however_many_wait(bench: Bench, uploads_first: bool, index: str) -> None:
    """The one index has them in their order, the record is found by its number, and nothing is sorted."""
    statements: list[str] = []
    bench.ledger.close()  # what is opened from now on tells what it runs
    sqlalchemy.event.listen(
        bench.ledger._engine, "connect", lambda connection, _: connection.set_trace_callback(statements.append)
    )

    bench.ledger.claim("me", [NAME], lease_s=60, crashes=3, uploads_first=uploads_first)

    asked = next(statement for statement in statements if "LIMIT" in statement)
    plan = [row["detail"] for row in bench.rows(f"EXPLAIN QUERY PLAN {asked}")]
    assert plan[0].startswith(f"SEARCH batch USING INDEX {index} (")
    assert "SEARCH record USING INTEGER PRIMARY KEY (rowid=?)" in plan
    assert [] == [step for step in plan if step.startswith("SCAN") or "TEMP B-TREE" in step]


def test_every_commit_is_durable(bench: Bench) -> None:
    """NORMAL lost 200 of 200 commits in a power cut (FACTS 28)."""
    assert ("wal", 2, 1) == (
        pragma(bench.ledger, "journal_mode"), pragma(bench.ledger, "synchronous"), pragma(bench.ledger, "foreign_keys"),
    )  # fmt: skip


def test_a_ledger_keeps_its_name_for_ever(bench: Bench) -> None:
    with_another_clock = Ledger(f"sqlite:///{bench.ledger_file}", clock=ManualClock())

    assert bench.ledger.id == with_another_clock.id
    with_another_clock.close()


def test_a_ledger_of_a_newer_spoold_is_refused_with_the_remedy(bench: Bench) -> None:
    connection = sqlite3.connect(bench.ledger_file)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()

    for create in (True, False):
        with pytest.raises(LedgerUnavailable) as caught:
            Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock, create=create)
        assert "9999" in str(caught.value)
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock)
    assert "use the spoold that wrote it, or a newer one" in caught.value.hint


def test_a_ledger_of_an_older_spoold_is_not_for_commands_that_only_read(bench: Bench) -> None:
    connection = sqlite3.connect(bench.ledger_file)
    connection.execute("UPDATE alembic_version SET version_num = '0000'")
    connection.commit()
    connection.close()

    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock, create=False)

    assert "start the daemon of this version once: it migrates the ledger" == caught.value.hint


def test_a_ledger_of_the_first_schema_is_migrated_and_keeps_what_it_knows(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    before = (bench.status(), bench.objects(), bench.ledger.id)
    config = alembic.config.Config()
    config.set_main_option("script_location", "spoold:migrations")
    config.set_main_option("path_separator", "os")
    engine = sqlalchemy.create_engine(f"sqlite:///{bench.ledger_file}")
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "0001")
    engine.dispose()
    with pytest.raises(LedgerUnavailable, match="its schema is 0001"):
        Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock, create=False)

    bench.ledger.close()
    bench.ledger = Ledger(f"sqlite:///{bench.ledger_file}", clock=bench.clock)

    assert before == (bench.status(), bench.objects(), bench.ledger.id)
    bench.ledger.enter(NAME, "a house")
    bench.ledger.come_back(claim, bench.clock.now(), "")


def test_an_empty_database_is_migrated_by_the_daemon_only(tmp_path: Path) -> None:
    """It is older than every schema."""
    file = tmp_path / "ledger.db"
    file.touch()

    with pytest.raises(LedgerUnavailable):
        Ledger(f"sqlite:///{file}", clock=ManualClock(), create=False)
    with captured() as lines:
        ledger = Ledger(f"sqlite:///{file}", clock=ManualClock())

    assert [("ledger.migrated", schema.REVISION)] == [(line["event"], line["after"]) for line in lines]
    assert {} == ledger.counts()
    ledger.close()


def test_a_ledger_is_made_by_the_daemon_only(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="there is none yet"):
        Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", clock=ManualClock(), create=False)

    assert [] == list(tmp_path.iterdir())


def set_pragma(bench: Bench, pragma: str) -> None:
    """Have it set on every connection that is opened from now on."""
    bench.ledger.close()  # those that are open; the next verb opens others
    sqlalchemy.event.listen(bench.ledger._engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}"))


def test_a_ledger_that_is_full_says_so_and_goes_on_when_there_is_room(bench: Bench) -> None:
    write(bench, CAT)
    pages = pragma(bench.ledger, "page_count")
    set_pragma(bench, f"max_page_count = {pages}")
    files = [dataclasses.replace(file, path=f"{RECORD}/original/{number}.jpg") for number in range(200)
             for file in bench.spool.look(RECORD).files]  # fmt: skip

    with pytest.raises(LedgerUnavailable, match="full"):
        bench.ledger.offer(NAME, bench.spool.look(RECORD), files, decided_by="quiet", is_all=True)
    nothing = bench.status()
    set_pragma(bench, f"max_page_count = {pages * 10}")
    offered(bench)

    assert ({}, "queued") == (nothing, bench.state())


def test_a_ledger_that_is_locked_by_another_program_says_so(bench: Bench) -> None:
    """Some people open it in a database browser and go for lunch. SQLite waits ten seconds for them, we here less."""
    locking = sqlite3.connect(bench.ledger_file, isolation_level=None)
    locking.execute("BEGIN IMMEDIATE")
    set_pragma(bench, "busy_timeout = 50")

    with pytest.raises(LedgerUnavailable, match="locked"):
        offered(bench)
    readable = bench.ledger.counts()
    locking.execute("ROLLBACK")
    locking.close()
    offered(bench)

    assert {} == readable
    assert "queued" == bench.state()


_WORKER = """
import sys
from spoold.clock import SystemClock
from spoold.errors import BadPath
from spoold.ledger import Ledger
from spoold.model import Identity, Snapshot, SpooledFile
url, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(url, clock=SystemClock())
walked = []
for number in range(rounds):
    file = SpooledFile(f"avatars/{me}-{number}/original/cat.jpg", "original", "cat", "cat.jpg", Identity(1, number, 1, 1, 1))
    snapshot = Snapshot(f"avatars/{me}-{number}", "avatars", f"{me}-{number}", (file,))
    ledger.offer("uploads", snapshot, snapshot.files, decided_by="quiet", is_all=True)
    for claim in ledger.claim(me, ["uploads"], lease_s=30, crashes=3, at_most=2):
        walked.append(claim.batch.id)
        ledger.bury(claim, BadPath("enough"))
while claims := ledger.claim(me, ["uploads"], lease_s=30, crashes=3, at_most=3):
    for claim in claims:
        walked.append(claim.batch.id)
        ledger.bury(claim, BadPath("enough"))
print("walked", *walked, flush=True)
"""


def test_two_daemons_make_one_ledger_and_never_walk_one_record_at_once(tmp_path: Path) -> None:
    """They start together on an empty directory: one of them makes the schema."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    command = [sys.executable, "-c", _WORKER, url]
    workers = [
        subprocess.Popen([*command, name, "25"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdin is not None
        assert "ready\n" == worker.stdout.readline()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()

    said = [worker.communicate(timeout=60)[0].splitlines()[-1].split() for worker in workers]

    assert ["walked", "walked"] == [words[0] for words in said]
    walked = [batch for words in said for batch in words[1:]]
    assert 50 == len(walked) == len(set(walked))


def test_threads_of_one_daemon_claim_each_record_once(bench: Bench) -> None:
    for number in range(20):
        offered(bench, {"original/cat.jpg": b"a cat"}, f"avatars/{number}")
    claimed: list[str] = []

    def work() -> None:
        while (claim := bench.claim(threading.current_thread().name)) is not None:
            claimed.append(claim.batch.record)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted({f"avatars/{number}" for number in range(20)}) == sorted(claimed)


def test_a_snapshot_of_another_spool_is_another_record(bench: Bench) -> None:
    write(bench, CAT)
    snapshot: Snapshot = bench.spool.look(RECORD)
    bench.ledger.offer(NAME, snapshot, snapshot.files, decided_by="quiet", is_all=True)

    bench.ledger.offer("elsewhere", snapshot, snapshot.files, decided_by="quiet", is_all=True)

    assert ["elsewhere", NAME] == sorted(row["spool"] for row in bench.ledger.record_status(RECORD))


# Commits of which nobody knows whether they were carried out


def commit_fails(bench: Bench, moment: Moment) -> Hand:
    """Return a hand at which the next commit that changes something fails, before it is carried out or although it was."""
    bench.ledger.close()  # connections that are made from now on are in the hand
    is_change = lambda op: op.name == "COMMIT" and op.is_effect  # noqa: E731
    return Hand(Fail("ledger", 1, ledger_says("disk I/O error"), moment=moment, only=is_change))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_claim_that_was_taken_unknown_to_its_owner_is_freed(bench: Bench, moment: Moment) -> None:
    """It was renewed for as long as the daemon lived, and nobody walked its batch."""
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()

    with commit_fails(bench, moment), pytest.raises(LedgerUnavailable):
        bench.claim()
    bench.ledger.renew("me", lease_s=LEASE_S)

    again = bench.claimed()
    bench.ledger.renew("me", lease_s=LEASE_S)
    assert ["me"] == bench.ledger.owners()
    assert [{"crashes": 1}] == bench.rows("SELECT crashes FROM batch")
    bench.ledger.put_back(again)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_claim_of_a_record_that_was_taken_or_given_back_unknown_to_its_owner_is_freed(bench: Bench, moment: Moment) -> None:
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()
    [key] = [row["id"] for row in bench.rows("SELECT id FROM record")]

    with commit_fails(bench, moment), pytest.raises(LedgerUnavailable):
        bench.ledger.claim_record(key, "me", lease_s=LEASE_S)
    bench.ledger.renew("me", lease_s=LEASE_S)
    fence = bench.ledger.claim_record(key, "me", lease_s=LEASE_S)
    assert fence is not None
    with commit_fails(bench, moment), pytest.raises(LedgerUnavailable):
        bench.ledger.release_record(key, "me", fence)
    bench.ledger.renew("me", lease_s=LEASE_S)

    assert [] == bench.ledger.owners()


# Fairness


def claimed_in_order(bench: Bench, at_most: int = 1000) -> list[str]:
    """Claim one after the other, and return the records."""
    records: list[str] = []
    while len(records) < at_most and (claim := bench.claim()) is not None:
        records.append(claim.batch.record)
    return records


def test_an_attachment_with_very_many_records_lets_another_with_one_go_first(bench: Bench) -> None:
    for number in range(50):
        offered(bench, CAT, f"avatars/{number}")
    offered(bench, CAT, "logos/1")
    offered(bench, CAT, "logos/2")

    order = claimed_in_order(bench)

    assert order.index("logos/1") < 3 and order.index("logos/2") < 5
    assert [f"avatars/{number}" for number in range(50)] == [record for record in order if record.startswith("avatars/")]


def test_a_large_record_lets_small_ones_go_first_but_not_for_ever(bench: Bench) -> None:
    large = bench.root / "avatars/0/original/cat.bin"
    large.parent.mkdir(parents=True)
    with open(large, "wb") as file:
        file.truncate(50_000_000)
    bench.offer("avatars/0")
    offered(bench, CAT, "avatars/1")
    bench.clock.advance(40.0)
    offered(bench, CAT, "avatars/2")
    bench.clock.advance(20.0)
    offered(bench, CAT, "avatars/3")

    assert ["avatars/1", "avatars/2", "avatars/0", "avatars/3"] == claimed_in_order(bench)


def test_what_is_new_does_not_wait_for_a_backlog_of_its_own_attachment(bench: Bench) -> None:
    for number in range(20):
        write(bench, CAT, f"avatars/{number}")
    bench.clock.advance(3600.0)
    for number in range(20):
        bench.offer(f"avatars/{number}")
    bench.clock.advance(-3600.0)
    offered(bench, CAT, "avatars/new")
    bench.clock.advance(3600.0)

    assert claimed_in_order(bench).index("avatars/new") < 3


def test_what_was_tried_has_had_its_place_in_the_queue(bench: Bench) -> None:
    for number in range(20):
        offered(bench, CAT, f"avatars/{number}")
    tried = [bench.claimed() for _ in range(10)]
    bench.ledger.put_back(tried[8])
    bench.ledger.defer(tried[9], StoreUnavailable("put: 503"), 1.0)
    bench.clock.advance(1.0)

    assert ["avatars/8", "avatars/9"] == claimed_in_order(bench, 2)
