"""What rsyncs and rclones were about to write, and where: so that our earlier version is told from a stranger's file.

One small table, written before a transfer. When it is full the oldest go: their
files then count as a stranger's, and are held, not replaced.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable

VERSIONS_MAX = 3  # of one target that are asked for
ROWS_MAX = 1_000_000  # some 60 MB
BUSY_S = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS written (
    id INTEGER PRIMARY KEY, target BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    UNIQUE (target, size, mtime_ns)
)
"""


class Written:
    """Shared by all workers. Raises sqlite3.Error."""

    def __init__(self, state_dir: str) -> None:
        self._file = sqlite3.connect(os.path.join(state_dir, "written.sqlite"), timeout=BUSY_S)
        with self._file:
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute(_TABLE)

    def add(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """Remember (target, size, mtime_ns) durably."""
        with self._file:
            self._file.executemany(
                "INSERT OR REPLACE INTO written (target, size, mtime_ns) VALUES (?, ?, ?)",
                ((_key(target), size, mtime_ns) for target, size, mtime_ns in rows),
            )
            (newest,) = self._file.execute("SELECT coalesce(max(id), 0) FROM written").fetchone()
            self._file.execute("DELETE FROM written WHERE id <= ?", (newest - ROWS_MAX,))

    def versions(self, target: str) -> list[tuple[int, int]]:
        """Return (size, mtime_ns) of what was to be written there, the newest first."""
        return self._file.execute(
            "SELECT size, mtime_ns FROM written WHERE target = ? ORDER BY id DESC LIMIT ?",
            (_key(target), VERSIONS_MAX),
        ).fetchall()


def _key(target: str) -> bytes:
    return hashlib.blake2b(os.fsencode(target), digest_size=16).digest()
