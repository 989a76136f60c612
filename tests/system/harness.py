"""A real daemon on a real tree with a real S3 process, and the laws that every system test ends with."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import yaml

from tests.nursery import Born, nursery
from tests.parts import CLIENT
from tests.servers import MotoServer, RcloneServer

DEADLINE_S = 40.0
QUICK: dict[str, Any] = {  # what a test has no time for; contract, section 2
    "complete": {"settle": "200ms"},
    "cleanup": {"min_age": "300ms", "grace": "200ms", "keep_empty_dirs_for": "300ms"},
}
BRISK: dict[
    str, object
] = {  # what no setting makes quicker: how often an idle worker looks for what is due, and a hold is probed
    "spoold.daemon._IDLE_S": 0.1,
    "spoold.holds._FIRST_PROBE_S": 0.2,
    "spoold.holds._LAST_PROBE_S": 0.5,
}
ALLOWED_NEXT = {  # contract, section 4: which event of a record may follow which
    None: {"record.seen"},
    "record.seen": {"record.stalled", "record.gone", "record.cleared", "batch.settled", "batch.superseded", "record.seen"},
    "record.stalled": {"record.gone", "record.cleared", "batch.settled", "record.seen"},
    "record.gone": {"record.seen"},
    "batch.settled": {"batch.claimed", "batch.superseded", "record.gone", "batch.settled", "batch.dead", "record.seen"},
    "batch.claimed": {
        "batch.stored", "batch.deferred", "batch.dead", "batch.superseded", "record.seen", "batch.settled", "record.gone",
        "batch.claimed",
    },
    "batch.deferred": {"batch.claimed", "batch.superseded", "batch.settled", "record.seen", "record.gone", "batch.dead"},
    "batch.dead": {"batch.claimed", "batch.superseded", "batch.settled", "record.seen", "record.gone"},
    "batch.superseded": {"record.seen", "batch.claimed", "batch.settled", "record.gone", "record.cleared"},
    "batch.stored": {"record.cleared", "record.seen", "batch.superseded", "batch.settled", "batch.deferred"},
    "record.cleared": {"record.seen", "batch.settled"},
}  # fmt: skip
ALLOWED_NEXT_OF_ONE = {  # the same for one batch, and for what waits: in a record of several basenames these interleave
    "batch": {
        None: {"batch.settled"},
        "batch.settled": {"batch.claimed", "batch.superseded", "batch.dead"},
        "batch.claimed": {"batch.claimed", "batch.stored", "batch.deferred", "batch.dead", "batch.superseded"},
        "batch.deferred": {"batch.claimed", "batch.superseded", "batch.dead"},
        "batch.dead": {"batch.claimed", "batch.superseded"},
        "batch.stored": {"record.cleared", "batch.superseded", "batch.deferred"},
        "batch.superseded": set(),
        "record.cleared": set(),
    },
    "waiting": {
        None: {"record.seen"},
        "record.seen": {"record.seen", "record.stalled", "record.gone", "record.cleared"},
        "record.stalled": {"record.seen", "record.gone", "record.cleared"},
        "record.gone": {"record.seen"},
        "record.cleared": {"record.seen"},
    },
}


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = DEADLINE_S) -> Any:
    """Return the condition's first true value; fail with `what` when the deadline passes."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.01
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(pause_s)
        pause_s = min(0.06, 1.2 * pause_s)  # whoever waits long need not ask as often, and keep the daemon from its work
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, mapping by mapping."""
    both = dict(base)
    for name, value in over.items():
        mine = both.get(name)
        both[name] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return both


class Site:
    """One installation: a spool, a bucket on a server, a state directory, a configuration; daemons come and go.

    spool, upload, s3: laid over the quick defaults. endpoint_url: of a proxy in front of the server, if there is one.
    root: of the spool, where it is not to be in `directory`.
    """

    def __init__(
        self, directory: Path, server: MotoServer | RcloneServer, *, endpoint_url: str | None = None,
        spool: Mapping[str, Any] | None = None, upload: Mapping[str, Any] | None = None,
        s3: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, root: Path | None = None,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.server = server
        self.root = root or directory / "spool"
        self.root.mkdir(exist_ok=True)
        self.bucket = f"bucket-{abs(hash(str(directory))) % 10**10}"
        server.create_bucket(self.bucket)
        self.environment = {**os.environ, **server.environment(), **(environment or {})}
        base = {"name": "uploads", "root": str(self.root), "bucket": self.bucket, **copy.deepcopy(QUICK)}
        self.settings: dict[str, Any] = {
            "state_dir": str(directory / "state"),
            "s3": merged(
                {"endpoint_url": endpoint_url or server.endpoint_url, "region": "us-east-1", "addressing_style": "path"},
                s3 or {},
            ),
            "spools": [merged(base, spool or {})],
            "upload": merged({"retry": {"initial": "100ms", "max": "1s"}, "client": CLIENT}, upload or {}),
            "log": {"level": "debug"},
            "drain_timeout": "20s",
        }
        self.config = directory / "config.yaml"
        self.write_config()

    def write_config(self) -> None:
        self.config.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    # Programs

    @contextlib.contextmanager
    def daemon(
        self, *, ready: bool = True, name: str = "daemon", constants: Mapping[str, object] | None = None,
        within: Sequence[str] = (),
    ) -> Iterator[Daemon]:  # fmt: skip
        """Run a daemon for the block; it is drained at its end if it still runs.

        constants: numbers of the code that no setting changes, for a test that cannot wait so long: "spoold.owner.LEASE_S".
        within: a command that becomes the daemon, such as `setpriv …`.
        """
        daemon = Daemon(self, self.directory / f"{name}-{time.monotonic_ns()}.log", constants or {}, within)
        try:
            if ready:
                daemon.until_event("daemon.ready")
            yield daemon
        except AssertionError as error:
            error.add_note(f"{daemon.log_file} ends with\n{daemon.log_file.read_text(errors='replace')[-6000:]}")
            error.add_note(f"{sorted(self.files())} lie there, {[path.name for path in self.aside()]} aside; the ledger says")
            error.add_note("\n".join(map(str, self.query("SELECT * FROM record_status WHERE state <> 'done' LIMIT 20"))))
            raise
        finally:
            daemon.end()

    def spoold(self, *arguments: str, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = started(self, arguments, stdout=stdout, stderr=stderr)
            try:
                code = process.wait(timeout_s)
            finally:
                process.kill()
                process.wait()
            texts = [os.pread(file.fileno(), 1 << 24, 0).decode() for file in (stdout, stderr)]
        return subprocess.CompletedProcess(arguments, code, *texts)

    # What is true

    @property
    def database(self) -> Path:
        return self.directory / "state" / "spoold.db"

    def query(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Ask the ledger as an app would; nothing before there is one."""
        if not self.database.exists():
            return []
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)
        try:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement, parameters)]
        except sqlite3.DatabaseError:
            return []  # it is just being made, or a test has damaged it
        finally:
            connection.close()

    def change(self, statement: str, *parameters: Any) -> None:
        """Change the ledger behind spoold's back; only while no daemon runs."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            assert connection.execute(statement, parameters).rowcount > 0, f"nothing changed: {statement}"

    def status(self, record: str) -> dict[str, Any]:
        """Return the record's row of the view; {} if there is none."""
        rows = self.query("SELECT * FROM record_status WHERE path = ?", record)
        return rows[0] if rows else {}

    def until_state(self, record: str, *states: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait until the record is in one of these states, and return its row."""
        row: dict[str, Any] = {}

        def is_there() -> bool:
            row.clear()
            row.update(self.status(record))
            return row.get("state") in states

        try:
            until(is_there, f"{record} is {' or '.join(states)}", timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {row}") from None
        return row

    def objects(self) -> dict[str, bytes]:
        """Return what the bucket holds, by key."""
        return self.server.objects(self.bucket)

    def keys(self) -> set[str]:
        """Return the keys that the bucket holds; for a bucket from which something is deleted meanwhile."""
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {entry["Key"] for page in pages for entry in page.get("Contents", ())}

    def files(self) -> dict[str, bytes]:
        """Return what lies in the spool outside spoold's own house, by path. Things may go while we look."""
        found = {}
        for directory, _, names in os.walk(self.root):
            for path in (Path(directory, name) for name in names):
                if ".spoold" not in path.parts and path.is_file():
                    with contextlib.suppress(FileNotFoundError):
                        found[str(path.relative_to(self.root))] = path.read_bytes()
        return found

    def directories(self) -> set[str]:
        """Return the directories of the spool outside spoold's own house, as paths."""
        paths = [Path(directory, name) for directory, inner, _ in os.walk(self.root) for name in inner]
        return {str(path.relative_to(self.root)) for path in paths if ".spoold" not in path.parts}

    def aside(self) -> list[Path]:
        """Return what is set aside at this moment."""
        directory = self.root / ".spoold" / "aside"
        return sorted(directory.iterdir()) if directory.is_dir() else []

    # The laws

    def demand_nothing_lost(self, written: Mapping[str, bytes]) -> None:
        """Each byte is on disk or in the bucket. written: path below the root → its newest content; keys equal paths."""
        files, objects = self.files(), self.objects()
        lost = [path for path, content in written.items() if content not in (files.get(path), objects.get(path))]
        assert not lost, f"lost: {lost}"

    def demand_nothing_stale(self, written: Mapping[str, bytes]) -> None:
        """The bucket has the last version of everything."""
        objects = self.objects()
        stale = [path for path, content in written.items() if objects.get(path) != content]
        assert not stale, f"stale or missing in the bucket: {stale}"

    def demand_nothing_left(self) -> None:
        """No file, nothing aside, no claim."""
        assert not self.files()
        house = self.root / ".spoold"
        assert not list((house / "aside").iterdir()) and not list((house / "kept").iterdir())
        assert not self.query("SELECT * FROM claim")

    def demand_laws(self, written: Mapping[str, bytes]) -> None:
        """All is uploaded, newest version, and nothing is left behind."""
        self.demand_nothing_lost(written)
        self.demand_nothing_stale(written)
        self.demand_nothing_left()


def _set_constants(constants: Mapping[str, object]) -> str:
    """Return a program that sets these numbers."""
    lines = []
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        lines.append(f"import {module}; assert hasattr({module}, {constant!r}); {name} = {value!r}")
    return "\n".join(lines)


def started(
    site: Site, arguments: Sequence[str], *, stdout: IO[bytes], stderr: IO[bytes], before: str = "", within: Sequence[str] = (),
) -> Born | subprocess.Popen[bytes]:  # fmt: skip
    """Start spoold. before: a program that is run first. within: as `Site.daemon`.

    What must begin with an `exec` does: within another command, with another Python path, or by a thread that may be in a world
    of its own (`tests.parts.in_a_world`).
    """
    arguments = ["-c", str(site.config), *arguments]
    is_plain = not within and site.environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    if is_plain and threading.current_thread() is threading.main_thread():
        return nursery().bear(arguments, env=site.environment, stdout=stdout, stderr=stderr, before=before)
    program = f"{before}\nfrom spoold.cli import main\nmain()"
    return subprocess.Popen(
        [*within, sys.executable, "-c", program, *arguments],
        env=site.environment, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
    )  # fmt: skip


class Daemon:
    """A daemon's process and what it logged."""

    def __init__(
        self, site: Site, log_file: Path, constants: Mapping[str, object] = MappingProxyType({}), within: Sequence[str] = ()
    ) -> None:
        self.log_file = log_file
        self._lines: list[dict[str, Any]] = []
        self._read_bytes = 0
        with open(log_file, "wb") as log:
            self.process = started(site, ["run"], stdout=log, stderr=log, before=_set_constants(constants), within=within)

    def lines(self) -> list[dict[str, Any]]:
        """Return the log so far; a line that is no JSON fails the test."""
        with open(self.log_file, "rb") as log:
            log.seek(self._read_bytes)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._lines += [json.loads(line) for line in whole.splitlines()]
        self._read_bytes += len(whole)
        return list(self._lines)

    def events(self, name: str | None = None, **keys: Any) -> list[dict[str, Any]]:
        """Return the lines of this event that have these keys."""
        return [
            line for line in self.lines()
            if name in (None, line["event"]) and all(line.get(key) == value for key, value in keys.items())
        ]  # fmt: skip

    def until_event(self, name: str, *, count: int = 1, timeout_s: float = DEADLINE_S, **keys: Any) -> dict[str, Any]:
        """Wait for the count-th line of this event."""

        def found() -> dict[str, Any] | None:
            events = self.events(name, **keys)
            is_there = len(events) >= count
            assert is_there or self.process.poll() is None, f"the daemon ended: {self.log_file.read_text()[-3000:]}"
            return events[count - 1] if len(events) >= count else None

        line: dict[str, Any] = until(found, f"{name} {keys}", timeout_s=timeout_s)
        return line

    def demand_legal_path(self, record: str, *, after: str | None = None) -> list[str]:
        """Check that the record's lines are a legal path, and return their events. after: the last of the daemon before."""
        told = set().union(*ALLOWED_NEXT.values())
        path = [line["event"] for line in self.lines() if line.get("record") == record and line["event"] in told]
        before = after
        for event in path:
            assert event in ALLOWED_NEXT[before], f"{event} after {before} in {path}"
            before = event
        return path

    def demand_legal_paths(self, record: str) -> None:
        """Check a record of several basenames, where one waits while another goes up: each batch's lines, and the rest."""
        paths: dict[int | None, list[str]] = {}
        for line in self.lines():
            if line.get("record") == record and line["event"] in set().union(*ALLOWED_NEXT_OF_ONE.values()):
                paths.setdefault(line.get("batch"), []).append(line["event"])
        for batch, path in paths.items():
            allowed = ALLOWED_NEXT_OF_ONE["waiting" if batch is None else "batch"]
            for before, event in zip([None, *path], path, strict=False):
                assert event in allowed[before], f"{event} after {before} in {path} of batch {batch}"

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait(10)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def drain(self, *, timeout_s: float = 30) -> int:
        """SIGTERM; return the exit code."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def end(self) -> None:
        if self.process.poll() is None:
            self.thaw()
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
