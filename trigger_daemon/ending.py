"""The end of a request: a timer that shuts its connections, whoever wraps them.

A timeout of sockets bounds each read, and not how many there are: a service
that sends a byte now and then would hold a thread for ever, in the headers and
in the handshake too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Self


class Ending:
    """Shuts the connections that a request uses once its time is over; `come` says whether it is."""

    def __init__(self, span_s: float) -> None:
        self.come = False
        self._over = False
        self._lock = threading.Lock()
        self._levers: list[socket.socket] = []
        self._timer = threading.Timer(span_s, self._come)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
            for lever in self._levers:
                lever.close()
            self._levers.clear()
        self._timer.join()

    def hold(self, descriptor: int) -> None:
        """Take a second handle of a connection: shutting it shuts that, whatever wraps or has closed the first."""
        lever = socket.socket(fileno=os.dup(descriptor))
        with self._lock:
            self._levers.append(lever)
            if self.come:
                _shut(lever)

    def _come(self) -> None:
        with self._lock:
            self.come = not self._over
            for lever in self._levers:
                _shut(lever)


def _shut(lever: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side has ended it by now
        lever.shutdown(socket.SHUT_RDWR)
