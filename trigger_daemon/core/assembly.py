"""Decide when a batch closes, and with which files.

Pure. One `Assembly` serves one rule: complete files come from its `Settling`,
gather in one open batch a group, and leave as closed batches, each with the
reason. A member whose last look is older than `FRESH_S` is looked at again
before its batch closes; one that has changed goes back to settling. Nothing
closes while the root is away: what was true of a vanished disk proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trigger_daemon.core import model, patterns
from trigger_daemon.core.model import (
    CLAIM_MARKER,
    CLAIM_REWRITE_IGNORED,
    CLAIM_SKIPPED,
    Claimed,
    Effect,
    GroupForgotten,
    GroupSet,
    Look,
    Sweep,
)
from trigger_daemon.core.settle import BATCHED, BLOCKED, CLOSING, COMPLETE, SETTLING, Companion, Member, Settling

if TYPE_CHECKING:
    from trigger_daemon.core.rules import Batch, Rule
    from trigger_daemon.core.timers import Timers

FRESH_S = 1.0  # a look this young needs no repetition when the batch closes
BATCH_FILES_MAX = 100_000  # a batch closes at this size whatever its rule says: a manifest must fit in memory

Group = tuple[str, ...]


def canonical(group: Mapping[str, str]) -> str:
    """Return a group as the text by which the journal knows it."""
    return json.dumps(dict(sorted(group.items())), separators=(",", ":"))


@dataclass(slots=True, eq=False)
class Open:
    """A batch that is still gathering."""

    group: Group
    members: dict[Member, None] = field(default_factory=dict)
    bytes: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    closing: str = ""  # why, while its members are looked at again
    awaited: set[Member] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class PendingClose:
    """A marker, or a time of day: closes the groups that agree, once a sweep and all it saw are settled."""

    captures: Mapping[str, str]
    reason: str
    ask: int
    marker: Member | None = None
    swept: bool = False
    waits: set[Member] = field(default_factory=set)


class Assembly:
    """The open batches of one rule."""

    def __init__(
        self,
        *,
        rule: Rule,
        root: int,
        roots: dict[str, int],
        timers: Timers,
        out: list[Effect],
        close: Callable[[Assembly, list[Member], Mapping[str, str], str, float], int],
        marks: dict[tuple[int, str, str], tuple[int, float]],
        utc: Callable[[float], float],
        next_ask: Callable[[], int],
    ) -> None:
        self.rule = rule
        self.root = root
        self.timers = timers
        self.out = out
        self.marks = marks  # durable group marks: (rule, group, kind) -> (batch, time)
        self.utc = utc
        self.steady = True  # the root is there
        self.groups: dict[Group, Open] = {}
        self.closings: dict[Open, None] = {}
        self.pending: list[PendingClose] = []
        self.stalled: dict[Member, None] = {}
        self.blocked: dict[Member, None] = {}
        self._close = close
        self._next_ask = next_ask
        self._last_seen: dict[Group, float] = {}  # for new_group_after
        spec = rule.batch
        self.spec: Batch | None = spec
        counts = [n for n in (spec.only_first, spec.files, spec.expect) if n is not None] if spec else []
        self._files_enough = min([*counts, BATCH_FILES_MAX])
        self._bytes_enough = spec.bytes if spec else None
        self.settling = Settling(
            key=rule.id, rule=rule, root=root, roots=roots, quiescence_s=rule.complete.quiescence_s,
            checks=rule.complete.checks, companions=rule.complete.companions, timers=timers, out=out,
            on_complete=self.completed, on_left=self.left, on_rewritten=self.rewritten, on_stalled=self._stall,
        )  # fmt: skip
        self.markers: Settling | None = None
        if spec and spec.close_on:
            quiescence = spec.close_on.quiescence_s
            self.markers = Settling(
                key=-rule.id, rule=rule, root=root, roots=roots,
                quiescence_s=rule.complete.quiescence_s if quiescence is None else quiescence,
                checks=spec.close_on.checks, companions=(), timers=timers, out=out,
                on_complete=self._marker, on_left=lambda m: None, on_rewritten=lambda m, at: True,
                on_stalled=lambda m, at: None,
            )  # fmt: skip

    # ------------------------------------------------------------- membership

    def captures(self, member: Member) -> dict[str, str]:
        """Return what the rule's pattern captures from a file's path."""
        return patterns.captures_of(self.rule, member.path) or {}

    def group_of(self, member: Member) -> Group:
        """Return the values of `group_by` for a file."""
        if not self.spec or not self.spec.group_by:
            return ()
        captures = self.captures(member)
        return tuple(captures.get(name, "") for name in self.spec.group_by)

    def named(self, group: Group) -> dict[str, str]:
        """Return a group with the names of its captures."""
        return dict(zip(self.spec.group_by, group, strict=True)) if self.spec else {}

    def rewritten(self, member: Member, at: float) -> bool:
        """Say whether a file may go on whose earlier version was claimed by a batch."""
        if self.rule.on_rewrite == "again":
            return True
        if self.rule.on_rewrite == "ignore":
            self.claim_alone(member, CLAIM_REWRITE_IGNORED, at)
        else:
            self.settling.block(member, f"rewritten after batch {member.earlier} took it (on_rewrite: block)")
        return False

    def claim_alone(self, member: Member, code: int, at: float) -> None:
        """Deal with a version without a batch."""
        row = (member.name, member.state[0], member.state[1])
        self.out.append(Claimed(member.home.key, self.root, member.dir, [row], code, self.utc(at)))
        member.home.drop(member)

    def skip(self, member: Member, at: float) -> None:
        """An operator leaves this version out."""
        self.claim_alone(member, CLAIM_SKIPPED, at)

    def completed(self, member: Member, at: float) -> None:
        """A file is complete, or was looked at once more while its batch is closing."""
        if member.stage == CLOSING:
            self._confirmed(member, at)
            return
        self.stalled.pop(member, None)
        if self.spec is None:
            self._close_now([member], self.captures(member), "complete", at)
            self._settled(member, at)
            return
        group = self.group_of(member)
        if self.spec.only_first is not None and self._taken(group, at):
            member.home.drop(member)  # explain names the stage from the group's mark
            return
        open_ = self.groups.get(group)
        if open_ is None:
            open_ = self.groups[group] = Open(group, first_at=at, last_at=at)
            self._arm(open_)
        open_.members[member] = None
        open_.bytes += member.state[0]
        open_.last_at = at
        if self.pending:
            self._settled(member, at)
        if len(open_.members) >= self._files_enough or (self._bytes_enough is not None and open_.bytes >= self._bytes_enough):
            self._consider(open_, at)

    def _settled(self, member: Member, at: float) -> None:
        for pending in list(self.pending):
            pending.waits.discard(member)
            self._try_pending(pending, at)

    def left(self, member: Member) -> None:
        """A file left: gone, blocked, changed, claimed."""
        if member.stage == BLOCKED:
            self.blocked[member] = None
        else:
            self.blocked.pop(member, None)
            self.stalled.pop(member, None)
        if member.stage == CLOSING:
            for open_ in self.closings:
                if member in open_.members:
                    self._remove(open_, member)
                    open_.awaited.discard(member)
                    if not open_.awaited:
                        self._soon(open_)
                    break
        elif member.stage == COMPLETE:
            for holding in (self.groups.get(self.group_of(member)), *self.closings):
                if holding and member in holding.members:
                    self._remove(holding, member)
        if self.pending:
            for pending in self.pending:
                if member in pending.waits:
                    pending.waits.discard(member)
                    self._try_soon(pending)

    def _try_soon(self, pending: PendingClose) -> None:
        self.timers.set((self, pending), 0.0, lambda now: self._try_pending(pending, now))

    def _soon(self, open_: Open) -> None:
        self.timers.set((self, open_, "soon"), 0.0, lambda now: self._all_answered(open_, now))

    def _remove(self, open_: Open, member: Member) -> None:
        del open_.members[member]
        open_.bytes -= member.state[0]
        if not open_.members and not open_.closing and self.groups.get(open_.group) is open_:
            del self.groups[open_.group]

    # ------------------------------------------------------------ when to close

    def _consider(self, open_: Open, at: float) -> None:
        """Close if enough has come."""
        spec = self.spec
        assert spec is not None
        files = len(open_.members)
        reason = ""
        if spec.only_first is not None and files >= spec.only_first:
            reason = f"only_first: {spec.only_first} files complete"
        elif spec.files is not None and files >= spec.files:
            reason = f"files: {files} of {spec.files}"
        elif spec.expect is not None and files >= spec.expect:
            reason = f"expect: all {spec.expect} have come"
        elif spec.bytes is not None and open_.bytes >= spec.bytes:
            reason = f"bytes: {open_.bytes} of {spec.bytes}"
        elif files >= BATCH_FILES_MAX:
            reason = f"files: {files}, the most a batch may hold"
        if reason:
            self._begin_close(open_, reason, at)

    def _arm(self, open_: Open) -> None:
        """Set the instants at which time alone closes the batch; `idle` sets its own next one."""
        spec = self.spec
        assert spec is not None
        if spec.oldest_waits_s is not None:
            due = open_.first_at + spec.oldest_waits_s
            self.timers.set((self, open_, "oldest"), due, lambda now: self._oldest(open_, now))
        if spec.idle_s is not None:
            self.timers.set((self, open_, "idle"), open_.last_at + spec.idle_s, lambda now: self._idle(open_, now))

    def _oldest(self, open_: Open, now: float) -> None:
        assert self.spec and self.spec.oldest_waits_s is not None
        if self.groups.get(open_.group) is open_:
            self._begin_close(open_, f"oldest_waits: {self.spec.oldest_waits_s:g} s", now)

    def _idle(self, open_: Open, now: float) -> None:
        assert self.spec and self.spec.idle_s is not None
        if self.groups.get(open_.group) is not open_:
            return
        due = open_.last_at + self.spec.idle_s
        if due > now:
            self.timers.set((self, open_, "idle"), due, lambda later: self._idle(open_, later))
        else:
            self._begin_close(open_, f"idle: nothing new for {self.spec.idle_s:g} s", now)

    def _begin_close(self, open_: Open, reason: str, at: float) -> None:
        """Close at once where every look is fresh; else look again first."""
        if not self.steady:
            return  # considered again when the root is back
        if self.groups.get(open_.group) is open_:
            del self.groups[open_.group]
        self._stop_timers(open_)
        open_.closing = reason
        stale = [m for m in open_.members if at - m.seen > FRESH_S]
        if not stale:
            self._finish(open_, at)
            return
        self.closings[open_] = None
        open_.awaited = set(stale)
        by_dir: dict[str, list[str]] = {}
        for member in stale:
            member.stage = CLOSING
            by_dir.setdefault(member.dir, []).append(member.name)
        for directory, names in by_dir.items():
            for start in range(0, len(names), 1_000):
                self.out.append(Look(self.root, directory, tuple(names[start : start + 1_000])))

    def _stop_timers(self, open_: Open) -> None:
        for kind in ("oldest", "idle", "soon"):
            self.timers.cancel((self, open_, kind))

    def _confirmed(self, member: Member, at: float) -> None:
        for open_ in self.closings:
            if member in open_.awaited:
                open_.awaited.discard(member)
                member.stage = COMPLETE
                if not open_.awaited:
                    self._all_answered(open_, at)
                return

    def _all_answered(self, open_: Open, at: float) -> None:
        """Every look came back. Count conditions must still hold without those that changed."""
        if open_ not in self.closings or open_.awaited:
            return
        del self.closings[open_]
        counted = open_.closing.startswith(("only_first", "files", "expect", "bytes"))
        if not self.steady or (counted and not self._still(open_)):
            self._merge_back(open_, at)
        else:
            self._finish(open_, at)

    def _still(self, open_: Open) -> bool:
        spec = self.spec
        assert spec is not None
        files = len(open_.members)
        wanted = [n for n in (spec.only_first, spec.files, spec.expect) if n is not None]
        return any(files >= n for n in wanted) or (spec.bytes is not None and open_.bytes >= spec.bytes)

    def _merge_back(self, open_: Open, at: float) -> None:
        newer = self.groups.get(open_.group)
        if newer:
            self._stop_timers(newer)
            open_.members.update(newer.members)
            open_.bytes += newer.bytes
            open_.last_at = max(open_.last_at, newer.last_at)
        open_.closing, open_.awaited = "", set()
        for member in open_.members:
            member.stage = COMPLETE
        if open_.members:
            self.groups[open_.group] = open_
            self._arm(open_)
            self._consider(open_, at)
        elif newer:
            del self.groups[open_.group]

    def _finish(self, open_: Open, at: float) -> None:
        spec = self.spec
        assert spec is not None
        members = list(open_.members)
        if not members:
            return
        if spec.only_first is not None:
            members = members[: spec.only_first]
            newer = self.groups.pop(open_.group, None)
            for late in [*list(open_.members)[spec.only_first :], *(newer.members if newer else ())]:
                late.stage = SETTLING  # no batch holds it any more
                late.home.drop(late)
        group = self.named(open_.group)
        batch = self._close_now(members, group, open_.closing, at)
        self._last_seen[open_.group] = at
        if spec.only_first is not None:
            self._mark(canonical(group), "taken", batch, at)

    def _mark(self, group: str, kind: str, batch: int, at: float) -> None:
        time = self.utc(at)
        self.marks[(self.rule.id, group, kind)] = (batch, time)
        self.out.append(GroupSet(self.rule.id, group, kind, batch, time))

    def _taken(self, group: Group, at: float) -> bool:
        """Say whether `only_first` has had its batch; a group idle for new_group_after begins anew."""
        assert self.spec is not None
        name = canonical(self.named(group))
        mark = self.marks.get((self.rule.id, name, "taken"))
        if mark is None:
            return False
        anew = self.spec.new_group_after_s
        last = self._last_seen.get(group)
        idle = at - last if last is not None else self.utc(at) - mark[1]
        self._last_seen[group] = at
        if anew is not None and idle >= anew:
            for kind in ("taken", "succeeded"):
                if self.marks.pop((self.rule.id, name, kind), None):
                    self.out.append(GroupForgotten(self.rule.id, name, kind))
            return False
        return True

    def _close_now(self, members: list[Member], group: Mapping[str, str], reason: str, at: float) -> int:
        batch = self._close(self, members, group, reason, at)
        for member in members:
            member.stage = BATCHED
            member.batch = batch
            if member.companions:
                member.home.release(member)
        return batch

    def close_group(self, captures: Mapping[str, str], reason: str, at: float) -> int:
        """Close every open batch whose group agrees with the captures; return how many were begun."""
        agreeing = [o for o in self.groups.values() if self._agrees(self.named(o.group), captures)]
        for open_ in agreeing:
            self._begin_close(open_, reason, at)
        return len(agreeing)

    @staticmethod
    def _agrees(have: Mapping[str, str], want: Mapping[str, str]) -> bool:
        return all(have.get(name, value) == value for name, value in want.items())

    # --------------------------------------------------- markers, times of day

    def _marker(self, marker: Member, at: float) -> None:
        """A marker is complete: sweep from now on, then close what agrees."""
        assert self.spec and self.spec.close_on
        captures = patterns.Pattern(self.spec.close_on.file, self.rule.case).match(marker.path) or {}
        marker.why = "closes its groups after a sweep"
        self.close_after_sweep(captures, f"close_on: {marker.path}", marker)

    def close_after_sweep(self, captures: Mapping[str, str], reason: str, marker: Member | None = None) -> None:
        """Close the agreeing groups once a sweep begun from now on, and all it saw, are settled."""
        ask = self._next_ask()
        self.pending.append(PendingClose(captures, reason, ask, marker))
        self.out.append(Sweep(self.root, True, ask))

    def swept(self, asked: int, at: float) -> None:
        """A good full sweep has answered all asks up to `asked`."""
        for pending in list(self.pending):
            if not pending.swept and pending.ask <= asked:
                pending.swept = True
                pending.waits = {
                    m for m in self.settling.members()
                    if m.unsettled and m not in self.stalled and self._agrees(self.captures(m), pending.captures)
                }  # fmt: skip
                self._try_pending(pending, at)

    def _try_pending(self, pending: PendingClose, at: float) -> None:
        if not pending.swept or pending.waits or pending not in self.pending or not self.steady:
            return
        self.pending.remove(pending)
        marker = pending.marker
        if marker is not None:
            include = self.spec and self.spec.close_on and self.spec.close_on.include
            if include:
                self._include(marker, pending.captures)
            self.claim_alone(marker, CLAIM_MARKER, at)
        self.close_group(pending.captures, pending.reason, at)

    def _include(self, marker: Member, captures: Mapping[str, str]) -> None:
        """The marker travels with the first group that it closes."""
        for open_ in self.groups.values():
            if self._agrees(self.named(open_.group), captures):
                twin = Member(self.settling, marker.dir, marker.name, marker.state, marker.looked, 0)
                twin.stage, twin.seen = COMPLETE, marker.seen
                open_.members[twin] = None
                open_.bytes += twin.state[0]
                return

    # ------------------------------------------------------------------- root

    def root_away(self) -> None:
        """The root cannot be trusted: no batch closes; what was closing gathers again."""
        self.steady = False
        for open_ in list(self.closings):
            del self.closings[open_]
            self._merge_back(open_, open_.last_at)
        for pending in self.pending:
            pending.swept, pending.waits = False, set()

    def root_back(self, at: float) -> None:
        """The root is there again: quiet periods start over, conditions are considered anew."""
        self.steady = True
        self.settling.relook()
        if self.markers:
            self.markers.relook()
        for pending in self.pending:
            pending.ask = self._next_ask()
            self.out.append(Sweep(self.root, True, pending.ask))
        for open_ in list(self.groups.values()):
            self._arm(open_)
            self._consider(open_, at)

    def _stall(self, member: Member, at: float) -> None:
        self.stalled[member] = None
        if self.pending:
            for pending in list(self.pending):
                pending.waits.discard(member)
                self._try_pending(pending, at)

    # ------------------------------------------------------------------ words

    def waiting(self, member: Member) -> tuple[str, float | None]:
        """Say what a complete file's batch waits for, and until when at most (monotonic)."""
        open_ = self.groups.get(self.group_of(member))
        if not self.steady:
            return "its batch is open; the root is away, so nothing closes", None
        if open_ is None or member not in open_.members:
            return "its batch is closing: its files are looked at once more", None
        spec = self.spec
        assert spec is not None
        parts = [f"in an open batch of {len(open_.members)} files"]
        for name in ("only_first", "files", "expect"):
            if (limit := getattr(spec, name)) is not None:
                parts.append(f"{limit - len(open_.members)} missing until {name}: {limit}")
        if spec.bytes is not None:
            parts.append(f"{open_.bytes} of {spec.bytes} bytes")
        if spec.close_on is not None:
            parts.append(f"closed by {spec.close_on.file}")
        if spec.at:
            parts.append(f"closed at {', '.join(spec.at)}")
        ends = [t for t in (self.timers.at((self, open_, k)) for k in ("oldest", "idle")) if t is not None]
        return "; ".join(parts), min(ends) if ends else None


def record_of(assembly: Assembly, member: Member) -> model.Member:
    """Return a file as its batch's manifest keeps it."""
    return model.Member(assembly.root, member.dir, member.name, member.state[0], member.state[1], "", member.flag)


def companion_records(member: Member) -> list[model.Member]:
    """Return the companions that travel with a file."""
    return [_companion_record(c) for c in member.companions if c.quiet and c.state is not None and c.spec is not None]


def _companion_record(companion: Companion) -> model.Member:
    assert companion.state is not None and companion.spec is not None
    role = "shared" if companion.spec.shared else "companion"
    return model.Member(companion.root, companion.dir, companion.name, companion.state[0], companion.state[1], role)
