"""Has SerialEM's mdoc a last section as full as the earlier ones, and as many sections as expected?

A file that is cut exactly at a section's end looks whole; a tilt series is
only known to be finished by its number of sections: say `sections`. A section
that is the only one of its kind, as of a single movie, is never surely
finished: which keys follow DateTime, if any, differs from SerialEM to SerialEM
(NavigatorLabel, FilterSlitAndLoss, UncroppedSize, TimeStamp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._mdoc import BYTES_MAX, FRAME_SET, sections
from trigger_daemon.checks._words import amount
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {
    "sections": Option("int", "expected number of sections (tilts); fewer is incomplete, more is suspect", minimum=1),
}

FRAME_SET_KEYS = ("NumSubFrames", "DateTime")  # what a frame set alone must have


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Read the whole file, once."""
    if probe.size > BYTES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{amount(probe.size)} are too many to be looked at")
    data = probe.read(0, BYTES_MAX)
    if not data.strip(b"\0 \t\r\n"):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    found = sections(data)
    expected = options.get("sections")
    have = f"{len(found):,} section{'' if len(found) == 1 else 's'}"
    if expected is not None:
        have = f"{len(found):,} of {expected:,} sections"
    if not data.endswith(b"\n"):
        return Outcome(Verdict.INCOMPLETE, f"{have}, and the last line has no end")
    if not found or (expected is not None and len(found) < expected):
        return Outcome(Verdict.INCOMPLETE, have)
    last = found[-1]
    earlier = [section.values.keys() for section in found[:-1] if section.kind == last.kind]
    wanted = set.intersection(*map(set, earlier)) if earlier else set()
    if len(found) == 1 and last.kind == FRAME_SET:
        wanted = set(FRAME_SET_KEYS)
    if not last.values:
        return Outcome(Verdict.INCOMPLETE, f"{have}, the last one still empty")
    if missing := sorted(wanted - last.values.keys()):
        return Outcome(Verdict.INCOMPLETE, f"{have}, the last one without {', '.join(missing[:3])}")
    if expected is not None and len(found) > expected:
        return Outcome(Verdict.SUSPECT, f"{len(found):,} sections where {expected:,} were expected")
    if b"\0" in data:
        return Outcome(Verdict.SUSPECT, f"{have}, but bytes in it that are no text")
    if not earlier:
        return Outcome(Verdict.UNKNOWN, f"{have}, and no other to compare its last lines with: more may follow")
    if expected is None:
        return Outcome(Verdict.UNKNOWN, f"{have}, and more may follow: the rule gives no number to compare with")
    return Outcome(Verdict.COMPLETE, have)
