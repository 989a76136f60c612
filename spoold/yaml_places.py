"""YAML text → plain data, and where each setting in it stands. Knows YAML, not one of the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from spoold.errors import ConfigError, Problem

Loc = tuple[str | int, ...]
"""The way to a setting, as pydantic writes it: `("spools", 0, "root")`."""

ROOT: Loc = ()

MOST_VALUES = 10_000
"""More is no configuration, but aliases of aliases of aliases."""

_TAG = "tag:yaml.org,2002:"
_AS_WRITTEN = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}
_CONVERTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value and its key begin (1-based line and column), and what a scalar looks like in the file."""

    value: tuple[int, int]
    key: tuple[int, int]
    text: str | None = None


@dataclass(slots=True)
class Document:
    """One YAML file as plain data: dict, list, str, int, float, bool and None; the keys are always text.

    problems: what is wrong with it as YAML, and did not keep the rest from being read.
    """

    file: str
    data: object = None
    places: dict[Loc, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, loc: Loc, message: str, remedy: str = "", *, at_key: bool = False) -> Problem:
        """Return a problem of the setting at `loc`, at the nearest place that the file has for it."""
        known, _ = self._resolve(loc)
        place = self.places.get(known)
        line, column = (1, 1) if place is None else place.key if at_key else place.value
        return Problem(self.file, line, column, self.name(loc), message, remedy)

    def name(self, loc: Loc) -> str:
        """Return what a person calls the setting: `spools[0].complete.settle`."""
        known, is_there = self._resolve(loc)
        parts = known if is_there or not loc else (*known, loc[-1])
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
        return dotted.lstrip(".") or "file"

    def text(self, loc: Loc) -> str | None:
        """Return the scalar at `loc` as it is written, without quotes; None where there is no scalar."""
        place = self.places.get(self._resolve(loc)[0])
        return place.text if place else None

    def _resolve(self, loc: Loc) -> tuple[Loc, bool]:
        """Return the part of `loc` that the file has, and whether the last step of it is there.

        Steps that only the validator made (a list that stands for `default: list`) are skipped.
        """
        known, is_there = ROOT, True
        for part in loc:
            is_there = (*known, part) in self.places
            if is_there:
                known = (*known, part)
        return known, is_there


def read(text: str, file: str) -> Document:
    """Return the text as data with its places. Raises ConfigError where it is no YAML, or holds no mapping."""
    document = Document(file)
    node = _compose(text, file)
    if node is None:
        _refuse(file, 1, 1, "is empty", "write at least one spool; config.example.yaml is a start")
    document.data = _Reader(document).value(node, ROOT, node)
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        _refuse(file, *_start(node), f"is {kind}, not settings", "begin with a line such as `spools:`")
    return document


class _Reader:
    """Turns nodes into data. Safe by what it knows: five kinds of scalars, lists and mappings, and no other."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._convert = yaml.SafeLoader("").construct_object
        self._within: list[yaml.Node] = []

    def value(self, node: yaml.Node, loc: Loc, key: yaml.Node) -> object:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self._document.places[loc] = Place(_start(node), _start(key), text)
        if len(self._document.places) > MOST_VALUES:
            _refuse(self._document.file, *_start(node), f"has more than {MOST_VALUES} values", "use fewer aliases")
        if any(node is outer for outer in self._within):
            self._wrong(loc, "contains itself", "write the value out instead of an alias")
            return None
        self._within.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, loc)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.value(item, (*loc, index), item) for index, item in enumerate(node.value)]
            return self._scalar(node, loc)
        finally:
            self._within.pop()

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._wrong((*loc, "?"), "a list or a mapping cannot be the name of a setting", place=key)
            elif key.tag == _TAG + "merge":
                remedy = "write the settings out, or use an alias for the whole value"
                self._wrong((*loc, "<<"), "merging is not supported", remedy, place=key)
            elif not _is_plain(key.value):
                self._wrong((*loc, "?"), "has characters that cannot be printed", "remove them", place=key)
            elif key.value in data:
                first, _ = self._document.places[(*loc, key.value)].key
                remedy = f"keep one; the other is in line {first}"
                self._wrong((*loc, key.value), "stands here a second time", remedy, place=key)
            else:
                data[key.value] = self.value(value, (*loc, key.value), key)
        return data

    def _scalar(self, node: yaml.Node, loc: Loc) -> object:
        if node.tag not in _AS_WRITTEN | _CONVERTED or not isinstance(node, yaml.ScalarNode):
            self._wrong(loc, f"has the tag {node.tag.replace(_TAG, '!!')}", "leave the tag out")
        elif not _is_plain(node.value):
            self._wrong(loc, "has line breaks or characters that cannot be printed", "write it in one line")
        elif node.tag in _AS_WRITTEN:
            return str(node.value)
        else:
            try:
                return self._convert(node)
            except (ValueError, LookupError, OverflowError):
                self._wrong(loc, f"is no {node.tag.removeprefix(_TAG)}: {node.value[:40]}", "put it in quotes")
        return None

    def _wrong(self, loc: Loc, message: str, remedy: str = "", place: yaml.Node | None = None) -> None:
        line, column = self._document.places[loc].value if place is None else _start(place)
        name = self._document.name(loc)
        self._document.problems.append(Problem(self._document.file, line, column, name, message, remedy))


def _compose(text: str, file: str) -> yaml.Node | None:
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in what:
            _refuse(file, line, column, "has a tab where YAML wants spaces", "indent with spaces", error)
        remedy = "compare indentation, colons and quotes with config.example.yaml"
        _refuse(file, line, column, f"is no YAML: {what}", remedy, error)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        what = f"has the character U+{ord(text[error.position]):04X}, which YAML does not allow"
        _refuse(file, line, column, what, "remove it", error)
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF", and PyYAML passes it to chr()
        mark = loader.get_mark() if loader else None
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        _refuse(file, line, column, f"is no YAML: {error}", "look for a backslash in double quotes", error)
    except RecursionError as error:
        _refuse(file, 1, 1, "is nested too deeply", "write it with less nesting", error)


def _refuse(file: str, line: int, column: int, message: str, remedy: str, why: Exception | None = None) -> NoReturn:
    raise ConfigError([Problem(file, line, column, "file", message, remedy)]) from why


def _start(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _is_plain(text: str) -> bool:
    """One line that can be printed and encoded: such a text can go into a header, a path and a log."""
    return not any(char < " " or char in "\x7f\x85\u2028\u2029" or "\ud800" <= char <= "\udfff" for char in text)
