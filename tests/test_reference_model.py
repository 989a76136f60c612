"""Whatever happens, and in whatever order: spoold beside a model that is plainly right (see reference_model.py)."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.figures import record as record_figures
from tests.reference_model import (
    DOUBT_S,
    FAULTS,
    NAMES,
    POINTS,
    RECORDS,
    STYLES,
    At,
    Doing,
    Fate,
    Play,
    Settings,
)

TOTAL: Counter[str] = Counter()

records = st.sampled_from((RECORDS[0], *RECORDS))
names = st.sampled_from(NAMES)
styles = st.sampled_from(STYLES)
fates = st.sampled_from((Fate.LATE, Fate.LATE, Fate.LATE, Fate.LOST, *sorted(Fate)))
numbers = st.integers(0, 1)
moments = st.sampled_from((0.5, 1.5, 6.0, 11.0, 35.0, 70.0, 200.0, DOUBT_S - 1, DOUBT_S + 1, 4000.0))
brief_moments = st.sampled_from((0.5, 1.5))
jumps = st.sampled_from((-4000.0, -100.0, 40.0, 4000.0))


def verb(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Doing]:
    return st.tuples(st.just(name), *arguments)


app_doings = (
    verb("save", records, names),
    verb("save", records, names, st.just(("original",)), st.just("copy")),
    verb("save_again", records),
    verb("save_beside", records, names),
    verb("late_style", records),
    verb("remove", records),
    verb("rewrite", records, styles, st.booleans()),
    verb("append", records, styles),
    verb("touch", records, styles, st.booleans()),
    verb("link", records, names),
    verb("rewrite_links"),
    verb("begin_copy", records, names, styles),
    verb("end_copy", records),
)
daemon_doings = (
    verb("look", records, numbers),
    verb("sweep", numbers),
    verb("work", numbers),
    verb("tend", numbers),
)
world_doings = (
    verb("advance", st.sampled_from((1.5, 6.0))),
    verb("freeze", st.sampled_from((6.0, 35.0, 200.0))),
    verb("settle_late", st.integers(0, 3), st.booleans()),
    verb("fates", fates),
    verb("fates", fates, fates),
    verb("start"),
    verb("kill", numbers, st.booleans()),
    verb("drain", numbers),
    verb("jump", jumps),
)
deaths = (
    verb("fail", st.sampled_from(FAULTS)),
    verb("crash", st.sampled_from((None, True, False))),
    verb("crash", st.just(True)),
)
doings = st.one_of(*app_doings, *daemon_doings, *world_doings, *deaths)
interruptions = st.lists(st.builds(At, st.sampled_from(POINTS), st.integers(0, 5), doings), max_size=3)
meanwhile = st.lists(st.one_of(*daemon_doings, verb("advance", brief_moments)), max_size=3)
saves = (
    verb("save", records, names, st.sampled_from((STYLES, ("original",))), st.sampled_from(("rename", "copy")), meanwhile),
)


class World(RuleBasedStateMachine):
    """The app, the daemons, S3, and what befalls them."""

    play: Play

    @initialize(
        styles=st.sampled_from((None, STYLES)), deletes=st.booleans() | st.just(True), strangers=st.booleans(),
        grace_s=st.sampled_from((10.0, 0.0)), keep_for_s=st.sampled_from((0.0, 100.0)),
        replaced_after_s=st.sampled_from((60.0, 2000.0)), multipart_threshold=st.sampled_from((16_000_000, 150)),
    )  # fmt: skip
    def open(self, strangers: bool, **chosen: Any) -> None:
        self.play = Play(Settings(**chosen), strangers=strangers)

    @rule(doing=st.one_of(*saves))
    def save(self, doing: Doing) -> None:
        self.do(doing)

    @rule(doing=st.one_of(*app_doings))
    def app(self, doing: Doing) -> None:
        self.do(doing)

    @rule(number=numbers, interruptions=interruptions)
    def work(self, number: int, interruptions: list[At]) -> None:
        self.do(("settle", number))
        self.do(("work", number, interruptions))

    @rule(turn=st.sampled_from(("work", "work", "sweep", "tend")), number=numbers, interruptions=interruptions)
    def daemon(self, turn: str, number: int, interruptions: list[At]) -> None:
        self.do((turn, number, interruptions))

    @rule(interruptions=interruptions)
    def start(self, interruptions: list[At]) -> None:
        self.do(("start", interruptions))

    @rule(number=numbers)
    def settle(self, number: int) -> None:
        self.do(("settle", number))

    @rule(seconds=moments)
    def advance(self, seconds: float) -> None:
        self.do(("advance", seconds))

    @rule(doing=st.one_of(*world_doings))
    def world(self, doing: Doing) -> None:
        self.do(doing)

    @rule(fates=st.lists(fates, min_size=1, max_size=4))
    def fates(self, fates: list[Fate]) -> None:
        self.do(("fates", *fates))

    @rule(fate=st.sampled_from((None, Fate.FAILS, Fate.DENIED)))
    def outage(self, fate: Fate | None) -> None:
        self.do(("outage", fate))

    def do(self, doing: Doing) -> None:
        self.play.do(doing)

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        try:
            self.play.end()
        finally:
            TOTAL.update(self.play.counts + self.play.bucket.counts)
            TOTAL["examples"] += 1
            self.play.close()


def explore(examples: int, steps: int, **more: Any) -> None:
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(HealthCheck), **more,
        ),
    )  # fmt: skip


def test_nothing_is_lost_stale_or_half_whatever_happens() -> None:
    """The same examples in each run: the soak looks for new ones."""
    explore(40, 25, derandomize=True)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_is_lost_stale_or_half_in_thousands_of_plays() -> None:
    explore(int(os.environ.get("SPOOLD_EXAMPLES", "3000")), 60)
