"""Runs: which one starts next, what each waits for, and what follows each answer of a provider.

Pure. Everything needed to recognise an attempt goes out as a record in the
same step as the effect that asks the provider, and the loop commits records
before it carries effects out. A new attempt begins only on the provider's word
that the last one has ended.
"""

from __future__ import annotations

import functools
import heapq
import math
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
    GroupSet,
    Kept,
    Log,
    Mismatch,
    NotStarted,
    Poll,
    Polled,
    Prepare,
    Prepared,
    ProofKept,
    Proved,
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
    from trigger_daemon.core.timers import Timers

FIRST_POLL_S = 1.0  # a provider that has news earlier nudges
UNREACHABLE_POLL_MAX_S = 60.0
UNREACHABLE_ALARM_S = 600.0
FIND_AGAIN_S = 5.0
MISMATCHES_MAX = 1  # members that differ go once again; then a person looks

LEFT = "left:"  # under which the journal keeps what an ended run still waited for

WORKING = frozenset({RunState.STARTING, RunState.ACTIVE, RunState.INACTIVE, RunState.CANCELLING})


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

    @property
    def captures(self) -> Mapping[str, str]:
        return {**self.request.get("captures", {}), **self.group}


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
        rand: Callable[[], float],
        marks: dict[tuple[int, str, str], tuple[int, float]],
        runs_max: int,
        prepares: Callable[[str], bool],
        on_outdated: Callable[..., None],
        leaves_out: Callable[[str], bool],
    ) -> None:
        self.timers = timers
        self.out = out
        self.alarms = alarms
        self.utc = utc
        self.rand = rand
        self.marks = marks
        self.runs_max = runs_max
        self.prepares = prepares
        self._on_outdated = on_outdated
        self._leaves_out = leaves_out
        self.open: dict[int, Run] = {}
        self.rules: dict[str, Rule] = {}
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
        self._idle: set[int] = set()  # runs that have a place and stand still (INACTIVE)
        self._followed: dict[int, set[tuple[str, ...]]] = {}  # rule id -> sets of `same` that others ask for

    # ----------------------------------------------------------------- policy

    @property
    def at_work(self) -> int:
        """Return how many runs count against `runs` of the throttle: those that stand still do not."""
        return sum(self._working.values()) - len(self._idle)

    def follows(self, rule_id: int) -> Iterable[tuple[str, ...]]:
        """Return the sets of captures for which other rules wait until this one succeeded."""
        return self._followed.get(rule_id, ())

    def use(self, rules: Sequence[Rule], at: float) -> None:
        """Take the rule set in force; open runs of removed rules go on with what they were made with."""
        self.rules = {rule.name: rule for rule in rules}
        by_name = {rule.name: rule.id for rule in rules}
        self._followed = {}
        for rule in rules:
            if rule.after and rule.after.rule in by_name:
                self._followed.setdefault(by_name[rule.after.rule], set()).add(rule.after.same)
        waiting, self._after = self._after, {}  # what they wait for may be another rule now, or none
        for number in [number for queue in waiting.values() for number in queue]:
            run = self.open.get(number)
            if run is not None and run.place == "after":
                self._enqueue(run, at)
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
        self._enqueue(run, at)

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
                created_at=at,
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
            self.out.append(Find(run.id, run.attempts, run.prepared))
        else:
            if run.cancel:
                self.out.append(Cancel(run.id, run.attempts, run.handle))
            self.out.append(Poll(run.id, run.attempts, run.handle))

    # -------------------------------------------------------------- admission

    def _enqueue(self, run: Run, at: float) -> None:
        """Put a PENDING run where it waits: for another run, for a rule's success, or for its turn."""
        if run.slot:
            return  # it is being prepared; the answer moves it
        if fault := run.request.get("fault"):
            self._hold(
                run, str(fault), "mend the rule, send its files again with `files resend`, and abandon this run", at
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
        rule = self.rules.get(run.rule)
        if rule and rule.after and (leader := self.rules.get(rule.after.rule)):
            same = canonical({name: run.captures.get(name, "") for name in rule.after.same})
            if (leader.id, same, "succeeded") not in self.marks:
                self._after.setdefault((leader.id, same), {})[run.id] = None
                run.place = "after"
                wanted = (
                    ", ".join(f"{name}={run.captures.get(name, '')}" for name in rule.after.same)
                    or "any of its batches"
                )
                run.waiting = f"rule {leader.name} to succeed for {wanted or 'any of its batches'}"
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
        if self.paused_all or self.at_work >= self.runs_max:
            return  # whatever ends either comes here again
        order = sorted(self._ready, key=lambda name: -self._priority(name))
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
                self._begin(run, at)
            if not queue:
                del self._ready[name]

    def _priority(self, name: str) -> int:
        rule = self.rules.get(name)
        return rule.priority if rule else 0

    def _take_slot(self, run: Run) -> None:
        if not run.slot:
            run.slot = True
            self._stands_still(run, run.state == RunState.INACTIVE)  # so it was before a restart
            self._working[run.rule] = self._working.get(run.rule, 0) + 1

    def _free_slot(self, run: Run) -> None:
        if run.slot:
            run.slot = False
            self._idle.discard(run.id)
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
        run.prepared, run.handle, run.live = prepared, None, True
        run.files_done = run.bytes_done = 0
        self.out.append(AttemptMade(run.id, run.attempts, prepared, self.utc(at)))
        self._move(run, Event.ATTEMPT, f"attempt {run.attempts}", at, attempts=run.attempts)
        self.out.append(Start(run.id, run.attempts, prepared))

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
        self._free_slot(run)  # held or cancelled while it was being prepared
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
            self.out.append(Cancel(run.id, fact.attempt, run.handle))
        self._poll_at(run, fact.at + FIRST_POLL_S)

    def not_started(self, fact: NotStarted) -> None:
        run = self.open.get(fact.run)
        if run is None:
            return
        if fact.preparing:  # no attempt was made
            if not self._preparing(run, fact.attempt):
                return
            run.asked = False
            self._free_slot(run)
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
            self.out.append(Find(run.id, attempt, run.prepared))

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
            run.waiting = f"the provider to go on: {fact.why}" if run.state == RunState.INACTIVE else ""
        if (fact.bytes_done or fact.files_done) and run.destination in self.down:
            self._up(run, fact.at)  # what arrives proves the destination, however long the rest takes
        self._poll_at(run, fact.at + max(fact.again_in_s, 0.05))

    def _succeeded(self, run: Run, fact: Polled) -> None:
        self._attempt_over(run, "succeeded", fact.at)
        self._up(run, fact.at)
        if run.state not in (RunState.ACTIVE, RunState.INACTIVE, RunState.CANCELLING, RunState.HELD):
            return  # abandoned: seen to its end, and that is all
        proof = self._proof_required(run)
        final = not proof
        because = fact.why or "the provider says success"
        self._met_newer(run, fact.changed, ends=final)
        if fact.changed and not proof:
            because += f"; {len(fact.changed)} of {run.files} had changed and were left out"
        self._move(run, Event.SUCCEEDED, because, fact.at, final=final, output=fact.output, error="", hint="")
        run.cancel = False
        if final:
            self._finished(run, fact.at, success=True)
        else:
            self._take_slot(run)
            run.waiting = "the proof"
            self.out.append(Verify(run.id, run.attempts, run.handle))

    def _attempt_over(self, run: Run, outcome: str, at: float) -> None:
        run.live = False
        self.timers.cancel(("poll", run.id))
        self.timers.cancel(("find", run.id))
        self.out.append(AttemptChanged(run.id, run.attempts, ended_time=self.utc(at), outcome=outcome))
        self._free_slot(run)
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
                # Should the probe come to nothing (cancelled, paused), another one follows.
                self.timers.set(("probe", destination), now + 600.0, lambda later: self._probe(destination, later))
                return
        probe = self.open.get(down.probing)
        if probe is not None and probe.slot:  # still at work, and nobody else waits
            self.timers.set(("probe", destination), now + 600.0, lambda later: self._probe(destination, later))
            return
        del self.down[destination]
        self.alarms.clear(f"destination:{destination}", now)

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
        self.out.append(ProofKept(run.id, fact.attempt, fact.members, self.utc(fact.at)))
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
        self._free_slot(run)
        if self._outdated(run, fact.at):
            return
        if run.mismatches >= MISMATCHES_MAX:
            self._hold(run, why, "compare source and destination; then retry or abandon the run", fact.at)
            return
        run.mismatches += 1
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
        run.waiting = f"the proof, after: {fault.why}"
        attempt = run.attempts
        self.timers.set(
            ("verify", run.id), fact.at + max(decision.wait_s, 1.0), lambda now: self._verify_again(run, attempt)
        )

    def _verify_again(self, run: Run, attempt: int) -> None:
        if self._verifying(run.id, attempt) is run:
            self.out.append(Verify(run.id, attempt, run.handle))

    def _verifying(self, run_id: int, attempt: int) -> Run | None:
        run = self.open.get(run_id)
        return run if run is not None and run.attempts == attempt and run.state == RunState.SUCCEEDED else None

    # ------------------------------------------------------------------- ends

    def _hold(self, run: Run, because: str, hint: str, at: float) -> None:
        if lifecycle.allowed(run.state, Event.HOLD):
            words = hint or "`trigger-daemon runs show` tells more; then `runs retry` or `runs abandon`"
            self._move(run, Event.HOLD, because, at, error=because, hint=words)
            run.waiting = "a person"
            self.timers.cancel(("retry", run.id))
            self.timers.cancel(("verify", run.id))
            if not run.live and not run.asked:
                self._free_slot(run)
            self.out.append(Log("run.held", {"run": run.id, "rule": run.rule, "because": because}, "warning"))
            self.alarms.raised(
                f"held:{run.rule}", f"runs of {run.rule} are held; the latest, {run.id}: {because}", words, at
            )

    def _end(self, run: Run, event: Event, because: str, at: float) -> None:
        """Move to a state where nothing more happens."""
        self._move(run, event, because, at, final=True, error="", hint="")
        self._finished(run, at, success=event == Event.PROVED)

    def _finished(self, run: Run, at: float, *, success: bool) -> None:
        self._free_slot(run)
        self._drop(run)
        if success:
            self._up(run, at)
            if followed := self._followed.get(run.rule_id):
                taken = self.marks.get((run.rule_id, canonical(run.group), "taken"))
                for same in followed if taken is None or taken[0] <= run.id else ():  # else its group has begun anew
                    if all(name in run.captures for name in same):
                        self._succeeded_for(run, canonical({name: run.captures[name] for name in same}), at)
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

    def _succeeded_for(self, run: Run, same: str, at: float) -> None:
        key = (run.rule_id, same, "succeeded")
        if key not in self.marks:
            self.marks[key] = (run.id, self.utc(at))
            self.out.append(GroupSet(run.rule_id, same, "succeeded", run.id, self.utc(at)))
        for waiting in self._after.pop((run.rule_id, same), ()):
            other = self.open.get(waiting)
            if other is not None and other.place == "after":
                self._enqueue(other, at)

    def _drop(self, run: Run) -> None:
        self.open.pop(run.id, None)
        for kind in ("retry", "poll", "find", "verify"):
            self.timers.cancel((kind, run.id))

    def _move(self, run: Run, event: Event, because: str, at: float, *, final: bool = False, **fields: Any) -> None:
        goal = lifecycle.target(run.state, event)
        self._count(run, -1)
        source, run.state, run.place = run.state, goal, ""
        self._count(run, +1)
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
        if not lifecycle.allowed(run.state, Event.SUPERSEDED):
            return False
        self._end(run, Event.SUPERSEDED, "every file has a newer version", at)
        return True

    # ----------------------------------------------------------------- orders

    def retry(self, run: Run, because: str, at: float) -> str:
        """Let a held run go on; return '' or why not."""
        if run.state == RunState.PENDING:
            self.timers.cancel(("retry", run.id))
            self._enqueue(run, at)
            return ""
        if run.state != RunState.HELD:
            return f"run {run.id} is {run.state}; only HELD and PENDING runs can be retried"
        run.failures, run.failing_since, run.mismatches = 0, None, 0
        run.waiting = ""
        if run.live and run.handle is not None:
            self._move(run, Event.REJOIN, because, at, error="", hint="")
            self._poll_at(run, at)
        elif run.live:
            self._move(run, Event.REFIND, because, at, error="", hint="")
            run.waiting = f"the provider's word about attempt {run.attempts}"
        else:
            self._move(run, Event.RETRY, because, at, error="", hint="")
            self._enqueue(run, at)
        return ""

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
            self.out.append(Cancel(run.id, run.attempts, run.handle))  # the first wish may have been lost
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
            self.out.append(Cancel(run.id, run.attempts, run.handle))
            self._poll_at(run, at + 0.2)
        return ""

    def _held_no_more(self, run: Run, at: float) -> None:
        if not self.tally.get((run.rule_id, RunState.HELD), [0])[0]:
            self.alarms.clear(f"held:{run.rule}", at)

    def waiting_for(self, run: Run) -> str:
        """Say what an open run waits for, '' if it is at work."""
        if run.state == RunState.PENDING and run.waiting.startswith("its turn"):
            if self.paused_all:
                return f"resume: {self.paused_all}"
            if run.rule in self.paused_rules:
                return f"rule {run.rule} to be resumed"
            return f"{run.waiting}: {self.at_work} of {self.runs_max} runs are at work"
        return run.waiting if run.state != RunState.ACTIVE or run.unreachable_since is not None else ""
