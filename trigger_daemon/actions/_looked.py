"""What a try finds before rules are in force: one thing after the other, in words for who must act."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

PROBE = ".trigger-daemon-check"  # what is written, and removed again
PATIENCE_S = 60.0


class Looked(NamedTuple):
    """One thing that was looked at; `wait`: it may mend itself, no person is needed."""

    what: str
    ok: bool
    why: str = ""
    hint: str = ""
    wait: bool = False


def readable(what: str, path: str, *, secret: bool) -> Looked:
    """Look at a file that an option names: it can be read, and what is secret by nobody else."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as fault:
        return Looked(what, False, str(fault.strerror), "correct the rule, or let the daemon's user read it")
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Looked(what, False, f"others can read it (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
    return Looked(what, True)
