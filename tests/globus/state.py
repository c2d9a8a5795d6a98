"""What the emulated service knows, in one SQLite file, and the clock it goes by.

Every answer is committed before it is sent, so that a kill at any instant loses
nothing that a client was told. One process opens the file; its threads share one
connection under one lock, because a transaction here costs less than a context switch.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Document = dict[str, Any]

# What a test may turn. Where the real behaviour is unknown the default is what the
# documentation suggests, and the setting is how a test tries the other answer.
SETTINGS: dict[str, Any] = {
    # Auth
    "token_lifetime_s": 172_800,
    # Transfer: submission
    "running_max": 3,                  # tasks of one kind that one user has under way; the others queue
    "pending_max": 100,
    "submission_ids": "issued",        # or "any": the service takes ids that it did not give out
    "submission_id_memory_s": 0,       # 0: never forgets one
    "submission_max_bytes": 0,         # 0: no limit
    "duplicate_status": 200,
    "conflict": "any",                 # one equal pair of paths suffices; or "all", or "off"
    "label_max": 128,
    "deadline_s": 86_400,
    # Transfer: the movement
    "bytes_per_s": 0,                  # per task; 0: as fast as it goes
    "task_seconds": 0,                 # a task takes at least this long
    "retry_s": 0.05,                   # first pause after a fault; doubles up to retry_max_s
    "retry_max_s": 1.0,
    "history_s": 30 * 86_400,          # then the list of files is gone and history_deleted is set
    # Transfer: sharing
    "access_repeat": "conflict",       # a second equal rule: 409 Exists; or "again": 201 with the first id
    # Flows
    "flow_label_max": 64,
    "flow_tag_max": 64,
    "flow_tags_max": 10,
    "flow_state_max_bytes": 200 * 1024,
    "flow_wait_scale": 1.0,            # Wait states take this many times their seconds
    "flow_poll_s": 0.02,               # between two looks at an action that is under way
    "flow_steps_max": 10_000,          # a loop that never ends fails the run instead of filling the disk
    "runs_listed_without": [],        # keys that the list of runs leaves out
    "run_listed_after_s": 0,           # until a new run shows in the list (never in GET of the run itself)
    "flow_listed_after_s": 0,          # until a new flow shows in the list (never in GET of the flow itself)
    # Search
    "ingest_s": 0,
    # Compute
    "task_groups": "existing",         # or "any": a group of the client's choice is made
    "task_listed_after_s": 0,          # until a new task shows in its group (never in GET of the task itself)
    "compute_results": "asked",        # in the form that was asked for; or "both", or "pickled": as older ones do
}  # fmt: skip

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS docs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL, doc TEXT NOT NULL,
  UNIQUE (kind, id)
);
CREATE INDEX IF NOT EXISTS docs_owner ON docs (kind, owner, seq);
CREATE TABLE IF NOT EXISTS open_tasks (task_id TEXT PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS items (
  task_id TEXT NOT NULL, number INTEGER NOT NULL, source TEXT NOT NULL, destination TEXT NOT NULL,
  state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, doc TEXT NOT NULL,
  PRIMARY KEY (task_id, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_pair ON items (source, destination);
CREATE INDEX IF NOT EXISTS items_state ON items (task_id, state, due, number);
CREATE TABLE IF NOT EXISTS lines (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, of TEXT NOT NULL, doc TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS lines_of ON lines (of, seq);
CREATE TABLE IF NOT EXISTS requests (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL,
  query TEXT NOT NULL, status INTEGER NOT NULL, carried_out INTEGER NOT NULL, fault TEXT, identity TEXT, body TEXT
);
"""


def new_id() -> str:
    return str(uuid.uuid4())


def iso(seconds: float) -> str:
    """Return an instant as Transfer and Flows write it: UTC, whole seconds unless there is a fraction."""
    return datetime.fromtimestamp(round(seconds, 6), UTC).isoformat()


def instant(text: str) -> float:
    """Return the seconds of an ISO 8601 text; one without a zone is UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Store:
    """Documents by kind and id, plus tables for what would be too long for one document."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._lock = threading.RLock()
        self._depth = 0
        self._bells: list[threading.Event] = []
        self._db = sqlite3.connect(directory / "globus.sqlite", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # a killed process is the case here, not a lost machine
        self._db.executescript(_SCHEMA)
        self._settings = SETTINGS | self.meta("settings", {})
        self._clock = self.meta("clock", {"real": 0.0, "said": 0.0, "scale": 1.0})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside, or nothing. Nested ones belong to the outermost."""
        with self._lock:
            if self._depth:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
            except BaseException:
                self._depth = 0
                self._db.execute("ROLLBACK")
                raise
            self._depth = 0
            self._db.execute("COMMIT")

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def sql_many(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        with self._lock:
            self._db.executemany(statement, rows)

    def clear(self) -> None:
        """Forget everything, settings and clock too."""
        with self.transaction():
            for table in ("meta", "docs", "open_tasks", "items", "lines", "requests"):
                self.sql(f"DELETE FROM {table}")
            self._settings = dict(SETTINGS)
            self._clock = {"real": 0.0, "said": 0.0, "scale": 1.0}
        self.ring()

    # -------------------------------------------------------------- documents

    def get(self, kind: str, key: str) -> Document | None:
        rows = self.sql("SELECT doc FROM docs WHERE kind = ? AND id = ?", kind, key)
        return json.loads(rows[0][0]) if rows else None

    def put(self, kind: str, key: str, doc: Document, owner: str = "") -> None:
        """Insert, or replace the document and keep its place and owner."""
        self.sql(
            "INSERT INTO docs (kind, id, owner, doc) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (kind, id) DO UPDATE SET doc = excluded.doc",
            kind, key, owner, json.dumps(doc),
        )  # fmt: skip

    def remove(self, kind: str, key: str) -> bool:
        with self._lock:
            return self._db.execute("DELETE FROM docs WHERE kind = ? AND id = ?", (kind, key)).rowcount > 0

    def all(self, kind: str, owner: str | None = None) -> list[Document]:
        """Return all documents of a kind in the order in which they came."""
        if owner is None:
            rows = self.sql("SELECT doc FROM docs WHERE kind = ? ORDER BY seq", kind)
        else:
            rows = self.sql("SELECT doc FROM docs WHERE kind = ? AND owner = ? ORDER BY seq", kind, owner)
        return [json.loads(row[0]) for row in rows]

    # ------------------------------------------------- lists that only grow

    def append(self, of: str, doc: Document) -> None:
        self.sql("INSERT INTO lines (of, doc) VALUES (?, ?)", of, json.dumps(doc))

    def lines(self, of: str) -> list[Document]:
        return [json.loads(row[0]) for row in self.sql("SELECT doc FROM lines WHERE of = ? ORDER BY seq", of)]

    # ------------------------------------------------------ settings, clock

    def meta(self, key: str, default: Any) -> Any:
        rows = self.sql("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else default

    def set_meta(self, key: str, value: Any) -> None:
        self.sql("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, json.dumps(value))

    def setting(self, name: str) -> Any:
        return self._settings[name]

    def settings(self) -> Document:
        return dict(self._settings)

    def turn(self, changes: Document) -> None:
        """Change settings for good. Raises KeyError for one that does not exist."""
        for name in changes:
            if name not in SETTINGS:
                raise KeyError(f"no setting {name!r}; there are {', '.join(SETTINGS)}")
        with self.transaction():
            self.set_meta("settings", self.meta("settings", {}) | changes)
        self._settings = self._settings | changes

    def now(self) -> float:
        clock = self._clock
        if not clock["real"]:
            return time.time()
        return clock["said"] + (time.time() - clock["real"]) * clock["scale"]

    def stamp(self) -> str:
        return iso(self.now())

    def steer(self, *, advance_s: float = 0.0, scale: float | None = None) -> float:
        """Move the clock forward, or let it run faster; return what it says now."""
        now = self.now() + advance_s
        scale = self._clock["scale"] if scale is None else scale
        clock = {"real": time.time(), "said": now, "scale": scale}
        with self.transaction():
            self.set_meta("clock", clock)
        self._clock = clock
        self.ring()
        return now

    # --------------------------------------------------------------- wake-ups

    def bell(self) -> threading.Event:
        """Return an event that `ring` sets; one per thread that waits for work."""
        bell = threading.Event()
        self._bells.append(bell)
        return bell

    def ring(self) -> None:
        for bell in self._bells:
            bell.set()
