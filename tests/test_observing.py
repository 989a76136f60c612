"""What the kernel tells, and what it keeps to itself: the observer is not believed more than it deserves."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spoold import observing
from spoold.observing import Observing, watches_needed
from tests.hostile import exchange
from tests.parts import Bench, RealClock, in_a_world, until, without

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def ears(bench: Bench) -> Iterator[Observing]:
    ears = Observing(spool=bench.spool, clock=bench.clock)
    yield ears
    ears.close()


def heard(ears: Observing) -> set[str]:
    return {path for path, _ in ears.hints(at_most=1000)}


def until_heard(ears: Observing, path: str) -> set[str]:
    all_of_it: set[str] = set()
    until(lambda: path in all_of_it or all_of_it.update(heard(ears)), f"{path} is heard of")
    return all_of_it


def unwatch(ears: Observing, directory: Path) -> None:
    """Have the kernel forget the watch of one directory, as if there never had been one to spare."""
    reader = observing._reader(ears._observer)
    fd = getattr(reader, "_inotify_fd", None)
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text()
    found = re.search(rf"inotify wd:([0-9a-f]+) ino:{directory.stat().st_ino:x} ", lines)
    assert found and isinstance(fd, int), f"{directory} is not watched"
    assert 0 == _libc.inotify_rm_watch(fd, int(found[1], 16))


def test_what_happens_below_the_root_is_heard_but_for_our_house(bench: Bench, ears: Observing) -> None:
    (bench.root / "avatars").mkdir()
    ears.begin()

    bench.write(".spoold/aside/1.1.x")
    ears.sing()
    bench.write("avatars/1.jpg")

    assert {"avatars/1.jpg"} == until_heard(ears, "avatars/1.jpg")


def test_when_the_canary_is_heard_everything_before_was_and_new_directories_are_watched(bench: Bench, ears: Observing) -> None:
    ears.begin()
    for number in range(200):
        (bench.root / f"avatars/{number}/original").mkdir(parents=True)

    ears.sing()
    hints = set()
    until(lambda: hints.update(heard(ears)) or ears.is_canary_heard, "the canary is heard")

    watched = ears.watched()
    assert watched is not None
    inodes = {path.stat().st_ino for path in bench.root.rglob("*") if path.is_dir()}
    assert set() == inodes - watched
    assert {"avatars"} <= hints


def test_a_directory_that_is_not_watched_is_not_among_those_that_are(bench: Bench, ears: Observing) -> None:
    for name in ("heard", "unheard"):
        (bench.root / name).mkdir()
    ears.begin()

    unwatch(ears, bench.root / "unheard")

    watched = ears.watched()
    assert watched is not None
    assert [True, False] == [(bench.root / name).stat().st_ino in watched for name in ("heard", "unheard")]


def test_without_an_observer_nobody_says_what_is_watched(ears: Observing) -> None:
    assert ears.watched() is None


def test_watchdog_still_lets_us_see_what_the_kernel_watches(bench: Bench, ears: Observing) -> None:
    """Its insides are nobody's promise: without them the canary still stands, but watches cannot be counted."""
    ears.begin()

    reader = observing._reader(ears._observer)

    assert isinstance(reader, threading.Thread)
    assert "anon_inode:inotify" == os.readlink(f"/proc/self/fd/{getattr(reader, '_inotify_fd', None)}")


def test_a_reader_that_died_is_a_reason_to_begin_anew(bench: Bench, ears: Observing, recwarn: pytest.WarningsRecorder) -> None:
    """A KeyError in it, by a directory that was moved out, leaves all other threads alive (FACTS 13)."""
    ears.begin()
    reader = observing._reader(ears._observer)
    assert reader is not None and ears._observer is not None

    getattr(reader, "stop")()  # noqa: B009 - no thread of the standard library has it
    bench.write("wake it up")
    reader.join(5)

    assert ears._observer.is_alive() and all(emitter.is_alive() for emitter in ears._observer.emitters)
    assert "watchdog's threads are dead" == ears.doubt()


def test_it_ends_also_after_two_directories_changed_places(bench: Bench, ears: Observing) -> None:
    """watchdog then forgets one of them, and stumbles over it when it is to stop: the daemon died of it."""
    for name in ("one", "other"):
        bench.write(f"avatars/{name}/original/cat.jpg")
    ears.begin()
    before = set(threading.enumerate())
    for _ in range(5):
        exchange(bench.root / "avatars/one", bench.root / "avatars/other")
    bench.write("avatars/last")
    until_heard(ears, "avatars/last")

    ears.begin()
    bench.write("avatars/later")
    until_heard(ears, "avatars/later")
    threads = set(threading.enumerate()) - before

    assert len(threads) == len(before - set(threading.enumerate())), "no thread of the old one is left"


def test_the_canary_is_not_silent_while_its_word_may_still_be_unread(bench: Bench, ears: Observing) -> None:
    """Where the disk is slow, looks take long, and the inbox is read late."""
    ears.begin()
    assert ears.doubt() is None
    until(lambda: not ears.is_quiet, "its event has come")
    bench.clock.advance(11)

    late = ears.doubt()
    heard(ears)

    assert [None, None] == [late, ears.doubt()]


def test_without_a_watch_to_spare_it_says_so_and_leaves_no_thread(bench: Bench) -> None:
    before = set(threading.enumerate())

    def work() -> None:
        ears = Observing(spool=bench.spool, clock=bench.clock)
        with pytest.raises(OSError, match="watch limit") as caught:
            ears.begin()
        assert errno.ENOSPC == caught.value.errno
        assert not ears.is_listening
        ears.close()

    in_a_world(work, without("inotify_add_watch", errno.ENOSPC))

    until(lambda: set(threading.enumerate()) <= before, "watchdog's threads have ended")


def test_an_overflow_is_told_once_and_not_while_it_cost_more_than_a_tenth_of_the_time_to_begin(tmp_path: Path) -> None:
    with Bench(tmp_path, clock=RealClock()) as bench:
        ears = Observing(spool=bench.spool, clock=bench.clock)
        for number in range(300):
            (bench.root / f"avatars/{number}").mkdir(parents=True)
        ears.begin()

        ears._ear.has_heard.set()
        at_once = ears.overflowed()
        until(ears.overflowed, "it is told")

        assert not at_once
        assert not ears.overflowed()
        ears.close()


@pytest.mark.parametrize(
    ("directories", "unwatched", "limit", "enough"),
    [(100, 10, 8192, 16384), (100_000, 10, 65536, 262144), (100, 0, 100, 1024), (10_000, 500, 20_000, 32768)],
)
def test_the_limit_that_it_asks_for_is_enough_for_the_tree_and_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directories: int, unwatched: int, limit: int, enough: int
) -> None:
    proc = tmp_path / "fs" / "inotify"
    proc.mkdir(parents=True)
    (proc / "max_user_watches").write_text(f"{limit}\n")
    monkeypatch.setattr(observing, "_LIMITS", (proc / "max_user_watches",))
    monkeypatch.setattr(observing, "_PROC", tmp_path)

    assert ("fs.inotify.max_user_watches", enough) == watches_needed(directories, unwatched)
