"""What the looks and the sweeps of one root share: the tree, its claims, its rules, and where answers go.

Used by one thread. Says of every name it was given what became of it: a row,
absent, or unreadable; and concludes absence only while the root is believed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from trigger_daemon.clock import Clock
from trigger_daemon.core.model import Fact, RootChanged, Row, Signal, State, Unreadable, Want, join
from trigger_daemon.core.patterns import Matcher
from trigger_daemon.core.rules import Rule
from trigger_daemon.hints import HintSource, WatchLimit
from trigger_daemon.looks import ABSENT, CHUNK_MAX, TROUBLE, Listing, Looked, list_directory, look, stat_directory
from trigger_daemon.mounts import LOCAL_TYPES
from trigger_daemon.roots import Beat, Identity, Root

CHECK_S = 5.0  # between two looks at the root itself while nothing else asks for one
WORDS_MAX = 200  # of a path in a sentence: paths may have 4,096 bytes and more

Claim = tuple[int, int, int, int]  # rule, size, mtime_ns, batch


class Claims(Protocol):
    """What the journal's claims answer (journal.ClaimReader)."""

    def directory(self, root: int, dir: str, /) -> tuple[int, Mapping[str, Sequence[Claim]]]: ...

    def names(self, root: int, dir: str, names: Sequence[str], /) -> tuple[int, Mapping[str, Sequence[Claim]]]: ...

    def together(self) -> AbstractContextManager[None]: ...

    def directories(self, root: int, /) -> Iterator[str]: ...

    def close(self) -> None: ...


class Outlet(Protocol):
    """Where a worker's answers go."""

    def post(self, fact: Fact) -> None:
        """Hand a fact on; blocks while the core has enough to do. Raises Abandoned."""

    def done(self, serial: int) -> None:
        """A `Look` was answered."""

    def keep(self, identity: dict[str, Any]) -> None:
        """Keep the root's identity durably."""


class Abandoned(Exception):
    """Nobody waits for this worker any more."""


class NeedsProcess(Exception):
    """The root lies on a file system that can hang: a thread must not touch it."""


class _Plain(dict[tuple[int, ...], tuple[Want, ...]]):
    """Rule ids -> wants without claims, made once."""

    def __missing__(self, ids: tuple[int, ...]) -> tuple[Want, ...]:
        wants = self[ids] = tuple((rule, 0) for rule in ids)
        return wants


class Desk:
    """One root, as its worker handles it."""

    def __init__(
        self,
        root: int,
        path: str,
        *,
        outlet: Outlet,
        open_claims: Callable[[], Claims],
        hints: HintSource | None,
        wake: Callable[[], None],
        clock: Clock,
        identity: Identity | None,
        returning: bool,
        threaded: bool,
        local_types: frozenset[str] = LOCAL_TYPES,
    ) -> None:
        self.root = root
        self.path = path.rstrip("/") or "/"
        self.now = clock.monotonic
        self.beat = Beat()
        self.claims: Claims  # from `open` on: a reader belongs to the thread that made it
        self.epoch = 0  # of the root, as far as this desk has begun anew
        self.returning = returning  # back, but not swept yet
        self.check_at = 0.0
        self.events = "none"
        self.blocked_s = 0.0  # time spent waiting for the core
        self.hint_fault = ""  # set by the supervisor: what is wrong with the source of hints
        self.told: tuple[str, str, str, str] | None = None
        self.at = Root(
            self.path,
            identity=identity,
            keep=outlet.keep,
            has_claims=lambda: next(iter(self.claims.directories(root)), None) is not None,
            monotonic=clock.monotonic,
            beat=self.beat,
            local_types=local_types,
        )
        self._below = "" if self.path == "/" else self.path
        self._outlet = outlet
        self._open_claims = open_claims
        self._hints = hints
        self._wake = wake
        self._listening = False
        self._threaded = threaded
        self._degraded: dict[str, tuple[str, str]] = {}  # what -> why, hint
        self.use(())

    def open(self) -> None:
        self.claims = self._open_claims()

    def use(self, rules: Sequence[Rule]) -> None:
        """Match with these rules from now on."""
        self.matcher = Matcher(rules)
        self.trusting: dict[Signal, frozenset[int]] = {
            "none": frozenset(),
            "close": frozenset(rule.id for rule in rules if "close" in rule.complete.trust),
            "rename": frozenset(rule.id for rule in rules if "rename" in rule.complete.trust),
        }
        self.plain = _Plain()

    def post(self, fact: Fact) -> None:
        before = self.now()
        self._outlet.post(fact)
        self.blocked_s += self.now() - before

    def words(self, directory: str, name: str = "") -> str:
        """Return a path for people, not too long of it."""
        path = f"{self._below}/{join(directory, name) if name else directory}"
        return path if len(path) <= WORDS_MAX else f"{path[: WORDS_MAX // 2]}…{path[-WORDS_MAX // 2 :]}"

    # ------------------------------------------------------------------ health

    @property
    def believed(self) -> bool:
        return self.at.believed

    @property
    def distrust(self) -> str:
        """Say why nothing is concluded from this root now."""
        return f"root {self.at.health}: {self.at.why}"

    def check(self, *, deep: bool = False, accept: bool = False) -> bool:
        """Look at the root itself, tell what changed, and return whether it is believed. Raises NeedsProcess."""
        self.check_at = self.now() + CHECK_S
        believed = self.at.check(deep=deep, accept=accept)
        if self.at.remote and self._threaded:
            raise NeedsProcess(self.at.mount.fstype if self.at.mount else "")
        if not believed:
            self.returning = True
        elif self.at.epoch != self.epoch:
            self.epoch = self.at.epoch
            self.returning = True
            self._degraded.clear()
            self._listening = False
        if believed and not self._listening:
            self._listen()
        if self.events != "none":
            self.degrade("hints", self.hint_fault, "its files are found by sweeps until it works again")
        self.tell()
        return believed

    def _listen(self) -> None:
        """Begin the root's hints, or begin them anew: watches of a tree that was away are worth nothing."""
        self._listening = True
        if self._hints is None or self.at.remote:
            self.events = "none"
            return
        self._hints.open(self.root, os.fsencode(self.path), self._wake)
        self.events = self._hints.kind

    def degrade(self, what: str, why: str, hint: str = "") -> None:
        """Note what is not as it should be; an empty `why` ends it."""
        if why:
            self._degraded[what] = (why, hint)
        else:
            self._degraded.pop(what, None)

    def tell(self) -> None:
        """Post RootChanged if there is something new to say."""
        at = self.at
        if not at.believed:
            now = (at.health, at.why, at.hint, self.events)
        elif self.returning:
            now = ("returned", f"{self.path} is back; sweeping it", "", self.events)
        elif self._degraded:
            why, hint = next(iter(self._degraded.values()))
            now = ("degraded", why, hint, self.events)
        else:
            fstype = at.mount.fstype if at.mount is not None and at.remote else ""
            now = ("ok", f"{fstype} tells nothing of remote writers: sweeps only" if fstype else "", "", self.events)
        if now != self.told:
            self.told = now
            self.post(RootChanged(self.root, now[0], now[1], now[2], now[3], self.now()))

    # ------------------------------------------------------------------ the disk

    def lstat(self, directory: str, names: Sequence[str], *, known: bool) -> list[Looked]:
        """Look at up to CHUNK_MAX names; `known`: a walk has reached the directory without links."""
        self.beat.doing = ("lstat", self.words(directory), self.now())
        try:
            return look(self.path, directory, names, self.now, known=known)
        finally:
            self.beat.doing = None

    def stat(self, directory: str) -> os.stat_result:
        """Return the state of a directory itself. Raises OSError."""
        self.beat.doing = ("stat", self.words(directory), self.now())
        try:
            return stat_directory(self.path, directory)
        finally:
            self.beat.doing = None

    def listing(self, directory: str) -> Listing:
        """List a directory. Raises OSError."""
        self.beat.doing = ("list", self.words(directory), self.now())
        try:
            return list_directory(self.path, directory, counting=self.at.counting)
        finally:
            self.beat.doing = None

    def watch(self, directory: str) -> bool:
        """Watch a directory, before it is listed; return False (and be degraded) if that is refused."""
        if self.events == "none" or self._hints is None:
            return True
        self.beat.doing = ("watch", self.words(directory), self.now())
        try:
            self._hints.watch(self.root, os.fsencode(directory))
            return True
        except WatchLimit as limit:
            why, hint = limit.message, limit.hint
        except OSError as error:
            if error.errno in ABSENT or error.errno in (errno.EACCES, errno.ELOOP):
                return True  # its listing says the same
            why, hint = f"{self.words(directory)} cannot be watched: {error.strerror}", "its files are found by sweeps"
        finally:
            self.beat.doing = None
        if "watch" not in self._degraded:  # told once, not for each directory
            self.degrade("watch", why, hint)
            self.tell()
        return False

    # ------------------------------------------------------------------ rows

    def failed(self, directory: str, looked: Looked) -> None:
        """Tell of names that could not be looked at; trouble of the device or server is the root's, too."""
        by_code: dict[int, list[str]] = {}
        for name, code in looked.failed:
            by_code.setdefault(code, []).append(name)
        for code, names in by_code.items():
            why = os.strerror(code)
            self.unreadable(directory, names, why)
            if code in TROUBLE and self.check():
                where = self.words(directory, names[0])
                self.degrade("trouble", f"lstat {where}: {why}", "check the disk, mount or server; its files wait")
                self.tell()

    def unreadable(self, directory: str, names: Sequence[str], why: str) -> None:
        for start in range(0, len(names), CHUNK_MAX):
            self.post(Unreadable(self.root, directory, tuple(names[start : start + CHUNK_MAX]), why, self.now()))

    def wants(self, ids: tuple[int, ...], state: State | None, claims: Sequence[Claim]) -> tuple[Want, ...]:
        """Return which of the rules have not claimed this version, each with its newest other batch."""
        if not claims or not ids:
            return self.plain[ids]
        version = state[:2] if state is not None else None
        left = []
        for rule in ids:
            newest = 0
            for claimer, size, mtime_ns, batch in claims:
                if claimer == rule:
                    if (size, mtime_ns) == version:
                        break
                    if batch > newest:
                        newest = batch
            else:
                left.append((rule, newest))
        return tuple(left)

    def left(
        self,
        looked: Sequence[tuple[str, State]],
        ids_of: Callable[[str], tuple[int, ...]],
        claims: Mapping[str, Sequence[Claim]],
    ) -> list[Row]:
        """Return the rows that some rule wants and has not claimed."""
        if not claims:
            plain = self.plain
            return [(name, state, plain[ids_of(name)]) for name, state in looked]
        rows: list[Row] = []
        for name, state in looked:
            if wants := self.wants(ids_of(name), state, claims.get(name, ())):
                rows.append((name, state, wants))
        return rows
