"""Five kinds of writers that rewrite files while somebody moves them away, and remember what they finished.

Each is a process of its own:

    python tests/writers.py '{"kind": "replace", "root": "/…/spool", …}'     # its report is a line of JSON, at the end

Whenever a writer comes to a file again, the version that it finished last must be found: where it was written, in the
bucket, or set aside. If it is nowhere, it was lost. Only the standard library is imported here, for the processes' sake.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

PATIENCE_S = 0.5
"""How long a version may be nowhere: it may be renamed while we look here and there."""

_IN_A_BURST_S = 0.03
_AFTER_IT_WENT_UP_S = 0.05
_LURKS_AT_MOST_S = 60.0

OLD = 1_234_567_890
"""The mtime which writers in place restore."""


# What is written


def content(path: str, version: int) -> bytes:
    """Return what this version of this path is: no two are alike in any 64 bytes, but all of one path are of one size."""
    head = f"{path}\n{version}\n".encode().ljust(64)
    size = 200 + int.from_bytes(hashlib.sha256(path.encode()).digest()[:2]) % 20_000  # from one page to six
    block = hashlib.sha256(head).hexdigest().encode()
    return (head + block * (size // 64 + 1))[:size]


def version_in(path: str, found: bytes) -> int | None:
    """Return which version of the path this is; None if it is not one whole version of it."""
    with contextlib.suppress(ValueError, IndexError):
        version = int(found[:64].split(b"\n")[1])
        if found == content(path, version):
            return version
    return None


class Witness:
    """Finds versions: where they were written, in the bucket, set aside.

    bucket: the S3 server's directory of it; asking the server would cost it the time that the race needs.
    """

    def __init__(self, root: str, bucket: str) -> None:
        self._root = root
        self._bucket = bucket

    def sees(self, path: str, version: int) -> bool:
        """Say whether this version is somewhere. One that is renamed at this moment may be overlooked."""
        return version in (self.on_disk(path), self.in_bucket(path)) or self._is_aside(path, version)

    def on_disk(self, path: str) -> int | None:
        return _version_at(path, os.path.join(self._root, path))

    def in_bucket(self, path: str) -> int | None:
        return _version_at(path, os.path.join(self._bucket, path))

    def _is_aside(self, path: str, version: int) -> bool:
        aside = os.path.join(self._root, ".spoold", "aside")
        ending = f".{quote(path, safe=' ')}"
        with contextlib.suppress(FileNotFoundError):
            return any(
                _version_at(path, os.path.join(aside, name)) == version for name in os.listdir(aside) if name.endswith(ending)
            )
        return False


def _version_at(path: str, place: str) -> int | None:
    try:
        with open(place, "rb") as file:
            return version_in(path, file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None


# What is told


@dataclass(frozen=True, slots=True)
class Task:
    """What a writer is to do.

    paths: below `root`. temporary: a directory on the same filesystem. bucket: the S3 server's directory of it.
    rest_s: how long a file rests, on average, after a burst of some versions. Now and then a writer lurks instead: it comes
    again just after its version has gone up, when a mover is about to let go of the file.
    rewrites: then it ends; it ends earlier, and in good order too, at SIGTERM.
    """

    kind: str
    root: str
    temporary: str
    bucket: str
    paths: list[str]
    rewrites: int
    rest_s: float
    seed: int


@dataclass(slots=True)
class Report:
    """What a writer has done and met.

    newest: path → the version that was finished last. taken: how often a file had been moved away when it came again.
    failed: where a save failed because somebody took a file or directory away under our hands → how often.
    lost: path, version, and the version that the bucket held in its place, if any.
    """

    kind: str
    rewrites: int = 0
    taken: int = 0
    newest: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    lost: list[tuple[str, int, int | None]] = field(default_factory=list)


# The writers


class Writer:
    """Rewrites its files until it is done or told to stop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._chance = random.Random(f"{task.seed} {task.kind}")
        self._report = Report(task.kind)
        self._witness = Witness(task.root, task.bucket)
        self._missing_since: dict[str, float] = {}
        self._lurking: dict[str, float] = {}  # path → until when, at most
        self._held: dict[str, tuple[int, int]] = {}  # path → descriptor, how many versions are still written into it
        self._is_stopped = False
        writers: dict[str, Callable[[str, bytes], None]] = {
            "replace": self._replace,
            "truncate": self._truncate,
            "in place": self._in_place,
            "held": self._write_held,
            "mapped": self._write_mapped,
        }
        self._write = writers[task.kind]

    def stop(self) -> None:
        self._is_stopped = True

    def run(self) -> Report:
        """Write until all is done; see after the last versions, too, since nobody comes to them again."""
        now = time.monotonic()
        due = [(now + self._chance.random() * self._task.rest_s, path) for path in self._task.paths]
        heapq.heapify(due)
        while self._report.rewrites < self._task.rewrites and not self._is_stopped:
            at, path = due[0]
            time.sleep(max(0.0, at - time.monotonic()))
            if path in self._lurking:
                pause_s = self._lurk(path)
            elif self._is_there_or_given_up(path):
                version = self._report.newest.get(path, 0) + 1
                self._write(path, content(path, version))
                self._report.newest[path] = version
                self._report.rewrites += 1
                pause_s = self._pause_s(path)
            else:
                pause_s = 0.01
            heapq.heapreplace(due, (time.monotonic() + pause_s, path))
        for fd, _ in self._held.values():
            os.close(fd)
        return self._report

    # When to come again

    def _pause_s(self, path: str) -> float:
        chance = self._chance.random()
        if chance < 0.03:
            self._lurking[path] = time.monotonic() + _LURKS_AT_MOST_S
            return 0.02
        return self._chance.expovariate(1 / (self._task.rest_s if chance < 0.4 else _IN_A_BURST_S))

    def _lurk(self, path: str) -> float:
        """Return in how many seconds to look again whether it has gone up, or to write, when it has."""
        version = self._report.newest[path]
        may_go_up = self._witness.on_disk(path) == version and self._witness.in_bucket(path) != version
        if may_go_up and time.monotonic() < self._lurking[path]:
            return 0.02
        del self._lurking[path]
        return self._chance.expovariate(1 / _AFTER_IT_WENT_UP_S)

    # Has it survived?

    def _is_there_or_given_up(self, path: str) -> bool:
        """Say whether the newest version is somewhere; it counts as lost once it was nowhere for too long."""
        version = self._report.newest.get(path)
        if version is None or self._witness.on_disk(path) == version:
            self._missing_since.pop(path, None)
            return True
        since = self._missing_since.setdefault(path, time.monotonic())
        if not self._witness.sees(path, version):
            if time.monotonic() - since < PATIENCE_S:
                return False
            self._report.lost.append((path, version, self._witness.in_bucket(path)))
        self._report.taken += 1
        del self._missing_since[path]
        return True

    # The five kinds

    def _replace(self, path: str, whole: bytes) -> None:
        """As Paperclip: a temporary file, a rename onto the name, chmod by name."""
        temporary = os.path.join(self._task.temporary, f"{os.getpid()}")
        with open(temporary, "wb") as file:
            file.write(whole)
        final = os.path.join(self._task.root, path)
        self._insisting("rename", path, lambda: os.rename(temporary, final))
        try:
            os.chmod(final, 0o644)
        except FileNotFoundError:
            self._fail("chmod")

    def _truncate(self, path: str, whole: bytes) -> None:
        fd = self._opened(path)
        os.ftruncate(fd, 0)
        self._write_pieces(fd, whole)
        os.close(fd)

    def _in_place(self, path: str, whole: bytes) -> None:
        """Neither size nor mtime tell that it is another version."""
        fd = self._opened(path)
        self._write_pieces(fd, whole)
        os.utime(fd, (OLD, OLD))
        os.close(fd)

    def _write_held(self, path: str, whole: bytes) -> None:
        """Keep the descriptor over some versions; never look whether its name still leads to it."""
        fd, left = self._held.pop(path, None) or (self._opened(path), self._chance.randint(1, 5))
        self._write_pieces(fd, whole)
        if left > 1:
            self._held[path] = fd, left - 1
        else:
            os.close(fd)

    def _write_mapped(self, path: str, whole: bytes) -> None:
        fd = self._opened(path)
        if os.fstat(fd).st_size != len(whole):
            os.ftruncate(fd, len(whole))
        with mmap.mmap(fd, len(whole)) as mapped:
            os.close(fd)
            for start, piece in self._pieces(whole):
                mapped[start : start + len(piece)] = piece
            if self._chance.random() < 0.5:
                mapped.flush()

    def _write_pieces(self, fd: int, whole: bytes) -> None:
        for start, piece in self._pieces(whole):
            os.pwrite(fd, piece, start)

    def _pieces(self, whole: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield it at once, or in two pieces with some time between them: a few thousandths, or once in a while a tenth."""
        chance = self._chance.random()
        if chance > 0.25:
            yield 0, whole
            return
        middle = self._chance.randrange(len(whole))
        yield 0, whole[:middle]
        time.sleep(self._chance.random() * (0.15 if chance < 0.01 else 0.004))
        yield middle, whole[middle:]

    # The way there

    def _opened(self, path: str) -> int:
        """Open for writing, made anew if it has gone."""
        final = os.path.join(self._task.root, path)
        return int(self._insisting("open", path, lambda: os.open(final, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)))

    def _insisting(self, step: str, path: str, act: Callable[[], Any]) -> Any:
        """Make the directories and act; where somebody takes them away in between, a save fails, and is tried again."""
        parent = os.path.dirname(os.path.join(self._task.root, path))
        while True:
            try:
                os.makedirs(parent, exist_ok=True)
                return act()
            except FileNotFoundError:
                self._fail(step)

    def _fail(self, step: str) -> None:
        self._report.failed[step] = self._report.failed.get(step, 0) + 1


def main() -> None:
    writer = Writer(Task(**json.loads(sys.argv[1])))
    signal.signal(signal.SIGTERM, lambda *_: writer.stop())
    print(json.dumps(asdict(writer.run())))


if __name__ == "__main__":
    main()
