"""The rules of ARCHITECTURE.md, held: imports go down the ladder, packages have one home, only few may do certain things."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "spoold").rglob("*.py"))
NO_ROOMS = {"__init__", "__main__", "migrations"}

# Which rooms of one floor may use each other, and the pairs that ARCHITECTURE.md gives in words.
PAIRS = {
    ("doubts", "clock"),
       ("clock", "model"), ("layout", "errors"), ("layout", "model"), ("layout", "template"), ("template", "errors"),
    ("template", "model"), ("completeness", "model"), ("digest", "model"), ("content_type", "container"),
    ("yaml_places", "errors"), ("cli", "demo"), ("store", "store_faults"), ("store", "fastput"),
    ("watcher", "looker"), ("watcher", "observing"), ("cleanup", "aside"), ("explain", "looker"),
    ("config", "config_values"), ("config", "config_rules"), ("config", "config_words"),
    ("config_rules", "config_values"), ("config_words", "config_values"), ("config_words", "config_rules"),
}  # fmt: skip
HOMES = {
    "watchdog": {"observing"},
    "boto3": {"store"},
    "botocore": {"store", "store_faults"},
    "urllib3": {"store", "store_faults"},
    "PIL": {"styles", "demo"},
    "tenacity": {"uploader"},
    "yaml": {"yaml_places", "demo"},
    "pydantic": {"config", "config_values", "config_rules", "config_words"},
    "pydantic_core": {"config", "config_values", "config_rules", "config_words"},
    "sqlalchemy": {"ledger", "migrations"},
    "alembic": {"ledger", "migrations"},
    "click": {"cli", "terminal"},
    "rich": {"terminal"},
    "puremagic": {"content_type"},
    "awscrt": {"digest"},
    "httptools": {"wire"},
    "sqlite3": {"ledger", "demo"},
}


def room_of(file: Path) -> str:
    """Return the room a file is part of: its module, or the package that it stands in."""
    below = file.relative_to(ROOT / "spoold")
    return below.parts[0].removesuffix(".py")


def ladder() -> dict[str, int]:
    """Return each room's floor, 0 the ground, as the table in ARCHITECTURE.md has it."""
    floors: dict[str, int] = {}
    floor = -1
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text[text.index("| floor | module |") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, modules = [cell.strip() for cell in line.split("|")[1:3]]
        floor += bool(name)
        modules = re.sub(r"\(→[^)]*\)", "", modules)
        for module in re.findall(r"`([a-z_0-9]+)/?`", modules):
            floors[module] = floor
    return floors


def imports_of(file: Path) -> Iterator[str]:
    """Yield the full names of what a file imports when it runs."""
    tree = ast.parse(file.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" if node.module == "spoold" else node.module for alias in node.names)


def calls_in(file: Path) -> set[str]:
    """Return the attribute names that a file calls: `unlink` of `os.unlink(…)` and of `path.unlink()`."""
    return {
        node.func.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


def test_the_table_in_architecture_names_every_room() -> None:
    rooms = {room_of(file) for file in ROOMS} - NO_ROOMS

    assert rooms == set(ladder())


@pytest.mark.parametrize(
    "file", [file for file in ROOMS if room_of(file) not in NO_ROOMS], ids=lambda file: str(file.relative_to(ROOT))
)
def test_imports_go_down_the_ladder(file: Path) -> None:
    floors = ladder()
    here = room_of(file)
    used = {name.split(".")[1] for name in imports_of(file) if name.startswith("spoold.")} - {here, "__version__"}

    upward = {name for name in used if floors[name] >= floors[here] and (here, name) not in PAIRS}
    assert set() == upward, f"{here} is on floor {floors[here]}"


@pytest.mark.parametrize("package", HOMES)
def test_a_third_party_package_has_one_home(package: str) -> None:
    users = {room_of(file) for file in ROOMS if any(name.split(".")[0] == package for name in imports_of(file))}

    assert users <= HOMES[package]


def test_only_cleanup_deletes() -> None:
    """Others remove nothing but what they made themselves a moment before."""
    removing = {"unlink", "rmdir", "rmtree", "remove", "removedirs", "delete"}
    own_things = {
        "ledger": "the draft of its own file",
        "owner": "its lock files", "spool": "its drafts and probes", "store": "the verb that cleanup calls",
        "renames": "the second half of a rename, where the filesystem has no better", "demo": "its own scratch directory",
    }  # fmt: skip

    removers = {room_of(file) for file in ROOMS if calls_in(file) & removing}

    assert removers - set(own_things) <= {"cleanup"}


def test_nobody_sleeps_but_commands_that_wait() -> None:
    assert {"cli", "terminal", "demo"} >= {room_of(file) for file in ROOMS if "sleep" in calls_in(file)}


def test_one_batch_start_to_finish_stands_on_one_page() -> None:
    tree = ast.parse((ROOT / "spoold/pipeline.py").read_text())
    [walk] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "walk"]

    assert walk.end_lineno is not None and walk.end_lineno - walk.lineno < 40
