"""Say what rules would have done, without starting anything.

A directory is replayed through the real core on a simulated clock: every file
arrives at its time of modification, whole, as if the daemon had watched from
the start; checks read the real files. A trace of a daemon's facts is replayed
as it was, to the very same decisions, or, with other rules, as a history of
what was seen. Every run succeeds at once. Nothing is written anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import random
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from trigger_daemon import probe, registry, trace
from trigger_daemon.config.rules import bare
from trigger_daemon.core import model
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import (
    CLAIM_BASELINE,
    CLAIM_ONLY_FIRST,
    CLAIM_REWRITE_IGNORED,
    CLAIM_SKIPPED,
    CLAIM_UNKNOWN,
    Check,
    Fact,
    Row,
    State,
    Verdict,
    join,
    split,
)
from trigger_daemon.core.patterns import Matcher, compiled, why_not
from trigger_daemon.core.rules import CheckSpec, Rule
from trigger_daemon.core.saved import Saved
from trigger_daemon.errors import TriggerError
from trigger_daemon.probe import Judged

FILES_MAX = 2_000_000  # of one replay: about a gigabyte of memory
FIRST, LAST = -2_000_000_000.0, 200_000_000_000.0  # 1906 and 8307: when files arrive, whatever their times say
LEFT_MAX = 100_000  # files named one by one among those that are left; the others are counted
STEPS_MAX = 50_000_000  # of the core, so that no set of rules replays for ever
FULL_S = 900.0  # between two sweeps that files which cannot go on are looked at by
CHECKS_MAX = 100_000  # verdicts remembered: an incomplete file is asked about again and again
FITTING = frozenset({"settling", "incomplete", "blocked", "waiting", "skipped"})  # stages of files that rules match
DAY_S = 86_400.0
SLACK_S = 60.0
BEFORE_S = 0.001
LATE_S = 120.0  # two looks for companions that files went without

_CODES = {
    CLAIM_BASELINE: "it was there when the rule was first accepted (existing: ignore)",
    CLAIM_SKIPPED: "an operator skipped it",
    CLAIM_REWRITE_IGNORED: "it was rewritten after a batch had taken it (on_rewrite: ignore)",
    CLAIM_ONLY_FIRST: "only_first: the batch of its group was full",
    CLAIM_UNKNOWN: "it was there when the journal was recovered, which does not know whether it was sent",
}


Recorded = tuple[str, str, State, str]  # root, path, state, the checks: with their options, or their names alone


class Arrival(NamedTuple):
    """A file has a new state (None: it is gone) from this instant on; UTC seconds."""

    at: float
    root: str
    path: str
    state: State | None


@dataclass(slots=True)
class Report:
    """What would have been started, and what not; both as `rules replay` shows them."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)
    more: int = 0  # files that are left beyond LEFT_MAX
    as_recorded: bool | None = None  # whether a trace led to the batches that it recorded
    ended: str = ""  # why a recording ended before its daemon did
    notes: list[str] = field(default_factory=list)

    def leave(self, root: str, path: str, rule: str | None, because: str, stage: str) -> None:
        if len(self.left) < LEFT_MAX:
            self.left.append({"path": path, "rule": rule, "because": because, "root": root, "stage": stage})
        else:
            self.more += 1


class _Providers:
    """What the core asks about actions; nothing is made of them."""

    def __init__(self, *, prepare: bool) -> None:
        self._prepare = prepare
        self._class = functools.cache(registry.find_action)
        self.templates = functools.cache(self._templates)

    def prepares(self, action: str) -> bool:
        return self._prepare and bool(self._class(action).PREPARES)

    def at_once(self, action: str) -> int | None:
        return None

    def leaves_out(self, action: str) -> bool:
        return bool(getattr(self._class(action), "LEAVES_OUT", False))

    def refuses(self, action: str, options: Mapping[str, Any], root: str, path: str) -> str:
        refuses = getattr(bare(self._class(action)), "refuses", None)
        return str(refuses(options, root, path)) if refuses else ""

    def _templates(self, action: str) -> frozenset[str]:
        return frozenset(name for name, option in self._class(action).OPTIONS.items() if option.template)

    def extra_names(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        return registry.extra_names(self._class(action), options)

    def destination(self, action: str, options: Mapping[str, Any]) -> str:
        return str(bare(self._class(action)).destination(options))

    def writes(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()  # what limited storage did is not replayed


# --------------------------------------------------------------------------- traces


def replay_trace(path: Path) -> Report:
    """Replay a trace as it was. Raises TraceError."""
    with _telling_damage(path):
        return _replay_trace(path)


@contextlib.contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    """Facts that the core cannot take come of a trace that is not what was written."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        hint = "it is damaged, or was changed by hand: replay the one that `serve --record` wrote"
        raise trace.TraceError(f"{path} cannot be replayed: {type(error).__name__}: {error}", hint=hint) from error


def _replay_trace(path: Path) -> Report:
    report = Report()
    same = True
    recorded: list[Mapping[str, Any]] = []
    engine: Engine | None = None
    begun = 0  # batches of earlier lives
    ended = False
    for entry in trace.read(path):
        if isinstance(entry, trace.Life):
            same &= _as_recorded(report.batches[begun:], recorded, whole=ended or engine is None)
            begun, recorded = len(report.batches), []
        ended = isinstance(entry, trace.Ended)
        match entry:
            case trace.Life(header, saved, at, utc):
                engine = Engine(
                    host=header.host,
                    providers=_Providers(prepare=True),
                    rand=random.Random(header.seed).random,
                    runs_max=header.runs_max,
                    time_zone=header.time_zone,
                    keep_done_s=header.keep_done_s,
                )
                engine.restore(saved, at, utc)
            case trace.RunsMax(number) if engine:
                engine.runs.runs_max = number
            case trace.Batch(words):
                recorded.append(words)
            case trace.Ended(why):
                report.ended = why
            case _ if engine:
                for effect in engine.step(entry):  # type: ignore[arg-type]
                    if isinstance(effect, model.BatchClosed):
                        report.batches.append(trace.batch_words(effect))
                    elif isinstance(effect, model.Claimed) and effect.code in _CODES:
                        rule = _name(engine, effect.rule)
                        for name, _, _ in effect.rows:
                            report.leave(
                                engine.root_paths.get(effect.root, ""), join(effect.dir, name), rule,
                                _CODES[effect.code], "skipped",
                            )  # fmt: skip
    report.as_recorded = same and _as_recorded(report.batches[begun:], recorded, whole=ended)
    for rule_, below, words in engine.open_files() if engine else ():
        report.leave(rule_.watch, below, rule_.name, words["because"], words["stage"])
    if engine:
        _owed(engine, report)
    if not ended:
        report.notes.append("the trace has no end: its daemon still writes it, or was killed")
    return report


def _as_recorded(
    batches: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]], *, whole: bool
) -> bool:
    """Compare a life's batches with those recorded; of one that was cut off, the last may not be recorded any more."""
    return batches == recorded if whole else batches[: len(recorded)] == recorded


def _owed(engine: Engine, report: Report) -> None:
    """Name the companions that files went without."""
    for assembly in engine.assemblies.values():
        for companion, member in assembly.settling.late.items():
            where = engine.root_paths.get(companion.root, "")
            words = f"a companion of {member.path}, which went without it: {companion.why or 'there'}"
            report.leave(where, companion.path, assembly.rule.name, words, "missing")


def _name(engine: Engine, number: int) -> str | None:
    return next((rule.name for rule in engine.rules.values() if rule.id == abs(number)), None)


def recorded_rules(path: Path) -> list[tuple[Rule, ...]]:
    """Return the rule sets that a trace was recorded with. Raises TraceError."""
    with _telling_damage(path):
        offers = [entry for entry in trace.read(path) if isinstance(entry, model.RulesOffered)]
        return [offer.rules for offer in offers if offer.fault is None and offer.rules]


def same_rules(rules: Sequence[Rule], others: Sequence[Rule]) -> bool:
    """Say whether two rule sets mean the same, wherever they are written."""

    def plain(rule: Rule) -> Rule:
        return replace(rule, id=0, file="", line=0)

    return sorted(map(repr, map(plain, rules))) == sorted(map(repr, map(plain, others)))


def replay_history(rules: Sequence[Rule], path: Path) -> Report:
    """Replay what a trace has seen with other rules. Raises TraceError.

    Only files that the recorded rules looked at are known. A check is made on
    the file itself if it is still there in the same version, else its recorded
    verdict of the same checks is taken.
    """
    with _telling_damage(path):
        return _replay_history(rules, path)


def _replay_history(rules: Sequence[Rule], path: Path) -> Report:
    roots: dict[int, str] = {}
    offset = 0.0
    known: dict[tuple[int, str], State | None] = {}
    arrivals: list[Arrival] = []
    verdicts: dict[Recorded, Judged] = {}
    named: dict[int, Rule] = {}
    time_zone = "UTC"
    for entry in trace.read(path):
        match entry:
            case trace.Life(header, saved, at, utc):
                offset, time_zone = utc - at, header.time_zone
                roots.update(saved.roots)
            case model.RulesOffered():
                named.update({rule.id: rule for rule in entry.rules})
                roots.update({number: root for root, number in entry.roots.items()})
            case model.Tick(at, utc):
                offset = utc - at
            case model.Seen():
                for name, state, _ in entry.rows:
                    place = (entry.root, join(entry.dir, name))
                    if known.get(place) != state:
                        known[place] = state
                        arrivals.append(Arrival(entry.ended + offset, roots.get(entry.root, ""), place[1], state))
            case model.Checked():
                judged = Judged(entry.verdict, entry.why, entry.needs, entry.measures, entry.content, entry.read)
                for said in _said_by(_recorded_checks(named.get(abs(entry.rule)), entry.scope)):
                    verdicts[(roots.get(entry.root, ""), entry.path, entry.state, said)] = judged
    checks = _Checks({root: root for root in roots.values()}, verdicts)
    report = _Simulation(rules, arrivals, checks, time_zone).run()
    if checks.recalled:
        words = f"{model.counted(checks.recalled, 'verdict')} as recorded, for files that are not here any more"
        report.notes.append(f"{words}: the options of checks in these rules play no part in them")
    for missing in sorted({rule.watch for rule in rules} - set(roots.values())):
        report.notes.append(f"{missing} was not watched when the trace was recorded")
    return report


def _recorded_checks(rule: Rule | None, scope: str) -> Sequence[CheckSpec]:
    """Return the checks that a recorded verdict is the answer to."""
    if rule is None:
        return ()
    if not scope:
        return rule.complete.checks
    return next((c.checks for c in rule.complete.companions if scope == f"{c.file}: "), ())


def _said_by(checks: Sequence[CheckSpec]) -> tuple[str, str]:
    """Return by what a verdict is looked up: the same checks, else checks of the same names."""
    return repr(checks), repr([name for name, _ in checks])


# ------------------------------------------------------------------------ directories


def replay_directory(
    rules: Sequence[Rule],
    roots: Mapping[str, str],
    *,
    speed: float = 1.0,
    only_below: Mapping[str, str] | None = None,
    time_zone: str = "UTC",
) -> Report:
    """Replay what lies below real directories.

    `roots`: what rules watch, and companions lie in -> the directory that
    stands for it. `speed`: how much faster than their times of modification
    say files arrive. `only_below`: of a root, the directory below it to which
    the replay is confined. `time_zone`: that of times of day in rules and of
    `{date}`. Raises TriggerError.
    """
    faults: list[tuple[str, str, str]] = []
    arrivals: list[Arrival] = []
    for root, real in roots.items():
        for arrival in _walk(root, real, (only_below or {}).get(root, ""), faults):
            arrivals.append(arrival)
            if len(arrivals) > FILES_MAX:
                raise TriggerError(
                    f"more than {FILES_MAX:,} files are too many for one replay", hint="replay one session at a time"
                )
    if speed != 1.0 and arrivals:
        first = min(arrivals).at
        arrivals = [arrival._replace(at=first + (arrival.at - first) / speed) for arrival in arrivals]
    report = _Simulation(rules, arrivals, _Checks(roots), time_zone).run()
    for root, path, why in faults:
        report.leave(root, path, None, why, "unreadable")
    if not arrivals and not faults:
        report.notes.append(f"there is no file below {', '.join(sorted(set(roots.values())))}")
    elif not report.batches and not any(entry["rule"] and entry["stage"] in FITTING for entry in report.left):
        report.notes.append("no file here fits any rule: is this the right directory?")
    return report


def _walk(root: str, real: str, below: str, faults: list[tuple[str, str, str]]) -> Iterator[Arrival]:
    todo = [below]
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(os.path.join(real, directory) if directory else real) as entries:
                found = list(entries)
        except OSError as error:
            if error.errno != errno.ENOENT or (directory and directory == below):
                faults.append((root, directory, f"it cannot be read: {error.strerror}"))
            continue
        for entry in found:
            path = join(directory, entry.name)
            try:
                seen = entry.stat(follow_symlinks=False)
            except OSError as error:
                faults.append((root, path, f"it cannot be looked at: {error.strerror}"))
                continue
            if stat.S_ISDIR(seen.st_mode):
                todo.append(path)
            elif stat.S_ISREG(seen.st_mode):
                state = (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)
                yield Arrival(seen.st_mtime_ns / 1e9, root, path, state)


class _Checks:
    """Runs checks on the real files, and remembers what they said."""

    def __init__(
        self, real: Mapping[str, str], recorded: Mapping[Recorded, Judged] | None = None
    ) -> None:
        self._real = real
        self._recorded = recorded
        self._said: dict[Any, Judged] = {}
        self.recalled = 0  # verdicts taken from the trace

    def run(self, effect: Check, root: str, companions: Iterable[tuple[str, str, State]]) -> Judged:
        there = tuple(companions)
        key = (root, effect.path, effect.state, repr(effect.checks), there, repr(effect.siblings))
        if key not in self._said:
            if len(self._said) >= CHECKS_MAX:
                self._said.clear()
            self._said[key] = self._judge(effect, root, there)
        return self._said[key]

    def _judge(self, effect: Check, root: str, companions: Sequence[tuple[str, str, State]]) -> Judged:
        path = os.path.join(self._real.get(root, root), effect.path)
        state = effect.state
        if self._recorded is not None:
            now = _state(path)
            if now is None or now[:2] != state[:2]:
                missing = Judged(Verdict.UNKNOWN, "the file is not here to be checked, and its check was not recorded")
                self.recalled += 1
                said = (self._recorded.get((root, effect.path, state, by)) for by in _said_by(effect.checks))
                return next(filter(None, said), missing)
            state = now
        here = os.path.dirname(effect.path)
        paths = {
            os.path.relpath(below, here) if where == root else os.path.basename(below): os.path.join(
                self._real.get(where, where), below
            )
            for where, below, _ in companions
        }
        try:
            return probe.run_checks(path, state, effect.checks, paths, registry.find_check, effect.siblings)
        except probe.Changed:
            return Judged(Verdict.INCOMPLETE, "it has changed since the replay began")
        except OSError as error:
            return Judged(Verdict.INCOMPLETE, f"it could not be read: {error.strerror}")


def _state(path: str) -> State | None:
    try:
        seen = os.lstat(path)
    except OSError:
        return None
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


# ------------------------------------------------------------------------- simulation


class _Simulation:
    """A disk, a scanner, a journal and providers around the real core, on a clock of their own."""

    def __init__(
        self, rules: Sequence[Rule], arrivals: Sequence[Arrival], checks: _Checks, time_zone: str
    ) -> None:
        self._rules = tuple(replace(rule, id=number) for number, rule in enumerate(rules, 1))
        paths = {rule.watch for rule in rules} | {c.root for rule in rules for c in rule.complete.companions}
        self._root_ids = {path: number for number, path in enumerate(sorted(paths), 1)}
        self._root_paths = {number: path for path, number in self._root_ids.items()}
        self._matchers = {
            number: Matcher([rule for rule in self._rules if rule.watch == path])
            for path, number in self._root_ids.items()
        }
        self._arrivals = sorted(
            (
                arrival._replace(at=min(max(arrival.at, FIRST), LAST))
                for arrival in arrivals
                if arrival.root in self._root_ids
            ),
            key=lambda arrival: arrival[:3],
        )
        self._checks = checks
        self._disk: dict[tuple[int, str], dict[str, State]] = {}
        self._open: dict[tuple[int, str], set[str]] = {}  # what some rule wants and has not claimed
        self._claims: dict[tuple[int, str], dict[tuple[int, int, int], int]] = {}  # -> (rule, size, mtime_ns) -> code
        self._travelled: set[tuple[int, str]] = set()  # as companions
        self._facts: deque[Fact] = deque()
        self._batch = 0
        self._report = Report()
        self._at = self._arrivals[0].at - SLACK_S if self._arrivals else 0.0
        self._engine = Engine(
            host="replay",
            providers=_Providers(prepare=False),
            rand=lambda: 0.5,
            runs_max=1_000_000,
            keep_done_s=0.0,
            time_zone=time_zone,
        )

    def run(self) -> Report:
        """Let all arrive, and time pass until nothing more can come of it."""
        engine = self._engine
        engine.restore(Saved(), self._at, self._at)
        self._step(model.RulesOffered(self._rules, self._root_ids, [], self._at))
        horizon = max((_horizon_s(rule) for rule in self._rules), default=0.0) + SLACK_S
        late_s = max((_horizon_s(replace(rule, batch=None)) for rule in self._rules), default=0.0)
        late_until = (self._arrivals[-1].at if self._arrivals else self._at) + late_s
        number, end, sweep_at = 0, self._at + horizon, self._at + FULL_S
        for _ in range(STEPS_MAX):
            coming = self._arrivals[number].at if number < len(self._arrivals) else math.inf
            deadline = self._deadline(sweep_at)
            if coming == math.inf and self._at > late_until:  # no companion will come any more
                for assembly in self._engine.assemblies.values():
                    self._engine.timers.cancel((assembly.settling, "late"))
            if deadline > end:  # all that rules wait for is over: such files never will be whole
                deadline = math.inf
                if end < coming < math.inf:  # what is due meanwhile (a time of day) was due before the next file came
                    self._at = max(self._at, coming - BEFORE_S)
                    self._step(model.Tick(self._at, self._at))
            if coming <= deadline:
                if coming == math.inf:
                    break
                number = self._arrive(number)
                end = coming + horizon
                continue
            self._at = max(self._at, deadline)
            if self._at >= sweep_at:
                sweep_at = self._at + FULL_S
                for root in self._root_paths:
                    self._sweep(root, 0)
            self._step(model.Tick(self._at, self._at))
        else:
            self._report.notes.append(f"ended after {STEPS_MAX:,} steps: the rest was not replayed")
        self._leave()
        self._notice()
        return self._report

    def _notice(self) -> None:
        """Tell of companions that came with no file at all, although their rule sent some."""
        sent = {batch["rule"] for batch in self._report.batches}
        for rule in self._rules:
            for companion in rule.complete.companions:
                root, pattern = self._root_ids[companion.root], compiled(companion.file, rule.case)
                came = any(where == root and pattern.match(path) is not None for where, path in self._travelled)
                if rule.name in sent and not came:
                    self._report.notes.append(
                        f"rule {rule.name}: no file came with a companion `{companion.file}` (in {companion.root})"
                    )

    def _deadline(self, sweep_at: float) -> float:
        deadline = self._engine.next_deadline()
        stuck = any(assembly.blocked for assembly in self._engine.assemblies.values())
        return min(math.inf if deadline is None else deadline, sweep_at if stuck else math.inf)

    # ------------------------------------------------------------------- disk

    def _arrive(self, number: int) -> int:
        """Let everything of one instant arrive, as hints do: one look a directory. Return what comes next."""
        at = self._arrivals[number].at
        self._at = max(self._at, at)
        names: dict[tuple[int, str], list[str]] = {}
        while number < len(self._arrivals) and self._arrivals[number].at == at:
            _, path, below, state = self._arrivals[number]
            number += 1
            directory, name = split(below)
            place = (self._root_ids[path], directory)
            if state is None:
                self._disk.get(place, {}).pop(name, None)
                self._open.get(place, set()).discard(name)
                continue
            self._disk.setdefault(place, {})[name] = state
            if self._matchers[place[0]].directory(directory).wants(name):
                self._open.setdefault(place, set()).add(name)
                names.setdefault(place, []).append(name)
        for (root, directory), some in names.items():
            self._look(root, directory, some, "hint", "close")
        return number

    def _look(
        self, root: int, directory: str, names: Iterable[str], cause: model.Cause, signal: model.Signal = "none"
    ) -> None:
        disk = self._disk.get((root, directory), {})
        rows: list[Row] = []
        for name in names:
            state = disk.get(name)
            wants = self._wants(root, directory, name, state)
            if wants or cause == "deadline":
                rows.append((name, state, wants))
        if rows:
            self._step(model.Seen(root, directory, rows, self._at, self._at, cause, signal, self._batch))

    def _wants(self, root: int, directory: str, name: str, state: State | None) -> tuple[model.Want, ...]:
        claims = self._claims.get((root, join(directory, name)), {})
        wants = []
        for rule in self._matchers[root].directory(directory).wants(name):
            if state is None or (rule, *state[:2]) not in claims:
                earlier = max((batch for (claimer, *_), batch in claims.items() if claimer == rule), default=0)
                wants.append((rule, max(earlier, 0)))
        return tuple(wants)

    def _sweep(self, root: int, asked: int) -> None:
        for (number, directory), names in list(self._open.items()):
            if number == root:
                self._look(root, directory, sorted(names), "sweep")
        self._step(model.Swept(root, True, self._at, self._at, True, 0, asked))

    # ------------------------------------------------------------------- steps

    def _step(self, fact: Fact) -> None:
        """Step a fact, and all the facts that come of it, in order."""
        self._facts.append(fact)
        if len(self._facts) > 1:
            return  # the loop below, further up the stack, takes it
        while self._facts:
            for effect in self._engine.step(self._facts[0]):
                self._carry(effect)
            self._facts.popleft()

    def _carry(self, effect: model.Effect) -> None:
        match effect:
            case model.Look(root, directory, names):
                self._look(root, directory, names, "deadline")
            case model.Sweep(root, _, ask):
                self._sweep(root, ask)
            case model.LookBack(ask, rule):  # its journal is new
                self._step(model.LookedBack(ask, rule, (), 0, self._at))
            case model.Mark(root):
                self._step(model.Marked(root, self._batch, self._at))
            case model.Check():
                self._check(effect)
            case model.BatchClosed():
                self._close(effect)
            case model.Claimed(rule, root, directory, rows, code):
                for name, size, mtime_ns in rows:
                    self._claim(root, directory, name, (rule, size, mtime_ns), code)
            case model.Prepare(run, attempt):
                self._step(model.Prepared(run, attempt, None, self._at))
            case model.Start(run, attempt) | model.Find(run, attempt):
                self._step(model.Started(run, attempt, None, self._at))
            case model.Poll(run, attempt):
                self._step(model.Polled(run, attempt, "succeeded", self._at))
            case model.Verify(run, attempt):
                self._step(model.Proved(run, attempt, (), self._at))

    def _check(self, effect: Check) -> None:
        companions = []
        for root, path in effect.companions:
            directory, name = split(path)
            if (state := self._disk.get((root, directory), {}).get(name)) is not None:
                companions.append((self._root_paths[root], path, state))
        judged = self._checks.run(effect, self._root_paths[effect.root], companions)
        self._step(judged.fact((effect.rule, effect.root, effect.path, effect.state), self._at, effect.scope))

    def _close(self, batch: model.BatchClosed) -> None:
        self._batch = batch.batch
        self._report.batches.append(trace.batch_words(batch))
        for member in batch.members:
            if member.role:
                self._travelled.add((member.root, member.path))
            else:
                version = (batch.rule, member.size, member.mtime_ns)
                self._claim(member.root, member.dir, member.name, version, batch.batch)

    def _claim(self, root: int, directory: str, name: str, version: tuple[int, int, int], code: int) -> None:
        self._claims.setdefault((root, join(directory, name)), {})[version] = code
        if not self._wants(root, directory, name, self._disk.get((root, directory), {}).get(name)):
            self._open.get((root, directory), set()).discard(name)

    # -------------------------------------------------------------------- left

    def _leave(self) -> None:
        """Name every file that is in no batch, and why."""
        names = {rule.id: rule.name for rule in self._rules}
        late = {
            (companion.root, companion.path)
            for assembly in self._engine.assemblies.values()
            for companion in assembly.settling.late
        }
        waiting = {(rule.id, path): words for rule, path, words in self._engine.open_files()}
        _owed(self._engine, self._report)
        taken = {
            self._absolute(root, path)
            for (root, path), claims in self._claims.items()
            if any(code > 0 for code in claims.values())
        } | {self._absolute(root, path) for root, path in self._travelled}
        for (root, directory), files in sorted(self._disk.items()):
            for name, state in sorted(files.items()):
                path = join(directory, name)
                ids = self._matchers[root].directory(directory).wants(name)
                claims = self._claims.get((root, path), {})
                for rule in ids:
                    code = claims.get((rule, *state[:2]))
                    if rule > 0 and code is None:
                        words = waiting.get((rule, path), {"because": "it was not looked at", "stage": "settling"})
                        because, stage = words["because"], words["stage"]
                    elif rule > 0 and code in _CODES:
                        because, stage = _CODES[code], "skipped"
                    elif rule < 0 and len(ids) == 1 and self._absolute(root, path) not in taken:
                        because = "a marker: it " + ("closed its batches" if code is not None else "has closed nothing")
                        stage = "marker"
                    else:
                        continue
                    self._report.leave(self._root_paths[root], path, names[abs(rule)], because, stage)
                if not ids and self._absolute(root, path) not in taken and (root, path) not in late:
                    self._unmatched(root, path)

    def _absolute(self, root: int, path: str) -> str:
        return join(self._root_paths[root].rstrip("/"), path)

    def _unmatched(self, root: int, path: str) -> None:
        where = self._root_paths[root]
        for rule in self._rules:
            for companion in rule.complete.companions:
                if companion.root == where and compiled(companion.file, rule.case).match(path) is not None:
                    words = "a companion: no file that it belongs to was sent"
                    self._report.leave(where, path, rule.name, words, "companion")
                    return
        for assembly in self._engine.assemblies.values():
            directory, name = split(path)
            for waiting in assembly.settling.awaited.get((root, directory), {}).get(name, ()):
                for member in waiting.members:
                    words = f"needed by {member.path}, which is not complete"
                    self._report.leave(where, path, assembly.rule.name, words, "companion")
                    return
        rules = [rule for rule in self._rules if rule.watch == where]
        for rule in rules:
            stage, words = why_not(rule, path)
            if stage == "ignored" or len(rules) == 1:
                self._report.leave(where, path, rule.name, words, stage)
                return
        words = "no rule matches it" if rules else "no file needs it as a companion"
        self._report.leave(where, path, None, words, "unmatched")


def _horizon_s(rule: Rule) -> float:
    """Return how long after the last file something of it may still happen by itself."""
    complete, batch = rule.complete, rule.batch
    waits = [complete.stalled_after_s, complete.suspect_s or 0.0, *(c.wait_s + LATE_S for c in complete.companions)]
    horizon = 2 * complete.quiescence_s + max(waits)
    if batch:
        marker = (batch.close_on.quiescence_s or 0.0) if batch.close_on else 0.0
        horizon += (batch.oldest_waits_s or 0.0) + (batch.idle_s or 0.0) + marker
        horizon += 2 * DAY_S if batch.at else 0.0
    return horizon
