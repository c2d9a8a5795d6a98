"""Targets 10 and 11: verified copies beside programs that copy. The daemon is a process; its time is the journal's.

The daemon's lanes give way to everybody (nice 10, idle I/O), so the others run
at the same priority: on a machine that does something else besides, the one who
gives way would be compared with those who do not.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from consumers import Daemon
from measure import Figures, NotMeasured, place, rounds
from report import Plan, Row, compared

US = "trigger-daemon"
CP, RSYNC, CHECKED, RCLONE = "cp + fsync", "rsync -a --fsync", "rsync, then a checksum pass", "rclone + sync"
PATIENCE_S = 300.0
HUMBLE = ["nice", "-n", "10", *(["ionice", "-c", "3"] if shutil.which("ionice") else [])]
Commands = list[list[str]]
BARE = "bare loop that reads back"
# The least a verified copy must do: write past the page cache, make it durable, read it from the disk, compare.
_BARE = """
import mmap, os, sys, xxhash
source, target = sys.argv[1:]
size, piece = os.path.getsize(source), 1 << 20
buffer = memoryview(mmap.mmap(-1, piece))
reads, digests = os.open(source, os.O_RDONLY), []
writes = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
for at in range(0, size, piece):
    os.preadv(reads, [buffer], at)
    digests.append(xxhash.xxh3_128_digest(buffer))
    os.pwrite(writes, buffer, at)
os.fsync(writes)
back = os.open(target, os.O_RDONLY | os.O_DIRECT)
for at in range(0, size, piece):
    os.preadv(back, [buffer], at)
    if xxhash.xxh3_128_digest(buffer) != digests[at // piece]:
        sys.exit("it differs")
"""


def commands(who: str, source: Path, target: Path) -> Commands:
    whole = source.is_dir()
    sync = ["sync", *(["-f"] if whole else []), str(target / source.name)]  # one syncfs, not an fsync a file
    rsync = ["rsync", "-a", "--fsync", str(source), str(target)]
    match who:
        case "cp + fsync":
            return [["cp", *(["-r"] if whole else []), str(source), str(target)], sync]
        case "rsync -a --fsync":
            return [rsync]
        case "bare loop that reads back":
            return [[sys.executable, "-c", _BARE, str(source), str(target / source.name)]]
        case "rsync, then a checksum pass":
            return [rsync, ["rsync", "-a", "--checksum", str(source), str(target)]]
        case _:
            # It hashes both sides of each file after copying it; it makes nothing durable by itself.
            there = target / source.name if whole else target
            given = ["--transfers", "16", "--checkers", "16"] if whole else []
            return [["rclone", "copy", "--checksum", *given, str(source), str(there)], sync]


def by_program(who: str, source: Path) -> Figures:
    with place(source.parent) as target:
        todo = commands(who, source, target)
        for command in todo:
            if not shutil.which(command[0]):
                raise NotMeasured(f"{command[0]} is not installed")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        for command in todo:
            done = subprocess.run(
                [*HUMBLE, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, text=True
            )
            if done.returncode:
                raise NotMeasured(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        elapsed_s = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"s": elapsed_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def by_daemon(plan: Plan, source: Path, files: int) -> Figures:
    """Move the source into a watched directory; the time is that from STARTING to VERIFIED in the journal."""
    with place(source.parent) as work, place(source.parent) as target, place(plan.disk) as state:
        root = work / "root"
        root.mkdir()
        rule = {
            "complete": {"quiescence": "500ms"}, "batch": {"files": files, "idle": "10s"},
            "start": {"copy": {"to": str(target)}},
        }  # fmt: skip
        who = Daemon(work, state, rule)
        seen = root / source.name
        try:
            who.start(root)
            cpu_before_s = who.cpu_s()
            source.rename(seen)
            states: dict[str, float] = {}
            deadline = time.monotonic() + PATIENCE_S
            while "VERIFIED" not in states:
                if time.monotonic() > deadline or "HELD" in states:
                    raise NotMeasured(f"the run was not verified: {who.ask('SELECT state, error FROM run')}")
                time.sleep(0.1)
                states = dict(who.ask("SELECT to_state, min(time) FROM transition GROUP BY to_state"))
            if (runs := int(who.ask("SELECT count(*) FROM run")[0][0])) != 1:
                raise NotMeasured(f"the files were split into {runs} batches")
            return {"s": states["VERIFIED"] - states["STARTING"], "cpu_s": who.cpu_s() - cpu_before_s}
        finally:
            who.stop()
            if seen.exists():
                seen.rename(source)


def beside(
    plan: Plan, source: Path, files: int, about: str, bounds: dict[str, float | None], target: int, *, raw: str = CP
) -> list[Row]:
    def settled(measure: Callable[[], Figures]) -> Figures:
        os.sync()  # what one leaves to be written is not the next one's burden
        return measure()

    who = {
        name: partial(settled, partial(by_program, name, source)) for name in bounds
    } | {US: partial(settled, partial(by_daemon, plan, source, files))}  # fmt: skip
    found = rounds(plan.repeat, who, about)
    return [
        *[compared(target, f"verified copy of {about}", found, "s", ours=US, against=name, bound=bound, unit="s",
                   raw=raw) for name, bound in bounds.items()],
        compared(target, f"CPU of a verified copy, {about}", found, "cpu_s", ours=US, against=CP, unit="s"),
    ]  # fmt: skip


def large(plan: Plan) -> list[Row]:
    """Return the rows of target 10."""
    size_bytes = plan.size(2 << 30, 256 << 20)
    rows = []
    for where, parent in (("disk", plan.disk), ("memory", plan.arena)):
        aimed = where == "disk"
        with place(parent) as work:
            source = work / "movie.tif"
            with source.open("wb") as output:
                for _ in range(size_bytes >> 20):
                    output.write(os.urandom(1 << 20))
            bounds: dict[str, float | None] = {
                CP: 2.2 if aimed else None, RSYNC: 0.8 if aimed else None, CHECKED: 0.5 if aimed else None, RCLONE: None
            }  # fmt: skip
            about = f"{size_bytes / (1 << 30):g} GiB, {where}"
            if aimed:
                bounds[BARE] = None
            rows += beside(plan, source, 1, about, bounds, 10, raw=BARE if aimed else CP)
    return rows


def small(plan: Plan) -> list[Row]:
    """Return the rows of target 11."""
    rows = _small(plan, plan.size(5_000, 1_000), 256 << 10, {CP: 1.3, RSYNC: 0.65, RCLONE: None})
    if not plan.quick:  # rsync would sync 20,000 times
        rows += _small(replace(plan, repeat=1), 20_000, 64 << 10, {CP: None, RCLONE: None})
    return rows


def _small(plan: Plan, files: int, size_bytes: int, bounds: dict[str, float | None]) -> list[Row]:
    with place(plan.disk) as work:
        source = work / "frames"
        source.mkdir()
        plan.writer.prepare(source)
        plan.writer.write(source, files=files, per_second=0, size_bytes=size_bytes)
        return beside(plan, source, files, f"{files:,} × {size_bytes >> 10} KiB, disk", bounds, 11)
