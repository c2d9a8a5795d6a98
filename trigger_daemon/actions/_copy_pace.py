"""How fast a worker may go: the shared rate, standing still, the wish to end; and the sign that it moves.

The limit is one for all workers. They draw from common tills in shared memory,
first come, first served: what one does not ask for (it syncs, reads back, waits
for its rule's own limit) is there for the others, and nobody divides anything.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time

NAP_S = 0.05  # how soon a change of rate, a pause or a cancel is noticed while waiting
BURST_S = 0.2  # of unused rate that may be caught up
PIECES_PER_S = 40  # at the whole rate: what a worker draws at once, so that many take turns smoothly
PIECE_MIN = 64 * 1024
PIECE_MAX = 8 * 1024 * 1024
BACK_BURST = 4 << 30  # what 8 workers may have written and not yet read back: two groups or segments each

READING, BACK = 0, 1  # tills: what is read from the sources, what is read at the destinations
RULES = 2  # the first till of a rule


class Cancelled(Exception):
    """The attempt was asked to end."""


class Tills:
    """Shared memory with a till for each limit. A till knows how much was drawn, and how much it has handed out by now.

    Who draws gets the number that the till must have reached; numbers are in
    order, so turns are taken. A worker that dies takes its last piece with it,
    and the lock is given back by its end.
    """

    _ENTRY = struct.Struct("ddd")  # drawn, handed out (both bytes), and when that was (CLOCK_MONOTONIC is everybody's)

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory = mmap.mmap(fd, 0)
        self._mine = threading.Lock()  # the other lock is the process's: it does not part threads

    @classmethod
    def make(cls, tills: int, directory: str) -> int:
        """Return the descriptor of memory for so many tills."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("tills")
        else:
            with tempfile.TemporaryFile(dir=directory) as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, tills * cls._ENTRY.size)
        return fd

    def ticket(self, till: int, size: float, rate: float, burst: float) -> float:
        """Draw `size` bytes; return the number that must be reached."""
        return self._turn(till, size, rate, burst)[0]

    def reached(self, till: int, rate: float, burst: float) -> float:
        return self._turn(till, 0.0, rate, burst)[1]

    def _turn(self, till: int, size: float, rate: float, burst: float) -> tuple[float, float]:
        at = till * self._ENTRY.size
        with self._mine:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, self._ENTRY.size, at)
            try:
                drawn, reached, looked_at = self._ENTRY.unpack_from(self._memory, at)
                now = time.monotonic()
                reached = min(drawn + burst, reached + max(0.0, now - looked_at) * rate)
                self._ENTRY.pack_into(self._memory, at, drawn + size, reached, now)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, self._ENTRY.size, at)
        return drawn, reached


class Pace:
    """Shared by the working threads and the thread that hears the daemon."""

    def __init__(self, tills: Tills) -> None:
        self.limit: float | None = None  # bytes per second of all workers together, told by the daemon
        self.rule: float | None = None  # of all runs of the rule together
        self.own: float | None = None  # of this run
        self.paused = False
        self.cancelled = False
        self.steps = 0  # grows while work goes on; a hung call stops it
        self.doing = ""  # what the next call touches, for the alarm if it hangs
        self._tills = tills
        self._rule_till = RULES
        self._drawn = {READING: 0, RULES: 0}  # and not read yet
        self._tokens = 0.0
        self._filled_at = time.monotonic()

    def begin(self, own: float | None, rule: float | None = None, rule_till: int = RULES) -> None:
        """Forget the last job."""
        self.own, self.rule, self._rule_till = own, rule, rule_till
        self.cancelled = False
        self._drawn = {READING: 0, RULES: 0}
        self._tokens = 0.0
        self._filled_at = time.monotonic()

    def rate(self) -> float | None:
        """Return the lowest of what limits this run, its own rate if nobody else read."""
        return min((rate for rate in (self.limit, self.rule, self.own) if rate is not None), default=None)

    def piece(self) -> int:
        """Return the largest read that keeps the rate smooth, in bytes."""
        return _piece(self.rate())

    def step(self) -> None:
        """Show that work goes on."""
        self.steps += 1

    def check(self) -> None:
        """Stand still while paused; raise Cancelled."""
        self.steps += 1
        while self.paused and not self.cancelled:
            self.steps += 1
            time.sleep(NAP_S)
        if self.cancelled:
            raise Cancelled

    def spend(self, size: int) -> None:
        """Wait until `size` more bytes may be read, at most a piece; raise Cancelled.

        The common till comes last: nobody stands in its row who may not read yet.
        """
        self.check()
        self._spend_own(size)
        self._spend(RULES, self._rule_till, size)
        self._spend(READING, READING, size)

    def spend_back(self, size: int, destinations: int) -> None:
        """Wait until `size` bytes may be read at one of so many destinations; raise Cancelled.

        What was just written is read back as fast as the disk can: no more than
        was read comes here. Only what an earlier attempt left is slowed.
        """
        self.check()
        rate = self.limit
        if rate is None:
            return
        ticket = self._tills.ticket(BACK, size / destinations, rate, BACK_BURST)
        while (rate := self.limit) is not None:
            missing = ticket - self._tills.reached(BACK, rate, BACK_BURST)
            if missing <= 0:
                return
            time.sleep(min(NAP_S, missing / rate))
            self.check()

    def _spend(self, kind: int, till: int, size: int) -> None:
        """Take from what was drawn, and draw a whole piece when that is spent: small files come to their turn too."""
        rate = self._rate_of(kind)
        if rate is None or self._drawn[kind] >= size:
            self._drawn[kind] = 0 if rate is None else self._drawn[kind] - size
            return
        more = max(size - self._drawn[kind], _piece(rate))
        ticket = self._tills.ticket(till, more, rate, rate * BURST_S)
        while (rate := self._rate_of(kind)) is not None:
            missing = ticket - self._tills.reached(till, rate, rate * BURST_S)
            if missing <= 0:
                break
            time.sleep(min(NAP_S, missing / rate))
            self.check()
        self._drawn[kind] += more - size

    def _rate_of(self, kind: int) -> float | None:
        return self.limit if kind == READING else self.rule

    def _spend_own(self, size: int) -> None:
        rate = self.own
        if rate is None:
            return
        self._refill(rate)
        while self._tokens < 0:
            time.sleep(min(NAP_S, -self._tokens / rate))
            self.check()
            self._refill(rate)
        self._tokens -= size

    def _refill(self, rate: float) -> None:
        now = time.monotonic()
        self._tokens = min(rate * BURST_S, self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now


def _piece(rate: float | None) -> int:
    return PIECE_MAX if rate is None else max(PIECE_MIN, min(PIECE_MAX, int(rate / PIECES_PER_S)))
