"""Small files of the state directory that are the daemon's user's alone, and are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any


def write(path: str, value: Any) -> None:
    """Keep a value as JSON, with mode 0600, also through a power cut. Raises OSError."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(descriptor)
    os.replace(new, path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def thin(directory: str, kept_s: float) -> None:
    """Remove files that nobody needs after so long."""
    before = time.time() - kept_s
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    os.unlink(entry.path)
