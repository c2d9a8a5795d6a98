"""A read-only window on one file, handed to checks, and the run of a rule's checks through it.

It may not disturb the instrument: it opens for reading only, never locks,
never follows a link, never waits on a pipe, reads a bounded number of bytes
and keeps no descriptor open between two checks. Whatever was read belongs to
one state of the file; when that state is over, so is the verdict (`Changed`).
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from trigger_daemon import mounts
from trigger_daemon.core.model import Checked, State, Verdict
from trigger_daemon.errors import TriggerError

try:
    import fcntl
except ImportError:  # Windows has no leases
    fcntl = None  # type: ignore[assignment]

BYTES_MAX = 16 * 2**20  # a whole detector frame for its MD5; a structural check needs well below 1 MiB
READS_MAX = 20_480  # a movie of one directory a frame costs a read each; 1,000 frames are usual for EER
OPEN_MAX = 16  # descriptors on companions at once; an Eiger set may have hundreds
NEEDS_MAX = 10_000  # names a check may ask for; beyond, it has misread something
WHY_MAX = 500  # characters; a verdict is read by a person and kept in the journal

# Where every written byte has its block: a file with fewer has holes, as a writer leaves that sets the length first.
# Not btrfs and zfs, which may compress; small files may lie in their inode.
BLOCK_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs"})
HOLES_FROM_BYTES = 16 * 2**10

PathName = str | bytes | os.PathLike[str]  # a str may hold surrogate escapes

# Worst last; the verdict of a set is its worst.
ORDER = (Verdict.COMPLETE, Verdict.UNKNOWN, Verdict.SUSPECT, Verdict.INCOMPLETE)

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY"))
_NOATIME = getattr(os, "O_NOATIME", 0)  # only the owner may; everyone else gets EPERM


class TooMuch(TriggerError):
    """A check wanted more bytes or reads than its budget."""


class Changed(TriggerError):
    """The file (or a companion) is not, or no longer, in the state that was to be judged: no verdict."""


class CannotRead(OSError):
    """The file cannot be opened or read now (EACCES, sharing violation, EIO, no regular file): not yet, no verdict."""


def same(one: State, other: State) -> bool:
    """Say whether two states are equal; an inode of 0 means that the file system invents them."""
    return one[:3] == other[:3] and (one[3] == other[3] or not one[3] or not other[3])


class Probe:
    """A window on one file as it is now, `size` bytes long; it stays so long even if the file grows.

    `expected`: the state that is to be judged. The budget is for the life of
    the window. `close` may be called at any time; the next read opens again.
    Raises Changed if the file is gone or in another state, CannotRead if it
    cannot be opened or is no regular file.
    """

    def __init__(
        self,
        path: PathName,
        *,
        expected: State | None = None,
        bytes_max: int = BYTES_MAX,
        reads_max: int = READS_MAX,
    ) -> None:
        self.path = os.fsencode(path)
        self.name = os.fsdecode(os.path.basename(self.path))
        self.siblings: Sequence[int] = ()
        self.bytes_read = 0
        self.reads = 0
        self._bytes_max = bytes_max
        self._reads_max = reads_max
        self._judged = expected
        self._fd = -1
        self._open()
        self.size = self._judged[0] if self._judged else 0

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`, fewer only at the end; raise TooMuch, Changed, CannotRead."""
        if offset < 0 or length < 0:
            raise ValueError(f"read of {length} bytes at {offset}")
        length = min(length, self.size - offset)  # before anything is allocated: lengths come out of the file
        if length <= 0:
            return b""
        if self.reads >= self._reads_max:
            raise TooMuch(f"more than {self._reads_max:,} reads of {self.name}")
        if self.bytes_read + length > self._bytes_max:
            raise TooMuch(f"more than {self._bytes_max:,} bytes of {self.name}")
        self.reads += 1
        self.bytes_read += length
        if self._fd < 0:
            self._open()
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise self._refused(error) from error
            if not part:  # shorter than a moment ago; `recheck` will say so
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def holes(self) -> bool:
        """Say whether parts of the file were surely never written; False where that cannot be told."""
        if self.size < HOLES_FROM_BYTES:
            return False
        if self._fd < 0:
            self._open()
        blocks = getattr(os.fstat(self._fd), "st_blocks", None)  # of 512 bytes
        if blocks is None or blocks * 512 >= self.size:
            return False
        mount = mounts.mount_of(os.path.realpath(self.path))
        return mount is not None and mount.fstype in BLOCK_TYPES

    def writers(self) -> bool | None:
        """Say whether a program has the file open for writing; None where that cannot be told.

        By a read lease (Linux, local file systems, own files or CAP_LEASE),
        given back at once. A program that opens the file for writing within
        these microseconds waits for it, and one that opens it without
        blocking is refused.
        """
        if self._fd < 0:
            self._open()
        return _leased(self._fd, self.path)

    def state(self) -> State:
        """Return size, mtime_ns, ctime_ns and inode of the open file, now."""
        if self._fd < 0:
            self._open()
        return _state(os.fstat(self._fd))

    def recheck(self) -> None:
        """Raise Changed unless the file, and what its name stands for, is still in the state that was judged."""
        try:
            now = _state(os.lstat(self.path))
            held = _state(os.fstat(self._fd)) if self._fd >= 0 else now
        except OSError as error:
            raise self._refused(error) from error
        if self._judged is None or not (same(now, self._judged) and same(held, self._judged)):
            raise self._changed(now)

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def _open(self) -> None:
        try:
            # Looked at before it is opened: opening a pipe or a device can itself disturb its writer.
            if not stat.S_ISREG(os.lstat(self.path).st_mode):
                raise CannotRead(errno.EINVAL, "no regular file", self.path)
            try:
                self._fd = os.open(self.path, _FLAGS | _NOATIME)
            except PermissionError:
                self._fd = os.open(self.path, _FLAGS)
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise CannotRead(errno.EINVAL, "no regular file", self.path)
            if self._judged is None:
                self._judged = _state(found)
            elif not same(_state(found), self._judged):
                raise self._changed(_state(found))
        except (Changed, CannotRead):
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._refused(error) from error

    def _changed(self, now: State) -> Changed:
        before = self._judged[0] if self._judged else 0
        what = f"from {before:,} to {now[0]:,} bytes" if now[0] != before else "its times or its inode"
        return Changed(f"{self.name} changed while it was looked at ({what})")

    def _refused(self, error: OSError) -> Changed | CannotRead:
        if error.errno in _GONE:
            return Changed(f"{self.name} is gone")
        return CannotRead(error.errno or errno.EIO, error.strerror or str(error), self.path)


class Companions(Mapping[str, Probe]):
    """Windows on companions, opened when first asked for; at most OPEN_MAX descriptors at once."""

    def __init__(self, paths: Mapping[str, PathName]) -> None:
        self._paths = paths
        self._probes: dict[str, Probe] = {}
        self._handed: set[str] = set()  # since the last close: these may be open, or be opened by their next read

    def __getitem__(self, name: str) -> Probe:
        path = self._paths[name]
        if name not in self._handed and len(self._handed) >= OPEN_MAX:
            self.close()
        if name not in self._probes:
            self._probes[name] = Probe(path)
        self._handed.add(name)
        return self._probes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def read(self) -> tuple[str, ...]:
        """Return the names of those that were opened."""
        return tuple(self._probes)

    def recheck(self) -> None:
        """Raise Changed unless every companion that was opened is still in the state it was read in."""
        for probe in self._probes.values():
            probe.recheck()

    def close(self) -> None:
        """Let go of all descriptors."""
        self._handed.clear()
        for probe in self._probes.values():
            probe.close()


class Judged(NamedTuple):
    """What the checks of one file say together: the worst verdict and why, and what came with it (checks.Outcome)."""

    verdict: Verdict
    why: str
    needs: tuple[str, ...] = ()
    measures: tuple[tuple[str, int], ...] = ()  # check -> its measure
    content: str = ""
    read: tuple[str, ...] = ()  # names of the companions that were read

    def fact(self, about: tuple[int, int, str, State], at: float, scope: str) -> Checked:
        """Return what the core is told: about (rule, root, path, state), at a monotonic instant."""
        rule, root, path, state = about
        verdict, why, needs, measures, content, read = self
        return Checked(rule, root, path, state, verdict, why, at, needs, measures, content, scope, read)


def run_checks(
    path: PathName,
    expected_state: State,
    checks: Sequence[tuple[str, Mapping[str, Any]]],
    companions: Mapping[str, PathName],
    find_check: Callable[[str], Any],
    siblings: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
) -> Judged:
    """Run a file's checks and return the worst verdict, why, and the names that checks need besides.

    `siblings`: what each check measured of the last files. `path` and the
    values of `companions` are absolute; the keys of `companions` are what a
    check calls them by: names relative to the file's directory. A check that
    fails is `suspect`, and its why names the check and the error; an unknown
    name of a check likewise; one that would read beyond its budget is
    `unknown`. The first `incomplete` is
    proof and ends the run. Raises Changed (state is not `expected_state`
    before and after, for the file and every companion that was read) and
    CannotRead; both mean that there is no verdict.
    """
    others = Companions(companions)
    said: list[Judged] = []
    with Probe(path, expected=expected_state) as probe:
        try:
            for name, options in checks:
                probe.siblings = siblings.get(name, ())
                said.append(_run(name, options, probe, others, find_check))
                if said[-1].verdict is Verdict.INCOMPLETE and not said[-1].needs:
                    break
        finally:
            probe.close()
            others.close()
        probe.recheck()
        others.recheck()
    if not said:
        return Judged(Verdict.UNKNOWN, "no check is asked for")
    worst = max((one.verdict for one in said), key=ORDER.index)
    whys = dict.fromkeys(one.why for one in said if one.verdict is worst and one.why)
    return Judged(
        worst,
        "; ".join(whys)[:WHY_MAX],
        tuple(dict.fromkeys(name for one in said for name in one.needs)),
        tuple(pair for one in said for pair in one.measures),
        next((one.content for one in said if one.content), ""),
        others.read,
    )


def _run(
    name: str, options: Mapping[str, Any], probe: Probe, others: Companions, find_check: Callable[[str], Any]
) -> Judged:
    try:
        outcome = find_check(name).check(probe, options, others)
        measures = () if outcome.measure is None else ((name, int(outcome.measure)),)
        needs = _needs(outcome.needs)
        return Judged(Verdict(outcome.verdict), str(outcome.why), needs, measures, str(outcome.content))
    except (Changed, CannotRead):
        raise
    except TooMuch as error:
        return Judged(Verdict.UNKNOWN, f"check {name} gave up: {error.message}")
    except Exception as error:  # noqa: BLE001 - a mistake in somebody's check must not stop the others, nor pass a file
        return Judged(Verdict.SUSPECT, f"check {name} failed: {type(error).__name__}: {error}"[:WHY_MAX])
    finally:
        probe.close()
        others.close()


def _needs(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError("needs is to be a tuple of names")
    if len(names) > NEEDS_MAX:
        raise ValueError(f"it needs {len(names):,} files, more than {NEEDS_MAX:,}")
    for name in names:
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise ValueError(f"it needs {name!r}, which is no name below the file's directory")
    return tuple(names)


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


_SET_SIGNAL = getattr(fcntl, "F_SETSIG", 10)  # known to the module from Python 3.14 on


def _leased(fd: int, path: bytes) -> bool | None:
    """Take a read lease and give it back: refused with EAGAIN while any descriptor or map can write to the file."""
    mount = mounts.mount_of(os.path.realpath(path)) if hasattr(fcntl, "F_SETLEASE") else None
    if mount is None or mounts.remote(mount.fstype):
        return None  # other hosts' writers are not seen, and some servers refuse every lease
    try:
        # Whoever breaks the lease sends a signal: SIGIO would end this process, SIGURG is ignored by default.
        fcntl.fcntl(fd, _SET_SIGNAL, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:  # this process stood still while a writer waited, until the kernel took the lease away
        return True if error.errno == errno.EAGAIN else None
    return False
