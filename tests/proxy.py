"""A proxy before an S3 server that does to chosen requests what networks and servers do.

    with FaultProxy(server.endpoint_url) as proxy:
        gate = threading.Event()
        proxy.on("PUT", "/original/", Hold(gate), times=1)     # the first PUT of an original lands late
        proxy.on("PUT", "/thumb/", Answer(503, SLOW_DOWN), times=3)
        s3 = server.client(proxy.endpoint_url)
        ...
        proxy.await_seen("PUT", "/original/")

The Host header passes through unchanged, so a signature made for the proxy's address holds at the server.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from spoold.demo import free_port

HTML_PAGE = b"<!DOCTYPE html><html><title>Welcome to the hotel</title><body>Please log in.</body></html>"


def error_body(code: str, message: str = "made up by the fault proxy") -> bytes:
    """Return the XML with which S3 says what is wrong."""
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


SLOW_DOWN = error_body("SlowDown")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent. `path` as it stands in the request line, with its query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """Bucket and key, without escapes and query."""
        return urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")


@dataclass(slots=True)
class Seen:
    """What became of one request. Filled in as it happens; times are monotonic seconds.

    upstream_status: what the server said, None if it was never asked or did not answer.
    status: what the client got, None if it got no answer.
    """

    method: str
    path: str
    key: str
    headers: Mapping[str, str]
    size: int
    sha256: str
    fault: Fault
    at: float
    upstream_status: int | None = None
    upstream_at: float | None = None
    status: int | None = None
    ended_at: float | None = None


# The faults. A fault is done to one request.


@dataclass(frozen=True, slots=True)
class Pass:
    """Nothing: forward the request, hand back the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer without asking the server."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/xml"})


HTML = Answer(200, HTML_PAGE, {"Content-Type": "text/html"})
"""A captive portal (FACTS 23)."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait before forwarding, `seconds` or until the event; then go on with `then`. The client waits meanwhile."""

    until: float | threading.Event
    then: Fault = Pass()


@dataclass(frozen=True, slots=True)
class DelayAnswer:
    """Forward at once, wait, then hand back the answer."""

    until: float | threading.Event


@dataclass(frozen=True, slots=True)
class LoseAnswer:
    """The server acts, the client never learns: close the connection in place of its answer."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection; the server never hears of the request."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Let the request land late: forward it when `gate` is set, even if the client has long gone.

    hang_up: close the client's connection at once, so that it need not wait for its timeout.
    """

    gate: threading.Event
    hang_up: bool = False


@dataclass(frozen=True, slots=True)
class Flip:
    """Change one byte of the request's body on its way to the server."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class FlipAnswer:
    """Change one byte of the answer's body on its way to the client."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class CutAnswer:
    """Hand back the head and `after` bytes of the answer's body, then close."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class RewriteAnswer:
    """Set headers of the answer; None takes one away, and its name may be a pattern then: `x-amz-checksum-.*`."""

    headers: Mapping[str, str | None]


Fault = Pass | Answer | Delay | DelayAnswer | LoseAnswer | Reset | Hold | Flip | FlipAnswer | CutAnswer | RewriteAnswer

Rule = Callable[[Request], Fault | None]
"""Says what to do with a request; None leaves it to the next rule. Called in the connection's thread."""


class FaultProxy:
    """A proxy on loopback before `upstream` (an endpoint URL). The first rule of `rules` that returns a fault wins."""

    def __init__(self, upstream: str) -> None:
        self.port = free_port()
        self.rules: list[Rule] = []
        parts = urllib.parse.urlsplit(upstream)
        assert parts.hostname is not None and parts.port is not None, upstream
        self._upstream = (parts.hostname, parts.port)
        self._seen: list[Seen] = []
        self._changed = threading.Condition()
        self._listener: _Listener | None = None
        self._stopping = threading.Event()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def seen(self) -> list[Seen]:
        """Every request so far, in the order in which their bodies were read."""
        with self._changed:
            return list(self._seen)

    def __enter__(self) -> Self:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. What is held is dropped and never lands."""
        self._stopping.set()
        self.go_away()

    def on(self, method: str, key: str, fault: Fault, *, times: int | None = None, skip: int = 0) -> Rule:
        """Do `fault` to requests of `method` ("PUT|POST") whose `bucket/key` contains `key`; return the rule.

        times: to so many of them, then no more. skip: leave the first few alone.
        """
        left, lock = [skip, times], threading.Lock()

        def rule(request: Request) -> Fault | None:
            if not re.fullmatch(method, request.method) or key not in request.key:
                return None
            with lock:
                if left[0]:
                    left[0] -= 1
                    return None
                if left[1] is None:
                    return fault
                if left[1] == 0:
                    return None
                left[1] -= 1
                return fault

        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Do nothing to any request from now on; what is held stays held."""
        self.rules.clear()

    def requests(self, method: str = ".*", key: str = "") -> list[Seen]:
        """Return the requests so far of `method` whose `bucket/key` contains `key`."""
        return [seen for seen in self.seen if re.fullmatch(method, seen.method) and key in seen.key]

    def await_seen(self, method: str = ".*", key: str = "", *, count: int = 1, timeout_s: float = 20.0) -> Seen:
        """Wait until `count` such requests have arrived; return the last of them."""
        return self._await(lambda: self.requests(method, key), count, timeout_s, f"{method} {key}")

    def await_ended(self, method: str = ".*", key: str = "", *, count: int = 1, timeout_s: float = 20.0) -> Seen:
        """Wait until `count` such requests are over, answered or not, held ones landed; return the last to arrive."""
        return self._await(
            lambda: [seen for seen in self.requests(method, key) if seen.ended_at is not None],
            count,
            timeout_s,
            f"the end of {method} {key}",
        )

    def go_away(self) -> None:
        """Refuse connections and close those there are, until `come_back`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()
            listener.close_connections()

    def come_back(self) -> None:
        """Listen, on the same port as ever."""
        assert self._listener is None, "there already"
        self._listener = _Listener(("127.0.0.1", self.port), self)
        # The poll interval is how long `shutdown` may take.
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), name="proxy", daemon=True).start()

    def _await(self, found: Callable[[], list[Seen]], count: int, timeout_s: float, what: str) -> Seen:
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(found()) >= count, timeout_s)
        assert arrived, f"waited {timeout_s} s for {count} × {what}, saw {len(found())}"
        return found()[count - 1]

    # For the handler, in its threads.

    def decide(self, request: Request) -> Seen:
        """Write the request down, with what is to be done to it."""
        faults = (rule(request) for rule in list(self.rules))
        fault = next((fault for fault in faults if fault is not None), Pass())
        seen = Seen(
            request.method,
            request.path,
            request.key,
            request.headers,
            len(request.body),
            hashlib.sha256(request.body).hexdigest(),
            fault,
            time.monotonic(),
        )
        with self._changed:
            self._seen.append(seen)
            self._changed.notify_all()
        return seen

    def end(self, seen: Seen, status: int | None) -> None:
        """Write down what the client got."""
        with self._changed:
            seen.status, seen.ended_at = status, time.monotonic()
            self._changed.notify_all()

    def wait(self, until: float | threading.Event) -> bool:
        """Wait for a delay or an event; say whether it came before the proxy was stopped."""
        if not isinstance(until, threading.Event):
            return not self._stopping.wait(until)
        while not until.wait(0.02):
            if self._stopping.is_set():
                return False
        return not self._stopping.is_set()

    def forward(self, request: Request, seen: Seen) -> _Answered | None:
        """Ask the server; None if it is away or breaks off."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            if request.body and "content-length" not in {name.lower() for name in request.headers}:
                connection.putheader("Content-Length", str(len(request.body)))
            connection.putheader("Connection", "close")
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            answered = _Answered(answer.status, answer.reason, answer.getheaders(), answer.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        seen.upstream_status, seen.upstream_at = answered.status, time.monotonic()
        return answered


@dataclass(frozen=True, slots=True)
class _Answered:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "expect",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
}


_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: closing sends RST."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        with self._lock:
            self._connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _AT_ONCE:
            self.close_request(request)  # an orderly shutdown would send FIN before the RST
        else:
            super().shutdown_request(request)

    def close_connections(self) -> None:
        """Wake the threads that read from a client; those that hold a request go on."""
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is what this is all about."""


class _Handler(BaseHTTPRequestHandler):
    """One client's connection, kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def relay(self) -> None:
        proxy = self.server.proxy
        request = Request(self.command, self.path, dict(self.headers.items()), self._read_body())
        seen = proxy.decide(request)
        proxy.end(seen, self._do(seen.fault, request, seen))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def _do(self, fault: Fault, request: Request, seen: Seen) -> int | None:
        """Do the fault; return the status that the client got."""
        proxy = self.server.proxy
        match fault:
            case Answer(status, body, headers):
                return self._send(_Answered(status, "", list(headers.items()), body))
            case Reset():
                return self._reset()
            case Delay(until, then):
                return self._do(then, request, seen) if proxy.wait(until) else self._close()
            case Hold(gate, hang_up):
                if hang_up:
                    self._close()
                if not proxy.wait(gate):
                    return self._close()
            case Flip(offset):
                request = Request(request.method, request.path, request.headers, _flipped(request.body, offset))
            case _:
                pass

        answered = proxy.forward(request, seen)
        if answered is None:
            return self._reset()
        match fault:
            case LoseAnswer():
                return self._close()
            case DelayAnswer(until) if not proxy.wait(until):
                return self._close()
            case CutAnswer(after):
                return self._send(answered, cut_after=after)
            case FlipAnswer(offset):
                body = _flipped(answered.body, offset)
                return self._send(_Answered(answered.status, answered.reason, answered.headers, body))
            case RewriteAnswer(changes):
                headers = _rewritten(answered.headers, changes)
                return self._send(_Answered(answered.status, answered.reason, headers, answered.body))
            case _:
                return self._send(answered)

    def _read_body(self) -> bytes:
        """Read all of the body; the 100-continue was sent by `handle_expect_100`."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(iter(self._read_chunk, b""))
        return self._read(int(self.headers.get("Content-Length", 0)))

    def _read_chunk(self) -> bytes:
        size = int(self.rfile.readline().partition(b";")[0], 16)
        chunk = self._read(size)
        self.rfile.readline()
        return chunk

    def _read(self, size: int) -> bytes:
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionResetError(f"the client left after {len(body)} of {size} bytes")
        return body

    def _send(self, answered: _Answered, *, cut_after: int | None = None) -> int | None:
        """Hand back an answer; return its status, or None if the client has gone or the answer was cut."""
        if self._client_has_gone():
            return self._close()
        has_length = any(name.lower() == "content-length" for name, _ in answered.headers)
        if self.command == "HEAD" and has_length:
            headers = [pair for pair in answered.headers if pair[0].lower() not in _HOP_BY_HOP]
        else:
            headers = [pair for pair in answered.headers if pair[0].lower() not in {*_HOP_BY_HOP, "content-length"}]
            if answered.status not in (204, 304):
                headers.append(("Content-Length", str(len(answered.body))))
        reason = answered.reason or http.client.responses.get(answered.status, "")
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        body = b"" if self.command == "HEAD" else answered.body[:cut_after]
        try:
            self.wfile.write(f"HTTP/1.1 {answered.status} {reason}\r\n{head}\r\n".encode("latin-1") + body)
        except OSError:
            return self._close()
        if cut_after is not None:
            return self._close()
        return answered.status

    def _client_has_gone(self) -> bool:
        """Ask before writing: what is written to one who has gone is lost without an error."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _close(self) -> None:
        """Close the connection in order, so that the client reads its end."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """Close the connection so that the client gets ECONNRESET."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def _flipped(body: bytes, offset: int) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[offset % len(changed)] ^= 0x01
    return bytes(changed)


def _rewritten(headers: list[tuple[str, str]], changes: Mapping[str, str | None]) -> list[tuple[str, str]]:
    kept = [pair for pair in headers if not any(re.fullmatch(name, pair[0], re.IGNORECASE) for name in changes)]
    return [*kept, *((name, value) for name, value in changes.items() if value is not None)]
