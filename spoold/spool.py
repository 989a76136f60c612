"""One spool: look at it, open what is in it, and keep our own house in it. Deleting is cleanup's.

Every path is walked with directory descriptors, one component at a time, never through a link and never onto another
filesystem: nothing outside the root can be read, whatever is swapped in while we walk (FACTS 21).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from spoold.errors import BadPath, Changed, SpoolBroken, SpooldError, Vanished
from spoold.layout import Layout
from spoold.model import HOUSE, Identity, Oddity, Snapshot, SpooledFile

T = TypeVar("T")

ASIDE = "aside"
KEPT = "kept"
CANARY = "canary"
_OWNER = "owner"
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "afs")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_UNREADABLE = "the daemon's user may not read it"
_MOUNTED = "another filesystem is mounted there"


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

    # Directories and files, by descriptor

    @contextlib.contextmanager
    def directory(self, path: str) -> Iterator[int]:
        """Yield a descriptor of the directory `path` below the root ("" is the root itself).

        Raises Vanished if it is not there, or is no directory any more, or is a link or a mount; SpoolBroken if the root
        is gone or the disk fails.
        """
        fd = self._descend(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _descend(self, path: str) -> int:
        fd = self._open_root()
        try:
            device = os.fstat(fd).st_dev
            for part in filter(None, path.split("/")):
                if part == "..":
                    raise Vanished(f"open {path}: it leads out of the spool")
                inner = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
                if os.fstat(fd).st_dev != device:
                    raise Vanished(f"open {path}: {_MOUNTED}")
        except OSError as error:
            os.close(fd)
            raise fault_of(error, "open", path) from error
        except Vanished:
            os.close(fd)
            raise
        return fd

    def follow(self) -> None:
        """Find out anew where the root leads to, if it is a link: a deployment may have given it another target."""
        root = Path(os.path.realpath(self._configured))
        if root != self.root:
            self.root = root

    def root_identity(self) -> tuple[int, int]:
        """Return (st_dev, st_ino) of the root. Raises SpoolBroken if it is gone."""
        fd = self._open_root()
        try:
            status = os.fstat(fd)
            return status.st_dev, status.st_ino
        finally:
            os.close(fd)

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
        parent, name = os.path.split(file.path)
        with self.directory(parent) as directory:
            fd = open_regular(directory, name, file.path)
        try:
            if Identity.of(os.fstat(fd)) != file.identity:
                raise Changed(f"open {file.path}: it is not what was looked at")
            yield fd
        finally:
            os.close(fd)

    def identity_of(self, path: str) -> Identity | None:
        """Return the identity of the regular file at `path` now; None if there is none."""
        parent, name = os.path.split(path)
        try:
            with self.directory(parent) as directory:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except (Vanished, FileNotFoundError):
            return None
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
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise fault_of(error, "look at", where) from error
                if stat.S_ISREG(status.st_mode):
                    yield where, Identity.of(status)

    def records(self, below: str = "", *, met: Callable[[str, int], None] | None = None) -> Iterator[str | Oddity]:
        """Yield every record directory that holds a file, as a stream, and whatever else is odd; links are not followed.

        A record may be yielded more than once. met: called with path and inode of each directory that is walked.
        Raises SpoolBroken as `look` does.
        """
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
            inner = os.open(name, _DIRECTORY, dir_fd=fd)
        except OSError as error:
            raise fault_of(error, "open", path) from error
        try:
            if os.fstat(inner).st_dev != os.fstat(fd).st_dev:
                raise Vanished(_MOUNTED)
            yield inner
        finally:
            os.close(inner)

    def refusal(self, file: SpooledFile) -> str | None:
        """Say why no key can ever be made for this file, or return None."""
        place = self.layout.parse(file.path)
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

        Raises SpoolBroken if it cannot, or if the spool belongs to another ledger (contract, rule 9).
        """
        self.root_identity()
        try:
            for path in (self.house, self.house / ASIDE, self.house / KEPT):
                path.mkdir(mode=0o700, exist_ok=True)
            (self.house / CANARY).touch(mode=0o600)
            owner = self._mark(ledger_id)
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

    def _mark(self, ledger_id: str) -> str:
        """Write the owner's mark if there is none, whole or not at all, and return whose it is."""
        mark = self.house / _OWNER
        if not mark.exists():
            draft = self.house / f"{_OWNER}.{uuid.uuid4()}"  # threads of one daemon may be here at once
            with open(draft, "w") as file:
                file.write(ledger_id + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(draft, mark)
            os.unlink(draft)
        return mark.read_text().strip()

    @property
    def is_at_home(self) -> bool:
        """Our house stands, as far as one look tells."""
        return (self.house / CANARY).exists() and (self.house / ASIDE).exists()

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
        """Write to the canary: whoever watches the root must hear of it."""
        (self.house / CANARY).write_bytes(b"")

    def can_tell_writers(self) -> bool:
        """Say whether this filesystem and user can find out who has a file open for writing, by trying it on our own."""
        path = self.house / f"lease.{os.getpid()}"
        try:
            writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                seen = is_open_for_writing(reader)
                os.close(writer)
                writer = -1
                return seen is True and is_open_for_writing(reader) is False
            finally:
                for fd in (writer, reader):
                    if fd >= 0:
                        os.close(fd)
                path.unlink(missing_ok=True)
        except OSError:
            return False


def open_regular(directory: int, name: str, path: str) -> int:
    """Open a regular file in an open directory for reading, and nothing else. Raises Vanished, Changed or SpoolBroken.

    lstat first: opening a device can act on it; fstat after: the name may have been given to another file in between.
    """
    try:
        before = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(before.st_mode):
            raise Changed(f"open {path}: it is no regular file any more")
        fd = os.open(name, _FILE, dir_fd=directory)
    except OSError as error:
        raise fault_of(error, "open", path) from error
    after = os.fstat(fd)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) or not stat.S_ISREG(after.st_mode):
        os.close(fd)
        raise Changed(f"open {path}: it was replaced at that moment")
    return fd


def is_open_for_writing(fd: int) -> bool | None:
    """Say whether anybody has this file open for writing or mapped so, by any of its names; None if the kernel cannot tell.

    Takes a read lease and gives it back at once. Source: fcntl(2), "Leases"; FACTS 15. SIGIO must be ignored.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def fault_of(error: OSError, tried: str, path: str) -> SpooldError:
    """Name an OSError for what the daemon does next."""
    message = f"{tried} {path or '.'}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE):
        return Vanished(message)
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadPath(message, hint="give the daemon's user access to it, then: spoold retry")
    return SpoolBroken(message, hint="look at the disk: dmesg, df -h, df -i, mount")


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
