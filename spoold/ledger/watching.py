"""What the watcher tells the ledger: what lies in the spool, what is complete, what went away."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, func, insert, or_, select, update

from spoold.clock import Clock
from spoold.ledger.database import Database, Transaction
from spoold.ledger.schema import MOST_BEHIND_S, about, batch, batch_file, elsewhere, object_, record, sighting
from spoold.ledger.statements import Statement, in_parts
from spoold.model import ORIGINAL, Identity, Snapshot, SpooledFile, State, fingerprint

_LINES_KEPT = 10_000
_A_FILE_S, _A_BYTE_S, _OLD_S = 0.1, 1e-6, 60.0


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger knows of a record: the files that its current batch answers for, and what else decides.

    state: of the current batch, or None. has_original: an original of it is live in the bucket.
    vetoed: fingerprints of basenames whose images did not decode. as_is: a person said to take it as it lies.
    is_elsewhere: it was last seen in another directory that was the root; that nothing lies here does not mean it is gone.
    """

    files: Mapping[str, Identity]
    state: State | None
    has_original: bool
    sighted: str | None
    vetoed: frozenset[str]
    as_is: bool
    is_elsewhere: bool = False


_UNKNOWN = Known({}, None, False, None, frozenset(), False)


class Watching(Database):
    """The verbs of the watcher."""

    def __init__(self, url: str, *, clock: Clock, create: bool = True) -> None:
        super().__init__(url, clock=clock, create=create)
        self._given_up: set[int] = set()  # records of which a version was given up: what has come of its PUTs is to be seen
        self._has_all_to_settle = True
        self._lines: dict[tuple[str, str, bool], float] = {}  # spool, attachment, old → the line's end, monotonic seconds

    def known(self, spool: str, path: str) -> Known:
        """Return what is known of the record at `path`."""
        with self.read() as connection:
            row = connection.execute(_KNOWN, {"of_spool": spool, "of_path": path}).first()
            if row is None:
                return _UNKNOWN
            current = connection.execute(_CURRENT, {"of_record": row.id}).first()
            files = {}
            if current is not None:
                # Also what lies aside: until it is renamed it lies in its place, and then never again with this ctime.
                rows = connection.execute(_FILES_LEFT, {"of_batch": current.id})
                files = {file.path: identity_of(file) for file in rows}
            return Known(
                files,
                State(current.state) if current is not None else None,
                row.has_original,
                row.sighted,
                frozenset((row.vetoed or "").split(",")) if row.sighted is not None else frozenset(),
                bool(row.as_is),
                row.is_elsewhere,
            )

    def see(self, spool: str, snapshot: Snapshot, waiting: Iterable[SpooledFile], *, state: str, reason: str) -> None:
        """Write down that `waiting` of a record's files are not complete yet, and why.

        state: "receiving" or "stalled". Told once each: looking again at the same thing is no news, that it goes on is.
        """
        files = list(waiting)
        with self.write() as change:
            key, _ = self._record(change, spool, snapshot)
            before = change.execute(_SIGHTING, {"of_record": key}).first()
            values = {"state": state, "reason": reason, **self._coming(change, key, files)}
            if before is None:
                change.execute(_INSERT_SIGHTING, {"record_key": key, **values})
            elif (before.state, before.reason, before.files, before.bytes) != tuple(values.values()):
                change.execute(_CHANGE_SIGHTING, {"of_record": key, **values})
            if before is None or before.state == "gone" or (before.state, state) == ("stalled", "receiving"):
                self._touched(change, key)
                change.tell("record.seen", record_key=key, spool=spool, record=snapshot.record, files=len(files))
            if state == "stalled" and (before is None or before.state != "stalled"):
                self._touched(change, key)
                change.tell("record.stalled", record_key=key, spool=spool, record=snapshot.record, detail=reason)

    def _coming(self, change: Transaction, key: int, files: list[SpooledFile]) -> dict[str, int]:
        """Return by how many files and bytes the record grows: what takes a live object's place counts once."""
        live = {
            (row.style, row.filename): row.size
            for row in change.execute(_LIVE_SIZES, {"of_record": key})
        }  # fmt: skip
        replaced = [live[file.style, file.filename] for file in files if (file.style, file.filename) in live]
        size_bytes = sum(file.identity.size for file in files)
        return {"files": len(files) - len(replaced), "bytes": size_bytes - sum(replaced)}

    def _has_gone(self, change: Transaction, batch_id: int) -> bool:
        """Say whether files of a batch are no business of it any more; its marker does not count."""
        return change.execute(_GONE, {"of_batch": batch_id}).first() is not None

    def offer(
        self, spool: str, snapshot: Snapshot, files: Iterable[SpooledFile], *, decided_by: str, is_all: bool
    ) -> int | None:
        """Accept the complete files of a settled snapshot for upload; a batch that waited or ran before gives way to it.

        is_all: nothing of the record is still incomplete. Returns the batch's id, or None if the current batch answers for
        exactly these files already (another daemon was quicker).
        """
        files = list(files)
        mark = fingerprint(files)
        with self.write() as change:
            key, version = self._record(change, spool, snapshot)
            current = change.execute(_CURRENT, {"of_record": key}).first()
            if is_all:
                change.execute(_NOT_SEEN, {"of_record": key})
            # Files that were away when they were to be let go may come back as they were, and nobody answers for them.
            if current is not None and current.fingerprint == mark and not self._has_gone(change, current.id):
                return None
            size_bytes = sum(file.identity.size for file in files)
            row = {
                "record_key": key, "state": State.PENDING, "fingerprint": mark, "decided_by": decided_by, "version": version,
                "files": len(files), "bytes": size_bytes, "attempts": 0, "crashes": 0, "due_at": change.now,
                "waiting_for": "attempt", "created_at": change.at,
                "behind_s": self._behind_s(change.now, (spool, snapshot.attachment), files),
            }  # fmt: skip
            new: int = change.execute(_INSERT_BATCH, row).scalar_one()
            members = files if snapshot.marker is None else [*files, snapshot.marker]
            change.execute(_INSERT_FILES, [_file_row(new, file, file is snapshot.marker) for file in members])
            self._touched(change, key)
            change.tell(
                "batch.settled", record_key=key, batch=new, spool=spool, record=snapshot.record,
                files=len(files), size_bytes=size_bytes, decided_by=decided_by,
            )  # fmt: skip
            self._supersede(change, key, before=new)
            return new

    def _behind_s(self, now: float, whose: tuple[str, str], files: Sequence[SpooledFile]) -> float:
        """Return how many seconds late a batch is to be taken for when its place in the queue is found.

        Each attachment of each spool has a line of its own, and another for what is old: what comes stands behind what came
        before it there, as if each file took a tenth of a second, so that one with a hundred thousand lets one with a single
        record go first. What is large stands further back, by a second for each megabyte. It is lateness, and no rank, so
        nobody waits for ever.
        """
        moment = self._clock.monotonic()
        if len(self._lines) >= _LINES_KEPT:
            self._lines = {line: end for line, end in self._lines.items() if end > moment}
        is_old = all(file.identity.ctime_ns / 1e9 < now - _OLD_S for file in files)
        line = (*whose, is_old)
        end = self._lines[line] = max(moment, self._lines.get(line, 0.0)) + _A_FILE_S * len(files)
        return min(MOST_BEHIND_S, end - moment + sum(file.identity.size for file in files) * _A_BYTE_S)

    def nothing_waits(self, spool: str, path: str, *, is_empty: bool) -> None:
        """Write down that nothing of a record is incomplete any more; if it is empty, what was not uploaded is gone.

        A record is gone only if nothing of it is in the bucket; else it is again what it was before: done, or uploaded.
        """
        with self.write() as change:
            row = change.execute(select(record.c.id).where(record.c.spool == spool, record.c.path == path)).first()
            if row is None:
                return
            seen = change.execute(select(sighting.c.state).where(sighting.c.record_key == row.id)).scalar()
            current = change.execute(_CURRENT, {"of_record": row.id}).first()
            is_abandoned = is_empty and current is not None and current.state in (State.PENDING, State.DEAD)
            if seen in (None, "gone") and not is_abandoned:
                return
            change.execute(delete(sighting).where(sighting.c.record_key == row.id))
            if is_abandoned:
                self._supersede(change, row.id, before=None)
                current = None
            is_live = change.execute(select(object_.c.id).where(object_.c.record_key == row.id).limit(1)).first() is not None
            self._touched(change, row.id)
            if is_empty and not is_live and current is None:
                gone = {"record_key": row.id, "state": "gone", "reason": "the app removed it", "files": 0, "bytes": 0}
                change.execute(insert(sighting), gone)
                change.tell("record.gone", record_key=row.id, spool=spool, record=path)
            elif current is None or current.state == State.DONE:
                change.tell("record.cleared", record_key=row.id, spool=spool, record=path, files=0)

    def unfinished(self, spool: str) -> list[str]:
        """Return the records that a sweep should have met: those not uploaded yet, as far as the ledger knows."""
        with self.read() as connection:
            return list(connection.execute(_unfinished(spool, record.c.path)).scalars())

    def known_among(self, spool: str, paths: Collection[str]) -> list[str]:
        """Return those of the paths that are records which the ledger has ever heard of."""
        found: list[str] = []
        wanted = sorted(paths)
        with self.read() as connection:
            for some in in_parts(wanted):
                these = record.c.path.in_(some)
                found += connection.execute(select(record.c.path).where(record.c.spool == spool, these)).scalars()
        return found

    # Which directory the root is

    def enter(self, spool: str, house: str) -> None:
        """Write down which directory the root is now, by the mark of our house in it.

        If it was another one before, what is unfinished was last seen there: until it is met here, its absence says
        nothing. A filesystem may be unmounted, or the root replaced.
        """
        name = f"house of {spool}"
        before = select(about.c.value).where(about.c.name == name)
        with self.read() as connection:
            if connection.execute(before).scalar() == house:
                return
        with self.write() as change:
            if change.execute(before).scalar() is not None:
                known = select(elsewhere.c.record_key)
                left = _unfinished(spool, record.c.id).where(record.c.id.not_in(known))
                change.execute(insert(elsewhere).from_select(["record_key"], left))
            change.execute(delete(about).where(about.c.name == name))
            change.execute(insert(about), {"name": name, "value": house})

    def met(self, spool: str, path: str) -> None:
        """Write down that a record that was last seen elsewhere lies here."""
        with self.write() as change:
            key = select(record.c.id).where(record.c.spool == spool, record.c.path == path).scalar_subquery()
            change.execute(delete(elsewhere).where(elsewhere.c.record_key == key))

    def elsewhere(self, spool: str) -> list[str]:
        """Return the unfinished records that were last seen in another directory that was the root."""
        lies_there = _unfinished(spool, record.c.path).join(elsewhere, elsewhere.c.record_key == record.c.id)
        with self.read() as connection:
            return list(connection.execute(lies_there).scalars())

    def wanted_as_is(self, spool: str) -> list[str]:
        """Return the incomplete records that a person wants taken as they lie."""
        statement = (
            select(record.c.path)
            .join(sighting, sighting.c.record_key == record.c.id)
            .where(record.c.spool == spool, sighting.c.as_is.is_(True), sighting.c.state != "gone")
        )
        with self.read() as connection:
            return list(connection.execute(statement).scalars())

    # Shared by the other verbs

    def _record(self, change: Transaction, spool: str, snapshot: Snapshot) -> tuple[int, int]:
        """Return the record's key and version; a row is made if there is none."""
        row = change.execute(_RECORD, {"of_spool": spool, "of_path": snapshot.record}).first()
        if row is not None:
            return row.id, row.version
        values = {
            "spool": spool, "path": snapshot.record, "attachment": snapshot.attachment, "record_id": snapshot.record_id,
            "version": 0, "fence": 0, "first_seen_at": change.at, "updated_at": change.at,
        }  # fmt: skip
        return change.execute(_INSERT_RECORD, values).scalar_one(), 0

    def _touched(self, change: Transaction, key: int) -> None:
        change.execute(CHANGE_RECORD, {"of_record": key, "updated_at": change.at})

    def _supersede(self, change: Transaction, key: int, *, before: int | None) -> None:
        """Let the record's older batches give way. One with files set aside is still walked until these are let go."""
        older = [
            row for row in change.execute(_STANDING, {"of_record": key}).all()
            if (row.id < before if before is not None else row.state != State.STORED)
        ]  # fmt: skip
        for row in older:
            self._given_up.add(key)
            aside = select(func.count()).where(batch_file.c.batch_id == row.id, batch_file.c.aside_name.is_not(None))
            has_aside = change.execute(aside).scalar_one() > 0
            values = {"state": State.SUPERSEDED, "due_at": change.now if has_aside else None, "next_attempt_at": None}
            change.execute(update(batch).where(batch.c.id == row.id).values(**values))
            whose = change.execute(select(record.c.path, record.c.spool).where(record.c.id == key)).one()
            change.tell("batch.superseded", record_key=key, batch=row.id, spool=whose.spool, record=whose.path)


def identity_of(row: Any) -> Identity:
    return Identity(row.dev, row.ino, row.size, row.mtime_ns, row.ctime_ns)


def _unfinished(spool: str, column: ColumnElement[Any]):  # type: ignore[no-untyped-def]  # SQLAlchemy's own type spells out every column
    """Select this column of each record of which something is not uploaded yet."""
    live = or_(sighting.c.state.in_(("receiving", "stalled")), batch.c.id.is_not(None))
    return (
        select(column)
        .select_from(record)
        .outerjoin(sighting, sighting.c.record_key == record.c.id)
        .outerjoin(batch, and_(batch.c.record_key == record.c.id, batch.c.state.in_((State.PENDING, State.DEAD))))
        .where(record.c.spool == spool, live)
        .distinct()
    )


# The statements of every look.

_RECORD = Statement(
    select(record.c.id, record.c.version).where(record.c.spool == bindparam("of_spool"), record.c.path == bindparam("of_path"))
)
_KNOWN = Statement(
    select(
        record.c.id,
        exists().where(object_.c.record_key == record.c.id, object_.c.style == ORIGINAL).label("has_original"),
        exists().where(elsewhere.c.record_key == record.c.id).label("is_elsewhere"),
        sighting.c.state.label("sighted"), sighting.c.vetoed, sighting.c.as_is,
    )
    .outerjoin(sighting, sighting.c.record_key == record.c.id)
    .where(record.c.spool == bindparam("of_spool"), record.c.path == bindparam("of_path"))
)  # fmt: skip
_CURRENT = Statement(
    select(batch)
    .where(batch.c.record_key == bindparam("of_record"), batch.c.state != State.SUPERSEDED)
    .order_by(batch.c.id.desc())
    .limit(1)
)
_STANDING = Statement(
    select(batch.c.id, batch.c.state).where(
        batch.c.record_key == bindparam("of_record"), batch.c.state.in_((State.PENDING, State.DEAD, State.STORED))
    )
)
_FILES_LEFT = Statement(
    select(batch_file).where(batch_file.c.batch_id == bindparam("of_batch"), batch_file.c.is_gone.is_(False))
)
_GONE = Statement(
    select(batch_file.c.id)
    .where(batch_file.c.batch_id == bindparam("of_batch"), batch_file.c.is_gone, batch_file.c.is_marker.is_(False))
    .limit(1)
)
_LIVE_SIZES = Statement(
    select(object_.c.style, object_.c.filename, object_.c.size).where(object_.c.record_key == bindparam("of_record"))
)
_SIGHTING = Statement(select(sighting).where(sighting.c.record_key == bindparam("of_record")))
_INSERT_SIGHTING = Statement(insert(sighting))
_CHANGE_SIGHTING = Statement(update(sighting).where(sighting.c.record_key == bindparam("of_record")))
_NOT_SEEN = Statement(delete(sighting).where(sighting.c.record_key == bindparam("of_record")))
_INSERT_RECORD = Statement(insert(record).returning(record.c.id))
CHANGE_RECORD = Statement(update(record).where(record.c.id == bindparam("of_record")))
_INSERT_BATCH = Statement(insert(batch).returning(batch.c.id))
_INSERT_FILES = Statement(insert(batch_file))


def _file_row(batch_id: int, file: SpooledFile, is_marker: bool) -> dict[str, object]:
    identity = file.identity
    return {
        "batch_id": batch_id, "path": file.path, "style": file.style, "basename": file.basename, "filename": file.filename,
        "dev": identity.dev, "ino": identity.ino, "size": identity.size, "mtime_ns": identity.mtime_ns,
        "ctime_ns": identity.ctime_ns, "is_marker": is_marker, "is_gone": False,
    }  # fmt: skip
