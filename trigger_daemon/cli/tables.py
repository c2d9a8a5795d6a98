"""Tables that fit the terminal: what gives way when it is narrow, and how.

Imports rich, which costs time: `text.table` loads it when there is a table to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Columns of a kind shrink, the widest first, down to so many characters; then the next. Numbers never do, and states
# last: none is broken that could be whole.
_GIVE_WAY = (
    ("wide", 24), ("group", 24), ("name", 14), ("path", 20), ("wide", 16), ("group", 16), ("name", 10), ("wide", 10),
    ("path", 10), ("group", 10), ("name", 6), ("word", 8), ("wide", 6),
)  # fmt: skip
_GAP = 2  # between columns
_LINES_MAX = 2  # of a cell of kind "two" or "group"


class Fitted(Table):
    """A table of columns (heading, kind).

    Kinds: right (numbers), word (states), name (one line, cut with an
    ellipsis), path (broken anywhere), wide (wraps), two (wraps to two lines,
    then cut), group (as two, and gives way later).
    """

    def __init__(self, columns: Sequence[tuple[str, str]], *, ruled: bool = True) -> None:
        """Take the columns; not `ruled`: without the line below the headings, and without headings if all are ''."""
        if ruled:
            super().__init__(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
        else:
            super().__init__(
                box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim",
                show_header=any(heading for heading, _ in columns),
            )  # fmt: skip
        self._kinds = [kind for _, kind in columns]
        for heading, kind in columns:
            self.add_column(
                heading,
                justify="right" if kind == "right" else "left",
                no_wrap=kind in ("right", "word", "name"),
                overflow="ellipsis" if kind in ("word", "name") else "fold",
            )

    def add(self, cells: Sequence[Text]) -> None:
        """Add a row."""
        pairs = zip(self._kinds, cells, strict=True)
        self.add_row(*(TwoLines(cell) if kind in ("two", "group") else cell for kind, cell in pairs))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give each column its width for the place it is printed at."""
        natural = [
            max(console.measure(cell, options=options).maximum for cell in (column.header, *column.cells))
            for column in self.columns
        ]
        for column, width in zip(self.columns, fit(natural, self._kinds, options.max_width), strict=True):
            column.width = width
        return super().__rich_console__(console, options)


class TwoLines:
    """A text that wraps to two lines and is cut there: the first thing it says matters most."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return what it takes on one line."""
        return Measurement.get(console, options, self._text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines."""
        lines = self._text.wrap(console, options.max_width, overflow="fold")
        yield from lines[: _LINES_MAX - 1]
        rest = lines[_LINES_MAX - 1 :]
        if len(rest) == 1:
            yield rest[0]
        elif rest:
            last = Text(rest[0].plain.rstrip() + "…", style=self._text.style)
            last.truncate(options.max_width, overflow="ellipsis")
            yield last


def fit(natural: Sequence[int], kinds: Sequence[str], width: int) -> list[int]:
    """Return widths of columns with which a table has no more than `width`, as far as _GIVE_WAY goes."""
    found = list(natural)
    kinds = ["wide" if kind == "two" else kind for kind in kinds]
    excess = sum(found) + _GAP * (len(found) - 1) - width
    for kind, least in _GIVE_WAY:
        those = [index for index, of in enumerate(kinds) if of == kind and found[index] > least]
        while excess > 0 and those:
            widest = max(those, key=found.__getitem__)
            if found[widest] <= least:
                break
            found[widest] -= 1
            excess -= 1
    return found
