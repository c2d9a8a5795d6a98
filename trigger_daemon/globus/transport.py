"""Requests to Globus that end: each whole answer has a deadline and a largest size, and none leads elsewhere.

A timer shuts the connection, since there is one thread for all. What would be
followed to another host, or a request to change something, is refused: the
document would go to a stranger.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import requests
from globus_sdk.transport import RequestsTransport
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from trigger_daemon.ending import Ending

READ_S = 30.0  # of a connection and of each read
ANSWER_READS = 2  # a whole answer may take as long as so many reads
# The largest that is known: a page of 1,000 delivered files has 1 MB, a flow's log with its states some, a function's
# result may have 10 MB.
ANSWER_BYTES_MAX = {
    "auth": 1 << 20, "transfer": 8 << 20, "flows": 16 << 20, "search": 8 << 20, "timers": 1 << 20, "compute": 32 << 20,
}  # fmt: skip
OTHERWISE_BYTES_MAX = 8 << 20
CHUNK_BYTES = 1 << 14  # read at once: compressed, it is a thousand times as much at most
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Foreign(requests.RequestException):
    """An answer that cannot be Globus's, in words; `done`: False if the request surely was not carried out."""

    def __init__(self, words: str, *, done: bool | None) -> None:
        super().__init__(words)
        self.done = done


class Transport(RequestsTransport):
    """The SDK's transport, for one service (`kind`). `ends_at`, monotonic, is when all of a call must have ended."""

    def __init__(self, kind: str = "", ends_at: Callable[[], float] = lambda: math.inf) -> None:
        read_s = timeout_s()
        super().__init__(http_timeout=read_s)
        most = ANSWER_BYTES_MAX.get(kind, OTHERWISE_BYTES_MAX)
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, _Adapter(read_s * ANSWER_READS, most, ends_at))


def timeout_s() -> float:
    """Return how long a read may take: what the SDK's own variable says, else ours."""
    try:
        given = float(os.environ.get("GLOBUS_SDK_HTTP_TIMEOUT", "0"))
    except ValueError:
        return READ_S
    return given if 0 < given < math.inf else READ_S


class _Adapter(HTTPAdapter):
    """Sends one request at a time, and reads its answer to the end."""

    def __init__(self, answer_s: float, bytes_max: int, ends_at: Callable[[], float]) -> None:
        super().__init__()
        self._answer_s, self._bytes_max, self._ends_at = answer_s, bytes_max, ends_at

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        span_s = min(self._answer_s, self._ends_at() - time.monotonic())
        if span_s <= 0:
            raise requests.ConnectTimeout("no time is left for another request", request=request)
        kwargs["stream"] = True
        with _Ending(span_s) as ending:
            try:
                response = super().send(request, *args, **kwargs)
                _refuse_elsewhere(request, response)
                self._read(response)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, OSError) as error:
                if ending.come:
                    raise requests.ReadTimeout(f"no whole answer in {span_s:.0f} s", request=request) from error
                raise
            if ending.come:  # what ends with the connection looks whole
                raise requests.ReadTimeout(f"no whole answer in {span_s:.0f} s", request=request)
        return response

    def _read(self, response: requests.Response) -> None:
        parts, size = [], 0
        try:
            for part in response.iter_content(CHUNK_BYTES):
                parts.append(part)
                size += len(part)
                if size > self._bytes_max:
                    words = f"the answer is larger than {self._bytes_max >> 20} MB, and was not read to its end"
                    raise Foreign(words, done=None)
        except BaseException:
            response.close()
            raise
        response._content = b"".join(parts)


def _refuse_elsewhere(request: requests.PreparedRequest, response: requests.Response) -> None:
    """Raise Foreign for a redirect; only one of a question, to the same place, is followed."""
    to = response.headers.get("Location")
    if response.status_code not in _REDIRECTS or to is None:
        return
    here, there = urlsplit(str(request.url)), urlsplit(urljoin(str(request.url), to))
    if request.method in ("GET", "HEAD") and (here.scheme, here.netloc) == (there.scheme, there.netloc):
        return
    response.close()
    words = f"the answer leads to {there.scheme}://{there.hostname}, where nothing is sent"
    # What was answered so was not carried out here; another redirect may stand for what was.
    raise Foreign(words, done=False if response.status_code in (307, 308) else None)


# ------------------------------------------------------------------- the timer

_here = threading.local()  # .ending: of the request that this thread sends


class _Ending(Ending):
    """That of the request which this thread sends."""

    def __enter__(self) -> Self:
        _here.ending = self
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        _here.ending = None
        super().__exit__(*args)


class _Lever:
    """A connection that the timer of its request can shut, also in the middle of a handshake."""

    sock: socket.socket | None

    def _new_conn(self) -> socket.socket:
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        self._hold(made)
        return made

    def putrequest(self, *args: Any, **kwargs: Any) -> Any:
        if self.sock is not None:  # a connection that was kept
            self._hold(self.sock)
        return super().putrequest(*args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _hold(sock: socket.socket) -> None:
        ending: _Ending | None = getattr(_here, "ending", None)
        if ending is not None:
            ending.hold(sock.fileno())


class _Connection(_Lever, HTTPConnection):
    pass


class _SecureConnection(_Lever, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS: dict[str, type] = {"http": _Pool, "https": _SecurePool}


__all__ = ["Foreign", "Transport"]
