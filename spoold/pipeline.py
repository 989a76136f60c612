"""One batch, start to finish, and what to do with each kind of fault."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from spoold import container, styles
from spoold.cleanup import Cleaner, Missing
from spoold.clock import Ages, Clock
from spoold.errors import (
    Changed,
    ClaimLost,
    Draining,
    GaveUp,
    Halt,
    LedgerUnavailable,
    NoAccess,
    ObjectRefused,
    Refused,
    SpooldError,
    Stale,
    StoreUnavailable,
    Transient,
    Unfinished,
    Unproven,
)
from spoold.holds import Holds
from spoold.ledger import Ledger
from spoold.model import Answer, Claim, Outcome, PutResult, State
from spoold.spool import Spool, fault_of
from spoold.steps import SideBySide, Steps, Turn, Write
from spoold.uploader import Uploader

_LONG_BYTES = 4 << 20  # hashing more than this would keep others waiting for the turn


@dataclass(frozen=True, slots=True)
class Retry:
    """How a batch that failed waits: initial_s, doubling, max_s at most; give_up_after attempts it is dead (0: never)."""

    initial_s: float
    max_s: float
    give_up_after: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What works on one spool.

    replaced_after_s: how long keys outlive a newer original; None keeps them. decodes: every pixel must decode.
    touch: has the watcher look at a record again.
    """

    spool: Spool
    uploader: Uploader
    cleaner: Cleaner
    replaced_after_s: float | None
    decodes: bool
    touch: Callable[[str], None]


class Pipeline:
    """Walks claimed batches, in whatever thread calls it."""

    def __init__(
        self, *, ledger: Ledger, parts: dict[str, Parts], holds: Holds, retry: Retry, clock: Clock, pool: Executor,
        turn: Turn | None = None,
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._side_by_side = SideBySide(together=ledger.together, pool=pool, turn=turn)
        self._parts = parts
        self._holds = holds
        self._retry = retry
        self._clock = clock
        self._ages = Ages(clock)

    def walk_all(self, claims: Sequence[Claim]) -> list[Outcome | LedgerUnavailable]:
        """Walk claimed batches side by side, and return how each walk ended.

        Where that is LedgerUnavailable the claim is still ours.
        """
        is_long = any(file.file.identity.size > _LONG_BYTES for claim in claims for file in claim.batch.files)
        return self._side_by_side.run([self.walk(claim) for claim in claims], takes_turns=not is_long)

    def walk(self, claim: Claim) -> Steps[Outcome]:
        """Take one claimed batch as far as it will go, and write down how far that was."""
        batch, parts = claim.batch, self._parts[claim.batch.spool]
        try:
            if batch.state is State.PENDING:
                claim = yield from self._upload(claim, parts)  # every file in the bucket, proven; written down durably
            due = yield from parts.cleaner.clear(claim)  # only now may the disk forget; not before min_age, keep_for, grace
            if due:
                yield Write(partial(self._ledger.come_back, claim, self._clock.now() + due.in_s, due.waiting_for))
                return Outcome.WAITING
            due = parts.cleaner.prune(claim)
            yield Write(partial(self._ledger.done, claim, self._clock.now() + due.in_s if due else None))
            return Outcome.DONE
        except LedgerUnavailable:
            raise
        except (SpooldError, OSError) as error:
            fault = error if isinstance(error, SpooldError) else fault_of(error, "walk", batch.record)
        try:
            return self._answer(claim, parts, fault)
        except ClaimLost as lost:  # a newer batch came while this one failed
            return self._answer(claim, parts, lost)

    def _upload(self, claim: Claim, parts: Parts) -> Steps[Claim]:
        began = self._clock.monotonic()
        if parts.decodes:
            self._demand_whole_images(claim, parts.spool)
        self._demand_bytes(claim, parts.spool)
        fingerprint = self._ledger.live_fingerprint(claim) if parts.uploader.needs_fingerprint else None
        puts = parts.uploader.prepare(claim.batch, fingerprint=fingerprint)
        for marker in (file for file in claim.batch.files if file.is_marker and not file.is_gone):
            self._ledger.mark_hashed(claim, marker, parts.uploader.hash(marker).sha256)
        puts = yield Write(partial(self._ledger.intend, claim, puts))
        results = yield from parts.uploader.put(
            puts, on_upload=lambda put, upload: self._ledger.note_upload(put.intent, upload)
        )
        if any(result.answer is not Answer.CONFIRMED for result in results):
            yield Write(partial(self._ledger.answered, results))
            _raise_worst(results)
        elapsed_s = self._clock.monotonic() - began
        stored = partial(self._ledger.stored, replaced_after_s=parts.replaced_after_s, elapsed_s=elapsed_s)
        now_stored: Claim = yield Write(partial(stored, claim, results))
        return now_stored

    def _demand_whole_images(self, claim: Claim, spool: Spool) -> None:
        """Raise Unfinished if images do not decode. A batch taken as it lies is not asked."""
        if self._ledger.was_taken_as_is(claim):
            return
        reasons: dict[str, str] = {}
        for file in (file.file for file in claim.batch.uploads if not file.is_gone):
            with spool.opened(file) as fd:
                if file.basename not in reasons and (reason := styles.undecodable(fd)):
                    reasons[file.basename] = f"decode {file.path}: {reason}"
        if reasons:
            raise Unfinished("; ".join(reasons.values()), reasons)

    def _demand_bytes(self, claim: Claim, spool: Spool) -> None:
        """Raise Changed if a power cut took the bytes of a file that waited for its upload: the looker judges it anew.

        One that was hashed once was synced before. A batch taken as it lies is not asked.
        """
        waited = [file.file for file in claim.batch.uploads if file.digest is None and not file.is_gone]
        doubtful = [file for file in waited if self._ages.predates_boot(file.identity)]
        if not doubtful or self._ledger.was_taken_as_is(claim):
            return
        for file in doubtful:
            with spool.opened(file) as fd:
                if why := container.cut_off(fd, is_sure_of_size=True):
                    raise Changed(f"read {file.path}: {why}")

    def _answer(self, claim: Claim, parts: Parts, fault: SpooldError) -> Outcome:
        """Turn a fault into what the daemon does next."""
        match fault:
            case Draining():
                self._ledger.put_back(claim)
                return Outcome.WAITING
            case Missing():
                self._ledger.reopen(claim, fault.keys, fault)
                return Outcome.DEFERRED
            case Stale() | NoAccess() if isinstance(fault, Stale) or claim.batch.state is State.PENDING:
                self._ledger.withdraw(claim, fault, vetoed=fault.basenames if isinstance(fault, Unfinished) else ())
                parts.touch(claim.batch.record)
                return Outcome.STALE
            case Halt() | StoreUnavailable() | Unproven() | ObjectRefused() if self._holds.is_down(claim.batch.spool, fault):
                self._ledger.put_back(claim)
                return Outcome.HELD
            case Refused() if claim.batch.state is State.PENDING:
                self._ledger.bury(claim, fault)
                return Outcome.DEAD
        attempt = claim.batch.attempts + 1
        if claim.batch.state is State.PENDING and 0 < self._retry.give_up_after <= attempt:
            hint = f"{fault.hint + '; ' if fault.hint else ''}then: spoold retry {claim.batch.record}"
            self._ledger.bury(claim, GaveUp(f"{attempt} attempts failed, the last: {fault}", hint=hint))
            return Outcome.DEAD
        self._ledger.defer(claim, fault, self._back_off_s(attempt, getattr(fault, "retry_after_s", None)))
        return Outcome.DEFERRED

    def _back_off_s(self, attempt: int, asked_s: float | None) -> float:
        """Exponential, with jitter, so that what failed together does not come back together."""
        wait_s = min(self._retry.max_s, self._retry.initial_s * 2.0 ** min(attempt - 1, 30))
        return max(wait_s * random.uniform(0.8, 1.2), min(asked_s or 0.0, self._retry.max_s))


def _raise_worst(results: list[PutResult]) -> None:
    """Raise the fault that decides what becomes of the batch, if any of its PUTs was not confirmed."""
    faults = [result.error for result in results if result.answer is not Answer.CONFIRMED]
    for family in (Halt, Refused, StoreUnavailable, Transient):
        for fault in faults:
            if isinstance(fault, family):
                raise fault
    # What moved on comes before what was only not sent because of it.
    for fault in sorted(faults, key=lambda fault: isinstance(fault, Draining)):
        assert fault is not None, "what is not confirmed says why"
        raise fault
