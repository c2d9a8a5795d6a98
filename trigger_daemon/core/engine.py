"""The core as one object: `step(fact) -> effects`, `next_deadline()`, `restore()`.

Pure. It owns every decision and touches nothing: what it wants written or done
it returns. The loop commits the records of a step before it carries the other
effects out, so whatever the world is asked was first remembered.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Mark,
    Marked,
    Mismatch,
    NotStarted,
    Order,
    Ordered,
    Polled,
    Prepared,
    Proved,
    Released,
    RootChanged,
    Row,
    RulesAccepted,
    RulesOffered,
    RunState,
    Seen,
    Started,
    StartUnknown,
    Sweep,
    Swept,
    Tick,
    Unreadable,
    UseRules,
    Vanished,
    counted,
    join,
    split,
)
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
from trigger_daemon.core.timers import Timers

SETTLING_HIGH = 100_000  # files in their quiet period at which sweeps wait: about 60 MB
SETTLING_LOW = 50_000
PRUNE_EVERY_S = 0.5
SWEEP_AGAIN_S = 30.0  # after a failed sweep that something waits for; longer for a tree that takes long
SWEEP_AGAIN_DUTY = 20
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
    def templates(self, action: str) -> frozenset[str]: ...
    def extra_names(self, action: str) -> tuple[str, ...]: ...
    def destination(self, action: str, options: Mapping[str, Any]) -> str: ...


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
        self.runs = Runs(
            timers=self.timers,
            out=self._out,
            alarms=self.alarms,
            utc=self._utc,
            rand=rand,
            marks=self.marks,
            runs_max=runs_max,
            prepares=providers.prepares,
            leaves_out=providers.leaves_out,
            on_outdated=self._outdate,
        )
        self._outdated: set[tuple[int, str, str]] = set()  # files to be looked at anew, known to no settling
        self.rules: dict[str, Rule] = {}
        self.assemblies: dict[int, Assembly] = {}
        self.roots: dict[str, int] = {}
        self.root_paths: dict[int, str] = {}
        self.root_health: dict[int, RootChanged] = {}
        self.rules_fault: Mapping[str, Any] | None = None
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
        self._rule_names: Mapping[int, str] = {}
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
            Proved: self.runs.proved,
            Mismatch: self.runs.mismatch,
            CannotVerify: self.runs.cannot_verify,
            Order: self._order,
            RulesOffered: self._rules_offered,
            Gauged: lambda fact: None,
        }

    # ------------------------------------------------------------------- time

    def _utc(self, at: float) -> float:
        return at + self._offset

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
        self._rule_names = saved.rules
        self._kept = saved.kept
        self.root_paths.update(saved.roots)
        self._restored = saved.runs  # taken up when the first rules are known: `after` and limits hold for them

    def _tick(self, fact: Tick) -> None:
        self._now = max(self._now, fact.at)
        self._offset = fact.utc - fact.at
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
        self._balance_sweeps()

    # ------------------------------------------------------------------ looks

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
        for name in self.providers.extra_names(rule.action):
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
            "captures": dict(captures),
            "proof": rule.proof,
            "retry": asdict(rule.retry),
            "bandwidth": rule.bandwidth,
            **fault,
        }

    # ------------------------------------------------------------------ rules

    def _rules_offered(self, fact: RulesOffered) -> None:
        if fact.fault is not None:
            self.rules_fault = fact.fault
            where = f"{fact.fault.get('file')}:{fact.fault.get('line')}:{fact.fault.get('column')}"
            self.alarms.raised(
                "rules",
                f"the rule files have a fault, the last good rules go on: {where}: {fact.fault.get('message')}",
                str(fact.fault.get("hint", "")),
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
        self.runs.use(list(rules), fact.at)
        if self._restored is not None:
            self.runs.restore(self._restored, self._rule_names, self._kept, fact.at)
            self._restored = None
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
        self._out.append(UseRules(tuple(rules)))
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
        # At most an hour ahead: the wall clock may be set meanwhile.
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
        self._out.append(Kept("paused_rules", sorted(self.runs.paused_rules) or None))
        self.runs.dirty = True
        return {"ok": True, "text": f"rule {name} is {'paused: its runs wait' if pause else 'resumed'}"}

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
            error = act(run, because, order.at) if run else f"run {number} is not open"
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

    def _alarms_ack(self, order: Order) -> dict[str, Any]:
        key = str(order.args.get("key", ""))
        keys = list(self.alarms.open) if key in ("", "all") else [key]
        done = [k for k in keys if self.alarms.ack(k, order.who, order.at)]
        for key in done:
            if key.startswith("recovered:"):  # it tells of what was, and a person has seen it
                self.alarms.clear(key, order.at)
        if not done:
            return _no(f"there is no alarm {key!r}", "`trigger-daemon alarms list` names them")
        return {"ok": True, "acked": done, "text": f"{len(done)} acknowledged; they stand until their cause is gone"}

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
        return {"ok": True, "runs": runs}

    def _run_words(self, run: Run) -> dict[str, Any]:
        return {
            "waiting_for": self.runs.waiting_for(run),
            "error": run.error,
            "hint": run.hint,
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
                    "then `files go` or `files skip`",
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
