"""Figures that the tests measure, and the tables that the documents make of them: no number in there is typed in.

    record("race", tool="spoold", writer="rename", filesystem="ext4", rewrites=20_000, lost=0)

`record` prints a line; where SPOOLD_FIGURES names a file, it is appended to that too. So the document's figures are made by

    SPOOLD_FIGURES=$PWD/docs/figures.jsonl make soak bench
    python -m tests.figures
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

FILE = "SPOOLD_FIGURES"
DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("reliability.md", "performance.md")

Line = dict[str, str | int | float]


def record(what: str, **figures: str | int | float) -> None:
    """Keep one line of figures. what: the kind of run, in the singular; the keys of one kind are always the same.

    What is text tells which run it is, and what is a number what came of it: a later line of the same run replaces it.
    """
    line = json.dumps({"what": what, **figures})
    print(f"\n{line}")
    if path := os.environ.get(FILE):
        with Path(path).open("a") as file:
            file.write(line + "\n")


def newest(text: str) -> list[Line]:
    """Return the newest line of each run, in the order in which the runs first came."""
    lines: dict[tuple[object, ...], Line] = {}
    for line in map(json.loads, text.splitlines()):
        lines[tuple((name, value) for name, value in line.items() if isinstance(value, str))] = line
    return list(lines.values())


def table(lines: list[Line], what: str) -> str:
    """Return the lines of one kind as a table in Markdown."""
    rows = [{name: value for name, value in line.items() if name != "what"} for line in lines if line["what"] == what]
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    head = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |"]
    head += [f"| {' | '.join('---' if name in texts else '---:' for name in names)} |"]
    return "\n".join(head + [f"| {' | '.join(_shown(row.get(name, '')) for name in names)} |" for row in rows])


def totals(lines: list[Line], what: str, by: list[str]) -> list[Line]:
    """Return the lines of one kind added up: one for each combination of what the columns `by` hold."""
    sums: dict[tuple[str, ...], Line] = {}
    for line in lines:
        if line["what"] == what:
            key = tuple(str(line[name]) for name in by)
            total = sums.setdefault(key, {"what": what, **dict(zip(by, key, strict=True))})
            for name, value in line.items():
                if not isinstance(value, str):
                    before = total.get(name, 0)
                    assert not isinstance(before, str), f"{name} is a number here and text there"
                    total[name] = before + value
    return list(sums.values())


def filled(document: str, lines: list[Line]) -> str:
    """Return the document with each `<!-- figures: KIND -->` followed by its table, and `KIND by COLUMN, …` by its totals."""

    def with_table(match: re.Match[str]) -> str:
        what, by = match[1], match[2]
        chosen = totals(lines, what, re.split(r",\s*", by)) if by else lines
        return f"<!-- figures: {what}{f' by {by}' if by else ''} -->\n\n{table(chosen, what)}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: ([a-z-]+)(?: by ([a-z_, ]+?))? -->.*?<!-- end -->", with_table, document, flags=re.DOTALL)


def _shown(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}"


if __name__ == "__main__":
    measured = newest((DOCS / "figures.jsonl").read_text())
    for document in (DOCS / page for page in PAGES):
        document.write_text(filled(document.read_text(), measured))
