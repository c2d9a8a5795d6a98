"""How fast each rule gets work done, over the last minutes: for people who ask whether it still moves.

Counted from what a heartbeat tells anyway: files and bytes of runs that are
done, and bytes of runs under way. A few dozen numbers a rule that moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

STEP_S = 10.0
STEPS = 30  # five minutes


class _Steps:
    """One rule's last steps, with their sums."""

    def __init__(self) -> None:
        self.steps = deque([(0, 0)] * STEPS, maxlen=STEPS)  # files and bytes
        self.lately = [0] * STEPS  # bytes a second
        self.files = self.size = 0

    def advance(self) -> None:
        files, size = self.steps[0]
        self.files, self.size = self.files - files, self.size - size
        self.steps.append((0, 0))
        self.lately = [*self.lately[1:], 0]  # another list: the old one may be on its way to the command line

    def add(self, files: int, size: int) -> None:
        self.files, self.size = self.files + files, self.size + size
        files, size = self.steps[-1][0] + files, self.steps[-1][1] + size
        self.steps[-1] = (files, size)
        self.lately = [*self.lately[:-1], round(size / STEP_S)]


class Rates:
    """Bytes and files of the last STEPS times STEP_S seconds, by rule."""

    def __init__(self) -> None:
        self._most: dict[str, tuple[int, int]] = {}  # files and bytes so far
        self._steps: dict[str, _Steps] = {}  # only of rules that moved
        self._began_at: float | None = None
        self._step = 0

    def sample(self, at: float, rules: Sequence[dict[str, Any]], working: Sequence[Mapping[str, Any]]) -> None:
        """Take the numbers of now, and add to each rule its rates."""
        if self._began_at is None:
            self._began_at = at
        self._advance(int((at - self._began_at) // STEP_S))
        under_way: dict[str, int] = {}
        for run in working:
            under_way[run["rule"]] = under_way.get(run["rule"], 0) + run["bytes_done"]
        window_s = max(1.0, min(at - self._began_at, (STEPS - 1) * STEP_S + (at - self._began_at) % STEP_S))
        most = {}
        for rule in rules:
            name = rule["name"]
            files, size = rule["files_done"], rule["bytes_done"] + under_way.get(name, 0)
            before = self._most.get(name, (files, size))
            # An attempt that begins again moves nothing until it is further than the last.
            most[name] = (max(files, before[0]), max(size, before[1]))
            if most[name] != before:
                self._steps.setdefault(name, _Steps()).add(most[name][0] - before[0], most[name][1] - before[1])
            steps = self._steps.get(name)
            rule["files_per_min"] = round(60 * steps.files / window_s, 1) if steps else 0.0
            rule["bytes_per_s"] = round(steps.size / window_s) if steps else 0
            rule["bytes_per_s_lately"] = steps.lately if steps else []
        self._most = most
        self._steps = {name: of for name, of in self._steps.items() if name in most and (of.files or of.size)}

    def _advance(self, step: int) -> None:
        for _ in range(min(step - self._step, STEPS)):
            for steps in self._steps.values():
                steps.advance()
        self._step = max(step, self._step)
