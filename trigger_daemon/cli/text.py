"""Text for people: sizes, ages, times and names that a terminal can show, tables that fit it, errors with their hint.

File names come from instruments and their users. They are never written raw: a
control character or an escape sequence in a name is shown, not obeyed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

    from trigger_daemon.cli.tables import Fitted
    from trigger_daemon.errors import ConfigFault

# Controls (C0, DEL, C1), lone surrogates, line separators, marks that change the direction of writing, and what is
# invisible or no character at all.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\ud800-\udfff\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}

WIDTH = 80  # where there is no terminal to ask

_COLOURS = {
    "VERIFIED": "green", "SUCCEEDED": "green", "HELD": "bold red", "INACTIVE": "red", "ACTIVE": "cyan",
    "STARTING": "cyan", "CANCELLING": "yellow", "ABANDONED": "yellow", "ok": "green", "degraded": "yellow",
    "alarm": "bold red", "lost": "bold red", "suspect": "red", "low": "yellow", "critical": "bold red",
    "paused": "yellow", "blocked": "bold red", "verified": "green", "held": "bold red", "removed": "dim",
    "faulty": "bold red", "fault": "bold red", "warning": "yellow", "note": "cyan", "incomplete": "yellow",
    "stopped": "bold red",
}  # fmt: skip


def safe(text: str) -> str:
    """Return a text with everything that a terminal would obey, or cannot show, as an escape."""
    return _UNSAFE.sub(_escape, text)


def name(path: str) -> str:
    """Return a path on one line; one that needs escapes in the quotes in which a shell takes it back."""
    if _UNSAFE.search(path) is None:
        return path
    return "$'" + _UNSAFE.sub(_escape, path.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


# ------------------------------------------------------------------------ numbers


def size(count: float) -> str:
    """Return bytes for people, decimal as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} PB"


def age(seconds: float) -> str:
    """Return how long, in its two largest units."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3_600:
        return f"{seconds // 60:.0f} min"
    if seconds < 86_400:
        return f"{seconds // 3_600:.0f} h {seconds % 3_600 // 60:.0f} min"
    return f"{seconds // 86_400:.0f} d {seconds % 86_400 // 3_600:.0f} h"


def ago(utc: float | None, now: float | None = None) -> str:
    """Return how long ago an instant was."""
    return "" if utc is None else f"{age((time.time() if now is None else now) - utc)} ago"


def clock(utc: float | None) -> str:
    """Return an instant in the machine's time zone; the day only where it is not today."""
    if utc is None:
        return ""
    moment, today = datetime.fromtimestamp(utc).astimezone(), datetime.now().astimezone().date()
    return moment.strftime("%H:%M:%S" if moment.date() == today else "%Y-%m-%d %H:%M:%S")


def looked_next(utc: float | None) -> str:
    """Return when something that waits is looked at next, to be put behind why it waits; '' if that is not known."""
    if utc is None:
        return ""
    left_s = utc - datetime.now(UTC).timestamp()
    return f"; looked at next in {age(left_s)}" if left_s >= 1 else "; looked at now"


def rfc3339(utc: float | None) -> str | None:
    """Return an instant for programs: RFC 3339, UTC, milliseconds."""
    if utc is None:
        return None
    return datetime.fromtimestamp(utc, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def timed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record for JSON: what is called `time` or ends in `_time` as RFC 3339, wherever it lies."""
    return {
        key: rfc3339(value) if _is_time(key, value) else _deeper(value) for key, value in record.items()
    }


def _is_time(key: str, value: Any) -> bool:
    return (key == "time" or key.endswith("_time")) and isinstance(value, int | float) and not isinstance(value, bool)


def _deeper(value: Any) -> Any:
    if isinstance(value, Mapping):
        return timed(value)
    if isinstance(value, list | tuple):
        return [_deeper(item) for item in value]
    return value


def group(captures: Mapping[str, str]) -> str:
    """Return a group in one line."""
    return " ".join(f"{key}={safe(str(value))}" for key, value in captures.items())


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------- places


def console(stream: TextIO | None = None) -> Console:
    """Return rich's console for stdout: colour on a terminal only, no emoji, no markup in what people named."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    out = stream or sys.stdout
    width = None if out.isatty() else _columns()
    return Quiet(file=out, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def _columns() -> int:
    import os

    said = os.environ.get("COLUMNS", "")
    return max(40, int(said)) if said.isdigit() else WIDTH


def table(*columns: str | tuple[str, str], ruled: bool = True) -> Fitted:
    """Return an empty table; a column is its heading (then a path), or (heading, kind), see `tables.Fitted`."""
    from trigger_daemon.cli.tables import Fitted

    return Fitted([column if isinstance(column, tuple) else (column, "path") for column in columns], ruled=ruled)


def row(made: Fitted, *cells: Any) -> None:
    """Add a row; states and healths get their colour."""
    from rich.text import Text

    shown = []
    for cell in cells:
        if isinstance(cell, Text):
            shown.append(cell)
            continue
        text = "" if cell is None else str(cell) if isinstance(cell, int) else safe(str(cell))
        shown.append(Text(text, style=_COLOURS.get(text, "")))
    made.add(shown)


def coloured(word: str, stream: TextIO | None = None) -> str:
    """Return a state in its colour, where colours are shown."""
    import os

    colour = _COLOURS.get(word, "")
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") in ("dumb", "unknown")
    if not colour or plain or not (stream or sys.stdout).isatty():
        return word
    return click.style(word, fg=colour.removeprefix("bold ").replace("dim", "white"), bold=colour.startswith("bold"))


def pairs(rows: Sequence[tuple[str, str]], *, width: int | None = None) -> str:
    """Return aligned `key  value` lines, wrapped between words to `width`; those without a value are left out."""
    import textwrap

    rows = [(key, value) for key, value in rows if value]
    widest = max((len(key) for key, _ in rows), default=0)
    lines = []
    for key, value in rows:
        line = f"{key.ljust(widest)}  {value}"
        if width is not None and len(line) > width:
            line = textwrap.fill(
                value, max(width, widest + 22), initial_indent=f"{key.ljust(widest)}  ", drop_whitespace=True,
                subsequent_indent=" " * (widest + 2), break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        lines.append(line)
    return "\n".join(lines)


# ------------------------------------------------------------------------- errors


def complain(message: str, hint: str = "") -> None:
    """Say on stderr what is wrong and what to do next."""
    click.echo(f"error: {safe(message)}", err=True)
    if hint:
        click.echo(f"hint: {safe(hint)}", err=True)


def note(words: str) -> None:
    """Say something on stderr that is no error."""
    click.echo(safe(words), err=True)


def faults(found: Sequence[ConfigFault]) -> str:
    """Return faults as compilers do: file:line:column: message, the line with a caret, the hint."""
    lines = []
    for fault in found:
        place = ":".join([safe(fault.file), *(str(number) for number in (fault.line, fault.column) if number)])
        lines.append(f"{place}: {safe(fault.message)}")
        if fault.quote and fault.line:
            # The caret stands under the character, whatever is shown for those before it.
            before = safe(fault.quote[: max(0, fault.column - 1)].replace("\t", " "))
            lines.append(f"    {safe(fault.quote.replace(chr(9), ' '))}")
            lines.append(f"    {' ' * _width(before)}^")
        if fault.hint:
            lines.append(f"    hint: {safe(fault.hint)}")
    return "\n".join(lines)


def _width(text: str) -> int:
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def fault_words(fault: ConfigFault) -> dict[str, Any]:
    """Return a fault for JSON."""
    return {
        "file": fault.file, "line": fault.line, "column": fault.column, "message": fault.message, "hint": fault.hint,
    }  # fmt: skip
