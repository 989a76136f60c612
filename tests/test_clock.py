"""How old a file may be said to be, whatever the clocks do (contract, section 6, rule 4)."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from spoold.clock import Ages, SystemClock, iso
from spoold.model import Identity
from tests.parts import ManualClock

YEAR_S = 365 * 86400.0


def born(clock: ManualClock, *, ago_s: float = 0.0, ino: int = 1, mtime_ns: int = 0) -> Identity:
    """Return the identity of a file whose ctime is so long ago by the wall clock."""
    return Identity(1, ino, 10, mtime_ns, int((clock.now() - ago_s) * 1e9))


def test_rule_4_a_file_is_as_old_as_the_time_since_it_was_first_seen() -> None:
    """Its ctime is of no help: a daemon that starts finds every file young."""
    clock = ManualClock()
    ages = Ages(clock)
    file = born(clock, ago_s=YEAR_S)

    first = ages.age_s(file)
    clock.advance(3)

    assert 0.0 == first
    assert 3.0 == ages.age_s(file)


def test_rule_4_a_file_is_no_older_than_its_ctime() -> None:
    clock = ManualClock()
    ages = Ages(clock)
    file = born(clock, ago_s=-60.0)  # as from a server whose clock is ahead
    ages.age_s(file)

    clock.advance(70)

    assert 9.0 < ages.age_s(file) <= 10.1


def test_rule_4_a_clock_that_jumps_forward_makes_nothing_old() -> None:
    clock = ManualClock()
    ages = Ages(clock)
    file = born(clock)
    ages.age_s(file)

    clock.jump(YEAR_S)

    assert 0.0 == ages.age_s(file)


def test_rule_4_a_clock_that_jumps_back_makes_nothing_old_nor_younger_than_new() -> None:
    clock = ManualClock()
    ages = Ages(clock)
    file = born(clock)
    ages.age_s(file)
    clock.advance(60)

    clock.jump(-YEAR_S)

    assert 0.0 == ages.age_s(file)


def test_rule_4_a_file_of_the_time_before_the_clock_was_set_is_not_old_at_once() -> None:
    """A machine without a battery: it boots in 1970, the app writes, NTP comes."""
    clock = ManualClock()
    clock.jump(-50 * YEAR_S)
    ages = Ages(clock)
    file = born(clock)
    ages.age_s(file)

    clock.jump(50 * YEAR_S)
    clock.advance(0.5)

    assert 0.5 == ages.age_s(file)


def test_rule_4_mtime_is_never_asked() -> None:
    clock = ManualClock()
    ages = Ages(clock)
    past, future = (born(clock, ino=ino, mtime_ns=mtime) for ino, mtime in ((1, 0), (2, int(4e18))))
    ages.age_s(past), ages.age_s(future)

    clock.advance(5)

    assert [5.0, 5.0] == [ages.age_s(past), ages.age_s(future)]


def test_a_file_that_was_written_again_is_young_again() -> None:
    clock = ManualClock()
    ages = Ages(clock)
    ages.age_s(born(clock, ago_s=10))
    clock.advance(5)

    rewritten = born(clock)

    assert 0.0 == ages.age_s(rewritten)


def test_what_is_forgotten_for_lack_of_room_is_young_again() -> None:
    clock = ManualClock()
    ages = Ages(clock, capacity=2)
    first, second, third = (born(clock, ago_s=100, ino=ino) for ino in (1, 2, 3))
    ages.age_s(first), ages.age_s(second)
    clock.advance(5)

    ages.age_s(third)

    assert 5.0 == ages.age_s(second)
    assert 0.0 == ages.age_s(first)


@given(
    steps=st.lists(st.tuples(st.sampled_from(["advance", "jump"]), st.floats(-1e8, 1e8)), max_size=20),
    ago_s=st.floats(-1e6, 1e6),
)
def test_rule_4_whatever_the_clocks_do_no_file_is_older_than_the_time_that_passed(
    steps: list[tuple[str, float]], ago_s: float
) -> None:
    clock = ManualClock()
    ages = Ages(clock)
    file = born(clock, ago_s=ago_s)
    ages.age_s(file)
    passed_s = 0.0
    for kind, seconds in steps:
        if kind == "advance":
            clock.advance(abs(seconds))
            passed_s += abs(seconds)
        else:
            clock.jump(seconds)

        assert 0.0 <= ages.age_s(file) <= passed_s + 1e-3


def test_moments_are_written_in_utc_with_milliseconds() -> None:
    assert "2009-02-13T23:31:30.000Z" == iso(1234567890)
    assert "2009-02-13T23:31:30.123Z" == iso(1234567890.1234)


def test_the_machines_clock_waits_until_the_event_and_no_longer() -> None:
    clock = SystemClock()
    event = threading.Event()
    began = clock.monotonic()
    threading.Timer(0.05, event.set).start()

    is_set = clock.wait(event, 30)

    assert is_set
    assert clock.monotonic() - began < 10
    assert not clock.wait(threading.Event(), 0.01)


# Before this machine started


def test_a_file_is_from_before_the_boot_if_its_ctime_is() -> None:
    clock = ManualClock()
    before = born(clock, ago_s=1.0)

    clock.boot()

    assert Ages(clock).predates_boot(before)
    assert not Ages(clock).predates_boot(born(clock))


def test_a_file_from_the_future_is_from_before_the_boot() -> None:
    """Without a battery a clock comes up with the time of long ago, until somebody sets it."""
    clock = ManualClock()
    before = born(clock)
    clock.boot()

    clock.jump(-3600)

    assert Ages(clock).predates_boot(before)
    assert not Ages(clock).predates_boot(born(clock))


def test_the_machine_has_been_up_for_a_while() -> None:
    assert 0.0 < SystemClock().uptime() < SystemClock().now()
