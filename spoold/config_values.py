"""What a setting may look like: durations, sizes, paths, names and so on, each a type that says what is wrong with a value.

A type knows its own value, neither the setting that has it nor the others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from spoold.model import HOUSE

SECOND, MINUTE, HOUR, DAY = 1.0, 60.0, 3600.0, 86400.0
KB, MB, GB = 1000, 1000**2, 1000**3
KIB, MIB, GIB = 1024, 1024**2, 1024**3

NO_SECRETS = "secrets never stand in this file"
BOTO_CHAIN = "leave it to boto3: AWS_* in the environment, ~/.aws/credentials, or the machine's role"

K = TypeVar("K")
V = TypeVar("V")


# How a value is spoken of ---------------------------------------------------------------------------------------------


def wrong(message: str, remedy: str = "") -> PydanticCustomError:
    """Return what a type raises. message: goes on where the setting's name ends; remedy: what to write instead."""
    return PydanticCustomError("spoold", "{message}", {"message": message, "remedy": remedy})


def shown(given: object, text: str | None = None) -> str:
    """Return a value for a message, short. text: how it is written, where that is known."""
    if isinstance(given, list | dict):
        return "a list" if isinstance(given, list) else "a mapping"
    plain = text if text is not None else "nothing" if given is None else str(given)
    short = plain if len(plain) <= 40 else plain[:39] + "…"
    return f'"{short}"' if isinstance(given, str) else short


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return what `word` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, list(choices), 1)), None)


# Amounts --------------------------------------------------------------------------------------------------------------


def _amount(given: object, units: Mapping[str, float], kind: str, example: str, per: str = "") -> float:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if (is_number and given == 0) or given == "0":
        return 0.0
    if is_number:
        raise wrong(f"has no unit: {given}", f"write it with one, such as {example}")
    found = re.fullmatch(r"(-?[0-9]{1,15}(?:\.[0-9]{1,9})?)(" + "|".join(units) + ")" + per, str(given))
    if found is None:
        remedy = f"write a number and one of {' '.join(unit + per for unit in units)}, such as {example}"
        raise wrong(f"is no {kind}: {shown(given)}", remedy)
    if found[1].startswith("-"):
        raise wrong(f"is negative: {given}", f"write 0 or more, such as {example}")
    return float(found[1]) * units[found[2]]


def _seconds(given: object) -> float:
    units = {"ms": 0.001, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
    if (seconds := _amount(given, units, "duration", "10s")) > 3650 * DAY:
        raise wrong(f"is too long: {given}", "write 3650d or less")
    return seconds


def _more_than_nothing(given: object) -> float:
    if seconds := _seconds(given):
        return seconds
    raise wrong("must be more than 0s", "write a duration such as 10s")


_SIZES = {"KB": KB, "MB": MB, "GB": GB, "KiB": KIB, "MiB": MIB, "GiB": GIB}


def _size(given: object) -> int:
    if 0 < (size := round(_amount(given, _SIZES, "size", "16MB"))) <= 5 * GIB:  # S3 API: most that one PUT may have
        return size
    raise wrong(f"is out of range: {given}", "write more than 0 and at most 5GiB, such as 16MB")


def _rate(given: object) -> int:
    if rate := round(_amount(given, _SIZES, "rate", "20MB/s", per="/s")):
        return rate
    raise wrong("would send nothing at all", "write a rate such as 20MB/s, or null for no limit")


def _workers(given: object) -> object:
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= 1024):
        return given
    raise wrong(f"is out of range: {shown(given)}", "write auto, or a whole number from 1 to 1024")


Seconds = Annotated[float, BeforeValidator(_seconds)]
SomeSeconds = Annotated[float, BeforeValidator(_more_than_nothing)]
Bytes = Annotated[int, BeforeValidator(_size)]
BytesPerSecond = Annotated[int, BeforeValidator(_rate)]
Count = Annotated[int, Field(ge=0)]
CountFromOne = Annotated[int, Field(ge=1)]
Workers = Annotated[Literal["auto"] | int, BeforeValidator(_workers)]


# Texts ----------------------------------------------------------------------------------------------------------------


def _like(pattern: str, message: str, remedy: str) -> AfterValidator:
    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise wrong(f"{message}: {shown(text)}", remedy)

    return AfterValidator(check)


def _file_name(name: str) -> str:
    if name in ("", ".", "..", HOUSE) or "/" in name:
        raise wrong(f"is no plain name: {shown(name)}", f"write one without /, and not {HOUSE}")
    return name


_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110, section 5.6.2
_MEDIA_TYPE = rf"sniff|{_TOKEN}/{_TOKEN}(;[ -~]+)?"
_TAG_CHARS = "write letters, digits, spaces, + - = . _ : / @"

Text = Annotated[str, _like(r".*\S.*", "is empty", "write a text, or leave it out")]
Name = Annotated[str, AfterValidator(_file_name)]
SpoolName = Annotated[str, _like(r"[A-Za-z0-9._-]+", "is no name for a spool", "write letters, digits, . _ - only")]
MediaType = Annotated[str, _like(_MEDIA_TYPE, "is no media type", "write sniff, or one such as image/webp")]
Header = Annotated[str, _like(r"[ -~]*", "cannot stand in a header", "write ASCII only")]
MetadataKey = Annotated[str, _like(_TOKEN, "is no HTTP token", "write ASCII letters, digits and dashes")]
TagKey = Annotated[str, _like(r"(?!aws:)[\w +=.:/@-]{1,128}", "is no key of a tag", _TAG_CHARS)]
TagValue = Annotated[str, _like(r"[\w +=.:/@-]{0,256}", "is no value of a tag", _TAG_CHARS)]
CannedAcl = Literal[
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
]


# Where things are -----------------------------------------------------------------------------------------------------


def _absolute(path: Path) -> Path:
    """Return a path that means the same wherever and by whomever the daemon is started."""
    if str(path).startswith("~"):
        raise wrong("`~` is not expanded", "write the home directory out, such as /home/deploy")
    if re.search(r"\$[\w{(]", str(path)):
        raise wrong("environment variables are not expanded", "write the path out")
    if not path.is_absolute():
        raise wrong(f"is relative: {path}", "write an absolute path, one that begins with /")
    return path


def _endpoint(url: str) -> str:
    if "@" in url:
        raise wrong(f"has a user or password in it, and {NO_SECRETS}", BOTO_CHAIN)
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
        raise wrong(f"is no address: {shown(url)}", "begin with http:// or https://, such as https://minio.example:9000")
    return url


def _ledger_without_password(url: str) -> str:
    if re.search(r"//.*:.*@|password=", url, re.IGNORECASE):
        remedy = "put the URL into a file of mode 0600 and write `ledger_file: FILE`"
        raise wrong(f"has a password in it, and {NO_SECRETS}", remedy)
    return _ledger(url)


def _ledger(url: str) -> str:
    if not url.startswith("sqlite"):
        raise wrong("is not built yet, only sqlite is so far", "leave it out")
    if not re.fullmatch(r"sqlite(\+pysqlite)?:////[^?]+(\?.*)?", url):
        raise wrong("is no sqlite URL of an absolute path", "write sqlite:////var/lib/spoold/spoold.db: four slashes")
    return url


def ledger_in(file: Path) -> str:
    """Return the ledger's URL that stands in a file; there it may hold a password. Raises what a type raises."""
    try:
        url = file.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "it is no UTF-8"
        raise wrong(f"cannot be read: {file}: {what}", "let the daemon's user read it") from error
    return _ledger(url)


AbsolutePath = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
LedgerUrl = Annotated[str, AfterValidator(_ledger_without_password)]


# Many of them, or none yet --------------------------------------------------------------------------------------------


def _at_least_one(items: tuple[V, ...]) -> tuple[V, ...]:
    """Not min_length: that complains as well where all items are wrong."""
    if items:
        return items
    raise PydanticKnownError("missing")


def _list_for_all(given: object) -> object:
    if isinstance(given, list):
        return {"default": given}
    if given is None or isinstance(given, dict):
        return given
    raise wrong(f"must be a list, not {shown(given)}", "write [medium, thumb], or {avatars: [thumb], default: []}")


def later(instead: object, *values: object) -> BeforeValidator:
    """Refuse what is fixed in name only: anything but nothing, or these values."""

    def check(given: object) -> object:
        if given in values or (not values and given not in (None, [], {})):
            raise wrong("is not built yet", "leave it out")
        return given if values else instead

    return BeforeValidator(check)


ListOf = Annotated[tuple[V, ...], Field(strict=False)]
SomeOf = Annotated[ListOf[V], AfterValidator(_at_least_one)]
MapOf = Annotated[Mapping[K, V], BeforeValidator(lambda given: {} if given is None else given)]
StylesOf = Annotated[MapOf[Name, ListOf[Name]] | None, BeforeValidator(_list_for_all)]
NotYet = Annotated[None, later(None)]
