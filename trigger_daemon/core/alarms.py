"""What a person should look at: one alarm a cause, raised once, cleared when the cause is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trigger_daemon.core.model import AlarmAcked, AlarmCleared, AlarmRaised, Effect
from trigger_daemon.core.saved import SavedAlarm

RETELL_S = 60.0  # an alarm whose words change is written anew at most this often


@dataclass(slots=True)
class Alarm:
    what: str
    hint: str
    since_time: float
    told_at: float
    acked_by: str = ""
    told: str = ""  # the words that were written last


class Alarms:
    """The alarms that stand."""

    def __init__(self, out: list[Effect], utc: Callable[[float], float]) -> None:
        self._out = out
        self._utc = utc
        self.open: dict[str, Alarm] = {}

    def restore(self, alarms: Iterable[SavedAlarm], at: float) -> None:
        """Take the journal's open alarms."""
        for saved in alarms:
            self.open[saved.key] = Alarm(
                saved.what, saved.hint, saved.since_time, at - RETELL_S, saved.acked_by or "", saved.what
            )

    def raised(self, key: str, what: str, hint: str, at: float) -> None:
        """Raise an alarm; the same words again, or other words too soon, are one alarm."""
        old = self.open.get(key)
        if old is None:
            self.open[key] = Alarm(what, hint, self._utc(at), at, told=what)
        elif old.told == what or at - old.told_at < RETELL_S:
            old.what, old.hint = what, hint
            return
        else:
            old.what, old.hint, old.told_at, old.told = what, hint, at, what
        self._out.append(AlarmRaised(key, what, hint, self._utc(at)))

    def clear(self, key: str, at: float) -> None:
        """Clear an alarm; nothing happens if it was not raised."""
        if self.open.pop(key, None) is not None:
            self._out.append(AlarmCleared(key, self._utc(at)))

    def ack(self, key: str, who: str, at: float) -> bool:
        """Note that a person has seen it; it stands until its cause is gone."""
        alarm = self.open.get(key)
        if alarm is None:
            return False
        alarm.acked_by = who
        self._out.append(AlarmAcked(key, who, self._utc(at)))
        return True
