"""What the journal gives back at a start: the open work, and the small marks the core decides by.

Pure values. Done work is not among them: a million finished runs cost a start
nothing. Times are Unix seconds, UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trigger_daemon.core.model import ReclaimSet, RunState


@dataclass(frozen=True, slots=True)
class SavedAttempt:
    """The last attempt of an open run. `handle` None: the provider's answer was lost, or it was not asked yet."""

    attempt: int
    prepared: Any
    handle: Any
    made_time: float
    ended_time: float | None
    outcome: str | None


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is not final, with its batch's numbers; members are read from the manifest when they are needed."""

    id: int
    rule: int
    group: Mapping[str, str]
    state: RunState
    because: str
    created_time: float
    changed_time: float
    attempts: int
    destination: str
    waits_on: tuple[int, ...]
    retry_time: float | None
    error: str | None
    hint: str | None
    files: int
    bytes: int
    request: Mapping[str, Any]
    attempt: SavedAttempt | None
    output: Any


class SavedMark(NamedTuple):
    """A durable mark on a rule's group; `group` is its canonical JSON, as it was given in `GroupSet`."""

    rule: int
    group: str
    kind: str
    batch: int
    time: float


class SavedAlarm(NamedTuple):
    """An alarm that was not cleared."""

    key: str
    what: str
    hint: str
    since_time: float
    acked_time: float | None
    acked_by: str | None


class SavedReclaim(NamedTuple):
    """A set that was being taken away. `confirmed`: all of it was aside, and proved."""

    id: int
    confirmed: bool
    of: ReclaimSet


class Count(NamedTuple):
    """Runs in one state, and what their batches hold."""

    runs: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything the engine restores. `last_batch` is 0 and `rules_source` None in a new journal."""

    last_batch: int = 0
    runs: tuple[OpenRun, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[tuple[int, int], float] = field(default_factory=dict)  # (rule, root) -> time
    groups: tuple[SavedMark, ...] = ()
    alarms: tuple[SavedAlarm, ...] = ()
    rules_source: Any = None
    tally: Mapping[tuple[int, str], Count] = field(default_factory=dict)  # (rule, state)
    rules: Mapping[int, str] = field(default_factory=dict)  # id -> name, rules that are gone included
    roots: Mapping[int, str] = field(default_factory=dict)  # id -> absolute path
    reclaims: tuple[SavedReclaim, ...] = ()
    last_reclaim: int = 0
