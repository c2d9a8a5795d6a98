"""Which alarms people are told, when, and how often: one cause is one message, and nobody is woken twice for it.

Pure. What stands is seen again and again; what was told is kept apart, since
a message may fail. Nothing is lost by telling late: what is due is judged from
what stands now, never from a queue of what happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FLAPS = 3  # raised so often within CALM_S, an alarm is told as one that comes and goes
CALM_S = 3_600.0  # it has stood, or been over, for so long: it does not come and go any more
KNOWN_MAX = 1_000  # alarms that are known one by one; more are only counted
QUIET = frozenset({"paused"})  # somebody did it on purpose: told when it is forgotten, after `repeat`

Kind = Literal["new", "flaps", "still", "over"]


@dataclass(frozen=True, slots=True)
class News:
    """What is to be told of one alarm."""

    key: str
    kind: Kind
    what: str
    hint: str
    since_time: float
    times: int  # raised so often since `first_time`
    first_time: float
    stands: bool


@dataclass(slots=True)
class _Known:
    what: str
    hint: str
    since_time: float
    first_time: float
    changed_at: float  # it stands, or is over, since
    stands: bool = True
    acked: bool = False
    told: Literal["", "stands", "flaps"] = ""  # what people believe
    told_at: float = 0.0
    times: int = 1


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds: alarms within `wait_s` are one message, one message each `every_s`, once more after `repeat_s`."""

    wait_s: float = 60.0
    every_s: float = 300.0
    repeat_s: float = 43_200.0


@dataclass(frozen=True, slots=True)
class Ways:
    """How people are told; nothing set: not at all."""

    command: tuple[str, ...] = ()
    to: tuple[str, ...] = ()
    sender: str = ""
    sendmail: tuple[str, ...] = ()
    timeout_s: float = 30.0
    pace: Pace = field(default_factory=Pace)

    def programs(self) -> dict[str, tuple[str, ...]]:
        """Return what is run, by what it is called in the settings."""
        ways = {"command": self.command, "mail": self.sendmail if self.to else ()}
        return {name: argv for name, argv in ways.items() if argv}


class Telling:
    """What people know of the alarms, and what they should."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.uncounted = 0  # alarms beyond KNOWN_MAX
        self._known: dict[str, _Known] = {}
        self._next_at = float("-inf")

    def see(self, alarms: Iterable[Mapping[str, Any]], at: float) -> None:
        """Take all alarms that stand now, each with key, what, hint, since_time and acked_by."""
        standing = {alarm["key"]: alarm for alarm in alarms}
        self.uncounted = 0
        for key, alarm in standing.items():
            one = self._known.get(key)
            if one is None:
                if len(self._known) >= KNOWN_MAX:
                    self.uncounted += 1
                    continue
                since = alarm["since_time"]
                self._known[key] = one = _Known(alarm["what"], alarm["hint"], since, since, changed_at=at)
            elif not one.stands or one.since_time != alarm["since_time"]:  # it was over in between, seen or not
                one.stands, one.changed_at = True, at
                one.times += 1
            elif one.told == "stands" and at - one.changed_at >= CALM_S:
                one.times, one.first_time = 1, one.since_time
            one.what, one.hint, one.since_time = alarm["what"], alarm["hint"], alarm["since_time"]
            one.acked = bool(alarm["acked_by"])
        for key, one in list(self._known.items()):
            if key in standing:
                continue
            if one.stands:
                one.stands, one.acked, one.changed_at = False, False, at
            elif not one.told and at - one.changed_at >= CALM_S:
                del self._known[key]

    def due(self, at: float) -> list[News]:
        """Return what is to be told now, the most urgent first; whoever is told of one thing is told of all."""
        if at < self._next_at:
            return []
        found = {key: kind for key, one in self._known.items() if (kind := self._kind(key, one, at))}
        if not found:
            return []
        for key, one in self._known.items():  # these came within `wait` of the first
            if one.stands and not one.told and not one.acked and key not in QUIET:
                found.setdefault(key, "new")
        order = ("new", "flaps", "still", "over")
        return sorted(
            (self._news(key, kind) for key, kind in found.items()),
            key=lambda news: (order.index(news.kind), news.since_time),
        )

    def told(self, news: Iterable[News], at: float) -> None:
        """Note that people were told."""
        self._next_at = at + self.pace.every_s
        for item in news:
            one = self._known[item.key]
            one.told_at = at
            match item.kind:
                case "over" if one.told == "flaps":
                    del self._known[item.key]
                case "over":
                    one.told, one.times = "", min(one.times, FLAPS - 1)  # that it came is kept for CALM_S
                case "flaps":
                    one.told = "flaps"
                case _:
                    one.told = "stands"

    def failed(self, at: float) -> None:
        """Note that nobody could be told: it is tried again, no sooner than any message."""
        self._next_at = at + self.pace.every_s

    def standing(self) -> int:
        """Return how many alarms stand that nobody has acknowledged."""
        return self.uncounted + sum(one.stands and not one.acked for one in self._known.values())

    def _kind(self, key: str, one: _Known, at: float) -> Kind | None:
        held_s = at - one.changed_at
        again = not one.acked and at - one.told_at >= self.pace.repeat_s
        if one.told == "flaps":
            if held_s >= CALM_S:
                return "new" if one.stands else "over"
            return "flaps" if again else None
        if one.times >= FLAPS and not one.acked and key not in QUIET and (one.stands or not one.told):
            return "flaps" if one.told or held_s < CALM_S else None
        if one.told:
            if not one.stands:
                return "over" if held_s >= self.pace.wait_s else None
            return "still" if again else None
        wait_s = self.pace.repeat_s if key in QUIET else self.pace.wait_s
        return "new" if one.stands and not one.acked and held_s >= wait_s else None

    def _news(self, key: str, kind: Kind) -> News:
        one = self._known[key]
        return News(key, kind, one.what, one.hint, one.since_time, one.times, one.first_time, one.stands)

    # ------------------------------------------------------------ over a restart

    def kept(self, at: float, utc: float) -> dict[str, Any]:
        """Return what people were told, as JSON; times on the wall clock."""
        return {
            "next_time": utc + max(0.0, self._next_at - at),
            "told": {
                key: {
                    "what": one.what, "hint": one.hint, "since_time": one.since_time, "first_time": one.first_time,
                    "told": one.told, "told_time": utc - (at - one.told_at), "times": one.times,
                }
                for key, one in self._known.items()
                if one.told
            },
        }  # fmt: skip

    def restore(self, kept: Mapping[str, Any], at: float, utc: float) -> None:
        """Take what `kept` gave in an earlier life; a clock that was set delays nothing for longer than its time.

        Raises KeyError, TypeError, ValueError or AttributeError for anything else.
        """
        self._next_at = at + min(max(0.0, float(kept["next_time"]) - utc), self.pace.every_s)
        for key, of in list(kept["told"].items())[:KNOWN_MAX]:
            ago_s = max(0.0, utc - float(of["told_time"]))  # a clock that was set back delays nothing
            if of["told"] not in ("stands", "flaps"):
                raise ValueError(of["told"])
            self._known[str(key)] = _Known(
                str(of["what"]), str(of["hint"]), float(of["since_time"]), float(of["first_time"]), changed_at=at,
                told=of["told"], told_at=at - ago_s, times=int(of["times"]),
            )  # fmt: skip
