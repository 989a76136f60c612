"""Decide which basenames of a record are complete (contract, section 6, rules 1 to 4). Data in, decision out; no I/O.

Marker and styles decide, each where it is configured; where neither is, quiet does. Quiet is also a veto that always
applies; the other two vetoes, image ends and leases, need the files and are the looker's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

from spoold.model import ORIGINAL, Identity, Snapshot, SpooledFile, Verdict


@dataclass(frozen=True, slots=True)
class Rules:
    """What makes a record of one spool complete.

    styles_for: what the app itself writes for an attachment, or None where that is not said; `original` is implied.
    settle_s: no ctime in the record may be younger. marker: name of the declaring file, or None.
    """

    styles_for: Callable[[str], tuple[str, ...] | None]
    settle_s: float
    marker: str | None = None


def judge(
    snapshot: Snapshot,
    rules: Rules,
    *,
    known: Mapping[str, Identity],
    has_original: bool,
    age_s: Callable[[Identity], float],
    as_is: bool = False,
) -> list[Verdict]:
    """Return a verdict for each basename that has a file which `known` does not answer for yet, in order of names.

    known: path → identity of what the record's current batch answers for. has_original: one is live in the bucket.
    age_s: how old an identity may be said to be; asked for every file, so that each is seen from now on.
    as_is: a person wants it taken as it lies; only writers and quiet still hold it back.
    """
    everything = snapshot.files if snapshot.marker is None else (*snapshot.files, snapshot.marker)
    youngest_s = min((age_s(file.identity) for file in everything), default=0.0)
    newest_ns = max((file.identity.ctime_ns for file in snapshot.files), default=0)
    verdicts = []
    by_basename = sorted(snapshot.files, key=lambda file: file.basename)
    for basename, group in groupby(by_basename, key=lambda file: file.basename):
        files = list(group)
        if all(known.get(file.path) == file.identity for file in files):
            continue
        decided_by, reason = ("as-is", "") if as_is else _decide(snapshot, files, rules, has_original, newest_ns)
        vetoed_by = None
        if decided_by is not None and youngest_s < rules.settle_s:
            vetoed_by, reason = "quiet", f"something in it changed {youngest_s:.1f} s ago, less than `settle`"
        verdicts.append(Verdict(basename, decided_by, vetoed_by, reason))
    return verdicts


def _decide(
    snapshot: Snapshot, files: list[SpooledFile], rules: Rules, has_original: bool, newest_ns: int
) -> tuple[str | None, str]:
    """Say who decides that these files of one basename are all there are, or None and what is missing."""
    styles = rules.styles_for(snapshot.attachment)
    present = {file.style for file in files}
    if rules.marker is not None:
        if snapshot.marker is None:
            return None, f"its marker {rules.marker} is not there"
        if newest_ns > snapshot.marker.identity.ctime_ns:
            return None, f"a file is newer than its marker {rules.marker}"
    if styles is not None:
        if ORIGINAL not in present:
            if not has_original:
                return None, "it has no original, here or in the bucket"
            # A style made again later: it joins its live record, quiet decides.
            return "marker" if rules.marker is not None else "quiet", ""
        if missing := sorted(set(styles) - present):
            return None, f"style{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing"
    if rules.marker is not None:
        return "marker", ""
    return ("styles", "") if styles is not None else ("quiet", "")
