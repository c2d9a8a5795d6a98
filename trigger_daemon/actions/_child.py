"""One program that transfers, from its start to its end, at the pace that the daemon tells.

An rsync cannot be told a rate or a pause while it runs, so it is stopped and let go
on by signals, by what it has read: that holds one limit over all of them, and a
pause at once. A far side gives up one that is silent for long. So one that
stands longer is ended in order, which keeps what it has, and begun again. An
rclone can be told a rate, but not to stand still: it is held in the same way.

One that stands still ends with the worker, too. It is a process group of the
worker's session, and stopped as a terminal stops a job: when the worker ends,
however that is, the kernel sends HUP and CONT to what stands still of a group
that nobody is left to continue, and stops none of it from then on.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trigger_daemon.actions import _child_exec
from trigger_daemon.actions._copy_pace import Pace

TICK_S = 0.05  # how soon a change of pace is noticed
STOP_MAX_S = 30.0  # a far side waits longer for one that is stopped: `timeout` is a minute at least
GRACE_S = 10.0  # between TERM and KILL
RATES_APART = 2.0  # from the rate it was begun with; less is done by stopping it
SAID_BYTES = 32 * 1024  # of what it says for people, from the beginning and again from the end
READ_BYTES = 64 * 1024
LINE_MAX = 256 * 1024  # a name of 4 KiB is escaped to 24 KiB at most, and told several times in a line

Tell = Callable[[bytes], None]


def nothing(*_: object) -> None:
    """What nobody wants to know."""


def _deaf(rate: float | None) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class End:
    """`code`: negative for a signal. `again`: it was ended by us, for its pace."""

    code: int
    said: str
    again: bool = False


class Child:
    """One process and all it starts: a process group in the session of this worker, which the kernel ends with it."""

    def __init__(
        self, argv: Sequence[str], *, names: int, lock: int, pace: Pace, silent_s: float, far: bool,
        rerun_s: float | None, environment: Mapping[str, str], cwd: str = "/", line: Tell = nothing,
        complaint: Tell = nothing, guard: Callable[[int], None] = nothing, moved: Callable[[], int] | None = None,
        retune: Callable[[float | None], bool] = _deaf,
    ) -> None:  # fmt: skip
        """`names`: its standard input; `lock`: what all of it keep open; `silent_s`: how long it may do nothing.

        `line` and `complaint` are given each line that it writes for programs, and for people. `moved` tells how many
        bytes it has moved so far; without it that is what it has read. `retune` tells it another rate, False if it
        cannot be told. `rerun_s`: when one that cannot may be begun again for it; None: never.
        """
        self._pace = pace
        self._silent_s = silent_s
        self._far = far
        self._begun_rate = pace.rate()
        self._rerun_s = rerun_s
        self._line = _Lines(line)
        self._complaint = _Lines(complaint)
        self._guard = guard
        self._moved = moved
        self._retune = retune
        self._again = False
        self._stopped_s = 0.0  # the longest it was stopped
        self._began_at = self._moved_at = time.monotonic()
        self._read = self._written = 0
        self._head, self._tail = bytearray(), bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _child_exec.__file__, str(os.getpid()), argv[0], *argv],
            stdin=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=environment,
            pass_fds=(lock,), process_group=0,
        )  # fmt: skip
        os.pwrite(lock, b"%20d" % self._process.pid, 0)  # its group, for whoever finds the lock held by orphans

    def run(self) -> End:
        """Wait for its end. Raises Cancelled, and what `guard` raises, when it has ended."""
        try:
            self._listen()
        except BaseException:
            self._end()
            raise
        code = self._process.wait()
        said = bytes(self._head + self._tail).decode("utf-8", "backslashreplace")
        # One that was stopped for so long that the far side has given it up is no failure.
        lost = code != 0 and self._far and self._stopped_s > STOP_MAX_S
        return End(code, said, self._again or lost)

    def _listen(self) -> None:
        assert self._process.stdout and self._process.stderr
        with selectors.DefaultSelector() as selector, self._process.stdout as out, self._process.stderr as err:
            for pipe in (out, err):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ)
            ended_at = 0.0
            while selector.get_map():
                for key, _ in selector.select(TICK_S):
                    data = os.read(key.fd, READ_BYTES)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is out:
                        self._line.hear(data)
                    else:
                        self._keep(data)
                        self._complaint.hear(data)
                if self._process.poll() is None:
                    self._tick()
                elif not ended_at:
                    ended_at = time.monotonic()
                elif time.monotonic() - ended_at > GRACE_S:  # something of it hangs, and holds the pipes
                    self._signal(signal.SIGKILL, group=True)
                    return
            while self._process.poll() is None:
                self._tick()
                time.sleep(TICK_S)

    # ------------------------------------------------------------------------ pace

    def _tick(self) -> None:
        pace, now = self._pace, time.monotonic()
        read, written = self._counted()
        moved = read - self._read
        if moved or written != self._written:
            self._read, self._written, self._moved_at = read, written, now
        if now - self._moved_at < self._silent_s:
            pace.step()
        self._guard(written)
        if pace.cancelled or pace.paused or (moved and pace.rate() is not None):
            self._stand_still(moved)
        if self._rerun_s is None or self._again or not self._is_other_rate():
            return
        if self._retune(rate := pace.rate()):
            self._begun_rate = rate
        elif now - self._began_at > self._rerun_s:
            self._again = True
            self._signal(signal.SIGTERM)

    def _stand_still(self, moved: int) -> None:
        """Stop until the pace lets it go on. Raises Cancelled.

        By TSTP: what takes a STOP that was still on its way when the worker ended would stand still for ever.
        An ssh is not stopped: it has nothing to send, and answers the far side meanwhile.
        """
        self._signal(signal.SIGTSTP, group=not self._far)
        since = time.monotonic()
        try:
            while self._pace.paused and not self._pace.cancelled:
                self._pace.step()
                time.sleep(TICK_S)
                if self._far and time.monotonic() - since > STOP_MAX_S:
                    self._again = True
                    self._signal(signal.SIGTERM)
                    return
            self._pace.spend(moved)
        finally:
            self._stopped_s = max(self._stopped_s, time.monotonic() - since)
            self._moved_at = time.monotonic()
            self._signal(signal.SIGCONT, group=True)

    def _is_other_rate(self) -> bool:
        rate, begun = self._pace.rate(), self._begun_rate
        if rate is None or begun is None:
            return rate is not begun
        return not begun / RATES_APART <= rate <= begun * RATES_APART

    def _counted(self) -> tuple[int, int]:
        """Return the bytes it has read and written, files and lines alike; what it was where that is not told."""
        if self._moved is not None:
            return self._moved(), 0  # what it writes may be said of nothing, again and again
        try:
            with open(f"/proc/{self._process.pid}/io", "rb") as file:
                told = file.read().split()
            return int(told[1]), int(told[3])
        except (OSError, IndexError, ValueError):
            return self._read, self._written

    # ------------------------------------------------------------------------- end

    def _end(self) -> None:
        """End it in order, so that it keeps what it has; by force after a while."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT, group=True)
        until = time.monotonic() + GRACE_S
        while self._process.poll() is None and time.monotonic() < until:
            self._pace.step()
            time.sleep(TICK_S)
        if self._process.poll() is None:
            self._signal(signal.SIGKILL, group=True)
        self._process.wait()

    def _signal(self, number: int, *, group: bool = False) -> None:
        """The group is its own as long as it is not waited for; a child of it may be of another user (a helper)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self._process.pid, number)

    def _keep(self, data: bytes) -> None:
        room = SAID_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        del self._tail[:-SAID_BYTES]


class _Lines:
    """What is read of a pipe, line by line; of one that is too long, its end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._unread = bytearray()

    def hear(self, data: bytes) -> None:
        *lines, rest = (self._unread + data).replace(b"\r", b"\n").split(b"\n")
        self._unread = rest[-LINE_MAX:]
        for line in lines:
            self._tell(bytes(line))


def end_orphans(lock: int, *, by_force: bool) -> None:
    """End the group that was last begun with this lock, whose worker has gone, wherever it hangs.

    The lock is held, so one of the group lives, and its number is nobody else's.
    """
    with contextlib.suppress(ValueError, ProcessLookupError, PermissionError):
        group = int(os.pread(lock, 20, 0))
        os.killpg(group, signal.SIGKILL if by_force else signal.SIGTERM)
        os.killpg(group, signal.SIGCONT)


def listed(names: Sequence[bytes], end: bytes = b"\0") -> int:
    """Return a descriptor to read a list of names from: any bytes, and nothing of it on a disk."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("files")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as out:
        out.write(b"".join(name + end for name in names))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
