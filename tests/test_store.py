"""The store against moto, rclone and a server that answers as the test says.

What the servers really answer (moto 5.2.5, rclone 1.75.2, November 2026):

| | moto | rclone |
| --- | --- | --- |
| wrong Content-MD5 | takes it | BadDigest |
| wrong checksum | takes it | takes it |
| checksum in the answer to PutObject, UploadPart, Complete | none | none |
| checksum in HEAD, one part | none | what was sent, right or wrong |
| checksum in HEAD, in parts | the right one, but CRC32 for crc32c; no "-N" if composite | none, but FULL_OBJECT |
| ETag of one part, also under aws:kms | MD5 | MD5 |
| ETag of parts in Complete | MD5 of MD5s, "-N" | MD5 of MD5s, "-N" |
| ETag of parts in HEAD | the same | MD5 of the whole: another one |
| version_id in Complete | "null" | none |

So ETags prove what is put to either; checksums that are echoed, as S3 does, are proven against the scripted server.
"""

from __future__ import annotations

import base64
import contextlib
import email.message
import hashlib
import http.client
import http.server
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spoold.digest import ALGORITHMS, Digester, checksum_of
from spoold.errors import Changed, ObjectRefused, SpooldError, StoreDenied, StoreUnavailable, Unproven
from spoold.model import Digests, Headers, StoredObject
from spoold.store import PROBE, Store, confirms
from tests.servers import MotoServer, RcloneServer, Server

BUCKET = "some-bucket"
KEY = "avatars/42/original/cat.jpg"
BODY = b"a cat"
MD5 = hashlib.md5(BODY).hexdigest()
JPEG = Headers(content_type="image/jpeg")
PART_BYTES = 5 << 20


def digests_of(body: bytes, algorithm: str = "crc32") -> Digests:
    digester = Digester(algorithm)
    digester.update(body)
    return digester.digests()


def put(store: Store, body: bytes = BODY, *, key: str = KEY, algorithm: str = "crc32") -> StoredObject:
    return store.put(BUCKET, key, body, JPEG, digests_of(body, algorithm))


def put_parts(
    store: Store, parts: list[bytes], *, algorithm: str = "crc32", bucket: str = BUCKET, on_upload: Any = None
) -> StoredObject:
    digests = digests_of(b"".join(parts), algorithm)
    return store.put_parts(bucket, KEY, iter(parts), JPEG, digests, on_upload=on_upload or (lambda _: None))


# A server that answers as told


@dataclass(frozen=True)
class Reply:
    """One answer. status 0: the connection is reset; -1: no answer at all."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def confirmed(body: bytes = BODY, **headers: str) -> Reply:
    """As S3 confirms a PUT. headers: besides ETag, with _ for -."""
    etag = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
    return Reply(headers=etag | {name.replace("_", "-"): value for name, value in headers.items()})


def found(body: bytes) -> Reply:
    """As S3 answers a GET."""
    return replace(confirmed(body), body=body)


def error(status: int, code: str, message: str = "", **headers: str) -> Reply:
    """As S3 refuses."""
    document = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, {"Content-Type": "application/xml"} | headers, document.encode())


PAGE = Reply(headers={"Content-Type": "text/html"}, body=b"<html><body>Please log in<br></body></html>")
XHTML = replace(PAGE, body=b"<html><body>Please log in</body></html>")
TEXT = replace(PAGE, headers={"Content-Type": "text/plain"}, body=b"Please log in")
RESET = Reply(status=0)
SILENCE = Reply(status=-1)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: email.message.Message
    body: bytes


class ScriptedServer(http.server.ThreadingHTTPServer):
    """Answers the n-th request with the n-th reply, and keeps what was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[Request] = []
        self.asked_to_continue = 0
        self.is_over = threading.Event()
        super().__init__(("127.0.0.1", 0), ScriptedHandler)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answers(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    @property
    def methods(self) -> list[str]:
        return [request.method for request in self.requests]

    def handle_error(self, *_: object) -> None:
        """A client that went away is what many tests are about."""


class ScriptedHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(Request(self.command, self.path, self.headers, body))
        reply = self.server.replies.pop(0)
        if reply.status == -1:
            self.server.is_over.wait()
        if reply.status <= 0:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once, and without the polite FIN
            self.close_connection = True
            return
        self.send_response_only(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_PUT = do_GET = do_HEAD = do_POST = do_DELETE = answer

    def handle_expect_100(self) -> bool:
        self.server.asked_to_continue += 1
        return super().handle_expect_100()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as server:
        yield server


@contextlib.contextmanager
def serving(server: ScriptedServer) -> Iterator[ScriptedServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def store(server: ScriptedServer) -> Iterator[Store]:
    """A store whose server answers as told."""
    with contextlib.closing(store_of(server.endpoint_url)) as store:
        yield store


def store_of(endpoint_url: str, **settings: Any) -> Store:
    return Store(endpoint_url=endpoint_url, **{"connect_timeout_s": 5, "read_timeout_s": 5} | settings)


# Real servers


@pytest.fixture(params=["moto", "rclone"])
def real(request: pytest.FixtureRequest) -> Server:
    server: MotoServer | RcloneServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def bucket(real: Server) -> str:
    return real.create_bucket(f"bucket-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def real_store(real: Server) -> Iterator[Store]:
    with contextlib.closing(store_of(real.endpoint_url)) as store:
        yield store


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_what_was_put_is_there(real: Server, bucket: str, algorithm: str) -> None:
    digests = digests_of(BODY, algorithm)

    with contextlib.closing(store_of(real.endpoint_url, checksum=algorithm)) as store:
        stored = store.put(bucket, KEY, BODY, JPEG, digests)

        assert {KEY: BODY} == real.objects(bucket)
        assert (bucket, KEY, len(BODY), "image/jpeg", MD5) == (
            stored.bucket,
            stored.key,
            stored.size,
            stored.content_type,
            stored.etag,
        )
        assert digests == store.digest(bucket, KEY)
        looked_up = store.head(bucket, KEY)
        assert looked_up is not None
        assert (len(BODY), "image/jpeg", MD5) == (looked_up.size, looked_up.content_type, looked_up.etag)
        assert confirms(looked_up, digests)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_what_came_in_parts_is_there(real: Server, bucket: str, algorithm: str) -> None:
    """Both servers give MD5-of-MD5s, so nothing needs to be read back."""
    parts = [b"a" * PART_BYTES, b"b" * PART_BYTES, b"c"]
    uploads: list[str] = []

    with contextlib.closing(store_of(real.endpoint_url, checksum=algorithm)) as store:
        stored = put_parts(store, parts, algorithm=algorithm, bucket=bucket, on_upload=uploads.append)

        assert {KEY: b"".join(parts)} == real.objects(bucket)
        assert stored.etag.endswith("-3")
        assert len(b"".join(parts)) == stored.size
        assert 1 == len(uploads)
        assert digests_of(b"".join(parts), algorithm) == store.digest(bucket, KEY, version_id=stored.version_id)
        looked_up = store.head(bucket, KEY)
        assert looked_up is not None
        if (algorithm, type(real)) != ("crc32c", MotoServer):
            assert confirms(looked_up, digests_of(b"".join(parts), algorithm)) is not False


@pytest.mark.parametrize(
    "key",
    [
        "-dash.jpg",
        "quo\"te'`$x",
        "tab\tx",
        "new\nline",
        "Ünïcode/e\u0301/😀",
        "noext.",
        ".dot",
        " space ",
        "a+b%20c",
        "a?b#c&d=e",
        "back\\slash",
        "*",
        "<&>",
        "\x01\x7f",
        "a//b",
        "/lead",
        "a/../b",
        "a/./b",
        "..",
        "/".join(["y" * 203] * 5) + "/" + "z" * 4,
    ],
)
def test_odd_keys_come_back_as_they_are(real: Server, bucket: str, real_store: Store, key: str) -> None:
    """moto has no route for a newline (404), rclone no file for an empty or a dotted component (InvalidArgument)."""
    if isinstance(real, MotoServer) and "\n" in key:
        pytest.skip("moto answers 404")
    if isinstance(real, RcloneServer) and {"", ".", ".."} & set(key.split("/")):
        with pytest.raises(ObjectRefused, match="400 InvalidArgument"):
            real_store.put(bucket, key, BODY, JPEG, digests_of(BODY))
        return

    real_store.put(bucket, key, BODY, JPEG, digests_of(BODY))

    assert {key: BODY} == real.objects(bucket)
    assert digests_of(BODY) == real_store.digest(bucket, key)
    assert real_store.head(bucket, key) is not None
    real_store.delete(bucket, key)
    assert real_store.head(bucket, key) is None


def test_a_key_of_1024_bytes_is_taken_and_one_more_is_refused(rclone_server: RcloneServer) -> None:
    """moto takes both (FACTS 22)."""
    bucket = rclone_server.create_bucket(BUCKET)
    longest = "/".join(["ü" * 102] * 4) + "/" + "z" * 204

    with contextlib.closing(store_of(rclone_server.endpoint_url)) as store:
        put(store, key=longest)
        with pytest.raises(ObjectRefused, match="400 KeyTooLongError") as caught:
            put(store, key=longest + "z")

    assert {longest: BODY} == rclone_server.objects(bucket)
    assert 1024 == len(longest.encode())
    assert "a key has at most 1024 bytes" == caught.value.hint


def test_everything_kept_with_an_object_is_sent(moto_server: MotoServer) -> None:
    bucket = moto_server.create_bucket(f"bucket-{uuid.uuid4().hex[:12]}")
    headers = Headers(
        content_type="image/png",
        acl="public-read",
        cache_control="max-age=60",
        storage_class="STANDARD_IA",
        server_side_encryption="AES256",
        tags=(("kind", "a + b"), ("who", "Zoë")),
        metadata=(("origin", "spool"),),
    )

    with contextlib.closing(store_of(moto_server.endpoint_url)) as store:
        store.put(bucket, KEY, BODY, headers, digests_of(BODY))

    s3 = moto_server.client()
    kept = s3.head_object(Bucket=bucket, Key=KEY)
    assert ("image/png", "max-age=60", "STANDARD_IA", "AES256", {"origin": "spool"}) == (
        kept["ContentType"],
        kept["CacheControl"],
        kept["StorageClass"],
        kept["ServerSideEncryption"],
        kept["Metadata"],
    )
    tags = s3.get_object_tagging(Bucket=bucket, Key=KEY)["TagSet"]
    assert {"kind": "a + b", "who": "Zoë"} == {tag["Key"]: tag["Value"] for tag in tags}
    grantees = [grant["Grantee"].get("URI", "") for grant in s3.get_object_acl(Bucket=bucket, Key=KEY)["Grants"]]
    assert any(grantee.endswith("AllUsers") for grantee in grantees)


def test_what_is_not_there_is_none_to_look_up_and_fine_to_delete(bucket: str, real_store: Store) -> None:
    assert real_store.head(bucket, "nothing") is None
    assert real_store.digest(bucket, "nothing") is None
    real_store.delete(bucket, "nothing")
    real_store.abort(bucket, "nothing", "no-upload")


def test_a_bucket_that_is_not_there_is_denied(real_store: Store) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: put(real_store),
        lambda: put_parts(real_store, [BODY]),
        lambda: real_store.digest(BUCKET, KEY),
        lambda: real_store.delete(BUCKET, KEY),
    ]
    for verb in verbs:
        with pytest.raises(StoreDenied, match="404 NoSuchBucket") as caught:
            verb()
        assert "create the bucket, or correct its name" == caught.value.hint


def test_a_probe_leaves_nothing(real: Server, bucket: str, real_store: Store) -> None:
    real_store.probe(bucket, ".spoold-probe", replace(JPEG, metadata=(("a", "b"),)))

    assert {} == real.objects(bucket)


def test_an_iterator_that_fails_aborts_the_upload(real: Server, bucket: str, real_store: Store) -> None:
    def parts() -> Iterator[bytes]:
        yield b"a" * PART_BYTES
        raise Changed("the file moved")

    with pytest.raises(Changed, match="the file moved"):
        real_store.put_parts(bucket, KEY, parts(), JPEG, digests_of(BODY), on_upload=lambda _: None)

    assert [] == real.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert real_store.head(bucket, KEY) is None


def test_parts_that_are_not_what_was_hashed_become_no_object(real: Server, bucket: str, real_store: Store) -> None:
    """Their ETag would prove that the wrong bytes arrived well, on a server that verifies nothing else."""
    with pytest.raises(Changed):
        real_store.put_parts(bucket, KEY, [b"a dog"], JPEG, digests_of(BODY), on_upload=lambda _: None)

    assert [] == real.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert real_store.head(bucket, KEY) is None


def test_a_wrong_secret_is_denied(rclone_server: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rclone_server.create_bucket(BUCKET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")

    with (
        contextlib.closing(store_of(rclone_server.endpoint_url)) as store,
        pytest.raises(StoreDenied, match="403 SignatureDoesNotMatch") as caught,
    ):
        put(store)

    assert "not-the-secret" not in str(caught.value) + caught.value.hint


def test_bytes_damaged_on_the_way_are_refused_by_their_md5(rclone_server: RcloneServer) -> None:
    """checksum "none": old servers verify Content-MD5 and nothing else."""
    rclone_server.create_bucket(BUCKET)

    with (
        contextlib.closing(store_of(rclone_server.endpoint_url, checksum="none")) as store,
        pytest.raises(Unproven, match="400 BadDigest"),
    ):
        store.put(BUCKET, KEY, b"a dog", JPEG, digests_of(BODY, "none"))

    assert {} == rclone_server.objects(BUCKET)


@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_bytes_damaged_on_the_way_are_noticed_by_their_etag(rclone_server: RcloneServer, algorithm: str) -> None:
    """rclone takes any checksum, and its HEAD repeats it: only the ETag tells."""
    rclone_server.create_bucket(BUCKET)
    digests = digests_of(BODY, algorithm)

    with contextlib.closing(store_of(rclone_server.endpoint_url, checksum=algorithm)) as store:
        with pytest.raises(Unproven, match="other content"):
            store.put(BUCKET, KEY, b"a dog", JPEG, digests)

        looked_up = store.head(BUCKET, KEY)
    assert looked_up is not None
    assert digests.checksum == looked_up.checksum
    assert confirms(looked_up, digests) is None


# Proof


def test_an_echoed_checksum_and_an_etag_prove_it_at_once(store: Store, server: ScriptedServer) -> None:
    crc = checksum_of(BODY, "crc32")
    server.answers(confirmed(x_amz_checksum_crc32=crc, x_amz_version_id="v1"))

    stored = put(store)

    assert StoredObject(BUCKET, KEY, len(BODY), "image/jpeg", MD5, "crc32", crc, "v1") == stored
    assert ["PUT"] == server.methods


def test_an_md5_etag_alone_proves_it(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed())

    stored = put(store)

    assert (MD5, None, None) == (stored.etag, stored.checksum_algorithm, stored.checksum)
    assert ["PUT"] == server.methods


def test_a_checksum_in_another_algorithm_is_kept_but_proves_nothing(store: Store, server: ScriptedServer) -> None:
    """S3 gives CRC64NVME for what came without a checksum."""
    server.answers(confirmed(x_amz_checksum_crc64nvme="AAAAAAAAAAA="))

    stored = put(store, algorithm="none")

    assert ("crc64nvme", "AAAAAAAAAAA=") == (stored.checksum_algorithm, stored.checksum)


def test_an_echoed_checksum_that_differs_proves_the_contrary(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed(x_amz_checksum_crc32="AAAAAA=="))

    with pytest.raises(Unproven, match=f"put {KEY}: crc32 AAAAAA== came back for"):
        put(store)


def test_an_etag_that_differs_is_settled_by_reading_back(store: Store, server: ScriptedServer) -> None:
    """Servers whose ETags are no MD5 at all look like this too."""
    server.answers(confirmed(b"whatever"), found(BODY))
    put(store)

    server.answers(confirmed(b"a dog"), found(b"a dog"))
    with pytest.raises(Unproven, match=r"other content \(5 of 5 bytes\) was read back"):
        put(store)

    assert ["PUT", "GET", "PUT", "GET"] == server.methods


def test_an_etag_that_differs_outweighs_an_equal_checksum(store: Store, server: ScriptedServer) -> None:
    """The server may have repeated the checksum without looking at the bytes."""
    server.answers(confirmed(b"a dog", x_amz_checksum_crc32=checksum_of(BODY, "crc32")), found(b"a dog"))

    with pytest.raises(Unproven, match="other content"):
        put(store)


@pytest.mark.parametrize(
    "encrypted",
    [
        {"x_amz_server_side_encryption": "aws:kms"},
        {"x_amz_server_side_encryption": "aws:kms:dsse"},
        {"x_amz_server_side_encryption_customer_algorithm": "AES256"},
    ],
)
def test_the_etag_of_an_encrypted_object_is_not_compared(
    store: Store, server: ScriptedServer, encrypted: dict[str, str]
) -> None:
    server.answers(confirmed(b"random", **encrypted, x_amz_checksum_crc32=checksum_of(BODY, "crc32")))
    put(store)
    assert ["PUT"] == server.methods

    server.answers(confirmed(BODY, **encrypted), found(BODY))
    put(store)
    assert ["PUT", "PUT", "GET"] == server.methods


def test_an_object_with_s3s_own_encryption_has_an_md5_etag(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed(x_amz_server_side_encryption="AES256"))

    put(store)

    assert ["PUT"] == server.methods


def test_the_version_that_was_put_is_read_back(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed(b"whatever", x_amz_version_id="v7"), found(BODY))

    put(store)

    assert server.requests[1].path.endswith("?versionId=v7")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (error(403, "AccessDenied"), "403 AccessDenied"),
        (error(404, "NoSuchKey"), "nothing was read back"),
        (error(503, "SlowDown"), "503 SlowDown"),
        (RESET, "ConnectionClosedError"),
        (PAGE, "without ETag"),
        (Reply(headers={"ETag": '"1"', "Content-Length": "9"}, body=b"short"), "Incomplete|Streaming|ReadTimeout"),
    ],
)
def test_what_cannot_be_read_back_is_unproven(server: ScriptedServer, answer: Reply, says: str) -> None:
    """Not denied, not "never sent": the object is there, and the next try puts it again."""
    server.answers(confirmed(b"whatever"), answer)

    with (
        contextlib.closing(store_of(server.endpoint_url, read_timeout_s=0.3)) as store,
        pytest.raises(Unproven, match=says),
    ):
        put(store)


@pytest.mark.parametrize("answer", [Reply(), Reply(headers={"ETag": '""'}), Reply(headers={"ETag": ""})])
def test_a_yes_without_an_etag_proves_nothing(store: Store, server: ScriptedServer, answer: Reply) -> None:
    server.answers(answer)

    with pytest.raises(Unproven, match=r"put .*: 200 without ETag proves nothing") as caught:
        put(store)

    assert "proxy" in caught.value.hint


@pytest.mark.parametrize("page", [PAGE, XHTML, TEXT], ids=["html", "xhtml", "text"])
def test_a_page_is_no_answer_to_any_verb(store: Store, server: ScriptedServer, page: Reply) -> None:
    """A captive portal says 200 to anything (FACTS 23); botocore makes {} of one that is XML, a 500 of others."""
    verbs: list[Callable[[], object]] = [
        lambda: store.head(BUCKET, KEY),
        lambda: store.digest(BUCKET, KEY),
        lambda: store.delete(BUCKET, KEY),
        lambda: store.abort(BUCKET, KEY, "upload"),
        lambda: store.probe(BUCKET, KEY, JPEG),
        lambda: put_parts(store, [BODY]),
    ]
    for verb in verbs:
        server.answers(page)
        with pytest.raises(Unproven) as caught:
            verb()
        assert "proxy" in caught.value.hint


DIGESTS = digests_of(BODY)
STORED = StoredObject(BUCKET, KEY, len(BODY), "image/jpeg", MD5, "crc32", DIGESTS.checksum)


@pytest.mark.parametrize(
    ("stored", "answer"),
    [
        (STORED, True),
        (replace(STORED, checksum_algorithm=None, checksum=None), True),
        (replace(STORED, checksum_algorithm="sha256", checksum="other"), True),
        (replace(STORED, etag=MD5.upper()), True),
        (replace(STORED, etag="opaque"), True),
        (replace(STORED, etag="opaque", checksum_algorithm=None, checksum=None), None),
        (replace(STORED, etag="0" * 32), None),
        (replace(STORED, etag="0" * 32, checksum_algorithm=None, checksum=None), None),
        (replace(STORED, etag=f"{MD5}-1", checksum=f"{DIGESTS.checksum}-1"), None),
        (replace(STORED, checksum="AAAAAA=="), False),
        (replace(STORED, size=6), False),
    ],
)
def test_confirms_tells_equal_from_different_from_unknown(stored: StoredObject, answer: bool | None) -> None:
    assert answer is confirms(stored, DIGESTS)


# Parts


def complete(etag: str, more: str = "") -> Reply:
    """As S3 ends a multipart upload."""
    xml = f"<CompleteMultipartUploadResult><ETag>&quot;{etag}&quot;</ETag>{more}</CompleteMultipartUploadResult>"
    return Reply(headers={"Content-Type": "application/xml"}, body=xml.encode())


BEGUN = Reply(
    headers={"Content-Type": "application/xml"},
    body=b"<InitiateMultipartUploadResult><UploadId>up</UploadId></InitiateMultipartUploadResult>",
)
GONE = Reply(204)
MD5_OF_MD5 = hashlib.md5(bytes.fromhex(MD5)).hexdigest() + "-1"
COMPOSITE = checksum_of(base64.b64decode(checksum_of(BODY, "sha256")), "sha256") + "-1"


@pytest.mark.parametrize(
    ("algorithm", "answer"),
    [
        ("crc32", complete(MD5_OF_MD5)),
        ("crc32", complete(MD5)),
        ("crc32", complete("opaque", f"<ChecksumCRC32>{checksum_of(BODY, 'crc32')}</ChecksumCRC32>")),
        ("crc64nvme", complete("opaque", f"<ChecksumCRC64NVME>{checksum_of(BODY, 'crc64nvme')}</ChecksumCRC64NVME>")),
        ("sha256", complete("opaque", f"<ChecksumSHA256>{COMPOSITE}</ChecksumSHA256>")),
        ("none", complete(MD5_OF_MD5)),
    ],
)
def test_parts_are_proven_by_any_digest_of_theirs(server: ScriptedServer, algorithm: str, answer: Reply) -> None:
    server.answers(BEGUN, confirmed(), answer)

    with contextlib.closing(store_of(server.endpoint_url, checksum=algorithm)) as store:
        put_parts(store, [BODY], algorithm=algorithm)

    assert ["POST", "PUT", "POST"] == server.methods


@pytest.mark.parametrize(
    "answer",
    [
        complete("opaque"),
        complete(hashlib.md5(b"other").hexdigest() + "-1"),
        complete("opaque", "<ChecksumCRC32>AAAAAA==</ChecksumCRC32>"),
        complete("opaque", "<ChecksumSHA256>AAAA-1</ChecksumSHA256>"),
    ],
)
def test_parts_that_nothing_proves_are_read_back(store: Store, server: ScriptedServer, answer: Reply) -> None:
    server.answers(BEGUN, confirmed(), answer, found(BODY))
    put_parts(store, [BODY])

    server.answers(BEGUN, confirmed(), answer, found(b"a dog"))
    with pytest.raises(Unproven, match="other content"):
        put_parts(store, [BODY])

    assert ["POST", "PUT", "POST", "GET"] * 2 == server.methods


def test_s3_is_asked_for_a_checksum_of_the_whole_where_it_can_give_one(store: Store, server: ScriptedServer) -> None:
    server.answers(BEGUN, confirmed(), complete(MD5_OF_MD5))

    put_parts(store, [BODY])

    create, part, end = server.requests
    assert ("CRC32", "FULL_OBJECT") == (
        create.headers["x-amz-checksum-algorithm"],
        create.headers["x-amz-checksum-type"],
    )
    crc = checksum_of(BODY, "crc32")
    assert crc == part.headers["x-amz-checksum-crc32"]
    assert (crc, "FULL_OBJECT") == (end.headers["x-amz-checksum-crc32"], end.headers["x-amz-checksum-type"])
    assert f"<ChecksumCRC32>{crc}</ChecksumCRC32>".encode() in end.body


def test_sha256_of_parts_is_asked_for_as_composite(store: Store, server: ScriptedServer) -> None:
    """S3 cannot give SHA-256 of the whole (FACTS 25)."""
    server.answers(BEGUN, confirmed(), complete(MD5_OF_MD5))

    put_parts(store, [BODY], algorithm="sha256")

    create, part, end = server.requests
    assert ("SHA256", "COMPOSITE") == (
        create.headers["x-amz-checksum-algorithm"],
        create.headers["x-amz-checksum-type"],
    )
    assert checksum_of(BODY, "sha256") == part.headers["x-amz-checksum-sha256"]
    assert end.headers["x-amz-checksum-sha256"] is None


def test_the_upload_is_written_down_before_the_first_part(store: Store, server: ScriptedServer) -> None:
    server.answers(BEGUN, confirmed(), complete(MD5_OF_MD5))
    seen: list[tuple[str, list[str]]] = []

    put_parts(store, [BODY], on_upload=lambda upload_id: seen.append((upload_id, server.methods)))

    assert [("up", ["POST"])] == seen


def test_an_upload_that_cannot_be_written_down_is_aborted(store: Store, server: ScriptedServer) -> None:
    server.answers(BEGUN, GONE)

    def on_upload(upload_id: str) -> None:
        raise RuntimeError("the ledger is locked")

    with pytest.raises(RuntimeError, match="the ledger is locked"):
        put_parts(store, [BODY], on_upload=on_upload)

    assert ["POST", "DELETE"] == server.methods
    assert server.requests[1].path.endswith("?uploadId=up")


@pytest.mark.parametrize(
    "answer",
    [error(500, "InternalError"), RESET, error(403, "AccessDenied"), error(404, "NoSuchUpload"), Reply(), PAGE],
)
def test_a_part_that_fails_aborts_the_upload(store: Store, server: ScriptedServer, answer: Reply) -> None:
    server.answers(BEGUN, answer, GONE)

    with pytest.raises(SpooldError):
        put_parts(store, [BODY])

    assert ["POST", "PUT", "DELETE"] == server.methods


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (error(500, "InternalError"), StoreUnavailable),
        (error(200, "InternalError"), StoreUnavailable),
        (error(200, "SlowDown"), StoreUnavailable),
        (error(200, "AccessDenied"), StoreDenied),
        (error(400, "BadDigest"), Unproven),
        (error(400, "InvalidPart"), Unproven),
        (error(400, "EntityTooSmall"), ObjectRefused),
        (RESET, StoreUnavailable),
        (PAGE, Unproven),
        (Reply(headers={"Content-Type": "application/xml"}, body=b"<CompleteMultipartUploadResult/>"), Unproven),
    ],
)
def test_a_completion_that_fails_aborts_the_upload(
    store: Store, server: ScriptedServer, answer: Reply, fault: type[SpooldError]
) -> None:
    """S3 says 200 before it knows, and the error follows in the body."""
    server.answers(BEGUN, confirmed(), answer, GONE)

    with pytest.raises(fault):
        put_parts(store, [BODY])

    assert ["POST", "PUT", "POST", "DELETE"] == server.methods


def test_an_abort_that_fails_does_not_hide_why(store: Store, server: ScriptedServer) -> None:
    server.answers(BEGUN, error(503, "SlowDown"), error(500, "InternalError"))

    with pytest.raises(StoreUnavailable, match="503 SlowDown"):
        put_parts(store, [BODY])


def test_without_completion_no_object_can_have_come_to_be(store: Store, server: ScriptedServer) -> None:
    """So nothing is in doubt before it (contract, section 6, rule 6), and everything from then on."""
    for answers in ([RESET], [BEGUN, RESET, GONE]):
        server.answers(*answers)
        with pytest.raises(StoreUnavailable) as caught:
            put_parts(store, [BODY])
        assert caught.value.never_sent

    server.answers(BEGUN, confirmed(), RESET, GONE)
    with pytest.raises(StoreUnavailable) as caught:
        put_parts(store, [BODY])
    assert not caught.value.never_sent


def test_a_fault_of_the_file_is_not_taken_for_one_of_the_store(store: Store, server: ScriptedServer) -> None:
    server.answers(BEGUN, GONE)

    def parts() -> Iterator[bytes]:
        raise OSError(5, "Input/output error")
        yield b""

    with pytest.raises(OSError, match="Input/output error"):
        store.put_parts(BUCKET, KEY, parts(), JPEG, DIGESTS, on_upload=lambda _: None)


# What is sent


def test_one_digest_is_sent_and_no_other(store: Store, server: ScriptedServer) -> None:
    """R2 refuses two; others refuse trailing checksums (FACTS 25)."""
    server.answers(confirmed(), confirmed())

    put(store, algorithm="crc32")
    put(store, algorithm="none")

    with_crc, with_md5 = (request.headers for request in server.requests)
    assert [checksum_of(BODY, "crc32")] == with_crc.get_all("x-amz-checksum-crc32")
    assert with_crc["Content-MD5"] is None
    assert base64.b64encode(bytes.fromhex(MD5)).decode() == with_md5["Content-MD5"]
    for headers in (with_crc, with_md5):
        assert headers["x-amz-trailer"] is None
        assert headers["Content-Encoding"] is None
        assert hashlib.sha256(BODY).hexdigest() == headers["x-amz-content-sha256"]
    assert not [name for name in with_md5 if name.lower().startswith(("x-amz-checksum", "x-amz-sdk-checksum"))]


def test_nothing_that_is_not_set_is_sent(store: Store, server: ScriptedServer) -> None:
    """Buckets with ACLs disabled refuse any (FACTS 26)."""
    server.answers(confirmed())

    put(store)

    headers = {name.lower() for name in server.requests[0].headers}
    assert not headers & {"x-amz-acl", "cache-control", "x-amz-storage-class", "x-amz-tagging"}
    assert not headers & {"x-amz-server-side-encryption"}


def test_a_small_body_does_not_wait_to_be_asked_for(store: Store, server: ScriptedServer) -> None:
    """100-continue costs a round trip; a large body that would be refused costs more."""
    server.answers(confirmed(), confirmed(b"x" * (2 << 20)))

    put(store)
    assert 0 == server.asked_to_continue

    put(store, b"x" * (2 << 20))
    assert 1 == server.asked_to_continue


def test_checksums_are_looked_up_where_they_are_in_use(server: ScriptedServer) -> None:
    server.answers(confirmed(), confirmed())

    for algorithm, mode in (("crc32", "ENABLED"), ("none", None)):
        with contextlib.closing(store_of(server.endpoint_url, checksum=algorithm)) as store:
            store.head(BUCKET, KEY)
        assert mode == server.requests[-1].headers["x-amz-checksum-mode"]


def test_one_request_is_one_request(store: Store, server: ScriptedServer) -> None:
    """One retry loop owns the decision, and it is not here (FACTS 24)."""
    server.answers(error(503, "SlowDown"))

    with pytest.raises(StoreUnavailable):
        put(store)

    assert 1 == len(server.requests)


def test_a_page_that_claims_to_be_zipped_is_read_as_it_is(store: Store, server: ScriptedServer) -> None:
    """The bytes that were put are those that count, whatever Content-Encoding says."""
    stored = replace(found(BODY), headers=found(BODY).headers | {"Content-Encoding": "gzip"})
    server.answers(stored)

    assert DIGESTS == store.digest(BUCKET, KEY)


# Faults that were answered

MAPPED: list[tuple[int, str, type[SpooldError], str]] = [
    (403, "AccessDenied", StoreDenied, "the credentials need s3:PutObject"),
    (404, "NoSuchBucket", StoreDenied, "create the bucket"),
    (403, "InvalidAccessKeyId", StoreDenied, "renew the credentials"),
    (403, "SignatureDoesNotMatch", StoreDenied, "secret key"),
    (400, "ExpiredToken", StoreDenied, "renew the credentials"),
    (400, "InvalidToken", StoreDenied, "renew the credentials"),
    (400, "TokenRefreshRequired", StoreDenied, "renew the credentials"),
    (403, "RequestTimeTooSkewed", StoreDenied, "clock"),
    (400, "RequestExpired", StoreDenied, "clock"),
    (403, "AccountProblem", StoreDenied, "account"),
    (403, "AllAccessDisabled", StoreDenied, "account"),
    (301, "PermanentRedirect", StoreDenied, "set s3.region"),
    (400, "AuthorizationHeaderMalformed", StoreDenied, "set s3.region"),
    (400, "IllegalLocationConstraintException", StoreDenied, "set s3.region"),
    (403, "InvalidSecurity", StoreDenied, "renew the credentials"),
    (403, "NotSignedUp", StoreDenied, "account"),
    (405, "MethodNotAllowed", StoreDenied, "proxy"),
    (400, "InvalidBucketName", StoreDenied, "correct its name"),
    (400, "AccessControlListNotSupported", StoreDenied, "set object.acl: null"),
    (400, "KMS.DisabledException", StoreDenied, "KMS"),
    (401, "Unauthorized", StoreDenied, "the credentials need"),
    (500, "InternalError", StoreUnavailable, ""),
    (502, "BadGateway", StoreUnavailable, ""),
    (503, "SlowDown", StoreUnavailable, ""),
    (503, "ServiceUnavailable", StoreUnavailable, ""),
    (504, "GatewayTimeout", StoreUnavailable, ""),
    (507, "XMinioStorageFull", StoreUnavailable, ""),
    (400, "RequestTimeout", StoreUnavailable, ""),
    (400, "ThrottlingException", StoreUnavailable, ""),
    (400, "KMS.ThrottlingException", StoreUnavailable, ""),
    (408, "Whatever", StoreUnavailable, ""),
    (429, "TooManyRequests", StoreUnavailable, ""),
    (409, "OperationAborted", StoreUnavailable, ""),
    (409, "ConditionalRequestConflict", StoreUnavailable, ""),
    (307, "TemporaryRedirect", StoreUnavailable, ""),
    (400, "BadDigest", Unproven, ""),
    (400, "InvalidDigest", Unproven, ""),
    (400, "XAmzContentSHA256Mismatch", Unproven, ""),
    (400, "XAmzContentChecksumMismatch", Unproven, ""),
    (400, "IncompleteBody", Unproven, ""),
    (400, "InvalidArgument", ObjectRefused, ""),
    (400, "KeyTooLongError", ObjectRefused, "1024 bytes"),
    (400, "EntityTooLarge", ObjectRefused, "upload.multipart_threshold"),
    (400, "InvalidRequest", ObjectRefused, "s3.checksum: none"),
    (400, "InvalidStorageClass", ObjectRefused, "object.storage_class"),
    (501, "NotImplemented", ObjectRefused, "s3.checksum: none"),
    (400, "MalformedXML", ObjectRefused, ""),
    (400, "InvalidTag", ObjectRefused, "object.tags"),
    (412, "PreconditionFailed", ObjectRefused, ""),
]


@pytest.mark.parametrize(("status", "code", "fault", "hint"), MAPPED, ids=[f"{row[0]}-{row[1]}" for row in MAPPED])
def test_an_answer_becomes_what_the_daemon_does_next(
    store: Store, server: ScriptedServer, status: int, code: str, fault: type[SpooldError], hint: str
) -> None:
    server.answers(error(status, code, "the server's words"))

    with pytest.raises(SpooldError) as caught:
        put(store)

    assert fault is type(caught.value)
    assert str(caught.value).startswith(f"put {KEY}: {status} {code}")
    assert hint in caught.value.hint
    assert bool(hint) == bool(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "code", "is_everywhere"),
    [
        (400, "ExpiredToken", True), (404, "NoSuchBucket", True), (403, "RequestTimeTooSkewed", True),
        (301, "PermanentRedirect", True), (403, "AccessDenied", False), (403, "SignatureDoesNotMatch", False),
        (400, "AccessControlListNotSupported", False), (405, "MethodNotAllowed", False),
    ],
)  # fmt: skip
def test_of_some_refusals_no_key_can_be_to_blame(
    store: Store, server: ScriptedServer, status: int, code: str, is_everywhere: bool
) -> None:
    """The others may come of a policy, a proxy or an ACL that only some keys meet."""
    server.answers(error(status, code))

    with pytest.raises(StoreDenied) as caught:
        put(store)

    assert is_everywhere == caught.value.is_everywhere


def test_what_the_server_said_of_a_refused_object_is_told(store: Store, server: ScriptedServer) -> None:
    server.answers(error(400, "InvalidArgument", "no such storage class"))

    with pytest.raises(ObjectRefused) as caught:
        put(store)

    assert f"put {KEY}: 400 InvalidArgument: no such storage class" == str(caught.value)


@pytest.mark.parametrize(("status", "fault"), [(400, StoreDenied), (404, StoreDenied), (413, ObjectRefused)])
def test_a_refusal_that_is_not_s3s_says_nothing_of_the_object(
    store: Store, server: ScriptedServer, status: int, fault: type[SpooldError]
) -> None:
    """A batch must not die of a misconfigured proxy, but for its limit on bodies (413)."""
    server.answers(Reply(status, {"Content-Type": "text/html"}, b"<html>nginx</html>"))

    with pytest.raises(fault, match=f"put {KEY}: {status} {http.client.responses[status]}"):
        put(store)


@pytest.mark.parametrize("status", [301, 302])
def test_a_redirect_to_a_login_page_is_denied_at_once(store: Store, server: ScriptedServer, status: int) -> None:
    """botocore itself would ask 82 times where the bucket is, until its stack is full."""
    server.answers(*[Reply(status, {"Location": "http://portal.invalid/login"})] * 100)

    with pytest.raises(StoreDenied) as caught:
        put(store)

    assert "proxy" in caught.value.hint
    assert ["PUT"] == server.methods


def test_a_redirect_that_names_the_region_is_followed(store: Store, server: ScriptedServer) -> None:
    server.answers(error(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-3"}), confirmed())

    put(store)

    assert ["PUT", "PUT"] == server.methods
    assert "/eu-west-3/s3/" in server.requests[1].headers["Authorization"]


@pytest.mark.parametrize(
    ("headers", "retry_after_s"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:30 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_the_server_may_say_when(headers: dict[str, str], retry_after_s: float | None) -> None:
    with serving(ScriptedServer()) as server, contextlib.closing(store_of(server.endpoint_url)) as store:
        server.answers(error(503, "SlowDown", **headers))

        with pytest.raises(StoreUnavailable, match="503 SlowDown") as caught:
            put(store)

    assert retry_after_s == caught.value.retry_after_s
    assert not caught.value.never_sent


@pytest.mark.parametrize(
    ("status", "fault", "hint"),
    [
        (403, StoreDenied, "s3:ListBucket"),
        (400, StoreDenied, "renew the credentials"),
        (301, StoreDenied, "set s3.region"),
        (503, StoreUnavailable, ""),
    ],
)
def test_head_gives_no_reason(store: Store, server: ScriptedServer, status: int, fault: type[SpooldError], hint: str) -> None:
    """It has no body: S3 answers 400 to expired credentials, for instance."""
    server.answers(Reply(status))

    with pytest.raises(fault) as caught:
        store.head(BUCKET, KEY)

    assert hint in caught.value.hint


@pytest.mark.parametrize("verb", ["delete", "digest", "abort"])
def test_a_missing_route_is_not_a_missing_object(store: Store, server: ScriptedServer, verb: str) -> None:
    """Something that is no S3 says 404 too; believing it would forget an object that is there."""
    server.answers(Reply(404, {"Content-Type": "text/html"}, b"<html>not here</html>"))

    with pytest.raises(StoreDenied):
        getattr(store, verb)(BUCKET, KEY, *(["upload"] if verb == "abort" else []))


@pytest.mark.parametrize(("verb", "needs"), [("delete", "s3:DeleteObject"), ("digest", "s3:GetObject")])
def test_a_denied_verb_names_its_permission(store: Store, server: ScriptedServer, verb: str, needs: str) -> None:
    server.answers(error(403, "AccessDenied"))

    with pytest.raises(StoreDenied) as caught:
        getattr(store, verb)(BUCKET, KEY)

    assert f"the credentials need {needs}" == caught.value.hint


def test_a_probe_raises_what_a_put_raises(store: Store, server: ScriptedServer) -> None:
    server.answers(error(400, "AccessControlListNotSupported"))

    with pytest.raises(StoreDenied, match=r"put \.spoold-probe: 400 AccessControlListNotSupported"):
        store.probe(BUCKET, ".spoold-probe", replace(JPEG, acl="public-read"))

    assert "public-read" == server.requests[0].headers["x-amz-acl"]


def test_a_probe_has_content(store: Store, server: ScriptedServer) -> None:
    """A server that is full, and a wire that flips bits, have nothing against an empty object."""
    server.answers(confirmed(PROBE), Reply(204))

    store.probe(BUCKET, KEY, JPEG)

    assert [PROBE, b""] == [request.body for request in server.requests] and PROBE


def test_a_probe_that_cannot_be_deleted_is_a_good_one(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed(PROBE), error(403, "AccessDenied"))

    store.probe(BUCKET, ".spoold-probe", JPEG)

    assert ["PUT", "DELETE"] == server.methods


# Faults of the way there


def test_a_refused_connection_was_never_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(StoreUnavailable, match="Connection refused") as caught:
        put(store_of(f"http://127.0.0.1:{port}"))

    assert caught.value.never_sent


def test_a_connection_that_does_not_come_about_was_never_sent() -> None:
    """A full queue of the listener's drops our SYN, as a firewall does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())

        with pytest.raises(StoreUnavailable, match="ConnectTimeoutError") as caught:
            put(store_of(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=0.2))

    assert caught.value.never_sent


def test_a_reset_after_the_request_leaves_it_in_doubt(store: Store, server: ScriptedServer) -> None:
    server.answers(RESET)

    with pytest.raises(StoreUnavailable, match=r"ConnectionClosedError .*Connection reset by peer") as caught:
        put(store)

    assert BODY == server.requests[0].body
    assert not caught.value.never_sent


def test_silence_after_the_request_leaves_it_in_doubt(server: ScriptedServer) -> None:
    server.answers(SILENCE)

    with pytest.raises(StoreUnavailable, match="ReadTimeoutError") as caught:
        put(store_of(server.endpoint_url, read_timeout_s=0.2))

    assert BODY == server.requests[0].body
    assert not caught.value.never_sent


@pytest.mark.parametrize(
    "answer",
    [
        Reply(headers={"ETag": '"1"', "Content-Length": "9"}, body=b"short"),
        Reply(headers={"ETag": '"1"', "Content-Length": "9", "Connection": "close"}, body=b"short"),
    ],
)
def test_an_object_that_breaks_off_is_no_object(server: ScriptedServer, answer: Reply) -> None:
    server.answers(answer)

    with pytest.raises(StoreUnavailable, match=r"ReadTimeoutError|IncompleteReadError|ResponseStreamingError"):
        store_of(server.endpoint_url, read_timeout_s=0.2).digest(BUCKET, KEY)


def test_a_name_that_nobody_knows_is_denied() -> None:
    with pytest.raises(StoreDenied, match="EndpointConnectionError") as caught:
        put(store_of("http://nowhere.invalid"))

    assert "DNS" in caught.value.hint


def test_a_proxy_that_is_not_there_means_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{port}")

    with pytest.raises(StoreUnavailable, match="ProxyConnectionError") as caught:
        put(store_of("http://s3.invalid"))

    assert caught.value.never_sent
    assert "secret" not in str(caught.value)


def test_a_certificate_that_nobody_vouches_for_is_denied(tmp_path: Path) -> None:
    server = ScriptedServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path / "server.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)

    with serving(server), pytest.raises(StoreDenied, match="SSLError") as caught:
        put(store_of(f"https://127.0.0.1:{server.server_port}"))

    assert "AWS_CA_BUNDLE" in caught.value.hint


def certificate(path: Path) -> Path:
    """Write a key and a certificate that only vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    clear = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, clear)
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_tls_that_breaks_off_is_unavailable(server: ScriptedServer) -> None:
    """Something that does not speak TLS at all, or a reset in the middle of it: not the certificate's fault."""
    with pytest.raises(StoreUnavailable, match="SSLError"):
        put(store_of(f"https://127.0.0.1:{server.server_port}"))


# Credentials and settings


def test_credentials_that_are_missing_are_denied_until_they_are_there(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held spool recovers by itself (contract, section 6, rule 11)."""
    with monkeypatch.context() as patch, contextlib.closing(store_of(server.endpoint_url)) as store:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StoreDenied, match="NoCredentialsError") as caught:
            put(store)
        assert "give boto3 credentials" in caught.value.hint

        patch.undo()
        server.answers(confirmed())
        put(store)


def test_credentials_that_were_refused_are_read_anew(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with contextlib.closing(store_of(server.endpoint_url)) as store:
        server.answers(error(403, "InvalidAccessKeyId"), confirmed())
        with pytest.raises(StoreDenied):
            put(store)
        credentials.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = new\n")
        put(store)

    assert ["OLD", "NEW"] == [
        request.headers["Authorization"].partition("Credential=")[2].partition("/")[0] for request in server.requests
    ]


def test_credentials_that_were_rotated_meanwhile_are_tried_at_once(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody need act, and nothing need be held: whoever asks again is let in."""
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with contextlib.closing(store_of(server.endpoint_url)) as store:
        server.answers(confirmed(), error(400, "ExpiredToken"), confirmed())
        put(store)
        credentials.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = new\n")
        with pytest.raises(StoreUnavailable, match="400 ExpiredToken, but there are other credentials now") as caught:
            put(store)
        put(store)

    assert caught.value.never_sent and caught.value.is_everywhere
    assert ["OLD", "OLD", "NEW"] == [
        request.headers["Authorization"].partition("Credential=")[2].partition("/")[0] for request in server.requests
    ]


def test_half_a_credential_is_denied(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = HALF\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(StoreDenied, match="PartialCredentialsError"):
        put(store_of(server.endpoint_url))


def test_the_words_of_a_credential_helper_are_not_repeated(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    helper = tmp_path / "helper.sh"
    helper.write_text("#!/bin/sh\necho hunter2 >&2\nexit 1\n")
    helper.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"[profile helped]\ncredential_process = {helper}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    with pytest.raises(StoreDenied, match="CredentialRetrievalError") as caught:
        put(store_of(server.endpoint_url, profile="helped"))

    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_a_credential_helper_that_is_not_there_is_denied(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile helped]\ncredential_process = /nonexistent/helper\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    with pytest.raises(StoreDenied, match="FileNotFoundError"):
        put(store_of(server.endpoint_url, profile="helped"))


def test_credentials_that_cannot_be_renewed_are_denied(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first ones were good, and end within the quarter of an hour in which botocore asks for new ones."""
    helper = tmp_path / "helper.sh"
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    keys = f'"Version":1,"AccessKeyId":"A","SecretAccessKey":"S","SessionToken":"T","Expiration":"{soon}"'
    helper.write_text(f"#!/bin/sh\nrm $0\necho '{{{keys}}}'\n")
    helper.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"[profile helped]\ncredential_process = {helper}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    with pytest.raises(StoreDenied, match="FileNotFoundError"):
        put(store_of(server.endpoint_url, profile="helped"))

    assert [] == server.requests


def test_a_role_that_may_not_be_assumed_is_denied(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its refusal looks like one of an object, which would bury the batch."""
    config = tmp_path / "config"
    config.write_text("[profile user]\nrole_arn = arn:aws:iam::123456789012:role/x\ncredential_source = Environment\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.endpoint_url)
    sts = b"<ErrorResponse><Error><Code>ValidationError</Code><Message>no</Message></Error></ErrorResponse>"
    server.answers(*[Reply(400, {"Content-Type": "text/xml"}, sts)] * 4)

    with pytest.raises(StoreDenied, match=f"put {KEY}: AssumeRole: 400 ValidationError") as caught:
        put(store_of(server.endpoint_url, profile="user"))

    assert "renew the credentials" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"profile": "nobody"}, "ProfileNotFound"),
        ({"endpoint_url": "no url"}, "Invalid endpoint"),
        ({"region": "no region!"}, "InvalidRegionError"),
    ],
)
def test_settings_that_make_no_client_are_denied(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(StoreDenied, match=says) as caught:
        put(Store(**settings))

    assert "s3.endpoint_url" in caught.value.hint


def test_a_bucket_name_that_cannot_be_is_denied(store: Store) -> None:
    with pytest.raises(StoreDenied, match="bucket name") as caught:
        store.put("no bucket!", KEY, BODY, JPEG, DIGESTS)

    assert "correct its name" in caught.value.hint


def test_metadata_that_cannot_be_sent_are_refused(store: Store) -> None:
    with pytest.raises(ObjectRefused, match="Non ascii characters"):
        store.put(BUCKET, KEY, BODY, replace(JPEG, metadata=(("who", "Zoë"),)), DIGESTS)


def test_an_endpoint_needs_no_region(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    server.answers(confirmed())

    put(store_of(server.endpoint_url))


def test_the_addressing_style_is_obeyed(server: ScriptedServer) -> None:
    server.answers(confirmed())

    put(store_of(server.endpoint_url, addressing_style="path"), key="ä b")

    assert f"/{BUCKET}/{urllib.parse.quote('ä b')}" == server.requests[0].path


def test_many_threads_share_one_store(server: ScriptedServer) -> None:
    server.answers(*[confirmed()] * 16)
    faults: list[BaseException] = []
    store = store_of(server.endpoint_url)

    def work() -> None:
        try:
            put(store)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()

    assert [] == faults
    assert 16 == len(server.requests)


def test_a_closed_store_can_be_used_again(store: Store, server: ScriptedServer) -> None:
    server.answers(confirmed(), confirmed())

    put(store)
    store.close()
    store.close()
    put(store)

    assert 2 == len(server.requests)


def test_botocore_is_imported_by_the_first_request_only() -> None:
    """It takes a time for which `spoold status` would wait."""
    code = "import sys, spoold.store as s; s.Store(); sys.exit(bool({'boto3', 'botocore'} & set(sys.modules)))"

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
