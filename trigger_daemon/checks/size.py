"""Is the file as long as it must be, or as long as its siblings? For formats that have no check of their own.

What its siblings have is no proof: a file that differs is only suspect.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._siblings import ENOUGH, undecided
from trigger_daemon.checks._words import amount, progress
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {
    "at_least": Option("size", "a shorter file is incomplete", minimum=0),
    "exactly": Option("size", "a shorter file is incomplete, a longer one suspect", minimum=0),
    "siblings": Option("percent", "a file whose size differs by more from the median of the last ones is suspect"),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionFault if there is nothing to compare with."""
    if all(options.get(name) is None for name in OPTIONS):
        raise OptionFault("", "the check `size` has no size to compare with", "add at_least, exactly, or siblings: 5%")
    at_least, exactly = options.get("at_least"), options.get("exactly")
    if at_least is not None and exactly is not None and at_least > exactly:
        raise OptionFault("at_least", "no file is at least so long and exactly shorter", "leave one of them out")
    if (options.get("siblings") or 0.0) > 1.0:
        raise OptionFault("siblings", "a tolerance of more than 100% lets every file pass", "write for example 5%")


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Compare the size with what the rule says; reads nothing."""
    at_least, exactly, tolerance = options.get("at_least"), options.get("exactly"), options.get("siblings")
    for wanted in (exactly, at_least):
        if wanted is not None and probe.size < wanted:
            return Outcome(Verdict.INCOMPLETE, progress(probe.size, wanted))
    measure = None if tolerance is None else probe.size
    if exactly is not None and probe.size > exactly:
        longer = f"{probe.size - exactly:,} bytes longer than the {amount(exactly)} expected"
        return Outcome(Verdict.SUSPECT, longer, measure=measure)
    if tolerance is not None and len(probe.siblings) >= ENOUGH:
        usual = statistics.median(probe.siblings)
        if abs(probe.size - usual) > tolerance * usual:
            return Outcome(Verdict.SUSPECT, _unlike(probe.size, round(usual)), measure=measure)
        return Outcome(Verdict.COMPLETE, f"{amount(probe.size)}, as its siblings", measure=measure)
    if exactly is None and at_least is None:
        why = "the rule gives no size to compare with" if tolerance is None else undecided(probe.siblings)
        return Outcome(Verdict.UNKNOWN, f"{amount(probe.size)}, but {why}", measure=measure)
    return Outcome(Verdict.COMPLETE, f"{amount(probe.size)}, as expected", measure=measure)


def _unlike(size: int, usual: int) -> str:
    if amount(size) == amount(usual):  # rounding hides the difference
        return f"{size:,} bytes where its siblings have {usual:,} bytes"
    return f"{amount(size)} where its siblings have {amount(usual)}"
