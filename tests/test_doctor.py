"""Laws of `doctor`: it finds what is wrong, says what to do, leaves nothing behind, and never hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuse_share import Share
from tests.site import Site
from trigger_daemon import apart
from trigger_daemon.apart import Late, ask
from trigger_daemon.cli.doctor import lines
from trigger_daemon.config import parse_rules
from trigger_daemon.core.patterns import Matcher
from trigger_daemon.core.rules import CANARY
from trigger_daemon.doctor import CHECKS, LEVELS, Finding, machine, places
from trigger_daemon.errors import TriggerError
from trigger_daemon.hints.inotify import watch_settings
from trigger_daemon.journal import Journal

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
REFERENCE = (REPOSITORY / "docs" / "reference" / "json.md").read_text()
SECTION = REFERENCE[REFERENCE.index("## `doctor`") :].split("\n## ")[0]
PLACE = "trigger_daemon.doctor.places:root"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "site", quiescence="300ms")
    made.write_rules(made.rule())
    made.config.write_text(json.dumps(made.settings))
    yield made
    made.stop()


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    """A share with one file, which can be told not to answer."""
    point = tmp_path / "share"
    point.mkdir()
    made = Share(point, {"a.tif": 100})
    yield made
    made.close()


def examined(site: Site, *args: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code and the findings."""
    done = site.cli("doctor", *args, "-F", "json", check=False)
    return done.returncode, json.loads(done.stdout)["findings"]


def of(found: list[dict[str, Any]], check: str, about: str | Path = "") -> list[dict[str, Any]]:
    return [each for each in found if each["check"] == check and each["about"] == str(about or each["about"])]


def bad(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in found if each["level"] == "fault"]


def canaries(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(CANARY)]


# -------------------------------------------------------------------------- apart


def test_a_child_answers_or_raises_as_the_function_does():
    """A value comes back as it is, an OSError with its number and name, ours with its hint."""
    assert ask("trigger_daemon.core.grammar:duration_s", "5m", deadline_s=30) == 300
    with pytest.raises(FileNotFoundError) as absent:
        ask("trigger_daemon.doctor.places:space", "/not/there", 0, 0, 0, 0, deadline_s=30)
    with pytest.raises(TriggerError, match="no action `no-such`") as ours:
        ask("trigger_daemon.registry:find_action", "no-such", deadline_s=30)

    assert absent.value.filename == "/not/there"
    assert "known are" in ours.value.hint


def test_only_this_package_is_asked():
    """A name from elsewhere is not called: what goes into a child is this program's."""
    with pytest.raises(TriggerError, match="no answer"):
        ask("os:getcwd", deadline_s=30)


def test_an_answer_is_bounded(monkeypatch):
    """A child that says too much is an error, not a full memory."""
    monkeypatch.setattr(apart, "ANSWER_BYTES_MAX", 5)
    with pytest.raises(TriggerError, match="larger than 5 bytes"):
        ask("trigger_daemon.mounts:remote", "x" * 10, deadline_s=30)


@ROOT
def test_a_child_that_hangs_is_left_and_others_are_asked(share, tmp_path, wait_until):
    """What waits in a dead mount is given up at its deadline, cannot be killed, and is gone once it can be."""
    share.mood = "hang"

    late = ask(PLACE, str(tmp_path / "share"), "inotify", False, deadline_s=0.8)

    assert isinstance(late, Late) and "0.8 s" in late.why
    assert len(apart._left) == 1 and apart._left[0].poll() is None, "it was to be one that cannot be killed"
    assert ask("trigger_daemon.core.grammar:duration_s", "1s", deadline_s=30) == 1
    share.release()
    left = apart._left[0]
    wait_until(lambda: left.poll() is not None, 10)
    ask("trigger_daemon.core.grammar:duration_s", "1s", deadline_s=30)
    assert apart._left == []


@ROOT
def test_hanging_children_do_not_multiply(share, tmp_path, monkeypatch):
    """As many as may hang hang: nobody else is asked, and that is said."""
    monkeypatch.setattr(apart, "LEFT_MAX", 1)
    share.mood = "hang"
    ask(PLACE, str(tmp_path / "share"), "inotify", False, deadline_s=0.8)

    late = ask("trigger_daemon.core.grammar:duration_s", "1s", deadline_s=30)

    assert isinstance(late, Late) and "still hang" in late.why
    share.release()
    apart._left[0].wait(10)


# -------------------------------------------------------------------------- whole


def test_a_daemon_at_work_is_found_so(site):
    """Where all is well no check has a fault, the canary was heard, and it is gone."""
    site.start()

    code, found = examined(site)

    assert bad(found) == [] and code == 0
    assert {each["check"] for each in found} == set(CHECKS)
    root = of(found, "roots", site.data)
    figures = {key: value for each in root for key, value in each["figures"].items()}
    assert figures["events"] == "inotify" and figures["event_s"] < places.EVENT_S
    assert figures["mtime_grain_s"] < 1 and abs(figures["clock_off_s"]) < 1
    assert of(found, "daemon")[0]["figures"]["pid"] == site.process.pid
    assert of(found, "inotify", "watches")[0]["figures"]["directories"] == 1
    known = set(re.findall(r"`(\w+)`", SECTION))
    assert {name for each in found for name in each["figures"]} <= known
    assert canaries(site.data) == canaries(site.out) == []
    assert not site.taken(), "a canary was taken for data"


def test_faults_come_first_and_what_is_in_order_is_counted():
    """Nobody scrolls for a fault; -v shows all."""
    found = [
        Finding("daemon", "", "ok", "runs"), Finding("roots", "/d", "ok", "on ext4"),
        Finding("roots", "/d", "note", "n"), Finding("roots", "/d", "ok", "stable"),
        Finding("space", "/e", "fault", "full", "make room"), Finding("clock", "", "warning", "is off", "set it"),
    ]  # fmt: skip
    brief, whole = ([" ".join(line.split()) for line in lines(found, verbose=verbose)] for verbose in (False, True))

    assert brief == [
        "fault space /e: full", "hint: make room", "warning clock is off", "hint: set it", "note roots /d: n",
        "ok 2 in order (daemon, roots): -v shows them", "1 fault, 1 warning, 1 note",
    ]  # fmt: skip
    assert whole[:5] == brief[:5] and whole[5:] == ["ok daemon runs", "ok roots /d: on ext4; stable", brief[-1]]


def test_a_daemon_that_does_not_run_is_told_by_the_exit_code(site):
    """Without a daemon, and without a fault, the exit code is 5; one fault makes it 4."""
    code, found = examined(site)
    site.data.rmdir()
    worse, of_root = examined(site)

    assert code == 5 and "does not run" in of(found, "daemon")[0]["what"]
    assert of(found, "roots", site.data)[-1]["figures"] == {"directories": 1, "directories_all": True}
    assert worse == 4 and [each["about"] for each in bad(of_root)] == [str(site.data)]
    assert "never made" in bad(of_root)[0]["hint"] and not site.data.exists()


@ROOT
def test_a_share_that_hangs_is_named_and_the_rest_is_tested(site, share, tmp_path):
    """It ends, says which root hangs on which mount, and has the answers of all others."""
    site.write_rules(site.rule(), site.rule("far", watch=str(tmp_path / "share")))
    share.mood = "hang"

    code, found = examined(site, "--only", "roots", "--patience", "3")

    assert code == 4
    (late,) = bad(found)
    assert late["about"] == str(tmp_path / "share") and "does not answer" in late["what"] and "fuse" in late["hint"]
    assert [each["level"] for each in of(found, "roots", site.data)] == ["ok"] * 5


@ROOT
@pytest.mark.parametrize("named", ["by its path", "as the working directory"])
def test_a_share_that_hangs_may_be_named(site, share, tmp_path, named):
    """Also the command itself never looks at what it is given, nor at where it was called."""
    point = tmp_path / "share"
    root = "." if named == "as the working directory" else str(point)
    doctor = f"{sys.executable} -P -m trigger_daemon doctor {root} --config {site.config} -F json --patience 1"
    process = subprocess.Popen(  # it is there before the share hangs: a process that enters it would hang itself
        ["sh", "-c", f"echo here; read go; exec {doctor}"], cwd=point if root == "." else None, text=True,
        env={**os.environ, "PWD": str(point)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stdout.readline() == "here\n"
    share.mood = "hang"
    try:
        said, _ = process.communicate("go\n", timeout=30)
    finally:
        share.release()  # before anything is awaited
    (late,) = bad(json.loads(said)["findings"])

    assert process.returncode == 4 and late["about"] == str(point) and "does not answer" in late["what"]


@ROOT
def test_a_state_directory_that_hangs_does_not_hold_it(site, share, tmp_path):
    """Settings that name a dead mount for the journal are answered, too."""
    site.settings["state_dir"] = str(tmp_path / "share")
    site.config.write_text(json.dumps(site.settings))
    share.mood = "hang"

    code, found = examined(site, "--only", "daemon", "--only", "space", "--patience", "2")

    assert code == 4
    assert {each["check"] for each in bad(found)} == {"daemon", "space"}


@ROOT
def test_a_share_is_told_as_one(site, share, tmp_path):
    """A root on a network or FUSE file system is tested for what it can do: sweeps, read-only, no events."""
    code, found = examined(site, str(tmp_path / "share"))

    assert code == 0 and {each["check"] for each in found} == {"roots"}
    assert [each["level"] for each in found] == ["ok", "note", "note"][: len(found)]
    assert of(found, "roots")[0]["figures"] == {"fstype": "fuse", "source": "share", "remote": True}


@ROOT
def test_a_root_that_is_read_only_is_no_fault(site):
    """The daemon need not write in a root: what could not be tested is said, and nothing more."""
    (site.data / "a.tif").write_bytes(b"x")
    subprocess.run(["mount", "--bind", site.data, site.data], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", site.data], check=True)
    try:
        code, found = examined(site)
    finally:
        subprocess.run(["umount", "-l", site.data], check=True)

    assert bad(found) == [] and code == 5
    (note,) = [each for each in of(found, "roots", site.data) if each["level"] == "note"]
    assert "read-only" in note["what"] and os.listdir(site.data) == ["a.tif"]


@ROOT
def test_a_destination_that_cannot_be_written_is_a_fault(site):
    """A copy would fail: it is found before."""
    subprocess.run(["mount", "--bind", site.out, site.out], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", site.out], check=True)
    try:
        code, found = examined(site, "--only", "destinations")
    finally:
        subprocess.run(["umount", "-l", site.out], check=True)

    (fault,) = bad(found)
    assert code == 4 and fault["about"] == str(site.out) and "Read-only" in fault["what"] and fault["hint"]


def test_rules_with_a_fault_are_told_whatever_is_asked(site):
    """With the rules unread nobody knows the roots: that is said, not passed over."""
    (site.rules_dir / "rules.yaml").write_text("rules: [{name: x}]")

    code, found = examined(site, "--only", "destinations")

    assert code == 4 and bad(found)[0]["check"] == "rules" and "rules check" in bad(found)[0]["hint"]


# ------------------------------------------------------------------------- canary


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_canary_is_removed_when_doctor_is_stopped(site, number, wait_until):
    """Whoever ends the command, in whatever way: the child that wrote the canary removes it."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trigger_daemon", "doctor", "--config", str(site.config), str(site.data)],
        env={**os.environ, "TRIGGER_FAIL": "doctor.canary:hang"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: canaries(site.data), 20, what="the canary")
    process.send_signal(number)
    process.wait(10)

    wait_until(lambda: not canaries(site.data), 10, what="the canary's removal")


def test_a_canary_left_by_a_killed_doctor_is_removed_later(site):
    """What nobody could remove goes with the next look, if it is surely nobody's; a stranger's file never does."""
    old, new, other = f"{CANARY}old-Aa", f"{CANARY}new-Aa", ".other"
    for name in (old, new, other):
        (site.data / name).write_bytes(b"")
    hours_ago = time.time() - 2 * places.LEFT_OVER_S
    for name in (old, other):
        os.utime(site.data / name, (hours_ago, hours_ago))

    examined(site, str(site.data))

    assert set(os.listdir(site.data)) == {new, other}


def test_no_rule_wants_a_canary():
    """Also where a rule drops the built-in patterns, and takes every name."""
    text = "rules:\n- {name: a, watch: /d, match: ['**'], built_in_ignores: false, existing: process,"
    text += " start: {copy: {to: /o}}}\n"
    read = parse_rules([("a.yaml", text)])
    wants = Matcher(read.rules).directory("").wants

    assert read.faults == [] and wants(".other") and not wants(f"{CANARY}host-1-ab-Aa")


# ------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    ("kept", "grain_s"),
    [(987_654_321, 1e-9), (987_654_300, 1e-7), (987_654_000, 1e-6), (987_000_000, 1e-3), (0, 1.0), (-10**9, 2.0)],
)
def test_the_grain_of_file_times_is_told_from_what_was_kept(kept, grain_s):
    """A time with a digit in every place comes back without those that the file system drops."""
    assert places._grain_s(1_001, 1_001 * 10**9 + kept) == pytest.approx(grain_s)


@pytest.mark.parametrize(
    ("dated", "level", "words"),
    [(1_000.5, "ok", "agrees"), (999.99, "ok", "agrees"), (1_010, "note", "9 s ahead"), (400, "warning", "behind")],
)
def test_the_clock_of_a_share_is_compared_with_ours(dated, level, words):
    """A file written between two looks at our clock is dated between them, or the share's clock is off."""
    found = places._clock("roots", "/data", dated, 1_000.0, 1_001.0)

    assert found.level == level and words in found.what


def test_too_few_watches_are_told_with_the_line_to_set():
    """The sysctl line that helps is ready to be copied, and large enough."""
    limit = min(value for value in watch_settings() if value >= 0)

    enough = machine.inotify(10, "10 directories", None, os.getuid())
    few = machine.inotify(limit * 2, "many", None, os.getuid())[0]

    assert [each.level for each in enough] == ["ok", "ok"]
    proposed = re.search(r"`fs\.inotify\.max_user_watches = (\d+)`", few.hint)
    assert few.level == "fault" and proposed and int(proposed[1]) >= limit * 2


@ROOT
def test_a_kernel_that_refuses_watches_is_found_by_the_canary(site):
    """The daemon's own source of hints is tried, so what stops it stops the test, with the kernel's line."""
    command = f"echo 0 > /proc/sys/user/max_inotify_watches && exec {sys.executable} -P -m trigger_daemon doctor"
    command += f" --config {site.config} -F json {site.data}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", command], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.stdout, done.stderr
    (fault,) = bad(json.loads(done.stdout)["findings"])

    assert "refuses more watches" in fault["what"] and "max_user_watches" in fault["hint"]


def test_free_space_is_held_against_the_settings(tmp_path):
    """Below the reserve is a fault, below `low` a warning, with the figures."""
    levels = [places.space(str(tmp_path), *limits)[0].level for limits in [
        (0, 0.0, 0, 0.0), (0, 0.0, 10**18, 0.0), (10**18, 0.0, 10**18, 0.0), (0, 0.0, 0, 1.0),
    ]]  # fmt: skip

    assert levels == ["ok", "warning", "fault", "warning"]


def test_a_damaged_journal_is_a_fault(site):
    """A page that holds something else is found, and the way out named."""
    journal = Journal.open(site.state)
    journal.rule_ids([f"rule-{number}" for number in range(3_000)])
    journal.close()
    path = site.state / "journal.db"
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(os.urandom(4096 * 4))

    code, found = examined(site, "--only", "journal")

    assert code == 4 and "journal recover" in bad(found)[0]["hint"]


def test_secrets_that_others_can_read_are_a_fault(site):
    """A token file or a client's secret with a mode that is not 0600 is told, and what it says is not."""
    tokens, secret = site.state / "globus-tokens.json", site.base / "secret"
    tokens.write_text('{"transfer": {"access_token": "hidden-word"}}')
    secret.write_text("hidden-word")
    tokens.chmod(0o640)
    first = site.cli("doctor", "--only", "credentials", "-F", "json", check=False)
    secret.chmod(0o644)
    site.settings["globus"] = {"client_id": "0" * 8 + "-0000-0000-0000-" + "0" * 12, "client_secret_file": str(secret)}
    site.config.write_text(json.dumps(site.settings))
    second = site.cli("doctor", "--only", "credentials", "-F", "json", check=False)

    for done, words in ((first, "0640"), (second, "0644")):
        (fault,) = bad(json.loads(done.stdout)["findings"])
        assert words in fault["what"] and fault["hint"] and "hidden-word" not in done.stdout + done.stderr


def test_a_broker_is_reached_or_not(site):
    """One connection says whether it listens; that it does not is a warning, as the work goes on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        site.settings["mqtt"] = {"host": "127.0.0.1", "port": port}
        site.config.write_text(json.dumps(site.settings))
        _, there = examined(site, "--only", "broker")
    _, gone = examined(site, "--only", "broker")

    assert [there[0]["level"], gone[0]["level"]] == ["ok", "warning"]
    assert there[0]["about"] == f"127.0.0.1:{port}"


# --------------------------------------------------------------------- documents


def test_fields_and_checks_are_in_the_documents():
    """The reference names each field, level and check; the guide names each check."""
    guide = (REPOSITORY / "docs" / "how-to" / "check-the-workstation.md").read_text()

    assert [word for word in (*Finding._fields, *LEVELS, *CHECKS) if word not in SECTION] == []
    assert [check for check in CHECKS if f"`{check}`" not in guide] == []
