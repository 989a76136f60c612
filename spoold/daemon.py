"""Build the parts, run the threads, drain when asked to."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from spoold import cleanup, completeness, config
from spoold.cleanup import Cleaner, Remover
from spoold.clock import Ages, Clock, SystemClock
from spoold.errors import LedgerUnavailable, SpooldError
from spoold.holds import Holds
from spoold.ledger import Ledger
from spoold.looker import Looker
from spoold.model import Claim, Headers
from spoold.orphans import Orphans
from spoold.owner import LEASE_S, OWNERS, Owner
from spoold.pipeline import Parts, Pipeline, Retry
from spoold.rebuild import Rebuilder, Source
from spoold.settler import Settler
from spoold.spool import Spool
from spoold.steps import Turn
from spoold.store import Store
from spoold.uploader import Bandwidth, Budget, Destination, Uploader
from spoold.watcher import Watcher
from spoold.window import Window

log = structlog.get_logger()

DRAINED, LEFT, REFUSED, CRASHED = 0, 75, 69, 70
LEDGER_LOST = -1
"""No exit code: the ledger was damaged and is out of the way; another daemon in this process begins it anew."""

_MOST_WORKERS = 4
_SIDE_BY_SIDE = 32  # batches that one worker walks at once
_AUTO_CONCURRENCY = 32
_QUICK_CONCURRENCY = 128
_MEMORY_BYTES = 64 << 20  # of files in flight
_PATIENCE_S = 0.1  # so that what is let go a little later goes with others
_IDLE_S = 1.0
_TEND_EVERY_S = 0.5
_REMOVE_EVERY_S = 5.0
_ABORT_EVERY_S = 300.0
_PRUNE_EVERY_S = 3600.0
_RESERVE_EVERY_S = 60.0
_REBUILD_EVERY_S = 60.0
_HISTORY_LASTS_S = 30 * 86400.0
_WAITED_FOR = {"attempt", "clearing", "min_age", "grace", "dirs"}
_NOT_LEFT = _WAITED_FOR | {"keep_for"}


class Daemon:
    """All of spoold in one process.

    once: end as soon as nothing is left to do, instead of watching for more.
    """

    def __init__(self, settings: config.Settings, *, clock: Clock | None = None, once: bool = False) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._once = once
        self._stop = threading.Event()
        self._work = threading.Condition()
        self._turn = Turn()
        self._busy = 0
        self._has_lookout = False
        self._is_told_to_stop = False
        self._crash: BaseException | None = None
        self._low_reserve: LedgerUnavailable | None = None
        self._starting = {spool.name for spool in settings.spools}
        self._recovered: set[str] = set()  # nothing of a spool is walked before what lies aside in it was seen to
        try:
            os.makedirs(settings.state_dir, mode=0o750, exist_ok=True)
            self._ledger = Ledger(settings.ledger_url, clock=self._clock)
            self._owner = Owner(settings.state_dir / OWNERS, clock=self._clock)
        except OSError as error:
            hint = "set state_dir to a directory that the daemon's user may write into"
            raise LedgerUnavailable(f"use state_dir {settings.state_dir}: {error.strerror}", hint=hint) from error
        concurrency = settings.upload.concurrency if settings.upload.concurrency != "auto" else _AUTO_CONCURRENCY
        quick = settings.upload.concurrency if settings.upload.concurrency != "auto" else _QUICK_CONCURRENCY
        self._workers = min(_MOST_WORKERS, concurrency)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="put")
        self._part_pool = ThreadPoolExecutor(concurrency, thread_name_prefix="part")
        self._bandwidth = Bandwidth(settings.upload.bandwidth, clock=self._clock)
        self._store = Store(
            endpoint_url=settings.s3.endpoint_url, region=settings.s3.region, profile=settings.s3.profile,
            addressing_style=settings.s3.addressing_style, checksum=settings.s3.checksum, connections=2 * concurrency + 2,
            quick_connections=quick if settings.upload.client == "fast" else 0, pool=self._part_pool,
            pace=None if self._bandwidth.is_unlimited else self._bandwidth.pace,
        )  # fmt: skip
        most = quick if settings.upload.client == "fast" else concurrency
        self._windows = {
            spool.bucket: Window(
                spool.bucket, at_most=most, is_pinned=settings.upload.concurrency != "auto", clock=self._clock
            )
            for spool in settings.spools
        }  # fmt: skip
        self._budget = Budget(_MEMORY_BYTES)
        self._ages = Ages(self._clock)
        self._spools = {spool.name: self._spool(spool) for spool in settings.spools}
        self._holds = Holds(
            ledger=self._ledger, clock=self._clock, on_release=self._wake,
            probes={spool.name: self._probes(spool) for spool in settings.spools},
        )  # fmt: skip
        self._cleaners = {spool.name: self._cleaner(spool) for spool in settings.spools}
        self._watchers = {spool.name: self._watcher(spool) for spool in settings.spools}
        retry = settings.upload.retry
        self._pipeline = Pipeline(
            ledger=self._ledger, parts={spool.name: self._parts(spool) for spool in settings.spools}, holds=self._holds,
            retry=Retry(retry.initial, retry.max, retry.give_up_after), clock=self._clock, pool=self._pool, turn=self._turn,
        )  # fmt: skip
        self._remover = Remover(
            ledger=self._ledger, owner=self._owner.name, stores={spool.name: self._store for spool in settings.spools},
            limits={spool.name: spool.max_deletes_per_hour for spool in settings.spools},
            doubt_s=settings.upload.doubt, clock=self._clock, demand_claim=self._owner.demand,
        )  # fmt: skip
        self._settler = Settler(
            ledger=self._ledger, owner=self._owner.name, stores={spool.name: self._store for spool in settings.spools},
            doubt_s=settings.upload.doubt, clock=self._clock,
        )  # fmt: skip
        self._orphans = Orphans(
            ledger=self._ledger, owner=self._owner.name, stores={spool.name: self._store for spool in settings.spools}
        )  # fmt: skip
        self._rebuilder = Rebuilder(
            ledger=self._ledger, store=self._store,
            sources={s.name: Source(self._spools[s.name].layout, s.bucket, _beginning_of(s.key)) for s in settings.spools},
        )  # fmt: skip

    # Building

    def _spool(self, spool: config.Spool) -> Spool:
        return Spool(name=spool.name, root=spool.root, layout=spool.layout(), marker=spool.complete.marker)

    def _destination(self, spool: config.Spool) -> Destination:
        return Destination(
            bucket=spool.bucket, layout=self._spools[spool.name].layout, checksum=self._settings.s3.checksum,
            headers_for=lambda attachment, style, sniffed: headers_for(spool, attachment, style, sniffed),
            multipart_threshold=self._settings.upload.multipart_threshold,
        )  # fmt: skip

    def _cleaner(self, spool: config.Spool) -> Cleaner:
        rules = cleanup.Rules(
            deletes=spool.cleanup.delete, keep_for_s=spool.cleanup.keep_for, min_age_s=spool.cleanup.min_age,
            grace_s=spool.cleanup.grace, keep_empty_dirs_for_s=spool.cleanup.keep_empty_dirs_for,
            trusts=spool.cleanup.without_leases == "trust", doubt_s=self._settings.upload.doubt,
        )  # fmt: skip
        return Cleaner(
            spool=self._spools[spool.name], ledger=self._ledger, store=self._store, rules=rules, ages=self._ages,
            clock=self._clock, demand_claim=self._owner.demand, touch=lambda record: self._watchers[spool.name].touch(record),
        )  # fmt: skip

    def _watcher(self, spool: config.Spool) -> Watcher:
        rules = completeness.Rules(spool.complete.styles_for, spool.complete.settle, spool.complete.marker)
        looker = Looker(
            spool=self._spools[spool.name], ledger=self._ledger, rules=rules, images=spool.complete.images,
            within_s=spool.complete.within, ages=self._ages, on_offer=self._wake_another,
        )  # fmt: skip
        return Watcher(
            spool=self._spools[spool.name], looker=looker, ledger=self._ledger, clock=self._clock,
            sweep_every_s=spool.sweep_every, move_in=lambda: self._move_in(spool),
            on_broken=lambda fault: self._broken(spool.name, fault), on_mended=lambda: None,
            on_ready=lambda: self._ready(spool.name), observes=not self._once, turn=self._turn,
        )  # fmt: skip

    def _parts(self, spool: config.Spool) -> Parts:
        uploader = Uploader(
            spool=self._spools[spool.name], store=self._store, destination=self._destination(spool),
            budget=self._budget, bandwidth=self._bandwidth, clock=self._clock, stop=self._stop,
            demand_claim=self._owner.demand, turn=self._turn, window=self._windows[spool.bucket],
        )  # fmt: skip
        return Parts(
            spool=self._spools[spool.name], uploader=uploader, cleaner=self._cleaners[spool.name],
            replaced_after_s=spool.replaced_after if spool.replaced == "delete" else None,
            decodes=spool.complete.images == "decode", touch=self._watchers[spool.name].touch,
        )  # fmt: skip

    def _probes(self, spool: config.Spool) -> dict[str, Callable[[], None]]:
        headers = headers_for(spool, "", "original", "application/octet-stream")
        key = f"{_beginning_of(spool.key)}.spoold-probe"
        return {
            "store": lambda: self._store.probe(spool.bucket, key, headers),
            "disk": lambda: self._spools[spool.name].move_in(self._ledger.id),
        }

    def _move_in(self, spool: config.Spool) -> None:
        """Make the house in a root that is new to us, see what the kernel can tell there, and what lies aside in it."""
        here = self._spools[spool.name]
        here.move_in(self._ledger.id)
        if spool.cleanup.delete and not here.can_tell_writers():
            self._cleaners[spool.name].tell_no_leases()
        self._cleaners[spool.name].recover(self._owner.name, lease_s=LEASE_S)
        with self._work:
            self._recovered.add(spool.name)
            self._work.notify_all()

    def _shorten_waits(self, spool: config.Spool) -> None:
        """Let settings that were lowered hold for what waits already, and forget what a clock was wrong about.

        A wait that began while the clock was a year ahead would last a year (contract, rule 4).
        """
        self._ledger.shorten_waits(
            spool.name, keep_for_s=spool.cleanup.keep_for,
            at_most_s={
                "min_age": spool.cleanup.min_age, "grace": spool.cleanup.grace, "dirs": spool.cleanup.keep_empty_dirs_for,
                "doubt": self._settings.upload.doubt, "attempt": 0.0, "retry": 1.2 * self._settings.upload.retry.max,
            },
        )  # fmt: skip

    # Running

    def stop(self) -> None:
        """Ask for a drain; safe in a signal handler."""
        self._is_told_to_stop = True
        self._stop.set()

    def run(self) -> int:
        """Work until asked to stop, or until nothing is left if that is all that was asked for; return the exit code."""
        self._holds.forget_before()
        self._bury_owners()
        self._owner.forget_all_dead(but=self._ledger.owners())
        self._keep_reserve()
        for spool in self._settings.spools:
            self._shorten_waits(spool)
            rules = f"delete: {spool.cleanup.delete}, without_leases: {spool.cleanup.without_leases}"
            self._ledger.note_cleanup(spool.name, rules, lets_go=spool.cleanup.delete)
        watching = [self._thread(f"watch:{name}", w.run, self._stop) for name, w in self._watchers.items()]
        working = [self._thread(f"work-{number}", self._work_on, number > 0) for number in range(self._workers)]
        done = threading.Event()
        keeping = [self._thread("lease", self._renew, done), self._thread("tend", self._tend, done)]
        if self._rebuilder.is_due:
            keeping.append(self._thread("rebuild", self._rebuild, done))
        try:
            code = self._wait_until_idle() if self._once else self._wait_until_stopped()
            self._stop.set()
            self._wake()
            if not self._join(watching + working):
                log.warning("drain.timed_out", detail="work was under way after drain_timeout; it goes on at the next start")
                code = LEFT
        finally:
            self._stop.set()
            done.set()
        self._join(keeping)
        if self._crash is not None:
            log.error("daemon.crashed", error=type(self._crash).__name__, detail=str(self._crash), exc_info=self._crash)
            return CRASHED
        self._pool.shutdown(wait=code != LEFT, cancel_futures=True)
        self._part_pool.shutdown(wait=code != LEFT, cancel_futures=True)
        if code != LEFT or self._once:  # else threads of ours live on, and what they claimed is free when the process ends
            self._owner.close()
        self._store.close()
        self._ledger.close()
        log.info("daemon.drained")
        return LEDGER_LOST if self._ledger.is_lost and not self._is_told_to_stop else code

    def _wait_until_stopped(self) -> int:
        while not self._stop.wait(1.0) and not self._ledger.is_lost:
            pass
        return DRAINED

    def _wait_until_idle(self) -> int:
        while not self._stop.wait(0.1) and not self._ledger.is_lost:
            held = self._holds.held()
            working = set(self._spools) - held  # what is held would wait for ever
            if self._busy or not all(self._watchers[name].is_idle for name in working):
                continue
            left = self._ledger.unfinished_work(working, owner=self._owner.name)
            if set(left) & _WAITED_FOR or self._busy or not all(self._watchers[name].is_idle for name in working):
                continue
            if held:
                return REFUSED
            return LEFT if set(left) - _NOT_LEFT else DRAINED
        return LEFT

    def _thread(self, name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        """Start a thread whose death is the daemon's: half a daemon is worse than none."""

        def run() -> None:
            try:
                target(*args)
            except BaseException as error:
                self._crash = self._crash or error
                self._stop.set()
                self._wake()

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def _join(self, threads: list[threading.Thread]) -> bool:
        deadline = self._clock.monotonic() + self._settings.drain_timeout
        for thread in threads:
            thread.join(max(0.0, deadline - self._clock.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _wake(self) -> None:
        with self._work:
            self._work.notify_all()

    def _wake_another(self) -> None:
        with self._work:
            self._work.notify()

    def _work_on(self, uploads_first: bool) -> None:
        """One worker: claim, walk, again. One of them clears first, so that a backlog does not keep the disk full."""
        unfinished: list[Claim] = []  # walks that could not tell the ledger how they ended
        while not self._stop.is_set():
            claims: list[Claim] = []
            try:
                while unfinished:
                    self._ledger.put_back(unfinished[-1])
                    unfinished.pop()
                with self._work:
                    self._busy += 1
                try:
                    with self._owner.at_work() as may_claim:
                        claims = self._claim(uploads_first) if may_claim else []
                        if claims:
                            self._wake_another()  # there may be more, and somebody must look out while we walk
                            ends = self._pipeline.walk_all(claims)
                            unfinished = [c for c, end in zip(claims, ends, strict=True) if isinstance(end, LedgerUnavailable)]
                finally:
                    with self._work:
                        self._busy -= 1
            except LedgerUnavailable:  # the ledger told of it
                self._stop.wait(_IDLE_S)
                continue
            if unfinished:
                self._stop.wait(_IDLE_S)
            elif not claims:
                self._wait_for_work()

    def _wait_for_work(self) -> None:
        """Sleep until woken. One of those who sleep looks out for what is due by and by: all of them would be a load."""
        with self._work:
            if self._stop.is_set():
                return
            if self._has_lookout:
                self._work.wait()
                return
            self._has_lookout = True
            try:
                self._work.wait(0.1 if self._once else _IDLE_S)
            finally:
                self._has_lookout = False

    def _claim(self, uploads_first: bool) -> list[Claim]:
        crashes = self._settings.upload.retry.crashes
        with self._work:
            spools = sorted(self._recovered)
        return self._ledger.claim(
            self._owner.name, spools, lease_s=LEASE_S, crashes=crashes, uploads_first=uploads_first, at_most=_SIDE_BY_SIDE,
            patience_s=_PATIENCE_S,
        )  # fmt: skip

    def _renew(self, done: threading.Event) -> None:
        """Keep our claims alive; without this they run out and others take over."""
        while not done.wait(LEASE_S / 6):
            asked_at = self._clock.monotonic()
            try:
                self._ledger.renew(self._owner.name, lease_s=LEASE_S)
                self._owner.renewed(asked_at)
                self._bury_owners()
            except LedgerUnavailable:
                continue  # the ledger told of it

    def _bury_owners(self) -> None:
        for name in self._ledger.owners():
            if self._owner.is_dead(name):
                self._ledger.bereave(name)
                self._owner.forget(name)
                self._wake()

    def _tend(self, done: threading.Event) -> None:
        """What is due now and then: probes of what is held, replaced keys, what was given up, old history."""
        remove_at = prune_at = 0.0
        abort_at = self._clock.monotonic() + _ABORT_EVERY_S  # those of a crash are mostly gone on with, soon after the start
        reserve_at = self._clock.monotonic() + _RESERVE_EVERY_S
        while not done.wait(_TEND_EVERY_S):
            now = self._clock.monotonic()
            trouble = self._ledger.trouble or self._low_reserve
            self._owner.say("" if trouble is None else f"{trouble}; {trouble.hint}")
            if now >= reserve_at:
                reserve_at = now + _RESERVE_EVERY_S
                self._keep_reserve()
            try:
                self._holds.probe_due()
                if now >= remove_at and not self._stop.is_set():
                    remove_at = now + _REMOVE_EVERY_S
                    with self._owner.at_work() as may_claim:
                        if may_claim:
                            self._remover.remove_due(lease_s=LEASE_S, held=self._holds.held())
                            self._settler.settle_due(lease_s=LEASE_S, held=self._holds.held())
                if now >= abort_at and not self._stop.is_set():
                    abort_at = now + _ABORT_EVERY_S
                    with self._owner.at_work() as may_claim:
                        if may_claim:
                            self._orphans.abort_all(lease_s=LEASE_S, held=self._holds.held())
                if now >= prune_at:
                    prune_at = now + _PRUNE_EVERY_S
                    self._ledger.prune(older_than_s=_HISTORY_LASTS_S)
                    for spool in self._settings.spools:
                        self._shorten_waits(spool)
            except LedgerUnavailable:
                continue  # the ledger told of it

    def _keep_reserve(self) -> None:
        """See to it that the ledger can go on for a while on a full disk, and say once that it soon cannot."""
        before, self._low_reserve = self._low_reserve, None
        try:
            self._ledger.keep_reserve()
        except LedgerUnavailable as fault:
            self._low_reserve = fault
            if before is None:
                log.error("ledger.low_on_space", detail=str(fault), hint=fault.hint)

    def _rebuild(self, done: threading.Event) -> None:
        """List the buckets of a ledger that was lost; what refuses is tried again."""
        while not done.is_set():
            with contextlib.suppress(LedgerUnavailable):
                self._rebuilder.rebuild()
                if not self._rebuilder.is_due:
                    return
            done.wait(_REBUILD_EVERY_S)

    def _ready(self, spool: str) -> None:
        with self._work:
            if spool not in self._starting:
                return
            self._starting.discard(spool)
            is_last = not self._starting
        if is_last:
            log.info("daemon.ready", spools=sorted(self._spools))

    def _broken(self, spool: str, fault: SpooldError) -> None:
        self._holds.hold(spool, fault)
        self._ready(spool)


def _beginning_of(key: str) -> str:
    """Return what all keys that a template makes begin with."""
    return key.lstrip("/").split(":", 1)[0]


def headers_for(spool: config.Spool, attachment: str, style: str, sniffed: str) -> Headers:
    """Return what is stored with an object of this style, besides its bytes."""
    chosen = spool.object.headers_for(attachment, style)
    return Headers(
        content_type=sniffed if chosen.content_type == "sniff" else chosen.content_type,
        acl=chosen.acl, cache_control=chosen.cache_control, storage_class=chosen.storage_class,
        server_side_encryption=chosen.server_side_encryption,
        tags=tuple(sorted(chosen.tags.items())), metadata=tuple(sorted(chosen.metadata.items())),
    )  # fmt: skip
