"""Targets 8, 9 and 14: what is made durable a second, starting beside a large journal, and matching."""

from __future__ import annotations

import fnmatch
import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from consumers import Daemon
from measure import Figures, NotMeasured, place, rounds, say
from processes import family_rss_bytes
from report import Plan, Row, compared
from trigger_daemon.core.model import BatchClosed, Member, RunMoved, RunState
from trigger_daemon.core.patterns import Matcher
from trigger_daemon.core.rules import Rule
from trigger_daemon.journal import Journal

US = "trigger-daemon"
BARE = "bare SQLite"
PER_BATCH = 100
DIRECTORIES = 100
SIZE_BYTES, MTIME_NS = 4_096, 1_700_000_000_000_000_000


def batch(number: int, rule: int, root: int, members: int, *, first: int) -> BatchClosed:
    """Return a closed batch of so many files, of which the first has this number."""
    files = [
        Member(root, f"d{index % DIRECTORIES:03d}", f"f{index:07d}.tif", SIZE_BYTES, MTIME_NS + index)
        for index in range(first, first + members)
    ]
    request = {"rule": "bench", "action": "bench_note", "options": {"log": "/var/tmp/started"}, "captures": {}}
    reason = f"{members} files"
    return BatchClosed(number, rule, {}, reason, 1.7e9, files, members * SIZE_BYTES, request, "nowhere")


# ---------------------------------------------------------------------- durable


def by_journal(plan: Plan, files: int) -> Figures:
    with place(plan.disk) as state:
        journal = Journal.open(state)
        rule, root = journal.rule_ids(["bench"])["bench"], journal.root_id("/data")
        records = [
            batch(number + 1, rule, root, PER_BATCH, first=number * PER_BATCH) for number in range(files // PER_BATCH)
        ]
        started = time.monotonic()
        for record in records:
            journal.append([record])
        seconds = time.monotonic() - started
        journal.close()  # folds the -wal into the file
        return {"rate": files / seconds, "bytes": (state / "journal.db").stat().st_size / files}


def by_sqlite(plan: Plan, files: int) -> Figures:
    """Write the same rows into the same tables, ready as they are, with nothing around."""
    with place(plan.disk) as state:
        connection = sqlite3.connect(state / "journal.db", isolation_level=None)
        connection.executescript((resources.files("trigger_daemon") / "journal.sql").read_text())
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executemany("INSERT INTO dir (id, root, path) VALUES (?, 1, ?)",
                               [(number, b"d%03d" % number) for number in range(DIRECTORIES)])  # fmt: skip
        made = []
        for number in range(files // PER_BATCH):
            record = batch(number + 1, 1, 1, PER_BATCH, first=number * PER_BATCH)
            claims = [
                (int(member.dir[1:]), member.name.encode(), 1, member.size, member.mtime_ns, record.batch)
                for member in record.members
            ]
            manifest = json.dumps([list(member) for member in record.members], separators=(",", ":"))
            made.append((claims, (record.batch, 1, "{}", record.reason, record.time, PER_BATCH, record.bytes,
                                  json.dumps(record.request), manifest)))  # fmt: skip
        started = time.monotonic()
        for claims, row in made:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT INTO batch (id, rule, captures, reason, closed_time, files, bytes, request, manifest)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row,
            )  # fmt: skip
            connection.execute(
                "INSERT INTO run (id, state, final, because, created_time, changed_time, destination)"
                " VALUES (?, 'PENDING', 0, ?, ?, ?, 'nowhere')", (row[0], row[3], row[4], row[4]),
            )  # fmt: skip
            connection.executemany(
                "INSERT INTO claim (dir, name, rule, size, mtime_ns, batch) VALUES (?, ?, ?, ?, ?, ?)", claims
            )
            connection.execute("COMMIT")
        seconds = time.monotonic() - started
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        return {"rate": files / seconds, "bytes": (state / "journal.db").stat().st_size / files}


def durable(plan: Plan) -> list[Row]:
    """Return the rows of target 8."""
    files = plan.size(200_000, 50_000)
    who = {US: partial(by_journal, plan, files), BARE: partial(by_sqlite, plan, files)}
    found = rounds(max(plan.repeat, 3), who, "journal")
    return [
        compared(8, f"files made durable a second, batches of {PER_BATCH}", found, "rate", ours=US, against=BARE,
                 bound=0.8, at_least=True, unit="/s", raw=BARE),
        compared(8, "bytes on disk a file (claim and manifest)", found, "bytes", ours=US, against=BARE, unit="bytes"),
    ]  # fmt: skip


# ------------------------------------------------------------------------ start


def filled(state: Path, watch: str, done: int, opened: int) -> None:
    """Make a journal with so many files done, a thousand a batch, and so many open runs of one file each."""
    journal = Journal.open(state)
    rule, root = journal.rule_ids(["bench"])["bench"], journal.root_id(watch)
    number = 0
    for first in range(0, done, 1_000):
        number += 1
        moves = [
            RunMoved(number, RunState.PENDING, RunState.STARTING, "", 1.7e9, False),
            RunMoved(number, RunState.STARTING, RunState.ACTIVE, "", 1.7e9, False),
            RunMoved(number, RunState.ACTIVE, RunState.SUCCEEDED, "", 1.7e9, True),
        ]
        journal.append([batch(number, rule, root, min(1_000, done - first), first=first), *moves])
    for begin in range(0, opened, 1_000):
        some = range(begin, min(begin + 1_000, opened))
        journal.append([batch(number + 1 + index, rule, root, 1, first=done + index) for index in some])
    journal.close()


def started(plan: Plan, full: Path, root: Path) -> Figures:
    """Return seconds from the start of the process until it opens the watched directory, and its memory then."""
    with place(plan.disk) as state, place(plan.arena) as work:
        shutil.copytree(full, state, dirs_exist_ok=True)
        (state / "journal.home").unlink(missing_ok=True)  # it is a copy, and a directory of its own
        rule = {
            "complete": {"quiescence": "1h"}, "proof": "none", "start": {"bench_note": {"log": str(work / "started")}},
        }  # fmt: skip
        who = Daemon(work, state, rule)
        looks = subprocess.Popen(
            ["inotifywait", "-q", "-e", "open", str(root)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(0.3)  # its watch
            began = time.monotonic()
            who.launch(root)
            try:
                looks.wait(60)
            except subprocess.TimeoutExpired:
                raise NotMeasured(f"no look within 60 s: {who._last_words()}") from None
            seconds = time.monotonic() - began
            memory = family_rss_bytes(who.children[0].pid) / 1e6
            return {"s": seconds, "mb": memory}
        finally:
            looks.kill()
            looks.wait()
            who.stop()


def bare_start() -> Figures:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import trigger_daemon.daemon"], check=True)
    return {"s": time.monotonic() - began}


def start(plan: Plan) -> list[Row]:
    """Return the rows of target 9."""
    if not shutil.which("inotifywait"):
        return [Row(9, "start", [], note="inotifywait tells of the first look, and is not there")]
    done, opened = plan.size(1_000_000, 100_000), plan.size(10_000, 1_000)
    with place(plan.disk) as full, place(plan.disk) as empty, place(plan.arena) as work:
        root = work / "root"
        root.mkdir()
        say(f"filling a journal with {done:,} files done and {opened:,} runs open")
        filled(full, str(root), done, opened)
        who: dict[str, Callable[[], Figures]] = {
            US: partial(started, plan, full, root),
            "an empty journal": partial(started, plan, empty, root),
            "import alone": bare_start,
        }
        found = rounds(plan.repeat, who, "start")
    words = f"{done:,} files done, {opened:,} runs open"
    return [
        Row(9, f"start to the first look, {words}", found.values(US, "s"), "s", bound=0.5, raw="import alone",
            raw_ratios=found.ratios(US, "import alone", "s"), note=found.failed.get(US, "")),
        compared(9, "start to the first look", found, "s", ours=US, against="an empty journal", unit="s"),
        Row(9, f"memory at the first look, {words}", found.values(US, "mb"), "MB", bound=60),
    ]  # fmt: skip


# --------------------------------------------------------------------- matching


def rules_of(count: int) -> list[Rule]:
    """Return rules of one root as a facility has them: some by directory, some by suffix, some with captures."""
    shapes = ("scan{n}/**/*.tif", "{{session}}/Images-Disc{n}/{{square}}/Data/{{movie}}_fractions.tiff",
              "**/run{n}_*.h5", "raw/{n}/{{name:[a-z]+_\\d+}}.cbf", "**/*_{n}.mrc")  # fmt: skip
    return [
        Rule(id=number + 1, name=f"r{number}", watch="/data", match=(shapes[number % len(shapes)].format(n=number),),
             existing="process", action="command", options={})
        for number in range(count)
    ]  # fmt: skip


def paths_of(count: int) -> list[tuple[str, str]]:
    dice = random.Random(1)
    names = ("f{:07d}.tif", "Foil_{:07d}_fractions.tiff", "run7_{:07d}.h5", "sample_{:07d}.cbf", "m{:07d}_4.mrc")
    places = ("scan0/a/b", "s1/Images-Disc1/g3/Data", "x/y", "raw/13", "deep/er")
    return [(dice.choice(places), dice.choice(names).format(number)) for number in range(count)]


def matched_us(rules: int, paths: list[tuple[str, str]]) -> float:
    """Return microseconds a path, in turns of directories as events come: some hundred names of one, then the next."""
    matcher = Matcher(rules_of(rules))
    ordered = sorted(paths)
    begun = time.process_time()
    last, wants = None, None
    for directory, name in ordered:
        if directory != last:
            last, wants = directory, matcher.directory(directory).wants
        wants(name)  # type: ignore[misc]
    return (time.process_time() - begun) / len(paths) * 1e6


def each_us(patterns: list[Any], paths: list[tuple[str, str]], hit: Any) -> float:
    begun = time.process_time()
    for directory, name in paths:
        path = f"{directory}/{name}"
        for pattern in patterns:
            hit(pattern, path)
    return (time.process_time() - begun) / len(paths) * 1e6


def matching(plan: Plan) -> list[Row]:
    """Return the rows of target 14."""
    paths = paths_of(plan.size(200_000, 50_000))
    few = paths[:2_000]
    globs = [re.sub(r"\{[^}]*\}", "*", rule.match[0]) for rule in rules_of(50)]
    regexes = [re.compile(fnmatch.translate(glob)) for glob in globs]
    one = re.compile("|".join(f"(?:{fnmatch.translate(glob)})" for glob in globs))
    who: dict[str, Callable[[], Figures]] = {
        US: lambda: {"us": matched_us(50, paths)},
        "fnmatch": lambda: {"us": each_us(globs, few, lambda glob, path: fnmatch.fnmatchcase(path, glob))},
        "compiled one by one": lambda: {"us": each_us(regexes, few, lambda regex, path: regex.match(path))},
        "one alternation": lambda: {"us": each_us([one], few, lambda regex, path: regex.match(path))},
    }
    found = rounds(max(plan.repeat, 3), who, "matching")
    return [
        Row(14, "50 rules against one path", found.values(US, "us"), "µs", bound=2),
        *[compared(14, "50 rules against one path", found, "us", ours=US, against=other, unit="µs")
          for other in who if other != US],
    ]  # fmt: skip
