"""A batch in a worker that has another program transfer it: its files as they are now, and nobody else at work on it.

A file that is no longer the manifest's version is told as changed; one that was
touched while it was read is read again. Two workers of one run never work at
once: one lock is the worker's, another that of all it starts, which is given
back by the last of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trigger_daemon.actions._child import GRACE_S, end_orphans
from trigger_daemon.actions._copy_files import Trouble, at_source, printable
from trigger_daemon.actions._copy_pace import Cancelled, Pace
from trigger_daemon.actions._copy_system import write_out

SLICE_BYTES, SLICE_FILES = 20 * 10**9, 5_000  # asked about at once: nothing is said while both sides read
READ_BYTES_PER_S = 50 * 10**6  # a disk that is slower is silent for longer than it may be
LOCK_S = 0.2
NEVER = (0, 0)  # a stat of which nothing is known yet


@dataclass(frozen=True, slots=True)
class File:
    """One member. `path` is what it is called below the root and at the destination; `stat` as first looked at."""

    root: bytes
    name: str
    path: bytes
    size: int
    mtime_ns: int
    stat: tuple[int, int] = NEVER  # ctime_ns, inode

    @property
    def source(self) -> bytes:
        return self.root + b"/" + self.path


def files_of(order: Mapping[str, Any]) -> list[File]:
    """Return the members that an order names."""
    return [
        File(os.fsencode(root), path, os.fsencode(path), size, mtime_ns)
        for root, path, size, mtime_ns in order["files"]
    ]


class Sources:
    """What has become of the sources."""

    def __init__(self, pace: Pace) -> None:
        self.changed: dict[str, None] = {}
        self._pace = pace

    def standing(self, files: Sequence[File]) -> list[File]:
        """Return the files that still are the manifest's versions, as they are now; note the others as changed.

        Raises Trouble for one whose change time or inode is not what it was, Cancelled.
        """
        kept = []
        for file in files:
            self._pace.check()
            self._pace.doing = f"looking at {printable(file.source)}"
            try:
                now = os.lstat(file.source)
            except FileNotFoundError as fault:
                if not os.path.isdir(file.root):  # a mount that is away, and its files are not gone
                    raise at_source(fault, file.root) from None
                self.changed[file.name] = None
                continue
            except NotADirectoryError:
                self.changed[file.name] = None
                continue
            except OSError as fault:
                raise at_source(fault, file.source) from None
            stat = (now.st_ctime_ns, now.st_ino)
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                self.changed[file.name] = None
                continue
            if file.stat not in (NEVER, stat):
                raise touched(file)
            kept.append(replace(file, stat=stat))
        return kept


def touched(file: File) -> Trouble:
    return Trouble("transient", "file", f"{printable(file.source)} was touched while it was read",
                   "it is read again by itself", counts=False)  # fmt: skip


def strangers(where: str, count: int) -> Trouble:
    """Return what it means that other people's files stand at so many targets."""
    more = f" (and {count - 1} more)" if count > 1 else ""
    return Trouble("person", "file", f"{where}{more} stands there with another content, and is not ours",
                   "move it away, or set `if_exists: replace`, then `trigger-daemon runs retry`")  # fmt: skip


def slices(files: Sequence[File]) -> Iterator[list[File]]:
    """Yield files in portions that a far side may be silent over."""
    some: list[File] = []
    size = 0
    for file in files:
        if some and (size + file.size > SLICE_BYTES or len(some) >= SLICE_FILES):
            yield some
            some, size = [], 0
        some.append(file)
        size += file.size
    if some:
        yield some


@contextlib.contextmanager
def alone(state_dir: str, run: int, program: str, pace: Pace) -> Iterator[int]:
    """Wait for another worker at this run, and see that no program is left of one that was killed.

    Yields the lock that all programs are to keep open. Raises Cancelled.
    """
    worker = _opened(os.path.join(state_dir, f"run-{run}.worker"))
    lock = _opened(os.path.join(state_dir, f"run-{run}.{program}"))
    try:
        pace.doing = "waiting for another worker at this run"
        while not _locked(worker):
            pace.step()
            _wait(pace)
        pace.doing = f"waiting for the end of an {program} of an earlier attempt"
        until = time.monotonic() + GRACE_S
        while not _locked(lock):  # a hung one stops our steps, too
            end_orphans(lock, by_force=time.monotonic() > until)
            _wait(pace)
        pace.step()
        yield lock
    finally:
        os.close(lock)
        os.close(worker)


def carried_out(work: Callable[[], str]) -> tuple[str, dict[str, Any] | None]:
    """Do it; return the status that it comes to, and the fault of one that failed."""
    try:
        return work(), None
    except Cancelled:
        return "cancelled", None
    except Trouble as trouble:
        return "failed", trouble.fault()


def no_record(path: str, fault: OSError) -> Trouble:
    return Trouble("transient", "batch", f"cannot write to {path}: {fault.strerror or fault}",
                   "make room there, or see who may write to it", counts=False)  # fmt: skip


def _wait(pace: Pace) -> None:
    if pace.cancelled:
        raise Cancelled
    time.sleep(LOCK_S)


def written_out(path: bytes) -> None:
    """See `write_out`; who reads the file next says what cannot be read."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            write_out(fd)
        finally:
            os.close(fd)


def _opened(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)


def _locked(fd: int) -> bool:
    """Take a lock that all who inherit the descriptor hold together; false if others do."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
