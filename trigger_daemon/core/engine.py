"""The core as one object: `step(fact) -> effects`, `next_deadline()`, `restore()`.

Pure. It owns every decision and touches nothing: what it wants written or done
it returns. The loop commits the records of a step before it carries the other
effects out, so whatever the world is asked was first remembered.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from trigger_daemon.core import model, patterns
from trigger_daemon.core.alarms import Alarms
from trigger_daemon.core.assembly import LATE, SIBLINGS, Assembly, canonical, companion_records, record_of
from trigger_daemon.core.model import (
    CLAIM_BASELINE,
    CLAIM_UNKNOWN,
    UNKNOWN,
    Answer,
    AttemptChanged,
    BaselineSet,
    BatchClosed,
    CannotVerify,
    Checked,
    Claimed,
    ClaimsCarried,
    Effect,
    Fact,
    Forgotten,
    Gauged,
    GroupSet,
    HoldSweeps,
    Kept,
    Log,
    Look,
    LookedBack,
    Mark,
    Marked,
    Mismatch,
    Mounted,
    NotStarted,
    Order,
    Ordered,
    Polled,
    Prepared,
    Pressed,
    Proved,
    Released,
    Removed,
    Renewed,
    RootChanged,
    Row,
    RulesAccepted,
    RulesOffered,
    RunState,
    Seen,
    Selected,
    Started,
    StartUnknown,
    Sweep,
    Swept,
    Tick,
    Troubled,
    Unreadable,
    UseRules,
    Vanished,
    counted,
    join,
    split,
)
from trigger_daemon.core.reclaims import Reclaims
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.rules import Retry, Rule
from trigger_daemon.core.runs import Run, Runs
from trigger_daemon.core.saved import OpenRun, Saved
from trigger_daemon.core.settle import (
    AWAITING,
    BLOCKED,
    COMPLETE,
    INCOMPLETE,
    NO_STATE,
    SETTLING,
    SUSPECT,
    Member,
    Settling,
    Siblings,
)
from trigger_daemon.core.storage import Condition, Limits, Storage
from trigger_daemon.core.timers import Timers

SETTLING_HIGH = 100_000  # files in their quiet period at which sweeps wait: about 60 MB
SETTLING_LOW = 50_000
PRUNE_EVERY_S = 0.5
SWEEP_AGAIN_S = 30.0  # after a failed sweep that something waits for; longer for a tree that takes long
SWEEP_AGAIN_DUTY = 20
CLOCK_STEP_S = 1.0  # a wall clock that went by so much more or less than time did was set
CLOCK_AHEAD_S = 86_400.0  # a mark so far in the future was made by a clock that has been set back
TELL_EVERY_S = 1.0
OUTDATED_MAX = 10_000  # files looked at anew because a run found them changed; beyond them sweeps do
LISTED_MAX = 10_000  # files in one answer

# What of a rule decides only what is done with files, not which are gathered: changing it makes no file wait again.
_BESIDES: dict[str, Any] = {
    "action": "",
    "options": {},
    "description": "",
    "priority": 0,
    "after": None,
    "proof": "none",
    "runs_max": None,
    "bandwidth": None,
    "retry": Retry(),
    "reclaim": None,
    "file": "",
    "line": 0,
    "existing": "process",
}

WITNESS_EVERY_S = 300.0  # a crash forgets at most so much of what was witnessed

AWAY = frozenset({"lost", "suspect"})

_STAGE = {
    "settling": "settling",
    "awaiting": "incomplete",
    "checking": "settling",
    "incomplete": "incomplete",
    "suspect": "incomplete",
    "blocked": "blocked",
    "complete": "waiting",
    "closing": "waiting",
    "batched": "batched",
}


class Providers(Protocol):
    """What the core must know of actions, without touching one."""

    def prepares(self, action: str) -> bool: ...
    def leaves_out(self, action: str) -> bool: ...
    def at_once(self, action: str) -> int | None: ...
    def refuses(self, action: str, options: Mapping[str, Any], root: str, path: str) -> str: ...
    def templates(self, action: str) -> frozenset[str]: ...
    def extra_names(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]: ...
    def destination(self, action: str, options: Mapping[str, Any]) -> str: ...
    def writes(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]: ...


class Engine:
    """All decisions of one daemon."""

    def __init__(
        self,
        *,
        host: str,
        providers: Providers,
        rand: Callable[[], float],
        runs_max: int = 4,
        time_zone: str = "UTC",
        keep_done_s: float = 90 * 86_400.0,
        limits: Sequence[Limits] = (),
        conditions: Sequence[Condition] = (),
        bandwidth: int | None = None,
    ) -> None:
        self.host = host
        self.providers = providers
        self.keep_done_s = keep_done_s
        self._zone = zoneinfo.ZoneInfo(time_zone)
        self._out: list[Effect] = []
        self._offset = 0.0  # UTC minus monotonic
        self._now = 0.0
        self.timers = Timers()
        self.alarms = Alarms(self._out, self._utc)
        self.marks: dict[tuple[int, str, str], tuple[int, float]] = {}
        self.storage = Storage(limits, conditions, bandwidth, out=self._out, alarms=self.alarms)
        self._witness = 0.0  # of earlier lives, less when this one began
        self.reclaims = Reclaims(
            out=self._out,
            alarms=self.alarms,
            timers=self.timers,
            utc=self._utc,
            storage=self.storage,
            root_path=lambda root: self.root_paths.get(root, f"root {root}"),
            believed=self._believed,
            paused=lambda: bool(self.runs.paused_all or self.reclaim_held),
        )
        self.waived: set[str] = set()  # rules whose claims hold no file back any more
        self.runs = Runs(
            timers=self.timers,
            out=self._out,
            alarms=self.alarms,
            utc=self._utc,
            witnessed=self.witnessed,
            rand=rand,
            marks=self.marks,
            runs_max=runs_max,
            prepares=providers.prepares,
            leaves_out=providers.leaves_out,
            at_once=providers.at_once,
            writes=providers.writes,
            storage=self.storage,
            on_outdated=self._outdate,
        )
        self._outdated: set[tuple[int, str, str]] = set()  # files to be looked at anew, known to no settling
        self.rules: dict[str, Rule] = {}
        self.assemblies: dict[int, Assembly] = {}
        self.roots: dict[str, int] = {}
        self.root_paths: dict[int, str] = {}
        self.root_health: dict[int, RootChanged] = {}
        self.rules_fault: Mapping[str, Any] | None = None
        self.settings_refused = False
        self.undecided: dict[str, Mapping[str, Any]] = {}  # rule -> what `rules apply` must answer
        self._offered: RulesOffered | None = None
        self._settlings: dict[int, Settling] = {}
        self._by_root: dict[int, list[Settling]] = {}
        self._baselines: set[tuple[int, int]] = set()
        self._baseline_asks: dict[tuple[int, int], tuple[int, str]] = {}  # -> ask, what becomes of what is there
        self._unknown: set[int] = set()  # rules of which files are left out that a recovered journal does not know
        self._unknown_before = ""  # in a recovered journal: what becomes of files that were there before it
        self._existing: dict[str, str] = {}  # what `rules apply` decided, until its baseline is taken
        self._siblings: dict[int, Siblings] = {}  # rule -> what its checks measured of the last files
        self._ask = 0
        self._last_batch = 0
        self._holding = False
        self._batched: dict[int, deque[tuple[int, list[Member]]]] = {}
        self._marking: set[int] = set()
        self._marked_at = 0.0
        self._told_at = 0.0
        self._restored: Sequence[OpenRun] | None = None
        self._rule_names: dict[int, str] = {}
        self._kept: Mapping[str, Any] = {}
        self._steps: dict[type, Callable[[Any], None]] = {
            Seen: self._seen,
            Unreadable: self._unreadable,
            Vanished: self._vanished,
            Swept: self._swept,
            RootChanged: self._root_changed,
            Marked: self._marked,
            Checked: self._checked,
            Tick: self._tick,
            Prepared: self.runs.prepared,
            Started: self.runs.started,
            NotStarted: self.runs.not_started,
            StartUnknown: self.runs.start_unknown,
            Polled: self.runs.polled,
            Proved: self._proved,
            Mismatch: self.runs.mismatch,
            CannotVerify: self.runs.cannot_verify,
            Order: self._order,
            RulesOffered: self._rules_offered,
            Gauged: self._gauged,
            Mounted: self._mounted,
            Pressed: self._pressed,
            Selected: self.reclaims.selected,
            Removed: self.reclaims.removed,
            LookedBack: self.runs.looked_back,
            Troubled: self._troubled,
        }

    # ------------------------------------------------------------------- time

    def _utc(self, at: float) -> float:
        return at + self._offset

    def witnessed(self, at: float) -> float:
        """Return how many seconds daemons have worked on this journal: an age that no set clock changes."""
        return self._witness + at

    def _keep_witness(self, at: float) -> None:
        """Let a later life go on from here, while `keep_for` of some rule counts by it."""
        self._out.append(Kept("witnessed", self.witnessed(at)))
        if any(rule.reclaim for rule in self.rules.values()):
            self.timers.set("witness", at + WITNESS_EVERY_S, self._keep_witness)

    @property
    def proving(self) -> frozenset[int]:
        """The rules that reclaim needs the records of: those that ask for it, and those that prove for them."""
        names = {name for rule in self.rules.values() if rule.reclaim for name in (rule.name, *rule.reclaim.proven_by)}
        return frozenset(rule.id for rule in self.rules.values() if rule.name in names)

    def end(self, at: float) -> list[Effect]:
        """Return what is to be written before the daemon ends."""
        return [Kept("witnessed", self.witnessed(at))] if any(rule.reclaim for rule in self.rules.values()) else []

    def _believed(self, root: int) -> bool:
        """Say whether a root is the one that was accepted, and can be looked at now."""
        health = self.root_health.get(root)
        return root in self.roots.values() and health is not None and health.health in ("ok", "degraded")

    def next_deadline(self) -> float | None:
        """Return the instant at which a `Tick` has something to do."""
        ends = [self.timers.next()]
        ends += [settling.deadline() for settling in self._settlings.values()]
        if self._batched:
            ends.append(self._marked_at + PRUNE_EVERY_S)
        known = [end for end in ends if end is not None]
        return min(known) if known else None

    # ------------------------------------------------------------------- step

    def step(self, fact: Fact) -> list[Effect]:
        """Take one fact; return what is to be written and done, in order."""
        self._steps[type(fact)](fact)
        if self.runs.dirty:
            self.runs.admit(self._instant(fact))
        effects = self._out[:]
        self._out.clear()
        return effects

    def _instant(self, fact: Fact) -> float:
        at: float = fact.ended if isinstance(fact, (Seen, Swept)) else fact.at
        self._now = max(self._now, at)
        return self._now

    def restore(self, saved: Saved, at: float, utc: float) -> None:
        """Take what the journal knows, before the first rules are offered."""
        self._offset, self._now = utc - at, at
        self._last_batch = saved.last_batch
        self._baselines = set(saved.baselines)
        self.marks.update({(m.rule, m.group, m.kind): (m.batch, m.time) for m in saved.groups})
        self.alarms.restore(saved.alarms, at)
        self.storage.forget(at)
        for (rule, state), counts in saved.tally.items():
            self.runs.tally[(rule, state)] = list(counts)
        if paused := saved.kept.get("paused"):
            self.runs.paused_all = str(paused)
        self.runs.paused_rules = set(saved.kept.get("paused_rules") or ())
        self._unknown_before = str(saved.kept.get("unknown_before") or "")
        self._existing = {key: str(value) for key, value in saved.kept.items() if key.startswith("existing:") and value}
        for key, kept in saved.kept.items():
            if key.startswith(SIBLINGS):
                self._siblings[int(key.removeprefix(SIBLINGS))] = {check: dict(of) for check, of in kept.items()}
        self._witness = float(saved.kept.get("witnessed") or 0.0) - at
        self.waived = set(saved.kept.get("waived") or ())
        self.reclaims.restore(saved.reclaims, saved.last_reclaim)
        self._rule_names = dict(saved.rules)
        self._kept = saved.kept
        self.root_paths.update(saved.roots)
        self._restored = saved.runs  # taken up when the first rules are known: `after` and limits hold for them

    def _tick(self, fact: Tick) -> None:
        self._now = max(self._now, fact.at)
        offset, self._offset = self._offset, fact.utc - fact.at
        if abs(self._offset - offset) > CLOCK_STEP_S:  # it was set, or the machine has slept: a time of day is nearer
            for assembly in self.assemblies.values():
                self._schedule(assembly, fact.at)
        for settling in self._settlings.values():
            settling.expire(fact.at)
        self.timers.run(fact.at)
        if self._batched and fact.at >= self._marked_at + PRUNE_EVERY_S:
            self._marked_at = fact.at
            for root in self._batched.keys() - self._marking:
                self._marking.add(root)
                self._out.append(Mark(root))
        if fact.at - self._told_at >= TELL_EVERY_S:
            self._told_at = fact.at
            self._tell_blocked(fact.at)
            self.runs.tell_stranded(fact.at)
        self._balance_sweeps()

    # ------------------------------------------------- storage and the instrument

    def use_settings(
        self, limits: Sequence[Limits], conditions: Sequence[Condition], bandwidth: int | None, runs_max: int,
        destination_max: int | None = None,
    ) -> None:  # fmt: skip
        """Take what the settings say of storage and throttle now."""
        self.runs.runs_max, self.runs.destination_max = runs_max, destination_max
        self.storage.use_settings(limits, conditions, bandwidth)
        self.storage.forget(self._now)
        self._use_storage()

    @property
    def reclaim_held(self) -> str:
        """Return why nothing is deleted although it is enabled, '' if it is.

        What somebody has written and is refused may be a longer `keep_for`, or `reclaim: disabled`.
        """
        what = [*(["rule files"] if self.rules_fault else []), *(["settings"] if self.settings_refused else [])]
        return f"the {' and the '.join(what)} have a fault" if what else ""

    def _use_storage(self) -> None:
        self.storage.use(self.rules.values(), lambda rule: self.providers.writes(rule.action, rule.options))
        self.runs.dirty = True

    def _gauged(self, fact: Gauged) -> None:
        self.runs.dirty |= self.storage.gauged(fact)
        self.reclaims.look(fact.at)

    def _proved(self, fact: Proved) -> None:
        self.runs.proved(fact)
        self.reclaims.proved(fact.at)

    def _mounted(self, fact: Mounted) -> None:
        self.storage.mounts(fact.table)
        self._use_storage()

    def _pressed(self, fact: Pressed) -> None:
        self.runs.dirty |= self.storage.pressed(fact)
        self._await_calm()

    def _await_calm(self) -> None:
        """See that what is held for a while only ends, though nothing new is told of it."""
        if (at := self.storage.calm_at()) is not None:
            self.timers.set("throttle", at, self._calm)

    def _calm(self, at: float) -> None:
        self.runs.dirty |= self.storage.calm(at)
        self._await_calm()

    # ------------------------------------------------------------------ looks

    def _troubled(self, fact: Troubled) -> None:
        if fact.what:
            self.alarms.raised(fact.key, fact.what, fact.hint, fact.at)
        else:
            self.alarms.clear(fact.key, fact.at)

    def _seen(self, fact: Seen) -> None:
        if fact.cause == "deadline":
            for settling in self._by_root.get(fact.root, ()):
                settling.answered(fact)
            if self._outdated:
                for row in fact.rows:
                    place = (fact.root, fact.dir, row[0])
                    if place in self._outdated:
                        self._outdated.discard(place)
                        self._found(fact, [row], row[2])
            return
        rows = fact.rows
        if not rows:
            return
        first = rows[0][2]
        if all(row[2] is first for row in rows):
            self._found(fact, rows, first)
        else:
            by_wants: dict[tuple[tuple[int, int], ...], list[Row]] = {}
            for row in rows:
                by_wants.setdefault(row[2], []).append(row)
            for wants, some in by_wants.items():
                self._found(fact, some, wants)
        if fact.cause == "sweep":
            self._balance_sweeps()

    def _outdate(self, rule: int, run: int, paths: Sequence[str], *, release: bool) -> None:
        """Let go of files that a run met in another version, or not at all, and look at them: no event may tell."""
        assembly = self.assemblies.get(rule)
        if assembly is None:
            return
        if release:
            self._out.append(Released(rule, assembly.root, run, tuple(paths)))
        for path in paths if release else ():
            member = assembly.settling.get(path)
            if member is not None and member.stage == "batched" and member.batch == run:
                assembly.settling.drop(member)
        if not assembly.steady:
            return  # a sweep finds them
        for path in paths[:OUTDATED_MAX]:
            directory, name = split(path)
            self._outdated.add((assembly.root, directory, name))
            self._out.append(Look(assembly.root, directory, (name,)))
        if len(self._outdated) > OUTDATED_MAX:
            self._outdated.clear()

    def _found(self, fact: Seen, rows: Sequence[Row], wants: tuple[tuple[int, int], ...]) -> None:
        for rule, earlier in wants:
            settling = self._settlings.get(rule)
            if settling is None or settling.root != fact.root:
                continue
            existing = self._baseline_asks.get((abs(rule), fact.root), (0, ""))[1] if self._baseline_asks else ""
            left = rows
            if existing == "ignore" and fact.cause == "sweep":
                left = self._take_baseline(settling, fact, rows)
            elif existing.startswith(UNKNOWN):
                left = self._leave_unknown(settling, fact, rows, float(existing.removeprefix(UNKNOWN)))
            if left:
                settling.found(fact, left, earlier)

    def _leave_unknown(self, settling: Settling, fact: Seen, rows: Sequence[Row], before_utc: float) -> Sequence[Row]:
        """What was there when the journal was recovered, and is in no claim of it, may have been sent or not.

        The kernel's own instant of change tells, which no copy can set back. A hint of such a file says nothing new.
        """
        old = [(name, *state[:2]) for name, state, _ in rows if state is not None and state[2] < before_utc * 1e9]
        if old and fact.cause == "sweep":
            self._out.append(Claimed(settling.key, fact.root, fact.dir, old, CLAIM_UNKNOWN, self._utc(fact.ended)))
            if abs(settling.key) not in self._unknown:
                self._unknown.add(abs(settling.key))
                self._tell_unknown(settling, fact.ended)
        names = {name for name, *_ in old}
        return [row for row in rows if row[0] not in names]

    def _take_baseline(self, settling: Settling, fact: Seen, rows: Sequence[Row]) -> Sequence[Row]:
        """`existing: ignore`: what the first complete sweep finds, and no hint has named, was there before."""
        known = settling.dirs.get(fact.dir, {})
        old = [(name, state[0], state[1]) for name, state, _ in rows if state is not None and name not in known]
        if old:
            self._out.append(Claimed(settling.key, fact.root, fact.dir, old, CLAIM_BASELINE, self._utc(fact.ended)))
        return [row for row in rows if row[0] in known]

    def _unreadable(self, fact: Unreadable) -> None:
        for settling in self._by_root.get(fact.root, ()):
            settling.unread(fact.root, fact.dir, fact.names, fact.why, fact.at)

    def _vanished(self, fact: Vanished) -> None:
        before = self._utc(fact.at) - self.keep_done_s
        self._out.append(Forgotten(fact.root, fact.dir, fact.names, before))

    def _checked(self, fact: Checked) -> None:
        settling = self._settlings.get(fact.rule)
        if settling is not None:
            settling.checked(fact)

    def _marked(self, fact: Marked) -> None:
        """No look from before these batches' claims is under way any more: their files may be let go."""
        self._marking.discard(fact.root)
        queue = self._batched.get(fact.root)
        while queue and queue[0][0] <= fact.as_of:
            batch, members = queue.popleft()
            for member in members:
                if member.stage == "batched" and member.batch == batch:
                    member.home.drop(member)
        if queue is not None and not queue:
            del self._batched[fact.root]

    def _balance_sweeps(self) -> None:
        waiting = sum(len(settling.queue) for settling in self._settlings.values())
        if not self._holding and waiting > SETTLING_HIGH:
            self._holding = True
            self._out.append(HoldSweeps(True))
        elif self._holding and waiting < SETTLING_LOW:
            self._holding = False
            self._out.append(HoldSweeps(False))

    # ----------------------------------------------------------------- sweeps

    def _next_ask(self) -> int:
        self._ask += 1
        return self._ask

    def _swept(self, fact: Swept) -> None:
        if not (fact.ok and fact.full):
            self._sweep_again(fact)
            return
        for (rule, root), (ask, _) in list(self._baseline_asks.items()):
            if root == fact.root and ask <= fact.asked:
                del self._baseline_asks[(rule, root)]
                self._baselines.add((rule, root))
                self._out.append(BaselineSet(rule, root, self._utc(fact.ended)))
                if self._existing.pop(f"existing:{rule}:{root}", None):
                    self._out.append(Kept(f"existing:{rule}:{root}", None))
                self._unknown.discard(rule)
        for assembly in self.assemblies.values():
            if assembly.root == fact.root:
                assembly.swept(fact.asked, fact.ended)

    def _tell_unknown(self, settling: Settling, at: float) -> None:
        """In one commit with the first of them, so that a crash in between does not make it a silent matter."""
        rule = settling.rule
        what = f"rule {rule.name} leaves files in {rule.watch} out: the recovered journal does not know them"
        hint = "`explain PATH` names each; `files resend PATH` sends one; `alarms ack` when it is settled"
        self.alarms.raised(f"recovered:{rule.name}", what, hint, at)

    def _sweep_again(self, fact: Swept) -> None:
        """A failed sweep answers nothing: what waits for it is asked for again, in a while."""
        if self._waited_asks(fact.root):
            wait = max(SWEEP_AGAIN_S, SWEEP_AGAIN_DUTY * (fact.ended - fact.watermark))
            self.timers.set((fact.root, "sweep"), fact.ended + wait, lambda now: self._ask_again(fact.root))

    def _ask_again(self, root: int) -> None:
        if asks := self._waited_asks(root):
            self._out.append(Sweep(root, True, max(asks)))

    def _waited_asks(self, root: int) -> list[int]:
        asks = [ask for (_, number), (ask, _) in self._baseline_asks.items() if number == root]
        return asks + [ask for assembly in self.assemblies.values() if assembly.root == root for ask in assembly.asks]

    def _root_changed(self, fact: RootChanged) -> None:
        if fact.root not in self.roots.values():
            return  # nobody uses it any more
        before = self.root_health.get(fact.root)
        self.root_health[fact.root] = fact
        was_away = before is not None and before.health in AWAY
        path = self.root_paths.get(fact.root, f"root {fact.root}")
        if fact.health in AWAY or fact.health == "degraded":
            self.alarms.raised(f"root:{path}", f"{path} is {fact.health}: {fact.why}", fact.hint, fact.at)
        elif fact.health == "ok":
            self.alarms.clear(f"root:{path}", fact.at)
        if before is None or before.health != fact.health:
            self._out.append(Log("root.changed", {"root": path, "health": fact.health, "why": fact.why}))
        for assembly in self.assemblies.values():
            if assembly.root != fact.root:
                continue
            if fact.health in AWAY and not was_away:
                assembly.root_away()
            elif fact.health not in AWAY and was_away:
                assembly.root_back(fact.at)

    # ---------------------------------------------------------------- batches

    def _close(
        self, assembly: Assembly, members: list[Member], group: Mapping[str, str], reason: str, at: float
    ) -> int:
        return self._make_batch(assembly, members, group, reason, at, again=False)

    def _make_batch(
        self,
        assembly: Assembly,
        members: list[Member],
        group: Mapping[str, str],
        reason: str,
        at: float,
        *,
        again: bool,
    ) -> int:
        self._last_batch += 1
        batch = self._last_batch
        rule = assembly.rule
        records = [record_of(assembly, member) for member in members]
        waits_on: set[int] = set()
        for member in members:
            if member.earlier > 0:
                waits_on |= self.runs.newer_version(member.earlier, member.path, at)
            if member.companions:
                records += companion_records(member)
        unique = {(record.root, record.dir, record.name): record for record in reversed(records)}
        records = list(unique.values())[::-1] if len(unique) != len(records) else records
        captures = dict(group) if rule.batch else assembly.captures(members[0])
        self._record(assembly, batch, records, captures, reason, at, again=again, waits_on=waits_on, own=len(members))
        if not again:
            self._batched.setdefault(assembly.root, deque()).append((batch, members))
        return batch

    def _close_late(
        self, assembly: Assembly, companion: model.Member, captures: Mapping[str, str], reason: str, at: float
    ) -> int:
        """Make a batch of a companion that has come after its file went."""
        self._last_batch += 1
        self._record(assembly, self._last_batch, [companion], captures, reason, at)
        return self._last_batch

    def _record(
        self,
        assembly: Assembly,
        batch: int,
        records: Sequence[model.Member],
        captures: Mapping[str, str],
        reason: str,
        at: float,
        *,
        again: bool = False,
        waits_on: set[int] | frozenset[int] = frozenset(),
        own: int = 0,
    ) -> None:
        rule = assembly.rule
        size = sum(record.size for record in records)
        request = self.request(rule, captures, batch, at)
        # As the rule writes it: a mount is down for every session that a template leads to.
        destination = "" if "fault" in request else self.providers.destination(rule.action, rule.options)
        shown = dict(captures) if rule.batch else {}
        self._out.append(
            BatchClosed(
                batch,
                rule.id,
                shown,
                reason,
                self._utc(at),
                records,
                size,
                request,
                destination,
                tuple(sorted(waits_on)),
                again,
            )
        )
        self.runs.add(
            Run(
                batch,
                rule.name,
                rule.id,
                shown,
                request,
                destination,
                len(records),
                size,
                waits_on=set(waits_on),
                own=own,
            ),
            at,
        )

    def request(self, rule: Rule, captures: Mapping[str, str], batch: int, at: float) -> dict[str, Any]:
        """Return what the run is to do, with every template rendered; frozen in the journal."""
        day = datetime.datetime.fromtimestamp(self._utc(at), self._zone).date().isoformat()
        values = {**captures, "rule": rule.name, "batch": str(batch), "host": self.host, "date": day}
        for name in self.providers.extra_names(rule.action, rule.options):
            values[name] = "{" + name + "}"  # the action's own, filled in when it starts
        templates = self.providers.templates(rule.action)
        options = dict(rule.options)
        fault: dict[str, Any] = {}
        for name, value in captures.items():
            if value in (".", ".."):  # in a path it would lead out of the destination
                fault = {"fault": f"the capture {{{name}}} is {value!r}, which names no directory of its own"}
        for name in templates & options.keys():
            try:
                options[name] = patterns.render_all(options[name], values)
            except (
                ValueError,
                KeyError,
                PatternError,
            ) as error:  # the batch is made all the same; a person mends its rule
                why = f"it has no value for {error}" if isinstance(error, KeyError) else str(error)
                fault = {"fault": f"`{name}` cannot be filled in: {why}"}
        return {
            "rule": rule.name,
            "group": dict(captures) if rule.batch else {},
            "action": rule.action,
            "options": options,
            "written": {name: rule.options[name] for name in sorted(templates & rule.options.keys())
                        if "{" in str(rule.options[name])},
            "captures": dict(captures),
            "proof": rule.proof,
            "retry": asdict(rule.retry),
            "bandwidth": rule.bandwidth,
            "after": self.runs.gate(rule, captures),
            **fault,
        }

    # ------------------------------------------------------------------ rules

    def _rules_offered(self, fact: RulesOffered) -> None:
        if fact.fault is not None:
            self.rules_fault = fact.fault
            where = f"{fact.fault.get('file')}:{fact.fault.get('line')}:{fact.fault.get('column')}"
            many = fact.fault.get("faults", 1)
            have = "have a fault, the last good rules go on" if many == 1 else (
                f"have {many} faults (`rules check` shows all), the last good rules go on; the first"
            )
            self.alarms.raised(
                "rules",
                f"the rule files {have}: {where}: {fact.fault.get('message')}",
                "; ".join(filter(None, [str(fact.fault.get("hint", "")), self._reclaim_waits()])),
                fact.at,
            )
            return
        self.rules_fault = None
        self.alarms.clear("rules", fact.at)
        known = {**self.roots, **fact.roots}
        self.root_paths.update({number: path for path, number in fact.roots.items()})
        moved = {} if fact.applied else self._moved(fact)
        self.undecided = moved
        rules = [self.rules[rule.name] if rule.name in moved else rule for rule in fact.rules]
        used = {path for rule in rules for path in (rule.watch, *(c.root for c in rule.complete.companions))}
        self.roots = {path: known[path] for path in sorted(used)}  # a rule that waits for a decision keeps its old root
        if moved:
            self._offered = fact
            names = ", ".join(sorted(moved))
            self.alarms.raised(
                "rules-apply",
                f"a changed root would start work again for files already done: {names}",
                "`trigger-daemon rules apply` shows the numbers and asks: same, all or new",
                fact.at,
            )
        else:
            self._offered = None
            self.alarms.clear("rules-apply", fact.at)
        self._use(rules, fact, known)
        if not moved:  # else a restart would take the change without asking
            self._out.append(RulesAccepted(fact.source, self._utc(fact.at)))

    def _reclaim_waits(self) -> str:
        asked = self.reclaims.enabled and any(rule.reclaim for rule in self.rules.values())
        return "until then reclaim deletes nothing" if asked else ""

    def _moved(self, fact: RulesOffered) -> dict[str, Mapping[str, Any]]:
        """Return the rules whose `watch` changed although they have claims in the old root."""
        moved: dict[str, Mapping[str, Any]] = {}
        for rule in fact.rules:
            old = self.rules.get(rule.name)
            if old is None or old.watch == rule.watch:
                continue
            done = sum(c[1] for (number, _), c in self.runs.tally.items() if number == rule.id)
            if done:
                moved[rule.name] = {"was": old.watch, "now": rule.watch, "files_done": done}
        return moved

    def _use(self, rules: Sequence[Rule], fact: RulesOffered, known: Mapping[str, int]) -> None:
        new = {rule.name: rule for rule in rules}
        fresh: set[int] = set()
        for name, old in list(self.rules.items()):
            now = new.get(name)
            if now is None and self._siblings.pop(old.id, {}):
                self._out.append(Kept(f"{SIBLINGS}{old.id}", None))
            if now is None or replace(now, **_BESIDES) != replace(old, **_BESIDES):
                self._retire(old)
            elif now != old and (kept := self.assemblies.get(old.id)) is not None:
                kept.use(now)
        before = self.rules
        late: dict[int, list[tuple[str, int]]] = {}
        for (number, mark, kind), (batch, _) in self.marks.items():
            if kind == LATE and number not in self.assemblies:
                late.setdefault(number, []).append((mark, batch))
        for rule in rules:
            root, was = self.roots[rule.watch], before.get(rule.name)
            if rule.id not in self.assemblies:
                assembly = Assembly(
                    rule=rule,
                    root=root,
                    roots=self.roots,
                    timers=self.timers,
                    out=self._out,
                    close=self._close,
                    close_late=self._close_late,
                    follows=self.runs.follows,
                    since=self._last_batch,
                    marks=self.marks,
                    utc=self._utc,
                    next_ask=self._next_ask,
                    siblings=self._siblings.setdefault(rule.id, {}),
                    refuses=self.providers.refuses,
                )
                health = self.root_health.get(root)
                assembly.steady = health is None or health.health not in AWAY
                self.assemblies[rule.id] = assembly
                fresh.add(root)
                for owed, batch in late.get(rule.id, ()):
                    assembly.take_owed(owed, batch, fact.at)
                self._schedule(assembly, fact.at)
            if (rule.id, root) not in self._baselines and (rule.id, root) not in self._baseline_asks:
                existing: str = rule.existing
                if was and was.watch != rule.watch:
                    if fact.applied in ("all", "new"):
                        existing = {"all": "process", "new": "ignore"}[fact.applied]
                        self._existing[f"existing:{rule.id}:{root}"] = existing
                        self._out.append(Kept(f"existing:{rule.id}:{root}", existing))
                    if fact.applied == "same":
                        self._out.append(ClaimsCarried(rule.id, known[was.watch], root))
                if existing == "process" and self._unknown_before:
                    existing = self._unknown_before
                existing = self._existing.get(f"existing:{rule.id}:{root}", existing)
                self._baseline_asks[(rule.id, root)] = (self._next_ask(), existing)
        served = {(rule.id, self.roots[rule.watch]) for rule in rules}
        self._baseline_asks = {key: ask for key, ask in self._baseline_asks.items() if key in served}
        self._forget_roots(fact.at)
        self.rules = new
        self.storage.use(rules, lambda rule: self.providers.writes(rule.action, rule.options))
        self.runs.use(list(rules), fact.at)
        if self._restored is not None:
            self.runs.restore(self._restored, self._rule_names, self._kept, fact.at)
            self._restored = None
        self.runs.follow(fact.at)
        self._settlings = {}
        self._by_root = {}
        for assembly in self.assemblies.values():
            for settling in (assembly.settling, assembly.markers):
                if settling is None:
                    continue
                self._settlings[settling.key] = settling
                roots = {settling.root, *(self.roots[spec.root] for spec in settling.specs if spec.root in self.roots)}
                for number in roots:
                    self._by_root.setdefault(number, []).append(settling)
        self._rule_names.update({rule.id: rule.name for rule in rules})
        self._out.append(UseRules(tuple(rules)))
        self._waive([name for name in self.waived if name not in new or name in self.runs.paused_rules])
        self.reclaims.use(rules, fact.at, self.undecided)
        if self.timers.at("witness") is None and any(rule.reclaim for rule in rules):
            self.timers.set("witness", fact.at + WITNESS_EVERY_S, self._keep_witness)
        asks = {root: ask for (_, root), (ask, _) in sorted(self._baseline_asks.items(), key=lambda item: item[1])}
        for root in fresh | asks.keys():
            self._out.append(Sweep(root, True, asks.get(root) or self._next_ask()))

    def _retire(self, rule: Rule) -> None:
        assembly = self.assemblies.pop(rule.id, None)
        if assembly is None:
            return
        self.timers.cancel((rule.id, "at"))
        assembly.retire()
        for kind in ("stalled", "blocked", "late"):
            self.alarms.clear(f"{kind}:{rule.name}", self._now)

    def _forget_roots(self, at: float) -> None:
        """Roots that no rule uses any more are nobody's trouble, and answer no mark."""
        used = set(self.roots.values())
        for root in (self.root_health.keys() | self._batched.keys() | self._marking) - used:
            self.root_health.pop(root, None)
            self._batched.pop(root, None)
            self._marking.discard(root)
        for key in [key for key in self.alarms.open if key.startswith("root:") and key[5:] not in self.roots]:
            self.alarms.clear(key, at)

    # ----------------------------------------------------------- times of day

    def _schedule(self, assembly: Assembly, at: float) -> None:
        spec = assembly.rule.batch
        if not spec or not spec.at:
            return
        self._at(assembly, at)

    def _arm(self, assembly: Assembly, at: float) -> None:
        spec = assembly.rule.batch
        assert spec is not None
        wait = self._next_due(spec.at, self._utc(at)) - self._utc(at)
        # At most an hour ahead: a clock that is slewed is set by less than a tick shows.
        self.timers.set(
            (assembly.rule.id, "at"), at + min(max(wait, 0.05), 3_600.0), lambda now: self._at(assembly, now)
        )

    def _at(self, assembly: Assembly, now: float) -> None:
        spec = assembly.rule.batch
        assert spec is not None
        key, utc = (assembly.rule.id, "", "at"), self._utc(now)
        mark = self.marks.get(key)
        due = self._last_due(spec.at, utc)
        if mark is None or mark[1] > utc + CLOCK_AHEAD_S:
            self.marks[key] = (0, utc)
            self._out.append(GroupSet(assembly.rule.id, "", "at", 0, utc))
        elif mark[1] < due and not assembly.closes_at_time:  # the mark moves on when it has closed
            assembly.close_after_sweep({}, f"at: {datetime.datetime.fromtimestamp(due, self._zone):%H:%M}")
        self._arm(assembly, now)

    def _dues(self, times: Sequence[str], day: datetime.date) -> list[float]:
        dues = []
        for text in times:
            hour, minute = text.split(":")
            local = datetime.datetime.combine(day, datetime.time(int(hour), int(minute)), self._zone)
            dues.append(local.timestamp())  # fold 0: once a day over clock changes
        return dues

    def _last_due(self, times: Sequence[str], utc: float) -> float:
        today = datetime.datetime.fromtimestamp(utc, self._zone).date()
        days = (
            today - datetime.timedelta(days=2),
            today - datetime.timedelta(days=1),
            today,
        )  # zones have skipped a day
        return max(due for day in days for due in self._dues(times, day) if due <= utc)

    def _next_due(self, times: Sequence[str], utc: float) -> float:
        today = datetime.datetime.fromtimestamp(utc, self._zone).date()
        days = (today, today + datetime.timedelta(days=1), today + datetime.timedelta(days=2))
        return min(due for day in days for due in self._dues(times, day) if due > utc)

    # ----------------------------------------------------------------- orders

    def _order(self, order: Order) -> None:
        handler = _ORDERS.get(order.verb)
        if handler is None:
            answer: dict[str, Any] = {"ok": False, "error": f"unknown order {order.verb!r}", "hint": ""}
        else:
            answer = handler(self, order)
        if order.verb not in _QUESTIONS:
            self._out.append(
                Ordered(order.id, order.verb, order.args, order.who, order.why, answer, self._utc(order.at))
            )
        self._out.append(Answer(order.id, answer))

    def _pause(self, order: Order) -> dict[str, Any]:
        words = f"paused by {order.who}" + (f": {order.why}" if order.why else "")
        self.runs.paused_all = words
        self._out.append(Kept("paused", words))
        self.alarms.raised("paused", words, "`trigger-daemon resume` lets everything go on", order.at)
        return {"ok": True, "text": "paused: nothing new starts, copies stand still"}

    def _resume(self, order: Order) -> dict[str, Any]:
        self.runs.paused_all = ""
        self._out.append(Kept("paused", None))
        self.alarms.clear("paused", order.at)
        self.runs.dirty = True
        return {"ok": True, "text": "resumed"}

    def _rules_pause(self, order: Order) -> dict[str, Any]:
        return self._pause_rule(order, pause=True)

    def _rules_resume(self, order: Order) -> dict[str, Any]:
        return self._pause_rule(order, pause=False)

    def _pause_rule(self, order: Order, *, pause: bool) -> dict[str, Any]:
        name = str(order.args.get("rule", ""))
        if name not in self.rules and name not in self.runs.paused_rules:
            return _no(f"there is no rule {name!r}", "`trigger-daemon rules list` names them")
        (self.runs.paused_rules.add if pause else self.runs.paused_rules.discard)(name)
        if not pause:
            self._waive(self.waived - {name})
        self._out.append(Kept("paused_rules", sorted(self.runs.paused_rules) or None))
        self.runs.dirty = True
        return {"ok": True, "text": f"rule {name} is {'paused: its runs wait' if pause else 'resumed'}"}

    def _rules_waive(self, order: Order) -> dict[str, Any]:
        """Let a rule that is paused or gone hold no file back from `reclaim` any more."""
        name = str(order.args.get("rule", ""))
        if name in self.rules and name not in self.runs.paused_rules:
            return _no(f"rule {name} is at work: what it has not finished with is kept", f"`rules pause {name}` first")
        if name not in self.rules and name not in self._rule_names.values():
            return _no(f"there never was a rule {name!r}", "`trigger-daemon status` names removed ones, too")
        self._waive(self.waived | {name})
        return {"ok": True, "text": f"rule {name} holds no file back from `reclaim` until it is at work again"}

    def _waive(self, names: Iterable[str]) -> None:
        if (now := set(names)) != self.waived:
            self.waived = now
            self._out.append(Kept("waived", sorted(now) or None))

    def _batches_close(self, order: Order) -> dict[str, Any]:
        assembly = self._assembly(str(order.args.get("rule", "")))
        if assembly is None:
            return _no(f"there is no rule {order.args.get('rule')!r}", "`trigger-daemon rules list` names them")
        given = order.args.get("captures", {})
        captures = {str(k): str(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
        unknown = set(captures) - set(assembly.spec.group_by if assembly.spec else ())
        if unknown:
            return _no(f"rule {assembly.rule.name} does not group by {', '.join(sorted(unknown))}", "see `rules show`")
        if not assembly.steady:
            return _no("the root of this rule is away; nothing closes on it", "see `trigger-daemon status`")
        count = len(assembly.close_group(captures, f"closed by {order.who}", order.at))
        return {"ok": True, "closed": count, "text": f"closing: {counted(count, 'open batch')}"}

    def _assembly(self, name: str) -> Assembly | None:
        rule = self.rules.get(name)
        return self.assemblies.get(rule.id) if rule else None

    def _at_path(self, path: str) -> list[tuple[Assembly, str]]:
        """Return the assemblies whose root holds an absolute path, each with the path below it."""
        found = []
        for assembly in self.assemblies.values():
            root = assembly.rule.watch.rstrip("/")
            if path.startswith(root + "/"):
                found.append((assembly, path[len(root) + 1 :]))
        return found

    def _files_go(self, order: Order) -> dict[str, Any]:
        return self._move_files(order, go=True)

    def _files_skip(self, order: Order) -> dict[str, Any]:
        return self._move_files(order, go=False)

    def _move_files(self, order: Order, *, go: bool) -> dict[str, Any]:
        path = str(order.args.get("path", ""))
        only = order.args.get("rule")
        done, reasons = [], []
        for assembly, below in self._at_path(path):
            if only and assembly.rule.name != only:
                continue
            member = assembly.settling.get(below)
            if member is None:
                reasons.append(f"{assembly.rule.name}: not waiting here (see `trigger-daemon explain`)")
            elif not assembly.steady or member.state is NO_STATE:
                reasons.append(
                    f"{assembly.rule.name}: its root is away, or just back; wait until it was looked at again"
                )
            elif not go and (member.unsettled or member.stage in (BLOCKED, COMPLETE)):
                assembly.skip(member, order.at)
                done.append(assembly.rule.name)
            elif go and member.stage in (BLOCKED, INCOMPLETE, SUSPECT, "awaiting"):
                member.flag = f"go by {order.who}"
                assembly.settling.complete(member, order.at)
                done.append(assembly.rule.name)
            else:
                reasons.append(f"{assembly.rule.name}: it is {member.stage}: {member.why or 'wait for it'}")
        self._tell_blocked(order.at)
        if not done:
            return _no(
                "; ".join(reasons) or "no rule watches this path",
                "`trigger-daemon files list` names what can be moved on",
            )
        return {"ok": True, "rules": done, "text": f"{'goes on' if go else 'skipped'} for {', '.join(done)}"}

    def _files_resend(self, order: Order) -> dict[str, Any]:
        """Make a new batch of files that were claimed before; the daemon adds their present state."""
        done = []
        for item in order.args.get("files", ()):
            try:
                assembly = self._assembly(str(item["rule"]))
                directory, name = str(item["dir"]), str(item["name"])
                state = (int(item["size"]), int(item["mtime_ns"]), 0, 0)
            except (KeyError, TypeError, ValueError):
                continue
            if assembly is None or patterns.captures_of(assembly.rule, join(directory, name)) is None:
                continue
            member = Member(assembly.settling, directory, name, state, order.at, 0)
            group = assembly.captures(member)
            if assembly.spec:
                group = {key: group.get(key, "") for key in assembly.spec.group_by}
            done.append(self._make_batch(assembly, [member], group, f"sent again by {order.who}", order.at, again=True))
        if not done:
            return _no("no rule has sent this file", "`trigger-daemon explain` says what became of it")
        return {"ok": True, "runs": done, "text": f"sent again as run {', '.join(map(str, done))}"}

    def _runs_verb(self, order: Order) -> dict[str, Any]:
        verb = order.verb.partition(".")[2]
        act = getattr(self.runs, verb)
        because = f"{verb} by {order.who}" + (f": {order.why}" if order.why else "")
        done, errors = [], []
        for number in _numbers(order.args.get("ids", ())):
            run = self.runs.open.get(number)
            if run is None and not 0 < number <= self._last_batch:
                error = f"there is no run {number}"
            elif run is None:
                error = f"run {number} is not open (`trigger-daemon files resend` sends its files again)"
            elif not (error := self._renew(run, order.at) if verb == "retry" and order.args.get("anew") else ""):
                if verb == "retry" and order.args.get("anyway"):
                    self.runs.open_gate(run, because, order.at)
                error = act(run, because, order.at)
            if error:
                errors.append(error)
            else:
                done.append(number)
        if errors and not done:
            return {
                "ok": False,
                "error": "; ".join(errors[:5]),
                "hint": "`trigger-daemon runs list` shows states",
                "done": [],
            }
        return {"ok": True, "done": done, "errors": errors, "text": f"{verb}: {len(done)} runs"}

    def _renew(self, run: Run, at: float) -> str:
        """Let a run that is held, or waits for another rule, do what its rule says now; return '' or why not."""
        rule = self.rules.get(run.rule)
        if not (run.state == RunState.HELD or run.place == "after") or run.live or run.asked:
            still = "only a HELD run of which nothing is under way, or one that waits for another rule, can begin anew"
            return f"run {run.id} is {run.state}; {still}"
        if rule is None:
            return f"run {run.id}: its rule {run.rule} is gone"
        if rule.action != run.request.get("action"):
            return f"run {run.id}: its rule starts {rule.action} now, and not {run.request.get('action')}"
        request = self.request(rule, run.request.get("captures", {}), run.id, run.created_at)
        if fault := request.get("fault"):
            return f"run {run.id}: {fault}"
        run.request = {**request, "group": run.request.get("group", {})}
        if run.delivered:  # it may not be where it is to be now
            run.delivered = False
            self._out.append(AttemptChanged(run.id, run.attempts, outcome="succeeded, but it was begun anew"))
        run.destination = self.providers.destination(rule.action, rule.options)
        run.files_done = run.bytes_done = 0
        self._out.append(Renewed(run.id, run.request, run.destination, self._utc(at)))
        return ""

    def _alarms_ack(self, order: Order) -> dict[str, Any]:
        key = str(order.args.get("key", ""))
        keys = list(self.alarms.open) if key in ("", "all") else [key]
        done = [k for k in keys if self.alarms.ack(k, order.who, order.at)]
        own = [str(k) for k in order.args.get("own") or ()]  # that the daemon keeps itself
        for key in done:
            if key.startswith(("recovered:", "lost:")):  # it tells of what was, and a person has seen it
                self.alarms.clear(key, order.at)
        if not done and not own:
            words = "no alarm stands" if key in ("", "all") else f"there is no alarm {key!r}"
            return _no(words, "`trigger-daemon alarms list` names them")
        done += own
        words = f"{len(done)} acknowledged; they stand until their cause is gone"
        if own:
            words += f" ({', '.join(own)}: until the daemon ends, as the journal does not have them)"
        return {"ok": True, "acked": done, "text": words}

    def _rules_apply(self, order: Order) -> dict[str, Any]:
        if self._offered is None:
            return _no("no change of rules waits for a decision", "")
        choice = str(order.args.get("choice", ""))
        if not choice:
            return {"ok": True, "undecided": {name: dict(v) for name, v in self.undecided.items()}, "text": ""}
        if choice not in ("same", "all", "new"):
            return _no(f"{choice!r} is not a choice", "say same (they are the same files), all, or new (only new ones)")
        offered = self._offered
        self._rules_offered(RulesOffered(offered.rules, offered.roots, offered.source, order.at, None, choice))
        return {"ok": True, "text": f"applied: {choice}"}

    # -------------------------------------------------------------- questions

    def _explain(self, order: Order) -> dict[str, Any]:
        path = str(order.args.get("path", ""))
        rules = []
        for assembly, below in self._at_path(path):
            rules.append({"rule": assembly.rule.name, **self._stage(assembly, below, order.at)})
        for name, words in self._needed_by(path):
            rules = [about for about in rules if about["rule"] != name or about["stage"] != "unmatched"]
            if all(about["rule"] != name for about in rules):
                rules.append({"rule": name, "stage": "unmatched", "because": words, "until_time": None})
        return {"ok": True, "rules": rules}

    def _needed_by(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield the rules that look for a file as a companion, with words about whose."""
        for number, root in self.root_paths.items():
            if not path.startswith(root.rstrip("/") + "/"):
                continue
            directory, name = split(path[len(root.rstrip("/")) + 1 :])
            for assembly in self.assemblies.values():
                settling = assembly.settling
                for companion in settling.awaited.get((number, directory), {}).get(name, ()):
                    state = companion.why or "there"
                    if not companion.members and companion not in settling.late:
                        continue
                    if (member := settling.late.get(companion)) is not None:
                        words = f"a companion of {member.path}, which went without it: {state}; looked for each minute"
                    else:
                        first, more = next(iter(companion.members)).path, len(companion.members) - 1
                        others = f" and {counted(more, 'other')}" if more else ""
                        words = f"a companion of {first}{others}: {state}"
                    yield assembly.rule.name, words

    def _stage(self, assembly: Assembly, below: str, at: float) -> dict[str, Any]:
        """Say where a path stands in a rule; stage '' when only the journal can tell."""
        rule = assembly.rule
        captures = patterns.captures_of(rule, below)
        if captures is None:
            stage, words = patterns.why_not(rule, below)
            if assembly.markers is not None and (marker := assembly.markers.get(below)) is not None:
                settles = f"seen unchanged for less than {assembly.markers.quiescence_s:g} s"
                words += f"; {marker.why or (settles if marker.stage == SETTLING else 'it is complete')}"
            return {"stage": stage, "because": words, "until_time": None}
        member = assembly.settling.get(below)
        spec = rule.batch
        # Of one that has settled its claim tells; nothing else will become of one that still does.
        if (
            spec
            and spec.only_first is not None
            and member is not None
            and member.unsettled
            and spec.new_group_after_s is None
        ):
            group = canonical({name: captures.get(name, "") for name in spec.group_by})
            mark = self.marks.get((rule.id, group, "taken"))
            if mark is not None:
                words = f"only_first: {spec.only_first}: batch {mark[0]} took the first of {group}"
                return {"stage": "skipped", "because": words, "until_time": None}
        if member is None:
            return {"stage": "", "because": "", "until_time": None}
        return {"stage": _STAGE[member.stage], **self._because(assembly, member), "run": member.batch or None}

    def _because(self, assembly: Assembly, member: Member) -> dict[str, Any]:
        until: float | None = None
        health = self.root_health.get(assembly.root)
        if member.stage == SETTLING:
            until = assembly.settling.queue.get(member)
            words = member.why or f"seen unchanged for less than {assembly.settling.quiescence_s:g} s"
            if health is not None and health.health in AWAY:
                words, until = f"{assembly.rule.watch} is {health.health}: {health.why}", None
        elif member.stage in (COMPLETE, "closing"):
            words, until = assembly.waiting(member)
        else:
            words = member.why
            if member.stage == SUSPECT:
                until = self.timers.at(member)
            elif member.stage == AWAITING:
                until = assembly.settling.waits_until(member)
        if member in assembly.stalled:
            words += " (stalled)"
        return {"because": words, "until_time": None if until is None else self._utc(until)}

    def open_files(self) -> Iterator[tuple[Rule, str, dict[str, Any]]]:
        """Yield rule, path below its root, and the words for every file that is in no closed batch yet."""
        for assembly in self.assemblies.values():
            for member in assembly.settling.members():
                stage = _STAGE[member.stage]
                if stage != "batched":
                    words = {"stage": stage, "size": max(member.state[0], 0), **self._because(assembly, member)}
                    yield assembly.rule, member.path, words

    def _files_list(self, order: Order) -> dict[str, Any]:
        wanted = order.args.get("stage")
        files: list[dict[str, Any]] = []
        for rule, path, words in self.open_files():
            if wanted and words["stage"] != wanted:
                continue
            if len(files) >= LISTED_MAX:
                return {"ok": True, "files": files, "more": True}
            files.append({"path": f"{rule.watch.rstrip('/')}/{path}", "rule": rule.name, **words})
        return {"ok": True, "files": files, "more": False}

    def _batches_list(self, order: Order) -> dict[str, Any]:
        batches = []
        for assembly in self.assemblies.values():
            for open_ in [*assembly.groups.values(), *assembly.closings]:
                member = next(iter(open_.members), None)
                words, until = assembly.waiting(member) if member else ("", None)
                batches.append(
                    {
                        "rule": assembly.rule.name,
                        "group": assembly.named(open_.group),
                        "files": len(open_.members),
                        "bytes": open_.bytes,
                        "waiting_for": words,
                        "until_time": None if until is None else self._utc(until),
                    }
                )
        return {"ok": True, "batches": batches}

    def _waiting(self, order: Order) -> dict[str, Any]:
        ids = order.args.get("ids", ())
        runs = {str(n): self._run_words(self.runs.open[n]) for n in _numbers(ids) if n in self.runs.open}
        return {"ok": True, "runs": runs, "waits": self.runs.waits() if order.args.get("grouped") else None}

    def _run_words(self, run: Run) -> dict[str, Any]:
        return {
            "waiting_for": self.runs.waiting_for(run),
            "next_time": self.runs.next_time(run),
            "error": run.error,
            "hint": self.runs.hint_of(run),
            "files_done": run.files_done,
            "bytes_done": run.bytes_done,
        }

    # --------------------------------------------------------------- snapshot

    def _tell_blocked(self, at: float) -> None:
        """Raise or clear the alarms about files that cannot go on by themselves."""
        for assembly in self.assemblies.values():
            self._tell_late(assembly, at)
            for kind, members in (("blocked", assembly.blocked), ("stalled", assembly.stalled)):
                key = f"{kind}:{assembly.rule.name}"
                if not members:
                    self.alarms.clear(key, at)
                    continue
                first = next(iter(members))
                words = "cannot go on" if kind == "blocked" else "not complete for too long"
                self.alarms.raised(
                    key,
                    f"{counted(len(members), 'file')} of {assembly.rule.name} {words},"
                    f" the first: {first.path}: {first.why}",
                    f"`trigger-daemon files list --stage {'blocked' if kind == 'blocked' else 'incomplete'}`, "
                    "then `files go PATH` (send it as it is) or `files skip PATH` (never send it)",
                    at,
                )

    def _tell_late(self, assembly: Assembly, at: float) -> None:
        key, late = f"late:{assembly.rule.name}", assembly.settling.late_stalled(at) if assembly.settling.late else []
        if not late:
            self.alarms.clear(key, at)
            return
        what = f"{counted(len(late), 'companion')} of {assembly.rule.name} came late and cannot follow their files"
        hint = "mend or replace it: it is looked at each minute"
        self.alarms.raised(key, f"{what}, the first: {late[0].path}: {late[0].why or 'being checked'}", hint, at)

    def snapshot(self) -> dict[str, Any]:
        """Return what the heartbeat tells the command line."""
        batched: Counter[Settling] = Counter()  # counted once for all rules: there may be a thousand
        for queue in self._batched.values():
            for _, members in queue:
                if members:
                    batched[members[0].home] += len(members)
        tallies: dict[int, dict[str, list[int]]] = {}
        for (number, state), counts in self.runs.tally.items():
            if counts[0]:
                tallies.setdefault(number, {})[state] = counts
        return {
            "rules": [self._rule_words(rule, batched, tallies) for rule in self.rules.values()]
            + self._removed(tallies),
            "alarms": [
                {"key": key, "what": a.what, "hint": a.hint, "since_time": a.since_time, "acked_by": a.acked_by or None}
                for key, a in self.alarms.open.items()
            ],
            "rules_fault": dict(self.rules_fault) if self.rules_fault else None,
            "undecided": {name: dict(v) for name, v in self.undecided.items()},
            "paused": self.runs.paused_all,
            "roots": [
                {
                    "path": self.root_paths.get(n, ""),
                    "health": h.health,
                    "why": h.why,
                    "hint": h.hint,
                    "events": h.events,
                }
                for n, h in self.root_health.items()
            ],
            "sweeps_held": self._holding,
            "reclaim": {**self.reclaims.words(), "held": self.reclaim_held, "witnessed_s": self.witnessed(self._now)},
            "destinations_down": {name: down.why for name, down in self.runs.down.items()},
            "working": [
                {
                    "run": run.id,
                    "rule": run.rule,
                    "state": run.state,
                    "files": run.files,
                    "bytes": run.bytes,
                    "files_done": run.files_done,
                    "bytes_done": run.bytes_done,
                }
                for run in self.runs.open.values()
                if run.slot
            ][:50],
        }

    def _rule_words(
        self, rule: Rule, batched: Mapping[Settling, int], tallies: Mapping[int, Mapping[str, list[int]]]
    ) -> dict[str, Any]:
        assembly = self.assemblies[rule.id]
        stages: dict[str, int] = {}
        for kind in ("blocked", "stalled"):
            stages[kind] = len(getattr(assembly, kind))
        complete = sum(len(o.members) for o in (*assembly.groups.values(), *assembly.closings))
        settling = assembly.settling.count - complete - batched[assembly.settling] - stages["blocked"]
        return {
            "name": rule.name,
            "action": rule.action,
            "state": "paused" if rule.name in self.runs.paused_rules else "active",
            "settling": max(settling, 0),
            "complete": complete,
            **stages,
            **_tally(tallies.get(rule.id, {})),
        }

    def _removed(self, tallies: Mapping[int, Mapping[str, list[int]]]) -> list[dict[str, Any]]:
        """Rules that are gone but have open runs."""
        gone: dict[str, int] = {}
        for run in self.runs.open.values():
            if run.rule not in self.rules:
                gone[run.rule] = run.rule_id
        return [
            {
                "name": name,
                "state": "removed",
                "settling": 0,
                "complete": 0,
                "blocked": 0,
                "stalled": 0,
                **_tally(tallies.get(number, {})),
            }
            for name, number in gone.items()
        ]


def _tally(counts: Mapping[str, list[int]]) -> dict[str, Any]:
    done = [c for state, c in counts.items() if state in (RunState.VERIFIED, RunState.SUCCEEDED)]
    return {
        "runs": {str(state): c[0] for state, c in counts.items()},
        "files_done": sum(c[1] for c in done),
        "bytes_done": sum(c[2] for c in done),
    }


def _numbers(given: Any) -> list[int]:
    """Return the whole numbers among what an order names."""
    return [n for n in given if isinstance(n, int)] if isinstance(given, list | tuple) else []


def _no(error: str, hint: str) -> dict[str, Any]:
    return {"ok": False, "error": error, "hint": hint}


_ORDERS: dict[str, Callable[[Engine, Order], dict[str, Any]]] = {
    "pause": Engine._pause,
    "resume": Engine._resume,
    "rules.pause": Engine._rules_pause,
    "rules.resume": Engine._rules_resume,
    "rules.waive": Engine._rules_waive,
    "rules.apply": Engine._rules_apply,
    "batches.close": Engine._batches_close,
    "batches.list": Engine._batches_list,
    "files.list": Engine._files_list,
    "files.go": Engine._files_go,
    "files.skip": Engine._files_skip,
    "files.resend": Engine._files_resend,
    "runs.retry": Engine._runs_verb,
    "runs.hold": Engine._runs_verb,
    "runs.cancel": Engine._runs_verb,
    "runs.abandon": Engine._runs_verb,
    "runs.waiting": Engine._waiting,
    "alarms.ack": Engine._alarms_ack,
    "explain": Engine._explain,
}

_QUESTIONS = frozenset({"explain", "files.list", "batches.list", "runs.waiting"})
