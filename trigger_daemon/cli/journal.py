"""`journal`: the daemon's memory."""

from __future__ import annotations

import click

from trigger_daemon.cli.commands import FAILURE, Group, Setup, pass_setup
from trigger_daemon.cli.text import complain, safe


@click.group(cls=Group)
def journal() -> None:
    """What the daemon remembers."""


@journal.command("check")
@pass_setup
def check(setup: Setup) -> None:
    """Read the whole journal and say whether it agrees with itself.

    Works while the daemon runs, too. Exit code 1 if something is wrong.
    """
    problems = setup.reader.check()
    if setup.json:
        setup.data({"ok": not problems, "journal": str(setup.reader.path), "problems": problems})
    else:
        for problem in problems:
            click.echo(safe(problem))
        if not problems:
            click.echo(f"{safe(str(setup.reader.path))} is sound")
    if problems:
        complain(f"{len(problems)} faults in {setup.reader.path}", "keep a copy of it before anything else")
        raise click.exceptions.Exit(FAILURE)
