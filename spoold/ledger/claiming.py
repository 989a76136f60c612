"""Who is at what: claims on records, and spools that nobody may claim from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Row, and_, delete, exists, insert, or_, select, update

from spoold.clock import Clock
from spoold.errors import ClaimLost, Crashed, LedgerUnavailable, SpooldError
from spoold.ledger.database import Transaction
from spoold.ledger.schema import batch, batch_file, claim, held, intent, record
from spoold.ledger.watching import Watching, identity_of
from spoold.model import Answer, Batch, BatchFile, Claim, SpooledFile, State

_PUT_BACK_S = 60.0  # in the order of the queue; nothing waits longer for it


class Claiming(Watching):
    """Taking a claim, keeping it, proving it, and what every end of a walk has in common."""

    def __init__(self, url: str, *, clock: Clock, create: bool = True) -> None:
        super().__init__(url, clock=clock, create=create)
        self._unsure: set[tuple[int, int]] = set()  # record and fence of claims that are ours in the ledger alone, perhaps

    # Claims

    def claim(
        self, owner: str, spools: Iterable[str], *, lease_s: float, crashes: int, uploads_first: bool = True
    ) -> Claim | None:
        """Claim the record of the batch that is due next, of these spools and none that is held; None if nothing is.

        crashes: a pending batch whose walks killed their process this often is buried instead. The attempt is written
        down with the claim: a batch that kills us is then counted, not walked for ever (FACTS 31). What was under way in a
        process that died is under suspicion, and an owner walks one such batch at a time: so the innocent end in good order,
        and only the one that kills is counted again.
        """
        names = list(spools)
        with self.read() as connection:  # idle workers ask often: they must not queue up to write
            if connection.execute(_due(self._clock.now(), owner, names, lease_s, crashes, uploads_first)).first() is None:
                return None
        with self._unless_unsure() as taken, self.write() as change:
            while True:
                row = change.execute(_due(change.now, owner, names, lease_s, crashes, uploads_first)).first()
                if row is None:
                    return None
                self._taking(taken, row.record_key, row.fence + 1)
                self._take_over(change, row.record_key)
                if row.state == State.PENDING and row.crashes >= crashes:
                    fault = Crashed(
                        f"walk {row.path}: {row.crashes} walks of it ended with the daemon's process",
                        hint="look at its files and the system's log (out of memory?), then: spoold retry",
                    )
                    self._bury(change, row.id, row.record_key, row.spool, row.path, fault)
                    continue
                return self._claimed(change, row, owner, lease_s)

    def _take_over(self, change: Transaction, key: int) -> None:
        """Whoever had this record's claim is dead or frozen: what it had under way may still land (rule 6)."""
        change.execute(delete(claim).where(claim.c.record_key == key))
        change.execute(
            update(intent)
            .where(intent.c.record_key == key, intent.c.answer.is_(None))
            .values(answer=Answer.DOUBT, doubt_at=change.now)
        )

    def _claimed(self, change: Transaction, row: Row[Any], owner: str, lease_s: float) -> Claim:
        until = change.now + lease_s
        fence = row.fence + 1
        change.execute(update(record).where(record.c.id == row.record_key).values(fence=fence))
        change.execute(
            insert(claim),
            {"record_key": row.record_key, "batch_id": row.id, "owner": owner, "fence": fence, "until": until},
        )
        if row.state == State.PENDING:
            change.execute(update(batch).where(batch.c.id == row.id).values(crashes=row.crashes + 1))
            self._touched(change, row.record_key)
        event = "batch.claimed" if row.state == State.PENDING else "batch.resumed"
        attempt = row.attempts + 1 if row.state == State.PENDING else None
        change.tell(event, record_key=row.record_key, batch=row.id, spool=row.spool, record=row.path, attempt=attempt)
        files = change.execute(select(batch_file).where(batch_file.c.batch_id == row.id).order_by(batch_file.c.id))
        claimed = Batch(
            row.id, row.spool, row.record_key, row.path, row.attachment, row.record_id, State(row.state), row.version,
            row.attempts, tuple(batch_file_of(file) for file in files),
        )  # fmt: skip
        return Claim(claimed, owner, fence, until)

    def renew(self, owner: str, *, lease_s: float) -> None:
        """Prolong every claim of this owner that nobody has taken over, and free those of which it may not know."""
        with self._unless_unsure() as unsure, self.write() as change:
            unsure.extend(self._unsure)
            self._unsure.clear()
            for key, fence in unsure:
                mine = and_(claim.c.record_key == key, claim.c.owner == owner, claim.c.fence == fence)
                row = change.execute(select(claim).where(mine)).first()
                if row is not None:
                    self._take_over(change, key)
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
            for key in change.execute(select(claim.c.record_key).where(claim.c.owner == owner)).scalars().all():
                self._take_over(change, key)
            change.tell("claim.lost", detail=f"the daemon {owner} is dead; its claims are free")

    def claim_record(self, record_key: int, owner: str, *, lease_s: float) -> int | None:
        """Claim a record without a batch, to recover or to remove what is its; None if somebody else is at it.

        Returns the claim's fence, for `release_record`.
        """
        with self._unless_unsure() as taken, self.write() as change:
            held_by = change.execute(select(claim).where(claim.c.record_key == record_key)).first()
            if held_by is not None and change.now < held_by.until <= change.now + 2 * lease_s:
                return None
            self._take_over(change, record_key)
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

    def _is_mine(self, change: Transaction, mine: Claim) -> bool:
        row = change.execute(select(claim).where(claim.c.record_key == mine.batch.record_key)).first()
        return row is not None and (row.owner, row.fence) == (mine.owner, mine.fence)

    def _demand(self, change: Transaction, mine: Claim, *, even_superseded: bool = False) -> None:
        """Raise ClaimLost unless the claim is live and, but where said, the batch still counts."""
        if not self._is_mine(change, mine):
            raise ClaimLost(f"walk {mine.batch.record}: its claim was taken over")
        state = change.execute(select(batch.c.state).where(batch.c.id == mine.batch.id)).scalar_one()
        if state == State.SUPERSEDED and mine.batch.state is not State.SUPERSEDED and not even_superseded:
            raise ClaimLost(f"walk {mine.batch.record}: a newer batch took its place")

    def _end(self, change: Transaction, mine: Claim, **values: Any) -> None:
        """End the walk in good order: the claim is free, and no crash is counted."""
        change.execute(delete(claim).where(claim.c.record_key == mine.batch.record_key))
        state = change.execute(select(batch.c.state).where(batch.c.id == mine.batch.id)).scalar_one()
        if state == State.SUPERSEDED:
            values = {name: values[name] for name in ("due_at", "waiting_for") if name in values}
            aside = select(batch_file.c.id).where(batch_file.c.batch_id == mine.batch.id, batch_file.c.aside_name.is_not(None))
            waits_for_dirs = values.get("waiting_for") == "dirs"  # of what it set aside; nobody else may know of them
            if not waits_for_dirs and change.execute(aside.limit(1)).first() is None:
                values["due_at"] = None
        change.execute(update(batch).where(batch.c.id == mine.batch.id).values(crashes=0, **values))

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


def _due(  # type: ignore[no-untyped-def]  # spells out every column
    now: float, owner: str, spools: list[str], lease_s: float, crashes: int, uploads_first: bool
):
    """Select the batch that may be claimed next: of the kind that is wanted first, then by due time.

    A claim that runs longer than a lease from now was written before the clock jumped back: it has run out too.
    Each crash puts a batch back in the queue, so that it is not the same one that is under way whenever we are killed.
    """
    live = exists().where(claim.c.record_key == record.c.id, claim.c.until > now, claim.c.until <= now + 2 * lease_s)
    suspected = and_(batch.c.state == State.PENDING, batch.c.crashes > 0, batch.c.crashes < crashes)
    walked = batch.alias()  # counted once more when it was claimed
    one_is_walked = exists().where(
        claim.c.batch_id == walked.c.id, claim.c.owner == owner, claim.c.until > now, walked.c.crashes > 1
    )
    return (
        select(batch, record.c.spool, record.c.path, record.c.attachment, record.c.record_id, record.c.fence)
        .join(record, record.c.id == batch.c.record_key)
        .where(batch.c.due_at <= now, record.c.spool.in_(spools), ~live, ~exists().where(held.c.spool == record.c.spool))
        .where(or_(~suspected, ~one_is_walked))
        .order_by(
            (batch.c.state != State.PENDING) if uploads_first else (batch.c.state == State.PENDING),
            batch.c.due_at + batch.c.crashes * _PUT_BACK_S,
            batch.c.id,
        )
        .limit(1)
    )


def batch_file_of(row: Row[Any]) -> BatchFile:
    file = SpooledFile(row.path, row.style, row.basename, row.filename, identity_of(row))
    return BatchFile(row.id, file, row.is_marker, row.digest, row.aside_name, row.is_gone)
