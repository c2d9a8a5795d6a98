"""Secrets: of the environment, a credential of the service manager, or a file of ours alone.

They never stand in the settings. They are read when they are needed, kept in memory only, and stand in no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SECRET_BYTES_MAX = 4_096


def secret(given: object, credential: str, file: object, env: Mapping[str, str]) -> str:
    """Return the secret: what was given, else the credential of that name, else the file's; '' if none is named.

    Raises OSError if it cannot be read, ValueError if it is no secret: readable by others, or not on one line.
    """
    if given:
        return str(given)
    if directory := env.get("CREDENTIALS_DIRECTORY"):
        there = Path(directory) / credential
        if there.exists():
            return _read(there)
    if not file:
        return ""
    named = Path(str(file))
    mode = named.stat().st_mode
    if mode & 0o077:
        raise ValueError(f"{named} can be read by others (mode {mode & 0o777:04o}): chmod 600 {named}")
    return _read(named)


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        text = opened.read(SECRET_BYTES_MAX + 1).decode("utf-8").strip()
    if not text or len(text) > SECRET_BYTES_MAX or "\n" in text:
        raise ValueError(f"{file} must hold the secret, and nothing else, on one line")
    return text
