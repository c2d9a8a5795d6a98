"""What the SDK raises, as a fault: who must do what, and whether the request may have been carried out.

Codes and their meaning are from the public documentation of the services and
the SDK's own source; where the service is silent the cautious reading is taken.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from trigger_daemon.core.model import Fault, Scope

RATE_LIMITED_S = 10.0  # at least, whatever Retry-After says: the service counts over so many seconds
DOWN_S = 300.0  # a collection that is down is asked again after this long
BUSY_S = 30.0
WORDS_MAX = 500

AGAIN = "then `trigger-daemon runs retry --state HELD`"
LOGIN = "run `trigger-daemon globus login`, then `trigger-daemon runs retry --state HELD`"
MEND = "mend what it names in the rule, then `trigger-daemon runs retry --anew`"
CHECK = "`trigger-daemon globus check` names what is missing; then `trigger-daemon runs retry --state HELD`"

def by_itself(hint: str) -> str:
    """Return the hint for what is under way, and goes on once a person has done what it says: no run is HELD."""
    then = "; it goes on by itself then"
    return hint.replace(f", {AGAIN}", then).replace(f"; {AGAIN}", then)


# A command that a person gave is not repeated by anybody else, and no run of it waits.
_BY_HAND = (
    (", then `trigger-daemon runs retry --state HELD`", ""),
    (f"; {AGAIN}", ""),
    ("it goes on by itself", "try again later"),
    ("it is tried again", "try again"),
    (MEND, "mend what it names, and repeat the command"),
)


@dataclass
class Trouble(Exception):
    """A call came to nothing. `done`: False if it surely was not carried out, None if that cannot be told."""

    fault: Fault
    done: bool | None = None
    code: str = ""
    status: int = 0
    scopes: tuple[str, ...] = ()  # that a consent is missing for

    def __str__(self) -> str:
        return self.fault.why

    def words(self) -> str:
        """Return why, and what to do about it, where there is but one line for both."""
        return f"{self.fault.why} [{self.fault.hint}]" if self.fault.hint else self.fault.why


def by_hand(trouble: Trouble) -> str:
    """Return the hint for a person whose command came to nothing."""
    if trouble.status == 403 and not trouble.scopes:
        return "ask who manages it to let this account do so; `trigger-daemon globus whoami` says who that is"
    hint = trouble.fault.hint
    for words, instead in _BY_HAND:
        hint = hint.replace(words, instead)
    return hint


def judge(error: BaseException, what: str) -> Trouble:
    """Return what an exception of a call means; `what` was to be done, in words."""
    if isinstance(error, Trouble):
        return error
    try:
        import globus_sdk
    except ImportError as missing:
        hint = "install what it needs: `pip install 'trigger-daemon[globus]'`, and restart the daemon"
        return Trouble(Fault("person", f"{what}: the Globus SDK cannot be loaded: {missing}", hint), False)
    from trigger_daemon.globus.transport import Foreign

    match error:
        case globus_sdk.GlobusConnectionTimeoutError():
            return _network(f"{what}: Globus cannot be reached", done=False)
        case globus_sdk.GlobusTimeoutError():
            return _network(f"{what}: Globus did not answer in time", done=None)
        case globus_sdk.NetworkError(underlying_exception=Foreign() as under):
            hint = "is there a proxy or a login page between this machine and Globus?"
            return Trouble(Fault("transient", f"{what}: {under}", hint, retry_after_s=BUSY_S), under.done)
        case globus_sdk.NetworkError():
            done = False if "refused" in str(error).lower() or "resolve" in str(error).lower() else None
            return _network(f"{what}: no connection to Globus ({_short(str(error))})", done=done)
        case globus_sdk.GlobusAPIError():
            return _answered(error, what)
        case _ if _is_token_fault(error):
            return _person(f"{what}: no token for it ({_short(str(error))})", LOGIN)
        case OSError():  # of the file with the tokens, or of the network in a way the SDK has no name for
            words = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            return Trouble(Fault("transient", f"{what}: {words}", "let the daemon's user read and write it"))
        case ValueError() | TypeError() | LookupError() | AttributeError():  # a captive portal's page, or another shape
            if isinstance(error, LookupError | AttributeError):  # or a mistake of ours
                logging.getLogger(__name__).warning("globus.odd_answer", exc_info=error)
            why = f"{what}: the answer is not Globus's ({type(error).__name__}: {_short(str(error))})"
            hint = "is there a proxy or a login page between this machine and Globus?"
            return Trouble(Fault("transient", why, hint, retry_after_s=BUSY_S))
        case _:
            logging.getLogger(__name__).error("globus.unexpected", exc_info=error)
            why = f"{what}: {type(error).__name__}: {_short(str(error))}"
            return Trouble(Fault("transient", why, "the log holds the traceback"))


def _is_token_fault(error: BaseException) -> bool:
    from globus_sdk.token_storage import TokenValidationError

    return isinstance(error, TokenValidationError)


def _network(why: str, *, done: bool | None) -> Trouble:
    hint = "is the network up, and is Globus (status.globus.org)? it goes on by itself"
    return Trouble(Fault("transient", why, hint, counts=False, retry_after_s=BUSY_S), done)


def _person(why: str, hint: str, **about: Any) -> Trouble:
    return Trouble(Fault("person", why, hint, Scope.CREDENTIAL), False, **about)


def _answered(error: Any, what: str) -> Trouble:
    """Read an answer that is an error: of Transfer, Flows, Search, Timers, Groups, Compute or Auth."""
    status, code, raw = int(error.http_status), str(error.code or ""), error.raw_json
    raw = raw if isinstance(raw, dict) else {}
    inner = raw.get("error")
    told: dict[str, Any] = inner if isinstance(inner, dict) else {"message": raw.get("reason")}  # as Compute says it
    code = str(told.get("code") or (inner if isinstance(inner, str) else "") or code)
    words = _words(error, told)
    trace = getattr(error, "request_id", None) or raw.get("debug_id") or ""
    why = f"{what}: {code or status}: {words}" + (f" (request {trace})" if trace else "")
    about: dict[str, Any] = {"code": code, "status": status}
    if scopes := _scopes(error, raw):
        return _person(why, f"a consent is missing; {LOGIN}", scopes=scopes, **about)
    match code:
        case "invalid_grant":
            return _person(f"{what}: the login has expired or was revoked", LOGIN, **about)
        case "invalid_client":
            hint = "put the right one where the settings say (`globus: client_secret_file`), and restart the daemon"
            return _person(f"{what}: Globus does not know this client id and secret", hint, **about)
        case "unknown_scope":
            return _person(f"{what}: the consent that is missing cannot be given: {words}", CHECK, **about)
        case "OperationPaused":
            hint = "the collection's manager has paused it; it goes on by itself"
            return Trouble(Fault("transient", why, hint, Scope.DESTINATION, DOWN_S, counts=False), False, **about)
    if status == 429:
        wait = max(RATE_LIMITED_S, _retry_after(error))
        hint = "Globus wants fewer requests; it goes on by itself"
        return Trouble(Fault("transient", why, hint, retry_after_s=wait, counts=False), False, **about)
    if status >= 500 and re.match(r"ExternalError|EndpointError", code):
        hint = "the collection does not answer: is Globus Connect running there? it goes on by itself"
        return Trouble(Fault("transient", why, hint, Scope.DESTINATION, DOWN_S, counts=False), None, **about)
    if status in (408, 425) or status >= 500:
        wait = max(BUSY_S, _retry_after(error))
        return Trouble(Fault("transient", why, "it goes on by itself", retry_after_s=wait, counts=False), None, **about)
    if status == 409:
        hint = "it is tried again once the other one has ended; ask who else sends there"
        return Trouble(Fault("transient", why, hint, retry_after_s=BUSY_S, counts=False), False, **about)
    if status == 401:  # with a token that was made just now; a login that has ended is told by Auth itself
        hint = f"is this machine's clock right? it is tried again; if it stays, {LOGIN}"
        return Trouble(Fault("transient", why, hint, retry_after_s=BUSY_S), False, **about)
    if status == 403:
        return _person(why, CHECK, **about)
    if status == 404:
        hint = f"is the id right, and may this account see it? {CHECK}"
        return Trouble(Fault("person", why, hint), False, **about)
    return Trouble(Fault("permanent", why, MEND), False, **about)


def _words(error: Any, told: dict[str, Any]) -> str:
    detail = told.get("detail")
    if isinstance(detail, list):
        parts = [f"{'.'.join(map(str, d.get('loc', ())))}: {d.get('msg', '')}" for d in detail if isinstance(d, dict)]
        return _short("; ".join(parts))
    return _short(str(told.get("message") or detail or error.message or error.text or "no reason given"))


def _scopes(error: Any, raw: dict[str, Any]) -> tuple[str, ...]:
    """Return the scopes that a consent is wanted for."""
    from globus_sdk.gare import to_gare

    try:
        gare = to_gare(error)
    except (ValueError, TypeError):
        gare = None
    wanted = gare.authorization_parameters.required_scopes if gare is not None else None
    return tuple(wanted or raw.get("required_scopes") or ())


def _retry_after(error: Any) -> float:
    try:
        return min(float(error.headers.get("Retry-After", "0")), 3_600.0)
    except (TypeError, ValueError, AttributeError):
        return 0.0


def _short(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= WORDS_MAX else line[: WORDS_MAX - 3] + "..."
