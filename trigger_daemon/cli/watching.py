"""`status --watch`: the status again each second, on a screen of its own, until somebody presses q.

It outlives the daemon's restart, a change of the terminal's size, and what
cannot be read for a moment: then what was known stays, and it is said how old
that is.
"""

from __future__ import annotations

import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from trigger_daemon.cli import glance, text
from trigger_daemon.cli.commands import Setup
from trigger_daemon.cli.status import gather
from trigger_daemon.errors import TriggerError

WATCH_S = 1.0


def watch(setup: Setup) -> None:
    """Show the status each second until q or Ctrl-C."""
    if setup.json or not sys.stdout.isatty():
        _lines(setup)
    from rich.live import Live

    console = text.console()
    last: dict[str, Any] | None = None
    with keys() as pressed, Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            fault = ""
            try:
                last = gather(setup)
            except TriggerError as error:
                if last is None:
                    raise
                fault = error.message
            if fault and last["daemon"]["heartbeat_time"]:
                last["daemon"]["heartbeat_age_s"] = round(time.time() - last["daemon"]["heartbeat_time"], 1)
            live.update(_screen(last, console, fault), refresh=True)
            if _ended(live, console, last, fault, pressed):
                return


def _ended(live: Any, console: Any, last: dict[str, Any], fault: str, pressed: Callable[[float], str]) -> bool:
    """Wait for the next second, drawing anew at once when the size changes; true when somebody presses q."""
    until = time.monotonic() + WATCH_S
    while (left := until - time.monotonic()) > 0:
        key = pressed(left)
        if key in ("q", "Q"):
            return True
        if key == "size":
            live.update(_screen(last, console, fault), refresh=True)
    return False


def _screen(now: dict[str, Any], console: Any, fault: str) -> Any:
    from rich.console import Group
    from rich.text import Text

    foot = f"{time.strftime('%H:%M:%S')}  q quits" + (f"  cannot be read: {text.safe(fault)}" if fault else "")
    shown = glance.picture(now, console, height=console.height - 2, live=True)
    return Group(shown, "", Text(foot, style="bold yellow" if fault else "dim", no_wrap=True, overflow="ellipsis"))


def _lines(setup: Setup) -> None:
    """Print one status after the other; ends with the reader's end of the pipe, or Ctrl-C."""
    while True:
        now = gather(setup)
        if setup.json:
            setup.data(text.timed(now), compact=True)
        else:
            glance.show(now, height=None)
            click.echo()
        time.sleep(WATCH_S)


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Let single keys be read, and changes of the size be heard of ("size")."""
    import os
    import termios
    import tty

    heard, hears = os.pipe()
    os.set_blocking(hears, False)
    woken = signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    sized = signal.signal(signal.SIGWINCH, lambda *_: None)
    descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(descriptor) if descriptor is not None else None

    def pressed(wait_s: float) -> str:
        sources = [heard] if descriptor is None else [heard, descriptor]
        ready, _, _ = select.select(sources, [], [], wait_s)
        if heard in ready:
            os.read(heard, 512)
            return "size"
        return os.read(descriptor, 1).decode("ascii", "replace") if ready and descriptor is not None else ""

    try:
        if descriptor is not None:
            tty.setcbreak(descriptor)
        yield pressed
    finally:
        if descriptor is not None and before is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, sized)
        signal.set_wakeup_fd(woken)
        os.close(heard)
        os.close(hears)
