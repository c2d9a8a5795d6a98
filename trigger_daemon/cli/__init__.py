"""The operator's commands, one file a noun: noun, then verb.

Data goes to stdout, everything else to stderr; exit codes are in
`docs/reference/json.md`. A module of a noun is imported when the noun is used,
and heavy libraries when a command needs them: people ask `status` on a machine
that has no time.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from trigger_daemon import __version__, garbage
from trigger_daemon.cli import commands

COMPLETE = "_TRIGGER_DAEMON_COMPLETE"  # click's variable for completion
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells call it: 128 + SIGINT, 128 + SIGPIPE

_NOUNS = (
    "demo", "serve", "status", "explain", "pause", "resume", "rules", "batches", "files", "runs", "alarms", "roots",
    "storage", "journal", "globus", "mqtt", "doctor",
)  # fmt: skip


@click.command(
    cls=commands.Lazy,
    modules={noun: f"trigger_daemon.cli.{'pause' if noun == 'resume' else noun}" for noun in _NOUNS},
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 configuration, 4 a person is needed, 5 the daemon does not run.",
)
@click.version_option(__version__, "--version", message="%(version)s")
def program() -> None:
    """Watch what an instrument writes, and start a transfer or a flow for each complete batch: once."""


def main(args: list[str] | None = None) -> Any:
    """Run one command and exit with its code."""
    garbage.seldom()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = run(args)
    try:
        sys.stdout.flush()
    except OSError:
        code = code or PIPE_CLOSED
    if code == PIPE_CLOSED:
        _hush()
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors are told with a hint, never as a traceback."""
    setup = commands.Setup()
    try:
        return _run(setup, args)
    except OSError as error:  # nobody reads what went wrong
        if not _pipe_closed(error):
            raise
        return PIPE_CLOSED


def _run(setup: commands.Setup, args: list[str] | None) -> int:
    from trigger_daemon.cli.text import fault_words, faults, safe
    from trigger_daemon.errors import ConfigError, NotRunning, TriggerError

    try:
        code = program.main(args=args, prog_name="trigger-daemon", standalone_mode=False, obj=setup)
        return code if isinstance(code, int) else commands.OK
    except click.exceptions.Exit as left:
        return left.exit_code
    except SystemExit as ended:
        if COMPLETE in os.environ:  # a shell asked how a line may go on
            return ended.code if isinstance(ended.code, int) else commands.OK
        # So click tells, also to those who call it themselves, that the reader of our output has left.
        return PIPE_CLOSED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        return commands.USAGE
    except click.UsageError as error:
        if error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        help_ = f"`{error.ctx.command_path} --help` tells more" if error.ctx is not None else ""
        if isinstance(error, commands.Asked):
            help_ = error.hint
        setup.fail(error.format_message(), help_)
        return commands.USAGE
    except click.ClickException as error:
        setup.fail(error.format_message())
        return commands.FAILURE
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ConfigError as error:
        click.echo(faults(error.faults), err=True)
        setup.refuse(error.message, error.hint, faults=[fault_words(fault) for fault in error.faults])
        return commands.CONFIGURATION
    except NotRunning as error:
        setup.fail(error.message, error.hint)
        return commands.NOT_RUNNING
    except TriggerError as error:
        setup.fail(error.message, error.hint)
        return commands.FAILURE
    except OSError as error:
        if _pipe_closed(error):
            return PIPE_CLOSED
        where = f": {safe(os.fsdecode(error.filename))}" if isinstance(error.filename, str | bytes) else ""
        setup.fail(f"{error.strerror or error}{where}")
        return commands.FAILURE


def _pipe_closed(error: OSError) -> bool:
    return error.errno == errno.EPIPE or isinstance(error, BrokenPipeError)


def _hush() -> None:
    """Let the interpreter's last flush go nowhere: the reader of our output has left."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
