"""Notice change in one spool, wait for quiet, have the record looked at.

Events are hints that make a record dirty; a look at the disk decides; a sweep looks at everything: at the start, every
`sweep_every`, when the root was replaced, and after each doubt whether events were lost (`observing`). While the kernel cannot
watch every directory sweeps come more often, so that what is new there need not wait for long.
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from spoold.clock import Clock
from spoold.errors import LedgerUnavailable, SpoolBroken, SpooldError
from spoold.ledger import Ledger
from spoold.looker import Looker, Next
from spoold.model import Oddity
from spoold.observing import Observing, watches_needed
from spoold.spool import Spool
from spoold.steps import SideBySide, Steps, Turn

log = structlog.get_logger()

_DEBOUNCE_S = 0.005  # a save's files come within milliseconds: one look sees them all
_DEBOUNCE_AT_MOST_S = 0.5
_HINTS_A_TURN = 10_000
_LOOKS_A_TURN = 100
_SIDE_BY_SIDE = 32  # looks; what they tell the ledger goes into one commit
_SIDE_BY_SIDE_AT_FIRST = 4  # twice as many each time, while that is quick
_LOOKING_AT_MOST_S = 0.5  # where the disk is slow, a look can take long; hints, health and sweeps must not wait for many
_SWEPT_A_TURN = 200
_PENDING_AT_MOST = 5_000  # a sweep waits while this many records wait for their look
_LOOK_AGAIN_S = 60.0
_HEALTH_EVERY_S = 1.0
_BLIND_SWEEP_EVERY_S = 30.0  # while not all directories are watched, or ten times as long as a sweep takes
_AT_MOST_A_TENTH = 10
_SUSPECTS_AT_MOST = 1_000
_LINES_AT_MOST = 100


class Watcher:
    """Watches one spool; `run` is its thread, `step` one turn of it.

    move_in: makes our house in the root (again); raises SpoolBroken. on_broken, on_mended: told when the root is lost and
    when it is back. on_ready: told once, when events are received and the first sweep has begun.
    observes: False for a run that ends when nothing is left: a sweep is enough for it. turn: shared with all who walk.
    """

    def __init__(
        self, *, spool: Spool, looker: Looker, ledger: Ledger, clock: Clock, sweep_every_s: float, move_in: Callable[[], None],
        on_broken: Callable[[SpooldError], None], on_mended: Callable[[], None], on_ready: Callable[[], None],
        observes: bool = True, turn: Turn | None = None,
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
        self._observing = Observing(spool=spool, clock=clock)
        self._side_by_side = SideBySide(together=ledger.together, turn=turn)
        self._looks_at_once = _SIDE_BY_SIDE_AT_FIRST
        self._touched: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._due: dict[str, float] = {}  # record → when to look, monotonic seconds
        self._first_touch: dict[str, float] = {}
        self._settling: set[str] = set()
        self._order = _Lines()
        self._sweeps: deque[_Sweep] = deque()
        self._counted: _Sweep | None = None  # the newest whole sweep, until its suspects are judged
        self._sweep_cost_s = 0.0
        self._is_blind = False  # in part or wholly: not every directory is watched
        self._was_listening = False
        self._told_elsewhere = False
        self._root: tuple[int, int] | None = None
        self._is_broken = False
        self._is_ready = False
        self._swept_at: float | None = None
        self._health_at = 0.0

    # From outside

    def touch(self, record: str) -> None:
        """Have a record looked at again soon; may be called from any thread."""
        self._touched.put(record)
        self._observing.bell.set()

    @property
    def is_idle(self) -> bool:
        """Nothing is being swept, and no record waits for its look or for quiet."""
        return (
            not self._sweeps
            and self._swept_at is not None
            and self._touched.empty()
            and self._observing.is_quiet
            and not self._settling
            and not any(due <= self._clock.monotonic() for due in self._due.values())
        )

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set."""
        try:
            while not stop.is_set():
                self._observing.bell.clear()
                wait_s = self.step()
                if wait_s > 0:
                    self._clock.wait(self._observing.bell, wait_s)
        finally:
            self.close()

    def close(self) -> None:
        self._observing.close()

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
            except OSError as error:
                self._break(SpoolBroken(f"look at {self._spool.root}: {error}", hint="look at the disk: dmesg"))
        except LedgerUnavailable:  # the ledger told of it
            return 0.5
        if self._sweeps and len(self._settling) < _PENDING_AT_MOST:
            return 0.0
        now = self._clock.monotonic()
        return min(0.05, max(0.0, self._order.next_due_at() - now))

    # Hints

    def _read_hints(self) -> None:
        now = self._clock.monotonic()
        while not self._touched.empty():
            self._schedule(self._touched.get(), now, settling=True)
        directories: dict[str, None] = {}
        for path, is_directory in self._observing.hints(at_most=_HINTS_A_TURN):
            if is_directory:
                directories[path] = None
            else:
                for record in self._spool.layout.records_touched_by(path, is_directory=False):
                    self._touch_soon(record, now)
        if directories:
            self._read_hints_of_directories(directories, now)

    def _read_hints_of_directories(self, directories: Collection[str], now: float) -> None:
        """Look for records below, and again at those that are known and may hold one of them, or be it.

        Not at all that may: of avatars/000/000/042 each directory above could be the record of a string's :id_partition,
        and a look at one of these walks through thousands of others.
        """
        may_hold = {record for path in directories for record in self._spool.layout.records_touched_by(path, is_directory=True)}
        for record in self._ledger.known_among(self._spool.name, may_hold):
            self._touch_soon(record, now)
        self._sweeps.extend(_Sweep(now, is_whole=False, below=path) for path in directories)

    def _touch_soon(self, record: str, now: float) -> None:
        first = self._first_touch.setdefault(record, now)
        self._schedule(record, min(now + _DEBOUNCE_S, first + _DEBOUNCE_AT_MOST_S), settling=True)

    def _schedule(self, record: str, due: float, *, settling: bool, is_swept: bool = False) -> None:
        self._due[record] = due
        line = self._line_of(record)
        self._order.add(f"{line} swept" if is_swept else line, due, record)  # what is new waits for no backlog
        if settling:
            self._settling.add(record)
        else:
            self._settling.discard(record)

    def _line_of(self, record: str) -> str:
        """Return the attachment's directory of a record: each has a line of its own."""
        return "/".join(record.split("/")[: self._spool.layout.floor_of(record)])

    # Looks

    def _look_at_due(self) -> None:
        began = self._clock.monotonic()
        left = _LOOKS_A_TURN
        while left > 0:
            records = self._next_due(began, at_most=min(left, self._looks_at_once))
            if not records:
                return
            left -= len(records)
            before = self._clock.monotonic()
            ends = self._side_by_side.run([self._look(record) for record in records])
            now = self._clock.monotonic()
            is_slow = now - before > _LOOKING_AT_MOST_S / 4
            self._looks_at_once = max(1, self._looks_at_once // 2) if is_slow else min(_SIDE_BY_SIDE, 2 * self._looks_at_once)
            self._take_note(began, records, ends)
            if now - began > _LOOKING_AT_MOST_S:
                return

    def _next_due(self, now: float, *, at_most: int) -> list[str]:
        """Take the records out of the order that are to be looked at next."""
        records: list[str] = []
        while len(records) < at_most and (first := self._order.take(now)):
            due, record = first
            if self._due.get(record) == due and record not in records:  # else it was touched again, or looked at since
                records.append(record)
        return records

    def _look(self, record: str) -> Steps[Next | Exception]:
        """Look at one record; return when to do so again, or the fault that is not the record's own."""
        try:
            again: Next = yield from self._looker.look(record)
            return again
        except (SpoolBroken, LedgerUnavailable, OSError) as fault:
            return fault
        except SpooldError as fault:
            log.warning("look.failed", spool=self._spool.name, record=record, error=fault.code, detail=str(fault))
            return Next(_LOOK_AGAIN_S)

    def _take_note(self, now: float, records: list[str], ends: Sequence[Next | Exception]) -> None:
        faults = []
        for record, end in zip(records, ends, strict=True):
            if not isinstance(end, Next):
                faults.append(end)
                self._schedule(record, now + 1.0, settling=True)
                continue
            self._forget(record)
            if end.in_s is not None:
                self._schedule(record, now + end.in_s, settling=end.is_settling)
        if faults:
            raise faults[0]

    def _forget(self, record: str) -> None:
        self._due.pop(record, None)
        self._first_touch.pop(record, None)
        self._settling.discard(record)

    # Sweeps

    def _sweep_on(self) -> None:
        now = self._clock.monotonic()
        if self._swept_at is None:
            self.sweep("start")
        elif now - self._swept_at >= self._interval_s:
            if self._is_blind and not self._sweeps:
                self._observe()  # perhaps there are enough watches now
            self.sweep("time")
        if not self._sweeps or len(self._settling) >= _PENDING_AT_MOST:
            return
        current = self._sweeps[0]
        if current.found is None:
            current.found = self._begin_sweep(current)
        for _ in range(_SWEPT_A_TURN):
            found = next(current.found, None)
            if found is None:
                self._sweeps.popleft()
                self._end_sweep(current)
                break
            if isinstance(found, Oddity):
                self._looker.report(found)
            elif not current.is_whole:
                self._touch_soon(found, now)
            elif found not in self._settling:  # it may be due in minutes only, when `within` ends
                current.records += 1
                self._schedule(found, now, settling=True, is_swept=True)
        if current.is_whole and not self._is_ready:
            self._is_ready = True
            self._on_ready()

    @property
    def _interval_s(self) -> float:
        """How long after the last sweep began the next one is due."""
        if not self._is_blind:
            return self._sweep_every_s
        return min(self._sweep_every_s, max(_BLIND_SWEEP_EVERY_S, _AT_MOST_A_TENTH * self._sweep_cost_s))

    def sweep(self, reason: str) -> None:
        """Begin to look at everything there is."""
        self._swept_at = self._clock.monotonic()
        under_way = sum(sweep.is_whole for sweep in self._sweeps)
        if under_way > 1 or (under_way == 1 and reason == "time"):
            return  # one that has not begun yet sees whatever that under way may have missed
        log.debug("sweep.started", spool=self._spool.name, detail=reason)
        self._sweeps.append(_Sweep(self._swept_at, is_whole=True))

    def _begin_sweep(self, sweep: _Sweep) -> Iterator[str | Oddity]:
        sweep.began = self._clock.monotonic()
        if sweep.is_whole and self._observing.is_listening:
            sweep.watched = self._observing.watched()
        return self._spool.records(sweep.below, met=sweep.meet)

    def _end_sweep(self, sweep: _Sweep) -> None:
        if not sweep.is_whole:
            return
        # What the ledger waits for and the sweep did not meet may be gone: a look tells.
        now = self._clock.monotonic()
        for record in self._ledger.unfinished(self._spool.name):
            if record not in self._settling:
                self._schedule(record, now, settling=True)
        self._sweep_cost_s = now - sweep.began
        log.info("sweep.finished", spool=self._spool.name, records=sweep.records, elapsed_s=round(self._sweep_cost_s, 3))
        self._tell_of_what_lies_elsewhere()
        if sweep.watched is not None:
            self._counted = sweep
            self._observing.sing()
        elif self._observing.is_listening:
            self._see_all()  # as far as anybody can tell

    def _tell_of_what_lies_elsewhere(self) -> None:
        elsewhere = self._ledger.elsewhere(self._spool.name)
        if elsewhere and not self._told_elsewhere:
            log.warning(
                "root.replaced", spool=self._spool.name, record=elsewhere[0], path=str(self._spool.root),
                detail=f"{len(elsewhere)} records that are not uploaded yet were last seen in another directory that was the "
                "root, and are not here; this is the first of them",
                hint="is a filesystem not mounted, or was the directory moved? they go up as soon as they are back",
            )  # fmt: skip
        self._told_elsewhere = bool(elsewhere)

    # Health

    def _check_health(self) -> None:
        now = self._clock.monotonic()
        if now < self._health_at:
            return
        self._health_at = now + _HEALTH_EVERY_S
        self._spool.follow()
        root = self._spool.root_identity()
        if self._root is None or root != self._root or self._is_broken:
            self._begin(root)
        elif not self._spool.is_at_home:
            self._enter(root)  # somebody tidied our house away
            self.sweep("house")
        if self._observing.overflowed():
            log.warning("watch.overflowed", spool=self._spool.name, detail="the kernel dropped events; everything is swept")
            self._observe()
            self.sweep("overflow")
        for record in self._ledger.wanted_as_is(self._spool.name):
            if record not in self._settling:
                self._schedule(record, now, settling=True)
        if doubt := self._observing.doubt():
            log.warning("watch.restarted", spool=self._spool.name, detail=doubt)
            self._observe()
            self.sweep("doubt")
        elif self._counted is not None and self._observing.is_canary_heard:
            sweep, self._counted = self._counted, None
            self._judge(sweep)

    def _begin(self, root: tuple[int, int]) -> None:
        """Start to watch a root that is new to us, or back."""
        was_lost = self._root is not None
        self._enter(root)
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

    def _enter(self, root: tuple[int, int]) -> None:
        """Move into the root, and see whether it is the directory that it was before, even before a restart."""
        self._move_in()
        self._ledger.enter(self._spool.name, self._spool.house_mark())
        self._looker.root = root

    def _judge(self, sweep: _Sweep) -> None:
        """Say whether all that a sweep met is watched: directories made since it began are, for the canary was heard."""
        watched = self._observing.watched()
        if watched is None:
            return
        unwatched = [
            path for path, inode in sweep.suspects.items()
            if inode not in watched and self._spool.inode_of_directory(path) == inode
        ]  # fmt: skip
        if not unwatched:
            self._see_all()
        elif not self._is_blind:
            self._is_blind = True
            count = sweep.suspected * len(unwatched) // len(sweep.suspects)
            limit, enough = watches_needed(sweep.directories, count)
            log.warning(
                "watch.limited", spool=self._spool.name, path=unwatched[0],
                detail=f"{count} of {sweep.directories} directories are not watched: the kernel grants no more inotify watches",
                hint=f"sysctl -w {limit}={enough}; until then sweeps find what is new there, every {self._interval_s:.0f} s",
            )  # fmt: skip

    def _see_all(self) -> None:
        if self._is_blind:
            self._is_blind = False
            log.info("watch.restarted", spool=self._spool.name, detail="every directory is watched again")

    def _observe(self) -> None:
        """Listen with a new observer, if any can be had."""
        self._observing.end()
        self._counted = None
        if self._observes and (kind := self._spool.network_filesystem()):
            self._observes = self._is_blind = False
            log.warning(
                "watch.unavailable", spool=self._spool.name, detail=f"{kind} tells nothing of what other machines write",
                hint="new files are found by sweeps only: lower sweep_every of this spool",
            )  # fmt: skip
        if not self._observes:
            return
        try:
            self._observing.begin()
        except OSError as error:
            if self._is_blind and not self._was_listening:
                return
            self._is_blind, self._was_listening = True, False
            log.warning(
                "watch.unavailable", spool=self._spool.name, detail=f"inotify: {error.strerror or error}",
                hint="raise fs.inotify.max_user_watches and fs.inotify.max_user_instances (sysctl -w); until then sweeps find "
                f"new files, every {self._interval_s:.0f} s",
            )  # fmt: skip
            return
        self._was_listening = True

    def _break(self, fault: SpoolBroken) -> None:
        self._sweeps.clear()
        if not self._is_broken:
            self._observing.end()
            self._on_broken(fault)  # where the ledger is gone too, this is told once it answers
            self._is_broken = True


class _Lines:
    """Which record is to be looked at next: the first of each line in turn, of those that are due."""

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[float, str]]] = {}  # in the order of their turns; each a heap

    def add(self, line: str, due: float, record: str) -> None:
        if line not in self._lines and len(self._lines) >= _LINES_AT_MOST:
            line = ""
        heapq.heappush(self._lines.setdefault(line, []), (due, record))

    def take(self, now: float) -> tuple[float, str] | None:
        """Take out what is next; None if nothing is due."""
        for line, records in self._lines.items():
            if records[0][0] <= now:
                del self._lines[line]  # its next turn comes last
                first = heapq.heappop(records)
                if records:
                    self._lines[line] = records
                return first
        return None

    def next_due_at(self) -> float:
        """Return when the next record is due, monotonic seconds; inf if there is none."""
        return min((records[0][0] for records in self._lines.values()), default=float("inf"))

    def __iter__(self) -> Iterator[tuple[float, str]]:
        for records in self._lines.values():
            yield from records


@dataclass(slots=True)
class _Sweep:
    """One pass over a directory and all below it.

    watched: inodes of what was watched when it began; None if that is not known, or the pass is not whole.
    suspects: path → inode of the first directories met that were not; suspected: how many there were.
    """

    began: float
    is_whole: bool
    below: str = ""
    found: Iterator[str | Oddity] | None = None
    records: int = 0
    directories: int = 0
    watched: frozenset[int] | None = None
    suspects: dict[str, int] = field(default_factory=dict)
    suspected: int = 0

    def meet(self, path: str, inode: int) -> None:
        self.directories += 1
        if self.watched is not None and inode not in self.watched:
            self.suspected += 1
            if len(self.suspects) < _SUSPECTS_AT_MOST:
                self.suspects[path] = inode
