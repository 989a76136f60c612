"""Text that may be shown: no terminal obeys it."""

from __future__ import annotations

import pytest

from spoold.printable import printable
from tests.hostile import NAMES


@pytest.mark.parametrize("name", NAMES.values())
def test_every_character_of_what_is_shown_shows_itself(name: str) -> None:
    assert printable(name).isprintable()
    assert printable(name) == printable(printable(name))


def test_what_a_person_can_read_stays() -> None:
    assert "Ünï code/猫 [1].jpg" == printable("Ünï code/猫 [1].jpg")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31m", "\\x1b[31m"), ("a\nb", "a\\nb"), ("\u202e", "\\u202e"), ("\x9b", "\\x9b"), ("\udcff", "\\udcff")],
)
def test_what_shows_nothing_is_written_out(text: str, shown: str) -> None:
    assert shown == printable(text)


def test_some_may_stay() -> None:
    assert "a\nb\\x1b" == printable("a\nb\x1b", but="\n")
