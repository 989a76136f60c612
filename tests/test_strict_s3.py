"""The strict S3 is believed by other tests: here botocore is let in, and every kind of wrongness is refused by name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.proxy import FaultProxy, Flip
from tests.servers import ACCESS_KEY, REGION, SECRET_KEY, StrictServer
from tests.strict_s3 import ALGORITHMS
from tests.test_store import certificate

KEY = "avatars/42/original/me with ünïcode & plus+.jpg"
BODY = b"a cat"
PART = b"p" * (5 << 20)
ZEROS = {name: base64.b64encode(bytes(len(digest(b"")))).decode() for name, digest in ALGORITHMS.items()}
"""Checksums of the right form that are wrong."""


@pytest.fixture
def server(strict_server: StrictServer) -> StrictServer:
    return strict_server


@pytest.fixture
def bucket(server: StrictServer) -> str:
    return server.create_bucket("bucket")


_session = boto3.session.Session()  # one for all: it takes a quarter of a second to read its descriptions


def client(server: StrictServer, endpoint_url: str | None = None, **settings: Any) -> Any:
    """Return a client as boto3 makes it. settings: of the session, or of botocore's Config."""
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": REGION, "verify": False}
    keys |= {name: settings.pop(name) for name in list(settings) if name.startswith(("aws_", "region", "verify"))}
    s3 = {"addressing_style": "path", **settings.pop("s3", {})}
    config = Config(s3=s3, retries={"total_max_attempts": 1}, proxies={}, **settings)
    return _session.client("s3", endpoint_url=endpoint_url or server.endpoint_url, config=config, **keys)


@contextlib.contextmanager
def refused(code: str, status: int = 400) -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert (code, status) == (
        caught.value.response["Error"]["Code"],
        caught.value.response["ResponseMetadata"]["HTTPStatusCode"],
    )


def checksum_of(algorithm: str, content: bytes) -> str:
    return base64.b64encode(ALGORITHMS[algorithm](content)).decode()


def field_of(algorithm: str) -> str:
    return f"Checksum{algorithm.upper()}"


# What is right is taken, and told back


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_good_checksum_is_echoed_and_told_to_those_who_ask(server: StrictServer, bucket: str, algorithm: str) -> None:
    s3 = client(server)
    answer = s3.put_object(Bucket=bucket, Key=KEY, Body=BODY, **{field_of(algorithm): checksum_of(algorithm, BODY)})

    unasked = s3.head_object(Bucket=bucket, Key=KEY)
    asked = s3.head_object(Bucket=bucket, Key=KEY, ChecksumMode="ENABLED")

    assert checksum_of(algorithm, BODY) == answer[field_of(algorithm)] == asked[field_of(algorithm)]
    assert "FULL_OBJECT" == answer["ChecksumType"] == asked["ChecksumType"]
    assert field_of(algorithm) not in unasked
    assert f'"{hashlib.md5(BODY).hexdigest()}"' == answer["ETag"] == unasked["ETag"]
    assert {KEY: BODY} == server.objects(bucket)


def test_without_any_checksum_s3_adds_one_of_its_own(server: StrictServer, bucket: str) -> None:
    s3 = client(server, request_checksum_calculation="when_required")

    answer = s3.put_object(Bucket=bucket, Key=KEY, Body=BODY)

    assert checksum_of("crc64nvme", BODY) == answer["ChecksumCRC64NVME"]


def test_what_boto3_does_by_itself_over_tls_is_taken(tmp_path: Path) -> None:
    """An unsigned payload in chunks, its CRC32 in a trailer."""
    with StrictServer(certificate=certificate(tmp_path / "server.pem")) as server, pytest.warns(match="Unverified HTTPS"):
        s3 = client(server)
        s3.create_bucket(Bucket="over-tls")

        answer = s3.put_object(Bucket="over-tls", Key=KEY, Body=BODY)
        read = s3.get_object(Bucket="over-tls", Key=KEY)["Body"].read()

    assert (checksum_of("crc32", BODY), BODY) == (answer["ChecksumCRC32"], read)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        ("crc32", "FULL_OBJECT"), ("crc32", "COMPOSITE"), ("crc32c", "FULL_OBJECT"), ("crc32c", "COMPOSITE"),
        ("crc64nvme", "FULL_OBJECT"), ("sha1", "COMPOSITE"), ("sha256", "COMPOSITE"),
    ],
)  # fmt: skip
def test_the_checksum_of_parts_is_of_the_whole_or_of_their_own(
    server: StrictServer, bucket: str, algorithm: str, kind: str
) -> None:
    parts = [PART, BODY]
    s3 = client(server)
    upload = begun(s3, bucket, ChecksumAlgorithm=algorithm.upper(), ChecksumType=kind)
    listed = [part_of(s3, upload, number, part, algorithm) for number, part in enumerate(parts, start=1)]

    answer = s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": listed}, ChecksumType=kind)

    composite = checksum_of(algorithm, b"".join(ALGORITHMS[algorithm](part) for part in parts)) + "-2"
    expected = checksum_of(algorithm, b"".join(parts)) if kind == "FULL_OBJECT" else composite
    etag = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
    head = s3.head_object(Bucket=bucket, Key=KEY, ChecksumMode="ENABLED")
    assert (expected, kind, f'"{etag}-2"') == (answer[field_of(algorithm)], answer["ChecksumType"], answer["ETag"])
    assert (expected, kind, f'"{etag}-2"') == (head[field_of(algorithm)], head["ChecksumType"], head["ETag"])
    assert {KEY: b"".join(parts)} == server.objects(bucket)
    assert [] == s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


def begun(s3: Any, bucket: str, **settings: Any) -> dict[str, str]:
    upload = s3.create_multipart_upload(Bucket=bucket, Key=KEY, **settings)
    return {"Bucket": bucket, "Key": KEY, "UploadId": upload["UploadId"]}


def part_of(s3: Any, upload: dict[str, str], number: int, part: bytes, algorithm: str = "crc32") -> dict[str, Any]:
    checksum = {field_of(algorithm): checksum_of(algorithm, part)}
    answer = s3.upload_part(**upload, PartNumber=number, Body=part, **checksum)
    assert checksum == {field_of(algorithm): answer[field_of(algorithm)]}
    return {"PartNumber": number, "ETag": answer["ETag"], **checksum}


def test_what_is_kept_with_an_object_is_told_back(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    server.set(acls=True)
    s3.put_object(
        Bucket=bucket, Key=KEY, Body=BODY, ContentType="image/jpeg", ACL="public-read", CacheControl="max-age=60",
        StorageClass="STANDARD_IA", ServerSideEncryption="AES256", Tagging="a=b%20c&d=", Metadata={"app": "shop"},
    )  # fmt: skip

    head = s3.head_object(Bucket=bucket, Key=KEY)
    kept = server.kept(bucket, KEY)

    assert ("image/jpeg", "max-age=60", "STANDARD_IA", "AES256", {"app": "shop"}) == (
        head["ContentType"], head["CacheControl"], head["StorageClass"], head["ServerSideEncryption"], head["Metadata"],
    )  # fmt: skip
    assert ("public-read", "a=b%20c&d=") == (kept["x-amz-acl"], kept["x-amz-tagging"])


def test_a_list_comes_in_pages_in_the_order_of_utf_8(server: StrictServer, bucket: str) -> None:
    keys = ["a", "b+c d", "ü", "z", "é&<>", "\N{GRINNING FACE}", "\uffee"]
    s3 = client(server)
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=key.encode())

    pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 3}))

    assert [3, 3, 1] == [page["KeyCount"] for page in pages]
    assert sorted(keys, key=str.encode) == [entry["Key"] for page in pages for entry in page["Contents"]]


def test_with_versions_an_older_one_stays_and_a_deleted_one_too(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    server.set(versioning=True)
    first = s3.put_object(Bucket=bucket, Key=KEY, Body=b"first")["VersionId"]
    second = s3.put_object(Bucket=bucket, Key=KEY, Body=b"second")["VersionId"]
    s3.delete_object(Bucket=bucket, Key=KEY)

    assert {} == server.objects(bucket)
    read = [s3.get_object(Bucket=bucket, Key=KEY, VersionId=which)["Body"].read() for which in (first, second)]
    assert [b"first", b"second"] == read


def test_under_kms_an_etag_is_no_md5(server: StrictServer, bucket: str) -> None:
    server.set(kms=True)
    answer = client(server).put_object(Bucket=bucket, Key=KEY, Body=BODY)

    assert "aws:kms" == answer["ServerSideEncryption"]
    assert hashlib.md5(BODY).hexdigest() not in answer["ETag"] and 34 == len(answer["ETag"])


def test_it_counts_what_it_verified_and_lists_what_it_refused(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    s3.put_object(Bucket=bucket, Key="good", Body=BODY, ChecksumSHA256=checksum_of("sha256", BODY))
    with refused("BadDigest"):
        s3.put_object(Bucket=bucket, Key="bad", Body=BODY, ChecksumSHA256=ZEROS["sha256"])

    assert {"signature": 2, "payload": 2, "sha256": 1} == server.verified()
    assert ["PUT /bucket/bad: BadDigest"] == [line.rpartition(":")[0] for line in server.refused()]
    assert [] == server.refused(but=["BadDigest"])


# What arrives otherwise than it was sent


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("signs", [True, False], ids=["signed", "unsigned"])
def test_a_byte_that_flips_on_its_way_is_noticed(server: StrictServer, bucket: str, algorithm: str, signs: bool) -> None:
    """By the signed payload's hash; over TLS botocore does not sign the payload, and the checksum is all there is."""
    with FaultProxy(server.endpoint_url) as proxy:
        proxy.on("PUT", "original", Flip(2))
        s3 = client(server, proxy.endpoint_url, s3={"payload_signing_enabled": signs})

        with refused("XAmzContentSHA256Mismatch" if signs else "BadDigest"):
            s3.put_object(Bucket=bucket, Key=KEY, Body=BODY, **{field_of(algorithm): checksum_of(algorithm, BODY)})

    assert {} == server.objects(bucket)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_wrong_checksum_is_refused(server: StrictServer, bucket: str, algorithm: str) -> None:
    with refused("BadDigest"):
        client(server).put_object(Bucket=bucket, Key=KEY, Body=BODY, **{field_of(algorithm): ZEROS[algorithm]})


@pytest.mark.parametrize(
    ("digest", "code"),
    [
        ({"ContentMD5": base64.b64encode(bytes(16)).decode()}, "BadDigest"),
        ({"ContentMD5": "no md5"}, "InvalidDigest"),
        ({"ChecksumCRC32": "no crc"}, "InvalidRequest"),
        ({"ChecksumCRC32": ZEROS["sha256"]}, "InvalidRequest"),
        ({"ChecksumCRC32": checksum_of("crc32", BODY), "ChecksumSHA256": checksum_of("sha256", BODY)}, "InvalidRequest"),
    ],
    ids=["wrong md5", "no md5", "no base64", "too long", "two checksums"],
)
def test_a_digest_that_is_wrong_or_none_is_refused(server: StrictServer, bucket: str, digest: Any, code: str) -> None:
    s3 = client(server, request_checksum_calculation="when_required")

    with refused(code):
        s3.put_object(Bucket=bucket, Key=KEY, Body=BODY, **digest)

    assert {} == server.objects(bucket)


def test_a_good_md5_is_taken(server: StrictServer, bucket: str) -> None:
    s3 = client(server, request_checksum_calculation="when_required")

    s3.put_object(Bucket=bucket, Key=KEY, Body=BODY, ContentMD5=base64.b64encode(hashlib.md5(BODY).digest()).decode())

    assert {KEY: BODY} == server.objects(bucket)


# Who asks


@pytest.mark.parametrize(
    ("who", "code", "status"),
    [
        ({"aws_secret_access_key": "wrong"}, "SignatureDoesNotMatch", 403),
        ({"aws_access_key_id": "STRANGER"}, "InvalidAccessKeyId", 403),
        ({"aws_session_token": "made up"}, "InvalidToken", 400),
        ({"region_name": "eu-central-1"}, "AuthorizationHeaderMalformed", 400),
    ],
)
def test_who_cannot_say_who_they_are_is_not_let_in(
    server: StrictServer, bucket: str, who: dict[str, str], code: str, status: int
) -> None:
    with refused(code, status):
        client(server, **who).list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("name", ["x-amz-acl", "x-amz-meta-app"])
def test_a_header_of_s3s_that_is_not_signed_is_refused(server: StrictServer, bucket: str, name: str) -> None:
    s3 = client(server)
    s3.meta.events.register("before-send.s3", lambda request, **_: request.headers.update({name: "private"}))

    with refused("AccessDenied", 403):
        s3.put_object(Bucket=bucket, Key=KEY, Body=BODY)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda request: request.headers.update({"Content-Type": "text/plain"}), id="a signed header"),
        pytest.param(lambda request: setattr(request, "url", request.url.replace("42", "43")), id="another key"),
        pytest.param(lambda request: setattr(request, "method", "DELETE"), id="another method"),
    ],
)
def test_what_was_changed_after_it_was_signed_is_refused(
    server: StrictServer, bucket: str, change: Callable[[Any], None]
) -> None:
    s3 = client(server)
    s3.meta.events.register("before-send.s3", lambda request, **_: change(request))

    with refused("SignatureDoesNotMatch", 403):
        s3.put_object(Bucket=bucket, Key=KEY, Body=BODY, ContentType="image/jpeg")


def test_a_session_needs_its_token_until_it_expires(server: StrictServer, bucket: str) -> None:
    session = {"secret": SECRET_KEY, "token": "of this session"}
    server.set(keys={ACCESS_KEY: session})

    client(server, aws_session_token="of this session").head_bucket(Bucket=bucket)
    with refused("InvalidAccessKeyId", 403):
        client(server).list_objects_v2(Bucket=bucket)
    server.set(keys={ACCESS_KEY: {**session, "expires_at": 1}})
    with refused("ExpiredToken"):
        client(server, aws_session_token="of this session").list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("minutes", [-16, 16])
def test_a_clock_that_is_a_quarter_of_an_hour_off_is_refused(server: StrictServer, bucket: str, minutes: int) -> None:
    server.set(clock_offset_s=60.0 * minutes)

    with refused("RequestTimeTooSkewed", 403):
        client(server).list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("minutes", [-14, 14])
def test_a_clock_that_is_a_little_off_is_forgiven(server: StrictServer, bucket: str, minutes: int) -> None:
    server.set(clock_offset_s=60.0 * minutes)
    client(server).list_objects_v2(Bucket=bucket)


# What S3 would not keep


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"Key": "k" * 1025}, "KeyTooLongError"),
        ({"Key": "ü" * 513}, "KeyTooLongError"),
        ({"ACL": "public-read"}, "AccessControlListNotSupported"),
        ({"ACL": "everybody"}, "InvalidArgument"),
        ({"StorageClass": "CHEAP"}, "InvalidStorageClass"),
        ({"ServerSideEncryption": "rot13"}, "InvalidEncryptionAlgorithmError"),
        ({"Metadata": {"a": "b" * 2048}}, "MetadataTooLarge"),
        ({"Tagging": "&".join(f"t{number}=1" for number in range(11))}, "BadRequest"),
        ({"Tagging": "a=b%3Bc"}, "InvalidTag"),
        ({"Tagging": f"{'t' * 129}=1"}, "InvalidTag"),
        ({"Tagging": f"t={'v' * 257}"}, "InvalidTag"),
        ({"Tagging": "t=1&t=2"}, "InvalidTag"),
        ({"Tagging": "no pairs"}, "InvalidArgument"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_s3_would_not_keep_is_refused(server: StrictServer, bucket: str, wish: dict[str, Any], code: str) -> None:
    with refused(code):
        client(server).put_object(**{"Bucket": bucket, "Key": KEY, "Body": BODY, **wish})

    assert {} == server.objects(bucket)


@pytest.mark.parametrize("key", ["k" * 1024, "ü" * 512, "a//b", "/a", "a/../b", ".", "%2F", "a?b#c", "tab\there"])
def test_odd_keys_that_s3_keeps_are_kept(server: StrictServer, bucket: str, key: str) -> None:
    client(server).put_object(Bucket=bucket, Key=key, Body=BODY)

    assert {key: BODY} == server.objects(bucket)


def test_what_is_not_there_is_said_to_be_not_there(server: StrictServer, bucket: str) -> None:
    s3 = client(server)

    with refused("NoSuchKey", 404):
        s3.get_object(Bucket=bucket, Key=KEY)
    with refused("404", 404):
        s3.head_object(Bucket=bucket, Key=KEY)
    with refused("NoSuchBucket", 404):
        s3.put_object(Bucket="nowhere", Key=KEY, Body=BODY)
    s3.delete_object(Bucket=bucket, Key=KEY)
    with refused("InvalidBucketName"):
        s3.create_bucket(Bucket="a..b")
    with refused("NotImplemented", 501):
        s3.get_object_tagging(Bucket=bucket, Key=KEY)
    server.set(vanished=[bucket])
    with refused("NoSuchBucket", 404):
        s3.put_object(Bucket=bucket, Key=KEY, Body=BODY)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 411, b"MissingContentLength"),
        ({"Transfer-Encoding": "chunked"}, 501, b"NotImplemented"),
        ({"Content-Length": "0"}, 403, b"AccessDenied"),
    ],
)
def test_what_no_client_of_s3_sends_is_refused(server: StrictServer, headers: dict[str, str], status: int, code: bytes) -> None:
    """No length, a length to be told later, no signature."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as connection:
        connection.putrequest("PUT", f"/bucket/{status}")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()

        assert status == answer.status
        assert b"<Code>" + code + b"</Code>" in answer.read()


def test_a_body_that_breaks_off_is_incomplete(server: StrictServer) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as connection:
        connection.request("PUT", "/bucket/half", body=b"half", headers={"Content-Length": "8"})
        connection.sock.shutdown(socket.SHUT_WR)

        assert b"<Code>IncompleteBody</Code>" in connection.getresponse().read()


# Conditions


def test_if_none_match_takes_only_what_is_new(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"first", IfNoneMatch="*")

    with refused("PreconditionFailed", 412):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"second", IfNoneMatch="*")
    with refused("NotImplemented", 501):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"second", IfNoneMatch="something")

    assert {KEY: b"first"} == server.objects(bucket)


def test_if_match_replaces_only_what_is_meant(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    first = s3.put_object(Bucket=bucket, Key=KEY, Body=b"first")["ETag"]
    s3.put_object(Bucket=bucket, Key=KEY, Body=b"second", IfMatch=first)

    with refused("PreconditionFailed", 412):
        s3.put_object(Bucket=bucket, Key=KEY, Body=b"third", IfMatch=first)
    with refused("NoSuchKey", 404):
        s3.put_object(Bucket=bucket, Key="another", Body=b"third", IfMatch=first)

    assert {KEY: b"second"} == server.objects(bucket)


def test_a_condition_that_was_overtaken_while_its_body_came_is_a_conflict(server: StrictServer, bucket: str) -> None:
    """409, which is to be tried again; only whoever was first gets 412."""
    s3, other = client(server), client(server)
    is_sending: list[bool] = []

    class Overtaken:
        """A body of which somebody else writes the key when the headers are out."""

        def __init__(self) -> None:
            self.left = [b"mine"]

        def __len__(self) -> int:
            return 4

        def tell(self) -> int:
            return 0

        def seek(self, *_: int) -> int:
            self.left = [b"mine"]
            return 0

        def read(self, _: int = -1) -> bytes:
            if is_sending and self.left:
                other.put_object(Bucket=bucket, Key=KEY, Body=b"other")
            return self.left.pop() if self.left else b""

    s3.meta.events.register("before-send.s3", lambda **_: is_sending.append(True))

    with refused("ConditionalRequestConflict", 409):
        s3.put_object(Bucket=bucket, Key=KEY, Body=Overtaken(), IfNoneMatch="*")

    assert {KEY: b"other"} == server.objects(bucket)


# Parts


def test_parts_are_refused_that_s3_would_refuse(server: StrictServer, bucket: str) -> None:
    s3 = client(server, request_checksum_calculation="when_required")
    upload = begun(s3, bucket, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")

    def complete(*parts: dict[str, Any], **settings: Any) -> None:
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": list(parts)}, **settings)

    with refused("InvalidRequest"):
        part_of(s3, upload, 1, BODY, "sha256")
    with refused("InvalidRequest"):
        s3.upload_part(**upload, PartNumber=1, Body=BODY)
    with refused("InvalidArgument"):
        part_of(s3, upload, 10_001, BODY)
    with refused("NoSuchUpload", 404):
        part_of(s3, {**upload, "UploadId": "unknown"}, 1, BODY)
    first, second = part_of(s3, upload, 1, BODY), part_of(s3, upload, 2, b"a dog")
    with refused("EntityTooSmall"):
        complete(first, second)
    with refused("InvalidPartOrder"):
        complete(second, first)
    with refused("InvalidPart"):
        complete({**first, "ETag": second["ETag"]})
    with refused("InvalidPart"):
        complete({**first, "ChecksumCRC32": second["ChecksumCRC32"]})
    with refused("InvalidPart"):
        complete({**first, "PartNumber": 3})
    with refused("MalformedXML"):
        complete()
    with refused("BadDigest"):
        complete(first, ChecksumCRC32=second["ChecksumCRC32"])
    with refused("InvalidRequest"):
        complete(first, ChecksumType="COMPOSITE")
    with refused("InvalidRequest"):
        complete(first, MpuObjectSize=1)
    assert {} == server.objects(bucket)

    complete(first, ChecksumCRC32=first["ChecksumCRC32"], ChecksumType="FULL_OBJECT", MpuObjectSize=len(BODY))
    assert {KEY: BODY} == server.objects(bucket)
    with refused("NoSuchUpload", 404):
        complete(first)
    with refused("NoSuchUpload", 404):
        s3.abort_multipart_upload(**upload)


def test_a_composite_checksum_needs_that_of_each_part(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    upload = begun(s3, bucket, ChecksumAlgorithm="SHA256")
    part = part_of(s3, upload, 1, BODY, "sha256")

    with refused("InvalidRequest"):
        del part["ChecksumSHA256"]
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": [part]})


def test_there_is_no_sha_of_a_whole_that_came_in_parts(server: StrictServer, bucket: str) -> None:
    s3 = client(server)

    with refused("InvalidRequest"):
        begun(s3, bucket, ChecksumAlgorithm="SHA256", ChecksumType="FULL_OBJECT")
    with refused("InvalidRequest"):
        begun(s3, bucket, ChecksumAlgorithm="CRC64NVME", ChecksumType="COMPOSITE")


def test_an_upload_that_is_aborted_is_listed_no_more(server: StrictServer, bucket: str) -> None:
    s3 = client(server)
    upload = begun(s3, bucket)
    listed = [entry["UploadId"] for entry in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]]

    s3.abort_multipart_upload(**upload)

    assert [upload["UploadId"]] == listed
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
