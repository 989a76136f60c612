"""Disks that are full or read-only, and a ledger that is removed, replaced or damaged under the daemon, or lost for good."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.paperclip import App, picture
from tests.proxy import FaultProxy
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Site, until

SMALL_RESERVE = {**BRISK, "spoold.ledger.file._RESERVE_BYTES": 64 << 10}


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer, proxy: FaultProxy) -> Site:
    """A spool whose daemon talks to its server through the proxy, which counts."""
    return Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, upload={"doubt": "2s"})


@pytest.fixture
def mount(request: pytest.FixtureRequest) -> Callable[[Path, str], Path]:
    """Return what mounts a tmpfs of some size on a directory; all of them are gone at the end."""

    def mounted(path: Path, size: str) -> Path:
        path.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user may not mount here: {done.stderr.strip()}")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", path], check=True))
        return path

    return mounted


def save(site: Site, *numbers: int) -> dict[str, bytes]:
    """Have the app save one picture under each number; return what it wrote, by path."""
    is_mounted = os.path.ismount(site.root)  # then the app's temporary files are elsewhere
    written = {}
    for number in numbers:
        content = picture(40, 30, number)
        App(site.root).save("avatars", number, "me.jpg", {"original": content}, how="copy" if is_mounted else "rename")
        written[f"avatars/{number}/original/me.jpg"] = content
    return written


def fill(directory: Path) -> Path:
    """Leave no byte free on the directory's filesystem; return the file that takes them."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue
    return ballast


def puts(proxy: FaultProxy) -> int:
    return len(proxy.requests("PUT", "/avatars/"))


# The ledger's file


def unlink(site: Site) -> None:
    for path in site.database.parent.glob("spoold.db*"):
        path.unlink()


def replace_by_rubbish(site: Site) -> None:
    rubbish = site.database.with_name("rubbish")
    rubbish.write_bytes(b"what somebody copied to the wrong place")
    rubbish.rename(site.database)


def lose_directory(site: Site) -> None:
    site.database.parent.rename(site.directory / "moved-away")


@pytest.mark.parametrize("harm", [unlink, replace_by_rubbish, lose_directory], ids=lambda f: f.__name__)
def test_a_ledger_taken_away_under_the_daemon_is_put_back(site: Site, harm: Callable[[Site], None]) -> None:
    with site.daemon(constants=BRISK) as daemon:
        written = save(site, 1, 2)
        site.until_state("avatars/1", "done")

        harm(site)
        written |= save(site, 3)
        site.until_state("avatars/3", "done")
        known = {row["path"] for row in site.query("SELECT path FROM record_status")}

        daemon.until_event("ledger.restored")
        assert {"avatars/1", "avatars/2", "avatars/3"} == known
    site.demand_laws(written)


def overwrite(site: Site) -> None:
    for path in (Path(f"{site.database}-wal"), site.database):
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:  # the daemon may have noticed by now
            file.write(b"\xff" * path.stat().st_size)


def truncate(site: Site) -> None:
    for path in (Path(f"{site.database}-wal"), site.database):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 0)


@pytest.mark.parametrize("harm", [overwrite, truncate])
def test_a_ledger_damaged_under_the_daemon_is_made_anew_and_nothing_is_put_twice(
    site: Site, proxy: FaultProxy, harm: Callable[[Site], None]
) -> None:
    """1 is in the bucket alone, 2 is proven and still on disk, 3 comes later."""
    site.settings["spools"][0]["cleanup"]["keep_for"] = "4s"
    site.write_config()
    with site.daemon(constants=BRISK) as daemon:
        written = save(site, 1)
        site.until_state("avatars/1", "done")
        written |= save(site, 2)
        site.until_state("avatars/2", "uploaded")

        harm(site)
        written |= save(site, 3)
        daemon.until_event("ledger.lost")
        daemon.until_event("spool.rebuilt")
        for number in (1, 2, 3):
            site.until_state(f"avatars/{number}", "done")

        assert 3 == puts(proxy)
        assert {row["key"] for row in site.query("SELECT key FROM record_object")} == set(written)
        assert list(site.database.parent.glob("spoold.db.damaged-*")) and daemon.process.poll() is None
    site.demand_laws(written)


def test_a_ledger_lost_while_nobody_ran_is_made_anew_from_spool_and_bucket(site: Site, proxy: FaultProxy) -> None:
    """Also what lay aside, or was put and not yet let go, is known again without a second PUT."""
    site.settings["spools"][0]["cleanup"]["grace"] = "1h"
    site.write_config()
    with site.daemon(constants=BRISK) as daemon:
        written = save(site, *range(1, 6))
        daemon.until_event("file.set_aside", count=5)
    site.settings["spools"][0]["cleanup"]["grace"] = "200ms"
    site.write_config()
    for path in site.database.parent.glob("spoold.db*"):
        if path.suffix != ".id":
            path.unlink()

    with site.daemon(constants=BRISK):
        for number in range(1, 6):
            site.until_state(f"avatars/{number}", "done")

    assert 5 == puts(proxy)
    site.demand_laws(written)


def test_a_state_dir_lost_as_a_whole_is_no_reason_to_take_another_ledgers_spool(site: Site) -> None:
    """A second daemon with another state_dir looks the same: a person must say which it is (contract, rule 9)."""
    with site.daemon(constants=BRISK):
        written = save(site, 1)
        site.until_state("avatars/1", "done")
    site.database.parent.rename(site.directory / "lost")

    with site.daemon(constants=BRISK) as daemon:
        held = daemon.until_event("spool.held")
        written |= save(site, 2)
        (site.root / ".spoold" / "owner").unlink()
        site.until_state("avatars/2", "done")

    assert "belongs to ledger" in held["detail"] and "owner" in held["hint"]
    site.demand_laws(written)


# Room for the ledger


def test_on_a_full_disk_the_ledger_goes_on_with_its_reserve(
    tmp_path: Path, rclone_server: RcloneServer, mount: Callable[[Path, str], Path]
) -> None:
    state = mount(tmp_path / "state", "40m")
    site = Site(tmp_path, rclone_server)
    with site.daemon(constants=BRISK):
        fill(state)

        written = save(site, *range(1, 31))
        for number in range(1, 31):
            site.until_state(f"avatars/{number}", "done")

        assert os.statvfs(state).f_bavail == 0
    site.demand_laws(written)


@pytest.mark.timeout(300)
def test_when_the_reserve_is_used_up_nothing_is_let_go_until_there_is_room(
    tmp_path: Path, rclone_server: RcloneServer, mount: Callable[[Path, str], Path]
) -> None:
    state = mount(tmp_path / "state", "6m")
    site = Site(tmp_path, rclone_server)
    with site.daemon(constants=SMALL_RESERVE) as daemon:
        written = save(site, 1)
        site.until_state("avatars/1", "done")
        ballast = fill(state)

        number = 1
        while not daemon.events("ledger.unavailable"):
            number += 1
            written |= save(site, number)
            row = f"avatars/{number}"
            until(
                lambda row=row: site.status(row).get("state") in ("uploaded", "done") or daemon.events("ledger.unavailable"),
                "it goes up, or the reserve is used up",
            )
        until(lambda: "daemon says" in site.spoold("status").stdout, "status tells of it")
        said, on_disk, aside = site.spoold("status").stdout, site.files(), site.aside()
        site.demand_nothing_lost(written)
        ballast.unlink()
        for each in range(1, number + 1):
            site.until_state(f"avatars/{each}", "done")

        assert "database or disk is full" in said and "make room" in said
        assert on_disk or aside
        assert 1 == len(daemon.events("ledger.unavailable")) == len(daemon.events("ledger.available"))
        until(lambda: "daemon says" not in site.spoold("status").stdout, "status tells that it is over")
    site.demand_laws(written)


def test_a_ledger_that_may_not_be_written_is_waited_for(site: Site) -> None:
    """As when an error made its filesystem read-only. Files stay, `status` says why, and it goes on by itself."""
    with site.daemon(constants=BRISK) as daemon:
        written = save(site, 1)
        site.until_state("avatars/1", "done")
        log = f"{site.database}-wal"
        if subprocess.run(["chattr", "+i", log], capture_output=True).returncode:
            pytest.skip("this filesystem or user makes no file immutable")
        try:
            written |= save(site, 2)
            daemon.until_event("ledger.unavailable")
            until(lambda: "daemon says" in site.spoold("status").stdout, "status tells of it")
            assert set(written) - {"avatars/1/original/me.jpg"} == set(site.files())
        finally:
            subprocess.run(["chattr", "-i", log], check=True)
        site.until_state("avatars/2", "done")
    site.demand_laws(written)


# Room in the spool


def test_a_spool_that_is_full_is_emptied(
    tmp_path: Path, rclone_server: RcloneServer, mount: Callable[[Path, str], Path]
) -> None:
    """Uploading and letting go need no room in it; the app that had none writes again."""
    root = mount(tmp_path / "spool", "1m")
    site = Site(tmp_path, rclone_server)
    with site.daemon(constants=BRISK):
        written = save(site, *range(1, 10))
        ballast = fill(root)

        for number in range(1, 10):
            site.until_state(f"avatars/{number}", "done")
        written |= save(site, 10)
        site.until_state("avatars/10", "done")
        ballast.unlink()
    site.demand_laws(written)


def test_a_spool_that_became_read_only_is_uploaded_and_let_go_when_it_may_be_written_again(
    tmp_path: Path, rclone_server: RcloneServer, mount: Callable[[Path, str], Path]
) -> None:
    root = mount(tmp_path / "spool", "1m")
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"min_age": "2s"}})
    with site.daemon(constants=BRISK) as daemon:
        written = save(site, 1)
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        site.until_state("avatars/1", "uploaded")
        held = daemon.until_event("spool.held")
        in_bucket = site.objects()
        subprocess.run(["mount", "-o", "remount,rw", root], check=True)
        site.until_state("avatars/1", "done")
        written |= save(site, 2)
        site.until_state("avatars/2", "done")

    assert {"avatars/1/original/me.jpg"} == set(in_bucket)
    assert "Read-only file system" in held["detail"]
    site.demand_laws(written)
