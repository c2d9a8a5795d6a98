"""Decide that a file is complete: seen unchanged for the whole quiet period, companions there, checks agreed.

Pure. Silence is never evidence: quiet means two looks with the same state, the
second begun at least a quiet period after the first had ended, and no hint in
between. One `Settling` serves one rule (or the markers of one rule); all its
files wait equally long, so the queue of deadlines is a dict in order of
insertion, and the per-file path makes one object a file and no timer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
INCOMPLETE_LOOK_MAX_S = 300.0  # and how rarely an old incomplete file is; its checks read some kilobytes
LATE_LOOK_S = 60.0  # how often companions are looked for that others went without
LATE_MAX = 10_000  # of them in one rule, the newest; each is one lstat a minute
SIBLINGS_MAX = 9  # files whose measures a new one is compared with: enough for a majority, soon renewed
ALIKE_MIN = 3  # siblings without which a check can compare nothing
LOOK_NAMES_MAX = 1_000  # names in one Look: the pair of instants of its answer must stay tight

Siblings = dict[str, dict[str, int]]  # check -> path -> what it measured; of companions under their pattern, too

_NEVER = float("-inf")

_RANK = {Verdict.COMPLETE: 0, Verdict.UNKNOWN: 1, Verdict.SUSPECT: 2, Verdict.INCOMPLETE: 3}


def _compares(options: Mapping[str, Any]) -> bool:
    """Say whether a check compares with siblings: `siblings: 5%`, or `frames: siblings`."""
    return options.get("siblings") is not None or "siblings" in options.values()


@dataclass(slots=True, eq=False)
class Companion:
    """A file that others wait for: one object for all of them, as a thousand movies may need one gain reference."""

    spec: With | None  # None: a check asked for it by name
    root: int
    dir: str
    name: str
    state: State | None = None
    looked: float = 0.0
    quiet: bool = False
    verdict: Verdict | None = None
    why: str = "not there yet"
    asked_at: float = _NEVER  # when the look that is under way was asked for
    answered_at: float = _NEVER  # when the last answered look began
    checking: State | None = None  # the state that is being checked
    content: str = ""  # as of a file
    flag: str = ""
    members: dict[Member, None] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return join(self.dir, self.name)

    @property
    def checks(self) -> tuple[CheckSpec, ...]:
        return self.spec.checks if self.spec else ()

    @property
    def scope(self) -> str:
        """Return under which name its measures are kept."""
        return f"{self.spec.file}: " if self.spec else ""


class Member:
    """One file of one rule, on its way from the first look to its batch."""

    __slots__ = (
        "batch",
        "companions",
        "content",
        "dir",
        "earlier",
        "flag",
        "home",
        "looked",
        "name",
        "seen",
        "stage",
        "state",
        "why",
    )

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
        self.content = ""  # what the file itself says of its content (checks.Outcome)
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
    `on_companion(companion, at)` is told of each answered look at a companion,
    with None when nobody waits for it any more, and `on_late(companion, member,
    at)` of one that has come complete after its file went without it.
    `on_owed(companion, member)` is told when a companion begins to be late, and
    with None when it is looked for no more. `siblings` (check -> path ->
    measure) is filled here and read again after a restart; `on_measured()` is
    told of a change. Claims joined before batch `since` are too old to be trusted: what this object
    remembers of claimed files begins there.
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
        on_blocked: Callable[[Member], None],
        on_rewritten: Callable[[Member, float], bool],
        on_stalled: Callable[[Member, float], None],
        on_companion: Callable[[Companion, float | None], None],
        on_late: Callable[[Companion, Member, float], None],
        on_owed: Callable[[Companion, Member | None], None],
        on_measured: Callable[[], None],
        siblings: Siblings,
        since: int,
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
        self.awaited: dict[tuple[int, str], dict[str, list[Companion]]] = {}
        self.late: dict[Companion, Member] = {}  # companions that their file went without, oldest first
        self.first_seen: dict[Member, float] = {}  # only of members that did not settle at the first try
        self.compares = [name for name, options in checks if _compares(options)]
        self.alone: set[Member | Companion] = set()  # being checked with fewer siblings than can be compared with
        self.agreed: dict[Member, tuple[Verdict, str]] = {}  # what their own checks said; those of companions still run
        self.count = 0
        self._open: dict[str, Member] | None = None  # the directory that `found` is filling
        self._on_complete = on_complete
        self._on_left = on_left
        self._on_blocked = on_blocked
        self._on_rewritten = on_rewritten
        self._on_stalled = on_stalled
        self._on_companion = on_companion
        self._on_late = on_late
        self._on_owed = on_owed
        self._on_measured = on_measured
        self.siblings = siblings
        self._since = since
        self._away = False

    # ------------------------------------------------------------------ looks

    def found(self, fact: Seen, rows: Sequence[Row], earlier: int) -> None:
        """Take the rows of a hint's look or of a sweep that this rule wants."""
        directory, ended, began = fact.dir, fact.ended, fact.began
        members = self.dirs.get(directory)
        if members is None:
            members = self.dirs[directory] = {}
        self._open = members
        hinted = fact.cause == "hint"
        trusted = fact.as_of >= self._since and fact.signal in self.trust
        due = ended + self.quiescence_s
        queue = self.queue
        awaiting: list[Member] = []
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
                    self._register_all(member)
                    awaiting.append(member)
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
        if awaiting:
            self._look_at((c for m in awaiting for c in m.companions), ended, always=True)

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
                for companion in tuple(names.get(name, ())):
                    self._companion_look(companion, state, fact)

    def unread(self, root: int, directory: str, names: Sequence[str], why: str, at: float) -> None:
        """Take that names could not be looked at: not yet, never gone."""
        members = self.dirs.get(directory) if root == self.root and not self._away else None
        for name in names if members else ():
            member = members.get(name) if members else None
            if member is None or not (member.unsettled or member.stage == CLOSING):
                continue
            if member.stage == CLOSING:
                self._on_left(member)
            self.timers.cancel(member)  # what its stage waited for
            self._requeue(member, at)
            member.why = why
            if at - self.first_seen.setdefault(member, member.looked) >= self.rule.complete.stalled_after_s:
                self._on_stalled(member, at)
        awaited = self.awaited.get((root, directory))
        for companion in [c for name in names for c in awaited.get(name, ())] if awaited else ():
            changed = companion.state != NO_STATE
            companion.state, companion.quiet, companion.verdict, companion.why = NO_STATE, False, None, why
            self._companion_answered(companion, at, at, changed=changed)

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
            self._quiet(member, fact.began)  # what is wrong may lie elsewhere: a linked file, a disk that failed once

    def _again(self, member: Member, state: State, looked: float, earlier: int) -> None:
        """Start the quiet period over, with a new state or after a hint."""
        if member.stage == BATCHED:  # a new version of a claimed file: the claimed one is history
            fresh = Member(self, member.dir, member.name, state, looked, earlier or member.batch)
            self.dirs[member.dir][member.name] = fresh
            self.queue[fresh] = looked + self.quiescence_s
            if self.specs:
                self._await_companions(fresh, looked)
            return
        if member.stage in (COMPLETE, CLOSING, BLOCKED):
            self._on_left(member)
        if member.companions and state != member.state:
            self._let_go_of_needs(member)  # a new version may name others
        first = self.first_seen.setdefault(member, looked if member.state is NO_STATE else member.looked)
        member.state, member.looked, member.seen = state, looked, looked
        member.stage, member.why, member.flag, member.content = SETTLING, "", "", ""
        if earlier:
            member.earlier = earlier
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
        companions: list[Companion] = []
        for member in due:
            del queue[member]
            names = by_dir.get(member.dir)
            if names is None:
                names = by_dir[member.dir] = []
            names.append(member.name)
            if member.companions:
                companions += member.companions
        if companions:
            self._look_at(companions, now, always=True)
        self._emit_looks(self.root, by_dir)

    def deadline(self) -> float | None:
        """Return when the next quiet period ends."""
        for due in self.queue.values():
            return due
        return None

    def suspend(self) -> None:
        """The root is away: nothing that was seen, doubted, checked or waited for counts."""
        self._away = True
        self.queue.clear()
        self.agreed.clear()
        for member in self.members():
            if member.unsettled:
                self.timers.cancel(member)
                self.timers.cancel((member, "stall"))
                self.first_seen.pop(member, None)
                member.state = NO_STATE  # so that the next answer cannot count as the second look
                member.stage, member.why = SETTLING, ""

    def relook(self) -> None:
        """Start every quiet period over with a fresh look: the root is back."""
        self._away = False
        self.look_at([member for member in self.members() if member.unsettled])

    def look_at(self, members: Iterable[Member], companions_at: float | None = None) -> None:
        """Look at some files now, and with an instant at their companions, too."""
        by_dir: dict[str, list[str]] = {}
        for member in members:
            by_dir.setdefault(member.dir, []).append(member.name)
            if companions_at is not None and member.companions:
                self._look_at(member.companions, companions_at, always=True)
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
        empty = member.state[0] == 0 and self.key > 0  # a marker says enough by its name
        if empty and not self.rule.complete.allow_empty:
            self._incomplete(member, "the file is empty", at)
            return
        if member.companions or self.specs:
            if not member.companions:
                self._await_companions(member, at)
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
        self.agreed.pop(member, None)
        for companion in pending:
            if companion.state is None or companion.checking == companion.state:
                continue  # another file has asked for it
            self._check_companion(companion, companion.state)
        if self.checks:
            there = tuple((c.root, c.path) for c in member.companions if c.quiet)
            alike = self._alike(self.checks, "", member.path)
            if not self._enough(self.compares, alike):
                self.alone.add(member)
            self.out.append(Check(self.key, self.root, member.path, member.state, self.checks, there, alike))

    def _check_companion(self, companion: Companion, state: State) -> None:
        companion.checking = state
        alike = self._alike(companion.checks, companion.scope, companion.path)
        scope = companion.scope
        if not self._enough([name for name, options in companion.checks if _compares(options)], alike):
            self.alone.add(companion)
        self.out.append(Check(self.key, companion.root, companion.path, state, companion.checks, (), alike, scope))

    def _alike(self, checks: Sequence[CheckSpec], scope: str, path: str) -> dict[str, tuple[int, ...]]:
        """Return what each check measured of other files."""
        if not self.siblings:
            return {}
        known = ((name, self.siblings.get(scope + name)) for name, _ in checks)
        return {name: tuple(n for other, n in of.items() if other != path) for name, of in known if of}

    @staticmethod
    def _enough(compares: Sequence[str], alike: Mapping[str, Sequence[int]]) -> bool:
        return all(len(alike.get(name, ())) >= ALIKE_MIN for name in compares)

    def _alone_before(self, one: Member | Companion, compares: Sequence[str], scope: str, fact: Checked) -> bool:
        """Say whether others of the same burst have been measured meanwhile, so that it is to be checked once more."""
        if one not in self.alone:
            return False
        self.alone.discard(one)
        specs: list[CheckSpec] = [(name, {}) for name in compares]
        return fact.verdict != Verdict.INCOMPLETE and self._enough(compares, self._alike(specs, scope, fact.path))

    def _measured(self, scope: str, fact: Checked) -> None:
        """Remember by what the next files are compared: suspect ones count, or nothing could ever change."""
        if fact.verdict == Verdict.INCOMPLETE or not fact.measures:
            return
        for name, measure in fact.measures:
            of = self.siblings.setdefault(scope + name, {})
            of.pop(fact.path, None)
            of[fact.path] = measure
            if len(of) > SIBLINGS_MAX:
                del of[next(iter(of))]
        self._on_measured()

    def checked(self, fact: Checked) -> None:
        """Take a verdict; it counts only for exactly the state that was checked."""
        directory, name = split(fact.path)
        if fact.root == self.root and not fact.scope:  # a file may be a companion, too, with other checks
            member = self.dirs.get(directory, {}).get(name)
            if member is not None and member.stage == CHECKING and member.state == fact.state:
                self._verdict(member, fact)
        for companion in tuple(self.awaited.get((fact.root, directory), {}).get(name, ())):
            if companion.checking != fact.state or companion.scope != fact.scope:
                continue
            companion.checking = None
            if companion.state != fact.state:
                continue
            compares = [name for name, options in companion.checks if _compares(options)] if self.alone else ()
            if self.alone and self._alone_before(companion, compares, companion.scope, fact):
                self._check_companion(companion, companion.state)
                continue
            companion.verdict, companion.why, companion.content = fact.verdict, fact.why, fact.content
            self._measured(companion.scope, fact)
            for member in list(companion.members):
                if member.stage == CHECKING and (not self.checks or member in self.agreed):  # in any order
                    self._companions_judged(member, fact.at)
            self._late(companion, fact.at)

    def _verdict(self, member: Member, fact: Checked) -> None:
        member.why, member.content = fact.why, fact.content
        known = {companion.path for companion in member.companions if companion.root == self.root}
        missing = [name for name in fact.needs if join(member.dir, name) not in known]
        if missing:
            for name in missing:
                self._register(member, None, self.root, *split(join(member.dir, name)))
            self._await(member, f"needs {', '.join(missing[:3])}", fact.at)
            self._look_at(member.companions, fact.at, always=True)
            return
        if fact.verdict != Verdict.INCOMPLETE or fact.needs:  # else a later check was not asked what it needs
            self._let_go_of_needs(member, {join(member.dir, name) for name in (*fact.needs, *fact.read)})
        if self.alone and self._alone_before(member, self.compares, "", fact):
            self._check(member, fact.at)
            return
        self._measured("", fact)
        if fact.verdict == Verdict.INCOMPLETE:
            self._incomplete(member, fact.why, fact.at)
        elif member.companions:
            self.agreed[member] = (fact.verdict, fact.why)
            self._companions_judged(member, fact.at)
        elif fact.verdict == Verdict.SUSPECT:
            self._suspect(member, fact.why, fact.at)
        else:
            self.complete(member, fact.at)

    def _companions_judged(self, member: Member, at: float) -> None:
        waiting = self._waiting_for(member, at)
        if waiting:  # one has changed during the check: what was read is void
            self._await(member, waiting, at)
            return
        worst, why = self.agreed.get(member, (Verdict.COMPLETE, ""))
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
        self._on_blocked(member)

    def _settled(self, member: Member) -> None:
        if member.stage == SETTLING:
            self.queue.pop(member, None)  # and nothing else: a timer is set only when this stage is left
        else:
            self.timers.cancel(member)
            if member.companions:
                self.timers.cancel((member, "beside"))
        if self.agreed:
            self.agreed.pop(member, None)
        if self.alone:
            self.alone.discard(member)
        if self.first_seen:
            self.first_seen.pop(member, None)
            self.timers.cancel((member, "stall"))

    def _incomplete(self, member: Member, why: str, at: float) -> None:
        member.stage, member.why = INCOMPLETE, why
        self.first_seen.setdefault(member, member.looked)
        self._watch_stall(member, at)
        self._look_later(member, at)

    def _look_later(self, member: Member, at: float) -> None:
        """An incomplete file is looked at and checked again, ever more rarely: the rest may come without a hint."""
        age = at - self.first_seen.get(member, at)
        wait = max(self.quiescence_s, 1.0, min(age / 10, INCOMPLETE_LOOK_MAX_S))
        self.timers.set(member, at + wait, lambda now: self._look_again(member, now))

    def _look_again(self, member: Member, now: float) -> None:
        if member.companions:
            self._look_at(member.companions, now, always=True)
        self._emit_looks(self.root, {member.dir: [member.name]})

    def _suspect(self, member: Member, why: str, at: float) -> None:
        if self.rule.complete.suspect_s is None:
            self.block(member, f"suspect: {why}")
            return
        member.stage, member.why = SUSPECT, why
        since = member.looked
        self.timers.set(member, since + self.rule.complete.suspect_s, lambda now: self._suspect_goes(member, now))
        self._look_beside(member, at)

    def _look_beside(self, member: Member, at: float) -> None:
        """Look at a suspect file's companions now and then: an mdoc may name it a minute later."""
        if member.companions:
            key = (member, "beside")
            self.timers.set(key, at + self._companion_look_s, lambda now: self._beside_due(member, now))

    def _beside_due(self, member: Member, now: float) -> None:
        if member.stage == SUSPECT:
            self._look_beside(member, now)
            self._look_at(member.companions, now, always=True)

    def _suspect_goes(self, member: Member, now: float) -> None:
        member.flag = "suspect"
        self.complete(member, now)

    def _watch_stall(self, member: Member, at: float, least_s: float = 0.0) -> None:
        key = (member, "stall")
        if self.timers.at(key) is None:
            first = self.first_seen.get(member, member.looked)
            due = first + max(self.rule.complete.stalled_after_s, least_s)
            self.timers.set(key, max(due, at), lambda now: self._on_stalled(member, now))

    # ------------------------------------------------------------- companions

    def _await_companions(self, member: Member, at: float) -> None:
        """Begin to look at the companions at once, so that their quiet periods run beside the file's own."""
        self._register_all(member)
        self._look_at(member.companions, at, always=True)

    def _register_all(self, member: Member) -> None:
        captures = patterns.captures_of(self.rule, member.path)
        if captures is None:
            return
        for spec in self.specs:
            path = patterns.render(spec.file, captures)
            root = self.roots.get(spec.root)
            if root is not None:
                self._register(member, spec, root, *split(str(path)))

    def _register(self, member: Member, spec: With | None, root: int, directory: str, name: str) -> None:
        sharing = self.awaited.setdefault((root, directory), {}).setdefault(name, [])
        companion = next((c for c in sharing if c.spec is spec), None)
        if companion is None:
            companion = Companion(spec, root, directory, name)
            sharing.append(companion)
        companion.members[member] = None
        member.companions = (*member.companions, companion)

    def _let_go_of_needs(self, member: Member, kept: Collection[str] = ()) -> None:
        """Wait no more for what a check asked for, but for what it still needs: other files make up the set now."""
        gone = [c for c in member.companions if c.spec is None and c.path not in kept]
        if gone:
            member.companions = tuple(c for c in member.companions if c not in gone)
            for companion in gone:
                self._let_go(companion, member)

    @property
    def _companion_look_s(self) -> float:
        return min(COMPANION_LOOK_S, max(self.quiescence_s, 0.05))

    def _look_at(self, companions: Iterable[Companion], at: float, *, always: bool = False) -> None:
        """Look at companions, each once, not where a look is under way; `always`: even where one was just answered."""
        by_place: dict[tuple[int, str], list[str]] = {}
        for companion in companions:
            if at < companion.asked_at + 60.0:
                continue
            ripe = companion.state is not None and companion.answered_at < companion.looked + self.quiescence_s <= at
            if always or ripe or at >= companion.answered_at + self._companion_look_s:
                companion.asked_at = at
                by_place.setdefault((companion.root, companion.dir), []).append(companion.name)
        for (root, directory), names in by_place.items():
            self._emit_looks(root, {directory: names})

    def confirm(self, companions: Iterable[Companion], at: float) -> None:
        """Look at companions once more: their batch is closing."""
        self._look_at(companions, at, always=True)

    def _companion_look(self, companion: Companion, state: State | None, fact: Seen) -> None:
        was = (companion.state, companion.quiet, companion.why)
        if state is None:
            companion.state, companion.quiet, companion.verdict, companion.why = None, False, None, "not there yet"
        elif state != companion.state:
            companion.state, companion.looked, companion.quiet = state, fact.ended, False
            companion.content = companion.flag = ""
            companion.verdict, companion.why = None, "still settling"
        elif not companion.quiet and fact.began >= companion.looked + self.quiescence_s:
            if state[0] or companion.spec is None:  # of one that a check asked for, that check judges
                companion.quiet, companion.why = True, ""
            else:
                companion.why = "empty"
        changed = (companion.state, companion.quiet, companion.why) != was
        self._companion_answered(companion, fact.began, fact.ended, changed=changed)

    def _companion_answered(self, companion: Companion, began: float, at: float, *, changed: bool) -> None:
        companion.asked_at, companion.answered_at = _NEVER, began
        for member in list(companion.members) if changed else ():
            if member.stage == AWAITING:
                if companion.spec is None and companion.state is not None:  # a set that grows has not stalled
                    self.first_seen[member] = at
                    self.timers.cancel((member, "stall"))
                    self._watch_stall(member, at, self._longest_wait_s(member))
                waiting = self._waiting_for(member, at)
                if not waiting:
                    self._judge(member, at)
                elif companion.spec and companion.quiet and not self._waiting_for(member, at, needs=False):
                    self._check(member, at)  # with it, something that was asked for may be needed no more
                else:
                    member.why = waiting
            elif member.stage in (SUSPECT, INCOMPLETE):  # what it lacked may have come
                self.timers.cancel(member)
                if waiting := self._waiting_for(member, at):
                    self._await(member, waiting, at)
                else:
                    self._judge(member, at)
            elif member.stage in (COMPLETE, CLOSING) or (member.stage == BLOCKED and companion.state is not None):
                self._again(member, member.state, at, member.earlier)
        self._on_companion(companion, at)
        self._late(companion, at)

    def _waiting_for(self, member: Member, at: float, *, needs: bool = True) -> str:
        """Return what is missing, '' if nothing is waited for any more; without `needs`: of what the rule names."""
        for companion in member.companions:
            spec = companion.spec
            if companion.quiet or not (spec or needs):
                continue
            waited = at - self._quiet_since(member)
            if spec and spec.missing == "go" and waited >= spec.wait_s and companion.state is None:
                continue
            return f"companion {companion.path}: {companion.why}"
        return ""

    def _quiet_since(self, member: Member) -> float:
        """Return since when this version is quiet; later looks at it do not begin a wait anew."""
        return min(member.seen, member.looked + self.quiescence_s)

    def _await(self, member: Member, why: str, at: float) -> None:
        member.stage, member.why = AWAITING, why
        self.first_seen.setdefault(member, member.looked)
        self._watch_stall(member, at, self._longest_wait_s(member))
        self._companion_timer(member, at)

    @staticmethod
    def _longest_wait_s(member: Member) -> float:
        return max((c.spec.wait_s for c in member.companions if c.spec), default=0.0)

    def _companion_timer(self, member: Member, at: float) -> None:
        # Look again just when the younger companions can have become quiet.
        quiet = [c.looked + self.quiescence_s for c in member.companions if c.state is not None and not c.quiet]
        due = min([at + self._companion_look_s, *(end for end in quiet if end > at)])
        self.timers.set(member, due, lambda now: self._companion_due(member, now))

    def _companion_due(self, member: Member, now: float) -> None:
        if member.stage != AWAITING:
            return
        limits = [c.spec.wait_s for c in member.companions if not c.quiet and c.spec and c.spec.missing == "block"]
        if limits and now - self._quiet_since(member) >= min(limits):
            self.block(member, f"{member.why or 'a companion is missing'}; waited {min(limits):g} s for it")
            return
        if not self._waiting_for(member, now):
            self._judge(member, now)
            return
        self._companion_timer(member, now)
        self._look_at(member.companions, now)

    def waits_until(self, member: Member) -> float | None:
        """Return when the wait for a missing companion ends (monotonic), None if nothing ends it."""
        ends = [
            c.spec.wait_s
            for c in member.companions
            if not c.quiet and c.spec and (c.spec.missing == "block" or c.state is None)
        ]
        return self._quiet_since(member) + min(ends) if ends else None

    # ------------------------------------------------------------------- ends

    def end(self) -> None:
        """Let go of everything."""
        for key in ((self, "late"), *((companion, "late") for companion in self.late)):
            self.timers.cancel(key)
        for member in list(self.members()):
            self.drop(member)
        self.late.clear()
        self.awaited.clear()

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
        """Look for the file's companions no more, but for those that it goes without."""
        for companion in member.companions:
            spec = companion.spec
            if member.batch and spec and spec.missing == "go" and companion.state is None:
                self._go_without(companion, member)
                continue
            if member.batch and companion.quiet and (other := self.late.get(companion)):
                self._forget_late(companion, other)  # it has gone with this one
            self._let_go(companion, member)
        member.companions = ()

    def _let_go(self, companion: Companion, member: Member) -> None:
        companion.members.pop(member, None)
        if companion.members:
            return
        self.alone.discard(companion)
        place = (companion.root, companion.dir)
        names = self.awaited.get(place, {})
        sharing = [c for c in names.get(companion.name, ()) if c is not companion]
        if sharing:
            names[companion.name] = sharing
        else:
            names.pop(companion.name, None)
        if not names:
            self.awaited.pop(place, None)
        self._on_companion(companion, None)

    # ---------------------------------------------------------- late companions

    def _go_without(self, companion: Companion, member: Member) -> None:
        if companion not in self.late:
            self.late[companion] = member
            self._on_owed(companion, member)
            if len(self.late) > LATE_MAX:
                oldest, its = next(iter(self.late.items()))
                self._forget_late(oldest, its)
        key = (self, "late")
        if self.timers.at(key) is None:
            self.timers.set(key, member.seen + LATE_LOOK_S, self._look_for_late)

    def owe(self, spec: With, root: int, path: str, of: str, batch: int, at: float) -> Companion:
        """Go on to look for a companion that a file went without before a restart."""
        companion = Companion(spec, root, *split(path))
        self.awaited.setdefault((root, companion.dir), {}).setdefault(companion.name, []).append(companion)
        member = Member(self, *split(of), NO_STATE, at, 0)
        member.batch = batch
        self.late[companion] = member
        self.timers.set((self, "late"), at, self._look_for_late)
        return companion

    def _look_for_late(self, now: float) -> None:
        if self.late:
            self.timers.set((self, "late"), now + LATE_LOOK_S, self._look_for_late)
            self._look_at(self.late, now, always=True)

    def _late(self, companion: Companion, at: float) -> None:
        """One that its file went without goes alone, once it is quiet and its checks agree."""
        if not self.late or (member := self.late.get(companion)) is None:
            return
        if not companion.quiet:
            due = companion.looked + self.quiescence_s
            if companion.state is not None and due > at:
                key = (companion, "late")
                self.timers.set(key, due, lambda now: self._look_at((companion,), now, always=True))
            return
        if companion.checks and companion.verdict is None:
            if companion.state is not None and companion.checking is None:
                self._check_companion(companion, companion.state)
        elif companion.verdict == Verdict.INCOMPLETE:
            companion.quiet, companion.verdict = False, None  # checked again at the next look
        elif companion.verdict == Verdict.SUSPECT and not self._may_go(companion, at):
            companion.quiet, companion.verdict = False, None
        else:
            companion.flag = "suspect" if companion.verdict == Verdict.SUSPECT else ""
            self._forget_late(companion, member)
            self._on_late(companion, member, at)

    def late_stalled(self, at: float) -> list[Companion]:
        """Return the companions that came late and cannot follow: not whole, suspect, empty, for too long."""
        limit = self.rule.complete.stalled_after_s
        return [c for c in self.late if c.state is not None and at - c.looked >= limit]

    def _may_go(self, companion: Companion, at: float) -> bool:
        after = self.rule.complete.suspect_s
        return after is not None and at >= companion.looked + after

    def _forget_late(self, companion: Companion, member: Member) -> None:
        self.late.pop(companion, None)
        self.timers.cancel((companion, "late"))
        self._on_owed(companion, None)
        self._let_go(companion, member)

    def members(self) -> Iterator[Member]:
        """Yield every file that is known here."""
        for members in self.dirs.values():
            yield from members.values()

    def get(self, path: str) -> Member | None:
        """Return the file at a root-relative path."""
        directory, name = split(path)
        return self.dirs.get(directory, {}).get(name)
