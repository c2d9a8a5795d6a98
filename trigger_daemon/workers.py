"""A few threads for calls that may hang: each call has a deadline, a hung thread is abandoned and replaced.

A thread that waits for a dead file system can be neither ended nor joined;
what can be done is to stop counting on it, say so, and not let it multiply.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

ABANDONED_MAX = 16  # hung threads of one pool; beyond them calls wait until some come back

Task = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Worker:
    thread: threading.Thread | None = None
    since: float | None = None  # when its present task began
    deadline_s: float = 0.0
    late: Task | None = None
    lost: bool = False


class Workers:
    """A pool of daemon threads. `late` of a task is called, from `supervise`, when it exceeds its deadline."""

    def __init__(self, name: str, size: int, monotonic: Callable[[], float]) -> None:
        self._name = name
        self._size = size
        self._monotonic = monotonic
        self._tasks: queue.SimpleQueue[tuple[Task, float, Task | None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._open = 0  # tasks that were given and have not ended
        self._stopped = False

    def submit(self, task: Task, *, deadline_s: float, late: Task | None = None) -> None:
        """Run a task soon; it must not raise."""
        with self._lock:
            self._open += 1
            self._tasks.put((task, deadline_s, late))
            lost = sum(1 for w in self._workers if w.lost)
            if len(self._workers) - lost < min(self._size, self._open - lost):
                self._start()

    def _start(self) -> None:
        """Add a thread; where the system refuses one, `supervise` tries again, and the task waits."""
        worker = _Worker()
        worker.thread = threading.Thread(target=self._work, args=(worker,), name=self._name, daemon=True)
        try:
            worker.thread.start()
        except RuntimeError:
            return
        self._workers.append(worker)

    def _work(self, worker: _Worker) -> None:
        try:
            while (item := self._tasks.get()) is not None:
                task, worker.deadline_s, worker.late = item
                worker.since = self._monotonic()
                try:
                    task()
                finally:
                    worker.since = None
                    with self._lock:
                        self._open -= 1
                if worker.lost or self._stopped:
                    break
        finally:  # also when a task has raised, which none may: the next is another thread's
            with self._lock:
                if worker in self._workers:
                    self._workers.remove(worker)

    def supervise(self, now: float) -> int:
        """Abandon what is late; return how many threads hang."""
        late: list[Task] = []
        with self._lock:
            for worker in self._workers:
                if not worker.lost and worker.since is not None and now - worker.since > worker.deadline_s:
                    worker.lost = True
                    if worker.late:
                        late.append(worker.late)
            lost = sum(1 for w in self._workers if w.lost)
            healthy = len(self._workers) - lost
            while healthy < min(self._size, self._open - lost) and lost <= ABANDONED_MAX:
                self._start()
                healthy += 1
        for task in late:
            task()
        return lost

    def stop(self) -> None:
        """Let the threads end after their present task; nobody waits for them."""
        self._stopped = True
        for _ in range(len(self._workers)):
            self._tasks.put(None)
