"""What the acquisition machine is doing besides us: CPU load, I/O pressure, programs that were named.

Read from /proc alone, so that no disk and no mount is touched. What a kernel
does not tell is None, and a condition on it never holds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from trigger_daemon.clock import Clock
from trigger_daemon.core.model import Pressed
from trigger_daemon.core.storage import Condition

PROC = "/proc"
EVERY_S = 1.0
WORDS_MAX = 8  # of a command line: an interpreter, its options with their values, a program
_INTERPRETERS = ("python", "wine", "java", "mono", "perl", "sh", "bash", "MainThread")


class Instrument:
    """Readings of this machine; a whole one costs some milliseconds where programs are looked for."""

    def __init__(self, proc: str = PROC) -> None:
        self._proc = proc
        self._busy: tuple[int, int] | None = None  # ticks that were spent at work, and in all

    def cpu(self) -> float | None:
        """Return the share of all CPUs that was at work since the last call, None at the first one."""
        try:
            with open(f"{self._proc}/stat", "rb") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        if len(ticks) < 5:
            return None
        total, idle = sum(ticks), ticks[3] + ticks[4]
        before, self._busy = self._busy, (total - idle, total)
        if before is None or total <= before[1]:
            return None
        return (self._busy[0] - before[0]) / (total - before[1])

    def pressure(self, what: str) -> float | None:
        """Return the share of the last ten seconds in which some task waited for io, cpu or memory."""
        try:
            with open(f"{self._proc}/pressure/{what}", "rb") as file:
                for line in file:
                    if line.startswith(b"some "):
                        return float(line.split()[1].removeprefix(b"avg10=")) / 100
        except (OSError, ValueError, IndexError):
            return None
        return None

    def running(self, names: frozenset[str]) -> frozenset[str]:
        """Return which of these programs run: by the process's name, or by the file that an interpreter was given."""
        found: set[str] = set()
        try:
            entries = os.listdir(self._proc) if names else []
        except OSError:
            return frozenset()
        for entry in filter(str.isdigit, entries):
            try:
                with open(f"{self._proc}/{entry}/comm", "rb") as file:
                    comm = os.fsdecode(file.read(64).rstrip(b"\n"))
                if comm in names:
                    if self._lives(entry):
                        found.add(comm)
                elif comm.startswith(_INTERPRETERS) or any(name.startswith(comm) for name in names):
                    found |= names & self._words(entry)
            except OSError:  # it has ended
                continue
        return frozenset(found)

    def _lives(self, entry: str) -> bool:
        """Say whether a process has not ended: one whose end nobody has asked for keeps its name (Z, X)."""
        with open(f"{self._proc}/{entry}/stat", "rb") as file:
            return file.read(512).rpartition(b") ")[2][:1] not in (b"Z", b"X")

    def _words(self, entry: str) -> set[str]:
        """Return what a process may be called by its command line, without directories and `.exe`."""
        with open(f"{self._proc}/{entry}/cmdline", "rb") as file:
            words = file.read(4_096).split(b"\0")[:WORDS_MAX]
        names = {os.fsdecode(word).replace("\\", "/").rpartition("/")[2] for word in words}
        return names | {name.removesuffix(".exe") for name in names}


class Watch:
    """A thread that tells the loop what the machine does, as often as the conditions of the settings need it."""

    def __init__(self, conditions: Sequence[Condition], post: Callable[[Pressed], None], clock: Clock) -> None:
        self._conditions = tuple(conditions)
        self._post = post
        self._clock = clock
        self._instrument = Instrument()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: tuple[object, ...] = ()
        self._begin()

    def use(self, conditions: Sequence[Condition]) -> None:
        """Take other conditions."""
        self._conditions = tuple(conditions)
        self._begin()

    def _begin(self) -> None:
        if self._conditions and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="instrument", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        """Read once, and tell it; of programs alone only what is new.

        A load that stays the same is told each time: that it has been low for a while is what ends a pause.
        """
        conditions = self._conditions
        kinds = {condition.kind for condition in conditions}
        names = frozenset(str(one.value) for one in conditions if one.kind == "process")
        at = self._clock.monotonic()
        cpu = self._instrument.cpu() if "cpu_above" in kinds else None
        io = self._instrument.pressure("io") if "io_pressure_above" in kinds else None
        seen = (cpu, io, tuple(sorted(self._instrument.running(names))))
        if kinds != {"process"} or self._last != (conditions, seen):  # of new conditions nothing was told yet
            self._last = conditions, seen
            self._post(Pressed(*seen, at))

    def stop(self) -> None:
        self._end.set()
