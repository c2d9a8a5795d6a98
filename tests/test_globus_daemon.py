"""The daemon with the emulated Globus: seen with the published CLI, at night, with lapsed consents, a wrong clock."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.globus.emulator import Emulator
from tests.globus.facility import CLIENT, SECRET, Facility

pytest.importorskip("globus_sdk")

from trigger_daemon import actions
from trigger_daemon.actions import globus_transfer

MAPPED = "GCSv5_mapped_collection"
WAIT = {"StartAt": "Rest", "States": {"Rest": {"Type": "Wait", "Seconds": 600, "End": True}}}
PASS = {"StartAt": "Note", "States": {"Note": {"Type": "Pass", "End": True}}}


@pytest.fixture
def facility(tmp_path: Path) -> Iterator[Facility]:
    with Facility(tmp_path) as made:
        yield made


# ---------------------------------------------------------------------- the published CLI


@pytest.fixture
def globus_cli(facility: Facility, tmp_path: Path) -> Callable[..., Any]:
    """Run the published CLI with the daemon's account; it keeps its tokens below a home of its own."""
    pytest.importorskip("globus_cli")
    client = {"GLOBUS_CLI_CLIENT_ID": CLIENT, "GLOBUS_CLI_CLIENT_SECRET": SECRET, "GLOBUS_CLI_INTERACTIVE": "0",
              "HOME": str(tmp_path / "home")}  # fmt: skip

    def run(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "globus_cli", *words, "-F", "json"], capture_output=True, text=True, timeout=60,
            env=os.environ | facility.globus.environment() | client, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return json.loads(done.stdout)

    return run


def test_the_published_cli_lists_shows_and_cancels_a_task(
    facility: Facility, globus_cli: Callable[..., Any]
) -> None:
    """What the daemon has started can be found by its label, and ended, without the daemon; nothing is lost by that."""
    facility.site.write_rules(facility.transfer())
    facility.globus.mood("Archive", down="ENDPOINT_TOO_BUSY")
    facility.write("move")
    facility.start()
    (run,) = facility.until("move", "ACTIVE")
    number = facility.show(run)["handle"]["task"]

    (listed,) = globus_cli("task", "list", "--filter-label", f"move {run}.1*")["DATA"]
    assert (listed["task_id"], listed["status"]) == (number, "ACTIVE")
    shown = globus_cli("task", "show", number)
    assert (shown["verify_checksum"], shown["label"]) == (True, listed["label"])
    facility.globus.wait(lambda: facility.globus.tasks()[0]["faults"])
    codes = [event["code"] for event in globus_cli("task", "event-list", number)["DATA"]]
    assert (codes[0], codes[-1]) == ("ENDPOINT_TOO_BUSY", "STARTED")
    assert globus_cli("task", "cancel", number)["code"] == "Canceled"

    facility.until("move", "HELD")
    held = facility.show(run)
    assert held["error"] == "cancelled at Globus"
    assert "runs retry" in held["hint"]
    facility.globus.mood("Archive", down=None)
    facility.site.cli("runs", "retry", str(run))
    facility.until("move", "VERIFIED")
    assert [task["status"] for task in globus_cli("task", "list")["DATA"]] == ["SUCCEEDED", "FAILED"]
    delivered = globus_cli("task", "show", facility.show(run)["handle"]["task"], "--successful-transfers")["DATA"]
    assert [one["destination_path"] for one in delivered] == ["/raw/move/a.tif"]


def test_the_published_cli_lists_shows_and_cancels_a_run(facility: Facility, globus_cli: Callable[..., Any]) -> None:
    """A run of a flow likewise; a person decides what becomes of the batch."""
    flow = facility.globus.flow(WAIT)
    facility.site.write_rules(facility.flow("deliver", flow, label="{rule} {batch}"))
    facility.write("deliver")
    facility.start()
    (run,) = facility.until("deliver", "ACTIVE")
    number = facility.show(run)["handle"]["run"]

    (listed,) = globus_cli("flows", "run", "list", "--filter-flow-id", flow)["runs"]
    assert (listed["run_id"], listed["status"]) == (number, "ACTIVE")
    assert listed["label"].startswith(f"deliver {run} td-")
    assert globus_cli("flows", "run", "show", number)["tags"] == [listed["label"].split()[-1]]
    entries = globus_cli("flows", "run", "show-logs", number)["entries"]
    assert "FlowStarted" in [entry["code"] for entry in entries]
    globus_cli("flows", "run", "cancel", number)

    facility.until("deliver", "HELD")
    assert "canceled" in facility.show(run)["error"].lower()
    shown = facility.site.cli("runs", "show", str(run)).stdout
    assert f"output   https://app.globus.org/runs/{number}" in re.sub(r" +", "   ", shown)
    facility.site.cli("runs", "abandon", str(run))
    facility.until("deliver", "ABANDONED")


# ------------------------------------------------------------------------- a rule is mended


def test_a_mended_rule_reaches_the_runs_that_it_was_mended_for(facility: Facility) -> None:
    """Nobody sends hundreds of files again by name: the held run begins anew, with what the rule says now."""
    schema = {"type": "object", "properties": {"sample": {"type": "string"}}, "additionalProperties": False}
    flow = facility.globus.flow(PASS, schema)
    facility.site.write_rules(facility.flow("note", flow, input={"smaple": "x"}))
    facility.start()
    facility.write("note")
    (run,) = facility.until("note", "HELD")
    assert "runs retry --anew" in facility.show(run)["hint"]
    facility.site.write_rules(facility.flow("note", flow, input={"sample": "x"}))
    facility.site.until(
        lambda: "smaple" not in facility.site.cli("rules", "show", "note").stdout, 20, "the rule is in force"
    )
    facility.site.cli("runs", "retry", str(run))
    facility.until("note", "HELD")

    facility.site.cli("runs", "retry", str(run), "--anew")
    facility.until("note", "SUCCEEDED")
    assert facility.show(run)["request"]["options"]["input"] == {"sample": "x"}


# ------------------------------------------------------------------------------ at night


def test_all_that_is_new_goes_at_night(facility: Facility) -> None:
    """`batch: {at}`: nothing by day; at its time all since the last one, in parts that a task takes; and also later.

    The night that the daemon does not see is made up for when it comes back.
    """
    facility.site.settings["time_zone"] = "UTC"
    evening = datetime.now(UTC).replace(hour=21, minute=59, second=30) + timedelta(days=1)
    facility.shift(evening.timestamp() - time.time())
    facility.site.write_rules(facility.transfer("sync", rule={"batch": {"at": ["22:00"]}}))
    count = globus_transfer.Action.FILES_MAX + 50
    for number in range(count):
        facility.write("sync", f"m{number:04}.tif", 10)
    facility.start()
    facility.site.until(lambda: _open_files(facility) == [count], 25, "all wait")
    assert facility.globus.tasks() == []
    facility.until("sync", "VERIFIED", "VERIFIED", timeout_s=60)
    assert sorted(task["files"] for task in facility.globus.tasks()) == [50, count - 50]

    facility.write("sync", "evening.tif")
    facility.site.until(lambda: _open_files(facility) == [1], 30, "the next one waits")
    facility.site.stop()
    facility.shift((evening + timedelta(days=1, hours=5)).timestamp() - time.time())
    facility.start()
    facility.until("sync", "VERIFIED", "VERIFIED", "VERIFIED")
    site = facility.site
    assert site.digests(site.data / "sync") == site.digests(site.out / "raw" / "sync")


def _open_files(facility: Facility) -> list[int]:
    return [one["files"] for one in facility.json("batches", "list")["batches"]]


# -------------------------------------------------------------------------- consents, clocks


def test_a_consent_that_lapses_holds_only_the_runs_that_need_it(tmp_path: Path) -> None:
    """Others go on; the hint is the command that mends it, and nobody restarts the daemon."""
    with Facility(tmp_path, person=True) as facility:
        tape = facility.globus.collection("Tape", facility.site.base / "tape", entity_type=MAPPED)
        facility.globus.control("POST", "login", {"identity": facility.globus.identity("ada@example.org")})
        facility.site.write_rules(facility.transfer("free"), facility.transfer("asks", to=tape))
        facility.site.config.write_text(json.dumps(facility.site.settings))
        facility.login()
        facility.start()
        facility.write("asks", "before.tif")
        facility.until("asks", "VERIFIED")

        facility.globus.require_consent("Tape")
        facility.write("free")
        facility.write("asks", "after.tif")
        facility.until("free", "VERIFIED")
        _, held = facility.until("asks", "VERIFIED", "HELD")
        told = facility.show(held)
        assert "ConsentRequired" in told["error"]
        assert "trigger-daemon globus login" in told["hint"]
        assert facility.site.cli("status").returncode == 4

        facility.login()
        facility.site.cli("runs", "retry", "--state", "HELD")
        facility.until("asks", "VERIFIED", "VERIFIED")


def test_a_login_that_ends_stops_nothing_that_is_under_way(tmp_path: Path) -> None:
    """New runs are held, those at the service are INACTIVE until somebody logs in, and then end by themselves."""
    with Facility(tmp_path, person=True) as facility:
        facility.globus.control("POST", "login", {"identity": facility.globus.identity("ada@example.org")})
        facility.site.write_rules(facility.transfer(), facility.transfer("later"))
        facility.site.config.write_text(json.dumps(facility.site.settings))
        facility.login()
        facility.globus.mood("Archive", down="ENDPOINT_TOO_BUSY")
        facility.start()
        facility.write("move")
        facility.until("move", "ACTIVE")

        facility.globus.expire_tokens(refresh=True)
        (under_way,) = facility.until("move", "INACTIVE")
        facility.write("later")
        facility.until("later", "HELD")
        assert "globus login" in facility.show(under_way)["hint"]

        facility.globus.mood("Archive", down=None)
        facility.login()
        facility.site.cli("runs", "retry", "--state", "HELD")
        facility.until("later", "VERIFIED")
        facility.until("move", "VERIFIED", timeout_s=90)
        assert len(facility.globus.tasks()) == 2


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_wrong_clock_neither_loses_nor_repeats(facility: Facility, hours: int) -> None:
    """Deadlines are by the service's clock, and a lost flow run is found whatever ours shows."""
    flow = facility.globus.flow(PASS)
    facility.globus.settings(run_listed_after_s=1)
    facility.site.write_rules(facility.transfer(deadline="1h"), facility.flow("note", flow))
    facility.globus.fault("POST /v0.10/transfer", "drop_after")
    facility.globus.fault("POST /flows/*/run", "drop_after")
    facility.shift(hours * 3_600.0)
    facility.start()
    facility.write("move")
    facility.write("note")

    facility.until("move", "VERIFIED")
    facility.until("note", "SUCCEEDED")
    assert len(facility.globus.tasks()) == len(facility.globus.runs()) == 1


# --------------------------------------------------------------------------- the action alone


def test_an_end_that_is_heard_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request asks for all tasks: whose end it brings is nudged, and needs no request of its own."""
    with Emulator(tmp_path / "globus") as globus:
        for key, value in globus.environment().items():
            monkeypatch.setenv(key, value)
        globus.client(CLIENT, SECRET)
        (tmp_path / "krios").mkdir()
        krios = globus.collection("Krios", tmp_path / "krios")
        quick, slow = globus.collection("Quick", tmp_path / "quick"), globus.collection("Slow", tmp_path / "slow")
        globus.mood("Slow", down="ENDPOINT_TOO_BUSY")
        globus.mood("Quick", down="ENDPOINT_TOO_BUSY")
        settings = {"client_id": CLIENT, "client_secret": SECRET, "poll_s": 0.01,
                    "collections": {krios: {str(tmp_path / "krios"): "/"}}}  # fmt: skip
        nudged: list[tuple[int, int]] = []
        context = actions.Context(
            str(tmp_path), lambda run, attempt: nudged.append((run, attempt)), settings={"globus": settings}
        )
        action = globus_transfer.Action(context)
        handles, requests = {}, {}
        for run, target in ((1, quick), (2, slow)):
            path = tmp_path / "krios" / f"{run}.tif"
            path.write_bytes(b"frames")
            seen = path.stat()
            file = actions.File(str(path.parent), path.name, seen.st_size, seen.st_mtime_ns)
            options = {"from": krios, "to": target, "path": "/", "deadline": 600.0, "stuck_after": 600.0}
            requests[run] = actions.Request(run, 3, "move", {}, {}, (file,), options)
            handles[run] = action.start(requests[run], action.prepare(requests[run]))
        for run in (1, 2):
            assert action.poll(requests[run], handles[run]).status == "active"
        assert nudged == []

        globus.mood("Quick", down=None)
        globus.wait(lambda: globus.tasks()[0]["status"] == "SUCCEEDED")
        globus.wait(lambda: action.poll(requests[2], handles[2]) and nudged)
        asked = len(globus.requests())
        assert nudged[0] == (1, 3)
        assert action.poll(requests[1], handles[1]).status == "succeeded"
        assert len(globus.requests()) - asked <= 1  # none, unless the news is older than a poll's pause
        action.close()
