"""Sweep a tree with the daemon's scanner, in a process of its own: `sweeping.py ROOT STATE_DIR`.

Prints JSON: seconds of the first sweep (nothing is known), of a second one
(every file is claimed), of one by the directories' times, of one after one file
in a hundred was changed; CPU of each, and how many files it told of.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from trigger_daemon import garbage
from trigger_daemon.clock import SystemClock
from trigger_daemon.core.model import CLAIM_BASELINE, Claimed, Seen, Sweep, Swept
from trigger_daemon.core.rules import Rule
from trigger_daemon.hints.none import Source
from trigger_daemon.journal import ClaimReader, Journal
from trigger_daemon.scanner import Scanner
from trigger_daemon.sweeps import TICK_S

CHANGED_EVERY = 100
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
    garbage.seldom()  # as the daemon does
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

    figures: dict[str, float] = {}

    def sweep(ask: int, name: str = "", *, full: bool = True) -> None:
        seen.clear()
        cpu_before_s = time.process_time()
        scanner.sweep(Sweep(root_id, full, ask))
        with swept:
            if not swept.wait_for(lambda: max(answers, default=0) >= ask, timeout=600):
                sys.exit(f"sweep {ask} was not answered")
            answer = answers[max(answers)]
        figures[f"{name}_s"] = answer.ended - answer.watermark
        figures[f"{name}_cpu_s"] = time.process_time() - cpu_before_s
        figures[name] = sum(len(fact.rows) for fact in seen)

    # A root is swept once on being opened; that one warms the cache and is not counted.
    sweep(1)
    sweep(2, "first")
    changed = [os.path.join(root, fact.dir, name) for fact in seen for name, _, _ in fact.rows][::CHANGED_EVERY]
    records = [
        Claimed(rule_id, root_id, fact.dir, [(name, state[0], state[1]) for name, state, _ in fact.rows if state],
                CLAIM_BASELINE, time.time())
        for fact in seen
    ]  # fmt: skip
    for start in range(0, len(records), 100):
        journal.append(records[start : start + 100])
    sweep(3, "joined")
    sweep(4, "again")
    time.sleep(TICK_S)  # a directory whose time has just moved is listed once more
    sweep(5, full=False)
    sweep(6, "names", full=False)
    for path in changed:
        os.utime(path)
    sweep(7, "changed")
    scanner.stop()
    journal.close()
    print(json.dumps({**figures, "expected": len(changed)}))


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]))
