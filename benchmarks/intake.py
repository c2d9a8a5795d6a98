"""Targets 1 to 4: the whole path beside those who only watch. The daemon is a process, its journal on a disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from consumers import Consumer, Daemon, Inotifywait, Reader, Watchdog, Watchman, wait
from measure import Figures, Found, NotMeasured, place, quantile, rounds
from processes import family_rss_bytes
from report import Plan, Row, compared
from writer import compiled

US = "trigger-daemon"
QUIET_S = 1.0
PER_BATCH = 1_000
Make = Callable[[Any, Any], Consumer]


def note(log: Path, *, each: bool) -> dict[str, Any]:
    return {"bench_note": {"log": str(log), "each": each}}


def watchers(plan: Plan) -> dict[str, Make]:
    """Return how each consumer is made of a place for its files and one for its journal."""
    rule = {
        "complete": {"quiescence": f"{QUIET_S:g}s"}, "batch": {"files": PER_BATCH, "idle": "500ms"}, "proof": "none",
    }  # fmt: skip
    return {
        "nobody": lambda work, state: Consumer(work),
        Reader.name: lambda work, state: Reader(work, compiled("reader", plan.build)),
        Inotifywait.name: lambda work, state: Inotifywait(work),
        Watchman.name: lambda work, state: Watchman(work),
        Watchdog.name: lambda work, state: Watchdog(work),
        US: lambda work, state: Daemon(work, state, {**rule, "start": note(work / "started", each=False)}),
    }


def once(plan: Plan, make: Make, *, files: int, per_second: float) -> Figures:
    """Let one consumer watch while the writer writes; what it saw, what it cost, when it was through."""
    with place(plan.arena) as work, place(plan.disk) as state:
        root = work / "root"
        root.mkdir()
        plan.writer.prepare(root)
        who = make(work, state)
        try:
            who.start(root)
            cpu_before_s = who.cpu_s()
            started = time.monotonic()
            written = plan.writer.write(root, files=files, per_second=per_second)
            ended = written.closed_ns[-1] / 1e9
            drained = max(who.drain(files), ended)
            cpu_s = who.cpu_s() - cpu_before_s
            figures = {"rate": files / written.elapsed_s}
            if type(who) is Consumer:
                return figures
            time.sleep(0.5)  # a script's last lines are on their way
            figures |= {
                "lost": files - who.seen(),
                "cpu_us": cpu_s / files * 1e6,
                "drain_s": drained - ended,
                "through": files / (drained - started),
                "rss_mb": sum(family_rss_bytes(child.pid) for child in who.children) / 1e6,
            }
            if isinstance(who, Daemon):
                wait(lambda: "hints" in who.heartbeat()["daemon"], 10, "a heartbeat")
                figures["overflows"] = who.heartbeat()["daemon"]["hints"]["overflows"]
                # A quiet period and the look for the last batch are no work: 0.5 s of idle, 1 s of quiet.
                figures["busy_through"] = files / max(drained - started - QUIET_S - 0.5, 1e-3)
            return figures
        finally:
            who.stop()


def turns(plan: Plan, names: list[str], about: str, *, files: int, per_second: float) -> Found:
    makers = watchers(plan)
    who = {name: partial(once, plan, makers[name], files=files, per_second=per_second) for name in names}
    return rounds(plan.repeat, who, about)


def steady(plan: Plan) -> list[Row]:
    """Return the rows of target 1."""
    rows = []
    names = [US, Reader.name, Inotifywait.name, Watchman.name, Watchdog.name]
    for rate in [20_000] if plan.quick else [20_000, 5_000]:
        seconds = 3 if plan.quick else 10 if rate == 20_000 else 5
        found = turns(plan, names, f"{rate:,} files/s", files=rate * seconds, per_second=rate)
        aimed = rate == 20_000
        words = f"CPU a file at {rate:,} files/s"
        overflows = sum(found.values(US, "overflows"))
        rows.append(
            Row(1, f"lost of {rate * seconds:,} at {rate:,} files/s", found.values(US, "lost"), "files", bound=0,
                note=f"the kernel's queue overflowed {overflows:.0f} times" if overflows else "")
        )  # fmt: skip
        with_bound: list[tuple[str, float | None]] = [
            (Inotifywait.name, 2.5 if aimed else None), (Watchman.name, 0.75 if aimed else None), (Watchdog.name, None)
        ]  # fmt: skip
        for name, bound in with_bound:
            lost = found.values(name, "lost")
            note = f"{name} lost {statistics.median(lost) / (rate * seconds):.0%}" if lost and max(lost) > 0 else ""
            rows.append(
                compared(1, words, found, "cpu_us", ours=US, against=name, bound=bound, unit="µs",
                         raw=Reader.name, note=note)
            )  # fmt: skip
    return rows


def burst(plan: Plan) -> list[Row]:
    """Return the rows of targets 2 and 4: one burst at the writer's full speed, and what the writer kept of it."""
    files = plan.size(100_000, 30_000)
    names = ["nobody", US, Reader.name, Inotifywait.name, Watchman.name]
    found = turns(plan, names, f"burst of {files:,}", files=files, per_second=0)
    overflows = sum(found.values(US, "overflows"))
    drained = [
        ours["busy_through"] / theirs["through"]
        for turn in found.turns
        if (ours := turn.get(US)) and (theirs := turn.get(Inotifywait.name))
    ]
    return [
        Row(2, f"lost of a burst of {files:,}", found.values(US, "lost"), "files", bound=0,
            note=f"the kernel's queue overflowed {overflows:.0f} times" if overflows else ""),
        Row(2, "files drained a second, beyond quiet and idle", found.values(US, "busy_through"), "/s",
            Inotifywait.name, found.values(Inotifywait.name, "through"), drained, 1.0, at_least=True,
            note=f"all in {statistics.median(found.values(US, 'through') or [0]):,.0f}/s"),
        compared(4, "the writer's speed with us beside it", found, "rate", ours=US, against=Inotifywait.name,
                 bound=0.95, at_least=True, unit="files/s", raw="nobody"),
        compared(4, "the writer's speed with us beside it", found, "rate", ours=US, against="nobody", unit="files/s"),
    ]  # fmt: skip


# ------------------------------------------------------------------------- latency


def waited(plan: Plan, *, per_second: int, seconds: float, per_batch: int, trust: bool) -> Figures:
    """Return milliseconds from the close of a batch's last file to its action's start, beyond the quiescence."""
    files = int(per_second * seconds)
    with place(plan.arena) as work, place(plan.disk) as state:
        root, log = work / "root", work / "started"
        root.mkdir()
        plan.writer.prepare(root)
        rule: dict[str, Any] = {
            "complete": {"quiescence": f"{QUIET_S:g}s", "trust": ["close"] if trust else []}, "proof": "none",
            "start": note(log, each=True),
        }  # fmt: skip
        if per_batch > 1:
            rule["batch"] = {"files": per_batch, "idle": "2s"}
        who = Daemon(work, state, rule, {"throttle": {"runs": 1_000}})
        try:
            who.start(root)
            cpu_before_s = who.cpu_s()
            written = plan.writer.write(root, files=files, per_second=per_second)
            who.drain(files)
            try:
                wait(lambda: log.exists() and log.read_bytes().count(b"\n") >= files, 20, "all actions")
            except NotMeasured:
                pass  # told as missing
            cpu_s = who.cpu_s() - cpu_before_s
        finally:
            who.stop()
        lines = log.read_text().splitlines() if log.exists() else []
    if not lines:
        raise NotMeasured("no action was started")
    last: dict[int, float] = {}  # a start's instant -> when the last of its files was closed
    for line in lines:
        instant, _, path = line.partition(" ")
        closed = written.closed_ns[int(path.rpartition("/f")[2].removesuffix(".tif"))]
        last[int(instant)] = max(last.get(int(instant), 0), closed)
    beyond = 0.0 if trust else QUIET_S
    waits = [(started - closed) / 1e6 - beyond * 1e3 for started, closed in last.items()]
    seconds_of_starts = (max(last) - min(last)) / 1e9
    return {
        "p50": quantile(waits, 0.5), "p99": quantile(waits, 0.99), "early": float(sum(one < 0 for one in waits)),
        "missing": float(files - len(lines)), "rate": files / written.elapsed_s, "cpu_us": cpu_s / len(last) * 1e6,
        "starts": len(last) / max(seconds_of_starts, 1e-3),
    }  # fmt: skip


def latency(plan: Plan) -> list[Row]:
    """Return the rows of target 3: runs of one file, and as many files a second in batches."""
    loads = [(100, 1), (1_000, 1), (1_000, 10), (5_000, 50)]
    cases = {
        f"{rate:,} files/s, {f'batches of {batch}' if batch > 1 else 'each its own batch'}"
        f"{', trust: [close]' if trust else ''}": (rate, batch, trust)
        for rate, batch in (loads[1::2] if plan.quick else loads)
        for trust in (False, True)
    }
    seconds = 2.0 if plan.quick else 5.0
    who = {
        name: partial(waited, plan, per_second=rate, seconds=seconds, per_batch=batch, trust=trust)
        for name, (rate, batch, trust) in cases.items()
    }
    most = "as many runs as can be"
    who[most] = partial(waited, plan, per_second=5_000, seconds=seconds / 2, per_batch=1, trust=True)
    found = rounds(plan.repeat, who, "latency")
    rows = []
    for name in cases:
        faults = [f"{sum(found.values(name, what)):.0f} {what}" for what in ("early", "missing")
                  if any(found.values(name, what))]  # fmt: skip
        note = "; ".join(faults) or found.failed.get(name, "")
        cpu = found.values(name, "cpu_us")
        note = note or (f"{statistics.median(cpu):,.0f} µs of CPU a run" if cpu else "")
        rows.append(Row(3, f"close → start, {name}, p50", found.values(name, "p50"), "ms", bound=10, note=note))
        rows.append(Row(3, f"close → start, {name}, p99", found.values(name, "p99"), "ms", bound=50, note=note))
    rows.append(Row(3, "runs of one file started a second, at most", found.values(most, "starts"), "/s",
                    note=found.failed.get(most, "")))  # fmt: skip
    return rows
