"""Whatever happens, and in whatever order: spoold beside a model that is plainly right (see reference_model.py)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
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
    Fate,
    Play,
    Settings,
)

TOTAL: Counter[str] = Counter()

records = st.sampled_from(RECORDS)
names = st.sampled_from(NAMES)
styles = st.sampled_from(STYLES)
fates = st.sampled_from(sorted(Fate))
numbers = st.integers(0, 1)
moments = st.sampled_from((0.5, 1.5, 6.0, 11.0, 35.0, 70.0, 200.0, DOUBT_S - 1, DOUBT_S + 1, 4000.0))
brief_moments = st.sampled_from((0.5, 1.5))
jumps = st.sampled_from((-4000.0, -100.0, 40.0, 4000.0))


def verb(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
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
    verb("start"),
    verb("kill", numbers, st.booleans()),
    verb("drain", numbers),
    verb("fail", st.sampled_from(FAULTS)),
    verb("crash", st.sampled_from((None, True, False))),
    verb("jump", jumps),
)
doings = st.one_of(*app_doings, *daemon_doings, *world_doings)
interruptions = st.lists(st.builds(At, st.sampled_from(POINTS), st.integers(0, 5), doings), max_size=2)
meanwhile = st.lists(st.one_of(*daemon_doings, verb("advance", brief_moments)), max_size=3)


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

    # The app

    @rule(record=records, name=names, styles=st.sampled_from((STYLES, ("original",))), how=st.sampled_from(("rename", "copy")), meanwhile=meanwhile)
    def save(self, record: str, name: str, styles: tuple[str, ...], how: str, meanwhile: list[tuple[Any, ...]]) -> None:
        self.play.save(record, name, self.play.settings.styles or styles, how, *meanwhile)

    @rule(doing=st.one_of(*app_doings))
    def app(self, doing: tuple[Any, ...]) -> None:
        self.do(doing)

    # The daemons

    @rule(number=numbers, interruptions=interruptions)
    def work(self, number: int, interruptions: list[At]) -> None:
        self.play.work(number, interruptions)

    @rule(number=numbers, interruptions=interruptions)
    def sweep(self, number: int, interruptions: list[At]) -> None:
        self.play.sweep(number, interruptions)

    @rule(number=numbers, interruptions=interruptions)
    def tend(self, number: int, interruptions: list[At]) -> None:
        self.play.tend(number, interruptions)

    @rule(interruptions=interruptions)
    def start(self, interruptions: list[At]) -> None:
        self.play.start(interruptions)

    @rule(number=numbers)
    def settle(self, number: int) -> None:
        """Sweep until what lies there has been quiet for long enough."""
        self.play.sweep(number)
        self.play.advance(1.5)
        self.play.sweep(number)

    # The world

    @rule(seconds=moments)
    def advance(self, seconds: float) -> None:
        self.play.advance(seconds)

    @rule(doing=st.one_of(*world_doings))
    def world(self, doing: tuple[Any, ...]) -> None:
        if doing[0] not in ("fail", "crash"):
            self.do(doing)

    @rule(fates=st.lists(fates, min_size=1, max_size=4))
    def fates(self, fates: list[Fate]) -> None:
        self.play.fates(*fates)

    @rule(fate=st.sampled_from((None, Fate.FAILS, Fate.DENIED)))
    def outage(self, fate: Fate | None) -> None:
        self.play.outage(fate)

    def do(self, doing: tuple[Any, ...]) -> None:
        verb, *arguments = doing
        getattr(self.play, verb)(*arguments)

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
