"""What all simulated writers share: unbuffered files with a pause at each write boundary, and their record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Pause = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Written:
    """A file as its writer left it.

    `kind`: movie, companion, image, run, … `odd`: what is unusual about it, ''
    if nothing. `arrives`: whether it may be sent at all by a rule that knows
    the number of frames and waits for companions.
    """

    path: Path
    sha256: str
    size: int
    kind: str
    odd: str = ""
    arrives: bool = True


class Dated:
    """A pause that takes no time and counts it: files get the times of modification that they would have had.

    So a tree is made at once that a replay takes for hours of acquisition.
    `now`: UTC seconds.
    """

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self, seconds: float) -> None:
        self.now += seconds

    def date(self, file: int | Path) -> None:
        """Set the time of modification of a descriptor or path to now."""
        os.utime(file, ns=(round(self.now * 1e9),) * 2)


class File:
    """An unbuffered file: each write is on its own, and followed by the pause."""

    def __init__(self, path: Path, pause: Pause, mode: str = "xb") -> None:
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - closed by `writing`
        self._pause = pause
        self.end = os.fstat(self._file.fileno()).st_size
        self._date()  # one that stays empty has its time, too

    def append(self, data: bytes, pause_s: float = 0.0) -> int:
        """Write at the end and return where that was."""
        at, self.end = self.end, self.end + len(data)
        self.put(at, data, pause_s)
        return at

    def put(self, at: int, data: bytes, pause_s: float = 0.0) -> None:
        """Write in place."""
        self._file.seek(at)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
        self._date()
        self._pause(pause_s)

    def close(self) -> None:
        self._file.close()

    def _date(self) -> None:
        if isinstance(self._pause, Dated):
            self._pause.date(self._file.fileno())


@contextmanager
def writing(path: Path, pause: Pause, *, mode: str = "xb") -> Iterator[File]:
    """Open a new file, below directories that are made; `mode` r+b: one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = File(path, pause, mode)
    try:
        yield file
    finally:
        file.close()


def written(path: Path, kind: str, odd: str = "", *, arrives: bool = True) -> Written:
    """Return the record of a file as it is now."""
    data = path.read_bytes()
    return Written(path, hashlib.sha256(data).hexdigest(), len(data), kind, odd, arrives)


def small_file(
    path: Path, data: bytes, *, kind: str, pause: Pause, odd: str = "", arrives: bool = True, rewrite: bool = False
) -> Written:
    """Write a small file in two writes; `rewrite`: in place of what it held, if it is there."""
    with writing(path, pause, mode="wb" if rewrite else "xb") as file:
        if data:
            file.append(data[: len(data) // 3], 0.02)
            file.append(data[len(data) // 3 :])
    return written(path, kind, odd, arrives=arrives)


def times(frame_s: float | Sequence[float], frames: int) -> list[float]:
    """Return the seconds of each frame."""
    return list(frame_s) if isinstance(frame_s, Sequence) else [frame_s] * frames
