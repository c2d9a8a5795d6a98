"""A trace: every fact the core was given, in order, and every batch it made of them, as JSON Lines.

Written by `serve --record`, read by `rules replay`. Facts carry their instants
and the core has no clock, so the same facts lead to the same decisions, here
and on another machine. A trace may hold several lives of a daemon, each with
what the journal gave it at its start; its last line may be torn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trigger_daemon import __version__, config
from trigger_daemon.core import model
from trigger_daemon.core.model import (
    BatchClosed,
    Fact,
    Fault,
    ReclaimFile,
    ReclaimSet,
    RulesOffered,
    RunState,
    Scope,
    Verdict,
)
from trigger_daemon.core.rules import Rule
from trigger_daemon.core.saved import Count, OpenRun, Saved, SavedAlarm, SavedAttempt, SavedMark, SavedReclaim
from trigger_daemon.errors import TriggerError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # of the lines; another one is refused
BYTES_MAX = 4 * 2**30  # of a trace: some ten million looks
WAITING_MAX = 200_000  # rows of looks that wait for a slow disk, some 60 MB: the loop never does
LINE_MAX = 256 * 2**20  # bytes of a line; a journal with a hundred thousand open runs has some 100 MB at its start

BEGIN = b'{"trace":'  # of a file

_FACTS: Mapping[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        model.Seen, model.Unreadable, model.Vanished, model.Swept, model.RootChanged, model.Marked, model.Checked,
        model.Tick, model.Prepared, model.Started, model.NotStarted, model.StartUnknown, model.Polled, model.Proved,
        model.Mismatch, model.CannotVerify, model.Order, model.RulesOffered, model.Gauged,
        model.Mounted, model.Pressed, model.Selected, model.Removed, model.LookedBack, model.Troubled,
    )
}  # fmt: skip


class TraceError(TriggerError):
    """A trace cannot be written or read."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an engine is made with. `seed` is that of its random numbers."""

    host: str
    time_zone: str
    runs_max: int
    keep_done_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class Life:
    """The daemon begins to work, with what its journal gave it, at a monotonic and a UTC instant."""

    header: Header
    saved: Saved
    at: float
    utc: float


@dataclass(frozen=True, slots=True)
class RunsMax:
    """From here on at most so many runs work at once."""

    number: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that was made, as `rules replay` shows it."""

    words: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """The recording ended; `why` is '' when the daemon was stopped."""

    why: str


Entry = Life | RunsMax | Batch | Ended | Fact


def batch_words(batch: BatchClosed) -> dict[str, Any]:
    """Return a batch as it is shown: the same from the daemon's run and from a replay."""
    time = datetime.fromtimestamp(batch.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    suspect = [member.path for member in batch.members if member.flag == "suspect"]
    return {
        "rule": batch.request["rule"],
        "group": dict(batch.group),
        "time": time,
        "reason": batch.reason,
        "files": [member.path for member in batch.members],
        **({"suspect": suspect} if suspect else {}),
    }


# ------------------------------------------------------------------------- writing


class Recorder:
    """Writes a trace from a thread of its own. Whatever happens to it, the daemon goes on without it.

    `fault` says why recording has ended before the daemon did, '' while all is well.
    """

    def __init__(self, path: Path, *, bytes_max: int = BYTES_MAX) -> None:
        self.fault = ""
        self._ending = threading.Lock()  # the loop and the thread may both find a reason
        self._path = path
        self._bytes_max = bytes_max
        self._rounds: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._put_rows = 0  # counted by the loop alone
        self._done_rows = 0  # and by the thread alone
        try:
            # Paths of unpublished work are nobody's business but the group's. Closed by the thread.
            self._file = open(path, "ab", opener=_opener)  # noqa: SIM115
        except OSError as error:
            raise TraceError(
                f"{path} cannot be written: {error.strerror}", hint="choose another file for `serve --record`"
            ) from error
        if not _alone(self._file.fileno()):
            self._file.close()
            raise TraceError(f"another daemon writes {path}", hint="choose another file for `serve --record`")
        self._bytes = os.fstat(self._file.fileno()).st_size
        if 0 < self._bytes < len(BEGIN) and BEGIN.startswith(path.read_bytes()):  # killed as it began
            os.ftruncate(self._file.fileno(), 0)
            self._bytes = 0
        if self._bytes and not _is_trace(path):
            self._file.close()
            raise TraceError(f"{path} is there, and is no trace", hint="choose another file for `serve --record`")
        self._thread = threading.Thread(target=self._write, name="trace", daemon=True)
        self._thread.start()

    def life(self, header: Header, saved: Saved, at: float, utc: float) -> None:
        """A life begins."""
        self._put([{
            "trace": FORMAT, "version": __version__, **dataclasses.asdict(header), "at": at, "utc": utc,
            "saved": _saved_out(saved),
        }])  # fmt: skip

    def runs_max(self, number: int) -> None:
        self._put([{"runs_max": number}])

    def round(self, facts: Sequence[Fact], batches: Iterable[BatchClosed]) -> None:
        """One round of the loop was committed. The facts are frozen: the thread may take its time."""
        self._put([*facts, *batches])

    def keep_out(self, roots: Iterable[str]) -> None:
        """End if the trace lies in a watched directory: those are only read, and it would never be quiet."""
        where = os.path.realpath(self._path)
        for root in roots:
            if where.startswith(os.path.realpath(root).rstrip("/") + "/") and not self.fault:
                self._end(f"{self._path} lies in {root}, which is watched")
                self._rounds.put(None)

    def close(self) -> None:
        """Write what is left and end."""
        if self._thread.is_alive():
            self._put([{"end": ""}])
            self._rounds.put(None)
            self._thread.join(timeout=3.0)  # if its disk hangs, the trace ends where it ends

    def _put(self, entries: list[Any]) -> None:
        if self.fault:
            return
        self._put_rows += sum(map(_rows_of, entries))
        if self._put_rows - self._done_rows > WAITING_MAX:
            self._end(f"{self._path} is too slow: {WAITING_MAX:,} looks wait for it")
            self._rounds.put(None)
        else:
            self._rounds.put(entries)

    def _end(self, why: str) -> None:
        """Say why, once: that a pipe broke later is no news when it was given up for being slow."""
        with self._ending:
            self.fault = self.fault or why

    def _write(self) -> None:
        try:
            with self._file:
                self._write_all()
        except OSError as error:
            self._end(f"{self._path} cannot be written: {error.strerror}")

    def _write_all(self) -> None:
        if self._bytes and not _ends_a_line(self._path):  # killed in the middle of a line
            self._file.write(b"\n")
        while (entries := self._rounds.get()) is not None:
            lines = b"".join(_line(entry) for entry in entries)
            self._done_rows += sum(map(_rows_of, entries))
            self._bytes += len(lines)
            if self._bytes > self._bytes_max:
                self._end(f"{self._path} has reached {self._bytes_max:,} bytes")
                break
            self._file.write(lines)
            if self._rounds.empty():
                self._file.flush()
        if self.fault:
            self._file.write(_line({"end": self.fault}))


def _opener(name: str, flags: int) -> int:
    """Open a file, or a pipe that somebody reads, without waiting for a reader."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    fd = os.open(name, flags | nonblocking, 0o640)
    if nonblocking:
        os.set_blocking(fd, True)  # it is the thread that waits for a slow reader
    return fd


def _alone(fd: int) -> bool:
    """Keep others from writing the same trace; they are let in where the file system has no locks."""
    if not hasattr(fcntl, "flock"):
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _rows_of(entry: Any) -> int:
    return len(entry.rows) if isinstance(entry, model.Seen) else 1


def _is_trace(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(BEGIN)) == BEGIN


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _line(entry: Any) -> bytes:
    if isinstance(entry, BatchClosed):
        plain: Any = {"batch": batch_words(entry)}
    elif isinstance(entry, dict):
        plain = entry
    else:
        plain = fact_out(entry)
    return json.dumps(plain, separators=(",", ":")).encode() + b"\n"  # all ASCII, surrogate escapes too


def fact_out(fact: Fact) -> list[Any]:
    """Return a fact as JSON: its name, then its fields in their order."""
    if isinstance(fact, RulesOffered):
        ids = {rule.name: rule.id for rule in fact.rules}
        return ["RulesOffered", ids, dict(fact.roots), fact.source, fact.at, fact.fault, fact.applied]
    fields = [getattr(fact, field.name) for field in dataclasses.fields(fact)]
    return [type(fact).__name__, *map(_out, fields)]


def _out(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return [_out(one) for one in value]
    return dict(value) if isinstance(value, Mapping) and not isinstance(value, dict) else value


def _saved_out(saved: Saved) -> dict[str, Any]:
    plain = dataclasses.asdict(saved)
    for name in ("baselines", "tally"):
        plain[name] = [[*key, value] for key, value in getattr(saved, name).items()]
    for name in ("rules", "roots"):
        plain[name] = list(getattr(saved, name).items())
    return plain


# ------------------------------------------------------------------------- reading


def read(path: Path) -> Iterator[Entry]:
    """Yield what a trace holds, in order. Raises TraceError, with the number of the line."""
    try:
        with open(path, "rb") as file:
            yield from _entries(path, file)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error


def _entries(path: Path, lines: Any) -> Iterator[Entry]:
    header: Header | None = None
    torn = 0
    number = 0
    while line := lines.readline(LINE_MAX):
        number += 1
        try:
            plain = json.loads(line)
        except (ValueError, RecursionError):
            torn = number  # the daemon was killed while it wrote: nothing, or a new life, follows
            continue
        if torn and not (isinstance(plain, dict) and "trace" in plain):
            hint = f"replay what is before it: head -n {torn - 1} {path} > FILE"
            raise TraceError(f"{path}:{torn}: the line is damaged", hint=hint)
        torn = 0
        try:
            entry = _entry(plain, header)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TraceError(
                f"{path}:{number}: not a line of a trace ({type(error).__name__}: {error})",
                hint="a trace is written by `trigger-daemon serve --record FILE`",
            ) from error
        if isinstance(entry, Life):
            header = entry.header
        yield entry
    if header is None:
        raise TraceError(f"{path} is no trace", hint="a trace is written by `trigger-daemon serve --record FILE`")


def _entry(plain: Any, header: Header | None) -> Entry:
    if isinstance(plain, list):
        if header is None:
            raise ValueError("a fact before the beginning")
        return _fact_in(plain)
    if "trace" in plain:
        if plain["trace"] != FORMAT:
            raise TraceError(
                f"the trace has format {plain['trace']}, and this version reads format {FORMAT}",
                hint="replay it with the version that recorded it",
            )
        made = Header(*(plain[field.name] for field in dataclasses.fields(Header)))
        return Life(made, _saved_in(plain["saved"]), plain["at"], plain["utc"])
    if "batch" in plain:
        return Batch(plain["batch"])
    if "runs_max" in plain:
        return RunsMax(plain["runs_max"])
    return Ended(plain["end"])


def _fact_in(plain: list[Any]) -> Fact:
    name, *values = plain
    if name == "RulesOffered":
        ids, roots, source, at, fault, applied = values
        return RulesOffered(_rules(ids, source), roots, source, at, fault, applied)
    cls = _FACTS[name]
    fields = dataclasses.fields(cls)
    if len(values) > len(fields):
        raise ValueError(f"{name} with {len(values)} fields")
    made: Fact = cls(*(_IN.get(field.name, _same)(value) for field, value in zip(fields, values, strict=False)))
    return made


def _rules(ids: Mapping[str, int], source: Any) -> tuple[Rule, ...]:
    if not ids:
        return ()
    parsed = config.parse_rules([(item["file"], item["text"]) for item in source], elsewhere=True)
    if parsed.faults:
        raise ValueError(f"this version refuses its rules: {parsed.faults[0].message}")
    return tuple(replace(rule, id=ids[rule.name]) for rule in parsed.rules if rule.name in ids)


def _same(value: Any) -> Any:
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if value is not None else None


def _rows(value: Any) -> Any:
    return [
        (name, tuple(state) if state is not None else None, tuple((rule, batch) for rule, batch in wants))
        for name, state, wants in value
    ]


def _fault(value: Any) -> Fault | None:
    return Fault(**{**value, "scope": Scope(value["scope"])}) if value is not None else None


def _reclaim_sets(value: Any) -> tuple[ReclaimSet, ...]:
    return tuple(_reclaim_set(one) for one in value)


def _reclaim_set(value: Any) -> ReclaimSet:
    files = tuple(ReclaimFile(**{**file, "state": tuple(file["state"])}) for file in value["files"])
    return ReclaimSet(**{**value, "files": files, "proofs": tuple(value["proofs"])})


_IN: Mapping[str, Callable[[Any], Any]] = {
    "sets": _reclaim_sets,
    "places": _tuple,
    "kept": lambda value: tuple((name, kept) for name, kept in value),
    "rows": _rows,
    "state": _tuple,
    "names": _tuple,
    "needs": _tuple,
    "changed": _tuple,
    "read": _tuple,
    "processes": _tuple,
    "measures": lambda value: tuple((check, measure) for check, measure in value),
    "verdict": Verdict,
    "fault": _fault,
}


def _saved_in(plain: Mapping[str, Any]) -> Saved:
    return Saved(
        last_batch=plain["last_batch"],
        runs=tuple(_run_in(run) for run in plain["runs"]),
        kept=plain["kept"],
        baselines={(rule, root): time for rule, root, time in plain["baselines"]},
        groups=tuple(SavedMark(*mark) for mark in plain["groups"]),
        alarms=tuple(SavedAlarm(*alarm) for alarm in plain["alarms"]),
        rules_source=plain["rules_source"],
        tally={(rule, state): Count(*count) for rule, state, count in plain["tally"]},
        rules=dict(plain["rules"]),
        roots=dict(plain["roots"]),
        reclaims=tuple(SavedReclaim(id, done, _reclaim_set(of)) for id, done, of in plain.get("reclaims", ())),
        last_reclaim=plain.get("last_reclaim", 0),
    )


def _run_in(plain: Mapping[str, Any]) -> OpenRun:
    attempt = plain["attempt"]
    return OpenRun(**{
        **plain,
        "state": RunState(plain["state"]),
        "waits_on": tuple(plain["waits_on"]),
        "attempt": SavedAttempt(**attempt) if attempt is not None else None,
    })  # fmt: skip
