"""Test what the daemon stands on: each finding is one line, and a remedy where one is needed.

Whatever may lie on a dead mount is looked at by a child process (`apart`), so
that no question here takes longer than its deadline. Nothing is changed but for
a hidden canary in watched directories and destinations, which is removed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "note", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "fault")

# What `--only` takes, in the order in which it is told.
CHECKS = (
    "daemon", "rules", "roots", "inotify", "space", "journal", "destinations", "credentials", "broker", "clock",
)  # fmt: skip


class Finding(NamedTuple):
    """`about`: a path or a name, '' for the machine; `figures`: what was measured, with units in the names."""

    check: str
    about: str
    level: Level
    what: str
    hint: str = ""
    figures: Mapping[str, Any] = {}
