"""`globus timer`: a safety net at the service, which transfers a rule's directory by the clock.

It runs without the daemon, wherever the source collection can be reached: what
is equal at the destination already is left out, by checksum.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import Group, Setup, pass_setup
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from trigger_daemon.config import Settings
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.globus import Account
    from trigger_daemon.globus.service import Service

EVERY_LEAST_S = 3_600.0  # each run reads every file at both ends
SYNC_CHECKSUM = 3
OVER = ("ended", "deleted")


@click.group(cls=Group)
def timer() -> None:
    """Transfers that the service starts by the clock, also while the daemon does not run."""


# -------------------------------------------------------------------------- create


@timer.command("create")
@click.argument("rule")
@click.option("--every", default="1d", show_default=True, metavar="DURATION", help="From one start to the next.")
@click.option(
    "--start", metavar="TIME", help="The first one: 02:30, or 2026-12-01T02:30; at once if absent."
)
@pass_setup
def create(setup: Setup, rule: str, every: str, start: str | None) -> None:
    """Let the service compare a rule's directory with its destination again and again, and send what differs.

    It sends whole directories: also what the rule's patterns leave out, and what is being written meanwhile, which a
    later time corrects. It proves nothing to the daemon, which goes on as if there were none. Where sources are
    deleted after their proof it is refused: it would replace copies that are all that is left.
    """
    from trigger_daemon.cli.globus import rules_of, service_of, told

    settings = setup.settings()
    interval_s, first = _interval_s(every), _instant(start, settings)
    rules = rules_of(settings)
    found = _rule(rule, rules)
    with told(setup), service_of(settings) as service:
        document = _document(found, service.account, interval_s, first)
        _refuse_to_replace(setup, found, rules, document["body"]["DATA"][0]["destination_path"])
        name = document["name"]
        for one in _jobs(service):
            if one.get("name") == name and one.get("status") not in OVER:
                raise TriggerError(
                    f"there is a timer {name!r} already: {one['job_id']}",
                    hint=f"`trigger-daemon globus timer delete {one['job_id']}` first",
                )
        made = service.ask("create the timer", lambda globus: dict(globus.timers.create_timer(document).data["timer"]))
    if setup.json:
        setup.data({"ok": True, "timer": _timer(made)})
    else:
        click.echo(f"{text.safe(name)}: {made['job_id']}, every {_every(interval_s)}, next {_shown(made)}")


def _jobs(service: Service) -> list[dict[str, Any]]:
    return service.ask("list the timers", lambda globus: [dict(one) for one in globus.timers.list_jobs()["jobs"]])


def _rule(name: str, rules: tuple[Rule, ...]) -> Rule:
    from trigger_daemon.globus.login import TRANSFER

    ours = [rule for rule in rules if rule.action == TRANSFER]
    for rule in ours:
        if rule.name == name:
            return rule
    known = ", ".join(rule.name for rule in ours)
    raise TriggerError(
        f"there is no rule {name!r} that starts {TRANSFER}", hint=f"there are: {known}" if known else ""
    )


def _refuse_to_replace(setup: Setup, rule: Rule, rules: tuple[Rule, ...], directory: str) -> None:
    """Raise TriggerError where the service, which does not know of it, would replace the only copy of a file."""
    for one in rules:
        if one.reclaim is not None and rule.name in (one.name, *one.reclaim.proven_by):
            raise TriggerError(
                f"after its proof by {rule.name} a source of {one.name} may be deleted: what a timer sends later under"
                " its name would replace the only copy",
                hint="a rule with `reclaim` needs no timer: what is not proved stays here, and the daemon sends it",
            )
    if not setup.reader.path.exists():
        return
    if (copy := setup.reader.sole_copy_below(f"globus://{rule.options['to']}{directory}")) is not None:
        raise TriggerError(
            f"{copy} is all that is left of a file that was deleted here after proof: a timer could replace it",
            hint="move such copies elsewhere first, or give the rule another `path`",
        )


def _document(rule: Rule, who: Account, interval_s: int, first: datetime | None) -> dict[str, Any]:
    """Return what the service is to do. Raises Trouble, TriggerError."""
    from trigger_daemon.core.templates import render, template_names
    from trigger_daemon.globus.paths import shown_roots

    host = socket.gethostname()  # as the daemon fills it in
    known = {"rule": rule.name, "host": host}
    path = str(rule.options["path"])
    if unknown := [name for name in template_names(path) if name not in known]:
        raise TriggerError(
            f"the destination of {rule.name} depends on each batch: {path}",
            hint=f"a timer cannot know {', '.join(f'{{{name}}}' for name in unknown)}; make one for a rule without",
        )
    inside = str(render(path, known)).strip("/")
    roots = [rule.watch, *(one.root or rule.watch for one in rule.complete.companions)]
    shown = shown_roots(who, str(rule.options["from"]), roots)
    schedule: dict[str, Any] = {"type": "recurring", "interval_seconds": interval_s}
    if first is not None:
        schedule["start"] = first.astimezone(UTC).isoformat(timespec="seconds")
    return {
        "timer_type": "transfer", "name": f"td {rule.name} {host}", "schedule": schedule,
        "body": {
            "DATA_TYPE": "transfer", "label": f"td {rule.name} {host}"[:128],
            "source_endpoint": rule.options["from"], "destination_endpoint": rule.options["to"],
            "sync_level": SYNC_CHECKSUM, "verify_checksum": True, "preserve_timestamp": True,
            "encrypt_data": bool(rule.options.get("encrypt")), "fail_on_quota_errors": True,
            "skip_source_errors": False, "delete_destination_extra": False,
            "notify_on_succeeded": False, "notify_on_failed": False, "notify_on_inactive": False,
            "DATA": [
                {
                    "DATA_TYPE": "transfer_item", "source_path": f"{source.rstrip('/')}/",
                    "destination_path": f"/{inside}/" if inside else "/", "recursive": True,
                }
                for source in shown.values()
            ],
        },
    }  # fmt: skip


def _interval_s(every: str) -> int:
    from trigger_daemon.core.grammar import duration_s

    try:
        seconds = duration_s(every)
    except ValueError as error:
        raise click.UsageError(f"--every: {error}") from None
    if seconds < EVERY_LEAST_S:
        raise click.UsageError(f"--every: each time all files are read at both ends; take at least {_every(3_600)}")
    return round(seconds)


def _instant(start: str | None, settings: Settings) -> datetime | None:
    """Return the first start, in the settings' time zone where none is written."""
    import zoneinfo

    if start is None:
        return None
    zone = zoneinfo.ZoneInfo(settings.zone)
    now = datetime.now(zone)
    try:
        if re.fullmatch(r"\d\d?:\d\d", start):
            hour, minute = map(int, start.split(":"))
            first = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            return first if first > now else first + timedelta(days=1)
        first = datetime.fromisoformat(start)
    except ValueError:
        raise click.UsageError(f"--start: {start!r} is no time; write 02:30, or 2026-12-01T02:30") from None
    first = first if first.tzinfo is not None else first.replace(tzinfo=zone)
    if first < now:
        raise click.UsageError(f"--start: {start} is past")
    return first


# ---------------------------------------------------------------------- list, delete


@timer.command("list")
@pass_setup
def list_(setup: Setup) -> None:
    """Show all timers of the daemon's account at Globus, also those that others made for it."""
    from trigger_daemon.cli.globus import service_of, told

    with told(setup), service_of(setup.settings()) as service:
        jobs = _jobs(service)
    if setup.json:
        setup.data({"timers": [_timer(one) for one in jobs]})
        return
    if not jobs:
        click.echo("there are no timers")
        return
    shown = text.table(("id", "word"), ("name", "name"), ("status", "word"), ("every", "word"), ("next run", "word"))
    for one in jobs:
        every = _timer(one)["every_s"]
        text.row(
            shown, one["job_id"], str(one.get("name") or ""), str(one.get("status") or ""),
            _every(every) if every else "once", _shown(one),
        )  # fmt: skip
    text.console().print(shown)


@timer.command("delete")
@click.argument("timer_id", metavar="ID", type=click.UUID)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_setup
def delete(setup: Setup, timer_id: Any, yes: bool) -> None:
    """Delete a timer; a transfer that it has started goes on."""
    from trigger_daemon.cli.globus import service_of, told

    number = str(timer_id)
    with told(setup), service_of(setup.settings()) as service:
        found = service.ask("look for the timer", lambda globus: dict(globus.timers.get_job(number).data))
        name = str(found.get("name") or number)
        if not yes:
            click.confirm(f"Delete the timer {text.safe(name)}?", abort=True, err=True)
        service.ask("delete the timer", lambda globus: globus.timers.delete_job(number).data)
    if setup.json:
        setup.data({"ok": True, "deleted": number})
    else:
        click.echo(f"deleted {text.safe(name)}")


def _timer(told: Mapping[str, Any]) -> dict[str, Any]:
    schedule = told.get("schedule") or {}
    return {
        "id": str(told["job_id"]), "name": told.get("name"), "status": told.get("status"),
        "every_s": schedule.get("interval_seconds"), "next_time": _rfc3339(told.get("next_run")),
        "last_time": _rfc3339(told.get("last_ran_at")), "runs": told.get("number_of_runs"),
        "errors": told.get("number_of_errors"),
    }  # fmt: skip


def _utc(value: Any) -> float | None:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _rfc3339(value: Any) -> str | None:
    return text.rfc3339(_utc(value))


def _shown(told: Mapping[str, Any]) -> str:
    return text.clock(_utc(told.get("next_run"))) or "never"


def _every(seconds: float) -> str:
    for unit, worth in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= worth and seconds % worth == 0:
            return f"{seconds / worth:g} {unit}"
    return f"{seconds:g} s"
