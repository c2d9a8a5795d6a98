"""Decide when a failed attempt is followed by another, or that a person is needed.

Pure; randomness is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from trigger_daemon.core.model import Fault
from trigger_daemon.core.rules import Retry

JITTER = 0.2  # share of the wait that varies, so that many runs do not come back in one instant
UNCOUNTED_S = 0.2  # after an end that was nobody's failure (a restart); not 0, so that it can never spin


@dataclass(frozen=True, slots=True)
class Later:
    """Try again after so many seconds."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Stop, safe; a person is needed."""

    because: str
    hint: str


def backoff_s(failures: int, policy: Retry, rand: float) -> float:
    """Return the wait after the n-th failure in a row: doubling, at most `longest`, varied by `rand` in [0, 1)."""
    wait = min(policy.longest_s, policy.initial_s * 2.0 ** min(failures - 1, 40))
    return wait * (1 - JITTER * rand)


def decide(fault: Fault, *, failures: int, failing_for_s: float, policy: Retry, rand: float) -> Later | Hold:
    """Return what follows the `failures`-th counted failure in a row."""
    if fault.kind == "person":
        return Hold(fault.why, fault.hint)
    if fault.kind == "permanent":
        return Hold(fault.why, fault.hint or "mend the cause, then retry the run")
    if fault.counts and failing_for_s >= policy.give_up_after_s:
        days = failing_for_s / 86_400
        return Hold(
            f"gave up after {failures} failures over {days:.1f} days: {fault.why}",
            fault.hint or "mend the cause, then retry the run",
        )
    if fault.retry_after_s is not None:
        return Later(max(fault.retry_after_s, 0.0))
    if not fault.counts:
        return Later(UNCOUNTED_S)
    return Later(backoff_s(failures, policy, rand))
