"""The questions people have for the journal: runs, claims of a file, counts, alarms.

Read-only, one short transaction a question, everything fetched before it ends:
a command stopped in mid-output holds no snapshot. Works when the daemon is
down. Times are Unix seconds, UTC; the names of the fields are those of the
documented JSON.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trigger_daemon.core.lifecycle import ENDS
from trigger_daemon.core.model import RELEASED, RIDER, Member, RunState
from trigger_daemon.core.saved import Count
from trigger_daemon.database import (
    JOURNAL,
    Line,
    ask,
    from_json,
    from_name,
    from_number,
    from_text,
    to_json,
    to_name,
    to_text,
)

PAGE_IDS = 20_000  # batch ids looked through in one transaction, some 10 ms
SKIPS_MAX = 10_000  # orders that are looked through for who left a file out
FAULTS_MAX = 100  # of one kind, in `faults_of`: enough to see what is wrong

# States in which something may still happen by itself or by an operator, always (DESIGN: SUCCEEDED may be final).
_OPEN = frozenset({
    RunState.PENDING, RunState.STARTING, RunState.ACTIVE, RunState.INACTIVE, RunState.HELD, RunState.CANCELLING,
})  # fmt: skip

T = TypeVar("T")

_RUN = (
    "SELECT run.id, batch.rule, rule.name, batch.captures, run.state, run.because, batch.files, batch.bytes,"
    " batch.reason, run.attempts, run.error, run.hint, run.created_time, run.changed_time, run.final, run.destination,"
    " run.retry_time, run.waits_on FROM run {index} JOIN batch ON batch.id = run.id"
    " LEFT JOIN rule ON rule.id = batch.rule"
)


class ClaimOf(NamedTuple):
    """One version of a file that a rule dealt with.

    `batch` is a CLAIM_* code where no batch took it (0 baseline, -1 skipped,
    -2 marker, -3 rewrite ignored); then `state` and what belongs to a run are
    None and `closed_time` is when it was claimed. `proof_time` is the newest
    proof's, None while there is none or after it was thinned. `companion`:
    it rode along with a file that the rule took, and is claimed by nobody.
    """

    rule: str
    size: int
    mtime_ns: int
    batch: int
    state: str | None
    reason: str | None
    closed_time: float | None
    final: bool
    because: str | None
    error: str | None
    hint: str | None
    proof_time: float | None
    companion: bool = False


class ReclaimOf(NamedTuple):
    """A file that was taken away, or was to be. `place`: where it was found at the end (gone, at its name, ...)."""

    id: int
    rule: str
    run: int
    state: str  # intended, confirmed, done, kept
    because: str
    changed_time: float
    place: str
    hidden: str
    size: int
    mtime_ns: int
    proofs: list[dict[str, Any]]


class ReclaimFileOf(NamedTuple):
    """One file of such a set."""

    root: str
    path: str  # below it
    hidden: str
    size: int
    place: str


class Reader:
    """Asks the journal of a state directory. Every method raises JournalError (absent, not permitted, damaged)."""

    def __init__(self, state_dir: Path) -> None:
        """Remember where the journal is; nothing is opened before a question."""
        self.path = Path(state_dir).absolute() / JOURNAL
        self._line: Line | None = None

    @contextmanager
    def at_length(self) -> Iterator[Reader]:
        """Yield a reader for many questions of one thread, on one connection; each is a transaction of its own."""
        line = Line()
        reader = Reader(self.path.parent)
        reader._line = line
        try:
            yield reader
        finally:
            line.close()

    def runs(
        self,
        rule: str | None = None,
        state: str | None = None,
        group: Mapping[str, str] | None = None,
        limit: int = 100,
        before_id: int | None = None,
    ) -> list[dict[str, Any]]:
        """Return runs, newest first, as `runs list` shows them; `before_id` goes on from an earlier answer.

        A run is of `group` if it has all of these captures.
        """
        before = self._ask(_last_batch) + 1 if before_id is None else before_id
        found: list[dict[str, Any]] = []
        if state in _OPEN:
            return self._ask(lambda sql: _runs(sql, rule, state, group, 1, before, limit))
        while before > 1 and len(found) < limit:
            first, last, rest = max(1, before - PAGE_IDS), before, limit - len(found)
            found += self._ask(lambda sql: _runs(sql, rule, state, group, first, last, rest))  # noqa: B023 asked at once
            before = first
        return found

    def run(self, id: int) -> dict[str, Any] | None:
        """Return one run as `runs show` does, None if there is none.

        `attempts` is the list of its attempts here, `attempts_made` their
        number; `manifest` is empty and `thinned` true once it was thinned.
        """
        return self._ask(lambda sql: _run(sql, id))

    def newest_move(self) -> tuple[int, float]:
        """Return number and time of the newest transition of any run; (0, 0.0) while there is none."""
        return self.newest_move_until(float("inf"))

    def newest_move_until(self, time: float) -> tuple[int, float]:
        """Return the same of the newest transition that is not later than an instant."""
        question = "SELECT id, time FROM transition WHERE time <= ? ORDER BY id DESC LIMIT 1"
        row = self._ask(lambda sql: sql.execute(question, (time,)).fetchone())
        return row or (0, 0.0)

    def moves(self, after: int, limit: int, most: int) -> tuple[list[dict[str, Any]], int]:
        """Return ends and holds of runs after a transition, the oldest first, and how many were left out before them.

        At most `limit` of the newest `most`. Words and counts of a run are those of now.
        """
        return self._ask(lambda sql: _moves(sql, after, limit, most))

    def batches(self, rule: str | None = None, limit: int = 100, before_id: int | None = None) -> list[dict[str, Any]]:
        """Return closed batches, newest first: id, rule, group, reason, time, files, bytes, state of the run."""
        keys = ("id", "rule", "group", "reason", "files", "bytes", "state")
        rows = self.runs(rule=rule, limit=limit, before_id=before_id)
        return [{key: row[key] for key in keys} | {"time": row["created_time"]} for row in rows]

    def tally(self) -> dict[str, dict[str, Count]]:
        """Return rule name -> state -> how many runs, files, bytes; without reading history."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT rule.name, tally.rule, state, runs, files, bytes FROM tally"
                " LEFT JOIN rule ON rule.id = tally.rule WHERE runs > 0 ORDER BY rule.name, state"
            ).fetchall()
        )
        counts: dict[str, dict[str, Count]] = {}
        for name, rule, state, runs, files, size in rows:
            counts.setdefault(name or str(rule), {})[state] = Count(runs, files, size)
        return counts

    def open_alarms(self) -> list[dict[str, Any]]:
        """Return alarms that were not cleared, oldest first: what, since_time, hint, key, acked_time, acked_by."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT what, since_time, hint, key, acked_time, acked_by FROM alarm WHERE cleared_time IS NULL"
                " ORDER BY since_time, id"
            ).fetchall()
        )
        return [
            {
                "what": from_text(what),
                "since_time": since,
                "hint": from_text(hint),
                "key": from_text(key),
                "acked_time": acked,
                "acked_by": _words(by),
            }
            for what, since, hint, key, acked, by in rows
        ]

    def claims_of(self, root_path: str, rel_path: str) -> list[ClaimOf]:
        """Return every version of a file that a rule dealt with, newest batch first."""
        directory, _, name = rel_path.rpartition("/")
        values = (RIDER, to_name(root_path), to_name(directory), to_name(name))
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT rule.name, claim.rule, claim.size, claim.mtime_ns, claim.batch, run.state, batch.reason,"
                " coalesce(batch.closed_time, claim.time), run.final, run.because, run.error, run.hint,"
                " (SELECT max(time) FROM proof WHERE proof.run = run.id)"
                " FROM claim JOIN dir ON dir.id = claim.dir JOIN root ON root.id = dir.root"
                " LEFT JOIN batch ON batch.id = claim.batch LEFT JOIN run ON run.id = claim.batch"
                " LEFT JOIN rule ON rule.id = iif(claim.rule >= ?, batch.rule, abs(claim.rule))"
                " WHERE root.path = ? AND dir.path = ? AND claim.name = ? ORDER BY claim.batch DESC, claim.rule",
                values,
            ).fetchall()
        )
        return [
            ClaimOf(
                rule=name or str(rule),
                size=size,
                mtime_ns=from_number(mtime_ns),
                batch=batch,
                state=state,
                reason=_words(reason),
                closed_time=closed,
                final=bool(final),
                because=_words(because),
                error=_words(error),
                hint=_words(hint),
                proof_time=proved,
                companion=RIDER <= rule < RELEASED,
            )
            for name, rule, size, mtime_ns, batch, state, reason, closed, final, because, error, hint, proved in rows
        ]

    def taken_by(self, rule: str, after: int, limit: int) -> list[tuple[int, tuple[Member, ...]]]:
        """Return batches of a rule the oldest first, with their members as far as they are known."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT batch.id, batch.manifest FROM batch JOIN run ON run.id = batch.id"
                " WHERE batch.rule = (SELECT id FROM rule WHERE name = ?) AND batch.id > ? AND manifest IS NOT NULL"
                " ORDER BY batch.id LIMIT ?",
                (rule, after, limit),
            ).fetchall()
        )
        return [(batch, members_of(manifest)) for batch, manifest in rows]

    def proof_of(self, run: int) -> tuple[float, float, float, list[dict[str, Any]]] | None:
        """Return when a run was last proved (UTC, what was witnessed by then, when its attempt began), and the records.

        None if it was not, or they were thinned.
        """
        row = self._ask(
            lambda sql: sql.execute(
                "SELECT time, witnessed, coalesce((SELECT made_time FROM attempt WHERE attempt.run = proof.run"
                " AND attempt.attempt = proof.attempt), 0), members"
                " FROM proof WHERE run = ? ORDER BY attempt DESC LIMIT 1", (run,)
            ).fetchone()
        )
        return None if row is None else (row[0], row[1], row[2], from_json(row[3]))

    def request_of(self, run: int) -> Mapping[str, Any] | None:
        """Return what a run was to do; None if it is unknown, or was thinned."""
        row = self._ask(lambda sql: sql.execute("SELECT request FROM batch WHERE id = ?", (run,)).fetchone())
        found: Mapping[str, Any] | None = None if row is None or row[0] is None else from_json(row[0])
        return found

    def reclaims_of(self, root_path: str, rel_path: str) -> list[ReclaimOf]:
        """Return every set that a file was taken away with, or was to be, newest first."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT reclaim.id, rule.name, reclaim.run, reclaim.state, because, changed_time, place, hidden, size,"
                " mtime_ns, proofs FROM reclaim_file AS file JOIN root ON root.id = file.root"
                " JOIN reclaim ON reclaim.id = file.reclaim LEFT JOIN rule ON rule.id = reclaim.rule"
                " WHERE root.path = ? AND file.path = ? ORDER BY reclaim.id DESC",
                (to_name(root_path), to_name(rel_path)),
            ).fetchall()
        )
        return [
            ReclaimOf(
                id, name or "", run, state, from_text(because), changed, place, from_name(hidden), size,
                from_number(mtime_ns), from_json(proofs),
            )
            for id, name, run, state, because, changed, place, hidden, size, mtime_ns, proofs in rows
        ]  # fmt: skip

    def reclaim_set(self, id: int) -> tuple[ReclaimOf, list[ReclaimFileOf]] | None:
        """Return a set that was taken away, or was to be, as its first file tells it, and all its files."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT root.path, file.path, hidden, size, place FROM reclaim_file AS file"
                " JOIN root ON root.id = file.root WHERE file.reclaim = ? ORDER BY file.number",
                (id,),
            ).fetchall()
        )
        files = [
            ReclaimFileOf(from_name(root), from_name(path), from_name(hidden), size, place)
            for root, path, hidden, size, place in rows
        ]
        found = self.reclaims_of(files[0].root, files[0].path) if files else []
        of = next((one for one in found if one.id == id), None)
        return None if of is None else (of, files)

    def reclaimed(self, since_time: float) -> tuple[int, int, int]:
        """Return how many sets and files were taken away since then, and their bytes."""
        row = self._ask(
            lambda sql: sql.execute(
                "SELECT count(*), coalesce(sum(bytes), 0),"
                " coalesce(sum((SELECT count(*) FROM reclaim_file AS file WHERE file.reclaim = reclaim.id)), 0)"
                " FROM reclaim WHERE state = 'done' AND changed_time >= ?",
                (since_time,),
            ).fetchone()
        )
        return row[0], row[2], row[1]

    def root_paths(self) -> dict[int, str]:
        """Return every root that was ever watched, by its number."""
        rows = self._ask(lambda sql: sql.execute("SELECT id, path FROM root").fetchall())
        return {number: from_name(path) for number, path in rows}

    def roots(self) -> list[str]:
        """Return the path of every root that was ever watched."""
        return [from_name(path) for (path,) in self._ask(lambda sql: sql.execute("SELECT path FROM root").fetchall())]

    def rule_texts(self) -> list[tuple[str, str]]:
        """Return the files of the rule set last accepted, each its name and text; none before the first."""
        row = self._ask(lambda sql: sql.execute("SELECT source FROM rule_set ORDER BY id DESC LIMIT 1").fetchone())
        return texts_of(from_json(row[0])) if row else []

    def rules_time(self) -> float | None:
        """Return when the rule set in force was accepted."""
        row = self._ask(lambda sql: sql.execute("SELECT time FROM rule_set ORDER BY id DESC LIMIT 1").fetchone())
        return float(row[0]) if row else None

    def kept(self, key: str) -> Any:
        """Return a small durable setting, None if it is not set."""
        row = self._ask(lambda sql: sql.execute("SELECT value FROM kept WHERE key = ?", (to_text(key),)).fetchone())
        return from_json(row[0]) if row else None

    def baselines(self) -> dict[tuple[str, str], float]:
        """Return (rule name, root path) -> when its baseline was taken."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT rule.name, root.path, baseline.time FROM baseline JOIN rule ON rule.id = baseline.rule"
                " JOIN root ON root.id = baseline.root"
            ).fetchall()
        )
        return {(rule, from_name(root)): at for rule, root, at in rows}

    def skipped(self, path: str, rule: str, time: float | None) -> dict[str, Any] | None:
        """Return the order by which a person left a file out, of some the one given nearest to a time; None: no such.

        Of the newest SKIPS_MAX orders of that kind.
        """
        found = [
            order for order in self.orders(SKIPS_MAX, verb="files.skip")
            if order["args"].get("path") == path and rule in (order["answer"].get("rules") or ())
        ]  # fmt: skip
        return min(found, key=lambda order: abs(order["time"] - (time or order["time"])), default=None)

    def orders(self, limit: int = 100, *, verb: str = "") -> list[dict[str, Any]]:
        """Return what people ordered, newest first: verb, args, who, why, answer, time; of one verb if it is given."""
        rows = self._ask(
            lambda sql: sql.execute(
                "SELECT verb, args, who, why, answer, time FROM ordered WHERE ? IN ('', verb) ORDER BY id DESC LIMIT ?",
                (verb, limit),
            ).fetchall()
        )
        return [
            {
                "verb": from_text(verb),
                "args": from_json(args),
                "who": from_text(who),
                "why": from_text(why),
                "answer": from_json(answer),
                "time": at,
            }
            for verb, args, who, why, answer, at in rows
        ]

    def sole_copy_below(self, place: str) -> str | None:
        """Return a copy below a place (as `to` names it, with a slash behind it) that is all that is left of a file."""
        below = place.lower()  # too many are safe

        def look(sql: sqlite3.Connection) -> str | None:
            rows = sql.execute("SELECT proofs FROM reclaim WHERE id IN (SELECT reclaim FROM sole)")
            return next(
                (
                    str(to) for (proofs,) in rows for proof in from_json(proofs) for _, to, _ in proof.get("copies", ())
                    if str(to).lower().startswith(below)
                ),
                None,
            )  # fmt: skip

        return self._ask(look)

    @property
    def version(self) -> int:
        """The journal's schema."""
        return int(self._ask(lambda sql: sql.execute("PRAGMA user_version").fetchone())[0])

    def check(self) -> list[str]:
        """Return what is wrong with the journal, in words; reads all of it in one snapshot."""
        return self._ask(faults_of)

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        return ask(self.path, question, self._line)


# --------------------------------------------------------------------------- runs


def _words(text: str | bytes | None) -> str | None:
    return None if text is None else from_text(text)


# What is told of a run: each end, each hold, and what becomes of a held one.
_TOLD = (
    " FROM transition AS moved JOIN run ON run.id = moved.run JOIN batch ON batch.id = run.id"
    " LEFT JOIN rule ON rule.id = batch.rule WHERE moved.id > ? AND moved.from_state != moved.to_state"
    f" AND (moved.to_state IN ({', '.join(repr(str(state)) for state in sorted({*ENDS, RunState.HELD}))})"
    " OR moved.from_state = 'HELD' OR (moved.to_state = run.state AND run.final))"
)


def _moves(sql: sqlite3.Connection, after: int, limit: int, most: int) -> tuple[list[dict[str, Any]], int]:
    dropped = 0
    row = sql.execute(f"SELECT moved.id {_TOLD} ORDER BY moved.id DESC LIMIT 1 OFFSET ?", (after, most)).fetchone()
    if row is not None:
        (dropped,) = sql.execute(f"SELECT count(*) {_TOLD} AND moved.id <= ?", (after, row[0])).fetchone()
        after = row[0]
    rows = sql.execute(
        "SELECT moved.id, moved.run, coalesce(rule.name, batch.rule), batch.captures, moved.from_state, moved.to_state,"
        " moved.because, moved.time, run.final AND run.state = moved.to_state, batch.files, batch.bytes, batch.reason,"
        f" run.attempts, run.error, run.hint, run.created_time, run.output {_TOLD} ORDER BY moved.id LIMIT ?",
        (after, limit),
    ).fetchall()
    keys = (
        "id", "run", "rule", "group", "from", "state", "because", "time", "final", "files", "bytes", "reason",
        "attempts", "error", "hint", "created_time", "output",
    )  # fmt: skip
    moves = [dict(zip(keys, row, strict=True)) for row in rows]
    for move in moves:
        move |= {"group": from_json(move["group"]), "output": from_json(move["output"]), "final": bool(move["final"])}
        move |= {key: _words(move[key]) for key in ("because", "reason", "error", "hint")}
    return moves, dropped


def _last_batch(sql: sqlite3.Connection) -> int:
    return int(sql.execute("SELECT coalesce(max(id), 0) FROM run").fetchone()[0])


def _runs(
    sql: sqlite3.Connection,
    rule: str | None,
    state: str | None,
    group: Mapping[str, str] | None,
    first: int,
    before: int,
    limit: int,
) -> list[dict[str, Any]]:
    """Return at most `limit` runs with first <= id < before, newest first."""
    where = ["run.id >= ?", "run.id < ?"]
    values: list[int | str] = [first, before]
    if rule is not None:
        where.append("rule.name = ?")
        values.append(rule)
    if state is not None:
        where.append("run.state = ?")
        values.append(str(state))
    for key, value in (group or {}).items():
        where.append("instr(batch.captures, ?) > 0")  # it is compact JSON; only what this leaves is parsed below
        values.append(to_json({key: str(value)})[1:-1])
    is_open = state in _OPEN
    if is_open:
        where.append("run.final = 0")
    question = _RUN.format(index="INDEXED BY run_open" if is_open else "")
    found: list[dict[str, Any]] = []
    for row in sql.execute(f"{question} WHERE {' AND '.join(where)} ORDER BY run.id DESC", values):
        shown = _shown(row)
        if group is None or all(shown["group"].get(key) == str(value) for key, value in group.items()):
            found.append(shown)
            if len(found) >= limit:
                break
    return found


def _shown(row: tuple[Any, ...]) -> dict[str, Any]:
    """Return a run as `runs list` shows it."""
    id, rule, name, captures, state, because, files, size, reason, attempts = row[:10]
    error, hint, created, changed, final, destination, retry_time, waits_on = row[10:]
    return {
        "id": id,
        "rule": name or str(rule),
        "group": from_json(captures),
        "state": state,
        "waiting_for": _waiting_for(state, bool(final), from_text(because)),
        "files": files,
        "bytes": size,
        "reason": from_text(reason),
        "attempts": attempts,
        "error": _words(error) or None,
        "hint": _words(hint) or None,
        "created_time": created,
        "changed_time": changed,
        "because": from_text(because),
        "final": bool(final),
        "destination": from_text(destination),
        "retry_time": retry_time,
        "waits_on": from_json(waits_on) or [],
    }


def _waiting_for(state: str, final: bool, because: str) -> str | None:
    """Say what a run that does not move by itself waits for; its transition gave the reason."""
    if final or state not in (RunState.PENDING, RunState.INACTIVE, RunState.HELD):
        return None
    return because


def _run(sql: sqlite3.Connection, id: int) -> dict[str, Any] | None:
    row = sql.execute(f"{_RUN.format(index='')} WHERE run.id = ?", (id,)).fetchone()
    if row is None:
        return None
    shown = _shown(row)
    request, manifest, output = sql.execute(
        "SELECT request, manifest, output FROM batch JOIN run ON run.id = batch.id WHERE batch.id = ?", (id,)
    ).fetchone()
    attempts = [
        {
            "attempt": attempt,
            "prepared": from_json(prepared),
            "handle": from_json(handle),
            "made_time": made,
            "ended_time": ended,
            "outcome": _words(outcome),
        }
        for attempt, prepared, handle, made, ended, outcome in sql.execute(
            "SELECT attempt, prepared, handle, made_time, ended_time, outcome FROM attempt WHERE run = ?"
            " ORDER BY attempt",
            (id,),
        )
    ]
    transitions = [
        {"from": before, "to": after, "because": from_text(because), "time": at}
        for before, after, because, at in sql.execute(
            "SELECT from_state, to_state, because, time FROM transition WHERE run = ? ORDER BY id", (id,)
        )
    ]
    proof = sql.execute("SELECT time, members FROM proof WHERE run = ? ORDER BY attempt DESC LIMIT 1", (id,)).fetchone()
    roots = {root: from_name(path) for root, path in sql.execute("SELECT id, path FROM root")}
    return shown | {
        "attempts_made": shown["attempts"],
        "attempts": attempts,
        "handle": attempts[-1]["handle"] if attempts else None,
        "output": from_json(output),
        "request": from_json(request),
        "proof_time": proof[0] if proof else None,
        "thinned": manifest is None,
        "manifest": _manifest(manifest, proof[1] if proof else None, roots),
        # The batch's closing is the first transition; it is not a row of its own.
        "transitions": [
            {"from": None, "to": str(RunState.PENDING), "because": shown["reason"], "time": shown["created_time"]},
            *transitions,
        ],
    }


def _manifest(manifest: str | None, proof: str | None, roots: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the members with the digest and places the proof has for them; null without proof."""
    if manifest is None:
        return []
    proved: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for record in from_json(proof) or []:
        proved.setdefault((record.get("root"), record["path"]), []).append(record)
    shown = []
    for member in members_of(manifest):
        root = roots.get(member.root, "")
        records = proved.get((root, member.path)) or proved.get((None, member.path)) or []
        shown.append(
            {
                "path": member.path,
                "size": member.size,
                "mtime_ns": member.mtime_ns,
                "digest": records[0].get("digest") if records else None,
                "root": root,
                "role": member.role,
                "flag": member.flag,
                "to": [record["to"] for record in records if record.get("to") is not None],
                "content": member.content,
                "content_proved": bool(records) and all(record.get("content") for record in records),
            }
        )
    return shown


def members_of(manifest: str) -> tuple[Member, ...]:
    """Return the members a manifest's JSON names."""
    return tuple(Member(*row) for row in from_json(manifest))


def texts_of(source: Any) -> list[tuple[str, str]]:
    """Return the file names and texts of a rule set as the journal keeps it; raises ValueError where it is none."""
    try:
        texts = [(item["file"], item["text"]) for item in source]
    except (KeyError, TypeError):
        texts = [(None, None)]
    if not all(isinstance(word, str) for text in texts for word in text):
        raise ValueError("it names no files with their texts")
    return texts


# -------------------------------------------------------------------------- check


def faults_of(sql: sqlite3.Connection) -> list[str]:
    """Return what is wrong with a journal, in words; at most FAULTS_MAX of a kind."""
    faults = [f"SQLite: {words}" for (words,) in sql.execute(f"PRAGMA quick_check({FAULTS_MAX})") if words != "ok"]
    if faults:
        return faults  # what lies on damaged pages says nothing
    for words, question in _INVARIANTS:
        faults += [words.format(*row) for row in sql.execute(f"{question} LIMIT {FAULTS_MAX}")]
    return faults + _text_faults(sql) + _manifest_faults(sql)


def _text_faults(sql: sqlite3.Connection) -> list[str]:
    """Look whether what a start reads can be read."""
    questions = {
        "the setting {0!r}": "SELECT key, value FROM kept",
        "the request of batch {0}": "SELECT batch.id, request FROM batch JOIN run USING (id) WHERE final = 0",
        "the group of batch {0}": "SELECT batch.id, captures FROM batch JOIN run USING (id) WHERE final = 0",
        "what run {0} waits for": "SELECT id, waits_on FROM run WHERE final = 0 AND waits_on IS NOT NULL",
        "rule set {0}": "SELECT id, source FROM rule_set ORDER BY id DESC LIMIT 1",
    }
    if sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'reclaim'").fetchone():  # not in the first schema
        questions["the proofs of reclaim {0}"] = (
            "SELECT id, proofs FROM reclaim WHERE state IN ('intended', 'confirmed')"
        )
    faults = []
    for words, question in questions.items():
        for key, text in sql.execute(question):
            try:
                value = from_json(from_text(text) if text is not None else None)
                if "rule_set" in question:
                    texts_of(value)
            except (ValueError, TypeError) as error:
                faults.append(f"{words.format(key)} cannot be read: {error}")
    known = ", ".join(f"'{state}'" for state in RunState)
    for run, state in sql.execute(f"SELECT id, state FROM run WHERE final = 0 AND state NOT IN ({known})"):
        faults.append(f"run {run} is in a state that nobody knows: {state!r}")
    return faults[:FAULTS_MAX]


_INVARIANTS = (
    (
        "run {0} has no batch",
        "SELECT id FROM run WHERE NOT EXISTS (SELECT 1 FROM batch WHERE batch.id = run.id)",
    ),
    (
        "batch {0} has no run",
        "SELECT id FROM batch WHERE NOT EXISTS (SELECT 1 FROM run WHERE run.id = batch.id)",
    ),
    (
        "run {0} is open ({1}) and its manifest or request is gone",
        "SELECT run.id, run.state FROM run INDEXED BY run_open JOIN batch ON batch.id = run.id"
        " WHERE run.final = 0 AND (batch.manifest IS NULL OR batch.request IS NULL)",
    ),
    (
        "run {0} is {1} and no attempt of it was journaled",
        "SELECT id, state FROM run INDEXED BY run_open WHERE final = 0 AND state IN ('STARTING', 'ACTIVE', 'INACTIVE')"
        " AND NOT EXISTS (SELECT 1 FROM attempt WHERE attempt.run = run.id)",
    ),
    (
        "batch {0} is of rule number {1}, which has no name",
        "SELECT id, rule FROM batch WHERE rule NOT IN (SELECT id FROM rule)",
    ),
    (
        "an attempt belongs to run {0}, which does not exist",
        "SELECT DISTINCT run FROM attempt WHERE run NOT IN (SELECT id FROM run)",
    ),
    (
        "{1} claims belong to batch {0}, which does not exist",
        "SELECT batch, count(*) FROM claim WHERE batch > 0 AND batch NOT IN (SELECT id FROM batch) GROUP BY batch",
    ),
    (
        "{1} claims are in directory number {0}, which does not exist",
        "SELECT dir, count(*) FROM claim WHERE dir NOT IN (SELECT id FROM dir) GROUP BY dir",
    ),
    (
        "the count of rule {0} in {1} says {2} runs, {3} files, {4} bytes; there are {5}, {6}, {7}",
        "SELECT * FROM ("
        " SELECT rule, state, sum(said_runs), sum(said_files), sum(said_bytes), sum(runs), sum(files), sum(bytes)"
        " FROM ("
        "  SELECT rule, state, runs AS said_runs, files AS said_files, bytes AS said_bytes,"
        "   0 AS runs, 0 AS files, 0 AS bytes FROM tally"
        "  UNION ALL SELECT batch.rule, run.state, 0, 0, 0, count(*), sum(batch.files), sum(batch.bytes)"
        "   FROM run JOIN batch ON batch.id = run.id GROUP BY batch.rule, run.state"
        " ) GROUP BY rule, state"
        " HAVING sum(said_runs) <> sum(runs) OR sum(said_files) <> sum(files) OR sum(said_bytes) <> sum(bytes))",
    ),
)


def _manifest_faults(sql: sqlite3.Connection) -> list[str]:
    """Compare the manifests of open runs with their batch's numbers and with the claims."""
    faults: list[str] = []
    rows = sql.execute(
        "SELECT batch.id, batch.rule, batch.files, batch.manifest FROM run INDEXED BY run_open"
        " JOIN batch ON batch.id = run.id WHERE run.final = 0 AND batch.manifest IS NOT NULL"
    )
    for batch, rule, files, manifest in rows:
        try:
            members = members_of(manifest)
        except (ValueError, TypeError) as error:
            faults.append(f"the manifest of batch {batch} cannot be read: {error}")
            continue
        if len(members) != files:
            faults.append(f"the manifest of batch {batch} has {len(members)} members, its numbers say {files}")
        missing = [member.path for member in members if not member.role and not _claimed(sql, rule, member)]
        if missing:
            faults.append(f"batch {batch}: {len(missing)} members without a claim, the first is {missing[0]!r}")
        if len(faults) >= FAULTS_MAX:
            break
    return faults


def _claimed(sql: sqlite3.Connection, rule: int, member: Member) -> bool:
    found = sql.execute(
        "SELECT size, mtime_ns FROM claim WHERE dir = (SELECT id FROM dir WHERE root = ? AND path = ?)"
        " AND name = ? AND rule IN (?, ?)",
        (member.root, to_name(member.dir), to_name(member.name), rule, rule + RELEASED),
    )
    return any((size, from_number(mtime_ns)) == (member.size, member.mtime_ns) for size, mtime_ns in found)
