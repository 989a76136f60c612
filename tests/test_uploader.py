"""Every file of a batch in the bucket, proven, or a true word about why not."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from spoold.digest import Digester
from spoold.errors import (
    BadPath,
    Changed,
    ClaimLost,
    Draining,
    ObjectRefused,
    SpoolBroken,
    SpooldError,
    StoreDenied,
    StoreUnavailable,
    Unproven,
    Vanished,
)
from spoold.model import Answer, Batch, Headers, Put, PutResult
from spoold.store import Store
from spoold.uploader import Bandwidth, Budget
from tests.paperclip import picture
from tests.parts import BUCKET, RECORD, Bench, ManualClock, RealClock, alone, in_a_world, until, without
from tests.proxy import HTML, Delay, Fault, FaultProxy, LoseAnswer, Reset, error_body
from tests.proxy import Answer as Reply
from tests.servers import RcloneServer

CAT = {"thumb/cat.jpg": b"cat", "original/cat.jpg": b"a cat", "medium/cat.jpg": b"some cat"}
ORIGINAL = f"{RECORD}/original/cat.jpg"
THUMB = f"{RECORD}/thumb/cat.jpg"
MIB = 1 << 20


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def batch_of(bench: Bench, files: dict[str, bytes]) -> Batch:
    for path, content in files.items():
        bench.write(f"{RECORD}/{path}", content)
    bench.offer()
    return bench.claimed().batch


def prepared(bench: Bench, files: dict[str, bytes], **destination: object) -> list[Put]:
    return bench.uploader(**destination).prepare(batch_of(bench, files), fingerprint=None)  # type: ignore[arg-type]


def no_upload(put: Put, upload_id: str) -> None:
    raise AssertionError("no multipart upload was expected")


def answers(results: list[PutResult]) -> dict[str, Answer]:
    return {result.put.key: result.answer for result in results}


# Before the intent


def test_originals_come_first_and_each_put_says_where_with_what_and_which_bytes(bench: Bench) -> None:
    jpeg = picture(24, 18)

    puts = prepared(bench, CAT | {"original/cat.jpg": jpeg})

    assert ["original", "medium", "thumb"] == [put.file.file.style for put in puts]
    assert (BUCKET, ORIGINAL, jpeg, Headers("image/jpeg")) == (puts[0].bucket, puts[0].key, puts[0].body, puts[0].headers)
    assert (len(jpeg), hashlib.sha256(jpeg).hexdigest(), hashlib.md5(jpeg).hexdigest(), "crc32") == (
        puts[0].digests.size, puts[0].digests.sha256, puts[0].digests.md5, puts[0].digests.checksum_algorithm,
    )  # fmt: skip


def test_the_bytes_decide_on_the_content_type_and_then_the_name(bench: Bench) -> None:
    puts = prepared(bench, {"original/cat.jpg": picture(24, 18, format="PNG"), "thumb/cat.css": b"a { b: c }"})

    assert ["image/png", "text/css"] == [put.headers.content_type for put in puts]


def test_what_is_stored_with_an_object_depends_on_attachment_and_style(bench: Bench) -> None:
    asked = []

    def headers_for(attachment: str, style: str, sniffed: str) -> Headers:
        asked.append((attachment, style))
        return Headers(sniffed, acl="public-read" if style == "thumb" else None)

    puts = prepared(bench, CAT, headers_for=headers_for)

    assert [("avatars", "original"), ("avatars", "medium"), ("avatars", "thumb")] == asked
    assert [None, None, "public-read"] == [put.headers.acl for put in puts]


def test_rule_5_a_file_that_was_written_after_it_settled_is_not_hashed(bench: Bench) -> None:
    batch = batch_of(bench, CAT)
    bench.write(THUMB, b"another thumb")

    with pytest.raises(Changed):
        bench.uploader().prepare(batch, fingerprint=None)


def test_a_file_that_was_removed_after_it_settled_is_vanished(bench: Bench) -> None:
    batch = batch_of(bench, CAT)
    (bench.root / THUMB).unlink()

    with pytest.raises(Vanished):
        bench.uploader().prepare(batch, fingerprint=None)


def test_files_that_are_gone_are_not_put_again(bench: Bench) -> None:
    """Of a batch that is walked once more because the bucket lost an object."""
    claim = bench.batch_stored(CAT)
    (bench.root / THUMB).unlink()
    bench.ledger.let_go(claim, [file for file in claim.batch.files if file.file.path == THUMB], deleted=True)
    bench.ledger.reopen(claim, [ORIGINAL], StoreUnavailable("head: it is gone"))

    puts = bench.uploader().prepare(bench.claimed().batch, fingerprint=None)

    assert [ORIGINAL, f"{RECORD}/medium/cat.jpg"] == [put.key for put in puts]


def test_a_disk_that_cannot_sync_is_a_fault_of_the_disk(bench: Bench) -> None:
    """After a power cut an unsynced file comes back empty, and would overwrite the good object (FACTS 16)."""
    batch = batch_of(bench, CAT)

    def work() -> None:
        with pytest.raises((OSError, SpoolBroken)) as caught:
            bench.uploader().prepare(batch, fingerprint=None)
        assert not isinstance(caught.value, OSError) or errno.EIO == caught.value.errno

    in_a_world(work, without("fsync", errno.EIO))


def test_a_file_that_can_have_no_key_is_refused(tmp_path: Path) -> None:
    with Bench(tmp_path, key="y" * 1010 + "/:attachment/:id/:style/:basename.:extension") as bench:
        batch = batch_of(bench, CAT)

        with pytest.raises(BadPath, match="over 1024"):
            bench.uploader().prepare(batch, fingerprint=None)


def test_a_fingerprint_in_the_key_is_the_md5_of_the_original(tmp_path: Path) -> None:
    with Bench(tmp_path, key=":attachment/:id/:style/:fingerprint-:basename.:extension") as bench:
        puts = prepared(bench, CAT)

    md5 = hashlib.md5(b"a cat").hexdigest()
    assert {f"{RECORD}/{style}/{md5}-cat.jpg" for style in ("original", "medium", "thumb")} == {put.key for put in puts}


def test_a_style_made_again_later_has_the_fingerprint_of_the_live_original(tmp_path: Path) -> None:
    with Bench(tmp_path, key=":attachment/:id/:style/:fingerprint-:basename.:extension") as bench:
        batch = batch_of(bench, {"thumb/cat.jpg": b"cat"})

        [put] = bench.uploader().prepare(batch, fingerprint="0" * 32)

        assert f"{RECORD}/thumb/{'0' * 32}-cat.jpg" == put.key
        with pytest.raises(BadPath):
            bench.uploader().prepare(batch, fingerprint=None)


def test_only_small_files_are_kept_in_memory(bench: Bench) -> None:
    puts = prepared(bench, {"original/cat.jpg": b"x" * MIB, "thumb/cat.jpg": b"x" * (MIB + 1)})

    assert [True, False] == [put.body is not None for put in puts]


def test_only_so_many_small_files_are_kept_in_memory(bench: Bench) -> None:
    puts = prepared(bench, {f"style{number}/cat.jpg": b"x" * MIB for number in range(12)})

    assert 8 == sum(put.body is not None for put in puts)


def test_the_marker_is_hashed_and_not_put(tmp_path: Path) -> None:
    with Bench(tmp_path, marker=".done") as bench:
        batch = batch_of(bench, {"original/cat.jpg": b"a cat", ".done": b"yes"})
        marker = next(file for file in batch.files if file.is_marker)

        assert hashlib.sha256(b"yes").hexdigest() == bench.uploader().hash(marker).sha256
        assert [ORIGINAL] == [put.key for put in bench.uploader().prepare(batch, fingerprint=None)]


# After the intent


def test_what_is_put_is_in_the_bucket_and_confirmed(real: Bench, rclone_server: RcloneServer) -> None:
    results = alone(real.uploader().put(prepared(real, CAT), on_upload=no_upload))

    assert {f"{RECORD}/{path}": content for path, content in CAT.items()} == rclone_server.objects(BUCKET)
    assert {Answer.CONFIRMED} == set(answers(results).values())
    assert [None] * 3 == [result.doubt_at for result in results]
    assert all(result.stored and result.stored.etag == result.put.digests.md5 for result in results)


def test_what_is_adopted_is_not_sent(real: Bench, proxy: FaultProxy) -> None:
    claim = real.batch_stored(CAT)
    real.ledger.done(claim, None)
    os.utime(real.root / ORIGINAL, (0, 0))
    real.offer()
    puts = real.intended(real.claimed())

    results = alone(real.uploader().put(puts, on_upload=no_upload))

    assert {put.key: put.adopted for put in puts} == {result.put.key: result.stored for result in results}
    assert all(result.answer is Answer.CONFIRMED and result.stored for result in results)
    assert [] == proxy.requests()


def in_background(work: Callable[[], list[PutResult]]) -> Future[list[PutResult]]:
    future: Future[list[PutResult]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def test_no_style_is_sent_before_the_original_is_confirmed(real: Bench, proxy: FaultProxy) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/original/", Delay(gate))
    puts = prepared(real, CAT)
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))
    proxy.await_seen("PUT", "/original/")

    while_waiting = proxy.requests("PUT", "/thumb/")
    gate.set()
    results = uploading.result(20)

    assert [] == while_waiting
    assert {Answer.CONFIRMED} == set(answers(results).values())
    confirmed_at = proxy.await_ended("PUT", "/original/").ended_at
    assert confirmed_at is not None
    assert all(seen.at > confirmed_at for seen in proxy.requests("PUT", "/thumb/") + proxy.requests("PUT", "/medium/"))


def test_styles_are_sent_together_once_the_original_is_confirmed(real: Bench, proxy: FaultProxy) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/thumb/", Delay(gate))
    proxy.on("PUT", "/medium/", Delay(gate))
    puts = prepared(real, CAT)
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))

    proxy.await_seen("PUT", "/thumb/")
    proxy.await_seen("PUT", "/medium/")
    gate.set()

    assert {Answer.CONFIRMED} == set(answers(uploading.result(20)).values())


def test_no_style_is_sent_if_the_original_is_refused(real: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/original/", Reply(403, error_body("AccessDenied")))

    results = alone(real.uploader().put(prepared(real, CAT), on_upload=no_upload))

    assert [StoreDenied, Draining, Draining] == [type(result.error) for result in results]
    assert {Answer.REFUSED} == set(answers(results).values())
    assert 1 == len(proxy.requests("PUT"))


def test_a_batch_without_original_sends_its_styles(real: Bench, rclone_server: RcloneServer) -> None:
    alone(real.uploader().put(prepared(real, {"thumb/cat.jpg": b"cat"}), on_upload=no_upload))

    assert {THUMB: b"cat"} == rclone_server.objects(BUCKET)


# Tries within one attempt


@pytest.fixture
def quick(tmp_path: Path, proxy: FaultProxy, rclone_server: RcloneServer) -> Iterator[Bench]:
    """A bench whose store knows the quick way, since it has put something before."""
    with Bench(tmp_path, endpoint_url=proxy.endpoint_url) as bench:
        bench.store.close()
        bench.store = Store(
            endpoint_url=proxy.endpoint_url, region="us-east-1", addressing_style="path", read_timeout_s=5, quick_connections=8
        )
        digester = Digester("crc32")
        bench.store.put(BUCKET, "first", b"", Headers("text/plain"), digester.digests())
        yield bench


def test_the_quick_way_sends_each_once_and_originals_first(
    quick: Bench, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick.store, "put", None)  # nothing goes the slow way

    results = alone(quick.uploader().put(prepared(quick, CAT), on_upload=no_upload))

    keys = [seen.key for seen in proxy.requests("PUT", RECORD)]
    assert {Answer.CONFIRMED} == set(answers(results).values())
    assert [None] * 3 == [result.doubt_at for result in results]
    assert sorted(f"{RECORD}/{path}" for path in CAT) == sorted(key.removeprefix(f"{BUCKET}/") for key in keys)
    assert "/original/" in keys[0]


def test_what_the_quick_way_does_not_settle_is_tried_the_slow_way(
    quick: Bench, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    proxy.on("PUT", "/original/", LoseAnswer(), times=1)
    proxy.on("PUT", "/thumb/", Reply(403, error_body("ExpiredToken")), times=1)

    results = alone(quick.uploader().put(prepared(quick, CAT), on_upload=no_upload))

    doubts = {result.put.file.file.style: result.doubt_at for result in results}
    assert {Answer.CONFIRMED} == set(answers(results).values())
    assert CAT == {key.removeprefix(f"{RECORD}/"): body for key, body in rclone_server.objects(BUCKET).items() if body}
    assert doubts["original"] is not None, "the first try may still land"
    assert doubts["thumb"] is None, "it was refused"


def test_the_quick_way_asks_whether_the_claim_lasts(quick: Bench, proxy: FaultProxy) -> None:
    puts = prepared(quick, CAT)
    quick.has_claims = False

    results = alone(quick.uploader().put(puts, on_upload=no_upload))

    assert {Answer.REFUSED} == set(answers(results).values())
    assert [] == proxy.requests("PUT", RECORD)


@pytest.mark.parametrize(
    "fault", [Reply(503, error_body("SlowDown")), Reply(500, error_body("InternalError")), Reset(), LoseAnswer(), HTML]
)
def test_a_hitch_is_outlasted_within_the_attempt(
    real: Bench, proxy: FaultProxy, rclone_server: RcloneServer, fault: Fault
) -> None:
    proxy.on("PUT", "/original/", fault, times=2)

    results = alone(real.uploader().put(prepared(real, CAT), on_upload=no_upload))

    assert {Answer.CONFIRMED} == set(answers(results).values())
    assert 3 == len(rclone_server.objects(BUCKET))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Reply(403, error_body("AccessDenied")), StoreDenied),
        (Reply(404, error_body("NoSuchBucket")), StoreDenied),
        (Reply(400, error_body("InvalidTag")), ObjectRefused),
        (Reply(400, error_body("KeyTooLongError")), ObjectRefused),
    ],
)
def test_what_is_answered_for_good_is_not_tried_again(
    real: Bench, proxy: FaultProxy, fault: Fault, error: type[SpooldError]
) -> None:
    proxy.on("PUT", "", fault)

    [result] = alone(real.uploader().put(prepared(real, {"thumb/cat.jpg": b"cat"}), on_upload=no_upload))

    assert (Answer.REFUSED, error, None) == (result.answer, type(result.error), result.doubt_at)
    assert 1 == len(proxy.requests("PUT"))


def test_rule_6_a_put_that_was_never_answered_is_in_doubt_since_the_last_try(real: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "", LoseAnswer())
    puts = prepared(real, {"thumb/cat.jpg": b"cat"})
    before = real.clock.now()
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))
    proxy.await_ended("PUT", "", count=2)
    second = real.clock.now()
    real.stop.set()

    [result] = uploading.result(20)

    assert Answer.DOUBT is result.answer
    assert isinstance(result.error, StoreUnavailable | Draining)
    assert result.doubt_at is not None
    assert before + 0.1 < result.doubt_at <= real.clock.now()
    assert result.doubt_at >= second - 1


def test_rule_6_a_put_that_was_never_sent_is_no_doubt(bench: Bench) -> None:
    """Nobody listens there: the connection was refused."""
    puts = prepared(bench, {"thumb/cat.jpg": b"cat"})
    uploading = in_background(lambda: alone(bench.uploader().put(puts, on_upload=no_upload)))
    threading.Timer(0.1, bench.stop.set).start()

    [result] = uploading.result(20)

    assert (Answer.REFUSED, None) == (result.answer, result.doubt_at)
    assert isinstance(result.error, StoreUnavailable | Draining)


def test_rule_6_a_confirmed_put_remembers_that_an_earlier_try_was_not_answered(real: Bench, proxy: FaultProxy) -> None:
    """That one may land once more, later."""
    proxy.on("PUT", "/thumb/", LoseAnswer(), times=1)

    [result] = alone(real.uploader().put(prepared(real, {"thumb/cat.jpg": b"cat"}), on_upload=no_upload))

    assert Answer.CONFIRMED is result.answer
    assert result.doubt_at is not None


def test_rule_6_a_refused_put_remembers_that_an_earlier_try_was_not_answered(real: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/thumb/", LoseAnswer(), times=1)
    proxy.on("PUT", "/thumb/", Reply(403, error_body("AccessDenied")))

    [result] = alone(real.uploader().put(prepared(real, {"thumb/cat.jpg": b"cat"}), on_upload=no_upload))

    assert (Answer.REFUSED, StoreDenied) == (result.answer, type(result.error))
    assert result.doubt_at is not None


def test_a_200_that_proves_nothing_is_no_success(real: Bench, proxy: FaultProxy) -> None:
    """A captive portal (FACTS 23)."""
    proxy.on("PUT", "", HTML)
    puts = prepared(real, {"thumb/cat.jpg": b"cat"})
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))
    proxy.await_ended("PUT", "")
    real.stop.set()

    [result] = uploading.result(20)

    assert Answer.DOUBT is result.answer
    assert isinstance(result.error, Unproven | Draining)


def test_one_fault_does_not_keep_the_others_answers_from_being_known(real: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "/thumb/", Reply(403, error_body("AccessDenied")))

    results = alone(real.uploader().put(prepared(real, CAT), on_upload=no_upload))

    assert {ORIGINAL: Answer.CONFIRMED, f"{RECORD}/medium/cat.jpg": Answer.CONFIRMED, THUMB: Answer.REFUSED} == answers(results)


def test_a_disk_fault_in_one_put_does_not_keep_the_others_answers_from_being_known(real: Bench) -> None:
    puts = prepared(real, CAT | {"thumb/cat.jpg": b"x" * 2000}, multipart_threshold=1000)

    def fail(put: Put, upload_id: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    results = alone(real.uploader(multipart_threshold=1000).put(puts, on_upload=fail))

    assert {ORIGINAL: Answer.CONFIRMED, f"{RECORD}/medium/cat.jpg": Answer.CONFIRMED, THUMB: Answer.REFUSED} == answers(results)
    assert SpoolBroken is type(results[-1].error)


# Draining, and claims


def test_a_daemon_that_drains_sends_nothing_new(real: Bench, proxy: FaultProxy) -> None:
    real.stop.set()

    results = alone(real.uploader().put(prepared(real, CAT), on_upload=no_upload))

    assert {Answer.REFUSED} == set(answers(results).values())
    assert {Draining} == {type(result.error) for result in results}
    assert [] == proxy.requests()


def test_a_daemon_that_drains_ends_what_is_in_flight(real: Bench, proxy: FaultProxy, rclone_server: RcloneServer) -> None:
    gate = threading.Event()
    proxy.on("PUT", "/original/", Delay(gate))
    puts = prepared(real, CAT)
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))
    proxy.await_seen("PUT", "/original/")
    real.stop.set()
    gate.set()

    results = uploading.result(20)

    assert Answer.CONFIRMED is answers(results)[ORIGINAL]
    assert Answer.REFUSED is answers(results)[THUMB]
    assert {ORIGINAL: b"a cat"} == rclone_server.objects(BUCKET)


def test_a_daemon_that_drains_does_not_wait_for_the_next_try(real: Bench, proxy: FaultProxy) -> None:
    proxy.on("PUT", "", Reply(503, error_body("SlowDown"), {"Retry-After": "60"}))
    real.clock = RealClock()
    puts = prepared(real, {"thumb/cat.jpg": b"cat"})
    uploading = in_background(lambda: alone(real.uploader().put(puts, on_upload=no_upload)))
    proxy.await_ended("PUT", "")
    began = time.monotonic()
    real.stop.set()

    uploading.result(20)

    assert time.monotonic() - began < 2
    assert 1 == len(proxy.requests("PUT"))


def test_who_was_frozen_past_the_claim_sends_nothing(real: Bench, proxy: FaultProxy) -> None:
    """It would land on a newer version (rule 6)."""
    puts = prepared(real, CAT)
    real.has_claims = False

    results = alone(real.uploader().put(puts, on_upload=no_upload))

    assert ClaimLost is type(results[0].error)
    assert [] == proxy.requests()


def test_who_was_frozen_past_the_claim_completes_no_multipart_upload(real: Bench, rclone_server: RcloneServer) -> None:
    puts = prepared(real, {"original/cat.jpg": b"x" * 2000}, multipart_threshold=1000)

    def freeze() -> None:
        real.has_claims = False

    real.interruptions = [lambda: None, freeze]
    [result] = alone(real.uploader(multipart_threshold=1000).put(puts, on_upload=lambda put, upload_id: None))

    assert (Answer.REFUSED, ClaimLost) == (result.answer, type(result.error))
    assert {} == rclone_server.objects(BUCKET)


# Large files


LARGE = os.urandom(9 * MIB)  # two parts


def uploads(server: RcloneServer) -> list[str]:
    return [each["UploadId"] for each in server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]


def test_a_large_file_goes_up_in_parts_after_its_id_was_told(
    real: Bench, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    told: list[tuple[str, int]] = []
    puts = prepared(real, {"original/cat.jpg": LARGE})

    [result] = alone(
        real.uploader(multipart_threshold=MIB).put(
            puts, on_upload=lambda put, upload_id: told.append((put.key, len(proxy.requests("PUT"))))
        )
    )

    assert [(ORIGINAL, 0)] == told
    assert Answer.CONFIRMED is result.answer
    assert 2 == len(proxy.requests("PUT"))
    assert {ORIGINAL: LARGE} == rclone_server.objects(BUCKET)


def test_a_file_below_the_threshold_goes_up_in_one(real: Bench, proxy: FaultProxy) -> None:
    puts = prepared(real, {"original/cat.jpg": b"x" * (2 * MIB)})

    alone(real.uploader(multipart_threshold=2 * MIB + 1).put(puts, on_upload=no_upload))

    assert 1 == len(proxy.requests("PUT"))


@pytest.mark.parametrize("threshold", [MIB, 100 * MIB], ids=["in parts", "in one"])
def test_rule_5_a_large_file_that_was_written_after_it_was_hashed_is_not_sent(
    real: Bench, rclone_server: RcloneServer, threshold: int
) -> None:
    """It is read again, as it was too large to keep; stat is put back to what it was, and its hash tells."""
    puts = prepared(real, {"original/cat.jpg": LARGE})
    path = real.root / ORIGINAL
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(8 * MIB + 10)
        file.write(b"y")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    [result] = alone(real.uploader(multipart_threshold=threshold).put(puts, on_upload=lambda put, upload_id: None))

    assert (Answer.REFUSED, Changed, None) == (result.answer, type(result.error), result.doubt_at)
    assert {} == rclone_server.objects(BUCKET)


def test_rule_5_a_large_file_that_is_written_while_it_is_sent_does_not_become_an_object(
    real: Bench, rclone_server: RcloneServer
) -> None:
    puts = prepared(real, {"original/cat.jpg": LARGE})

    def overwrite(put: Put, upload_id: str) -> None:
        with open(real.root / ORIGINAL, "r+b") as file:
            file.seek(8 * MIB + 10)
            file.write(b"y")

    [result] = alone(real.uploader(multipart_threshold=MIB).put(puts, on_upload=overwrite))

    assert (Answer.REFUSED, Changed) == (result.answer, type(result.error))
    assert ({}, []) == (rclone_server.objects(BUCKET), uploads(rclone_server))


def test_uploads_that_walks_before_this_one_left_open_are_aborted(real: Bench, rclone_server: RcloneServer) -> None:
    left = rclone_server.client().create_multipart_upload(Bucket=BUCKET, Key=ORIGINAL)["UploadId"]
    [put] = prepared(real, {"original/cat.jpg": b"a cat"})
    alone(real.uploader().put([dataclasses.replace(put, abandoned=(left, "unknown"))], on_upload=no_upload))

    assert [] == uploads(rclone_server)


# Budget and bandwidth


def test_the_budget_bounds_what_is_held_at_one_time() -> None:
    budget = Budget(100)
    inside: list[int] = []
    peak: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        for _ in range(30):
            with budget.hold(40):
                with lock:
                    inside.append(40)
                    peak.append(sum(inside))
                with lock:
                    inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert 180 == len(peak)
    assert max(peak) <= 80


def test_one_file_may_always_go_however_large_it_is() -> None:
    budget = Budget(100)

    with budget.hold(1000):
        second = threading.Thread(target=lambda: budget.hold(10).__enter__())
        second.start()
        second.join(0.05)
        waits = second.is_alive()

    until(lambda: not second.is_alive(), "the second one got its turn")
    assert waits


def test_the_budget_is_given_back_whatever_happens() -> None:
    budget = Budget(100)
    with pytest.raises(ValueError, match="on purpose"), budget.hold(100):
        raise ValueError("on purpose")

    with budget.hold(100):
        pass


def test_bandwidth_holds_over_any_second() -> None:
    clock = ManualClock()
    bandwidth = Bandwidth(100_000, clock=clock)
    sent: list[tuple[float, int]] = []

    for size_bytes in (50_000, 200_000, 1, 70_000):
        while size_bytes > 0:
            granted = bandwidth.pace(size_bytes)
            sent.append((clock.monotonic(), granted))
            size_bytes -= granted
        clock.advance(0.3)

    most = max(sum(size for at, size in sent if begin <= at < begin + 1.0) for begin, _ in sent)
    assert 320_001 == sum(size for _, size in sent)
    assert most <= 102_000, "the rate, and one piece that had begun before"


def test_bandwidth_that_was_not_used_is_not_saved_up() -> None:
    clock = ManualClock()
    bandwidth = Bandwidth(1000, clock=clock)
    clock.advance(3600)
    began = clock.monotonic()

    for _ in range(101):
        bandwidth.pace(20)

    assert pytest.approx(2.0) == clock.monotonic() - began


def test_without_a_limit_nobody_waits() -> None:
    clock = ManualClock()
    before = clock.monotonic()

    assert 10**12 == Bandwidth(None, clock=clock).pace(10**12)
    Bandwidth(None, clock=clock).wait_for_turn(threading.Event())

    assert before == clock.monotonic()


def test_a_daemon_that_drains_waits_for_no_bandwidth() -> None:
    bandwidth = Bandwidth(1, clock=ManualClock())
    stop = threading.Event()
    stop.set()

    with pytest.raises(Draining):
        bandwidth.wait_for_turn(stop)
