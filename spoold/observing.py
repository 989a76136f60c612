"""What the kernel tells of one spool: the life of a watchdog observer, and every reason to trust it no longer.

Much goes wrong here without a word (FACTS 11 to 14): events are dropped when nobody reads them quickly enough, directories
beyond the limit of watches are not watched, a root that is unmounted or replaced says nothing, and a directory that is moved
out can kill watchdog's reader. So there is a canary whose event must come back, a look at every thread's life, and the kernel's
own list of what is watched. The answer to every doubt is the same: a new observer, and a sweep.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
from spoold.errors import Stale
from spoold.model import HOUSE
from spoold.spool import CANARY, Spool

warnings.filterwarnings("ignore", module=r"watchdog\..*")  # one of them can be 5.8 MB (FACTS 14)
# watchdog looks for directories with os.walk, which calls itself for each level in Python 3.11; a path has 2,048 at most.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 10_000))

_EVENTS: list[type[FileSystemEvent]] = [
    FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent, DirCreatedEvent, DirMovedEvent, DirDeletedEvent,
]  # fmt: skip
_SING_EVERY_S = 30.0
_CANARY_SILENT_S = 10.0
_AT_MOST_A_TENTH = 10  # of the time goes into beginning anew, however often the kernel drops events
_PROC = Path("/proc/sys")
_LIMITS = (_PROC / "fs/inotify/max_user_watches", _PROC / "user/max_inotify_watches")


@dataclass(slots=True, eq=False)  # watchdog keeps handlers in a set
class _Hints(FileSystemEventHandler):
    """What watchdog's thread calls: it only enqueues, since a handler that raises kills the dispatcher."""

    inbox: queue.SimpleQueue[tuple[str, bool]]
    bell: threading.Event

    def dispatch(self, event: FileSystemEvent) -> None:
        for path in (event.src_path, event.dest_path):
            if path:
                self.inbox.put((os.fsdecode(path), event.is_directory))
        self.bell.set()


class _OverflowEar(logging.Handler):
    """Hears watchdog say that the kernel dropped events: nothing else tells (FACTS 11)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.has_heard = threading.Event()
        self._source = logging.getLogger("watchdog.observers.inotify_c")
        self._source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.msg:
            self.has_heard.set()

    def close(self) -> None:
        self._source.removeHandler(self)
        super().close()


class Observing:
    """Listens to what happens below a spool's root. All but the inbox belongs to the thread that watches.

    bell: is set when something has happened.
    """

    def __init__(self, *, spool: Spool, clock: Clock) -> None:
        self._spool = spool
        self._clock = clock
        self.bell = threading.Event()
        self._inbox: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._observer: BaseObserver | None = None
        self._ear = _OverflowEar()
        self._sang_at: float | None = None
        self._may_begin_anew_at = 0.0
        self.is_canary_heard = True
        """Whatever happened before the canary last sang has been told, and new directories are watched since."""

    def begin(self) -> None:
        """Listen with a new observer; all directories that are there are watched when this returns, as far as they can be.

        Raises OSError if nothing can be watched: too few inotify instances, or not one watch left.
        """
        self.end()
        began = self._clock.monotonic()
        self._ear.has_heard.clear()
        hints = _Hints(self._inbox, self.bell)
        observer = Observer()
        try:
            observer.start()
            # Our house first, so that the canary is heard even where there are too few watches for the rest.
            observer.schedule(hints, os.fspath(self._spool.house), recursive=False, event_filter=_EVENTS)
            observer.schedule(hints, os.fspath(self._spool.root), recursive=True, event_filter=_EVENTS)
        except OSError:
            observer.stop()
            observer.join(5)
            raise
        self._observer = observer
        self._sang_at = None
        now = self._clock.monotonic()
        self._may_begin_anew_at = now + _AT_MOST_A_TENTH * (now - began)

    def end(self) -> None:
        observer, self._observer = self._observer, None
        if observer is None:
            return
        groups = [getattr(emitter, "_inotify", None) for emitter in observer.emitters]
        for _ in range(len(groups) + 1):
            try:
                observer.stop()
                break
            except KeyError:
                # Its books are wrong once two directories changed places, and each emitter stumbles over its own once,
                # before it has woken its thread.
                for group in groups:
                    if (events := getattr(group, "_move_event_grouper", None)) is not None:
                        events.close()
        observer.join(5)

    def close(self) -> None:
        self.end()
        self._ear.close()

    @property
    def is_listening(self) -> bool:
        return self._observer is not None

    # What was heard

    @property
    def is_quiet(self) -> bool:
        """Nothing waits to be read."""
        return self._inbox.empty()

    def hints(self, *, at_most: int) -> Iterator[tuple[str, bool]]:
        """Yield what happened as path below the root and whether it is a directory's; what is about our house is kept."""
        root = os.fspath(self._spool.root)
        for _ in range(at_most):
            if self._inbox.empty():
                return
            absolute, is_directory = self._inbox.get()
            path = os.path.relpath(absolute, root)
            if path.split("/", 1)[0] == HOUSE:
                self.is_canary_heard = self.is_canary_heard or path == f"{HOUSE}/{CANARY}"
            elif path not in (".", "..") and not path.startswith("../"):
                yield path, is_directory

    # Whether it can be trusted

    def overflowed(self) -> bool:
        """Say whether events were dropped since the last call. Told late if it was costly to begin and was done just now."""
        if not self._ear.has_heard.is_set() or self._clock.monotonic() < self._may_begin_anew_at:
            return False
        self._ear.has_heard.clear()
        return True

    def doubt(self) -> str | None:
        """Say why the observer cannot be trusted any more, or None; and have the canary sing now and then."""
        if self._observer is None:
            return None
        now = self._clock.monotonic()
        reader = _reader(self._observer)
        threads = [self._observer, *self._observer.emitters, *([reader] if reader else [])]
        if not all(thread.is_alive() for thread in threads):
            return "watchdog's threads are dead"
        is_silent = self._sang_at is not None and not self.is_canary_heard and now - self._sang_at > _CANARY_SILENT_S
        if is_silent and self.is_quiet:  # else it may be among what waits to be read
            return "the canary's event did not come back"
        if self._sang_at is None or now - self._sang_at > _SING_EVERY_S:
            self.sing()
        return None

    def sing(self) -> None:
        """Write to the canary; when that is heard, everything before was."""
        self.is_canary_heard = False
        self._sang_at = self._clock.monotonic()
        try:
            self._spool.sing()
        except (OSError, Stale):
            self.is_canary_heard = False  # the root is on its way out; the next look at it tells

    def watched(self) -> frozenset[int] | None:
        """Return the inodes that the kernel watches for us, by its own account; None if it does not say.

        watchdog passes in silence over directories for which there is no watch left (FACTS 13). Source: proc(5), fdinfo.
        """
        fd = getattr(_reader(self._observer), "_inotify_fd", None)
        try:
            with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
                inodes = frozenset(
                    int(line.partition(b" ino:")[2].partition(b" ")[0], 16) for line in lines if line.startswith(b"inotify ")
                )
            return inodes if os.stat(self._spool.root).st_ino in inodes else None
        except (OSError, ValueError):
            return None


def _reader(observer: BaseObserver | None) -> threading.Thread | None:
    """Return the thread that reads from the kernel: a KeyError in it leaves all others alive (FACTS 13)."""
    reader = getattr(observer, "_inotify_fd", None)
    return reader if isinstance(reader, threading.Thread) else None


def watches_needed(directories: int, unwatched: int) -> tuple[str, int]:
    """Return the limit that is too low, as sysctl calls it, and what would be enough for a tree of so many directories."""
    limits = {path: int(path.read_text()) for path in _LIMITS if path.exists()}
    path = min(limits, key=lambda each: limits[each], default=_LIMITS[0])
    least = max(2 * directories, limits.get(path, 0) + 2 * unwatched)
    return path.relative_to(_PROC).as_posix().replace("/", "."), 1 << max(10, (least - 1).bit_length())
