"""Carry effects out: run checks, and ask providers to prepare, start, find, poll, cancel and verify.

Every call runs on a worker thread with a deadline, and every answer, a late or
a broken one too, comes back as a fact. It decides nothing: what follows an
answer is the core's business. Effects reach it only after the commit of the
records they belong to.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trigger_daemon import actions, probe, registry
from trigger_daemon.clock import Clock
from trigger_daemon.core import model
from trigger_daemon.core.model import Fault, Scope, Verdict
from trigger_daemon.core.outputs import plain
from trigger_daemon.errors import JournalError, TriggerError
from trigger_daemon.eyes import Eyes
from trigger_daemon.failpoints import fail_point
from trigger_daemon.journal import Journal
from trigger_daemon.overwritten import Overwritten
from trigger_daemon.workers import Workers

CALL_DEADLINE_S = 120.0  # a provider's call that takes longer has no answer
VERIFY_DEADLINE_S = 6 * 3_600.0  # a provider may have to read terabytes
CHECK_DEADLINE_S = 60.0
COARSE_NS = 2_000_000_000  # to which some file systems, and services, round the time of a file
REQUESTS_CACHED_MAX = 32  # manifests in memory: those of runs at work
PROVIDER_THREADS = 8
CHECK_THREADS = 2

Post = Callable[[model.Fact], None]


class Providers:
    """The action providers, made when first used; fulfils what the core asks about actions."""

    def __init__(self, state_dir: Path, settings: Mapping[str, Any], nudge: Callable[[int, int], None]) -> None:
        self._state_dir = state_dir
        self._settings = dict(settings)
        self._nudge = nudge
        self._made: dict[str, actions.Action] = {}
        self._lock = threading.Lock()
        # The core asks for each batch; a look-up of what is installed costs milliseconds.
        self._class = functools.cache(registry.find_action)
        self.templates = functools.cache(self._templates)
        self.is_paused = False
        self.bandwidth: float | None = None  # bytes per second of each provider; who is at work shares it
        self.stopped: Callable[[str], str] = lambda path: ""
        self.reserve: Callable[[str], int] = lambda path: 0
        self.reserves: Callable[[], Mapping[str, tuple[int | None, float | None]]] = dict

    def get(self, action: str) -> actions.Action:
        """Return the provider of an action, making it and its directory if needed."""
        with self._lock:
            if action not in self._made:
                directory = self._state_dir / "actions" / action
                # On a full disk the provider says so when it starts; the core, which only asks for a name, goes on.
                with contextlib.suppress(OSError):
                    directory.mkdir(parents=True, exist_ok=True, mode=0o2770)
                context = actions.Context(
                    state_dir=str(directory),
                    nudge=self._nudge,
                    bandwidth=lambda: self.bandwidth,
                    paused=lambda: self.is_paused,
                    settings=self._settings,
                    stopped=lambda path: self.stopped(path),
                    reserve=lambda path: self.reserve(path),
                    reserves=lambda: self.reserves(),
                )
                self._made[action] = self._class(action)(context)
            return self._made[action]

    def use(self, section: str, settings: Mapping[str, Any]) -> None:
        """Give this section of the settings, as it is from now on, to the providers, also to those that are made."""
        self._settings[section] = settings

    def prepares(self, action: str) -> bool:
        return bool(self._class(action).PREPARES)

    def leaves_out(self, action: str) -> bool:
        return bool(getattr(self._class(action), "LEAVES_OUT", False))

    def refuses(self, action: str, options: Mapping[str, Any], root: str, path: str) -> str:
        """Return why an action can never take a file of this name, '' if it can, or is not installed."""
        try:
            refuses = getattr(self.get(action), "refuses", None)
        except TriggerError:  # told when the run begins
            return ""
        return str(refuses(options, root, path)) if refuses else ""

    def at_once(self, action: str) -> int | None:
        """Return how many attempts the provider serves at once; None where it sets no limit, or is not installed."""
        try:
            most: int | None = getattr(self._class(action), "AT_ONCE", None)
        except TriggerError:  # told when the run begins
            return None
        return most

    def pool(self, action: str) -> str:
        """Return the name of the threads that an action's calls are made on, '' for those of all."""
        try:
            return str(getattr(self._class(action), "POOL", ""))
        except TriggerError:  # told when the run begins
            return ""

    def _templates(self, action: str) -> frozenset[str]:
        return frozenset(name for name, option in self._class(action).OPTIONS.items() if option.template)

    def extra_names(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        return registry.extra_names(self._class(action), options)

    def destination(self, action: str, options: Mapping[str, Any]) -> str:
        return self.get(action).destination(options)

    def writes(self, action: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the directories that an action with these options writes to; nothing of one that is not installed."""
        try:
            return tuple(getattr(self.get(action), "writes", lambda options: ())(options))
        except TriggerError:  # told when the run begins
            return ()

    def forget(self, action: str, run: int) -> None:
        """The run's end is journaled: the provider needs to remember nothing of it."""
        forget = getattr(self.get(action), "forget", None)
        if forget:
            forget(run)

    def close(self) -> None:
        """End what providers keep running."""
        for provider in self._made.values():
            provider.close()


class Executor:
    """Effects in, facts out."""

    def __init__(
        self,
        *,
        journal: Journal,
        providers: Providers,
        post: Post,
        root_path: Callable[[int], str],
        clock: Clock,
        workers: Callable[[str, int, Callable[[], float]], Workers] = Workers,
        proving: Callable[[], Collection[int]] = frozenset,
    ) -> None:
        """`proving`: the rules whose proof lets files be deleted here."""
        self._journal = journal
        self._providers = providers
        self._post = post
        self._root_path = root_path
        self._clock = clock
        self._workers = workers
        self._proving = proving
        self._calls = workers("provider", PROVIDER_THREADS, clock.monotonic)
        self._pools = {"": self._calls}  # a provider whose calls wait for one far away has threads of its own
        self._pool_of: dict[int, str] = {}  # run -> name of its pool
        self._checks = workers("check", CHECK_THREADS, clock.monotonic)
        self._eyes = Eyes(clock.monotonic)
        self._requests: OrderedDict[tuple[int, int], actions.Request] = OrderedDict()
        self._handles: dict[int, tuple[int, Any]] = {}
        self._polling: set[int] = set()
        self._again: set[int] = set()  # nudged while it was being polled or started
        self._starting: set[int] = set()
        self._ended: set[int] = set()  # over while it was being polled: forgotten after that
        self._lock = threading.Lock()
        self._overwritten = Overwritten(journal)

    def carry(self, effect: model.Effect) -> None:
        """Begin to carry one effect out; returns at once."""
        match effect:
            case model.Check():
                self._check(effect)
            case model.Prepare(run, attempt):
                self._call(run, attempt, lambda: self._prepare(run, attempt), late=self._late_prepare)
            case model.Start(run, attempt, prepared):
                self._begin(run, attempt, lambda: self._start(run, attempt, prepared, find=False))
            case model.Find(run, attempt, prepared, start):
                self._begin(run, attempt, lambda: self._start(run, attempt, prepared, find=True, start=start))
            case model.Poll(run, attempt, handle):
                self._handles[run] = (attempt, handle)
                self._poll_soon(run)
            case model.Cancel(run, attempt, handle):
                self._call(run, attempt, lambda: self._cancel(run, attempt, handle))
            case model.Verify(run, attempt, handle):
                self._call(
                    run, attempt, lambda: self._verify(run, attempt, handle), VERIFY_DEADLINE_S, self._late_verify
                )

    def finished(self, run: int) -> None:
        """A run's end is journaled: let go of all that is kept for it."""
        self._drop(run)
        with self._lock:
            polled = run in self._polling
            if polled:
                self._ended.add(run)
        if not polled:
            self._forget_soon(run)

    def _forget_soon(self, run: int) -> None:
        self._pool(run).submit(lambda: self._forget(run), deadline_s=CALL_DEADLINE_S)
        self._pool_of.pop(run, None)

    def renewed(self, run: int) -> None:
        """A run is to do something else from now on: what an earlier attempt has left or proved counts no more.

        At once, and not on a worker: the next attempt may begin in this very round.
        """
        self._drop(run)
        self._forget(run)
        self._overwritten.renewed()

    def _drop(self, run: int) -> None:
        with self._lock:
            self._handles.pop(run, None)
            self._again.discard(run)
            self._starting.discard(run)
            gone = [key for key in self._requests if key[0] == run]
            for key in gone:
                del self._requests[key]

    def nudge(self, run: int, attempt: int) -> None:
        """A provider has news: poll now. Any thread."""
        self._poll_soon(run)

    def supervise(self, now: float) -> int:
        """Give up on calls that hang; return how many threads do."""
        return sum(pool.supervise(now) for pool in self._pools.values()) + self._checks.supervise(now)

    def stop(self) -> None:
        """Take no more; what is under way is found again after the next start."""
        for pool in self._pools.values():
            pool.stop()
        self._checks.stop()
        self._eyes.close()

    # -------------------------------------------------------------- providers

    def _call(
        self,
        run: int,
        attempt: int,
        task: Callable[[], None],
        deadline_s: float = CALL_DEADLINE_S,
        late: Callable[[int, int], None] | None = None,
    ) -> None:
        told = late or self._late
        self._pool(run).submit(task, deadline_s=deadline_s, late=lambda: told(run, attempt))

    def _begin(self, run: int, attempt: int, task: Callable[[], None]) -> None:
        with self._lock:
            self._starting.add(run)
        self._call(run, attempt, task)

    def _pool(self, run: int) -> Workers:
        if (name := self._pool_of.get(run)) is None:
            try:
                name = self._providers.pool(str(self._journal.request(run)["action"]))
            except (JournalError, KeyError, TypeError):  # told by the call itself
                return self._calls
            self._pool_of[run] = name
        if name not in self._pools:
            self._pools[name] = self._workers(f"provider-{name}", PROVIDER_THREADS, self._clock.monotonic)
        return self._pools[name]

    def _late(self, run: int, attempt: int) -> None:
        at = self._clock.monotonic()
        why = f"the provider did not answer within {CALL_DEADLINE_S:g} s"
        self._end_poll(run)
        self._post(model.StartUnknown(run, attempt, why, at))
        self._post(model.Polled(run, attempt, "unreachable", at, why=why))

    def _late_prepare(self, run: int, attempt: int) -> None:
        """Nothing was asked for yet: it is prepared again later."""
        why = f"the provider did not prepare it within {CALL_DEADLINE_S:g} s"
        self._post(model.NotStarted(run, attempt, Fault("transient", why), self._clock.monotonic(), preparing=True))

    def _late_verify(self, run: int, attempt: int) -> None:
        why = f"the provider did not prove it within {VERIFY_DEADLINE_S / 3_600:g} h"
        self._post(model.CannotVerify(run, attempt, Fault("transient", why), self._clock.monotonic()))

    def _request(self, run: int, attempt: int) -> actions.Request:
        """Return what the attempt is to do, from the journal: a repetition is identical."""
        with self._lock:
            known = self._requests.get((run, attempt))
            if known is not None:
                self._requests.move_to_end((run, attempt))
                return known
        kept: Mapping[str, Any] = self._journal.request(run)
        members = self._journal.manifest(run)
        files = tuple(
            actions.File(self._root_path(m.root), m.path, m.size, m.mtime_ns, m.role, m.content) for m in members
        )
        options = dict(kept["options"])
        limit = kept.get("bandwidth")
        if limit is not None and "bandwidth" in options:
            options["bandwidth"] = min(limit, options["bandwidth"] or limit)
        request = actions.Request(
            run,
            attempt,
            str(kept.get("rule", "")),
            dict(kept.get("group") or {}),
            dict(kept["captures"]),
            files,
            options,
            limit,
            kept.get("written"),
        )
        sole = self._sole(self._providers.get(str(kept["action"])), request)
        request = replace(request, keep={to: path for to, _, path, *_ in sole})
        with self._lock:
            self._requests[(run, attempt)] = request
            while len(self._requests) > REQUESTS_CACHED_MAX:
                self._requests.popitem(last=False)
        return request

    def _provider(self, run: int) -> actions.Action:
        return self._providers.get(str(self._journal.request(run)["action"]))

    def prove_again(
        self, run: int, record: Mapping[str, Any], read: bool
    ) -> tuple[str, bool, Sequence[Mapping[str, Any]]]:
        """Ask whether a copy still is what was proved; return why not, whether it surely is not, else what is proved.

        By its stat, where the action can tell that (`stands`) and contents need not be read; else by a proof of this
        one file, where the action proves parts, or of its whole run. It waits for that.
        """
        try:
            provider, kept = self._provider(run), self._journal.attempt(run)
            if kept is None:
                return "the journal knows no attempt of its run", False, ()
            request = self._request(run, kept.attempt)
            if (stands := getattr(provider, "stands", None)) is not None:
                why = "it was touched since it was sent, and nobody can compare it there" if read else ""
                why = why or self._overwritten.why_not(provider, run, kept.made_time, record)
                why = why or stands(request, kept.handle, record)
                return why, False, () if why else (record,)
            if getattr(provider, "PROVES_PARTS", False):
                request = replace(request, files=tuple(file for file in request.files if _is_of(record, file)))
            answer = provider.verify(request, kept.handle)
        except Exception as error:  # noqa: BLE001  a stranger's code: whatever it was, there is no proof
            return f"it could not be proved again: {_words(error)}", False, ()
        match answer:
            case actions.Proof(members):
                return "", False, members
            case actions.Differs(which):
                return f"its copy differs: {next(iter(which.values()), 'nobody says how')}", True, ()
        return f"it could not be proved again: {answer.fault.why}", False, ()

    def shows(self, run: int, to: str) -> bool:
        """Say whether something stands where this run's action could have written. Raises OSError if that is unknown.

        An action that cannot look there is believed: its proof is all that there is.
        """
        try:
            provider, kept = self._provider(run), self._journal.attempt(run)
            look = getattr(provider, "standing", None)
            return look is not None and look(self._request(run, kept.attempt if kept else 1), [to])[to] is not None
        except Exception as error:  # a stranger's code: whatever it was, nobody knows
            why = error.fault.why if isinstance(error, actions.Refused) else _words(error)
            raise OSError(errno.EIO, why) from error

    def _prepare(self, run: int, attempt: int) -> None:
        fail_point("executor.prepare")
        answer = _answer(lambda: self._provider(run).prepare(self._request(run, attempt)))
        fail_point("executor.prepared")
        at = self._clock.monotonic()
        match answer:
            case actions.Refused(fault=fault):
                self._post(model.NotStarted(run, attempt, fault, at, preparing=True))
            case Exception():  # nothing was asked for yet
                fault = Fault("transient", _words(answer))
                self._post(model.NotStarted(run, attempt, fault, at, preparing=True))
            case prepared:
                self._post(model.Prepared(run, attempt, prepared, at))

    def _start(self, run: int, attempt: int, prepared: Any, *, find: bool, start: bool = True) -> None:
        act = functools.partial(self._find_or_start, find=find) if start else self._look
        answer = _answer(lambda: act(run, attempt, prepared))
        fail_point("executor.started")
        at = self._clock.monotonic()
        if isinstance(answer, Exception):
            with self._lock:
                self._starting.discard(run)
                self._again.discard(run)
        match answer:
            case actions.Refused(fault=fault):
                self._post(model.NotStarted(run, attempt, fault, at))
            case JournalError() if not find:  # the request itself cannot be read; else the attempt may be under way
                self._post(model.NotStarted(run, attempt, Fault("person", answer.message, answer.hint), at))
            case Exception():  # whatever it was, the provider may have taken it
                self._post(model.StartUnknown(run, attempt, _words(answer), at))
            case handle:
                self._post(model.Started(run, attempt, handle, at))
                with self._lock:
                    self._handles[run] = (attempt, handle)
                    self._starting.discard(run)
                    nudged = run in self._again
                    self._again.discard(run)
                if nudged:  # it had news before its handle was known
                    self._poll_soon(run)

    def _find_or_start(self, run: int, attempt: int, prepared: Any, *, find: bool) -> Any:
        provider, request = self._provider(run), self._request(run, attempt)
        handle = provider.find(request, prepared) if find else None
        if handle is None:
            self._refuse_to_replace(provider, request)
            fail_point("executor.start")
            handle = provider.start(request, prepared)
        return handle

    def _refuse_to_replace(self, provider: actions.Action, request: actions.Request) -> None:
        """Raise Refused where a copy would be replaced that is all that is left of a file which was deleted here."""
        sole = [
            (to, (file.size, file.mtime_ns), gone, why) for to, file, path, gone, why in self._sole(provider, request)
            # What was put back, the provider compares.
            if path != f"{file.root.rstrip('/')}/{file.path}" or (file.size, file.mtime_ns) not in gone
        ]  # fmt: skip
        standing = self._standing(provider, request, {to for to, *_ in sole})
        for to, version, gone, why in sole:
            there = standing[to]
            # What has the size and time of this version, and not those of what was deleted, is no copy of that.
            is_new = there is not None and _near(there, version)
            if there is None or (is_new and not any(_near(there, each) for each in gone)):
                continue
            why = f"{to} {why}: it would be replaced"
            hint = "move that copy elsewhere, or change the rule's destination; then `runs retry`"
            raise actions.Refused(Fault("person", why, hint))

    def _sole(
        self, provider: actions.Action, request: actions.Request
    ) -> Iterator[tuple[str, actions.File, str, frozenset[tuple[int, int]], str]]:
        """Yield targets that may be all that is left, with their file, the path and versions deleted, and words."""
        targets = getattr(provider, "targets", None)
        if targets is None or not self._journal.has_sole_copies():  # where a command writes nobody knows
            return
        for to, file in targets(request):
            names = self._eyes.known_as(to) if os.path.isabs(to) else {to}
            for path, gone in self._journal.sole_copies(names).items():
                yield to, file, path, gone, f"is all that is left of {path}, which was deleted here after proof"
            if gone := self._journal.doubted(file, self._proving()):
                path = f"{file.root.rstrip('/')}/{file.path}"
                why = f"may be all that is left of {path} as it was: the journal was put back from a backup or moved, "
                yield to, file, path, gone, f"{why}and does not know what was deleted here since"

    def _standing(
        self, provider: actions.Action, request: actions.Request, tos: Set[str]
    ) -> dict[str, tuple[int, int] | None]:
        """Return size and mtime_ns of what stands at each target, None if nothing does. Raises Refused if unknown.

        What cannot be looked at from here, its provider looks at, if it can: all of it at once.
        """
        far = [to for to in tos if not os.path.isabs(to)]
        look = getattr(provider, "standing", None)
        found: dict[str, tuple[int, int] | None] = dict.fromkeys(far, (-1, 0))
        if far and look is not None:
            found.update(look(request, far))
        for to in tos - found.keys():
            try:
                seen = self._eyes.lstat(to)
                found[to] = seen.st_size, seen.st_mtime_ns
            except (FileNotFoundError, NotADirectoryError):
                found[to] = None
            except OSError as error:
                why = f"{to} cannot be looked at: {error.strerror}"
                hint = "is its disk or server well? the run goes on by itself"
                raise actions.Refused(Fault("transient", why, hint, Scope.DESTINATION, counts=False)) from None
        return found

    def _look(self, run: int, attempt: int, prepared: Any) -> Any:
        """Look for an attempt that nobody wants any more. Raises Refused if there surely is none."""
        provider, request = self._provider(run), self._request(run, attempt)
        handle = getattr(provider, "look", provider.find)(request, prepared)
        if handle is None:
            raise actions.Refused(Fault("transient", "it was not started", counts=False))
        return handle

    def _poll_soon(self, run: int) -> None:
        with self._lock:
            known = self._handles.get(run)
            if run in self._polling or (known is None and run in self._starting):
                self._again.add(run)
                return
            if known is None:
                return
            self._polling.add(run)
        attempt, handle = known
        self._call(run, attempt, lambda: self._poll(run, attempt, handle))

    def _poll(self, run: int, attempt: int, handle: Any) -> None:
        if run not in self._handles:  # over while this waited for a thread: asked now, a provider could begin it again
            self._end_poll(run)
            return
        fail_point("executor.poll")
        seen = _answer(lambda: self._provider(run).poll(self._request(run, attempt), handle))
        fail_point("executor.polled")
        at = self._clock.monotonic()
        if isinstance(seen, Exception):  # a failed poll never ends an attempt
            fact = model.Polled(run, attempt, "unreachable", at, why=_words(seen))
        else:
            fact = model.Polled(
                run,
                attempt,
                seen.status,
                at,
                seen.why,
                seen.hint,
                seen.fault,
                seen.files_done,
                seen.bytes_done,
                plain(seen.output),
                seen.changed,
                seen.again_in_s,
            )
        again = self._end_poll(run)
        self._post(fact)
        if again:
            self._poll_soon(run)

    def _end_poll(self, run: int) -> bool:
        """Let the run be polled again, or forgotten; return whether there was news meanwhile."""
        with self._lock:
            self._polling.discard(run)
            again, ended = run in self._again, run in self._ended
            self._again.discard(run)
            self._ended.discard(run)
        if ended:
            self._forget_soon(run)
        return again

    def _cancel(self, run: int, attempt: int, handle: Any) -> None:
        """A wish: the polls tell what became of it."""
        answer = _answer(lambda: self._provider(run).cancel(self._request(run, attempt), handle))
        if isinstance(answer, Exception):
            at = self._clock.monotonic()
            self._post(model.Polled(run, attempt, "unreachable", at, why=f"cancel: {_words(answer)}"))
        self._poll_soon(run)

    def _verify(self, run: int, attempt: int, handle: Any) -> None:
        fail_point("executor.verify")
        answer = _answer(lambda: self._provider(run).verify(self._request(run, attempt), handle))
        fail_point("executor.verified")
        at = self._clock.monotonic()
        match answer:
            case actions.Proof(members, changed):
                self._post(model.Proved(run, attempt, members, at, changed))
            case actions.Differs(which, changed):
                self._post(model.Mismatch(run, attempt, which, at, changed))
            case actions.Unproven(fault):
                self._post(model.CannotVerify(run, attempt, fault, at))
            case Exception():  # no proof was had; the core asks again
                self._post(model.CannotVerify(run, attempt, Fault("transient", _words(answer)), at))

    def _forget(self, run: int) -> None:
        try:
            fail_point("executor.forget")
            self._providers.forget(str(self._journal.request(run)["action"]), run)
        except (JournalError, OSError):
            pass  # a left-over record costs some bytes and is found again by the provider

    # ----------------------------------------------------------------- checks

    def _check(self, effect: model.Check) -> None:
        self._checks.submit(
            lambda: self._run_checks(effect), deadline_s=CHECK_DEADLINE_S, late=lambda: self._check_late(effect)
        )

    def _run_checks(self, effect: model.Check) -> None:
        path = os.path.join(self._root_path(effect.root), effect.path)
        here = os.path.dirname(effect.path)
        companions = {
            os.path.relpath(p, here) if r == effect.root else os.path.basename(p): os.path.join(self._root_path(r), p)
            for r, p in effect.companions
        }
        try:
            judged = probe.run_checks(
                path, effect.state, effect.checks, companions, registry.find_check, effect.siblings
            )
        except probe.Changed:
            judged = probe.Judged(Verdict.INCOMPLETE, "it changed while it was being checked")
        except OSError as error:
            judged = probe.Judged(Verdict.INCOMPLETE, f"it could not be read: {error.strerror}")
        self._checked(effect, judged)

    def _check_late(self, effect: model.Check) -> None:
        why = f"its checks had no answer within {CHECK_DEADLINE_S:g} s"
        self._checked(effect, probe.Judged(Verdict.INCOMPLETE, why))

    def _checked(self, effect: model.Check, judged: probe.Judged) -> None:
        about = (effect.rule, effect.root, effect.path, effect.state)
        self._post(judged.fact(about, self._clock.monotonic(), effect.scope))


def _near(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Say whether two versions are alike where times are kept as coarsely as on FAT."""
    return one[0] == other[0] and abs(one[1] - other[1]) <= COARSE_NS


T = TypeVar("T")


def _answer(ask: Callable[[], T]) -> T | Exception:
    """Return what a provider answers, or what it raised: it may raise anything, and every end is an answer."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  a stranger's code; the callers tell what each means
        return error


def _is_of(record: Mapping[str, Any], file: actions.File) -> bool:
    return str(record.get("root", "")).rstrip("/") == file.root.rstrip("/") and record.get("path") == file.path


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, actions.Unknown) else f"{type(error).__name__}: {error}"
