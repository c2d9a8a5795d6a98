"""What a completeness check is. One file each beside this one; the file name is the word used in `checks:`.

A module holds `OPTIONS` and `check(probe, options, companions) -> Outcome`. It
reads only through the probe (bounded bytes, read-only, never locking) and runs
on a worker with a deadline, once per state of the file, after it was quiet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trigger_daemon.core.grammar import Options
from trigger_daemon.core.model import Verdict


class Window(Protocol):
    """A read-only, byte-limited window on one file (implemented by `probe.Probe`)."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`; raise probe.TooMuch beyond the budget."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A check's verdict in words a microscopist understands; `needs` names files of the same directory."""

    verdict: Verdict
    why: str
    needs: tuple[str, ...] = ()


class Check(Protocol):
    OPTIONS: Options

    @staticmethod
    def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
        """Say whether the file is whole."""
