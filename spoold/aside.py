"""`.spoold/aside/`: where a file waits, out of the app's way, between being uploaded and being let go.

How it gets there and back without overwriting anything, and whether it is still what was stored. When that is done, and what
goes for good, is cleanup's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from contextlib import AbstractContextManager
from urllib.parse import quote, unquote

from spoold.errors import Changed, Refused, SpooldError, StillOpen, Vanished
from spoold.model import HOUSE, BatchFile, Identity
from spoold.renames import rename_noreplace
from spoold.spool import ASIDE, KEPT, Spool, is_open_for_writing, open_regular, shut

_CHUNK_BYTES = 1 << 20
_ASIDE = f"{HOUSE}/{ASIDE}"


class AsideDirectory:
    """The one of a spool. A file's `aside_name` says where it lies in here."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def directory(self) -> AbstractContextManager[int]:
        """Yield a descriptor of it."""
        return self._spool.directory(_ASIDE)

    def at_hand(self) -> AbstractContextManager[None]:
        """Keep it open in the block, as `Spool.at_hand` does."""
        return self._spool.at_hand(_ASIDE)

    def names(self) -> list[str]:
        """Return what lies in it, in order."""
        with self.directory() as fd:
            return sorted(os.listdir(fd))

    def take(self, file: BatchFile) -> bool:
        """Rename a file to its name in aside/; say whether it was there, and still the one that was stored.

        A newer version may have come since it was looked at, and its app may yet chmod it by name (FACTS 3). One that
        comes at this very moment is found out by `differs`.
        """
        assert file.aside_name is not None, "it has a name there"
        parent, leaf = os.path.split(file.file.path)
        try:
            with self._spool.directory(parent) as directory, self.directory() as aside:
                if Identity.of(os.stat(leaf, dir_fd=directory, follow_symlinks=False)) != file.file.identity:
                    return False
                rename_noreplace(leaf, file.aside_name, dir_fd=directory, to_dir_fd=aside)
        except (Vanished, FileNotFoundError):
            return False
        return True

    def differs(self, file: BatchFile, *, trusts: bool) -> str | None:
        """Say why what lies aside is not, for good, what was stored; None if it is. Raises Vanished.

        Lease, hash, lease: stat alone is fooled by writers that restore mtime and by mappings (FACTS 18).
        trusts: without leases where the kernel has none.
        """
        assert file.aside_name is not None, "it lies aside"
        try:
            with self.directory() as aside:
                fd = open_regular(aside, file.aside_name, file.file.path)
        except (Changed, Refused, StillOpen) as fault:  # it took the file's name in the moment before the rename
            return str(fault)
        try:
            before = os.fstat(fd)
            if why := _is_written(fd, trusts):
                return why
            if _sha256(fd) != file.digest:
                return "it is not what was stored"
            if Identity.of(before) != Identity.of(os.fstat(fd)):
                return "somebody opened it for writing"
            return _is_written(fd, trusts)
        finally:
            shut(fd)

    def put_back(self, path: str, name: str) -> bool:
        """Rename from aside to `path`; if that name is taken the newer file won, and ours goes to `kept/`. Say which.

        Directories on the way that were removed meanwhile are made again.
        """
        parent, leaf = os.path.split(path)
        with self.directory() as aside:
            for _ in range(10):
                try:
                    self._make_way(parent)
                    with self._spool.directory(parent) as directory:
                        rename_noreplace(name, leaf, dir_fd=aside, to_dir_fd=directory)
                        return True
                except FileExistsError:
                    break
                except (Vanished, FileNotFoundError):
                    continue  # somebody removes directories at this moment
        self.keep(name)
        return False

    def inode_of(self, name: str) -> int | None:
        """Return the inode of what lies in here under `name`; None if nothing does."""
        with contextlib.suppress(FileNotFoundError), self.directory() as aside:
            return os.stat(name, dir_fd=aside, follow_symlinks=False).st_ino
        return None

    def keep(self, name: str) -> None:
        with self.directory() as aside, self._spool.directory(f"{HOUSE}/{KEPT}") as kept:
            rename_noreplace(name, name, dir_fd=aside, to_dir_fd=kept)

    def _make_way(self, path: str) -> None:
        """Make the directories of `path` that are missing."""
        parts = path.split("/")
        for depth, part in enumerate(parts):
            with self._spool.directory("/".join(parts[:depth])) as fd, contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=fd)

    def digest_of(self, path: str) -> tuple[str, Identity] | None:
        """Return SHA-256, hex, and identity of the file at `path` below the spool's root; None if it does not hold still."""
        with contextlib.suppress(SpooldError), self._spool.directory(os.path.dirname(path)) as directory:
            fd = open_regular(directory, os.path.basename(path), path)
            try:
                before = Identity.of(os.fstat(fd))
                digest = _sha256(fd)
                if Identity.of(os.fstat(fd)) == before:
                    return digest, before
            finally:
                shut(fd)
        return None


def aside_name(batch: int, file: BatchFile) -> str:
    """Return a name never used before: batch, file, a nonce, and where the file lay, if that fits in 255 bytes."""
    stem = f"{batch}.{file.id}.{uuid.uuid4().hex[:12]}"
    full = f"{stem}.{quote(file.file.path, safe=' ')}"
    return full if len(full) <= 255 else stem


def parse_aside_name(name: str) -> tuple[int, int, str | None] | None:
    """Return the batch, the file's number and its path (None if it did not fit) of a name in aside/; None if it is not ours."""
    match = re.fullmatch(r"([0-9]{1,18})\.([0-9]{1,18})\.[^.]*(?:\.(.*))?", name, re.DOTALL)
    if match is None:
        return None
    return int(match[1]), int(match[2]), unquote(match[3]) if match[3] else None


def _is_written(fd: int, trusts: bool) -> str | None:
    is_open = is_open_for_writing(fd)
    if is_open is None and not trusts:
        return "the kernel cannot tell who has it open for writing"
    return "somebody opened it for writing" if is_open else None


def _sha256(fd: int) -> str:
    digest = hashlib.sha256()
    os.lseek(fd, 0, os.SEEK_SET)
    while chunk := os.read(fd, _CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
