"""The words the house is built of: facts that reach the core, effects that leave it.

Pure values. Every fact carries its instant (`at`, `began`, `ended`: seconds on
the monotonic clock); the core never asks for the time. Paths are root-relative
POSIX strings, split into directory ("" is the root itself) and name, because
the disk, the journal and the watcher all think in directories. A byte that is
no UTF-8 is carried as its surrogate escape.

Facts and effects on the per-file path travel as one object per directory, with
plain tuples inside: an object per file would cost more than the look itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

# A look's result: size in bytes, mtime_ns, ctime_ns, inode. Compared for
# equality only; instrument clocks are wrong. The inode is 0 where the file
# system invents it (SMB).
State = tuple[int, int, int, int]

# Who wants a file: (rule id, newest batch of that rule which claimed an *other*
# version of this path, or 0). A negative rule id means: as a marker of that rule.
Want = tuple[int, int]

# name, state (None: absent, in a listing or look that succeeded), wants
Row = tuple[str, State | None, tuple[Want, ...]]

# Ages of claims: what a claim's batch column says when no batch took it.
CLAIM_BASELINE = 0  # there when the rule was first accepted with `existing: ignore`
CLAIM_SKIPPED = -1  # `files skip`
CLAIM_MARKER = -2  # a marker version that acted
CLAIM_REWRITE_IGNORED = -3  # `on_rewrite: ignore`
CLAIM_ONLY_FIRST = -4  # `only_first`: complete after its group's batch was full

# Added to a rule's number, in the journal, for versions that the rule has not claimed, or no more:
RIDER = 2**40  # its companion, last with this batch
RELEASED = 2**41  # was in this batch, which left it out

UNKNOWN = "unknown:"  # plus a UTC second: what a recovered journal says of files that were there before then
CLAIM_UNKNOWN = -5  # there before the journal was recovered, which does not know whether it was sent

# Room above a reserve that no file is begun in: for directories, inodes and files too small to be allocated. Of 8
# copies at once; xfs sets aside some 100 kB for each change of a directory that is under way.
RECORDS_BYTES = 2 * 2**20

Cause = Literal["hint", "deadline", "sweep"]
Signal = Literal["none", "close", "rename"]
Health = Literal["ok", "degraded", "suspect", "lost", "returned"]


def join(directory: str, name: str) -> str:
    """Return the root-relative path of a name in a directory."""
    return f"{directory}/{name}" if directory else name


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 file, 2 files, 2 batches."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("ch") else f"{number} {noun}s"


def split(path: str) -> tuple[str, str]:
    """Return directory and name of a root-relative path."""
    directory, _, name = path.rpartition("/")
    return directory, name


class RunState(StrEnum):
    """Where a run stands; the moves between are the table in `core/lifecycle.py`."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"
    SUCCEEDED = "SUCCEEDED"
    VERIFIED = "VERIFIED"
    HELD = "HELD"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    ABANDONED = "ABANDONED"
    SUPERSEDED = "SUPERSEDED"


class Verdict(StrEnum):
    """What a completeness check says; the worst of a set is the set's."""

    COMPLETE = "complete"
    UNKNOWN = "unknown"
    SUSPECT = "suspect"
    INCOMPLETE = "incomplete"


class Scope(StrEnum):
    """What a fault is about, and so what else it stops."""

    FILE = "file"
    BATCH = "batch"
    DESTINATION = "destination"
    CREDENTIAL = "credential"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an attempt did not succeed, and who can mend it."""

    kind: Literal["transient", "permanent", "person"]
    why: str
    hint: str = ""
    scope: Scope = Scope.BATCH
    retry_after_s: float | None = None  # the provider's own wish
    counts: bool = True  # whether it burns an attempt


# --------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at some names of one directory.

    `as_of`: the newest batch id whose claims were joined out of `rows` (a
    fully claimed version does not appear, or appears with empty wants when it
    was asked for by a `Look`); -1 when claims were not consulted.
    """

    root: int
    dir: str
    rows: Sequence[Row]
    began: float
    ended: float
    cause: Cause
    signal: Signal = "none"
    as_of: int = -1


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Names that could not be looked at (EACCES, sharing violation, EIO): not yet, never gone."""

    root: int
    dir: str
    names: tuple[str, ...]
    why: str
    at: float


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep ended. `ok` only if the root was healthy before and after and every directory answered.

    `watermark` is the instant it started. `asked` is the largest `Sweep.ask` it covers.
    """

    root: int
    full: bool
    watermark: float
    ended: float
    ok: bool
    files: int = 0
    asked: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class RootChanged:
    """A root's health changed, or its source of hints did."""

    root: int
    health: Health
    why: str
    hint: str
    events: str  # inotify | watchdog | none
    at: float


@dataclass(frozen=True, slots=True)
class Marked:
    """A root's worker has answered everything it was asked before; its claims are read as of this batch."""

    root: int
    as_of: int
    at: float


@dataclass(frozen=True, slots=True)
class Checked:
    """All checks of one file (or of one companion) answered, about exactly `state`."""

    rule: int
    root: int
    path: str
    state: State
    verdict: Verdict
    why: str
    at: float
    needs: tuple[str, ...] = ()  # names, relative to the file's directory
    measures: tuple[tuple[str, int], ...] = ()  # check -> what it measured, for comparison with siblings
    content: str = ""  # digest of a part, from the file itself: md5:HEX:OFFSET:LENGTH
    scope: str = ""  # that of its `Check`
    read: tuple[str, ...] = ()  # names of companions that the checks have read


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `utc` pairs the monotonic instant with the wall clock (Unix seconds)."""

    at: float
    utc: float


@dataclass(frozen=True, slots=True)
class Prepared:
    run: int
    attempt: int
    prepared: Any  # opaque JSON
    at: float


@dataclass(frozen=True, slots=True)
class Started:
    """The provider took the attempt; `handle` is what it is recognised by from now on (opaque JSON)."""

    run: int
    attempt: int
    handle: Any
    at: float


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The provider surely did not take the attempt (from prepare, start or find).

    `preparing`: it is the answer to a prepare; one that comes late says nothing of an attempt made since.
    """

    run: int
    attempt: int
    fault: Fault
    at: float
    preparing: bool = False


@dataclass(frozen=True, slots=True)
class StartUnknown:
    """The answer was lost: the attempt may or may not be under way."""

    run: int
    attempt: int
    why: str
    at: float


@dataclass(frozen=True, slots=True)
class Polled:
    """What the provider says of a live attempt. `changed`: members that were no longer the version of the manifest."""

    run: int
    attempt: int
    status: Literal["active", "inactive", "succeeded", "failed", "cancelled", "unreachable"]
    at: float
    why: str = ""
    hint: str = ""
    fault: Fault | None = None
    files_done: int = 0
    bytes_done: int = 0
    output: Any = None
    changed: tuple[str, ...] = ()
    again_in_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Proved:
    """The destination equals the manifest. `members`: JSON-able records with at least path, size, digest, to."""

    run: int
    attempt: int
    members: Sequence[Mapping[str, Any]]
    at: float
    changed: tuple[str, ...] = ()  # members left out because they have a newer version or are gone


@dataclass(frozen=True, slots=True)
class Mismatch:
    """These members do not match at the destination; `changed` ones no longer match at the source."""

    run: int
    attempt: int
    which: Mapping[str, str]  # path -> why
    at: float
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CannotVerify:
    """No proof could be had this time (`fault` says whether later may be better)."""

    run: int
    attempt: int
    fault: Fault
    at: float


@dataclass(frozen=True, slots=True)
class Order:
    """A person's wish, or a question that only the live engine can answer."""

    id: int
    verb: str
    args: Mapping[str, Any]
    who: str
    why: str
    at: float


@dataclass(frozen=True, slots=True)
class RulesOffered:
    """A rule set was read without a fault (`rules`) or with faults (`fault`: file, line, column, message, hint)."""

    rules: tuple[Any, ...]  # core.rules.Rule
    roots: Mapping[str, int]  # watch path -> root id
    source: Any  # what the journal keeps of it (JSON)
    at: float
    fault: Mapping[str, Any] | None = None
    applied: str = ""  # '' | same | all | new : answer of `rules apply`


@dataclass(frozen=True, slots=True)
class Gauged:
    """A reading of one volume, begun at `at`."""

    volume: str
    free_bytes: int
    total_bytes: int
    at: float
    free_inodes: int = -1
    inodes: int = 0  # 0: the file system has no such limit
    error: str = ""  # why it could not be read; then nothing else is told
    away: str = ""  # what to do about it: its mount is gone, and what lies beneath is another disk


@dataclass(frozen=True, slots=True)
class Mounted:
    """Where the volumes lie: every mount point, with the volume it belongs to, '' for none."""

    table: Mapping[str, str]
    at: float


@dataclass(frozen=True, slots=True)
class Pressed:
    """What the machine is doing: loads as ratios (None: not to be had), which of the named processes run."""

    cpu: float | None
    io: float | None
    processes: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class Vanished:
    """A full sweep of a healthy root listed this directory without these claimed names (None: it is gone itself)."""

    root: int
    dir: str
    names: tuple[str, ...] | None
    at: float


@dataclass(frozen=True, slots=True)
class ReclaimFile:
    """A file version that reclaim takes away, and the name that it has until then."""

    root: int
    path: str
    state: State
    hidden: str


@dataclass(frozen=True, slots=True)
class ReclaimSet:
    """Files that go together or not at all, and what proves each of them elsewhere: JSON, for people."""

    rule: int
    run: int  # that took them
    files: tuple[ReclaimFile, ...]
    proofs: Sequence[Mapping[str, Any]] = ()
    due_always: bool = False  # `only_under: always`

    @property
    def bytes(self) -> int:
        return sum(file.state[0] for file in self.files)


@dataclass(frozen=True, slots=True)
class Selected:
    """Sets that could go, the oldest first. `why`: why they could not be looked for."""

    sets: tuple[ReclaimSet, ...]
    rules_at: int
    at: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Removed:
    """What a phase of `Remove` did. `places` empty: it has not come back yet."""

    id: int
    phase: Literal["aside", "gone", "back"]
    ok: bool
    places: tuple[str, ...]
    why: str
    hint: str
    at: float
    kept: tuple[tuple[str, str], ...] = ()  # absolute: the name that is taken, where its old file is now


@dataclass(frozen=True, slots=True)
class LookedBack:
    """The runs of a rule that ended well, as far as the journal knows: the newest of each group, the newest first.

    `thinned`: how many there are of which nobody can say any more what they were about. `why`: it could not be read.
    """

    ask: int
    rule: int
    runs: Sequence[tuple[int, Mapping[str, str]]]  # number, captures
    thinned: int
    at: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Troubled:
    """An edge of ours has a lasting trouble that a person should know of; an empty `what` ends it."""

    key: str  # of the alarm
    what: str
    hint: str
    at: float


Fact = (
    Seen
    | Unreadable
    | Vanished
    | Swept
    | RootChanged
    | Marked
    | Checked
    | Tick
    | Prepared
    | Started
    | NotStarted
    | StartUnknown
    | Polled
    | Proved
    | Mismatch
    | CannotVerify
    | Order
    | RulesOffered
    | Gauged
    | Mounted
    | Pressed
    | Selected
    | Removed
    | LookedBack
    | Troubled
)


# ------------------------------------------------------------------------- effects
# Records are written by the journal, all of a step in one commit; every other
# effect is carried out only after that commit.


class Member(NamedTuple):
    """One file version in a batch.

    `role`: '' the file itself, companion, shared; `flag`: '' or suspect;
    `content`: '' or the digest of a part that the file carries itself,
    `md5:HEX:OFFSET:LENGTH`.
    """

    root: int
    dir: str
    name: str
    size: int
    mtime_ns: int
    role: str = ""
    flag: str = ""
    content: str = ""

    @property
    def path(self) -> str:
        return join(self.dir, self.name)


@dataclass(frozen=True, slots=True)
class BatchClosed:
    """Record: a closed batch, its claims, and its run (PENDING)."""

    batch: int
    rule: int
    group: Mapping[str, str]
    reason: str
    time: float  # UTC
    members: Sequence[Member]
    bytes: int
    request: Mapping[str, Any]  # action, options rendered for this batch
    destination: str
    waits_on: tuple[int, ...] = ()  # runs that must end first (an earlier version of the same file)
    again: bool = False  # `files resend`: claims exist already and move to this batch


@dataclass(frozen=True, slots=True)
class Claimed:
    """Record: versions dealt with for a rule without a batch; `code` is a CLAIM_* value."""

    rule: int
    root: int
    dir: str
    rows: Sequence[tuple[str, int, int]]  # name, size, mtime_ns
    code: int
    time: float


@dataclass(frozen=True, slots=True)
class RunMoved:
    """Record: a transition. Fields that are None stay as they are."""

    run: int
    from_state: RunState
    to_state: RunState
    because: str
    time: float
    final: bool
    error: str | None = None
    hint: str | None = None
    attempts: int | None = None
    output: Any = None
    retry_time: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptMade:
    """Record: everything needed to recognise an attempt, before the provider is asked."""

    run: int
    attempt: int
    prepared: Any
    time: float


@dataclass(frozen=True, slots=True)
class AttemptChanged:
    """Record: an attempt's handle, or its end."""

    run: int
    attempt: int
    handle: Any = None
    ended_time: float | None = None
    outcome: str | None = None


@dataclass(frozen=True, slots=True)
class ProofKept:
    """Record: the proof of an attempt. `witnessed`: the engine's age then, in seconds; `keep_for` counts by it."""

    run: int
    attempt: int
    members: Sequence[Mapping[str, Any]]
    time: float
    witnessed: float = 0.0


@dataclass(frozen=True, slots=True)
class BaselineSet:
    rule: int
    root: int
    time: float


@dataclass(frozen=True, slots=True)
class GroupSet:
    """Record: a durable mark on a rule's group.

    `kind`: taken (`only_first` closed), succeeded (for `after`), followed (its
    successes are remembered by these captures, a JSON list; `batch`: how many
    older ones are thinned too far to tell), at (last `batch.at`), late (a
    companion that a file went without is looked for).
    """

    rule: int
    group: str  # canonical JSON
    kind: str
    batch: int
    time: float


@dataclass(frozen=True, slots=True)
class GroupForgotten:
    rule: int
    group: str
    kind: str


@dataclass(frozen=True, slots=True)
class AlarmRaised:
    key: str
    what: str
    hint: str
    time: float


@dataclass(frozen=True, slots=True)
class AlarmCleared:
    key: str
    time: float


@dataclass(frozen=True, slots=True)
class AlarmAcked:
    key: str
    who: str
    time: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Record: a small durable setting (pauses, accepted decisions)."""

    key: str
    value: Any  # None removes it


@dataclass(frozen=True, slots=True)
class RulesAccepted:
    source: Any
    time: float


@dataclass(frozen=True, slots=True)
class Ordered:
    """Record: an order that was carried out or refused."""

    id: int
    verb: str
    args: Mapping[str, Any]
    who: str
    why: str
    answer: Mapping[str, Any]
    time: float


@dataclass(frozen=True, slots=True)
class Renewed:
    """Record: from now on a run is to do what its rule says now."""

    run: int
    request: Mapping[str, Any]
    destination: str
    time: float


@dataclass(frozen=True, slots=True)
class Released:
    """Record: a run left these files out: gone, or another version. Should one come back as it was, it is wanted.

    The claim stays for the history. What was left out as its rewrite (`on_rewrite: ignore`) is wanted, too.
    """

    rule: int
    root: int
    batch: int
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Record: delete claims of vanished names (None: of the directory) whose runs ended before `before`."""

    root: int
    dir: str
    names: tuple[str, ...] | None
    before: float  # UTC


@dataclass(frozen=True, slots=True)
class ClaimsCarried:
    """Record: a rule's root moved with its files: what was claimed below the old one is claimed below the new."""

    rule: int
    from_root: int
    to_root: int


@dataclass(frozen=True, slots=True)
class ReclaimIntended:
    """Record: a set is to be taken away."""

    id: int
    of: ReclaimSet
    time: float


@dataclass(frozen=True, slots=True)
class ReclaimMoved:
    """Record: confirmed (all are aside, and proved still), or how it ended: done, kept."""

    id: int
    state: Literal["confirmed", "done", "kept"]
    because: str
    places: tuple[str, ...]  # of its files, in their order; '' while nobody knows
    time: float


RECORDS = (
    ReclaimIntended,
    ReclaimMoved,
    ClaimsCarried,
    Renewed,
    Released,
    Forgotten,
    BatchClosed,
    Claimed,
    RunMoved,
    AttemptMade,
    AttemptChanged,
    ProofKept,
    BaselineSet,
    GroupSet,
    GroupForgotten,
    AlarmRaised,
    AlarmCleared,
    AlarmAcked,
    Kept,
    RulesAccepted,
    Ordered,
)


@dataclass(frozen=True, slots=True)
class Look:
    """Look at these names now and answer with `Seen(cause='deadline')`, claims joined, absent ones included."""

    root: int
    dir: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Sweep the root from now on; `Swept.asked` >= `ask` answers it."""

    root: int
    full: bool
    ask: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Ask a root's worker for `Marked`, behind all it was asked before."""

    root: int


@dataclass(frozen=True, slots=True)
class HoldSweeps:
    """The core has enough to chew: sweeps wait (looks and hints go on)."""

    on: bool


@dataclass(frozen=True, slots=True)
class Check:
    """Run the checks on one file; answered by `Checked` with the same rule, root, path and state."""

    rule: int
    root: int
    path: str
    state: State
    checks: tuple[tuple[str, Mapping[str, Any]], ...]
    companions: tuple[tuple[int, str], ...] = ()  # (root, path)
    siblings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # check -> measures of the last files
    scope: str = ""  # whose checks: '' the rule's own, else those of a companion of it


@dataclass(frozen=True, slots=True)
class Prepare:
    run: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Start:
    run: int
    attempt: int
    prepared: Any


@dataclass(frozen=True, slots=True)
class Find:
    """The answer to `Start` was lost: look for the attempt, or repeat it identically.

    Without `start` nobody wants it any more: it is looked for, so that it can be ended, and never begun.
    """

    run: int
    attempt: int
    prepared: Any
    start: bool = True


@dataclass(frozen=True, slots=True)
class Poll:
    run: int
    attempt: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Cancel:
    run: int
    attempt: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Verify:
    run: int
    attempt: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to an order or a question; `ok` false carries `error` and `hint`."""

    order: int
    answer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UseRules:
    """Scanner, hints and executor work with this rule set from now on."""

    rules: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """One log line: a constant event name and its keys."""

    event: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Throttled:
    """What of ours must stand still, or go slowly, from now on."""

    paused: str  # why nothing may work, '' if it may
    bandwidth: int | None  # bytes per second for all copies together
    stopped: Mapping[str, str]  # volume -> why nothing may be written there
    often: bool = False  # a condition comes and goes: not each time is worth a line


@dataclass(frozen=True, slots=True)
class OnCritical:
    """Run the settings' command for a volume that has become critical."""

    volume: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """Look for sets of these rules that could go, the oldest first; `Selected` answers with the same `rules_at`."""

    rules: tuple[str, ...]
    wanted_bytes: int | None  # enough then; None: as many as one answer holds
    rules_at: int
    skipped: frozenset[tuple[int, str]] = frozenset()  # first files (root, path) of sets that are left alone for now


@dataclass(frozen=True, slots=True)
class LookBack:
    """Ask the journal for a rule's runs that ended well; `LookedBack` answers with the same `ask`."""

    ask: int
    rule: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Do one phase of taking a set away, `aside` and `gone` only if it is proved still; answered by `Removed`."""

    id: int
    phase: Literal["aside", "gone", "back"]
    of: ReclaimSet


Effect = (
    ClaimsCarried
    | Renewed
    | Released
    | Forgotten
    | BatchClosed
    | Claimed
    | RunMoved
    | AttemptMade
    | AttemptChanged
    | ProofKept
    | BaselineSet
    | GroupSet
    | GroupForgotten
    | AlarmRaised
    | AlarmCleared
    | AlarmAcked
    | Kept
    | RulesAccepted
    | Ordered
    | Look
    | Sweep
    | Mark
    | HoldSweeps
    | Check
    | Prepare
    | Start
    | Find
    | Poll
    | Cancel
    | Verify
    | Answer
    | UseRules
    | Log
    | Throttled
    | OnCritical
    | ReclaimIntended
    | ReclaimMoved
    | Select
    | LookBack
    | Remove
)
