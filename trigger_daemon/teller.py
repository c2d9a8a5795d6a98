"""Tell people of alarms: by a command, and by mail through a command.

A thread of its own. What stands is handed to it whole, the newest replacing
what it has not looked at yet, so a program that hangs delays nothing and
nothing queues up. What was told is kept in a file beside the journal: after a
restart nobody is told again. It is written once a message is out, since twice
is better than never.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import textwrap
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Any

from trigger_daemon import programs
from trigger_daemon.clock import Clock
from trigger_daemon.core.telling import News, Pace, Telling, Ways

FILE = "alarms-told.json"
FILE_BYTES_MAX = 4 << 20  # KNOWN_MAX alarms are some 500 kB
KEY = "telling"  # of the alarm that telling failed: it is shown, and never told
LOOK_S = 1.0  # how often it is looked whether something is due
ITEMS_MAX = 20  # alarms told in one message; the rest is counted
WHAT_MAX = 500  # characters of an alarm's words
SUBJECT_MAX = 69  # "Subject: " before it: no line of the header has more than 78
WIDTH = 76  # of a mail's lines
STOP_S = 3.0  # a message that is on its way gets so long at the end
DEFAULT_STATE_DIR = "/var/lib/trigger-daemon"

_HEADINGS = {"new": "NEW", "flaps": "COMES AND GOES", "still": "STANDS STILL", "over": "OVER"}
_SUBJECTS = {"new": "ALARM", "flaps": "comes and goes", "still": "still", "over": "over"}


class Teller:
    """The thread that tells. `see` and `alarm` may be called from any thread, and never wait."""

    def __init__(self, ways: Ways, *, state_dir: Path, host: str, clock: Clock, logger: Any) -> None:
        self._ways = ways
        self._state_dir = state_dir
        self._host = host
        self._clock = clock
        self._log = logger
        self._telling = Telling(ways.pace)
        self._restore()
        self._standing: Sequence[Mapping[str, Any]] | None = None  # not looked at yet
        self._faults: dict[str, tuple[str, float]] = _not_there(ways, clock.utc())
        self._news = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="teller", daemon=True)
        self._thread.start()

    def use(self, ways: Ways) -> None:
        """Take other settings; what was told before stays told."""
        self._ways = ways
        self._telling.pace = ways.pace
        self._faults = _not_there(ways, self._clock.utc())  # what failed may have been mended
        self._news.set()

    def see(self, alarms: Sequence[Mapping[str, Any]]) -> None:
        """Take all alarms that stand now."""
        self._standing = [alarm for alarm in alarms if alarm["key"] != KEY]
        if self._ways.programs():
            self._news.set()

    def alarm(self) -> dict[str, Any] | None:
        """Return the alarm that people are not told of alarms; None while they are."""
        faults = dict(self._faults)
        if not faults:
            return None
        why = "; ".join(f"by {way}: {words}" for way, (words, _) in faults.items())
        return {
            "key": KEY,
            "what": f"nobody is told of alarms {why}" if len(faults) == len(self._ways.programs())
            else f"alarms are told, but not {why}",
            "hint": "mend the program, or correct `alarms` in the settings; then reload",
            "since_time": min(time for _, time in faults.values()),
            "acked_by": None,
        }  # fmt: skip

    def stop(self) -> None:
        """End; a message on its way gets STOP_S."""
        self._stop.set()
        self._news.set()
        self._thread.join(STOP_S)

    # ----------------------------------------------------------------- the thread

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._news.wait(LOOK_S if self._ways.programs() else None)
            self._news.clear()
            ways, standing = self._ways, self._standing
            if standing is None or self._stop.is_set():
                continue
            if not ways.programs():
                continue  # what comes later is told then, also of what stands since today
            self._telling.see(standing, self._clock.monotonic())
            if news := self._telling.due(self._clock.monotonic()):
                self._tell(ways, news)

    def _tell(self, ways: Ways, news: list[News]) -> None:
        message = compose(
            news, host=self._host, utc=self._clock.utc(), standing=self._telling.standing(),
            pace=ways.pace, state_dir=str(self._state_dir),
        )  # fmt: skip
        letters = {
            "command": (json.dumps(message, ensure_ascii=True) + "\n").encode("ascii"),
            "mail": mail(message, ways, self._clock.utc()) if ways.to else b"",
        }
        faults = {}
        for way, argv in ways.programs().items():
            ended = programs.run(argv, stdin=letters[way], timeout_s=ways.timeout_s)
            if ended.fault:
                before = self._faults.get(way)
                faults[way] = (shown(ended.fault), before[1] if before else self._clock.utc())
                self._log.error("alarms.not_told", by=way, why=ended.fault, said=ended.said, subject=message["subject"])
            else:
                self._log.info("alarms.told", by=way, alarms=len(news), subject=message["subject"])
        if ways is self._ways:  # else they were set anew meanwhile
            self._faults = faults
        if len(faults) == len(ways.programs()):
            self._telling.failed(self._clock.monotonic())
            return
        self._telling.told(news, self._clock.monotonic())
        self._keep()

    # ----------------------------------------------------------------- the file

    def _restore(self) -> None:
        path = self._state_dir / FILE
        try:
            with path.open("rb") as file:
                kept = json.loads(file.read(FILE_BYTES_MAX))
            self._telling.restore(kept, self._clock.monotonic(), self._clock.utc())
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # then people are told once more
            self._telling = Telling(self._ways.pace)
            self._log.warning("alarms.told_not_known", path=str(path), why=str(error))

    def _keep(self) -> None:
        """Write what was told; whole or not at all."""
        path = self._state_dir / FILE
        new = path.with_name(f"{FILE}.new")
        kept = self._telling.kept(self._clock.monotonic(), self._clock.utc())
        try:
            with open(new, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o660)) as file:
                file.write(json.dumps(kept).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:  # a full disk: after a restart they are told once more
            self._log.warning("alarms.told_not_kept", path=str(path), why=error.strerror or str(error))
            with contextlib.suppress(OSError):
                new.unlink()


def _not_there(ways: Ways, utc: float) -> dict[str, tuple[str, float]]:
    """Return the faults that can be seen before the night."""
    path = programs.environment().get("PATH", os.defpath)
    return {
        way: (f"{shown(argv[0])} is not there, or no program", utc)
        for way, argv in ways.programs().items()
        if shutil.which(argv[0], path=path) is None
    }


# ----------------------------------------------------------------------- the words


def compose(
    news: Sequence[News], *, host: str, utc: float, standing: int, pace: Pace, state_dir: str
) -> dict[str, Any]:
    """Return a message as the command is given it: subject and text for people, alarms for programs."""
    told = news[:ITEMS_MAX]
    host = shown(host)
    return {
        "host": host,
        "time": _rfc3339(utc),
        "subject": _subject(host, news),
        "text": _text(host, news, utc, standing, pace, state_dir),
        "standing": standing,
        "more": len(news) - len(told),
        "alarms": [
            {
                "key": item.key, "event": item.kind, "what": item.what[:WHAT_MAX], "hint": item.hint[:WHAT_MAX],
                "since_time": _rfc3339(item.since_time), "stands": item.stands, "times": item.times,
                "first_time": _rfc3339(item.first_time),
            }
            for item in told
        ],
    }  # fmt: skip


def mail(message: Mapping[str, Any], ways: Ways, utc: float) -> bytes:
    """Return a message as sendmail is given it."""
    letter = EmailMessage(policy=policy.default.clone(max_line_length=78))
    if ways.sender:
        letter["From"] = ways.sender
    letter["To"] = ", ".join(ways.to)
    letter["Subject"] = message["subject"]
    letter["Date"] = format_datetime(datetime.fromtimestamp(utc).astimezone())
    letter["Message-ID"] = make_msgid(domain="trigger-daemon.invalid")
    letter["Auto-Submitted"] = "auto-generated"  # no answer of a holiday comes back
    letter["X-Trigger-Daemon-Host"] = message["host"][:60].encode("ascii", "replace").decode()
    letter.set_content(message["text"])
    return letter.as_bytes()


def shown(text: str) -> str:
    """Return a text on one line: what ends lines, hides, turns or cannot be written is shown as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _subject(host: str, news: Sequence[News]) -> str:
    first = news[0]
    more = f" (+{len(news) - 1} more)" if len(news) > 1 else ""
    head = f"[{_cut(host, 20)}] {_SUBJECTS[first.kind]}: "
    return head + _cut(shown(first.what), SUBJECT_MAX - len(head) - len(more)) + more


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _text(host: str, news: Sequence[News], utc: float, standing: int, pace: Pace, state_dir: str) -> str:
    count = "1 alarm stands" if standing == 1 else f"{standing} alarms stand"
    lines = [f"Workstation {host}, {_clock(utc)}",
             f"{count} that nobody has acknowledged." if standing else "No alarm stands any more.", ""]  # fmt: skip
    heading = ""
    for item in news[:ITEMS_MAX]:
        if heading != item.kind:
            heading = item.kind
            lines += [_HEADINGS[item.kind]]
        lines += [*_wrapped("! ", item.what), *_wrapped("    ", _when(item, utc))]
        if item.kind != "over" and item.hint:
            lines += _wrapped("    do: ", item.hint)
        lines.append("")
    if len(news) > ITEMS_MAX:
        lines += [f"and {len(news) - ITEMS_MAX} more: `alarms list` shows all", ""]
    prefix = "" if state_dir == DEFAULT_STATE_DIR else f"TRIGGER_DAEMON_STATE_DIR={shlex.quote(state_dir)} "
    lines += [f"What to type on {host}:", f"    {prefix}trigger-daemon status"]
    open_ones = [item for item in news if item.kind != "over" and item.stands]
    if open_ones:
        key = shlex.quote(shown(open_ones[0].key)) if len(open_ones) == 1 else "KEY   (or: all)"
        lines += [f"    {prefix}trigger-daemon alarms ack {key}",
                  "        tells that somebody looks after it: it is not told again, only its end"]  # fmt: skip
        lines += ["", f"Without that it is told again in {_age(pace.repeat_s)}."]
    return "\n".join(lines) + "\n"


def _when(item: News, utc: float) -> str:
    since = f"since {_clock(item.since_time)}, for {_age(utc - item.since_time)}"
    match item.kind:
        case "over":
            return f"it stood since {_clock(item.since_time)}"
        case "flaps":
            now = "it stands now" if item.stands else "it is over now"
            return f"raised {item.times} times since {_clock(item.first_time)}; {now}"
        case _:
            return since


def _wrapped(lead: str, words: str) -> list[str]:
    return textwrap.wrap(
        shown(words)[:WHAT_MAX], WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _clock(utc: float) -> str:
    return datetime.fromtimestamp(utc).astimezone().strftime("%a %Y-%m-%d %H:%M:%S %Z")


def _rfc3339(utc: float) -> str:
    return datetime.fromtimestamp(utc, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _age(seconds: float) -> str:
    minutes, hours = max(0.0, seconds) / 60, max(0.0, seconds) / 3_600
    if minutes < 2:
        return f"{max(0.0, seconds):.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
