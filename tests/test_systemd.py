"""What the daemon tells its service manager, heard on the socket that systemd would listen on."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.site import Site
from trigger_daemon.systemd import Notifier


class Manager:
    """The service manager's end: keeps every message, as its assignments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.heard: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        """Return all that was heard so far."""
        while True:
            try:
                message = self._socket.recv(65_536, socket.MSG_DONTWAIT).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in message.split("\n")))

    def said(self, key: str, since: int = 0) -> list[str]:
        return [message[key] for message in self.listen()[since:] if key in message]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(shm_path: Path) -> Iterator[Manager]:
    one = Manager(shm_path / "notify")
    yield one
    one.close()


@pytest.fixture
def site(shm_path: Path, manager: Manager) -> Iterator[Site]:
    one = Site(shm_path / "site")
    one.write_rules(one.rule())
    one.start(env={"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "1000000"})
    yield one
    if one.process is not None and one.process.poll() is None:
        one.kill()


def test_a_life_as_the_service_manager_hears_it(site, manager, wait_until):
    """Ready when the rules are in force, alive from then on, reloading before ready again, stopping at the end."""
    wait_until(lambda: manager.said("READY"), what="READY=1")
    before = next(message for message in manager.heard if "STATUS" in message)["STATUS"]
    wait_until(lambda: len(manager.said("WATCHDOG")) > 3, 5, what="the watchdog to be fed")
    so_far, began = len(manager.heard), time.monotonic()
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    wait_until(lambda: manager.said("READY", so_far), what="READY=1 after the reload")
    reloading = next(n for n, m in enumerate(manager.heard) if "RELOADING" in m)
    ready_again = next(n for n, m in enumerate(manager.heard) if n >= so_far and "READY" in m)
    code = site.stop()

    assert before == "opening the journal"
    assert "no rules: nothing is watched" not in manager.said("STATUS")  # before the first look at the roots, either
    assert reloading < ready_again and manager.heard[ready_again]["STATUS"] == "watching 1 directory"
    assert began <= int(manager.heard[reloading]["MONOTONIC_USEC"]) / 1e6 <= time.monotonic()
    assert code == 0 and manager.said("STOPPING") == ["1"]


def test_ready_again_comes_after_the_new_rules(site, manager, wait_until):
    """A reload is told as done when what it brought is in force or refused, and not before."""
    wait_until(lambda: manager.said("READY"), what="READY=1")
    so_far = len(manager.listen())
    site.write_rules({"name": "broken"})
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    wait_until(lambda: manager.said("READY", so_far), what="READY=1 after the reload")
    first = next(message for message in manager.heard[so_far:] if "READY" in message)

    assert "rules refused: " in first["STATUS"]


def test_a_watchdog_is_fed_twice_in_its_time(monkeypatch):
    """A quick watchdog makes the beat quicker; without one, or with another process's, the beat is its own."""
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    quick = Notifier().beat_s(2.0)
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    slow = Notifier().beat_s(2.0)
    monkeypatch.setenv("WATCHDOG_PID", "1")
    others = Notifier().beat_s(2.0)

    assert (quick, slow, others) == (0.5, 2.0, 2.0)
