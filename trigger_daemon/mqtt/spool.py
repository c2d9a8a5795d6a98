"""Which ends and holds of runs are still to be told: the journal is the spool, and a small file says how far we are.

The journal holds them anyway, durably and in order, so nothing is queued in
memory, and a daemon that is killed while the broker is away loses nothing. The
file is written after the broker has confirmed: what was told just before a
crash is told once more, never less than once.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from trigger_daemon.reader import Reader

FILE = "mqtt.told"
TOGETHER = 20  # events under way to the broker at once: as many as it takes unconfirmed


class Spool:
    """To be used by one thread at a time. Every method may raise JournalError or OSError, and can be called again."""

    def __init__(self, state_dir: Path, limit: int) -> None:
        self._path = state_dir / FILE
        self._reader = Reader(state_dir)
        self._limit = limit
        self._at: tuple[int, float] | None = None  # number and time of the last transition that was told

    def next(self) -> tuple[list[dict[str, Any]], int, int]:
        """Return what is to be told next, oldest first; how many before it are left out, and after which transition.

        Those are beyond the limit, and must be told as lost.
        """
        after, time = self._at or self._open()
        newest, _ = self._reader.newest_move()
        if newest < after:  # old runs were thinned, or the journal is another one: its numbers have begun anew
            after, time = self._reader.newest_move_until(time)
        self._at = (after, time)
        moves, dropped = self._reader.moves(after, TOGETHER, self._limit)
        return moves, dropped, after

    def told(self, move: dict[str, Any]) -> None:
        """The broker has confirmed everything up to this one."""
        self._at = (move["id"], move["time"])
        self._write()

    def _open(self) -> tuple[int, float]:
        """Return where an earlier life ended; without one, begin with what happens from now on."""
        try:
            number, time = self._path.read_text(encoding="ascii").split()
            return int(number), float(time)
        except (FileNotFoundError, ValueError):  # an unfinished write is shorter
            self._at = self._reader.newest_move()
            self._write()
            return self._at

    def _write(self) -> None:
        """Write in place, always as many bytes: a power cut leaves the old words or the new, and costs no fsync."""
        assert self._at is not None
        words = f"{self._at[0]:020d} {self._at[1]:020.6f}\n".encode("ascii")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            os.pwrite(descriptor, words, 0)
        finally:
            os.close(descriptor)


def forget(state_dir: Path) -> None:
    """Let what happens while nothing is to be told be told to nobody later."""
    with contextlib.suppress(OSError):
        (state_dir / FILE).unlink()
