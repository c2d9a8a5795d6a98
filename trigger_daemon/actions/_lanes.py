"""The daemon's side of the copying workers: a pool of lanes, fed and watched by one thread.

No call of this module waits for a lane, and the thread never waits for a single
one: pipes are non-blocking, a lane that does not move is killed and left alone
until the kernel lets go of it. Only then has its attempt ended. The rate is not
divided here: each lane is told the whole, and they share it (`_copy_pace`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trigger_daemon.actions import Progress
from trigger_daemon.actions._copy_pace import RULES, Tills
from trigger_daemon.core.model import Fault, Scope

PULSE_S = 0.25  # how often rates, pauses and deadlines are looked at while work goes on
ROOMS_S = 1.0  # how often it is looked what must stay free: that reads the mount table
IDLE_S = 60.0  # a lane without work ends after this; one stays
HUNG_LOOK_S = 1.0  # how often an end that is waited for is asked whether its lane was killed
READ_BYTES = 1 << 16
TILLS = 4_096  # some 100 kB
REPORT_MAX = 1 << 28  # bytes without a line end: no report of ours is so long

Pace = tuple[float | None, bool]


@dataclass(eq=False, slots=True)
class Work:
    """One order, and how it stands. Written by the pool's thread, read by anyone."""

    order: dict[str, Any]
    destination: str
    status: str = "queued"  # queued | running | hung | ended
    files_done: int = 0
    bytes_done: int = 0
    doing: str = ""
    stopped: str = ""  # why it stands still, or does not begin, though nothing is wrong with it
    report: Mapping[str, Any] | None = None
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class _Shared:
    """The tills of this process: pools of all actions draw from the same ones, for rules each from its own."""

    def __init__(self) -> None:
        self.fd = -1
        self._lock = threading.Lock()
        self._taken: set[range] = set()

    def take(self, count: int, directory: str) -> range:
        with self._lock:
            if self.fd < 0:
                self.fd = Tills.make(TILLS, directory)
            first = RULES
            for taken in sorted(self._taken, key=lambda one: one.start):
                if first + count <= taken.start:
                    break
                first = taken.stop
            if first + count > TILLS:
                raise AssertionError("more pools than anybody has actions")
            mine = range(first, first + count)
            self._taken.add(mine)
            return mine

    def give(self, mine: range) -> None:
        with self._lock:
            self._taken.discard(mine)


_SHARED = _Shared()


class _Lane:
    """One worker process."""

    def __init__(self, argv: list[str], env: Mapping[str, str], tills: int) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env=env, start_new_session=True, bufsize=0,
            pass_fds=(tills,),
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.into = self.process.stdin.fileno()
        self.out = self.process.stdout.fileno()
        os.set_blocking(self.into, False)
        os.set_blocking(self.out, False)
        self.unsent = bytearray()
        self.unread = bytearray()
        self.work: Work | None = None
        self.steps = -1
        self.moved_at = 0.0
        self.idle_since = time.monotonic()
        self.pace: Pace = (None, False)
        self.rooms: dict[str, Any] = {}
        self.rule_till = RULES
        self.why_killed = ""

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class Lanes:
    """The pool.

    `pace()` gives the limit for all lanes together, in bytes per second, and
    whether to stand still; `stopped(order)` why this one may not write now,
    `rooms(order)` how much it leaves free. All are asked several times a second, by the pool's thread.
    """

    def __init__(
        self,
        *,
        worker: str = "trigger_daemon.actions._lane",
        state_dir: str,
        most: int,
        deadline_s: float,
        pace: Callable[[], Pace],
        stopped: Callable[[Mapping[str, Any]], str],
        rooms: Callable[[Mapping[str, Any]], dict[str, Any]],
        news: Callable[[Work], None],
        env: Mapping[str, str],
    ) -> None:
        self._rule_tills = _SHARED.take(most + 1, state_dir)  # a lane more than `most`: the one for questions
        self._tills = _SHARED.fd
        self._argv = [
            sys.executable, "-P", "-m", worker, str(os.getpid()), state_dir, str(self._tills),
        ]  # fmt: skip
        self._most = most
        self._deadline_s = deadline_s
        self._pace = pace
        self._stopped = stopped
        self._rooms = rooms
        self._news = news
        self._env = env
        self._queue: deque[Work] = deque()
        self._quick: deque[Work] = deque()  # questions: they do not wait behind copies that take hours
        self._cancels: deque[Work] = deque()
        self._lanes: list[_Lane] = []
        self._dying: list[_Lane] = []
        self._generation = 0
        self._stop = False
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._loop, name="copy-lanes", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        (self._quick if work.order["do"] == "prove" else self._queue).append(work)
        self._wake()

    def cancel(self, work: Work) -> None:
        """Ask for an end; `work` ends as cancelled when all its temporary files are gone."""
        work.cancelled = True
        self._cancels.append(work)
        self._wake()

    def hangs(self, destination: str) -> str:
        """Return what a killed lane still hangs in at this destination, '' if none does."""
        for lane in list(self._dying):
            if lane.work and lane.work.destination == destination and lane.work.status == "hung":
                return lane.why_killed
        return ""

    def close(self) -> None:
        """Kill all lanes; what they did is resumed when the same attempt is started again."""
        self._stop = True
        self._wake()
        self._thread.join(timeout=5.0)

    def pids(self) -> list[int]:
        return [lane.process.pid for lane in list(self._lanes)]

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_in, b"x")

    # -------------------------------------------------------------- the pool's thread

    def _loop(self) -> None:
        pulse_at = rooms_at = 0.0
        while not self._stop:
            for key, mask in self._selector.select(self._patience()):
                if key.data is None:
                    os.read(self._wake_out, 4096)
                    continue
                lane: _Lane = key.data
                if mask & selectors.EVENT_READ and key.fd == lane.out:
                    self._hear(lane)
                elif key.fd == lane.into:
                    self._send(lane)
            self._do_cancels()
            self._assign()
            now = time.monotonic()
            if now >= pulse_at:
                pulse_at = now + PULSE_S
                for lane in self._lanes:
                    self._tell_pace(lane)
                self._supervise(now)
            if now >= rooms_at:
                rooms_at = now + ROOMS_S
                for lane in self._lanes:
                    self._tell_rooms(lane)
        for lane in [*self._lanes, *self._dying]:
            lane.process.kill()
        until = time.monotonic() + 1.0
        for lane in [*self._lanes, *self._dying]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                lane.process.wait(max(0.0, until - time.monotonic()))
            lane.close()
        self._selector.close()
        os.close(self._wake_out)
        os.close(self._wake_in)
        _SHARED.give(self._rule_tills)

    def _patience(self) -> float | None:
        """Return how long the thread may sleep: idle, it wakes only to let a lane go."""
        if self._dying or self._queue or any(lane.work for lane in self._lanes):
            return PULSE_S
        return IDLE_S if len(self._lanes) > 1 else None

    def _assign(self) -> None:
        while self._quick or self._queue:
            queue = self._quick or self._queue
            work = self._next(queue)
            if work is None:
                return
            try:
                lane = self._free_lane(self._most + (queue is self._quick))
            except OSError as fault:
                queue.remove(work)
                self._end(work, _failed("batch", f"cannot start a copying worker: {fault}"))
                return
            if lane is None:
                return
            queue.remove(work)
            if work.cancelled:
                work.order["do"] = "clean"
            lane.work, lane.steps, lane.moved_at, lane.pace = work, -1, time.monotonic(), (self._pace()[0], False)
            work.status = "running"
            self._choose_till(lane, work)
            self._put(lane, {"pace": lane.pace})
            self._tell_pace(lane)
            lane.rooms = self._rooms(work.order)
            about = {"rooms": lane.rooms, "rule_till": lane.rule_till, "generation": self._generation}
            self._put(lane, {**work.order, **about})
            self._send(lane)

    def _next(self, queue: deque[Work]) -> Work | None:
        """Return the first that may write: those that may not would only take the lanes of others."""
        whys: dict[tuple[str, bool], str] = {}
        for work in list(queue):
            key = (work.destination, self._writes(work))
            if key not in whys:
                whys[key] = self._why_stopped(work)
            work.stopped = whys[key]
            if not work.stopped:
                return work
        return None

    def _choose_till(self, lane: _Lane, work: Work) -> None:
        """Let all runs of a rule draw from one till: of these there are as many as lanes."""
        others = [other for other in self._lanes if other is not lane and other.work]
        used = {other.work.order["rule"]: other.rule_till for other in others if other.work}
        free = (till for till in self._rule_tills if till not in used.values())
        lane.rule_till = used.get(work.order["rule"]) or next(free)

    def _free_lane(self, most: int) -> _Lane | None:
        """Return a lane without work, a new one if there are fewer than `most`. Raises OSError."""
        for lane in reversed(self._lanes):  # the last used is warm
            if lane.work is None:
                return lane
        if len(self._lanes) >= most:
            return None
        lane = _Lane(self._argv, self._env, self._tills)
        self._selector.register(lane.out, selectors.EVENT_READ, lane)
        self._lanes.append(lane)
        return lane

    def _do_cancels(self) -> None:
        while self._cancels:
            work = self._cancels.popleft()
            for lane in self._lanes:
                if lane.work is work:
                    self._put(lane, {"cancel": [work.order["run"], work.order["attempt"]]})
                    self._send(lane)

    def _put(self, lane: _Lane, message: Mapping[str, Any]) -> None:
        lane.unsent += json.dumps(message).encode() + b"\n"

    def _send(self, lane: _Lane) -> None:
        """Send what the pipe takes; the rest when it takes more."""
        try:
            while lane.unsent:
                n = os.write(lane.into, lane.unsent[:READ_BYTES])
                del lane.unsent[:n]
        except BlockingIOError:
            pass
        except OSError:
            lane.unsent.clear()  # it has ended: its output says so
        registered = lane.into in self._selector.get_map()
        if lane.unsent and not registered:
            self._selector.register(lane.into, selectors.EVENT_WRITE, lane)
        elif not lane.unsent and registered:
            self._selector.unregister(lane.into)

    def _hear(self, lane: _Lane) -> None:
        try:
            data = os.read(lane.out, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(lane, lane.why_killed)
            return
        lane.unread += data
        if b"\n" not in data:
            if len(lane.unread) > REPORT_MAX:
                self._kill(lane, "sends nonsense")
            return
        *lines, rest = bytes(lane.unread).split(b"\n")
        lane.unread = bytearray(rest)
        for line in lines:
            self._take(lane, json.loads(line))

    def _take(self, lane: _Lane, message: dict[str, Any]) -> None:
        work = lane.work
        if work is None:
            return
        name = [work.order["run"], work.order["attempt"]]
        if "end" in message:
            if message["end"] == name:
                lane.work = None
                lane.idle_since = time.monotonic()
                if message["left"]:
                    self._generation += 1
                self._end(work, message)
            return
        if message["at"][:2] != name:
            return
        steps, work.files_done, work.bytes_done = message["at"][2:]
        work.doing = message["doing"]
        if steps != lane.steps:
            lane.steps = steps
            lane.moved_at = time.monotonic()

    def _end(self, work: Work, report: Mapping[str, Any]) -> None:
        work.report = report
        work.files_done = max(work.files_done, report.get("files", 0))
        work.bytes_done = max(work.bytes_done, report.get("bytes", 0))
        work.status = "ended"
        work.ended.set()
        self._news(work)

    # ---------------------------------------------------------------------- watching

    def _writes(self, work: Work) -> bool:
        return work.order["do"] == "copy" and not work.cancelled

    def _why_stopped(self, work: Work) -> str:
        """Return why a copy may not write now; what only reads, or removes what it left, goes on."""
        return self._stopped(work.order) if self._writes(work) else ""

    def _tell_pace(self, lane: _Lane) -> None:
        """Tell a lane its pace if that is another one now."""
        if lane.work is None:
            return
        limit, paused = self._pace()
        lane.work.stopped = self._why_stopped(lane.work)
        pace = (limit, paused or bool(lane.work.stopped))
        if lane.pace != pace:
            lane.pace = pace
            self._put(lane, {"pace": pace})
            self._send(lane)

    def _tell_rooms(self, lane: _Lane) -> None:
        """Tell a lane what it leaves free if that is something else now."""
        if lane.work is not None and (rooms := self._rooms(lane.work.order)) != lane.rooms:
            lane.rooms = rooms
            self._put(lane, {"rooms": rooms, "of": [lane.work.order["run"], lane.work.order["attempt"]]})
            self._send(lane)

    def _supervise(self, now: float) -> None:
        for lane in list(self._lanes):
            if lane.work is None:
                if now - lane.idle_since > IDLE_S and len(self._lanes) > 1:
                    lane.process.kill()
                    self._lost(lane, "")
                continue
            # Syncing waits for whatever else the file system has to write.
            patience = self._deadline_s * (5 if lane.work.doing.startswith("syncing") else 1)
            if now - lane.moved_at > patience:
                self._kill(lane, f"no progress for {now - lane.moved_at:.0f} s while {lane.work.doing or 'starting'}")
        for lane in list(self._dying):
            if lane.process.poll() is not None:
                self._buried(lane)

    def _kill(self, lane: _Lane, why: str) -> None:
        lane.process.kill()
        if lane.work:
            lane.work.doing = why
        self._lost(lane, why)

    def _lost(self, lane: _Lane, why: str) -> None:
        """Take a lane out of the pool; its work has ended only when the process is gone."""
        self._generation += 1
        lane.why_killed = why
        if lane in self._lanes:
            self._lanes.remove(lane)
        for fd in (lane.out, lane.into):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        self._dying.append(lane)
        if lane.process.poll() is not None:
            self._buried(lane)
        elif lane.work and why:
            lane.work.status = "hung"
            self._news(lane.work)

    def _buried(self, lane: _Lane) -> None:
        self._dying.remove(lane)
        lane.close()
        work, lane.work = lane.work, None
        if work is None:
            return
        if work.cancelled:
            self._queue.append(work)  # another lane removes what this one left
        elif lane.why_killed:
            self._end(work, _failed("destination", f"the copying worker hung: {lane.why_killed}",
                                    "is the destination, or the watched share, still answering?"))
        else:
            code = lane.process.returncode
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            self._end(work, _failed("batch", f"the copying worker {ended}", "was memory short?"))


def _failed(scope: str, why: str, hint: str = "") -> dict[str, Any]:
    fault = {"kind": "transient", "scope": scope, "why": why, "hint": hint, "counts": True}
    return {"status": "failed", "fault": fault, "changed": [], "differs": {}, "files": 0, "bytes": 0, "output": None}


# --------------------------------------------------------------- what actions say of their work


def progress_of(work: Work) -> Progress:
    """Return how an attempt stands, as its lane tells it."""
    report = work.report
    if report is None:
        why, hint = _why_still(work)
        return Progress(
            "inactive" if work.status == "hung" else "active",
            why=why,
            hint=hint,
            files_done=work.files_done,
            bytes_done=work.bytes_done,
        )
    fault = fault_of(report["fault"]) if report.get("fault") else None
    return Progress(
        report["status"],
        why=fault.why if fault else "",
        hint=fault.hint if fault else "",
        fault=fault,
        files_done=work.files_done,
        bytes_done=work.bytes_done,
        output=report["output"],
        changed=tuple(report["changed"]),
    )


def awaited(work: Work) -> Fault | None:
    """Wait for its end; return what a person must see to if its worker was killed, and may never end."""
    while not work.ended.wait(HUNG_LOOK_S):
        if work.status == "hung":
            return Fault("transient", *_why_still(work), Scope.DESTINATION, counts=False)
    return None


def fault_of(told: Mapping[str, Any]) -> Fault:
    wait_s = told.get("retry_after_s")
    return Fault(told["kind"], told["why"], told["hint"], Scope(told["scope"]), wait_s, counts=told["counts"])


def _why_still(work: Work) -> tuple[str, str]:
    """Return why an attempt does not move, and what to do; only a hung one is a person's matter."""
    if work.status == "hung":
        why = f"the copying worker hangs: {work.doing}"
        return why, "is the destination, or the watched share, still answering?"
    if work.stopped:
        return f"stands still: {work.stopped}", "it goes on by itself once that is over"
    return ("waiting for a free lane", "") if work.status == "queued" else ("", "")


def lane_environment() -> dict[str, str]:
    """Return the environment of a lane: it must find this very package, and little else."""
    package = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TRIGGER_FAIL") if name in os.environ}
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "LC_ALL": "C.UTF-8", "PYTHONPATH": os.pathsep.join(paths)}
