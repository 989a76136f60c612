"""Who is at what: claims on records, and spools that nobody may claim from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import BindParameter, Float, Integer, Row, and_, bindparam, delete, exists, insert, or_, select, update

from spoold.clock import Clock
from spoold.errors import ClaimLost, Crashed, LedgerUnavailable, SpooldError
from spoold.ledger.database import Transaction
from spoold.ledger.schema import (
    IS_NOT_PENDING,
    IS_PENDING,
    MOST_BEHIND_S,
    PUT_BACK_S,
    QUEUED_AT,
    batch,
    batch_file,
    claim,
    held,
    intent,
    record,
)
from spoold.ledger.statements import Session, Statement, in_parts
from spoold.ledger.watching import CHANGE_RECORD, Watching, identity_of
from spoold.model import Answer, Batch, BatchFile, Claim, SpooledFile, State

_BYTES_AT_ONCE = 8 << 20  # of files that are walked side by side: the small do not wait for the large


class Claiming(Watching):
    """Taking a claim, keeping it, proving it, and what every end of a walk has in common."""

    def __init__(self, url: str, *, clock: Clock, create: bool = True) -> None:
        super().__init__(url, clock=clock, create=create)
        self._unsure: set[tuple[int, int]] = set()  # record and fence of claims that are ours in the ledger alone, perhaps

    # Claims

    def claim(
        self, owner: str, spools: Iterable[str], *, lease_s: float, crashes: int, uploads_first: bool = True, at_most: int = 1,
        patience_s: float = 0.0,
    ) -> list[Claim]:  # fmt: skip
        """Claim the records of the batches that are due next, of these spools and none that is held.

        at_most: how many, of one kind and of not too many bytes together; one under suspicion comes alone.
        patience_s: how long what is uploaded waits for others to come with it; nobody waits for its files to go.
        crashes: a pending batch whose walks killed their process this often is buried instead. The attempt is written
        down with the claim: a batch that kills us is then counted, not walked for ever (FACTS 31). What was under way in a
        process that died is under suspicion, and an owner walks one such batch at a time: so the innocent end in good order,
        and only the one that kills is counted again.
        """
        asked = {"owner": owner, "spools": list(spools), "crashes": crashes, "at_most": at_most}
        order = [_UPLOADS_DUE, _CLEARING_DUE] if uploads_first else [_CLEARING_DUE, _UPLOADS_DUE]
        with self.read() as session:  # idle workers ask often: they must not queue up to write
            now = {_UPLOADS_DUE: self._clock.now(), _CLEARING_DUE: self._clock.now() - patience_s}
            while order and not _due_now(session, order[:1], {**asked, "at_most": 1}, now=now[order[0]], lease_s=lease_s):
                order.pop(0)
        if not order:
            return []
        with self._unless_unsure() as taken, self.write() as change:
            while rows := _due_now(change.session, order, asked, now=change.now, lease_s=lease_s):
                chosen: list[Any] = []
                room = _BYTES_AT_ONCE
                for row in rows:
                    if row.state == State.PENDING and row.crashes >= crashes:
                        self._bury_crashed(change, row)
                        continue
                    if any(row.record_key == other.record_key for other in chosen):
                        continue  # of an older batch some files lie aside still: one claim a record
                    is_suspected = row.state == State.PENDING and row.crashes > 0
                    if chosen and (is_suspected or row.bytes > room):
                        break
                    self._taking(taken, row.record_key, row.fence + 1)
                    chosen.append(row)
                    room -= row.bytes
                    if is_suspected:
                        break
                if chosen:
                    return self._claimed(change, chosen, owner, lease_s)
            return []

    def _bury_crashed(self, change: Transaction, row: Any) -> None:
        self._take_over(change, [row.record_key])
        fault = Crashed(
            f"walk {row.path}: {row.crashes} walks of it ended with the daemon's process",
            hint="look at its files and the system's log (out of memory?), then: spoold retry",
        )
        self._bury(change, row.id, row.record_key, row.spool, row.path, fault)

    def _take_over(self, change: Transaction, keys: Sequence[int]) -> None:
        """Whoever had these records' claims is dead or frozen: what it had under way may still land (rule 6)."""
        change.execute(_FREE, {"of_records": keys})
        change.execute(_DOUBT_WHAT_IS_OPEN, {"of_records": keys, "doubt_at": change.now})

    def _claimed(self, change: Transaction, rows: Sequence[Any], owner: str, lease_s: float) -> list[Claim]:
        """Take over the records of these batches, all of one kind."""
        until = change.now + lease_s
        self._take_over(change, [row.record_key for row in rows])
        is_pending = rows[0].state == State.PENDING
        records, claims = [], []
        for row in rows:
            updated_at = change.at if is_pending else row.updated_at
            records.append({"of_record": row.record_key, "fence": row.fence + 1, "updated_at": updated_at})
            claims.append({
                "record_key": row.record_key, "batch_id": row.id, "owner": owner, "fence": row.fence + 1, "until": until,
            })  # fmt: skip
            event = "batch.claimed" if is_pending else "batch.resumed"
            attempt = row.attempts + 1 if is_pending else None
            change.tell(event, record_key=row.record_key, batch=row.id, spool=row.spool, record=row.path, attempt=attempt)
        change.execute(CHANGE_RECORD, records)
        change.execute(_INSERT_CLAIM, claims)
        if is_pending:
            change.execute(CHANGE_BATCH, [{"of_batch": row.id, "crashes": row.crashes + 1} for row in rows])
        return [
            Claim(
                Batch(
                    row.id, row.spool, row.record_key, row.path, row.attachment, row.record_id, State(row.state), row.version,
                    row.attempts, files,
                ),
                owner, row.fence + 1, until,
            )
            for row, files in zip(rows, files_of(change.session, [row.id for row in rows]), strict=True)
        ]  # fmt: skip

    def renew(self, owner: str, *, lease_s: float) -> None:
        """Prolong every claim of this owner that nobody has taken over, and free those of which it may not know."""
        with self._unless_unsure() as unsure, self.write() as change:
            unsure.extend(self._unsure)
            self._unsure.clear()
            for key, fence in unsure:
                mine = and_(claim.c.record_key == key, claim.c.owner == owner, claim.c.fence == fence)
                row = change.execute(select(claim).where(mine)).first()
                if row is not None:
                    self._take_over(change, [key])
                    counted = and_(batch.c.id == row.batch_id, batch.c.crashes > 0)
                    change.execute(update(batch).where(counted).values(crashes=batch.c.crashes - 1))
            change.execute(update(claim).where(claim.c.owner == owner).values(until=change.now + lease_s))

    def _taking(self, taken: list[tuple[int, int]], record_key: int, fence: int) -> None:
        """A claim is about to be ours; one of the same number was not taken after all."""
        taken.append((record_key, fence))
        self._unsure.discard((record_key, fence))

    @contextlib.contextmanager
    def _unless_unsure(self, *taken: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
        """Remember claims that a change took or gave back, by record and fence, if nobody knows whether it was carried out.

        A commit that failed may have been. Such a claim would be renewed for ever, and nobody would walk its record.
        """
        unsure = list(taken)
        try:
            yield unsure
        except LedgerUnavailable:
            self._unsure.update(unsure)
            raise

    def owners(self) -> list[str]:
        """Return whoever holds a claim."""
        with self.read() as connection:
            return list(connection.execute(select(claim.c.owner).distinct()).scalars())

    def bereave(self, owner: str) -> None:
        """End every claim of an owner that is known to be dead, so that nobody waits for them to run out."""
        with self.write() as change:
            keys = change.execute(select(claim.c.record_key).where(claim.c.owner == owner)).scalars().all()
            for some in in_parts(keys):
                self._take_over(change, some)
            change.tell("claim.lost", detail=f"the daemon {owner} is dead; its claims are free")

    def claim_record(self, record_key: int, owner: str, *, lease_s: float) -> int | None:
        """Claim a record without a batch, to recover or to remove what is its; None if somebody else is at it.

        Returns the claim's fence, for `release_record`.
        """
        with self._unless_unsure() as taken, self.write() as change:
            held_by = change.execute(select(claim).where(claim.c.record_key == record_key)).first()
            if held_by is not None and change.now < held_by.until <= change.now + 2 * lease_s:
                return None
            self._take_over(change, [record_key])
            fence = change.execute(select(record.c.fence).where(record.c.id == record_key)).scalar_one() + 1
            self._taking(taken, record_key, fence)
            change.execute(update(record).where(record.c.id == record_key).values(fence=fence))
            row = {
                "record_key": record_key,
                "batch_id": None,
                "owner": owner,
                "fence": fence,
                "until": change.now + lease_s,
            }
            change.execute(insert(claim), row)
            return int(fence)

    def release_record(self, record_key: int, owner: str, fence: int) -> None:
        """Give back what `claim_record` gave."""
        with self._unless_unsure((record_key, fence)), self.write() as change:
            change.execute(
                delete(claim).where(claim.c.record_key == record_key, claim.c.owner == owner, claim.c.fence == fence)
            )

    # What every change made by a walk has in common

    def _standing(self, change: Transaction, mine: Claim) -> str | None:
        """Return the state of the batch now; None if its claim is not ours any more."""
        asked = {"of_record": mine.batch.record_key, "of_batch": mine.batch.id}
        row = change.execute(_STANDING, asked).first()
        return row.state if row is not None and (row.owner, row.fence) == (mine.owner, mine.fence) else None

    def _demand(self, change: Transaction, mine: Claim, *, even_superseded: bool = False) -> str:
        """Return the state of the batch; raise ClaimLost unless its claim is live and, but where said, the batch counts."""
        state = self._standing(change, mine)
        if state is None:
            raise ClaimLost(f"walk {mine.batch.record}: its claim was taken over")
        if state == State.SUPERSEDED and mine.batch.state is not State.SUPERSEDED and not even_superseded:
            raise ClaimLost(f"walk {mine.batch.record}: a newer batch took its place")
        return state

    def _end(self, change: Transaction, mine: Claim, was: str, **values: Any) -> None:
        """End the walk of a batch whose state is `was` in good order: the claim is free, and no crash is counted."""
        change.execute(_FREE, {"of_records": [mine.batch.record_key]})
        if was == State.SUPERSEDED:
            values = {name: values[name] for name in ("due_at", "waiting_for") if name in values}
            waits_for_dirs = values.get("waiting_for") == "dirs"  # of what it set aside; nobody else may know of them
            if not waits_for_dirs and change.execute(_ANY_ASIDE, {"of_batch": mine.batch.id}).first() is None:
                values["due_at"] = None
        change.execute(CHANGE_BATCH, {"of_batch": mine.batch.id, "crashes": 0, **values})

    def _bury(self, change: Transaction, identifier: int, key: int, spool: str, path: str, fault: SpooldError) -> None:
        values = {
            "state": State.DEAD, "due_at": None, "next_attempt_at": None, "waiting_for": "",
            "error_code": fault.code, "error": str(fault), "hint": fault.hint,
        }  # fmt: skip
        change.execute(update(batch).where(batch.c.id == identifier).values(**values))
        self._touched(change, key)
        change.tell(
            "batch.dead", record_key=key, batch=identifier, spool=spool, record=path,
            error=fault.code, detail=str(fault), hint=fault.hint,
        )  # fmt: skip

    def _tell(self, change: Transaction, mine: Claim, event: str, **keys: Any) -> None:
        change.tell(
            event,
            record_key=mine.batch.record_key,
            batch=mine.batch.id,
            spool=mine.batch.spool,
            record=mine.batch.record,
            **keys,
        )

    # Spools that are held

    def hold(self, spool: str, fault: SpooldError) -> None:
        """Write down that nothing of this spool can work until somebody acts; told once, until it works again."""
        with self.write() as change:
            values = {"error_code": fault.code, "error": str(fault), "hint": fault.hint}
            before = change.execute(select(held).where(held.c.spool == spool)).first()
            if before is None:
                change.execute(insert(held), {"spool": spool, "since": change.at, **values})
            else:
                change.execute(update(held).where(held.c.spool == spool).values(**values))
            if before is None or before.error_code != fault.code:
                change.tell("spool.held", spool=spool, error=fault.code, detail=str(fault), hint=fault.hint)

    def release(self, spool: str) -> None:
        """The spool works again."""
        with self.write() as change:
            if change.execute(delete(held).where(held.c.spool == spool)).rowcount:
                change.tell("spool.released", spool=spool)

    def held(self) -> dict[str, Row[Any]]:
        """Return the held spools by name, each with since, error_code, error, hint."""
        with self.read() as connection:
            return {row.spool: row for row in connection.execute(select(held))}


# The statements of every walk.

_FILES = Statement(
    select(
        batch_file.c.id, batch_file.c.batch_id, batch_file.c.path, batch_file.c.style, batch_file.c.basename,
        batch_file.c.filename, batch_file.c.dev, batch_file.c.ino, batch_file.c.size, batch_file.c.mtime_ns,
        batch_file.c.ctime_ns, batch_file.c.is_marker, batch_file.c.digest, batch_file.c.aside_name, batch_file.c.is_gone,
    )
    .where(batch_file.c.batch_id.in_(bindparam("of_batches", expanding=True)))
    .order_by(batch_file.c.id)
)  # fmt: skip
_STANDING = Statement(
    select(claim.c.owner, claim.c.fence, batch.c.state)
    .join(batch, batch.c.record_key == claim.c.record_key)
    .where(claim.c.record_key == bindparam("of_record"), batch.c.id == bindparam("of_batch"))
)
_ANY_ASIDE = Statement(
    select(batch_file.c.id).where(batch_file.c.batch_id == bindparam("of_batch"), batch_file.c.aside_name.is_not(None)).limit(1)
)
_OF_RECORDS: BindParameter[list[int]] = bindparam("of_records", expanding=True)
_FREE = Statement(delete(claim).where(claim.c.record_key.in_(_OF_RECORDS)))
_INSERT_CLAIM = Statement(insert(claim))
CHANGE_BATCH = Statement(update(batch).where(batch.c.id == bindparam("of_batch")))
_DOUBT_WHAT_IS_OPEN = Statement(
    update(intent).where(intent.c.record_key.in_(_OF_RECORDS), intent.c.answer.is_(None)).values(answer=Answer.DOUBT)
)


def _due(*, uploads: bool):  # type: ignore[no-untyped-def]  # spells out every column
    """Select the batches of this kind that may be claimed next, by due time.

    A claim that runs longer than a lease from now was written before the clock jumped back: it has run out too.
    Each crash puts a batch back in the queue, so that it is not the same one that is under way whenever we are killed; so does
    what stood before it in its line when it was offered, and its size (`Watching._behind_s`).
    The partial indexes `batch_uploads` and `batch_rest` are in this order, so that it costs the same however many wait.
    """
    now, crashes = bindparam("now", type_=Float), bindparam("crashes", type_=Integer)
    live = exists().where(claim.c.record_key == record.c.id, claim.c.until > now, claim.c.until <= bindparam("lapses"))
    is_held = exists().where(held.c.spool == record.c.spool)
    spool = record.c.spool.concat("")  # not by the index on spool and path, which would meet every record there ever was
    due = (
        select(
            batch, record.c.spool, record.c.path, record.c.attachment, record.c.record_id, record.c.fence, record.c.updated_at
        )
        .join(record, record.c.id == batch.c.record_key)
        .where(batch.c.due_at <= now, spool.in_(bindparam("spools", expanding=True)), ~live, ~is_held)
        .limit(bindparam("at_most"))
    )
    if not uploads:
        return due.where(IS_NOT_PENDING).order_by(batch.c.due_at, batch.c.id)
    suspected = and_(batch.c.crashes > 0, batch.c.crashes < crashes)
    walked = batch.alias()  # counted once more when it was claimed
    one_is_walked = exists().where(
        claim.c.batch_id == walked.c.id, claim.c.owner == bindparam("owner"), claim.c.until > now, walked.c.crashes > 1
    )
    at_most = now + crashes * PUT_BACK_S + MOST_BEHIND_S
    return due.where(IS_PENDING, QUEUED_AT <= at_most, or_(~suspected, ~one_is_walked)).order_by(QUEUED_AT, batch.c.id)


_UPLOADS_DUE = Statement(_due(uploads=True))
_CLEARING_DUE = Statement(_due(uploads=False))


def _due_now(
    session: Session, order: Iterable[Statement], asked: dict[str, Any], *, now: float, lease_s: float
) -> Sequence[Any]:
    """Return what is due, of the first kind of which anything is."""
    for statement in order:
        rows: Sequence[Any] = session.execute(statement, {**asked, "now": now, "lapses": now + 2 * lease_s})
        if rows:
            return rows
    return []


def files_of(session: Session, batches: Sequence[int]) -> list[tuple[BatchFile, ...]]:
    """Return the files of each of these batches."""
    files: dict[int, list[BatchFile]] = {identifier: [] for identifier in batches}
    for row in session.execute(_FILES, {"of_batches": batches}):
        files[row.batch_id].append(batch_file_of(row))
    return [tuple(files[identifier]) for identifier in batches]


def batch_file_of(row: Any) -> BatchFile:
    file = SpooledFile(row.path, row.style, row.basename, row.filename, identity_of(row))
    return BatchFile(row.id, file, row.is_marker, row.digest, row.aside_name, row.is_gone)
