"""The file that a SQLite ledger lies in: whether it is still the one that was opened, and how it is put back.

A database file that is unlinked or replaced under a process swallows its writes without a word (FACTS 28). Whoever still
has it open has all of it, though, and can put it back. What cannot be read any more is kept under another name, and its
number beside it tells that a ledger was lost: `rebuild` makes it anew from the spools and the buckets.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

_RESERVE_BYTES = 8 << 20
_WITH_IT = ("", "-wal", "-shm")
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Damaged(sqlite3.DatabaseError):
    """What is still open is no sound database either."""


class LedgerFile:
    """One SQLite database as a file, with the write-ahead log that belongs to it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._open: tuple[int, ...] | None = None

    def exists(self) -> bool:
        return self.path.exists()

    # Is it still the one?

    def opened(self) -> None:
        """What lies there now is what was opened."""
        self._open = self._inodes()

    def is_same(self) -> bool:
        """Say whether what was opened still lies there, the write-ahead log too. Raises OSError if that cannot be told.

        Asked twice if it seems not to: to put it back means that whoever reads it has to open it anew.
        """
        return self._inodes() == self._open or self._inodes() == self._open

    def _inodes(self) -> tuple[int, ...] | None:
        try:
            return tuple(os.stat(f"{self.path}{suffix}").st_ino for suffix in ("", "-wal"))
        except FileNotFoundError:
            return None  # of a disk that fails nobody knows whether the file is gone

    # Which ledger lay here

    @property
    def known_id(self) -> str | None:
        """The ledger's id as it is written beside it; None if nothing ever lay here."""
        with contextlib.suppress(OSError):
            return self._note.read_text().strip() or None
        return None

    def note_id(self, identifier: str) -> None:
        """Write the ledger's id beside it: should the ledger be lost, its spools are still its own."""
        if self.known_id == identifier:
            return
        draft = Path(f"{self._note}.{os.getpid()}")
        with open(draft, "w") as file:
            file.write(identifier + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, self._note)
        self._make_names_durable()

    @property
    def _note(self) -> Path:
        return Path(f"{self.path}.id")

    # Putting back and setting aside

    def put_back(self, connection: sqlite3.Connection) -> Path | None:
        """Write what an open connection still has to where it was opened; return where what lay there is now, if anything did.

        connection: idle, while another holds a write transaction, so that no other process writes to the old file any more.
        Raises Damaged if what it has is, OSError and sqlite3.Error if there is no room for it.
        """
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        draft = Path(f"{self.path}.draft.{os.getpid()}")
        try:
            with contextlib.closing(sqlite3.connect(draft)) as copy:
                connection.backup(copy)
                if copy.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise Damaged("what the daemon has open is damaged too")
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            found = self.set_aside("found")  # a log that is left behind would be read into the new file
            os.rename(draft, self.path)
        finally:
            for suffix in ("", "-journal", "-wal", "-shm"):
                Path(f"{draft}{suffix}").unlink(missing_ok=True)
        self._make_names_durable()
        return found

    def set_aside(self, why: str) -> Path | None:
        """Rename what lies here, its log first, and return its new name; None if there was nothing."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = next(
            name for n in range(1000) if not (name := Path(f"{self.path}.{why}-{stamp}{f'-{n}' if n else ''}")).exists()
        )
        for suffix in reversed(_WITH_IT):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        self._make_names_durable()
        return aside if aside.exists() else None

    def is_as_new_as(self, connection: sqlite3.Connection, identifier: str) -> bool:
        """Say whether what lies here is this ledger too, and nothing is missing in it that the connection has."""
        newest = "SELECT coalesce(max(id), 0) FROM history"
        try:
            if self._open is not None and os.stat(f"{self.path}-wal").st_ino == self._open[1]:
                return False  # a file that was laid beside our own log: SQLite would mix the two
        except FileNotFoundError:
            pass
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=10)) as there:
                if there.execute("SELECT value FROM about WHERE name = 'ledger'").fetchone() != (identifier,):
                    return False
                return bool(there.execute(newest).fetchone()[0] >= connection.execute(newest).fetchone()[0])
        except sqlite3.Error:
            return False

    def _make_names_durable(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def is_damage(error: BaseException | None) -> bool:
    """Say whether SQLite cannot make sense of its file any more."""
    return isinstance(error, Damaged) or (
        isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
    )


def keep_reserve(connection: sqlite3.Connection) -> None:
    """See to it that the ledger can go on for a while on a full disk: with free pages in it, and a log that is long enough.

    connection: outside of a transaction. Raises sqlite3.Error where there is no room for the reserve.
    """
    free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    page = connection.execute("PRAGMA page_size").fetchone()[0]
    if free * page >= _RESERVE_BYTES / 2:
        return
    # Random, so that no filesystem makes a hole of it. Dropped in a transaction of its own: only pages that were written
    # once are there for good.
    connection.execute("CREATE TABLE IF NOT EXISTS reserve AS SELECT randomblob(?) AS bytes", (_RESERVE_BYTES,))
    connection.execute("DROP TABLE reserve")
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
