"""`journal`: the daemon's memory."""

from __future__ import annotations

import dataclasses

import click

from trigger_daemon.cli.commands import FAILURE, Group, Setup, pass_setup
from trigger_daemon.cli.text import complain, counted, rfc3339, safe, timed
from trigger_daemon.errors import ConfigError

PROBLEMS_SHOWN = 10


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


@journal.command("recover")
@click.option(
    "--send", multiple=True, metavar="RULE",
    help="Send what the recovered journal does not know again; only where repeating is harmless, as with `copy`.",
)
@pass_setup
def recover(setup: Setup, send: tuple[str, ...]) -> None:
    """Begin again after a damaged or lost journal: nothing is lost, and nothing is started twice.

    The damaged journal is set aside, never removed, and what can be read of it
    is taken over. Runs that had not ended are held. Files that are there now
    and that the recovered journal does not know may have been sent or not: they
    are left out, and `explain` names them, but for the rules given by --send.
    Everything is paused until `trigger-daemon resume`. The daemon must be down.
    """
    import time
    from pathlib import Path

    from trigger_daemon.config import load_rules
    from trigger_daemon.salvage import salvage

    read = load_rules(Path(setup.settings().rules_dir))
    if read.faults:
        raise ConfigError(read.faults)
    names = {rule.name for rule in read.rules}
    for name in send:
        if name not in names:
            raise click.UsageError(f"--send: there is no rule {name!r}; there are {', '.join(sorted(names)) or 'none'}")
    told = salvage(setup.state_dir, read.rules, send, time.time())
    if setup.json:
        setup.data(timed({"ok": True, **dataclasses.asdict(told)}))
        return
    for problem in told.problems[:PROBLEMS_SHOWN]:
        click.echo(f"damage: {safe(problem)}")
    click.echo(f"set aside: {safe(told.aside) or 'nothing was there'}")
    click.echo(f"taken over: {told.batches:,} batches, {told.claims:,} files" + (
        f"; not read whole: {', '.join(told.damaged)}" if told.damaged else ""
    ))
    if told.newest_time is not None:
        click.echo(f"the newest that is known is of {rfc3339(told.newest_time)}; batches made after it are not known")
    if told.missing:
        spans = [str(a) if a == b else f"{a}–{b}" for a, b in told.missing[:PROBLEMS_SHOWN]]
        click.echo(f"batches that are missing in between: {', '.join(spans)}")
    if told.held:
        held = counted(len(told.held), "run")
        click.echo(f"held: {held}, as what became of them is not known (`runs list --state HELD`)")
    for rules, fate in ((told.left_out, "left out (see `explain`)"), (told.sent_again, "sent again")):
        if rules:
            click.echo(f"files of {', '.join(rules)} that no known batch has are {fate}")
    click.echo("\nstart the daemon, look at `status`, then let it go on with `trigger-daemon resume`")
