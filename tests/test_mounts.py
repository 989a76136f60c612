"""Which mount a file lies on, also where the device's number is the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spoold.mounts import mount_of
from tests.hostile import bind
from tests.parts import in_a_world, mount_tmpfs, with_own_mounts


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_what_lies_in_a_directory_lies_on_its_mount(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc")

    with opened(tmp_path) as directory, opened(tmp_path / "file") as file:
        assert mount_of(directory) is not None
        assert {mount_of(directory)} == {mount_of(file), mount_of(directory, "file"), mount_of(directory, "link")}


@pytest.mark.parametrize("kind", ["tmpfs", "bind", "file"])
def test_what_is_mounted_there_lies_on_another_mount(tmp_path: Path, kind: str) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.jpg").touch()

    def work() -> None:
        name = "here.jpg" if kind == "file" else "here"
        match kind:
            case "tmpfs":
                mount_tmpfs(tmp_path / name)
            case "bind":
                bind(tmp_path / "there", tmp_path / name)
            case "file":
                bind(tmp_path / "there.jpg", tmp_path / name)
        with opened(tmp_path) as directory, opened(tmp_path / name) as inner:
            assert mount_of(directory) != mount_of(inner) == mount_of(directory, name)

    in_a_world(work, with_own_mounts)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path) as directory, pytest.raises(FileNotFoundError) as caught:
        mount_of(directory, "nothing")

    assert errno.ENOENT == caught.value.errno
