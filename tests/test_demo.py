"""`spoold demo` shows the whole job to somebody who has set up nothing, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.paperclip import picture
from tests.system.harness import until

DEMO = [sys.executable, "-m", "spoold", "demo"]


@contextmanager
def running(directory: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a demo that has to be ended; yield it and the file it prints into."""
    printed = directory.with_name("printed")
    environment = {**os.environ, "HOME": str(directory.with_name("home"))}
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [*DEMO, "--dir", str(directory), *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        until(lambda: b"daemon.ready" in printed.read_bytes(), "it is ready")
        yield process, printed
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(30)


def test_the_demo_takes_every_picture_all_the_way_and_leaves_no_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}

    demo = subprocess.run(
        [*DEMO, "--exit-when-idle", "--records", "2"], env=environment, capture_output=True, text=True, timeout=90, check=False
    )

    assert (0, "") == (demo.returncode, demo.stderr)
    for record in ("avatars/1", "avatars/2"):
        events = re.findall(rf"(\S+\.\S+) +spool=demo record={record} ", demo.stdout)
        assert ["record.seen", "batch.settled", "batch.claimed", "batch.stored", "record.cleared"] == events
        assert re.search(rf"^{record} +done +6 +demo-bucket/{record}/$", demo.stdout, re.MULTILINE)
    assert not re.search("warning|error|Traceback", demo.stdout)
    assert not list(tmp_path.iterdir())


def test_what_the_demo_says_one_may_try_works_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/me.jpg").write_bytes(picture(200, 100, 5))

    with running(tmp_path / "demo", "--records", "0") as (_, printed):
        introduction = printed.read_text().partition("Ctrl-C")[0]
        lines = [line for line in introduction.partition("another terminal:")[2].splitlines() if line]
        shell = subprocess.run(
            ["bash", "-e"], input="\n".join(lines), env={**os.environ, "HOME": str(tmp_path / "home")},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        dropped = tmp_path / "demo/s3/demo-bucket/avatars/99/original/me.jpg"
        until(dropped.exists, "my own picture is in the bucket")

    assert (0, "") == (shell.returncode, shell.stderr)
    assert re.match(r"(spool/)?avatars/99/original/me.jpg (waits|is) ", shell.stdout)
    assert re.search(r"^demo +", shell.stdout, re.MULTILINE)
    assert picture(200, 100, 5) == dropped.read_bytes()
    assert max(map(len, introduction.replace(str(tmp_path), "/tmp").splitlines())) <= 80


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_demo_ends_tidily_whenever_it_is_asked_to(tmp_path: Path, how: signal.Signals) -> None:
    with running(tmp_path / "demo") as (demo, printed):
        until(lambda: b"batch.stored" in printed.read_bytes(), "it is at work")
        demo.send_signal(how)
        code = demo.wait(30)

    text = printed.read_text()
    objects = [path for path in (tmp_path / "demo/s3/demo-bucket/avatars/1").rglob("*") if path.is_file()]
    assert 0 == code and 6 == len(objects)
    assert "daemon.drained" in text and "Traceback" not in text
    assert f"all of it is kept in {tmp_path / 'demo'}" in text


def test_the_demo_touches_no_directory_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")

    demo = subprocess.run([*DEMO, "--dir", str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)

    assert 64 == demo.returncode
    assert "is in use" in demo.stdout
    assert ["mine"] == [path.name for path in tmp_path.iterdir()]
