"""A reference model: what the app wrote, what the bucket holds, what may still land there; so simple that it is plainly right.

Beside it runs the real thing (`Play`): spoold's own parts on a real directory and a real ledger, one step at a time. Before
each of their system calls, ledger changes and requests something else may happen (`At`): the app writes, another daemon
walks, a call fails, the process dies. After whatever could lose something the model is asked whether it did.

What is promised only within bounds is bounded here as the contract bounds it: an unanswered request lands within
`upload.doubt` or never (rule 6), and no daemon sleeps longer than a quarter of a lease between asking for its claim and the
effect.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import pytest

import spoold.aside
import spoold.cleanup
import spoold.looker
import spoold.spool
import spoold.uploader
from spoold import cleanup, completeness
from spoold.cleanup import Cleaner, Remover
from spoold.clock import Ages
from spoold.errors import (
    LedgerUnavailable,
    ObjectRefused,
    SpoolBroken,
    SpooldError,
    StoreDenied,
    StoreUnavailable,
    Unproven,
)
from spoold.holds import Holds
from spoold.layout import Layout
from spoold.ledger import Ledger
from spoold.looker import Looker
from spoold.model import HOUSE, Claim, Digests, Headers, StoredObject
from spoold.owner import LEASE_S, Owner
from spoold.pipeline import Parts, Pipeline, Retry
from spoold.settler import Settler
from spoold.spool import ASIDE, KEPT, Spool
from spoold.uploader import Bandwidth, Budget, Destination, Uploader
from tests.paperclip import App
from tests.parts import BUCKET, NAME, PATH, alone, captured, is_whole_jpeg, ledger_template
from tests.system.harness import ALLOWED_NEXT_OF_ONE

DOUBT_S = 900.0
BLINK_S = LEASE_S / 4
_SIDE_BY_SIDE = 3  # batches that a worker walks at once
"""How long a claim that was asked for surely lasts: `Owner.demand`."""

RECORDS = ("avatars/1", "avatars/2")
NAMES = ("cat.jpg", "note.txt")
STYLES = ("original", "thumb")
STRANGERS = ("avatars/2/README", "avatars/notes.txt", "index.html", f"{HOUSE}/{ASIDE}/nobody's")
OWNERS, OWNED = "owners", "owned"

_LARGE_BYTES = 200
_SMALL_BYTES = 100
_PROBE = ".spoold-probe"


# What the app wrote


@dataclass(slots=True)
class Path_:
    """One path in the spool, as the app knows it.

    versions: every content that it finished writing, oldest first.
    newest: the one that must be safe; None where nothing is promised, as the app removed it before it was uploaded.
    at: which write that was, of all. is_fresh: no version before had these bytes. is_open: it is just being written.
    is_replaced: the app put another attachment in the place of this one, so its key must go.
    is_deleted: spoold has decided that its key must go.
    """

    path: str
    versions: list[bytes] = field(default_factory=list)
    newest: bytes | None = None
    at: int = 0
    is_fresh: bool = False
    is_open: bool = False
    is_replaced: bool = False
    is_deleted: bool = False

    @property
    def record(self) -> str:
        return self.path.rsplit("/", 2)[0]

    @property
    def is_original(self) -> bool:
        return self.path.split("/")[-2] == "original"


class Written:
    """All that the app wrote."""

    def __init__(self) -> None:
        self.paths: dict[str, Path_] = {}
        self._writes = itertools.count(1)

    def __getitem__(self, path: str) -> Path_:
        return self.paths.setdefault(path, Path_(path))

    def finish(self, path: str, content: bytes) -> None:
        """The app finished writing this."""
        it = self[path]
        it.is_fresh = content not in it.versions
        it.versions.append(content)
        it.newest, it.at = content, next(self._writes)
        it.is_open = it.is_replaced = it.is_deleted = False

    def promised(self) -> list[Path_]:
        """Return the paths whose newest version must be safe."""
        return [it for it in self.paths.values() if it.newest is not None and not it.is_open]

    def replacing(self, it: Path_) -> list[Path_]:
        """Return the newer originals of the same record, which may take this path's place (rule 7)."""
        return [
            other
            for other in self.paths.values()
            if other is not it and other.record == it.record and other.is_original and other.at > it.at
        ]

    def may_end_with(self, it: Path_) -> set[bytes | None]:
        """Return what the bucket may hold at this path's key when all is done."""
        if it.newest is None:
            return {None} if it.is_deleted else {None, *it.versions}
        newer = [other for other in self.replacing(it) if other.newest is not None]
        if it.is_replaced and any(other.is_fresh for other in newer):
            return {None}
        return {it.newest, None} if newer else {it.newest}


# What the bucket holds


class Fate(StrEnum):
    """What becomes of a request."""

    FINE = "carried out and answered"
    LOST = "carried out, but the answer is lost"
    FAILS = "not carried out, and no answer"
    NEVER_SENT = "not even sent"
    LATE = "no answer; carried out later"
    NEVER = "no answer; not carried out later either, but nobody can know"
    DENIED = "403"
    REFUSED = "400"
    UNPROVEN = "carried out, but the answer proves nothing"
    PAGE = "a captive portal answers"


@dataclass(eq=False, slots=True)
class Request:
    """A PUT (body is not None) or a DELETE that may still be carried out, until a moment (monotonic), if it lands at all."""

    key: str
    body: bytes | None
    until: float
    lands: bool


class Bucket:
    """S3, as spoold's Store has it: the same verbs, on a network that loses, delays and denies.

    fates: of the next requests, then all is fine. outage: of every request, the probe's too, while it lasts.
    before: called with the verb before each request is sent and when it was carried out ("answer"); it may raise.
    """

    def __init__(self, clock: PlayClock, before: Callable[[str], None], changed: Callable[[str, bytes | None], None]) -> None:
        self.objects: dict[str, bytes] = {}
        self.late: list[Request] = []
        self.fates: deque[Fate] = deque()
        self.outage: Fate | None = None
        self.on_delete: Callable[[str], None] = lambda key: None
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._before = before
        self._changed = changed
        self._uploads = itertools.count(1)
        self._ways = itertools.cycle([True, False])  # each other PUT goes the quick way

    # The world's side

    def carry_out(self, request: Request) -> None:
        if request.body is None:
            self.objects.pop(request.key, None)
        else:
            self.objects[request.key] = request.body
        self._changed(request.key, request.body)

    def settle(self, request: Request, *, lands: bool) -> None:
        """A request that was late lands now, or never."""
        self.late.remove(request)
        if lands:
            self.counts["landed"] += 1
            self.carry_out(request)

    def delay(self, request: Request, *, lands: bool) -> None:
        self.counts["late"] += 1
        self.late.append(Request(request.key, request.body, self._clock.monotonic() + DOUBT_S, lands))

    # The Store's verbs

    def put(self, bucket: str, key: str, body: bytes, headers: Headers, digests: Digests) -> StoredObject:
        assert bucket == BUCKET and hashlib.sha256(body).hexdigest() == digests.sha256, "what was hashed is what is sent"
        self._ask("put", f"put {key}", Request(key, body, 0.0, True))
        return _stored(key, body)

    def has_quick_way(self, bucket: str) -> bool:
        return next(self._ways)

    def begin_put(
        self, bucket: str, key: str, body: bytes, headers: Headers, digests: Digests, *, now: float,
        done: Callable[[StoredObject | SpooldError], None],
    ) -> bool:  # fmt: skip
        try:
            done(self.put(bucket, key, body, headers, digests))
        except (StoreUnavailable, Unproven) as fault:
            done(fault)
        except SpooldError as fault:  # it was refused, and the slow way says how
            done(StoreUnavailable(str(fault), never_sent=True))
        return True

    def put_parts(
        self, bucket: str, key: str, parts: Iterable[bytes], headers: Headers, digests: Digests, *,
        on_upload: Callable[[str], None], at_once: int,
    ) -> StoredObject:  # fmt: skip
        what = f"put {key}"
        try:
            self._ask("begin", what, None)
            on_upload(f"upload-{next(self._uploads)}")
            body = b""
            for part in parts:
                self._ask("part", what, None)
                body += part
        except StoreUnavailable as error:
            error.never_sent = True
            raise
        assert hashlib.sha256(body).hexdigest() == digests.sha256, "what was hashed is what is sent"
        self._ask("complete", what, Request(key, body, 0.0, True))
        return _stored(key, body)

    def delete(self, bucket: str, key: str) -> None:
        self.on_delete(key)
        self._ask("delete", f"delete {key}", Request(key, None, 0.0, True))

    def head(self, bucket: str, key: str) -> StoredObject | None:
        self._ask("head", f"head {key}", None)
        return _stored(key, self.objects[key]) if key in self.objects else None

    def digest(self, bucket: str, key: str, *, version_id: str | None = None) -> Digests | None:
        self._ask("get", f"get {key}", None)
        body = self.objects.get(key)
        return None if body is None else Digests(len(body), hashlib.sha256(body).hexdigest(), _md5(body), "none", "")

    def abort(self, bucket: str, key: str, upload_id: str) -> None:
        self._ask("abort", f"abort {key}", None)

    def probe(self, bucket: str, key: str, headers: Headers) -> None:
        if self.outage is not None:
            raise self._fault(self.outage, f"put {key}")

    def _ask(self, verb: str, what: str, request: Request | None) -> None:
        """Have a request carried out as its fate says; None for those that change no object."""
        try:
            self._before(verb)
        except Crash as crash:
            if request is not None and crash.lands is not None:  # it was under way
                self.delay(request, lands=crash.lands)
            raise
        fate = self.outage or (self.fates.popleft() if self.fates else Fate.FINE)
        if fate is not Fate.FINE:
            self.counts["faults"] += 1
        if request is not None:
            if fate in (Fate.FINE, Fate.LOST, Fate.UNPROVEN):
                self.carry_out(request)
            elif fate in (Fate.LATE, Fate.NEVER):
                self.delay(request, lands=fate is Fate.LATE)
        self._before("answer")
        if fate is not Fate.FINE:
            raise self._fault(fate, what)

    def _fault(self, fate: Fate, what: str) -> SpooldError:
        match fate:
            case Fate.DENIED:
                return StoreDenied(f"{what}: 403 AccessDenied")
            case Fate.REFUSED if what.startswith("put"):
                return ObjectRefused(f"{what}: 400 InvalidRequest")
            case Fate.UNPROVEN | Fate.PAGE:
                return Unproven(f"{what}: {fate}")
        return StoreUnavailable(f"{what}: {fate}", never_sent=fate is Fate.NEVER_SENT)


def _stored(key: str, body: bytes) -> StoredObject:
    return StoredObject(BUCKET, key, len(body), "image/jpeg", _md5(body))


def _md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


# What happens at which moment


class Crash(BaseException):
    """The daemon's process dies. lands: whether the request that was under way is carried out later; None if there was none."""

    def __init__(self, lands: bool | None = None) -> None:
        super().__init__("the process dies")
        self.lands = lands


Doing = tuple[Any, ...]
"""A verb of the Play and its arguments: what happens."""


@dataclass(frozen=True)
class At:
    """Something that happens within daemons' steps, just before the `nth` call (from 0, from now on) at this point.

    point: "ledger" a change of the ledger · "demand" the question whether the claim lasts · a verb of the bucket, or
    "answer" when a request was carried out · a system call.
    """

    point: str
    nth: int
    do: Doing


CALLS = ("open", "stat", "fstat", "fsync", "read", "listdir", "scandir", "unlink", "rmdir", "mkdir")
POINTS = (
    "ledger", "demand", "put", "begin", "part", "complete", "delete", "head", "get", "answer", "rename", "lease", *CALLS
)  # fmt: skip
FAILING = {*CALLS, "rename"} - {"fstat"}
"""What an OS may refuse; fstat of what is open it does not."""

_DANGEROUS = {"unlink", "rename", "rmdir"}


class WatchedOs:
    """The module `os` for spoold's parts: whatever they call is announced."""

    def __init__(self, before: Callable[[str], None], after: Callable[[str], None]) -> None:
        for name in CALLS:
            setattr(self, name, _watched(name, getattr(os, name), before, after))

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _watched(
    name: str, call: Callable[..., Any], before: Callable[[str], None], after: Callable[[str], None]
) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        before(name)
        result = call(*args, **kwargs)
        if name in _DANGEROUS:
            after(name)
        return result

    return watched


class WatchedLedger(Ledger):
    """The ledger; each change is announced."""

    def __init__(self, url: str, *, clock: PlayClock, before: Callable[[str], None]) -> None:
        self._before = before
        super().__init__(url, clock=clock)

    @contextlib.contextmanager
    def write(self) -> Iterator[Any]:
        self._before("ledger")
        with super().write() as change:
            yield change


class Inline(Executor):
    """Runs what it is given at once, one after the other."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:  # what kills the process is not kept for later
            future.set_exception(error)
        return future


class PlayClock:
    """Time that stands still until the play moves it, a minute ahead of the disk's: how long a test runs decides nothing.

    The wall clock is never set back to before the play began, as the disk's real clock stays where it is.
    """

    def __init__(self, pass_: Callable[[float], None]) -> None:
        self._began = time.time() + 60.0
        self.ahead_s = 0.0
        self._monotonic_s = 1_000.0
        self._pass = pass_

    def now(self) -> float:
        return self._began + self.ahead_s

    def monotonic(self) -> float:
        return self._monotonic_s

    def uptime(self) -> float:
        """The machine was up for a day when the play began: no file is from before."""
        return 86_400.0 + self.now() - self._began

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        if not event.is_set():
            self._pass(timeout_s)
        return event.is_set()

    def move(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self.ahead_s += seconds

    def jump(self, seconds: float) -> None:
        self.ahead_s = max(0.0, self.ahead_s + seconds)


# The daemon, a step at a time


@dataclass(frozen=True)
class Settings:
    """What the configuration of a play says. Durations in seconds."""

    styles: tuple[str, ...] | None = None
    deletes: bool = True
    grace_s: float = 10.0
    keep_for_s: float = 0.0
    replaced_after_s: float = 60.0
    multipart_threshold: int = 16_000_000
    settle_s: float = 1.0
    min_age_s: float = 5.0


class Daemon:
    """What spoold.daemon.Daemon builds, without threads: each method is one turn of one of them."""

    def __init__(self, play: Play) -> None:
        self._play = play
        clock, settings = play.clock, play.settings
        self.is_dead = False
        self.stop = threading.Event()
        self.ledger = WatchedLedger(f"sqlite:///{play.directory}/ledger.db", clock=clock, before=play.before)
        self.owner = Owner(play.directory / OWNERS, clock=clock)
        self.spool = Spool(name=NAME, root=play.root, layout=Layout(PATH, PATH, styles=STYLES))
        self._ages = Ages(clock)
        self._has_moved_in = False
        self._unfinished: list[Any] = []
        store: Any = play.bucket
        self._holds = Holds(
            ledger=self.ledger, clock=clock, on_release=lambda: None,
            probes={
                NAME: {
                    "store": lambda: store.probe(BUCKET, _PROBE, Headers("")),
                    "disk": lambda: self.spool.move_in(self.ledger.id),
                }
            },
        )  # fmt: skip
        self._cleaner = Cleaner(
            spool=self.spool, ledger=self.ledger, store=store, ages=self._ages, clock=clock, demand_claim=self._demand,
            rules=cleanup.Rules(
                deletes=settings.deletes, keep_for_s=settings.keep_for_s, min_age_s=settings.min_age_s,
                grace_s=settings.grace_s, keep_empty_dirs_for_s=30.0, trusts=False, doubt_s=DOUBT_S,
            ),
        )  # fmt: skip
        self._looker = Looker(
            spool=self.spool, ledger=self.ledger, images="ends", within_s=600.0, ages=self._ages, on_offer=lambda: None,
            rules=completeness.Rules(lambda _: settings.styles, settings.settle_s, None),
        )  # fmt: skip
        destination = Destination(
            bucket=BUCKET, layout=self.spool.layout, checksum="none", headers_for=lambda _a, _s, sniffed: Headers(sniffed),
            multipart_threshold=settings.multipart_threshold,
        )  # fmt: skip
        uploader = Uploader(
            spool=self.spool, store=store, destination=destination, budget=Budget(1 << 20),
            bandwidth=Bandwidth(None, clock=clock), clock=clock, stop=self.stop, demand_claim=self._demand,
        )  # fmt: skip
        parts = Parts(
            spool=self.spool, uploader=uploader, cleaner=self._cleaner, replaced_after_s=settings.replaced_after_s,
            decodes=False, touch=lambda record: None,
        )  # fmt: skip
        self._pipeline = Pipeline(
            ledger=self.ledger, parts={NAME: parts}, holds=self._holds, retry=Retry(1.0, 300.0, 0), clock=clock,
            pool=Inline(),
        )  # fmt: skip
        self._remover = Remover(
            ledger=self.ledger, owner=self.owner.name, stores={NAME: store}, limits={NAME: 1000}, doubt_s=DOUBT_S,
            clock=clock,
            demand_claim=self._demand,
        )  # fmt: skip
        self._settler = Settler(ledger=self.ledger, owner=self.owner.name, stores={NAME: store}, doubt_s=DOUBT_S, clock=clock)

    def _demand(self) -> None:
        self._play.before("demand")
        self.owner.demand()
        self._play.demand_claim_is_sure(self.owner.name)

    def begin(self) -> None:
        """What `Daemon.run` does before its threads."""
        settings = self._play.settings
        self._holds.forget_before()
        self.bury_owners()
        self._shorten_waits()
        self.ledger.note_cleanup(NAME, f"delete: {settings.deletes}", lets_go=settings.deletes)

    def _shorten_waits(self) -> None:
        settings = self._play.settings
        self.ledger.shorten_waits(
            NAME, keep_for_s=settings.keep_for_s,
            at_most_s={
                "min_age": settings.min_age_s, "grace": settings.grace_s, "dirs": 30.0, "doubt": DOUBT_S, "attempt": 0.0,
                "retry": 360.0,
            },
        )  # fmt: skip

    def sweep(self) -> None:
        """The watch thread: move in if that is due, look at every record there is and at those that the ledger waits for."""
        try:
            if not self._has_moved_in:
                self.spool.move_in(self.ledger.id)
                self._cleaner.recover(self.owner.name, lease_s=LEASE_S)
                self._has_moved_in = True
            found = [record for record in self.spool.records() if isinstance(record, str)]
            for record in dict.fromkeys([*found, *self.ledger.unfinished(NAME)]):
                self._look(record)
        except SpoolBroken as fault:
            self._has_moved_in = False
            with contextlib.suppress(LedgerUnavailable):
                self._holds.hold(NAME, fault)
        except LedgerUnavailable:
            pass

    def look(self, record: str) -> None:
        """The watch thread: look at one record, because of an event."""
        if self._has_moved_in:
            with contextlib.suppress(LedgerUnavailable, SpoolBroken):
                self._look(record)

    def _look(self, record: str) -> None:
        try:
            alone(self._looker.look(record))
        except (SpoolBroken, LedgerUnavailable):
            raise
        except SpooldError:
            pass  # once more, later

    def work(self) -> bool:
        """A worker: claim, walk. Say whether there was something to do."""
        claims: list[Claim] = []
        try:
            while self._unfinished:
                self.ledger.put_back(self._unfinished[-1])
                self._unfinished.pop()
            self._play.counts["turns"] += 1
            if not self._has_moved_in or self.stop.is_set():
                return False
            with self.owner.at_work() as may_claim:
                if may_claim:
                    claims = self.ledger.claim(self.owner.name, [NAME], lease_s=LEASE_S, crashes=3, at_most=_SIDE_BY_SIDE)
                if claims:
                    self._play.counts["walks"] += len(claims)
                    ends = self._pipeline.walk_all(claims)
                    self._unfinished = [c for c, end in zip(claims, ends, strict=True) if isinstance(end, LedgerUnavailable)]
        except LedgerUnavailable:
            pass  # nothing was claimed, or what was is not known
        return bool(claims)

    def tend(self) -> None:
        """The thread that tends."""
        try:
            self._holds.probe_due()
            with self.owner.at_work() as may_claim:
                if may_claim and not self.stop.is_set():
                    self._remover.remove_due(lease_s=LEASE_S, held=self._holds.held())
                    self._settler.settle_due(lease_s=LEASE_S, held=self._holds.held())
            self.ledger.prune(older_than_s=30 * 86400.0)
            self._shorten_waits()
        except LedgerUnavailable:
            pass

    def renew(self) -> None:
        """The lease thread."""
        asked_at = self._play.clock.monotonic()
        with contextlib.suppress(LedgerUnavailable):
            self.ledger.renew(self.owner.name, lease_s=LEASE_S)
            self.owner.renewed(asked_at)
            self.bury_owners()

    def bury_owners(self) -> None:
        for name in self.ledger.owners():
            if self.owner.is_dead(name):
                self.ledger.bereave(name)
                self.owner.forget(name)

    def die(self) -> None:
        """What the kernel does when the process ends, however it ends: the lock file stays, unlocked."""
        self.is_dead = True
        self.ledger.close()
        os.close(self.owner._fd)


# All of it together


class Play:
    """One play: a disk, a bucket, an app, at most two daemons. Each public verb is a step; the laws hold after each.

    Steps within steps are for interruptions: `At.do` names a verb and its arguments.
    """

    def __init__(self, settings: Settings | None = None, *, strangers: bool = False) -> None:
        self.settings = settings or Settings()
        self.counts: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(captured())
        memory = Path("/dev/shm")
        where = memory if os.access(memory, os.W_OK) else None
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=where, prefix="spoold-play-")))
        self.root = self.directory / "spool"
        (self.directory / OWNED).mkdir()
        self.root.mkdir()
        (self.directory / "ledger.db").write_bytes(ledger_template())
        self.clock = PlayClock(self._pass)
        self.bucket = Bucket(self.clock, self.before, self._bucket_changed)
        self.bucket.on_delete = self._demand_may_delete
        self.written = Written()
        self.app = App(self.root)
        self.daemons: list[Daemon] = []
        self._running: list[Daemon] = []
        self._armed: list[_Armed] = []
        self.calls: Counter[str] = Counter()  # at each point
        self._is_interrupting = 0
        self._has_jumped = False
        self._current: dict[str, str] = {}  # record → the name of its attachment now
        self._handles: dict[str, _Handle] = {}
        self._saving: set[str] = set()  # records: the app does one thing with each at a time
        self._away: dict[str, Path] = {}  # record → where its directory is now
        self._numbers = itertools.count(1)
        self._newest_ctime_ns = 0
        self._history_id = 0
        self._batches: dict[tuple[int, int | None], str | None] = {}
        self.strangers: dict[str, bytes] = {}
        self._first_level: set[str] = set()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        watched = WatchedOs(self.before, self._after)
        for module in (spoold.spool, spoold.aside, spoold.cleanup, spoold.uploader):
            patch.setattr(module, "os", watched)
        rename, lease = spoold.aside.rename_noreplace, spoold.spool.is_open_for_writing
        patch.setattr(spoold.aside, "rename_noreplace", _watched("rename", rename, self.before, self._after))
        for module in (spoold.aside, spoold.cleanup, spoold.looker):
            patch.setattr(module, "is_open_for_writing", _watched("lease", lease, self.before, self._after))
        self.start()
        if strangers:
            self._plant()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle.fd)
        for daemon in self.daemons:
            daemon.die()
        self.daemons.clear()
        self._stack.close()

    def do(self, doing: Doing) -> None:
        """Take a step: a verb of this class and its arguments."""
        verb, *arguments = doing
        getattr(self, verb)(*arguments)

    # Interruptions

    def arm(self, *interruptions: At) -> None:
        """Have these happen, each at its moment, whosever step that is in."""
        self.counts["armed"] += len(interruptions)
        self._armed += [_Armed(at, at.nth) for at in interruptions]

    def before(self, point: str) -> None:
        """One of spoold's parts is about to do this."""
        daemon = self._running[-1] if self._running else None
        if daemon is None:
            return
        if daemon.is_dead:
            raise Crash  # it has died, and what unwinds does nothing any more
        if self._is_interrupting:
            return
        self.calls[point] += 1
        for armed in [armed for armed in self._armed if armed.at.point == point]:
            if armed.left:
                armed.left -= 1
            else:
                self._armed.remove(armed)
                self._interrupt(point, armed.at.do)

    def _interrupt(self, point: str, do: Doing) -> None:
        verb, *arguments = do
        self.counts["interruptions"] += 1
        if verb == "crash":
            self._running[-1].is_dead = True
            raise Crash(*arguments)
        if verb == "fail":
            self._fail(point, *arguments)
            return
        if verb == "freeze" and point != "demand":
            do = verb, min(arguments[0], BLINK_S)  # from the demand to its effect it is not longer
        self._is_interrupting += 1
        try:
            self.do(do)
        finally:
            self._is_interrupting -= 1

    def _fail(self, point: str, code: int) -> None:
        self.counts["faults"] += 1
        if point == "ledger":
            raise LedgerUnavailable("use ledger: disk I/O error")
        if point in FAILING:
            raise OSError(code, os.strerror(code), point)

    def _after(self, call: str) -> None:
        self.demand_nothing_lost(f"after {call}")

    def _bucket_changed(self, key: str, body: bytes | None) -> None:
        self.demand_nothing_lost(f"after {'DELETE' if body is None else 'PUT'} {key}")

    @contextlib.contextmanager
    def _step_of(self, daemon: Daemon, interruptions: Sequence[At]) -> Iterator[None]:
        """Let a daemon do something, with interruptions unless this is one itself; it may die of them."""
        is_outermost = not self._is_interrupting
        if is_outermost:
            self._has_jumped = False
            self.arm(*interruptions)
        self._running.append(daemon)
        try:
            yield
        except Crash:
            self.counts["crashes"] += 1
            self._bury(daemon)
        finally:
            self._running.pop()
        if daemon.stop.is_set() and daemon in self.daemons and daemon not in self._running:
            self._bury(daemon)
        self.demand_laws()

    # The app

    def save(
        self, record: str, name: str, styles: tuple[str, ...] = STYLES, how: Any = "rename", meanwhile: Sequence[Doing] = ()
    ) -> None:
        """Write an attachment, in the place of the one that the record has; between its steps these things happen."""
        if self._is_busy(record):
            return
        styles = self.settings.styles or styles
        self._destroy(record, replaced_by=name)
        for path, it in self.written.paths.items():
            if it.record == record and path not in {self._path(record, style, name) for style in styles}:
                it.is_replaced = it.is_replaced or not self._lies_aside(path)
        self._save(record, name, {style: self._content(self._path(record, style, name)) for style in styles}, how, meanwhile)

    def save_beside(self, record: str, name: str) -> None:
        """Write another attachment beside the one that the record has: an id was used again after a rollback."""
        if not self._is_busy(record):
            self._save(record, name, {style: self._content(self._path(record, style, name)) for style in STYLES}, "rename", ())

    def save_again(self, record: str) -> None:
        """Write what the record has once more: the same bytes."""
        name = self._current.get(record)
        if name is None or self._is_busy(record):
            return
        its = {style: self.written[self._path(record, style, name)].newest for style in STYLES}
        contents = {style: content for style, content in its.items() if content is not None}
        if "original" in contents:
            self._destroy(record, replaced_by=name)
            self._save(record, name, contents, "rename", ())

    def _save(self, record: str, name: str, contents: dict[str, bytes], how: Any, meanwhile: Sequence[Doing]) -> None:
        attachment, _, id = record.partition("/")
        doings = deque(meanwhile)
        is_slow = False

        def between(step: str) -> None:
            style, _, what = step.partition(" ")
            if what == "named":
                self._stamp(self._path(record, style, name))
                self.written.finish(self._path(record, style, name), contents[style])
            began = self.clock.monotonic()
            if doings:
                self.do(doings.popleft())
            nonlocal is_slow
            is_slow = is_slow or self.clock.monotonic() - began >= self.settings.min_age_s

        self._current[record] = name
        self._saving.add(record)
        try:
            self.app.save(attachment, id, name, contents, how=how, between=between)
        except FileNotFoundError:
            if not is_slow:  # one that waits longer than `min_age` between rename and chmod is disturbed (FACTS 3)
                raise
        finally:
            self._saving.discard(record)
        for style in contents:
            self._stamp(self._path(record, style, name))
        self._done_by_app()

    def late_style(self, record: str) -> None:
        """Make one style again, as `reprocess!` does."""
        name = self._current.get(record)
        if name is not None and not self._is_busy(record) and self.written[self._path(record, "original", name)].newest:
            self._save(record, name, {"thumb": self._content(self._path(record, "thumb", name))}, "rename", ())

    def remove(self, record: str) -> None:
        """Remove the local files, those that are there, and prune empty directories."""
        if record in self._current and not self._is_busy(record):
            self._destroy(record, replaced_by=None)
            self._done_by_app()

    def _destroy(self, record: str, *, replaced_by: str | None) -> None:
        attachment, _, id = record.partition("/")
        for name in NAMES if replaced_by is not None else (self._current[record],):
            paths = [self._path(record, style, name) for style in STYLES]
            there = [path for path in paths if (self.root / path).exists()]
            self.app.destroy(attachment, id, name)
            for path in there:
                self._removed(path)

    def _removed(self, path: str) -> None:
        """The app removed a file of its own: what was not proven in the bucket by then is not promised any more."""
        it = self.written[path]
        is_proven = (
            it.newest is not None and self.bucket.objects.get(path) == it.newest and self._live().get(path) == _md5(it.newest)
        )
        if not is_proven or self._threats(it):
            it.newest = None

    def rewrite(self, record: str, style: str, keeps_mtime: bool = False, same_size: bool = True) -> None:
        """Write new content into the file that is there."""
        if (found := self._writable(record, style)) is None:
            return
        path, file = found
        before = os.stat(file)
        content = self._content(path, size=before.st_size if same_size else None)
        with file.open("r+b") as opened:
            opened.write(content)
            opened.truncate()
        if keeps_mtime:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._stamp(path)
        self.written.finish(path, content)
        self._done_by_app()

    def append(self, record: str, style: str) -> None:
        """Write more at the end of the file that is there."""
        if (found := self._writable(record, style)) is None:
            return
        path, file = found
        with file.open("ab") as opened:
            opened.write(b" and more")
        self._stamp(path)
        self.written.finish(path, file.read_bytes())
        self._done_by_app()

    def touch(self, record: str, style: str, old: bool = False) -> None:
        """Change the file's times or mode, not its bytes."""
        if (found := self._writable(record, style)) is not None:
            path, file = found
            if old:
                os.utime(file, (1e9, 1e9))
            else:
                file.chmod(0o600)
            self._stamp(path)

    def link(self, record: str, name: str) -> None:
        """Save an original that is a hard link to a file which the app goes on owning."""
        if self._is_busy(record):
            return
        self._destroy(record, replaced_by=name)
        path = self._path(record, "original", name)
        for other in self.written.paths.values():
            if other.record == record and other.path != path:
                other.is_replaced = other.is_replaced or not self._lies_aside(other.path)
        content = self._content(path)
        owned = self.directory / OWNED / str(next(self._numbers))
        owned.write_bytes(content)
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(owned, file)
        self._current[record] = name
        self._stamp(path)
        self.written.finish(path, content)
        self._done_by_app()

    def rewrite_links(self) -> None:
        """Write into the files that the app owns, by their own names: a new version where they are still in the spool."""
        for owned in (self.directory / OWNED).iterdir():
            inode, content = owned.stat().st_ino, owned.read_bytes()
            for it in self.written.promised():
                if it.newest != content:
                    continue
                file = self.root / it.path
                is_there = file.exists() and file.stat().st_ino == inode
                lies_aside = not file.exists() and any(path.stat().st_ino == inode for path in self._aside())
                if not is_there and not (lies_aside and not self._running):
                    continue  # the spool has nothing to do with it any more
                new = self._content(it.path, size=len(content))
                with owned.open("r+b") as opened:
                    opened.write(new)
                if is_there:
                    self._stamp(it.path)
                self.written.finish(it.path, new)

    def begin_copy(self, record: str, name: str, style: str) -> None:
        """Begin to copy into a final name, and hold it open."""
        if self._is_busy(record) or (style != "original" and self._current.get(record) != name):
            return
        if style == "original" and self._current.get(record) != name:
            self._destroy(record, replaced_by=name)
        path = self._path(record, style, name)
        content = self._content(path)
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            self._removed(path)  # what was there is gone by the app's own hand
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._current[record] = name
        self.written[path].is_open = True
        os.write(fd, content[: len(content) // 2])
        self._handles[record] = _Handle(fd, path, content, len(content) // 2)
        self._stamp(path)

    def go_on_copying(self, record: str) -> None:
        """Copy a little more."""
        if (handle := self._handles.get(record)) is not None and handle.offset < len(handle.content) - 10:
            os.write(handle.fd, handle.content[handle.offset : handle.offset + 5])
            handle.offset += 5
            self._stamp(handle.path)

    def end_copy(self, record: str) -> None:
        """Copy the rest, give it an old mtime and close it."""
        if (handle := self._handles.pop(record, None)) is None:
            return
        os.write(handle.fd, handle.content[handle.offset :])
        os.utime(handle.fd, (1e9, 1e9))
        os.close(handle.fd)
        self._stamp(handle.path)
        self.written.finish(handle.path, handle.content)
        self._done_by_app()

    def take_away(self, record: str) -> None:
        """Move a record's directory out of the spool: its files come back with it as they are, to the very ctime."""
        place, away = self.root / record, self.directory / f"away.{next(self._numbers)}"
        has_strangers = any(path.startswith(f"{record}/") for path in self.strangers)
        if not self._is_busy(record) and not has_strangers and place.is_dir():
            place.rename(away)
            self._away[record] = away

    def bring_back(self, record: str) -> None:
        """Move it back; what was given back to its place meanwhile makes way for what is newer."""
        if (away := self._away.pop(record, None)) is None:
            return
        place = self.root / record
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            away.rename(place)
            return
        for file in [path for path in away.rglob("*") if path.is_file()]:
            to = place / file.relative_to(away)
            to.parent.mkdir(parents=True, exist_ok=True)
            file.rename(to)
            self._stamp(str(to.relative_to(self.root)))
        shutil.rmtree(away)

    def _is_busy(self, record: str) -> bool:
        """Say whether somebody is at this record."""
        return record in self._handles or record in self._saving or record in self._away

    def _writable(self, record: str, style: str) -> tuple[str, Path] | None:
        """Return the file of the attachment that the record has now, if it is there."""
        name = self._current.get(record)
        if name is None or self._is_busy(record):
            return None
        path = self._path(record, style, name)
        return (path, self.root / path) if (self.root / path).exists() else None

    def _path(self, record: str, style: str, name: str) -> str:
        return f"{record}/{style}/{name}"

    def _content(self, path: str, *, size: int | None = None) -> bytes:
        """Return a content never used before, whole by its format."""
        number = next(self._numbers)
        text = f"{path} {number} ".encode()
        bare = len(is_whole_jpeg(b"")) if path.endswith(".jpg") else 0
        room = max((size or (_LARGE_BYTES if number % 3 == 0 else _SMALL_BYTES)) - bare, len(text))
        text = text.ljust(room, b".")
        return is_whole_jpeg(text) if bare else text

    def _stamp(self, path: str) -> None:
        """See that the file's ctime is newer than any before: the disk's clock must not stand still between two steps.

        In the world a second passes before a file is taken; here no time may.
        """
        file = self.root / path
        with contextlib.suppress(FileNotFoundError):
            while (status := os.stat(file)).st_ctime_ns <= self._newest_ctime_ns:
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            self._newest_ctime_ns = status.st_ctime_ns

    def _done_by_app(self) -> None:
        self.counts["writes"] += 1
        self._first_level = {path.name for path in self.root.iterdir()}

    def _plant(self) -> None:
        """Put files of strangers where they do not belong."""
        for path in STRANGERS:
            self.strangers[path] = f"{path} of a stranger".encode()
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.strangers[path])

    # The daemons

    def start(self, interruptions: Sequence[At] = ()) -> None:
        """Start a daemon; there are two at most."""
        if len(self.daemons) < 2:
            daemon = Daemon(self)
            self.daemons.append(daemon)
            with self._step_of(daemon, interruptions):
                with contextlib.suppress(LedgerUnavailable):
                    daemon.begin()
                daemon.sweep()

    def sweep(self, number: int = 0, interruptions: Sequence[At] = ()) -> None:
        self._let(number, lambda daemon: daemon.sweep(), interruptions)

    def settle(self, number: int = 0) -> None:
        """Sweep until what lies there has been quiet for long enough."""
        self.sweep(number)
        self.advance(1.5)
        self.sweep(number)

    def look(self, record: str, number: int = 0, interruptions: Sequence[At] = ()) -> None:
        self._let(number, lambda daemon: daemon.look(record), interruptions)

    def work(self, number: int = 0, interruptions: Sequence[At] = ()) -> None:
        self._let(number, lambda daemon: daemon.work(), interruptions)

    def tend(self, number: int = 0, interruptions: Sequence[At] = ()) -> None:
        self._let(number, lambda daemon: daemon.tend(), interruptions)

    def drain(self, number: int = 0) -> None:
        """SIGTERM; who is at work ends what is under way, and the process ends when it is idle."""
        if (daemon := self._daemon(number)) is not None:
            daemon.stop.set()
            if daemon not in self._running:
                self._bury(daemon)

    def kill(self, number: int = 0, on_another_host: bool = False) -> None:
        """SIGKILL while it is idle. on_another_host: nobody can see that it is dead, its claims must run out."""
        daemon = self._daemon(number)
        if daemon is not None and daemon not in self._running:
            self.counts["crashes"] += 1
            if on_another_host:
                daemon.owner._path.unlink()
            self._bury(daemon)

    def _bury(self, daemon: Daemon) -> None:
        daemon.die()
        self.daemons.remove(daemon)

    def _daemon(self, number: int) -> Daemon | None:
        return self.daemons[number % len(self.daemons)] if self.daemons else None

    def _let(self, number: int, do: Callable[[Daemon], object], interruptions: Sequence[At]) -> None:
        daemon = self._daemon(number)
        if daemon is None or daemon.stop.is_set():
            return
        with self._step_of(daemon, interruptions):
            do(daemon)

    # The world

    def advance(self, seconds: float) -> None:
        """Let time pass; daemons renew their claims meanwhile."""
        while seconds > 0:
            chunk = min(seconds, LEASE_S / 6) if self._running else seconds
            self._pass_alone(chunk)
            self._renew()
            seconds -= chunk

    def freeze(self, seconds: float) -> None:
        """Let time pass for all but the daemon that is at work: it is stopped."""
        frozen = self._running[-1] if self._running else None
        self._pass_alone(seconds)
        self._renew(but=frozen)

    def _pass(self, seconds: float) -> None:
        """A daemon waits."""
        self._is_interrupting += 1
        try:
            self.advance(seconds)
        finally:
            self._is_interrupting -= 1

    def _renew(self, but: Daemon | None = None) -> None:
        for daemon in self.daemons:
            if daemon is not but and not daemon.is_dead:
                self._running.append(daemon)
                self._is_interrupting += 1
                try:
                    daemon.renew()
                finally:
                    self._is_interrupting -= 1
                    self._running.pop()

    def _pass_alone(self, seconds: float) -> None:
        end = self.clock.monotonic() + seconds
        for request in sorted(self.bucket.late, key=lambda request: request.until):
            if request.until <= end:  # later than this it cannot land (rule 6)
                self.clock.move(max(0.0, request.until - self.clock.monotonic()))
                self.bucket.settle(request, lands=request.lands)
        self.clock.move(end - self.clock.monotonic())

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back."""
        self._has_jumped = True
        self.clock.jump(seconds)

    def fates(self, *fates: Fate) -> None:
        """Say what becomes of the next requests."""
        self.bucket.fates.extend(fates)

    def outage(self, fate: Fate | None) -> None:
        """From now on every request ends like this; None: all is well again."""
        self.bucket.outage = fate

    def settle_late(self, number: int, lands: bool) -> None:
        """One of the requests that are late lands now, or never."""
        if self.bucket.late:
            self.bucket.settle(self.bucket.late[number % len(self.bucket.late)], lands=lands)

    # The laws

    def demand_laws(self) -> None:
        self.demand_nothing_lost("after a step")
        self._demand_nothing_half_written()
        self._demand_nothing_foreign_touched()
        self._demand_legal_states()

    def demand_nothing_lost(self, when: str) -> None:
        """The newest version of each path is on disk, or proven in the bucket where nothing can revert it."""
        promised = self.written.promised()
        if not promised:
            return
        on_disk = self._contents_on_disk()
        for it in promised:
            if it.newest in on_disk:
                continue
            assert self.bucket.objects.get(it.path) == it.newest, f"lost {when}: {it.newest!r} of {it.path}"
            assert not self._threats(it), f"may still be lost {when}: {it.path}, by {self._threats(it)}"

    def _threats(self, it: Path_) -> list[Request]:
        return [request for request in self.bucket.late if request.key == it.path and request.body != it.newest]

    def _demand_nothing_half_written(self) -> None:
        for key, body in self.bucket.objects.items():
            assert body in self.written[key].versions, f"half-written or foreign: {body!r} at {key}"

    def _demand_nothing_foreign_touched(self) -> None:
        for path, content in self.strangers.items():
            assert content == (self.root / path).read_bytes(), f"touched {path}"
        assert self._first_level <= {path.name for path in self.root.iterdir()} | {HOUSE}, "a first level went"

    def _demand_may_delete(self, key: str) -> None:
        """Rule 7: a key goes only when a newer original of the record is proven, and its own newest is not needed."""
        it = self.written[key]
        is_on_disk = it.newest in self._contents_on_disk()
        newer = [other for other in self.written.replacing(it) if self.bucket.objects.get(other.path) in other.versions]
        assert newer or it.newest is None or is_on_disk, f"deletes {key}, which nothing has replaced"
        if newer or it.newest is None:
            it.newest, it.is_deleted = None, not is_on_disk  # from now on it need not be there

    def demand_claim_is_sure(self, owner: str) -> None:
        """Who was told that his claims last has one, and it lasts a blink."""
        if self._has_jumped:
            return  # claims run out by the wall clock
        rows = self.query("SELECT until FROM claim WHERE owner = ?", owner)
        assert rows, "a claim that surely lasts was taken over"
        assert all(until >= self.clock.now() for (until,) in rows), "a claim that surely lasts has run out"

    def _demand_legal_states(self) -> None:
        rows = self.query("SELECT id, record_key, batch_id, event FROM history WHERE id > ? ORDER BY id", self._history_id)
        told = set().union(*ALLOWED_NEXT_OF_ONE["batch"].values(), *ALLOWED_NEXT_OF_ONE["waiting"].values())
        for identifier, record, batch, event in rows:
            self._history_id = identifier
            if event in told:
                before = self._batches.get((record, batch))
                allowed = ALLOWED_NEXT_OF_ONE["waiting" if batch is None else "batch"]
                assert event in allowed[before], f"{event} after {before} of batch {batch}"
                self._batches[record, batch] = event

    def _live(self) -> dict[str, str]:
        """Return the ETag that the ledger holds of each live object."""
        return dict(self.query("SELECT key, etag FROM object"))

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self._database().execute(statement, parameters).fetchall()

    def _database(self) -> Any:
        import sqlite3

        if not hasattr(self, "_connection"):
            self._connection = self._stack.enter_context(
                contextlib.closing(sqlite3.connect(self.directory / "ledger.db", isolation_level=None))
            )
        return self._connection

    def _contents_on_disk(self) -> set[bytes]:
        found = set()
        for root in (self.root, *self._away.values()):
            for directory, _, names in os.walk(root):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        found.add(Path(directory, name).read_bytes())
        return found

    def _aside(self) -> list[Path]:
        directory = self.root / HOUSE / ASIDE
        return list(directory.iterdir()) if directory.is_dir() else []

    def _lies_aside(self, path: str) -> bool:
        newest = self.written[path].newest
        return any(file.read_bytes() == newest for file in self._aside())

    # The end

    def end(self) -> None:
        """Let everything come to rest, with all faults off, and demand what must be true then."""
        self.bucket.fates.clear()
        self.bucket.outage = None
        self._armed.clear()
        for record in list(self._handles):
            self.end_copy(record)
        for record in list(self._away):
            self.bring_back(record)
        for turn in range(100):
            self._complete()
            if not self.daemons:
                self.start()
            for daemon in list(self.daemons):
                with self._step_of(daemon, ()):
                    daemon.ledger.retry(None)
                    daemon.sweep()
                    for _ in range(50):
                        if not daemon.work():
                            break
                    daemon.tend()
            if not (waits := self._moments()):
                break
            # What is overdue waits for something that the ledger does not tell: a doubt's end, a probe of what is held.
            self.advance(min((due_in_s for _, due_in_s in waits if due_in_s > 0.01), default=2.0 + turn) + 0.01)
        else:
            raise AssertionError(f"it does not come to rest: {self._moments()}; {self.query('SELECT * FROM batch')}")
        self._demand_all_is_done()

    def _complete(self) -> None:
        """Where an original needs its styles, the app does not leave it without."""
        for record, name in self._current.items():
            there = [style for style in STYLES if (self.root / self._path(record, style, name)).exists()]
            if self.settings.styles and there == ["original"]:
                self.late_style(record)

    def _moments(self) -> list[tuple[str, float]]:
        """Return in how many seconds somebody has something to do, and what."""
        now = self.clock.now()
        waits = [
            (f"batch {id}: {what}", due - now)
            for id, what, due in self.query(
                "SELECT id, state || ' ' || waiting_for, due_at FROM batch WHERE due_at IS NOT NULL"
            )
        ]
        waits += [(f"replaced {key}", due - now) for key, due in self.query("SELECT key, due_at FROM replaced")]
        waits += [(f"claim of {record}", until - now) for record, until in self.query("SELECT record_key, until FROM claim")]
        waits += [("late", request.until - self.clock.monotonic()) for request in self.bucket.late]
        waits += [(f"sighting: {reason}", 0.0) for (reason,) in self.query("SELECT reason FROM sighting WHERE state != 'gone'")]
        waits += [(state, 0.0) for (state,) in self.query("SELECT state FROM batch WHERE state IN ('pending', 'dead')")]
        waits += [
            (f"overwritten {key}", 0.0)
            for (key,) in self.query(
                "SELECT o.key FROM object o JOIN intent i ON i.key = o.key AND i.kind = 'put' AND i.digest <> o.digest "
                "WHERE i.doubt_at IS NOT NULL OR i.answer = 'confirmed'"
            )
        ]
        return waits

    def _demand_all_is_done(self) -> None:
        for path, it in self.written.paths.items():
            found, allowed = self.bucket.objects.get(path), self.written.may_end_with(it)
            assert found in allowed, f"the bucket ends with {found!r} at {path}, not with one of {allowed}"
        for key, etag in self._live().items():
            body = self.bucket.objects.get(key)
            assert body is not None and _md5(body) == etag, f"the ledger tells of {etag} at {key}, which holds {body!r}"
        for file in (file for file in self.root.rglob("*") if file.is_file()):
            path = str(file.relative_to(self.root))
            if path in self.strangers or path in (f"{HOUSE}/canary", f"{HOUSE}/owner") or not self.settings.deletes:
                continue
            if path.startswith((f"{HOUSE}/owner.", f"{HOUSE}/whose.")):
                continue  # a draft of our own, which a crash left
            assert path.startswith(f"{HOUSE}/{KEPT}/"), f"left behind: {path}"
            assert file.read_bytes() not in {it.newest for it in self.written.promised()}, f"the newest version is in {path}"


@dataclass(eq=False, slots=True)
class _Armed:
    """An interruption that waits for its moment, and how many calls will pass before."""

    at: At
    left: int


@dataclass(slots=True)
class _Handle:
    """A file that the app has open for writing: what it will hold, and how much of that it holds."""

    fd: int
    path: str
    content: bytes
    offset: int


FAULTS = (errno.EIO, errno.ENOSPC, errno.EACCES)
