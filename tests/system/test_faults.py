"""Networks and servers at their worst: what a fault costs, and that nothing is lost, nothing stale by it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paperclip import App, picture
from tests.proxy import (
    HTML,
    SLOW_DOWN,
    Answer,
    Delay,
    FaultProxy,
    Flip,
    Hold,
    LoseAnswer,
    Reset,
    RewriteAnswer,
    error_body,
)
from tests.servers import RcloneServer
from tests.system.harness import Site, until

KEY = "avatars/1/original/me.jpg"
DENIED = Answer(403, error_body("AccessDenied"))
FEW_TRIES = {"spoold.uploader._PERSISTENCE_S": 0.3}  # within one attempt; 8 s otherwise
TWO_HOURS_AGO = "proven_at - 7200"


def photo(seed: int) -> bytes:
    return picture(80, 60, seed)


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer, proxy: FaultProxy) -> Site:
    """A spool whose daemon talks to its server through the proxy."""
    return Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, upload={"doubt": "2s"})


def stored(site: Site) -> dict[str, bytes]:
    """Return what rclone's directory holds at this moment: asking the server meanwhile is a race of its own."""
    bucket = site.server.directory / site.bucket if isinstance(site.server, RcloneServer) else Path()
    found = {}
    for path in bucket.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            found[str(path.relative_to(bucket))] = path.read_bytes()
    return found


# What takes long


def test_a_record_whose_put_takes_for_ever_keeps_no_other_from_its_whole_way(site: Site, proxy: FaultProxy) -> None:
    """Whoever walks has woken another first, who takes what comes, and what becomes due by and by."""
    gate = threading.Event()
    proxy.on("PUT", KEY, Hold(gate), times=1)
    app = App(site.root)

    with site.daemon():
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "uploading")
        app.save("avatars", 2, "me.jpg", {"original": photo(2)})
        site.until_state("avatars/2", "done")
        still = site.status("avatars/1")["state"]
        gate.set()
        site.until_state("avatars/1", "done")

    assert "uploading" == still
    site.demand_laws({KEY: photo(1), "avatars/2/original/me.jpg": photo(2)})


# Destination faults: the spool is held


def test_rule_11_while_s3_is_away_the_spool_is_held_no_attempt_is_spent_and_it_goes_on_by_itself(
    site: Site, proxy: FaultProxy
) -> None:
    written = {f"avatars/{number}/original/me.jpg": photo(number) for number in range(3)}

    with site.daemon() as daemon:
        proxy.go_away()
        for number in range(3):
            App(site.root).save("avatars", number, "me.jpg", {"original": photo(number)})
        held = daemon.until_event("spool.held")
        until(lambda: not site.query("SELECT * FROM claim"), "every record is put back")
        waiting = [site.status(f"avatars/{number}") for number in range(3)]
        batches = site.query("SELECT attempts, crashes FROM batch")
        on_disk = site.files()
        proxy.come_back()
        daemon.until_event("spool.released")
        for number in range(3):
            site.until_state(f"avatars/{number}", "done")
            daemon.demand_legal_path(f"avatars/{number}")

        assert "StoreUnavailable" == held["error"] and "Connection refused" in held["detail"]
        assert [("queued", 1, 0)] * 3 == [(row["state"], row["processing"], row["attempts"]) for row in waiting]
        assert [{"attempts": 0, "crashes": 0}] * 3 == batches
        assert written == on_disk
        assert not daemon.events("batch.deferred") and 1 == len(daemon.events("spool.held"))

    site.demand_laws(written)


def test_rule_11_a_login_page_before_everything_holds_the_spool(site: Site, proxy: FaultProxy) -> None:
    """Two hundred pages say nothing about our files: no attempt may be spent on them."""
    proxy.on(".*", "", HTML)

    with site.daemon(constants=FEW_TRIES) as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        held = daemon.until_event("spool.held")
        until(lambda: not site.query("SELECT * FROM claim"), "the record is put back")
        row = site.status("avatars/1")
        proxy.clear()
        site.until_state("avatars/1", "done")

    assert "proxy or a login page" in held["hint"]
    assert ("queued", 0) == (row["state"], row["attempts"])
    site.demand_laws({KEY: photo(1)})


def test_wrong_credentials_hold_the_spool_and_right_ones_release_it_without_a_restart(
    tmp_path: Path, rclone_server: RcloneServer
) -> None:
    credentials = tmp_path / "credentials"

    def give(secret: str) -> None:
        draft = tmp_path / "credentials.new"
        draft.write_text(f"[default]\naws_access_key_id = {rclone_server.access_key}\naws_secret_access_key = {secret}\n")
        draft.replace(credentials)

    give("wrong")
    environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
    site = Site(tmp_path, rclone_server, environment=environment)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        held = daemon.until_event("spool.held")
        status = site.spoold("status")
        why = site.spoold("why", "avatars/1")
        give(rclone_server.secret_key)
        daemon.until_event("spool.released")
        site.until_state("avatars/1", "done")

    assert "StoreDenied" == held["error"] and "SignatureDoesNotMatch" in held["detail"] and "secret key" in held["hint"]
    assert "uploads is held since" in status.stdout and "SignatureDoesNotMatch" in status.stdout
    assert "is held since" in why.stdout and "goes on by itself" in why.stdout
    site.demand_laws({KEY: photo(1)})


def test_a_missing_bucket_holds_the_spool_until_somebody_makes_it(site: Site, rclone_server: RcloneServer) -> None:
    rclone_server.client().delete_bucket(Bucket=site.bucket)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        held = daemon.until_event("spool.held")
        rclone_server.create_bucket(site.bucket)
        daemon.until_event("spool.released")
        row = site.until_state("avatars/1", "done")

    assert "NoSuchBucket" in held["detail"] and "create the bucket" in held["hint"]
    assert 0 == row["attempts"]
    site.demand_laws({KEY: photo(1)})


# Item faults: one record waits, the others go on


@pytest.mark.parametrize(
    ("fault", "error", "detail"),
    [
        pytest.param(Answer(503, SLOW_DOWN), "StoreUnavailable", "503 SlowDown", id="slow down"),
        pytest.param(DENIED, "StoreDenied", "403 AccessDenied", id="denied"),
        pytest.param(HTML, "Unproven", "proves nothing", id="a login page"),
    ],
)
def test_rule_11_a_fault_of_one_key_defers_its_record_and_nothing_else(
    site: Site, proxy: FaultProxy, fault: Answer, error: str, detail: str
) -> None:
    proxy.on("PUT", KEY, fault)
    written = {f"avatars/{number}/original/me.jpg": photo(number) for number in range(1, 4)}

    with site.daemon(constants=FEW_TRIES) as daemon:
        for number in range(1, 4):
            App(site.root).save("avatars", number, "me.jpg", {"original": photo(number)})
        deferred = daemon.until_event("batch.deferred")
        for number in (2, 3):
            site.until_state(f"avatars/{number}", "done")
        row = site.until_state("avatars/1", "retrying")
        on_disk = site.files()
        proxy.clear()
        site.until_state("avatars/1", "done")
        daemon.demand_legal_path("avatars/1")

        assert not daemon.events("spool.held")
        assert ["avatars/1"] == sorted({line["record"] for line in daemon.events("batch.deferred")})

    assert error == deferred["error"] == row["error_code"] and detail in deferred["detail"]
    assert 1 == row["processing"] and 1 <= row["attempts"] and row["next_attempt_at"]
    assert {KEY: photo(1)} == on_disk
    site.demand_laws(written)


def test_attempts_that_are_used_up_bury_the_record_and_retry_revives_it(site: Site, proxy: FaultProxy) -> None:
    site.settings["upload"]["retry"]["give_up_after"] = 2
    site.write_config()
    proxy.on("PUT", KEY, Answer(503, SLOW_DOWN))

    with site.daemon(constants=FEW_TRIES) as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        dead = daemon.until_event("batch.dead")
        row = site.status("avatars/1")
        on_disk = site.files()
        proxy.clear()
        retried = site.spoold("retry", "avatars/1")
        site.until_state("avatars/1", "done")
        daemon.demand_legal_path("avatars/1")

    assert "GaveUp" == dead["error"] == row["error_code"] and "503 SlowDown" in dead["detail"]
    assert "spoold retry avatars/1" in dead["hint"]
    assert ("dead", 1) == (row["state"], row["processing"])
    assert {KEY: photo(1)} == on_disk
    assert 0 == retried.returncode
    site.demand_laws({KEY: photo(1)})


# Proof


def test_rule_5_what_was_damaged_on_its_way_is_put_again_until_it_is_proven(site: Site, proxy: FaultProxy) -> None:
    """rclone takes any bytes and only its ETag tells."""
    proxy.on("PUT", KEY, Flip(1000), times=2)

    with site.daemon():
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "done")

    assert 3 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(1)})


def test_rule_5_an_object_whose_digest_nobody_tells_is_read_back_before_anything_local_goes(
    site: Site, proxy: FaultProxy
) -> None:
    proxy.on("PUT", KEY, RewriteAnswer({"ETag": '"of-my-own"', "x-amz-checksum-.*": None}))
    gate = threading.Event()
    proxy.on("GET", KEY, Delay(gate))

    with site.daemon():
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        proxy.await_seen("GET", KEY)
        meanwhile = site.status("avatars/1")["state"], site.files()
        gate.set()
        site.until_state("avatars/1", "done")

    assert ("uploading", {KEY: photo(1)}) == meanwhile
    assert 1 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(1)})


def test_rule_5_a_proof_older_than_an_hour_is_renewed_by_head_before_the_local_file_goes(site: Site, proxy: FaultProxy) -> None:
    upload_and_keep(site)
    site.change(f"UPDATE object SET proven_at = {TWO_HOURS_AGO}")
    before = len(proxy.requests("HEAD", KEY))

    with site.daemon():
        site.until_state("avatars/1", "done")

    assert 0 == before and 1 == len(proxy.requests("HEAD", KEY)) and 1 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(1)})


def test_rule_5_a_proof_of_this_hour_is_not_asked_for_again(site: Site, proxy: FaultProxy) -> None:
    upload_and_keep(site)

    with site.daemon():
        site.until_state("avatars/1", "done")

    assert not proxy.requests("HEAD|GET", KEY)
    site.demand_laws({KEY: photo(1)})


@pytest.mark.parametrize("there", [None, b"somebody else's"], ids=["gone", "other content"])
def test_rule_5_an_object_that_the_bucket_has_lost_is_put_again_from_the_local_file(
    site: Site, proxy: FaultProxy, rclone_server: RcloneServer, there: bytes | None
) -> None:
    upload_and_keep(site)
    site.change(f"UPDATE object SET proven_at = {TWO_HOURS_AGO}")
    s3 = rclone_server.client()
    if there is None:
        s3.delete_object(Bucket=site.bucket, Key=KEY)
    else:
        s3.put_object(Bucket=site.bucket, Key=KEY, Body=there)

    with site.daemon() as daemon:
        deferred = daemon.until_event("batch.deferred")
        site.until_state("avatars/1", "done")

    assert "Missing" == deferred["error"] and KEY in deferred["detail"]
    assert 2 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(1)})


def test_rule_5_an_object_that_was_lost_is_put_again_even_when_its_files_were_set_aside(
    site: Site, proxy: FaultProxy, rclone_server: RcloneServer
) -> None:
    """What lies aside is given back first: the daemon reads only what lies where the app put it."""
    site.settings["spools"][0]["cleanup"]["grace"] = "1h"
    site.write_config()
    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        daemon.until_event("file.set_aside")
        aside = until(lambda: [entry.name for entry in (site.root / ".spoold/aside").iterdir()], "it lies aside")
        daemon.kill()
    site.settings["spools"][0]["cleanup"]["grace"] = "200ms"
    site.write_config()
    site.change(f"UPDATE object SET proven_at = {TWO_HOURS_AGO}")
    rclone_server.client().delete_object(Bucket=site.bucket, Key=KEY)

    with site.daemon() as daemon:
        given_back = daemon.until_event("file.given_back")
        site.until_state("avatars/1", "done")
        daemon.demand_legal_path("avatars/1", after="batch.stored")

    assert 1 == len(aside)
    assert "does not hold what was stored" in given_back["detail"]
    assert 2 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(1)})


def upload_and_keep(site: Site) -> None:
    """Upload a record, end the daemon while its local file is still kept, and let it keep nothing from now on."""
    site.settings["spools"][0]["cleanup"]["keep_for"] = "1h"
    site.write_config()
    with site.daemon():
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "uploaded")
    site.settings["spools"][0]["cleanup"]["keep_for"] = "0s"
    site.write_config()
    assert {KEY: photo(1)} == site.files() == site.objects()


# Doubt


def test_rule_6_a_put_whose_answer_was_lost_is_repeated(site: Site, proxy: FaultProxy) -> None:
    proxy.on("PUT", KEY, LoseAnswer(), times=1)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "done")

        assert not daemon.events("batch.deferred")

    assert [200, 200] == [seen.upstream_status for seen in proxy.requests("PUT", KEY)]
    site.demand_laws({KEY: photo(1)})


@pytest.mark.parametrize("second_try", ["succeeds", "fails"])
def test_rule_6_an_older_put_that_lands_after_a_newer_one_is_undone(site: Site, proxy: FaultProxy, second_try: str) -> None:
    """The first version's PUT gets no answer and lands when the second version is long in the bucket."""
    site.settings["upload"]["doubt"] = "5s"
    site.write_config()
    gate = threading.Event()
    proxy.on("PUT", KEY, Hold(gate, hang_up=True), times=1)
    if second_try == "fails":
        proxy.on("PUT", KEY, Reset(), times=1)
    app = App(site.root)

    with site.daemon(constants=FEW_TRIES if second_try == "fails" else None) as daemon:
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        if second_try == "succeeds":
            site.until_state("avatars/1", "uploaded", "done")
        else:
            daemon.until_event("batch.deferred")
            proxy.clear()
        app.replace("avatars", 1, "me.jpg", "me.jpg", {"original": photo(2)})
        until(lambda: stored(site) == {KEY: photo(2)}, "the second version is in the bucket")
        site.until_state("avatars/1", "uploaded")
        why = until(lambda: "upload.doubt" in (said := site.spoold("why", KEY).stdout) and said, "why tells of the doubt")
        gate.set()
        until(lambda: stored(site) == {KEY: photo(1)}, "the first version's PUT lands late")
        kept = site.files()
        site.until_state("avatars/1", "done")
        daemon.demand_legal_paths("avatars/1")

    assert why.startswith(f"{KEY} is in s3://{site.bucket}/{KEY}")
    assert {KEY: photo(2)} == kept
    site.demand_laws({KEY: photo(2)})


def test_rule_6_an_older_put_that_never_lands_only_delays_the_letting_go(site: Site, proxy: FaultProxy) -> None:
    proxy.on("PUT", KEY, Hold(threading.Event(), hang_up=True), times=1)
    app = App(site.root)

    with site.daemon() as daemon:
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "uploaded", "done")
        app.replace("avatars", 1, "me.jpg", "me.jpg", {"original": photo(2)})
        daemon.until_event("record.cleared", batch=2)

    first = proxy.requests("PUT", KEY)[0]
    head = proxy.requests("HEAD", KEY)[-1]
    assert head.at - first.at >= 2.0, "upload.doubt was over"
    assert 3 == len(proxy.requests("PUT", KEY))
    site.demand_laws({KEY: photo(2)})


def test_rule_6_a_delete_that_lands_after_its_key_is_used_again_is_undone(site: Site, proxy: FaultProxy) -> None:
    site.settings["upload"]["doubt"] = "5s"
    site.settings["spools"][0]["replaced_after"] = "0s"
    site.write_config()
    gate = threading.Event()
    proxy.on("DELETE", KEY, Hold(gate, hang_up=True), times=1)
    app = App(site.root)

    with site.daemon(constants={"spoold.daemon._REMOVE_EVERY_S": 0.1}) as daemon:
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "done")
        app.replace("avatars", 1, "me.jpg", "other.jpg", {"original": photo(2)})
        proxy.await_seen("DELETE", KEY)
        until(lambda: site.query("SELECT * FROM intent WHERE kind = 'delete' AND answer = 'doubt'"), "nobody knows")
        app.replace("avatars", 1, "other.jpg", "me.jpg", {"original": photo(3)})
        until(lambda: stored(site).get(KEY) == photo(3), "the third version is in the bucket")
        gate.set()
        until(lambda: KEY not in stored(site), "the DELETE lands late")
        site.until_state("avatars/1", "done")
        until(lambda: stored(site) == {KEY: photo(3)}, "the other name's key is deleted")

        assert "Missing" in {line["error"] for line in daemon.events("batch.deferred")}

    site.demand_laws({KEY: photo(3)})


# Large files


def large(seed: int, size_bytes: int = 12_000_000) -> bytes:
    """Return something that is no image and ends where it ends."""
    return bytes([seed]) * size_bytes


VIDEO = "videos/1/original/clip.bin"


def test_a_large_file_goes_up_in_parts_with_a_checksum_each(site: Site, proxy: FaultProxy) -> None:
    site.settings["upload"]["multipart_threshold"] = "5MB"
    site.write_config()

    with site.daemon():
        App(site.root).save("videos", 1, "clip.bin", {"original": large(1)})
        site.until_state("videos/1", "done")

    puts = proxy.requests("PUT", VIDEO)
    assert all("partNumber=" in put.path for put in puts)
    assert 2 == len(puts) and all("x-amz-checksum-crc32" in {name.lower() for name in put.headers} for put in puts)
    site.demand_laws({VIDEO: large(1)})


def test_rule_5_a_part_that_was_damaged_on_its_way_is_noticed(site: Site, proxy: FaultProxy) -> None:
    site.settings["upload"]["multipart_threshold"] = "5MB"
    site.write_config()
    proxy.on("PUT", VIDEO, Flip(1000), times=1)

    with site.daemon():
        App(site.root).save("videos", 1, "clip.bin", {"original": large(1)})
        site.until_state("videos/1", "done")

    assert 4 == len(proxy.requests("PUT", VIDEO)), "two parts, and again"
    site.demand_laws({VIDEO: large(1)})


def test_rule_6_an_upload_whose_completion_was_not_answered_is_repeated(site: Site, proxy: FaultProxy) -> None:
    """CompleteMultipartUpload counts as a PUT."""
    site.settings["upload"] |= {"multipart_threshold": "5MB", "doubt": "3s"}
    site.write_config()
    proxy.on("POST", VIDEO, LoseAnswer(), times=1, skip=1)
    app = App(site.root)

    with site.daemon() as daemon:
        app.save("videos", 1, "clip.bin", {"original": large(1)})
        site.until_state("videos/1", "uploaded", "done")
        app.replace("videos", 1, "clip.bin", "clip.bin", {"original": large(2)})
        daemon.until_event("record.cleared", batch=2)

    completions = [seen for seen in proxy.requests("POST", VIDEO) if "uploadId=" in seen.path]
    assert [200, 200, 200] == [seen.upstream_status for seen in completions]
    assert proxy.requests("HEAD", VIDEO)[-1].at - completions[0].at >= 3.0, "the first may land once more until then"
    site.demand_laws({VIDEO: large(2)})


def test_a_large_file_that_changes_under_way_is_aborted_and_goes_up_anew(site: Site, proxy: FaultProxy) -> None:
    site.settings["upload"]["multipart_threshold"] = "5MB"
    site.write_config()
    gate = threading.Event()
    proxy.on("PUT", VIDEO, Delay(gate), times=1)

    with site.daemon() as daemon:
        path = App(site.root).save("videos", 1, "clip.bin", {"original": large(1, 60_000_000)})["original"]
        proxy.await_seen("PUT", VIDEO)
        path.write_bytes(large(2, 60_000_000))
        gate.set()
        daemon.until_event("batch.superseded")  # by its own walk, or by the newer one
        site.until_state("videos/1", "done")
        daemon.demand_legal_path("videos/1")

    assert any("uploadId=" in delete.path for delete in proxy.requests("DELETE", VIDEO)), "the first upload was aborted"
    site.demand_laws({VIDEO: large(2, 60_000_000)})


@pytest.mark.soak
def test_a_huge_file_goes_up_in_bounded_memory(tmp_path: Path, rclone_server: RcloneServer) -> None:
    site = Site(tmp_path, rclone_server)
    size_bytes = 200_000_000

    with site.daemon() as daemon:
        before = peak_memory_bytes(daemon.process.pid)
        App(site.root).save("videos", 1, "clip.bin", {"original": large(1, size_bytes)})
        site.until_state("videos/1", "uploaded", "done")
        grown = peak_memory_bytes(daemon.process.pid) - before
        site.until_state("videos/1", "done")

    assert grown < 80_000_000
    site.demand_laws({VIDEO: large(1, size_bytes)})


def peak_memory_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def test_a_limit_on_the_bandwidth_spaces_out_but_holds_up_nothing(site: Site) -> None:
    site.settings["upload"] |= {"bandwidth": "200KB/s", "multipart_threshold": "5MB"}
    site.write_config()
    written = {f"notes/{number}/original/a.bin": large(number, 50_000) for number in range(8)}

    with site.daemon():
        for number in range(8):
            App(site.root).save("notes", number, "a.bin", {"original": large(number, 50_000)})
        for number in range(8):
            site.until_state(f"notes/{number}", "done")

    site.demand_laws(written)
