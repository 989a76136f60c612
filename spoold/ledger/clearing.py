"""What cleanup tells the ledger: what it set aside, gave back and let go; and what it asks before it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, and_, bindparam, delete, exists, func, insert, select, update

from spoold.ledger.claiming import batch_file_of
from spoold.ledger.schema import about, batch, batch_file, intent, key_owner, object_, record, replaced
from spoold.ledger.statements import Statement
from spoold.ledger.walking import Walking
from spoold.model import Answer, BatchFile, Claim, Identity, State

_REMOVE_AGAIN_S = 300.0  # after a DELETE that was not confirmed


@dataclass(frozen=True, slots=True)
class Proof:
    """What the ledger holds of one live object: whether it is still there as stored, and since when that is known.

    digest: SHA-256, hex. proven_at: seconds since the epoch.
    """

    style: str
    bucket: str
    key: str
    digest: str
    md5: str
    etag: str
    size: int
    checksum_algorithm: str | None
    checksum: str | None
    version_id: str | None
    proven_at: float


@dataclass(frozen=True, slots=True)
class Clearance:
    """What the ledger knows of a batch that decides whether its files may go.

    stored_at: when it was proven in the bucket, seconds since the epoch; None if it never was.
    doubts: its keys that an older PUT or DELETE of other content may still change, and since when it may.
    proofs: the live objects that its files are.
    """

    stored_at: float | None
    doubts: Mapping[str, float]
    proofs: Sequence[Proof]


@dataclass(frozen=True, slots=True)
class Aside:
    """A file that was set aside, by the batch in its name.

    was_stored: that batch was proven in the bucket once, so a file with its digest may go.
    """

    record_key: int
    record: str
    batch: int
    was_stored: bool
    file: BatchFile


@dataclass(frozen=True, slots=True)
class ReplacedKey:
    """A key that nothing needs any more, and whose it was.

    doubt_at: when the last of its PUTs ended that were never answered, seconds since the epoch: such a one may bring it back.
    """

    spool: str
    record_key: int
    record: str
    bucket: str
    key: str
    doubt_at: float | None


class Clearing(Walking):
    """The verbs of cleanup."""

    # Before letting go

    def clearance(self, mine: Claim) -> Clearance:
        """Return what decides whether the batch's files may go."""
        with self.read() as connection:
            asked = {"of_batch": mine.batch.id}
            return Clearance(
                stored_at=connection.execute(_STORED_MOMENT, asked).scalar(),
                doubts={row.key: row.since for row in connection.execute(_DOUBTS, asked)},
                proofs=[
                    Proof(
                        row.style, row.bucket, row.key, row.digest, row.md5, row.etag, row.size, row.checksum_algorithm,
                        row.checksum, row.version_id, row.proven_at,
                    )
                    for row in connection.execute(_PROOFS, asked)
                ],
            )  # fmt: skip

    def renew_proofs(self, mine: Claim, keys: Iterable[str]) -> None:
        """Write down that these keys were just seen to hold what was stored."""
        with self.write() as change:
            where = and_(object_.c.record_key == mine.batch.record_key, object_.c.key.in_(list(keys)))
            change.execute(update(object_).where(where).values(proven_at=change.now))

    def settle_doubts(self, mine: Claim, keys: Iterable[str], *, before: float) -> None:
        """The time in which these keys' doubtful PUTs could land is over, and what they hold was looked at."""
        with self.write() as change:
            where = and_(
                intent.c.record_key == mine.batch.record_key, intent.c.key.in_(list(keys)), intent.c.doubt_at <= before
            )
            change.execute(update(intent).where(where).values(doubt_at=None))

    def shorten_waits(self, spool: str, *, keep_for_s: float, at_most_s: Mapping[str, float]) -> None:
        """Let nothing wait longer than the settings say; they may be others than when the wait began.

        keep_for_s: counts from the moment a batch was stored. at_most_s: from now on, by what is waited for.
        """
        here = batch.c.record_key.in_(select(record.c.id).where(record.c.spool == spool))
        with self.write() as change:
            due_at = batch.c.stored_moment + keep_for_s
            kept = and_(here, batch.c.state == State.STORED, batch.c.waiting_for == "keep_for", batch.c.due_at > due_at)
            change.execute(update(batch).where(kept).values(due_at=due_at))
            for waiting_for, seconds in at_most_s.items():
                waits = and_(here, batch.c.waiting_for == waiting_for, batch.c.due_at > change.now + seconds)
                change.execute(update(batch).where(waits).values(due_at=change.now + seconds))

    def note_cleanup(self, spool: str, rules: str, *, lets_go: bool) -> None:
        """Remember by which rules local files go; where they are others than before, what stayed by choice is walked again.

        rules: whatever tells one choice from another. lets_go: local files go at all.
        """
        name = f"cleanup of {spool}"
        with self.write() as change:
            before = change.execute(select(about.c.value).where(about.c.name == name)).scalar()
            if before == rules:
                return
            change.execute(delete(about).where(about.c.name == name))
            change.execute(insert(about), {"name": name, "value": rules})
            if before is None or not lets_go:
                return
            newer = batch.alias()
            is_current = ~exists().where(
                newer.c.record_key == batch.c.record_key, newer.c.id > batch.c.id, newer.c.state != State.SUPERSEDED
            )
            stayed = exists().where(batch_file.c.batch_id == batch.c.id, batch_file.c.is_gone.is_(False))
            here = batch.c.record_key.in_(select(record.c.id).where(record.c.spool == spool))
            done = and_(here, batch.c.state == State.DONE, is_current, stayed)
            change.execute(update(batch).where(done).values(state=State.STORED, due_at=change.now, waiting_for=""))

    # Letting go

    def set_aside(self, mine: Claim, files: Iterable[BatchFile]) -> None:
        """Write down, before it is done, that files are renamed to their `aside_name` in `.spoold/aside/`."""
        with self.write() as change:
            self._demand(change, mine)
            changed = []
            for file in files:
                changed.append({"of_file": file.id, "aside_name": file.aside_name})
                self._tell(change, mine, "file.set_aside", path=file.file.path)
            change.execute(_CHANGE_FILE, changed)

    def not_aside(self, file: BatchFile) -> None:
        """The file does not lie aside after all, but where it lay."""
        with self.write() as change:
            change.execute(update(batch_file).where(batch_file.c.id == file.id).values(aside_name=None))

    def has_newer(self, batch_id: int, file: BatchFile) -> bool:
        """Say whether a newer batch of the same record holds, or held, another file at this one's path."""
        older = select(batch.c.record_key).where(batch.c.id == batch_id).scalar_subquery()
        statement = (
            select(batch_file.c.id)
            .join(batch, batch.c.id == batch_file.c.batch_id)
            .where(batch.c.record_key == older, batch.c.id > batch_id, batch_file.c.path == file.file.path)
            .where(batch_file.c.ino != file.file.identity.ino)  # a snapshot taken at that moment may still have had this one
            .limit(1)
        )
        with self.read() as connection:
            return connection.execute(statement).first() is not None

    def given_back(
        self, batch_id: int, file: BatchFile, *, spool: str, record: str, reason: str, still_ours: Identity | None
    ) -> None:
        """A file went back to where the app put it.

        still_ours: its identity now, if its bytes are still those that were stored; None if it is new to us.
        """
        values: dict[str, Any] = {"aside_name": None, "is_gone": still_ours is None}
        if still_ours is not None:
            values |= {name: getattr(still_ours, name) for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}
        with self.write() as change:
            change.execute(update(batch_file).where(batch_file.c.id == file.id).values(**values))
            key = change.execute(select(batch.c.record_key).where(batch.c.id == batch_id)).scalar_one()
            change.tell(
                "file.given_back",
                record_key=key,
                batch=batch_id,
                spool=spool,
                record=record,
                path=file.file.path,
                detail=reason,
            )

    def let_go(self, mine: Claim, files: Iterable[BatchFile], *, deleted: bool) -> None:
        """These files are no business of the batch any more: deleted, or not there any more."""
        with self.write() as change:
            changed = []
            for file in files:
                changed.append({"of_file": file.id, "is_gone": True, "aside_name": None})
                if deleted:
                    self._tell(change, mine, "file.deleted", path=file.file.path)
            change.execute(_CHANGE_FILE, changed)

    def aside_file(self, batch_id: int, file_id: int) -> Aside | None:
        """Return what the ledger knows of a file by the batch and the number in its name."""
        statement = (
            select(batch_file, batch.c.stored_moment, batch.c.record_key, record.c.path.label("record_path"))
            .join(batch, batch.c.id == batch_file.c.batch_id)
            .join(record, record.c.id == batch.c.record_key)
            .where(batch_file.c.id == file_id, batch_file.c.batch_id == batch_id)
        )
        with self.read() as connection:
            row = connection.execute(statement).first()
            if row is None:
                return None
            return Aside(row.record_key, row.record_path, batch_id, row.stored_moment is not None, batch_file_of(row))

    def lies_aside(self, batch_id: int, file_id: int, name: str) -> None:
        """Write down that a file lies aside under `name`, and see to it that its batch is walked."""
        with self.write() as change:
            change.execute(update(batch_file).where(batch_file.c.id == file_id).values(aside_name=name, is_gone=False))
            change.execute(update(batch).where(batch.c.id == batch_id).values(due_at=change.now, waiting_for="grace"))

    def all_aside(self, spool: str) -> list[Aside]:
        """Return every file that the ledger believes to lie aside in this spool."""
        statement = (
            select(batch_file, batch.c.stored_moment, batch.c.record_key, record.c.path.label("record_path"))
            .join(batch, batch.c.id == batch_file.c.batch_id)
            .join(record, record.c.id == batch.c.record_key)
            .where(record.c.spool == spool, batch_file.c.aside_name.is_not(None))
        )
        with self.read() as connection:
            return [
                Aside(row.record_key, row.record_path, row.batch_id, row.stored_moment is not None, batch_file_of(row))
                for row in connection.execute(statement)
            ]

    # Replaced keys

    def replaced_due(self, spools: Iterable[str]) -> list[ReplacedKey]:
        """Return the keys that nothing needs any more, longest due first; at most 100.

        A key that a live or a pending manifest holds is never among them (rule 7).
        """
        pending = exists().where(
            batch_file.c.bucket == replaced.c.bucket, batch_file.c.key == replaced.c.key,
            batch.c.id == batch_file.c.batch_id, batch.c.state.in_((State.PENDING, State.DEAD)),
        )  # fmt: skip
        live = exists().where(object_.c.bucket == replaced.c.bucket, object_.c.key == replaced.c.key)
        unhashed = exists().where(  # a pending batch whose keys nobody knows yet
            batch.c.record_key == replaced.c.record_key, batch.c.state == State.PENDING
        )
        statement = (
            select(replaced, record.c.spool, record.c.path, _doubt_at(replaced.c.bucket, replaced.c.key).label("doubt_at"))
            .join(record, record.c.id == replaced.c.record_key)
            .where(replaced.c.due_at <= self._clock.now(), record.c.spool.in_(list(spools)), ~pending, ~live, ~unhashed)
            .order_by(replaced.c.due_at)
            .limit(100)
        )
        with self.read() as connection:
            return [
                ReplacedKey(row.spool, row.record_key, row.path, row.bucket, row.key, row.doubt_at)
                for row in connection.execute(statement)
            ]

    def next_replaced_at(self) -> float | None:
        """Return when the next replaced key is due, in seconds since the epoch."""
        with self.read() as connection:
            moment: float | None = connection.execute(select(func.min(replaced.c.due_at))).scalar()
            return moment

    def deletes_in_last_hour(self, spool: str) -> int:
        """Return how many remote deletions of this spool the fuse has to count."""
        statement = (
            select(func.count())
            .select_from(intent)
            .join(record, record.c.id == intent.c.record_key)
            .where(record.c.spool == spool, intent.c.kind == "delete", intent.c.started_at > self._clock.now() - 3600)
        )
        with self.read() as connection:
            return int(connection.execute(statement).scalar_one())

    def deletes_held_back(self, spool: str, *, waiting: int, limit: int) -> None:
        """Tell that the fuse on remote deletions has blown."""
        with self.write() as change:
            change.tell(
                "deletes.held_back", spool=spool, files=waiting,
                detail=f"{limit} keys were deleted within an hour, as many as max_deletes_per_hour allows",
                hint="they go on by themselves within the hour; if so many are expected, raise cleanup.max_deletes_per_hour",
            )  # fmt: skip

    def intend_delete(self, key: ReplacedKey) -> int | None:
        """Write down a DELETE before it starts; None if the key is needed again by now, or another PUT of it is in doubt."""
        with self.write() as change:
            here = and_(replaced.c.bucket == key.bucket, replaced.c.key == key.key)
            needed = select(object_.c.id).where(object_.c.bucket == key.bucket, object_.c.key == key.key)
            pending = select(batch.c.id).where(batch.c.record_key == key.record_key, batch.c.state == State.PENDING)
            buried = (
                select(batch_file.c.id)
                .join(batch, batch.c.id == batch_file.c.batch_id)
                .where(batch.c.state == State.DEAD, batch_file.c.bucket == key.bucket, batch_file.c.key == key.key)
            )
            if change.execute(select(replaced).where(here)).first() is None:
                return None
            if change.execute(select(_doubt_at(key.bucket, key.key))).scalar() != key.doubt_at:
                return None
            if any(change.execute(why.limit(1)).first() is not None for why in (needed, pending, buried)):
                return None
            row = {
                "record_key": key.record_key, "kind": "delete", "bucket": key.bucket, "key": key.key, "started_at": change.now,
            }  # fmt: skip
            return int(change.execute(insert(intent).returning(intent.c.id), row).scalar_one())

    def deleted(self, key: ReplacedKey, identifier: int, answer: Answer) -> None:
        """Write down what became of a DELETE. In doubt or refused, the key stays on the list.

        An answer that comes when a newer PUT of the key has begun counts as a doubt that has just ended: see `answered`.
        """
        with self.write() as change:
            newer = select(intent.c.id).where(
                intent.c.bucket == key.bucket, intent.c.key == key.key, intent.c.id > identifier, intent.c.kind == "put"
            )
            overtaken = answer is not Answer.REFUSED and change.execute(newer.limit(1)).first() is not None
            doubt_at = change.now if overtaken or answer is Answer.DOUBT else None
            change.execute(update(intent).where(intent.c.id == identifier).values(answer=answer, doubt_at=doubt_at))
            if overtaken:
                return
            here = and_(replaced.c.bucket == key.bucket, replaced.c.key == key.key)
            if answer is not Answer.CONFIRMED:
                change.execute(update(replaced).where(here).values(due_at=change.now + _REMOVE_AGAIN_S))
                return
            change.execute(delete(replaced).where(here))
            # Its PUTs in doubt had their time before the DELETE began: nothing brings it back, and others may have it.
            change.execute(delete(key_owner).where(key_owner.c.bucket == key.bucket, key_owner.c.key == key.key))
            change.execute(delete(intent).where(intent.c.bucket == key.bucket, intent.c.key == key.key, intent.c.kind == "put"))
            change.tell("object.deleted", record_key=key.record_key, spool=key.spool, record=key.record, key=key.key)


# The statements of every walk.

_STORED_MOMENT = Statement(select(batch.c.stored_moment).where(batch.c.id == bindparam("of_batch")))
_PROOFS = Statement(
    select(object_)
    .join(batch_file, and_(batch_file.c.bucket == object_.c.bucket, batch_file.c.key == object_.c.key))
    .where(batch_file.c.batch_id == bindparam("of_batch"), batch_file.c.digest == object_.c.digest)
)
_DOUBTS = Statement(
    select(intent.c.key, func.max(intent.c.doubt_at).label("since"))
    .join(batch_file, and_(batch_file.c.key == intent.c.key, batch_file.c.bucket == intent.c.bucket))
    .where(batch_file.c.batch_id == bindparam("of_batch"))
    .where(intent.c.doubt_at.is_not(None), intent.c.digest.is_distinct_from(batch_file.c.digest))
    .group_by(intent.c.key)
)
_CHANGE_FILE = Statement(update(batch_file).where(batch_file.c.id == bindparam("of_file")))


def _doubt_at(bucket: ColumnElement[str] | str, key: ColumnElement[str] | str) -> ScalarSelect[float | None]:
    """Select when the last unanswered PUT of a key ended."""
    return (
        select(func.max(intent.c.doubt_at))
        .where(intent.c.bucket == bucket, intent.c.key == key, intent.c.kind == "put")
        .scalar_subquery()
    )
