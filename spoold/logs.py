"""Logs as a product: one event, one line, stable keys; JSON for machines, colours for people at a terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import Any, TextIO

import structlog

from spoold.printable import printable

_FIRST_KEYS = ("spool", "record", "batch", "path", "key", "style", "attempt", "files", "size_bytes", "elapsed_s", "due_in_s",
               "error", "detail", "hint")  # fmt: skip


def configure(*, format: str, level: str, stream: TextIO | None = None) -> None:
    """Log to `stream`, standard output by default. format: "json" or "console"."""
    stream = stream or sys.stdout
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _in_order,
    ]
    if format == "json":
        renderer: Any = structlog.processors.JSONRenderer(serializer=_json)
    else:
        colors = stream.isatty() and "NO_COLOR" not in os.environ
        shared[1] = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        renderer = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=18, sort_keys=False)
        shared.append(_harmless)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,  # SIGHUP may change the level,
    )
    # What libraries have to say is for developers of spoold; watchdog's one useful warning has its own listener.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(logging.WARNING)


def tell_of_threads() -> None:
    """Log a thread that ends by an exception as one line too. Ours take the daemon with them; libraries' are replaced."""

    def tell(end: threading.ExceptHookArgs) -> None:
        if end.exc_value is not None and end.exc_type is not SystemExit:
            name = end.thread.name if end.thread is not None else None
            structlog.get_logger().warning("thread.died", detail=f"{name}: {end.exc_value!r}", exc_info=end.exc_value)

    threading.excepthook = tell


def _json(event: dict[str, Any], **arguments: Any) -> str:
    """Return one line: also for those who end lines at U+2028, and for terminals that obey U+009B."""
    text = json.dumps(event, ensure_ascii=False, **arguments)
    return text if text.isprintable() else "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _harmless(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Let no terminal obey a file's name; line ends and tabs are written out by what lays out the line."""
    shown = {name: printable(value, but="\n\r\t") for name, value in event.items() if isinstance(value, str)}
    return event | shown


def _in_order(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Put the keys in one order: when, how bad, what, then who and how much. What is empty says nothing."""
    names = ["timestamp", "level", "event", *_FIRST_KEYS]
    ordered = {name: event.pop(name) for name in names if name in event}
    return {name: value for name, value in (ordered | event).items() if value not in (None, "")}
