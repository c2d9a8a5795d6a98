"""Replays: of a recorded run, of a directory, of a recorded history with other rules; and the trace itself."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon import simulator, trace
from trigger_daemon.config import parse_rules
from trigger_daemon.core import model
from trigger_daemon.core.rules import Rule
from trigger_daemon.core.saved import Count, OpenRun, Saved, SavedAlarm, SavedAttempt, SavedMark, SavedReclaim
from trigger_daemon.replay import Report, replay_directory, replay_history, replay_trace

DAY = 1_750_000_000  # a day of 2025, seconds


def rules_of(*rules: dict[str, Any]) -> tuple[Rule, ...]:
    read = parse_rules([("rules.yaml", json.dumps({"rules": list(rules)}))])
    assert not read.faults, read.faults
    return read.rules


def a_rule(**keys: Any) -> dict[str, Any]:
    return {
        "name": "r", "watch": "/data", "match": ["{x}.tif"], "existing": "process",
        "complete": {"quiescence": "10s"}, "start": {"copy": {"to": "/out"}}, **keys,
    }  # fmt: skip


def put(path: Path, at: float, content: bytes = b"x") -> Path:
    """Write a file with its time of modification, in seconds after DAY."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(int((DAY + at) * 1e9),) * 2)
    return path


def replayed(tmp_path: Path, *rules: dict[str, Any], **keys: Any) -> Report:
    return replay_directory(rules_of(*rules), {"/data": str(tmp_path)}, **keys)


def files(report: Report) -> list[list[str]]:
    return [batch["files"] for batch in report.batches]


def left(report: Report) -> dict[str, str]:
    return {entry["path"]: entry["because"] for entry in report.left}


# ------------------------------------------------------------------------ directories


def test_files_of_a_directory_arrive_at_their_times_of_modification(tmp_path: Path) -> None:
    """Each batch closes when it would have closed, with what was there by then, and says why."""
    for number, at in enumerate((0, 1, 2, 100, 101)):
        put(tmp_path / f"{number}.tif", at)
    report = replayed(tmp_path, a_rule(batch={"files": 2, "idle": "30s"}))

    assert files(report) == [["0.tif", "1.tif"], ["2.tif"], ["3.tif", "4.tif"]]
    assert [batch["reason"] for batch in report.batches] == [
        "files: 2 of 2", "idle: nothing new for 30 s", "files: 2 of 2",
    ]  # fmt: skip
    assert [batch["time"] for batch in report.batches] == [
        "2025-06-15T15:06:51.000Z", "2025-06-15T15:07:22.000Z", "2025-06-15T15:08:31.000Z",
    ]  # fmt: skip
    assert not report.left


def test_speed_divides_the_time_between_files(tmp_path: Path) -> None:
    """Ten times as fast, the third file still comes in time for the batch that it missed."""
    for number, at in enumerate((0, 1, 100)):
        put(tmp_path / f"{number}.tif", at)
    rule = a_rule(batch={"files": 9, "idle": "30s"})

    assert files(replayed(tmp_path, rule)) == [["0.tif", "1.tif"], ["2.tif"]]
    assert files(replayed(tmp_path, rule, speed=10.0)) == [["0.tif", "1.tif", "2.tif"]]


def test_every_file_that_is_left_says_why(tmp_path: Path) -> None:
    """Unmatched, ignored, empty, incomplete, without its companion, left out, waiting for more, a marker."""
    tiff = tmp_path / "made.tif"
    simulator.tiff_movie(tiff, frames=5, width=8, height=8, pause=lambda s: None, stop_after=3)
    put(tmp_path / "a" / "cut.tif", 0, tiff.read_bytes())
    tiff.unlink()
    simulator.tiff_movie(tiff, frames=5, width=8, height=8, pause=lambda s: None)
    whole = tiff.read_bytes()
    tiff.unlink()
    put(tmp_path / "a" / "empty.tif", 0, b"")
    put(tmp_path / "a" / "alone.tif", 0, whole)
    put(tmp_path / "a" / "paired.tif", 0, whole)
    put(tmp_path / "a" / "paired.xml", 0, b"<a/>")
    put(tmp_path / "a" / "cut.xml", 0, b"<a/>")
    put(tmp_path / "a" / "DONE", 1, b"")
    put(tmp_path / "a" / "x.tif.tmp", 0)
    put(tmp_path / "notes.txt", 0)
    for number in range(3):
        put(tmp_path / "b" / f"{number}.dat", number)
    movies = a_rule(
        name="movies", match=["a/{x}.tif"], batch={"files": 9, "close_on": {"file": "a/DONE"}},
        complete={"quiescence": "10s", "checks": [{"tiff": {"frames": 5}}], "with": [{"file": "a/{x}.xml"}]},
    )  # fmt: skip
    first = a_rule(name="first", match=["b/{n}.dat"], batch={"only_first": 2})
    many = a_rule(name="many", match=["b/{n}.dat"], batch={"files": 9})
    report = replayed(tmp_path, movies, first, many)
    said = {(entry["path"], entry["rule"]): entry["because"] for entry in report.left}

    assert files(report) == [["b/0.dat", "b/1.dat"], ["a/paired.tif", "a/paired.xml"]]
    assert said[("a/cut.tif", "movies")].startswith("3 of 5 frames")
    assert said[("a/empty.tif", "movies")].startswith("the file is empty")
    assert said[("a/alone.tif", "movies")].startswith("companion a/alone.xml: not there yet; waited 600 s")
    assert said[("a/x.tif.tmp", "movies")].startswith("ignored by the pattern `*.tmp`")
    assert said[("notes.txt", None)] == "no rule matches it"
    assert said[("b/2.dat", "first")] == "only_first: the batch of its group was full"
    assert said[("b/2.dat", "many")].startswith("in an open batch of 3 files; 6 missing until files: 9")
    assert said[("a/DONE", "movies")] == "a marker: it closed its batches"
    assert len([path for path, _ in said]) == 11  # and the other two of `many`


def test_a_replay_writes_nothing_and_starts_nothing(tmp_path: Path) -> None:
    """The command of the rule would leave a mark."""
    put(tmp_path / "data" / "a.tif", 0)
    before = sorted(tmp_path.rglob("*"))
    rule = a_rule(start={"command": {"run": ["/bin/touch", str(tmp_path / "started")]}}, proof="none")
    report = replay_directory(rules_of(rule), {"/data": str(tmp_path / "data")})

    assert files(report) == [["a.tif"]]
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_wait_for_another_rule_find_it_succeeded(tmp_path: Path) -> None:
    """Both rules' batches are shown, in the order in which they close."""
    for number in range(5):
        put(tmp_path / f"{number}.tif", number)
    qc = a_rule(name="qc", batch={"only_first": 2})
    rest = a_rule(name="rest", batch={"files": 5}, after={"rule": "qc", "same": []})
    report = replayed(tmp_path, qc, rest)

    assert [(batch["rule"], len(batch["files"])) for batch in report.batches] == [("qc", 2), ("rest", 5)]


def test_years_between_files_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete file of 1970 is not looked at again and again for half a century."""
    monkeypatch.setattr("trigger_daemon.replay.STEPS_MAX", 1_000)
    put(tmp_path / "old.tif", -DAY, b"")
    put(tmp_path / "new.tif", 0)
    report = replayed(tmp_path, a_rule())

    assert files(report) == [["new.tif"]]
    assert left(report)["old.tif"].startswith("the file is empty")
    assert not report.notes


def test_times_of_day_close_batches_in_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that closes at 06:00 does so in the night after its files came, centuries of other nights passed over."""
    monkeypatch.setattr("trigger_daemon.replay.STEPS_MAX", 1_000)
    put(tmp_path / "a.tif", 0)
    put(tmp_path / "b.tif", 5 * 86_400)
    put(tmp_path / "c.tif", 40_000 * 86_400)
    report = replayed(tmp_path, a_rule(batch={"at": ["06:00"]}))

    assert [(batch["time"][:16], batch["files"]) for batch in report.batches] == [
        ("2025-06-16T06:00", ["a.tif"]), ("2025-06-21T06:00", ["b.tif"]), ("2134-12-22T06:00", ["c.tif"]),
    ]  # fmt: skip
    assert not report.notes


def test_times_of_day_are_those_of_the_daemons_zone(tmp_path: Path) -> None:
    """`at` and `{date}` mean what they mean when the rules run."""
    put(tmp_path / "a.tif", 0)  # 15:06 UTC, 00:06 of the next day in Tokyo
    rule = a_rule(batch={"at": ["00:30"]})

    assert replayed(tmp_path, rule).batches[0]["time"].endswith("T00:30:00.000Z")
    assert replayed(tmp_path, rule, time_zone="Asia/Tokyo").batches[0]["time"].endswith("T15:30:00.000Z")


def test_times_beyond_every_calendar_are_replayed(tmp_path: Path) -> None:
    """A file system may keep years that no calendar has."""
    put(tmp_path / "a.tif", 0)
    os.utime(put(tmp_path / "b.tif", 0), (0, 2**33))
    os.utime(put(tmp_path / "c.tif", 0), (0, -(2**31)))

    found = [name for names in files(replayed(tmp_path, a_rule(), speed=1e-3)) for name in names]
    assert sorted(found) == ["a.tif", "b.tif", "c.tif"]


def test_a_directory_without_files_and_one_without_any_that_fits_are_told(tmp_path: Path) -> None:
    """Whoever names the wrong directory hears of it; links are not followed."""
    (tmp_path / "a.tif").symlink_to("/nowhere")
    assert replayed(tmp_path, a_rule()).notes == ["there is no file below " + str(tmp_path)]
    put(tmp_path / "a.dat", 0)

    assert replayed(tmp_path, a_rule()).notes == ["no file here fits any rule: is this the right directory?"]


def test_companions_that_are_missing_or_alone_are_told(tmp_path: Path) -> None:
    """`missing: go` hides nothing: who went without what, which companion nobody came for, and which never comes."""
    put(tmp_path / "a.tif", 0)
    put(tmp_path / "b.xml", 0)
    companions = [
        {"file": "{x}.xml", "wait": "20s", "missing": "go"},
        {"file": "gain.mrc", "wait": "20s", "missing": "go", "shared": True},
    ]
    report = replayed(tmp_path, a_rule(complete={"quiescence": "10s", "with": companions}))

    assert files(report) == [["a.tif"]]
    assert left(report) == {
        "a.xml": "a companion of a.tif, which went without it: not there yet",
        "gain.mrc": "a companion of a.tif, which went without it: not there yet",
        "b.xml": "a companion: no file that it belongs to was sent",
    }
    assert "rule r: no file came with a companion `gain.mrc` (in /data)" in report.notes


def test_suspect_files_are_named_with_their_batch(tmp_path: Path) -> None:
    """A wrong number of frames in a rule shows: such files go, marked, five minutes late."""
    simulator.tiff_movie(tmp_path / "a.tif", frames=4, width=8, height=8, pause=lambda s: None)
    os.utime(tmp_path / "a.tif", (DAY, DAY))
    report = replayed(tmp_path, a_rule(complete={"quiescence": "10s", "checks": [{"tiff": {"frames": 3}}]}))

    assert [batch["suspect"] for batch in report.batches] == [["a.tif"]]
    assert report.batches[0]["time"] == "2025-06-15T15:11:40.000Z"


# --------------------------------------------------------------------- command line


def command(*args: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "trigger_daemon", "rules", "replay", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_mistakes_in_the_order_of_things_are_told(tmp_path: Path) -> None:
    """Data before rules, a trace before rules, a file or a directory that is not there, options that mean nothing."""
    rules, data = tmp_path / "r.yaml", tmp_path / "data"
    rules.write_text(json.dumps({"rules": [a_rule(watch=str(data))]}))
    put(data / "a.tif", 0)
    recorded(tmp_path / "t", *EVERY_FACT[:3])
    wrong = {
        (data, rules): "no rule files (*.yaml)",
        (tmp_path / "t", rules): "is a trace",
        (tmp_path / "nope.yaml", data): "there is no",
        (rules, tmp_path / "nope"): "there is no",
        (rules, tmp_path / "t", "--speed", 2): "belong to a directory",
        (rules, data, "--root", "/dota=/tmp"): "no rule watches /dota",
        (rules, data, "--root", f"{data}=/nowhere"): "there is no directory /nowhere",
        (rules, data, "--speed", 0): "--speed takes a number",
        (rules, tmp_path / "t", "--root", f"{data}=/tmp"): "belong to a directory",
    }
    for args, words in wrong.items():
        done = command(*args)

        assert done.returncode in (1, 2), (args, done.stdout)
        assert words in done.stderr, args


def test_many_files_left_for_one_reason_do_not_hide_the_others(tmp_path: Path) -> None:
    """What a person should look at comes first."""
    for number in range(200):
        put(tmp_path / f"{number}.txt", 0)
    put(tmp_path / "z.tif", 0, b"")
    (tmp_path / "r.yaml").write_text(json.dumps({"rules": [a_rule(watch=str(tmp_path))]}))
    told = command(tmp_path / "r.yaml", tmp_path).stdout

    assert told.index("z.tif") < told.index(".txt")
    assert "and 199 more" in " ".join(told.split())
    assert len(told.splitlines()) < 15


def test_a_pattern_that_leaves_out_data_is_not_hidden_behind_junk(tmp_path: Path) -> None:
    """Each pattern that ignores has a line of its own, and so has each kind of name that fits nothing."""
    for number in range(20):
        put(tmp_path / f"{number}.tmp", 0)
        put(tmp_path / f"{number}.log", 0)
    put(tmp_path / "again.tif", 0)
    put(tmp_path / "movie.tiff", 0)
    (tmp_path / "r.yaml").write_text(json.dumps({"rules": [{**a_rule(watch=str(tmp_path)), "ignore": ["*gain*"]}]}))
    told = command(tmp_path / "r.yaml", tmp_path).stdout

    assert "again.tif" in told and "movie.tiff" in told


def test_a_replay_without_words_is_of_the_rules_in_force_on_what_they_watch(tmp_path: Path) -> None:
    """`rules replay` alone asks the settings for the rules, and the rules for the directories."""
    put(tmp_path / "data" / "a.tif", 0)
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "r.yaml").write_text(json.dumps({"rules": [a_rule(watch=str(tmp_path / "data"))]}))
    (tmp_path / "config.yaml").write_text(json.dumps({"rules_dir": str(tmp_path / "rules")}))
    done = command("--config", tmp_path / "config.yaml")

    assert done.returncode == 0 and "1 batch of 1 file" in done.stdout, done.stderr


# ----------------------------------------------------------------------------- traces


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def of_the_journal(site: Site) -> list[dict[str, Any]]:
    """The daemon's own word: every batch as its journal shows it, through the command line."""
    runs = sorted(site.json("runs", "list", "--limit", "100000")["runs"], key=lambda run: run["id"])
    return [
        {
            "rule": run["rule"], "group": run["group"], "time": run["created_time"], "reason": run["reason"],
            "files": [member["path"] for member in site.json("runs", "show", str(run["id"]))["manifest"]],
        }
        for run in runs
    ]  # fmt: skip


def busy_rules(site: Site) -> list[dict[str, Any]]:
    """Rules with checks, companions, groups, markers and an `after`."""
    movies = site.rule(
        "movies", match=["{s}/{m}.tif"], batch={"group_by": ["s"], "files": 5, "idle": "1s"},
        complete={
            "quiescence": "300ms", "checks": [{"tiff": {"frames": 4}}],
            "with": [{"file": "{s}/{m}.xml", "wait": "1s", "missing": "go"}],
        },
    )  # fmt: skip
    soon = {"quiescence": "300ms"}
    qc = site.rule(
        "qc", match=["{s}/{m}.tif"], batch={"group_by": ["s"], "only_first": 3}, complete=soon,
        start={"command": {"run": ["/bin/true"]}}, proof="none",
    )  # fmt: skip
    marked = site.rule(
        "marked", match=["{s}/{m}.dat"], batch={"group_by": ["s"], "close_on": {"file": "{s}/DONE"}}, complete=soon,
        after={"rule": "qc", "same": ["s"]},
    )  # fmt: skip
    return [movies, qc, marked]


def session(site: Site, name: str) -> None:
    """Some movies, one of them cut, one rewritten, one without companion; data and their marker."""
    for number in range(8):
        stop = 2 if number == 5 else None
        directory = site.data / name
        movie = directory / f"m{number}.tif"
        simulator.tiff_movie(movie, frames=4, width=8, height=8, pause=lambda s: None, seed=number, stop_after=stop)
        if number % 2:
            simulator.companion_xml(directory / f"m{number}.xml", movie="m", pause=lambda s: None)
        put(directory / f"{number}.dat", number, bytes([number]))
    (site.data / name / "DONE").touch()


def until_done(site: Site, sessions: int, idle: int) -> None:
    """Wait until each session's marker has acted, so many batches closed as idle, and only cut movies are left."""

    def done() -> bool:
        if len(site.ask("SELECT id FROM batch WHERE rule = 3")) < sessions:
            return False
        if len(site.ask("SELECT id FROM batch WHERE reason LIKE 'idle%'")) < idle:
            return False
        rules = {rule["name"]: rule for rule in site.json("status")["rules"]}
        open_ = rules["movies"]["complete"] + rules["marked"]["complete"]
        return open_ == 0 and rules["movies"]["settling"] <= sessions

    site.until(done, 60, f"{sessions} sessions are done")


def test_a_recorded_run_replays_to_the_very_same_batches(site: Site) -> None:
    """Byte for byte: rule, group, time, reason and files of each, in order, after a restart and a crash too."""
    site.write_rules(*busy_rules(site))
    record = ("--record", str(site.base / "run.trace"))
    site.start(options=record)
    session(site, "a")
    until_done(site, 1, 1)
    site.stop()
    session(site, "b")
    site.start(options=record)
    until_done(site, 2, 2)
    (site.data / "a" / "m0.tif").write_bytes((site.data / "a" / "m1.tif").read_bytes())
    until_done(site, 2, 3)
    time.sleep(0.5)  # the trace's thread writes what was committed
    site.kill()
    mine = site.json("rules", "replay", record[1])
    theirs = of_the_journal(site)

    assert json.dumps(mine["batches"]) == json.dumps(theirs)
    assert len(theirs) >= 8
    assert mine["as_recorded"] is True
    assert ("b/m5.tif", "movies") in {(entry["path"], entry["rule"]) for entry in mine["left"]}
    assert site.json("rules", "replay", str(site.rules_dir), record[1])["batches"] == mine["batches"]
    assert_cuts_replay(site.base / "run.trace", site.base / "cut.trace")


def assert_cuts_replay(whole: Path, cut: Path) -> None:
    """Cut where a crash might have cut it, a trace still leads to what it holds; with a batch left out it does not."""
    data = whole.read_bytes()
    rand = random.Random(9)
    edges = [i for i in range(len(data)) if data.startswith(b'{"batch"', i)]
    for at in (*edges, *(edge + 20 for edge in edges), *(rand.randrange(2_000, len(data)) for _ in range(20))):
        cut.write_bytes(data[:at])
        try:
            assert replay_trace(cut).as_recorded is True, at
        except trace.TraceError as error:
            assert "is no trace" in error.message
    cut.write_bytes(data[: edges[0]] + data[data.index(b"\n", edges[0]) + 1 :])
    assert replay_trace(cut).as_recorded is False, "the first batch's line is missing from a life that goes on"


def test_a_recorded_history_is_replayed_with_other_rules(site: Site) -> None:
    """The same files at their own times, in the batches that other rules would have made; verdicts as recorded."""
    site.write_rules(*busy_rules(site))
    site.start(options=("--record", str(site.base / "run.trace")))
    session(site, "a")
    until_done(site, 1, 1)
    site.stop()
    for path in site.data.rglob("*.tif"):
        path.unlink()
    other = busy_rules(site)[0] | {"batch": {"group_by": ["s"], "files": 7}}
    report = replay_history(rules_of(other), site.base / "run.trace")

    assert [batch["reason"] for batch in report.batches[:1]] == ["files: 7 of 7"]
    assert left(report)["a/m5.tif"].startswith("2 of 4 frames")


def test_a_trace_in_a_watched_directory_is_refused(site: Site) -> None:
    """Watched directories are only read; a rule that comes later and watches the trace's directory ends it."""
    site.write_rules(site.rule("all"))
    site.config.write_text(json.dumps(site.settings))
    done = site.cli("serve", "--record", str(site.data / "t"), check=False)
    assert (done.returncode, list(site.data.iterdir())) == (1, [])
    assert "which is watched and so only read" in done.stderr
    recorder = trace.Recorder(site.base / "t")
    recorder.life(HEADER, Saved(), 1.0, 1.0)
    recorder.keep_out([str(site.data), str(site.base)])
    recorder.close()

    assert "which is watched" in recorder.fault
    assert list(trace.read(site.base / "t"))[-1] == trace.Ended(recorder.fault)


def test_a_trace_of_another_program_is_refused(tmp_path: Path) -> None:
    """Neither is one continued into somebody's file."""
    path = tmp_path / "notes"
    path.write_text("my notes\n")

    with pytest.raises(trace.TraceError, match="is no trace"):
        trace.Recorder(path)
    with pytest.raises(trace.TraceError, match="is no trace"):
        replay_trace(path)
    assert path.read_text() == "my notes\n"


def test_two_daemons_do_not_write_one_trace(tmp_path: Path) -> None:
    """The second is refused while the first lives, and let in afterwards."""
    first = trace.Recorder(tmp_path / "t")
    first.life(HEADER, Saved(), 1.0, 1.0)
    with pytest.raises(trace.TraceError, match="another daemon writes"):
        trace.Recorder(tmp_path / "t")
    first.close()
    trace.Recorder(tmp_path / "t").close()


HEADER = trace.Header("host", "UTC", 4, 86_400.0, 7)


def recorded(path: Path, *facts: model.Fact, **keys: Any) -> trace.Recorder:
    recorder = trace.Recorder(path, **keys)
    recorder.life(HEADER, Saved(), 10.0, DAY + 10.0)
    for fact in facts:
        recorder.round([fact], [])
    recorder.close()
    return recorder


FAULT = model.Fault("transient", "later", "wait", model.Scope.DESTINATION, 3.5, False)
STATE = (1, 2, 3, 4)
SET = model.ReclaimSet(
    1, 7, (model.ReclaimFile(1, "d/a\udcff", STATE, ".h"),), ({"copies": [["/d/a", None]]},), due_always=True
)
EVERY_FACT = (
    model.Seen(1, "d", [("a\udcff\n", STATE, ((1, 0), (-2, 5))), ("b", None, ())], 1.0, 1.5, "hint", "close", 3),
    model.Unreadable(1, "", ("a", "b"), "Permission denied", 2.0),
    model.Vanished(1, "d", None, 2.0),
    model.Vanished(1, "d", ("a",), 2.0),
    model.Swept(1, True, 1.0, 2.0, False, 7, 3, "why"),
    model.RootChanged(1, "lost", "gone", "mount it", "none", 2.0),
    model.Marked(1, 4, 2.0),
    model.Checked(
        1, 1, "d/a", STATE, model.Verdict.SUSPECT, "17", 2.0, ("x",), (("tiff", 17),), "md5:00:0:1", "x: ", ("y",)
    ),
    model.Tick(2.0, DAY + 2.25),
    model.Prepared(1, 1, ["opaque", {"a": [1]}], 2.0),
    model.Started(1, 1, {"handle": [1, 2]}, 2.0),
    model.NotStarted(1, 1, FAULT, 2.0),
    model.StartUnknown(1, 1, "lost", 2.0),
    model.Polled(1, 1, "failed", 2.0, "w", "h", FAULT, 1, 2, {"out": [1]}, ("a",), 0.5),
    model.Proved(1, 1, [{"path": "a", "size": 1}], 2.0, ("b",)),
    model.Mismatch(1, 1, {"a": "differs"}, 2.0, ("c",)),
    model.CannotVerify(1, 1, FAULT, 2.0),
    model.Order(5, "files.go", {"path": "/data/a"}, "me", "because", 2.0),
    model.Selected((SET,), 3, 2.0, "why"),
    model.Removed(4, "aside", False, ("aside", ""), "w", "h", 2.0, (("/d/a", "/d/a.kept-1"),)),
    model.LookedBack(7, 1, [[12, {"chip": "a\udcff"}]], 3, 2.0, "why"),
    model.Gauged("/", 5, 10, 2.0, 3, 4),
    model.Gauged("/", 0, 0, 2.0, error="/ is not mounted", away="mount it"),
    model.Mounted({"/": "", "/data": "/data"}, 2.0),
    model.Pressed(0.5, None, ("SerialEM",), 2.0),
    model.Troubled("mqtt", "the broker refuses", "see the password", 2.0),
)


def test_every_fact_comes_back_as_it_was(tmp_path: Path) -> None:
    """Equal in value and in type, whatever bytes a name holds."""
    recorded(tmp_path / "t", *EVERY_FACT)
    entries = list(trace.read(tmp_path / "t"))

    assert entries[1:-1] == list(EVERY_FACT)
    assert [type(entry) for entry in entries[1:-1]] == [type(fact) for fact in EVERY_FACT]
    assert {type(fact).__name__ for fact in EVERY_FACT} | {"RulesOffered"} == set(trace._FACTS)
    assert entries[-1] == trace.Ended("")


def test_what_the_journal_gave_comes_back_as_it_was(tmp_path: Path) -> None:
    """Open runs, marks, alarms, baselines: the engine restores from a trace what it restored from the journal."""
    attempt = SavedAttempt(2, {"p": 1}, None, 5.0, None, None)
    held = model.RunState.HELD
    run = OpenRun(
        7, 1, {"s": "a"}, held, "why", 1.0, 2.0, 2, "/out", (3,), None, "e", "h", 1, 2, {"rule": "r"}, attempt, None
    )
    saved = Saved(
        9, (run,), {"paused": "by me"}, {(1, 1): 3.0}, (SavedMark(1, "{}", "taken", 3, 4.0),),
        (SavedAlarm("k", "what", "hint", 1.0, None, None),), [{"file": "f", "text": "t"}],
        {(1, "HELD"): Count(1, 1, 2)}, {1: "r"}, {1: "/data"}, (SavedReclaim(4, True, SET),), 4,
    )  # fmt: skip
    recorder = trace.Recorder(tmp_path / "t")
    recorder.life(HEADER, saved, 1.5, DAY)
    recorder.close()

    assert next(trace.read(tmp_path / "t")) == trace.Life(HEADER, saved, 1.5, DAY)


def test_a_torn_last_line_is_the_end_and_a_new_life_may_follow_it(tmp_path: Path) -> None:
    """A daemon that was killed wrote half a line; damage in the middle is told with its place."""
    path = tmp_path / "t"
    recorded(path, *EVERY_FACT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    count = len(list(trace.read(path)))
    recorded(path, EVERY_FACT[8])
    assert len(list(trace.read(path))) == count + 3
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:9] + b"\n", *lines[5:]]))

    with pytest.raises(trace.TraceError, match=":5: the line is damaged"):
        list(trace.read(path))


def test_damaged_traces_are_told_by_line_and_never_crash(tmp_path: Path) -> None:
    """A flipped byte, a line left out or twice: an error that names the line, or a replay; nothing else."""
    path = tmp_path / "t"
    recorded(path, *EVERY_FACT[:9])
    whole = path.read_bytes()
    rand = random.Random(5)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rand.randint(1, 3)):
            damaged[rand.randrange(len(damaged))] = rand.randrange(256)
        path.write_bytes(damaged)
        try:
            replay_trace(path)
        except trace.TraceError as error:
            assert str(path) in error.message
    first, *_, last = whole.splitlines(keepends=True)
    for line in (b"[" * 100_000, b'["Tick",1e300,1e300]', b'["Tick",2.0,1e12]', b'["Order",1,"explain",7,"","",1.0]'):
        path.write_bytes(first + line + b"\n" + last)
        try:
            replay_trace(path)
        except trace.TraceError as error:
            assert str(path) in error.message


def test_a_damaged_trace_is_told_with_other_rules_too(tmp_path: Path) -> None:
    """Whatever the way, no traceback."""
    path = tmp_path / "t"
    recorded(path, EVERY_FACT[0])
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    fields = json.loads(second)
    fields[5] = None
    path.write_bytes(b"".join([first, json.dumps(fields).encode() + b"\n", *rest]))

    with pytest.raises(trace.TraceError, match="cannot be replayed"):
        replay_history(rules_of(a_rule(watch="/data")), path)


def test_a_trace_torn_at_its_very_beginning_is_begun_anew(tmp_path: Path) -> None:
    """A daemon that was killed as it began must be able to start again with the same --record."""
    (tmp_path / "t").write_bytes(b'{"tra')
    recorded(tmp_path / "t", EVERY_FACT[8])

    assert len(list(trace.read(tmp_path / "t"))) == 3


def test_a_verdict_is_recalled_for_the_checks_that_gave_it_only(tmp_path: Path) -> None:
    """Two rules judged one file differently; each keeps its own word, and another check has none."""
    one, two = (
        a_rule(name=name, complete={"quiescence": "10s", "checks": [check]})
        for name, check in (("one", {"size": {"at_least": "1B"}}), ("two", "xml"))
    )
    text = json.dumps({"rules": [one, two]})
    rules = tuple(replace(rule, id=n) for n, rule in enumerate(parse_rules([("r.yaml", text)]).rules, 1))
    state = (5, int((DAY + 10) * 1e9), 1, 1)
    wants = ((1, 0), (2, 0))
    facts = [
        model.RulesOffered(rules, {"/data": 1}, [{"file": "r.yaml", "text": text}], 10.0),
        model.Seen(1, "", [("a.tif", state, wants)], 11.0, 11.0, "hint", "close", 0),
        model.Checked(1, 1, "a.tif", state, model.Verdict.COMPLETE, "5 bytes", 25.0),
        model.Checked(2, 1, "a.tif", state, model.Verdict.INCOMPLETE, "cut", 25.0),
    ]
    recorded(tmp_path / "t", *facts)

    def outcome(*rules: dict[str, Any]) -> tuple[list[list[str]], str]:
        report = replay_history(rules_of(*rules), tmp_path / "t")
        return files(report), left(report).get("a.tif", "")

    assert outcome(one | {"priority": 3}) == ([["a.tif"]], "")
    assert outcome(two | {"priority": 3})[1].startswith("cut")
    other = outcome(one | {"complete": {"checks": ["cbf"]}})
    assert other == ([["a.tif"]], ""), "unknown lets a file go"


def test_companions_that_came_late_are_told_once_and_truly(tmp_path: Path) -> None:
    """A cut one is there; it is not `not there`, nor has no file been sent that it belongs to."""
    put(tmp_path / "m1.tif", 0)
    put(tmp_path / "m1.xml", 500, b"<a><b>")
    complete = {"quiescence": "10s", "with": [{"file": "{x}.xml", "checks": ["xml"], "wait": "20s", "missing": "go"}]}
    report = replayed(tmp_path, a_rule(complete=complete, batch={"files": 9, "oldest_waits": "9999d"}))
    assert files(report) == [["m1.tif"]], "a wait of years is over at once"

    report = replayed(tmp_path, a_rule(complete=complete))
    (entry,) = report.left
    assert entry["path"] == "m1.xml"
    assert entry["because"].startswith("a companion of m1.tif, which went without it: ends before")


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    """Opening it would wait for a reader, and the daemon's start with it."""
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(trace.TraceError, match="cannot be written"):
        trace.Recorder(tmp_path / "pipe")


def test_a_trace_needs_nothing_installed_for_checks_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdicts are recorded; on a laptop without h5py it replays all the same."""
    text = json.dumps({"rules": [a_rule(complete={"checks": ["eiger"]})]})
    source = [{"file": "r.yaml", "text": text}]
    recorded(tmp_path / "t", model.RulesOffered(parse_rules([("r.yaml", text)]).rules, {"/data": 1}, source, 1.0))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "h5py" else find_spec(name))
    assert parse_rules([("r.yaml", text)]).faults

    assert replay_trace(tmp_path / "t").as_recorded is True


def test_a_trace_has_an_end(tmp_path: Path) -> None:
    """At its limit the recording ends with a reason, and the daemon goes on; the last line says so."""
    recorder = recorded(tmp_path / "t", *EVERY_FACT * 50, bytes_max=5_000)

    assert "has reached 5,000 bytes" in recorder.fault
    assert (tmp_path / "t").stat().st_size < 5_500
    assert list(trace.read(tmp_path / "t"))[-1] == trace.Ended(recorder.fault)


def test_a_trace_on_a_full_disk_ends_the_recording_and_not_the_daemon(tmp_path: Path) -> None:
    """/dev/full refuses every byte."""
    (tmp_path / "t").symlink_to("/dev/full")
    recorder = recorded(tmp_path / "t", *EVERY_FACT)

    assert "No space left on device" in recorder.fault


def test_a_disk_that_hangs_costs_a_bounded_number_of_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop never waits for the trace: what waits has a limit, and beyond it the recording ends."""
    monkeypatch.setattr(trace, "WAITING_MAX", 100)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    recorder = trace.Recorder(tmp_path / "pipe")
    big = model.Seen(1, "d", [("n" * 200, STATE, ((1, 0),))] * 90, 1.0, 1.0, "hint")
    recorder.life(HEADER, Saved(), 1.0, 1.0)
    for _ in range(2_000):
        recorder.round([big], [])
        if recorder.fault:
            break
    os.close(reader)
    recorder.close()  # the thread meets the broken pipe

    assert "is too slow" in recorder.fault  # the reason for the end, not what the end met
