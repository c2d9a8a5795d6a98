"""Laws of `after`: a gate fails closed. What waits waits for the same thing, whatever becomes of rules and daemons."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Lab, rule
from tests.site import Site
from trigger_daemon.core import model
from trigger_daemon.core.model import Fault, Member, RunState
from trigger_daemon.core.rules import After, Batch, Rule
from trigger_daemon.core.saved import Saved
from trigger_daemon.journal import Journal
from trigger_daemon.salvage import salvage

BY_CHIP = ("{chip}/{n}.tif",)


def leader(name: str = "qc", number: int = 1, **keys: Any) -> Rule:
    keys.setdefault("batch", Batch(group_by=("chip",), only_first=1))
    return rule(name, number, match=BY_CHIP, **keys)


def follower(**keys: Any) -> Rule:
    keys.setdefault("after", After("qc", ("chip",)))
    return rule("main", 2, match=BY_CHIP, batch=Batch(group_by=("chip",), files=1), **keys)


QC, MAIN = leader(), follower()


def write(lab: Lab, path: str) -> None:
    """Write a file and let it become quiet; of rules in force each makes its batch."""
    lab.write(path)
    lab.run_for(31)


def started(lab: Lab, number: int) -> list[int]:
    """Return the runs of a rule that the provider was asked to start."""
    return [e.run for e in lab.asked if isinstance(e, model.Start) and lab.ledger.batches[e.run].rule == number]


def run_of(lab: Lab, number: int) -> int:
    """Return the newest run of a rule."""
    return max(n for n, batch in lab.ledger.batches.items() if batch.rule == number)


def succeed(lab: Lab, run: int) -> None:
    lab.step(model.Started(run, 1, "h", lab.at))
    lab.step(model.Polled(run, 1, "succeeded", lab.at))
    lab.step(model.Proved(run, 1, [{"path": "x"}], lab.at))


def waits(lab: Lab, run: int) -> str:
    return str(lab.order("runs.waiting", ids=[run])["runs"][str(run)]["waiting_for"])


def hint(lab: Lab, run: int) -> str:
    return str(lab.order("runs.waiting", ids=[run])["runs"][str(run)]["hint"])


def gated() -> Lab:
    """Return a lab with a run of `qc` at work, and one of `main` that waits for it."""
    lab = Lab(QC, MAIN, auto=False)
    write(lab, "a/1.tif")
    assert (started(lab, 1), started(lab, 2)) == ([1], [])
    return lab


# ------------------------------------------------------------------- fails closed


@pytest.mark.parametrize(
    "left",
    [(QC,), (), (QC, follower(after=None)), (leader("chip-qc", 3), follower(after=After("chip-qc", ("chip",))))],
    ids=["its rule is removed", "both are", "its rule has no gate any more", "the other is renamed"],
)
def test_what_waits_goes_on_waiting_for_the_same(left):
    """No edit of rules opens a gate, nor a restart after it; the success that was waited for still does."""
    lab = gated()
    lab.offer(*left)
    lab.run_for(100)
    lab.crash()
    lab.run_for(100)
    assert started(lab, 2) == []
    succeed(lab, 1)

    assert started(lab, 2) == [2]


def test_runs_whose_rule_and_gate_are_gone_are_an_alarm_that_names_the_way_out():
    """Nobody makes what they wait for any more: a person is told, and it ends when the rule is back."""
    lab = gated()
    lab.order("runs.cancel", ids=[1])
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "cancelled", lab.at))
    lab.offer()
    lab.run_for(5)
    alarm = lab.ledger.alarms["after:qc"]
    assert "run 2 of main" in alarm.what
    assert "runs retry ID --anyway" in alarm.hint
    assert waits(lab, 2) == "rule qc to succeed for chip=a: that rule is gone"
    assert "runs retry 2 --anyway" in hint(lab, 2)
    lab.offer(QC, MAIN)
    lab.run_for(5)

    assert "after:qc" not in lab.ledger.alarms


def test_only_an_operators_word_opens_a_gate_and_it_is_remembered():
    """`runs retry --anyway`: the run goes, also if a restart comes before its turn; a plain `retry` moves nothing."""
    lab = gated()
    lab.order("runs.retry", ids=[2])
    assert started(lab, 2) == []
    lab.order("pause")
    assert lab.order("runs.retry", ids=[2], anyway=True)["ok"]
    lab.crash()
    assert started(lab, 2) == []
    lab.order("resume")

    assert started(lab, 2) == [2]


def test_a_run_that_was_held_at_its_gate_waits_there_again():
    """`runs retry` of a HELD run is no way around; `--anyway` is."""
    lab = gated()
    lab.order("runs.hold", ids=[2])
    lab.crash()
    lab.order("runs.retry", ids=[2])
    assert (lab.ledger.states[2], started(lab, 2)) == (RunState.PENDING, [])
    lab.order("runs.hold", ids=[2])
    lab.order("runs.retry", ids=[2], anyway=True)

    assert started(lab, 2) == [2]


def test_a_waiting_run_takes_its_rules_new_gate_when_it_is_told_to():
    """`runs retry --anew`: with the gate that its rule has now, and only that."""
    lab = gated()
    lab.offer(leader("chip-qc", 3), follower(after=After("chip-qc", ("chip",))))
    lab.run_for(100)
    lab.sweep()
    lab.run_for(40)
    assert lab.order("runs.retry", ids=[2], anew=True)["ok"]
    succeed(lab, 1)
    assert started(lab, 2) == []
    succeed(lab, run_of(lab, 3))

    assert started(lab, 2) == [2]


def test_a_gate_that_is_added_holds_for_batches_that_close_from_then_on():
    """Open runs keep the request that they were made with."""
    lab = Lab(leader(), follower(after=None), auto=False)
    lab.order("rules.pause", rule="main")
    write(lab, "a/1.tif")
    lab.offer(QC, MAIN)
    write(lab, "a/2.tif")
    lab.order("rules.resume", rule="main")
    lab.crash()

    assert started(lab, 2) == [2]


def test_a_run_that_has_begun_is_asked_for_no_success_again():
    """Its next attempt does not wait for the quality control of a chip that has its name by then."""
    used_again = leader(batch=Batch(group_by=("chip",), only_first=1, new_group_after_s=3_600))
    lab = Lab(used_again, MAIN, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    lab.step(model.NotStarted(2, 1, Fault("transient", "busy", retry_after_s=7_000.0), lab.at))
    lab.run_for(5_000)
    write(lab, "a/2.tif")
    assert (2, "succeeded") not in {(number, kind) for number, _, kind in lab.engine.marks}
    lab.run_for(3_000)

    assert [e.attempt for e in lab.asked if isinstance(e, model.Start) and e.run == 2] == [1, 2]


def test_what_waits_says_for_which_run():
    """Its state too: that run may be held, and then a person is needed there."""
    lab = gated()
    assert waits(lab, 2) == "rule qc to succeed for chip=a: its run 1 is STARTING"
    lab.order("runs.hold", ids=[1])
    assert waits(lab, 2) == "rule qc to succeed for chip=a: its run 1 is HELD"
    assert hint(lab, 2) == ""
    lab.step(model.NotStarted(1, 1, Fault("transient", "no"), lab.at))
    lab.order("runs.abandon", ids=[1])

    assert waits(lab, 2) == "rule qc to succeed for chip=a: no run of it is open, and none is known that did"
    assert "runs retry 2 --anyway" in hint(lab, 2)


# ------------------------------------------------------------------ looking back


def test_a_success_of_before_the_rule_was_added_counts():
    """Whenever it ended, over a restart too; the journal is asked once for it, and not again by any later run."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    write(lab, "b/1.tif")
    lab.crash()
    assert not [e for e in lab.effects if isinstance(e, model.LookBack)]
    lab.offer(QC, MAIN)
    lab.sweep()
    lab.run_for(31)
    lab.crash()
    write(lab, "a/2.tif")

    assert [dict(lab.ledger.batches[run].group)["chip"] for run in started(lab, 2)] == ["a", "a"]
    assert sum(isinstance(e, model.LookBack) for e in lab.effects) == 1


def test_a_success_counts_while_the_journal_is_being_asked():
    """What ends meanwhile is remembered by itself, also if the answer is of before, or comes in another life."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    asked: list[model.LookBack] = []
    lab.look_back = asked.append
    lab.offer(QC, MAIN)
    lab.sweep()
    lab.run_for(31)
    assert "the journal is looked through" not in waits(lab, 2)  # its run is open, which says more
    succeed(lab, 1)
    assert started(lab, 2) == [2]
    lab.crash()
    lab.step(model.LookedBack(asked[-1].ask, 1, [], 0, lab.at))
    write(lab, "a/2.tif")

    assert started(lab, 2) == [2, 3]


def test_a_journal_that_cannot_be_read_is_asked_again():
    """Until then what waits goes on waiting, and says for what."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    asked: list[model.LookBack] = []
    lab.look_back = asked.append
    lab.offer(QC, MAIN)
    lab.sweep()
    lab.run_for(31)
    assert waits(lab, 2).endswith("the journal is looked through for its earlier runs")
    lab.step(model.LookedBack(asked[0].ask, 1, (), 0, lab.at, "disk I/O error"))
    lab.look_back = None
    assert started(lab, 2) == []
    lab.run_for(61)

    assert started(lab, 2) == [2]


def test_an_answer_of_before_nobody_asked_is_not_taken():
    """The other rule was followed by nobody for a while: what ended meanwhile is in the newer answer only."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    asked: list[model.LookBack] = []
    lab.look_back = asked.append
    lab.offer(QC, MAIN)
    lab.offer(QC)
    succeed(lab, 1)
    lab.offer(QC, MAIN)
    write(lab, "a/2.tif")
    lab.step(model.LookedBack(asked[0].ask, 1, (), 0, lab.at))
    assert started(lab, 2) == []
    lab.step(model.LookedBack(asked[1].ask, 1, [(1, {"chip": "a"})], 0, lab.at))

    assert len(started(lab, 2)) == 2


def test_what_is_thinned_too_far_to_tell_is_said():
    """A run of one file is known by its request alone: nobody can say what the success was for."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    lab.look_back = lambda effect: lab.step(model.LookedBack(effect.ask, 1, [(1, {})], 1_204, lab.at))
    lab.offer(QC, MAIN)
    lab.sweep()
    lab.run_for(31)
    lab.crash()

    assert "(1,204 old ones are thinned, and nobody knows what for)" in waits(lab, 2)
    assert "runs retry 2 --anyway" in hint(lab, 2)


def test_a_success_of_any_batch_is_enough_for_who_names_no_captures():
    """`same: []`: also one of which nothing else is known any more."""
    lab = Lab(QC, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    lab.look_back = lambda effect: lab.step(model.LookedBack(effect.ask, 1, [(1, {})], 1, lab.at))
    lab.offer(QC, follower(after=After("qc")))
    write(lab, "b/1.tif")

    assert len(started(lab, 2)) == 2


# ------------------------------------------------------------- names used again

USED_AGAIN = leader(batch=Batch(group_by=("chip",), only_first=1, new_group_after_s=3_600))


def test_a_success_for_an_earlier_chip_of_the_name_is_not_looked_back_to():
    """Its group has begun anew since: what was good then says nothing of this chip."""
    lab = Lab(USED_AGAIN, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    lab.run_for(8_000)
    write(lab, "a/2.tif")
    assert started(lab, 1) == [1, 2]
    lab.offer(USED_AGAIN, MAIN)
    write(lab, "a/3.tif")
    assert started(lab, 2) == []
    succeed(lab, 2)

    assert len(started(lab, 2)) == 3


def test_a_leader_whose_groups_never_begin_anew_opens_the_gate():
    """`new_group_after` is about `only_first`: where every batch counts, none has to be of this use of the name."""
    qc = leader(batch=Batch(group_by=("chip",), files=1, new_group_after_s=3_600))
    lab = Lab(qc, MAIN, auto=False)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    assert started(lab, 2) == [2]
    write(lab, "b/1.tif")
    lab.offer(qc)
    succeed(lab, run_of(lab, 1))
    lab.offer(qc, MAIN)

    assert started(lab, 2) == [2, 4]


def test_a_late_success_for_an_earlier_chip_of_the_name_opens_nothing():
    """It was held for hours, and the name is used again meanwhile: this chip has not even been looked at."""
    used_again = leader(batch=Batch(group_by=("chip",), only_first=2, idle_s=600, new_group_after_s=3_600))
    lab = Lab(used_again, MAIN, auto=False)
    write(lab, "a/1.tif")
    lab.run_for(700)
    assert started(lab, 1) == [2]
    lab.run_for(8_000)
    write(lab, "a/2.tif")
    assert started(lab, 1) == [2], "the batch of the new chip gathers"
    succeed(lab, 2)

    assert started(lab, 2) == []


@pytest.mark.parametrize("first", [0, 1], ids=["the leader first", "the follower first"])
def test_the_first_file_of_a_chip_used_again_closes_the_gate_before_a_batch_of_it_goes(first):
    """Whichever of the rules is told of the file first."""
    rules = [USED_AGAIN, MAIN]
    lab = Lab(*(rules[first:] + rules[:first]), auto=False)
    write(lab, "a/1.tif")
    succeed(lab, run_of(lab, 1))
    assert len(started(lab, 2)) == 1
    lab.run_for(8_000)
    write(lab, "a/2.tif")

    assert len(started(lab, 2)) == 1


@pytest.mark.parametrize("answered", [True, False])
def test_a_success_is_forgotten_while_nobody_waits_for_it_and_looked_up_again(answered):
    """By fewer captures than the group has: nobody would have learnt that the name began anew."""
    fine = Batch(group_by=("chip", "run"), only_first=1, new_group_after_s=3_600)
    qc = rule("qc", 1, match=("{chip}/{run}/{n}.tif",), batch=fine)
    main = rule("main", 2, match=("{chip}/{run}/{n}.tif",), batch=Batch(group_by=("chip",), files=1),
                after=After("qc", ("chip",)))  # fmt: skip
    lab = Lab(qc, auto=False)
    lab.look_back = None if answered else lambda effect: None
    lab.offer(qc, main)
    write(lab, "a/1/1.tif")
    succeed(lab, run_of(lab, 1))
    assert len(started(lab, 2)) == 1
    lab.offer(qc)
    lab.look_back = None
    lab.run_for(8_000)
    write(lab, "a/1/2.tif")
    lab.offer(qc, main)
    write(lab, "a/1/3.tif")
    assert len(started(lab, 2)) == 1
    succeed(lab, run_of(lab, 1))

    assert len(started(lab, 2)) == 3


# --------------------------------------------------------------- the real journal


class Kept(Lab):
    """A laboratory whose engine is restored from a real journal."""

    def __init__(self, state: Path, *rules: Rule) -> None:
        self.journal = Journal.open(state)
        self.state = state
        super().__init__(*rules, auto=False)
        self.look_back = self._ask

    def _start(self) -> None:
        self.journal.rule_ids([one.name for one in self.rules])
        self.journal.root_id("/data")
        super()._start()

    def saved(self) -> Saved:
        return self.journal.load()

    def crash(self) -> None:
        self.journal.close()
        self.journal = Journal.open(self.state)
        super().crash()

    def commit(self, records: list[model.Effect]) -> None:
        self.journal.append(records)

    def _ask(self, effect: model.LookBack) -> None:
        self.step(model.LookedBack(effect.ask, effect.rule, *self.journal.ended_well(effect.rule, 10), self.at))


def test_a_gate_holds_over_restarts_of_the_real_journal(tmp_path):
    """The request says it, the mark remembers the success, and the order that opens one is in it, too."""
    lab = Kept(tmp_path, QC, MAIN)
    with closing(lab.journal):
        write(lab, "a/1.tif")
        write(lab, "b/1.tif")
        lab.offer()
        lab.crash()
        assert lab.journal.request(2)["after"] == {"rule": "qc", "number": 1, "same": {"chip": "a"}}
        assert started(lab, 2) == []
        lab.order("pause")
        succeed(lab, 1)
        lab.order("runs.retry", ids=[4], anyway=True)
        lab.crash()
        assert started(lab, 2) == []
        lab.order("resume")

        assert started(lab, 2) == [2, 4]


def test_the_real_journal_is_looked_through_for_what_ended_well(tmp_path):
    """A rule that is added later finds the success of before, also a thinned one."""
    lab = Kept(tmp_path, QC)
    with closing(lab.journal):
        write(lab, "a/1.tif")
        succeed(lab, 1)
        write(lab, "b/1.tif")
        assert lab.journal.thin(lab.utc + lab.at + 1e6, 100) == 1
        lab.offer(QC, MAIN)
        lab.sweep()
        lab.run_for(31)
        lab.crash()
        lab.run_for(1)

        assert [dict(lab.ledger.batches[run].group)["chip"] for run in started(lab, 2)] == ["a"]


@pytest.mark.parametrize("removed", [False, True], ids=["its rule is in force", "its rule is gone"])
def test_a_run_that_an_earlier_version_made_waits_for_what_its_rule_says(tmp_path, removed):
    """Its request says nothing; what the rule says is written into it. Where the rule is gone, it does not start."""
    lab = Kept(tmp_path, QC, MAIN)
    with closing(lab.journal):
        write(lab, "a/1.tif")
        old = {key: value for key, value in lab.journal.request(2).items() if key != "after"}
        lab.journal.append([model.Renewed(2, old, "/out", 1.0)])
        lab.rules = (QC,) if removed else (QC, MAIN)
        lab.crash()
        lab.run_for(5)
        assert started(lab, 2) == []
        if removed:
            assert "rule main to be in force" in waits(lab, 2)
            assert "run 2 of main" in lab.ledger.alarms["after:main"].what
            lab.offer(QC, MAIN)
        assert lab.journal.request(2)["after"]["same"] == {"chip": "a"}
        succeed(lab, 1)

        assert started(lab, 2) == [2]


def test_a_recovered_journal_looks_for_successes_in_its_runs(tmp_path):
    """A mark may be lost where the run is not; that all had been looked up is not believed any more."""
    lab = Kept(tmp_path, QC, MAIN)
    write(lab, "a/1.tif")
    succeed(lab, 1)
    lab.journal.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as sql:
        sql.execute("DELETE FROM group_mark WHERE kind = 'succeeded'")
        sql.commit()
        (page,) = sql.execute("SELECT rootpage FROM sqlite_master WHERE name = 'alarm'").fetchone()
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek((page - 1) * 4_096)
        file.write(b"\xff" * 4_096)
    assert salvage(tmp_path, (QC, MAIN), (), 1.0).damaged == ["alarm"]
    lab.journal = Journal.open(tmp_path)
    with closing(lab.journal):
        Lab.crash(lab)

        assert (1, '{"chip":"a"}', "succeeded") in lab.engine.marks


def member(number: int) -> Member:
    return Member(1, "d", f"{number}.tif", 1, number)


def test_looking_back_reads_the_runs_of_one_rule_page_by_page(tmp_path, monkeypatch):
    """The newest of each group that ended well, however many pages; what has its captures in its request alone too."""
    monkeypatch.setattr("trigger_daemon.journal.RUNS_PAGE", 3)
    with closing(Journal.open(tmp_path)) as journal:
        journal.rule_ids(["single", "grouped", "other"])
        journal.root_id("/data")

        def close(batch: int, rule: int, group: dict[str, str], captures: dict[str, str], end: RunState) -> None:
            request = {"rule": "r", "captures": captures}
            journal.append([
                model.BatchClosed(batch, rule, group, "full", batch, [member(batch)], 1, request, "/out"),
                model.RunMoved(batch, RunState.PENDING, end, "", batch, final=end != RunState.HELD),
            ])  # fmt: skip

        for batch in range(1, 11):
            close(batch, 1, {}, {"n": str(batch % 4)}, RunState.VERIFIED)
        close(11, 1, {}, {"n": "11"}, RunState.ABANDONED)
        close(12, 2, {"chip": "a"}, {"chip": "a"}, RunState.SUCCEEDED)
        close(13, 2, {"chip": "b"}, {"chip": "b"}, RunState.HELD)
        close(14, 2, {"chip": "a"}, {"chip": "a"}, RunState.VERIFIED)
        close(15, 3, {"chip": "c"}, {"chip": "c"}, RunState.VERIFIED)
        assert journal.ended_well(1, 10) == ([(10, {"n": "2"}), (9, {"n": "1"}), (8, {"n": "0"}), (7, {"n": "3"})], 0)
        assert journal.ended_well(1, 2)[0][:2] == [(10, {"n": "2"}), (9, {"n": "1"})]
        assert journal.ended_well(2, 10) == ([(14, {"chip": "a"})], 0)
        assert journal.ended_well(9, 10) == ([], 0)
        journal.thin(12.5, 100)

        assert journal.ended_well(1, 10) == ([(10, {})], 10)
        assert journal.ended_well(2, 10) == ([(14, {"chip": "a"})], 0)


def test_a_daemon_looks_back_and_keeps_a_gate_shut(tmp_path):
    """With files, a real daemon and its commands: a success of before opens, a removed rule does not, a person does."""
    site = Site(tmp_path, quiescence="200ms", sweep="500ms")
    one = {"match": ["{chip}/{n}.tif"], "batch": {"group_by": ["chip"], "files": 1}}
    code = '0 if "a" in open(sys.argv[1]).read().split("chip-")[1][:1] else 65'
    look = ["/usr/bin/env", "python3", "-c", f"import sys; sys.exit({code})", "{manifest}"]
    qc = site.rule("qc", **one, start={"command": {"run": look}})
    main = site.rule("main", **one, after={"rule": "qc", "same": ["chip"]})
    site.write_rules(qc)
    try:
        site.start()
        for chip in "ab":
            (site.data / f"chip-{chip}").mkdir()
            (site.data / f"chip-{chip}" / "1.tif").write_bytes(b"x")
        site.until(lambda: site.states() == {"SUCCEEDED": 1, "HELD": 1}, 20, "one chip to be good, and one not")
        site.write_rules(qc, main)
        site.process.send_signal(signal.SIGHUP)
        site.until(lambda: (site.out / "chip-a" / "1.tif").exists(), 20, "the good chip to go")
        site.until(lambda: site.states()["PENDING"] == 1, 20, "the other to wait")
        site.write_rules(site.rule("other", match=["none"]))
        site.stop()
        site.start()
        assert site.states()["PENDING"] == 1
        site.cli("runs", "retry", "--rule", "main", "--anyway")

        site.until(lambda: (site.out / "chip-b" / "1.tif").exists(), 20, "a person's word to let it go")
    finally:
        site.kill()
