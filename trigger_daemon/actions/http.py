"""Start anything that has an address: `start: {http: {url: ..., json: {...}}}`; a workflow service, or a webhook.

Started once, as far as the service helps: each attempt has a key, journaled
first, that a service can know a repetition by. An attempt whose answer was
lost is looked for (`find`), or repeated identically where the rule says that
the service honours the key (`idempotent: true`); else it is HELD, for nobody
knows. What is polled is watched to its end; without `poll` an accepted
request is all. What lies where afterwards is not known here: no proof.

In `json`, captures are filled in, and a value that is only one of these
becomes a list: '{manifest}' {root, path, size, mtime_ns} of each file of the
batch, '{files}' their absolute paths.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

from trigger_daemon.actions import Context, Differs, Json, Progress, Proof, Refused, Request, Unknown, Unproven
from trigger_daemon.actions._globus_polls import Polls
from trigger_daemon.actions._globus_sent import Sent
from trigger_daemon.actions._http_fill import LISTS, Filling, NoSecret, Secrets, Unfilled, ask, holds
from trigger_daemon.actions._http_options import (
    EVERY_S,
    METHODS,
    Find,
    Poll,
    already,
    faults,
    find_of,
    poll_of,
    seat,
    uses,
)
from trigger_daemon.actions._http_send import Answer, Ask, Lost, NoRequest, NotSent, send, trust
from trigger_daemon.actions._looked import Looked
from trigger_daemon.actions._members import changed_members
from trigger_daemon.core.grammar import Option, Options, raise_all
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.core.outputs import plain
from trigger_daemon.failpoints import fail_point

KEY_LETTERS = 16
HANDLE_MAX = 500  # characters
WORDS_MAX = 300  # of an answer, for people
OUTPUT_BYTES_MAX = 65_536
TIMEOUT_S = 30.0
PAUSE_S = 5.0  # a service that failed is asked nothing new for so long, if it does not say itself for how long
CREDENTIAL_S = 60.0  # until a run is asked about again whose credential is refused
TLS_KEPT_S = 300.0  # what is trusted is read again after this long: authorities are replaced
CONNECT_S = 10.0
AGAIN = "then `trigger-daemon runs retry --state HELD`"
MEND = "mend the rule, then `trigger-daemon runs retry --anew`"
LATER = frozenset({408, 425, 429})  # nothing was taken, and that passes


class _Credential(Unknown):
    """Nothing could be asked: a secret cannot be had."""


class Action:
    """Any service that is asked over HTTP."""

    OPTIONS: Options = {
        "url": Option("text", "the address that starts it; captures in it are percent-encoded", required=True,
                      template=True),
        "method": Option("enum", "of the start", default="POST", choices=METHODS),
        "headers": Option("map", "further headers of every request: name: value", None, template=True),
        "json": Option("map", "the body of the start; '{manifest}' and '{files}' stand for the batch", None,
                       template=True),
        "idempotency_header": Option("text", "the header that carries the attempt's key; '' for none",
                                     "Idempotency-Key"),
        "idempotent": Option("bool", "the service honours the key: the same one again starts nothing", default=False),
        "key_kept": Option("duration", "the service knows a key for so long; absent: for ever"),
        "accepted": Option("text", "an expression on the answer that must be true, besides a status of 200 to 299",
                           None, template=True),
        "already": Option("ints", "statuses that say that this attempt is there already, such as 409", None),
        "handle": Option("text", "an expression on the answer of the start: what the run is called there; absent: the "
                                 "key", None, template=True),
        "output": Option("text", "an expression on the answer of the start: the run's output, where nothing is polled",
                         None, template=True),
        "poll": Option("map", "how to ask how a run stands; absent: it has succeeded once it was accepted", None,
                       template=True),
        "find": Option("map", "how to look for an attempt whose answer was lost", None, template=True),
        "cancel": Option("map", "how to ask for a run's end", None, template=True),
        "secrets": Option("map", "name: a credential of the service manager, or a file of mode 0600", None),
        "timeout": Option("duration", "a request, with its whole answer, is given up after this long",
                          default=TIMEOUT_S),
        "ca": Option("text", "a file of the authorities that are trusted; absent: the system's"),
    }  # fmt: skip
    EXTRA_NAMES = (*LISTS, "key", "handle")
    VERIFIES = False
    PREPARES = True
    LEAVES_OUT = False
    POOL = "http"  # a slow service keeps no copy waiting

    def __init__(self, context: Context) -> None:
        self._lock = threading.Lock()
        self._started: dict[tuple[int, int], Json] = {}
        self._unsent: set[tuple[int, int]] = set()  # attempts that may be sent without a look
        self._open: set[tuple[int, int]] = set()  # of these, those that may have been taken before
        self._sent = Sent()
        self._polls = Polls(who="the service")
        self._numbers: dict[str, int] = {}  # what is polled -> its run
        self._pauses: dict[str, tuple[float, str, bool]] = {}  # seat -> until when, why, and whether it asked for it
        self._trusted: dict[str | None, tuple[float, ssl.SSLContext]] = {}

    # --------------------------------------------------------------------- options

    @staticmethod
    def extra_names(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names that the rule gives to secrets."""
        return tuple(map(str, options.get("secrets") or ()))

    def check(self, options: Mapping[str, Any]) -> None:
        raise_all(faults(options))

    @staticmethod
    def look_online(options: Mapping[str, Any]) -> Iterator[Looked]:
        """Yield what a try finds: secrets, authorities, whether the host answers. Nothing is asked of it."""
        return _look(options)

    def destination(self, options: Mapping[str, Any]) -> str:
        return seat(options)

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def refuses(self, options: Mapping[str, Any], root: str, path: str) -> str:
        """Say why a file of this name is never sent, '' if it is: JSON is UTF-8."""
        if not uses(options.get("json"), LISTS):
            return ""
        try:
            os.path.join(root, path).encode("utf-8")
        except UnicodeEncodeError:
            return "its name is not UTF-8, and cannot stand in a request; rename it"
        return ""

    # -------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        """Fix the attempt's key, and see that all can be filled in. Raises Refused."""
        named = _key(request)
        filling = self._filling(request, named)
        self._ask(filling, self._start_of(request, filling))
        with self._lock:
            self._unsent.add((request.run, request.attempt))
        return {"key": named, "time": time.time()}

    def start(self, request: Request, prepared: Json) -> Json:
        """Send it once; not again before it was looked for. Raises Refused, Unknown."""
        key = (request.run, request.attempt)
        with self._lock:
            if (known := self._started.get(key)) is not None:
                return known
            unsent = key in self._unsent
        if not unsent and (found := self.find(request, prepared)) is not None:  # an earlier call may have sent it
            return found
        filling, seated = self._filling(request, prepared["key"]), seat(request.options)
        with self._lock:
            repeated = key in self._open
        try:
            asked = self._ask(filling, self._start_of(request, filling))
        except Refused as refused:
            if repeated:  # that it cannot be sent now says nothing of before
                raise Unknown(refused.fault.why) from None
            raise
        left_s, why, asked_for = self._pause(seated)
        if left_s > 0 and repeated and asked_for:
            raise Unknown(f"{why}; it is sent again in {left_s:.0f} s")
        if left_s > 0 and not repeated:
            with self._lock:
                self._unsent.discard(key)
            raise Refused(Fault("transient", why, "it goes on by itself", Scope.DESTINATION, left_s, counts=False))
        with self._sent.under_way(key):
            with self._lock:
                if key not in self._unsent:
                    raise Unknown("it was sent meanwhile; what became of it is looked for")
                self._unsent.discard(key)
            fail_point("http.send")
            try:
                answer = self._send(request, asked)
            except NoRequest as error:
                if repeated:
                    raise Unknown(str(error)) from None
                raise Refused(Fault("person", f"{seated}: {error}", f"mend it, {AGAIN}", Scope.DESTINATION)) from None
            except NotSent as error:
                self._not_now(request, filling, f"{seated} cannot be reached: {error}", repeated)
            except Lost as error:
                raise Unknown(_short(filling.secrets.hide(f"{seated} gave no answer: {error}"))) from None
        fail_point("http.sent")
        handle = self._judged(request, prepared, filling, answer, repeated)
        with self._lock:
            self._started[key] = handle
            self._open.discard(key)
        return handle

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Look for an attempt whose answer was lost. None: it is not there, or may be sent again as the same one."""
        key = (request.run, request.attempt)
        with self._lock:
            if (known := self._started.get(key)) is not None:
                return known
            if key in self._unsent:
                return None
        found, repeats = self._look(request, prepared, key), False
        if found is None and find_of(request.options) is None:
            kept_s = request.options.get("key_kept")
            repeats = bool(request.options.get("idempotent"))
            if not repeats or (kept_s is not None and abs(time.time() - float(prepared["time"])) > kept_s):
                return _lost(request, prepared, "whether the service has taken it is not known: its answer was lost")
        if found is None:
            with self._lock:
                self._unsent.add(key)
                self._open.add(key) if repeats else self._open.discard(key)
        return found

    def look(self, request: Request, prepared: Json) -> Json | None:
        """Look for an attempt that nobody wants any more; None only if it surely is not there. Raises Unknown."""
        key = (request.run, request.attempt)
        with self._lock:
            if (known := self._started.get(key)) is not None:
                return known
            if key in self._unsent and key not in self._open:
                return None
        found = self._look(request, prepared, key)
        if found is None and find_of(request.options) is None:
            return _lost(request, prepared, "whether the service has taken it is not known: its answer was lost")
        return found

    def _look(self, request: Request, prepared: Json, key: tuple[int, int]) -> Json | None:
        """Return the handle of an attempt that is there; raise Unknown while that cannot be told."""
        find = find_of(request.options)
        if find is None:
            return self._sent.look(key, lambda: None, 0.0)  # Unknown while it is being sent
        return self._sent.look(key, lambda: self._found(request, prepared, find), find.listed_after_s)

    def _found(self, request: Request, prepared: Json, find: Find) -> Json | None:
        filling = self._filling(request, prepared["key"])
        written = filling.written["find"]
        answer = self._question(request, filling, "look for it", find.method, written)
        if answer.status in find.absent:
            return None
        if not 200 <= answer.status <= 299:
            raise Unknown(_said(filling, f"{seat(request.options)} refuses to tell whether it is there", answer))
        document, why = answer.parsed()
        if why:
            raise Unknown(_said(filling, f"what it says of it cannot be read: {why}", answer))
        found = ask(filling.expression(written["handle"]), document)
        if not holds(found):
            return None
        return self._handle(request, prepared, filling, _name_of(found), document, "`find.handle`")

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how the run stands. Raises Unknown where the service cannot be asked now."""
        if (lost := handle.get("lost")) is not None:
            hint = (f"look there for {handle['key']}; if nothing came of it `trigger-daemon runs retry {request.run}`, "
                    f"else `runs abandon {request.run}`")  # fmt: skip
            return Progress("failed", lost, hint, Fault("person", lost, hint))
        poll = poll_of(request.options)
        if poll is None:
            return _success(request, handle.get("output"))
        number = f"{seat(request.options)} {handle['handle']}"
        if (last := self._polls.crowded(number)) is not None:
            return last
        left_s, why, asked_for = self._pause(seat(request.options))
        if left_s > 0 and asked_for:
            raise Unknown(f"{why}; it is asked again in {left_s:.0f} s")
        with self._lock:
            self._numbers[number] = request.run
        with self._polls.asking(number) as asked:
            asked.progress = self._stands(request, handle, poll, number)
        return asked.progress

    def _stands(self, request: Request, handle: Json, poll: Poll, number: str) -> Progress:
        try:
            filling = self._filling(request, handle["key"], handle["handle"])
            answer = self._question(request, filling, "ask how it stands", poll.method, filling.written["poll"])
        except _Credential as trouble:
            return Progress("inactive", str(trouble), "put it there: it goes on by itself", again_in_s=CREDENTIAL_S)
        if answer.status in (404, 410):
            if fault := self._polls.gone(number, "the run", request.run):
                return Progress("failed", fault.why, fault.hint, fault)
            raise Unknown(_said(filling, "the service does not know the run", answer))
        self._polls.there(number)
        if answer.status in (401, 403, 407):
            why = _said(filling, "the service does not let it be asked about", answer)
            return Progress("inactive", why, "renew the secret, or see who may read there", again_in_s=CREDENTIAL_S)
        document, unread = answer.parsed()
        if not 200 <= answer.status <= 299 or unread:
            raise Unknown(_said(filling, unread or f"{seat(request.options)} cannot be asked now", answer))
        written = filling.written["poll"]

        def told(name: str) -> Any:
            return ask(filling.expression(written[name]), document) if written.get(name) else None

        state = next((s for s in ("failed", "again", "cancelled", "succeeded", "inactive", "active")
                      if holds(told(s))), "")  # fmt: skip
        words = filling.secrets.hide(plain(told("why")))
        why = "" if words is None else _short(words if isinstance(words, str) else json.dumps(words))
        match state:
            case "succeeded":
                return _success(request, _output(filling, told("output")), why)
            case "cancelled":
                return Progress("cancelled", why or "cancelled there", output=_output(filling, told("output")))
            case "failed" | "again":
                why = f"{handle['handle']} has failed" + (f": {why}" if why else "")
                hint = f"see there what became of {handle['handle']}; then `trigger-daemon runs retry {request.run}`"
                fault = Fault("transient" if state == "again" else "person", why, hint)
                output = _output(filling, told("output"))
                return Progress("failed", why, hint, fault, output=output, changed=changed_members(request))
            case "inactive":
                hint = f"see {handle['handle']} there"
                return Progress("inactive", why or "it waits there", hint, again_in_s=max(poll.every_s, EVERY_S))
            case "" if "active" in poll.found:  # whatever it is, it is no word that the attempt has ended
                raise Unknown(_said(filling, "none of the expressions of `poll` holds", answer))
        return Progress("active", why, again_in_s=poll.every_s)

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the run's end; polls tell when it has come."""
        if handle.get("lost") is not None or poll_of(request.options) is None:
            return
        if not request.options.get("cancel"):
            raise Unknown("the rule does not say how a run is cancelled: cancel it there, or wait for its end")
        filling = self._filling(request, handle["key"], handle["handle"])
        written = filling.written["cancel"]
        answer = self._question(request, filling, "cancel it", written.get("method") or "POST", written)
        if answer.status >= 500 or answer.status in (401, 403, 407, *LATER):
            raise Unknown(_said(filling, "the service did not take the wish", answer))

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        return Unproven(Fault("permanent", "an answer says nothing of what lies where", "set `proof: none`"))

    def forget(self, run: int) -> None:
        with self._lock:
            for key in [key for key in self._started if key[0] == run]:
                del self._started[key]
            for number in [number for number, of in self._numbers.items() if of == run]:
                del self._numbers[number]
                self._polls.forget(number)
            self._unsent = {key for key in self._unsent if key[0] != run}
            self._open = {key for key in self._open if key[0] != run}
        self._sent.forget(run)

    def close(self) -> None:
        """Nothing runs between calls."""

    # ------------------------------------------------------------------ what is sent

    def _filling(self, request: Request, key: str, handle: object = None) -> Filling:
        return Filling(request, key, handle, Secrets(request.options.get("secrets") or {}))

    def _start_of(self, request: Request, filling: Filling) -> dict[str, Any]:
        return {"url": filling.written["url"], "method": request.options.get("method") or "POST",
                "json": filling.written.get("json"), "starts": True}  # fmt: skip

    def _ask(self, filling: Filling, what: Mapping[str, Any]) -> Ask:
        """Fill a request in. Raises Refused."""
        options = filling.written
        try:
            headers = {str(name): filling.header(str(value)) for name, value in (options.get("headers") or {}).items()}
            if what.get("starts") and (name := options.get("idempotency_header")):
                headers[name] = filling.header("{key}")
            body = None
            if what.get("json") is not None:
                body = filling.body(what["json"])
                if "content-type" not in map(str.lower, headers):
                    headers["content-type"] = b"application/json"
            return Ask(what["method"], filling.url(what["url"]), headers, body)
        except NoSecret as error:
            raise Refused(Fault("person", error.why, f"{error.hint}, {AGAIN}", Scope.CREDENTIAL)) from None
        except Unfilled as error:
            raise Refused(Fault("person", error.why, error.hint)) from None
        except ValueError as error:
            raise Refused(Fault("permanent", f"the request cannot be made: {error}", MEND)) from None

    def _send(self, request: Request, asked: Ask) -> Answer:
        """Send a request; note when the service wants to be left alone. Raises NotSent, Lost."""
        trusted = None
        if asked.url.startswith("https:"):
            try:
                trusted = self._trust(request.options.get("ca"))
            except OSError as error:
                raise NotSent(f"the authorities in {request.options.get('ca')} cannot be read: {error}") from None
        answer = send(asked, span_s=float(request.options.get("timeout") or TIMEOUT_S), trusted=trusted)
        if answer.status in LATER or answer.status >= 500:
            seated = seat(request.options)
            pause_s = PAUSE_S if answer.retry_after_s is None else answer.retry_after_s
            why = f"{seated} has answered {answer.status}"
            with self._lock:
                self._pauses[seated] = time.monotonic() + pause_s, why, answer.retry_after_s is not None
        return answer

    def _question(self, request: Request, filling: Filling, what: str, method: str, told: Mapping[str, Any]) -> Answer:
        """Send what may be repeated. Raises Unknown; _Credential, which is one, where a secret cannot be had."""
        try:
            return self._send(request, self._ask(filling, {**told, "method": method}))
        except Refused as refused:  # that it cannot be asked is no word about the run
            if refused.fault.scope == Scope.CREDENTIAL:
                raise _Credential(refused.fault.why) from None
            raise Unknown(refused.fault.why) from None
        except (NotSent, Lost) as error:
            raise Unknown(_short(filling.secrets.hide(f"{what}: {seat(request.options)}: {error}"))) from None

    def _trust(self, ca: str | None) -> ssl.SSLContext:
        with self._lock:
            read_at, trusted = self._trusted.get(ca, (-1e9, None))
        if trusted is None or time.monotonic() - read_at > TLS_KEPT_S:
            trusted = trust(ca)
            with self._lock:
                self._trusted[ca] = time.monotonic(), trusted
        return trusted

    def _pause(self, seated: str) -> tuple[float, str, bool]:
        """Return for how long a service is left alone yet, why, and whether it asked for it."""
        with self._lock:
            until, why, asked_for = self._pauses.get(seated, (0.0, "", False))
        return until - time.monotonic(), why, asked_for

    # --------------------------------------------------------------- what came of it

    def _judged(self, request: Request, prepared: Json, filling: Filling, answer: Answer, repeated: bool) -> Json:
        """Return the handle that an answer to the start gives. Raises Refused, Unknown."""
        options, seated = request.options, seat(request.options)
        if answer.status in already(options):
            return self._there(request, prepared, filling, answer)
        if 200 <= answer.status <= 299:
            return self._accepted(request, prepared, filling, answer, repeated)
        why = _said(filling, f"{seated} answers {answer.status}", answer)
        recognises = bool(options.get("idempotent")) or find_of(options) is not None
        if answer.status in LATER or (answer.status == 503 and not recognises):
            self._not_now(request, filling, why, repeated, answer.retry_after_s)
        if answer.status >= 500:  # a proxy's too: behind it, it may have been taken
            if recognises:
                raise Unknown(why)
            return _lost(request, prepared, f"{why}; whether it was taken is not known")
        if answer.status in (401, 403, 407):
            if repeated:
                raise Unknown(f"{why}; whether it was taken before is not known: renew the secret")
            hint = f"renew the secret, or ask who manages the service; {AGAIN}"
            raise Refused(Fault("person", why, hint, Scope.CREDENTIAL))
        if answer.to and answer.status < 400:
            why = f"{seated} leads elsewhere ({filling.secrets.hide(answer.to)[:100]}), where nothing is sent"
            if answer.status not in (307, 308):  # others may stand for what was carried out
                return _lost(request, prepared, f"{why}; whether it was taken is not known")
        return self._refused(request, prepared, why, repeated)

    def _accepted(self, request: Request, prepared: Json, filling: Filling, answer: Answer, repeated: bool) -> Json:
        options, written = request.options, filling.written
        reads = [name for name in ("accepted", "handle", "output") if written.get(name)]
        document, unread = answer.parsed() if reads else (None, "")
        if unread and reads != ["output"]:
            words = _said(filling, f"it was answered {answer.status}, but {unread}", answer)
            if bool(options.get("idempotent")) or find_of(options) is not None:
                raise Unknown(words)
            return _lost(request, prepared, words)
        if written.get("accepted") and not holds(ask(filling.expression(written["accepted"]), document)):
            return self._refused(request, prepared, _said(filling, "it was not accepted", answer), repeated)
        if not written.get("handle"):
            return self._handle(request, prepared, filling, prepared["key"], document, "")
        found = ask(filling.expression(written["handle"]), document)
        return self._handle(request, prepared, filling, _name_of(found), document, "`handle`")

    def _handle(
        self, request: Request, prepared: Json, filling: Filling, name: str | None, document: Any, where: str
    ) -> Json:
        if name is None or filling.secrets.hide(name) != name:
            why = f"it is there, but {where} finds no name of it in the answer"
            return _lost(request, prepared, why)
        handle: dict[str, Any] = {"key": prepared["key"], "handle": name}
        if expression := filling.written.get("output"):
            handle["output"] = _output(filling, ask(filling.expression(expression), document))
        return handle

    def _there(self, request: Request, prepared: Json, filling: Filling, answer: Answer) -> Json:
        """The service says that it has this attempt: ask which that is, where the key is not its name."""
        if (find := find_of(request.options)) is not None:
            found = self._found(request, prepared, find)
            if found is None:
                raise Unknown(_said(filling, f"{answer.status} says that it is there, and it is not found", answer))
            return found
        document, _ = answer.parsed()
        name = prepared["key"]
        if expression := filling.written.get("handle"):
            name = _name_of(ask(filling.expression(expression), document))
        return self._handle(request, prepared, filling, name, document, "`handle`")

    def _not_now(
        self, request: Request, filling: Filling, why: str, repeated: bool, retry_after_s: float | None = None
    ) -> NoReturn:
        """This request was surely not taken; one before it may have been."""
        why = _short(filling.secrets.hide(why))
        if repeated:
            raise Unknown(why)
        hint = "is the service well, and the network? it goes on by itself"
        raise Refused(Fault("transient", why, hint, Scope.DESTINATION, retry_after_s, counts=False))

    def _refused(self, request: Request, prepared: Json, why: str, repeated: bool) -> Json:
        if repeated:  # its word says nothing of the one before it
            return _lost(request, prepared, f"{why}; whether it was taken before is not known")
        raise Refused(Fault("permanent", why, MEND))


# ------------------------------------------------------------------------ for people


def _key(request: Request) -> str:
    """Return what names this attempt of this batch, and nothing else: letters that a service may take as an id."""
    about = [request.rule, request.run, request.attempt]
    about += [[file.root, file.path, file.size, file.mtime_ns] for file in request.files]
    digest = base64.b32encode(hashlib.sha256(json.dumps(about).encode("ascii")).digest()).decode("ascii")
    return f"{request.rule}-{request.run}.{request.attempt}-{digest[:KEY_LETTERS].lower()}"


def _lost(request: Request, prepared: Json, why: str) -> Json:
    """Return the handle of an attempt about which nobody knows: its end is that a person looks."""
    return {"key": prepared["key"], "handle": prepared["key"], "lost": why}


def _name_of(found: Any) -> str | None:
    """Return what an expression found as the name of a run; None if it is none."""
    if isinstance(found, bool) or not isinstance(found, str | int):
        return None
    text = str(found)
    sound = text.isprintable() and 0 < len(text) <= HANDLE_MAX
    return text if sound and text not in (".", "..") else None  # these lead elsewhere in an address


def _said(filling: Filling, why: str, answer: Answer) -> str:
    """Return why, with the first of the answer. Secrets are hidden before it is cut: a part of one is one, too."""
    why = filling.secrets.hide(why)
    if str(answer.status) not in why:
        why += f" ({answer.status})"
    told = _short(filling.secrets.hide(answer.body.decode("utf-8", "backslashreplace")))
    return f"{why}: {told}" if told else why


def _short(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:WORDS_MAX * 4]).split())
    return line if len(line) <= WORDS_MAX else f"{line[: WORDS_MAX - 3]}..."


def _output(filling: Filling, found: Any) -> Json:
    """Return what a run puts out, bounded; and no secret, whatever the service repeats."""
    found = plain(found)
    size = len(json.dumps(found))
    return filling.secrets.hide(found) if size <= OUTPUT_BYTES_MAX else f"{size:,} bytes, which is too much to keep"


def _success(request: Request, output: Json, why: str = "") -> Progress:
    size = sum(file.size for file in request.files)
    return Progress("succeeded", why, files_done=len(request.files), bytes_done=size, output=output,
                    changed=changed_members(request))  # fmt: skip


def _look(options: Mapping[str, Any]) -> Iterator[Looked]:
    secrets = Secrets(options.get("secrets") or {})
    well = True
    for name in options.get("secrets") or ():
        try:
            secrets[name]
            yield Looked(f"the secret {name}", True)
        except NoSecret as error:
            well = False
            yield Looked("secrets", False, error.why, error.hint)
    seated, url = seat(options), str(options["url"])
    if not url.startswith("http"):
        if not well:
            return
        url = secrets[url.strip("{}")]
    parts = urlsplit(url.partition("{")[0])
    try:
        trusted = trust(options.get("ca")) if parts.scheme == "https" else None
        port = parts.port or (80 if trusted is None else 443)
    except (OSError, ValueError) as error:
        yield Looked(f"the authorities in {options.get('ca')}", False, str(error), "name a file of certificates")
        return
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S) as plain:
            if trusted is not None:
                with trusted.wrap_socket(plain, server_hostname=parts.hostname):
                    pass
    except ssl.SSLError as error:
        yield Looked(f"{seated} answers", False, str(error), "let `ca` name the authority that the service's is of")
        return
    except OSError as error:
        hint = "is the service up, and the network?"
        yield Looked(f"{seated} answers", False, error.strerror or str(error), hint, True)
        return
    yield Looked(f"{seated} answers", True)
