"""`status`: what the daemon is doing, what waits and for what, disks, alarms.

A running daemon is asked by its last heartbeat, which costs it nothing; only
what runs wait for is asked of it live. With the daemon down, the journal and
the last heartbeat tell what they know. How it looks is in `glance`.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.alarms import open_alarms
from trigger_daemon.cli.commands import NEEDS_PERSON, NOT_RUNNING, OK, Command, Setup, pass_setup
from trigger_daemon.database import absent
from trigger_daemon.errors import TriggerError

STALE_S = 15.0  # the heartbeat comes every 2 s; a commit on a slow disk may delay it, but not so long
WAITING_MAX = 10  # runs of a state that are told one by one
WAITING_ANSWER_S = 1.0  # status does not wait longer for the daemon than this
QUIET_ALARMS = ("paused",)  # somebody did it on purpose

_WAIT_STATES = ("HELD", "INACTIVE", "PENDING")


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Show it again each second, with the last minutes; q or Ctrl-C ends.")
@click.option("--all", "whole", is_flag=True, help="Everything, however long; else it fits the terminal.")
@pass_setup
def status(setup: Setup, watch: bool, whole: bool) -> None:
    """Show whether all is well, what the daemon is doing, what waits and for what, disks and alarms.

    On a terminal it fits the screen, and says what it leaves out. Exit code 4 if a person is needed: runs are HELD or
    INACTIVE (a consent may be missing), files are blocked, a change of rules waits for a decision, or an alarm stands
    that nobody acknowledged (`pause` is none). 5 if the daemon does not run; what the journal and its last heartbeat
    know is shown all the same.
    """
    if watch:
        from trigger_daemon.cli.watching import watch as show

        show(setup)
        return
    now = gather(setup)
    if setup.json:
        setup.data(text.timed(now))
    else:
        from trigger_daemon.cli import glance

        fits = sys.stdout.isatty() and not whole
        glance.show(now, height=shutil.get_terminal_size().lines - 1 if fits else None)
    raise click.exceptions.Exit(exit_code(now))


def exit_code(now: Mapping[str, Any]) -> int:
    """Return the exit code that a status means."""
    if not now["daemon"]["running"]:
        return NOT_RUNNING
    return NEEDS_PERSON if needs_person(now) else OK


def needs_person(now: Mapping[str, Any]) -> list[str]:
    """Return why a person is needed; empty if none is."""
    counts = now["waiting_counts"]
    why = [f"{text.counted(counts[state], 'run')} {state}" for state in ("HELD", "INACTIVE") if counts[state]]
    if count := sum(rule.get("blocked") or 0 for rule in now["rules"]):
        why.append(f"{text.counted(count, 'file')} blocked")
    if now["undecided"]:
        why.append("a change of rules waits for `rules apply`")
    if count := sum(not a["acked_by"] and a["key"] not in QUIET_ALARMS for a in now["alarms"]):
        why.append(f"{text.counted(count, 'alarm')} {'stands' if count == 1 else 'stand'}")
    if now["daemon"]["heartbeat_age_s"] > STALE_S:
        why.append(f"the daemon's last heartbeat is {text.age(now['daemon']['heartbeat_age_s'])} old")
    return why


# ------------------------------------------------------------------------- gather


def gather(setup: Setup) -> dict[str, Any]:
    """Return the status as its JSON says it. Raises JournalError without permission."""
    client, reader = setup.client, setup.reader
    running = client.alive()
    heartbeat = client.heartbeat()
    began = running and absent(reader.path)  # it was just started for the first time
    known = not began and not (heartbeat is None and absent(reader.path))
    alarms = open_alarms(reader, heartbeat if running else None) if known else []
    beat = heartbeat or _silent()
    age_s = max(0.0, time.time() - beat["time"]) if heartbeat else 0.0
    daemon = {
        **beat["daemon"], "running": running, "heartbeat_time": beat["time"], "heartbeat_age_s": round(age_s, 1),
        "state_dir": str(setup.state_dir), "journal": known,
    }  # fmt: skip
    if running:
        daemon["pid"] = client.pid() or daemon["pid"]
        if age_s > STALE_S:
            daemon["health"] = "alarm"
    else:
        daemon |= {"pid": None, "health": "alarm"}
    rules = beat["rules"]
    if not running and known:
        rules = _rules_of_the_journal(setup, beat)
    counts = {state: sum(rule["runs"].get(state, 0) for rule in rules) for state in _WAIT_STATES}
    waiting, waits = _waiting(setup, running, counts) if known else ([], _no_waits())
    return {
        "host": socket.gethostname(),
        "daemon": daemon,
        "rules": rules,
        "working": _paced(setup, beat) if running and known else [],
        "waiting": waiting,
        "waits": waits,
        "waiting_counts": counts,
        "roots": beat["roots"] if running else [],
        "volumes": [{k: v for k, v in one.items() if k != "trend"} for one in beat["volumes"]] if running else [],
        "throttle": beat.get("throttle") if running else None,
        "destinations_down": beat["destinations_down"] if running else {},
        "alarms": alarms,
        "rules_fault": beat["rules_fault"],
        "undecided": beat["undecided"],
        "paused": beat["paused"],
        "mqtt": beat.get("mqtt") if running else None,
    }


def _silent() -> dict[str, Any]:
    """Return what is known without any heartbeat."""
    daemon: dict[str, Any] = {"pid": None, "version": None, "started_time": None, "health": "ok", "events": {}}
    return {
        "time": None, "daemon": daemon, "rules": [], "working": [], "roots": [], "volumes": [], "destinations_down": {},
        "rules_fault": None, "undecided": {}, "paused": "",
    }  # fmt: skip


def _rules_of_the_journal(setup: Setup, beat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return counts from the journal: the last heartbeat is older than the last commit, and settling files are gone."""
    tally = setup.reader.tally()
    names = dict.fromkeys([*(rule["name"] for rule in beat["rules"]), *tally])
    states = {rule["name"]: rule["state"] for rule in beat["rules"]}
    found = []
    for name in names:
        counts = tally.get(name, {})
        done = [counts[state] for state in ("VERIFIED", "SUCCEEDED") if state in counts]
        found.append({
            "name": name, "state": states.get(name, "removed"), "settling": None, "complete": None, "blocked": None,
            "stalled": None, "files_per_min": None, "bytes_per_s": None, "bytes_per_s_lately": [],
            "runs": {state: count.runs for state, count in counts.items()},
            "files_done": sum(count.files for count in done), "bytes_done": sum(count.bytes for count in done),
        })  # fmt: skip
    return found


def _waiting(
    setup: Setup, running: bool, counts: Mapping[str, int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return runs that do not move, and all of them by reason: in the daemon's words, else in the journal's."""
    runs: list[dict[str, Any]] = []
    for state in _WAIT_STATES:
        if counts[state]:
            runs += setup.reader.runs(state=state, limit=WAITING_MAX)
    live: Mapping[str, Mapping[str, Any]] = {}
    waits = None
    if running and runs:
        try:
            ids = [run["id"] for run in runs]
            answer = setup.ask("runs.waiting", timeout_s=WAITING_ANSWER_S, ids=ids, grouped=True)
            live, waits = answer["runs"], answer.get("waits")
        except TriggerError:
            pass  # the journal's words stand
    told = [
        {
            "run": run["id"], "rule": run["rule"], "group": run["group"], "state": run["state"],
            "waiting_for": live.get(str(run["id"]), {}).get("waiting_for") or run["waiting_for"],
            "error": run["error"], "hint": run["hint"], "changed_time": run["changed_time"],
            "next_time": live.get(str(run["id"]), {}).get("next_time"),
        }
        for run in runs
    ]  # fmt: skip
    return told, waits or _grouped(runs, counts, "its turn" if running else "the daemon to be started")


def _no_waits() -> dict[str, Any]:
    return {"groups": [], "more_runs": 0}


def _grouped(runs: list[dict[str, Any]], counts: Mapping[str, int], fresh: str) -> dict[str, Any]:
    """Return the newest runs by reason, `fresh` for those that nothing has happened to; the others are counted."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        why = (run["error"] if run["state"] == "HELD" else None) or run["waiting_for"] or ""
        why = fresh if why == run["reason"] else why
        group = groups.setdefault((run["state"], why), {
            "state": run["state"], "why": why, "hint": run["hint"] or "", "runs": 0, "files": 0, "bytes": 0,
            "rule": run["rule"], "first_run": run["id"],
        })  # fmt: skip
        group["runs"] += 1
        group["files"] += run["files"]
        group["bytes"] += run["bytes"]
        group["first_run"] = min(group["first_run"], run["id"])
        if group["rule"] != run["rule"]:
            group["rule"] = None
    return {"groups": list(groups.values()), "more_runs": sum(counts.values()) - len(runs)}


def _paced(setup: Setup, beat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs at work with their mean rate since they became ACTIVE, and the time left at that rate."""
    working = [dict(run) for run in beat["working"]]
    if not any(run["bytes_done"] for run in working):
        return [{**run, "bytes_per_s": None, "left_s": None} for run in working]
    since = {run["id"]: run["changed_time"] for run in setup.reader.runs(state="ACTIVE", limit=len(working))}
    for run in working:
        took_s = beat["time"] - since.get(run["run"], beat["time"])
        rate = run["bytes_done"] / took_s if took_s > 0 else 0.0
        run["bytes_per_s"] = round(rate) or None
        run["left_s"] = round((run["bytes"] - run["bytes_done"]) / rate) if rate else None
    return working
