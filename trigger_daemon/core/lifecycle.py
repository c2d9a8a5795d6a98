"""The states of a run, and the only moves between them: a table, which code asks.

The diagram in the documentation is made from it.
"""

from __future__ import annotations

from enum import StrEnum

from trigger_daemon.core.model import RunState as S


class Event(StrEnum):
    """What moves a run."""

    ATTEMPT = "an attempt was prepared and journaled"
    TOOK = "the provider took it"
    REFUSED = "the provider surely did not take it"
    PAUSED = "the provider says paused, expired or needs consent"
    RESUMED = "the provider goes on"
    SUCCEEDED = "the provider says success"
    FAILED = "the provider says the attempt ended without success"
    PROVED = "the destination equals the manifest"
    DIFFERS = "members differ at the destination; once again"
    HOLD = "a person is needed"
    RETRY = "an operator retries"
    REJOIN = "an operator retries, and the attempt is still under way"
    REFIND = "an operator retries, and the attempt is still looked for"
    REPROVE = "an operator retries, and only the proof is missing"
    ABANDON = "an operator abandons"
    CANCEL = "an operator cancels"
    CANCELLED = "the provider confirms the end"
    SUPERSEDED = "every member has a newer version or is gone"


_TABLE: dict[Event, tuple[tuple[tuple[S, ...], S], ...]] = {
    Event.ATTEMPT: (((S.PENDING,), S.STARTING),),
    Event.TOOK: (((S.STARTING,), S.ACTIVE),),
    Event.REFUSED: (((S.STARTING,), S.PENDING),),
    Event.PAUSED: (((S.ACTIVE,), S.INACTIVE),),
    Event.RESUMED: (((S.INACTIVE,), S.ACTIVE),),
    Event.SUCCEEDED: (((S.ACTIVE, S.INACTIVE, S.CANCELLING, S.HELD), S.SUCCEEDED),),
    Event.FAILED: (((S.ACTIVE, S.INACTIVE), S.PENDING),),
    Event.PROVED: (((S.SUCCEEDED,), S.VERIFIED),),
    Event.DIFFERS: (((S.SUCCEEDED,), S.PENDING),),
    Event.HOLD: (((S.PENDING, S.STARTING, S.ACTIVE, S.INACTIVE, S.SUCCEEDED), S.HELD),),
    Event.RETRY: (((S.HELD,), S.PENDING),),
    Event.REJOIN: (((S.HELD,), S.ACTIVE),),
    Event.REFIND: (((S.HELD,), S.STARTING),),
    Event.REPROVE: (((S.HELD,), S.SUCCEEDED),),
    Event.ABANDON: (((S.HELD,), S.ABANDONED),),
    Event.CANCEL: (((S.PENDING, S.STARTING, S.ACTIVE, S.INACTIVE, S.HELD), S.CANCELLING),),
    Event.CANCELLED: (((S.CANCELLING,), S.CANCELLED),),
    Event.SUPERSEDED: (((S.PENDING, S.STARTING, S.ACTIVE, S.INACTIVE, S.SUCCEEDED, S.HELD), S.SUPERSEDED),),
}

TRANSITIONS: dict[tuple[S, Event], S] = {
    (source, event): target for event, moves in _TABLE.items() for sources, target in moves for source in sources
}

# Nothing more happens, by itself or by a person. SUCCEEDED joins them where the rule says `proof: none`.
ENDS = frozenset({S.VERIFIED, S.CANCELLED, S.ABANDONED, S.SUPERSEDED})


def target(state: S, event: Event) -> S:
    """Return the state after the event; KeyError is a bug of the caller."""
    return TRANSITIONS[(state, event)]


def allowed(state: S, event: Event) -> bool:
    """Say whether the event can happen in this state."""
    return (state, event) in TRANSITIONS


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> PENDING: batch closed"]
    lines += [f"    {source} --> {goal}: {event}" for (source, event), goal in TRANSITIONS.items()]
    lines += [f"    {end} --> [*]" for end in sorted(ENDS)]
    return "\n".join(lines) + "\n"
