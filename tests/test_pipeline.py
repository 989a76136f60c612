"""One batch, start to finish, and what becomes of it for each kind of fault."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from spoold.errors import LedgerUnavailable, ObjectRefused, SpoolBroken, SpooldError, StoreDenied, StoreUnavailable
from spoold.model import Claim, Headers, Outcome
from spoold.pipeline import Pipeline
from tests.paperclip import picture
from tests.parts import (
    BUCKET,
    LEASE_S,
    NAME,
    PATH,
    RECORD,
    Bench,
    alone,
    captured,
    in_a_world,
    told,
    walked,
    without,
    without_root_powers,
)
from tests.proxy import Answer as Reply
from tests.proxy import Delay, FaultProxy, LoseAnswer, Request, Reset, error_body
from tests.servers import RcloneServer

CAT = {"original/cat.jpg": b"a cat", "thumb/cat.jpg": b"cat"}
ORIGINAL = f"{RECORD}/original/cat.jpg"
THUMB = f"{RECORD}/thumb/cat.jpg"
DENIED = Reply(403, error_body("AccessDenied"))
BUSY = Reply(503, error_body("SlowDown"))


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def bench(real: Bench) -> Bench:
    return real


def offered(bench: Bench, files: dict[str, bytes] = CAT, record: str = RECORD) -> Claim:
    for path, content in files.items():
        bench.write(f"{record}/{path}", content)
    bench.offer(record)
    return bench.claimed()


def failing(fault: SpooldError) -> Callable[[], None]:
    """Return a probe that finds the same."""

    def probe() -> None:
        raise fault

    return probe


def walk_on(bench: Bench, pipeline: Pipeline, *, at_most: int = 20) -> list[Outcome]:
    """Walk whatever is due, letting time pass, until nothing is."""
    outcomes: list[Outcome] = []
    for _ in range(at_most):
        claim = bench.claim()
        if claim is None:
            due = bench.rows("SELECT min(due_at) AS at FROM batch")[0]["at"]
            if due is None:
                return outcomes
            bench.clock.advance(max(0.0, due - bench.clock.now()) + 0.1)
            continue
        outcomes.append(walked(pipeline, claim))
    raise AssertionError(f"it never ends: {outcomes}")


def status(bench: Bench, *names: str) -> tuple[Any, ...]:
    return tuple(bench.status()[name] for name in names)


# All is well


def test_a_batch_goes_all_the_way(bench: Bench, rclone_server: RcloneServer) -> None:
    cleaner = bench.cleaner(min_age_s=5.0, grace_s=10.0, keep_empty_dirs_for_s=30.0)
    pipeline = bench.pipeline(cleaner=cleaner)
    claim = offered(bench)

    first = walked(pipeline, claim)
    uploaded = status(bench, "state", "processing"), bench.files()
    outcomes = walk_on(bench, pipeline)

    assert (Outcome.WAITING, (("uploaded", 0), sorted([ORIGINAL, THUMB]))) == (first, uploaded)
    assert Outcome.DONE is outcomes[-1]
    assert {ORIGINAL: b"a cat", THUMB: b"cat"} == rclone_server.objects(BUCKET)
    assert (("done", 0), ["avatars/"], []) == (status(bench, "state", "processing"), bench.tree(), bench.aside())
    assert ["batch.settled", "batch.claimed", "batch.stored", "record.cleared"] == bench.events()
    assert [] == bench.ledger.owners()


def test_a_batch_is_stored_before_anything_local_goes(bench: Bench) -> None:
    """From then on the bucket is the truth; not before."""
    states = []
    bench.interruptions = [lambda: states.append(bench.state())] * 5
    pipeline = bench.pipeline()

    walked(pipeline, offered(bench))

    assert ["uploading", "uploading", "uploaded", "uploaded", "uploaded"] == states


def test_the_marker_goes_with_its_batch(tmp_path: Path, proxy: FaultProxy, rclone_server: RcloneServer) -> None:
    with Bench(tmp_path, endpoint_url=proxy.endpoint_url, marker=".done") as bench:
        bench.ledger.put_back(offered(bench, CAT | {".done": b""}))

        walk_on(bench, bench.pipeline())

        assert ("done", ["avatars/"]) == (bench.state(), bench.tree())
        assert {ORIGINAL, THUMB} == set(rclone_server.objects(BUCKET))


def test_a_newer_version_replaces_the_older_one(bench: Bench, rclone_server: RcloneServer) -> None:
    pipeline = bench.pipeline()
    for content in (b"a cat", b"another cat"):
        bench.ledger.put_back(offered(bench, {"original/cat.jpg": content}))
        walk_on(bench, pipeline)

    assert {ORIGINAL: b"another cat"} == rclone_server.objects(BUCKET)
    assert ("done", 2) == status(bench, "state", "version")


def test_the_same_bytes_again_are_not_sent_again(bench: Bench, proxy: FaultProxy) -> None:
    pipeline = bench.pipeline()
    for _ in range(2):
        bench.ledger.put_back(offered(bench))
        walk_on(bench, pipeline)

    assert 2 == len(proxy.requests("PUT"))
    assert ("done", 1) == status(bench, "state", "version")


# Transient: later again


@pytest.mark.parametrize("fault", [BUSY, Reset(), LoseAnswer()])
def test_an_item_that_fails_is_tried_again_later(bench: Bench, proxy: FaultProxy, fault: Any) -> None:
    """Not the destination: a probe of it succeeds."""
    proxy.on("PUT", "/original/", fault)
    pipeline = bench.pipeline()

    with captured() as lines:
        outcome = walked(pipeline, offered(bench))
    deferred = status(bench, "state", "attempts", "error_code")
    proxy.clear()
    walk_on(bench, pipeline)

    assert (Outcome.DEFERRED, ("retrying", 1, "StoreUnavailable")) == (outcome, deferred)
    [line] = told(lines, "batch.deferred")
    assert (1, "StoreUnavailable") == (line["attempt"], line["error"])
    assert 0.8 <= line["due_in_s"] <= 1.2
    assert ("done", 0) == status(bench, "state", "attempts")


def test_what_failed_waits_longer_each_time(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", BUSY)
    pipeline = bench.pipeline()
    bench.ledger.put_back(offered(bench))
    waits = []
    for _ in range(11):
        with captured() as lines:
            walked(pipeline, bench.claimed())
        waits.append(told(lines, "batch.deferred")[0]["due_in_s"])
        bench.clock.advance(waits[-1] + 0.001)  # it is told in whole milliseconds

    expected = [min(300.0, 2.0**number) for number in range(11)]
    assert all(0.8 * wanted <= wait <= 1.2 * wanted for wanted, wait in zip(expected, waits, strict=True)), waits
    assert len({wait / wanted for wanted, wait in zip(expected, waits, strict=True)}) > 1, "what failed together spreads out"


def test_a_server_that_asks_for_time_gets_it(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", Reply(503, error_body("SlowDown"), {"Retry-After": "30"}))

    with captured() as lines:
        walked(bench.pipeline(), offered(bench))

    assert 30.0 == told(lines, "batch.deferred")[0]["due_in_s"]


def test_a_server_that_asks_for_a_year_does_not_get_it(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", Reply(503, error_body("SlowDown"), {"Retry-After": str(365 * 86400)}))

    with captured() as lines:
        walked(bench.pipeline(), offered(bench))

    assert 300.0 == told(lines, "batch.deferred")[0]["due_in_s"]


def test_an_item_is_given_up_after_as_many_attempts_as_the_configuration_says(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", BUSY)
    pipeline = bench.pipeline(give_up_after=3)
    bench.ledger.put_back(offered(bench))

    outcomes = walk_on(bench, pipeline)

    assert [Outcome.DEFERRED, Outcome.DEFERRED, Outcome.DEAD] == outcomes
    assert ("dead", "GaveUp") == status(bench, "state", "error_code")
    assert "3 attempts failed, the last: put" in bench.status()["error"]
    assert sorted([ORIGINAL, THUMB]) == bench.files()


def test_an_item_is_never_given_up_by_default(bench: Bench, proxy: FaultProxy) -> None:
    """A permanent outage never uses up the items' retries (FACTS 24)."""
    proxy.on("PUT", "/original/", BUSY)
    pipeline = bench.pipeline(give_up_after=0)
    bench.ledger.put_back(offered(bench))

    for _ in range(5):
        assert Outcome.DEFERRED is walked(pipeline, bench.claimed())
        bench.clock.advance(400)


# Refused: a person must look


def test_rule_8_a_record_whose_key_is_taken_is_dead(tmp_path: Path, proxy: FaultProxy) -> None:
    with Bench(tmp_path, endpoint_url=proxy.endpoint_url) as bench:
        offered(bench, {"original/cat.jpg": b"a cat"})
        with bench.ledger.write() as change:
            change.execute(
                text(
                    "INSERT INTO record (id, spool, path, attachment, record_id, version, fence, first_seen_at, updated_at) "
                    "VALUES (77, 'other', 'logos/1', 'logos', '1', 1, 0, '', '')"
                )
            )
            change.execute(text("INSERT INTO key_owner VALUES (:bucket, :key, 77)"), {"bucket": BUCKET, "key": ORIGINAL})
        bench.ledger.bereave("me")

        outcome = walked(bench.pipeline(), bench.claimed())

        assert (Outcome.DEAD, "dead", "KeyTaken") == (outcome, *status(bench, "state", "error_code"))
        assert [] == proxy.requests("PUT")
        assert [ORIGINAL] == bench.files()


def test_an_object_that_the_store_will_not_take_is_dead(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/thumb/", Reply(400, error_body("InvalidTag")))

    with captured() as lines:
        outcome = walked(bench.pipeline(), offered(bench))

    assert (Outcome.DEAD, "dead", "ObjectRefused") == (outcome, *status(bench, "state", "error_code"))
    [line] = told(lines, "batch.dead")
    assert ("error", "correct object.tags") == (line["log_level"], line["hint"])
    assert sorted([ORIGINAL, THUMB]) == bench.files()


def test_what_the_store_takes_of_nobody_holds_the_spool_instead(bench: Bench, proxy: FaultProxy) -> None:
    """One wrong word in the configuration would bury every record."""
    proxy.on("PUT", "/thumb/", Reply(400, error_body("InvalidTag")))
    refuses = failing(ObjectRefused("put probe: 400 InvalidTag", hint="correct object.tags"))

    outcome = walked(bench.pipeline(holds=bench.holds(store=refuses)), offered(bench))

    assert (Outcome.HELD, "queued", 0) == (outcome, *status(bench, "state", "attempts"))
    assert "correct object.tags" == bench.ledger.held()[NAME].hint


def test_a_file_that_can_have_no_key_is_dead(tmp_path: Path, proxy: FaultProxy) -> None:
    with Bench(tmp_path, endpoint_url=proxy.endpoint_url, key="y" * 1010 + "/" + PATH) as bench:
        outcome = walked(bench.pipeline(), offered(bench))

        assert (Outcome.DEAD, "dead", "BadPath") == (outcome, *status(bench, "state", "error_code"))


@pytest.mark.parametrize("place", [ORIGINAL, f"{RECORD}/original", RECORD, "avatars"])
def test_what_may_not_be_read_at_that_moment_is_waited_for(bench: Bench, place: str) -> None:
    """An app's chmod may be under way. A grave would be for ever: of a directory that may be read again no file changes."""
    claim = offered(bench)
    path = bench.root / place
    mode = path.stat().st_mode
    path.chmod(0)

    outcome = in_a_world(lambda: walked(bench.pipeline(), claim), without_root_powers)
    state, reason = bench.state(), bench.rows("SELECT reason FROM sighting")[0]["reason"]
    path.chmod(mode)
    bench.offer()
    walked(bench.pipeline(), bench.claimed())

    assert (Outcome.STALE, "receiving", [RECORD]) == (outcome, state, bench.touched)
    assert "Permission denied" in reason
    assert "uploaded" == bench.state()


# Halt: the destination, or the disk


def test_rule_11_a_destination_that_refuses_holds_the_spool_and_spends_no_attempt(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "", DENIED)
    holds = bench.holds(store=failing(StoreDenied("put probe: 403", hint="renew the credentials")))

    with captured() as lines:
        outcome = walked(bench.pipeline(holds=holds), offered(bench))

    assert (Outcome.HELD, ("queued", 0, None)) == (outcome, status(bench, "state", "attempts", "error_code"))
    assert ({NAME}, "renew the credentials") == (holds.held(), bench.ledger.held()[NAME].hint)
    assert ["spool.held"] == [line["event"] for line in lines if line["log_level"] == "error"]
    assert bench.claim() is None


def test_rule_11_one_key_that_is_denied_does_not_hold_the_spool(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", DENIED)
    holds = bench.holds()

    outcome = walked(bench.pipeline(holds=holds), offered(bench))

    assert (Outcome.DEFERRED, ("retrying", 1, "StoreDenied")) == (outcome, status(bench, "state", "attempts", "error_code"))
    assert set() == holds.held()


@pytest.mark.parametrize("fault", [BUSY, LoseAnswer()])
def test_rule_11_a_destination_that_does_not_answer_holds_the_spool(bench: Bench, proxy: FaultProxy, fault: Any) -> None:
    proxy.on("PUT", "", fault)
    holds = bench.holds(store=failing(StoreUnavailable("put probe: 503")))

    outcome = walked(bench.pipeline(holds=holds), offered(bench))

    assert (Outcome.HELD, ("queued", 0)) == (outcome, status(bench, "state", "attempts"))


def test_a_disk_that_fails_holds_the_spool(bench: Bench) -> None:
    holds = bench.holds(disk=failing(SpoolBroken("write into .spoold: Input/output error")))
    claim = offered(bench)

    outcome = in_a_world(lambda: walked(bench.pipeline(holds=holds), claim), without("fsync", errno.EIO))

    assert (Outcome.HELD, ("queued", 0)) == (outcome, status(bench, "state", "attempts"))
    assert "SpoolBroken" == bench.ledger.held()[NAME].error_code


def test_a_disk_that_failed_once_costs_an_attempt(bench: Bench) -> None:
    claim = offered(bench)

    outcome = in_a_world(lambda: walked(bench.pipeline(), claim), without("fsync", errno.EIO))

    assert (Outcome.DEFERRED, ("retrying", 1, "SpoolBroken")) == (outcome, status(bench, "state", "attempts", "error_code"))


def test_a_root_that_is_gone_holds_the_spool(bench: Bench) -> None:
    claim = offered(bench)
    bench.root.rename(bench.directory / "elsewhere")
    holds = bench.holds(disk=lambda: bench.spool.move_in(bench.ledger.id))

    outcome = walked(bench.pipeline(holds=holds), claim)

    assert (Outcome.HELD, "queued") == (outcome, bench.state())


def test_what_is_worst_decides(bench: Bench, proxy: FaultProxy) -> None:
    """One style is denied, another one not answered, a third one refused for good: the destination may be down."""
    proxy.on("PUT", "/a/", Reset())
    proxy.on("PUT", "/b/", Reply(400, error_body("InvalidTag")))
    proxy.on("PUT", "/c/", DENIED)
    holds = bench.holds(store=failing(StoreDenied("put probe: 403")))

    outcome = walked(bench.pipeline(holds=holds), offered(bench, {f"{style}/cat.jpg": b"cat" for style in "abc"}))

    assert Outcome.HELD is outcome


# Stale: the world moved on


@pytest.mark.parametrize("how", ["written", "removed", "replaced"])
def test_a_file_that_changed_since_it_settled_sends_the_record_back_to_be_looked_at(bench: Bench, how: str) -> None:
    claim = offered(bench)
    match how:
        case "written":
            bench.write(THUMB, b"another thumb")
        case "removed":
            (bench.root / THUMB).unlink()
        case "replaced":
            os.replace(bench.write("elsewhere", b"cat"), bench.root / THUMB)

    outcome = walked(bench.pipeline(), claim)

    assert (Outcome.STALE, [RECORD]) == (outcome, bench.touched)
    assert ("receiving", 0) == status(bench, "state", "attempts")
    assert ["batch.superseded", "record.seen"] == bench.events()[-2:]
    assert bench.claim() is None


def test_a_batch_that_a_newer_one_replaced_during_the_upload_ends_quietly(bench: Bench, proxy: FaultProxy) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/original/", Delay(gate), times=1)
    claim = offered(bench)
    outcomes: list[Outcome] = []
    walking = threading.Thread(target=lambda: outcomes.append(walked(bench.pipeline(), claim)))
    walking.start()
    proxy.await_seen("PUT", "/original/")
    bench.write(ORIGINAL, b"another cat")
    bench.offer()
    while_uploading = bench.claim("you")
    gate.set()
    walking.join()

    newer = bench.claimed("you")

    assert ([Outcome.STALE], None) == (outcomes, while_uploading)
    assert newer.batch.id > claim.batch.id
    assert "uploading" == bench.state()


@pytest.mark.parametrize("fault", [BUSY, DENIED, Reply(400, error_body("InvalidTag"))])
def test_a_batch_that_a_newer_one_replaced_while_it_failed_ends_quietly(bench: Bench, proxy: FaultProxy, fault: Any) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/original/", Delay(gate, fault), times=3)
    claim = offered(bench)
    outcomes: list[Outcome] = []
    walking = threading.Thread(target=lambda: outcomes.append(walked(bench.pipeline(), claim)))
    walking.start()
    proxy.await_seen("PUT", "/original/")
    bench.write(ORIGINAL, b"another cat")
    bench.offer()
    gate.set()
    walking.join()

    assert 1 == len(outcomes), "and the thread did not die of it"
    assert bench.claimed().batch.id > claim.batch.id


@pytest.mark.parametrize("fault", [None, BUSY, DENIED])
def test_a_walk_whose_claim_was_taken_over_changes_nothing_more(bench: Bench, proxy: FaultProxy, fault: Any) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/original/", Delay(gate) if fault is None else Delay(gate, fault), times=3)
    claim = offered(bench)
    outcomes: list[Outcome] = []
    walking = threading.Thread(target=lambda: outcomes.append(walked(bench.pipeline(), claim)))
    walking.start()
    proxy.await_seen("PUT", "/original/")
    bench.clock.advance(2 * LEASE_S)
    bench.claimed("you")
    before = bench.rows("SELECT * FROM batch"), bench.rows("SELECT * FROM claim")
    gate.set()
    walking.join()

    assert [Outcome.STALE] == outcomes
    assert before == (bench.rows("SELECT * FROM batch"), bench.rows("SELECT * FROM claim"))


def test_who_was_frozen_past_the_claim_gives_it_back(bench: Bench, proxy: FaultProxy) -> None:
    claim = offered(bench)
    bench.has_claims = False

    outcome = walked(bench.pipeline(), claim)

    assert (Outcome.STALE, [], [RECORD]) == (outcome, proxy.requests("PUT"), bench.touched)
    assert [] == bench.ledger.owners()


def test_who_was_frozen_while_clearing_gives_the_claim_back(bench: Bench) -> None:
    pipeline = bench.pipeline()
    claim = bench.batch_stored(CAT)
    bench.has_claims = False

    outcome = walked(pipeline, claim)
    bench.has_claims = True
    walk_on(bench, pipeline)

    assert (Outcome.STALE, "done") == (outcome, bench.state())


def test_what_was_only_not_sent_does_not_hide_what_moved_on(bench: Bench) -> None:
    """A large original is found changed only when it is read again; its styles were not sent because of it."""

    def headers_for(attachment: str, style: str, sniffed: str) -> Headers:
        bench.write(ORIGINAL, b"y" * (2 << 20))  # at the moment between hashing and sending
        return Headers(sniffed)

    claim = offered(bench, {"original/cat.jpg": b"x" * (2 << 20), "thumb/cat.jpg": b"cat"})

    outcome = walked(bench.pipeline(uploader=bench.uploader(headers_for=headers_for)), claim)

    assert (Outcome.STALE, [RECORD]) == (outcome, bench.touched)


# Images that must decode


def test_an_image_that_does_not_decode_goes_back_to_being_incomplete(bench: Bench, proxy: FaultProxy) -> None:
    whole = picture(64, 48, format="PNG")
    broken = whole[:100] + bytes(10) + whole[110:]
    claim = offered(bench, {"original/cat.png": whole, "original/dog.png": broken})

    outcome = walked(bench.pipeline(decodes=True), claim)

    assert (Outcome.STALE, "receiving", []) == (outcome, bench.state(), proxy.requests("PUT"))
    assert 1 == len([mark for mark in bench.ledger.known(NAME, RECORD).vetoed if mark])
    assert "original/dog.png" in bench.rows("SELECT reason FROM sighting")[0]["reason"]


def test_images_that_decode_go_up(bench: Bench, rclone_server: RcloneServer) -> None:
    walked(bench.pipeline(decodes=True), offered(bench, {"original/cat.jpg": picture(64, 48), "original/cat.txt": b"text"}))

    assert 2 == len(rclone_server.objects(BUCKET))


def test_what_a_person_wants_as_it_lies_is_not_decoded(bench: Bench, rclone_server: RcloneServer) -> None:
    bench.write(ORIGINAL, picture(64, 48)[:-200])
    bench.offer(decided_by="as-is")

    walked(bench.pipeline(decodes=True), bench.claimed())

    assert {ORIGINAL} == set(rclone_server.objects(BUCKET))


# Draining


def test_a_daemon_that_drains_puts_the_batch_back_as_it_was(bench: Bench, proxy: FaultProxy) -> None:
    claim = offered(bench)
    bench.stop.set()

    outcome = walked(bench.pipeline(), claim)

    assert (Outcome.WAITING, ("queued", 0), []) == (outcome, status(bench, "state", "attempts"), proxy.requests("PUT"))
    assert [] == bench.ledger.owners()


# Faults while clearing


def test_a_store_that_does_not_answer_while_clearing_is_asked_again_later(bench: Bench, proxy: FaultProxy) -> None:
    pipeline = bench.pipeline()
    claim = bench.batch_stored(CAT)
    for path, content in CAT.items():
        bench.store.connect().put_object(Bucket=BUCKET, Key=f"{RECORD}/{path}", Body=content)
    bench.clock.advance(3601)
    bench.ledger.renew("me", lease_s=LEASE_S)
    proxy.on("HEAD", "", Reply(503))

    with captured() as lines:
        outcome = walked(pipeline, claim)
    deferred = status(bench, "state", "processing", "error_code")
    proxy.clear()
    walk_on(bench, pipeline)

    assert (Outcome.DEFERRED, ("uploaded", 0, "StoreUnavailable")) == (outcome, deferred)
    assert 1 == len(told(lines, "clear.deferred"))
    assert ("done", None) == status(bench, "state", "error_code")


def test_a_directory_that_may_not_be_written_is_tried_again_later(bench: Bench) -> None:
    """And the batch is not dead for it: it is in the bucket."""
    claim = bench.batch_stored(CAT)
    (bench.root / RECORD / "original").chmod(0o555)

    outcome = in_a_world(lambda: walked(bench.pipeline(), claim), without_root_powers)
    deferred = status(bench, "state", "error_code")
    (bench.root / RECORD / "original").chmod(0o755)
    walk_on(bench, bench.pipeline())

    assert (Outcome.DEFERRED, ("uploaded", "NoAccess")) == (outcome, deferred)
    assert ("done", []) == (bench.state(), bench.files())


def test_rule_5_what_the_bucket_lost_is_put_again_and_then_let_go(
    bench: Bench, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    pipeline = bench.pipeline(cleaner=bench.cleaner(keep_for_s=7200.0))
    walked(pipeline, offered(bench))
    rclone_server.client().delete_object(Bucket=BUCKET, Key=THUMB)
    bench.clock.advance(7201)

    outcomes = [walked(pipeline, bench.claimed())]
    state = bench.state()
    outcomes += walk_on(bench, pipeline)

    assert (Outcome.DEFERRED, "retrying") == (outcomes[0], state)
    assert Outcome.DONE is outcomes[-1]
    assert {ORIGINAL: b"a cat", THUMB: b"cat"} == rclone_server.objects(BUCKET)
    assert 1 == len(proxy.requests("PUT", ORIGINAL)), "what is still there is not sent again"
    assert ("done", [], 1) == (bench.state(), bench.files(), bench.status()["version"])


def test_files_that_the_app_removed_after_the_upload_are_no_fault(bench: Bench) -> None:
    pipeline = bench.pipeline()
    claim = bench.batch_stored(CAT)
    (bench.root / THUMB).unlink()

    outcomes = [walked(pipeline, claim), *walk_on(bench, pipeline)]

    assert Outcome.STALE not in outcomes
    assert ("done", []) == (bench.state(), bench.files())


# The ledger


def test_a_ledger_that_is_gone_is_told_and_the_claim_is_still_ours(bench: Bench, rclone_server: RcloneServer) -> None:
    """Nothing is let go: what was stored cannot be written down."""
    pipeline = bench.pipeline()
    claim = offered(bench)
    put_back: list[Callable[[], None]] = []
    bench.interruptions = [lambda: put_back.append(bench.take_ledger_away())]

    with pytest.raises(LedgerUnavailable):
        walked(pipeline, claim)
    files = bench.files()
    put_back[0]()
    bench.clock.advance(10)
    bench.ledger.put_back(claim)
    walk_on(bench, pipeline)

    assert sorted([ORIGINAL, THUMB]) == files
    assert ("done", []) == (bench.state(), bench.files())
    assert 2 == len(rclone_server.objects(BUCKET))


def test_rule_6_what_was_sent_and_could_not_be_written_down_is_in_doubt(bench: Bench) -> None:
    pipeline = bench.pipeline()
    claim = offered(bench)
    put_back: list[Callable[[], None]] = []
    bench.interruptions = [lambda: put_back.append(bench.take_ledger_away())]
    with pytest.raises(LedgerUnavailable):
        walked(pipeline, claim)
    put_back[0]()

    bench.ledger.put_back(claim)
    bench.claimed()

    assert {"doubt"} == {row["answer"] for row in bench.rows("SELECT answer FROM intent")}


# What a record's log looks like


def test_whatever_happens_a_records_events_tell_one_story(bench: Bench, proxy: FaultProxy) -> None:
    """Settled, claimed, and then exactly one ending, again and again (contract, section 4)."""
    pipeline = bench.pipeline()
    faults: list[Any] = [BUSY, DENIED, Reset(), None]
    claim = offered(bench)
    for fault in faults:
        proxy.clear()
        if fault is not None:
            proxy.on("PUT", "/original/", fault)
        walked(pipeline, claim)
        bench.clock.advance(400)
        claim = bench.claimed()
    walked(pipeline, claim)
    walk_on(bench, pipeline)

    events = bench.events()
    assert "batch.settled" == events[0]
    endings = {"batch.deferred", "batch.stored"}
    pairs = list(itertools.pairwise(events[1:-1]))
    assert all((before == "batch.claimed") == (after in endings) for before, after in pairs), events
    assert ["batch.stored", "record.cleared"] == events[-2:]


# As time passes


def test_each_step_comes_when_its_time_has_come_and_not_before(bench: Bench) -> None:
    cleaner = bench.cleaner(keep_for_s=60.0, min_age_s=5.0, grace_s=10.0, keep_empty_dirs_for_s=30.0)
    pipeline = bench.pipeline(cleaner=cleaner)
    way: list[tuple[str, Outcome, str, int, int]] = []

    for waits_s in (60.0, 5.0, 10.0, 30.0, 0.0):
        claim = bench.claimed() if way else offered(bench)
        outcome = walked(pipeline, claim)
        batch = bench.rows("SELECT due_at, waiting_for FROM batch")[0]
        way.append((claim.batch.state, outcome, batch["waiting_for"], len(bench.files()), len(bench.aside())))
        assert bench.claim() is None
        assert waits_s == 0.0 or waits_s - 1 < batch["due_at"] - bench.clock.now() <= waits_s
        bench.clock.advance(waits_s)

    assert [
        ("pending", Outcome.WAITING, "keep_for", 2, 0),
        ("stored", Outcome.WAITING, "min_age", 2, 0),
        ("stored", Outcome.WAITING, "grace", 0, 2),
        ("stored", Outcome.DONE, "dirs", 0, 0),
        ("done", Outcome.DONE, "", 0, 0),
    ] == way
    assert ["avatars/"] == bench.tree() and 1 == bench.events().count("record.cleared")


def test_a_batch_whose_local_files_stay_is_done_at_once(bench: Bench) -> None:
    outcome = walked(bench.pipeline(cleaner=bench.cleaner(deletes=False)), offered(bench))

    assert (Outcome.DONE, "done", 2) == (outcome, bench.state(), len(bench.files()))
    assert [{"due_at": None}] == bench.rows("SELECT due_at FROM batch")


def test_what_failed_together_does_not_come_back_together(bench: Bench) -> None:
    pipeline = bench.pipeline()

    waits = [pipeline._back_off_s(4, None) for _ in range(200)]

    assert all(0.8 * 8 <= wait <= 1.2 * 8 for wait in waits)
    assert max(waits) - min(waits) > 1.0


def test_what_is_uploaded_is_never_given_up(bench: Bench, proxy: FaultProxy) -> None:
    """`dead` would say that its upload failed."""
    walked(bench.pipeline(cleaner=bench.cleaner(min_age_s=7200.0)), offered(bench))
    bench.clock.advance(7200)
    proxy.on("HEAD", ORIGINAL, BUSY)
    pipeline = bench.pipeline(give_up_after=1)

    outcomes = []
    for _ in range(3):
        outcomes.append(walked(pipeline, bench.claimed()))
        bench.clock.advance(10)

    assert ([Outcome.DEFERRED] * 3, "uploaded", 2) == (outcomes, bench.state(), len(bench.files()))


def test_rule_11_a_store_that_is_away_while_clearing_holds_the_spool(bench: Bench, proxy: FaultProxy) -> None:
    walked(bench.pipeline(cleaner=bench.cleaner(min_age_s=7200.0)), offered(bench))
    bench.clock.advance(7200)
    proxy.go_away()
    holds = bench.holds(store=failing(StoreUnavailable("put: Connection refused")))

    outcome = walked(bench.pipeline(holds=holds), bench.claimed())

    assert (Outcome.HELD, "uploaded", 2) == (outcome, bench.state(), len(bench.files()))
    assert [{"attempts": 0}] == bench.rows("SELECT attempts FROM batch")


def test_what_was_refused_counts_though_the_daemon_drains(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", ORIGINAL, Reply(400, error_body("InvalidStorageClass")))
    claim = offered(bench)
    bench.interruptions = [bench.stop.set]

    outcome = walked(bench.pipeline(), claim)

    assert (Outcome.DEAD, "dead") == (outcome, bench.state())


def test_a_style_is_not_sent_before_its_original_is_there(bench: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", ORIGINAL, BUSY)

    outcome = walked(bench.pipeline(), offered(bench))

    assert (Outcome.DEFERRED, "StoreUnavailable") == (outcome, bench.status()["error_code"])
    assert [] == proxy.requests("PUT", THUMB)


def test_a_file_that_changes_before_it_is_sent_in_parts_is_looked_at_again(
    bench: Bench, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    """It is read a second time then, and compared with what was hashed."""

    def rewrite(request: Request) -> None:
        if request.method == "POST" and request.path.endswith("?uploads"):
            bench.write(ORIGINAL, b"another cat")

    proxy.rules.append(rewrite)
    claim = offered(bench, {"original/cat.jpg": b"a cat" * 1000})

    outcome = walked(bench.pipeline(uploader=bench.uploader(multipart_threshold=1000)), claim)

    assert (Outcome.STALE, [RECORD], "receiving") == (outcome, bench.touched, bench.state())
    assert (b"another cat", {}) == (bench.read(ORIGINAL), rclone_server.objects(BUCKET))


# Beside a newer version


def newer_version(bench: Bench) -> None:
    """The app replaces the upload, and the watcher is quick."""
    bench.write(ORIGINAL, b"a newer cat")
    assert bench.offer() is not None


def test_a_newer_version_that_comes_before_the_older_is_let_go_stays(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    newer_version(bench)

    outcome = walked(bench.pipeline(), claim)

    assert (Outcome.STALE, "queued", b"a newer cat") == (outcome, bench.state(), bench.read(ORIGINAL))


def test_a_directory_that_comes_back_as_it_was_after_its_batch_was_done_is_let_go(bench: Bench, proxy: FaultProxy) -> None:
    """It was away when its files were to be let go: renamed, hidden by a mount, swapped. They come back the very same."""
    pipeline = bench.pipeline()
    bench.ledger.put_back(offered(bench))
    place, elsewhere = bench.spool.root / RECORD, bench.spool.root.parent / "elsewhere"
    bench.interruptions = [lambda: None, lambda: None, lambda: place.rename(elsewhere)]
    walk_on(bench, pipeline)
    while_away = bench.state()
    elsewhere.rename(place)
    puts = len(proxy.requests("PUT"))

    looker = bench.looker()
    alone(looker.look(RECORD))
    bench.clock.advance(5)
    alone(looker.look(RECORD))
    walk_on(bench, pipeline)

    assert ("done", "done") == (while_away, bench.state())
    assert ([], []) == (bench.files(), bench.aside())
    assert puts == len(proxy.requests("PUT")), "what is proven is not put again"
    assert 1 == bench.status()["version"]


def test_an_older_version_that_lies_aside_is_let_go_beside_the_newer_one(bench: Bench, rclone_server: RcloneServer) -> None:
    """The older batch is superseded, and still walked until nothing of it lies aside."""
    pipeline = bench.pipeline(cleaner=bench.cleaner(grace_s=10.0))
    walked(pipeline, offered(bench))
    newer_version(bench)

    walk_on(bench, pipeline)

    assert b"a newer cat" == rclone_server.objects(BUCKET)[ORIGINAL]
    assert ([], [], [], "done") == (bench.aside(), bench.kept(), bench.files(), bench.state())


def test_what_the_bucket_lost_is_no_matter_once_a_newer_batch_is_here(
    bench: Bench, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    pipeline = bench.pipeline(cleaner=bench.cleaner(min_age_s=5.0))
    walked(pipeline, offered(bench))
    bench.clock.advance(7200)
    rclone_server.client().delete_object(Bucket=BUCKET, Key=THUMB)
    claim = bench.claimed()
    newer_version(bench)

    outcome = walked(pipeline, claim)

    assert (Outcome.STALE, []) == (outcome, bench.ledger.owners())
    assert ["superseded", "pending"] == [row["state"] for row in bench.rows("SELECT state FROM batch ORDER BY id")]


# After a power cut


def holed(bench: Bench, *, decided_by: str = "quiet") -> Claim:
    """Offer a file whose size is on the disk and whose bytes are not, and boot."""
    path = bench.root / ORIGINAL
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(100_001)
    bench.offer(decided_by=decided_by)
    bench.clock.boot()
    return bench.claimed()


def test_what_waited_and_lost_its_bytes_in_a_power_cut_is_judged_anew(bench: Bench, proxy: FaultProxy) -> None:
    outcome = walked(bench.pipeline(), holed(bench))

    assert (Outcome.STALE, [RECORD]) == (outcome, bench.touched)
    assert [] == proxy.requests("PUT")


def test_what_waited_over_a_boot_and_is_whole_goes_up(bench: Bench, rclone_server: RcloneServer) -> None:
    claim = offered(bench)
    bench.clock.boot()

    walked(bench.pipeline(), claim)

    assert {ORIGINAL: b"a cat", THUMB: b"cat"} == rclone_server.objects(BUCKET)


def test_what_a_person_wants_as_it_lies_goes_up_with_its_holes(bench: Bench, rclone_server: RcloneServer) -> None:
    walked(bench.pipeline(), holed(bench, decided_by="as-is"))

    assert {ORIGINAL: b"\0" * 100_001} == rclone_server.objects(BUCKET)
