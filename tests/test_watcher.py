"""Noticing change: events are hints, sweeps are the truth, and somebody watches the watcher."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from spoold.errors import LedgerUnavailable, SpoolBroken, SpooldError, StoreUnavailable
from spoold.looker import Looker, Next
from spoold.model import HOUSE
from spoold.steps import Steps
from spoold.watcher import Watcher
from tests.hostile import deep_tree
from tests.nth import Fail, Hand, refuses
from tests.paperclip import App, How, picture
from tests.parts import (
    NAME,
    RECORD,
    Bench,
    RealClock,
    captured,
    in_a_world,
    mount_tmpfs,
    told,
    until,
    with_own_mounts,
    without,
)
from tests.test_observing import unwatch

STYLES = ("original", "thumb")
JPEG = picture(24, 18)
CAT = {"original": JPEG, "thumb": picture(12, 9)}
NEVER_S = 1e6
PARTITIONED = ":attachment/:id_partition/:style/:basename.:extension"


class Watch:
    """A watcher whose turns a test takes itself. What it tells others is written down."""

    def __init__(self, bench: Bench, **changes: Any) -> None:
        self.bench = bench
        self.broken: list[SpooldError] = []
        self.mended = 0
        self.ready = 0
        settle_s = changes.pop("settle_s", 0.05 if isinstance(bench.clock, RealClock) else 1.0)
        self.looker = changes.pop("looker", None) or bench.looker(styles=STYLES, settle_s=settle_s)
        values: dict[str, Any] = {
            "sweep_every_s": NEVER_S, "move_in": self.move_in, "on_broken": self.broken.append, "on_mended": self._mend,
            "on_ready": self._ready,
        }  # fmt: skip
        self.watcher = Watcher(
            spool=bench.spool, looker=self.looker, ledger=bench.ledger, clock=bench.clock, **values | changes
        )

    def move_in(self) -> None:
        self.bench.spool.move_in(self.bench.ledger.id)
        self.bench.cleaner().recover("me", lease_s=30)

    def _mend(self) -> None:
        self.mended += 1

    def _ready(self) -> None:
        self.ready += 1

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.watcher.step()

    def until(self, condition: Callable[[], Any], what: str, *, timeout_s: float = 20.0) -> Any:
        """Take turns until something is true. A clock that is moved goes twice as fast as the kernel's."""

        def turn() -> Any:
            self.watcher.step()
            if not isinstance(self.bench.clock, RealClock):
                self.bench.clock.advance(0.01)
            return condition()

        return until(turn, what, timeout_s=timeout_s)

    def swept(self) -> None:
        """Have the first sweep done, and the canary heard."""
        self.until(lambda: self.watcher.is_idle and self.watcher._observing.is_canary_heard, "the first sweep has ended")

    def until_state(self, *states: str, record: str = RECORD) -> None:
        self.until(lambda: self.bench.state(record) in states, f"{record} is {' or '.join(states)}")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path, clock=RealClock()) as bench:
        yield bench


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose clock the test moves."""
    with Bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def watch(bench: Bench) -> Iterator[Watch]:
    """A watcher in real time that has done its first sweep: what it finds from now on it was told."""
    watch = Watch(bench)
    watch.swept()
    yield watch
    watch.watcher.close()


@pytest.fixture
def moved_watch(moved: Bench) -> Iterator[Watch]:
    watch = Watch(moved)
    watch.swept()
    yield watch
    watch.watcher.close()


def save(bench: Bench, record: str = RECORD, *, directory: Path | None = None) -> None:
    for style, content in CAT.items():
        file = (directory or bench.root) / record / style / "cat.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


# Hints


def test_names_that_are_no_utf_8_and_come_while_we_watch_do_not_end_the_watch(watch: Watch) -> None:
    """The kernel tells of them at once; the ledger cannot write them down, and the daemon died of it."""
    root = os.fsencode(watch.bench.root)
    for path in (b"avatars/\xff/original/cat.jpg", b"\xfe/42/original/cat.jpg", b"avatars/42/original/\xfd.jpg"):
        os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
        with open(os.path.join(root, path), "wb") as file:
            file.write(JPEG)
    save(watch.bench)

    watch.until_state("queued")

    watch.turn(20)


def test_a_name_that_begins_with_two_dots_is_heard_of(watch: Watch) -> None:
    save(watch.bench, "..avatars/42")

    watch.until_state("queued", record="..avatars/42")


def test_a_tree_deeper_than_python_can_call_is_watched(bench: Bench) -> None:
    """os.walk, by which watchdog finds directories, calls itself for each level."""
    watch = Watch(bench)
    with deep_tree(bench.root / "deep", 1200):
        watch.swept()
        save(bench)
        watch.until_state("queued")
    watch.watcher.close()


@pytest.mark.parametrize("how", ["rename", "copy", "close_before_rename"])
def test_what_an_app_writes_is_noticed_without_a_sweep(watch: Watch, how: How) -> None:
    with captured() as lines:
        App(watch.bench.root).save("avatars", 42, "cat.jpg", CAT, how=how)
        watch.until_state("queued")

    assert [] == told(lines, "sweep.finished")


def test_a_record_that_is_moved_in_is_noticed(watch: Watch) -> None:
    save(watch.bench, directory=watch.bench.directory / "elsewhere")
    (watch.bench.root / "avatars").mkdir()
    watch.turn(5)

    (watch.bench.directory / "elsewhere" / RECORD).rename(watch.bench.root / RECORD)

    watch.until_state("queued")


def test_a_whole_tree_that_is_moved_in_is_noticed(watch: Watch) -> None:
    for number in range(20):
        save(watch.bench, f"avatars/{number}", directory=watch.bench.directory / "elsewhere")

    (watch.bench.directory / "elsewhere/avatars").rename(watch.bench.root / "avatars")

    watch.until(lambda: watch.bench.ledger.counts() == {NAME: {"queued": 20}}, "all are queued")


def save_all(bench: Bench, count: int) -> None:
    for number in range(count):
        save(bench, f"avatars/{number}")


def test_directories_and_files_that_come_in_a_rush_are_all_noticed(watch: Watch) -> None:
    """Those that are written before the kernel was asked to watch their directory make no event (FACTS 12)."""
    writing = threading.Thread(target=save_all, args=(watch.bench, 150))
    writing.start()

    watch.until(lambda: watch.bench.ledger.counts() == {NAME: {"queued": 150}}, "all are queued", timeout_s=90)
    writing.join()


def test_a_file_that_is_removed_is_noticed(watch: Watch) -> None:
    watch.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    watch.until_state("receiving")

    (watch.bench.root / RECORD / "original/cat.jpg").unlink()

    watch.until_state("gone")


def test_a_directory_that_is_removed_is_noticed(watch: Watch) -> None:
    watch.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    watch.until_state("receiving")

    (watch.bench.root / RECORD).rename(watch.bench.directory / "elsewhere")

    watch.until_state("gone")


def test_a_directory_that_goes_makes_nobody_walk_through_all_that_lie_beside_it(tmp_path: Path) -> None:
    """With :id_partition each directory above a record could be one itself, of a string; Paperclip's default has it."""
    with Bench(tmp_path, clock=RealClock(), path=PARTITIONED, key=PARTITIONED) as bench:
        for number in range(20):
            (bench.root / f"avatars/000/000/{number:03d}/original").mkdir(parents=True)
        watch = Watch(bench, looker=bench.looker(settle_s=0.05))
        watch.swept()
        bench.write("avatars/000/000/042/original/cat.jpg", JPEG)
        watch.until_state("queued", record="avatars/000/000/042")

        with captured() as lines:
            (bench.root / "avatars/000/000/007/original").rmdir()
            (bench.root / "avatars/000/000/007").rmdir()
            bench.write("avatars/000/000/043/original/cat.jpg", JPEG)
            bench.write("avatars/000/000/043/notes", b"")
            (bench.root / "avatars/000/000/042").rename(tmp_path / "away")
            watch.until_state("queued", record="avatars/000/000/043")
            watch.until_state("gone", record="avatars/000/000/042")

        assert {"avatars/000/000/043/notes"} == {line["path"] for line in told(lines, "path.ignored")}
        assert {"avatars/000/000/042", "avatars/000/000/043"} == {line["record"] for line in lines if "record" in line}
        watch.watcher.close()


def test_a_missing_style_that_comes_late_is_noticed(watch: Watch) -> None:
    watch.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    watch.until_state("receiving")

    watch.bench.write(f"{RECORD}/thumb/cat.jpg", JPEG)

    watch.until_state("queued")


def test_a_marker_is_noticed(tmp_path: Path) -> None:
    with Bench(tmp_path, clock=RealClock(), marker=".done") as bench:
        watch = Watch(bench)
        watch.swept()
        save(bench)
        watch.until_state("receiving")

        bench.write(f"{RECORD}/.done", b"")

        watch.until_state("queued")
        watch.watcher.close()


def test_a_root_that_is_a_link_is_watched_where_it_points_to(tmp_path: Path) -> None:
    """A symlinked root reports nothing for its direct children (FACTS 14)."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "spool").symlink_to("shared")
    with Bench(tmp_path, clock=RealClock()) as bench:
        watch = Watch(bench)
        watch.swept()

        save(bench)

        watch.until_state("queued")
        watch.watcher.close()


@pytest.mark.parametrize("name", [b"\xff.jpg", b"\n", b"x" * 255])
def test_rule_12_a_name_that_is_none_does_not_stop_the_hints(watch: Watch, name: bytes) -> None:
    """A handler that raises kills watchdog's thread."""
    watch.bench.write(f"avatars/1/original/{os.fsdecode(name)}")
    watch.bench.write(os.fsdecode(b"avatars/" + name))
    os.mkfifo(watch.bench.root / "avatars/1/original/fifo")
    (watch.bench.root / "avatars/1/original/link").symlink_to("/etc")

    save(watch.bench)

    watch.until_state("queued")


# Sweeps


@pytest.fixture
def blind(moved: Bench) -> Iterator[Watch]:
    """A watcher that is told nothing: sweeps only."""
    watch = Watch(moved, observes=False)
    yield watch
    watch.watcher.close()


def test_the_first_sweep_finds_what_was_there_before(blind: Watch) -> None:
    save(blind.bench)

    blind.until_state("queued")


def test_a_sweep_comes_as_often_as_the_configuration_says(moved: Bench) -> None:
    watch = Watch(moved, observes=False, sweep_every_s=300.0)
    watch.turn(5)
    save(moved)
    watch.turn(5)
    before = moved.state()

    with captured() as lines:
        moved.clock.advance(299)
        watch.turn(5)
        still = moved.state()
        moved.clock.advance(1)
        watch.turn(5)

    assert (None, None, "receiving") == (before, still, moved.state())
    assert [(NAME, 1)] == [(line["spool"], line["records"]) for line in told(lines, "sweep.finished")]
    watch.watcher.close()


def test_it_is_ready_once_events_are_received_and_the_first_sweep_has_begun(blind: Watch) -> None:
    for number in range(201):
        blind.bench.write(f"avatars/{number}/original/cat.jpg")
    before = blind.ready

    with captured() as lines:
        blind.turn()

    assert (0, 1) == (before, blind.ready)
    assert [] == told(lines, "sweep.finished")
    blind.turn(2)
    assert 1 == blind.ready


def test_looks_are_taken_while_the_sweep_goes_on(blind: Watch) -> None:
    """Start-up that reads the whole backlog first is what others suffer from (FACTS 37)."""
    for number in range(201):
        blind.bench.write(f"avatars/{number}/original/cat.jpg")

    with captured() as lines:
        blind.turn()

    assert [] == told(lines, "sweep.finished")
    assert 100 == blind.bench.ledger.counts()[NAME]["receiving"]


def test_what_a_sweep_did_not_meet_and_the_ledger_waits_for_is_gone(blind: Watch) -> None:
    blind.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    blind.until_state("receiving")
    (blind.bench.root / RECORD / "original/cat.jpg").unlink()
    blind.turn(3)
    before = blind.bench.state()

    blind.watcher.sweep("test")
    blind.turn(3)

    assert ("receiving", "gone") == (before, blind.bench.state())


def test_what_a_person_wants_as_it_lies_is_looked_at_within_a_second(blind: Watch) -> None:
    blind.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    blind.until_state("receiving")
    blind.until(lambda: blind.watcher.is_idle, "it is quiet")
    blind.bench.ledger.retry([RECORD], as_is=True)

    blind.bench.clock.advance(1.0)
    blind.turn()

    assert "queued" == blind.bench.state()


def test_a_record_that_settles_is_looked_at_when_it_has_settled(blind: Watch) -> None:
    save(blind.bench)
    blind.turn(3)
    blind.bench.clock.advance(0.9)
    blind.turn()
    before = blind.bench.state()

    blind.bench.clock.advance(0.1)
    blind.turn()

    assert ("receiving", "queued") == (before, blind.bench.state())


def test_a_record_may_be_touched_by_any_thread(blind: Watch) -> None:
    blind.turn(3)
    save(blind.bench)

    thread = threading.Thread(target=blind.watcher.touch, args=(RECORD,))
    thread.start()
    thread.join()
    was_idle = blind.watcher.is_idle
    blind.turn()

    assert (False, "receiving") == (was_idle, blind.bench.state())


def test_it_is_idle_when_nothing_is_swept_and_nothing_waits_for_quiet(blind: Watch) -> None:
    save(blind.bench)
    moments = [blind.watcher.is_idle]
    blind.turn(3)
    moments.append(blind.watcher.is_idle)
    blind.bench.clock.advance(1)
    blind.turn()
    moments.append(blind.watcher.is_idle)
    blind.bench.write("avatars/43/original/cat.jpg", JPEG)  # its thumb is missing: that may take for ever
    blind.watcher.touch("avatars/43")
    moments.append(blind.watcher.is_idle)
    blind.turn()
    blind.bench.clock.advance(1)
    blind.turn()
    moments.append(blind.watcher.is_idle)

    assert [False, False, True, False, True] == moments
    assert "receiving" == blind.bench.state("avatars/43")


# The watcher is watched


def test_an_overflow_makes_it_sweep(blind: Watch) -> None:
    """The handler gets nothing, only a warning stands in watchdog's log (FACTS 11)."""
    blind.turn(3)
    save(blind.bench)

    logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; filesystem events were lost")
    with captured() as lines:
        blind.bench.clock.advance(1.0)
        blind.turn(3)

    assert ["warning"] == [line["log_level"] for line in told(lines, "watch.overflowed")]
    assert "receiving" == blind.bench.state()


def test_other_warnings_of_watchdog_are_no_overflow(blind: Watch) -> None:
    blind.turn(3)

    logging.getLogger("watchdog.observers.inotify_c").warning("something else")
    with captured() as lines:
        blind.bench.clock.advance(1.0)
        blind.turn(3)

    assert [] == lines


def test_the_overflow_is_still_what_watchdog_says() -> None:
    """Its words are nobody's promise: a newer version may choose others."""
    from watchdog.observers import inotify_c

    source = Path(inotify_c.__file__).read_text()

    assert "overflow" in source.split("logger.warning(", 1)[1].split(")")[0]
    assert "watchdog.observers.inotify_c" == inotify_c.logger.name


def test_a_canary_that_is_heard_is_no_reason_to_worry(moved_watch: Watch) -> None:
    with captured() as lines:
        for _ in range(3):
            moved_watch.bench.clock.advance(31)
            moved_watch.turn()
            moved_watch.until(lambda: moved_watch.watcher._observing.is_canary_heard, "the canary was heard")
            moved_watch.bench.clock.advance(11)
            moved_watch.turn()

    assert [] == lines


def test_a_canary_that_falls_silent_makes_it_watch_anew_and_sweep(moved_watch: Watch) -> None:
    """Its threads live, and nothing comes: nobody but the canary can tell (FACTS 13)."""
    observer = moved_watch.watcher._observing._observer
    assert observer is not None
    observer.unschedule_all()
    save(moved_watch.bench)

    with captured() as lines:
        moved_watch.bench.clock.advance(31)
        moved_watch.turn()
        moved_watch.bench.clock.advance(11)
        moved_watch.turn(3)

    assert ["the canary's event did not come back"] == [line["detail"] for line in told(lines, "watch.restarted")]
    assert observer is not moved_watch.watcher._observing._observer
    assert "receiving" == moved_watch.bench.state()


def test_threads_that_are_dead_make_it_watch_anew_and_sweep(watch: Watch) -> None:
    observer = watch.watcher._observing._observer
    assert observer is not None
    observer.stop()
    observer.join()
    save(watch.bench, "avatars/1")

    with captured() as lines:
        watch.until_state("queued", record="avatars/1")
    save(watch.bench, "avatars/2")
    watch.until_state("queued", record="avatars/2")

    assert ["watchdog's threads are dead"] == [line["detail"] for line in told(lines, "watch.restarted")]


def test_directories_that_are_not_watched_are_said_once_and_swept_more_often_until_they_are(moved_watch: Watch) -> None:
    """watchdog passes in silence over those for which the kernel has no watch left (FACTS 13)."""
    bench, watcher = moved_watch.bench, moved_watch.watcher
    (bench.root / "avatars/42").mkdir(parents=True)
    moved_watch.until(lambda: (watched(moved_watch) or set()) >= {(bench.root / "avatars/42").stat().st_ino}, "it is watched")
    unwatch(watcher._observing, bench.root / "avatars/42")

    with captured() as lines:
        watcher.sweep("test")
        moved_watch.until(lambda: told(lines, "watch.limited"), "it is said")
        bench.clock.advance(15)
        moved_watch.turn(5)
        early = len(told(lines, "sweep.finished"))
        bench.clock.advance(15)
        moved_watch.until(lambda: told(lines, "watch.restarted"), "it is watched again")

    [limited] = told(lines, "watch.limited")
    assert "1 of 3 directories are not watched" in limited["detail"] and "sysctl -w " in limited["hint"]
    assert "avatars/42" == limited["path"]
    assert (1, 2) == (early, len(told(lines, "sweep.finished")))
    assert ["every directory is watched again"] == [line["detail"] for line in told(lines, "watch.restarted")]


def watched(watch: Watch) -> frozenset[int] | None:
    return watch.watcher._observing.watched()


def test_directories_that_come_and_go_during_a_sweep_are_not_taken_for_unwatched(moved_watch: Watch) -> None:
    bench, watcher = moved_watch.bench, moved_watch.watcher
    for number in range(300):
        (bench.root / f"avatars/{number}").mkdir(parents=True)

    with captured() as lines:
        watcher.sweep("test")
        moved_watch.turn()
        for number in range(0, 300, 2):
            (bench.root / f"avatars/{number}").rmdir()
        for number in range(300, 600):
            (bench.root / f"avatars/{number}").mkdir(parents=True)
        moved_watch.until(lambda: told(lines, "sweep.finished"), "all is swept")
        moved_watch.until(lambda: watcher._counted is None, "the sweep is judged")

    assert [] == told(lines, "watch.limited")


def test_after_an_overflow_it_listens_with_a_new_observer(moved_watch: Watch) -> None:
    """The old one rebuilds its watches while the sweep goes on: what is written in between would be seen by neither."""
    observer = moved_watch.watcher._observing._observer
    moved_watch.bench.clock.advance(1.0)

    logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; filesystem events were lost")
    moved_watch.turn()

    assert observer is not moved_watch.watcher._observing._observer
    assert moved_watch.watcher._observing.is_listening


def test_slow_looks_do_not_hold_up_hints_and_health(bench: Bench) -> None:
    looker = bench.looker(styles=STYLES)
    looker.__class__ = Slow
    watch = Watch(bench, observes=False, looker=looker)
    for number in range(100):
        bench.write(f"avatars/{number}/original/cat.jpg")
    began = time.monotonic()

    watch.turn()

    assert time.monotonic() - began < 2.0, "a hundred looks would take five seconds"
    watch.watcher.close()


class Slow(Looker):
    """A looker on a slow disk."""

    def look(self, record: str) -> Steps[Next]:
        threading.Event().wait(0.05)
        return Next()
        yield  # so that it is one


def test_a_house_that_somebody_tidied_away_is_made_again(watch: Watch) -> None:
    for path in sorted((watch.bench.root / HOUSE).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (watch.bench.root / HOUSE).rmdir()

    watch.until(lambda: (watch.bench.root / HOUSE / "owner").exists(), "the house is there again")
    save(watch.bench)

    watch.until_state("queued")


def no_inotify() -> tuple[Callable[[], None], ...]:
    """A world in which this user has as many inotify instances as the kernel allows."""
    return without("inotify_init1", errno.EMFILE), without("inotify_init", errno.EMFILE)


def test_without_inotify_sweeps_find_what_is_new_and_do_not_pile_up(moved: Bench) -> None:
    """fs.inotify.max_user_instances is 128 on many machines, and desktops eat them."""

    def work() -> list[MutableMapping[str, Any]]:
        watch = Watch(moved, sweep_every_s=300.0)
        with captured() as lines:
            for _ in range(3):
                watch.turn()
            save(moved)
            for _ in range(120):
                moved.clock.advance(1.0)
                watch.turn()
        watch.watcher.close()
        return lines

    lines = in_a_world(work, *no_inotify())

    unavailable = told(lines, "watch.unavailable")
    assert 1 <= len(unavailable) <= 6, "it is tried again now and then, not all the time"
    assert "max_user_instances" in unavailable[0]["hint"]
    assert len(told(lines, "sweep.finished")) <= 6
    assert "queued" == moved.state()


def test_sweeps_that_are_asked_for_again_and_again_do_not_pile_up(blind: Watch) -> None:
    for number in range(201):
        blind.bench.write(f"avatars/{number}/original/cat.jpg")
    blind.turn()

    with captured() as lines:
        for _ in range(50):
            blind.watcher.sweep("overflow")
        blind.until(lambda: blind.watcher.is_idle, "all is swept")

    assert 2 == len(told(lines, "sweep.finished")), "the one under way, and one that sees all that it may have missed"


# The root


def test_a_root_that_vanishes_is_told_and_its_return_too(watch: Watch) -> None:
    """Paperclip itself removes it, after the last file (FACTS 6)."""
    elsewhere = watch.bench.directory / "elsewhere"
    watch.bench.root.rename(elsewhere)
    watch.until(lambda: watch.broken, "its loss was told")
    watch.turn(5)
    told_once = len(watch.broken)

    save(watch.bench, directory=elsewhere)
    elsewhere.rename(watch.bench.root)
    watch.until_state("queued")

    assert (1, 1) == (told_once, watch.mended)
    assert isinstance(watch.broken[0], SpoolBroken)
    assert "mkdir -p" in watch.broken[0].hint


def test_a_root_whose_link_is_given_another_target_is_followed(tmp_path: Path) -> None:
    """Capistrano's `current`; what lay in the old release and is not uploaded yet waits for it."""
    for release in ("1", "2"):
        (tmp_path / release).mkdir()
    (tmp_path / "spool").symlink_to("1")
    with Bench(tmp_path, clock=RealClock()) as bench:
        watch = Watch(bench)
        watch.swept()
        bench.write("avatars/1/original/cat.jpg", JPEG)
        watch.until_state("receiving", record="avatars/1")

        with captured() as lines:
            (tmp_path / "new").symlink_to("2")
            (tmp_path / "new").rename(bench.root)
            watch.until(lambda: told(lines, "root.replaced"), "it is told")
        save(bench, "avatars/2")
        watch.until_state("queued", record="avatars/2")

        [replaced] = told(lines, "root.replaced")
        assert ("avatars/1", str(tmp_path / "2")) == (replaced["record"], replaced["path"])
        assert "receiving" == bench.state("avatars/1")
        watch.watcher.close()


def test_a_root_that_is_made_anew_is_watched(watch: Watch) -> None:
    (watch.bench.root).rename(watch.bench.directory / "elsewhere")
    watch.until(lambda: watch.broken, "its loss was told")

    watch.bench.root.mkdir()
    watch.until(lambda: watch.mended, "its return was told")
    save(watch.bench)
    watch.until_state("queued")

    assert (watch.bench.root / HOUSE / "owner").exists()


def test_a_root_that_is_replaced_at_once_is_watched_anew(watch: Watch) -> None:
    """By a deployment, say: it was never seen to be gone, and no event tells (FACTS 13)."""
    fresh = watch.bench.directory / "fresh"
    fresh.mkdir()
    save(watch.bench, directory=fresh)

    with captured() as lines:
        watch.bench.root.rename(watch.bench.directory / "old")
        fresh.rename(watch.bench.root)
        watch.until_state("queued")
    save(watch.bench, "avatars/43")
    watch.until_state("queued", record="avatars/43")

    assert [] == watch.broken
    assert ["the root is back or was replaced"] == [line["detail"] for line in told(lines, "watch.restarted")]


def test_a_root_that_is_mounted_over_is_watched_anew(bench: Bench) -> None:
    def work() -> None:
        watch = Watch(bench)
        watch.swept()
        mount_tmpfs(bench.root)

        save(bench)

        watch.until_state("queued")
        watch.watcher.close()

    in_a_world(work, with_own_mounts)


def test_records_are_not_taken_for_gone_because_the_root_is(watch: Watch) -> None:
    watch.bench.write(f"{RECORD}/original/cat.jpg", JPEG)
    watch.until_state("receiving")

    watch.bench.root.rename(watch.bench.directory / "elsewhere")
    watch.until(lambda: watch.broken, "its loss was told")
    watch.turn(10)

    assert "receiving" == watch.bench.state()


# Faults


def test_a_ledger_that_does_not_answer_is_waited_for_and_nothing_is_forgotten(blind: Watch) -> None:
    save(blind.bench)
    blind.turn()
    blind.bench.clock.advance(1.5)

    with captured() as lines, blind.bench.ledger_away():
        waits = [blind.watcher.step() for _ in range(3)]
    blind.until_state("queued")

    assert 0.5 in waits
    assert 1 == len(told(lines, "ledger.unavailable"))


def test_a_root_and_a_ledger_that_are_gone_together_do_not_end_the_watcher(moved: Bench) -> None:
    """Both lay on the disk that died. The hold is written down when the ledger answers again."""
    answers = False
    held: list[SpooldError] = []

    def hold(fault: SpooldError) -> None:
        if not answers:
            raise LedgerUnavailable("use ledger: disk I/O error")
        held.append(fault)

    watch = Watch(moved, observes=False, on_broken=hold)
    watch.turn(3)
    moved.root.rename(moved.directory / "elsewhere")
    for _ in range(5):
        moved.clock.advance(1.0)
        watch.turn()

    answers = True
    moved.clock.advance(1.0)
    watch.turn()

    assert [SpoolBroken] == [type(fault) for fault in held]
    watch.watcher.close()


class Failing(Looker):
    """A looker for which one record is beyond it."""

    def look(self, record: str) -> Any:
        if record.endswith("/1"):
            raise StoreUnavailable("look: something that nobody thought of")
        return super().look(record)


def test_a_record_that_cannot_be_looked_at_does_not_hold_up_the_others(moved: Bench) -> None:
    looker = moved.looker(styles=STYLES)
    looker.__class__ = Failing
    watch = Watch(moved, observes=False, looker=looker)
    for number in range(3):
        save(moved, f"avatars/{number}")

    with captured() as lines:
        watch.until(lambda: moved.ledger.counts().get(NAME) == {"queued": 2}, "the others are queued")

    assert "avatars/1" == told(lines, "look.failed")[0]["record"]
    watch.watcher.close()


# Ending


def test_it_runs_until_it_is_asked_to_stop_and_leaves_no_thread(bench: Bench) -> None:
    before = set(threading.enumerate())
    handlers = list(logging.getLogger("watchdog.observers.inotify_c").handlers)
    watch = Watch(bench)
    stop = threading.Event()
    running = threading.Thread(target=watch.watcher.run, args=(stop,))
    running.start()
    save(bench)
    until(lambda: bench.state() == "queued", "the record is queued")
    began = time.monotonic()

    stop.set()
    running.join(10)

    assert not running.is_alive()
    assert time.monotonic() - began < 5
    until(lambda: set(threading.enumerate()) <= before, "watchdog's threads have ended")
    assert handlers == logging.getLogger("watchdog.observers.inotify_c").handlers


@pytest.mark.parametrize("call", ["fstat", "scandir", "stat", "mkdir"])
def test_a_disk_that_fails_once_holds_the_spool_for_a_moment(bench: Bench, call: str) -> None:
    """An error that nobody had named ended the watcher's thread, and with it the daemon."""
    watch = Watch(bench, observes=False)
    bench.write(f"{RECORD}/original/cat.jpg", JPEG)

    with Hand(Fail("os", 1, refuses(errno.EIO), only=lambda op: op.name == call)) as hand:
        watch.until(lambda: bench.state() == "receiving", "the record is seen")

    assert isinstance(hand.plan, Fail) and hand.plan.hit is not None
    assert all(isinstance(fault, SpoolBroken) for fault in watch.broken)


def test_a_record_whose_look_failed_is_looked_at_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for one that is about to be looked at, and no sweep touched it any more."""
    watch = Watch(bench, observes=False)
    look = watch.looker.look
    faults = [OSError(errno.EIO, "Input/output error")]

    def fail_once(record: str) -> Any:
        if faults:
            raise faults.pop()
        return look(record)

    monkeypatch.setattr(watch.looker, "look", fail_once)
    bench.write(f"{RECORD}/original/cat.jpg", JPEG)

    watch.until(lambda: bench.state() == "receiving", "the record is seen")

    assert [SpoolBroken] == [type(fault) for fault in watch.broken]


# Whose turn it is


def looked_at(watch: Watch) -> list[str]:
    """Return a list to which each record is added when it is looked at."""
    records: list[str] = []
    look = watch.looker.look

    def tell(record: str) -> Any:
        records.append(record)
        return look(record)

    watch.looker.look = tell  # type: ignore[method-assign]
    return records


def test_an_attachment_with_very_many_changes_lets_another_with_one_be_looked_at(blind: Watch) -> None:
    blind.turn()
    records = looked_at(blind)
    for number in range(300):
        blind.watcher.touch(f"avatars/{number}")
    blind.watcher.touch("logos/1")
    blind.turn(2)

    assert records.index("logos/1") < 8
    assert len(records) > 100, "and the others are looked at too"


def test_what_is_new_is_looked_at_between_what_a_sweep_has_found(blind: Watch) -> None:
    save_all(blind.bench, 300)
    records = looked_at(blind)
    blind.turn()
    first = len(records)
    blind.watcher.touch("avatars/new")
    blind.turn()

    assert 0 < first <= records.index("avatars/new") < first + 8
