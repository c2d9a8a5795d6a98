"""How fast a worker may go: a live rate, standing still, the wish to end; and the sign that it moves."""

from __future__ import annotations

import time

NAP_S = 0.05  # how soon a change of rate, a pause or a cancel is noticed while waiting
BURST_S = 0.1  # of unused rate that may be caught up
PIECES_PER_S = 20  # a limited read is cut into so many, so that the rate is smooth
PIECE_MIN = 64 * 1024
PIECE_MAX = 8 * 1024 * 1024


class Cancelled(Exception):
    """The attempt was asked to end."""


class Pace:
    """Shared by the working thread and the thread that hears the daemon."""

    def __init__(self) -> None:
        self.limit: float | None = None  # bytes per second, told by the daemon
        self.own: float | None = None  # the rule's own
        self.paused = False
        self.cancelled = False
        self.steps = 0  # grows while work goes on; a hung call stops it
        self.doing = ""  # what the next call touches, for the alarm if it hangs
        self._tokens = 0.0
        self._filled_at = time.monotonic()

    def begin(self, own: float | None) -> None:
        """Forget the last job."""
        self.own = own
        self.cancelled = False
        self._tokens = 0.0
        self._filled_at = time.monotonic()

    def rate(self) -> float | None:
        if self.limit is None or self.own is None:
            return self.limit if self.own is None else self.own
        return min(self.limit, self.own)

    def piece(self) -> int:
        """Return the largest read that keeps the rate smooth, in bytes."""
        rate = self.rate()
        if rate is None:
            return PIECE_MAX
        return max(PIECE_MIN, min(PIECE_MAX, int(rate / PIECES_PER_S)))

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
        """Wait until `size` more bytes may be read; raise Cancelled."""
        self.check()
        rate = self.rate()
        if rate is None:
            return
        self._refill(rate)
        while self._tokens < 0:
            time.sleep(min(NAP_S, -self._tokens / rate))
            self.check()
            rate = self.rate()
            if rate is None:
                self._tokens = 0.0
                return
            self._refill(rate)
        self._tokens -= size

    def _refill(self, rate: float) -> None:
        now = time.monotonic()
        self._tokens = min(rate * BURST_S, self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now
