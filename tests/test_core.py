"""Laws of the core: when a file is complete, when a batch closes, what a run may do. On a passed clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import ROOT, UTC, Lab, rule
from trigger_daemon.core import lifecycle, model
from trigger_daemon.core.alarms import Alarms
from trigger_daemon.core.lifecycle import Event
from trigger_daemon.core.model import Fault, RunState, Scope, Verdict
from trigger_daemon.core.rules import After, Batch, CloseOn, Complete, Retry, With

# ------------------------------------------------------------- completeness


def test_quiet_file_is_batched_after_the_quiet_period():
    """Two equal looks, a quiet period apart, make a file complete."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.run_for(29.9)
    assert lab.batches() == []
    lab.run_for(0.2)

    assert lab.batches() == [("a.tif",)]


def test_unheard_write_restarts_the_quiet_period():
    """A change nobody told us about still delays the batch."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.run_for(25)
    lab.write("a.tif", 20, heard=False)
    lab.run_for(10)
    assert lab.batches() == []
    lab.run_for(60)

    assert lab.batches() == [("a.tif",)]
    lab.judge_early(30)


def test_hint_restarts_the_quiet_period_even_if_the_state_is_the_same():
    """A writer whose mtime stands still is believed when an event says it wrote."""
    lab = Lab(rule())
    lab.write("a.tif", 10, mtime=5)
    state = lab.disk[(ROOT, "a.tif")]
    lab.run_for(20)
    lab.disk[(ROOT, "a.tif")] = state
    lab.look(ROOT, "", ("a.tif",), "hint")
    lab.run_for(20)
    assert lab.batches() == []
    lab.run_for(11)

    assert lab.batches() == [("a.tif",)]


def test_quiet_is_measured_from_the_end_of_the_first_look_to_the_beginning_of_the_second():
    """A slow look proves nothing about the time it took."""
    lab = Lab(rule())
    lab.look_takes_s = 10.0
    lab.write("a.tif")  # the look began at 0 and ended at 10
    lab.look_takes_s = 0.0
    lab.run_for(29.0)
    assert lab.batches() == []
    lab.run_for(1.5)

    assert lab.batches() == [("a.tif",)]


def test_a_sweep_finds_what_no_event_named():
    """Correctness holds with every hint lost."""
    lab = Lab(rule())
    lab.write("a.tif", heard=False)
    lab.sweep()
    lab.run_for(31)

    assert lab.batches() == [("a.tif",)]


def test_claimed_version_is_never_batched_again():
    """Sweeps, hints and a restart find a claimed version, and leave it."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.run_for(31)
    lab.look(ROOT, "", ("a.tif",), "hint", "close")
    lab.sweep()
    lab.run_for(100)
    lab.crash()
    lab.look(ROOT, "", ("a.tif",), "hint", "none")
    lab.run_for(100)

    assert lab.batches() == [("a.tif",)]


def test_stale_look_from_before_the_claim_starts_nothing():
    """A chunk read before a claim was committed, and delivered after, is recognised."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.run_for(31)
    state = lab.disk[(ROOT, "a.tif")]
    lab.step(model.Seen(ROOT, "", [("a.tif", state, ((1, 0),))], lab.at - 20, lab.at, "sweep", "none", 0))
    lab.run_for(100)

    assert lab.batches() == [("a.tif",)]


def test_rewritten_file_ends_as_its_own_version():
    """Each version is one batch, and the newer run waits for the older one."""
    lab = Lab(rule(), auto=False)
    lab.write("a.tif", 10)
    lab.run_for(31)
    lab.write("a.tif", 20)
    lab.run_for(31)

    assert lab.batches() == [("a.tif",), ("a.tif",)]
    assert [type(e).__name__ for e in lab.asked] == ["Start"]
    assert lab.closed[1][1].waits_on == (1,)


@pytest.mark.parametrize(("on_rewrite", "stage"), [("ignore", ""), ("block", "blocked")])
def test_on_rewrite_is_obeyed(on_rewrite, stage):
    """A rewritten file is left out, or blocked until a person decides."""
    lab = Lab(rule(on_rewrite=on_rewrite))
    lab.write("a.tif", 10)
    lab.run_for(31)
    lab.write("a.tif", 20)
    lab.run_for(31)

    assert lab.batches() == [("a.tif",)]
    assert lab.explain("a.tif")[0]["stage"] == stage


def test_blocked_file_goes_on_an_operators_word():
    """`files go` batches it, once."""
    lab = Lab(rule(on_rewrite="block"))
    lab.write("a.tif", 10)
    lab.run_for(31)
    lab.write("a.tif", 20)
    lab.run_for(31)
    answer = lab.order("files.go", path="/data/a.tif")
    lab.run_for(100)

    assert answer["ok"]
    assert lab.batches() == [("a.tif",), ("a.tif",)]


def test_skipped_file_stays_skipped():
    """`files skip` leaves this version out, over a restart too."""
    lab = Lab(rule(on_rewrite="block"))
    lab.write("a.tif", 0)
    lab.run_for(31)
    assert lab.order("files.skip", path="/data/a.tif")["ok"]
    lab.crash()
    lab.run_for(100)

    assert lab.batches() == []
    assert lab.order("files.list")["files"] == []


def test_empty_file_is_not_complete_unless_the_rule_says_so():
    """Detectors create files before they fill them."""
    strict, lax = Lab(rule()), Lab(rule(complete=Complete(allow_empty=True)))
    for lab in (strict, lax):
        lab.write("a.tif", 0)
        lab.run_for(100)

    assert strict.batches() == []
    assert strict.explain("a.tif")[0] | {"until_time": None} == {
        "rule": "r",
        "stage": "incomplete",
        "because": "the file is empty",
        "until_time": None,
        "run": None,
    }
    assert lax.batches() == [("a.tif",)]


def test_incomplete_file_goes_when_the_rest_has_come_without_a_hint():
    """An incomplete file is looked at again until its bytes are there."""
    lab = Lab(rule(complete=Complete(checks=(("tiff", {}),))))
    lab.verdicts["a.tif"] = (Verdict.INCOMPLETE, "20 of 40 frames")
    lab.write("a.tif", 10)
    lab.run_for(100)
    assert lab.explain("a.tif")[0]["because"] == "20 of 40 frames"
    lab.verdicts.clear()
    lab.write("a.tif", 20, heard=False)
    lab.run_for(100)

    assert lab.batches() == [("a.tif",)]
    lab.judge_early(30)


def test_file_that_stays_incomplete_raises_an_alarm_and_never_starts():
    """Stalled is an alarm, never a start."""
    lab = Lab(rule(complete=Complete(checks=(("tiff", {}),), stalled_after_s=300)))
    lab.verdicts["a.tif"] = (Verdict.INCOMPLETE, "20 of 40 frames")
    lab.write("a.tif")
    lab.run_for(400)

    assert lab.batches() == []
    assert "stalled:r" in lab.engine.alarms.open


def test_suspect_file_goes_flagged_after_its_time():
    """Doubt delays and is recorded; it does not block for ever unless asked."""
    lab = Lab(rule(complete=Complete(checks=(("tiff", {}),), suspect_s=300)))
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "4 kB after the last frame")
    lab.write("a.tif")
    lab.run_for(290)
    assert lab.batches() == []
    lab.run_for(20)

    assert lab.closed[0][1].members[0].flag == "suspect"


def test_trusted_close_needs_no_quiet_period():
    """A rule that trusts its writer's close goes at once, and only on that signal."""
    lab = Lab(rule(complete=Complete(trust=frozenset({"close"}))))
    lab.write("a.tif", signal="close")
    lab.write("b.tif", signal="none")

    assert lab.batches() == [("a.tif",)]


def companion_rule(**spec):
    return rule(match=("{stem}.tif",), complete=Complete(companions=(With("{stem}.xml", "/data", **spec),)))


def test_file_waits_for_its_companion_and_travels_with_it():
    """A companion must be there and quiet; both are in the manifest."""
    lab = Lab(companion_rule())
    lab.write("a.tif")
    lab.run_for(60)
    assert lab.batches() == []
    assert "companion a.xml" in lab.explain("a.tif")[0]["because"]
    lab.write("a.xml", heard=False)
    lab.run_for(60)

    assert [set(paths) for paths in lab.batches()] == [{"a.tif", "a.xml"}]


def test_companion_written_beside_the_file_costs_no_second_quiet_period():
    """Quiet periods of a file and its companion run side by side."""
    lab = Lab(companion_rule())
    lab.write("a.xml", heard=False)
    lab.write("a.tif")
    lab.run_for(30.5)

    assert [set(paths) for paths in lab.batches()] == [{"a.tif", "a.xml"}]


@pytest.mark.parametrize("missing", ["block", "go"])
def test_missing_companion_blocks_or_lets_go_after_its_wait(missing):
    """What happens to a file whose companion never comes is what its rule says."""
    lab = Lab(companion_rule(wait_s=600.0, missing=missing))
    lab.write("a.tif")
    lab.run_for(590)
    assert lab.batches() == []
    until = lab.explain("a.tif")[0]["until_time"]
    assert until is not None and until - UTC == 1_000 + 30 + 600  # its quiet period, and then the wait
    lab.run_for(60)

    assert lab.batches() == ([("a.tif",)] if missing == "go" else [])
    assert lab.explain("a.tif")[0]["stage"] == ("" if missing == "go" else "blocked")


@pytest.mark.parametrize("order", [1, -1])
def test_verdicts_of_a_file_and_its_companion_count_in_any_order(order):
    """Checks run beside each other: whoever answers last, the file goes on."""

    class Late(Lab):
        checks: list[model.Check] = []

        def _carry(self, effect):
            if isinstance(effect, model.Check):
                self.checks = [*self.checks, effect]
            else:
                super()._carry(effect)

    spec = With("{stem}.xml", "/data", checks=(("xml", {}),))
    lab = Late(rule(match=("{stem}.tif",), complete=Complete(checks=(("tiff", {}),), companions=(spec,))))
    lab.write("a.xml", heard=False)
    lab.write("a.tif")
    lab.run_for(31)
    assert {check.path for check in lab.checks} == {"a.tif", "a.xml"}
    for check in lab.checks[::order]:
        about = (check.rule, check.root, check.path, check.state)
        lab.step(model.Checked(*about, Verdict.COMPLETE, "whole", lab.at, scope=check.scope))
    lab.run_for(1)

    assert [set(paths) for paths in lab.batches()] == [{"a.tif", "a.xml"}]


def test_existing_files_are_left_out_where_the_rule_says_so_and_new_ones_are_not():
    """The baseline is what the first complete sweep finds; a later version of it is new."""
    lab = Lab.__new__(Lab)
    lab.__init__()
    lab.write("old.tif", heard=False)
    lab.offer(rule(existing="ignore"))
    lab.write("new.tif")
    lab.run_for(31)
    lab.crash()
    lab.run_for(31)
    assert lab.batches() == [("new.tif",)]
    lab.write("old.tif", 77)
    lab.run_for(31)

    assert lab.batches() == [("new.tif",), ("old.tif",)]


def test_two_rules_claim_one_file_once_each():
    """A file may match several rules."""
    lab = Lab(rule("r", 1), rule("s", 2, complete=Complete(quiescence_s=60)))
    lab.write("a.tif")
    lab.run_for(100)
    lab.sweep()
    lab.run_for(100)

    assert sorted(record.rule for _, record in lab.closed) == [1, 2]


# ------------------------------------------------------------------ batches


def test_batch_closes_at_so_many_files_with_the_reason():
    """`files`: exactly so many, in order of completion."""
    lab = Lab(rule(batch=Batch(files=3)))
    for n in range(7):
        lab.write(f"{n}.tif")
    lab.run_for(31)

    assert lab.batches() == [("0.tif", "1.tif", "2.tif"), ("3.tif", "4.tif", "5.tif")]
    assert lab.closed[0][1].reason == "files: 3 of 3"


def test_a_batch_never_holds_more_than_the_action_takes():
    """What the action takes at once closes a batch that only time would close; nothing waits behind it."""
    lab = Lab(rule(batch=Batch(idle_s=300, files_max=2)))
    for n in range(5):
        lab.write(f"{n}.tif")
    lab.run_for(31)

    assert lab.batches() == [("0.tif", "1.tif"), ("2.tif", "3.tif")]
    assert lab.closed[0][1].reason == "files: 2, the most a batch may hold"
    lab.run_for(330)
    assert lab.batches()[2:] == [("4.tif",)]


def test_a_time_of_day_is_waited_for_however_much_comes():
    """The limit of an action splits what is closed then; by day nothing goes."""
    lab = Lab(rule(batch=Batch(at=("12:00",), files_max=2)))
    for name in "abcde":
        lab.write(f"{name}.tif")
    lab.run_for(3_600)
    assert lab.closed == []
    lab.run_for(86_400)

    assert [len(batch.members) for _, batch in lab.closed] == [2, 2, 1]
    assert {member.name for _, batch in lab.closed for member in batch.members} == {f"{name}.tif" for name in "abcde"}


def test_groups_fill_apart():
    """`group_by`: one open batch a group, and its captures go with it."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), files=2)))
    for path in ("a/1.tif", "b/1.tif", "a/2.tif", "b/2.tif"):
        lab.write(path)
    lab.run_for(31)

    assert [(r.group, tuple(m.path for m in r.members)) for _, r in lab.closed] == [
        ({"chip": "a"}, ("a/1.tif", "a/2.tif")),
        ({"chip": "b"}, ("b/1.tif", "b/2.tif")),
    ]


@pytest.mark.parametrize(
    ("batch", "closes_after"),
    [
        (Batch(idle_s=60), 30 + 20 + 60),
        (Batch(oldest_waits_s=60), 30 + 60),
        (Batch(bytes=15), 30 + 20),
        (Batch(expect=2), 30 + 20),
    ],
)
def test_each_closing_condition_closes_at_its_time(batch, closes_after):
    """idle, oldest_waits, bytes, expect."""
    lab = Lab(rule(batch=batch))
    start = lab.at
    lab.write("a.tif")
    lab.run_for(20)
    lab.write("b.tif")
    lab.run_for(300)

    assert [round(at - start) for at, _ in lab.closed] == [closes_after]
    assert set(lab.batches()[0]) == {"a.tif", "b.tif"}


def test_member_that_changed_while_its_batch_was_open_goes_back():
    """Members are looked at again when their batch closes."""
    lab = Lab(rule(batch=Batch(idle_s=100)))
    lab.write("a.tif")
    lab.write("b.tif")
    lab.run_for(60)
    lab.write("a.tif", 99, heard=False)
    lab.run_for(500)

    assert lab.batches() == [("b.tif",), ("a.tif",)]
    lab.judge_early(30)


def test_only_first_takes_the_first_so_many_and_no_more():
    """Later files of the group are left out by name, over a restart too."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), only_first=2, idle_s=500)))
    for n in range(4):
        lab.write(f"a/{n}.tif")
        lab.run_for(1)
    lab.run_for(600)
    lab.crash()
    lab.write("a/9.tif")
    assert lab.explain("a/9.tif")[0]["stage"] == "skipped", "also while it settles, as after each sweep"
    lab.run_for(600)

    assert lab.batches() == [("a/0.tif", "a/1.tif")]
    assert set(lab.ledger.claims[(1, "a/9.tif")].values()) == {model.CLAIM_ONLY_FIRST}


def test_group_used_again_after_a_pause_begins_anew():
    """`new_group_after`: a chip name comes back another day."""
    batch = Batch(group_by=("chip",), only_first=1, new_group_after_s=3_600)
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=batch))
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.write("a/2.tif")
    lab.run_for(40)
    lab.run_for(4_000)
    lab.write("a/3.tif")
    lab.run_for(40)

    assert lab.batches() == [("a/1.tif",), ("a/3.tif",)]


def marker_rule(**keys):
    close_on = CloseOn("{chip}/done", quiescence_s=5.0, **keys)
    return rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), close_on=close_on))


def test_marker_closes_its_group_after_all_it_saw_has_settled():
    """A marker that overtakes the last file waits for it."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.write("b/1.tif")
    lab.run_for(40)
    lab.write("a/2.tif", heard=False)
    lab.write("a/done")
    lab.run_for(10)
    assert lab.batches() == []
    lab.run_for(60)

    assert [set(paths) for paths in lab.batches()] == [{"a/1.tif", "a/2.tif"}]


def test_marker_acts_once_over_a_restart():
    """The same version of a marker closes nothing again; its rewritten version does."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.write("a/done")
    lab.run_for(60)
    lab.crash()
    lab.write("a/2.tif")
    lab.run_for(100)
    assert len(lab.batches()) == 1
    lab.write("a/done", 11)
    lab.run_for(60)

    assert lab.batches() == [("a/1.tif",), ("a/2.tif",)]


def test_batch_closes_at_its_time_of_day_once():
    """`at`: every day at the named time, and made up for after a stop."""
    lab = Lab(rule(batch=Batch(at=("12:00",))))
    lab.write("a.tif")
    lab.run_for(25 * 3_600)
    lab.write("b.tif")
    lab.run_for(3_600)
    count = len(lab.batches())
    lab.at += 24 * 3_600
    lab.crash()
    lab.run_for(120)

    assert count == 1
    assert lab.batches() == [("a.tif",), ("b.tif",)]


def test_nothing_closes_while_the_root_is_away_and_quiet_starts_over_on_return():
    """A vanished disk proves nothing, and loses nothing."""
    lab = Lab(rule(batch=Batch(idle_s=60)))
    lab.write("a.tif")
    lab.run_for(31)
    lab.away = True
    lab.step(model.RootChanged(ROOT, "lost", "unmounted", "mount it", "none", lab.at))
    lab.run_for(1_000)
    assert lab.batches() == []
    assert "root:/data" in lab.engine.alarms.open
    lab.away = False
    lab.step(model.RootChanged(ROOT, "returned", "", "", "inotify", lab.at))
    lab.step(model.RootChanged(ROOT, "ok", "", "", "inotify", lab.at))
    lab.run_for(200)

    assert lab.batches() == [("a.tif",)]
    assert "root:/data" not in lab.engine.alarms.open


def test_settled_floods_hold_sweeps_back():
    """A million files found at once do not all wait in memory."""
    lab = Lab(rule())
    rows = [(f"{n}.tif", (1, n, n, n), ((1, 0),)) for n in range(100_001)]
    effects = lab.step(model.Seen(ROOT, "d", rows, lab.at, lab.at, "sweep", "none", 0))

    assert model.HoldSweeps(True) in effects


# --------------------------------------------------------------------- runs


def closed_run(**keys) -> Lab:
    lab = Lab(rule(**keys), auto=False)
    lab.write("a.tif")
    lab.run_for(31)
    return lab


def state(lab: Lab, run: int = 1) -> RunState:
    return lab.ledger.states[run]


def test_attempt_is_journaled_before_the_provider_is_asked():
    """The record stands before the effect in the same step."""
    lab = closed_run()
    kinds = [type(e).__name__ for e in lab.effects if type(e).__name__ in ("AttemptMade", "Start")]

    assert kinds == ["AttemptMade", "Start"]


def test_lost_answer_is_looked_for_and_never_attempted_anew():
    """STARTING is left only on the provider's word, over a restart too."""
    lab = closed_run()
    lab.step(model.StartUnknown(1, 1, "time-out", lab.at))
    lab.run_for(60)
    lab.crash()
    lab.run_for(1)

    assert {type(e).__name__ for e in lab.asked[1:]} == {"Find"}
    assert {e.attempt for e in lab.asked} == {1}


def test_failed_poll_never_leaves_active():
    """An unreachable provider is asked again; no new attempt begins."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    for _ in range(20):
        lab.step(model.Polled(1, 1, "unreachable", lab.at, why="time-out"))
        lab.run_for(100)

    assert state(lab) == RunState.ACTIVE
    assert "unreachable:1" in lab.engine.alarms.open


def test_transient_failure_is_followed_by_another_attempt_later():
    """The next attempt has the next number and comes after the backoff."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault("transient", "checksum")))
    assert state(lab) == RunState.PENDING
    lab.run_for(6)

    assert [e.attempt for e in lab.asked if isinstance(e, model.Start)] == [1, 2]


@pytest.mark.parametrize("kind", ["permanent", "person"])
def test_fault_that_needs_a_person_holds_the_run_with_a_hint(kind):
    """HELD: nothing lost, nothing goes on by itself."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault(kind, "no such path", "make it")))
    lab.run_for(10_000)

    assert state(lab) == RunState.HELD
    assert [e.attempt for e in lab.asked if isinstance(e, model.Start)] == [1]
    assert lab.order("runs.retry", ids=[1])["ok"]
    assert state(lab) == RunState.STARTING


def test_attempts_are_given_up_after_the_rules_time():
    """A run that fails for ever ends HELD."""
    lab = closed_run(retry=Retry(initial_s=5, longest_s=60, give_up_after_s=600))
    for attempt in range(1, 40):
        if state(lab) != RunState.STARTING:
            break
        lab.step(model.Started(1, attempt, "h", lab.at))
        lab.step(model.Polled(1, attempt, "failed", lab.at, fault=Fault("transient", "no")))
        lab.run_for(61)

    assert state(lab) == RunState.HELD


def test_destination_that_is_down_stops_starts_to_it_and_burns_no_attempt():
    """One probe at a time; when it answers, everything goes on."""
    lab = Lab(rule(), auto=False)
    for name in "abc":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    fault = Fault("transient", "not mounted", scope=Scope.DESTINATION)
    for run in (1, 2, 3):
        lab.step(model.NotStarted(run, 1, fault, lab.at))
    lab.asked.clear()
    lab.run_for(100)
    assert len([e for e in lab.asked if isinstance(e, model.Start)]) == 1
    probe = lab.asked[0]
    lab.step(model.Started(probe.run, probe.attempt, "h", lab.at))
    lab.step(model.Polled(probe.run, probe.attempt, "succeeded", lab.at))
    lab.run_for(1)

    assert len([e for e in lab.asked if isinstance(e, model.Start)]) == 3
    assert not [key for key in lab.engine.alarms.open if key.startswith("destination")]


def test_who_waits_for_a_destination_or_an_attempt_is_told_when_it_is_looked_at_next():
    """A run alone, and a reason: the instant by the wall clock; none while it is being looked at."""
    lab = Lab(rule(), auto=False)
    for name in "ab":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    down = Fault("transient", "not mounted", scope=Scope.DESTINATION, retry_after_s=40)
    lab.step(model.NotStarted(1, 1, down, lab.at))
    lab.step(model.NotStarted(2, 1, Fault("transient", "busy", retry_after_s=50, counts=False), lab.at))

    def next_s() -> list[float | None]:
        answer = lab.order("runs.waiting", ids=[1, 2], grouped=True)
        alone = [answer["runs"][run]["next_time"] for run in "12"]
        assert sorted(map(str, alone)) == sorted(str(of["next_time"]) for of in answer["waits"]["groups"])
        return [None if at is None else round(at - lab.utc - lab.at, 1) for at in alone]

    assert next_s() == [40.0, 50.0]
    lab.run_for(10)
    assert next_s() == [30.0, 40.0]
    lab.run_for(60)

    assert state(lab) == RunState.STARTING
    assert [lab.engine.runs.next_time(lab.engine.runs.open[run]) for run in (1, 2)] == [None, None]


def test_success_is_not_proof():
    """SUCCEEDED is what the provider says, VERIFIED what was proved."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    assert state(lab) == RunState.SUCCEEDED
    lab.step(model.Proved(1, 1, [{"path": "a.tif"}], lab.at))

    assert state(lab) == RunState.VERIFIED


def test_mismatch_goes_once_again_and_then_to_a_person():
    """Members that differ are sent once more, never for ever."""
    lab = closed_run()
    for attempt in (1, 2):
        lab.step(model.Started(1, attempt, "h", lab.at))
        lab.step(model.Polled(1, attempt, "succeeded", lab.at))
        lab.step(model.Mismatch(1, attempt, {"a.tif": "digest"}, lab.at))

    assert state(lab) == RunState.HELD


def test_run_whose_every_file_has_a_newer_version_is_superseded():
    """An old version that nobody can send any more ends by itself."""
    lab = closed_run()
    lab.step(model.NotStarted(1, 1, Fault("person", "foreign file"), lab.at))
    assert state(lab) == RunState.HELD
    lab.write("a.tif", 99)
    lab.run_for(31)

    assert state(lab) == RunState.SUPERSEDED
    assert state(lab, 2) == RunState.STARTING


def test_limits_hold_runs_back_by_priority():
    """Runs at once over all rules and per rule; higher priority first."""
    lab = Lab(rule("low", 1), rule("high", 2, priority=5, runs_max=1), auto=False)
    lab.engine.runs.runs_max = 2
    for n in range(3):
        lab.write(f"{n}.tif")
    lab.run_for(31)
    started = [lab.ledger.batches[e.run].rule for e in lab.asked if isinstance(e, model.Start)]

    assert sorted(started) == [1, 2]


def test_run_waits_for_the_rule_it_comes_after():
    """`after`: batches of a chip wait until the quality control of that chip succeeded, over a restart too."""
    qc = rule("qc", 1, match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), only_first=1))
    main = rule(
        "main", 2, match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), files=2), after=After("qc", ("chip",))
    )
    lab = Lab(qc, main, auto=False)
    lab.write("a/1.tif")
    lab.write("a/2.tif")
    lab.run_for(31)
    starts = [e for e in lab.asked if isinstance(e, model.Start)]
    assert [lab.ledger.batches[e.run].rule for e in starts] == [1]
    lab.step(model.Started(starts[0].run, 1, "h", lab.at))
    lab.step(model.Polled(starts[0].run, 1, "succeeded", lab.at))
    lab.crash()
    assert [lab.ledger.batches[e.run].rule for e in lab.asked if isinstance(e, model.Start)] == [1]
    lab.step(model.Proved(starts[0].run, 1, [{"path": "x"}], lab.at))

    assert [lab.ledger.batches[e.run].rule for e in lab.asked if isinstance(e, model.Start)] == [1, 2]


def test_pause_stops_starts_and_survives_a_restart():
    """One switch for everything of ours."""
    lab = Lab(rule(), auto=False)
    lab.order("pause")
    lab.crash()
    lab.write("a.tif")
    lab.run_for(31)
    assert lab.asked == []
    assert "paused" in lab.order("runs.waiting", ids=[1])["runs"]["1"]["waiting_for"]
    lab.order("resume")

    assert len(lab.asked) == 1


def test_cancel_waits_for_the_provider():
    """CANCELLING until the provider confirms; a live handle is watched in every state."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.cancel", ids=[1])
    assert state(lab) == RunState.CANCELLING
    lab.step(model.Polled(1, 1, "cancelled", lab.at))

    assert state(lab) == RunState.CANCELLED


def test_held_run_with_a_live_attempt_is_still_watched():
    """An operator's hold does not lose a transfer that is under way."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.hold", ids=[1])
    assert state(lab) == RunState.HELD
    lab.asked.clear()
    lab.run_for(2)
    assert any(isinstance(e, model.Poll) for e in lab.asked)
    lab.step(model.Polled(1, 1, "succeeded", lab.at))

    assert state(lab) == RunState.SUCCEEDED


def test_every_transition_ends_somewhere():
    """From every state that is no end, an end can be reached."""
    for source in RunState:
        seen, todo = set(), [source]
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            todo += [goal for (s, _), goal in lifecycle.TRANSITIONS.items() if s == at]

        assert seen & lifecycle.ENDS or source in lifecycle.ENDS


def test_ends_are_left_by_no_event():
    """What is final stays."""
    assert not [key for key in lifecycle.TRANSITIONS if key[0] in lifecycle.ENDS]
    assert not lifecycle.allowed(RunState.VERIFIED, Event.CANCEL)


# -------------------------------------------------------------------- rules


def test_faulty_rules_leave_the_last_good_ones_in_force():
    """A set with a fault is refused whole, and status says so."""
    lab = Lab(rule())
    fault = {"file": "a.yaml", "line": 3, "column": 5, "message": "unknown key", "hint": "did you mean match?"}
    lab.step(model.RulesOffered((), {}, None, lab.at, fault))
    lab.write("a.tif")
    lab.run_for(31)

    assert lab.batches() == [("a.tif",)]
    assert lab.engine.snapshot()["rules_fault"] == fault


def test_all_faults_of_the_rules_are_counted():
    """The first is named; that it is not the only one is said."""
    lab = Lab(rule())
    fault = {"file": "a.yaml", "line": 3, "column": 5, "message": "unknown key", "hint": "", "faults": 2}
    lab.step(model.RulesOffered((), {}, None, lab.at, fault))

    assert lab.engine.alarms.open["rules"].what == (
        "the rule files have 2 faults (`rules check` shows all), the last good rules go on; the first: a.yaml:3:5:"
        " unknown key"
    )


def test_an_alarm_follows_its_reason():
    """Other words that came too soon are written once they may be, though they have not changed since."""
    out: list[model.Effect] = []
    alarms = Alarms(out, lambda at: at)
    for at, words in ((0.0, "not there"), (10.0, "not mounted"), (59.0, "not mounted"), (61.0, "not mounted"),
                      (130.0, "not mounted")):  # fmt: skip
        alarms.raised("root:/data", words, "mount it", at)

    assert [(e.what, e.time) for e in out if isinstance(e, model.AlarmRaised)] == [
        ("not there", 0.0), ("not mounted", 61.0),
    ]  # fmt: skip


def test_a_run_that_never_was_is_not_one_that_has_ended():
    """What to do about them differs."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    lab.step(model.Proved(1, 1, [{"path": "a.tif"}], lab.at))
    said = [lab.order("runs.retry", ids=[number])["error"] for number in (1, 2, 0, -3)]

    assert said[0].startswith("run 1 is not open")
    assert said[1:] == ["there is no run 2", "there is no run 0", "there is no run -3"]


def test_removed_rule_keeps_its_open_runs():
    """What was begun is ended."""
    lab = closed_run()
    lab.offer()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    lab.step(model.Proved(1, 1, [{"path": "a.tif"}], lab.at))

    assert state(lab) == RunState.VERIFIED


def test_changed_rule_sends_nothing_again():
    """Claims are by rule, root and path: other patterns or batches start no work again."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.run_for(31)
    lab.offer(rule(match=("{stem}.tif",), batch=Batch(files=1)))
    lab.write("b.tif")
    lab.run_for(31)

    assert lab.batches() == [("a.tif",), ("b.tif",)]


def test_explain_gives_the_stage_and_the_time():
    """Quiet-waiting until when; unmatched and ignored by which pattern."""
    lab = Lab(rule(ignore=("*_test_*",)))
    lab.write("a.tif")

    assert lab.explain("a.tif")[0]["stage"] == "settling"
    assert lab.explain("a.tif")[0]["until_time"] == pytest.approx(1_800_000_000.0 + lab.at + 30)
    assert lab.explain("a.txt")[0]["stage"] == "unmatched"
    assert lab.explain("x_test_1.tif")[0]["stage"] == "ignored"


def test_the_diagram_in_the_documentation_is_the_table():
    """What people read is what the code asks."""
    page = (Path(__file__).parent.parent / "docs" / "reference" / "states.md").read_text()

    assert lifecycle.diagram() in page
    assert all(f"| `{state}` |" in page for state in RunState)
