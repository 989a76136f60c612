"""Looking at a spool without ever leaving it, and our house in it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from spoold.errors import BadPath, Changed, NoAccess, SpoolBroken, SpooldError, StillOpen, Vanished
from spoold.layout import Layout
from spoold.model import HOUSE, Identity, Oddity, SpooledFile
from spoold.spool import ASIDE, CANARY, KEPT, Spool, fault_of, is_open_for_writing, open_regular
from tests.hostile import Witness, bind, deep_tree
from tests.nth import Fail, Hand, refuses
from tests.parts import (
    NAME,
    PATH,
    RECORD,
    in_a_world,
    mount_tmpfs,
    until,
    with_own_mounts,
    without_leases,
    without_root_powers,
)

ROUNDS = 2000


def spool_at(root: Path, *, path: str = PATH, key: str = PATH, marker: str | None = None) -> Spool:
    return Spool(name=NAME, root=root, layout=Layout(path, key), marker=marker)


@pytest.fixture
def spool(spool_root: Path) -> Spool:
    return spool_at(spool_root)


def write(spool: Spool, path: str, content: bytes = b"a cat") -> Path:
    file = spool.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def seen(spool: Spool, path: str, record: str = RECORD) -> SpooledFile:
    """Return the file at `path` as a look finds it now."""
    return next(file for file in spool.look(record).files if file.path == path)


def found(spool: Spool) -> tuple[set[str], dict[str, str]]:
    """Return the records that a sweep finds, and what else it meets: path and reason."""
    everything = list(spool.records())
    oddities = {each.path: each.reason for each in everything if isinstance(each, Oddity)}
    return {each for each in everything if isinstance(each, str)}, oddities


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# Looking


def test_a_look_finds_a_records_files_with_what_their_paths_say(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg", b"a cat")
    thumb = write(spool, "avatars/42/thumb/cat.png", b"cat")
    write(spool, "avatars/43/original/dog.jpg")

    snapshot = spool.look(RECORD)

    assert ("avatars/42", "avatars", "42") == (snapshot.record, snapshot.attachment, snapshot.record_id)
    assert (None, (), False) == (snapshot.marker, snapshot.oddities, snapshot.hides)
    assert SpooledFile(
        "avatars/42/thumb/cat.png", "thumb", "cat", "cat.png", Identity.of(thumb.stat())
    ) == snapshot.files[1]  # fmt: skip
    assert ["original", "thumb"] == [file.style for file in snapshot.files]


@pytest.mark.parametrize("record", ["avatars/42", "avatars/43", "nothing/at/all"])
def test_a_look_at_what_is_not_there_finds_nothing(spool: Spool, record: str) -> None:
    (spool.root / "avatars/42/original").mkdir(parents=True)

    assert () == spool.look(record).files


def test_a_look_knows_the_marker_and_does_not_take_it_for_a_file(spool_root: Path) -> None:
    spool = spool_at(spool_root, marker=".done")
    write(spool, "avatars/42/original/cat.jpg")
    marker = write(spool, "avatars/42/.done", b"")

    snapshot = spool.look(RECORD)

    assert snapshot.marker is not None
    assert ("avatars/42/.done", Identity.of(marker.stat())) == (snapshot.marker.path, snapshot.marker.identity)
    assert ["avatars/42/original/cat.jpg"] == [file.path for file in snapshot.files]
    assert () == snapshot.oddities


def test_a_marker_that_is_a_link_declares_nothing(spool_root: Path) -> None:
    spool = spool_at(spool_root, marker=".done")
    write(spool, "avatars/42/original/cat.jpg")
    (spool.root / "avatars/42/.done").symlink_to("original/cat.jpg")

    assert spool.look(RECORD).marker is None


def test_what_does_not_fit_the_layout_is_odd_and_no_file_of_the_record(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg")
    write(spool, "avatars/42/note.txt")
    write(spool, "avatars/42/original/deeper/dog.jpg")

    snapshot = spool.look(RECORD)

    assert ["avatars/42/original/cat.jpg"] == [file.path for file in snapshot.files]
    assert {"avatars/42/note.txt", "avatars/42/original/deeper"} == {oddity.path for oddity in snapshot.oddities}


def test_a_sweep_finds_every_record_that_holds_a_file(spool: Spool) -> None:
    for number in range(3):
        write(spool, f"avatars/{number}/original/cat.jpg")
        write(spool, f"logos/{number}/thumb/cat.jpg")
    (spool.root / "avatars/empty/original").mkdir(parents=True)
    spool.move_in("ledger")

    records, oddities = found(spool)

    assert {f"{kind}/{number}" for kind in ("avatars", "logos") for number in range(3)} == records
    assert {} == oddities


def test_a_sweep_reports_what_cannot_belong_to_a_record(spool: Spool) -> None:
    write(spool, "robots.txt")
    write(spool, "avatars/index.html")
    write(spool, "avatars/42/original/deeper/still/cat.jpg")

    records, oddities = found(spool)

    assert set() == records
    assert {"robots.txt", "avatars/index.html", "avatars/42/original/deeper"} == set(oddities)


def test_a_sweep_may_be_of_one_directory_only(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg")
    write(spool, "logos/1/original/cat.jpg")

    assert ["logos/1"] == list(spool.records("logos"))
    assert [] == list(spool.records("not/there"))


def test_a_sweep_finds_records_of_partitioned_ids(spool_root: Path) -> None:
    spool = spool_at(spool_root, path=":attachment/:id_partition/:style/:filename", key=":attachment/:id/:style/:filename")
    write(spool, "avatars/000/000/042/original/cat.jpg")

    assert ({"avatars/000/000/042"}, {}) == found(spool)
    assert "42" == spool.look("avatars/000/000/042").record_id


def test_a_root_that_is_a_link_is_where_it_points_to(tmp_path: Path) -> None:
    """Capistrano's current/public/system."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "current").symlink_to("shared")

    spool = spool_at(tmp_path / "current")
    write(spool, "avatars/42/original/cat.jpg")

    assert tmp_path / "shared" == spool.root
    assert {RECORD} == found(spool)[0]


# Rule 12: what is none of our business


def make_odd(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "symbolic link":
            path.symlink_to("/etc/passwd")
        case "symbolic link to a directory":
            path.symlink_to("/etc")
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.fspath(path))
        case "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("may not make devices here")


@pytest.mark.parametrize("kind", ["symbolic link", "symbolic link to a directory", "FIFO", "socket", "device"])
@pytest.mark.parametrize("place", ["cat.jpg", "avatars/cat.jpg", "avatars/42/cat.jpg", "avatars/42/original/cat.jpg"])
def test_rule_12_links_and_special_files_are_odd_and_hold_up_nothing(spool: Spool, kind: str, place: str) -> None:
    write(spool, "avatars/42/original/dog.jpg")
    make_odd(spool.root / place, kind)

    records, oddities = found(spool)

    if place.startswith("avatars/42/"):
        oddities = {oddity.path: oddity.reason for oddity in spool.look(RECORD).oddities}
    assert {RECORD} == records
    assert {place} == set(oddities)
    assert kind.split(" to ")[0] in oddities[place]
    assert ["avatars/42/original/dog.jpg"] == [file.path for file in spool.look(RECORD).files]


@pytest.mark.parametrize("place", [b"\xff", b"avatars/\xff", b"avatars/42/\xff", b"avatars/42/original/\xff.jpg"])
def test_rule_12_names_that_are_no_utf_8_are_odd_and_hold_up_nothing(spool: Spool, place: bytes) -> None:
    write(spool, "avatars/42/original/dog.jpg")
    write(spool, os.fsdecode(place))

    records, swept = found(spool)

    odd = {**swept, **{oddity.path: oddity.reason for oddity in spool.look(RECORD).oddities}}
    assert {RECORD} == records
    assert {os.fsdecode(place): "its name is no UTF-8"} == odd
    assert ["avatars/42/original/dog.jpg"] == [file.path for file in spool.look(RECORD).files]


@pytest.mark.parametrize("name", ["-dash.jpg", "'quoted\".jpg", "a\tb.jpg", "a\nb.jpg", "Ünï code.jpg", "noext.", ".hidden"])
def test_names_may_be_odd_as_long_as_they_are_utf_8(spool: Spool, name: str) -> None:
    write(spool, f"avatars/42/original/{name}")
    spool = spool_at(spool.root, path=":attachment/:id/:style/:filename", key=":attachment/:id/:style/:filename")

    snapshot = spool.look(RECORD)

    assert ([name], ()) == ([file.filename for file in snapshot.files], snapshot.oddities)


@pytest.mark.parametrize("place", ["avatars", "avatars/42", "avatars/42/original"])
def test_rule_12_a_foreign_mount_is_not_entered(spool: Spool, place: str) -> None:
    write(spool, "logos/1/original/dog.jpg")
    (spool.root / place).mkdir(parents=True)

    def work() -> None:
        mount_tmpfs(spool.root / place)
        write(spool, "avatars/42/original/cat.jpg")

        records, oddities = found(spool)

        odd = {**oddities, **{oddity.path: oddity.reason for oddity in spool.look(RECORD).oddities}}
        assert {"logos/1"} == records
        assert "something else is mounted there" in odd[place]
        assert ((), True) == (spool.look(RECORD).files, spool.look(RECORD).hides)
        with pytest.raises(Vanished), spool.directory("avatars/42/original"):
            pass

    in_a_world(work, with_own_mounts)


@pytest.mark.parametrize("place", ["avatars", "avatars/42", "avatars/42/original"])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_rule_12_a_directory_that_may_not_be_read_holds_up_nothing(spool: Spool, place: str, mode: int) -> None:
    """A watcher that dies of it, and the daemon with it, would be an outage caused by one chmod."""
    write(spool, "avatars/42/original/cat.jpg")
    write(spool, "logos/1/original/dog.jpg")
    (spool.root / place).chmod(mode)

    def work() -> None:
        records, oddities = found(spool)
        snapshot = spool.look(RECORD)

        odd = {**oddities, **{oddity.path: oddity.reason for oddity in snapshot.oddities}}
        assert "logos/1" in records
        assert any("may not read it" in reason for reason in odd.values()), odd
        if (place, mode) == ("avatars", 0o111):  # whoever knows a name in it may go through
            assert ["avatars/42/original/cat.jpg"] == [file.path for file in snapshot.files]
        else:
            assert () == snapshot.files
            assert snapshot.hides, "what is not seen here need not be gone"
        list(spool.records(place))

    try:
        in_a_world(work, without_root_powers)
    finally:
        (spool.root / place).chmod(0o755)


def test_a_link_that_is_swapped_in_during_a_sweep_is_not_followed(spool: Spool, tmp_path: Path) -> None:
    """The listing said directory; by the time it is opened it is a link to a tree that looks just right."""
    write(spool, "avatars/42/original/cat.jpg")
    write(spool, "logos/42/original/cat.jpg")
    outside = tmp_path / "outside/42/original"
    outside.mkdir(parents=True)
    (outside / "secret.jpg").write_bytes(b"a secret")
    sweep = spool.records()
    first = next(sweep)
    assert isinstance(first, str)
    second = "logos" if first.startswith("avatars") else "avatars"

    (spool.root / second).rename(tmp_path / "moved")
    (spool.root / second).symlink_to(tmp_path / "outside")

    assert [] == [each for each in sweep if isinstance(each, str)]
    assert () == spool.look(f"{second}/42").files


def test_links_that_are_swapped_in_at_any_moment_are_never_followed(spool: Spool, tmp_path: Path) -> None:
    """Somebody changes a style's directory for a link to another place, and back, as fast as they can."""
    write(spool, "avatars/42/original/cat.jpg", b"a cat")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cat.jpg").write_bytes(b"a secret")
    style, real, link = spool.root / "avatars/42/original", tmp_path / "real", tmp_path / "link"
    link.symlink_to(outside)
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            style.rename(real), link.rename(style)
            style.rename(link), real.rename(style)

    swapping = threading.Thread(target=swap)
    swapping.start()
    contents = set()
    try:
        for _ in range(ROUNDS):
            for file in spool.look(RECORD).files:
                with suppress(Changed, Vanished), spool.opened(file) as fd:
                    contents.add(os.read(fd, 100))
    finally:
        is_over.set()
        swapping.join()

    assert {b"a cat"} == contents


def test_rule_12_what_is_mounted_there_of_the_same_filesystem_is_foreign_too(spool: Spool, tmp_path: Path) -> None:
    """A bind mount has the device's number of the spool: only its mount's number tells."""
    write(spool, "logos/1/original/dog.jpg")
    places = ["avatars/1", "avatars/2/original", "avatars/3/original/cat.jpg"]
    outside = tmp_path / "outside"
    for source in (outside / "1/original/cat.jpg", outside / "2/cat.jpg", outside / "3"):
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(b"theirs")
    for place in places[:2]:
        (spool.root / place).mkdir(parents=True)
    write(spool, places[2], b"")

    def work() -> None:
        for number, place in enumerate(places, 1):
            bind(outside / str(number), spool.root / place)
        with Witness(outside) as witness:
            records, oddities = found(spool)
            looks = [spool.look(f"avatars/{number}") for number in (1, 2, 3)]
            opened = witness.seen("opened", "accessed")

            odd = {**oddities, **{oddity.path: oddity.reason for look in looks for oddity in look.oddities}}
            assert dict.fromkeys(places, "something else is mounted there") == odd
            assert [(), (), ()] == [look.files for look in looks]
            assert all(look.hides for look in looks)
            assert {"logos/1", "avatars/3"} == records
            assert not opened
            with spool.directory("avatars/3/original") as directory, pytest.raises(Changed, match="mounted"):
                open_regular(directory, "cat.jpg", places[2])
            assert not witness.seen("opened", "accessed")

    in_a_world(work, with_own_mounts)


def test_a_tree_that_is_deeper_than_python_can_call_is_odd_and_holds_up_nothing(spool_root: Path) -> None:
    """With :class a record may lie at any depth; a descriptor for each level would run out as well."""
    layout = ":class/:attachment/:id/:style/:basename.:extension"
    spool = spool_at(spool_root, path=layout, key=layout)
    write(spool, "users/avatars/42/original/cat.jpg")

    with deep_tree(spool_root / "deep", 1200):
        records, oddities = found(spool)

    assert {"users/avatars/42"} == records
    assert ["it lies more than 64 directories deep"] == list(oddities.values())


@pytest.mark.parametrize("path", ["avatars/" + "x" * 300, "avatars/" + "x/" * 3000 + "x"])
def test_what_is_longer_than_a_name_may_be_is_not_there(spool: Spool, path: str) -> None:
    """A disk that is broken would be held: a person who asks for a long name must not do that."""
    assert () == spool.look(path).files
    assert spool.identity_of(path) is None


def test_what_events_tell_of_names_that_are_no_utf_8_is_not_swept(spool: Spool) -> None:
    write(spool, os.fsdecode(b"avatars/\xff/original/cat.jpg"))

    assert [] == list(spool.records(os.fsdecode(b"avatars/\xff")))


# Opening


def test_a_file_is_opened_as_it_was_looked_at(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg", b"a cat")

    with spool.opened(seen(spool, "avatars/42/original/cat.jpg")) as fd:
        content = os.read(fd, 100)

    assert b"a cat" == content


@pytest.mark.parametrize("how", ["written", "chmodded", "touched", "replaced", "a link", "a directory", "a FIFO"])
def test_a_file_that_is_not_what_was_looked_at_is_not_opened(spool: Spool, how: str) -> None:
    path = write(spool, "avatars/42/original/cat.jpg")
    file = seen(spool, "avatars/42/original/cat.jpg")
    match how:
        case "written":
            path.write_bytes(b"a bat")
        case "chmodded":
            path.chmod(0o600)
        case "touched":
            os.utime(path, (0, 0))
        case "replaced":
            os.replace(write(spool, "avatars/42/original/new.jpg"), path)
        case "a link":
            path.rename(spool.root / "aside.jpg")
            path.symlink_to(spool.root / "aside.jpg")
        case "a directory":
            path.unlink()
            path.mkdir()
        case "a FIFO":
            path.unlink()
            os.mkfifo(path)  # opening it without O_NONBLOCK would wait for a writer for ever

    with pytest.raises(Changed), spool.opened(file):
        pass


@pytest.mark.parametrize("how", ["file", "directory", "directory is a link", "directory is a file"])
def test_a_file_that_is_no_longer_there_is_vanished(spool: Spool, tmp_path: Path, how: str) -> None:
    path = write(spool, "avatars/42/original/cat.jpg")
    file = seen(spool, "avatars/42/original/cat.jpg")
    match how:
        case "file":
            path.unlink()
        case "directory":
            path.parent.rename(tmp_path / "elsewhere")
        case "directory is a link":  # to the very same file, even
            path.parent.rename(tmp_path / "elsewhere")
            path.parent.symlink_to(tmp_path / "elsewhere")
        case "directory is a file":
            path.parent.rename(tmp_path / "elsewhere")
            path.parent.write_bytes(b"")

    with pytest.raises(Vanished), spool.opened(file):
        pass


def test_what_is_swapped_in_between_look_and_open_is_not_opened(spool: Spool, tmp_path: Path) -> None:
    """What was looked at is what is opened: the FIFO never is, so nobody who waits at its other end is woken."""
    path = write(spool, "avatars/42/original/cat.jpg", b"a cat")
    fifo, other = tmp_path / "fifo", tmp_path / "other"
    os.mkfifo(fifo)
    os.link(path, tmp_path / "cat")
    other.write_bytes(b"other")
    is_over = threading.Event()

    def swap() -> None:
        for number in itertools.count():
            os.link((tmp_path / "cat", fifo, other)[number % 3], tmp_path / "next")
            os.replace(tmp_path / "next", path)
            if (tmp_path / "next").exists():  # both names were the same file's: replace did nothing
                (tmp_path / "next").unlink()
            if is_over.is_set():
                return

    swapping = threading.Thread(target=swap)
    swapping.start()
    outcomes = set()

    def look() -> bool:
        with opened(path.parent) as directory:
            try:
                fd = open_regular(directory, path.name, "avatars/42/original/cat.jpg")
            except Changed as why:
                outcomes.add(str(why).rpartition(": ")[2])
            else:
                assert stat.S_ISREG(os.fstat(fd).st_mode)
                outcomes.add(os.read(fd, 100).decode())
                os.close(fd)
        return len(outcomes) == 3

    with Witness(fifo) as witness:
        try:
            until(look, "every way in which this can end was seen")
            for _ in range(ROUNDS):
                look()
        finally:
            is_over.set()
            swapping.join()
        opens = witness.seen("opened", "accessed")

    assert {"a cat", "other", "it is no regular file any more"} == outcomes
    assert not opens


def test_a_file_that_a_lease_is_held_on_is_open(spool: Spool) -> None:
    """Anybody may take a lease on a file of their own, and file servers do: that must not look like a broken disk."""
    path = write(spool, "avatars/42/original/cat.jpg")
    file = seen(spool, "avatars/42/original/cat.jpg")

    with opened(path, os.O_RDWR) as holder:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(StillOpen, match="lease"), spool.opened(file):
            pass

    with spool.opened(file) as fd:
        assert b"a cat" == os.read(fd, 100)


def test_a_file_that_may_not_be_read_is_for_a_person(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg").chmod(0)
    file = seen(spool, "avatars/42/original/cat.jpg")

    def work() -> None:
        with pytest.raises(BadPath) as caught, spool.opened(file):
            pass
        assert "give the daemon's user access" in caught.value.hint

    in_a_world(work, without_root_powers)


def test_descriptors_are_closed_whatever_happens(spool: Spool, tmp_path: Path) -> None:
    write(spool, "avatars/42/original/cat.jpg")
    file = seen(spool, "avatars/42/original/cat.jpg")
    os.utime(spool.root / file.path, (0, 0))
    spool.move_in("ledger")
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(20):
        with pytest.raises(Changed), spool.opened(file):
            pass
        with pytest.raises(Vanished), spool.directory("avatars/42/thumb/x"):
            pass
        list(spool.records())
        spool.look(RECORD)
        spool.can_tell_writers()

    assert before == len(os.listdir("/proc/self/fd"))


def test_no_path_leads_out_of_the_root(spool: Spool) -> None:
    """Paths come from the ledger and from names in our house: whoever can write there may not send us elsewhere."""
    with pytest.raises(SpooldError), spool.directory("avatars/../.."):
        pass
    with pytest.raises(SpooldError), spool.directory(".."):
        pass


def test_an_identity_is_that_of_a_regular_file_or_none(spool: Spool) -> None:
    path = write(spool, "avatars/42/original/cat.jpg")
    (spool.root / "avatars/42/original/link.jpg").symlink_to(path)

    assert Identity.of(path.stat()) == spool.identity_of("avatars/42/original/cat.jpg")
    assert spool.identity_of("avatars/42/original/link.jpg") is None
    assert spool.identity_of("avatars/42/original") is None
    assert spool.identity_of("avatars/42/original/dog.jpg") is None
    assert spool.identity_of("not/there/at/all.jpg") is None


def test_directories_are_made_durable_up_to_the_root(spool: Spool) -> None:
    write(spool, "avatars/42/original/cat.jpg")

    spool.make_durable({"avatars/42/original", "avatars/42"})

    with pytest.raises(Vanished):
        spool.make_durable({"avatars/42/thumb"})


def test_a_root_that_is_a_link_is_followed_anew_when_it_is_asked_for(tmp_path: Path) -> None:
    """Capistrano gives `current` another target with each deployment."""
    for release in ("1", "2"):
        (tmp_path / release).mkdir()
    (tmp_path / "current").symlink_to("1")
    spool = spool_at(tmp_path / "current")
    first = spool.root_identity()
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(tmp_path / "current")

    before = spool.root_identity()
    spool.follow()

    assert first == before != spool.root_identity()
    assert (tmp_path / "2").resolve() == spool.root


def test_our_house_has_the_same_mark_wherever_its_root_is_and_another_one_in_another_root(tmp_path: Path) -> None:
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
    one, another = spool_at(tmp_path / "one"), spool_at(tmp_path / "another")
    for spool in (one, one, another):
        spool.move_in("a ledger")

    mark = one.house_mark()
    (tmp_path / "one").rename(tmp_path / "elsewhere")

    assert mark == spool_at(tmp_path / "elsewhere").house_mark() != another.house_mark()
    with pytest.raises(SpoolBroken):
        one.house_mark()


def test_a_sweep_tells_of_each_directory_that_it_walks(spool: Spool) -> None:
    for path in ("avatars/1/original", "avatars/2", ".spoold/aside"):
        (spool.root / path).mkdir(parents=True)
    met: dict[str, int] = {}

    list(spool.records(met=met.__setitem__))

    paths = ["", "avatars", "avatars/1", "avatars/1/original", "avatars/2"]
    assert {path: (spool.root / path).stat().st_ino for path in paths} == met


def test_a_directory_has_an_inode_while_it_is_there(spool: Spool) -> None:
    (spool.root / "avatars").mkdir()

    assert (spool.root / "avatars").stat().st_ino == spool.inode_of_directory("avatars")
    assert spool.inode_of_directory("photos") is None


def test_a_root_that_is_gone_is_said_with_the_remedy(tmp_path: Path) -> None:
    spool = spool_at(tmp_path / "nothing")

    for verb in (spool.root_identity, lambda: spool.look(RECORD), lambda: list(spool.records()), lambda: spool.move_in("x")):
        with pytest.raises(SpoolBroken) as caught:
            verb()
        assert f"mkdir -p {tmp_path / 'nothing'}" in caught.value.hint


def test_a_root_that_is_a_file_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(SpoolBroken) as caught:
        spool_at(tmp_path / "file").root_identity()

    assert "must be a directory" in caught.value.hint


def test_a_root_that_may_not_be_read_is_said_with_the_remedy(spool: Spool) -> None:
    spool.root.chmod(0)

    def work() -> None:
        with pytest.raises(SpoolBroken) as caught:
            spool.root_identity()
        assert "read, write and execute" in caught.value.hint

    in_a_world(work, without_root_powers)
    spool.root.chmod(0o755)


def test_another_root_at_the_same_place_has_another_identity(spool: Spool, tmp_path: Path) -> None:
    before = spool.root_identity()

    spool.root.rename(tmp_path / "old")
    spool.root.mkdir()

    assert before != spool.root_identity()


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (errno.ENOENT, Vanished), (errno.ENOTDIR, Vanished), (errno.ELOOP, Vanished), (errno.ESTALE, Vanished),
        (errno.ENAMETOOLONG, Vanished), (errno.EAGAIN, StillOpen),
        (errno.EACCES, NoAccess), (errno.EPERM, NoAccess), (errno.EXDEV, BadPath), (errno.EBUSY, BadPath),
        (errno.EIO, SpoolBroken), (errno.EROFS, SpoolBroken), (errno.ENOSPC, SpoolBroken), (errno.EDQUOT, SpoolBroken),
        (errno.EMFILE, SpoolBroken),
    ],
)  # fmt: skip
def test_what_the_disk_says_is_named_for_what_the_daemon_does_next(code: int, fault: type[SpooldError]) -> None:
    found = fault_of(OSError(code, os.strerror(code)), "open", "avatars/42")

    assert fault is type(found)
    assert str(found).startswith("open avatars/42: ")
    assert os.strerror(code) in str(found) or fault is StillOpen


def test_a_file_that_can_have_no_key_says_why(spool_root: Path) -> None:
    spool = spool_at(spool_root, key="x" * 1000 + "/" + PATH)
    write(spool, "avatars/42/original/cat.jpg")

    file = seen(spool, "avatars/42/original/cat.jpg")

    assert "over 1024" in str(spool.refusal(file))
    assert spool_at(spool_root).refusal(file) is None


# Our own house


def test_rule_9_the_house_is_ours_alone(spool: Spool) -> None:
    before = os.umask(0)
    try:
        spool.move_in("ledger-1")
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (spool.house, *spool.house.iterdir())}
    assert {HOUSE: 0o700, ASIDE: 0o700, KEPT: 0o700} == {name: modes[name] for name in (HOUSE, ASIDE, KEPT)}
    assert {HOUSE, ASIDE, KEPT, CANARY, "owner"} == set(modes)


def test_rule_9_moving_in_again_changes_nothing(spool: Spool) -> None:
    spool.move_in("ledger-1")
    (spool.house / ASIDE / "1.1.x").write_bytes(b"a cat")

    spool.move_in("ledger-1")

    assert ["1.1.x"] == os.listdir(spool.house / ASIDE)


@pytest.mark.parametrize("name", [HOUSE, f"{HOUSE}/{ASIDE}", f"{HOUSE}/{KEPT}", f"{HOUSE}/{CANARY}", f"{HOUSE}/owner"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO"])
def test_rule_9_nothing_is_written_or_read_where_something_has_our_houses_name(
    spool: Spool, tmp_path: Path, name: str, kind: str
) -> None:
    """Who may write into the root can put a link there before our first start, and we may be root."""
    outside = tmp_path / "outside"
    (outside / ASIDE).mkdir(parents=True)
    for victim in (CANARY, "owner", f"{ASIDE}/1.1.x"):
        (outside / victim).write_bytes(b"root:secret")
    path = spool.root / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    is_file = name.endswith((CANARY, "owner"))
    match kind:
        case "link":
            path.symlink_to(outside / path.name if is_file else outside)
        case "dangling link":
            path.symlink_to(outside / "new")
        case "FIFO":
            os.mkfifo(path)

    with Witness(outside) as witness:
        with pytest.raises(SpoolBroken) as caught:
            spool.move_in("ledger-1")
        with suppress(SpooldError, OSError):
            spool.sing()
        spool.can_tell_writers()

        witness.demand_untouched()
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)
    assert "move it away" in caught.value.hint
    assert not spool.is_at_home or path.name == "owner"
    path.unlink()
    spool.move_in("ledger-1")
    assert spool.is_at_home


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories to other users")
@pytest.mark.parametrize("name", [HOUSE, f"{HOUSE}/{ASIDE}", f"{HOUSE}/{KEPT}"])
def test_rule_9_a_house_of_somebody_else_is_not_moved_into(spool: Spool, name: str) -> None:
    """They could put anything there at any time, and take what we set aside."""
    spool.move_in("ledger-1")
    os.chown(spool.root / name, 65534, 65534)

    with pytest.raises(SpoolBroken, match="it belongs to user 65534, and the daemon runs as user 0"):
        spool.move_in("ledger-1")


def test_rule_9_a_house_that_others_may_look_into_is_made_private(spool: Spool) -> None:
    spool.house.mkdir(mode=0o777)
    (spool.house / ASIDE).mkdir()
    (spool.house / ASIDE).chmod(0o777)

    spool.move_in("ledger-1")

    assert [0o700, 0o700] == [stat.S_IMODE(path.stat().st_mode) for path in (spool.house, spool.house / ASIDE)]


def test_rule_9_a_house_that_something_is_mounted_on_is_not_moved_into(spool: Spool) -> None:
    spool.move_in("ledger-1")

    def work() -> None:
        mount_tmpfs(spool.house)
        with pytest.raises(SpoolBroken, match="something else is mounted there"):
            spool.move_in("ledger-1")

    in_a_world(work, with_own_mounts)


def test_singing_cuts_off_nothing(spool: Spool, tmp_path: Path) -> None:
    """Whatever file has the canary's name: one byte that is lost is one too many."""
    spool.move_in("ledger-1")
    (tmp_path / "theirs").write_bytes(b"theirs")
    (spool.house / CANARY).unlink()
    os.link(tmp_path / "theirs", spool.house / CANARY)

    spool.sing()

    assert b"theirs" == (tmp_path / "theirs").read_bytes()


def test_a_mark_that_is_no_ledgers_is_told_in_a_few_words(spool: Spool) -> None:
    spool.move_in("ledger-1")
    (spool.house / "owner").write_bytes(b"\xff\x1b[31m" * 1000)

    with pytest.raises(SpoolBroken) as caught:
        spool.move_in("ledger-1")

    assert len(str(caught.value)) < 2000


def test_rule_9_another_ledger_refuses_this_spool(spool: Spool) -> None:
    spool.move_in("ledger-1")

    with pytest.raises(SpoolBroken) as caught:
        spool.move_in("ledger-2")

    assert "belongs to ledger ledger-1, this is ledger ledger-2" in str(caught.value)
    assert f"remove {spool.house / 'owner'}" in caught.value.hint


_MOVE_IN = """
import sys
from pathlib import Path
from spoold.errors import SpoolBroken
from spoold.layout import Layout
from spoold.spool import Spool
spool = Spool(name="uploads", root=Path(sys.argv[1]), layout=Layout(sys.argv[3], sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
try:
    spool.move_in(sys.argv[2])
    print("mine", flush=True)
except SpoolBroken as why:
    print(why, flush=True)
"""


def test_rule_9_of_several_daemons_that_come_at_once_one_owns_the_spool(spool: Spool) -> None:
    commands = [[sys.executable, "-c", _MOVE_IN, str(spool.root), f"ledger-{number}", PATH] for number in range(4)]
    daemons = [subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for line in commands]
    for daemon in daemons:
        assert daemon.stdout is not None
        assert "ready\n" == daemon.stdout.readline()

    for daemon in daemons:
        assert daemon.stdin is not None
        daemon.stdin.write("\n")
        daemon.stdin.flush()
    said = [daemon.communicate(timeout=20)[0].strip() for daemon in daemons]

    owner = (spool.house / "owner").read_text().strip()
    assert [f"ledger-{number}" == owner for number in range(4)] == [line == "mine" for line in said]
    assert all(line == "mine" or f"belongs to ledger {owner}" in line for line in said)
    assert [] == [name for name in os.listdir(spool.house) if name.startswith("owner.")]


def test_rule_9_threads_of_one_daemon_may_move_in_at_once(tmp_path: Path) -> None:
    """When a root returns, the watcher moves in, and so does the probe of the hold."""
    spools = [spool_at(tmp_path / str(number)) for number in range(30)]
    with ThreadPoolExecutor(4) as threads:
        for spool in spools:
            spool.root.mkdir()
            together = threading.Barrier(4)

            def move_in(spool: Spool = spool, together: threading.Barrier = together) -> None:
                together.wait()
                spool.move_in("ledger-1")

            for done in [threads.submit(move_in) for _ in range(4)]:
                done.result()

    assert {"ledger-1\n"} == {(spool.house / "owner").read_text() for spool in spools}


def test_a_root_that_may_not_be_written_is_said_with_the_remedy(spool: Spool) -> None:
    spool.root.chmod(0o555)

    def work() -> None:
        with pytest.raises(SpoolBroken) as caught:
            spool.move_in("ledger-1")
        assert "needs read, write and execute" in caught.value.hint

    in_a_world(work, without_root_powers)
    spool.root.chmod(0o755)


def test_a_full_disk_is_no_reason_to_crash(spool: Spool) -> None:
    """On one that is full already, the house cannot be made; once there is room again, it can."""

    def work() -> None:
        mount_tmpfs(spool.root, "size=64k,nr_inodes=3")

        with pytest.raises(SpoolBroken) as caught:
            spool.move_in("ledger-1")
        assert "No space left" in str(caught.value)

    in_a_world(work, with_own_mounts)


def test_the_canary_sings(spool: Spool) -> None:
    spool.move_in("ledger-1")
    before = (spool.house / CANARY).stat().st_mtime_ns

    spool.sing()

    assert before < (spool.house / CANARY).stat().st_mtime_ns


# Who writes


def test_it_is_found_out_whether_the_kernel_can_tell_writers(spool: Spool) -> None:
    spool.move_in("ledger-1")
    before = sorted(os.listdir(spool.house))

    assert spool.can_tell_writers()
    assert not in_a_world(spool.can_tell_writers, without_leases())
    assert before == sorted(os.listdir(spool.house))


def test_a_house_that_cannot_be_written_tells_no_writers(spool: Spool) -> None:
    assert not spool.can_tell_writers()


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_a_writer_is_seen_until_it_closes(tmp_path: Path, flags: int) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")

    with opened(path) as fd:
        with opened(path, flags):
            while_open = is_open_for_writing(fd)

        assert while_open is True
        assert is_open_for_writing(fd) is False


def test_a_reader_is_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")

    with opened(path) as fd, opened(path):
        assert is_open_for_writing(fd) is False


def test_a_writer_by_another_hard_link_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    os.link(path, tmp_path / "link")

    with opened(path) as fd, opened(tmp_path / "link", os.O_WRONLY):
        assert is_open_for_writing(fd) is True


def test_a_writer_who_came_before_a_rename_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")

    with opened(path, os.O_WRONLY):
        path.rename(tmp_path / "aside")
        with opened(tmp_path / "aside") as fd:
            assert is_open_for_writing(fd) is True


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """Map a file for writing, with no descriptor of it left: Python's own mmap keeps one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with opened(path, os.O_RDWR) as fd:
        address = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    try:
        yield
    finally:
        libc.munmap(ctypes.c_void_p(address), 4096)


def test_a_writer_who_only_has_a_mapping_left_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat" * 1000)

    with opened(path) as fd:
        with mapped(path):
            while_mapped = is_open_for_writing(fd)

        assert while_mapped is True
        assert is_open_for_writing(fd) is False


def test_where_the_kernel_has_no_leases_nobody_can_tell(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")

    def ask() -> bool | None:
        with opened(path) as fd, opened(path, os.O_WRONLY):
            return is_open_for_writing(fd)

    assert in_a_world(ask, without_leases()) is None


def test_a_lease_is_given_back_at_once_so_that_no_writer_waits(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    assert signal.SIG_IGN == signal.getsignal(signal.SIGIO), "else a writer's open would end this process"

    with opened(path) as fd:
        is_open_for_writing(fd)
        writer = threading.Thread(target=path.write_bytes, args=(b"a bat",), daemon=True)
        writer.start()

        until(lambda: not writer.is_alive(), "the writer got in", timeout_s=5)


def test_that_the_kernel_could_not_tell_once_is_an_error_and_no_answer(tmp_path: Path) -> None:
    """Out of memory, or interrupted: it was taken for a filesystem without leases, and the file stayed for ever."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    with path.open("rb") as file, Hand(Fail("os", 1, refuses(errno.ENOMEM))), pytest.raises(OSError, match="memory"):
        is_open_for_writing(file.fileno())


def test_a_lease_that_cannot_be_given_back_goes_with_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    with path.open("rb") as file, Hand(Fail("os", 2, refuses(errno.EIO))):
        assert is_open_for_writing(file.fileno()) is False
    with path.open("r+b", buffering=0) as writer:
        writer.write(b"A")


def test_a_directory_is_closed_once_whatever_close_says(spool: Spool) -> None:
    """Closed twice, the second may be of another thread's file."""
    (spool.root / "avatars/42").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))

    for number in range(1, 5):
        with (
            Hand(Fail("os", number, refuses(errno.EIO), only=lambda op: op.name == "close")),
            spool.directory("avatars/42") as fd,
        ):
            assert os.path.samestat(os.fstat(fd), os.stat(spool.root / "avatars/42"))

    assert before == len(os.listdir("/proc/self/fd"))
