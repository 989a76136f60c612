"""Time, so that tests can move it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Protocol

from spoold.model import Identity


class Clock(Protocol):
    """Wall-clock seconds to write down, monotonic seconds to measure with, and a wait that can be cut short."""

    def now(self) -> float:
        """Seconds since the epoch; may jump."""

    def monotonic(self) -> float:
        """Seconds that only grow; mean nothing outside this process."""

    def uptime(self) -> float:
        """Seconds since this machine started."""

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until `event` is set or the time is up; say whether it is set."""


class SystemClock:
    """The machine's own."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def uptime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)


def iso(moment: float) -> str:
    """Return `moment` (seconds since the epoch) as UTC in ISO 8601 with milliseconds and `Z`."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _packed(identity: Identity) -> bytes:
    moments = identity.mtime_ns, identity.ctime_ns  # which may be any that a filesystem has, also beyond 64 bits
    return b"%d %d %d %d %d" % (identity.dev, identity.ino, identity.size, *moments)


class Ages:
    """How old a file may be said to be: the lesser of its ctime's age and the time since its identity was first seen.

    So a clock that jumps forward makes nothing old, and neither does a ctime in the past (contract, rule 4). What is
    forgotten, beyond `capacity`, is merely young again.
    """

    def __init__(self, clock: Clock, *, capacity: int = 100_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._first_seen: OrderedDict[bytes, float] = OrderedDict()  # by identity, packed: that is half the memory
        self._lock = threading.Lock()

    def age_s(self, identity: Identity) -> float:
        """Return the age in seconds, never negative; the first call for an identity returns 0."""
        moment = self._clock.monotonic()
        with self._lock:
            first = self._first_seen.setdefault(_packed(identity), moment)
            if len(self._first_seen) > self._capacity:
                self._first_seen.popitem(last=False)
        return max(0.0, min(moment - first, self._clock.now() - identity.ctime_ns / 1e9))

    def predates_boot(self, identity: Identity) -> bool:
        """Say whether a file was last changed before this machine started: a power cut may have taken bytes of it.

        A ctime in the future too is from before: the clock came up behind, and has not been set yet.
        """
        now = self._clock.now()
        return not now - self._clock.uptime() <= identity.ctime_ns / 1e9 <= now
