"""Makers of nasty trees, who swaps things at full speed, and a witness by whom the kernel tells what was touched."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

FOREIGN = b"FOREIGN: this lies outside the spool and is none of spoold's business"
"""What no object may ever hold."""

RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)

# Names that an app, or who hates it, may give a file; the bytes are what counts. Each is legal on ext4, and in S3.
NAMES = {
    "newline": "a\nb.jpg",
    "carriage return": "a\rb.jpg",
    "tab": "a\tb.jpg",
    "escape": "\x1b[31mred\x1b[0m\x1b]0;title\x07.jpg",
    "delete": "a\x7fb.jpg",
    "c1": "a\x9b31mb\x85.jpg",
    "bidi": "a\u202egpj.exe.jpg",
    "line separator": "a\u2028b\u2029.jpg",
    "composed": "caf\u00e9.jpg",
    "decomposed": "cafe\u0301.jpg",
    "lower": "twin.jpg",
    "upper": "TWIN.jpg",
    "house": ".spoold",
    "backslash": "a\\..\\b.jpg",
    "percent": "%2e%2e%2fetc%2fpasswd.jpg",
    "dash": "-rf.jpg",
    "dots": "...jpg",
    "many dots": "a..b...jpg",
    "trailing dot": "trailing.",
    "trailing space": "trailing.jpg ",
    "leading space": " leading.jpg",
    "blank": " ",
    "plus": "a+b c&d=e?f#g.jpg",
    "quotes": '\'"`$(reboot)`".jpg',
    "markup": "[red]<b>&amp;]]>.jpg",
    "tilde": "~root",
    "emoji": "\U0001f431\u200d\U0001f409.jpg",
    "private": "\ue000\U0010ffff.jpg",
    "long": "x" * 251 + ".jpg",
    "long in bytes": "\u00e9" * 125 + ".jpg",
    "token": ":attachment/:id".replace("/", "_"),
}


# What the kernel saw

_EVENTS = {
    0x1: "accessed", 0x2: "modified", 0x4: "attributes", 0x8: "closed after writing", 0x20: "opened", 0x40: "moved out",
    0x80: "moved in", 0x100: "created", 0x200: "deleted", 0x400: "deleted itself", 0x800: "moved itself",
}  # fmt: skip
_IS_DIRECTORY, _OVERFLOW, _IGNORED = 0x40000000, 0x4000, 0x8000


class Witness:
    """Sees, by inotify, whatever anybody does to what lies below some directories: also what leaves no trace.

    Watches are on the inodes, so it sees them by whatever way they are reached. Listing a directory is told apart: a
    directory says "listed" where a file says "opened".
    """

    def __init__(self, *trees: Path) -> None:
        self._trees = trees
        self._fd = -1
        self._paths: dict[int, Path] = {}
        self._seen: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        for tree in self._trees:
            self._watch(tree)
            for directory, inner, names in os.walk(tree):
                for name in (*inner, *names):
                    self._watch(Path(directory, name))
        self._drain()
        self._seen.clear()  # our own looking round
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _watch(self, path: Path) -> None:
        dont_follow, all_events = 0x02000000, 0xFFF
        number = _libc.inotify_add_watch(self._fd, os.fsencode(path), dont_follow | all_events)
        assert number >= 0, f"{path}: {os.strerror(ctypes.get_errno())}"
        self._paths[number] = path

    def _drain(self) -> None:
        while select.select([self._fd], [], [], 0)[0]:
            heap = os.read(self._fd, 1 << 20)
            while heap:
                number, mask, _, length = struct.unpack_from("iIII", heap)
                name = heap[16 : 16 + length].rstrip(b"\0")
                heap = heap[16 + length :]
                assert not mask & _OVERFLOW, "the kernel dropped events: nobody knows what was touched"
                if mask & _IGNORED:
                    continue
                path = self._paths[number] / os.fsdecode(name) if name else self._paths[number]
                for bit, what in _EVENTS.items():
                    if mask & bit:
                        kind = "listed" if mask & _IS_DIRECTORY and bit in (0x1, 0x20) else what
                        self._seen[kind, str(path)] = self._seen.get((kind, str(path)), 0) + 1

    def seen(self, *kinds: str) -> list[tuple[str, str]]:
        """Return what was done to what so far; of these kinds only, if any are given. Closing without writing is nothing."""
        self._drain()
        return [(what, path) for what, path in self._seen if not kinds or what in kinds]

    def demand_untouched(self) -> None:
        """Nothing was opened, read, written, moved or deleted."""
        assert not self.seen(), self.seen()[:20]


# Swapping


def exchange(one: str | Path, other: str | Path) -> bool:
    """Let two names change what they are names of, in one step; say whether both were there. Source: renameat2(2)."""
    if _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        pytest.skip(f"this filesystem cannot exchange names: {os.strerror(code)}")
    if code in (errno.ENOENT, errno.ENOTDIR):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


_STAYS_S = (0.0,) * 20 + (0.0002, 0.001, 0.003)
"""How long a decoy stays: mostly not at all, so that it comes and goes within what the daemon does with one name."""
_BURST_S, _REST_S = (0.02, 0.15), (0.02, 0.25)


class Swapper:
    """Exchanges names with their decoys and back, round and round, in bursts as fast as a thread can.

    pairs: (a path in the spool, its decoy beside the spool). At the end each path is what it was, or is not there.
    swaps: how often one took the place of the other.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], *, lock: threading.Lock | None = None) -> None:
        self._pairs = pairs
        self._lock = lock or threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._fault: BaseException | None = None
        self._luck = random.Random(len(pairs))
        self.swaps = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        if error is None and self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        try:
            rests_at = time.monotonic() + self._luck.uniform(*_BURST_S)
            for turn in itertools.count():
                if self._is_over.is_set():
                    return
                if time.monotonic() > rests_at:  # else nothing would ever be quiet for long enough to go up
                    self._is_over.wait(self._luck.uniform(*_REST_S))
                    rests_at = time.monotonic() + self._luck.uniform(*_BURST_S)
                for number, (path, decoy) in enumerate(self._pairs):
                    with self._lock:
                        self._swap(path, decoy, stays_s=_STAYS_S[(turn + number) % len(_STAYS_S)])
        except BaseException as error:
            self._fault = error

    def _swap(self, path: Path, decoy: Path, *, stays_s: float) -> None:
        target = os.readlink(decoy) if decoy.is_symlink() else None
        if not exchange(path, decoy):
            return
        self.swaps += 1
        if stays_s:
            self._is_over.wait(stays_s)
        if exchange(path, decoy):
            self.swaps += 1
            return
        # The decoy was taken away meanwhile, or a directory above it: the real one goes back, unless a newer one is there.
        real = decoy.with_name(f"{decoy.name}.real")
        os.rename(decoy, real)
        if target is not None:
            os.symlink(target, decoy)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError, NotADirectoryError):
            rename_back(real, path)


def rename_back(name: Path, to_name: Path) -> None:
    """Rename without overwriting. Raises FileExistsError."""
    if _libc.renameat2(-100, os.fsencode(name), -100, os.fsencode(to_name), 1) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(name), None, str(to_name))


# Trees


@contextmanager
def deep_tree(path: Path, depth: int, content: bytes = b"deep down") -> Iterator[None]:
    """Make a directory in a directory in …, with a file in the last one; it is gone afterwards, for nobody else can do that."""
    here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(depth):
            name = path.name if number == 0 else "d"
            os.mkdir(name, dir_fd=here)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = inner
        fd = os.open("deep.jpg", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
        os.write(fd, content)
        os.close(fd)
    finally:
        os.close(here)
    try:
        yield
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=True)


def bind(source: Path, target: Path) -> None:
    """Mount a file or directory over another; in a world with mounts of its own only."""
    flags = ctypes.c_ulong(4096)
    result = _libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None)
    assert result == 0, os.strerror(ctypes.get_errno())


def sparse(path: Path, size_bytes: int) -> Path:
    """Write a file that is nothing but a hole, but for its last byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size_bytes - 1)
        file.seek(size_bytes - 1)
        file.write(b"!")
    return path
