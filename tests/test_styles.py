"""Decoding happens in a child, and is a veto: half an image, a bomb and a dead decoder all have their words."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from spoold.styles import undecodable
from tests.paperclip import picture


def judged(path: Path, content: bytes) -> str | None:
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return undecodable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_whole_image_decodes(format: str, tmp_path: Path) -> None:
    assert judged(tmp_path / "me", picture(64, 48, 1, format)) is None


@pytest.mark.parametrize(("format", "end_bytes"), [("PNG", 12), ("GIF", 1)])
def test_half_an_image_with_a_proper_end_does_not(format: str, end_bytes: int, tmp_path: Path) -> None:
    """Its container is whole, so `images: ends` lets it pass; only decoding tells. libjpeg and libwebp forgive even this."""
    whole = picture(200, 200, 1, format)
    half = whole[: len(whole) // 2].ljust(len(whole) - end_bytes, b"\0") + whole[-end_bytes:]

    assert judged(tmp_path / "me", half)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_half_a_file_does_not(format: str, tmp_path: Path) -> None:
    whole = picture(200, 200, 1, format)

    assert judged(tmp_path / "me", whole[: len(whole) // 2])


def test_every_frame_of_an_animation_must_decode(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), (n, 0, 0)) for n in range(0, 250, 50)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    whole = buffer.getvalue()
    broken = bytearray(whole)
    last = whole.rindex(b"VP8L")
    broken[last + 8 : last + 24] = bytes(16)

    assert judged(tmp_path / "whole.webp", whole) is None
    assert judged(tmp_path / "broken.webp", bytes(broken))


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    reason = judged(tmp_path / "bomb.png", bomb)

    assert reason is not None and "DecompressionBomb" in reason


def test_what_is_no_image_of_ours_is_not_judged(tmp_path: Path) -> None:
    assert judged(tmp_path / "me.svg", b"<svg/>") is None
    assert judged(tmp_path / "me.pdf", b"%PDF-1.7 and so on") is None
