"""A whole life of a spool in one thread: a real daemon whose threads take turns, an app, and the laws after every effect.

    life = Life(directory, rclone_server, Hand(Fail("os", 17, refuses(errno.EIO))))
    life.run()
    life.demand_laws()

The daemon is `spoold.daemon.Daemon` itself, its loops are those that its threads run. Only who runs them differs: they take
turns, so that the same life has the same operations each time, and time passes only when all of them have nothing to do.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import random
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import structlog.testing

from spoold import config, daemon, uploader
from spoold.errors import LedgerUnavailable
from spoold.model import HOUSE
from spoold.owner import LEASE_S
from spoold.spool import ASIDE, CANARY, KEPT
from spoold.store import Store
from tests.nth import Hand, Kill, Killed, Op
from tests.paperclip import App
from tests.parts import ManualClock, is_whole_jpeg, ledger_template
from tests.servers import RcloneServer
from tests.system.harness import ALLOWED_NEXT

PART_BYTES = 64 << 10
FOREIGN = {"readme.txt": b"the sysadmin's", "avatars/notes/deep/er/file.txt": b"somebody's"}
FOREIGN_KEY = "somewhere/else.txt"
RECORDS = ("avatars/1", "videos/2")

_TURNS_AT_MOST = 120
_RESTARTED_AFTER_S = 5.0
_OF_THE_MOMENT = {
    "dev", "ino", "mtime_ns", "ctime_ns", "fingerprint", "created_at", "first_seen_at", "updated_at", "stored_at", "done_at",
    "stored_moment", "due_at", "started_at", "proven_at", "uploaded_at", "doubt_at", "next_attempt_at", "until", "since",
    "upload_id", "bucket", "owner", "behind_s",
}  # fmt: skip
_DRAFTS = (f"{HOUSE}/owner.", f"{HOUSE}/lease.")
"""What a fault or a kill may leave of our own: empty files, without a byte of anybody."""
_TOLD = set().union(*ALLOWED_NEXT.values())


def text(root: Path | str, endpoint_url: str) -> str:
    return f"""
state_dir: {root}/state
s3: {{endpoint_url: "{endpoint_url}", region: us-east-1, addressing_style: path}}
spools:
  - name: uploads
    root: {root}/spool
    path: ":attachment/:id/:style/:basename.:extension"
    bucket: bucket
    key: ":attachment/:id/:style/:basename.:extension"
    replaced_after: 60s
upload: {{doubt: 20s, concurrency: 1, retry: {{initial: 1s, max: 30s}}}}
"""


@functools.cache
def _settings() -> config.Settings:
    """Return settings that each life makes its own: reading them takes longer than much of a life."""
    return config.parse(text("/nowhere", "http://127.0.0.1:9"))


def settings_of(directory: Path, bucket: str, endpoint_url: str) -> config.Settings:
    base = _settings()
    spool = base.spools[0].model_copy(update={"root": directory / "spool", "bucket": bucket})
    s3 = base.s3.model_copy(update={"endpoint_url": endpoint_url})
    upload = base.upload.model_copy(update={"multipart_threshold": PART_BYTES + 1})
    changes = {"state_dir": directory / "state", "spools": (spool,), "s3": s3, "upload": upload}
    return base.model_copy(update=changes)


class StillClock(ManualClock):
    """Time that passes only when it is moved, from a moment that no ctime of this life comes near.

    But for a microsecond at each look: what is due in less than a float can tell would be due for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began = time.time() + 3600.0

    def now(self) -> float:
        return self._began + self._ahead_s

    def monotonic(self) -> float:
        self.advance(1e-6)
        return super().monotonic()


class AtOnce(Executor):
    """Runs what it is given in the thread that gives it; what kills the process is not kept for later."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **keys: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **keys))
        except Exception as error:
            future.set_exception(error)
        return future


class _Idle(BaseException):
    """A worker has nothing to do."""


class _Work(threading.Condition):
    """Where idle workers wait: that ends their turn."""

    def wait(self, timeout: float | None = None) -> bool:
        raise _Idle


class _Stop(threading.Event):
    """A drain that nobody asks for; who waits for it lets time pass."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.advance(timeout or 0.0)
        return self.is_set()


class _Once:
    """An event that is set when it is asked for the second time: a loop that waits for it runs once."""

    def __init__(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        was_set, self._is_set = self._is_set, True
        return was_set


class _Ended(threading.Thread):
    """A thread that was never started."""

    def join(self, timeout: float | None = None) -> None: ...


class Turned(daemon.Daemon):
    """The daemon, its threads' loops taking turns."""

    def __init__(
        self, settings: config.Settings, *, clock: ManualClock, live: Callable[[Turned], int], needs_tending: Callable[[], bool]
    ) -> None:
        super().__init__(settings, clock=clock, once=True)  # it does not observe: the life tells what the app has touched
        self._work = _Work()
        self._stop = _Stop(clock)
        self._live = live
        self._needs_tending = needs_tending
        self._renewed_at = 0.0

    def _thread(self, name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        return _Ended()

    def _wait_until_idle(self) -> int:
        return self._live(self)

    def turn(self) -> None:
        """Let each thread do what there is to do."""
        now = self._clock.monotonic()
        if now - self._renewed_at > LEASE_S / 6:  # first: while others work, its thread would not wait for them
            self._renewed_at = now
            self._renew(_Once())  # type: ignore[arg-type]
        watcher = self._watchers["uploads"]
        for _ in range(50):
            if watcher.step() > 0 and (watcher.is_idle or watcher._is_broken):
                break
            if self._clock.monotonic() < watcher._order.next_due_at() < float("inf") and not watcher._sweeps:
                break
        with contextlib.suppress(_Idle):
            self._work_on(True)
        if self._holds.held() or self._needs_tending():
            self._tend(_Once())  # type: ignore[arg-type]

    def next_look_in_s(self) -> list[float]:
        """Return in how many seconds the watcher and the holds have something to do by themselves."""
        watcher, now = self._watchers["uploads"], self._clock.monotonic()
        waits = [due - now for due, record in watcher._order if watcher._due.get(record) == due]
        waits += [hold.probe_at - now for hold in self._holds._holds.values() if hold.kinds]
        return waits

    def touch(self, record: str) -> None:
        self._watchers["uploads"].touch(record)

    def next_sweep_in_s(self) -> float:
        watcher = self._watchers["uploads"]
        return (watcher._swept_at or 0.0) + watcher._sweep_every_s - self._clock.monotonic()

    def die(self) -> None:
        """What the kernel does for a process that was killed: close its files, and with them its lock."""
        self._ledger.close()
        with contextlib.suppress(OSError):
            os.close(self._owner._fd)


Step = Callable[["Life"], None]


class Life:
    """One spool from its first file to its last, with what befalls it.

    hand: what meets the operations. endpoint_url: of a proxy before the server. tries_s: how long an attempt goes on trying.
    will: what is left to do in a directory where somebody has lived already.
    """

    def __init__(
        self, directory: Path, server: RcloneServer, hand: Hand | None = None, *, endpoint_url: str | None = None,
        script: Iterable[Step] = (), past: Past | None = None, tries_s: float = 8.0, read_timeout_s: float = 20.0,
        watches_bucket: bool = True, will: Will | None = None,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.server = server
        self.root = directory / "spool"
        self.bucket = f"{directory.parent.name}-{directory.name}".lower().replace("_", "-")[-60:].strip("-")
        self.objects_at = server.directory / self.bucket
        self.ledger_file = directory / "state" / "spoold.db"
        if will is None:
            self._make_place(server, past)
        self.app = App(self.root)
        self.clock = StillClock()
        self.hand = hand or Hand()
        self.hand.on_effect = self.demand_safety
        self.settings = settings_of(directory, self.bucket, endpoint_url or server.endpoint_url)
        self.newest: dict[str, bytes] = dict(past.newest) if past else {}
        self.written = {path: {content} for path, content in self.newest.items()}
        self.starts = 0
        self.retried = 0
        self.is_for_a_person = False
        self.late = threading.Event()
        self.on_late: Callable[[], None] = lambda: None
        self.on_death: Callable[[], None] = lambda: None
        self.events: list[Any] = []
        self._script = list(script)
        self._ended_well = True
        if will is not None:
            self._script, self.newest, self.written = list(will.script), dict(will.newest), dict(will.written)
            self.starts = 1
        self._store_settings = {"read_timeout_s": read_timeout_s, "connect_timeout_s": 5.0}
        self._tries_s = tries_s
        self._watches_bucket = watches_bucket
        self._known: dict[tuple[str, int, int, int], bytes] = {}
        self._daemon: Turned | None = None

    def _make_place(self, server: RcloneServer, past: Past | None) -> None:
        self.root.mkdir(parents=True)
        server.create_bucket(self.bucket)
        self.ledger_file.parent.mkdir()
        self.ledger_file.write_bytes(past.ledger if past else ledger_template())
        for name, content in FOREIGN.items():
            self.put_in_place(name, content)
        server.client().put_object(Bucket=self.bucket, Key=FOREIGN_KEY, Body=b"foreign")
        if past is not None:
            self._take_over(past, server)

    def _take_over(self, past: Past, server: RcloneServer) -> None:
        for key, content in past.newest.items():
            server.client().put_object(Bucket=self.bucket, Key=key, Body=content)
        with contextlib.closing(sqlite3.connect(self.ledger_file)) as connection, connection:
            for table in ("batch_file", "intent", "object", "replaced", "key_owner"):
                connection.execute(f"UPDATE {table} SET bucket = ? WHERE bucket = ?", (self.bucket, past.bucket))

    def past(self) -> Past:
        """Return what there is now, for other lives to go on from."""
        self.close()
        with contextlib.closing(sqlite3.connect(self.ledger_file)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Past(self.ledger_file.read_bytes(), self.bucket, dict(self.newest))

    def will(self) -> Will:
        """Return what another life has to know to go on from here."""
        return Will(tuple(self._script), dict(self.newest), dict(self.written))

    # The app

    def put_in_place(self, path: str, content: bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def save(self, record: str, name: str, styles: dict[str, bytes], *, replaces: str | None = None) -> None:
        """Let the app save a file with its styles; what another name held before goes."""
        attachment, id = record.split("/")
        for style in styles:
            self.written.setdefault(f"{record}/{style}/{name}", set()).add(styles[style])
        if replaces is not None:
            self.app.destroy(attachment, id, replaces, styles)
        if "original" in styles:  # what was made of the one before goes, by and by (contract, rule 7)
            self.newest = {path: content for path, content in self.newest.items() if not path.startswith(f"{record}/")}
        self.app.save(attachment, id, name, styles)
        for style, content in styles.items():
            self.newest[f"{record}/{style}/{name}"] = content
        if self._daemon is not None:
            self._daemon.touch(record)

    # Running

    def run(self) -> None:
        """Live to the end of the script, through as many daemons as it takes."""
        patches = [
            mock.patch.object(daemon, "ThreadPoolExecutor", AtOnce),
            mock.patch.object(uploader, "_PART_BYTES", PART_BYTES),
            mock.patch.object(uploader, "_PERSISTENCE_S", self._tries_s),
            mock.patch.object(daemon, "Store", self._make_store),
        ]
        random.seed(0)
        with contextlib.ExitStack() as stack:
            self.events = stack.enter_context(structlog.testing.capture_logs())
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(self.hand)
            while self._script or not self._ended_well:  # systemd starts what was killed, also on its way out
                self._run_one()
                if not self._ended_well:
                    gc.collect()  # SQLite keeps a connection for as long as there is a statement of it; the kernel does not

    def _make_store(self, **settings: Any) -> Store:
        return Store(**settings, **self._store_settings)

    def _run_one(self) -> None:
        self.starts += 1
        self._ended_well = False
        assert self.starts < 10, f"it does not come to its feet: {self.state()}"
        try:
            self._daemon = Turned(self.settings, clock=self.clock, live=self._live, needs_tending=self._keys_are_due)
            self._daemon.run()
            self._ended_well = True
        except Killed:
            self._bury()
            self.on_death()
            self.hand.revive()
        except LedgerUnavailable:
            self._bury()  # the command says so and ends; systemd starts it again
            self.clock.advance(_RESTARTED_AFTER_S)
        finally:
            self._daemon = None

    def _bury(self) -> None:
        if self._daemon is not None:
            self._daemon.die()

    def _live(self, running: Turned) -> int:
        if not self._script:
            return 0
        while self._script:
            step = self._script[0]
            try:
                step(self)
            except _Restart:
                self._script.pop(0)
                return 0
            self._script.pop(0)
        return 0

    def settle(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let turns and time pass until all is done, or `until` says so after a turn."""
        assert self._daemon is not None
        nothing_due = 0
        for _ in range(_TURNS_AT_MOST):
            self._daemon.turn()
            self.demand_safety(None)
            if until():
                return
            waits = self._waits()
            is_done = self._is_done()
            if is_done and not waits:
                return
            if not is_done and self._retry_dead():
                continue
            waits += [self._daemon.next_sweep_in_s()] if not is_done else []
            wait = min(waits, default=0.0)
            nothing_due = nothing_due + 1 if wait <= 0.0 else 0
            self.clock.advance(max(wait, 0.05) if nothing_due < 3 else 5.0)
        raise AssertionError(f"it does not come to rest: {self.state()}")

    def _waits(self) -> list[float]:
        assert self._daemon is not None
        now = self.clock.now()
        due = [row["due_at"] - now for row in self.rows("SELECT due_at FROM batch WHERE due_at IS NOT NULL")]
        due += [row["due_at"] - now for row in self.rows("SELECT due_at FROM replaced")]
        return due + self._daemon.next_look_in_s()

    def _keys_are_due(self) -> bool:
        return bool(self.rows("SELECT 1 FROM replaced WHERE due_at <= ?", self.clock.now()))

    def _is_done(self) -> bool:
        """Nothing waits but what nobody waits for."""
        assert self._daemon is not None
        if self.rows("SELECT 1 FROM sighting WHERE state <> 'gone'") or self.rows("SELECT 1 FROM claim"):
            return False
        if self.rows("SELECT 1 FROM batch WHERE state IN ('pending', 'stored', 'dead')") or self.rows("SELECT 1 FROM held"):
            return False
        return not set(self.files()) - set(FOREIGN) and self._daemon._watchers["uploads"].is_idle

    def _retry_dead(self) -> bool:
        """Do what a person does, where the contract has a person act."""
        dead = self.rows("SELECT record.path FROM batch JOIN record ON record.id = record_key WHERE state = 'dead'")
        if not dead:
            return False
        assert self.is_for_a_person, f"dead: {self.state()}"
        self.retried += 1
        assert self.retried < 5, "it dies again and again"
        assert self._daemon is not None
        self._daemon._ledger.retry([row["path"] for row in dead])
        return True

    # What is true

    @functools.cached_property
    def _connection(self) -> sqlite3.Connection:
        connection = sqlite3.connect(f"file:{self.ledger_file}?mode=ro", uri=True, timeout=10)
        connection.row_factory = sqlite3.Row
        return connection

    def rows(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Ask the ledger's file itself."""
        return [dict(row) for row in self._connection.execute(statement, parameters)]

    def close(self) -> None:
        """Leave nothing open."""
        self._connection.close()

    def forget(self) -> None:
        """Leave nothing at all: a run of many lives would fill the disk."""
        self.close()
        for path in (self.directory, self.objects_at):
            shutil.rmtree(path)

    def files(self) -> dict[str, Path]:
        """Return what lies in the spool outside spoold's own house."""
        return {path: where for path, where in _below(self.root) if not path.startswith(f"{HOUSE}/")}

    def house(self) -> dict[str, Path]:
        return {path: where for path, where in _below(self.root) if path.startswith(f"{HOUSE}/")}

    def objects(self) -> dict[str, Path]:
        """Return what the bucket holds, by key."""
        return dict(_below(self.objects_at))

    def content(self, path: Path) -> bytes:
        """Return what a file holds; each state of it is read once."""
        status = path.stat()
        which = (os.fspath(path), status.st_ino, status.st_size, status.st_ctime_ns)
        if which not in self._known:
            self._known[which] = path.read_bytes()
        return self._known[which]

    def footprint(self) -> dict[str, Any]:
        """Return all that a dead process has left, without what is another one each time."""
        wild = r"[0-9a-f]{12}|[0-9a-f]{8}-[0-9a-f-]{27}|lease\.[0-9]+"
        left = {re.sub(wild, "*", path): self.content(file) for path, file in (self.files() | self.house()).items()}
        tables: dict[str, list[Any]] = {}
        for table in ("record", "batch", "batch_file", "claim", "sighting", "intent", "object", "replaced", "held"):
            rows = self.rows(f"SELECT * FROM {table}")
            tables[table] = sorted(
                (
                    {name: re.sub(wild, "*", str(value)) for name, value in row.items() if name not in _OF_THE_MOMENT}
                    for row in rows
                ),
                key=str,
            )
        objects = {key: self.content(path) for key, path in self.objects().items()}
        directories = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_dir())
        return {"files": left, "objects": objects, "directories": directories, **tables}

    # The laws

    def demand_safety(self, op: Op | None) -> None:
        """The newest bytes are on disk or in the bucket, which holds nothing that the app never wrote: at every moment."""
        house = None
        for path, content in self.newest.items():
            if (self.root / path).is_file() and self.content(self.root / path) == content:
                continue
            key = self.objects_at / path
            if key.is_file() and self.content(key) == content:
                continue
            house = house if house is not None else [self.content(file) for file in self.house().values()]
            assert content in house, f"{path} is lost after {op}: {self.state()}"
        if self._watches_bucket:
            for key_path, contents in self.written.items():
                key = self.objects_at / key_path
                is_whole = not key.is_file() or self.content(key) in contents
                assert is_whole, f"{key_path} is half-written after {op}: {self.state()}"

    def demand_laws(self) -> None:
        """Nothing lost, stale, half-written, left, or foreign touched; nobody at anything; a legal path."""
        objects = {key: self.content(path) for key, path in self.objects().items()}
        assert self.newest | {FOREIGN_KEY: b"foreign"} == objects, f"bucket: {self._difference(objects)}: {self.state()}"
        files = {path: self.content(where) for path, where in self.files().items()}
        assert files == FOREIGN, f"files: {sorted(files)}: {self.state()}"
        house = {path for path in self.house() if not path.startswith(_DRAFTS)}
        assert {f"{HOUSE}/{CANARY}", f"{HOUSE}/owner"} == house, f"{sorted(house)}: {self.state()}"
        directories = {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_dir()}
        stay = {"avatars", "avatars/notes", "avatars/notes/deep", "avatars/notes/deep/er", "videos"}
        house = {HOUSE, f"{HOUSE}/{ASIDE}", f"{HOUSE}/{KEPT}"}
        if self.is_for_a_person:  # what may not be removed stays
            stay |= {path for path in directories if path.startswith(RECORDS)}
        assert directories <= stay | house, f"{sorted(directories)}: {self.state()}"
        assert [] == self.rows("SELECT * FROM claim"), self.state()
        assert [] == self.rows("SELECT * FROM held"), self.state()
        assert [] == self.rows("SELECT * FROM intent WHERE answer IS NULL"), self.state()
        assert [] == self.rows("SELECT * FROM replaced"), self.state()
        left = os.listdir(self.directory / "state" / "owners")
        assert len(left) <= 1, f"{left}: {self.state()}"  # its own, if that could not be removed
        states = {row["path"]: row["state"] for row in self.rows("SELECT path, state FROM record_status")}
        assert dict.fromkeys(states, "done") == states, self.state()
        live = {row["key"] for row in self.rows("SELECT key FROM record_object")}
        assert set(self.newest) == live, f"manifest: {live}: {self.state()}"
        for record in states:
            self.demand_legal_path(record)

    def _difference(self, objects: dict[str, bytes]) -> dict[str, str]:
        keys = self.newest.keys() | objects.keys() - {FOREIGN_KEY}
        short = {key: (str(self.newest.get(key))[:40], str(objects.get(key))[:40]) for key in keys}
        return {key: f"wanted {wanted}, found {found}" for key, (wanted, found) in short.items() if wanted != found}

    def demand_legal_path(self, record: str) -> None:
        """The record's lines, in order, are what the contract allows (section 4)."""
        statement = "SELECT event FROM history JOIN record ON record.id = record_key WHERE path = ? ORDER BY history.id"
        path = [row["event"] for row in self.rows(statement, record) if row["event"] in _TOLD]
        for before, event in zip([None, *path], path, strict=False):
            assert event in ALLOWED_NEXT[before], f"{event} after {before} in {path}"

    def state(self) -> str:
        """Return all there is to know, for whoever has to find out why."""
        lines = [""]
        lines += [f"file {path}" for path in (*self.files(), *self.house())]
        lines += [f"object {key}" for key in self.objects()]
        for table in ("batch", "batch_file", "claim", "sighting", "intent", "replaced", "held", "record_status"):
            lines += [f"{table} {row}" for row in self.rows(f"SELECT * FROM {table}")]
        return "\n".join([*lines, *(f"log {line}" for line in self.events[-60:])])


@dataclass(frozen=True, slots=True)
class Past:
    """What there is when all is done, for lives that begin there: the ledger, and what the app has written so far.

    The spool is empty then, so that no file's identity matters any more.
    """

    ledger: bytes
    bucket: str
    newest: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Will:
    """What is left to do, and what the app has written so far."""

    script: tuple[Step, ...]
    newest: dict[str, bytes]
    written: dict[str, set[bytes]]


class _Restart(Exception):
    """Drain, and start again."""


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            yield str(path.relative_to(root)), path


# The script


def picture(what: str) -> bytes:
    """Return something that ends as a JPEG does: nobody in here looks at more."""
    return is_whole_jpeg(what.encode())


CLIP = bytes(range(256)) * (PART_BYTES * 5 // 2 // 256)


def a_record_with_its_styles(life: Life) -> None:
    life.save("avatars/1", "cat.jpg", {style: picture(f"{style} 1") for style in ("original", "medium", "thumb")})


def a_large_file(life: Life) -> None:
    life.save("videos/2", "clip.bin", {"original": CLIP})


def the_same_name_again(life: Life) -> None:
    life.save("avatars/1", "cat.jpg", {style: picture(f"{style} 2") for style in ("original", "thumb")}, replaces="cat.jpg")


def another_name(life: Life) -> None:
    life.save("avatars/1", "dog.jpg", {style: picture(f"{style} 3") for style in ("original", "thumb")}, replaces="cat.jpg")


def all_is_done(life: Life) -> None:
    life.settle()


def something_lies_aside(life: Life) -> None:
    life.settle(until=lambda: any(f"/{ASIDE}/" in path for path in life.house()))


def it_is_stored(life: Life) -> None:
    waits = "SELECT 1 FROM batch WHERE state = 'pending' UNION SELECT 1 FROM sighting"
    life.settle(until=lambda: not life.rows(waits))


def the_late_one_lands(life: Life) -> None:
    life.late.set()
    life.on_late()


def another_daemon(life: Life) -> None:
    raise _Restart


def somebody_writes_into_what_lies_aside(life: Life) -> None:
    """He had it open since before, and nobody could tell: by a mapping, or on a filesystem without leases."""
    for path, file in life.house().items():
        if "original" in path and life.content(file) == life.newest["avatars/1/original/cat.jpg"]:
            del life.newest["avatars/1/thumb/cat.jpg"]  # it was made of the original before (contract, rule 7)
            life.newest["avatars/1/original/cat.jpg"] = picture("original 9")
            life.written["avatars/1/original/cat.jpg"].add(picture("original 9"))
            file.write_bytes(picture("original 9"))


def a_stranger_empties_the_bucket(life: Life) -> None:
    """And so much later that the proof has to be renewed."""
    life.server.client().delete_object(Bucket=life.bucket, Key="avatars/1/original/cat.jpg")
    life.clock.advance(3700.0)


SCRIPTS: dict[str, tuple[Step, ...]] = {
    "first": (a_record_with_its_styles, a_large_file, all_is_done),
    "again": (the_same_name_again, something_lies_aside, another_daemon, all_is_done),
    "replaced": (another_name, all_is_done),
    "given back": (the_same_name_again, something_lies_aside, somebody_writes_into_what_lies_aside, all_is_done),
    "put again": (the_same_name_again, it_is_stored, a_stranger_empties_the_bucket, all_is_done),
}
"""A life in parts; each begins where the one before it ends, but for the last two: they begin where the second does."""

HASTY = (a_record_with_its_styles, it_is_stored, the_same_name_again, it_is_stored, the_late_one_lands, all_is_done)
"""A newer version comes when the older one has just been stored, and what was lost on its way then arrives later still."""


class Elsewhere(RcloneServer):
    """A server that another process has started."""

    def __init__(self, directory: Path, port: int) -> None:
        super().__init__(directory)
        self.port = port


def main() -> None:
    """For each line of input let a process live and be killed; print how it ended.

    A line has a directory, the part of a life, and the moment, with tabs between. Arguments: the server's directory and port,
    and a file with the pasts.
    """
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = RcloneServer.access_key, RcloneServer.secret_key
    told = os.dup(1)
    os.dup2(2, 1)  # what is logged is not what is told
    server = Elsewhere(Path(sys.argv[1]), int(sys.argv[2]))
    pasts: dict[str, Past] = pickle.loads(Path(sys.argv[3]).read_bytes())
    _settings(), ledger_template()
    for line in sys.stdin:
        directory, part, number = line.rstrip().split("\t")
        child = os.fork()
        if child == 0:
            life = Life(Path(directory), server, Hand(Kill(int(number), really=True)), script=SCRIPTS[part], past=pasts[part])
            life.run()
            os._exit(0)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
