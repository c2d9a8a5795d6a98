"""Random histories: whatever is lost, slow, rewritten or crashed, the promises hold.

The lab's own record is the oracle. The same machine, run on engines with one
deliberate bug each, must find that bug: a law that nothing can break proves
nothing.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.lab import ROOT, Lab
from tests.lab import rule as make
from trigger_daemon.core import model
from trigger_daemon.core.assembly import Assembly
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import Fault, RunState
from trigger_daemon.core.rules import Batch, CloseOn, Complete
from trigger_daemon.core.runs import Runs
from trigger_daemon.core.settle import BATCHED, SETTLING, Settling

QUIET_S = 30.0
NAMES = ("a/1.tif", "a/2.tif", "a/3.tif", "b/1.tif")

RULES = {
    "single": (make(),),
    "files": (make(batch=Batch(files=2, idle_s=120)),),
    "grouped": (make(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), files=3, oldest_waits_s=90)),),
    "two": (make(), make("s", 2, complete=Complete(quiescence_s=QUIET_S), batch=Batch(bytes=50, idle_s=60))),
    "marker": (
        make(match=("{chip}/{n}.tif",),
             batch=Batch(group_by=("chip",), close_on=CloseOn("{chip}/done", quiescence_s=5.0), idle_s=900)),
    ),
}  # fmt: skip


class Histories(RuleBasedStateMachine):
    """One history: writes heard and unheard, slow looks, sweeps, crashes, provider faults, a root that goes away."""

    @initialize(kind=st.sampled_from(sorted(RULES)))
    def begin(self, kind):
        self.lab = Lab(*RULES[kind], auto=False)
        self.answered: set[tuple[int, int]] = set()
        self.asked = 0
        self.started: dict[int, set[int]] = {}  # run -> attempts that the provider took
        self.live: dict[int, int] = {}

    @rule(name=st.sampled_from(NAMES), size=st.integers(1, 60), heard=st.booleans(), signal=st.sampled_from(["none", "close"]))
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


def histories(examples: int) -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,), print_blob=False,
        ),  # fmt: skip
    )


def test_promises_hold_over_random_histories():
    """Nothing early, nothing missed, nothing twice: events lost, looks slow, roots away, crashes, two rules on one file."""
    histories(200)


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
        original(self, model.Seen(fact.root, fact.dir, fact.rows, fact.began, fact.began, fact.cause, fact.signal, fact.as_of),
                 rows, earlier)  # fmt: skip

    monkeypatch.setattr(Settling, "found", found)


def _forget_claims(monkeypatch):
    """A claimed file is let go at once, and a look from before the claim starts it again as if trusted."""
    original = Settling._look

    def look(self, member, state, wants, fact):
        if member.stage != BATCHED and state is not None and not wants:
            wants = ((self.key, 0),)
        original(self, member, state, wants, fact)

    monkeypatch.setattr(Settling, "_look", look)
    monkeypatch.setattr(Engine, "_marked", lambda self, fact: [
        m.home.drop(m) for q in self._batched.values() for _, ms in q for m in ms if m.stage == BATCHED
    ] and None)  # fmt: skip


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
