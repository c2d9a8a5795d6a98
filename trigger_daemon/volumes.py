"""Read free space of the volumes in the settings, cheaply, and never waiting for a dead mount."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from trigger_daemon.workers import Workers

EVERY_S = 10.0
WINDOW_S = 600.0  # the fill rate is the slope over this long
DEADLINE_S = 10.0


class Mark(Protocol):
    """An amount of a volume, in bytes or as a share of its size."""

    def of(self, total_bytes: int) -> int: ...


@dataclass(slots=True)
class Gauge:
    """What is known of one volume."""

    path: str
    low: Mark
    critical: Mark
    total_bytes: int = 0
    free_bytes: int = 0
    error: str = ""
    pending: bool = False
    history: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, now: float, total: int, free: int) -> None:
        """Note a reading."""
        self.total_bytes, self.free_bytes, self.error = total, free, ""
        self.history.append((now, free))
        while self.history and now - self.history[0][0] > WINDOW_S:
            self.history.popleft()

    def fill_bytes_per_s(self) -> float | None:
        """Return how fast free space shrinks (negative: it grows), None before there are two readings."""
        if len(self.history) < 2:
            return None
        (t0, free0), (t1, free1) = self.history[0], self.history[-1]
        return (free0 - free1) / (t1 - t0) if t1 > t0 else None

    def state(self) -> str:
        """Return ok, low or critical."""
        for word, mark in (("critical", self.critical), ("low", self.low)):
            if self.total_bytes and self.free_bytes < mark.of(self.total_bytes):
                return word
        return "ok"

    def words(self) -> dict[str, object]:
        """Return what status tells."""
        rate = self.fill_bytes_per_s()
        return {
            "path": self.path,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "fill_bytes_per_s": None if rate is None else round(rate),
            "full_in_s": round(self.free_bytes / rate) if rate and rate > 0 else None,
            "state": self.state() if not self.error else "ok",
            "error": self.error or None,
        }


class Volumes:
    """All gauges; `sample` is called from the loop and returns at once."""

    def __init__(self, gauges: list[Gauge], monotonic: Callable[[], float]) -> None:
        self.gauges = gauges
        self._monotonic = monotonic
        self._workers = Workers("volumes", 2, monotonic)
        self._last = -EVERY_S

    def sample(self, now: float) -> None:
        """Begin a reading where one is due."""
        if now - self._last < EVERY_S:
            self._workers.supervise(now)
            return
        self._last = now
        for gauge in self.gauges:
            if not gauge.pending:
                gauge.pending = True
                self._workers.submit(partial(self._read, gauge), deadline_s=DEADLINE_S, late=partial(self._late, gauge))

    def _read(self, gauge: Gauge) -> None:
        try:
            found = os.statvfs(gauge.path)
            gauge.take(self._monotonic(), found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)
        except OSError as error:
            gauge.error = error.strerror or str(error)
        gauge.pending = False

    def _late(self, gauge: Gauge) -> None:
        gauge.error = "does not answer"

    def stop(self) -> None:
        """Let the threads go."""
        self._workers.stop()
