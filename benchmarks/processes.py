"""CPU time, memory and reading of a process and all that it started."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[int, int] | None:
    """Return parent and CPU ticks (with reaped children), None if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(int(ticks) for ticks in fields[11:15])


def _family(pids: tuple[int, ...]) -> dict[int, int]:
    """Return the CPU ticks of each of these processes and their live descendants."""
    found = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := _stat(int(entry)))}
    family, grown = set(pids), True
    while grown:
        young = {pid for pid, (parent, _) in found.items() if parent in family} - family
        family |= young
        grown = bool(young)
    return {pid: found[pid][1] for pid in family if pid in found}


def cpu_s(*pids: int) -> float:
    """Return user and system seconds of these processes, their live descendants and their reaped children."""
    return sum(_family(pids).values()) / TICKS_PER_S


def read_bytes(pid: int) -> int:
    """Return what the main threads of a process's live descendants have read: of a copy, the sources alone."""
    total = 0
    for child in _family((pid,)).keys() - {pid}:
        try:
            lines = Path(f"/proc/{child}/task/{child}/io").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += int(lines[0].removeprefix("rchar: "))
    return total


def rss_bytes(pid: int) -> int:
    """Return the resident memory of one process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def wakeups(pid: int) -> int:
    """Return how often the threads of a process and of all that it started have given up a core of their own accord."""
    total = 0
    for member in _family((pid,)):
        for status in Path(f"/proc/{member}/task").glob("*/status"):
            try:
                lines = status.read_text().splitlines()
            except OSError:  # it has ended
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


def family_rss_bytes(pid: int) -> int:
    """Return the resident memory of a process and all that it started."""
    return sum(rss_bytes(member) for member in _family((pid,)))
