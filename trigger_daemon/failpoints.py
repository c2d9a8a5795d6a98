"""Named places where a test may make the program fail, exactly there.

`TRIGGER_FAIL="copy.proved:kill, copy.verify:eio@3"` kills the process when it
comes to the first place, and raises EIO the third time it comes to the second.
Unset, a fail point costs one look at an empty dictionary.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from pathlib import Path

_CALL = re.compile(r"\bfail_point\(\s*\"([a-z0-9_.]+)\"")


class _Planned:
    """One failure to come: what happens, at which visit (counted per process)."""

    def __init__(self, action: str, visit: int) -> None:
        self.action = action
        self.visit = visit
        self.visits = 0

    def __call__(self) -> bool:
        self.visits += 1
        if self.visit and self.visits != self.visit:
            return False
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill_parent":
                os.kill(os.getppid(), signal.SIGKILL)
            case "hang":
                time.sleep(1e6)
            case "stop":  # until a test, which has done its worst meanwhile, lets it go on
                # To this thread: another one that is to stop all may take its time, and this one would go on.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            case "flag":
                return True
            case word:
                code = getattr(errno, word.upper())
                raise OSError(code, os.strerror(code))
        return False


def _plan(text: str) -> dict[str, _Planned]:
    """Read `name:action[@visit]`, comma separated; raise ValueError for anything else."""
    planned = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"([a-z0-9_.]+):(kill|kill_parent|hang|stop|flag|e[a-z0-9]+)(?:@(\d+))?", item)
        if not found or (found[2].startswith("e") and not hasattr(errno, found[2].upper())):
            raise ValueError(f"TRIGGER_FAIL: {item!r} is not NAME:kill|kill_parent|hang|stop|flag|ERRNO[@VISIT]")
        planned[found[1]] = _Planned(found[2], int(found[3] or 0))
    return planned


_FAIL = _plan(os.environ.get("TRIGGER_FAIL", ""))


def fail_point(name: str) -> bool:
    """Fail here if a test asked for it; True (action `flag`) asks the caller to do the damage itself."""
    return bool(_FAIL) and name in _FAIL and _FAIL[name]()


def plan(text: str) -> None:
    """Replace what is planned for this process, in the words of TRIGGER_FAIL; '' clears it."""
    _FAIL.clear()
    _FAIL.update(_plan(text))


def names() -> list[str]:
    """Return every fail point in the package's source, so that a test can demand that each is exercised."""
    package = Path(__file__).parent
    found: set[str] = set()
    for file in package.rglob("*.py"):
        found.update(_CALL.findall(file.read_text(encoding="utf-8")))
    return sorted(found)
