"""The journal: what was decided, durable before anything is done about it.

One SQLite file on a local disk, written by one daemon, one commit for each
round of its loop. A commit that returned survives a power cut; one that failed
left nothing. Nobody else writes here, and no reader, not even a stopped one,
delays a commit.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import operator
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from trigger_daemon import __version__
from trigger_daemon.ballast import Ballast
from trigger_daemon.core.model import (
    CLAIM_REWRITE_IGNORED,
    RELEASED,
    RIDER,
    AlarmAcked,
    AlarmCleared,
    AlarmRaised,
    AttemptChanged,
    AttemptMade,
    BaselineSet,
    BatchClosed,
    Claimed,
    ClaimsCarried,
    Effect,
    Forgotten,
    GroupForgotten,
    GroupSet,
    Kept,
    Member,
    Ordered,
    ProofKept,
    ReclaimFile,
    ReclaimIntended,
    ReclaimMoved,
    ReclaimSet,
    Released,
    Renewed,
    RulesAccepted,
    RunMoved,
    RunState,
    join,
    split,
)
from trigger_daemon.core.saved import Count, OpenRun, Saved, SavedAlarm, SavedAttempt, SavedMark, SavedReclaim
from trigger_daemon.database import (
    DIRECTORY_MODE,
    FILE_MODE,
    JOURNAL,
    LAST,
    DaemonLock,
    damaged,
    fault_of,
    from_json,
    from_name,
    from_number,
    from_text,
    last_batch,
    quoted,
    to_json,
    to_name,
    to_number,
    to_text,
)
from trigger_daemon.errors import JournalConflict, JournalDamaged, JournalError, JournalFull, JournalIo
from trigger_daemon.failpoints import fail_point
from trigger_daemon.mounts import mount_of, remote
from trigger_daemon.reader import Reader, faults_of, members_of, texts_of

__all__ = [
    "ClaimReader", "Claims", "Journal", "JournalConflict", "JournalError", "JournalFull", "JournalIo", "Reader",
    "RootIdentity", "migrate",
]  # fmt: skip

APPLICATION_ID = 0x54524744  # "TRGD": tells our file from any other SQLite file
SCHEMA = 3  # PRAGMA user_version of journal.sql

# Step i takes a journal of schema i + 1 to i + 2, all steps in one transaction.
MIGRATIONS: tuple[str, ...] = (
    """
    ALTER TABLE proof ADD COLUMN witnessed REAL NOT NULL DEFAULT 0;
    CREATE TABLE reclaim (
        id INTEGER PRIMARY KEY, rule INTEGER NOT NULL, run INTEGER NOT NULL, state TEXT NOT NULL, because TEXT NOT NULL,
        bytes INTEGER NOT NULL, proofs TEXT NOT NULL, made_time REAL NOT NULL, changed_time REAL NOT NULL
    );
    CREATE INDEX reclaim_open ON reclaim (id) WHERE state IN ('intended', 'confirmed');
    CREATE INDEX reclaim_ended ON reclaim (changed_time);
    CREATE TABLE reclaim_file (
        root INTEGER NOT NULL, path BLOB NOT NULL, reclaim INTEGER NOT NULL REFERENCES reclaim, number INTEGER NOT NULL,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
        hidden BLOB NOT NULL, place TEXT NOT NULL DEFAULT '', PRIMARY KEY (root, path, reclaim)
    ) WITHOUT ROWID;
    CREATE INDEX reclaim_file_set ON reclaim_file (reclaim, number);
    CREATE TABLE sole (target INTEGER NOT NULL, reclaim INTEGER NOT NULL, PRIMARY KEY (target, reclaim)) WITHOUT ROWID;
    CREATE INDEX sole_reclaim ON sole (reclaim);
    """,
    """
    CREATE INDEX batch_rule ON batch (rule);
    """,
)

WITNESS = "journal.made"
_HOME, _BACKUP = "journal.home", "journal.backup"  # kept by the journal itself

WRITE_BUSY_S = 5.0  # only a person with sqlite3 can hold the write lock; he gets this long
CHECKPOINT_PAGES = 4_000  # 16 MiB of -wal: a checkpoint costs two syncs, so not after each few commits
CHECKPOINT_PAGES_NO_ROOM = 50  # or a -wal that grows to 16 MiB first would soon eat what the ballast has left
WAL_KEPT_BYTES = 64 * 2**20  # what a -wal that a stopped reader made grow is cut back to
CACHE_KIB = 8_192
DIRS_CACHED_MAX = 20_000  # directories in use at once; some 200 bytes each
NAMES_AT_ONCE = 100  # in one statement; sqlite3 keeps 128 statements prepared, so one for each count
DIRECTORIES_PAGE = 1_000  # directories read in one transaction, so that no snapshot lasts
RUNS_PAGE = 1_000  # runs read in one transaction
THIN_LOOKS_MAX = 100_000  # files of spared batches that are looked for in one transaction, some 0.3 s
RULE_SETS_KEPT = 50  # by thinning; the newest is in force, the others are for people

T = TypeVar("T")

def one_spelling(to: str, letters: Callable[[str], str] = str.lower) -> str:
    """Return a copy's place with its collection in small letters: a UUID may be spelled in any way."""
    scheme, mark, rest = to.partition("://")
    if not mark or "/" in scheme:
        return to
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{letters(host)}{slash}{path}"


def target_key(to: str) -> int:
    """Return what a copy's place is known by: 64 bits of a hash."""
    return _key(one_spelling(to))


def _key(to: str) -> int:
    return int.from_bytes(hashlib.sha256(to.encode("utf-8", "surrogateescape")).digest()[:8], "big", signed=True)


_ENDED_WELL = (
    "SELECT batch.id, captures, iif(captures = '{}', request, NULL), request IS NULL,"
    " final AND state IN ('SUCCEEDED', 'VERIFIED')"
    " FROM batch INDEXED BY batch_rule JOIN run ON run.id = batch.id"
    " WHERE batch.rule = ? AND batch.id < ? ORDER BY batch.id DESC LIMIT ?"
)

# What claims one directory has: name -> [(rule, size, mtime_ns, batch)]
Claims = dict[str, list[tuple[int, int, int, int]]]


_MEMBER = operator.attrgetter("root", "dir", "name", "size", "mtime_ns", "role", "flag", "content")


class ClaimedAs(Protocol):
    """A file version, as a request names it: the root is absolute."""

    @property
    def root(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class RootIdentity(NamedTuple):
    """What was known of a root's file system when it was last accepted."""

    device: int
    inode: int
    fstype: str
    source: str


class Journal:
    """The daemon's own end of the journal. Any thread may call it; `append` waits for the disk."""

    def __init__(self, state_dir: Path, lock: DaemonLock) -> None:
        """Use `Journal.open`."""
        self.state_dir = state_dir
        self.path = state_dir / JOURNAL
        self._daemon_lock = lock
        self._writing = threading.Lock()
        self._reading = threading.Lock()  # readers of manifests do not wait for a commit
        self._dirs: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._broken = False
        self._closed = False
        self._thinned_to = (0.0, 0)  # closing time and number of the last run that thinning has looked at
        self._ballast = Ballast(state_dir)
        self.ballast_given_up = False  # the disk was full, and has no room for it yet
        self._last = _open_last(state_dir)
        try:
            self._connect()
        except BaseException:
            self._last.close()
            raise

    @classmethod
    def open(cls, state_dir: Path, *, make: bool = True) -> Journal:
        """Lock the directory, make or migrate the journal, and open it.

        Without `make` a missing directory is an error: a daemon that has run
        does not begin anew by itself, no more than where the witness of a
        journal lies without one.

        Raises JournalError: another daemon holds it, it lies on a network or
        FUSE file system, it is damaged, or a newer version wrote it.
        """
        state_dir = Path(os.path.realpath(state_dir))
        _refuse_remote(state_dir)
        try:
            if not state_dir.is_dir() and make:
                state_dir.mkdir(parents=True)
                state_dir.chmod(DIRECTORY_MODE)
        except OSError as error:
            raise JournalError(
                f"cannot make {state_dir}: {error.strerror}",
                hint="make it, owned by the daemon's user and group trigger-daemon, mode 2770",
            ) from error
        lock = DaemonLock(state_dir)
        try:
            if not make and not (state_dir / JOURNAL).exists():
                raise JournalIo(
                    f"{state_dir / JOURNAL} is gone, though this daemon had opened it",
                    hint=f"is the disk of {state_dir} mounted? It is looked for again; nothing is begun anew meanwhile",
                )
            _create(state_dir)
            return cls(state_dir, lock)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """Close the file and give the directory up; idempotent."""
        with self._reading, self._writing:
            if not self._closed:
                self._fold()
                self._disconnect()
                self._last.close()
                self._closed = True
        self._daemon_lock.release()

    def _fold(self) -> None:
        """Take the -wal into the file, so that whoever copies or moves the file alone has all of it."""
        try:
            self._write.execute("PRAGMA busy_timeout = 500")
            self._write.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error:
            pass  # a bad disk, or a reader that stands still: all is in the -wal, and the next opening finds it

    def in_place(self) -> bool:
        """Say whether the file and the lock are still the ones that were opened: nobody removed or replaced them."""
        try:
            return os.stat(self.path).st_ino == self._inode and self._daemon_lock.in_place()
        except OSError:
            return False

    def reopen(self) -> None:
        """Open the file anew after an I/O error; only `load` tells whether the failed transaction is in it.

        The error may have come after the commit was written and before it was
        surely on the disk. Raises JournalError while the disk is still bad.
        """
        with self._reading, self._writing:
            self._disconnect()
            self._connect()
            if self.ballast_given_up:
                self._checkpoint_each(CHECKPOINT_PAGES_NO_ROOM)

    # ----------------------------------------------------------------- writing

    def append(self, records: Sequence[Effect]) -> None:
        """Write records in one transaction, on the disk when this returns; nothing of a failed one stays.

        Raises JournalFull (try the same rows again when there is room),
        JournalError with `io` (then `reopen`, `load`), JournalConflict (a
        version claimed twice, a transition from a state the run is not in).
        """
        if not records:
            return
        with self._writing:
            self._transact(lambda writer: writer.write(records))
            newest = max((record.batch for record in records if isinstance(record, BatchClosed)), default=0)
            if newest:
                # Unsynced, as it need only outlive this process: it tells a -wal that was cut or taken away.
                with suppress(OSError):
                    os.pwrite(self._last.fileno(), b"%020d\n" % newest, 0)

    def rule_ids(self, names: Iterable[str]) -> dict[str, int]:
        """Return the number each rule name has for ever, giving new ones out."""
        wanted = list(names)
        with self._writing:
            return self._transact(lambda writer: writer.rule_ids(wanted))

    def root_id(self, path: str) -> int:
        """Return the number a watched directory has for ever."""
        with self._writing:
            return self._transact(lambda writer: writer.root_id(to_name(path)))

    def set_root_identity(self, root: int, identity: RootIdentity) -> None:
        """Keep what an accepted root's file system looked like."""
        row = (to_number(identity.device), to_number(identity.inode), identity.fstype, to_text(identity.source), root)
        change = "UPDATE root SET device = ?, inode = ?, fstype = ?, source = ? WHERE id = ?"
        with self._writing:
            self._transact(lambda writer: writer.one(change, *row))

    def thin(self, before_utc: float, limit: int, spared: Collection[int] = ()) -> int:
        """Take manifest, request, attempts, transitions and proof from at most `limit` runs final before then.

        Their numbers and claims stay. Old cleared alarms, orders, rule sets
        and reclaims go as well. Runs of `spared` rules stay whole as long as
        their files are there: without the proof, reclaim could never take
        those. Returns how many were thinned, `limit` if there is more to look
        at: call again then.
        """
        with self._writing:
            thinned, self._thinned_to = self._transact(
                lambda writer: writer.thin(before_utc, limit, frozenset(spared), self._thinned_to)
            )
            return thinned

    # ----------------------------------------------------------------- reading

    def keep_ballast(self) -> None:
        """Make the ballast, again if it was given up and there is room for it."""
        with self._writing:
            if self._ballast.keep():
                self.ballast_given_up = False
                self._checkpoint_each(CHECKPOINT_PAGES)

    def load(self) -> Saved:
        """Return what the engine restores, in one snapshot; done work and manifests are not read."""
        with self._reading:
            try:
                self._read.execute("BEGIN")
                try:
                    return _load(self._read)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise damaged(self.path, f"it holds what nobody wrote: {error}") from error
                finally:
                    self._read.execute("ROLLBACK")
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def manifest(self, batch: int) -> tuple[Member, ...]:
        """Return a batch's members; raise JournalError if it is unknown or was thinned."""
        return members_of(self._column("SELECT manifest FROM batch WHERE id = ?", batch, "manifest"))

    def request(self, batch: int) -> Mapping[str, object]:
        """Return the request a batch was closed with; raise JournalError if it is unknown or was thinned."""
        request: Mapping[str, object] = from_json(
            self._column("SELECT request FROM batch WHERE id = ?", batch, "request")
        )
        return request

    def requests_after(self, batch: int, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the next batches that have not been thinned, by number, with their requests."""
        rows = self._rows(
            "SELECT id, request FROM batch WHERE id > ? AND request IS NOT NULL ORDER BY id LIMIT ?", (batch, limit)
        )
        return [(id, from_json(request)) for id, request in rows]

    def ended_well(self, rule: int, most: int) -> tuple[list[tuple[int, dict[str, str]]], int]:
        """Return a rule's runs that ended well, of each group the newest, with their captures; the newest first.

        Read page by page, so that no snapshot lasts; only that rule's are read, and no more after `most` groups. And
        how many there are whose captures were thinned: a run of one file has them in its request alone.
        """
        newest: dict[str, tuple[int, dict[str, str]]] = {}
        lost, before = 0, 2**62
        while len(newest) < most:
            rows = self._rows(_ENDED_WELL, (rule, before, RUNS_PAGE))
            for id, group, request, thinned, well in rows:
                if well:
                    captures = from_json(group) if request is None else from_json(request)["captures"]
                    lost += bool(thinned) and not captures
                    newest.setdefault(to_json(sorted(captures.items())), (id, captures))
            if len(rows) < RUNS_PAGE:
                break
            before = rows[-1][0]
        return list(newest.values()), lost

    def taken_as(self, dir: str, name: str, since_time: float) -> list[tuple[int, str, str, int, int]]:
        """Return who has taken a file of this path below any root, and has begun to send it since a time (UTC).

        Each with its batch, root, path, size and mtime_ns; a thinned batch is not among them.
        """
        rows = self._rows(
            "SELECT claim.batch, root.path, claim.size, claim.mtime_ns FROM root JOIN dir ON dir.root = root.id"
            " JOIN claim ON claim.dir = dir.id JOIN batch ON batch.id = claim.batch"
            " WHERE dir.path = ? AND claim.name = ? AND batch.request IS NOT NULL"
            " AND EXISTS (SELECT 1 FROM attempt WHERE attempt.run = claim.batch AND made_time >= ?)",
            (to_name(dir), to_name(name), since_time),
        )
        path = join(dir, name)
        return [(batch, from_name(root), path, size, from_number(mtime_ns)) for batch, root, size, mtime_ns in rows]

    def has_sole_copies(self) -> bool:
        """Say whether any copy is all that is left of a file, or may be."""
        return bool(self._rows("SELECT 1 FROM sole UNION SELECT 1 FROM kept WHERE key = ? LIMIT 1", (_BACKUP,)))

    def sole_copies(self, names: Collection[str]) -> dict[str, frozenset[tuple[int, int]]]:
        """Return what was deleted here and has its copy at a target: path -> its versions, size and mtime_ns.

        `names`: all that the target is known by.
        """
        found: dict[str, frozenset[tuple[int, int]]] = {}
        # Also in capitals, as an earlier version may have kept it.
        keys = {_key(one_spelling(name, letters)) for name in names for letters in (str.lower, str.upper)}
        with self._reading:
            try:
                for id, proofs in self._read.execute(
                    "SELECT DISTINCT id, proofs FROM sole JOIN reclaim ON id = sole.reclaim"
                    f" WHERE target IN ({','.join('?' * len(keys))})",
                    tuple(keys),
                ).fetchall():
                    for path in _copied_to(from_json(proofs), names):
                        found[path] = found.get(path, frozenset()) | self._versions_gone(id, path)
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error
        return found

    def doubted(self, file: ClaimedAs, rules: Collection[int]) -> frozenset[tuple[int, int]]:
        """Return earlier versions of a file that may have been deleted here, unknown to a journal from a backup.

        `rules`: those whose proof lets files go. What they proved before the backup was made may be gone since.
        """
        found = self._rows("SELECT value FROM kept WHERE key = ?", (_BACKUP,))
        if not found:
            return frozenset()
        directory, name = split(file.path)
        numbers = [number for rule in rules for number in (rule, RIDER + rule)]
        rows = self._rows(
            "SELECT size, mtime_ns FROM claim JOIN dir ON dir.id = claim.dir JOIN root ON root.id = dir.root"
            " JOIN run ON run.id = claim.batch WHERE root.path = ? AND dir.path = ? AND claim.name = ?"
            f" AND claim.batch <= ? AND run.state = 'VERIFIED' AND claim.rule IN ({','.join('?' * len(numbers))})",
            (to_name(file.root), to_name(directory), to_name(name), from_json(found[0][0]), *numbers),
        )
        versions = ((size, from_number(mtime_ns)) for size, mtime_ns in rows)
        return frozenset(version for version in versions if version != (file.size, file.mtime_ns))

    def _versions_gone(self, reclaim: int, whole: str) -> frozenset[tuple[int, int]]:
        rows = self._read.execute(
            "SELECT root.path, file.path, size, mtime_ns FROM reclaim_file AS file JOIN root ON root.id = file.root"
            " WHERE reclaim = ?", (reclaim,),
        )  # fmt: skip
        return frozenset(
            (size, from_number(mtime_ns)) for root, path, size, mtime_ns in rows
            if f"{from_name(root).rstrip('/')}/{from_name(path)}" == whole
        )  # fmt: skip

    def attempt(self, run: int) -> SavedAttempt | None:
        """Return a run's last attempt, None before the first."""
        rows = self._rows(
            "SELECT attempt, prepared, handle, made_time, ended_time, outcome FROM attempt WHERE run = ?"
            " ORDER BY attempt DESC LIMIT 1",
            (run,),
        )
        return _attempt(rows[0]) if rows else None

    def root_identity(self, root: int) -> RootIdentity | None:
        """Return what an accepted root's file system looked like, None before it was first accepted."""
        rows = self._rows("SELECT device, inode, fstype, source FROM root WHERE id = ?", (root,))
        if not rows or rows[0][0] is None:
            return None
        device, inode, fstype, source = rows[0]
        return RootIdentity(from_number(device), from_number(inode), fstype, from_text(source))

    def check(self) -> list[str]:
        """Return what is wrong with the journal, in words; reads all of it."""
        with self._reading:
            try:
                return faults_of(self._read)
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def wal_bytes(self) -> int:
        """Return the size of the -wal; it grows without end only while a reader stands still in a snapshot."""
        try:
            return self.path.with_name(f"{JOURNAL}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    # ------------------------------------------------------------------ inside

    def _connect(self) -> None:
        unclean = self.wal_bytes() > 0
        self._write, version = _open_for_writing(self.path)
        try:
            _refuse_damage(self._write, self.path, unclean=unclean)
            _refuse_loss(self._write, self.path)
        except sqlite3.Error as error:
            self._write.close()
            raise fault_of(error, self.path) from error
        except JournalError:
            self._write.close()
            raise
        try:
            if version < SCHEMA:
                migrate(self._write, MIGRATIONS)
            last = self._write.execute("SELECT version FROM program ORDER BY id DESC LIMIT 1").fetchone()
            if last != (__version__,):
                self._write.execute("INSERT INTO program (version, time) VALUES (?, ?)", (__version__, time.time()))
            self._note_home()
            self._read = _open_for_reading(self.path)
        except JournalDamaged:
            self._write.close()
            raise
        except sqlite3.Error as error:
            self._write.close()
            raise fault_of(error, self.path) from error
        self._inode = os.stat(self.path).st_ino
        self._broken = False

    def _note_home(self) -> None:
        """Note up to which batch this is a backup's: a file that is put back has a new ctime, whoever does it.

        What was deleted after the backup was made is unknown here. A whole file system that is set back is not noticed.
        """
        try:
            seen = os.stat(self.path.with_name(WITNESS)).st_ctime_ns
        except OSError:
            return
        known = self._write.execute("SELECT value FROM kept WHERE key = ?", (_HOME,)).fetchone()
        try:
            if known is not None and from_json(known[0]) == seen:
                return
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"it holds what nobody wrote: {error}") from error
        put = "INSERT OR REPLACE INTO kept (key, value) VALUES (?, ?)"
        self._write.execute("BEGIN IMMEDIATE")
        self._write.execute(put, (_HOME, to_json(seen)))
        if known is not None:
            (newest,) = self._write.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()
            self._write.execute(put, (_BACKUP, to_json(newest)))
        self._write.execute("COMMIT")

    def _disconnect(self) -> None:
        self._dirs.clear()
        self._broken = True
        for connection in (self._read, self._write):
            try:
                connection.close()
            except sqlite3.Error:
                pass  # a bad disk; what was committed is in the -wal, and the next opening finds it

    def _transact(self, work: Callable[[_Writer], T]) -> T:
        """Run `work` on a writer in one transaction, again if a full disk refuses it and the ballast makes room.

        The caller holds the lock.
        """
        try:
            return self._transact_once(work)
        except JournalFull:
            self._checkpoint_each(CHECKPOINT_PAGES_NO_ROOM)  # also where a start found no room for a ballast
            if not self._ballast.give_up():
                raise
            self.ballast_given_up = True
            return self._transact_once(work)

    def _checkpoint_each(self, pages: int) -> None:
        with suppress(sqlite3.Error):  # told by the transaction
            self._write.execute(f"PRAGMA wal_autocheckpoint = {pages}")

    def _transact_once(self, work: Callable[[_Writer], T]) -> T:
        if self._broken:
            raise JournalIo(f"{self.path} has failed and was not reopened")
        committed = False
        try:
            self._write.execute("BEGIN IMMEDIATE")
            writer = _Writer(self._write, self._dirs)
            answer = work(writer)
            writer.flush()
            fail_point("journal.commit")
            self._write.execute("COMMIT")
            committed = True
            fail_point("journal.committed")
            return answer
        except sqlite3.Error as error:
            raise self._failed(fault_of(error, self.path)) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise self._failed((JournalFull if full else JournalIo)(f"{self.path}: {error.strerror}")) from error
        finally:
            if not committed:
                self._roll_back()

    def _failed(self, fault: JournalError) -> JournalError:
        self._broken = fault.io
        return fault

    def _roll_back(self) -> None:
        self._dirs.clear()  # some were numbered in the transaction that is no more
        try:
            if self._write.in_transaction:
                self._write.execute("ROLLBACK")
        except sqlite3.Error:
            self._broken = True

    def _rows(self, question: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._reading:
            try:
                return self._read.execute(question, values).fetchall()
            except sqlite3.Error as error:
                raise fault_of(error, self.path) from error

    def _column(self, question: str, batch: int, what: str) -> str:
        rows = self._rows(question, (batch,))
        if not rows:
            raise JournalError(f"the journal has no batch {batch}")
        if rows[0][0] is None:
            raise JournalError(f"the {what} of batch {batch} was thinned", hint="`keep_done` says how long it is kept")
        return str(rows[0][0])


class ClaimReader:
    """What was claimed, directory by directory, for a scanner's worker. Read-only; one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the journal file (`Journal.path`) of a running daemon; raise JournalError if that fails."""
        self._path = path
        self._as_of: int | None = None  # within `together`
        try:
            self._read = _open_for_reading(path)
        except sqlite3.Error as error:
            raise fault_of(error, path) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Answer what is asked inside from one snapshot: three statements fewer for each. To be left soon."""
        try:
            self._read.execute("BEGIN")
            (self._as_of,) = self._read.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()
            yield
        except sqlite3.Error as error:
            raise fault_of(error, self._path) from error
        finally:
            self._as_of = None
            if self._read.in_transaction:
                self._read.execute("ROLLBACK")

    def directory(self, root: int, dir: str) -> tuple[int, Claims]:
        """Return the newest batch whose claims were seen, and the claims of every name of the directory."""
        return self._claims(root, dir, None)

    def names(self, root: int, dir: str, names: Sequence[str]) -> tuple[int, Claims]:
        """Return the same for some names only; those without a claim do not appear."""
        return self._claims(root, dir, names)

    def directories(self, root: int) -> Iterator[str]:
        """Yield the directories of a root that hold claims, in byte order; no snapshot is kept between pages."""
        last: bytes | None = None
        while True:
            page = self._page(root, last)
            yield from (from_name(path) for (path,) in page)
            if len(page) < DIRECTORIES_PAGE:
                return
            last = page[-1][0]

    def close(self) -> None:
        """Close the file; idempotent."""
        self._read.close()

    def _claims(self, root: int, dir: str, names: Sequence[str] | None) -> tuple[int, Claims]:
        if self._as_of is None:
            with self.together():
                return self._claims(root, dir, names)
        read, as_of = self._read, self._as_of
        try:
            rows = _claim_rows(read, (root, to_name(dir)), names)
        except sqlite3.Error as error:
            raise fault_of(error, self._path) from error
        claims: Claims = {}
        for name, rule, size, mtime_ns, batch in rows:
            claims.setdefault(from_name(name), []).append((rule, size, from_number(mtime_ns), batch))
        return as_of, claims

    def _page(self, root: int, last: bytes | None) -> list[tuple[bytes]]:
        try:
            return self._read.execute(
                "SELECT path FROM dir WHERE root = ? AND (?2 IS NULL OR path > ?2) ORDER BY path LIMIT ?3",
                (root, last, DIRECTORIES_PAGE),
            ).fetchall()
        except sqlite3.Error as error:
            raise fault_of(error, self._path) from error


def _claim_rows(
    read: sqlite3.Connection, place: tuple[int, bytes], names: Sequence[str] | None
) -> list[tuple[Any, ...]]:
    if names is None:
        return read.execute(_CLAIMS, place).fetchall()
    rows: list[tuple[Any, ...]] = []
    wanted = [to_name(name) for name in names]
    for start in range(0, len(wanted), NAMES_AT_ONCE):
        chunk = wanted[start : start + NAMES_AT_ONCE]
        rows += read.execute(_claims_of(len(chunk)), (*place, *chunk)).fetchall()
    return rows


_CLAIMS = (
    "SELECT name, rule, size, mtime_ns, batch FROM claim WHERE dir = (SELECT id FROM dir WHERE root = ? AND path = ?)"
)


@functools.cache
def _claims_of(names: int) -> str:
    return f"{_CLAIMS} AND name IN ({','.join('?' * names)})"


# ------------------------------------------------------------------------- opening


def _refuse_remote(state_dir: Path) -> None:
    mount = mount_of(state_dir)
    if mount and remote(mount.fstype):
        raise JournalError(
            f"{state_dir} lies on {mount.fstype} ({mount.source}): a journal there could be lost or read torn",
            hint="set state_dir to a directory on a local disk (ext4, xfs, btrfs)",
        )


def _create(state_dir: Path) -> None:
    """Make an empty journal if there is none. It appears whole or not at all, so a short file is always damage."""
    path = state_dir / JOURNAL
    witness = state_dir / WITNESS
    if path.exists():
        _witness(witness)
        return
    if witness.exists():
        raise JournalDamaged(
            f"{path} is gone, though there was one ({WITNESS} lies beside it)",
            hint="restore it from a backup; or `trigger-daemon journal recover`, which starts nothing twice",
        )
    wal = path.with_name(f"{JOURNAL}-wal")
    if wal.exists() and wal.stat().st_size:
        raise damaged(path, f"{wal.name} is there without it")
    new = path.with_name(f"{JOURNAL}.new")
    try:
        for old in (new, new.with_name(f"{new.name}-journal"), new.with_name(f"{new.name}-wal")):
            old.unlink(missing_ok=True)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE))
        new.chmod(FILE_MODE)
        connection = sqlite3.connect(new, isolation_level=None)
        try:
            make_tables(connection)
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()
        fail_point("journal.new")
        new.rename(path)
        fail_point("journal.placed")
        _witness(witness)
        fail_point("journal.witnessed")
        sync_directory(state_dir)
    except sqlite3.Error as error:
        raise fault_of(error, new) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (JournalFull if full else JournalError)(f"cannot make {path}: {error.strerror}") from error


def make_tables(connection: sqlite3.Connection) -> None:
    """Make an empty journal of an empty SQLite file."""
    schema = resources.files("trigger_daemon").joinpath("journal.sql").read_text(encoding="utf-8")
    connection.executescript(f"BEGIN; {schema}; COMMIT;")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _witness(path: Path) -> None:
    """Leave word that there is a journal, for the day when there is none."""
    if path.exists():
        return
    try:
        path.write_text("A journal was made beside this file. While it is here, a missing journal is an error.\n")
        path.chmod(FILE_MODE)
    except OSError:
        pass  # a full disk; the next start leaves it


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_for_writing(path: Path) -> tuple[sqlite3.Connection, int]:
    """Return a connection and the journal's schema; raise JournalError for a file that is not ours or not whole."""
    try:
        if path.stat().st_size == 0:
            raise damaged(path, "it is empty")
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=WRITE_BUSY_S, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise fault_of(error, path) from error
    except OSError as error:
        raise JournalIo(f"cannot open {path}: {error.strerror}", hint="look at the disk and its mount") from error
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        _recognise(connection, path, version)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # NORMAL loses commits at a power cut, after the world was told
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")  # passive: waits for no reader
        connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("PRAGMA temp_store = MEMORY")
    except sqlite3.Error as error:
        connection.close()
        raise fault_of(error, path) from error
    except JournalError:
        connection.close()
        raise
    return connection, int(version)


def _open_last(state_dir: Path) -> io.FileIO:
    path = state_dir / LAST
    try:
        file = io.FileIO(path, "r+" if path.exists() else "x+")
        if os.fstat(file.fileno()).st_size == 0:
            os.fchmod(file.fileno(), FILE_MODE)
            os.pwrite(file.fileno(), b"%020d\n" % 0, 0)
        return file
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (JournalFull if full else JournalIo)(f"cannot open {path}: {error.strerror}") from error


def _refuse_loss(connection: sqlite3.Connection, path: Path) -> None:
    """Raise JournalDamaged if batches are missing that were committed: SQLite ends a damaged -wal in silence."""
    known = max(connection.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()[0], _floor(connection))
    if (last := last_batch(path.parent)) > known:
        raise damaged(path, f"batches up to {last} were made, and it ends at {known}: is its -wal damaged, or gone?")


def _refuse_damage(connection: sqlite3.Connection, path: Path, *, unclean: bool) -> None:
    """Raise JournalDamaged for a file whose pages, after a crash, do not hang together.

    A claim on a damaged page is not seen, and its file would be sent twice.
    """
    if not unclean:
        return
    try:
        words = [words for (words,) in connection.execute("PRAGMA quick_check(1)") if words != "ok"]
    except sqlite3.Error as error:
        raise fault_of(error, path) from error
    if words:
        raise damaged(path, words[0].replace("\n", " "))


def _recognise(connection: sqlite3.Connection, path: Path, version: int) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise damaged(path, "it is an SQLite file, but not a journal of this program")
    if version > SCHEMA:
        try:
            written = connection.execute("SELECT version FROM program ORDER BY id DESC LIMIT 1").fetchone()
        except sqlite3.Error:
            written = None
        needed = f"version {written[0]} or newer" if written else "the newer version"
        raise JournalError(
            f"{path} has schema {version}; this version ({__version__}) knows schemas up to {SCHEMA}",
            hint=f"install trigger-daemon {needed}, which wrote it",
        )
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    missing = {"batch", "claim", "dir", "program", "rule", "root", "run"} - tables
    if missing:
        raise damaged(path, f"it lacks the tables {', '.join(sorted(missing))}")


def _open_for_reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=WRITE_BUSY_S, check_same_thread=False
    )


def migrate(connection: sqlite3.Connection, steps: Sequence[str]) -> None:
    """Take a journal from its schema to the newest, all in one transaction; a failure leaves it as it was."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version - 1 :]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(steps) + 1}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _statements(script: str) -> Iterator[str]:
    """Split a script: `executescript` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


# ------------------------------------------------------------------------- writing


class _Writer:
    """Turns the records of one transaction into rows.

    Closed batches are gathered and written by `executemany`; any other record
    first flushes them, so the order of the records is kept.
    """

    def __init__(self, connection: sqlite3.Connection, dirs: OrderedDict[tuple[int, str], int]) -> None:
        self._sql = connection
        self._dirs = dirs
        self._batches: list[tuple[object, ...]] = []
        self._runs: list[tuple[object, ...]] = []
        self._claims: list[tuple[int, bytes, int, int, int | bytes, int]] = []
        self._riders: dict[tuple[int, bytes, int, int, int | bytes], int] = {}  # companions -> newest batch
        self._tally: dict[tuple[int, str], list[int]] = {}

    def write(self, records: Sequence[Effect]) -> None:
        for record in records:
            if isinstance(record, BatchClosed):
                self._batch_closed(record)
            else:
                self._flush_batches()
                self._other(record)

    def many(self, change: str, rows: Iterable[tuple[object, ...]]) -> int:
        return self._sql.executemany(change, rows).rowcount

    def one(self, change: str, *values: object) -> int:
        return self._sql.execute(change, values).rowcount

    def flush(self) -> None:
        """Write what was gathered; the last thing before the commit."""
        self._flush_batches()
        if self._tally:
            rows = [(rule, state, *counts) for (rule, state), counts in self._tally.items() if any(counts)]
            self.many(
                "INSERT INTO tally (rule, state, runs, files, bytes) VALUES (?, ?, ?, ?, ?) ON CONFLICT (rule, state)"
                " DO UPDATE SET runs = runs + excluded.runs, files = files + excluded.files,"
                " bytes = bytes + excluded.bytes",
                rows,
            )
            self._tally.clear()

    def rule_ids(self, names: Sequence[str]) -> dict[str, int]:
        self.many("INSERT OR IGNORE INTO rule (name) VALUES (?)", [(name,) for name in names])
        known: dict[str, int] = dict(self._sql.execute("SELECT name, id FROM rule"))
        return {name: known[name] for name in names}

    def root_id(self, path: bytes) -> int:
        self.one("INSERT OR IGNORE INTO root (path) VALUES (?)", path)
        return int(self._sql.execute("SELECT id FROM root WHERE path = ?", (path,)).fetchone()[0])

    def thin(
        self, before_utc: float, limit: int, spared: Set[int], after: tuple[float, int]
    ) -> tuple[int, tuple[float, int]]:
        """Return how many were thinned, and up to where; from the beginning again after the last one."""
        rows = self._sql.execute(
            "SELECT batch.id, batch.rule, batch.closed_time, batch.files FROM batch JOIN run ON run.id = batch.id"
            " WHERE batch.manifest IS NOT NULL AND batch.closed_time < ?1 AND (batch.closed_time, batch.id) > (?3, ?4)"
            " AND run.final = 1 AND run.changed_time < ?1 ORDER BY batch.closed_time, batch.id LIMIT ?2",
            (before_utc, limit, *after),
        ).fetchall()
        whole, files = len(rows), 0
        for number, (_, rule, _, count) in enumerate(rows):
            files += count if rule in spared else 0
            if files > THIN_LOOKS_MAX and number:
                del rows[number:]
                break
        runs = [(id,) for id, rule, *_ in rows if not (rule in spared and self._is_there(id))]
        to = (rows[-1][2], rows[-1][0]) if whole == limit or len(rows) < whole else (0.0, 0)
        self.many("UPDATE batch SET manifest = NULL, request = NULL WHERE id = ?", runs)
        for table in ("attempt", "transition", "proof"):
            self.many(f"DELETE FROM {table} WHERE run = ?", runs)
        ended = "SELECT id FROM reclaim WHERE changed_time < ?1 AND state IN ('done', 'kept') ORDER BY changed_time"
        sets = self._sql.execute(f"{ended} LIMIT ?2", (before_utc, limit)).fetchall()
        self.many("DELETE FROM reclaim_file WHERE reclaim = ?", sets)
        self.many("DELETE FROM sole WHERE reclaim = ?", sets)
        self.many("DELETE FROM reclaim WHERE id = ?", sets)
        self.one("DELETE FROM alarm WHERE cleared_time < ?", before_utc)
        self.one("DELETE FROM ordered WHERE time < ?", before_utc)
        self.one(
            "DELETE FROM rule_set WHERE time < ? AND id <= (SELECT max(id) FROM rule_set) - ?",
            before_utc,
            RULE_SETS_KEPT,
        )
        return limit if len(rows) < whole else max(len(runs), len(sets)), to

    def _is_there(self, batch: int) -> bool:
        """Say whether any file of a batch may still be there: its claim goes some time after the file."""
        (manifest,) = self._sql.execute("SELECT manifest FROM batch WHERE id = ?", (batch,)).fetchone()
        for member in members_of(manifest):
            if member.role:
                continue
            found = self._sql.execute(
                "SELECT 1 FROM claim JOIN dir ON dir.id = claim.dir"
                " WHERE dir.root = ? AND dir.path = ? AND claim.name = ? AND claim.batch = ?",
                (member.root, to_name(member.dir), to_name(member.name), batch),
            )
            if found.fetchone() is not None:
                return True
        return False

    # ---------------------------------------------------------------- batches

    def _batch_closed(self, record: BatchClosed) -> None:
        if record.again:
            self._flush_batches()
        batch, rule, now = record.batch, record.rule, record.time
        manifest: list[str] = []
        claims = self._claims
        last_root, last_dir, dir_id, head = -1, "", 0, ""
        # The hot path: one loop, no call per file that is not C. A line is what to_json would write.
        for root, directory, name, size, mtime_ns, role, flag, content in map(_MEMBER, record.members):
            if directory != last_dir or root != last_root:
                last_root, last_dir, dir_id, head = root, directory, 0, f"[{root},{quoted(directory)},"
            tail = '"",""]' if not (role or flag or content) else f"{quoted(role)},{quoted(flag)},{quoted(content)}]"
            manifest.append(f"{head}{quoted(name)},{size},{mtime_ns},{tail}")
            dir_id = dir_id or self._dir(root, directory)
            version = mtime_ns if -(2**63) <= mtime_ns < 2**63 else to_number(mtime_ns)
            if role:  # it rides along with whoever needs it, several perhaps: told to people, claimed by nobody
                key = (dir_id, name.encode("utf-8", "surrogateescape"), RIDER + rule, size, version)
                self._riders[key] = batch
                continue
            claims.append((dir_id, name.encode("utf-8", "surrogateescape"), rule, size, version, batch))
        if record.again:
            self._insert_claims("INSERT OR REPLACE")
        captures, reason, request = to_json(record.group), to_text(record.reason), to_json(record.request)
        count, total = len(manifest), record.bytes
        self._batches.append((batch, rule, captures, reason, now, count, total, request, f"[{','.join(manifest)}]"))
        waits_on = to_json(record.waits_on) if record.waits_on else None
        self._runs.append((batch, reason, now, now, to_text(record.destination), waits_on))
        self._count(rule, RunState.PENDING, 1, count, total)

    def _flush_batches(self) -> None:
        if self._batches:
            self.many(
                "INSERT INTO batch (id, rule, captures, reason, closed_time, files, bytes, request, manifest)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                self._batches,
            )
            self.many(
                "INSERT INTO run (id, state, final, because, created_time, changed_time, destination, waits_on)"
                " VALUES (?, 'PENDING', 0, ?, ?, ?, ?, ?)",
                self._runs,
            )
            self._batches.clear()
            self._runs.clear()
        if self._riders:
            riders = [(*key, batch) for key, batch in self._riders.items()]
            self._riders.clear()
            self.many(
                "INSERT OR REPLACE INTO claim (dir, name, rule, size, mtime_ns, batch) VALUES (?, ?, ?, ?, ?, ?)",
                riders,
            )
        if self._claims:
            try:
                self._insert_claims("INSERT")
            except sqlite3.IntegrityError as error:
                raise self._claimed_twice() from error

    def _insert_claims(self, insert: str) -> None:
        self.many(
            f"{insert} INTO claim (dir, name, rule, size, mtime_ns, batch) VALUES (?, ?, ?, ?, ?, ?)", self._claims
        )
        self._claims.clear()

    def _claimed_twice(self) -> JournalConflict:
        """Find the version that stopped the insert: the backstop of "exactly one batch"."""
        for dir_id, name, rule, size, mtime_ns, batch in self._claims:
            found = self._sql.execute(
                "SELECT claim.batch, rule.name, dir.path FROM claim JOIN dir ON dir.id = claim.dir"
                " LEFT JOIN rule ON rule.id = claim.rule"
                " WHERE dir = ? AND claim.name = ? AND rule = ? AND size = ? AND mtime_ns = ?",
                (dir_id, name, rule, size, mtime_ns),
            ).fetchone()
            if found and found[0] != batch:
                path = f"{from_name(found[2])}/{from_name(name)}".lstrip("/")
                return JournalConflict(
                    f"batch {batch} of rule {found[1] or rule} would take {path!r} again,"
                    f" which batch {found[0]} has claimed",
                    hint="nothing was written; this is a bug, please report it",
                )
        return JournalConflict("one batch names the same file version twice", hint="this is a bug; please report it")

    def _dir(self, root: int, path: str) -> int:
        key = (root, path)
        dir_id = self._dirs.get(key)
        if dir_id is not None:
            self._dirs.move_to_end(key)
            return dir_id
        name = to_name(path)
        found = self._sql.execute("SELECT id FROM dir WHERE root = ? AND path = ?", (root, name)).fetchone()
        if found:
            dir_id = int(found[0])
        else:
            dir_id = int(self._sql.execute("INSERT INTO dir (root, path) VALUES (?, ?)", (root, name)).lastrowid or 0)
        self._dirs[key] = dir_id
        if len(self._dirs) > DIRS_CACHED_MAX:
            self._dirs.popitem(last=False)
        return dir_id

    def _count(self, rule: int, state: str, runs: int, files: int, size: int) -> None:
        counts = self._tally.setdefault((rule, str(state)), [0, 0, 0])
        counts[0] += runs
        counts[1] += files
        counts[2] += size

    # ----------------------------------------------------------- other records

    def _other(self, record: Effect) -> None:
        match record:
            case Renewed():
                self.one("UPDATE batch SET request = ? WHERE id = ?", to_json(record.request), record.run)
                self.one("UPDATE run SET destination = ? WHERE id = ?", to_text(record.destination), record.run)
            case RunMoved():
                self._run_moved(record)
            case AttemptMade(run, attempt, prepared, at):
                self.one(
                    "INSERT INTO attempt (run, attempt, prepared, made_time) VALUES (?, ?, ?, ?)",
                    run, attempt, _json_or_null(prepared), at,
                )  # fmt: skip
            case AttemptChanged():
                self._attempt_changed(record)
            case ProofKept(run, attempt, members, at, witnessed):
                self.one(
                    "INSERT OR REPLACE INTO proof (run, attempt, time, members, witnessed) VALUES (?, ?, ?, ?, ?)",
                    run, attempt, at, to_json(list(members)), witnessed,
                )  # fmt: skip
                # A later life goes on from there: no proof may seem to be younger than nothing.
                self.one("INSERT OR REPLACE INTO kept (key, value) VALUES ('witnessed', ?)", to_json(witnessed))
            case ReclaimIntended():
                self._reclaim_intended(record)
            case ReclaimMoved():
                self._reclaim_moved(record)
            case Claimed():
                dir_id = self._dir(record.root, record.dir)
                self.many(
                    "INSERT OR IGNORE INTO claim (dir, name, rule, size, mtime_ns, batch, time)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        (dir_id, to_name(name), record.rule, size, to_number(mtime_ns), record.code, int(record.time))
                        for name, size, mtime_ns in record.rows
                    ),
                )
            case Forgotten():
                self._forgotten(record)
            case Released(rule, root, batch, paths):
                self.many(
                    "DELETE FROM claim WHERE rule = ? AND batch = ? AND name = ?"
                    " AND dir = (SELECT id FROM dir WHERE root = ? AND path = ?)",
                    (
                        (rule, CLAIM_REWRITE_IGNORED, to_name(name), root, to_name(directory))
                        for directory, name in map(split, paths)
                    ),
                )
                self.many(
                    "UPDATE OR REPLACE claim SET rule = ? WHERE rule = ? AND batch = ? AND name = ?"
                    " AND dir = (SELECT id FROM dir WHERE root = ? AND path = ?)",
                    (
                        (rule + RELEASED, rule, batch, to_name(name), root, to_name(directory))
                        for directory, name in map(split, paths)
                    ),
                )
            case ClaimsCarried(rule, from_root, to_root):
                self._carry_claims(rule, from_root, to_root)
            case BaselineSet(rule, root, at):
                self.one("INSERT OR REPLACE INTO baseline (rule, root, time) VALUES (?, ?, ?)", rule, root, at)
            case GroupSet(rule, group, kind, batch, at):
                self.one(
                    "INSERT OR REPLACE INTO group_mark (rule, captures, kind, batch, time) VALUES (?, ?, ?, ?, ?)",
                    rule, to_text(group), kind, batch, at,
                )  # fmt: skip
            case GroupForgotten(rule, group, kind):
                self.one(
                    "DELETE FROM group_mark WHERE rule = ? AND captures = ? AND kind = ?", rule, to_text(group), kind
                )
            case AlarmRaised(key, what, hint, at):
                self.one(
                    "INSERT INTO alarm (key, what, hint, since_time) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT (key) WHERE cleared_time IS NULL DO UPDATE SET what = excluded.what,"
                    " hint = excluded.hint",
                    to_text(key), to_text(what), to_text(hint), at,
                )  # fmt: skip
            case AlarmCleared(key, at):
                self.one("UPDATE alarm SET cleared_time = ? WHERE key = ? AND cleared_time IS NULL", at, to_text(key))
            case AlarmAcked(key, who, at):
                self.one(
                    "UPDATE alarm SET acked_time = ?, acked_by = ? WHERE key = ? AND cleared_time IS NULL",
                    at, to_text(who), to_text(key),
                )  # fmt: skip
            case Kept(key, None):
                self.one("DELETE FROM kept WHERE key = ?", to_text(key))
            case Kept(key, value):
                self.one("INSERT OR REPLACE INTO kept (key, value) VALUES (?, ?)", to_text(key), to_json(value))
            case RulesAccepted(source, at):
                self.one("INSERT INTO rule_set (time, source) VALUES (?, ?)", at, to_json(source))
            case Ordered():
                self.one(
                    "INSERT INTO ordered (order_id, verb, args, who, why, answer, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    record.id, to_text(record.verb), to_json(record.args), to_text(record.who), to_text(record.why),
                    to_json(record.answer), record.time,
                )  # fmt: skip
            case _:
                raise TypeError(f"{type(record).__name__} is not a record of the journal")

    def _carry_claims(self, rule: int, from_root: int, to_root: int) -> None:
        """Claim below one root what a rule (also as its markers) claimed below another; the old claims stay."""
        self.one(
            "INSERT OR IGNORE INTO dir (root, path) SELECT ?1, path FROM dir WHERE root = ?2"
            " AND EXISTS (SELECT 1 FROM claim WHERE claim.dir = dir.id AND claim.rule IN (?3, -?3))",
            to_root, from_root, rule,
        )  # fmt: skip
        self.one(
            "INSERT OR IGNORE INTO claim (dir, name, rule, size, mtime_ns, batch, time)"
            " SELECT new.id, claim.name, claim.rule, claim.size, claim.mtime_ns, claim.batch, claim.time"
            " FROM dir AS old JOIN dir AS new ON new.root = ?1 AND new.path = old.path"
            " JOIN claim ON claim.dir = old.id AND claim.rule IN (?3, -?3) WHERE old.root = ?2",
            to_root, from_root, rule,
        )  # fmt: skip

    def _reclaim_intended(self, record: ReclaimIntended) -> None:
        of = record.of
        self.one(
            "INSERT INTO reclaim (id, rule, run, state, because, bytes, proofs, made_time, changed_time)"
            " VALUES (?, ?, ?, 'intended', '', ?, ?, ?, ?)",
            record.id, of.rule, of.run, of.bytes, to_json(list(of.proofs)), record.time, record.time,
        )  # fmt: skip
        self.many(
            "INSERT INTO reclaim_file (root, path, reclaim, number, size, mtime_ns, ctime_ns, inode, hidden)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (file.root, to_name(file.path), record.id, number, file.state[0], *map(to_number, file.state[1:]),
                 to_name(file.hidden))
                for number, file in enumerate(of.files)
            ),
        )  # fmt: skip

    def _reclaim_moved(self, record: ReclaimMoved) -> None:
        moved = self.one(
            "UPDATE reclaim SET state = ?, because = ?, changed_time = ?"
            " WHERE id = ? AND state IN ('intended', 'confirmed')",
            record.state, to_text(record.because), record.time, record.id,
        )  # fmt: skip
        if moved != 1:
            raise JournalConflict(
                f"reclaim {record.id} cannot become {record.state}: it is not under way",
                hint="nothing was written; this is a bug, please report it",
            )
        self.many(
            "UPDATE reclaim_file SET place = ? WHERE reclaim = ? AND number = ?",
            ((place, record.id, number) for number, place in enumerate(record.places)),
        )
        if record.state == "kept":
            self.one("DELETE FROM sole WHERE reclaim = ?", record.id)
        elif record.state == "confirmed":  # before the first is unlinked: from now on nothing of ours replaces a copy
            (proofs,) = self._sql.execute("SELECT proofs FROM reclaim WHERE id = ?", (record.id,)).fetchone()
            rows = ((target_key(name), record.id) for name in _known_as(from_json(proofs)))
            self.many("INSERT OR IGNORE INTO sole (target, reclaim) VALUES (?, ?)", rows)

    def _run_moved(self, record: RunMoved) -> None:
        before, after = str(record.from_state), str(record.to_state)
        because = to_text(record.because)
        moved = self.one(
            "UPDATE run SET state = ?, final = ?, because = ?, changed_time = ?, error = coalesce(?, error),"
            " hint = coalesce(?, hint), attempts = coalesce(?, attempts), output = coalesce(?, output),"
            " retry_time = coalesce(?, retry_time) WHERE id = ? AND state = ?",
            after, int(record.final), because, record.time, _text_or_null(record.error), _text_or_null(record.hint),
            record.attempts, _json_or_null(record.output), record.retry_time, record.run, before,
        )  # fmt: skip
        if moved != 1:
            found = self._sql.execute("SELECT state FROM run WHERE id = ?", (record.run,)).fetchone()
            stands = f"is {found[0]}" if found else "does not exist"
            raise JournalConflict(
                f"run {record.run} cannot go from {before} to {after}: it {stands}",
                hint="nothing was written; this is a bug, please report it",
            )
        self.one(
            "INSERT INTO transition (run, from_state, to_state, because, time) VALUES (?, ?, ?, ?, ?)",
            record.run, before, after, because, record.time,
        )  # fmt: skip
        if before != after:
            rule, files, size = self._sql.execute(
                "SELECT rule, files, bytes FROM batch WHERE id = ?", (record.run,)
            ).fetchone()
            self._count(rule, before, -1, -files, -size)
            self._count(rule, after, 1, files, size)

    def _attempt_changed(self, record: AttemptChanged) -> None:
        changed = self.one(
            "UPDATE attempt SET handle = coalesce(?, handle), ended_time = coalesce(?, ended_time),"
            " outcome = coalesce(?, outcome) WHERE run = ? AND attempt = ?",
            _json_or_null(record.handle), record.ended_time, _text_or_null(record.outcome), record.run, record.attempt,
        )  # fmt: skip
        if changed != 1:
            raise JournalConflict(
                f"attempt {record.attempt} of run {record.run} was never journaled",
                hint="nothing was written; this is a bug, please report it",
            )

    def _forgotten(self, record: Forgotten) -> None:
        found = self._sql.execute(
            "SELECT id FROM dir WHERE root = ? AND path = ?", (record.root, to_name(record.dir))
        ).fetchone()
        if found is None:
            return
        (dir_id,) = found
        delete = (
            "DELETE FROM claim WHERE dir = ? AND (batch <= 0 AND time < ? OR EXISTS"
            " (SELECT 1 FROM run WHERE run.id = claim.batch AND run.final = 1 AND run.changed_time < ?))"
        )
        if record.names is None:
            self.one(delete, dir_id, record.before, record.before)
        else:
            rows = ((dir_id, record.before, record.before, to_name(name)) for name in record.names)
            self.many(f"{delete} AND name = ?", rows)
        if not self._sql.execute("SELECT 1 FROM claim WHERE dir = ? LIMIT 1", (dir_id,)).fetchone():
            self.one("DELETE FROM dir WHERE id = ?", dir_id)
            self._dirs.pop((record.root, record.dir), None)


def _known_as(proofs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return all that the copies of a set are known by."""
    copies = {str(to) for proof in proofs for _, to, _ in proof.get("copies", ()) if to}
    return copies.union(*(names for proof in proofs for names in proof.get("known_as", {}).values()))


def _copied_to(proofs: Sequence[Mapping[str, Any]], names: Collection[str]) -> set[str]:
    """Return the files whose copy is known by one of these names."""
    spelled = set(map(one_spelling, names))
    return {
        path for proof in proofs for path, to, _ in proof.get("copies", ())
        if not {one_spelling(str(to)), *proof.get("known_as", {}).get(to, ())}.isdisjoint(spelled)
    }  # fmt: skip


def _json_or_null(value: object) -> str | None:
    return None if value is None else to_json(value)


def _text_or_null(value: str | None) -> str | bytes | None:
    return None if value is None else to_text(value)


# ------------------------------------------------------------------------- loading


def _attempt(row: Sequence[Any]) -> SavedAttempt:
    attempt, prepared, handle, made, ended, outcome = row
    words = None if outcome is None else from_text(outcome)
    return SavedAttempt(attempt, from_json(prepared), from_json(handle), made, ended, words)


def _reclaims(read: sqlite3.Connection) -> tuple[SavedReclaim, ...]:
    found = []
    for id, rule, run, state, proofs in read.execute(
        "SELECT id, rule, run, state, proofs FROM reclaim WHERE state IN ('intended', 'confirmed') ORDER BY id"
    ):
        files = tuple(
            ReclaimFile(root, from_name(path), (size, *map(from_number, times)), from_name(hidden))
            for root, path, hidden, size, *times in read.execute(
                "SELECT root, path, hidden, size, mtime_ns, ctime_ns, inode FROM reclaim_file WHERE reclaim = ?"
                " ORDER BY number", (id,),
            )
        )  # fmt: skip
        found.append(SavedReclaim(id, state == "confirmed", ReclaimSet(rule, run, files, from_json(proofs))))
    return tuple(found)


def _floor(read: sqlite3.Connection) -> int:
    """Return the number that new batches are above: a recovered journal does not know the last ones."""
    found = read.execute("SELECT value FROM kept WHERE key = 'batch_floor'").fetchone()
    return int(from_json(found[0])) if found else 0


def _load(read: sqlite3.Connection) -> Saved:
    last = {  # the rows of a run come in the order of its attempts, so the last one stays
        row[0]: row[1:]
        for row in read.execute(
            "SELECT attempt.run, attempt.attempt, prepared, handle, made_time, ended_time, outcome"
            " FROM run INDEXED BY run_open JOIN attempt ON attempt.run = run.id WHERE run.final = 0"
            " ORDER BY attempt.run, attempt.attempt"
        )
    }
    known: dict[str, Any] = {}  # groups and requests repeat

    def mapping(text: str) -> Any:
        value = known.get(text)
        if value is None:
            value = known[text] = from_json(text)
        return value

    runs = []
    for row in read.execute(
        "SELECT run.id, rule, captures, state, because, created_time, changed_time, attempts, destination, waits_on,"
        " retry_time, error, hint, files, bytes, request, output"
        " FROM run INDEXED BY run_open JOIN batch ON batch.id = run.id WHERE run.final = 0"
    ):
        run, rule, captures, state, because, created, changed, tries, destination, waits_on = row[:10]
        retry_time, error, hint, files, size, request, output = row[10:]
        runs.append(
            OpenRun(
                id=run,
                rule=rule,
                group=mapping(captures),
                state=RunState(state),
                because=from_text(because),
                created_time=created,
                changed_time=changed,
                attempts=tries,
                destination=from_text(destination),
                waits_on=tuple(from_json(waits_on) or ()),
                retry_time=retry_time,
                error=None if error is None else from_text(error),
                hint=None if hint is None else from_text(hint),
                files=files,
                bytes=size,
                request=mapping(request) if request else {},
                attempt=_attempt(last[run]) if run in last else None,
                output=from_json(output),
            )
        )
    runs.sort(key=lambda run: run.id)
    row = read.execute("SELECT source FROM rule_set ORDER BY id DESC LIMIT 1").fetchone()
    source = from_json(row[0]) if row else None
    texts_of(source or ())
    return Saved(
        last_batch=max(read.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()[0], _floor(read)),
        runs=tuple(runs),
        kept={
            from_text(key): from_json(value) for key, value in read.execute("SELECT key, value FROM kept")
            if from_text(key) not in (_HOME, _BACKUP)
        },
        baselines={(rule, root): at for rule, root, at in read.execute("SELECT rule, root, time FROM baseline")},
        groups=tuple(
            SavedMark(rule, from_text(group), kind, batch, at)
            for rule, group, kind, batch, at in read.execute("SELECT rule, captures, kind, batch, time FROM group_mark")
        ),
        alarms=tuple(
            SavedAlarm(from_text(key), from_text(what), from_text(hint), since, acked, by and from_text(by))
            for key, what, hint, since, acked, by in read.execute(
                "SELECT key, what, hint, since_time, acked_time, acked_by FROM alarm WHERE cleared_time IS NULL"
            )
        ),
        rules_source=source,
        tally={
            (rule, state): Count(count, files, size)
            for rule, state, count, files, size in read.execute("SELECT rule, state, runs, files, bytes FROM tally")
        },
        rules=dict(read.execute("SELECT id, name FROM rule")),
        roots={root: from_name(path) for root, path in read.execute("SELECT id, path FROM root")},
        reclaims=_reclaims(read),
        last_reclaim=read.execute("SELECT coalesce(max(id), 0) FROM reclaim").fetchone()[0],
    )
