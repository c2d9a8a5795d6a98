"""What the core makes of checks: siblings, files a check needs, digests that files carry, late companions, markers."""

from __future__ import annotations

import pytest

from lab import Lab, rule
from trigger_daemon.core import model
from trigger_daemon.core.model import Verdict
from trigger_daemon.core.rules import Batch, CloseOn, Complete, With

FRAMES = (("tiff", {"frames": "siblings"}),)


def measuring(**complete: object) -> Lab:
    lab = Lab(rule(complete=Complete(quiescence_s=10, checks=FRAMES, **complete)))  # type: ignore[arg-type]
    lab.checks_wait = []
    return lab


def judged(lab: Lab, name: str, measure: int, verdict: Verdict = Verdict.COMPLETE) -> tuple[int, ...]:
    """Let a file come, and its check measure it; return what the check was told of its siblings."""
    lab.write(name)
    lab.run_for(11)
    asked = next(check for check in lab.checks_wait or [] if check.path == name)
    lab.answer_check(name, verdict, measures=(("tiff", measure),))
    return asked.siblings.get("tiff", ())


def test_a_check_is_told_what_it_measured_of_the_last_files() -> None:
    """Newest last, a file never compared with itself, those judged incomplete left out, and never more than nine."""
    lab = measuring()
    assert judged(lab, "a.tif", 40) == ()
    assert judged(lab, "b.tif", 41) == (40,)
    assert judged(lab, "c.tif", 17, Verdict.INCOMPLETE) == (40, 41)
    assert judged(lab, "b.tif", 42) == (40,)
    for number in range(12):
        told = judged(lab, f"{number}.tif", number)

    assert told == (2, 3, 4, 5, 6, 7, 8, 9, 10)


def test_siblings_are_known_after_a_crash() -> None:
    """Else the half movie of a camera that failed would pass as the first of its kind."""
    lab = measuring()
    for name in ("a.tif", "b.tif", "c.tif"):
        judged(lab, name, 40)
    lab.crash()
    lab.checks_wait = []
    lab.offer(*lab.rules)

    assert judged(lab, "d.tif", 17) == (40, 40, 40)


def test_a_suspect_file_counts_among_siblings() -> None:
    """Settings of an instrument change; what its files are like now is learnt from them, not from the old ones."""
    lab = measuring()
    judged(lab, "a.tif", 40)
    judged(lab, "b.tif", 30, Verdict.SUSPECT)

    assert judged(lab, "c.tif", 30) == (40, 30)


def test_a_rule_that_is_gone_leaves_no_measures_behind() -> None:
    """What is kept has an end."""
    lab = measuring()
    judged(lab, "a.tif", 40)
    lab.offer()

    assert not [key for key in lab.ledger.kept if key.startswith("siblings")]


def needing(lab: Lab, *names: str) -> None:
    """Let `series_master.h5` come, whose check needs the names."""
    lab.write("series_master.tif")
    lab.run_for(11)
    lab.answer_check("series_master.tif", Verdict.INCOMPLETE, "0 of 2", needs=names)


def test_what_a_check_needs_is_awaited_in_any_order_and_handed_to_it() -> None:
    """The master names its data files: one set, whichever of them comes last, in directories below it too."""
    lab = measuring(stalled_after_s=600)
    lab.write("more/d2.h5")
    needing(lab, "d1.h5", "more/d2.h5")
    lab.run_for(60)
    assert not lab.checks_wait
    assert "d1.h5" in lab.explain("series_master.tif")[0]["because"]
    lab.write("d1.h5")
    lab.run_for(20)
    check = lab.checks_wait[0]  # type: ignore[index]
    assert sorted(check.companions) == [(1, "d1.h5"), (1, "more/d2.h5")]
    lab.answer_check("series_master.tif", needs=("d1.h5", "more/d2.h5"))

    assert sorted(lab.batches()[0]) == ["d1.h5", "more/d2.h5", "series_master.tif"]
    assert sorted(member.role for member in lab.closed[0][1].members) == ["", "companion", "companion"]


def test_a_needed_file_may_be_empty() -> None:
    """The mark `done` often is; the check that asked for it judges."""
    lab = measuring()
    needing(lab, "done")
    lab.write("done", 0)
    lab.run_for(20)

    assert lab.checks_wait


def test_a_set_that_grows_has_not_stalled_and_one_that_stands_still_has() -> None:
    """A collection of hours writes one data file after the other; it is never blocked, and never started."""
    lab = measuring(stalled_after_s=600)
    names = tuple(f"d{number}.h5" for number in range(5))
    needing(lab, *names)
    for name in names[:-1]:
        lab.run_for(500)
        lab.write(name)
    lab.run_for(500)
    assert not [key for key in lab.engine.alarms.open if key.startswith(("stalled", "blocked"))]
    lab.run_for(200)

    alarm = lab.engine.alarms.open["stalled:r"]
    assert "series_master.tif" in alarm.what and "d4.h5" in alarm.what
    assert not lab.closed


def test_a_suspect_file_is_judged_again_when_its_companion_changes() -> None:
    """The mdoc of a tilt series names a movie only when its tilt is done; nobody has to wait until a suspect may go."""
    both = Complete(quiescence_s=10, checks=FRAMES, companions=(With("series.mdoc", "/data"),))
    lab = Lab(rule(match=("{x}.tif",), complete=both))
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "the mdoc does not name it")
    lab.write("series.mdoc", 100)
    lab.write("a.tif")
    lab.run_for(60)
    assert lab.explain("a.tif")[0]["because"] == "the mdoc does not name it"
    lab.verdicts.clear()
    lab.write("series.mdoc", 200, heard=False)
    lab.run_for(30)

    assert lab.batches() == [("a.tif", "series.mdoc")]
    assert lab.closed[0][1].members[0].flag == ""


def test_a_companion_that_changes_gives_a_suspect_file_no_new_delay() -> None:
    """It goes, flagged, so long after its own last change, whatever happens beside it."""
    both = Complete(quiescence_s=10, checks=FRAMES, companions=(With("series.mdoc", "/data"),), suspect_s=300)
    lab = Lab(rule(match=("{x}.tif",), complete=both))
    lab.verdicts["a.tif"] = (Verdict.SUSPECT, "the mdoc does not name it")
    lab.write("a.tif")
    for size in range(1, 8):
        lab.write("series.mdoc", size, heard=False)
        lab.run_for(40)
    assert not lab.batches()
    lab.run_for(60)

    assert [record.members[0].flag for _, record in lab.closed] == ["suspect"]
    lab.offer()
    lab.run_for(1)
    assert not lab.engine.timers._live


def test_the_digest_that_a_file_carries_goes_into_the_manifest() -> None:
    """Of the version that was checked, and of no other."""
    lab = measuring()
    lab.write("a.tif")
    lab.run_for(11)
    lab.answer_check("a.tif", content="md5:00:10:20")
    lab.write("a.tif", 20)
    lab.run_for(11)
    lab.answer_check("a.tif")

    assert [record.members[0].content for _, record in lab.closed] == ["md5:00:10:20", ""]


def test_an_empty_marker_closes_its_batch() -> None:
    """`touch DONE` is how many programs say that a run is over."""
    lab = Lab(rule(complete=Complete(quiescence_s=10), batch=Batch(files=100, close_on=CloseOn("DONE"))))
    lab.write("a.tif")
    lab.write("DONE", 0)
    lab.run_for(60)

    assert lab.batches() == [("a.tif",)]


LATE = Complete(quiescence_s=10, companions=(With("{x}.xml", "/data", wait_s=20, missing="go"),))


def late_lab() -> Lab:
    lab = Lab(rule(match=("{x}.tif",), complete=LATE))
    lab.write("a.tif")
    lab.run_for(40)
    assert lab.batches() == [("a.tif",)]
    return lab


def test_a_late_companion_is_looked_for_after_a_crash() -> None:
    """It came while nobody looked: still in a batch of its own, once, and the mark of the debt is gone."""
    lab = late_lab()
    lab.crash()
    lab.write("a.xml", heard=False)
    lab.offer(*lab.rules)
    lab.run_for(200)
    assert lab.batches()[1:] == [("a.xml",)]
    assert lab.closed[1][1].reason == "late companion of a.tif, which batch 1 took"
    lab.crash()
    lab.offer(*lab.rules)
    lab.run_for(200)

    assert len(lab.batches()) == 2
    assert not [mark for mark in lab.ledger.marks if mark[2] == "late"]


def test_a_debt_that_no_rule_has_any_more_is_forgotten() -> None:
    """A rule that names no such companion looks for none."""
    lab = late_lab()
    lab.crash()
    lab.offer(rule(match=("{x}.tif",), complete=Complete(quiescence_s=10)))
    lab.write("a.xml", heard=False)
    lab.run_for(200)

    assert len(lab.batches()) == 1
    assert not [mark for mark in lab.ledger.marks if mark[2] == "late"]


def test_late_companions_of_a_changed_rule_are_looked_for_on() -> None:
    """Changing how a rule batches does not make it forget what its files went without."""
    lab = late_lab()
    lab.offer(rule(match=("{x}.tif",), complete=LATE, batch=Batch(files=7)))
    lab.write("a.xml", heard=False)
    lab.run_for(200)

    assert lab.batches()[1:] == [("a.xml",)]


def test_companions_with_checks_are_compared_with_their_own_siblings() -> None:
    """The sizes of metadata are like those of metadata, not like those of movies."""
    checks = (("size", {"siblings": 0.05}),)
    both = Complete(quiescence_s=10, checks=checks, companions=(With("{x}.xml", "/data", checks),))
    lab = Lab(rule(match=("{x}.tif",), complete=both))
    lab.checks_wait = []
    for number, (movie, metadata) in enumerate([(1000, 10), (1001, 11)]):
        lab.write(f"{number}.tif", movie)
        lab.write(f"{number}.xml", metadata)
        lab.run_for(25)
        asked = {check.path: check.siblings.get("size", ()) for check in lab.checks_wait}
        lab.answer_check(f"{number}.xml", measures=(("size", metadata),))
        lab.answer_check(f"{number}.tif", measures=(("size", movie),))

    assert asked == {"1.xml": (10,), "1.tif": (1000,)}
    assert len(lab.closed) == 2


def test_a_verdict_about_a_file_as_a_companion_is_none_about_the_file_itself() -> None:
    """One file in two parts, with other checks: what passes as a gain reference may be an incomplete movie."""
    gain = With("gain.tif", "/data", (("size", {}),), wait_s=3, missing="go", shared=True)
    both = Complete(quiescence_s=10, checks=FRAMES, companions=(gain,))
    lab = Lab(rule(match=("{x}.tif",), complete=both))
    lab.checks_wait = []
    lab.write("gain.tif")
    lab.write("m.tif")
    lab.run_for(30)
    checks, lab.checks_wait = lab.checks_wait, []
    for check in checks:
        whole = bool(check.scope) or check.path == "m.tif"
        verdict = Verdict.COMPLETE if whole else Verdict.INCOMPLETE
        lab.step(model.Checked(*lab._about(check), verdict, "as asked", lab.at, scope=check.scope))
    lab.run_for(5)

    assert {check.scope for check in checks if check.path == "gain.tif"} == {"", "gain.tif: "}
    assert lab.batches() == [("m.tif", "gain.tif")]


def test_the_digest_that_a_companion_carries_goes_into_the_manifest() -> None:
    """An image may travel with its record, as well as the record with its image."""
    companion = With("{x}.cbf", "/data", (("cbf", {}),))
    lab = Lab(rule(match=("{x}.tif",), complete=Complete(quiescence_s=10, companions=(companion,))))
    lab.checks_wait = []
    lab.write("a.cbf", heard=False)
    lab.write("a.tif")
    lab.run_for(30)
    lab.answer_check("a.cbf", content="md5:00:10:20")
    lab.run_for(5)

    assert {m.name: m.content for m in lab.closed[0][1].members} == {"a.tif": "", "a.cbf": "md5:00:10:20"}


def test_looks_at_an_incomplete_file_do_not_begin_the_wait_for_its_companion_anew() -> None:
    """`wait` is counted from when this version was quiet, however often it is looked at since."""
    companion = With("{x}.xml", "/data", wait_s=60, missing="go")
    lab = Lab(rule(match=("{x}.tif",), complete=Complete(quiescence_s=10, checks=FRAMES, companions=(companion,))))
    lab.verdicts["a.tif"] = (Verdict.INCOMPLETE, "17 of 40")
    lab.write("a.tif")
    lab.run_for(100)
    assert lab.explain("a.tif")[0]["because"] == "17 of 40"
    lab.run_for(200)

    assert lab.explain("a.tif")[0]["because"] == "17 of 40"


def test_a_set_that_is_armed_again_is_made_of_what_the_new_master_names() -> None:
    """Neither waits it for files of the old series, nor do they travel with it."""
    lab = measuring()
    needing(lab, "d1.h5", "d2.h5", "d3.h5")
    lab.write("d1.h5", heard=False)
    lab.write("d2.h5", heard=False)
    lab.run_for(60)
    lab.write("series_master.tif", 20)
    lab.run_for(11)
    lab.answer_check("series_master.tif", Verdict.INCOMPLETE, "0 of 1", needs=("d1.h5",))
    lab.write("d3.h5", heard=False)
    lab.run_for(30)
    lab.answer_check("series_master.tif", needs=("d1.h5",))

    assert [sorted(paths) for paths in lab.batches()] == [["d1.h5", "series_master.tif"]]


def test_what_a_check_has_read_stays_with_its_file() -> None:
    """An mdoc that was asked for once is not asked for again when it has answered, and travels all the same."""
    lab = measuring()
    needing(lab, "a.mdoc")
    lab.write("a.mdoc", heard=False)
    lab.run_for(30)
    lab.answer_check("series_master.tif", read=("a.mdoc",))

    assert [sorted(paths) for paths in lab.batches()] == [["a.mdoc", "series_master.tif"]]


def test_a_companion_that_comes_may_make_a_need_needless() -> None:
    """`frames: mdoc`: the movie's own mdoc was asked for, and the series' mdoc comes, which names the movie."""
    companion = With("s.mdoc", "/data", wait_s=2, missing="go")
    both = Complete(quiescence_s=10, checks=FRAMES, companions=(companion,))
    lab = Lab(rule(match=("{x}.tif",), complete=both))
    lab.checks_wait = []
    lab.write("series_master.tif")
    lab.run_for(20)
    lab.answer_check("series_master.tif", Verdict.INCOMPLETE, "no mdoc", needs=("series_master.tif.mdoc",))
    lab.write("s.mdoc", heard=False)
    lab.run_for(30)
    lab.answer_check("series_master.tif", read=("s.mdoc",))

    assert [sorted(paths) for paths in lab.batches()] == [["s.mdoc", "series_master.tif"]]


def test_files_of_one_burst_are_compared_with_each_other() -> None:
    """A directory that was there before is judged at once; only its first three files have nobody beside them."""
    lab = measuring(suspect_s=None)
    for number in range(20):
        lab.write(f"{number:02d}.tif")
    lab.run_for(11)
    while lab.checks_wait:
        check = lab.checks_wait[0]
        siblings, measure = check.siblings.get("tiff", ()), 17 if check.path == "15.tif" else 40
        odd = len(siblings) >= 3 and measure not in siblings
        verdict = Verdict.SUSPECT if odd else Verdict.COMPLETE if len(siblings) >= 3 else Verdict.UNKNOWN
        lab.answer_check(check.path, verdict, measures=(("tiff", measure),))
    lab.run_for(400)

    assert sorted(name for names in lab.batches() for name in names) == [f"{n:02d}.tif" for n in range(20) if n != 15]
    assert lab.explain("15.tif")[0]["stage"] == "blocked"


def test_a_suspect_late_companion_waits_and_goes_marked_or_not_at_all() -> None:
    """`suspect` of its rule holds for it, too."""
    for suspect_s, flags in ((300, ["suspect"]), (None, [])):
        companion = With("{x}.xml", "/data", (("xml", {}),), wait_s=20, missing="go")
        complete = Complete(quiescence_s=10, companions=(companion,), suspect_s=suspect_s)
        lab = Lab(rule(match=("{x}.tif",), complete=complete))
        lab.write("a.tif")
        lab.run_for(60)
        lab.verdicts["a.xml"] = (Verdict.SUSPECT, "not well-formed")
        lab.write("a.xml", heard=False)
        lab.run_for(250)
        assert len(lab.closed) == 1
        lab.run_for(250)

        assert [record.members[0].flag for _, record in lab.closed[1:]] == flags


def test_a_shared_companion_that_comes_later_follows() -> None:
    """Once for those that went without it; and it rides along with each file that comes after it."""
    companion = With("gain.mrc", "/data", (), wait_s=20, missing="go", shared=True)
    for another in (False, True):
        lab = Lab(rule(match=("{x}.tif",), complete=Complete(quiescence_s=10, companions=(companion,))))
        lab.write("a.tif")
        lab.write("b.tif")
        lab.run_for(60)
        assert sorted(lab.batches()) == [("a.tif",), ("b.tif",)]
        lab.write("gain.mrc", heard=False)
        if another:
            lab.write("c.tif")
        lab.run_for(300)

        alone = lab.batches().count(("gain.mrc",))
        assert alone == 1 or (another and alone == 0)
        assert lab.batches().count(("c.tif", "gain.mrc")) == another
        assert not [mark for mark in lab.ledger.marks if mark[2] == "late"]


@pytest.mark.parametrize("verdict", [Verdict.INCOMPLETE, Verdict.SUSPECT, None])
def test_a_late_companion_that_cannot_follow_raises_an_alarm_with_its_reason(verdict: Verdict | None) -> None:
    """Cut, suspect where the rule blocks, or empty: a person is told which and why; mended, it follows."""
    companion = With("{x}.xml", "/data", (("xml", {}),), wait_s=20, missing="go")
    complete = Complete(quiescence_s=10, companions=(companion,), suspect_s=None, stalled_after_s=600)
    lab = Lab(rule(match=("{x}.tif",), complete=complete))
    lab.write("a.tif")
    lab.run_for(60)
    if verdict:
        lab.verdicts["a.xml"] = (verdict, "ends in the middle")
    lab.write("a.xml", 0 if verdict is None else 5, heard=False)
    lab.run_for(1_000)

    reason = "empty" if verdict is None else "ends in the middle"
    (alarm,) = [alarm.what for key, alarm in lab.engine.alarms.open.items() if key == "late:r"]
    assert alarm.endswith(f"a.xml: {reason}")
    assert lab.explain("a.xml")[0]["because"].endswith(f"went without it: {reason}; looked for each minute")
    lab.verdicts.clear()
    lab.write("a.xml", 7, heard=False)
    lab.run_for(300)
    assert lab.batches() == [("a.tif",), ("a.xml",)]
    assert "late:r" not in lab.engine.alarms.open


def test_companions_of_one_burst_are_compared_with_each_other() -> None:
    """As files are: only the first three have nobody beside them."""
    companion = With("{x}.xml", "/data", (("size", {"siblings": "5%"}),), wait_s=60)
    lab = Lab(rule(match=("{x}.tif",), complete=Complete(quiescence_s=10, companions=(companion,), suspect_s=None)))
    lab.checks_wait = []
    for number in range(20):
        lab.write(f"{number:02d}.tif")
        lab.write(f"{number:02d}.xml")
    lab.run_for(30)
    while lab.checks_wait:
        check = lab.checks_wait[0]
        siblings, measure = check.siblings.get("size", ()), 17 if check.path == "15.xml" else 40
        odd = len(siblings) >= 3 and measure not in siblings
        verdict = Verdict.SUSPECT if odd else Verdict.COMPLETE if len(siblings) >= 3 else Verdict.UNKNOWN
        lab.answer_check(check.path, verdict, measures=(("size", measure),))
    lab.run_for(400)

    assert sorted(names[0] for names in lab.batches()) == [f"{n:02d}.tif" for n in range(20) if n != 15]
