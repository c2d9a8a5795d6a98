"""What Globus actions that start something for a batch have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.globus.paths import is_uuid


def uses(value: Any, name: str) -> bool:
    """Say whether `{name}` stands somewhere in nested options, as all of a text."""
    if isinstance(value, Mapping):
        return any(uses(item, name) for item in value.values())
    if isinstance(value, list | tuple):
        return any(uses(item, name) for item in value)
    return bool(value == f"{{{name}}}")


def uuid_of(told: Any) -> str:
    """Return an id that an answer holds. Raises ValueError for what is none: the answer is not Globus's."""
    found = str(told)
    if not is_uuid(found):
        raise ValueError(f"{found[:50]!r} is no id")
    return found


def short(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
