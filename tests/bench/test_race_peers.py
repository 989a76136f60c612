"""The same writers against what people move files to S3 with: what do they lose? `make bench` installs them.

Each runs again and again as long as somebody writes, as from cron, and then until nothing is left. spoold's own figures
for the same writers at the same pace are those of tests/system/test_races.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import figures
from tests.proxy import FaultProxy
from tests.racing import Race, files_in, filesystem_of, racing
from tests.servers import RcloneServer

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin"
REWRITES, FILES, REST_S = 20_000, 64, 2.0  # as tests/system/test_races.py has them

Command = Callable[[Path, str, str], Sequence[str]]
"""(root, bucket, endpoint URL) → arguments."""

COMMANDS: dict[str, Command] = {
    "rclone": lambda root, bucket, _: ["move", "--delete-empty-src-dirs", str(root), f"peer:{bucket}"],
    "aws": lambda root, bucket, url: [
        "s3", "mv", "--recursive", "--only-show-errors", "--endpoint-url", url, str(root), f"s3://{bucket}",
    ],
    "s5cmd": lambda root, bucket, url: ["--log", "error", "--endpoint-url", url, "mv", f"{root}/*", f"s3://{bucket}/"],
}  # fmt: skip


@pytest.mark.parametrize("tool", COMMANDS)
def test_what_a_mover_loses_while_somebody_writes(tmp_path: Path, rclone_server: RcloneServer, tool: str) -> None:
    binary = PEERS / tool
    if not binary.exists():
        pytest.skip(f"{binary} is not there: make bench installs it")
    root = tmp_path / "spool"
    root.mkdir()
    bucket = rclone_server.create_bucket("peers")

    with FaultProxy(rclone_server.endpoint_url) as proxy:
        environment = rclone_server.environment() | rclone_remote(proxy.endpoint_url)
        command = [str(binary), *COMMANDS[tool](root, bucket, proxy.endpoint_url)]
        with racing(root, rclone_server, bucket, rewrites=REWRITES, files=FILES, rest_s=REST_S) as race:
            proxy.rules.append(race.look_at)
            runs = _move_until(command, environment, lambda: not race.is_on)
            race.reports(timeout_s=60)
        runs += _move_until(command, environment, lambda: not files_in(root), at_most_s=300)
    _record(tool, race, root, runs)


def rclone_remote(endpoint_url: str) -> dict[str, str]:
    """Return what configures rclone's remote `peer:` without a file; credentials are the environment's."""
    remote = {"type": "s3", "provider": "Other", "endpoint": endpoint_url, "env_auth": "true", "region": "us-east-1"}
    return {"RCLONE_CONFIG": "", **{f"RCLONE_CONFIG_PEER_{name.upper()}": value for name, value in remote.items()}}


def _move_until(
    command: Sequence[str], environment: dict[str, str], is_over: Callable[[], bool], *, at_most_s: float = 3000
) -> int:
    """Run the mover again and again; return how often. That it fails, since files change or go, is its own affair."""
    runs, deadline = 0, time.monotonic() + at_most_s
    while not is_over() and time.monotonic() < deadline:
        subprocess.run(command, env=os.environ | environment, capture_output=True, check=False, timeout=600)
        runs += 1
    return runs


def _record(tool: str, race: Race, root: Path, runs: int) -> None:
    version = {"rclone": ["version"], "aws": ["--version"], "s5cmd": ["version"]}[tool]
    told = subprocess.run([str(PEERS / tool), *version], capture_output=True, text=True, check=True)
    number = re.findall(r"\d+\.\d+\.\d+", told.stdout + told.stderr)[0]
    print(f"{tool} {number} ran {runs} times and left {len(files_in(root))} files")
    for verdict in race.judge():
        name = f"{tool} {number}"
        figures.record(
            "race", tool=name, settings="in a loop", filesystem=filesystem_of(root), **verdict.figures, kills=0
        )  # fmt: skip
