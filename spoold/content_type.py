"""The content type of a file: from its bytes, then from its name.

What the bytes are wins, so that nothing is served as what it is not. A name has its say where bytes only tell what a
file is made of (a zip, some XML, text), and where they tell nothing. A browser runs scripts in markup, and apps let
people choose names: markup under a name that promises something else, an image for one, is served as plain text.
"""

from __future__ import annotations

import mimetypes
import os
import re

import puremagic

UNKNOWN = "application/octet-stream"
TEXT = "text/plain"

_HTML = "text/html"
_XHTML = "application/xhtml+xml"
_SVG = "image/svg+xml"
_XML = "text/xml"
_ZIP = "application/zip"
_OLE = "application/x-ole-storage"
_OPEN_XML = "application/vnd.openxmlformats-officedocument."
_OPEN_DOCUMENT = "application/vnd.oasis.opendocument."

# What the standard library lacks, or has otherwise in another version of Python: the same on every machine.
_BY_EXTENSION = dict(mimetypes.MimeTypes(filenames=()).types_map[True]) | {
    ".3g2": "video/3gpp2", ".3gp": "video/3gpp", ".7z": "application/x-7z-compressed", ".aac": "audio/aac",
    ".apk": "application/vnd.android.package-archive", ".arw": "image/x-sony-arw", ".avif": "image/avif",
    ".bmp": "image/bmp", ".bz2": "application/x-bzip2", ".cr2": "image/x-canon-cr2", ".dng": "image/x-adobe-dng",
    ".docx": f"{_OPEN_XML}wordprocessingml.document", ".epub": "application/epub+zip", ".flac": "audio/flac",
    ".geojson": "application/geo+json", ".gz": "application/gzip", ".heic": "image/heic", ".heif": "image/heif",
    ".ics": "text/calendar", ".jar": "application/java-archive", ".jp2": "image/jp2", ".js": "text/javascript",
    ".jxl": "image/jxl", ".kml": "application/vnd.google-earth.kml+xml", ".kmz": "application/vnd.google-earth.kmz",
    ".m4a": "audio/mp4", ".m4v": "video/x-m4v", ".md": "text/markdown", ".mid": "audio/midi", ".mjs": "text/javascript",
    ".mkv": "video/x-matroska", ".msg": "application/vnd.ms-outlook", ".nef": "image/x-nikon-nef",
    ".odp": f"{_OPEN_DOCUMENT}presentation", ".ods": f"{_OPEN_DOCUMENT}spreadsheet", ".odt": f"{_OPEN_DOCUMENT}text",
    ".oga": "audio/ogg", ".ogg": "audio/ogg", ".ogv": "video/ogg", ".opus": "audio/opus", ".otf": "font/otf",
    ".pages": "application/vnd.apple.pages", ".pptx": f"{_OPEN_XML}presentationml.presentation",
    ".psd": "image/vnd.adobe.photoshop", ".rar": "application/vnd.rar", ".rss": "application/rss+xml",
    ".rtf": "application/rtf", ".svg": _SVG, ".tgz": "application/gzip", ".ttf": "font/ttf",
    ".usdz": "model/vnd.usdz+zip", ".vcf": "text/vcard", ".wav": "audio/wav", ".weba": "audio/webm",
    ".webm": "video/webm", ".webp": "image/webp", ".woff": "font/woff", ".woff2": "font/woff2", ".xhtml": _XHTML,
    ".xlsx": f"{_OPEN_XML}spreadsheetml.sheet", ".xml": _XML, ".xz": "application/x-xz", ".yaml": "application/yaml",
    ".yml": "application/yaml",
}  # fmt: skip

_MAGICS = (
    (b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"), (b"%PDF-", "application/pdf"), (b"II*\0", "image/tiff"), (b"MM\0*", "image/tiff"),
    (b"8BPS\0\1", "image/vnd.adobe.photoshop"), (b"\xff\n", "image/jxl"), (b"\0\0\0\x0cJXL \r\n\x87\n", "image/jxl"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "image/jp2"), (b"PK\3\4", _ZIP), (b"PK\5\6", _ZIP), (b"\x1f\x8b", "application/gzip"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OLE), (b"ID3\2", "audio/mpeg"), (b"ID3\3", "audio/mpeg"),
    (b"ID3\4", "audio/mpeg"), (b"OggS\0", "application/ogg"), (b"fLaC\0", "audio/flac"), (b"MThd\0", "audio/midi"),
    (b"{\\rtf", "application/rtf"), (b"%!PS", "application/postscript"), (b"\0asm", "application/wasm"),
    (b"wOFF\0", "font/woff"), (b"wOF2\0", "font/woff2"), (b"\xfd7zXZ\0", "application/x-xz"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"), (b"Rar!\x1a\7", "application/vnd.rar"),
)  # fmt: skip
_MAGICS_BY_BYTE = {magic[0]: [(m, kind) for m, kind in _MAGICS if m[0] == magic[0]] for magic, _ in _MAGICS}

_BRANDS = {
    b"avif": "image/avif", b"avis": "image/avif", b"heic": "image/heic", b"heix": "image/heic", b"hevc": "image/heic",
    b"mif1": "image/heif", b"msf1": "image/heif", b"qt  ": "video/quicktime", b"M4A ": "audio/mp4",
    b"M4B ": "audio/mp4", b"M4V ": "video/x-m4v",
}  # fmt: skip

# For types that only say what a file is made of: the types of names that say more.
_MORE_PRECISE = {
    _ZIP: re.compile(r".*\+zip|application/(java-archive|vnd\.(openxml|oasis|android|google-earth\.kmz|apple).*)"),
    _OLE: re.compile(r"application/(msword|vnd\.ms-.*)"),
    "application/rtf": re.compile("application/msword"),
    "application/ogg": re.compile("(audio|video)/(ogg|opus)"),
    "image/heif": re.compile("image/(heic|avif)"),
    "image/tiff": re.compile("image/x-(adobe-dng|canon-cr2|nikon-nef|sony-arw)"),
    "video/mp4": re.compile("(audio|video)/(mp4|x-m4v|3gpp2?|quicktime)"),
    "video/webm": re.compile("audio/webm|video/x-matroska"),
    "video/x-matroska": re.compile("(audio|video)/webm"),
}

_RUNS_SCRIPTS = re.compile(r"text/html|.*[/+]xml|.*javascript")
_IS_TEXT = re.compile(
    r"text/.*|message/.*|.*[/+](xml|json|yaml|rtf|postscript|javascript)"
    r"|application/(n-|trig|vnd\.apple\.mpegurl|x-(c?sh|shar|tcl|tex|latex|troff)).*|image/x-(portable-|x[bp])\w+"
)

_BINARY_BYTE = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # as browsers have it: WHATWG, MIME Sniffing
_PROLOG = re.compile(r"(?:\s+|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)
_ROOT = re.compile(r"<(?:!doctype\s+)?([a-z][\w:.-]*)")
_IS_HTML = re.compile("html|head|body|script|iframe|h[1-6]|div|font|table|a|style|title|b|br|p|img|form|meta|link|center|span")


def sniff(head: bytes, filename: str) -> str:
    """Return the content type of a file that begins with `head`: its first few kilobytes, or all of it."""
    by_name = _BY_EXTENSION.get(os.path.splitext(filename)[1].lower())
    if by_magic := _by_magic(head):
        precise = _MORE_PRECISE.get(by_magic)
        return by_name if by_name and precise and precise.fullmatch(by_name) else by_magic
    if not head:
        return by_name or UNKNOWN
    text = _text(head)
    if text is not None:
        return _by_text(text, by_name)
    return _by_puremagic(head, by_name) or (UNKNOWN if by_name is None or _RUNS_SCRIPTS.fullmatch(by_name) else by_name)


def _by_magic(head: bytes) -> str | None:
    """Return the type of what is common, in a microsecond; puremagic takes two hundred."""
    for magic, kind in _MAGICS_BY_BYTE.get(head[0], ()) if head else ():
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo"}.get(head[8:12])
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video/webm" if b"webm" in head[:64] else "video/x-matroska"
    if head.startswith(b"BM") and head[15:18] == b"\0\0\0":
        return "image/bmp"
    return None


def _of_brands(head: bytes) -> str:
    """Return the type of an ISO base media file: by its main brand, then by those it is compatible with."""
    if kind := _BRANDS.get(head[8:12]):
        if kind != "image/heif":
            return kind
        others = head[16 : min(int.from_bytes(head[:4], "big"), 256)]
        found = {_BRANDS.get(others[index : index + 4]) for index in range(0, len(others), 4)}
        return next((kind for kind in ("image/avif", "image/heic") if kind in found), "image/heif")
    return "video/3gpp" if head.startswith(b"3gp", 8) else "video/mp4"


def _text(head: bytes) -> str | None:
    """Return it as text, in small letters; None if it is binary."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head.decode("utf-16", "replace").lower()
    if _BINARY_BYTE.search(head):
        return None
    return head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lower()


def _by_text(text: str, by_name: str | None) -> str:
    """Return the type of a text: its name's, if that is a text of this kind too."""
    kind = _markup(text)
    if by_name is None:
        return kind
    is_tagged = text.lstrip().startswith("<")
    if by_name in (_HTML, _XHTML):
        return by_name if kind != _SVG else _SVG
    if by_name == _SVG:
        return _SVG if is_tagged and kind not in (_HTML, _XHTML) else TEXT
    if _IS_TEXT.fullmatch(by_name) and (is_tagged or not by_name.endswith("xml")):
        return by_name
    return TEXT


def _markup(text: str) -> str:
    """Return the type of text by its outermost element."""
    start = _PROLOG.match(text)
    root = _ROOT.match(text, start.end() if start else 0)
    name = root[1] if root else ""
    is_xml = text.lstrip().startswith("<?xml")
    if _IS_HTML.fullmatch(name) and (name == "html" or not is_xml):
        return _XHTML if is_xml else _HTML
    if name.rpartition(":")[2] == "svg":
        return _SVG
    return _XML if is_xml else TEXT


def _by_puremagic(head: bytes, by_name: str | None) -> str | None:
    """Return what puremagic knows for certain: four bytes or more, or fewer of them if the name agrees."""
    try:
        matches = puremagic.magic_string(head)
    except puremagic.PureError:
        return None
    if by_name in {match.mime_type or _BY_EXTENSION.get(match.extension) for match in matches}:
        return by_name
    certain = (match.mime_type for match in matches if match.mime_type and match.confidence >= 0.4)
    return next((kind for kind in certain if not _RUNS_SCRIPTS.fullmatch(kind)), None)
