"""Targets 5 and 6: sweeps of a tree, warm cache, beside find, watchdog's snapshot, and a C program."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from measure import Figures, NotMeasured, place, rounds, say
from report import Plan, Row, compared
from writer import compiled

US = "trigger-daemon"
HERE = Path(__file__).resolve().parent
FIND, SNAPSHOT, FSTATAT = "find -printf", "watchdog's snapshot", "C fstatat"
TIMEOUT_S = 600
_SNAPSHOT = """
import sys, time
from watchdog.utils.dirsnapshot import DirectorySnapshot
start, cpu = time.monotonic(), time.process_time()
DirectorySnapshot(sys.argv[1])
print(time.monotonic() - start, time.process_time() - cpu)
"""


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        raise NotMeasured((done.stderr.strip().splitlines() or ["no reason given"])[-1][-300:])
    return done.stdout


def find(root: Path) -> Figures:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with root.with_suffix(".found").open("wb") as lines:
        command = ["find", str(root), "-type", "f", "-printf", r"%s %T@ %C@ %i %p\n"]
        subprocess.run(command, check=True, stdout=lines)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return everywhere(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def everywhere(seconds: float, cpu: float) -> Figures:
    """Others do the same at each sweep, whatever was known before."""
    kinds = ("first", "joined", "again", "changed")
    return {**{f"{kind}_s": seconds for kind in kinds}, **{f"{kind}_cpu_s": cpu for kind in kinds}}


def said(command: list[str]) -> Figures:
    """Take seconds, and CPU seconds, from what a program prints first."""
    seconds, cpu = output(command).split()[:2]
    return everywhere(float(seconds), float(cpu))


def swept(plan: Plan, root: Path) -> Figures:
    with place(plan.disk) as state:
        told = output([sys.executable, str(HERE / "sweeping.py"), str(root), str(state)])
    answer: dict[str, float] = json.loads(told)
    if answer["again"] or answer["changed"] != answer["expected"]:
        raise NotMeasured(f"the sweeps told of {answer}")
    return answer


def measured(plan: Plan, files: int, repeat: int) -> list[Row]:
    with place(plan.disk) as work:
        root = work / "root"
        root.mkdir()
        plan.writer.prepare(root)
        say(f"writing {files:,} files to sweep")
        plan.writer.write(root, files=files, per_second=0, size_bytes=0)
        c = compiled("sweep", plan.build)
        found = rounds(
            repeat,
            {
                FIND: partial(find, root),
                SNAPSHOT: partial(said, [sys.executable, "-c", _SNAPSHOT, str(root)]),
                FSTATAT: partial(said, [str(c), str(root)]),
                US: partial(swept, plan, root),
            },
            f"sweep of {files:,}",
        )
    words = f"of {files:,} files"

    def row(target: int, what: str, figure: str, against: str, bound: float | None = None) -> Row:
        return compared(
            target, f"{what} {words}", found, figure, ours=US, against=against, bound=bound, unit="s", raw=FSTATAT
        )

    return [
        row(5, "first sweep", "first_s", FIND, 1.3),
        row(5, "first sweep", "first_s", SNAPSHOT, 0.4),
        row(5, "CPU of the first sweep", "first_cpu_s", FIND),
        row(5, "CPU of the first sweep", "first_cpu_s", SNAPSHOT),
        Row(6, f"sweep by directories' times {words}, nothing changed", [1e3 * s for s in found.values(US, "names_s")],
            "ms", bound=20),
        row(6, "full sweep, nothing changed,", "again_s", FIND, 1.3),
        row(6, "CPU of a full sweep, nothing changed,", "again_cpu_s", FIND),
        row(6, "full sweep, 1 % changed,", "changed_s", FIND),
        row(6, "full sweep that joins all claims", "joined_s", FIND),
    ]  # fmt: skip


def sweeps(plan: Plan) -> list[Row]:
    """Return the rows of targets 5 and 6."""
    if plan.quick:
        return measured(plan, 50_000, plan.repeat)
    return [*measured(plan, 100_000, plan.repeat), *measured(plan, 1_000_000, min(plan.repeat, 3))]
