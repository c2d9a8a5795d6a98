"""The oracle: from what was written, what arrived and what was started it says which promise was broken.

It knows nothing of the daemon's code and shares none with it: the writer keeps
a record, the program that a rule starts keeps one, and the journal is read as
the SQLite file that it is. A promise is judged by what the outside saw; what
the journal says is held against it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LAWS = ("missed", "early", "twice", "partial", "verified", "deleted")
CLOCKS_S = 0.05  # the journal's times are wall-clock times, rounded by nobody; the writer's are taken after its call


class Violation(NamedTuple):
    """One broken promise."""

    law: str
    what: str


class Version(NamedTuple):
    """What identifies the content of a file at one time."""

    size: int
    mtime_ns: int


@dataclass
class Step:
    """A file after one of its writer's calls: its version, the UTC second, and, if it is whole, its digest."""

    version: Version | None  # None: it is gone
    at: float
    sha256: str | None


@dataclass
class Taken:
    """A rule's batch as the journal has it."""

    run: int
    rule: str
    state: str
    final: bool
    closed: float
    members: list[tuple[str, Version, str]]  # path below the root, version, role
    because: str


@dataclass
class Promise:
    """What one rule was to do: which paths it takes, where they go, how long they must have been quiet."""

    rule: str
    takes: Callable[[str], bool]
    to: Path | None  # None: it starts a program, whose record tells
    quiet_s: float
    again: frozenset[int] = frozenset()  # exit codes after which the program may be started again
    beside: frozenset[str] = frozenset()  # names that it puts beside the copies, as asked


@dataclass
class Scene:
    """Everything that there is to judge by."""

    source: Path
    record: Path  # of the writer, one JSON object a line
    executions: Path | None
    journal: Path
    promises: Sequence[Promise]
    check_times: bool = True  # False where the wall clock was set meanwhile
    may_be_held: Callable[[Taken], bool] = field(default=lambda taken: False)


def judge(scene: Scene, *, idle: bool) -> list[Violation]:
    """Return every broken promise. `idle`: the daemon had the time to end its work, so nothing may be left over."""
    history = read_record(scene.record)
    batches = read_journal(scene.journal)
    found: list[Violation] = []
    for promise in scene.promises:
        mine = [taken for taken in batches if taken.rule == promise.rule]
        found += _early(promise, mine, history, scene)
        found += _claimed_twice(promise, mine)
        if promise.to is not None:
            found += _partial(promise, history, idle=idle)
            found += _verified(promise, mine, history)
        if idle:
            found += _missed(promise, mine, history, scene)
    found += _executed_twice(scene, batches)
    found += _deleted(scene, history)
    return found


# ------------------------------------------------------------------------- reading


def read_record(path: Path) -> dict[str, list[Step]]:
    """Return what the writer did, file by file: `Record` writes it."""
    history: dict[str, list[Step]] = defaultdict(list)
    for line in _lines(path):
        version = None if line["version"] is None else Version(*line["version"])
        history[line["path"]].append(Step(version, line["at"], line.get("sha256")))
    return dict(history)


def read_journal(path: Path) -> list[Taken]:
    """Return the batches, oldest first; none where there is no journal yet. Raises sqlite3.Error if it is damaged."""
    if not path.exists():
        return []
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        rows = connection.execute(
            "SELECT run.id, rule.name, run.state, run.final, batch.closed_time, batch.manifest, run.because"
            " FROM run JOIN batch ON batch.id = run.id JOIN rule ON rule.id = batch.rule ORDER BY run.id"
        ).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        connection.close()
    batches = []
    for run, rule, state, final, closed, manifest, because in rows:
        members = [
            (f"{directory}/{name}" if directory else name, Version(size, mtime_ns), role)
            for _, directory, name, size, mtime_ns, role, *_ in json.loads(manifest or "[]")
        ]
        words = because if isinstance(because, str) else os.fsdecode(because or b"")
        batches.append(Taken(run, rule, state, bool(final), closed, members, words))
    return batches


def _lines(path: Path | None) -> Iterator[Mapping[str, Any]]:
    if path is None or not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # its writer was killed in the middle


def _ended(executions: Path | None) -> Iterator[Mapping[str, Any]]:
    """Yield the executions that came to their end."""
    lines = list(_lines(executions))
    ends = {line["execution"] for line in lines if "exit" in line}
    yield from (line for line in lines if "files" in line and line["execution"] in ends)


def digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree(base: Path) -> dict[str, tuple[Version, str]]:
    """Return version and digest of every file below a directory."""
    found = {}
    for directory, _, names in os.walk(base):
        for name in names:
            path = os.path.join(directory, name)
            seen = os.lstat(path)
            found[os.path.relpath(path, base)] = (Version(seen.st_size, seen.st_mtime_ns), digest(path))
    return found


# ---------------------------------------------------------------------------- laws


def _missed(
    promise: Promise, mine: Sequence[Taken], history: Mapping[str, Sequence[Step]], scene: Scene
) -> Iterator[Violation]:
    """Every file that stands, whole, is in a batch of the rule, and that batch has come to its end."""
    taken = {(path, version): batch for batch in mine for path, version, _ in batch.members}
    executed = {
        (path, Version(size, mtime_ns))
        for line in _ended(scene.executions) if line["rule"] == promise.rule
        for path, size, mtime_ns in line["files"]
    }  # fmt: skip
    for path, steps in history.items():
        last = steps[-1]
        if last.version is None or last.sha256 is None or not promise.takes(path):
            continue
        batch = taken.get((path, last.version))
        if batch is None:
            yield Violation("missed", f"{promise.rule}: {path} {last.version} is in no batch")
        elif batch.state not in ("VERIFIED", "SUCCEEDED") and not scene.may_be_held(batch):
            yield Violation("missed", f"{promise.rule}: {path} is in run {batch.run}: {batch.state}, {batch.because}")
        elif promise.to is None and batch.state in ("VERIFIED", "SUCCEEDED") and (path, last.version) not in executed:
            yield Violation("missed", f"{promise.rule}: run {batch.run} is {batch.state}, and no program had {path}")


def _early(
    promise: Promise, mine: Sequence[Taken], history: Mapping[str, Sequence[Step]], scene: Scene
) -> Iterator[Violation]:
    """What was taken was whole, and had been quiet: a version that its writer left alone for the quiet period."""
    for batch in mine:
        for path, version, role in batch.members:
            if role:
                continue
            steps = [step for step in history.get(path, ()) if step.version == version]
            whole = [step for step in steps if step.sha256 is not None]
            if not whole:
                yield Violation("early", f"{promise.rule}: run {batch.run} took {path} {version}, which was not whole")
            elif scene.check_times and batch.closed + CLOCKS_S < steps[0].at + promise.quiet_s:
                words = f"{path} {batch.closed - steps[0].at:.3f} s after its last byte"
                yield Violation("early", f"{promise.rule}: run {batch.run} took {words}")


def _claimed_twice(promise: Promise, mine: Sequence[Taken]) -> Iterator[Violation]:
    runs: dict[tuple[str, Version], list[int]] = defaultdict(list)
    for batch in mine:
        for path, version, role in batch.members:
            if not role:
                runs[(path, version)].append(batch.run)
    for (path, version), ids in runs.items():
        if len(ids) > 1:
            yield Violation("twice", f"{promise.rule}: {path} {version} is in runs {ids}")


def _executed_twice(scene: Scene, batches: Sequence[Taken]) -> Iterator[Violation]:
    """A program works on a version once, unless it asked to be started again; and only on what was journaled before."""
    rules = {promise.rule: promise for promise in scene.promises}
    known = {(batch.rule, path, version) for batch in batches for path, version, _ in batch.members}
    last: dict[tuple[str, str, Version], tuple[int, int | None]] = {}
    exits = {line["execution"]: line["exit"] for line in _lines(scene.executions) if "exit" in line}
    for line in _lines(scene.executions):
        if "exit" in line:
            continue
        rule = line["rule"]
        for path, size, mtime_ns in line["files"]:
            version = (rule, path, Version(size, mtime_ns))
            if version not in known:
                yield Violation("twice", f"{rule}: {path} was worked on, and the journal knows of no run of it")
            before = last.get(version)
            if before is not None and before[1] not in rules[rule].again:
                both = f"{before[0]} and {line['execution']}"
                yield Violation("twice", f"{rule}: {path} was worked on by executions {both}")
            last[version] = (line["execution"], exits.get(line["execution"]))


def _partial(promise: Promise, history: Mapping[str, Sequence[Step]], *, idle: bool) -> Iterator[Violation]:
    """Under a name that the writer gave lies what the writer wrote, whole; when all is done, nothing else is there."""
    assert promise.to is not None
    for path, (_, found) in tree(promise.to).items():
        steps = history.get(path)
        if steps is None:
            if idle and os.path.basename(path) not in promise.beside:
                yield Violation("partial", f"{promise.rule}: {path} is left over at the destination")
        elif found not in {step.sha256 for step in steps if step.sha256}:
            yield Violation("partial", f"{promise.rule}: {path} at the destination is nothing that was ever whole")


def _verified(
    promise: Promise, mine: Sequence[Taken], history: Mapping[str, Sequence[Step]]
) -> Iterator[Violation]:
    """What is called verified lies at the destination: that version, or one that came after it."""
    assert promise.to is not None
    for batch in mine:
        if batch.state != "VERIFIED":
            continue
        for path, version, _ in batch.members:
            steps = list(history.get(path, ()))
            first = next((n for n, step in enumerate(steps) if step.version == version), len(steps))
            good = {step.sha256 for step in steps[first:] if step.sha256}
            target = promise.to / path
            if not target.exists():
                yield Violation("verified", f"{promise.rule}: run {batch.run} is VERIFIED, and {path} is not there")
            elif digest(target) not in good:
                yield Violation("verified", f"{promise.rule}: run {batch.run} is VERIFIED, and {path} differs")


def _deleted(scene: Scene, history: Mapping[str, Sequence[Step]]) -> Iterator[Violation]:
    """The instrument's files are as their writer left them."""
    standing = tree(scene.source)
    for path, steps in history.items():
        last = steps[-1]
        if last.version is None or last.sha256 is None:
            continue
        if path not in standing:
            yield Violation("deleted", f"{path} is gone from the instrument's directory")
        elif standing[path] != (last.version, last.sha256):
            yield Violation("deleted", f"{path} in the instrument's directory is not what was written")
    for path in standing.keys() - history.keys():
        yield Violation("deleted", f"{path} was put into the instrument's directory by somebody else")
