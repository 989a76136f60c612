"""A rename that never overwrites, on filesystems that can and on those that cannot."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spoold.renames import rename_noreplace
from tests.parts import in_a_world, without

World = Callable[[Callable[[], None]], None]


@pytest.fixture(params=["renameat2", "EINVAL", "ENOSYS"])
def world(request: pytest.FixtureRequest) -> World:
    """Runs a function where the kernel has the flag, or the filesystem or the kernel refuses it."""
    if request.param == "renameat2":
        return lambda work: work()
    change = without("renameat2", getattr(errno, request.param))
    return lambda work: in_a_world(work, change)


@contextmanager
def directories(tmp_path: Path) -> Iterator[tuple[int, int]]:
    fds = []
    for name in ("from", "to"):
        (tmp_path / name).mkdir(exist_ok=True)
        fds.append(os.open(tmp_path / name, os.O_RDONLY | os.O_DIRECTORY))
    try:
        yield fds[0], fds[1]
    finally:
        for fd in fds:
            os.close(fd)


def rename(tmp_path: Path, name: str = "cat.jpg", to_name: str = "bat.jpg") -> None:
    with directories(tmp_path) as (source, target):
        rename_noreplace(name, to_name, dir_fd=source, to_dir_fd=target)


def write(tmp_path: Path, path: str, content: bytes) -> Path:
    with directories(tmp_path):
        (tmp_path / path).write_bytes(content)
    return tmp_path / path


def test_a_file_gets_its_new_name_and_loses_the_old_one(tmp_path: Path, world: World) -> None:
    old = write(tmp_path, "from/cat.jpg", b"a cat")
    inode = old.stat().st_ino

    world(lambda: rename(tmp_path))

    new = tmp_path / "to/bat.jpg"
    assert (b"a cat", inode, 1) == (new.read_bytes(), new.stat().st_ino, new.stat().st_nlink)
    assert not old.exists()


@pytest.mark.parametrize("taken_by", ["file", "directory", "link", "dangling link", "fifo", "itself"])
def test_a_name_that_is_taken_stays_as_it_is(tmp_path: Path, world: World, taken_by: str) -> None:
    old = write(tmp_path, "from/cat.jpg", b"a cat")
    new = tmp_path / "to/bat.jpg"
    match taken_by:
        case "file":
            new.write_bytes(b"a bat")
        case "directory":
            new.mkdir()
        case "link":
            new.symlink_to(old)
        case "dangling link":
            new.symlink_to("nothing")
        case "fifo":
            os.mkfifo(new)
        case "itself":
            new.hardlink_to(old)  # plain rename(2) would do nothing and say that it went well
    before = new.lstat()

    with pytest.raises(FileExistsError):
        world(lambda: rename(tmp_path))

    assert b"a cat" == old.read_bytes()
    assert before.st_ino == new.lstat().st_ino


def test_a_file_that_is_not_there_cannot_be_renamed(tmp_path: Path, world: World) -> None:
    with pytest.raises(FileNotFoundError):
        world(lambda: rename(tmp_path, "nothing"))


def test_a_link_is_renamed_and_what_it_points_to_stays(tmp_path: Path, world: World) -> None:
    target = write(tmp_path, "cat.jpg", b"a cat")
    (tmp_path / "from/cat.jpg").symlink_to(target)

    world(lambda: rename(tmp_path))

    assert (tmp_path / "to/bat.jpg").is_symlink()
    assert b"a cat" == target.read_bytes()


def test_names_may_be_as_odd_as_linux_allows(tmp_path: Path, world: World) -> None:
    for name in map(os.fsdecode, (b"\xff\xfe", "Ünï\tcode\n'\"".encode(), b"-rf", b"." * 3, b"x" * 255)):
        write(tmp_path, f"from/{name}", b"a cat")

        world(functools.partial(rename, tmp_path, name, name))

        assert b"a cat" == (tmp_path / "to" / name).read_bytes()


def test_other_faults_are_as_rename_tells_them(tmp_path: Path) -> None:
    write(tmp_path, "from/cat.jpg", b"a cat")

    with pytest.raises(OSError, match="too long") as caught:
        rename(tmp_path, to_name="x" * 256)

    assert errno.ENAMETOOLONG == caught.value.errno
