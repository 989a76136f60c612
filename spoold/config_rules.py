"""What is wrong only between settings, and what is allowed but a risk. One setting's own value is config_values' matter."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spoold.config_values import closest, shown
from spoold.layout import BadTemplate
from spoold.yaml_places import Loc

if TYPE_CHECKING:  # for the types alone: config asks the rules, never the other way round
    from spoold.config import Objects, ObjectSettings, Settings, Spool

_STORAGE_CLASSES = (  # botocore 1.44.5, StorageClass
    *("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE"),
    *("REDUCED_REDUNDANCY", "EXPRESS_ONEZONE", "OUTPOSTS", "SNOW", "FSX_OPENZFS", "FSX_ONTAP"),
    *("AWS_BACKUP_WARM", "AWS_BACKUP_LOW_COST_WARM"),
)
_MOST_TAGS = 10  # S3 API, PutObjectTagging
_MOST_METADATA = 2048  # S3 API, PutObject: bytes of all names and values together

Found = tuple[Loc, str, str]
"""Where, what is wrong, and what to write instead."""


def clashes(settings: Settings, unsure: set[str]) -> Iterator[Found]:
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


def risks(settings: Settings) -> Iterator[Found]:
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


def comparable(data: Any, wrong: list[Loc]) -> Any:
    """Return a copy of the data without the wrong settings, so that the others can be compared.

    They get their defaults; what has no default gets a value that clashes with no other.
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
    return data


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
