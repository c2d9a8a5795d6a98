"""Say what there is to look at: the roots and destinations of the rules. Runs in a child process, as it reads files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trigger_daemon.actions import Context
from trigger_daemon.config import load_rules, load_settings
from trigger_daemon.errors import TriggerError
from trigger_daemon.registry import find_action


def plan(config: str | None) -> dict[str, Any]:
    """Return roots, destinations, whether a rule uses Globus, how many rules there are, and their faults in words."""
    settings = load_settings(Path(config) if config else None, os.environ)
    read = load_rules(Path(settings.rules_dir), settings)
    writes: set[str] = set()
    for rule in read.rules:
        context = Context(state_dir=os.path.join(settings.state_dir, "actions", rule.action), nudge=lambda *_: None)
        try:
            writes.update(find_action(rule.action)(context).writes(rule.options))
        except TriggerError:
            continue  # a fault of the rules, told with them
    roots = {rule.watch for rule in read.rules}
    roots |= {companion.root for rule in read.rules for companion in rule.complete.companions}
    return {
        "rules": len(read.rules),
        "faults": [f"{fault.file}:{fault.line}: {fault.message}" for fault in read.faults],
        "roots": sorted(roots),
        "writes": sorted(writes),
        "globus": any(rule.action.startswith("globus") for rule in read.rules),
    }
