"""Decide that a file is complete: seen unchanged for the whole quiet period, companions there, checks agreed.

Pure. Silence is never evidence: quiet means two looks with the same state, the
second begun at least a quiet period after the first had ended, and no hint in
between. One `Settling` serves one rule (or the markers of one rule); all its
files wait equally long, so the queue of deadlines is a dict in order of
insertion, and the per-file path makes one object a file and no timer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trigger_daemon.core import patterns
from trigger_daemon.core.model import Check, Checked, Effect, Look, Row, Seen, State, Verdict, join, split

if TYPE_CHECKING:
    from trigger_daemon.core.rules import CheckSpec, Rule, With
    from trigger_daemon.core.timers import Timers

# Where a file stands. Those above the line move by looks and checks.
SETTLING = "settling"  # looked at; the quiet period runs
AWAITING = "awaiting"  # quiet; companions are missing or not quiet yet
CHECKING = "checking"  # quiet; checks are running
INCOMPLETE = "incomplete"  # a check has proved that bytes are missing
SUSPECT = "suspect"  # a check has doubts; goes after complete.suspect
# ---
BLOCKED = "blocked"  # cannot go on by itself
COMPLETE = "complete"  # in an open batch
CLOSING = "closing"  # its batch is closing; looked at once more
BATCHED = "batched"  # claimed; kept until no look from before the claim can be under way

NO_STATE: State = (-1, -1, -1, -1)  # equal to no look's result

UNSETTLED = frozenset({SETTLING, AWAITING, CHECKING, INCOMPLETE, SUSPECT})

COMPANION_LOOK_S = 5.0  # how often an awaited companion is looked for; a look costs microseconds
LOOK_NAMES_MAX = 1_000  # names in one Look: the pair of instants of its answer must stay tight

_RANK = {Verdict.COMPLETE: 0, Verdict.UNKNOWN: 1, Verdict.SUSPECT: 2, Verdict.INCOMPLETE: 3}


@dataclass(slots=True, eq=False)
class Companion:
    """A file that another one waits for."""

    spec: With | None  # None: a check asked for it by name
    root: int
    dir: str
    name: str
    state: State | None = None
    looked: float = 0.0
    quiet: bool = False
    verdict: Verdict | None = None
    why: str = "not there yet"

    @property
    def path(self) -> str:
        return join(self.dir, self.name)

    @property
    def checks(self) -> tuple[CheckSpec, ...]:
        return self.spec.checks if self.spec else ()


class Member:
    """One file of one rule, on its way from the first look to its batch."""

    __slots__ = ("batch", "companions", "dir", "earlier", "flag", "home", "looked", "name", "seen", "stage", "state", "why")

    def __init__(self, home: Settling, directory: str, name: str, state: State, looked: float, earlier: int) -> None:
        self.home = home
        self.dir = directory
        self.name = name
        self.state = state
        self.looked = looked  # when the first look with this state ended
        self.seen = looked  # when the last look with this state began
        self.stage = SETTLING
        self.earlier = earlier  # batch that took another version of this path, 0 if none
        self.batch = 0
        self.flag = ""
        self.why = ""
        self.companions: tuple[Companion, ...] = ()

    @property
    def path(self) -> str:
        return join(self.dir, self.name)

    @property
    def unsettled(self) -> bool:
        return self.stage in UNSETTLED


class Settling:
    """The files of one rule that are not batched yet.

    `on_complete(member, at)` is told of each complete file, `on_left(member)`
    of each that stopped being unsettled, `on_rewritten(member, at)` decides
    about a file whose earlier version was claimed: True lets it go on.
    """

    def __init__(
        self,
        *,
        key: int,
        rule: Rule,
        root: int,
        roots: dict[str, int],
        quiescence_s: float,
        checks: tuple[CheckSpec, ...],
        companions: tuple[With, ...],
        timers: Timers,
        out: list[Effect],
        on_complete: Callable[[Member, float], None],
        on_left: Callable[[Member], None],
        on_rewritten: Callable[[Member, float], bool],
        on_stalled: Callable[[Member, float], None],
    ) -> None:
        self.key = key
        self.rule = rule
        self.root = root
        self.roots = roots
        self.quiescence_s = quiescence_s
        self.checks = checks
        self.specs = companions
        self.timers = timers
        self.out = out
        self.trust = rule.complete.trust
        self.dirs: dict[str, dict[str, Member]] = {}
        self.queue: dict[Member, float] = {}  # SETTLING members by deadline, earliest first
        self.awaited: dict[tuple[int, str], dict[str, dict[Member, Companion]]] = {}
        self.unreadable: dict[Member, str] = {}
        self.first_seen: dict[Member, float] = {}  # only of members that did not settle at the first try
        self.agreed: set[Member] = set()  # their own checks agreed; those of companions are still running
        self.count = 0
        self._open: dict[str, Member] | None = None  # the directory that `found` is filling
        self._on_complete = on_complete
        self._on_left = on_left
        self._on_rewritten = on_rewritten
        self._on_stalled = on_stalled

    # ------------------------------------------------------------------ looks

    def found(self, fact: Seen, rows: Sequence[Row], earlier: int) -> None:
        """Take the rows of a hint's look or of a sweep that this rule wants."""
        directory, ended, began = fact.dir, fact.ended, fact.began
        members = self.dirs.get(directory)
        if members is None:
            members = self.dirs[directory] = {}
        self._open = members
        hinted = fact.cause == "hint"
        trusted = fact.as_of >= 0 and fact.signal in self.trust
        due = ended + self.quiescence_s
        queue = self.queue
        for name, state, _ in rows:
            member = members.get(name)
            if member is None:
                if state is None:
                    continue
                member = members[name] = Member(self, directory, name, state, ended, earlier)
                self.count += 1
                if trusted:
                    self._quiet(member, began)
                else:
                    queue[member] = due
                if self.specs and member.stage == SETTLING:
                    self._await_companions(member)
            elif state is None:
                self._absent(member)
            elif member.stage == BATCHED and state[:2] == member.state[:2]:
                continue  # the version that was claimed
            elif state != member.state or (hinted and member.unsettled):
                self._again(member, state, ended, earlier)
                if trusted and member.stage == SETTLING:
                    queue.pop(member, None)
                    self._quiet(member, began)
        self._open = None
        if not members:
            del self.dirs[directory]

    def answered(self, fact: Seen) -> None:
        """Take the answer to a `Look`: claims are joined, absent names are rows without a state."""
        members = self.dirs.get(fact.dir) if fact.root == self.root else None
        if members:
            for name, state, wants in fact.rows:
                member = members.get(name)
                if member is not None:
                    self._look(member, state, wants, fact)
        if self.awaited and (names := self.awaited.get((fact.root, fact.dir))):
            for name, state, _ in fact.rows:
                for member, companion in list(names.get(name, {}).items()):
                    self._companion_look(member, companion, state, fact)

    def unread(self, directory: str, names: Sequence[str], why: str, at: float) -> None:
        """Take that names could not be looked at: not yet, never gone."""
        members = self.dirs.get(directory, {})
        for name in names:
            member = members.get(name)
            if member is not None and member.unsettled:
                member.why = why
                self._requeue(member, at)

    def _look(self, member: Member, state: State | None, wants: tuple[tuple[int, int], ...], fact: Seen) -> None:
        if state is None:
            self._absent(member)
            return
        if member.stage == BATCHED:
            if state[:2] != member.state[:2]:
                self._again(member, state, fact.ended, member.batch)
            return
        for rule, earlier in wants:
            if rule == self.key:
                member.earlier = earlier
                break
        else:  # claimed meanwhile, or no longer matched
            self.drop(member)
            return
        if state != member.state:
            self._again(member, state, fact.ended, member.earlier)
        elif member.stage == CLOSING:
            member.seen = fact.began
            self._on_complete(member, fact.ended)
        elif member.stage == SETTLING:
            if fact.began >= member.looked + self.quiescence_s:  # the sum that made the deadline: no rounding between
                self.queue.pop(member, None)
                self._quiet(member, fact.began)
            elif member not in self.queue:
                self.queue[member] = member.looked + self.quiescence_s
        elif member.stage == INCOMPLETE:
            member.seen = fact.began
            self._look_later(member, fact.ended)

    def _again(self, member: Member, state: State, looked: float, earlier: int) -> None:
        """Start the quiet period over, with a new state or after a hint."""
        if member.stage == BATCHED:  # a new version of a claimed file: the claimed one is history
            fresh = Member(self, member.dir, member.name, state, looked, earlier or member.batch)
            self.dirs[member.dir][member.name] = fresh
            self.queue[fresh] = looked + self.quiescence_s
            if self.specs:
                self._await_companions(fresh)
            return
        if member.stage in (COMPLETE, CLOSING, BLOCKED):
            self._on_left(member)
        first = self.first_seen.setdefault(member, member.looked)
        member.state, member.looked, member.seen = state, looked, looked
        member.stage, member.why, member.flag = SETTLING, "", ""
        if earlier:
            member.earlier = earlier
        for companion in member.companions:
            companion.verdict = None
        self.timers.cancel(member)
        if looked - first >= self.rule.complete.stalled_after_s:
            self._on_stalled(member, looked)
        self._requeue(member, looked)

    def _requeue(self, member: Member, at: float) -> None:
        member.stage = SETTLING
        self.queue.pop(member, None)  # to the end: the queue is in order of deadlines
        self.queue[member] = at + self.quiescence_s

    def _absent(self, member: Member) -> None:
        self.drop(member)

    def expire(self, now: float) -> None:
        """Ask for the second look at every file whose quiet period has run."""
        queue = self.queue
        due: list[Member] = []
        for member, deadline in queue.items():
            if deadline > now:
                break
            due.append(member)
        if not due:
            return
        by_dir: dict[str, list[str]] = {}
        for member in due:
            del queue[member]
            names = by_dir.get(member.dir)
            if names is None:
                names = by_dir[member.dir] = []
            names.append(member.name)
            if member.companions:
                self._look_at_companions(member)
        self._emit_looks(self.root, by_dir)

    def deadline(self) -> float | None:
        """Return when the next quiet period ends."""
        for due in self.queue.values():
            return due
        return None

    def relook(self) -> None:
        """Start every quiet period over with a fresh look (the root was away)."""
        by_dir: dict[str, list[str]] = {}
        for members in self.dirs.values():
            for member in members.values():
                if member.unsettled:
                    member.state = NO_STATE  # so that the answer cannot count as the second look
                    self.timers.cancel(member)
                    self.queue.pop(member, None)
                    member.stage = SETTLING
                    by_dir.setdefault(member.dir, []).append(member.name)
        self._emit_looks(self.root, by_dir)

    def _emit_looks(self, root: int, by_dir: dict[str, list[str]]) -> None:
        for directory, names in by_dir.items():
            for start in range(0, len(names), LOOK_NAMES_MAX):
                self.out.append(Look(root, directory, tuple(names[start : start + LOOK_NAMES_MAX])))

    # ------------------------------------------------------- quiet, and then

    def _quiet(self, member: Member, seen: float) -> None:
        member.seen = seen
        self._judge(member, seen)

    def _judge(self, member: Member, at: float) -> None:
        """The file is quiet: rewritten, empty, companions, checks, in this order."""
        if member.earlier and not self._on_rewritten(member, at):
            return
        if member.state[0] == 0 and not self.rule.complete.allow_empty:
            self._incomplete(member, "the file is empty", at)
            return
        if member.companions or self.specs:
            if not member.companions:
                self._await_companions(member)
            waiting = self._waiting_for(member, at)
            if waiting:
                self._await(member, waiting, at)
                return
        self._check(member, at)

    def _check(self, member: Member, at: float) -> None:
        if not self.checks and not member.companions:
            self.complete(member, at)
            return
        pending = [c for c in member.companions if c.quiet and c.checks and c.verdict is None]
        if not self.checks and not pending:
            self._companions_judged(member, at)
            return
        member.stage, member.why = CHECKING, "its checks are running"
        self.agreed.discard(member)
        for companion in pending:
            assert companion.state is not None
            self.out.append(Check(self.key, companion.root, companion.path, companion.state, companion.checks))
        if self.checks:
            there = tuple((c.root, c.path) for c in member.companions if c.quiet)
            self.out.append(Check(self.key, self.root, member.path, member.state, self.checks, there))

    def checked(self, fact: Checked) -> None:
        """Take a verdict; it counts only for exactly the state that was checked."""
        directory, name = split(fact.path)
        if fact.root == self.root:
            member = self.dirs.get(directory, {}).get(name)
            if member is not None and member.stage == CHECKING and member.state == fact.state:
                self._verdict(member, fact)
        for member, companion in list(self.awaited.get((fact.root, directory), {}).get(name, {}).items()):
            if companion.state == fact.state and member.stage == CHECKING:
                companion.verdict, companion.why = fact.verdict, fact.why
                if not self.checks or member in self.agreed:  # answers come in any order
                    self._companions_judged(member, fact.at)

    def _verdict(self, member: Member, fact: Checked) -> None:
        member.why = fact.why
        missing = [n for n in fact.needs if all(c.name != n or c.dir != member.dir for c in member.companions)]
        if missing:
            for name in missing:
                self._register(member, Companion(None, self.root, member.dir, name))
            self._await(member, f"needs {', '.join(missing[:3])}", fact.at)
            return
        if fact.verdict == Verdict.INCOMPLETE:
            self._incomplete(member, fact.why, fact.at)
        elif fact.verdict == Verdict.SUSPECT:
            self._suspect(member, fact.why, fact.at)
        else:
            if member.companions:
                self.agreed.add(member)
            self._companions_judged(member, fact.at)

    def _companions_judged(self, member: Member, at: float) -> None:
        worst, why = Verdict.COMPLETE, ""
        for companion in member.companions:
            if companion.quiet and companion.checks:
                if companion.verdict is None:
                    return  # still being checked
                if _RANK[companion.verdict] > _RANK[worst]:
                    worst, why = companion.verdict, f"its companion {companion.path}: {companion.why}"
        if worst == Verdict.INCOMPLETE:
            for companion in member.companions:
                if companion.verdict == Verdict.INCOMPLETE:
                    companion.quiet, companion.verdict = False, None
            self._await(member, why, at)
        elif worst == Verdict.SUSPECT:
            self._suspect(member, why, at)
        else:
            self.complete(member, at)

    def complete(self, member: Member, at: float) -> None:
        """The file is complete: to its batch."""
        self._settled(member)
        member.stage = COMPLETE
        member.why = ""
        self._on_complete(member, at)

    def block(self, member: Member, why: str) -> None:
        """The file cannot go on by itself; a person decides."""
        self._settled(member)
        member.stage, member.why = BLOCKED, why
        self._on_left(member)

    def _settled(self, member: Member) -> None:
        if member.stage == SETTLING:
            self.queue.pop(member, None)  # and nothing else: a timer is set only when this stage is left
        else:
            self.timers.cancel(member)
        if self.agreed:
            self.agreed.discard(member)
        if self.first_seen:
            self.first_seen.pop(member, None)
            self.timers.cancel((member, "stall"))

    def _incomplete(self, member: Member, why: str, at: float) -> None:
        member.stage, member.why = INCOMPLETE, why
        self.first_seen.setdefault(member, member.looked)
        self._watch_stall(member, at)
        self._look_later(member, at)

    def _look_later(self, member: Member, at: float) -> None:
        """An incomplete file is looked at again each quiet period: its next bytes may come without a hint."""
        wait = max(self.quiescence_s, 1.0)
        self.timers.set(member, at + wait, lambda now: self._emit_looks(self.root, {member.dir: [member.name]}))

    def _suspect(self, member: Member, why: str, at: float) -> None:
        if self.rule.complete.suspect_s is None:
            self.block(member, f"suspect: {why}")
            return
        member.stage, member.why = SUSPECT, why
        since = member.looked
        self.timers.set(member, since + self.rule.complete.suspect_s, lambda now: self._suspect_goes(member, now))

    def _suspect_goes(self, member: Member, now: float) -> None:
        member.flag = "suspect"
        self.complete(member, now)

    def _watch_stall(self, member: Member, at: float) -> None:
        key = (member, "stall")
        if self.timers.at(key) is None:
            first = self.first_seen.get(member, member.looked)
            due = first + self.rule.complete.stalled_after_s
            self.timers.set(key, max(due, at), lambda now: self._on_stalled(member, now))

    # ------------------------------------------------------------- companions

    def _await_companions(self, member: Member) -> None:
        """Begin to look at the companions at once, so that their quiet periods run beside the file's own."""
        captures = patterns.captures_of(self.rule, member.path)
        if captures is None:
            return
        for spec in self.specs:
            path = patterns.render(spec.file, captures)
            root = self.roots.get(spec.root)
            if root is not None:
                self._register(member, Companion(spec, root, *split(str(path))))
        self._look_at_companions(member)

    def _register(self, member: Member, companion: Companion) -> None:
        member.companions = (*member.companions, companion)
        names = self.awaited.setdefault((companion.root, companion.dir), {})
        names.setdefault(companion.name, {})[member] = companion

    def _look_at_companions(self, member: Member) -> None:
        for companion in member.companions:
            self._emit_looks(companion.root, {companion.dir: [companion.name]})

    def _companion_look(self, member: Member, companion: Companion, state: State | None, fact: Seen) -> None:
        if state is None:
            companion.state, companion.quiet, companion.why = None, False, "not there yet"
        elif state != companion.state:
            companion.state, companion.looked, companion.quiet = state, fact.ended, False
            companion.verdict, companion.why = None, "still settling"
        elif not companion.quiet and fact.began >= companion.looked + self.quiescence_s:
            if state[0]:
                companion.quiet, companion.why = True, ""
            else:
                companion.why = "empty"
        if member.stage == AWAITING:
            waiting = self._waiting_for(member, fact.ended)
            if waiting:
                member.why = waiting
            else:
                self._judge(member, fact.ended)

    def _waiting_for(self, member: Member, at: float) -> str:
        """Return what is missing, '' if nothing is waited for any more."""
        for companion in member.companions:
            if companion.quiet:
                continue
            spec = companion.spec
            waited = at - member.seen
            if spec and spec.missing == "go" and waited >= spec.wait_s and companion.state is None:
                continue
            return f"companion {companion.path}: {companion.why}"
        return ""

    def _await(self, member: Member, why: str, at: float) -> None:
        member.stage, member.why = AWAITING, why
        self._companion_timer(member, at)

    def _companion_timer(self, member: Member, at: float) -> None:
        # Look again just after the younger companions can have become quiet.
        again = min(COMPANION_LOOK_S, max(self.quiescence_s, 0.05))
        self.timers.set(member, at + again, lambda now: self._companion_due(member, now))

    def _companion_due(self, member: Member, now: float) -> None:
        if member.stage != AWAITING:
            return
        limits = [c.spec.wait_s for c in member.companions if not c.quiet and c.spec and c.spec.missing == "block"]
        limits += [self.rule.complete.stalled_after_s for c in member.companions if not c.quiet and c.spec is None]
        if limits and now - member.seen >= min(limits):
            self.block(member, f"{member.why or 'a companion is missing'}; waited {min(limits):g} s for it")
            return
        if not self._waiting_for(member, now):
            self._judge(member, now)
            return
        self._look_at_companions(member)
        self._companion_timer(member, now)

    def waits_until(self, member: Member) -> float | None:
        """Return when the wait for a missing companion ends (monotonic), None if nothing ends it."""
        ends = [c.spec.wait_s for c in member.companions if not c.quiet and c.spec]
        return member.seen + min(ends) if ends else None

    # ------------------------------------------------------------------- ends

    def drop(self, member: Member) -> None:
        """Let go of a file: gone, claimed, skipped."""
        self._forget(member)
        self._on_left(member)

    def _forget(self, member: Member) -> None:
        members = self.dirs.get(member.dir)
        if members is None or members.get(member.name) is not member:
            return
        del members[member.name]
        if not members and members is not self._open:
            del self.dirs[member.dir]
        self.count -= 1
        self._settled(member)
        self.release(member)

    def release(self, member: Member) -> None:
        """Look for the file's companions no more."""
        for companion in member.companions:
            place = (companion.root, companion.dir)
            names = self.awaited.get(place, {})
            if (waiting := names.get(companion.name)) is not None:
                waiting.pop(member, None)
                if not waiting:
                    del names[companion.name]
                if not names:
                    self.awaited.pop(place, None)
        member.companions = ()

    def members(self) -> Iterator[Member]:
        """Yield every file that is known here."""
        for members in self.dirs.values():
            yield from members.values()

    def get(self, path: str) -> Member | None:
        """Return the file at a root-relative path."""
        directory, name = split(path)
        return self.dirs.get(directory, {}).get(name)
