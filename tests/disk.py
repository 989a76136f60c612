"""A disk whose power can be cut: every write and every flush is remembered, so any moment of it can be had again.

    with Disk(tmp_path / "disk", FILESYSTEMS["ext4"]) as disk:
        with disk.mounted(mount_point):
            ...                                       # programs write; nothing is frozen, nothing is slowed
        disk.cut(moment, chance)                      # what a power cut at that moment may have left
        with disk.mounted(mount_point): ...

A file system's cut is only as real as what it loses. Here a loop device lies over a file of our own FUSE server: what is
still dirty in the kernel's cache has not come to us at all, and of what came since the last flush any block may be missing,
as in a disk's own cache. What was flushed is there. That is all a file system may rely on, so no order is broken that holds
on a real disk.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spoold.demo import bound

_BLOCK = 4096
_ENTRY = struct.Struct("<dQI")  # when it came, seconds, monotonic; offset; bytes that follow, 0 for a flush
_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81


@dataclass(frozen=True, slots=True)
class Filesystem:
    """How a file system is made and mounted. size: bytes, mostly a hole."""

    kind: str
    make: tuple[str, ...]
    options: str = "defaults"
    size: int = 256 << 20


_EXT4 = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0")
FILESYSTEMS = {
    "ext4": Filesystem("ext4", _EXT4),
    "ext4 data=writeback": Filesystem("ext4", _EXT4, "data=writeback"),
    "ext4 noauto_da_alloc": Filesystem("ext4", _EXT4, "noauto_da_alloc"),
    "xfs": Filesystem("xfs", ("mkfs.xfs", "-q", "-f", "-K"), size=320 << 20),
    "btrfs": Filesystem("btrfs", ("mkfs.btrfs", "-q", "-f", "-K"), size=2 << 30),
}


def why_not(filesystem: Filesystem) -> str | None:
    """Say why no such disk can be had on this machine; None if it can."""
    if os.geteuid() != 0:
        return "only root may mount"
    if shutil.which(filesystem.make[0]) is None:
        return f"there is no {filesystem.make[0]}"
    for path in ("/dev/fuse", "/dev/loop-control"):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            return f"open {path}: {error.strerror}"
    if filesystem.kind not in Path("/proc/filesystems").read_text().split():
        return f"the kernel has no {filesystem.kind}"
    return None


class Disk:
    """One disk, by context. Its device keeps its number for as long, as that of a machine's own disk does over a boot."""

    def __init__(self, directory: Path, filesystem: Filesystem) -> None:
        directory.mkdir(parents=True)
        self._filesystem = filesystem
        self._blank, self._now, self._log = (directory / name for name in ("blank", "now", "log"))
        self._served = directory / "served"
        self._number = -1
        self._history: list[tuple[float, int, int, int]] = []  # when, offset, size, where in the log
        with self._blank.open("wb") as file:
            file.truncate(filesystem.size)
        subprocess.run([*filesystem.make, str(self._blank)], check=True, stdout=subprocess.DEVNULL)
        self._restore()

    def __enter__(self) -> Self:
        with open("/dev/loop-control", "rb") as control:
            for number in random.sample(range(1000, 9999), 50):
                with suppress(FileExistsError):
                    self._number = fcntl.ioctl(control, _LOOP_CTL_ADD, number)
                    return self
        raise AssertionError("no loop device is free")

    def __exit__(self, *_: object) -> None:
        with open("/dev/loop-control", "rb") as control:
            for _ in range(100):
                try:
                    fcntl.ioctl(control, _LOOP_CTL_REMOVE, self._number)
                    return
                except OSError as error:
                    assert error.errno == errno.EBUSY
                    time.sleep(0.02)  # the kernel lets go of it in its own time

    @property
    def _device(self) -> str:
        return f"/dev/loop{self._number}"

    @contextmanager
    def mounted(self, point: Path, *, remembers: bool = True) -> Iterator[Path]:
        """Have the disk as it is now mounted at `point`. remembers: what is written can be had again by `cut`."""
        point.mkdir(exist_ok=True)
        with self._serving() if remembers else _nothing():
            run("losetup", self._device, str(self._served if remembers else self._now))
            try:
                run("mount", "-t", self._filesystem.kind, "-o", self._filesystem.options, self._device, str(point))
            finally:
                run("losetup", "-d", self._device)  # as soon as nobody has it mounted any more, however that comes
            try:
                yield point
            finally:
                _unmount(point)
                self._await_free()
        if remembers:
            self._history = list(_history(self._log))

    def _await_free(self) -> None:
        deadline = time.monotonic() + 10
        while Path(f"/sys/block/loop{self._number}/loop/backing_file").exists():
            assert time.monotonic() < deadline, f"{self._device} is in use: who has a file open there?"
            time.sleep(0.01)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Serve the image as a file whose every write is remembered."""
        self._served.touch()
        command = [sys.executable, "-m", "tests.disk", str(self._served), str(self._now), str(self._log)]
        server = bound(command, signal.SIGKILL, cwd=Path(__file__).parents[1])
        try:
            deadline = time.monotonic() + 10
            while not os.path.ismount(self._served):
                assert server.poll() is None and time.monotonic() < deadline, "the FUSE server did not start"
                time.sleep(0.01)
            yield
        finally:
            _unmount(self._served)
            server.wait(10)

    def _restore(self) -> None:
        run("cp", "--sparse=always", str(self._blank), str(self._now))

    # What a power cut leaves

    @property
    def moments(self) -> list[float]:
        """Return when something was written or flushed, monotonic seconds."""
        return [when for when, *_ in self._history]

    def between(self, begin: float, end: float) -> tuple[int, int]:
        """Return how many flushes there were between two moments, and how many bytes were written."""
        sizes = [size for when, _, size, _ in self._history if begin <= when <= end]
        return sizes.count(0), sum(sizes)

    def cut(self, at: float, chance: random.Random | None = None, *, keeps: float = 1.0) -> int:
        """Make the disk what a power cut at this moment may have left of it; return how many blocks of its cache it lost.

        keeps: the share of the blocks that were written since the last flush and are there all the same, drawn by `chance`.
        """
        self._restore()
        until = bisect.bisect_right(self.moments, at)
        flushed = max((n for n in range(until) if not self._history[n][2]), default=-1)
        lost = 0
        with self._log.open("rb") as log, self._now.open("r+b") as image:
            for number, (_, offset, size, where) in enumerate(self._history[:until]):
                log.seek(where)
                content = log.read(size)
                for start in range(0, size, _BLOCK if number > flushed else max(size, 1)):
                    if number > flushed and chance is not None and chance.random() >= keeps:
                        lost += 1
                        continue
                    image.seek(offset + start)
                    image.write(content[start : start + _BLOCK] if number > flushed else content)
        return lost


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def run(*command: str) -> str:
    """Run a command to its end and return what it printed; what it complains of fails the test."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _unmount(point: Path) -> None:
    for _ in range(100):
        if subprocess.run(["umount", str(point)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.05)  # somebody still looks at it
    subprocess.run(["umount", "-l", str(point)], check=False)
    raise AssertionError(f"{point} was busy for 5 s: who has a file open there?")


def _history(log: Path) -> Iterator[tuple[float, int, int, int]]:
    with log.open("rb") as file:
        where = 0
        while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
            when, offset, size = _ENTRY.unpack(head)
            where += _ENTRY.size
            yield when, offset, size, where
            where += size
            file.seek(where)


# The server: one file in FUSE, spoken as the kernel does (linux/fuse.h)

_IN, _OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QII6Q10I")
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_AT = struct.Struct("<QQI")  # handle, offset, size: how READ and WRITE begin
_GETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _INIT = 3, 14, 15, 16, 18, 20, 25, 26
_FORGETS = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET want no answer
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_MOST = 1 << 20


def serve(point: str, image: str, log: str) -> None:
    """Serve `image` as the file `point`, until that is unmounted, and append every write and flush to `log`."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=100600,user_id=0,group_id=0,max_read={_MOST}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"spoold-disk", point.encode(), b"fuse", 2 | 4, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    disk = os.open(image, os.O_RDWR)
    size = os.fstat(disk).st_size
    memory = open(log, "wb", buffering=0)  # noqa: SIM115 - as long as the process
    while True:
        try:
            request = os.read(fuse, _MOST + 8192)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            raise
        _, operation, unique, *_ = _IN.unpack_from(request)
        body = memoryview(request)[_IN.size :]
        if operation in _FORGETS:
            continue
        failure, answer = 0, b""
        if operation == _INIT:
            flags = struct.unpack_from("<IIII", body)[3] & (_BIG_WRITES | _MAX_PAGES)
            answer = _INIT_OUT.pack(7, 31, _MOST, flags, 16, 12, _MOST, 1, _MOST // _BLOCK, 0, 0, 0)
        elif operation == _GETATTR:
            blocks = -(-size // 512)
            answer = _ATTRIBUTES.pack(3600, 0, 0, 1, size, blocks, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, _BLOCK, 0)
        elif operation == _OPEN:
            answer = struct.pack("<QIi", 1, 0, 0)
        elif operation == _READ:
            _, offset, length = _AT.unpack_from(body)
            answer = os.pread(disk, length, offset)
        elif operation == _WRITE:
            _, offset, length = _AT.unpack_from(body)
            content = body[40 : 40 + length]
            memory.write(b"".join((_ENTRY.pack(time.monotonic(), offset, length), content)))
            os.pwrite(disk, content, offset)
            answer = struct.pack("<II", length, 0)
        elif operation == _FSYNC:
            memory.write(_ENTRY.pack(time.monotonic(), 0, 0))
        elif operation not in (_RELEASE, _FLUSH):
            failure = -errno.ENOSYS
        with suppress(FileNotFoundError):  # it was interrupted
            os.write(fuse, _OUT.pack(_OUT.size + len(answer), failure, unique) + answer)


if __name__ == "__main__":
    serve(*sys.argv[1:])
