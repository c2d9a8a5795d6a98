"""What does the daemon cost an instrument on the same disk? A writer at full speed, with and without it beside.

    python benchmarks/beside.py            some twenty minutes, up to 20 GB of the disk
    python benchmarks/beside.py --quick    some four minutes: one round, shorter, movies of 67 MB
    python benchmarks/beside.py --json     a JSON object with every single figure instead of the tables

The writer (movies.py) writes movies of 302 MB, once through the page cache and
once past it. Beside it stands nobody; the daemon, whose rule is paused, so that
it only watches; the daemon that copies each movie to another directory of the
same disk, verified, without a limit, with one, and standing still while the
writer runs; and, to compare, `cp` and rsync that make each movie's copy durable.

Disks vary, virtual ones by a factor, so each case stands between two runs of the
writer alone, and is divided by their mean. The order in a round is drawn anew.
"alone" tells the noise: it is divided by the runs alone before and after it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import file_system, number, place, say
from movies import FRAME_BYTES
from processes import cpu_s, read_bytes

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the daemon is the installed one
from tests.site import Site

MOVIES = Path(__file__).with_name("movies.py")
QUIET = "500ms"
GB = 10**9
SPACE_BYTES = 25 * GB
BYTES_MAX = 10 * GB  # of one run of the writer; its copies take as much once more
SHARE = 0.05  # of the writer's speed alone, for the limit on copies
ALONE = "alone"
DAEMON = ("watches", "copies", "copies, limited", "copies, stands still")
PEERS = {
    "cp + fsync": ["sh", "-c", 'cp "$0" "$1" && sync "$1"'],
    "rsync --fsync": ["rsync", "-a", "--whole-file", "--fsync"],
}
CASES = (*DAEMON, *PEERS)
Figures = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """How much is done, and where."""

    work: Path
    way: str  # cached | direct
    frames: int
    warm_s: float
    last_s: float


class Peer(threading.Thread):
    """Copies each finished movie by a command, one after the other."""

    def __init__(self, command: list[str], data: Path, out: Path) -> None:
        super().__init__()
        self.command, self.data, self.out = command, data, out
        self.names: list[str] = []
        self.copied = 0
        self.cpu_s = 0.0
        self.fault = ""
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            if self.copied == len(self.names):
                continue
            name = self.names[self.copied]
            before = os.times()
            command = [*self.command, str(self.data / name), str(self.out / name)]
            child = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
            while child.poll() is None and not self.ended.wait(0.01):
                pass
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)  # rsync is three processes
                child.wait()
                return
            if child.returncode:
                self.fault = f"{' '.join(command)} ended with {child.returncode}"
                return
            after = os.times()
            self.cpu_s += sum(after[2:4]) - sum(before[2:4])
            self.copied += 1

    def stop(self) -> None:
        self.ended.set()
        self.join()


def write(plan: Plan, site: Site, names: list[str]) -> dict[str, Any]:
    """Let the writer write; `names` gets each finished movie's. Returns what it tells."""
    command = [str(MOVIES), str(site.data), *map(str, (plan.frames, plan.warm_s, plan.last_s, BYTES_MAX)), plan.way]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        told = ""
        try:
            for told in writer.stdout:
                if told.endswith(".mrc\n"):
                    names.append(told.rstrip("\n"))
        except BaseException:
            writer.kill()
            raise
    if writer.returncode:
        raise SystemExit(f"the writer ended with {writer.returncode}")
    return dict(json.loads(told))


def once(plan: Plan, case: str, limit: float) -> Figures:
    """Let the writer write beside one case; what it managed, and what was done beside it."""
    with place(plan.work) as base:
        site = Site(base, quiescence=QUIET)
        del site.settings["sweep"], site.settings["events"]  # the defaults
        peer = Peer(PEERS[case], site.data, site.out) if case in PEERS else None
        found: Figures = {}
        cpu_before_s = 0.0
        try:
            if case in DAEMON:
                cpu_before_s = begin(site, case, limit)
            if peer:
                peer.start()
            told = write(plan, site, peer.names if peer else [])
            movie_gb = plan.frames * FRAME_BYTES / GB
            cpu, copied_gb = 0.0, 0.0
            if site.process:
                cpu = cpu_s(site.process.pid) - cpu_before_s
                copied_gb = read_bytes(site.process.pid) / GB
                found = {"cpu_ms_per_movie": cpu * 1_000 / told["movies"]}
            elif peer:
                if peer.fault:
                    raise SystemExit(peer.fault)
                cpu, copied_gb = peer.cpu_s, peer.copied * movie_gb
            if copied_gb > movie_gb / 2:  # less is what a lane reads of itself
                found |= {"copied": copied_gb / (told["movies"] * movie_gb), "cpu_s_per_gb": cpu / copied_gb}
        finally:
            if peer and peer.is_alive():
                peer.stop()
            if site.process:
                site.stop()
    os.sync()  # what a case leaves to be written is not the next one's burden
    return {
        "mb_per_s": told["bytes"] / told["s"] / 1e6,
        **{f"{what}_{name}_ms": of(told[what]) * 1_000
           for what in ("write", "sync") for name, of in (("median", statistics.median), ("worst", max))},
        **found,
    }  # fmt: skip


def begin(site: Site, case: str, limit: float) -> float:
    """Start the daemon for a case; return its CPU seconds when it watches."""
    site.write_rules(site.rule(complete={"quiescence": QUIET, "checks": ["mrc"]}))
    if case == "copies, limited":
        site.settings["throttle"] = {"bandwidth": f"{limit:.0f}B/s"}
    elif case == "copies, stands still":
        site.settings["throttle"] = {"while": [{"process": MOVIES.name}]}
    site.start()
    if case == "watches":
        site.cli("rules", "pause", "first")
    assert site.process
    return cpu_s(site.process.pid)


def rounds(plan: Plan, count: int, cases: list[str]) -> dict[str, Any]:
    """Measure all cases in each round, each between two runs alone; what each had, and each ratio."""
    say(f"{plan.way}: the writer alone, not counted")
    alone = [once(plan, ALONE, 0.0) for _ in range(2)]
    limit = SHARE * statistics.mean(had["mb_per_s"] for had in alone) * 1e6
    figures: dict[str, list[Figures]] = {ALONE: [once(plan, ALONE, 0.0)], **{case: [] for case in cases}}
    ratios: dict[str, list[Figures]] = {ALONE: [], **{case: [] for case in cases}}
    for number_of_round in range(count):
        for case in random.sample(cases, len(cases)):
            say(f"{plan.way}, round {number_of_round + 1} of {count}: {case}")
            had = once(plan, case, limit)
            figures[case].append(had)
            figures[ALONE].append(once(plan, ALONE, 0.0))
            ratios[case].append(divided(had, *figures[ALONE][-2:]))
    for before, had, after in zip(figures[ALONE], figures[ALONE][1:], figures[ALONE][2:], strict=False):
        ratios[ALONE].append(divided(had, before, after))
    return {"limit_mb_per_s": limit / 1e6, "figures": figures, "ratios": ratios}


def divided(had: Figures, before: Figures, after: Figures) -> Figures:
    return {name: had[name] / ((before[name] + after[name]) / 2) for name in before}


def median(rows: list[Figures], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


def spread(rows: list[Figures], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def report(way: str, told: dict[str, Any]) -> None:
    """Print one table."""
    words = {"cached": "through the page cache", "direct": "past the page cache"}[way]
    print(f"\n### The writer writes {words}\n\nThe limit is {told['limit_mb_per_s']:.0f} MB/s.\n")
    head = ["beside it", "MB/s", "× alone (least–most)", "write median ms", "×", "worst ms", "×", "sync median ms", "×",
            "worst ms", "×", "copied meanwhile", "CPU s/GB", "CPU ms/movie"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for case, rows in told["figures"].items():
        ratios = told["ratios"][case]
        cells = [case, number(median(rows, "mb_per_s"), 0), spread(ratios, "mb_per_s")]
        for name in ("write_median_ms", "write_worst_ms", "sync_median_ms", "sync_worst_ms"):
            cells += [number(median(rows, name), 1), number(median(ratios, name))]
        copied = median(rows, "copied")
        cells += ["–" if copied is None else f"{copied:.0%}", number(median(rows, "cpu_s_per_gb")),
                  number(median(rows, "cpu_ms_per_movie"), 1)]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, help="(3; quick: 1)")
    parser.add_argument("--seconds", type=float, help="that the writer is measured for each time (6; quick: 3)")
    parser.add_argument("--frames", type=int, help="of 16 MiB, in a movie (18; quick: 4)")
    parser.add_argument("--way", choices=["cached", "direct"], action="append", help="of the writer (both)")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one (may be given several times)")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="a directory on a real disk (/var/tmp)")
    given = parser.parse_args()
    cases = given.case or [case for case in CASES if case not in PEERS or shutil.which(PEERS[case][0])]

    if file_system(given.work) in ("tmpfs", "ramfs"):
        parser.error(f"{given.work} is in memory; say --work with a directory on a disk")
    if shutil.disk_usage(given.work).free < SPACE_BYTES:
        parser.error(f"{given.work} has less than {SPACE_BYTES / GB:g} GB free")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is removed
    told: dict[str, Any] = {
        "cores": os.cpu_count(), "kernel": platform.release(), "disk": file_system(given.work),
        "load": os.getloadavg()[0], "rounds": given.rounds or (1 if given.quick else 3),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="td-bench-beside-", dir=given.work) as work:
        for way in given.way or ["cached", "direct"]:
            plan = Plan(
                Path(work), way, given.frames or (4 if given.quick else 18), 1.5 if given.quick else 3.0,
                given.seconds or (3.0 if given.quick else 6.0),
            )  # fmt: skip
            told[way] = rounds(plan, told["rounds"], cases)
    if given.json:
        print(json.dumps(told, indent=1))
        return
    print(f"{told['cores']} cores, kernel {told['kernel']}, {told['disk']}; load at the start {told['load']:.1f}; "
          f"medians of {told['rounds']} round{'s' if told['rounds'] > 1 else ''}")  # fmt: skip
    for way in ("cached", "direct"):
        if way in told:
            report(way, told[way])


if __name__ == "__main__":
    main()
