"""Random histories: whatever is lost, slow, rewritten or crashed, the promises hold.

The lab's own record is the oracle. The same machine, run on engines with one
deliberate bug each, must find that bug: a law that nothing can break proves
nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.lab import ROOT, Lab
from tests.lab import rule as make
from trigger_daemon.core import model
from trigger_daemon.core.assembly import Assembly
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import Fault, RunState, Scope, Verdict
from trigger_daemon.core.rules import After, Batch, CloseOn, Complete, Retry, With
from trigger_daemon.core.runs import Runs
from trigger_daemon.core.settle import BATCHED, BLOCKED, CLOSING, COMPLETE, NO_STATE, SETTLING, Settling

QUIET_S = 30.0
NAMES = ("a/1.tif", "a/2.tif", "a/3.tif", "b/1.tif")

RULES = {
    "single": (make(),),
    "files": (make(batch=Batch(files=2, idle_s=120)),),
    "grouped": (make(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), files=3, oldest_waits_s=90)),),
    "two": (make(), make("s", 2, complete=Complete(quiescence_s=QUIET_S), batch=Batch(bytes=50, idle_s=60))),
    "marker": (
        make(
            match=("{chip}/{n}.tif",),
            batch=Batch(group_by=("chip",), close_on=CloseOn("{chip}/done", quiescence_s=5.0), idle_s=900),
        ),
    ),
}


class Histories(RuleBasedStateMachine):
    """One history: writes heard and unheard, slow looks, sweeps, crashes, provider faults, a root that goes away."""

    @initialize(kind=st.sampled_from(sorted(RULES)))
    def begin(self, kind):
        self.lab = Lab(*RULES[kind], auto=False)
        self.answered: set[tuple[int, int]] = set()
        self.asked = 0
        self.started: dict[int, set[int]] = {}  # run -> attempts that the provider took
        self.live: dict[int, int] = {}

    @rule(
        name=st.sampled_from(NAMES),
        size=st.integers(1, 60),
        heard=st.booleans(),
        signal=st.sampled_from(["none", "close"]),
    )
    def write(self, name, size, heard, signal):
        self.lab.write(name, size, heard=heard, signal=signal)

    @rule(name=st.sampled_from(NAMES))
    def touch_without_a_change_of_identity(self, name):
        if (ROOT, name) in self.lab.disk:
            size, mtime, ctime, inode = self.lab.disk[(ROOT, name)]
            self.lab.disk[(ROOT, name)] = (size, mtime, ctime + 1_000_000, inode)

    @rule(name=st.sampled_from(NAMES), gap=st.sampled_from([5, 20, 29]))
    def write_twice_the_second_unheard(self, name, gap):
        self.lab.write(name, 7)
        self.lab.run_for(gap)
        self.lab.write(name, 8, heard=False)
        self.lab.run_for(32 - gap)

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def change_unheard_in_an_open_batch(self, name, other):
        self.lab.write(name, 7)
        self.lab.run_for(31)
        self.lab.write(name, 8, heard=False)
        self.lab.write(other, 9)
        self.lab.run_for(31)

    @rule(chip=st.sampled_from("ab"), heard=st.booleans())
    def write_marker(self, chip, heard):
        self.lab.write(f"{chip}/done", 1, heard=heard)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        self.lab.remove(name)

    @rule(seconds=st.sampled_from([0.1, 1, 5, 14, 29, 30, 31, 70, 200]))
    def wait(self, seconds):
        self.lab.run_for(seconds)

    @rule(seconds=st.sampled_from([0.0, 0.5, 12.0]))
    def looks_take(self, seconds):
        self.lab.look_takes_s = seconds

    @rule(name=st.sampled_from(NAMES), size=st.integers(1, 60))
    def write_during_a_slow_look(self, name, size):
        """The look began before the write and saw its result."""
        if self.lab.away:
            return
        began = self.lab.at
        self.lab.at += 6
        self.lab.write(name, size, heard=False)
        self.lab.at += 6
        directory, base = name.split("/")
        wants = self.lab._wants(ROOT, name, joined=False)
        row = (base, self.lab.disk[(ROOT, name)], wants)
        self.lab.step(model.Seen(ROOT, directory, [row], began, self.lab.at, "hint"))

    @rule(ok=st.booleans())
    def sweep(self, ok):
        if not self.lab.away:
            self.lab.sweep(ok)

    @rule()
    def stale_sweep(self):
        """A chunk read long ago arrives now."""
        if not self.lab.away and not self.lab.look_takes_s:
            rows = [("1.tif", self.lab.disk.get((ROOT, "a/1.tif")), ((1, 0),))]
            if rows[0][1] is not None:
                oldest = min(self._in_memory(), default=max(self.lab.ledger.batches, default=0) + 1)
                began = self.lab.at
                self.lab.step(model.Seen(ROOT, "a", rows, began, began, "sweep", "none", oldest - 1))

    @rule(again=st.booleans())
    def stale_sweep_after_a_claim(self, again):
        if not again:
            self.lab.write("a/1.tif", 17)
        self.lab.run_for(32)
        self.stale_sweep()
        self.lab.run_for(32)

    def _in_memory(self):
        return [batch for queue in self.lab.engine._batched.values() for batch, _ in queue]

    @rule(reached=st.booleans())
    def crash(self, reached):
        """What was asked and not answered had reached the provider, or not; the answer is lost either way."""
        for effect in self.lab.asked[self.asked :]:
            self.asked += 1
            if reached and isinstance(effect, (model.Start, model.Find)):
                self.started.setdefault(effect.run, set()).add(effect.attempt)
                self.live[effect.run] = effect.attempt
        self.lab.look_takes_s = 0.0
        self.lab.crash()
        self.lab.sweep() if not self.lab.away else None

    @rule()
    def root_goes_and_comes(self):
        lab = self.lab
        lab.away = not lab.away
        if lab.away:
            lab.step(model.RootChanged(ROOT, "lost", "gone", "", "none", lab.at))
        else:
            lab.step(model.RootChanged(ROOT, "returned", "", "", "none", lab.at))
            lab.step(model.RootChanged(ROOT, "ok", "", "", "none", lab.at))
            lab.sweep()

    @rule(data=st.data())
    def provider_answers(self, data):
        """Each thing asked gets an answer, or is lost."""
        for effect in self.lab.asked[self.asked :]:
            self.asked += 1
            choice = data.draw(st.sampled_from(["good", "good", "good", "refused", "lost", "failed"]))
            self._answer(effect, choice)

    def _answer(self, effect, choice):
        lab = self.lab
        match effect:
            case model.Start(run, attempt) | model.Find(run, attempt):
                taken = self.started.setdefault(run, set())
                if isinstance(effect, model.Start):
                    assert attempt not in taken, "the same attempt was started again without a look for it"
                    assert run not in self.live or self.live[run] == attempt, "two attempts at once"
                if attempt in taken:
                    lab.step(model.Started(run, attempt, f"{run}-{attempt}", lab.at))
                elif choice == "refused":
                    lab.step(model.NotStarted(run, attempt, Fault("transient", "busy"), lab.at))
                elif choice == "lost":
                    taken.add(attempt)
                    self.live[run] = attempt
                    lab.step(model.StartUnknown(run, attempt, "time-out", lab.at))
                else:
                    taken.add(attempt)
                    self.live[run] = attempt
                    lab.step(model.Started(run, attempt, f"{run}-{attempt}", lab.at))
            case model.Poll(run, attempt):
                if choice == "lost":
                    lab.step(model.Polled(run, attempt, "unreachable", lab.at))
                elif choice == "failed":
                    self.live.pop(run, None)
                    lab.step(model.Polled(run, attempt, "failed", lab.at, fault=Fault("transient", "no")))
                else:
                    self.live.pop(run, None)
                    lab.step(model.Polled(run, attempt, "succeeded", lab.at))
            case model.Verify(run, attempt):
                lab.step(model.Proved(run, attempt, [{"path": "x"}], lab.at))

    def teardown(self):
        """In the end, with everything well again, every version that stands was in exactly one batch of each rule."""
        if not hasattr(self, "lab"):
            return
        lab = self.lab
        lab.look_takes_s = 0.0
        if lab.away:
            self.root_goes_and_comes()
        for _ in range(4):
            lab.sweep()
            lab.run_for(400)
            for effect in lab.asked[self.asked :]:
                self.asked += 1
                self._answer(effect, "good")
        self._judge(lab)

    def _judge(self, lab):
        lab.judge_early(QUIET_S)
        for one in lab.rules:
            taken: dict[tuple[str, int, int], int] = {}
            for _, record in lab.closed:
                if record.rule == one.id:
                    for m in record.members:
                        key = (m.path, m.size, m.mtime_ns)
                        taken[key] = taken.get(key, 0) + 1
            assert all(count == 1 for count in taken.values()), f"in two batches: {taken}"
            standing = {p for (_, p) in lab.disk if p.endswith(".tif")}
            for path in standing:
                waits = one.batch is not None and one.batch.close_on is not None
                state = lab.disk[(ROOT, path)]
                if not waits or lab.at - lab.history[(ROOT, path)][-1][0] > 1_200:
                    assert (path, state[0], state[1]) in taken, f"{path} {state} was missed by {one.name}"


BY_CHIP = ("{chip}/{n}.tif",)
COMPANION = "{chip}/{n}.xml"

MORE_RULES = {
    "after": (
        make(
            "qc", 1, match=BY_CHIP, proof="none", batch=Batch(group_by=("chip",), only_first=1, new_group_after_s=600)
        ),
        make(
            "main", 2, match=BY_CHIP, batch=Batch(group_by=("chip",), files=2, idle_s=90), after=After("qc", ("chip",))
        ),
    ),
    "first": (make(match=BY_CHIP, batch=Batch(group_by=("chip",), only_first=2, idle_s=120)),),
    "go": (make(match=BY_CHIP, complete=Complete(companions=(With(COMPANION, "/data", wait_s=60, missing="go"),))),),
    "block": (
        make(
            match=BY_CHIP,
            on_rewrite="block",
            batch=Batch(files=2, idle_s=60),
            complete=Complete(companions=(With(COMPANION, "/epu", checks=(("xml", {}),), wait_s=90),)),
        ),
    ),
    "ignore": (make(on_rewrite="ignore", batch=Batch(files=2, idle_s=60)),),
    "existing": (
        make(existing="ignore", batch=Batch(files=2, oldest_waits_s=60)),
        make("s", 2, priority=3, runs_max=1),
    ),
    "include": (
        make(
            match=BY_CHIP,
            batch=Batch(
                group_by=("chip",), idle_s=900, close_on=CloseOn("{chip}/done", quiescence_s=5.0, include=True)
            ),
        ),
    ),
    "checked": (
        make(
            match=BY_CHIP,
            complete=Complete(checks=(("tiff", {}),), suspect_s=100, stalled_after_s=600),
            batch=Batch(at=("00:10", "06:00"), files=3),
        ),
    ),
}
FAULTS = {
    "transient": Fault("transient", "busy"),
    "restart": Fault("transient", "restarted", counts=False),
    "down": Fault("transient", "not mounted", scope=Scope.DESTINATION),
    "person": Fault("person", "consent"),
    "permanent": Fault("permanent", "no such path"),
}
VERDICTS = st.sampled_from([Verdict.COMPLETE, Verdict.COMPLETE, Verdict.SUSPECT, Verdict.INCOMPLETE])


class Troubles(Histories):
    """The same, with everything that people, providers and disks can do besides; laws are asked after each step."""

    kinds = tuple(sorted(MORE_RULES))

    @initialize(data=st.data())
    def begin(self, data):
        self.kind = kind = data.draw(st.sampled_from(self.kinds))
        rules = MORE_RULES[kind]
        self.lab = Lab(*rules, auto=False, companion_roots={"/epu": 2}, prepares=kind == "first")
        self.rules_now = rules
        self.answered = set()
        self.asked = 0
        self.started = {}
        self.live = {}
        self.cancelled: set[int] = set()
        self.edits = 0
        self.gates_seen = 0  # of what the provider was asked

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 9), elsewhere=st.booleans())
    def write_companion(self, name, size, elsewhere):
        path = name.replace(".tif", ".xml")
        self.lab.write(path, size, root=2 if elsewhere else ROOT, heard=False)

    @rule(name=st.sampled_from(NAMES), verdict=VERDICTS)
    def verdict(self, name, verdict):
        self.lab.verdicts[name] = (verdict, "as drawn")

    @rule(
        name=st.sampled_from(["", *NAMES, *(n.replace(".tif", ".xml") for n in NAMES)]), root=st.sampled_from([ROOT, 2])
    )
    def unreadable(self, name, root):
        self.lab.unreadable ^= {(root, name)}

    @rule(name=st.sampled_from(NAMES), verdict=VERDICTS)
    def write_what_is_checked(self, name, verdict):
        self.lab.verdicts[name] = (verdict, "as drawn")
        self.lab.write(name, 11)
        self.lab.run_for(32)

    @rule(name=st.sampled_from(NAMES))
    def unreadable_while_its_batch_closes(self, name):
        self.lab.write(name, 12)
        self.lab.run_for(32)
        self.lab.unreadable ^= {(ROOT, name)}
        self.lab.run_for(130)
        self.lab.unreadable ^= {(ROOT, name)}

    @rule(chip=st.sampled_from("ab"))
    def many_complete_at_once(self, chip):
        self.lab.write(f"{chip}/1.tif", 13)
        self.lab.run_for(10)
        for n in (2, 3, 4):
            self.lab.write(f"{chip}/{n}.tif", 13, heard=False)
        if not self.lab.away:
            self.lab.sweep()
        self.lab.run_for(35)

    @rule(name=st.sampled_from(NAMES), verb=st.sampled_from(["abandon", "cancel", "retry"]))
    def rewrite_and_give_up(self, name, verb):
        """A newer version comes while the older one is under way, which is then held and perhaps given up."""
        self.lab.write(name, 14)
        self.lab.run_for(32)
        while self.asked < len(self.lab.asked):
            self.asked += 1
            self._answer_strangely(self.lab.asked[self.asked - 1], "active")
        self.lab.write(name, 15)
        self.lab.run_for(32)
        for number in list(self.lab.engine.runs.open):
            self.lab.order("runs.hold", ids=[number])
            self.lab.order(f"runs.{verb}", ids=[number])

    @rule(name=st.sampled_from(NAMES), verb=st.sampled_from(["hold", "cancel"]))
    def order_while_it_is_proved(self, name, verb):
        self.lab.write(name, 18)
        self.lab.run_for(32)
        while self.asked < len(self.lab.asked) and not isinstance(self.lab.asked[self.asked], model.Verify):
            self.asked += 1
            self._answer_strangely(self.lab.asked[self.asked - 1], "good")
            self.lab.run_for(1)
        for number in list(self.lab.engine.runs.open):
            self.lab.order(f"runs.{verb}", ids=[number])

    @rule(chip=st.sampled_from("ab"))
    def marker_while_sweeps_fail(self, chip):
        self.lab.write(f"{chip}/1.tif", 16)
        self.lab.run_for(32)
        self.lab.sweeps_fail = True
        self.lab.write(f"{chip}/done", 2)
        self.lab.run_for(10)
        self.lab.sweeps_fail = False

    @rule(fails=st.booleans())
    def sweeps_fail(self, fails):
        self.lab.sweeps_fail = fails

    @rule(verb=st.sampled_from(["retry", "hold", "cancel", "abandon"]), pick=st.integers(0, 5))
    def order_runs(self, verb, pick):
        ids = sorted(self.lab.engine.runs.open)
        if ids:
            self.lab.order(f"runs.{verb}", ids=[ids[pick % len(ids)]])

    @rule(verb=st.sampled_from(["pause", "resume"]), one=st.booleans())
    def pause_or_resume(self, verb, one):
        self.lab.order(f"rules.{verb}" if one else verb, rule=self.rules_now[0].name)

    @rule(verb=st.sampled_from(["go", "skip"]), name=st.sampled_from(NAMES))
    def order_files(self, verb, name):
        self.lab.order(f"files.{verb}", path=f"/data/{name}")

    @rule()
    def close_batches(self):
        self.lab.order("batches.close", rule=self.rules_now[0].name, captures={})

    @rule(how=st.sampled_from(["comment", "retry", "pattern", "without", "headless", "ungated", "back", "fault"]))
    def edit_rules(self, how):
        self.edits += 1
        rules = MORE_RULES[self.kind]
        match how:
            case "comment":
                rules = tuple(replace(one, line=self.edits) for one in rules)
            case "retry":
                rules = tuple(replace(one, retry=Retry(initial_s=1.0 + self.edits % 3)) for one in rules)
            case "pattern":
                rules = tuple(replace(one, ignore=(f"never{self.edits}",)) for one in rules)
            case "without":
                rules = rules[1:]
            case "headless":
                rules = rules[:-1]
            case "ungated":
                rules = tuple(replace(one, after=None) for one in rules)
            case "fault":
                self.lab.step(model.RulesOffered((), {}, None, self.lab.at, {"file": "a", "line": 1, "message": "no"}))
                return
        self.rules_now = rules or self.rules_now
        self.lab.offer(*rules)

    @rule(chip=st.sampled_from("ab"), how=st.sampled_from(["without", "headless", "ungated"]))
    def edit_rules_while_runs_wait_and_crash(self, chip, how):
        self.many_complete_at_once(chip)
        self.edit_rules(how)
        self.crash(False)

    @rule(seconds=st.sampled_from([-4_000, 4_000]))
    def set_the_clock(self, seconds):
        self.lab.utc += seconds

    @rule(data=st.data())
    def provider_answers_strangely(self, data):
        kinds = [
            "transient",
            "restart",
            "down",
            "person",
            "permanent",
            "inactive",
            "active",
            "differs",
            "unproven",
            "good",
        ]
        for effect in self.lab.asked[self.asked :]:
            self.asked += 1
            self._answer_strangely(effect, data.draw(st.sampled_from(kinds)))

    def _answer_strangely(self, effect, kind):
        lab, fault = self.lab, FAULTS.get(kind)
        match effect:
            case model.Prepare(run, attempt):
                lab.step(
                    model.NotStarted(run, attempt, fault, lab.at, preparing=True)
                    if fault
                    else model.Prepared(run, attempt, "p", lab.at)
                )
            case model.Start(run, attempt) if fault and attempt not in self.started.get(run, ()):
                lab.step(model.NotStarted(run, attempt, fault, lab.at))
            case model.Poll(run, attempt) if run in self.cancelled:
                self.live.pop(run, None)
                lab.step(model.Polled(run, attempt, "cancelled", lab.at))
            case model.Poll(run, attempt) if fault:
                self.live.pop(run, None)
                lab.step(model.Polled(run, attempt, "failed", lab.at, fault=fault))
            case model.Poll(run, attempt) if kind in ("inactive", "active"):
                lab.step(model.Polled(run, attempt, kind, lab.at, why="so it is", bytes_done=3))
            case model.Cancel(run, _):
                self.cancelled.add(run)
            case model.Verify(run, attempt) if kind == "differs":
                lab.step(model.Mismatch(run, attempt, {"x": "digest"}, lab.at))
            case model.Verify(run, attempt) if fault or kind == "unproven":
                lab.step(model.CannotVerify(run, attempt, fault or FAULTS["transient"], lab.at))
            case _:
                self._answer(effect, "good")

    def _answer(self, effect, choice):
        if isinstance(effect, model.Prepare):
            self.lab.step(model.Prepared(effect.run, effect.attempt, "p", self.lab.at))
            return
        if isinstance(effect, model.Start):
            self._in_order(effect.run)
        super()._answer(effect, choice)

    def _in_order(self, run):
        """Runs that write one target never work at once, and go in the order of versions."""
        mine = self._paths(run)
        for other in self.live:
            assert other == run or not mine & self._paths(other), f"runs {other} and {run} write one file at once"

    def _paths(self, run):
        record = self.lab.ledger.batches[run]
        return {(record.rule, m.path) for m in record.members if m.path.endswith(".tif")}

    # ------------------------------------------------------------------- laws

    @invariant()
    def every_open_run_is_moved_by_something(self):
        if not hasattr(self, "lab"):
            return
        runs = self.lab.engine.runs
        outstanding = {(e.run, type(e)) for e in self.lab.asked[self.asked :]}
        for run in runs.open.values():
            timers = {
                kind for kind in ("retry", "poll", "find", "verify") if runs.timers.at((kind, run.id)) is not None
            }
            match run.state:
                case RunState.PENDING if not run.slot:
                    places = {
                        "ready": run.id in runs._ready.get(run.rule, ()),
                        "parked": run.destination in runs.down
                        and run.id in runs.down[run.destination].parked
                        and runs.timers.at(("probe", run.destination)) is not None,
                        "after": any(run.id in queue for queue in runs._after.values()),
                        "blocked": any(run.id in runs._blocking.get(n, ()) for n in run.waits_on if n in runs.open),
                        "retry": "retry" in timers,
                    }
                    assert places[run.place], f"run {run.id} is {run.place} nowhere"
                case RunState.PENDING:
                    assert run.asked
                case RunState.HELD:
                    assert run.slot == (run.live or run.asked)
                case RunState.STARTING:
                    assert run.slot and run.live
                    assert "find" in timers or outstanding & {(run.id, model.Start), (run.id, model.Find)}
                case RunState.ACTIVE | RunState.INACTIVE | RunState.ABANDONED:
                    assert run.slot and run.live
                    waits = {(run.id, t) for t in (model.Poll, model.Start, model.Find)}
                    assert timers & {"poll", "find"} or outstanding & waits
                case RunState.SUCCEEDED:
                    asked = (run.id, model.Verify) in outstanding
                    turn = run.id in runs._to_prove.get(run.destination, ()) and runs._proving[run.destination]
                    assert asked or "verify" in timers or turn
                    assert asked or not run.slot, "what waits for its proof keeps a place"
        for proving in runs._proving.values():
            assert proving and all((number, model.Verify) in outstanding for number in proving)
        assert runs.at_work == sum(run.slot and run.id not in runs._idle for run in runs.open.values())

    @invariant()
    def what_waits_by_after_starts_after_a_success(self):
        """What its rule said when its batch closed holds, whatever was edited and crashed since."""
        if not hasattr(self, "lab"):
            return
        ledger = self.lab.ledger
        good = {n for n in ledger.final if ledger.states[n] in (RunState.SUCCEEDED, RunState.VERIFIED)}
        for effect in self.lab.asked[self.gates_seen :]:
            gate = ledger.batches[effect.run].request["after"] if isinstance(effect, model.Start) else None
            led = gate and any((ledger.batches[n].rule, ledger.batches[n].group) == (1, gate["same"]) for n in good)
            assert led or not gate, f"run {effect.run} did not wait"
        self.gates_seen = len(self.lab.asked)

    @invariant()
    def numbers_and_alarms_say_what_is(self):
        if not hasattr(self, "lab"):
            return
        lab, engine = self.lab, self.lab.engine
        counted: dict[tuple[int, str], list[int]] = {}
        for number, run_state in lab.ledger.states.items():
            record = lab.ledger.batches[number]
            counts = counted.setdefault((record.rule, str(run_state)), [0, 0, 0])
            for index, more in enumerate((1, len(record.members), record.bytes)):
                counts[index] += more
        assert {key: c for key, c in engine.runs.tally.items() if c[0]} == counted
        assert set(engine.alarms.open) == set(lab.ledger.alarms)
        for key in engine.alarms.open:
            kind, _, what = key.partition(":")
            match kind:
                case "held":
                    assert any(r.rule == what and r.state == RunState.HELD for r in engine.runs.open.values()), key
                case "destination":
                    assert what in engine.runs.down
                case "unreachable" | "inactive":
                    assert int(what) in engine.runs.open and engine.runs.open[int(what)].live, key
                case "blocked" | "stalled":
                    assert what in engine.rules, key
        for assembly in engine.assemblies.values():
            self._judge_assembly(assembly)

    def _judge_assembly(self, assembly):
        members = set(assembly.settling.members())
        for stage, memory in ((BLOCKED, assembly.blocked), (CLOSING, assembly._closing_of)):
            assert {m for m in members if m.stage == stage} <= set(memory), f"{stage} and nowhere"
        assert all(m.stage == BLOCKED and m in members for m in assembly.blocked)
        assert all(m.unsettled and m in members for m in assembly.stalled)
        held = {m for open_ in (*assembly.groups.values(), *assembly.closings) for m in open_.members}
        assert {m for m in members if m.stage in (COMPLETE, CLOSING)} <= held, "complete, and in no batch"
        for open_ in assembly.closings:
            # The lab answers every look at once.
            assert assembly.timers.at((assembly, open_, "soon")) is not None, "closing for ever"
        timers = assembly.timers
        for m in members:
            match m.stage:
                case "settling":
                    assert m in assembly.settling.queue or m.state == NO_STATE or self._looks_are_out(assembly)
                case "awaiting" | "incomplete" | "suspect":
                    assert timers.at(m) is not None, f"{m.path} is {m.stage}, and nothing looks again"
        assert assembly.settling.count == len(members)

    def _looks_are_out(self, assembly):
        return not assembly.steady

    def teardown(self):
        if not hasattr(self, "lab"):
            return
        lab = self.lab
        lab.unreadable.clear()
        lab.verdicts.clear()
        lab.sweeps_fail = False
        lab.look_takes_s = 0.0
        if lab.away:
            self.root_goes_and_comes()
        self.rules_now = MORE_RULES[self.kind]
        lab.offer(*self.rules_now)
        lab.order("resume")
        for one in self.rules_now:
            lab.order("rules.resume", rule=one.name)
        for turn in range(100):  # one run after another, where a rule allows one at once
            lab.sweep()
            lab.run_for(400 if turn < 6 else 20)
            while self.asked < len(lab.asked):
                self.asked += 1
                self._answer_strangely(lab.asked[self.asked - 1], "good")
            self.every_open_run_is_moved_by_something()
            self.numbers_and_alarms_say_what_is()
            if turn > 6 and all(
                run.place in ("after", "blocked") or run.state == RunState.HELD for run in lab.engine.runs.open.values()
            ):
                break
        self._judge_the_end(lab)

    def _judge_the_end(self, lab):
        """Nothing in two batches, nothing left but what a person or a marker must move; no timer of what has ended."""
        for one in lab.rules:
            taken: dict[tuple[str, int, int], int] = {}
            for _, record in lab.closed:
                for m in record.members if record.rule == one.id else ():
                    if not m.role:
                        key = (m.path, m.size, m.mtime_ns)
                        taken[key] = taken.get(key, 0) + 1
            assert all(count == 1 for count in taken.values()), f"in two batches: {taken}"
            assembly = lab.engine.assemblies[one.id]
            assert not assembly.pending, "a marker or a time of day that closes nothing for ever"
            for root, path in lab.disk:
                if root != ROOT or not path.endswith(".tif"):
                    continue
                version = lab.disk[(root, path)][:2]
                if version in lab.ledger.claims.get((one.id, path), {}):
                    continue
                member = assembly.settling.get(path)
                assert member is not None, f"{path} was missed by {one.name}"
                kept = (
                    member.stage == BLOCKED
                    or member in assembly.stalled
                    or (member.stage == COMPLETE and self._gathers(one))
                )
                assert kept or lab.at - lab.history[(root, path)][-1][0] < 1_200, f"{path} is {member.stage} for ever"
            if one.batch and one.batch.only_first and one.batch.new_group_after_s is None:
                groups = [tuple(sorted(r.group.items())) for _, r in lab.closed if r.rule == one.id]
                assert len(groups) == len(set(groups)), "only_first closed a group twice"
                assert all(len(r.members) <= one.batch.only_first for _, r in lab.closed if r.rule == one.id)
        open_runs = lab.engine.runs.open
        assert all(run.state == RunState.HELD or self._waits_for_a_person(run) for run in open_runs.values()), [
            (run.id, run.state, run.place) for run in open_runs.values()
        ]
        for key in lab.engine.timers._live:
            if isinstance(key, tuple) and key[0] in ("retry", "poll", "find", "verify"):
                assert key[1] in open_runs, f"a timer of what has ended: {key}"
        assert not lab.engine._batched

    def _gathers(self, one):
        return one.batch is not None and (one.batch.close_on is not None or bool(one.batch.at))

    def _waits_for_a_person(self, run):
        """Behind a held run, or behind a rule whose run for the chip is held or was given up."""
        runs = self.lab.engine.runs
        return run.place == "after" or (
            run.place == "blocked"
            and all(
                self._waits_for_a_person(runs.open[n]) or runs.open[n].state == RunState.HELD
                for n in run.waits_on
                if n in runs.open
            )
        )


def histories(examples: int, machine: type[RuleBasedStateMachine] = Histories, steps: int = 30) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
            print_blob=False,
        ),
    )


def test_promises_hold_over_random_histories():
    """Nothing early, missed, or twice: events lost, looks slow, roots away, crashes, two rules on one file."""
    histories(200)


def test_nothing_is_stuck_or_told_wrongly_over_random_troubles():
    """Whatever people, providers and disks do: no step fails, every open run has something that will move it."""
    histories(200, Troubles)


# ------------------------------------------------------------------- mutants


def _one_look(monkeypatch):
    """Silence means quiet: complete at the deadline without looking again."""

    def expire(self, now):
        for member, deadline in list(self.queue.items()):
            if deadline <= now:
                del self.queue[member]
                self._quiet(member, now)

    monkeypatch.setattr(Settling, "expire", expire)


def _quiet_from_the_beginning(monkeypatch):
    """Quiet measured from the first look's beginning."""
    original = Settling.found

    def found(self, fact, rows, earlier):
        original(
            self,
            model.Seen(fact.root, fact.dir, fact.rows, fact.began, fact.began, fact.cause, fact.signal, fact.as_of),
            rows,
            earlier,
        )

    monkeypatch.setattr(Settling, "found", found)


def _forget_claims(monkeypatch):
    """A claimed file is let go at once, and a look from before the claim starts it again as if trusted."""
    original = Settling._look

    def look(self, member, state, wants, fact):
        if member.stage != BATCHED and state is not None and not wants:
            wants = ((self.key, 0),)
        original(self, member, state, wants, fact)

    monkeypatch.setattr(Settling, "_look", look)
    monkeypatch.setattr(
        Engine,
        "_marked",
        lambda self, fact: (
            [m.home.drop(m) for q in self._batched.values() for _, ms in q for m in ms if m.stage == BATCHED] and None
        ),
    )


def _no_second_state(monkeypatch):
    """The second look's state is not compared."""
    original = Settling._look

    def look(self, member, state, wants, fact):
        if state is not None and member.stage == SETTLING:
            member.state = state
        original(self, member, state, wants, fact)

    monkeypatch.setattr(Settling, "_look", look)


def _attempt_anew(monkeypatch):
    """A lost answer is followed by a new attempt instead of a look for the last one."""

    def start_unknown(self, fact):
        run = self._current(fact.run, fact.attempt)
        if run is not None and run.handle is None:
            run.state, run.live, run.slot = RunState.PENDING, False, False
            self.out.append(model.RunMoved(run.id, RunState.STARTING, RunState.PENDING, "", 0.0, False))
            self._enqueue(run, fact.at)

    monkeypatch.setattr(Runs, "start_unknown", start_unknown)
    original = Engine.__init__

    def init(self, **keys):
        original(self, **keys)
        self._steps[model.StartUnknown] = self.runs.start_unknown

    monkeypatch.setattr(Engine, "__init__", init)


def _closing_without_looking(monkeypatch):
    """Members of a closing batch are not looked at again."""
    monkeypatch.setattr("trigger_daemon.core.assembly.FRESH_S", 1e9)


@pytest.mark.parametrize(
    "mutate",
    [_one_look, _quiet_from_the_beginning, _forget_claims, _no_second_state, _attempt_anew, _closing_without_looking],
    ids=lambda f: f.__name__.strip("_"),
)
def test_each_broken_law_is_found(mutate, monkeypatch):
    """An engine with one deliberate bug fails the same histories."""
    mutate(monkeypatch)

    with pytest.raises(AssertionError):
        histories(300)


def _held_with_a_slot(monkeypatch):
    """A run that is held while it is proved keeps its slot."""
    original = Runs._free_slot
    monkeypatch.setattr(
        Runs, "_free_slot", lambda self, run, at: None if run.state == RunState.HELD else original(self, run, at)
    )


def _abandoned_and_forgotten(monkeypatch):
    """The end of an abandoned run is told to nobody who waited for it."""

    def abandoned(self, run, because, at):
        self.out.append(model.RunMoved(run.id, run.state, run.state, because, self.utc(at), final=True))
        self._free_slot(run, at)
        self._drop(run)

    monkeypatch.setattr(Runs, "_abandoned", abandoned)


def _unread_while_closing(monkeypatch):
    """A file that cannot be read when its batch closes is waited for."""
    original = Settling.unread

    def unread(self, root, directory, names, why, at):
        members = self.dirs.get(directory, {})
        readable = [n for n in names if n not in members or members[n].stage != CLOSING]
        original(self, root, directory, readable, why, at)

    monkeypatch.setattr(Settling, "unread", unread)


def _second_batch_of_the_first(monkeypatch):
    """While the group's one batch closes, another one gathers."""
    monkeypatch.setattr(Assembly, "_first", property(lambda self: {}, lambda self, value: None), raising=False)


def _tally_of_ends_is_wrong(monkeypatch):
    """Runs that are superseded are not counted."""
    original = Runs._count
    monkeypatch.setattr(
        Runs, "_count", lambda self, run, by: None if run.state == RunState.SUPERSEDED else original(self, run, by)
    )


def _alarms_stay(monkeypatch):
    """The alarm of held runs is never cleared."""
    monkeypatch.setattr(Runs, "_held_no_more", lambda self, run, at: None)


def _versions_at_once(monkeypatch):
    """A newer version waits for nothing."""
    monkeypatch.setattr(Runs, "newer_version", lambda self, run_id, path, at: set())


def _gate_of_the_rule_in_force(monkeypatch):
    """A run waits for what its rule says now, and for nothing if it says nothing or is gone."""
    original = Runs._gated

    def gated(self, run, at):
        rule = self.rules.get(run.rule)
        return rule is not None and rule.after is not None and original(self, run, at)

    monkeypatch.setattr(Runs, "_gated", gated)


def _suspect_forever(monkeypatch):
    """A hidden doubt has no timer."""

    def suspect(self, member, why, at):
        member.stage, member.why = "suspect", why

    monkeypatch.setattr(Settling, "_suspect", suspect)


def _failed_sweeps_are_not_repeated(monkeypatch):
    """What a failed sweep was asked for is never asked for again."""
    monkeypatch.setattr(Engine, "_sweep_again", lambda self, fact: None)


@pytest.mark.parametrize(
    ("mutate", "kind"),
    [
        (_held_with_a_slot, "existing"),
        (_abandoned_and_forgotten, "existing"),
        (_unread_while_closing, "ignore"),
        (_second_batch_of_the_first, "first"),
        (_tally_of_ends_is_wrong, "existing"),
        (_alarms_stay, "existing"),
        (_versions_at_once, "existing"),
        (_gate_of_the_rule_in_force, "after"),
        (_suspect_forever, "checked"),
        (_failed_sweeps_are_not_repeated, "include"),
    ],
    ids=lambda f: f if isinstance(f, str) else f.__name__.strip("_"),
)
def test_each_law_of_troubles_finds_its_bug(mutate, kind, monkeypatch):
    """An engine with one deliberate bug fails the same troubles."""
    mutate(monkeypatch)

    with pytest.raises((AssertionError, KeyError)):
        histories(200, type("Some", (Troubles,), {"kinds": (kind,)}), steps=20)


def test_marker_waits_for_a_sweep_begun_after_it_was_complete(monkeypatch):
    """A marker that is satisfied by an older sweep closes without the file that no event named."""

    def scene() -> list[tuple[str, ...]]:
        lab = Lab(*RULES["marker"])
        lab.write("a/1.tif")
        lab.run_for(40)
        lab.sweep()
        lab.write("a/2.tif", heard=False)
        lab.write("a/done")
        lab.run_for(200)
        return lab.batches()

    assert [set(paths) for paths in scene()] == [{"a/1.tif", "a/2.tif"}]

    def too_early(self, captures, reason, marker=None):
        self.close_group(captures, reason, self.timers.next() or 0.0)

    monkeypatch.setattr(Assembly, "close_after_sweep", too_early)
    assert [set(paths) for paths in scene()] != [{"a/1.tif", "a/2.tif"}]
