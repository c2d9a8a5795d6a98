"""Log facts: one JSON object a line under systemd (with a journald priority), readable lines on a terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def _with_priority(renderer: Any) -> Any:
    def render(logger: Any, method: str, event: dict[str, Any]) -> str:
        return f"<{_PRIORITY.get(method, 6)}>{renderer(logger, method, event)}"

    return render


def set_up(level: str = "info", style: str = "auto") -> None:
    """Configure structlog once. style: auto, json, text. Lines go to stderr, so that stdout stays data."""
    journald = "JOURNAL_STREAM" in os.environ
    as_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    if as_text:
        renderer: Any = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ)
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get() -> Any:
    """Return the logger."""
    return structlog.get_logger()
