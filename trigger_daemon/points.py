"""Remember on which mount point a path lay: where that mount is gone, what lies beneath looks like an empty disk.

A book is a JSON object, path -> mount point, in the state directory; a person may take a line out of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from trigger_daemon.mounts import mount_of

VOLUMES = "volumes.json"  # in the state directory: the book of the volumes of the settings

# Of a directory that must be there: one that is created on an empty mount point fills the wrong disk.
ABSENT = "mount it; create it only if it is to lie on the machine's own disk"


def read(book: str) -> dict[str, str]:
    """Return what is remembered; nothing where the book is absent or damaged."""
    try:
        with open(book, encoding="utf-8") as written:
            found = json.load(written)
    except (OSError, ValueError):
        return {}
    return {path: point for path, point in found.items() if isinstance(point, str)} if isinstance(found, dict) else {}


def write(book: str, points: Mapping[str, str]) -> None:
    """Write the book, whole or not at all. Raises OSError."""
    with open(book + ".new", "w", encoding="utf-8") as new:
        json.dump(dict(points), new, indent=1)
        new.flush()
        os.fsync(new.fileno())
    os.rename(book + ".new", book)


def gone(real: str, before: str, now: str) -> bool:
    """Say whether the mount a path lay on is gone: it lies, links followed, on `now`, which is further out."""
    return len(before) > len(now) and (real + "/").startswith(before + "/")


def missing(path: str, book: str) -> str:
    """Return the mount point that a path lay on by the book, if it is gone, else ''. May hang with the path."""
    before, mount = read(book).get(path, ""), mount_of(real := os.path.realpath(path))
    return before if mount is not None and gone(real, before, mount.mountpoint) else ""


def hint(book: str) -> str:
    """Return what to do about a mount that is gone."""
    return f"mount it; if it was moved on purpose, take its line out of {book}"
