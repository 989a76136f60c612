"""Ways of making a record durable before it is uploaded, to measure what each costs and to see by power cuts which hold."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Sync = Callable[[Path, Sequence[str]], None]
"""(root, paths of a record's files below it) → all of them survive a power cut, and so do their names."""

_libc = ctypes.CDLL(None, use_errno=True)
_fsync = os.fsync  # as it was before anybody replaced it
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, do not wait


def directories_of(paths: Iterable[str]) -> list[str]:
    """Return the directories of these files and all above them up to the root, the innermost first."""
    parts = [path.split("/")[:-1] for path in paths]
    return sorted(
        {"/".join(each[:depth]) for each in parts for depth in range(len(each) + 1)}, key=lambda d: -d.count("/") - bool(d)
    )


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def each(root: Path, paths: Sequence[str]) -> None:
    """fsync each file and each directory, up to the root."""
    for path in (*paths, *directories_of(paths)):
        sync_file(root / path)


def files_only(root: Path, paths: Sequence[str]) -> None:
    """fsync each file: its name is as durable as the file system makes it by the way."""
    for path in paths:
        sync_file(root / path)


def nearest(root: Path, paths: Sequence[str]) -> None:
    """fsync each file and the directory it lies in, none above."""
    for path in (*paths, *{os.path.dirname(path) for path in paths}):
        sync_file(root / path)


def out_first(root: Path, paths: Sequence[str]) -> None:
    """Have all files written out at the same time, then as `each`: the first fsync commits for the others."""
    for path in paths:
        fd = os.open(root / path, os.O_RDONLY)
        try:
            _libc.sync_file_range(fd, ctypes.c_longlong(0), ctypes.c_longlong(0), ctypes.c_uint(_WRITE))
        finally:
            os.close(fd)
    each(root, paths)


class WhileUnchanged:
    """As `each`, but a directory whose times are as they were when it was synced last is not synced again.

    Its times are taken before the fsync, and count only if they were no longer of this moment: a change within the same tick
    of the kernel's clock would not move them.
    """

    _TICK_NS = 20_000_000

    def __init__(self) -> None:
        self._synced: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, root: Path, paths: Sequence[str]) -> None:
        for path in paths:
            sync_file(root / path)
        for path in directories_of(paths):
            fd = os.open(root / path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                now = os.stat(fd)
                which, times = (now.st_dev, now.st_ino), (now.st_mtime_ns, now.st_ctime_ns)
                if self._synced.get(which) == times:
                    continue
                is_quiet = time.time_ns() - now.st_ctime_ns > self._TICK_NS
                _fsync(fd)
                if is_quiet:
                    self._synced[which] = times
            finally:
                os.close(fd)


def syncfs(root: Path, paths: Sequence[str]) -> None:
    """Have the whole file system written out: of whoever else writes to it too."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(fd)


class Shared:
    """One syncfs for all who came before it began."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = self._done = 0
        self._runs = False

    def __call__(self, root: Path, paths: Sequence[str]) -> None:
        with self._changed:
            wanted = self._begun + 1  # one that begins from now on
            while self._done < wanted:
                if self._runs:
                    self._changed.wait()
                    continue
                self._runs = True
                self._begun += 1
                mine = self._begun
                self._changed.release()
                try:
                    syncfs(root, paths)
                finally:
                    self._changed.acquire()
                    self._runs = False
                    self._done = mine
                    self._changed.notify_all()


def ways() -> dict[str, Sync]:
    return {
        "each file, each directory": each,
        "written out first, then each": out_first,
        "each file, directories while unchanged": WhileUnchanged(),
        "each file, its own directory": nearest,
        "files only": files_only,
        "syncfs": syncfs,
        "one syncfs for all who wait": Shared(),
    }


def install(name: str) -> None:
    """Have the daemon of this process sync in this way; for `sitecustomize`."""
    import spoold.spool
    import spoold.uploader

    sync = ways()[name]
    prepare = spoold.uploader.Uploader.prepare

    def prepare_so(self, batch, *, fingerprint):  # type: ignore[no-untyped-def]
        sync(self._spool.root, [file.file.path for file in batch.uploads if not file.is_gone])
        return prepare(self, batch, fingerprint=fingerprint)

    os.fsync = lambda fd: None
    spoold.uploader.begin_to_write_out = lambda fd: None
    spoold.uploader.Uploader.prepare = prepare_so  # type: ignore[method-assign]
