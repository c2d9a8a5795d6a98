"""One screen that a tired operator reads in ten seconds: the answer first, nothing cut in silence, its age told."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.site import Site
from tests.test_storage import closed, lab_of, reading
from tests.test_storage import rule as one_rule
from trigger_daemon.cli import glance, runs, text
from trigger_daemon.core import runs as core_runs
from trigger_daemon.core.model import RunState
from trigger_daemon.rates import STEP_S, STEPS, Rates

GB = 10**9


def rule(name: str = "krios-movies", **more: Any) -> dict[str, Any]:
    return {"name": name, "state": "active", "settling": 12, "complete": 40, "blocked": 0, "stalled": 0,
            "runs": {"ACTIVE": 2, "VERIFIED": 900}, "files_done": 12_345, "bytes_done": 900 * GB,
            "files_per_min": 34.0, "bytes_per_s": 210_000_000, "bytes_per_s_lately": [10**8] * 30} | more  # fmt: skip


def alarm(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"key": f"k{number}", "what": f"alarm number {number} of a destination that is down", "hint": "mount it",
            "since_time": time.time() - 60 * number, "acked_by": None} | more  # fmt: skip


def now(**more: Any) -> dict[str, Any]:
    """Return the status of an ordinary night: two rules, two runs at work, some waiting, two disks."""
    working = [
        {"run": 900 + n, "rule": "krios-movies", "state": "ACTIVE", "files": 20, "bytes": 40 * GB, "files_done": 5,
         "bytes_done": 10 * GB, "bytes_per_s": 210_000_000, "left_s": 143}
        for n in range(2)
    ]  # fmt: skip
    waits = [{"state": "PENDING", "why": "storage: 3 GB are needed on /data, 1 GB lie above its reserve", "hint": "",
              "runs": 12, "files": 240, "bytes": 36 * GB, "rule": "krios-movies", "first_run": 905}]  # fmt: skip
    volumes = [
        {"path": path, "total_bytes": 10_000 * GB, "free_bytes": 2_500 * GB, "fill_bytes_per_s": 500_000_000,
         "full_in_s": 5_000, "state": "ok", "error": None}
        for path in ("/data", "/mnt/archive")
    ]  # fmt: skip
    return {
        "host": "krios1",
        "daemon": {"running": True, "version": "0.1.0", "health": "ok", "pid": 4711, "started_time": time.time() - 9e4,
                   "heartbeat_age_s": 1.0, "heartbeat_time": time.time(), "state_dir": "/s", "journal": True},
        "rules": [rule(), rule("gain", runs={"VERIFIED": 3}, settling=0, complete=0, bytes_per_s=0, files_per_min=0)],
        "working": working, "waiting": [], "waits": {"groups": waits, "more_runs": 0},
        "waiting_counts": {"HELD": 0, "INACTIVE": 0, "PENDING": 12},
        "roots": [{"path": "/data", "health": "ok", "why": "", "hint": "", "events": "inotify"}], "volumes": volumes,
        "throttle": {"instrument": "", "bandwidth_bytes_per_s": None}, "alarms": [], "rules_fault": None,
        "undecided": {}, "paused": "",
    } | more  # fmt: skip


def lines(status: dict[str, Any], *, height: int | None = 23, width: int = 80, live: bool = False) -> list[str]:
    console = text.console(io.StringIO())
    console.width = width
    console.print(glance.picture(status, console, height=height, live=live))
    return console.file.getvalue().splitlines()


# -------------------------------------------------------------------------- screen


@pytest.mark.parametrize("live", [False, True])
def test_an_ordinary_night_fits_80_by_24_whole(live):
    """Nothing is cut: rules with rates, progress with time left, what waits for what, disks with time to full."""
    shown = lines(now(), live=live)
    whole = "\n".join(shown)

    assert len(shown) <= 22 and max(map(len, shown)) <= 80 and "…" not in whole and "more" not in whole
    assert shown[0] == "All is well: 2 runs at work."
    for word in ("krios-movies", "210 MB/s", "2 ACTIVE", "2 min left", "25 %", "1 h 23 min", "inotify",
                 "12  PENDING  krios-movies  storage: 3 GB are needed on /data", "1 GB lie above its"):  # fmt: skip
        assert word in whole, whole


def test_many_rules_and_alarms_stay_readable_and_what_is_cut_is_counted():
    """20 rules, 30 alarms, 24 lines: each section keeps its place, and numbers add up."""
    status = now(rules=[rule(f"rule-{n}") for n in range(20)], alarms=[alarm(n) for n in range(30)])
    status["working"] *= 25
    for live in (False, True):
        shown = lines(status, live=live)
        rules = sum(line.startswith("rule-") for line in shown)
        alarms = sum("alarm number" in line for line in shown)

        assert len(shown) <= 23 and max(map(len, shown)) <= 80
        assert shown[0] == "A person is needed: 30 alarms stand."
        assert alarms >= 1 and f"+{30 - alarms} more: `trigger-daemon alarms list`" in shown
        assert rules >= 2 and f"+{20 - rules} more: `trigger-daemon rules list`" in shown
        assert any("/mnt/archive" in line for line in shown) and any("PENDING" in line for line in shown)
    whole = lines(status, height=None)
    assert sum("hint: mount it" in line for line in whole) == 30 and not any("more:" in line for line in whole)


@pytest.mark.parametrize("height", range(5, 60, 3))
def test_what_is_shown_and_what_is_counted_is_all_there_is(height):
    """At any height: the items and the counts of the rest add up, section by section."""
    status = now(rules=[rule(f"rule-{n}") for n in range(7)], alarms=[alarm(n) for n in range(9)])
    shown = lines(status, height=height)
    counts = re.findall(r"\+(\d+) more: `trigger-daemon (\w+) ", "\n".join(shown))
    left = {command: int(count) for count, command in counts if command in ("alarms", "rules")}

    assert sum("alarm number" in line for line in shown) + left.get("alarms", 0) == 9
    assert sum(line.startswith("rule-") for line in shown) + left.get("rules", 0) == 7
    assert len(shown) <= max(height, 25)


@pytest.mark.parametrize(
    ("more", "begins"),
    [
        ({"waiting_counts": {"HELD": 1, "INACTIVE": 0, "PENDING": 0}}, "A person is needed: 1 run HELD."),
        ({"alarms": [alarm(acked_by="ada")]}, "Somebody looks after 1 alarm; all else is well."),
        ({"paused": "ada: beam is down"}, "Paused on purpose: ada: beam is down"),
        ({"throttle": {"instrument": "SerialEM runs"}}, "Standing still for the instrument: SerialEM runs"),
        ({"roots": [{"path": "/d", "health": "lost", "why": "gone", "hint": "", "events": ""}]}, "Degraded, and"),
        ({"rules": [], "working": []}, "All is well, and nothing to do: no rules are in force."),
        ({"rules_fault": {"file": "a", "line": 1, "column": 1, "message": "m"}}, "The rule files have a fault"),
    ],
)  # fmt: skip
def test_the_first_line_answers_is_all_well(more, begins):
    """One line, before anything else, and never "well" when something is not."""
    assert lines(now(**more))[0].startswith(begins)


def test_what_is_old_is_told_to_be_old():
    """A heartbeat that does not come makes all that is shown a memory, and it is said so."""
    status = now()
    status["daemon"]["heartbeat_age_s"] = 9.0
    assert any(line.startswith("OLD: what follows is 9 s old") for line in lines(status))
    status["daemon"]["heartbeat_age_s"] = 90.0
    assert lines(status)[0] == "A person is needed: the daemon's last heartbeat is 1 min old."


def test_names_move_no_terminal():
    """What people named is shown, not obeyed, in every section."""
    evil = "a\x1b[2J\nb"
    status = now(rules=[rule(evil)], alarms=[alarm(what=evil, hint=evil)])
    status["waits"]["groups"][0] |= {"why": evil, "rule": evil, "state": "HELD", "hint": evil}
    status["roots"][0] |= {"path": evil, "health": "lost", "why": evil}
    status["volumes"][0] |= {"path": evil}
    for height in (23, None):
        assert not any("\x1b" in line for line in lines(status, height=height))


# --------------------------------------------------------------------------- rates


def test_rates_are_of_the_last_minutes():
    """Files and bytes over the window; an hour later nothing is left of them; what moves is never negative."""
    rates = Rates()
    rules = [rule(files_done=0, bytes_done=0)]
    rates.sample(0.0, rules, [])
    for second in range(2, 122, 2):
        rules = [rule(files_done=second // 20 * 10, bytes_done=second // 20 * GB)]
        working = [{"rule": "krios-movies", "bytes_done": second % 20 * GB // 20}]
        rates.sample(float(second), rules, working)

    assert 29 <= rules[0]["files_per_min"] <= 31 and abs(rules[0]["bytes_per_s"] - GB / 20) < GB / 500
    assert len(rules[0]["bytes_per_s_lately"]) == STEPS and min(rules[0]["bytes_per_s_lately"]) >= 0
    for at, done in ((122.0, 4 * GB), (124.0, 0), (126.0, 3 * GB), (128.0, 5 * GB)):  # an attempt begins anew
        rates.sample(at, rules, [{"rule": "krios-movies", "bytes_done": done}])
    assert sum(rules[0]["bytes_per_s_lately"]) * STEP_S == 11 * GB, "what it did is not undone, nor counted twice"
    rates.sample(3_600.0, rules, [])
    assert rules[0]["bytes_per_s"] == 0 and sum(rules[0]["bytes_per_s_lately"]) == 0


def test_rates_hold_nothing_of_rules_that_stand_still():
    """A thousand rules that do nothing cost a pair of numbers each, and no history in the heartbeat."""
    rates = Rates()
    for at in range(0, int(STEPS * STEP_S), 2):
        rules = [rule(f"r{n}", files_done=5, bytes_done=5) for n in range(1_000)]
        rates.sample(float(at), rules, [])

    assert rates._steps == {} and all(of["bytes_per_s_lately"] == [] for of in rules)


# --------------------------------------------------------------------------- waits


def test_runs_wait_by_reason_with_counts():
    """All that wait for one thing are one line, also those behind the first of their queue; no number splits them."""
    lab = lab_of(one_rule())
    for number in range(5):
        closed(lab, f"{number}.tif", 495 * GB)
    reading(lab, 500 * GB)
    lab.engine.runs.open[3].waiting = "run 1, which takes an earlier version of the same file"
    lab.engine.runs.open[4].waiting = "run 2, which takes an earlier version of the same file"
    lab.order("runs.hold", ids=[5])
    answer = lab.order("runs.waiting", ids=[], grouped=True)["waits"]

    assert [(of["state"], of["runs"], of["first_run"]) for of in answer["groups"]] == [
        ("HELD", 1, 5), ("PENDING", 2, 1), ("PENDING", 2, 3),
    ]  # fmt: skip
    assert answer["groups"][1]["why"].startswith("storage: 495 GB are needed on /out")
    assert answer["groups"][1]["bytes"] == 990 * GB and answer["more_runs"] == 0


def test_reasons_and_runs_that_are_looked_at_are_bounded(monkeypatch):
    """Thirty reasons are twenty and a count; what is not looked at is counted too."""
    monkeypatch.setattr(core_runs, "WAITS_LOOKED_MAX", 30)
    lab = lab_of(one_rule())
    for number in range(35):
        closed(lab, f"{number}.tif", 495 * GB)
    reading(lab, 500 * GB)
    for number, run in lab.engine.runs.open.items():
        run.waiting = f"destination /d{number}: away"
    waits = lab.engine.runs.waits()

    assert len(waits["groups"]) == core_runs.WAITS_MAX
    assert sum(of["runs"] for of in waits["groups"]) + waits["more_runs"] == 35


# ------------------------------------------------------------------------ runs show


def test_progress_of_a_run_tells_rate_and_time_left():
    """Bytes, files, rate and time left of a run at work; nothing of one that is not."""
    run = {"state": RunState.ACTIVE, "bytes": 40 * GB, "files": 20, "bytes_done": 10 * GB, "files_done": 5,
           "changed_time": 1_000.0}  # fmt: skip

    assert runs._progress(run, 1_050.0) == "25 %, 10.0 GB of 40.0 GB, 5 of 20 files, 200 MB/s, 2 min left"
    assert runs._progress(run | {"state": RunState.HELD}, 1_050.0) == ""


@pytest.fixture
def here(shm_path):
    site = Site(shm_path)
    yield site
    if site.process is not None and site.process.poll() is None:
        site.kill()


def test_a_long_manifest_is_cut_with_a_count_and_all_can_be_had(here):
    """Ten of forty files, how many more there are, and where the copies lie; --all and JSON have all."""
    here.write_rules(here.rule(batch={"files": 40}))
    for number in range(40):
        (here.data / f"{number:02}.tif").write_bytes(b"x")
    here.start()
    here.until_verified(40)
    shown = here.cli("runs", "show", "1").stdout
    whole = here.cli("runs", "show", "1", "--all").stdout

    assert shown.count(".tif\n") == 20 and "+30 more files: `trigger-daemon runs show 1 --all`" in shown
    assert f"40 proved, below {here.out}" in shown
    assert whole.count(".tif\n") == 80 and "more file" not in whole
    assert len(here.json("runs", "show", "1")["manifest"]) == 40


# --------------------------------------------------------------------------- watch


class Screen:
    """`status --watch` on a terminal of its own."""

    def __init__(self, site: Site, columns: int = 80, rows: int = 24) -> None:
        self.master, slave = pty.openpty()
        self._size(columns, rows)
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trigger_daemon", "status", "--watch", "--config", str(site.config)],
            stdin=slave, stdout=slave, stderr=slave, env=plain | {"TERM": "xterm-256color", "NO_COLOR": "1"},
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.written = ""

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        self._size(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def until(self, holds: Callable[[str], bool], what: str) -> str:
        """Return what was written since the last call, once it holds."""
        end, self.written = time.monotonic() + 30, ""
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.written += os.read(self.master, 65_536).decode("utf-8", "replace")
                if holds(self.written):
                    return self.written
        raise AssertionError(f"never {what}:\n{self.written[-3000:]}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_watch_survives_a_restart_and_a_resize_and_q_ends_it(here):
    """It says that the daemon is gone, goes on with the next one, fits another size, and gives the terminal back."""
    here.write_rules(here.rule())
    here.start()
    screen = Screen(here)
    try:
        screen.until(lambda said: "All is well" in said and "q quits" in said, "well")
        here.kill()
        screen.until(lambda said: "NOT RUNNING" in said, "said to be gone")
        here.start()
        screen.until(lambda said: "All is well" in said, "well again")
        screen.resize(60, 12)
        frame = screen.until(lambda said: said.count("q quits") >= 2, "drawn in its new size")
        last = frame.rsplit("\x1b[H", 1)[-1]
        assert max(map(len, re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", last).splitlines())) <= 60
        assert "\x1b[2J" not in frame, "it is cleared: it would flicker"
        os.write(screen.master, b"q")
        screen.until(lambda said: "\x1b[?1049l" in said, "given back")
        assert screen.process.wait(10) == 0
    finally:
        screen.close()


def test_watch_says_when_what_it_shows_is_old(here):
    """A daemon that is stopped in its tracks still holds its state directory; its last word grows old."""
    here.write_rules(here.rule())
    here.start()
    screen = Screen(here)
    try:
        screen.until(lambda said: "All is well" in said, "well")
        here.process.send_signal(signal.SIGSTOP)
        screen.until(lambda said: "OLD: what follows is" in said, "said to be old")
        here.process.send_signal(signal.SIGCONT)
        screen.until(lambda said: "All is well" in said and "OLD" not in said.rsplit("\x1b[H", 1)[-1], "fresh again")
    finally:
        here.process.send_signal(signal.SIGCONT)
        screen.close()


# ------------------------------------------------------------------------ daemon


def test_status_counts_what_waits_and_how_fast_it_goes(here):
    """A real daemon: runs that wait for a pause are one line with their count; rates follow the work."""
    here.write_rules(here.rule())
    here.start()
    (here.data / "first.tif").write_bytes(b"x" * 1_000_000)
    here.until_verified(1)
    here.until(lambda: here.json("status")["rules"][0]["bytes_per_s"] > 0, 10, "a rate is told")
    here.cli("pause", "--why", "beam is down")
    for number in range(7):
        (here.data / f"{number}.tif").write_bytes(b"x")
    here.until(lambda: here.json("status")["waiting_counts"]["PENDING"] == 7, 20, "seven wait")
    status = here.json("status")

    assert [(of["state"], of["runs"], of["rule"]) for of in status["waits"]["groups"]] == [("PENDING", 7, "first")]
    assert "beam is down" in status["waits"]["groups"][0]["why"] and status["waits"]["more_runs"] == 0
    assert sum(status["rules"][0]["bytes_per_s_lately"]) > 0
    shown = here.cli("status").stdout
    assert shown.startswith("Paused on purpose:") and "7  PENDING  first" in shown
    here.stop()
    shown = here.cli("status", check=False).stdout
    assert shown.startswith("NOT RUNNING") and "7  PENDING  first  the daemon to be started" in shown


def test_who_has_given_an_order_sees_what_it_did(here):
    """The status that is asked for after an order's answer is never one of before it."""
    here.write_rules(here.rule())
    here.start()
    here.cli("pause")
    here.cli("rules", "pause", "first")
    paused = here.json("status")
    here.cli("rules", "resume", "first")
    here.cli("resume")
    resumed = here.json("status")
    here.stop()

    assert paused["paused"] and paused["rules"][0]["state"] == "paused"
    assert not resumed["paused"] and resumed["rules"][0]["state"] == "active"
