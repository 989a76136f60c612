"""Letting go: only of what was stored, only when it is time, and nothing that anybody wrote since."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from spoold.aside import aside_name, parse_aside_name
from spoold.cleanup import Cleaner, Due, Missing, Remover
from spoold.errors import BadPath, ClaimLost, SpoolBroken, StoreUnavailable
from spoold.model import Answer, BatchFile, Claim, Identity, PutResult, State
from tests.nth import Fail, Hand, Op, refuses
from tests.parts import (
    BUCKET,
    LEASE_S,
    NAME,
    RECORD,
    Bench,
    alone,
    captured,
    in_a_world,
    spooled,
    told,
    without,
    without_leases,
    without_root_powers,
)
from tests.proxy import Answer as Reply
from tests.proxy import FaultProxy, LoseAnswer, error_body
from tests.servers import RcloneServer

CAT = {"original/cat.jpg": b"a cat", "thumb/cat.jpg": b"cat"}
ORIGINAL = f"{RECORD}/original/cat.jpg"
THUMB = f"{RECORD}/thumb/cat.jpg"
DAY_S = 86400.0
DOUBT_S = 900.0
OPEN_AGAIN_S = 15.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def step(bench: Bench, cleaner: Cleaner, claim: Claim) -> Due | None:
    """Clear once and give the claim back, as a walk does."""
    due = alone(cleaner.clear(claim))
    if due is not None:
        bench.ledger.come_back(claim, bench.clock.now() + due.in_s, due.waiting_for)
    else:
        bench.ledger.done(claim, None)
    return due


def clear(bench: Bench, cleaner: Cleaner, claim: Claim, *, at_most: int = 20) -> list[str]:
    """Walk a batch until nothing is left to clear, and return what it waited for."""
    waited: list[str] = []
    for _ in range(at_most):
        due = step(bench, cleaner, claim)
        if due is None:
            return waited
        waited.append(due.waiting_for)
        bench.clock.advance(due.in_s + 0.001)
        found = bench.claim()
        if found is None or found.batch.id != claim.batch.id:
            return waited
        claim = found
    return waited


# The way of a file


def test_a_file_is_set_aside_waits_its_grace_and_goes(bench: Bench) -> None:
    cleaner = bench.cleaner(min_age_s=5.0, grace_s=10.0)
    claim = bench.batch_stored(CAT)

    young = step(bench, cleaner, claim)
    bench.clock.advance(5)
    lies_young = bench.files()
    aside = step(bench, cleaner, bench.claimed())
    lies_aside = bench.files(), len(bench.aside())
    bench.clock.advance(10)
    last = step(bench, cleaner, bench.claimed())

    assert (Due(5.0, "min_age"), sorted([ORIGINAL, THUMB])) == (young, lies_young)
    assert (Due(10.0, "grace"), ([], 2)) == (aside, lies_aside)
    assert (None, [], []) == (last, bench.files(), bench.aside())


def test_an_app_that_still_chmods_by_name_finds_its_file(bench: Bench) -> None:
    """A file removed between its rename and its chmod raises ENOENT in the web request (FACTS 3)."""
    cleaner = bench.cleaner(min_age_s=5.0)
    claim = bench.batch_stored(CAT)

    for _ in range(5):
        alone(cleaner.clear(claim))
        bench.clock.advance(0.99)

    (bench.root / ORIGINAL).chmod(0o644)


def test_a_version_that_comes_between_the_look_and_the_rename_stays_for_its_chmod(bench: Bench) -> None:
    """It would come back, but its app, which is about to chmod it by name, would not find it meanwhile (FACTS 3)."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    saved = bench.directory / "saved"
    saved.write_bytes(b"A CAT")
    bench.interruptions = [lambda: saved.rename(bench.root / ORIGINAL)]

    step(bench, bench.cleaner(grace_s=10.0), claim)

    assert [] == bench.interruptions
    assert b"A CAT" == bench.read(ORIGINAL) and [] == bench.aside()
    assert "file.given_back" not in bench.events()


def test_nobody_waits_twice_for_the_grace(bench: Bench) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored(CAT)
    step(bench, cleaner, claim)
    bench.clock.advance(4)
    with bench.ledger.write() as change:
        change.execute(text("UPDATE batch SET due_at = 0"))

    again = step(bench, cleaner, bench.claimed())

    assert Due(6.0, "grace") == again


def test_a_file_of_unknown_date_waits_its_grace_from_now(bench: Bench) -> None:
    """The daemon was started anew; how long the file has lain aside is not known."""
    claim = bench.batch_stored(CAT)
    step(bench, bench.cleaner(grace_s=10.0), claim)
    bench.clock.advance(10)

    due = step(bench, bench.cleaner(grace_s=10.0), bench.claimed())

    assert Due(10.0, "grace") == due
    assert 2 == len(bench.aside())


def test_each_step_is_told(bench: Bench) -> None:
    with captured() as lines:
        clear(bench, bench.cleaner(), bench.batch_stored(CAT))

    events = [line["event"] for line in lines if line["event"].startswith("file.")]
    assert ["file.set_aside"] * 2 + ["file.deleted"] * 2 == events


def test_the_marker_goes_last(tmp_path: Path) -> None:
    """While it is there, whatever of its batch came back would be declared finished by it."""
    with Bench(tmp_path, marker=".done") as bench:
        claim = bench.batch_stored(CAT | {".done": b""})
        marker = next(file for file in claim.batch.files if file.is_marker)
        bench.ledger.mark_hashed(claim, marker, hashlib.sha256(b"").hexdigest())
        bench.ledger.come_back(claim, bench.clock.now(), "")
        left = []
        cleaner = bench.cleaner()
        while (claim := bench.claim()) is not None:  # type: ignore[assignment]
            left.append(bench.files())
            if step(bench, cleaner, claim) is None:
                break
            bench.clock.advance(1)

        assert [f"{RECORD}/.done"] in left
        assert [] == bench.files() == [path.name for path in bench.aside()]


def test_local_files_stay_where_the_configuration_says_so(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    assert alone(bench.cleaner(deletes=False).clear(claim)) is None
    assert bench.cleaner(deletes=False).prune(claim) is None
    assert sorted([ORIGINAL, THUMB]) == bench.files()


def test_local_files_outlive_their_upload_as_long_as_the_configuration_says(bench: Bench) -> None:
    cleaner = bench.cleaner(keep_for_s=DAY_S)
    claim = bench.batch_stored(CAT)

    due = step(bench, cleaner, claim)
    assert due is not None
    bench.clock.advance(3000)

    assert "keep_for" == due.waiting_for
    assert DAY_S - 60 < due.in_s <= DAY_S
    assert sorted([ORIGINAL, THUMB]) == bench.files()
    assert bench.claim() is None


def test_the_app_may_remove_its_files_itself(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    (bench.root / ORIGINAL).unlink()
    (bench.root / THUMB).unlink()
    (bench.root / THUMB).parent.rmdir()

    waited = clear(bench, bench.cleaner(), claim)

    assert ([], "done") == (waited, bench.state())


def test_the_spools_root_may_be_lost_and_nothing_is_inferred(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.root.rename(bench.directory / "elsewhere")

    with pytest.raises(Exception, match="open root"):
        alone(bench.cleaner().clear(claim))

    assert "uploaded" == bench.state()


# What others write meanwhile: nothing of it may be lost


@dataclass
class Writer:
    """Somebody who changes the original when the test says so. `after` is what nobody may lose.

    name: replace | truncate | in place | held | mapped.
    """

    bench: Bench
    name: str
    after: bytes = b"A CAT"  # as long as what was stored
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.path = self.bench.root / ORIGINAL
        self._fd = -1
        self._address: int | None = None

    def prepare(self) -> None:
        """Open the file, as the two must who later write without its name."""
        if self.name in ("held", "mapped"):
            self._fd = os.open(self.path, os.O_RDWR)
        if self.name == "mapped":
            _libc.mmap.restype = ctypes.c_void_p
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            self._address = _libc.mmap(None, 4096, protection, mmap.MAP_SHARED, self._fd, ctypes.c_long(0))
            os.close(self._fd)

    def write(self) -> None:
        """Write; whoever does so by name makes the file anew if it is not there, as apps do."""
        try:
            self._write()
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self.after)

    def _write(self) -> None:
        match self.name:
            case "replace":
                temporary = self.bench.directory / "temporary"
                temporary.write_bytes(self.after)
                temporary.rename(self.path)
            case "truncate":
                self.path.write_bytes(self.after)
            case "in place":
                before = self.path.stat()
                with open(self.path, "r+b", buffering=0) as file:
                    file.write(self.after)
                os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
            case "held":
                os.pwrite(self._fd, self.after, 0)
            case "mapped":
                ctypes.memmove(ctypes.c_void_p(self._address), self.after, len(self.after))

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self.name == "held":
            os.close(self._fd)
        if self.name == "mapped":
            _libc.munmap(ctypes.c_void_p(self._address), 4096)


_libc = ctypes.CDLL(None, use_errno=True)
WRITERS = ("replace", "truncate", "in place", "held", "mapped")


def everything(bench: Bench) -> set[bytes]:
    """Return every content that lies anywhere in the spool."""
    return {path.read_bytes() for path in bench.root.rglob("*") if path.is_file()}


@pytest.fixture
def writer(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Writer]:
    writer = Writer(bench, request.param)
    yield writer
    writer.close()


def every_writer(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("writer", names or WRITERS, indirect=True)


def clear_until_quiet(bench: Bench, cleaner: Cleaner, claim: Claim, writer: Writer) -> None:
    """Clear, while the writer closes at last, until nothing more is to be done."""
    clear(bench, cleaner, claim, at_most=3)
    writer.close()
    bench.clock.advance(OPEN_AGAIN_S)
    if (found := bench.claim()) is not None:
        clear(bench, cleaner, found)


def nothing_is_lost(bench: Bench, writer: Writer) -> bool:
    return writer.after == bench.read(ORIGINAL) and [] == bench.aside()


@every_writer()
@pytest.mark.parametrize("closes", ["at once", "later"])
def test_nothing_is_lost_that_is_written_before_the_first_look(bench: Bench, writer: Writer, closes: str) -> None:
    """Five kinds of writers at each moment of letting go (FACTS 18)."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    writer.prepare()
    writer.write()
    if closes == "at once":
        writer.close()

    clear_until_quiet(bench, bench.cleaner(grace_s=10.0), claim, writer)

    assert nothing_is_lost(bench, writer)


@every_writer()
@pytest.mark.parametrize("closes", ["at once", "later"])
def test_nothing_is_lost_that_is_written_between_the_look_and_the_rename(bench: Bench, writer: Writer, closes: str) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})

    def write() -> None:
        writer.prepare()
        writer.write()
        if closes == "at once":
            writer.close()

    bench.interruptions = [write]
    clear_until_quiet(bench, bench.cleaner(grace_s=10.0), claim, writer)

    assert [] == bench.interruptions
    assert nothing_is_lost(bench, writer)


@every_writer("held", "mapped")
def test_nothing_is_lost_that_is_written_late_by_who_opened_between_the_look_and_the_rename(
    bench: Bench, writer: Writer
) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    bench.interruptions = [writer.prepare]
    step(bench, cleaner, claim)

    writer.write()
    bench.clock.advance(10)
    clear_until_quiet(bench, cleaner, bench.claimed(), writer)

    assert nothing_is_lost(bench, writer)


def test_a_file_that_is_not_found_aside_once_is_looked_for_again(bench: Bench) -> None:
    """A network filesystem may say ESTALE. It lay there for ever."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    cleaner = bench.cleaner(grace_s=10.0)
    step(bench, cleaner, claim)
    bench.clock.advance(10.0)
    claim = bench.claimed()

    fault = Fail("os", 2, refuses(errno.ESTALE), only=lambda op: op.name == "openat2")  # the first opens aside/
    with Hand(fault):
        due = step(bench, cleaner, claim)

    assert fault.hit is not None and due is not None
    bench.clock.advance(due.in_s)
    clear(bench, cleaner, bench.claimed())
    assert ([], [], "done") == (bench.aside(), bench.files(), bench.state())


@every_writer("replace", "truncate", "in place")
def test_nothing_is_lost_that_is_written_while_the_file_lies_aside(bench: Bench, writer: Writer) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)

    writer.write()
    bench.clock.advance(10)
    clear_until_quiet(bench, cleaner, bench.claimed(), writer)

    assert nothing_is_lost(bench, writer)


@every_writer("replace", "truncate", "in place")
def test_nothing_is_lost_that_is_written_between_the_last_look_and_the_unlink(bench: Bench, writer: Writer) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    bench.clock.advance(10)

    bench.interruptions = [writer.write]
    clear_until_quiet(bench, cleaner, bench.claimed(), writer)

    assert [] == bench.interruptions
    assert nothing_is_lost(bench, writer)


@every_writer()
def test_nothing_is_lost_that_is_written_into_the_file_itself_while_it_lies_aside(bench: Bench, writer: Writer) -> None:
    """By somebody pre-empted inside open() all the while: the grace is there for them."""
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    [writer.path] = bench.aside()
    writer.prepare()
    writer.write()
    bench.clock.advance(10)

    clear_until_quiet(bench, cleaner, bench.claimed(), writer)

    assert nothing_is_lost(bench, writer)


@pytest.mark.parametrize("name", ["held", "mapped"])
def test_a_file_that_somebody_has_open_for_writing_stays_until_they_close_it(bench: Bench, name: str) -> None:
    cleaner = bench.cleaner()
    claim = bench.batch_stored(CAT)
    writer = Writer(bench, name)
    writer.prepare()

    due = alone(cleaner.clear(claim))
    bench.ledger.come_back(claim, bench.clock.now() + OPEN_AGAIN_S, "open")
    lies = bench.files()
    writer.close()
    bench.clock.advance(OPEN_AGAIN_S)
    clear(bench, cleaner, bench.claimed())

    assert due is not None
    assert ORIGINAL in lies
    assert [] == bench.files()


def test_a_writer_who_opens_a_file_that_is_set_aside_gets_it_back_unchanged(bench: Bench) -> None:
    """It is what was stored, still: it is the batch's again and goes when they have closed it."""
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    writer = Writer(bench, "held")
    bench.interruptions = [writer.prepare]

    with captured() as lines:
        step(bench, cleaner, claim)
    given_back = bench.files()
    known = bench.ledger.known(NAME, RECORD).files
    writer.close()
    bench.clock.advance(OPEN_AGAIN_S)
    clear(bench, cleaner, bench.claimed())

    assert [ORIGINAL] == given_back
    assert {ORIGINAL} == set(known)
    assert ["somebody opened it for writing"] == [line["detail"] for line in told(lines, "file.given_back")]
    assert ([], "done") == (bench.files(), bench.state())


def test_a_file_comes_back_into_directories_that_were_removed_meanwhile(bench: Bench) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    bench.aside()[0].write_bytes(b"A CAT")
    (bench.root / RECORD / "original").rmdir()
    (bench.root / RECORD).rmdir()
    bench.clock.advance(10)

    step(bench, cleaner, bench.claimed())

    assert b"A CAT" == bench.read(ORIGINAL)


def the_older(bench: Bench, claim: Claim) -> Claim:
    """Return a new claim of the batch of this one, which gave way to a newer batch."""
    newer = bench.claimed()
    bench.ledger.defer(newer, StoreUnavailable("put: 503"), 10**6)
    older = bench.claimed()
    assert claim.batch.id == older.batch.id < newer.batch.id
    return older


def test_a_file_whose_name_is_taken_when_it_comes_back_is_kept(bench: Bench) -> None:
    """The newer one won; but both were somebody's."""
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    bench.aside()[0].write_bytes(b"A CAT")
    bench.write(ORIGINAL, b"another cat")
    bench.clock.advance(10)

    with captured() as lines:
        step(bench, cleaner, bench.claimed())

    assert b"another cat" == bench.read(ORIGINAL)
    assert [b"A CAT"] == [path.read_bytes() for path in bench.kept()]
    assert [] == bench.aside()
    [line] = told(lines, "file.given_back")
    assert f".spoold/kept/{bench.kept()[0].name}" in line["detail"]


def test_a_file_that_a_newer_batch_has_taken_the_place_of_is_kept_though_its_name_is_free(bench: Bench) -> None:
    """The newer one may lie aside itself, or be gone already: the older one must not follow it up into the bucket."""
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    bench.aside()[0].write_bytes(b"A CAT")
    bench.write(ORIGINAL, b"another cat")
    bench.offer()
    (bench.root / ORIGINAL).unlink()
    bench.clock.advance(10)

    old = the_older(bench, claim)
    alone(cleaner.clear(old))

    assert [] == bench.files()
    assert [b"A CAT"] == [path.read_bytes() for path in bench.kept()]


def test_a_newer_version_at_its_place_is_not_touched(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.write(ORIGINAL, b"another cat")

    clear(bench, bench.cleaner(), claim)

    assert [ORIGINAL] == bench.files()
    assert b"another cat" == bench.read(ORIGINAL)


def test_what_moved_on_is_looked_at_again(bench: Bench) -> None:
    """Nobody may have told of it: who writes by another name of the file makes no event in its directory."""
    claim = bench.batch_stored(CAT)
    bench.write(ORIGINAL, b"another cat")
    cleaner = bench.cleaner()
    cleaner._touch = bench.touched.append

    clear(bench, cleaner, claim)

    assert [RECORD] == bench.touched


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_took_a_files_name_is_not_touched(bench: Bench, kind: str) -> None:
    claim = bench.batch_stored(CAT)
    path = bench.root / ORIGINAL
    path.unlink()
    match kind:
        case "link":
            path.symlink_to(bench.root / THUMB)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)

    clear(bench, bench.cleaner(), claim)

    assert kind == {stat.S_IFLNK: "link", stat.S_IFDIR: "directory", stat.S_IFIFO: "fifo"}[stat.S_IFMT(path.lstat().st_mode)]


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "fifo", "unreadable"])
def test_what_takes_a_files_name_in_the_moment_before_the_rename_goes_back_to_it(bench: Bench, kind: str) -> None:
    """It was looked at by name, and is renamed by name: what is swapped in between lies aside, and is not ours."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    path = bench.root / ORIGINAL
    foreign = bench.directory / "foreign"
    foreign.mkdir()
    (foreign / "theirs").write_bytes(b"theirs")

    def swap() -> None:
        path.unlink()
        match kind:
            case "link":
                path.symlink_to(foreign / "theirs")
            case "dangling":
                path.symlink_to(foreign / "nothing")
            case "directory":
                foreign.rename(path)
            case "fifo":
                os.mkfifo(path)
            case "unreadable":
                (foreign / "theirs").rename(path)
                path.chmod(0)

    bench.interruptions = [swap]
    in_a_world(lambda: clear(bench, bench.cleaner(), claim), without_root_powers)

    made = {"link": stat.S_IFLNK, "dangling": stat.S_IFLNK, "directory": stat.S_IFDIR, "fifo": stat.S_IFIFO}
    assert made.get(kind, stat.S_IFREG) == stat.S_IFMT(path.lstat().st_mode)
    assert ([], []) == (bench.aside(), bench.kept())
    where = {"directory": path / "theirs", "unreadable": path}.get(kind, foreign / "theirs")
    assert b"theirs" == where.read_bytes()


def test_what_took_a_files_name_and_lay_aside_over_a_restart_goes_back_to_it(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    path = bench.root / ORIGINAL
    step(bench, bench.cleaner(grace_s=60.0), claim)
    [aside] = bench.aside()
    aside.unlink()
    aside.symlink_to("/etc/passwd")

    bench.cleaner().recover("me", lease_s=LEASE_S)

    assert path.is_symlink()
    assert [] == bench.aside()


def test_a_file_that_a_lease_is_held_on_is_open(bench: Bench) -> None:
    """File servers hold one for a client that may write: who opens without waiting is told to come again."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    holder = os.open(bench.root / ORIGINAL, os.O_RDWR)
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    due = alone(bench.cleaner().clear(claim))
    os.close(holder)

    assert due is not None and "open" == due.waiting_for
    assert [ORIGINAL] == bench.files()


@pytest.mark.parametrize("shut", ["original", "thumb"])
def test_a_file_that_cannot_be_set_aside_does_not_keep_the_others(bench: Bench, shut: str) -> None:
    """Immutable, or in a directory that may not be written: that is told of this one, by its name."""
    claim = bench.batch_stored(CAT)
    (bench.root / RECORD / shut).chmod(0o555)

    def work() -> None:
        with pytest.raises(BadPath) as caught:
            alone(bench.cleaner(grace_s=60.0).clear(claim))
        assert f"set aside {RECORD}/{shut}/cat.jpg: Permission denied" == str(caught.value)

    in_a_world(work, without_root_powers)

    assert [f"{RECORD}/{shut}/cat.jpg"] == bench.files()
    assert 1 == len(bench.aside())


def test_a_hard_link_of_the_apps_own_stays(bench: Bench) -> None:
    """The original may be one to a file that the app still owns (FACTS 8)."""
    own = bench.directory / "own.jpg"
    own.write_bytes(b"a cat")
    (bench.root / ORIGINAL).parent.mkdir(parents=True)
    os.link(own, bench.root / ORIGINAL)
    bench.offer()

    clear(bench, bench.cleaner(), bench.stored(bench.claimed()))

    assert ([], b"a cat") == (bench.files(), own.read_bytes())


def test_strangers_files_and_directories_stay(bench: Bench) -> None:
    bench.write(f"{RECORD}/original/README", b"not ours")
    claim = bench.batch_stored(CAT)
    (bench.root / RECORD / "original/note.txt").write_bytes(b"of somebody else")

    clear(bench, bench.cleaner(), claim)
    bench.cleaner().prune(claim)

    assert f"{RECORD}/original/note.txt" in bench.files()


# A batch that gave way


def test_what_lies_aside_of_a_batch_that_gave_way_goes_all_the_same(bench: Bench) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored(CAT)
    step(bench, cleaner, claim)
    bench.write(ORIGINAL, b"another cat")
    bench.offer()
    bench.clock.advance(10)

    old = the_older(bench, claim)
    due = alone(cleaner.clear(old))

    assert (State.SUPERSEDED, None) == (old.batch.state, due)
    assert [] == bench.aside()
    assert b"another cat" == bench.read(ORIGINAL)


def test_what_lies_in_its_place_of_a_batch_that_gave_way_is_the_newer_batchs(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.write(f"{RECORD}/retina/cat.jpg", b"a sharp cat")
    bench.offer()

    with pytest.raises(ClaimLost):
        step(bench, bench.cleaner(), claim)

    assert 3 == len(bench.files())


# Claims


def test_nothing_is_touched_without_a_claim_that_surely_lasts(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.has_claims = False

    with pytest.raises(ClaimLost):
        alone(bench.cleaner().clear(claim))

    assert sorted([ORIGINAL, THUMB]) == bench.files()


def test_who_was_frozen_after_the_last_look_unlinks_nothing(bench: Bench) -> None:
    cleaner = bench.cleaner()
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    claim = bench.claimed()

    def freeze() -> None:
        bench.has_claims = False

    bench.interruptions = [freeze]
    with pytest.raises(ClaimLost):
        alone(cleaner.clear(claim))

    assert 1 == len(bench.aside())


def test_who_lost_the_claim_sets_nothing_aside(bench: Bench) -> None:
    """The ledger says so, whatever our own clock believes."""
    claim = bench.batch_stored(CAT)
    bench.clock.advance(2 * LEASE_S)
    bench.claimed("you")

    with pytest.raises(ClaimLost):
        alone(bench.cleaner().clear(claim))

    assert sorted([ORIGINAL, THUMB]) == bench.files()


# Without leases


def test_without_leases_local_files_stay_and_the_batch_is_done(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    waited = in_a_world(lambda: clear(bench, bench.cleaner(trusts=False), claim), without_leases())

    assert ([], "done") == (waited, bench.state())
    assert sorted([ORIGINAL, THUMB]) == bench.files()


def test_without_leases_files_go_where_the_configuration_trusts(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    in_a_world(lambda: clear(bench, bench.cleaner(trusts=True), claim), without_leases())

    assert ([], [], "done") == (bench.files(), bench.aside(), bench.state())


def test_without_leases_the_hash_still_tells_what_was_written(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    writer = Writer(bench, "in place")
    bench.interruptions = [writer.write]

    in_a_world(lambda: clear(bench, bench.cleaner(trusts=True), claim), without_leases())

    assert b"A CAT" == bench.read(ORIGINAL)


# A disk that refuses


def test_a_directory_that_may_not_be_written_is_no_reason_to_believe_that_its_files_are_gone(bench: Bench) -> None:
    """The record is not done before its files have left, whatever was written down before the rename."""
    claim = bench.batch_stored(CAT)
    (bench.root / RECORD / "original").chmod(0o555)
    cleaner = bench.cleaner(grace_s=1.0)

    def work() -> None:
        with pytest.raises((OSError, BadPath)):
            alone(cleaner.clear(claim))
        bench.ledger.defer(claim, BadPath("rename: permission denied"), 1.0)
        for _ in range(3):
            bench.clock.advance(2)
            again = bench.claimed()
            try:
                due = alone(cleaner.clear(again))
            except (OSError, BadPath) as why:
                bench.ledger.defer(again, BadPath(str(why)), 1.0)
            else:
                assert due is not None, "it must not be taken for done"
                bench.ledger.come_back(again, bench.clock.now() + due.in_s, due.waiting_for)

    in_a_world(work, without_root_powers)
    assert ORIGINAL in bench.files()
    assert ORIGINAL in bench.ledger.known(NAME, RECORD).files
    (bench.root / RECORD / "original").chmod(0o755)
    bench.clock.advance(60)

    clear(bench, cleaner, bench.claimed())

    assert ([], "done") == (bench.files(), bench.state())


def test_a_filesystem_that_cannot_rename_without_overwriting_loses_nothing(bench: Bench) -> None:
    cleaner = bench.cleaner(grace_s=10.0)
    claim = bench.batch_stored(CAT)

    def work() -> None:
        step(bench, cleaner, claim)
        assert 2 == len(bench.aside())
        bench.clock.advance(10)
        step(bench, cleaner, bench.claimed())

    in_a_world(work, without("renameat2", errno.EINVAL))

    assert ([], [], "done") == (bench.files(), bench.aside(), bench.state())


# Is it still there? Rules 5 and 6


@pytest.fixture
def real(tmp_path: Path, rclone_server: RcloneServer) -> Iterator[Bench]:
    """A bench with a store that is one."""
    rclone_server.create_bucket(BUCKET)
    with Bench(tmp_path, endpoint_url=rclone_server.endpoint_url) as bench:
        yield bench


def uploaded(bench: Bench, server: RcloneServer, files: dict[str, bytes] = CAT) -> Claim:
    """Have a batch stored, and the objects in the bucket."""
    claim = bench.batch_stored(files)
    for path, content in files.items():
        server.client().put_object(Bucket=BUCKET, Key=f"{RECORD}/{path}", Body=content)
    return claim


def test_rule_5_a_fresh_proof_needs_no_head(bench: Bench) -> None:
    """Nobody answers where this store is."""
    claim = bench.batch_stored(CAT)
    bench.clock.advance(3599)

    assert [] != clear(bench, bench.cleaner(), claim)
    assert [] == bench.files()


def test_rule_5_a_proof_older_than_an_hour_is_renewed_before_letting_go(real: Bench, rclone_server: RcloneServer) -> None:
    claim = uploaded(real, rclone_server)
    real.clock.advance(3601)

    clear(real, real.cleaner(), claim)

    assert ([], "done") == (real.files(), real.state())
    proven = [row["proven_at"] for row in real.rows("SELECT proven_at FROM object")]
    assert all(moment > real.clock.now() - 60 for moment in proven)


def test_rule_5_nothing_goes_while_the_store_does_not_answer(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    bench.clock.advance(3601)

    with pytest.raises(StoreUnavailable):
        alone(bench.cleaner().clear(claim))

    assert sorted([ORIGINAL, THUMB]) == bench.files()


@pytest.mark.parametrize("how", ["gone", "overwritten", "same size"])
def test_rule_5_what_the_bucket_lost_is_missing_and_its_file_stays(real: Bench, rclone_server: RcloneServer, how: str) -> None:
    claim = uploaded(real, rclone_server)
    if how == "gone":
        rclone_server.client().delete_object(Bucket=BUCKET, Key=ORIGINAL)
    else:
        body = b"overwritten" if how == "overwritten" else b"A CAT"
        rclone_server.client().put_object(Bucket=BUCKET, Key=ORIGINAL, Body=body)
    real.clock.advance(3601)

    with pytest.raises(Missing) as caught:
        alone(real.cleaner().clear(claim))

    assert [ORIGINAL] == caught.value.keys
    assert sorted([ORIGINAL, THUMB]) == real.files()


def test_rule_5_what_lies_aside_comes_back_before_it_is_put_again(real: Bench, rclone_server: RcloneServer) -> None:
    cleaner = real.cleaner(grace_s=3601.0)
    claim = uploaded(real, rclone_server)
    step(real, cleaner, claim)
    rclone_server.client().delete_object(Bucket=BUCKET, Key=ORIGINAL)
    real.clock.advance(3602)
    claim = real.claimed()

    with pytest.raises(Missing) as caught:
        alone(cleaner.clear(claim))
    real.ledger.reopen(claim, caught.value.keys, caught.value)

    assert (sorted([ORIGINAL, THUMB]), []) == (real.files(), real.aside())
    assert {ORIGINAL, THUMB} == set(real.ledger.known(NAME, RECORD).files)
    assert {ORIGINAL: None, THUMB: THUMB} == {put.key: put.adopted and put.adopted.key for put in real.intended(real.claimed())}


def test_what_the_bucket_lost_of_a_file_that_is_gone_does_not_hold_up_the_others(
    real: Bench, rclone_server: RcloneServer
) -> None:
    """It cannot be put again. Asking for it again and again would keep the batch walking for ever."""
    cleaner = real.cleaner()
    claim = uploaded(real, rclone_server)
    real.ledger.let_go(claim, [file for file in claim.batch.files if file.file.path == THUMB], deleted=True)
    (real.root / THUMB).unlink()
    rclone_server.client().delete_object(Bucket=BUCKET, Key=THUMB)
    real.ledger.come_back(claim, real.clock.now() + 3601, "open")
    real.clock.advance(3602)

    clear(real, cleaner, real.claimed())

    assert ([], "done") == (real.files(), real.state())


def in_doubt(bench: Bench, content: bytes = b"an older cat") -> float:
    """Have a PUT of other content of the original's key in doubt; return since when."""
    bench.write(ORIGINAL, content)
    bench.offer()
    claim = bench.claimed()
    at: float = bench.clock.now()
    puts = bench.intended(claim)
    bench.ledger.answered([PutResult(put, Answer.DOUBT, doubt_at=at, error=StoreUnavailable("timeout")) for put in puts])
    bench.ledger.put_back(claim)
    return at


def test_rule_6_local_files_stay_until_an_older_doubt_is_over(real: Bench, rclone_server: RcloneServer) -> None:
    in_doubt(real)
    claim = uploaded(real, rclone_server, {"original/cat.jpg": b"a cat"})
    cleaner = real.cleaner(doubt_s=900.0)

    due = step(real, cleaner, claim)
    assert due is not None
    while_in_doubt = real.files()
    real.clock.advance(due.in_s)
    clear(real, cleaner, real.claimed())

    assert ("doubt", [ORIGINAL]) == (due.waiting_for, while_in_doubt)
    assert 890 < due.in_s <= 900
    assert ([], "done", {}) == (real.files(), real.state(), real.ledger.clearance(claim).doubts)


def test_rule_6_what_an_older_put_overwrote_after_all_is_put_again(real: Bench, rclone_server: RcloneServer) -> None:
    in_doubt(real)
    claim = uploaded(real, rclone_server, {"original/cat.jpg": b"a cat"})
    cleaner = real.cleaner(doubt_s=900.0)
    due = step(real, cleaner, claim)
    assert due is not None
    rclone_server.client().put_object(Bucket=BUCKET, Key=ORIGINAL, Body=b"an older cat")  # it lands
    real.clock.advance(due.in_s)
    claim = real.claimed()

    with pytest.raises(Missing) as caught:
        alone(cleaner.clear(claim))

    assert [ORIGINAL] == caught.value.keys
    assert [ORIGINAL] == real.files()


def test_rule_6_a_doubt_is_settled_also_where_local_files_stay(real: Bench, rclone_server: RcloneServer) -> None:
    """The batch was done at once, and the bucket ended with the older content."""
    in_doubt(real)
    claim = uploaded(real, rclone_server, {"original/cat.jpg": b"a cat"})
    cleaner = real.cleaner(deletes=False, doubt_s=900.0)
    due = alone(cleaner.clear(claim))
    rclone_server.client().put_object(Bucket=BUCKET, Key=ORIGINAL, Body=b"an older cat")  # it lands
    real.clock.advance(900)

    with pytest.raises(Missing) as caught:
        alone(cleaner.clear(claim))

    assert Due(900.0, "doubt") == due
    assert ([ORIGINAL], [ORIGINAL]) == (caught.value.keys, real.files())


def test_rule_6_local_files_that_stay_are_asked_about_no_more_once_a_doubt_is_settled(
    real: Bench, rclone_server: RcloneServer
) -> None:
    in_doubt(real)
    claim = uploaded(real, rclone_server, {"original/cat.jpg": b"a cat"})
    cleaner = real.cleaner(deletes=False, doubt_s=900.0, keep_for_s=10_000.0)
    alone(cleaner.clear(claim))
    real.clock.advance(900)

    settled = alone(cleaner.clear(claim))
    rclone_server.stop()

    assert [None, None] == [settled, alone(cleaner.clear(claim))]
    assert ({}, [ORIGINAL]) == (real.ledger.clearance(claim).doubts, real.files())


@pytest.mark.parametrize("jump_s", [4000.0, -4000.0])
def test_rule_6_a_wall_clock_that_jumps_neither_ends_a_doubt_nor_prolongs_it(
    real: Bench, rclone_server: RcloneServer, jump_s: float
) -> None:
    """A clock set forward by an hour let a file go whose key an older PUT could still change."""
    real.clock.advance(5000)
    in_doubt(real)
    claim = uploaded(real, rclone_server, {"original/cat.jpg": b"a cat"})
    cleaner = real.cleaner(doubt_s=900.0)
    alone(cleaner.clear(claim))
    real.clock.jump(jump_s)

    real.clock.advance(890)
    still = alone(cleaner.clear(claim))
    real.clock.advance(20)
    after = alone(cleaner.clear(claim))

    assert still is not None and ("doubt", True) == (still.waiting_for, 0 < still.in_s <= 10)
    assert after is not None and "doubt" != after.waiting_for


def test_rule_6_doubts_that_are_over_stay_so_while_the_store_does_not_answer(tmp_path: Path) -> None:
    """Of two keys, one began to wait anew whenever the other was looked at."""
    with Bench(tmp_path) as bench:
        for content in (b"an older cat", b"a cat"):
            claim = bench.batch_stored({path: content + path.encode() for path in CAT})
            bench.ledger.come_back(claim, bench.clock.now(), "doubt")
            with bench.ledger.write() as change:
                change.execute(text("UPDATE intent SET doubt_at = 1 WHERE batch_id = 1"))
        claim = bench.claimed()
        cleaner = bench.cleaner(doubt_s=900.0)
        first = alone(cleaner.clear(claim))

        for _ in range(5):
            bench.clock.advance(1000)
            with pytest.raises(StoreUnavailable):
                alone(cleaner.clear(claim))

    assert first is not None and "doubt" == first.waiting_for


def test_a_newer_version_that_is_live_is_not_let_go_by_an_older_claim(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    with bench.ledger.write() as change:
        change.execute(text("UPDATE object SET digest = 'of something newer'"))

    with pytest.raises(ClaimLost, match="a newer version of it is live"):
        alone(bench.cleaner().clear(claim))

    assert [ORIGINAL] == bench.files()


# Rule 10: directories


def pruned(bench: Bench, cleaner: Cleaner, claim: Claim) -> list[Due]:
    """Prune until there is nothing to wait for; return the waits."""
    waits: list[Due] = []
    for _ in range(20):
        due = cleaner.prune(claim)
        if due is None:
            return waits
        waits.append(due)
        bench.clock.advance(due.in_s)
    raise AssertionError(f"it never ends: {waits}")


def test_rule_10_empty_directories_go_up_to_the_attachments(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    clear(bench, bench.cleaner(), claim)

    pruned(bench, bench.cleaner(), claim)

    assert ["avatars/"] == bench.tree()


def test_rule_10_empty_directories_go_when_they_are_old_enough(bench: Bench) -> None:
    """Counted from their last change: an app's save fails in a directory that vanishes (FACTS 20)."""
    cleaner = bench.cleaner(keep_empty_dirs_for_s=30.0)
    claim = bench.batch_stored(CAT)
    clear(bench, bench.cleaner(), claim)

    first = cleaner.prune(claim)
    bench.clock.advance(29)
    still = cleaner.prune(claim)
    lies = bench.tree()
    bench.clock.advance(2)
    cleaner.prune(claim)

    assert Due(30.0, "dirs") == first
    assert still is not None and still.in_s <= 1.0
    assert ["avatars/", "avatars/42/", "avatars/42/original/", "avatars/42/thumb/"] == lies
    assert ["avatars/"] == bench.tree()


def test_rule_10_a_directory_that_the_app_changed_since_is_young_also_when_what_was_in_it_is_old(bench: Bench) -> None:
    cleaner = bench.cleaner(keep_empty_dirs_for_s=30.0)
    claim = bench.batch_stored(CAT)
    clear(bench, bench.cleaner(), claim)
    cleaner.prune(claim)
    bench.clock.advance(31)
    (bench.root / RECORD / "medium").mkdir()
    (bench.root / RECORD / "medium").rmdir()

    due = cleaner.prune(claim)

    assert Due(30.0, "dirs") == due
    assert ["avatars/", "avatars/42/"] == bench.tree()
    assert [30.0] == [due.in_s for due in pruned(bench, cleaner, claim)]
    assert ["avatars/"] == bench.tree()


def test_rule_10_a_directory_that_the_app_changes_at_the_last_moment_is_young(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Its age is from before we removed what was in it; that holds only if nobody but us has changed it since."""
    cleaner = bench.cleaner(keep_empty_dirs_for_s=30.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    clear(bench, bench.cleaner(), claim)
    cleaner.prune(claim)
    bench.clock.advance(31)
    real = Cleaner._prune_one

    def and_then_the_app(self: Cleaner, path: str, emptied: dict[str, tuple[Identity, float]]) -> float | None:
        wait = real(self, path, emptied)
        if path.endswith("/original"):
            (bench.root / RECORD / "medium").mkdir()
            (bench.root / RECORD / "medium").rmdir()
        return wait

    monkeypatch.setattr(Cleaner, "_prune_one", and_then_the_app)

    assert Due(30.0, "dirs") == cleaner.prune(claim)
    assert ["avatars/", "avatars/42/"] == bench.tree()


def test_rule_10_a_directory_that_the_app_made_anew_is_young(bench: Bench) -> None:
    cleaner = bench.cleaner(keep_empty_dirs_for_s=30.0)
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    clear(bench, bench.cleaner(), claim)
    cleaner.prune(claim)
    bench.clock.advance(31)
    (bench.root / RECORD / "original").rmdir()
    (bench.root / RECORD / "original").mkdir()

    due = cleaner.prune(claim)

    assert Due(30.0, "dirs") == due
    assert "avatars/42/original/" in bench.tree()


def test_rule_10_a_directory_that_is_made_anew_at_the_last_moment_stays(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    clear(bench, bench.cleaner(), claim)
    style = bench.root / RECORD / "original"

    def make_anew() -> None:
        style.rmdir()
        style.mkdir()

    bench.interruptions = [make_anew]
    bench.cleaner().prune(claim)

    assert style.is_dir()


def test_rule_10_a_file_that_comes_at_the_last_moment_keeps_its_directory(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    clear(bench, bench.cleaner(), claim)

    bench.interruptions = [lambda: bench.write(ORIGINAL, b"another cat")]
    pruned(bench, bench.cleaner(), claim)

    assert b"another cat" == bench.read(ORIGINAL)


@pytest.mark.parametrize("what", ["file", "directory", "link", "hidden file"])
def test_rule_10_a_directory_with_anything_in_it_stays(bench: Bench, what: str) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    clear(bench, bench.cleaner(), claim)
    inside = bench.root / RECORD / "original" / (".hidden" if what == "hidden file" else "inside")
    match what:
        case "file" | "hidden file":
            inside.write_bytes(b"")
        case "directory":
            inside.mkdir()
        case "link":
            inside.symlink_to("nothing")

    waits = pruned(bench, bench.cleaner(), claim)

    assert [] == waits
    assert os.path.lexists(inside)


def test_rule_10_directories_of_other_records_stay(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    (bench.root / "avatars/43/original").mkdir(parents=True)
    (bench.root / "avatars/42/large").mkdir()
    clear(bench, bench.cleaner(), claim)

    pruned(bench, bench.cleaner(), claim)

    assert ["avatars/", "avatars/42/", "avatars/42/large/", "avatars/43/", "avatars/43/original/"] == bench.tree()


@pytest.mark.parametrize(
    ("path", "record", "left"),
    [
        (":attachment/:id/:style/:filename", "avatars/42", ["avatars/"]),
        (":attachment/:id_partition/:style/:filename", "avatars/000/000/042", ["avatars/"]),
        (":class/:attachment/:id_partition/:style/:filename", "admin/users/avatars/000/000/042",
         ["admin/", "admin/users/", "admin/users/avatars/"]),
        ("system/:attachment/:id/:style/:filename", "system/avatars/42", ["system/", "system/avatars/"]),
        (":id/:style/:filename", "42", ["42/"]),
    ],
)  # fmt: skip
def test_rule_10_the_floor_follows_the_layout(tmp_path: Path, path: str, record: str, left: list[str]) -> None:
    with Bench(tmp_path, path=path, key=path) as bench:
        bench.write(f"{record}/original/cat.jpg")
        bench.offer(record)
        claim = bench.stored(bench.claimed())
        clear(bench, bench.cleaner(), claim)

        pruned(bench, bench.cleaner(), claim)

        assert left == bench.tree()


def test_rule_10_the_root_stays_even_if_somebody_else_removed_our_house(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    clear(bench, bench.cleaner(), claim)

    pruned(bench, bench.cleaner(), claim)

    assert bench.root.is_dir()


def test_rule_10_a_directory_that_may_not_be_removed_is_no_fault(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    clear(bench, bench.cleaner(), claim)
    (bench.root / RECORD).chmod(0o555)

    def work() -> None:
        assert [] == pruned(bench, bench.cleaner(), claim)

    in_a_world(work, without_root_powers)
    (bench.root / RECORD).chmod(0o755)


# Names in aside/

_paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)


def file_at(path: str, number: int = 7) -> BatchFile:
    file = dataclasses.replace(spooled(ORIGINAL), path=path)
    return BatchFile(number, file, False, None, None, False)


@given(batch=st.integers(1, 10**12), number=st.integers(1, 10**12), path=_paths)
def test_rule_9_a_name_tells_the_batch_the_file_and_where_it_lay(batch: int, number: int, path: str) -> None:
    name = aside_name(batch, file_at(path, number))

    assert len(os.fsencode(name)) <= 255
    assert "/" not in name
    parsed = parse_aside_name(name)
    assert parsed is not None
    assert (batch, number) == parsed[:2]
    assert parsed[2] in (path, None)


@pytest.mark.parametrize("path", ["a/" * 120 + "cat.jpg", "ü" * 100, "x" * 255])
def test_rule_9_where_it_lay_is_left_away_if_it_does_not_fit(path: str) -> None:
    name = aside_name(1, file_at(path))

    assert len(name) <= 255
    assert (1, 7, None) == parse_aside_name(name)


def test_rule_9_names_are_never_used_again() -> None:
    names = {aside_name(1, file_at(ORIGINAL)) for _ in range(1000)}

    assert 1000 == len(names)


@pytest.mark.parametrize("name", ["cat.jpg", "1", "1.2", "x.2.abc", "1.x.abc", ".1.2.abc", "²3.1.abc", ""])
def test_names_of_others_are_not_taken_for_ours(name: str) -> None:
    assert parse_aside_name(name) is None


@given(name=st.text(max_size=40))
def test_any_name_at_all_may_lie_there(name: str) -> None:
    parse_aside_name(name)


# After a crash: recover, before the first sweep


def recover(bench: Bench) -> list[MutableMapping[str, Any]]:
    """Start anew: whoever held claims is dead, and what lies aside is seen to."""
    for owner in bench.ledger.owners():
        bench.ledger.bereave(owner)
    with captured() as lines:
        bench.cleaner().recover("me", lease_s=LEASE_S)
    return lines


def walk_all(bench: Bench) -> None:
    cleaner = bench.cleaner()
    for _ in range(10):
        while (claim := bench.claim()) is not None:
            step(bench, cleaner, claim)
        bench.clock.advance(60)


class Killed(BaseException):
    """The process ends here."""


def kill() -> None:
    raise Killed


def test_rule_9_a_crash_before_the_rename_leaves_the_file_where_it_was(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    name = aside_name(claim.batch.id, claim.batch.files[0])
    bench.ledger.set_aside(claim, [dataclasses.replace(claim.batch.files[0], aside_name=name)])

    recover(bench)

    assert {ORIGINAL} == set(bench.ledger.known(NAME, RECORD).files)
    walk_all(bench)
    assert ([], [], "done") == (bench.files(), bench.aside(), bench.state())


def test_rule_9_a_crash_after_the_rename_lets_the_stored_file_go(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    step(bench, bench.cleaner(grace_s=10.0), claim)

    recover(bench)
    walk_all(bench)

    assert ([], [], "done") == (bench.files(), bench.aside(), bench.state())


def test_rule_9_a_crash_at_the_last_look_lets_the_stored_file_go(bench: Bench) -> None:
    cleaner = bench.cleaner()
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, cleaner, claim)
    bench.interruptions = [kill]
    with pytest.raises(Killed):
        alone(cleaner.clear(bench.claimed()))

    recover(bench)
    walk_all(bench)

    assert ([], [], "done") == (bench.files(), bench.aside(), bench.state())


def test_rule_9_a_crash_after_the_unlink_is_no_loss(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, bench.cleaner(grace_s=10.0), claim)
    bench.aside()[0].unlink()

    recover(bench)
    walk_all(bench)

    assert ([], "done") == (bench.files(), bench.state())


def test_rule_9_a_crash_while_giving_back_is_no_loss(bench: Bench) -> None:
    """The file is at its place again, the ledger believes it aside: it is somebody's new file then, and goes up again."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, bench.cleaner(grace_s=10.0), claim)
    bench.aside()[0].rename(bench.root / ORIGINAL)

    recover(bench)
    walk_all(bench)

    assert [ORIGINAL] == bench.files()
    assert {} == bench.ledger.known(NAME, RECORD).files


def test_rule_9_a_crash_between_link_and_unlink_leaves_two_names_and_loses_none(bench: Bench) -> None:
    """Where a filesystem cannot rename without overwriting (FACTS 18)."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    file = claim.batch.files[0]
    name = aside_name(claim.batch.id, file)
    bench.ledger.set_aside(claim, [dataclasses.replace(file, aside_name=name)])
    os.link(bench.root / ORIGINAL, bench.house / "aside" / name)

    recover(bench)
    walk_all(bench)

    assert ([ORIGINAL], []) == (bench.files(), bench.aside())
    assert b"a cat" == bench.read(ORIGINAL)


def test_rule_9_an_unlink_that_came_back_after_a_power_cut_is_repeated(bench: Bench) -> None:
    """Even of a batch that is done, and though a newer version lies in its place (FACTS 19)."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    cleaner = bench.cleaner(grace_s=10.0)
    step(bench, cleaner, claim)
    [lies] = bench.aside()
    bench.clock.advance(10)
    step(bench, cleaner, bench.claimed())
    bench.write(ORIGINAL, b"another cat")
    bench.offer()
    lies.write_bytes(b"a cat")

    recover(bench)
    done = bench.stored(bench.claimed())
    bench.ledger.come_back(done, bench.clock.now() + 10**6, "keep_for")
    walk_all(bench)

    assert [] == bench.aside()
    assert b"another cat" == bench.read(ORIGINAL)


def test_rule_9_what_was_written_while_it_lay_aside_comes_back(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, bench.cleaner(grace_s=10.0), claim)
    bench.aside()[0].write_bytes(b"A CAT")

    lines = recover(bench)

    assert b"A CAT" == bench.read(ORIGINAL)
    assert {} == bench.ledger.known(NAME, RECORD).files
    assert ["file.given_back"] == [line["event"] for line in lines]


def test_rule_9_a_file_of_a_batch_that_was_never_stored_comes_back(bench: Bench) -> None:
    """A power cut took the commit that stored it, or somebody restored an older ledger."""
    bench.write(ORIGINAL)
    bench.offer()
    claim = bench.claimed()
    name = aside_name(claim.batch.id, claim.batch.files[0])
    (bench.root / ORIGINAL).rename(bench.house / "aside" / name)

    recover(bench)

    assert ([ORIGINAL], []) == (bench.files(), bench.aside())


def test_rule_9_a_file_that_the_ledger_does_not_know_comes_back_by_its_name(bench: Bench) -> None:
    """The ledger was lost: what lies aside must not be."""
    bench.write(ORIGINAL)
    (bench.root / ORIGINAL).rename(bench.house / "aside" / aside_name(999, file_at(ORIGINAL)))

    lines = recover(bench)

    assert ([ORIGINAL], []) == (bench.files(), bench.aside())
    assert [("file.given_back", ORIGINAL)] == [(line["event"], line["path"]) for line in lines]


def test_rule_9_a_file_that_nobody_can_place_stays_and_is_reported(bench: Bench) -> None:
    """One with a name of ours moves to kept/: a ledger made anew would count to its batch some day."""
    names = [aside_name(999, file_at("x" * 300)), "README"]
    for name in names:
        (bench.house / "aside" / name).write_bytes(b"?")

    lines = recover(bench)

    assert [["README"], [names[0]]] == [[path.name for path in where()] for where in (bench.aside, bench.kept)]
    assert ["aside.unknown"] * 2 == [line["event"] for line in lines]


def test_rule_9_a_name_that_leads_out_of_the_spool_is_not_followed(bench: Bench) -> None:
    name = "999.1.0123456789ab.avatars%2F..%2F..%2Fescaped.jpg"
    (bench.house / "aside" / name).write_bytes(b"a cat")

    recover(bench)

    assert not (bench.directory / "escaped.jpg").exists()
    assert b"a cat" in everything(bench)


def test_rule_9_recovery_needs_the_records_claim(bench: Bench) -> None:
    """Another daemon is at it: what lies aside there is its business."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    step(bench, bench.cleaner(grace_s=10.0), claim)
    bench.aside()[0].write_bytes(b"A CAT")
    bench.clock.advance(10)
    bench.claimed("you")

    bench.cleaner().recover("me", lease_s=LEASE_S)

    assert ([], 1) == (bench.files(), len(bench.aside()))


def test_rule_9_recovery_gives_the_claims_back(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    step(bench, bench.cleaner(grace_s=10.0), claim)

    recover(bench)

    assert [] == bench.ledger.owners()


@pytest.mark.parametrize("oddity", ["directory", "link", "fifo", "unreadable", "unwritable place"])
def test_rule_9_one_thing_that_cannot_be_recovered_does_not_hold_up_the_rest(bench: Bench, oddity: str) -> None:
    """The daemon would not start for it. It is given back, too, if its place can be written."""
    odd = bench.batch_stored({"original/cat.jpg": b"a cat"}, record="avatars/1")
    step(bench, bench.cleaner(grace_s=10.0), odd)
    [first] = bench.aside()
    claim = bench.batch_stored({"original/cat.jpg": b"a dog"}, record="avatars/2")
    step(bench, bench.cleaner(grace_s=10.0), claim)
    [second] = [path for path in bench.aside() if path != first]
    second.write_bytes(b"A DOG")
    if oddity == "unwritable place":
        first.write_bytes(b"A CAT")
        (bench.root / "avatars/1/original").chmod(0o555)
    elif oddity == "unreadable":
        first.chmod(0)
    else:
        first.unlink()
        match oddity:
            case "directory":
                first.mkdir()
            case "link":
                first.symlink_to("/etc/passwd")
            case "fifo":
                os.mkfifo(first)

    in_a_world(lambda: recover(bench), without_root_powers)

    assert b"A DOG" == bench.read("avatars/2/original/cat.jpg")
    assert ([first] if oddity == "unwritable place" else []) == bench.aside()
    assert os.path.lexists(bench.root / "avatars/1/original/cat.jpg") == (oddity != "unwritable place")


def test_files_aside_come_back_where_the_configuration_now_lets_them_stay(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    step(bench, bench.cleaner(grace_s=10.0), claim)

    recover(bench)
    step(bench, bench.cleaner(deletes=False), bench.claimed())

    assert (sorted([ORIGINAL, THUMB]), [], "done") == (bench.files(), bench.aside(), bench.state())
    assert {ORIGINAL, THUMB} == set(bench.ledger.known(NAME, RECORD).files), "and they are not new to us"


# The Remover: rule 7


DOG = {"original/dog.jpg": b"a dog"}


def remover(bench: Bench, *, limit: int = 1000) -> Remover:
    return Remover(
        ledger=bench.ledger, stores={NAME: bench.store}, limits={NAME: limit}, owner="me", doubt_s=DOUBT_S,
        clock=bench.clock, demand_claim=bench.demand,
    )  # fmt: skip


def replaced(bench: Bench, server: RcloneServer, record: str = RECORD) -> None:
    """Have a cat replaced by a dog long enough ago that the cat's keys are due."""
    for files, gone in ((CAT, {}), (DOG, CAT)):
        for path in gone:
            (bench.root / record / path).unlink()
        claim = bench.batch_stored(files, record=record)
        bench.ledger.done(claim, None)
        for path, content in files.items():
            server.client().put_object(Bucket=BUCKET, Key=f"{record}/{path}", Body=content)
    bench.clock.advance(DAY_S + 1)


def test_rule_7_replaced_keys_are_deleted_and_nothing_else(real: Bench, rclone_server: RcloneServer) -> None:
    replaced(real, rclone_server)
    rclone_server.client().put_object(Bucket=BUCKET, Key=f"{RECORD}/original/foreign.jpg", Body=b"of somebody else")

    removed = remover(real).remove_due(lease_s=LEASE_S, held=set())

    assert 2 == removed
    assert {f"{RECORD}/original/dog.jpg", f"{RECORD}/original/foreign.jpg"} == set(rclone_server.objects(BUCKET))
    assert 0 == remover(real).remove_due(lease_s=LEASE_S, held=set())


def test_rule_11_replaced_keys_of_a_held_spool_wait(real: Bench, rclone_server: RcloneServer) -> None:
    replaced(real, rclone_server)

    assert 0 == remover(real).remove_due(lease_s=LEASE_S, held={NAME})
    assert 3 == len(rclone_server.objects(BUCKET))


def test_rule_7_a_record_that_somebody_is_at_is_left_to_them(real: Bench, rclone_server: RcloneServer) -> None:
    replaced(real, rclone_server)
    real.write(f"{RECORD}/retina/dog.jpg")
    real.offer()
    real.claimed("you")

    assert 0 == remover(real).remove_due(lease_s=LEASE_S, held=set())
    assert 3 == len(rclone_server.objects(BUCKET))


def test_the_fuse_blows_and_says_so_once_and_mends_itself_within_the_hour(real: Bench, rclone_server: RcloneServer) -> None:
    for number in range(3):
        replaced(real, rclone_server, f"avatars/{number}")
    remover_ = remover(real, limit=4)

    with captured() as lines:
        removed = [remover_.remove_due(lease_s=LEASE_S, held=set()) for _ in range(3)]
    real.clock.advance(3601)
    removed.append(remover_.remove_due(lease_s=LEASE_S, held=set()))

    assert [4, 0, 0, 2] == removed
    [line] = told(lines, "deletes.held_back")
    assert (2, NAME, "warning") == (line["files"], line["spool"], line["log_level"])
    assert "max_deletes_per_hour" in line["hint"]


def test_a_fuse_of_zero_deletes_nothing(real: Bench, rclone_server: RcloneServer) -> None:
    replaced(real, rclone_server)

    assert 0 == remover(real, limit=0).remove_due(lease_s=LEASE_S, held=set())
    assert 3 == len(rclone_server.objects(BUCKET))


def test_a_spool_whose_fuse_has_blown_does_not_hold_up_another_one(real: Bench, rclone_server: RcloneServer) -> None:
    """However long its list is."""
    replaced(real, rclone_server)
    with real.ledger.write() as change:
        change.execute(
            text(
                "INSERT INTO record (id, spool, path, attachment, record_id, version, fence, first_seen_at, updated_at) "
                "VALUES (77, 'other', 'logos/1', 'logos', '1', 1, 0, '', '')"
            )
        )
        for number in range(150):
            row = {"bucket": BUCKET, "key": f"logos/{number}"}
            change.execute(text("INSERT INTO replaced (bucket, key, record_key, due_at) VALUES (:bucket, :key, 77, 0)"), row)
    both = Remover(
        ledger=real.ledger, stores={NAME: real.store, "other": real.store}, limits={NAME: 1000, "other": 0}, owner="me",
        doubt_s=DOUBT_S, clock=real.clock, demand_claim=real.demand,
    )  # fmt: skip

    removed = both.remove_due(lease_s=LEASE_S, held=set())

    assert 2 == removed


@pytest.mark.parametrize("fault", ["lost answer", "403", "503"])
def test_a_deletion_that_fails_is_tried_again_later(tmp_path: Path, rclone_server: RcloneServer, fault: str) -> None:
    rclone_server.create_bucket(BUCKET)
    with FaultProxy(rclone_server.endpoint_url) as proxy, Bench(tmp_path, endpoint_url=proxy.endpoint_url) as bench:
        replaced(bench, rclone_server)
        code = {"403": "AccessDenied", "503": "SlowDown"}.get(fault, "")
        proxy.on("DELETE", "", LoseAnswer() if fault == "lost answer" else Reply(int(fault), error_body(code)))

        with captured() as lines:
            removed = remover(bench).remove_due(lease_s=LEASE_S, held=set())
        answers = {row["answer"] for row in bench.rows("SELECT answer FROM intent WHERE kind = 'delete'")}
        proxy.clear()
        too_early = remover(bench).remove_due(lease_s=LEASE_S, held=set())
        bench.clock.advance(600)
        later = remover(bench).remove_due(lease_s=LEASE_S, held=set())

        assert (0, 0, 2) == (removed, too_early, later)
        assert {"refused" if fault == "403" else "doubt"} == answers
        assert (2 if fault == "403" else 0) == len(told(lines, "delete.refused"))
        assert [] == bench.ledger.owners()


def test_who_was_frozen_deletes_nothing(real: Bench, rclone_server: RcloneServer) -> None:
    replaced(real, rclone_server)
    real.has_claims = False

    remover(real).remove_due(lease_s=LEASE_S, held=set())

    assert 3 == len(rclone_server.objects(BUCKET))


def test_rule_7_a_key_is_not_deleted_while_an_unanswered_put_may_still_bring_it_back(
    real: Bench, rclone_server: RcloneServer
) -> None:
    replaced(real, rclone_server)
    with real.ledger.write() as change:
        change.execute(text("UPDATE intent SET doubt_at = 1 WHERE key LIKE '%original/cat.jpg'"))
    ours = remover(real)

    at_once = ours.remove_due(lease_s=LEASE_S, held=set())
    real.clock.jump(DAY_S)
    in_doubt = ours.remove_due(lease_s=LEASE_S, held=set())
    real.clock.advance(DOUBT_S)
    later = ours.remove_due(lease_s=LEASE_S, held=set())

    assert (1, 0, 1) == (at_once, in_doubt, later)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ENOENT])
def test_aside_that_cannot_be_listed_at_a_start_holds_the_spool(bench: Bench, error: int) -> None:
    with Hand(Fail("os", 1, refuses(error), only=lambda op: op.name == "listdir")), pytest.raises(SpoolBroken):
        recover(bench)


def test_what_cannot_be_looked_for_at_a_start_holds_the_spool(bench: Bench) -> None:
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    bench.ledger.set_aside(claim, [dataclasses.replace(file, aside_name="1.1.x") for file in claim.batch.files])
    bench.ledger.put_back(claim)

    # The first four look at the ledger's own file, and its log, for the claim.
    with Hand(Fail("os", 5, refuses(errno.EIO), only=lambda op: op.name == "stat")), pytest.raises(SpoolBroken):
        recover(bench)
    recover(bench)

    assert [] == bench.ledger.all_aside(NAME)
    assert [] == bench.ledger.owners()


def test_without_leases_at_the_last_look_a_file_comes_back(bench: Bench) -> None:
    """It was set aside by a daemon that could take leases; one that cannot may not tell whether somebody writes."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    cleaner = bench.cleaner(grace_s=10.0)
    step(bench, cleaner, claim)
    bench.clock.advance(10)

    in_a_world(lambda: step(bench, cleaner, bench.claimed()), without_leases())

    assert (["avatars/42/original/cat.jpg"], []) == (bench.files(), bench.aside())


def test_a_rename_that_was_done_is_believed_whatever_close_says_then(bench: Bench) -> None:
    """It was taken for one that failed: the file lay aside, and nobody knew."""
    claim = bench.batch_stored({"original/cat.jpg": b"a cat"})
    is_after = iter([False] * 2)

    def closes_after_the_rename(op: Op) -> bool:
        return op.name == "close" and any(before.name == "renameat2" for before in hand.ops) and next(is_after, True)

    with Hand(Fail("os", 1, refuses(errno.EIO), only=closes_after_the_rename)) as hand:
        alone(bench.cleaner().clear(claim))
    bench.ledger.put_back(claim)
    alone(bench.cleaner().clear(bench.claimed()))

    assert ([], []) == (bench.files(), bench.aside())
