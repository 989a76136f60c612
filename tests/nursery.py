"""Where processes come from that are spoold: forked from one that has done the imports, for these cost a second each.

What is born here is a process of its own, with its own signals, memory and descriptors, and a child of ours: whoever forked it
ends at once, and we are the subreaper (`tests/conftest.py`). What a test demands of a start from nothing uses `subprocess`.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_IMPORTED = (
    "spoold.cli", "spoold.daemon", "alembic.command", "alembic.context", "alembic.op", "logging.config", "mako.template",
    "sqlalchemy.dialects.sqlite", "botocore.signers", "botocore.httpsession", "concurrent.futures.thread",
)  # fmt: skip
_MOST_BYTES = 1 << 17


class Born:
    """A child of ours that was born here; used as a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    os.close(self._fd)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            select.select([self._fd], [], [], left_s)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """One process with the imports done. It ends when we close our end of its socket, however we end."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[1],
            )  # fmt: skip

    def bear(
        self, arguments: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes], before: str = ""
    ) -> Born:
        """Start spoold with these arguments. before: a program that is run first, to set what no setting sets."""
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": os.getcwd(), "before": before}).encode()
        assert len(request) < _MOST_BYTES
        fds = array.array("i", [stdout.fileno(), stderr.fileno()])
        with self._lock:
            self._ours.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            return Born(int(self._ours.recv(100)))

    def close(self) -> None:
        self._ours.close()
        self._process.wait()


_nursery: Nursery | None = None
_opening = threading.Lock()


def nursery() -> Nursery:
    """Return this process's own."""
    global _nursery
    with _opening:
        _nursery = _nursery or Nursery()
        return _nursery


def close() -> None:
    """End this process's own, if there is one."""
    global _nursery
    with _opening:
        if _nursery is not None:
            _nursery.close()
            _nursery = None


# In the nursery


def _serve(asked: socket.socket) -> dict[str, Any]:
    """Fork a child for each request; return in the child, with what it is to be."""
    while True:
        message, rights, _, _ = asked.recvmsg(_MOST_BYTES, socket.CMSG_LEN(8))
        if not message:
            sys.exit()
        stdout, stderr = array.array("i", rights[0][2])
        told, tells = os.pipe()
        if (between := os.fork()) == 0:
            if child := os.fork():
                os.write(tells, str(child).encode())
                os._exit(0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for fd in (stdout, stderr, told, tells, asked.detach()):
                os.close(fd)
            return dict(json.loads(message))
        os.waitpid(between, 0)  # only now the child is our parent's
        asked.send(os.read(told, 100))
        for fd in (stdout, stderr, told, tells):
            os.close(fd)


def _main() -> None:
    gc.disable()
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what all share is copied by whoever looks for garbage in it
    gc.enable()
    task = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    sys.argv[:] = ["spoold", *task["arguments"]]
    exec(task["before"], {})
    sys.modules["spoold.cli"].main()


if __name__ == "__main__":
    _main()
