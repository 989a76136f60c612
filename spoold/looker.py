"""Look at one record, decide what is complete, and tell the ledger: the one place where files become batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

import structlog

from spoold import container
from spoold.clock import Ages
from spoold.completeness import Rules, judge
from spoold.errors import Changed, Refused, SpoolBroken, StillOpen, Vanished
from spoold.ledger import Known, Ledger
from spoold.model import Identity, Oddity, Snapshot, SpooledFile, State, Verdict, fingerprint
from spoold.spool import Spool, is_open_for_writing
from spoold.steps import Steps, Write

log = structlog.get_logger()

_MAX_BACK_OFF_S = 30.0
_LOOK_AGAIN_S = 1.0
_REMEMBERED_ODDITIES = 100_000
_MOST_REASONS = 20
UNDECODABLE = "an image in it does not decode"


@dataclass(frozen=True, slots=True)
class Next:
    """When to look at a record again: in so many seconds, or never unless something happens (None).

    is_settling: it only waits for quiet; a run that ends when nothing is left waits for that.
    """

    in_s: float | None = None
    is_settling: bool = False


class Looker:
    """Looks at records of one spool.

    images: "ends" or "decode": a container must reach its end; "none": nobody looks. within_s: from then on an incomplete
    record is stalled. on_offer: called when there is something new to upload.
    """

    def __init__(
        self, *, spool: Spool, ledger: Ledger, rules: Rules, images: str, within_s: float, ages: Ages,
        on_offer: Callable[[], None],
    ) -> None:  # fmt: skip
        self._spool = spool
        self._ledger = ledger
        self._rules = rules
        self._images = images
        self._within_s = within_s
        self._ages = ages
        self._on_offer = on_offer
        self.root: tuple[int, int] | None = None
        """The root's identity when it was entered: absence anywhere else says nothing."""
        self._reported: set[str] = set()
        self._reporting = threading.Lock()

    def look(self, record: str) -> Steps[Next]:
        """Look at a record, offer what is complete, write down what is not, and say when to look again.

        Raises SpoolBroken if the root is gone, and LedgerUnavailable.
        """
        name = self._spool.name
        known: Known = yield Write(partial(self._ledger.known, name, record))
        snapshot = self._spool.look(record)
        for oddity in snapshot.oddities:
            self.report(oddity)
        if known.is_elsewhere and snapshot.files:
            yield Write(partial(self._ledger.met, name, record))
        if all(known.files.get(file.path) == file.identity for file in snapshot.files):
            if snapshot.hides and not snapshot.files:
                return Next()  # what cannot be looked at is not gone
            if not snapshot.files and known.is_elsewhere:
                return Next()  # nor is what lies in another directory that was the root
            if not snapshot.files and self.root not in (None, self._spool.root_identity()):
                return Next(_LOOK_AGAIN_S)  # this is another directory, and the watcher is about to find out
            unfinished = known.state in (State.PENDING, State.DEAD)
            if known.sighted in ("receiving", "stalled") or (unfinished and not snapshot.files):
                yield Write(partial(self._ledger.nothing_waits, name, record, is_empty=not snapshot.files))
            return Next()
        judged = verdicts_of(self._spool, self._rules, snapshot, known, age_s=self._ages.age_s)
        files_of = by_basename(snapshot)
        in_doubt = {file.path for file in snapshot.files if may_be_cut(file, known, self._ages)}
        with self._spool.at_hand():
            verdicts = [
                with_veto(self._spool, self._images, files_of[verdict.basename], verdict, in_doubt=in_doubt, as_is=known.as_is)
                for verdict in judged
            ]
        chosen = {verdict.basename for verdict in verdicts if verdict.is_complete}
        refused = {verdict.basename for verdict in verdicts if verdict.refused}
        if refused >= {file.basename for file in snapshot.files}:
            # What no key can be made for goes to its grave alone: a batch is dead as a whole, with all that is in it.
            chosen = refused
        files = self._batch_files(snapshot, chosen, known)
        waiting = [verdict for verdict in verdicts if verdict.basename not in chosen]
        if chosen:
            deciders = {str(verdict.decided_by) for verdict in verdicts if verdict.basename in chosen}
            decided_by = "refused" if chosen == refused else ",".join(sorted(deciders))
            if known.sighted in (None, "gone"):  # what is new is told first, also where nothing has to be waited for
                see = partial(self._ledger.see, name, snapshot, files, state="receiving", reason="it is complete")
                yield Write(see)
            offer = partial(self._ledger.offer, name, snapshot, files, decided_by=decided_by, is_all=not waiting)
            if (yield Write(offer)):
                self._on_offer()
        if not waiting:
            return Next()
        again: Next = yield from self._wait_for(snapshot, waiting, files_of)
        return again

    def report(self, oddity: Oddity) -> None:
        """Say once that a path is none of our business, and why."""
        with self._reporting:
            if oddity.path in self._reported or len(self._reported) >= _REMEMBERED_ODDITIES:
                return
            self._reported.add(oddity.path)
        path = oddity.path.encode("utf-8", "backslashreplace").decode()
        log.warning("path.ignored", spool=self._spool.name, path=path, detail=oddity.reason)

    def _batch_files(self, snapshot: Snapshot, chosen: set[str], known: Known) -> list[SpooledFile]:
        """All files of the chosen basenames, and those that the batch which gives way answered for and that have a key."""
        return [
            file for file in snapshot.files
            if file.basename in chosen or (known.files.get(file.path) == file.identity and not self._spool.refusal(file))
        ]  # fmt: skip

    def _wait_for(
        self, snapshot: Snapshot, waiting: list[Verdict], files_of: dict[str, list[SpooledFile]]
    ) -> Steps[Next]:  # fmt: skip
        files = [file for verdict in waiting for file in files_of[verdict.basename]]
        everything = snapshot.files if snapshot.marker is None else (*snapshot.files, snapshot.marker)
        age_s = min(self._ages.age_s(file.identity) for file in everything)
        is_stalled = age_s >= self._within_s or all(verdict.refused or verdict.vetoed_by == "power" for verdict in waiting)
        is_settling = any(verdict.vetoed_by == "quiet" for verdict in waiting)
        # How long it has been quiet changes with every look: no news for the ledger.
        reasons = reasons_of(verdict for verdict in waiting if verdict.vetoed_by != "quiet")
        see = partial(
            self._ledger.see, self._spool.name, snapshot, files, state="stalled" if is_stalled else "receiving",
            reason=reasons or "it is still changing",
        )  # fmt: skip
        yield Write(see)
        if is_settling:
            return Next(max(0.01, self._rules.settle_s - age_s), is_settling=True)
        if any(verdict.vetoed_by for verdict in waiting):
            return Next(min(_MAX_BACK_OFF_S, max(self._rules.settle_s, 0.2, age_s / 2)))
        return Next(None if is_stalled else max(0.01, self._within_s - age_s))


def verdicts_of(
    spool: Spool, rules: Rules, snapshot: Snapshot, known: Known, *, age_s: Callable[[Identity], float]
) -> list[Verdict]:
    """Return the verdicts that need no file to be opened; a basename with a file that can have no key is refused.

    So is what was found not to decode: it is vetoed for as long as it stays as it is.
    """
    verdicts = judge(snapshot, rules, known=known.files, has_original=known.has_original, age_s=age_s, as_is=known.as_is)
    files_of = by_basename(snapshot)
    refusals = {
        verdict.basename: next((why for file in files_of[verdict.basename] if (why := spool.refusal(file))), None)
        for verdict in verdicts
    }
    verdicts = [
        verdict if (reason := refusals[verdict.basename]) is None else replace(verdict, refused=True, reason=reason)
        for verdict in verdicts
    ]
    return [
        replace(verdict, vetoed_by="images", reason=UNDECODABLE)
        if verdict.is_complete and known.vetoed and fingerprint(files_of[verdict.basename]) in known.vetoed
        else verdict
        for verdict in verdicts
    ]


def may_be_cut(file: SpooledFile, known: Known, ages: Ages) -> bool:
    """Say whether a power cut may have taken bytes of a file: it is from before, and the ledger does not know it so.

    A device can have another number after a boot.
    """
    before = known.files.get(file.path)
    is_as_before = before is not None and replace(before, dev=file.identity.dev) == file.identity
    return not is_as_before and ages.predates_boot(file.identity)


def with_veto(
    spool: Spool,
    images: str,
    files: Iterable[SpooledFile],
    verdict: Verdict,
    *,
    in_doubt: Collection[str] = (),
    as_is: bool = False,
) -> Verdict:  # fmt: skip
    """Open the files of a basename that would be complete: is each whole, does nobody write? Return what holds then.

    in_doubt: paths of files of which a power cut may have taken bytes.
    """
    if not verdict.is_complete:
        return verdict
    for file in files:
        veto: tuple[str, str] | None = None
        try:
            with spool.opened(file) as fd:
                if file.path in in_doubt and not as_is and (why := container.cut_off(fd)):
                    veto = "power", f"{file.style}/{file.filename}: {why}, since before the boot; a power cut leaves such files"
                elif images != "none" and not as_is and (why := container.unfinished(fd, file.filename)):
                    veto = "images", f"{file.style}/{file.filename}: {why}"
                elif is_open_for_writing(fd):
                    veto = "lease", f"{file.style}/{file.filename} is open for writing"
        except (Changed, Vanished) as gone:
            veto = "quiet", str(gone)
        except (Refused, SpoolBroken, StillOpen) as why_not:
            veto = "lease", str(why_not)
        except OSError as error:  # one that cannot be read is not in the way of the others
            veto = "lease", f"{file.style}/{file.filename}: {error.strerror}"
        if veto is not None:
            return replace(verdict, vetoed_by=veto[0], reason=veto[1])
    return verdict


def by_basename(snapshot: Snapshot) -> dict[str, list[SpooledFile]]:
    """Return a record's files by what groups them; a record may hold thousands."""
    groups: dict[str, list[SpooledFile]] = {}
    for file in snapshot.files:
        groups.setdefault(file.basename, []).append(file)
    return groups


def reasons_of(verdicts: Iterable[Verdict]) -> str:
    """Return why these are not complete, for a person: of very many, the first few."""
    reasons = [f"{verdict.basename}: {verdict.reason}" for verdict in verdicts]
    more = len(reasons) - _MOST_REASONS
    return "; ".join([*reasons[:_MOST_REASONS], *([f"and {more} more"] if more > 0 else [])])
