"""Answer what people ask of a spool: why is this still here, is it proven yet, what would go where. Reads only.

Joins the two truths, the disk and the ledger; works without a ledger, where no daemon has run yet.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spoold import completeness, config
from spoold.clock import Ages, Clock, iso
from spoold.errors import BadPath, SpooldError
from spoold.ledger import Known, Ledger
from spoold.looker import by_basename, may_be_cut, reasons_of, verdicts_of, with_veto
from spoold.model import HOUSE, Identity, Oddity, Snapshot, SpooledFile
from spoold.spool import ASIDE, KEPT, Spool, is_open_for_writing, open_regular

NOTHING_KNOWN = Known({}, None, False, None, frozenset(), False)

_WAITING_FOR = {
    "": "is about to be let go",
    "min_age": "is too young to be set aside (cleanup.min_age)",
    "grace": "is set aside and waits for its last look (cleanup.grace)",
    "keep_for": "is kept for a while after its upload (cleanup.keep_for)",
    "open": "is open for writing by some process (find it with: fuser -v)",
    "doubt": "is kept because an older PUT of the same key was never answered and may still land (upload.doubt)",
    "retry": "could not be let go yet",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What a run would do with one file: put it to `key`, or leave it (key None) for a reason."""

    spool: str
    path: str
    bucket: str
    key: str | None
    reason: str


class Explainer:
    """Explains one spool.

    settings: of this spool. ledger: None where there is none yet.
    """

    def __init__(self, *, settings: config.Spool, ledger: Ledger | None, clock: Clock) -> None:
        self._settings = settings
        self._ledger = ledger
        self._clock = clock
        self._rules = completeness.Rules(settings.complete.styles_for, settings.complete.settle, settings.complete.marker)
        self.spool = Spool(name=settings.name, root=settings.root, layout=settings.layout(), marker=settings.complete.marker)

    @property
    def has_no_ledger(self) -> bool:
        return self._ledger is None

    # Which path is meant

    def relative(self, path: str) -> str | None:
        """Return `path` below this spool's root, or None if it leads elsewhere. A relative one counts from the root."""
        if not os.path.isabs(path):
            below = os.path.normpath(path)
            return None if below.split("/")[0] == ".." else "" if below == "." else below
        for root in (str(self._settings.root), str(self.spool.root)):
            absolute = os.path.normpath(path)
            if absolute == os.path.normpath(root) or absolute.startswith(os.path.normpath(root) + "/"):
                below = os.path.relpath(absolute, os.path.normpath(root))
                return "" if below == "." else below
        return None

    def knows(self, path: str) -> bool:
        """Say whether the disk or the ledger has anything at this path below the root."""
        if os.path.lexists(self.spool.root / path):
            return True
        if self._ledger is None:
            return False
        record = self._record_of(path)
        return bool(self._ledger.record_status(record, spool=self.spool.name)) if record else False

    def _record_of(self, path: str) -> str | None:
        if record := self.spool.layout.record_of(path):
            return record
        touched = self.spool.layout.records_touched_by(path, is_directory=True)
        if self._ledger is not None:
            known = [record for record in touched if self._ledger.record_status(record, spool=self.spool.name)]
            touched = known or touched
        return touched[0] if touched else None

    # why

    def why(self, path: str) -> str:
        """Say in one true sentence why what lies at `path` is still there, or where it went, and what would change it."""
        if not path:
            return f"{self.spool.root} is the root of spool {self.spool.name}: it always stays; ask about what lies in it."
        if path == HOUSE or path.startswith(HOUSE + "/"):
            return self._why_in_house(path)
        status = self._lstat(path)
        if status is not None and (odd := _odd(status)):
            return f"{path} stays: {odd}; spoold never opens, follows or removes such a thing."
        if status is not None and (link := self._link_above(path)):
            return f"{path} stays: {link} is a symbolic link; spoold never opens, follows or removes such a thing."
        place = self.spool.layout.parse(path)
        record = self._record_of(path)
        is_file = status is not None and stat.S_ISREG(status.st_mode)
        is_marker = self.spool.marker is not None and path == f"{record}/{self.spool.marker}"
        if record is None or (is_file and place is None and not is_marker):
            return self._why_foreign(path, status)
        if is_file and place is not None:
            identity = Identity.of(status) if status is not None else None
            assert identity is not None, "a regular file was looked at"
            file = SpooledFile(path, place.style, place.basename, place.filename, identity)
            if refusal := self.spool.refusal(file):
                return f"{path} stays: {refusal}; rename it, or mend `key` of spool {self.spool.name}."
        return self._why_record(path, record, is_there=status is not None)

    def _why_foreign(self, path: str, status: os.stat_result | None) -> str:
        layout = f"the layout `{self._settings.path}` of spool {self.spool.name}"
        if status is None:
            return f"{path} is not there, and never went anywhere: it does not fit {layout}."
        if stat.S_ISDIR(status.st_mode) and self.spool.layout.may_lead_to_record(path):
            return f"{path} is a directory that records lie in: it stays; ask about one of them."
        return f"{path} stays: it does not fit {layout}, so it is none of spoold's business."

    def _why_record(self, path: str, record: str, *, is_there: bool) -> str:
        rows = self._ledger.record_status(record, spool=self.spool.name) if self._ledger is not None else []
        snapshot = self.spool.look(record)
        if not rows or self._ledger is None:
            if not snapshot.files:
                return f"{path} is not in spool {self.spool.name}, and its ledger has never heard of record {record}."
            return self._why_new(path, snapshot, NOTHING_KNOWN)
        known = self._ledger.known(self.spool.name, record)
        current = self._ledger.current(record, spool=self.spool.name)
        row = rows[0]
        unknown = [file for file in snapshot.files if known.files.get(file.path) != file.identity]
        mine = [file for file in unknown if file.path == path or path == record or file.path.startswith(f"{path}/")]
        if mine:
            return self._why_new(path, snapshot, known)
        if known.is_elsewhere and not snapshot.files and row["state"] not in ("uploaded", "done"):
            return (
                f"{path} is not here now: it was last seen in another directory that was {self._settings.root}, and nothing of "
                f"it was deleted; it goes up as soon as that one is back: is a filesystem not mounted, or was it moved?"
            )
        has_batch = row["state"] not in ("receiving", "stalled", "gone")  # else nobody wrote down what lay there
        asks = not is_there and path != record and has_batch
        if asks and not self._ledger.knows_path(path, record_path=record, spool=self.spool.name):
            return f"{path} is not in spool {self.spool.name}, and its ledger has never heard of it."
        return self._why_known(path, record, row, current, is_there=is_there)

    def _why_new(self, path: str, snapshot: Snapshot, known: Known) -> str:
        """Why files that no batch answers for are still here: judged anew, as the daemon would."""
        waiting = []
        for verdict in self._judge(snapshot, known):
            if verdict.refused:
                return f"{path} stays: {verdict.reason}."
            if not verdict.is_complete:
                waiting.append(verdict)
        if not waiting:
            return (
                f"{path} is complete and not accepted yet: a running daemon does so within moments, "
                f"at the latest at its next sweep (every {self._settings.sweep_every:g} s)."
            )
        return (
            f"{path} waits because record {snapshot.record} is not complete ({reasons_of(waiting)}); it goes up as soon as "
            f"that changes, or as it lies with: spoold retry --as-is {snapshot.record}"
        )

    def _why_known(self, path: str, record: str, row: dict[str, Any], current: dict[str, Any], *, is_there: bool) -> str:
        assert self._ledger is not None, "known is what a ledger knows"
        state = row["state"]
        is_another = state in ("receiving", "stalled") and current.get("state") in ("pending", "dead")
        if is_another:  # it is another basename of the record that is not complete
            is_deferred = current["next_attempt_at"] is not None
            state = "dead" if current["state"] == "dead" else "retrying" if is_deferred else "queued"
        if state in ("receiving", "stalled") and current.get("state") is None:
            return (
                f"{path} waits because record {record} is not complete ({current['reason']}); it goes up as soon as that "
                f"changes, or as it lies with: spoold retry --as-is {record}"
            )
        if state == "uploading":
            return f"{path} is being uploaded right now."
        if state in ("queued", "retrying"):
            if held := self._ledger.held().get(self.spool.name):
                return (
                    f"{path} waits because spool {self.spool.name} is held since {held.since} ({held.error}); it goes on "
                    f"by itself when that is mended: {held.hint or 'look at the destination'}."
                )
            if state == "queued":
                return f"{path} is complete and waits for its turn."
            return (
                f"{path} waits for another attempt at {row['next_attempt_at']}, because the last of {row['attempts']} "
                f"did not succeed ({current['error']}); to try now: spoold retry {record}"
            )
        if state == "dead":
            hint = f"{current['hint']}; " if current.get("hint") else ""
            return f"{path} stays because its upload was given up ({current['error']}); {hint}then: spoold retry {record}"
        if state == "gone":
            return f"{path} is gone: the app removed it before it was uploaded."
        return self._why_uploaded(path, record, current, is_there=is_there)

    def _why_uploaded(self, path: str, record: str, current: dict[str, Any], *, is_there: bool) -> str:
        assert self._ledger is not None, "known is what a ledger knows"
        went = [place for place in self._ledger.objects_at(path, spool=self.spool.name) if place["key"]]
        objects = self._ledger.record_objects(record, spool=self.spool.name)
        where = (
            f"s3://{went[0]['bucket']}/{went[0]['key']}" if went
            else f"s3://{self._settings.bucket}/ ({len(objects)} object{'s' if len(objects) != 1 else ''})"
        )  # fmt: skip
        if not went:
            path = path if path == record else f"{path} of record {record}"
        is_aside = bool(went) and went[0]["aside_name"] is not None
        if not is_there and not is_aside and (went or current.get("state") == "done"):
            files = "local file was" if went else "local files were"
            return f"{path} went to {where}, proven at {current.get('stored_at')}, and its {files} let go."
        if current.get("state") == "done":
            if not went:
                return f"{path} went to {where}, proven at {current.get('stored_at')}; {self._why_directory(current)}."
            if not self._settings.cleanup.delete:
                because = "cleanup.delete is false"
            elif self._can_tell_writers(path):
                because = "it was to stay when it was uploaded (cleanup.delete or without_leases); to have it let go: touch it"
            else:
                because = "the kernel cannot tell here who has it open for writing (cleanup.without_leases: keep)"
            return f"{path} is in {where}, proven at {current['stored_at']}, and stays here because {because}."
        waits = _WAITING_FOR.get(current.get("waiting_for") or "", "is about to be let go")
        due = current.get("due_at")
        again = f"; the next look is at {iso(due)}" if due and due > self._clock.now() else ""
        error = f" ({current['error']})" if current.get("error") else ""
        return f"{path} is in {where}, proven at {current.get('stored_at')}, and {waits}{error}{again}."

    def _can_tell_writers(self, path: str) -> bool:
        parent, name = os.path.split(path)
        try:
            with self.spool.directory(parent) as directory:
                fd = open_regular(directory, name, path)
        except SpooldError:
            return False
        try:
            return is_open_for_writing(fd) is not None
        finally:
            os.close(fd)

    def _why_directory(self, current: dict[str, Any]) -> str:
        """Say why a directory is still there whose record is done."""
        if not self._settings.cleanup.delete:
            return "its local files stay because cleanup.delete is false"
        if current.get("waiting_for") == "dirs":
            age_s = self._settings.cleanup.keep_empty_dirs_for
            return f"its directory goes once it is empty and {age_s:g} s old (cleanup.keep_empty_dirs_for)"
        return "its directory stays because something lies in it that spoold did not upload, or may not remove"

    def _why_in_house(self, path: str) -> str:
        if path.startswith(f"{HOUSE}/{KEPT}/"):
            return f"{path} came back to a name that a newer file had taken: compare the two, then move or remove it yourself."
        if path.startswith(f"{HOUSE}/{ASIDE}/"):
            return f"{path} is set aside and waits for its last look (cleanup.grace); then it is let go or given back."
        return f"{path} is spoold's own."

    def _link_above(self, path: str) -> str | None:
        parts = path.split("/")
        above = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((each for each in above if os.path.islink(self.spool.root / each)), None)

    def _lstat(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(self.spool.root / path)
        except OSError:
            return None

    # wait

    def standing(self, record: str) -> str:
        """Return "proven", "dead", "gone", or what is still missing: every file on disk is compared with the ledger first.

        record: or the path of one of its files.
        """
        record = self.spool.layout.record_of(record) or record
        snapshot = self.spool.look(record)
        if self._ledger is None:
            return "no daemon has run with this configuration yet"
        known = self._ledger.known(self.spool.name, record)
        rows = self._ledger.record_status(record, spool=self.spool.name)
        if any(known.files.get(file.path) != file.identity for file in snapshot.files):
            current = self._ledger.current(record, spool=self.spool.name)
            if current.get("sighted") in ("receiving", "stalled"):
                return f"it is not complete ({current['reason']})"
            return "files lie there that the daemon has not accepted yet"
        if not rows:
            return "nobody has seen it yet"
        state = rows[0]["state"]
        if state in ("dead", "gone"):
            return str(state)
        if not rows[0]["processing"]:
            return "proven"
        return f"it is {state}" + (f" ({rows[0]['error']})" if rows[0]["error"] else "")

    # dry run

    def plan(self) -> Iterator[Planned]:
        """Yield what a run would do with each file, in the order of the tree. Touches nothing.

        Raises SpoolBroken if the root cannot be read.
        """
        self.spool.root_identity()
        seen: set[str] = set()
        odd: set[str] = set()  # what is odd in a record is met on the way to it, and again in it
        for found in self.spool.records():
            if isinstance(found, Oddity):
                yield from self._left_once(found, odd)
            elif found not in seen:
                seen.add(found)
                yield from self._plan_record(found, odd)

    def _plan_record(self, record: str, odd: set[str]) -> Iterator[Planned]:
        snapshot = self.spool.look(record)
        known = self._ledger.known(self.spool.name, record) if self._ledger is not None else NOTHING_KNOWN
        verdicts = {verdict.basename: verdict for verdict in self._judge(snapshot, known)}
        for oddity in snapshot.oddities:
            yield from self._left_once(oddity, odd)
        for file in snapshot.files:
            verdict = verdicts.get(file.basename)
            if verdict is None:
                yield self._left(file.path, f"the ledger has it: {known.state}")
            elif not verdict.is_complete:
                yield self._left(file.path, verdict.reason)
            else:
                yield Planned(self.spool.name, file.path, self._settings.bucket, self._key_of(file), "")

    def _judge(self, snapshot: Snapshot, known: Known) -> list[Any]:
        def age_s(identity: Identity) -> float:
            return max(0.0, self._clock.now() - identity.ctime_ns / 1e9)

        verdicts = verdicts_of(self.spool, self._rules, snapshot, known, age_s=age_s)
        files_of = by_basename(snapshot)
        images, ages = self._settings.complete.images, Ages(self._clock)
        in_doubt = {file.path for file in snapshot.files if may_be_cut(file, known, ages)}
        return [with_veto(self.spool, images, files_of[verdict.basename], verdict, in_doubt=in_doubt) for verdict in verdicts]

    def _key_of(self, file: SpooledFile) -> str | None:
        place = self.spool.layout.parse(file.path)
        assert place is not None, "only what fits the layout is in a snapshot"
        try:
            if self.spool.layout.needs_fingerprint:
                return self.spool.layout.key(place, fingerprint="0" * 32).replace("0" * 32, ":fingerprint")
            return self.spool.layout.key(place)
        except BadPath:
            return None

    def _left_once(self, oddity: Oddity, odd: set[str]) -> Iterator[Planned]:
        if oddity.path not in odd:
            odd.add(oddity.path)
            yield self._left(oddity.path, oddity.reason)

    def _left(self, path: str, reason: str) -> Planned:
        return Planned(self.spool.name, path, self._settings.bucket, None, reason)


class NoSpoolHasIt(SpooldError):
    """A path that lies in none of the spools: it is none of spoold's business."""


def find(explainers: list[Explainer], path: str) -> tuple[Explainer, str]:
    """Return the spool that `path` is about, and the path below its root.

    Raises NoSpoolHasIt, or SpooldError if more than one has it.
    """
    if os.path.normpath(path).split("/")[0] in (".", ".."):
        path = os.path.abspath(path)  # nobody means the root by that, wherever they are
    candidates = [(explainer, relative) for explainer in explainers if (relative := explainer.relative(path)) is not None]
    found = [(explainer, relative) for explainer, relative in candidates if explainer.knows(relative)]
    if not found and not os.path.isabs(path):
        below_here = os.path.abspath(path)
        found = [
            (explainer, relative)
            for explainer in explainers
            if (relative := explainer.relative(below_here)) is not None and explainer.knows(relative)
        ]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        names = ", ".join(explainer.spool.name for explainer, _ in found)
        raise SpooldError(f"{path}: spools {names} have it", hint="say which with --spool NAME")
    if len(candidates) == 1:
        return candidates[0]
    roots = ", ".join(f"{explainer.spool.name} at {explainer.spool.root}" for explainer in explainers)
    raise NoSpoolHasIt(f"{path}: no spool has it", hint=f"the spools are {roots}")


def _odd(status: os.stat_result) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return None
    return "it is a special file (FIFO, socket or device)"
