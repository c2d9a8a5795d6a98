"""Print docs/reference/cli.md, made from the commands themselves: `python -m trigger_daemon.cli.reference`.

A test compares the two, so that the reference cannot lag behind.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import click

from trigger_daemon.cli import program

_HEAD = """\
# The command line

Noun, then verb: `trigger-daemon runs list`. Data goes to stdout, everything else to stderr.

Every command understands `-F`, `--format text|json` and `--config FILE`, before or after the noun, and `-h`, `--help`.
Text is made for people; [the JSON](json.md) is an interface: there a command that fails says why on stdout too, as
`{"ok": false, "error", "hint"}`, unless it has printed its answer already. `TRIGGER_DAEMON_CONFIG` names the
settings file, too, and `TRIGGER_DAEMON_*` override what is in it.

Colours appear on a terminal only, and not if `NO_COLOR` is set. A file name that holds a control character or is no
UTF-8 is shown as `$'...'`, which a shell takes back.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failure; stderr says of what, and what to do next |
| 2 | the command was used wrongly |
| 3 | a fault in the settings or rules |
| 4 | a person is needed: held work, a missing consent, a blocked file, an alarm nobody has acknowledged |
| 5 | the daemon does not run, and the command needs it |

Orders and who gave them are kept in the journal; `--why` adds the reason.

This page is made from the program: `python -m trigger_daemon.cli.reference`.
"""

_COMMON = {"--format", "--config", "--help"}  # those of all commands; they are taken before a command is called


def reference() -> str:
    """Return the whole page."""
    context = click.Context(program, info_name="trigger-daemon")
    return "\n".join([_HEAD, *_commands(program, context)]).rstrip() + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        inside = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            path = inside.command_path.removeprefix("trigger-daemon ")
            yield f"## `{path}`\n\n{_help(command)}\n"
            yield from _commands(command, inside)
        else:
            yield from _command(command, inside, top=context.parent is None)


def _command(command: click.Command, context: click.Context, *, top: bool) -> Iterator[str]:
    path = context.command_path.removeprefix("trigger-daemon ")
    yield f"{'##' if top else '###'} `{path}`\n"
    usage = " ".join(piece for piece in command.collect_usage_pieces(context) if piece != "[OPTIONS]")
    yield f"```\n{context.command_path} {usage}".rstrip() + "\n```\n"
    yield f"{_help(command)}\n"
    options = [
        param for param in command.params
        if isinstance(param, click.Option) and not param.hidden
        and (param.expose_value or not _COMMON & set(param.opts))
    ]  # fmt: skip
    if options:
        yield "| option | |\n|---|---|"
        yield "".join(f"| {_option(option, context)} |\n" for option in options)


def _help(command: click.Command) -> str:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(command.help or ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _option(option: click.Option, context: click.Context) -> str:
    written, words = (part.replace("|", "\\|") for part in option.get_help_record(context) or ("", ""))
    return f"`{written}` | {words}"


if __name__ == "__main__":
    sys.stdout.write(reference())
