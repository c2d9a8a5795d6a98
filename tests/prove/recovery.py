"""Recovery: how long a daemon that was killed takes to be back, with a million files done and ten thousand open.

The journal is filled through its own `append`, as the daemon would have filled
it; the files that are done lie on the disk, too, for the sweep to meet.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.prove.results import Result
from tests.site import Site
from trigger_daemon.config import parse_rules
from trigger_daemon.core import model
from trigger_daemon.core.model import BatchClosed, Member, RunMoved, RunState
from trigger_daemon.journal import Journal

BATCH = 100  # files
AT_ONCE = 50  # batches in a commit


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Fill, start, kill, start again: time to the first word, to the first full sweep, memory."""
    done, open_ = (20_000, 1_000) if quick else (1_000_000, 10_000)
    site = Site(work, quiescence="2s", sweep="30s")
    waits = site.rule("open", match=["open/*.tif"], batch={"files": 10})
    site.write_rules(site.rule("done", match=["d*/*.tif"]), waits)
    _fill(site, done, open_, tell)
    tell(f"recovery: {done:,} files done and {open_:,} open are in the journal")
    figures: dict[str, int | float | str] = {"done files": done, "open files": open_}
    violations = []
    try:
        for life in ("first start", "after SIGKILL"):
            began = time.monotonic()
            site.start()
            figures[f"s to work, {life}"] = round(time.monotonic() - began, 2)
            site.until(
                lambda: site.ask("SELECT count(*) FROM baseline") == [(2,)], 600, "everything was looked at once"
            )
            figures[f"s to a full sweep, {life}"] = round(time.monotonic() - began, 1)
            assert site.process is not None
            figures[f"MiB at most, {life}"] = _peak_mib(site.process.pid)
            if len(site.ask("SELECT 1 FROM batch")) != (done + open_) // BATCH:
                violations.append(f"{life}: files that were done or open were batched again")
            site.kill()
            _forget_baselines(site)
            tell(f"recovery: {life}: {figures[f's to work, {life}']} s, {figures[f'MiB at most, {life}']} MiB")
    finally:
        if site.process is not None and site.process.poll() is None:
            site.kill()
    return Result("recovery", figures, violations)


def _fill(site: Site, done: int, open_: int, tell: Callable[[str], None]) -> None:
    """Write the files, empty ones, and the journal."""
    journal = Journal.open(site.state)
    rules = parse_rules([(str(p), p.read_text()) for p in sorted(site.rules_dir.glob("*.yaml"))])
    ids = journal.rule_ids([rule.name for rule in rules.rules])
    root = journal.root_id(str(site.data))
    seen = time.time() - 1_000.0
    number, records = 0, []
    for rule, count in (("done", done), ("open", open_)):
        for first in range(0, count, BATCH):
            directory = f"d{first // 10_000}" if rule == "done" else "open"
            (site.data / directory).mkdir(exist_ok=True)
            members = []
            for n in range(first, first + BATCH):
                path = site.data / directory / f"{n:07d}.tif"
                fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                os.close(fd)
                state = os.lstat(path)
                members.append(Member(root, directory, path.name, state.st_size, state.st_mtime_ns))
            number += 1
            request = {"rule": rule, "action": "copy", "options": {"to": str(site.out)}, "captures": {}}
            closed = BatchClosed(number, ids[rule], {}, "made", seen, tuple(members), 0, request, str(site.out))
            records.append(closed)
            if rule == "done":
                records.append(RunMoved(number, RunState.PENDING, RunState.VERIFIED, "done", seen, final=True))
            if len(records) >= AT_ONCE:
                journal.append(records)
                records.clear()
    journal.append([*records, model.Kept("paused", "paused for the measurement")])
    journal.close()


def _forget_baselines(site: Site) -> None:
    """Let the next full sweep be told: it sets the rules' baselines again."""
    with closing(sqlite3.connect(site.state / "journal.db", isolation_level=None)) as sql:
        sql.execute("DELETE FROM baseline")


def _peak_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return 0
