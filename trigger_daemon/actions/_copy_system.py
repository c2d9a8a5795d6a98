"""System calls of the copying workers that Python does not offer, and the page cache.

Everything here is best effort unless it says that it raises: where a kernel or
a file system lacks a call, the slower or weaker way is taken and named.
Imported by workers only: nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
from collections.abc import Container, Sequence

AHEAD_FILES = 64  # sources whose pages the disk begins to write while the first of them is read
ALIGNMENT = 4096  # of O_DIRECT offsets, lengths and buffers; every disk of today takes it
O_DIRECT = getattr(os, "O_DIRECT", 0)
O_NOATIME = getattr(os, "O_NOATIME", 0)
NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "riscv64": 30}
_IOPRIO_CLASS_IDLE = 3 << 13
_PR_SET_PDEATHSIG = 1
_CACHESTAT = 451  # on every architecture
_AT_FDCWD = -100
_WRITE, _WAIT_WRITE_WAIT = 2, 7
_RENAME_NOREPLACE = 1
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

# syncfs really reaches the disk there; elsewhere (network, FUSE) each file is fsynced.
SYNCFS_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"})

_libc = ctypes.CDLL(None, use_errno=True)


def be_humble() -> None:
    """Lower CPU and I/O priority and raise the limit of open files."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc.syscall(number, 1, 0, _IOPRIO_CLASS_IDLE)
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; end at once if it has ended already."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def syncfs(fd: int) -> None:
    """Write a whole file system to its disk; raise OSError, also for writes that failed since `fd` was opened."""
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_out(fd: int) -> None:
    """Have the pages of a file written that are in memory only: what is written through a map from then on is seen.

    A page that a program has mapped gets the file a new time when it is written to for the first time since it was
    clean, and no other until it is clean again: until then a file that looks quiet is rewritten. Not in memory (tmpfs).
    """
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WAIT_WRITE_WAIT)


def begin_to_write_out(paths: Sequence[bytes]) -> None:
    """Let the disk begin with files that are written out soon: `write_out` would wait for it once for each.

    Nothing depends on it: what cannot be opened is passed over, and where the last one is on its disk already, so
    are most likely the others.
    """
    if hasattr(_libc, "sync_file_range") and paths and _may_be_dirty(paths[-1]):
        for path in paths:
            with contextlib.suppress(OSError):
                fd = _opened(path)
                _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)
                os.close(fd)


def _may_be_dirty(path: bytes) -> bool:
    """Say whether pages of a file are in memory only; yes where the kernel does not tell."""
    told, span = (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 2)(0, 0)  # all of it
    with contextlib.suppress(OSError):
        fd = _opened(path)
        is_clean = platform.system() == "Linux" and not _libc.syscall(_CACHESTAT, fd, span, told, 0) and not told[1]
        os.close(fd)
        return not is_clean
    return True


def _opened(path: bytes) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def reserve(fd: int, size: int) -> None:
    """Allocate `size` bytes; raise OSError when there is no room, do nothing where that is not supported."""
    if not hasattr(_libc, "fallocate"):
        return
    if _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(code, os.strerror(code))


def rename_new(temp: bytes, target: bytes) -> None:
    """Rename without replacing; raise FileExistsError if something has come to stand there."""
    if hasattr(_libc, "renameat2"):
        if _libc.renameat2(_AT_FDCWD, temp, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code), os.fsdecode(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(target))
    os.rename(temp, target)


def fsync_path(path: bytes, flags: int = 0) -> None:
    """Make a file or directory durable; raise OSError. A failure is never answered by a second fsync."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(path: bytes) -> None:
    """Make names in a directory durable; file systems that refuse it (some shares) write names through."""
    try:
        fsync_path(path, os.O_DIRECTORY)
    except OSError as fault:
        if fault.errno not in _NOT_SUPPORTED | {errno.EBADF}:
            raise


def aligned_buffer(size: int) -> memoryview:
    """Return memory whose address fits O_DIRECT."""
    return memoryview(mmap.mmap(-1, size))


def cached_blocks(fd: int, size: int, block: int) -> Container[int]:
    """Return which blocks of a file have a page in the page cache, without reading anything from the disk.

    The kernel tells it of files that are ours or that we may write (cachestat,
    Linux 6.5). Of others only two pages are asked for: if one is there, all
    blocks count as cached.
    """
    count = -(-size // block)
    found = set()
    told = (ctypes.c_uint64 * 5)()
    for number in range(count):
        span = (ctypes.c_uint64 * 2)(number * block, block)
        if platform.system() != "Linux" or _libc.syscall(_CACHESTAT, fd, span, told, 0) != 0:
            return range(count if _is_cached(fd, (0, size - 1)) else 0)
        if told[0]:
            found.add(number)
    return found


def _is_cached(fd: int, offsets: tuple[int, ...]) -> bool:
    """Tell whether any of these pages is in the page cache."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True  # cannot be told: then nothing is dropped
    try:
        # A page that is not there is not waited for, but the kernel begins to read it, and with it what follows.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return any(_is_page_cached(fd, offset) for offset in offsets)
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


def _is_page_cached(fd: int, offset: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def drop_cached(fd: int, offset: int = 0, length: int = 0) -> None:
    """Give page cache back; dirty pages stay."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def set_direct(fd: int, *, on: bool) -> None:
    """Switch O_DIRECT of an open file; raise OSError where it is refused."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)


class RangeLocks:
    """Locks on numbers, held by this process and given back by its end, whatever ends it.

    One byte of one local file each. A worker holds its run's number for as long
    as it can still touch the destination: also while it is dying in a hung call.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)

    def take(self, number: int, *, wait: bool = False) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)
