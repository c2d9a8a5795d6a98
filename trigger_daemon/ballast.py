"""The ballast: room on the journal's disk that is kept for the day when it is full, and given up then.

On a full disk nothing could be recorded, not even the end of what is under way.
The ballast makes that room. It is a file of random bytes where a file system
would compress or not reserve others, and it is made again when there is room.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from trigger_daemon.database import BALLAST, FILE_MODE
from trigger_daemon.failpoints import fail_point

BYTES = 64 * 2**20  # some hundred thousand transitions, and a -wal beside the journal
SHARE = 20  # at most so great a part (1/20) of a small disk
ROOM = 3  # times its size must be free before it is made: it is no reason for a full disk
CHUNK_BYTES = 2**20


class Ballast:
    """The file `ballast` in the state directory. One thread at a time."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / BALLAST
        self._new = state_dir / f"{BALLAST}.new"

    def __bool__(self) -> bool:
        try:
            return self._path.stat().st_size > 0
        except OSError:
            return False

    def keep(self) -> bool:
        """Make the file if it is not there and there is room for it; say whether it is there. Never raises."""
        if self:
            return True
        try:
            disk = os.statvfs(self._path.parent)
            size = min(BYTES, disk.f_blocks * disk.f_frsize // SHARE)
            if disk.f_bavail * disk.f_frsize < ROOM * size:
                return False
            self._make(size)
        except OSError:
            with suppress(OSError):
                self._new.unlink()
        return bool(self)

    def _make(self, size: int) -> None:
        fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
            if os.fstat(fd).st_blocks * 512 < size:  # a file system that only promises
                for at in range(0, size, CHUNK_BYTES):
                    os.pwrite(fd, os.urandom(min(CHUNK_BYTES, size - at)), at)
                os.fsync(fd)
        finally:
            os.close(fd)
        fail_point("ballast.made")
        self._new.rename(self._path)

    def give_up(self) -> bool:
        """Free its room; say whether there was any. Never raises."""
        with suppress(OSError):
            self._new.unlink()  # of a making that was killed
        if not self:
            return False
        with suppress(OSError):
            os.truncate(self._path, 0)  # where a full file system refuses to remove, it may let go of the bytes
        fail_point("ballast.give_up")
        with suppress(OSError):
            self._path.unlink()
        return True
