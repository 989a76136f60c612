"""Hold a spool whose destination or disk refuses, probe it, and let it go on by itself when it is mended (rule 11)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from spoold.clock import Clock
from spoold.errors import LedgerUnavailable, SpoolBroken, SpooldError, StoreUnavailable
from spoold.ledger import Ledger

log = structlog.get_logger()

_FIRST_PROBE_S = 1.0
_LAST_PROBE_S = 60.0
_PROBE_LASTS_S = 1.0
_PROBES_IN_A_STORM = 3  # of a server that refuses most but not all, one probe alone may have luck


@dataclass(slots=True)
class _Hold:
    """What is known of one spool's refusals.

    kinds: "store" and "disk", whichever refuse. fine_at: kind → when a probe of it last succeeded, monotonic seconds.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    kinds: set[str] = field(default_factory=set)
    probe_at: float = 0.0
    wait_s: float = _FIRST_PROBE_S
    fine_at: dict[str, float] = field(default_factory=dict)


class Holds:
    """Keeps the holds of all spools.

    probes: spool → kind ("store" or "disk") → tries it for real and raises what is wrong.
    on_release: called when a spool may go on.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        clock: Clock,
        probes: dict[str, dict[str, Callable[[], None]]],
        on_release: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._probes = probes
        self._on_release = on_release
        self._holds = {spool: _Hold() for spool in probes}

    def is_down(self, spool: str, fault: SpooldError) -> bool:
        """Say whether it is the destination that refuses, not one key: probe, and hold the spool if that fails too.

        What no key can be to blame for is believed without a probe: it may be over by now, but no attempt shall be spent
        on it. Of several walks that ask at once, one probes.
        """
        kind = "disk" if isinstance(fault, SpoolBroken) else "store"
        hold = self._holds[spool]
        with hold.lock:
            if kind in hold.kinds:
                return True
            if getattr(fault, "is_everywhere", False):
                self._hold(spool, hold, kind, fault)
                return True
            if self._clock.monotonic() - hold.fine_at.get(kind, float("-inf")) < _PROBE_LASTS_S:
                return False
            try:
                for _ in range(_PROBES_IN_A_STORM if isinstance(fault, StoreUnavailable) else 1):
                    self._probes[spool][kind]()
            except SpooldError as why:
                self._hold(spool, hold, kind, why)
                return True
            hold.fine_at[kind] = self._clock.monotonic()
            return False

    def hold(self, spool: str, fault: SpooldError) -> None:
        """Hold a spool for a fault that needs no probe to be believed: its root is gone."""
        hold = self._holds[spool]
        with hold.lock:
            self._hold(spool, hold, "disk" if isinstance(fault, SpoolBroken) else "store", fault)

    def _hold(self, spool: str, hold: _Hold, kind: str, fault: SpooldError) -> None:
        if not hold.kinds:
            hold.wait_s = _FIRST_PROBE_S
        hold.kinds.add(kind)
        hold.probe_at = self._clock.monotonic() + hold.wait_s
        self._ledger.hold(spool, fault)

    def held(self) -> set[str]:
        """Return the names of the spools that we hold."""
        return {spool for spool, hold in self._holds.items() if hold.kinds}

    def probe_due(self) -> None:
        """Try again what is held and due; a spool goes on once all of it works."""
        for spool, hold in self._holds.items():
            with hold.lock:
                if not hold.kinds or self._clock.monotonic() < hold.probe_at:
                    continue
                try:
                    for kind in sorted(hold.kinds):
                        self._probes[spool][kind]()
                        hold.kinds.discard(kind)
                    self._ledger.release(spool)
                except LedgerUnavailable:
                    hold.kinds.add("store")  # the row is still there: once more, later
                    hold.probe_at = self._clock.monotonic() + hold.wait_s
                    continue
                except SpooldError as why:
                    hold.wait_s = min(_LAST_PROBE_S, hold.wait_s * 2)
                    hold.probe_at = self._clock.monotonic() + hold.wait_s
                    self._ledger.hold(spool, why)
                    continue
            self._on_release()

    def forget_before(self) -> None:
        """Drop what a daemon before us held: whatever still refuses is found out again at once."""
        for spool in self._probes:
            self._ledger.release(spool)
