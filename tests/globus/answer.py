"""What a route takes and gives: a request that is already read and known by name, and a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .state import Document, Store

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Refusal(Exception):
    """An answer other than success; nothing that the route did before it is kept."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body
        self.headers = headers or {}


@dataclass(frozen=True)
class Caller:
    """Who holds the token, and what it was given for."""

    identity: str
    client: str
    scopes: tuple[str, ...] = ()


NOBODY = Caller("", "")


@dataclass(frozen=True)
class Request:
    store: Store
    method: str
    path: str
    parts: dict[str, str] = field(default_factory=dict)  # named pieces of the path
    query: dict[str, list[str]] = field(default_factory=dict)
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    caller: Caller = NOBODY
    base_url: str = ""
    size_bytes: int = 0

    def one(self, name: str, default: str = "") -> str:
        """Return the last value of a query parameter."""
        return self.query.get(name, [default])[-1]

    def number(self, name: str, default: int) -> int:
        text = self.one(name)
        return int(text) if text.lstrip("-").isdigit() else default


Answer = tuple[int, Any]
Handler = Callable[[Request], Answer]


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    handler: Handler
    service: str


def route(service: str, method: str, path: str, handler: Handler) -> Route:
    """Make a route; `{name}` in the path takes one segment. A slash at the end does not matter."""
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path.rstrip("/"))
    return Route(method, re.compile(pattern + "/?"), handler, service)


def is_uuid(text: Any) -> bool:
    return isinstance(text, str) and UUID.fullmatch(text.lower()) is not None


def page(rows: list[Document], request: Request, default: int = 100) -> tuple[list[Document], int, str | None]:
    """Cut one page out of rows by marker and per_page; the marker is the index of the next row, as text."""
    marker = request.one("marker")
    start = int(marker) if marker.isdigit() else 0
    size = max(1, min(request.number("per_page", request.number("limit", default)), 1000))
    end = start + size
    return rows[start:end], size, str(end) if end < len(rows) else None
