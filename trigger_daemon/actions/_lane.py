"""A lane: a worker process that carries out one order at a time, of `copy` or of another action with jobs like its own.

    python -P -m trigger_daemon.actions._lane PARENT_PID STATE_DIR TILLS_FD

Orders come as JSON lines on stdin, reports go as JSON lines to stdout. It ends
with its parent, whatever ends that: the kernel is asked to kill it, and the end
of stdin ends it too. Imports the standard library and hashes only: a lane must
start fast and stay small.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trigger_daemon.actions._copy_job import Job, Memory
from trigger_daemon.actions._copy_pace import Pace, Tills
from trigger_daemon.actions._copy_store import Store
from trigger_daemon.actions._copy_system import RangeLocks, be_humble, die_with_parent


class Work(Protocol):
    """What a lane asks of a job."""

    run_id: int
    attempt: int
    files_done: int
    bytes_done: int
    moving: int  # bytes of what is under way

    def run(self) -> dict[str, Any]:
        """Carry it out and return the report."""

    def spare(self, rooms: Mapping[str, Any]) -> None:
        """Leave so much free from now on; any thread."""


Begin = Callable[[dict[str, Any], Pace], Work]

TELL_S = 0.5  # how often progress is told
UMASK = 0o002  # the archive belongs to a group; the sources' modes say the rest


class Lane:
    """The loop; a thread hears the daemon, another tells how far things are."""

    def __init__(self, begin: Begin, tills: int, orders: int, reports: int) -> None:
        self.pace = Pace(Tills(tills))
        self._begin = begin
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.job: Work | None = None
        self._busy = threading.Event()
        self._telling = threading.Lock()
        self._in = orders
        self._out = reports
        self._cancelled: tuple[int, int] | None = None
        self._rooms: dict[str, Any] = {"of": None}

    def run(self) -> None:
        """Work until the daemon ends."""
        threading.Thread(target=self._hear, name="hear", daemon=True).start()
        threading.Thread(target=self._report, name="report", daemon=True).start()
        while True:
            order = self.orders.get()
            self.pace.begin(order["bandwidth"], order["rule_bandwidth"], order["rule_till"])
            job = self._begin(order, self.pace)
            self.job = job
            self._spare(job)
            if self._cancelled == (job.run_id, job.attempt):
                self.pace.cancelled = True
            self._busy.set()
            try:
                end = job.run()
            except Exception as fault:  # noqa: BLE001 - the top of the process: the daemon decides what a surprise means
                traceback.print_exc()
                end = {"status": "failed", "changed": [], "differs": {}, "files": 0, "bytes": 0, "left": True,
                       "output": None, "fault": {"kind": "transient", "scope": "batch", "hint": "", "counts": True,
                                                 "why": f"unexpected: {fault!r}"}}  # fmt: skip
            self._busy.clear()
            self.job = None
            self._tell({"end": [job.run_id, job.attempt], **end})

    def _hear(self) -> None:
        pending = b""
        while chunk := os.read(self._in, 1 << 20):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        os._exit(0)  # at once: a daemon that comes back starts other lanes

    def _take(self, told: dict[str, Any]) -> None:
        if "pace" in told:
            self.pace.limit, self.pace.paused = told["pace"]
        elif "cancel" in told:
            self._cancelled = (told["cancel"][0], told["cancel"][1])
            job = self.job
            if job and self._cancelled == (job.run_id, job.attempt):
                self.pace.cancelled = True
        elif "of" in told:
            self._rooms = told
            self._spare(self.job)
        else:
            self.orders.put(told)

    def _spare(self, job: Work | None) -> None:
        """Have a job leave free what was told last, if that was told of it."""
        if job and self._rooms["of"] == [job.run_id, job.attempt]:
            job.spare(self._rooms["rooms"])

    def _report(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(TELL_S)
            job = self.job
            if job is not None:
                done = [job.run_id, job.attempt, self.pace.steps, job.files_done, job.bytes_done + job.moving]
                self._tell({"at": done, "doing": self.pace.doing})

    def _tell(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        with self._telling:
            while data:
                data = data[os.write(self._out, data) :]


def serve(prepare: Callable[[str], Begin]) -> None:
    """Be a lane, of the action that `prepare` gets ready in its state directory."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when work ends
    os.umask(UMASK)
    be_humble()
    reports = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no report
    Lane(prepare(sys.argv[2]), int(sys.argv[3]), 0, reports).run()


def _copying(state_dir: str) -> Begin:
    store = Store(state_dir)
    locks = RangeLocks(os.path.join(state_dir, "runs.lock"))
    memory = Memory(state_dir)

    def begin(order: dict[str, Any], pace: Pace) -> Work:
        memory.use(order["generation"])
        return Job(order, store, locks, pace, memory)

    return begin


def main() -> None:
    serve(_copying)


if __name__ == "__main__":
    main()
