"""Giving storage back: when sets are looked for, which go, how fast, and how each ends.

Pure. A set is intended (journaled), moved aside, confirmed (journaled: all of
it is aside and was proved once more), unlinked, done (journaled). Whatever
stands in the way puts it back. After a crash an intended set is put back, and a
confirmed one goes on only if it is proved still. A set that cannot be ended now
(its root is away, its disk fails) stays under way, and is told.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trigger_daemon.core.model import (
    Effect,
    Log,
    ReclaimFile,
    ReclaimIntended,
    ReclaimMoved,
    ReclaimSet,
    Remove,
    Removed,
    Select,
    Selected,
    counted,
    join,
)

if TYPE_CHECKING:
    from trigger_daemon.core.alarms import Alarms
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.core.saved import SavedReclaim
    from trigger_daemon.core.storage import Storage
    from trigger_daemon.core.timers import Timers

EVERY_S = 30.0  # how often it is looked for what could go, and what could not be ended is tried again
DUE_AFTER_S = 0.5
IN_VAIN_SHARE = 0.1  # of `keep_for`: so long, at most EVERY_S, it is believed that nothing could go
AT_ONCE = 16  # sets under way
SETS_PER_S = 100.0
BYTES_PER_S = 500_000_000  # where the settings say nothing: four times what a camera writes, and it can be stopped
STUCK_MAX = 64  # sets that cannot be ended now; with more nothing new begins
REFUSED_S = 600.0  # a set that was put back is left alone for so long
REFUSED_MAX = 10_000
NAMED_MAX = 3  # files of a set that an alarm names

_UNSETTLED = frozenset({"aside", "both", "unknown", ""})  # of removal.Place: not the end of it


@dataclass(slots=True)
class _Open:
    """A set under way."""

    of: ReclaimSet
    phase: Literal["aside", "gone", "back"]
    rules_at: int
    asked: bool = False  # the answer is still to come
    recovered: bool = False  # by a new life
    confirmed: bool = False
    stuck: bool = False  # it cannot be ended now, and others need not wait for it
    why: str = ""  # why it is put back


class Reclaims:
    """All sets under way, and those that wait for their turn."""

    def __init__(
        self, *, out: list[Effect], alarms: Alarms, timers: Timers, utc: Callable[[float], float], storage: Storage,
        root_path: Callable[[int], str], believed: Callable[[int], bool], paused: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._out = out
        self._alarms = alarms
        self._timers = timers
        self._utc = utc
        self._storage = storage
        self._root_path = root_path
        self._believed = believed
        self._paused = paused
        self.enabled = False
        self.bytes_per_s = BYTES_PER_S
        self.open: dict[int, _Open] = {}
        self.queue: deque[ReclaimSet] = deque()
        self._rules: dict[str, Rule] = {}
        self._rules_at = 0
        self._last = 0
        self._selecting: float | None = None  # since when
        self._look_at = 0.0  # not before: the last time there was nothing to be had,
        self._due_at = math.inf  # but for what was proved since
        self._wanted: dict[str, int] = {}  # volume -> bytes
        self._free_at = 0.0  # when the next set may begin
        self._freed_at = -1.0  # when the last one ended: a reading from before does not know of it
        self._refused: OrderedDict[tuple[int, str], float] = OrderedDict()  # first file of a set -> until

    def restore(self, saved: Sequence[SavedReclaim], last: int) -> None:
        """Take what the journal knows of sets under way."""
        self._last = last
        for each in saved:
            self.open[each.id] = _Open(
                each.of, "gone" if each.confirmed else "back", 0, recovered=True, confirmed=each.confirmed,
                why="the daemon ended while it was taken away",
            )  # fmt: skip

    def use(self, rules: Sequence[Rule], at: float, undecided: Collection[str] = ()) -> None:
        """Take the rules in force: what was selected by others does not count any more.

        `undecided`: rules with a change that waits for a person's word; what it would send again stays until then.
        """
        self._rules = {
            rule.name: rule for rule in rules
            if rule.reclaim is not None and not {rule.name, *rule.reclaim.proven_by} & set(undecided)
        }  # fmt: skip
        self._rules_at += 1
        self._look_at = 0.0
        self.queue.clear()
        if self._rules or self.open:
            self._timers.set("reclaim", at + 1.0, self.run)

    def run(self, at: float) -> None:
        """Go on with what could not be ended, and look for more."""
        if self._rules or self.open:
            self._timers.set("reclaim", at + EVERY_S, self.run)
        for id in list(self.open):
            self._go_on(id, at)
        self.look(at)

    def proved(self, at: float) -> None:
        """Something was proved: look when it is due, where that is soon."""
        keep = [rule.reclaim.keep_for_s for rule in self._rules.values() if rule.reclaim]
        if keep and min(keep) < EVERY_S:
            due = self._due_at = at + min(keep) + DUE_AFTER_S
            self._timers.set("reclaim", min(due, self._timers.at("reclaim") or due), self.run)

    # ------------------------------------------------------------------ which

    def look(self, at: float) -> None:
        """Ask for sets, if there is a reason to give something back."""
        if not self.enabled or self._paused() or self._selecting is not None or self.queue:
            return
        if at < min(self._look_at, self._due_at) or self._busy() or len(self.open) >= STUCK_MAX:
            return
        always, low = [], []
        self._wanted = {}
        for name, rule in self._rules.items():
            assert rule.reclaim is not None
            volume = self._storage.volume_of(rule.watch)
            if rule.reclaim.only_under == "always":
                always.append(name)
            elif self._storage.read_at(volume) > self._freed_at and (wanted := self._storage.wanted(volume)) > 0:
                low.append(name)
                self._wanted[volume] = wanted
        if always or low:
            self._selecting = at
            if at >= self._due_at:
                self._due_at = math.inf
            self._out.append(
                Select((*low, *always), None if always else sum(self._wanted.values()), self._rules_at,
                       frozenset(key for key, until in self._refused.items() if until > at))
            )

    def selected(self, fact: Selected) -> None:
        """Take sets that could go."""
        took_s = 0.0 if self._selecting is None else fact.at - self._selecting
        self._selecting = None
        if fact.why or not fact.sets:
            keep = min((rule.reclaim.keep_for_s for rule in self._rules.values() if rule.reclaim), default=EVERY_S)
            self._look_at = fact.at + max(took_s, min(EVERY_S, IN_VAIN_SHARE * keep))
        if fact.why:
            self._alarms.raised(
                "reclaim", f"it cannot be looked for files to reclaim: {fact.why}",
                "is the journal's disk well, and does every watched share answer?", fact.at,
            )  # fmt: skip
            return
        self._alarms.clear("reclaim", fact.at)
        if fact.rules_at == self._rules_at:
            self.queue.extend(one for one in fact.sets if self._refused.get(_key(one), 0.0) <= fact.at)
        self._begin(fact.at)

    def _begin(self, at: float) -> None:
        """Let the next sets begin, as fast as is allowed."""
        if self._paused() or not self.enabled:
            self.queue.clear()
        while self.queue and self._busy() < AT_ONCE and len(self.open) < STUCK_MAX:
            if at < self._free_at:
                self._timers.set("reclaim-next", self._free_at, self._begin)
                return
            of = self.queue.popleft()
            first = of.files[0]
            volume = self._storage.volume_of(join(self._root_path(first.root), first.path))
            if not of.due_always and self._wanted.get(volume, 0) <= 0:
                continue
            if not all(self._believed(file.root) for file in of.files):
                continue
            self._wanted[volume] = self._wanted.get(volume, 0) - of.bytes
            self._free_at = max(self._free_at, at) + max(of.bytes / self.bytes_per_s, 1.0 / SETS_PER_S)
            self._last += 1
            self.open[self._last] = _Open(of, "aside", self._rules_at)
            self._out.append(ReclaimIntended(self._last, of, self._utc(at)))
            self._ask(self._last)

    def _busy(self) -> int:
        return sum(1 for one in self.open.values() if not one.stuck)

    # ------------------------------------------------------------------ how each ends

    def _ask(self, id: int) -> None:
        one = self.open[id]
        one.asked = True
        self._out.append(Remove(id, one.phase, one.of))

    def _go_on(self, id: int, at: float) -> None:
        """Ask again for what has no answer, once its roots are what they were."""
        one = self.open[id]
        if one.asked or (one.phase == "gone" and one.recovered and not self._rules_at):
            return
        if one.phase == "gone" and (self._paused() or not self.enabled):
            one.phase, one.why = "back", "reclaim was disabled or held, or an operator paused, before it was deleted"
        away = {self._root_path(file.root) for file in one.of.files if not self._believed(file.root)}
        if away:
            self._tell_left(id, f"{', '.join(sorted(away))} is away, or no rule watches it any more", "", at)
        else:
            self._ask(id)

    def removed(self, fact: Removed) -> None:
        """Take what a phase did."""
        one = self.open.get(fact.id)
        if one is None or one.phase != fact.phase:
            return
        if not fact.places:
            self._tell_left(fact.id, fact.why, fact.hint, fact.at)
            return
        one.asked = one.stuck = False
        for name, kept in fact.kept:
            words = {"name": name, "now": kept, "why": "something new stands at its name"}
            self._out.append(Log("reclaim.kept_beside", words, "warning"))
        if fact.ok and fact.phase == "aside":
            self._set_aside(fact)
        elif _UNSETTLED.isdisjoint(fact.places):
            self._settle(fact)
        else:
            if fact.phase == "aside":
                one.phase, one.why = "back", fact.why
            self._tell_left(fact.id, fact.why, fact.hint, fact.at)
        self._begin(fact.at)
        self.look(fact.at)

    def _set_aside(self, fact: Removed) -> None:
        one = self.open[fact.id]
        if one.rules_at != self._rules_at or self._paused() or not self.enabled:
            one.phase, one.why = "back", "the rules or settings changed, or an operator paused, while it was taken away"
        else:
            one.phase, one.confirmed = "gone", True
            self._out.append(ReclaimMoved(fact.id, "confirmed", "", fact.places, self._utc(fact.at)))
        self._ask(fact.id)

    def _settle(self, fact: Removed) -> None:
        """All of it is at an end: gone, or there."""
        one = self.open.pop(fact.id)
        gone = {"gone", "neither"} & set(fact.places) if one.confirmed and "lost" not in fact.places else set()
        why = fact.why or one.why
        because = (f"proved elsewhere; not all of it: {why}" if why else "proved elsewhere") if gone else why
        if fact.kept:
            because += f"; put beside what is new: {fact.kept[0][1]}"
        if "lost" in fact.places:
            self._tell_lost(fact, one.of)
            because += "; its directory is gone, and nobody knows whether it was deleted"
        if not gone and "neither" in fact.places:
            because += "; not all of it is there any more: moved away, or deleted after the journal's backup was made"
        if gone and fact.ok and {"gone", "neither"} >= set(fact.places):
            because = "proved elsewhere"
        state: Literal["done", "kept"] = "done" if gone else "kept"
        self._out.append(ReclaimMoved(fact.id, state, because, fact.places, self._utc(fact.at)))
        first = one.of.files[0]
        words = {
            "reclaim": fact.id, "file": join(self._root_path(first.root), first.path), "files": len(one.of.files),
            "bytes": one.of.bytes, "because": because,
        }  # fmt: skip
        self._out.append(Log("reclaim.done" if gone else "reclaim.kept", words))
        self._alarms.clear(f"reclaim:{fact.id}", fact.at)
        self._freed_at = fact.at
        if not gone:
            self._refused[_key(one.of)] = fact.at + REFUSED_S
            if len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)

    def _tell_lost(self, fact: Removed, of: ReclaimSet) -> None:
        """Say which files nobody can find: their directories went away while they stood under hidden names."""
        lost = [file for file, place in zip(of.files, fact.places, strict=False) if place == "lost"]
        where, files = ("directory", "the file") if len(lost) == 1 else ("directories", "them")
        name = self._name(lost[0]) if len(lost) == 1 else counted(len(lost), "file")
        self._alarms.raised(
            f"lost:reclaim:{fact.id}", f"the {where} of {name} went away while reclaim had hidden {files} there",
            f"if moved, look there for {self._hidden(fact.id, lost)}; rename, then acknowledge this", fact.at,
        )  # fmt: skip

    def _tell_left(self, id: int, why: str, hint: str, at: float) -> None:
        one = self.open[id]
        one.stuck = True
        self._alarms.raised(
            f"reclaim:{id}",
            f"{counted(len(one.of.files), 'file')} that reclaim began to take away may stand under hidden names: {why}",
            f"{hint or 'bring the root back'}; then it is ended by itself. Hidden are {self._hidden(id, one.of.files)}",
            at,
        )  # fmt: skip

    def _name(self, file: ReclaimFile) -> str:
        return join(self._root_path(file.root), file.path)

    def _hidden(self, id: int, files: Sequence[ReclaimFile]) -> str:
        """Return the hidden names of the first files, and the command that tells all."""
        named = ", ".join(f"{file.hidden} (was {self._name(file)})" for file in files[:NAMED_MAX])
        more = len(files) - NAMED_MAX
        return f"{named} and {more} more (`trigger-daemon storage reclaim --set {id}` tells all)" if more > 0 else named

    def words(self) -> dict[str, Any]:
        """Return what the heartbeat tells."""
        return {"enabled": self.enabled, "under_way": len(self.open), "queued": len(self.queue)}


def _key(of: ReclaimSet) -> tuple[int, str]:
    return of.files[0].root, of.files[0].path
