"""What was sent and not answered: when it may be said that the service has surely not taken it.

A request is under way until its answer or its end; while it is, nothing that is
looked for proves anything. After that it may stand unlisted for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trigger_daemon.actions import Unknown

T = TypeVar("T")

Key = tuple[int, int]  # run and attempt


class Sent:
    """The requests of one provider, by attempt. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[Key] = set()
        self._ended_at: dict[Key, float] = {}  # since when what was sent may stand unlisted

    @contextmanager
    def under_way(self, key: Key) -> Iterator[None]:
        """Send what an attempt sends, once at a time. Raises Unknown if it is being sent already."""
        with self._lock:
            if key in self._under_way:
                raise Unknown("what was sent has not been answered yet")
            self._under_way.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.discard(key)
                self._ended_at[key] = time.monotonic()

    def look(self, key: Key, look: Callable[[], T | None], listed_after_s: float) -> T | None:
        """Return what `look` finds; None only if it began so late that what was sent would surely be listed.

        Raises Unknown before that.
        """
        with self._lock:
            if key in self._under_way:
                raise Unknown("what was sent has not been answered yet")
            since = self._ended_at.setdefault(key, time.monotonic())  # in another life: it ended with that
        began = time.monotonic()
        found = look()
        if found is not None:
            return found
        with self._lock:
            if key in self._under_way or self._ended_at.get(key) != since:
                raise Unknown("it was sent again meanwhile")
        left_s = listed_after_s - (began - since)
        if left_s > 0:
            raise Unknown(f"it is not listed yet; that it was not taken is known in {left_s:.0f} s")
        return None

    def forget(self, run: int) -> None:
        with self._lock:
            for key in [key for key in self._ended_at if key[0] == run]:
                del self._ended_at[key]
