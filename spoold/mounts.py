"""Which mount a file lies on: what the device's number tells of another filesystem, and nothing of a bind mount."""

from __future__ import annotations

import ctypes
import os
import struct
import threading

_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH = 0x100, 0x800, 0x1000
_STATX_MNT_ID = 0x1000
_SIZE_BYTES, _MASK_AT, _MNT_ID_AT = 256, 0, 144
_libc = ctypes.CDLL(None, use_errno=True)
_HAS_STATX = hasattr(_libc, "statx")
_own = threading.local()  # each thread's buffer


def mount_of(fd: int, name: str = "") -> int | None:
    """Return the number of the mount that an open file lies on, or what has `name` in it; None where the kernel tells none.

    Equal numbers mean one mount only while that stands. Raises OSError as lstat does.
    Source: statx(2), stx_mnt_id; since Linux 5.8.
    """
    if not _HAS_STATX:
        return None
    answer = getattr(_own, "answer", None)
    if answer is None:
        answer = _own.answer = ctypes.create_string_buffer(_SIZE_BYTES)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH
    if _libc.statx(fd, os.fsencode(name), flags, _STATX_MNT_ID, answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    (mask,) = struct.unpack_from("I", answer, _MASK_AT)
    (number,) = struct.unpack_from("Q", answer, _MNT_ID_AT)
    return int(number) if mask & _STATX_MNT_ID else None
