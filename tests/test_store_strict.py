"""The store against a server that verifies everything: what it sends is what S3 takes, and what S3 says is what it proves."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spoold.digest import ALGORITHMS, Digester, checksum_of
from spoold.errors import ObjectRefused, SpooldError, StoreDenied, Unproven
from spoold.model import Digests, Headers, StoredObject
from spoold.store import Store, confirms
from tests.proxy import Answer, Fault, FaultProxy, Flip, FlipAnswer, Hold, LoseAnswer, Request, RewriteAnswer, error_body
from tests.servers import StrictServer

BUCKET = "some-bucket"
KEY = "avatars/42/original/cat.jpg"
PART_BYTES = 5 << 20
JPEG = Headers(content_type="image/jpeg")
VERIFIED_BY = {"none": "md5"}  # but for these, the checksum itself


@pytest.fixture
def server(strict_server: StrictServer) -> StrictServer:
    strict_server.create_bucket(BUCKET)
    return strict_server


@pytest.fixture
def proxy(server: StrictServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def payload(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have botocore sign payloads, as it does over plain HTTP, or leave that to the checksum, as it does over TLS."""
    if not request.param:
        config = tmp_path / "aws-config"
        config.write_text("[default]\ns3 =\n    payload_signing_enabled = false\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    return "signed" if request.param else "unsigned"


@contextlib.contextmanager
def store_of(endpoint_url: str, checksum: str = "crc32") -> Iterator[Store]:
    with contextlib.closing(Store(endpoint_url=endpoint_url, checksum=checksum, read_timeout_s=20)) as store:
        yield store


def digests_of(body: bytes, algorithm: str) -> Digests:
    digester = Digester(algorithm)
    digester.update(body)
    return digester.digests()


def put(store: Store, body: bytes, *, algorithm: str = "crc32", key: str = KEY, headers: Headers = JPEG) -> StoredObject:
    return store.put(BUCKET, key, body, headers, digests_of(body, algorithm))


def put_parts(
    store: Store, parts: list[bytes], algorithm: str, headers: Headers = JPEG, *, at_once: int = 1
) -> StoredObject:  # fmt: skip
    return store.put_parts(
        BUCKET, KEY, iter(parts), headers, digests_of(b"".join(parts), algorithm), on_upload=lambda _: None, at_once=at_once
    )  # fmt: skip


# What S3 takes


@pytest.mark.parametrize("size", [0, 1, 4095, 65_537, (1 << 20) + 1])
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_checksum_is_verified_and_echoed_whatever_the_size(
    server: StrictServer, payload: str, algorithm: str, size: int
) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]

    with store_of(server.endpoint_url, algorithm) as store:
        stored = put(store, body, algorithm=algorithm)
        looked_up = store.head(BUCKET, KEY)

    digests = digests_of(body, algorithm)
    verified = server.verified()
    assert 1 == verified[VERIFIED_BY.get(algorithm, algorithm)]
    assert (payload == "signed") == (verified["payload"] == 3), "the bucket, the PUT and the HEAD"
    assert (digests.md5, size) == (stored.etag, stored.size)
    if algorithm != "none":
        assert (algorithm, digests.checksum) == (stored.checksum_algorithm, stored.checksum)
    assert looked_up is not None and confirms(looked_up, digests) is True
    assert [] == server.refused()


@pytest.mark.parametrize("kms", [False, True], ids=["", "kms"])
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_checksum_of_parts_is_verified_and_echoed(server: StrictServer, algorithm: str, kms: bool) -> None:
    parts = [b"a" * PART_BYTES, b"b" * PART_BYTES, b"odd"]
    headers = Headers(content_type="video/mp4", server_side_encryption="aws:kms" if kms else None)

    with store_of(server.endpoint_url, algorithm) as store:
        stored = put_parts(store, parts, algorithm, headers)
        looked_up = store.head(BUCKET, KEY)

    digests = digests_of(b"".join(parts), algorithm)
    verified = server.verified()
    etag = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
    own = b"".join(base64.b64decode(checksum_of(part, algorithm)) for part in parts)
    expected = {"sha256": f"{checksum_of(own, algorithm)}-3", "none": None}.get(algorithm, digests.checksum)
    assert 3 == verified[VERIFIED_BY.get(algorithm, algorithm)]
    assert verified.get(f"whole {algorithm}", 0) == (algorithm not in ("sha256", "none"))
    assert (f"{etag}-3" == stored.etag) != kms
    if algorithm != "none":
        assert (algorithm, expected) == (stored.checksum_algorithm, stored.checksum)
        assert looked_up is not None and (looked_up.etag, looked_up.checksum) == (stored.etag, expected)
    assert [] == server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [] == server.refused()


@pytest.mark.parametrize("in_parts", [False, True], ids=["", "in parts"])
def test_everything_kept_with_an_object_arrives(server: StrictServer, in_parts: bool) -> None:
    server.set(acls=True)
    headers = Headers(
        content_type="image/jpeg", acl="public-read", cache_control="public, max-age=31536000", storage_class="STANDARD_IA",
        server_side_encryption="AES256", tags=(("app", "my shop"), ("a+b", "c/d=@:."), ("ü", "")), metadata=(("app", "shop"),),
    )  # fmt: skip

    with store_of(server.endpoint_url) as store:
        if in_parts:
            put_parts(store, [b"a cat"], "crc32", headers)
        else:
            put(store, b"a cat", headers=headers)

    kept = server.kept(BUCKET, KEY)
    expected = {
        "content-type": "image/jpeg", "x-amz-acl": "public-read", "cache-control": "public, max-age=31536000",
        "x-amz-storage-class": "STANDARD_IA", "x-amz-server-side-encryption": "AES256", "x-amz-meta-app": "shop",
        "x-amz-tagging": "app=my%20shop&a%2Bb=c%2Fd%3D%40%3A.&%C3%BC=",
    }  # fmt: skip
    assert expected == {name: kept[name] for name in expected}
    assert [] == server.refused()


@pytest.mark.parametrize(
    "key",
    [
        "k" * 1024, "ü" * 512, "a b+c%20d&e=f?g#h;i", "quote'\"`",
        "tab\tnew\nline", "a//b", "/a", "a/./b/../c", "-dash", "noext.",
        "\N{GRINNING FACE}", "e\N{COMBINING ACUTE ACCENT}", "\\", "~tilde_-.*()!$,:@[]{}|^<>", "日本/語",
    ],
    ids=lambda key: key[:12].encode("unicode_escape").decode(),
)  # fmt: skip
def test_every_key_that_s3_takes_is_signed_as_s3_signs_it(server: StrictServer, key: str) -> None:
    with store_of(server.endpoint_url) as store:
        put(store, b"a cat", key=key)
        looked_up = store.head(BUCKET, key)
        read = store.digest(BUCKET, key)

        assert looked_up is not None and read == digests_of(b"a cat", "crc32")
        assert b"a cat" == server.objects(BUCKET)[key]
        store.delete(BUCKET, key)
        assert store.head(BUCKET, key) is None
    assert [] == server.refused()


def test_with_versions_it_is_the_version_that_is_told(server: StrictServer) -> None:
    server.set(versioning=True)

    with store_of(server.endpoint_url) as store:
        first, second = put(store, b"first"), put_parts(store, [b"second"], "crc32")

        assert first.version_id and second.version_id
        assert digests_of(b"first", "crc32") == store.digest(BUCKET, KEY, version_id=first.version_id)
        assert digests_of(b"second", "crc32") == store.digest(BUCKET, KEY, version_id=second.version_id)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_under_kms_a_checksum_proves_it_and_where_there_is_none_it_is_read_back(proxy: FaultProxy, algorithm: str) -> None:
    with store_of(proxy.endpoint_url, algorithm) as store:
        put(store, b"a cat", algorithm=algorithm, headers=Headers("image/jpeg", server_side_encryption="aws:kms"))

    assert (algorithm == "none") == bool(proxy.requests("GET", KEY))


# What S3 refuses


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_byte_that_flips_on_its_way_is_unproven_and_becomes_no_object(
    server: StrictServer, proxy: FaultProxy, payload: str, algorithm: str
) -> None:
    proxy.on("PUT", KEY, Flip(3))

    with (
        store_of(proxy.endpoint_url, algorithm) as store,
        pytest.raises(Unproven, match="400 XAmzContentSHA256Mismatch" if payload == "signed" else "400 BadDigest"),
    ):
        put(store, b"a cat", algorithm=algorithm)

    assert {} == server.objects(BUCKET)
    assert 1 == len(server.refused())


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("which", ["first part", "last part"])
def test_a_byte_that_flips_in_a_part_aborts_the_upload(
    server: StrictServer, proxy: FaultProxy, algorithm: str, which: str
) -> None:
    proxy.on("PUT", KEY, Flip(3), skip=0 if which == "first part" else 1, times=1)

    with store_of(proxy.endpoint_url, algorithm) as store, pytest.raises(Unproven, match=r"Mismatch|BadDigest"):
        put_parts(store, [b"a" * PART_BYTES, b"a cat"], algorithm)

    assert {} == server.objects(BUCKET)
    assert [] == server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])


def test_parts_that_the_server_has_in_other_order_are_no_object(server: StrictServer, proxy: FaultProxy) -> None:
    """What the completion lists is flipped on its way: S3 compares it with what it has."""
    proxy.on("POST", KEY, Flip(250), skip=1)

    with store_of(proxy.endpoint_url) as store, pytest.raises(SpooldError):
        put_parts(store, [b"a" * PART_BYTES, b"a cat"], "crc32")

    assert {} == server.objects(BUCKET)


def test_parts_go_side_by_side_and_land_in_any_order(server: StrictServer, proxy: FaultProxy) -> None:
    third = threading.Event()

    def first_waits_for_third(request: Request) -> Fault | None:
        if "partNumber=3" in request.path:
            third.set()
        return Hold(third) if "partNumber=1&" in f"{request.path}&" else None

    proxy.rules.append(first_waits_for_third)
    parts = [letter * PART_BYTES for letter in (b"a", b"b", b"c")]

    with store_of(proxy.endpoint_url) as store:
        put_parts(store, [*parts, b"d"], "crc32", at_once=3)

    assert {KEY: b"".join(parts) + b"d"} == server.objects(BUCKET)


def test_an_upload_is_aborted_when_none_of_its_parts_is_under_way_any_more(server: StrictServer, proxy: FaultProxy) -> None:
    """One that lands after the abort would lie there, and cost money, until somebody finds it."""
    denied = threading.Event()

    def second_fails_first(request: Request) -> Fault | None:
        if "partNumber=2" in request.path:
            denied.set()
            return Answer(403, error_body("AccessDenied"))
        return Hold(denied) if "partNumber=" in request.path else None

    proxy.rules.append(second_fails_first)

    with store_of(proxy.endpoint_url) as store, pytest.raises(StoreDenied):
        put_parts(store, [letter * PART_BYTES for letter in (b"a", b"b", b"c")], "crc32", at_once=3)

    aborted = next(seen for seen in proxy.seen if seen.method == "DELETE")
    parts = [seen for seen in proxy.seen if "partNumber=" in seen.path]
    assert all(seen.ended_at is not None and seen.ended_at <= aborted.at for seen in parts)
    assert [] == server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "parts"])
def test_what_is_sent_slowly_is_what_was_to_be_sent(server: StrictServer, payload: str, in_parts: bool) -> None:
    granted: list[int] = []

    def pace(size: int) -> int:
        granted.append(min(size, 100_000))
        return granted[-1]

    body = bytes(range(256)) * 24_000
    with contextlib.closing(Store(endpoint_url=server.endpoint_url, pace=pace)) as store:
        if in_parts:
            put_parts(store, [body[:PART_BYTES], body[PART_BYTES:]], "crc32", at_once=2)
        else:
            put(store, body)

    assert {KEY: body} == server.objects(BUCKET)
    assert len(body) <= sum(granted) < len(body) + 2000, "the bytes are asked for once, and the list of parts"


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS - {"none"}))
def test_a_checksum_that_comes_back_otherwise_is_unproven(proxy: FaultProxy, algorithm: str) -> None:
    proxy.on("PUT", KEY, RewriteAnswer({f"x-amz-checksum-{algorithm}": checksum_of(b"a dog", algorithm)}))

    with store_of(proxy.endpoint_url, algorithm) as store, pytest.raises(Unproven, match="came back for"):
        put(store, b"a cat", algorithm=algorithm)


def test_an_object_that_is_read_back_with_a_flipped_byte_is_unproven(proxy: FaultProxy) -> None:
    proxy.on("GET", KEY, FlipAnswer(2))

    with store_of(proxy.endpoint_url, "none") as store, pytest.raises(Unproven, match="other content"):
        put(store, b"a cat", algorithm="none", headers=Headers("image/jpeg", server_side_encryption="aws:kms"))


def test_a_completion_that_was_not_answered_leaves_a_whole_object(server: StrictServer, proxy: FaultProxy) -> None:
    proxy.on("POST", KEY, LoseAnswer(), skip=1)

    with store_of(proxy.endpoint_url) as store, pytest.raises(SpooldError) as caught:
        put_parts(store, [b"a cat"], "crc32")

    assert not caught.value.never_sent  # type: ignore[attr-defined]
    assert {KEY: b"a cat"} == server.objects(BUCKET)
    assert [] == server.refused(but=["NoSuchUpload"]), "the abort comes too late"


@pytest.mark.parametrize(
    ("headers", "fault", "says"),
    [
        ({"acl": "public-read"}, StoreDenied, "AccessControlListNotSupported"),
        ({"storage_class": "CHEAP"}, ObjectRefused, "InvalidStorageClass"),
        ({"tags": (("a", "b;c"),)}, ObjectRefused, "InvalidTag"),
        ({"tags": tuple((f"t{n}", "1") for n in range(11))}, ObjectRefused, "cannot be greater than 10"),
        ({"metadata": (("a", "b" * 2048),)}, ObjectRefused, "MetadataTooLarge"),
    ],
)
@pytest.mark.parametrize("in_parts", [False, True], ids=["", "in parts"])
def test_what_s3_would_not_keep_is_refused(
    server: StrictServer, headers: dict[str, Any], fault: type[SpooldError], says: str, in_parts: bool
) -> None:
    wish = Headers("image/jpeg", **headers)

    with store_of(server.endpoint_url) as store, pytest.raises(fault, match=says):
        if in_parts:
            put_parts(store, [b"a cat"], "crc32", wish)
        else:
            put(store, b"a cat", headers=wish)


def test_a_key_that_is_too_long_is_refused(server: StrictServer) -> None:
    with store_of(server.endpoint_url) as store, pytest.raises(ObjectRefused, match="KeyTooLongError"):
        put(store, b"a cat", key="ü" * 513)


@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_is_denied_with_its_remedy(server: StrictServer, offset_s: float) -> None:
    server.set(clock_offset_s=offset_s)

    with store_of(server.endpoint_url) as store, pytest.raises(StoreDenied, match="RequestTimeTooSkewed") as caught:
        put(store, b"a cat")

    assert "clock is wrong" in caught.value.hint
