"""Programs that people name in settings and rules: what of our environment they are given, and how they are ended.

A program that hangs is ended with all it started; one that ends by itself may
leave something behind, as a mailer does that delivers in the background.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

GRACE_S = 3.0  # between TERM and KILL
DEAD_S = 1.0  # what the kernel does not let go within this long after KILL is left to it
SAID_BYTES = 2_000  # of the end of its output: for the log
SHOWN_MAX = 300  # characters of its last two lines, of which the first often has the cause: for people
READ_BYTES = 65_536
TICK_S = 0.05

# What the daemon's environment holds for the daemon alone: secrets (TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET, the directory
# of credentials), and sockets by which one could speak in its name.
_OURS = re.compile(
    r"NOTIFY_SOCKET|CREDENTIALS_DIRECTORY|WATCHDOG_.*|LISTEN_(FDS|PID|FDNAMES)|JOURNAL_STREAM|TRIGGER_.*"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: `fault` is '' if it ended with 0, else why that is not so."""

    fault: str
    said: str  # the end of its output
    code: int | None = None  # None: it was not begun, or did not end by itself


def environment() -> dict[str, str]:
    """Return the daemon's environment without what is the daemon's own."""
    return {name: value for name, value in os.environ.items() if not _OURS.fullmatch(name)}


def run(argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Ended:
    """Run a program to its end, `env` added to its environment; after `timeout_s` it is ended. Raises nothing."""
    if not hasattr(os, "waitid"):
        return _plainly(argv, timeout_s, stdin, env or {})
    try:
        with _readable(stdin) as source:
            program = subprocess.Popen(
                list(argv), stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
                env=environment() | dict(env or {}), start_new_session=True, bufsize=0,
            )  # fmt: skip
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        return Ended(f"{argv[0]} cannot be started: {getattr(error, 'strerror', None) or error}", "")
    assert program.stdout is not None
    with program.stdout:
        os.set_blocking(program.stdout.fileno(), False)
        said = bytearray()
        ended = _wait(program, program.stdout, said, timeout_s)
        if not ended:
            _kill(program.pid, signal.SIGTERM)
            _wait(program, program.stdout, said, GRACE_S)
            _kill(program.pid, signal.SIGKILL)  # it and what it started: not reaped yet, its number is still its own
            _wait(program, program.stdout, said, DEAD_S)
        code = program.poll()
    words = bytes(said).decode("utf-8", "replace").strip()
    if not ended:
        return Ended(f"{argv[0]} did not end within {timeout_s:g} s", words)
    return Ended(_how(argv[0], code, words), words, code)


def _plainly(argv: Sequence[str], timeout_s: float, stdin: bytes, env: Mapping[str, str]) -> Ended:
    """Run a program where there is no waitid (Windows, an older macOS): it is ended alone."""
    try:
        done = subprocess.run(
            list(argv), input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
            env=environment() | dict(env),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Ended(f"{argv[0]} did not end within {timeout_s:g} s", "")
    except (OSError, ValueError) as error:
        return Ended(f"{argv[0]} cannot be started: {getattr(error, 'strerror', None) or error}", "")
    words = done.stdout[-SAID_BYTES:].decode("utf-8", "replace").strip()
    return Ended(_how(argv[0], done.returncode, words), words, done.returncode)


def _how(program: str, code: int | None, words: str) -> str:
    """Return why an end is none with 0; '' if it is."""
    if code == 0:
        return ""
    how = f"ended with {code}" if code is not None and code > 0 else f"was ended by signal {-(code or 0)}"
    return f"{program} {how}" + (f": {'; '.join(words.splitlines()[-2:])[:SHOWN_MAX]}" if words else "")


def _readable(data: bytes) -> IO[bytes]:
    """Return a file that holds `data`: in memory where that can be, for a disk may be full just then."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("stdin"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(data)
    file.seek(0)
    return file


def _wait(program: subprocess.Popen[bytes], output: IO[bytes], said: bytearray, timeout_s: float) -> bool:
    """Say whether it ended in time, keeping the end of its output; it is not reaped here."""
    deadline = time.monotonic() + timeout_s
    at_end = False
    while True:
        left = deadline - time.monotonic()
        over = os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not at_end and select.select([output], [], [], 0 if over else min(TICK_S, max(0.0, left)))[0]:
            data = output.read(READ_BYTES)
            at_end = not data
            said += data or b""
            del said[:-SAID_BYTES]
        elif over:
            return True
        elif at_end:
            time.sleep(min(TICK_S, max(0.0, left)))
        if not over and left <= 0:
            return False
        if over and left <= -DEAD_S:  # what it left behind goes on talking
            return True


def _kill(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
