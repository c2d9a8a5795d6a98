"""A lane: a worker process that carries out one order of `copy` at a time.

    python -P -m trigger_daemon.actions._lane PARENT_PID STATE_DIR

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
from typing import Any

from trigger_daemon.actions._copy_job import Job, Memory
from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._copy_store import Store
from trigger_daemon.actions._copy_system import RangeLocks, be_humble, die_with_parent

TELL_S = 0.5  # how often progress is told
UMASK = 0o002  # the archive belongs to a group; the sources' modes say the rest


class Lane:
    """The loop; a thread hears the daemon, another tells how far things are."""

    def __init__(self, state_dir: str, orders: int, reports: int) -> None:
        self.pace = Pace()
        self.store = Store(state_dir)
        self.locks = RangeLocks(os.path.join(state_dir, "runs.lock"))
        self.memory = Memory()
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.job: Job | None = None
        self._busy = threading.Event()
        self._telling = threading.Lock()
        self._in = orders
        self._out = reports
        self._cancelled: tuple[int, int] | None = None

    def run(self) -> None:
        """Work until the daemon ends."""
        threading.Thread(target=self._hear, name="hear", daemon=True).start()
        threading.Thread(target=self._report, name="report", daemon=True).start()
        while True:
            order = self.orders.get()
            self.memory.use(order["generation"])
            self.pace.begin(order["bandwidth"])
            job = Job(order, self.store, self.locks, self.pace, self.memory)
            self.job = job
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
        else:
            self.orders.put(told)

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


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when work ends
    os.umask(UMASK)
    be_humble()
    reports = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no report
    Lane(sys.argv[2], 0, reports).run()


if __name__ == "__main__":
    main()
