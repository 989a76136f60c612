"""The documents tell the truth: their links lead somewhere, their configurations load, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click import Command

from spoold import config
from spoold.cli import cli
from tests import figures
from tests.figures import Line, filled, newest, table

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert [] == [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?:`|^    )spoold ([a-z]+)", page.read_text(), re.M))

    assert set() == named - set(cli.commands)


def test_the_readme_s_spool_is_all_that_must_be_written() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)

    assert "uploads" == config.parse(block).spools[0].name


PATHS = re.findall(r"^\|[^|]+\| `(/[^`]+)` \| `\"([^\"]+)\"`(.*)\|$", (ROOT / "docs/paperclip.md").read_text(), re.M)


def test_the_table_of_paperclip_s_paths_was_found() -> None:
    assert 4 == len(PATHS)


@pytest.mark.parametrize(("root", "path", "rest"), PATHS)
def test_every_path_of_the_paperclip_page_is_accepted(root: str, path: str, rest: str) -> None:
    spool = {"name": "uploads", "root": root, "path": path, "bucket": "my-app-uploads"}
    spool["key"] = path.split("public/system/")[-1].split("spool/")[-1]
    if match := re.search(r"rails_root: (\S+?)`", rest):
        spool["rails_root"] = match[1]

    settings = config.parse(yaml.safe_dump({"spools": [spool]}))

    assert settings.spools[0].layout().tail in (1, 2)


def test_the_tables_of_the_pages_are_what_was_measured() -> None:
    """Mended by: python -m tests.figures"""
    pages = [(ROOT / "docs" / page).read_text() for page in figures.PAGES]
    lines = newest((ROOT / "docs/figures.jsonl").read_text())

    assert [filled(page, lines) for page in pages] == pages
    named = {kind for page in pages for kind in re.findall(r"<!-- figures: ([a-z-]+)[ a-z_,]* -->", page)}
    assert {line["what"] for line in lines} == named
    assert all(line.get(name, 0) == 0 for line in lines if line.get("tool", "spoold") == "spoold" for name in ("lost", "half"))


def test_a_later_figure_of_the_same_run_takes_the_place_of_the_earlier() -> None:
    lines = newest('{"what": "race", "tool": "a", "lost": 3}\n{"what": "race", "tool": "b", "lost": 4}\n'
                   '{"what": "race", "tool": "a", "lost": 12345}\n')  # fmt: skip

    assert "| tool | lost |\n| --- | ---: |\n| a | 12,345 |\n| b | 4 |" == table(lines, "race")


def test_figures_can_be_added_up() -> None:
    lines: list[Line] = [
        {"what": "kill", "how": "single", "part": "a", "kills": 3},
        {"what": "kill", "how": "single", "part": "b", "kills": 4},
        {"what": "kill", "how": "pair", "part": "a", "kills": 5},
        {"what": "other", "how": "single", "kills": 9},
    ]

    page = filled("<!-- figures: kill by how -->old<!-- end -->", lines)

    assert "| how | kills |\n| --- | ---: |\n| single | 7 |\n| pair | 5 |" in page
    assert page == filled(page, lines)


def test_every_command_teaches() -> None:
    for name, command in cli.commands.items():
        assert isinstance(command, Command)
        assert len(command.help or "") > 40, f"{name} says too little"
