"""Writers against whoever moves their files away, and the verdict: what was lost, published half, failed in the app.

    with racing(root, server, bucket, rewrites=400, files=20) as race:
        ...                     # somebody moves the files
        race.reports(...)       # when the writers have ended
    verdicts = race.judge()     # when the mover has, too

The mover may be spoold or anybody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from spoold.demo import bound
from tests import writers
from tests.proxy import Fault, Request
from tests.servers import RcloneServer
from tests.writers import Report, Task

KINDS = ("replace", "truncate", "in place", "held", "mapped")


@dataclasses.dataclass(slots=True)
class Verdict:
    """What became of one writer's versions.

    taken: how often it found that its file had been moved. lost: versions that were finished and then nowhere, though
    none newer was begun; stale: those of them in whose place the bucket had an older one. half: PUTs and objects that
    were no whole version. saves_failed: because files or directories went under the app's hands.
    """

    writer: str
    rewrites: int
    taken: int
    lost: int
    stale: int
    half: int
    saves_failed: int
    examples: list[str]

    @property
    def figures(self) -> dict[str, str | int]:
        found = dataclasses.asdict(self)
        del found["examples"]
        return found

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.stale or self.half)


class Race:
    """Writers, each with its files below a directory of its own in the root."""

    def __init__(
        self, root: Path, server: RcloneServer, bucket: str, *, rewrites: int, files: int, kinds: Sequence[str] = KINDS,
        rest_s: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self._root = root
        self._bucket = server.directory / bucket
        temporary = root.with_name(f"{root.name}-tmp")
        temporary.mkdir(exist_ok=True)
        self._half: list[str] = []
        self._reports: list[Report] = []
        self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        self._tasks = [
            Task(
                kind, str(root), str(temporary), str(self._bucket), [path_of(kind, number) for number in range(files)],
                rewrites, rest_s, seed,
            )
            for kind in kinds
        ]  # fmt: skip

    def start(self) -> None:
        for task in self._tasks:
            command = [sys.executable, "-I", "-S", writers.__file__, json.dumps(dataclasses.asdict(task))]
            told = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `reports` or `kill`; a pipe may be too small for it
            self._running.append((bound(command, signal.SIGKILL, stdout=told), told))

    @property
    def is_on(self) -> bool:
        """Somebody still writes."""
        return any(process.poll() is None for process, _ in self._running)

    def stop(self) -> None:
        """Ask the writers to end in good order."""
        for process, _ in self._running:
            if process.poll() is None:
                process.terminate()

    def kill(self) -> None:
        for process, told in self._running:
            process.kill()
            process.wait()
            told.close()

    def reports(self, *, timeout_s: float) -> list[Report]:
        """Wait for the writers' ends and return what they tell."""
        while self._running:
            process, told = self._running[0]
            assert process.wait(timeout_s) == 0, "a writer ended in good order"
            told.seek(0)
            self._reports.append(Report(**json.loads(told.read())))
            told.close()
            self._running.pop(0)
        return self._reports

    def look_at(self, request: Request) -> Fault | None:
        """A rule for a proxy: remember every PUT that is no whole version, and leave the request alone."""
        if request.method == "PUT" and (path := request.key.partition("/")[2]) and not path.startswith(".spoold"):
            body = _unchunked(request)
            if writers.version_in(path, body) is None:
                self._half.append(f"{path}: {len(body)} bytes were put that are no whole version")
        return None

    def judge(self) -> list[Verdict]:
        """Look for the newest version of everything, on disk and in the bucket; nobody may move anything any more."""
        verdicts = []
        objects = files_in(self._bucket)
        for report in self._reports:
            examples = [f"{path}: version {version} was nowhere, the bucket had {has}" for path, version, has in report.lost]
            lost, stale = len(report.lost), sum(has is not None for _, _, has in report.lost)
            for path, newest in report.newest.items():
                in_bucket = writers.version_in(path, objects[path]) if path in objects else None
                if newest in (in_bucket, _version_at(path, self._root / path)):
                    continue
                lost += 1
                stale += in_bucket is not None
                examples.append(f"{path}: version {newest} is nowhere, the bucket has {in_bucket}")
            prefix = f"{report.kind}/"
            half = [why for why in self._half if why.startswith(prefix)]
            half += [
                f"{path}: the bucket holds {len(body)} bytes that are no whole version" for path, body in objects.items()
                if path.startswith(prefix) and writers.version_in(path, body) is None
            ]  # fmt: skip
            verdicts.append(
                Verdict(
                    report.kind, report.rewrites, report.taken, lost, stale, len(half), sum(report.failed.values()),
                    (examples + half + [f"{step} failed {n} times" for step, n in report.failed.items()])[:10],
                )
            )  # fmt: skip
        return verdicts


@contextlib.contextmanager
def racing(
    root: Path, server: RcloneServer, bucket: str, *, rewrites: int, files: int, kinds: Sequence[str] = KINDS,
    rest_s: float = 1.0, seed: int = 0,
) -> Iterator[Race]:  # fmt: skip
    """Have writers write for the block; whoever still does at its end is killed."""
    race = Race(root, server, bucket, rewrites=rewrites, files=files, kinds=kinds, rest_s=rest_s, seed=seed)
    try:
        race.start()
        yield race
    finally:
        race.kill()


def path_of(kind: str, number: int) -> str:
    """Return where a writer's file lies, in the layout :attachment/:id/:style/:basename.:extension."""
    return f"{kind}/{number}/original/me.dat"


def files_in(directory: Path) -> dict[str, bytes]:
    """Return what lies below a directory, by path, outside spoold's own house. Things may go while we look."""
    found = {}
    for inner, directories, names in os.walk(directory):
        if ".spoold" in directories:
            directories.remove(".spoold")
        for path in (Path(inner, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def _version_at(path: str, place: Path) -> int | None:
    try:
        return writers.version_in(path, place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _unchunked(request: Request) -> bytes:
    """Return a PUT's payload without the chunks that some clients send it in, each with a signature of its own."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    if "aws-chunked" not in headers.get("content-encoding", "") and "STREAMING" not in headers.get("x-amz-content-sha256", ""):
        return request.body
    payload, rest = b"", request.body
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head.partition(b";")[0] or b"0", 16)
        if not size:
            break
        payload, rest = payload + rest[:size], rest[size + 2 :]
    return payload


# Filesystems


def filesystem_of(path: Path) -> str:
    """Return the kind of filesystem that a path lies on."""
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def mounted(kind: str, directory: Path, *, size_mb: int = 512, at: str = "") -> Iterator[Path]:
    """Mount a new filesystem on `directory/KIND`, or `directory/AT`, for the block; skips the test where we cannot."""
    place = directory / (at or kind)
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "spoold-test", str(place)]
    else:
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"mkfs.{kind} is not installed")
        image = directory / f"{kind}.img"
        with image.open("wb") as file:
            file.truncate(size_mb << 20)
        subprocess.run([f"mkfs.{kind}", str(image)], check=True, capture_output=True)
        mount = ["mount", "-t", kind, "-o", "loop", str(image), str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not mount {kind}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
