"""Draw curves over time as an SVG, with nothing but text. Light and dark pages both show it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 64, 84, 40, 48
STYLE = (
    "text{font:12px sans-serif;fill:#24292f}.grid{stroke:#8b949e;stroke-opacity:.25}.axis{stroke:#57606a}"
    ".level{stroke-dasharray:5 4;stroke:#8b949e}.band{fill:#cf222e;fill-opacity:.12}path{fill:none;stroke-width:1.8}"
    ".c0{stroke:#0969da}.c1{stroke:#bc4c00}.t0{fill:#0969da}.t1{fill:#bc4c00}"
)
DARK = "text{fill:#c9d1d9}.axis{stroke:#8b949e}.c0{stroke:#58a6ff}.c1{stroke:#f0883e}.t0{fill:#58a6ff}.t1{fill:#f0883e}"


class Level(NamedTuple):
    """A height that has a name."""

    name: str
    y: float


class Band(NamedTuple):
    """A time that has a name."""

    name: str
    begin: float
    end: float


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


class Plot(NamedTuple):
    """What is to be seen. `x_step`, `y_step`: from one tick to the next."""

    title: str
    x_name: str
    y_name: str
    x_max: float
    y_max: float
    x_step: float
    y_step: float
    curves: Sequence[Curve]
    levels: Sequence[Level] = ()
    band: Band | None = None

    def svg(self) -> str:
        """Return the document."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}@media(prefers-color-scheme:dark){{{DARK}}}</style>",
        ]
        if self.band is not None:
            left, right = self._x(self.band.begin), self._x(self.band.end)
            lines.append(
                f'<rect class="band" x="{left}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            )
            lines.append(_text((left + right) / 2, TOP + 14, self.band.name, "middle"))
        lines += [*self._ticks(), *self._named_levels()]
        for number, curve in enumerate(self.curves):
            path = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in curve.points)
            lines.append(f'<path class="c{number}" d="M{path}"/>')
            lines.append(_text(LEFT + 12 + 160 * number, TOP - 14, f"— {curve.name}", "start", f"t{number}"))
        return "\n".join([*lines, "</svg>", ""])

    def _x(self, x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / self.x_max, 1)

    def _y(self, y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / self.y_max, 1)

    def _ticks(self) -> list[str]:
        lines = []
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for number in range(int(self.x_max / self.x_step) + 1):
            x = self._x(number * self.x_step)
            lines.append(_line("grid", x, TOP, x, bottom))
            lines.append(_text(x, bottom + 18, f"{number * self.x_step:g}", "middle"))
        for number in range(int(self.y_max / self.y_step) + 1):
            y = self._y(number * self.y_step)
            lines.append(_line("grid", LEFT, y, right, y))
            lines.append(_text(LEFT - 8, y + 4, f"{number * self.y_step:g}", "end"))
        lines += [_line("axis", LEFT, bottom, right, bottom), _line("axis", LEFT, TOP, LEFT, bottom)]
        lines.append(_text((LEFT + right) / 2, HEIGHT - 10, self.x_name, "middle"))
        middle = (TOP + bottom) / 2
        lines.append(
            f'<text transform="translate(18 {middle:g}) rotate(-90)" text-anchor="middle">{escape(self.y_name)}</text>'
        )
        return lines

    def _named_levels(self) -> list[str]:
        right = WIDTH - RIGHT
        lines = []
        for level in self.levels:
            y = self._y(level.y)
            lines.append(_line("level", LEFT, y, right, y))
            lines.append(_text(right + 6, y + 4, level.name, "start"))
        return lines


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def thinned(points: Sequence[tuple[float, float]], most: int = 700) -> list[tuple[float, float]]:
    """Return so many of the points, each the lowest of its time: what is worst is not lost."""
    step = max(1, -(-len(points) // most))
    return [min(points[at : at + step], key=lambda point: point[1]) for at in range(0, len(points), step)]
