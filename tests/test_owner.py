"""Whether another daemon on this machine still lives is told by the lock it holds, however it ended."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from spoold.clock import SystemClock
from spoold.errors import ClaimLost
from spoold.owner import LEASE_S, Owner, living
from tests.nth import Fail, Hand, refuses
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


def test_what_killed_daemons_left_is_tidied_up_but_what_still_tells_of_claims(tmp_path: Path) -> None:
    ours = Owner(tmp_path, clock=SystemClock())
    (living_one, living_name), *killed = (other_daemon(tmp_path) for _ in range(3))
    for process, _ in killed:
        process.kill()
        process.wait(10)
        process.communicate()
    names = [name for _, name in killed]

    ours.forget_all_dead(but=names[:1])
    left = {path.name for path in tmp_path.iterdir()}
    living_one.communicate("", timeout=10)

    assert {ours.name, living_name, names[0]} == left


def test_a_lock_file_that_was_tidied_away_while_it_was_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock it looks like that of a dead daemon."""
    flock = fcntl.flock
    tidied: list[Path] = []

    def tidy_first(fd: int, how: int) -> None:
        if not tidied:
            tidied.extend(tmp_path.iterdir())
            for path in tidied:
                path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", tidy_first)

    ours = Owner(tmp_path, clock=SystemClock())

    assert [tmp_path / ours.name] == list(tmp_path.iterdir())
    assert [""] == living(tmp_path)


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


def test_claims_that_ran_out_are_not_sure_again_before_all_have_ended_who_were_at_work(tmp_path: Path) -> None:
    """Renewing brings back those that nobody took over, and cannot tell a walk which kind its own is."""
    clock = ManualClock()
    ours = Owner(tmp_path, clock=clock)

    with ours.at_work() as may_claim_before:
        clock.advance(LEASE_S * 2)
        ours.renewed(clock.monotonic())
        with pytest.raises(ClaimLost):
            ours.demand()
        with ours.at_work() as may_claim_meanwhile:
            pass
    ours.renewed(clock.monotonic())
    with ours.at_work() as may_claim_after:
        ours.demand()

    assert (True, False, True) == (may_claim_before, may_claim_meanwhile, may_claim_after)


def test_the_daemons_that_live_are_counted_by_their_locks(tmp_path: Path) -> None:
    nowhere = living(tmp_path / "owners")
    ours = Owner(tmp_path / "owners", clock=SystemClock())
    process, _ = other_daemon(tmp_path / "owners")
    with process:
        both = living(tmp_path / "owners")
        process.kill()
        process.wait(10)
    one = living(tmp_path / "owners")
    ours.close()

    assert ([], ["", ""], [""], []) == (nowhere, both, one, living(tmp_path / "owners"))


def test_a_daemon_says_what_is_wrong_with_it_until_it_is_mended(tmp_path: Path) -> None:
    """A ledger that takes no changes cannot tell; what stands in the lock file needs no more room on a full disk."""
    owner = Owner(tmp_path / "owners", clock=ManualClock())

    owner.say("the disk is full \udcff" + "!" * 5000)
    said = living(tmp_path / "owners")
    owner.say("")
    [path] = (tmp_path / "owners").iterdir()

    assert said is not None and said[0].startswith("the disk is full \\udcff!!!")
    assert [""] == living(tmp_path / "owners")
    assert len(said[0]) == path.stat().st_size
    owner.close()


@pytest.mark.parametrize("call", ["open", "flock", "close"])
def test_who_cannot_be_looked_at_is_not_dead_for_that(tmp_path: Path, call: str) -> None:
    """It would end the daemon that looks; the claims of the other run out by themselves."""
    ours = Owner(tmp_path, clock=SystemClock())
    (tmp_path / f"{ours.name}-before").touch()

    with Hand(Fail("os", 1, refuses(errno.EIO), only=lambda op: op.name == call)):
        is_dead = ours.is_dead(f"{ours.name}-before")

    assert is_dead is (call == "close")
    assert ours.is_dead(f"{ours.name}-before")


@pytest.mark.parametrize("call", ["unlink", "close"])
def test_a_lock_file_that_cannot_be_removed_holds_nobody_up(tmp_path: Path, call: str) -> None:
    ours = Owner(tmp_path, clock=SystemClock())
    (tmp_path / "before").touch()

    with Hand(Fail("os", 1, refuses(errno.EIO), only=lambda op: op.name == call, lasts=lambda: True)):
        ours.forget("before")
        ours.close()

    assert [] == living(tmp_path)
