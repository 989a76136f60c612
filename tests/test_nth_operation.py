"""Every call to the OS, the ledger and S3 fails once, and the process dies before and after every effect: nothing is lost.

After SQLite's way of testing. The life of a spool is short and always the same, so each of its operations has a number;
the n-th one fails, n = 1, 2, …, until a life passes in which none did. `make test` takes a sample; the soak takes them all.
"""

from __future__ import annotations

import errno
import itertools
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spoold import pipeline, store
from spoold.errors import StoreUnavailable
from spoold.model import Answer as PutAnswer
from spoold.model import Claim, PutResult, StoredObject
from spoold.steps import Steps
from spoold.uploader import Uploader
from tests import proxy
from tests.figures import record
from tests.life import HASTY, SCRIPTS, Life, Past, Step, Will
from tests.nth import Fail, Hand, Kill, Layer, Plan, Then, ledger_says, refuses
from tests.parts import ledger_template
from tests.proxy import FaultProxy
from tests.servers import RcloneServer

T = TypeVar("T")

PARTS = tuple(SCRIPTS)
ERRNOS = ("EIO", "ENOSPC", "EINTR", "EACCES", "ENOENT")
SAYINGS = ("disk I/O error", "database or disk is full", "database is locked", "disk I/O error, although it was done")
WHOLE = pytest.mark.timeout(6 * 3600)


@dataclass(frozen=True, slots=True)
class World:
    """What lives stand on: a server, room for their directories, and what there is when each part begins."""

    server: RcloneServer
    directory: Path
    pasts: dict[str, Past]
    _numbers: itertools.count[int]
    _clean: dict[str, Hand]

    def life(self, part: str, plan: Plan | None = None, **settings: Any) -> Life:
        """Return a life of this part, not yet begun."""
        directory = self.directory / f"{part.replace(' ', '-')}-{next(self._numbers)}"
        script: Sequence[Step] = settings.pop("script", None) or SCRIPTS[part]
        hand = settings.pop("hand", None) or Hand(plan)
        return Life(directory, self.server, hand, script=script, past=self.pasts[part], **settings)

    def clean(self, part: str) -> Hand:
        """Return what a life of this part does to which nothing happens."""
        if part not in self._clean:
            self._clean[part] = Hand(keeps_places=True)
            lived(self.life(part, hand=self._clean[part]))
        return self._clean[part]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, no_process_is_left: None, environment: None) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("nth")
    with RcloneServer(directory / "s3") as server:
        world = World(server, directory, {}, itertools.count(), {})
        past = Past(ledger_template(), "none", {})
        for part in PARTS[:2]:
            world.pasts[part] = past
            life = world.life(part)
            life.run()
            life.demand_laws()
            past = life.past()
        world.pasts.update({"replaced": past, "given back": world.pasts["again"], "put again": world.pasts["again"]})
        yield world


def lived(life: Life) -> Life:
    """Let a life pass, and hold it to the laws; it leaves nothing behind then."""
    try:
        life.run()
        life.demand_laws()
    except BaseException as error:
        life.close()
        error.add_note(f"in {life.directory}, {life.hand.plan}")
        raise
    life.forget()
    return life


def told(run: str, layer: str, part: str, kind: str, faults: int) -> None:
    """Keep how many faults were survived: what was lost has failed the test before. run: "sample" or "whole"."""
    record("nth-operation", layer=layer, run=run, part=part, kind=kind, faults=faults, lost=0)


def sample(items: Sequence[T], most: int) -> list[T]:
    """Return some of them, evenly: always the same ones."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


def places(world: World, part: str, layer: Layer, *, within: str = "") -> list[int]:
    """Return the numbers of a layer's operations, for each place in spoold the first that is done from there.

    within: only those that lead there by this function.
    """
    hand = world.clean(part)
    first: dict[tuple[str, ...], int] = {}
    for op, place in zip(hand.ops, hand.places, strict=True):
        if op.layer == layer and within in " ".join(place):
            first.setdefault(place, op.number)
    return list(first.values())


def effects(world: World, part: str) -> int:
    """Return at how many moments of a life the process may die: before and after each effect."""
    return 2 * sum(op.is_effect for op in world.clean(part).ops)


# Calls to the OS, and statements and commits of the ledger


def os_fault(number: int, kind: str, **settings: Any) -> Fail:
    return Fail("os", number, refuses(getattr(errno, kind)), **settings)


def ledger_fault(number: int, kind: str, **settings: Any) -> Fail:
    message, _, although = kind.partition(", ")
    return Fail("ledger", number, ledger_says(message), moment="after" if although else "before", **settings)


def survived(world: World, part: str, plan: Fail, kind: str, **settings: Any) -> bool:
    """Let a life pass in which the plan's fault happens; say whether it did."""
    life = world.life(part, plan, **settings)
    life.is_for_a_person = kind == "EACCES"  # to mend
    lived(life)
    return plan.hit is not None


FAULTS: dict[Layer, tuple[Callable[..., Fail], tuple[str, ...]]] = {
    "os": (os_fault, ERRNOS),
    "ledger": (ledger_fault, SAYINGS),
}


@pytest.mark.parametrize("layer", FAULTS)
@pytest.mark.parametrize("part", PARTS)
def test_an_operation_that_fails_once_does_no_harm(world: World, part: str, layer: Layer) -> None:
    make, kinds = FAULTS[layer]
    numbers = sample(places(world, part, layer), 3)

    hits = [
        survived(world, part, make(number, kinds[turn % len(kinds)]), kinds[turn % len(kinds)], tries_s=turn % 2 * 8.0)
        for turn, number in enumerate(numbers)
    ]

    told("sample", layer, part, "all in turn", sum(hits))


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize(
    ("layer", "kind"), [(layer, kind) for layer, (_, kinds) in FAULTS.items() for kind in kinds], ids=lambda value: str(value)
)
@pytest.mark.parametrize("part", PARTS)
def test_every_operation_may_fail_once(world: World, part: str, layer: Layer, kind: str) -> None:
    make, _ = FAULTS[layer]
    faults = 0

    for number in itertools.count(1):
        if not survived(world, part, make(number, kind), kind, tries_s=number % 2 * 8.0):
            break
        faults += 1

    told("whole", layer, part, kind, faults)
    assert faults > 100


def survived_outage(world: World, part: str, plan: Fail, *, seconds: float) -> bool:
    """Let a life pass in which everything fails from the plan's fault on, for so long; say whether it did."""
    life = world.life(part, plan)
    over_at: list[float] = []

    def lasts() -> bool:
        over_at[:] = over_at or [life.clock.now() + seconds]
        return life.clock.now() < over_at[0]

    plan.lasts = lasts
    lived(life)
    return plan.hit is not None


OUTAGES: list[tuple[Layer, str]] = [
    ("os", "EIO"), ("os", "ENOSPC"), ("ledger", "disk I/O error"), ("ledger", "database or disk is full"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "kind"), OUTAGES)
def test_an_outage_does_no_harm(world: World, layer: Layer, kind: str) -> None:
    make, _ = FAULTS[layer]

    hits = [
        survived_outage(world, "replaced", make(number, kind), seconds=20.0)
        for number in sample(places(world, "replaced", layer), 3)
    ]

    told("sample", layer, "outage of replaced", kind, sum(hits))


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize(("layer", "kind"), OUTAGES)
@pytest.mark.parametrize("part", PARTS)
def test_an_outage_may_begin_at_every_operation(world: World, part: str, layer: Layer, kind: str) -> None:
    make, _ = FAULTS[layer]

    hits = [survived_outage(world, part, make(number, kind), seconds=20.0) for number in places(world, part, layer)]

    told("whole", layer, f"outage of {part}", kind, sum(hits))


# A fault that meets what a killed process has left


def survived_after_a_kill(world: World, part: str, moment: int, fault: Fail, kind: str) -> bool:
    """Let the process die at this moment, and the fault happen to the next one; say whether it did."""
    life = world.life(part, Then(Kill(moment), fault))
    life.is_for_a_person = kind == "EACCES"
    lived(life)
    return fault.hit is not None


@pytest.mark.parametrize("layer", FAULTS)
def test_an_operation_of_a_recovery_that_fails_once_does_no_harm(world: World, layer: Layer) -> None:
    make, kinds = FAULTS[layer]
    moments = sample(range(effects(world, "replaced")), 5)

    hits = [
        survived_after_a_kill(world, "replaced", moment, make(12 + 9 * turn, kind), kind)
        for turn, moment in enumerate(moments)
        for kind in [kinds[turn % len(kinds)]]
    ]

    told("sample", layer, "recovery of replaced", "all in turn", sum(hits))


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize("layer", FAULTS)
@pytest.mark.parametrize("part", PARTS)
def test_every_operation_of_a_recovery_may_fail_once(world: World, part: str, layer: Layer) -> None:
    make, kinds = FAULTS[layer]
    faults = 0

    for moment in range(0, effects(world, part), 7):
        for number in itertools.count(1 + moment % 5, 5):
            kind = kinds[(moment + number) % len(kinds)]
            if not survived_after_a_kill(world, part, moment, make(number, kind), kind):
                break
            faults += 1

    told("whole", layer, f"recovery of {part}", "all in turn", faults)


# Requests to S3


def faults_of_s3(gate: threading.Event) -> dict[str, proxy.Fault]:
    """Return what may become of a request; `gate` opens when what comes late may come."""
    never = threading.Event()
    return {
        "500": proxy.Answer(500, proxy.error_body("InternalError")),
        "503": proxy.Answer(503, proxy.SLOW_DOWN),
        "403": proxy.Answer(403, proxy.error_body("AccessDenied")),
        "lost before": proxy.Hold(never, hang_up=True),
        "lost, then late": proxy.Hold(gate, hang_up=True),
        "timeout before": proxy.Delay(never),
        "timeout after": proxy.DelayAnswer(never),
        "lost after": proxy.LoseAnswer(),
        "reset": proxy.Reset(),
        "short body": proxy.CutAnswer(20),
        "page": proxy.HTML,
        "flipped byte": proxy.Flip(40),
        "flipped answer": proxy.FlipAnswer(60),
    }


KINDS_OF_S3 = tuple(faults_of_s3(threading.Event()))
OPAQUE = proxy.RewriteAnswer({"ETag": '"opaque"', "x-amz-checksum-.*": None})
"""A server whose answers to PUTs tell nothing of the content: what it stored is read back."""


def survived_at_s3(
    world: World, part: str, number: int, kind: str, *, tries_s: float, is_opaque: bool = False,
    script: Sequence[Step] | None = None,
) -> bool:  # fmt: skip
    """Let a life pass in which this happens to its n-th request; say whether it did."""
    gate = threading.Event()
    fault = faults_of_s3(gate)[kind]
    seen = itertools.count(1)

    def befall(request: proxy.Request) -> proxy.Fault | None:
        if next(seen) == number:
            return fault
        return OPAQUE if is_opaque and request.method == "PUT" and "partNumber" not in request.path else None

    with FaultProxy(world.server.endpoint_url) as before:
        before.rules.append(befall)
        is_slow = kind.startswith("timeout")
        life = world.life(
            part, endpoint_url=before.endpoint_url, tries_s=tries_s, read_timeout_s=1.0 if is_slow else 20.0, script=script,
            watches_bucket=not kind.startswith("flipped"),
        )  # fmt: skip
        life.late = gate
        life.on_late = lambda: until_landed(before)
        lived(life)
        return next(seen) > number


def until_landed(before: FaultProxy) -> None:
    """Wait until what was held has been carried out."""
    for seen in before.seen:
        if isinstance(seen.fault, proxy.Hold) and seen.fault.gate.is_set():
            before._await(lambda: [seen] if seen.ended_at is not None else [], 1, 20.0, "what comes late")  # noqa: B023


@pytest.mark.parametrize("part", PARTS)
def test_a_request_that_fails_once_does_no_harm(world: World, part: str) -> None:
    shift = 3 * PARTS.index(part)
    kinds = [KINDS_OF_S3[(number + shift) % len(KINDS_OF_S3)] for number in range(3)]

    hits = [
        survived_at_s3(world, part, number, kind, tries_s=number % 2 * 8.0, is_opaque=number % 3 == 0)
        for number, kind in enumerate(kinds, start=1)
    ]

    told("sample", "s3", part, "all in turn", sum(hits))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_put_that_arrives_after_a_newer_one_is_put_right(world: World, number: int) -> None:
    assert survived_at_s3(world, "first", number, "lost, then late", tries_s=8.0, script=HASTY)


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize("is_opaque", [False, True], ids=["told", "read back"])
@pytest.mark.parametrize("kind", KINDS_OF_S3)
@pytest.mark.parametrize("part", [*PARTS, "hasty"])
def test_every_request_may_fail_once(world: World, part: str, kind: str, is_opaque: bool) -> None:
    faults = 0
    script = HASTY if part == "hasty" else None

    for number in itertools.count(1):
        hits = [
            survived_at_s3(
                world, "first" if part == "hasty" else part, number, kind, tries_s=tries_s, is_opaque=is_opaque, script=script
            )
            for tries_s in (0.0, 8.0)
        ]  # fmt: skip
        faults += sum(hits)
        if not any(hits):
            break

    told("whole", "s3", part, f"{kind}, {'read back' if is_opaque else 'told'}", faults)


# The process dies


def killed(world: World, part: str, *numbers: int) -> int:
    """Let a life pass in which the process dies at these moments; return how often it did."""
    plan = Kill(*numbers)
    lived(world.life(part, plan))
    return len(plan.hits)


@pytest.mark.parametrize("part", PARTS)
def test_killed_at_any_effect_nothing_is_lost(world: World, part: str) -> None:
    kills = sum(killed(world, part, number) for number in sample(range(effects(world, part)), 4))

    record("kill", how="single", run="sample", part=part, kills=kills, lost=0)
    assert 4 == kills


@pytest.mark.parametrize("part", PARTS)
def test_killed_again_while_it_recovers_nothing_is_lost(world: World, part: str) -> None:
    firsts = sample(range(effects(world, part)), 3)

    kills = sum(killed(world, part, number, 9 * turn) for turn, number in enumerate(firsts))

    record("kill", how="pair", run="sample", part=part, kills=kills, lost=0)
    assert kills > 3


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize("part", PARTS)
def test_killed_at_every_effect_nothing_is_lost(world: World, part: str) -> None:
    kills = 0

    for number in itertools.count():
        if not killed(world, part, number):
            break
        kills += 1

    record("kill", how="single", run="whole", part=part, kills=kills, lost=0)
    assert kills > 100


@pytest.mark.soak
@WHOLE
@pytest.mark.parametrize("share", range(2))
@pytest.mark.parametrize("part", PARTS)
def test_killed_at_every_pair_of_effects_nothing_is_lost(world: World, part: str, share: int) -> None:
    """Every other moment: whoever dies before an effect leaves the same as after the one before it."""
    kills = 0

    for first in range(1 + 2 * share, effects(world, part), 4):
        for second in itertools.count(1, 2):
            died = killed(world, part, first, second)
            kills += died
            if died < 2:
                break

    record("kill", how="pair", run="whole", part=f"{part}, share {share} of 2", kills=kills, lost=0)


# Whether the process that dies in here dies as a process does


def test_a_process_that_is_killed_leaves_what_one_leaves_that_dies_in_here(world: World) -> None:
    """Nothing that runs on the way out, `finally` or a context manager's end, may do what a killed process would not."""
    pasts = world.directory / "pasts"
    pasts.write_bytes(pickle.dumps(world.pasts))
    arguments = [sys.executable, "-m", "tests.life", str(world.server.directory), str(world.server.port), str(pasts)]

    kills = 0
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdin is not None and living.stdout is not None
        for part in PARTS[:3]:  # in the others somebody does something at a moment that the dead would miss
            for number in sample(range(effects(world, part)), 2):
                theirs_at = world.directory / f"killed-{part.replace(' ', '-')}-{number}"
                living.stdin.write(f"{theirs_at}\t{part}\t{number}\n")
                living.stdin.flush()
                assert -signal.SIGKILL == int(living.stdout.readline())
                ours = world.life(part, Kill(number))
                left: list[tuple[dict[str, Any], Will]] = []
                ours.on_death = lambda life=ours, left=left: left.append((life.footprint(), life.will()))  # type: ignore[misc]
                ours.run()
                footprint, will = left[0]
                theirs = Life(theirs_at, world.server, will=will)

                assert footprint == theirs.footprint(), f"{part} {number}: {ours.hand.plan.hits}"  # type: ignore[attr-defined]

                ours.demand_laws()
                ours.forget()
                lived(theirs)
                kills += 1
        living.stdin.close()

    record("kill", how="SIGKILL of a process", run="sample", part="all", kills=kills, lost=0)


# Whether all this finds anything


def test_a_batch_that_is_called_stored_before_it_is_put_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def store_first(self: Any, claim: Claim, parts: Any) -> Steps[Claim]:
        puts = self._ledger.intend(claim, parts.uploader.prepare(claim.batch, fingerprint=None))
        results = [
            PutResult(put, PutAnswer.CONFIRMED, StoredObject(put.bucket, put.key, put.digests.size, "", put.digests.md5))
            for put in puts
        ]
        claim = self._ledger.stored(claim, results, replaced_after_s=60.0, elapsed_s=0.0)
        yield from parts.uploader.put(puts, on_upload=lambda put, upload: None)
        return claim

    monkeypatch.setattr(pipeline.Pipeline, "_upload", store_first)

    with pytest.raises(AssertionError, match="is lost after"):
        for number in sample(range(effects(world, "replaced")), 32):
            killed(world, "replaced", number)


def test_a_put_that_is_believed_without_an_answer_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Uploader._send

    def believe(self: Uploader, put: Any, on_upload: Any) -> StoredObject:
        try:
            return send(self, put, on_upload)
        except StoreUnavailable:
            return StoredObject(put.bucket, put.key, put.digests.size, "", put.digests.md5)

    monkeypatch.setattr(Uploader, "_send", believe)

    with pytest.raises(AssertionError, match="is lost after"):
        for number in itertools.count(1):
            assert survived_at_s3(world, "replaced", number, "reset", tries_s=8.0), "no fault found it"


def test_an_answer_that_is_not_compared_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "confirms", lambda stored, digests: True)

    with pytest.raises(AssertionError, match="is lost after"):
        for number in itertools.count(1):
            assert survived_at_s3(world, "replaced", number, "flipped byte", tries_s=8.0), "no fault found it"


def test_a_fault_of_the_os_that_nobody_names_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_on(error: OSError, tried: str, path: str) -> Any:
        raise error

    monkeypatch.setattr(pipeline, "fault_of", pass_on)

    with pytest.raises(OSError):
        for number in places(world, "replaced", "os", within="pipeline.py"):
            survived(world, "replaced", os_fault(number, "EIO"), "EIO")
