"""Tell the service manager how we are: one datagram a message to $NOTIFY_SOCKET, nothing where it is unset."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """sd_notify by its socket protocol; a failing manager never disturbs us."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        pid = os.environ.get("WATCHDOG_PID")
        usec = os.environ.get("WATCHDOG_USEC", "0")
        ours = pid is None or pid == str(os.getpid())
        self.watchdog_s = int(usec) / 1e6 if ours and usec.isdigit() else 0.0

    def send(self, *lines: str) -> None:
        """Send assignments such as READY=1."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            pass  # the manager restarts us if it misses the watchdog; there is nobody else to tell

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        self.send(f"STATUS={text}")

    def alive(self) -> None:
        """Feed the watchdog. For the loop that decides alone: no thread may say that it lives."""
        self.send("WATCHDOG=1")

    def beat_s(self, longest_s: float) -> float:
        """Return how often to feed the watchdog: twice in its time at least."""
        return min(longest_s, self.watchdog_s / 2) if self.watchdog_s > 0 else longest_s

    def extend(self, by_s: float) -> None:
        """Ask for so long from now, while a start or stop is under way."""
        self.send(f"EXTEND_TIMEOUT_USEC={int(by_s * 1e6)}")

    def reloading(self) -> None:
        self.send("RELOADING=1", f"MONOTONIC_USEC={int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6)}")

    def stopping(self) -> None:
        self.send("STOPPING=1", "STATUS=stopping")
