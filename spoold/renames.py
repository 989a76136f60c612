"""rename(2) that never overwrites, by directory descriptors."""

from __future__ import annotations

import ctypes
import errno
import os

_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def rename_noreplace(name: str, to_name: str, *, dir_fd: int, to_dir_fd: int) -> None:
    """Rename `name` in `dir_fd` to `to_name` in `to_dir_fd`, both on one filesystem.

    Raises FileExistsError if the name is taken, whatever takes it, and OSError as rename(2) does.
    Source: renameat2(2), RENAME_NOREPLACE. A filesystem that refuses the flag (EINVAL) gets link + unlink: then the file
    has two names for a moment, and a crash in between leaves both, which loses nothing.
    """
    result = _libc.renameat2(dir_fd, os.fsencode(name), to_dir_fd, os.fsencode(to_name), _RENAME_NOREPLACE)
    if result == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), name, None, to_name)
    os.link(name, to_name, src_dir_fd=dir_fd, dst_dir_fd=to_dir_fd, follow_symlinks=False)
    os.unlink(name, dir_fd=dir_fd)
