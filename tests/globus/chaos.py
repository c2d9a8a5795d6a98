"""The daemon against the emulated Globus while everything goes wrong: faults at random, and SIGKILLs.

    python -m tests.globus.chaos --batches 1000 --kills 50 [--seed N] [--no-faults]

Each file is a batch of two rules: one transfers it, one starts a flow for it.
The oracle knows what was written, and asks the service what it was asked to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.globus.emulator import Emulator
from tests.site import Site

SECRET = "not-a-secret"
FLOW = {"StartAt": "Note", "States": {"Note": {"Type": "Pass", "Result": {"noted": True}, "ResultPath": "$.done",
                                               "End": True}}}
SCHEMA = {"type": "object", "required": ["files"], "properties": {"files": {"type": "array"}}}

ROUTES = (
    "POST /v2/oauth2/token", "GET /v0.10/submission_id", "POST /v0.10/transfer", "GET /v0.10/task_list",
    "GET /v0.10/task/*", "GET /flows/*", "POST /flows/*/run", "GET /runs", "GET /runs/*", "POST /v1/index/*",
    "GET /v1/task/*", "POST /v0.10/endpoint/*", "GET /v0.10/endpoint/*",
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "refuse": {}, "drop_after": {}, "error_before": {"status": 503}, "error_after": {"status": 502},
    "delay": {"seconds": 0.3}, "rate_limited": {"retry_after": 1}, "html": {}, "cut": {}, "unauthorized_once": {},
}  # fmt: skip


class Chaos:
    """One site, one emulated Globus."""

    def __init__(self, base: Path, *, seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.seed = seed
        self.site = Site(base, sweep="500ms")
        self.globus = Emulator(base / "globus")
        self.client = str(uuid.UUID(int=self.dice.getrandbits(128), version=4))
        self.kills = 0
        self.kill_places: Counter[str] = Counter()

    def set_up(self) -> None:
        globus, site = self.globus, self.site
        globus.client(self.client, SECRET)
        krios = globus.collection("Krios", site.data)
        archive = globus.collection("Archive", site.out)
        flow = globus.flow(FLOW, SCHEMA)
        group = globus.group("Visit")
        self.index = globus.index("Visits", writers=[self.client])
        globus.settings(run_listed_after_s=1)
        site.settings["throttle"] = {"runs": 40}
        site.settings["globus"] = {
            "client_id": self.client, "collections": {krios: {str(site.data): "/"}}, "poll": "200ms",
            "listed_after": "5s",
        }  # fmt: skip
        retry = {"initial": "500ms", "longest": "5s"}
        move = {
            "from": krios, "to": archive, "path": "/raw", "access": f"group:{group}",
            "index": {"id": self.index, "content": {"visit": "chaos"}},
        }  # fmt: skip
        site.write_rules(
            site.rule("move", start={"globus_transfer": move}, retry=retry),
            site.rule("note", start={"globus_flow": {"flow": flow, "from": krios, "input": {"files": "{files}"}}},
                      retry=retry),
        )  # fmt: skip
        self.environment = {
            **globus.environment(), "TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": SECRET, "GLOBUS_SDK_HTTP_TIMEOUT": "5"
        }

    def faults(self, probability: float) -> None:
        for number, (route, kind) in enumerate(itertools.product(ROUTES, KINDS)):
            # Dice of its own each: with the same, all kinds would come one after the other.
            self.globus.fault(
                route, kind, probability=probability, seed=self.seed * 1_000 + number, **KINDS[kind]
            )

    def start(self, plan: str = "") -> None:
        """Start the daemon; `plan` says where it is to die, in the words of TRIGGER_FAIL."""
        self.site.start(wait=False, env={**self.environment, "TRIGGER_FAIL": plan})

    def write(self, number: int) -> None:
        path = self.site.data / f"grid{number // 100}" / f"m{number:05}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.dice.randbytes(self.dice.randrange(1, 4_000)))

    def work(self, batches: int, kills: int, timeout_s: float) -> None:
        """Write files, and kill the daemon at random instants until all is done."""
        site = self.site
        self.start()
        end = time.monotonic() + timeout_s
        written = 0
        kill_at = time.monotonic() + self.dice.uniform(1.0, 4.0)
        while time.monotonic() < end:
            while written < batches and written < self.done() + 200:
                self.write(written)
                written += 1
            if self.kills < kills and time.monotonic() > kill_at:
                site.kill()
                self.kills += 1
                self.kill_places.update(s for (s,) in site.ask("SELECT state FROM run WHERE final = 0"))
                self.start()
                kill_at = time.monotonic() + self.dice.uniform(1.0, 6.0)
            if written == batches and self.kills >= kills and self.done() >= batches:
                return
            time.sleep(0.05)
        left = site.ask("SELECT state, because, count(*) FROM run WHERE final = 0 GROUP BY 1, 2")
        raise AssertionError(f"after {timeout_s:g} s {self.done()} of {batches} are done; {left[:10]}; {site.tail()}")

    def done(self) -> int:
        """Return how many batches have come to their end in both rules."""
        try:
            rows = self.site.ask(
                "SELECT rule.name, count(*) FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule"
                " WHERE run.final = 1 GROUP BY 1"
            )
        except Exception:  # noqa: BLE001  the journal is not there yet
            return 0
        ended = dict(rows)
        return min(ended.get("move", 0), ended.get("note", 0))

    def judge(self) -> dict[str, Any]:
        """Return the figures; raise AssertionError for a broken promise."""
        site, globus = self.site, self.globus
        rows = site.ask(
            "SELECT run.id, rule.name, run.state, run.attempts, batch.manifest FROM run JOIN batch USING (id)"
            " JOIN rule ON rule.id = batch.rule"
        )
        wrong = [(n, rule, state) for n, rule, state, *_ in rows
                 if state != {"move": "VERIFIED", "note": "SUCCEEDED"}[rule]]  # fmt: skip
        assert not wrong, f"not at their end: {wrong[:5]}"
        for rule in ("move", "note"):
            twice = {version: n for version, n in site.taken(rule).items() if n > 1}
            assert not twice, f"in two batches of {rule}: {list(twice)[:3]}"
            assert site.versions() <= set(site.taken(rule)), f"missed by {rule}"
        assert site.digests(site.data) == site.digests(site.out / "raw"), "the destination differs"

        tasks: dict[str, list[Any]] = defaultdict(list)
        for task in globus.tasks():
            tasks[task["label"].split()[-1]].append(task)
        worked = {token: [t for t in of if t["files_transferred"] or t["bytes_transferred"]]
                  for token, of in tasks.items()}  # fmt: skip
        doubled = {token: len(of) for token, of in worked.items() if len(of) != 1}
        assert not doubled, f"tasks that did work, by batch: {list(doubled.items())[:5]}"
        moved = sum(1 for _, rule, *_ in rows if rule == "move")
        assert len(worked) == moved, f"{len(worked)} batches had a task, of {moved}"
        runs: Counter[str] = Counter()
        numbers = {n for n, rule, *_ in rows if rule == "note"}
        for run in globus.runs():
            runs[run["label"].rsplit(" ", 1)[0]] += 1
        several = {label: n for label, n in runs.items() if n > 1}
        assert not several, f"flow runs of one batch: {list(several.items())[:5]}"
        assert len(runs) == len(numbers), f"{len(runs)} batches had a run, of {len(numbers)}"
        proofs = dict(site.ask("SELECT run, count(*) FROM proof GROUP BY run"))
        unproved = [n for n, rule, *_ in rows if rule == "move" and not proofs.get(n)]
        assert not unproved, f"without proof: {unproved[:5]}"
        self._published(moved)
        requests = globus.requests()
        return {
            "batches": moved, "kills": self.kills, "killed while": dict(self.kill_places),
            "tasks": sum(map(len, tasks.values())), "runs": sum(runs.values()), "requests": len(requests),
            "attempts": sum(row[3] for row in rows),
            "faults met": sum(1 for one in requests if one.get("fault")),
        }  # fmt: skip

    def _published(self, batches: int) -> None:
        """One permission in all, and one entry of the index for each batch."""
        asked = self.globus.requests("POST /v0.10/endpoint/*/access")
        made = [one for one in asked if one["carried_out"] and one["status"] == 201]
        assert len(made) == 1, f"{len(made)} permissions were made"
        entries = self.globus.entries(self.index)
        assert len(entries) == batches, f"{len(entries)} entries in the index, of {batches} batches"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--probability", type=float, default=0.01, help="of each fault, at each request")
    parser.add_argument("--timeout", type=float, default=3_000.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos", dir=os.environ.get("TMPDIR")) as base:
        chaos = Chaos(Path(base), seed=given.seed)
        began = time.monotonic()
        with chaos.globus:
            chaos.set_up()
            chaos.faults(given.probability)
            try:
                chaos.work(given.batches, given.kills, given.timeout)
                chaos.globus.clear_faults()
                figures = chaos.judge()
            finally:
                chaos.site.stop()
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
