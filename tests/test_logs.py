"""Logs are a product: one event, one line, stable keys in one order."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator

import pytest
import structlog

from spoold import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    structlog.reset_defaults()


def written(format: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    logs.configure(format=format, level=level, stream=stream)
    log = structlog.get_logger()
    log.debug("file.stored", path="avatars/42/thumb/me.jpg")
    log.warning("batch.deferred", hint="", detail="503 SlowDown\nand more", due_in_s=8.0, record="avatars/42", spool="photos")
    return stream.getvalue().splitlines()


def test_an_event_is_one_line_of_json_with_its_keys_in_one_order() -> None:
    [line] = written("json")

    assert ["timestamp", "level", "event", "spool", "record", "due_in_s", "detail"] == list(json.loads(line))
    assert "batch.deferred" == json.loads(line)["event"]


def test_a_moment_is_utc_in_iso_8601() -> None:
    [line] = written("json")

    assert json.loads(line)["timestamp"].endswith("Z")


def test_what_is_empty_says_nothing() -> None:
    [line] = written("json")

    assert "hint" not in json.loads(line)


def test_the_level_decides_what_is_told() -> None:
    assert 2 == len(written("json", "debug"))
    assert [] == written("json", "error")


def test_the_console_is_plain_where_nobody_looks() -> None:
    [line] = written("console")[:1]

    assert "batch.deferred" in line and "\x1b" not in line


def test_no_color_is_honoured_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    logs.configure(format="console", level="info", stream=terminal)

    structlog.get_logger().info("daemon.ready", spools=["uploads"])

    assert "daemon.ready" in terminal.getvalue() and "\x1b" not in terminal.getvalue()


def test_a_thread_that_dies_is_told_in_one_line_like_everything_else() -> None:
    """watchdog's reader can die of a KeyError (FACTS 13): Python's own words about it are twenty lines."""
    stream = io.StringIO()
    logs.configure(format="json", level="info", stream=stream)
    logs.tell_of_threads()

    thread = threading.Thread(target={}.pop, args=("avatars/42",), name="reader")
    thread.start()
    thread.join()

    [line] = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert ("thread.died", "reader: KeyError('avatars/42')") == (line["event"], line["detail"])
    assert "Traceback" in line["exception"]


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_terminal_obeys_a_name_and_a_line_stays_one(format: str) -> None:
    """Whoever uploads chooses it: U+009B begins a sequence as ESC [ does, and many end their lines at U+2028."""
    stream = io.StringIO()
    logs.configure(format=format, level="info", stream=stream)
    name = "a\x1b]0;b\x07\x7f\x85\x9b31m\u2028\u202e.jpg"

    structlog.get_logger().info("file.stored", path=name, detail=f"put {name}: no\nnever")

    [line] = stream.getvalue().splitlines()
    assert line.isprintable()
    if format == "json":
        assert name == json.loads(line)["path"]
