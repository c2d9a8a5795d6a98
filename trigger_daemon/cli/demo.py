"""`demo`: a simulated microscope session, from the first frame to the verified copy.

Simulated instruments write into a temporary directory; the real daemon, as a
child process with rules as staff would write them, takes it from there. What
is shown is read as any operator reads it: the journal, the heartbeat, orders
that ask. At the end every file at the destination is compared with what its
writer says it wrote, by SHA-256, which nothing of the daemon has computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, OK, Command, Setup, pass_setup, who
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from trigger_daemon.control import ControlClient
    from trigger_daemon.reader import Reader
    from trigger_daemon.simulator import Written

LIMIT_S = 100.0  # the demo takes some 35 s; on a machine that is busy with other things it may take this long
START_S = 30.0  # for the daemon to be ready
STOP_S = 15.0  # for the daemon to end; what hangs then is killed
LOOK_S = 0.25  # between two looks at everything
ASK_S = 1.0  # between two questions to the daemon; each is answered within a third of a second
PLAIN_S = 5.0  # between two lines of numbers where there is no terminal
RATE_S = 5.0  # a rate is a mean over so long
ROOM_BYTES = 500_000_000  # what is written, its copy, the journal; and some room left for others

RULES = r"""# Rules as staff write them; only the waits are shorter than at a real instrument.
rules:
  - name: krios-tiff
    description: TIFF movies with their XML companions to the archive, three at a time
    watch: EPU
    match: ["{session}/Images-Disc{disc}/{square}/Data/{movie}_fractions.tiff"]
    existing: process
    complete:
      quiescence: 2s
      checks: [tiff: {frames: 40}]
      with:
        - file: "{session}/Images-Disc{disc}/{square}/Data/{movie}.xml"
          checks: [xml]
          wait: 8s
          missing: block
      stalled_after: 8s
    batch: {group_by: [session, square], files: 3, oldest_waits: 6s}
    start:
      copy: {to: KRIOS}

  - name: krios-mrc
    description: the same for the second camera, which writes MRC
    watch: EPU
    match: ["{session}/Images-Disc{disc}/{square}/Data/{movie}_Fractions.mrc"]
    existing: process
    complete:
      quiescence: 2s
      checks: [mrc]
      with:
        - file: "{session}/Images-Disc{disc}/{square}/Data/{movie}.xml"
          checks: [xml]
          wait: 8s
          missing: block
      stalled_after: 20s
    batch: {group_by: [session, square], files: 2, oldest_waits: 6s}
    start:
      copy: {to: KRIOS}

  - name: chip-qc
    description: a first look at the first 60 images of each chip
    watch: SSX
    match: ['{experiment}/{sample}/{letter}/{chip}_{run:\d+}_{image:\d+}.cbf']
    existing: process
    priority: 10
    complete: {quiescence: 2s, trust: [rename], checks: [cbf]}
    batch: {group_by: [chip, run], only_first: 60, idle: 10s}
    start:
      command: {run: [PYTHON, "-I", LOOK, "{manifest}"], timeout: 1m}

  - name: chip-images
    description: all images of a chip to the archive, once its first look went well; the run file closes the last batch
    watch: SSX
    match: ['{experiment}/{sample}/{letter}/{chip}_{run:\d+}_{image:\d+}.cbf']
    existing: process
    complete: {quiescence: 2s, trust: [rename], checks: [cbf]}
    batch:
      group_by: [chip, run]
      files: 120
      close_on: {file: "{experiment}/{sample}/{letter}/beamline_run{run}.json", include: true}
    after: {rule: chip-qc, same: [chip, run]}
    start:
      copy: {to: CHIPS}
"""

CONFIG = """\
# The settings of the demo's daemon.
state_dir: STATE
rules_dir: RULES
sweep: {every: 2s, full: 10s}
log: {level: info, format: json}
"""

FIRST_LOOK = '''\
"""A first look at some images: the mean of their pixels, and how many are bright. The last line becomes the output."""

import json
import sys
import time

with open(sys.argv[1]) as file:
    manifest = json.load(file)
means = []
for member in manifest["files"]:
    with open(member["absolute"], "rb") as file:
        data = file.read()
    begins = data.index(b"\\x0c\\x1a\\x04\\xd5") + 4
    pixels = data[begins : data.index(b"--CIF-BINARY-FORMAT-SECTION----")]
    means.append(sum(pixels) / len(pixels))
time.sleep(3)  # a real one looks for spots, which takes its time
print(json.dumps({"images": len(means), "mean": round(sum(means) / len(means), 1), "good": min(means) > 0}))
'''


@dataclass(frozen=True, slots=True)
class Watched:
    """A rule of the demo, as it is shown."""

    rule: str
    noun: str
    ends: tuple[str, ...]  # of the names of its files; companions are not counted
    copies: bool = True


WATCHED = (
    Watched("krios-tiff", "movie", ("_fractions.tiff",)),
    Watched("krios-mrc", "movie", ("_Fractions.mrc",)),
    Watched("chip-qc", "image", (".cbf",), copies=False),
    Watched("chip-images", "image", (".cbf", "_run1.json")),
)
_NOUNS = {watched.rule: watched.noun for watched in WATCHED}


class Places:
    """The directories of one demo, all below `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.epu, self.ssx = base / "instruments" / "epu", base / "instruments" / "ssx"
        self.krios, self.chips = base / "archive" / "krios", base / "archive" / "chips"
        self.rules, self.state = base / "rules", base / "state"
        self.config, self.log, self.look = base / "config.yaml", base / "daemon.log", base / "first-look.py"

    def lay_out(self) -> None:
        """Make the directories and write settings, rules and the program that a rule runs."""
        for directory in (self.epu, self.ssx, self.krios, self.chips, self.rules, self.state):
            directory.mkdir(parents=True)
        self.config.write_text(_filled(CONFIG, STATE=self.state, RULES=self.rules))
        self.look.write_text(FIRST_LOOK)
        rules = _filled(RULES, EPU=self.epu, SSX=self.ssx)
        # What an action is given is a template: braces of a path are literal ones.
        options = {"KRIOS": self.krios, "CHIPS": self.chips, "PYTHON": sys.executable, "LOOK": self.look}
        braced = {word: str(path).replace("{", "{{").replace("}", "}}") for word, path in options.items()}
        (self.rules / "demo.yaml").write_text(_filled(rules, **braced))

    def copy_of(self, path: Path) -> Path:
        """Return where the copy of an instrument's file belongs."""
        if path.is_relative_to(self.epu):
            return self.krios / path.relative_to(self.epu)
        return self.chips / path.relative_to(self.ssx)


def _filled(template: str, **paths: Path | str) -> str:
    """Put paths, in quotes that YAML takes back exactly, for the words in capitals."""
    for word, path in paths.items():
        for before, after in ((": ", "\n"), (": ", "}"), ("[", ","), (", ", ",")):
            template = template.replace(f"{before}{word}{after}", f"{before}{json.dumps(str(path))}{after}")
    return template


# ------------------------------------------------------------------------ command


@click.command(cls=Command)
@click.option("--dir", "directory", type=click.Path(path_type=Path), metavar="DIR",
              help="Work in this directory, which must be absent or empty, instead of a temporary one.")
@click.option("--keep", is_flag=True, help="Leave everything there at the end, to look around with the other commands.")
@pass_setup
def demo(setup: Setup, directory: Path | None, keep: bool) -> None:
    """Show a simulated microscope session, from the first frame to the verified copy.

    A microscope and a beamline are simulated in a temporary directory; the real daemon decides what is complete, makes
    batches, copies and proves. It takes less than a minute, needs no account and no server, and leaves nothing behind.
    Exit code 0 only if every file arrived as its writer wrote it.
    """
    began = time.monotonic()
    with _signals_raise(), _directory(directory, keep=keep, quiet=setup.json) as base:
        places = Places(base)
        places.lay_out()
        with _daemon(places) as daemon:
            show = Show(places, began, stream=sys.stderr if setup.json else sys.stdout)
            show.open(daemon.pid)
            written = _session(places, daemon, show)
            odd = _explained(places, written)
            fault = "" if daemon.poll() is None else f"the daemon ended with {daemon.returncode}"
        summary = _summary(places, show, written, odd, fault)
        summary["seconds"] = round(time.monotonic() - began, 1)
        summary["directory"] = str(base) if keep else None
        summary["commands"] = _commands(places, odd) if keep else [f"{_program()} demo --keep"]
        if setup.json:
            setup.data(text.timed(summary))
        else:
            _print_end(show.console, summary)
    raise click.exceptions.Exit(OK if summary["ok"] else FAILURE)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it tidies up."""

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Tidy up to the end, whoever presses Ctrl-C again; everything inside has a deadline."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _directory(wanted: Path | None, *, keep: bool, quiet: bool) -> Iterator[Path]:
    """Give an empty directory, and take it away again. Raises UsageError, TriggerError."""
    made = True
    if wanted is None:
        base = Path(tempfile.mkdtemp(prefix="trigger-daemon-demo-"))
    else:
        base = Path(os.path.abspath(wanted))
        if base.exists() and (not base.is_dir() or any(base.iterdir())):
            raise click.UsageError(f"{text.name(str(base))} is not an empty directory")
        made = not base.exists()
        base.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(base).free
        if free < ROOM_BYTES:
            raise TriggerError(
                f"only {text.size(free)} are free on the disk of {base}, {text.size(ROOM_BYTES)} are needed",
                hint="choose another place: `--dir DIR`",
            )
        yield base
    finally:
        if not keep:
            with _undisturbed():
                for path in [base] if made else list(base.iterdir()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif not quiet:
            text.note(f"everything is kept in {base}")


# ------------------------------------------------------------------------- daemon


@contextmanager
def _daemon(places: Places) -> Iterator[subprocess.Popen[bytes]]:
    """Start the real daemon, wait until it watches, and end it. Raises TriggerError."""
    libc = ctypes.CDLL(None)

    def follow() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: if the demo is killed, its daemon ends

    with places.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trigger_daemon", "serve", "--config", str(places.config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(),
            start_new_session=True,  # a Ctrl-C is the demo's to handle
            preexec_fn=follow,  # noqa: PLW1509 no thread runs yet
        )  # fmt: skip
    try:
        _until_it_watches(process, places)
        yield process
    finally:
        with _undisturbed():
            _end(process, places)


def _environment() -> dict[str, str]:
    """Return ours, without what would configure the daemon or speaks of another one, and with the way to this package."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.upper().startswith("TRIGGER_DAEMON_") and name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }  # fmt: skip
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _until_it_watches(process: subprocess.Popen[bytes], places: Places) -> None:
    from trigger_daemon.control import ControlClient

    client, end = ControlClient(places.state), time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TriggerError(f"the daemon ended with {process.returncode}:\n{_tail(places)}")
        beat = client.heartbeat() if client.path.exists() else None
        if beat and beat["daemon"]["pid"] == process.pid and beat["rules_fault"]:
            raise TriggerError(f"the daemon refuses the demo's rules: {beat['rules_fault']}")
        if beat and beat["daemon"]["pid"] == process.pid and len(beat["roots"]) >= 2:
            return
        time.sleep(0.1)
    raise TriggerError(f"the daemon was not ready in {START_S:g} s:\n{_tail(places)}")


def _end(process: subprocess.Popen[bytes], places: Places) -> None:
    """End the daemon and what it started: a command outlives its daemon, by design."""
    from trigger_daemon.actions.command import standing

    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    commands = places.state / "actions" / "command"
    attempts = [str(path) for path in commands.iterdir() if path.is_dir()] if commands.is_dir() else []
    end = time.monotonic() + STOP_S
    for attempt in attempts:
        (Path(attempt) / "cancel").touch()
        while standing(attempt).phase in ("running", "orphaned") and time.monotonic() < end:
            time.sleep(0.1)


def _tail(places: Places) -> str:
    lines = places.log.read_text(errors="replace").splitlines() if places.log.exists() else []
    return "\n".join(lines[-10:])


# ------------------------------------------------------------------------ session


def _session(places: Places, daemon: subprocess.Popen[bytes], show: Show) -> list[Written]:
    """Let the instruments write and show what becomes of it, until nothing moves any more. Raises TriggerError."""
    from trigger_daemon import simulator

    stop = threading.Event()
    written: list[Written] = []
    failed: list[BaseException] = []

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Ended

    def write() -> None:
        try:
            written.extend(simulator.session(places.epu, places.ssx, pause))
        except (OSError, _Ended) as error:
            failed.append(error)

    writer = threading.Thread(target=write, name="instruments")
    writer.start()
    end = time.monotonic() + LIMIT_S
    try:
        with show.live():
            while time.monotonic() < end:
                show.look()
                if failed:
                    raise TriggerError(f"the simulated instruments cannot write: {failed[0]}")
                if daemon.poll() is not None:
                    raise TriggerError(f"the daemon ended with {daemon.returncode}:\n{_tail(places)}")
                if not writer.is_alive() and show.is_over(written):
                    break
                time.sleep(LOOK_S)
    finally:
        stop.set()
        writer.join()
    return written


class _Ended(Exception):
    """The demo ends before the simulated session does."""


@dataclass(slots=True)
class Batch:
    """A closed batch, as far as the journal tells."""

    id: int
    rule: str
    place: str  # what its group is called
    files: int
    bytes: int
    members: int  # without companions
    state: str = ""


@dataclass(slots=True)
class Numbers:
    """What is counted for one rule."""

    written: int = 0
    settling: int = 0
    complete: int = 0
    blocked: int = 0
    batched: int = 0
    verified: int = 0
    verified_bytes: int = 0


@dataclass(slots=True)
class Show:
    """What an onlooker is told while it happens."""

    places: Places
    began: float
    stream: Any
    console: Console = field(init=False)
    batches: dict[int, Batch] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> what the daemon says of a file on its way
    events: list[str] = field(default_factory=list)
    written: tuple[int, int] = (0, 0)  # files, bytes
    on_disk: Counter[str] = field(default_factory=Counter)
    _reader: Reader = field(init=False)
    _client: ControlClient = field(init=False)
    _screen: Any = None
    _asked_at: float = 0.0
    _plain_at: float = 0.0
    _told: set[str] = field(default_factory=set)
    _waits: dict[str, int] = field(default_factory=dict)  # file -> how often it was seen waiting for something
    _past: list[tuple[float, int, int]] = field(default_factory=list)  # when, bytes written, bytes verified

    def __post_init__(self) -> None:
        from trigger_daemon.control import ControlClient
        from trigger_daemon.reader import Reader

        self.console = text.console(self.stream)
        self._reader = Reader(self.places.state)
        self._client = ControlClient(self.places.state)

    def open(self, pid: int) -> None:
        """Say what is about to be seen."""
        self.say(f"instruments write below {self.places.base / 'instruments'}")
        self.say(f"the daemon runs (pid {pid}), with {len(WATCHED)} rules: {', '.join(w.rule for w in WATCHED)}")

    def say(self, words: str) -> None:
        """Tell an event, with the seconds since the demo began."""
        from rich.text import Text

        self.events.append(words)
        line = Text(f"{time.monotonic() - self.began:5.1f} s  ", style="dim")
        style = "green" if " verified" in words else "yellow" if " waits" in words or " blocked" in words else ""
        line.append(text.safe(words), style="bold red" if "HELD" in words or words.startswith("ALARM") else style)
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep a table of numbers below the events, where there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False) as self._screen:
            yield
            self._screen.update(self._table(), refresh=True)

    # ------------------------------------------------------------------- look

    def look(self) -> None:
        """Look at disk, journal and daemon, and tell what is new."""
        now = time.monotonic()
        self._look_at_the_disk()
        self._look_at_the_journal()
        if now - self._asked_at >= ASK_S:
            self._asked_at = now
            self._ask()
        verified = sum(batch.bytes for batch in self.batches.values() if batch.state == "VERIFIED")
        self._past = [item for item in self._past if now - item[0] < RATE_S] + [(now, self.written[1], verified)]
        if self._screen is not None:
            self._screen.update(self._table(), refresh=True)
        elif now - self._plain_at >= PLAIN_S:
            self._plain_at = now
            self.console.print(text.safe(f"{now - self.began:5.1f} s  [{self._sum()}]"), soft_wrap=True)

    def _look_at_the_disk(self) -> None:
        files = size = 0
        counts: Counter[str] = Counter()
        for directory, _, names in os.walk(self.places.base / "instruments"):
            for name in names:
                try:
                    size += os.lstat(os.path.join(directory, name)).st_size
                except FileNotFoundError:
                    continue  # renamed meanwhile
                files += 1
                counts.update(watched.rule for watched in WATCHED if name.endswith(watched.ends))
        self.written, self.on_disk = (files, size), counts

    def _look_at_the_journal(self) -> None:
        for run in reversed(self._reader.runs(limit=1_000)):
            batch = self.batches.get(run["id"])
            if batch is None:
                batch = self.batches[run["id"]] = self._closed(run)
            if run["state"] != batch.state:
                batch.state = run["state"]
                self._moved(batch, run)

    def _closed(self, run: Mapping[str, Any]) -> Batch:
        shown = self._reader.run(run["id"])
        members = sum(1 for member in shown["manifest"] if not member["role"]) if shown else run["files"]
        group = run["group"]
        place = group.get("square") or f"{group.get('chip', '?')}, run {group.get('run', '?')}"
        batch = Batch(run["id"], run["rule"], place, run["files"], run["bytes"], members)
        counted = text.counted(members, _NOUNS[batch.rule])
        if run["files"] > members:
            counted += f" and {text.counted(run['files'] - members, 'companion')}"
        self.say(f"batch {batch.id} closed by {batch.rule}: {counted} of {place} - {run['reason']}")
        return batch

    def _moved(self, batch: Batch, run: Mapping[str, Any]) -> None:
        if batch.state == "VERIFIED":
            self.say(f"batch {batch.id} verified: {text.counted(batch.files, 'file')}, {text.size(batch.bytes)}, read back")
        elif batch.state == "SUCCEEDED" and run["final"]:
            output = (self._reader.run(batch.id) or {}).get("output")
            self.say(f"batch {batch.id} done: {batch.rule} says {json.dumps(output)}")
        elif batch.state == "HELD":
            self.say(f"batch {batch.id} is HELD: {run['error'] or run['because']} ({run['hint'] or 'see its log'})")

    def _ask(self) -> None:
        """Ask the daemon what an operator would: which files wait, which runs wait, and is there an alarm?"""
        try:
            answer = self._client.ask("files.list", {}, who(), "demo")
            pending = [batch.id for batch in self.batches.values() if batch.state == "PENDING"]
            waits = self._client.ask("runs.waiting", {"ids": pending}, who(), "demo")["runs"] if pending else {}
        except TriggerError:
            return  # a busy machine: it is asked again soon; if it has ended, that is told
        self.files = {file["path"]: file for file in answer["files"]}
        for file in answer["files"]:
            self._odd(file)
        for path in [path for path, seen in self._waits.items() if path not in self.files and seen > 1]:
            del self._waits[path]
            self.say(f"{Path(path).name} goes on: its companion has come")
        for id, waiting in waits.items():
            if waiting["waiting_for"] and not waiting["waiting_for"].startswith("its turn"):
                self._once(f"batch {id} waits for {waiting['waiting_for']}")
        for alarm in (self._client.heartbeat() or {"alarms": ()})["alarms"]:
            self._once(f"ALARM {self._short(alarm['what'])}", key=f"alarm {alarm['key']} {alarm['since_time']}")

    def _odd(self, file: Mapping[str, Any]) -> None:
        """Tell of a file that does not simply go; a companion may come a moment after its movie."""
        path, name = file["path"], Path(file["path"]).name
        if file["stage"] == "blocked":
            self._waits.pop(path, None)
            self._once(f"{name} is blocked: {self._short(file['because'])}", key=f"blocked {path}")
        elif file["stage"] == "incomplete":
            seen = self._waits[path] = self._waits.get(path, 0) + 1
            if seen > 1:
                self._once(f"{name} waits: {self._short(file['because'])}", key=f"waits {path}")

    def _once(self, words: str, key: str = "") -> None:
        if (key or words) not in self._told:
            self._told.add(key or words)
            self.say(words)

    def _short(self, words: str) -> str:
        """Leave the directories of the simulated session out of a sentence; they are long."""
        return " ".join(word.rpartition("/")[2] if "/Images-Disc" in word else word for word in words.split(" "))

    def is_over(self, written: Sequence[Written]) -> bool:
        """Say whether all that can arrive has, and the others stand where they must."""
        if any(batch.state == "HELD" for batch in self.batches.values()):
            return not self._working()
        awaited = sum(1 for item in written if item.arrives)
        copied = {watched.rule for watched in WATCHED if watched.copies}
        arrived = sum(batch.files for batch in self.batches.values() if batch.rule in copied and batch.state == "VERIFIED")
        stuck = [item.path for item in written if not item.arrives and item.kind == "movie"]
        return arrived >= awaited and not self._working() and all(self._stands(path) for path in stuck)

    def _working(self) -> bool:
        ended = ("VERIFIED", "SUCCEEDED", "HELD")
        return any(batch.state not in ended for batch in self.batches.values())

    def _stands(self, path: Path) -> bool:
        """Say whether a file is where it stays: blocked, or told as stalled."""
        file = self.files.get(str(path))
        return file is not None and (file["stage"] == "blocked" or "stalled" in file["because"])

    # ---------------------------------------------------------------- numbers

    def numbers(self) -> dict[str, Numbers]:
        """Return what is counted, for each rule."""
        counts = {watched.rule: Numbers(written=self.on_disk[watched.rule]) for watched in WATCHED}
        for file in self.files.values():
            of = counts.get(file["rule"])
            if of is not None:
                kind = {"blocked": "blocked", "waiting": "complete"}.get(file["stage"], "settling")
                setattr(of, kind, getattr(of, kind) + 1)
        for batch in self.batches.values():
            of = counts[batch.rule]
            of.batched += batch.members
            if batch.state in ("VERIFIED", "SUCCEEDED"):
                of.verified += batch.members
                of.verified_bytes += batch.bytes
        return counts

    def _rates(self) -> tuple[float, float]:
        """Return bytes per second, written and verified."""
        first, last = self._past[0], self._past[-1]
        took = last[0] - first[0]
        return ((last[1] - first[1]) / took, (last[2] - first[2]) / took) if took > 0 else (0.0, 0.0)

    def _sum(self) -> str:
        counts = {rule: n for rule, n in self.numbers().items() if rule != "chip-qc"}
        verified = [batch for batch in self.batches.values() if batch.state == "VERIFIED"]
        writing, proving = self._rates()
        return (
            f"written {self.written[0]:,} files, {text.size(self.written[1])}, {text.size(writing)}/s; "
            f"settling {sum(n.settling for n in counts.values())}, in open batches {sum(n.complete for n in counts.values())}; "
            f"verified {sum(batch.files for batch in verified):,} files, {text.size(sum(b.bytes for b in verified))}, "
            f"{text.size(proving)}/s"
        )

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        shown = text.table(
            "rule", ("written", "right"), ("settling", "right"), ("in open batch", "right"), ("blocked", "right"),
            ("batched", "right"), ("verified", "right"), ("size", "right"),
        )  # fmt: skip
        for rule, n in self.numbers().items():
            text.row(
                shown, rule, f"{n.written:,} {_NOUNS[rule]}s", n.settling or "-", n.complete or "-", n.blocked or "-",
                n.batched or "-", n.verified or "-", text.size(n.verified_bytes) if n.verified_bytes else "-",
            )  # fmt: skip
        writing, proving = self._rates()
        line = (f"{time.monotonic() - self.began:.0f} s · {self.written[0]:,} files written, {text.size(self.written[1])}"
                f" · instruments write {text.size(writing)}/s · verified {text.size(proving)}/s")  # fmt: skip
        return Group(Text(""), Text(line, style="bold"), shown)


# ------------------------------------------------------------------------ verdict


def _explained(places: Places, written: Sequence[Written]) -> list[dict[str, Any]]:
    """Ask `explain`, as an operator would, about each odd movie, and about one image that the first look left out."""
    asked = [(item.path, item.odd, item.arrives) for item in written if item.odd and item.kind == "movie"]
    image = next((item for item in written if item.kind == "image" and "00200" in item.path.name), None)
    if image is not None:
        asked.append((image.path, "not among the first 60 images of its chip", True))
    answers = [_explain(places, path) for path, _, _ in asked]
    return [
        {"path": str(path), "odd": odd, "arrives": arrives, "rules": answer()}
        for (path, odd, arrives), answer in zip(asked, answers, strict=True)
    ]


def _explain(places: Places, path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Begin to ask; what is returned waits for the answer. Raises TriggerError then."""
    asking = subprocess.Popen(
        [sys.executable, "-P", "-m", "trigger_daemon", "explain", str(path), "-F", "json", "--config", str(places.config)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(),
    )  # fmt: skip

    def answer() -> list[dict[str, Any]]:
        try:
            said, complaint = asking.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            asking.kill()
            said, complaint = asking.communicate()
        if asking.returncode != OK:
            raise TriggerError(f"`explain {path}` ended with {asking.returncode}: {complaint.strip()[-500:]}")
        return [about for about in json.loads(said)["rules"] if about["stage"] not in ("unmatched", "ignored")]

    return answer


def _stands_right(odd: Mapping[str, Any]) -> bool:
    """Say whether an odd file is where it belongs: proved if it may go at all, else waiting, with the reason."""
    stages = {about["stage"] for about in odd["rules"]}
    return "verified" in stages if odd["arrives"] else bool(stages) and stages <= {"blocked", "incomplete"}


def compare(places: Places, written: Sequence[Written]) -> dict[str, Any]:
    """Compare every copy with the digest its writer gave; the daemon has no part in it."""
    missing, different = [], []
    expected = set()
    for item in written:
        if not item.arrives:
            continue
        copy = places.copy_of(item.path)
        expected.add(copy)
        try:
            with copy.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            missing.append(str(copy))
            continue
        if digest != item.sha256:
            different.append(str(copy))
    there = {path for top in (places.krios, places.chips) for path in top.rglob("*") if not path.is_dir()}
    return {
        "to_arrive": len(expected), "equal": len(expected) - len(missing) - len(different), "missing": missing,
        "different": different, "unexpected": sorted(map(str, there - expected)),
    }  # fmt: skip


def _summary(
    places: Places, show: Show, written: Sequence[Written], odd: Sequence[Mapping[str, Any]], fault: str
) -> dict[str, Any]:
    from trigger_daemon.reader import Reader

    reader = Reader(places.state)
    oracle = compare(places, written)
    problems = reader.check()
    verified = [batch for batch in show.batches.values() if batch.state == "VERIFIED"]
    digests = {
        str(member["digest"]).partition(":")[0]
        for batch in verified for member in (reader.run(batch.id) or {"manifest": ()})["manifest"]
    }  # fmt: skip
    why = [fault] if fault else []
    why += ["the session did not end"] if not written else []
    why += [f"{len(oracle[kind])} files {kind}" for kind in ("missing", "different", "unexpected") if oracle[kind]]
    why += [f"batch {b.id} of {b.rule} is {b.state}" for b in show.batches.values() if b.state not in ("VERIFIED", "SUCCEEDED")]
    why += [f"{Path(o['path']).name} is not where it belongs" for o in odd if not _stands_right(o)]
    why += [f"journal: {problem}" for problem in problems]
    return {
        "ok": not why, "why": why,
        "written": {"files": len(written), "bytes": sum(item.size for item in written)},
        "verified": {
            "files": sum(batch.files for batch in verified), "bytes": sum(batch.bytes for batch in verified),
            "batches": len(verified), "digests": sorted(digests),
        },
        "oracle": oracle,
        "rules": [
            {"rule": rule, "batches": sum(1 for b in show.batches.values() if b.rule == rule), "written": n.written,
             "batched": n.batched, "done": n.verified, "bytes_done": n.verified_bytes}
            for rule, n in show.numbers().items()
        ],
        "odd": list(odd),
        "events": show.events,
    }  # fmt: skip


# ---------------------------------------------------------------------------- end


def _print_end(console: Console, summary: Mapping[str, Any]) -> None:
    from rich.text import Text

    verified, oracle, written = summary["verified"], summary["oracle"], summary["written"]
    say = console.print

    def title(words: str) -> None:
        say(Text(f"\n{words}", style="bold"))

    title("Copied and proved")
    say(text.safe(
        f"{verified['files']:,} files, {text.size(verified['bytes'])}, in {verified['batches']} batches; each was hashed"
        f" ({', '.join(verified['digests'])}) while it was read, and again from the disk of the destination."
    ), soft_wrap=True)  # fmt: skip
    title("Files that did not simply go, and what `explain` says of them")
    for odd in summary["odd"]:
        say(Text(f"{text.name(Path(odd['path']).name)}: {text.safe(odd['odd'])}"), soft_wrap=True)
        for about in odd["rules"]:
            line = Text(f"    {about['rule']}: ")
            colour = {"verified": "green", "blocked": "bold red", "incomplete": "yellow"}.get(about["stage"], "")
            line.append(about["stage"], style=colour)
            until = f" (until {text.clock(about['until_time'])})" if about["until_time"] else ""
            line.append(f" - {text.safe(about['because'])}{until}")
            say(line, soft_wrap=True)
    title("Compared with what the instruments say they wrote")
    say(f"{written['files']:,} files written, {oracle['to_arrive']:,} of them may be sent;"
        f" {oracle['equal']:,} copies have the SHA-256 of their writer, {len(oracle['missing'])} are missing,"
        f" {len(oracle['different'])} differ, {len(oracle['unexpected'])} are there that should not be.", soft_wrap=True)  # fmt: skip
    if summary["ok"]:
        say(Text(f"\nEverything arrived, once, as it was written. {summary['seconds']:.0f} s.", style="bold green"))
    else:
        say(Text(f"\nNOT as it should be: {text.safe('; '.join(summary['why']))}", style="bold red"), soft_wrap=True)
    title("Where to go next" if summary["directory"] is None else f"Look around in {summary['directory']}")
    for command in summary["commands"]:
        say(f"  {command}", soft_wrap=True)
    if summary["directory"] is None:
        say("to look at its rules, journal and copies with the commands an operator has; then write a first rule of your"
            " own: README.md, docs/reference/rules.md", soft_wrap=True)  # fmt: skip


def _commands(places: Places, odd: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to try in a directory that was kept, exactly as it can be typed."""
    from shlex import quote

    config = f"--config {quote(str(places.config))}"
    blocked = next((o["path"] for o in odd if not o["arrives"]), "")
    commands = ["runs list", "runs show 1", "status", "rules check", "journal check"]
    shown = [f"{_program()} {command} {config}" for command in commands]
    if blocked:
        shown.append(f"{_program()} explain {quote(blocked)} {config}")
    shown.append(f"{_program()} serve {config}")
    if blocked:
        shown.append(f"{_program()} files go {quote(blocked)} {config}")
    return [*shown, f"rm -r {quote(str(places.base))}"]


def _program() -> str:
    """Return how this program was called, so that it can be called again."""
    from shlex import quote

    called = sys.argv[0]
    if Path(called).name != "trigger-daemon":
        return f"{quote(sys.executable)} -m trigger_daemon"
    found = shutil.which("trigger-daemon")
    return "trigger-daemon" if found and os.path.realpath(found) == os.path.realpath(called) else quote(os.path.abspath(called))
