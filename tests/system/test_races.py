"""Writers that never rest against a daemon at full speed: nothing they finish is lost, nothing half-written goes up."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import figures
from tests.proxy import FaultProxy
from tests.racing import KINDS, Race, Verdict, files_in, mounted, racing
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Site, until

AT_FULL_SPEED = {  # so that the daemon moves each version that rests for the time of a breath
    "complete": {"settle": "50ms"},
    "cleanup": {"min_age": "50ms", "grace": "30ms", "keep_empty_dirs_for": "200ms"},
}
RESTLESS = BRISK | {"spoold.cleanup._OPEN_AGAIN_S": 0.2, "spoold.cleanup._LOOK_AGAIN_S": 0.1}


def a_race(
    directory: Path, server: RcloneServer, *, rewrites: int, files: int, root: Path | None = None, pause_s: float = 0.4,
    timeout_s: float = 60,
) -> tuple[Site, list[Verdict]]:  # fmt: skip
    """Let all writers run against a daemon, then have it finish, and judge."""
    with FaultProxy(server.endpoint_url) as proxy:
        site = Site(directory, server, endpoint_url=proxy.endpoint_url, spool=AT_FULL_SPEED, root=root)
        with site.daemon(constants=RESTLESS), racing(
            site.root, server, site.bucket, rewrites=rewrites, files=files, pause_s=pause_s
        ) as race:  # fmt: skip
            proxy.rules.append(race.look_at)
            race.reports(timeout_s=timeout_s)
            until(lambda: is_drained(site), "everything has gone up", timeout_s=timeout_s)
        return site, race.judge()


def is_drained(site: Site) -> bool:
    return not site.files() and not site.aside() and not site.query("SELECT 1 FROM claim")


def test_whoever_writes_in_whatever_way_nothing_is_lost_stale_or_half(tmp_path: Path, rclone_server: RcloneServer) -> None:
    site, verdicts = a_race(tmp_path, rclone_server, rewrites=400, files=16, pause_s=0.15)

    assert list(KINDS) == [verdict.writer for verdict in verdicts]
    for verdict in verdicts:
        assert verdict.is_clean and verdict.taken, verdict
        figures.record("race", tool="spoold", filesystem="here", **verdict.figures)


# The writers themselves


def test_a_mover_that_uploads_and_then_deletes_is_caught_by_every_writer(tmp_path: Path, rclone_server: RcloneServer) -> None:
    """It is what everybody writes first, and it shows that the writers find what there is to find."""
    root = tmp_path / "spool"
    root.mkdir()
    bucket = rclone_server.create_bucket("naive")

    with racing(root, rclone_server, bucket, rewrites=200, files=8, pause_s=0.05) as race:
        while race.is_on:
            move_naively(root, rclone_server, bucket, race)
        race.reports(timeout_s=10)
    move_naively(root, rclone_server, bucket, race)
    verdicts = {verdict.writer: verdict for verdict in race.judge()}

    assert all(verdicts[kind].lost for kind in KINDS), verdicts
    assert verdicts["replace"].saves_failed and sum(verdict.half for verdict in verdicts.values()), verdicts


def move_naively(root: Path, server: RcloneServer, bucket: str, race: Race) -> None:
    client = server.client()
    for path, body in files_in(root).items():
        client.put_object(Bucket=bucket, Key=path, Body=body)
        with contextlib.suppress(OSError):
            (root / path).unlink()
            (root / path).parent.rmdir()
