"""What an onlooker of the demo is told while it happens: events as lines, numbers as a table below them.

All of it is read as any operator reads it: from the disk, the journal, the
heartbeat, and orders that ask.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import who
from trigger_daemon.cli.demo.facility import Facility
from trigger_daemon.control import ControlClient
from trigger_daemon.errors import TriggerError
from trigger_daemon.reader import Reader

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from trigger_daemon.simulator import Written

ASK_S = 1.0  # between two questions to the daemon; it answers within a third of a second
PLAIN_S = 5.0  # between two lines of numbers where there is no terminal
RATE_S = 5.0  # a rate is a mean over so long
RUNS_MAX = 1_000  # the demo makes some 15

DONE = ("VERIFIED", "SUCCEEDED")


@dataclass(frozen=True, slots=True)
class Watched:
    """A rule of the demo, as it is shown."""

    noun: str
    ends: str  # of the names of its files
    copies: bool = True


WATCHED = {
    "krios-tiff": Watched("movie", "_fractions.tiff"),
    "krios-mrc": Watched("movie", "_Fractions.mrc"),
    "chip-qc": Watched("image", ".cbf", copies=False),
    "chip-images": Watched("image", ".cbf"),
}


@dataclass(slots=True)
class Batch:
    """A closed batch, as far as the journal tells."""

    id: int
    rule: str
    files: int
    bytes: int
    members: int  # without companions and markers
    state: str = ""

    @property
    def copied(self) -> bool:
        return self.state == "VERIFIED"


@dataclass(slots=True)
class Numbers:
    """What is counted for one rule, in files that its `match` names; bytes with companions."""

    written: int = 0
    settling: int = 0
    complete: int = 0
    blocked: int = 0
    batched: int = 0
    done: int = 0
    done_bytes: int = 0


class Show:
    """Looks, counts, and tells. `stream`: where to."""

    def __init__(self, facility: Facility, began: float, stream: TextIO) -> None:
        self.console = text.console(stream)
        self.batches: dict[int, Batch] = {}
        self.events: list[str] = []
        self._facility = facility
        self._began = began
        self._reader = Reader(facility.state)
        self._client = ControlClient(facility.state)
        self._files: dict[tuple[str, str], Mapping[str, Any]] = {}  # rule, path -> what is said of a file on its way
        self._written = (0, 0)  # files, bytes on the instruments' disk
        self._on_disk: Counter[str] = Counter()  # the ends of names
        self._past: list[tuple[float, int, int]] = []  # when, bytes written, bytes verified
        self._told: set[str] = set()
        self._waiting: set[tuple[str, str]] = set()  # files that were told to wait for something
        self._asked_at = self._plain_at = 0.0
        self._live: Live | None = None

    def say(self, words: str) -> None:
        """Tell an event, with the seconds since the demo began."""
        from rich.text import Text

        self.events.append(words)
        style = ""
        if words.startswith("ALARM") or "is HELD" in words:
            style = "bold red"
        elif " verified:" in words:
            style = "green"
        elif " waits" in words or " is blocked" in words:
            style = "yellow"
        line = Text(f"{self._age():5.1f} s  ", style="dim")
        self.console.print(line.append(text.safe(words), style=style or "not dim"), soft_wrap=True)

    def _age(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def numbers_below(self) -> Iterator[None]:
        """Keep the table below the events, where there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False) as self._live:
            yield
            self._live.update(self._table(), refresh=True)

    # ------------------------------------------------------------------- look

    def look(self, *, ask: bool = False) -> None:
        """Look at disk, journal and daemon, and tell what is new. `ask`: the daemon, too, is asked at once."""
        self._look_at_disk()
        self._look_at_journal()
        now = time.monotonic()
        if ask or now - self._asked_at >= ASK_S:
            self._asked_at = now
            self._ask()
        verified = sum(batch.bytes for batch in self.batches.values() if batch.copied)
        self._past = [moment for moment in self._past if now - moment[0] < RATE_S]
        self._past.append((now, self._written[1], verified))
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif now - self._plain_at >= PLAIN_S:
            self._plain_at = now
            self.console.print(f"{self._age():5.1f} s  [{self._sum()}]", soft_wrap=True)

    def _look_at_disk(self) -> None:
        files = size = 0
        ends = {watched.ends for watched in WATCHED.values()}
        counts: Counter[str] = Counter()
        for directory, _, names in os.walk(self._facility.instruments):
            for name in names:
                try:
                    size += os.lstat(os.path.join(directory, name)).st_size
                except FileNotFoundError:
                    continue  # renamed meanwhile
                files += 1
                counts.update(end for end in ends if name.endswith(end))
        self._written, self._on_disk = (files, size), counts

    def _look_at_journal(self) -> None:
        for run in reversed(self._reader.runs(limit=RUNS_MAX)):
            batch = self.batches.get(run["id"])
            if batch is None:
                batch = self.batches[run["id"]] = self._closed(run)
            if run["state"] != batch.state:
                batch.state = run["state"]
                self._moved(batch, run)

    def _closed(self, run: Mapping[str, Any]) -> Batch:
        watched = WATCHED[run["rule"]]
        manifest = self._manifest(run["id"])
        members = sum(member["path"].endswith(watched.ends) for member in manifest)
        companions = sum(bool(member["role"]) for member in manifest)
        group = run["group"]
        place = group.get("square") or f"{group.get('chip')}, run {group.get('run')}"
        counts = [text.counted(members, watched.noun)]
        counts += [text.counted(companions, "companion")] if companions else []
        counts += ["its run file"] if members + companions < len(manifest) else []
        what = f"{' and '.join(counts)} of {place}"
        self.say(f"batch {run['id']} closed by {run['rule']}: {what} - {self._short(run['reason'])}")
        return Batch(run["id"], run["rule"], run["files"], run["bytes"], members)

    def _manifest(self, batch: int) -> Sequence[Mapping[str, Any]]:
        shown = self._reader.run(batch)
        return shown["manifest"] if shown else ()

    def _moved(self, batch: Batch, run: Mapping[str, Any]) -> None:
        if batch.copied:
            what = f"{text.counted(batch.files, 'file')}, {text.size(batch.bytes)}"
            self.say(f"batch {batch.id} verified: {what}, read back and equal")
        elif batch.state == "SUCCEEDED" and run["final"]:
            output = (self._reader.run(batch.id) or {}).get("output")
            self.say(f"batch {batch.id} done: {batch.rule} says {json.dumps(output)}")
        elif batch.state == "HELD":
            self.say(f"batch {batch.id} is HELD: {run['error'] or run['because']}; {run['hint'] or ''}")

    # -------------------------------------------------------------------- ask

    def _ask(self) -> None:
        """Ask what an operator would: which files wait, which runs wait, and is there an alarm?"""
        pending = [batch.id for batch in self.batches.values() if batch.state == "PENDING"]
        try:
            files = self._client.ask("files.list", {}, who(), "demo")["files"]
            runs = self._client.ask("runs.waiting", {"ids": pending}, who(), "demo")["runs"] if pending else {}
        except TriggerError:
            return  # a busy machine: it is asked again soon; if it has ended, that is noticed
        self._files = {(file["rule"], file["path"]): file for file in files}
        for key, file in self._files.items():
            self._odd(key, file)
        for key in [key for key in self._waiting if self._files.get(key, {"stage": "waiting"})["stage"] == "waiting"]:
            self._waiting.discard(key)
            self.say(f"{Path(key[1]).name} goes on: it is complete now")
        for run, words in runs.items():
            if words["waiting_for"] and not words["waiting_for"].startswith("its turn"):
                self._once(f"batch {run} waits for {words['waiting_for']}")
        for alarm in (self._client.heartbeat() or {"alarms": ()})["alarms"]:
            self._once(f"ALARM {self._short(alarm['what'])}", key=f"{alarm['key']} {alarm['since_time']}")

    def _odd(self, key: tuple[str, str], file: Mapping[str, Any]) -> None:
        """Tell of a file that does not simply go."""
        stage, because = file["stage"], file["because"]
        if stage == "blocked":
            self._waiting.discard(key)
            self._once(f"{Path(key[1]).name} is blocked: {self._short(because)}", key=f"blocked {key}")
        elif stage == "incomplete" and "still settling" not in because:  # its companion is just being written
            self._waiting.add(key)
            until = f" (until {text.clock(file['until_time'])})" if file["until_time"] else ""
            self._once(f"{Path(key[1]).name} waits: {self._short(because)}{until}", key=f"waits {key}")

    def _once(self, words: str, key: str = "") -> None:
        if (key or words) not in self._told:
            self._told.add(key or words)
            self.say(words)

    def _short(self, words: str) -> str:
        """Leave the directories of a path out of a sentence."""
        return " ".join(word.rpartition("/")[2] or word for word in words.split(" "))

    # ------------------------------------------------------------------- over

    def is_over(self, written: Sequence[Written]) -> bool:
        """Say whether all that may arrive has, and the others stand where they stay; or a run is held."""
        states = [batch.state for batch in self.batches.values()]
        if any(state not in (*DONE, "HELD") for state in states):
            return False
        arrived = sum(batch.files for batch in self.batches.values() if batch.copied)
        if arrived < sum(item.arrives for item in written):
            return "HELD" in states
        return all(self._stays(item.path) for item in written if item.kind == "movie" and not item.arrives)

    def _stays(self, path: Path) -> bool:
        said = [file for (_, where), file in self._files.items() if where == str(path)]
        return any(file["stage"] == "blocked" or "(stalled)" in file["because"] for file in said)

    # ---------------------------------------------------------------- numbers

    def numbers(self) -> dict[str, Numbers]:
        """Return what is counted, for each rule."""
        counts = {rule: Numbers(written=self._on_disk[watched.ends]) for rule, watched in WATCHED.items()}
        for (rule, _), file in self._files.items():
            of = counts[rule]
            if file["stage"] == "blocked":
                of.blocked += 1
            elif file["stage"] == "waiting":
                of.complete += 1
            else:
                of.settling += 1
        for batch in self.batches.values():
            of = counts[batch.rule]
            of.batched += batch.members
            if batch.state in DONE:
                of.done += batch.members
                of.done_bytes += batch.bytes
        return counts

    def _rates(self) -> tuple[str, str]:
        """Return how fast the instruments write, and how fast copies are proved."""
        first, last = self._past[0], self._past[-1]
        took_s = max(last[0] - first[0], 1.0)
        return text.size((last[1] - first[1]) / took_s) + "/s", text.size((last[2] - first[2]) / took_s) + "/s"

    def _sum(self) -> str:
        counts = [count for rule, count in self.numbers().items() if WATCHED[rule].copies]
        verified = [batch for batch in self.batches.values() if batch.copied]
        writing, proving = self._rates()
        return (
            f"written {self._written[0]:,} files, {text.size(self._written[1])}, {writing}; "
            f"settling {sum(n.settling for n in counts):,}, in open batches {sum(n.complete for n in counts):,}; "
            f"verified {sum(b.files for b in verified):,} files, {text.size(sum(b.bytes for b in verified))}, {proving}"
        )

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        shown = text.table(
            ("rule", "word"), ("written", "right"), ("settling", "right"), ("in batch", "right"), ("blocked", "right"),
            ("sent", "right"), ("done", "right"), ("size", "right"),
        )  # fmt: skip
        for rule, n in self.numbers().items():
            counts = (n.settling, n.complete, n.blocked, n.batched, n.done)
            numbers = [f"{count:,}" if count else "-" for count in counts]
            size = text.size(n.done_bytes) if n.done_bytes else "-"
            text.row(shown, rule, text.counted(n.written, WATCHED[rule].noun), *numbers, size)
        writing, proving = self._rates()
        line = (
            f"{self._age():.0f} s: {self._written[0]:,} files, {text.size(self._written[1])} written;"
            f" writing {writing}, verifying {proving}"
        )
        return Group(Text(""), Text(line, style="bold"), shown)
