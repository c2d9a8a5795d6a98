"""Local paths as a collection names them: the longest of its roots that holds a path decides."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trigger_daemon.core.model import Fault
from trigger_daemon.globus import Account
from trigger_daemon.globus.faults import Trouble

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_uuid(value: Any) -> bool:
    return bool(_UUID.fullmatch(str(value)))


def shown_roots(account: Account, collection: str, roots: Iterable[str]) -> dict[str, str]:
    """Return the collection's path of each local root. Raises Trouble for one that it does not show."""
    found = {}
    for root in dict.fromkeys(roots):
        path = in_collection(account.collections.get(collection.lower(), {}), root)
        if path is None:
            hint = f"add it to `globus: collections: {collection}` in the settings, and restart the daemon"
            raise Trouble(Fault("person", f"collection {collection} does not show {root}", hint), False)
        found[root] = path
    return found


def in_collection(roots: Mapping[str, str], local: str) -> str | None:
    """Return the collection's path of an absolute local one, None if the collection does not show it."""
    local = posixpath.normpath(local)
    best = max((root for root in map(posixpath.normpath, roots) if _holds(root, local)), key=len, default=None)
    if best is None:
        return None
    shown = next(path for root, path in roots.items() if posixpath.normpath(root) == best)
    below = local[len(best.rstrip("/")) :].lstrip("/")
    return join(shown, below) if below else shown.rstrip("/") or "/"


def shown_here(roots: Mapping[str, str], path: str) -> tuple[str, ...]:
    """Return the local directories that a path of a collection surely is."""
    path, found = f"/{path.strip('/')}", []
    for local, shown in roots.items():
        top = shown.rstrip("/")
        if path == (top or "/") or path.startswith(f"{top}/"):
            found.append(posixpath.join(local, path[len(top) :].strip("/")))
    return tuple(found)


def join(directory: str, below: str) -> str:
    """Return a path below a directory of a collection."""
    return f"{directory.rstrip('/')}/{below}"


def _holds(root: str, local: str) -> bool:
    return local == root or local.startswith(root.rstrip("/") + "/")


def not_utf8(text: str) -> str:
    """Return why a text cannot be told to Globus, '' if it can: its requests are JSON, in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8, and Globus knows no other names"
    return ""


def unsendable(path: str) -> str:
    """Return why a path cannot be named to Globus, '' if it can.

    What begins with ~ is somebody's home directory to it, whatever lies there by that name; . and .. are resolved.
    """
    if why := not_utf8(path):
        return why
    parts = path.split("/")
    if next(filter(None, parts), "").startswith("~"):
        return f"Globus takes {path} for a path in a home directory, and not for a directory that is called so"
    return f"Globus takes {path} for another path" if {".", ".."} & set(parts) else ""
