"""What can go wrong, sorted by what the daemon does about it.

Four families and one outsider: Transient (later again), Refused (a person must look), Halt (hold the spool), Stale (the
world moved on, look again), and ConfigError (do not start). Only `pipeline.walk` turns them into states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class SpooldError(Exception):
    """A fault that spoold knows: what was tried on what and what came back, and what a person can do.

    hint: one clause for a human, or "" where nothing helps but waiting.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def code(self) -> str:
        """The stable name that stands in `error_code` and in logs."""
        return type(self).__name__


class Transient(SpooldError):
    """Later again; it costs this item an attempt."""


class StoreUnavailable(Transient):
    """5xx, SlowDown, timeout, reset. The request may have been carried out all the same, unless `never_sent`.

    retry_after_s: what the server asked for, or None. is_everywhere: no key and no content can be to blame.
    """

    def __init__(
        self, message: str, *, hint: str = "", retry_after_s: float | None = None, never_sent: bool = False,
        is_everywhere: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        self.never_sent = never_sent
        self.is_everywhere = is_everywhere


class Unproven(Transient):
    """The server said yes, but what it confirmed is not what was sent, or is nothing at all."""


class LedgerUnavailable(Transient):
    """The ledger is locked, full, gone away, or no longer the file that was opened."""


class Refused(SpooldError):
    """Never, as it stands: the batch is dead until a person acts, its files stay."""


class ObjectRefused(Refused):
    """The store will not take this object as it is."""


class KeyTaken(Refused):
    """The key already belongs to another record (contract, rule 8)."""


class BadPath(Refused):
    """A path from which no key can be made."""


class NoAccess(BadPath):
    """The daemon's user may not get at it. Before its upload it is waited for: an app's chmod may be under way."""


class Crashed(Refused):
    """Walks of this batch killed their process as often as `upload.retry.crashes` allows."""


class GaveUp(Refused):
    """As many attempts as `upload.retry.give_up_after` allows have failed."""


class Halt(SpooldError):
    """Nothing will work until somebody acts: the spool is held and probed, no attempts are spent."""


class StoreDenied(Halt):
    """403, no such bucket, expired credentials, clock skew, an endpoint that cannot be found.

    is_everywhere: no key and no content can be to blame, as they can for a plain 403.
    """

    def __init__(self, message: str, *, hint: str = "", is_everywhere: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_everywhere = is_everywhere


class SpoolBroken(Halt):
    """EIO, EROFS, ENOSPC, or the root is gone."""


class Stale(SpooldError):
    """The world moved on: no fault, look again."""


class Changed(Stale):
    """The file is not the one that was looked at."""


class Vanished(Stale):
    """The file is no longer there."""


class StillOpen(Stale):
    """Somebody has the file open for writing."""


class Unfinished(Stale):
    """Images do not decode: what has these basenames goes back to being incomplete."""

    def __init__(self, message: str, basenames: Iterable[str], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.basenames = frozenset(basenames)


class ClaimLost(Stale):
    """Somebody else works on this record now, or a newer batch took this one's place."""


class Draining(Stale):
    """The daemon is asked to stop: the batch is put back as it was."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration: where (1-based line and column), in which setting, what is wrong, what to write."""

    file: str
    line: int
    column: int
    setting: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.file}:{self.line}:{self.column}: {self.setting}: {self.message}{remedy}"


class ConfigError(SpooldError):
    """Every problem of a configuration, in the order of its lines."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
