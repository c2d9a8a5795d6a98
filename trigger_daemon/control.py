"""How people reach the running daemon: a second small SQLite file, with a heartbeat and orders.

Nothing in it is durable. It lies apart from the journal and is served by a
thread of its own, so that a command stopped in the middle of a write can
delay other orders, but neither the loop nor a commit. A control file that is
damaged, locked for long or grown too large is thrown away and made anew.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trigger_daemon.clock import Clock, SystemClock
from trigger_daemon.core.model import Order
from trigger_daemon.database import (
    CONTROL,
    FILE_MODE,
    absent,
    alive,
    ask,
    fault_of,
    from_json,
    from_text,
    holder,
    to_json,
    to_text,
    unreadable,
)
from trigger_daemon.errors import JournalError, NotRunning, TriggerError

__all__ = ["Control", "ControlClient", "Recreated"]

BUSY_S = 0.2  # the daemon's wait for another writer; then it goes on and tries again
LOCKED_MAX_S = 30.0  # a writer that holds the file this long is stopped or dead: its file is thrown away
RECREATE_PERIOD_S = 10.0  # a bad disk would have it made anew at every beat
CLIENT_BUSY_S = 2.0
PERIOD_S = 0.5  # how often orders are looked for: they are to be answered within a second
BEAT_S = 2.0
TAKE_MAX = 100  # orders taken at once
ANSWERS_MAX = 1_000  # answers that wait for the file; TAKE_MAX orders at a time cannot make more in practice
ANSWERED_KEPT = 1_000
WAITING_MAX = 1_000  # orders not yet taken; more are refused
ORDER_BYTES_MAX = 1 << 20
ORDER_LIVES_S = 86_400.0  # an unanswered order older than this is dropped
STALE_S = 60.0  # at a start: what was asked of an earlier daemon longer ago than this is refused, not carried out
WAL_MAX_BYTES = 64 << 20  # a reader that stands still keeps the -wal growing by each heartbeat
ASK_PERIOD_S = 0.02

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE heartbeat (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    time     REAL NOT NULL,                -- Unix seconds, UTC
    snapshot TEXT NOT NULL                 -- JSON
);
CREATE TABLE orders (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    verb          TEXT NOT NULL,
    args          TEXT NOT NULL,           -- JSON
    who           TEXT NOT NULL,
    why           TEXT NOT NULL,
    asked_time    REAL NOT NULL,
    taken         INTEGER NOT NULL DEFAULT 0,
    answer        TEXT,                    -- JSON
    answered_time REAL
);
CREATE INDEX orders_waiting ON orders (id) WHERE taken = 0;
CREATE INDEX orders_unanswered ON orders (asked_time) WHERE answered_time IS NULL;
"""

_ANSWER = "UPDATE orders SET taken = 1, answer = ?, answered_time = ? WHERE answered_time IS NULL AND"


@dataclass(frozen=True, slots=True)
class Recreated:
    """The control file was thrown away and made anew; orders in it were lost, their askers are told by a timeout."""

    why: str


class Control:
    """The daemon's end. One thread serves it (`serve`); `answer` and `show` may be called from any, and never wait."""

    def __init__(self, state_dir: Path, clock: Clock, recreated: Callable[[Recreated], None]) -> None:
        """Use `Control.open`."""
        self.path = state_dir / CONTROL
        self._clock = clock
        self._recreated = recreated
        self._guard = threading.Lock()  # of what other threads hand in
        self._answers: dict[int, str] = {}
        self._snapshot: Mapping[str, Any] = {}
        self._shown: Mapping[str, Any] | None = None  # by the daemon's thread
        self._beaten: Mapping[str, Any] | None = None  # by the serving one
        self._news = threading.Event()
        self._sql: sqlite3.Connection | None = None
        self._inode = 0
        self._seen = 0
        self._waiting = True
        self._locked_at: float | None = None
        self._recreated_at = float("-inf")

    @classmethod
    def open(
        cls,
        state_dir: Path,
        clock: Clock | None = None,
        *,
        recreated: Callable[[Recreated], None] = lambda _: None,
    ) -> Control:
        """Open or make the control file; `recreated` is told whenever a damaged or stuck one was replaced.

        The caller holds the state directory's lock (`Journal.open`). Raises
        JournalError when the file cannot be made.
        """
        control = cls(Path(os.path.realpath(state_dir)), clock or SystemClock(), recreated)
        control._connected()
        control._try(control._begin)
        return control

    def serve(self, post: Callable[[Order], None], stop: threading.Event) -> None:
        """Serve until `stop` is set: take orders and post them, write answers and what was shown last.

        Returns only then; whatever happens to the file is mended or tried
        again. A last heartbeat and the answers that wait are written at the end.
        """
        beaten_at = float("-inf")
        while not stop.is_set():
            if self.changed():
                for order in self.take():
                    post(order)
            self.flush()
            now = self._clock.monotonic()
            if now - beaten_at >= BEAT_S and self.beat(self._snapshot):
                beaten_at = now
            self._news.wait(PERIOD_S)
            self._news.clear()
        self.flush()
        self.beat(self._snapshot)

    def show(self, snapshot: Mapping[str, Any]) -> None:
        """Hand over what the next heartbeat says. JSON; not to be changed afterwards."""
        self._snapshot = self._shown = snapshot

    def answer(self, id: int, answer: Mapping[str, Any]) -> None:
        """Hand over the answer to an order; the serving thread writes it soon, however long the file is locked."""
        with self._guard:
            while len(self._answers) >= ANSWERS_MAX:
                self._answers.pop(next(iter(self._answers)))  # its asker has long given up
            self._answers[id] = to_json(answer)
        self._news.set()

    # What follows is for the serving thread (and for tests, which are it).

    def beat(self, snapshot: Mapping[str, Any]) -> bool:
        """Write the heartbeat; False if the file is locked just now."""
        row = (self._clock.utc(), to_json(snapshot))
        beaten = self._try(
            lambda sql: sql.execute("INSERT OR REPLACE INTO heartbeat (id, time, snapshot) VALUES (1, ?, ?)", row)
        )
        if beaten is not None:
            self._beaten = snapshot
        self._bound()
        return beaten is not None

    def changed(self) -> bool:
        """Say whether there may be orders; costs no more than a look at the -shm."""
        try:
            (seen,) = self._connected().execute("PRAGMA data_version").fetchone()
        except (sqlite3.Error, OSError, JournalError):
            return True  # `take` finds out what it is
        if seen != self._seen:
            self._seen, self._waiting = seen, True
        return self._waiting

    def take(self) -> list[Order]:
        """Return orders not yet taken, oldest first, at most TAKE_MAX; each is taken once."""
        orders = self._try(self._take)
        if orders is not None and len(orders) < TAKE_MAX:
            self._waiting = False
        return orders or []

    def flush(self) -> bool:
        """Write the answers that wait, after what was shown before them; False if the file is locked just now."""
        with self._guard:
            answers = dict(self._answers)
        if not answers:
            return True
        if (shown := self._shown) is not None and shown is not self._beaten and not self.beat(shown):
            return False  # who has an answer and asks for the status is not told of a time before it
        now = self._clock.utc()
        rows = [(answer, now, id) for id, answer in answers.items()]
        if self._try(lambda sql: _answered(sql, rows)) is None:
            return False
        with self._guard:
            for id, answer in answers.items():
                if self._answers.get(id) == answer:
                    del self._answers[id]
        return True

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._sql is not None:
            self._sql.close()
            self._sql = None

    # ------------------------------------------------------------------ inside

    def _begin(self, sql: sqlite3.Connection) -> bool:
        """Refuse what an earlier daemon left: it may have been carried out, or nobody waits for it any more."""
        now = self._clock.utc()
        lost = {
            "ok": False,
            "error": "the daemon stopped before it answered",
            "hint": "look whether it was done, then ask again",
        }
        late = {"ok": False, "error": "the daemon was not running when this was asked", "hint": "ask again"}
        sql.execute(f"{_ANSWER} taken = 1", (to_json(lost), now))
        sql.execute(f"{_ANSWER} abs(asked_time - ?) > ?", (to_json(late), now, now, STALE_S))
        return True

    def _take(self, sql: sqlite3.Connection) -> list[Order]:
        now = self._clock.utc()
        sql.execute("DELETE FROM orders WHERE answered_time IS NULL AND asked_time < ?", (now - ORDER_LIVES_S,))
        rows = sql.execute(
            "SELECT id, verb, args, who, why FROM orders WHERE taken = 0 AND answered_time IS NULL ORDER BY id LIMIT ?",
            (TAKE_MAX,),
        ).fetchall()
        sql.executemany("UPDATE orders SET taken = 1 WHERE id = ?", [(row[0],) for row in rows])
        at = self._clock.monotonic()
        orders = []
        for id, verb, args, who, why in rows:
            try:
                orders.append(Order(id, from_text(verb), dict(from_json(args)), from_text(who), from_text(why), at))
            except (ValueError, TypeError):  # not written by our own command line
                answer = to_json({"ok": False, "error": "the order's arguments are not a JSON object"})
                sql.execute(f"{_ANSWER} id = ?", (answer, now, id))
        return orders

    def _try(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do `work` in one transaction; None if the file is locked, or was just replaced."""
        try:
            sql = self._connected()
            try:
                sql.execute("BEGIN IMMEDIATE")
                done = work(sql)
                sql.execute("COMMIT")
            finally:
                if sql.in_transaction:
                    sql.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._failed(error)
            return None
        except (OSError, JournalError):
            return None  # the disk is full or bad; the journal says so to people
        self._locked_at = None
        return done

    def _failed(self, error: sqlite3.Error) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return
        if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._recreate(f"it cannot be used: {error}")
            return
        now = self._clock.monotonic()
        if self._locked_at is None:
            self._locked_at = now
        elif now - self._locked_at > LOCKED_MAX_S:
            self._recreate(f"another program has kept it locked for {now - self._locked_at:.0f} s")

    def _bound(self) -> None:
        """Throw the file away when a stopped reader has let its -wal grow too large, or somebody removed it."""
        try:
            gone = self.path.stat().st_ino != self._inode
            size = self.path.with_name(f"{CONTROL}-wal").stat().st_size
        except FileNotFoundError:
            gone, size = True, 0
        except OSError:
            return
        if gone:
            self._recreate("somebody removed it")
        elif size > WAL_MAX_BYTES:
            self._recreate(f"a reader that stands still made it grow to {size >> 20} MiB")

    def _recreate(self, why: str) -> None:
        now = self._clock.monotonic()
        if now - self._recreated_at < RECREATE_PERIOD_S:
            return
        self._recreated_at = now
        # SQLite sees that a file was unlinked under a connection and leaves its namesakes alone when that one ends.
        self.close()
        try:
            self._unlink()
            self._connected()
        except (OSError, JournalError):
            return  # tried again at the next use
        finally:
            self._locked_at = None
        self._recreated(Recreated(why))

    def _connected(self) -> sqlite3.Connection:
        """Return the connection, opening the file (made if there is none, replaced if damaged) when there is none."""
        if self._sql is None:
            self._sql = self._open_or_replace()
            self._inode = self.path.stat().st_ino
            (self._seen,) = self._sql.execute("PRAGMA data_version").fetchone()
            self._waiting = True
        return self._sql

    def _open_or_replace(self) -> sqlite3.Connection:
        try:
            try:
                return self._open()
            except sqlite3.DatabaseError as error:
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    raise
                self._unlink()
                sql = self._open()
                self._recreated(Recreated(f"it was damaged: {error}"))
                return sql
        except sqlite3.Error as error:
            raise fault_of(error, self.path) from error
        except OSError as error:
            raise JournalError(f"cannot make {self.path}: {error.strerror}") from error

    def _unlink(self) -> None:
        for name in (CONTROL, f"{CONTROL}-wal", f"{CONTROL}-shm"):
            self.path.with_name(name).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        if not self.path.exists():
            _make(self.path)
        sql = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_S, check_same_thread=False
        )
        try:
            sql.execute("PRAGMA journal_mode = WAL")
            sql.execute("PRAGMA synchronous = NORMAL")  # a power cut may take an order back: its asker is gone too
            sql.execute(f"PRAGMA journal_size_limit = {1 << 20}")
            tables = "SELECT count(*) FROM sqlite_master WHERE name IN ('heartbeat', 'orders')"
            if sql.execute(tables).fetchone() != (2,):
                broken = sqlite3.DatabaseError("it lacks its tables")
                broken.sqlite_errorcode = sqlite3.SQLITE_NOTADB
                raise broken
            return sql
        except BaseException:
            sql.close()
            raise


def _make(path: Path) -> None:
    """Make an empty control file, whole or not at all."""
    new = path.with_name(f"{CONTROL}.new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE))
    new.chmod(FILE_MODE)
    sql = sqlite3.connect(new, isolation_level=None)
    try:
        sql.executescript(f"PRAGMA synchronous = OFF; BEGIN; {_SCHEMA} COMMIT;")
        sql.execute("PRAGMA journal_mode = WAL")
    finally:
        sql.close()
    new.rename(path)


def _answered(sql: sqlite3.Connection, rows: list[tuple[str, float, int]]) -> bool:
    sql.executemany(f"{_ANSWER} id = ?", rows)
    sql.execute(
        "DELETE FROM orders WHERE answered_time IS NOT NULL AND id <="
        " (SELECT id FROM orders WHERE answered_time IS NOT NULL ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (ANSWERED_KEPT,),
    )
    return True


class ControlClient:
    """The command's end: whether a daemon lives, what it last said of itself, and orders to it."""

    def __init__(self, state_dir: Path) -> None:
        """Remember the state directory; nothing is opened before it is needed."""
        self.state_dir = Path(os.path.realpath(state_dir))
        self.path = self.state_dir / CONTROL

    def alive(self) -> bool:
        """Say whether a daemon holds the state directory. Raises JournalError without permission to look."""
        return alive(self.state_dir)

    def pid(self) -> int | None:
        """Return the running daemon's pid."""
        who = holder(self.state_dir) if self.alive() else None
        return who.pid if who else None

    def heartbeat(self) -> dict[str, Any] | None:
        """Return the last snapshot, with `time` (Unix seconds, UTC) added; None if there is none.

        It may be of a daemon that is gone: see `alive`. Raises JournalError
        without permission to read it.
        """
        try:
            row = ask(self.path, lambda sql: sql.execute("SELECT time, snapshot FROM heartbeat").fetchone())
        except JournalError:
            if absent(self.path) or os.access(self.path, os.R_OK):
                return None  # damaged, or being made anew: the daemon mends it, and there is no heartbeat till then
            raise
        return {**from_json(row[1]), "time": row[0]} if row else None

    def ask(
        self, verb: str, args: Mapping[str, Any], who: str, why: str = "", timeout_s: float = 5.0
    ) -> dict[str, Any]:
        """Give an order and return its answer.

        Raises NotRunning: no daemon, or it did not answer in time; the message
        says whether the order may still be carried out. Raises TriggerError if
        the order is refused for its size or because too many wait.
        """
        if not self.alive():
            start = "`trigger-daemon serve` (or `systemctl start trigger-daemon` where it is a service)"
            raise NotRunning(f"no daemon holds {self.state_dir}", hint=f"start it: {start}")
        words = to_json(args)
        if len(words) > ORDER_BYTES_MAX:
            raise TriggerError(
                f"an order of {len(words)} bytes is too large", hint="name fewer files or runs in one command"
            )
        deadline = time.monotonic() + timeout_s
        sql = self._open()
        try:
            id = self._insert(sql, (to_text(verb), words, to_text(who), to_text(why), time.time()), deadline)
            while True:
                row = _patiently(
                    lambda: sql.execute("SELECT answer FROM orders WHERE id = ?", (id,)).fetchone(), deadline
                )
                if row is None:
                    raise NotRunning("the order was lost with the control file", hint="ask again")
                if row[0] is not None:
                    answer: dict[str, Any] = from_json(row[0])
                    return answer
                if time.monotonic() >= deadline or not self.alive():
                    raise self._given_up(sql, id, timeout_s)
                time.sleep(ASK_PERIOD_S)
        except sqlite3.Error as error:
            raise fault_of(error, self.path) from error
        finally:
            sql.close()

    def _open(self) -> sqlite3.Connection:
        try:
            sql = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=CLIENT_BUSY_S
            )
            sql.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            if os.access(self.path, os.R_OK | os.W_OK):
                raise fault_of(error, self.path) from error
            raise unreadable(self.path) from error
        return sql

    def _insert(self, sql: sqlite3.Connection, row: tuple[Any, ...], deadline: float) -> int:
        inserted = _patiently(
            lambda: sql.execute(
                "INSERT INTO orders (verb, args, who, why, asked_time) SELECT ?, ?, ?, ?, ?"
                " WHERE (SELECT count(*) FROM orders WHERE taken = 0) < ?",
                (*row, WAITING_MAX),
            ),
            deadline,
        )
        if inserted.rowcount != 1 or inserted.lastrowid is None:
            raise TriggerError(
                f"{WAITING_MAX} orders wait already", hint="the daemon is not taking them: look at `status` and its log"
            )
        return inserted.lastrowid

    def _given_up(self, sql: sqlite3.Connection, id: int, timeout_s: float) -> NotRunning:
        """Withdraw the order if the daemon has not taken it, and say what may become of it."""
        try:
            withdrawn = sql.execute("DELETE FROM orders WHERE id = ? AND taken = 0", (id,)).rowcount == 1
        except sqlite3.OperationalError:
            withdrawn = False
        gone = "" if self.alive() else "; it has stopped"
        if withdrawn:
            return NotRunning(
                f"the daemon did not take the order in {timeout_s:g} s{gone}; it was withdrawn, nothing was done",
                hint="look at `status` and its log",
            )
        return NotRunning(
            f"the daemon has not answered in {timeout_s:g} s{gone}; the order may still be carried out",
            hint="look at `status` before asking again",
        )


def _patiently(work: Callable[[], T], deadline: float) -> T:
    """Repeat `work` while another program has the file locked; raise NotRunning at the deadline."""
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            if time.monotonic() >= deadline:
                raise NotRunning(
                    "the control file is locked by another command",
                    hint="end the command that stands still (`fuser -v control.db` in the state directory)",
                ) from error
