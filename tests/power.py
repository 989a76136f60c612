"""Power cuts: a daemon and an app at work on disks that remember, and what is true after a cut at any moment of it.

`recorded` lets both work for some seconds and keeps all that happened: the disks' writes and flushes, what the app wrote, what
the server answered. `Recording.judge` cuts the power at a moment: it makes the disks what they may have been then, and the
bucket what it was, starts a daemon on them as after a boot, lets it end its work, and holds what is true against the laws.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from tests.disk import Disk, Filesystem, run
from tests.paperclip import App, How, picture
from tests.proxy import SLOW_DOWN, Answer, FaultProxy, Seen
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site

Cut = Literal["everything", "spool and ledger apart", "only the spool", "only the ledger"]
"""What lies on which disk, and whose power is cut."""

_RECORDS = 12  # are written again and again; others once
_NAMES = ("me.jpg", "paper.pdf", "raw.bin")


@dataclass(frozen=True, slots=True)
class Version:
    """What the app once wrote to a path, and when, monotonic seconds: `ended` is None where it was still at it."""

    content: bytes = field(repr=False)
    began: float
    ended: float | None


@dataclass(slots=True)
class Judged:
    """What one cut came to. found: how many files of which condition lay on the disk; broken: laws, one sentence each."""

    at: float
    blocks_lost: int = 0
    found: Counter[str] = field(default_factory=Counter)
    published: Counter[str] = field(default_factory=Counter)
    overwritten: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    log: str = ""

    @property
    def damaged(self) -> int:
        return sum(count for condition, count in self.found.items() if condition != "whole")

    def demand_laws(self) -> None:
        assert not (self.overwritten or self.lost or self.broken), f"{self}\n{self.log}"


class Recording:
    """What happened, and the disks it happened on."""

    def __init__(self, directory: Path, site: Site, disks: Mapping[str, Disk], cut: Cut) -> None:
        self.directory = directory
        self._site = site
        self.root = site.root
        self._disks = disks
        self._cut = cut
        self.versions: dict[str, list[Version]] = {}
        self.seen: list[Seen] = []
        self.moments: list[tuple[float, float]] = []  # when the power went, and until when what was not cut lived on
        self.began = time.monotonic()

    def choose(self, chance: random.Random, count: int) -> list[tuple[float, float]]:
        """Return moments to cut at: any at which something reached a disk, or those at which the uncut one was saved."""
        if self._cut in ("only the spool", "only the ledger"):
            return chance.choices(self.moments, k=count)
        written = sorted(moment for disk in self._disks.values() for moment in disk.moments)
        return [(moment, moment) for moment in chance.choices(written, k=count)]

    def save(
        self, app: App, record: int, name: str, styles: Mapping[str, bytes], *, how: How = "rename", replaces: bool = True
    ) -> None:  # fmt: skip
        """Have the app save a record, and remember it as the newest version of each file."""
        began = time.monotonic()
        paths = {style: str(app.path_of("papers", record, style, name).relative_to(app.root)) for style in styles}
        for style, path in paths.items():
            self.versions.setdefault(path, []).append(Version(styles[style], began, None))
        while True:
            try:
                if replaces:
                    app.destroy("papers", record, name)
                app.save("papers", record, name, styles, how=how)
                break
            except FileNotFoundError:  # an empty directory went at that moment: the web request fails, and is sent again
                continue
        for path in paths.values():
            self.versions[path][-1] = Version(self.versions[path][-1].content, began, time.monotonic())

    def reverts(self, moment: tuple[float, float], seed: int) -> bool:
        """Say whether, after this cut, an older version lies whole on the disk than the bucket holds."""
        with self._after(moment, random.Random(seed)) as (before, on_disk, _):
            return any(0 <= self._newest(path, on_disk[path]) < self._newest(path, before.get(path)) for path in on_disk)

    def judge(self, moment: tuple[float, float], seed: int) -> Judged:
        """Cut, boot, let a daemon end its work, and say what is true then."""
        judged = Judged(moment[0] - self.began)
        bucket = self.directory / "s3-after" / self._site.bucket
        with self._after(moment, random.Random(seed)) as (before, on_disk, blocks_lost):
            judged.blocks_lost = blocks_lost
            judged.found.update(self._condition(path, content).split(" ")[0] for path, content in on_disk.items())
            for key, content in before.items():
                (bucket / key).parent.mkdir(parents=True, exist_ok=True)
                (bucket / key).write_bytes(content)
            bucket.mkdir(parents=True, exist_ok=True)
            with RcloneServer(bucket.parent) as server:
                done = self._boot(server)
            judged.log = done.stdout
            after = {str(path.relative_to(bucket)): path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
            self._hold_against_laws(judged, before, after, on_disk, self._site.files())
            if done.returncode not in (0, 75):
                judged.broken.append(f"the daemon ended with {done.returncode}")
        shutil.rmtree(bucket.parent)
        return judged

    @contextlib.contextmanager
    def _after(
        self, moment: tuple[float, float], chance: random.Random
    ) -> Iterator[tuple[dict[str, bytes], dict[str, bytes], int]]:
        """Have the disks mounted as they are after a cut; yield the bucket's objects, the app's files, how many blocks went."""
        at, until = moment
        keeps = chance.choice((0.0, 0.5, 0.9, 1.0))
        lost = 0
        for name, disk in self._disks.items():
            is_cut = self._cut not in ("only the spool", "only the ledger") or self._cut.endswith(name)
            lost += disk.cut(at if is_cut else until, chance if is_cut else None, keeps=keeps)
        objects = self._objects(until, chance)
        with contextlib.ExitStack() as stack:
            for name, disk in self._disks.items():
                stack.enter_context(disk.mounted(_point(self.directory, name), remembers=False))
            yield objects, {path: content for path, content in self._site.files().items() if path in self.versions}, lost

    def _objects(self, at: float, chance: random.Random) -> dict[str, bytes]:
        """Return what the bucket held; a PUT that was under way may have been carried out or not."""
        contents = {hashlib.sha256(v.content).hexdigest(): v.content for vs in self.versions.values() for v in vs}
        objects: dict[str, bytes] = {}
        for seen in sorted(self.seen, key=lambda seen: seen.upstream_at or 0.0):
            key = seen.key.partition("/")[2]
            if seen.method != "PUT" or key not in self.versions or seen.upstream_status != 200 or seen.upstream_at is None:
                continue
            if seen.upstream_at <= at or (seen.at <= at and chance.random() < 0.5):
                objects[key] = contents.get(seen.sha256, b"no version of it")
        return objects

    def _boot(self, server: RcloneServer) -> subprocess.CompletedProcess[str]:
        """Run a daemon to the end of its work on a machine that has just booted: its uptime is that of a new namespace."""
        settings = {**self._site.settings, "s3": {**self._site.settings["s3"], "endpoint_url": server.endpoint_url}}
        config = self.directory / "after.yaml"
        config.write_text(yaml.safe_dump(settings))
        since_boot_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        return subprocess.run(
            ["unshare", "--time", "--boottime", str(-since_boot_s), "--fork", "--kill-child",
             sys.executable, "-m", "spoold", "-c", str(config), "run", "--once"],
            env=self._site.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=100, check=False,
        )  # fmt: skip

    # The laws

    def _newest(self, path: str, content: bytes | None) -> int:
        """Return which version of a path this is, the newest if several are equal; -1 for none."""
        return max((number for number, version in enumerate(self.versions[path]) if version.content == content), default=-1)

    def _condition(self, path: str, content: bytes) -> str:
        if (number := self._newest(path, content)) >= 0:
            return f"whole {number}"
        if not content:
            return "empty"
        if not content.strip(b"\0"):
            return "zeros"
        if any(version.content.startswith(content) for version in self.versions[path]):
            return f"short {len(content)} {len(content) % 4096}"
        if any(version.content.startswith(content.rstrip(b"\0")) for version in self.versions[path]):
            return "zero-tail"
        return "other"

    def _hold_against_laws(
        self, judged: Judged, before: Mapping[str, bytes], after: Mapping[str, bytes], on_disk: Mapping[str, bytes],
        left: Mapping[str, bytes],
    ) -> None:  # fmt: skip
        """before, after: the bucket's objects; on_disk, left: what lay in the spool after the cut, and in the end."""
        for path in self.versions:
            was, now = self._newest(path, before.get(path)), self._newest(path, after.get(path))
            if path in before and was < 0:
                judged.broken.append(f"{path}: before the cut the bucket held what the app never wrote")
                continue
            if path in after and now < 0:
                condition = self._condition(path, after[path])
                judged.published[condition.split(" ")[0]] += 1
                (judged.overwritten if path in before else judged.broken).append(f"{path}: the bucket holds {condition}")
                continue
            if now < was:
                judged.overwritten.append(f"{path}: the bucket went from version {was} to {now}")
            lies = self._newest(path, on_disk.get(path))
            if max(now, self._newest(path, left.get(path))) < lies:
                judged.lost.append(f"{path}: version {lies} lay whole on the disk, now there is {now}")
            elif now < lies and not any(_are_one(path, other) for other in on_disk if self._newest(other, on_disk[other]) < 0):
                judged.broken.append(f"{path}: version {lies} lies whole on the disk and was not uploaded")
            if path in on_disk and lies < 0 and path not in left:
                judged.lost.append(f"{path}: {self._condition(path, on_disk[path])} was let go")


def _are_one(path: str, other: str) -> bool:
    """Say whether two files have a record and a basename in common: if one is damaged, both wait."""
    (record, _, name), (others, _, another) = (each.rsplit("/", 2) for each in (path, other))
    return (record, name) == (others, another)


def _point(directory: Path, name: str) -> Path:
    return directory / f"on-{name.replace(' ', '-')}"


@contextlib.contextmanager
def recorded(
    directory: Path, filesystem: Filesystem, *, cut: Cut = "everything", seconds: float = 5.0, seed: int = 0,
    environment: Mapping[str, str] | None = None, script: Callable[[Recording, App, FaultProxy], None] | None = None,
) -> Iterator[Recording]:  # fmt: skip
    """Have an app and a daemon work for some seconds on a new disk, or on two, and yield what happened.

    Runs in a world with mounts of its own (tests.parts.with_own_mounts), so that nothing is left of it.
    The destination is away for the middle third: what the app writes then lies unsynced for long.
    script: what to do instead; local files then stay after their upload.
    """
    chance = random.Random(seed)
    names = ["everything"] if cut == "everything" else ["the spool", "the ledger"]
    with contextlib.ExitStack() as stack:
        disks = {name: stack.enter_context(Disk(directory / f"disk of {name}", filesystem)) for name in names}
        server = stack.enter_context(RcloneServer(directory / "s3"))
        proxy = stack.enter_context(FaultProxy(server.endpoint_url))
        site = _site(directory, server, proxy, _point(directory, names[0]), _point(directory, names[-1]), environment or {})
        if script is not None:
            site.settings["spools"][0]["cleanup"]["keep_for"] = "1h"
            site.write_config()
        recording = Recording(directory, site, disks, cut)
        with contextlib.ExitStack() as mounts:
            for name, disk in disks.items():
                mounts.enter_context(disk.mounted(_point(directory, name)))
            site.root.mkdir()
            run("sync", "-f", str(site.root))  # the root was there for long
            with site.daemon(constants=BRISK, ready=False) as daemon:
                if script is not None:
                    script(recording, App(site.root), proxy)
                else:
                    _let_them_work(recording, daemon, App(site.root), proxy, cut, seconds, chance)
                daemon.kill()
            recording.seen = proxy.seen
        yield recording


def _site(
    directory: Path,
    server: RcloneServer,
    proxy: FaultProxy,
    spool: Path,
    state: Path,
    environment: Mapping[str, str],
) -> Site:
    complete = {"settle": "300ms"}
    site = Site(
        directory, server, endpoint_url=proxy.endpoint_url, environment=environment,
        spool={"complete": complete, "replaced": "keep", "cleanup": {"min_age": "600ms", "grace": "300ms"}},
        upload={"doubt": "500ms"},
    )  # fmt: skip
    site.root.rmdir()
    site.root = spool / "spool"
    site.settings["spools"][0]["root"] = str(site.root)
    site.settings["state_dir"] = str(state / "state")
    site.write_config()
    return site


def _let_them_work(
    recording: Recording, daemon: Daemon, app: App, proxy: FaultProxy, cut: Cut, seconds: float, chance: random.Random
) -> None:
    stop = threading.Event()
    writing = threading.Thread(target=_write, args=(recording, app, chance, stop))
    writing.start()
    began = time.monotonic()
    rule = None
    kept = {"only the spool": "the ledger", "only the ledger": "the spool"}.get(cut)
    try:
        while (now := time.monotonic()) < began + seconds:
            assert daemon.process.poll() is None, "the daemon ended"
            is_away = seconds / 3 < now - began < seconds * 2 / 3
            if is_away and rule is None:
                rule = proxy.on("PUT|GET|HEAD|DELETE", "", Answer(503, SLOW_DOWN))
            elif not is_away and rule is not None:
                proxy.clear()
                rule = None
            if kept is not None:
                daemon.freeze()
                at = time.monotonic()
                run("sync", "-f", str(_point(recording.directory, kept)))
                recording.moments.append((at, time.monotonic()))
                daemon.thaw()
            time.sleep(0.1)
    finally:
        stop.set()
        writing.join()


def _write(recording: Recording, app: App, chance: random.Random, stop: threading.Event) -> None:
    """Save and replace, in the ways that Paperclip has, without a sync, as Paperclip.

    A copy makes a file of its own, as there: what is truncated and written again in place came back from one cut of btrfs with
    the new bytes and the old size, one of some 30,000 files, and nothing can tell that from a finished one.
    """
    number = 0
    while not stop.wait(chance.uniform(0.0, 0.15)):
        number += 1
        name = chance.choice(_NAMES)
        record = chance.randrange(_RECORDS) if chance.random() < 0.7 else 1000 + number
        how: How = chance.choice(("rename", "rename", "rename", "copy", "close_before_rename"))
        styles = {"original": _content(name, number, chance)}
        if name == "me.jpg":
            styles["thumb"] = picture(60, 45, number + 10**6)
        replaces = chance.random() < 0.6 or how == "copy"
        recording.save(app, record, name, styles, how=how, replaces=replaces)


def _content(name: str, number: int, chance: random.Random) -> bytes:
    """Return what is never empty, never a row of zeros, and never the same twice."""
    if name == "me.jpg":
        return picture(chance.choice((80, 400, 1200)), 300, number)
    size = chance.choice((300, 4096, 12_288, 50_000, 400_000, 3_000_000))
    return b"%%PDF-1.4 number %d\n" % number + chance.randbytes(size)
