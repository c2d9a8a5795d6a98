"""What waits for the loop: facts from every thread, with a bound on looks and none on answers of runs.

A look that finds the inbox full waits, and with it its root's worker: the disk
can be read again, so back-pressure costs nothing. An answer of a provider
cannot be asked for again so cheaply, and there are never more of them than
runs at work, so it always has room.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from trigger_daemon.core.model import Fact, Seen, Swept, Unreadable, Vanished

ROWS_MAX = 50_000  # rows of looks waiting; some 15 MB
FACTS_A_ROUND_MAX = 500  # so that one commit stays short and orders are answered soon


class Inbox:
    """Thread-safe for `post`; everything else belongs to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._facts: deque[Fact] = deque()
        self._room = threading.Condition()
        self._rows = 0
        self._closed = False
        self._wake = asyncio.Event()
        self._waking = False

    def post(self, fact: Fact) -> None:
        """Put a fact in; looks wait while there is no room. After `close`, facts are dropped."""
        if isinstance(fact, (Seen, Swept, Unreadable, Vanished)):
            rows = len(fact.rows) if isinstance(fact, Seen) else 1
            with self._room:
                while self._rows >= ROWS_MAX and not self._closed:
                    self._room.wait(1.0)
                self._rows += rows
        if self._closed:
            return
        self._facts.append(fact)
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is gone; so are we, soon
                self._closed = True

    def take(self) -> list[Fact]:
        """Return what has come, oldest first, at most `FACTS_A_ROUND_MAX`."""
        taken: list[Fact] = []
        rows = 0
        while self._facts and len(taken) < FACTS_A_ROUND_MAX:
            fact = self._facts.popleft()
            taken.append(fact)
            if isinstance(fact, Seen):
                rows += len(fact.rows)
            elif isinstance(fact, (Swept, Unreadable, Vanished)):
                rows += 1
        if rows:
            with self._room:
                self._rows -= rows
                self._room.notify_all()
        return taken

    async def wait(self, timeout_s: float) -> None:
        """Wait until something has come, at most so long."""
        if not self._facts:
            try:
                async with asyncio.timeout(max(timeout_s, 0.0)):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._waking = False
        self._wake.clear()

    def close(self) -> None:
        """Let waiting threads go."""
        with self._room:
            self._closed = True
            self._room.notify_all()
