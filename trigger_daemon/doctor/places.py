"""Look at one directory: a root, a destination, a volume. Runs in a child process, as any call here may hang.

Returns findings. The canary's name is hidden and ignored by every rule; it is
removed also when the child is told to end, and one that a killed child left is
removed by the next look.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from trigger_daemon import hints, points
from trigger_daemon.core.rules import CANARY
from trigger_daemon.core.storage import size as _size
from trigger_daemon.doctor import Finding, Level
from trigger_daemon.errors import TriggerError
from trigger_daemon.failpoints import fail_point
from trigger_daemon.mounts import LOCAL_TYPES, mount_of
from trigger_daemon.points import ABSENT

EVENT_S = 3.0  # an event that has not come by then does not come
SLOW_EVENT_S = 0.5  # usual are 2 to 5 ms
CLOCK_NOTE_S, CLOCK_WARNING_S = 2.0, 60.0  # servers are rarely better than seconds; no decision depends on it
TICK_S = 0.05  # file times are up to a tick of the kernel behind the clock
COUNT_S = 3.0  # directories are counted so long
LEFT_OVER_S = 3_600.0  # a canary so old is nobody's any more
LISTED_MAX = 100_000  # names looked through for those
INODES_FEW = 0.05  # of all: `core/storage.py` calls that low
GRAIN_NS = 1_987_654_321  # an odd second, and a digit in each decimal of it: what comes back shows the grain
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})


def root(path: str, events: str, count: bool, pid: int | None = None) -> list[Finding]:
    """Test a watched directory. `count`: tell how many directories there are to watch; `pid`: of a running daemon."""
    found, about = _standing("roots", path)
    if about is None:
        return found
    found += _served("roots", path, pid)
    fstype, remote = about
    try:
        found.append(_heard(path, "none" if remote else events, fstype))
        found += _marks("roots", path)
    except OSError as error:
        found.append(_unwritable(path, error))
    if count and not remote and events != "none":
        found.append(_directories(path))
    return found


def destination(path: str, pid: int | None = None) -> list[Finding]:
    """Test a directory that copies go to: whether it can be written, and what it makes of names and times."""
    found, about = _standing("destinations", path)
    if about is None:
        return found
    found += _served("destinations", path, pid)
    try:
        found += _marks("destinations", path)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "let the daemon's user write there" if error.errno in READ_ONLY else "make room, or look at the disk"
        found.append(Finding("destinations", path, "fault", f"cannot be written: {why}", hint))
    return found


def _served(check: str, path: str, pid: int | None) -> list[Finding]:
    """Say where the running daemon sees something else than we do: a service has mounts of its own.

    Nothing where it sees the same, or we may not look through its eyes.
    """
    if pid is None:
        return []
    try:
        ours, real = os.stat(path), os.path.realpath(path)
        if b"serve" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return []  # of another machine, as it were: numbers of processes are its own in a container
        top = os.stat(f"/proc/{pid}/root/")
    except OSError:
        return []
    try:
        theirs = os.stat(f"/proc/{pid}/root{real}")
        read_only = bool(os.statvfs(f"/proc/{pid}/root{real}").f_flag & os.ST_RDONLY)
    except FileNotFoundError:
        theirs = top
    except OSError:
        return []
    if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
        hint = "a service has a /tmp and /var/tmp of its own: take another directory; after a new mount, restart it"
        return [Finding(check, path, "fault", f"the running daemon (pid {pid}) does not see it", hint)]
    if check == "destinations" and read_only and not os.statvfs(real).f_flag & os.ST_RDONLY:
        hint = f"`systemctl edit trigger-daemon`: ReadWritePaths=-{path}; then restart it"
        return [Finding(check, path, "fault", f"is read-only for the running daemon (pid {pid})", hint)]
    return []


def space(
    path: str, reserve_bytes: int, reserve_ratio: float, low_bytes: int, low_ratio: float, book: str = ""
) -> list[Finding]:
    """Say how much is free, against the limits of the settings: an amount, or a share of the whole.

    `book` is where the daemon remembers on which mount point each volume was.
    """
    if book and (before := points.missing(path, book)):
        words = f"{before} is not mounted: what is there is another disk"
        return [Finding("space", path, "fault", words, points.hint(book))]
    now = os.statvfs(path)
    total, free = now.f_frsize * now.f_blocks, now.f_frsize * now.f_bavail
    reserve, low = reserve_bytes or reserve_ratio * total, low_bytes or low_ratio * total
    figures = {"free_bytes": free, "total_bytes": total, "free_inodes": now.f_favail, "inodes": now.f_files}
    words = f"{_size(free)} of {_size(total)} free"
    hint = "make room: `trigger-daemon storage` says what could go"
    if now.f_files and now.f_favail < INODES_FEW * now.f_files:
        level: Level = "warning"
        words = f"{now.f_favail:,} of {now.f_files:,} inodes free, {words}"
    elif free < reserve:
        words, level = f"{words}, below the reserve of {_size(reserve)}", "fault"
    elif free < low:
        words, level = f"{words}, below `low`, which is {_size(low)}", "warning"
    else:
        return [Finding("space", path, "ok", words, "", figures)]
    return [Finding("space", path, level, words, hint, figures)]


# ------------------------------------------------------------------------ the place


def _standing(check: str, path: str) -> tuple[list[Finding], tuple[str, bool] | None]:
    """Say what is there; and the type of its file system and whether that is remote, None if there is nothing."""
    try:
        seen = os.stat(path)
        real = os.path.realpath(path)
    except FileNotFoundError:
        return [Finding(check, path, "fault", "is not there", f"{ABSENT}: it is waited for, never made")], None
    except OSError as error:
        hint = "check the disk, mount or server"
        return [Finding(check, path, "fault", f"cannot be reached: {error.strerror}", hint)], None
    if not stat.S_ISDIR(seen.st_mode):
        return [Finding(check, path, "fault", "is not a directory", "correct the rule that names it")], None
    mount = mount_of(real)
    if mount is None:
        return [Finding(check, path, "note", "on a file system that cannot be told")], ("", True)
    remote = mount.fstype not in LOCAL_TYPES
    words = f"on {mount.fstype} from {mount.source}" + (", remote" if remote else "")
    figures = {"fstype": mount.fstype, "source": mount.source, "remote": remote}
    try:
        with os.scandir(path) as entries:
            next(entries, None)
    except OSError as error:
        hint = "let the daemon's user read it (r and x on all directories)"
        return [Finding(check, path, "fault", f"cannot be listed: {error.strerror}", hint, figures)], None
    return [Finding(check, path, "ok", words, "", figures)], (mount.fstype, remote)


def _unwritable(path: str, error: OSError) -> Finding:
    if error.errno in READ_ONLY:
        words = f"is read-only from here ({error.strerror}): whether events arrive, its clock and names were not tested"
        return Finding("roots", path, "note", words, "ask as a user who may write there to know; the daemon need not")
    return Finding("roots", path, "fault", f"a file cannot be made: {error.strerror}", "look at the disk and its room")


# ----------------------------------------------------------------------- the canary


@contextmanager
def _canary(directory: str) -> Iterator[tuple[str, int]]:
    """Make a canary, and remove it whatever happens. Raises OSError where that is refused."""
    name = f"{CANARY}{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}-Aa"
    path, made = os.path.join(directory, name), False
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        made = True
        try:
            fail_point("doctor.canary")
            yield path, fd
        finally:
            os.close(fd)
    finally:
        try:
            os.unlink(path)
        except OSError as error:
            if made and error.errno != errno.ENOENT:
                raise


def _tidy(directory: str, now: float) -> None:
    """Remove what killed doctors left; `now` by the clock of the server, which dated those too."""
    with suppress(OSError), os.scandir(directory) as entries:
        for number, entry in enumerate(entries):
            if number >= LISTED_MAX:
                break
            if entry.name.startswith(CANARY) and now - entry.stat(follow_symlinks=False).st_mtime > LEFT_OVER_S:
                os.unlink(entry.path)


def _heard(directory: str, events: str, fstype: str) -> Finding:
    """Say whether a canary's event arrives through the daemon's own source of hints, and how late."""
    if events == "none":
        why = f"{fstype} tells nothing of remote writers" if fstype not in LOCAL_TYPES else "the settings say so"
        with _canary(directory):
            pass
        return Finding("roots", directory, "note", f"no events ({why}): files are found by sweeps")
    by_sweeps = "until then files are found by sweeps alone, which is later, and nothing is lost"
    try:
        source = hints.open_source(cast(Any, events))
    except TriggerError as error:
        return Finding("roots", directory, "fault", error.message, error.hint)
    rung = threading.Event()
    try:
        source.open(1, os.fsencode(directory), rung.set)
        source.watch(1, b"")
        began = time.monotonic()
        with _canary(directory) as (path, _):
            late_s = _wait(source, rung, os.path.basename(path).encode(), began)
    except TriggerError as error:  # the limit of watches
        return Finding("roots", directory, "fault", error.message, error.hint)
    finally:
        source.stop()
    if late_s is None:
        hint = f"the file system or container passes none on; set `events: none`; {by_sweeps}"
        return Finding("roots", directory, "fault", f"no event of a canary came within {EVENT_S:g} s", hint)
    figures = {"event_s": round(late_s, 4), "events": source.kind}
    words = f"a canary's event came after {late_s * 1e3:.1f} ms ({source.kind})"
    if late_s > SLOW_EVENT_S:
        return Finding("roots", directory, "warning", words, "the machine is busy; ask again when it is not", figures)
    return Finding("roots", directory, "ok", words, "", figures)


def _wait(source: hints.HintSource, rung: threading.Event, name: bytes, began: float) -> float | None:
    """Return how long it took until the name was heard, None if it was not."""
    while (left := began + EVENT_S - time.monotonic()) > 0:
        rung.wait(left)
        rung.clear()
        heard = source.take(1)
        if heard is not None and name in heard.names.get(b"", {}):
            return time.monotonic() - began
    return None


# -------------------------------------------------------------- what it makes of a file


def _marks(check: str, directory: str) -> list[Finding]:
    """Say what becomes of times, inode numbers and names here. Raises OSError where nothing can be written."""
    with _canary(directory) as (path, fd):
        before = time.time()
        os.write(fd, b"canary")
        os.fsync(fd)
        written, after = os.stat(path), time.time()
        _tidy(directory, written.st_mtime)
        other_case = os.path.join(directory, os.path.basename(path).swapcase())
        folds = _is_same(other_case, written)
        second = int(written.st_mtime) | 1
        os.utime(path, ns=(written.st_mtime_ns, second * 10**9 + GRAIN_NS % 10**9))
        again_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            opened, named = os.fstat(again_fd), os.stat(path)
        finally:
            os.close(again_fd)
    found = [_clock(check, directory, written.st_mtime, before, after)]
    grain = _grain_s(second, named.st_mtime_ns)
    found.append(_grain(check, directory, grain))
    if len({written.st_ino, opened.st_ino, named.st_ino}) > 1:
        hint = "mount it with stable ones (`serverino`, `use_ino`): its files never look quiet"
        found.append(Finding(check, directory, "warning", "a file has another inode number at each look", hint))
    if folds:
        found.append(Finding(check, directory, "note", "names that differ in upper and lower case are one file here",
                             "write `case: fold` in rules that watch it" if check == "roots" else ""))  # fmt: skip
    return found


def _is_same(path: str, other: os.stat_result) -> bool:
    try:
        seen = os.lstat(path)
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino, seen.st_size) == (other.st_dev, other.st_ino, other.st_size)


def _clock(check: str, directory: str, dated: float, before: float, after: float) -> Finding:
    """Compare a file's time with ours around its writing."""
    off_s = dated - after if dated > after else min(0.0, dated + TICK_S - before)
    figures = {"clock_off_s": round(off_s, 3)}
    if abs(off_s) < CLOCK_NOTE_S:
        words = f"its clock agrees with ours to {max(abs(off_s), TICK_S):.2g} s"
        return Finding(check, directory, "ok", words, "", figures)
    side = "ahead of" if off_s > 0 else "behind"
    words = f"its clock is {abs(off_s):,.0f} s {side} this machine's"
    hint = "set the server's clock (NTP); nothing is decided by it, but `journal recover` and people compare times"
    return Finding(check, directory, "warning" if abs(off_s) >= CLOCK_WARNING_S else "note", words, hint, figures)


def _grain_s(second: int, kept_ns: int) -> float:
    """Return the grain of file times from what became of one that has a digit in every place."""
    asked = second * 10**9 + GRAIN_NS % 10**9
    for digits in range(10):
        if kept_ns == asked // 10**digits * 10**digits:
            return float(10**digits) / 1e9
    return 2.0  # whole even seconds (FAT), or anything coarser


def _grain(check: str, directory: str, grain_s: float) -> Finding:
    figures = {"mtime_grain_s": grain_s}
    if grain_s < 1.0:
        return Finding(check, directory, "ok", f"it keeps file times to {grain_s * 1e9:,.0f} ns", "", figures)
    words = f"it keeps file times to {grain_s:g} s only: a change of the same size within that is not seen"
    hint = "let `quiescence` be several times that, 10 s or more, and use checks" if check == "roots" else ""
    return Finding(check, directory, "warning" if check == "roots" else "note", words, hint, figures)


def _directories(path: str) -> Finding:
    """Count the directories to be watched, as far as that goes in COUNT_S."""
    until, count, waiting = time.monotonic() + COUNT_S, 0, [path]
    while waiting and time.monotonic() < until:
        count += 1
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    whole = not waiting
    count += len(waiting)
    words = f"{count:,} directories to watch" if whole else f"at least {count:,} directories to watch"
    return Finding("roots", path, "ok", words, "", {"directories": count, "directories_all": whole})
