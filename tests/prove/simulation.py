"""Thousands of histories from a seed: the real engine, journal and executor on a simulated disk, clock and provider.

One history is one seed. Everything that could happen in any order happens in an
order drawn from it, in simulated time and in one thread at a time, so that a
history that breaks a promise breaks it again: `python -m tests.prove.simulation
--seed N -v` prints it. The loop around the parts does what `daemon.Life` does:
step all, commit once, then carry out.

The judges know nothing of the engine. They read what the simulated disk and the
simulated provider kept for themselves, and the rows of the journal. An engine
with one deliberate bug for each law must be found out (`MUTANTS`).
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.prove.results import Result
from trigger_daemon import actions, failpoints
from trigger_daemon.core import model
from trigger_daemon.core.assembly import FRESH_S, Assembly
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.grammar import Option
from trigger_daemon.core.model import Fault, RunState, Scope, State, join, split
from trigger_daemon.core.patterns import Matcher
from trigger_daemon.core.rules import After, Batch, CloseOn, Complete, Retry, Rule, With
from trigger_daemon.core.runs import Runs
from trigger_daemon.core.settle import Settling
from trigger_daemon.errors import JournalError, JournalFull, JournalIo
from trigger_daemon.executor import Executor, Providers
from trigger_daemon.journal import ClaimReader, Journal
from trigger_daemon.probe import Judged
from trigger_daemon.reader import faults_of, members_of

DATA, EPU = "/data", "/epu"
QUIET_S = 10.0
WHOLE_BYTES = 20  # what the check of the rule `checked` asks for
RUNS_MAX = 4
DAY_S = 86_400.0
EPOCH = 1_800_000_000.0

HISTORIES, QUICK_HISTORIES = 4_000, 60
BUDGET_S, QUICK_BUDGET_S = 270.0, 12.0  # of one core, for the histories; the mutants come on top
BUSY = 1.5  # so many times as long, at most, where others work on the same machine
TOLD_MAX = 5  # broken histories of one law that are told in full
MUTANT_HISTORIES = 400  # a bug that hides so long is not found
CALM_ROUNDS = 80  # of CALM_ROUND_S, after the last fault: more than every wait of every rule
CALM_ROUND_S = 60.0
STILL_S = 400.0  # and then, after one more crash, nothing may happen any more
SPINS_MAX = 5_000  # rounds of the loop in one instant

HUNG_S = 100.0
COMMIT_AGAIN_S = 1.0  # as the daemon's
RESTART_S = 2.0
CHECK_EVERY_S = 5.0
SWEEP_EVERY_S, SWEEP_FULL_S = 30.0, 120.0

# Where the process ends, by the first words of a moment's name; '' is everywhere.
PLACES = ("", "between two s", "before the commit", "after the commit", "between two e", "before a ", "after a ")

_RECORDS = frozenset(model.RECORDS)

Version = tuple[int, int]


# -------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Shape:
    """A rule set, and what its rules promise, in words of our own."""

    rules: tuple[Rule, ...]
    companions: str = ""  # the root in which every file has one
    markers: bool = False


FILES = re.compile(r"([ab])/([^/.]+)\.tif")
MATCH = ("{chip}/{n}.tif",)


def rule(name: str = "r", action: str = "take", **keys: Any) -> Rule:
    complete = {"quiescence_s": QUIET_S, **keys.pop("complete", {})}
    batch = keys.get("batch")
    to = f"/{name}/{{chip}}" if batch is None or batch.group_by else f"/{name}"
    keys = {"existing": "process", "retry": Retry(5.0, 60.0, 900.0), "options": {"to": to}, **keys}
    return Rule(name=name, watch=DATA, match=MATCH, action=action, complete=Complete(**complete), **keys)


def _with(root: str, missing: Any) -> dict[str, Any]:
    return {"companions": (With("{chip}/{n}.xml", root, wait_s=60.0, missing=missing),)}


CHIP = ("chip",)
SHAPES = {
    "single": Shape((rule(),)),
    "prepared": Shape((rule(action="prepare"),)),
    "files": Shape((rule(batch=Batch(files=2, idle_s=40.0)),)),
    "grouped": Shape((rule(action="prepare", batch=Batch(group_by=CHIP, files=3, oldest_waits_s=60.0)),)),
    "expected": Shape((rule(batch=Batch(group_by=CHIP, expect=3, idle_s=200.0)),)),
    "two": Shape((rule(), rule("s", "prepare", batch=Batch(bytes=50, idle_s=30.0), priority=3))),
    "limited": Shape((rule(runs_max=1), rule("s", batch=Batch(files=3, idle_s=60.0), runs_max=2))),
    "after": Shape(
        (
            rule("qc", proof="none", batch=Batch(group_by=CHIP, only_first=1, idle_s=60.0)),
            rule("main", batch=Batch(group_by=CHIP, files=2, idle_s=40.0), after=After("qc", CHIP)),
        )
    ),
    "first": Shape((rule(batch=Batch(group_by=CHIP, only_first=2, idle_s=60.0)),)),
    "go": Shape((rule(complete=_with(DATA, "go"), batch=Batch(files=2, idle_s=40.0)),), companions=DATA),
    "block": Shape((rule(complete=_with(EPU, "block")),), companions=EPU),
    "marker": Shape(
        (rule(batch=Batch(group_by=CHIP, idle_s=900.0, close_on=CloseOn("{chip}/done", quiescence_s=5.0))),),
        markers=True,
    ),
    "daily": Shape((rule(batch=Batch(at=("06:00", "18:00"), idle_s=300.0)),)),
    "checked": Shape((rule(complete={"checks": (("size", {"at_least": WHOLE_BYTES}),)}, batch=Batch(idle_s=30.0)),)),
    "once": Shape((rule(on_rewrite="ignore"),)),
    "asked": Shape((rule(on_rewrite="block", batch=Batch(files=2, idle_s=40.0)),)),
    "new": Shape((rule(existing="ignore", batch=Batch(files=2, idle_s=40.0)),)),
    "unproved": Shape((rule(proof="none", retry=Retry(1.0, 5.0, 60.0)),)),
}


# --------------------------------------------------------------------- time


class Crash(BaseException):
    """The daemon's process ends here. No Exception: nothing of ours may catch it."""


class Killed(BaseException):
    """What a thread of a process that has ended does next."""


@dataclass
class Clock:
    at: float = 1_000.0
    utc_at_zero: float = EPOCH

    def monotonic(self) -> float:
        return self.at

    def utc(self) -> float:
        return self.utc_at_zero + self.at


class Fiber:
    """A thread that runs only while the simulation waits for it: a call that takes its time."""

    _idle: list[Fiber] = []
    _back = threading.Semaphore(0)

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self._work: Callable[[], None] | None = None
        self.finished = True
        self._kill = False
        self._error: BaseException | None = None
        threading.Thread(target=self._loop, name="fiber", daemon=True).start()

    @classmethod
    def of(cls, work: Callable[[], None]) -> Fiber:
        fiber = cls._idle.pop() if cls._idle else cls()
        fiber._work, fiber._kill, fiber.finished, fiber._error = work, False, False, None
        return fiber

    def go_on(self) -> None:
        """Let it run until it pauses or ends. Raises what it raised."""
        if self.finished:
            return
        self._go.release()
        self._back.acquire()
        if self.finished:
            self._idle.append(self)
            if self._error is not None:
                raise self._error

    def kill(self) -> None:
        self._kill = True
        self.go_on()

    def pause(self) -> None:
        """Wait; called by its own thread."""
        self._back.release()
        self._go.acquire()
        if self._kill:
            raise Killed

    def _loop(self) -> None:
        while True:
            self._go.acquire()
            try:
                assert self._work is not None
                if not self._kill:
                    self._work()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001  told to the thread that let it run
                self._error = error
            self._work = None
            self.finished = True
            self._back.release()


# --------------------------------------------------------------------- disk


class Disk:
    """What stands where, and since when; kept for the judges."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.files: dict[str, dict[str, State]] = {DATA: {}, EPU: {}}
        self.history: dict[tuple[str, str], list[tuple[float, State | None]]] = {}
        self.away: dict[str, str] = {}  # root -> health
        self.unreadable: set[tuple[str, str]] = set()
        self._serial = 0

    def state(self, root: str, path: str) -> State | None:
        return self.files[root].get(path)

    def version(self, root: str, path: str) -> Version | None:
        state = self.files[root].get(path)
        return state[:2] if state else None

    def write(self, root: str, path: str, size: int) -> None:
        """Give a file a new version, that it never had; its mtime says anything."""
        self._serial += 1
        had = {state[:2] for _, state in self.history.get((root, path), ()) if state}
        dice = self._world.dice
        stamp = self._serial * 1_000
        while dice.random() < 0.15 or (size, stamp) in had:
            stamp = dice.choice([0, -5_000, 7, 2**63 + 1, 10**25, 10**18, self._serial])
            if (size, stamp) in had:
                stamp = self._serial
                size += (size, stamp) in had
                break
        old = self.files[root].get(path)
        self._set(root, path, (size, stamp, self._serial, old[3] if old else self._serial))

    def touch(self, root: str, path: str) -> None:
        """Change what is no part of the version."""
        if state := self.files[root].get(path):
            self._serial += 1
            self._set(root, path, (state[0], state[1], self._serial, state[3]))

    def rename(self, root: str, path: str, to: str) -> None:
        if state := self.files[root].get(path):
            self.remove(root, path)
            self._set(root, to, state)

    def put(self, root: str, path: str, state: State) -> None:
        """Put a file back that was taken away, unless another has come; its ctime tells."""
        if path not in self.files[root]:
            self._serial += 1
            self._set(root, path, (state[0], state[1], self._serial, state[3]))

    def remove(self, root: str, path: str) -> None:
        if self.files[root].pop(path, None):
            self.history[(root, path)].append((self._world.clock.at, None))

    def _set(self, root: str, path: str, state: State) -> None:
        self.files[root][path] = state
        self.history.setdefault((root, path), []).append((self._world.clock.at, state))

    def was_away(self, root: str, path: str) -> bool:
        """Say whether what stands was taken away meanwhile, and put back as the same version."""
        steps = self.history[(root, path)]
        first = next(n for n, (_, s) in enumerate(steps) if s and steps[-1][1] and s[:2] == steps[-1][1][:2])
        return any(state is None for _, state in steps[first:])

    def stands(self, root: str, path: str) -> Iterator[tuple[float, float, State]]:
        """Yield from when until when a path was in which state."""
        steps = self.history.get((root, path), [])
        for (since, state), (until, _) in zip(steps, [*steps[1:], (math.inf, None)], strict=True):
            if state is not None:
                yield since, until, state


# ----------------------------------------------------------------- provider


@dataclass
class Attempt:
    """One that the provider has taken."""

    run: int
    attempt: int
    rule: str
    files: tuple[actions.File, ...]
    serial: int
    outcome: str
    fault: Fault | None
    status: str = "active"
    ended: bool = False
    told: bool = False  # that it has ended, in an answer
    ignores_cancel: bool = False
    moved: dict[tuple[str, str], Version] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)

    @property
    def key(self) -> tuple[int, int]:
        return self.run, self.attempt

    @property
    def handle(self) -> dict[str, int]:
        return {"n": self.serial}


KINDS = ("transient", "transient", "transient", "permanent", "person")


class Provider:
    """What the world outside does with our attempts; it goes on while the daemon is down.

    It keeps the contract of an action: who repeats an attempt gets the same
    handle, and what it has refused it refuses for ever. Everything else fails.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.refused: dict[tuple[int, int], Fault] = {}
        self.asked: dict[tuple[int, int], Any] = {}  # as what each attempt was first asked for
        self.issued: dict[str, tuple[int, int]] = {}
        self.there: dict[tuple[str, str], tuple[Version, int]] = {}  # rule, path -> version, run
        self.proofs: dict[tuple[int, int], tuple[dict[str, tuple[int, Any]], frozenset[str]]] = {}
        self.down: set[str] = set()
        self.silent = False
        self.nudges: dict[tuple[int, int], Callable[[int, int], None]] = {}

    def action(self, name: str) -> type:
        """Return the class of an action, as the registry does."""
        return type("Action", (SimAction,), {"provider": self, "PREPARES": name == "prepare", "LEAVES_OUT": True})

    # ------------------------------------------------------------------ calls

    def prepare(self, request: actions.Request) -> Any:
        world = self.world
        world.moment("before a prepare")
        self._fails("prepare")
        if world.strikes("prepare refused", 0.06):
            raise actions.Refused(self._fault())
        number = f"s{len(self.issued) + 1}"
        self.issued[number] = (request.run, request.attempt)
        world.moment("after a prepare")
        self._fails("prepare answer lost")
        return {"id": number}

    def start(self, request: actions.Request, prepared: Any, *, prepares: bool) -> Any:
        world, key = self.world, (request.run, request.attempt)
        world.moment("before a start")
        world.note(f"start {key} {[f.path for f in request.files]}")
        wish = (request.rule, request.files, dict(request.options), prepared)
        if self.asked.setdefault(key, wish) != wish:
            world.breaks("repeated", f"attempt {key} was repeated with another request")
        if prepares and self.issued.get((prepared or {}).get("id", "")) != key:
            world.breaks("repeated", f"attempt {key} came with {prepared}, which was given for another one")
        if fault := self.refused.get(key):
            raise actions.Refused(fault)
        if key not in self.attempts:
            world.judge_start(request, prepared)
            self._fails("start lost")
            if request.options["to"] in self.down:
                self._refuse(key, Fault("transient", "not mounted", scope=Scope.DESTINATION))
            if world.strikes("start refused", 0.08):
                self._refuse(key, self._fault())
            self._take(request)
            world.moment("after a start")
        else:
            world.counts["starts repeated"] += 1
        self._fails("start answer lost")
        return self.attempts[key].handle

    def find(self, request: actions.Request) -> Any:
        self.world.moment("before a find")
        self._fails("find")
        known = self.attempts.get((request.run, request.attempt))
        return known.handle if known else None

    def poll(self, request: actions.Request, handle: Any) -> actions.Progress:
        world = self.world
        world.moment("before a poll")
        if self.silent:
            world.counts["fault: unreachable"] += 1
            raise actions.Unknown("no route to the provider")
        self._fails("poll")
        attempt = self._known(request, handle)
        again = world.dice.choice([0.5, 5.0, 20.0])
        if not attempt.ended:
            return actions.Progress(attempt.status, attempt.status, bytes_done=1, again_in_s=again)  # type: ignore[arg-type]
        attempt.told = True
        world.moment("after a poll")
        if attempt.outcome == "succeeded":
            return actions.Progress("succeeded", "moved", changed=tuple(attempt.changed))
        return actions.Progress(attempt.outcome, "no more", "a hint", attempt.fault)  # type: ignore[arg-type]

    def cancel(self, request: actions.Request, handle: Any) -> None:
        self.world.moment("before a cancel")
        self._fails("cancel")
        attempt = self._known(request, handle)
        if not attempt.ended and not attempt.ignores_cancel:
            self.world.later(self.world.dice.uniform(0, 20), lambda: self._end(attempt, "cancelled"))

    def verify(self, request: actions.Request, handle: Any) -> Any:
        world = self.world
        world.moment("before a verify")
        self._fails("verify")
        attempt = self._known(request, handle)
        if attempt.outcome != "succeeded":
            world.breaks("verified", f"run {request.run} is verified, though the provider said {attempt.outcome}")
        if world.strikes("verify unproven", 0.06):
            return actions.Unproven(self._fault())
        if attempt.bad:
            world.counts["fault: differs"] += 1
            return actions.Differs(dict.fromkeys(attempt.bad, "another digest"), tuple(attempt.changed))
        files = {join_file(f): f for f in request.files}
        members = [
            {"path": f.path, "size": f.size, "mtime_ns": str(f.mtime_ns), "digest": f"d{f.size}", "to": "there"}
            for place, f in files.items()
            if place in attempt.moved
        ]
        kept = {m["path"]: (m["size"], m["mtime_ns"]) for m in members}
        self.proofs[attempt.key] = (kept, frozenset(attempt.changed))
        world.moment("after a verify")
        return actions.Proof(tuple(members), tuple(attempt.changed))

    # ------------------------------------------------------------------- work

    def _take(self, request: actions.Request) -> None:
        world, dice = self.world, self.world.dice
        outcome = "succeeded"
        fault = None
        if world.strikes("failed after work", 0.12):
            outcome, fault = "failed", self._fault()
        elif world.strikes("cancelled by others", 0.02):
            outcome = "cancelled"
        attempt = Attempt(
            request.run, request.attempt, request.rule, request.files, len(self.attempts) + 1, outcome, fault
        )
        attempt.ignores_cancel = world.strikes("cancel ignored", 0.2)
        self.attempts[attempt.key] = attempt
        takes = dice.choice([0.0, 0.2, 3.0, 3.0, 20.0, 90.0])
        if world.strikes("slow attempt", 0.05):
            takes = 3_000.0
        if world.strikes("inactive", 0.08):
            world.later(takes / 3, lambda: setattr(attempt, "status", "inactive"))
            world.later(takes / 2 + 60, lambda: setattr(attempt, "status", "active"))
            takes += 60
        world.later(takes, lambda: self._end(attempt, outcome))

    def _end(self, attempt: Attempt, outcome: str) -> None:
        world = self.world
        if attempt.ended:
            return
        attempt.ended, attempt.outcome, attempt.status = True, outcome, "active"
        world.note(f"attempt {attempt.key} {outcome}")
        if outcome == "succeeded":
            if any(f.root in world.disk.away for f in attempt.files):
                attempt.outcome, attempt.fault = "failed", Fault("transient", "the source is away")
            else:
                for f in attempt.files:
                    if world.disk.version(f.root, f.path) == (f.size, f.mtime_ns):
                        world.judge_move(attempt, f)
                        attempt.moved[(f.root, f.path)] = (f.size, f.mtime_ns)
                        self.there[(attempt.rule, f.root + f.path)] = ((f.size, f.mtime_ns), attempt.run)
                        if world.strikes("damaged on the way", 0.04):
                            attempt.bad.add(f.path)
                    else:
                        attempt.changed.append(f.path)
        elif outcome == "cancelled":
            attempt.fault = None
        nudge = world.life and world.life.nudge
        if nudge and world.dice.random() < 0.4:
            nudge(*attempt.key)

    def hurry(self) -> None:
        """Bring everything under way to its end soon: faults are over."""
        for attempt in self.attempts.values():
            if not attempt.ended:
                attempt.status, attempt.ignores_cancel = "active", False
                outcome = "succeeded" if attempt.outcome == "failed" else attempt.outcome
                self.world.later(
                    self.world.dice.uniform(1, 30), functools.partial(self._end, attempt, outcome)
                )

    def _known(self, request: actions.Request, handle: Any) -> Attempt:
        attempt = self.attempts.get((request.run, request.attempt))
        if attempt is None or attempt.handle != handle:
            self.world.breaks("repeated", f"run {request.run} is asked about as {handle}, which it never was")
            raise actions.Unknown("nobody knows this handle")
        return attempt

    def _refuse(self, key: tuple[int, int], fault: Fault) -> None:
        self.refused[key] = fault
        raise actions.Refused(fault)

    def _fails(self, what: str) -> None:
        hung, self.world.hung = self.world.hung, False  # a call that hung so long seldom ends well
        if (hung and self.world.dice.random() < 0.5) or self.world.strikes(what, 0.06):
            kind = self.world.dice.choice([actions.Unknown, OSError, ValueError])
            raise kind(what)

    def _fault(self) -> Fault:
        dice = self.world.dice
        kind: Any = dice.choice(KINDS)
        scope = dice.choice(list(Scope))
        self.world.counts[f"fault: {kind}, {scope}"] += 1
        return Fault(
            kind,
            f"{kind} {scope}",
            dice.choice(["", "a hint"]),
            scope,
            dice.choice([None, None, 0.0, 7.0]),
            dice.random() < 0.8,
        )


def join_file(file: actions.File) -> tuple[str, str]:
    return file.root, file.path


class SimAction:
    """The provider's end in one life of the daemon; fulfils `actions.Action`."""

    OPTIONS = {"to": Option("text", "where to", required=True, template=True)}
    VERIFIES = True
    PREPARES = False
    provider: Provider

    def __init__(self, context: actions.Context) -> None:
        self._context = context

    def check(self, options: Mapping[str, Any]) -> None: ...

    def destination(self, options: Mapping[str, Any]) -> str:
        return str(options["to"])

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def prepare(self, request: actions.Request) -> Any:
        return self.provider.prepare(request)

    def start(self, request: actions.Request, prepared: Any) -> Any:
        return self.provider.start(request, prepared, prepares=self.PREPARES)

    def find(self, request: actions.Request, prepared: Any) -> Any:
        return self.provider.find(request)

    def poll(self, request: actions.Request, handle: Any) -> actions.Progress:
        return self.provider.poll(request, handle)

    def cancel(self, request: actions.Request, handle: Any) -> None:
        self.provider.cancel(request, handle)

    def verify(self, request: actions.Request, handle: Any) -> Any:
        return self.provider.verify(request, handle)

    def close(self) -> None: ...


# ----------------------------------------------------------------- executor


@dataclass(eq=False)
class Job:
    task: Callable[[], None]
    deadline_s: float
    late: Callable[[], None] | None
    since: float = 0.0
    lost: bool = False


class Bench:
    """Stands for `workers.Workers`: the same promises, one task at a time, in an order and with delays drawn."""

    def __init__(self, life: Life, size: int) -> None:
        self._life, self._world, self._size = life, life.world, size
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._stopped = False

    def submit(self, task: Callable[[], None], *, deadline_s: float, late: Callable[[], None] | None = None) -> None:
        self._waiting.append(Job(task, deadline_s, late))
        self._world.later(self._world.dice.choice([0.0, 0.0, 0.01, 0.3]), self._begin, self._life)

    def _begin(self) -> None:
        if self._stopped or not self._waiting or sum(not job.lost for job in self._running) >= self._size:
            return
        world = self._world
        at = world.dice.randrange(min(len(self._waiting), 3))
        job = self._waiting[at]
        del self._waiting[at]
        if not world.strikes("slow call", 0.08):
            job.task()
            return
        job.since = world.clock.at
        self._running.append(job)
        world.later(job.deadline_s + world.dice.uniform(0.01, 2.0), self._life.supervise, self._life)
        world.run_apart(lambda: self._run(job), job.deadline_s)

    def _run(self, job: Job) -> None:
        self._world.moment("a call begins")
        job.task()
        self._running.remove(job)
        self._begin_next()

    def _begin_next(self) -> None:
        for _ in range(len(self._waiting)):
            self._world.later(0.0, self._begin, self._life)

    def supervise(self, now: float) -> int:
        for job in list(self._running):
            if not job.lost and now - job.since > job.deadline_s:
                job.lost = True
                self._world.counts["fault: call given up"] += 1
                if job.late:
                    job.late()
        self._begin_next()
        return sum(job.lost for job in self._running)

    def stop(self) -> None:
        self._stopped = True
        self._waiting.clear()


class SimExecutor(Executor):
    """The real one; only that checks read the simulated disk."""

    world: World

    def _run_checks(self, effect: model.Check) -> None:
        world = self.world
        world.moment("before a check")
        state = world.disk.state(self._root_path(effect.root), effect.path)
        if state != effect.state:
            self._checked(effect, Judged(model.Verdict.INCOMPLETE, "it changed while it was being checked"))
        elif state[0] < WHOLE_BYTES:
            self._checked(effect, Judged(model.Verdict.INCOMPLETE, f"{state[0]} of {WHOLE_BYTES} bytes"))
        else:
            self._checked(effect, Judged(model.Verdict.COMPLETE, "whole"))


# ------------------------------------------------------------------ scanner


class Eye:
    """The worker of one root: answers what it was asked in order, and sweeps when nothing is asked."""

    def __init__(self, life: Life, root: int, path: str, rules: Sequence[Rule]) -> None:
        self.root, self.path = root, path
        self._life, self._world, self._disk = life, life.world, life.world.disk
        self._queue: deque[Any] = deque()
        self._busy = False
        self._told = ""
        self._believed = True
        self._returning = False
        self._ask, self._ask_full = 0, False
        self._known: dict[str, set[str]] = {}
        self._full_at = self._names_at = -1.0
        self._sweep: Iterator[float] | None = None
        self._wake_at = math.inf
        self._plain: dict[tuple[int, ...], tuple[model.Want, ...]] = {}
        self.use(rules)
        self.check()
        self._wake(0.0)

    def use(self, rules: Sequence[Rule]) -> None:
        self._matcher = Matcher(rules)
        self._full_at = -1.0

    def ask(self, item: Any) -> None:
        if isinstance(item, model.Sweep):
            self._ask = max(self._ask, item.ask)
            self._ask_full |= item.full
        else:
            self._queue.append(item)
        self._wake(self._world.dice.choice([0.0, 0.0, 0.001, 0.2]))

    def overflow(self) -> None:
        """Hints were lost, and that was noticed."""
        self._names_at = -1.0
        self._full_at = min(self._full_at, self._world.clock.at + 5)
        self._wake(0.0)

    # --------------------------------------------------------------- its loop

    def _wake(self, delay: float) -> None:
        at = self._world.clock.at + delay
        if not self._busy and at < self._wake_at:
            self._wake_at = at
            self._world.later(delay, functools.partial(self._woken, at), self._life)

    def _woken(self, at: float) -> None:
        if at == self._wake_at and not self._busy:
            self._wake_at = math.inf
            self._turn()

    def _turn(self) -> None:
        """Do one thing after the other; a step that takes time is gone on with later."""
        self._busy = True
        if self._queue:
            steps = self._serve(self._queue.popleft())
        elif self._sweep is not None or (self._believed and self._due() <= self._world.clock.at):
            if self._sweep is None:
                self._sweep = self._walk()
            delay = next(self._sweep, None)
            if delay is None:
                self._sweep = None
            self._world.later(delay or 0.0, self._turn, self._life)
            return
        else:
            self._busy = False
            if self._believed:
                self._wake(max(0.0, self._due() - self._world.clock.at))
            return
        self._go_on(steps)

    def _go_on(self, steps: Iterator[float]) -> None:
        delay = next(steps, None)
        if delay is None:
            self._turn()
        elif delay:
            self._world.later(delay, functools.partial(self._go_on, steps), self._life)
        else:
            self._go_on(steps)

    def _due(self) -> float:
        if self._ask or self._ask_full:
            return -1.0
        return min(self._full_at, self._names_at)

    # ------------------------------------------------------------------- root

    def check(self) -> bool:
        away = self._disk.away.get(self.path)
        if away:
            self._believed, self._returning = False, True
            self._tell(away, "it is gone")
        elif not self._believed:
            self._believed = True
            self._known = {}
            self._full_at = self._names_at = -1.0
            self._tell("returned", "it is back")
            self._wake(0.0)
        elif not self._told:
            self._tell("ok", "")
        return self._believed

    def _tell(self, health: Any, why: str) -> None:
        if health != self._told:
            self._told = health
            at = self._world.clock.at
            self._life.post(model.RootChanged(self.root, health, why, "look at the mount" if why else "", "none", at))

    # ------------------------------------------------------------------ looks

    def _serve(self, item: Any) -> Iterator[float]:
        match item:
            case model.Mark():
                as_of, _ = self._life.claims.names(self.root, "", ())
                self._life.post(model.Marked(self.root, as_of, self._world.clock.at))
            case model.Look(_, directory, names):
                yield from self._look(directory, names, "deadline", "none")
            case (directory, name, signal):
                if self._believed and self._matcher.directory(directory).wants(name):
                    yield from self._look(directory, (name,), "hint", signal)

    def _look(self, directory: str, names: Sequence[str], cause: Any, signal: Any) -> Iterator[float]:
        world, began = self._world, self._world.clock.at
        takes = world.dice.choice([0.5, 3.0, 14.0]) if world.strikes("slow look", 0.04) else 0.0
        share = world.dice.choice([0.0, 0.5, 1.0])
        yield takes * share
        if not self.check():
            if cause == "deadline":
                self._unreadable(directory, names, "root lost")
            return
        seen, failed = self._lstat(directory, names)
        yield takes * (1 - share)
        present = [name for name, state in seen if state is not None or cause == "deadline"]
        if failed:
            self._unreadable(directory, failed, "Input/output error")
        if not present:
            return
        rows: list[model.Row] = []
        as_of = -1
        claims: Mapping[str, Any] = {}
        if cause == "deadline":
            as_of, claims = self._life.joined(self._life.claims.names(self.root, directory, present))
        ids_of = self._matcher.directory(directory).wants
        for name, state in seen:
            if state is not None or cause == "deadline":
                rows.append((name, state, self._wants(ids_of(name), state, claims.get(name, ()))))
        self._life.post(model.Seen(self.root, directory, rows, began, world.clock.at, cause, signal, as_of))

    def _lstat(self, directory: str, names: Iterable[str]) -> tuple[list[tuple[str, State | None]], list[str]]:
        seen, failed = [], []
        for name in names:
            path = join(directory, name)
            if {(self.path, path), (self.path, directory)} & self._disk.unreadable:
                failed.append(name)
            else:
                seen.append((name, self._disk.state(self.path, path)))
        return seen, failed

    def _unreadable(self, directory: str, names: Iterable[str], why: str) -> None:
        self._life.post(model.Unreadable(self.root, directory, tuple(names), why, self._world.clock.at))

    def _wants(self, ids: tuple[int, ...], state: State | None, claims: Sequence[Any]) -> tuple[model.Want, ...]:
        """Return the rules that have not claimed this version, each with its newest other batch."""
        if not claims:
            if ids not in self._plain:
                self._plain[ids] = tuple((number, 0) for number in ids)
            return self._plain[ids]
        wants = []
        for number in ids:
            mine = [(batch, (size, mtime_ns)) for by, size, mtime_ns, batch in claims if by == number]
            if state is None or all(version != state[:2] for _, version in mine):
                wants.append((number, max([batch for batch, _ in mine if batch > 0], default=0)))
        return tuple(wants)

    # ----------------------------------------------------------------- sweeps

    def _walk(self) -> Iterator[float]:
        """One sweep, a directory at a time; looks that are asked for meanwhile are answered in between."""
        world, life = self._world, self._life
        if not self.check():
            return
        full = self._ask_full or world.clock.at >= self._full_at
        asked, self._ask, self._ask_full = self._ask, 0, False
        began = world.clock.at
        self._names_at = math.inf
        if full:
            self._full_at = math.inf
        breaks_off = world.strikes("sweep failed", 0.08)
        slow = world.strikes("slow sweep", 0.08)
        faults: list[str] = []
        lacking: list[tuple[str, list[str]]] = []
        files = 0
        by_dir: dict[str, set[str]] = defaultdict(set)
        for path in self._disk.files[self.path]:
            by_dir[split(path)[0]].add(split(path)[1])
        for directory in sorted({*by_dir, *(self._known if full else ())}):
            if not self._believed:
                break
            if breaks_off and world.dice.random() < 0.5:
                faults.append(f"list {directory}: Input/output error")
                yield 0.0
                continue
            listed = {split(p)[1] for p in self._disk.files[self.path] if split(p)[0] == directory}
            names = listed if full else listed - self._known.get(directory, set())
            self._known[directory] = listed
            as_of, claims = life.joined(life.claims.directory(self.root, directory))
            ids_of = self._matcher.directory(directory).wants
            wanted = sorted(name for name in names if ids_of(name))
            files += len(wanted)
            look_began = world.clock.at
            yield world.dice.choice([0.0, 2.0, 9.0]) if slow else 0.0
            if not self.check():
                break
            seen, failed = self._lstat(directory, wanted)
            ended = world.clock.at
            rows = [
                (name, state, wants)
                for name, state in seen
                if state is not None and (wants := self._wants(ids_of(name), state, claims.get(name, ())))
            ]
            if rows:
                life.post(model.Seen(self.root, directory, rows, look_began, ended, "sweep", "none", as_of))
            if failed:
                faults.append(f"lstat {failed[0]}: Input/output error")
                self._unreadable(directory, failed, "Input/output error")
            if gone := sorted(claims.keys() - listed):
                lacking.append((directory, gone))
            yield 0.0
        valid = self.check()
        if not valid:
            faults.append("the root changed during the sweep")
        now = world.clock.at
        life.post(model.Swept(self.root, full, began, now, not faults, files, asked, "; ".join(faults)))
        self._names_at = now + SWEEP_EVERY_S
        if full:
            self._full_at = now + (SWEEP_EVERY_S if faults else SWEEP_FULL_S)
        if valid and full:
            self._returning = False
            self._tell("degraded" if faults else "ok", "; ".join(faults))
            for directory, names_gone in [] if faults else lacking:
                still = [n for n in names_gone if self._disk.state(self.path, join(directory, n)) is None]
                if still:
                    life.post(model.Vanished(self.root, directory, tuple(still), now))


# --------------------------------------------------------------------- life


class SimJournal(Journal):
    """The real one, on a disk that sometimes cannot be read."""

    world: World

    def request(self, batch: int) -> Mapping[str, object]:
        if self.world.strikes("journal unreadable", 0.004):
            raise JournalError(f"{self.path}: the disk failed")
        return super().request(batch)


class Life:
    """One life of the daemon: what `daemon.Life` does, with simulated parts at its edges."""

    def __init__(self, world: World, *, first: bool) -> None:
        self.world = world
        self.alive = True
        self.inbox: deque[model.Fact] = deque()
        self.ready_at = math.inf
        self.dirty = True  # the engine does not know just what the journal says: before its first round, and in one
        self.eyes: dict[int, Eye] = {}
        self.moved_first: set[int] | None = set()  # runs that the first rounds have moved
        clock = world.clock
        SimJournal.world = world
        self.journal = SimJournal.open(world.state, make=first)
        self.providers = Providers(world.state, {}, self.nudge)
        self.providers._class = functools.cache(world.provider.action)  # type: ignore[method-assign]
        saved = self.journal.load()
        self._root_paths = dict(saved.roots)
        seed = world.dice.getrandbits(48)
        self.engine = Engine(
            host="sim", providers=self.providers, rand=random.Random(seed).random, runs_max=RUNS_MAX
        )
        self.engine.restore(saved, clock.at, clock.utc())
        self.executor = type("Executor", (SimExecutor,), {"world": world})(
            journal=self.journal,
            providers=self.providers,
            post=self.post,
            root_path=self._root_paths.__getitem__,
            clock=clock,
            workers=lambda name, size, monotonic: Bench(self, size),
        )
        self.claims = ClaimReader(self.journal.path)
        self.post(self._offer(world.shape.rules if saved.rules_source else ()))
        self.post(self._offer(world.shape.rules))

    def _offer(self, rules: tuple[Rule, ...]) -> model.RulesOffered:
        numbers = self.journal.rule_ids([one.name for one in rules]) if rules else {}
        numbered = tuple(_numbered(one, numbers[one.name]) for one in rules)
        paths = {one.watch for one in rules} | {c.root for one in rules for c in one.complete.companions}
        roots = {path: self.journal.root_id(path) for path in sorted(paths)}
        self._root_paths.update({number: path for path, number in roots.items()})
        source = [{"file": one.name, "text": ""} for one in rules]
        return model.RulesOffered(numbered, roots, source, self.world.clock.at)

    # -------------------------------------------------------------- the inbox

    def post(self, fact: model.Fact) -> None:
        if not self.alive:
            return
        if not self.inbox:
            busy = self.world.dice.choice([0.5, 4.0]) if self.world.strikes("busy loop", 0.02) else 0.0
            self.ready_at = self.world.clock.at + busy
        self.inbox.append(fact)

    def nudge(self, run: int, attempt: int) -> None:
        self.executor.nudge(run, attempt)

    def joined(self, found: tuple[int, Any]) -> tuple[int, Any]:
        """Return what was claimed, as a look takes it."""
        return found

    def wake_at(self) -> float:
        deadline = self.engine.next_deadline()
        return min(self.ready_at if self.inbox else math.inf, math.inf if deadline is None else deadline)

    # --------------------------------------------------------------- the loop

    def turn(self) -> None:
        """Take what has come; step, commit, carry out."""
        facts = [*self.inbox, model.Tick(self.world.clock.at, self.world.clock.utc())]
        self.inbox.clear()
        effects: list[model.Effect] = []
        for fact in facts:
            self.world.moment("between two steps")
            self.dirty = True
            effects += self.step(fact)
        self.write_and_carry(effects)
        self.dirty = False

    def step(self, fact: model.Fact) -> list[model.Effect]:
        world = self.world
        world.counts["steps"] += 1
        at = world.clock.at
        if isinstance(fact, model.Seen):
            world.lag_s = max(world.lag_s, at - fact.began)
        try:
            effects = self.engine.step(fact)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the engine's end
            world.breaks("steps", f"{type(fact).__name__}: {type(error).__name__}: {error} {_where(error)}")
            return []
        for effect in effects:
            if isinstance(effect, model.BatchClosed):
                world.closed_at[effect.batch] = at
            elif isinstance(effect, model.BaselineSet):
                world.baseline_at[effect.rule] = at
            elif isinstance(effect, model.RunMoved) and self.moved_first is not None:
                self.moved_first.add(effect.run)
        return effects

    def write_and_carry(self, effects: Sequence[model.Effect]) -> None:
        records = [effect for effect in effects if type(effect) in _RECORDS]
        if records:
            self.world.moment("before the commit")
            self.commit(records)
            self.dirty = False
            self.world.moment("after the commit")
        for effect in effects:
            self.world.moment("between two effects")
            self.carry(effect)

    def commit(self, records: Sequence[model.Effect]) -> None:
        world = self.world
        while True:
            with world.journal_trouble():
                try:
                    self.journal.append(records)
                    world.counts["commits"] += 1
                    return
                except JournalFull:
                    world.counts["fault: journal full"] += 1
                except JournalIo:
                    raise
                except JournalError as error:
                    law = "once" if "again" in error.message else "journal"
                    world.breaks(law, f"it refuses: {error.message}")
                    return
            world.pass_time(COMMIT_AGAIN_S)

    def carry(self, effect: model.Effect) -> None:
        match effect:
            case model.Look():
                if (eye := self.eyes.get(effect.root)) is not None:
                    eye.ask(effect)
            case model.Sweep() | model.Mark():
                if (eye := self.eyes.get(effect.root)) is not None:
                    eye.ask(effect)
            case model.UseRules(rules):
                for path, root in self.engine.roots.items():
                    own = [one for one in rules if one.watch == path]
                    if root not in self.eyes:
                        self.eyes[root] = Eye(self, root, path, own)
                    else:
                        self.eyes[root].use(own)
            case model.LookBack(ask, rule):
                self.post(model.LookedBack(ask, rule, *self.journal.ended_well(rule, 1_000), self.world.clock.at))
            case model.Answer(order, answer):
                self.world.answers[order] = answer
            case model.RunMoved():
                if effect.final:
                    self.executor.finished(effect.run)
                self.world.note(f"run {effect.run} {effect.from_state} -> {effect.to_state}: {effect.because}")
            case model.BatchClosed():
                self.world.note(f"batch {effect.batch}: {[m.path for m in effect.members]} {effect.reason}")
            case model.Kept("paused", value):
                self.providers.is_paused = bool(value)
            case (
                model.Check()
                | model.Prepare()
                | model.Start()
                | model.Find()
                | model.Poll()
                | model.Cancel()
                | model.Verify()
            ):
                self.executor.carry(effect)

    def supervise(self) -> None:
        self.executor.supervise(self.world.clock.at)

    # -------------------------------------------------------------- its end

    def end(self) -> None:
        """End in order, after an I/O error: what providers were asked goes on, and nobody listens."""
        self.alive = False
        self.claims.close()
        self.executor.stop()
        self.providers.close()
        self.journal.close()

    def crash(self, to: Path) -> None:
        """The process is gone. What its files hold at this instant is all that stays."""
        self.alive = False
        to.mkdir()
        for file in ("journal.db", "journal.db-wal", "journal.made"):
            if (self.world.state / file).exists():
                shutil.copyfile(self.world.state / file, to / file)
        self.claims.close()
        self.journal._disconnect()
        self.journal._daemon_lock.release()


def _numbered(one: Rule, number: int) -> Rule:
    return Rule(**{**{name: getattr(one, name) for name in one.__slots__}, "id": number})


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(last.filename).name}:{last.lineno})"


# -------------------------------------------------------------------- world


class World:
    """One history."""

    def __init__(self, seed: int, work: Path, *, verbose: bool = False, life: type[Life] = Life) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self.verbose = verbose
        self.lines: list[str] = []
        self.closed_at: dict[int, float] = {}
        self.baseline_at: dict[int, float] = {}
        self.answers: dict[int, Mapping[str, Any]] = {}
        self.lag_s = 0.0
        self.calm = False
        self.hung = False  # the call that goes on now has hung for long
        self.kind = self.dice.choice(sorted(SHAPES))
        self.shape = SHAPES[self.kind]
        self.disk = Disk(self)
        self.provider = Provider(self)
        self.life: Life | None = None
        self._life_type = life
        self._work = work
        self._states = 0
        self.state = work / "state0"
        self._heap: list[tuple[float, int, Life | None, Callable[[], object]]] = []
        self._serial = 0
        self._order = 0
        self._fiber: Fiber | None = None
        self._fibers: dict[Fiber, float] = {}  # calls that take their time -> their deadline in seconds
        self._crash_in = -1  # so many moments of this kind
        self._crash_where = ""
        self._crashed_at = ""
        self._full_until = 0.0
        self._io: str = ""
        self._before: dict[str, Any] | None = None
        self._sql: sqlite3.Connection | None = None
        self._sql_of: Path | None = None
        # How much goes wrong in this history: some are nearly well, so that rare things meet a working daemon.
        self.trouble = self.dice.choice([0.0, 0.3, 1.0, 1.0, 2.0])
        self._heard = self.dice.choice([0.0, 0.5, 0.95])

    # ------------------------------------------------------------------ words

    def note(self, words: str) -> None:
        if self.verbose:
            self.lines.append(f"{self.clock.at - 1_000:10.3f}  {words}")

    def breaks(self, law: str, words: str) -> None:
        """Note a broken promise; the history ends soon."""
        self.broken.append(f"{law}: {words}")
        self.note(f"BROKEN {law}: {words}")

    def strikes(self, what: str, chance: float) -> bool:
        """Say whether a fault happens here, and count it."""
        if self.calm or self.dice.random() >= chance * self.trouble:
            return False
        self.counts[f"fault: {what}"] += 1
        return True

    # ------------------------------------------------------------------- time

    def later(self, delay: float, act: Callable[[], object], life: Life | None = None) -> None:
        """Act in a while; what belongs to a life is forgotten with it."""
        self._serial += 1
        heapq.heappush(self._heap, (self.clock.at + delay, self._serial, life, act))

    def run_for(self, seconds: float) -> None:
        end = self.clock.at + seconds
        spins, last = 0, -1.0
        while not self.broken:
            due = self._heap[0][0] if self._heap else math.inf
            wake = max(self.life.wake_at(), self.clock.at) if self.life else math.inf
            at = min(due, wake)
            if at > end:
                self.clock.at = max(self.clock.at, end)
                return
            self.clock.at = max(self.clock.at, at)
            spins = spins + 1 if self.clock.at - last < 0.01 else 0
            last = self.clock.at
            if spins > 100:  # no clock stands still: an instant that was rounded away comes
                self.clock.at += 1e-6
            if spins > SPINS_MAX:
                self.breaks("steps", "the loop goes round without end")
            try:
                if due <= wake:
                    self._next()
                elif self.life:
                    self.life.turn()
            except Crash:
                self._crash()
            except JournalIo as error:
                self._begin_anew(error)

    def _next(self) -> None:
        _, _, life, act = heapq.heappop(self._heap)
        if life is None or life.alive:
            act()

    def pass_time(self, seconds: float) -> None:
        """Let the world go on while the daemon's loop waits."""
        end = self.clock.at + seconds
        while self._heap and self._heap[0][0] <= end:
            self.clock.at = max(self.clock.at, self._heap[0][0])
            self._next()
        self.clock.at = max(self.clock.at, end)

    # ------------------------------------------------------- threads, crashes

    def run_apart(self, work: Callable[[], None], deadline_s: float) -> None:
        """Run in a thread that may pause."""
        fiber = Fiber.of(work)
        self._fibers[fiber] = deadline_s
        self._go_on(fiber)

    def _go_on(self, fiber: Fiber) -> None:
        if fiber not in self._fibers:
            return
        before, self._fiber = self._fiber, fiber
        try:
            fiber.go_on()
        finally:
            self._fiber = before
            if fiber.finished:
                self._fibers.pop(fiber, None)
        if self._crashed_at:
            raise Crash

    def _kill(self) -> None:
        """The threads of a process go with it, and those of its earlier lives."""
        for fiber in list(self._fibers):
            fiber.kill()
        self._fibers.clear()

    def moment(self, where: str) -> None:
        """A place where the process may end, and where a call may take its time."""
        if self._crash_in >= 0 and where.startswith(self._crash_where):
            self._crash_in -= 1
            if self._crash_in < 0:
                self._crashed_at = where
                if self._fiber is None:
                    raise Crash
                self._fiber.pause()
        fiber = self._fiber
        if fiber is not None and not self.calm and self.dice.random() < 0.5:
            seconds = self.dice.choice([0.5, 5.0, 30.0, 130.0, 300.0, 22_000.0])
            self.later(seconds, functools.partial(self._go_on, fiber))
            self.hung = False
            fiber.pause()
            self.hung = seconds > HUNG_S

    def start(self) -> None:
        """Let the daemon start."""
        first = self._states == 0 and self.life is None and not self.state.exists()
        try:
            self.life = self._life_type(self, first=first)
        except JournalError as error:
            self.breaks("journal", f"it cannot be opened again: {error.message}")
            return
        self.note(f"the daemon starts ({self.kind})")
        if self._before is not None:
            self._judge_restored(self._before)
            self._before = None

    def _crash(self) -> None:
        life, where = self.life, self._crashed_at
        assert life is not None
        self.counts["crashes"] += 1
        self.counts[f"crash: {where}"] += 1
        self.note(f"CRASH {where}")
        self._crashed_at, self._crash_in, self._fiber = "", -1, None
        self._before = None if life.dirty else _memory(life.engine)
        self._states += 1
        to = self._work / f"state{self._states}"
        self._kill()
        life.crash(to)
        old, self.state, self.life = self.state, to, None
        self._forget_sql()
        shutil.rmtree(old, ignore_errors=True)
        self.later(0.0 if self.calm else self.dice.choice([0.0, 1.0, 30.0, 120.0]), self.start)

    def _begin_anew(self, error: JournalError) -> None:
        """As the daemon does after an I/O error: everything from what the journal says."""
        life = self.life
        assert life is not None
        self.note(f"the journal broke: {error.message.rpartition(': ')[2]}")
        life.end()
        self.life = None
        self._before = None  # what was to be committed may be in it, or not
        self._forget_sql()
        self.later(RESTART_S, self.start)

    @contextmanager
    def journal_trouble(self) -> Iterator[None]:
        """Let the next commit fail if that was drawn."""
        if self.clock.at < self._full_until:
            words = "journal.commit:enospc"
        elif self._io:
            words, self._io = f"{self._io}:eio", ""
            self.counts[f"fault: {words}"] += 1
        else:
            yield
            return
        failpoints.plan(words)
        try:
            yield
        finally:
            failpoints.plan("")

    # ------------------------------------------------------------ the journal

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read the journal's rows, past the product's own reader."""
        if self._sql is None or self._sql_of != self.state:
            self._forget_sql()
            self._sql = sqlite3.connect(f"file:{self.state}/journal.db?mode=ro", uri=True, check_same_thread=False)
            self._sql_of = self.state
        return self._sql.execute(question, values).fetchall()

    def _forget_sql(self) -> None:
        if self._sql is not None:
            self._sql.close()
        self._sql = None

    # ----------------------------------------------------------------- judges

    def judge_start(self, request: actions.Request, prepared: Any) -> None:
        """Ask, when the provider is about to take an attempt, whether it may be asked for at all."""
        key = (request.run, request.attempt)
        rows = self.ask("SELECT prepared FROM attempt WHERE run = ? AND attempt = ?", *key)
        if not rows or json.loads(rows[0][0] or "null") != prepared:
            self.breaks("written first", f"attempt {key} is started, and the journal knows {rows} of it")
        live = [a for a in self.provider.attempts.values() if not a.ended]
        for other in self.provider.attempts.values():
            if other.run == request.run and not (other.ended and other.told):
                self.breaks("twice", f"attempt {key} begins, and nobody said that {other.key} has ended")
        mine = {join_file(f): (f.size, f.mtime_ns) for f in request.files if not f.role}
        for other in live:
            if other.rule == request.rule and other.run != request.run and not self._resent({other.run, request.run}):
                for f in other.files:
                    if not f.role and mine.get(join_file(f), (f.size, f.mtime_ns)) != (f.size, f.mtime_ns):
                        self.breaks("order", f"runs {other.run} and {request.run} write {f.path} at once")
        limit = next((one.runs_max for one in self.shape.rules if one.name == request.rule), None)
        still = {run for (run,) in self.ask("SELECT id FROM run WHERE state = 'INACTIVE'")}
        at_work = [a for a in live if a.run not in still]  # what stands still leaves its place to other rules
        if len(at_work) >= RUNS_MAX or (limit and sum(a.rule == request.rule for a in live) >= limit):
            self.breaks("limits", f"attempt {key} begins beside {[a.key for a in live]}")

    def judge_move(self, attempt: Attempt, file: actions.File) -> None:
        """Ask whether this version may be written over what lies there."""
        before = self.provider.there.get((attempt.rule, file.root + file.path))
        if before is None or file.role or self._resent({before[1], attempt.run}):
            return
        version, run = before
        if run != attempt.run and version == (file.size, file.mtime_ns):
            self.breaks("twice", f"runs {run} and {attempt.run} both moved {file.path} {version}")
        # By when each stood last: one that was put back comes after what was there meanwhile.
        order = [state[:2] for _, state in reversed(self.disk.history[join_file(file)]) if state]
        if order.index(version) < order.index((file.size, file.mtime_ns)):
            self.breaks("order", f"run {attempt.run} put an older {file.path} over that of run {run}")

    def _resent(self, runs: Iterable[int]) -> bool:
        return any(
            _text(reason).startswith("sent again")
            for run in runs
            for (reason,) in self.ask("SELECT reason FROM batch WHERE id = ?", run)
        )

    def _judge_restored(self, before: Mapping[str, Any]) -> None:
        """Compare what the engine knew, when all of it was committed, with what it knows after a crash."""
        life = self.life
        assert life is not None
        for fact in [life.inbox.popleft() for _ in range(len(life.inbox))]:
            life.write_and_carry(life.step(fact))
        moved, life.moved_first = life.moved_first or set(), None
        life.dirty = False
        now = _memory(life.engine)
        for what, was in before.items():
            if what == "runs":
                runs = {n: w for n, w in was.items() if n not in moved}
                others = {n: w for n, w in now["runs"].items() if n not in moved}
                if runs != others:
                    odd = next(n for n in {*runs, *others} if runs.get(n) != others.get(n))
                    self.breaks("same", f"run {odd} was {runs.get(odd)} and is {others.get(odd)}")
            elif what in ("tally", "alarms") and moved:
                continue
            elif was != now[what]:
                self.breaks("same", f"{what} were {was} and are {now[what]}")

    # ---------------------------------------------------------------- history

    def run(self) -> list[str]:
        """Live through the history; return the promises that were broken."""
        try:
            self._begin()
            self._troubled()
            self._become_calm()
            self._stand_still()
            if not self.broken:
                self.broken += Judge(self).all()
        finally:
            self._close()
        return self.broken

    def _close(self) -> None:
        failpoints.plan("")
        self.calm = True
        self._crash_in, self._crashed_at = -1, ""
        self._kill()
        self._forget_sql()
        if self.life:
            self.life.alive = False
            self.life.claims.close()
            self.life.journal._disconnect()
            self.life.journal._daemon_lock.release()

    def _begin(self) -> None:
        for _ in range(self.dice.randrange(4)):
            self._write()
        self.start()

    def _troubled(self) -> None:
        acts = self.dice.randrange(8, 36)
        for _ in range(acts):
            if self.broken:
                return
            self.dice.choices(_ACTS, _WEIGHTS)[0](self)
            self.run_for(self.dice.choice([0.0, 0.1, 1.0, 4.0, 9.0, 11.0, 30.0, 70.0, 140.0]))

    # -------------------------------------------------------------- what happens

    def _names(self) -> str:
        name = self.dice.choice(["1", "2", "3", "4", "\udcff\udce9"])
        return f"{self.dice.choice('ab')}/{name}.tif"

    def hint(self, root: str, path: str, signal: str = "none") -> None:
        """The kernel says something about a file, perhaps; the daemon hears it, perhaps."""
        if self.dice.random() >= self._heard or root in self.disk.away or self.life is None:
            return
        for eye in self.life.eyes.values():
            if eye.path == root:
                eye.ask((*split(path), signal))

    def _write(self) -> None:
        path = self._names()
        steps = self.dice.choice([1, 1, 1, 2, 4])
        pauses = self.dice.choice([0.2, 3.0, 8.0, 12.0])
        self.note(f"write {path} in {steps}")
        for n in range(steps):
            size = self.dice.randrange(1, 60)
            if steps > 1 and self.kind != "checked":
                size = 5 * n + 1
            signal = "close" if n == steps - 1 else "none"
            self.later(n * pauses, functools.partial(self._written, DATA, path, size, signal))

    def _written(self, root: str, path: str, size: int, signal: str) -> None:
        if root in self.disk.away:
            return
        self.disk.write(root, path, size)
        self.hint(root, path, signal)

    def _rewrite(self) -> None:
        if here := sorted(self.disk.files[DATA]):
            path = self.dice.choice(here)
            self.note(f"rewrite {path}")
            self._written(DATA, path, self.dice.randrange(1, 60), "close")

    def _touch(self) -> None:
        if here := sorted(self.disk.files[DATA]):
            self.disk.touch(DATA, self.dice.choice(here))

    def _rename(self) -> None:
        self._serial += 1
        path = f"{self.dice.choice('ab')}/r{self._serial}"
        self.note(f"rename into {path}.tif")
        self.disk.write(DATA, f"{path}.tmp", self.dice.randrange(20, 60))
        self.disk.rename(DATA, f"{path}.tmp", f"{path}.tif")
        self.hint(DATA, f"{path}.tif", "rename")

    def _remove(self) -> None:
        if here := sorted(self.disk.files[DATA]):
            path = self.dice.choice(here)
            self.note(f"remove {path}")
            self.disk.remove(DATA, path)
            self.hint(DATA, path)

    def _put_back(self) -> None:
        """Take a file away and put it back as it was."""
        if here := sorted(self.disk.files[DATA]):
            path = self.dice.choice(here)
            self.note(f"take away {path}, for a while")
            state = self.disk.files[DATA][path]
            self.disk.remove(DATA, path)
            self.later(self.dice.choice([0.5, 8.0, 40.0]), lambda: self.disk.put(DATA, path, state))

    def _companion(self) -> None:
        if self.shape.companions:
            self._written(self.shape.companions, self._names().replace(".tif", ".xml"), self.dice.randrange(9), "close")

    def _marker(self) -> None:
        if self.shape.markers:
            path = f"{self.dice.choice('ab')}/done"
            self.note(f"marker {path}")
            self._written(DATA, path, 1, "close")

    def _root(self) -> None:
        root = self.dice.choice([DATA, DATA, EPU])
        if root in self.disk.away:
            del self.disk.away[root]
        elif self.trouble:
            self.disk.away[root] = self.dice.choice(["lost", "suspect"])
            self.counts["fault: root away"] += 1
        self.note(f"roots away: {self.disk.away}")
        if self.life:
            for eye in self.life.eyes.values():
                self.later(self.dice.uniform(0, CHECK_EVERY_S), eye.check, self.life)

    def _eio(self) -> None:
        path = self.dice.choice([self._names(), "a", "b", self._names().replace(".tif", ".xml")])
        root = self.dice.choice([DATA, EPU])
        self.disk.unreadable ^= {(root, path)}
        self.counts["fault: unreadable"] += 1

    def _overflow(self) -> None:
        self.counts["fault: hints lost"] += 1
        if self.life:
            for eye in self.life.eyes.values():
                eye.overflow()

    def _set_clock(self) -> None:
        self.clock.utc_at_zero += self.dice.choice([-DAY_S, DAY_S, -3_600.0, 7.0, -0.5])
        self.counts["fault: clock set"] += 1

    def _arm_crash(self) -> None:
        if self.trouble:
            self._crash_where = self.dice.choice(PLACES)
            self._crash_in = int(self.dice.expovariate(1 / (3 if self._crash_where else 12)))

    def _fill(self) -> None:
        if self.trouble:
            self._full_until = self.clock.at + self.dice.choice([0.5, 5.0, 60.0])

    def _io_error(self) -> None:
        if self.trouble:
            self._io = self.dice.choice(["journal.commit", "journal.committed"])

    def _silence(self) -> None:
        self.provider.silent = not self.provider.silent and self.trouble > 0

    def _take_down(self) -> None:
        for one in self.shape.rules:
            for chip in "ab":
                self.provider.down ^= {str(one.options["to"]).replace("{chip}", chip)} if self.trouble else set()

    def order(self, verb: str, **args: Any) -> int:
        """A person wants something."""
        self._order += 1
        self.note(f"order {verb} {args}")
        self.counts["orders"] += 1
        if self.life:
            self.life.post(model.Order(self._order, verb, args, "operator", "", self.clock.at))
        return self._order

    def _order_runs(self) -> None:
        runs = [n for (n,) in self.ask("SELECT id FROM run WHERE final = 0 ORDER BY id")] if self.life else []
        if runs:
            verb = self.dice.choice(["retry", "retry", "hold", "cancel", "abandon"])
            some = self.dice.sample(runs, self.dice.randint(1, min(2, len(runs))))
            if verb == "abandon":
                self.order("runs.hold", ids=some)
            self.order(f"runs.{verb}", ids=some)

    def _order_pause(self) -> None:
        verb = self.dice.choice(["pause", "resume"])
        if self.dice.random() < 0.5:
            self.order(verb)
        else:
            self.order(f"rules.{verb}", rule=self.dice.choice(self.shape.rules).name)

    def _order_files(self) -> None:
        self.order(f"files.{self.dice.choice(['go', 'go', 'skip'])}", path=f"{DATA}/{self._names()}")

    def _order_close(self) -> None:
        self.order("batches.close", rule=self.dice.choice(self.shape.rules).name, captures={})

    def _order_resend(self) -> None:
        """Send a standing version again that was dealt with, and whose run has ended, as the command line does."""
        if self.life is None:
            return
        path = self._names()
        version = self.disk.version(DATA, path)
        directory, name = split(path)
        for one in self.shape.rules:
            rows = self.ask(
                "SELECT claim.size, claim.mtime_ns FROM claim JOIN dir ON dir.id = claim.dir"
                " JOIN rule ON rule.id = claim.rule LEFT JOIN run ON run.id = claim.batch"
                " WHERE rule.name = ? AND dir.path = ? AND claim.name = ? AND coalesce(run.final, 1)",
                one.name, os.fsencode(directory), os.fsencode(name),
            )  # fmt: skip
            if version in [(size, _number(mtime_ns)) for size, mtime_ns in rows]:
                file = {"rule": one.name, "dir": directory, "name": name, "size": version[0], "mtime_ns": version[1]}
                self.order("files.resend", files=[file])

    # ------------------------------------------------------------------- calm

    def _become_calm(self) -> None:
        """All faults end, and people do what they are asked for; in the end nothing is left to do."""
        self.note("calm")
        self.calm = True
        self._crash_in, self._full_until, self._io = -1, 0.0, ""
        self.disk.away.clear()
        self.disk.unreadable.clear()
        self.provider.silent = False
        self.provider.down.clear()
        self.provider.hurry()
        for fiber, deadline_s in list(self._fibers.items()):
            if deadline_s > CALM_ROUNDS * CALM_ROUND_S or self.dice.random() < 0.7:  # the others never come back
                self.later(self.dice.uniform(0, 10), functools.partial(self._go_on, fiber))
        for eye in self.life.eyes.values() if self.life else ():
            self.later(1.0, eye.check, self.life)
        self.run_for(45)  # what was about to be written or put back is there
        while self.life is None and not self.broken:
            self.run_for(10)
        for path in sorted(self.disk.files[DATA]):
            if self.kind == "checked" and self.disk.files[DATA][path][0] < WHOLE_BYTES:
                self.disk.write(DATA, path, WHOLE_BYTES + 1)
            if self.shape.companions and path.endswith(".tif"):
                self.disk.write(self.shape.companions, path.replace(".tif", ".xml"), 5)
        for number in range(CALM_ROUNDS):
            if self.shape.markers and number in (2, 8):
                for chip in "ab":
                    self.disk.write(DATA, f"{chip}/done", 1)
            if number == 0:
                self.order("resume")
                for one in self.shape.rules:
                    self.order("rules.resume", rule=one.name)
            held = [n for (n,) in self.ask("SELECT id FROM run WHERE state = 'HELD'")]
            if held:
                self._judge_words()
                self.order("runs.retry", ids=held)
            if self.kind == "asked":
                for _, path in self._unclaimed():
                    self.order("files.go", path=f"{DATA}/{path}")
            if number > 5 and self.kind == "after":
                self._cancel_followers()
            self.run_for(CALM_ROUND_S)
            if self.broken or (self.life and self._done()):
                return

    def _cancel_followers(self) -> None:
        """Runs whose leader was given up wait for ever; a person ends them. If it succeeded, they must not wait."""
        led = {group for (group,) in self.ask(
            "SELECT captures FROM batch JOIN run ON run.id = batch.id JOIN rule ON rule.id = batch.rule"
            " WHERE rule.name = 'qc' AND state IN ('SUCCEEDED', 'VERIFIED') AND final"
        )}  # fmt: skip
        waiting = self.ask(
            "SELECT run.id, captures FROM batch JOIN run ON run.id = batch.id JOIN rule ON rule.id = batch.rule"
            " WHERE rule.name = 'main' AND state = 'PENDING'"
        )
        if given_up := [number for number, group in waiting if group not in led]:
            self.order("runs.cancel", ids=given_up)

    def _judge_words(self) -> None:
        for number, error, hint in self.ask("SELECT id, error, hint FROM run WHERE state = 'HELD'"):
            if not error or not hint:
                self.breaks("ends", f"run {number} is held without a word: {error!r}, {hint!r}")

    def _done(self) -> bool:
        if self.ask("SELECT 1 FROM run WHERE final = 0 LIMIT 1"):
            return False
        return not self._unclaimed() and not self.behind()

    def _unclaimed(self) -> list[tuple[str, str]]:
        """Return rule and path of what stands and was not dealt with."""
        claimed = claims(self)
        return [
            (one.name, path)
            for one in self.shape.rules
            for path, state in sorted(self.disk.files[DATA].items())
            if FILES.fullmatch(path) and (one.name, path, state[:2]) not in claimed
        ]

    def behind(self) -> list[str]:
        """Return the companions that stand and did not travel after all, though their file went without them."""
        if self.kind != "go":
            return []
        went = {
            (role, path)
            for (manifest,) in self.ask("SELECT manifest FROM batch")
            for path, role in [(m.path, m.role) for m in members_of(manifest)]
        }
        own = {path for role, path in went if not role}
        here = [path for path in self.disk.files[DATA] if path.endswith(".xml")]
        return [p for p in here if p.replace(".xml", ".tif") in own and ("companion", p) not in went]

    def _stand_still(self) -> None:
        """One more crash; a daemon with nothing to do does nothing."""
        if self.broken or self.life is None:
            return
        before = self._deeds()
        if not self._done():
            return  # what is missing is told by the judges
        self._crashed_at = "at the end"
        self._crash()
        self.run_for(STILL_S)
        if self.broken:
            return
        after = self._deeds()
        if after != before:
            self.breaks("same", f"after the end: batches, attempts, claims were {before} and are {after}")

    def _deeds(self) -> tuple[Any, ...]:
        counts = [self.ask(f"SELECT count(*) FROM {table}")[0][0] for table in ("batch", "attempt", "claim")]
        return (*counts, len(self.provider.attempts))


_ACTS: list[Callable[[World], None]] = [
    World._write, World._rewrite, World._touch, World._rename, World._remove, World._put_back, World._companion,
    World._marker, World._root, World._eio, World._overflow, World._set_clock, World._arm_crash, World._fill,
    World._io_error, World._silence, World._take_down, World._order_runs, World._order_pause, World._order_files,
    World._order_close, World._order_resend,
]  # fmt: skip
_WEIGHTS = [14, 8, 2, 3, 3, 2, 6, 3, 3, 3, 1, 1, 6, 2, 2, 2, 1, 5, 2, 2, 1, 2]


def _memory(engine: Engine) -> dict[str, Any]:
    """Return what an engine must know after a crash, too."""
    runs = engine.runs
    return {
        "runs": {
            run.id: (
                str(run.state),
                run.attempts,
                run.prepared,
                run.handle,
                run.live,
                run.destination,
                sorted(n for n in run.waits_on if n in runs.open),
            )
            for run in runs.open.values()
        },
        "pauses": (runs.paused_all, sorted(runs.paused_rules)),
        "marks": {key: mark[0] for key, mark in engine.marks.items()},
        "alarms": sorted(engine.alarms.open),
        "tally": {key: tuple(counts) for key, counts in runs.tally.items() if counts[0]},
    }


# ------------------------------------------------------------------- judges


def _number(value: Any) -> int:
    return int(value) if isinstance(value, (bytes, str)) else value


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else value


def claims(world: World) -> dict[tuple[str, str, Version], int]:
    """Return rule, path, version -> batch or code, of the files below the watched root."""
    rows = world.ask(
        "SELECT rule.name, root.path, dir.path, claim.name, size, mtime_ns, batch FROM claim"
        " JOIN dir ON dir.id = claim.dir JOIN root ON root.id = dir.root JOIN rule ON rule.id = claim.rule"
    )
    return {
        (name, join(os.fsdecode(directory), os.fsdecode(file)), (size, _number(mtime_ns))): batch
        for name, root, directory, file, size, mtime_ns, batch in rows
        if os.fsdecode(root) == DATA
    }


@dataclass
class Taken:
    """A batch and its run, as the journal has them in the end."""

    run: int
    rule: str
    group: Mapping[str, str]
    reason: str
    state: str
    final: bool
    because: str
    members: list[tuple[str, str, Version, str, str]]  # root, path, version, role, flag


class Judge:
    """What is asked when all is quiet."""

    def __init__(self, world: World) -> None:
        self.world = world
        roots = {number: os.fsdecode(path) for number, path in world.ask("SELECT id, path FROM root")}
        self.batches = [
            Taken(
                run, name, json.loads(captures), _text(reason), state, bool(final), _text(because),
                [(roots[m.root], m.path, (m.size, m.mtime_ns), m.role, m.flag) for m in members_of(manifest)],
            )
            for run, name, captures, reason, state, final, because, manifest in world.ask(
                "SELECT run.id, rule.name, captures, reason, state, final, because, manifest FROM run"
                " JOIN batch ON batch.id = run.id JOIN rule ON rule.id = batch.rule ORDER BY run.id"
            )
        ]  # fmt: skip
        self.resent = {b.run for b in self.batches if b.reason.startswith("sent again")}
        self.ordered: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
        for verb, args, answer in world.ask("SELECT verb, args, answer FROM ordered ORDER BY id"):
            self.ordered[verb].append((json.loads(args), json.loads(answer)))

    def all(self) -> list[str]:
        found: list[str] = []
        laws = (self.missed, self.put_back, self.early, self.once, self.verified, self.ends, self.groups, self.journal)
        for law in laws:
            found += [f"{law.__name__.replace('_', ' ')}: {words}" for words in law()]
        return found

    def missed(self) -> Iterator[str]:
        """Every version that stands is in a batch that came to its end, or left out by what its rule declares."""
        yield from (words for words, put_back in self._missed() if not put_back)

    def put_back(self) -> Iterator[str]:
        """The same for files that were taken away for a while and put back as they were."""
        yield from (f"{words}; it was taken away and put back" for words, put_back in self._missed() if put_back)

    def _missed(self) -> Iterator[tuple[str, bool]]:
        world = self.world
        yield from ((f"{path} never came after its file", False) for path in world.behind())
        claimed = claims(world)
        proofs = world.provider.proofs
        by_run = {b.run: b for b in self.batches}
        attempts = dict(world.ask("SELECT run, max(attempt) FROM attempt GROUP BY run"))
        ids = {name: number for number, name in world.ask("SELECT id, name FROM rule")}
        for one in world.shape.rules:
            for path, state in world.disk.files[DATA].items():
                if not FILES.fullmatch(path):
                    continue
                about = f"{one.name}: {path} {state[:2]}"
                code = claimed.get((one.name, path, state[:2]))
                put_back = world.disk.was_away(DATA, path)
                if code is None:
                    yield f"{about} is in no batch", False
                elif code <= 0:
                    if not self._left_out(one, path, state, code, ids[one.name]):
                        yield f"{about} was left out, code {code}", False
                else:
                    batch = by_run[code]
                    if batch.state in ("VERIFIED", "SUCCEEDED"):
                        kept, _ = proofs.get((code, attempts.get(code, 0)), ({}, frozenset()))
                        if one.proof == "required" and path not in kept:
                            yield f"{about} is in run {code}, {batch.state}, whose proof leaves it out", put_back
                    elif not self._given_up(batch):
                        yield f"{about} is in run {code}: {batch.state}, {batch.because}", put_back

    def _left_out(self, one: Rule, path: str, state: State, code: int, number: int) -> bool:
        world = self.world
        earlier = [b for b in self.batches if b.rule == one.name and any(m[1] == path for m in b.members)]
        chip = path.partition("/")[0]
        match code:
            case model.CLAIM_BASELINE:
                since = min(at for at, s in world.disk.history[(DATA, path)] if s and s[:2] == state[:2])
                return one.existing == "ignore" and since <= world.baseline_at.get(number, math.inf)
            case model.CLAIM_SKIPPED:
                return any(
                    answer.get("ok") and args["path"] == f"{DATA}/{path}" for args, answer in self.ordered["files.skip"]
                )
            case model.CLAIM_REWRITE_IGNORED:
                return one.on_rewrite == "ignore" and bool(earlier)
            case model.CLAIM_ONLY_FIRST:
                mine = [b for b in self.batches if b.rule == one.name and b.group.get("chip") == chip]
                return bool(one.batch and one.batch.only_first and mine)
        return False

    def _given_up(self, batch: Taken) -> bool:
        verb = {"CANCELLED": "runs.cancel", "ABANDONED": "runs.abandon"}.get(batch.state, "")
        return any(batch.run in answer.get("done", ()) for _, answer in self.ordered[verb])

    def early(self) -> Iterator[str]:
        """What was taken stood there, unchanged for the quiet period by our own clock, when its batch closed."""
        world = self.world
        for batch in self.batches:
            if batch.run in self.resent:
                continue
            closed = world.closed_at[batch.run]
            for root, path, version, role, flag in batch.members:
                stood = [
                    min(until, closed) - since
                    for since, until, state in world.disk.stands(root, path)
                    if state[:2] == version and since <= closed and until >= closed - FRESH_S - world.lag_s
                ]
                about = f"run {batch.run} took {path} {version}"
                if not stood:
                    yield f"{about}, which was not there at {closed - 1_000:.3f}"
                elif max(stood) < QUIET_S - 1e-6:
                    yield f"{about} {max(stood):.3f} s after it was written"
                if world.kind == "checked" and version[0] < WHOLE_BYTES and not flag:
                    yield f"{about}, which its check calls incomplete"
                if role and not world.shape.companions:
                    yield f"{about} as {role}, which the rule does not ask for"

    def once(self) -> Iterator[str]:
        """No version is in two batches of a rule, but where a person has sent it again, or its run left it out."""
        left = {(run, path) for (run, _), one in self.world.provider.attempts.items() for path in one.changed}
        seen: dict[tuple[str, str, Version], int] = {}
        for batch in self.batches:
            for _, path, version, role, _ in batch.members:
                if role or batch.run in self.resent:
                    continue
                first = seen.setdefault((batch.rule, path, version), batch.run)
                seen[batch.rule, path, version] = batch.run
                if first != batch.run and (first, path) not in left:
                    yield f"{path} {version} is in runs {first} and {batch.run}"

    def verified(self) -> Iterator[str]:
        """VERIFIED is what the provider has proved, of just these versions."""
        world = self.world
        attempts = dict(world.ask("SELECT run, max(attempt) FROM attempt GROUP BY run"))
        for batch in self.batches:
            if batch.state != "VERIFIED":
                continue
            kept, changed = world.provider.proofs.get((batch.run, attempts.get(batch.run, 0)), ({}, frozenset()))
            rows = world.ask("SELECT members FROM proof WHERE run = ? ORDER BY attempt DESC LIMIT 1", batch.run)
            written = {m["path"]: (m["size"], m["mtime_ns"]) for m in json.loads(rows[0][0])} if rows else {}
            if not kept or written != kept:
                yield f"run {batch.run} is VERIFIED; proved was {kept}, the journal has {written}"
            for _, path, version, _, _ in batch.members:
                if kept.get(path) != (version[0], str(version[1])) and path not in changed:
                    yield f"run {batch.run} is VERIFIED, and {path} {version} was not proved"

    def ends(self) -> Iterator[str]:
        """No run goes on for ever; SUCCEEDED is an end only without a proof."""
        for batch in self.batches:
            if not batch.final:
                yield f"run {batch.run} is {batch.state} for ever: {batch.because}"
            elif batch.state == "SUCCEEDED" and next(
                one for one in self.world.shape.rules if one.name == batch.rule
            ).proof == "required":
                yield f"run {batch.run} of {batch.rule} ends with SUCCEEDED"
            elif batch.state in ("CANCELLED", "ABANDONED") and not self._given_up(batch):
                yield f"run {batch.run} is {batch.state}, which nobody ordered"

    def groups(self) -> Iterator[str]:
        """A batch holds one group; `only_first` gives a group one batch of at most so many; a companion is there."""
        world = self.world
        first: dict[tuple[str, str], int] = {}
        for batch in self.batches:
            one = next(one for one in world.shape.rules if one.name == batch.rule)
            own = [m for m in batch.members if not m[3]]
            chips = {path.partition("/")[0] for _, path, _, _, _ in batch.members}
            if one.batch and one.batch.group_by and chips != {batch.group["chip"]}:
                yield f"run {batch.run} of group {batch.group} holds {chips}"
            if one.batch and one.batch.only_first and batch.run not in self.resent:
                if len(own) > one.batch.only_first:
                    yield f"run {batch.run} holds {len(own)} files"
                chip = batch.group["chip"]
                if first.setdefault((one.name, chip), batch.run) != batch.run:
                    yield f"only_first took {chip} twice"
            if world.kind == "block" and batch.run not in self.resent:
                there = {path for root, path, _, role, _ in batch.members if role and root == EPU}
                for _, path, _, _, flag in own:
                    if path.replace(".tif", ".xml") not in there and not flag:
                        yield f"run {batch.run} took {path} without its companion"

    def journal(self) -> Iterator[str]:
        """The journal hangs together."""
        self.world.ask("SELECT 1")
        assert self.world._sql is not None
        yield from faults_of(self.world._sql)


# ------------------------------------------------------------------ mutants
# A law, and a bug that breaks it: an engine, executor or loop with one of these must be found out.


class CarriesFirst(Life):
    """Effects are carried out before their records are written."""

    def write_and_carry(self, effects: Sequence[model.Effect]) -> None:
        for effect in effects:
            self.carry(effect)
        self.world.pass_time(0.5)
        super().write_and_carry([effect for effect in effects if type(effect) in _RECORDS])


class JoinsNothing(Life):
    """Looks do not ask what was claimed."""

    def joined(self, found: tuple[int, Any]) -> tuple[int, Any]:
        return found[0], {}


class DropsSeen(Life):
    """What sweeps find is lost."""

    def post(self, fact: model.Fact) -> None:
        if not (isinstance(fact, model.Seen) and fact.cause == "sweep"):
            super().post(fact)


def _forget_attempts() -> Any:
    original = Runs.restore

    def restore(self: Runs, saved: Any, *rest: Any) -> None:
        original(self, [_changed(old, attempt=None, state=RunState.PENDING) for old in saved], *rest)

    return mock.patch.object(Runs, "restore", restore)


def _changed(old: Any, **fields: Any) -> Any:
    return type(old)(**{**{name: getattr(old, name) for name in old.__slots__}, **fields})


def _lost_is_not_started() -> Any:
    def start_unknown(self: Runs, fact: model.StartUnknown) -> None:
        self.not_started(model.NotStarted(fact.run, fact.attempt, Fault("transient", fact.why), fact.at))

    original = Engine.__init__

    def init(self: Engine, **keys: Any) -> None:
        original(self, **keys)
        self._steps[model.StartUnknown] = functools.partial(start_unknown, self.runs)

    return mock.patch.object(Engine, "__init__", init)


def _silence_is_quiet() -> Any:
    def expire(self: Settling, now: float) -> None:
        for member, due in list(self.queue.items()):
            if due <= now:
                del self.queue[member]
                self._quiet(member, now)

    return mock.patch.object(Settling, "expire", expire)


def _no_quiet_period() -> Any:
    original = Settling.__init__

    def init(self: Settling, **keys: Any) -> None:
        original(self, **{**keys, "quiescence_s": 2.0})

    return mock.patch.object(Settling, "__init__", init)


def _success_is_proof() -> Any:
    original = Executor._verify

    def verify(self: Executor, run: int, attempt: int, handle: Any) -> None:
        if self._clock.monotonic() % 3 < 1:
            self._post(model.Proved(run, attempt, [{"path": "?", "size": 0, "mtime_ns": "0"}], self._clock.monotonic()))
        else:
            original(self, run, attempt, handle)

    return mock.patch.object(Executor, "_verify", verify)


def _polls_end_in_silence() -> Any:
    return mock.patch.object(Runs, "_unreachable", lambda self, run, fact: None)


def _hold_without_words() -> Any:
    original = Runs._move

    def move(self: Runs, run: Any, event: Any, because: str, at: float, **fields: Any) -> None:
        if fields.get("error"):
            fields["hint"] = ""
        original(self, run, event, because, at, **fields)

    return mock.patch.object(Runs, "_move", move)


def _miscount() -> Any:
    from trigger_daemon.journal import _Writer

    original = _Writer._count

    def count(self: Any, rule: int, state: str, runs: int, files: int, size: int) -> None:
        if state != "SUPERSEDED":
            original(self, rule, state, runs, files, size)

    return mock.patch.object(_Writer, "_count", count)


def _forget_pauses() -> Any:
    original = Engine.restore

    def restore(self: Engine, saved: Any, at: float, utc: float) -> None:
        kept = {key: value for key, value in saved.kept.items() if not key.startswith("paused")}
        original(self, _changed(saved, kept=kept), at, utc)

    return mock.patch.object(Engine, "restore", restore)


def _versions_at_once() -> Any:
    return mock.patch.object(Runs, "newer_version", lambda self, run_id, path, at: set())


def _no_limits() -> Any:
    def free(self: Runs, run: Any) -> None:
        self.dirty, run.slot = True, False

    return mock.patch.multiple(Runs, _take_slot=lambda self, run: setattr(run, "slot", True), _free_slot=free)


def _prepared_lost() -> Any:
    original = Executor.carry

    def carry(self: Executor, effect: Any) -> None:
        if isinstance(effect, model.Find):
            effect = model.Find(effect.run, effect.attempt, {"id": "s1"})
        original(self, effect)

    return mock.patch.object(Executor, "carry", carry)


def _one_group() -> Any:
    def group_of(self: Assembly, member: Any) -> tuple[str, ...]:
        return ("a",) * len(self.spec.group_by if self.spec else ())

    return mock.patch.object(Assembly, "group_of", group_of)


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug, and the laws that it may break first."""

    law: str
    words: str
    patch: Callable[[], Any] = nullcontext
    life: type[Life] = Life
    kinds: tuple[str, ...] = ()  # histories in which it can show; all without

    def laws(self) -> tuple[str, ...]:
        return tuple(self.law.split(" | "))


MUTANTS = (
    Mutant("missed", "what sweeps find is lost", life=DropsSeen),
    Mutant("early", "no second look when the quiet period ends", _silence_is_quiet),
    Mutant("early", "a quiet period of two seconds", _no_quiet_period),
    Mutant("once", "looks are not joined with claims", life=JoinsNothing),
    Mutant("written first", "effects are carried out before the commit", life=CarriesFirst),
    Mutant("twice | same | journal", "attempts are forgotten at a restart", _forget_attempts),
    Mutant("twice | repeated", "a lost answer counts as not started", _lost_is_not_started),
    Mutant("repeated", "an attempt is looked for as another one", _prepared_lost, kinds=("prepared", "grouped", "two")),
    Mutant("order", "a newer version waits for nothing", _versions_at_once),
    Mutant("limits", "slots are not counted", _no_limits, kinds=("limited", "single", "two")),
    Mutant("verified", "SUCCEEDED is taken for VERIFIED", _success_is_proof),
    Mutant("ends", "a poll without an answer is the last", _polls_end_in_silence),
    Mutant("ends", "held without a hint", _hold_without_words),
    Mutant("groups", "all groups in one batch", _one_group, kinds=("grouped", "expected", "after", "first", "marker")),
    Mutant("same", "pauses are forgotten at a restart", _forget_pauses),
    Mutant("journal", "superseded runs are not counted", _miscount),
)


# -------------------------------------------------------------------- runs


@dataclass
class Told:
    """What came of one history."""

    seed: int
    broken: list[str]
    counts: Counter[str]
    lines: list[str]
    kind: str
    seconds: float


def history(seed: int, work: Path, *, verbose: bool = False, life: type[Life] = Life) -> Told:
    """Live through the history of a seed, below an empty directory that is removed."""
    place = Path(tempfile.mkdtemp(prefix="h", dir=work))
    began = time.perf_counter()
    world = World(seed, place, verbose=verbose, life=life)
    try:
        broken = world.run()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    broken = [words.encode("utf-8", "backslashreplace").decode() for words in broken]
    return Told(seed, broken, world.counts, world.lines, world.kind, time.perf_counter() - began)


def kind_of(seed: int) -> str:
    """Return which rules the history of a seed has."""
    return random.Random(seed).choice(sorted(SHAPES))


def found_out(mutant: Mutant, seeds: Iterable[int], work: Path) -> Told | None:
    """Return the first history that breaks with this bug; None if none does."""
    with mutant.patch():
        for seed in seeds:
            if mutant.kinds and kind_of(seed) not in mutant.kinds:
                continue
            told = history(seed, work, life=mutant.life)
            if told.broken and told.broken[0].partition(":")[0] in mutant.laws():
                return told
    return None


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Live through histories from `seed` on, then let every mutant be found out."""
    began, cpu_began = time.monotonic(), time.process_time()
    wanted, budget_s = (QUICK_HISTORIES, QUICK_BUDGET_S) if quick else (HISTORIES, BUDGET_S)
    counts: Counter[str] = Counter()
    violations: list[str] = []
    by_law: dict[str, list[int]] = defaultdict(list)
    not_done: list[str] = []
    done, slowest = 0, 0.0
    for number in range(seed, seed + wanted):
        told = history(number, work)
        done += 1
        slowest = max(slowest, told.seconds)
        counts += told.counts
        counts[f"rules: {told.kind}"] += 1
        if told.broken:
            words = f"seed {number} ({told.kind}): {told.broken[0]}"
            of_law = by_law[told.broken[0].partition(":")[0]]
            of_law.append(number)
            if len(of_law) <= TOLD_MAX:
                violations.append(words)
            tell(words)
        if done % 500 == 0:
            each_ms = (time.monotonic() - began) / done * 1000
            tell(f"{done} histories, {sum(map(len, by_law.values()))} broken, {each_ms:.0f} ms each")
        if time.process_time() - cpu_began > budget_s or time.monotonic() - began > BUSY * budget_s:
            if done < wanted:
                not_done.append(f"{wanted - done} of {wanted} histories: {budget_s:g} s were over")
            break
    violations += [
        f"{law}: {len(seeds) - TOLD_MAX} more, seeds {', '.join(map(str, seeds[TOLD_MAX : TOLD_MAX + 20]))}"
        for law, seeds in by_law.items()
        if len(seeds) > TOLD_MAX
    ]
    each_s = (time.process_time() - cpu_began) / done
    rows = []
    for mutant in MUTANTS[:: 3 if quick else 1]:
        told_of = found_out(mutant, range(seed, seed + MUTANT_HISTORIES), work)
        if told_of is None:
            violations.append(f"the harness does not notice: {mutant.words} ({mutant.law})")
        rows.append(
            {
                "law": mutant.law,
                "mutant": mutant.words,
                "seed": str(told_of.seed) if told_of else "not found",
                "found": told_of.broken[0] if told_of else "",
            }
        )
        tell(f"{mutant.words}: {rows[-1]['seed']} {rows[-1]['found']}")
    figures: dict[str, int | float | str] = {
        "histories": done,
        "steps": counts["steps"],
        "commits": counts["commits"],
        "crashes": counts["crashes"],
        "broken histories": sum(map(len, by_law.values())),
        "cpu ms a history": round(each_s * 1000, 1),
        "slowest ms": round(slowest * 1000),
        "mutants found": f"{sum(row['seed'] != 'not found' for row in rows)} of {len(rows)}",
        **{name: counts[name] for name in sorted(counts) if ":" in name or name in ("orders", "starts repeated")},
    }
    return Result("simulation", figures, violations, not_done, rows)


def main() -> int:
    """Replay one history, or run many."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--histories", type=int, default=1)
    parser.add_argument("--mutant", type=int, help="with the bug of this number in MUTANTS")
    parser.add_argument("-v", "--verbose", action="store_true")
    given = parser.parse_args()
    mutant = MUTANTS[given.mutant] if given.mutant is not None else Mutant("", "")
    failed = 0
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    counts: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=base) as work, mutant.patch():
        for seed in range(given.seed, given.seed + given.histories):
            told = history(seed, Path(work), verbose=given.verbose, life=mutant.life)
            counts += told.counts
            failed += bool(told.broken)
            for line in told.lines:
                print(line.encode("utf-8", "backslashreplace").decode())
            for words in told.broken:
                print(f"seed {seed} ({told.kind}): {words}")
    print(f"{given.histories} histories, {failed} broken, {time.monotonic() - began:.1f} s")
    if given.verbose:
        print(dict(sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
