"""What pydantic found wrong, in words for a person who has the file open: which setting, what is wrong, what to write.

Knows how settings are nested and named, not which there are: the outermost section is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from spoold.config_values import BOTO_CHAIN, NO_SECRETS, closest, shown
from spoold.errors import Problem
from spoold.yaml_places import Document, Loc

_SECRET = re.compile(r"access_?key|secret|passw|credential|^(session_?)?token$", re.IGNORECASE)
_EXAMPLES = {
    "spools": "at least one spool; config.example.yaml is a start",
    "name": "a name of your own, such as `name: uploads`",
    "root": "the directory that the app writes to, such as `root: /srv/app/shared/spool`",
    "bucket": "the bucket that its files go to, such as `bucket: my-app-uploads`",
}
_WANTED = {
    "string_type": ("text", "write a text"),
    "path_type": ("a path", "write an absolute path"),
    "bool_type": ("true or false", "write true or false, without quotes"),
    "int_type": ("a whole number", "write a whole number, without quotes"),
    "tuple_type": ("a list", "write a list: each item in a line of its own that begins with `- `"),
    "dict_type": ("a mapping", "write its entries as `name: value`, one a line, indented"),
    "model_type": ("a section", "write its settings as `name: value`, one a line, indented"),
}


def problem(error: ErrorDetails, document: Document, settings: type[BaseModel]) -> Problem:
    """Return one error of pydantic's as a problem at its place. settings: the outermost section."""
    loc, kind, given, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "spoold":  # config_values.wrong
        is_key = loc[-1:] == ("[key]",)  # pydantic's way to say that the name is wrong, not what it stands for
        return document.problem(loc[:-1] if is_key else loc, context["message"], context["remedy"], at_key=is_key)
    if kind == "extra_forbidden":
        return document.problem(loc, *_unknown(loc, settings), at_key=True)
    if kind == "missing":
        return document.problem(loc, "is missing", f"write {_EXAMPLES[str(loc[-1])]}")
    if kind in _WANTED:
        wanted, remedy = _WANTED[kind]
        if given is None:
            return document.problem(loc, "has no value", f"{remedy}, or leave the setting out")
        text = document.text(loc)
        if kind == "string_type" and text is not None:
            remedy = f'write it in quotes: "{text}"'
        return document.problem(loc, f"must be {wanted}, not {shown(given, text)}", remedy)
    if kind == "literal_error":
        choices = re.findall("'([^']+)'", context["expected"])
        near = closest(str(given), choices)
        remedy = f"did you mean `{near}`?" if near else f"write {choices[0]}, for instance"
        what = f"must be one of {', '.join(choices)}, not {shown(given, document.text(loc))}"
        return document.problem(loc, what, remedy)
    if kind == "greater_than_equal":
        return document.problem(loc, f"is too small: {given}", f"write {context['ge']} or more")
    return document.problem(loc, error["msg"][:1].lower() + error["msg"][1:])


def names(section: type[BaseModel], within: str = "") -> Iterator[str]:
    """Yield every setting of a section, dotted, sections before what is in them: `s3`, `s3.endpoint_url`, …"""
    for name, inner in _fields(section).items():
        yield within + name
        if inner is not None:
            yield from names(inner, f"{within}{name}.")


def _unknown(loc: Loc, settings: type[BaseModel]) -> tuple[str, str]:
    """Return what is wrong with a setting that there is not, and what to write instead."""
    name = str(loc[-1])
    if _SECRET.search(name):
        return f"is a secret, and {NO_SECRETS}", BOTO_CHAIN
    section = settings
    for part in loc[:-1]:
        section = _fields(section).get(str(part)) or section
    meant = _home(name, names(section)) or closest(name, section.model_fields) or _home(name, names(settings))
    if meant:
        return "is unknown here", f"did you mean `{meant}`?"
    return "is unknown here", f"leave it out; known are {', '.join(section.model_fields)}"


def _home(name: str, settings: Iterable[str]) -> str | None:
    """Return the setting of that very name, if one has it somewhere."""
    return next((full for full in settings if full.rpartition(".")[2] == name), None)


def _fields(section: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the names in a section, each with the section that it is itself, if it is one."""

    def inner(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for arg in get_args(annotation) if (found := inner(arg))), None)

    return {name: inner(field.annotation) for name, field in section.model_fields.items()}
