"""Instants that something waits for: a heap, with stale entries left in it and skipped.

For the rare and the few. The quiet periods of files do not come here: they all
have their rule's length, so an insertion-ordered dict is their queue
(`core/settle.py`), at a tenth of the cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable

Fire = Callable[[float], None]


class Timers:
    """At most one instant for each key; setting it again replaces it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._live: dict[Hashable, tuple[float, int, Fire]] = {}
        self._count = 0

    def set(self, key: Hashable, at: float, fire: Fire) -> None:
        """Call `fire(now)` at `at`; replaces what was set for the key."""
        self._count += 1
        self._live[key] = (at, self._count, fire)
        heapq.heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 2 * len(self._live) + 1_000:  # replaced entries must not pile up
            self._heap = [(when, count, k) for k, (when, count, _) in self._live.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Hashable) -> None:
        """Forget the key; nothing happens if it is not set."""
        self._live.pop(key, None)

    def at(self, key: Hashable) -> float | None:
        """Return when the key's instant is, None if it is not set."""
        entry = self._live.get(key)
        return entry[0] if entry else None

    def next(self) -> float | None:
        """Return the earliest instant."""
        while self._heap:
            at, count, key = self._heap[0]
            entry = self._live.get(key)
            if entry and entry[1] == count:
                return at
            heapq.heappop(self._heap)
        return None

    def run(self, now: float) -> None:
        """Fire everything that is due."""
        while (at := self.next()) is not None and at <= now:
            _, _, key = heapq.heappop(self._heap)
            fire = self._live.pop(key)[2]
            fire(now)
