"""One thread that owns the app, its tokens and every client of the SDK: none of them may be shared.

Callers of any thread hand it a function of the clients and wait. Retries of
the SDK are off: what may be repeated, and when, is decided where the journal
knows of it. Only a 401, which nothing was done for, is repeated once at once,
with a fresh token.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.globus import NO_CLIENT, Account, account
from trigger_daemon.globus.faults import AGAIN, Trouble, judge

if TYPE_CHECKING:
    import globus_sdk

CALL_S = 100.0  # of a call on the thread, with all its requests; it ends before the executor gives it up
WAIT_S = 60.0  # a call that was not begun by then is not begun any more
SLOW = "is Globus slow (status.globus.org)? it goes on by itself"
WAITING_MAX = 200  # calls that wait for the thread; the executor has eight threads and the commands have one

T = TypeVar("T")


@dataclass(slots=True)
class _Asked:
    call: Callable[[Clients], Any]
    what: str
    done: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    given_up: bool = False  # its caller has gone: it must not be begun any more
    answer: Any = None
    trouble: Trouble | None = None


class Clients:
    """The SDK's clients, each made once. To be used on the service's thread only."""

    def __init__(self, who: Account) -> None:
        self.account = who
        self.ends_at = math.inf  # when the call that is under way must have ended; monotonic
        self._app: globus_sdk.GlobusApp | None = None
        self._made: dict[str, Any] = {}

    @property
    def app(self) -> globus_sdk.GlobusApp:
        """The app: of a client with its secret, or of a person who has logged in. Raises Trouble if neither is set."""
        if self._app is None:
            self._app = make_app(self.account, ends_at=lambda: self.ends_at)
        return self._app

    @property
    def transfer(self) -> globus_sdk.TransferClient:
        import globus_sdk

        made: globus_sdk.TransferClient = self._make("transfer", globus_sdk.TransferClient)
        return made

    @property
    def flows(self) -> globus_sdk.FlowsClient:
        import globus_sdk

        made: globus_sdk.FlowsClient = self._make("flows", globus_sdk.FlowsClient)
        return made

    @property
    def search(self) -> globus_sdk.SearchClient:
        import globus_sdk
        from globus_sdk.scopes import SearchScopes

        made: globus_sdk.SearchClient = self._make("search", globus_sdk.SearchClient, app_scopes=[SearchScopes.all])
        return made

    @property
    def timers(self) -> globus_sdk.TimersClient:
        import globus_sdk

        made: globus_sdk.TimersClient = self._make("timers", globus_sdk.TimersClient)
        return made

    @property
    def compute(self) -> globus_sdk.ComputeClientV2:
        """Compute, to ask."""
        import globus_sdk

        made: globus_sdk.ComputeClientV2 = self._make("compute 2", globus_sdk.ComputeClientV2)
        return made

    @property
    def compute_submits(self) -> globus_sdk.ComputeClientV3:
        """Compute, to submit: results in JSON can only be asked for in version 3 of its interface."""
        import globus_sdk

        made: globus_sdk.ComputeClientV3 = self._make("compute 3", globus_sdk.ComputeClientV3)
        return made

    def flow(self, flow_id: str) -> globus_sdk.SpecificFlowClient:
        """Return the client that starts one flow: each has a scope of its own."""
        import globus_sdk

        make = globus_sdk.SpecificFlowClient
        made: globus_sdk.SpecificFlowClient = self._make(f"flow {flow_id}", make, flow_id=flow_id)
        return made

    def _make(self, key: str, kind: Callable[..., Any], **more: Any) -> Any:
        if key not in self._made:
            from globus_sdk.transport import RetryConfig

            from trigger_daemon.globus.transport import Transport

            # An object of each client's own: checks are kept in it.
            retries, transport = RetryConfig(max_retries=0), Transport(key.partition(" ")[0], lambda: self.ends_at)
            self._made[key] = kind(app=self.app, retry_config=retries, transport=transport, **more)
        return self._made[key]


def make_app(
    who: Account, *, asking: bool = False, ends_at: Callable[[], float] = lambda: math.inf
) -> globus_sdk.GlobusApp:
    """Return the app of an account; with `asking` it may prompt on the terminal. Raises Trouble if nothing is set."""
    import globus_sdk
    from globus_sdk.transport import RetryConfig

    from trigger_daemon.globus.transport import Transport

    if not who.client_id:
        raise Trouble(Fault("person", *NO_CLIENT, Scope.CREDENTIAL), False)

    def once() -> dict[str, Any]:
        return {"retry_config": RetryConfig(max_retries=0), "transport": Transport("auth", ends_at)}

    app: globus_sdk.GlobusApp
    if who.client_secret:
        client = globus_sdk.ConfidentialAppAuthClient(who.client_id, who.client_secret, **once())
        config = globus_sdk.GlobusAppConfig(token_storage="memory")
        app = globus_sdk.ClientApp("trigger-daemon", login_client=client, config=config)
    else:
        from trigger_daemon.globus.tokens import TokenFile, seen_by_others

        if why := seen_by_others(who.tokens):
            hint = f"`chmod 600 {who.tokens}`; if somebody may have read it, log out before you log in anew; {AGAIN}"
            raise Trouble(Fault("person", why, hint, Scope.CREDENTIAL), False)
        login = globus_sdk.NativeAppAuthClient(who.client_id, **once())
        more: dict[str, Any] = {} if asking else {"token_validation_error_handler": None}  # nothing waits at a prompt
        config = globus_sdk.GlobusAppConfig(token_storage=TokenFile(who.tokens), request_refresh_tokens=True, **more)
        app = globus_sdk.UserApp("trigger-daemon", login_client=login, config=config)
    for made in getattr(app, "_resources_to_close", ()):  # with its own client the app looks at consents
        if isinstance(made, globus_sdk.AuthClient):
            made.transport, made.retry_config = Transport("auth", ends_at), RetryConfig(max_retries=0)
    return app


class Service:
    """The thread. `ask` may be called from any other one."""

    def __init__(self, who: Account) -> None:
        self._clients = Clients(who)
        # What starts or ends something goes before what only asks.
        self._asked: queue.PriorityQueue[tuple[int, int, _Asked | None]] = queue.PriorityQueue(WAITING_MAX)
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def account(self) -> Account:
        return self._clients.account

    def ask(self, what: str, call: Callable[[Clients], T], *, first: bool = False) -> T:
        """Return what `call` returns on the service's thread, `first` of all. Raises Trouble, and nothing else."""
        asked = _Asked(call, what)
        with self._lock:  # `close` answers all that wait: nothing may be put behind its back
            if self._closed:
                raise _closed(what)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="globus", daemon=True)
                self._thread.start()
            try:
                self._asked.put_nowait((0 if first else 1, next(self._count), asked))
            except queue.Full:
                why = f"{what}: Globus is slow, and {WAITING_MAX} requests wait already"
                raise Trouble(Fault("transient", why, counts=False, retry_after_s=30.0), False) from None
        if not asked.done.wait(WAIT_S):
            with self._lock:
                asked.given_up = not asked.begun
            if asked.given_up:
                why = f"{what}: Globus is slow: its turn has not come in {WAIT_S:.0f} s"
                raise Trouble(Fault("transient", why, SLOW, counts=False, retry_after_s=30.0), False)
            asked.done.wait()  # what is under way may be carried out: its end is waited for, and it has one
        if asked.trouble is not None:
            raise asked.trouble
        answer: T = asked.answer
        return answer

    def close(self) -> None:
        """Answer nothing more; a request that is under way is not waited for."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        while True:  # nobody may wait for what will not come
            try:
                _, _, waiting = self._asked.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.trouble = _closed(waiting.what)
                waiting.done.set()
        self._asked.put((0, next(self._count), None))

    def _run(self) -> None:
        while (asked := self._asked.get()[2]) is not None:
            with self._lock:
                asked.begun = not asked.given_up
            if not asked.begun:
                continue
            self._clients.ends_at = time.monotonic() + CALL_S
            try:
                asked.answer = self._answer(asked)
            except BaseException as error:  # noqa: BLE001  the one thread: it must live, and every end is an answer
                asked.trouble = judge(error, asked.what)
            asked.done.set()

    def _answer(self, asked: _Asked) -> Any:
        try:
            return asked.call(self._clients)
        except Exception as error:
            trouble = judge(error, asked.what)
            if trouble.code == "invalid_grant" and not self.account.client_secret:
                self._clients = Clients(self.account)  # somebody may log in anew: its tokens are read again
            elif trouble.status == 401 and trouble.code != "invalid_client":
                return asked.call(self._clients)  # the failed call has dropped its token
            if trouble.scopes and self.account.client_secret:
                return self._consent(asked, error)
            raise trouble from error

    def _consent(self, asked: _Asked, error: Exception) -> Any:
        """A client gives itself the consents that are wanted, once."""
        from globus_sdk.gare import to_gare

        gare = to_gare(error)  # type: ignore[arg-type]
        if gare is None:
            raise error
        self._clients.app.login(auth_params=gare.authorization_parameters)
        return asked.call(self._clients)


def _closed(what: str) -> Trouble:
    return Trouble(Fault("transient", f"{what}: the daemon stops", counts=False), False)


_Key = tuple[str, str, str]
_services: dict[_Key, tuple[Service, int]] = {}
_lock = threading.Lock()


def shared(who: Account) -> Service:
    """Return the one service of an account, over all actions of a process; `let_go` of it in the end."""
    key = (who.client_id, who.client_secret, who.tokens)
    with _lock:
        service, users = _services.get(key) or (Service(who), 0)
        _services[key] = (service, users + 1)
        return service


def let_go(service: Service) -> None:
    """End a service when its last user is gone."""
    with _lock:
        for key, (kept, users) in list(_services.items()):
            if kept is service:
                if users > 1:
                    _services[key] = (kept, users - 1)
                    return
                del _services[key]
    service.close()


class Seat:
    """An action's way to the service, taken when first used. `ask` raises Trouble, and nothing else."""

    def __init__(self, settings: Mapping[str, Any], state_dir: str) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._service: Service | None = None
        self._closed = False

    def ask(self, what: str, call: Callable[[Clients], T], *, first: bool = False) -> T:
        """Return what `call` returns on the service's thread; `first`: before what only asks."""
        return self._taken(what).ask(what, call, first=first)

    @property
    def account(self) -> Account:
        return self._taken("use the settings").account

    def close(self) -> None:
        with self._lock:
            self._closed = True
            service, self._service = self._service, None
        if service is not None:
            let_go(service)

    def _taken(self, what: str) -> Service:
        with self._lock:
            if self._closed:
                raise _closed(what)
            if self._service is None:
                try:
                    who = account(self._settings, self._state_dir)
                except (OSError, ValueError) as error:
                    hint = "mend that file, or `globus: client_secret_file` in the settings, and restart the daemon"
                    fault = Fault("person", f"no secret for Globus: {error}", hint, Scope.CREDENTIAL)
                    raise Trouble(fault, False) from None
                self._service = shared(who)
            return self._service


__all__ = ["Clients", "Seat", "Service", "let_go", "make_app", "shared"]
