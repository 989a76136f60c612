"""Text that may be shown: names come from whoever uploads, and a terminal obeys what stands in them."""

from __future__ import annotations


def printable(text: str, *, but: str = "") -> str:
    """Return the text with each character that shows nothing itself written as Python would; those in `but` stay.

    Control characters of all kinds, what turns the direction of writing, line separators, and what is no Unicode.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in but else each.encode("unicode_escape").decode() for each in text)
