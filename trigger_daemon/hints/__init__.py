"""Sources of hints: something that says "look there", and may be wrong, late, or silent.

A source never touches the watched file system by itself. The root's own worker
calls `watch` on each directory just before it lists it (watch, then list, so
that nothing falls between), and drains hints with `take`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from trigger_daemon.core.model import Signal
from trigger_daemon.errors import TriggerError


class WatchLimit(TriggerError):
    """The kernel refuses more watches; message and hint name the sysctl, its value, and what is needed."""


@dataclass(slots=True)
class Hints:
    """What gathered since the last take, duplicates folded. Directories are root-relative bytes.

    `names[dir][name]` is the last signal heard of a name: a file created after a
    rename is another file, which the rename must not vouch for. `dirs`:
    directories to be swept with all below (made, moved in, or too many hints).
    `all`: the whole root must be swept, each directory watched again (overflow,
    unknown watch, root moved).
    """

    names: dict[bytes, dict[bytes, Signal]] = field(default_factory=dict)
    dirs: set[bytes] = field(default_factory=set)
    all: bool = False
    root_gone: bool = False


class HintSource(Protocol):
    kind: str  # inotify | watchdog | none

    def open(self, root: int, path: bytes, wake: Callable[[], None]) -> None:
        """Begin a root; `wake` is called (from any thread, cheaply) when its hints go from none to some."""

    def close(self, root: int) -> None:
        """Forget a root and its watches."""

    def watch(self, root: int, directory: bytes) -> None:
        """Watch one directory ("" is the root); idempotent. Raises WatchLimit, or OSError if it is gone."""

    def take(self, root: int) -> Hints | None:
        """Return and clear what gathered, None if nothing."""

    def alive(self) -> str:
        """Return '' if the source works, else what is wrong; a broken one has restarted itself and asks for sweeps.

        To be called each second or so: supervision and slow repairs are done here.
        """

    def counters(self) -> dict[str, int]:
        """Return watches, events, overflows, restarts."""

    def stop(self) -> None:
        """End threads and descriptors."""


def open_source(setting: Literal["auto", "inotify", "watchdog", "none"]) -> HintSource:
    """Return the source of hints that the setting `events` names; auto is inotify on Linux, watchdog elsewhere.

    Raises TriggerError if what was asked for by name cannot work on this machine;
    `auto` then goes on without hints, and `alive` says why.
    """
    if setting == "none":
        from trigger_daemon.hints import none

        return none.Source()
    if setting == "inotify" or (setting == "auto" and sys.platform == "linux"):
        if sys.platform != "linux":
            raise TriggerError("inotify exists on Linux only", hint="set `events: auto`")
        from trigger_daemon.hints import inotify

        return inotify.Source()
    from trigger_daemon.hints import none, watchdog

    try:
        return watchdog.Source()
    except TriggerError as error:
        if setting == "auto":
            return none.Source(f"{error.message} ({error.hint})")
        raise
