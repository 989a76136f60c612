"""What people and programs ask the ledger; nothing here changes anything but `retry`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import and_, case, exists, func, or_, select, text, update

from spoold.ledger.rebuilding import Rebuilding
from spoold.ledger.schema import batch, batch_file, claim, history, object_, record, replaced, sighting
from spoold.model import State

STATES = ("receiving", "stalled", "queued", "uploading", "retrying", "dead", "uploaded", "done", "gone")
"""What a record can be, the least advanced first (contract, section 3)."""

TROUBLE = ("dead", "stalled", "retrying")
"""Those of the states in which something is wrong, the worst first."""


class Looking(Rebuilding):
    """The verbs of `status`, `why`, `wait` and `retry`."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many records each spool has in each state, states without any left out."""
        counts: dict[str, dict[str, int]] = {}
        with self.read() as connection:
            rows = connection.execute(text("SELECT spool, state, count(*) AS n FROM record_status GROUP BY spool, state"))
            found = {(row.spool, row.state): row.n for row in rows}
        for spool, state in sorted(found, key=lambda pair: (pair[0], STATES.index(pair[1]))):
            counts.setdefault(spool, {})[state] = found[spool, state]
        return counts

    def troubled(self, *, limit: int) -> list[dict[str, Any]]:
        """Return spool, path, state and error of the records with which something is wrong, the worst first."""
        worst_first = "CASE state " + " ".join(f"WHEN '{state}' THEN {n}" for n, state in enumerate(TROUBLE)) + " END"
        states = ", ".join(f"'{state}'" for state in TROUBLE)
        statement = text(
            f"SELECT spool, path, state, error FROM record_status WHERE state IN ({states}) "
            f"ORDER BY {worst_first}, updated_at LIMIT :limit"
        )
        with self.read() as connection:
            return [dict(row._mapping) for row in connection.execute(statement, {"limit": limit})]

    def record_status(self, path: str, *, spool: str | None = None) -> list[dict[str, Any]]:
        """Return the row of contract section 3 for the record at `path`, one for each spool that has it."""
        statement = "SELECT * FROM record_status WHERE path = :path" + (" AND spool = :spool" if spool else "")
        with self.read() as connection:
            rows = connection.execute(text(statement), {"path": path, **({"spool": spool} if spool else {})})
            return [dict(row._mapping) for row in rows]

    def record_objects(self, path: str, *, spool: str) -> list[dict[str, Any]]:
        """Return the live objects of a record, as the view has them."""
        statement = text("SELECT * FROM record_object WHERE path = :path AND spool = :spool ORDER BY style, key")
        with self.read() as connection:
            return [dict(row._mapping) for row in connection.execute(statement, {"path": path, "spool": spool})]

    def record_history(self, path: str, *, spool: str) -> list[dict[str, Any]]:
        """Return what happened to a record, oldest first."""
        statement = (
            select(history.c.at, history.c.event, history.c.batch_id, history.c.detail)
            .join(record, record.c.id == history.c.record_key)
            .where(record.c.path == path, record.c.spool == spool)
            .order_by(history.c.id)
        )
        with self.read() as connection:
            return [
                {"at": row.at, "event": row.event, "batch": row.batch_id, **json.loads(row.detail)}
                for row in connection.execute(statement)
            ]

    def current(self, path: str, *, spool: str) -> dict[str, Any]:
        """Return what the record waits for, by its current batch and its sighting."""
        statement = (
            select(
                batch.c.id, batch.c.state, batch.c.stored_at, batch.c.due_at, batch.c.waiting_for, batch.c.decided_by,
                batch.c.error_code,                batch.c.error, batch.c.hint, batch.c.attempts, batch.c.next_attempt_at,
                sighting.c.state.label("sighted"), sighting.c.reason,
            )
            .select_from(record)
            .outerjoin(sighting, sighting.c.record_key == record.c.id)
            .outerjoin(batch, and_(batch.c.record_key == record.c.id, batch.c.state != State.SUPERSEDED))
            .where(record.c.path == path, record.c.spool == spool)
            .order_by(batch.c.id.desc())
            .limit(1)
        )  # fmt: skip
        with self.read() as connection:
            row = connection.execute(statement).first()
            return dict(row._mapping) if row is not None else {}

    def objects_at(self, path: str, *, spool: str) -> list[dict[str, Any]]:
        """Return where the files that lay at `path` went, newest first."""
        statement = (
            select(batch_file.c.bucket, batch_file.c.key, batch_file.c.is_gone, batch_file.c.aside_name, batch.c.state,
                   batch.c.stored_at, batch_file.c.size, batch_file.c.dev, batch_file.c.ino,
                   batch_file.c.mtime_ns, batch_file.c.ctime_ns)
            .join(batch, batch.c.id == batch_file.c.batch_id)
            .join(record, record.c.id == batch.c.record_key)
            .where(batch_file.c.path == path, record.c.spool == spool)
            .order_by(batch_file.c.id.desc())
        )  # fmt: skip
        with self.read() as connection:
            return [dict(row._mapping) for row in connection.execute(statement)]

    def knows_path(self, path: str, *, record_path: str, spool: str) -> bool:
        """Say whether a file of any batch of this record lay at `path`, or below it."""
        statement = (
            select(batch_file.c.id)
            .join(batch, batch.c.id == batch_file.c.batch_id)
            .join(record, record.c.id == batch.c.record_key)
            .where(record.c.spool == spool, record.c.path == record_path)
            .where(or_(batch_file.c.path == path, batch_file.c.path.startswith(f"{path}/", autoescape=True)))
            .limit(1)
        )
        with self.read() as connection:
            return connection.execute(statement).first() is not None

    def bytes_by_spool(self) -> dict[str, tuple[int, int]]:
        """Return how many live objects each spool has, and their bytes."""
        statement = (
            select(record.c.spool, func.count(), func.coalesce(func.sum(object_.c.size), 0))
            .join(record, record.c.id == object_.c.record_key)
            .group_by(record.c.spool)
        )
        with self.read() as connection:
            return {spool: (files, size) for spool, files, size in connection.execute(statement)}

    def replaced_waiting(self) -> int:
        """Return how many replaced keys wait to be deleted."""
        with self.read() as connection:
            return int(connection.execute(select(func.count()).select_from(replaced)).scalar_one())

    def unfinished_work(self, spools: Iterable[str], *, owner: str) -> dict[str, int]:
        """Return how much is left to do, by what it waits for.

        The keys are a batch's `waiting_for` ("clearing" where it is due), "elsewhere" for what another daemon than
        `owner` is at, "dead", and "receiving" for incomplete records.
        """
        here = record.c.spool.in_(list(spools))
        reason = case(
            (exists().where(claim.c.record_key == record.c.id, claim.c.owner != owner), "elsewhere"),
            (batch.c.state == State.DEAD, "dead"),
            (batch.c.waiting_for == "", "clearing"),
            else_=batch.c.waiting_for,
        ).label("reason")
        batches = (
            select(reason, func.count().label("n"))
            .join(record, record.c.id == batch.c.record_key)
            .where(here, or_(batch.c.due_at.is_not(None), batch.c.state == State.DEAD))
            .group_by(reason)
        )
        sightings = (
            select(func.count())
            .select_from(sighting)
            .join(record, record.c.id == sighting.c.record_key)
            .where(here, sighting.c.state != "gone")
        )
        with self.read() as connection:
            left = {row.reason: row.n for row in connection.execute(batches)}
            if count := connection.execute(sightings).scalar_one():
                left["receiving"] = count
        return left

    def retry(self, paths: Iterable[str] | None, *, spool: str | None = None, as_is: bool = False) -> list[str]:
        """Make dead and retrying batches due now, and incomplete records looked at again; return the records concerned.

        paths: the records, or None for all. as_is: also take incomplete records as they lie.
        """
        chosen = []
        conditions = [record.c.spool == spool] if spool else []
        if paths is not None:
            conditions.append(record.c.path.in_(list(paths)))
        with self.write() as change:
            statement = (
                select(
                    record.c.id,
                    record.c.path,
                    record.c.spool,
                    batch.c.id.label("batch"),
                    batch.c.state,
                    sighting.c.state.label("sighted"),
                )
                .outerjoin(
                    batch,
                    and_(
                        batch.c.record_key == record.c.id,
                        or_(
                            batch.c.state.in_((State.PENDING, State.DEAD)),
                            and_(batch.c.state == State.STORED, batch.c.next_attempt_at.is_not(None)),
                        ),
                    ),
                )
                .outerjoin(sighting, and_(sighting.c.record_key == record.c.id, sighting.c.state != "gone"))
                .where(*conditions)
            )
            for row in change.execute(statement).all():
                if row.batch is None and row.sighted is None:
                    continue
                if row.batch is not None:
                    values: dict[str, Any] = {"due_at": change.now, "behind_s": 0.0, "crashes": 0}
                    if row.state == State.DEAD:
                        values |= {"state": State.PENDING, "waiting_for": "attempt", "attempts": 0, "error_code": None,
                                   "error": None, "hint": None}  # fmt: skip
                    change.execute(update(batch).where(batch.c.id == row.batch).values(**values))
                    change.tell("batch.retried", record_key=row.id, batch=row.batch, spool=row.spool, record=row.path)
                if row.sighted is not None and as_is:
                    change.execute(update(sighting).where(sighting.c.record_key == row.id).values(as_is=True, vetoed=None))
                    change.tell("record.taken_as_is", record_key=row.id, spool=row.spool, record=row.path)
                chosen.append(row.path)
        return chosen
