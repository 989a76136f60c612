"""Put every file of a batch in the bucket and prove that it is there. Changes nothing in the ledger, deletes nothing.

`prepare` makes the files durable, hashes them and says which PUTs there are; the ledger writes these down; `put` sends
exactly the bytes that were hashed and says what became of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import structlog
import tenacity

from spoold.clock import Clock
from spoold.content_type import sniff
from spoold.digest import Digester
from spoold.errors import BadPath, Changed, ClaimLost, Draining, SpooldError, Stale, StoreUnavailable, Unproven
from spoold.layout import Layout
from spoold.model import ORIGINAL, Answer, Batch, BatchFile, Digests, Headers, Identity, Put, PutResult, StoredObject
from spoold.spool import Spool, begin_to_write_out, fault_of
from spoold.steps import Ask, Steps, Turn
from spoold.store import Store
from spoold.window import Window

log = structlog.get_logger()

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 4096
_OPEN_AT_ONCE = 32  # files of one batch; many batches are prepared side by side
_KEPT_FILE_BYTES = 1 << 20  # a file up to this size is sent from the bytes that were hashed; a larger one is read twice
_KEPT_BATCH_BYTES = 8 << 20
_PART_BYTES = 8 << 20
_AT_MOST = 16
_PARTS_AT_ONCE = 4  # of one file
_MOST_PARTS = 9_000  # S3 allows 10,000
_PACED_BYTES = 1 << 16
_PACED_S = 0.02
_NEVER = threading.Event()
_PERSISTENCE_S = 8.0  # what one attempt tries to outlast; the ledger's next_attempt_at does the rest


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a spool's files go, and with what.

    headers_for: (attachment, style, sniffed content type) → what is stored with the object.
    multipart_threshold: bytes; files of this size and more go up in parts. checksum: as in `s3.checksum`.
    """

    bucket: str
    layout: Layout
    headers_for: Callable[[str, str, str], Headers]
    multipart_threshold: int
    checksum: str


class Budget:
    """Bounds the bytes of files that are held in memory at one time; one file may always go."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size_bytes <= self.limit_bytes)
            self._used += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= size_bytes
                self._changed.notify_all()


class Bandwidth:
    """Spaces out what is sent so that it stays below a rate, over any second; None is no limit."""

    def __init__(self, bytes_per_s: float | None, *, clock: Clock) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._free_at = clock.monotonic()
        self._lock = threading.Lock()

    @property
    def is_unlimited(self) -> bool:
        return not self._rate

    def pace(self, size_bytes: int) -> int:
        """Return how many of these bytes may be sent next, when they may: little at a time, and never none."""
        if not self._rate:
            return size_bytes
        granted = min(size_bytes, max(1, min(_PACED_BYTES, int(self._rate * _PACED_S))))
        with self._lock:
            start = max(self._free_at, self._clock.monotonic())
            self._free_at = start + granted / self._rate
        self._clock.wait(_NEVER, max(0.0, start - self._clock.monotonic()))
        return granted

    def wait_for_turn(self, stop: threading.Event) -> None:
        """Wait until what is being sent now is sent. Raises Draining if `stop` is set first."""
        if self._rate and self._clock.wait(stop, max(0.0, self._free_at - self._clock.monotonic())):
            raise Draining("the daemon is asked to stop")


class Uploader:
    """Uploads the batches of one spool.

    pool: runs the PUTs of all batches in flight, so its size is `upload.concurrency`. stop: set when the daemon drains:
    nothing new is sent then, and no try is repeated. demand_claim: raises ClaimLost unless our claims surely last; asked
    before every request, since what a daemon sends that was frozen past its claim lands on a newer version. turn: given away
    while the disk writes. window: bounds what is under way to the bucket.
    """

    def __init__(
        self, *, spool: Spool, store: Store, destination: Destination, budget: Budget, bandwidth: Bandwidth,
        clock: Clock, stop: threading.Event, demand_claim: Callable[[], None], turn: Turn | None = None,
        window: Window | None = None,
    ) -> None:  # fmt: skip
        self._spool = spool
        self._store = store
        self._to = destination
        self._budget = budget
        self._bandwidth = bandwidth
        self._clock = clock
        self._stop = stop
        self._demand_claim = demand_claim
        self._turn = turn or Turn()
        self._window = window or Window(destination.bucket, at_most=_AT_MOST, is_pinned=False, clock=clock)

    # Before the intent

    @property
    def needs_fingerprint(self) -> bool:
        """Say whether keys or URLs have the original's MD5 in them."""
        return self._to.layout.needs_fingerprint

    def prepare(self, batch: Batch, *, fingerprint: str | None) -> list[Put]:
        """Make the batch's files durable, hash them, and return what is to be put, originals first.

        fingerprint: MD5 of the record's live original, hex, for keys that need one where the batch has no original.
        Raises Changed or Vanished if a file is not the one that settled, BadPath if no key can be made for one.
        """
        files = [file for file in batch.uploads if not file.is_gone]
        files.sort(key=lambda file: (file.file.style != ORIGINAL, file.id))
        hashed: list[tuple[BatchFile, Digests, bytes, bytes | None]] = []
        room = _KEPT_BATCH_BYTES
        with self._spool.at_hand():
            for start in range(0, len(files), _OPEN_AT_ONCE):
                for one in self._hash_durably(files[start : start + _OPEN_AT_ONCE], room):
                    room -= len(one[3] or b"")
                    hashed.append(one)
            # After a power cut an unsynced file comes back empty or older, and would overwrite the good object (FACTS 16).
            with self._turn.away():
                self._spool.make_durable({os.path.dirname(file.file.path) for file in files})
        originals = {file.file.basename: digests.md5 for file, digests, _, _ in hashed if file.file.style == ORIGINAL}
        any_original = next(iter(originals.values()), fingerprint)
        return [
            self._plan(batch, file, digests, head, body, originals.get(file.file.basename, any_original))
            for file, digests, head, body in hashed
        ]

    def hash(self, file: BatchFile) -> Digests:
        """Return the digests of a file that is not uploaded: the marker."""
        [(_, digests, _, _)] = self._hash_durably([file], 0)
        return digests

    def _hash_durably(
        self, files: Sequence[BatchFile], room: int
    ) -> list[tuple[BatchFile, Digests, bytes, bytes | None]]:  # fmt: skip
        """Return of each file what `_hash` does; what was hashed, or something newer, is on the disk then."""
        with contextlib.ExitStack() as opened:
            fds = [opened.enter_context(self._spool.opened(file.file)) for file in files]
            for fd in fds:
                begin_to_write_out(fd)
            hashed = []
            for file, fd in zip(files, fds, strict=True):
                hashed.append((file, *self._hash(file, fd, room)))
                room -= len(hashed[-1][3] or b"")
            with self._turn.away():
                for fd in fds:
                    os.fsync(fd)
        return hashed

    def _hash(self, file: BatchFile, fd: int, room: int) -> tuple[Digests, bytes, bytes | None]:
        """Return a file's digests, its first bytes, and all of them if they fit; its identity is the same before and after."""
        digester = Digester(self._to.checksum)
        chunks = []
        keep = file.file.identity.size <= min(room, _KEPT_FILE_BYTES)
        head = b""
        while chunk := os.read(fd, _CHUNK_BYTES):
            head = head or chunk[:_HEAD_BYTES]
            digester.update(chunk)
            if keep:
                chunks.append(chunk)
        if Identity.of(os.fstat(fd)) != file.file.identity:
            raise Changed(f"read {file.file.path}: it was written meanwhile")
        digests = digester.digests()
        if digests.size != file.file.identity.size:
            raise Changed(f"read {file.file.path}: {digests.size} bytes came of {file.file.identity.size}")
        return digests, head, b"".join(chunks) if keep else None

    def _plan(
        self, batch: Batch, file: BatchFile, digests: Digests, head: bytes, body: bytes | None, fingerprint: str | None
    ) -> Put:
        place = self._to.layout.parse(file.file.path)
        if place is None:
            raise BadPath(f"put {file.file.path}: it does not fit the spool's layout", hint="mend `path` of the spool")
        key = self._to.layout.key(place, fingerprint=fingerprint)
        url = self._to.layout.url(place, key, bucket=self._to.bucket, fingerprint=fingerprint)
        headers = self._to.headers_for(batch.attachment, file.file.style, sniff(head, file.file.filename))
        return Put(file, self._to.bucket, key, url, headers, digests, body)

    # After the intent

    def put(self, puts: Sequence[Put], *, on_upload: Callable[[Put, str], None]) -> Steps[list[PutResult]]:
        """Send what is not in the bucket yet, originals first and confirmed before anything else goes; say how each ended.

        on_upload: called with a multipart upload's id before its first part. Raises nothing for a single PUT's fault: the
        result has it.
        """
        originals = [put for put in puts if put.file.file.style == ORIGINAL]
        others = [put for put in puts if put.file.file.style != ORIGINAL]
        results: list[PutResult] = yield Ask([partial(self._begin, put, on_upload) for put in originals])
        if all(result.answer is Answer.CONFIRMED for result in results):
            rest: list[PutResult] = yield Ask([partial(self._begin, put, on_upload) for put in others])
            return results + rest
        unsent = Draining("its original is not in the bucket yet")
        return results + [PutResult(put, Answer.REFUSED, error=unsent) for put in others]

    def _begin(self, put: Put, on_upload: Callable[[Put, str], None], pool: Executor) -> Future[PutResult]:
        """Begin a PUT when its destination has room for one more.

        The quick way, where there is one and nothing is special about it; what that leaves open is `_put`'s.
        """
        future: Future[PutResult] = Future()
        if put.adopted is not None and not put.abandoned:
            future.set_result(PutResult(put, Answer.CONFIRMED, put.adopted))
            return future
        began_at = 0.0

        def begin() -> None:
            nonlocal began_at
            began_at = self._clock.monotonic()
            if not self._is_plain(put) or not self._begin_quickly(put, done):
                go_on(None)

        def left(ended: Future[PutResult]) -> None:
            is_fault = ended.cancelled() or ended.exception() is not None
            self._window.leave(began_at, is_well=not is_fault and not isinstance(ended.result().error, StoreUnavailable))

        def go_on(doubt_at: float | None) -> None:
            try:
                slow = pool.submit(self._put, put, on_upload, doubt_at)
            except RuntimeError as error:  # the daemon has ended without us
                future.set_exception(error)
                return
            slow.add_done_callback(lambda ended: _hand_over(ended, future))

        def done(end: StoredObject | SpooldError) -> None:
            if isinstance(end, StoredObject):
                self._tell_stored(put, end)
                future.set_result(PutResult(put, Answer.CONFIRMED, end))
            else:
                go_on(None if getattr(end, "never_sent", False) else self._clock.now())

        future.add_done_callback(left)
        self._window.enter(begin)
        return future

    def _is_plain(self, put: Put) -> bool:
        is_new = put.adopted is None and not put.is_sought and not put.abandoned
        return is_new and put.body is not None and put.digests.size < self._to.multipart_threshold

    def _begin_quickly(self, put: Put, done: Callable[[StoredObject | SpooldError], None]) -> bool:
        if not self._bandwidth.is_unlimited or self._stop.is_set() or not self._store.has_quick_way(put.bucket):
            return False
        try:
            self._demand_claim()
        except ClaimLost:  # `_put` says so
            return False
        body, now = put.body or b"", self._clock.now()
        return self._store.begin_put(put.bucket, put.key, body, put.headers, put.digests, now=now, done=done)

    def _tell_stored(self, put: Put, stored: StoredObject) -> None:
        log.debug(
            "file.stored", spool=self._spool.name, path=put.file.file.path, key=put.key, style=put.file.file.style,
            size_bytes=stored.size,
        )  # fmt: skip

    def _put(self, put: Put, on_upload: Callable[[Put, str], None], doubt_at: float | None = None) -> PutResult:
        """One attempt: a few tries within seconds, ending at once when the daemon drains.

        doubt_at: when a try before these ended without an answer, if there was one.
        """
        for upload_id in put.abandoned:  # its parts cost money until somebody aborts it
            with contextlib.suppress(SpooldError):
                self._store.abort(put.bucket, put.key, upload_id)
        if put.adopted is not None:
            return PutResult(put, Answer.CONFIRMED, put.adopted)
        give_up_at = self._clock.monotonic() + _PERSISTENCE_S
        try:
            if put.is_sought and (found := self._found(put)) is not None:
                return PutResult(put, Answer.CONFIRMED, found, was_there=True)
            for attempt in tenacity.Retrying(
                retry=tenacity.retry_if_exception_type((StoreUnavailable, Unproven)),
                stop=lambda _: self._stop.is_set() or self._clock.monotonic() >= give_up_at,
                wait=_wait,
                sleep=self._pause,
                reraise=True,
            ):
                with attempt:
                    if self._stop.is_set():
                        raise Draining("the daemon is asked to stop")
                    try:
                        stored = self._send(put, on_upload)
                    except (StoreUnavailable, Unproven) as why:
                        if not getattr(why, "never_sent", False):
                            doubt_at = self._clock.now()
                        raise
        except (SpooldError, OSError) as error:
            fault = fault_of(error, "read", put.file.file.path) if isinstance(error, OSError) else error
            # A try that was not made, or not answered either, does not settle what became of the one before.
            in_doubt = isinstance(fault, StoreUnavailable | Unproven | Stale) and doubt_at is not None
            return PutResult(put, Answer.DOUBT if in_doubt else Answer.REFUSED, doubt_at=doubt_at, error=fault)
        self._tell_stored(put, stored)
        return PutResult(put, Answer.CONFIRMED, stored, doubt_at=doubt_at)

    def _found(self, put: Put) -> StoredObject | None:
        """Return the object if the key holds these bytes already: its ETag is their MD5, or it is read back and hashed."""
        found = self._store.head(put.bucket, put.key)
        if found is None or found.size != put.digests.size:
            return None
        if found.etag.lower() == put.digests.md5:
            return found
        digests = self._store.digest(put.bucket, put.key)
        return found if digests is not None and digests.sha256 == put.digests.sha256 else None

    def _pause(self, seconds: float) -> None:
        self._clock.wait(self._stop, seconds)

    def _send(self, put: Put, on_upload: Callable[[Put, str], None]) -> StoredObject:
        size = put.digests.size
        if size >= self._to.multipart_threshold:
            part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
            room = self._budget.limit_bytes // part_bytes - 2  # one is being read, one is held back
            at_once = max(1, min(_PARTS_AT_ONCE, self._window.limit, room, -(-size // part_bytes)))
            with self._budget.hold((at_once + 2) * part_bytes):
                return self._store.put_parts(
                    put.bucket, put.key, self._spaced(self._parts(put, part_bytes)), put.headers, put.digests,
                    on_upload=lambda upload_id: on_upload(put, upload_id), at_once=at_once,
                )  # fmt: skip
        with self._budget.hold(size):
            body = put.body if put.body is not None else b"".join(self._parts(put, _CHUNK_BYTES))
            self._bandwidth.wait_for_turn(self._stop)
            self._demand_claim()
            return self._store.put(put.bucket, put.key, body, put.headers, put.digests)

    def _spaced(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        for part in parts:
            self._bandwidth.wait_for_turn(self._stop)
            self._demand_claim()
            yield part
        self._demand_claim()  # what follows completes the upload

    def _parts(self, put: Put, part_bytes: int) -> Iterator[bytes]:
        """Read a file again, in parts; Changed before the last is used if these are not the bytes that were hashed."""
        digest = hashlib.sha256()
        held_back = b""
        with self._spool.opened(put.file.file) as fd:
            while part := _read_fully(fd, part_bytes):
                digest.update(part)
                if held_back:
                    yield held_back
                held_back = part
            if Identity.of(os.fstat(fd)) != put.file.file.identity or digest.hexdigest() != put.digests.sha256:
                raise Changed(f"read {put.file.file.path}: it was written meanwhile")
        if held_back:
            yield held_back


def _hand_over(ended: Future[PutResult], to: Future[PutResult]) -> None:
    if ended.cancelled():
        to.cancel()
    elif (error := ended.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(ended.result())


def _wait(state: tenacity.RetryCallState) -> float:
    """0.2 s, doubling, 2 s at most; longer where the server asked for it."""
    outcome = state.outcome.exception() if state.outcome is not None else None
    asked = getattr(outcome, "retry_after_s", None) or 0.0
    return max(min(2.0, 0.2 * 2.0 ** (state.attempt_number - 1)), min(asked, _PERSISTENCE_S))


def _read_fully(fd: int, size: int) -> bytes:
    chunks = []
    while size > 0 and (chunk := os.read(fd, size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
