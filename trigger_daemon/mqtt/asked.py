"""What a message may ask: to look somewhere (a hint), or what a person may order. Strict, small, and not too often.

Pure: bytes in, a request or a refusal in words out. Whoever may write to the
topics is told by the broker; what may be ordered, by the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

PAYLOAD_BYTES_MAX = 65_536
PATH_BYTES_MAX = 4_096
PATHS_MAX = 1_000  # in one hint; a directory stands for all below it
WORDS_MAX = 200  # characters of who, why, reply
IDS_MAX = 1_000
HINTS_PER_S, HINTS_AT_ONCE = 20.0, 200
ORDERS_PER_S, ORDERS_AT_ONCE = 2.0, 20


class Refused(Exception):
    """A message that is not followed; says why, and to whom that may be told."""

    def __init__(self, why: str, reply: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Hint:
    paths: tuple[str, ...]  # absolute
    reply: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """An order, as a person would give it."""

    verb: str
    args: Mapping[str, Any]
    who: str
    why: str = ""
    reply: str = ""


class Rate:
    """So many at once, then so many a second."""

    def __init__(self, per_s: float, at_once: float, monotonic: Callable[[], float]) -> None:
        self._per_s = per_s
        self._most = self._left = at_once
        self._monotonic = monotonic
        self._at = monotonic()

    def allow(self) -> bool:
        now = self._monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def hint_of(payload: bytes) -> Hint:
    """Return what a message on the topic `hint` asks. Raises Refused."""
    said, reply = _object(payload, {"paths", "reply"})
    paths = said.get("paths")
    if not isinstance(paths, list) or not paths:
        raise Refused('`paths` must be a list of absolute paths: {"paths": ["/data/run17"]}', reply)
    if len(paths) > PATHS_MAX:
        raise Refused(f"{len(paths)} paths are too many: at most {PATHS_MAX}, or name their directory", reply)
    return Hint(tuple(_path(path, "", reply) for path in paths), reply)


def order_of(payload: bytes, allowed: Collection[str]) -> Wish:
    """Return what a message on the topic `order` wants, if the settings allow it. Raises Refused."""
    said, reply = _object(payload, {"verb", "args", "who", "why", "reply"})
    verb, args = said.get("verb"), said.get("args", {})
    if not isinstance(verb, str) or verb not in allowed:
        known = ", ".join(sorted(allowed))
        raise Refused(f"`verb` must be one that the settings allow ({known}), not {_quoted(verb)}", reply)
    if not isinstance(args, dict):
        raise Refused("`args` must be an object", reply)
    wanted = _ARGS[verb]
    if strange := sorted(args.keys() - wanted.keys()):
        raise Refused(f"{verb} has no argument {_quoted(strange[0])}; it takes {', '.join(wanted) or 'none'}", reply)
    made = {}
    for name, (must, read) in wanted.items():
        if name in args:
            made[name] = read(args[name], f"`{name}` of {verb}", reply)
        elif must:
            raise Refused(f"{verb} needs `{name}`", reply)
    who = _text(said.get("who", ""), "`who`", reply)
    return Wish(verb, made, f"mqtt: {who}" if who else "mqtt", _text(said.get("why", ""), "`why`", reply), reply)


def below(path: str, root: str) -> str | None:
    """Return an absolute path as one below a root, '' for the root itself; None if it lies elsewhere."""
    root = root.rstrip("/")
    if path == root or (not root and path == "/"):
        return ""
    return path[len(root) + 1 :] if path.startswith(f"{root}/") else None


# ------------------------------------------------------------------------ reading


def _object(payload: bytes, keys: set[str]) -> tuple[dict[str, Any], str]:
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise Refused(f"{len(payload)} bytes are too many: at most {PAYLOAD_BYTES_MAX}")
    try:
        said = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused("the payload is no JSON object") from None
    if not isinstance(said, dict):
        raise Refused("the payload is no JSON object")
    reply = _text(said.get("reply", ""), "`reply`", "")
    if strange := sorted(said.keys() - keys):
        raise Refused(f"unknown key {_quoted(strange[0])}; known are {', '.join(sorted(keys))}", reply)
    return said, reply


def _text(value: Any, what: str, reply: str) -> str:
    if not isinstance(value, str) or len(value) > WORDS_MAX or not value.isprintable():
        raise Refused(f"{what} must be a text of at most {WORDS_MAX} characters", reply)
    return value


def _name(value: Any, what: str, reply: str) -> str:
    if not _text(value, what, reply):
        raise Refused(f"{what} is empty", reply)
    return str(value)


def _path(value: Any, _: str, reply: str) -> str:
    """Return an absolute path that is written plainly, so that what it lies below is what it seems to lie below."""
    path = value[:-1] if isinstance(value, str) and len(value) > 1 and value.endswith("/") else value
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path or not _file_name(path):
        raise Refused(f"an absolute path is expected, not {_quoted(value)}", reply)
    if path != "/" and any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise Refused(f"a path without `.`, `..` and `//` is expected, not {_quoted(value)}", reply)
    return path


def _file_name(path: str) -> bool:
    """Say whether a file system can have it: bytes, those that are no UTF-8 as their surrogate escapes."""
    try:
        return len(path.encode("utf-8", "surrogateescape")) < PATH_BYTES_MAX
    except UnicodeEncodeError:
        return False


def _captures(value: Any, what: str, reply: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 100:
        raise Refused(f"{what} must be an object of names and values", reply)
    return {_text(name, what, reply): _text(of, what, reply) for name, of in value.items()}


def _ids(value: Any, what: str, reply: str) -> list[int]:
    if not isinstance(value, list) or not value or len(value) > IDS_MAX or any(type(one) is not int for one in value):
        raise Refused(f"{what} must be a list of at most {IDS_MAX} numbers of runs", reply)
    return value


def _quoted(value: Any) -> str:
    words = ascii(value)
    return words if len(words) <= 100 else f"{words[:100]}…"


_Read = Callable[[Any, str, str], Any]

_ARGS: Mapping[str, Mapping[str, tuple[bool, _Read]]] = {
    "alarms.ack": {"key": (True, _name)},
    "batches.close": {"rule": (True, _name), "captures": (False, _captures)},
    "files.go": {"path": (True, _path), "rule": (False, _name)},
    "files.skip": {"path": (True, _path), "rule": (False, _name)},
    "pause": {},
    "resume": {},
    "rules.pause": {"rule": (True, _name)},
    "rules.resume": {"rule": (True, _name)},
    "runs.cancel": {"ids": (True, _ids)},
    "runs.hold": {"ids": (True, _ids)},
    "runs.retry": {"ids": (True, _ids)},
}
VERBS = frozenset(_ARGS)
