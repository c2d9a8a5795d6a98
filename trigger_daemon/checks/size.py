"""Is the file as long as it must be? For formats that have no check of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._words import amount, progress
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {
    "at_least": Option("size", "a shorter file is incomplete", minimum=0),
    "exactly": Option("size", "a shorter file is incomplete, a longer one suspect", minimum=0),
}


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Compare the size with what the rule says; reads nothing."""
    at_least, exactly = options.get("at_least"), options.get("exactly")
    if at_least is None and exactly is None:
        return Outcome(Verdict.UNKNOWN, "the rule's check `size` says neither at_least nor exactly")
    for wanted in (exactly, at_least):
        if wanted is not None and probe.size < wanted:
            return Outcome(Verdict.INCOMPLETE, progress(probe.size, wanted))
    if exactly is not None and probe.size > exactly:
        return Outcome(Verdict.SUSPECT, f"{probe.size - exactly:,} bytes longer than the {amount(exactly)} expected")
    return Outcome(Verdict.COMPLETE, f"{amount(probe.size)}, as expected")
