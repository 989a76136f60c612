"""How long a request that got no answer may still be carried out (contract, section 6, rule 6)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from spoold.clock import Clock

_REMEMBERED = 200_000


class Doubts:
    """How long requests without an answer may still land, counted from when we first knew of each.

    Not from when the ledger says that it ended: a wall clock that jumps forward would make it over (rule 4), and back never.
    """

    def __init__(self, doubt_s: float, clock: Clock) -> None:
        self._doubt_s = doubt_s
        self._clock = clock
        self._known_since: OrderedDict[tuple[str, float], float] = OrderedDict()  # a doubt → monotonic seconds
        self._lock = threading.Lock()

    def left_s(self, doubt: tuple[str, float]) -> float:
        """Return for how many seconds more a key may change. doubt: the key and when the ledger says that it began."""
        moment = self._clock.monotonic()
        with self._lock:
            since = self._known_since.setdefault(doubt, moment)
            if len(self._known_since) > _REMEMBERED:
                self._known_since.popitem(last=False)  # it is merely waited for once more
        return since + self._doubt_s - moment

    def forget(self, doubts: Iterable[tuple[str, float]]) -> None:
        """These are settled."""
        with self._lock:
            for doubt in doubts:
                self._known_since.pop(doubt, None)
