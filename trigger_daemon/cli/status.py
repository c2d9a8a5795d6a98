"""`status`: what the daemon is doing, what waits and for what, disks, alarms.

A running daemon is asked by its last heartbeat, which costs it nothing; only
what runs wait for is asked of it live. With the daemon down, the journal and
the last heartbeat tell what they know.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.alarms import open_alarms
from trigger_daemon.cli.alarms import words as alarm_words
from trigger_daemon.cli.commands import NEEDS_PERSON, NOT_RUNNING, OK, Command, Setup, pass_setup
from trigger_daemon.database import absent
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from rich.console import RenderableType

STALE_S = 15.0  # the heartbeat comes every 2 s; a commit on a slow disk may delay it, but not so long
WATCH_S = 1.0
BAR = 14  # characters
WAITING_MAX = 10  # runs of a state that are shown
WAITING_ANSWER_S = 1.0  # status does not wait longer for the daemon than this
ALARMS_BRIEF_MAX = 3  # in --watch: rules and roots keep their place on 24 lines
QUIET_ALARMS = ("paused",)  # somebody did it on purpose

_WAIT_STATES = ("HELD", "INACTIVE", "PENDING")


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Show it again each second; q or Ctrl-C ends.")
@pass_setup
def status(setup: Setup, watch: bool) -> None:
    """Show what the daemon is doing, what waits and for what, disks and alarms.

    Exit code 4 if a person is needed: runs are HELD or INACTIVE (a consent may be missing), files are blocked, a
    change of rules waits for a decision, or an alarm stands that nobody acknowledged (`pause` is none). 5 if the
    daemon does not run; what the journal and its last heartbeat know is shown all the same.
    """
    if watch:
        _watch(setup)
        return
    now = gather(setup)
    if setup.json:
        setup.data(text.timed(now))
    else:
        text.console().print(shown(now))
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
    if any(not a["acked_by"] and a["key"] not in QUIET_ALARMS for a in now["alarms"]):
        why.append("alarms stand")
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
    return {
        "daemon": daemon,
        "rules": rules,
        "working": _paced(setup, beat) if running and known else [],
        "waiting": _waiting(setup, running, counts) if known else [],
        "waiting_counts": counts,
        "roots": beat["roots"] if running else [],
        "volumes": beat["volumes"] if running else [],
        "destinations_down": beat["destinations_down"] if running else {},
        "alarms": alarms,
        "rules_fault": beat["rules_fault"],
        "undecided": beat["undecided"],
        "paused": beat["paused"],
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
            "stalled": None, "runs": {state: count.runs for state, count in counts.items()},
            "files_done": sum(count.files for count in done), "bytes_done": sum(count.bytes for count in done),
        })  # fmt: skip
    return found


def _waiting(setup: Setup, running: bool, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return runs that do not move by themselves, and what each waits for: the daemon's words, else the journal's."""
    runs: list[dict[str, Any]] = []
    for state in _WAIT_STATES:
        if counts[state]:
            runs += setup.reader.runs(state=state, limit=WAITING_MAX)
    live: Mapping[str, Mapping[str, Any]] = {}
    if running and runs:
        try:
            live = setup.ask("runs.waiting", timeout_s=WAITING_ANSWER_S, ids=[run["id"] for run in runs])["runs"]
        except TriggerError:
            pass  # the journal's words stand
    return [
        {
            "run": run["id"], "rule": run["rule"], "group": run["group"], "state": run["state"],
            "waiting_for": live.get(str(run["id"]), {}).get("waiting_for") or run["waiting_for"],
            "error": run["error"], "hint": run["hint"], "changed_time": run["changed_time"],
        }
        for run in runs
    ]  # fmt: skip


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


# --------------------------------------------------------------------------- text


def shown(now: Mapping[str, Any], *, brief: bool = False) -> RenderableType:
    """Return everything as one thing rich can print; `brief` for a screen, which alarms must not fill."""
    from rich.console import Group

    alarms = _alarms_brief(now) if brief else _alarms(now)
    parts = [
        _head(now), *_rules(now), *_roots(now), *alarms, *_working(now), *_waits(now), *_volumes(now),
    ]  # fmt: skip
    return Group(*parts)


def _head(now: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    daemon = now["daemon"]
    words = [f"trigger-daemon {daemon['version'] or ''}".strip()]
    if daemon["running"]:
        words.append(f"running, {daemon['health']}")
        words.append(f"pid {daemon['pid']}")
        if daemon["started_time"]:
            words.append(f"up {text.age(time.time() - daemon['started_time'])}")
        style = {"ok": "green", "degraded": "yellow"}.get(daemon["health"], "bold red")
    else:
        words.append("NOT RUNNING")
        if daemon["heartbeat_time"]:
            words.append(f"last heard of {text.clock(daemon['heartbeat_time'])}")
        style = "bold red"
    lines = [" · ".join(words)]
    if not daemon["running"]:
        lines.append(_where(daemon))
    if now["paused"]:
        lines.append(text.safe(now["paused"]))
    why = needs_person(now)
    if why and daemon["running"]:
        lines.append(f"A person is needed: {'; '.join(why)}.")
    return Text("\n".join(lines), style=style)


def _where(daemon: Mapping[str, Any]) -> str:
    """Return where nothing runs, and what to do: with the wrong settings one looks in the wrong place."""
    start = "`trigger-daemon serve` (or `systemctl start trigger-daemon` where it is a service)"
    place = text.name(daemon["state_dir"])
    if daemon["journal"]:
        return f"no daemon holds {place}\nhint: start it: {start}"
    return f"there is no journal in {place}\nhint: name its settings with --config, or start it: {start}"


def _alarms_brief(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield one line an alarm, those first that nobody has acknowledged."""
    from rich.text import Text

    alarms = sorted(now["alarms"], key=lambda alarm: bool(alarm["acked_by"]))
    if alarms:
        yield Text("\nALARMS", style="bold")
    for alarm in alarms[:ALARMS_BRIEF_MAX]:
        style = "" if alarm["acked_by"] else "red"
        yield Text(f"! {text.safe(alarm['what'])}", style=style, no_wrap=True, overflow="ellipsis")
    if (more := len(alarms) - ALARMS_BRIEF_MAX) > 0:
        yield Text(f"+{more} more: `trigger-daemon alarms list`")
    yield from _changes(now)


def _alarms(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    from rich.text import Text

    if now["alarms"]:
        yield Text("\nALARMS", style="bold")
    for alarm in now["alarms"]:
        yield Text(alarm_words(alarm), style="" if alarm["acked_by"] else "red")
    yield from _changes(now)


def _changes(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what keeps the rule files from being in force."""
    from rich.text import Text

    if fault := now["rules_fault"]:
        place = f"{fault['file']}:{fault['line']}:{fault['column']}"
        yield Text(f"\nthe rule files have a fault; the last good ones go on: {text.safe(place)}:"
                   f" {text.safe(fault['message'])}", style="red")  # fmt: skip
    for rule, told in now["undecided"].items():
        yield Text(f"\nrule {text.safe(rule)} was moved from {text.name(told['was'])} to {text.name(told['now'])}:"
                   f" {told['files_done']:,} files were done there; decide by `trigger-daemon rules apply`",
                   style="yellow")  # fmt: skip


def _rules(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    if not now["rules"]:
        yield "\nno rules are in force"
        return
    yield ""
    shown = text.table(
        ("rule", "name"), ("state", "word"), ("settling", "right"), ("waiting", "right"), ("blocked", "right"),
        ("runs", "wide"), ("done", "right"), ("size", "right"),
    )  # fmt: skip
    for rule in now["rules"]:
        runs = ", ".join(f"{count:,} {state}" for state, count in sorted(rule["runs"].items()))
        text.row(
            shown, rule["name"], rule["state"], _number(rule["settling"]), _number(rule["complete"]),
            _number(rule["blocked"]), runs, _number(rule["files_done"]), text.size(rule["bytes_done"]),
        )  # fmt: skip
    yield shown


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}" if count else "-"


def _working(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if not now["working"]:
        return
    yield Text("\nAT WORK", style="bold")
    grid = Table.grid(padding=(0, 2), expand=False)
    for run in now["working"]:
        done, whole = (run["bytes_done"], run["bytes"]) if run["bytes"] else (run["files_done"], run["files"])
        words = f"{text.size(run['bytes_done'])} of {text.size(run['bytes'])}"
        if run["bytes_per_s"]:
            words += f", {text.size(run['bytes_per_s'])}/s, {text.age(run['left_s'])} left"
        grid.add_row(
            Text(f"run {run['run']}"), Text(text.safe(run["rule"])), Text(run["state"]),
            Text(_bar(done, whole)), Text(words),
        )  # fmt: skip
    yield grid


def _bar(done: int, whole: int) -> str:
    """Return progress that any terminal, and a file, can show."""
    share = min(1.0, done / whole) if whole else 0.0
    full = int(share * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {100 * share:3.0f} %"


def _waits(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    if not now["waiting"]:
        return
    yield ""
    shown = text.table(("run", "right"), ("rule", "name"), ("state", "word"), ("group", "name"), ("waits for", "wide"))
    for run in now["waiting"]:
        waits = run["error"] if run["state"] == "HELD" and run["error"] else run["waiting_for"]
        text.row(shown, run["run"], run["rule"], run["state"], text.group(run["group"]), waits)
        if run["hint"] and run["state"] != "PENDING":
            text.row(shown, "", "", "", "", f"hint: {run['hint']}")
    yield shown
    for state, count in now["waiting_counts"].items():
        if count > WAITING_MAX:
            yield f"and {count - WAITING_MAX:,} more {state}: `trigger-daemon runs list --state {state}`"


def _roots(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    if not now["roots"]:
        return
    yield ""
    shown = text.table("root", ("health", "word"), ("events", "word"), ("", "wide"))
    for root in now["roots"]:
        why = root["why"] if root["health"] != "ok" else ""
        text.row(shown, text.name(root["path"]), root["health"], root["events"], why)
    yield shown


def _volumes(now: Mapping[str, Any]) -> Iterator[RenderableType]:
    known = [volume for volume in now["volumes"] if volume["total_bytes"] or volume.get("error")]
    if not known:
        return
    yield ""
    shown = text.table(
        "volume", ("state", "word"), ("free", "right"), ("of", "right"), ("", "right"), ("fills", "word"),
        ("full in", "word"),
    )  # fmt: skip
    for volume in known:
        if volume.get("error"):
            text.row(shown, text.name(volume["path"]), "?", "", "", "", volume["error"])
            continue
        rate = volume["fill_bytes_per_s"] or 0
        text.row(
            shown, text.name(volume["path"]), volume["state"], text.size(volume["free_bytes"]),
            text.size(volume["total_bytes"]), f"{100 * volume['free_bytes'] / volume['total_bytes']:.0f} %",
            f"{text.size(rate)}/s" if rate > 0 else "", text.age(volume["full_in_s"]) if volume["full_in_s"] else "",
        )  # fmt: skip
    yield shown


# -------------------------------------------------------------------------- watch


def _watch(setup: Setup) -> None:
    """Show the status each second until q or Ctrl-C."""
    if setup.json or not sys.stdout.isatty():
        while True:  # one JSON object a line; ends with the reader's end of the pipe, or Ctrl-C
            now = gather(setup)
            if setup.json:
                setup.data(text.timed(now), compact=True)
            else:
                text.console().print(shown(now, brief=True))
                click.echo()
            time.sleep(WATCH_S)
    from rich.live import Live

    with _keys() as pressed, Live(console=text.console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(shown(gather(setup), brief=True), refresh=True)
            if pressed(WATCH_S) in ("q", "Q"):
                return


@contextmanager
def _keys() -> Iterator[Any]:
    """Let single keys be read; where stdin is no terminal, only time passes."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import os
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(wait_s: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        return os.read(descriptor, 1).decode("ascii", "replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _sleep(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""
