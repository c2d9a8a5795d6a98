"""A neighbour on a small volume: it writes there too, and sees at each moment who took room below the reserve.

Run as a script, `neighbour.py DIRECTORY RESERVE` (bytes), on an empty file
system: a process of its own, that nobody keeps from looking. What it writes
itself it knows to the block, so all the rest is ours. Orders come by line:
`take BYTES`, `give`, `look`, `mark` (begin to count anew); each is answered by a
line with what was seen since the last `mark`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVERY_S = 0.001
BLOCK = 2**20
NAME = ".neighbour"
# Who looks, and allocates a moment later, cannot know what came between: so long after the neighbour has taken room
# our work may fill what was free just before. It is counted by itself.
RACE_S = 0.05


class Watch:
    """Free space, and how much of what is gone is ours; all in bytes."""

    def __init__(self, directory: str, reserve: int) -> None:
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._file = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._root)
        self._reserve = reserve
        self._size = 0
        self._taken = self._own()
        self._taken_at, self._before = -1e9, 0
        self._at = time.monotonic()
        self._free = self._look()
        self._empty = self._free + self._taken
        self._ours = self._began = 0
        self.mark()

    def mark(self) -> None:
        """Begin to count anew."""
        self._gaps: list[float] = []
        self._least = self._free
        self._most = self._ours
        self._crossed = self._raced = self._below = self._deeper = 0
        self._grew_at = ""

    def sample(self, took: int = 0) -> None:
        """Look; `took`: what the neighbour itself took since the last look."""
        now, free = time.monotonic(), self._look()
        ours = self._empty - free - self._taken
        self._gaps.append(now - self._at)
        grew = ours - self._ours
        under = self._reserve - (free + max(0, took))  # the order is not known: ours may have come first
        if grew > 0 and under > 0:
            wrong = min(grew, under)
            if now - self._taken_at < RACE_S and under <= self._before:
                self._raced += wrong
            else:
                self._crossed += wrong
                self._grew_at = self._grew_at or f"{grew:,} bytes more of ours, {free:,} free"
        if free < self._reserve <= self._free:
            self._below += 1
            self._began = ours
        if free < self._reserve:
            self._deeper = max(self._deeper, ours - self._began)
        self._least, self._most = min(self._least, free), max(self._most, ours)
        self._at, self._free, self._ours = now, free, ours

    def take(self, size: int) -> None:
        """Write so many bytes: allocate them at once, then fill them. Without room for all nothing is done."""
        self.sample()
        before = self._taken
        try:
            os.posix_fallocate(self._file, self._size, size)
        except OSError:  # it is full
            size = 0
        self._size += size
        self._taken = self._own()
        took = self._taken - before
        self._taken_at, self._before = time.monotonic(), took
        self.sample(took)
        for begin in range(self._size - size, self._size, BLOCK):
            with contextlib.suppress(OSError):
                os.pwrite(self._file, bytes(min(BLOCK, self._size - begin)), begin)
            self.sample()

    def give(self) -> None:
        """Remove all that the neighbour wrote."""
        self.sample()
        before = self._taken
        os.ftruncate(self._file, 0)
        self._size = 0
        self._taken = self._own()
        self.sample(self._taken - before)

    def told(self) -> dict[str, int | float | str]:
        """Return what was seen since the last mark."""
        gaps = self._gaps or [0.0]
        return {
            "free": self._free, "ours": self._ours, "least": self._least, "most": self._most,
            "crossed": self._crossed, "deeper": self._deeper, "raced": self._raced, "below": self._below,
            "first": self._grew_at, "looks": len(self._gaps),
            "median_s": statistics.median(gaps), "longest_s": max(gaps),
        }  # fmt: skip

    def _look(self) -> int:
        room = os.fstatvfs(self._root)
        return room.f_bavail * room.f_frsize

    def _own(self) -> int:
        return os.fstat(self._file).st_blocks * 512


class Neighbour:
    """The process, for the proof."""

    def __init__(self, directory: Path, reserve: int) -> None:
        argv = [sys.executable, "-I", os.path.abspath(__file__), str(directory), str(reserve)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.ask("mark")

    def ask(self, order: str) -> Mapping[str, Any]:
        """Give an order; return what was seen since the last `mark`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        seen: dict[str, Any] = json.loads(self._process.stdout.readline())
        return seen

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def main(directory: str, reserve: int) -> None:
    with contextlib.suppress(OSError):
        os.nice(-10)  # beside eight copies
    watch = Watch(directory, reserve)
    while True:
        heard, _, _ = select.select([0], [], [], EVERY_S)
        watch.sample()
        if not heard:
            continue
        order, _, amount = os.read(0, 4_096).decode().strip().partition(" ")  # one at a time: each is answered first
        match order:
            case "take":
                watch.take(int(amount))
            case "give":
                watch.give()
            case "mark":
                watch.mark()
            case "":
                return
        print(json.dumps(watch.told()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
