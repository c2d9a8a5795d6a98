"""Targets 7, 12 and 13: memory a file, what it costs to do nothing, and how costs grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import copies
import intake
import rows
import trees
from consumers import Daemon, wait
from measure import Figures, NotMeasured, exponent, place, rounds, say
from processes import cpu_s, family_rss_bytes, wakeups
from report import Plan, Row

US = "trigger-daemon"
NOTE = {"bench_note": {"log": "/dev/null"}}
START_OVER_S = 45.0  # what was young when it was listed first is listed once more after 30 s
GROWTH_MAX = 1.05  # of an exponent: noise of two decades


def settled(plan: Plan, files: int, *, known: bool, idle_s: float) -> Figures:
    """Let the daemon watch so many files, known or waiting for their quiet; its memory, then what idling costs."""
    with place(plan.arena) as work, place(plan.disk) as state:
        root = work / "root"
        root.mkdir()
        plan.writer.prepare(root)
        if files:
            plan.writer.write(root, files=files, per_second=0, size_bytes=1)
        rule: dict[str, Any] = {
            "complete": {"quiescence": "2h", "stalled_after": "3h"}, "batch": {"files": 10 * files + 10},
            "proof": "none", "existing": "ignore" if known else "process", "start": NOTE,
        }  # fmt: skip
        who = Daemon(work, state, rule)
        try:
            who.start(root)
            pid = who.children[0].pid

            def at_rest() -> bool:
                beat = who.heartbeat()
                return bool(known or beat["rules"][0]["settling"] >= files)

            wait(at_rest, 60, "all files to be known")
            time.sleep(2)
            figures = {"rss": float(family_rss_bytes(pid))}
            if idle_s:
                time.sleep(START_OVER_S)
                before = cpu_s(pid), wakeups(pid), time.monotonic()
                time.sleep(idle_s)
                seconds = time.monotonic() - before[2]
                figures["cpu"] = (cpu_s(pid) - before[0]) / seconds * 100
                figures["wakeups"] = (wakeups(pid) - before[1]) / seconds
            return figures
        finally:
            who.stop()


def resting(plan: Plan) -> list[Row]:
    """Return the rows of targets 7 and 12."""
    many, waiting = plan.size(1_000_000, 50_000), plan.size(100_000, 50_000)
    watched, idle_s = plan.size(100_000, 50_000), plan.size(60, 15)
    who = {
        "nothing": partial(settled, plan, 0, known=True, idle_s=0),
        "known": partial(settled, plan, many, known=True, idle_s=0),
        "waiting": partial(settled, plan, waiting, known=False, idle_s=0),
        "idle": partial(settled, plan, watched, known=True, idle_s=idle_s),
    }
    found = rounds(1, who, "at rest")  # memory and idling hardly vary

    def a_file(name: str, files: int) -> list[float]:
        return [(turn[name]["rss"] - turn["nothing"]["rss"]) / files
                for turn in found.turns if name in turn and "nothing" in turn]  # fmt: skip

    return [
        Row(7, f"memory a known file, of {many:,}", a_file("known", many), "bytes", bound=100,
            note=found.failed.get("known", "")),
        Row(7, f"memory a waiting file, of {waiting:,}", a_file("waiting", waiting), "bytes", bound=600,
            note=found.failed.get("waiting", "")),
        Row(7, "memory with nothing to watch", [value / 1e6 for value in found.values("nothing", "rss")], "MB"),
        Row(12, f"idle with {watched:,} watched files, CPU", found.values("idle", "cpu"), "% of a core", bound=0.2),
        Row(12, f"idle with {watched:,} watched files, wake-ups", found.values("idle", "wakeups"), "/s", bound=5),
    ]  # fmt: skip


# ----------------------------------------------------------------------- growth


def growth(plan: Plan) -> list[Row]:
    """Return the rows of target 13: the exponent of each cost over work that grows tenfold, twice."""
    times = (1, 10) if plan.quick else (1, 10, 100)
    cases: dict[str, tuple[int, Callable[[int], float]]] = {
        "CPU of a burst": (1_000, partial(_burst_cpu_s, plan)),
        "first sweep": (plan.size(10_000, 5_000), partial(_sweep_s, plan, "first_s")),
        "rows made durable": (plan.size(10_000, 2_000), lambda files: files / rows.by_journal(plan, files)["rate"]),
        "matching, over rules": (5, lambda rules: rows.matched_us(rules, rows.paths_of(20_000))),
    }  # fmt: skip
    if not plan.quick:
        cases |= {
            "full sweep, nothing changed": (10_000, partial(_sweep_s, plan, "again_s")),
            "start, over open runs": (100, partial(_start_s, plan)),
            "verified copy of small files": (200, partial(_copy_s, plan)),
            "memory of waiting files": (1_000, partial(_waiting_bytes, plan)),
        }
    result = []
    for name, (least, cost) in cases.items():
        works = [least * factor for factor in times]
        try:
            costs = []
            for work in works:
                say(f"growth, {name}: {work:,}")
                costs.append(max(cost(work), 1e-9))
            result.append(_row(name, works, costs))
        except NotMeasured as why:
            result.append(Row(13, f"growth of {name}", [], note=str(why)))
    return result


def _row(name: str, works: Sequence[int], costs: Sequence[float]) -> Row:
    # From the first to the last, and of the last step alone: what is fixed hides the growth at the beginning.
    last = exponent(works[-2:], costs[-2:])
    shown = ", ".join(f"{cost:.3g}" for cost in costs)
    return Row(13, f"growth of {name}, {works[0]:,} to {works[-1]:,}: exponent of the last step", [last],
               bound=GROWTH_MAX, note=f"{shown}; over all {exponent(works, costs):.2f}")  # fmt: skip


def _burst_cpu_s(plan: Plan, files: int) -> float:
    return intake.once(plan, intake.watchers(plan)[US], files=files, per_second=0)["cpu_us"] * files / 1e6


def _sweep_s(plan: Plan, figure: str, files: int) -> float:
    with place(plan.arena) as work:
        root = work / "root"
        root.mkdir()
        plan.writer.prepare(root)
        plan.writer.write(root, files=files, per_second=0, size_bytes=1)
        return trees.swept(plan, root)[figure]


def _start_s(plan: Plan, opened: int) -> float:
    with place(plan.disk) as full, place(plan.arena) as work:
        root = work / "root"
        root.mkdir()
        rows.filled(full, str(root), opened * 10, opened)
        return rows.started(plan, full, root)["s"]


def _copy_s(plan: Plan, files: int) -> float:
    with place(plan.disk) as work:
        source = work / "frames"
        source.mkdir()
        plan.writer.prepare(source)
        plan.writer.write(source, files=files, per_second=0, size_bytes=4_096)
        return copies.by_daemon(plan, source, files)["s"]


def _waiting_bytes(plan: Plan, files: int) -> float:
    nothing = settled(plan, 0, known=True, idle_s=0)["rss"]
    return settled(plan, files, known=False, idle_s=0)["rss"] - nothing
