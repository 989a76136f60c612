"""Notice change in one spool, wait for quiet, have the record looked at; and watch the watcher.

Events are hints that make a record dirty; a look at the disk decides; a sweep looks at everything: at the start, every
`sweep_every`, after an overflow, when the canary's event does not come back, when the root was replaced (FACTS 11 to 14).
"""

from __future__ import annotations

import heapq
import logging
import os
import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from spoold.clock import Clock
from spoold.errors import LedgerUnavailable, SpoolBroken, SpooldError
from spoold.ledger import Ledger
from spoold.looker import Looker, Next
from spoold.model import HOUSE, Oddity
from spoold.spool import CANARY, Spool

log = structlog.get_logger()
warnings.filterwarnings("ignore", module=r"watchdog\..*")  # one of them can be 5.8 MB (FACTS 14)

_EVENTS: list[type[FileSystemEvent]] = [
    FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent, DirCreatedEvent, DirMovedEvent, DirDeletedEvent,
]  # fmt: skip
_DEBOUNCE_S = 0.05  # a save's files come within milliseconds: one look sees them all
_DEBOUNCE_AT_MOST_S = 0.5
_LOOKS_A_TURN = 100
_SWEPT_A_TURN = 200
_PENDING_AT_MOST = 5_000  # a sweep waits while this many records wait for their look
_LOOK_AGAIN_S = 60.0
_HEALTH_EVERY_S = 1.0
_SING_EVERY_S = 30.0
_CANARY_SILENT_S = 10.0


@dataclass(slots=True, eq=False)  # watchdog keeps handlers in a set
class _Hints(FileSystemEventHandler):
    """What watchdog's thread calls: it only enqueues, since a handler that raises kills the dispatcher."""

    inbox: queue.SimpleQueue[tuple[str, bool]]

    def dispatch(self, event: FileSystemEvent) -> None:
        for path in (event.src_path, event.dest_path):
            if path:
                self.inbox.put((os.fsdecode(path), event.is_directory))


class _OverflowEar(logging.Handler):
    """Hears watchdog say that the kernel dropped events: nothing else tells (FACTS 11)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._heard = threading.Event()
        self._source = logging.getLogger("watchdog.observers.inotify_c")
        self._source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.msg:
            self._heard.set()

    def heard(self) -> bool:
        """Say whether events were dropped since the last call."""
        was_set = self._heard.is_set()
        self._heard.clear()
        return was_set

    def close(self) -> None:
        self._source.removeHandler(self)
        super().close()


class Watcher:
    """Watches one spool; `run` is its thread, `step` one turn of it.

    move_in: makes our house in the root (again); raises SpoolBroken. on_broken, on_mended: told when the root is lost and
    when it is back. on_ready: told once, when events are received and the first sweep has begun.
    observes: False for a run that ends when nothing is left: a sweep is enough for it.
    """

    def __init__(
        self, *, spool: Spool, looker: Looker, ledger: Ledger, clock: Clock, sweep_every_s: float, move_in: Callable[[], None],
        on_broken: Callable[[SpooldError], None], on_mended: Callable[[], None], on_ready: Callable[[], None],
        observes: bool = True,
    ) -> None:  # fmt: skip
        self._spool = spool
        self._looker = looker
        self._ledger = ledger
        self._clock = clock
        self._sweep_every_s = sweep_every_s
        self._move_in = move_in
        self._on_broken = on_broken
        self._on_mended = on_mended
        self._on_ready = on_ready
        self._observes = observes
        self._inbox: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._touched: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._due: dict[str, float] = {}  # record → when to look, monotonic seconds
        self._first_touch: dict[str, float] = {}
        self._settling: set[str] = set()
        self._order: list[tuple[float, str]] = []
        self._sweeps: deque[_Sweep] = deque()
        self._observer: BaseObserver | None = None
        self._ear = _OverflowEar()
        self._root: tuple[int, int] | None = None
        self._is_broken = False
        self._is_ready = False
        self._swept_at: float | None = None
        self._health_at = 0.0
        self._sang_at: float | None = None
        self._is_canary_heard = True

    # From outside

    def touch(self, record: str) -> None:
        """Have a record looked at again soon; may be called from any thread."""
        self._touched.put(record)

    @property
    def is_idle(self) -> bool:
        """Nothing is being swept, and no record waits for its look or for quiet."""
        return (
            not self._sweeps
            and self._swept_at is not None
            and self._touched.empty()
            and self._inbox.empty()
            and not self._settling
            and not any(due <= self._clock.monotonic() for due in self._due.values())
        )

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set."""
        try:
            while not stop.is_set():
                wait_s = self.step()
                if wait_s > 0:
                    self._clock.wait(stop, wait_s)
        finally:
            self.close()

    def close(self) -> None:
        self._stop_observing()
        self._ear.close()

    def step(self) -> float:
        """Do one turn and return for how many seconds there is nothing to do, 0.05 at most."""
        try:
            try:
                self._check_health()
                if self._is_broken:
                    return 0.05
                self._read_hints()
                self._sweep_on()
                self._look_at_due()
            except SpoolBroken as fault:
                self._break(fault)
        except LedgerUnavailable:  # the ledger told of it
            return 0.5
        if self._sweeps and len(self._settling) < _PENDING_AT_MOST:
            return 0.0
        now = self._clock.monotonic()
        return min(0.05, max(0.0, self._order[0][0] - now)) if self._order else 0.05

    # Hints

    def _read_hints(self) -> None:
        now = self._clock.monotonic()
        while not self._touched.empty():
            self._schedule(self._touched.get(), now, settling=True)
        root = os.fspath(self._spool.root)
        for _ in range(10_000):
            if self._inbox.empty():
                return
            absolute, is_directory = self._inbox.get()
            path = os.path.relpath(absolute, root)
            if path.split("/", 1)[0] == HOUSE:
                self._is_canary_heard = self._is_canary_heard or path == f"{HOUSE}/{CANARY}"
                continue
            if path == "." or path.startswith(".."):
                continue
            records = self._spool.layout.records_touched_by(path, is_directory=is_directory)
            for record in records:
                self._touch_soon(record, now)
            if is_directory and not records:
                self._sweeps.append(_Sweep(self._spool.records(path), now, is_whole=False))

    def _touch_soon(self, record: str, now: float) -> None:
        first = self._first_touch.setdefault(record, now)
        self._schedule(record, min(now + _DEBOUNCE_S, first + _DEBOUNCE_AT_MOST_S), settling=True)

    def _schedule(self, record: str, due: float, *, settling: bool) -> None:
        self._due[record] = due
        heapq.heappush(self._order, (due, record))
        if settling:
            self._settling.add(record)
        else:
            self._settling.discard(record)

    # Looks

    def _look_at_due(self) -> None:
        now = self._clock.monotonic()
        for _ in range(_LOOKS_A_TURN):
            if not self._order or self._order[0][0] > now:
                return
            due, record = heapq.heappop(self._order)
            if self._due.get(record) != due:
                continue  # it was touched again, or looked at since
            try:
                again = self._looker.look(record)
            except (SpoolBroken, LedgerUnavailable):
                self._schedule(record, now + 1.0, settling=True)
                raise
            except SpooldError as fault:
                log.warning("look.failed", spool=self._spool.name, record=record, error=fault.code, detail=str(fault))
                again = Next(_LOOK_AGAIN_S)
            self._forget(record)
            if again.in_s is not None:
                self._schedule(record, now + again.in_s, settling=again.is_settling)

    def _forget(self, record: str) -> None:
        self._due.pop(record, None)
        self._first_touch.pop(record, None)
        self._settling.discard(record)

    # Sweeps

    def _sweep_on(self) -> None:
        now = self._clock.monotonic()
        if self._swept_at is None or now - self._swept_at >= self._sweep_every_s:
            self.sweep("start" if self._swept_at is None else "time")
        if not self._sweeps or len(self._settling) >= _PENDING_AT_MOST:
            return
        current = self._sweeps[0]
        for _ in range(_SWEPT_A_TURN):
            found = next(current.found, None)
            if found is None:
                self._sweeps.popleft()
                self._end_sweep(current)
                break
            if isinstance(found, Oddity):
                self._looker.report(found)
            elif found not in self._settling:  # it may be due in minutes only, when `within` ends
                current.records += 1
                self._schedule(found, now, settling=True)
        if current.is_whole and not self._is_ready:
            self._is_ready = True
            self._on_ready()

    def sweep(self, reason: str) -> None:
        """Begin to look at everything there is."""
        self._swept_at = self._clock.monotonic()
        under_way = sum(sweep.is_whole for sweep in self._sweeps)
        if under_way > 1 or (under_way == 1 and reason == "time"):
            return  # one that has not begun yet sees whatever that under way may have missed
        log.debug("sweep.started", spool=self._spool.name, detail=reason)
        self._sweeps.append(_Sweep(self._spool.records(), self._swept_at, is_whole=True))

    def _end_sweep(self, sweep: _Sweep) -> None:
        if not sweep.is_whole:
            return
        # What the ledger waits for and the sweep did not meet may be gone: a look tells.
        now = self._clock.monotonic()
        for record in self._ledger.unfinished(self._spool.name):
            if record not in self._settling:
                self._schedule(record, now, settling=True)
        log.info("sweep.finished", spool=self._spool.name, records=sweep.records, elapsed_s=round(now - sweep.began, 3))

    # Health

    def _check_health(self) -> None:
        now = self._clock.monotonic()
        if now < self._health_at:
            return
        self._health_at = now + _HEALTH_EVERY_S
        root = self._spool.root_identity()
        if self._root is None or root != self._root or self._is_broken:
            self._begin(root)
        elif not self._spool.is_at_home:
            self._move_in()  # somebody tidied it away
        if self._ear.heard():
            log.warning("watch.overflowed", spool=self._spool.name, detail="the kernel dropped events; everything is swept")
            self.sweep("overflow")
        for record in self._ledger.wanted_as_is(self._spool.name):
            if record not in self._settling:
                self._schedule(record, now, settling=True)
        if self._observes:
            self._check_canary(now)

    def _begin(self, root: tuple[int, int]) -> None:
        """Start to watch a root that is new to us, or back."""
        self._move_in()
        was_lost = self._root is not None
        # Watch first, then scan: what is written between the two is seen twice, which is harmless; the other way round never.
        self._observe()
        self._root = root
        if self._is_broken or was_lost:
            log.info("watch.restarted", spool=self._spool.name, detail="the root is back or was replaced")
        if self._is_broken:
            self._is_broken = False
            self._on_mended()
        self._sweeps.clear()
        if self._swept_at is not None:
            self.sweep("root")

    def _check_canary(self, now: float) -> None:
        observer = self._observer
        if observer is None:
            if self._sang_at is None or now - self._sang_at > _SING_EVERY_S:
                self._observe()
                self.sweep("inotify")
            return
        alive = observer.is_alive() and all(emitter.is_alive() for emitter in observer.emitters)
        silent = self._sang_at is not None and not self._is_canary_heard and now - self._sang_at > _CANARY_SILENT_S
        if not alive or silent:
            reason = "watchdog's threads are dead" if not alive else "the canary's event did not come back"
            log.warning("watch.restarted", spool=self._spool.name, detail=reason)
            self._observe()
            self.sweep("canary")
        elif self._sang_at is None or now - self._sang_at > _SING_EVERY_S:
            self._sing(now)

    def _sing(self, now: float) -> None:
        self._is_canary_heard = False
        self._sang_at = now
        try:
            self._spool.sing()
        except OSError:
            self._is_canary_heard = False  # the root is on its way out; the next look at it tells

    def _observe(self) -> None:
        self._stop_observing()
        if self._observes and (kind := self._spool.network_filesystem()):
            self._observes = False
            log.warning(
                "watch.unavailable", spool=self._spool.name, detail=f"{kind} tells nothing of what other machines write",
                hint="new files are found by sweeps only: lower sweep_every of this spool",
            )  # fmt: skip
        if not self._observes:
            return
        try:
            observer = Observer()
            observer.schedule(_Hints(self._inbox), os.fspath(self._spool.root), recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as error:
            log.warning(
                "watch.unavailable", spool=self._spool.name, detail=f"inotify: {error.strerror or error}",
                hint="raise fs.inotify.max_user_watches and max_user_instances; until then sweeps find new files",
            )  # fmt: skip
            self._sang_at, self._is_canary_heard = self._clock.monotonic(), True
            return
        self._observer = observer
        self._sang_at = None

    def _stop_observing(self) -> None:
        if self._observer is None:
            return
        observer, self._observer = self._observer, None
        observer.stop()
        observer.join(5)

    def _break(self, fault: SpoolBroken) -> None:
        self._sweeps.clear()
        if not self._is_broken:
            self._stop_observing()
            self._on_broken(fault)  # where the ledger is gone too, this is told once it answers
            self._is_broken = True


@dataclass(slots=True)
class _Sweep:
    found: Iterator[str | Oddity]
    began: float
    is_whole: bool
    records: int = 0
