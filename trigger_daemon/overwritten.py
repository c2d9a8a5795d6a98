"""Whether another run of ours has sent something else to a copy's place since: then the copy is not what was proved.

A service that keeps the times of sources may show nothing of it. The journal
knows where each run writes, and which files each has taken.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from trigger_daemon import actions
from trigger_daemon.core.model import join, split
from trigger_daemon.journal import Journal

READ_AT_ONCE = 1_000  # requests of runs
PLACES_MAX = 1_000_000  # directories that were written to, some 60 bytes each; beyond them nothing can be told


class Overwritten:
    """Asks the journal. Any thread may use it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._read_up_to: dict[str, int] = {}  # action -> batch
        self._places: set[int] = set()  # hashes of (action, service, directory)

    def renewed(self) -> None:
        """A run writes elsewhere from now on: all are read again."""
        with self._lock:
            self._read_up_to.clear()

    def why_not(self, provider: actions.Action, run: int, made_time: float, record: Mapping[str, Any]) -> str:
        """Return which other run has written to a copy's place since, '' if none is known. Raises JournalError."""
        if (place := getattr(provider, "place", None)) is None:
            return ""
        request = self._journal.request(run)
        action, (service, _) = str(request["action"]), place(request["options"])
        self._catch_up(action, place)
        if len(self._places) >= PLACES_MAX:
            return "there are too many places to tell whether another run has written there"
        parts = str(record.get("to")).partition("://")[2].split("/")[1:]
        for depth in range(len(parts)):
            directory = "/".join(parts[:depth])
            if hash((action, service, directory)) not in self._places:
                continue
            mine = tuple(record[key] for key in ("root", "path", "size", "mtime_ns"))
            for other, *file in self._journal.taken_as(*split("/".join(parts[depth:])), made_time):
                if other == run or tuple(file) == mine:
                    continue
                theirs = self._journal.request(other)
                if theirs["action"] == action and place(theirs["options"]) == (service, directory):
                    what = join(str(file[0]).rstrip("/"), str(file[1]))
                    return f"run {other} has sent {what} to the same place since"
        return ""

    def _catch_up(self, action: str, place: Any) -> None:
        with self._lock:
            while rows := self._journal.requests_after(self._read_up_to.get(action, 0), READ_AT_ONCE):
                for self._read_up_to[action], request in rows:
                    if request.get("action") == action and len(self._places) < PLACES_MAX:
                        self._places.add(hash((action, *place(request["options"]))))
