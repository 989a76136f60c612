"""Requests over connections that are kept alive, hundreds of them from one thread with an event loop.

Nothing is sent twice here: a request ends with the answer to it, or with the fault that kept it from having one.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

_IDLE_S = 4.0  # servers close what is idle, `rclone serve s3` among them, and a request that meets that has no answer
_MOST_BYTES = 1 << 20  # of an answer: to a PUT none is larger than an error document


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go: the scheme's TLS or none of it, host and port."""

    host: str
    port: int
    is_tls: bool


@dataclass(slots=True)
class Answer:
    """What came back. headers: by lower-case name."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Unanswered(OSError):
    """A request has no answer. was_sent: it may have been carried out all the same."""

    def __init__(self, why: str, *, was_sent: bool) -> None:
        super().__init__(why)
        self.was_sent = was_sent


End = Answer | Unanswered


@dataclass(slots=True)
class _Request:
    message: bytes
    done: Callable[[End], None]


class Wire:
    """Sends requests, at most `connections` at once to one origin; safe to share between threads.

    tls: makes the context for origins with TLS.
    """

    def __init__(
        self, *, connections: int, connect_timeout_s: float, read_timeout_s: float, tls: Callable[[], ssl.SSLContext]
    ) -> None:
        self._connections = connections
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._tls = tls
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._given: deque[tuple[Origin, _Request]] = deque()
        self._is_woken = False
        self._pools: dict[Origin, _Pool] = {}

    def send(self, origin: Origin, message: bytes, done: Callable[[End], None]) -> None:
        """Send a request. `done` is called with what came of it, in the thread of the loop, where nothing may block."""
        self._given.append((origin, _Request(message, done)))
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name="wire", daemon=True)
                self._thread.start()
            if not self._is_woken:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._take)

    def close(self) -> None:
        """Close all connections. Requests that are under way end unanswered; the next one begins anew."""
        with self._lock:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._end, loop)
            thread.join()

    # In the loop's thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
            loop.call_soon(loop.stop)  # what closing has called for
            loop.run_forever()
        finally:
            loop.close()

    def _take(self) -> None:
        self._is_woken = False
        while self._given:
            origin, request = self._given.popleft()
            pool = self._pools.get(origin)
            if pool is None:
                try:
                    pool = _Pool(origin, self._connections, self._connect_timeout_s, self._read_timeout_s, self._tls)
                except Exception as error:  # no such CA bundle, no such profile: whatever `tls` may raise
                    request.done(Unanswered(f"{type(error).__name__}: {error}", was_sent=False))
                    continue
                self._pools[origin] = pool
            pool.take(request)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._take()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        loop.call_soon(loop.stop)


class _Pool:
    """The connections to one origin, and the requests that wait for one."""

    def __init__(
        self, origin: Origin, most: int, connect_timeout_s: float, read_timeout_s: float, tls: Callable[[], ssl.SSLContext]
    ) -> None:
        self._origin = origin
        self._most = most
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._context = tls() if origin.is_tls else None
        self._idle: dict[_Connection, None] = {}  # the one that was used last comes last
        self._open: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Request] = deque()
        self.loop = asyncio.get_running_loop()

    def take(self, request: _Request) -> None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_fresh():
                connection.send(request)
                return
            connection.close()
        self._waiting.append(request)
        if len(self._open) + len(self._opening) < self._most and len(self._opening) < len(self._waiting):
            task = self.loop.create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: _Connection(self), self._origin.host, self._origin.port, ssl=self._context
                )
        except (OSError, ValueError) as error:  # a name that is no host's is a ValueError
            if not self._open:  # else those that are open serve all who wait
                self._refuse_waiting(f"connect: {error or type(error).__name__}")
            return
        self._open.add(connection)
        self.is_free(connection)

    def is_free(self, connection: _Connection) -> None:
        """Use a connection again, for whoever waits longest."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle[connection] = None

    def is_gone(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        if self._waiting and len(self._open) + len(self._opening) < self._most:
            self.take(self._waiting.popleft())

    def _refuse_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            request.done(Unanswered(why, was_sent=False))

    def close(self) -> None:
        for task in self._opening:
            task.cancel()
        for connection in list(self._open):
            connection.close()
        self._refuse_waiting("closed")


class _Connection(asyncio.Protocol):
    """One connection, with one request on it at a time."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._request: _Request | None = None
        self._answer = Answer()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._idle_since = 0.0

    def is_fresh(self) -> bool:
        """Say whether the server has likely not closed it yet."""
        assert self._transport is not None, "it was opened"
        return not self._transport.is_closing() and self._pool.loop.time() - self._idle_since < _IDLE_S

    def send(self, request: _Request) -> None:
        assert self._transport is not None, "it was opened"
        self._request = request
        self._answer = Answer()
        self._deadline = self._pool.loop.call_later(self._pool.read_timeout_s, self._late)
        self._transport.write(request.message)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _late(self) -> None:
        self._finish(Unanswered(f"no answer within {self._pool.read_timeout_s:g} s", was_sent=True))
        self.close()

    def _finish(self, end: End) -> None:
        request, self._request = self._request, None
        if self._deadline is not None:
            self._deadline.cancel()
        if request is not None:
            request.done(end)

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "it is a stream"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            self._finish(Unanswered(f"no HTTP came back: {error}", was_sent=True))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(Unanswered(f"the connection was closed: {error or 'by the server'}", was_sent=True))
        self._pool.is_gone(self)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        if len(self._answer.body) + len(body) > _MOST_BYTES:
            raise ValueError("it is too long")
        self._answer.body += body

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        if self._answer.status < 200:  # it goes on
            self._answer = Answer()
            return
        is_asked = self._request is not None  # a server that speaks unasked has closed with us
        keeps = is_asked and self._parser.should_keep_alive()
        self._finish(self._answer)
        if keeps:
            self._idle_since = self._pool.loop.time()
            self._pool.is_free(self)
        else:
            self.close()
