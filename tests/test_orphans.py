"""Multipart uploads that nobody goes on with are aborted: ours, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spoold import uploader
from spoold.model import Outcome
from spoold.orphans import Orphans
from tests.parts import BUCKET, LEASE_S, NAME, RECORD, Bench, walked
from tests.proxy import Answer, FaultProxy, LoseAnswer, error_body

FILE = f"{RECORD}/original/clip.bin"
DENIED = Answer(403, error_body("AccessDenied"))

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def bench(real: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(uploader, "_PART_BYTES", 5 << 20)
    yield real


@pytest.fixture
def orphans(bench: Bench) -> Orphans:
    return Orphans(ledger=bench.ledger, stores={NAME: bench.store}, owner="me")


def abort_all(orphans: Orphans, *, held: set[str] = frozenset()) -> int:  # type: ignore[assignment]
    return orphans.abort_all(lease_s=LEASE_S, held=held)


def uploads(bench: Bench) -> list[Any]:
    """Return the ids of the uploads that are open in the bucket."""
    listed = bench.store.connect().list_multipart_uploads(Bucket=BUCKET)
    return [upload["UploadId"] for upload in listed.get("Uploads", [])]


def left_open(bench: Bench, proxy: FaultProxy) -> None:
    """Have an upload begun, and neither completed nor aborted: the second part fails, and then the server is away."""
    bench.write(FILE, bytes(11 << 20))
    bench.offer(RECORD)
    broken = [proxy.on("PUT", "", DENIED, skip=1), proxy.on("DELETE", "", DENIED)]
    pipeline = bench.pipeline(uploader=bench.uploader(multipart_threshold=5 << 20))
    assert walked(pipeline, bench.claimed()) in (Outcome.HELD, Outcome.DEFERRED, Outcome.DEAD)
    for rule in broken:
        proxy.rules.remove(rule)
    assert 1 == len(uploads(bench))


def test_an_upload_that_was_given_up_with_its_version_is_aborted(bench: Bench, proxy: FaultProxy, orphans: Orphans) -> None:
    left_open(bench, proxy)
    (bench.root / FILE).unlink()

    assert 1 == abort_all(orphans)
    assert [] == uploads(bench)
    assert 0 == abort_all(orphans), "it is told once"
    assert "upload.aborted" in bench.events()


def test_an_upload_of_somebody_else_is_left_alone(bench: Bench, proxy: FaultProxy, orphans: Orphans) -> None:
    left_open(bench, proxy)
    theirs = bench.store.connect().create_multipart_upload(Bucket=BUCKET, Key=FILE)["UploadId"]

    abort_all(orphans)

    assert [theirs] == uploads(bench)


def test_what_somebody_works_on_is_left_to_them(bench: Bench, proxy: FaultProxy, orphans: Orphans) -> None:
    left_open(bench, proxy)
    bench.clock.advance(3600.0)
    claim = bench.claimed("somebody else")

    assert 0 == abort_all(orphans)
    assert 1 == len(uploads(bench))

    bench.ledger.put_back(claim)
    assert 1 == abort_all(orphans)


def test_what_refuses_is_tried_again_and_what_is_held_waits(bench: Bench, proxy: FaultProxy, orphans: Orphans) -> None:
    left_open(bench, proxy)

    assert 0 == abort_all(orphans, held={NAME})
    proxy.on("DELETE", "", DENIED, times=1)
    assert 0 == abort_all(orphans)
    assert 1 == abort_all(orphans)
    assert [] == uploads(bench)


def test_one_that_was_completed_without_an_answer_keeps_its_object(bench: Bench, proxy: FaultProxy, orphans: Orphans) -> None:
    bench.write(FILE, bytes(6 << 20))
    bench.offer(RECORD)
    proxy.on("POST", "", LoseAnswer(), skip=1, times=1)
    walked(bench.pipeline(uploader=bench.uploader(multipart_threshold=5 << 20)), bench.claimed())

    abort_all(orphans)

    assert 6 << 20 == bench.store.head(BUCKET, FILE).size  # type: ignore[union-attr]
