"""Open what lies below a directory, past no link and no mount, in one call where the kernel has it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import struct

_OPENAT2 = 437  # the same number on every architecture
_NO_MOUNTS, _NO_MAGIC_LINKS, _NO_LINKS = 0x01, 0x02, 0x04
_HOW = struct.Struct("QQQ")  # flags, mode, resolve
_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(directory: int, path: str, flags: int) -> int | None:
    """Return a descriptor of what has this path below an open directory; None where the kernel has no such call.

    path: without ".." and not absolute, which nothing here looks at. flags: as open(2)'s.
    Raises OSError as open does: ELOOP for a link on the way, or at its end; EXDEV for a mount, of the same filesystem too.
    Source: openat2(2); since Linux 5.6.
    """
    return _openat2(directory, path, flags) if _is_there() else None


@functools.cache
def _is_there() -> bool:
    """Say whether the kernel has it, and whoever filters our calls lets it pass."""
    try:
        fd = _openat2(-100, ".", os.O_PATH | os.O_CLOEXEC)  # AT_FDCWD
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.close(fd)
    return True


def _openat2(directory: int, path: str, flags: int) -> int:
    how = _how(flags)
    fd: int = _libc.syscall(_OPENAT2, directory, os.fsencode(path), how, len(how))
    if fd < 0:
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code), path)
    return fd


@functools.cache
def _how(flags: int) -> bytes:
    return _HOW.pack(flags, 0, _NO_MOUNTS | _NO_MAGIC_LINKS | _NO_LINKS)
