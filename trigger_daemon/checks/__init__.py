"""What a completeness check is. One file each beside this one; the file name is the word used in `checks:`.

A module holds `OPTIONS` and `check(probe, options, companions) -> Outcome`, and
may hold `check_options(options)`, which raises OptionFault for options that are
valid one by one but not together, and `check_usable(options)`, which raises it
where something that they need is not installed. `asks(options)` says whether
the check may answer with `needs`, which is of no use at a companion, and
`CARRIES_DIGEST = True` that it may answer with `content`. A check reads only
through the probe (bounded bytes, read-only, never locking) and runs on a worker
with a deadline, once per state of the file, after it was quiet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trigger_daemon.core.grammar import Options
from trigger_daemon.core.model import Verdict


class Window(Protocol):
    """A read-only, byte-limited window on one file (implemented by `probe.Probe`)."""

    name: str
    size: int
    siblings: Sequence[int]  # what this check measured of the rule's last files, newest last

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`; raise probe.TooMuch beyond the budget."""

    def holes(self) -> bool:
        """Say whether parts of the file were surely never written; False where that cannot be told."""

    def writers(self) -> bool | None:
        """Say whether a program has the file open for writing, by a read lease; None where that cannot be told."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A check's verdict in words a microscopist understands.

    `needs`: names of the same directory without which nothing can be said.
    They are awaited like companions (empty ones too) and handed in when they
    are quiet. `measure`: a number by which siblings are alike (frames, bytes);
    those of the last files come back as `Window.siblings`. `content`: the
    digest that the writer put into the file, of a part of it, as
    `md5:HEX:OFFSET:LENGTH`; it goes into the manifest.
    """

    verdict: Verdict
    why: str
    needs: tuple[str, ...] = ()
    measure: int | None = None
    content: str = ""


class Check(Protocol):
    OPTIONS: Options

    @staticmethod
    def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
        """Say whether the file is whole."""
