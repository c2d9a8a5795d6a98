"""When copies in a collection were written: the one thing that tells a copy which was replaced from one that was not.

The service compares contents while it transfers, and never on request. So a
proof notes the time of each copy, and reclaim wants to find the same again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from trigger_daemon.globus.faults import Trouble

if TYPE_CHECKING:
    from trigger_daemon.globus.service import Clients

CLOCKS_APART_S = 120.0  # the service's and a collection's
TIMES_APART_S = 2.0  # a time that was kept, and the source's: some file systems know only every second one
STATS_MAX = 10  # files of one directory that are looked at one by one; more are listed
LISTED_AT_ONCE = 10_000  # entries of a directory in one answer
LISTED_MAX = 100_000  # in all; a copy that is not among them is not noted

Call = Callable[["Clients"], Any]
Member = Mapping[str, Any]  # a record of a proof


def times(
    ask: Callable[[str, Call], Any], collection: str, task: Mapping[str, Any], members: Sequence[tuple[Member, bool]]
) -> dict[tuple[str, str], int]:
    """Return when each copy was written, in Unix seconds: (root, path) -> time. Raises Trouble where Globus is away.

    Each member with whether the task has written it; what was left out as equal has an older time of its own. Not
    noted is a copy that is not there as it was delivered, that the collection does not show, or whose time this task
    cannot have given it.
    """
    by_directory: dict[str, dict[str, tuple[Member, bool]]] = {}
    for member, ours in members:
        directory, _, name = place_of(member["to"]).rpartition("/")
        by_directory.setdefault(f"{directory}/", {})[name] = member, ours
    seen: list[tuple[Member, bool, float]] = []
    for directory, wanted in by_directory.items():
        for name, entry in _looked_at(ask, collection, directory, list(wanted)):
            member, ours = wanted[name]
            if as_delivered(member, entry):
                seen.append((member, ours, time_of(entry)))
    began = instant(task.get("request_time"), math.inf) - CLOCKS_APART_S
    ended = instant(task.get("completion_time"), -math.inf) + CLOCKS_APART_S
    # A storage that keeps the sources' times keeps all of them.
    all_kept = any(ours and keeps(member, time_s) for member, ours, time_s in seen)
    return {
        (member["root"], member["path"]): int(time_s) for member, ours, time_s in seen
        if keeps(member, time_s) or (time_s <= ended and (not ours or (began <= time_s and not all_kept)))
    }  # fmt: skip


def as_delivered(member: Member, entry: Mapping[str, Any]) -> bool:
    """Say whether what a collection shows is a file of the size that was delivered."""
    return entry.get("type") == "file" and entry.get("size") == member.get("size")


def why_not(member: Member, entry: Mapping[str, Any]) -> str:
    """Return why a copy of this time is not surely the one that was proved, '' if it is."""
    time_s, noted_s = time_of(entry), member.get("to_mtime_s")
    if noted_s is None:  # then only the source's own time is known to be this version's
        return "" if keeps(member, time_s) else "whether it was written since it was delivered cannot be told"
    return "" if time_s == noted_s else "it was written after it was delivered"


def keeps(member: Member, time_s: float) -> bool:
    """Say whether a copy shows its source's time."""
    return abs(time_s - int(member["mtime_ns"]) / 1e9) <= TIMES_APART_S


def place_of(to: str) -> str:
    """Return a copy's path in its collection."""
    return "/" + to.removeprefix("globus://").partition("/")[2]


def time_of(entry: Mapping[str, Any]) -> float:
    """Return when what a collection shows was last modified, in whole Unix seconds; not a number if it says nothing."""
    time_s = instant(entry.get("last_modified"), math.nan)
    return time_s if math.isnan(time_s) else float(math.floor(time_s))


def instant(text: Any, unknown: float) -> float:
    """Return what a service's time means in Unix seconds, `unknown` if it means nothing."""
    try:
        when = datetime.fromisoformat(str(text))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return unknown


def _looked_at(
    ask: Callable[[str, Call], Any], collection: str, directory: str, names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what a collection tells of files in one of its directories; nothing more where it refuses to."""
    try:
        if len(names) <= STATS_MAX:
            for name in names:
                yield name, ask("look at a copy", stat(collection, f"{directory}{name}"))
            return
        left = set(names)
        for offset in range(0, LISTED_MAX, LISTED_AT_ONCE):
            page = ask("look at the copies", _list(collection, directory, offset))
            for entry in page:
                if (name := str(entry.get("name"))) in left:
                    left.discard(name)
                    yield name, entry
            if not left or len(page) < LISTED_AT_ONCE:
                return
    except Trouble as trouble:
        if trouble.status in (0, 429):  # nobody has looked
            raise


def stat(collection: str, path: str) -> Call:
    """Return the call that looks at one path."""
    return lambda globus: dict(globus.transfer.operation_stat(collection, path).data)


def _list(collection: str, directory: str, offset: int) -> Call:
    return lambda globus: [
        dict(entry)
        for entry in globus.transfer.operation_ls(collection, directory, limit=LISTED_AT_ONCE, offset=offset)
    ]
