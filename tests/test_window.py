"""How many requests are under way at once: as many as the destination takes well."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from spoold.window import Window
from tests.parts import ManualClock, captured, told


class Server:
    """Answers what was let in, in the order in which it came, in moments that a test decides."""

    def __init__(self, *, at_most: int = 128, is_pinned: bool = False) -> None:
        self.clock = ManualClock()
        self.window = Window("bucket", at_most=at_most, is_pinned=is_pinned, clock=self.clock)
        self.under_way: list[float] = []
        self.most = 0

    def ask(self, count: int = 1) -> None:
        for _ in range(count):
            self.window.enter(self._begin)

    def _begin(self) -> None:
        self.under_way.append(self.clock.monotonic())
        self.most = max(self.most, len(self.under_way))

    def answer(self, *, is_well: bool = True) -> None:
        self.window.leave(self.under_way.pop(0), is_well=is_well)

    def play(self, rounds: int, took_s: Callable[[int], float], *, capacity: int | None = None) -> None:
        """Let all who are under way be answered at once, again and again; beyond the capacity with a fault."""
        for _ in range(rounds):
            self.ask(max(0, 400 - len(self.under_way)))
            count = len(self.under_way)
            self.clock.advance(took_s(count))
            for number in range(count):
                self.answer(is_well=capacity is None or number < capacity)


def test_so_many_begin_and_the_others_wait_for_those() -> None:
    server = Server(at_most=2, is_pinned=True)

    server.ask(5)
    began = len(server.under_way)
    server.answer()

    assert (2, 2, 2) == (began, len(server.under_way), server.most)


def test_it_grows_while_all_is_well_up_to_its_most() -> None:
    server = Server(at_most=40)

    server.play(200, lambda count: 0.03)

    assert (40, 40) == (server.window.limit, server.most)


def test_it_does_not_grow_while_it_is_not_used_up() -> None:
    server = Server()
    for _ in range(1000):
        server.ask()
        server.clock.advance(0.03)
        server.answer()

    assert 16 == server.window.limit


def test_a_fault_halves_it_once_for_all_that_were_under_way() -> None:
    server = Server()
    server.play(300, lambda count: 0.03)
    before = server.window.limit

    with captured() as lines:
        server.play(1, lambda count: 0.03, capacity=0)

    assert before // 2 == server.window.limit
    assert [(before, before // 2)] == [(line["before"], line["after"]) for line in told(lines, "upload.slowed")]


def test_faults_without_end_leave_one() -> None:
    server = Server()

    server.play(50, lambda count: 1.0, capacity=0)

    assert 1 == server.window.limit
    assert server.under_way == [] or len(server.under_way) <= 1


def test_a_server_that_takes_so_many_at_once_is_asked_for_about_as_many() -> None:
    server = Server()
    server.play(100, lambda count: 0.03, capacity=30)

    seen = []
    for _ in range(200):
        server.play(1, lambda count: 0.03, capacity=30)
        seen.append(server.window.limit)

    assert 15 <= min(seen) and max(seen) <= 31
    assert sum(seen) / len(seen) > 20


def test_where_answers_take_longer_the_more_are_under_way_it_stops_growing() -> None:
    """A server that works on one after the other: more at once make it no faster, only later."""
    server = Server(at_most=1000)
    random.seed(0)

    server.play(500, lambda count: 0.01 * count * random.uniform(0.9, 1.1))

    assert server.window.limit < 200


def test_thousands_that_end_as_they_begin_do_not_pile_up() -> None:
    """So do those that wait when the daemon's pool has ended."""
    server = Server(at_most=1, is_pinned=True)
    ended = []

    def begin() -> None:
        ended.append(server.clock.monotonic())
        server.window.leave(ended[-1], is_well=False)

    server.ask()
    for _ in range(20_000):
        server.window.enter(begin)
    server.answer()

    assert 20_000 == len(ended)


def test_one_that_is_pinned_stays_whatever_happens() -> None:
    server = Server(at_most=7, is_pinned=True)

    server.play(20, lambda count: 5.0, capacity=0)

    assert (7, 7) == (server.window.limit, server.most)


@pytest.mark.parametrize("at_most", [1, 4])
def test_it_begins_with_no_more_than_its_most(at_most: int) -> None:
    assert at_most == Server(at_most=at_most).window.limit
