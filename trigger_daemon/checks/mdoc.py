"""Has SerialEM's mdoc a last section as full as the earlier ones, and as many sections as expected?

A file that is cut exactly at a section's end looks whole; a tilt series is
only known to be finished by its number of sections: say `sections`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._words import amount
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {
    "sections": Option("int", "expected number of sections (tilts); fewer is incomplete, more is suspect", minimum=1),
}

BYTES_MAX = 4 * 2**20  # a tilt series of 41 has 20 kB
FRAME_SET_KEYS = ("NumSubFrames", "DateTime")  # what a frame set alone must have


@dataclass(slots=True)
class _Section:
    kind: str
    keys: set[str] = field(default_factory=set)


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Read the whole file, once."""
    if probe.size > BYTES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{amount(probe.size)} are too many to be looked at")
    data = probe.read(0, BYTES_MAX)
    if not data.strip(b"\0 \t\r\n"):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    sections = _sections(data.decode("utf-8", "replace"))
    expected = options.get("sections")
    have = f"{len(sections):,} section{'' if len(sections) == 1 else 's'}"
    if expected is not None:
        have = f"{len(sections):,} of {expected:,} sections"
    if not data.endswith(b"\n"):
        return Outcome(Verdict.INCOMPLETE, f"{have}, and the last line has no end")
    if not sections or (expected is not None and len(sections) < expected):
        return Outcome(Verdict.INCOMPLETE, have)
    last = sections[-1]
    earlier = [section.keys for section in sections[:-1] if section.kind == last.kind]
    wanted = set.intersection(*earlier) if earlier else set()
    if len(sections) == 1 and last.kind == "FrameSet":
        wanted = set(FRAME_SET_KEYS)
    if missing := sorted(wanted - last.keys):
        return Outcome(Verdict.INCOMPLETE, f"{have}, the last one without {', '.join(missing[:3])}")
    if expected is not None and len(sections) > expected:
        return Outcome(Verdict.SUSPECT, f"{len(sections):,} sections where {expected:,} were expected")
    if expected is None and not (len(sections) == 1 and last.kind == "FrameSet"):
        return Outcome(Verdict.UNKNOWN, f"{have}, and more may follow: the rule gives no number to compare with")
    return Outcome(Verdict.COMPLETE, have)


def _sections(text: str) -> list[_Section]:
    sections: list[_Section] = []
    for line in text.split("\n"):
        key, equals, _ = line.strip().partition("=")
        key = key.strip()
        if key.startswith("["):
            if key != "[T" and line.rstrip().endswith("]"):
                sections.append(_Section(key[1:].strip()))
        elif equals and sections:
            sections[-1].keys.add(key)
    return sections
