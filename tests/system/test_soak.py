"""For as long as asked: apps, writers, weather, kills, freezes, full disks. Then everything is downloaded and compared.

`make soak MINUTES=15` runs it; with the SOAK_SEED that it prints the same things come in the same order, as far as chance
lets them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spoold.demo import bound
from spoold.store import PROBE
from tests import busy_app, figures, writers
from tests.busy_app import Report, Task
from tests.proxy import HTML, SLOW_DOWN, Answer, Delay, Fault, FaultProxy, Flip, Hold, LoseAnswer, Request, Reset, error_body
from tests.racing import mounted, racing
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until
from tests.writers import content

MINUTES = float(os.environ.get("SOAK_MINUTES", "15"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)

_SOON = {
    "spoold.cleanup._OPEN_AGAIN_S": 0.5, "spoold.cleanup._LOOK_AGAIN_S": 0.2, "spoold.uploader._PERSISTENCE_S": 1.0,
    "spoold.owner.LEASE_S": 3.0, "spoold.daemon.LEASE_S": 3.0, "spoold.daemon._REMOVE_EVERY_S": 0.5,
    "spoold.ledger.clearing._REMOVE_AGAIN_S": 2.0,
}  # fmt: skip
CONSTANTS = BRISK | _SOON
# Drained, or not in time; no ledger at the start, with a full disk; killed, or told to end before it had set its handlers.
_LEGAL_ENDS = (0, 75, 69, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
_DOUBT_S = 4.0
_LATE_AT_MOST_S = 2.0


# Weather


class Weather:
    """What the network and the server do to requests, another thing every few seconds. `rule` is one for a proxy.

    pace: 1.0; less is faster.
    """

    def __init__(self, proxy: FaultProxy, server: RcloneServer, chance: random.Random, *, pace: float) -> None:
        self._proxy = proxy
        self._server = server
        self._chance = chance
        self._pace = pace
        self._now: Callable[[Request], Fault | None] = lambda request: None
        self._faults = 0
        self._lock = threading.Lock()
        self._kinds: dict[str, Callable[[Request], Fault | None]] = {
            "fair": lambda request: None,
            "slow down": lambda request: self._sometimes(0.6, Answer(503, SLOW_DOWN)),
            "broken": lambda request: self._sometimes(0.3, Answer(500, error_body("InternalError"))),
            "lost answers": lambda request: self._sometimes(0.4, LoseAnswer()),
            "late": self._late,
            "slow": lambda request: Delay(self._chance.random()),
            "resets": lambda request: self._sometimes(0.5, Reset()),
            "flips": lambda request: self._sometimes(0.4, Flip(100)) if request.method == "PUT" else None,
            "portal": lambda request: self._sometimes(0.7, HTML),
            "denied": lambda request: Answer(403, error_body("AccessDenied")),
            "no bucket": lambda request: Answer(404, error_body("NoSuchBucket")),
            "away": lambda request: None,
            "no server": lambda request: None,
        }

    @property
    def faults(self) -> int:
        return self._faults

    def rule(self, request: Request) -> Fault | None:
        with self._lock:
            fault = self._now(request)
            self._faults += fault is not None
        return fault

    def change(self, stop: threading.Event) -> None:
        """Have one kind of weather for a few seconds, then fair weather for as long."""
        kind = self._chance.choice(list(self._kinds))
        self._now = self._kinds[kind]
        if kind == "away":
            self._proxy.go_away()
        if kind == "no server":
            self._server.stop(signal.SIGTERM)
        stop.wait(self._chance.uniform(0.5, 4) * self._pace)
        if kind == "away":
            self._proxy.come_back()
        if kind == "no server":
            self._server.start()
        self._now = self._kinds["fair"]
        stop.wait(self._chance.uniform(0.5, 4) * self._pace)

    def _sometimes(self, share: float, fault: Fault) -> Fault | None:
        return fault if self._chance.random() < share else None

    def _late(self, request: Request) -> Fault | None:
        """The client hears nothing; what it asked for is done when it may have asked for something newer."""
        if request.method not in ("PUT", "DELETE") or self._chance.random() < 0.5:
            return None
        gate = threading.Event()
        timer = threading.Timer(self._chance.uniform(0.1, _LATE_AT_MOST_S), gate.set)
        timer.daemon = True
        timer.start()
        return Hold(gate, hang_up=True)


# Daemons


class Daemons:
    """One daemon, two at times; each is killed, drained, frozen, told to reload, as chance will have it. pace: as Weather's."""

    def __init__(self, site: Site, chance: random.Random, stack: ExitStack, *, pace: float) -> None:
        self._site = site
        self._chance = chance
        self._pace = pace
        self._stack = stack
        self._running: list[Daemon] = []
        self.counts: Counter[str] = Counter()
        self._start()

    def disturb(self, stop: threading.Event) -> None:
        """Let them work for some seconds, mostly, then do something to one of them."""
        if self._chance.random() < 0.8:
            until(lambda: stop.is_set() or all(map(is_up, self._running)), "the daemons are up", timeout_s=120)
        stop.wait(self._chance.uniform(0.5, 8) * self._pace)
        act = self._chance.choice([self._kill, self._kill, self._drain, self._freeze, self._reload, self._second])
        self.counts[act.__name__.strip("_")] += 1
        act(stop)
        for daemon in [daemon for daemon in self._running if daemon.process.poll() is not None]:
            self._running.remove(daemon)
            assert daemon.process.returncode in _LEGAL_ENDS, (
                f"a daemon ended with {daemon.process.returncode}: {daemon.log_file}"
            )
        if not self._running:
            self._start()

    def end(self) -> None:
        for daemon in self._running:
            daemon.end()

    def _start(self) -> None:
        self._running.append(self._stack.enter_context(self._site.daemon(ready=False, constants=CONSTANTS)))

    def _any(self) -> Daemon:
        return self._chance.choice(self._running)

    def _kill(self, stop: threading.Event) -> None:
        self._any().kill()

    def _drain(self, stop: threading.Event) -> None:
        self._any().drain(timeout_s=60)

    def _freeze(self, stop: threading.Event) -> None:
        """At times for longer than its claims last."""
        daemon = self._any()
        daemon.freeze()
        stop.wait(self._chance.uniform(0.2, 6) * self._pace)
        daemon.thaw()

    def _reload(self, stop: threading.Event) -> None:
        cleanup = self._site.settings["spools"][0]["cleanup"]
        cleanup["grace"] = self._chance.choice(["30ms", "200ms", "500ms"])
        self._site.write_config()
        for daemon in self._running:
            if is_up(daemon):
                daemon.process.send_signal(signal.SIGHUP)

    def _second(self, stop: threading.Event) -> None:
        if len(self._running) < 2:
            self._start()
        else:
            self._any().drain(timeout_s=60)


def is_up(daemon: Daemon) -> bool:
    """Say whether it works, or has ended by itself. Before it has set its handlers, SIGHUP ends it."""
    with contextlib.suppress(json.JSONDecodeError):  # it is about to end, and says why in plain words
        if daemon.events("daemon.ready"):
            return True
    return daemon.process.poll() is not None


# Disks


def fill_now_and_then(directory: Path, chance: random.Random, stop: threading.Event) -> None:
    """Leave no room on the ledger's disk for a moment."""
    ballast = directory / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while not stop.is_set():
            file.write(bytes(1 << 16))
    stop.wait(chance.uniform(0.2, 3))
    ballast.unlink()
    stop.wait(chance.uniform(5, 30))


# Apps


@contextlib.contextmanager
def busy_apps(site: Site, bucket: Path, seed: int, *, count: int) -> Iterator[Callable[[], list[Report]]]:
    """Run the apps for the block; what is yielded asks them to end and returns what they tell."""
    running = []
    for number in range(count):
        task = Task(f"app{number}", str(site.root), str(bucket), records=10, rest_s=0.15, seed=seed)
        command = [sys.executable, "-m", busy_app.__name__, json.dumps(dataclasses.asdict(task))]
        home = Path(busy_app.__file__).parents[1]
        running.append(bound(command, signal.SIGKILL, stdout=subprocess.PIPE, cwd=home))

    def end() -> list[Report]:
        for process in running:
            process.terminate()
        return [Report(**json.loads(process.communicate(timeout=60)[0])) for process in running]

    try:
        yield end
    finally:
        for process in running:
            process.kill()
            process.wait()


# The soak


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 900)
def test_whatever_happens_nothing_is_lost_stale_half_left_or_foreign(tmp_path: Path, rclone_server: RcloneServer) -> None:
    soak(tmp_path, rclone_server, seconds=60 * MINUTES, seed=SEED, apps=3, files=8, keeps_figures=True)


@pytest.mark.soak
@pytest.mark.timeout(600)  # where many tests share few processors
def test_whatever_happens_within_seconds_nothing_is_lost_stale_half_left_or_foreign(
    tmp_path: Path, rclone_server: RcloneServer
) -> None:
    soak(tmp_path, rclone_server, seconds=10, seed=SEED, apps=1, files=2, pace=0.25)


def soak(
    directory: Path, server: RcloneServer, *, seconds: float, seed: int, apps: int, files: int, pace: float = 1.0,
    keeps_figures: bool = False,
) -> None:  # fmt: skip
    """Let everything happen at once for so long, then have it end well, and compare.

    files: of each writer. pace: 1.0; with less all changes faster.
    """
    print(f"SOAK_SEED={seed} does it again")
    chance = random.Random(seed)
    stop = threading.Event()
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(server.endpoint_url))
        may_fill = stack.enter_context(a_small_state_directory(directory))
        site = Site(
            directory, server, endpoint_url=proxy.endpoint_url,
            upload={"doubt": f"{_DOUBT_S}s", "retry": {"crashes": 1_000_000}},
            spool={
                "sweep_every": "5s", "replaced_after": "5s", "max_deletes_per_hour": 10_000_000,
                "complete": {"settle": "50ms"}, "cleanup": {"min_age": "500ms", "grace": "30ms", "keep_empty_dirs_for": "1s"},
            },
        )  # fmt: skip
        bucket = server.directory / site.bucket
        weather = Weather(proxy, server, random.Random(chance.random()), pace=pace)
        race = stack.enter_context(racing(site.root, server, site.bucket, rewrites=10**9, files=files, rest_s=1.5, seed=seed))
        proxy.rules += [race.look_at, weather.rule]
        end_apps = stack.enter_context(busy_apps(site, bucket, seed, count=apps))
        daemons = Daemons(site, random.Random(chance.random()), stack, pace=pace)
        disk = random.Random(chance.random())
        turns: list[Callable[[], None]] = [lambda: daemons.disturb(stop)]
        if may_fill:
            turns.append(lambda: fill_now_and_then(directory / "state", disk, stop))
        troubles: list[BaseException] = []
        threads = [threading.Thread(target=again_and_again, args=(turn, stop, troubles), daemon=True) for turn in turns]
        for thread in threads:
            thread.start()
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        # In this thread, since a server dies with the thread that starts it.
        again_and_again(lambda: weather.change(stop), stop, troubles)
        timer.join()
        for thread in threads:
            thread.join()
        assert not troubles, troubles
        race.stop()
        told = race.reports(timeout_s=60)
        reports = end_apps()
        daemons.end()
        with site.daemon(constants=CONSTANTS) as daemon:
            until(lambda: is_idle(site, daemon), "all is done", timeout_s=300)
        verdicts = race.judge()
        verdict = compare(site, reports, {path for report in told for path in report.newest})
    counts: dict[str, str | int | float] = {
        "seed": str(seed), "minutes": round(seconds / 60, 2), "saves": sum(app.saves for app in reports),
        "rewrites": sum(each.rewrites for each in verdicts),
        "kills": daemons.counts["kill"], "restarts": daemons.counts["drain"],
        "freezes": daemons.counts["freeze"], "reloads": daemons.counts["reload"], "faults": weather.faults,
        "requests": len(proxy.seen), "objects": verdict.objects, "kept": verdict.kept,
        "lost": len(verdict.lost) + sum(each.lost for each in verdicts), "stale": sum(each.stale for each in verdicts),
        "half": len(verdict.half) + sum(each.half for each in verdicts), "foreign": len(verdict.foreign),
        "saves_failed": sum(len(app.failed) for app in reports) + sum(each.saves_failed for each in verdicts),
    }  # fmt: skip
    if keeps_figures:
        figures.record("soak", **counts)
    else:
        print(counts)
    assert all(each.is_clean for each in verdicts), verdicts
    verdict.demand_clean()
    assert not site.files() and not site.aside() and not site.query("SELECT * FROM claim"), "nothing is left"


def again_and_again(turn: Callable[[], None], stop: threading.Event, troubles: list[BaseException]) -> None:
    try:
        while not stop.is_set():
            turn()
    except BaseException as trouble:
        troubles.append(trouble)
        stop.set()


@contextlib.contextmanager
def a_small_state_directory(directory: Path) -> Iterator[bool]:
    """Give the ledger a small disk of its own, if we may; yield whether it has one."""
    if os.geteuid() != 0:
        yield False
        return
    try:
        with mounted("tmpfs", directory, size_mb=64, at="state"):
            yield True
    except pytest.skip.Exception:
        yield False


def is_idle(site: Site, daemon: Daemon) -> bool:
    assert daemon.process.poll() is None, "the daemon runs"
    time.sleep(0.5)  # asking costs the daemon time
    if site.files() or site.aside() or site.query("SELECT 1 FROM claim UNION ALL SELECT 1 FROM replaced"):
        return False
    return not site.query("SELECT 1 FROM record_status WHERE state NOT IN ('done', 'gone')")


# The comparison


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What the bucket and the ledger have that they should not, or lack. objects: how many there are."""

    objects: int
    kept: int
    lost: list[str]
    half: list[str]
    foreign: list[str]
    untrue: list[str]

    def demand_clean(self) -> None:
        wrong = {"lost": self.lost, "half": self.half, "foreign": self.foreign, "untrue": self.untrue}
        assert not any(wrong.values()), wrong


def compare(site: Site, apps: list[Report], written: set[str]) -> Comparison:
    """Download everything and compare it with what was written, and with what the ledger tells. written: by the writers."""
    objects = site.objects()
    if objects.get(".spoold-probe") == PROBE:  # its daemon was killed, or its DELETE lost: the next probe tidies up
        del objects[".spoold-probe"]
    newest = {path: version for app in apps for path, version in app.newest.items()}
    loose = {path for app in apps for path in app.loose}
    replaced = {path for app in apps for path in app.replaced}
    lost = [f"{path}: version {version} was nowhere, the bucket had {has}" for app in apps for path, version, has in app.lost]
    half, foreign, untrue = [], [], []
    for path, version in newest.items():
        has = writers.version_in(path, objects[path]) if path in objects else None
        if has != version:
            lost.append(f"{path}: the bucket has version {has} in the place of {version}")
    for key, body in objects.items():
        if writers.version_in(key, body) is None:
            half.append(f"{key}: {len(body)} bytes that are no whole version")
        if key in replaced:
            foreign.append(f"{key}: was replaced by another name")
        elif key not in newest and key not in loose and key not in written:
            foreign.append(key)
    told = {row["key"]: row for row in site.query("SELECT key, size, etag FROM record_object")}
    for key, row in told.items():
        body = objects.get(key)
        if body is None or (row["size"], row["etag"].strip('"')) != (len(body), hashlib.md5(body).hexdigest()):
            untrue.append(f"{key}: the ledger tells of {row}, the bucket has {None if body is None else len(body)} bytes")
    untrue += [f"{key}: the ledger does not tell of it" for key in objects.keys() - told.keys() - loose]
    kept = len(list((site.root / ".spoold" / "kept").iterdir()))
    return Comparison(len(objects), kept, lost, half, foreign, untrue)


def test_the_comparison_finds_what_is_lost_old_half_foreign_and_untold(tmp_path: Path, rclone_server: RcloneServer) -> None:
    site = Site(tmp_path, rclone_server)
    (site.root / ".spoold" / "kept").mkdir(parents=True)
    app = Report(
        "app", newest={"fine": 2, "lost": 1, "old": 2, "half": 1}, loose=["rolled back"], replaced=["replaced"],
        lost=[("gone meanwhile", 1, None)],
    )  # fmt: skip
    bucket = {
        "fine": content("fine", 2), "old": content("old", 1), "half": content("half", 1)[:-1],
        "rolled back": content("rolled back", 1), "replaced": content("replaced", 1), "foreign": content("foreign", 1),
    }  # fmt: skip
    for key, body in bucket.items():
        rclone_server.client().put_object(Bucket=site.bucket, Key=key, Body=body)

    found = compare(site, [app], set())

    assert ["gone meanwhile", "half", "lost", "old"] == names(found.lost)
    assert ["half"] == names(found.half)
    assert ["foreign", "replaced"] == names(found.foreign)
    assert ["fine", "foreign", "half", "old", "replaced"] == names(found.untrue), "there is no ledger that tells of them"


def names(found: list[str]) -> list[str]:
    return sorted(text.partition(":")[0] for text in found)
