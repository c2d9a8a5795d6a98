"""Runs: which one starts next, what each waits for, and what follows each answer of a provider.

Pure. Everything needed to recognise an attempt goes out as a record in the
same step as the effect that asks the provider, and the loop commits records
before it carries effects out. A new attempt begins only on the provider's word
that the last one has ended.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trigger_daemon.core import lifecycle, retry
from trigger_daemon.core.assembly import canonical
from trigger_daemon.core.lifecycle import Event
from trigger_daemon.core.model import (
    AttemptChanged,
    AttemptMade,
    Cancel,
    CannotVerify,
    Effect,
    Fault,
    Find,
    GroupForgotten,
    GroupSet,
    Kept,
    Log,
    LookBack,
    LookedBack,
    Mismatch,
    NotStarted,
    Poll,
    Polled,
    Prepare,
    Prepared,
    ProofKept,
    Proved,
    Renewed,
    RunMoved,
    RunState,
    Scope,
    Start,
    Started,
    StartUnknown,
    Verify,
    counted,
)
from trigger_daemon.core.rules import Retry
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from trigger_daemon.core.alarms import Alarms
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.core.saved import OpenRun
    from trigger_daemon.core.storage import Storage
    from trigger_daemon.core.timers import Timers

PROBE_LOST_S = 600.0  # a probe that has told nothing by then is followed by another one
FIRST_POLL_S = 1.0  # a provider that has news earlier nudges
UNREACHABLE_POLL_MAX_S = 60.0
UNREACHABLE_ALARM_S = 600.0
FIND_AGAIN_S = 5.0
PROOFS_AGAIN_MAX = 2  # of one destination that are asked for again at once: each may read much
MISMATCHES_MAX = 1  # members that differ go once again; then a person looks
CANCEL_AGAIN_S = 15.0  # a wish that came to nothing is repeated: the provider may not have heard it
CANCEL_AGAIN_MAX_S = 300.0
SUCCEEDED = "succeeded"  # the outcome of an attempt after which only the proof is missing

WAITS_LOOKED_MAX = 20_000  # runs that are looked at when somebody asks what waits, some 30 ms
WAITS_MAX = 20  # reasons that are told one by one

LEFT = "left:"  # under which the journal keeps what an ended run still waited for

FOLLOWED = "followed"  # the mark of a rule and captures for which its successes are remembered
LOOK_BACK_AGAIN_S = 60.0  # after a journal that could not be read

Followed = tuple[int, tuple[str, ...]]  # a rule, and the captures by which its successes are remembered


_STILL = (RunState.HELD, RunState.INACTIVE, RunState.PENDING)  # they do not move; who needs a person comes first
_NUMBERS = re.compile(r"(?<!\S)\d[\d.,]*(?!\S)")  # words that are numbers: what they count changes, the reason not


@dataclass(slots=True, eq=False)
class Run:
    """An open run. The manifest stays in the journal."""

    id: int
    rule: str
    rule_id: int
    group: Mapping[str, str]
    request: Mapping[str, Any]
    destination: str
    files: int
    bytes: int
    state: RunState = RunState.PENDING
    created_at: float = 0.0
    attempts: int = 0
    prepared: Any = None
    handle: Any = None
    live: bool = False  # an attempt may be under way
    slot: bool = False  # counts against the limits
    asked: bool = False  # a prepare is under way
    place: str = ""  # where a PENDING run waits: ready, parked, after, blocked, retry; entries elsewhere are stale
    own: int = 0  # files that are no companions
    failures: int = 0
    failing_since: float | None = None
    mismatches: int = 0
    waits_on: set[int] = field(default_factory=set)
    waiting: str = ""
    newer: set[str] = field(default_factory=set)
    unreachable_since: float | None = None
    files_done: int = 0
    bytes_done: int = 0
    error: str = ""
    hint: str = ""
    output: Any = None
    cancel: bool = False
    delivered: bool = False  # its last attempt succeeded, and nothing has differed: only the proof is missing

    @property
    def captures(self) -> Mapping[str, str]:
        return {**self.request.get("captures", {}), **self.group}

    @property
    def gate(self) -> Mapping[str, Any] | None:
        """What has to succeed before it begins, {"rule", "number", "same"}; None once nothing has to."""
        gate: Mapping[str, Any] | None = self.request.get("after")
        return None if gate is None or self.attempts or gate.get("anyway") else gate  # what has begun once has passed


@dataclass(slots=True)
class Down:
    """A destination that is down: one probe at a time, no attempts burnt."""

    why: str
    hint: str
    failures: int
    probe_at: float
    probing: int = 0
    parked: list[int] = field(default_factory=list)


class Runs:
    """All open runs."""

    def __init__(
        self,
        *,
        timers: Timers,
        out: list[Effect],
        alarms: Alarms,
        utc: Callable[[float], float],
        witnessed: Callable[[float], float] = lambda at: at,
        rand: Callable[[], float],
        marks: dict[tuple[int, str, str], tuple[int, float]],
        runs_max: int,
        prepares: Callable[[str], bool],
        on_outdated: Callable[..., None],
        leaves_out: Callable[[str], bool],
        at_once: Callable[[str], int | None],
        writes: Callable[[str, Mapping[str, Any]], Iterable[str]],
        storage: Storage,
    ) -> None:
        self.timers = timers
        self.out = out
        self.alarms = alarms
        self.utc = utc
        self.witnessed = witnessed
        self.rand = rand
        self.marks = marks
        self.runs_max = runs_max
        self.prepares = prepares
        self._on_outdated = on_outdated
        self._leaves_out = leaves_out
        self._at_once = at_once
        self._written = writes
        self.storage = storage
        self.open: dict[int, Run] = {}
        self.rules: dict[str, Rule] = {}
        self._numbers: set[int] = set()  # of the rules in force
        self.paused_all = ""
        self.paused_rules: set[str] = set()
        self.down: dict[str, Down] = {}
        self.tally: dict[tuple[int, str], list[int]] = {}  # (rule id, state) -> runs, files, bytes
        self.dirty = False
        self._ready: dict[str, list[int]] = {}
        self._working: dict[str, int] = {}
        self._after: dict[
            tuple[int, str], dict[int, None]
        ] = {}  # (rule id, captures) -> runs that wait for its success
        self._blocking: dict[int, list[int]] = {}  # run -> runs that wait for its end
        self._left: dict[int, set[int]] = {}  # ended run -> open runs that it still waited for
        self._provided: dict[str, set[int]] = {}  # action -> runs that have a place at its provider
        self.destination_max: int | None = None  # runs at work at one destination
        self._at: dict[str, set[int]] = {}  # destination -> runs that have a slot there
        self._proving: dict[str, set[int]] = {}  # destination -> runs whose proof is asked for again
        self._to_prove: dict[str, dict[int, int]] = {}  # destination -> runs that wait for that -> attempt
        self._idle: set[int] = set()  # runs that have a place and stand still (INACTIVE)
        self._followed: dict[int, set[tuple[str, ...]]] = {}  # rule id -> sets of `same` that others ask for
        self._leading: dict[tuple[int, str], set[int]] = {}  # (rule id, captures) -> open runs that others wait for
        self._looking: dict[Followed, int] = {}  # what the journal is asked for -> the number of the question
        self._asks = 0
        self._added: list[int] = []  # runs of this step
        self._following = False  # a rule set of this life has been taken

    # ----------------------------------------------------------------- policy

    @property
    def at_work(self) -> int:
        """Return how many runs count against `runs` of the throttle: those that stand still do not."""
        return sum(self._working.values()) - len(self._idle)

    def follows(self, rule_id: int) -> Iterable[tuple[str, ...]]:
        """Return the sets of captures for which other rules wait until this one succeeded."""
        return self._followed.get(rule_id, ())

    def use(self, rules: Sequence[Rule], at: float) -> None:
        """Take the rule set in force; open runs go on with what they were made with. `follow` is called next."""
        self.rules = {rule.name: rule for rule in rules}
        self._numbers = {rule.id for rule in rules}
        for run in [run for run in self.open.values() if run.place == "after" and "after" not in run.request]:
            self._enqueue(run, at)  # of an earlier version, which waits for its rule
        self.dirty = True

    def _retry_policy(self, run: Run) -> Retry:
        rule = self.rules.get(run.rule)
        return rule.retry if rule else Retry(**run.request.get("retry", {}))

    def _proof_required(self, run: Run) -> bool:
        return bool(run.request.get("proof", "required") == "required")

    # ------------------------------------------------------------------ begin

    def add(self, run: Run, at: float) -> None:
        """Take a run whose batch was just closed."""
        run.created_at = at
        self.open[run.id] = run
        self._count(run, +1)
        self._lead(run)
        self._enqueue(run, at)
        if run.place == "ready":
            self._added.append(run.id)

    def restore(self, saved: Iterable[OpenRun], names: Mapping[int, str], kept: Mapping[str, Any], at: float) -> None:
        """Take the open runs of the journal: ask the providers about what was under way, once."""
        for key, alarm in list(self.alarms.open.items()):
            kind, _, destination = key.partition(":")
            if kind == "destination":  # was down, and is probed before all others start
                why = alarm.what.partition(" is down: ")[2]
                self.down[destination] = Down(why, alarm.hint, 0, at)
                self.timers.set(("probe", destination), at, functools.partial(self._probe, destination))
        for old in saved:
            run = Run(
                old.id,
                names.get(old.rule, str(old.rule)),
                old.rule,
                old.group,
                old.request,
                old.destination,
                old.files,
                old.bytes,
                state=RunState(old.state),
                created_at=at + old.created_time - self.utc(at),
                attempts=old.attempts,
                waits_on=set(old.waits_on),
                error=old.error or "",
                hint=old.hint or "",
                output=old.output,
                own=old.files,
            )
            self.open[run.id] = run
            if f"unreachable:{run.id}" in self.alarms.open:
                run.unreachable_since = at
            for other in run.waits_on:
                if (earlier := self.open.get(other)) is not None and earlier.own == 1:
                    earlier.newer.add("")  # its only file has a newer version: this run's
            attempt = old.attempt
            if attempt is not None:
                run.prepared, run.handle = attempt.prepared, attempt.handle
                run.live = attempt.ended_time is None
                run.delivered = attempt.outcome == SUCCEEDED
            self._resume(run, at)
        for key in [key for key in kept if key.startswith(LEFT)]:
            ended, left = int(key.removeprefix(LEFT)), {other for other in kept[key] or () if other in self.open}
            self._leave(ended, left)
            for other in left:
                self._blocking.setdefault(other, []).append(ended)

    def _resume(self, run: Run, at: float) -> None:
        run.waits_on = {other for other in run.waits_on if other in self.open and other != run.id}
        for other in run.waits_on:
            self._blocking.setdefault(other, []).append(run.id)
        if run.state == RunState.PENDING:
            self._enqueue(run, at)
            return
        if run.state == RunState.SUCCEEDED:
            self._take_slot(run)
            self.out.append(Verify(run.id, run.attempts, run.handle))
            return
        if not run.live:
            if run.state == RunState.CANCELLING:
                self._end(run, Event.CANCELLED, "nothing was under way", at)
            elif run.state == RunState.ABANDONED:
                self._abandoned(run, "nothing was under way", at)
            return
        self._take_slot(run)
        run.cancel = run.state == RunState.CANCELLING
        if run.handle is None:
            self._find(run)
        else:
            if run.cancel:
                self._wish_end(run, at)
            self.out.append(Poll(run.id, run.attempts, run.handle))

    # -------------------------------------------------------------- admission

    def _enqueue(self, run: Run, at: float) -> None:
        """Put a PENDING run where it waits: for another run, for a rule's success, or for its turn."""
        if run.slot:
            return  # it is being prepared; the answer moves it
        if fault := run.request.get("fault"):
            self._hold(
                run, str(fault), f"mend the rule, then `trigger-daemon runs retry {run.id} --anew`", at
            )
            return
        blockers = [other for other in run.waits_on if other in self.open]
        if blockers:
            for other in blockers:
                queue = self._blocking.setdefault(other, [])
                if run.id not in queue:
                    queue.append(run.id)
            run.place = "blocked"
            run.waiting = f"run {min(blockers)}, which takes an earlier version of the same file"
            return
        if self._gated(run, at):
            run.place = "after"
            return
        down = self.down.get(run.destination)
        if down and down.probing != run.id:
            self._park(run, down)
            return
        run.waiting = "its turn"
        self._line_up(run)

    def _park(self, run: Run, down: Down) -> None:
        if run.place != "parked":
            run.place = "parked"
            down.parked.append(run.id)
        run.waiting = f"destination {run.destination}: {down.why}"

    def _line_up(self, run: Run) -> None:
        if run.place != "ready":
            run.place = "ready"
            heapq.heappush(self._ready.setdefault(run.rule, []), run.id)
        self.dirty = True

    def _retry_at(self, run: Run, wait_s: float, at: float, why: str) -> None:
        if wait_s <= 0:
            self._enqueue(run, at)
            return
        run.place = "retry"
        run.waiting = f"the next attempt, after: {why}"
        self.timers.set(("retry", run.id), at + wait_s, lambda now: self._retry_due(run, now))

    def _retry_due(self, run: Run, now: float) -> None:
        if run.place == "retry":
            self._enqueue(run, now)

    def admit(self, at: float) -> None:
        """Start what may start: by priority, then in order of closing."""
        self.dirty = False
        for number in self._added:  # the file that closed its batch may be the one by which the other rule begins anew
            run = self.open.get(number)
            if run is not None and run.place == "ready" and self._gated(run, at):
                run.place = "after"
        self._added.clear()
        if self.paused_all or self.storage.instrument or self.at_work >= self.runs_max:
            return  # whatever ends any of these comes here again
        order = sorted(self._ready, key=lambda name: (self.storage.rank(name), -self._priority(name)))
        for name in order:
            queue = self._ready[name]
            rule = self.rules.get(name)
            limit = rule.runs_max if rule and rule.runs_max is not None else math.inf
            while queue and self.at_work < self.runs_max and self._working.get(name, 0) < limit:
                if name in self.paused_rules:
                    break
                run = self.open.get(heapq.heappop(queue))
                if run is None or run.place != "ready":
                    continue
                down = self.down.get(run.destination)
                if down and down.probing != run.id:
                    self._park(run, down)
                    continue
                if self._provider_full(run):
                    heapq.heappush(queue, run.id)
                    break
                if self._destination_full(run):
                    heapq.heappush(queue, run.id)
                    break
                needs, _ = self._needs(run)
                if why := self.storage.impossible(needs):
                    self._hold(run, f"it can never fit: {why}", "lower `reserve`, or send it elsewhere", at)
                    continue
                if why := self.storage.refuses(needs, at):
                    run.waiting = why  # in its turn: what comes behind it waits too
                    heapq.heappush(queue, run.id)
                    break
                self._begin(run, at)
            if not queue:
                del self._ready[name]

    def _priority(self, name: str) -> int:
        rule = self.rules.get(name)
        return rule.priority if rule else 0

    def _needs(self, run: Run) -> tuple[dict[str, int], dict[str, int]]:
        """Return how many bytes a run may still write on which volumes, and how many in all.

        What its last attempt has written lies there and is in the gauge; an attempt of before a restart is not known.
        """
        paths = tuple(self._written(str(run.request.get("action", "")), run.request.get("options", {})))
        left = max(0, run.bytes - run.bytes_done)
        return self.storage.needs(paths, left), self.storage.needs(paths, run.bytes)

    def _provider_full(self, run: Run) -> bool:
        """Say whether a provider serves as many as it does at once: its own queue would take the order from us.

        What stands still there is served, too, as long as it lives.
        """
        action = str(run.request.get("action", ""))
        most = self._at_once(action)
        return most is not None and len(self._provided.get(action, ())) >= most

    def _destination_full(self, run: Run) -> bool:
        """Say whether as many as may be are at work where a run goes."""
        if self.destination_max is None:
            return False
        return len(self._at.get(run.destination, set()) - self._idle) >= self.destination_max

    def _take_slot(self, run: Run) -> None:
        if not run.slot:
            run.slot = True
            self._at.setdefault(run.destination, set()).add(run.id)
            if run.state != RunState.SUCCEEDED:  # a proof is no more work of the provider's, and writes nothing
                self._provided.setdefault(str(run.request.get("action", "")), set()).add(run.id)
                self.storage.hold(run.id, *self._needs(run))
            self._stands_still(run, run.state == RunState.INACTIVE)  # so it was before a restart
            self._working[run.rule] = self._working.get(run.rule, 0) + 1

    def _free_slot(self, run: Run, at: float) -> None:
        if run.slot:
            run.slot = False
            self.storage.release(run.id, at)
            self._at[run.destination].discard(run.id)
            if not self._at[run.destination]:
                del self._at[run.destination]
            self._idle.discard(run.id)
            self._provided.get(str(run.request.get("action", "")), set()).discard(run.id)
            self._working[run.rule] -= 1
            if not self._working[run.rule]:
                del self._working[run.rule]
            self.dirty = True

    def _stands_still(self, run: Run, still: bool) -> None:
        """Let other rules have the place of a run that does nothing; its own rule's limit still counts it."""
        if run.slot and still:
            self._idle.add(run.id)
            self.dirty = True
        else:  # at work again, even where that is one more than allowed
            self._idle.discard(run.id)

    def _begin(self, run: Run, at: float) -> None:
        try:
            prepares = self.prepares(run.request["action"])
        except TriggerError as error:  # an action that is no longer installed
            self._hold(run, error.message, error.hint or "", at)
            return
        self._take_slot(run)
        run.place = run.waiting = ""
        if prepares:
            run.asked = True
            self.out.append(Prepare(run.id, run.attempts + 1))
        else:
            self._attempt(run, None, at)

    def _attempt(self, run: Run, prepared: Any, at: float) -> None:
        run.attempts += 1
        run.prepared, run.handle, run.live, run.delivered = prepared, None, True, False
        run.files_done = run.bytes_done = 0
        self.out.append(AttemptMade(run.id, run.attempts, prepared, self.utc(at)))
        self._move(run, Event.ATTEMPT, f"attempt {run.attempts}", at, attempts=run.attempts)
        self.out.append(Start(run.id, run.attempts, prepared))

    # ------------------------------------------------------------------ gates

    def gate(self, rule: Rule, captures: Mapping[str, str]) -> dict[str, Any] | None:
        """Return what a run of these captures has to wait for by `after`; it is part of its request."""
        if rule.after is None:
            return None
        leader = self.rules.get(rule.after.rule)
        same = {name: captures.get(name, "") for name in rule.after.same}
        return {"rule": rule.after.rule, "number": leader.id if leader else 0, "same": same}

    def _gated(self, run: Run, at: float) -> bool:
        """Let a run wait if its request says so and the success has not come. Whatever becomes of rules: not open."""
        if "after" not in run.request and not run.attempts and not self._adopt(run, at):
            self._after.setdefault((0, run.rule), {})[run.id] = None
            run.waiting = f"rule {run.rule} to be in force: an earlier version made it, and left the rest to the rule"
            return True
        gate = run.gate
        if gate is None or (*_key(gate), "succeeded") in self.marks:
            return False
        self._after.setdefault(_key(gate), {})[run.id] = None
        wanted = ", ".join(f"{name}={value}" for name, value in gate["same"].items())
        run.waiting = f"rule {gate['rule']} to succeed for {wanted or 'any of its batches'}"
        return True

    def _adopt(self, run: Run, at: float) -> bool:
        """Write into the request of a run that an earlier version made what it waits for; False if nobody knows."""
        rule = self.rules.get(run.rule)
        if rule is None:
            return False
        run.request = {**run.request, "after": self.gate(rule, run.captures)}
        if rule.after is not None:
            self.out.append(Renewed(run.id, run.request, run.destination, self.utc(at)))
        return True

    def open_gate(self, run: Run, because: str, at: float) -> None:
        """Let a run go on an operator's word though what it waits for has not succeeded."""
        gate = run.request.get("after", {})
        if gate is not None and run.state in (RunState.PENDING, RunState.HELD):
            run.request = {**run.request, "after": {**gate, "anyway": because}}
            self.out.append(Renewed(run.id, run.request, run.destination, self.utc(at)))

    def follow(self, at: float) -> None:
        """Remember the successes that rules in force and open runs ask for, and look back for those of before.

        Nobody learns of a group that begins anew while no one follows it: what was remembered of it is forgotten then.
        """
        wanted: set[Followed] = set()
        for rule in self.rules.values():
            if rule.after is not None and (leader := self.rules.get(rule.after.rule)) is not None:
                wanted.add((leader.id, tuple(sorted(rule.after.same))))
        for run in self.open.values():
            if (gate := run.gate) is not None and gate.get("number"):
                wanted.add((gate["number"], tuple(sorted(gate["same"]))))
        stands = {(rule, tuple(json.loads(names))) for rule, names, kind in self.marks if kind == FOLLOWED}
        gone = {one for one in stands - wanted if one[0] in self._numbers}  # a rule out of force begins nothing anew
        fresh = wanted - stands - self._looking.keys()
        self._forget(gone | fresh if self._following else gone)  # at first: an earlier version did not note it
        self._following = True
        self._followed = {}
        for number, same in wanted | stands - gone:
            self._followed.setdefault(number, set()).add(same)
        self._leading = {}
        for run in self.open.values():
            self._lead(run)
        self._looking = {one: ask for one, ask in self._looking.items() if one in wanted}
        for one in sorted(fresh):
            self._look_back(one)

    def _forget(self, gone: set[Followed]) -> None:
        rules = {number for number, _ in gone}
        for number, group, kind in list(self.marks) if gone else ():
            of_these = number in rules and kind in ("succeeded", FOLLOWED)
            if of_these and (number, tuple(sorted(json.loads(group)))) in gone:
                del self.marks[(number, group, kind)]
                self.out.append(GroupForgotten(number, group, kind))

    def _look_back(self, one: Followed) -> None:
        self._asks += 1
        self._looking[one] = self._asks
        self.out.append(LookBack(self._asks, one[0]))

    def looked_back(self, fact: LookedBack) -> None:
        """Take what the journal knows of runs that ended well before anybody followed their rule."""
        one = next((one for one, ask in self._looking.items() if ask == fact.ask), None)
        if one is None:
            return
        if fact.why:
            self.out.append(Log("after.not_looked_back", {"rule": fact.rule, "why": fact.why}, "warning"))
            again = functools.partial(self._look_back_again, one, fact.ask)
            self.timers.set(("look back", one), fact.at + LOOK_BACK_AGAIN_S, again)
            return
        del self._looking[one]
        number, same = one
        names = json.dumps(same)
        self.marks[(number, names, FOLLOWED)] = (fact.thinned, self.utc(fact.at))
        self.out.append(GroupSet(number, names, FOLLOWED, fact.thinned, self.utc(fact.at)))
        least = self._least(number, same, fact.runs)
        for run, captures in fact.runs:
            if all(name in captures for name in same):
                key = canonical({name: captures[name] for name in same})
                if run >= least.get(key, 0):
                    self._succeed(number, key, run, fact.at)

    def _look_back_again(self, one: Followed, ask: int, now: float) -> None:
        if self._looking.get(one) == ask:
            self._look_back(one)

    def _least(
        self, number: int, same: Sequence[str], runs: Iterable[tuple[int, Mapping[str, str]]]
    ) -> Mapping[str, float]:
        """Return the first run that counts for each group: where names are used again, those of before do not."""
        rule = next((rule for rule in self.rules.values() if rule.id == number), None)
        if rule is not None and not _used_again(rule):
            return {}
        taken = {group: mark[0] for (of, group, kind), mark in self.marks.items() if (of, kind) == (number, "taken")}
        groups = {canonical(captures): captures for _, captures in runs} | {group: json.loads(group) for group in taken}
        least: dict[str, float] = {}
        for group, captures in groups.items():
            key = canonical({name: captures[name] for name in same if name in captures})
            # One that has begun anew and has no batch yet: what succeeds from now on is remembered by itself.
            least[key] = max(least.get(key, 0.0), taken.get(group, math.inf))
        return least

    def _lead(self, run: Run, *, end: bool = False) -> None:
        """Note that others may wait for an open run, or that it has ended."""
        for same in self._followed.get(run.rule_id, ()):
            if all(name in run.captures for name in same):
                key = (run.rule_id, canonical({name: run.captures[name] for name in same}))
                if not end:
                    self._leading.setdefault(key, set()).add(run.id)
                elif (leading := self._leading.get(key)) is not None:
                    leading.discard(run.id)
                    if not leading:
                        del self._leading[key]

    def _gate_words(self, run: Run) -> str:
        gate = run.gate
        if gate is None:
            return run.waiting
        if leading := self._leading.get(_key(gate)):
            number = min(leading, key=lambda number: (self.open[number].state == RunState.HELD, number))
            return f"{run.waiting}: its run {number} is {self.open[number].state}"
        if gate["rule"] not in self.rules:
            return f"{run.waiting}: that rule is gone"
        one = (gate["number"], tuple(sorted(gate["same"])))
        if one in self._looking:
            return f"{run.waiting}: the journal is looked through for its earlier runs"
        thinned = self.marks.get((one[0], json.dumps(one[1]), FOLLOWED), (0, 0.0))[0]
        more = f" ({thinned:,} old ones are thinned, and nobody knows what for)" if thinned else ""
        return f"{run.waiting}: no run of it is open, and none is known that did{more}"

    def hint_of(self, run: Run) -> str:
        """Return what a person can do about an open run, '' if it takes nobody."""
        if run.place != "after" or ((gate := run.gate) is not None and self._leading.get(_key(gate))):
            return run.hint
        return f"`trigger-daemon runs retry {run.id} --anyway` starts it without; `runs cancel` gives it up"

    def tell_stranded(self, at: float) -> None:
        """Raise or clear the alarms about runs that wait for what will not come by itself."""
        stranded: dict[str, list[Run]] = {}
        for (number, same), queue in self._after.items():
            if number in self._numbers or self._leading.get((number, same)):
                continue
            for id in queue:
                if (run := self.open.get(id)) is not None and run.place == "after":
                    stranded.setdefault(run.gate["rule"] if run.gate else run.rule, []).append(run)
        for key in [key for key in self.alarms.open if key.startswith("after:") and key[6:] not in stranded]:
            self.alarms.clear(key, at)
        for name, runs in stranded.items():
            first = min(runs, key=lambda run: run.id)
            self.alarms.raised(
                f"after:{name}",
                f"{counted(len(runs), 'run')} cannot start: rule {name}, which is waited for, is gone;"
                f" the first: run {first.id} of {first.rule}",
                "put the rule back; or `trigger-daemon runs retry ID --anyway` starts one without, `runs cancel ID`"
                " gives it up",
                at,
            )

    # ------------------------------------------------------ answers of starts

    def _current(self, run_id: int, attempt: int) -> Run | None:
        run = self.open.get(run_id)
        return run if run is not None and run.attempts == attempt and run.live else None

    def prepared(self, fact: Prepared) -> None:
        run = self.open.get(fact.run)
        if run is None or not self._preparing(run, fact.attempt):
            return
        run.asked = False
        if run.state == RunState.PENDING:
            self._attempt(run, fact.prepared, fact.at)
            return
        self._free_slot(run, fact.at)  # held or cancelled while it was being prepared
        if run.cancel:
            self._end(run, Event.CANCELLED, "it had not started", fact.at)

    @staticmethod
    def _preparing(run: Run, attempt: int) -> bool:
        """Say whether an answer to a prepare is waited for; a call that hung may bring a second one."""
        return run.asked and attempt == run.attempts + 1

    def started(self, fact: Started) -> None:
        run = self._current(fact.run, fact.attempt)
        if run is None or run.handle is not None:
            return
        run.handle = fact.handle
        self.out.append(AttemptChanged(run.id, fact.attempt, handle=fact.handle))
        if run.state == RunState.STARTING:
            self._move(run, Event.TOOK, "the provider took it", fact.at)
            run.waiting = ""
        if run.cancel:
            self._wish_end(run, fact.at)
        self._poll_at(run, fact.at + FIRST_POLL_S)

    def not_started(self, fact: NotStarted) -> None:
        run = self.open.get(fact.run)
        if run is None:
            return
        if fact.preparing:  # no attempt was made
            if not self._preparing(run, fact.attempt):
                return
            run.asked = False
            self._free_slot(run, fact.at)
            if run.state == RunState.PENDING:
                self._failed(run, fact.fault, fact.at)
            elif run.cancel:
                self._end(run, Event.CANCELLED, "it had not started", fact.at)
            return
        run = self._current(fact.run, fact.attempt)
        if run is None or run.handle is not None:
            return
        self._attempt_over(run, f"not started: {fact.fault.why}", fact.at)
        if run.cancel:
            self._end(run, Event.CANCELLED, "it had not started", fact.at)
        elif run.state == RunState.STARTING:
            self._move(run, Event.REFUSED, fact.fault.why, fact.at, error=fact.fault.why, hint=fact.fault.hint)
            self._failed(run, fact.fault, fact.at)
        else:
            self._outdated(run, fact.at)

    def start_unknown(self, fact: StartUnknown) -> None:
        run = self._current(fact.run, fact.attempt)
        if run is None or run.handle is not None:
            return
        if run.state == RunState.STARTING:
            run.waiting = f"the provider's word about attempt {fact.attempt}: {fact.why}"
        wait = retry.backoff_s(max(1, run.failures), self._retry_policy(run), self.rand())
        run.failures += 1
        self.timers.set(
            ("find", run.id), fact.at + max(wait, FIND_AGAIN_S), lambda now: self._find_again(run, fact.attempt)
        )

    def _find_again(self, run: Run, attempt: int) -> None:
        if self._current(run.id, attempt) is run and run.handle is None:
            self._find(run)

    def _find(self, run: Run) -> None:
        """Ask what became of an attempt; only a run that is STARTING is started again by that."""
        self.out.append(Find(run.id, run.attempts, run.prepared, start=run.state == RunState.STARTING))

    # ------------------------------------------------------- answers of polls

    def _poll_at(self, run: Run, at: float) -> None:
        attempt = run.attempts
        self.timers.set(("poll", run.id), at, lambda now: self._poll(run, attempt))

    def _poll(self, run: Run, attempt: int) -> None:
        if self._current(run.id, attempt) is run and run.handle is not None:
            self.out.append(Poll(run.id, attempt, run.handle))

    def polled(self, fact: Polled) -> None:
        run = self._current(fact.run, fact.attempt)
        if run is None or run.handle is None:
            return
        if fact.status == "unreachable":
            self._unreachable(run, fact)
            return
        if run.unreachable_since is not None:
            run.unreachable_since = None
            self.alarms.clear(f"unreachable:{run.id}", fact.at)
        run.files_done, run.bytes_done = fact.files_done, fact.bytes_done
        self.storage.wrote(run.id, fact.bytes_done, fact.at)
        if fact.output is not None:
            run.output = fact.output
        match fact.status:
            case "active" | "inactive":
                self._progress(run, fact)
            case "succeeded":
                self._succeeded(run, fact)
            case "cancelled":
                self._attempt_over(run, "cancelled", fact.at)
                if run.cancel:
                    self._end(run, Event.CANCELLED, fact.why or "the provider confirms", fact.at)
                else:
                    self._ended_badly(run, Fault("person", fact.why or "it was cancelled at the provider"), fact.at)
            case "failed":
                fault = fact.fault or Fault("transient", fact.why or "the provider gave no reason")
                self._attempt_over(run, f"failed: {fault.why}", fact.at)
                if run.cancel:
                    self._end(run, Event.CANCELLED, f"it ended: {fault.why}", fact.at)
                else:
                    self._ended_badly(run, fault, fact.at)

    def _unreachable(self, run: Run, fact: Polled) -> None:
        if run.unreachable_since is None:
            run.unreachable_since = fact.at
        since = fact.at - run.unreachable_since
        if run.state not in (RunState.HELD, RunState.ABANDONED):
            run.waiting = f"the provider's answer: {fact.why}"
        if since >= UNREACHABLE_ALARM_S:
            words = f"run {run.id} of {run.rule} cannot be asked about: {fact.why}"
            self.alarms.raised(f"unreachable:{run.id}", words, fact.hint, fact.at)
        self._poll_at(run, fact.at + min(UNREACHABLE_POLL_MAX_S, max(FIRST_POLL_S, since / 2)))

    def _progress(self, run: Run, fact: Polled) -> None:
        if fact.status == "inactive" and run.state == RunState.ACTIVE:
            self._move(run, Event.PAUSED, fact.why, fact.at, error=fact.why, hint=fact.hint)
            self.alarms.raised(
                f"inactive:{run.id}", f"run {run.id} of {run.rule} is paused: {fact.why}", fact.hint, fact.at
            )
        elif fact.status == "active" and run.state == RunState.INACTIVE:
            self._move(run, Event.RESUMED, fact.why or "goes on", fact.at, error="", hint="")
        self._stands_still(run, fact.status == "inactive")
        if fact.status == "active" and self.alarms.open:
            self.alarms.clear(f"inactive:{run.id}", fact.at)
        if run.state in (RunState.ACTIVE, RunState.INACTIVE):
            run.waiting = f"the provider to go on: {fact.why}" if run.state == RunState.INACTIVE else fact.why
        if (fact.bytes_done or fact.files_done) and run.destination in self.down:
            self._up(run, fact.at)  # what arrives proves the destination, however long the rest takes
        self._poll_at(run, fact.at + max(fact.again_in_s, 0.05))

    def _succeeded(self, run: Run, fact: Polled) -> None:
        self._attempt_over(run, SUCCEEDED, fact.at)
        self._up(run, fact.at)
        if run.state not in (RunState.ACTIVE, RunState.INACTIVE, RunState.CANCELLING, RunState.HELD):
            return  # abandoned: seen to its end, and that is all
        proof = self._proof_required(run)
        final = not proof
        because = fact.why or "the provider says success"
        self._met_newer(run, fact.changed, ends=final)
        if fact.changed and not proof:
            left_out = self._leaves_out(str(run.request.get("action", "")))
            more = " and were left out" if left_out else " by then"
            because += f"; {len(fact.changed)} of {run.files} had changed{more}"
        self._move(run, Event.SUCCEEDED, because, fact.at, final=final, output=fact.output, error="", hint="")
        run.cancel = False
        if final:
            self._finished(run, fact.at, success=True)
        else:
            self._take_slot(run)
            run.waiting = "the proof"
            self.out.append(Verify(run.id, run.attempts, run.handle))

    def _attempt_over(self, run: Run, outcome: str, at: float) -> None:
        run.live, run.delivered = False, outcome == SUCCEEDED
        for kind in ("poll", "find", "cancel"):
            self.timers.cancel((kind, run.id))
        self.out.append(AttemptChanged(run.id, run.attempts, ended_time=self.utc(at), outcome=outcome))
        self._free_slot(run, at)
        if self.alarms.open:
            self.alarms.clear(f"inactive:{run.id}", at)
            self.alarms.clear(f"unreachable:{run.id}", at)
        if run.state == RunState.ABANDONED:
            self._abandoned(run, f"its last attempt ended: {outcome}", at)

    def _abandoned(self, run: Run, because: str, at: float) -> None:
        """Nothing is under way any more."""
        self.out.append(RunMoved(run.id, run.state, run.state, because, self.utc(at), final=True))
        self._finished(run, at, success=False)

    def _ended_badly(self, run: Run, fault: Fault, at: float) -> None:
        if self._outdated(run, at):
            return
        if run.state in (RunState.ACTIVE, RunState.INACTIVE):
            if fault.kind == "transient" or fault.scope == Scope.DESTINATION:
                self._move(run, Event.FAILED, fault.why, at, error=fault.why, hint=fault.hint)
            self._failed(run, fault, at)

    def _failed(self, run: Run, fault: Fault, at: float) -> None:
        """An attempt ended without success, or could not begin: later, or a person."""
        if self._outdated(run, at):
            return
        if fault.scope == Scope.DESTINATION and fault.kind != "permanent":
            self._destination_down(run, fault, at)
            return
        if fault.counts:
            run.failures += 1
            run.failing_since = at if run.failing_since is None else run.failing_since
            self._up(run, at)
        failing_for = 0.0 if run.failing_since is None else at - run.failing_since
        decision = retry.decide(
            fault,
            failures=max(1, run.failures),
            failing_for_s=failing_for,
            policy=self._retry_policy(run),
            rand=self.rand(),
        )
        if isinstance(decision, retry.Hold):
            self._hold(run, decision.because, decision.hint, at)
        else:
            run.error, run.hint = fault.why, fault.hint
            self._retry_at(run, decision.wait_s, at, fault.why)

    # ----------------------------------------------------------- destinations

    def _destination_down(self, run: Run, fault: Fault, at: float) -> None:
        policy = self._retry_policy(run)
        down = self.down.get(run.destination)
        if down is None:
            down = self.down[run.destination] = Down(fault.why, fault.hint, 0, at)
        down.why, down.hint = fault.why, fault.hint
        down.failures += 1
        down.probing = 0
        wait = fault.retry_after_s or retry.backoff_s(down.failures, policy, self.rand())
        down.probe_at = at + wait
        run.error, run.hint = fault.why, fault.hint
        run.waiting = f"destination {run.destination}: {fault.why}"
        if run.place != "parked":
            run.place = "parked"
            down.parked.insert(0, run.id)
        destination = run.destination
        self.timers.set(("probe", destination), down.probe_at, lambda now: self._probe(destination, now))
        self.alarms.raised(
            f"destination:{destination}", f"destination {destination} is down: {fault.why}", fault.hint, at
        )

    def _probe(self, destination: str, now: float) -> None:
        """Let one run try."""
        down = self.down.get(destination)
        if down is None:
            return
        while down.parked:
            run = self.open.get(down.parked.pop(0))
            if run is not None and run.place == "parked":
                down.probing = run.id
                run.waiting = "its turn, as a probe of its destination"
                self._line_up(run)
                self._probe_lost(destination, now)
                return
        probe = self.open.get(down.probing)
        if probe is not None and probe.slot:  # still at work, and nobody else waits
            self._probe_lost(destination, now)
            return
        del self.down[destination]
        self.alarms.clear(f"destination:{destination}", now)

    def _probe_lost(self, destination: str, at: float) -> None:
        """Should the probe come to nothing (cancelled, paused), let another one follow."""
        self.timers.set(("probe", destination), at + PROBE_LOST_S, lambda now: self._probe(destination, now))

    def _up(self, run: Run, at: float) -> None:
        down = self.down.pop(run.destination, None)
        if down is None:
            return
        self.timers.cancel(("probe", run.destination))
        self.alarms.clear(f"destination:{run.destination}", at)
        for parked in down.parked:
            waiting = self.open.get(parked)
            if waiting is not None and waiting.place == "parked":
                self._enqueue(waiting, at)

    # ------------------------------------------------------------------ proof

    def proved(self, fact: Proved) -> None:
        run = self._verifying(fact.run, fact.attempt)
        if run is None:
            return
        self._met_newer(run, fact.changed, ends=True)
        left_out = len(fact.changed)
        if fact.changed and not fact.members:
            self._end(run, Event.SUPERSEDED, f"all {left_out} files have a newer version or are gone", fact.at)
            return
        self.out.append(ProofKept(run.id, fact.attempt, fact.members, self.utc(fact.at), self.witnessed(fact.at)))
        because = f"{counted(len(fact.members), 'file')} equal at the destination"
        if left_out:
            because += f"; {left_out} left out: a newer version or gone"
        self._end(run, Event.PROVED, because, fact.at)

    def _met_newer(self, run: Run, paths: Sequence[str], *, ends: bool) -> None:
        """The provider met newer versions of these files: that is as good as a hint.

        They are let go of when the run ends: until then what comes in their place has to wait for it.
        """
        if paths:
            release = ends and self._leaves_out(str(run.request["action"]))
            self._on_outdated(run.rule_id, run.id, paths, release=release)

    def mismatch(self, fact: Mismatch) -> None:
        run = self._verifying(fact.run, fact.attempt)
        if run is None:
            return
        first = next(iter(fact.which.items()), ("", ""))
        why = f"{counted(len(fact.which), 'file')} not equal at the destination, the first: {first[0]}: {first[1]}"
        self._met_newer(run, fact.changed, ends=len(fact.changed) >= run.files)
        if len(fact.changed) >= run.files:
            self._end(run, Event.SUPERSEDED, "all files have a newer version or are gone", fact.at)
            return
        self._free_slot(run, fact.at)
        run.delivered = False
        self.out.append(AttemptChanged(run.id, fact.attempt, outcome=f"succeeded, but {why}"))
        if self._outdated(run, fact.at):
            return
        if run.mismatches >= MISMATCHES_MAX:
            self._hold(run, why, "compare source and destination; then retry or abandon the run", fact.at)
            return
        run.mismatches += 1
        run.files_done = run.bytes_done = 0  # what is there is not what was to be: it is written again, beside it
        self._move(run, Event.DIFFERS, why, fact.at, error=why)
        self._enqueue(run, fact.at)

    def cannot_verify(self, fact: CannotVerify) -> None:
        run = self._verifying(fact.run, fact.attempt)
        if run is None:
            return
        fault = fact.fault
        run.failures += 1
        run.failing_since = fact.at if run.failing_since is None else run.failing_since
        decision = retry.decide(
            fault,
            failures=run.failures,
            failing_for_s=fact.at - run.failing_since,
            policy=self._retry_policy(run),
            rand=self.rand(),
        )
        if isinstance(decision, retry.Hold):
            self._hold(run, f"could not be proved: {decision.because}", decision.hint, fact.at)
            return
        self._proof_over(run)
        self._free_slot(run, fact.at)  # its work is done: what the proof lacks must keep nobody waiting
        run.waiting = f"the proof, after: {fault.why}"
        attempt = run.attempts
        self.timers.set(
            ("verify", run.id), fact.at + max(decision.wait_s, 1.0), lambda now: self._verify_again(run, attempt)
        )

    def _verify_again(self, run: Run, attempt: int) -> None:
        """Ask for a proof once more: outside of the limits of runs, few at once for each destination."""
        if self._verifying(run.id, attempt) is not run:
            return
        proving = self._proving.setdefault(run.destination, set())
        if len(proving) >= PROOFS_AGAIN_MAX:
            self._to_prove.setdefault(run.destination, {})[run.id] = attempt
            return
        proving.add(run.id)
        self.out.append(Verify(run.id, attempt, run.handle))

    def _proof_over(self, run: Run) -> None:
        """A proof has been answered, or is not wanted any more: the next one that waits is asked for."""
        waiting = self._to_prove.get(run.destination, {})
        waiting.pop(run.id, None)
        proving = self._proving.get(run.destination, set())
        proving.discard(run.id)
        while waiting and len(proving) < PROOFS_AGAIN_MAX:
            number = next(iter(waiting))
            attempt, other = waiting.pop(number), self.open.get(number)
            if other is not None:
                self._verify_again(other, attempt)
        if not waiting:
            self._to_prove.pop(run.destination, None)
        if not proving:
            self._proving.pop(run.destination, None)

    def _verifying(self, run_id: int, attempt: int) -> Run | None:
        run = self.open.get(run_id)
        return run if run is not None and run.attempts == attempt and run.state == RunState.SUCCEEDED else None

    # ------------------------------------------------------------------- ends

    def _hold(self, run: Run, because: str, hint: str, at: float) -> None:
        if lifecycle.allowed(run.state, Event.HOLD):
            words = hint or "`trigger-daemon runs show` tells more; then `runs retry` or `runs abandon`"
            self._move(run, Event.HOLD, because, at, error=because, hint=words, output=run.output)
            run.waiting = "a person"
            self.timers.cancel(("retry", run.id))
            self.timers.cancel(("verify", run.id))
            if not run.live and not run.asked:
                self._free_slot(run, at)
            self.out.append(Log("run.held", {"run": run.id, "rule": run.rule, "because": because}, "warning"))
            self.alarms.raised(
                f"held:{run.rule}", f"runs of {run.rule} are held; the latest, {run.id}: {because}", words, at
            )

    def _end(self, run: Run, event: Event, because: str, at: float) -> None:
        """Move to a state where nothing more happens."""
        self._move(run, event, because, at, final=True, error="", hint="")
        self._finished(run, at, success=event == Event.PROVED)

    def _finished(self, run: Run, at: float, *, success: bool) -> None:
        self._free_slot(run, at)
        self._drop(run)
        if success:
            self._up(run, at)
            if (followed := self._followed.get(run.rule_id)) and self._of_this_use(run):
                for same in followed:
                    if all(name in run.captures for name in same):
                        self._succeed(run.rule_id, canonical({name: run.captures[name] for name in same}), run.id, at)
        left = {other for other in run.waits_on if other in self.open}
        if left:  # it never began: who would have come after it comes after these
            self._leave(run.id, left)
        for waiting in self._blocking.pop(run.id, ()):
            if (ended := self._left.get(waiting)) is not None:
                self._leave(waiting, ended - {run.id})
            other = self.open.get(waiting)
            if other is not None:
                other.waits_on = other.waits_on - {run.id} | left
                if other.place == "blocked":
                    self._enqueue(other, at)

    def _leave(self, ended: int, left: set[int]) -> None:
        """Remember, over a restart too, what an ended run still waited for."""
        self._left.pop(ended, None)
        if left:
            self._left[ended] = left
        self.out.append(Kept(f"{LEFT}{ended}", sorted(left) or None))

    def _succeed(self, rule: int, same: str, run: int, at: float) -> None:
        """Remember that a rule has succeeded for these captures, and let go what waited for it."""
        key = (rule, same, "succeeded")
        if key not in self.marks:
            self.marks[key] = (run, self.utc(at))
            self.out.append(GroupSet(rule, same, "succeeded", run, self.utc(at)))
        for waiting in self._after.pop((rule, same), ()):
            other = self.open.get(waiting)
            if other is not None and other.place == "after":
                self._enqueue(other, at)

    def _of_this_use(self, run: Run) -> bool:
        """Say whether the group of a run has not begun anew since: what succeeded for an earlier use tells nothing."""
        taken = self.marks.get((run.rule_id, canonical(run.group), "taken"))
        if taken is not None:
            return taken[0] <= run.id
        rule = self.rules.get(run.rule)
        return rule is None or not _used_again(rule)

    def _drop(self, run: Run) -> None:
        self.open.pop(run.id, None)
        self._lead(run, end=True)
        for kind in ("retry", "poll", "find", "verify", "cancel"):
            self.timers.cancel((kind, run.id))

    def _move(self, run: Run, event: Event, because: str, at: float, *, final: bool = False, **fields: Any) -> None:
        goal = lifecycle.target(run.state, event)
        self._count(run, -1)
        source, run.state, run.place = run.state, goal, ""
        self._count(run, +1)
        if source == RunState.SUCCEEDED:
            self._proof_over(run)
        if source == RunState.HELD:
            self._held_no_more(run, at)
        if "error" in fields:
            run.error, run.hint = fields["error"], fields.get("hint", run.hint)
        self.out.append(RunMoved(run.id, source, goal, because, self.utc(at), final, **fields))

    def _count(self, run: Run, by: int) -> None:
        counts = self.tally.setdefault((run.rule_id, run.state), [0, 0, 0])
        counts[0] += by
        counts[1] += by * run.files
        counts[2] += by * run.bytes

    # --------------------------------------------------------- newer versions

    def newer_version(self, run_id: int, path: str, at: float) -> set[int]:
        """A member has a newer version. Return the open runs that must end before the newer one may start."""
        run = self.open.get(run_id)
        if run is None:
            return set(self._left.get(run_id, ()))
        run.newer.add(path)
        left = {other for other in run.waits_on if other in self.open}
        return (
            left if self._outdated(run, at) else {run_id, *left}
        )  # those, too: this one may be cancelled before it began

    def _outdated(self, run: Run, at: float) -> bool:
        """End a run of which every file has a newer version, unless something of it is under way."""
        if not run.newer or len(run.newer) < run.own or run.live or run.slot:
            return False
        if run.id in self._proving.get(run.destination, ()):
            return False
        if not lifecycle.allowed(run.state, Event.SUPERSEDED):
            return False
        self._end(run, Event.SUPERSEDED, "every file has a newer version", at)
        return True

    # ----------------------------------------------------------------- orders

    def retry(self, run: Run, because: str, at: float) -> str:
        """Let a held run go on; return '' or why not."""
        if run.state == RunState.PENDING:
            self.timers.cancel(("retry", run.id))
            self._try(run, at)
            return ""
        if run.state != RunState.HELD:
            waits = f", and waits for {run.waiting}" if run.waiting else ""
            return f"run {run.id} is {run.state}{waits}; only HELD and PENDING runs can be retried"
        run.failures, run.failing_since, run.mismatches = 0, None, 0
        run.waiting = ""
        if run.live and run.handle is not None:
            self._move(run, Event.REJOIN, because, at, error="", hint="")
            self._poll_at(run, at)
        elif run.live:
            self._move(run, Event.REFIND, because, at, error="", hint="")
            run.waiting = f"the provider's word about attempt {run.attempts}"
        elif run.delivered:  # what was sent is there: only the proof, and what follows it, is taken again
            self._move(run, Event.REPROVE, because, at, error="", hint="")
            self._take_slot(run)
            run.waiting = "the proof"
            self.out.append(Verify(run.id, run.attempts, run.handle))
        else:
            self._move(run, Event.RETRY, because, at, error="", hint="")
            self._try(run, at)
        return ""

    def _try(self, run: Run, at: float) -> None:
        """Line a run up on an operator's word: who has mended a destination need not wait for its next probe."""
        destination = run.destination
        down = self.down.get(destination)
        if down is not None:
            probe = self.open.get(down.probing)
            if probe is None or not (probe.slot or probe.place == "ready"):
                down.probing = run.id
                if run.id in down.parked:
                    down.parked.remove(run.id)
                self._probe_lost(destination, at)
        self._enqueue(run, at)

    def hold(self, run: Run, because: str, at: float) -> str:
        """Hold a run on an operator's word; return '' or why not."""
        if not lifecycle.allowed(run.state, Event.HOLD):
            return f"run {run.id} is {run.state} and cannot be held"
        self._hold(run, because, "`trigger-daemon runs retry` lets it go on", at)
        return ""

    def abandon(self, run: Run, because: str, at: float) -> str:
        """Give a held run up; a live attempt is still watched to its end."""
        if run.state != RunState.HELD:
            return f"run {run.id} is {run.state}; only HELD runs can be abandoned (hold or cancel it first)"
        if run.live:
            self._move(run, Event.ABANDON, because, at)
            run.waiting = "its last attempt to end"
        else:
            self._end(run, Event.ABANDON, because, at)
        return ""

    def cancel(self, run: Run, because: str, at: float) -> str:
        """Wish a run to end; it is CANCELLED when the provider confirms."""
        if run.state == RunState.CANCELLING and run.handle is not None:
            self._wish_end(run, at)  # the first wish may have been lost
            return ""
        if not lifecycle.allowed(run.state, Event.CANCEL):
            return f"run {run.id} is {run.state} and cannot be cancelled"
        self._move(run, Event.CANCEL, because, at, error="", hint="")
        if not run.live and not run.asked:
            self._end(run, Event.CANCELLED, "nothing was under way", at)
            return ""
        run.cancel = True
        run.waiting = "the provider to confirm the end"
        if run.handle is not None:
            self._wish_end(run, at)
            self._poll_at(run, at + 0.2)
        return ""

    def _wish_end(self, run: Run, at: float, again_s: float = CANCEL_AGAIN_S) -> None:
        """Ask the provider to end an attempt, and again until it has: a wish can be lost like any other call."""
        attempt = run.attempts
        self.out.append(Cancel(run.id, attempt, run.handle))

        def again(now: float) -> None:
            if self._current(run.id, attempt) is run and run.cancel:
                self._wish_end(run, now, min(2 * again_s, CANCEL_AGAIN_MAX_S))

        self.timers.set(("cancel", run.id), at + again_s, again)

    def _held_no_more(self, run: Run, at: float) -> None:
        if not self.tally.get((run.rule_id, RunState.HELD), [0])[0]:
            self.alarms.clear(f"held:{run.rule}", at)

    def waiting_for(self, run: Run) -> str:
        """Say what an open run waits for, '' if it is at work."""
        if run.place == "after":
            return self._gate_words(run)
        if run.state == RunState.PENDING and run.waiting.startswith(("its turn", "storage")):
            if self.paused_all:
                return f"resume: {self.paused_all}"
            if run.rule in self.paused_rules:
                return f"rule {run.rule} to be resumed"
            if self.storage.instrument:
                return f"the instrument: {self.storage.instrument}"
            if run.waiting.startswith("storage"):
                return run.waiting
            if self._provider_full(run):
                action = run.request["action"]
                still = sorted(self._provided.get(action, set()) & self._idle)
                words = f"{run.waiting}: {action} has as many as are served at once, {self._at_once(action)}"
                return f"{words}; of these stand still: {', '.join(map(str, still[:5]))}" if still else words
            if self._destination_full(run):
                return f"{run.waiting}: {run.destination} has as many as may be, {self.destination_max}"
            if (leader := self._leader(run)) is not run:
                return f"{run.waiting}: run {leader.id} is before it and waits for {leader.waiting}"
            rule = self.rules.get(run.rule)
            if rule and rule.runs_max is not None and self._working.get(run.rule, 0) >= rule.runs_max:
                return f"{run.waiting}: its rule has as many at work as it may, {rule.runs_max} (limits: runs)"
            return f"{run.waiting}: {self.at_work} of {self.runs_max} runs are at work"
        return run.waiting

    def next_time(self, run: Run) -> float | None:
        """Return when a run that waits for its destination, or its next attempt, is looked at next (UTC)."""
        at: float | None = None
        if run.place == "retry":
            at = self.timers.at(("retry", run.id))
        elif run.place == "parked" and (down := self.down.get(run.destination)) is not None and not down.probing:
            at = self.timers.at(("probe", run.destination))
        return None if at is None else self.utc(at)

    def waits(self) -> dict[str, Any]:
        """Count the runs that do not move, by what they wait for: the HELD ones by rule, others by the same words."""
        groups: dict[tuple[RunState, str], dict[str, Any]] = {}
        known: dict[tuple[str, ...], dict[str, Any]] = {}  # most runs of a queue wait in the same words
        for run in itertools.islice(self.open.values(), WAITS_LOOKED_MAX):
            if run.state not in _STILL:
                continue
            alike = (run.state, run.rule, run.waiting if run.state != RunState.HELD else "", run.destination)
            group = known.get(alike)
            if group is None:
                group = known[alike] = self._group(run, groups)
            group["runs"] += 1
            group["files"] += run.files
            group["bytes"] += run.bytes
            if group["rule"] != run.rule:
                group["rule"] = None
        found = sorted(groups.values(), key=lambda of: (_STILL.index(of["state"]), -of["runs"]))
        more = sum(of["runs"] for of in found[WAITS_MAX:])
        return {"groups": found[:WAITS_MAX], "more_runs": more + max(0, len(self.open) - WAITS_LOOKED_MAX)}

    def _group(self, run: Run, groups: dict[tuple[RunState, str], dict[str, Any]]) -> dict[str, Any]:
        """Return the group of a run, making it if it is the first."""
        words = (run.error if run.state == RunState.HELD else "") or self.waiting_for(self._leader(run))
        key = (run.state, run.rule if run.state == RunState.HELD else _NUMBERS.sub("#", words))
        return groups.setdefault(key, {
            "state": str(run.state), "why": words, "hint": self.hint_of(run), "runs": 0, "files": 0, "bytes": 0,
            "rule": run.rule, "first_run": run.id, "next_time": self.next_time(run),
        })  # fmt: skip

    def _leader(self, run: Run) -> Run:
        """Return the first of a rule's queue if it is what the others of the queue wait behind: for space."""
        if run.state != RunState.PENDING or not run.waiting.startswith("its turn"):
            return run
        queue = self._ready.get(run.rule)
        first = self.open.get(queue[0]) if queue else None
        return first if first is not None and first.waiting.startswith("storage") else run


def _used_again(rule: Rule) -> bool:
    """Say whether groups of a rule begin anew."""
    batch = rule.batch
    return batch is not None and batch.only_first is not None and batch.new_group_after_s is not None


def _key(gate: Mapping[str, Any]) -> tuple[int, str]:
    """Return what a gate is known by: a rule's number and captures."""
    return gate["number"], canonical(gate["same"])
