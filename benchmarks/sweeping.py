"""Sweep a tree with the daemon's scanner, in a process of its own: `sweeping.py ROOT STATE_DIR`.

Prints JSON: seconds of the first sweep (nothing is known), of a second one
(every file is claimed), files seen by each, and memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from trigger_daemon.clock import SystemClock
from trigger_daemon.core.model import CLAIM_BASELINE, Claimed, Seen, Sweep, Swept
from trigger_daemon.core.rules import Rule
from trigger_daemon.hints.none import Source
from trigger_daemon.journal import ClaimReader, Journal
from trigger_daemon.scanner import Scanner

NEVER_S = 1e6  # the scanner's own sweeps must not come in between


class Identities:
    """What is known of each root's file system, forgotten at the end."""

    def __init__(self) -> None:
        self._known: dict[int, dict[str, Any]] = {}

    def get(self, root: int) -> dict[str, Any] | None:
        return self._known.get(root)

    def set(self, root: int, identity: dict[str, Any]) -> None:
        self._known[root] = identity


def main(root: str, state_dir: str) -> None:
    journal = Journal.open(Path(state_dir))
    rule_id = journal.rule_ids(["bench"])["bench"]
    root_id = journal.root_id(root)
    rule = Rule(
        id=rule_id, name="bench", watch=root, match=("**/*.tif",), existing="process", action="command", options={}
    )
    seen: list[Seen] = []
    swept = threading.Condition()
    answers: dict[int, Swept] = {}

    def post(fact: Any) -> None:
        if isinstance(fact, Seen):
            seen.append(fact)
        elif isinstance(fact, Swept) and fact.ok:
            with swept:
                answers[fact.asked] = fact
                swept.notify_all()

    scanner = Scanner(
        post=post, claims=partial(ClaimReader, journal.path), hints=Source(), clock=SystemClock(),
        every_s=NEVER_S, full_s=NEVER_S, identities=Identities(),
    )
    scanner.use([rule], {root: root_id})

    def sweep(ask: int) -> tuple[float, int]:
        seen.clear()
        scanner.sweep(Sweep(root_id, True, ask))
        with swept:
            if not swept.wait_for(lambda: max(answers, default=0) >= ask, timeout=600):
                sys.exit(f"sweep {ask} was not answered")
            answer = answers[max(answers)]
        return answer.ended - answer.watermark, sum(len(fact.rows) for fact in seen)

    # A root is swept once on being opened; that one warms the cache and is not counted.
    sweep(1)
    first_s, first_files = sweep(2)
    records = [
        Claimed(rule_id, root_id, fact.dir, [(name, state[0], state[1]) for name, state, _ in fact.rows if state],
                CLAIM_BASELINE, time.time())
        for fact in seen
    ]
    for start in range(0, len(records), 100):
        journal.append(records[start : start + 100])
    again_s, again_files = sweep(3)
    scanner.stop()
    journal.close()
    print(json.dumps({
        "first_s": first_s, "first_files": first_files, "again_s": again_s, "again_files": again_files,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]))
