"""What the kernel does not tell: dropped events, too few watches, roots that come and go. All goes up within one sweep."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.figures import record
from tests.paperclip import App, picture
from tests.parts import in_a_world, mount_tmpfs, with_own_mounts
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 200.0
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
        written = save(site.root, range(60))
        daemon.thaw()
        overflowed = daemon.until_event("watch.overflowed")
        until_uploaded(site, 60)
        until_let_go(site)
        written |= save(site.root, [60])
        until_uploaded(site, 61)  # it is told of what comes afterwards
        until_let_go(site)
        assert 2 == len(daemon.events("sweep.finished"))

    assert "everything is swept" in overflowed["detail"]
    record("kernel-limit", case="overflow", files=len(written), directories=0, lost=lost(site, written))


# Too few watches


def limited(*, watches: int | None = None, instances: int | None = None) -> list[str]:
    """Return a command that becomes the daemon, in a user namespace with limits of its own; the machine's stay."""
    limits = {"max_inotify_watches": watches, "max_inotify_instances": instances}
    lines = [f"echo {most} > /proc/sys/user/{limit}" for limit, most in limits.items() if most is not None]
    within = ["unshare", "--user", "--map-root-user", "sh", "-c", "; ".join(["set -e", *lines, 'exec "$@"']), "sh"]
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespaces with limits of their own here")
    return within


def grant(daemon: Daemon, *, watches: int | None = None, instances: int | None = None) -> None:
    """Raise the limits of a daemon that runs."""
    limits = {"max_inotify_watches": watches, "max_inotify_instances": instances}
    lines = [f"echo {most} > /proc/sys/user/{limit}" for limit, most in limits.items() if most is not None]
    subprocess.run(["nsenter", f"--user=/proc/{daemon.process.pid}/ns/user", "--preserve-credentials", "sh", "-c",
                    "; ".join(["set -e", *lines])], check=True)  # fmt: skip


def test_directories_beyond_the_limit_of_watches_are_swept_and_said_until_there_are_enough(site: Site) -> None:
    for number in range(40):
        (site.root / f"avatars/{number}/original").mkdir(parents=True)
    site.settings["spools"][0]["cleanup"]["keep_empty_dirs_for"] = "1h"  # nothing is freed by taking directories away
    site.write_config()

    with site.daemon(within=limited(watches=30), constants=SOON) as daemon:
        limits = daemon.until_event("watch.limited")
        written = save(site.root, range(40))
        until_uploaded(site, 40)
        swept = len(daemon.events("sweep.finished"))
        daemon.until_event("sweep.finished", count=swept + 2)
        told_once = len(daemon.events("watch.limited"))
        grant(daemon, watches=1000)
        restarted = daemon.until_event("watch.restarted")
        swept = len(daemon.events("sweep.finished"))
        written |= save(site.root, range(40, 50))
        until_uploaded(site, 50)
        until_let_go(site)
        assert swept == len(daemon.events("sweep.finished")), "with watches enough, sweeps are not needed"

    assert 1 == told_once
    assert "of 82 directories are not watched" in limits["detail"]
    assert "sysctl -w user.max_inotify_watches=" in limits["hint"] and "every 2 s" in limits["hint"]
    assert "every directory is watched again" == restarted["detail"]
    record("kernel-limit", case="watches", files=len(written), directories=82, lost=lost(site, written))


@pytest.mark.parametrize(
    "limits", [{"watches": 0}, pytest.param({"instances": 0}, marks=pytest.mark.soak)], ids=lambda limits: next(iter(limits))
)
def test_where_nothing_can_be_watched_sweeps_find_it_all_until_something_can(site: Site, limits: dict[str, int]) -> None:
    with site.daemon(within=limited(**limits), constants=SOON) as daemon:
        unavailable = daemon.until_event("watch.unavailable")
        written = save(site.root, range(20))
        until_uploaded(site, 20)
        swept = len(daemon.events("sweep.finished"))
        daemon.until_event("sweep.finished", count=swept + 2)
        told_once = len(daemon.events("watch.unavailable"))
        grant(daemon, **dict.fromkeys(limits, 1000))
        daemon.until_event("watch.restarted")
        swept = len(daemon.events("sweep.finished"))
        written |= save(site.root, range(20, 30))
        until_uploaded(site, 30)
        until_let_go(site)
        assert swept == len(daemon.events("sweep.finished"))

    assert 1 == told_once
    assert "fs.inotify.max_user_" in unavailable["hint"] and "every 2 s" in unavailable["hint"]
    record("kernel-limit", case=f"no {next(iter(limits))}", files=len(written), directories=0, lost=lost(site, written))


# watchdog's reader


def is_watched(daemon: Daemon, directory: Path) -> bool:
    """Ask the kernel whether the daemon watches a directory."""
    wanted = f" ino:{directory.stat().st_ino:x} "
    for fd in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd) == "anon_inode:inotify" and wanted in (fd.parent.parent / "fdinfo" / fd.name).read_text():
                return True
    return False


def test_a_directory_that_was_moved_out_and_kills_the_reader_costs_no_file(site: Site) -> None:
    """Its name is made anew and goes again, then it goes itself: a KeyError ends watchdog's reader, and all else lives."""
    (site.root / "avatars/1").mkdir(parents=True)
    outside = site.directory / "outside"

    with site.daemon(constants=SOON) as daemon:
        daemon.until_event("sweep.finished")
        (site.root / "avatars/1").rename(outside)
        (site.root / "avatars/1").mkdir()
        until(lambda: is_watched(daemon, site.root / "avatars/1"), "the new directory is watched")
        (site.root / "avatars/1").rmdir()
        outside.rmdir()
        restarted = daemon.until_event("watch.restarted")
        written = save(site.root, range(20))
        until_uploaded(site, 20)
        until_let_go(site)

    assert "watchdog's threads are dead" == restarted["detail"]
    record("kernel-limit", case="reader killed", files=len(written), directories=1, lost=lost(site, written))


# Roots that come and go


def unfinished(site: Site) -> dict[str, str]:
    """Return the state of each record that is not uploaded yet."""
    rows = site.query("SELECT path, state FROM record_status WHERE state NOT IN ('uploaded', 'done')")
    return {row["path"]: row["state"] for row in rows}


def with_half(site: Site) -> Site:
    """Have the site wait for a thumb too: what has none is unfinished for as long as a test wants."""
    site.settings["spools"][0]["complete"]["styles"] = ["original", "thumb"]
    site.write_config()
    return site


def save_both(root: Path, ids: Iterable[int]) -> dict[str, bytes]:
    return save(root, ids) | save_thumbs(root, ids)


def save_thumbs(root: Path, ids: Iterable[int]) -> dict[str, bytes]:
    written = {}
    for id in ids:
        App(root).save("avatars", id, "me.jpg", {"thumb": JPEG}, how="copy", chunks=1, old_mtime=False)
        written[f"avatars/{id}/thumb/me.jpg"] = JPEG
    return written


def unmount(path: Path) -> None:
    """Unmount as soon as nobody looks into it."""

    def is_unmounted() -> bool:
        return subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode == 0

    until(is_unmounted, f"{path} can be unmounted")


class Root:
    """A way in which the directory at the root's place becomes another one, and is back later."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.root = site.root
        self.other = site.directory / "other"

    def prepare(self) -> None:
        """What must be so before a daemon starts."""

    def leave(self) -> None: ...

    def come_back(self) -> None: ...


class Disk(Root):
    """A disk that is unmounted: all its watches go, and watchdog is told."""

    def prepare(self) -> None:
        image = self.site.directory / "disk.img"
        if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
            pytest.skip("no loop devices or no mkfs.ext4 here")
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        self.command = ["mount", "-o", "loop", str(image), str(self.root)]
        self.come_back()

    def leave(self) -> None:
        unmount(self.root)

    def come_back(self) -> None:
        subprocess.run(self.command, check=True)


class Bind(Disk):
    """A directory that is mounted there: it goes without any event."""

    def prepare(self) -> None:
        self.other.mkdir()
        mount_tmpfs(self.other, "size=16m")
        self.command = ["mount", "--bind", str(self.other), str(self.root)]
        self.come_back()


class OverMounted(Root):
    def leave(self) -> None:
        mount_tmpfs(self.root, "size=16m")

    def come_back(self) -> None:
        unmount(self.root)


class Moved(Root):
    """mv; mkdir: no event tells, and it may never have been seen to be gone."""

    def leave(self) -> None:
        self.root.rename(self.other)
        self.root.mkdir()

    def come_back(self) -> None:
        self.root.rename(self.site.directory / "new")
        self.other.rename(self.root)


class Link(Root):
    """Capistrano's `current`, that a deployment gives another target."""

    def prepare(self) -> None:
        self.root.rename(self.other)
        (self.site.directory / "new").mkdir()
        self._point_to(self.other)

    def leave(self) -> None:
        self._point_to(self.site.directory / "new")

    def come_back(self) -> None:
        self._point_to(self.other)

    def _point_to(self, target: Path) -> None:
        (self.site.directory / "link").symlink_to(target)
        (self.site.directory / "link").rename(self.root)


@pytest.mark.parametrize("kind", [Disk, Bind, OverMounted, Moved, Link])
def test_while_another_directory_is_the_root_nothing_is_called_gone_and_all_goes_up_in_the_end(
    tmp_path: Path, rclone_server: RcloneServer, kind: type[Root]
) -> None:
    """What lay in the one that was the root waits for its return; what is written into the one that is goes up."""

    def work() -> None:
        site = with_half(site_of(tmp_path, rclone_server))
        root = kind(site)
        root.prepare()
        with site.daemon(constants=SOON) as daemon:
            written = save(site.root, range(5))  # their thumbs are missing
            until(lambda: 5 == len(unfinished(site)), "the records are waited for")
            root.leave()
            replaced = daemon.until_event("root.replaced")
            written |= save_both(site.root, range(10, 15))
            until_uploaded(site, 10)
            until_let_go(site)
            while_away = unfinished(site)
            why = site.spoold("why", "avatars/1").stdout if kind is Link else ""
            root.come_back()
            written |= save_thumbs(site.root, range(5))
            until_uploaded(site, 20)
            until_let_go(site)
            assert [] == daemon.events("record.gone")
        site.demand_laws(written)

        assert dict.fromkeys((f"avatars/{id}" for id in range(5)), "receiving") == while_away
        assert "5 records" in replaced["detail"] and "not mounted" in replaced["hint"]
        assert kind is not Link or ("another directory" in why and "is a filesystem not mounted" in why)
        record("kernel-limit", case=f"root: {kind.__name__}", files=len(written), directories=0, lost=0)

    in_a_world(work, with_own_mounts)


def test_what_waits_to_be_uploaded_when_its_root_is_unmounted_goes_up_when_it_is_back_even_after_a_restart(
    tmp_path: Path, rclone_server: RcloneServer
) -> None:
    def work() -> None:
        site = site_of(tmp_path, rclone_server)
        root = Bind(site)
        root.prepare()
        rclone_server.stop()
        with site.daemon(constants=SOON) as daemon:
            written = save(site.root, range(5))
            until(lambda: ["queued"] * 5 == list(unfinished(site).values()), "all are queued")
            daemon.until_event("spool.held")
            root.leave()
            rclone_server.start()
            daemon.until_event("spool.released")
            until(lambda: "queued" not in unfinished(site).values(), "all were tried, and were not there")
            assert [] == daemon.events("record.gone")
        with site.daemon(constants=SOON, name="second") as daemon:
            replaced = daemon.until_event("root.replaced")
            while_away = set(unfinished(site).values())
            root.come_back()
            until_uploaded(site, 5)
            until_let_go(site)
            assert [] == daemon.events("record.gone")
        site.demand_laws(written)

        assert {"receiving"} == while_away
        assert "5 records" in replaced["detail"]
        record("kernel-limit", case="root: queued", files=len(written), directories=0, lost=0)

    in_a_world(work, with_own_mounts)


def test_a_root_that_is_gone_holds_the_spool_and_says_what_to_do(site: Site) -> None:
    with_half(site)
    with site.daemon(constants=SOON) as daemon:
        written = save(site.root, range(5))
        until(lambda: 5 == len(unfinished(site)), "the records are waited for")
        site.root.rename(site.directory / "other")
        held = daemon.until_event("spool.held")
        status = site.spoold("status")
        while_away = unfinished(site)
        (site.directory / "other").rename(site.root)
        written |= save_thumbs(site.root, range(5))
        daemon.until_event("spool.released")
        until_uploaded(site, 10)
        until_let_go(site)
        assert [] == daemon.events("record.gone")

    assert "SpoolBroken" == held["error"] and str(site.root) in held["detail"]
    assert "mount or create it" in held["hint"]
    assert "uploads is held since" in status.stdout and "mount or create it" in status.stdout
    assert {"receiving"} == set(while_away.values())
    record("kernel-limit", case="root: gone", files=len(written), directories=0, lost=lost(site, written))


# Many


def resident_mb(daemon: Daemon) -> float:
    """Return how much memory the daemon had at most."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_burst_of_20_000_files_while_the_daemon_is_stopped_goes_up(site: Site) -> None:
    (site.root / "avatars").mkdir()

    with site.daemon(constants=SOON) as daemon:
        daemon.until_event("sweep.finished")
        daemon.freeze()
        overflow(site.root)
        written = save(site.root, range(20_000))
        daemon.thaw()
        began = time.monotonic()
        daemon.until_event("watch.overflowed")
        until_uploaded(site, 20_000, timeout_s=2400)
        took_s = time.monotonic() - began
        until_let_go(site, timeout_s=600)
        memory_mb = resident_mb(daemon)

    record(
        "kernel-burst", files=len(written), lost=lost(site, written), uploaded_s=round(took_s, 1), resident_mb=round(memory_mb)
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("watches", [150_000, 50_000])
def test_100_000_directories_are_no_hindrance(tmp_path: Path, rclone_server: RcloneServer, watches: int) -> None:
    """With watches for all of them, and with too few: then by sweeps, which cost a tenth of the time at most."""
    layout = ":attachment/:id_partition/:style/:basename.:extension"
    site = site_of(tmp_path, rclone_server, path=layout, key=layout)
    for number in range(50_000):
        partition = f"{number:09d}"
        (site.root / f"avatars/{partition[:3]}/{partition[3:6]}/{partition[6:]}/original").mkdir(parents=True)
    written = {}
    began = time.monotonic()

    with site.daemon(within=limited(watches=watches), constants=SOON, ready=False) as daemon:
        daemon.until_event("daemon.ready", timeout_s=300)
        ready_s = time.monotonic() - began
        swept = daemon.until_event("sweep.finished", timeout_s=300)
        if watches < 100_000:
            daemon.until_event("watch.limited")
        app = App(site.root, layout)
        began = time.monotonic()
        for number in range(0, 50_000, 100):
            [path] = app.save("avatars", number, "me.jpg", {"original": JPEG}, how="copy", old_mtime=False).values()
            written[str(path.relative_to(site.root))] = JPEG
        until_uploaded(site, len(written), timeout_s=600)
        took_s = time.monotonic() - began
        until_let_go(site, timeout_s=600)
        memory_mb = resident_mb(daemon)
        assert (watches < 100_000) == bool(daemon.events("watch.limited"))
        assert [] == daemon.events("watch.overflowed")

    directories = sum(len(inner) for _, inner, _ in os.walk(site.root))
    site.demand_nothing_stale(written)
    record(
        "kernel-directories", watches=f"{watches:,}", directories=directories, files=len(written), lost=lost(site, written),
        ready_s=round(ready_s, 1), sweep_s=swept["elapsed_s"], uploaded_s=round(took_s, 1), resident_mb=round(memory_mb),
    )  # fmt: skip
