"""`journal`: the daemon's memory."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from trigger_daemon.cli.commands import FAILURE, FILE_NAME, Group, OwnFormat, Setup, pass_setup
from trigger_daemon.cli.text import complain, counted, note, rfc3339, safe, timed
from trigger_daemon.errors import ConfigError, TriggerError

if TYPE_CHECKING:
    from trigger_daemon.export import Format

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


@journal.command("export", cls=OwnFormat)
@click.option("-F", "--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl",
              help="One JSON object a line (jsonl, if absent), or a table with a heading (csv).")  # fmt: skip
@click.option("-o", "--output", default="-", metavar="FILE", type=FILE_NAME,
              help="Written whole or not at all; `-`, if absent, is stdout.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a FILE that is there.")
@click.option("--since", metavar="TIME",
              help="Batches closed from then on: 2026-11-25, 2026-11-25T02:00Z, or 7d (ago).")  # fmt: skip
@click.option("--until", metavar="TIME", help="Batches closed before then.")
@click.option("--rule", metavar="RULE", help="Batches of this rule alone, and no orders.")
@pass_setup
def export(
    setup: Setup, form: Format, output: str, force: bool, since: str | None, until: str | None, rule: str | None
) -> None:
    """Tell of each file what was done with it: when and why, where to, proved by what, and deleted here or not.

    One line a file of each closed batch, then one an order that a person gave.
    A time without a zone is the machine's. Works while the daemon runs, and
    does not keep it waiting: what is told of a batch is of one instant, of two
    batches perhaps not. Batches that close meanwhile are not told.
    """
    from trigger_daemon.export import Wanted
    from trigger_daemon.export import export as lines

    pages = lines(setup.state_dir, Wanted(_instant("--since", since), _instant("--until", until), rule), form)
    if output == "-":
        for page in pages:
            sys.stdout.buffer.write(page)
        sys.stdout.buffer.flush()
    else:
        if not force:
            _refuse_present(output)
        with _ended_by_signals():
            told = _write_whole(output, pages, force=force) - (form == "csv")
        note(f"{counted(told, 'line')} in {output}")


def _instant(option: str, said: str | None) -> float | None:
    """Return a time in Unix seconds. Raises UsageError."""
    import time
    from datetime import datetime

    from trigger_daemon.core.grammar import duration_s

    if said is None:
        return None
    with suppress(ValueError, OverflowError):
        return time.time() - duration_s(said)
    try:
        return datetime.fromisoformat(said).timestamp()
    except (ValueError, OverflowError, OSError):
        raise click.UsageError(f"{option}: {said!r} is no time; write 2026-11-25, 2026-11-25T02:00Z, or 7d") from None


def _refuse_present(output: str) -> None:
    if os.path.lexists(output):
        raise TriggerError(f"{output} is there already", hint="name another file, or replace it with --force")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what is done here as Ctrl-C does: it tidies up."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_whole(output: str, pages: Iterable[bytes], *, force: bool) -> int:
    """Write a file, there whole or not at all, also through a power cut; return its lines.

    Raises OSError, and TriggerError where one has come meanwhile that may not be replaced.
    """
    directory, name = os.path.split(os.path.abspath(output))
    new = os.path.join(directory, f".{name}.{os.getpid()}.new")
    count = 0
    try:
        with open(new, "xb") as file:
            for page in pages:
                file.write(page)
                count += page.count(b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not force:
            _refuse_present(output)
        os.replace(new, output)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(place)
    finally:
        os.close(place)
    return count
