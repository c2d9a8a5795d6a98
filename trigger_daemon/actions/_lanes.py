"""The daemon's side of the copying workers: a pool of lanes, fed and watched by one thread.

No call of this module waits for a lane, and the thread never waits for a single
one: pipes are non-blocking, a lane that does not move is killed and left alone
until the kernel lets go of it. Only then has its attempt ended.
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
from typing import Any

PULSE_S = 0.25  # how often rates, pauses and deadlines are looked at while work goes on
IDLE_S = 60.0  # a lane without work ends after this; one stays
READ_BYTES = 1 << 16
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
    report: Mapping[str, Any] | None = None
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class _Lane:
    """One worker process."""

    def __init__(self, argv: list[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env=env, start_new_session=True, bufsize=0
        )
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
        self.why_killed = ""

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class Lanes:
    """The pool. `pace()` gives the limit for all lanes together, in bytes per second, and whether to stand still."""

    def __init__(
        self,
        *,
        state_dir: str,
        most: int,
        deadline_s: float,
        pace: Callable[[], Pace],
        news: Callable[[Work], None],
        env: Mapping[str, str],
    ) -> None:
        self._argv = [sys.executable, "-P", "-m", "trigger_daemon.actions._lane", str(os.getpid()), state_dir]
        self._most = most
        self._deadline_s = deadline_s
        self._pace = pace
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
        pulse_at = 0.0
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
                self._tell_pace()
                self._supervise(now)
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

    def _patience(self) -> float | None:
        """Return how long the thread may sleep: idle, it wakes only to let a lane go."""
        if self._dying or any(lane.work for lane in self._lanes):
            return PULSE_S
        return IDLE_S if len(self._lanes) > 1 else None

    def _assign(self) -> None:
        while self._quick or self._queue:
            queue = self._quick or self._queue
            lane = self._free_lane(queue)
            if lane is None:
                return
            work = queue.popleft()
            pace = self._share(1 + sum(1 for other in self._lanes if other.work))
            if work.cancelled:
                work.order["do"] = "clean"
            lane.work, lane.steps, lane.moved_at, lane.pace = work, -1, time.monotonic(), pace
            work.status = "running"
            self._put(lane, {"pace": pace})
            self._put(lane, {**work.order, "generation": self._generation})
            self._send(lane)

    def _free_lane(self, queue: deque[Work]) -> _Lane | None:
        for lane in reversed(self._lanes):  # the last used is warm
            if lane.work is None:
                return lane
        if len(self._lanes) >= self._most + (queue is self._quick):
            return None
        try:
            lane = _Lane(self._argv, self._env)
        except OSError as fault:
            work = queue.popleft()
            self._end(work, _failed("batch", f"cannot start a copying worker: {fault}"))
            return None
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

    def _share(self, working: int) -> Pace:
        limit, paused = self._pace()
        return (limit / max(1, working) if limit is not None else None), paused

    def _tell_pace(self) -> None:
        working = [lane for lane in self._lanes if lane.work]
        if not working:
            return
        pace = self._share(len(working))
        for lane in working:
            if lane.pace != pace:
                lane.pace = pace
                self._put(lane, {"pace": pace})
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
