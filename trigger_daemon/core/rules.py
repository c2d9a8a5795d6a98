"""A rule, as the core knows it: frozen values, already checked by `config.py`.

Durations in seconds, sizes in bytes, rates in bytes per second. Patterns are
source text; `core/patterns.py` compiles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BUILT_IN_IGNORES = (".*", "*.tmp", "*.part", "*.partial", "*downloading", ".*.??????")
HIDDEN = ".trigger-daemon-reclaim-"  # what reclaim takes away is called so meanwhile; no rule ever wants it
CANARY = ".trigger-daemon-doctor-"  # what `doctor` writes to see whether it is heard of, and removes; neither this

CheckSpec = tuple[str, Mapping[str, Any]]  # name of the check, its options


@dataclass(frozen=True, slots=True)
class With:
    """A companion: a file that must come with another."""

    file: str
    root: str  # absolute; the rule's own root where `in` is absent
    checks: tuple[CheckSpec, ...] = ()
    wait_s: float = 600.0
    missing: Literal["block", "go"] = "block"
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Complete:
    quiescence_s: float = 30.0
    trust: frozenset[str] = frozenset()  # close, rename
    checks: tuple[CheckSpec, ...] = ()
    suspect_s: float | None = 300.0  # None: block
    companions: tuple[With, ...] = ()
    allow_empty: bool = False
    stalled_after_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class CloseOn:
    """A marker file that closes open groups."""

    file: str
    checks: tuple[CheckSpec, ...] = ()
    quiescence_s: float | None = None  # None: the rule's own
    include: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    group_by: tuple[str, ...] = ()
    files: int | None = None
    bytes: int | None = None
    oldest_waits_s: float | None = None
    idle_s: float | None = None
    expect: int | None = None
    close_on: CloseOn | None = None
    only_first: int | None = None
    new_group_after_s: float | None = None
    at: tuple[str, ...] = ()  # "HH:MM", in the settings' time zone
    files_max: int | None = None  # that the action takes at once, whatever else is said


@dataclass(frozen=True, slots=True)
class After:
    rule: str
    same: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    initial_s: float = 5.0
    longest_s: float = 600.0
    give_up_after_s: float = 604_800.0


@dataclass(frozen=True, slots=True)
class Reclaim:
    proven_by: tuple[str, ...] = ()
    keep_for_s: float = 172_800.0
    only_under: Literal["low", "always"] = "low"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `id` is the journal's number for its name, 0 before it was accepted."""

    name: str
    watch: str  # absolute, no trailing separator
    match: tuple[str, ...]
    existing: Literal["process", "ignore"]
    action: str
    options: Mapping[str, Any]  # validated by the action's OPTIONS; strings may hold {captures}
    id: int = 0
    description: str = ""
    ignore: tuple[str, ...] = ()  # the rule's own and the built-in ones
    case: Literal["exact", "fold"] = "exact"
    on_rewrite: Literal["again", "ignore", "block"] = "again"
    priority: int = 0
    after: After | None = None
    complete: Complete = field(default_factory=Complete)
    batch: Batch | None = None
    proof: Literal["required", "none"] = "required"
    runs_max: int | None = None
    bandwidth: int | None = None
    retry: Retry = field(default_factory=Retry)
    reclaim: Reclaim | None = None
    file: str = ""  # where it was written, for people
    line: int = 0
