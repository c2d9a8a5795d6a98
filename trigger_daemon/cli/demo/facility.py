"""The facility of the demo: its directories and rules, and the real daemon as a child process.

Whatever is made here is taken away again, whoever ends the demo and when.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from trigger_daemon.cli import text
from trigger_daemon.errors import TriggerError

START_S = 30.0  # for the daemon to be ready
STOP_S = 15.0  # for the daemon to end, and again for what it runs; what hangs then is killed
COMMAND_S = 60.0  # for one command of an operator's
ROOM_BYTES = 500_000_000  # what is written, its copy, the journal; and some room left for others

_CONFIG = string.Template("""\
# The settings of the demo's daemon.
state_dir: $STATE
rules_dir: $RULES
sweep: {every: 2s, full: 10s}
log: {level: info, format: json}
""")
_HERE = Path(__file__).parent
_PR_SET_PDEATHSIG = 1


class Facility:
    """The directories of one demo, all below `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.instruments = base / "instruments"
        self.epu, self.ssx = self.instruments / "epu", self.instruments / "ssx"
        self.krios, self.chips = base / "archive" / "krios", base / "archive" / "chips"
        self.rules, self.state = base / "rules", base / "state"
        self.config, self.log, self.look = base / "config.yaml", base / "daemon.log", base / "first_look.py"

    def lay_out(self) -> None:
        """Make the directories, and write the settings, the rules and the program that a rule runs."""
        for directory in (self.epu, self.ssx, self.krios, self.chips, self.rules, self.state):
            directory.mkdir(parents=True)
        shutil.copyfile(_HERE / "first_look.py", self.look)
        self.config.write_text(_CONFIG.substitute(STATE=_quoted(self.state), RULES=_quoted(self.rules)))
        rules = string.Template((_HERE / "rules.yaml").read_text())
        paths: dict[str, Path | str] = {
            "EPU": self.epu, "SSX": self.ssx, "KRIOS": self.krios, "CHIPS": self.chips, "PYTHON": sys.executable,
            "LOOK": self.look,
        }  # fmt: skip
        quoted = {word: _quoted(path) for word, path in paths.items()}
        (self.rules / "demo.yaml").write_text(rules.substitute(quoted))

    def copy_of(self, path: Path) -> Path:
        """Return where the copy of an instrument's file belongs."""
        if path.is_relative_to(self.epu):
            return self.krios / path.relative_to(self.epu)
        return self.chips / path.relative_to(self.ssx)

    def log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-10:])

    def command(self, *args: str) -> Callable[[], Any]:
        """Begin a command as an operator would; what is returned waits for its JSON. Raises TriggerError then."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trigger_daemon", *args, "-F", "json", "--config", str(self.config)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(),
        )  # fmt: skip

        def answer() -> Any:
            try:
                said, complaint = process.communicate(timeout=COMMAND_S)
            except BaseException:
                process.kill()
                process.communicate()
                raise
            if process.returncode != 0:
                words = complaint.decode(errors="replace").strip()[-500:]
                raise TriggerError(f"`{' '.join(args)}` ended with {process.returncode}: {words}")
            return json.loads(said)

        return answer


def _quoted(path: Path | str) -> str:
    """Return a path in quotes that YAML takes back exactly."""
    return json.dumps(str(path))


# ---------------------------------------------------------------------- directory


@contextmanager
def directory(wanted: Path | None, *, keep: bool) -> Iterator[Path]:
    """Give an empty directory, and take it away again. Raises UsageError, TriggerError."""
    made = True
    if wanted is None:
        base = Path(tempfile.mkdtemp(prefix="trigger-daemon-demo-"))
    else:
        base = Path(os.path.abspath(wanted))
        if any(character in str(base) for character in "{}*"):
            raise click.UsageError(f"a rule cannot watch {text.name(str(base))}: there are wildcards in it")
        made = not os.path.lexists(base)
        if not made and (not base.is_dir() or any(base.iterdir())):
            raise click.UsageError(f"{text.name(str(base))} is not an empty directory")
        base.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(base).free
        if free < ROOM_BYTES:
            raise TriggerError(
                f"only {text.size(free)} are free on the disk of {base}; the demo wants {text.size(ROOM_BYTES)}",
                hint="choose another place: `--dir DIR`",
            )
        yield base
    except BaseException:
        if keep:
            text.note(f"what there is so far is kept in {base}")
        raise
    finally:
        if not keep:
            with undisturbed():
                _remove(base, whole=made)


def _remove(base: Path, *, whole: bool) -> None:
    for path in [base] if whole else list(base.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ------------------------------------------------------------------------ signals

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: it tidies up."""

    def leave(number: int, frame: Any) -> NoReturn:
        raise click.exceptions.Exit(128 + number)

    before = {number: signal.signal(number, leave) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Tidy up to the end, whoever presses Ctrl-C again; all that is done meanwhile has a deadline."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------- daemon


@contextmanager
def daemon(facility: Facility) -> Iterator[subprocess.Popen[bytes]]:
    """Start the real daemon, wait until it watches, and end it. Raises TriggerError."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def follow() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # should the demo be killed, its daemon ends too

    with facility.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trigger_daemon", "serve", "--config", str(facility.config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(),
            start_new_session=True,  # a Ctrl-C is the demo's to handle
            preexec_fn=follow,  # no other thread runs yet
        )  # fmt: skip
    try:
        _until_it_watches(process, facility)
        yield process
    finally:
        with undisturbed():
            _end(process, facility)


def must_run(process: subprocess.Popen[bytes], facility: Facility) -> None:
    """Raise TriggerError if the daemon has ended."""
    if process.poll() is not None:
        raise TriggerError(
            f"the daemon ended with exit code {process.returncode}; the end of its log:\n{facility.log_end()}"
        )


def _environment() -> dict[str, str]:
    """Return ours, without what configures or supervises another daemon, and with the way to this package."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.upper().startswith(("TRIGGER_DAEMON_", "WATCHDOG_")) and name != "NOTIFY_SOCKET"
    }  # fmt: skip
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _until_it_watches(process: subprocess.Popen[bytes], facility: Facility) -> None:
    from trigger_daemon.control import ControlClient

    client, end = ControlClient(facility.state), time.monotonic() + START_S
    while time.monotonic() < end:
        must_run(process, facility)
        beat = client.heartbeat()
        if beat and beat["rules_fault"]:
            raise TriggerError(f"the daemon refuses the demo's rules: {beat['rules_fault']}")
        if beat and {str(facility.epu), str(facility.ssx)} <= {root["path"] for root in beat["roots"]}:
            return
        time.sleep(0.1)
    raise TriggerError(f"the daemon was not ready in {START_S:g} s; the end of its log:\n{facility.log_end()}")


def _end(process: subprocess.Popen[bytes], facility: Facility) -> None:
    """End the daemon, and then the programs that it runs: they outlive it by design."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    from trigger_daemon.actions import _supervisor
    from trigger_daemon.actions.command import standing

    attempts = [path for path in (facility.state / "actions" / "command").glob("*") if path.is_dir()]
    for attempt in attempts:
        (attempt / _supervisor.CANCEL).touch()
    end = time.monotonic() + STOP_S
    while time.monotonic() < end and any(standing(str(path)).phase in ("running", "orphaned") for path in attempts):
        time.sleep(0.1)
