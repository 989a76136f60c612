"""Does an image file's container reach its end? It says nothing of the pixels: half a picture may be padded to its size.
And does any file show that a power cut took its bytes?

Formats are told by their bytes; what is no image is not ours to judge. A name counts only where there are no bytes yet.
"""

from __future__ import annotations

import os

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".avif", ".heic", ".bmp", ".tif", ".tiff"))

_PNG = b"\x89PNG\r\n\x1a\n"
_MAGICS = (b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a", b"BM")
_IMAGE_BRANDS = frozenset((b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))
_BOXES = frozenset((b"meta", b"mdat", b"moov", b"moof", b"free", b"uuid", b"mpvd"))
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))

_PAGE = 4096
_WINDOW = 4096
_WIDE_WINDOW = 65536

# A file can be made of blocks of two bytes, and no real one is: past so many we let it be. They took 0.2 to 0.7 s here,
# on 2026-11-22; whoever uploads such a file must not keep the watcher busy for minutes.
_MAX_BLOCKS = 1_000_000


def unfinished(fd: int, name: str) -> str | None:
    """Return what shows that an image is not all there, as one clause for a person; None if all is well or unknown.

    fd: open for reading; its offset is neither used nor moved. Raises OSError only where reading does.
    """
    file = _File(fd)
    head = file.at(0, 32)
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(file)
    if head.startswith(_PNG):
        return _png(file)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _gif(file)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(file, head)
    if head[4:8] == b"ftyp" and len(head) >= 12 and _is_image(file):
        return _boxes(file, "AVIF" if head[8:10] == b"av" else "HEIF")
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return _bmp(file, head)
    if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
        return _barely_begun(head)
    return None


def cut_off(fd: int, *, is_sure_of_size: bool = False) -> str | None:
    """Return what shows that a power cut took bytes of a file that nobody had synced, as one clause; None if nothing does.

    It comes back empty, or ends with a whole page, or has its size already and a hole in the place of its bytes: so the files
    of some hundred cuts of ext4, xfs and btrfs looked (tests/power.py). is_sure_of_size: it had this one before.
    """
    size = os.fstat(fd).st_size
    if not is_sure_of_size and size % _PAGE == 0:
        return f"it ends after {size} bytes, a multiple of {_PAGE}" if size else "it is empty"
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what was read since is no hole to the next call
    try:
        return "it has a hole" if size and os.lseek(fd, 0, os.SEEK_HOLE) < size else None
    except OSError:  # it was emptied at this moment, or nobody can tell here
        return None


class _File:
    """The bytes at an offset, read in windows so that neighbours cost nothing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self._window = b""
        self._start = 0

    def at(self, offset: int, size: int, window: int = _WINDOW) -> bytes:
        """Return `size` bytes, fewer at the end."""
        begin = offset - self._start
        if not 0 <= begin <= begin + size <= len(self._window):
            self._window = os.pread(self._fd, max(size, window), offset)
            self._start, begin = offset, 0
        return self._window[begin : begin + size]

    def find(self, byte: bytes, offset: int) -> int:
        """Return where this byte is next, at or behind `offset`; -1 for nowhere."""
        while self.at(offset, 1):
            if (found := self._window.find(byte, offset - self._start)) >= 0:
                return self._start + found
            offset = self._start + len(self._window)
        return -1

    def has_behind(self, two_bytes: bytes, offset: int) -> bool:
        """Say whether they stand behind `offset`; looks from the end, where they are if all is well."""
        end, window = self.size, _WINDOW
        while end > offset:
            begin = max(offset, end - window)
            if two_bytes in os.pread(self._fd, end - begin + 1, begin):
                return True
            end, window = begin, _WIDE_WINDOW
        return False


def _barely_begun(head: bytes) -> str | None:
    """Judge a file that is an image only by name, or too short to be told by its bytes."""
    if not head:
        return "it is empty"
    if not any(head[:16]):
        return "it begins with zeros"
    is_begun = any(magic.startswith(head) for magic in _MAGICS)
    is_begun |= len(head) < 18 and head.startswith(b"BM")
    is_begun |= len(head) < 12 and (b"RIFF".startswith(head[:4]) and b"WEBP".startswith(head[8:]))
    is_begun |= len(head) < 12 and (head.startswith(b"\0\0") and b"ftyp".startswith(head[4:8]))
    return f"it stops after {_bytes(len(head))}" if is_begun else None


def _jpeg(file: _File) -> str | None:
    """Walk the segments, which may hold a thumbnail with an end of its own, to the scan; its end is behind it.

    In a scan FF is followed by 0 or a restart marker, so the marker of the end stands nowhere else.
    """
    position = 2
    for _ in range(_MAX_BLOCKS):
        position = file.find(b"\xff", position)  # bytes between segments are skipped, as libjpeg does
        segment = file.at(position, 4) if position >= 0 else b""
        code = segment[1] if len(segment) == 4 else None
        if code is None or code == 0xD9:
            return f"the JPEG stops after {_bytes(file.size)}, before its picture"
        if code == 0xFF:
            position += 1
        elif code <= 0x01 or 0xD0 <= code <= 0xD8:
            position += 2
        elif (length := int.from_bytes(segment[2:], "big")) < 2:
            return f"the JPEG has a hole after {_bytes(position)}"
        else:
            position += 2 + length
            if code == 0xDA:
                return None if file.has_behind(b"\xff\xd9", position) else "the JPEG has no end marker"
    return None


def _png(file: _File) -> str | None:
    position = len(_PNG)
    for _ in range(_MAX_BLOCKS):
        chunk = file.at(position, 8)
        end = position + 12 + int.from_bytes(chunk[:4], "big")
        if len(chunk) < 8:
            return f"the PNG stops after {_bytes(file.size)}, before its end"
        if not chunk[4:].isalpha():
            return f"the PNG has a hole after {_bytes(position)}"
        if end > file.size:
            return f"the PNG stops after {file.size} of at least {_bytes(end)}"
        if chunk[4:] == b"IEND":
            return None
        position = end
    return None


def _gif(file: _File) -> str | None:
    """Walk the blocks to the trailer."""
    position = 13 + _color_table(file.at(10, 1))
    blocks = 0
    while block := file.at(position, 11, _WIDE_WINDOW):
        kind = block[0]
        if kind == 0x3B or blocks > _MAX_BLOCKS:
            return None
        if kind == 0x21:
            position += 2
        elif kind == 0x2C:
            position += 11 + _color_table(block[9:10])
        elif kind == 0:  # zeros between blocks are skipped, as browsers do; at the end of a file they are a hole
            position += 1
            blocks += 1
            continue
        else:
            return f"the GIF has a hole after {_bytes(position)}"
        while length := file.at(position, 1, _WIDE_WINDOW):
            position += 1 + length[0]
            blocks += 1
            if length == b"\0" or blocks > _MAX_BLOCKS:
                break
    return f"the GIF stops after {_bytes(file.size)}, before its trailer"


def _color_table(flags: bytes) -> int:
    """Return the size in bytes of the colour table that these flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _webp(file: _File, head: bytes) -> str | None:
    end = 8 + int.from_bytes(head[4:8], "little")
    if end < 20:
        return "the WebP does not yet say how long it is"
    return f"the WebP stops after {file.size} of {_bytes(end)}" if end > file.size else None


def _bmp(file: _File, head: bytes) -> str | None:
    end = int.from_bytes(head[2:6], "little")  # 0 where the writer did not care
    return f"the BMP stops after {file.size} of {_bytes(end)}" if end > file.size else None


def _is_image(file: _File) -> bool:
    """Say whether one of the brands of an ISO base media file is an image's."""
    size = int.from_bytes(file.at(0, 4), "big")
    brands = file.at(8, min(size, 1024) - 8) if size >= 12 else file.at(8, 4)
    return any(brands[index : index + 4] in _IMAGE_BRANDS for index in range(0, len(brands), 4) if index != 4)


def _boxes(file: _File, format: str) -> str | None:
    """Walk the top-level boxes: there must be one that describes and one that holds the pixels, and none cut off."""
    position = 0
    seen: set[bytes] = set()
    for _ in range(_MAX_BLOCKS):
        kind, begin, end = _box(file, position)
        is_whole = bool(seen & {b"meta", b"moov"}) and bool(seen & {b"mdat", b"idat"})
        if not kind.isalnum():
            return None if is_whole else f"the {format} stops after {_bytes(min(position, file.size))}, before its end"
        if end > file.size and not (is_whole and kind not in _BOXES):
            return f"the {format} stops after {file.size} of at least {_bytes(end)}"
        seen.add(kind)
        if kind == b"meta" and _holds_pixels(file, begin + 4, end):
            seen.add(b"idat")
        position = end
    return None


def _holds_pixels(file: _File, position: int, end: int) -> bool:
    """Say whether one of the boxes from here to `end` has pixels in it."""
    for _ in range(_MAX_BLOCKS):
        kind, _, position = _box(file, position)
        if kind == b"idat":
            return True
        if not kind or position >= end:
            break
    return False


def _box(file: _File, position: int) -> tuple[bytes, int, int]:
    """Return a box's kind, where its contents begin and where it ends; kind is b"" where there is none."""
    head = file.at(position, 16)
    size, kind, begin = int.from_bytes(head[:4], "big"), head[4:8], position + 8
    if size == 1 and len(head) == 16:
        size, begin = int.from_bytes(head[8:], "big"), position + 16
    elif size == 0:
        size = max(file.size - position, 8)  # it reaches to the end, wherever that will be
    if len(kind) < 4 or size < begin - position:
        return b"", position, position
    return kind, begin, position + size


def _bytes(count: int) -> str:
    return f"{count} byte" + ("s" if count != 1 else "")
