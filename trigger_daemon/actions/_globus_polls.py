"""Polls of one provider: few at once, so that a slow service leaves threads for what is urgent; and what is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from trigger_daemon.actions import Progress, Unknown
from trigger_daemon.core.model import Fault
from trigger_daemon.globus.faults import by_itself

AT_ONCE = 3  # of the executor's eight threads
AGAIN_S = 2.0
BELIEVED_S = 120.0  # an answer is told again for so long; after that, none is one that does not come
GONE_S = 600.0  # a task or run that the service does not know for so long is not known any more


@dataclass(slots=True)
class _Asked:
    progress: Progress = field(default_factory=lambda: Progress("active"))


class Polls:
    """What was last heard of each task or run. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, who: str = "Globus") -> None:
        self._clock = clock
        self._who = who
        self._lock = threading.Lock()
        self._asking = 0
        self._last: dict[str, tuple[float, Progress]] = {}  # and when it was heard
        self._gone_since: dict[str, float] = {}

    def crowded(self, number: str) -> Progress | None:
        """Return the last word where as many are being asked as may be at once, None if another may.

        Raises Unknown if that word is too old to be told once more: silence must not look like work.
        """
        with self._lock:
            heard_at, last = self._last.get(number, (0.0, None))
            if self._asking < AT_ONCE or last is None or last.status not in ("active", "inactive"):
                return None
        age_s = self._clock() - heard_at
        if age_s > BELIEVED_S:
            raise Unknown(f"{self._who} is slow or silent: what it said last is {age_s / 60:.0f} min old")
        return replace(last, again_in_s=AGAIN_S)

    @contextmanager
    def asking(self, number: str) -> Iterator[_Asked]:
        asked = _Asked()
        with self._lock:
            self._asking += 1
        try:
            yield asked
            if asked.progress.status == "inactive":  # the run is not HELD: it goes on once a person has done their part
                asked.progress = replace(asked.progress, hint=by_itself(asked.progress.hint))
            with self._lock:
                self._last[number] = self._clock(), asked.progress
        finally:
            with self._lock:
                self._asking -= 1

    def gone(self, number: str, what: str, run: int) -> Fault | None:
        """The service answers that it does not know it: return the end of that once it has lasted."""
        now = self._clock()
        with self._lock:
            since = self._gone_since.setdefault(number, now)
        if now - since < GONE_S:
            return None
        why = f"{self._who} no longer knows {what} {number}: what became of it cannot be told"
        hint = f"look at the destination; then `trigger-daemon runs retry {run}`, or `runs abandon {run}`"
        return Fault("person", why, hint)

    def there(self, number: str) -> None:
        with self._lock:
            self._gone_since.pop(number, None)

    def forget(self, number: str) -> None:
        with self._lock:
            self._last.pop(number, None)
            self._gone_since.pop(number, None)
