"""The daemon: start, the loop, stop.

The loop is the only task that touches the engine: take what is waiting, step
each fact, commit the records once, and only then carry the effects out. While
a commit fails nothing is stepped and nothing carried out; the same rows are
tried again. After an I/O error of the journal everything is begun anew from
what the journal says: a crash, without the process ending.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trigger_daemon import __version__, config, hints, log, points, programs, trace
from trigger_daemon.clock import Clock, SystemClock
from trigger_daemon.control import Control
from trigger_daemon.core import model
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import RECORDS, Effect, Fact, RunState, join, split
from trigger_daemon.core.rules import Rule
from trigger_daemon.critical import Commands
from trigger_daemon.errors import ConfigError, ConfigFault, JournalDamaged, JournalError, JournalFull
from trigger_daemon.executor import Executor, Providers
from trigger_daemon.failpoints import fail_point
from trigger_daemon.inbox import Inbox
from trigger_daemon.instrument import Watch
from trigger_daemon.journal import ClaimReader, Journal, RootIdentity
from trigger_daemon.metrics import Metrics
from trigger_daemon.mqtt.asked import below
from trigger_daemon.mqtt.spool import forget
from trigger_daemon.rates import Rates
from trigger_daemon.reader import Reader, texts_of
from trigger_daemon.reclaimer import Reclaimer
from trigger_daemon.scanner import Scanner
from trigger_daemon.systemd import Notifier
from trigger_daemon.teller import Teller
from trigger_daemon.trace import Recorder, TraceError
from trigger_daemon.volumes import Gauge, Volumes

if TYPE_CHECKING:
    from trigger_daemon.mqtt.edge import Edge

BEAT_S = 2.0  # heartbeat for the command line
RULES_EVERY_S = 2.0  # how often the rule files are looked at; a change is taken when seen twice alike
COMMIT_AGAIN_S = 1.0  # a failed commit is tried again so often
RESTART_S = 2.0  # after a broken journal
THIN_EVERY_S = 3_600.0
BALLAST_EVERY_S = 30.0  # how often it is looked whether there is room for the ballast again
THIN_RUNS = 1_000
WAL_ALARM_BYTES = 256 * 2**20  # a checkpoint keeps it near 16 MiB while nobody stands in the way
OPENING_FED_S = 3_600.0  # the journal may be looked through for so long; then the service manager loses patience
EXTEND_S = 30.0  # what is asked of it at a time
STATUS_MAX = 400  # characters
RELOADED_S = 30.0  # a reload counts as done after this, though the rules' disk has not answered
PART_STOPS_S = 5.0  # the service manager is less patient than a hung share
LOOKED_BACK_MAX = 50_000  # groups whose success is remembered from before, some 20 MB; of the others nothing is known
LANES_MAX = 8  # copying processes; more only fight for one disk
ON_CRITICAL_S = 60.0  # the settings' command for a critical volume gets this long

_RECORD_TYPES = frozenset(RECORDS)

T = TypeVar("T")


class Daemon:
    """One daemon on one state directory."""

    def __init__(
        self,
        settings: config.Settings,
        *,
        reload_settings: Any = None,
        clock: Clock | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.settings = settings
        self.recorder = recorder
        self._reload_settings = reload_settings
        self.settings_fault = ""  # why what was to be reloaded was refused
        self.clock: Clock = clock or SystemClock()
        self.log = log.get()
        self.notify = Notifier()
        self.metrics = Metrics()  # outlives a life: its counters never go down
        self._stopping = False
        self._reload = False
        self._life: Life | None = None

    async def run(self) -> None:
        """Work until `stop`; a full disk is waited for. Raises JournalError if no journal can be had at the start."""
        first, told = True, ""
        while not self._stopping:
            life = Life(self, first=first)
            self._life = life
            try:
                await life.run()
            except JournalDamaged:  # only a person mends it
                raise
            except JournalError as error:
                if first and not life.working and not isinstance(error, JournalFull):
                    raise
                if error.message != told:
                    event = "journal.full" if isinstance(error, JournalFull) else "journal.broken"
                    self.log.error(event, why=error.message, hint=error.hint)
                told = "" if life.working else error.message
                self.notify.status(f"waits: {error.message}; {error.hint}")
                await self.rest(RESTART_S)
            finally:
                self._life = None
                await life.close()
            first = first and not life.working

    async def rest(self, seconds: float) -> None:
        """Let time pass, and say that we live."""
        self.notify.extend(seconds + EXTEND_S)
        self.notify.alive()
        await asyncio.sleep(seconds)

    def stop(self) -> None:
        """End soon; what is under way is taken up after the next start."""
        self._stopping = True
        self.notify.stopping()
        if self._life:
            self._life.wake()

    def reload(self) -> None:
        """Read settings and rules again."""
        self.notify.reloading()
        self._reload = True
        if self._life:
            self._life.wake()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def take_reload(self) -> bool:
        """Say whether a reload was asked for since the last call."""
        asked, self._reload = self._reload, False
        if asked and self._reload_settings is not None:
            try:
                self.settings = self._reload_settings()
                self.settings_fault = ""
            except ConfigError as error:
                self.settings_fault = error.message
                self.log.error("settings.refused", why=error.message, hint=error.hint)
        return asked


class Life:
    """The daemon from one opening of the journal to its closing."""

    def __init__(self, daemon: Daemon, *, first: bool) -> None:
        self.daemon = daemon
        self.first = first
        self.settings = daemon.settings
        self.state_dir = Path(daemon.settings.state_dir)
        self.rules_dir = Path(daemon.settings.rules_dir)
        self.clock = daemon.clock
        self.log = daemon.log
        self.working = False
        self.started_time = self.clock.utc()
        self._parts: list[Any] = []  # what close() stops, last made first
        self._journal_thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._commit_fault = ""
        self._told = False
        self._rules_seen: Any = None
        self._rules_taken: Any = None
        self._next_beat = 0.0
        self._reloaded_by: float | None = None  # a reload is under way; by then it is told as done
        self._status = ""  # what the service manager was told last
        self._next_rules = 0.0
        self._next_thin = self.clock.monotonic() + 60.0
        self._next_ballast = 0.0
        self._on_reserve = False
        self._root_paths: dict[int, str] = {}
        self._troubles: dict[str, str] = {}  # alarms of our own: key -> what, '' if all is well
        self.mqtt: Edge | None = None
        self._own_since: dict[str, float] = {}  # alarms that are not the engine's: since when each stands
        self._own_acked: dict[str, str] = {}  # by whom they were seen
        self._rates = Rates()
        self._stopped: Mapping[str, str] = {}  # volume -> why nothing of ours may be written there

    # ------------------------------------------------------------------ start

    async def run(self) -> None:
        """Open everything, then loop."""
        settings = self.settings
        loop = asyncio.get_running_loop()
        self.daemon.notify.status("opening the journal")
        self.journal = self._part(
            await self._fed(functools.partial(Journal.open, self.state_dir, make=self.first))
        )
        self.inbox = Inbox(loop)
        self.providers = self._part(
            Providers(
                self.state_dir,
                {"lanes": min(settings.throttle.runs, LANES_MAX), **settings.for_actions()},
                self._nudge,
            )
        )
        saved = await self._fed(self.journal.load)
        self._root_paths = dict(saved.roots)
        header = trace.Header(
            host=socket.gethostname(),
            time_zone=settings.zone,
            runs_max=settings.throttle.runs,
            keep_done_s=settings.keep_done_s,
            seed=random.getrandbits(48),
        )
        self.engine = Engine(
            host=header.host,
            providers=self.providers,
            rand=random.Random(header.seed).random,
            runs_max=header.runs_max,
            time_zone=header.time_zone,
            keep_done_s=header.keep_done_s,
            limits=[volume.limits() for volume in settings.volumes],
            conditions=settings.throttle.conditions,
            bandwidth=settings.throttle.bandwidth,
        )
        self.engine.runs.destination_max = settings.throttle.per_destination
        now, utc = self.clock.monotonic(), self.clock.utc()
        self.engine.restore(saved, now, utc)
        if self.daemon.recorder:
            self.daemon.recorder.life(header, saved, now, utc)
        self.executor = self._part(
            Executor(
                journal=self.journal,
                providers=self.providers,
                post=self.inbox.post,
                root_path=self._root_paths.__getitem__,
                clock=self.clock,
                proving=lambda: self.engine.proving,
            )
        )
        self.providers.stopped = lambda path: self._stopped.get(self.engine.storage.volume_of(path), "")
        self.providers.reserve = self.engine.storage.reserve
        self.reclaimer = self._part(
            Reclaimer(
                Reader(self.state_dir),
                post=self.inbox.post,
                clock=self.clock,
                roots=self._root_paths,
                witnessed=lambda: self.engine.witnessed(self.clock.monotonic()),
                again=self.executor.prove_again,
                shows=self.executor.shows,
            )
        )
        self.engine.reclaims.enabled = settings.reclaim == "enabled"
        self.engine.settings_refused = bool(self.daemon.settings_fault)
        self.hints = self._part(hints.open_source(settings.events))
        self.scanner = self._part(
            Scanner(
                post=self.inbox.post,
                claims=functools.partial(ClaimReader, self.journal.path),
                hints=self.hints,
                clock=self.clock,
                every_s=settings.sweep.every_s,
                full_s=settings.sweep.full_s,
                identities=_Identities(self.journal),
            )
        )
        gauges = [Gauge(path) for path in self._gauged()]
        book = str(self.state_dir / points.VOLUMES)
        self.volumes = self._part(Volumes(gauges, self.clock.monotonic, self.inbox.post, book=book))
        self.providers.reserves = lambda: self.engine.storage.reserves(self.volumes.devices())
        self.watch = self._part(Watch(settings.throttle.conditions, self.inbox.post, self.clock))
        self.control = self._part(ControlThread(self.state_dir, self._take_order, self.log))
        standing = {key: alarm.what for key, alarm in self.engine.alarms.open.items()}
        self.commands = Commands(self.clock.monotonic, self._on_criticals(), standing)
        self._open_mqtt()
        self._use_metrics()
        self.teller = self._part(
            Teller(
                settings.alarms.ways(), state_dir=self.state_dir, host=header.host, clock=self.clock, logger=self.log
            )
        )
        self._offer_saved_rules(saved.rules_source)
        self._offer_rules()
        self.working = True
        await self._loop()

    def _open_mqtt(self) -> None:
        """Begin to tell the broker of the settings, if there is one; an edge with other settings ends first."""
        before, wanted = self.mqtt, self.settings.mqtt
        if before is not None and before.settings == wanted:
            before.again()
            return
        self.mqtt = None
        if wanted.host is None:
            if before is not None:
                before.leave()
            forget(self.state_dir)
            self.inbox.post(model.Troubled("mqtt", "", "", self.clock.monotonic()))
            return
        from trigger_daemon.mqtt.edge import Edge  # its library is loaded by those who use it

        self.mqtt = Edge(
            wanted,
            self.state_dir,
            host=self.engine.host,
            post=self.inbox.post,
            hear=self._hear,
            clock=self.clock,
            logger=self.log,
            after=before,
        )
        if before is not None:
            self._parts.remove(before)
        self._part(self.mqtt)

    def _hear(self, paths: Sequence[str]) -> list[str]:
        """Have paths looked at that somebody has named; return those that lie below no root. Any thread."""
        roots = list(self.engine.roots.items())
        nowhere = []
        for path in paths:
            found = [(number, rest) for root, number in roots if (rest := below(path, root)) is not None]
            heard = [self.scanner.hear(number, (rest,)) for number, rest in found]  # each: roots may lie in another
            if not any(heard):
                nowhere.append(path)
        return nowhere

    async def _fed(self, call: Callable[[], T]) -> T:
        """Return what the journal's thread answers; the service manager is asked to be patient meanwhile."""
        answer = asyncio.get_running_loop().run_in_executor(self._journal_thread, call)
        end = self.clock.monotonic() + OPENING_FED_S
        while not (await asyncio.wait({answer}, timeout=self.daemon.notify.beat_s(BEAT_S)))[0]:
            if self.clock.monotonic() < end:
                self.daemon.notify.extend(EXTEND_S)
                self.daemon.notify.alive()
        return answer.result()

    def _gauged(self) -> list[str]:
        """Return the volumes that are shown: those of the settings, else the one the journal lies on."""
        return [volume.path for volume in self.settings.volumes] or [self.settings.state_dir]

    def _on_criticals(self) -> dict[str, tuple[str, ...]]:
        return {volume.path: volume.on_critical for volume in self.settings.volumes if volume.on_critical}

    def _use_metrics(self) -> None:
        wanted = self.settings.metrics
        self.daemon.metrics.use(wanted.file, wanted.every_s, wanted.port)

    def _part(self, part: Any) -> Any:
        self._parts.append(part)
        return part

    async def close(self) -> None:
        """Stop every part, the last made first; the journal at the end."""
        if hasattr(self, "inbox"):
            self.inbox.close()
        for part in reversed(self._parts):
            self.daemon.notify.alive()
            stop = getattr(part, "stop", None) or part.close
            try:
                async with asyncio.timeout(PART_STOPS_S):
                    await asyncio.get_running_loop().run_in_executor(None, stop)
            except (OSError, JournalError) as error:  # a part that hangs (TimeoutError is an OSError) stays behind
                self.log.warning("stop.failed", part=type(part).__name__, why=str(error))
        self._journal_thread.shutdown(wait=False)

    # ------------------------------------------------------------------- loop

    async def _loop(self) -> None:
        self.log.info("daemon.started", version=__version__, state_dir=str(self.settings.state_dir))
        while not self.daemon.stopping:
            facts: list[Fact] = self.inbox.take()
            now = self.clock.monotonic()
            facts.append(model.Tick(now, self.clock.utc()))
            await self._round(facts)
            if not self._told:  # from the first round on the rules are in force
                self._tell()
                self.daemon.notify.ready(self._status)
            if self._reloaded_by is not None and (
                now >= self._reloaded_by or any(isinstance(fact, model.RulesOffered) for fact in facts)
            ):
                self._reloaded_by = None
                self._tell()
                self.daemon.notify.ready(self._status)
            self._supervise(now)
            deadline = self.engine.next_deadline()
            until = self._next_beat if deadline is None else min(deadline, self._next_beat)
            await self.inbox.wait(until - self.clock.monotonic())
        try:
            await self._write_and_carry(self.engine.end(self.clock.monotonic()))
        except JournalError as error:  # `keep_for` is the longer for it
            self.log.warning("stop.failed", part="journal", why=error.message)
        self.log.info("daemon.stopped")

    async def _round(self, facts: list[Fact]) -> None:
        """Step, commit, carry out."""
        effects: list[Effect] = []
        for fact in facts:
            effects += self.engine.step(fact)
        if effects:
            await self._write_and_carry(effects)
        if self.daemon.recorder:  # what was not committed never was
            self.daemon.recorder.round(facts, [e for e in effects if isinstance(e, model.BatchClosed)])

    async def _write_and_carry(self, effects: list[Effect]) -> None:
        records = [effect for effect in effects if type(effect) in _RECORD_TYPES]
        if records:
            fail_point("loop.before_commit")
            await self._commit(records)
            fail_point("loop.after_commit")
        for effect in effects:
            self._carry(effect)

    async def _commit(self, records: list[Effect]) -> None:
        """Write the records; while that fails nothing else happens, but we still live and say what is wrong."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._journal_thread, self.journal.append, records)
            except JournalFull as error:
                if not self._commit_fault:
                    self.log.error("journal.full", why=error.message, hint=error.hint)
                self._commit_fault = error.message
                self._tell()
                self.daemon.notify.status(f"the journal cannot be written: {error.message}")
                if self.daemon.stopping:
                    raise
                await asyncio.sleep(COMMIT_AGAIN_S)
                self.daemon.notify.alive()
                continue
            if self._commit_fault:
                self.log.info("journal.writable")
                self._commit_fault = ""
                self._status = ""  # the next heartbeat tells it again
            return

    def _carry(self, effect: Effect) -> None:
        match effect:
            case model.Look():
                self.scanner.look(effect)
            case model.Sweep():
                self.scanner.sweep(effect)
            case model.Mark():
                self.scanner.mark(effect)
            case model.HoldSweeps():
                self.scanner.hold(effect)
            case model.UseRules(rules):
                self.scanner.use(rules, self.engine.roots)
                self.reclaimer.use(rules)
                writes = (path for rule in rules for path in self.providers.writes(rule.action, rule.options))
                self.volumes.used({*self.engine.roots, *writes})
            case model.Ordered(order) if order >= 0:
                self._tell()  # before its answer
            case model.Answer(order, answer) if order < 0:
                if self.mqtt:
                    self.mqtt.answer(order, answer)
            case model.Answer(order, answer):
                self.control.answer(order, answer)
            case model.Log(event, keys, level):
                getattr(self.log, level)(event, **keys)
            case model.BatchClosed():
                self.log.info(
                    "batch.closed",
                    batch=effect.batch,
                    rule=effect.request["rule"],
                    group=dict(effect.group),
                    files=len(effect.members),
                    bytes=effect.bytes,
                    because=effect.reason,
                )
            case model.Renewed():
                self.executor.renewed(effect.run)
                self.log.info("run.renewed", run=effect.run, destination=effect.destination)
            case model.RunMoved():
                if effect.final:
                    self.executor.finished(effect.run)
                # On the way of every run; its beginning (batch.closed), its end and what goes wrong are for everybody.
                loud = effect.final or effect.to_state in (RunState.HELD, RunState.PENDING, RunState.INACTIVE)
                if self.mqtt and (effect.final or RunState.HELD in (effect.from_state, effect.to_state)):
                    self.mqtt.stir()
                tell = self.log.info if loud else self.log.debug
                tell(
                    "run.moved",
                    run=effect.run,
                    source=str(effect.from_state),
                    to=str(effect.to_state),
                    because=effect.because,
                )
            case model.AlarmRaised():
                self.log.warning("alarm.raised", key=effect.key, what=effect.what, hint=effect.hint)
            case model.AlarmCleared():
                self.log.info("alarm.cleared", key=effect.key)
            case model.Kept("paused"):
                self._stand_still()
            case model.Throttled():
                self.providers.bandwidth = effect.bandwidth
                self._stopped = effect.stopped
                self._stand_still()
                tell = self.log.debug if effect.often else self.log.info
                tell("work.throttled", paused=effect.paused, bandwidth=effect.bandwidth, stopped=dict(effect.stopped))
            case model.Select():
                self.reclaimer.carry(effect)
            case model.LookBack():
                asyncio.get_running_loop().run_in_executor(None, self._look_back, effect)
            case model.Remove(_, _, of):
                for file in of.files:
                    self.scanner.expect_gone(file.root, (file.path, join(split(file.path)[0], file.hidden)))
                self.reclaimer.carry(effect)
            case model.OnCritical(volume, argv):
                threading.Thread(target=self._on_critical, args=(volume, argv), daemon=True).start()
            case (
                model.Check()
                | model.Prepare()
                | model.Start()
                | model.Find()
                | model.Poll()
                | model.Cancel()
                | model.Verify()
            ):
                self.executor.carry(effect)

    def _look_back(self, effect: model.LookBack) -> None:
        """Read which runs of a rule have ended well; commits go on meanwhile."""
        runs: Sequence[tuple[int, Mapping[str, str]]] = ()
        thinned, why = 0, ""
        try:
            runs, thinned = self.journal.ended_well(effect.rule, LOOKED_BACK_MAX)
        except (JournalError, ValueError, TypeError, KeyError, AttributeError) as error:  # unread, or nobody wrote it
            why = str(error)
        self.inbox.post(model.LookedBack(effect.ask, effect.rule, runs, thinned, self.clock.monotonic(), why))

    def _stand_still(self) -> None:
        """Let providers stand still while an operator, or the instrument, wants it."""
        self.providers.is_paused = bool(self.engine.runs.paused_all or self.engine.storage.instrument)

    def _on_critical(self, volume: str, argv: tuple[str, ...]) -> None:
        """Run the settings' command; what it says is in the log, and that it failed is an alarm."""
        ended = programs.run(argv, timeout_s=ON_CRITICAL_S, env={"TRIGGER_VOLUME": volume})
        if ended.code is None:
            self.log.error(
                "storage.on_critical_failed", volume=volume, command=list(argv), why=ended.fault, said=ended.said
            )
        else:
            self.log.warning(
                "storage.on_critical", volume=volume, command=list(argv), code=ended.code, said=ended.said
            )
        self.commands.ended(volume, argv, ended.fault)

    def wake(self) -> None:
        """End the present wait."""
        if hasattr(self, "inbox"):
            self.inbox.post(model.Tick(self.clock.monotonic(), self.clock.utc()))

    # ------------------------------------------------------------ supervision

    def _supervise(self, now: float) -> None:
        """Everything that is done by time and belongs to no file."""
        if self.daemon.take_reload():
            self.settings = self.daemon.settings
            self.rules_dir = Path(self.settings.rules_dir)
            throttle = self.settings.throttle
            limits = [volume.limits() for volume in self.settings.volumes]
            self.engine.use_settings(
                limits, throttle.conditions, throttle.bandwidth, throttle.runs, throttle.per_destination
            )
            self.engine.reclaims.enabled = self.settings.reclaim == "enabled"
            self.engine.settings_refused = bool(self.daemon.settings_fault)
            self.teller.use(self.settings.alarms.ways())
            self.volumes.use(self._gauged())
            self.commands.use(self._on_criticals())
            self.watch.use(throttle.conditions)
            self.providers.use("mqtt", self.settings.mqtt.plain())
            self._open_mqtt()
            self._use_metrics()
            if self.daemon.recorder:
                self.daemon.recorder.runs_max(self.settings.throttle.runs)
            self._own_troubles()
            self._offer_rules(force=True)
            self._reloaded_by = now + RELOADED_S
        if now >= self._next_rules:
            self._next_rules = now + RULES_EVERY_S
            self._offer_rules()
        if now >= self._next_beat:
            self._next_beat = now + self.daemon.notify.beat_s(BEAT_S)
            if not self.journal.in_place():
                raise JournalError(
                    f"{self.journal.path} or its lock was removed or replaced while the daemon ran",
                    hint="stop the daemon; put the journal back from a backup; start again",
                )
            if self.daemon.recorder and self.daemon.recorder.fault:
                self.log.warning("recording.ended", why=self.daemon.recorder.fault)
                self.daemon.recorder = None
            if self.journal.ballast_given_up != self._on_reserve:
                self._on_reserve = not self._on_reserve
                self.log.warning("journal.on_reserve" if self._on_reserve else "journal.reserve_made_again")
            self.scanner.supervise(now)
            self.executor.supervise(now)
            self.reclaimer.supervise(now)
            self.volumes.sample(now)
            self._stand_still()
            self._tell()
            self.daemon.notify.alive()
        if now >= self._next_ballast:
            self._next_ballast = now + BALLAST_EVERY_S
            self._journal_thread.submit(self.journal.keep_ballast)
        if now >= self._next_thin:
            self._next_thin = now + THIN_EVERY_S
            self._journal_thread.submit(self._thin)

    def _thin(self) -> None:
        """Thin one portion; commits that wait for this thread come before the next."""
        try:
            done = self.journal.thin(self.clock.utc() - self.settings.keep_done_s, THIN_RUNS, self.engine.proving)
        except JournalError as error:
            self.log.warning("journal.thin_failed", why=error.message)
            return
        if done == THIN_RUNS and not self.daemon.stopping:
            self._journal_thread.submit(self._thin)

    def _own_troubles(self) -> None:
        """Raise and end the alarms of what is none of the core's."""
        fault = self.daemon.settings_fault
        self._trouble(
            "settings",
            f"the settings have a fault, those of before go on: {fault}" if fault else "",
            "correct them and reload again: until then nothing of what was changed holds, and reclaim deletes nothing",
        )
        large = self.journal.wal_bytes() > WAL_ALARM_BYTES
        self._trouble(
            "journal-wal",
            f"the -wal is larger than {WAL_ALARM_BYTES >> 20} MiB: a program stands still, reading the journal"
            if large else "",
            f"find it with `fuser {self.journal.path}` and end it",
        )  # fmt: skip
        fault = self.daemon.metrics.fault
        self._trouble(
            "metrics",
            f"metrics are not told: {fault}" if fault else "",
            "correct `metrics` in the settings and reload, or make room for it; it is tried again",
        )

        for key, what, hint in self.commands.troubles():
            self._trouble(key, what, hint)

    def _trouble(self, key: str, what: str, hint: str) -> None:
        if self._troubles.get(key) != what:  # at first it may end what an earlier life has raised
            self._troubles[key] = what
            self.inbox.post(model.Troubled(key, what, hint, self.clock.monotonic()))

    def _tell(self) -> None:
        """Hand the command line a heartbeat; the first one begins the service of its file."""
        self._own_troubles()
        snapshot = self._snapshot()
        if self.mqtt:
            self.mqtt.show(snapshot)
        self.daemon.metrics.show(snapshot)
        if self._told:
            self.control.control.show(snapshot)
        else:
            self._told = True
            self.control.start(snapshot)
        if (status := _one_line(snapshot)) != self._status:
            self._status = status
            self.daemon.notify.status(status)

    def _snapshot(self) -> dict[str, Any]:
        words = self.engine.snapshot()
        events = {root["path"]: root["events"] for root in words["roots"]}
        if self._commit_fault:
            words["alarms"].insert(
                0,
                {
                    "key": "journal",
                    "what": f"the journal cannot be written: {self._commit_fault}",
                    "hint": f"make room on the disk of {self.settings.state_dir}; nothing starts, and nothing is lost",
                    "since_time": self.clock.utc(),
                    "acked_by": None,
                },
            )
        elif self.journal.ballast_given_up:
            words["alarms"].insert(
                0,
                {
                    "key": "ballast",
                    "what": f"the disk of {self.settings.state_dir} was full: the journal writes in its reserve",
                    "hint": "make room there soon; the reserve is made again by itself, and without it nothing starts",
                    "since_time": self.clock.utc(),
                    "acked_by": None,
                },
            )
        if fault := self.teller.alarm():
            words["alarms"].append(fault)
        self._date(words["alarms"])
        self.teller.see(words["alarms"])
        self._rates.sample(self.clock.monotonic(), words["rules"], words["working"])
        health = "ok"
        if any(root["health"] != "ok" for root in words["roots"]):
            health = "degraded"
        if any(not alarm["acked_by"] for alarm in words["alarms"]):
            health = "alarm"
        words["daemon"] = {
            "running": True,
            "pid": os.getpid(),
            "version": __version__,
            "started_time": self.started_time,
            "time": self.clock.utc(),
            "wal_bytes": self.journal.wal_bytes(),
            "health": health,
            "events": events,
            "hints": self.hints.counters(),
        }
        storage = self.engine.storage
        known, now, utc = storage.words(), self.clock.monotonic(), self.clock.utc()
        words["volumes"] = [
            {**gauge.words(), "trend": gauge.trend_words(now, utc), **known.get("" if gauge.error else gauge.path, {})}
            for gauge in self.volumes.gauges
        ]
        words["mqtt"] = self.mqtt.words() if self.mqtt else None
        words["throttle"] = {"instrument": storage.instrument, "bandwidth_bytes_per_s": self.providers.bandwidth}
        return words

    def _date(self, alarms: list[dict[str, Any]]) -> None:
        """Mark the alarms that are not in the journal, and say since when each stands."""
        own = [alarm for alarm in alarms if alarm["key"] not in self.engine.alarms.open]
        self._own_since = {a["key"]: self._own_since.get(a["key"], a["since_time"]) for a in own}
        for key in [key for key in self._own_acked if key not in self._own_since]:
            self._own_acked.pop(key, None)
        for alarm in own:
            key = alarm["key"]
            alarm |= {
                "journaled": False, "since_time": self._own_since[key], "acked_by": self._own_acked.get(key),
            }  # fmt: skip

    # ------------------------------------------------------------------ rules

    def _offer_saved_rules(self, source: Any) -> None:
        """The last accepted set is in force until the files on disk prove good."""
        parsed = config.parse_rules(texts_of(source or ()))
        rules = () if parsed.faults else parsed.rules
        self.inbox.post(self._offer(rules, list(source or ())))

    def _offer_rules(self, *, force: bool = False) -> None:
        """Read the rule files again if they changed, and were seen so twice: an editor may be in the middle."""
        seen = _signature(self.rules_dir)
        settled = seen == self._rules_seen or self._rules_taken is None
        self._rules_seen = seen
        if (seen == self._rules_taken or not settled) and not force:
            return
        self._rules_taken = seen
        if self.working:  # a thousand rules take seconds to read; the loop goes on meanwhile
            asyncio.get_running_loop().run_in_executor(None, self._read_rules)
        else:
            self._read_rules()

    def _read_rules(self) -> None:
        parsed = config.load_rules(self.rules_dir, self.settings)
        if parsed.faults:
            fault = _words(parsed.faults[0]) | {"faults": len(parsed.faults)}
            self.inbox.post(model.RulesOffered((), {}, None, self.clock.monotonic(), fault))
            return
        try:
            self.inbox.post(self._offer(parsed.rules, parsed.source))
        except JournalError as error:  # no room for a new rule's number: read again when the next change is looked for
            self._rules_taken = None
            self.log.warning("rules.not_taken", why=error.message, hint=error.hint)

    def _offer(self, rules: tuple[Rule, ...], source: Any) -> model.RulesOffered:
        """Give rules and roots their numbers, which the journal knows for ever."""
        ids = self.journal.rule_ids([rule.name for rule in rules]) if rules else {}
        numbered = tuple(replace(rule, id=ids[rule.name]) for rule in rules)
        paths = {rule.watch for rule in rules}
        paths |= {companion.root for rule in rules for companion in rule.complete.companions}
        if self.daemon.recorder:
            self.daemon.recorder.keep_out(paths)
        self.daemon.metrics.keep_out(paths)
        roots = {path: self.journal.root_id(path) for path in sorted(paths)}
        self._root_paths.update({number: path for path, number in roots.items()})
        return model.RulesOffered(numbered, roots, source, self.clock.monotonic())

    # ----------------------------------------------------------------- orders

    def _take_order(self, order: model.Order) -> None:
        """From the control thread."""
        if order.verb == "alarms.ack":
            wanted = str(order.args.get("key", ""))
            own = [key for key in list(self._own_since) if wanted in ("", "all", key)]
            self._own_acked.update(dict.fromkeys(own, order.who))
            order = replace(order, args={**order.args, "own": own})
        if order.verb != "roots.accept":
            self.inbox.post(order)
            return
        path = str(order.args.get("path", ""))
        root = self.engine.roots.get(path)
        if root is not None and self.scanner.accept(root):
            self.control.answer(order.id, {"ok": True, "text": f"{path} is accepted as it is now"})
        else:
            error = f"no rule watches {path!r}"
            self.control.answer(
                order.id, {"ok": False, "error": error, "hint": "`trigger-daemon status` names the roots"}
            )

    def _nudge(self, run: int, attempt: int) -> None:
        self.executor.nudge(run, attempt)


class _Identities:
    """What the scanner remembers of a root's file system, in the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, root: int) -> Mapping[str, Any] | None:
        found = self._journal.root_identity(root)
        return found._asdict() if found else None

    def set(self, root: int, identity: dict[str, Any]) -> None:
        self._journal.set_root_identity(root, RootIdentity(**identity))


class ControlThread:
    """The thread that serves control.db: heartbeats and answers out, orders in. Its disk may be slow."""

    def __init__(self, state_dir: Path, on_order: Callable[[model.Order], None], logger: Any) -> None:
        self.control = Control.open(
            state_dir, recreated=lambda event: logger.warning("control.recreated", why=event.why)
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.control.serve, args=(on_order, self._stop), name="control", daemon=True
        )
        self.answer = self.control.answer

    def start(self, snapshot: dict[str, Any]) -> None:
        """Begin to serve, with a first heartbeat."""
        self.control.show(snapshot)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left and end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=3.0)
        if not self._thread.is_alive():
            self.control.close()


def _signature(rules_dir: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what tells one state of the rule files from another."""
    found = []
    try:
        for path in sorted(rules_dir.glob("*.yaml")):
            try:
                seen = path.stat()
            except OSError:
                continue
            found.append((path.name, seen.st_size, seen.st_mtime_ns))
    except OSError:
        pass
    return tuple(found)


def _one_line(snapshot: Mapping[str, Any]) -> str:
    """Return what `systemctl status` shows: how much is watched and done, and the first thing that is wrong."""
    roots, rules = len(snapshot["roots"]), snapshot["rules"]
    runs: Counter[str] = Counter()
    for rule in rules:
        runs.update(rule["runs"])
    in_force = any(rule["state"] != "removed" for rule in rules)
    said = (
        f"watching {roots} director{'y' if roots == 1 else 'ies'}" if roots
        else "looking at the directories for the first time" if in_force
        else "no rules: nothing is watched"
    )  # fmt: skip
    counted = {
        "settling": sum(rule["settling"] for rule in rules),
        "at work": len(snapshot["working"]),
        "held": runs[RunState.HELD],
    }
    said = ", ".join([said, *(f"{count} {what}" for what, count in counted.items() if count)])
    if snapshot["paused"]:
        said += "; paused"
    if fault := snapshot["rules_fault"]:
        more = f" (and {many - 1} more)" if (many := fault.get("faults", 1)) > 1 else ""
        said += f"; rules refused: {fault['file']}:{fault['line']}: {fault['message']}{more}"
    wrong = [alarm["what"] for alarm in snapshot["alarms"] if not alarm["acked_by"]]
    if wrong:
        said += f"; {len(wrong)} alarm{'s' if len(wrong) > 1 else ''}: {wrong[0]}"
    return " ".join(said.split())[:STATUS_MAX]


def _words(fault: ConfigFault) -> dict[str, Any]:
    return {
        "file": fault.file,
        "line": fault.line,
        "column": fault.column,
        "message": fault.message,
        "hint": fault.hint,
    }


def _recorder(record: Path, settings: config.Settings) -> Recorder:
    where = os.path.realpath(record)
    for rule in config.load_rules(Path(settings.rules_dir)).rules:
        if where.startswith(os.path.realpath(rule.watch).rstrip("/") + "/"):
            raise TraceError(
                f"{record} lies in {rule.watch}, which is watched and so only read",
                hint="choose another directory for `serve --record`",
            )
    return Recorder(record)


async def serve(settings: config.Settings, *, reload_settings: Any = None, record: Path | None = None) -> None:
    """Run a daemon until SIGTERM or SIGINT; SIGHUP reloads. `record`: where to write a trace. Raises TraceError."""
    recorder = _recorder(record, settings) if record else None
    daemon = Daemon(settings, reload_settings=reload_settings, recorder=recorder)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    try:
        await daemon.run()
    except JournalError as error:
        daemon.notify.status(f"ended: {error.message}; {error.hint}")
        raise
    finally:
        daemon.metrics.stop()
        if recorder:
            recorder.close()
