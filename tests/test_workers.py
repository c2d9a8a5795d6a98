"""Threads for calls that may hang."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trigger_daemon.workers import Workers

SOON_S = 5.0


def test_a_call_that_hangs_keeps_no_other_waiting() -> None:
    """Whichever of them a thread takes first, and whether it has taken it when the next comes."""
    waited = False
    for _ in range(300):
        hang, ran = threading.Event(), threading.Event()
        pool = Workers("t", 2, lambda: 0.0)
        pool.submit(lambda: None, deadline_s=9.0)
        pool.submit(hang.wait, deadline_s=9.0)
        pool.submit(ran.set, deadline_s=9.0)
        waited = waited or not ran.wait(SOON_S)
        hang.set()
        pool.stop()
        if waited:
            break

    assert not waited


def test_a_late_thread_is_told_once_and_replaced(wait_until: Callable[..., None]) -> None:
    """It is not counted on: as many others work as the pool has; when it comes back it ends."""
    now, hang, late, ran = [0.0], threading.Event(), [], threading.Event()
    pool = Workers("t", 1, lambda: now[0])
    begun = threading.Event()
    pool.submit(lambda: (begun.set(), hang.wait()), deadline_s=1.0, late=lambda: late.append(1))
    assert begun.wait(SOON_S)
    pool.submit(ran.set, deadline_s=1.0)
    assert pool.supervise(0.5) == 0
    assert not ran.is_set()
    now[0] = 2.0
    pool.supervise(2.0)
    pool.supervise(2.1)

    assert ran.wait(SOON_S)
    assert late == [1]
    hang.set()
    wait_until(lambda: pool.supervise(2.2) == 0)
    pool.stop()
