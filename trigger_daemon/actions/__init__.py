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
    bandwidth: float | None = None  # bytes per second of all runs of this rule together
    written: Mapping[str, Any] | None = None  # options with templates, as the rule has them; None: not known any more
    keep: Mapping[str, str] = field(default_factory=dict)  # targets that are all that is left of a file: not replaced


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
    soon. `bandwidth()` returns the live limit in bytes per second of all that
    this provider moves, together, or None. `paused()` is true while all of ours
    is to stand still, `stopped(path)` says why nothing of ours may write to the
    volume of a path now, '' if it may. `reserve(path)` is how many bytes must
    stay free there, 0 where no volume is configured. `reserves()` says it of
    each file system ("major:minor") with a volume of which some must stay free,
    as bytes or else as a ratio of its size, for who learns only from what was
    opened where it lies. All of these return at once, for any thread, also for
    a path that does not exist. `state_dir` is a directory of the provider's
    own, for supervisors' records and the like, on local disk.
    """

    state_dir: str
    nudge: Callable[[int, int], None]
    bandwidth: Callable[[], float | None] = lambda: None
    paused: Callable[[], bool] = lambda: False
    settings: Mapping[str, Any] = field(default_factory=dict)
    stopped: Callable[[str], str] = lambda path: ""
    reserve: Callable[[str], int] = lambda path: 0
    reserves: Callable[[], Mapping[str, tuple[int | None, float | None]]] = dict


@runtime_checkable
class Action(Protocol):
    """An action provider; `Action(context)` makes one for the daemon's life.

    Names in braces that it fills into its strings itself it lists in `EXTRA_NAMES`; those that a rule's options give, a
    static method `extra_names(options)` returns. Such a name is left as it is when the batch closes.
    """

    OPTIONS: Options
    VERIFIES: bool  # `proof: required` is possible
    PREPARES: bool  # prepare() asks somebody; otherwise it is not called and prepared is None
    LEAVES_OUT: bool  # what it tells as `changed` it has not taken; otherwise it may have worked on it

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise OptionFault for options that are valid one by one but not together. Touches nothing.

        What a try can find out is looked at by a static method `look_online(options)`, where a provider has one, for
        `rules check --online`: it yields what was looked at, whether it is well, why not, a hint, and whether waiting
        may mend it.
        """

    def destination(self, options: Mapping[str, Any]) -> str:
        """Return the word for what is down when it is down (a mount, a host, a collection)."""

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return local directories this action writes to (for admission).

        An action that cannot take files of every name also has a method `refuses(options, root, path)`: it says, at
        once and without asking anybody, why it never takes this one, '' if it does. Such a file is blocked alone.
        """

    def prepare(self, request: Request) -> Json:
        """Fetch what the provider wants to give before the start. Raises Refused."""

    def start(self, request: Request, prepared: Json) -> Json:
        """Start the attempt and return its handle; repeating it identically is safe. Raises Refused, Unknown."""

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Return the handle of an attempt whose answer was lost, None if there surely is none; raise Unknown.

        A provider to which a repeated start is the same attempt may return None to have it repeated. It then has a
        method `look` of the same form beside this one, for attempts that nobody wants any more: its None is sure.
        """

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how a live attempt stands. Raises Unknown when the provider cannot be asked now."""

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the attempt to end; `poll` says when it has."""

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Prove the destination against the manifest.

        With `PROVES_PARTS = True` in its class it is also asked for a request that holds some of the files only.
        Where the copies cannot be looked at from here, a provider also has a method `stands(request, handle, record)`
        that says why a copy is not what a record of the proof says, '' if it is; without it all is proved again. With
        a method `targets(request)` it says where it would write each file, as `to` in its proofs names it; with a
        method `standing(request, tos)`, size and mtime_ns of what is at each (-1 if that cannot be told), None if
        nothing is (raises Refused); reclaim asks it for a name beside a copy, which may be the source by another way.
        """

    def close(self) -> None:
        """Let go of threads and children; what is under way may go on or be resumed after a restart."""
