"""Whether another daemon on this machine still lives is told by the lock it holds, however it ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spoold.clock import SystemClock
from spoold.errors import ClaimLost
from spoold.owner import LEASE_S, Owner
from tests.parts import ManualClock

OTHER = """
import sys
from pathlib import Path
from spoold.clock import SystemClock
from spoold.owner import Owner
owner = Owner(Path(sys.argv[1]), clock=SystemClock())
print(owner.name, flush=True)
sys.stdin.read()
"""


def other_daemon(directory: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_daemon_is_dead_as_soon_as_it_was_killed_and_not_before(tmp_path: Path) -> None:
    ours = Owner(tmp_path, clock=SystemClock())
    process, name = other_daemon(tmp_path)
    with process:
        alive = ours.is_dead(name)
        process.kill()
        process.wait(10)

        assert alive is False
        assert ours.is_dead(name) is True


def test_nobody_is_dead_for_being_unknown_here(tmp_path: Path) -> None:
    """A daemon with another state_dir, or on another host, keeps its lock where we cannot see it."""
    ours = Owner(tmp_path, clock=SystemClock())
    elsewhere = Owner(tmp_path / "elsewhere", clock=SystemClock())

    assert not ours.is_dead(elsewhere.name)
    assert not ours.is_dead("another-host:1b7e")
    assert not ours.is_dead(ours.name)


def test_a_claim_is_sure_only_while_it_was_renewed_in_time(tmp_path: Path) -> None:
    clock = ManualClock()
    ours = Owner(tmp_path, clock=clock)
    clock.advance(LEASE_S / 2)
    ours.demand()
    clock.advance(LEASE_S / 2)

    with pytest.raises(ClaimLost, match="may have run out"):
        ours.demand()

    ours.renewed(clock.monotonic())
    ours.demand()
