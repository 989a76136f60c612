"""Parts for the tests of modules: a clock that one moves, a kernel that refuses, one spool with all that works on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import signal
import sqlite3
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import structlog.testing

from spoold import cleanup, completeness
from spoold.cleanup import Cleaner
from spoold.clock import Ages, SystemClock
from spoold.digest import Digester
from spoold.errors import ClaimLost, LedgerUnavailable
from spoold.holds import Holds
from spoold.layout import Layout
from spoold.ledger import Ledger
from spoold.looker import Looker
from spoold.model import (
    HOUSE,
    Answer,
    Batch,
    BatchFile,
    Claim,
    Headers,
    Identity,
    Outcome,
    Put,
    PutResult,
    Snapshot,
    SpooledFile,
    State,
    StoredObject,
)
from spoold.pipeline import Parts, Pipeline, Retry
from spoold.spool import ASIDE, KEPT, Spool
from spoold.steps import SideBySide, Steps
from spoold.store import Store
from spoold.uploader import Bandwidth, Budget, Destination, Uploader

T = TypeVar("T")

# The daemon does so at its start: who takes leases is sent SIGIO, and its default ends the process.
signal.signal(signal.SIGIO, signal.SIG_IGN)

PATH = ":attachment/:id/:style/:basename.:extension"
NAME = "uploads"
BUCKET = "bucket"
RECORD = "avatars/42"
NOWHERE = "http://127.0.0.1:9"
CLIENT = os.environ.get("SPOOLD_CLIENT", "boto3")
"""What `upload.client` is in the tests that do not say: all of them hold with either."""

LEASE_S = 30.0
DEADLINE_S = 20.0


class RealClock(SystemClock):
    """Time that nobody moves, for tests of what the kernel does at its own pace."""

    def advance(self, seconds: float) -> None:
        raise AssertionError("this clock cannot be moved")

    jump = advance


class ManualClock:
    """Time that stands still until a test moves it, but that the wall clock is never behind the disk's ctimes."""

    def __init__(self) -> None:
        self._monotonic_s = 1_000.0
        self._ahead_s = 0.0
        self._advanced_s = 0.0
        self._booted_at = time.time() - 86_400.0

    def now(self) -> float:
        return time.time() + self._ahead_s

    def monotonic(self) -> float:
        return self._monotonic_s

    def uptime(self) -> float:
        return time.time() + self._advanced_s - self._booted_at

    def boot(self) -> None:
        """Be a machine that has just started: whatever was written so far is from before."""
        self._booted_at = time.time() + self._advanced_s

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Let the time pass at once."""
        if not event.is_set():
            self.advance(timeout_s)
        return event.is_set()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic_s += seconds
        self._advanced_s += seconds
        self._ahead_s += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; no time passes."""
        self._ahead_s += seconds


def until(condition: Callable[[], T], what: str, *, timeout_s: float = DEADLINE_S) -> T:
    """Return the condition's first true value; fail with `what` when the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
    return value


def spooled(
    path: str, content: bytes = b"", *, ino: int = 1, mtime_ns: int = 10**9, ctime_ns: int = 10**9, style: str = ""
) -> SpooledFile:
    """Return a file that is nowhere, as a look would have found it at this path of layout PATH."""
    *_, found_style, filename = path.split("/")
    identity = Identity(1, ino, len(content), mtime_ns, ctime_ns)
    return SpooledFile(path, style or found_style, filename.partition(".")[0], filename, identity)


def snapshot_of(*files: SpooledFile, record: str = RECORD, marker: SpooledFile | None = None) -> Snapshot:
    """Return a snapshot that nobody took."""
    attachment, _, record_id = record.partition("/")
    return Snapshot(record, attachment, record_id, tuple(sorted(files, key=lambda file: file.path)), marker)


def is_whole_jpeg(content: bytes) -> bytes:
    """Return something that ends as a JPEG does, with `content` in it: enough for who looks at the ends only."""
    comment = b"\xff\xfe" + struct.pack(">H", len(content) + 2) + content
    scan = b"\xff\xc0\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    return b"\xff\xd8" + comment + scan + b"\xff\xd9"


# What the kernel grants

_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "x86_64": {"fcntl": 72, "renameat2": 316, "inotify_init1": 294, "inotify_init": 253, "inotify_add_watch": 254, "fsync": 74},
    "aarch64": {"fcntl": 25, "renameat2": 276, "inotify_init1": 26, "inotify_add_watch": 27, "fsync": 82},
}
_F_SETLEASE = 1024
_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _LEASE = 1, 2, 3, 28


def in_a_world(work: Callable[[], T], *changes: Callable[[], None]) -> T:
    """Run `work` in a thread for which the kernel was changed, and return what it returns; the changes end with it."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            for change in changes:
                change()
            outcome.extend((True, work()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    is_done, value = outcome
    if not is_done:
        raise value
    returned: T = value
    return returned


def without(call: str, error: int, *, second_argument: int | None = None) -> Callable[[], None]:
    """A change of the world: this system call fails with `error`. Source: seccomp(2); a filter holds for one thread."""
    number = _NUMBERS.get(platform.machine(), {}).get(call)

    def change() -> None:
        if number is None:
            pytest.skip(f"the number of {call} on {platform.machine()} is not known here")
        argument = [] if second_argument is None else [(0x20, 0, 0, 24), (0x15, 0, 1, second_argument)]
        code = [(0x20, 0, 0, 0), (0x15, 0, len(argument) + 1, number), *argument,
                (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]  # fmt: skip
        program = b"".join(struct.pack("HBBI", *line) for line in code)
        text = ctypes.create_string_buffer(program, len(program))
        head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(text)))
        zero = ctypes.c_ulong(0)
        assert 0 == _libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero), "PR_SET_NO_NEW_PRIVS"
        if _libc.prctl(22, ctypes.c_ulong(2), head, zero, zero) != 0:
            pytest.skip(f"no seccomp filters here: {os.strerror(ctypes.get_errno())}")

    return change


def without_leases() -> Callable[[], None]:
    """A change of the world: a filesystem that knows no leases."""
    return without("fcntl", 22, second_argument=_F_SETLEASE)


def without_root_powers() -> None:
    """A change of the world: file modes count, even if the tests run as root."""
    version, mask = 0x20080522, 0
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER):
        mask |= 1 << capability
    head = ctypes.create_string_buffer(struct.pack("Ii", version, 0))
    sets = ctypes.create_string_buffer(24)
    assert 0 == _libc.capget(head, sets)
    effective, permitted, inheritable, *rest = struct.unpack("6I", sets.raw)
    sets = ctypes.create_string_buffer(struct.pack("6I", effective & ~mask, permitted, inheritable, *rest))
    assert 0 == _libc.capset(head, sets)


def with_own_mounts() -> None:
    """A change of the world: what is mounted here is seen by nobody else, and gone in the end."""
    newns, fs, recursive, private = 0x00020000, 0x00000200, 0x4000, 1 << 18
    if _libc.unshare(newns | fs) != 0 or _libc.mount(b"none", b"/", None, ctypes.c_ulong(recursive | private), None) != 0:
        pytest.skip(f"may not mount here: {os.strerror(ctypes.get_errno())}")


def mount_tmpfs(path: Path, options: str = "size=1m") -> None:
    """Mount an empty filesystem; in a world with mounts of its own only."""
    result = _libc.mount(b"none", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0), options.encode())
    assert 0 == result, os.strerror(ctypes.get_errno())


# One spool


@functools.cache
def ledger_template() -> bytes:
    """Return what the migrations make: running them takes 50 ms, and a test wants to begin."""
    with tempfile.TemporaryDirectory() as directory:
        Ledger(f"sqlite:///{directory}/ledger.db", clock=SystemClock()).close()
        return (Path(directory) / "ledger.db").read_bytes()


class Bench:
    """One spool, with a ledger, a clock that the test moves, and the parts that work on it, made as they are asked for.

    endpoint_url: of the store; by default nobody answers there. layout, marker: as the spool's.
    """

    def __init__(
        self, directory: Path, *, endpoint_url: str = NOWHERE, path: str = PATH, key: str = PATH, marker: str | None = None,
        styles: Iterable[str] | None = None, clock: ManualClock | RealClock | None = None,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.clock: Any = clock or ManualClock()
        self.root = directory / "spool"
        self.root.mkdir(exist_ok=True)
        self.ledger_file = directory / "ledger.db"
        if not self.ledger_file.exists():
            self.ledger_file.write_bytes(ledger_template())
        self.ledger = Ledger(f"sqlite:///{self.ledger_file}", clock=self.clock)
        self.spool = Spool(name=NAME, root=self.root, layout=Layout(path, key, styles=styles), marker=marker)
        self.spool.move_in(self.ledger.id)
        self.ages = Ages(self.clock)
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(4)
        self.store = Store(
            endpoint_url=endpoint_url, region="us-east-1", addressing_style="path", connect_timeout_s=2, read_timeout_s=5,
            quick_connections=8 if CLIENT == "fast" else 0,
        )  # fmt: skip
        self.touched: list[str] = []
        self.has_claims = True
        self.interruptions: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.store.close()
        self.ledger.close()

    def lose_ledger(self) -> None:
        """Have the ledger's file lost while nobody has it open, and a new one begun."""
        self.ledger.close()
        for path in self.directory.glob("ledger.db*"):
            if path.suffix != ".id":
                path.unlink()
        self.ledger = Ledger(f"sqlite:///{self.ledger_file}", clock=self.clock)

    @contextlib.contextmanager
    def ledger_away(self) -> Iterator[None]:
        """Have the ledger take no changes for the block: its file is gone, and there is no room to put it back."""
        away = self.take_ledger_away()
        try:
            yield
        finally:
            away()

    def take_ledger_away(self) -> Callable[[], None]:
        """Do what `ledger_away` does; return what ends it."""
        elsewhere, in_the_way = self.directory / "elsewhere.db", Path(f"{self.ledger_file}.draft.{os.getpid()}")
        in_the_way.mkdir()
        self.ledger_file.rename(elsewhere)

        def put_back() -> None:
            in_the_way.rmdir()
            elsewhere.rename(self.ledger_file)

        return put_back

    # The app

    def write(self, path: str, content: bytes = b"a cat") -> Path:
        """Write a file below the root, with the directories on the way."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def tree(self) -> list[str]:
        """Return every path below the root, but for our house; directories end in a slash."""
        return sorted(
            f"{path.relative_to(self.root)}{'/' if path.is_dir() and not path.is_symlink() else ''}"
            for path in self.root.rglob("*")
            if HOUSE not in path.parts
        )

    def files(self) -> list[str]:
        return [path for path in self.tree() if not path.endswith("/")]

    @property
    def house(self) -> Path:
        return self.root / HOUSE

    def aside(self) -> list[Path]:
        return sorted((self.house / ASIDE).iterdir())

    def kept(self) -> list[Path]:
        return sorted((self.house / KEPT).iterdir())

    # The ledger

    def offer(self, record: str = RECORD, *, decided_by: str = "quiet", is_all: bool = True) -> int | None:
        """Offer all that lies in a record, as if it were complete."""
        snapshot = self.spool.look(record)
        return self.ledger.offer(NAME, snapshot, snapshot.files, decided_by=decided_by, is_all=is_all)

    def claim(self, owner: str = "me", *, lease_s: float = LEASE_S, crashes: int = 3) -> Claim | None:
        return next(iter(self.ledger.claim(owner, [NAME], lease_s=lease_s, crashes=crashes)), None)

    def claimed(self, owner: str = "me") -> Claim:
        """Return the claim that there must be."""
        claim = self.claim(owner)
        assert claim is not None, "nothing is due"
        return claim

    def puts(self, claim: Claim, *, bucket: str = BUCKET) -> list[Put]:
        """Return what is to be put of a batch; no file of it is made durable."""
        puts = []
        for file in claim.batch.uploads:
            digester = Digester("none")
            digester.update(self.read(file.file.path))
            puts.append(Put(file, bucket, file.file.path, None, Headers("image/jpeg"), digester.digests()))
        return puts

    def intended(self, claim: Claim, *, bucket: str = BUCKET) -> list[Put]:
        return self.ledger.intend(claim, self.puts(claim, bucket=bucket))

    def stored(self, claim: Claim, *, replaced_after_s: float | None = 86400.0, bucket: str = BUCKET) -> Claim:
        """Have all of a batch stored, by a store that confirms everything."""
        results = confirmed(self.intended(claim, bucket=bucket))
        self.ledger.answered(results)
        return self.ledger.stored(claim, results, replaced_after_s=replaced_after_s, elapsed_s=0.1)

    def batch_stored(self, files: Mapping[str, bytes], *, record: str = RECORD) -> Claim:
        """Write these files of a record (`original/cat.jpg`: content), and have them offered, claimed and stored."""
        for path, content in files.items():
            self.write(f"{record}/{path}", content)
        assert self.offer(record) is not None, "nothing new to offer"
        return self.stored(self.claimed())

    def status(self, record: str = RECORD) -> dict[str, Any]:
        """Return the record's row of the view; {} if there is none."""
        rows = self.ledger.record_status(record, spool=NAME)
        return rows[0] if rows else {}

    def state(self, record: str = RECORD) -> str | None:
        state: str | None = self.status(record).get("state")
        return state

    def events(self, record: str = RECORD) -> list[str]:
        return [row["event"] for row in self.ledger.record_history(record, spool=NAME)]

    def objects(self, record: str = RECORD) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.ledger.record_objects(record, spool=NAME)}

    def rows(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Ask the ledger's file itself."""
        connection = sqlite3.connect(self.ledger_file)
        try:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement, parameters)]
        finally:
            connection.close()

    # The parts

    def destination(self, **changes: Any) -> Destination:
        values: dict[str, Any] = {
            "bucket": BUCKET, "layout": self.spool.layout, "headers_for": lambda _a, _s, sniffed: Headers(sniffed),
            "multipart_threshold": 16_000_000, "checksum": "crc32",
        }  # fmt: skip
        return Destination(**values | changes)

    def uploader(self, *, bandwidth: float | None = None, budget: int = 64 << 20, **changes: Any) -> Uploader:
        return Uploader(
            spool=self.spool, store=self.store, destination=self.destination(**changes),
            budget=Budget(budget), bandwidth=Bandwidth(bandwidth, clock=self.clock), clock=self.clock, stop=self.stop,
            demand_claim=self.demand,
        )  # fmt: skip

    def cleaner(self, **changes: Any) -> Cleaner:
        """Return a cleaner that lets everything go at once, but for what `changes` say of its rules."""
        values: dict[str, Any] = {
            "deletes": True, "keep_for_s": 0.0, "min_age_s": 0.0, "grace_s": 0.0, "keep_empty_dirs_for_s": 0.0,
            "trusts": False, "doubt_s": 900.0,
        }  # fmt: skip
        return Cleaner(
            spool=self.spool, ledger=self.ledger, store=self.store, rules=cleanup.Rules(**values | changes), ages=self.ages,
            clock=self.clock, demand_claim=self.demand,
        )  # fmt: skip

    def demand(self) -> None:
        """Say whether claims last; before that, do what the test wants done at this moment: before an effect."""
        if self.interruptions:
            self.interruptions.pop(0)()
        if not self.has_claims:
            raise ClaimLost("the claim may have run out")

    def looker(
        self, *, styles: Sequence[str] | None = None, settle_s: float = 1.0, images: str = "ends", within_s: float = 600.0,
        on_offer: Callable[[], None] = lambda: None,
    ) -> Looker:  # fmt: skip
        wanted = None if styles is None else tuple(styles)
        rules = completeness.Rules(lambda _: wanted, settle_s, self.spool.marker)
        return Looker(
            spool=self.spool, ledger=self.ledger, rules=rules, images=images, within_s=within_s, ages=self.ages,
            on_offer=on_offer,
        )  # fmt: skip

    def holds(self, **probes: Callable[[], None]) -> Holds:
        """Return holds whose probes all succeed, but for those given as `store` and `disk`."""
        tries = {"store": lambda: None, "disk": lambda: None} | probes
        return Holds(ledger=self.ledger, clock=self.clock, probes={NAME: tries}, on_release=lambda: None)

    def pipeline(
        self, *, uploader: Uploader | None = None, cleaner: Cleaner | None = None, holds: Holds | None = None,
        give_up_after: int = 0, decodes: bool = False, replaced_after_s: float | None = 86400.0,
    ) -> Pipeline:  # fmt: skip
        parts = Parts(
            spool=self.spool, uploader=uploader or self.uploader(), cleaner=cleaner or self.cleaner(),
            replaced_after_s=replaced_after_s, decodes=decodes, touch=self.touched.append,
        )  # fmt: skip
        return Pipeline(
            ledger=self.ledger, parts={NAME: parts}, holds=holds or self.holds(), retry=Retry(1.0, 300.0, give_up_after),
            clock=self.clock, pool=self.pool,
        )  # fmt: skip


def alone(steps: Steps[T]) -> T:
    """Take one walk to its end by itself; each of its changes is durable when it goes on."""
    with ThreadPoolExecutor(8) as pool:
        [end] = SideBySide(together=contextlib.nullcontext, pool=pool).run([steps])
    if isinstance(end, LedgerUnavailable):
        raise end
    return end


def walked(pipeline: Pipeline, claim: Claim) -> Outcome:
    """Walk one batch; raises LedgerUnavailable."""
    [end] = pipeline.walk_all([claim])
    if isinstance(end, LedgerUnavailable):
        raise end
    return end


def confirmed(puts: Iterable[Put]) -> list[PutResult]:
    """Return what a store that takes everything answers."""
    return [
        PutResult(
            put, Answer.CONFIRMED,
            put.adopted or StoredObject(put.bucket, put.key, put.digests.size, "image/jpeg", put.digests.md5),
        )
        for put in puts
    ]  # fmt: skip


def batch_of(*files: BatchFile, state: State = State.PENDING) -> Batch:
    """Return a batch that no ledger knows."""
    return Batch(1, NAME, 1, RECORD, "avatars", "42", state, 1, 0, files)


def told(events: Iterable[Mapping[str, Any]], event: str) -> list[Mapping[str, Any]]:
    """Return the log lines of one event."""
    return [line for line in events if line["event"] == event]


captured = structlog.testing.capture_logs
