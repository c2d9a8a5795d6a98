"""Looks at one path, sweeps a scope: a worker a root, so that no root ever waits for another.

A root on a local disk is served by a thread, one that can hang (network, FUSE,
unknown types) by a process of its own. `supervise` declares a root lost when
its worker hangs, gives the worker up, and starts another one only after the
first is gone. Nothing here touches a watched tree: asking, supervising and
stopping never wait for a root.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

import trigger_daemon
from trigger_daemon import garbage
from trigger_daemon.clock import Clock
from trigger_daemon.core.model import Fact, HoldSweeps, Look, Mark, Marked, RootChanged, Sweep, Swept, Unreadable
from trigger_daemon.core.rules import Rule
from trigger_daemon.desk import Abandoned, Claims, NeedsProcess
from trigger_daemon.errors import TriggerError
from trigger_daemon.hints import HintSource
from trigger_daemon.looks import CHUNK_MAX
from trigger_daemon.mounts import LOCAL_TYPES, mount_of
from trigger_daemon.roots import IdentityStore
from trigger_daemon.worker import Accept, ExpectGone, Hear, Request, Stop, Use, Worker

HANG_S = 10.0  # a call into a local file system that takes longer never ends, for all we can do
HANG_REMOTE_S = 30.0  # servers reboot; soft mounts give up by themselves after 6 to 10 s
RESTART_S = 5.0  # between the end of a worker and the next one
SILENCE_S = 30.0  # a process that has said nothing so long (it says something each second) is stopped or stuck
BEAT_S = 1.0

Post = Callable[[Fact], None]


class _Host(Protocol):
    """Where a worker runs."""

    hint_fault: str

    def ask(self, serial: int, request: Request) -> None: ...

    def hung(self, now: float) -> tuple[str, str, float] | None:
        """Return operation, path and seconds if it hangs."""

    def ended(self) -> BaseException | str | None:
        """Return why it ended by itself, None while it runs."""

    def give_up(self) -> None:
        """Let nothing it says count any more, and end it if that can be done."""

    def gone(self) -> bool:
        """Say whether nothing of it is left."""

    def status(self) -> dict[str, Any]: ...


class _Slot:
    """One root: its worker, what was asked of it and not answered, and what to do when it is gone."""

    def __init__(self, scanner: Scanner, root: int, path: str, rules: tuple[Rule, ...]) -> None:
        self.root = root
        self.path = path
        self.rules = rules
        self.host: _Host | None = None
        self.former: _Host | None = None  # given up, but perhaps not gone
        self.hangs = False  # its file system can hang: needs a process
        self.returning = False
        self.again_at = 0.0
        self.lost = ""  # why, while no worker serves it
        self._scanner = scanner
        self._lock = threading.Lock()
        self._serial = 0
        self._looks: dict[int, Look] = {}
        self._ask = 0
        self._ask_full = False
        self._marks = 0

    # ------------------------------------------------------------------ asked

    def ask(self, request: Request) -> None:
        """Remember a request until it is answered, and hand it to the worker if there is one."""
        with self._lock:
            self._serial += 1
            serial = self._serial
            match request:
                case Look() if self.host is None:
                    self._scanner.refuse(request, self.lost or "root not opened yet")
                    return
                case Look():
                    self._looks[serial] = request
                case Sweep():
                    self._ask = max(self._ask, request.ask)
                    self._ask_full |= request.full
                case Mark():
                    self._marks += 1
                case Use():
                    self.rules = request.rules
            if self.host is not None:
                self.host.ask(serial, request)

    def begin(self, host: _Host, *, hold: bool) -> None:
        """Let a new worker serve; it is asked again what the former one did not answer."""
        with self._lock:
            self.host = host
            self.lost = ""
            if hold:
                host.ask(0, HoldSweeps(True))
            if self._ask or self._ask_full:
                host.ask(0, Sweep(self.root, self._ask_full, self._ask))
            for _ in range(self._marks):
                host.ask(0, Mark(self.root))

    def end(self, why: str) -> None:
        """Give the worker up; its looks are refused, so that nobody waits for them."""
        with self._lock:
            host, self.host = self.host, None
            self.lost = why
            self.returning = True
            looks, self._looks = self._looks, {}
        if host is not None:
            self.former = host
            host.give_up()
        for look in looks.values():
            self._scanner.refuse(look, why)

    # ------------------------------------------------------------------ answered

    def answered(self, fact: Fact) -> None:
        """Forget what this fact answers."""
        with self._lock:
            if isinstance(fact, Swept):
                if fact.asked >= self._ask:
                    self._ask, self._ask_full = 0, False
            elif isinstance(fact, Marked):
                self._marks = max(0, self._marks - 1)

    def done(self, serial: int) -> None:
        with self._lock:
            self._looks.pop(serial, None)

    def keep(self, identity: dict[str, Any]) -> None:
        self._scanner.identities.set(self.root, identity)


class Scanner:
    """The roots of all rules. Methods are called from the loop's thread and never wait for a root."""

    def __init__(
        self,
        *,
        post: Post,
        claims: Callable[[], Claims],
        hints: HintSource,
        clock: Clock,
        every_s: float,
        full_s: float,
        identities: IdentityStore,
        hang_s: float = HANG_S,
        hang_remote_s: float = HANG_REMOTE_S,
        local_types: frozenset[str] = LOCAL_TYPES,
    ) -> None:
        """Prepare; `use` opens roots.

        `post` may block (also for RootChanged and Marked) and is called from
        the workers' threads; `claims` is called in each of them, and is pickled
        for processes; `identities` likewise is called from those threads.
        """
        self.identities = identities
        self._post = post
        self._claims = claims
        self._hints = hints
        self._clock = clock
        self._every_s = every_s
        self._full_s = full_s
        self._hang_s = hang_s
        self._hang_remote_s = hang_remote_s
        self._local_types = local_types
        self._slots: dict[int, _Slot] = {}
        self._left: list[_Host] = []  # of roots no longer used, until they are gone
        self._hold = False
        self._stopped = False
        # Facts about roots without a worker; the loop must not wait for its own inbox.
        self._aside: queue.SimpleQueue[Fact | None] = queue.SimpleQueue()
        self._speaker = threading.Thread(target=self._speak, name="scanner", daemon=True)
        self._speaker.start()

    # ------------------------------------------------------------------ effects

    def use(self, rules: Sequence[Rule], roots: Mapping[str, int]) -> None:
        """Serve these roots (watch path -> root id) with these rules; close the others."""
        wanted = {root: path for path, root in roots.items()}
        for root in [root for root, slot in self._slots.items() if wanted.get(root) != slot.path]:
            self._close(self._slots.pop(root))
        for root, path in wanted.items():
            own = tuple(rule for rule in rules if rule.watch == path)
            slot = self._slots.get(root)
            if slot is None:
                slot = self._slots[root] = _Slot(self, root, path, own)
                slot.hangs = self._hangs(path)
                self._start(slot)
            elif slot.rules != own:
                slot.ask(Use(own))

    def look(self, look: Look) -> None:
        slot = self._slots.get(look.root)
        if slot is None:
            self.refuse(look, "no rule uses this root any more")
        else:
            slot.ask(look)

    def sweep(self, sweep: Sweep) -> None:
        if slot := self._slots.get(sweep.root):
            slot.ask(sweep)

    def mark(self, mark: Mark) -> None:
        if slot := self._slots.get(mark.root):
            slot.ask(mark)

    def hold(self, hold: HoldSweeps) -> None:
        self._hold = hold.on
        for slot in self._slots.values():
            slot.ask(hold)

    def accept(self, root: int) -> bool:
        """A person confirms that what is there now is this root; False if it is not served."""
        slot = self._slots.get(root)
        if slot is None or slot.host is None:
            return False
        slot.ask(Accept())
        return True

    def expect_gone(self, root: int, paths: Iterable[str]) -> None:
        """Let a root not be doubted because of what we take away ourselves."""
        if slot := self._slots.get(root):
            slot.ask(ExpectGone(tuple(paths)))

    def hear(self, root: int, paths: Iterable[str]) -> bool:
        """Look at paths that somebody has named, soon; False if the root is not served now. Any thread."""
        slot = self._slots.get(root)
        if slot is None or slot.host is None:
            return False
        slot.ask(Hear(tuple(paths)))
        return True

    # ------------------------------------------------------------------ supervision

    def supervise(self, now: float) -> None:
        """Find hung and ended workers, give them up, and start others once the former are gone. Each second or so."""
        if self._stopped:
            return
        fault = self._hints.alive() if self._hints.kind != "none" else ""
        for slot in self._slots.values():
            host = slot.host
            if host is None:
                if now >= slot.again_at and (slot.former is None or slot.former.gone()):
                    slot.former = None
                    self._start(slot)
                continue
            host.hint_fault = fault
            if (hang := host.hung(now)) is not None:
                operation, path, age_s = hang
                self._lose(slot, f"hung in {operation} on {path} for {age_s:.0f} s", now, _HUNG_HINT, now)
            elif (end := host.ended()) is not None:
                if isinstance(end, NeedsProcess):
                    slot.hangs = True
                    slot.end(f"{end} needs a worker process")
                    slot.again_at = now
                    continue
                hint = (end.hint if isinstance(end, TriggerError) else "") or "it is started again; see the log"
                self._lose(slot, f"its worker ended: {_told(end)}", now, hint, now + RESTART_S)
        self._left = [host for host in self._left if not host.gone()]

    def roots(self) -> dict[int, dict[str, Any]]:
        """Return the health of each root, for people."""
        answer = {}
        for root, slot in self._slots.items():
            host = slot.host
            if host is not None:
                answer[root] = host.status()
            else:
                answer[root] = {"path": slot.path, "health": "lost", "why": slot.lost, "hint": "", "events": "none"}
        return answer

    def stop(self) -> None:
        """End all workers; those that hang are left behind."""
        self._stopped = True
        for slot in self._slots.values():
            self._close(slot)
        self._slots = {}
        self._aside.put(None)

    def refuse(self, look: Look, why: str) -> None:
        """Answer a look that no worker can answer."""
        for start in range(0, len(look.names), CHUNK_MAX):
            names = look.names[start : start + CHUNK_MAX]
            self._aside.put(Unreadable(look.root, look.dir, names, why, self._clock.monotonic()))

    # ------------------------------------------------------------------ workers

    def _hangs(self, path: str) -> bool:
        mount = mount_of(path)  # of the path as written: its links are followed by the worker, where that cannot hurt
        return mount is not None and mount.fstype not in self._local_types

    def _start(self, slot: _Slot) -> None:
        """Start a worker; where that fails (no process, thread or descriptor left) try again later."""
        try:
            host = self._make(slot)
            slot.begin(host, hold=self._hold)
            host.start()
        except (OSError, RuntimeError, TriggerError) as error:
            now = self._clock.monotonic()
            hint = "see what this host has run out of"
            self._lose(slot, f"no worker can be started: {error}", now, hint, now + RESTART_S)

    def _make(self, slot: _Slot) -> _ThreadHost | _ProcessHost:
        make = _ProcessHost if slot.hangs else _ThreadHost
        return make(
            slot,
            post=self._post,
            settings={
                "root": slot.root,
                "path": slot.path,
                "rules": slot.rules,
                "claims": self._claims,
                "clock": self._clock,
                "every_s": self._every_s,
                "full_s": self._full_s,
                "identity": self.identities.get(slot.root),
                "returning": slot.returning,
                "local_types": self._local_types,
            },
            hints=self._hints,
            hang_s=self._hang_remote_s if slot.hangs else self._hang_s,
        )

    def _lose(self, slot: _Slot, why: str, now: float, hint: str, again_at: float) -> None:
        self._aside.put(RootChanged(slot.root, "lost", f"{slot.path}: {why}", hint, "none", now))
        slot.end(f"{slot.path}: {why}")
        slot.again_at = again_at
        self._hints.close(slot.root)

    def _close(self, slot: _Slot) -> None:
        self._hints.close(slot.root)
        if slot.host is not None:
            slot.host.ask(0, Stop())
        slot.end("the root was closed")
        if slot.former is not None:
            self._left.append(slot.former)

    def _speak(self) -> None:
        while (fact := self._aside.get()) is not None:
            self._post(fact)


class _ThreadHost:
    """A worker in a thread: it cannot be ended, only no longer listened to."""

    def __init__(
        self, slot: _Slot, *, post: Post, settings: dict[str, Any], hints: HintSource, hang_s: float
    ) -> None:
        self._slot = slot
        self._post = post
        self._hang_s = hang_s
        self._given_up = False
        self._end: BaseException | str | None = None
        self._worker = Worker(outlet=self, hints=hints, **settings)
        self._thread = threading.Thread(target=self._run, name=f"root {slot.path}", daemon=True)

    @property
    def hint_fault(self) -> str:
        return self._worker.desk.hint_fault

    @hint_fault.setter
    def hint_fault(self, fault: str) -> None:
        self._worker.desk.hint_fault = fault

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.run()
            self._end = "it was stopped"
        except Abandoned:
            self._end = "it was given up"
        except Exception as error:  # noqa: BLE001  the top of a thread: whatever ended it is told by `supervise`
            self._end = error

    # What the worker says

    def post(self, fact: Fact) -> None:
        if self._given_up:
            raise Abandoned
        self._post(fact)
        self._slot.answered(fact)

    def done(self, serial: int) -> None:
        self._slot.done(serial)

    def keep(self, identity: dict[str, Any]) -> None:
        if self._given_up:
            raise Abandoned
        self._slot.keep(identity)

    # What the scanner asks

    def ask(self, serial: int, request: Request) -> None:
        self._worker.ask(serial, request)

    def hung(self, now: float) -> tuple[str, str, float] | None:
        doing = self._worker.desk.beat.doing
        if doing is None or now - doing[2] < self._hang_s:
            return None
        return doing[0], doing[1], now - doing[2]

    def ended(self) -> BaseException | str | None:
        return self._end

    def give_up(self) -> None:
        self._given_up = True
        self._worker.ask(0, Stop())

    def gone(self) -> bool:
        return not self._thread.is_alive()  # also of one that could not be started

    def status(self) -> dict[str, Any]:
        return self._worker.status()


class _ProcessHost:
    """A worker in a process: killed when it hangs, which may take until the server answers."""

    def __init__(
        self, slot: _Slot, *, post: Post, settings: dict[str, Any], hints: HintSource, hang_s: float
    ) -> None:
        self.hint_fault = ""  # of no interest: no hints are asked for where remote writers cause none
        self._slot = slot
        self._post = post
        self._hang_s = hang_s
        self._given_up = False
        self._end: BaseException | str | None = None
        self._doing: tuple[str, str, float] | None = None  # operation, path, seconds, as last told
        self._status: dict[str, Any] = {"path": slot.path, "health": "waiting", "why": "", "hint": "", "events": "none"}
        self._clock: Clock = settings["clock"]
        self._heard_at = self._clock.monotonic()
        self._waits = False  # for the core: beats are late for good reason
        # Only as many as the core has asked for and that wait for an answer.
        self._requests: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
        self._settings = {**settings, "rules": plain_rules(settings["rules"])}
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            source = os.path.dirname(os.path.dirname(os.path.abspath(trigger_daemon.__file__)))
            search = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
            self._child = subprocess.Popen(
                [sys.executable, "-c", "from trigger_daemon.scanner import serve; serve()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "PYTHONPATH": search},
                start_new_session=True,  # a Ctrl-C is the daemon's to handle
            )
        self._pipe = Connection(ours.detach())
        for target in (self._send, self._receive):
            threading.Thread(target=target, name=f"root {self._slot.path}", daemon=True).start()

    def _send(self) -> None:
        assert self._pipe is not None
        try:
            self._pipe.send(self._settings)
            while (item := self._requests.get()) is not None:
                self._pipe.send(item)
        except OSError:
            pass  # it is gone: `_receive` tells
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._end = error

    def _receive(self) -> None:
        assert self._pipe is not None
        why: BaseException | str = "its process ended"
        try:
            while not self._given_up:
                kind, value = self._pipe.recv()
                self._heard_at = self._clock.monotonic()
                if kind == "beat":
                    self._doing, self._status = value
                elif kind == "end":
                    why = value
                elif not self._given_up:
                    self._take(kind, value)
        except (EOFError, OSError):
            pass
        if self._end is None:
            self._end = why
        self._requests.put(None)

    def _take(self, kind: str, value: Any) -> None:
        if kind == "done":
            self._slot.done(value)
        elif kind == "keep":
            self._slot.keep(value)
        else:
            self._waits = True
            self._post(value)
            self._waits = False
            self._heard_at = self._clock.monotonic()
            self._slot.answered(value)

    def ask(self, serial: int, request: Request) -> None:
        if isinstance(request, Use):
            request = Use(plain_rules(request.rules))
        self._requests.put((serial, request))

    def hung(self, now: float) -> tuple[str, str, float] | None:
        if self._waits or self._end is not None:
            return None
        if self._doing is not None and self._doing[2] >= self._hang_s:
            return self._doing
        if now - self._heard_at >= max(SILENCE_S, self._hang_s):
            return "its process, which says nothing,", self._slot.path, now - self._heard_at
        return None

    def ended(self) -> BaseException | str | None:
        return self._end

    def give_up(self) -> None:
        self._given_up = True
        self._requests.put(None)
        if self._child is not None:
            self._child.kill()

    def gone(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def status(self) -> dict[str, Any]:
        return self._status


def plain_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules with only what matching needs, so that they can be pickled whatever their options hold."""
    plain = []
    for rule in rules:
        complete = replace(rule.complete, checks=(), companions=())
        batch = rule.batch
        if batch is not None and batch.close_on is not None:
            batch = replace(batch, close_on=replace(batch.close_on, checks=()))
        plain.append(replace(rule, options={}, complete=complete, batch=batch))
    return tuple(plain)


class _Pipe:
    """The outlet of a worker in a process of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def _send(self, kind: str, value: Any) -> None:
        try:
            with self._lock:
                self._pipe.send((kind, value))
        except OSError:
            raise Abandoned from None

    def post(self, fact: Fact) -> None:
        self._send("fact", fact)

    def done(self, serial: int) -> None:
        self._send("done", serial)

    def keep(self, identity: dict[str, Any]) -> None:
        self._send("keep", identity)

    def beat(self, doing: tuple[str, str, float] | None, status: dict[str, Any]) -> None:
        self._send("beat", (doing, status))

    def end(self, why: str) -> None:
        self._send("end", why)


def serve() -> None:
    """Be the worker process of one root: settings, then requests come in over the pipe named on the command line."""
    garbage.seldom()
    pipe = Connection(int(sys.argv[1]))
    outlet = _Pipe(pipe)
    settings = pipe.recv()
    worker = Worker(outlet=outlet, hints=None, threaded=False, **settings)
    now = settings["clock"].monotonic
    gone = threading.Event()

    def listen() -> None:
        try:
            while True:
                worker.ask(*pipe.recv())
        except (EOFError, OSError):  # the daemon is gone or has given this process up
            gone.set()
            os._exit(0)

    def beat() -> None:
        try:
            while not gone.wait(BEAT_S):
                doing = worker.desk.beat.doing
                outlet.beat(doing and (doing[0], doing[1], now() - doing[2]), worker.status())
        except Abandoned:
            os._exit(0)

    for target in (listen, beat):
        threading.Thread(target=target, daemon=True).start()
    try:
        worker.run()
    except Abandoned:
        pass
    except Exception as error:  # noqa: BLE001  the top of a process: told to the daemon, which decides
        outlet.end(_told(error))
    os._exit(0)


def _told(end: BaseException | str) -> str:
    return end if isinstance(end, str) else f"{type(end).__name__}: {end}"


_HUNG_HINT = "check the server, mount or disk; the root is served again when the call returns"
