"""Whatever happens, and in whatever order: spoold beside a model that is plainly right (see reference_model.py)."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy import delete

import spoold.aside
import spoold.looker
import spoold.uploader
from spoold.aside import AsideDirectory
from spoold.errors import StoreUnavailable
from spoold.ledger import Ledger
from spoold.ledger.schema import claim
from spoold.model import Claim, Digests, Headers, StoredObject
from spoold.owner import Owner
from spoold.uploader import Uploader
from tests.figures import record as record_figures
from tests.reference_model import (
    DOUBT_S,
    FAULTS,
    NAMES,
    POINTS,
    RECORDS,
    STYLES,
    At,
    Bucket,
    Doing,
    Fate,
    Play,
    Settings,
)

TOTAL: Counter[str] = Counter()
RECORD = RECORDS[0]
MANY = int(os.environ.get("SPOOLD_EXAMPLES", "3000"))
"""How many plays the soak tries; here, since the tests' environment is cleaned of all that is spoold's."""

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
    verb("take_away", records),
    verb("bring_back", records),
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
        TOTAL["steps"] += 1
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
    """Play so many plays of so many steps at most, and keep the figures."""
    TOTAL.clear()
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(HealthCheck), **more,
        ),
    )  # fmt: skip
    kinds = ("examples", "steps", "walks", "interruptions", "crashes", "faults", "late")
    record_figures("reference-model", **{kind: TOTAL[kind] for kind in kinds}, lost=0, stale=0, half=0)  # else it had failed


@pytest.mark.timeout(600)
def test_nothing_is_lost_stale_or_half_whatever_happens() -> None:
    """The same examples in each run: the soak looks for new ones."""
    explore(30, 25, derandomize=True)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_is_lost_stale_or_half_in_thousands_of_plays() -> None:
    explore(MANY, 60)


# Small and exhaustive: one thing, at every moment of one record's way


def from_save_to_done(play: Play) -> None:
    """A record is uploaded and let go."""
    upload(play)
    for seconds in (6, 11, 31):
        play.advance(seconds)
        play.settle()
        play.work()


def from_one_to_another(play: Play) -> None:
    """A record whose first PUT is late is replaced by another one, and its keys go."""
    play.fates(Fate.LATE)
    upload(play)
    play.save(RECORD, "note.txt")
    for seconds in (1, 6, 70, DOUBT_S):
        play.advance(seconds)
        play.settle()
        play.work()
        play.tend()


def from_doubt_to_death(play: Play) -> None:
    """A record whose PUT got no answer is rewritten while it is let go, and its daemon dies."""
    play.fates(Fate.LOST, Fate.FAILS)
    upload(play)
    play.rewrite(RECORD, "original", keeps_mtime=True)
    for seconds in (6, 11, 20):
        play.advance(seconds)
        play.settle()
        play.work()
    play.kill()
    play.start()
    play.work()


WAYS = (from_save_to_done, from_one_to_another, from_doubt_to_death)
EFFECTS = ("ledger", "put", "delete", "answer", "rename", "unlink", "rmdir")
DOINGS: tuple[Doing, ...] = (
    ("crash",), ("crash", True), ("rewrite", RECORD, "original", True), ("rewrite", RECORD, "thumb", False, False),
    ("append", RECORD, "thumb"), ("touch", RECORD, "original"), ("save", RECORD, "cat.jpg"), ("save", RECORD, "note.txt"),
    ("save_again", RECORD), ("save_beside", RECORD, "note.txt"), ("late_style", RECORD), ("link", RECORD, "cat.jpg"),
    ("begin_copy", RECORD, "cat.jpg", "original"), ("remove", RECORD), ("take_away", RECORD), ("settle", 1), ("start",),
    ("drain",), ("freeze", 35.0), ("jump", 4000.0), ("fail", errno.EIO), ("fail", errno.ENOSPC), ("fail", errno.EACCES),
    ("fates", Fate.LATE), ("fates", Fate.UNPROVEN, Fate.NEVER), ("fates", Fate.DENIED),
)  # fmt: skip


def moments_of(way: Callable[[Play], None], points: Iterable[str]) -> list[tuple[str, int]]:
    """Return every call at these points that a play makes which goes this way, to its end."""
    with Play() as play:
        play.calls.clear()
        way(play)
        play.end()
        return [(point, nth) for point in points for nth in range(play.calls[point])]


def go(way: Callable[[Play], None], interruption: At) -> None:
    with Play() as play:
        play.arm(interruption)
        way(play)
        play.end()


@pytest.mark.timeout(600)
def test_a_daemon_may_die_before_each_of_its_effects() -> None:
    moments = moments_of(from_save_to_done, EFFECTS)

    for point, nth in moments:
        go(from_save_to_done, At(point, nth, ("crash", True)))

    assert {"ledger", "put", "answer", "rename", "unlink", "rmdir"} == {point for point, _ in moments}


@pytest.mark.timeout(600)
def test_a_record_may_be_taken_away_and_come_back_before_each_of_the_daemons_effects() -> None:
    """Its files are as they were, and so was the batch that had answered for them: they lay there for ever."""
    for point, nth in moments_of(from_save_to_done, ("lease", "rename", "unlink", "put"))[::2]:
        go(from_save_to_done, At(point, nth, ("take_away", RECORD)))


@pytest.mark.soak
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("doing", DOINGS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_anything_may_happen_at_any_moment(way: Callable[[Play], None], doing: Doing) -> None:
    for point, nth in moments_of(way, POINTS):
        go(way, At(point, nth, doing))


# What it found: counterexamples, shrunk


@pytest.fixture
def play() -> Iterator[Play]:
    """A play with the usual settings; it is brought to its end, and everything demanded, by the test."""
    with Play() as play:
        yield play


def test_a_replaced_key_is_not_brought_back_by_an_older_put_that_lands_after_its_deletion(play: Play) -> None:
    """With `replaced_after` below `upload.doubt` the DELETE was confirmed while the PUT could still land."""
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.fates(Fate.LATE)
    play.work()
    play.save(RECORD, "note.txt")
    play.settle()
    play.work()
    play.advance(70)
    play.tend()

    play.end()


def test_a_clock_set_forward_does_not_end_a_doubt(play: Play) -> None:
    """The newer version was let go while the older one could still land: by the wall clock its time was over."""
    play.fates(Fate.LATE)
    upload(play)
    play.rewrite(RECORD, "original")
    play.settle()
    play.work()
    play.jump(4000)
    for seconds in (6, 11):
        play.advance(seconds)
        play.work()

    play.end()


def test_an_older_put_that_lands_late_is_put_right_also_where_local_files_stay() -> None:
    """With `delete: false` a batch was done at once: nobody looked at its doubts, and the older content was the last."""
    with Play(Settings(deletes=False)) as play:
        play.fates(Fate.LATE)
        upload(play)
        play.rewrite(RECORD, "original")
        play.settle()
        play.work()

        play.end()


def test_a_record_that_is_stalled_for_one_daemon_and_new_to_another_takes_a_legal_path() -> None:
    with Play(Settings(styles=STYLES)) as play:
        play.start()
        play.link(RECORD, "cat.jpg")
        play.sweep(0)
        play.advance(4000)
        play.sweep(0)
        play.sweep(1)
        play.sweep(0)

        play.end()


# That it would find something: faults planted into spoold


def skips_the_last_look(patch: pytest.MonkeyPatch, play: Play) -> None:
    """Cleanup believes that what it set aside is what was stored."""
    patch.setattr(AsideDirectory, "differs", lambda self, file, trusts: None)
    upload(play)
    play.advance(6)
    play.work(0, [At("rename", 0, ("rewrite", RECORD, "original", True))])


def skips_the_hash(patch: pytest.MonkeyPatch, play: Play) -> None:
    """Cleanup asks for leases and trusts them."""
    patch.setattr(spoold.aside, "_sha256", lambda fd: hashes.pop(0))
    upload(play)
    hashes = [digest for (digest,) in play.query("SELECT digest FROM batch_file ORDER BY id")] * 2
    play.advance(6)
    play.work(0, [At("rename", 0, ("rewrite", RECORD, "original", True))])


def ignores_doubts(patch: pytest.MonkeyPatch, play: Play) -> None:
    """Cleanup lets go while an older PUT may still land."""
    clearance = Ledger.clearance
    patch.setattr(Ledger, "clearance", lambda self, mine: replace(clearance(self, mine), doubts={}))
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.fates(Fate.LATE, Fate.FINE)
    play.work()
    play.rewrite(RECORD, "original")
    play.settle()
    play.work()


def forgets_what_a_dead_daemon_sent(patch: pytest.MonkeyPatch, play: Play) -> None:
    """A daemon that takes a record over does not know that a PUT is under way."""
    patch.setattr(
        Ledger, "_take_over", lambda self, change, keys: change.execute(delete(claim).where(claim.c.record_key.in_(keys)))
    )
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.work(0, [At("put", 0, ("crash", True))])
    play.rewrite(RECORD, "original")
    play.start()
    play.settle()
    play.work()


def confirms_what_it_does_not_know(patch: pytest.MonkeyPatch, play: Play) -> None:
    """The uploader takes silence for yes."""
    put = Bucket.put

    def hopeful(self: Bucket, bucket: str, key: str, body: bytes, headers: Headers, digests: Digests) -> StoredObject:
        with contextlib.suppress(StoreUnavailable):
            return put(self, bucket, key, body, headers, digests)
        return StoredObject(bucket, key, len(body), headers.content_type, digests.md5)

    patch.setattr(Bucket, "put", hopeful)
    play.fates(Fate.FAILS)
    upload(play)


def sends_what_it_reads_later(patch: pytest.MonkeyPatch, play: Play) -> None:
    """The uploader reads a file again and does not compare."""
    patch.setattr(spoold.uploader, "_KEPT_FILE_BYTES", 0)
    patch.setattr(Uploader, "_parts", lambda self, put, size: iter([(play.root / put.file.file.path).read_bytes()]))
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.work(0, [At("ledger", 1, ("rewrite", RECORD, "original", True))])


def takes_what_is_being_written(patch: pytest.MonkeyPatch, play: Play) -> None:
    """Nobody asks whether a file is open for writing."""
    patch.setattr(spoold.looker, "with_veto", lambda spool, images, files, verdict, **_: verdict)
    play.begin_copy(RECORD, "note.txt", "original")
    play.settle()
    play.work()


def works_on_without_its_claim(patch: pytest.MonkeyPatch, play: Play) -> None:
    """A daemon that was frozen past its claim goes on where it was."""
    patch.setattr(Owner, "demand", lambda self: None)
    play.start()
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.work(0, [At("demand", 0, ("freeze", 35.0))])


def ignores_the_fence(patch: pytest.MonkeyPatch, play: Play) -> None:
    """The ledger takes changes from whoever had the claim once."""
    patch.setattr(Ledger, "_demand", lambda self, change, mine, even_superseded=False: None)
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.work(0, [At("put", 1, ("rewrite", RECORD, "original")), At("put", 1, ("settle",))])


def takes_absence_for_deletion(patch: pytest.MonkeyPatch, play: Play) -> None:
    """Keys whose files the app has removed are deleted."""
    done = Ledger.done

    def done_for(self: Ledger, mine: Claim, dirs_due_at: float | None) -> None:
        done(self, mine, dirs_due_at)
        with self.write() as change:
            live = {(row["bucket"], row["key"]) for row in self.record_objects(mine.batch.record, spool=mine.batch.spool)}
            self._replace(change, mine, live, due_at=change.now)

    patch.setattr(Ledger, "done", done_for)
    upload(play)
    play.advance(6)
    play.work()
    play.advance(11)
    play.work()


def overwrites_when_it_gives_back(patch: pytest.MonkeyPatch, play: Play) -> None:
    """What comes back from aside takes the name of what the app has written since."""

    def careless(name: str, to_name: str, *, dir_fd: int, to_dir_fd: int) -> None:
        os.rename(name, to_name, src_dir_fd=dir_fd, dst_dir_fd=to_dir_fd)

    patch.setattr(spoold.aside, "rename_noreplace", careless)
    upload(play)
    play.advance(6)
    play.work()
    play.kill()
    play.save(RECORD, "cat.jpg")
    patch.setattr(AsideDirectory, "differs", lambda self, file, trusts: "it is not what was stored")
    play.start()


PLANTED = (
    skips_the_last_look, skips_the_hash, ignores_doubts, forgets_what_a_dead_daemon_sent, confirms_what_it_does_not_know,
    sends_what_it_reads_later, takes_what_is_being_written, works_on_without_its_claim, ignores_the_fence,
    takes_absence_for_deletion, overwrites_when_it_gives_back,
)  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_breaks_a_law(planted: Callable[[pytest.MonkeyPatch, Play], None]) -> None:
    """A checker that cannot fail proves nothing."""
    with Play() as play, pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        planted(patch, play)
        play.end()


@pytest.mark.parametrize("planted", PLANTED)
def test_what_finds_a_planted_fault_passes_without_it(planted: Callable[[Any, Play], None]) -> None:
    with Play() as play:
        planted(Idle(), play)
        play.end()


class Idle:
    """A monkeypatch that plants nothing."""

    def setattr(self, target: object, name: str, value: object) -> None:
        pass


def upload(play: Play) -> None:
    """Save a cat and have it uploaded; it still lies in the spool."""
    play.save(RECORD, "cat.jpg")
    play.settle()
    play.work()
