"""What the kernel does not tell: dropped events, too few watches, roots that come and go. All goes up within one sweep."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.figures import record
from tests.paperclip import App, picture
from tests.parts import in_a_world, mount_tmpfs, with_own_mounts
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

DEADLINE_S = 90.0
NEVER = "1h"  # no sweep but those that the fault itself brings about
SWEEP_S = 2.0
JPEG = picture(16, 12)
SOON = {  # what takes half a minute, so that it costs nothing
    **BRISK,
    "spoold.watcher._HEALTH_EVERY_S": 0.2,
    "spoold.watcher._BLIND_SWEEP_EVERY_S": SWEEP_S,
}


def site_of(directory: Path, server: RcloneServer, *, sweep_every: str = NEVER, **spool: Any) -> Site:
    site = Site(directory, server, spool={"sweep_every": sweep_every, **spool})
    site.settings["log"]["level"] = "info"
    site.write_config()
    return site


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer) -> Site:
    return site_of(tmp_path, rclone_server)


def save(root: Path, ids: Iterable[int], *, attachment: str = "avatars", name: str = "me.jpg") -> dict[str, bytes]:
    """Save one small original for each id, and return what was written, by path."""
    written = {}
    app = App(root)
    for id in ids:
        app.save(attachment, id, name, {"original": JPEG}, how="copy", chunks=1, old_mtime=False)
        written[f"{attachment}/{id}/original/{name}"] = JPEG
    return written


def until_uploaded(site: Site, count: int, *, timeout_s: float = DEADLINE_S) -> None:
    """Wait until so many objects are live."""
    until(lambda: live(site) >= count, f"{count} are uploaded", timeout_s=timeout_s)


def live(site: Site) -> int:
    rows = site.query("SELECT count(*) AS n FROM object")
    return int(rows[0]["n"]) if rows else 0


def until_let_go(site: Site, *, timeout_s: float = DEADLINE_S) -> None:
    until(lambda: not site.files() and not site.aside() and not site.query("SELECT * FROM claim"), "all is let go",
          timeout_s=timeout_s)  # fmt: skip


def lost(site: Site, written: dict[str, bytes]) -> int:
    """Demand the laws, and return how many were lost: for the figures."""
    site.demand_laws(written)
    return 0


# Dropped events


def overflow(root: Path) -> int:
    """Make more events than the kernel keeps for a reader that does not read; return how many files that took."""
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    noise = root / "noise"
    for _ in range(kept // 2):
        noise.touch()
        noise.unlink()
    return kept // 2


def test_after_the_kernel_dropped_events_all_that_was_written_meanwhile_goes_up(site: Site) -> None:
    """Nothing else sweeps here: what goes up was found by the sweep that the overflow brought about."""
    site.root.joinpath("avatars").mkdir()

    with site.daemon(constants=SOON) as daemon:
        daemon.until_event("sweep.finished")
        daemon.freeze()
        overflow(site.root)
        written = save(site.root, range(100))
        daemon.thaw()
        overflowed = daemon.until_event("watch.overflowed")
        until_uploaded(site, 100)
        until_let_go(site)
        written |= save(site.root, [100])
        until_uploaded(site, 101)  # it is told of what comes afterwards
        until_let_go(site)
        assert 2 == len(daemon.events("sweep.finished"))

    assert "everything is swept" in overflowed["detail"]
    record("kernel-limit", case="overflow", files=len(written), directories=0, lost=lost(site, written))
