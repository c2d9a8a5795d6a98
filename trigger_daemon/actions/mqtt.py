"""Publish one message a batch: `start: {mqtt: {topic: "facility/{session}/images"}}`.

With QoS 1 of MQTT 5, and succeeded once the broker has confirmed it. An answer
that was lost means that the same message is published again: at least once, and
all of one batch have one id, in the payload and among the properties. So
nothing is kept here; what must not change from one time to the next is in the
journal.

In `payload`, captures are filled in, and a value that is only one of these
becomes more than a text:

    '{message}'        all that is told where the rule has no `payload`
    '{message_id}'     its id
    '{message_time}'   when the attempt began, RFC 3339 in UTC
    '{members}'        a list of the files: root, path, size, mtime_ns, role
    '{members_count}'  how many, and '{members_bytes}' how many bytes they are
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trigger_daemon.actions import Context, Differs, Json, Progress, Proof, Refused, Request, Unknown, Unproven
from trigger_daemon.actions._members import changed_members
from trigger_daemon.actions._mqtt_line import CLOSE_S, NOBODY, Line, Parcel
from trigger_daemon.broker import CREDENTIAL, OWN, Account, account
from trigger_daemon.core.grammar import Option, OptionFault, Options, nearest, raise_all
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.templates import template_names

PAYLOAD_BYTES_MAX = 1_000_000  # some brokers take no more; a message is no place for data
TOPIC_BYTES_MAX = 1_000  # the protocol takes 65,535
EXPIRY_MAX_S = 2**32 - 1
POLL_S = 15.0  # an end is told at once; this is the net below
NO_BROKER = (
    "no broker is named",
    "set `mqtt: host` in the settings and reload (`systemctl reload trigger-daemon`, or SIGHUP to `serve`), or"
    " `broker: {host: …}` in the rule",
)
MESSAGE, ID, TIME, MEMBERS, COUNT, BYTES = (
    "message", "message_id", "message_time", "members", "members_count", "members_bytes",
)  # fmt: skip
_BROKER: Mapping[str, Any] = {"host": str, "port": int, "tls": (bool, Mapping), "user": str, "password_file": str}
_TLS = ("ca", "certificate", "key")
_BAD = re.compile(r"[+#\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # wildcards, and what no topic may hold
_CAPTURE = re.compile(r"(?<!\{)\{(?!\{)[^{}]*\}")


class Action:
    """One message for each batch."""

    OPTIONS: Options = {
        "topic": Option("text", "what it is published on, without wildcards", required=True, template=True),
        "payload": Option("map", "what is told; '{message}', '{members}' and others stand for the batch. Absent: "
                                 "the message as it is documented", None, template=True),
        "files": Option("bool", "tell each file, too, where there is no `payload`", default=False),
        "retain": Option("bool", "the broker keeps it for those who come later", default=False),
        "expiry": Option("duration", "the broker forgets what nobody has taken by then; absent: never", None),
        "broker": Option("map", "another broker than the settings': host, port, tls, user, password_file", None),
    }  # fmt: skip
    EXTRA_NAMES = (MESSAGE, ID, TIME, MEMBERS, COUNT, BYTES)
    VERIFIES = False
    PREPARES = True  # asks nobody: the time of the message is fixed, so that a repetition is the same message
    LEAVES_OUT = False
    POOL = "mqtt"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._lines: dict[Account, Line] = {}
        self._parcels: dict[int, tuple[int, Parcel]] = {}  # run -> attempt, and its message
        self._cancelled: set[tuple[int, int]] = set()  # of which this life has published nothing
        self._closed = False

    # --------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        raise_all([*_topic_faults(options), *_payload_faults(options), *_broker_faults(options.get("broker"))])

    def check_roots(self, options: Mapping[str, Any], roots: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Raise OptionFault without a broker, and for a topic that is the daemon's own, or may become it."""
        if options.get("broker") is None and not settings["mqtt"].get("host"):
            raise OptionFault("", *NO_BROKER)
        if own := _own(str(options["topic"]), settings["mqtt"]):
            hint = "put a word of your own in it, such as {prefix}/{workstation}/batch/…".format(**_speaker(settings))
            raise OptionFault("topic", f"it is, or may become, {own}, which is the daemon's own", hint)

    def destination(self, options: Mapping[str, Any]) -> str:
        try:
            return f"broker {self._account(options).at}"
        except Refused:
            return "broker"

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    # -------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        """Fix the message's time, and see that there is a message. Raises Refused."""
        prepared = {"id": self._id(request), "time": round(time.time(), 3)}
        self._parcel(request, prepared)
        return prepared

    def start(self, request: Request, prepared: Json) -> Json:
        """Hand the message to its line and return at once. Raises Refused for one that can never be published."""
        with self._lock:
            if self._known(request) is None:
                self._submit(request, prepared)
        return prepared

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Return the handle of an attempt of this life; None has it repeated: it is the same message."""
        with self._lock:
            return None if self._known(request) is None else prepared

    def look(self, request: Request, prepared: Json) -> Json | None:
        """Return the handle: whether it was published in another life nobody can tell, so it counts as begun."""
        return prepared

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how it stands; one of an earlier life is published again."""
        with self._lock:
            parcel = self._known(request)
            if parcel is None and (request.run, request.attempt) in self._cancelled:
                return Progress("cancelled", why="whether it was published before is not known")
            if parcel is None:
                try:
                    parcel = self._submit(request, handle)
                except Refused as refused:
                    return _failed(refused.fault)
        if parcel.state == "dropped":
            return Progress("cancelled", why="it was not published")
        if parcel.state != "ended":
            return Progress("active", why="the broker's word", again_in_s=POLL_S)
        if parcel.fault is not None:
            if (request.run, request.attempt) in self._cancelled:
                return Progress("cancelled", why="whether it was published is not known")
            return _failed(parcel.fault)
        return _succeeded(request, parcel)

    def cancel(self, request: Request, handle: Json) -> None:
        """Take the message back if it was not sent; the broker's word on one that was is waited for."""
        with self._lock:
            parcel = self._known(request)
            if parcel is None or not self._lines_drop(parcel):
                self._cancelled.add((request.run, request.attempt))

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        return Unproven(Fault("permanent", "a message proves nothing of files", "set `proof: none`"))

    def forget(self, run: int) -> None:
        with self._lock:
            self._parcels.pop(run, None)
            self._cancelled = {key for key in self._cancelled if key[0] != run}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lines = list(self._lines.values())
        for line in lines:
            line.end()
        ends_at = time.monotonic() + CLOSE_S
        for line in lines:
            line.join(max(0.0, ends_at - time.monotonic()))

    # ---------------------------------------------------------------------- inside

    def _known(self, request: Request) -> Parcel | None:
        attempt, parcel = self._parcels.get(request.run, (0, None))
        return parcel if attempt == request.attempt else None

    def _lines_drop(self, parcel: Parcel) -> bool:
        return any(line.drop(parcel) for line in self._lines.values())

    def _submit(self, request: Request, handle: Json) -> Parcel:
        """Make the message and hand it over; the lock is held. Raises Refused, Unknown."""
        if self._closed:
            raise Unknown("the mqtt action is closed")
        parcel = self._parcel(request, handle)
        to = self._account(request.options)
        parcel.told = lambda: self._context.nudge(request.run, request.attempt)
        if to not in self._lines:
            self._lines[to] = Line(to, "{prefix}-{workstation}".format(**_speaker(self._context.settings)))
        self._parcels[request.run] = request.attempt, parcel
        self._lines[to].send(parcel)
        return parcel

    def _account(self, options: Mapping[str, Any]) -> Account:
        """Return the broker's account. Raises Refused where none is named."""
        if (own := options.get("broker")) is not None:
            return account(own)
        context = getattr(self, "_context", None)  # a question about options needs none
        settings = context.settings.get("mqtt") or {} if context is not None else {}
        if not settings.get("host"):
            raise Refused(Fault("person", *NO_BROKER, Scope.DESTINATION))
        return account(settings, CREDENTIAL)

    def _id(self, request: Request) -> str:
        """Return what names this batch's message, and nothing else: no attempt is in it, for it is the same one."""
        speaker = _speaker(self._context.settings)["workstation"]
        about = [speaker, request.rule, request.run, request.options["topic"], request.options.get("payload")]
        about += [[file.root, file.path, file.size, file.mtime_ns] for file in request.files]
        digest = hashlib.sha256(json.dumps(about).encode("ascii")).hexdigest()
        return f"{request.run}-{digest[:16]}"

    def _parcel(self, request: Request, handle: Json) -> Parcel:
        """Return the message. Raises Refused for one that cannot be published."""
        settings, topic = self._context.settings, str(request.options["topic"])
        if (why := _unsayable(topic)) or (why := _own(topic, settings.get("mqtt") or {}, literally=True)):
            hint = "let the rule's `topic` use other captures, then `trigger-daemon runs retry --anew`"
            raise Refused(Fault("permanent", f"nothing can be published on {topic!a}: {why}", hint))
        speaker = _speaker(settings)
        payload = json.dumps(_told(request, handle, speaker["workstation"]), separators=(",", ":")).encode("ascii")
        if len(payload) > PAYLOAD_BYTES_MAX:
            why = f"the message has {len(payload):,} bytes; at most {PAYLOAD_BYTES_MAX:,} are published"
            hint = "leave `files: true` and '{members}' out, or let the rule's batches be smaller"
            raise Refused(Fault("permanent", why, hint))
        facts = (
            ("id", handle["id"]), ("workstation", speaker["workstation"]), ("run", str(request.run)),
            ("attempt", str(request.attempt)),
        )  # fmt: skip
        expiry_s = request.options.get("expiry")
        return Parcel(
            topic, payload, handle["id"], facts, bool(request.options.get("retain")),
            None if expiry_s is None else math.ceil(expiry_s),
        )  # fmt: skip


# ---------------------------------------------------------------------- what is told


def _speaker(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return prefix and workstation, as the daemon's own topics have them."""
    mqtt = settings.get("mqtt") or {}
    return {
        "prefix": str(mqtt.get("prefix") or "trigger-daemon"),
        "workstation": str(mqtt.get("workstation") or socket.gethostname() or "unnamed"),
    }


def _told(request: Request, handle: Json, workstation: str) -> Any:
    """Return the payload."""
    written = (request.written or {}).get("payload", request.options.get("payload"))

    def members() -> list[dict[str, Any]]:
        return [
            {"root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "role": file.role}
            for file in request.files
        ]

    count, size = len(request.files), sum(file.size for file in request.files)
    at = datetime.fromtimestamp(handle["time"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def message() -> dict[str, Any]:
        told = {
            "id": handle["id"], "workstation": workstation, "host": socket.gethostname(), "rule": request.rule,
            "batch": request.run, "run": request.run, "group": dict(request.group),
            "captures": dict(request.captures), "files": count, "bytes": size, "time": at,
        }  # fmt: skip
        return told | ({MEMBERS: members()} if request.options.get("files") else {})

    def fill(value: Any, written: Any) -> Any:
        match written:  # where the rule says so, and not where a capture happens to read so
            case "{message}":
                return message()
            case "{message_id}":
                return handle["id"]
            case "{message_time}":
                return at
            case "{members}":
                return members()
            case "{members_count}":
                return count
            case "{members_bytes}":
                return size
            case Mapping():
                return {key: fill(item, written.get(key)) for key, item in value.items()}
            case list() | tuple():
                return [fill(item, each) for item, each in zip(value, written, strict=True)]
        return value

    payload = request.options.get("payload")
    return message() if payload is None else fill(payload, written)


def _succeeded(request: Request, parcel: Parcel) -> Progress:
    output: dict[str, Any] = {"topic": parcel.topic, "id": parcel.id, "bytes": parcel.size}
    why = f"the broker has it, on {parcel.topic}"
    if parcel.code == NOBODY:  # not every broker tells it
        output["subscribers"] = 0
        why += "; nobody has subscribed to that"
    return Progress(
        "succeeded", why, files_done=len(request.files), bytes_done=sum(file.size for file in request.files),
        output=output, changed=changed_members(request),
    )  # fmt: skip


def _failed(fault: Fault) -> Progress:
    return Progress("failed", fault.why, fault.hint, fault)


# ---------------------------------------------------------------------- what a rule may say


def _unsayable(topic: str) -> str:
    """Return why nothing can be published on a topic, '' if it can."""
    if bad := _BAD.search(topic):
        return f"{bad[0]!a} cannot stand in a topic"
    if not all(topic.split("/")):
        return "it has an empty level"
    if topic.startswith("$"):
        return "topics that begin with $ are the broker's own"
    if len(topic.encode("utf-8")) > TOPIC_BYTES_MAX:
        return f"it has more than {TOPIC_BYTES_MAX:,} bytes"
    return ""


def _own(topic: str, settings: Mapping[str, Any], *, literally: bool = False) -> str:
    """Return the topic of a daemon's own that this is, or may become when its captures are filled in; '' if none.

    What a daemon says of itself nobody else may say, and an order to a daemon by a rule may start that rule again;
    a hint to another one is well: it makes nothing complete.
    """
    speaker = _speaker({"mqtt": settings})
    prefix, levels = speaker["prefix"].split("/"), topic.split("/")
    if len(levels) != len(prefix) + 2 or levels[: len(prefix)] != prefix:
        return ""
    whose, leaf = levels[-2:]
    is_ours = _becomes(whose, speaker["workstation"], literally)
    for word in sorted(OWN):
        if (is_ours or word != "hint") and _becomes(leaf, word, literally):
            return "/".join([*prefix, speaker["workstation"] if is_ours else whose, word])
    return ""


def _becomes(level: str, word: str, literally: bool) -> bool:
    """Say whether a level is a word, or may be once its captures are filled in."""
    if literally:
        return level == word
    pieces = [re.escape(piece.replace("{{", "{").replace("}}", "}")) for piece in _CAPTURE.split(level)]
    return re.fullmatch(".*".join(pieces), word) is not None


def _topic_faults(options: Mapping[str, Any]) -> list[OptionFault]:
    topic = str(options["topic"])
    if why := _unsayable(_CAPTURE.sub("x", topic)):
        return [OptionFault("topic", f"{topic!r} is no topic to publish on: {why}", "names with / between them")]
    if extra := [name for name in _names(topic) if name in Action.EXTRA_NAMES]:
        return [OptionFault("topic", f"{{{extra[0]}}} stands for the message, and cannot stand in its topic")]
    return []


def _payload_faults(options: Mapping[str, Any]) -> list[OptionFault]:
    faults = []
    if options.get("payload") is not None and options.get("files"):
        hint = "put a key with '{members}' into the payload"
        faults.append(OptionFault("files", "`files` belongs to the message without `payload`", hint))
    for text in _texts(options.get("payload")):
        faults += [
            OptionFault("payload", f"{{{name}}} must be the whole value, not part of {text!r}")
            for name in _names(text) if name in Action.EXTRA_NAMES and text != f"{{{name}}}"
        ]  # fmt: skip
    expiry_s = options.get("expiry")
    if expiry_s is not None and not 1 <= expiry_s <= EXPIRY_MAX_S:
        faults.append(OptionFault("expiry", "it must be at least 1s, and less than 136 years"))
    return faults


def _broker_faults(broker: Any) -> list[OptionFault]:
    if broker is None:
        return []
    faults = []
    for key, value in broker.items():
        if key == "password":
            hint = "name a file of mode 0600: `password_file`"
            faults.append(OptionFault("broker", "`password` cannot stand in a rule: anybody may read it", hint))
        elif key not in _BROKER:
            faults.append(OptionFault("broker", f"unknown key `{key}`", nearest(key, _BROKER, "key")))
        elif not isinstance(value, _BROKER[key]) or (isinstance(value, bool) and key != "tls"):
            faults.append(OptionFault("broker", f"`{key}` cannot be {value!r}"))
    tls = broker.get("tls")
    if isinstance(tls, Mapping) and (strange := sorted(tls.keys() - set(_TLS))):
        faults.append(OptionFault("broker", f"unknown key `{strange[0]}` of `tls`", nearest(strange[0], _TLS, "key")))
    if isinstance(tls, Mapping) and ("certificate" in tls) != ("key" in tls):
        faults.append(OptionFault("broker", "`certificate` and `key` go together", "name both files, or none"))
    if not broker.get("host"):
        faults.append(OptionFault("broker", "it lacks the key `host`", "name the broker, or leave `broker` out"))
    port = broker.get("port")
    if isinstance(port, int) and not 1 <= port <= 65_535:
        faults.append(OptionFault("broker", f"{port} is no port", "1 to 65535"))
    if "password_file" in broker and "user" not in broker:
        faults.append(OptionFault("broker", "`password_file` without `user`", "name the user that it belongs to"))
    return faults


def _texts(value: Any) -> list[str]:
    """Return every string in nested lists and mappings."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []


def _names(text: str) -> tuple[str, ...]:
    try:
        return template_names(text)
    except PatternError:
        return ()  # told where templates are read
