"""Laws of the executor: every call has an answer, also one that never comes back or cannot be made."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

import pytest

from trigger_daemon.actions import Progress
from trigger_daemon.core import model
from trigger_daemon.errors import JournalError
from trigger_daemon.executor import PROVIDER_THREADS, VERIFY_DEADLINE_S, Executor


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def utc(self) -> float:
        return self.now


class HangingProvider:
    """A provider whose calls never come back."""

    def __init__(self, hang: threading.Event) -> None:
        self.entered = threading.Event()
        self._hang = hang

    def _wait(self, *_: Any) -> None:
        self.entered.set()
        self._hang.wait(30)
        raise TimeoutError("too late")

    prepare = start = find = poll = cancel = verify = _wait


class Copying:
    """A provider that tells in what order it is called, and whose polls wait for `go`."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, int]] = queue.Queue()
        self.go = threading.Event()

    def poll(self, request: Any, handle: Any) -> Progress:
        self.calls.put(("poll", request.run))
        assert self.go.wait(30)
        self.calls.put(("polled", request.run))
        return Progress("succeeded")

    def forget(self, run: int) -> None:
        self.calls.put(("forget", run))


class Requests:
    """The journal's answers about a run; `broken`: its disk has failed."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def request(self, run: int) -> dict[str, Any]:
        if self.broken:
            raise JournalError("disk I/O error")
        return {"action": "fake", "options": {}, "captures": {}}

    def manifest(self, run: int) -> tuple[()]:
        return ()


class Shelf:
    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def get(self, action: str) -> Any:
        return self._provider

    def pool(self, action: str) -> str:
        return ""

    def forget(self, action: str, run: int) -> None:
        self._provider.forget(run)


def executor(provider: Any, broken: bool = False) -> tuple[Executor, Clock, queue.Queue[model.Fact]]:
    clock, facts = Clock(), queue.Queue()
    made = Executor(
        journal=Requests(broken),
        providers=Shelf(provider),
        post=facts.put,  # type: ignore[arg-type]
        root_path=lambda root: "/",
        clock=clock,
    )
    return made, clock, facts


@pytest.mark.parametrize(
    ("effect", "answer"),
    [
        (model.Prepare(1, 1), model.NotStarted),
        (model.Start(1, 1, None), model.StartUnknown),
        (model.Find(1, 1, None), model.StartUnknown),
        (model.Poll(1, 1, "h"), model.StartUnknown),
        (model.Verify(1, 1, "h"), model.CannotVerify),
    ],
)
def test_call_that_hangs_is_answered_by_what_lets_its_run_go_on(effect, answer):
    """A prepare is asked again, a start looked for, a proof asked again: no run waits for a lost thread."""
    hang = threading.Event()
    provider = HangingProvider(hang)
    made, clock, facts = executor(provider)
    made.carry(effect)
    assert provider.entered.wait(10)
    clock.now = VERIFY_DEADLINE_S + 1
    made.supervise(clock.now)
    first = facts.get(timeout=10)
    hang.set()
    made.stop()

    assert isinstance(first, answer)


@pytest.mark.parametrize(
    ("effect", "answer"), [(model.Start(1, 1, None), model.NotStarted), (model.Find(1, 1, None), model.StartUnknown)]
)
def test_unreadable_request_never_ends_an_attempt_that_may_be_under_way(effect, answer):
    """Before the start nothing was asked; a look for a lost answer proves nothing by failing."""
    made, _, facts = executor(None, broken=True)
    made.carry(effect)
    fact = facts.get(timeout=10)
    made.stop()

    assert isinstance(fact, answer)


def test_run_that_ends_while_it_is_polled_is_forgotten_after_that():
    """A poll that finds nothing kept of its run may begin it again: no poll comes after the forgetting."""
    provider = Copying()
    made, _, facts = executor(provider)
    made.carry(model.Poll(1, 1, "h"))
    called = [provider.calls.get(timeout=10)]
    made.finished(1)
    made.nudge(1, 1)
    with contextlib.suppress(queue.Empty):  # what would come too early has the time to come
        called.append(provider.calls.get(timeout=0.2))
    provider.go.set()
    facts.get(timeout=10)
    called += [provider.calls.get(timeout=10) for _ in range(3 - len(called))]
    made.stop()

    assert called == [("poll", 1), ("polled", 1), ("forget", 1)]
    assert provider.calls.empty()


def test_poll_that_waits_for_a_thread_until_its_run_is_over_asks_nobody():
    provider = Copying()
    made, _, _ = executor(provider)
    late = PROVIDER_THREADS + 1
    for run in range(1, late + 1):
        made.carry(model.Poll(run, 1, "h"))
    called = {provider.calls.get(timeout=10) for _ in range(PROVIDER_THREADS)}
    made.finished(late)
    provider.go.set()
    then = {provider.calls.get(timeout=10) for _ in range(PROVIDER_THREADS + 1)}
    made.stop()

    assert called == {("poll", run) for run in range(1, late)}
    assert then == {("polled", run) for run in range(1, late)} | {("forget", late)}
    assert provider.calls.empty()
