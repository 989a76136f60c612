"""The settings: YAML → frozen values, or every mistake at once with its line and column (contract, section 2).

Names and defaults are the contract's. A duration is a float in seconds, a size an int in bytes.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from spoold.errors import ConfigError, Problem
from spoold.layout import BadTemplate, Layout
from spoold.model import HOUSE, ORIGINAL
from spoold.yaml_places import Document, Loc, closest, read, shown

SECOND, MINUTE, HOUR, DAY = 1.0, 60.0, 3600.0, 86400.0
KB, MB, GB = 1000, 1000**2, 1000**3
KIB, MIB, GIB = 1024, 1024**2, 1024**3

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110, section 5.6.2
_STORAGE_CLASSES = (  # botocore 1.44.5, StorageClass
    *("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE"),
    *("REDUCED_REDUNDANCY", "EXPRESS_ONEZONE", "OUTPOSTS", "SNOW", "FSX_OPENZFS", "FSX_ONTAP"),
    *("AWS_BACKUP_WARM", "AWS_BACKUP_LOW_COST_WARM"),
)
_SECRET = re.compile(r"access_?key|secret|passw|credential|^(session_?)?token$", re.IGNORECASE)
_NO_SECRETS = "secrets never stand in this file"
_BOTO_CHAIN = "leave it to boto3: AWS_* in the environment, ~/.aws/credentials, or the machine's role"
_EXAMPLES = {
    "spools": "at least one spool; config.example.yaml is a start",
    "name": "a name of your own, such as `name: uploads`",
    "root": "the directory that the app writes to, such as `root: /srv/app/shared/spool`",
    "bucket": "the bucket that its files go to, such as `bucket: my-app-uploads`",
}
_MOST_TAGS = 10  # S3 API, PutObjectTagging
_MOST_METADATA = 2048  # S3 API, PutObject: bytes of all names and values together


# What a value may look like ------------------------------------------------------------------------------------------


def _wrong(message: str, remedy: str = "") -> PydanticCustomError:
    return PydanticCustomError("spoold", "{message}", {"message": message, "remedy": remedy})


def _amount(given: object, units: Mapping[str, float], kind: str, example: str, per: str = "") -> float:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if (is_number and given == 0) or given == "0":
        return 0.0
    if is_number:
        raise _wrong(f"has no unit: {given}", f"write it with one, such as {example}")
    found = re.fullmatch(r"(-?[0-9]{1,15}(?:\.[0-9]{1,9})?)(" + "|".join(units) + ")" + per, str(given))
    if found is None:
        remedy = f"write a number and one of {' '.join(unit + per for unit in units)}, such as {example}"
        raise _wrong(f"is no {kind}: {shown(given)}", remedy)
    if found[1].startswith("-"):
        raise _wrong(f"is negative: {given}", f"write 0 or more, such as {example}")
    return float(found[1]) * units[found[2]]


def _seconds(given: object) -> float:
    units = {"ms": 0.001, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
    if (seconds := _amount(given, units, "duration", "10s")) > 3650 * DAY:
        raise _wrong(f"is too long: {given}", "write 3650d or less")
    return seconds


def _more_than_nothing(given: object) -> float:
    if seconds := _seconds(given):
        return seconds
    raise _wrong("must be more than 0s", "write a duration such as 10s")


_SIZES = {"KB": KB, "MB": MB, "GB": GB, "KiB": KIB, "MiB": MIB, "GiB": GIB}


def _size(given: object) -> int:
    if 0 < (size := round(_amount(given, _SIZES, "size", "16MB"))) <= 5 * GIB:  # S3 API: most that one PUT may have
        return size
    raise _wrong(f"is out of range: {given}", "write more than 0 and at most 5GiB, such as 16MB")


def _rate(given: object) -> int:
    if rate := round(_amount(given, _SIZES, "rate", "20MB/s", per="/s")):
        return rate
    raise _wrong("would send nothing at all", "write a rate such as 20MB/s, or null for no limit")


def _absolute(path: Path) -> Path:
    """Return a path that means the same wherever and by whomever the daemon is started."""
    if str(path).startswith("~"):
        raise _wrong("`~` is not expanded", "write the home directory out, such as /home/deploy")
    if re.search(r"\$[\w{(]", str(path)):
        raise _wrong("environment variables are not expanded", "write the path out")
    if not path.is_absolute():
        raise _wrong(f"is relative: {path}", "write an absolute path, one that begins with /")
    return path


def _file_name(name: str) -> str:
    if name in ("", ".", "..", HOUSE) or "/" in name:
        raise _wrong(f"is no plain name: {shown(name)}", f"write one without /, and not {HOUSE}")
    return name


def _like(pattern: str, message: str, remedy: str) -> AfterValidator:
    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise _wrong(f"{message}: {shown(text)}", remedy)

    return AfterValidator(check)


def _endpoint(url: str) -> str:
    if "@" in url:
        raise _wrong(f"has a user or password in it, and {_NO_SECRETS}", _BOTO_CHAIN)
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
        raise _wrong(f"is no address: {shown(url)}", "begin with http:// or https://, such as https://minio.example:9000")
    return url


def _ledger(url: str) -> str:
    if re.search(r"//.*:.*@|password=", url, re.IGNORECASE):
        remedy = "put the URL into a file of mode 0600 and write `ledger_file: FILE`"
        raise _wrong(f"has a password in it, and {_NO_SECRETS}", remedy)
    return _built_ledger(url)


def _built_ledger(url: str) -> str:
    if not url.startswith("sqlite"):
        raise _wrong("is not built yet, only sqlite is so far", "leave it out")
    if not re.fullmatch(r"sqlite(\+pysqlite)?:////[^?]+(\?.*)?", url):
        raise _wrong("is no sqlite URL of an absolute path", "write sqlite:////var/lib/spoold/spoold.db: four slashes")
    return url


def _workers(given: object) -> object:
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= 1024):
        return given
    raise _wrong(f"is out of range: {shown(given)}", "write auto, or a whole number from 1 to 1024")


def _list_for_all(given: object) -> object:
    if isinstance(given, list):
        return {"default": given}
    if given is None or isinstance(given, dict):
        return given
    raise _wrong(f"must be a list, not {shown(given)}", "write [medium, thumb], or {avatars: [thumb], default: []}")


def _at_least_one(spools: tuple[Spool, ...]) -> tuple[Spool, ...]:
    """Not min_length: that complains as well where all items are wrong."""
    if spools:
        return spools
    raise _wrong("is missing", f"write {_EXAMPLES['spools']}")


def _later(instead: object, *values: object) -> BeforeValidator:
    """Refuse what is fixed in name only: anything but nothing, or these values."""

    def check(given: object) -> object:
        if given in values or (not values and given not in (None, [], {})):
            raise _wrong("is not built yet", "leave it out")
        return given if values else instead

    return BeforeValidator(check)


K = TypeVar("K")
V = TypeVar("V")

Text = Annotated[str, _like(r".*\S.*", "is empty", "write a text, or leave it out")]
Seconds = Annotated[float, BeforeValidator(_seconds)]
SomeSeconds = Annotated[float, BeforeValidator(_more_than_nothing)]
Bytes = Annotated[int, BeforeValidator(_size)]
BytesPerSecond = Annotated[int, BeforeValidator(_rate)]
Count = Annotated[int, Field(ge=0)]
AbsolutePath = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]
Name = Annotated[str, AfterValidator(_file_name)]
ListOf = Annotated[tuple[V, ...], Field(strict=False)]
MapOf = Annotated[Mapping[K, V], BeforeValidator(lambda given: {} if given is None else given)]
_TAG_CHARS = "write letters, digits, spaces, + - = . _ : / @"
TagKey = Annotated[str, _like(r"(?!aws:)[\w +=.:/@-]{1,128}", "is no key of a tag", _TAG_CHARS)]
TagValue = Annotated[str, _like(r"[\w +=.:/@-]{0,256}", "is no value of a tag", _TAG_CHARS)]
_MEDIA_TYPE = rf"sniff|{_TOKEN}/{_TOKEN}(;[ -~]+)?"
MediaType = Annotated[str, _like(_MEDIA_TYPE, "is no media type", "write sniff, or one such as image/webp")]
MetadataKey = Annotated[str, _like(_TOKEN, "is no HTTP token", "write ASCII letters, digits and dashes")]
Header = Annotated[str, _like(r"[ -~]*", "cannot stand in a header", "write ASCII only")]


# The settings ---------------------------------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _all_commented_out(cls, given: object) -> object:
        """Take a section with nothing in it for what it is: all defaults."""
        return {} if given is None else given


class S3(_Section):
    """How the store is reached. Credentials are boto3's own business."""

    endpoint_url: Annotated[str, AfterValidator(_endpoint)] | None = None
    region: Text | None = None
    profile: Text | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksum: Literal["crc32", "crc32c", "crc64nvme", "sha256", "none"] = "crc32"


class Complete(_Section):
    """What makes a record complete. `settle` and `within` are in seconds."""

    styles: Annotated[MapOf[Name, ListOf[Name]] | None, BeforeValidator(_list_for_all)] = None
    settle: Seconds = 1 * SECOND
    marker: Name | None = None
    images: Literal["ends", "decode", "none"] = "ends"
    within: SomeSeconds = 10 * MINUTE

    def styles_for(self, attachment: str) -> tuple[str, ...] | None:
        """Return the styles that the app writes for this attachment, the original first; None: they do not decide."""
        styles = (self.styles or {}).get(attachment, (self.styles or {}).get("default"))
        return None if styles is None else tuple(dict.fromkeys((ORIGINAL, *styles)))

    def all_styles(self) -> frozenset[str] | None:
        """Return the styles of all attachments together; None if some attachment's are not known."""
        if self.styles is None or "default" not in self.styles:
            return None
        return frozenset((ORIGINAL, *(style for styles in self.styles.values() for style in styles)))


CannedAcl = Literal[
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
]


class ObjectSettings(_Section):
    """What is stored with an object besides its bytes."""

    acl: CannedAcl | None = None
    cache_control: Header | None = None
    content_type: MediaType = "sniff"
    storage_class: Text | None = None
    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    tags: MapOf[TagKey, TagValue] = {}
    metadata: MapOf[MetadataKey, Header] = {}


class Objects(ObjectSettings):
    """What is stored with all objects, and where that differs."""

    per_style: MapOf[Name, ObjectSettings] = {}
    per_attachment: MapOf[Name, ObjectSettings] = {}

    def headers_for(self, attachment: str, style: str) -> ObjectSettings:
        """Return what holds for one object: the style's, else the attachment's, else that for all.

        `tags` and `metadata` are merged key by key. What is written as null counts as written.
        """
        merged: dict[str, Any] = {name: getattr(self, name) for name in ObjectSettings.model_fields}
        for layer in (self.per_attachment.get(attachment), self.per_style.get(style)):
            for name in layer.model_fields_set if layer else ():
                value = getattr(layer, name)
                merged[name] = {**merged[name], **value} if name in ("tags", "metadata") else value
        return ObjectSettings.model_construct(**merged)


class Cleanup(_Section):
    """When local files may go. Durations in seconds."""

    delete: bool = True
    keep_for: Seconds = 0 * SECOND
    min_age: Seconds = 5 * SECOND
    grace: Seconds = 10 * SECOND
    keep_empty_dirs_for: Seconds = 30 * SECOND
    without_leases: Literal["keep", "trust"] = "keep"


class Spool(_Section):
    """One directory tree with its layout and its destination. Durations in seconds."""

    name: Annotated[str, _like(r"[A-Za-z0-9._-]+", "is no name for a spool", "write letters, digits, . _ - only")]
    root: AbsolutePath
    path: Text = ":attachment/:id/:style/:basename.:extension"
    bucket: Text
    key: Text = ":attachment/:id/:style/:basename.:extension"
    url: Text | None = None
    rails_root: AbsolutePath | None = None
    rails_env: Name | None = None
    sweep_every: SomeSeconds = 5 * MINUTE
    complete: Complete = Complete()
    object: Objects = Objects()
    cleanup: Cleanup = Cleanup()
    replaced: Literal["delete", "keep"] = "delete"
    replaced_after: Seconds = 24 * HOUR
    max_deletes_per_hour: Count = 1000
    styles: Annotated[Mapping[str, Any], _later({})] = {}

    def layout(self) -> Layout:
        """Return the way from paths to records to keys. Raises BadTemplate, but not for settings that were loaded."""
        return Layout(
            self.path,
            self.key,
            url=self.url,
            root=str(self.root),
            rails_root=str(self.rails_root) if self.rails_root else None,
            rails_env=self.rails_env,
            styles=self.complete.all_styles(),
        )


class Retry(_Section):
    """When a batch is tried again. `initial` and `max` in seconds; `give_up_after` 0 is never."""

    initial: SomeSeconds = 1 * SECOND
    max: SomeSeconds = 5 * MINUTE
    give_up_after: Count = 0
    crashes: Annotated[int, Field(ge=1)] = 3


class Upload(_Section):
    """How files are sent. `doubt` in seconds, `bandwidth` in bytes per second, `multipart_threshold` in bytes."""

    concurrency: Annotated[Literal["auto"] | int, BeforeValidator(_workers)] = "auto"
    retry: Retry = Retry()
    doubt: Seconds = 15 * MINUTE
    bandwidth: BytesPerSecond | None = None
    multipart_threshold: Bytes = 16 * MB
    client: Annotated[Literal["boto3"], _later(None, "fast")] = "boto3"


class Http(_Section):
    """Later."""

    listen: Annotated[None, _later(None)] = None
    token_file: Annotated[None, _later(None)] = None


class Log(_Section):
    """What is logged to standard output, and how."""

    format: Literal["json", "console"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Section):
    """All of one configuration. `drain_timeout` in seconds."""

    state_dir: AbsolutePath = Path("/var/lib/spoold")
    ledger: Annotated[str, AfterValidator(_ledger)] | None = None
    ledger_file: AbsolutePath | None = None
    s3: S3 = S3()
    spools: Annotated[ListOf[Spool], AfterValidator(_at_least_one)]
    upload: Upload = Upload()
    http: Http = Http()
    app: Annotated[None, _later(None)] = None
    ingest: Annotated[tuple[()], _later(())] = ()
    log: Log = Log()
    drain_timeout: Seconds = 1 * MINUTE

    _url_in_file: str = PrivateAttr("")
    _warnings: tuple[Problem, ...] = PrivateAttr(())

    @property
    def ledger_url(self) -> str:
        """The SQLAlchemy URL of the ledger: `ledger`, or what `ledger_file` held when loaded, or below `state_dir`."""
        return self.ledger or self._url_in_file or f"sqlite:///{self.state_dir}/spoold.db"

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What is allowed, but a risk."""
        return self._warnings


# From text to settings ------------------------------------------------------------------------------------------------


def load(file: str | os.PathLike[str]) -> Settings:
    """Return the settings that stand in a file. Raises ConfigError with every problem, also if it cannot be read."""
    name = os.fspath(file)
    try:
        text = Path(name).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        line, what = 1, getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            line, what = error.object.count(b"\n", 0, error.start) + 1, "a byte there is no UTF-8"
        remedy = "name a file of UTF-8 text that this user may read; config.example.yaml is a start"
        raise ConfigError([Problem(name, line, 1, "file", f"cannot be read: {what}", remedy)]) from error
    return parse(text, name)


def parse(text: str, file: str = "config.yaml") -> Settings:
    """Return the settings that the text holds. Raises ConfigError with every problem, in the order of its lines."""
    document = read(text, file)
    problems = list(document.problems)
    settings: Settings | None
    try:
        settings = Settings.model_validate(document.data)
    except ValidationError as invalid:
        broken = {(problem.line, problem.column) for problem in problems}  # said already, in YAML's words
        errors = invalid.errors(include_url=False)
        found = [_problem(error, document) for error in errors]
        problems += [problem for problem in found if (problem.line, problem.column) not in broken]
        settings = _rest(document.data, [error["loc"] for error in errors])
    if settings is not None:
        unsure = {problem.setting for problem in problems}
        try:
            settings._url_in_file = _url_in(settings.ledger_file) if settings.ledger_file else ""
        except PydanticCustomError as wrong:
            told = wrong.context or {}
            problems.append(document.problem(("ledger_file",), told["message"], told["remedy"]))
        clashes = [document.problem(*clash) for clash in _clashes(settings, unsure)]
        problems += [problem for problem in clashes if problem.setting not in unsure]
    if problems or settings is None:
        raise ConfigError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    settings._warnings = tuple(document.problem(*risk) for risk in _risks(settings))
    return settings


def _url_in(file: Path) -> str:
    try:
        url = file.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "it is no UTF-8"
        raise _wrong(f"cannot be read: {file}: {what}", "let the daemon's user read it") from error
    return _built_ledger(url)


def setting_names(section: type[BaseModel] = Settings, within: str = "") -> Iterator[str]:
    """Yield every setting there is, dotted, sections before what is in them: `s3`, `s3.endpoint_url`, …"""
    for name, inner in _fields(section).items():
        yield within + name
        if inner is not None:
            yield from setting_names(inner, f"{within}{name}.")


def _fields(section: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the names in a section, each with the section that it is itself, if it is one."""

    def inner(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for arg in get_args(annotation) if (found := inner(arg))), None)

    return {name: inner(field.annotation) for name, field in section.model_fields.items()}


# What is wrong, in our words ------------------------------------------------------------------------------------------

_WANTED = {
    "string_type": ("text", "write a text"),
    "path_type": ("a path", "write an absolute path"),
    "bool_type": ("true or false", "write true or false, without quotes"),
    "int_type": ("a whole number", "write a whole number, without quotes"),
    "tuple_type": ("a list", "write a list: each item in a line of its own that begins with `- `"),
    "dict_type": ("a mapping", "write its entries as `name: value`, one a line, indented"),
    "model_type": ("a section", "write its settings as `name: value`, one a line, indented"),
}


def _problem(error: ErrorDetails, document: Document) -> Problem:
    loc, kind, given, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "spoold":
        is_key = loc[-1:] == ("[key]",)  # pydantic's way to say that the name is wrong, not what it stands for
        return document.problem(loc[:-1] if is_key else loc, context["message"], context["remedy"], at_key=is_key)
    if kind == "extra_forbidden":
        return document.problem(loc, *_unknown(loc), at_key=True)
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
        wrong = f"must be one of {', '.join(choices)}, not {shown(given, document.text(loc))}"
        return document.problem(loc, wrong, remedy)
    if kind == "greater_than_equal":
        return document.problem(loc, f"is too small: {given}", f"write {context['ge']} or more")
    return document.problem(loc, error["msg"][:1].lower() + error["msg"][1:])


def _unknown(loc: Loc) -> tuple[str, str]:
    """Return what is wrong with a setting that there is not, and what to write instead."""
    name = str(loc[-1])
    if _SECRET.search(name):
        return f"is a secret, and {_NO_SECRETS}", _BOTO_CHAIN
    section: type[BaseModel] = Settings
    for part in loc[:-1]:
        section = _fields(section).get(str(part)) or section
    meant = _home(name, setting_names(section)) or closest(name, section.model_fields) or _home(name, setting_names())
    if meant:
        return "is unknown here", f"did you mean `{meant}`?"
    return "is unknown here", f"leave it out; known are {', '.join(section.model_fields)}"


def _home(name: str, settings: Iterable[str]) -> str | None:
    """Return the setting of that very name, if one has it somewhere."""
    return next((full for full in settings if full.rpartition(".")[2] == name), None)


# What is wrong only together ------------------------------------------------------------------------------------------


def _rest(data: Any, wrong: list[Loc]) -> Settings | None:
    """Return the settings with defaults for the wrong ones, so that the others can be compared; None if there are none.

    What has no default gets a value that clashes with no other.
    """
    data = copy.deepcopy(data)
    if isinstance(data.get("spools"), list):
        data["spools"] = [spool if isinstance(spool, dict) else {} for spool in data["spools"]]
    for loc in wrong:
        here, holder, name = data, data, loc[0]
        for part in loc:
            if isinstance(here, dict):
                here, holder, name = here.get(part), here, part
            elif isinstance(here, list) and isinstance(part, int):
                here = here[part]
            else:
                break
        if holder is not data or name != "spools" or len(loc) == 1:
            holder.pop(name, None)
    for index, spool in enumerate(data.setdefault("spools", [{}])):
        spool |= {"name": f"spool-{index}", "root": f"/spool-{index}", "bucket": "bucket"} | spool
    try:
        return Settings.model_validate(data)
    except ValidationError:
        return None


Found = tuple[Loc, str, str]


def _clashes(settings: Settings, unsure: set[str]) -> Iterator[Found]:
    """Yield what is wrong between settings. unsure: the settings that have a default in place of a wrong value."""
    names: dict[str, int] = {}
    for index, spool in enumerate(settings.spools):
        at = ("spools", index)
        if (first := names.setdefault(spool.name, index)) != index:
            yield (*at, "name"), f"is the name of spools[{first}] too: {spool.name}", "name each differently"
        if settings.s3.endpoint_url is None and "s3.endpoint_url" not in unsure:
            yield from _unknown_to_aws(spool, at)
        elif "/" in spool.bucket:
            yield (*at, "bucket"), f"has a / in it: {spool.bucket}", "put what follows the bucket's name into `key`"
        yield from _too_much_for_an_object(spool.object, (*at, "object"))
        templates = {f"spools[{index}].{name}" for name in ("path", "key", "url", "root", "rails_root", "rails_env")}
        if not templates & unsure:
            try:
                spool.layout()
            except BadTemplate as error:
                yield (*at, error.field), error.message, error.remedy
    yield from _overlaps(settings, unsure)
    if "?" in str(settings.state_dir):
        yield ("state_dir",), "has a ? in it, which ends a path in the ledger's URL", "name another directory"
    if settings.ledger and settings.ledger_file:
        yield ("ledger_file",), "stands beside `ledger`", "keep one of the two"
    if settings.upload.retry.max < settings.upload.retry.initial:
        yield ("upload", "retry", "max"), "is less than `initial`", "write the longest wait between two attempts"


def _unknown_to_aws(spool: Spool, at: Loc) -> Iterator[Found]:
    """Yield what AWS would refuse; other servers have rules and storage classes of their own."""
    legal = re.compile(r"(?!\d+(\.\d+){3}$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
    if not legal.fullmatch(spool.bucket):
        better = re.sub(r"[^a-z0-9.-]+", "-", spool.bucket.lower()).strip("-.")
        remedy = "write 3 to 63 of a-z 0-9 . -" + (f", such as {better}" if legal.fullmatch(better) else "")
        yield (*at, "bucket"), f"is no legal name of a bucket: {shown(spool.bucket)}", remedy
    layers: list[tuple[Loc, ObjectSettings]] = [((*at, "object"), spool.object)]
    for place in ("per_style", "per_attachment"):
        layers += [((*at, "object", place, name), layer) for name, layer in getattr(spool.object, place).items()]
    for where, layer in layers:
        if (given := layer.storage_class) is not None and given not in _STORAGE_CLASSES:
            near = closest(given.upper(), _STORAGE_CLASSES)
            remedy = f"did you mean `{near}`?" if near else f"write one of {', '.join(_STORAGE_CLASSES)}"
            yield (*where, "storage_class"), f"is unknown: {shown(given)}", remedy


def _too_much_for_an_object(objects: Objects, at: Loc) -> Iterator[Found]:
    """Yield what becomes too much when the settings for all, an attachment and a style are merged."""
    for name, most, unit in (("tags", _MOST_TAGS, "tags"), ("metadata", _MOST_METADATA, "bytes of metadata")):
        found: set[tuple[str, str]] = set()
        for attachment, style in product(("", *objects.per_attachment), ("", *objects.per_style)):
            table = getattr(objects.headers_for(attachment, style), name)
            size = len(table) if name == "tags" else sum(len(key) + len(value) for key, value in table.items())
            if size <= most or found & {("", ""), (attachment, ""), ("", style)}:
                continue
            found.add((attachment, style))
            part = ("per_style", style) if style else ("per_attachment", attachment) if attachment else ()
            yield (*at, *part, name), f"makes {size} {unit} for one object", f"keep to {most} with all that are merged"


def _overlaps(settings: Settings, unsure: set[str]) -> Iterator[Found]:
    """Yield the directories that lie in one another: one's files would be taken for the other's."""
    for (first, one), (second, two) in combinations(enumerate(settings.spools), 2):
        if how := _lies(two.root, one.root):
            message = f"{how} the root of spools[{first}], {one.root}"
            yield ("spools", second, "root"), message, "give each spool a tree of its own"
    is_written = "state_dir" in settings.model_fields_set
    named = next((name for name in ("ledger", "ledger_file") if getattr(settings, name)), None)
    ledger = Path(settings.ledger_url.partition(":///")[2].partition("?")[0])
    for index, spool in enumerate(settings.spools):
        if named and _lies(ledger, spool.root) == "lies in":
            yield (named,), f"lies in the root of spools[{index}], {spool.root}", "put the ledger below `state_dir`"
        if "state_dir" in unsure:
            continue
        how = _lies(settings.state_dir, spool.root)
        if how and is_written:
            message = f"{how} the root of spools[{index}], {spool.root}"
            yield ("state_dir",), message, "name a directory outside of all spools, such as /var/lib/spoold"
        elif how:
            message = f"{_lies(spool.root, settings.state_dir)} state_dir, {settings.state_dir}"
            yield ("spools", index, "root"), message, "name a `state_dir` outside of all spools"


def _lies(path: Path, other: Path) -> str:
    """Return how a directory lies to another, links resolved as far as they are there; "" if they are strangers."""
    one, two = Path(os.path.realpath(path)), Path(os.path.realpath(other))
    if one == two:
        return "is the same as"
    return "lies in" if two in one.parents else "contains" if one in two.parents else ""


def _risks(settings: Settings) -> Iterator[Found]:
    """Yield what is allowed, and lost somebody a file or a save."""
    homes: dict[tuple[str, str], int] = {}
    for index, spool in enumerate(settings.spools):
        at: Loc = ("spools", index)
        cleanup = spool.cleanup
        if (first := homes.setdefault((spool.bucket, spool.key), index)) != index:
            message = f"and `bucket` are those of spools[{first}]: where keys meet, one record is dead with KeyTaken"
            yield (*at, "key"), message, "begin one of them with a prefix of its own"
        if not cleanup.delete:
            continue
        at = (*at, "cleanup")
        if cleanup.min_age < 5:  # Paperclip does chmod by name after its rename; ENOENT there fails the web request
            yield (*at, "min_age"), "is below 5s: the app may still be saving the file", "write 5s or more"
        if cleanup.grace == 0:
            message = "looks at once: a writer that was just opening the file can lose what it writes"
            yield (*at, "grace"), message, "write 10s"
        if cleanup.keep_empty_dirs_for < 1:  # rmdir at once failed 2,089 of 4,000 saves, none of 10,000 at 0.2 s
            message = "is below 1s: the app's save fails if its new directory goes before its file is there"
            yield (*at, "keep_empty_dirs_for"), message, "write 1s or more, such as 30s"
