"""`alarms`: what a person should look at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli.commands import Group, Setup, pass_setup, why_option
from trigger_daemon.cli.text import age, clock, safe, timed

if TYPE_CHECKING:
    from trigger_daemon.reader import Reader


@click.group(cls=Group)
def alarms() -> None:
    """What a person should look at."""


@alarms.command("list")
@pass_setup
def list_(setup: Setup) -> None:
    """Show the alarms that stand, the oldest first."""
    setup.tell_if_down()
    found = open_alarms(setup.reader, setup.client.heartbeat() if setup.client.alive() else None)
    if setup.json:
        setup.data({"alarms": [timed(alarm) for alarm in found]})
        return
    for alarm in found:
        click.echo(words(alarm))
    if not found:
        click.echo("no alarms")


@alarms.command("ack")
@click.argument("key", metavar="KEY|all")
@why_option
@pass_setup
def ack(setup: Setup, key: str, why: str) -> None:
    """Say that an alarm was seen. It stands until its cause is gone, but `status` does not end with 4 for it."""
    setup.order("alarms.ack", why, key=key)


def open_alarms(reader: Reader, heartbeat: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the alarms of the journal, and of a living daemon's heartbeat what cannot be in it, and newer words."""
    found = reader.open_alarms()
    if heartbeat is not None:
        newer = {alarm["key"]: {"what": alarm["what"], "hint": alarm["hint"]} for alarm in heartbeat["alarms"]}
        found = [alarm | newer.get(alarm["key"], {}) for alarm in found]
        known = {alarm["key"] for alarm in found}
        own = [alarm for alarm in heartbeat["alarms"] if alarm.get("journaled") is False and alarm["key"] not in known]
        found += [{**alarm, "acked_time": None} for alarm in own]
    return found


def words(alarm: Mapping[str, Any]) -> str:
    """Return an alarm on two or three lines."""
    since = f"since {clock(alarm['since_time'])}, {age(time.time() - alarm['since_time'])}"
    seen = f"; seen by {safe(alarm['acked_by'])}" if alarm.get("acked_by") else ""
    lines = [f"! {safe(alarm['what'])}", f"    {safe(str(alarm['key']))}, {since}{seen}"]
    if alarm["hint"]:
        lines.append(f"    hint: {safe(alarm['hint'])}")
    return "\n".join(lines)
