"""What a part of the proof has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Result:
    """Of one part: figures, broken promises with words to repeat them, what could not be done, and a table."""

    part: str
    figures: Mapping[str, int | float | str] = field(default_factory=dict)
    violations: Sequence[str] = ()
    not_done: Sequence[str] = ()
    rows: Sequence[Mapping[str, str]] = ()
