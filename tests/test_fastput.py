"""Small PUTs without botocore, against a server that verifies everything: what they say, and when they stay botocore's."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from spoold.digest import ALGORITHMS, Digester
from spoold.errors import SpooldError, StoreUnavailable, Unproven
from spoold.model import Digests, Headers, StoredObject
from spoold.store import Store
from tests.proxy import HTML, Answer, FaultProxy, LoseAnswer, Reset, RewriteAnswer, error_body
from tests.servers import StrictServer

BUCKET = "some-bucket"
KEY = "avatars/42/original/cat.jpg"
JPEG = Headers(content_type="image/jpeg")


@pytest.fixture
def server(strict_server: StrictServer) -> StrictServer:
    strict_server.create_bucket(BUCKET)
    return strict_server


@pytest.fixture
def proxy(server: StrictServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url) as proxy:
        yield proxy


@contextlib.contextmanager
def store_of(endpoint_url: str, checksum: str = "crc32", *, learns: bool = True, **more: Any) -> Iterator[Store]:
    """Yield a store, and have it put its first object, after which it knows how."""
    with contextlib.closing(Store(endpoint_url=endpoint_url, checksum=checksum, quick_connections=8, **more)) as store:
        if learns:
            store.put(BUCKET, "first", b"first", JPEG, digests_of(b"first", checksum))
        yield store


def digests_of(body: bytes, algorithm: str = "crc32") -> Digests:
    digester = Digester(algorithm)
    digester.update(body)
    return digester.digests()


def begun(
    store: Store, body: bytes, *, key: str = KEY, headers: Headers = JPEG, algorithm: str = "crc32", now: float | None = None
) -> StoredObject | SpooldError | None:
    """Put it the quick way, and return what came of it; None if it does not go that way."""
    ends: queue.SimpleQueue[StoredObject | SpooldError] = queue.SimpleQueue()
    at = time.time() if now is None else now
    if not store.begin_put(BUCKET, key, body, headers, digests_of(body, algorithm), now=at, done=ends.put):
        return None
    return ends.get(timeout=20)


def said(server: StrictServer) -> dict[str, str]:
    """Return the headers that an object came with, but for who sent it and when."""
    own = ("accept-encoding", "amz-sdk-invocation-id", "amz-sdk-request", "authorization", "user-agent", "x-amz-date")
    return {name: value for name, value in server.kept(BUCKET, KEY).items() if name not in own}


def stored(end: StoredObject | SpooldError | None) -> StoredObject:
    assert isinstance(end, StoredObject), f"it is {end!r}"
    return end


@pytest.mark.parametrize("size", [0, 1, 65_537])
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_it_is_what_botocore_would_have_stored(server: StrictServer, algorithm: str, size: int) -> None:
    body = b"x" * size
    with store_of(server.endpoint_url, algorithm) as store:
        slow = store.put(BUCKET, KEY, body, JPEG, digests_of(body, algorithm))
        by_botocore = said(server)
        store.delete(BUCKET, KEY)
        quick = begun(store, body, algorithm=algorithm)

    assert slow == quick
    assert body == server.objects(BUCKET)[KEY]
    assert by_botocore == said(server)
    assert [] == server.refused()


def test_everything_kept_with_an_object_arrives(server: StrictServer) -> None:
    server.set(acls=True)
    headers = Headers(
        content_type="image/jpeg", acl="public-read", cache_control="public, max-age=31536000", storage_class="STANDARD_IA",
        server_side_encryption="AES256", tags=(("app", "my shop"), ("a+b", "c/d=@:."), ("ü", "")),
        metadata=(("App", "shop"), ("b", "two words")),
    )  # fmt: skip
    with store_of(server.endpoint_url) as store:
        store.put(BUCKET, KEY, b"a cat", headers, digests_of(b"a cat"))
        by_botocore = said(server)
        stored(begun(store, b"a cat", headers=headers))

    assert "my%20shop" in by_botocore["x-amz-tagging"]
    assert by_botocore == said(server)


@pytest.mark.parametrize(
    "key",
    [
        "k" * 1024, "ü" * 512, "a b+c%20d&e=f?g#h;i", "quote'\"`", "tab\tnew\nline", "a//b", "/a", "a/./b/../c", "-dash",
        "noext.", "\N{GRINNING FACE}", "e\N{COMBINING ACUTE ACCENT}", "\\", "~tilde_-.*()!$,:@[]{}|^<>", "日本/語",
    ],
    ids=lambda key: key[:12].encode("unicode_escape").decode(),
)  # fmt: skip
def test_every_key_that_s3_takes_arrives_under_its_name(server: StrictServer, key: str) -> None:
    with store_of(server.endpoint_url) as store:
        stored(begun(store, b"a cat", key=key))

    assert b"a cat" == server.objects(BUCKET)[key]
    assert [] == server.refused()


def test_the_first_is_botocores_and_tells_how(server: StrictServer) -> None:
    with store_of(server.endpoint_url, learns=False) as store:
        before = begun(store, b"a cat")
        store.put(BUCKET, KEY, b"a cat", JPEG, digests_of(b"a cat"))
        after = begun(store, b"a cat")

    assert before is None
    assert "image/jpeg" == stored(after).content_type


@pytest.mark.parametrize(
    "headers",
    [
        Headers(content_type="image/jpeg", cache_control="públic"),
        Headers(content_type="image/jpeg", metadata=(("app", "a\r\nx-amz-acl: public-read"),)),
        Headers(content_type=" image/jpeg"),
    ],
    ids=["not ASCII", "a line more", "white space"],
)
def test_what_a_header_cannot_say_as_it_is_stays_botocores(server: StrictServer, headers: Headers) -> None:
    with store_of(server.endpoint_url) as store:
        assert begun(store, b"a cat", headers=headers) is None


def test_behind_a_proxy_it_stays_botocores(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.endpoint_url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    store = Store(endpoint_url="http://127.0.0.1:9", quick_connections=8)
    with contextlib.closing(store), contextlib.suppress(SpooldError):
        store.put(BUCKET, KEY, b"a cat", JPEG, digests_of(b"a cat"))
    with contextlib.closing(store):
        assert begun(store, b"a cat") is None


@pytest.mark.parametrize(
    ("fault", "never_sent"),
    [(LoseAnswer(), False), (Reset(), False), (Answer(503, error_body("SlowDown")), False), (Answer(500, b""), False),
     (Answer(403, error_body("ExpiredToken")), True), (Answer(400, error_body("AuthorizationHeaderMalformed")), True),
     (Answer(307, b"", headers={"Location": "http://127.0.0.1:9/"}), True)],
    ids=["no answer", "reset", "503", "500", "403", "400", "307"],
)  # fmt: skip
def test_what_is_no_success_is_no_success(proxy: FaultProxy, fault: Any, never_sent: bool) -> None:
    with store_of(proxy.endpoint_url) as store:
        proxy.on("PUT", KEY, fault, times=1)
        end = begun(store, b"a cat")
        again = begun(store, b"a cat")

    assert isinstance(end, StoreUnavailable) and end.never_sent == never_sent
    assert (again is None) == never_sent, "what was refused is botocore's from now on"
    assert 1 + (not never_sent) == len(proxy.requests("PUT", KEY)), "nothing is sent twice of its own accord"


@pytest.mark.parametrize(
    "fault",
    [HTML, RewriteAnswer({"ETag": None}),
     RewriteAnswer({"ETag": '"d41d8cd98f00b204e9800998ecf8427e"', "x-amz-checksum-crc32": None}),
     RewriteAnswer({"x-amz-checksum-crc32": "AAAAAA=="})],
    ids=["a page", "no ETag", "another ETag", "another checksum"],
)  # fmt: skip
def test_a_200_that_proves_nothing_proves_nothing(proxy: FaultProxy, fault: Any) -> None:
    with store_of(proxy.endpoint_url) as store:
        proxy.on("PUT", KEY, fault, times=1)

        assert isinstance(begun(store, b"a cat"), Unproven)


def test_where_answers_prove_nothing_botocore_reads_each_object_back(proxy: FaultProxy) -> None:
    with store_of(proxy.endpoint_url) as store:
        proxy.on("PUT", "", RewriteAnswer({"ETag": '"opaque"', "x-amz-checksum-crc32": None}))
        first = begun(store, b"a cat")
        store.put(BUCKET, KEY, b"a cat", JPEG, digests_of(b"a cat"))

        assert isinstance(first, Unproven)
        assert begun(store, b"a cat") is None


def test_a_wrong_clock_is_botocores_to_find_out(server: StrictServer) -> None:
    with store_of(server.endpoint_url) as store:
        end = begun(store, b"a cat", now=time.time() - 3600)

        assert isinstance(end, StoreUnavailable) and end.never_sent
        assert begun(store, b"a cat") is None


def test_credentials_that_cannot_be_renewed_are_botocores_to_tell(server: StrictServer) -> None:
    class Expired:
        def get_frozen_credentials(self) -> None:
            raise RuntimeError("the role is not there any more")

    with store_of(server.endpoint_url) as store:
        store._credentials[store._client] = Expired()

        assert begun(store, b"a cat") is None


def test_many_at_once(server: StrictServer) -> None:
    ends: queue.SimpleQueue[StoredObject | SpooldError] = queue.SimpleQueue()
    with store_of(server.endpoint_url) as store:
        for number in range(100):
            body = f"cat {number}".encode()
            key = f"avatars/{number}/original/cat.jpg"
            assert store.begin_put(BUCKET, key, body, JPEG, digests_of(body), now=time.time(), done=ends.put)
        found = [stored(ends.get(timeout=20)) for _ in range(100)]

    objects = server.objects(BUCKET)
    assert {f"avatars/{number}/original/cat.jpg" for number in range(100)} == {each.key for each in found}
    assert all(objects[f"avatars/{number}/original/cat.jpg"] == f"cat {number}".encode() for number in range(100))
