"""What is usual among the last files of a rule. It is no proof of anything: a file that differs is only suspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ENOUGH = 3  # files that agree, before a number is called usual


def usual(measures: Sequence[int]) -> int | None:
    """Return the number that the newest three (they stand last) or else the most have; None while fewer than three do.

    The newest three go first, so that a new setting of the camera is learnt
    from three files.
    """
    newest = measures[-ENOUGH:]
    if len(newest) == ENOUGH and len(set(newest)) == 1:
        return newest[0]
    common = Counter(reversed(measures)).most_common(1)  # of equally many the newer
    return common[0][0] if common and common[0][1] >= ENOUGH else None


def undecided(measures: Sequence[int]) -> str:
    """Say why nothing is usual."""
    if len(measures) < ENOUGH:
        return f"only {len(measures)} of {ENOUGH} siblings to compare with so far"
    return f"its siblings do not agree ({', '.join(f'{measure:,}' for measure in measures)})"
