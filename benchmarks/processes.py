"""CPU time of a process and all that it started."""

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


def cpu_s(*pids: int) -> float:
    """Return user and system seconds of these processes, their live descendants and their reaped children."""
    found = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := _stat(int(entry)))}
    family, grown = set(pids), True
    while grown:
        young = {pid for pid, (parent, _) in found.items() if parent in family} - family
        family |= young
        grown = bool(young)
    return sum(found[pid][1] for pid in family if pid in found) / TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Return the resident memory of one process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
