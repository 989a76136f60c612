"""The nouns of the trade and the states they can be in. No I/O."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

ORIGINAL = "original"
"""The style that is the upload itself; all others are made from it."""

HOUSE = ".spoold"
"""Our own directory in each spool's root."""


class State(StrEnum):
    """Where a batch is. Nothing here says who works on it: that is a claim."""

    PENDING = "pending"
    STORED = "stored"
    DONE = "done"
    DEAD = "dead"
    SUPERSEDED = "superseded"


class Outcome(StrEnum):
    """How a walk ended."""

    DONE = "done"
    WAITING = "waiting"
    DEFERRED = "deferred"
    DEAD = "dead"
    HELD = "held"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file this is and which of its contents: two looks with equal identities saw the same bytes, as far as stat tells.

    A rename changes ctime, so identities are not compared across one.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class SpooledFile:
    """One file as it was when looked at.

    path: below the spool's root, "/" between its parts.
    basename: what groups an original with its styles (`me` for `original/me.jpg` and `thumb/me.png`).
    """

    path: str
    style: str
    basename: str
    filename: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Oddity:
    """A path that is none of spoold's business, and why: reported once, never opened."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A record's files at one moment. `marker` is the file that declares the record finished, if there is one.

    hides: a part of it could not be looked at, so that what is not seen need not be gone.
    """

    record: str
    attachment: str
    record_id: str
    files: tuple[SpooledFile, ...]
    marker: SpooledFile | None = None
    oddities: tuple[Oddity, ...] = ()
    hides: bool = False


def fingerprint(files: Iterable[SpooledFile]) -> str:
    """Return a digest of which files these are and which of their contents; equal only if nothing changed."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(repr((file.path, file.identity)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about one basename of a record, by whom, and who vetoed it.

    decided_by: "marker", "styles", "quiet" or "as-is"; None while nobody has.
    vetoed_by: "quiet", "images", "power" or "lease"; None if nobody did.
    reason: one clause for a person: what is missing, or what was seen.
    refused: no key can be made for one of its files, ever (the reason says which).
    """

    basename: str
    decided_by: str | None = None
    vetoed_by: str | None = None
    reason: str = ""
    refused: bool = False

    @property
    def is_complete(self) -> bool:
        return self.decided_by is not None and self.vetoed_by is None and not self.refused


@dataclass(frozen=True, slots=True)
class Digests:
    """What was computed of one content in one pass.

    sha256, md5: lower-case hex. checksum: base64, by `checksum_algorithm` ("crc32", …, or "none" and "").
    """

    size: int
    sha256: str
    md5: str
    checksum_algorithm: str
    checksum: str


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A file of a batch, as the ledger has it. `digest` (SHA-256, hex) is None until it was hashed.

    is_marker: the file that declared the record finished; it is never uploaded and goes with its batch.
    aside_name: its name in `.spoold/aside/` while it lies there.
    """

    id: int
    file: SpooledFile
    is_marker: bool
    digest: str | None
    aside_name: str | None
    is_gone: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The complete basenames of a settled snapshot, accepted for upload."""

    id: int
    spool: str
    record_key: int
    record: str
    attachment: str
    record_id: str
    state: State
    version: int
    attempts: int
    files: tuple[BatchFile, ...]

    @property
    def uploads(self) -> tuple[BatchFile, ...]:
        """The files that go to the bucket: all but the marker."""
        return tuple(file for file in self.files if not file.is_marker)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on one record until a moment.

    fence: only rises for a record; a change made under an older one is refused.
    until: seconds since the epoch, by the ledger's clock.
    """

    batch: Batch
    owner: str
    fence: int
    until: float


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A key as the store confirmed it.

    etag: without quotes. checksum: base64 in `checksum_algorithm`, both None where the server echoes none.
    """

    bucket: str
    key: str
    size: int
    content_type: str
    etag: str
    checksum_algorithm: str | None = None
    checksum: str | None = None
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class Headers:
    """What is stored with an object besides its bytes."""

    content_type: str
    acl: str | None = None
    cache_control: str | None = None
    storage_class: str | None = None
    server_side_encryption: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Put:
    """One file that is about to be in the bucket: where, with what, and the content that must arrive.

    body: the hashed bytes where they were small enough to keep, else None: they are read again and compared.
    intent: the ledger's row for it; 0 before it is written.
    adopted: the object that holds these bytes already; nothing is sent then.
    is_sought: a ledger that was lost may have put it there already: look before it is sent.
    abandoned: multipart uploads to this key that a walk before this one began and did not end.
    """

    file: BatchFile
    bucket: str
    key: str
    url: str | None
    headers: Headers
    digests: Digests
    body: bytes | None = field(default=None, repr=False)
    intent: int = 0
    adopted: StoredObject | None = None
    is_sought: bool = False
    abandoned: tuple[str, ...] = ()


class Answer(StrEnum):
    """What became of a PUT or a DELETE."""

    CONFIRMED = "confirmed"
    REFUSED = "refused"
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a PUT came to: confirmed with `stored`; refused (it did not happen); or in doubt (it may still land).

    doubt_at: when the last try without an answer ended, seconds since the epoch; None if every try was answered. A
    confirmed PUT can have one: an earlier try of it may land once more, later.
    was_there: the bucket held these bytes already, so nothing was sent.
    """

    put: Put
    answer: Answer
    stored: StoredObject | None = None
    doubt_at: float | None = None
    error: Exception | None = None
    was_there: bool = False
