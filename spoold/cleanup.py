"""Let go of what is no longer needed, and only of that: the only hand that deletes user data, local or remote.

A local file goes in four steps (FACTS 17 to 20): it is set aside, a rename into `.spoold/aside/` under a name never used
again; looked at again, by lease and by hash; after a grace looked at once more; unlinked. Whatever is not exactly what
was stored is given back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import structlog

from spoold.aside import AsideDirectory, aside_name, parse_aside_name
from spoold.clock import Ages, Clock
from spoold.doubts import Doubts
from spoold.errors import (
    Changed,
    ClaimLost,
    Halt,
    NoAccess,
    Refused,
    SpoolBroken,
    SpooldError,
    Stale,
    StillOpen,
    StoreUnavailable,
    Unproven,
    Vanished,
)
from spoold.ledger import Aside, Clearance, Ledger, Proof, ReplacedKey
from spoold.model import HOUSE, Answer, BatchFile, Claim, Identity, State
from spoold.spool import ASIDE, KEPT, Spool, fault_of, is_open_for_writing
from spoold.steps import Steps, Write
from spoold.store import Store

log = structlog.get_logger()

_CHUNK_BYTES = 1 << 20
_PROOF_LASTS_S = 3600.0
_OPEN_AGAIN_S = 15.0
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Rules:
    """When local files may go. Durations in seconds; trusts: go without leases where the kernel has none."""

    deletes: bool
    keep_for_s: float
    min_age_s: float
    grace_s: float
    keep_empty_dirs_for_s: float
    trusts: bool
    doubt_s: float


class Writers(Enum):
    """Who has a file open for writing, as far as the kernel can tell."""

    NONE = "nobody"
    SOME = "somebody"
    UNKNOWN = "the kernel cannot tell"


@dataclass(frozen=True, slots=True)
class Due:
    """Not yet: look again in so many seconds; until then the batch waits for this."""

    in_s: float
    waiting_for: str


class Missing(SpooldError):
    """The bucket does not hold what was proven there: these keys must be put again."""

    def __init__(self, message: str, keys: list[str], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.keys = keys


class Cleaner:
    """Clears the batches of one spool.

    demand_claim: raises ClaimLost unless our claims surely last; asked before every effect. touch: has the watcher look at a
    record: it holds something that nobody may have told of.
    """

    def __init__(
        self, *, spool: Spool, ledger: Ledger, store: Store, rules: Rules, ages: Ages, clock: Clock,
        demand_claim: Callable[[], None], touch: Callable[[str], None] = lambda record: None,
    ) -> None:  # fmt: skip
        self._spool = spool
        self._ledger = ledger
        self._store = store
        self._rules = rules
        self._touch = touch
        self._ages = ages
        self._clock = clock
        self._demand_claim = demand_claim
        self._aside = AsideDirectory(spool)
        self._has_told_no_leases = False
        self._aside_since: dict[str, float] = {}  # name in aside/ → monotonic seconds
        self._doubts = Doubts(rules.doubt_s, clock)

    def clear(self, claim: Claim) -> Steps[Due | None]:
        """Let go of the batch's local files as far as it is time; None when none is left that may ever go.

        Raises Missing if the bucket has lost an object, StoreUnavailable or StoreDenied where that cannot be found out,
        SpoolBroken, ClaimLost.
        """
        batch = claim.batch
        left = [file for file in batch.files if not file.is_gone]
        if not self._rules.deletes:
            for file in left:
                if file.aside_name is not None:
                    self._give_back_ours(claim, file, "local files stay (cleanup.delete: false)")
            if batch.state is not State.STORED:
                return None
            due: Due | None = yield from self._may_go(claim)  # a doubt is to be settled all the same
            return due
        try:
            if batch.state is State.STORED and (due := (yield from self._may_go(claim))):
                return due
        except Missing as lost:
            # Only what lies at its own place is put again; what lies aside would be let go as stored.
            for file in left:
                if file.aside_name is not None:
                    self._give_back_ours(claim, file, str(lost))
            raise
        waits = yield from self._clear_files(claim, [file for file in left if not file.is_marker])
        if not waits:
            waits = yield from self._clear_files(claim, [file for file in left if file.is_marker])
        return min(waits, key=lambda due: due.in_s) if waits else None

    def _may_go(self, claim: Claim) -> Steps[Due | None]:
        """See that what was stored is still there, and is there to stay; where local files stay, only if there is a doubt."""
        now = self._clock.now()
        known: Clearance = yield Write(partial(self._ledger.clearance, claim))
        doubts = known.doubts
        left_s = max(map(self._doubts.left_s, doubts.items()), default=0.0)
        if left_s > 0:
            return Due(left_s, "doubt")
        if not doubts and not self._rules.deletes:
            return None
        stored_at = known.stored_at or now
        if self._rules.deletes and now < stored_at + self._rules.keep_for_s:
            return Due(stored_at + self._rules.keep_for_s - now, "keep_for")
        self._demand_proofs(claim, known.proofs, set(doubts))
        if doubts:
            self._ledger.settle_doubts(claim, doubts, before=max(doubts.values()))
            self._doubts.forget(doubts.items())
        return None

    def _demand_proofs(self, claim: Claim, proofs: Sequence[Proof], doubtful: set[str]) -> None:
        """Renew by HEAD every proof that is older than an hour or was in doubt (rules 5 and 6)."""
        now = self._clock.now()
        lying = {file.digest for file in claim.batch.uploads if not file.is_gone}
        known = {proof.digest for proof in proofs}
        # An object whose local file has gone cannot be put again, so nobody asks for it.
        needed = [proof for proof in proofs if proof.digest in lying]
        old = [p for p in needed if p.key in doubtful or not 0 <= now - p.proven_at < _PROOF_LASTS_S]
        lost = [proof.key for proof in old if not self._is_there(proof)]
        if lost:
            raise Missing(
                f"head {', '.join(lost)}: the bucket does not hold what was stored there",
                lost, hint="it is put again from the local file; find out who else writes or deletes in this bucket",
            )  # fmt: skip
        if lying - known:
            raise ClaimLost(f"clear {claim.batch.record}: a newer version of it is live")
        if old:
            self._ledger.renew_proofs(claim, [proof.key for proof in old])

    def _is_there(self, proof: Proof) -> bool:
        """Compare the ETag that HEAD tells with the one that was proven; if it is another, read the object back.

        Checksums are not compared: rclone 1.75 answers HEAD with the one that the client sent, whatever it stored.
        """
        found = self._store.head(proof.bucket, proof.key)
        if found is None or found.size != proof.size:
            return False
        if found.etag and found.etag in (proof.etag, proof.md5):
            return True
        digests = self._store.digest(proof.bucket, proof.key)
        return digests is not None and digests.sha256 == proof.digest

    # Files, each step for all of them under one commit

    def _clear_files(self, claim: Claim, files: list[BatchFile]) -> Steps[list[Due]]:
        """Take each file one step further; return what has to be waited for."""
        waits = yield from self._look_last(claim, [file for file in files if file.aside_name is not None])
        if claim.batch.state is State.STORED:  # else what still lies in its place is a newer batch's
            waits += yield from self._set_aside(claim, [file for file in files if file.aside_name is None])
        return waits

    def _set_aside(self, claim: Claim, files: list[BatchFile]) -> Steps[list[Due]]:
        """Rename files out of the app's way and look again; they then wait for their grace."""
        waits, ready, foreign = [], [], []
        with self._spool.at_hand():
            for file in files:
                if (young_s := self._rules.min_age_s - self._ages.age_s(file.file.identity)) > 0:
                    if self._spool.identity_of(file.file.path) == file.file.identity:
                        waits.append(Due(young_s, "min_age"))
                    else:
                        foreign.append(file)
                elif (writers := self._is_open(file)) is None:
                    foreign.append(file)  # gone, or a newer version: not ours to touch
                elif writers is Writers.SOME:
                    waits.append(Due(_OPEN_AGAIN_S, "open"))
                else:
                    if writers is Writers.UNKNOWN:  # our own files may have told otherwise: the app's are somebody else's
                        self.tell_no_leases()
                    if writers is Writers.NONE or self._rules.trusts:  # else it stays where it is, and the batch is done
                        ready.append(dataclasses.replace(file, aside_name=aside_name(claim.batch.id, file)))
        if foreign:
            yield Write(partial(self._ledger.let_go, claim, foreign, deleted=False))
            self._touch(claim.batch.record)
        if not ready:
            return waits
        self._demand_claim()
        yield Write(partial(self._ledger.set_aside, claim, ready))
        with self._aside.at_hand():
            return waits + self._take_aside(claim, ready)

    def _take_aside(self, claim: Claim, files: list[BatchFile]) -> list[Due]:
        """Rename files, as the ledger has been told, and look again; return what has to be waited for."""
        waits, faults = [], []
        for file in files:
            self._demand_claim()
            try:
                is_aside = self._aside.take(file)
            except OSError as error:  # of this one: the others go on
                self._ledger.not_aside(file)
                faults.append(fault_of(error, "set aside", file.file.path))
                continue
            if is_aside:
                self._aside_since[str(file.aside_name)] = self._clock.monotonic()
                waits.append(Due(self._rules.grace_s, "grace"))
                if (reason := self._aside.differs(file, trusts=self._rules.trusts)) and not self._give_back_ours(
                    claim, file, reason
                ):
                    waits.pop()
            else:
                self._ledger.not_aside(file)
                waits.append(Due(_LOOK_AGAIN_S, "min_age"))
        if faults:
            raise faults[0]
        return waits

    def tell_no_leases(self) -> None:
        """Say once that the kernel cannot tell who writes, and what follows (contract, `without_leases`)."""
        if self._has_told_no_leases:
            return
        self._has_told_no_leases = True
        follows = "files are let go without asking" if self._rules.trusts else "local files stay after their upload"
        log.warning(
            "leases.unavailable", spool=self._spool.name,
            detail=f"the kernel cannot tell who has a file of this spool open for writing; {follows}",
            hint="run the daemon as the files' owner or with CAP_LEASE, on ext4, xfs, btrfs or tmpfs"
            + ("" if self._rules.trusts else "; or set cleanup.without_leases: trust"),
        )  # fmt: skip

    def _is_open(self, file: BatchFile) -> Writers | None:
        """Say who has a file open for writing; None if it is not there any more."""
        try:
            with self._spool.opened(file.file) as fd:
                is_open = is_open_for_writing(fd)
                return Writers.UNKNOWN if is_open is None else Writers.SOME if is_open else Writers.NONE
        except StillOpen:
            return Writers.SOME
        except (Vanished, Changed):
            return None
        except NoAccess:
            if self._spool.identity_of(file.file.path) == file.file.identity:
                raise
            return None

    def _look_last(self, claim: Claim, files: list[BatchFile]) -> Steps[list[Due]]:
        """Where the grace is over: look once more, then unlink. A file of unknown date waits its grace from now."""
        if not files:
            return []
        with self._aside.at_hand():
            waits, gone = self._unlink(claim, files)
        if gone:
            yield Write(partial(self._ledger.let_go, claim, gone, deleted=True))
        return waits

    def _unlink(self, claim: Claim, files: list[BatchFile]) -> tuple[list[Due], list[BatchFile]]:
        """Return what has to be waited for, and which files are gone."""
        waits, gone = [], []
        for file in files:
            assert file.aside_name is not None, "it lies aside"
            since = self._aside_since.setdefault(file.aside_name, self._clock.monotonic())
            left_s = since + self._rules.grace_s - self._clock.monotonic()
            if left_s > 0:
                waits.append(Due(left_s, "grace"))
                continue
            try:
                if reason := self._aside.differs(file, trusts=self._rules.trusts):
                    waits += filter(None, [self._give_back_ours(claim, file, reason)])
                    continue
                self._demand_claim()
                self._ledger.demand_certain()
                with self._aside.directory() as aside:
                    os.unlink(file.aside_name, dir_fd=aside)
            except (Vanished, FileNotFoundError):
                if self._aside.inode_of(file.aside_name) is not None:  # it was not found once: a network filesystem may say so
                    waits.append(Due(_LOOK_AGAIN_S, "grace"))
                    continue
                if self._spool.identity_of(file.file.path) == file.file.identity:
                    self._ledger.not_aside(file)  # written down, but never renamed
                    waits.append(Due(_LOOK_AGAIN_S, "min_age"))
                    continue
                # Else it was unlinked before a crash, unknown to the ledger.
            self._aside_since.pop(file.aside_name, None)
            gone.append(file)
        return waits, gone

    def _give_back_ours(self, claim: Claim, file: BatchFile, reason: str) -> Due | None:
        """Give back a file of a batch that is being cleared; if its bytes are still those stored, it is tried again later."""
        self._demand_claim()
        still_ours = self._give_back(claim.batch.id, claim.batch.record, file, reason)
        return Due(_OPEN_AGAIN_S, "open") if still_ours else None

    def _give_back(self, batch: int, record: str, file: BatchFile, reason: str) -> bool:
        """Put a file back to its place, or into `kept/` if that is taken; say whether it is still what was stored.

        A newer version takes the place also when it lies aside itself, or is gone: the older one must not follow it up.
        """
        assert file.aside_name is not None, "it lies aside"
        name, path = file.aside_name, file.file.path
        self._aside_since.pop(name, None)
        identity = None
        if self._ledger.has_newer(batch, file):
            self._aside.keep(name)
            reason = f"{reason}; a newer version of it was accepted since, so it lies in {HOUSE}/{KEPT}/{name}"
        elif self._aside.put_back(path, name):
            digest, now = self._aside.digest_of(path) or (None, None)
            identity = now if digest == file.digest else None
        else:
            reason = f"{reason}; its name is taken by a newer file, so it lies in {HOUSE}/{KEPT}/{name}"
        self._ledger.given_back(batch, file, spool=self._spool.name, record=record, reason=reason, still_ours=identity)
        return identity is not None

    # Directories

    def prune(self, claim: Claim) -> Due | None:
        """Remove the directories that the batch's files lay in, once they are empty and old; None when all is done.

        Never the root, nor anything down to the attachment's directory; and a directory that the app made anew is young.
        """
        if not self._rules.deletes:
            return None
        floor = self._spool.layout.floor_of(claim.batch.record)
        paths = {
            "/".join(parts[:depth])
            for parts in (file.file.path.split("/")[:-1] for file in claim.batch.files)
            for depth in range(floor + 1, len(parts) + 1)
        }
        emptied: dict[str, tuple[Identity, float]] = {}
        with self._spool.at_hand():
            waits = [
                wait for path in sorted(paths, key=lambda path: -path.count("/"))
                if (wait := self._prune_one(path, emptied)) is not None
            ]  # fmt: skip
        return Due(min(waits), "dirs") if waits else None

    def _prune_one(self, path: str, emptied: dict[str, tuple[Identity, float]]) -> float | None:
        """Remove one directory if it is empty and old enough; return in how many seconds it may be, or None.

        emptied: directories of which we have just removed others: how we left them, and how old they were before.
        """
        parent, leaf = os.path.split(path)
        try:
            with self._spool.directory(path) as fd:
                status = os.fstat(fd)
                age_s = self._age_of_directory(path, status, emptied)  # also of one that is not empty yet: its age begins
                if os.listdir(fd):
                    return None
            if age_s < self._rules.keep_empty_dirs_for_s:
                return max(0.05, self._rules.keep_empty_dirs_for_s - age_s)
            self._demand_claim()
            with self._spool.directory(parent) as directory:
                now = os.stat(leaf, dir_fd=directory, follow_symlinks=False)
                if not stat.S_ISDIR(now.st_mode) or Identity.of(now) != Identity.of(status):
                    return self._rules.keep_empty_dirs_for_s
                parents_age_s = self._age_of_directory(parent, os.fstat(directory), emptied)
                os.rmdir(leaf, dir_fd=directory)
                emptied[parent] = Identity.of(os.fstat(directory)), parents_age_s
        except (Vanished, FileNotFoundError):  # a network filesystem may say so once
            return None if self._spool.inode_of_directory(path) is None else max(0.05, self._rules.keep_empty_dirs_for_s)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM):
                return None
            raise fault_of(error, "remove", path) from error
        return None

    def _age_of_directory(
        self, path: str, status: os.stat_result, emptied: Mapping[str, tuple[Identity, float]]
    ) -> float:  # fmt: skip
        """Return for how many seconds nobody but us has changed a directory."""
        left, age_s = emptied.get(path, (None, 0.0))
        return age_s if left == Identity.of(status) else self._ages.age_s(Identity.of(status))

    # After a crash

    def recover(self, owner: str, *, lease_s: float) -> None:
        """See to what lies aside since before we started, before the first sweep: let go of what is stored, give back the rest.

        A file is judged by the batch in its name. Records that another daemon is at are left to it.
        """
        try:
            names = self._aside.names()
        except (SpooldError, OSError) as error:
            raise SpoolBroken(f"list {HOUSE}/{ASIDE}: {error}", hint="look at the disk: dmesg, and at who owns it") from error
        for name in names:
            with self._of_this_one_alone("recover", name):
                self._recover(name, owner, lease_s)
        present = set(names)
        for missing in self._ledger.all_aside(self._spool.name):
            name = str(missing.file.aside_name)
            if name in present:
                continue
            with self._of_this_one_alone("look for", name), self._claimed(missing.record_key, owner, lease_s) as is_ours:
                if is_ours and self._spool.identity_of(missing.file.file.path) == missing.file.file.identity:
                    self._ledger.not_aside(missing.file)  # written down, but never renamed

    @contextlib.contextmanager
    def _of_this_one_alone(self, tried: str, name: str) -> Iterator[None]:
        """Let a fault of one file be reported, so that the others need not wait for it, nor the whole spool."""
        try:
            yield
        except (Stale, Refused, OSError) as error:
            fault = fault_of(error, tried, name) if isinstance(error, OSError) else error
            if isinstance(fault, Halt):
                raise fault from error
            self._report_aside(name, f"{fault}; it stays")

    def _recover(self, name: str, owner: str, lease_s: float) -> None:
        if (parsed := parse_aside_name(name)) is None:
            self._report_aside(name, "its name is none of ours; it stays")
            return
        batch, number, path = parsed
        known = self._ledger.aside_file(batch, number)
        if known is None or not self._is_the_same(known, name, path):
            self._give_back_unknown(name, path)
            return
        with self._claimed(known.record_key, owner, lease_s) as is_ours:
            if is_ours:
                self._recover_one(known, name)

    def _is_the_same(self, known: Aside, name: str, path: str | None) -> bool:
        """Say whether the ledger means this file by batch and number: one that was lost may have counted to them too."""
        if path is not None:
            return path == known.file.file.path
        return self._aside.inode_of(name) == known.file.file.identity.ino

    def _report_aside(self, name: str, detail: str) -> None:
        log.warning("aside.unknown", spool=self._spool.name, path=f"{HOUSE}/{ASIDE}/{_printable(name)}", detail=detail)

    def _recover_one(self, known: Aside, name: str) -> None:
        file = dataclasses.replace(known.file, aside_name=name)
        try:
            reason = self._aside.differs(file, trusts=self._rules.trusts) if known.was_stored else "its batch was never stored"
        except Vanished:
            return
        if reason is None:
            self._ledger.lies_aside(known.batch, file.id, name)
        else:
            self._give_back(known.batch, known.record, file, reason)

    def _give_back_unknown(self, name: str, path: str | None) -> None:
        """The ledger does not know this file; its name tells where it lay."""
        if path is None:
            self._aside.keep(name)  # else it would be taken for another, once the ledger has counted to its batch
            self._report_aside(name, f"the ledger does not know it, nor where it lay; it is in {HOUSE}/{KEPT} now")
            return
        back = self._aside.put_back(path, name)
        log.warning("file.given_back", spool=self._spool.name, path=path if back else f"{HOUSE}/{KEPT}/{name}",
                    detail="the ledger does not know it")  # fmt: skip

    @contextlib.contextmanager
    def _claimed(self, record_key: int, owner: str, lease_s: float) -> Iterator[bool]:
        fence = self._ledger.claim_record(record_key, owner, lease_s=lease_s)
        try:
            yield fence is not None
        finally:
            if fence is not None:
                self._ledger.release_record(record_key, owner, fence)


class Remover:
    """Deletes keys that a newer original replaced, from the ledger's list, never by listing a bucket (rule 7).

    stores: spool → store. limits: spool → deletions an hour. doubt_s: how long an unanswered PUT may still land, which
    would bring a deleted key back. demand_claim: as the Cleaner's.
    """

    def __init__(
        self, *, ledger: Ledger, stores: dict[str, Store], limits: dict[str, int], owner: str, doubt_s: float,
        clock: Clock, demand_claim: Callable[[], None],
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._stores = stores
        self._limits = limits
        self._doubts = Doubts(doubt_s, clock)
        self._owner = owner
        self._demand_claim = demand_claim
        self._blown: set[str] = set()

    def remove_due(self, *, lease_s: float, held: set[str]) -> int:
        """Delete what is due, as far as the fuse allows, and return how many keys went.

        held: spools whose destination refuses; theirs wait.
        """
        removed = 0
        for spool in sorted(set(self._stores) - held):
            due = self._ledger.replaced_due([spool])
            keys = [key for key in due if key.doubt_at is None or self._doubts.left_s((key.key, key.doubt_at)) <= 0]
            room = self._limits[spool] - self._ledger.deletes_in_last_hour(spool)
            if room >= len(keys):
                self._blown.discard(spool)
            elif spool not in self._blown:
                self._blown.add(spool)
                self._ledger.deletes_held_back(spool, waiting=len(keys) - max(0, room), limit=self._limits[spool])
            for key in keys[: max(0, room)]:
                removed += self._remove(key, lease_s)
        return removed

    def _remove(self, key: ReplacedKey, lease_s: float) -> bool:
        fence = self._ledger.claim_record(key.record_key, self._owner, lease_s=lease_s)
        if fence is None:
            return False
        try:
            intent = self._ledger.intend_delete(key)
            if intent is None:
                return False
            try:
                self._demand_claim()
                self._stores[key.spool].delete(key.bucket, key.key)
            except (StoreUnavailable, Unproven) as why:
                is_unsent = getattr(why, "never_sent", False)
                self._ledger.deleted(key, intent, Answer.REFUSED if is_unsent else Answer.DOUBT)
                return False
            except SpooldError as why:
                self._ledger.deleted(key, intent, Answer.REFUSED)
                log.warning("delete.refused", spool=key.spool, record=key.record, key=key.key, error=why.code,
                            detail=str(why), hint=why.hint)  # fmt: skip
                return False
            self._ledger.deleted(key, intent, Answer.CONFIRMED)
            if key.doubt_at is not None:
                self._doubts.forget([(key.key, key.doubt_at)])
            return True
        finally:
            self._ledger.release_record(key.record_key, self._owner, fence)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
