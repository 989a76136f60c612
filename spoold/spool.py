"""One spool: look at it, open what is in it, and keep our own house in it. Deleting is cleanup's.

Every path is walked with directory descriptors, one component at a time, never through a link and never onto another
filesystem: nothing outside the root can be read, whatever is swapped in while we walk (FACTS 21).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from spoold.beneath import open_beneath
from spoold.errors import BadPath, Changed, NoAccess, SpoolBroken, SpooldError, StillOpen, Vanished
from spoold.layout import DEEPEST, Layout
from spoold.model import HOUSE, Identity, Oddity, Snapshot, SpooledFile
from spoold.mounts import mount_of

T = TypeVar("T")

ASIDE = "aside"
KEPT = "kept"
CANARY = "canary"
_OWNER = "owner"
_LONGEST_MARK = 200
_REMEMBERED = 1024  # paths that can have a key, or cannot
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "afs")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC  # of whatever it is, without opening that
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_OWN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LEASES = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)
_UNREADABLE = "the daemon's user may not read it"
_MOUNTED = "something else is mounted there"
_TOO_DEEP = f"it lies more than {DEEPEST} directories deep"


class _Own(threading.local):
    """What each thread keeps open, by path."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.device: int | None = None  # of the root, while it is kept


class Spool:
    """A directory tree with its layout.

    name: as configured. root: may be a link (Capistrano's `current/…`); all work is done on what it points to.
    marker: name of the file in a record's directory that declares it finished, or None.
    """

    def __init__(self, *, name: str, root: Path, layout: Layout, marker: str | None = None) -> None:
        self.name = name
        self.layout = layout
        self.marker = marker
        self._configured = root
        self.root = Path(os.path.realpath(root))
        self._own = _Own()
        self._refusal_of = functools.lru_cache(_REMEMBERED)(self._refuse)

    # Directories and files, by descriptor

    @contextlib.contextmanager
    def at_hand(self, *paths: str) -> Iterator[None]:
        """Keep the root open in the block, for this thread, and these directories, as far as they are there.

        For many paths at one moment, and no longer: a filesystem with an open directory cannot be unmounted. All that is
        done with one root is done in one root, whatever takes its place meanwhile. Raises SpoolBroken if it is gone.
        """
        kept, mine = self._own.kept, []
        try:
            if "" not in kept:
                kept[""], self._own.device = self._open_root(), None
                mine.append("")
                with contextlib.suppress(OSError):
                    self._own.device = os.fstat(kept[""]).st_dev
            for path in paths:
                if path not in kept:
                    with contextlib.suppress(SpooldError):
                        kept[path] = self._descend(path)
                        mine.append(path)
            yield
        finally:
            for path in reversed(mine):
                shut(kept.pop(path))

    @contextlib.contextmanager
    def directory(self, path: str) -> Iterator[int]:
        """Yield a descriptor of the directory `path` below the root ("" is the root itself).

        Raises Vanished if it is not there, or is no directory any more, or is a link or a mount; SpoolBroken if the root
        is gone or the disk fails.
        """
        kept = self._own.kept.get(path)
        if kept is not None:
            yield kept
            return
        fd = self._descend(path)
        try:
            yield fd
        finally:
            shut(fd)

    def _descend(self, path: str) -> int:
        if not path:
            return self._open_root()
        try:
            return self._open_below(path, _DIRECTORY)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise Vanished(f"open {path}: {_MOUNTED}") from error
            raise fault_of(error, "open", path) from error

    def _open_below(self, path: str, flags: int) -> int:
        """Open what has this path below the root. Raises OSError as `open_inside` does, Vanished, SpoolBroken."""
        if ".." in path.split("/"):
            raise Vanished(f"open {path}: it leads out of the spool")
        kept = self._own.kept.get("")
        root = self._open_root() if kept is None else kept
        try:
            return open_inside(root, path, flags, device=None if kept is None else self._own.device)
        finally:
            if kept is None:
                shut(root)

    def follow(self) -> None:
        """Find out anew where the root leads to, if it is a link: a deployment may have given it another target."""
        root = Path(os.path.realpath(self._configured))
        if root != self.root:
            self.root = root

    def root_identity(self) -> tuple[int, int]:
        """Return (st_dev, st_ino) of the root now. Raises SpoolBroken if it is gone."""
        fd = self._open_root()
        try:
            status = os.fstat(fd)
            return status.st_dev, status.st_ino
        except OSError as error:
            raise SpoolBroken(f"look at root {self.root}: {error.strerror}", hint="look at the disk: dmesg") from error
        finally:
            shut(fd)

    def _open_root(self) -> int:
        try:
            return os.open(self.root, _DIRECTORY)
        except OSError as error:
            hint = {
                errno.ENOENT: f"mount or create it, or mend `root:` of spool {self.name}: mkdir -p {self.root}",
                errno.EACCES: f"give the daemon's user read, write and execute on {self.root}",
                errno.ENOTDIR: f"`root:` of spool {self.name} must be a directory",
            }.get(error.errno or 0, "look at the disk: dmesg, df, mount")
            raise SpoolBroken(f"open root {self.root}: {error.strerror}", hint=hint) from error

    @contextlib.contextmanager
    def opened(self, file: SpooledFile) -> Iterator[int]:
        """Yield a descriptor, open for reading at offset 0, of exactly the file that was looked at.

        Raises Vanished if the name is gone and Changed if it is another file now or was written since.
        """
        try:
            named = self._open_below(file.path, _NAME)
        except OSError as error:
            raise _fault_of_opening(error, file.path) from error
        fd = _reopened(named, file.path, file.identity)
        try:
            yield fd
        finally:
            shut(fd)

    def identity_of(self, path: str) -> Identity | None:
        """Return the identity of the regular file at `path` now; None if there is none."""
        parent, name = os.path.split(path)
        try:
            with self.directory(parent) as directory:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except (Vanished, FileNotFoundError):
            return None
        except OSError as error:
            raise fault_of(error, "look at", path) from error
        return Identity.of(status) if stat.S_ISREG(status.st_mode) else None

    def inode_of_directory(self, path: str) -> int | None:
        """Return the inode of the directory `path` below the root; None if it is not there, or may not be read."""
        try:
            with self.directory(path) as fd:
                return os.fstat(fd).st_ino
        except (Vanished, BadPath):
            return None

    def make_durable(self, directories: set[str]) -> None:
        """fsync the directories and everything above them up to the root, each once (FACTS 16)."""
        for path in {"/".join(parts[:n]) for parts in (d.split("/") for d in directories) for n in range(len(parts) + 1)}:
            with self.directory(path) as fd:
                os.fsync(fd)

    # Looking

    def look(self, record: str) -> Snapshot:
        """Return what lies in a record's directory now; no files if the directory is not there.

        Raises SpoolBroken if the root is gone or the disk fails.
        """
        files: list[SpooledFile] = []
        oddities: list[Oddity] = []
        markers: list[SpooledFile] = []
        attachment, record_id = "", record
        for found in self._walked(record, lambda fd, path: self._files_below(fd, path, self.layout.tail)):
            if isinstance(found, Oddity):
                oddities.append(found)
                continue
            path, identity = found
            if self.marker is not None and path == f"{record}/{self.marker}":
                markers.append(SpooledFile(path, "", "", self.marker, identity))
                continue
            place = self.layout.parse(path)
            if place is None or place.record != record:
                oddities.append(Oddity(path, "it does not fit the spool's layout"))
                continue
            attachment, record_id = place.attachment, place.record_id
            files.append(SpooledFile(path, place.style, place.basename, place.filename, identity))
        files.sort(key=lambda file: file.path)
        hides = any(oddity.reason in (_UNREADABLE, _MOUNTED) for oddity in oddities)
        marker = markers[0] if markers else None
        return Snapshot(record, attachment, record_id, tuple(files), marker, tuple(oddities), hides)

    def _files_below(self, fd: int, path: str, depth: int) -> Iterator[tuple[str, Identity] | Oddity]:
        """Yield each regular file at most `depth` levels below, and whatever else is odd there."""
        here = _place_of(fd)
        for entry, where in self._entries(fd, path):
            if isinstance(entry, Oddity):
                yield entry
            elif entry.is_dir(follow_symlinks=False):
                if depth <= 1:
                    yield Oddity(where, "it lies deeper than the spool's layout")
                    continue
                try:
                    with self._inner(fd, entry.name, where) as inner:
                        yield from self._files_below(inner, where, depth - 1)
                except BadPath:
                    yield Oddity(where, _UNREADABLE)
                except Vanished as why:
                    if os.path.lexists(self.root / where):
                        yield Oddity(where, str(why))
            else:
                try:
                    status = entry.stat(follow_symlinks=False)
                    is_mount = (status.st_dev, mount_of(fd, entry.name)) != here
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise fault_of(error, "look at", where) from error
                if not stat.S_ISREG(status.st_mode):
                    continue
                if is_mount:
                    yield Oddity(where, _MOUNTED)
                else:
                    yield where, Identity.of(status)

    def records(self, below: str = "", *, met: Callable[[str, int], None] | None = None) -> Iterator[str | Oddity]:
        """Yield every record directory that holds a file, as a stream, and whatever else is odd; links are not followed.

        A record may be yielded more than once. met: called with path and inode of each directory that is walked.
        Raises SpoolBroken as `look` does.
        """
        if self.layout.may_lead_to_record(below):  # else it is odd, and told by whoever sweeps what lies above
            yield from self._walked(below, lambda fd, path: self._records(fd, path, met))

    def _walked(self, path: str, walk: Callable[[int, str], Iterator[T | Oddity]]) -> Iterator[T | Oddity]:
        """Yield what `walk` finds in a directory: nothing if it is not there, an Oddity if it may not be read."""
        try:
            with self.directory(path) as fd:
                yield from walk(fd, path)
        except Vanished as why:
            if str(why).endswith(_MOUNTED):
                yield Oddity(path, _MOUNTED)
        except BadPath:
            yield Oddity(path, _UNREADABLE)

    def _records(self, fd: int, path: str, met: Callable[[str, int], None] | None) -> Iterator[str | Oddity]:
        if met is not None:
            met(path, os.fstat(fd).st_ino)
        last: list[str] = []
        for entry, where in self._entries(fd, path):
            if isinstance(entry, Oddity):
                yield entry
            elif entry.is_dir(follow_symlinks=False):
                if where == HOUSE:
                    continue
                if not self.layout.may_lead_to_record(where):
                    yield Oddity(where, "no file below it could fit the spool's layout")
                    continue
                if where.count("/") >= DEEPEST:  # each level keeps a descriptor open while what is below it is swept
                    yield Oddity(where, _TOO_DEEP)
                    continue
                try:
                    with self._inner(fd, entry.name, where) as inner:
                        yield from self._records(inner, where, met)
                except BadPath:
                    yield Oddity(where, _UNREADABLE)
                except Vanished as why:
                    if os.path.lexists(self.root / where):
                        yield Oddity(where, str(why))
            else:
                touched = self.layout.records_touched_by(where, is_directory=False)
                if not touched:
                    yield Oddity(where, "it does not fit the spool's layout")
                elif touched != last:
                    yield from touched
                    last = touched

    def _entries(self, fd: int, path: str) -> Iterator[tuple[os.DirEntry[str] | Oddity, str]]:
        """Yield what a directory holds, with each path; what must never be opened comes as an Oddity."""
        try:
            entries = list(os.scandir(fd))
        except OSError as error:
            raise fault_of(error, "list", path) from error
        for entry in entries:
            where = f"{path}/{entry.name}" if path else entry.name
            if reason := _why_odd(entry):
                yield Oddity(where, reason), where
            else:
                yield entry, where

    @contextlib.contextmanager
    def _inner(self, fd: int, name: str, path: str) -> Iterator[int]:
        """Yield a descriptor of a directory inside another; Vanished as in `directory`, BadPath if it may not be read."""
        try:
            inner = open_inside(fd, name, _DIRECTORY)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise Vanished(_MOUNTED) from error
            raise fault_of(error, "open", path) from error
        try:
            yield inner
        finally:
            shut(inner)

    def refusal(self, file: SpooledFile) -> str | None:
        """Say why no key can ever be made for this file, or return None."""
        return self._refusal_of(file.path)

    def _refuse(self, path: str) -> str | None:
        place = self.layout.parse(path)
        if place is None:
            return "it does not fit the spool's layout"
        try:
            self.layout.key(place, fingerprint="0" * 32 if self.layout.needs_fingerprint else None)
        except BadPath as error:
            return str(error)
        return None

    # Our own house

    @property
    def house(self) -> Path:
        return self.root / HOUSE

    def move_in(self, ledger_id: str) -> None:
        """Make `.spoold/` with all it needs, and mark the spool as this ledger's.

        What stands there must be ours alone: who may write into the root may have put a link there, and we may be root.
        Raises SpoolBroken if it cannot, or if the spool belongs to another ledger (contract, rule 9).
        """
        try:
            with self._own_house() as house:
                for name in (ASIDE, KEPT):
                    with self._own_directory(house, name, self.house / name):
                        pass
                os.close(self._own_file(house, CANARY, os.O_WRONLY | os.O_CREAT))
                owner = self._mark(house, ledger_id)
        except OSError as error:
            raise SpoolBroken(
                f"write into {self.house}: {error.strerror}",
                hint=f"the daemon's user needs read, write and execute on {self.root}",
            ) from error
        if owner != ledger_id:
            raise SpoolBroken(
                f"spool {self.name} at {self.root} belongs to ledger {owner}, this is ledger {ledger_id}",
                hint=f"point `ledger:` or `state_dir:` at the ledger that knows this spool; if that one is lost for good and "
                f"{self.house / ASIDE} is empty, remove {self.house / _OWNER}",
            )

    def house_mark(self) -> str:
        """Return what tells our house in this root from one in any other; it stays the same when a disk is mounted again."""
        try:
            return f"{os.stat(self.house).st_ino}:{os.stat(self.house / _OWNER).st_mtime_ns}"
        except OSError as error:
            raise SpoolBroken(f"look at {self.house}: {error.strerror}") from error

    @contextlib.contextmanager
    def _own_house(self) -> Iterator[int]:
        root = self._open_root()
        try:
            with self._own_directory(root, HOUSE, self.house) as house:
                yield house
        finally:
            os.close(root)

    @contextlib.contextmanager
    def _own_directory(self, parent: int, name: str, path: Path) -> Iterator[int]:
        """Yield a descriptor of a directory that is nobody's but ours; made if it is not there, private if it was not."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _planted(path, "it is a link, or no directory") from error
            raise
        try:
            if _place_of(fd) != _place_of(parent):
                raise _planted(path, _MOUNTED)
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() and status.st_uid != self._uid_of_what_we_make(fd):
                raise _planted(path, f"it belongs to user {status.st_uid}, and the daemon runs as user {os.geteuid()}")
            if stat.S_IMODE(status.st_mode) & 0o077:
                with contextlib.suppress(OSError):  # there are filesystems without modes
                    os.fchmod(fd, 0o700)
            yield fd
        finally:
            os.close(fd)

    def _own_file(self, house: int, name: str, flags: int) -> int:
        """Open a regular file of our house. Raises SpoolBroken if it is anything else."""
        try:
            fd = os.open(name, flags | _OWN, 0o600, dir_fd=house)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _planted(self.house / name, "it is no regular file") from error
            raise
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise _planted(self.house / name, "it is no regular file")

    @staticmethod
    def _uid_of_what_we_make(directory: int) -> int | None:
        """Return whose a file is that we make here: where a server or a mount's options decide that, not who we are."""
        name = f"whose.{uuid.uuid4()}"
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OWN, 0o600, dir_fd=directory)
        except OSError:
            return None
        try:
            os.unlink(name, dir_fd=directory)
            return os.fstat(fd).st_uid
        finally:
            os.close(fd)

    def _mark(self, house: int, ledger_id: str) -> str:
        """Write the owner's mark if there is none, whole or not at all, and return whose it is."""
        try:
            mark = self._own_file(house, _OWNER, os.O_RDONLY)
        except FileNotFoundError:
            draft = f"{_OWNER}.{uuid.uuid4()}"  # threads of one daemon may be here at once
            try:
                with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OWN, 0o600, dir_fd=house), "w") as file:
                    file.write(ledger_id + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(draft, _OWNER, src_dir_fd=house, dst_dir_fd=house, follow_symlinks=False)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft, dir_fd=house)
            mark = self._own_file(house, _OWNER, os.O_RDONLY)
        with open(mark, "rb") as file:
            return file.read(_LONGEST_MARK).decode("utf-8", "backslashreplace").strip()

    @property
    def is_at_home(self) -> bool:
        """Our house stands, as far as one look tells."""
        kinds = {CANARY: stat.S_ISREG, ASIDE: stat.S_ISDIR, KEPT: stat.S_ISDIR}
        try:
            with self.directory(HOUSE) as house:
                return all(is_kind(os.lstat(name, dir_fd=house).st_mode) for name, is_kind in kinds.items())
        except (OSError, SpooldError):
            return False

    def network_filesystem(self) -> str | None:
        """Return the kind of network filesystem that the root lies on, where other machines' changes make no events."""
        device = os.stat(self.root).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            kind = rest.split(" ", 1)[0]
            if fields.split(" ")[2] == number and kind.startswith(_NETWORK):
                return kind
        return None

    def sing(self) -> None:
        """Write to the canary: whoever watches the root must hear of it. Raises OSError or SpooldError if it cannot."""
        with self.directory(HOUSE) as house:
            fd = self._own_file(house, CANARY, os.O_WRONLY | os.O_CREAT)
            try:
                os.utime(fd)  # its closing is the event; nothing is cut off, whatever file this may be
            finally:
                os.close(fd)

    def can_tell_writers(self) -> bool:
        """Say whether this filesystem and user can find out who has a file open for writing, by trying it on our own."""
        name = f"lease.{uuid.uuid4()}"
        try:
            with self.directory(HOUSE) as house, contextlib.ExitStack() as made:
                with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OWN, 0o600, dir_fd=house), "wb"):
                    made.callback(os.unlink, name, dir_fd=house)
                    reader = made.enter_context(open(os.open(name, os.O_RDONLY | _OWN, dir_fd=house), "rb")).fileno()
                    seen = is_open_for_writing(reader)
                return seen is True and is_open_for_writing(reader) is False
        except (OSError, SpooldError):
            return False


def names_kept(root: Path) -> list[str]:
    """Return what lies in `.spoold/kept/` of a root and waits for a person; nothing if we may not look, or it is not ours."""
    fd = -1
    try:
        fd = os.open(os.path.realpath(root), _DIRECTORY)
        for name in (HOUSE, KEPT):
            outer, fd = fd, os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(outer)
        return sorted(os.listdir(fd))
    except OSError:
        return []
    finally:
        if fd >= 0:
            os.close(fd)


def open_inside(directory: int, path: str, flags: int, *, device: int | None = None) -> int:
    """Open what has this path below an open directory, past no link; path: without "..". device: the directory's, if known.

    Raises OSError as open does; with EXDEV if something else is mounted there or on the way, or it is another filesystem.
    """
    fd = open_beneath(directory, path, flags)
    if fd is None:
        return _open_step_by_step(directory, path, flags)
    try:
        if os.fstat(fd).st_dev != (device or os.fstat(directory).st_dev):  # a subvolume is no mount
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    except OSError:
        shut(fd)
        raise
    return fd


def _open_step_by_step(directory: int, path: str, flags: int) -> int:
    """Do what `open_inside` does for a kernel that has no call for it: open each directory on the way."""
    here = _place_of(directory)
    *way, last = filter(None, path.split("/"))
    fd = directory
    for part, how in (*((part, _DIRECTORY) for part in way), (last, flags)):
        try:
            inner = os.open(part, how, dir_fd=fd)
        finally:
            if fd != directory:
                shut(fd)
        fd = inner
        try:
            if _place_of(fd) != here:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        except OSError:
            shut(fd)
            raise
    return fd


def open_regular(directory: int, name: str, path: str) -> int:
    """Open a regular file in an open directory for reading, and nothing else. Raises Vanished, Changed, BadPath, StillOpen.

    First a descriptor that only names it: what is looked at then is what is opened, whatever gets its name meanwhile.
    Opening a device can act on it, opening a FIFO wakes who waits at its other end.
    """
    try:
        named = open_inside(directory, name, _NAME)
    except OSError as error:
        raise _fault_of_opening(error, path) from error
    return _reopened(named, path)


def _reopened(named: int, path: str, identity: Identity | None = None) -> int:
    """Open what a descriptor names for reading, if it is a regular file, and this one; shut the descriptor."""
    try:
        status = os.fstat(named)
        if not stat.S_ISREG(status.st_mode):
            raise Changed(f"open {path}: it is no regular file any more")
        fd = os.open(f"/proc/self/fd/{named}", _FILE)
    except OSError as error:
        raise fault_of(error, "open", path) from error
    finally:
        shut(named)
    if identity is not None and Identity.of(status) != identity:
        shut(fd)
        raise Changed(f"open {path}: it is not what was looked at")
    return fd


def _fault_of_opening(error: OSError, path: str) -> SpooldError:
    return Changed(f"open {path}: {_MOUNTED}") if error.errno == errno.EXDEV else fault_of(error, "open", path)


def begin_to_write_out(fd: int) -> None:
    """Have the kernel begin to write out a file, so that its fsync finds little left to do.

    If that is begun for all files of a record first, one of three costs a disk 4.6 flushes instead of 6, on ext4 as on xfs
    (tests/bench/test_sync_cost.py). It is no promise: what is durable is so by fsync. Source: sync_file_range(2).
    """
    _libc.sync_file_range(fd, ctypes.c_longlong(0), ctypes.c_longlong(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def is_open_for_writing(fd: int) -> bool | None:
    """Say whether anybody has this file open for writing or mapped so, by any of its names; None if the kernel cannot tell.

    Takes a read lease and gives it back at once. Raises OSError where that went wrong for another reason.
    Source: fcntl(2), "Leases"; FACTS 15. SIGIO must be ignored.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LEASES:
            return None
        raise  # out of memory, interrupted: it could not tell this once
    with contextlib.suppress(OSError):  # closing gives it back too
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def shut(fd: int) -> None:
    """Close a descriptor that was only read from: it is closed whatever close says, and that tells nothing of the data."""
    try:  # noqa: SIM105  # contextlib.suppress takes three times as long, and this runs a hundred times for each record
        os.close(fd)
    except OSError:
        pass


def fault_of(error: OSError, tried: str, path: str) -> SpooldError:
    """Name an OSError for what the daemon does next."""
    message = f"{tried} {path or '.'}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENAMETOOLONG):
        return Vanished(message)
    if error.errno == errno.EAGAIN:  # what is opened without waiting only says so for a lease
        return StillOpen(f"{tried} {path}: somebody holds a lease on it, as file servers do for who may write")
    if error.errno in (errno.EACCES, errno.EPERM):
        immutable = ", or take from it that it is immutable (lsattr, chattr -i)" if error.errno == errno.EPERM else ""
        return NoAccess(message, hint=f"give the daemon's user access to it{immutable}, then: spoold retry")
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return BadPath(f"{message}: {_MOUNTED}", hint="unmount it, then: spoold retry")
    return SpoolBroken(message, hint="look at the disk: dmesg, df -h, df -i, mount")


def _place_of(fd: int) -> tuple[int, int | None]:
    """Return filesystem and mount of an open file: what lies elsewhere is none of the spool's."""
    return os.fstat(fd).st_dev, mount_of(fd)


def _planted(path: Path, what: str) -> SpoolBroken:
    return SpoolBroken(
        f"move into {path}: {what}",
        hint="find out who put it there, save what is yours in it, and move it away: the daemon makes its own",
    )


def _why_odd(entry: os.DirEntry[str]) -> str | None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "its name is no UTF-8"
    if entry.is_symlink():
        return "it is a symbolic link"
    if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
        return None
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError:
        return None
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}
    return f"it is {kinds.get(stat.S_IFMT(mode), 'no regular file')}"
