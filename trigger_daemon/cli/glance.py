"""What `status` looks like: the answer first, then what moves, what waits, disks, alarms; as much as fits the screen.

What is left out is counted, with the command that shows it. On a screen each
thing has one line, so that its height is known before it is drawn.
"""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from trigger_daemon.cli import text
from trigger_daemon.cli.status import needs_person

BAR = 10  # characters
OLD_S = 6.0  # three heartbeats: from then on it is said how old it is
HISTORY, HISTORY_NARROW = 30, 10  # characters of the last minutes
WIDE = 104  # columns from which on rules have room for everything beside the last minutes

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN = " .:-=+*%#"
Row = Sequence[Any]

_OPEN = ("HELD", "INACTIVE", "CANCELLING", "ACTIVE", "STARTING", "PENDING")


@dataclass
class Section:
    """A part of the screen: items of one or more rows, of which `least` stay however small it is."""

    columns: Sequence[tuple[str, str]]
    items: list[list[Row]]
    more: str = ""  # the command that shows the rest
    title: str = ""
    least: int = 1
    apart: bool = True  # a blank line before it
    shown: int = field(init=False)

    def __post_init__(self) -> None:
        self.shown = len(self.items)

    @property
    def lines(self) -> int:
        """Return its height: a blank line, title, headings, items, and what counts the rest."""
        if not self.items:
            return 0
        rows = sum(map(len, self.items[: self.shown]))
        return self.apart + bool(self.title) + self._headed() + rows + (self.shown < len(self.items))

    def _headed(self) -> bool:
        return any(heading for heading, _ in self.columns)

    def parts(self, *, one_line: bool) -> Iterator[RenderableType]:
        """Yield what is to be printed."""
        if not self.items:
            return
        if self.apart:
            yield ""
        if self.title:
            yield Text(self.title, style="bold")
        kinds = {"wide": "name", "two": "name", "path": "name"} if one_line else {}
        table = text.table(*((heading, kinds.get(kind, kind)) for heading, kind in self.columns), ruled=False)
        for item in self.items[: self.shown]:
            for row in item:
                text.row(table, *row)
        yield table
        if left := len(self.items) - self.shown:
            yield Text(f"+{left:,} more{f': `trigger-daemon {self.more}`' if self.more else ''}", style="dim")


def show(now: Mapping[str, Any], *, height: int | None) -> None:
    """Print a status; None: as long as it is."""
    console = text.console()
    console.print(picture(now, console, height=height))


def picture(now: Mapping[str, Any], console: Console, *, height: int | None, live: bool = False) -> RenderableType:
    """Return a status that is no higher than `height`, as far as each section keeps its least; `live`: for --watch."""
    head = [line for whole in _head(now) for line in whole.wrap(console, console.width)]
    width = None if height is None else console.width
    sections = [
        _alarms(now, width), _rules(now, console, live=live), _working(now), _waits(now, width), _volumes(now),
        _roots(now),
    ]  # fmt: skip
    if height is not None:
        fit(sections, height - len(head))
    lines: list[RenderableType] = list(head)
    for section in sections:
        lines += section.parts(one_line=height is not None)
    return Group(*lines)


def fit(sections: Sequence[Section], height: int) -> None:
    """Leave out blank lines, then items, always of the section that has most, until all is no higher than `height`."""
    if sum(section.lines for section in sections) > height:
        for section in sections:
            section.apart = False
    while sum(section.lines for section in sections) > height:
        some = [section for section in sections if section.shown > section.least]
        if not some:
            return
        max(some, key=lambda section: section.lines).shown -= 1


# --------------------------------------------------------------------------- head


def verdict(now: Mapping[str, Any]) -> tuple[str, str]:
    """Return the answer to "is all well?" in a line, and its colour."""
    if not now["daemon"]["running"]:
        heard = now["daemon"]["heartbeat_time"]
        return "NOT RUNNING" + (f", last heard of {text.clock(heard)}" if heard else ""), "bold red"
    if why := needs_person(now):
        return f"A person is needed: {'; '.join(why)}.", "bold red"
    if now["paused"]:
        return f"Paused on purpose: {text.safe(now['paused'])}", "yellow"
    if now.get("throttle") and now["throttle"]["instrument"]:
        return f"Standing still for the instrument: {text.safe(now['throttle']['instrument'])}", "yellow"
    if now["rules_fault"]:
        have = "a fault" if (many := now["rules_fault"].get("faults", 1)) == 1 else f"{many} faults"
        return f"The rule files have {have}; the last good ones go on.", "yellow"
    away = [root for root in now["roots"] if root["health"] != "ok"]
    if away:
        first = f"{text.name(away[0]['path'])} is {away[0]['health']}"
        return f"Degraded, and waiting: {first}" + (f", and {len(away) - 1} more" if len(away) > 1 else ""), "yellow"
    if seen := sum(bool(alarm["acked_by"]) for alarm in now["alarms"]):
        return f"Somebody looks after {text.counted(seen, 'alarm')}; all else is well.", "yellow"
    if not now["rules"]:
        return "All is well, and nothing to do: no rules are in force.", "green"
    count = len(now["working"])
    moves = f"{text.counted(count, 'run')} at work" if count else "nothing to do"
    return f"All is well: {moves}.", "green"


def _head(now: Mapping[str, Any]) -> list[Text]:
    words, style = verdict(now)
    daemon = now["daemon"]
    about = [f"trigger-daemon {daemon['version'] or ''}".strip(), text.safe(now.get("host") or "")]
    if daemon["running"]:
        about.append(f"pid {daemon['pid']}")
        if daemon["started_time"]:
            about.append(f"up {text.age(time.time() - daemon['started_time'])}")
    lines = [Text(words, style=style), Text(" · ".join(filter(None, about)), style="dim")]
    if daemon["running"] and daemon["heartbeat_age_s"] > OLD_S:
        lines.append(Text(f"OLD: what follows is {text.age(daemon['heartbeat_age_s'])} old", style="bold yellow"))
    broker = now.get("mqtt")
    if broker and broker["state"] != "connected":
        why, since = broker["why"] or "connecting to " + broker["broker"], text.age(time.time() - broker["since_time"])
        lines.append(Text(text.safe(f"MQTT: {why}, for {since}"), style="yellow"))
        if broker.get("hint"):
            lines.append(Text(text.safe(f"hint: {broker['hint']}"), style="yellow"))
    if not daemon["running"]:
        lines += [Text(line, style="bold red") for line in _where(daemon)]
    return [*lines, *_changes(now)]


def _where(daemon: Mapping[str, Any]) -> list[str]:
    """Return where nothing runs, and what to do: with the wrong settings one looks in the wrong place."""
    start = "`trigger-daemon serve` (or `systemctl start trigger-daemon` where it is a service)"
    place = text.name(daemon["state_dir"])
    if _full(daemon["state_dir"]):
        return [
            f"the disk of {place} is full: a daemon that is started waits for room there",
            f"hint: make some; then, unless it goes on by itself, start it: {start}",
        ]
    if daemon["journal"]:
        return [f"no daemon holds {place}", f"hint: start it: {start}"]
    return [f"there is no journal in {place}", f"hint: name its settings with --config, or start it: {start}"]


def _full(directory: str) -> bool:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return False
    return disk.f_bavail == 0 or (disk.f_files > 0 and disk.f_favail == 0)


def _changes(now: Mapping[str, Any]) -> Iterator[Text]:
    """Yield what keeps the rule files from being in force."""
    if fault := now["rules_fault"]:
        place = f"{fault['file']}:{fault['line']}:{fault['column']}"
        many = fault.get("faults", 1)
        have = "a fault; the last good ones go on" if many == 1 else (
            f"{many} faults (`trigger-daemon rules check`); the last good ones go on; the first"
        )
        yield Text(f"the rule files have {have}: {text.safe(place)}: {text.safe(fault['message'])}", style="red")
    for rule, told in now["undecided"].items():
        yield Text(f"rule {text.safe(rule)} was moved from {text.name(told['was'])} to {text.name(told['now'])}:"
                   f" {told['files_done']:,} files were done there; decide by `trigger-daemon rules apply`",
                   style="yellow")  # fmt: skip


# ----------------------------------------------------------------------- sections


def _rules(now: Mapping[str, Any], console: Console, *, live: bool) -> Section:
    """Those first that move or wait; a rule's state only where one is not active."""
    rules = sorted(now["rules"], key=_still)
    states = any(rule["state"] != "active" for rule in rules)
    blocked = any(rule["blocked"] for rule in rules)
    whole = not live or console.width >= WIDE
    columns = [
        ("rule", "name"), *([("state", "word")] if states else []), ("settling", "right"), ("complete", "right"),
        *([("blocked", "right")] if blocked else []), ("runs", "two"),
        *([("done", "right"), ("files/min", "right")] if whole else []), ("rate", "right"),
        *([("last 5 min", "word")] if live else []),
    ]  # fmt: skip
    blocks = _BLOCKS if "utf" in (console.encoding or "").lower() and os.environ.get("TERM") != "linux" else _PLAIN
    length = HISTORY if whole else HISTORY_NARROW
    items: list[list[Row]] = []
    for rule in rules:
        runs = " ".join(f"{rule['runs'][state]:,} {state}" for state in _OPEN if rule["runs"].get(state))
        rate = rule.get("bytes_per_s")
        items.append([[
            rule["name"], *([rule["state"]] if states else []), _number(rule["settling"]), _number(rule["complete"]),
            *([_number(rule["blocked"])] if blocked else []), runs or "-",
            *([_number(rule["files_done"]), _per_min(rule.get("files_per_min"))] if whole else []),
            "?" if rate is None else f"{text.size(rate)}/s" if rate else "-",
            *([spark(rule.get("bytes_per_s_lately") or (), blocks, length)] if live else []),
        ]])  # fmt: skip
    return Section(columns, items, more="rules list", least=2)


def _still(rule: Mapping[str, Any]) -> bool:
    return not (rule.get("bytes_per_s") or rule["settling"] or rule["complete"] or rule["blocked"]
                or any(rule["runs"].get(state) for state in _OPEN))  # fmt: skip


def spark(rates: Sequence[int], blocks: str = _BLOCKS, length: int = HISTORY) -> str:
    """Return rates over time in at most `length` characters, the newest last; the highest is the peak of these."""
    each = max(1, math.ceil(len(rates) / length))
    sums = [sum(rates[n : n + each]) for n in range(0, len(rates), each)]
    top, last = max(sums, default=0), len(blocks) - 1
    if not top:
        return ""
    return "".join(blocks[max(1, round(last * one / top)) if one else 0] for one in sums)


def _per_min(files: float | None) -> str:
    if not files:
        return "?" if files is None else "-"
    return f"{files:,.0f}" if files >= 10 else f"{files:.1f}"


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}" if count else "-"


def _working(now: Mapping[str, Any]) -> Section:
    states = any(run["state"] != "ACTIVE" for run in now["working"])
    items: list[list[Row]] = []
    for run in now["working"]:
        done, whole = (run["bytes_done"], run["bytes"]) if run["bytes"] else (run["files_done"], run["files"])
        words = f"of {text.size(run['bytes'])}"
        if run["bytes_per_s"]:
            words = f"{text.age(run['left_s'])} left, {text.size(run['bytes_per_s'])}/s, {words}"
        state = [run["state"]] if states else []
        items.append([[f"run {run['run']}", run["rule"], *state, bar(done, whole), words]])
    columns = [("", "right"), ("", "name"), *([("", "word")] if states else []), ("", "word"), ("", "wide")]
    return Section(columns, items, more="runs list --state ACTIVE", title="AT WORK")


def bar(done: int, whole: int) -> str:
    """Return progress that any terminal, and a file, can show."""
    share = min(1.0, done / whole) if whole else 0.0
    full = int(share * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {100 * share:3.0f} %"


def _two_lines(words: str, width: int) -> list[str]:
    """Return words on at most two lines; the table cuts the second."""
    first, *rest = textwrap.wrap(text.safe(words), max(20, width), break_on_hyphens=False) or [""]
    return [first, " ".join(rest)] if rest else [first]


def _waits(now: Mapping[str, Any], width: int | None) -> Section:
    """All that do not move by reason, those that need a person first; on a screen alarms have their hints."""
    groups = now["waits"]["groups"]
    beside = sum(
        2 + max((len(str(word)) for word in column), default=0)
        for column in ([f"{of['runs']:,}" for of in groups], [of["state"] for of in groups],
                       [of["rule"] or "several" for of in groups])
    )  # fmt: skip
    items: list[list[Row]] = []
    for group in now["waits"]["groups"]:
        which = f"run {group['first_run']}: " if group["runs"] == 1 else ""
        words = which + group["why"] + text.looked_next(group.get("next_time"))
        why = [words] if width is None else _two_lines(words, width - beside)
        if width is None and group["hint"] and group["state"] != "PENDING":
            why.append(f"hint: {group['hint']}")
        lead = [f"{group['runs']:,}", group["state"], group["rule"] or "several"]
        items.append([[*(lead if not number else ("", "", "")), words] for number, words in enumerate(why)])
    if more := now["waits"]["more_runs"]:
        items.append([[f"{more:,}", "", "", "more, for other reasons: `trigger-daemon runs list`"]])
    columns = [("", "right"), ("", "word"), ("", "name"), ("", "wide")]
    return Section(columns, items, more="runs list", title="WAITING")


def _alarms(now: Mapping[str, Any], width: int | None) -> Section:
    """Two or three lines an alarm, those first that nobody has acknowledged, the newest of them first."""
    items: list[list[Row]] = []
    for alarm in sorted(now["alarms"], key=lambda alarm: (bool(alarm["acked_by"]), -alarm["since_time"])):
        seen = f"seen by {alarm['acked_by']}: " if alarm["acked_by"] else ""
        mark, since = Text("" if seen else "!", style="bold red"), text.age(time.time() - alarm["since_time"])
        what = [seen + alarm["what"]] if width is None else _two_lines(seen + alarm["what"], width - len(since) - 5)
        items.append([[mark, since, what[0]], *(["", "", words] for words in what[1:])])
        items[-1].append(["", "", f"hint: {alarm['hint']}" if alarm["hint"] else f"key: {alarm['key']}"])
    return Section([("", "word"), ("", "right"), ("", "wide")], items, more="alarms list", title="ALARMS", least=2)


def _roots(now: Mapping[str, Any]) -> Section:
    """One line for all that are well."""
    well = [root for root in now["roots"] if root["health"] == "ok"]
    items: list[list[Row]] = [
        [["root", text.name(root["path"]), root["health"], root["events"], root["why"]]]
        for root in now["roots"]
        if root["health"] != "ok"
    ]
    if well:
        first = text.name(well[0]["path"]) + (f" and {len(well) - 1} more" if len(well) > 1 else "")
        items.append([["root", first, "ok", "/".join(sorted({root["events"] for root in well})), ""]])
    columns = [("", "word"), ("", "path"), ("", "word"), ("", "word"), ("", "wide")]
    return Section(columns, items, more="status --all")


def _volumes(now: Mapping[str, Any]) -> Section:
    items: list[list[Row]] = []
    for volume in now["volumes"]:
        path = text.name(volume["path"])
        if volume.get("error"):
            items.append([[path, "?", "", "", "", "", volume["error"]]])
        elif volume["total_bytes"]:
            rate, full_s = volume["fill_bytes_per_s"] or 0, volume["full_in_s"]
            free, total = volume["free_bytes"], volume["total_bytes"]
            items.append([[
                path, volume["state"], text.size(free), text.size(total), f"{100 * free / total:.0f} %",
                f"{text.size(rate)}/s" if rate > 0 else "-", text.age(full_s) if full_s else "-",
            ]])  # fmt: skip
    columns = [("volume", "path"), ("state", "word"), ("free", "right"), ("of", "right"), ("", "right"),
               ("fills", "word"), ("full in", "word")]  # fmt: skip
    return Section(columns, items, more="storage")
