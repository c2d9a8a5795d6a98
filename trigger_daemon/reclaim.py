"""What could be given back: files that are proved elsewhere, set by set, and what stands in the way of the others.

Reads the journal and the disks, changes nothing. A set is a file with its
companions: they go together or not at all. Present proof is asked for, in this
order: every rule of `proven_by` is in force, has taken this very version, is
VERIFIED, and its proof holds the file; what it was proved to be at the
destination is there still; every other rule that wants the file has finished
with it, or was waived; `keep_for` is over; and the file is what was proved.
Whatever is not known keeps the file.

`keep_for` counts what daemons have witnessed, not what a clock says: one that
is set forward brings no deletion nearer, and a machine that was off waits longer.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trigger_daemon import registry
from trigger_daemon.core import patterns
from trigger_daemon.core.model import CLAIM_UNKNOWN, Member, RunState, State, join
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.rules import Rule
from trigger_daemon.core.templates import template_names
from trigger_daemon.errors import TriggerError
from trigger_daemon.eyes import Eyes, Hangs
from trigger_daemon.mounts import Places, remote
from trigger_daemon.reader import ClaimOf, Reader

_CAPTURE, _WILD = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}"), re.compile(r"[*?]")
PROOFS_KEPT_MAX = 64  # of runs, in memory
BATCHES_AT_ONCE = 100

# (run, record of its proof, state of its source, whether that was touched since) -> why it is not proved any more
Standing = Callable[[int, Mapping[str, Any], State, bool], str]
_WHERE = ("to", "path", "layout")  # what an action's options call where it sends to
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a set. `root` is absolute, `path` below it; `state` is what was last seen of it."""

    root: str
    path: str
    size: int
    mtime_ns: int
    number: int = 0  # of the root
    state: State = (0, 0, 0, 0)
    device: int = 0

    @property
    def full(self) -> str:
        return f"{self.root.rstrip('/')}/{self.path}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A set. `why`: what keeps it, '' if it may go; `until_time`: when `keep_for` is over, if only that keeps it."""

    rule: str
    batch: int
    parts: tuple[Part, ...]
    why: str = ""
    hint: str = ""
    until_time: float | None = None
    proofs: tuple[str, ...] = ()
    copies: tuple[Mapping[str, Any], ...] = ()  # for the audit: of each proof rule, run, time, [path, to, digest]

    @property
    def bytes(self) -> int:
        return sum(part.size for part in self.parts)


class _Kept(Exception):
    """Why a set is kept."""

    def __init__(self, why: str, hint: str = "", until_time: float | None = None) -> None:
        super().__init__(why)
        self.why, self.hint, self.until_time = why, hint, until_time


@dataclass(slots=True)
class _Proof:
    time: float
    witnessed: float
    begun_time: float
    members: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)  # absolute path -> one for each place


_Copy = tuple[str, int, Mapping[str, Any], Part]  # rule, run, record of the proof, of which file
_Proofs = dict[int, tuple[str, _Proof]]  # run -> its rule, and what it has proved


class Selection:
    """Goes through what rules with `reclaim` have taken, oldest first.

    `witnessed`: what daemons have worked here until now, in seconds (None: as the journal says). `after`: rule ->
    batch up to which nothing is there any more; it is brought up to date.
    """

    def __init__(
        self, reader: Reader, rules: Sequence[Rule], roots: Mapping[int, str], *, now: float,
        eyes: Eyes, witnessed: float | None = None, standing: Standing | None = None,
        after: dict[str, int] | None = None, undecided: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._reader = reader
        self._rules = {rule.name: rule for rule in rules}
        self._roots = roots
        self._now = now
        self._witnessed = float(reader.kept("witnessed") or 0.0) if witnessed is None else witnessed
        self._waived = frozenset(reader.kept("waived") or ())
        self._undecided = frozenset(undecided)
        self._eyes = eyes
        self._standing = standing or self._stands_by_look
        self._after = {} if after is None else after
        self._places = Places(eyes.beyond)
        self._proofs: dict[int, _Proof] = {}
        self._requests: dict[int, Mapping[str, Any] | None] = {}
        self._claims_known: dict[Part, list[ClaimOf]] = {}  # of the set that is judged
        self._looked_for: dict[str, list[tuple[str, re.Pattern[str], bool]]] = {}  # rule -> its companions

    def candidates(self, *, rules: Collection[str] | None = None) -> Iterator[Candidate]:
        """Yield every set that is still there, by age. Raises JournalError."""
        wanted = [one for one in self._rules.values() if one.reclaim and (rules is None or one.name in rules)]
        return heapq.merge(*map(self._of, wanted), key=lambda one: one.batch)

    def _of(self, rule: Rule) -> Iterator[Candidate]:
        after, empty = self._after.get(rule.name, 0), True
        while page := self._reader.taken_by(rule.name, after, BATCHES_AT_ONCE):
            for batch, members in page:
                after = batch
                for parts in self._sets(rule, members):
                    if (found := self._judged(rule, batch, parts)) is not None:
                        empty = False
                        yield found
                if empty:
                    self._after[rule.name] = after

    def of_file(self, rule: str, batch: int, path: str) -> Candidate | None:
        """Judge the set of a batch that holds a file, as itself or as a companion; None if its file is gone.

        Raises JournalError.
        """
        if (found := self._rules.get(rule)) is None or found.reclaim is None:
            return None
        page = self._reader.taken_by(rule, batch - 1, 1)
        if not page or page[0][0] != batch:
            return Candidate(rule, batch, (), f"what run {batch} took was thinned (`keep_done`), and with it the proof")
        for parts in self._sets(found, page[0][1]):
            if any(part.full == path for part in parts):
                return self._judged(found, batch, parts)
        return Candidate(rule, batch, (), "it is a companion that belongs to no file alone", "it stays, or remove it")

    def judge(self, rule: str, parts: Sequence[Part]) -> str:
        """Return why a set that was selected, and is not at its name now, is not proved any more; '' if it is."""
        if (found := self._rules.get(rule)) is None or found.reclaim is None:
            return f"the rule `{rule}` does not ask for reclaim any more"
        try:
            self._allowed(found, parts, {})
        except _Kept as kept:
            return kept.why
        return ""

    def _sets(self, rule: Rule, members: Sequence[Member]) -> Iterator[tuple[Part, ...]]:
        """Yield each file with those companions that belong to it alone."""
        companions = {self._part(m).full: self._part(m) for m in members if m.role == "companion"}
        belongs: dict[str, list[str]] = {}
        users: Counter[str] = Counter()
        files = [self._part(member) for member in members if not member.role]
        for part in files:
            known = self._companions(rule, part) if companions else ()
            belongs[part.full] = [path for path in known if path in companions]
            users.update(belongs[part.full])
        for part in files:
            yield part, *(companions[path] for path in belongs[part.full] if users[path] == 1)

    def _part(self, member: Member) -> Part:
        return Part(self._roots[member.root], member.path, member.size, member.mtime_ns, member.root)

    def _companions(self, rule: Rule, part: Part) -> Iterator[str]:
        """Yield where the companions of a file alone are, as the rule says it.

        One that is shared is never reclaimed, and one whose name says less than the file's may belong to others.
        """
        captures = patterns.captures_of(rule, part.path) or {}
        if len(rule.match) > 1 or any(_WILD.search(_CAPTURE.sub("", text)) for text in rule.match):
            return
        for one in rule.complete.companions:
            if not one.shared and captures.keys() <= set(template_names(one.file)):
                try:
                    yield join(one.root.rstrip("/"), str(patterns.render(one.file, captures)))
                except (ValueError, KeyError, PatternError):
                    continue

    # ------------------------------------------------------------------ judging

    def _judged(self, rule: Rule, batch: int, parts: tuple[Part, ...]) -> Candidate | None:
        """Return a set with what keeps it; None if its file is gone: there is nothing to give back."""
        proofs: _Proofs = {}
        try:
            first = self._there(parts[0])
            if first is None:
                return None
            seen = [first]
            for part in parts[1:]:
                if (found := self._there(part)) is None:
                    raise _Kept(f"its companion {os.path.basename(part.path)} is gone: nobody has reclaimed it")
                seen.append(found)
            parts = tuple(seen)
            self._allowed(rule, parts, proofs)
        except _Kept as kept:
            return Candidate(rule.name, batch, parts, kept.why, kept.hint, kept.until_time, _named(proofs))
        return Candidate(rule.name, batch, parts, proofs=_named(proofs), copies=self._copies(parts, proofs))

    def _allowed(self, rule: Rule, parts: Sequence[Part], proofs: _Proofs) -> None:
        """Raise _Kept unless all is proved, nobody else wants it and `keep_for` is over; put proofs into `proofs`."""
        assert rule.reclaim is not None
        if waiting := {rule.name, *rule.reclaim.proven_by} & self._undecided:
            raise _Kept(f"a change of the rule `{min(waiting)}` waits for a decision", "`trigger-daemon rules apply`")
        self._claims_known.clear()
        copies = [copy for part in parts for copy in self._proved(rule, part, proofs)]
        for part in parts:
            self._wanted(rule, part)
            self._came_back(part, max(proof.time for _, proof in proofs.values()))
        # A proof from the future (its journal was put back from a backup) is as good as one of now.
        left_s = rule.reclaim.keep_for_s - min(self._witnessed - proof.witnessed for _, proof in proofs.values())
        if left_s > 0:
            until = self._now + min(left_s, rule.reclaim.keep_for_s)
            raise _Kept("it is kept for `keep_for` after its last proof", until_time=until)
        self._distinct(copies)
        for name, run, record, part in copies:  # at last: this may ask services, or read whole files
            touched = _touched(part.state, record, proofs[run][1].begun_time, self._now)
            if why := self._standing(run, record, part.state, touched):
                raise _Kept(f"its copy of the rule `{name}` is not as it was proved: {why}",
                            "move that copy away, then `trigger-daemon files resend`")  # fmt: skip

    def _came_back(self, part: Part, proved_time: float) -> None:
        """Raise if this version was deleted here after it was proved: somebody has put it back."""
        for one in self._reader.reclaims_of(part.root, part.path):
            same = (one.size, one.mtime_ns) == (part.size, part.mtime_ns) and one.place in ("gone", "neither")
            if same and one.state == "done" and one.changed_time > proved_time:
                raise _Kept("it was deleted here after proof, and somebody has put it back",
                            "`trigger-daemon files resend` has it proved anew, and then it may go again")  # fmt: skip

    def _distinct(self, copies: Sequence[_Copy]) -> None:
        """Raise if what two rules have proved is one file, the source itself, or in memory only."""
        found: dict[tuple[str, int, int], str] = {}
        for name, _, record, part in copies:
            to = str(record.get("to") or "")
            if not os.path.isabs(to):
                continue
            if record.get("read_back") == "memory" and self._fstype(part.root) not in _IN_MEMORY:
                raise _Kept(f"its copy of the rule `{name}` is in memory, and gone with the next start: {to}")
            try:
                seen = self._eyes.lstat(to)
            except Hangs as error:  # nobody is sent there to read it
                raise _Kept(f"its copy of the rule `{name}` cannot be looked at: {error.strerror}",
                            "is its server well? it may go once that answers") from None  # fmt: skip
            except OSError:
                continue  # told when the copy is looked at
            if part.device and (seen.st_dev, seen.st_ino) == (part.device, part.state[3]):
                raise _Kept(f"its copy of the rule `{name}` is the file itself, by another way: {to}")
            if (other := found.setdefault((part.full, seen.st_dev, seen.st_ino), name)) != name:
                raise _Kept(f"its copies of the rules `{other}` and `{name}` are one file: {to}",
                            "let the rules copy to different places")  # fmt: skip

    def _stands_by_look(self, run: int, member: Mapping[str, Any], state: State, touched: bool) -> str:
        """Say what a look alone can tell: reading a copy is left to the daemon."""
        why = "its source was touched since; it is proved again before it goes" if touched else ""
        return stands(member, self._eyes) or why

    def _fstype(self, directory: str) -> str:
        mount = self._places.mount(directory)
        return "" if mount is None else mount.fstype

    def _copies(self, parts: Sequence[Part], proofs: _Proofs) -> tuple[Mapping[str, Any], ...]:
        """Return where the copies are, as the audit keeps it: it outlives the proofs.

        `known_as`: what else a place is known by, so that nobody replaces the copy by another way.
        """
        found = []
        for run, (rule, proof) in proofs.items():
            copies = [[part.full, member.get("to"), member.get("digest")]
                      for part in parts for member in proof.members.get(part.full, ())]
            places = {str(to) for _, to, _ in copies if os.path.isabs(str(to or ""))}
            names = {to: sorted(self._eyes.known_as(to) - {to}) for to in sorted(places)}
            found.append({"rule": rule, "run": run, "time": proof.time, "copies": copies, "known_as": names})
        return tuple(found)

    def _there(self, part: Part) -> Part | None:
        """Return a part with what is seen of it, None if it is gone. Raises _Kept if it is not what was taken."""
        try:
            seen = self._eyes.lstat(part.full)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _Kept(f"it cannot be looked at: {error.strerror}", "is its disk or share well?") from None
        if not stat.S_ISREG(seen.st_mode):
            raise _Kept("it is no regular file any more", "nothing to do: what is there is kept")
        if (seen.st_size, seen.st_mtime_ns) != (part.size, part.mtime_ns):
            raise _Kept("it is another version now", "nothing to do: its new version is sent first")
        if seen.st_nlink != 1:
            raise _Kept("it has more than one name (hard links)", "remove the others, or leave it")
        if (fstype := self._fstype(os.path.dirname(part.full))) and remote(fstype):  # `removal` would refuse it
            raise _Kept(f"it is on a share ({fstype}), where writers on other hosts cannot be seen",
                        "leave it, or reclaim it on the host that has the disk")  # fmt: skip
        return replace(part, state=(seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino),
                       device=seen.st_dev)  # fmt: skip

    def _proved(self, rule: Rule, part: Part, proofs: _Proofs) -> Iterator[_Copy]:
        """Yield each copy; raise unless every rule of `proven_by` has proved this version."""
        assert rule.reclaim is not None
        if not rule.reclaim.proven_by:
            raise _Kept("`proven_by` names no rule", "name the rules whose proofs let it go")
        for name in rule.reclaim.proven_by:
            other = self._rules.get(name)
            if other is None:
                raise _Kept(f"the rule `{name}` of `proven_by` is not in force", "correct `proven_by`, or the rules")
            claim = self._claim(other, part)
            if claim is None or claim.batch <= 0:
                raise _Kept(f"the rule `{name}` has not sent this version", "`trigger-daemon explain` says why")
            if claim.state != RunState.VERIFIED:
                raise _Kept(f"the rule `{name}` has not proved it: its run is {claim.state}",
                            "`trigger-daemon runs list` shows what it waits for")  # fmt: skip
            if not self._sends_there(other, claim.batch):
                raise _Kept(f"the rule `{name}` now sends elsewhere, and has not proved it there",
                            "`trigger-daemon files resend` sends it there, too; then it may go")  # fmt: skip
            proof = self._proof(claim.batch)
            members = [] if proof is None else proof.members.get(part.full, [])
            if proof is None or not members:
                raise _Kept(f"the proof of the rule `{name}` does not hold it", "it was left out, or that was thinned")
            for member in members:
                if (member.get("size"), member.get("mtime_ns", part.mtime_ns)) != (part.size, part.mtime_ns):
                    raise _Kept(f"the proof of the rule `{name}` is of another version")
                yield name, claim.batch, member, part
            proofs[claim.batch] = name, proof

    def _sends_there(self, rule: Rule, run: int) -> bool:
        """Say whether a rule would still send to where this run has sent."""
        if run not in self._requests:
            if len(self._requests) >= PROOFS_KEPT_MAX:
                self._requests.clear()
            self._requests[run] = self._reader.request_of(run)
        if (request := self._requests[run]) is None:
            return False
        then = {**request["options"], **(request.get("written") or {})}
        same = all(_plain(then.get(key)) == _plain(rule.options.get(key)) for key in _WHERE)
        return same and request["action"] == rule.action

    def _wanted(self, rule: Rule, part: Part) -> None:
        """Raise if another rule wants the file, as its own or as a companion, and has not finished with it."""
        assert rule.reclaim is not None
        claims = self._claims(part)
        for claim in claims:
            if claim.rule not in self._rules and claim.rule not in self._waived and claim.batch > 0:
                self._finished(claim, claim.state != RunState.SUCCEEDED, gone=True)
        for other in self._rules.values():
            if other.name in self._waived or other.name in rule.reclaim.proven_by:
                continue
            has = [claim for claim in claims if claim.rule == other.name]
            for claim in has:
                if claim.batch > 0:
                    self._finished(claim, other.proof == "required")
                elif claim.batch <= CLAIM_UNKNOWN:
                    raise _Kept("the journal was recovered, and does not know whether it was sent")
            below = self._places.below(other.watch, part.full)
            if not has and below is not None and patterns.captures_of(other, below) is not None:
                raise _Kept(f"the rule `{other.name}` wants it too, and has not taken it yet")
            taken = any(claim.companion for claim in has)
            self._looks_for(other, part, taken=taken)
            # Which files a check asks for is known when their master is there. Until then it may be any like it.
            alike = {os.path.splitext(text)[1] for text in other.match}
            if below is not None and not has and os.path.splitext(below)[1] in alike and _asks(other):
                raise _Kept(f"the checks of the rule `{other.name}` may ask for it, and it has not taken it yet",
                            "nothing to do, unless no file of that rule needs it: then keep it outside of its `watch`")

    def _looks_for(self, other: Rule, part: Part, *, taken: bool) -> None:
        """Raise if a file of this name may be the companion of one that a rule has not taken yet."""
        if other.name not in self._looked_for:
            self._looked_for[other.name] = [
                (one.root, _as_regex(one.file), one.shared) for one in other.complete.companions
            ]
        for root, pattern, shared in self._looked_for[other.name]:
            below = self._places.below(root, part.full)
            if below is None or not pattern.fullmatch(below):
                continue
            if shared:
                raise _Kept(f"the rule `{other.name}` shares it among its files")
            if not taken:
                raise _Kept(f"the rule `{other.name}` looks for it as a companion, and has not taken it yet")

    @staticmethod
    def _finished(claim: ClaimOf, proof: bool, *, gone: bool = False) -> None:
        if claim.state == RunState.VERIFIED or (not proof and claim.final):
            return
        what = f"the rule `{claim.rule}`" + (", which is gone," if gone else "")
        hint = f"end that run, or `trigger-daemon rules waive {claim.rule}` if nobody needs it any more" if gone else ""
        raise _Kept(f"{what} has not finished with it: run {claim.batch} is {claim.state}", hint)

    # ------------------------------------------------------------------ the journal

    def _claim(self, rule: Rule, part: Part) -> ClaimOf | None:
        """Return how a rule has dealt with this version, its newest batch first."""
        return next((one for one in self._claims(part) if one.rule == rule.name), None)

    def _claims(self, part: Part) -> list[ClaimOf]:
        """Return how rules have dealt with this version, below whichever root they know it."""
        if (known := self._claims_known.get(part)) is None:
            found: list[ClaimOf] = []
            for root in {*self._roots.values(), *(rule.watch for rule in self._rules.values())}:
                if (below := self._places.below(root, part.full)) is not None:
                    found += self._reader.claims_of(root, below)
            same = [one for one in found if (one.size, one.mtime_ns) == (part.size, part.mtime_ns)]
            known = self._claims_known[part] = sorted(same, key=lambda one: -one.batch)
        return known

    def _proof(self, run: int) -> _Proof | None:
        if run not in self._proofs:
            if len(self._proofs) >= PROOFS_KEPT_MAX:
                self._proofs.clear()
            kept = self._reader.proof_of(run)
            if kept is None:
                return None
            time, witnessed, begun, members = kept
            self._proofs[run] = proof = _Proof(time, witnessed, begun)
            for one in members:
                if "root" in one:
                    proof.members.setdefault(f"{str(one['root']).rstrip('/')}/{one['path']}", []).append(one)
        return self._proofs[run]


def stands(member: Mapping[str, Any], eyes: Eyes) -> str:
    """Return why a copy is not what was proved any more, '' if it is, or where that cannot be looked at from here."""
    target = str(member.get("to") or "")
    if not Path(target).is_absolute():
        return ""
    try:
        seen = eyes.lstat(target)
    except FileNotFoundError:
        return f"{target} is gone"
    except OSError as error:
        return f"{target} cannot be looked at: {error.strerror}"
    known = {"size": seen.st_size, "to_inode": seen.st_ino, "to_mtime_ns": seen.st_mtime_ns,
             "to_ctime_ns": seen.st_ctime_ns}  # fmt: skip
    if any(member.get(key) not in (None, value) for key, value in known.items()):
        return f"{target} was changed or replaced, or only touched"
    if "to_inode" in member and "to_ctime_ns" not in member:
        return f"{target} was not looked at under its name when it was proved"
    return ""


def _touched(state: State, record: Mapping[str, Any], begun_time: float, now: float) -> bool:
    """Say whether a source may have been rewritten with its size and time since it was read.

    What was read is told by its ctime and inode. Where a proof does not hold these, a source is touched whose ctime is
    younger than the attempt, or whose attempt was begun by a clock that was ahead.
    """
    if record.get("ctime_ns") is not None:
        return (state[2], state[3]) != (record["ctime_ns"], record.get("inode"))
    return state[2] > begun_time * 1e9 or begun_time > now


def _plain(value: Any) -> Any:
    """Return an option that says where, or several, in one form."""
    values = [value] if isinstance(value, str) else value
    return [os.path.normpath(str(one)) for one in values] if isinstance(values, (list, tuple)) else values


def _asks(rule: Rule) -> bool:
    """Say whether a check of a rule asks for other files than the rule names."""
    for name, options in rule.complete.checks:
        try:
            asks = getattr(registry.find_check(name), "asks", None)
        except TriggerError:  # not to be found: what it would ask for nobody knows
            return True
        if asks is not None and asks(options):
            return True
    return False


def _as_regex(template: str) -> re.Pattern[str]:
    """Return what any companion by this name matches; too much is safe."""
    return re.compile(".*".join(map(re.escape, _CAPTURE.split(template))), re.DOTALL | re.IGNORECASE)


def _named(proofs: _Proofs) -> tuple[str, ...]:
    return tuple(f"run {run} of {rule}" for run, (rule, _) in proofs.items())
