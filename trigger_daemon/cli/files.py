"""`files`: those that settle, wait, or cannot go on by themselves."""

from __future__ import annotations

from typing import Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, FILE_NAME, Group, Setup, absolute, pass_setup, why_option
from trigger_daemon.core.model import split
from trigger_daemon.errors import TriggerError

STAGES = ("settling", "incomplete", "blocked", "waiting")

paths_argument = click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=FILE_NAME)
rule_option = click.option("--rule", help="For this rule only; all that deal with the file if absent.")


@click.group(cls=Group)
def files() -> None:
    """Files on their way into a batch; `explain` answers for any file."""


@files.command("list")
@click.option("--stage", type=click.Choice(STAGES), help="In this stage only.")
@click.option("--rule", help="Of this rule only.")
@pass_setup
def list_(setup: Setup, stage: str | None, rule: str | None) -> None:
    """Show files that are not in a closed batch yet, and what each waits for. Only the running daemon knows them."""
    answer = setup.ask("files.list", stage=stage)
    found = [file for file in answer["files"] if rule is None or file["rule"] == rule]
    if setup.json:
        setup.data({"files": [text.timed(file) for file in found], "more": answer["more"]})
        return
    for file in found:
        until = f" (until {text.clock(file['until_time'])})" if file["until_time"] else ""
        click.echo(text.name(file["path"]))
        click.echo(
            f"    {text.safe(file['rule'])}: {text.coloured(file['stage'])}, {text.size(file['size'])}:"
            f" {text.safe(file['because'])}{until}"
        )
    if not found:
        click.echo("no files wait")
    if answer["more"]:
        text.note(f"there are more; these are the first {len(answer['files']):,}")


@files.command("go")
@paths_argument
@rule_option
@why_option
@pass_setup
def go(setup: Setup, paths: tuple[str, ...], rule: str | None, why: str) -> None:
    """Let a blocked or incomplete file go on as it is; its batch says that it was let go."""
    _each(setup, "files.go", paths, rule, why)


@files.command("skip")
@paths_argument
@rule_option
@why_option
@pass_setup
def skip(setup: Setup, paths: tuple[str, ...], rule: str | None, why: str) -> None:
    """Leave this version of a file out; a version written later is dealt with."""
    _each(setup, "files.skip", paths, rule, why)


@files.command("resend")
@paths_argument
@rule_option
@why_option
@pass_setup
def resend(setup: Setup, paths: tuple[str, ...], rule: str | None, why: str) -> None:
    """Send files again that were sent, skipped, or there from the beginning: each in a batch of its own.

    Only a version that a rule has dealt with can be sent again, and only when the run that took it has ended. The file
    goes alone: its companions do not travel again.
    """
    wanted: list[dict[str, Any]] = []
    for path in paths:
        wanted += _versions(setup, absolute(path), rule)
    setup.order("files.resend", why, files=wanted)


def _each(setup: Setup, verb: str, paths: tuple[str, ...], rule: str | None, why: str) -> None:
    """Give one order a path; all are tried, and a refused one makes the exit code 1."""
    answers = [
        setup.ask(verb, why, path=path, rule=rule) | {"path": path} for path in map(absolute, paths)
    ]
    if setup.json:
        setup.data({"files": answers})
    for answer in answers:
        if not answer["ok"]:
            text.complain(f"{text.name(answer['path'])}: {answer['error']}", answer["hint"])
        elif not setup.json:
            click.echo(f"{text.name(answer['path'])}: {text.safe(answer['text'])}")
    if not all(answer["ok"] for answer in answers):
        raise click.exceptions.Exit(FAILURE)


def _versions(setup: Setup, path: str, rule: str | None) -> list[dict[str, Any]]:
    """Return what the daemon needs to send a file again, for each rule that has dealt with its present version."""
    from trigger_daemon.cli.explain import claims_below, look

    shown = text.name(path)
    present = look(path)
    if present.version is None:
        raise TriggerError(f"{shown}: {present.words}", hint="only a file that is there can be sent again")
    claims = claims_below(setup.reader, path)
    found: list[dict[str, Any]] = []
    reasons: list[str] = []
    for about in setup.ask("explain", path=path)["rules"]:
        name = about["rule"]
        if (rule is not None and name != rule) or about["stage"] in ("unmatched", "ignored"):
            continue
        sent = [(below, c) for below, c in claims if c.rule == name and not c.companion]
        now = next(((below, c) for below, c in sent if (c.size, c.mtime_ns) == present.version), None)
        if now is None:
            reasons.append(f"{name}: this version was not sent yet, and will be by itself")
        elif now[1].batch > 0 and not now[1].final:
            reasons.append(f"{name}: run {now[1].batch} has it and is {now[1].state}")
        else:
            directory, file = split(now[0])
            size, mtime_ns = present.version
            found.append({"rule": name, "dir": directory, "name": file, "size": size, "mtime_ns": mtime_ns})
    if not found:
        words = "; ".join(reasons) or "no rule has dealt with this file"
        raise TriggerError(f"{shown}: {words}", hint=f"`trigger-daemon explain {shown}`")
    return found
