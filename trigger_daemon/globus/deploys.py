"""Which flows were sent to the service a short while ago, also by a command that was killed.

The service may list a new flow late, so that a list without it proves nothing
for a while. What is about to be sent is therefore written down first, durably.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from trigger_daemon.errors import TriggerError
from trigger_daemon.globus.kept import write

KEPT = "globus-flow-deploys.json"  # in the state directory
LOCK = "globus-flow-deploys.lock"
DEPLOYS_MAX = 1_000  # more than can be sent one after the other before the first of them is surely listed
BEFORE_MAX = 1_000  # flows of one title; each needs an --again


@dataclass(frozen=True, slots=True)
class Deploy:
    """A flow that was sent. `flow` is '' as long as nobody knows what became of it."""

    client: str
    title: str
    time: float  # UTC, just before it was sent
    before: tuple[str, ...] = ()  # flows of this title that were there already
    flow: str = ""


class Deploys:
    """What was sent, oldest first. Only whoever holds `alone` may use it."""

    def __init__(self, path: str, listed_after_s: float) -> None:
        self._path = path
        self._listed_after_s = listed_after_s

    def left_s(self, sent: Deploy) -> float:
        """Return how long the list may still not show it. A clock that was set back makes it longer, never shorter."""
        return min(sent.time + self._listed_after_s - time.time(), self._listed_after_s)

    def last(self, client: str, title: str) -> Deploy | None:
        """Return the last one of a title that may not be listed yet. Raises OSError, TriggerError."""
        of_title = [one for one in self._read() if (one.client, one.title) == (client, title)]
        return of_title[-1] if of_title else None

    def note(self, sent: Deploy) -> None:
        """Keep it in place of an earlier one of its title. Raises OSError, TriggerError."""
        self._write([*self._others(sent), sent])

    def forget(self, sent: Deploy) -> None:
        self._write(self._others(sent))

    def _others(self, sent: Deploy) -> list[Deploy]:
        return [one for one in self._read() if (one.client, one.title) != (sent.client, sent.title)]

    def _read(self) -> list[Deploy]:
        try:
            with open(self._path, encoding="utf-8") as file:
                kept = [_deploy(one) for one in json.load(file)]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, AttributeError):
            hint = "remove it, if no flow was made in the last minutes"
            raise TriggerError(f"{self._path} cannot be understood", hint=hint) from None
        return [one for one in kept if self.left_s(one) > 0]

    def _write(self, kept: list[Deploy]) -> None:
        write(self._path, [asdict(one) for one in kept[-DEPLOYS_MAX:]])


def _deploy(one: dict[str, Any]) -> Deploy:
    return Deploy(
        str(one["client"]), str(one["title"]), float(one["time"]), tuple(map(str, one["before"])), str(one["flow"])
    )


@contextlib.contextmanager
def alone(state_dir: str, listed_after_s: float) -> Iterator[Deploys]:
    """Let one command at a time make flows; a killed one's turn ends with it. Raises OSError, TriggerError."""
    try:
        lock = os.open(os.path.join(state_dir, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TriggerError(
            f"the state directory {state_dir} cannot be used: {error.strerror}",
            hint="what is sent is noted there, so that no second flow is made: run it as the daemon's user, or by sudo",
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "try again when it has ended"
            raise TriggerError("another `globus flow deploy` is under way", hint=hint) from None
        yield Deploys(os.path.join(state_dir, KEPT), listed_after_s)
    finally:
        os.close(lock)
