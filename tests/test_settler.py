"""What the ledger tells of a key that a version which was given up has overwritten."""

from __future__ import annotations

import threading

import pytest

from spoold.pipeline import Pipeline
from spoold.settler import Settler
from tests.parts import BUCKET, LEASE_S, NAME, RECORD, Bench, alone, walked
from tests.proxy import Answer, FaultProxy, Hold, error_body
from tests.servers import RcloneServer

DOUBT_S = 900.0
ORIGINAL, THUMB = f"{RECORD}/original/cat.jpg", f"{RECORD}/thumb/cat.jpg"
FIRST = {ORIGINAL: b"a cat", THUMB: b"cat"}
SECOND = {ORIGINAL: b"another cat", THUMB: b"other"}
BROKEN = Answer(500, error_body("InternalError"))


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def bench(real: Bench) -> Bench:
    return real


@pytest.fixture
def settler(bench: Bench) -> Settler:
    return Settler(ledger=bench.ledger, stores={NAME: bench.store}, owner="me", doubt_s=DOUBT_S, clock=bench.clock)


def settle(settler: Settler) -> int:
    return settler.settle_due(lease_s=LEASE_S, held=set())


def offered(bench: Bench, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        bench.write(path, content)
    bench.offer(RECORD)


def rested(bench: Bench, pipeline: Pipeline) -> None:
    """Walk whatever is due, letting time pass, until nothing is."""
    for _ in range(20):
        if (claim := bench.claim()) is not None:
            walked(pipeline, claim)
            continue
        due = bench.rows("SELECT min(due_at) AS at FROM batch")[0]["at"]
        if due is None:
            return
        bench.clock.advance(max(0.0, due - bench.clock.now()) + 0.1)
    raise AssertionError("it never ends")


def half_uploaded(bench: Bench, proxy: FaultProxy, style: str) -> Pipeline:
    """Have a first version uploaded and let go, and then a second, but for this style, which the server refuses."""
    pipeline = bench.pipeline()
    offered(bench, FIRST)
    rested(bench, pipeline)
    proxy.on("PUT", f"/{style}/", BROKEN)
    offered(bench, SECOND)
    walked(pipeline, bench.claimed())
    return pipeline


def taken_back(bench: Bench, pipeline: Pipeline) -> None:
    """The app removes what it wrote last, and the daemon finds out."""
    for path in SECOND:
        (bench.spool.root / path).unlink()
    rested(bench, pipeline)
    alone(bench.looker().look(RECORD))


def told(bench: Bench) -> dict[str, tuple[int, str]]:
    """Return size and ETag of each live object, as an app reads it."""
    return {row["key"]: (row["size"], row["etag"]) for row in bench.rows("SELECT key, size, etag FROM record_object")}


def true(bench: Bench, server: RcloneServer) -> dict[str, tuple[int, str]]:
    """Return the same of the bucket."""
    found = {key: bench.store.head(BUCKET, key) for key in server.objects(BUCKET)}
    return {key: (object_.size, object_.etag) for key, object_ in found.items() if object_ is not None}


def test_what_a_version_has_overwritten_that_was_taken_back_is_told(
    bench: Bench, settler: Settler, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    """Its original was proven, its style was not: the bucket had the newer, the ledger told of the older, for ever."""
    pipeline = half_uploaded(bench, proxy, "thumb")
    while_it_is_tried = settle(settler)
    taken_back(bench, pipeline)
    untrue = told(bench)

    changed = settle(settler), settle(settler)

    assert (0, (1, 0)) == (while_it_is_tried, changed)
    assert untrue != told(bench) == true(bench, rclone_server)
    assert {ORIGINAL: b"another cat", THUMB: b"cat"} == rclone_server.objects(BUCKET)
    assert "done" == bench.state()
    assert "object.overwritten" in [row["event"] for row in bench.rows("SELECT event FROM history")]


def test_what_may_still_overwrite_a_key_is_waited_for(
    bench: Bench, settler: Settler, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    """After `upload.doubt` nothing of it can land any more, and the key is looked at: once."""
    gate = threading.Event()
    offered(bench, FIRST)
    rested(bench, bench.pipeline())
    proxy.on("PUT", "/original/", Hold(gate, hang_up=True), times=1)
    pipeline = half_uploaded(bench, proxy, "original")
    taken_back(bench, pipeline)
    looks = len(proxy.requests("HEAD"))

    too_early = settle(settler), len(proxy.requests("HEAD")) - looks
    gate.set()
    proxy.await_ended("PUT", "/original/", count=2)
    bench.clock.advance(DOUBT_S + 1)
    changed = settle(settler), settle(settler)

    assert ((0, 0), (1, 0)) == (too_early, changed)
    assert told(bench) == true(bench, rclone_server)
    assert b"another cat" == rclone_server.objects(BUCKET)[ORIGINAL]


def test_a_put_that_never_landed_changes_nothing_and_is_forgotten(
    bench: Bench, settler: Settler, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    pipeline = half_uploaded(bench, proxy, "original")
    taken_back(bench, pipeline)
    before = told(bench)

    settle(settler)
    bench.clock.advance(DOUBT_S + 1)
    changed = settle(settler)
    looks = len(proxy.requests("HEAD"))
    settle(settler)
    again = len(proxy.requests("HEAD"))

    assert 0 == changed
    assert before == told(bench) == true(bench, rclone_server)
    assert looks == again, "nobody asks again"


def test_a_newer_version_takes_the_place_of_what_was_taken_back(
    bench: Bench, settler: Settler, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    pipeline = half_uploaded(bench, proxy, "thumb")
    taken_back(bench, pipeline)
    proxy.clear()
    offered(bench, FIRST)

    changed = settle(settler)
    rested(bench, pipeline)

    assert (0, 0) == (changed, settle(settler))
    assert told(bench) == true(bench, rclone_server)
    assert FIRST == rclone_server.objects(BUCKET)


def test_what_a_stranger_has_put_there_is_said_once(
    bench: Bench, settler: Settler, proxy: FaultProxy, rclone_server: RcloneServer, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = half_uploaded(bench, proxy, "thumb")
    taken_back(bench, pipeline)
    rclone_server.client().put_object(Bucket=BUCKET, Key=ORIGINAL, Body=b"a stranger's")
    before = told(bench)

    changed = settle(settler), settle(settler)

    assert ((0, 0), before) == (changed, told(bench))
    assert 1 == capsys.readouterr().out.count("object.unknown")
