"""What lies below a directory is opened past no link and no mount, whether the kernel has one call for it or not."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from spoold import beneath, spool
from spoold.beneath import open_beneath
from spoold.spool import open_inside
from tests.parts import in_a_world, with_own_mounts

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NAME = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@pytest.fixture(params=["openat2", "step by step"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "openat2":
        monkeypatch.setattr(spool, "open_beneath", lambda *_: None)
    return str(request.param)


@pytest.fixture
def outer(tmp_path: Path) -> int:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(b"a cat")
    (tmp_path / "elsewhere/c").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to("b")
    (tmp_path / "a/out").symlink_to(tmp_path / "elsewhere")
    return os.open(tmp_path, DIRECTORY)


def opened(outer: int, path: str, flags: int = DIRECTORY) -> int | str:
    """Return the inode of what was opened, or the name of the error; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    try:
        fd = open_inside(outer, path, flags)
    except OSError as error:
        found: int | str = errno.errorcode[error.errno or 0]
    else:
        found = os.fstat(fd).st_ino
        os.close(fd)
    assert before == len(os.listdir("/proc/self/fd"))
    return found


def test_what_is_there_is_opened(kernel: str, outer: int, tmp_path: Path) -> None:
    for path in ("a", "a/b", "a/b/c", "a//b/c/"):
        assert (tmp_path / path).stat().st_ino == opened(outer, path)
    assert (tmp_path / "a/b/file").stat().st_ino == opened(outer, "a/b/file", NAME)


@pytest.mark.parametrize(
    ("path", "errors"),
    [
        ("nothing", {"ENOENT"}), ("a/nothing/c", {"ENOENT"}), ("a/b/file", {"ENOTDIR"}), ("a/b/file/c", {"ENOTDIR"}),
        ("a/link", {"ELOOP", "ENOTDIR"}), ("a/link/c", {"ELOOP", "ENOTDIR"}), ("a/out/c", {"ELOOP", "ENOTDIR"}),
        ("a/" + "n" * 256, {"ENAMETOOLONG"}),
    ],
)  # fmt: skip
def test_what_is_a_link_or_not_there_is_not(kernel: str, outer: int, path: str, errors: set[str]) -> None:
    assert opened(outer, path) in errors


def test_the_name_of_a_link_can_be_had_but_not_what_it_leads_to(kernel: str, outer: int, tmp_path: Path) -> None:
    assert (tmp_path / "a/link").lstat().st_ino == opened(outer, "a/link", NAME)


def test_what_is_mounted_there_is_not_opened(kernel: str, tmp_path: Path) -> None:
    """Not even from the same filesystem, where the device's number tells nothing; nor a file over a file."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "other/c").mkdir(parents=True)
    (tmp_path / "other/file").touch()

    def work() -> list[int | str]:
        for source, target in (("other", "a/b"), ("other/file", "a/file")):
            subprocess.run(["mount", "--bind", str(tmp_path / source), str(tmp_path / target)], check=True)
        outer = os.open(tmp_path, DIRECTORY)
        return [opened(outer, "a/b"), opened(outer, "a/b/c"), opened(outer, "a/file", NAME), opened(outer, "a") != "EXDEV"]

    assert ["EXDEV", "EXDEV", "EXDEV", True] == in_a_world(work, with_own_mounts)


def test_a_kernel_without_it_is_asked_once(outer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Old:
        def syscall(self, *arguments: object) -> int:
            asked.append(arguments)
            return -1

    beneath._is_there.cache_clear()
    monkeypatch.setattr(beneath, "_libc", Old())
    try:
        assert [None, None] == [open_beneath(outer, "a", DIRECTORY) for _ in range(2)]
    finally:
        beneath._is_there.cache_clear()
    assert 1 == len(asked)
