"""What a template's text means, and whether it can be read backwards in one way only.

A template is Paperclip's: text in which `:token` stands for a value. Reading one backwards is only safe where a path
can be read in one way, so a template that allows two readings is refused when it is loaded, never guessed at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# What a token says something about: the attachment, its record, or one file of it.
NAME_TOKENS = frozenset({"attachment", "class"})
ID_TOKENS = frozenset({"id", "id_partition", "param"})
FILE_TOKENS = frozenset({"style", "basename", "extension", "dotextension", "filename", "fingerprint", "hash", "updated_at"})

_REFUSED = {
    "url": (":url is itself a template", "write that template in its place"),
    "timestamp": (":timestamp depends on the app's time zone and locale", "use :updated_at, or leave it out"),
    "content_type_extension": (":content_type_extension depends on what the app's database says", "use :extension"),
    "rails_root": ("only the app knows its :rails_root", "write what stands below the spool's root"),
    "rails_env": ("only the app knows its :rails_env", "write its value, such as production"),
}
# In reverse order, as Paperclip takes them, so that the beginning of :id_partition is not taken for :id.
_TOKENS = sorted({*NAME_TOKENS, *ID_TOKENS, *FILE_TOKENS, *_REFUSED}, reverse=True)

_IDENTIFIER = r"[^\W\d]\w*"
_GROUP = r"[^/\n]{3}"
_DIGITS = "[0-9]{3}"
# From a billion on Paperclip pads to twelve digits and not to nine, so the first group of four is never 000.
_LONG_INTEGER = rf"(?!000){_DIGITS}(?:/{_DIGITS}){{3,5}}"
INTEGER_PARTITION = re.compile(f"{_DIGITS}/{_DIGITS}/{_DIGITS}|{_LONG_INTEGER}")


class BadTemplate(ValueError):
    """A template of which no use can be made. field: "path", "key" or "url"; remedy: what to write instead."""

    def __init__(self, field: str, message: str, remedy: str) -> None:
        super().__init__(f"{field}: {message}; {remedy}")
        self.field = field
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Token:
    """A variable of a template; `is_repeated` where the same one stood before, and so must have the same text."""

    name: str
    is_repeated: bool = False


Part = str | Token
Segment = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """Which texts the tokens can have.

    has_class: :class spans any number of segments. So that they can be told from an :id_partition, names are then
    identifiers, and a partition that is no integer's has all its three groups.
    computed: tokens that are not read but computed: an :id of digits only, a :fingerprint of 32 of them.
    """

    styles: frozenset[str] | None
    has_class: bool
    computed: frozenset[str] = frozenset()

    def pattern(self, token: str, *, of_known_style: bool) -> str:
        """Return what matches each text of this token; `of_known_style`: a :style only as one of `styles`."""
        if token == "style" and of_known_style:
            return "|".join(re.escape(style) for style in sorted(self.styles or ()))
        if token in self.computed:
            return "[0-9]+" if token == "id" else "[0-9a-f]{32}"
        groups = "{2}" if self.has_class else "{0,2}"
        return {
            "class": rf"{_IDENTIFIER}(?:/{_IDENTIFIER})*",
            "attachment": _IDENTIFIER if self.has_class else "[^/]+",
            "id_partition": f"{_GROUP}(?:/{_GROUP}){groups}|{_LONG_INTEGER}",
            "extension": "[^/.]*",
            "dotextension": r"(?:\.[^/.]+)?",
        }.get(token, "[^/]+")

    def never_have(self, token: str, character: str, *, of_known_style: bool) -> bool:
        """Say whether no text of this token has this character."""
        if token == "style" and of_known_style:
            return not any(character in style for style in self.styles or ())
        if token in self.computed:
            return character not in ("0123456789" if token == "id" else "0123456789abcdef")
        if token == "attachment":
            return self.has_class and re.match(r"\w", character) is None
        return token == "extension" and character == "."

    def are_bounded(self, token: str, separator: str, *, behind: bool, of_known_style: bool) -> bool:
        """Say whether this literal behind (or before) a text shows for certain where that ends (or begins)."""
        if token == "style" and of_known_style:
            marked = [style + separator if behind else separator + style for style in self.styles or ()]
            reaches_into = str.startswith if behind else str.endswith
            return not any(a != b and reaches_into(a, b) for a in marked for b in marked)
        return self.never_have(token, separator[0 if behind else -1], of_known_style=of_known_style)


class Template:
    """Segments that can be read in one way only, and the regular expression that does it. Raises BadTemplate."""

    def __init__(self, field: str, segments: Sequence[Segment], texts: Texts) -> None:
        self._field = field
        self._texts = texts
        self.segments = segments
        self.tokens = tuple(dict.fromkeys(self.tokens_of(segments)))
        self._refuse_two_depths()
        self._patterns = [self._pattern_of(segment) for segment in segments]
        self.regex = re.compile(self.pattern(0, len(segments)))

    @staticmethod
    def tokens_of(segments: Iterable[Segment]) -> list[str]:
        """Return the names of the tokens in these segments, in order; a repeated one each time."""
        return [part.name for segment in segments for part in segment if isinstance(part, Token)]

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text for these values; unlike `interpolate`, no value is looked at for tokens."""
        return "/".join(
            "".join(part if isinstance(part, str) else values[part.name] for part in segment) for segment in self.segments
        )

    def pattern(self, start: int, stop: int) -> str:
        """Return what matches these segments alone; each token is a group of its name."""
        return "/".join(self._patterns[start:stop])

    def pattern_of_leads(self) -> str:
        """Return what matches each directory on the way to a file, and now and then one more."""
        leads = ""
        for segment, pattern in reversed(list(zip(self.segments[:-1], self._patterns, strict=False))):
            pattern = re.sub(r"\(\?P=\w+\)", "[^/]+", re.sub(r"\(\?P<\w+>", "(?:", pattern))
            leads = f"{pattern}(?:/{leads})?" if leads else pattern
            if Token("id_partition") in segment:
                leads = f"(?:{leads}|{_GROUP}(?:/{_GROUP})?|{_DIGITS}(?:/{_DIGITS}){{0,4}})"
        return leads

    def _pattern_of(self, segment: Segment) -> str:
        of_known_style = not self._is_clear(segment, of_known_style=False)
        knows_styles = self._texts.styles is not None
        if of_known_style and not (knows_styles and self._is_clear(segment, of_known_style=True)):
            text = "".join(part if isinstance(part, str) else f":{part.name}" for part in segment)
            needs_styles = not knows_styles and "style" in self.tokens_of([segment])
            raise BadTemplate(
                self._field,
                f"{text!r} can be read in two ways: nothing shows where one token ends and the next begins",
                "put a / between them" + (", or list all styles in complete.styles" if needs_styles else ""),
            )
        pattern = ""
        for index, part in enumerate(segment):
            if isinstance(part, str):
                pattern += re.escape(part)
            elif part.is_repeated:
                pattern += f"(?P={part.name})"
            elif part.name == "basename" and Token("dotextension") in segment[index + 1 : index + 2]:
                pattern += r"(?P<basename>\.*[^/.][^/]*?)"  # as short as can be, but as layout.split_filename has it
            else:
                pattern += f"(?P<{part.name}>{self._texts.pattern(part.name, of_known_style=of_known_style)})"
        return pattern

    def _is_clear(self, segment: Segment, *, of_known_style: bool) -> bool:
        """Say whether at most one token is left when those are taken away, from both sides, whose end is certain."""
        parts = list(segment)
        while parts and self._is_certain(parts[0], parts[1:], behind=True, of_known_style=of_known_style):
            del parts[0]
        while parts and self._is_certain(parts[-1], parts[-2::-1], behind=False, of_known_style=of_known_style):
            del parts[-1]
        return sum(isinstance(part, Token) and not part.is_repeated for part in parts) <= 1

    def _is_certain(self, part: Part, others: list[Part], *, behind: bool, of_known_style: bool) -> bool:
        """Say whether it is certain where a part ends (or begins), given the others behind (before) it, next first."""
        if isinstance(part, str) or part.is_repeated or part.name in self._texts.computed - {"id"}:
            return True
        neighbour = others[0] if others else ""
        if isinstance(neighbour, str):
            return neighbour != "" and self._texts.are_bounded(
                part.name, neighbour, behind=behind, of_known_style=of_known_style
            )
        if part.name != "dotextension" or behind:
            return False
        is_dotless = len(others) == 1 and self._texts.never_have(neighbour.name, ".", of_known_style=of_known_style)
        return is_dotless or neighbour == Token("basename")

    def _refuse_two_depths(self) -> None:
        """Raise BadTemplate where segments cannot be counted off: :class and :id_partition span several."""
        places = []
        for token in ("class", "id_partition"):
            holders = [index for index, segment in enumerate(self.segments) if token in self.tokens_of([segment])]
            if len(holders) > 1 or any(len(self.segments[index]) > 1 for index in holders):
                raise BadTemplate(
                    self._field,
                    f":{token} spans several segments, and here it has company or stands twice",
                    f"let :{token} stand once, between two /",
                )
            places += holders
        if len(places) == 2:
            between = self.tokens_of(self.segments[min(places) + 1 : max(places)])
            if company := [token for token in between if token != "attachment"]:
                raise BadTemplate(
                    self._field,
                    f":{company[0]} stands between :class and :id_partition, which both span several segments",
                    "let only :attachment or literal text stand between them",
                )


def scan(field: str, template: str, constants: Mapping[str, str | None], *, also: tuple[str, ...] = ()) -> list[Part]:
    """Return the template's literals and tokens in order, the constants put in. Raises BadTemplate."""
    tokens = sorted((*_TOKENS, *also), reverse=True)
    parts: list[Part] = []
    seen: set[str] = set()
    for piece in re.split(f"(:(?:{'|'.join(tokens)}))", template):
        token = piece[1:] if piece[1:] in tokens and piece.startswith(":") else None
        if token is None:
            if unknown := re.search(r":([A-Za-z_]\w*)", piece):
                close = difflib.get_close_matches(unknown[1], [token for token in tokens if token not in _REFUSED], 1)
                remedy = f"did you mean :{close[0]}?" if close else "write what it stands for"
                raise BadTemplate(field, f"{unknown[0]} is no token that spoold knows", remedy)
            parts.append(piece)
        elif (text := constants.get(token)) is not None:
            parts.append(text)
        elif token in _REFUSED:
            raise BadTemplate(field, *_REFUSED[token])
        else:
            parts.append(Token(token, is_repeated=token in seen))
            seen.add(token)
    return [part for part in parts if part]


def divide(parts: Iterable[Part]) -> list[Segment]:
    """Return the parts, divided at each /; literals that touch are one."""
    segments: list[list[Part]] = [[]]
    for part in parts:
        if isinstance(part, Token):
            segments[-1].append(part)
            continue
        for index, text in enumerate(part.split("/")):
            if index:
                segments.append([])
            if text and segments[-1] and isinstance(segments[-1][-1], str):
                segments[-1][-1] += text
            elif text:
                segments[-1].append(text)
    return [tuple(segment) for segment in segments]


def interpolate(template: str, values: Mapping[str, str]) -> str:
    """Return what Paperclip makes of `template`; KeyError for a token without a value.

    Plain replacement in reverse alphabetical order of the tokens: `:ids` is `:id` and an s, and a value that holds a
    token is itself interpolated by those that come later.
    """
    for token in _TOKENS:
        if f":{token}" in template:
            template = template.replace(f":{token}", values[token])
    return template
