"""Requests over kept-alive connections against servers that do as they like: each ends once, with an answer or with why not."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest

from spoold.wire import Answer, End, Origin, Unanswered, Wire

OK = b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nContent-Length: 0\r\n\r\n'


class Server:
    """Accepts connections and does with each what `serve` says, in a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket, Server], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.accepted = 0
        self.most_open = 0
        self._open = 0
        self._counting = threading.Lock()
        self.origin = Origin("127.0.0.1", self._listener.getsockname()[1], is_tls=False)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._counting:
                self.accepted += 1
                self._open += 1
                self.most_open = max(self.most_open, self._open)
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._serve(connection, self)
            except OSError:
                pass
            finally:
                with self._counting:
                    self._open -= 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket, Server], None]], Server]]:
    servers: list[Server] = []

    def make(how: Callable[[socket.socket, Server], None]) -> Server:
        servers.append(Server(how))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire(connections=4, connect_timeout_s=5, read_timeout_s=1, tls=ssl.create_default_context)
    yield wire
    wire.close()


def read_request(connection: socket.socket) -> bytes:
    """Return one request with its body; b"" where the client has closed."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65_536)
        if not chunk:
            return b""
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < size:
        body += connection.recv(65_536)
    return head + b"\r\n\r\n" + body


def message(body: bytes = b"a cat") -> bytes:
    return f"PUT /b/k HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def sent(wire: Wire, origin: Origin, *messages: bytes) -> list[End]:
    """Send them all at once and return how each ended, in their order."""
    ends: queue.SimpleQueue[tuple[int, End]] = queue.SimpleQueue()
    for number, each in enumerate(messages):
        wire.send(origin, each, lambda end, number=number: ends.put((number, end)))  # type: ignore[misc]
    found = dict(ends.get(timeout=20) for _ in messages)
    assert ends.empty(), "each ends once"
    return [found[number] for number in range(len(messages))]


def answering(*answers: bytes) -> Callable[[socket.socket, Server], None]:
    def how(connection: socket.socket, _: Server) -> None:
        for answer in answers or iter(lambda: OK, None):
            if not read_request(connection):
                return
            connection.sendall(answer)

    return how


def test_requests_share_connections_and_each_has_its_answer(wire: Wire, serve: Callable[..., Server]) -> None:
    def echo(connection: socket.socket, _: Server) -> None:
        while request := read_request(connection):
            body = request.partition(b"\r\n\r\n")[2]
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Said: " + body + b"\r\nContent-Length: 2\r\n\r\nhi")

    server = serve(echo)

    ends = sent(wire, server.origin, *(message(f"{number}".encode()) for number in range(200)))

    assert [f"{number}" for number in range(200)] == [end.headers["x-said"] for end in ends if isinstance(end, Answer)]
    assert {(200, b"hi")} == {(end.status, end.body) for end in ends if isinstance(end, Answer)}
    assert 4 >= server.most_open and 4 >= server.accepted


def test_an_answer_may_come_in_pieces_and_after_a_continue(wire: Wire, serve: Callable[..., Server]) -> None:
    def slowly(connection: socket.socket, _: Server) -> None:
        while read_request(connection):
            for byte in b"HTTP/1.1 100 Continue\r\n\r\n" + OK:
                connection.sendall(bytes([byte]))

    [end, again] = [sent(wire, serve(slowly).origin, message())[0] for _ in range(2)]

    assert isinstance(end, Answer) and isinstance(again, Answer)
    assert (200, '"abc"') == (end.status, end.headers["etag"])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (b"", "the connection was closed: by the server"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the connection was closed: by the server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "the connection was closed: by the server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no HTTP came back"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000, "no HTTP came back"),
    ],
)  # fmt: skip
def test_what_is_no_answer_may_have_been_carried_out(wire: Wire, serve: Callable[..., Server], how: bytes, why: str) -> None:
    [end] = sent(wire, serve(answering(how)).origin, message())

    assert isinstance(end, Unanswered) and end.was_sent
    assert why in str(end)


def test_nobody_is_waited_for_for_ever(wire: Wire, serve: Callable[..., Server]) -> None:
    gate = threading.Event()
    server = serve(lambda connection, _: gate.wait(20) and None)

    ends = sent(wire, server.origin, message(), message())
    gate.set()

    assert [("no answer within 1 s", True)] * 2 == [(str(end), end.was_sent) for end in ends if isinstance(end, Unanswered)]


def test_where_nobody_listens_nothing_was_sent(wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    ends = sent(wire, Origin("127.0.0.1", port, is_tls=False), *[message()] * 10)

    assert [False] * 10 == [end.was_sent for end in ends if isinstance(end, Unanswered)]


def test_a_connection_that_the_server_closes_is_not_used_again(wire: Wire, serve: Callable[..., Server]) -> None:
    closes = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    server = serve(answering(closes))

    ends = [sent(wire, server.origin, message())[0] for _ in range(5)]

    assert [200] * 5 == [end.status for end in ends if isinstance(end, Answer)]
    assert 5 == server.accepted


def test_one_that_was_closed_while_idle_loses_no_request(wire: Wire, serve: Callable[..., Server]) -> None:
    """The server closes after each answer without a word: whoever comes a little later gets another connection."""
    server = serve(answering(OK))

    ends = []
    for _ in range(5):
        ends += sent(wire, server.origin, message())
        threading.Event().wait(0.05)

    assert [200] * 5 == [end.status for end in ends if isinstance(end, Answer)]


def test_what_waits_when_all_is_closed_ends(serve: Callable[..., Server]) -> None:
    wire = Wire(connections=1, connect_timeout_s=5, read_timeout_s=20, tls=ssl.create_default_context)
    gate = threading.Event()
    asked = threading.Event()

    def how(connection: socket.socket, _: Server) -> None:
        read_request(connection)
        asked.set()
        gate.wait(20)

    server = serve(how)
    ends: queue.SimpleQueue[End] = queue.SimpleQueue()
    for _ in range(2):
        wire.send(server.origin, message(), ends.put)
    assert asked.wait(10)

    wire.close()
    gate.set()
    found = [ends.get(timeout=10) for _ in range(2)]

    assert {True, False} == {end.was_sent for end in found if isinstance(end, Unanswered)}


def test_certificates_are_verified(wire: Wire, serve: Callable[..., Server]) -> None:
    server = serve(answering())

    [end] = sent(wire, Origin("127.0.0.1", server.origin.port, is_tls=True), message())

    assert isinstance(end, Unanswered) and not end.was_sent


def test_where_there_is_no_telling_whom_to_trust_nothing_is_sent() -> None:
    """A CA bundle that is not there: the request must not wait for ever, nor those after it."""

    def no_bundle() -> ssl.SSLContext:
        raise FileNotFoundError("/etc/ssl/ours.pem")

    wire = Wire(connections=1, connect_timeout_s=5, read_timeout_s=5, tls=no_bundle)
    try:
        ends = sent(wire, Origin("127.0.0.1", 9, is_tls=True), message(), message())
    finally:
        wire.close()

    assert [False, False] == [end.was_sent for end in ends if isinstance(end, Unanswered)]
    assert "FileNotFoundError: /etc/ssl/ours.pem" in str(ends[0])


def test_a_name_that_can_be_no_hosts_is_nobody(wire: Wire) -> None:
    [end] = sent(wire, Origin("a" * 64 + ".example", 80, is_tls=False), message())

    assert isinstance(end, Unanswered) and not end.was_sent
