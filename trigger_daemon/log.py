"""Log facts: a line with fields for journald, JSON lines for other collectors, readable lines on a terminal.

With the extra `journald` each key is a field of its own there (RUN=, RULE=,
ROOT=, PATH=), so that `journalctl RULE=movies` finds all that was said of a
rule. Without it, a line is one JSON object with a priority before it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import structlog

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_NOT_A_FIELD = re.compile(r"[^A-Z0-9_]")
FIELD_MAX = 64  # characters that journald takes of a name
OURS = frozenset({"MESSAGE", "PRIORITY", "EVENT", "SYSLOG_IDENTIFIER"})

Send = Callable[..., Any]


def _with_priority(renderer: Any) -> Any:
    def render(logger: Any, method: str, event: dict[str, Any]) -> str:
        return f"<{_PRIORITY.get(method, 6)}>{renderer(logger, method, event)}"

    return render


def _goes_to_journald(stream: Any) -> bool:
    """Say whether a stream is the one that the service manager has connected to journald."""
    try:
        there = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


def _journal_send() -> Send | None:
    try:
        from systemd.journal import send
    except ImportError:
        return None
    return send  # type: ignore[no-any-return]


def fields(method: str, event: Mapping[str, Any]) -> dict[str, str]:
    """Return a log event as journald's fields; MESSAGE is one line for people."""
    said = {key: _text(value) for key, value in event.items() if key not in ("event", "level", "timestamp")}
    lines = str(event.get("event", "")), *(f"{key}={value}" for key, value in said.items() if key != "exception")
    found = {"MESSAGE": " ".join(lines), "PRIORITY": str(_PRIORITY.get(method, 6)), "EVENT": str(event.get("event"))}
    found["SYSLOG_IDENTIFIER"] = "trigger-daemon"
    for key, value in said.items():
        name = _NOT_A_FIELD.sub("_", key.upper())[:FIELD_MAX]
        if name not in OURS and name[:1].isalpha():
            found[name] = value
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=True, default=str)
    return str(value).encode("utf-8", "backslashreplace").decode()  # names that are no UTF-8 carry surrogates


class _Journald:
    """Hands an event, as the last processor made it, to journald. Never raises: there is nobody else to tell."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def msg(self, **found: str) -> None:
        message = found.pop("MESSAGE")
        try:
            self._send(message, **found)
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = exception = msg


def set_up(level: str = "info", style: str = "auto") -> None:
    """Configure structlog once. style: auto, json, text. Lines go to stderr, so that stdout stays data."""
    journald = _goes_to_journald(sys.stderr)
    as_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    send = _journal_send() if journald and style == "auto" else None
    factory: Any = structlog.PrintLoggerFactory(sys.stderr)
    if send is not None:
        renderer: Any = lambda _, method, event: ((), fields(method, event))  # noqa: E731
        factory = lambda *_: _Journald(send)  # noqa: E731
    elif as_text:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ)
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=True)
        if journald:
            renderer = _with_priority(renderer)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper(), logging.INFO)),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )


def get() -> Any:
    """Return the logger."""
    return structlog.get_logger()
