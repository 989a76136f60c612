"""An app that writes as Paperclip's filesystem storage does (FACTS 1 to 8), and the pictures it writes."""

from __future__ import annotations

import functools
import io
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from spoold.demo import STYLES, resized

DEFAULT_PATH = ":attachment/:id/:style/:basename.:extension"

How = Literal["rename", "copy", "close_before_rename"]


class App:
    """A web app with Paperclip, `root` being where its path template starts.

    Its temporary files lie beside the root, on the same filesystem. What Paperclip raises into the web request
    (FACTS 3), `save` raises: FileNotFoundError where somebody removed a file or directory under its hands.
    """

    def __init__(self, root: Path, path: str = DEFAULT_PATH) -> None:
        self.root = root
        self.path = path
        self._numbers = itertools.count()

    def path_of(self, attachment: str, id: int | str, style: str, name: str) -> Path:
        """Return where one style of one file lies."""
        return self.root / interpolate(self.path, attachment, id, style, name)

    def save(
        self,
        attachment: str,
        id: int | str,
        name: str,
        styles: Mapping[str, bytes],
        *,
        how: How = "rename",
        slow: float = 0.0,
        chunks: int = 4,
        old_mtime: bool = True,
        between: Callable[[str], None] = lambda step: None,
    ) -> dict[str, Path]:
        """Write the styles, the original first; return where each lies.

        how: "rename" moves open temporary files and closes them when all have their names; "close_before_rename" is
        Paperclip of 2009, and makes no CLOSE_WRITE; "copy" is a temporary directory on another filesystem: the final
        name is there half-written, in so many chunks with `slow` seconds after each, and gets an old mtime at the end
        (`old_mtime`: years for the original, seconds for the styles).
        between: called with "original named", "original chmodded" and so on, before the next step; for races.
        """
        paths = {style: self.path_of(attachment, id, style, name) for style in sorted(styles, key=_original_first)}
        if how == "copy":
            for style, path in paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._copy(path, styles[style], slow, chunks)
                if old_mtime:
                    then = time.time() - (3e8 if style == "original" else 5)
                    os.utime(path, (then, then))
                between(f"{style} named")
                path.chmod(0o644)
                between(f"{style} chmodded")
            return paths
        with ExitStack() as still_open:
            for style, path in paths.items():
                temporary = self._temporary(styles[style])
                if how == "rename":
                    still_open.enter_context(temporary.open("r+b"))
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.rename(path)
                between(f"{style} named")
                path.chmod(0o644)
                between(f"{style} chmodded")
        return paths

    def replace(
        self,
        attachment: str,
        id: int | str,
        old_name: str,
        name: str,
        styles: Mapping[str, bytes],
        *,
        how: How = "rename",
        slow: float = 0.0,
    ) -> dict[str, Path]:
        """Put a new file in the place of `old_name`: the old local ones go first, if they are there (FACTS 5)."""
        self.destroy(attachment, id, old_name, styles)
        return self.save(attachment, id, name, styles, how=how, slow=slow)

    def destroy(self, attachment: str, id: int | str, name: str, styles: Mapping[str, object] | tuple[str, ...] = ()) -> None:
        """Remove the local files, those that are there, and prune upwards. styles: besides the original and STYLES."""
        for style in dict.fromkeys(["original", *STYLES, *styles]):
            path = self.path_of(attachment, id, style, name)
            path.unlink(missing_ok=True)
            self._prune(path.parent)

    def _prune(self, directory: Path) -> None:
        """Remove empty directories upwards. Paperclip knows no floor (FACTS 6); here the root is the last to go."""
        while directory.is_relative_to(self.root):
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    @contextmanager
    def hold_open(self, path: Path) -> Iterator[BinaryIO]:
        """Have a file open for writing, as a writer who is not yet done; the file is yielded, at its start."""
        with path.open("r+b", buffering=0) as file:
            yield file

    def _temporary(self, content: bytes) -> Path:
        directory = self.root.with_name(f"{self.root.name}-tmp")
        directory.mkdir(exist_ok=True)
        path = directory / f"{os.getpid()}-{id(self)}-{next(self._numbers)}"
        path.write_bytes(content)
        return path

    def _copy(self, path: Path, content: bytes, slow: float, chunks: int) -> None:
        size = -(-len(content) // chunks) or 1
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(content), size):
                file.write(content[start : start + size])
                if slow:
                    time.sleep(slow)


def _original_first(style: str) -> tuple[bool, str]:
    return style != "original", style


def interpolate(template: str, attachment: str, id: int | str, style: str, name: str) -> str:
    """Fill in a path template as Paperclip does: plain substring replacement in reverse alphabetical order (FACTS 9).

    attachment: as the path has it, in the plural. `:class` is taken to be "users".
    """
    basename, dotextension = os.path.splitext(name)
    values = {
        "attachment": attachment,
        "basename": basename,
        "class": "users",
        "dotextension": dotextension,
        "extension": dotextension.lstrip("."),
        "filename": name,
        "id": str(id),
        "id_partition": _partition(id),
        "style": style,
    }
    for token in sorted(values, reverse=True):
        template = template.replace(f":{token}", values[token])
    return template


def _partition(id: int | str) -> str:
    if isinstance(id, str):
        return "/".join(re.findall(".{3}", id[:9]))
    digits = f"{id:09d}" if id < 1_000_000_000 else f"{id:012d}"
    return "/".join(re.findall("...", digits))


@functools.lru_cache(maxsize=256)
def picture(width: int = 1200, height: int = 900, seed: int = 0, format: str = "JPEG") -> bytes:
    """Return an image, always the same for the same arguments and another one for another seed."""
    chance = random.Random(seed)
    small = Image.frombytes("RGB", (16, 12), chance.randbytes(16 * 12 * 3))
    return _encoded(small.resize((width, height), Image.Resampling.BICUBIC), format)


def styles_of(original: bytes, styles: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Return the original and each style of it (`WxH>` or `WxH#`), in the original's format; STYLES by default."""
    return dict(_styles_of(original, tuple((STYLES if styles is None else styles).items())))


@functools.lru_cache(maxsize=64)
def _styles_of(original: bytes, styles: tuple[tuple[str, str], ...]) -> dict[str, bytes]:
    with Image.open(io.BytesIO(original)) as image:
        image.load()
        format = image.format or "JPEG"
        made = {style: _encoded(resized(image, geometry), format) for style, geometry in styles}
    return {"original": original, **made}


def _encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()
