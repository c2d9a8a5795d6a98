"""How many frames a file must have: so many as the rule, the mdoc, or its siblings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._mdoc import frames_of
from trigger_daemon.checks._siblings import undecided, usual
from trigger_daemon.checks._words import frames
from trigger_daemon.core.grammar import Option
from trigger_daemon.core.model import Verdict

MDOC, SIBLINGS = "mdoc", "siblings"
FRAMES = Option(
    "int",
    "expected number of frames: fewer are incomplete, more suspect; `mdoc`: so many as its mdoc says (NumSubFrames); "
    "`siblings`: so many as the last files have, any other number is suspect",
    minimum=1, choices=(MDOC, SIBLINGS),
)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of the number of frames.

    `number`: by rule or mdoc; fewer prove that some are missing. `usual`:
    among the siblings. `doubt`: what to say of a file without other faults
    when neither is known although the rule asks for it, and why.
    """

    number: int | None = None
    usual: int | None = None
    doubt: tuple[Verdict, str] | None = None
    measures: bool = False

    def odd(self, count: int) -> str:
        """Return what is odd about so many frames (too few of `number` are not: they are proof), '' if nothing."""
        if self.number is not None and count > self.number:
            return f"{frames(count)} where {self.number:,} were expected"
        if self.usual is not None and count != self.usual:
            return f"{frames(count)} where its siblings have {self.usual:,}"
        return ""

    def measure(self, count: int) -> int | None:
        """Return the number for the siblings to come, if they are asked for."""
        return count if self.measures else None


def expect(wanted: int | str | None, probe: Window, companions: Mapping[str, Window]) -> Expected | Outcome:
    """Return what the option `frames` comes to, or the Outcome that asks for the mdoc."""
    if wanted == SIBLINGS:
        common = usual(probe.siblings)
        doubt = (Verdict.UNKNOWN, undecided(probe.siblings)) if common is None else None
        return Expected(usual=common, doubt=doubt, measures=True)
    if wanted != MDOC:
        return Expected(number=None if wanted is None else int(wanted))
    own = f"{probe.name}.mdoc"
    mdocs = [name for name in companions if name.lower().endswith(".mdoc")]
    if own not in companions and len(mdocs) != 1:
        return Outcome(Verdict.INCOMPLETE, f"its mdoc {own} is not there yet", (own,))
    name = own if own in companions else mdocs[0]
    said = frames_of(companions[name], probe.name, own=name == own)
    return Expected(number=said) if isinstance(said, int) else Expected(doubt=(Verdict.SUSPECT, said))
