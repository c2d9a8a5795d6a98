"""The two clocks, in one place, so that tests can pass others.

Ages are measured with the monotonic clock; the wall clock is for records only.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Return seconds on a clock that never steps."""

    def utc(self) -> float:
        """Return Unix seconds; may step."""


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    utc = staticmethod(time.time)
