"""The SQLite files of the state directory: their names, how values lie in them, how they are read.

The daemon writes; everybody else asks through `ask`, which leaves nothing
behind: no lock a writer would wait for, no file, no snapshot longer than one
question. Who holds the directory is told by a lock file.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import json
import os
import pwd
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trigger_daemon.errors import JournalConflict, JournalDamaged, JournalError, JournalFull, JournalIo

JOURNAL = "journal.db"
CONTROL = "control.db"
LOCK = "lock"
LAST = "journal.last"
BALLAST = "ballast"

FILE_MODE = 0o660  # group members ask and order; SQLite gives -wal and -shm the mode of their file
DIRECTORY_MODE = 0o2770

ASK_TRIES_MAX = 20  # a daemon that starts or stops meanwhile changes how its file must be read; 20 * 50 ms
ASK_PAUSE_S = 0.05
READ_BUSY_S = 2.0  # a reader waits only for another one's recovery, which takes milliseconds
LOCK_TRIES_MAX = 10  # who asks whether a daemon lives holds the lock for microseconds
LOCK_PAUSE_S = 0.02

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK_FAILED = frozenset({errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN})

T = TypeVar("T")

# ------------------------------------------------------------------------- values

_encode = json.JSONEncoder(separators=(",", ":"), default=lambda value: _plain(value)).encode

_decode = json.JSONDecoder().decode
quoted = json.encoder.encode_basestring_ascii  # a text as JSON, in C where there is C

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def _plain(value: object) -> object:
    """Let any Mapping, set or tuple-like be written as JSON."""
    if hasattr(value, "items"):
        return dict(value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def to_json(value: Any) -> str:
    """Return compact JSON in ASCII, so that names which are no UTF-8 survive as their surrogate escapes."""
    return _encode(value)


def from_json(text: str | None) -> Any:
    """Return what `to_json` was given; None for an empty column."""
    return None if text is None else _decode(text)


def to_name(name: str) -> bytes:
    """Return the bytes the file system has for a path or name."""
    return name.encode("utf-8", "surrogateescape")


def from_name(name: bytes) -> str:
    """Return a path or name as the core carries it."""
    return name.decode("utf-8", "surrogateescape")


def to_text(text: str) -> str | bytes:
    """Return what SQLite can keep of a text, exactly: bytes where it quotes a name that is no UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")
    return text


def from_text(text: str | bytes) -> str:
    """Return what `to_text` was given."""
    return text if isinstance(text, str) else from_name(text)


def to_number(number: int) -> int | bytes:
    """Return what SQLite can keep of a number, exactly: its digits beyond 64 bits (an mtime in the year 2400)."""
    return number if _INT64_MIN <= number <= _INT64_MAX else str(number).encode()


def from_number(number: int | bytes) -> int:
    """Return what `to_number` was given."""
    return int(number)


# ------------------------------------------------------------------------- faults


def fault_of(error: sqlite3.Error, path: Path) -> JournalError:
    """Return the error that tells a person, and the loop, what an SQLite error on `path` means."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _refuses_bytes(path.parent) in NO_ROOM):
        return JournalFull(f"no room for {path}", hint="free space on its file system; the work waits and goes on then")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        if kept_out := _kept_out(path):
            return JournalIo(kept_out[0], hint=kept_out[1])
        return JournalIo(f"the disk failed under {path}: {error}", hint="look at the disk and its mount (dmesg)")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalError(f"{path} is locked by another program", hint=f"`fuser -v {path}` names it; end it")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return JournalConflict(f"{path} refuses a record: {error}", hint="this is a bug; please report it")
    return JournalError(f"{path}: {error}")


def _kept_out(path: Path) -> tuple[str, str] | None:
    """Return why this user cannot write a file of the state directory, and what to do; None: the disk is to blame."""
    directory = path.parent
    try:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            hint = (
                "mount it for writing (dmesg tells what the disk has met); a service writes only where its unit lets"
                f" it: `systemctl edit trigger-daemon`, ReadWritePaths={directory}"
            )
            return f"{directory} is read-only", hint
        for file in (directory, path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            if not absent(file) and not os.access(file, os.R_OK | os.W_OK):
                owner, us = _user_of(file.stat().st_uid), _user_of(os.geteuid())
                words = f"{file} cannot be written by {us}, it is {owner}'s"
                return words, f"the daemon's user must own {directory} and all in it: chown -R USER: {directory}"
    except OSError:
        pass
    return None


def _user_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def last_batch(state_dir: Path) -> int:
    """Return the newest batch that was committed, as it was written beside the journal; 0 if nothing is."""
    try:
        return int((state_dir / LAST).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def damaged(path: Path, why: str) -> JournalIo:
    """Return the error for a journal that cannot be read; it is never replaced in silence.

    A disk that has failed shows torn pages of a journal that is sound: then the disk is to blame.
    """
    if (code := _refuses_bytes(path.parent)) in DISK_FAILED:
        words = f"the disk under {path} has failed ({os.strerror(code)}): {why}"
        return JournalIo(words, hint="look at the disk (dmesg), and mount it anew; the daemon goes on by itself then")
    hint = (
        "`trigger-daemon journal recover` sets it aside, takes over what can be read, and says what cannot be known;"
        " nothing is started before a person says `resume`. Or restore it from a backup"
    )
    return JournalDamaged(f"{path} is damaged: {why}", hint=hint)


def _refuses_bytes(directory: Path) -> int:
    """Return with which errno the disk or a quota refuses bytes, 0 if it takes them.

    SQLite calls a quota, and some full disks, an I/O error, and a disk that is gone a malformed file.
    """
    name = directory / f".room-{os.getpid()}"
    try:
        probe = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return error.errno or 0
    try:
        os.write(probe, b"\0" * 65_536)
        os.fsync(probe)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(probe)
        with suppress(OSError):
            os.unlink(name)
    return 0


def unreadable(path: Path) -> JournalError:
    """Return the error for a file of the state directory that is absent, or not for this person."""
    if os.access(path, os.R_OK):
        return JournalError(f"{path} cannot be opened")
    if absent(path):
        return JournalError(f"there is no {path}", hint="start the daemon once, or name its settings with --config")
    return JournalError(
        f"no permission to read {path}",
        hint=f"it is for members of the group {_group_of(path.parent)}: ask to be added to it, then log in again",
    )


def absent(path: Path) -> bool:
    """Say whether a file is surely not there, rather than hidden from this person."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _group_of(directory: Path) -> str:
    try:
        return grp.getgrgid(directory.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "trigger-daemon"


# ------------------------------------------------------------------------ reading


class Line:
    """A connection for many questions, of one thread: to open one takes longer than most questions."""

    def __init__(self) -> None:
        self._open: tuple[tuple[str, int], sqlite3.Connection] | None = None

    def take(self, path: Path, mode: str) -> sqlite3.Connection:
        """Return a connection to what is at `path` now."""
        try:
            key = mode, os.stat(path).st_ino
        except OSError:
            key = mode, 0  # to connect tells it
        if self._open is not None and self._open[0] != key:
            self.close()
        if self._open is None:
            self._open = key, _connect(path, mode)
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def ask(path: Path, question: Callable[[sqlite3.Connection], T], line: Line | None = None) -> T:
    """Ask one question in one read transaction, on a connection that ends with it, or on that of `line`.

    Creates and writes nothing, also when the daemon is down and its -wal and
    -shm are gone. Raises JournalError (absent, not permitted, damaged).
    """
    tries = 0
    while True:
        tries += 1
        mode = _reading_mode(path)
        try:
            answer = _ask_once(path, mode, question, line)
        except sqlite3.Error as error:
            if tries < ASK_TRIES_MAX and os.access(path, os.R_OK):
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if mode != _reading_mode(path) or code in (
                    sqlite3.SQLITE_BUSY,
                    sqlite3.SQLITE_CANTOPEN,
                    sqlite3.SQLITE_READONLY,
                    sqlite3.SQLITE_PROTOCOL,
                ):
                    time.sleep(ASK_PAUSE_S)
                    continue
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN:
                raise unreadable(path) from error
            raise fault_of(error, path) from error
        # An immutable file is read without locks. If a writer came meanwhile, what was read may be torn: ask again.
        if mode == "immutable=1" and _reading_mode(path) != mode and tries < ASK_TRIES_MAX:
            continue
        return answer


def _reading_mode(path: Path) -> str:
    """Return how the file must be opened so that reading it changes nothing."""
    try:
        wal = path.with_name(f"{path.name}-wal").stat().st_size
    except OSError:
        return "immutable=1"  # nobody has it open: a writer's first deed is to make the -wal
    if path.with_name(f"{path.name}-shm").exists():
        return "readonly_shm=1"  # SQLite would open it for writing even in mode=ro, and take a writer's lock to recover
    return "immutable=1" if wal == 0 else "cache=private"  # a -wal alone (a copied journal): SQLite must make the -shm


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&{mode}", uri=True, isolation_level=None, timeout=READ_BUSY_S)


def _ask_once(path: Path, mode: str, question: Callable[[sqlite3.Connection], T], line: Line | None) -> T:
    mine = Line() if line is None else line
    answered = False
    try:
        connection = mine.take(path, mode)
        connection.execute("BEGIN")
        answer = question(connection)
        connection.execute("COMMIT")
        answered = True
        return answer
    finally:
        if line is None or not answered:
            mine.close()


# --------------------------------------------------------------------------- lock


class Holder(NamedTuple):
    """The daemon that holds a state directory."""

    pid: int
    started: str  # RFC 3339, UTC


_held: set[int] = set()  # descriptors of locks held by this process


def _forget_locks() -> None:
    """Close them in a forked child: a lock lives until its last copy is closed, and must end with the daemon."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


class DaemonLock:
    """One daemon a state directory. A lock file left by a dead process is no obstacle."""

    def __init__(self, state_dir: Path) -> None:
        """Take the lock; raise JournalError naming who holds it."""
        path = self._path = state_dir / LOCK
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise JournalFull(f"no room for {path}", hint="free space on its file system") from error
            why, hint = _kept_out(path) or (f"cannot open {path}: {error.strerror}", "look at the disk and its mount")
            raise JournalError(why, hint=hint) from error
        for attempt in range(LOCK_TRIES_MAX):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 < LOCK_TRIES_MAX:
                    time.sleep(LOCK_PAUSE_S)
        else:
            os.close(self._fd)
            raise _in_use(state_dir)
        _held.add(self._fd)
        try:
            os.fchmod(self._fd, FILE_MODE)
            words = f"{os.getpid()} {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode()
            os.pwrite(self._fd, words, 0)
            os.ftruncate(self._fd, len(words))
        except OSError:
            pass  # a full disk: the words only inform, the lock holds without them

    def in_place(self) -> bool:
        """Say whether the lock file is still the one that is locked."""
        held, there = os.fstat(self._fd), os.stat(self._path)
        return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Give the directory up; idempotent."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)


def alive(state_dir: Path) -> bool:
    """Say whether a daemon holds the directory. Raises JournalError without the permission to look."""
    path = state_dir / LOCK
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise unreadable(path) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder(state_dir: Path) -> Holder | None:
    """Return what the lock file says of its holder; it may be a dead one, see `alive`."""
    try:
        pid, started = (state_dir / LOCK).read_text().split()
        return Holder(int(pid), started)
    except (OSError, ValueError):
        return None


def _in_use(state_dir: Path) -> JournalError:
    who = holder(state_dir)
    named = f"pid {who.pid}, started {who.started}" if who else "its pid is not known"
    stop = "Ctrl-C where `trigger-daemon serve` runs, or `systemctl stop trigger-daemon` where it is a service"
    return JournalError(
        f"another daemon ({named}) holds {state_dir}",
        hint=f"stop it first ({stop}), or give this one another state_dir",
    )
