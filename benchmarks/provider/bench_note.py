"""An action that only notes when it was started: what the daemon itself adds, without a process per file."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from trigger_daemon.actions import Context, Differs, Progress, Proof, Request, Unproven
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Fault

DONE_AFTER_S = 0.005  # a run is over this long after its start


class Action:
    OPTIONS: Options = {
        "log": Option("text", "file that receives a line `monotonic_ns path` for each file of a start", required=True),
        "each": Option("bool", "false: a line for the first file of a start alone", default=True),
    }
    VERIFIES = False
    PREPARES = False

    def __init__(self, context: Context) -> None:
        self._descriptors: dict[str, int] = {}
        self._nudge = context.nudge
        self._over: queue.SimpleQueue[tuple[float, int, int] | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, name="bench-note", daemon=True)
        self._teller.start()

    def _tell(self) -> None:
        """Say of each run that it is over, as a child's exit would."""
        while (item := self._over.get()) is not None:
            due, run, attempt = item
            time.sleep(max(0.0, due - time.monotonic()))
            self._nudge(run, attempt)

    def check(self, options: Mapping[str, Any]) -> None:
        pass

    def destination(self, options: Mapping[str, Any]) -> str:
        return "nowhere"

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def prepare(self, request: Request) -> None:
        return None

    def start(self, request: Request, prepared: Any) -> Any:
        now_ns = time.monotonic_ns()
        log = request.options["log"]
        if log not in self._descriptors:
            self._descriptors[log] = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        files = request.files if request.options.get("each", True) else request.files[:1]
        lines = "".join(f"{now_ns} {file.path}\n" for file in files)
        os.write(self._descriptors[log], lines.encode())
        self._over.put((now_ns / 1e9 + DONE_AFTER_S, request.run, request.attempt))
        return {"run": request.run}

    def find(self, request: Request, prepared: Any) -> Any:
        return {"run": request.run}

    def poll(self, request: Request, handle: Any) -> Progress:
        return Progress("succeeded")

    def cancel(self, request: Request, handle: Any) -> None:
        pass

    def verify(self, request: Request, handle: Any) -> Proof | Differs | Unproven:
        return Unproven(Fault("permanent", "a note proves nothing"))

    def close(self) -> None:
        self._over.put(None)
        self._teller.join(1)
