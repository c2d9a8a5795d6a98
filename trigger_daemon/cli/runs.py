"""`runs`: actions applied to batches."""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, Asked, Group, Setup, captures, pass_setup, why_option
from trigger_daemon.core.model import RunState
from trigger_daemon.errors import TriggerError

OUTPUT_SHOWN_MAX = 200  # characters of one value
FILES_SHOWN = 10  # of a manifest, without --all
MOVES_SHOWN = 20  # attempts, and transitions, without --all: a run that is retried for a week has thousands
FILTERED_MAX = 10_000  # runs that one order by filter may mean
ORDER_RUNS_MAX = 1_000  # in one order: its answer comes within a second

_STATES = {
    "retry": (RunState.HELD,),
    "hold": (RunState.PENDING, RunState.STARTING, RunState.ACTIVE, RunState.INACTIVE),
    "cancel": (RunState.PENDING, RunState.STARTING, RunState.ACTIVE, RunState.INACTIVE, RunState.HELD),
    "abandon": (RunState.HELD,),
}

state_option = click.option(
    "--state",
    type=click.Choice([str(state) for state in RunState], case_sensitive=False),
    metavar="STATE",
    help=f"In this state: {', '.join(map(str, RunState))}.",
)
rule_option = click.option("--rule", help="Of this rule.")
group_option = click.option(
    "--group", "groups", multiple=True, metavar="CAPTURE=VALUE", help="Of this group; may be repeated."
)


@click.group(cls=Group)
def runs() -> None:
    """Actions applied to batches: a run has the number of its batch."""


@runs.command("list")
@rule_option
@state_option
@group_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@click.option("--before", type=int, metavar="ID", help="Only older ones: goes on from an earlier list.")
@pass_setup
def list_(
    setup: Setup, rule: str | None, state: str | None, groups: tuple[str, ...], limit: int, before: int | None
) -> None:
    """Show runs, the newest first. Works when the daemon is down."""
    found = setup.reader.runs(rule=rule, state=state, group=captures(groups) or None, limit=limit, before_id=before)
    _wait_live(setup, found)
    if setup.json:
        setup.data({"runs": [text.timed(run) for run in found]})
        return
    if not found:
        click.echo("no such runs")
        return
    text.console().print(_table(found))
    if len(found) == limit:
        text.note(f"there may be more: --before {found[-1]['id']}")
    if any(not run["final"] for run in found):
        setup.tell_if_down()


def _wait_live(setup: Setup, found: list[dict[str, Any]]) -> None:
    """Let the daemon, if it runs and answers soon, say what the open ones wait for."""
    ids = [run["id"] for run in found if not run["final"]]
    if not ids or not setup.client.alive():
        return
    try:
        live = setup.ask("runs.waiting", timeout_s=2.0, ids=ids)["runs"]
    except TriggerError:
        return  # the journal's words stand
    for run in found:
        if told := live.get(str(run["id"])):
            run["waiting_for"] = told["waiting_for"] or None
            run["next_time"] = told.get("next_time")
            run["files_done"], run["bytes_done"] = told["files_done"], told["bytes_done"]
            if told["error"]:  # the journal keeps what moved the run; that it could not be prepared moves nothing
                run["error"] = told["error"]
            if told["error"] or told["hint"]:
                run["hint"] = told["hint"]


def _table(found: Sequence[Mapping[str, Any]]) -> Any:
    now = time.time()
    shown = text.table(
        ("run", "right"), ("state", "word"), ("rule", "name"), ("group", "group"), ("files", "right"),
        ("size", "right"), ("ago", "right"), ("waits for", "two"),
    )  # fmt: skip
    for run in found:
        waits = (run["error"] if run["state"] == RunState.HELD else None) or run["waiting_for"] or run["error"] or ""
        waits += text.looked_next(run.get("next_time"))
        text.row(
            shown, run["id"], run["state"], run["rule"], text.group(run["group"]), f"{run['files']:,}",
            text.size(run["bytes"]), text.age(now - run["changed_time"]), waits,
        )  # fmt: skip
    return shown


@runs.command("show")
@click.argument("id", type=int, required=False, metavar="ID")
@click.option("--all", "whole", is_flag=True, help="Every attempt, transition and file, however many.")
@pass_setup
def show(setup: Setup, id: int | None, whole: bool) -> None:
    """Tell all of one run: how far it is, what it waits for, attempts, transitions, output, files and their copies.

    Long lists are cut, and what is left out is counted; JSON has all.
    """
    if id is None:
        raise Asked(
            "which run? Give its number",
            "`trigger-daemon runs list` shows the newest with their numbers; `explain PATH` names the run of a file",
            click.get_current_context(),
        )
    run = setup.reader.run(id)
    if run is None:
        raise TriggerError(f"there is no run {id}", hint="`trigger-daemon runs list` shows them")
    _wait_live(setup, [run])
    if setup.json:
        setup.data(text.timed(run))
        return
    _print(run, whole=whole)
    if not run["final"]:
        setup.tell_if_down()


def _print(run: Mapping[str, Any], *, whole: bool) -> None:
    console = text.console()
    since = "" if run["final"] else f" for {text.age(time.time() - run['changed_time'])}"
    click.echo(f"run {run['id']}  {text.coloured(run['state'])}{since}")
    request = run["request"] or {}
    rows = [
        ("rule", text.safe(run["rule"])),
        ("group", text.group(run["group"])),
        ("progress", _progress(run, time.time())),
        ("waits for", text.safe((run["waiting_for"] or "") + text.looked_next(run.get("next_time")))),
        ("error", text.safe(run["error"] or "")),
        ("hint", text.safe(run["hint"] or "")),
        ("closed", f"{text.clock(run['created_time'])}, because {text.safe(run['reason'])}"),
        ("size", f"{text.counted(run['files'], 'file')}, {text.size(run['bytes'])}"),
        ("action", text.safe(str(request.get("action", "")))),
        *((f"  {key}", _plain(value)) for key, value in request.get("options", {}).items() if value is not None),
        ("handle", _plain(run["handle"])),
        *_output(run["output"]),
        ("proved", text.clock(run["proof_time"])),
        ("copies", _copies(run)),
    ]
    click.echo(text.pairs(rows, width=console.width))
    more = f"trigger-daemon runs show {run['id']} --all"
    _print_attempts(console, run["attempts"], whole, more)
    _print_transitions(console, run["transitions"], whole, more)
    _print_manifest(run, whole, more)


def _progress(run: Mapping[str, Any], now: float) -> str:
    """Return how far a run at work is: the mean rate since it became ACTIVE, and the time left at that rate."""
    if run["state"] != RunState.ACTIVE or not (run.get("bytes_done") or run.get("files_done")):
        return ""
    done, rate = run["bytes_done"], run["bytes_done"] / max(1.0, now - run["changed_time"])
    words = [f"{text.size(done)} of {text.size(run['bytes'])}"]
    if run["files_done"]:
        words.append(f"{run['files_done']:,} of {text.counted(run['files'], 'file')}")
    if done and done < run["bytes"]:
        words += [f"{text.size(rate)}/s", f"{text.age((run['bytes'] - done) / rate)} left"]
    share = f"{100 * done // run['bytes']} %, " if run["bytes"] else ""
    return share + ", ".join(words)


def _copies(run: Mapping[str, Any]) -> str:
    """Return where proved copies lie, in one line: the directory that holds all."""
    places = [str(place) for member in run["manifest"] for place in member["to"]]
    if not places:
        return ""
    whole = [place for place in places if place.startswith("/")]
    where = f", below {text.name(posixpath.commonpath(whole))}" if len(whole) == len(places) else ""
    return f"{len(places):,} proved{where}"


def _plain(value: Any) -> str:
    """Return a provider's JSON in one line."""
    if value is None or value == "" or value == {}:
        return ""
    if isinstance(value, Mapping):
        return text.safe(", ".join(f"{key}: {item}" for key, item in value.items()))
    return text.safe(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _output(value: Any) -> list[tuple[str, str]]:
    """Return a provider's output in rows; what is deep is JSON, cut to a readable length."""
    if not isinstance(value, Mapping) or not value:
        return [("output", _plain(value))]
    rows = [("output", text.safe(str(value.get("link") or "of the provider:")))]
    for key, item in value.items():
        if key == "link":
            continue
        told = json.dumps(item, ensure_ascii=False) if isinstance(item, Mapping | list) else str(item)
        if len(told) > OUTPUT_SHOWN_MAX:
            told = f"{told[:OUTPUT_SHOWN_MAX]}... (-F json shows all)"
        rows.append((f"  {key}", text.safe(told)))
    return rows


def _last(items: Sequence[Any], whole: bool, noun: str, more: str) -> Sequence[Any]:
    """Return the last of a long list, saying how many come before."""
    if whole or len(items) <= MOVES_SHOWN:
        return items
    click.echo(f"{text.counted(len(items) - MOVES_SHOWN, f'earlier {noun}')}: `{more}`")
    return items[-MOVES_SHOWN:]


def _print_attempts(console: Any, attempts: Sequence[Mapping[str, Any]], whole: bool, more: str) -> None:
    if not attempts:
        return
    click.echo()
    shown = text.table(("attempt", "right"), ("begun", "word"), ("took", "right"), ("outcome", "wide"))
    for attempt in _last(attempts, whole, "attempt", more):
        ended = attempt["ended_time"]
        took = text.age(ended - attempt["made_time"]) if ended else ""
        text.row(shown, attempt["attempt"], text.clock(attempt["made_time"]), took, attempt["outcome"] or "under way")
    console.print(shown)


def _print_transitions(console: Any, transitions: Sequence[Mapping[str, Any]], whole: bool, more: str) -> None:
    click.echo()
    shown = text.table(("at", "word"), ("to", "word"), ("because", "wide"))
    for move in _last(transitions, whole, "transition", more):
        text.row(shown, text.clock(move["time"]), move["to"], move["because"])
    console.print(shown)


def _print_manifest(run: Mapping[str, Any], whole: bool, more: str) -> None:
    """One file on a line or two, never broken: people copy paths."""
    click.echo()
    if run["thinned"]:
        click.echo("its files are not kept any more (keep_done in the settings)")
    for member in run["manifest"] if whole else run["manifest"][:FILES_SHOWN]:
        marks = ", ".join(mark for mark in (member["role"], member["flag"]) if mark)
        path = text.name(f"{member['root'].rstrip('/')}/{member['path']}")
        click.echo(f"{text.size(member['size']):>9}  {path}" + (f"  ({text.safe(marks)})" if marks else ""))
        if member["digest"]:
            places = "".join(f"  {text.name(str(place))}" for place in member["to"])
            click.echo(f"           {text.safe(str(member['digest']))}{places}")
    if not whole and (left := len(run["manifest"]) - FILES_SHOWN) > 0:
        click.echo(f"+{text.counted(left, 'more file')}: `{more}`")


# -------------------------------------------------------------------------- verbs


def _verb(name: str, help_: str, *more: Callable[[Any], Any]) -> None:
    @runs.command(name, help=help_)
    @click.argument("ids", nargs=-1, type=int, metavar="[ID]...")
    @rule_option
    @state_option
    @group_option
    @click.option("--dry-run", is_flag=True, help="Only show which runs it would be.")
    @why_option
    @pass_setup
    def command(
        setup: Setup, ids: tuple[int, ...], rule: str | None, state: str | None, groups: tuple[str, ...], dry_run: bool,
        why: str, **args: Any,
    ) -> None:  # fmt: skip
        states = (*_STATES[name], RunState.PENDING) if args.get("anyway") else _STATES[name]
        chosen = _chosen(setup, states, ids, rule, state, groups)
        if dry_run:
            _would(setup, name, chosen)
        else:
            _order(setup, name, chosen, why, **args)

    for option in more:
        option(command)


_verb(
    "retry",
    "Let HELD runs go on, and PENDING ones at once: by number, or all that --rule, --group, --state say.",
    click.option(
        "--anew",
        is_flag=True,
        help="With the options that the rule has now; only HELD runs, and such as wait for another rule.",
    ),
    click.option("--anyway", is_flag=True, help="Also if the rule that they wait for (`after`) has not succeeded."),
)
_verb("hold", "Stop runs until `retry`; nothing is lost. What is under way is followed to its end.")
_verb("cancel", "Ask the provider to end runs. They are CANCELLED once it confirms; their files are not sent again.")
_verb("abandon", "Give HELD runs up for ever; their files are not sent again by themselves.")


def _chosen(
    setup: Setup, states: Sequence[RunState], ids: tuple[int, ...], rule: str | None, state: str | None,
    groups: tuple[str, ...],
) -> list[int]:  # fmt: skip
    """Return the runs that are meant, oldest first. Raises UsageError for none or both ways to say it."""
    filtered = rule is not None or state is not None or bool(groups)
    if ids and filtered:
        raise click.UsageError("give numbers, or --rule, --group and --state, not both")
    if ids:
        return list(dict.fromkeys(ids))
    if not filtered:
        raise click.UsageError("which runs? Give numbers, or --rule, --group, --state")
    wanted = captures(groups) or None
    found: list[int] = []
    for one in [state] if state else list(map(str, states)):
        found += [run["id"] for run in setup.reader.runs(rule=rule, state=one, group=wanted, limit=FILTERED_MAX + 1)]
    if len(found) > FILTERED_MAX:
        raise TriggerError(f"more than {FILTERED_MAX:,} runs are meant", hint="narrow it by --rule, --group or --state")
    if not found:
        raise TriggerError("no run is meant", hint="`trigger-daemon runs list` with the same options shows none either")
    return sorted(found)


def _would(setup: Setup, verb: str, ids: Sequence[int]) -> None:
    found = [run for run in (setup.reader.run(number) for number in ids) if run is not None]
    if setup.json:
        setup.data({"dry_run": True, "verb": verb, "ids": [run["id"] for run in found]})
        return
    if found:
        text.console().print(_table(found))
    text.note(f"would {verb} {text.counted(len(found), 'run')}; nothing was done")
    if missing := sorted(set(ids) - {run["id"] for run in found}):
        raise TriggerError(f"there is no run {', '.join(map(str, missing))}")


def _order(setup: Setup, verb: str, ids: Sequence[int], why: str, **args: Any) -> None:
    done: list[int] = []
    errors: list[str] = []
    hint = ""
    for first in range(0, len(ids), ORDER_RUNS_MAX):
        answer = setup.ask(f"runs.{verb}", why, ids=list(ids[first : first + ORDER_RUNS_MAX]), **args)
        done += answer.get("done", ())
        errors += answer.get("errors") or ([] if answer["ok"] else [answer["error"]])
        hint = answer.get("hint") or hint
    if setup.json:
        setup.data({"ok": not errors, "done": done, "errors": errors})
    elif done:
        click.echo(f"{verb}: run {', '.join(map(str, done[:20]))}{' ...' if len(done) > 20 else ''}")
    if errors:
        text.complain("; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else ""), hint)
        raise click.exceptions.Exit(FAILURE)
