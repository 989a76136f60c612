"""What a person sees of the ledger in a terminal: the overview of all spools, and the card of one record."""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spoold import config
from spoold.ledger import STATES, TROUBLE, Ledger
from spoold.owner import OWNERS, living
from spoold.printable import printable
from spoold.spool import names_kept

_MOST_TROUBLED = 10
_ENDLESS = 100_000  # characters in a line


def overview(settings: config.Settings, ledger: Ledger) -> dict[str, Any]:
    counts, held, stored = ledger.counts(), ledger.held(), ledger.bytes_by_spool()
    spools = []
    for spool in settings.spools:
        hold = held.get(spool.name)
        objects, size_bytes = stored.get(spool.name, (0, 0))
        spools.append(
            {
                "spool": spool.name,
                "states": counts.get(spool.name, {}),
                "objects": objects,
                "bytes": size_bytes,
                "held": None if hold is None else dict(hold._mapping),
                "kept": names_kept(spool.root),
            }
        )
    words = living(settings.state_dir / OWNERS)
    return {
        "daemons": None if words is None else len(words),
        "faults": sorted(filter(None, words or ())),
        "spools": spools,
        "troubled": ledger.troubled(limit=_MOST_TROUBLED),
        "replaced_waiting": ledger.replaced_waiting(),
    }


def table(overview: dict[str, Any]) -> Group:
    styles = {"dead": "red", "stalled": "yellow", "retrying": "yellow", "uploading": "cyan", "done": "green"}
    present = {state for spool in overview["spools"] for state in spool["states"]}
    states = [state for state in STATES if state in present or state in ("queued", "uploaded", "done")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("spool")
    for state in states:
        table.add_column(state, justify="right")
    table.add_column("objects", justify="right")
    table.add_column("size", justify="right")
    notes: list[Text] = []
    for spool in overview["spools"]:
        counts = [spool["states"].get(state, 0) for state in states]
        cells = [Text(str(n), style=styles.get(state, "") if n else "dim") for state, n in zip(states, counts, strict=True)]
        table.add_row(spool["spool"], *cells, str(spool["objects"]), human(spool["bytes"]))
        if hold := spool["held"]:
            remedy = f"; {hold['hint']}" if hold["hint"] else ""
            notes.append(_text(f"{spool['spool']} is held since {hold['since']}: {hold['error']}{remedy}", style="red"))
        for name in spool["kept"]:
            kept = f"{spool['spool']} keeps what came back to a taken name: spoold why .spoold/kept/{shlex.quote(name)}"
            notes.append(_text(kept, style="yellow"))
    notes += [_text(f"the daemon says: {fault}", style="red") for fault in overview["faults"]]
    if overview["daemons"] == 0:
        notes.append(Text("no daemon is running with this configuration: spoold run", style="yellow"))
    if not overview["troubled"]:
        return Group(table, *notes)
    troubled = Table(box=None, show_header=False, pad_edge=False)
    for row in overview["troubled"]:
        troubled.add_row(Text(row["state"], style=styles[row["state"]]), _text(row["path"]), _text(row["error"] or ""))
    more = sum(spool["states"].get(state, 0) for spool in overview["spools"] for state in TROUBLE) - len(overview["troubled"])
    return Group(table, *notes, "", troubled, *([f"and {more} more"] if more > 0 else []))


def card_of(card: dict[str, Any]) -> Group:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    for name in ("spool", "path", "state", "processing", "version", "files", "bytes", "attempts", "next_attempt_at",
                 "error_code", "error", "first_seen_at", "uploaded_at", "done_at", "why"):  # fmt: skip
        if card[name] is not None:
            facts.add_row(name, _text(card[name]))
    parts: list[Any] = [facts]
    objects = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("style", "key", "size", "content_type"):
        objects.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for item in card["objects"]:
        objects.add_row(*(_text(item[name]) for name in ("style", "key", "size", "content_type")))
    if card["objects"]:
        parts += ["", objects]
    history = Table(box=None, show_header=False, pad_edge=False)
    for item in card["history"]:
        rest = "  ".join(f"{k}={v}" for k, v in item.items() if k not in ("at", "event") and v not in (None, ""))
        history.add_row(item["at"], item["event"], _text(rest))
    return Group(*parts, "", history)


def show(what: Group) -> None:
    """Print for a person; into a pipe without colours, and each line in one piece for `grep`."""
    if sys.stdout.isatty():
        return Console(highlight=False).print(what)
    plain = Console(file=io.StringIO(), highlight=False, width=_ENDLESS)
    with plain.capture() as printed:
        plain.print(what)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def watch(look: Callable[[], dict[str, Any]]) -> None:
    """Show the overview that `look` returns, and every change of it, until Ctrl-C."""
    with Live(table(look()), console=Console(highlight=False), refresh_per_second=4) as live:
        while True:
            time.sleep(0.5)
            live.update(table(look()))


def _text(value: object, *, style: str = "") -> Text:
    return Text(printable(str(value)), style=style)


def human(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
