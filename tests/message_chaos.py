"""Messages of the action `mqtt` while everything dies: the daemon by SIGKILL, the broker by hanging.

`python -m tests.message_chaos` writes files, kills the real daemon at random moments, and asks a subscriber of its own
what came: each batch at least once, what came twice under one id, nothing that no batch is. The journal says which
batches there are, the writer which files.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.broker import Broker, Listener, running
from tests.site import Site

HANG_S = 6.0  # longer than a broker has for an answer: what is on its way is given up, and told again
PATIENCE_S = 180.0


@dataclass(frozen=True, slots=True)
class Report:
    """What came; `broken` names each promise that was not kept."""

    seed: int
    files: int
    batches: int
    kills: int
    hangs: int
    messages: int
    repeated: int  # messages beyond the first of their batch
    attempts_max: int
    seconds: float
    broken: tuple[str, ...]


def chaos(base: Path, *, files: int, batch: int, kills: int, hangs: int, seed: int, per_s: float = 400.0) -> Report:
    """Write so many files, with so many kills and hangs meanwhile; return what came of it."""
    rand, began = random.Random(seed), time.monotonic()
    with running(base / "broker", topics=["write facility/#"]) as broker:
        listener = Listener(broker, "facility/#")
        site = Site(base / "site", quiescence="100ms", sweep="500ms")
        site.settings["mqtt"] = broker.settings()
        site.write_rules(site.rule(
            batch={"files": batch, "idle": "2s"}, retry={"initial": "100ms", "longest": "500ms"},
            start={"mqtt": {"topic": "facility/batches", "files": True}},
        ))  # fmt: skip
        site.start()
        try:
            writer = threading.Thread(target=_write, args=(site.data, files, per_s))
            writer.start()
            _disturb(site, broker, rand, files / per_s, kills, hangs)
            writer.join()
            site.until(lambda: _all_told(site, files), PATIENCE_S, "every file's batch has ended")
            broken, runs = _judge(site, listener, files)
        finally:
            site.stop()
            listener.close()
        told = listener.of("batches")
        (attempts,) = site.ask("SELECT max(attempt) FROM attempt")[0]
    return Report(
        seed, files, runs, kills, hangs, len(told), len(told) - len({message["run"] for message in told}), attempts,
        round(time.monotonic() - began, 1), broken,
    )  # fmt: skip


def _write(data: Path, files: int, per_s: float) -> None:
    for number in range(files):
        (data / f"{number:06}.cbf").write_bytes(b"image %d" % number)
        time.sleep(1 / per_s)  # the instrument's pace; the daemon is another process


def _disturb(site: Site, broker: Broker, rand: random.Random, for_s: float, kills: int, hangs: int) -> None:
    """Kill the daemon and hang the broker at random moments, most of them while there is work."""
    for what in rand.sample(["kill"] * kills + ["hang"] * hangs, kills + hangs):
        time.sleep(rand.uniform(0.0, 1.5 * for_s / max(1, kills + hangs)))
        if what == "kill":
            site.kill()
            site.start()
        else:
            broker.hang()
            time.sleep(HANG_S)
            broker.go()


def _all_told(site: Site, files: int) -> bool:
    (batched,) = (site.ask("SELECT coalesce(sum(files), 0) FROM batch") or [(0,)])[0]
    return bool(batched >= files) and not site.ask("SELECT 1 FROM run WHERE final = 0")


def _judge(site: Site, listener: Listener, files: int) -> tuple[tuple[str, ...], int]:
    """Return what is broken, and how many batches there are."""
    runs: dict[int, str] = dict(site.ask("SELECT id, state FROM run"))  # type: ignore[arg-type]
    last = max(runs)
    listener.say("facility/fence", {"fence": last})
    listener.until("fence", lambda told: told["fence"] == last, 30)
    ids, members = defaultdict(set), defaultdict(set)
    for message in listener.of("batches"):
        ids[message["run"]].add(message["id"])
        members[message["run"]] |= {member["path"] for member in message["members"]}
    named = [path for paths in members.values() for path in paths]
    promises = {
        f"runs that did not succeed: {sorted(run for run in runs if runs[run] != 'SUCCEEDED')[:5]}":
            set(runs.values()) == {"SUCCEEDED"},
        f"batches that were never told: {sorted(runs.keys() - ids.keys())[:5]}": runs.keys() <= ids.keys(),
        f"messages of no batch: {sorted(ids.keys() - runs.keys())[:5]}": ids.keys() <= runs.keys(),
        "one batch told under several ids": all(len(names) == 1 for names in ids.values()),
        "one id for several batches": len({name for names in ids.values() for name in names}) == len(ids),
        f"{len(set(named))} of {files} files were told": len(set(named)) == files,
        "a file told by two batches": len(named) == len(set(named)),
    }  # fmt: skip
    return tuple(words for words, kept in promises.items() if not kept), len(runs)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--files", type=int, default=10_000)
    ask.add_argument("--batch", type=int, default=20)
    ask.add_argument("--kills", type=int, default=10)
    ask.add_argument("--hangs", type=int, default=2)
    ask.add_argument("--seed", type=int, default=random.randrange(10**6))
    told = ask.parse_args()
    with tempfile.TemporaryDirectory() as base:
        report = chaos(Path(base), **vars(told))
    print(json.dumps(asdict(report)))
    raise SystemExit(bool(report.broken))


if __name__ == "__main__":
    main()
