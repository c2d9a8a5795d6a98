"""The attempts of a provider whose workers end with the daemon: each begun once, asked, cancelled, proved, forgotten.

What is not known here surely does not run. So a start that is repeated, a
daemon that was killed and one that was stopped are one case: the attempt is
taken up again, and its worker goes on with what is there. What is done is said
by the provider alone: it makes the order, and its worker carries that out.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trigger_daemon.actions import Context, Differs, Json, Progress, Proof, Refused, Request, Unknown, Unproven
from trigger_daemon.actions._lanes import Lanes, Pace, Work, awaited, fault_of, progress_of
from trigger_daemon.core.model import Fault, Scope

LANES = 4  # `lanes` in the settings
DEADLINE_S = 120.0  # without progress, a worker is killed, and what it has started with it
ENDED_MAX = 10_000  # ended attempts remembered; an older one is asked of the destination again


class Attempts:
    """Of one provider; all methods may be called on any thread.

    `order(request, do)` returns what a worker is told, and the word for what is
    down when it is down; `do` is copy, clean or prove. Raises Refused.
    `stopped(order)` and `rooms(order)` are as in Lanes. `of_run`: names in the
    state directory that are kept of a run, with {} for its number.
    """

    def __init__(
        self, name: str, context: Context, *, worker: str, order: Callable[[Request, str], tuple[dict[str, Any], str]],
        stopped: Callable[[Mapping[str, Any]], str], rooms: Callable[[Mapping[str, Any]], dict[str, Any]],
        environment: Callable[[], Mapping[str, str]], of_run: Sequence[str],
    ) -> None:  # fmt: skip
        self._name = name
        self._context = context
        self._worker = worker
        self._order = order
        self._stopped = stopped
        self._rooms = rooms
        self._environment = environment
        self._of_run = of_run
        self._lock = threading.Lock()
        self._work: OrderedDict[tuple[int, int], Work] = OrderedDict()
        self._lanes: Lanes | None = None
        self._closed = False

    def start(self, request: Request) -> Json:
        """Hand the attempt to a worker and return at once. Raises Refused for what can never go well."""
        with self._lock:
            self._refuse_if_closed()
            if (request.run, request.attempt) not in self._work:
                self._submit(request, "copy")
        return _handle(request)

    def find(self, request: Request) -> Json | None:
        """Return a live attempt's handle."""
        with self._lock:
            return _handle(request) if (request.run, request.attempt) in self._work else None

    def poll(self, request: Request) -> Progress:
        """Say how it stands; an attempt of an earlier daemon is taken up again."""
        with self._lock:
            work = self._work.get((request.run, request.attempt))
            if work is None:
                self._refuse_if_closed()
                try:
                    work = self._submit(request, "copy")
                except Refused as refused:
                    return Progress("failed", why=refused.fault.why, hint=refused.fault.hint, fault=refused.fault)
        return progress_of(work)

    def cancel(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                return
            work = self._work.get((request.run, request.attempt))
            if work is not None and work.report is None:
                self._pool().cancel(work)
            elif work is None or work.report is None or work.report["status"] != "cancelled":
                self._submit(request, "clean")

    def verify(self, request: Request) -> Proof | Differs | Unproven:
        """Have a worker prove it, and wait for that."""
        with self._lock:
            if self._closed:
                return Unproven(Fault("transient", f"the {self._name} action is closed", counts=False))
            try:
                work = self._submit(request, "prove")
            except Refused as refused:
                return Unproven(refused.fault)
        if (hangs := awaited(work)) is not None:
            return Unproven(hangs)
        report = work.report
        if report is None:
            return Unproven(Fault("transient", "the proof was cut short", counts=False))
        changed = tuple(report["changed"])
        if report["fault"]:
            return Unproven(fault_of(report["fault"]))
        return Differs(report["differs"], changed) if report["differs"] else Proof(tuple(report["members"]), changed)

    def forget(self, run: int) -> None:
        """Remove what is kept of a run; what it wrote stays known, as ours."""
        with self._lock:
            for key in [key for key in self._work if key[0] == run and self._work[key].report is not None]:
                del self._work[key]
            for name in self._of_run:
                path = os.path.join(self._context.state_dir, name.format(run))
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                elif os.path.exists(path) and not any(key[0] == run for key in self._work):
                    os.unlink(path)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes = self._lanes
            pending = [work for work in self._work.values() if work.report is None]
        if lanes:
            lanes.close()
        for work in pending:
            work.ended.set()  # nobody may wait for it any longer

    def doing(self, request: Request) -> str:
        """Return what the worker of an attempt is at."""
        return self._work[request.run, request.attempt].doing

    def pids(self) -> list[int]:
        """Return the processes of the workers."""
        return self._lanes.pids() if self._lanes else []

    # ---------------------------------------------------------------------- inside

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Unknown(f"the {self._name} action is closed")

    def _submit(self, request: Request, do: str) -> Work:
        """Make the order and queue it; the lock is held. Raises Refused."""
        order, seat = self._order(request, do)
        order |= {
            "do": do, "run": request.run, "attempt": request.attempt,
            "files": [(file.root.rstrip("/"), file.path, file.size, file.mtime_ns) for file in request.files],
            "bandwidth": request.options.get("bandwidth"), "rule": request.rule, "rule_bandwidth": request.bandwidth,
        }  # fmt: skip
        pool = self._pool()
        if hung := pool.hangs(seat):
            raise Refused(Fault("transient", f"{seat} does not answer: {hung}",
                                "is its server well? the transfer goes on when the hung call has ended",
                                Scope.DESTINATION, counts=False))  # fmt: skip
        work = Work(order, seat)
        if do != "prove":
            self._work[request.run, request.attempt] = work
        while len(self._work) > ENDED_MAX:
            ended = next((key for key, work in self._work.items() if work.report is not None), None)
            if ended is None:
                break
            del self._work[ended]
        pool.submit(work)
        return work

    def _pool(self) -> Lanes:
        if self._lanes is None:
            os.makedirs(self._context.state_dir, exist_ok=True)
            self._lanes = Lanes(
                worker=self._worker,
                state_dir=self._context.state_dir,
                most=self._context.settings.get("lanes", LANES),
                deadline_s=self._context.settings.get("deadline_s", DEADLINE_S),
                pace=self._pace,
                stopped=self._stopped,
                rooms=self._rooms,
                news=lambda work: self._context.nudge(work.order["run"], work.order["attempt"]),
                env=self._environment(),
            )
        return self._lanes

    def _pace(self) -> Pace:
        return self._context.bandwidth(), self._context.paused()


class ByAttempts:
    """The part of a provider that is its Attempts: request and attempt say all, nothing is prepared or looked up."""

    _attempts: Attempts

    def prepare(self, request: Request) -> Json:
        return None

    def start(self, request: Request, prepared: Json) -> Json:
        return self._attempts.start(request)

    def find(self, request: Request, prepared: Json) -> Json | None:
        return self._attempts.find(request)

    def poll(self, request: Request, handle: Json) -> Progress:
        return self._attempts.poll(request)

    def cancel(self, request: Request, handle: Json) -> None:
        self._attempts.cancel(request)

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Have both sides compared, by a worker."""
        return self._attempts.verify(request)

    def forget(self, run: int) -> None:
        self._attempts.forget(run)

    def close(self) -> None:
        self._attempts.close()


def refuse_twins(request: Request, url: Callable[[str], str]) -> None:
    """Raise Refused for two members with one target."""
    seen: dict[str, str] = {}
    for file in request.files:
        where, source = url(file.path), f"{file.root}/{file.path}"
        if (other := seen.setdefault(where, source)) != source:
            raise Refused(Fault("permanent", f"{other} and {source} would both become {where}",
                                "let their paths below their roots differ"))  # fmt: skip


def _handle(request: Request) -> Json:
    return {"run": request.run, "attempt": request.attempt}
