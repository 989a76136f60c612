"""An app with Paperclip that never rests: it saves, replaces, reprocesses, destroys and rolls back, and remembers it all.

    python -m tests.busy_app '{"attachment": "app1", "root": "/…/spool", …}'

Its report is a line of JSON, at the end.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.paperclip import App, How
from tests.writers import PATIENCE_S, Witness, content

STYLES = ("original", "medium", "thumb")
NAMES = ("me.dat", "you.dat")
_HOWS: tuple[How, ...] = ("rename", "rename", "close_before_rename", "copy")


@dataclass(frozen=True, slots=True)
class Task:
    """What an app is to do. attachment: its own; nobody else writes below it. bucket: the S3 server's directory of it."""

    attachment: str
    root: str
    bucket: str
    records: int
    rest_s: float
    seed: int


@dataclass(slots=True)
class Report:
    """What an app has done.

    newest: path → the version that must be in the bucket at the end. loose: paths of what was destroyed or rolled back:
    any version of theirs may be there, or none. replaced: paths whose name gave way to another: none may be there.
    failed: saves into which somebody else put his hands. lost: as a writer's.
    """

    attachment: str
    saves: int = 0
    newest: dict[str, int] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lost: list[tuple[str, int, int | None]] = field(default_factory=list)


class BusyApp:
    """Does something to one of its records, again and again, until it is told to stop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._app = App(Path(task.root))
        self._witness = Witness(task.root, task.bucket)
        self._chance = random.Random(f"{task.seed} {task.attachment}")
        self._names: dict[int, str] = {}  # record → the name that the app's row has
        self._versions: dict[str, int] = {}
        self._loose: set[str] = set()
        self._replaced: set[str] = set()
        self._report = Report(task.attachment)
        self._is_stopped = False

    def stop(self) -> None:
        self._is_stopped = True

    def run(self) -> Report:
        acts: list[Callable[[int], None]] = [
            self._save, self._save, self._save_again, self._save_other, self._reprocess, self._destroy, self._roll_back,
        ]  # fmt: skip
        while not self._is_stopped:
            record = self._chance.randrange(self._task.records)
            self._demand_what_it_has(record)
            self._chance.choice(acts)(record)
            time.sleep(self._chance.expovariate(1 / self._task.rest_s))
        self._report.loose, self._report.replaced = sorted(self._loose), sorted(self._replaced)
        return self._report

    # What it does

    def _save(self, record: int) -> None:
        if record in self._names:
            return
        name = self._chance.choice(NAMES)
        self._write(record, name, STYLES)
        self._names[record] = name

    def _save_again(self, record: int) -> None:
        if (name := self._names.get(record)) is not None:
            self._app.destroy(self._task.attachment, record, name, STYLES)
            self._write(record, name, STYLES)

    def _save_other(self, record: int) -> None:
        """Under another name: when its original is proven, the old one's keys are to go."""
        if (old := self._names.get(record)) is None:
            return
        name = next(name for name in NAMES if name != old)
        self._app.destroy(self._task.attachment, record, old, STYLES)
        self._forget(record, old, self._replaced)
        self._write(record, name, STYLES)
        self._names[record] = name

    def _reprocess(self, record: int) -> None:
        if (name := self._names.get(record)) is not None:
            self._write(record, name, ["thumb"])

    def _destroy(self, record: int) -> None:
        if (name := self._names.pop(record, None)) is not None:
            self._app.destroy(self._task.attachment, record, name, STYLES)
            self._forget(record, name, self._loose)
            # What took the place of another name may never have got into the bucket: then nothing replaced that one.
            of_it = {path for path in self._replaced if path.startswith(f"{self._task.attachment}/{record}/")}
            self._replaced -= of_it
            self._loose |= of_it

    def _roll_back(self, record: int) -> None:
        """The files are there, the row is not; another save may take the same number."""
        if record not in self._names:
            name = self._chance.choice(NAMES)
            self._write(record, name, STYLES)
            self._forget(record, name, self._loose)

    def _write(self, record: int, name: str, styles: Iterable[str]) -> None:
        paths = {style: f"{self._task.attachment}/{record}/{style}/{name}" for style in styles}
        while True:
            for path in paths.values():
                self._versions[path] = self._versions.get(path, 0) + 1
            contents = {style: content(path, self._versions[path]) for style, path in paths.items()}
            how = self._chance.choice(_HOWS)
            try:
                self._app.save(self._task.attachment, record, name, contents, how=how, slow=self._chance.random() * 0.02)
            except FileNotFoundError as error:
                self._report.failed.append(f"{how}: {error}")
                continue
            break
        for path in paths.values():
            self._report.newest[path] = self._versions[path]
            self._loose.discard(path)
            self._replaced.discard(path)
        self._report.saves += 1

    def _forget(self, record: int, name: str, whereto: set[str]) -> None:
        for path in [path for path in self._report.newest if path.startswith(f"{self._task.attachment}/{record}/")]:
            if path.endswith(f"/{name}"):
                del self._report.newest[path]
                whereto.add(path)

    # Has it survived?

    def _demand_what_it_has(self, record: int) -> None:
        for path, version in self._report.newest.items():
            if not path.startswith(f"{self._task.attachment}/{record}/"):
                continue
            deadline = time.monotonic() + PATIENCE_S
            while not self._witness.sees(path, version):
                if time.monotonic() > deadline:
                    self._report.lost.append((path, version, self._witness.in_bucket(path)))
                    break
                time.sleep(0.01)


def main() -> None:
    app = BusyApp(Task(**json.loads(sys.argv[1])))
    signal.signal(signal.SIGTERM, lambda *_: app.stop())
    print(json.dumps(asdict(app.run())))


if __name__ == "__main__":
    main()
