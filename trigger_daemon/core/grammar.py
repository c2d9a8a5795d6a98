"""The small grammar of values in rules: durations, sizes, rates, and declared options.

Checks and actions declare their options with `Option`; `config.py` validates
them and knows file, line and column; this module knows only values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
SIZE_UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50,
}
BIT_UNITS = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}

_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"{_NUMBER}\s*(ms|s|m|h|d)")
_SIZE = re.compile(rf"{_NUMBER}\s*({'|'.join(SIZE_UNITS)})")
_PERCENT = re.compile(rf"{_NUMBER}\s*%")
_RATE = re.compile(rf"{_NUMBER}\s*({'|'.join([*SIZE_UNITS, *BIT_UNITS])})/s")

Kind = Literal[
    "text", "int", "bool", "size", "rate", "duration", "percent", "enum", "texts", "ints", "list", "map", "uuid"
]


def duration_s(text: str) -> float:
    """Return seconds for `500ms 30s 5m 2h 7d`; raise ValueError with what was expected."""
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, such as 500ms, 30s, 5m, 2h or 7d")
    return float(found[1]) * DURATION_UNITS_S[found[2]]


def size_bytes(text: str) -> int:
    """Return bytes for `10MB 1.5GB` (decimal) or `64MiB` (binary); raise ValueError with what was expected."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as 10MB, 1.5GB or 64MiB")
    return round(float(found[1]) * SIZE_UNITS[found[2]])


def rate_bytes_per_s(text: str) -> int:
    """Return bytes per second for `200MB/s` or `2Gbit/s`; raise ValueError with what was expected."""
    found = _RATE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a rate; write for example 200MB/s or 2Gbit/s")
    unit = found[2]
    factor = SIZE_UNITS[unit] if unit in SIZE_UNITS else BIT_UNITS[unit] / 8
    return round(float(found[1]) * factor)


def percentage(text: str) -> float:
    """Return the ratio for `5%`; raise ValueError with what was expected."""
    found = _PERCENT.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a percentage; write for example 5%")
    return float(found[1]) / 100


def nearest(word: str, known: Collection[str], noun: str = "") -> str:
    """Return a hint for a word nobody knows: the nearest one, or all."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    if not known:
        return f"there is no {noun or 'other'} at all"
    shown = sorted(known)
    return f"known are: {', '.join(shown[:20])}{', ...' if len(shown) > 20 else ''}"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an action or a check.

    `kind` text, int, bool, size (bytes), rate (bytes/s), duration (s), percent
    (a ratio), enum (one of `choices`; int and duration take these words, too),
    texts (one string or a list of strings), ints (one number or a list), list
    (any values), map (string keys, any values). `template`: strings in it may hold {captures}.
    `null` is accepted where `default` is None and the option is not required.
    """

    kind: Kind
    doc: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    template: bool = False
    minimum: int | None = None


Options = Mapping[str, Option]


@dataclass(frozen=True, slots=True)
class OptionFault(Exception):
    """An option's value is wrong; `option` names it ('' for the whole, `poll.url` for one key of a mapping).

    Several are raised as an ExceptionGroup.
    """

    option: str
    message: str
    hint: str = field(default="")


def raise_all(faults: Iterable[OptionFault]) -> None:
    """Raise what is wrong, if anything is: a person mends it all at once."""
    several = tuple(faults)
    if len(several) == 1:
        raise several[0]
    if several:
        raise ExceptionGroup("options", several)
