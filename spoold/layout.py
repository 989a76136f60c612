"""Path in the spool <-> attachment, id, style, name <-> key. Never looks at the disk.

A template is Paperclip's: text in which `:token` stands for a value. Reading one backwards is only safe where a path
can be read in one way, so a template that allows two readings is refused when it is loaded, never guessed at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from spoold.errors import BadPath
from spoold.model import HOUSE, ORIGINAL

MAX_KEY_BYTES = 1024


class BadTemplate(ValueError):
    """A template of which no use can be made. field: "path", "key" or "url"; remedy: what to write instead."""

    def __init__(self, field: str, message: str, remedy: str) -> None:
        super().__init__(f"{field}: {message}; {remedy}")
        self.field = field
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Place:
    """What the path of a file in the spool says.

    record: its record's directory, below the root.
    attachment: :attachment, else :class, else the last literal segment before the id, else "".
    record_id: the id as text; the text of its partition where that is no integer's; else :param, else the record.
    basename: what groups an original with its styles; not a file's name where the path has none.
    values: the text of every token that was captured or can be computed.
    """

    record: str
    attachment: str
    record_id: str
    style: str
    basename: str
    filename: str
    values: Mapping[str, str]


def id_partition(record_id: str | int) -> str:
    """Return what Paperclip puts for :id_partition; "" for a string of fewer than three characters.

    An integer of 13, 14, 16, … digits loses its last ones, a string all after the ninth character: so does Paperclip.
    """
    if isinstance(record_id, int):
        width = 9 if record_id < 10**9 else 12
        return "/".join(re.findall("[0-9]{3}", f"{record_id:0{width}d}"))
    return "/".join(re.findall(".{3}", record_id)[:3])


def split_filename(name: str) -> tuple[str, str]:
    """Return basename and extension as Paperclip does, by Ruby's File.extname: dots in front begin no extension."""
    stem, dot, extension = name.lstrip(".").rpartition(".")
    return (name[: len(name) - len(extension) - 1], extension) if dot and stem else (name, "")


def interpolate(template: str, values: Mapping[str, str]) -> str:
    """Return what Paperclip makes of `template`; KeyError for a token without a value.

    Plain replacement in reverse alphabetical order of the tokens: `:ids` is `:id` and an s, and a value that holds a
    token is itself interpolated by those that come later.
    """
    for token in _TOKENS:
        if f":{token}" in template:
            template = template.replace(f":{token}", values[token])
    return template


class Layout:
    """One spool's templates. Raises BadTemplate for those that could be read in two ways or lose something.

    root: the spool's, as configured; what an absolute `path` must begin with.
    styles: all styles the app writes, if they are known: `:basename_:style` can only be read with their help.
    """

    def __init__(
        self,
        path: str,
        key: str,
        *,
        url: str | None = None,
        root: str = "",
        rails_root: str | None = None,
        rails_env: str | None = None,
        styles: Iterable[str] | None = None,
    ) -> None:
        constants = {"rails_root": rails_root, "rails_env": rails_env}
        parts = _scan("path", path, constants)
        texts = _Texts(
            styles=None if styles is None else frozenset((ORIGINAL, *styles)),
            has_class=any(part.name == "class" for part in parts if isinstance(part, _Token)),
        )
        self._path = _Template("path", _below(root, parts), texts)
        captured = set(self._path.tokens)
        self._head = self._split_at_record()
        self.tail = len(self._path.segments) - self._head
        self._record = re.compile(self._path.pattern(0, self._head))
        self._leads = re.compile(self._path.pattern_of_leads())
        self._fixed_floor, self._has_class_above, self._literal = self._look_above_id()

        texts = _Texts(texts.styles, texts.has_class, computed=frozenset({"id", "fingerprint"} - captured))
        self._key = _Template("key", _key_segments(_scan("key", key, constants)), texts)
        self._url = None if url is None else _scan("url", url, constants, also=("key", "bucket"))
        url_tokens = [part.name for part in self._url or () if isinstance(part, _Token)]
        knowable = _closure(captured) | {"style", "fingerprint"}
        _refuse_unknowable("key", [token for token in self._key.tokens if token not in knowable])
        _refuse_unknowable("url", [token for token in url_tokens if token not in knowable | {"key", "bucket"}])
        if lost := captured - _closure(set(self._key.tokens)):
            missing = " ".join(f":{token}" for token in self._path.tokens if token in lost)
            raise BadTemplate("key", f"does not tell apart what the path does: it lacks {missing}", f"add {missing}")
        self.needs_fingerprint = "fingerprint" in {*self._key.tokens, *url_tokens} - captured
        self._implied = [token for token in self._path.tokens if token not in self._key.tokens]
        self._repeated = [token for token in captured if token in _closure(captured - {token})]

    def parse(self, path: str) -> Place | None:
        """Return what the path of a file below the root says, or None if it does not fit the template."""
        match = self._path.regex.fullmatch(path)
        if match is None or _leads_nowhere(path):
            return None
        values: dict[str, str] = match.groupdict()
        if not all(_agree(values, token, values[token]) for token in self._repeated):
            return None
        _compute(values)
        segments = path.split("/")
        record = "/".join(segments[: -self.tail])
        record_id = values.get("id") or values.get("id_partition") or values.get("param") or record
        return Place(
            record=record,
            attachment=values.get("attachment") or values.get("class") or self._literal,
            record_id=record_id,
            style=values.setdefault("style", ORIGINAL),
            basename=values.get("basename") or values.get("fingerprint") or record_id,
            filename=values.get("filename") or segments[-1],
            values=values,
        )

    def record_of(self, path: str) -> str | None:
        """Return the record's directory of a file, or None if its path does not fit."""
        place = self.parse(path)
        return place.record if place else None

    def key(self, place: Place, *, fingerprint: str | None = None) -> str:
        """Return the key of a file. Raises BadPath where none can be made, or not one that is this file's alone.

        fingerprint: MD5 of the original, hex; only used if `needs_fingerprint`.
        """
        values = {"fingerprint": fingerprint, **place.values}
        used = {token: text for token in self._key.tokens if (text := values.get(token)) is not None}
        path = self._path.render(place.values).encode("utf-8", "backslashreplace").decode()
        if missing := [token for token in self._key.tokens if token not in used]:
            raise BadPath(f"{path}: :{missing[0]} cannot be known", hint=_KEY_NEEDS[missing[0]])
        key = self._key.render(used)
        _demand_legal(path, key)
        # The key is read back: if its tokens are found again in it, and imply all that the path's tokens say, then no
        # other path makes the same key.
        match = self._key.regex.fullmatch(key)
        is_unique = match is not None and match.groupdict() == used
        if not (is_unique and all(_agree(used, token, place.values[token]) for token in self._implied)):
            hint = "use in `key` the tokens that `path` has, and list all styles in complete.styles"
            raise BadPath(f"{path}: key {key!r} could be another file's too", hint=hint)
        return key

    def url(self, place: Place, key: str, *, bucket: str = "", fingerprint: str | None = None) -> str | None:
        """Return the public URL, values percent-encoded, or None without a template. `key` is what `key()` returned."""
        if self._url is None:
            return None
        values = {"fingerprint": fingerprint, **place.values, "key": key, "bucket": bucket}
        url = ""
        for part in self._url:
            text = part if isinstance(part, str) else values.get(part.name)
            if text is None:
                raise BadPath(f"{key}: its URL cannot be known", hint="use only :bucket and :key in `url`")
            url += text if isinstance(part, str) else quote(text)
        return url

    def floor_of(self, record: str) -> int:
        """Return how many directories on the way to this record are never removed: at least one (contract, rule 10).

        They are those above the id (`avatars/`, `admin/users/avatars/`); all, where the record does not fit.
        """
        match = self._record.fullmatch(record)
        if match is None:
            return record.count("/") + 1
        return max(1, self._fixed_floor + (match["class"].count("/") if self._has_class_above else 0))

    def may_lead_to_record(self, directory: str) -> bool:
        """Say whether a file below this directory could fit; "" is the root."""
        return not directory or (not _leads_nowhere(directory) and self._leads.fullmatch(directory) is not None)

    def records_touched_by(self, path: str, *, is_directory: bool) -> list[str]:
        """Return the directories that may be records and hold `path`, or are it; none for what lies above records.

        A file need not fit: a marker in a record's directory concerns that record.
        """
        if _leads_nowhere(path):
            return []
        if not is_directory and (record := self.record_of(path)):
            return [record]
        segments = path.split("/")
        prefixes = ("/".join(segments[:depth]) for depth in range(1, len(segments) + is_directory))
        return [prefix for prefix in prefixes if self._record.fullmatch(prefix)]

    def _split_at_record(self) -> int:
        """Return how many segments of the path make the record: all before :style, else all but the last."""
        segments = self._path.segments
        with_style = (index for index, segment in enumerate(segments) if _Token("style") in segment)
        head = next(with_style, len(segments) - 1)
        for part in (part for segment in segments[head:] for part in segment):
            if isinstance(part, _Token) and not part.is_repeated and part.name not in _FILE_TOKENS:
                raise BadTemplate(
                    "path",
                    f":{part.name} does not stand above :style and the name, so a record is no directory of its own",
                    f"let :{part.name} and a / stand before them, here and in the app",
                )
        if not set(self._path.tokens_of(segments[:head])) & _IDENTITIES:
            raise BadTemplate(
                "path",
                "no directory tells one record from another",
                "let :id, :id_partition or :param and a / stand before :style and the name, here and in the app",
            )
        return head

    def _look_above_id(self) -> tuple[int, bool, str]:
        """Return how many segments hold only names, whether :class is among them, and the literal next to the id."""
        segments = self._path.segments
        names = [set(self._path.tokens_of([segment])) for segment in segments[: self._head]]
        floor = next(index for index, found in enumerate(names) if found - {"attachment", "class"})
        first_id = next((index for index, found in enumerate(names) if found & _IDS), floor)
        literals = [str(segment[0]) for segment, found in zip(segments[:first_id], names, strict=False) if not found]
        return floor, any("class" in found for found in names[:floor]), literals[-1] if literals else ""


@dataclass(frozen=True, slots=True)
class _Token:
    """A variable of a template; `is_repeated` where the same one stood before, and so must have the same text."""

    name: str
    is_repeated: bool = False


_Part = str | _Token
_Segment = tuple[_Part, ...]

_FILE_TOKENS = {"style", "basename", "extension", "dotextension", "filename", "fingerprint", "hash", "updated_at"}
_IDS = {"id", "id_partition", "param"}
_IDENTITIES = _IDS | {"hash", "fingerprint", "basename", "filename"}

_REFUSED = {
    "url": (":url is itself a template", "write that template in its place"),
    "timestamp": (":timestamp depends on the app's time zone and locale", "use :updated_at, or leave it out"),
    "content_type_extension": (":content_type_extension depends on what the app's database says", "use :extension"),
    "rails_root": ("only the app knows its :rails_root", "write what stands below the spool's root"),
    "rails_env": ("only the app knows its :rails_env", "write its value, such as production"),
}
_UNKNOWABLE = {
    "attachment": ("the path does not have the attachment's name", "write the name itself"),
    "class": ("the path does not have the class's name", "write the name itself"),
    "hash": (":hash is made with the app's secret, and the path does not have it", "leave it out"),
    "updated_at": (":updated_at stands in the app's database, and the path does not have it", "leave it out"),
    "param": (":param is made by the app, and the path does not have it", "use :id"),
}
_KEY_NEEDS = {
    "id": "its :id_partition is no integer's, so use :id_partition in the key too",
    "fingerprint": "it is the MD5 of the original, which must be there too",
}
_TOKENS = sorted({*_FILE_TOKENS, *_IDS, *_REFUSED, *_UNKNOWABLE}, reverse=True)

_IDENTIFIER = r"[^\W\d]\w*"
_GROUP = r"[^/\n]{3}"
_DIGITS = "[0-9]{3}"
_LONG_INTEGER = rf"(?!000){_DIGITS}(?:/{_DIGITS}){{3,5}}"
_INTEGER_PARTITION = re.compile(f"{_DIGITS}/{_DIGITS}/{_DIGITS}|{_LONG_INTEGER}")


@dataclass(frozen=True, slots=True)
class _Texts:
    """Which texts the tokens can have.

    has_class: :class spans any number of segments. So that they can be told from an :id_partition, names are then
    identifiers, and a partition that is no integer's has all its three groups.
    computed: tokens that are not read but computed: an :id of digits only, a :fingerprint of 32 of them.
    """

    styles: frozenset[str] | None
    has_class: bool
    computed: frozenset[str] = frozenset()

    def pattern(self, token: str, *, of_known_style: bool) -> str:
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


class _Template:
    """Segments that can be read in one way only, and the regular expression that does it. Raises BadTemplate."""

    def __init__(self, field: str, segments: Sequence[_Segment], texts: _Texts) -> None:
        self._field = field
        self._texts = texts
        self.segments = segments
        self.tokens = tuple(dict.fromkeys(self.tokens_of(segments)))
        self._refuse_two_depths()
        self._patterns = [self._pattern_of(segment) for segment in segments]
        self.regex = re.compile(self.pattern(0, len(segments)))

    @staticmethod
    def tokens_of(segments: Iterable[_Segment]) -> list[str]:
        return [part.name for segment in segments for part in segment if isinstance(part, _Token)]

    def render(self, values: Mapping[str, str]) -> str:
        return "/".join(
            "".join(part if isinstance(part, str) else values[part.name] for part in segment) for segment in self.segments
        )

    def pattern(self, start: int, stop: int) -> str:
        return "/".join(self._patterns[start:stop])

    def pattern_of_leads(self) -> str:
        """Return what matches each directory on the way to a file, and now and then one more."""
        leads = ""
        for segment, pattern in reversed(list(zip(self.segments[:-1], self._patterns, strict=False))):
            pattern = re.sub(r"\(\?P=\w+\)", "[^/]+", re.sub(r"\(\?P<\w+>", "(?:", pattern))
            leads = f"{pattern}(?:/{leads})?" if leads else pattern
            if _Token("id_partition") in segment:
                leads = f"(?:{leads}|{_GROUP}(?:/{_GROUP})?|{_DIGITS}(?:/{_DIGITS}){{0,4}})"
        return leads

    def _pattern_of(self, segment: _Segment) -> str:
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
            elif part.name == "basename" and _Token("dotextension") in segment[index + 1 : index + 2]:
                pattern += r"(?P<basename>\.*[^/.][^/]*?)"  # as short as can be, but as split_filename has it
            else:
                pattern += f"(?P<{part.name}>{self._texts.pattern(part.name, of_known_style=of_known_style)})"
        return pattern

    def _is_clear(self, segment: _Segment, *, of_known_style: bool) -> bool:
        """Say whether at most one token is left when those are taken away, from both sides, whose end is certain."""
        parts = list(segment)
        while parts and self._is_certain(parts[0], parts[1:], behind=True, of_known_style=of_known_style):
            del parts[0]
        while parts and self._is_certain(parts[-1], parts[-2::-1], behind=False, of_known_style=of_known_style):
            del parts[-1]
        return sum(isinstance(part, _Token) and not part.is_repeated for part in parts) <= 1

    def _is_certain(self, part: _Part, others: list[_Part], *, behind: bool, of_known_style: bool) -> bool:
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
        return is_dotless or neighbour == _Token("basename")

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


def _scan(field: str, template: str, constants: Mapping[str, str | None], *, also: tuple[str, ...] = ()) -> list[_Part]:
    """Return the template's literals and tokens in order, the constants put in. Raises BadTemplate."""
    tokens = sorted((*_TOKENS, *also), reverse=True)
    parts: list[_Part] = []
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
            parts.append(_Token(token, is_repeated=token in seen))
            seen.add(token)
    return [part for part in parts if part]


def _segments(parts: Iterable[_Part]) -> list[_Segment]:
    """Return the parts, divided at each /; literals that touch are one."""
    segments: list[list[_Part]] = [[]]
    for part in parts:
        if isinstance(part, _Token):
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


def _below(root: str, parts: list[_Part]) -> list[_Segment]:
    """Return the segments of a path below the spool's root."""
    segments = _segments(parts)
    is_absolute = len(segments) > 1 and not segments[0]
    segments = [segment for segment in segments if segment]  # the filesystem takes // for /, and so do we
    if any(segment in ((".",), ("..",)) for segment in segments):
        raise BadTemplate("path", "a segment is . or ..", "write the path as it is on disk")
    if is_absolute:
        above = [(name,) for name in root.split("/") if name]
        if not above or segments[: len(above)] != above:
            raise BadTemplate("path", f"does not begin with the root {root!r}", "write what stands below it")
        segments = segments[len(above) :]
    if not segments:
        raise BadTemplate("path", "is empty", "write it as in the app, such as :attachment/:id/:style/:filename")
    return segments


def _key_segments(parts: list[_Part]) -> list[_Segment]:
    segments = _segments(parts)
    if len(segments) > 1 and not segments[0]:
        del segments[0]  # Paperclip's users often begin a key with a /, which S3 would take for an empty directory
    if any(segment in ((), (".",), ("..",)) for segment in segments):
        raise BadTemplate("key", "a segment is empty, . or ..", "leave that segment out")
    return segments


def _refuse_unknowable(field: str, tokens: Sequence[str]) -> None:
    for token in tokens:
        default = (f"the path does not have what :{token} is made of", "leave it out")
        raise BadTemplate(field, *_UNKNOWABLE.get(token, default))


def _compute(values: dict[str, str]) -> None:
    """Add what follows from the tokens that are there."""
    if "filename" in values:
        basename, extension = split_filename(values["filename"])
        values.setdefault("basename", basename)
        values.setdefault("extension", extension)
    if "dotextension" in values:
        values.setdefault("extension", values["dotextension"][1:])
    if (ext := values.get("extension")) is not None:
        values.setdefault("dotextension", f".{ext}" if ext else "")
        if "basename" in values:
            values.setdefault("filename", values["basename"] + values["dotextension"])
    if "id" in values and "id_partition" not in values:
        record_id = values["id"]
        values["id_partition"] = id_partition(int(record_id) if _is_integer(record_id) else record_id)
    elif "id" not in values and _INTEGER_PARTITION.fullmatch(values.get("id_partition", "")):
        values["id"] = str(int(values["id_partition"].replace("/", "")))


def _closure(tokens: set[str]) -> set[str]:
    """Return the tokens that can be computed from these, and these."""
    values = dict.fromkeys(tokens, "")
    if "id_partition" in tokens:
        values["id"] = ""
    _compute(values)
    return set(values)


def _agree(values: Mapping[str, str], token: str, text: str) -> bool:
    """Say whether this text of a token is what the others make of it."""
    known = {name: value for name, value in values.items() if name != token}
    if token == "id" and token in values:
        return True  # a string's partition does not say what the string was: its partition was looked at instead
    _compute(known)
    return known.get(token) == text or (token == "id_partition" and id_partition(known["id"]) == text)


def _is_integer(record_id: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", record_id) is not None


def _leads_nowhere(path: str) -> bool:
    """Say whether a path is spoold's own, or none that a walk can find."""
    segments = path.split("/")
    return segments[0] == HOUSE or "" in segments or "." in segments or ".." in segments


def _demand_legal(path: str, key: str) -> None:
    """Raise BadPath unless S3 takes this key and everybody reads it as the same object."""
    try:
        size_bytes = len(key.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadPath(f"{path}: the name is not UTF-8, as a key must be", hint="rename it") from error
    if size_bytes > MAX_KEY_BYTES:
        raise BadPath(f"{path}: the key has {size_bytes} bytes, over {MAX_KEY_BYTES}", hint="give it a shorter name")
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        raise BadPath(f"{path}: key {key!r} has a segment that is empty, . or ..", hint="rename it")
