"""Path in the spool <-> attachment, id, style, name <-> key. Never looks at the disk.

What the text of a template means, and whether it can be read backwards, is for `template` to say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from spoold.errors import BadPath
from spoold.model import HOUSE, ORIGINAL
from spoold.template import (
    FILE_TOKENS,
    ID_TOKENS,
    INTEGER_PARTITION,
    NAME_TOKENS,
    BadTemplate,
    Part,
    Segment,
    Template,
    Texts,
    Token,
    divide,
    interpolate,
    scan,
)

__all__ = ["DEEPEST", "MAX_KEY_BYTES", "BadTemplate", "Layout", "Place", "id_partition", "interpolate", "split_filename"]

MAX_KEY_BYTES = 1024
DEEPEST = 64
"""How many directories deep a file may lie: with :class there would be no end of records in a tree without one."""


_REMEMBERED = 1024  # places of paths: each is asked for again and again while its record is looked at


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
        parts = scan("path", path, constants)
        texts = Texts(
            styles=None if styles is None else frozenset((ORIGINAL, *styles)),
            has_class=any(part.name == "class" for part in parts if isinstance(part, Token)),
        )
        self._path = Template("path", _below(root, parts), texts)
        captured = set(self._path.tokens)
        self._head = self._split_at_record()
        self.tail = len(self._path.segments) - self._head
        self._record = re.compile(self._path.pattern(0, self._head))
        self._leads = re.compile(self._path.pattern_of_leads())
        self._fixed_floor, self._has_class_above, self._literal = self._look_above_id()

        texts = Texts(texts.styles, texts.has_class, computed=frozenset({"id", "fingerprint"} - captured))
        self._key = Template("key", _key_segments(scan("key", key, constants)), texts)
        self._url = None if url is None else scan("url", url, constants, also=("key", "bucket"))
        url_tokens = [part.name for part in self._url or () if isinstance(part, Token)]
        knowable = _closure(captured) | {"style", "fingerprint"}
        _refuse_unknowable("key", [token for token in self._key.tokens if token not in knowable])
        _refuse_unknowable("url", [token for token in url_tokens if token not in knowable | {"key", "bucket"}])
        if lost := captured - _closure(set(self._key.tokens)):
            missing = " ".join(f":{token}" for token in self._path.tokens if token in lost)
            raise BadTemplate("key", f"does not tell apart what the path does: it lacks {missing}", f"add {missing}")
        self.needs_fingerprint = "fingerprint" in {*self._key.tokens, *url_tokens} - captured
        self._implied = [token for token in self._path.tokens if token not in self._key.tokens]
        self._repeated = [token for token in captured if token in _closure(captured - {token})]
        self._parsed = functools.lru_cache(_REMEMBERED)(self._parse)

    def parse(self, path: str) -> Place | None:
        """Return what the path of a file below the root says, or None if it does not fit the template."""
        return self._parsed(path)

    def _parse(self, path: str) -> Place | None:
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

    def parse_key(self, key: str) -> Place | None:
        """Return what a key says of the file that it was made for, or None if it cannot be one of this spool's."""
        match = self._key.regex.fullmatch(key)
        if match is None:
            return None
        values: dict[str, str] = match.groupdict()
        fingerprint = values.get("fingerprint")
        _compute(values)
        if any(token not in values for token in self._path.tokens):
            return None
        place = self.parse(self._path.render(values))
        try:
            is_its = place is not None and self.key(place, fingerprint=fingerprint) == key
        except BadPath:
            return None
        return place if is_its else None

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
        return not directory or (_is_found(directory) and self._leads.fullmatch(directory) is not None)

    def records_touched_by(self, path: str, *, is_directory: bool) -> list[str]:
        """Return the directories that may be records and hold `path`, or are it; none for what lies above records.

        A file need not fit: a marker in a record's directory concerns that record, and only the deepest that may be one.
        """
        if not _is_found(path):
            return []
        if not is_directory and (record := self.record_of(path)):
            return [record]
        segments = path.split("/")
        prefixes = ("/".join(segments[:depth]) for depth in range(1, len(segments) + is_directory))
        records = [prefix for prefix in prefixes if self._record.fullmatch(prefix)]
        return records if is_directory else records[-1:]

    def _split_at_record(self) -> int:
        """Return how many segments of the path make the record: all before :style, else all but the last."""
        segments = self._path.segments
        with_style = (index for index, segment in enumerate(segments) if Token("style") in segment)
        head = next(with_style, len(segments) - 1)
        for part in (part for segment in segments[head:] for part in segment):
            if isinstance(part, Token) and not part.is_repeated and part.name not in FILE_TOKENS:
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
        floor = next(index for index, found in enumerate(names) if found - NAME_TOKENS)
        first_id = next((index for index, found in enumerate(names) if found & ID_TOKENS), floor)
        literals = [str(segment[0]) for segment, found in zip(segments[:first_id], names, strict=False) if not found]
        return floor, any("class" in found for found in names[:floor]), literals[-1] if literals else ""


_IDENTITIES = ID_TOKENS | {"hash", "fingerprint", "basename", "filename"}

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


def _below(root: str, parts: list[Part]) -> list[Segment]:
    """Return the segments of a path below the spool's root."""
    segments = divide(parts)
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


def _key_segments(parts: list[Part]) -> list[Segment]:
    segments = divide(parts)
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
    elif "id" not in values and INTEGER_PARTITION.fullmatch(values.get("id_partition", "")):
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


def _is_found(path: str) -> bool:
    """Say whether a sweep can find this path and take it for a file of the app's: events tell of others too."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return path.count("/") <= DEEPEST and not _leads_nowhere(path)


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
