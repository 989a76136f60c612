"""The n-th operation fails, or the process dies at it: a hand between spoold and what it stands on.

After SQLite's way of testing: one operation of a whole run fails, n = 1, 2, …, until a run passes in which nothing failed.

    hand = Hand(Fail("os", 17, lambda op: OSError(errno.EIO, os.strerror(errno.EIO))))
    with hand:
        …                      # what spoold does here, in this thread, meets the hand at its 17th call to the OS

Counted is what spoold's own code does: a caller that is none of its modules is let through. An operation is a call to
the OS, a statement or COMMIT of the ledger, or a request to S3; an effect is one of them that changes something.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, Self
from unittest import mock

import sqlalchemy
from botocore.httpsession import URLLib3Session
from sqlalchemy.engine import Engine

from spoold import beneath, renames

Layer = Literal["os", "ledger", "s3"]
Moment = Literal["before", "after"]

_CREATES = os.O_CREAT | os.O_TRUNC
_LOOKS = ("stat", "lstat", "fstat", "listdir", "read", "pread", "lseek")
_CHANGES = ("fsync", "fdatasync", "rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "utime", "chmod", "write")
_BETWEEN = {"os", "pathlib", "posixpath", "genericpath", "contextlib", "shutil", "io"}
"""Modules of the standard library that spoold calls the OS by."""


class Killed(BaseException):
    """The process is dead: whatever it still does on its way out does not happen."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: its number among those of its layer, what it is, and whether it changes anything."""

    layer: Layer
    number: int
    name: str
    is_effect: bool


class Plan(Protocol):
    """Decides what happens to an operation."""

    def before(self, op: Op) -> None:
        """Raise what comes in its place."""

    def after(self, op: Op) -> None:
        """Raise what comes although it was carried out."""


class Nothing:
    """Every operation passes."""

    def before(self, op: Op) -> None: ...

    def after(self, op: Op) -> None: ...


class Fail(Nothing):
    """The n-th operation of a layer fails, before it is carried out or although it was.

    only: what is counted; by default all of the layer. lasts: asked of each later one: does it fail too?
    """

    def __init__(
        self, layer: Layer, number: int, error: Callable[[Op], BaseException], *, moment: Moment = "before",
        only: Callable[[Op], bool] = lambda op: True, lasts: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._layer = layer
        self._number = number
        self._error = error
        self._moment = moment
        self._only = only
        self.lasts = lasts
        self._met = 0
        self.hit: Op | None = None

    def before(self, op: Op) -> None:
        self._meet(op, "before")

    def after(self, op: Op) -> None:
        self._meet(op, "after")

    def _meet(self, op: Op, moment: Moment) -> None:
        if op.layer != self._layer or moment != self._moment or not self._only(op):
            return
        if self.hit is not None:
            if self.lasts():
                raise self._error(op)
            return
        self._met += 1
        if self._met == self._number:
            self.hit = op
            raise self._error(op)


class Kill(Nothing):
    """The process dies at effects: at the first number's, then at the second number's after that, and so on.

    numbers: 2n is before the n-th effect, 2n + 1 after it. really: with SIGKILL.
    """

    def __init__(self, *numbers: int, really: bool = False) -> None:
        self._left = list(numbers)
        self._moment = 0
        self._really = really
        self.hits: list[tuple[Op, Moment]] = []

    @property
    def is_to_come(self) -> bool:
        return bool(self._left)

    def before(self, op: Op) -> None:
        self._meet(op, "before")

    def after(self, op: Op) -> None:
        self._meet(op, "after")

    def _meet(self, op: Op, moment: Moment) -> None:
        if not op.is_effect or not self._left:
            return
        number, self._moment = self._moment, self._moment + 1
        if number == self._left[0]:
            self._left.pop(0)
            self._moment = 0
            self.hits.append((op, moment))
            if self._really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed(f"{moment} {op}")


class Then(Nothing):
    """The process dies, and what it left is met by a fault that counts from there."""

    def __init__(self, kill: Kill, fail: Fail) -> None:
        self.kill = kill
        self.fail = fail

    def before(self, op: Op) -> None:
        (self.kill if self.kill.is_to_come else self.fail).before(op)

    def after(self, op: Op) -> None:
        (self.kill if self.kill.is_to_come else self.fail).after(op)


class Hand:
    """Meets what spoold does in the thread that entered it.

    on_effect: called after each effect, while nothing is counted. places: kept for each operation if asked for.
    """

    def __init__(
        self, plan: Plan | None = None, *, on_effect: Callable[[Op], None] = lambda op: None, keeps_places: bool = False
    ) -> None:
        self.plan: Plan = plan or Nothing()
        self.ops: list[Op] = []
        self.places: list[tuple[str, ...]] = []
        self.is_dead = False
        self.on_effect = on_effect
        self._keeps_places = keeps_places
        self._counts: dict[str, int] = {}
        self._thread: int | None = None
        self._is_away = False
        self._patches: list[Any] = []

    def count(self, layer: Layer) -> int:
        return self._counts.get(layer, 0)

    def revive(self) -> None:
        """A new process."""
        self.is_dead = False

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._patches = [*self._os_patches(), *self._s3_patches()]
        for patch in self._patches:
            patch.start()
        sqlalchemy.event.listen(Engine, "do_connect", self._connect)
        return self

    def __exit__(self, *_: object) -> None:
        sqlalchemy.event.remove(Engine, "do_connect", self._connect)
        for patch in self._patches:
            patch.stop()
        self._thread = None

    def meet(
        self, layer: Layer, name: str, act: Callable[[], Any], *, is_effect: bool = False, caller: FrameType | None = None
    ) -> Any:
        """Carry an operation out, or not."""
        if self._is_away or threading.get_ident() != self._thread:
            return act()
        if self.is_dead:
            raise Killed(f"{name}, on the way out")
        number = self._counts[layer] = self._counts.get(layer, 0) + 1
        op = Op(layer, number, name, is_effect)
        self.ops.append(op)
        if self._keeps_places:
            self.places.append(place_of(caller or sys._getframe(1), op))
        self._do(self.plan.before, op)
        result = act()
        if is_effect:
            self._is_away = True
            try:
                self.on_effect(op)
            finally:
                self._is_away = False
        self._do(self.plan.after, op)
        return result

    def _do(self, decide: Callable[[Op], None], op: Op) -> None:
        try:
            decide(op)
        except Killed:
            self.is_dead = True
            raise

    # The OS

    def _os_patches(self) -> list[Any]:
        patches = [mock.patch.object(os, name, self._call(name, getattr(os, name), name in _CHANGES))
                   for name in (*_LOOKS, *_CHANGES)]  # fmt: skip
        patches += [
            mock.patch.object(os, "open", self._open(os.open)),
            mock.patch.object(os, "close", self._close(os.close)),
            mock.patch.object(os, "scandir", self._scandir(os.scandir)),
            mock.patch.object(builtins, "open", self._file(open)),
            mock.patch.object(io, "open", self._file(open)),
            mock.patch.object(fcntl, "fcntl", self._call("fcntl", fcntl.fcntl, False)),
            mock.patch.object(fcntl, "flock", self._call("flock", fcntl.flock, False)),
            mock.patch.object(renames, "_libc", _Libc(self, renames._libc)),
            mock.patch.object(beneath, "_libc", _Libc(self, beneath._libc)),
        ]
        return patches

    def _call(self, name: str, real: Callable[..., Any], is_effect: bool) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            caller = sys._getframe(1)
            if not is_spoolds(caller):
                return real(*args, **keys)
            return self.meet("os", name, lambda: real(*args, **keys), is_effect=is_effect, caller=caller)

        return call

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **keys: Any) -> int:
            caller = sys._getframe(1)
            if not is_spoolds(caller):
                return real(path, flags, *args, **keys)
            is_effect = bool(flags & _CREATES)
            fd: int = self.meet(
                "os", "create" if is_effect else "open", lambda: real(path, flags, *args, **keys), is_effect=is_effect,
                caller=caller,
            )  # fmt: skip
            return fd

        return call

    def _file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **keys: Any) -> Any:
            caller = sys._getframe(1)
            if not is_spoolds(caller):
                return real(file, mode, *args, **keys)
            is_effect = mode[0] in "wxa"
            name = "create" if is_effect else "open"
            return self.meet("os", name, lambda: real(file, mode, *args, **keys), is_effect=is_effect, caller=caller)

        return call

    def _close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        """What close says comes too late to keep the descriptor; and the dead close all they have."""

        def call(fd: int) -> None:
            real(fd)
            caller = sys._getframe(1)
            if not self.is_dead and is_spoolds(caller):
                self.meet("os", "close", lambda: None, caller=caller)

        return call

    def _scandir(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".") -> Any:
            caller = sys._getframe(1)
            if not is_spoolds(caller):
                return real(path)
            return self._entries(self.meet("os", "scandir", lambda: real(path), caller=caller))

        return call

    def _entries(self, entries: Any) -> Iterator[Any]:
        with entries:
            while True:
                # The end is met too: a directory that cannot be read on looks like one that ends.
                entry = self.meet("os", "readdir", lambda: next(entries, None), caller=sys._getframe(1))
                if entry is None:
                    return
                yield _Entry(self, entry)

    # The ledger

    def _connect(self, dialect: Any, record: Any, args: list[Any], keys: dict[str, Any]) -> None:
        """For SQLAlchemy's event do_connect: the driver's own connection class, with the hand in it."""
        if threading.get_ident() == self._thread:
            keys["factory"] = lambda *args, **keys: _Connection(self, *args, **keys)
            self.meet("ledger", "connect", lambda: None, caller=sys._getframe(1))

    # S3

    def _s3_patches(self) -> list[Any]:
        real = URLLib3Session.send

        def send(session: URLLib3Session, request: Any) -> Any:
            is_effect = request.method not in ("GET", "HEAD")
            return self.meet("s3", request.method, lambda: real(session, request), is_effect=is_effect, caller=sys._getframe(1))

        return [mock.patch.object(URLLib3Session, "send", send)]


class _Entry:
    """What scandir yields; asking it may call the OS."""

    def __init__(self, hand: Hand, entry: os.DirEntry[str]) -> None:
        self._hand = hand
        self._entry = entry
        self.name = entry.name
        self.path = entry.path

    def __fspath__(self) -> str:
        return self._entry.path

    def is_symlink(self) -> bool:
        return self._entry.is_symlink()

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._entry.is_dir(follow_symlinks=follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._entry.is_file(follow_symlinks=follow_symlinks)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        act = lambda: self._entry.stat(follow_symlinks=follow_symlinks)  # noqa: E731
        status: os.stat_result = self._hand.meet("os", "stat", act, caller=sys._getframe(1))
        return status


class _Libc:
    """libc, of which `renames` and `beneath` use one function each, and which says by errno what went wrong."""

    def __init__(self, hand: Hand, real: Any) -> None:
        self._hand = hand
        self._real = real

    def renameat2(self, *args: Any) -> int:
        caller = sys._getframe(1)
        try:
            result: int = self._hand.meet(
                "os", "renameat2", lambda: self._real.renameat2(*args), is_effect=True, caller=caller
            )  # fmt: skip
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return result

    def syscall(self, *args: Any) -> int:
        caller = sys._getframe(1)
        try:
            result: int = self._hand.meet("os", "openat2", lambda: self._real.syscall(*args), caller=caller)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return result


class _Connection(sqlite3.Connection):
    """A connection whose statements and commits meet the hand. What is rolled back changes nothing, and passes."""

    def __init__(self, hand: Hand, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.hand = hand

    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.hand.meet(
            "ledger", statement[:60], lambda: super(_Connection, self).execute(statement, *args), caller=sys._getframe(1)
        )
        return cursor

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(lambda connection: _Cursor(self.hand, connection))

    def commit(self) -> None:
        is_effect = self.total_changes != self._committed
        self.hand.meet("ledger", "COMMIT", super().commit, is_effect=is_effect, caller=sys._getframe(1))
        self._committed = self.total_changes

    _committed = 0


class _Cursor(sqlite3.Cursor):
    def __init__(self, hand: Hand, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self.hand = hand

    def execute(self, statement: str, *args: Any) -> Self:
        act = lambda: super(_Cursor, self).execute(statement, *args)  # noqa: E731
        self.hand.meet("ledger", " ".join(statement.split())[:60], act, caller=sys._getframe(1))
        return self

    def executemany(self, statement: str, *args: Any) -> Self:
        act = lambda: super(_Cursor, self).executemany(statement, *args)  # noqa: E731
        self.hand.meet("ledger", " ".join(statement.split())[:60], act, caller=sys._getframe(1))
        return self


def is_spoolds(frame: FrameType | None) -> bool:
    """Say whether it is spoold's code that calls, if need be by a module of the standard library."""
    while frame is not None and (name := frame.f_globals.get("__name__", "")) in _BETWEEN:
        frame = frame.f_back
    return frame is not None and name.startswith("spoold.") and name != "spoold.demo"


def place_of(frame: FrameType | None, op: Op) -> tuple[str, ...]:
    """Return from where in spoold an operation is done: its name and the lines that led to it, innermost first."""
    lines = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("spoold."):
            code = frame.f_code
            lines.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return (op.name, *lines)


def refuses(number: int) -> Callable[[Op], OSError]:
    """Return what makes OSErrors of this number."""
    return lambda op: OSError(number, os.strerror(number))


def ledger_says(message: str) -> Callable[[Op], sqlite3.OperationalError]:
    """Return what makes the driver's errors with this message."""
    return lambda op: sqlite3.OperationalError(message)


_ = TracebackType
