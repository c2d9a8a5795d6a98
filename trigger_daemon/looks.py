"""What the disk says: open, list and lstat below a root, without following links.

The leaves of every look and sweep, and the only code that touches a watched
tree. Nothing here keeps a descriptor: each call closes what it opened, so that
an unmount is never refused because of us. Only regular files become rows.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from stat import S_IFDIR, S_IFREG

from trigger_daemon.core.model import State

CHUNK_MAX = 1_000  # names between two readings of the clock that go out as one fact
CHUNK_S = 0.05  # and the time after which a chunk ends early: the pair must stay tight
CLOCK_EVERY = 50  # names between two glances at the clock
FEW = 3  # up to here lstat by path is cheaper than opening the directory

# The name is not there.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
# The server, the mount or the device is in trouble: nothing is said about the file.
TROUBLE = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ENODEV", "ENXIO", "EREMOTEIO",
        "ENETDOWN", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET", "ESHUTDOWN", "ENOLINK",
    )
    if hasattr(errno, name)
)  # fmt: skip

_BY_DESCRIPTOR = os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@dataclass(slots=True)
class Listing:
    """The names of one directory, split by kind, and what the directory was just before."""

    mtime_ns: int
    inode: int
    device: int
    files: list[str]  # everything that is no directory, links and pipes too
    dirs: list[str]


@dataclass(slots=True)
class Looked:
    """One chunk of looks. `began` is read before its first lstat, `ended` after its last."""

    began: float
    ended: float
    rows: list[tuple[str, State]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # not there, or no regular file
    dirs: list[str] = field(default_factory=list)
    failed: list[tuple[str, int]] = field(default_factory=list)  # name, errno

    def refused(self, name: str, error: OSError) -> None:
        """Note a name whose lstat failed."""
        code = error.errno or errno.EIO
        if code in ABSENT:
            self.absent.append(name)
        else:
            self.failed.append((name, code))


def open_below(root: str, directory: str, *, known: bool, read: bool) -> int:
    """Open a directory below a root; the caller closes it.

    The root itself may be a link, nothing below it is followed. `known`: a
    walk has already reached it without links, so its path may be opened in
    one call. A path beyond PATH_MAX is walked name by name. Raises OSError
    (ENOTDIR or ELOOP for a link).
    """
    flags = _READ if read else _SEARCH
    if not directory:
        return os.open(root, flags)
    if known:
        try:
            return os.open(f"{root}/{directory}", flags | _NO_LINK)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
    at = os.open(root, _SEARCH)
    *above, last = directory.split("/")
    try:
        for name in above:
            deeper = os.open(name, _SEARCH | _NO_LINK, dir_fd=at)
            os.close(at)
            at = deeper
        return os.open(last, flags | _NO_LINK, dir_fd=at)
    finally:
        os.close(at)


def list_directory(root: str, directory: str, *, counting: int = -1) -> Listing:
    """List a directory reached by a walk. Raises OSError.

    `counting`: a device whose file system counts a directory's directories in
    its links, so that with two of them (its own name and `.`) it holds none.
    """
    if not _BY_DESCRIPTOR:  # Windows
        path = f"{root}/{directory}" if directory else root
        return _listing(os.stat(path), path)
    descriptor = open_below(root, directory, known=True, read=True)
    try:
        return _listing(os.fstat(descriptor), descriptor, counting)
    finally:
        os.close(descriptor)


def _listing(before: os.stat_result, where: int | str, counting: int = -1) -> Listing:
    if before.st_nlink == 2 and before.st_dev == counting:
        return Listing(before.st_mtime_ns, before.st_ino, before.st_dev, os.listdir(where), [])
    files: list[str] = []
    dirs: list[str] = []
    with os.scandir(where) as entries:
        for entry in entries:
            (dirs if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
    return Listing(before.st_mtime_ns, before.st_ino, before.st_dev, files, dirs)


def stat_directory(root: str, directory: str) -> os.stat_result:
    """Return the state of a directory itself, not following a link. Raises OSError."""
    if not directory:
        return os.stat(root)
    try:
        return os.lstat(f"{root}/{directory}")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    descriptor = open_below(root, directory, known=True, read=False)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def look(
    root: str, directory: str, names: Sequence[str], monotonic: Callable[[], float], *, known: bool
) -> list[Looked]:
    """Look at at most CHUNK_MAX names of one directory; never raises OSError, every name is in the answer."""
    path = f"{root}/{directory}/" if directory else f"{root}/"
    began = monotonic()
    if (known and len(names) <= FEW and len(path) < 2_000) or not _BY_DESCRIPTOR:
        return _look(None, path, names, monotonic)
    try:
        descriptor = open_below(root, directory, known=known, read=False)
    except OSError as error:
        answer = Looked(began, monotonic())
        code = error.errno or errno.EIO
        if code in ABSENT or code == errno.ELOOP:
            answer.absent.extend(names)
        else:
            answer.failed.extend((name, code) for name in names)
        return [answer]
    try:
        return _look(descriptor, "", names, monotonic)
    finally:
        os.close(descriptor)


def _look(at: int | None, prefix: str, names: Sequence[str], monotonic: Callable[[], float]) -> list[Looked]:
    """The hot loop: one lstat and two tuples a name."""
    stat = os.stat
    chunks: list[Looked] = []
    chunk = Looked(monotonic(), 0.0)
    add = chunk.rows.append
    last = len(names)
    for start in range(0, last, CLOCK_EVERY):
        for name in names[start : start + CLOCK_EVERY]:
            try:
                seen = stat(prefix + name if prefix else name, dir_fd=at, follow_symlinks=False)
            except OSError as error:
                chunk.refused(name, error)
                continue
            if seen.st_mode & 0o170000 == S_IFREG:
                add((name, (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)))
                continue
            chunk.absent.append(name)
            if seen.st_mode & 0o170000 == S_IFDIR:
                chunk.dirs.append(name)
        now = monotonic()
        chunk.ended = now
        if now - chunk.began > CHUNK_S and start + CLOCK_EVERY < last:
            chunks.append(chunk)
            chunk = Looked(now, now)
            add = chunk.rows.append
    chunks.append(chunk)
    return chunks
