"""How many requests to one destination are under way at once: as many as it takes well.

Additive increase, multiplicative decrease, as TCP does it: one more for each time that all of them were answered well and
quickly; half as many after a fault, a tenth less where answers take several times as long as the quickest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

from spoold.clock import Clock

log = structlog.get_logger()

_AT_FIRST = 16.0
_LATE_TIMES, _LATE_S = 3.0, 0.05  # beyond this it grows no more,
_TOO_LATE_TIMES, _TOO_LATE_S = 8.0, 0.2  # and beyond this it shrinks
_FORGETS = 0.002  # for each time that all were answered, of the quickest answer so far: a network changes
_TOLD_EVERY_S = 10.0


class Window:
    """The one of a destination; safe to share between threads.

    destination: for the log. at_most: it never grows beyond. is_pinned: it stays there, whatever happens.
    """

    def __init__(self, destination: str, *, at_most: int, is_pinned: bool, clock: Clock) -> None:
        self._destination = destination
        self._at_most = float(at_most)
        self._is_pinned = is_pinned
        self._clock = clock
        self._limit = self._at_most if is_pinned else min(_AT_FIRST, self._at_most)
        self._under_way = 0
        self._is_beginning = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._quickest_s: float | None = None
        self._cut_at = self._told_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        return int(self._limit)

    def enter(self, begin: Callable[[], None]) -> None:
        """Call `begin` when there is room: now, or later in the thread of one that leaves. It must not block."""
        with self._lock:
            if self._under_way >= int(self._limit):
                self._waiting.append(begin)
                return
            self._under_way += 1
        begin()

    def leave(self, began_at: float, *, is_well: bool) -> None:
        """One of those that were let in has ended. began_at: monotonic seconds; is_well: it was answered, with no fault."""
        now = self._clock.monotonic()
        with self._lock:
            if not self._is_pinned:
                self._learn(now - began_at, began_at, now, is_well)
            self._under_way -= 1
            if self._is_beginning:
                return  # one that begins may end at once: whoever lets it in goes on with the next
            self._is_beginning = True
        while (begin := self._next()) is not None:
            begin()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if not self._waiting or self._under_way >= int(self._limit):
                self._is_beginning = False
                return None
            self._under_way += 1
            return self._waiting.popleft()

    def _learn(self, took_s: float, began_at: float, now: float, is_well: bool) -> None:
        if not is_well:
            self._cut(0.5, began_at, now)
            return
        before = self._quickest_s if self._quickest_s is not None else took_s
        quickest = self._quickest_s = min(took_s, before * (1.0 + _FORGETS / self._limit))
        if took_s > quickest * _TOO_LATE_TIMES + _TOO_LATE_S:
            self._cut(0.9, began_at, now)
        elif took_s <= quickest * _LATE_TIMES + _LATE_S and self._under_way >= int(self._limit):
            self._limit = min(self._at_most, self._limit + 1.0 / self._limit)

    def _cut(self, factor: float, began_at: float, now: float) -> None:
        """Once for all that were under way together: they tell of the same moment."""
        if began_at <= self._cut_at:
            return
        before, self._limit, self._cut_at = self._limit, max(1.0, self._limit * factor), now
        if int(self._limit) < int(before) and now - self._told_at >= _TOLD_EVERY_S:
            self._told_at = now
            log.info(
                "upload.slowed", bucket=self._destination, before=int(before), after=int(self._limit),
                detail="it fails" if factor < 0.9 else "it takes longer than before",
            )  # fmt: skip
