"""Tell the whole journal, a line a file, for audits.

Read page by page, each page in a short read transaction of its own
(docs/decisions/0018): the daemon's -wal can be folded between two pages, and a
reader that is slow, stopped or killed holds nothing. What a line says of a
batch is of one instant; batches that close after the beginning are not told.
Memory is bounded by a page, or by one batch where that is larger.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import json
import pwd
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from trigger_daemon.core.model import RELEASED, RIDER
from trigger_daemon.database import JOURNAL, ask, from_json, from_name, from_number, from_text, to_name, unreadable
from trigger_daemon.errors import TriggerError
from trigger_daemon.reader import members_of

PAGE_FILES = 5_000  # of a page, some 20 ms of one read transaction; one batch may have more
PAGE_BATCHES = 1_000
PAGE_IDS = 20_000  # batches looked through for the rule and the time that are wanted
PAGE_CLAIMS = 10_000
PAGE_ORDERS = 1_000
LINES = 1_000  # written at a time

Format = Literal["jsonl", "csv"]
T = TypeVar("T")

# Every column, in its order; docs/how-to/audit.md says what each means.
COLUMNS = (
    "kind", "time", "host", "user", "rule", "rule_set", "run", "group", "action", "reason",
    "root", "path", "size", "mtime_ns", "role", "flag",
    "state", "because", "changed_time", "attempts", "error", "transitions",
    "to", "digest", "content", "proof_time", "handle", "thinned",
    "reclaim_state", "reclaim_time", "reclaim_because", "reclaim_proofs",
    "verb", "args", "who", "why", "answer",
)  # fmt: skip

_EMPTY: dict[str, Any] = dict.fromkeys(COLUMNS)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which batches: closed at or after `since`, before `until` (Unix seconds), of this rule."""

    since: float | None = None
    until: float | None = None
    rule: str | None = None

    def holds(self, time: float) -> bool:
        return (self.since is None or time >= self.since) and (self.until is None or time < self.until)


class _Batch(NamedTuple):
    """What all lines of a batch say alike, and what its files are looked up in."""

    id: int
    said: dict[str, Any]
    manifest: str
    proof: str | None


class _File(NamedTuple):
    root: str
    number: int  # of the root
    path: str
    size: int
    mtime_ns: int
    role: str = ""
    flag: str = ""
    content: str = ""


class _Told(NamedTuple):
    """A line to be: what is common to its batch, the file, its proof's records, and what reclaim did with it."""

    said: Mapping[str, Any]
    file: _File | None = None
    records: Sequence[Mapping[str, Any]] = ()
    reclaim: Mapping[str, Any] = {}


def export(state_dir: Path, wanted: Wanted, form: Format) -> Iterator[bytes]:
    """Yield the lines, a page at a time. Raises JournalError; TriggerError for a rule that never was."""
    write = _csv if form == "csv" else _jsonl
    if form == "csv":
        yield _csv([dict(zip(COLUMNS, COLUMNS, strict=True))])
    for page in _Source(state_dir, wanted).pages():
        lines = map(_line, page)
        while together := list(itertools.islice(lines, LINES)):
            yield write(together)
        del page, lines  # before the next is read


class _Source:
    """One export."""

    def __init__(self, state_dir: Path, wanted: Wanted) -> None:
        self._path = Path(state_dir).absolute() / JOURNAL
        self._wanted = wanted
        self._rule: int | None = None
        try:
            uid = self._path.stat().st_uid
        except OSError as error:
            raise unreadable(self._path) from error
        try:
            user = pwd.getpwuid(uid).pw_name
        except KeyError:
            user = f"uid {uid}"
        self._always = {**_EMPTY, "host": socket.gethostname(), "user": user}

    def pages(self) -> Iterator[list[_Told]]:
        """Yield pages: of batches by their number, then of thinned ones, then of orders."""
        last, self._rules, self._roots, self._sets = self._ask(_begin)
        if self._wanted.rule is not None:
            found = [number for number, name in self._rules.items() if name == self._wanted.rule]
            if not found:
                known = ", ".join(sorted(self._rules.values())) or "none"
                raise TriggerError(f"the journal knows no rule {self._wanted.rule!r}", hint=f"there are: {known}")
            self._rule = found[0]
        after = 0
        while after < last:
            after, page = self._ask(partial(self._batches, after=after, last=last))
            yield page
            del page
        # Asked now: a batch that was thinned before its page came is among these.
        place: tuple[Any, ...] | None = (0, b"", 0, 0, 0) if self._ask(_any_thinned) else None
        while place is not None:
            place, page = self._ask(partial(self._claims, place=place, last=last))
            yield page
            del page
        order: int | None = 0 if self._rule is None else None
        while order is not None:
            order, page = self._ask(partial(self._orders, after=order))
            yield page
            del page

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        return ask(self._path, question)

    # ------------------------------------------------------------------- batches

    def _batches(self, sql: sqlite3.Connection, after: int, last: int) -> tuple[int, list[_Told]]:
        """Return up to where this page goes, and its lines."""
        until = min(last, after + PAGE_IDS)
        chosen: list[int] = []
        files = 0
        seen = sql.execute(
            "SELECT id, rule, closed_time, files FROM batch WHERE id > ? AND id <= ? ORDER BY id", (after, until)
        )
        for id, rule, closed, count in seen:
            if (self._rule is not None and rule != self._rule) or not self._wanted.holds(closed):
                continue
            if chosen and (files + count > PAGE_FILES or len(chosen) >= PAGE_BATCHES):
                until = chosen[-1]
                break
            chosen.append(id)
            files += count
        seen.close()
        if not chosen:
            return until, []
        reclaimed = sql.execute("SELECT EXISTS (SELECT 1 FROM reclaim_file)").fetchone()[0]
        told: list[_Told] = []
        for batch in self._whole(sql, chosen):
            proved = _proved(batch.proof)
            for member in members_of(batch.manifest):
                root = self._root(sql, member.root)
                file = _File(root, member.root, member.path, *member[3:])
                records = proved.get((root, file.path)) or proved.get((None, file.path)) or ()
                told.append(_Told(batch.said, file, records, _reclaim(sql, file) if reclaimed else {}))
        return until, told

    def _whole(self, sql: sqlite3.Connection, chosen: Sequence[int]) -> Iterator[_Batch]:
        """Yield those of the batches that have a manifest."""
        first, last, these = chosen[0], chosen[-1], set(chosen)
        moves: dict[int, list[dict[str, Any]]] = {}
        for run, before, after, because, at in sql.execute(
            "SELECT run, from_state, to_state, because, time FROM transition WHERE run BETWEEN ? AND ? ORDER BY id",
            (first, last),
        ):
            if run in these:
                moves.setdefault(run, []).append(
                    {"from": before, "to": after, "because": from_text(because), "time": _time(at)}
                )
        handles = dict(sql.execute(
            "SELECT run, handle FROM attempt WHERE run BETWEEN ? AND ? ORDER BY run, attempt", (first, last)
        ))  # the last attempt's stays
        for row in sql.execute(
            "SELECT batch.id, batch.rule, captures, reason, closed_time, state, because, changed_time,"
            " attempts, error, request, manifest, proof.time, proof.members FROM batch JOIN run ON run.id = batch.id"
            " LEFT JOIN proof ON proof.run = batch.id AND proof.attempt ="
            " (SELECT max(attempt) FROM proof WHERE proof.run = batch.id)"
            " WHERE batch.id BETWEEN ? AND ? AND (? IS NULL OR batch.rule = ?) AND manifest IS NOT NULL"
            " ORDER BY batch.id",
            (first, last, self._rule, self._rule),
        ):
            id, (request, manifest, at, proof) = row[0], row[10:]
            if id not in these:
                continue
            said = self._run(*row[:10])
            begun = {"from": None, "to": "PENDING", "because": said["reason"], "time": said["time"]}
            said |= {
                "action": (from_json(request) or {}).get("action"), "transitions": [begun, *moves.get(id, ())],
                "handle": from_json(handles.get(id)), "proof_time": _time(at), "thinned": False,
            }  # fmt: skip
            yield _Batch(id, said, manifest, proof)

    def _run(
        self, id: int, rule: int, captures: str, reason: Any, closed: float, state: str, because: Any, changed: float,
        attempts: int, error: Any,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            **self._always, "kind": "file", "time": _time(closed), "rule": self._rules.get(rule, str(rule)),
            "rule_set": self._set_at(closed), "run": id, "group": from_json(captures), "reason": from_text(reason),
            "state": state, "because": from_text(because), "changed_time": _time(changed), "attempts": attempts,
            "error": from_text(error or "") or None,
        }  # fmt: skip

    def _root(self, sql: sqlite3.Connection, number: int) -> str:
        """Return a root's path; one may have been added since the beginning."""
        if number not in self._roots:
            found = sql.execute("SELECT path FROM root WHERE id = ?", (number,)).fetchone()
            self._roots[number] = from_name(found[0]) if found else str(number)
        return self._roots[number]

    def _set_at(self, closed: float) -> int | None:
        """Return the rule set that was in force, as far as it is known."""
        times, numbers = self._sets
        place = bisect.bisect_right(times, closed)
        return numbers[place - 1] if place else None

    # ------------------------------------------------------- what thinning has left

    def _claims(
        self, sql: sqlite3.Connection, place: tuple[Any, ...], last: int
    ) -> tuple[tuple[Any, ...] | None, list[_Told]]:
        """Return where the next page begins, None at the end, and the files of thinned batches among these claims."""
        page = sql.execute(
            "SELECT dir, name, rule, size, mtime_ns, batch FROM claim"
            " WHERE (dir, name, rule, size, mtime_ns) > (?, ?, ?, ?, ?)"
            " ORDER BY dir, name, rule, size, mtime_ns LIMIT ?",
            (*place, PAGE_CLAIMS),
        ).fetchall()
        told = []
        for directory, name, rule, size, mtime_ns, batch in page:
            if not 0 < batch <= last or rule < 0 or rule >= RELEASED:
                continue
            said = self._thinned(sql, batch)
            if said is None:
                continue
            root, below = sql.execute("SELECT root, path FROM dir WHERE id = ?", (directory,)).fetchone()
            path = from_name(below + b"/" + name if below else name)
            role = "companion" if rule >= RIDER else ""
            file = _File(self._root(sql, root), root, path, size, from_number(mtime_ns), role)
            told.append(_Told(said, file, (), _reclaim(sql, file)))
        return (page[-1][:5] if len(page) == PAGE_CLAIMS else None), told

    def _thinned(self, sql: sqlite3.Connection, batch: int) -> dict[str, Any] | None:
        row = sql.execute(
            "SELECT batch.id, batch.rule, captures, reason, closed_time, state, because, changed_time, attempts, error"
            " FROM batch JOIN run ON run.id = batch.id WHERE batch.id = ? AND manifest IS NULL",
            (batch,),
        ).fetchone()
        if row is None or (self._rule is not None and row[1] != self._rule) or not self._wanted.holds(row[4]):
            return None
        return {**self._run(*row), "thinned": True}

    # -------------------------------------------------------------------- orders

    def _orders(self, sql: sqlite3.Connection, after: int) -> tuple[int | None, list[_Told]]:
        page = sql.execute(
            "SELECT id, verb, args, who, why, answer, time FROM ordered WHERE id > ? ORDER BY id LIMIT ?",
            (after, PAGE_ORDERS),
        ).fetchall()
        told = [
            _Told({
                **self._always, "kind": "order", "time": _time(at), "rule_set": self._set_at(at),
                "verb": from_text(verb), "args": from_json(args), "who": from_text(who), "why": from_text(why),
                "answer": from_json(answer),
            })
            for _, verb, args, who, why, answer, at in page if self._wanted.holds(at)
        ]  # fmt: skip
        return (page[-1][0] if len(page) == PAGE_ORDERS else None), told


def _begin(sql: sqlite3.Connection) -> tuple[int, dict[int, str], dict[int, str], tuple[list[float], list[int]]]:
    """Return the newest batch, the names of rules, the roots, and when which rule set was accepted."""
    last = sql.execute("SELECT coalesce(max(id), 0) FROM batch").fetchone()[0]
    rules = dict(sql.execute("SELECT id, name FROM rule"))
    roots = {number: from_name(path) for number, path in sql.execute("SELECT id, path FROM root")}
    sets = sorted(sql.execute("SELECT time, id FROM rule_set"))
    return last, rules, roots, ([at for at, _ in sets], [number for _, number in sets])


def _any_thinned(sql: sqlite3.Connection) -> bool:
    return bool(sql.execute("SELECT EXISTS (SELECT 1 FROM batch WHERE manifest IS NULL)").fetchone()[0])


def _proved(proof: str | None) -> dict[tuple[str | None, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for record in from_json(proof) or ():
        found.setdefault((record.get("root"), record["path"]), []).append(record)
    return found


def _line(told: _Told) -> dict[str, Any]:
    """Return the whole line."""
    file, records = told.file, told.records
    if file is None:
        return dict(told.said)
    return {
        **told.said, "root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns,
        "role": file.role, "flag": file.flag, "content": file.content or None,
        "to": [record["to"] for record in records if record.get("to") is not None],
        "digest": records[0].get("digest") if records else None, **told.reclaim,
    }  # fmt: skip


def _reclaim(sql: sqlite3.Connection, file: _File) -> dict[str, Any]:
    """Return what became of this version by reclaim, newest first; where its copies are proved to be."""
    for state, because, changed, proofs, size, mtime_ns in sql.execute(
        "SELECT state, because, changed_time, proofs, file.size, mtime_ns FROM reclaim_file AS file"
        " JOIN reclaim ON reclaim.id = file.reclaim WHERE root = ? AND path = ? ORDER BY reclaim.id DESC",
        (file.number, to_name(file.path)),
    ):
        if (size, from_number(mtime_ns)) != (file.size, file.mtime_ns):
            continue
        whole = f"{file.root.rstrip('/')}/{file.path}"
        return {
            "reclaim_state": state, "reclaim_because": from_text(because), "reclaim_time": _time(changed),
            "reclaim_proofs": [
                {"rule": proof["rule"], "run": proof["run"], "time": _time(proof["time"]), "to": to, "digest": digest}
                for proof in from_json(proofs) for path, to, digest in proof["copies"] if path == whole
            ],
        }  # fmt: skip
    return {}


# ------------------------------------------------------------------------- forms


def _time(utc: float | None) -> str | None:
    if utc is None:
        return None
    return datetime.fromtimestamp(utc, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """ASCII, so that any byte of a name survives as its surrogate escape."""
    return b"".join(_encode(row).encode() + b"\n" for row in rows)


_AS_JSON = (list, dict, bool)
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Lists and mappings are JSON; what is absent is empty; a byte that is no UTF-8 is its surrogate escape."""
    made = io.StringIO()
    out = csv.writer(made, lineterminator="\n")
    quoting = csv.writer(made, lineterminator="\n", quoting=csv.QUOTE_ALL)
    known: dict[int, str] = {}  # what all files of a batch share is one object: encoded once
    for row in rows:
        cells = list(row.values())
        for place, value in enumerate(cells):
            if isinstance(value, _AS_JSON):
                if (text := known.get(id(value))) is None:
                    text = known[id(value)] = _encode(value)
                cells[place] = text
        # The writer knows no end of a line but its own, and most readers do.
        returns = any(type(cell) is str and "\r" in cell for cell in cells)
        (quoting if returns else out).writerow(cells)
    return made.getvalue().encode("utf-8", "backslashreplace")
