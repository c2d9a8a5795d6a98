"""Measure the daemon beside others and against the raw limit, in one run: a table and a picture of all targets.

    make bench-quick            some minutes: smaller, one round
    make bench                  up to a million files, several rounds
    .venv/bin/python benchmarks/targets.py --only 1 --only 10 --repeat 5

Who is compared is measured in the same round, in random order; a ratio is that
of one round. Told are the median, and in brackets the least and the most. The
report goes to build/bench; `--publish` puts it into the documents. With `--only`
the rows of the other targets stay as they were measured last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import copies
import intake
import resting
import rows
import trees
from measure import file_system, place, say
from report import Plan, Row, picture, plain, row_of, table
from writer import Writer

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS: list[tuple[tuple[int, ...], Callable[[Plan], list[Row]]]] = [
    ((1,), intake.steady),
    ((2, 4), intake.burst),
    ((3,), intake.latency),
    ((5, 6), trees.sweeps),
    ((7, 12), resting.resting),
    ((8,), rows.durable),
    ((9,), rows.start),
    ((10,), copies.large),
    ((11,), copies.small),
    ((13,), resting.growth),
    ((14,), rows.matching),
]


def version(command: list[str]) -> str:
    """Return the first line a program says of its version."""
    if not shutil.which(command[0]):
        return f"no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout or done.stderr).strip().splitlines()
    return f"{command[0]} {said[0].removeprefix(command[0]).strip() if said else '?'}"


def heading(plan: Plan) -> str:
    programs = [["inotifywait", "--help"], ["watchman", "--version"], ["rsync", "--version"], ["rclone", "version"]]
    return "\n".join([
        "# Benchmarks", "",
        "What the daemon costs and how fast it is, beside others and beside the least that the machine could do: "
        "`make bench`. Who is compared is measured in the same round, in random order, and a ratio is that of one "
        "round; each target was measured by itself, on another minute of the machine. Told are the median and, in "
        "brackets, the least and the most. Absolute figures are of one machine; read the ratios.", "",
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}; watched files on {file_system(plan.arena)}, journals, swept trees and copies on "
        f"{file_system(plan.disk)}; {plan.writer.kind} writer; {'; '.join(version(program) for program in programs)}. "
        "Load is that of the machine in the five minutes before the row was made, the benchmark's own included: far "
        "above the number of cores, only ratios and CPU times say anything.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [number for part, _ in PARTS for number in part]
    parser.add_argument("--only", type=int, choices=sorted(numbers), action="append", help="only this target")
    parser.add_argument("--repeat", type=int, help="rounds (3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="smaller, one round")
    parser.add_argument("--arena", type=Path, default=Path("/dev/shm"), help="where watched files lie (/dev/shm)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where journals and copies lie (/var/tmp)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "bench")
    parser.add_argument("--publish", action="store_true", help="write docs/reference/benchmarks.md and its picture too")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a start is one with compiled modules, as installed ones are
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where rclone is put
    figures = given.output / "figures.json"
    found: list[Row] = []
    if given.only and figures.exists():
        found = [row for told in json.loads(figures.read_text()) if (row := row_of(told)).target not in given.only]
    with place(given.disk) as build:
        repeat = given.repeat or (1 if given.quick else 3)
        plan = Plan(given.arena, given.disk, build, Writer(build), repeat, given.quick)
        for targets, measure in PARTS:
            if given.only and not set(targets) & set(given.only):
                continue
            began = time.monotonic()
            part = [replace(row, load=os.getloadavg()[1]) for row in measure(plan)]
            again = {row.target for row in part}
            found = [row for row in found if row.target not in again] + part
            print(table(part), flush=True)
            say(f"target {', '.join(map(str, targets))} took {time.monotonic() - began:.0f} s")
        found.sort(key=lambda row: row.target)
        head = heading(plan)
    write(given.output / "report.md", head, found, "targets.svg")
    (given.output / "targets.svg").write_text(picture(found))
    figures.write_text(json.dumps([plain(row) for row in found], indent=1))
    say(f"written to {given.output}")
    if given.publish:
        write(REPOSITORY / "docs" / "reference" / "benchmarks.md", head, found, "../images/benchmarks.svg")
        (REPOSITORY / "docs" / "images" / "benchmarks.svg").write_text(picture(found))


def write(path: Path, head: str, found: list[Row], image: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = f"![Each figure divided by its target; left of the line it is reached]({image})"
    path.write_text("\n".join([head, words, "", table(found)]))


if __name__ == "__main__":
    main()
