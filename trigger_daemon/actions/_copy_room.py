"""Free space at the destinations: what our own writes leave free, whoever of us writes at the same time.

Before a file is begun, all its bytes are allocated, under a lock for each file
system: so nobody counts free bytes that another is about to use. Imported by
workers only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._copy_system import reserve as allocate
from trigger_daemon.core.model import RECORDS_BYTES

UNCOUNTED_BYTES = 64 * 1024  # a file up to this is not allocated: a small one costs too much
AHEAD_BYTES = 128 * 2**20  # of a program that is looked at now and then: what it writes between two looks
RETRY_S = 0.002  # between two tries to have the lock


class NoRoom(OSError):
    """The file would take free space below the reserve."""


class Rooms:
    """The locks, one file for each file system in the provider's own directory."""

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._locks: dict[int, int] = {}  # file system -> descriptor

    def take(self, fd: int, size: int, reserve: int, pace: Pace) -> bool:
        """Allocate a file's `size` bytes if `reserve` bytes stay free; tell whether it has them now.

        False: it is tiny, or its file system cannot allocate; `look` before each
        write then. Raises NoRoom, OSError, Cancelled.
        """
        if has_all(fd, size):
            return True
        if size <= UNCOUNTED_BYTES:
            return False
        with self._lock(os.fstatvfs(fd).f_fsid or os.fstat(fd).st_dev, pace):
            self.look(fd, size, reserve)
            allocate(fd, size)
        return has_all(fd, size)

    def look(self, at: int | bytes, size: int, reserve: int) -> None:
        """Raise NoRoom if `size` more bytes, and what the file system needs, would take free space below `reserve`."""
        room = os.statvfs(at)
        size = -(-size // room.f_frsize) * room.f_frsize
        if room.f_bavail * room.f_frsize - size < reserve + RECORDS_BYTES:
            raise NoRoom(errno.ENOSPC, f"it would leave less than the reserve of {_shown(reserve)} free there")

    @contextlib.contextmanager
    def hold(self, directory: bytes, size: int, reserve: int, pace: Pace) -> Iterator[Callable[[int], None] | None]:
        """Hold room for what another program writes: the bytes are allocated, to a file that ends with this process.

        Yields what gives room back once it is told how many bytes are written by now; None where the file system has
        no such files, or cannot allocate. Raises NoRoom, OSError, Cancelled.
        """
        size += AHEAD_BYTES
        try:
            fd = os.open(directory, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
        except OSError:
            yield None
            return
        try:
            with self._lock(os.fstatvfs(fd).f_fsid or os.fstat(fd).st_dev, pace):
                self.look(fd, size, reserve)
                allocate(fd, size)
            yield (lambda written: os.truncate(fd, max(0, size - written))) if has_all(fd, size) else None
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _lock(self, device: int, pace: Pace) -> Iterator[None]:
        """Hold the lock of a file system; while another holds it, that is no standstill of ours. Raises Cancelled."""
        if device not in self._locks:
            path = os.path.join(self._state_dir, f"room-{device:x}.lock")
            self._locks[device] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        fd = self._locks[device]
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pace.check()
                time.sleep(RETRY_S)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)


def has_all(fd: int, size: int) -> bool:
    """Tell whether a file of this size has all its blocks."""
    state = os.fstat(fd)
    return state.st_size >= size and state.st_blocks * 512 >= size


def _shown(size: int) -> str:
    """Return a size as the settings write it."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:g} {unit}" if size % factor == 0 else f"{size / factor:.4g} {unit}"
    return f"{size} bytes"
