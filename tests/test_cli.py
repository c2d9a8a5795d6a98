"""Laws of the command line: what programs may rely on, what terminals are spared, what works with the daemon down."""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.site import Site
from trigger_daemon.cli import glance, place, text
from trigger_daemon.cli.reference import reference
from trigger_daemon.config import load_settings
from trigger_daemon.errors import ConfigError

COMMAND = [sys.executable, "-P", "-m", "trigger_daemon"]
REPOSITORY = Path(__file__).resolve().parent.parent
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

NEWLINE = b"two\nlines.tif"
ESCAPE = b"red\x1b[31m.tif"
LATIN = b"caf\xe9.tif"  # no UTF-8
NAMES = (b"plain.tif", NEWLINE, ESCAPE, LATIN)


def make_site(base: Path) -> Site:
    """Write rules whose files end in as many different stages."""
    here = Site(base, quiescence="300ms")
    quick = {"quiescence": "300ms"}
    here.write_rules(
        here.rule("archive", match=["{session}/{movie}.tif"]),
        here.rule("grouped", match=["grouped/{sample}/{frame}.dat"], batch={"group_by": ["sample"], "files": 100}),
        here.rule("broken", match=["broken/{frame}.raw"], start={"command": {"run": ["/bin/false"]}}),
        here.rule(
            "paired", match=["paired/{movie}.mrc"],
            complete={**quick, "with": [{"file": "paired/{movie}.xml", "wait": "100ms", "missing": "block"}]},
        ),
        here.rule("later", match=["old/{frame}.bin"], existing="ignore"),
        here.rule("once", match=["once/{frame}.cbf"], on_rewrite="ignore"),
    )  # fmt: skip
    for directory in ("monday", "grouped/s1", "broken", "paired", "old", "once"):
        (here.data / directory).mkdir(parents=True)
    (here.data / "old" / "a.bin").write_bytes(b"there before")
    return here


def command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that belongs to no site."""
    return subprocess.run(
        [*COMMAND, *args], env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def close(site: Site) -> None:
    if site.process is not None and site.process.poll() is None:
        site.kill()


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="td", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def live(base: Path) -> Iterator[Site]:
    """A daemon at work: files verified, waiting, blocked, held, from before."""
    site = make_site(base / "live")
    site.start()
    for name in NAMES:
        (site.data / "monday" / os.fsdecode(name)).write_bytes(b"movie " + name)
    (site.data / "grouped" / "s1" / "1.dat").write_bytes(b"frame")
    (site.data / "broken" / "1.raw").write_bytes(b"raw")
    (site.data / "paired" / "m1.mrc").write_bytes(b"movie")
    (site.data / "once" / "1.cbf").write_bytes(b"first")
    site.until(lambda: settled(site), 30, "every file is where it stays")
    yield site
    close(site)


def settled(site: Site, verified: int = 5, blocked: int = 1) -> bool:
    beat = site.heartbeat()
    by_name = {rule["name"]: rule for rule in beat["rules"]} if beat else {}
    return (
        site.states() == {"VERIFIED": verified, "HELD": 1}
        and by_name["grouped"]["complete"] == 1
        and by_name["paired"]["blocked"] == blocked
        and len(site.ask("SELECT rule FROM baseline")) == len(by_name)
    )


@pytest.fixture(scope="module")
def down(base: Path) -> Iterator[Site]:
    """A daemon that worked, and was stopped; one file came since."""
    site = make_site(base / "down")
    site.start()
    (site.data / "monday" / "sent.tif").write_bytes(b"sent")
    (site.data / "monday" / "rewritten.tif").write_bytes(b"before")
    (site.data / "broken" / "1.raw").write_bytes(b"raw")
    site.until(lambda: site.states() == {"VERIFIED": 2, "HELD": 1}, 30, "two verified, one held")
    assert site.stop() == 0
    (site.data / "monday" / "late.tif").write_bytes(b"late")
    (site.data / "monday" / "rewritten.tif").write_bytes(b"after, and longer")
    yield site


def path_of(site: Site, *parts: str | bytes) -> str:
    return "/".join([str(site.data), *(os.fsdecode(part) for part in parts)])


def stage(site: Site, rule: str, *parts: str | bytes) -> dict:
    told = site.json("explain", path_of(site, *parts))
    return {about["rule"]: about for about in told["rules"]}[rule]


# --------------------------------------------------------------------------- JSON


def test_status_has_the_documented_shape(live):
    """The fields of the interface are there, with times in RFC 3339."""
    now = live.json("status")

    daemon = now["daemon"]
    assert daemon["running"] is True
    assert daemon["pid"] == live.process.pid
    assert daemon["events"] == {str(live.data): "inotify"}
    assert RFC3339.fullmatch(daemon["started_time"])
    assert daemon["health"] == "alarm"
    rules = {rule["name"]: rule for rule in now["rules"]}
    assert rules["archive"] | {"runs": None} == rules["archive"] | {"runs": None, "files_done": 4}
    assert rules["archive"]["runs"] == {"VERIFIED": 4}
    assert rules["archive"]["bytes_done"] == sum(len(b"movie " + name) for name in NAMES)
    assert rules["grouped"]["complete"] == 1
    assert rules["broken"]["runs"] == {"HELD": 1}
    for volume in now["volumes"]:
        assert {"path", "total_bytes", "free_bytes", "fill_bytes_per_s", "full_in_s", "state"} <= volume.keys()
    assert {alarm["key"] for alarm in now["alarms"]} >= {"held:broken", "blocked:paired"}
    assert all(RFC3339.fullmatch(alarm["since_time"]) and alarm["hint"] for alarm in now["alarms"])
    assert now["rules_fault"] is None
    assert [(run["rule"], run["state"]) for run in now["waiting"]] == [("broken", "HELD")]


def test_runs_list_has_the_documented_shape(live):
    """Every field of the interface, the newest run first."""
    runs = live.json("runs", "list")["runs"]

    wanted = {"id", "rule", "group", "state", "waiting_for", "files", "bytes", "reason", "attempts", "error", "hint",
              "created_time", "changed_time"}  # fmt: skip
    assert all(wanted <= run.keys() for run in runs)
    assert [run["id"] for run in runs] == sorted((run["id"] for run in runs), reverse=True)
    assert all(RFC3339.fullmatch(run["changed_time"]) for run in runs)
    held = [run for run in runs if run["state"] == "HELD"]
    assert [run["rule"] for run in held] == ["broken"]
    assert held[0]["error"] and held[0]["hint"] and held[0]["waiting_for"]


def test_runs_list_is_narrowed_by_rule_state_and_limit(live):
    """Filters agree with the whole list."""
    every = live.json("runs", "list")["runs"]

    archive = live.json("runs", "list", "--rule", "archive", "--state", "verified", "--limit", "2")["runs"]
    assert [run["id"] for run in archive] == [run["id"] for run in every if run["rule"] == "archive"][:2]
    older = live.json("runs", "list", "--before", str(every[1]["id"]))["runs"]
    assert [run["id"] for run in older] == [run["id"] for run in every[2:]]


def test_runs_show_tells_all_of_one_run(live):
    """Attempts, transitions, handle, and the manifest with digests."""
    number = stage(live, "archive", "monday", "plain.tif")["run"]
    run = live.json("runs", "show", str(number))

    assert run["id"] == number
    assert [move["to"] for move in run["transitions"]] == ["PENDING", "STARTING", "ACTIVE", "SUCCEEDED", "VERIFIED"]
    assert {"from", "to", "because", "time"} <= run["transitions"][0].keys()
    member = run["manifest"][0]
    assert (member["path"], member["size"]) == ("monday/plain.tif", len(b"movie plain.tif"))
    assert member["digest"].startswith("xxh3:")
    assert member["mtime_ns"] == os.stat(path_of(live, "monday", "plain.tif")).st_mtime_ns
    assert run["handle"] and run["output"] and len(run["attempts"]) == 1


def test_explain_names_a_stage_for_any_file(live):
    """Each file has one stage a rule, with words for people."""
    expected = {
        ("archive", "monday", "plain.tif"): "verified",
        ("archive", "monday", "notes.txt"): "unmatched",
        ("archive", "monday", ".hidden.tif"): "ignored",
        ("archive", "monday", "never.tif"): "gone",
        ("grouped", "grouped", "s1", "1.dat"): "waiting",
        ("broken", "broken", "1.raw"): "held",
        ("paired", "paired", "m1.mrc"): "blocked",
        ("later", "old", "a.bin"): "baseline",
    }
    found = {key: stage(live, *key) for key in expected}

    assert {key: about["stage"] for key, about in found.items()} == expected
    assert all(about["because"] for about in found.values())
    assert found["archive", "monday", "never.tif"]["because"] == "no such file, and nothing is known of one"
    verified = found["archive", "monday", "plain.tif"]
    assert f"run {verified['run']}" in verified["because"]
    assert str(live.out / "monday" / "plain.tif") in verified["because"]
    assert all({"rule", "stage", "because", "until_time", "run"} <= about.keys() for about in found.values())


def test_explain_below_no_root_says_so(live):
    """A path that nobody watches is an answer, not an error."""
    done = live.cli("explain", "/etc/hostname")

    assert done.returncode == 0
    assert "no rule watches" in done.stdout
    assert live.json("explain", "/etc/hostname")["rules"] == []


def test_explain_of_a_directory_says_what_to_ask_instead(live):
    """Rules deal with files: one of a directory, or the root itself, is told how to find them."""
    for path in (live.data / "monday", live.data):
        done = live.cli("explain", str(path))
        assert "hint: name a file in it" in done.stderr
        assert "files list" in done.stderr
        assert "no rule watches" not in done.stdout
        assert "files list" in live.json("explain", str(path))["hint"]

    assert "hint" not in live.json("explain", path_of(live, "monday", "plain.tif"))


def test_runs_show_without_a_number_says_how_to_find_one(live):
    """Wrong use, but of somebody who does not know the number."""
    done = live.cli("runs", "show", check=False)

    assert done.returncode == 2
    assert "which run? Give its number" in done.stderr
    assert "hint: `trigger-daemon runs list`" in done.stderr


def test_explain_takes_a_path_relative_to_where_one_stands(live):
    """Relative paths are those of the working directory; nothing is resolved, so a link above stays a link."""
    link = live.base / "link"
    link.symlink_to(live.data, target_is_directory=True)
    ask = [*COMMAND, "explain", "-F", "json", "--config", str(live.config), "monday/plain.tif"]
    inside = subprocess.run(ask, cwd=live.data, capture_output=True, text=True, check=True, timeout=60)
    # As a shell does that went there through the link.
    behind = subprocess.run(
        ask, cwd=link, env={**os.environ, "PWD": str(link)}, capture_output=True, text=True, check=True, timeout=60
    )

    assert json.loads(inside.stdout)["path"] == path_of(live, "monday", "plain.tif")
    assert json.loads(behind.stdout)["path"] == str(link / "monday" / "plain.tif")


def test_explain_tells_of_an_ignored_rewrite(live):
    """`on_rewrite: ignore` leaves a version out by a stage that names it, and the earlier one is in the history."""
    target = live.data / "once" / "1.cbf"
    target.write_bytes(b"written again")
    live.until(lambda: stage(live, "once", "once", "1.cbf")["stage"] == "skipped", 20, "the rewrite is left out")

    about = stage(live, "once", "once", "1.cbf")
    assert "on_rewrite: ignore" in about["because"]
    assert [(one["stage"], one["present"]) for one in about["history"]] == [("verified", False), ("skipped", True)]
    shown = live.cli("explain", str(target)).stdout
    assert "earlier version: 5 B, run" in shown


def test_lists_of_open_work_have_their_fields(live):
    """Files on their way, open batches, alarms and rules."""
    files = live.json("files", "list")["files"]
    blocked = live.json("files", "list", "--stage", "blocked")["files"]
    batches = live.json("batches", "list")["batches"]
    closed = live.json("batches", "list", "--closed", "--rule", "archive")["batches"]
    alarms = live.json("alarms", "list")["alarms"]
    rules = live.json("rules", "list")["rules"]

    assert {(file["path"], file["stage"]) for file in files} == {
        (path_of(live, "grouped", "s1", "1.dat"), "waiting"), (path_of(live, "paired", "m1.mrc"), "blocked"),
    }  # fmt: skip
    assert [file["path"] for file in blocked] == [path_of(live, "paired", "m1.mrc")]
    assert [(batch["rule"], batch["group"], batch["files"]) for batch in batches] == [("grouped", {"sample": "s1"}, 1)]
    assert batches[0]["waiting_for"]
    assert {batch["state"] for batch in closed} == {"VERIFIED"} and len(closed) >= 4
    assert {"key", "what", "since_time", "hint", "acked_by"} <= alarms[0].keys()
    assert [rule["name"] for rule in rules] == ["archive", "grouped", "broken", "paired", "later", "once"]
    assert rules[0]["watch"] == str(live.data) and rules[0]["action"] == "copy" and rules[0]["state"] == "active"


def test_a_rule_is_shown_with_every_default(live):
    """`rules show` is what the daemon understands; what it prints is a rule again."""
    shown = live.cli("rules", "show", "paired").stdout
    rule = live.json("rules", "show", "paired")["rule"]

    assert rule["complete"]["quiescence_s"] == 0.3 and rule["retry"]["initial_s"] == 5.0
    assert "stalled_after: 30m" in shown and "*.partial" in shown and "on_rewrite: again" in shown
    again = live.base / "again"
    again.mkdir(exist_ok=True)
    body = "\n".join("    " + line for line in shown.splitlines())
    (again / "r.yaml").write_text(f"rules:\n  -\n{body}\n")
    assert live.json("rules", "check", str(again)) == {"ok": True, "files": 1, "rules": 1, "faults": [], "notes": []}


def test_the_schema_is_printed(live):
    """`rules schema` is JSON Schema with every action."""
    schema = json.loads(live.cli("rules", "schema").stdout)

    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "copy" in json.dumps(schema["$defs"]["start"])


def test_the_common_options_stand_on_either_side_of_the_noun(live):
    """`--format` and `--config` are understood before the noun, between noun and verb, and behind."""
    config = ["--config", str(live.config)]
    forms = [["-F", "json", *config, "runs", "list"], ["runs", "--format", "json", *config, "list"],
             [*config, "runs", "list", "-F", "json"]]  # fmt: skip
    answers = [json.loads(command(*form).stdout)["runs"] for form in forms]

    assert len({tuple(run["id"] for run in answer) for answer in answers}) == 1


# -------------------------------------------------------------------------- names


def test_no_name_reaches_the_terminal_raw(live):
    """Control characters, escape sequences and broken UTF-8 in names are shown, not obeyed: one file, one line."""
    told = "".join(live.cli("explain", path_of(live, "monday", name)).stdout for name in NAMES)
    told += "".join(live.cli("runs", "show", number).stdout for number in re.findall(r"proved by run (\d+)", told))

    assert "\x1b" not in told
    assert "two\nlines" not in told
    told.encode()  # no lone surrogate is left
    assert told.count("xxh3:") == 2 * len(NAMES)
    assert "monday/two\\nlines.tif'" in told and "monday/red\\e[31m.tif'" in told and "monday/caf\\xe9.tif'" in told


def test_a_shell_takes_a_shown_name_back(live):
    """What is printed as $'...' is the name again, byte for byte."""
    for name in (*NAMES, b"it's \\ \x7f\xff", "zero\u200bwidth \u202egnp.tif".encode()):
        shown = text.name(os.fsdecode(name))
        back = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True, timeout=60)

        if shown.startswith("$"):
            assert back.stdout == name
        else:
            assert shown.encode() == name


def test_json_keeps_every_byte_of_a_name(live):
    """A byte that is no UTF-8 is its surrogate escape; the name can be had back."""
    for name in NAMES:
        told = live.json("explain", path_of(live, "monday", name))

        assert os.fsencode(told["path"]) == os.fsencode(path_of(live, "monday", name))
    number = {about["rule"]: about for about in told["rules"]}["archive"]["run"]
    run = live.json("runs", "show", str(number))
    assert os.fsencode(run["manifest"][0]["path"]) == b"monday/" + LATIN


# --------------------------------------------------------------------- exit codes


def test_status_ends_with_4_while_a_person_is_needed(live):
    """HELD runs and blocked files need somebody, and status says so in its code and in words."""
    done = live.cli("status")

    assert done.returncode == 4
    assert "A person is needed: 1 run HELD; 1 file blocked" in done.stdout


def test_status_ends_with_0_when_all_is_well(base):
    """Nothing held, nothing blocked, no alarm."""
    site = make_site(base / "well")
    site.start()
    try:
        assert site.cli("status").returncode == 0
        assert site.cli("pause", "--why", "a test").returncode == 0
        paused = site.cli("status")
        assert paused.returncode == 0 and "a test" in paused.stdout
        assert site.cli("resume").returncode == 0
        assert site.stop() == 0
    finally:
        close(site)


@pytest.mark.parametrize(
    "words",
    ["frob", "runs frob", "runs list --frob", "runs list --state FROB", "runs retry", "runs show", "runs show x",
     "explain", "rules", "runs retry 1 --rule a", "batches close a novalue", "-F yaml status"],
)  # fmt: skip
def test_wrong_use_ends_with_2(live, words):
    """Usage errors are told on stderr, with how to go on; stdout stays empty."""
    done = live.cli(*words.split(), check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: trigger-daemon" in done.stderr
    assert "Traceback" not in done.stderr


def test_refused_orders_end_with_1_and_a_hint(live):
    """Why, and what to do next."""
    for args in (
        ["runs", "retry", "999"], ["runs", "show", "999"], ["batches", "close", "nix"], ["rules", "pause", "nix"],
        ["files", "go", "/nowhere/x"], ["alarms", "ack", "nix"], ["roots", "accept", "/nowhere"],
        ["files", "resend", path_of(live, "monday", "never.tif")], ["rules", "show", "nix"],
    ):  # fmt: skip
        done = live.cli(*args, check=False)

        assert done.returncode == 1, args
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and "hint: " in done.stderr, args


def test_a_refused_order_in_json_is_data_too(live):
    """Programs read the answer from stdout, whatever the exit code."""
    done = live.cli("rules", "pause", "nix", "-F", "json", check=False)

    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False


def test_a_failure_is_told_in_json_too(live, down, tmp_path):
    """One object on stdout, whichever command failed and why; stderr says the same for people."""
    config = tmp_path / "config.yaml"
    config.write_text("events: loud\n")
    failed = [
        (1, live.cli("runs", "show", "999", "-F", "json", check=False)),
        (1, live.cli("rules", "show", "nix", "-F", "json", check=False)),
        (1, live.cli("serve", "-F", "json", check=False)),
        (2, live.cli("runs", "retry", "-F", "json", check=False)),
        (3, command("rules", "show", "a", "-F", "json", "--config", str(config))),
        (5, down.cli("pause", "-F", "json", check=False)),
    ]

    for code, done in failed:
        told = json.loads(done.stdout)
        assert done.returncode == code, done.stderr
        assert told["ok"] is False and told["error"] and told["hint"], told
        assert told["hint"] in done.stderr


def test_faults_of_settings_end_with_3_and_show_the_place(tmp_path):
    """file:line:column: message, the line with a caret, the hint; also for a command that reads little of them."""
    config = tmp_path / "config.yaml"
    config.write_text("state_dir: relative\nevents: loud\n")
    done = command("status", "--config", str(config))

    assert done.returncode == 3
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"{config}:1:12: ")
    assert lines[1:3] == ["    state_dir: relative", "               ^"]
    assert lines[3].startswith("    hint: ")
    assert f"{config}:2:9: " in done.stderr


def test_an_absent_settings_file_ends_with_3():
    """A name given by hand is not quietly replaced by defaults."""
    done = command("status", "--config", "/nowhere/config.yaml")

    assert done.returncode == 3
    assert "/nowhere/config.yaml" in done.stderr


def test_faults_of_rules_end_with_3_and_are_all_told(tmp_path):
    """`rules check` shows every fault of every file."""
    (tmp_path / "a.yaml").write_text("rules:\n  - {name: a, watch: /d, match: ['*'], existing: process, frob: 1}\n")
    (tmp_path / "b.yaml").write_text("rules:\n  - {name: b, watch: d, match: ['*'], existing: process}\n")
    told = command("rules", "check", str(tmp_path), "-F", "json")
    shown = command("rules", "check", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))

    assert told.returncode == shown.returncode == 3
    answer = json.loads(told.stdout)
    assert answer["ok"] is False and answer["files"] == 2
    assert {Path(fault["file"]).name for fault in answer["faults"]} == {"a.yaml", "b.yaml"}
    assert all({"file", "line", "column", "message", "hint"} <= fault.keys() for fault in answer["faults"])
    assert {fault["line"] for fault in answer["faults"]} == {2}
    assert "a.yaml:2:" in shown.stdout and "b.yaml:2:" in shown.stdout


@ROOT
@pytest.mark.parametrize("args", [["status"], ["runs", "list"], ["pause"], ["explain", "/x"]], ids=" ".join)
def test_who_is_not_of_the_group_is_told_its_name(live, args):
    """Exit code 1, the group's name, nothing of what is inside."""
    live.state.chmod(0o2770)
    code = (
        "import os, sys, trigger_daemon.cli as cli\n"
        "from trigger_daemon.cli import explain, pause, runs, status, text\n"
        "import trigger_daemon.control, trigger_daemon.reader, rich.console, rich.table, pwd\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "cli.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "TRIGGER_DAEMON_STATE_DIR": str(live.state)},
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "no permission" in done.stderr and "the group root" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------- orders


@pytest.fixture
def busy(base: Path) -> Iterator[Site]:
    """A daemon of one's own: two blocked, one held, one verified, one open batch."""
    site = make_site(Path(tempfile.mkdtemp(prefix="busy", dir=base)))
    site.start()
    for number in range(2):
        (site.data / "paired" / f"m{number}.mrc").write_bytes(b"movie")
    (site.data / "grouped" / "s1" / "1.dat").write_bytes(b"frame")
    (site.data / "broken" / "1.raw").write_bytes(b"raw")
    (site.data / "monday" / "a.tif").write_bytes(b"movie")
    site.until(lambda: settled(site, verified=1, blocked=2), 40, "two blocked, one held, one verified, one open batch")
    yield site
    close(site)


def test_orders_on_files_and_batches_are_carried_out(busy):
    """close, go, skip, resend: each does what it says, and the journal knows who gave it and why."""
    assert busy.json("batches", "close", "grouped", "sample=s1", "--why", "shift ends")["closed"] == 1
    assert busy.cli("files", "go", path_of(busy, "paired", "m0.mrc")).returncode == 0
    assert busy.cli("files", "skip", path_of(busy, "paired", "m1.mrc")).returncode == 0
    busy.until(lambda: busy.states() == {"VERIFIED": 3, "HELD": 1}, 30, "closed, and let go")
    assert stage(busy, "paired", "paired", "m1.mrc")["stage"] == "skipped"
    sent = busy.json("files", "resend", path_of(busy, "monday", "a.tif"))["runs"]
    busy.until(lambda: busy.states()["VERIFIED"] == 4, 30, "sent again")
    assert stage(busy, "archive", "monday", "a.tif")["run"] == sent[0]

    orders = busy.ask("SELECT verb, who, why FROM ordered ORDER BY id")
    assert [verb for verb, _, _ in orders] == ["batches.close", "files.go", "files.skip", "files.resend"]
    assert orders[0][1:] == (pwd.getpwuid(os.getuid()).pw_name, "shift ends")
    assert busy.json("journal", "check")["problems"] == []


def test_orders_on_runs_and_rules_are_carried_out(busy):
    """retry by filter, ack, abandon, pause of a rule, hold, cancel: and what waits says for what."""
    (held,) = (number for (number,) in busy.ask("SELECT id FROM run WHERE state = 'HELD'"))
    assert busy.json("runs", "retry", "--rule", "broken", "--dry-run")["ids"] == [held]
    assert busy.ask("SELECT attempts FROM run WHERE id = ?", held) == [(1,)]
    assert busy.json("runs", "retry", "--rule", "broken") == {"ok": True, "done": [held], "errors": []}
    again = "SELECT 1 FROM run WHERE id = ? AND state = 'HELD' AND attempts = 2"
    busy.until(lambda: bool(busy.ask(again, held)), 30, "held again")
    assert busy.json("alarms", "ack", "all")["ok"] is True
    assert all(alarm["acked_by"] for alarm in busy.json("alarms", "list")["alarms"])
    assert busy.cli("runs", "abandon", str(held)).returncode == 0
    assert stage(busy, "broken", "broken", "1.raw")["stage"] == "abandoned"

    assert busy.cli("rules", "pause", "archive").returncode == 0
    (busy.data / "monday" / "b.tif").write_bytes(b"waits")
    busy.until(lambda: busy.states()["PENDING"] == 1, 30, "a run waits")
    (waiting,) = busy.json("runs", "list", "--state", "PENDING")["runs"]
    about = stage(busy, "archive", "monday", "b.tif")
    assert "resumed" in waiting["waiting_for"]
    assert about["stage"] == "batched" and "resumed" in about["because"]
    busy.until(lambda: "resumed" in json.dumps(busy.json("status")["waiting"]), 10, "the heartbeat counts it")
    assert busy.cli("runs", "hold", str(waiting["id"])).returncode == 0
    assert busy.cli("runs", "cancel", str(waiting["id"])).returncode == 0
    assert busy.cli("rules", "resume", "archive").returncode == 0
    busy.until(lambda: busy.states()["CANCELLED"] == 1, 30, "cancelled")


def test_what_is_on_its_way_cannot_be_sent_again(live):
    """A version that no run has taken, or whose run is not over, would be sent twice."""
    for parts in (("grouped", "s1", "1.dat"), ("broken", "1.raw")):
        done = live.cli("files", "resend", path_of(live, *parts), check=False)

        assert done.returncode == 1
        assert "will be by itself" in done.stderr or "is HELD" in done.stderr


def test_a_moved_root_waits_for_a_decision(base):
    """`rules apply` shows the numbers; without a terminal it asks by exit code 4, and takes --choice."""
    site = make_site(base / "moved")
    site.write_rules(site.rule("archive", match=["{session}/{movie}.tif"]))
    site.start()
    try:
        (site.data / "monday" / "a.tif").write_bytes(b"movie")
        site.until(lambda: site.states() == {"VERIFIED": 1}, 30, "verified")
        assert site.cli("rules", "apply").stdout == "no change of rules waits for a decision\n"
        site.data.rename(site.base / "elsewhere")
        site.write_rules(site.rule("archive", match=["{session}/{movie}.tif"], watch=str(site.base / "elsewhere")))
        site.until(lambda: (site.heartbeat() or {}).get("undecided") != {}, 30, "the change waits")

        assert site.stop() == 0
        site.start()
        site.until(lambda: (site.heartbeat() or {}).get("undecided") != {}, 30, "it waits over a restart")
        asked = site.cli("rules", "apply", "-F", "json")
        assert asked.returncode == 4
        assert json.loads(asked.stdout)["undecided"]["archive"]["files_done"] == 1
        assert "--choice" in asked.stderr
        assert site.cli("status").returncode == 4
        assert site.cli("rules", "apply", "--choice", "same").returncode == 0
        site.until(lambda: (site.heartbeat() or {}).get("undecided") == {}, 20, "decided")
        (site.base / "elsewhere" / "monday" / "b.tif").write_bytes(b"new")
        site.until(lambda: site.states()["VERIFIED"] == 2, 30, "what is new goes on in the new place")
        assert site.states() == {"VERIFIED": 2}
        assert {path for manifest in site.manifests("archive") for path, _, _ in manifest} == {
            b"monday/a.tif", b"monday/b.tif",
        }  # fmt: skip
    finally:
        close(site)


# --------------------------------------------------------------------------- down


def test_status_with_the_daemon_down_tells_what_the_journal_knows(down):
    """Exit code 5, running false, counts of the journal; what only the daemon knew is null."""
    done = down.cli("status", "-F", "json", check=False)
    now = json.loads(done.stdout)

    assert done.returncode == 5
    assert now["daemon"]["running"] is False and now["daemon"]["pid"] is None
    rules = {rule["name"]: rule for rule in now["rules"]}
    assert rules["archive"]["runs"] == {"VERIFIED": 2} and rules["archive"]["files_done"] == 2
    assert rules["archive"]["settling"] is None
    assert [run["state"] for run in now["waiting"]] == ["HELD"]
    assert "held:broken" in {alarm["key"] for alarm in now["alarms"]}
    shown = down.cli("status", check=False)
    assert shown.returncode == 5 and "NOT RUNNING" in shown.stdout
    assert f"no daemon holds {down.state}" in shown.stdout and "trigger-daemon serve" in shown.stdout


def test_questions_are_answered_with_the_daemon_down(down):
    """runs, alarms, rules, batches that were closed, and explain."""
    assert down.cli("runs", "list").returncode == 0
    alarms = down.cli("alarms", "list")
    assert alarms.returncode == 0 and "the daemon does not run" in alarms.stderr, "`no alarms` sounds well"
    assert down.cli("rules", "list").returncode == 0
    assert down.cli("batches", "list", "--closed").returncode == 0
    assert down.cli("rules", "show", "archive").returncode == 0
    assert down.cli("journal", "check").returncode == 0
    assert stage(down, "archive", "monday", "sent.tif")["stage"] == "verified"
    assert stage(down, "broken", "broken", "1.raw")["stage"] == "held"
    late = stage(down, "archive", "monday", "late.tif")
    assert late["stage"] == "settling" and "not running" in late["because"]
    again = stage(down, "archive", "monday", "rewritten.tif")
    assert again["stage"] == "settling" and "newer version" in again["because"]
    assert [one["stage"] for one in again["history"]] == ["verified"]
    assert stage(down, "archive", "monday", "x.txt")["stage"] == "unmatched"


@pytest.mark.parametrize(
    "words",
    ["pause", "resume", "files list", "batches list", "runs retry 1", "rules pause a", "files go /x", "alarms ack all",
     "rules apply", "roots accept /x"],
)  # fmt: skip
def test_orders_end_with_5_when_the_daemon_is_down(down, words):
    """Nothing is left lying for a later daemon."""
    done = down.cli(*words.split(), check=False)

    assert done.returncode == 5
    assert done.stdout == "" and "hint: " in done.stderr


def test_a_place_where_no_daemon_ever_was(tmp_path):
    """status says that nothing runs; the others say that there is no journal."""
    env = {"TRIGGER_DAEMON_STATE_DIR": str(tmp_path / "none")}
    asked = {words: command(*words.split(), **env) for words in ("status -F json", "runs list", "explain /x")}

    assert asked["status -F json"].returncode == 5
    assert json.loads(asked["status -F json"].stdout)["rules"] == []
    assert asked["runs list"].returncode == 1 and "there is no" in asked["runs list"].stderr
    assert asked["explain /x"].returncode == 1
    shown = " ".join(command("status", **env).stdout.split())
    assert f"there is no journal in {tmp_path / 'none'}" in shown and "--config" in shown
    assert "trigger-daemon serve" in command("pause", **env).stderr


# -------------------------------------------------------------------------- serve


def test_a_second_daemon_names_the_first(live):
    """Two daemons on one state directory are refused, with the pid of who holds it."""
    done = live.cli("serve", check=False)

    assert done.returncode == 1
    assert str(live.process.pid) in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr


def test_serve_with_faulty_settings_ends_with_3(tmp_path):
    """The service manager sees at once that starting again is no use."""
    config = tmp_path / "c.yaml"
    config.write_text("events: loud\n")
    done = command("serve", "--config", str(config))

    assert done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_daemon_ends_within_seconds(base, number):
    """A signal ends it with 0, whatever its threads do."""
    site = make_site(base / f"ends{number}")
    site.start()
    began = time.monotonic()
    site.process.send_signal(number)

    assert site.process.wait(20) == 0
    assert time.monotonic() - began < 10


# ------------------------------------------------------------- terminals and pipes


def test_a_command_that_stands_still_holds_nothing(live):
    """Stopped in the middle of its output, a command has no file of the state directory open, and the work goes on."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    command = subprocess.Popen(
        [*COMMAND, "rules", "schema"], stdout=writing, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    live.until(lambda: _writes(command.pid), 30, "the pipe is full")
    listing = subprocess.Popen(
        [*COMMAND, "runs", "list", "-F", "json", "--config", str(live.config)], stdout=writing, stdin=subprocess.DEVNULL
    )
    os.close(writing)
    try:
        live.until(lambda: _writes(listing.pid), 30, "the list is stuck in a write")
        listing.send_signal(signal.SIGSTOP)

        opened = [os.readlink(f"/proc/{listing.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{listing.pid}/fd")]
        assert [path for path in opened if path.startswith(str(live.state))] == []
        before = live.states()["VERIFIED"]
        (live.data / "monday" / "meanwhile.tif").write_bytes(b"movie")
        live.until(lambda: live.states()["VERIFIED"] == before + 1, 30, "a file went through")
    finally:
        os.close(reading)
        listing.send_signal(signal.SIGCONT)
        for one in (listing, command):
            one.wait(30)
            if one.stderr:
                one.stderr.close()


def _writes(pid: int) -> bool:
    """Say whether a process sleeps in the middle of writing to a pipe."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().startswith("1 ")  # write(2) on x86-64
    except OSError:
        return False


def test_a_reader_that_leaves_is_no_error(live):
    """`runs list | head -1`: no traceback, no word."""
    for args in (["runs", "list"], ["runs", "list", "-F", "json"], ["rules", "schema"], ["status"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [*COMMAND, *args, "--config", str(live.config)],
            stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
        os.close(writing)

        assert done.stderr == b"", args
        assert done.returncode in (4, 141)


def on_terminal(args: list[str], *, press: bytes = b"", press_on: bytes = b"", **env: str) -> tuple[int, bytes]:
    """Run a command on a terminal of its own; return its exit code and all it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40", **env}
        os.execve(sys.executable, [*COMMAND, *args], environment)
    written = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 1)
        if not ready:
            continue
        try:
            some = os.read(terminal, 65_536)
        except OSError:
            break
        if not some:
            break
        written += some
        if press and press_on in written:
            os.write(terminal, press)
            press = b""
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written


def test_colours_are_for_terminals_that_want_them(live):
    """On a terminal there is colour; with NO_COLOR, or in a pipe, none."""
    config = ["--config", str(live.config)]
    _, coloured = on_terminal(["status", *config])
    _, plain = on_terminal(["status", *config], NO_COLOR="1")

    assert b"\x1b[" in coloured and b"31m" in coloured
    assert re.search(rb"\x1b\[[0-9;]*3[0-7]m", plain) is None
    assert "\x1b" not in live.cli("status").stdout


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_watching_ends_with_a_key_and_leaves_the_terminal_as_it_was(live, key):
    """`status --watch` ends quietly, back on the ordinary screen, with the cursor shown."""
    code, written = on_terminal(["status", "--watch", "--config", str(live.config)], press=key, press_on=b"archive")

    assert code in (0, 130)
    assert b"Traceback" not in written and b"Aborted" not in written
    assert written.rstrip().endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l", b"\x1b[?1049l"))


def test_watching_into_a_pipe_gives_an_object_a_line(live):
    """For programs: one status a second, each whole."""
    with subprocess.Popen(
        [*COMMAND, "status", "--watch", "-F", "json", "--config", str(live.config)], stdout=subprocess.PIPE, text=True
    ) as watch:
        lines = [watch.stdout.readline() for _ in range(2)]
        watch.send_signal(signal.SIGINT)
        watch.stdout.close()

        assert watch.wait(30) in (130, 141)
    assert all(json.loads(line)["daemon"]["running"] for line in lines)


def test_tables_fit_eighty_columns(live):
    """No line of a table is wider than a terminal of the usual width."""
    for args in (["status"], ["runs", "list"], ["rules", "list"], ["batches", "list"], ["batches", "list", "--closed"]):
        wide = [line for line in live.cli(*args).stdout.splitlines() if len(line) > 80]

        assert wide == [], args


def test_a_narrow_table_breaks_neither_rules_nor_states():
    """Rules are cut with an ellipsis, states are whole, group and what it waits for have two lines; at most 80 wide."""
    waits = f"destination {'/a-long-way' * 6}: {'/a-long-way' * 6} is not there"
    shown = text.table(("run", "right"), ("state", "word"), ("rule", "name"), ("group", "group"), ("files", "right"),
                       ("size", "right"), ("ago", "right"), ("waits for", "two"))  # fmt: skip
    text.row(shown, 1_000, "SUPERSEDED", "krios-tiff", "day=30 grid=a_7 session=monday", "1,000", "1.0 GB", "2 d 3 h",
             waits)  # fmt: skip
    written = io.StringIO()
    text.console(written).print(shown)
    lines = written.getvalue().splitlines()

    assert len(lines) == 4 and max(map(len, lines)) <= 80
    assert " SUPERSEDED " in lines[2] and " krios-tiff " in lines[2]
    assert "day=30" in lines[2] and "grid=a_7…" in lines[3]
    assert lines[3].rstrip().endswith("…")


def test_a_volume_that_cannot_be_read_is_shown_with_the_reason():
    """`status` is asked just then: it tells of the others, and what is wrong with this one."""
    read = {"path": "/data", "total_bytes": 10**9, "free_bytes": 10**8, "state": "low", "fill_bytes_per_s": None,
            "full_in_s": None, "error": None}  # fmt: skip
    away = {**read, "path": "/tape", "total_bytes": 0, "free_bytes": 0, "state": "ok", "error": "No such file"}
    daemon = {"running": True, "version": "1", "health": "alarm", "pid": 1, "started_time": None, "heartbeat_age_s": 1}
    now = {"daemon": daemon, "rules": [], "working": [], "waiting": [], "waits": {"groups": [], "more_runs": 0},
           "waiting_counts": dict.fromkeys(("HELD", "INACTIVE", "PENDING"), 0),
           "roots": [], "volumes": [read, away], "alarms": [], "rules_fault": None, "undecided": {},
           "paused": ""}  # fmt: skip
    console = text.console(io.StringIO())
    console.print(glance.picture(now, console, height=None))
    lines = {words[0]: words[1:] for words in map(str.split, console.file.getvalue().splitlines()) if words}

    assert lines["/data"][0] == "low"
    assert lines["/tape"] == ["?", "No", "such", "file"]


def test_rules_that_ask_for_reclaim_in_vain_are_told(tmp_path):
    """A rule asks, the settings do not: nothing is ever deleted, and whoever checks the rules hears it."""
    rules, config = tmp_path / "rules", tmp_path / "config.yaml"
    rules.mkdir()
    (rules / "a.yaml").write_text(
        f"rules:\n  - name: a\n    watch: {tmp_path}\n    match: ['*.raw']\n    existing: ignore\n"
        "    start: {copy: {to: /mnt}}\n    reclaim: {proven_by: [a]}\n"
    )
    told = {}
    for said in ("disabled", "enabled"):
        config.write_text(f"state_dir: {tmp_path}\nrules_dir: {rules}\nreclaim: {said}\n")
        told[said] = command("rules", "check", "--config", str(config))

    assert [done.returncode for done in told.values()] == [0, 0]
    assert "nothing of a is deleted" in told["disabled"].stderr
    assert "is deleted" not in told["enabled"].stderr


# -------------------------------------------------------------------------- speed


@pytest.mark.parametrize("args", [["status", "-F", "json"], ["runs", "list", "-F", "json"]], ids=" ".join)
def test_questions_load_nothing_heavy(live, args):
    """What is asked at 3 a.m. on a busy machine imports neither pydantic nor rich nor the daemon."""
    plain = live.base / "plain.yaml"
    plain.write_text(f"# as in a package\nstate_dir: {live.state}\nthrottle:\n  runs: 4\n")
    code = (
        "import sys\nfrom trigger_daemon.cli import run\n"
        "run(sys.argv[1:])\n"
        "print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--config", str(plain)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))

    heavy = {"pydantic", "pydantic_settings", "ruamel", "rich", "asyncio", "structlog", "trigger_daemon.daemon"}
    assert loaded & heavy == set()


SETTINGS = {
    "absent": None,
    "empty": "",
    "plain": "state_dir: /a/b\nrules_dir: /c\n",
    "slash": "state_dir: /a/b/\n",
    "quoted": "state_dir: \"/a/b\"  # here\nsweep: {every: 30s, full: 15m}\n",
    "single": "# don't\nstate_dir: '/a/b'\nvolumes:\n  - path: /data\n    low: 20%\n",
    "other": "events: none\n",
    "json": '{"state_dir": "/a/b"}\n',
    "nested": "mqtt:\n  state_dir: /wrong\n",
    "open": "mqtt: {\nstate_dir: /wrong}\n",
    "text": "mqtt:\n  a: 'one\nstate_dir: /wrong\n'\n",
    "flow": "mqtt: {\nstate_dir: /wrong\n }\n",
    "wrapped": "mqtt:\n  a: 'one\nstate_dir: /wrong\n  two'\n",
    "anchor": "state_dir: &a /a/b\n",
    "space": "state_dir: /a b\n",
    "late": "mqtt: {host: a}\nstate_dir:    /a/b\n",
    "crlf": "state_dir: /a/b\r\nevents: none\r\n",
    "umlaut": "state_dir: /a/\u00fc\n",
    "next": "state_dir:\n  /a/b\n",
    "colon": "state_dir: /a:b\n",
    "twice": "state_dir: /a\nstate_dir: /b\n",
    "relative": "state_dir: a/b\n",
    "faulty": "state_dir: /a\n- x\n",
    "document": "---\nstate_dir: /a/b\n",
    "folded": "state_dir: >\n  /a/b\n",
    "list": "volumes:\n- path: /data\nstate_dir: /a/b\n",
    "tab": "state_dir:\t/a/b\n",
}
VARIABLES = {
    "none": {}, "set": {"TRIGGER_DAEMON_STATE_DIR": "/env/x/"}, "empty": {"TRIGGER_DAEMON_STATE_DIR": ""},
    "relative": {"TRIGGER_DAEMON_STATE_DIR": "x"}, "lower": {"TRIGGER_DAEMON_state_dir": "/env/lower"},
}  # fmt: skip


@pytest.mark.parametrize("variables", VARIABLES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_short_way_to_the_state_directory_agrees_with_the_long_one(tmp_path, name, variables):
    """Either it gives no answer, or the one the whole settings give; plain settings do get one."""
    config = tmp_path / "config.yaml"
    written = SETTINGS[name]
    if written is not None:
        config.write_bytes(written.encode())
    env = {"TRIGGER_DAEMON_CONFIG": str(config), **VARIABLES[variables]}
    found = place.state_dir(None, env)
    try:
        whole: str | None = load_settings(None, env).state_dir
    except ConfigError:
        whole = None

    assert found in (None, whole)
    assert place.state_dir(config, {key: value for key, value in env.items() if "CONFIG" not in key}) == found
    if name in ("plain", "slash", "quoted", "single", "other", "late") and variables in ("none", "set", "empty"):
        assert found == whole is not None


# -------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (123_456, "123 kB"), (4.6e12, "4.6 TB"), (2e15, "2.0 PB")],
)
def test_sizes_are_short(number, words):
    """Decimal units, two or three digits."""
    assert text.size(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (59, "59 s"), (61, "1 min"), (7_380, "2 h 3 min"), (180_000, "2 d 2 h")]
)
def test_ages_are_short(seconds, words):
    """The two largest units."""
    assert text.age(seconds) == words


def test_times_for_programs_are_rfc_3339():
    """UTC, whatever the machine's time zone; nested records too."""
    told = text.timed({"time": 0, "a": [{"since_time": 1.5, "files": 3}], "until_time": None, "sometimes": 7})

    assert told == {
        "time": "1970-01-01T00:00:00.000Z", "a": [{"since_time": "1970-01-01T00:00:01.500Z", "files": 3}],
        "until_time": None, "sometimes": 7,
    }  # fmt: skip
    assert datetime.fromisoformat(told["time"]).timestamp() == 0


# ---------------------------------------------------------------------- reference


def test_the_reference_is_made_from_the_commands():
    """docs/reference/cli.md says what the program says: `python -m trigger_daemon.cli.reference` makes it."""
    assert (REPOSITORY / "docs" / "reference" / "cli.md").read_text() == reference()


def test_every_command_takes_the_common_options_and_helps():
    """-F, --config and --help stand in the help of each command."""
    from trigger_daemon.cli import program

    def leaves(group, path):
        for name in group.commands if hasattr(group, "commands") and group.commands else group.list_commands(None):
            command = group.get_command(None, name)
            if hasattr(command, "list_commands"):
                yield from leaves(command, [*path, name])
            else:
                yield [*path, name], command

    found = {" ".join(path): found for path, found in leaves(program, [])}

    assert {"serve", "status", "runs list", "files resend", "rules apply", "journal check"} <= found.keys()
    for path, command in found.items():
        options = {option for param in command.params for option in param.opts}
        assert {"-F", "--format", "--config"} <= options, path
        assert command.help, path
