"""What every test stands on: servers, a spool, an app, and the promise that no process is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from spoold import uploader
from tests import figures, nursery
from tests.paperclip import App
from tests.parts import BUCKET, Bench
from tests.proxy import FaultProxy
from tests.servers import ACCESS_KEY, REGION, SECRET_KEY, MotoServer, RcloneServer, StrictServer

_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail the last test if a process outlives the session; and end it, for the sake of the next one.

    As subreaper we inherit the orphans, so grandchildren cannot hide. Under xdist each worker looks after its own.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))

    yield

    nursery.close()
    left = {pid: line for pid in _children(os.getpid()) if (line := _command_line(pid))}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left, f"processes left behind: {left}"


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ends meanwhile leaves its children to another
            found += map(int, (task / "children").read_text().split())
    return found


def _command_line(pid: int) -> str:
    """Return how it was called; "" for zombies, and for the standard library's helper that lives as long as we do."""
    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "" if "multiprocessing.resource_tracker" in line else line


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C reach what we start, also where we run in a shell's background, which has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Give boto3 credentials that open nothing, and keep this machine's own settings out, for us and our children."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            is_theirs = name.startswith(("AWS_", "SPOOLD_")) and name != figures.FILE
            if is_theirs or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
                patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent/aws-config")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/aws-credentials")
        yield


@pytest.fixture(scope="session")
def moto_server(no_process_is_left: None, environment: None) -> Iterator[MotoServer]:
    """One moto for all tests of this worker: take a bucket of your own."""
    with MotoServer() as server:
        yield server


@pytest.fixture
def rclone_server(tmp_path: Path) -> Iterator[RcloneServer]:
    """An rclone of the test's own, over `tmp_path/s3`."""
    with RcloneServer(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    """A fault proxy before rclone, which has the bucket of a bench."""
    rclone_server.create_bucket(BUCKET)
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def real(tmp_path: Path, proxy: FaultProxy) -> Iterator[Bench]:
    """A bench whose store is a real one, behind the proxy."""
    with Bench(tmp_path, endpoint_url=proxy.endpoint_url) as bench:
        yield bench


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one attempt to upload tries to outlast: tests have no eight seconds."""
    monkeypatch.setattr(uploader, "_PERSISTENCE_S", 0.01)


@pytest.fixture(scope="session")
def _strict_server(no_process_is_left: None, environment: None) -> Iterator[StrictServer]:
    with StrictServer() as server:
        yield server


@pytest.fixture
def strict_server(_strict_server: StrictServer) -> StrictServer:
    """A strict S3 that has forgotten all tests before."""
    _strict_server.reset()
    return _strict_server


@pytest.fixture
def spool_root(tmp_path: Path) -> Path:
    """An empty directory to be a spool's root."""
    root = tmp_path / "spool"
    root.mkdir()
    return root


@pytest.fixture
def app(spool_root: Path) -> App:
    """An app that writes into `spool_root` as Paperclip does."""
    return App(spool_root)
