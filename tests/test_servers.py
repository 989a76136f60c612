"""The servers, the proxy and the app that all other tests believe: each shows here that it does what it says."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from PIL import Image

from tests.paperclip import STYLES, App, picture, styles_of
from tests.proxy import (
    HTML,
    HTML_PAGE,
    SLOW_DOWN,
    Answer,
    CutAnswer,
    Delay,
    DelayAnswer,
    FaultProxy,
    Flip,
    FlipAnswer,
    Hold,
    LoseAnswer,
    Reset,
    RewriteAnswer,
)
from tests.servers import MotoServer, RcloneServer, Server, client

KEY = "avatars/42/original/me with ünïcode & plus+.jpg"


@pytest.fixture
def bucket(rclone_server: RcloneServer) -> str:
    return rclone_server.create_bucket("bucket")


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def s3(rclone_server: RcloneServer, proxy: FaultProxy) -> Any:
    """A client that goes through the proxy."""
    return rclone_server.client(proxy.endpoint_url)


# Servers.


@pytest.mark.parametrize("name", ["moto_server", "rclone_server"])
def test_a_server_stores_what_it_is_given_and_answers_with_its_md5(name: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    bucket = server.create_bucket("stores")

    answer = server.client().put_object(Bucket=bucket, Key=KEY, Body=b"picture", ContentType="image/jpeg")

    assert f'"{hashlib.md5(b"picture").hexdigest()}"' == answer["ETag"]
    assert {KEY: b"picture"} == server.objects(bucket)
    assert "image/jpeg" == server.client().head_object(Bucket=bucket, Key=KEY)["ContentType"]


def test_rclone_refuses_a_wrong_signature(rclone_server: RcloneServer, bucket: str) -> None:
    stranger = client(rclone_server.endpoint_url, secret_key="wrong")

    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert {} == rclone_server.objects(bucket)


def test_rclone_keeps_its_objects_over_a_restart_on_the_same_port(rclone_server: RcloneServer, bucket: str) -> None:
    s3, before = rclone_server.client(), rclone_server.endpoint_url
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    rclone_server.stop()
    with pytest.raises(EndpointConnectionError):
        s3.list_buckets()
    rclone_server.start()

    assert before == rclone_server.endpoint_url
    assert b"picture" == s3.get_object(Bucket=bucket, Key=KEY)["Body"].read()


def test_a_frozen_server_accepts_and_says_nothing(rclone_server: RcloneServer, bucket: str) -> None:
    impatient = rclone_server.client(read_timeout_s=0.3)
    rclone_server.freeze()

    with pytest.raises(ReadTimeoutError):
        impatient.list_objects_v2(Bucket=bucket)

    rclone_server.thaw()
    assert {} == rclone_server.objects(bucket)


def test_moto_forgets_when_told_to() -> None:
    with MotoServer() as server:
        server.create_bucket("bucket")

        server.reset()

        assert [] == server.client().list_buckets()["Buckets"]


def test_a_server_dies_with_its_parent(tmp_path: Path) -> None:
    """A test run that is killed must leave nothing behind."""
    code = (
        "import pathlib, signal, sys; from tests.servers import RcloneServer\n"
        "server = RcloneServer(pathlib.Path(sys.argv[1])).start()\n"
        "print(server.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s3")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)

        parent.kill()

    eventually(lambda: not is_alive(pid))


# The proxy.


def test_the_proxy_passes_signed_requests_on_and_writes_them_down(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")
    s3.head_object(Bucket=bucket, Key=KEY)
    got = s3.get_object(Bucket=bucket, Key=KEY)["Body"].read()
    s3.delete_object(Bucket=bucket, Key=KEY)

    assert b"picture" == got
    assert {} == rclone_server.objects(bucket)
    assert ["PUT", "HEAD", "GET", "DELETE"] == [seen.method for seen in proxy.seen]
    assert [200, 200, 200, 204] == [seen.status for seen in proxy.seen]
    put = proxy.seen[0]
    assert (f"{bucket}/{KEY}", 7, hashlib.sha256(b"picture").hexdigest()) == (put.key, put.size, put.sha256)
    assert "100-continue" == put.headers["Expect"]


def test_the_proxy_keeps_a_connection_alive(proxy: FaultProxy, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    proxy.on("GET", "", Answer(200, b"one"), times=1)
    proxy.on("GET", "", Answer(404, b"two"), times=1)

    connection.request("GET", "/")
    first = (answer := connection.getresponse()).status, answer.read()
    socket = connection.sock
    connection.request("GET", "/")
    second = (answer := connection.getresponse()).status, answer.read()

    assert ((200, b"one"), (404, b"two")) == (first, second)
    assert socket is connection.sock
    connection.close()


def test_the_proxy_takes_a_chunked_body(proxy: FaultProxy, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    proxy.on("PUT", "", Answer(200))

    connection.request("PUT", "/b/k", body=iter([b"pic", b"ture"]), encode_chunked=True)
    connection.getresponse().read()

    assert hashlib.sha256(b"picture").hexdigest() == proxy.seen[0].sha256
    connection.close()


def test_a_multipart_upload_goes_through(proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str) -> None:
    upload = s3.create_multipart_upload(Bucket=bucket, Key=KEY)["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key=KEY, UploadId=upload, PartNumber=1, Body=b"x" * 6_000_000)
    parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
    s3.complete_multipart_upload(Bucket=bucket, Key=KEY, UploadId=upload, MultipartUpload={"Parts": parts})

    assert {KEY: b"x" * 6_000_000} == rclone_server.objects(bucket)
    assert ["POST", "PUT", "POST"] == [seen.method for seen in proxy.seen]


def test_an_answer_is_made_up_as_often_as_asked(proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str) -> None:
    proxy.on("PUT", "original/", Answer(503, SLOW_DOWN), times=1, skip=1)

    s3.put_object(Bucket=bucket, Key=KEY, Body=b"first")
    with pytest.raises(ClientError, match="SlowDown"):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"second")
    assert {KEY: b"first"} == rclone_server.objects(bucket)
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"third")

    assert {KEY: b"third"} == rclone_server.objects(bucket)
    assert [(200, 200), (503, None), (200, 200)] == [(seen.status, seen.upstream_status) for seen in proxy.seen]


def test_a_captive_portal_looks_like_success(proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str) -> None:
    """FACTS 23: boto3 makes an answer without an ETag of it."""
    proxy.on("PUT", "", HTML)

    answer = s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert "ETag" not in answer
    assert {} == rclone_server.objects(bucket)
    assert str(len(HTML_PAGE)) == answer["ResponseMetadata"]["HTTPHeaders"]["content-length"]


def test_a_lost_answer_is_an_error_for_an_object_that_exists(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    proxy.on("PUT", "", LoseAnswer())

    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert {KEY: b"picture"} == rclone_server.objects(bucket)
    seen = proxy.await_ended("PUT")
    assert (200, None) == (seen.upstream_status, seen.status)


def test_a_reset_reaches_the_client_and_not_the_server(proxy: FaultProxy, rclone_server: RcloneServer, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    proxy.on("PUT", "", Reset())

    connection.request("PUT", f"/{bucket}/k", body=b"picture")
    with pytest.raises(ConnectionResetError):
        connection.getresponse()

    assert {} == rclone_server.objects(bucket)
    assert proxy.await_ended("PUT").upstream_status is None
    connection.close()


def test_a_put_can_land_later_than_a_newer_one(proxy: FaultProxy, rclone_server: RcloneServer, bucket: str) -> None:
    """Rule 6 of the contract stands or falls with this."""
    gate = threading.Event()
    proxy.on("PUT", "", Hold(gate), times=1)

    with pytest.raises(ReadTimeoutError):
        rclone_server.client(proxy.endpoint_url, read_timeout_s=0.3).put_object(Bucket=bucket, Key=KEY, Body=b"older")
    rclone_server.client(proxy.endpoint_url).put_object(Bucket=bucket, Key=KEY, Body=b"newer")
    assert {KEY: b"newer"} == rclone_server.objects(bucket)
    gate.set()
    proxy.await_ended("PUT", count=2)

    assert {KEY: b"older"} == rclone_server.objects(bucket)
    older = proxy.requests("PUT")[0]
    assert (200, None) == (older.upstream_status, older.status)


def test_a_held_put_whose_client_was_hung_up_on_still_lands(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    gate = threading.Event()
    proxy.on("PUT", "", Hold(gate, hang_up=True), times=1)

    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"older")
    assert {} == rclone_server.objects(bucket)
    gate.set()
    proxy.await_ended("PUT")

    assert {KEY: b"older"} == rclone_server.objects(bucket)


def test_what_is_held_when_the_proxy_stops_never_lands(rclone_server: RcloneServer, bucket: str) -> None:
    gate = threading.Event()
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        proxy.on("PUT", "", Hold(gate, hang_up=True))
        with pytest.raises(ConnectionClosedError):
            rclone_server.client(proxy.endpoint_url).put_object(Bucket=bucket, Key=KEY, Body=b"older")

    gate.set()
    proxy.await_ended("PUT")

    assert {} == rclone_server.objects(bucket)


def test_a_request_is_delayed_before_the_server_hears_of_it(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    gate = threading.Event()
    proxy.on("PUT", "", Delay(gate), times=1)
    putting = threading.Thread(target=s3.put_object, kwargs={"Bucket": bucket, "Key": KEY, "Body": b"picture"})
    putting.start()

    proxy.await_seen("PUT")
    assert {} == rclone_server.objects(bucket)
    gate.set()
    putting.join()

    assert {KEY: b"picture"} == rclone_server.objects(bucket)


def test_a_delay_can_end_in_another_fault(proxy: FaultProxy, s3: Any, bucket: str) -> None:
    proxy.on("PUT", "", Delay(0.1, then=Answer(503, SLOW_DOWN)))

    with pytest.raises(ClientError, match="SlowDown"):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    seen = proxy.await_ended("PUT")
    assert seen.ended_at is not None and seen.ended_at - seen.at >= 0.1


def test_an_answer_is_delayed_after_the_server_acted(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    gate = threading.Event()
    proxy.on("PUT", "", DelayAnswer(gate))
    putting = threading.Thread(target=s3.put_object, kwargs={"Bucket": bucket, "Key": KEY, "Body": b"picture"})
    putting.start()

    eventually(lambda: {KEY: b"picture"} == rclone_server.objects(bucket))
    assert putting.is_alive()
    gate.set()
    putting.join()

    assert 200 == proxy.await_ended("PUT").status


@pytest.mark.parametrize("name", ["moto_server", "rclone_server"])
def test_a_flipped_byte_is_stored_flipped_and_only_the_etag_tells(name: str, request: pytest.FixtureRequest) -> None:
    """Neither server compares body, signature and checksum (FACTS 22); the sender has to."""
    server: Server = request.getfixturevalue(name)
    bucket = server.create_bucket("flips")
    with FaultProxy(server.endpoint_url) as proxy:
        proxy.on("PUT", "", Flip(offset=2))

        answer = server.client(proxy.endpoint_url).put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert {KEY: b"pibture"} == server.objects(bucket)
    assert f'"{hashlib.md5(b"pibture").hexdigest()}"' == answer["ETag"]


def test_a_byte_flips_on_the_way_back(proxy: FaultProxy, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")
    proxy.on("GET", "", FlipAnswer(offset=-1))

    got = s3.get_object(Bucket=bucket, Key=KEY)["Body"].read()

    assert b"picturd" == got


def test_an_answer_is_cut(proxy: FaultProxy, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    proxy.on("GET", "", CutAnswer(after=10))

    connection.request("GET", f"/{bucket}")
    answer = connection.getresponse()
    with pytest.raises(http.client.IncompleteRead) as cut:
        answer.read()

    assert 10 == len(cut.value.partial)
    connection.close()


def test_headers_of_an_answer_are_rewritten(proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str) -> None:
    proxy.on("PUT", "", RewriteAnswer({"etag": None, "x-amz-id.*": None, "x-amz-version-id": "7"}))

    answer = s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert "ETag" not in answer
    assert "7" == answer["VersionId"]
    assert {KEY: b"picture"} == rclone_server.objects(bucket)


def test_the_proxy_goes_away_and_comes_back(proxy: FaultProxy, s3: Any, bucket: str) -> None:
    proxy.go_away()
    with pytest.raises(EndpointConnectionError):
        s3.list_objects_v2(Bucket=bucket)

    proxy.come_back()

    assert bucket == s3.list_objects_v2(Bucket=bucket)["Name"]


def test_a_server_that_is_away_is_a_reset_behind_the_proxy(
    proxy: FaultProxy, s3: Any, rclone_server: RcloneServer, bucket: str
) -> None:
    rclone_server.stop()
    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    rclone_server.start()
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"picture")

    assert {KEY: b"picture"} == rclone_server.objects(bucket)


# The app.


def test_pictures_are_the_same_each_time_and_another_for_another_seed() -> None:
    again = picture.__wrapped__(640, 480, seed=7)

    assert picture(640, 480, seed=7) == again
    assert picture(640, 480, seed=8) != again
    assert (640, 480) == Image.open(io.BytesIO(again)).size


def test_styles_have_their_sizes_and_the_originals_format() -> None:
    styles = styles_of(picture(1200, 900, format="PNG"))

    images = {style: Image.open(io.BytesIO(content)) for style, content in styles.items()}
    assert ["original", *STYLES] == list(styles)
    assert {"PNG"} == {image.format for image in images.values()}
    sizes = [image.size for image in images.values()]
    assert [(1200, 900), (800, 600), (300, 225), (100, 100), (50, 50), (25, 25)] == sizes


@pytest.mark.parametrize("how", ["rename", "copy", "close_before_rename"])
def test_the_app_writes_every_style_to_its_place(app: App, how: Any) -> None:
    styles = styles_of(picture(400, 300))

    paths = app.save("avatars", 42, "me.jpg", styles, how=how)

    assert app.root / "avatars/42/original/me.jpg" == paths["original"]
    assert styles == {style: path.read_bytes() for style, path in paths.items()}
    assert {0o644} == {path.stat().st_mode & 0o777 for path in paths.values()}


def test_a_renamed_file_is_still_open_until_all_have_their_names(app: App) -> None:
    """FACTS 2: all renames and chmods first, then CLOSE_WRITE for every style."""
    opened: dict[str, bool] = {}

    def look(step: str) -> None:
        opened[step] = has_writer(app.path_of("avatars", 1, step.split()[0], "me.jpg"))

    app.save("avatars", 1, "me.jpg", {"original": b"o", "thumb": b"t"}, between=look)
    app.save("avatars", 2, "me.jpg", {"original": b"o"}, how="close_before_rename")

    steps = ["original named", "original chmodded", "thumb named", "thumb chmodded"]
    assert dict.fromkeys(steps, True) == opened
    assert not has_writer(app.path_of("avatars", 1, "original", "me.jpg"))
    assert not has_writer(app.path_of("avatars", 2, "original", "me.jpg"))


def test_a_copied_file_is_half_there_and_then_looks_old(app: App) -> None:
    path = app.path_of("avatars", 1, "original", "me.jpg")
    sizes = set[int]()
    copying = threading.Thread(
        target=app.save, args=("avatars", 1, "me.jpg", {"original": b"x" * 400}), kwargs={"how": "copy", "slow": 0.05}
    )
    copying.start()
    while copying.is_alive():
        sizes.add(path.stat().st_size if path.exists() else 0)
        time.sleep(0.005)

    assert {100, 200, 300} <= sizes
    status = path.stat()
    assert status.st_mtime < time.time() - 365 * 86400
    assert status.st_ctime > time.time() - 60


def test_a_file_that_goes_between_rename_and_chmod_breaks_the_request(app: App) -> None:
    """FACTS 3."""
    path = app.path_of("avatars", 1, "original", "me.jpg")

    with pytest.raises(FileNotFoundError):
        app.save("avatars", 1, "me.jpg", {"original": b"o"}, between=lambda _: path.unlink())


def test_replacing_removes_the_record_and_makes_it_anew(app: App) -> None:
    app.save("avatars", 1, "me.jpg", {"original": b"o", "thumb": b"t"})
    before = (app.root / "avatars/1").stat().st_ino
    pin = os.open(app.root / "avatars/1", os.O_RDONLY)  # so that the number is not given out again

    app.replace("avatars", 1, "me.jpg", "you.jpg", {"original": b"O"})

    os.close(pin)
    assert before != (app.root / "avatars/1").stat().st_ino
    assert [app.root / "avatars/1/original/you.jpg"] == [path for path in app.root.rglob("*") if path.is_file()]


def test_destroying_the_last_record_takes_the_root_with_it(app: App, tmp_path: Path) -> None:
    """FACTS 6: Paperclip prunes with no floor; a file in the root keeps it."""
    app.save("avatars", 1, "me.jpg", {"original": b"o"})
    app.destroy("avatars", 1, "me.jpg")
    assert not app.root.exists()
    assert tmp_path.exists()

    app.save("avatars", 1, "me.jpg", {"original": b"o"})
    (app.root / "keep").touch()
    app.destroy("avatars", 1, "me.jpg")

    assert ["keep"] == [path.name for path in app.root.iterdir()]


def test_a_file_is_held_open_for_writing(app: App) -> None:
    path = app.save("avatars", 1, "me.jpg", {"original": b"old"})["original"]

    with app.hold_open(path) as file:
        assert has_writer(path)
        file.write(b"new")

    assert not has_writer(path)
    assert b"new" == path.read_bytes()


# Helpers.


def eventually(is_so: Callable[[], bool], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that waits to be reaped does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def has_writer(path: Path) -> bool:
    """Ask the kernel for a read lease (FACTS 15)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
