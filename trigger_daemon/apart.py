"""Ask a question in a child process that may never answer, and go on without it.

A call into a dead mount can be neither interrupted nor, once it waits in the
kernel, killed: who makes it is lost. So a child makes it: a fresh interpreter
that calls one named function of this package, JSON in and out. It is told to
end, killed, and left if even that does not help; it never outlives the process
that asked by more than its present system call.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import trigger_daemon
from trigger_daemon.errors import TriggerError

ANSWER_BYTES_MAX = 8 << 20  # an answer is a summary; who has more to say writes a file
TIDY_S = 0.5  # what a child gets to put things in order when it is told to end
LEFT_MAX = 32  # children that do not end; beyond them nobody is asked before some have

_PR_SET_PDEATHSIG = 1
_left: list[subprocess.Popen[bytes]] = []
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Late:
    """There is no answer, and will be none. `why` goes with the name of what was asked about."""

    after_s: float
    why: str


def ask(function: str, *args: Any, deadline_s: float) -> Any:
    """Return what a function says, or Late. `function` is "module:name" in this package; values are JSON's.

    Raises what it raises, if that is an OSError or a TriggerError; TriggerError
    for anything else, and for a child that cannot be started or answers too much.
    """
    began = time.monotonic()
    with _lock:
        _left[:] = [child for child in _left if child.poll() is None]
        hanging = len(_left)
    if hanging >= LEFT_MAX:
        return Late(0.0, f"was not asked: {hanging} earlier questions still hang")
    try:
        child = _start(function, args)
    except OSError as error:
        raise TriggerError(
            f"no process can be started: {error.strerror or error}", hint="look at the limits of processes and memory"
        ) from error
    assert child.stdout is not None
    try:
        with child.stdout:
            said = _read(child.stdout.fileno(), began + deadline_s)
        if said is None:
            return Late(deadline_s, f"does not answer within {deadline_s:g} s")
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, began + deadline_s - time.monotonic()))
    finally:
        _end(child)
    return _answer(function, said, child.returncode)


def _start(function: str, args: tuple[Any, ...]) -> subprocess.Popen[bytes]:
    source = os.path.dirname(os.path.dirname(os.path.abspath(trigger_daemon.__file__)))
    search = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
    with _memory() as question:  # no pipe: a child that does not read would hold us
        question.write(json.dumps([os.getpid(), function, args]).encode())
        question.seek(0)  # which flushes
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from trigger_daemon.apart import answer; answer()"],
            stdin=question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={**os.environ, "PYTHONPATH": search}, start_new_session=True,
        )  # fmt: skip


def _memory() -> IO[bytes]:
    """Return a file in memory, where there are such: a full disk must not keep anybody from asking."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("question"), "w+b")
    return tempfile.TemporaryFile()


def _read(pipe: int, until: float) -> bytes | None:
    """Return all of it; None if it does not end in time."""
    os.set_blocking(pipe, False)
    said = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if not ready.select(left):
                break
            part = os.read(pipe, 1 << 16)
            if not part:
                return bytes(said)
            said += part
            if len(said) > ANSWER_BYTES_MAX:
                raise TriggerError(f"the answer is larger than {ANSWER_BYTES_MAX:,} bytes", hint="report this as a bug")
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let it tidy up, then kill it and what it began; what cannot be killed is looked after when the next is asked."""
    for number, patience_s in ((signal.SIGTERM, TIDY_S), (signal.SIGKILL, TIDY_S)):
        if child.poll() is not None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    if child.poll() is None:
        with _lock:
            _left.append(child)


def _answer(function: str, said: bytes, code: int | None) -> Any:
    try:
        kind, value = json.loads(said)
    except ValueError:
        raise TriggerError(f"{function} ended with {code} and no answer", hint="report this as a bug") from None
    match kind:
        case "value":
            return value
        case "os":
            number, words, name = value
            raise OSError(number, words, name) if name is not None else OSError(number, words)
        case _:
            raise TriggerError(value[0], hint=value[1])


# ---------------------------------------------------------------------- the child


def answer() -> NoReturn:
    """Answer what stands on stdin, on stdout; the whole life of the child."""
    signal.signal(signal.SIGTERM, _leave)  # an exception, so that what stands in `finally` is done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, name, args = json.load(sys.stdin)
    _end_with(parent)
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    module, _, function = name.partition(":")
    if not module.startswith("trigger_daemon."):
        raise SystemExit(1)
    said = _said(lambda: getattr(importlib.import_module(module), function)(*args))
    with os.fdopen(out, "wb") as stream:
        stream.write(json.dumps(said).encode())
    os._exit(0)  # threads of libraries, and one that hangs, keep nobody


def _said(function: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "value", function()
    except OSError as error:
        filename = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        return "os", (error.errno or 5, error.strerror or str(error), filename)
    except TriggerError as error:
        return "error", (error.message, error.hint)
    except Exception as error:  # noqa: BLE001 the top of the child: whoever asked is told
        return "error", (f"{type(error).__name__}: {error}", "report this as a bug")


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _end_with(parent: int) -> None:
    """End when the one who asked ends, however that is."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(1)
