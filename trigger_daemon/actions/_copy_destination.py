"""One `to` of a copy, as a worker meets it: whether it is there, on which disk, and the directories below it."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from trigger_daemon import points
from trigger_daemon.actions._copy_files import Trouble, at_destination, printable
from trigger_daemon.actions._copy_system import SYNCFS_TYPES, RangeLocks
from trigger_daemon.mounts import mount_of

LOCK_HOMES = (1 << 62) - 1  # a number above those of runs
IN_MEMORY = frozenset({"tmpfs", "ramfs"})

Homes = dict[bytes, str]  # path -> type of its file system; void when anything is mounted or unmounted


@dataclass(slots=True)
class Destination:
    """`trouble` once something is wrong with all of it: it is then left alone."""

    index: int
    path: bytes
    static: bytes  # must exist; only what is below is ever created
    reserve: int = 0  # bytes that our writes leave free there
    trouble: Trouble | None = None
    whole_sync: bool = False  # syncfs reaches the disk
    in_memory: bool = False
    direct: bool = True  # O_DIRECT was not refused yet
    sync_fd: int = -1
    homes: tuple[tuple[bytes, int, int], ...] = ()  # directories of it, device and inode as it was opened

    def open(self, homes: Homes, locks: RangeLocks, state_dir: str) -> None:
        """Look whether it is there, and on the mount it was always on; note the trouble if not."""
        try:
            self.sync_fd = os.open(self.static, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if self.path != self.static:
                with contextlib.suppress(FileNotFoundError):  # it may lie on another file system than its static part
                    own = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    os.close(self.sync_fd)
                    self.sync_fd = own
            seen = [(path, os.stat(path)) for path in {self.static, self.path} if os.path.isdir(path)]
            self.homes = tuple((path, found.st_dev, found.st_ino) for path, found in seen)
            if self.path not in homes:
                homes[self.path] = self._check_home(locks, os.path.join(state_dir, "destinations.json"))
            self.whole_sync = homes[self.path] in SYNCFS_TYPES
            self.in_memory = homes[self.path] in IN_MEMORY
            self.direct = not self.in_memory
        except FileNotFoundError:
            self.trouble = Trouble("transient", "destination", f"{printable(self.static)} is not there",
                                   f"{points.ABSENT}; the copy goes on by itself", counts=False)
        except Trouble as trouble:
            self.trouble = trouble
        except OSError as fault:
            self.trouble = at_destination(fault, "open", self.static)

    def check(self) -> None:
        """Raise OSError if it is not what was opened: its mount has gone, and what lies beneath is another disk."""
        for path, device, inode in self.homes:
            now = os.stat(path)
            if (now.st_dev, now.st_ino) != (device, inode):
                raise OSError(errno.ENODEV, f"{printable(path)} is another directory now: its mount has gone, or come")

    def _check_home(self, locks: RangeLocks, book: str) -> str:
        """Return the file system's type; raise Trouble when the mount that was here is missing.

        An empty mount point looks like an empty destination, and would fill the
        wrong disk. So the mount of each destination is remembered.
        """
        path = os.fsdecode(os.path.realpath(self.path))
        mount = mount_of(path)
        if mount is None:
            return ""
        name = os.fsdecode(self.static)
        locks.take(LOCK_HOMES, wait=True)
        try:
            known = points.read(book)
            before = known.get(name, "")
            if points.gone(path, before, mount.mountpoint):
                raise Trouble(
                    "transient", "destination", f"{before} is not mounted, and {printable(self.static)} was on it",
                    points.hint(book), counts=False,
                )  # fmt: skip
            if before != mount.mountpoint:
                points.write(book, known | {name: mount.mountpoint})
        finally:
            locks.give(LOCK_HOMES)
        return mount.fstype

    def make_directory(self, directory: bytes) -> set[bytes]:
        """Create a directory below the static part; return those in which names are new. Raises OSError."""
        missing = []
        fresh = set()
        here = directory
        while True:
            if len(here) <= len(self.static):
                if os.path.isdir(self.static):
                    break
                raise FileNotFoundError(errno.ENOENT, "the destination is gone", os.fsdecode(self.static))
            try:
                os.mkdir(here)
            except FileExistsError:
                break
            except FileNotFoundError:
                missing.append(here)
                here = here.rpartition(b"/")[0]
            else:
                fresh.add(here.rpartition(b"/")[0])
                break
        for here in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(here)
            fresh.add(here.rpartition(b"/")[0])
        return fresh
