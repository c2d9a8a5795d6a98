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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from trigger_daemon import __version__, config, hints, log, trace
from trigger_daemon.clock import Clock, SystemClock
from trigger_daemon.config.settings import Amount
from trigger_daemon.control import Control
from trigger_daemon.core import model
from trigger_daemon.core.engine import Engine
from trigger_daemon.core.model import RECORDS, Effect, Fact, RunState
from trigger_daemon.core.rules import Rule
from trigger_daemon.errors import ConfigError, ConfigFault, JournalDamaged, JournalError, JournalFull
from trigger_daemon.executor import Executor, Providers
from trigger_daemon.failpoints import fail_point
from trigger_daemon.inbox import Inbox
from trigger_daemon.journal import ClaimReader, Journal, RootIdentity
from trigger_daemon.scanner import Scanner
from trigger_daemon.systemd import Notifier
from trigger_daemon.trace import Recorder, TraceError
from trigger_daemon.volumes import Gauge, Volumes

BEAT_S = 2.0  # heartbeat for the command line
ORDERS_EVERY_S = 0.3  # how often control.db is asked for orders: they are answered within a second
RULES_EVERY_S = 2.0  # how often the rule files are looked at; a change is taken when seen twice alike
COMMIT_AGAIN_S = 1.0  # a failed commit is tried again so often
RESTART_S = 2.0  # after a broken journal
THIN_EVERY_S = 3_600.0
BALLAST_EVERY_S = 30.0  # how often it is looked whether there is room for the ballast again
THIN_RUNS = 1_000
WAL_ALARM_BYTES = 256 * 2**20  # a checkpoint keeps it near 16 MiB while nobody stands in the way
PART_STOPS_S = 5.0  # the service manager is less patient than a hung share
LANES_MAX = 8  # copying processes; more only fight for one disk
LOW, CRITICAL = Amount(ratio=0.2), Amount(ratio=0.05)  # of a volume whose settings say nothing

_RECORD_TYPES = frozenset(RECORDS)


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
        self.clock: Clock = clock or SystemClock()
        self.log = log.get()
        self.notify = Notifier()
        self._stopping = False
        self._reload = False
        self._life: Life | None = None

    async def run(self) -> None:
        """Work until `stop`. Raises JournalError if the journal cannot be had at the start."""
        first = True
        while not self._stopping:
            life = Life(self, first=first)
            self._life = life
            try:
                await life.run()
            except JournalDamaged:  # only a person mends it
                raise
            except JournalError as error:
                if first and not life.working:
                    raise
                self.log.error("journal.broken", why=error.message, hint=error.hint)
                await asyncio.sleep(RESTART_S)
            finally:
                self._life = None
                await life.close()
            first = False

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
            except ConfigError as error:
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
        self._next_rules = 0.0
        self._next_thin = self.clock.monotonic() + 60.0
        self._next_ballast = 0.0
        self._on_reserve = False
        self._root_paths: dict[int, str] = {}

    # ------------------------------------------------------------------ start

    async def run(self) -> None:
        """Open everything, then loop."""
        settings = self.settings
        loop = asyncio.get_running_loop()
        self.journal = self._part(await loop.run_in_executor(
                self._journal_thread, functools.partial(Journal.open, self.state_dir, make=self.first)
            ))
        self.inbox = Inbox(loop)
        self.providers = self._part(
            Providers(self.state_dir, {"lanes": min(settings.throttle.runs, LANES_MAX)}, self._nudge)
        )
        saved = await loop.run_in_executor(self._journal_thread, self.journal.load)
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
        )
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
            )
        )
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
        gauges = [Gauge(v.path, v.low or LOW, v.critical or CRITICAL) for v in settings.volumes]
        gauges = gauges or [Gauge(settings.state_dir, LOW, CRITICAL)]
        self.volumes = self._part(Volumes(gauges, self.clock.monotonic))
        self.control = self._part(ControlThread(self.state_dir, self._take_order, self.log))
        self._offer_saved_rules(saved.rules_source)
        self._offer_rules()
        self.working = True
        await self._loop()

    def _part(self, part: Any) -> Any:
        self._parts.append(part)
        return part

    async def close(self) -> None:
        """Stop every part, the last made first; the journal at the end."""
        if hasattr(self, "inbox"):
            self.inbox.close()
        for part in reversed(self._parts):
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
                self.daemon.notify.ready("watching")
            self._supervise(now)
            deadline = self.engine.next_deadline()
            until = self._next_beat if deadline is None else min(deadline, self._next_beat)
            await self.inbox.wait(until - self.clock.monotonic())
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
                self.daemon.notify.status("watching")
                self._commit_fault = ""
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
            case model.RunMoved():
                if effect.final:
                    self.executor.finished(effect.run)
                # On the way of every run; its beginning (batch.closed), its end and what goes wrong are for everybody.
                loud = effect.final or effect.to_state in (RunState.HELD, RunState.PENDING, RunState.INACTIVE)
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
            case model.Kept("paused", value):
                self.providers.is_paused = bool(value)
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
            self.engine.runs.runs_max = self.settings.throttle.runs
            if self.daemon.recorder:
                self.daemon.recorder.runs_max(self.settings.throttle.runs)
            self._offer_rules(force=True)
            self.daemon.notify.ready("watching")
        if now >= self._next_rules:
            self._next_rules = now + RULES_EVERY_S
            self._offer_rules()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
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
            self.volumes.sample(now)
            at_work = max(1, self.engine.runs.at_work)
            bandwidth = self.settings.throttle.bandwidth
            self.providers.bandwidth = None if bandwidth is None else bandwidth / at_work
            self.providers.is_paused = bool(self.engine.runs.paused_all)
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
            done = self.journal.thin(self.clock.utc() - self.settings.keep_done_s, THIN_RUNS)
        except JournalError as error:
            self.log.warning("journal.thin_failed", why=error.message)
            return
        if done == THIN_RUNS and not self.daemon.stopping:
            self._journal_thread.submit(self._thin)

    def _tell(self) -> None:
        """Hand the command line a heartbeat; the first one begins the service of its file."""
        if self._told:
            self.control.control.show(self._snapshot())
        else:
            self._told = True
            self.control.start(self._snapshot())

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
        wal = self.journal.wal_bytes()
        if wal > WAL_ALARM_BYTES:
            words["alarms"].append(
                {
                    "key": "journal-wal",
                    "what": f"the -wal has grown to {wal // 2**20} MiB: a program stands still, reading the journal",
                    "hint": f"find it with `fuser {self.journal.path}` and end it",
                    "since_time": self.clock.utc(),
                    "acked_by": None,
                }
            )
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
            "health": health,
            "events": events,
            "hints": self.hints.counters(),
        }
        words["volumes"] = [gauge.words() for gauge in self.volumes.gauges]
        return words

    # ------------------------------------------------------------------ rules

    def _offer_saved_rules(self, source: Any) -> None:
        """The last accepted set is in force until the files on disk prove good."""
        parsed = config.parse_rules([(item["file"], item["text"]) for item in source or ()])
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
        parsed = config.load_rules(self.rules_dir)
        if parsed.faults:
            fault = _words(parsed.faults[0])
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
        roots = {path: self.journal.root_id(path) for path in sorted(paths)}
        self._root_paths.update({number: path for path, number in roots.items()})
        return model.RulesOffered(numbered, roots, source, self.clock.monotonic())

    # ----------------------------------------------------------------- orders

    def _take_order(self, order: model.Order) -> None:
        """From the control thread."""
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
    finally:
        if recorder:
            recorder.close()
