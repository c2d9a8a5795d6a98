"""Begin again after a damaged or lost journal, without losing a file and without starting one twice.

What can be read is taken over. What cannot may be: a batch that was started, a
file that was sent. So the damaged journal is set aside, every run that had not
ended is held, the files that are there now and in no claim that could be read
are left out by name (`explain`) unless repeating is harmless, and nothing
starts before a person says `resume`.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trigger_daemon.core.model import CLAIM_UNKNOWN, RELEASED, RIDER, UNKNOWN, Member, RunState
from trigger_daemon.core.rules import Rule
from trigger_daemon.database import (
    FILE_MODE,
    JOURNAL,
    LAST,
    DaemonLock,
    from_json,
    from_text,
    last_batch,
    to_json,
    to_name,
    to_number,
    to_text,
)
from trigger_daemon.errors import JournalError, JournalIo
from trigger_daemon.failpoints import fail_point
from trigger_daemon.journal import WITNESS, make_tables, sync_directory
from trigger_daemon.reader import faults_of, members_of, texts_of

ASIDE = "journal.damaged-"  # plus when; directories beside the journal
NEW = "journal.recovered"
COPY = "journal.copy"
_ATTEMPT = re.compile(r"(\d{1,15})-\d")
BATCHES_LOST_MAX = 1_000_000  # numbers that are not given again, as providers may know them
HELD = "the journal was recovered at {}: what became of this run since is not known"

# Table -> its first key column, by which a reading goes on behind a damaged page; then its whole key.
_TABLES = {
    "kept": ("", "key"), "rule": ("id", "id"), "root": ("id", "id"), "dir": ("id", "id"),
    "claim": ("dir", "dir, name, rule, size, mtime_ns"), "batch": ("id", "id"), "run": ("id", "id"),
    "attempt": ("run", "run, attempt"), "transition": ("id", "id"), "proof": ("run", "run, attempt"),
    "baseline": ("", "rule, root"), "group_mark": ("", "rule, captures, kind"), "alarm": ("id", "id"),
    "ordered": ("id", "id"), "rule_set": ("id", "id"), "program": ("id", "id"),
    "reclaim": ("id", "id"), "reclaim_file": ("root", "root, path, reclaim"),
    "sole": ("", "target, reclaim"),
}  # fmt: skip
_SINCE = {"reclaim": 2, "reclaim_file": 2, "sole": 2}  # schemas that first had them


@dataclass
class Salvaged:
    """What was taken over, and what cannot be known."""

    aside: str  # where the damaged journal lies now; '' if there was none
    problems: list[str]  # what was wrong with it
    batches: int = 0
    claims: int = 0
    damaged: list[str] = field(default_factory=list)  # tables that could not be read whole
    newest_time: float | None = None  # of what could be read
    missing: list[tuple[int, int]] = field(default_factory=list)  # numbers of batches between others, first to last
    held: list[int] = field(default_factory=list)  # runs that had not ended
    left_out: list[str] = field(default_factory=list)  # rules whose unknown files are left out
    sent_again: list[str] = field(default_factory=list)  # and those whose are sent


def salvage(state_dir: Path, rules: Sequence[Rule], send: Collection[str], now: float) -> Salvaged:
    """Put a new journal in the place of a damaged or lost one.

    `rules` are those that will be in force; of `send` the files that the new
    journal does not know are sent again. Raises JournalError: a daemon runs,
    the journal is sound, or the disk fails. Killed at any point it can be
    called again.
    """
    lock = DaemonLock(state_dir)
    try:
        interrupted = (state_dir / NEW).exists()
        source = _source(state_dir, interrupted=interrupted)
        with _Copied(state_dir, source) as copy:
            problems = _problems(copy, state_dir)
            if source is not None and not problems:
                raise JournalError(f"{source} is sound", hint="nothing is to be recovered; start the daemon")
            told = Salvaged("", problems or ["it is gone"])
            new = state_dir / NEW
            for old in state_dir.glob(f"{NEW}*"):
                old.unlink()
            os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE))
            new.chmod(FILE_MODE)
            _give(new, state_dir)
            with closing(sqlite3.connect(new, isolation_level=None)) as sql:
                make_tables(sql)
                sql.execute("BEGIN")
                if copy is not None:
                    _take_over(copy, sql, told)
                _make_consistent(sql, told, now)
                floor = _begin_with_care(sql, told, rules, send, now, _used(state_dir))
                sql.execute("COMMIT")
                if faults := faults_of(sql):
                    raise JournalError(f"the recovered journal does not agree with itself: {faults[0]}")
                sql.execute("PRAGMA journal_mode = WAL")
        # Before the new journal is in its place: its numbers are given to nobody again, whatever becomes of it.
        (state_dir / LAST).write_text(f"{floor:020d}\n", encoding="ascii")
        fail_point("salvage.made")
        told.aside = _set_aside(state_dir, now, interrupted=interrupted)
        if told.aside:
            _give(Path(told.aside), state_dir)
        fail_point("salvage.set_aside")
        new.rename(state_dir / JOURNAL)
        fail_point("salvage.placed")
        (state_dir / WITNESS).touch(FILE_MODE)
        for file in (LAST, WITNESS):
            _give(state_dir / file, state_dir)
        sync_directory(state_dir)
        return told
    except (OSError, sqlite3.Error) as error:
        raise JournalIo(f"{state_dir}: {error}", hint="make room, look at the disk, and call it again") from error
    finally:
        lock.release()


def _give(path: Path, state_dir: Path) -> None:
    """Let what root has made be the daemon's: whose the state directory is."""
    if os.geteuid() == 0:
        owner = state_dir.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _source(state_dir: Path, *, interrupted: bool) -> Path | None:
    """Return the journal to read: the one in place, else the one that an interrupted recovery set aside."""
    if (state_dir / JOURNAL).exists():
        return state_dir / JOURNAL
    aside = _asides(state_dir) if interrupted else []
    return aside[-1] / JOURNAL if aside else None


def _asides(state_dir: Path) -> list[Path]:
    """Return the directories of journals that were set aside, the newest last."""
    found = [path for path in state_dir.glob(f"{ASIDE}*") if (path / JOURNAL).exists()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _used(state_dir: Path) -> int:
    """Return the highest number of a batch that anything here remembers."""
    made = [int(found[1]) for path in state_dir.glob("actions/*/*") if (found := _ATTEMPT.match(path.name))]
    return max([last_batch(state_dir), *made])


class _Copied:
    """A copy to read from: opening it folds its -wal in, and the damaged one is left as it is."""

    def __init__(self, state_dir: Path, source: Path | None) -> None:
        self._directory = state_dir / COPY
        self._source = source

    def __enter__(self) -> Path | None:
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._source is None:
            return None
        try:
            self._directory.mkdir()
            shutil.copyfile(self._source, self._directory / JOURNAL)
            for directory in (self._source.parent, self._directory.parent):  # an interrupted call may have moved one
                if (directory / f"{JOURNAL}-wal").exists():
                    shutil.copyfile(directory / f"{JOURNAL}-wal", self._directory / f"{JOURNAL}-wal")
                    break
        except OSError:
            self.__exit__()
            raise
        return self._directory / JOURNAL

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def _problems(copy: Path | None, state_dir: Path) -> list[str]:
    if copy is None:
        return []
    try:
        with closing(sqlite3.connect(copy, isolation_level=None)) as sql:
            return faults_of(sql) or [*_lacking(sql)] or [*_lost(sql, state_dir)]
    except (sqlite3.Error, ValueError, TypeError) as error:
        return [str(error)]


def _lost(sql: sqlite3.Connection, state_dir: Path) -> Iterator[str]:
    """Yield that batches are missing which were committed: its -wal was damaged or taken away."""
    floor = sql.execute("SELECT value FROM kept WHERE key = 'batch_floor'").fetchone()
    known = max(sql.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()[0], _number(floor))
    if (last := last_batch(state_dir)) > known:
        yield f"batches up to {last} were made, and it ends at {known}"


def _number(row: tuple[Any, ...] | None) -> int:
    try:
        return int(from_json(row[0])) if row else 0
    except (ValueError, TypeError):
        return 0


def _lacking(sql: sqlite3.Connection) -> Iterator[str]:
    there = {name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    (schema,) = sql.execute("PRAGMA user_version").fetchone()
    for table in _TABLES.keys() - there:
        if schema >= _SINCE.get(table, 1):
            yield f"it lacks the table {table}"


# ------------------------------------------------------------------------ reading


def _take_over(copy: Path, sql: sqlite3.Connection, told: Salvaged) -> None:
    """Write into the new journal every row that can be read."""
    with closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True, isolation_level=None)) as old:
        old.text_factory = lambda value: value.decode("utf-8", "surrogateescape")  # fails below, where it is damaged
        for table, (first, key) in _TABLES.items():
            names = [column[0] for column in sql.execute(f"SELECT * FROM {table} LIMIT 0").description]
            for row in _rows(old, table, first, key):
                if row is None:
                    told.damaged.append(table)
                elif len(row) <= len(names):  # an older schema lacks the last columns
                    columns = ", ".join(names[: len(row)])
                    insert = f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({', '.join('?' * len(row))})"
                    try:
                        sql.execute(insert, row)
                    except (sqlite3.IntegrityError, UnicodeEncodeError):
                        told.damaged.append(table)
    told.damaged = sorted(set(told.damaged))


def _rows(old: sqlite3.Connection, table: str, first: str, key: str) -> Iterator[tuple[Any, ...] | None]:
    """Yield a table's rows in the order of their key, some twice; None where something could not be read."""
    start, step = 0, 1
    where = f"WHERE {first} >= ?" if first else ""
    while start < 2**62:
        try:
            for row in old.execute(f"SELECT * FROM {table} {where} ORDER BY {key}", (start,) if first else ()):
                yield row
                if first and isinstance(row[0], int) and row[0] > start:
                    start, step = row[0], 1
            return
        except (sqlite3.Error, UnicodeDecodeError):  # the latter: a column's name is damaged
            yield None
            if not first:
                return
            start += step  # behind the damaged page, wherever it ends
            step *= 2


# ------------------------------------------------------------------------ writing


def _make_consistent(sql: sqlite3.Connection, told: Salvaged, now: float) -> None:
    """Let what hangs together stand: claims as manifests say, no run without its batch; open runs are held."""
    _name_rules(sql)
    sql.execute("DELETE FROM dir WHERE root NOT IN (SELECT id FROM root)")
    _drop_unreadable(sql)
    _claim_by_manifests(sql)
    sql.execute("DELETE FROM claim WHERE dir NOT IN (SELECT id FROM dir)")
    sql.execute("DELETE FROM claim WHERE rule >= ? AND batch NOT IN (SELECT id FROM batch)", (RIDER,))
    sql.execute(
        "UPDATE claim SET batch = ?, time = ? WHERE batch > 0 AND batch NOT IN (SELECT id FROM batch)",
        (CLAIM_UNKNOWN, int(now)),
    )
    sql.execute("DELETE FROM run WHERE id NOT IN (SELECT id FROM batch)")
    words = HELD.format(_day(now))
    sql.execute(
        "INSERT INTO run (id, state, final, because, created_time, changed_time, attempts)"
        " SELECT id, iif(manifest IS NULL OR request IS NULL, 'ABANDONED', 'PENDING'),"
        "  manifest IS NULL OR request IS NULL, ?, closed_time, ?,"
        "  coalesce((SELECT max(attempt) FROM attempt WHERE run = batch.id), 0)"
        " FROM batch WHERE id NOT IN (SELECT id FROM run)",
        (words, now),
    )
    for table in ("attempt", "transition", "proof"):
        sql.execute(f"DELETE FROM {table} WHERE run NOT IN (SELECT id FROM run)")
    lost = "(SELECT id FROM batch WHERE manifest IS NULL OR request IS NULL)"
    end = "UPDATE run SET state = 'ABANDONED', final = 1, because = ?"
    sql.execute(f"{end} WHERE final = 0 AND id IN {lost}", (words,))
    told.held = [run for (run,) in sql.execute("SELECT id FROM run WHERE final = 0 ORDER BY id")]
    sql.execute(
        "INSERT INTO transition (run, from_state, to_state, because, time)"
        " SELECT id, state, 'HELD', ?, ? FROM run WHERE final = 0 AND state <> 'HELD'",
        (words, now),
    )
    hint = "`runs show` tells what was known; `runs retry` where repeating is harmless, else look, and `runs abandon`"
    sql.execute(
        "UPDATE run SET state = 'HELD', because = ?, hint = ?, waits_on = NULL, retry_time = NULL, changed_time = ?"
        " WHERE final = 0",
        (words, hint, now),
    )
    sql.execute("DELETE FROM group_mark WHERE kind = 'followed'")  # successes may be lost: the runs are looked through
    # What was confirmed then may not be proved now: all of it is put back.
    sql.execute("UPDATE reclaim SET state = 'intended' WHERE state = 'confirmed'")
    sql.execute("DELETE FROM reclaim_file WHERE root NOT IN (SELECT id FROM root)")
    sql.execute("DELETE FROM reclaim WHERE id NOT IN (SELECT reclaim FROM reclaim_file)")
    sql.execute(
        "INSERT INTO reclaim SELECT DISTINCT reclaim, 0, 0, 'intended', '', 0, '[]', ?1, ?1 FROM reclaim_file"
        " WHERE reclaim NOT IN (SELECT id FROM reclaim)", (now,)
    )
    sql.execute("DELETE FROM tally")
    sql.execute(
        "INSERT INTO tally SELECT rule, state, count(*), sum(files), sum(bytes) FROM run JOIN batch USING (id)"
        " GROUP BY rule, state"
    )


def _drop_unreadable(sql: sqlite3.Connection) -> None:
    """Let go of texts that are no JSON any more: their run is given up, their setting forgotten."""
    for table, key, column, change in (
        ("kept", "key", "value", "DELETE FROM kept WHERE key = ?"),
        ("batch", "id", "request", "UPDATE batch SET request = NULL WHERE id = ?"),
        ("batch", "id", "captures", "UPDATE batch SET captures = '{}', request = NULL WHERE id = ?"),
        ("run", "id", "output", "UPDATE run SET output = NULL WHERE id = ?"),
        ("attempt", "run", "prepared", "DELETE FROM attempt WHERE run = ?"),
        ("attempt", "run", "handle", "UPDATE attempt SET handle = NULL WHERE run = ?"),
        ("run", "id", "waits_on", "UPDATE run SET waits_on = NULL WHERE id = ?"),
        ("proof", "run", "members", "DELETE FROM proof WHERE run = ?"),
        ("reclaim", "id", "proofs", "UPDATE reclaim SET proofs = '[]' WHERE id = ?"),
        ("rule_set", "id", "source", "DELETE FROM rule_set WHERE id = ?"),
        ("ordered", "id", "args", "DELETE FROM ordered WHERE id = ?"),
        ("ordered", "id", "answer", "DELETE FROM ordered WHERE id = ?"),
    ):
        for which, text in sql.execute(f"SELECT {key}, {column} FROM {table} WHERE {column} IS NOT NULL").fetchall():
            try:
                value = from_json(from_text(text))
                if table == "rule_set":
                    texts_of(value)
            except (ValueError, TypeError):
                sql.execute(change, (which,))
    known = ", ".join(f"'{state}'" for state in RunState)
    sql.execute(f"UPDATE run SET state = 'PENDING', final = 0 WHERE state NOT IN ({known})")


def _name_rules(sql: sqlite3.Connection) -> None:
    """Find the names of rules whose rows are lost in what their batches were to do."""
    lost = sql.execute("SELECT DISTINCT rule FROM batch WHERE rule NOT IN (SELECT id FROM rule)").fetchall()
    for (number,) in lost:
        name = f"lost-{number}"
        for (request,) in sql.execute("SELECT request FROM batch WHERE rule = ? AND request IS NOT NULL", (number,)):
            try:
                name = str(from_json(request)["rule"])
                break
            except (ValueError, KeyError, TypeError):
                continue
        try:
            sql.execute("INSERT INTO rule VALUES (?, ?)", (number, to_text(name)))
        except sqlite3.IntegrityError:
            sql.execute("INSERT INTO rule VALUES (?, ?)", (number, f"{name}-lost-{number}"))


def _claim_by_manifests(sql: sqlite3.Connection) -> None:
    """Make the claims that manifests tell of, and let go of manifests that cannot be read or name what is not there."""
    roots = {root for (root,) in sql.execute("SELECT id FROM root")}
    for batch, rule, files, text in sql.execute(
        "SELECT id, rule, files, manifest FROM batch WHERE manifest IS NOT NULL"
    ).fetchall():
        members = _read_members(text)
        known = [member for member in members if member.root in roots]
        if not len(known) == len(members) == files:
            sql.execute("UPDATE batch SET manifest = NULL WHERE id = ?", (batch,))
        for member in known:
            sql.execute("INSERT OR IGNORE INTO dir (root, path) VALUES (?, ?)", (member.root, to_name(member.dir)))
            sql.execute(
                "INSERT OR IGNORE INTO claim (dir, name, rule, size, mtime_ns, batch)"
                " SELECT id, ?1, ?2, ?3, ?4, ?5 FROM dir WHERE root = ?6 AND path = ?7 AND NOT EXISTS (SELECT 1 FROM"
                " claim WHERE dir = dir.id AND name = ?1 AND rule = ?8 AND size = ?3 AND mtime_ns = ?4 AND batch = ?5)",
                (
                    to_name(member.name), RIDER + rule if member.role else rule, member.size,
                    to_number(member.mtime_ns), batch, member.root, to_name(member.dir), RELEASED + rule,
                ),
            )  # fmt: skip
    sql.execute("DELETE FROM dir WHERE root NOT IN (SELECT id FROM root)")


def _read_members(text: str) -> tuple[Member, ...]:
    """Return a manifest's members; none where one of them could not have been written by a daemon."""
    try:
        members = members_of(text)
        for member in members:
            to_name(member.dir), to_name(member.name)
            for number in (member.root, member.size, member.mtime_ns):
                if not isinstance(number, int):
                    raise TypeError(number)
            if not 0 <= member.size < 2**63:
                raise ValueError(member.size)
    except (ValueError, TypeError, AttributeError):
        return ()
    return members


def _begin_with_care(
    sql: sqlite3.Connection, told: Salvaged, rules: Sequence[Rule], send: Collection[str], now: float, used: int
) -> int:
    """Pause, give no number again, and say what becomes of files that no claim knows.

    Return the number that new batches are above.
    """
    (newest,) = sql.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()
    floor = sql.execute("SELECT value FROM kept WHERE key = 'batch_floor'").fetchone()
    above: int = max(newest, used, _number(floor)) + BATCHES_LOST_MAX
    _keep(sql, "batch_floor", above)
    words = f"paused: the journal was recovered at {_day(now)}"
    _keep(sql, "paused", words)
    sql.execute("UPDATE alarm SET cleared_time = ? WHERE key = 'paused' AND cleared_time IS NULL", (now,))
    sql.execute(
        "INSERT INTO alarm (key, what, hint, since_time) VALUES ('paused', ?, ?, ?)",
        (words, "look at what is held and left out; `trigger-daemon resume` lets everything go on", now),
    )
    sql.execute("DELETE FROM baseline")
    sql.execute("DELETE FROM kept WHERE key LIKE 'existing:%'")
    # For rules that come back later, too: whatever rule first meets a root, what was there before now is not known.
    _keep(sql, "unknown_before", f"{UNKNOWN}{now}")
    for rule in rules:
        sql.execute("INSERT OR IGNORE INTO rule (name) VALUES (?)", (rule.name,))
        sql.execute("INSERT OR IGNORE INTO root (path) VALUES (?)", (to_name(rule.watch),))
        (number,) = sql.execute("SELECT id FROM rule WHERE name = ?", (rule.name,)).fetchone()
        (root,) = sql.execute("SELECT id FROM root WHERE path = ?", (to_name(rule.watch),)).fetchone()
        again = rule.name in send
        _keep(sql, f"existing:{number}:{root}", "process" if again else f"{UNKNOWN}{now}")
        (told.sent_again if again else told.left_out).append(rule.name)
    told.batches, told.claims = (
        sql.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("batch", "claim")
    )
    told.newest_time = sql.execute(
        "SELECT max(time) FROM (SELECT max(closed_time) AS time FROM batch UNION SELECT max(time) FROM transition"
        " WHERE time < ? UNION SELECT max(time) FROM program)", (now,)
    ).fetchone()[0]
    told.missing = _gaps(sql, _number(floor))
    return above


def _gaps(sql: sqlite3.Connection, floor: int) -> list[tuple[int, int]]:
    """Return the numbers that are missing between those of batches; the gap up to a former recovery's floor is none."""
    rows = sql.execute(
        "SELECT before + 1, id - 1 FROM (SELECT id, lag(id, 1, 0) OVER (ORDER BY id) AS before FROM batch)"
        " WHERE id > before + 1"
    )
    return [(first, last) for first, last in rows if not first <= floor <= last]


def _keep(sql: sqlite3.Connection, key: str, value: Any) -> None:
    sql.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (to_text(key), to_json(value)))


def _set_aside(state_dir: Path, now: float, *, interrupted: bool) -> str:
    """Move the damaged files into a directory of their own; one that an interrupted call began is used again."""
    parts = [state_dir / f"{JOURNAL}{suffix}" for suffix in ("", "-wal", "-shm")]
    begun = _asides(state_dir) if interrupted and not parts[0].exists() else []
    if not any(part.exists() for part in parts):
        return str(begun[-1]) if begun else ""
    aside = begun[-1] if begun else None
    for again in range(1_000):
        if aside is not None:
            break
        made = state_dir / f"{ASIDE}{_day(now).replace(':', '')}{f'-{again}' if again else ''}"
        with suppress(FileExistsError):
            made.mkdir()
            aside = made
    if aside is None:
        raise JournalError(f"there are too many {ASIDE}* in {state_dir}", hint="move them elsewhere")
    for part in parts:
        if part.exists() and not (aside / part.name).exists():
            part.rename(aside / part.name)
            fail_point("salvage.moved")
    sync_directory(aside)
    sync_directory(state_dir)
    return str(aside)


def _day(utc: float) -> str:
    return datetime.fromtimestamp(utc, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
