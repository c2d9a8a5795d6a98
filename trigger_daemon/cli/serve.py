"""`serve`: the daemon, in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from trigger_daemon.cli.commands import FAILURE, FILE_PATH, NEEDS_PERSON, OK, Command, Setup, pass_setup
from trigger_daemon.errors import JournalDamaged, TriggerError


@click.command(cls=Command)
@click.option(
    "--record", type=FILE_PATH, metavar="FILE",
    help="Write a trace of all that is seen and decided, for `rules replay`; at most 4 GiB.",
)
@pass_setup
def serve(setup: Setup, record: Path | None) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C. SIGHUP reads settings and rules again.

    Log lines go to stderr: text on a terminal, else one JSON object a line. A
    trace that exists already is continued; choose a disk for it on which nobody
    else needs the room.
    """
    import asyncio
    import faulthandler

    from trigger_daemon import daemon, garbage, log

    settings = setup.settings()
    log.set_up(settings.log.level, settings.log.format)
    garbage.leave_out()
    faulthandler.enable()  # a watchdog's SIGABRT leaves in the log where each thread stood
    # asyncio.run and the interpreter would both join every thread at the end, and one may hang in a dead mount.
    # What has to be finished was finished by the daemon itself: the runner is left as it is.
    runner = asyncio.Runner()
    try:
        runner.run(daemon.serve(settings, reload_settings=setup.settings, record=record))
    except TriggerError as error:
        setup.fail(error.message, error.hint)
        # What only a person mends is no reason to be started again and again (RestartPreventExitStatus= of the unit).
        _leave(NEEDS_PERSON if isinstance(error, JournalDamaged) else FAILURE)
    except Exception:  # noqa: BLE001 the top: the service manager starts us again, if only we end
        log.get().critical("daemon.crashed", exc_info=True)
        _leave(FAILURE)
    _leave(OK)


def _leave(code: int) -> NoReturn:
    """End the process now, without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)
