"""A spool whose destination or disk refuses is held, probed, and goes on by itself (rule 11)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spoold import uploader
from spoold.errors import LedgerUnavailable, SpoolBroken, SpooldError, StoreDenied, StoreUnavailable, Unproven
from spoold.holds import Holds
from spoold.model import Headers, Outcome
from tests.parts import BUCKET, NAME, RECORD, Bench, captured, told, walked
from tests.servers import RcloneServer

DENIED = StoreDenied("put avatars/42/original/cat.jpg: 403 AccessDenied", hint="renew the credentials")
BROKEN = SpoolBroken("open avatars/42: Input/output error", hint="look at the disk")
THREADS = 6


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


class Probe:
    """A thing that is tried for real, and works or not as the test says. wrong: what it raises; None while it works."""

    def __init__(self, clock: Callable[[], float], wrong: SpooldError | None = None) -> None:
        self.wrong = wrong
        self.tried_at: list[float] = []
        self._clock = clock

    def __call__(self) -> None:
        self.tried_at.append(self._clock())
        if self.wrong is not None:
            raise self.wrong

    @property
    def times(self) -> int:
        return len(self.tried_at)


class Held:
    """Holds of one spool with two probes that the test rules."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.store = Probe(bench.clock.monotonic)
        self.disk = Probe(bench.clock.monotonic)
        self.releases: list[set[str]] = []
        self.holds = Holds(
            ledger=bench.ledger, clock=bench.clock, probes={NAME: {"store": self.store, "disk": self.disk}},
            on_release=lambda: self.releases.append(self.holds.held()),
        )  # fmt: skip

    @property
    def is_held(self) -> bool:
        in_memory, written_down = NAME in self.holds.held(), NAME in self.bench.ledger.held()
        assert in_memory == written_down
        return in_memory

    def tend(self, seconds: float) -> None:
        """Let time pass as the daemon does: look twice a second whether a probe is due."""
        for _ in range(round(seconds / 0.5)):
            self.bench.clock.advance(0.5)
            self.holds.probe_due()


@pytest.fixture
def held(bench: Bench) -> Held:
    return Held(bench)


# Holding


@pytest.mark.parametrize("fault", [DENIED, BROKEN, StoreUnavailable("put: timeout"), Unproven("put: no etag")])
def test_rule_11_one_refusal_is_no_hold_if_the_probe_succeeds(held: Held, fault: SpooldError) -> None:
    """One key may be denied by a policy, one file may lie on a bad block: all else goes on."""
    is_down = held.holds.is_down(NAME, fault)

    assert not is_down and not held.is_held


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(DENIED, "store"), (StoreUnavailable("put: timeout"), "store"), (Unproven("put: no etag"), "store"), (BROKEN, "disk")],
)
def test_rule_11_a_refusal_is_believed_if_the_probe_fails_too(held: Held, fault: SpooldError, kind: str) -> None:
    probe = held.disk if kind == "disk" else held.store
    probe.wrong = DENIED if kind == "store" else BROKEN

    is_down = held.holds.is_down(NAME, fault)

    assert is_down and held.is_held
    assert (1, 1) == (probe.times, held.store.times + held.disk.times), "the other kind is not asked"


@pytest.mark.parametrize("kind", [StoreDenied, StoreUnavailable])
def test_rule_11_what_no_key_can_be_to_blame_for_needs_no_probe(held: Held, kind: type[StoreDenied]) -> None:
    """It may be over when a long walk ends: a probe that succeeds then would make the record pay for it."""
    held.holds.is_down(NAME, DENIED)
    fault = kind("put avatars/42/original/cat.jpg: 400 ExpiredToken", is_everywhere=True)

    is_down = held.holds.is_down(NAME, fault)

    assert is_down and held.is_held
    held.tend(1)
    assert not held.is_held


def test_rule_11_in_a_storm_one_probe_that_has_luck_is_not_believed(bench: Bench) -> None:
    """A server that refuses nine requests of ten answers one probe of ten."""
    answers = iter([None, None, StoreUnavailable("put probe: 503")])

    def probe() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    assert bench.holds(store=probe).is_down(NAME, StoreUnavailable("put avatars/42/original/cat.jpg: 503"))


def test_rule_11_a_hold_says_what_the_probe_met_and_what_to_do(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED

    held.holds.is_down(NAME, StoreUnavailable("put avatars/42/original/cat.jpg: 503"))

    row = bench.ledger.held()[NAME]
    assert ("StoreDenied", str(DENIED), "renew the credentials") == (row.error_code, row.error, row.hint)


def test_rule_11_a_hold_is_told_once_however_many_walks_fail_and_probes_do(held: Held) -> None:
    held.store.wrong = DENIED

    with captured() as events:
        for _ in range(5):
            held.holds.is_down(NAME, DENIED)
        held.tend(30)

    assert [NAME] == [line["spool"] for line in told(events, "spool.held")]


@pytest.mark.parametrize("wrong", [None, DENIED])
def test_rule_11_of_several_walks_that_ask_at_once_one_probes(bench: Bench, wrong: SpooldError | None) -> None:
    asked, gate = threading.Event(), threading.Event()
    probes: list[int] = []

    def probe() -> None:
        probes.append(1)
        asked.set()
        assert gate.wait(20)
        if wrong is not None:
            raise wrong

    holds = bench.holds(store=probe)
    answers: list[bool] = []
    ready = threading.Barrier(THREADS + 1)

    def walk() -> None:
        ready.wait(20)
        answers.append(holds.is_down(NAME, DENIED))

    threads = [threading.Thread(target=walk) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    ready.wait(20)
    assert asked.wait(20)
    gate.set()
    for thread in threads:
        thread.join(20)

    assert [1] == probes
    assert [wrong is not None] * THREADS == answers


def test_rule_11_a_probe_that_succeeded_speaks_for_a_second(bench: Bench, held: Held) -> None:
    held.holds.is_down(NAME, DENIED)
    held.store.wrong = DENIED
    bench.clock.advance(0.9)
    within = held.holds.is_down(NAME, DENIED)
    bench.clock.advance(0.2)
    after = held.holds.is_down(NAME, DENIED)

    assert (False, True) == (within, after)
    assert 2 == held.store.times


def test_rule_11_a_probe_of_the_store_says_nothing_of_the_disk(held: Held) -> None:
    held.disk.wrong = BROKEN
    held.holds.is_down(NAME, DENIED)

    is_down = held.holds.is_down(NAME, BROKEN)

    assert is_down and held.is_held


def test_a_root_that_is_gone_needs_no_probe(bench: Bench, held: Held) -> None:
    held.holds.hold(NAME, BROKEN)

    assert held.is_held
    assert (0, "SpoolBroken") == (held.disk.times, bench.ledger.held()[NAME].error_code)


def test_rule_11_while_a_spool_is_held_nothing_is_claimed_and_no_attempt_is_spent(
    bench: Bench, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers at the store's address."""
    monkeypatch.setattr(uploader, "_PERSISTENCE_S", 0.1)
    held.store.wrong = DENIED
    for number in range(3):
        bench.write(f"avatars/{number}/original/cat.jpg")
        bench.offer(f"avatars/{number}")

    outcome = walked(bench.pipeline(holds=held.holds), bench.claimed())
    bench.clock.advance(3600.0)

    assert Outcome.HELD == outcome
    assert bench.claim() is None
    rows = bench.rows("SELECT state, attempts, crashes FROM batch")
    assert [("pending", 0, 0)] * 3 == [tuple(row.values()) for row in rows]


def test_rule_11_another_spool_goes_on(bench: Bench) -> None:
    def denied() -> None:
        raise DENIED

    works: dict[str, Callable[[], None]] = {"store": lambda: None, "disk": lambda: None}
    holds = Holds(
        ledger=bench.ledger, clock=bench.clock, on_release=lambda: None,
        probes={"elsewhere": {"store": denied, "disk": denied}, NAME: works},
    )  # fmt: skip
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()

    holds.is_down("elsewhere", DENIED)

    assert {"elsewhere"} == holds.held()
    assert bench.claim() is not None


# Going on


def test_rule_11_what_is_held_is_probed_after_1_s_then_2_s_up_to_a_minute(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)
    began = bench.clock.monotonic()

    held.tend(250)

    waits = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [sum(waits[: n + 1]) for n in range(len(waits))] == [at - began for at in held.store.tried_at[1:]]


def test_rule_11_a_spool_goes_on_by_itself_when_the_probe_succeeds(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)
    held.tend(10)
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()
    before = bench.claim()

    held.store.wrong = None
    with captured() as events:
        held.tend(8)

    assert before is None and bench.claim() is not None
    assert not held.is_held
    assert [set()] == held.releases, "workers are woken when they may claim, once"
    assert [NAME] == [line["spool"] for line in told(events, "spool.released")]


def test_rule_11_a_spool_that_is_held_again_is_probed_soon_again(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)
    held.tend(20)
    held.store.wrong = None
    held.tend(20)
    assert not held.is_held

    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)
    held.store.wrong = None
    held.tend(1)

    assert not held.is_held


def test_nothing_is_probed_where_nothing_is_held(held: Held) -> None:
    held.tend(100)

    assert 0 == held.store.times + held.disk.times
    assert [] == held.releases


@pytest.mark.parametrize("first", ["store", "disk"])
def test_rule_11_disk_and_store_are_held_apart_and_a_spool_goes_on_when_both_work(held: Held, first: str) -> None:
    held.store.wrong, held.disk.wrong = DENIED, BROKEN
    held.holds.is_down(NAME, DENIED)
    held.holds.is_down(NAME, BROKEN)
    probes = {"store": held.store, "disk": held.disk}

    probes.pop(first).wrong = None
    held.tend(10)
    after_one = held.is_held
    probes.popitem()[1].wrong = None
    held.tend(60)

    assert after_one
    assert not held.is_held
    assert 1 == len(held.releases)


def test_rule_11_what_works_again_does_not_stay_held_with_what_does_not(held: Held) -> None:
    held.store.wrong, held.disk.wrong = DENIED, BROKEN
    held.holds.is_down(NAME, DENIED)
    held.holds.is_down(NAME, BROKEN)

    held.disk.wrong = None
    held.tend(10)
    tried = held.disk.times
    held.tend(10)

    assert tried == held.disk.times, "it works: it is not tried again and again"


def test_a_hold_tells_what_is_wrong_now(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)

    held.store.wrong = StoreDenied("put: NoSuchBucket", hint="create the bucket")
    held.tend(2)

    assert ("put: NoSuchBucket", "create the bucket") == (bench.ledger.held()[NAME].error, bench.ledger.held()[NAME].hint)


def test_a_ledger_that_is_away_at_the_release_is_tried_again(bench: Bench, held: Held) -> None:
    held.store.wrong = DENIED
    held.holds.is_down(NAME, DENIED)
    held.store.wrong = None

    with bench.ledger_away():
        held.tend(5)
    still_held = held.is_held
    held.tend(5)

    assert still_held and [set()] == held.releases
    assert not held.is_held


def test_a_ledger_that_is_away_when_a_spool_is_to_be_held_hides_nothing(bench: Bench, held: Held) -> None:
    """The walk ends with the ledger's fault; the hold is in memory, and the next probe writes it down."""
    held.store.wrong = DENIED

    with bench.ledger_away(), pytest.raises(LedgerUnavailable):
        held.holds.is_down(NAME, DENIED)
    in_memory = held.holds.held()
    held.tend(2)

    assert {NAME} == in_memory
    assert held.is_held


def test_what_a_daemon_before_us_held_is_forgotten(bench: Bench, held: Held) -> None:
    """Whatever still refuses is found out at once, and a hold that nobody probes would last for ever."""
    bench.ledger.hold(NAME, DENIED)
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()
    before = bench.claim()

    with captured() as events:
        held.holds.forget_before()

    assert before is None and bench.claim() is not None
    assert [NAME] == [line["spool"] for line in told(events, "spool.released")]


def test_there_is_nothing_to_tell_where_nothing_was_held(held: Held) -> None:
    with captured() as events:
        held.holds.forget_before()

    assert [] == events


def test_rule_11_a_probe_is_the_real_thing(tmp_path: Path, rclone_server: RcloneServer) -> None:
    """No bucket: held. Somebody makes the bucket: it goes on, and nothing of the probe is left in it."""
    with Bench(tmp_path, endpoint_url=rclone_server.endpoint_url) as bench:
        holds = bench.holds(store=lambda: bench.store.probe(BUCKET, ".spoold-probe", Headers("application/octet-stream")))
        bench.write(f"{RECORD}/original/cat.jpg")
        bench.offer()
        first = walked(bench.pipeline(holds=holds), bench.claimed())

        rclone_server.create_bucket(BUCKET)
        bench.clock.advance(1)
        holds.probe_due()
        second = walked(bench.pipeline(holds=holds), bench.claimed())

        assert Outcome.HELD == first
        assert Outcome.WAITING == second
        assert [f"{RECORD}/original/cat.jpg"] == list(rclone_server.objects(BUCKET))


def test_rule_11_a_missing_root_is_the_real_thing(bench: Bench) -> None:
    """The disk is unmounted under the daemon, and mounted again."""
    holds = bench.holds(disk=lambda: bench.spool.move_in(bench.ledger.id))
    bench.write(f"{RECORD}/original/cat.jpg")
    bench.offer()
    away = bench.root.with_name("away")

    os.rename(bench.root, away)
    outcome = walked(bench.pipeline(holds=holds), bench.claimed())
    held = holds.held()
    os.rename(away, bench.root)
    bench.clock.advance(1)
    holds.probe_due()

    assert (Outcome.HELD, {NAME}) == (outcome, held)
    assert 0 == bench.claimed().batch.attempts
