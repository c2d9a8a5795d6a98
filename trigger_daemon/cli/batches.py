"""`batches`: sets of files that travel together."""

from __future__ import annotations

import time
from typing import Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import Group, Setup, captures, pass_setup, why_option


@click.group(cls=Group)
def batches() -> None:
    """Sets of files that travel together."""


@batches.command("list")
@click.option("--closed", is_flag=True, help="Those that were closed, from the journal, the newest first.")
@click.option("--rule", help="Of this rule only.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many closed ones.")
@pass_setup
def list_(setup: Setup, closed: bool, rule: str | None, limit: int) -> None:
    """Show the open batches, and what each waits for. Only the running daemon knows them."""
    if closed:
        found = setup.reader.batches(rule=rule, limit=limit)
        if setup.json:
            setup.data({"batches": [text.timed(batch) for batch in found]})
        else:
            _closed(found)
        return
    answer = setup.ask("batches.list")
    found = [batch for batch in answer["batches"] if rule is None or batch["rule"] == rule]
    if setup.json:
        setup.data({"batches": [text.timed(batch) for batch in found]})
    else:
        _open(found)


def _open(found: list[dict[str, Any]]) -> None:
    if not found:
        click.echo("no open batches")
        return
    shown = text.table(
        ("rule", "name"), "group", ("files", "right"), ("size", "right"), ("waits for", "wide"), ("until", "word")
    )
    for batch in found:
        text.row(
            shown, batch["rule"], text.group(batch["group"]), f"{batch['files']:,}", text.size(batch["bytes"]),
            batch["waiting_for"], text.clock(batch["until_time"]),
        )  # fmt: skip
    text.console().print(shown)


def _closed(found: list[dict[str, Any]]) -> None:
    if not found:
        click.echo("no batch was closed yet")
        return
    now = time.time()
    shown = text.table(
        ("run", "right"), ("rule", "name"), ("group", "group"), ("files", "right"), ("size", "right"),
        ("closed because", "wide"), ("ago", "right"), ("state", "word"),
    )  # fmt: skip
    for batch in found:
        text.row(
            shown, batch["id"], batch["rule"], text.group(batch["group"]), f"{batch['files']:,}",
            text.size(batch["bytes"]), batch["reason"], text.age(now - batch["time"]), batch["state"],
        )  # fmt: skip
    text.console().print(shown)


@batches.command("close")
@click.argument("rule")
@click.argument("group", nargs=-1, metavar="[CAPTURE=VALUE]...")
@why_option
@pass_setup
def close(setup: Setup, rule: str, group: tuple[str, ...], why: str) -> None:
    """Close the open batches of a rule now: all, or those whose group has these captures."""
    setup.order("batches.close", why, rule=rule, captures=captures(group))
