"""One request and its answer, both with an end: a time for all of it, a largest size, and no way to a stranger.

Nothing is repeated here, nothing goes to another place than the one that was
asked, and whether a request has left at all is told apart from what became of
it. The way is what the environment says, with its proxies (HTTPS_PROXY).
"""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from trigger_daemon.ending import Ending

ANSWER_BYTES_MAX = 1 << 20
CHUNK_BYTES = 1 << 14
HOPS_MAX = 3  # of a place that adds a slash, or changes its mind
WAIT_MAX_S = 3_600.0  # of what Retry-After may ask for
DEADLINE_MAX_S = 100.0  # the executor gives up a call after 120
_AGAIN = frozenset({307, 308})  # the same request, there
_LOOK = frozenset({301, 302, 303})  # only a question may follow them


class NotSent(Exception):
    """The request has surely not reached anybody."""


class NoRequest(NotSent):
    """What is to be sent is none: its address, or the proxy's, is no address."""


class Lost(Exception):
    """The request has left, and no answer came."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request with everything filled in, secrets too: to be sent, and neither kept nor shown."""

    method: str
    url: str
    headers: Mapping[str, bytes]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came. `broken`: why it did not come whole, '' if it did. `to`: where it leads, not followed."""

    status: int
    body: bytes
    broken: str = ""
    to: str = ""
    retry_after_s: float | None = None

    def parsed(self) -> tuple[Any, str]:
        """Return what the body says, and why it says nothing ('' if it does)."""
        if self.broken:
            return None, self.broken
        try:
            return json.loads(self.body.decode("utf-8"), parse_constant=_refuse), ""
        except (ValueError, RecursionError):
            return None, "the answer is not JSON"


def trust(ca: str | None) -> ssl.SSLContext:
    """Return what is trusted: one file of authorities, or those of the system. Raises OSError."""
    return ssl.create_default_context(cafile=ca)


def send(ask: Ask, *, span_s: float, trusted: ssl.SSLContext | None) -> Answer:
    """Send it, and read the answer to its end, within `span_s` in all. Raises NotSent (NoRequest), Lost.

    `trusted` is needed for https; reading the system's authorities costs some 50 ms, so it is kept by the caller.
    """
    import httpx

    for name in ("httpx", "httpcore"):  # they would log addresses, in which secrets may stand
        logging.getLogger(name).setLevel(logging.WARNING)
    ends_at = time.monotonic() + min(span_s, DEADLINE_MAX_S)
    url, answer = ask.url, None
    try:
        client = httpx.Client(
            verify=trusted or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # without authorities: it trusts nobody
            follow_redirects=False, limits=httpx.Limits(max_keepalive_connections=0),
        )  # fmt: skip
    except (httpx.InvalidURL, ValueError, ImportError):  # not its words: the proxy's password may stand in them
        words = "the proxy that the daemon's environment names cannot be used (HTTPS_PROXY and others)"
        raise NoRequest(words) from None
    with client:
        for _ in range(HOPS_MAX + 1):
            answer = _once(client, ask, url, ends_at)
            follows = answer.status in _AGAIN or (answer.status in _LOOK and ask.method in ("GET", "HEAD"))
            there = _there(url, answer.to) if follows else ""
            if not there:
                break
            url = there
    assert answer is not None
    return answer


def _once(client: Any, ask: Ask, url: str, ends_at: float) -> Answer:
    import httpx

    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise Lost("no answer in time")
    with _Ending(left_s) as ending:
        try:
            request = client.build_request(
                ask.method, url, content=ask.body, timeout=left_s, extensions={"trace": ending.trace},
                headers={"accept-encoding": "identity", "connection": "close", **ask.headers},
            )  # fmt: skip
            answer = client.send(request, stream=True)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError):  # not their words: a secret may stand in them
            raise (Lost if ending.sent else NoRequest)("what is to be sent is no request: see its address") from None
        except (httpx.HTTPError, OSError) as error:
            words = "no answer in time" if ending.come else _words(error)
            raise (Lost if ending.sent else NotSent)(words) from None
        try:
            parts, broken = _read(answer, ending)
        finally:
            answer.close()
    return Answer(
        int(answer.status_code), b"".join(parts), broken, str(answer.headers.get("location") or ""),
        _retry_after_s(answer.headers.get("retry-after")),
    )  # fmt: skip


def _read(answer: Any, ending: _Ending) -> tuple[list[bytes], str]:
    """Return the parts of a body, and why they are not all of it."""
    import httpx

    parts: list[bytes] = []
    size = 0
    if answer.headers.get("content-encoding", "identity") != "identity":
        return parts, "the answer is compressed, which was not asked for"
    try:
        for part in answer.iter_raw(CHUNK_BYTES):
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                return parts, f"the answer is larger than {ANSWER_BYTES_MAX >> 20} MiB"
            parts.append(part)
    except (httpx.HTTPError, OSError):
        return parts, "the answer broke off" if not ending.come else "the answer did not come to its end in time"
    if ending.come:  # what ends with the connection looks whole
        return parts, "the answer did not come to its end in time"
    return parts, ""


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _words(error: Exception) -> str:
    """Return what went wrong. Not cut to size: what an answer repeats in it is hidden first."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    cause = error.__cause__ or error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    inner = cause.__context__ if isinstance(cause.__context__, OSError) else cause
    said = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
    if isinstance(inner, ssl.SSLCertVerificationError):
        said = f"its certificate is not trusted: {inner.verify_message}"
    return " ".join(str(said).split()) or type(error).__name__


def _there(url: str, to: str) -> str:
    """Return the address that a redirect leads to, '' where that is another place, or none."""
    try:
        there = urljoin(url, to)
        return there if to and _place(there) == _place(url) else ""
    except ValueError:
        return ""


def _place(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, (parts.hostname or "").lower(), port or {"http": 80, "https": 443}.get(parts.scheme)


def _retry_after_s(text: str | None) -> float | None:
    """Return how long the service wants to be left alone: seconds, or until a date."""
    if text is None:
        return None
    try:
        wait_s = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(wait_s, 0.0), WAIT_MAX_S)


class _Ending(Ending):
    """That of a request, which knows whether anything of it has left."""

    sent = False

    def trace(self, event: str, about: Mapping[str, Any]) -> None:
        """What httpx tells of its steps; a question to a proxy, whether it leads on, is not the request."""
        if event.endswith("send_request_headers.started") and about["request"].method != b"CONNECT":
            self.sent = not self.come  # over a connection that is shut nothing leaves
        elif event.endswith("connect_tcp.complete"):
            self.hold(about["return_value"].get_extra_info("socket").fileno())
