"""Carry effects out: run checks, and ask providers to prepare, start, find, poll, cancel and verify.

Every call runs on a worker thread with a deadline, and every answer, a late or
a broken one too, comes back as a fact. It decides nothing: what follows an
answer is the core's business. Effects reach it only after the commit of the
records they belong to.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trigger_daemon import actions, probe, registry
from trigger_daemon.clock import Clock
from trigger_daemon.core import model
from trigger_daemon.core.model import Fault, Verdict
from trigger_daemon.errors import JournalError
from trigger_daemon.failpoints import fail_point
from trigger_daemon.journal import Journal
from trigger_daemon.workers import Workers

CALL_DEADLINE_S = 120.0  # a provider's call that takes longer has no answer
VERIFY_DEADLINE_S = 6 * 3_600.0  # a provider may have to read terabytes
CHECK_DEADLINE_S = 60.0
REQUESTS_CACHED_MAX = 32  # manifests in memory: those of runs at work
PROVIDER_THREADS = 8
CHECK_THREADS = 2

Post = Callable[[model.Fact], None]


class Providers:
    """The action providers, made when first used; fulfils what the core asks about actions."""

    def __init__(self, state_dir: Path, settings: Mapping[str, Any], nudge: Callable[[int, int], None]) -> None:
        self._state_dir = state_dir
        self._settings = settings
        self._nudge = nudge
        self._made: dict[str, actions.Action] = {}
        self._lock = threading.Lock()
        # The core asks for each batch; a look-up of what is installed costs milliseconds.
        self._class = functools.cache(registry.find_action)
        self.templates = functools.cache(self._templates)
        self.is_paused = False
        self.bandwidth: float | None = None

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
                )
                self._made[action] = self._class(action)(context)
            return self._made[action]

    def prepares(self, action: str) -> bool:
        return bool(self._class(action).PREPARES)

    def leaves_out(self, action: str) -> bool:
        return bool(getattr(self._class(action), "LEAVES_OUT", False))

    def _templates(self, action: str) -> frozenset[str]:
        return frozenset(name for name, option in self._class(action).OPTIONS.items() if option.template)

    def extra_names(self, action: str) -> tuple[str, ...]:
        return tuple(getattr(self._class(action), "EXTRA_NAMES", ()))

    def destination(self, action: str, options: Mapping[str, Any]) -> str:
        return self.get(action).destination(options)

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
    ) -> None:
        self._journal = journal
        self._providers = providers
        self._post = post
        self._root_path = root_path
        self._clock = clock
        self._calls = workers("provider", PROVIDER_THREADS, clock.monotonic)
        self._checks = workers("check", CHECK_THREADS, clock.monotonic)
        self._requests: OrderedDict[tuple[int, int], actions.Request] = OrderedDict()
        self._handles: dict[int, tuple[int, Any]] = {}
        self._polling: set[int] = set()
        self._again: set[int] = set()  # nudged while it was being polled
        self._lock = threading.Lock()

    def carry(self, effect: model.Effect) -> None:
        """Begin to carry one effect out; returns at once."""
        match effect:
            case model.Check():
                self._check(effect)
            case model.Prepare(run, attempt):
                self._call(run, attempt, lambda: self._prepare(run, attempt), late=self._late_prepare)
            case model.Start(run, attempt, prepared):
                self._call(run, attempt, lambda: self._start(run, attempt, prepared, find=False))
            case model.Find(run, attempt, prepared):
                self._call(run, attempt, lambda: self._start(run, attempt, prepared, find=True))
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
        with self._lock:
            self._handles.pop(run, None)
            self._again.discard(run)
            gone = [key for key in self._requests if key[0] == run]
            for key in gone:
                del self._requests[key]
        self._calls.submit(lambda: self._forget(run), deadline_s=CALL_DEADLINE_S)

    def nudge(self, run: int, attempt: int) -> None:
        """A provider has news: poll now. Any thread."""
        self._poll_soon(run)

    def supervise(self, now: float) -> int:
        """Give up on calls that hang; return how many threads do."""
        return self._calls.supervise(now) + self._checks.supervise(now)

    def stop(self) -> None:
        """Take no more; what is under way is found again after the next start."""
        self._calls.stop()
        self._checks.stop()

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
        self._calls.submit(task, deadline_s=deadline_s, late=lambda: told(run, attempt))

    def _late(self, run: int, attempt: int) -> None:
        at = self._clock.monotonic()
        why = f"the provider did not answer within {CALL_DEADLINE_S:g} s"
        self._polling.discard(run)
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
        )
        with self._lock:
            self._requests[(run, attempt)] = request
            while len(self._requests) > REQUESTS_CACHED_MAX:
                self._requests.popitem(last=False)
        return request

    def _provider(self, run: int) -> actions.Action:
        return self._providers.get(str(self._journal.request(run)["action"]))

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

    def _start(self, run: int, attempt: int, prepared: Any, *, find: bool) -> None:
        answer = _answer(lambda: self._find_or_start(run, attempt, prepared, find=find))
        fail_point("executor.started")
        at = self._clock.monotonic()
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
                    nudged = run in self._again
                    self._again.discard(run)
                if nudged:  # it had news before its handle was known
                    self._poll_soon(run)

    def _find_or_start(self, run: int, attempt: int, prepared: Any, *, find: bool) -> Any:
        provider, request = self._provider(run), self._request(run, attempt)
        handle = provider.find(request, prepared) if find else None
        if handle is None:
            fail_point("executor.start")
            handle = provider.start(request, prepared)
        return handle

    def _poll_soon(self, run: int) -> None:
        with self._lock:
            known = self._handles.get(run)
            if run in self._polling or known is None:
                self._again.add(run)
                return
            self._polling.add(run)
        attempt, handle = known
        self._call(run, attempt, lambda: self._poll(run, attempt, handle))

    def _poll(self, run: int, attempt: int, handle: Any) -> None:
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
                seen.output,
                seen.changed,
                seen.again_in_s,
            )
        with self._lock:
            self._polling.discard(run)
            again = run in self._again
            self._again.discard(run)
        self._post(fact)
        if again:
            self._poll_soon(run)

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


T = TypeVar("T")


def _answer(ask: Callable[[], T]) -> T | Exception:
    """Return what a provider answers, or what it raised: it may raise anything, and every end is an answer."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  a stranger's code; the callers tell what each means
        return error


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, actions.Unknown) else f"{type(error).__name__}: {error}"
