"""Compare the daemon with inotifywait, watchman, find, cp and rsync, side by side in one run.

    make bench-quick            a few minutes
    make bench                  more rates, more files
    .venv/bin/python benchmarks/quick.py --only copy --repeat 1

Every number is a median over the rounds, and the order within a round is drawn
anew. Machines differ and virtual ones are noisy: read the ratios. What could
not be measured says why. The table goes to stdout and to benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consumers import Consumer, Daemon, Inotifywait, NotMeasured, Watchman
from writer import Writer

HERE = Path(__file__).resolve().parent
COMMAND = {"command": {"run": ["/bin/true"]}}
EMPTY = "–"


@dataclass
class Bench:
    """Where to work, and how much.

    `arena` holds the watched files (tmpfs), `disk` the daemon's journal: a
    journal in memory would cost nothing to fsync.
    """

    arena: Path
    disk: Path
    repeat: int
    full: bool
    daemon: bool
    files: int
    copy_bytes: int
    report: list[str] = field(default_factory=list)

    def table(self, title: str, words: str, head: list[str], rows: list[list[str]]) -> None:
        lines = [f"### {title}", "", words, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        text = "\n".join([*lines, ""])
        print(text, flush=True)
        self.report.append(text)


def say(words: str) -> None:
    print(f"... {words}", file=sys.stderr, flush=True)


@contextmanager
def place(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="td-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def number(value: float | None, digits: int = 2) -> str:
    return EMPTY if value is None else f"{value:,.{digits}f}"


def ratio(value: float | None, base: float | None) -> str:
    return EMPTY if value is None or not base else f"{value / base:.2f}"


def quantile_ms(seconds: list[float], part: float) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000


class Gathered:
    """Measurements by who and what; medians on request, and the reason where there are none."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[float]] = {}
        self.failed: dict[str, str] = {}

    def add(self, who: str, **values: float) -> None:
        for what, value in values.items():
            self.values.setdefault((who, what), []).append(value)

    def median(self, who: str, what: str) -> float | None:
        values = self.values.get((who, what))
        return statistics.median(values) if values else None

    def worst(self, who: str, what: str) -> float | None:
        values = self.values.get((who, what))
        return max(values) if values else None

    def note(self, who: str) -> str:
        return self.failed.get(who, "")


def rounds(bench: Bench, names: list[str], measure: Callable[[str], dict[str, float]]) -> Gathered:
    """Measure everybody once a round, in random order; who cannot be measured is not asked again."""
    gathered = Gathered()
    for round_number in range(bench.repeat):
        order = [name for name in names if name not in gathered.failed]
        random.shuffle(order)
        for name in order:
            say(f"round {round_number + 1} of {bench.repeat}: {name}")
            try:
                gathered.add(name, **measure(name))
            except NotMeasured as why:
                gathered.failed[name] = f"not measured: {why}".replace("|", "/")
                say(gathered.failed[name])
    return gathered


# ------------------------------------------------------------------ intake and burst


def watchers(bench: Bench) -> list[str]:
    names = ["nobody", "inotifywait", "watchman"]
    return [*names, "trigger-daemon"] if bench.daemon else names


def consumer(name: str, work: Path, state: Path, rule: dict[str, Any], settings: dict[str, Any]) -> Consumer:
    match name:
        case "inotifywait":
            return Inotifywait(work)
        case "watchman":
            return Watchman(work)
        case "trigger-daemon":
            return Daemon(work, state, rule, settings)
    return Consumer(work)


def intake_once(
    bench: Bench, writer: Writer, name: str, *, files: int, per_second: float, batch: dict[str, Any]
) -> dict[str, float]:
    """Let one consumer watch while the writer writes; what it saw, what it cost, when it was through."""
    rule = {"complete": {"quiescence": "1s"}, "batch": batch, "start": COMMAND, "proof": "none"}
    with place(bench.arena) as work, place(bench.disk) as state:
        root = work / "root"
        root.mkdir()
        writer.prepare(root)
        who = consumer(name, work, state, rule, {})
        try:
            who.start(root)
            cpu_before_s = who.cpu_s()
            started = time.monotonic()
            written = writer.write(root, files=files, per_second=per_second)
            ended = written.closed_ns[-1] / 1e9
            drained = max(who.drain(files), ended)
            cpu_s = who.cpu_s() - cpu_before_s
            lost = files - who.seen() if name != "nobody" else 0
            return {
                "lost": lost,
                "cpu_us": cpu_s / files * 1e6,
                "rate": files / written.elapsed_s,
                "drain_s": drained - ended,
                "through": files / (drained - started),
                "rss_mb": who.rss_bytes() / 1e6,
            }
        finally:
            who.stop()


def intake(bench: Bench, writer: Writer) -> None:
    rates = [1_000, 5_000, 10_000, 20_000] if bench.full else [10_000]
    for rate in rates:
        files = rate * 10
        batch = {"files": files, "idle": "2s"}

        def measure(name: str, files: int = files, rate: int = rate, batch: Any = batch) -> dict[str, float]:
            return intake_once(bench, writer, name, files=files, per_second=rate, batch=batch)

        found = rounds(bench, watchers(bench), measure)
        base, other = found.median("inotifywait", "cpu_us"), found.median("watchman", "cpu_us")
        rows = []
        for name in watchers(bench):
            cpu = found.median(name, "cpu_us") if name != "nobody" else None
            lost = found.worst(name, "lost") if name != "nobody" else None
            rows.append([
                name, number(lost, 0), number(cpu, 1), ratio(cpu, base), ratio(cpu, other),
                number(found.median(name, "rate"), 0), number(found.median(name, "rss_mb"), 0), found.note(name),
            ])
        bench.table(
            f"Intake: {rate:,} files/s for 10 s into {writer.directories} directories",
            f"{files:,} files of 4 KiB, closed once. The daemon waits for 1 s of quiet, looks twice, closes a batch "
            "and journals every claim on disk; inotifywait prints a line an event, watchman a list of names. "
            "Lost is the worst round.",
            ["who", "lost", "CPU µs/file", "× inotifywait", "× watchman", "writer's files/s", "memory MB", ""],
            rows,
        )


def burst(bench: Bench, writer: Writer) -> None:
    files = bench.files
    batch = {"files": 1000, "idle": "1s"}
    found = rounds(
        bench, watchers(bench),
        lambda name: intake_once(bench, writer, name, files=files, per_second=0, batch=batch),
    )
    base, alone = found.median("inotifywait", "through"), found.median("nobody", "rate")
    rows = []
    for name in watchers(bench):
        watched = name != "nobody"
        through = found.median(name, "through") if watched else None
        rows.append([
            name, number(found.worst(name, "lost") if watched else None, 0),
            number(found.median(name, "drain_s") if watched else None), number(through, 0), ratio(through, base),
            number(found.median(name, "rate"), 0), ratio(found.median(name, "rate"), alone),
            number(found.median(name, "cpu_us") if watched else None, 1), found.note(name),
        ])
    bench.table(
        f"Burst: {files:,} files at the writer's full speed",
        "Drained: from the last close to the last progress; for the daemon that includes 1 s of quiet, and up to 1 s "
        "until the last, smaller batch closes.",
        ["who", "lost", "drained after s", "files/s through", "× inotifywait", "writer's files/s", "× writer alone",
         "CPU µs/file", ""],
        rows,
    )


# ------------------------------------------------------------------------- latency


def latency_once(bench: Bench, writer: Writer, *, per_second: int, trust: bool) -> dict[str, float]:
    quiescence_s = 1.0
    files = per_second * 5
    with place(bench.arena) as work, place(bench.disk) as state:
        root, log = work / "root", work / "started"
        root.mkdir()
        writer.prepare(root)
        complete = {"quiescence": f"{quiescence_s:g}s", "trust": ["close"] if trust else []}
        rule = {"complete": complete, "start": {"bench_note": {"log": str(log)}}}
        who = Daemon(work, state, rule, {"throttle": {"runs": 1_000}})
        try:
            who.start(root)
            written = writer.write(root, files=files, per_second=per_second)
            who.drain(files)
            expected = time.monotonic() + 10
            while (lines := log.read_text().splitlines() if log.exists() else []) != [] or time.monotonic() < expected:
                if len(lines) >= files or time.monotonic() > expected:
                    break
                time.sleep(0.1)
        finally:
            who.stop()
    waited_s = []
    for line in lines:
        instant_ns, _, path = line.partition(" ")
        index = int(path.rpartition("/f")[2].removesuffix(".tif"))
        since_close_s = (int(instant_ns) - written.closed_ns[index]) / 1e9
        waited_s.append(since_close_s - (0 if trust else quiescence_s))
    if not waited_s:
        raise NotMeasured("no action was started")
    return {
        "p50_ms": quantile_ms(waited_s, 0.5), "p99_ms": quantile_ms(waited_s, 0.99),
        "early": sum(1 for seconds in waited_s if seconds < 0), "missing": files - len(waited_s),
    }


def latency(bench: Bench, writer: Writer) -> None:
    if not bench.daemon:
        return
    names = {
        f"{rate:,} files/s, {'trust: [close]' if trust else 'quiescence 1 s'}": (rate, trust)
        for rate in ([100, 1_000, 5_000] if bench.full else [100, 1_000])
        for trust in (True, False)
    }
    found = rounds(
        bench, list(names), lambda name: latency_once(bench, writer, per_second=names[name][0], trust=names[name][1])
    )
    bench.table(
        "Latency: from close to the action's start, beyond the quiet period",
        "One file a batch, one journal commit and one run each; the action only notes the instant.",
        ["case", "p50 ms", "p99 ms", "started early", "not started", ""],
        [
            [name, number(found.median(name, "p50_ms"), 1), number(found.median(name, "p99_ms"), 1),
             number(found.worst(name, "early"), 0), number(found.worst(name, "missing"), 0), found.note(name)]
            for name in names
        ],
    )


# --------------------------------------------------------------------------- sweep


def sweep(bench: Bench, writer: Writer) -> None:
    files = 1_000_000 if bench.full else bench.files
    with place(bench.arena) as work:
        root = work / "root"
        root.mkdir()
        writer.prepare(root)
        say(f"writing {files:,} files to sweep")
        writer.write(root, files=files, per_second=0, size_bytes=1)

        def measure(name: str) -> dict[str, float]:
            if name == "find -printf":
                started = time.monotonic()
                with (work / "found").open("wb") as output:
                    subprocess.run(
                        ["find", str(root), "-type", "f", "-printf", r"%s %T@ %C@ %i %p\n"], check=True, stdout=output
                    )
                return {"first_s": time.monotonic() - started, "files": files}
            with place(bench.disk) as state:
                done = subprocess.run(
                    [sys.executable, str(HERE / "sweeping.py"), str(root), str(state)],
                    capture_output=True, text=True, check=False, timeout=900,
                )
            if done.returncode:
                raise NotMeasured((done.stderr.strip().splitlines() or ["no reason given"])[-1][-300:])
            answer = json.loads(done.stdout)
            return {**answer, "files": answer["first_files"], "rss_mb": answer["rss_bytes"] / 1e6}

        names = ["find -printf", *(["trigger-daemon"] if bench.daemon else [])]
        found = rounds(bench, names, measure)
    base = found.median("find -printf", "first_s")
    rows = []
    for name in names:
        first, again = found.median(name, "first_s"), found.median(name, "again_s")
        rows.append([
            name, number(found.median(name, "files"), 0), number(first), ratio(first, base), number(again),
            ratio(again, base), number(found.median(name, "rss_mb"), 0), found.note(name),
        ])
    bench.table(
        f"Sweep: {files:,} files in {writer.directories} directories, warm cache",
        "First: nothing is known, every file is matched and reported. Again: every file is claimed, the journal is "
        "joined, nothing is reported.",
        ["who", "files", "first s", "× find", "again s", "× find", "memory MB", ""],
        rows,
    )


# ---------------------------------------------------------------------------- copy


def copy_by_program(command: list[str], source: Path, target: Path, *, sync: bool) -> dict[str, float]:
    if not shutil.which(command[0]):
        raise NotMeasured(f"{command[0]} is not installed")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run([*command, str(source), str(target)], check=True)
    if sync:
        whole = ["-f"] if source.is_dir() else []  # one syncfs, not an fsync a file
        subprocess.run(["sync", *whole, str(target / source.name)], check=True)
    elapsed_s = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"s": elapsed_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def copy_by_daemon(bench: Bench, source: Path, target: Path, files: int) -> dict[str, float]:
    """Move the source into a watched directory; the time is that from STARTING to VERIFIED in the journal."""
    with place(bench.arena) as work, place(bench.disk) as state:
        root = work / "root"
        root.mkdir()
        rule = {
            "complete": {"quiescence": "1s"}, "batch": {"files": files, "idle": "10s"},
            "start": {"copy": {"to": str(target)}},
        }
        who = Daemon(work, state, rule)
        seen = root / source.name
        try:
            who.start(root)
            cpu_before_s = who.cpu_s()
            source.rename(seen)
            states: dict[str, float] = {}
            deadline = time.monotonic() + 300
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


def copy_case(bench: Bench, source: Path, title: str, *, files: int, size_bytes: int) -> None:
    recursive = ["-r"] if source.is_dir() else []
    programs = {
        "cp + sync": (["cp", *recursive], True),
        "rsync -a": (["rsync", "-a"], False),
        "rsync -a --fsync": (["rsync", "-a", "--fsync"], False),
    }

    def measure(name: str) -> dict[str, float]:
        with place(source.parent) as target:
            if name in programs:
                command, sync = programs[name]
                return copy_by_program(command, source, target, sync=sync)
            return copy_by_daemon(bench, source, target, files)

    names = [*programs, *(["trigger-daemon copy"] if bench.daemon else [])]
    found = rounds(bench, names, measure)
    base, other, synced = (found.median(name, "s") for name in programs)
    rows = []
    for name in names:
        seconds = found.median(name, "s")
        speed = size_bytes / 1e9 / seconds if seconds else None
        rows.append([
            name, number(seconds), number(speed), ratio(seconds, base), ratio(seconds, other), ratio(seconds, synced),
            number(found.median(name, "cpu_s")), found.note(name),
        ])
    bench.table(
        title,
        "The daemon's copy is read back and compared before it takes its name, and its time includes its journal; "
        "the others verify nothing at the destination.",
        ["who", "s", "GB/s", "× cp + sync", "× rsync -a", "× rsync --fsync", "CPU s", ""],
        rows,
    )


def copy(bench: Bench, writer: Writer) -> None:
    with place(bench.arena) as work:
        source = work / "movie.tif"
        block = os.urandom(1 << 20)
        with source.open("wb") as output:
            for _ in range(bench.copy_bytes >> 20):
                output.write(block)
        title = f"Copy of one file of {bench.copy_bytes / (1 << 30):g} GiB"
        copy_case(bench, source, title, files=1, size_bytes=bench.copy_bytes)


def copy_small(bench: Bench, writer: Writer) -> None:
    files, size_bytes = 5_000, 256 << 10
    with place(bench.arena) as work:
        source = work / "frames"
        source.mkdir()
        writer.prepare(source)
        writer.write(source, files=files, per_second=0, size_bytes=size_bytes)
        title = f"Copy of {files:,} files of {size_bytes >> 10} KiB"
        copy_case(bench, source, title, files=files, size_bytes=files * size_bytes)


PARTS: dict[str, Callable[[Bench, Writer], None]] = {
    "intake": intake, "burst": burst, "latency": latency, "sweep": sweep, "copy": copy,
    "copy-small": copy_small,
}


def file_system(path: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part (may be given several times)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--full", action="store_true", help="more rates, a million files to sweep")
    parser.add_argument("--files", type=int, default=100_000, help="files of the burst and of the quick sweep (100000)")
    parser.add_argument("--copy-mib", type=int, default=2048, help="size of the copied file (2048)")
    parser.add_argument("--without-daemon", action="store_true", help="measure only the others")
    parser.add_argument("--arena", type=Path, default=Path("/dev/shm"), help="where files are written (/dev/shm)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where the journal lies (/var/tmp)")
    parser.add_argument("--output", type=Path, default=HERE / "results.md")
    options = parser.parse_args()

    bench = Bench(
        options.arena, options.disk, options.repeat, options.full, not options.without_daemon, options.files,
        options.copy_mib << 20,
    )
    with place(options.disk) as build:
        writer = Writer(build)
        bench.report.append("\n".join([
            "# Benchmarks", "",
            f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}; "
            f"files on {file_system(options.arena)}, journal on {file_system(options.disk)}; {writer.kind} writer; "
            f"medians of {options.repeat} round{'s' if options.repeat > 1 else ''} in random order.", "",
        ]))
        print(bench.report[0], flush=True)
        for name in options.only or PARTS:
            PARTS[name](bench, writer)
    options.output.write_text("\n".join(bench.report))
    say(f"written to {options.output}")


if __name__ == "__main__":
    main()
