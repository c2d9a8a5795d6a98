"""Find the state directory without loading all settings, which costs half a second of a busy machine.

Only the plainest settings are understood here; for all else the answer is None
and the settings are loaded whole, with every fault told. What is answered is
what the whole loading would say; a fault in another setting does not keep
anybody from looking at the journal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DEFAULT_FILE = "/etc/trigger-daemon/config.yaml"
DEFAULT = "/var/lib/trigger-daemon"
FILE_VARIABLE = "TRIGGER_DAEMON_CONFIG"
VARIABLE = "TRIGGER_DAEMON_STATE_DIR"
FILE_BYTES_MAX = 100_000

_PATH = r"/[A-Za-z0-9_./+-]*"
_STATE_DIR = re.compile(rf"state_dir: +(?:({_PATH})|\"({_PATH})\"|'({_PATH})') *")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_KEY = re.compile(r"[a-z_]+:(?: .*)?")
_PLAIN = re.compile(r"[ A-Za-z0-9_./+:%@,~^=?()-]*")  # no quote, bracket, anchor, tag, block or multi-line anything


def state_dir(config: Path | None, env: Mapping[str, str]) -> str | None:
    """Return the state directory; None if only the whole of the settings can tell."""
    if any(name.upper() == VARIABLE and name != VARIABLE for name in env):
        return None
    said = env.get(VARIABLE, "")
    if said and not re.fullmatch(_PATH, said):
        return None
    named = config or (Path(env[FILE_VARIABLE]) if env.get(FILE_VARIABLE) else None)
    text = _text(named or Path(DEFAULT_FILE), must_be=named is not None)
    if text is None:
        return None
    written = _written(text)
    if written is None:
        return None
    return (said or written).rstrip("/") or "/"


def _text(file: Path, *, must_be: bool) -> str | None:
    try:
        if not file.is_file():
            return "" if not must_be and not file.exists() else None
        with file.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
        return content.decode("ascii") if len(content) <= FILE_BYTES_MAX else None
    except (OSError, UnicodeDecodeError):
        return None


def _written(text: str) -> str | None:
    """Return what a settings file says, the default where it says nothing; None if it is not plain."""
    found: str | None = None
    for line in text.split("\n"):
        line = _COMMENT.sub("", line).rstrip(" ")
        if not line:
            continue
        if value := _STATE_DIR.fullmatch(line):
            if found is not None:
                return None
            found = value[1] or value[2] or value[3]
        elif not _balanced(line) or (not line.startswith(" ") and not _KEY.fullmatch(line)) or "state_dir" in line:
            return None
    return found or DEFAULT


def _balanced(line: str) -> bool:
    """Say whether a line begins nothing that could go on in the next one as anything but its own children."""
    closed = re.sub(r"\"[^\"\\]*\"|'[^']*'", "x", line)  # quoted on one line
    while (less := re.sub(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}", "x", closed)) != closed:
        closed = less
    return _PLAIN.fullmatch(closed) is not None
