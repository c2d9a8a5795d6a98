"""What `copy` must remember about its own work: proofs, parts, and what it wrote.

One SQLite file in the provider's own state directory, written by the workers
(a proof is on disk before its file is renamed) and read by the daemon. All of
it can be lost without harm: a proof is then made again by reading both sides,
a part is written anew, and an earlier version of ours counts as foreign.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

WROTE_MAX = 5_000_000  # targets known to be ours, some 200 bytes each; the oldest are forgotten
PROOFS_MAX = 1_000_000  # proofs not yet taken by the journal; older ones are made again when asked for
BUSY_S = 20.0  # longest wait for another worker's commit

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- What was read back from the disk, before the rename. `temp` still holds it if the rename did not happen.
CREATE TABLE IF NOT EXISTS proof (
    run INTEGER, file INTEGER, dest INTEGER, temp BLOB NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, file, dest)) WITHOUT ROWID;
-- Members that were no longer the manifest's version.
CREATE TABLE IF NOT EXISTS changed (
    run INTEGER, file INTEGER, path TEXT NOT NULL, why TEXT NOT NULL, PRIMARY KEY (run, file)) WITHOUT ROWID;
-- Large files under way, and the digests of the blocks of each segment that was read back.
CREATE TABLE IF NOT EXISTS part (
    run INTEGER, file INTEGER, dest INTEGER, temp BLOB NOT NULL, version TEXT NOT NULL,
    PRIMARY KEY (run, file, dest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segment (
    run INTEGER, file INTEGER, dest INTEGER, number INTEGER, blocks BLOB NOT NULL,
    PRIMARY KEY (run, file, dest, number)) WITHOUT ROWID;
-- The last two things we wrote at a target (hash of its path), as the file system showed them: two, because
-- the last is recorded before its rename, and a crash between leaves the one before. `source` is the root and the
-- path below it, NULL in rows of earlier versions: what another source was written to is not ours to replace.
CREATE TABLE IF NOT EXISTS wrote (
    target INTEGER PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    before_size INTEGER, before_mtime_ns INTEGER, day INTEGER NOT NULL, source BLOB, before_source BLOB);
"""


class Wrote(NamedTuple):
    """One thing that we wrote at a target."""

    size: int
    mtime_ns: int
    source: bytes | None  # None: not known


class Proven(NamedTuple):
    """One file at one destination, read back and equal."""

    file: int
    dest: int
    target: bytes
    temp: bytes  # b'' if the target stood there already
    inode: int
    size: int
    mtime_ns: int
    record: dict[str, Any]
    source: bytes = b""  # root, NUL, path below it
    seen: Wrote | None = None  # what was last written at the target when it was decided that it may be


class Part(NamedTuple):
    temp: bytes
    version: str
    segments: tuple[bytes, ...]  # block digests of each, from the beginning without a gap


def target_key(target: bytes) -> int:
    """Return the number by which a target is remembered."""
    return int.from_bytes(hashlib.blake2b(target, digest_size=8).digest(), "big", signed=True)


def inode_key(inode: int) -> int:
    return inode & 0x7FFF_FFFF_FFFF_FFFF  # SQLite's integers are signed


class Store:
    """The file; usable from any thread. Raises sqlite3.Error, `sqlite3.OperationalError` for a full disk."""

    def __init__(self, directory: str, *, make: bool = False) -> None:
        self._lock = threading.Lock()
        path = os.path.join(directory, "copy.db")
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if make:
            self._db.executescript(SCHEMA)
            known = {row[1] for row in self._db.execute("PRAGMA table_info(wrote)")}
            for column in {"source", "before_source"} - known:  # a file of an earlier version
                self._db.execute(f"ALTER TABLE wrote ADD COLUMN {column} BLOB")
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('owner', ?)", (os.urandom(3).hex(),))
            self.thin()

    def owner(self) -> str:
        """Return six hex digits that tell our temporary files from those of another daemon."""
        with self._lock:
            return str(self._db.execute("SELECT value FROM meta WHERE key = 'owner'").fetchone()[0])

    @contextlib.contextmanager
    def _commit(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ------------------------------------------------------------------ workers

    def prove(self, run: int, rows: Sequence[Proven], *, replace: bool = False) -> set[tuple[int, int]]:
        """Record proofs, durably, and that the targets are ours.

        Return (file, dest) of those left out: another source was written to the
        target since it was looked at. Who records first may rename.
        """
        day = int(time.time() // 86_400)
        lost: set[tuple[int, int]] = set()
        with self._commit() as db:
            if not replace:
                for row in rows:
                    last = self._wrote(row.target)[:1] if row.temp else ()
                    if last and last[0] != row.seen and last[0].source != row.source:
                        lost.add((row.file, row.dest))
            rows = [row for row in rows if (row.file, row.dest) not in lost]
            db.executemany(
                "INSERT OR REPLACE INTO proof VALUES (?,?,?,?,?,?,?,?)",
                [(run, r.file, r.dest, r.temp, inode_key(r.inode), r.size, r.mtime_ns, json.dumps(r.record))
                 for r in rows],
            )
            db.executemany(
                "INSERT INTO wrote (target, size, mtime_ns, day, source) VALUES (?1, ?2, ?3, ?4, ?5)"
                " ON CONFLICT (target) DO UPDATE SET before_size = size, before_mtime_ns = mtime_ns,"
                " before_source = source, size = ?2, mtime_ns = ?3, day = ?4, source = ?5"
                " WHERE size <> ?2 OR mtime_ns <> ?3 OR source IS NOT ?5",
                [(target_key(r.target), r.size, r.mtime_ns, day, r.source) for r in rows if r.temp],
            )
        return lost

    def add(self, run: int, rows: Sequence[Proven]) -> None:
        """Say more of what was proved. Not synced: whoever finds it lacking proves it again."""
        if not rows:
            return
        with self._commit(synced=False) as db:
            db.executemany("UPDATE proof SET record = ? WHERE run = ? AND file = ? AND dest = ?",
                           [(json.dumps(r.record), run, r.file, r.dest) for r in rows])

    def unprove(self, run: int, file: int, dest: int) -> None:
        """Take a proof back."""
        with self._commit() as db:
            db.execute("DELETE FROM proof WHERE run = ? AND file = ? AND dest = ?", (run, file, dest))

    def not_placed(self, run: int, row: Proven) -> None:
        """Take back a proof whose file could not be put in place, and that it was written there."""
        with self._commit() as db:
            db.execute("DELETE FROM proof WHERE run = ? AND file = ? AND dest = ?", (run, row.file, row.dest))
            ours = (target_key(row.target), row.size, row.mtime_ns, row.source)
            db.execute(
                "UPDATE wrote SET before_size = NULL, before_mtime_ns = NULL, before_source = NULL"
                " WHERE target = ? AND before_size = ? AND before_mtime_ns = ? AND before_source IS ?", ours
            )
            last = " WHERE target = ? AND size = ? AND mtime_ns = ? AND source IS ?"
            db.execute(
                "UPDATE wrote SET size = before_size, mtime_ns = before_mtime_ns, source = before_source,"
                f" before_size = NULL, before_mtime_ns = NULL, before_source = NULL{last} AND before_size IS NOT NULL",
                ours,
            )
            db.execute(f"DELETE FROM wrote{last}", ours)

    def proofs(self, run: int) -> dict[tuple[int, int], tuple[bytes, int, int, int, dict[str, Any]]]:
        """Return (file, dest) -> temp, inode, size, mtime_ns, record."""
        with self._lock:
            rows = self._db.execute(
                "SELECT file, dest, temp, inode, size, mtime_ns, record FROM proof WHERE run = ?", (run,)
            ).fetchall()
        return {(row[0], row[1]): (row[2], row[3], row[4], row[5], json.loads(row[6])) for row in rows}

    def change(self, run: int, file: int, path: str, why: str) -> None:
        with self._commit() as db:
            db.execute("INSERT OR REPLACE INTO changed VALUES (?,?,?,?)", (run, file, json.dumps(path), why))

    def changed(self, run: int) -> dict[int, tuple[str, str]]:
        """Return file -> path, why."""
        with self._lock:
            rows = self._db.execute("SELECT file, path, why FROM changed WHERE run = ?", (run,)).fetchall()
        return {row[0]: (json.loads(row[1]), row[2]) for row in rows}

    def wrote(self, target: bytes) -> tuple[Wrote, ...]:
        """Return what we last put at a target, and what we put there before."""
        with self._lock:
            return self._wrote(target)

    def _wrote(self, target: bytes) -> tuple[Wrote, ...]:
        row = self._db.execute(
            "SELECT size, mtime_ns, source, before_size, before_mtime_ns, before_source FROM wrote WHERE target = ?",
            (target_key(target),),
        ).fetchone()
        if row is None:
            return ()
        return (Wrote(*row[:3]),) if row[3] is None else (Wrote(*row[:3]), Wrote(*row[3:]))

    def begin_part(self, run: int, file: int, dest: int, temp: bytes, version: str) -> None:
        with self._commit() as db:
            db.execute("DELETE FROM segment WHERE run = ? AND file = ? AND dest = ?", (run, file, dest))
            db.execute("INSERT OR REPLACE INTO part VALUES (?,?,?,?,?)", (run, file, dest, temp, version))

    def add_segment(self, run: int, file: int, dest: int, number: int, blocks: bytes) -> None:
        with self._commit() as db:
            db.execute("INSERT OR REPLACE INTO segment VALUES (?,?,?,?,?)", (run, file, dest, number, blocks))

    def part(self, run: int, file: int, dest: int) -> Part | None:
        with self._lock:
            row = self._db.execute(
                "SELECT temp, version FROM part WHERE run = ? AND file = ? AND dest = ?", (run, file, dest)
            ).fetchone()
            if row is None:
                return None
            rows = self._db.execute(
                "SELECT number, blocks FROM segment WHERE run = ? AND file = ? AND dest = ? ORDER BY number",
                (run, file, dest),
            ).fetchall()
        whole = [blocks for place, (number, blocks) in enumerate(rows) if number == place]
        return Part(row[0], row[1], tuple(whole))

    def end_part(self, run: int, file: int, dest: int) -> None:
        with self._commit() as db:
            for table in ("part", "segment"):
                db.execute(f"DELETE FROM {table} WHERE run = ? AND file = ? AND dest = ?", (run, file, dest))

    def temps(self, run: int) -> set[bytes]:
        """Return the temporary files of a run that are worth keeping."""
        with self._lock:
            rows = self._db.execute(
                "SELECT temp FROM proof WHERE run = ? UNION SELECT temp FROM part WHERE run = ?", (run, run)
            ).fetchall()
        return {row[0] for row in rows}

    # ------------------------------------------------------------------- daemon

    def forget(self, run: int) -> None:
        """Drop all that is known of a run; what was written stays known as ours."""
        with self._commit() as db:
            for table in ("proof", "changed", "part", "segment"):
                db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))

    def thin(self) -> None:
        """Keep the tables within their limits, oldest first."""
        with self._commit() as db:
            for table, most in (("proof", PROOFS_MAX), ("changed", PROOFS_MAX), ("segment", PROOFS_MAX)):
                count = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                if count > most:
                    db.execute(
                        f"DELETE FROM {table} WHERE run <= (SELECT run FROM {table} ORDER BY run LIMIT 1 OFFSET ?)",
                        (count - most,),
                    )
            count = db.execute("SELECT count(*) FROM wrote").fetchone()[0]
            if count > WROTE_MAX:
                db.execute(
                    "DELETE FROM wrote WHERE target IN (SELECT target FROM wrote ORDER BY day LIMIT ?)",
                    (count - WROTE_MAX,),
                )

    def close(self) -> None:
        with self._lock:
            self._db.close()
