"""The daemon against a service over HTTP while everything goes wrong: faults at random, and SIGKILLs of both.

    python -m tests.rest_chaos --files 10000 --files-a-batch 25 --kills 10 [--seed N] [--faults 0.01]

The service honours keys. The oracle asks it what it was started for: every
batch exactly one run there, every file in exactly one of them, and every run
here told as succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests import rest
from tests.rest import Service
from tests.site import Site


class Chaos:
    """One site, one service, each a process."""

    def __init__(self, base: Path, *, seed: int = 1, faults: float = 0.01) -> None:
        self.dice = random.Random(seed)
        self.seed, self.faults = seed, faults
        self.site = Site(base / "site", sweep="1s")
        self.service = Service(base / "service")  # to read what lies there: the process is another
        (base / "go").touch()
        self.kills = self.service_kills = 0
        self.killed_while: Counter[str] = Counter()
        self._process: subprocess.Popen[bytes] | None = None

    def set_up(self, files_a_batch: int) -> None:
        self.serve()
        url = self.service.url
        poll = {"url": f"{url}/runs/{{handle}}", "every": "500ms", "succeeded": "state == 'COMPLETED'",
                "failed": "state == 'FAILED'", "active": "state == 'RUNNING'"}  # fmt: skip
        start = {"url": f"{url}/runs", "json": {"files": "{files}"}, "handle": "id", "idempotent": True, "poll": poll,
                 "timeout": "5s"}  # fmt: skip
        self.site.settings["throttle"] = {"runs": 20}
        self.site.write_rules(
            self.site.rule(
                batch={"files": files_a_batch, "idle": "2s"},
                start={"http": start},
                retry={"initial": "500ms", "longest": "5s"},
            )
        )

    def serve(self) -> None:
        """Start the service; after its first life at the same port."""
        argv = [sys.executable, rest.__file__, str(self.service.base), str(self.service.port)]
        argv += ["--faults", str(self.faults), "--seed", str(self.seed + self.service_kills)]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self._process.stdout is not None
        self.service.port = int(self._process.stdout.readline())

    def end(self) -> None:
        self.site.stop()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def work(self, files: int, kills: int, timeout_s: float) -> None:
        """Write files, and kill the daemon, and now and then the service, at random instants until all is done."""
        site = self.site
        site.start(wait=False)
        ends = time.monotonic() + timeout_s
        written, kill_at = 0, time.monotonic() + self.dice.uniform(1.0, 4.0)
        while time.monotonic() < ends:
            upto = min(files, written + max(1, files // 100))
            while written < upto:
                path = site.data / f"grid{written // 500:03}" / f"m{written:06}.tif"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"x" * (1 + written % 7))
                written += 1
            if self.kills < kills and time.monotonic() > kill_at:
                self.killed_while.update(s for (s,) in site.ask("SELECT state FROM run WHERE final = 0"))
                site.kill()
                self.kills += 1
                if self.dice.random() < 0.3 and self._process is not None:
                    self._process.kill()
                    self._process.wait()
                    self.service_kills += 1
                    self.serve()
                site.start(wait=False)
                kill_at = time.monotonic() + self.dice.uniform(1.0, 5.0)
            if written == files and self.kills >= kills and self.done(files):
                return
            time.sleep(0.1)
        left = site.ask("SELECT state, because, count(*) FROM run WHERE final = 0 GROUP BY 1, 2")
        raise AssertionError(f"not done after {timeout_s:g} s: {sum(site.taken().values())} of {files}; {left[:10]}")

    def done(self, files: int) -> bool:
        open_ = self.site.ask("SELECT count(*) FROM run WHERE final = 0")
        taken = self.site.ask("SELECT coalesce(sum(files), 0) FROM batch")
        return bool(open_ and taken) and open_[0][0] == 0 and taken[0][0] >= files

    def judge(self) -> dict[str, Any]:
        """Return the figures; raise AssertionError for a broken promise."""
        site, started = self.site, self.service.runs()
        rows = site.ask("SELECT id, state, attempts FROM run")
        wrong = [row for row in rows if row[1] != "SUCCEEDED"]
        assert not wrong, f"not told as succeeded: {wrong[:5]}"
        twice = {version: n for version, n in site.taken().items() if n > 1}
        assert not twice, f"in two batches: {list(twice)[:3]}"
        assert site.versions() == set(site.taken()), "missed"
        batches = Counter(run["key"].split(".")[0] for run in started)
        several = {batch: n for batch, n in batches.items() if n > 1}
        assert not several, f"accepted more than once: {list(several.items())[:5]}"
        assert len(batches) == len(rows), f"{len(batches)} batches were accepted, of {len(rows)}"
        named = Counter(path for run in started for path in run["body"]["files"])
        assert set(named.values()) == {1}, "a file was named twice"
        assert len(named) == len(site.versions()), "a file was never named"
        unfinished = [run["id"] for run in started if run["state"] != "COMPLETED"]
        assert not unfinished, f"not at their end there: {unfinished[:5]}"
        return {
            "files": len(named), "batches": len(rows), "attempts": sum(row[2] for row in rows), "kills": self.kills,
            "killed while": dict(self.killed_while), "kills of the service": self.service_kills,
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--files-a-batch", type=int, default=25)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=float, default=0.01, help="of some kind, at each request")
    parser.add_argument("--timeout", type=float, default=1_200.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos", dir=os.environ.get("TMPDIR")) as base:
        chaos = Chaos(Path(base), seed=given.seed, faults=given.faults)
        began = time.monotonic()
        try:
            chaos.set_up(given.files_a_batch)
            chaos.work(given.files, given.kills, given.timeout)
            figures = chaos.judge()
        finally:
            chaos.end()
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
