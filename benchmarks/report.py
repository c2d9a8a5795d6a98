"""The table and the picture of the targets: our figure, the other's, the ratio, and how far the raw limit is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from measure import EMPTY, Found
from writer import Writer

WIDTH, LINE, LEFT, RIGHT, TOP = 860, 22, 430, 70, 44
LEAST, MOST = 0.01, 10.0  # of the picture's axis; what lies beyond stands at its edge


@dataclass(frozen=True)
class Plan:
    """Where to work, and how much.

    `arena` holds watched files (in memory, so that the writer is not the disk's),
    `disk` the journals and what is copied: memory has nothing to make durable.
    """

    arena: Path
    disk: Path
    build: Path
    writer: Writer
    repeat: int
    quick: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Row:
    """One figure and what it is judged by: its ratio to another's, or itself where nobody else has it.

    Sequences hold one value a round. `bound` None: told, but there is no target.
    """

    target: int
    what: str
    ours: Sequence[float]
    unit: str = ""
    against: str = ""
    theirs: Sequence[float] = ()
    ratios: Sequence[float] = ()
    bound: float | None = None
    at_least: bool = False
    raw: str = ""
    raw_ratios: Sequence[float] = ()
    note: str = ""
    load: float = 0.0  # of the machine when it was measured

    @property
    def judged(self) -> Sequence[float]:
        return self.ratios if self.against else self.ours

    @property
    def reached(self) -> bool | None:
        if self.bound is None or not self.judged:
            return None
        value = statistics.median(self.judged)
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def missed_by(self) -> float | None:
        """Return by which factor it is worse than its target; below 1 it is better. None: cannot be told."""
        if self.bound is None or not self.judged:
            return None
        value = statistics.median(self.judged)
        better, worse = (value, self.bound) if self.at_least else (self.bound, value)
        if better <= 0:
            return 1.0 if worse <= 0 else math.inf
        return worse / better

    def cells(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        aim = EMPTY if self.bound is None else f"{sign} {short(self.bound)}{' ×' if self.against else ''}"
        answer = {None: EMPTY, True: "yes", False: "**no**"}[self.reached]
        raw = f"{spread(self.raw_ratios)} × {self.raw}" if self.raw_ratios else EMPTY
        return [
            str(self.target), self.what, f"{spread(self.ours)} {self.unit}".strip(), self.against or EMPTY,
            f"{spread(self.theirs)} {self.unit}".strip() if self.theirs else EMPTY,
            f"{spread(self.ratios)} ×" if self.ratios else EMPTY, aim, answer, raw, f"{self.load:.0f}",
            self.note or EMPTY,
        ]  # fmt: skip


HEAD = ["#", "what", "ours", "beside", "theirs", "ratio", "target", "reached", "to the raw limit", "load", "remark"]


def compared(
    target: int, what: str, found: Found, figure: str, *, ours: str, against: str, bound: float | None = None,
    at_least: bool = False, unit: str = "", raw: str = "", scale: float = 1.0, note: str = "",
) -> Row:  # fmt: skip
    """Make a row of what was measured in turns. `scale`: of the figures that are shown."""
    return Row(
        target, what, [value * scale for value in found.values(ours, figure)], unit, against,
        [value * scale for value in found.values(against, figure)], found.ratios(ours, against, figure), bound,
        at_least, raw, found.ratios(ours, raw, figure) if raw else (),
        note or found.failed.get(ours, "") or found.failed.get(against, ""),
    )  # fmt: skip


def short(value: float) -> str:
    """Return a number with three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 5 else f"{value:.1e}"


def spread(values: Sequence[float]) -> str:
    """Return the median, and the least and the most where there are several."""
    if not values:
        return EMPTY
    middle = short(statistics.median(values))
    if len(values) == 1 or max(values) == min(values):
        return middle
    return f"{middle} ({short(min(values))}–{short(max(values))})"


def table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells())} |" for row in rows]
    return "\n".join([*lines, ""])


def picture(rows: Sequence[Row]) -> str:
    """Draw for each row by which factor it is better or worse than its target, as SVG."""
    shown = [(row, worse) for row in rows if (worse := row.missed_by) is not None]
    height = TOP + LINE * len(shown) + 36
    bottom = height - 30
    at: Callable[[float], float] = lambda value: round(  # noqa: E731
        LEFT + (WIDTH - LEFT - RIGHT) * math.log(min(max(value, LEAST), MOST) / LEAST) / math.log(MOST / LEAST), 1
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Each figure divided by its target: left of the line it is reached</title>",
        "<style>text{font:12px sans-serif;fill:#24292f}.grid{stroke:#8b949e;stroke-opacity:.25}.aim{stroke:#57606a;"
        "stroke-width:1.5}.yes{fill:#1a7f37}.no{fill:#cf222e}.ys{stroke:#1a7f37}.ns{stroke:#cf222e}"
        "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}.aim{stroke:#8b949e}.yes{fill:#3fb950}.no{fill:#f85149}"
        ".ys{stroke:#3fb950}.ns{stroke:#f85149}}</style>",
        f'<text x="{LEFT}" y="18">better than its target</text>',
        f'<text x="{at(1.0) + 8}" y="18">worse</text>',
    ]
    for tick in (0.01, 0.1, 0.5, 1, 2, 10):
        kind = "aim" if tick == 1 else "grid"
        lines.append(f'<line class="{kind}" x1="{at(tick)}" y1="{TOP - 14}" x2="{at(tick)}" y2="{bottom}"/>')
        lines.append(f'<text x="{at(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for number, (row, worse) in enumerate(shown):
        y = TOP + LINE * number
        good = bool(row.reached)
        name = f"{row.target} {row.what}{f' / {row.against}' if row.against else ''}"
        edges = [worse * value / statistics.median(row.judged) for value in row.judged if statistics.median(row.judged)]
        if row.at_least:
            edges = [worse * worse / edge for edge in edges if edge]
        if len(edges) > 1:
            ends = f'x1="{at(min(edges))}" y1="{y}" x2="{at(max(edges))}" y2="{y}"'
            lines.append(f'<line class="{"ys" if good else "ns"}" {ends}/>')
        lines.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<circle class="{"yes" if good else "no"}" cx="{at(worse)}" cy="{y}" r="4"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y + 4}">{short(worse) if worse < 100 else "lost"}</text>')
    return "\n".join([*lines, "</svg>", ""])


def plain(row: Row) -> dict[str, Any]:
    """Return every single figure of a row, for another program; `row_of` reads it."""
    return {**asdict(row), "reached": row.reached}


def row_of(told: dict[str, Any]) -> Row:
    return Row(**{field.name: told[field.name] for field in fields(Row) if field.name in told})
