"""What limited storage, and an instrument at work, allow: admit, defer, reorder, stop, reclaim, alarm.

Pure. Readings come as facts; what follows goes out as effects. A run that
writes to a volume reserves all its bytes when it begins. Between two readings
nothing is given back: what a run has written since the last one is counted as
still to come, so that a reading that is late errs to the safe side.

States of a volume have hysteresis: *low* begins below `low` and ends at
`enough`; *critical* begins below `critical` and ends a quarter of the way up
to `low`, so that one file more or less changes nothing.

So have the conditions of the instrument: what comes back soon after it ended holds
for a while, however short it is met. So a program that comes and goes every
second, or a load that is our own, does not stop and start all of ours each time;
and it is for a while only, or work would stand still for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from trigger_daemon.core.model import (
    RECORDS_BYTES,
    Effect,
    Gauged,
    Log,
    OnCritical,
    Pressed,
    Throttled,
)

if TYPE_CHECKING:
    from trigger_daemon.core.alarms import Alarms
    from trigger_daemon.core.rules import Rule

STALE_S = 60.0  # a reading that is older tells nothing: nothing new is written there
ENOUGH_ABOVE_LOW = 1.25  # where the settings do not say when it is enough
REPEAT_S = 600.0  # a volume that stays critical is told again after this long
REPORTS_MAX = 60  # of a run, between two readings
INODES_LOW, INODES_CRITICAL = 0.05, 0.01  # of a volume's inodes
RELEASE_SHARE = 0.8  # a load condition ends below this part of its threshold,
RELEASE_AFTER_S = 5.0  # for this long
RETURNS_S = 60.0  # a condition that is met again so soon after its end comes and goes
LEAST_S = (0.0, 5.0, 10.0)  # how long one holds at least: at first, when it is back, and when it is back again
BETWEEN_S = 0.5  # readings come each second: one that is due now may say that a program is there once more

State = Literal["ok", "low", "critical"]


class Amount(NamedTuple):
    """An amount of a volume: bytes, or a ratio of its size."""

    bytes: int | None = None
    ratio: float | None = None

    def of(self, total_bytes: int) -> int:
        """Return bytes on a volume of this size."""
        return self.bytes if self.bytes is not None else round(total_bytes * (self.ratio or 0.0))

    def words(self, total_bytes: int) -> str:
        """Return it for people: 5 % (1.0 TB)."""
        amount = size(self.of(total_bytes))
        return amount if self.bytes is not None else f"{100 * (self.ratio or 0.0):g} % ({amount})"


NOTHING = Amount(bytes=0)
LOW, CRITICAL = Amount(ratio=0.2), Amount(ratio=0.05)  # of a volume whose settings say nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """What the settings say of a volume; all are free space."""

    path: str
    reserve: Amount = NOTHING
    low: Amount = LOW
    enough: Amount | None = None
    critical: Amount = CRITICAL
    on_critical: tuple[str, ...] = ()

    def enough_bytes(self, total_bytes: int) -> int:
        if self.enough is not None:
            return self.enough.of(total_bytes)
        return min(round(self.low.of(total_bytes) * ENOUGH_ABOVE_LOW), total_bytes)

    def fault(self, total_bytes: int) -> str:
        """Return what cannot be meant on a volume of this size, '' if all can: amounts can be told only here."""
        consequences = {
            "reserve": "nothing of ours is ever written there", "critical": "it is always critical",
            "low": "it is always low", "enough": "once it is low, it stays low",
        }  # fmt: skip
        for name, consequence in consequences.items():
            limit: Amount | None = getattr(self, name)
            if limit is not None and limit.of(total_bytes) > total_bytes:
                return (f"the `{name}` of {self.path}, {size(limit.of(total_bytes))}, is more than the disk holds,"
                        f" {size(total_bytes)}: {consequence}")  # fmt: skip
        for least, most, consequence in (
            ("critical", "low", "all of ours stops there before it is low"),
            ("low", "enough", "`enough` changes nothing"),
        ):
            below, above = getattr(self, least), getattr(self, most)
            if above is not None and below.of(total_bytes) > above.of(total_bytes):
                return (f"`{least}` of {self.path}, {below.words(total_bytes)}, is more than `{most}`,"
                        f" {above.words(total_bytes)}: {consequence}")  # fmt: skip
        return ""


@dataclass(frozen=True, slots=True)
class Condition:
    """While it holds, our own work is slowed to `bandwidth`, or stands still where that is None."""

    kind: Literal["cpu_above", "io_pressure_above", "process"]
    value: float | str  # a ratio of 1, or a process's name
    bandwidth: int | None = None

    def words(self) -> str:
        if self.kind == "process":
            return f"{self.value} is running"
        noun, value = "CPU load" if self.kind == "cpu_above" else "I/O pressure", float(self.value)
        return f"{noun} above {value:.0%}, until it is below {value * RELEASE_SHARE:.0%} for {RELEASE_AFTER_S:g} s"


@dataclass(slots=True)
class _Met:
    """A condition that holds."""

    began_at: float
    seen_at: float  # the last time that it was met
    returns: int  # how often in a row it came back soon after its end
    now: bool = True  # met by the newest reading

    @property
    def least_s(self) -> float:
        return LEAST_S[min(self.returns, len(LEAST_S) - 1)]

    @property
    def comes_and_goes(self) -> bool:
        return self.returns >= len(LEAST_S) - 1

    def words(self, condition: Condition) -> str:
        """Say what it is; of one that comes and goes the same, whether it is there now or not."""
        words = condition.words()
        return f"{words} (on and off: for {self.least_s:g} s at least each time)" if self.returns else words


@dataclass(slots=True)
class Volume:
    """What is known of a volume."""

    limits: Limits
    total_bytes: int = 0
    free_bytes: int = 0
    inodes: int = 0
    free_inodes: int = -1
    read_at: float = -1e9
    away: str = ""  # why it is not there at all
    state: State = "ok"
    told_at: float = -1e9

    def kept_bytes(self, reserve: Amount | None = None) -> int:
        """Return how many bytes are promised to nobody: the reserve, and above it what the file system itself needs."""
        kept = (reserve or self.limits.reserve).of(self.total_bytes)
        return kept + RECORDS_BYTES if kept else 0

    def words(self, state: Literal["low", "critical"]) -> str:
        """Say what it means that it is in a state: which limit free space, or that of inodes, is below."""
        path, total, limits = self.limits.path, self.total_bytes, self.limits
        share = INODES_LOW if state == "low" else INODES_CRITICAL
        if self.inodes > 0 and self.free_inodes < self.inodes * share:
            return f"{path} is {state}: less than {share:.0%} of its {self.inodes:,} inodes are free"
        limit = limits.low if state == "low" else limits.critical
        words = f"{path} is {state}: free space fell below {size(limit.of(total))} of {size(total)}"
        return words + (f", and it is low until {size(self.low_until(total))} are free" if state == "low" else "")

    def low_until(self, total_bytes: int) -> int:
        return max(self.limits.low.of(total_bytes), self.limits.enough_bytes(total_bytes))

    def grade(self) -> State:
        """Return the state that the reading means, given the one before."""
        total, free = self.total_bytes, self.free_bytes
        low, critical = self.limits.low.of(total), self.limits.critical.of(total)
        few, fewest = self.inodes * INODES_LOW, self.inodes * INODES_CRITICAL
        inodes = self.free_inodes if self.inodes > 0 else None
        if self.state == "critical":
            critical += max(0, low - critical) // 4
        if free < critical or (inodes is not None and inodes < fewest):
            return "critical"
        if self.state != "ok":
            low = self.low_until(total)
        return "low" if free < low or (inodes is not None and inodes < few) else "ok"


@dataclass(slots=True)
class _Hold:
    """Bytes that a run may still write on a volume: all of it, less what was there at the last reading.

    It never grows: an attempt that begins again where the last one ended says at first that nothing is done.
    """

    left: int
    need: int
    ended_at: float | None = None
    reports: list[tuple[float, int]] = field(default_factory=list)  # when, and how much was written by then

    def read(self, at: float) -> None:
        """A reading that began then: what was reported before it is in it."""
        before = [done for when, done in self.reports if when <= at]
        if before:
            self.left = min(self.left, max(0, self.need - max(before)))
            del self.reports[: len(before) - 1]


class Storage:
    """All volumes, what runs may still write on them, and the instrument's demands."""

    def __init__(
        self, limits: Sequence[Limits], conditions: Sequence[Condition], bandwidth: int | None, *,
        out: list[Effect], alarms: Alarms,
    ) -> None:  # fmt: skip
        self._out = out
        self._alarms = alarms
        self.volumes: dict[str, Volume] = {}
        self.conditions: tuple[Condition, ...] = ()
        self.bandwidth: int | None = None
        self.instrument = ""  # why nothing of ours may work now
        self._mounts: list[tuple[str, str]] = []  # mount point, volume or '', the longest first
        self._same: dict[str, list[Amount]] = {}  # volume -> reserves of all that the settings name on its file system
        self._held: dict[str, dict[int, _Hold]] = {}
        self._met: dict[Condition, _Met] = {}  # conditions that hold
        self._ended: dict[Condition, tuple[float, int]] = {}  # those that held -> when that ended, its `returns`
        self._flapped_at: dict[Condition, float] = {}  # when it was told that they come and go
        self._writes: dict[str, frozenset[str]] = {}  # rule -> volumes
        self._drains: dict[str, frozenset[str]] = {}
        self._told = Throttled("", None, {})
        self.use_settings(limits, conditions, bandwidth)

    def use_settings(self, limits: Sequence[Limits], conditions: Sequence[Condition], bandwidth: int | None) -> None:
        """Take what the settings say; readings of volumes that stay are kept."""
        old = self.volumes
        volumes = {each.path: old.get(each.path) or Volume(each) for each in limits}
        for each in limits:
            volumes[each.path].limits = each
        self.volumes = volumes  # at once: others read it meanwhile
        self._find_same()
        for gone in old.keys() - self.volumes.keys():
            self._held.pop(gone, None)
        self.conditions, self.bandwidth = tuple(conditions), bandwidth
        self._met = {one: met for one, met in self._met.items() if one in self.conditions}
        self._ended = {one: ended for one, ended in self._ended.items() if one in self.conditions}
        self._flapped_at = {one: at for one, at in self._flapped_at.items() if one in self.conditions}
        self._tell()

    def forget(self, at: float) -> None:
        """End the alarms of volumes that the settings do not name any more."""
        served = {f"storage:{path}{what}" for path in self.volumes for what in ("", ":critical", ":unread", ":limits")}
        for key in [key for key in self._alarms.open if key.startswith("storage:") and key not in served]:
            self._alarms.clear(key, at)

    # ------------------------------------------------------------------ which volume

    def mounts(self, table: Mapping[str, str]) -> None:
        """Take all mount points, each with the volume it belongs to, '' for none."""
        self._mounts = sorted(table.items(), key=lambda item: -len(item[0]))
        self._find_same()

    def volume_of(self, path: str) -> str:
        """Return the volume that an absolute path lies on, '' if that is none of ours."""
        for point, volume in self._mounts:
            if path == point or path.startswith(point.rstrip("/") + "/"):
                return volume if volume in self.volumes else ""
        inside = [one for one in self.volumes if path == one or path.startswith(one.rstrip("/") + "/")]
        return max(inside, key=len, default="")

    def use(self, rules: Iterable[Rule], writes: Callable[[Rule], Iterable[str]]) -> None:
        """Take the rules in force: which write where, and whose proofs let which volume be drained."""
        rules = list(rules)
        drains: dict[str, set[str]] = {}
        self._writes = {}
        for rule in rules:
            self._writes[rule.name] = frozenset(filter(None, map(self.volume_of, writes(rule))))
            if rule.reclaim is not None and (volume := self.volume_of(rule.watch)):
                for name in rule.reclaim.proven_by:
                    drains.setdefault(name, set()).add(volume)
        self._drains = {name: frozenset(of) for name, of in drains.items()}

    def rank(self, rule: str) -> int:
        """Return -1 for a rule that helps a volume that is low, 1 for one that burdens it, else 0."""
        short = {path for path, volume in self.volumes.items() if volume.state != "ok"}
        if not short:
            return 0
        if self._writes.get(rule, frozenset()) & short:
            return 1
        return -1 if self._drains.get(rule, frozenset()) & short else 0

    def reserve(self, path: str) -> int:
        """Return how many bytes must stay free where a path lies, 0 if that is no volume of ours. Any thread."""
        volume = self.volumes.get(self.volume_of(path))
        return 0 if volume is None else self._reserve_of(volume).of(volume.total_bytes)

    def reserves(self, devices: Mapping[str, str]) -> dict[str, Amount]:
        """Return what must stay free on each of these file systems (-> volume), as the settings say it. Any thread."""
        volumes = self.volumes
        found = {device: self._reserve_of(volumes[path]) for device, path in devices.items() if path in volumes}
        return {device: amount for device, amount in found.items() if amount.bytes or amount.ratio}

    def _reserve_of(self, volume: Volume) -> Amount:
        """Return the reserve that holds on a volume: the largest, where the settings name its file system twice."""
        reserves: list[Amount] = [volume.limits.reserve, *self._same.get(volume.limits.path, ())]
        return max(reserves, key=lambda amount: amount.of(volume.total_bytes))

    def _find_same(self) -> None:
        same: dict[str, list[Amount]] = {}
        for path, volume in self.volumes.items():
            same.setdefault(self.volume_of(path), []).append(volume.limits.reserve)
        self._same = same  # at once: others read it meanwhile

    # ------------------------------------------------------------------ admission

    def needs(self, paths: Iterable[str], size: int) -> dict[str, int]:
        """Return on which volumes so many bytes are written: all of them to each path."""
        found: dict[str, int] = {}
        for path in paths:
            if volume := self.volume_of(path):
                found[volume] = found.get(volume, 0) + size
        return found

    def refuses(self, needs: Mapping[str, int], at: float) -> str:
        """Return why a run may not begin now, '' if it may."""
        for path, need in needs.items():
            volume = self.volumes[path]
            if volume.away:
                return f"storage: {path} is away: {volume.away}"
            if at - volume.read_at > STALE_S:
                return f"storage: free space of {path} is not known"
            if volume.state == "critical":
                return f"storage: {path} is critical"
            room = self.room(path)
            if need > room:
                return f"storage: {size(need)} are needed on {path}, {size(max(room, 0))} lie above its reserve"
        return ""

    def impossible(self, needs: Mapping[str, int]) -> str:
        """Return why a run can never begin, however empty the volume is; '' if it may once."""
        for path, need in needs.items():
            volume = self.volumes[path]
            kept = volume.kept_bytes(self._reserve_of(volume))
            most = volume.total_bytes - kept
            if volume.total_bytes and most <= 0 < need:
                return (f"it needs {size(need)} on {path}, where the reserve, {size(kept)}, is all the disk holds,"
                        f" {size(volume.total_bytes)}, or more")  # fmt: skip
            if volume.total_bytes and need > most:
                return f"it needs {size(need)} on {path}, which has {size(most)} beside its reserve even when empty"
        return ""

    def room(self, path: str) -> int:
        """Return how many bytes may still be promised to runs."""
        volume = self.volumes[path]
        held = sum(hold.left for hold in self._held.get(path, {}).values())
        return volume.free_bytes - volume.kept_bytes(self._reserve_of(volume)) - held

    def hold(self, run: int, left: Mapping[str, int], needs: Mapping[str, int]) -> None:
        """Promise a run its bytes: those that are left of all it needs."""
        for path, need in needs.items():
            held = self._held.setdefault(path, {})
            old, reports = held.get(run), []
            least = left[path]
            if old is not None and least < need:  # no reading yet that shows what its last attempt has written
                least, reports = max(old.left, least), old.reports
            held[run] = _Hold(least, need, reports=reports)

    def wrote(self, run: int, done: int, at: float) -> None:
        """Note what a run says it has written; it counts from the first reading that begins later."""
        for of in self._held.values():
            if (hold := of.get(run)) is not None:
                if len(hold.reports) >= REPORTS_MAX:
                    del hold.reports[-1]
                hold.reports.append((at, done))

    def release(self, run: int, at: float) -> None:
        """A run has ended: what it wrote is in the first reading that begins after this."""
        for of in self._held.values():
            if (hold := of.get(run)) is not None:
                hold.ended_at = at

    # ------------------------------------------------------------------ readings

    def gauged(self, fact: Gauged) -> bool:
        """Take a reading; say whether runs may have become admissible, or not any more."""
        volume = self.volumes.get(fact.volume)
        if volume is None:
            return False
        unread = f"storage:{fact.volume}:unread"
        if fact.error or fact.total_bytes <= 0:
            words = f"free space of {fact.volume} cannot be read: {fact.error or 'it has no size'}"
            hint = "correct `volumes` in the settings, or mount it; until then nothing of ours begins to write there"
            if fact.away:
                words = f"{fact.volume} is away: {fact.error}; nothing of ours writes there"
                hint = fact.away
            self._alarms.raised(unread, words, hint, fact.at)
            was, volume.away = volume.away, fact.error if fact.away else ""
            self._tell()
            return bool(was) != bool(fact.away)
        self._alarms.clear(unread, fact.at)
        volume.away = ""
        volume.free_bytes, volume.total_bytes = fact.free_bytes, fact.total_bytes
        volume.free_inodes, volume.inodes, volume.read_at = fact.free_inodes, fact.inodes, fact.at
        held = self._held.get(fact.volume, {})
        for run, hold in list(held.items()):
            if hold.ended_at is not None and hold.ended_at <= fact.at:
                del held[run]
            else:
                hold.read(fact.at)
        volume.state = volume.grade()
        self._tell_limits(volume, fact.at)
        self._tell_volume(volume, fact.at)
        self._tell()
        return True

    def _tell_limits(self, volume: Volume, at: float) -> None:
        """Say what of the settings cannot be meant, now that it is known how large the disk is."""
        path = volume.limits.path
        why = volume.limits.fault(volume.total_bytes)
        if not why and (other := self.volume_of(path)) not in ("", path):
            why = (f"{path} is on the file system of {other}, which `volumes` names, too: what is said of {other}"
                   " holds there, and the larger `reserve`")  # fmt: skip
        if why:
            hint = f"correct `volumes` in the settings, and reload; {path} may also not be the disk that is meant"
            self._alarms.raised(f"storage:{path}:limits", why, hint, at)
        else:
            self._alarms.clear(f"storage:{path}:limits", at)

    def _tell_volume(self, volume: Volume, at: float) -> None:
        """Raise and end the alarms of a state. Their words hold no figure that ages: `storage` shows those."""
        path = volume.limits.path
        key = f"storage:{path}"
        if volume.state == "ok":
            self._alarms.clear(key, at)
            self._alarms.clear(f"{key}:critical", at)
            return
        hint = "`trigger-daemon storage` shows how it goes, what could be reclaimed, and what stands in its way"
        self._alarms.raised(key, volume.words("low"), hint, at)
        if volume.state != "critical":
            self._alarms.clear(f"{key}:critical", at)
            return
        episode = f"{key}:critical" in self._alarms.open  # over a restart too: the command runs once
        self._alarms.raised(
            f"{key}:critical", f"{volume.words('critical')}; nothing of ours writes there",
            "make room there, or stop what fills it; our work goes on by itself then", at,
        )  # fmt: skip
        if not episode and volume.limits.on_critical:
            self._out.append(OnCritical(path, volume.limits.on_critical))
        if at - volume.told_at >= REPEAT_S:
            volume.told_at = at
            self._out.append(Log("storage.critical", {"volume": path, "free_bytes": volume.free_bytes}, "error"))

    def wanted(self, path: str) -> int:
        """Return how many bytes a volume lacks until it has enough, 0 while it is not low or nothing is known of it."""
        volume = self.volumes.get(path)
        if volume is None or volume.away or volume.state == "ok":
            return 0
        short = volume.inodes > 0 and volume.free_inodes < volume.inodes * INODES_LOW
        few = round(volume.total_bytes * INODES_LOW) if short else 0
        return max(few, volume.limits.enough_bytes(volume.total_bytes) - volume.free_bytes, 0)

    def read_at(self, path: str) -> float:
        """Return when a volume was last read, long ago if it never was."""
        return self.volumes[path].read_at if path in self.volumes else -1e9

    def words(self) -> dict[str, dict[str, int | str]]:
        """Return what the settings and running work mean for each volume, in bytes."""
        told: dict[str, dict[str, int | str]] = {}
        for path, volume in self.volumes.items():
            limits, total = volume.limits, volume.total_bytes
            told[path] = {
                "state": volume.state, "reserve_bytes": self._reserve_of(volume).of(total),
                "low_bytes": limits.low.of(total), "enough_bytes": limits.enough_bytes(total),
                "critical_bytes": limits.critical.of(total),
                "promised_bytes": sum(hold.left for hold in self._held.get(path, {}).values()),
                "room_bytes": max(0, self.room(path)),
            }  # fmt: skip
        return told

    # ------------------------------------------------------------------ the instrument

    def pressed(self, fact: Pressed) -> bool:
        """Take what the machine is doing; say whether runs may have become admissible."""
        changed: list[_Met] = []
        for condition in self.conditions:
            met = self._met.get(condition)
            if self._holds(condition, fact, begun=met is not None):
                if met is None:
                    changed.append(self._begin(condition, fact.at))
                else:
                    met.seen_at, met.now = fact.at, True
            elif met is not None:
                met.now = False
                if self._end_of(condition, met) <= fact.at:
                    changed.append(self._end(condition, fact.at))
        return self._tell_instrument(changed)

    def calm_at(self) -> float | None:
        """Return when a condition ends without another reading: of programs only what is new is told."""
        ends = [self._end_of(one, met) for one, met in self._met.items() if one.kind == "process" and not met.now]
        return min(ends) + BETWEEN_S if ends else None

    def calm(self, at: float) -> bool:
        """End the conditions that are due, as `calm_at` told; say whether runs may have become admissible."""
        return self._tell_instrument([
            self._end(one, at) for one, met in list(self._met.items())
            if one.kind == "process" and not met.now and self._end_of(one, met) + BETWEEN_S <= at
        ])  # fmt: skip

    def _tell_instrument(self, changed: Sequence[_Met]) -> bool:
        before = self.instrument
        self._tell(often=bool(changed) and all(met.comes_and_goes for met in changed))
        return before != self.instrument

    def _begin(self, condition: Condition, at: float) -> _Met:
        ended_at, returns = self._ended.pop(condition, (-math.inf, 0))
        returns = returns + 1 if at - ended_at < RETURNS_S else 0
        met = self._met[condition] = _Met(at, at, returns)
        if met.comes_and_goes and at - self._flapped_at.get(condition, -math.inf) >= REPEAT_S:
            self._flapped_at[condition] = at
            self._out.append(Log("work.throttled_often", {"condition": met.words(condition)}, "warning"))
        return met

    def _end(self, condition: Condition, at: float) -> _Met:
        met = self._met.pop(condition)
        self._ended[condition] = at, met.returns
        return met

    @staticmethod
    def _end_of(condition: Condition, met: _Met) -> float:
        """Return when a condition that is not met any more ends."""
        calm_s = 0.0 if condition.kind == "process" else RELEASE_AFTER_S
        return max(met.seen_at + calm_s, met.began_at + met.least_s)

    @staticmethod
    def _holds(condition: Condition, fact: Pressed, *, begun: bool) -> bool:
        if condition.kind == "process":
            return condition.value in fact.processes
        value = fact.cpu if condition.kind == "cpu_above" else fact.io
        if value is None:  # this kernel does not tell it
            return False
        return value > float(condition.value) * (RELEASE_SHARE if begun else 1.0)

    def _tell(self, *, often: bool = False) -> None:
        """Say what of ours must stand still or go slowly, where that has changed."""
        holding = [(one, self._met[one]) for one in self.conditions if one in self._met]
        self.instrument = "; ".join(met.words(one) for one, met in holding if one.bandwidth is None)
        limits = [one.bandwidth for one, _ in holding if one.bandwidth is not None]
        if self.bandwidth is not None:
            limits.append(self.bandwidth)
        stopped = {path: f"{path} is away" if volume.away else f"{path} is critical"
                   for path, volume in self.volumes.items() if volume.away or volume.state == "critical"}  # fmt: skip
        told = Throttled(self.instrument, min(limits) if limits else None, stopped, often)
        old = self._told
        if (told.paused, told.bandwidth, told.stopped.keys()) != (old.paused, old.bandwidth, old.stopped.keys()):
            self._told = told
            self._out.append(told)


def size(amount: float) -> str:
    """Return bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 10 else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:.0f} TB" if abs(amount) >= 10 else f"{amount:.1f} TB"
