"""Amounts in the words of verdicts: decimal units, three digits, as file managers show them."""

from __future__ import annotations

NEVER_WRITTEN = "but parts of it were never written (a program that sets the length first)"


def amount(count: int) -> str:
    """Return a number of bytes for people: `84.0 MB`; below 10 kB the bytes themselves, where each one counts."""
    if count < 10_000:
        return f"{count:,} byte{'' if count == 1 else 's'}"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def progress(done: int, whole: int) -> str:
    """Return `84.0 MB of 168.0 MB`, or both to the byte where rounding would hide the difference."""
    if whole < 10_000 or (done != whole and amount(done) == amount(whole)):
        return f"{done:,} of {whole:,} bytes"
    return f"{amount(done)} of {amount(whole)}"


def frames(count: int) -> str:
    """Return `1 frame`, `40 frames`."""
    return f"{count:,} frame{'' if count == 1 else 's'}"
