"""What it costs to make a record durable, in several ways, before it is uploaded (FACTS 16)."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import figures
from tests.disk import FILESYSTEMS, Disk, run, why_not
from tests.paperclip import App
from tests.parts import in_a_world, with_own_mounts
from tests.syncing import Sync, ways

_SIZES = {"original": 300_000, "medium": 30_000, "thumb": 4_000}
_SECONDS = 0.6
_ROUNDS = 5  # in turn, so that whatever else the machine does is shared by all


def on(filesystem: str, directory: Path, work: Callable[[Path], None]) -> None:
    """Do the work on this machine's own disk, or on an image of a file system that lies on it."""
    if filesystem == "this disk":
        work(directory)
        return
    if reason := why_not(FILESYSTEMS[filesystem]):
        pytest.skip(reason)

    def in_image() -> None:
        image, point = directory / "image", directory / "mounted"
        with image.open("wb") as file:
            file.truncate(2 << 30)
        run(*FILESYSTEMS[filesystem].make, str(image))
        point.mkdir()
        run("mount", "-o", "loop", str(image), str(point))
        try:
            work(point)
        finally:
            subprocess.run(["umount", str(point)], check=True)

    in_a_world(in_image, with_own_mounts)


def records_per_s(directory: Path, sync: Sync, threads: int) -> float:
    """Save and sync records in so many threads for a while, and say how many a second could be synced in them."""
    spent = save_and_sync(directory / f"spool-{time.monotonic_ns()}", sync, threads, None)
    return threads * len(spent) / sum(spent)


def save_and_sync(root: Path, sync: Sync, threads: int, records: int | None) -> list[float]:
    """Save and sync so many records, or as many as there is time for; return how long each took to sync."""
    root.mkdir()
    until = time.monotonic() + _SECONDS
    spent: list[float] = []

    def work(thread: int) -> None:
        app = App(root)
        number = 0
        while time.monotonic() < until if records is None else number < records // threads:
            number += 1
            content = {style: number.to_bytes(4, "big") * (size // 4) for style, size in _SIZES.items()}
            paths = app.save("avatars", thread * 10**6 + number, "me.jpg", content)
            began = time.monotonic()
            sync(root, [str(path.relative_to(root)) for path in paths.values()])
            spent.append(time.monotonic() - began)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return spent


class Neighbour:
    """Somebody who writes much to the same file system and syncs nothing."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "neighbour"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink()

    def _write(self) -> None:
        chunk = b"n" * (4 << 20)
        with self._path.open("wb", buffering=0) as file:
            while not self._stop.wait(0.05):  # 80 MB a second at most
                file.write(chunk)
                if file.tell() >= 256 << 20:
                    file.seek(0)


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.parametrize("filesystem", ["this disk", "ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("has_neighbour", [False, True], ids=["alone", "beside a writer"])
def test_records_a_second(tmp_path: Path, filesystem: str, has_neighbour: bool) -> None:
    def work(directory: Path) -> None:
        for threads in (1, 8):
            rates: dict[str, list[float]] = {way: [] for way in ways()}
            with Neighbour(directory) if has_neighbour else contextlib.nullcontext():
                for _ in range(_ROUNDS):
                    for way, sync in ways().items():
                        rates[way].append(records_per_s(directory, sync, threads))
            for way, found in rates.items():
                figures.record(
                    "sync-cost", variant=way, filesystem=filesystem, threads=threads, neighbour=has_neighbour,
                    records_per_s=round(statistics.median(found), 1),
                )  # fmt: skip

    on(filesystem, tmp_path, work)


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_flushes_a_record(tmp_path: Path, filesystem: str) -> None:
    """What a busy machine does not blur: how often the disk must empty its cache, and how much is written to it."""
    if reason := why_not(FILESYSTEMS[filesystem]):
        pytest.skip(reason)

    def work() -> None:
        for threads in (1, 8):
            for number, (way, sync) in enumerate(ways().items()):
                with Disk(tmp_path / f"{threads}-{number}", FILESYSTEMS[filesystem]) as disk:
                    with disk.mounted(tmp_path / "mounted") as point:
                        records = 40 * threads
                        began = time.monotonic()
                        save_and_sync(point / "spool", sync, threads, records)
                        ended = time.monotonic()
                    flushes, written = disk.between(began, ended)
                figures.record(
                    "sync-flushes", variant=way, filesystem=filesystem, threads=threads, records=records,
                    flushes_per_record=round(flushes / records, 2), written_kb_per_record=round(written / records / 1000, 1),
                )  # fmt: skip

    in_a_world(work, with_own_mounts)
