"""What an action provider is. One file each beside this one; the file name is the word used in `start:`.

Everything around a provider (retry, concurrency, bandwidth, dry run, logging,
the journal) is done by the executor. A provider file holds only what is
particular: a class `Action` that fulfils the protocol below. All methods block
and are called on worker threads; none may assume that it runs in the process
that made the handle: after a crash only the JSON of `prepared` and `handle` is
left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from trigger_daemon.core.grammar import Options
from trigger_daemon.core.model import Fault

Json = Any


@dataclass(frozen=True, slots=True)
class File:
    """One file version of the manifest. `root` is the absolute directory, `path` is below it.

    Both are str with surrogate escapes (use os.fsencode). `role`: '' the file
    itself, companion, shared. `content`: '' or the digest of a part that the
    file carries itself, `md5:HEX:OFFSET:LENGTH`.
    """

    root: str
    path: str
    size: int
    mtime_ns: int
    role: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What an attempt is to do; frozen in the journal, so a repetition is identical."""

    run: int
    attempt: int
    rule: str
    group: Mapping[str, str]
    captures: Mapping[str, str]  # group, and all captures where the batch holds one file
    files: tuple[File, ...]
    options: Mapping[str, Any]  # validated, templates rendered


@dataclass(frozen=True, slots=True)
class Progress:
    """What `poll` says. `fault` goes with failed; `changed`: paths that are no longer the manifest's version."""

    status: Literal["active", "inactive", "succeeded", "failed", "cancelled"]
    why: str = ""
    hint: str = ""
    fault: Fault | None = None
    files_done: int = 0
    bytes_done: int = 0
    output: Json = None
    changed: tuple[str, ...] = ()
    again_in_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Proof:
    """The destination equals the manifest: one record a file with at least path, size, digest, to."""

    members: tuple[Mapping[str, Any], ...]
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Differs:
    """These members differ at the destination (path -> why); `changed` ones have changed at the source."""

    which: Mapping[str, str]
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unproven:
    """No proof could be had this time."""

    fault: Fault


class Refused(Exception):
    """The provider surely did not take the attempt."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.why)
        self.fault = fault


class Unknown(Exception):
    """Whether the attempt was taken cannot be told now; ask `find` or repeat. Any other exception means the same."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the executor gives a provider.

    `nudge(run, attempt)` may be called from any thread: there is news, poll
    soon. `bandwidth()` returns the live limit in bytes per second for this
    provider's next seconds, or None. `paused()` is true while all of ours is
    to stand still. `state_dir` is a directory of the provider's own, for
    supervisors' records and the like, on local disk.
    """

    state_dir: str
    nudge: Callable[[int, int], None]
    bandwidth: Callable[[], float | None] = lambda: None
    paused: Callable[[], bool] = lambda: False
    settings: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Action(Protocol):
    """An action provider; `Action(context)` makes one for the daemon's life."""

    OPTIONS: Options
    VERIFIES: bool  # `proof: required` is possible
    PREPARES: bool  # prepare() asks somebody; otherwise it is not called and prepared is None
    LEAVES_OUT: bool  # what it tells as `changed` it has not taken; otherwise it may have worked on it

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise OptionFault for options that are valid one by one but not together. Touches nothing."""

    def destination(self, options: Mapping[str, Any]) -> str:
        """Return the word for what is down when it is down (a mount, a host, a collection)."""

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return local directories this action writes to (for admission)."""

    def prepare(self, request: Request) -> Json:
        """Fetch what the provider wants to give before the start. Raises Refused."""

    def start(self, request: Request, prepared: Json) -> Json:
        """Start the attempt and return its handle; repeating it identically is safe. Raises Refused, Unknown."""

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Return the handle of an attempt whose answer was lost, None if there surely is none; raise Unknown."""

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how a live attempt stands. Raises Unknown when the provider cannot be asked now."""

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the attempt to end; `poll` says when it has."""

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Prove the destination against the manifest."""

    def close(self) -> None:
        """Let go of threads and children; what is under way may go on or be resumed after a restart."""
