"""Who this daemon is, and whether another one on this machine still lives.

Each daemon holds a lock on a file of its own for as long as it lives; the kernel lets go of it however the process ends.
So nobody has to wait for the claims of a daemon that was killed to run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import threading
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from spoold.clock import Clock
from spoold.errors import ClaimLost

LEASE_S = 30.0
"""How long a claim lasts unless it is renewed."""

_WORDS_BYTES = 1024  # written once, so that there is room for them on a full disk

OWNERS = "owners"
"""The directory of the lock files, in state_dir."""


class Owner:
    """Proof of life: a name for claims, a lock that dies with us, and how long our claims surely last.

    directory: for the lock files; made if it is not there.
    """

    def __init__(self, directory: Path, *, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._host = platform.node() or "localhost"
        self.name = f"{self._host}:{uuid.uuid4()}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / self.name
        self._fd = self._lock_file()
        self._words: str | None = None
        self.say("")
        self._sure_until = clock.monotonic() + LEASE_S
        self._at_work = 0
        self._lock = threading.Lock()

    def _lock_file(self) -> int:
        """Make our lock file and lock it. Who tidies up may have taken it for that of a dead daemon in between."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)  # nobody else keeps it, but one who looks may have it for a moment
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(fd)):
                    return fd
            os.close(fd)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[bool]:
        """Count one more who holds claims; yield whether new ones may be taken now."""
        with self._lock:
            self._at_work += 1
            is_sure = self._is_sure()
        try:
            yield is_sure
        finally:
            with self._lock:
                self._at_work -= 1

    def renewed(self, asked_at: float) -> None:
        """Our claims were renewed by a request that began at `asked_at`, monotonic seconds.

        That they ran out before, and others may have taken them over, cannot be made undone: then nothing is sure until
        everybody has ended who was at work.
        """
        with self._lock:
            if self._clock.monotonic() < self._sure_until or not self._at_work:
                self._sure_until = asked_at + LEASE_S

    def _is_sure(self) -> bool:
        return self._clock.monotonic() <= self._sure_until - LEASE_S / 4

    def demand(self) -> None:
        """Raise ClaimLost if our claims may have run out: we were frozen, or the ledger did not answer."""
        if not self._is_sure():
            raise ClaimLost("the claim may have run out: this daemon was stopped, or could not reach the ledger")

    def say(self, what_is_wrong: str) -> None:
        """Tell whoever asks for the `living` what is wrong with us, "" for nothing: a ledger that is full cannot."""
        if what_is_wrong == self._words:
            return
        words = what_is_wrong.encode("utf-8", "backslashreplace")[:_WORDS_BYTES]
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, words.ljust(_WORDS_BYTES), 0)
            self._words = what_is_wrong

    def is_dead(self, name: str) -> bool:
        """Say whether the daemon of this name is known to be dead; one on another host or with another state_dir never is."""
        with self._grasped(name) as is_dead:
            return is_dead

    @contextlib.contextmanager
    def _grasped(self, name: str) -> Iterator[bool]:
        """Hold the lock of the daemon of this name if it is dead; yield whether it is."""
        if name == self.name or not name.startswith(f"{self._host}:") or "/" in name:
            yield False
            return
        try:
            fd = os.open(self._directory / name, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            yield False  # it keeps its lock elsewhere, with another state_dir: its claims must run out
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_dead = True
            except OSError:
                is_dead = False
            yield is_dead
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forget(self, name: str) -> None:
        """Remove the lock file of a daemon that is dead."""
        with contextlib.suppress(OSError):
            (self._directory / name).unlink()

    def forget_all_dead(self, but: Collection[str]) -> None:
        """Remove the lock files that daemons left which were killed, but for these names: a lock tells that they are dead."""
        with contextlib.suppress(OSError):
            for name in set(os.listdir(self._directory)) - set(but):
                with self._grasped(name) as is_dead:
                    if is_dead:
                        self.forget(name)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left of it is an unlocked file
            self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._fd)


def living(directory: Path) -> list[str] | None:
    """Return what each living daemon with its lock file in this directory says is wrong with it; None if we may not look.

    "" where nothing is wrong.
    """
    found = []
    try:
        for path in directory.iterdir():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(os.pread(fd, _WORDS_BYTES, 0).decode("utf-8", "replace").strip())
            finally:
                os.close(fd)
    except FileNotFoundError:
        return found
    except PermissionError:
        return None
    return found
