"""`demo`: a simulated microscope session, from the first frame to the verified copy.

Simulated instruments write into a temporary directory; the real daemon, as a
child process with rules as staff would write them, takes it from there. At the
end every file at the destination is compared with what its writer says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, FILE_PATH, OK, Command, Setup, pass_setup
from trigger_daemon.cli.place import FILE_VARIABLE
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from trigger_daemon.cli.demo.facility import Facility
    from trigger_daemon.cli.demo.show import Show
    from trigger_daemon.simulator import Written

LIMIT_S = 90.0  # the session and its copies take some 30 s; a machine that has much else to do gets longer
LOOK_S = 0.25  # between two looks at everything


@click.command(cls=Command)
@click.option(
    "--dir", "wanted", type=FILE_PATH, metavar="DIR",
    help="Work in this directory, which must be absent or empty, instead of a temporary one.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave everything there at the end, to look around with the other commands.")
@pass_setup
def demo(setup: Setup, wanted: Path | None, keep: bool) -> None:
    """Show a simulated microscope session, from the first frame to the verified copy.

    A microscope and a beamline are simulated in a temporary directory; the real daemon decides what is complete, makes
    batches, copies and proves. It takes less than a minute, needs no account and no server, and leaves nothing behind.
    Exit code 0 only if every file arrived as its writer wrote it, and no other did.
    """
    from trigger_daemon.cli.demo import facility as places
    from trigger_daemon.cli.demo import verdict
    from trigger_daemon.cli.demo.show import WATCHED, Show

    began = time.monotonic()
    with places.signals_raise(), places.directory(wanted, keep=keep) as base:
        facility = places.Facility(base)
        facility.lay_out()
        show = Show(facility, began, sys.stderr if setup.json else sys.stdout)
        show.say(f"a microscope and a beamline write below {text.name(str(facility.instruments))}")
        with places.daemon(facility) as daemon:
            show.say(f"the daemon runs (pid {daemon.pid}) with the rules {', '.join(WATCHED)}")
            written = _session(facility, daemon, show)
            odd = verdict.explained(facility, written)
        found = verdict.summary(facility, show, written, odd)
        found |= {"seconds": round(time.monotonic() - began, 1), "directory": str(base) if keep else None}
        found["commands"] = _commands(facility, odd) if keep else [f"{_program()} demo --keep"]
        if setup.json:
            setup.data(found)
        else:
            verdict.tell(show.console, found)
            _tell_next(found)
    raise click.exceptions.Exit(OK if found["ok"] else FAILURE)


def _session(facility: Facility, daemon: subprocess.Popen[bytes], show: Show) -> list[Written]:
    """Let the instruments write, and show what becomes of it until nothing moves any more. Raises TriggerError."""
    from trigger_daemon import simulator
    from trigger_daemon.cli.demo.facility import must_run

    stop = threading.Event()
    written: list[Written] = []
    failed: list[Exception] = []

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def write() -> None:
        try:
            written.extend(simulator.session(facility.epu, facility.ssx, pause))
        except (OSError, _Stopped) as error:
            failed.append(error)

    writer = threading.Thread(target=write, name="instruments")
    writer.start()
    end = time.monotonic() + LIMIT_S
    try:
        with show.numbers_below():
            while time.monotonic() < end:
                show.look()
                must_run(daemon, facility)
                if failed:
                    raise TriggerError(f"the simulated instruments cannot write: {failed[0]}")
                if not writer.is_alive() and show.is_over(written):
                    show.look(ask=True)
                    break
                time.sleep(LOOK_S)
    finally:
        stop.set()
        writer.join()
    return written


class _Stopped(Exception):
    """The demo ends before the simulated session does."""


# --------------------------------------------------------------------------- next


def _tell_next(found: Mapping[str, Any]) -> None:
    kept = found["directory"] is not None
    click.secho("\nLook around: this is what an operator has" if kept else "\nWhere to go next", bold=True)
    for command in found["commands"]:
        click.echo(f"  {command}")
    if not kept:
        click.echo("leaves rules, journal and copies there to look around in. Then write a first rule of your own:\n"
                   "README.md (A first rule), docs/reference/rules.md.")  # fmt: skip


def _commands(facility: Facility, odd: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to try in a directory that was kept, exactly as it can be typed."""
    from shlex import quote

    program = _program()
    commands = [f"export {FILE_VARIABLE}={quote(str(facility.config))}"]
    commands += [f"{program} {rest}" for rest in ("runs list", "runs show 1", "rules list", "journal check")]
    commands.append(f"{program} serve 2> {quote(str(facility.base / 'serve.log'))} &")
    blocked = next((quote(item["path"]) for item in odd if not item["arrives"]), None)
    if blocked is not None:
        commands += [f"{program} {rest}" for rest in ("status", f"explain {blocked}", f"files go {blocked}")]
    return [*commands, "kill %1", f"rm -r {quote(str(facility.base))}"]


def _program() -> str:
    """Return how this program was called, so that it can be called again."""
    from shlex import quote

    called = sys.argv[0]
    if Path(called).name != "trigger-daemon":
        return f"{quote(sys.executable)} -m trigger_daemon"
    found = shutil.which("trigger-daemon")
    if found and os.path.realpath(found) == os.path.realpath(called):
        return "trigger-daemon"
    return quote(os.path.abspath(called))
