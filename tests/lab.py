"""A laboratory for the core: a simulated disk, scanner, journal and provider around the real engine, on a passed clock.

Nothing here sleeps or touches a file. The lab keeps its own truth (every write
with its instant), so that its oracle judges batches without asking the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trigger_daemon.core import model, patterns
from trigger_daemon.core.assembly import FRESH_S
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import RECORDS, RunState, split
from trigger_daemon.core.rules import Batch, Complete, Rule
from trigger_daemon.core.saved import Count, OpenRun, Saved, SavedAlarm, SavedAttempt, SavedMark
from trigger_daemon.core.storage import Condition, Limits

ROOT = 1
UTC = 1_800_000_000.0


def rule(name: str = "r", number: int = 1, **keys: Any) -> Rule:
    """Return a rule over /data that copies every *.tif, with a quiet period of 30 s."""
    keys.setdefault("match", ("**/*.tif", "*.tif"))
    keys.setdefault("existing", "process")
    complete = keys.pop("complete", Complete())
    keys.setdefault("watch", "/data")
    keys.setdefault("options", {"to": "/out"})
    return Rule(name=name, id=number, action="fake", complete=complete, **keys)


class FakeProviders:
    """What the engine asks about actions."""

    def __init__(self, prepares: bool = False) -> None:
        self._prepares = prepares

    def prepares(self, action: str) -> bool:
        return self._prepares

    def at_once(self, action: str) -> int | None:
        return None

    def leaves_out(self, action: str) -> bool:
        return True

    def refuses(self, action: str, options: Mapping[str, Any], root: str, path: str) -> str:
        return "the fake takes no such name" if path.endswith(".untaken") else ""

    def templates(self, action: str) -> frozenset[str]:
        return frozenset({"to"})

    def extra_names(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def destination(self, action: str, options: Mapping[str, Any]) -> str:
        return str(options["to"])

    def writes(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(options["to"]),)


@dataclass
class Ledger:
    """The journal of the lab: what a real one would keep, and the laws it enforces."""

    claims: dict[tuple[int, str], dict[tuple[int, int], int]] = field(default_factory=dict)
    batches: dict[int, model.BatchClosed] = field(default_factory=dict)
    last_batch: int = 0
    states: dict[int, RunState] = field(default_factory=dict)
    final: set[int] = field(default_factory=set)
    attempts: dict[int, SavedAttempt] = field(default_factory=dict)
    marks: dict[tuple[int, str, str], tuple[int, float]] = field(default_factory=dict)
    baselines: dict[tuple[int, int], float] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    alarms: dict[str, SavedAlarm] = field(default_factory=dict)

    def write(self, record: model.Effect) -> None:
        match record:
            case model.BatchClosed():
                assert record.batch not in self.batches
                self.batches[record.batch] = record
                self.last_batch = max(self.last_batch, record.batch)
                self.states[record.batch] = RunState.PENDING
                for member in record.members:
                    if member.role:
                        continue
                    versions = self.claims.setdefault((record.rule, member.path), {})
                    version = (member.size, member.mtime_ns)
                    assert record.again or version not in versions, f"claimed twice: {member}"
                    versions[version] = record.batch
            case model.Released():
                for path in record.paths:
                    versions = self.claims.get((record.rule, path), {})
                    gone = (record.batch, model.CLAIM_REWRITE_IGNORED)
                    for version in [v for v, batch in versions.items() if batch in gone]:
                        del versions[version]
            case model.Claimed():
                for name, size, mtime in record.rows:
                    path = model.join(record.dir, name)
                    self.claims.setdefault((record.rule, path), {}).setdefault((size, mtime), record.code)
            case model.Renewed():
                request, destination = record.request, record.destination
                self.batches[record.run] = replace(self.batches[record.run], request=request, destination=destination)
            case model.RunMoved():
                assert self.states[record.run] == record.from_state
                self.states[record.run] = record.to_state
                if record.final:
                    self.final.add(record.run)
            case model.AttemptMade():
                self.attempts[record.run] = SavedAttempt(record.attempt, record.prepared, None, record.time, None, None)
            case model.AttemptChanged():
                old = self.attempts[record.run]
                self.attempts[record.run] = replace(
                    old, handle=record.handle or old.handle, ended_time=record.ended_time or old.ended_time,
                    outcome=record.outcome or old.outcome,
                )
            case model.GroupSet():
                self.marks[(record.rule, record.group, record.kind)] = (record.batch, record.time)
            case model.GroupForgotten():
                self.marks.pop((record.rule, record.group, record.kind), None)
            case model.BaselineSet():
                self.baselines[(record.rule, record.root)] = record.time
            case model.Kept():
                self.kept[record.key] = record.value
                if record.value is None:
                    del self.kept[record.key]
            case model.AlarmRaised():
                self.alarms[record.key] = SavedAlarm(record.key, record.what, record.hint, record.time, None, None)
            case model.ClaimsCarried():
                pass
            case model.AlarmCleared():
                self.alarms.pop(record.key, None)

    def saved(self, rules: Mapping[int, str]) -> Saved:
        runs = [
            OpenRun(
                id=n,
                rule=b.rule,
                group=b.group,
                state=self.states[n],
                because="",
                created_time=b.time,
                changed_time=b.time,
                attempts=self.attempts[n].attempt if n in self.attempts else 0,
                destination=b.destination,
                waits_on=b.waits_on,
                retry_time=None,
                error=None,
                hint=None,
                files=len(b.members),
                bytes=b.bytes,
                request=b.request,
                attempt=self.attempts.get(n),
                output=None,
            )
            for n, b in sorted(self.batches.items())
            if n not in self.final
        ]
        tally: dict[tuple[int, str], Count] = {}
        for n, state in self.states.items():
            key = (self.batches[n].rule, str(state))
            old = tally.get(key, Count(0, 0, 0))
            tally[key] = Count(
                old.runs + 1, old.files + len(self.batches[n].members), old.bytes + self.batches[n].bytes
            )
        return Saved(
            last_batch=self.last_batch,
            runs=tuple(runs),
            kept=self.kept,
            baselines=self.baselines,
            groups=tuple(SavedMark(r, g, k, b, t) for (r, g, k), (b, t) in self.marks.items()),
            alarms=tuple(self.alarms.values()),
            tally=tally,
            rules=rules,
            roots={ROOT: "/data"},
        )


class Lab:
    """One engine in its laboratory. `auto`: the provider takes, finishes and proves at once."""

    def __init__(
        self, *rules: Rule, auto: bool = True, companion_roots: Mapping[str, int] | None = None, prepares: bool = False,
        limits: Sequence[Limits] = (), conditions: Sequence[Condition] = (),
    ) -> None:  # fmt: skip
        self.rules = rules
        self.names: dict[int, str] = {}  # of every rule there ever was
        self.prepares = prepares
        self.utc = UTC  # what the wall clock says at monotonic 0
        self.unreadable: set[tuple[int, str]] = set()  # paths (or "" for all of a root) whose lstat fails
        self.looks_wait: list[model.Look] | None = None  # a list: looks gather in it instead of being answered
        self.checks_wait: list[model.Check] | None = None
        self.sweeps_fail = False
        self.sweeps_wait = False
        self.marks_lost = False
        self.look_back: Callable[[model.LookBack], Any] | None = None  # in place of what the ledger knows
        self.roots = {"/data": ROOT, **(companion_roots or {})}
        self.auto = auto
        self.at = 1_000.0
        self.ledger = Ledger()
        self.disk: dict[tuple[int, str], tuple[int, int, int, int]] = {}
        self.history: dict[tuple[int, str], list[tuple[float, tuple[int, int, int, int] | None]]] = {}
        self.effects: list[model.Effect] = []
        self.verdicts: dict[str, tuple[model.Verdict, str]] = {}
        self.asked: list[model.Effect] = []  # what the provider was asked, after its commit
        self.closed: list[tuple[float, model.BatchClosed]] = []
        self.limits, self.conditions = limits, conditions
        self.away = False
        self.look_takes_s = 0.0
        self.slowest_look_s = 0.0
        self._counter = itertools.count(1)
        self._last_sweep = 0
        self._start()

    # ----------------------------------------------------------------- engine

    def _start(self) -> None:
        self.engine = Engine(
            host="lab", providers=FakeProviders(self.prepares), rand=lambda: 0.0, limits=self.limits,
            conditions=self.conditions,
        )  # fmt: skip
        self.names.update({r.id: r.name for r in self.rules})
        self.engine.restore(self.saved(), self.at, self.utc + self.at)
        self.offer(*self.rules)

    def saved(self) -> Saved:
        """Return what the engine is restored from."""
        return self.ledger.saved(self.names)

    def commit(self, records: list[model.Effect]) -> None:
        """Write the records of a step elsewhere, too."""

    def offer(self, *rules: Rule, applied: str = "") -> None:
        self.names.update({r.id: r.name for r in rules})
        self.rules = rules
        self.step(model.RulesOffered(rules, self.roots, [], self.at, None, applied))

    def crash(self) -> None:
        """Forget everything but the journal."""
        self._start()

    def step(self, fact: model.Fact) -> list[model.Effect]:
        effects = self.engine.step(fact)
        self.commit([effect for effect in effects if isinstance(effect, RECORDS)])
        for effect in effects:
            if isinstance(effect, RECORDS):
                self.ledger.write(effect)
                if isinstance(effect, model.BatchClosed):
                    self.closed.append((self.at, effect))
        self.effects += effects
        for effect in effects:
            self._carry(effect)
        return effects

    def _carry(self, effect: model.Effect) -> None:
        match effect:
            case model.Look():
                if self.looks_wait is not None:
                    self.looks_wait.append(effect)
                elif not self.away:
                    self.look(effect.root, effect.dir, effect.names, "deadline")
                else:
                    self.step(model.Unreadable(effect.root, effect.dir, effect.names, "root lost", self.at))
            case model.Sweep():
                self._last_sweep = max(self._last_sweep, effect.ask)
                if not self.away and not self.sweeps_wait:
                    self.sweep(not self.sweeps_fail)
            case model.LookBack():
                (self.look_back or self._look_back)(effect)
            case model.Mark() if self.marks_lost:
                pass
            case model.Mark():
                self.step(model.Marked(effect.root, self.ledger.last_batch, self.at))
            case model.Check() if self.checks_wait is not None:
                self.checks_wait.append(effect)
            case model.Check():
                verdict, why = self.verdicts.get(effect.path, (model.Verdict.COMPLETE, "whole"))
                self.step(model.Checked(*self._about(effect), verdict, why, self.at, scope=effect.scope))
            case model.Start() | model.Find() | model.Poll() | model.Cancel() | model.Verify() | model.Prepare():
                self.asked.append(effect)
                if self.auto:
                    self._provide(effect)

    def _look_back(self, effect: model.LookBack) -> None:
        """Answer as the journal does."""
        well = (RunState.VERIFIED, RunState.SUCCEEDED)
        runs = [
            (number, batch.request["captures"]) for number, batch in sorted(self.ledger.batches.items(), reverse=True)
            if batch.rule == effect.rule and number in self.ledger.final and self.ledger.states[number] in well
        ]  # fmt: skip
        self.step(model.LookedBack(effect.ask, effect.rule, runs, 0, self.at))

    def _provide(self, effect: model.Effect) -> None:
        match effect:
            case model.Start(run, attempt) | model.Find(run, attempt):
                self.step(model.Started(run, attempt, {"n": attempt}, self.at))
                self.step(model.Polled(run, attempt, "succeeded", self.at))
            case model.Poll(run, attempt):
                self.step(model.Polled(run, attempt, "succeeded", self.at))
            case model.Verify(run, attempt):
                members = [{"path": m.path, "size": m.size} for m in self.ledger.batches[run].members]
                self.step(model.Proved(run, attempt, members, self.at))

    # ------------------------------------------------------------------- disk

    def write(
        self,
        path: str,
        size: int = 10,
        *,
        heard: bool = True,
        signal: model.Signal = "close",
        root: int = ROOT,
        mtime: int | None = None,
    ) -> None:
        """Write a file now; `heard` says whether an event comes."""
        stamp = next(self._counter)
        inode = self.disk.get((root, path), (0, 0, 0, stamp))[3]
        state = (size, stamp if mtime is None else mtime, stamp, inode)
        self.disk[(root, path)] = state
        self.history.setdefault((root, path), []).append((self.at, state))
        if heard and not self.away and root == ROOT:
            directory, name = split(path)
            self.look(root, directory, (name,), "hint", signal)

    def remove(self, path: str) -> None:
        self.disk.pop((ROOT, path), None)
        self.history.setdefault((ROOT, path), []).append((self.at, None))

    def _wants(self, root: int, path: str, joined: bool) -> tuple[tuple[int, int], ...]:
        wants = []
        for number, _ in self._wanting(root, path):
            versions = self.ledger.claims.get((number, path), {}) if joined else {}
            now = self.disk.get((root, path), (0, 0))[:2]
            if now in versions:
                continue
            earlier = max([b for b in versions.values() if b > 0], default=0)
            wants.append((number, earlier))
        return tuple(wants)

    def _wanting(self, root: int, path: str) -> list[tuple[int, Rule]]:
        found = []
        for one in self.rules:
            if self.roots[one.watch] != root:
                continue
            if patterns.captures_of(one, path) is not None:
                found.append((one.id, one))
            if one.batch and one.batch.close_on and patterns.Pattern(one.batch.close_on.file).match(path) is not None:
                found.append((-one.id, one))
        return found

    def look(
        self, root: int, directory: str, names: tuple[str, ...], cause: model.Cause, signal: model.Signal = "none"
    ) -> None:
        joined = cause != "hint" or signal != "none"
        rows = []
        unread = tuple(n for n in names if {(root, model.join(directory, n)), (root, "")} & self.unreadable)
        if unread:
            self.step(model.Unreadable(root, directory, unread, "Permission denied", self.at))
            names = tuple(n for n in names if n not in unread)
            if not names:
                return
        for name in names:
            path = model.join(directory, name)
            state = self.disk.get((root, path))
            wants = self._wants(root, path, joined) if state else ()
            if cause == "deadline" or wants:
                rows.append((name, state, wants))
        began = self.at
        self.at += self.look_takes_s
        self.slowest_look_s = max(self.slowest_look_s, self.look_takes_s)
        as_of = self.ledger.last_batch if joined else -1
        self.step(model.Seen(root, directory, rows, began, self.at, cause, signal, as_of))

    def sweep(self, ok: bool = True, *, asked: int | None = None) -> None:
        """A full sweep, at this instant; it answers what was asked before (once, as the scanner does)."""
        began = self.at
        if asked is None:
            asked, self._last_sweep = self._last_sweep, 0
        by_dir: dict[tuple[int, str], list[model.Row]] = {}
        for (root, path), state in sorted(self.disk.items()):
            if root != ROOT:
                continue
            directory, name = split(path)
            wants = self._wants(root, path, joined=True)
            if wants:
                by_dir.setdefault((root, directory), []).append((name, state, wants))
        as_of = self.ledger.last_batch
        for (root, directory), rows in by_dir.items():
            self.step(model.Seen(root, directory, rows, began, self.at, "sweep", "none", as_of))
        self.step(model.Swept(ROOT, True, began, self.at, ok, len(self.disk), asked))

    # ------------------------------------------------------------------- time

    def run_until(self, at: float) -> None:
        """Let the clock go on, with a tick at every deadline."""
        for _ in range(100_000):
            deadline = self.engine.next_deadline()
            if deadline is None or deadline > at:
                break
            self.at = max(self.at, deadline)
            self.step(model.Tick(self.at, self.utc + self.at))
        else:
            raise AssertionError("the engine asks for ticks without end")
        self.at = max(self.at, at)
        self.step(model.Tick(self.at, self.utc + self.at))

    def run_for(self, seconds: float) -> None:
        self.run_until(self.at + seconds)

    def answer_looks(self) -> None:
        """Let the looks that wait be answered, and those to come at once."""
        looks, self.looks_wait = self.looks_wait or [], None
        for look in looks:
            self._carry(look)

    def answer_check(
        self, path: str, verdict: model.Verdict = model.Verdict.COMPLETE, why: str = "whole", **keys: Any
    ) -> None:
        """Answer a check that waits."""
        check = next(c for c in self.checks_wait or [] if c.path == path)
        assert self.checks_wait is not None
        self.checks_wait.remove(check)
        self.step(model.Checked(*self._about(check), verdict, why, self.at, scope=check.scope, **keys))

    @staticmethod
    def _about(check: model.Check) -> tuple[int, int, str, model.State]:
        return check.rule, check.root, check.path, check.state

    def order(self, verb: str, **args: Any) -> Mapping[str, Any]:
        effects = self.step(model.Order(next(self._counter), verb, args, "operator", "", self.at))
        return next(e.answer for e in effects if isinstance(e, model.Answer))

    def explain(self, path: str) -> list[Mapping[str, Any]]:
        return list(self.order("explain", path=f"/data/{path}")["rules"])

    # ----------------------------------------------------------------- oracle

    def batches(self) -> list[tuple[str, ...]]:
        """Return the paths of every batch, in order of closing."""
        return [tuple(m.path for m in record.members) for _, record in self.closed]

    def judge_early(self, quiet_s: float) -> None:
        """No version was batched before it had stood unchanged for the quiet period, by the lab's own record."""
        for at, record in self.closed:
            for member in record.members:
                if member.role:
                    continue
                past = [entry for entry in self.history[(member.root, member.path)] if entry[0] <= at]
                version = (member.size, member.mtime_ns)
                # The last look is at most so old: a change after it is the next version's business.
                oldest = at - FRESH_S - self.slowest_look_s
                for index in reversed(range(len(past))):
                    when, state = past[index]
                    until = past[index + 1][0] if index + 1 < len(past) else at
                    if state is not None and state[:2] == version and until >= oldest:
                        assert until - when >= quiet_s - 1e-6, f"{member} closed {at - when} s after its last change"
                        break
                else:
                    raise AssertionError(f"{member} was not what was there: {past[-3:]}, closed at {at}")


def batched(**keys: Any) -> Batch:
    return Batch(**keys)
