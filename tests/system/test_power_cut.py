"""The power is cut at any moment, of the disk that holds spool and ledger or of one of two (FACTS 16): what is true then.

A file that the app never synced may come back empty, short, or as an older version: that is what a power cut does. Nothing of
it may overwrite what was proven in the bucket, and nothing of what lies whole on the disk may be lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from tests import figures
from tests.disk import FILESYSTEMS, run, why_not
from tests.paperclip import App
from tests.parts import in_a_world, with_own_mounts
from tests.power import Cut, Judged, Recording, recorded
from tests.proxy import FaultProxy
from tests.syncing import ways

T = TypeVar("T")


def cuts_of(
    directory: Path, filesystem: str, count: int, *, cut: Cut = "everything", seconds: float = 6.0, seed: int = 1
) -> list[Judged]:
    """Let them work once, cut so many times at random, and return what came of each."""

    def work() -> list[Judged]:
        with recorded(directory, FILESYSTEMS[filesystem], cut=cut, seconds=seconds, seed=seed) as recording:
            moments = recording.choose(random.Random(seed), count)
            return [recording.judge(moment, number) for number, moment in enumerate(moments)]

    found = in_a_world_of(filesystem, work)
    figures.record(
        "power-cut", filesystem=filesystem, cut=cut, images=len(found), files=sum(judged.found.total() for judged in found),
        reverted_or_emptied=sum(judged.damaged for judged in found), blocks_lost=sum(judged.blocks_lost for judged in found),
        overwritten=sum(len(judged.overwritten) for judged in found), lost=sum(len(judged.lost) for judged in found),
    )  # fmt: skip
    return found


def in_a_world_of(filesystem: str, work: Callable[[], T]) -> T:
    if reason := why_not(FILESYSTEMS[filesystem]):
        pytest.skip(f"no disk whose power can be cut: {reason}")
    return in_a_world(work, with_own_mounts)


@pytest.mark.timeout(300)
def test_after_a_power_cut_nothing_good_is_overwritten_and_nothing_is_lost(tmp_path: Path) -> None:
    found = cuts_of(tmp_path, "ext4", 3)

    assert sum(judged.damaged for judged in found) > 0, "a cut that damages nothing shows nothing"
    for judged in found:
        judged.demand_laws()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("filesystem", "cut"),
    [
        ("ext4", "everything"), ("ext4 noauto_da_alloc", "everything"), ("xfs", "everything"), ("btrfs", "everything"),
        ("ext4", "spool and ledger apart"), ("ext4", "only the spool"), ("ext4", "only the ledger"),
        ("xfs", "spool and ledger apart"), ("btrfs", "spool and ledger apart"),
    ],
)  # fmt: skip
def test_after_a_power_cut_at_any_moment_of_a_busy_minute(tmp_path: Path, filesystem: str, cut: Cut) -> None:
    """A minute: the kernel writes back what is 30 s old, and ext4 commits every 5 s."""
    found = cuts_of(tmp_path, filesystem, 25, cut=cut, seconds=50.0, seed=2)

    assert 25 == len(found)
    for judged in found:
        judged.demand_laws()


# What the test is worth


def replaced_in_the_bucket(recording: Recording, app: App, proxy: FaultProxy) -> None:
    """Have a version on the disk, for good, and then a newer one in the bucket."""
    recording.save(app, 1, "paper.pdf", {"original": b"the first version"})
    proxy.await_ended("PUT", "paper.pdf", timeout_s=60)
    run("sync", "-f", str(recording.root))
    recording.save(app, 1, "paper.pdf", {"original": b"the second version"})
    proxy.await_ended("PUT", "paper.pdf", count=2, timeout_s=60)


def after_the_second_version(directory: Path, filesystem: str, environment: Mapping[str, str]) -> tuple[bool, Judged]:
    """Cut when it is in the bucket; say whether the first lies on the disk again, and what comes of it."""

    def work() -> tuple[bool, Judged]:
        with recorded(
            directory, FILESYSTEMS[filesystem], cut="spool and ledger apart", environment=environment,
            script=replaced_in_the_bucket,
        ) as recording:  # fmt: skip
            at = recording.seen[-1].ended_at or 0.0
            return recording.reverts((at, at), 0), recording.judge((at, at), 0)

    return in_a_world_of(filesystem, work)


@pytest.mark.timeout(300)
def test_a_daemon_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    """Without fsync the older version comes back, and goes up over the newer one."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.fsync = lambda fd: None\n")

    reverts, judged = after_the_second_version(tmp_path, "ext4", {"PYTHONPATH": str(tmp_path)})

    assert reverts
    assert ["papers/1/original/paper.pdf: the bucket went from version 1 to 0"] == judged.overwritten


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_which_ways_of_syncing_hold(tmp_path: Path, filesystem: str, way: str) -> None:
    """Measured, not asserted: what a way of syncing does by the way, a file system need not do for ever."""
    root = Path(__file__).parents[2]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n"
                                               f"from tests.syncing import install\ninstall({way!r})\n")  # fmt: skip

    reverts, judged = after_the_second_version(tmp_path, filesystem, {"PYTHONPATH": str(tmp_path)})

    figures.record("sync-holds", variant=way, filesystem=filesystem, holds=not (reverts or judged.overwritten))
    assert not reverts or way in ("files only", "each file, its own directory")


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
@pytest.mark.timeout(300)
@pytest.mark.soak
def test_a_daemon_that_syncs_finds_no_older_version_on_the_disk_than_in_the_bucket(tmp_path: Path, filesystem: str) -> None:
    reverts, judged = after_the_second_version(tmp_path, filesystem, {})

    assert not reverts
    judged.demand_laws()
