"""The bucket as a few verbs. With store_faults, which says what came back, the only home of botocore, boto3's own floor.

Nothing is retried here: one request, one answer, and whoever called decides what follows (FACTS 24). botocore is
imported by the first request: with its first client it takes 0.2 s, which `spoold status` would wait for.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import re
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlencode

from spoold.digest import FULL_OBJECT, Digester, checksum_of
from spoold.errors import Changed, SpooldError, StoreDenied, StoreUnavailable, Unproven
from spoold.fastput import FastPut, in_botocores_words
from spoold.model import Digests, Headers, StoredObject
from spoold.sigv4 import Secrets
from spoold.store_faults import (
    CREDENTIALS,
    answer_unless,
    demand,
    fault_of,
    refuse_pages,
    safely_said,
    stay_unless_told_where_to_go,
)
from spoold.wire import End, Unanswered, Wire

_CHECKSUM_FIELD = {
    "crc32": "ChecksumCRC32",
    "crc32c": "ChecksumCRC32C",
    "crc64nvme": "ChecksumCRC64NVME",
    "sha256": "ChecksumSHA256",
}
_MD5 = re.compile("[0-9a-f]{32}", re.IGNORECASE)  # Aliyun writes capitals
_CHUNK_BYTES = 1 << 20
_SMALL_BYTES = 1 << 20
PROBE = bytes(range(256)) * 16


class Store:
    """Puts, looks up, reads and deletes objects; safe to share between threads.

    region, profile: None leaves them to boto3's own chain, as credentials always are. connections: kept alive at most.
    quick_connections: for small objects, one request on each; 0 leaves those to boto3 too. pool: sends parts of large ones;
    whoever calls a verb must not be of it. pace: is asked for so many bytes, and returns as many as may
    be sent now, when they may.
    Every verb raises StoreUnavailable (later; it may have been carried out unless `never_sent`), StoreDenied (nothing
    will work until somebody acts) or Unproven (something answered, but not as S3 does).
    """

    def __init__(
        self,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        addressing_style: str = "auto",
        checksum: str = "crc32",
        connections: int = 16,
        connect_timeout_s: float = 10,
        read_timeout_s: float = 60,
        quick_connections: int = 0,
        pool: Executor | None = None,
        pace: Callable[[int], int] | None = None,
    ) -> None:
        self._endpoint_url = endpoint_url
        self._region = region
        self._profile = profile
        self._checksum = checksum
        self._client_settings = {
            "s3": {"addressing_style": addressing_style},
            "max_pool_connections": connections,
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
            "retries": {"total_max_attempts": 1},
            "tcp_keepalive": True,
            # Else botocore adds trailing checksums of its own, which R2, B2 and older Ceph refuse (FACTS 25).
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        self._fast: FastPut | None = None
        if quick_connections:
            wire = Wire(
                connections=quick_connections, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s, tls=self._tls
            )
            self._fast = FastPut(wire)
        self._pool = pool or ThreadPoolExecutor(connections, thread_name_prefix="part")
        self._pace = pace
        self._putting = threading.local()
        self._client: Any = None
        self._credentials: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by client
        self._lock = threading.Lock()

    # Verbs

    def put(self, bucket: str, key: str, body: bytes, headers: Headers, digests: Digests) -> StoredObject:
        """Store `body`, whose digests are `digests`, and return what the server confirmed.

        Raises ObjectRefused and StoreDenied only if nothing was stored. Unproven is raised for what may be there: the
        answer, or the object when it was read back, does not match (contract, section 6, rule 5).
        """
        what = f"put {key}"
        self._putting.went = None
        with self._asking(what) as client:
            answer = client.put_object(Bucket=bucket, Key=key, Body=body, **_kept_with_it(headers), **_to_be_verified(digests))
            demand(what, answer, "ETag")
        if self._fast is not None and self._putting.went is not None:
            self._fast.learn(bucket, key, *self._putting.went)
        stored = _stored(bucket, key, digests.size, headers.content_type, answer, digests.checksum_algorithm)
        is_confirmed = confirms(stored if _has_md5_etag(answer) else replace(stored, etag=""), digests)
        if is_confirmed is False:
            raise Unproven(f"{what}: {stored.checksum_algorithm} {stored.checksum} came back for {digests.checksum}")
        if is_confirmed is None:
            self._read_back(what, stored, digests)
        return stored

    def has_quick_way(self, bucket: str) -> bool:
        """Say whether `begin_put` may do something for this bucket."""
        return self._fast is not None and self._fast.knows(bucket)

    def begin_put(
        self, bucket: str, key: str, body: bytes, headers: Headers, digests: Digests, *, now: float,
        done: Callable[[StoredObject | SpooldError], None],
    ) -> bool:  # fmt: skip
        """Begin to store `body` in a quicker way, where there is one, and say whether that was done; else it is for `put`.

        done: called once, in another thread, where it must not block: with what the server confirmed; or with a fault, and
        then `put` knows what it is. now: seconds since the epoch.
        """
        fast = self._fast
        if fast is None:
            return False

        def ended(end: End) -> None:
            done(self._judged(fast, bucket, key, headers, digests, end))

        with self._lock:
            credentials = None if self._client is None else self._credentials.get(self._client)
        if credentials is None:
            return False
        try:
            frozen = credentials.get_frozen_credentials()
        except Exception:  # they are to be renewed, and a helper or a role may raise anything: `put` says what
            return False
        secrets = Secrets(frozen.access_key, frozen.secret_key, frozen.token)
        said = {**_kept_with_it(headers), **_to_be_verified(digests)}
        return fast.put(bucket, key, body, said, digests.sha256, secrets, now=now, done=ended)

    def _judged(
        self, fast: FastPut, bucket: str, key: str, headers: Headers, digests: Digests, end: End
    ) -> StoredObject | SpooldError:
        what = f"put {key}"
        if isinstance(end, Unanswered):
            return StoreUnavailable(f"{what}: {end}", never_sent=not end.was_sent)
        answer = in_botocores_words(end)
        if end.status != 200:
            if end.status < 500:
                fast.forget(bucket)  # it may have moved, or the clock is wrong: botocore finds out
            return StoreUnavailable(f"{what}: {end.status}", never_sent=end.status < 500)
        if not answer.get("ETag", "").strip('"'):
            return Unproven(f"{what}: 200 without ETag proves nothing")
        stored = _stored(bucket, key, digests.size, headers.content_type, answer, digests.checksum_algorithm)
        is_confirmed = confirms(stored if _has_md5_etag(answer) else replace(stored, etag=""), digests)
        if is_confirmed:
            return stored
        if is_confirmed is None:
            fast.forget(bucket, for_good=True)  # each object is to be read back
        return Unproven(f"{what}: what came back does not prove it")

    def put_parts(
        self,
        bucket: str,
        key: str,
        parts: Iterable[bytes],
        headers: Headers,
        digests: Digests,
        *,
        on_upload: Callable[[str], None],
        at_once: int = 1,
    ) -> StoredObject:
        """Store what `parts` yields as one object, and return what the server confirmed.

        parts: of 5 MiB or more each, but the last; at most 10,000. They are asked for one after the other, and sent side by
        side: no more than `at_once` are held. on_upload: is given the upload's id and must return before the first part is
        sent, so that a crash leaves nothing that cannot be aborted.
        Raises as `put` does, Changed if the parts together are not what `digests` tells, and whatever `parts` and
        `on_upload` raise; in all these cases the upload is aborted if the server can be reached. No object comes to be
        before all parts are there, so StoreUnavailable is `never_sent` until then.
        """
        what = f"put {key}"
        upload_id: str | None = None
        try:
            try:
                upload_id = self._begin(what, bucket, key, headers, digests.checksum_algorithm)
                on_upload(upload_id)
                upload = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
                sent = self._send(what, upload, parts, digests, at_once)
            except StoreUnavailable as error:
                error.never_sent = True
                raise
            answer = self._complete(what, bucket, key, upload_id, sent, digests)
        except BaseException:
            if upload_id is not None:
                with contextlib.suppress(SpooldError):
                    self.abort(bucket, key, upload_id)
            raise
        stored = _stored(bucket, key, digests.size, headers.content_type, answer, digests.checksum_algorithm)
        if not (confirms(stored, digests) or _confirms_parts(stored, [part for _, part in sent])):
            self._read_back(what, stored, digests)
        return stored

    def head(self, bucket: str, key: str) -> StoredObject | None:
        """Return what the server says of a key, or None if there is nothing (or no bucket: HEAD cannot tell)."""
        what = f"head {key}"
        mode = {} if self._checksum == "none" else {"ChecksumMode": "ENABLED"}
        with self._asking(what) as client:
            answer = answer_unless({"404"}, client.head_object, Bucket=bucket, Key=key, **mode)
        if answer is None:
            return None
        demand(what, answer, "ETag", "ContentLength")
        return _stored(bucket, key, answer["ContentLength"], answer.get("ContentType", ""), answer, self._checksum)

    def digest(self, bucket: str, key: str, *, version_id: str | None = None) -> Digests | None:
        """Read an object to its end and return its digests, or None if it is not there."""
        what = f"get {key}"
        version = {"VersionId": version_id} if version_id else {}
        digester = Digester(self._checksum)
        with self._asking(what) as client:
            answer = answer_unless({"NoSuchKey", "NoSuchVersion"}, client.get_object, Bucket=bucket, Key=key, **version)
            if answer is None:
                return None
            with contextlib.closing(answer["Body"]) as body:
                demand(what, answer, "ETag")
                for chunk in body.iter_chunks(_CHUNK_BYTES):
                    digester.update(chunk)
        return digester.digests()

    def listing(self, bucket: str, prefix: str) -> Iterator[tuple[StoredObject, float]]:
        """Yield every object whose key begins with `prefix`, in the order of keys, and when it was put, by the server's clock.

        As far as a listing tells: no content type, and a checksum only by its ETag. Moments in seconds since the epoch.
        """
        page: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        while page:
            with self._asking(f"list {bucket}/{prefix}") as client:
                answer = client.list_objects_v2(**page)
            for entry in answer.get("Contents", ()):
                etag, modified_at = entry["ETag"].strip('"'), entry["LastModified"].timestamp()
                yield StoredObject(bucket, entry["Key"], entry["Size"], "", etag), modified_at
            more = answer.get("NextContinuationToken")
            page = {**page, "ContinuationToken": more} if more else {}

    def delete(self, bucket: str, key: str) -> None:
        """Delete a key; that it is not there is fine too."""
        what = f"delete {key}"
        with self._asking(what) as client:
            answer_unless({"NoSuchKey"}, client.delete_object, Bucket=bucket, Key=key)

    def abort(self, bucket: str, key: str, upload_id: str) -> None:
        """Give up a multipart upload; that it is unknown, aborted or complete is fine too."""
        what = f"abort {key}"
        with self._asking(what) as client:
            upload = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
            answer_unless({"NoSuchUpload"}, client.abort_multipart_upload, **upload)

    def probe(self, bucket: str, key: str, headers: Headers) -> None:
        """Put an object and delete it: does the destination take what this configuration writes?

        Raises what `put` raises; that it could not be deleted is no matter.
        """
        digester = Digester(self._checksum)
        digester.update(PROBE)  # an empty one arrives also at a server that is full, and through a wire that flips bits
        self.put(bucket, key, PROBE, headers, digester.digests())
        with contextlib.suppress(SpooldError):
            self.delete(bucket, key)

    # The connection

    def connect(self) -> Any:
        """Return the client; the first call makes it, reading profile and credentials."""
        with self._lock:
            if self._client is None:
                from botocore.config import Config
                from botocore.exceptions import BotoCoreError

                session = self._session()
                try:
                    client = session.create_client(
                        "s3",
                        region_name=self._region,
                        endpoint_url=self._endpoint_url,
                        config=Config(**self._client_settings),
                    )
                except (BotoCoreError, OSError, ValueError) as error:  # no URL; no such credential helper, or no JSON
                    hint = "look at s3.endpoint_url, s3.region, s3.profile and the credentials"
                    raise StoreDenied(f"connect: {safely_said(error)}", hint=hint) from error
                client.meta.events.register_last("before-call.s3", _send_small_bodies_at_once)
                # A wildcard's handlers come first, before those that send again.
                client.meta.events.register("needs-retry.s3.*", refuse_pages)
                client.meta.events.register("needs-retry.s3.*", stay_unless_told_where_to_go)
                if self._pace is not None:
                    client.meta.events.register("before-send.s3", self._slow_down)
                if self._fast is not None:
                    client.meta.events.register_last("before-send.s3.PutObject", self._watch_it_go)
                self._client = client
                self._credentials[client] = session.get_credentials()
            return self._client

    def close(self) -> None:
        """Close idle connections; a later verb would open new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._fast is not None:
            self._fast.close()

    def _watch_it_go(self, request: Any, **_: object) -> None:
        from botocore.utils import get_environ_proxies

        if not get_environ_proxies(request.url):
            authorization = request.headers.get("Authorization", b"")
            said = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
            self._putting.went = (request.url, said)

    def _slow_down(self, request: Any, **_: object) -> None:
        if self._pace is not None and request.body:
            request.body = _Paced(request.body if isinstance(request.body, bytes) else request.body.read(), self._pace)

    def _tls(self) -> ssl.SSLContext:
        """Return how certificates are verified: as botocore does."""
        from botocore.httpsession import get_cert_path

        bundle = self._session().get_config_variable("ca_bundle") or get_cert_path(True)
        return ssl.create_default_context(cafile=bundle)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """Yield the client, and turn what botocore raises into ours. what: "verb key", how the message begins."""
        client = self.connect()
        try:
            yield client
        except Exception as error:
            fault = fault_of(what, error)
            if fault is None:
                raise
            if isinstance(fault, StoreDenied):
                # A client keeps the credentials it was made with: with a new one the next try sees them corrected, and
                # a held spool recovers by itself. Not closed: other threads may be using it.
                with self._lock:
                    self._client = None if self._client is client else self._client
                if fault.is_everywhere and fault.hint == CREDENTIALS and self._has_other_credentials_than(client):
                    # They were rotated in good time, and only we kept the old ones: nobody need act.
                    because = f"{fault}, but there are other credentials now"
                    fault = StoreUnavailable(because, hint=fault.hint, never_sent=True, is_everywhere=True)
            raise fault from error

    def _has_other_credentials_than(self, client: Any) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = self._session().get_credentials()
            return bool(found.get_frozen_credentials() != self._credentials[client].get_frozen_credentials())
        except (AttributeError, BotoCoreError, ClientError, OSError, ValueError):  # there are none, or none can be had
            return False

    def _session(self) -> Any:
        """Return what reads profile and credentials anew."""
        from botocore.session import Session

        session = Session(profile=self._profile)
        session.register_component("data_loader", _models())
        return session

    # Parts

    def _begin(self, what: str, bucket: str, key: str, headers: Headers, algorithm: str) -> str:
        checksum = {} if algorithm == "none" else {"ChecksumAlgorithm": algorithm.upper(), **_checksum_type(algorithm)}
        with self._asking(what) as client:
            answer = client.create_multipart_upload(Bucket=bucket, Key=key, **_kept_with_it(headers), **checksum)
            demand(what, answer, "UploadId")
        return str(answer["UploadId"])

    def _send(
        self, what: str, upload: dict[str, Any], parts: Iterable[bytes], digests: Digests, at_once: int
    ) -> list[tuple[str, Digests]]:
        """Send the parts and return the ETag and the digests of each. When this ends, none is on its way any more."""
        sent: list[Future[tuple[str, Digests]]] = []
        under_way: set[Future[Any]] = set()
        whole = hashlib.sha256()
        try:
            for number, part in enumerate(parts, start=1):
                whole.update(part)
                sent.append(self._pool.submit(self._send_part, what, {**upload, "PartNumber": number}, part, digests))
                under_way.add(sent[-1])
                del part  # it may be large, and the next one is about to be read
                while len(under_way) >= at_once:
                    ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            answers = [future.result() for future in sent]
        finally:
            for future in under_way:
                future.cancel()
            wait(under_way)
        if whole.hexdigest() != digests.sha256:
            # The parts' ETags would prove that the wrong bytes arrived well.
            raise Changed(f"{what}: the parts are not the content that was hashed")
        return answers

    def _send_part(self, what: str, where: dict[str, Any], part: bytes, whole: Digests) -> tuple[str, Digests]:
        digester = Digester(whole.checksum_algorithm)
        digester.update(part)
        digests = digester.digests()
        with self._asking(what) as client:
            answer = client.upload_part(**where, Body=part, **_to_be_verified(digests))
            demand(what, answer, "ETag")
        return answer["ETag"], digests

    def _complete(
        self, what: str, bucket: str, key: str, upload_id: str, sent: list[tuple[str, Digests]], digests: Digests
    ) -> dict[str, Any]:
        algorithm = digests.checksum_algorithm
        field = _CHECKSUM_FIELD.get(algorithm)
        listed = [
            {"PartNumber": number, "ETag": etag} | ({field: part.checksum} if field else {})
            for number, (etag, part) in enumerate(sent, start=1)
        ]
        whole = {} if field is None else _checksum_type(algorithm)
        if field and algorithm in FULL_OBJECT:
            whole[field] = digests.checksum
        with self._asking(what) as client:
            answer: dict[str, Any] = client.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": listed}, **whole
            )
            demand(what, answer, "ETag")
        return answer

    # Proof

    def _read_back(self, what: str, stored: StoredObject, digests: Digests) -> None:
        """Compare the object itself, because nothing in the answer can be compared.

        All its faults are Unproven: the PUT was answered, and neither "denied" nor "never sent" is true of it.
        """
        try:
            found = self.digest(stored.bucket, stored.key, version_id=stored.version_id)
        except SpooldError as error:
            raise Unproven(f"{what}: no comparable digest came back, then {error}", hint=error.hint) from error
        if found is None or found.sha256 != digests.sha256:
            there = "nothing" if found is None else f"other content ({found.size} of {digests.size} bytes)"
            raise Unproven(f"{what}: confirmed, but {there} was read back")


@functools.cache
def _models() -> Any:
    """Return botocore's descriptions of services; all clients share them, as reading them takes 80 of their 100 ms."""
    from botocore.loaders import create_loader

    return create_loader()


def confirms(stored: StoredObject, digests: Digests) -> bool | None:
    """Say whether what the server told of an object is `digests`: True, False, or None if that cannot be told from it.

    A differing ETag makes None, not False, even beside an equal checksum: it may be that of a KMS-encrypted object,
    which is no MD5 but looks like one, or the checksum may be one that the server only repeats, as rclone's HEAD does.
    Read the object back then.
    """
    if stored.size != digests.size:
        return False
    is_comparable = stored.checksum is not None and stored.checksum_algorithm == digests.checksum_algorithm
    if is_comparable and "-" not in str(stored.checksum) and stored.checksum != digests.checksum:
        return False
    if _MD5.fullmatch(stored.etag):
        return True if stored.etag.lower() == digests.md5 else None
    return True if is_comparable and stored.checksum == digests.checksum else None


def _confirms_parts(stored: StoredObject, parts: list[Digests]) -> bool:
    """Say whether the ETag or the checksum is the one that S3 makes of these parts' own."""
    md5s = b"".join(bytes.fromhex(part.md5) for part in parts)
    if stored.etag == f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(parts)}":
        return True
    algorithm = stored.checksum_algorithm
    if algorithm is None or algorithm not in {part.checksum_algorithm for part in parts}:
        return False
    checksums = b"".join(base64.b64decode(part.checksum) for part in parts)
    return stored.checksum == f"{checksum_of(checksums, algorithm)}-{len(parts)}"


def _stored(bucket: str, key: str, size: int, content_type: str, answer: dict[str, Any], algorithm: str) -> StoredObject:
    """Return what `answer` confirms, with its checksum by `algorithm`, else by any other."""
    checksums = {name: answer[field] for name, field in _CHECKSUM_FIELD.items() if answer.get(field)}
    if answer.get("ChecksumType") == "COMPOSITE":  # moto leaves the "-N" away, which makes it look like the whole's
        checksums = {name: checksum for name, checksum in checksums.items() if "-" in checksum}
    found = algorithm if algorithm in checksums else next(iter(checksums), None)
    return StoredObject(
        bucket=bucket,
        key=key,
        size=size,
        content_type=content_type,
        etag=answer["ETag"].strip('"'),
        checksum_algorithm=found,
        checksum=checksums[found] if found else None,
        version_id=answer.get("VersionId"),
    )


def _has_md5_etag(answer: dict[str, Any]) -> bool:
    """Source: S3 API, Object: the ETag of an object encrypted with KMS or a customer's key is no MD5."""
    is_kms = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return not is_kms and "SSECustomerAlgorithm" not in answer


# What is sent


class _Paced(io.BytesIO):
    """A body that is read no faster than it may be sent: a little at a time, so that its rate holds over any second."""

    def __init__(self, body: bytes, pace: Callable[[int], int]) -> None:
        super().__init__(body)
        self._pace = pace

    def read(self, size: int | None = -1) -> bytes:
        left = len(self.getbuffer()) - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        return super().read(self._pace(wanted)) if wanted else b""


def _kept_with_it(headers: Headers) -> dict[str, Any]:
    """Return `headers` by botocore's names; what is not set is not sent."""
    fields = {
        "ContentType": headers.content_type,
        "ACL": headers.acl,
        "CacheControl": headers.cache_control,
        "StorageClass": headers.storage_class,
        "ServerSideEncryption": headers.server_side_encryption,
        "Tagging": urlencode(headers.tags, quote_via=quote),
        "Metadata": dict(headers.metadata),
    }
    return {name: value for name, value in fields.items() if value}


def _to_be_verified(digests: Digests) -> dict[str, str]:
    """Return the one digest that the server shall verify: R2 refuses two, and old servers know but MD5."""
    field = _CHECKSUM_FIELD.get(digests.checksum_algorithm)
    if field is not None:
        return {field: digests.checksum}
    return {"ContentMD5": base64.b64encode(bytes.fromhex(digests.md5)).decode("ascii")}


def _checksum_type(algorithm: str) -> dict[str, str]:
    return {"ChecksumType": "FULL_OBJECT" if algorithm in FULL_OBJECT else "COMPOSITE"}


def _send_small_bodies_at_once(params: dict[str, Any], **_: object) -> None:
    # botocore asks "Expect: 100-continue" before every body: a second round trip for each object (64 ms instead of 34
    # behind 30 ms of latency, November 2026), and a whole second with servers that do not answer it.
    body: Any = params.get("body")
    if hasattr(body, "getbuffer") and body.getbuffer().nbytes <= _SMALL_BYTES:
        params["headers"].pop("Expect", None)
