"""Decide when a batch closes, and with which files.

Pure. One `Assembly` serves one rule: complete files come from its `Settling`,
gather in one open batch a group, and leave as closed batches, each with the
reason. A member whose last look is older than `FRESH_S` is looked at again
before its batch closes; one that has changed goes back to settling. Nothing
closes while the root is away: what was true of a vanished disk proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trigger_daemon.core import model, patterns
from trigger_daemon.core.model import (
    CLAIM_MARKER,
    CLAIM_ONLY_FIRST,
    CLAIM_REWRITE_IGNORED,
    CLAIM_SKIPPED,
    Claimed,
    Effect,
    GroupForgotten,
    GroupSet,
    Kept,
    Look,
    State,
    Sweep,
    counted,
)
from trigger_daemon.core.settle import (
    BATCHED,
    CLOSING,
    COMPLETE,
    NO_STATE,
    SETTLING,
    Companion,
    Member,
    Settling,
    Siblings,
)

if TYPE_CHECKING:
    from trigger_daemon.core.rules import Batch, Rule
    from trigger_daemon.core.timers import Timers

FRESH_S = 1.0  # a look this young needs no repetition when the batch closes
BATCH_FILES_MAX = 100_000  # a batch closes at this size whatever its rule says: a manifest must fit in memory

CARRIED_MAX = 10_000  # marker paths whose last batch is remembered
LAST_SEEN_MAX = 10_000  # groups whose last file is remembered to the second before idle ones are let go
MARK_SHARE = 20  # a group's durable mark is at most this share of `new_group_after` older than its last file

LATE = "late"  # kind of the mark of a companion that a file went without
SIBLINGS = "siblings:"  # what a rule's checks measured of the last files is kept under this and its number

_MARKER_SEEN = float("inf")  # an included marker is never looked at again for its batch: as a marker it is

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
    awaited: set[Member | Companion] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class PendingClose:
    """A marker, or a time of day: closes the groups that agree, once a sweep and all it saw are settled."""

    captures: Mapping[str, str]
    reason: str
    ask: int
    marker: Member | None = None
    version: State = NO_STATE  # of the marker that acts
    swept: bool = False
    waits: set[Member] = field(default_factory=set)
    acting: set[Open] | None = None  # batches that it closes and that are looked at once more


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
        close_late: Callable[[Assembly, model.Member, Mapping[str, str], str, float], int],
        follows: Callable[[int], Iterable[tuple[str, ...]]],
        since: int,
        marks: dict[tuple[int, str, str], tuple[int, float]],
        utc: Callable[[float], float],
        next_ask: Callable[[], int],
        siblings: Siblings,
        refuses: Callable[[str, Mapping[str, Any], str, str], str],
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
        self._closing_of: dict[Member, Open] = {}  # members of batches that are closing
        self._first: dict[Group, Open] = {}  # `only_first`: the group's one batch, while it is closing
        self._confirming: dict[Companion, list[Open]] = {}  # companions that are looked at once more, for which batches
        self._close = close
        self._close_late = close_late
        self._follows = follows
        self._next_ask = next_ask
        self._refuses = refuses
        self._roots = roots
        self._last_seen: dict[Group, float] = {}  # for new_group_after
        self._owed_as: dict[Companion, str] = {}  # late companions -> their durable mark
        self._carried: dict[str, int] = {}  # path of an included marker -> the last batch that it went with
        spec = rule.batch
        self.spec: Batch | None = spec
        counts = [n for n in (spec.only_first, spec.files, spec.expect) if n is not None] if spec else []
        most = spec.files_max if spec else None
        self._part = BATCH_FILES_MAX if most is None else min(most, BATCH_FILES_MAX)
        self._files_most = BATCH_FILES_MAX if spec and spec.at else self._part  # a time of day is waited for
        self._files_enough = min([*counts, self._files_most])
        self._bytes_enough = spec.bytes if spec else None
        self.settling = Settling(
            key=rule.id,
            rule=rule,
            root=root,
            roots=roots,
            quiescence_s=rule.complete.quiescence_s,
            checks=rule.complete.checks,
            companions=rule.complete.companions,
            timers=timers,
            out=out,
            on_complete=self.completed,
            on_left=self.left,
            on_blocked=self._block,
            on_rewritten=self.rewritten,
            on_stalled=self._stall,
            on_companion=self._companion_seen,
            on_late=self._late,
            on_owed=self._owed,
            on_measured=self._measured,
            siblings=siblings,
            since=since,
        )
        self.markers: Settling | None = None
        if spec and spec.close_on:
            quiescence = spec.close_on.quiescence_s
            self.markers = Settling(
                key=-rule.id,
                rule=rule,
                root=root,
                roots=roots,
                quiescence_s=rule.complete.quiescence_s if quiescence is None else quiescence,
                checks=spec.close_on.checks,
                companions=(),
                timers=timers,
                out=out,
                on_complete=self._marker,
                on_left=lambda m: None,
                on_blocked=lambda m: None,
                on_rewritten=lambda m, at: True,
                on_stalled=lambda m, at: None,
                on_companion=lambda c, at: None,
                on_late=lambda c, m, at: None,
                on_owed=lambda c, m: None,
                on_measured=lambda: None,
                siblings={},
                since=since,
            )

    def use(self, rule: Rule) -> None:
        """Take a rule that gathers just the same files in the same batches, and does other things with them."""
        self.rule = self.settling.rule = rule
        if self.markers:
            self.markers.rule = rule

    def retire(self) -> None:
        """The rule is gone or gathers otherwise: nothing of this acts any more; what it held is found again."""
        for open_ in (*self.groups.values(), *self.closings):
            self._stop_timers(open_)
        for pending in self.pending:
            self.timers.cancel((self, pending))
        for memory in (self.groups, self.closings, self._closing_of, self._first, self._confirming, self.pending):
            memory.clear()
        for settling in (self.settling, self.markers):
            if settling is not None:
                settling.end()

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
        if self.stalled or self.blocked:
            self.stalled.pop(member, None)
            self.blocked.pop(member, None)
        if why := self._refused(member):  # alone, before a batch holds it: the others go
            self.settling.block(member, why)
            return
        if self.spec is None:
            if at - member.seen <= FRESH_S and not member.companions and self.steady:
                self._close_now([member], self.captures(member), "complete", at)
            else:
                self._begin_close(Open((), {member: None}, member.state[0]), "complete", at)
            return
        group = self.group_of(member)
        if self.spec.only_first is not None:
            if self._taken(group, at):
                self.claim_alone(member, CLAIM_ONLY_FIRST, at)
                return
            if (closing := self._first.get(group)) is not None:  # in reserve, should one of the first have changed
                closing.members[member] = None
                closing.bytes += member.state[0]
                self._closing_of[member] = closing
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
        if len(open_.members) >= self._files_enough or (
            self._bytes_enough is not None and open_.bytes >= self._bytes_enough
        ):
            self._consider(open_, at)

    def _refused(self, member: Member) -> str:
        """Return why the action can never take this file, or a companion of it, '' if it can."""
        action, options = self.rule.action, self.rule.options
        if why := self._refuses(action, options, self.rule.watch, member.path):
            return why
        for companion in filter(travels, member.companions):
            root = next((path for path, number in self._roots.items() if number == companion.root), self.rule.watch)
            if why := self._refuses(action, options, root, companion.path):
                return f"its companion {companion.path}: {why}"
        return ""

    def _settled(self, member: Member, at: float) -> None:
        for pending in list(self.pending):
            pending.waits.discard(member)
            self._try_pending(pending, at)

    def left(self, member: Member) -> None:
        """A file left: gone, blocked, changed, claimed."""
        if self.stalled or self.blocked:
            self.blocked.pop(member, None)
            self.stalled.pop(member, None)
        if member.stage in (COMPLETE, CLOSING):
            open_ = self._closing_of.pop(member, None) or self.groups.get(self.group_of(member))
            if open_ is not None and member in open_.members:
                self._remove(open_, member)
                open_.awaited.discard(member)
                if open_.closing and not open_.awaited:
                    self._soon(open_)
        if self.pending:
            for pending in self.pending:
                if member in pending.waits:
                    pending.waits.discard(member)
                    self._try_soon(pending)

    def _block(self, member: Member) -> None:
        self.left(member)
        self.blocked[member] = None

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
        elif files >= self._files_most:
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
        if not self.steady:  # considered again when the root is back
            if self.spec is None:
                self._start_over(open_)
            return
        if self.groups.get(open_.group) is open_:
            del self.groups[open_.group]
        self._stop_timers(open_)
        open_.closing = reason
        stale = [m for m in open_.members if at - m.seen > FRESH_S]
        companions = {
            c: None
            for m in open_.members
            if m.companions
            for c in m.companions
            if c.quiet and at - c.answered_at > FRESH_S
        }
        if not stale and not companions:
            self._finish(open_, at)
            return
        self.closings[open_] = None
        self._closing_of.update(dict.fromkeys(open_.members, open_))
        if self.spec is not None and self.spec.only_first is not None:
            self._first[open_.group] = open_
        open_.awaited = {*stale, *companions}
        for companion in companions:
            self._confirming.setdefault(companion, []).append(open_)
        if companions:
            self.settling.confirm(companions, at)
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
        open_ = self._closing_of.get(member)
        if open_ is not None and member in open_.awaited:
            open_.awaited.discard(member)
            member.stage = COMPLETE
            if not open_.awaited:
                self._all_answered(open_, at)

    def _companion_seen(self, companion: Companion, at: float | None) -> None:
        """A companion was looked at, or is awaited by nobody any more."""
        if not self._confirming:
            return
        for open_ in self._confirming.pop(companion, ()):
            open_.awaited.discard(companion)
            if not open_.awaited:
                if at is None:
                    self._soon(open_)
                else:
                    self._all_answered(open_, at)

    def _late(self, companion: Companion, member: Member, at: float) -> None:
        """A companion has come after its file went without it: it goes alone."""
        captures = self.named(self.group_of(member)) if self.spec else self.captures(member)
        reason = f"late companion of {member.path}, which batch {member.batch} took"
        self._close_late(self, companion_record(companion), captures, reason, at)

    def _owed(self, companion: Companion, member: Member | None) -> None:
        """Remember over a restart that a companion is looked for, and for whose sake."""
        if member is not None:
            assert companion.spec is not None
            owed = json.dumps([companion.spec.root, companion.path, companion.spec.file, member.path])
            self._owed_as[companion] = owed
            self._mark(owed, LATE, member.batch, member.seen)
        elif owed := self._owed_as.pop(companion, ""):
            del self.marks[(self.rule.id, owed, LATE)]
            self.out.append(GroupForgotten(self.rule.id, owed, LATE))

    def take_owed(self, owed: str, batch: int, at: float) -> None:
        """Go on to look for a companion that was late before a restart; a rule that wants it no more forgets it."""
        where, path, file, of = json.loads(owed)
        spec = next((w for w in self.rule.complete.companions if (w.file, w.root) == (file, where)), None)
        root = self.settling.roots.get(where)
        if spec is None or root is None:
            del self.marks[(self.rule.id, owed, LATE)]
            self.out.append(GroupForgotten(self.rule.id, owed, LATE))
            return
        self._owed_as[self.settling.owe(spec, root, path, of, batch, at)] = owed

    def _measured(self) -> None:
        kept = {check: list(of.items()) for check, of in self.settling.siblings.items()}
        self.out.append(Kept(f"{SIBLINGS}{self.rule.id}", kept))

    def _all_answered(self, open_: Open, at: float) -> None:
        """Every look came back. Count conditions must still hold without those that changed."""
        if open_ not in self.closings or open_.awaited:
            return
        self._unclose(open_)
        counted = open_.closing.startswith(("only_first", "files", "expect", "bytes"))
        if not self.steady or (counted and not self._still(open_)):
            self._merge_back(open_, at)
        else:
            self._finish(open_, at)
        for pending in [p for p in self.pending if p.acting is not None and open_ in p.acting]:
            assert pending.acting is not None
            pending.acting.discard(open_)
            if not pending.acting:
                self._acted(pending, at)

    def _unclose(self, open_: Open) -> None:
        del self.closings[open_]
        for member in open_.members:
            self._closing_of.pop(member, None)
        if self._first.get(open_.group) is open_:
            del self._first[open_.group]

    def _start_over(self, open_: Open) -> None:
        """The root went away before a file without a batch of others was closed."""
        for member in open_.members:
            member.stage, member.state = SETTLING, NO_STATE

    def _still(self, open_: Open) -> bool:
        spec = self.spec
        assert spec is not None
        files = len(open_.members)
        wanted = [n for n in (spec.only_first, spec.files, spec.expect) if n is not None]
        return any(files >= n for n in wanted) or (spec.bytes is not None and open_.bytes >= spec.bytes)

    def _merge_back(self, open_: Open, at: float) -> None:
        if self.spec is None:
            self._start_over(open_)
            return
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
        members = list(open_.members)
        if not members:
            return
        if spec is None:
            self._close_now(members, self.captures(members[0]), open_.closing, at)
            return
        group = self.named(open_.group)
        if spec.only_first is None:
            for part in self._parts(members):
                self._close_now(part, group, open_.closing, at)
            return
        batch = self._close_now(members[: spec.only_first], group, open_.closing, at)
        self._mark(canonical(group), "taken", batch, at)
        for late in members[spec.only_first :]:
            late.stage = SETTLING  # no batch holds it any more
            self.claim_alone(late, CLAIM_ONLY_FIRST, at)
        if spec.new_group_after_s is not None:
            self._in_use(open_.group, spec.new_group_after_s, at)

    def _parts(self, members: list[Member]) -> Iterator[list[Member]]:
        """Yield the members in batches that hold no more than may be, each with its companions.

        One file with more companions than that goes all the same: they are one set.
        """
        part: list[Member] = []
        beside: set[Companion] = set()  # one that several share travels once
        for member in members:
            its = {companion for companion in member.companions if travels(companion)}
            if part and len(part) + 1 + len(beside | its if its else beside) > self._part:
                yield part
                part, beside = [], set()
            part.append(member)
            beside |= its
        yield part

    def _in_use(self, group: Group, anew_s: float, at: float) -> None:
        self._last_seen[group] = at
        if len(self._last_seen) > LAST_SEEN_MAX:  # of an idle one its mark says enough
            self._last_seen = {g: last for g, last in self._last_seen.items() if at - last < anew_s}

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
        if anew is None:
            return True
        last = self._last_seen.get(group)
        idle = at - last if last is not None else self.utc(at) - mark[1]
        if idle >= anew:
            self._begin_anew(group)
            return False
        self._in_use(group, anew, at)
        if self.utc(at) - mark[1] >= anew / MARK_SHARE:  # so that a restart does not take the group for idle
            self._mark(name, "taken", mark[0], at)
        return True

    def _begin_anew(self, group: Group) -> None:
        """Forget that the group had its batch, and every success that others wait for."""
        self._last_seen.pop(group, None)
        named = self.named(group)
        marks = [(canonical(named), "taken"), (canonical(named), "succeeded")]
        marks += [
            (canonical({capture: named[capture] for capture in same}), "succeeded")
            for same in self._follows(self.rule.id)
            if all(capture in named for capture in same)
        ]
        for name, kind in marks:
            if self.marks.pop((self.rule.id, name, kind), None):
                self.out.append(GroupForgotten(self.rule.id, name, kind))

    def _close_now(self, members: list[Member], group: Mapping[str, str], reason: str, at: float) -> int:
        batch = self._close(self, members, group, reason, at)
        for member in members:
            member.stage = BATCHED
            member.batch = batch
            if member.seen == _MARKER_SEEN:
                self._carried.pop(member.path, None)
                self._carried[member.path] = batch
                if len(self._carried) > CARRIED_MAX:
                    del self._carried[next(iter(self._carried))]
            if member.companions:
                member.home.release(member)
        return batch

    def close_group(self, captures: Mapping[str, str], reason: str, at: float) -> list[Open]:
        """Close every open batch whose group agrees with the captures; return those that were begun."""
        agreeing = [o for o in self.groups.values() if self._agrees(self.named(o.group), captures)]
        for open_ in agreeing:
            self._begin_close(open_, reason, at)
        return agreeing

    @staticmethod
    def _agrees(have: Mapping[str, str], want: Mapping[str, str]) -> bool:
        return all(have.get(name, value) == value for name, value in want.items())

    # --------------------------------------------------- markers, times of day

    def _marker(self, marker: Member, at: float) -> None:
        """A marker is complete: sweep from now on, then close what agrees."""
        assert self.spec and self.spec.close_on
        captures = patterns.compiled(self.spec.close_on.file, self.rule.case).match(marker.path) or {}
        marker.why = "closes its groups after a sweep"
        self.close_after_sweep(captures, f"close_on: {marker.path}", marker)

    def close_after_sweep(self, captures: Mapping[str, str], reason: str, marker: Member | None = None) -> None:
        """Close the agreeing groups once a sweep begun from now on, and all it saw, are settled."""
        ask = self._next_ask()
        version = marker.state if marker is not None else NO_STATE
        self.pending.append(PendingClose(captures, reason, ask, marker, version))
        self.out.append(Sweep(self.root, True, ask))

    def swept(self, asked: int, at: float) -> None:
        """A good full sweep has answered all asks up to `asked`."""
        if self.blocked:  # they may be gone, or be what they lacked by now
            self.settling.look_at(self.blocked, at)
        answered = [pending for pending in self.pending if not pending.swept and pending.ask <= asked]
        if not answered:
            return
        for pending in answered:
            pending.swept, pending.waits = True, set()
        for member in self.settling.members():
            if member.unsettled and member not in self.stalled:
                captures = self.captures(member)
                for pending in answered:
                    if self._agrees(captures, pending.captures):
                        pending.waits.add(member)
        for pending in answered:
            self._try_pending(pending, at)

    @property
    def asks(self) -> list[int]:
        """Return the sweeps that are waited for."""
        return [pending.ask for pending in self.pending if not pending.swept]

    @property
    def closes_at_time(self) -> bool:
        """Say whether a closing at a time of day is under way."""
        return any(pending.marker is None for pending in self.pending)

    def _try_pending(self, pending: PendingClose, at: float) -> None:
        if not pending.swept or pending.waits or pending.acting is not None:
            return
        if not self.steady or pending not in self.pending:
            return
        if pending.marker is not None and self.spec and self.spec.close_on and self.spec.close_on.include:
            self._include(pending.marker, pending.version, pending.captures)
        pending.acting = set()
        pending.acting.update(o for o in self.close_group(pending.captures, pending.reason, at) if o in self.closings)
        if not pending.acting:
            self._acted(pending, at)

    def _acted(self, pending: PendingClose, at: float) -> None:
        """Its batches are closed, in this step or before: only now a restart need not do it again."""
        self.pending.remove(pending)
        marker = pending.marker
        if marker is None:
            self._mark("", "at", 0, at)
            return
        row = (marker.name, pending.version[0], pending.version[1])
        self.out.append(Claimed(marker.home.key, self.root, marker.dir, [row], CLAIM_MARKER, self.utc(at)))
        if marker.state == pending.version and marker.stage == COMPLETE:  # else a newer version is on its way
            marker.home.drop(marker)

    def _include(self, marker: Member, version: State, captures: Mapping[str, str]) -> None:
        """The marker travels with the first group that it closes."""
        if self.settling.get(marker.path) is not None:
            return  # the rule matches it, too
        for open_ in self.groups.values():
            if self._agrees(self.named(open_.group), captures):
                earlier = self._carried.get(marker.path, 0)
                twin = Member(self.settling, marker.dir, marker.name, version, marker.looked, earlier)
                twin.stage, twin.seen = COMPLETE, _MARKER_SEEN
                open_.members[twin] = None
                open_.bytes += twin.state[0]
                return

    # ------------------------------------------------------------------- root

    def root_away(self) -> None:
        """The root cannot be trusted: no batch closes; what was closing gathers again."""
        self.steady = False
        for open_ in list(self.closings):
            self._unclose(open_)
            self._merge_back(open_, open_.last_at)
        self.settling.suspend()
        if self.markers:
            self.markers.suspend()
        for pending in self.pending:
            pending.swept, pending.waits, pending.acting = False, set(), None

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
            self._settled(member, at)

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
        parts = [f"in an open batch of {counted(len(open_.members), 'file')}"]
        limits = ((name, getattr(spec, name)) for name in ("only_first", "files", "expect"))
        parts += [f"{limit - len(open_.members)} missing until {name}: {limit}" for name, limit in limits if limit]
        if spec.bytes is not None:
            parts.append(f"{open_.bytes} of {spec.bytes} bytes")
        if spec.oldest_waits_s is not None:
            parts.append(f"{'or ' if parts[1:] else ''}oldest_waits: {spec.oldest_waits_s:g} s")
        if spec.idle_s is not None:
            parts.append(f"{'or ' if parts[1:] else ''}idle: {spec.idle_s:g} s")
        if spec.close_on is not None:
            marker = patterns.compiled(spec.close_on.file, self.rule.case).filled(self.named(open_.group))
            parts.append(f"closed once {marker} is complete")
        if spec.at:
            parts.append(f"closed at {', '.join(spec.at)}")
        ends = [t for t in (self.timers.at((self, open_, k)) for k in ("oldest", "idle")) if t is not None]
        return "; ".join(parts), min(ends) if ends else None


def record_of(assembly: Assembly, member: Member) -> model.Member:
    """Return a file as its batch's manifest keeps it."""
    return model.Member(
        assembly.root, member.dir, member.name, member.state[0], member.state[1], "", member.flag, member.content
    )


def companion_records(member: Member) -> list[model.Member]:
    """Return the companions that travel with a file."""
    return [companion_record(companion) for companion in filter(travels, member.companions)]


def travels(companion: Companion) -> bool:
    """Say whether a companion goes with its file."""
    return companion.quiet and companion.state is not None


def companion_record(companion: Companion) -> model.Member:
    """Return a companion as a manifest keeps it."""
    assert companion.state is not None
    role = "shared" if companion.spec is not None and companion.spec.shared else "companion"
    size, mtime_ns = companion.state[:2]
    return model.Member(
        companion.root, companion.dir, companion.name, size, mtime_ns, role, companion.flag, companion.content
    )
