"""The settings: YAML → frozen values, or every mistake at once with its line and column (contract, section 2).

Names and defaults are the contract's. A duration is a float in seconds, a size an int in bytes. What a value may look
like is in config_values, what is wrong between settings in config_rules, and how a person is told in config_words.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from spoold import config_rules, config_words
from spoold.config_values import (
    HOUR,
    MB,
    MINUTE,
    SECOND,
    AbsolutePath,
    Bytes,
    BytesPerSecond,
    CannedAcl,
    Count,
    CountFromOne,
    Endpoint,
    Header,
    LedgerUrl,
    MapOf,
    MediaType,
    MetadataKey,
    Name,
    NotYet,
    Seconds,
    SomeOf,
    SomeSeconds,
    SpoolName,
    StylesOf,
    TagKey,
    TagValue,
    Text,
    Workers,
    later,
    ledger_in,
)
from spoold.errors import ConfigError, Problem
from spoold.layout import Layout
from spoold.model import ORIGINAL
from spoold.yaml_places import read

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

    endpoint_url: Endpoint | None = None
    region: Text | None = None
    profile: Text | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksum: Literal["crc32", "crc32c", "crc64nvme", "sha256", "none"] = "crc32"


class Complete(_Section):
    """What makes a record complete. `settle` and `within` are in seconds."""

    styles: StylesOf = None
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

    name: SpoolName
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
    styles: Annotated[Mapping[str, Any], later({})] = {}

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
    crashes: CountFromOne = 3


class Upload(_Section):
    """How files are sent. `doubt` in seconds, `bandwidth` in bytes per second, `multipart_threshold` in bytes."""

    concurrency: Workers = "auto"
    retry: Retry = Retry()
    doubt: Seconds = 15 * MINUTE
    bandwidth: BytesPerSecond | None = None
    multipart_threshold: Bytes = 16 * MB
    client: Literal["boto3", "fast"] = "boto3"


class Http(_Section):
    """Later."""

    listen: NotYet = None
    token_file: NotYet = None


class Log(_Section):
    """What is logged to standard output, and how."""

    format: Literal["json", "console"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Section):
    """All of one configuration. `drain_timeout` in seconds."""

    state_dir: AbsolutePath = Path("/var/lib/spoold")
    ledger: LedgerUrl | None = None
    ledger_file: AbsolutePath | None = None
    s3: S3 = S3()
    spools: SomeOf[Spool]
    upload: Upload = Upload()
    http: Http = Http()
    app: NotYet = None
    ingest: Annotated[tuple[()], later(())] = ()
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
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(document.data)
    except ValidationError as invalid:
        broken = {(problem.line, problem.column) for problem in problems}  # said already, in YAML's words
        errors = invalid.errors(include_url=False)
        found = [config_words.problem(error, document, Settings) for error in errors]
        problems += [problem for problem in found if (problem.line, problem.column) not in broken]
        with contextlib.suppress(ValidationError):
            settings = Settings.model_validate(config_rules.comparable(document.data, [error["loc"] for error in errors]))
    if settings is not None:
        unsure = {problem.setting for problem in problems}
        try:
            settings._url_in_file = ledger_in(settings.ledger_file) if settings.ledger_file else ""
        except PydanticCustomError as wrong:
            told = wrong.context or {}
            problems.append(document.problem(("ledger_file",), told["message"], told["remedy"]))
        clashes = [document.problem(*clash) for clash in config_rules.clashes(settings, unsure)]
        problems += [problem for problem in clashes if problem.setting not in unsure]
    if problems or settings is None:
        raise ConfigError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    settings._warnings = tuple(document.problem(*risk) for risk in config_rules.risks(settings))
    return settings


def setting_names() -> Iterator[str]:
    """Yield every setting there is, dotted, sections before what is in them: `s3`, `s3.endpoint_url`, …"""
    return config_words.names(Settings)
