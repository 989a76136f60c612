"""A lost ledger is made anew from spool and bucket, and nothing that is proven there is put again."""

from __future__ import annotations

from typing import Any

import pytest

from spoold.model import Outcome
from spoold.rebuild import Rebuilder, Source
from tests.parts import BUCKET, NAME, RECORD, Bench, captured, told, walked
from tests.proxy import Answer, FaultProxy, RewriteAnswer, error_body
from tests.servers import RcloneServer

ORIGINAL, THUMB = f"{RECORD}/original/cat.jpg", f"{RECORD}/thumb/cat.jpg"
CAT = {ORIGINAL: b"a cat", THUMB: b"cat"}
DOUBT_S = 900.0


@pytest.fixture
def bench(real: Bench) -> Bench:
    return real


def walk(bench: Bench, record: str = RECORD, **rules: Any) -> Outcome:
    """Have a record offered as it lies, and walk it once."""
    bench.offer(record)
    return walked(bench.pipeline(cleaner=bench.cleaner(**rules)), bench.claimed())


def save(bench: Bench, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        bench.write(path, content)


def puts(proxy: FaultProxy) -> int:
    return len(proxy.requests("PUT", f"{BUCKET}/avatars"))


def rebuilder(bench: Bench) -> Rebuilder:
    sources = {NAME: Source(bench.spool.layout, BUCKET, "")}
    return Rebuilder(ledger=bench.ledger, store=bench.store, sources=sources)


# What still lies in the spool


def test_what_is_in_the_bucket_is_not_put_again_and_goes_when_nothing_can_change_it_any_more(
    bench: Bench, proxy: FaultProxy
) -> None:
    """The lost ledger may have known of a PUT without an answer: it counts as in doubt from the moment of the new one."""
    save(bench, CAT)
    assert Outcome.WAITING is walk(bench, keep_for_s=3600)
    assert 2 == puts(proxy)
    bench.lose_ledger()
    bench.offer()
    pipeline = bench.pipeline(cleaner=bench.cleaner())

    outcome = walked(pipeline, bench.claimed())
    state = bench.state(), sorted(bench.files())
    bench.clock.advance(DOUBT_S + 1)
    walked(pipeline, bench.claimed())
    bench.clock.advance(1)
    walked(pipeline, bench.claimed())

    assert (Outcome.WAITING, ("uploaded", sorted(CAT))) == (outcome, state)
    assert (2, "done", []) == (puts(proxy), bench.state(), bench.files())


def test_what_is_not_there_or_is_another_content_is_put(bench: Bench, proxy: FaultProxy, rclone_server: RcloneServer) -> None:
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    bench.write(ORIGINAL, b"a dog")
    bench.write(f"{RECORD}/medium/cat.jpg", b"a new style")
    bench.lose_ledger()

    walk(bench)

    assert 2 + 2 == puts(proxy)
    assert {b"a dog", b"cat", b"a new style"} == set(rclone_server.objects(BUCKET).values())


def test_an_etag_that_tells_nothing_has_the_object_read_back(bench: Bench, proxy: FaultProxy) -> None:
    """As of an object that the bucket's KMS key encrypts."""
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    bench.lose_ledger()
    proxy.on("HEAD", "avatars", RewriteAnswer({"ETag": '"0123456789abcdef0123456789abcdef"'}))

    walk(bench)

    assert (2, 2) == (puts(proxy), len(proxy.requests("GET", "avatars")))
    assert "uploaded" == bench.state()


def test_a_bucket_that_cannot_be_asked_is_asked_later(bench: Bench, proxy: FaultProxy) -> None:
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    bench.lose_ledger()
    proxy.on("HEAD", "avatars", Answer(503, b""))

    outcome = walk(bench)
    proxy.clear()
    bench.clock.advance(400)
    walked(bench.pipeline(cleaner=bench.cleaner()), bench.claimed())

    assert (Outcome.DEFERRED, 2, "uploaded") == (outcome, puts(proxy), bench.state())


def test_what_was_written_long_after_is_put_without_asking(bench: Bench, proxy: FaultProxy) -> None:
    bench.lose_ledger()
    bench.clock.jump(-7200)  # the files are made now, by the kernel's clock: so the ledger was lost two hours ago
    bench.lose_ledger()
    bench.clock.jump(7200)
    save(bench, CAT)

    walk(bench)

    assert [] == proxy.requests("HEAD", "avatars")
    assert "done" == bench.state() or "uploaded" == bench.state()


def test_what_lay_aside_comes_back_and_is_recognised(bench: Bench, proxy: FaultProxy) -> None:
    save(bench, CAT)
    walk(bench, grace_s=3600)
    assert 2 == len(bench.aside())
    bench.lose_ledger()

    bench.cleaner().recover("me", lease_s=30)
    back = sorted(bench.files()), bench.aside()
    walk(bench)

    assert (sorted(CAT), []) == back
    assert (2, "uploaded") == (puts(proxy), bench.state())


def test_a_new_ledger_that_counts_to_an_old_batch_does_not_take_its_file_for_its_own(bench: Bench) -> None:
    """The name in aside/ has batch and number, and both begin at 1 again; it has the path, too."""
    save(bench, CAT)
    walk(bench, grace_s=3600)
    other = "avatars/7/original/dog.jpg"
    bench.lose_ledger()
    save(bench, {other: b"a dog", "avatars/7/thumb/dog.jpg": b"dog"})
    walk(bench, "avatars/7", keep_for_s=3600)

    bench.cleaner().recover("me", lease_s=30)

    assert (b"a cat", b"a dog") == (bench.read(ORIGINAL), bench.read(other))


# What only the bucket knows


def test_records_that_were_let_go_long_ago_are_done_again(bench: Bench) -> None:
    save(bench, CAT)
    walk(bench)
    bench.clock.advance(1)
    walked(bench.pipeline(cleaner=bench.cleaner()), bench.claimed())
    before = bench.objects()
    bench.lose_ledger()
    assert {} == bench.status()

    with captured() as lines:
        rebuilder(bench).rebuild()

    status = bench.status()
    assert ("done", 0, 1, 2, 8) == tuple(status[name] for name in ("state", "processing", "version", "files", "bytes"))
    told_of = ("bucket", "key", "size", "etag", "style", "filename")
    assert {key: [row[name] for name in told_of] for key, row in before.items()} == {
        key: [row[name] for name in told_of] for key, row in bench.objects().items()
    }
    assert {"image/jpeg"} == {row["content_type"] for row in bench.objects().values()}
    assert [2] == [line["files"] for line in told(lines, "spool.rebuilt")]
    assert not rebuilder(bench).is_due


def test_keys_that_are_no_file_of_the_spool_are_left_alone(bench: Bench, rclone_server: RcloneServer) -> None:
    for key in ("avatars/42/cat.jpg", "backup.tar", "avatars/42/original/deep/er/cat.jpg"):
        rclone_server.client().put_object(Bucket=BUCKET, Key=key, Body=b"x")
    bench.lose_ledger()

    rebuilder(bench).rebuild()

    assert [] == bench.rows("SELECT * FROM record") == bench.rows("SELECT * FROM object")


def test_what_the_ledger_learned_since_is_newer_than_the_listing(bench: Bench) -> None:
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    bench.lose_ledger()
    walk(bench)
    before = bench.rows("SELECT * FROM object")

    rebuilder(bench).rebuild()

    assert before == bench.rows("SELECT * FROM object")
    assert "uploaded" == bench.state()


def test_an_original_that_is_found_again_replaces_nothing(bench: Bench) -> None:
    """The style's local file has gone already: it is the bucket's alone."""
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    (bench.root / THUMB).unlink()
    bench.lose_ledger()
    rebuilder(bench).rebuild()

    walk(bench)

    assert [] == bench.rows("SELECT * FROM replaced")
    assert {ORIGINAL, THUMB} == {row["key"] for row in bench.rows("SELECT key FROM record_object")}


def test_what_was_only_found_is_never_deleted(bench: Bench) -> None:
    """Nobody knows any more who uploaded it. It leaves the view, as what a newer original replaced."""
    save(bench, CAT)
    walk(bench)
    bench.clock.advance(1)
    walked(bench.pipeline(cleaner=bench.cleaner()), bench.claimed())
    bench.lose_ledger()
    rebuilder(bench).rebuild()
    save(bench, {f"{RECORD}/original/dog.jpg": b"a dog"})

    walk(bench)

    assert [] == bench.rows("SELECT * FROM replaced")
    assert [f"{RECORD}/original/dog.jpg"] == [row["key"] for row in bench.rows("SELECT key FROM record_object")]


def test_a_bucket_that_refuses_to_be_listed_is_told_of_once_and_tried_again(bench: Bench, proxy: FaultProxy) -> None:
    save(bench, CAT)
    walk(bench, keep_for_s=3600)
    bench.lose_ledger()
    rule = rebuilder(bench)
    proxy.on("GET", BUCKET, Answer(403, error_body("AccessDenied")))

    with captured() as lines:
        rule.rebuild()
        rule.rebuild()
    [refused] = told(lines, "spool.not_rebuilt")
    is_due = rule.is_due
    proxy.clear()
    rule.rebuild()

    assert ("StoreDenied", True, False) == (refused["error"], is_due, rule.is_due)
    assert "s3:ListBucket" in refused["hint"]


def test_a_ledger_that_was_not_lost_lists_nothing(bench: Bench, proxy: FaultProxy) -> None:
    assert not rebuilder(bench).is_due
    rebuilder(bench).rebuild()

    assert [] == proxy.requests()
