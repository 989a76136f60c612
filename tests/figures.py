"""Figures that the tests measure. `record` prints them; where SPOOLD_FIGURES names a file, they are appended to it too.

record("race", tool="spoold", writer="rename", filesystem="ext4", rewrites=20_000, lost=0)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "SPOOLD_FIGURES"


def record(what: str, **figures: str | int | float) -> None:
    """Keep one line of figures. what: the kind of run, in the singular; the keys of one kind are always the same."""
    line = json.dumps({"what": what, **figures})
    print(f"\n{line}")
    if path := os.environ.get(FILE):
        with Path(path).open("a") as file:
            file.write(line + "\n")
