"""What all comparisons share: places that go away, turns in random order, and ratios within a turn.

Machines differ and virtual ones are noisy, by a factor from one minute to the
next. So who is compared is measured in the same round, in an order drawn anew,
and a ratio is that of one round; the table shows the median of the rounds, and
the least and the most.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

EMPTY = "–"

Figures = Mapping[str, float]


class NotMeasured(Exception):
    """This one could not be measured; the message goes into the report."""


def say(words: str) -> None:
    print(f"... {words}", file=sys.stderr, flush=True)


@contextmanager
def place(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="td-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def file_system(path: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def number(value: float | None, digits: int = 2) -> str:
    return EMPTY if value is None else f"{value:,.{digits}f}"


def quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def exponent(work: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log cost over log work by least squares: 1 grows as the work does, 2 as its square."""
    x = [math.log(amount) for amount in work]
    return statistics.linear_regression(x, [math.log(cost) for cost in costs]).slope


class Found:
    """What was measured, by who and what: one value a round, None where there is none."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Figures]] = []
        self.failed: dict[str, str] = {}

    def values(self, who: str, what: str) -> list[float]:
        return [turn[who][what] for turn in self.turns if what in turn.get(who, {})]

    def ratios(self, who: str, other: str, what: str) -> list[float]:
        """Return, for each round in which both were measured, the one divided by the other."""
        return [
            turn[who][what] / turn[other][what]
            for turn in self.turns
            if what in turn.get(who, {}) and turn.get(other, {}).get(what)
        ]


def rounds(repeat: int, who: Mapping[str, Callable[[], Figures]], about: str) -> Found:
    """Measure everybody once a round, in random order; who cannot be measured is not asked again."""
    found = Found()
    for turn in range(repeat):
        found.turns.append({})
        order = [name for name in who if name not in found.failed]
        random.shuffle(order)
        for name in order:
            say(f"{about}, round {turn + 1} of {repeat}: {name}")
            try:
                found.turns[-1][name] = who[name]()
            except NotMeasured as why:
                found.failed[name] = str(why)
                say(f"{name} not measured: {why}")
    return found
