"""Task groups of Globus Compute, each lent to one attempt at a time, in a file with the tasks that are in it.

A task can be found again only as one that is new in a group, and the service
makes groups by itself, one at each submission that names none. So those that
earlier answers have named are kept. Two attempts that shared one could not be
told apart; therefore the file says who has it before anything is sent. What is
in a group is what was put there: the service may list it late.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

from trigger_daemon.globus.kept import write

USES_MAX = 100  # tasks of a group: they are noted with each attempt that has it
KEPT_MAX = 500  # a daemon has some dozens of attempts under way; what crashes have left lent goes first
NOTED = 8  # letters of a task's id


class Groups:
    """The groups of one state directory. Any thread may use it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: dict[str, Any] | None = None  # group -> by: who has it, '' for nobody; tasks; oldest first

    def take(self, user: str) -> tuple[str | None, list[str]]:
        """Lend a free group, durably, and tell the tasks in it; None if there is none. Raises OSError."""
        with self._lock:
            kept = dict(self._load())
            for group, about in kept.items():
                if not about["by"]:
                    self._save({**kept, group: {**about, "by": user}})
                    return group, list(about["tasks"])
            return None, []

    def enter(self, group: str, user: str) -> None:
        """Keep a group that the service has made for this user."""
        with self._lock:
            kept = dict(self._load())
            if group not in kept:
                kept[group] = {"by": user, "tasks": []}
                for old in list(kept)[: max(0, len(kept) - KEPT_MAX)]:
                    del kept[old]
                self._try(kept)

    def give_back(self, group: str, user: str, task: str = "") -> None:
        """Let others have a group that this user has, with its task in it. Said once more it changes nothing."""
        with self._lock:
            kept = dict(self._load())
            about = kept.get(group)
            if about is None or about["by"] != user:  # somebody else has it by now, or nobody
                return
            tasks = [*about["tasks"], task[:NOTED]] if task else about["tasks"]
            if len(tasks) < USES_MAX:
                kept[group] = {"by": "", "tasks": tasks}
            else:
                del kept[group]
            self._try(kept)

    def drop(self, group: str) -> None:
        """Lend a group to nobody any more."""
        with self._lock:
            self._try({key: about for key, about in self._load().items() if key != group})

    def _load(self) -> dict[str, Any]:
        if self._kept is None:
            try:
                with open(self._path, encoding="utf-8") as file:
                    read = json.load(file)
                self._kept = {
                    str(group): {"by": str(about["by"]), "tasks": [str(task) for task in about["tasks"]]}
                    for group, about in read.items()
                }
            except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
                self._kept = {}  # damaged, it is as good as none
        return self._kept

    def _try(self, kept: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # what the file says instead lends a group less
            self._save(kept)

    def _save(self, kept: dict[str, Any]) -> None:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        write(self._path, kept)
        self._kept = kept
