"""Decode images where they can do no harm: in a child with limits on memory and time (FACTS 32, 33).

Decoding is a veto, never a proof. Run as a program, this module is the child: `python -m spoold.styles FD`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF")
_MEMORY_BYTES = 1 << 30
_CPU_S = 60
_MOST_FRAMES = 10_000
_UNDECODABLE = 65  # EX_DATAERR


def undecodable(fd: int) -> str | None:
    """Decode every pixel of every frame of the open file in a child; return why that fails, or None if it does not.

    Files in formats that are not on our list are nobody's to judge: None.
    """
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "spoold.styles", str(fd)],
            pass_fds=[fd], stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * _CPU_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"decoding it took more than {2 * _CPU_S} s"
    if child.returncode == 0:
        return None
    if child.returncode == _UNDECODABLE:
        return child.stderr.decode(errors="replace").strip()
    return f"decoding it ended the decoder (status {child.returncode}; limits: {_MEMORY_BYTES >> 20} MiB, {_CPU_S} s)"


def _decode(fd: int) -> None:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with os.fdopen(fd, "rb") as file:
        try:
            # verify() alone accepts half a JPEG, load() alone a PNG whose second half is zeros: its checksums tell.
            Image.open(file, formats=_FORMATS).verify()
        except UnidentifiedImageError:
            return
        image = Image.open(file, formats=_FORMATS)
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number >= _MOST_FRAMES:
                raise ValueError(f"it has more than {_MOST_FRAMES} frames")
            frame.load()


if __name__ == "__main__":
    try:
        _decode(int(sys.argv[1]))
    except Exception as error:  # whatever Pillow raises on hostile input is the answer
        sys.exit(print(f"{type(error).__name__}: {error}", file=sys.stderr) or _UNDECODABLE)
