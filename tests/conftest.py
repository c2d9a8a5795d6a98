"""What all tests share: no silent skips in CI, waiting without guessing, and room in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

IN_CI = os.environ.get("CI") == "true"


class Waiter:
    """Wait for what another thread or process will do; never for time to pass."""

    def __call__(self, predicate: Callable[[], Any], timeout: float = 10.0, *, what: str = "") -> Any:
        """Return the first true value of `predicate`; fail after `timeout` seconds, saying what was awaited."""
        deadline = time.monotonic() + timeout
        pause_s = 0.001
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() >= deadline:
                pytest.fail(f"waited {timeout:g} s in vain for {what or getattr(predicate, '__name__', 'it')}")
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)


@pytest.fixture
def wait_until() -> Waiter:
    """`wait_until(predicate, timeout)`: poll until true, or fail."""
    return Waiter()


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """A directory with a short name on tmpfs: for socket paths (at most 107 bytes) and for what must be fast."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="td", dir=parent))
    yield path
    shutil.rmtree(path, ignore_errors=True)


# Many tests wait and many compute. File by file all workers would wait together, and then compute together: mixed, the
# whole takes less time, and no test meets a machine that is always full. What shares a fixture stays as it is.


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        known = getattr(item, "_fixtureinfo", None)
        if known and any(one[-1].scope == "module" for one in known.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=_mixed)


def _mixed(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group")
    return zlib.crc32(str(group.args[0] if group else item.nodeid).encode())


# A skip hides a missing package or privilege. On a developer's machine that is
# fair; in CI it would be a promise nobody tests any more.


def _fail_skips(report: Any) -> None:
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"skipped in CI, where everything must run: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    _fail_skips(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _fail_skips(report)
    return report
