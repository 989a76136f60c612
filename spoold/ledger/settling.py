"""What versions that were given up have left: live keys that they may have overwritten, uploads that nobody goes on with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import and_, exists, or_, select, update

from spoold.errors import LedgerUnavailable
from spoold.ledger.clearing import Clearing
from spoold.ledger.schema import HAS_UPLOAD, batch, claim, intent, object_, record
from spoold.ledger.statements import in_parts
from spoold.model import Answer, Digests, State, StoredObject

_UPLOADS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Overwritten:
    """A live key that PUTs of a version have written to, or may have, which was given up before it was stored.

    etag, md5, size: of what the ledger tells. digests: of what the key may hold instead, SHA-256, hex.
    doubt_at: when the last of these PUTs ended that were never answered, seconds since the epoch; None if all were.
    """

    spool: str
    record_key: int
    record: str
    bucket: str
    key: str
    etag: str
    md5: str
    size: int
    digests: frozenset[str]
    doubt_at: float | None


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """A multipart upload that was begun and, as far as the ledger knows, neither completed nor aborted."""

    intent: int
    spool: str
    record_key: int
    record: str
    bucket: str
    key: str
    upload_id: str


class Settling(Clearing):
    """The verbs of the settler, and of whoever looks for orphans."""

    def overwritten(self, spools: Iterable[str]) -> list[Overwritten]:
        """Return the live keys of these spools that may hold something else than the ledger tells, and that nobody works on.

        The first time all records are asked, then those of which a version was given up since.
        """
        written = and_(
            intent.c.bucket == object_.c.bucket, intent.c.key == object_.c.key, intent.c.kind == "put",
            intent.c.digest != object_.c.digest, or_(intent.c.doubt_at.is_not(None), intent.c.answer == Answer.CONFIRMED),
        )  # fmt: skip
        at_work = exists().where(
            batch.c.record_key == object_.c.record_key, batch.c.state.in_((State.PENDING, State.DEAD, State.STORED))
        )
        statement = (
            select(
                record.c.spool, record.c.path, object_, intent.c.digest.label("other"), intent.c.doubt_at,
                at_work.label("is_walked"),
            )
            .join(record, record.c.id == object_.c.record_key)
            .join(intent, written)
            .where(record.c.spool.in_(list(spools)))
        )  # fmt: skip
        asked = set(self._given_up)
        self._given_up -= asked
        try:
            with self.read() as connection:
                if self._has_all_to_settle:
                    rows = list(connection.execute(statement))
                else:
                    some = [object_.c.record_key.in_(ids) for ids in in_parts(sorted(asked))]
                    rows = [row for these in some for row in connection.execute(statement.where(these))]
        except LedgerUnavailable:
            self._given_up |= asked
            raise
        self._has_all_to_settle = False
        self._given_up |= {row.record_key for row in rows}  # until nothing of them is left
        keys: dict[tuple[str, str], Overwritten] = {}
        for row in rows:
            if row.is_walked:
                continue  # its walk sees to that, or takes its place
            before = keys.get((row.bucket, row.key))
            doubts = [moment for moment in (before.doubt_at if before else None, row.doubt_at) if moment is not None]
            keys[row.bucket, row.key] = Overwritten(
                row.spool, row.record_key, row.path, row.bucket, row.key, row.etag, row.md5, row.size,
                (before.digests if before else frozenset()) | {row.other}, max(doubts, default=None),
            )  # fmt: skip
        return list(keys.values())

    def settled(self, key: Overwritten, *, holds: tuple[StoredObject, Digests] | None) -> None:
        """Write down what a key holds, now that nothing of the version that was given up can change it any more.

        holds: what came of that version, proven; None if it is what the ledger tells.
        """
        here = and_(object_.c.bucket == key.bucket, object_.c.key == key.key)
        with self.write() as change:
            if change.execute(select(object_.c.md5).where(here)).scalar() != key.md5:
                return  # a newer version was stored meanwhile
            others = and_(
                intent.c.bucket == key.bucket, intent.c.key == key.key, intent.c.kind == "put",
                intent.c.digest.in_(key.digests), intent.c.digest != (holds[1].sha256 if holds else ""),
            )  # fmt: skip
            change.execute(update(intent).where(others).values(doubt_at=None))
            change.execute(update(intent).where(others, intent.c.answer == Answer.CONFIRMED).values(answer=Answer.REFUSED))
            if holds is None:
                return
            stored, digests = holds
            row = {
                "digest": digests.sha256, "md5": digests.md5, "size": stored.size, "content_type": stored.content_type,
                "etag": stored.etag, "checksum_algorithm": stored.checksum_algorithm, "checksum": stored.checksum,
                "version_id": stored.version_id, "uploaded_at": change.at, "proven_at": change.now,
            }  # fmt: skip
            change.execute(update(object_).where(here).values(**row))
            self._touched(change, key.record_key)
            change.tell(
                "object.overwritten", record_key=key.record_key, spool=key.spool, record=key.record, key=key.key,
                detail="it holds a version that the app took back before all of it was uploaded",
            )  # fmt: skip

    # Uploads that nobody goes on with

    def open_uploads(self, spools: Iterable[str]) -> list[OpenUpload]:
        """Return the uploads of these spools' records that nobody has a claim on."""
        now = self._clock.now()
        at_work = exists().where(claim.c.record_key == intent.c.record_key, claim.c.until > now)
        statement = (
            select(
                intent.c.id, record.c.spool, intent.c.record_key, record.c.path, intent.c.bucket, intent.c.key,
                intent.c.upload_id,
            )
            .join(record, record.c.id == intent.c.record_key)
            .where(_IS_OPEN, record.c.spool.in_(list(spools)), ~at_work)
            .order_by(intent.c.id)
            .limit(_UPLOADS_AT_ONCE)
        )  # fmt: skip
        with self.read() as connection:
            return [OpenUpload(*row) for row in connection.execute(statement)]

    def aborted(self, upload: OpenUpload) -> None:
        """Write down that an upload is no more."""
        with self.write() as change:
            change.execute(update(intent).where(intent.c.id == upload.intent, _IS_OPEN).values(upload_id=None))
            change.tell(
                "upload.aborted", record_key=upload.record_key, spool=upload.spool, record=upload.record, key=upload.key,
                detail="nobody went on with it",
            )  # fmt: skip


# What was confirmed keeps its id, and is complete.
_IS_OPEN = and_(HAS_UPLOAD, intent.c.answer.is_distinct_from(Answer.CONFIRMED))
