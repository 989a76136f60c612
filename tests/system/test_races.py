"""Writers that never rest against a daemon at full speed: nothing they finish is lost, nothing half-written goes up."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import figures
from tests.proxy import FaultProxy
from tests.racing import KINDS, Verdict, files_in, filesystem_of, mounted, path_of, racing
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until
from tests.writers import Task, Writer, content

AT_FULL_SPEED: dict[str, Any] = {  # so that the daemon moves whatever rests for the time of a breath
    "complete": {"settle": "50ms"},
    "cleanup": {"min_age": "50ms", "grace": "30ms", "keep_empty_dirs_for": "200ms"},
}
AS_SHIPPED: dict[str, Any] = {
    "complete": {"settle": "1s"},
    "cleanup": {"min_age": "5s", "grace": "10s", "keep_empty_dirs_for": "30s"},
}
RESTLESS = BRISK | {"spoold.cleanup._OPEN_AGAIN_S": 0.2, "spoold.cleanup._LOOK_AGAIN_S": 0.1}


def judge_a_race(
    directory: Path, server: RcloneServer, *, rewrites: int, files: int, rest_s: float, timeout_s: float = 240,
    root: Path | None = None, spool: Mapping[str, Any] = AT_FULL_SPEED, kinds: Sequence[str] = KINDS, kills_every_s: float = 0,
    settings: str = "",
) -> list[Verdict]:  # fmt: skip
    """Let writers run against a daemon, then have it finish, and judge.

    kills_every_s: how long a daemon lives, on average, while somebody writes; 0: as long as it likes. settings: what the
    figures call them; "" keeps no figures.
    """
    with FaultProxy(server.endpoint_url) as proxy:
        upload = {"doubt": "2s", "retry": {"crashes": 1_000_000}}
        site = Site(directory, server, endpoint_url=proxy.endpoint_url, spool=spool, root=root, upload=upload)
        kills = 0
        with racing(
            site.root, server, site.bucket, rewrites=rewrites, files=files, rest_s=rest_s, kinds=kinds
        ) as race:  # fmt: skip
            proxy.rules.append(race.look_at)
            chance = random.Random(0)
            while kills_every_s and race.is_on:
                with site.daemon(ready=chance.random() < 0.7, constants=RESTLESS) as daemon:
                    wait(chance.uniform(0, 2 * kills_every_s), lambda: not race.is_on)
                    daemon.kill()
                    kills += 1
            with site.daemon(constants=RESTLESS) as daemon:
                race.reports(timeout_s=timeout_s)
                until(lambda: is_drained(site, daemon), "everything has gone up", timeout_s=timeout_s)
        verdicts = race.judge()
        for verdict in verdicts if settings else ():
            filesystem = filesystem_of(site.root)
            figures.record(
                "race", tool="spoold", settings=settings, filesystem=filesystem, **verdict.figures, kills=kills
            )  # fmt: skip
        return verdicts


def wait(seconds: float, is_over: Callable[[], bool]) -> None:
    """Let somebody work for so long, or until it is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_over():
        time.sleep(0.01)


def is_drained(site: Site, daemon: Daemon) -> bool:
    assert daemon.process.poll() is None, "the daemon runs"
    time.sleep(0.2)  # asking costs the daemon time
    return not site.files() and not site.aside() and not site.query("SELECT 1 FROM claim")


def demand_clean(verdicts: list[Verdict]) -> None:
    """Nothing lost, stale or half; and files were moved while they were written, or it would prove nothing."""
    unclean = [verdict for verdict in verdicts if not verdict.is_clean]
    assert not unclean, unclean
    assert sum(verdict.taken for verdict in verdicts), verdicts


@pytest.mark.timeout(600)  # where many tests share few processors
def test_whoever_writes_in_whatever_way_nothing_is_lost_stale_or_half(tmp_path: Path, rclone_server: RcloneServer) -> None:
    for rest_s in (0.6, 2.0, 6.0):  # on a busy machine files must rest for longer, or none is moved between two versions
        place = tmp_path / str(rest_s)
        place.mkdir()
        verdicts = judge_a_race(place, rclone_server, rewrites=250, files=8, rest_s=rest_s)
        assert list(KINDS) == [verdict.writer for verdict in verdicts]
        assert all(verdict.is_clean for verdict in verdicts), verdicts
        if any(verdict.taken for verdict in verdicts):
            break

    demand_clean(verdicts)


# For as long as it takes: 20,000 versions of each writer, everywhere


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("filesystem", ["ext4", "tmpfs", "xfs", "btrfs"])
def test_of_twenty_thousand_versions_of_each_writer_none_is_lost_stale_or_half(
    tmp_path: Path, rclone_server: RcloneServer, filesystem: str
) -> None:
    with mounted(filesystem, tmp_path) as place:
        verdicts = judge_a_race(
            tmp_path, rclone_server, rewrites=20_000, files=64, rest_s=2, timeout_s=900, root=place / "spool",
            settings="fast",
        )  # fmt: skip

    demand_clean(verdicts)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_of_twenty_thousand_versions_none_is_lost_though_daemons_are_killed_again_and_again(
    tmp_path: Path, rclone_server: RcloneServer
) -> None:
    verdicts = judge_a_race(
        tmp_path, rclone_server, rewrites=20_000, files=64, rest_s=2, timeout_s=900, kills_every_s=4,
        settings="fast, killed again and again",
    )  # fmt: skip

    demand_clean(verdicts)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_of_twenty_thousand_replacements_none_fails_in_the_app_with_the_settings_as_shipped(
    tmp_path: Path, rclone_server: RcloneServer
) -> None:
    """A file that went before its chmod, or a directory before the rename, would be an error page (FACTS 3 and 20)."""
    (verdict,) = judge_a_race(
        tmp_path, rclone_server, rewrites=20_000, files=300, rest_s=12, timeout_s=900, kinds=["replace"], spool=AS_SHIPPED,
        settings="as shipped",
    )  # fmt: skip

    demand_clean([verdict])
    assert 0 == verdict.saves_failed, verdict


# The writers themselves, and the verdict


def test_a_mover_that_uploads_and_then_deletes_is_caught_by_every_writer(tmp_path: Path, rclone_server: RcloneServer) -> None:
    """It is what everybody writes first, and it shows that the writers find what there is to find."""
    root = tmp_path / "spool"
    root.mkdir()
    bucket = rclone_server.create_bucket("naive")

    with racing(root, rclone_server, bucket, rewrites=200, files=8, rest_s=0.2) as race:
        while race.is_on:
            move_naively(root, rclone_server, bucket)
        race.reports(timeout_s=10)
    move_naively(root, rclone_server, bucket)
    verdicts = race.judge()

    assert all(verdict.lost and verdict.stale for verdict in verdicts), verdicts


def move_naively(root: Path, server: RcloneServer, bucket: str) -> None:
    client = server.client()
    for path, body in files_in(root).items():
        client.put_object(Bucket=bucket, Key=path, Body=body)
        with contextlib.suppress(OSError):
            (root / path).unlink()


def test_what_is_published_half_or_old_is_found(tmp_path: Path, rclone_server: RcloneServer) -> None:
    root = tmp_path / "spool"
    root.mkdir()
    bucket = rclone_server.create_bucket("half")

    with racing(root, rclone_server, bucket, rewrites=10, files=2, rest_s=0.01, kinds=["replace"]) as race:
        race.reports(timeout_s=30)
    half, old = (path_of("replace", number) for number in range(2))
    for path, body in ((half, content(half, 1)[:-1]), (old, content(old, 1))):
        rclone_server.client().put_object(Bucket=bucket, Key=path, Body=body)
        (root / path).unlink()
    (verdict,) = race.judge()

    assert (2, 1, 1) == (verdict.lost, verdict.stale, verdict.half), verdict


def test_a_file_that_goes_between_rename_and_chmod_is_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, temporary = tmp_path / "spool", tmp_path / "tmp"
    temporary.mkdir()
    rename = os.rename

    def rename_and_go(*paths: str) -> None:
        rename(*paths)
        os.unlink(paths[1])

    task = Task("replace", str(root), str(temporary), str(tmp_path / "bucket"), ["a/1/original/me.dat"], 3, 0.01, 0)
    monkeypatch.setattr(os, "rename", rename_and_go)
    report = Writer(task).run()

    assert {"chmod": 3} == report.failed
    assert [1, 2] == [version for _, version, _ in report.lost]
