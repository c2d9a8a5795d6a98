"""Kill the daemon, and cut the power, before each call by which it changes a disk; then judge.

One cycle: an instrument writes, the daemon works under the tracer, and at one
of its calls it is killed or the power is cut. The oracle judges what is there
(after a cut: what the remounted disk has); then a file more is written, the
daemon starts again and ends its work, and the oracle judges once more.

Threads take turns as they like, so the k-th call of one run is not the k-th of
the next. A place is therefore named: the n-th call of this kind on this file.
Cycles run in lanes, each a process with its own mounts, so that nothing is
left of them however they end.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.prove import disks
from tests.prove.disks import Disk
from tests.prove.oracle import Taken
from tests.prove.results import Result
from tests.prove.stage import DONE_S, Stage
from tests.prove.tracer import SUPPORTED, SYNCS, UNSUPPORTED, Answer, Call, Tracer, pass_gate

LANES = 2
BUDGET_S = {"tmpfs": 420.0, "ext4": 480.0, "xfs": 300.0}
QUICK_S = 60.0  # for each; there are few
STOP_S = 20.0
RETRY = "500ms"
GRACE_S = 90.0  # a lane's last cycle may take so long, with a daemon that never ends its work
WORDS_MAX = 1_500  # of what is wrong, from its beginning and from its end: the daemon's log
AGAIN_CALLS = 300  # every other time the next life is hit as well, somewhere in its first so many calls
STRIDE = 6  # of equal writes in a row the first and the last are taken, and each so manyth between
RECORDED_MAX = 50  # violations of one lane that are told in words

_ROOT = str(Path(__file__).resolve().parents[2])  # put last on sys.path: an installed daemon goes before
WRITES = frozenset({"write", "pwrite64", "writev", "pwritev", "pwritev2"})


# ----------------------------------------------------------------------- places


class Place(NamedTuple):
    """The n-th call of this name on this kind of file."""

    name: str
    file: str
    nth: int

    def __str__(self) -> str:
        return f"{self.name} {self.file} no. {self.nth}"


# What differs from run to run in a path -> what it is.
_NAMES = (
    (re.compile(r"\.(?:[A-Za-z0-9_]{8})(?=/|$)"), ".TEMPORARY"),
    (re.compile(r"(?<=actions/command/)\d+-\d+"), "RUN"),
    (re.compile(r"/\.\d+\.tif\.[^/ ]*\.part"), "/FILE.part"),
    (re.compile(r"out/[ab]/\d+\.tif"), "out/DIR/FILE"),
    (re.compile(r"out/[ab](?=/|$| )"), "out/DIR"),
)


def kind_of(path: str, base: str) -> str:
    """Return a path without what is by chance in it."""
    parts = []
    for part in path.split(" -> "):
        name = os.path.relpath(part, base)
        for pattern, word in _NAMES:
            name = pattern.sub(word, name)
        parts.append(name)
    return " -> ".join(parts)


def plan(calls: Sequence[tuple[str, str]], seed: int) -> tuple[list[Place], Counter[tuple[str, str]]]:
    """Return the places worth a fault, in the order of their worth, and how many calls are passed over, by kind.

    First one of each kind of call and file; then all that are no plain writes;
    then writes where a row of equal ones begins and ends; then some between.
    """
    seen: Counter[tuple[str, str]] = Counter()
    places = []
    for call in calls:
        seen[call] += 1
        places.append(Place(*call, seen[call]))
    row: dict[int, int] = {}  # index of a write -> its place in its row
    ends: set[int] = set()
    last: dict[str, int] = {}  # file -> the write before, while nothing else was done to the file
    for index, (name, file) in enumerate(calls):
        if name not in WRITES:
            if file in last:
                ends.add(last.pop(file))
            continue
        row[index] = row[last[file]] + 1 if file in last else 0
        last[file] = index
    ends |= set(last.values())

    rng = random.Random(seed)
    first = {call: rng.randrange(count) + 1 for call, count in sorted(seen.items())}
    worth: dict[Place, int] = {}
    passed: Counter[tuple[str, str]] = Counter()
    for index, place in enumerate(places):
        call = (place.name, place.file)
        if place.nth == first[call]:
            worth[place] = 0
        elif place.name not in WRITES:
            worth[place] = 1
        elif place.file.endswith("-shm"):
            passed[call] += 1  # made anew after every crash
        elif row[index] == 0 or index in ends:
            worth[place] = 2
        elif row[index] % STRIDE == 0:
            worth[place] = 3
        else:
            passed[call] += 1
    chosen = list(worth)
    rng.shuffle(chosen)
    chosen.sort(key=lambda place: worth[place])
    return chosen, passed


# ----------------------------------------------------------------------- cycles


# Where a fault has most to break: for a quick look.
_TELLING = (
    Place("fdatasync", "state/journal.db-wal", 12),  # the batches are in it, or just not
    Place("renameat2", "out/DIR/FILE.part -> out/DIR/FILE", 1),
    Place("fsync", "out/DIR", 1),
    Place("rename", "state/actions/command/RUN/.end.json -> state/actions/command/RUN/end.json", 2),
    Place("fdatasync", "state/actions/copy/copy.db-wal", 8),
    Place("fsync", "state/actions/command/RUN/.begun.json", 1),
)
QUICK = {"tmpfs": _TELLING, "ext4": _TELLING[:3]}


@dataclass(frozen=True)
class Mutant:
    """A daemon, or a disk, that is broken on purpose, and where that must show."""

    name: str = ""
    no_sync: tuple[str, ...] = ()  # syncs of what lies below these do nothing
    program: str = ""  # what is run before the daemon, in its process
    lane: str = ""  # what is run before a process that copies, in it
    places: tuple[Place | None, ...] = (None,)  # where it is hit; None: when all is done
    how: Answer = Answer.CUT

    def code(self) -> str:
        """Return what is run in the daemon's process before it begins."""
        lane = f"{self.lane}\nfrom trigger_daemon.actions._lane import main\nmain()\n"
        return (_OTHER_LANES.format(lane=lane) if self.lane else "") + self.program


_OTHER_LANES = """\
import trigger_daemon.actions._lanes as lanes
made = lanes._Lane.__init__
def make(self, argv, env, *more):
    at = argv.index("-m")
    made(self, [*argv[:at], "-c", {lane!r}, *argv[at + 2 :]], env, *more)
lanes._Lane.__init__ = make
"""

MUTANTS = {
    mutant.name: mutant
    for mutant in (
        Mutant("a disk that only says that it syncs", no_sync=("state", "out")),
        Mutant(
            "a copy that renames before it is durable",
            lane="import trigger_daemon.actions._copy_files as files\n"
            "import trigger_daemon.actions._copy_job as job\n"
            "job.fsync_path = job.fsync_directory = lambda *_: None\n"
            "files.O_DIRECT, files.drop_cached = 0, lambda *_: None  # reading past the cache would write it out\n",
        ),
        Mutant(
            "a journal that does not wait for the disk",
            program="import trigger_daemon.journal as journal\n"
            "opened = journal._open_for_writing\n"
            "def opens(path):\n"
            "    connection, version = opened(path)\n"
            "    connection.execute('PRAGMA synchronous = OFF')\n"
            "    return connection, version\n"
            "journal._open_for_writing = opens\n",
        ),
        Mutant(
            "a program that is started again where nobody knows how it ended",
            program="import trigger_daemon.actions.command as command\n"
            "command._lost = lambda *_: command.Fault('transient', 'not known how it ended')\n",
            places=(Place("fsync", "state/actions/command/RUN/stdout", 1),),
            how=Answer.KILL,
        ),
    )
}


@dataclass
class Outcome:
    """Of one cycle."""

    place: str
    call: str = ""  # where it came to pass; '': the daemon came to its end before that call, and was hit there
    again: str = ""  # where the next life was hit, if it was
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: list[tuple[str, str]] = field(default_factory=list)
    torn: bool = False  # the cut damaged the file system itself: what became of our files says nothing


class _Brisk(Stage):
    """What failed for a moment is tried again soon: a cycle is to take no longer than it must."""

    def rules(self) -> list[dict[str, Any]]:
        return [{**rule, "retry": {"initial": RETRY}} for rule in super().rules()]


class Cycle:
    """A stage, a disk, and one fault."""

    def __init__(
        self, base: Path, disk: Disk | None, nursery: Nursery, *, how: Answer, mutant: Mutant | None = None
    ) -> None:
        self.base, self.disk, self.nursery, self.how = base, disk, nursery, how
        self.mutant = mutant or Mutant()
        if disk is not None:
            disk.renew()  # whatever became of it
        self.stage = _Brisk(base, disk=None if disk is None else disk.path)
        if disk is not None:
            disk.sync()
        self.site = self.stage.site
        self.root = os.path.realpath(self.stage.disk)
        self.calls: list[tuple[str, str]] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._place: Place | None = None
        self._hit: Call | None = None
        self._hit_process = 0
        self._hit_again: Call | None = None
        self.again = 0
        self._lying = tuple(os.path.join(self.root, name) for name in self.mutant.no_sync)
        self._traced: list[Tracer] = []

    # -------------------------------------------------------------- the daemon

    def start(self, ask: Callable[[Call], Answer] | None) -> Tracer:
        """Start the daemon; without `ask` untraced but for its death with this process."""
        self.site.config.write_text(json.dumps(self.site.settings))
        start = self.nursery.daemon(self.site.config, self.site.log, self.mutant.code())
        below = [] if ask is None else [self.site.state, self.site.out]
        tracer = Tracer(start, below, ask or _go_on, cut=None if self.disk is None else self.disk.cut)
        self._traced.append(tracer)
        return tracer

    def ask(self, call: Call) -> Answer:
        what = (call.name, kind_of(call.path, self.root))
        self.calls.append(what)
        self._seen[what] += 1
        if self._hit is None and self._place == (*what, self._seen[what]):
            self._hit, self._hit_process = call, _process_of(call.thread)
            return self.how
        if call.name in SYNCS and call.path.startswith(self._lying or "\0"):
            return Answer.PRETEND
        return Answer.GO

    def ask_again(self, call: Call) -> Answer:
        if call.number < self.again:
            return Answer.GO
        self._hit_again = call
        return Answer.KILL if self.disk is None else Answer.CUT

    # ------------------------------------------------------------------ a cycle

    def run(self, place: Place | None, again: int = 0) -> Outcome:
        """Hit the daemon there (None: when all is done), its next life at call `again` (0: not at all), and judge."""
        began = time.monotonic()
        self._place, self.again = place, again
        outcome = Outcome(str(place or "the end of the work"))
        try:
            self._run(outcome)
        except (AssertionError, sqlite3.Error) as error:  # it did not come to an end, or left no journal to read
            words = f"{type(error).__name__}: {error}"
            parts = (words[:WORDS_MAX], self._open_runs(), words[WORDS_MAX:][-WORDS_MAX:])
            outcome.violations.append(" ... ".join(filter(None, parts)))
        finally:
            self.close()
        if outcome.violations and self.disk is not None and self.disk.errors():
            outcome.violations, outcome.torn = [], True
        if self._hit is not None:
            outcome.call = f"call {self._hit.number}, {self._hit.name} {self._hit.path}"
        if self._hit_again is not None:
            hit = self._hit_again
            outcome.again = f"call {hit.number} of its next life, {hit.name} {hit.path}"
        outcome.seconds = time.monotonic() - began
        outcome.calls = self.calls
        return outcome

    def _run(self, outcome: Outcome) -> None:
        stage = self.stage
        stage.before()
        daemon = self.start(self.ask)
        stage.meanwhile()
        self._until(daemon, lambda: daemon.fired.is_set() or self._is_idle(), DONE_S, "it is hit, or all is done")
        alive = self._hit_it(daemon)
        excused = self._begun_only()
        outcome.violations += self._judge(excused, idle=False)

        stage.afterwards()
        if not alive and self.again:
            daemon = self.start(self.ask_again)
            self._until(daemon, lambda: daemon.fired.is_set() or self._is_idle(), DONE_S, "hit again, or all is done")
            alive = not daemon.fired.is_set()
            if not alive:
                self._fall(daemon)
                excused |= self._begun_only()
                outcome.violations += self._judge(excused, idle=False)
        if not alive:
            daemon = self.start(None)
        self._until(daemon, lambda: self._is_heard_of(daemon) and self._is_idle(), DONE_S, "all is done")
        outcome.violations += self._judge(excused, idle=True)
        os.kill(daemon.pid, signal.SIGTERM)
        self.site.until(lambda: daemon.status is not None, STOP_S, "the daemon stops")
        if daemon.fired.is_set():  # the second hit met it while it stopped
            self._fall(daemon)
        elif daemon.status:
            outcome.violations.append(f"stop: the daemon ended with {daemon.status}: {self.site.tail()[-500:]}")
        outcome.violations += self._journal_check()

    def _is_idle(self) -> bool:
        """Say whether all is done, asked twice: a run may begin between the questions that make one answer."""
        return self.stage.is_idle() and self.stage.is_idle()

    def _is_heard_of(self, daemon: Tracer) -> bool:
        """Say whether this life is at work: what former ones did says nothing of it, and it takes no signal yet."""
        beat = self.site.heartbeat()
        return beat is not None and beat["daemon"]["pid"] == daemon.pid

    def _until(self, daemon: Tracer, predicate: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something holds, as long as the daemon lives, or was meant to be hit."""

        def holds() -> bool:
            if daemon.status is not None and not daemon.fired.is_set():
                raise AssertionError(f"the daemon ended by itself with {daemon.status}: {self.site.tail()}")
            try:
                return predicate()
            except (OSError, sqlite3.Error):
                if self.disk is None:
                    raise
                return False  # the power went while we looked

        self.site.until(holds, timeout_s, what)

    def _hit_it(self, daemon: Tracer) -> bool:
        """See the fault through; return whether the daemon itself is still there."""
        if self.how is Answer.KILL_ONE:
            if self._hit is None:
                os.kill(daemon.pid, signal.SIGKILL)
            elif self._hit_process != daemon.pid:
                return daemon.status is None
            self.site.until(lambda: daemon.status is not None, STOP_S, "the killed daemon is gone")
            return False
        if self._hit is None and self.disk is not None:
            self.disk.cut()
        self._fall(daemon)
        return False

    def _fall(self, daemon: Tracer) -> None:
        """All processes end; if the power went, it comes back."""
        daemon.kill()
        daemon.wait(STOP_S)
        if self.disk is not None:
            self.disk.again()

    def _begun_only(self) -> set[int]:
        """Return the runs of programs that were begun and of whose end nothing is known: a person must look."""
        runs = set()
        for begun in (self.site.state / "actions" / "command").glob("*-*/begun.json"):
            if not begun.with_name("end.json").exists():
                runs.add(int(begun.parent.name.partition("-")[0]))
        return runs

    def _open_runs(self) -> str:
        """Return what the journal says of the runs that did not come to an end."""
        question = "SELECT id, state, because, error, attempts FROM run WHERE final = 0"
        try:
            return "; ".join(" ".join(map(str, row)) for row in self.site.ask(question))
        except (OSError, sqlite3.Error) as error:
            return f"the journal cannot be read: {error}"

    def _judge(self, excused: set[int], *, idle: bool) -> list[str]:
        def may_be_held(taken: Taken) -> bool:
            return taken.rule == "work" and taken.run in excused and taken.state == "HELD"

        when = "when all was done" if idle else "at once"
        return [f"{law} ({when}): {what}" for law, what in self.stage.judge(idle=idle, may_be_held=may_be_held)]

    def _journal_check(self) -> list[str]:
        """Ask `trigger-daemon journal check`."""
        from trigger_daemon import cli  # here: an import of some weight, which the harness alone does not need

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.run(["journal", "check", "--config", str(self.site.config)])
        return [] if code == 0 else [f"journal check: exit {code}: {said.getvalue()}"]

    def close(self) -> None:
        for tracer in self._traced:
            tracer.kill()
        for tracer in self._traced:
            tracer.wait(STOP_S)
        self.stage.close()


def _go_on(call: Call) -> Answer:
    return Answer.GO


def _process_of(thread: int) -> int:
    """Return the process of a thread; of one that is gone, itself."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return thread
    return int(re.search(r"^Tgid:\s*(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]


# ---------------------------------------------------------------------- nursery


class Nursery:
    """A process that has imported the daemon's modules, and forks a daemon when asked: half of a start is imports.

    What it forks runs `serve` as any daemon does, and starts its own children
    from the beginning. Every test with `Site.start` starts the whole program.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            code = f"import sys; sys.path.append({_ROOT!r}); from tests.prove import sweep; sweep.nursery_main()"
            self._process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=theirs.fileno())

    def daemon(self, config: Path, log: Path, code: str) -> Callable[[int], int]:
        """Return what a `Tracer` starts."""

        def start(gate: int) -> int:
            order = json.dumps({"config": str(config), "log": str(log), "code": code}).encode()
            socket.send_fds(self._socket, [order], [gate])
            answer = self._socket.recv(64)
            if not answer:
                raise OSError("the process that forks daemons has ended")
            return int(answer)

        return start

    def close(self) -> None:
        self._socket.close()
        self._process.wait(STOP_S)


def nursery_main() -> None:
    """Fork daemons until nobody asks for more. The main program of a nursery's process; the children return from it."""
    disks.die_with_parent()
    orders = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for module in ("cli.serve", "daemon", "actions.copy", "actions.command", "hints.inotify"):
        importlib.import_module(f"trigger_daemon.{module}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1 << 16, 1)
        if not order:
            return
        child = os.fork()
        if child:
            orders.send(str(child).encode())
            os.close(descriptors[0])
            continue
        break
    orders.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = json.loads(order)
    pass_gate(descriptors[0])
    log = os.open(told["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["trigger-daemon", "serve", "--config", told["config"]]
    exec(told["code"], {})
    importlib.import_module("trigger_daemon.cli").main()


# ------------------------------------------------------------------------ lanes


@dataclass
class Spec:
    """What one lane has to do."""

    kind: str  # tmpfs, ext4, xfs
    work: str
    seed: int
    budget_s: float
    lane: int = 0
    lanes: int = 1
    places: Sequence[Place] = ()  # these; else all that are worth it in a first run
    mutants: Sequence[str] = ()  # these are hit, each where it says, instead of the daemon


def lane_main() -> None:
    """Do what a `Spec` says, a JSON object a line on stdout. The main program of a lane's process."""
    disks.die_with_parent()
    spec = Spec(**json.loads(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed is no record
    for record in lane(spec):
        out.write(json.dumps(record) + "\n")


def lane(spec: Spec) -> Iterator[dict[str, Any]]:
    """Run cycles until all places are done or the time is over; yield a record of the plan and one of each cycle."""
    end = time.monotonic() + spec.budget_s
    work = Path(spec.work)
    disk = None
    if spec.kind != "tmpfs":
        disks.private_mounts()
        disk = Disk(spec.kind, work)
    hows = [Answer.CUT] if disk else [Answer.KILL, Answer.KILL_ONE]
    nursery = Nursery()
    turn = 0

    def cycle(place: Place | None, how: Answer, mutant: Mutant | None = None, again: int = 0) -> dict[str, Any]:
        nonlocal turn
        turn += 1
        base = work / f"{spec.kind}-{spec.lane}-{turn}"
        base.mkdir()
        try:
            outcome = Cycle(base, disk, nursery, how=how, mutant=mutant).run(place, again)
        finally:
            shutil.rmtree(base)
        return {"how": how.name, "mutant": mutant and mutant.name, **vars(outcome)}

    try:
        if spec.mutants:
            for mutant in map(MUTANTS.__getitem__, spec.mutants):
                for place in mutant.places:
                    yield cycle(place, mutant.how, mutant)
            return
        if spec.places:
            mine = [Place(*place) for place in spec.places][spec.lane :: spec.lanes]
        else:
            first = cycle(None, hows[0])  # it is hit only when all is done, and shows what calls there are
            calls = first.pop("calls")
            yield first
            places, passed = plan(calls, spec.seed)
            mine = [place for place in places if zlib.crc32(str(place).encode()) % spec.lanes == spec.lane]
            yield {"run": len(calls), "planned": len(mine), "passed": sum(passed.values())}
        left: Counter[str] = Counter()
        rng = random.Random(f"{spec.seed} {spec.lane}")
        for number, place in enumerate(mine):
            if time.monotonic() > end:
                left[f"{place.name} {place.file}"] += 1
                continue
            again = rng.randrange(AGAIN_CALLS) + 1 if number // len(hows) % 2 else 0
            record = cycle(place, hows[(number + spec.seed) % len(hows)], again=again)
            del record["calls"]
            yield record
        if left:
            yield {"left": left}
    finally:
        nursery.close()
        if disk is not None:
            disk.close()


def run_lanes(specs: Sequence[Spec], told: Callable[[Mapping[str, Any]], None]) -> list[str]:
    """Run lanes side by side and hand on what they say; return what went wrong with the lanes themselves."""
    code = f"import sys; sys.path.append({_ROOT!r}); from tests.prove import sweep; sweep.lane_main()"
    lanes: dict[int, subprocess.Popen[bytes]] = {}
    broken: list[str] = []
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for spec in specs:
            Path(spec.work).mkdir(parents=True, exist_ok=True)
            errors = stack.enter_context((Path(spec.work) / "errors").open("w+b"))
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, json.dumps(vars(spec))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            stack.callback(_end, process)
            assert process.stdout is not None
            stack.enter_context(process.stdout)
            selector.register(process.stdout, selectors.EVENT_READ, (spec, process, errors, bytearray()))
            lanes[process.pid] = process
        end = time.monotonic() + max(spec.budget_s for spec in specs) + GRACE_S
        while selector.get_map():
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready:
                broken.append("a lane did not come to its end")
                break
            for key, _ in ready:
                spec, process, errors, rest = key.data
                data = os.read(key.fd, 1 << 16)
                rest += data
                *lines, tail = bytes(rest).split(b"\n")
                rest[:] = tail
                for line in lines:
                    told({"lane": spec.lane, "kind": spec.kind, **json.loads(line)})
                if data:
                    continue
                selector.unregister(key.fileobj)
                if process.wait(STOP_S):
                    errors.seek(0)
                    words = errors.read().decode(errors="replace")[-2_000:]
                    broken.append(f"lane {spec.lane} of {spec.kind} ended with {process.returncode}: {words}")
    return broken


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


# ------------------------------------------------------------------------- part


@dataclass
class Tally:
    """What the lanes of one kind of disk have said."""

    kind: str
    tell: Callable[[str], None]
    cycles: int = 0
    reached: int = 0
    again: int = 0
    seconds: float = 0.0
    calls: int = 0
    planned: int = 0
    passed: int = 0
    torn: int = 0
    left: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    table: dict[str, Counter[str]] = field(default_factory=dict)

    def take(self, record: Mapping[str, Any]) -> None:
        if "planned" in record:
            self.calls = max(self.calls, record["run"])
            self.planned += record["planned"]
            self.passed = max(self.passed, record["passed"])
            return
        if "left" in record:
            self.left.update(record["left"])
            return
        if record.get("torn"):
            self.torn += 1
            return
        self.cycles += 1
        self.reached += bool(record["call"])
        self.again += bool(record["again"])
        self.seconds += record["seconds"]
        what = re.sub(r" no\. \d+$", "", record["place"]) if record["call"] else "the end of the work"
        row = self.table.setdefault(what, Counter())
        row[_title(self.kind)] += 1
        row["violations"] += len(record["violations"])
        for words in record["violations"]:
            call = "; ".join(filter(None, [record["call"] or "hit when all was done", record["again"]]))
            place = f"{self.kind}, {record['how']} at {record['place']} ({call})"
            if len(self.violations) < RECORDED_MAX:
                self.violations.append(f"{place}: {words}")
            self.tell(f"VIOLATION {place}: {words}")
        if self.cycles % 20 == 0:
            self.tell(f"{self.kind}: {self.cycles} of {self.planned}, {self.seconds / self.cycles:.1f} s each")

    def figures(self) -> dict[str, int | float | str]:
        what = _title(self.kind)
        return {
            what: self.cycles + self.again,
            f"{what}: of these in the life after a first one": self.again,
            f"{what}: not reached, and hit when all was done": self.cycles - self.reached,
            f"{what}: calls in one run": self.calls,
            f"{what}: places planned": self.planned,
            f"{what}: writes amid equal ones, passed over": self.passed,
            f"{what}: damaged the file system itself, not judged": self.torn,
            f"{what}: seconds each": round(self.seconds / max(self.cycles, 1), 2),
        }

    def not_done(self) -> list[str]:
        if not self.left:
            return []
        kinds = ", ".join(f"{count} {call}" for call, count in self.left.most_common(8))
        return [f"{_title(self.kind)}: no time for {self.left.total()} of {self.planned} places: {kinds}"]


def run(
    *, quick: bool, seed: int, work: Path, tell: Callable[[str], None], budgets: Mapping[str, float] | None = None
) -> Result:
    """Sweep kills on tmpfs, and power cuts on ext4 and xfs; `budgets`: seconds for some of these only."""
    if not SUPPORTED:
        return Result("sweep", not_done=[UNSUPPORTED])
    figures: dict[str, int | float | str] = {}
    violations: list[str] = []
    not_done: list[str] = []
    table: dict[str, Counter[str]] = {}
    for kind, budget_s in (budgets or BUDGET_S).items():
        if quick and kind not in QUICK:
            continue
        reason = disks.missing(kind) if kind != "tmpfs" else ""
        if reason:
            not_done.append(f"power cuts on {reason}")
            continue
        what, began = _title(kind), time.monotonic()
        if not quick:
            caught, broken = sweep_mutants(kind, work)
            violations += [f"{what}: nobody noticed {name}" for name, words in caught.items() if not (words or broken)]
            not_done += [f"{what}, broken daemons: {words}" for words in broken]
            figures[f"{what}: broken daemons noticed"] = f"{sum(map(bool, caught.values()))} of {len(caught)}"
            budget_s -= time.monotonic() - began
        tally, broken = _sweep(kind, QUICK_S if quick else budget_s, quick=quick, seed=seed, work=work, tell=tell)
        violations += tally.violations
        not_done += [f"{what}: {words}" for words in broken] + tally.not_done()
        figures |= tally.figures()
        for call, counts in tally.table.items():
            table.setdefault(call, Counter()).update(counts)
        tell(f"{what}: {tally.cycles + tally.again}, {len(tally.violations)} violations")
    columns = [*map(_title, BUDGET_S), "violations"]
    rows = [{"call": call} | {name: str(counts[name]) for name in columns} for call, counts in sorted(table.items())]
    return Result("sweep", figures, violations, not_done, rows)


def _title(kind: str) -> str:
    return "kills" if kind == "tmpfs" else f"power cuts on {kind}"


def _sweep(
    kind: str, budget_s: float, *, quick: bool, seed: int, work: Path, tell: Callable[[str], None]
) -> tuple[Tally, list[str]]:
    """Run all lanes of one kind; return what they said, and what went wrong with them."""
    tally = Tally(kind, tell)
    few = QUICK[kind] if quick else ()
    specs = [
        Spec(kind, str(work / f"{kind}-{number}"), seed, budget_s, lane=number, lanes=LANES, places=few)
        for number in range(LANES)
    ]
    try:
        return tally, run_lanes(specs, tally.take)
    finally:
        for spec in specs:
            shutil.rmtree(spec.work, ignore_errors=True)


def sweep_mutants(kind: str, work: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Return what the oracle says of each mutant that such a disk shows, and what went wrong with the lane."""
    names = [name for name, mutant in MUTANTS.items() if (mutant.how is Answer.CUT) == (kind != "tmpfs")]
    found: dict[str, list[str]] = {name: [] for name in names}
    spec = Spec(kind, str(work / f"{kind}-mutants"), 1, QUICK_S, mutants=names)
    try:
        return found, run_lanes([spec], lambda record: found[record["mutant"]].extend(record["violations"]))
    finally:
        shutil.rmtree(spec.work, ignore_errors=True)
