"""Crash points: killed at every named step between a decision and its effect, started again, and judged.

A fail point is a place in the code with a name (`failpoints.py`). Each is died
at in its first visits, by the daemon itself, or by the daemon of the process
that came to it; then the daemon starts anew and ends its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.prove.oracle import Promise
from tests.prove.results import Result
from tests.prove.stage import DONE_S, QUIET_S, Stage, content
from trigger_daemon import failpoints

VISITS = 3  # of each point at which it is died
QUICK = ("loop.after_commit", "executor.start", "executor.started", "command.spawned", "copy.proved", "copy.renamed")
LANES = 2  # stages at once
ELSEWHERE = ("removal.", "reclaim.")  # steps that this stage does not take: the part `reclaims` dies at them
MIB = 2**20

# Points that only trouble leads to: what is planned first.
FIRST = {"copy.unlink": "copy.sync:eio@1,", "ballast.give_up": "journal.commit:enospc@12,"}
# Places where a test asks for damage instead of a death, and a command of a person's, which has tests of its own.
NOT_DEATHS = {
    "executor.prepare": "no action of this version prepares: the simulated histories die there",
    "executor.prepared": "no action of this version prepares: the simulated histories die there",
    "copy.flip": "damages a byte: `mutants` and test_copy.py",
    "copy.large_flip": "damages a byte: test_copy.py",
    "doctor.canary": "a command's, which writes nothing of the daemon's: test_doctor.py",
    "command.remove": "attempts of long ago: test_command.py",
    "command.removed": "attempts of long ago: test_command.py",
    **{f"globus.{step}": "needs the emulated service: test_globus.py dies there"
       for step in ("access", "ingest", "run", "running", "submit", "submitted")},
    **{f"globus.{step}": "needs the emulated service: test_globus_compute.py dies there"
       for step in ("compute", "computing")},
    **{f"http.{step}": "needs a service: test_http.py dies there" for step in ("send", "sent")},
    "removal.replacing": "damages what a rename promises: test_removal.py",
}


class Case(NamedTuple):
    point: str
    visit: int

    @property
    def plan(self) -> str:
        who = "kill_parent" if self.point.startswith(("copy.", "rsync.", "rclone.")) else "kill"  # by children
        return f"{FIRST.get(self.point, '')}{self.point}:{who}@{self.visit}"


def _is_mrc(path: str) -> bool:
    return path.endswith(".mrc")


class Rich(Stage):
    """The stage with a third rule: a large file, and sums beside the copies."""

    def rules(self) -> list[dict[str, Any]]:
        sums = {"to": str(self.disk / "sums"), "sums": "SHA256SUMS", "digest": "sha256"}
        return [*super().rules(), self.site.rule("large", match=["**/*.mrc"], start={"copy": sums})]

    def promises(self) -> list[Promise]:
        large = Promise("large", _is_mrc, self.disk / "sums", QUIET_S, beside=frozenset({"SHA256SUMS"}))
        return [*super().promises(), large]

    def before(self) -> None:
        super().before()
        (self.disk / "sums").mkdir(exist_ok=True)  # a destination is never created: it may be a mount that is away
        self.writer.whole("large/6.mrc", content("6", 65 * MIB))


class Synced(Stage):
    """The stage with a third rule, which calls rsync."""

    def rules(self) -> list[dict[str, Any]]:
        return [*super().rules(), self.site.rule("sync", start=self.start())]

    def start(self) -> dict[str, Any]:
        return {"rsync": {"to": str(self.disk / "sync")}}

    def promises(self) -> list[Promise]:
        return [*super().promises(), Promise("sync", lambda path: path.endswith(".tif"), self.disk / "sync", QUIET_S)]

    def before(self) -> None:
        super().before()
        (self.disk / "sync").mkdir(exist_ok=True)


class Remote(Synced):
    """The stage with a third rule, which calls rclone."""

    def start(self) -> dict[str, Any]:
        config = self.site.base / "rclone.conf"
        config.write_text("[there]\ntype = local\n")
        config.chmod(0o600)
        return {"rclone": {"to": f"there:{self.disk / 'sync'}", "config": str(config)}}


THIRD = {"rsync": Synced, "rclone": Remote}


def points() -> list[str]:
    """Return the points at which it is died here."""
    names = (name for name in failpoints.names() if not name.startswith(ELSEWHERE))
    return [name for name in names if name not in NOT_DEATHS]


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Die at every point, in its first visits. `seed` plays no part: all are done."""
    chosen = [point for point in points() if not quick or point in QUICK]
    visited: dict[str, int] = {}
    violations: list[str] = []
    with ThreadPoolExecutor(LANES) as lanes:
        for point, times, broken in lanes.map(lambda point: _all_visits(point, 1 if quick else VISITS, work), chosen):
            visited[point] = times
            violations += broken
            tell(f"crash points: {len(visited)} of {len(chosen)}, {len(violations)} violations")
    not_done = [f"{point} was never come to" for point, times in visited.items() if not times]
    deaths = sum(visited.values())
    figures = {"crash points": len(chosen) - len(not_done), "deaths at them": deaths, "violations": len(violations)}
    rows = [{"crash point": point, "deaths": str(times)} for point, times in sorted(visited.items())]
    return Result("crash points", figures, violations, not_done, rows)


def _all_visits(point: str, visits: int, work: Path) -> tuple[str, int, list[str]]:
    times, broken = 0, []
    for visit in range(1, visits + 1):
        with tempfile.TemporaryDirectory(dir=work) as base:
            died, words = die(Case(point, visit), Path(base))
        broken += words
        if not died:
            break
        times += 1
    return point, times, broken


def die(case: Case, base: Path) -> tuple[bool, list[str]]:
    """Return whether it died there, and what was broken afterwards."""
    if case.point.startswith("salvage."):
        return _die_in_a_recovery(case, base)
    large = case.point.startswith(("copy.large", "copy.sums"))
    stage = Rich(base) if large else THIRD.get(case.point.partition(".")[0], Stage)(base)
    broken: list[str] = []
    try:
        stage.before()
        stage.site.start(wait=False, env={"TRIGGER_FAIL": case.plan})
        stage.meanwhile()
        died = _ends_or_is_idle(stage)
        broken += [f"{case.plan}: at once: {violation}" for violation in stage.judge(idle=False)]
        if not died:
            stage.site.kill()
        stage.afterwards()
        stage.site.start()
        stage.until_idle()
        broken += [f"{case.plan}: {violation}" for violation in stage.judge(idle=True)]
        if stage.site.stop() != 0:
            broken.append(f"{case.plan}: the daemon did not end well after it")
        if problems := stage.site.json("journal", "check")["problems"]:
            broken.append(f"{case.plan}: {problems[0]}")
    except (AssertionError, subprocess.SubprocessError) as error:
        broken.append(f"{case.plan}: {error}")
        died = True
    finally:
        stage.close()
    return died, broken


def _ends_or_is_idle(stage: Stage) -> bool:
    process = stage.site.process
    assert process is not None
    stage.site.until(lambda: process.poll() is not None or stage.is_idle(), DONE_S, "it dies or is done")
    return process.poll() is not None


def _die_in_a_recovery(case: Case, base: Path) -> tuple[bool, list[str]]:
    """Killed while it sets a damaged journal aside, the command is called again, and the damaged one is not lost."""
    stage = Stage(base)
    try:
        stage.before()
        stage.site.start()
        stage.until_idle()
        stage.site.kill()
        journal = stage.site.state / "journal.db"
        data = bytearray(journal.read_bytes())
        data[:100] = bytes(100)
        journal.write_bytes(data)
        command = [sys.executable, "-P", "-m", "trigger_daemon", "journal", "recover", "--send", "copy", "-F", "json"]
        command += ["--config", str(stage.site.config)]
        environment = {**os.environ, "TRIGGER_FAIL": case.plan}
        first = subprocess.run(command, env=environment, capture_output=True, timeout=DONE_S, check=False)
        if first.returncode != -9:
            return False, []
        second = subprocess.run(command, capture_output=True, timeout=DONE_S, check=False)
        if second.returncode and b"is sound" not in second.stdout + second.stderr:
            return True, [f"{case.plan}: the second call says {second.stderr.decode(errors='replace')}"]
        broken = []
        aside = list(stage.site.state.glob("journal.damaged-*/journal.db"))
        if [path.read_bytes() for path in aside] != [bytes(data)]:
            broken.append(f"{case.plan}: the damaged journal is not the one set aside: {aside}")
        stage.site.start()
        stage.site.cli("resume")
        stage.until_idle(but_for="work")
        words = [v for v in stage.judge(idle=True) if v.law not in ("missed", "twice") or "executions" in v.what]
        return True, broken + [f"{case.plan}: {violation}" for violation in words]
    finally:
        stage.close()


def _main() -> Iterator[str]:
    """Die at one point, for a person: `python -m tests.prove.crashpoints POINT VISIT`."""
    point, visit = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        died, broken = die(Case(point, visit), Path(base))
    yield json.dumps({"died": died, "violations": broken}, indent=1)


if __name__ == "__main__":
    print(*_main(), sep="\n")
