"""The worker of one root: answers looks, drains hints, sweeps, and says how the root is.

Always in this order, because a deadline waits for a look and a hint for its
file, while a sweep can resume. The same code runs in a thread (local disks)
and in a process of its own (file systems that can hang). It reads the tree
and never writes to it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trigger_daemon.clock import Clock
from trigger_daemon.core.model import HoldSweeps, Look, Mark, Marked, Row, Seen, Signal, Sweep, join, split
from trigger_daemon.core.rules import Rule
from trigger_daemon.desk import Claims, Desk, Outlet
from trigger_daemon.hints import Hints, HintSource
from trigger_daemon.looks import CHUNK_MAX, Looked
from trigger_daemon.mounts import LOCAL_TYPES
from trigger_daemon.roots import Identity
from trigger_daemon.sweeps import Sweeper


@dataclass(frozen=True, slots=True)
class Use:
    """Work with these rules from now on."""

    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Accept:
    """A person says that what is there now is the root."""


@dataclass(frozen=True, slots=True)
class ExpectGone:
    """We take these away ourselves: paths below the root."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hear:
    """Somebody says that there is something at these paths below the root: files, or directories with all below."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


Request = Look | Sweep | Mark | HoldSweeps | Use | Accept | ExpectGone | Hear | Stop

LOOKS_TOGETHER = 200  # answered from one snapshot of the claims; some milliseconds


class Worker:
    """Serves one root until told to stop. `ask` and `wake` may be called from any thread."""

    def __init__(
        self,
        root: int,
        path: str,
        rules: Sequence[Rule],
        *,
        outlet: Outlet,
        claims: Callable[[], Claims],
        hints: HintSource | None,
        clock: Clock,
        every_s: float,
        full_s: float,
        identity: Identity | None = None,
        returning: bool = False,
        threaded: bool = True,
        local_types: frozenset[str] = LOCAL_TYPES,
    ) -> None:
        self._event = threading.Event()
        self.wake = self._event.set
        self._inbox: deque[tuple[int, Request]] = deque()
        self._outlet = outlet
        self._hints = hints
        self._stopped = False
        self._hold = False
        self._looks = 0
        self._hinted = 0
        self.desk = Desk(
            root,
            path,
            outlet=outlet,
            open_claims=claims,
            hints=hints,
            wake=self.wake,
            clock=clock,
            identity=identity,
            returning=returning,
            threaded=threaded,
            local_types=local_types,
        )
        self._sweeper = Sweeper(self.desk, every_s=every_s, full_s=full_s)
        self.desk.use(rules)

    def ask(self, serial: int, request: Request) -> None:
        """Ask something; a `Look` is acknowledged by its serial."""
        self._inbox.append((serial, request))
        if not self._event.is_set():  # it is cleared before the inbox is looked into
            self._event.set()

    def run(self) -> None:
        """Work until `Stop`. Raises Abandoned, NeedsProcess, and whatever the claims raise."""
        desk = self.desk
        desk.open()
        try:
            desk.check()
            while not self._stopped:
                self._event.clear()
                self._serve()
                if desk.now() >= desk.check_at:
                    desk.check()
                if not self._stopped and not self._sweeper.step(hold=self._hold):
                    due = min(desk.check_at, self._sweeper.due_at(hold=self._hold))
                    self._event.wait(max(0.0, due - desk.now()))
        finally:
            desk.claims.close()  # else the disk of the journal could not be unmounted after it has failed

    def status(self) -> dict[str, Any]:
        """Return a snapshot for people: health, and what the sweeps cost. From any thread."""
        health, why, hint, events = self.desk.told or ("waiting", "", "", "none")
        mount = self.desk.at.mount
        return {
            "path": self.desk.path,
            "health": health,
            "why": why,
            "hint": hint,
            "events": events,
            "fstype": mount.fstype if mount else "",
            "held": self._hold,
            "looks": self._looks,
            "hinted": self._hinted,
            **self._sweeper.status(),
        }

    # ------------------------------------------------------------------ requests

    def _serve(self) -> None:
        """Answer everything asked, then take the hints that gathered meanwhile."""
        while self._inbox:
            if isinstance(self._inbox[0][1], Look):
                with self.desk.claims.together():
                    for _ in range(LOOKS_TOGETHER):
                        if not self._inbox or not isinstance(self._inbox[0][1], Look):
                            break
                        self._answer(*self._inbox.popleft())
            else:
                self._answer(*self._inbox.popleft())
        if self._hints is not None and self.desk.events != "none":
            hints = self._hints.take(self.desk.root)
            if hints is not None:
                self._hear(hints)

    def _answer(self, serial: int, request: Request) -> None:
        desk = self.desk
        match request:
            case Look():
                self._look(request)
                self._outlet.done(serial)
            case Sweep():
                self._sweeper.ask(request)
            case Mark():
                # From here on no row carries claims older than these. Sweeps
                # asked for may be under way, or held until this is answered.
                self._sweeper.claims_stale()
                as_of, _ = desk.claims.names(desk.root, "", ())
                desk.post(Marked(desk.root, as_of, desk.now()))
            case HoldSweeps():
                self._hold = request.on
            case Use():
                desk.use(request.rules)
                self._sweeper.begin_anew()
            case Accept():
                self._sweeper.accept()
                desk.check(deep=True, accept=True)
            case ExpectGone():
                desk.at.expect_gone(path for path in request.paths if "/" not in path)
            case Hear():
                self._hear_of(request.paths)
            case Stop():
                self._stopped = True

    def _look(self, request: Look) -> None:
        """Answer for every name: a row, with no state if it is absent, or unreadable."""
        desk, directory = self.desk, request.dir
        if not desk.believed:
            desk.unreadable(directory, request.names, desk.distrust)
            return
        ids_of = desk.matcher.directory(directory).wants
        for start in range(0, len(request.names), CHUNK_MAX):
            names = request.names[start : start + CHUNK_MAX]
            self._looks += len(names)
            for looked in desk.lstat(directory, names, known=self._sweeper.knows(directory)):
                if looked.failed:
                    desk.failed(directory, looked)
                if looked.absent and not desk.check(deep=True):
                    desk.unreadable(directory, looked.absent, desk.distrust)
                    looked.absent = []
                present = [name for name, _ in looked.rows] + looked.absent
                if not present:
                    continue
                as_of, claims = desk.claims.names(desk.root, directory, present)
                rows: list[Row] = [
                    (name, state, desk.wants(ids_of(name), state, claims.get(name, ()))) for name, state in looked.rows
                ]
                rows += [(name, None, desk.wants(ids_of(name), None, claims.get(name, ()))) for name in looked.absent]
                desk.post(Seen(desk.root, directory, rows, looked.began, looked.ended, "deadline", "none", as_of))

    # ------------------------------------------------------------------ hints

    def _hear(self, hints: Hints) -> None:
        if hints.root_gone:
            self.desk.check(deep=True)
        if not self.desk.believed:
            return  # a full sweep follows the return
        if hints.all:
            self._sweeper.lost_hints()
        for raw in hints.dirs:
            self._sweeper.scope(os.fsdecode(raw))
        for raw, names in hints.names.items():
            self._hinted_in(os.fsdecode(raw), names)

    def _hear_of(self, paths: tuple[str, ...]) -> None:
        """Look at what a person or a program has named; it is a hint like any other."""
        desk = self.desk
        if not desk.believed:
            return
        for path in paths:
            directory, name = split(path)
            if not name:  # the root
                self._sweeper.lost_hints()
                continue
            self._hinted_in(directory, {os.fsencode(name): "none"})
            # A directory is no file that a rule wants, so that it was not looked at yet.
            for looked in desk.lstat(directory, [name], known=self._sweeper.knows(directory)):
                if looked.dirs:
                    self._sweeper.scope(path)

    def _hinted_in(self, directory: str, names: Mapping[bytes, Signal]) -> None:
        """Look at the hinted names of one directory: one chunk a signal. The hot path."""
        desk = self.desk
        matcher = desk.matcher.directory(directory)
        if not matcher.any:
            return
        wants = matcher.wants
        decode = os.fsdecode
        ids_of: dict[str, tuple[int, ...]] = {}
        by_signal: dict[Signal, list[str]] = {}
        for raw, signal in names.items():
            name = decode(raw)
            if ids := wants(name):
                ids_of[name] = ids
                if signal in by_signal:
                    by_signal[signal].append(name)
                else:
                    by_signal[signal] = [name]
        known = self._sweeper.knows(directory)
        for signal, wanted in by_signal.items():
            trusting = desk.trusting[signal]
            joined = bool(trusting) and any(not trusting.isdisjoint(ids_of[name]) for name in wanted)
            for start in range(0, len(wanted), CHUNK_MAX):
                for looked in desk.lstat(directory, wanted[start : start + CHUNK_MAX], known=known):
                    self._send_hinted(directory, looked, signal, ids_of, joined=joined)

    def _send_hinted(
        self, directory: str, looked: Looked, signal: Signal, ids_of: Mapping[str, tuple[int, ...]], *, joined: bool
    ) -> None:
        """Send what was there; what vanished meanwhile is missed at its deadline, if anybody waits for it."""
        desk = self.desk
        if looked.failed:
            desk.failed(directory, looked)
        for name in looked.dirs:
            self._sweeper.scope(join(directory, name))
        if not looked.rows:
            return
        self._hinted += len(looked.rows)
        self._sweeper.heard(directory, looked.rows)
        as_of = -1
        rows: list[Row]
        if joined:
            as_of, claims = desk.claims.names(desk.root, directory, [name for name, _ in looked.rows])
            rows = desk.left(looked.rows, ids_of.__getitem__, claims)
        else:
            plain = desk.plain
            rows = [(name, state, plain[ids_of[name]]) for name, state in looked.rows]
        if rows:
            desk.post(Seen(desk.root, directory, rows, looked.began, looked.ended, "hint", signal, as_of))
