"""Every format that Pillow writes, cut off everywhere."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spoold.container import cut_off, unfinished
from tests.disk import run


class Scratch:
    """A file without a name, to be written anew for each look."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("scratch")

    def look(self, content: bytes, name: str = "photo.bin") -> str | None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, content, 0)
        return unfinished(self.fd, name)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Scratch]:
    scratch = Scratch()
    yield scratch
    os.close(scratch.fd)


def picture(format: str, *, size: int = 24, frames: int = 1, mode: str = "RGB", **options: Any) -> bytes:
    source = Image.radial_gradient("L").resize((size, size))
    images = [Image.merge("RGB", (source, source.rotate(90 * i), source.rotate(10 * i))).convert(mode) for i in range(frames)]
    file = io.BytesIO()
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    images[0].save(file, format, **options)
    return file.getvalue()


def with_thumbnail(jpeg: bytes) -> bytes:
    """Return this JPEG with another one, whole, in its EXIF segment."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + picture("JPEG", size=8)
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def box(kind: bytes, content: bytes = b"", *, is_long: bool = False) -> bytes:
    if is_long:
        return b"\0\0\0\1" + kind + (16 + len(content)).to_bytes(8, "big") + content
    return (8 + len(content)).to_bytes(4, "big") + kind + content


HEIC = box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", b"\0\0\0\0" + box(b"hdlr", b"x" * 20))
PIXELS = box(b"mdat", b"x" * 50)

WHOLE: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": lambda: picture("JPEG"),
    "progressive.jpg": lambda: picture("JPEG", progressive=True),
    "grey.jpeg": lambda: picture("JPEG", mode="L"),
    "restarts.jpe": lambda: picture("JPEG", restart_marker_blocks=1),
    "thumbnail.JPG": lambda: with_thumbnail(picture("JPEG")),
    "icc.jpg": lambda: picture("JPEG", icc_profile=b"\xff\xd9" * 900, comment=b"\xff\xd9\xff\xda"),
    "plain.png": lambda: picture("PNG"),
    "animated.png": lambda: picture("PNG", frames=3),
    "plain.gif": lambda: picture("GIF"),
    "animated.gif": lambda: picture("GIF", frames=3, loop=0, comment=b"hello"),
    "two-tone.gif": lambda: picture("GIF", mode="1"),
    "lossy.webp": lambda: picture("WEBP"),
    "lossless.webp": lambda: picture("WEBP", lossless=True),
    "animated.webp": lambda: picture("WEBP", frames=3),
    "plain.avif": lambda: picture("AVIF"),
    "animated.avif": lambda: picture("AVIF", frames=3),
    "made.heic": lambda: HEIC + PIXELS,
    "pixels-first.heic": lambda: HEIC[:24] + PIXELS + HEIC[24:],
    "in-meta.heic": lambda: HEIC[:24] + box(b"meta", b"\0\0\0\0" + box(b"idat", b"x" * 50)),
    "long.heic": lambda: HEIC + box(b"mdat", b"x" * 50, is_long=True),
    "plain.bmp": lambda: picture("BMP"),
    "one-bit.bmp": lambda: picture("BMP", mode="1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_image_is_finished(scratch: Scratch, name: str) -> None:
    assert scratch.look(WHOLE[name](), name) is None


@pytest.mark.parametrize("name", WHOLE)
def test_an_image_that_is_cut_off_anywhere_is_unfinished(scratch: Scratch, name: str) -> None:
    content = WHOLE[name]()

    whole_at = [size for size in range(len(content)) if scratch.look(content[:size], name) is None]

    assert [] == whole_at


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("in-meta")])
def test_an_image_whose_second_half_is_zeros_is_unfinished_or_as_long_as_it_says(scratch: Scratch, name: str) -> None:
    """A file that is filled into space reserved for it. Formats that give a size and no end cannot tell."""
    content = WHOLE[name]()
    half = len(content) // 2

    found = scratch.look(content[:half] + bytes(len(content) - half), name)

    tells_no_end = name.endswith((".webp", ".bmp", ".avif", ".heic"))
    assert tells_no_end or found is not None


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("junk", [b"\n", b"\0" * 3, b"MotionPhoto_Data" + b"\0\0\0\x18ftypmp42" * 400, b"\xff\xd9" * 9])
def test_junk_behind_the_end_is_no_matter(scratch: Scratch, name: str, junk: bytes) -> None:
    assert scratch.look(WHOLE[name]() + junk, name) is None


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"", "cat.jpg", "it is empty"),
        (b"", "cat.TIFF", "it is empty"),
        (bytes(16) + b"\xff\xd8\xff", "cat.jpeg", "it begins with zeros"),
        (bytes(3), "cat.avif", "it begins with zeros"),
        (b"\xff\xd8", "cat.png", "it stops after 2 bytes"),
        (b"\x89", "cat.png", "it stops after 1 byte"),
        (picture("JPEG")[:-1], "cat", "the JPEG has no end marker"),
        (picture("JPEG")[:-2] + bytes(200_000), "cat", "the JPEG has no end marker"),
        (with_thumbnail(picture("JPEG"))[:900], "cat", "the JPEG stops after 900 bytes, before its picture"),
        (picture("JPEG")[:20] + bytes(900), "cat", "the JPEG stops after 920 bytes, before its picture"),
        (b"\xff\xd8\xff\xe0\0\0" + bytes(90), "cat", "the JPEG has a hole after 2 bytes"),
        (b"\xff\xd8\xff\xd9", "cat", "the JPEG stops after 4 bytes, before its picture"),
        (picture("PNG")[:60], "cat", "the PNG stops after 60 of at least {} bytes"),
        (picture("PNG")[:33], "cat", "the PNG stops after 33 bytes, before its end"),
        (picture("PNG")[:33] + bytes(90), "cat", "the PNG has a hole after 33 bytes"),
        (picture("PNG")[:33] + b"\xff\xff\xff\xffIDAT", "cat", "the PNG stops after 41 of at least 4294967340 bytes"),
        (picture("GIF")[:-1], "cat", "the GIF stops after {} bytes, before its trailer"),
        (picture("GIF")[:-1] + bytes(5000), "cat", "the GIF stops after {} bytes, before its trailer"),
        (picture("GIF")[:-1] + b"x;", "cat", "the GIF has a hole after {} bytes"),
        (picture("WEBP")[:90], "cat", "the WebP stops after 90 of {} bytes"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "cat", "the WebP does not yet say how long it is"),
        (picture("BMP")[:90], "cat", "the BMP stops after 90 of 1782 bytes"),
        (picture("AVIF")[:-1], "cat", "the AVIF stops after {} of at least {} bytes"),
        (HEIC, "cat", "the HEIF stops after 64 bytes, before its end"),
        (HEIC + bytes(500), "cat", "the HEIF stops after 64 bytes, before its end"),
        (HEIC + PIXELS + PIXELS[:-1], "cat", "the HEIF stops after 179 of at least 180 bytes"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)  # fmt: skip
def test_what_is_missing_is_said(scratch: Scratch, content: bytes, name: str, expected: str) -> None:
    found = scratch.look(content, name)

    assert found is not None
    assert re.fullmatch(expected.replace("{}", "[0-9]+"), found)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "notes.txt"),
        (bytes(90), "disk.img"),
        (bytes(15) + b"x", "cat.jpg"),
        (b"<html>not found</html>", "cat.jpg"),
        (b"x", "cat.png"),
        (b"BMW is no bitmap of Windows", "cat.bmp"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt ", "sound.wav"),
        (box(b"ftyp", b"isom\0\0\x02\0isomiso2") + b"\xff\xff\xff\xffmdat", "film.mp4"),
        (picture("TIFF")[:50], "cat.tif"),
        (b"%PDF-1.7", "cat.pdf"),
        (b"GIF88a", "cat.gif"),
        (HEIC + box(b"mdat")[:3] + b"\0mdat" + b"to the end of the file", "size-0.heic"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_is_no_image_or_cannot_be_told_is_not_judged(scratch: Scratch, content: bytes, name: str) -> None:
    assert scratch.look(content, name) is None


@pytest.mark.parametrize(
    "content",
    [
        picture("GIF")[:-1] + b"!\xfe" + b"\1x" * 1_500_000,
        picture("GIF")[:-1] + bytes(1_500_000),
        picture("PNG")[:33] + b"\0\0\0\0teXt\0\0\0\0" * 1_100_000,
        b"\xff\xd8" + b"\xff" * 1_500_000,
        b"\xff\xd8" + b"\xff\xe0\0\2" * 1_100_000,
        HEIC + box(b"free") * 1_100_000,
    ],
    ids=["gif blocks", "gif zeros", "png chunks", "jpeg fill", "jpeg segments", "boxes"],
)
@pytest.mark.timeout(20)
def test_a_file_made_of_blocks_does_not_keep_us_busy(scratch: Scratch, content: bytes) -> None:
    assert scratch.look(content) is None


@settings(deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.sampled_from(sorted(WHOLE)).flatmap(
    lambda name: st.tuples(st.just(WHOLE[name]()), st.integers(0, 3000), st.binary(min_size=1, max_size=9)).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + len(drawn[2]) :]
    )
)), name=st.sampled_from(["a", "a.jpg"]))  # fmt: skip
def test_no_content_makes_it_raise(scratch: Scratch, content: bytes, name: str) -> None:
    assert scratch.look(content, name) is None or scratch.look(content, name)


def test_the_offset_of_the_descriptor_is_left_alone(scratch: Scratch) -> None:
    os.lseek(scratch.fd, 5, os.SEEK_SET)

    scratch.look(picture("PNG"))

    assert 5 == os.lseek(scratch.fd, 0, os.SEEK_CUR)


@pytest.mark.parametrize(("format", "limit"), [("JPEG", 2), ("PNG", 40), ("WEBP", 1), ("AVIF", 2), ("BMP", 1)])
def test_an_ordinary_file_takes_few_reads(scratch: Scratch, monkeypatch: pytest.MonkeyPatch, format: str, limit: int) -> None:
    content = picture(format, size=1500)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))

    assert scratch.look(content) is None

    assert 1 <= len(reads) <= limit


# What a power cut leaves


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"x" * 8192, "it ends after 8192 bytes, a multiple of 4096"),
        (b"x" * 8191, None),
        (b"\0" * 100, None),
    ],
)
def test_a_file_that_ends_with_a_page_may_have_been_cut_off(scratch: Scratch, content: bytes, reason: str | None) -> None:
    scratch.look(content)

    assert reason == cut_off(scratch.fd)
    assert cut_off(scratch.fd, is_sure_of_size=True) is None


def test_a_hole_is_found(scratch: Scratch) -> None:
    scratch.look(b"")
    os.pwrite(scratch.fd, b"the rest", 100_001)

    assert "it has a hole" == cut_off(scratch.fd, is_sure_of_size=True)


def test_bytes_that_were_promised_and_never_came_are_a_hole_also_when_they_were_read(tmp_path: Path) -> None:
    """ext4 after a cut: the size and the blocks are there, unwritten. In the page cache they count as data to SEEK_HOLE."""
    if run("stat", "-f", "-c", "%T", str(tmp_path)).strip() not in ("ext2/ext3", "xfs"):
        pytest.skip("blocks that are allocated and unwritten are another matter on this file system")
    path = tmp_path / "paper.pdf"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100_001)
        os.fsync(file.fileno())
    path.read_bytes()

    with path.open("rb") as file:
        assert "it has a hole" == cut_off(file.fileno(), is_sure_of_size=True)
