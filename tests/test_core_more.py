"""More laws of the core: what is left when something goes wrong between two steps. On a passed clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.lab import ROOT, FakeProviders, Lab, rule
from trigger_daemon.core import model
from trigger_daemon.core.model import Fault, RunState, Scope, Verdict
from trigger_daemon.core.rules import After, Batch, CloseOn, Complete, With


def closed_run(**keys) -> Lab:
    lab = Lab(rule(**keys), auto=False)
    lab.write("a.tif")
    lab.run_for(31)
    return lab


def state(lab: Lab, run: int = 1) -> RunState:
    return lab.ledger.states[run]


def starts(lab: Lab) -> list[tuple[int, int]]:
    return [(e.run, e.attempt) for e in lab.asked if isinstance(e, model.Start)]


def succeed(lab: Lab, run: int, attempt: int = 1) -> None:
    lab.step(model.Started(run, attempt, "h", lab.at))
    lab.step(model.Polled(run, attempt, "succeeded", lab.at))
    lab.step(model.Proved(run, attempt, [{"path": "x"}], lab.at))


def lose(lab: Lab, health: model.Health = "lost") -> None:
    lab.away = True
    lab.step(model.RootChanged(ROOT, health, "unmounted", "mount it", "none", lab.at))


def give_back(lab: Lab) -> None:
    lab.away = False
    lab.step(model.RootChanged(ROOT, "returned", "", "", "inotify", lab.at))
    lab.step(model.RootChanged(ROOT, "ok", "", "", "inotify", lab.at))
    lab.sweep()


def companion_rule(*more: With, **spec):
    keys = {k: spec.pop(k) for k in ("checks", "stalled_after_s") if k in spec}
    companions = (With("{stem}.xml", "/data", **spec), *more)
    return rule(match=("{stem}.tif",), complete=Complete(companions=companions, **keys))


# --------------------------------------------------------------------- runs


def proofs(lab: Lab) -> list[tuple[int, int]]:
    return [(e.run, e.attempt) for e in lab.asked if isinstance(e, model.Verify)]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", ["a person", "the proof"])
def test_run_held_at_its_proof_is_only_proved_again(how: str, restart: bool):
    """What was delivered is there: `retry` takes the proof, and what follows it, again, and sends nothing."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    if how == "a person":
        lab.order("runs.hold", ids=[1])
    else:
        lab.step(model.CannotVerify(1, 1, Fault("person", "access denied"), lab.at))
    assert state(lab) == RunState.HELD and not lab.engine.runs.at_work
    if restart:
        lab.crash()
    lab.asked.clear()
    lab.order("runs.retry", ids=[1])
    assert (state(lab), proofs(lab), starts(lab)) == (RunState.SUCCEEDED, [(1, 1)], [])
    lab.step(model.Proved(1, 1, [{"path": "a.tif"}], lab.at))

    assert state(lab) == RunState.VERIFIED


@pytest.mark.parametrize("restart", [False, True])
def test_run_that_differs_is_sent_again(restart: bool):
    """Its proof would differ again."""
    lab = closed_run()
    for attempt in (1, 2):
        lab.step(model.Started(1, attempt, "h", lab.at))
        lab.step(model.Polled(1, attempt, "succeeded", lab.at))
        lab.step(model.Mismatch(1, attempt, {"a.tif": "digest"}, lab.at))
    if restart:
        lab.crash()
    lab.asked.clear()
    lab.order("runs.retry", ids=[1])

    assert (proofs(lab), starts(lab)) == ([], [(1, 3)])


def test_run_held_at_its_proof_is_sent_anew_where_a_person_says_so():
    """`--anew` takes the options of now: what was delivered may not be where it is to be."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    lab.step(model.CannotVerify(1, 1, Fault("person", "access denied"), lab.at))
    lab.asked.clear()
    lab.order("runs.retry", ids=[1], anew=True)

    assert (proofs(lab), starts(lab)) == ([], [(1, 2)])


def test_wish_to_end_is_repeated_until_it_has_ended():
    """It may have been lost on its way, over a restart too; after the end nobody wishes any more."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.cancel", ids=[1])
    lab.step(model.Polled(1, 1, "unreachable", lab.at, why="cancel: 503"))

    def wishes() -> int:
        return len([e for e in lab.asked if isinstance(e, model.Cancel)])

    lab.run_for(20)
    assert wishes() == 2
    lab.crash()
    lab.run_for(20)
    assert wishes() == 4
    lab.run_for(3_600)
    assert 10 <= wishes() <= 20
    lab.step(model.Polled(1, 1, "cancelled", lab.at))
    before = wishes()
    lab.run_for(1_000)

    assert (state(lab), wishes()) == (RunState.CANCELLED, before)


def test_run_held_while_it_is_proved_gives_its_slot_back_and_can_be_retried():
    """A held run stands in nobody's way, and `retry` takes the proof again."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    lab.order("runs.hold", ids=[1])
    assert not lab.engine.runs.at_work
    lab.order("runs.retry", ids=[1])

    assert (lab.engine.runs.at_work, proofs(lab)) == (1, [(1, 1), (1, 1)])


def test_run_that_waited_for_an_abandoned_one_goes_on_when_its_attempt_has_ended():
    """An abandoned run is watched to its end; then the newer version's turn has come."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.write("a.tif", 20)
    lab.run_for(31)
    lab.order("runs.hold", ids=[1])
    lab.order("runs.abandon", ids=[1])
    assert starts(lab) == [(1, 1)]
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault("transient", "no")))

    assert starts(lab) == [(1, 1), (2, 1)]
    assert 1 in lab.ledger.final


def test_versions_of_one_file_run_in_order_although_one_in_between_is_superseded():
    """The third version waits for the first, which is under way, not only for the second, which never began."""
    lab = closed_run()
    for size in (20, 30):
        lab.write("a.tif", size)
        lab.run_for(31)
    assert state(lab, 2) == RunState.SUPERSEDED
    assert starts(lab) == [(1, 1)]
    assert lab.closed[2][1].waits_on == (1,)
    succeed(lab, 1)

    assert starts(lab) == [(1, 1), (3, 1)]


@pytest.mark.parametrize("restart", [False, True])
def test_versions_of_one_file_run_in_order_although_one_in_between_was_cancelled(restart):
    """What an ended run still waited for, the next version waits for, over a restart too."""
    lab = closed_run()
    lab.write("a.tif", 20)
    lab.run_for(31)
    lab.order("runs.cancel", ids=[2])
    lab.crash() if restart else None
    lab.write("a.tif", 30)
    lab.run_for(31)
    assert starts(lab) == [(1, 1)]
    succeed(lab, 1)

    assert starts(lab) == [(1, 1), (3, 1)]
    assert not lab.ledger.kept


def test_run_whose_files_all_have_newer_versions_is_not_tried_again():
    """The attempt that was under way ends badly: there is nothing left that another one could send."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.write("a.tif", 20)
    lab.run_for(31)
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault("person", "it changed")))

    assert state(lab) == RunState.SUPERSEDED
    assert starts(lab) == [(1, 1), (2, 1)]


def test_outdated_held_run_is_superseded_over_a_restart():
    """What the newer version's run waits for is enough to know that the older one is outdated."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.write("a.tif", 20)
    lab.run_for(31)
    lab.crash()
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault("person", "it changed")))

    assert state(lab) == RunState.SUPERSEDED
    assert (2, 1) in starts(lab)


def test_companion_does_not_keep_an_outdated_run_alive():
    """A held run whose movie was rewritten is superseded, its unchanged companion or not."""
    lab = Lab(companion_rule(), auto=False)
    lab.write("a.xml", heard=False)
    lab.write("a.tif")
    lab.run_for(31)
    lab.step(model.NotStarted(1, 1, Fault("person", "foreign file"), lab.at))
    lab.write("a.tif", 99)
    lab.run_for(31)

    assert state(lab) == RunState.SUPERSEDED


def test_hold_of_a_starting_run_holds_over_a_restart():
    """HELD is journaled at once; the attempt is still looked for, and a retry starts no second one."""
    lab = closed_run()
    lab.step(model.StartUnknown(1, 1, "time-out", lab.at))
    lab.order("runs.hold", ids=[1])
    assert state(lab) == RunState.HELD
    lab.crash()
    assert state(lab) == RunState.HELD
    lab.order("runs.retry", ids=[1])
    assert state(lab) == RunState.STARTING
    lab.step(model.Started(1, 1, "h", lab.at))

    assert state(lab) == RunState.ACTIVE
    assert starts(lab) == [(1, 1)]


def test_held_starting_run_that_was_refused_stays_held():
    """The answer about a held attempt frees its slot and nothing else."""
    lab = closed_run()
    lab.order("runs.hold", ids=[1])
    lab.step(model.NotStarted(1, 1, Fault("transient", "busy"), lab.at))
    lab.run_for(1_000)
    assert state(lab) == RunState.HELD
    assert not lab.engine.runs.at_work
    lab.order("runs.retry", ids=[1])

    assert starts(lab) == [(1, 1), (1, 2)]


@pytest.mark.parametrize("verb", ["hold", "cancel"])
def test_order_during_a_prepare_leaves_no_slot_behind(verb):
    """A run that is held or cancelled while it is prepared, and retried before the answer, starts once."""
    lab = Lab(rule(), auto=False, prepares=True)
    lab.write("a.tif")
    lab.run_for(31)
    lab.order(f"runs.{verb}", ids=[1])
    if verb == "hold":
        lab.order("runs.retry", ids=[1])
    lab.step(model.Prepared(1, 1, "p", lab.at))
    lab.run_for(10)

    assert starts(lab) == ([(1, 1)] if verb == "hold" else [])
    assert lab.engine.runs.at_work == (1 if verb == "hold" else 0)


def test_cancel_may_be_said_again():
    """The first wish may have been lost on its way."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.cancel", ids=[1])
    assert lab.order("runs.cancel", ids=[1])["ok"]

    assert len([e for e in lab.asked if isinstance(e, model.Cancel)]) == 2


def test_alarms_of_before_a_restart_are_cleared_when_their_causes_are_gone():
    """An alarm outlives a restart, and not its cause."""
    lab = Lab(rule(), auto=False)
    for name in "ab":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    lab.step(model.NotStarted(1, 1, Fault("transient", "not mounted", scope=Scope.DESTINATION), lab.at))
    lab.step(model.Started(2, 1, "h", lab.at))
    for _ in range(20):
        lab.step(model.Polled(2, 1, "unreachable", lab.at, why="time-out"))
        lab.run_for(100)
    assert {"destination:/out", "unreachable:2"} <= set(lab.engine.alarms.open)
    lab.crash()
    lab.step(model.Polled(2, 1, "succeeded", lab.at))

    assert not [key for key in lab.engine.alarms.open if key.startswith(("destination", "unreachable"))]


def test_alarm_of_a_destination_that_nobody_needs_any_more_ends_over_a_restart():
    """Without a run to it, a destination is nobody's trouble."""
    lab = closed_run()
    lab.step(model.NotStarted(1, 1, Fault("transient", "not mounted", scope=Scope.DESTINATION), lab.at))
    lab.order("runs.cancel", ids=[1])
    lab.crash()
    lab.run_for(5)

    assert not lab.engine.alarms.open


def test_alarm_of_a_held_run_ends_when_the_provider_ends_its_attempt_well():
    """A held run that succeeded is held no more."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.hold", ids=[1])
    assert "held:r" in lab.engine.alarms.open
    lab.step(model.Polled(1, 1, "succeeded", lab.at))

    assert "held:r" not in lab.engine.alarms.open


def test_inactive_run_says_what_it_waits_for():
    """Every waiting thing names what it waits for, and the words end with the cause."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "inactive", lab.at, why="consent has lapsed"))
    assert "consent has lapsed" in lab.order("runs.waiting", ids=[1])["runs"]["1"]["waiting_for"]
    lab.order("runs.hold", ids=[1])
    lab.step(model.Polled(1, 1, "active", lab.at))

    assert "inactive:1" not in lab.engine.alarms.open


def test_long_probe_that_moves_bytes_proves_its_destination():
    """Others need not wait until a transfer of hours has ended."""
    lab = Lab(rule(), auto=False)
    for name in "abc":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    fault = Fault("transient", "not mounted", scope=Scope.DESTINATION)
    for run in (1, 2, 3):
        lab.step(model.NotStarted(run, 1, fault, lab.at))
    lab.run_for(100)
    probe = lab.asked[-1]
    lab.step(model.Started(probe.run, probe.attempt, "h", lab.at))
    assert len(starts(lab)) == 4
    lab.step(model.Polled(probe.run, probe.attempt, "active", lab.at, bytes_done=5))

    assert len(starts(lab)) == 6


@pytest.mark.parametrize("verb", ["hold", "cancel"])
def test_probe_that_is_held_or_cancelled_leaves_the_others_not_behind(verb):
    """Another run probes the destination."""
    lab = Lab(rule(), auto=False)
    for name in "ab":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    fault = Fault("transient", "not mounted", scope=Scope.DESTINATION)
    for run in (1, 2):
        lab.step(model.NotStarted(run, 1, fault, lab.at))
    lab.engine.runs.runs_max = 0  # the probe waits for its turn
    lab.run_for(20)
    probe = lab.engine.runs.down["/out"].probing
    lab.order(f"runs.{verb}", ids=[probe])
    lab.engine.runs.runs_max = 4
    lab.run_for(700)

    assert {run for run, _ in starts(lab)[2:]} == {3 - probe}


def test_an_operators_retry_probes_a_destination_at_once():
    """Who has mended it need not wait; however often it is said, the run waits in one place, and is started once."""
    lab = closed_run()
    lab.step(model.NotStarted(1, 1, Fault("transient", "down", scope=Scope.DESTINATION), lab.at))
    for _ in range(50):
        lab.order("runs.retry", ids=[1])

    assert starts(lab) == [(1, 1), (1, 2)]
    lab.step(model.NotStarted(1, 2, Fault("transient", "down", scope=Scope.DESTINATION), lab.at))
    assert len(lab.engine.runs.down["/out"].parked) == 1


def test_an_operators_retry_sends_no_second_probe():
    """One probe at a time, whoever has asked for it."""
    lab = Lab(rule(), auto=False)
    for name in "ab":
        lab.write(f"{name}.tif")
    lab.run_for(31)
    fault = Fault("transient", "not mounted", scope=Scope.DESTINATION)
    for run in (1, 2):
        lab.step(model.NotStarted(run, 1, fault, lab.at))
    lab.order("runs.retry", ids=[1])
    lab.order("runs.retry", ids=[2])

    assert starts(lab)[2:] == [(1, 2)]
    lab.step(model.Started(1, 2, "h", lab.at))
    lab.step(model.Polled(1, 2, "active", lab.at, bytes_done=5))
    assert starts(lab)[2:] == [(1, 2), (2, 2)]


def test_backoff_is_kept_although_the_run_was_ready_twice():
    """A stale entry in the queue starts nothing before its time."""
    lab = Lab(rule(), auto=False)
    lab.engine.runs.runs_max = 0
    lab.write("a.tif")
    lab.run_for(31)
    lab.order("runs.retry", ids=[1])
    lab.engine.runs.runs_max = 1
    lab.order("resume")
    assert starts(lab) == [(1, 1)]
    lab.step(model.NotStarted(1, 1, Fault("transient", "busy"), lab.at))

    assert starts(lab) == [(1, 1)]


def test_success_of_a_former_use_of_a_group_lets_nothing_of_the_next_one_go():
    """`new_group_after`: a chip used again waits for its own quality control, also if that groups more finely."""
    qc_batch = Batch(group_by=("chip", "run"), only_first=1, new_group_after_s=3_600)
    qc = rule("qc", 1, match=("{chip}/{run}/{n}.tif",), batch=qc_batch)
    main_batch = Batch(group_by=("chip",), idle_s=60)
    main = rule("main", 2, match=("{chip}/{run}/{n}.tif",), batch=main_batch, after=After("qc", ("chip",)))
    lab = Lab(qc, main, auto=False)
    lab.write("a/1/1.tif")
    lab.run_for(100)
    succeed(lab, 1)
    succeed(lab, 2)
    lab.run_for(8_000)
    lab.write("a/1/2.tif")
    lab.run_for(100)

    assert [run for run, _ in starts(lab)] == [1, 2, 3]
    assert lab.ledger.batches[3].rule == 1


def test_template_that_cannot_be_filled_holds_its_run_and_not_the_daemon():
    """A name that is no number is a person's business; the batch is journaled, the loop lives."""
    lab = Lab(rule(match=("run{run}/{n}.tif",), options={"to": "{run|int}"}), auto=False)
    lab.write("runA/1.tif")
    lab.run_for(31)
    assert state(lab) == RunState.HELD
    lab.order("runs.retry", ids=[1])
    assert state(lab) == RunState.HELD
    lab.crash()
    lab.order("runs.retry", ids=[1])

    assert state(lab) == RunState.HELD
    assert starts(lab) == []
    assert "'A'" in lab.ledger.alarms["held:r"].what


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("runs.hold", {"ids": ["x", None, 3.5]}),
        ("runs.waiting", {"ids": ["x"]}),
        ("files.resend", {"files": [{"rule": "r"}, 7]}),
        ("batches.close", {"rule": "r", "captures": [1]}),
        ("files.go", {"path": 7}),
        ("alarms.ack", {"key": []}),
    ],
)
def test_order_without_sense_is_answered(verb, args):
    """Whatever stands in an order, the loop lives and answers."""
    lab = Lab(rule())

    assert lab.order(verb, **args)["ok"] in (True, False)


def test_resend_of_a_file_that_its_rule_no_longer_matches_is_refused():
    """Without captures no request can be made."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), options={"to": "/out/{chip}"}))
    answer = lab.order("files.resend", files=[{"rule": "r", "dir": "", "name": "x.tif", "size": 1, "mtime_ns": 1}])

    assert not answer["ok"]


# ----------------------------------------------------------------- settling


def test_unreadable_member_does_not_keep_its_batch_closing_for_ever():
    """A look without an answer about the file sends it back to settling; the others go."""
    lab = Lab(rule(batch=Batch(idle_s=60)))
    lab.write("a.tif")
    lab.write("b.tif")
    lab.run_for(31)
    lab.unreadable.add((ROOT, "a.tif"))
    lab.run_for(100)
    assert lab.batches() == [("b.tif",)]
    lab.unreadable.clear()
    lab.run_for(200)

    assert lab.batches() == [("b.tif",), ("a.tif",)]


def test_unreadable_suspect_does_not_go_before_it_was_read_again():
    """The timer of the doubt ends with the doubt."""
    lab = Lab(rule(complete=Complete(checks=(("tiff", {}),), suspect_s=300)))
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "tail")
    lab.write("a.tif")
    lab.run_for(100)
    lab.unreadable.add((ROOT, "a.tif"))
    lab.look(ROOT, "", ("a.tif",), "hint")
    lab.run_for(1_000)

    assert lab.batches() == []


def test_file_that_stays_unreadable_raises_an_alarm():
    """Not complete for too long is told, whatever the reason."""
    lab = Lab(rule())
    lab.write("a.tif")
    lab.unreadable.add((ROOT, "a.tif"))
    lab.run_for(2_000)

    assert "stalled:r" in lab.engine.alarms.open
    assert "Permission denied" in lab.explain("a.tif")[0]["because"]


@pytest.mark.parametrize("what", ["suspect", "check", "companion"])
def test_nothing_goes_while_the_root_is_away(what):
    """Doubts that end, checks that answer and companions elsewhere close nothing on a vanished disk."""
    checks = () if what == "companion" else (("tiff", {}),)
    companions = (With("{stem}.xml", "/epu"),) if what == "companion" else ()
    complete = Complete(checks=checks, companions=companions, suspect_s=300)
    lab = Lab(rule(match=("{stem}.tif",), complete=complete), companion_roots={"/epu": 2})
    if what == "check":
        lab.checks_wait = []
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "tail")
    lab.write("a.tif")
    lab.run_for(31)
    lose(lab)
    before = len(lab.effects)
    if what == "check":
        lab.answer_check("a.tif")
        lab.checks_wait = None
    lab.write("a.xml", root=2)
    lab.away = False
    lab.run_for(1_000)
    lab.away = True
    assert lab.batches() == []
    assert not lab.order("files.go", path="/data/a.tif")["ok"]
    assert len([e for e in lab.effects[before:] if isinstance(e, model.Look)]) == 0
    lab.verdicts.clear()
    give_back(lab)
    lab.run_for(100)

    assert len(lab.batches()) == 1
    assert "stalled:r" not in lab.engine.alarms.open


def test_incomplete_file_is_checked_again_although_it_stands_still():
    """What made it incomplete may lie elsewhere: a data file that a master links, a disk that answered EIO."""
    lab = Lab(rule(complete=Complete(checks=(("hdf5", {}),))))
    lab.verdicts["a.tif"] = (Verdict.INCOMPLETE, "it could not be read")
    lab.write("a.tif")
    lab.run_for(100)
    lab.verdicts.clear()
    lab.run_for(100)

    assert lab.batches() == [("a.tif",)]


def test_checks_of_an_incomplete_file_become_rarer():
    """A file that stays incomplete for a day costs a check each five minutes."""
    lab = Lab(rule(complete=Complete(checks=(("hdf5", {}),))))
    lab.verdicts["a.tif"] = (Verdict.INCOMPLETE, "no end")
    lab.write("a.tif")
    lab.run_for(86_400)

    assert len([e for e in lab.effects if isinstance(e, model.Check)]) < 400


def test_needed_file_that_grows_after_the_check_is_looked_at_again():
    """A master stands still while the data files that it names grow."""
    lab = Lab(rule(match=("{s}.tif",), complete=Complete(checks=(("hdf5", {}),))))
    lab.checks_wait = []
    lab.write("d_1.h5", 5, heard=False)
    lab.write("m.tif")
    lab.run_for(31)
    lab.answer_check("m.tif", Verdict.INCOMPLETE, "needs", needs=("d_1.h5",))
    lab.run_for(40)
    lab.answer_check("m.tif", Verdict.INCOMPLETE, "d_1.h5 has 20 of 40 frames", needs=("d_1.h5",))
    lab.run_for(20)
    lab.write("d_1.h5", 9, heard=False)
    lab.run_for(100)
    lab.answer_check("m.tif", needs=("d_1.h5",))

    assert [set(paths) for paths in lab.batches()] == [{"m.tif", "d_1.h5"}]


def test_companion_that_vanishes_during_the_check_is_waited_for():
    """A verdict is void if what it read has changed."""
    lab = Lab(companion_rule(checks=(("tiff", {}),)))
    lab.checks_wait = []
    lab.write("a.xml", heard=False)
    lab.write("a.tif")
    lab.run_for(31)
    lab.remove("a.xml")
    lab.look(ROOT, "", ("a.xml",), "deadline")
    lab.answer_check("a.tif")
    assert lab.batches() == []
    assert "a.xml" in lab.explain("a.tif")[0]["because"]
    lab.checks_wait = None
    lab.write("a.xml", 5, heard=False)
    lab.run_for(100)

    assert [set(paths) for paths in lab.batches()] == [{"a.tif", "a.xml"}]


def test_doubt_about_a_file_does_not_outrun_its_companions_check():
    """The worst verdict of a set is the set's."""
    lab = Lab(companion_rule(With("{stem}.mdoc", "/data", checks=(("mdoc", {}),)), checks=(("tiff", {}),)))
    lab.checks_wait = []
    for name in ("a.xml", "a.mdoc"):
        lab.write(name, heard=False)
    lab.write("a.tif")
    lab.run_for(31)
    lab.answer_check("a.tif", Verdict.SUSPECT, "tail")
    lab.answer_check("a.mdoc", Verdict.INCOMPLETE, "ends within a section")
    lab.checks_wait = []
    lab.run_for(400)

    assert lab.batches() == []


def test_companion_that_changes_while_the_batch_is_open_makes_its_file_wait():
    """Companions are looked at again as well when the batch closes: the manifest names what is there."""
    lab = Lab(
        rule(
            match=("{stem}.tif",), batch=Batch(idle_s=600), complete=Complete(companions=(With("{stem}.xml", "/epu"),))
        ),
        companion_roots={"/epu": 2},
    )
    lab.write("a.xml", 5, root=2)
    lab.write("a.tif")
    lab.run_for(100)
    lab.write("a.xml", 9, root=2)
    lab.run_for(3_000)

    assert [{(m.path, m.size) for m in record.members} for _, record in lab.closed] == [{("a.tif", 10), ("a.xml", 9)}]


def test_companion_on_a_root_that_is_away_does_not_keep_the_batch_closing_for_ever():
    """What cannot be looked at sends its file back to waiting, and the rest goes."""
    lab = Lab(
        rule(
            match=("{stem}.tif",),
            batch=Batch(idle_s=600),
            complete=Complete(companions=(With("{stem}.xml", "/epu", wait_s=1e6),)),
        ),
        companion_roots={"/epu": 2},
    )
    for stem in "ab":
        lab.write(f"{stem}.xml", root=2)
        lab.write(f"{stem}.tif")
    lab.run_for(100)
    lab.unreadable.add((2, "a.xml"))
    lab.run_for(700)
    assert [set(paths) for paths in lab.batches()] == [{"b.tif", "b.xml"}]
    assert "Permission denied" in lab.explain("a.tif")[0]["because"]
    lab.unreadable.clear()
    lab.run_for(1_500)

    assert [set(paths) for paths in lab.batches()] == [{"b.tif", "b.xml"}, {"a.tif", "a.xml"}]


def test_file_whose_companion_is_there_and_never_whole_raises_an_alarm():
    """`missing: go` is for a companion that is missing; one that stays empty is told."""
    lab = Lab(companion_rule(missing="go", wait_s=60.0))
    lab.write("a.tif")
    lab.write("a.xml", 0, heard=False)
    lab.run_for(2_000)

    assert lab.batches() == []
    assert "stalled:r" in lab.engine.alarms.open


def test_shared_companion_is_looked_at_once_for_all():
    """A thousand files that need one gain reference cost no thousand looks at it, and no million steps."""
    complete = Complete(companions=(With("gain.mrc", "/data", shared=True, checks=(("mrc", {}),)),))
    lab = Lab(rule(complete=complete, batch=Batch(idle_s=60)))
    lab.write("gain.mrc", heard=False)
    for n in range(1_000):
        lab.write(f"d/{n}.tif", heard=False)
    lab.sweep()
    lab.run_for(120)

    assert len(lab.closed[0][1].members) == 1_001
    assert len([e for e in lab.effects if isinstance(e, model.Look) and "gain.mrc" in e.names]) < 20
    assert len([e for e in lab.effects if isinstance(e, model.Check)]) < 5


def test_blocked_file_that_was_removed_is_blocked_no_more():
    """An alarm ends with its cause: the next full sweep is followed by a look at what is blocked."""
    lab = Lab(rule(on_rewrite="block"))
    lab.write("a.tif", 10)
    lab.run_for(31)
    lab.write("a.tif", 20)
    lab.run_for(31)
    assert "blocked:r" in lab.engine.alarms.open
    lab.remove("a.tif")
    lab.sweep()
    lab.run_for(2)

    assert "blocked:r" not in lab.engine.alarms.open


@pytest.mark.parametrize("what", ["skip", "rewrite"])
def test_file_that_goes_another_way_is_blocked_no_more(what):
    """Skipped or changed, it leaves the list and the alarm at once."""
    complete = Complete(checks=(("tiff", {}),), suspect_s=None)
    lab = Lab(rule(complete=complete))
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "tail")
    lab.write("a.tif", 10)
    lab.run_for(32)
    assert "blocked:r" in lab.engine.alarms.open
    lab.order("files.skip", path="/data/a.tif") if what == "skip" else lab.write("a.tif", 20)
    lab.run_for(2)

    assert "blocked:r" not in lab.engine.alarms.open


def test_file_that_an_operator_let_go_is_blocked_no_more_while_its_batch_is_open():
    """The alarm and the list say what is."""
    lab = Lab(rule(on_rewrite="block", batch=Batch(files=2)))
    for name in ("a.tif", "b.tif"):
        lab.write(name)
    lab.run_for(31)
    lab.write("a.tif", 20)
    lab.run_for(31)
    lab.order("files.go", path="/data/a.tif")

    assert "blocked:r" not in lab.engine.alarms.open
    assert lab.engine.snapshot()["rules"][0]["blocked"] == 0


def test_skip_of_a_file_whose_state_is_not_known_is_refused():
    """No claim is made of a version that nobody has seen."""
    lab = Lab(rule())
    lab.write("a.tif")
    lose(lab)

    assert not lab.order("files.skip", path="/data/a.tif")["ok"]


# ------------------------------------------------------------------- batches


def test_only_first_closes_once_although_more_complete_while_it_closes():
    """One batch a group, of the first to be complete, while its members are looked at once more."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), only_first=2)))
    lab.write("a/0.tif")
    lab.run_for(10)
    for n in (1, 2, 3):
        lab.write(f"a/{n}.tif", heard=False)
    lab.sweep()
    lab.run_for(100)

    assert lab.batches() == [("a/0.tif", "a/1.tif")]


def test_only_first_is_filled_by_the_next_if_one_has_changed():
    """A file that changed before the batch closed is not among the first to be complete."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), only_first=2)))
    lab.write("a/0.tif")
    lab.run_for(35)
    lab.write("a/0.tif", 99, heard=False)
    for n in (1, 2, 3):
        lab.write(f"a/{n}.tif", heard=False)
    lab.sweep()
    lab.run_for(29)
    lab.write("a/0.tif", 98, heard=False)
    lab.run_for(200)

    assert lab.batches() == [("a/1.tif", "a/2.tif")]


@pytest.mark.parametrize("restart", [False, True])
def test_files_left_out_by_only_first_begin_no_new_group_and_keep_none_alive(restart):
    """`new_group_after` counts what is new in the group, not what a sweep finds again."""
    batch = Batch(group_by=("chip",), only_first=1, new_group_after_s=3_600)
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=batch))
    for n in (1, 2):
        lab.write(f"a/{n}.tif")
    lab.run_for(40)
    for _ in range(8):
        lab.sweep()
        lab.run_for(900)
        lab.crash() if restart else None
    assert lab.batches() == [("a/1.tif",)]
    lab.write("a/3.tif")
    lab.run_for(40)

    assert lab.batches() == [("a/1.tif",), ("a/3.tif",)]


def test_idle_time_of_a_group_outlives_a_restart():
    """Files that are left out keep their group in use; a restart does not make it look idle."""
    batch = Batch(group_by=("chip",), only_first=1, new_group_after_s=3_600)
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=batch))
    for n in range(6):
        lab.write(f"a/{n}.tif")
        lab.run_for(1_800)
    lab.crash()
    lab.write("a/7.tif")
    lab.run_for(40)

    assert lab.batches() == [("a/0.tif",)]


def test_groups_that_are_gone_leave_no_memory():
    """A rule with a million groups over the years remembers the open ones."""
    lab = Lab(rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), files=1)))
    for n in range(50):
        lab.write(f"c{n}/1.tif")
    lab.run_for(60)
    assembly = lab.engine.assemblies[1]

    assert len(lab.batches()) == 50
    assert not assembly._last_seen
    assert not assembly.settling.dirs


def marker_rule(**keys):
    close_on = CloseOn("{chip}/done", quiescence_s=5.0, **keys)
    return rule(match=("{chip}/{n}.tif",), batch=Batch(group_by=("chip",), close_on=close_on))


def test_included_marker_travels_and_keeps_nothing_waiting():
    """`include`: the marker is in the manifest, also when the group had to settle first."""
    lab = Lab(marker_rule(include=True))
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.write("a/2.tif", heard=False)
    lab.write("a/done")
    lab.run_for(100)

    assert [set(paths) for paths in lab.batches()] == [{"a/1.tif", "a/2.tif", "a/done"}]


def test_marker_has_acted_only_when_its_groups_are_closed():
    """A crash between the marker's turn and the closing lets the marker act again."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.looks_wait = None
    lab.write("a/done")
    lab.run_for(4.9)
    lab.look(ROOT, "a", ("done",), "deadline")
    lab.looks_wait = []
    lab.run_for(0.2)
    for look in lab.looks_wait[:]:
        if "done" in look.names:
            lab.looks_wait.remove(look)
            lab.look(look.root, look.dir, look.names, "deadline")
    assert lab.looks_wait
    assert lab.batches() == []
    lab.looks_wait = None
    lab.crash()
    lab.run_for(100)

    assert lab.batches() == [("a/1.tif",)]


def test_explain_knows_a_marker_and_what_it_waits_for():
    """It is no stray file: its rule says that it closes batches, what becomes of it, and which one a file waits for."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.run_for(40)
    absent = lab.explain("a/done")[0]["because"]
    waits = lab.explain("a/1.tif")[0]["because"]
    lab.write("a/done")
    settling = lab.explain("a/done")[0]["because"]
    lab.sweeps_wait = True
    lab.run_for(6)
    closing = lab.explain("a/done")[0]["because"]
    stray = lab.explain("a/dones")[0]["because"]

    assert absent == "a marker of this rule (close_on): it closes the batches that it belongs to"
    assert waits == "in an open batch of 1 file; closed once a/done is complete"
    assert settling == absent + "; seen unchanged for less than 5 s"
    assert closing == absent + "; closes its groups after a sweep"
    assert "does not fit" in stray


def test_rewritten_marker_acts_for_each_version():
    """What came between two versions of a marker is closed by the second."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.sweeps_wait = True
    lab.write("a/done", 1)
    lab.run_for(6)
    lab.write("a/done", 2)
    lab.sweeps_wait = False
    lab.sweep()
    lab.write("a/2.tif")
    lab.run_for(3)
    lab.write("a/done", 3)
    lab.run_for(100)

    assert lab.batches() == [("a/1.tif",), ("a/2.tif",)]


def test_rule_that_changes_while_a_marker_waits_loses_no_closing():
    """The marker acts for the rule as it is now."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.write("a/2.tif", heard=False)
    lab.write("a/done")
    lab.run_for(10)
    changed = rule(match=("{chip}/{m}.tif",), batch=marker_rule().batch)
    lab.offer(changed)
    lab.run_for(200)

    assert [set(paths) for paths in lab.batches()] == [{"a/1.tif", "a/2.tif"}]


def test_marker_is_not_lost_by_a_sweep_that_failed():
    """A sweep that failed part-way proves nothing and is asked for again."""
    lab = Lab(marker_rule())
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.sweeps_fail = True
    lab.write("a/done")
    lab.run_for(20)
    assert lab.batches() == []
    lab.sweeps_fail = False
    lab.run_for(600)

    assert lab.batches() == [("a/1.tif",)]


def test_failed_sweeps_are_asked_for_again_at_a_bounded_rate():
    """A root that cannot be read whole is not swept without end."""
    lab = Lab(rule(existing="ignore"))
    lab.sweeps_fail = True
    lab.crash()
    before = len([e for e in lab.effects if isinstance(e, model.Sweep)])
    lab.ledger.baselines.clear()
    lab.crash()
    lab.run_for(3_600)

    assert 2 <= len([e for e in lab.effects if isinstance(e, model.Sweep)]) - before < 200


def test_existing_marker_closes_nothing():
    """`existing: ignore` is for markers too."""
    lab = Lab()
    lab.write("a/done", heard=False)
    keys = marker_rule()
    lab.sweeps_wait = True
    lab.offer(rule(match=keys.match, batch=keys.batch, existing="ignore"))
    lab.write("a/1.tif")
    lab.sweeps_wait = False
    lab.sweep()
    lab.run_for(200)

    assert lab.batches() == []


def test_versions_of_an_included_marker_run_in_order():
    """A marker that is written again is a newer version of one file, whatever else its batch holds."""
    lab = Lab(marker_rule(include=True), auto=False)
    for n in (1, 2):
        lab.write(f"a/{n}.tif")
        lab.write("a/done", n)
        lab.run_for(100)

    assert [set(paths) for paths in lab.batches()] == [{"a/1.tif", "a/done"}, {"a/2.tif", "a/done"}]
    assert starts(lab) == [(1, 1)]
    assert lab.closed[1][1].waits_on == (1,)


# -------------------------------------------------------------- times of day


def test_time_of_day_is_made_up_for_if_the_daemon_stops_before_it_closed():
    """The closing counts when it is done, not when it is due."""
    lab = Lab(rule(batch=Batch(at=("12:00",))))
    lab.run_for(3_600)
    lab.write("a.tif")
    lab.run_for(60)
    lab.sweeps_wait = True
    lab.run_for(24 * 3_600)
    assert lab.batches() == []
    lab.sweeps_wait = False
    lab.crash()
    lab.run_for(120)

    assert lab.batches() == [("a.tif",)]


def test_time_of_day_is_not_lost_by_a_clock_that_ran_years_ahead():
    """A wall clock that is set back closes again at the next named time."""
    lab = Lab(rule(batch=Batch(at=("12:00",))))
    lab.utc += 5 * 365 * 86_400.0
    lab.run_for(2 * 86_400)
    lab.utc -= 5 * 365 * 86_400.0
    lab.write("a.tif")
    lab.run_for(2 * 86_400)

    assert lab.batches() == [("a.tif",)]


def test_time_of_day_is_that_of_a_clock_that_was_set():
    """A machine that slept, or whose clock was put right, is not an hour late."""
    lab = Lab(rule(batch=Batch(at=("12:00",))))
    lab.write("a.tif")
    lab.run_for(60)
    lab.utc += 24 * 3_600.0
    lab.run_for(20)

    assert lab.batches() == [("a.tif",)]


def test_time_of_day_closes_once_although_the_clock_is_set_back_a_little():
    """Once a day."""
    lab = Lab(rule(batch=Batch(at=("12:00",))))
    lab.write("a.tif")
    while not lab.closed:
        lab.run_for(600)
    lab.write("b.tif")
    lab.utc -= 900.0
    lab.run_for(3_600)

    assert lab.batches() == [("a.tif",)]


# ----------------------------------------------------------- rules and roots


def test_edit_that_changes_no_pattern_lets_quiet_periods_run_on():
    """A comment or a retry in a rule file makes no file wait again; runs are made with the rule as it is now."""
    lab = Lab(rule(batch=Batch(files=2)))
    lab.write("a.tif")
    lab.run_for(31)
    lab.write("b.tif")
    lab.run_for(20)
    lab.offer(rule(batch=Batch(files=2), line=7, options={"to": "/other"}, description="x"))
    lab.run_for(11)

    assert lab.batches() == [("a.tif", "b.tif")]
    assert lab.closed[0][1].destination == "/other"


def test_look_from_before_a_claim_is_not_trusted_after_a_change_of_rules():
    """The memory of what was just claimed went with the old rule; claims read before it are too old to trust."""
    trusting = Complete(trust=frozenset({"close"}))
    lab = Lab(rule(complete=trusting))
    lab.write("a.tif")
    assert lab.batches() == [("a.tif",)]
    lab.offer(rule(complete=trusting, match=("{s}.tif",)))
    seen = lab.disk[(ROOT, "a.tif")]
    lab.step(model.Seen(ROOT, "", [("a.tif", seen, ((1, 0),))], lab.at, lab.at, "hint", "close", 0))
    lab.run_for(100)

    assert lab.batches() == [("a.tif",)]


def test_alarm_of_a_root_ends_when_no_rule_uses_it():
    """What nobody watches is nobody's trouble."""
    other = rule("s", 2, watch="/other")
    lab = Lab(rule(), other, companion_roots={"/other": 2})
    lab.step(model.RootChanged(2, "lost", "gone", "", "none", lab.at))
    assert "root:/other" in lab.engine.alarms.open
    lab.offer(rule())
    lab.step(model.RootChanged(2, "lost", "closed", "", "none", lab.at))

    assert "root:/other" not in lab.engine.alarms.open
    assert [root["path"] for root in lab.engine.snapshot()["roots"]] == []


def test_root_that_is_used_again_lets_its_files_go_from_memory():
    """A mark that the closed root never answered is asked for anew."""
    lab = Lab(rule())
    lab.marks_lost = True
    lab.write("a.tif")
    lab.run_for(35)
    lab.offer()
    lab.run_for(5)
    lab.marks_lost = False
    lab.offer(rule())
    lab.write("b.tif")
    lab.run_for(60)

    assert lab.engine._batched == {}
    assert not lab.engine.assemblies[1].settling.count


def test_answer_of_rules_apply_outlives_a_crash_before_the_baseline():
    """`new`: what is there stays left out, however often the daemon starts before the first whole sweep."""
    lab = Lab(rule(), companion_roots={"/moved": 2})
    lab.write("a.tif")
    lab.run_for(31)
    moved = rule(watch="/moved")
    lab.offer(moved)
    assert lab.engine.undecided
    lab.sweeps_wait = True
    lab.offer(moved, applied="new")
    lab.crash()
    lab.step(model.Seen(2, "", [("old.tif", (1, 2, 3, 4), ((1, 0),))], lab.at, lab.at, "sweep", "none", 1))
    lab.run_for(100)

    assert lab.ledger.claims[(1, "old.tif")] == {(1, 2): model.CLAIM_BASELINE}
    assert len(lab.batches()) == 1


def test_baseline_of_a_rule_that_was_removed_is_not_taken_by_a_sweep_without_it():
    """Put back, the rule finds what was there as existing."""
    lab = Lab()
    lab.write("old.tif", heard=False)
    lab.sweeps_wait = True
    lab.offer(rule(existing="ignore"))
    lab.offer()
    lab.sweeps_wait = False
    lab.sweep()
    lab.offer(rule(existing="ignore"))
    lab.run_for(100)

    assert lab.batches() == []


def test_status_of_many_rules_costs_what_each_costs():
    """The heartbeat goes through all rules every other second: ten times as many take some ten times as long."""
    import time

    def least_s(count: int) -> float:
        lab = Lab(*(rule(f"r{n}", n, match=(f"{n}/*.tif",)) for n in range(1, count + 1)))
        for n in range(1, count + 1):
            for s in ("PENDING", "VERIFIED", "HELD"):
                lab.engine.runs.tally[(n, s)] = [1, 1, 1]
        took = []
        for _ in range(5):
            begun = time.process_time()
            lab.engine.snapshot()
            took.append(time.process_time() - begun)
        return min(took)

    assert least_s(1_000) < 30 * least_s(100)


# ---------------------------------------------------------- late companions


def test_late_companion_travels_in_a_batch_of_its_own():
    """`missing: go`: the file goes without it; when it comes it goes alone, once, and says whose it is."""
    lab = Lab(companion_rule(missing="go", wait_s=60.0))
    lab.write("a.tif")
    lab.run_for(200)
    assert lab.batches() == [("a.tif",)]
    (about,) = lab.explain("a.xml")
    assert about["because"] == "a companion of a.tif, which went without it: not there yet; looked for each minute"
    lab.write("a.xml", heard=False)
    lab.run_for(29)  # less than its quiet period
    assert lab.batches() == [("a.tif",)]
    lab.run_for(61)  # found within a minute, and looked at again as soon as it can be quiet

    assert lab.batches() == [("a.tif",), ("a.xml",)]
    assert lab.closed[1][1].members[0].role == "companion"
    assert lab.closed[1][1].reason == "late companion of a.tif, which batch 1 took"
    assert state(lab, 2) == RunState.VERIFIED
    assert not lab.engine.assemblies[1].settling.awaited


def test_late_companion_is_checked_and_goes_to_the_group_of_its_file():
    """Late or not, it must be whole, and its request is rendered as that of its file was."""
    companion = With("{chip}/{n}.xml", "/epu", checks=(("xml", {}),), wait_s=60.0, missing="go")
    keys = {"match": ("{chip}/{n}.tif",), "batch": Batch(group_by=("chip",), files=1), "options": {"to": "/out/{chip}"}}
    lab = Lab(rule(complete=Complete(companions=(companion,)), **keys), companion_roots={"/epu": 2})
    lab.write("a/1.tif")
    lab.run_for(200)
    lab.verdicts["a/1.xml"] = (Verdict.INCOMPLETE, "no end tag")
    lab.write("a/1.xml", root=2)
    lab.run_for(1_000)
    assert len(lab.batches()) == 1
    lab.verdicts.clear()
    lab.run_for(200)

    late = lab.closed[1][1]
    assert (late.members[0].root, late.group, late.request["options"]) == (2, {"chip": "a"}, {"to": "/out/a"})


def test_companions_that_never_come_are_bounded(monkeypatch):
    """What is waited for without a file to hold is limited, and looked for in one look a directory."""
    monkeypatch.setattr("trigger_daemon.core.settle.LATE_MAX", 50)
    lab = Lab(companion_rule(missing="go", wait_s=60.0))
    for n in range(200):
        lab.write(f"{n}.tif")
    lab.run_for(300)
    looks = len(lab.effects)
    lab.run_for(600)
    settling = lab.engine.assemblies[1].settling

    assert len(lab.batches()) == 200
    assert len(settling.late) == 50
    assert sum(len(names) for names in settling.awaited.values()) == 50
    assert len([e for e in lab.effects[looks:] if isinstance(e, model.Look)]) <= 11


def test_rule_that_is_removed_lets_go_of_everything():
    """No timer and no look is left of a rule that is gone."""
    lab = Lab(companion_rule(missing="go", wait_s=60.0))
    lab.write("a.tif")
    lab.run_for(200)
    lab.write("b.tif")
    lab.offer()
    lab.run_for(1)
    before = len(lab.effects)
    lab.run_for(1_000)

    assert not [e for e in lab.effects[before:] if isinstance(e, model.Look)]
    assert not lab.engine.timers._live


@pytest.mark.parametrize("value", [".", ".."])
def test_capture_that_is_no_name_of_its_own_holds_the_run(value):
    """`to: /out/{y}` with y = `..` would write outside the destination: a person is asked, nothing starts."""
    lab = Lab(rule(match=("{s}/p{y}.dat",), options={"to": "/out/{y}"}), auto=False)
    lab.write(f"s/p{value}.dat")
    lab.run_for(31)

    assert [type(e) for e in lab.asked] == []
    assert lab.ledger.states[1] == RunState.HELD


def test_file_that_a_run_found_changed_is_looked_at_without_an_event():
    """A change nobody told of (a truncation, a writer that keeps it open) does not wait for the next full sweep."""
    lab = Lab(rule(), auto=False)
    lab.write("d/a.tif", 10)
    lab.run_for(31)
    lab.write("d/a.tif", 3, heard=False)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at, changed=("d/a.tif",)))
    lab.step(model.Proved(1, 1, [], lab.at, changed=("d/a.tif",)))
    lab.run_for(40)

    assert lab.ledger.states[1] == RunState.SUPERSEDED
    assert lab.batches() == [("d/a.tif",), ("d/a.tif",)]


# --------------------------------------------------- what the simulation of histories found


def test_a_prepare_that_hung_says_nothing_of_an_attempt_made_since():
    """Its call is given up, another one prepares and starts; then the first ends, with an error or an answer."""
    refused = model.NotStarted(1, 1, Fault("transient", "at last"), 0.0, preparing=True)
    for late in (refused, model.Prepared(1, 1, "p1", 0.0)):
        lab = Lab(rule(), auto=False, prepares=True)
        lab.write("a/1.tif")
        lab.run_for(156)
        lab.step(model.NotStarted(1, 1, Fault("transient", "given up"), lab.at, preparing=True))
        lab.run_for(6)
        lab.step(model.Prepared(1, 1, "p2", lab.at))
        lab.step(replace(late, at=lab.at))
        lab.run_for(60)

        starts = [effect for effect in lab.asked if isinstance(effect, model.Start)]
        assert [(start.run, start.attempt, start.prepared) for start in starts] == [(1, 1, "p2")]
        assert sum(isinstance(effect, model.Prepare) for effect in lab.asked) == 2


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_a_file_taken_away_and_put_back_while_its_run_works_is_sent(files, restart):
    """The run leaves it out, as it is gone; when it stands again, as it was, it is a file that was not sent."""
    lab = Lab(rule(batch=Batch(files=files, idle_s=60)), auto=False)
    for number in range(files):
        lab.write(f"a/{number}.tif")
    lab.run_for(100)
    state = lab.disk.pop((1, "a/0.tif"))
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at, changed=("a/0.tif",)))
    members = [{"path": f"a/{number}.tif"} for number in range(1, files)]
    lab.step(model.Proved(1, 1, members, lab.at, ("a/0.tif",)))
    assert lab.ledger.states[1] == (RunState.VERIFIED if files > 1 else RunState.SUPERSEDED)
    if restart:
        lab.crash()
    lab.run_for(100)
    lab.disk[(1, "a/0.tif")] = state
    lab.sweep()
    lab.run_for(200)

    assert lab.batches()[1:] == [("a/0.tif",)]


def test_what_comes_after_a_version_that_was_left_out_is_no_rewrite():
    """`on_rewrite: ignore`: the first was never sent, so what was ignored for its sake is sent."""
    lab = Lab(rule(on_rewrite="ignore"), auto=False)
    lab.write("a/0.tif")
    lab.run_for(100)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.write("a/0.tif", 77)
    lab.run_for(100)
    lab.step(model.Polled(1, 1, "succeeded", lab.at, changed=("a/0.tif",)))
    lab.step(model.Proved(1, 1, [], lab.at, ("a/0.tif",)))
    lab.run_for(200)
    lab.sweep()
    lab.run_for(200)

    assert lab.batches() == [("a/0.tif",), ("a/0.tif",)]
    assert lab.closed[1][1].members[0].size == 77


def test_a_run_that_stands_still_leaves_its_place_to_others():
    """A hung destination with work in every place must not stop the rules that have nothing to do with it."""
    lab = Lab(rule(), auto=False)
    lab.engine.runs.runs_max = 1
    lab.write("a/1.tif")
    lab.write("a/2.tif")
    lab.run_for(40)
    assert [e.run for e in lab.asked if isinstance(e, model.Start)] == [1]
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "inactive", lab.at, why="the copying worker hangs"))
    lab.run_for(5)
    assert [e.run for e in lab.asked if isinstance(e, model.Start)] == [1, 2]
    lab.step(model.Polled(1, 1, "active", lab.at))

    assert lab.engine.runs.at_work == 2, "it was at work already: one more than allowed is no less true"


def test_a_place_at_a_provider_is_taken_as_long_as_its_attempt_lives(monkeypatch):
    """What stands still fills the provider's own few all the same: one more would wait in its queue, not in ours."""
    monkeypatch.setattr(FakeProviders, "at_once", lambda self, action: 1)
    lab = Lab(rule(), auto=False)
    lab.write("a/1.tif")
    lab.write("a/2.tif")
    lab.run_for(40)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "inactive", lab.at, why="the collection is paused"))
    lab.run_for(5)
    assert [e.run for e in lab.asked if isinstance(e, model.Start)] == [1]
    runs = lab.engine.runs
    assert "as many as are served at once, 1; of these stand still: 1" in runs.waiting_for(runs.open[2])
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=Fault("person", "cancelled")))
    lab.run_for(1)

    assert [e.run for e in lab.asked if isinstance(e, model.Start)] == [1, 2]


def test_proofs_that_wait_keep_no_place_and_come_few_at_once():
    """An index that is down stops no rule: the work of these runs is done, and they are asked about by and by."""
    lab = Lab(rule(runs_max=1), auto=False)
    lab.engine.runs.runs_max = 1
    down = Fault("transient", "the index is down", counts=False, retry_after_s=1_000.0)
    for number in range(1, 6):
        lab.write(f"a/{number}.tif")
        lab.run_for(40)
        lab.step(model.Started(number, 1, "h", lab.at))
        lab.step(model.Polled(number, 1, "succeeded", lab.at))
        lab.step(model.CannotVerify(number, 1, down, lab.at))
    assert lab.engine.runs.at_work == 0

    lab.run_for(1_100)
    asked = [e.run for e in lab.asked if isinstance(e, model.Verify)]
    assert asked == [1, 2, 3, 4, 5, 1, 2], "two are under way, the others wait for these"
    lab.step(model.Proved(1, 1, [], lab.at))
    lab.step(model.CannotVerify(2, 1, down, lab.at))
    asked = [e.run for e in lab.asked if isinstance(e, model.Verify)]
    assert asked[7:] == [3, 4]
    for number in (3, 4, 5):
        lab.step(model.Proved(number, 1, [], lab.at))
    lab.run_for(1_100)
    lab.step(model.Proved(2, 1, [], lab.at))
    assert [run.id for run in lab.engine.runs.open.values()] == []


def test_a_run_that_stood_still_counts_again_whatever_a_person_did_meanwhile():
    """Held and retried while it stood still, it is at work as soon as its provider says so."""
    lab = Lab(rule(), auto=False)
    lab.engine.runs.runs_max = 1
    lab.write("a/1.tif")
    lab.run_for(40)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "inactive", lab.at, why="hangs"))
    lab.order("runs.hold", ids=[1])
    lab.order("runs.retry", ids=[1])
    lab.step(model.Polled(1, 1, "active", lab.at))
    lab.write("a/2.tif")
    lab.run_for(60)

    assert lab.engine.runs.at_work == 1
    assert [e.run for e in lab.asked if isinstance(e, model.Start)] == [1]


def test_what_a_failed_attempt_put_out_is_kept():
    """Its log tells a person what to mend."""
    lab = closed_run()
    lab.step(model.Started(1, 1, "h", lab.at))
    fault = Fault("person", "too few hits")
    lab.step(model.Polled(1, 1, "failed", lab.at, fault=fault, output={"failed_state": "Decide"}))

    held = [effect for effect in lab.effects if isinstance(effect, model.RunMoved)][-1]
    assert (held.to_state, held.output) == (RunState.HELD, {"failed_state": "Decide"})


# ------------------------------------------------------------------- begun anew


def test_a_held_run_begins_anew_with_what_its_rule_says_now():
    """A mended rule reaches the runs that it was mended for; by day and batch they stay what they were."""
    lab = closed_run(options={"to": "/out/{date}/{batch}"})
    before = lab.engine.runs.open[1].request["options"]["to"]
    lab.step(model.NotStarted(1, 1, Fault("person", "wrong place"), lab.at))
    lab.offer(rule(options={"to": "/archive/{date}/{batch}"}))
    lab.order("runs.retry", ids=[1])
    lab.step(model.NotStarted(1, 2, Fault("person", "wrong place"), lab.at))
    assert lab.engine.runs.open[1].request["options"]["to"] == before
    lab.run_for(2 * 86_400)
    lab.order("runs.retry", ids=[1], anew=True)

    assert lab.engine.runs.open[1].request["options"]["to"] == before.replace("/out", "/archive")
    assert (starts(lab)[-1], lab.engine.runs.open[1].destination) == ((1, 3), "/archive/{date}/{batch}")


def test_only_a_held_run_of_which_nothing_is_under_way_begins_anew():
    """What the provider may be working at is not changed under its hands."""
    lab = closed_run()
    assert not lab.order("runs.retry", ids=[1], anew=True)["ok"]
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.order("runs.hold", ids=[1])

    assert "under way" in lab.order("runs.retry", ids=[1], anew=True)["error"]


@pytest.mark.parametrize("verbs", [["cancel"], ["hold"], ["hold", "abandon"]])
def test_what_nobody_wants_any_more_is_looked_for_and_never_begun(verbs):
    """The answer to its start was lost, and then a person decided: it is found and ended, or it was not started."""
    lab = closed_run()
    lab.step(model.StartUnknown(1, 1, "no answer", lab.at))
    for verb in verbs:
        lab.order(f"runs.{verb}", ids=[1])
    lab.run_for(60)
    assert [effect.start for effect in lab.asked if isinstance(effect, model.Find)] == [False]
    lab.step(model.NotStarted(1, 1, Fault("transient", "it was not started"), lab.at))

    assert state(lab) == {"cancel": RunState.CANCELLED, "hold": RunState.HELD, "abandon": RunState.ABANDONED}[verbs[-1]]
    assert starts(lab) == [(1, 1)]


# ------------------------------------------------- names and numbers that an action does not take


def test_name_that_the_action_never_takes_is_blocked_alone():
    """Before a batch holds it: the others go, and once it is renamed it goes too."""
    names = {"match": ("**/*", "*"), "batch": Batch(idle_s=5)}
    lab = Lab(rule(**names))
    lab.write("a.tif")
    lab.write("b.untaken")
    lab.run_for(60)
    assert [[m.name for m in one.members] for _, one in lab.closed] == [["a.tif"]]
    assert lab.explain("b.untaken")[0]["stage"] == "blocked"
    assert "takes no such name" in lab.explain("b.untaken")[0]["because"]
    lab.remove("b.untaken")
    lab.write("b.tif")
    lab.run_for(60)

    assert [[m.name for m in one.members] for _, one in lab.closed] == [["a.tif"], ["b.tif"]]


def test_file_whose_companion_is_never_taken_is_blocked_with_it():
    """They go together or not at all."""
    companions = (With("{stem}.untaken", "/data"),)
    lab = Lab(rule(match=("{stem}.tif",), complete=Complete(companions=companions)))
    lab.write("a.tif")
    lab.write("a.untaken")
    lab.run_for(60)

    assert lab.closed == []
    assert "its companion a.untaken" in lab.explain("a.tif")[0]["because"]


@pytest.mark.parametrize(("shared", "sizes"), [(False, [4, 4, 4]), (True, [4, 4, 2])])
def test_companions_count_in_what_a_batch_may_hold(shared: bool, sizes: list[int]):
    """A batch goes in parts of at most `files_max`, companions and all; one that several share counts once."""
    companions = (With("gain.xml" if shared else "{stem}.xml", "/data", shared=shared),)
    lab = Lab(rule(match=("{stem}.tif",), complete=Complete(companions=companions), batch=Batch(idle_s=5, files_max=4)))
    for n in range(7 if shared else 6):
        lab.write(f"{n}.tif")
        lab.write(f"{n}.xml")
    lab.write("gain.xml")
    lab.run_for(120)

    assert [len(one.members) for _, one in lab.closed] == sizes
