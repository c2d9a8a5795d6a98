"""Files of mixed sizes by one of the ways out, while the daemon is killed at random moments.

    python -m tests.ways_chaos --action rclone --files 10000 --kills 10 [--seed N] [--far s3]

All must arrive whole and be verified, each in one batch, with nothing beside
them; and what was verified is never written again, as its inode and change time
tell. `--far` takes a server on loopback instead of a directory: s3, sftp or
webdav for rclone, ssh or daemon for rsync.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # what tests share
from far import FARS, REMOTES, Far, rclone_on_the_path
from tests.site import Site

DONE = "VERIFIED"
LARGEST = 8_000_000
IDLE_S = 10.0  # a kill waits for a run that is under way, but not for longer
WAITING_MAX = 2_000  # files written ahead of what is done


class Chaos:
    """One site, one rule, one destination."""

    def __init__(self, base: Path, action: str, far: Far | None, seed: int) -> None:
        self.dice = random.Random(seed)
        self.site = Site(base / "site", sweep="500ms")
        self.there = self.site.out if far is None else far.there / ("data" if action == "rclone" else "")
        start = {"copy": {"to": str(self.site.out)}} if far is None else {action: far.options()}
        rule = self.site.rule("out", match=["{grid}/*.tif"], start=start, retry={"initial": "500ms", "longest": "5s"})
        self.site.write_rules(rule | {"batch": {"group_by": ["grid"], "files": 50, "idle": "2s"}})
        self.kills = 0
        self.killed_at: dict[str, int] = {}
        self.seen: dict[str, tuple[int, int]] = {}  # of what was verified: inode and change time of its copy

    def write(self, number: int) -> None:
        path = self.site.data / f"grid{number // 200}" / f"m{number:05}.tif"
        path.parent.mkdir(exist_ok=True)
        size = min(LARGEST, int(10 ** self.dice.uniform(2, 5 if number % 100 else 6.9)))
        path.write_bytes(self.dice.randbytes(size))

    def work(self, files: int, kills: int, timeout_s: float) -> None:
        """Write files, and kill the daemon at random moments until all is done."""
        site, end, written = self.site, time.monotonic() + timeout_s, 0
        site.start(wait=False)
        kill_at = time.monotonic() + self.dice.uniform(2.0, 5.0)
        # So that all kills meet files that are still to come, some are kept for each.
        share = max(1, files // (kills + 1))
        while time.monotonic() < end:
            done = self.done()
            while written < min(files, (self.kills + 1) * share if self.kills < kills else files, done + WAITING_MAX):
                self.write(written)
                written += 1
            late = time.monotonic() - kill_at
            if self.kills < kills and (late > IDLE_S or (late > 0 and self.is_at_work())):
                self.kill()
                kill_at = time.monotonic() + self.dice.uniform(1.0, 6.0)
            if written == files and self.kills == kills and done >= files:
                return
            time.sleep(0.05)
        left = site.ask("SELECT state, because, count(*) FROM run WHERE final = 0 GROUP BY 1, 2")
        raise AssertionError(f"after {timeout_s:g} s {self.done()} of {files} are done; {left[:10]}; {site.tail()}")

    def is_at_work(self) -> bool:
        return bool(self.site.ask("SELECT 1 FROM run WHERE final = 0 LIMIT 1"))

    def kill(self) -> None:
        self.site.kill()
        self.kills += 1
        for (state,) in self.site.ask("SELECT state FROM run WHERE final = 0"):
            self.killed_at[state] = self.killed_at.get(state, 0) + 1
        self.note()
        self.site.start(wait=False)

    def verified(self) -> list[str]:
        rows = self.site.ask("SELECT batch.manifest FROM run JOIN batch USING (id) WHERE run.state = ?", DONE)
        return [f"{folder}/{name}" for (text,) in rows for _, folder, name, *_ in json.loads(text)]

    def done(self) -> int:
        return len(self.verified())

    def note(self) -> None:
        """Look at the copies of what is verified; raise AssertionError for one that was written again."""
        for path in self.verified():
            stat = (self.there / path).stat()
            now = (stat.st_ino, stat.st_ctime_ns)
            assert self.seen.setdefault(path, now) == now, f"{path} was written again after it was verified"

    def judge(self) -> dict[str, Any]:
        """Return the figures; raise AssertionError for a broken promise."""
        site = self.site
        states = site.states()
        assert set(states) == {DONE}, f"not at their end: {states}"
        twice = {version: n for version, n in site.taken("out").items() if n > 1}
        assert not twice, f"in two batches: {list(twice)[:3]}"
        assert site.versions() <= set(site.taken("out")), "missed"
        self.note()
        assert site.digests(site.data) == site.digests(self.there), "the destination differs"
        (again,) = site.ask("SELECT sum(attempts - 1) FROM run")[0]
        return {"files": len(self.seen), "batches": states[DONE], "kills": self.kills, "more attempts": again,
                "killed while": self.killed_at, "megabytes": sum(
                    path.stat().st_size for path in site.data.rglob("*.tif")) // 10**6}  # fmt: skip


def run(base: Path, *, action: str, far: str, files: int, kills: int, seed: int, timeout_s: float) -> dict[str, Any]:
    """Do it all; the site ends with it."""
    kinds = {"copy": {}, "rsync": FARS, "rclone": REMOTES}[action]
    server = kinds[far](base / "far") if kinds else None
    with rclone_on_the_path():
        if server is not None:
            server.start()
        chaos = Chaos(base, action, server, seed)
        try:
            chaos.work(files, kills, timeout_s)
            chaos.site.stop()
            return chaos.judge()
        finally:
            if chaos.site.process is not None and chaos.site.process.poll() is None:
                chaos.site.kill()
            if server is not None:
                server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--action", choices=("copy", "rsync", "rclone"), default="rclone")
    parser.add_argument("--far", default="local", help="local, or a server on loopback")
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3_600.0, help="seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos") as work:
        began = time.monotonic()
        figures = run(Path(work), action=given.action, far=given.far, files=given.files, kills=given.kills,
                      seed=given.seed, timeout_s=given.timeout)  # fmt: skip
    print(json.dumps({**figures, "action": given.action, "far": given.far, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
