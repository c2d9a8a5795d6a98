"""A connection to a broker, and what its refusals mean to a person. For the daemon, the commands, and the action."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import aiomqtt
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from trigger_daemon.broker import Account
from trigger_daemon.credentials import secret

if TYPE_CHECKING:
    from paho.mqtt.client import Client as PahoClient
    from paho.mqtt.client import ConnectFlags

ANSWER_S = 5.0  # the broker has this long for each answer
FAREWELL_S = 1.0  # when we end: a service manager waits, and the last will tells the rest
WAITING_MAX = 1_000  # messages that have come and were not looked at; further ones are dropped
PACKET_BYTES_MAX = 262_144  # larger ones the broker keeps to itself; what may be asked has a fourth of it at most
HEADER_BYTES = 16  # of a publish, besides topic and payload: 5 of length, 2 of the topic's, 2 of the number, properties

_NOT_IN = (
    "does not let {who} in: a wrong password, or not known there",
    "correct `mqtt: user` and its password, or add the user at the broker",
)
# Reason codes of MQTT 5, of a refused connection, that stay until a person does something: why, and what.
_REFUSED = {
    0x84: ("does not speak MQTT 5", "use a broker that does (mosquitto 1.6 or newer)"),
    0x85: ("does not accept our client identifier", "let it, or choose another `mqtt: workstation`"),
    0x86: _NOT_IN,
    0x87: _NOT_IN,
    0x8A: ("has banned {who}", "ask whoever runs the broker"),
    0x8C: _NOT_IN,
}


_ERRNO = re.compile(r"\[Errno -?\d+\] ?")
_WORDS = {
    "Connection refused": "nothing listens on this port (connection refused)",
    "Connect call failed": "nothing listens on this port (connection refused)",
    "No route to host": "this network does not lead there (no route to host)",
    "Network is unreachable": "this machine has no network that leads there (network is unreachable)",
}


class _Heard(logging.Handler):
    """What the library says on the way. Of a connection that the broker ends before it has begun, nothing is raised."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.words = record.getMessage()


class Trouble(Exception):
    """Why the broker is of no use now; `lasting` until a person does something, `doubtful` if that is likely."""

    def __init__(self, why: str, hint: str, *, lasting: bool, doubtful: bool = False) -> None:
        super().__init__(why)
        self.doubtful = doubtful
        self.why = why
        self.hint = hint
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class Answer:
    """What the broker says of one message: its reason code, and what that means in its words."""

    code: int
    words: str


class Link(aiomqtt.Client):
    """The library's client, which also notices a refused publish: it is the one answer that the library drops."""

    topic = ""  # what is told on now, or was last
    answered = True  # the broker has what was told there
    refusal = ""  # the reason of a refused publish
    goodbye = ""  # why the broker ended the connection, if it said so
    packet_bytes_max = 0  # of what the broker takes; 0: it names no limit
    retains = confirms = True  # whether it keeps what is to be retained, and takes QoS 1

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self.told: set[str] = set()  # topics on which something was told

    def _on_connect(
        self, client: PahoClient, userdata: Any, flags: ConnectFlags, reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:  # fmt: skip
        self.packet_bytes_max = getattr(properties, "MaximumPacketSize", 0)
        self.retains = bool(getattr(properties, "RetainAvailable", 1))
        self.confirms = bool(getattr(properties, "MaximumQoS", 1))
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: PahoClient, userdata: Any, flags: Any, reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:  # fmt: skip
        self.goodbye = self.goodbye or (str(reason_code) if getattr(reason_code, "is_failure", False) else "")
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, client: PahoClient, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        answer = self._answers.get(mid)
        if answer is not None:
            said = getattr(properties, "ReasonString", "")
            if not answer.done():
                answer.set_result(Answer(reason_code.value, f"{reason_code}: {said}" if said else str(reason_code)))
        elif reason_code.is_failure:
            self.refusal = str(reason_code)
        super()._on_publish(client, userdata, mid, reason_code, properties)

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the connection has ended."""
        return self._disconnected

    async def deliver(self, topic: str, payload: bytes, *, retain: bool, properties: Properties) -> Answer:
        """Publish with QoS 1, and return what the broker answers. Raises MqttError if no answer comes."""
        info = self._client.publish(topic, payload, 1, retain, properties)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise aiomqtt.MqttCodeError(info.rc, "not connected")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[info.mid] = answer
        try:
            ends: set[asyncio.Future[Any]] = {answer, self.lost}
            await asyncio.wait(ends, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._answers[info.mid]
        if answer.done():
            return answer.result()
        if self.lost.done():
            raise self.lost.exception() or aiomqtt.MqttError("the connection was ended")
        raise aiomqtt.MqttError("Operation timed out")

    async def tell(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish, and return once the broker has it. Raises Trouble if it refuses, MqttError if it is away."""
        await self.tell_all(topic, [payload], retain=retain)

    async def tell_all(self, topic: str, payloads: Sequence[bytes], *, retain: bool = False) -> None:
        """Publish in this order, and return once the broker has them all; raises as `tell`."""
        self.topic = topic
        for payload in payloads:
            self.measure(payload)
        self.answered = False
        await asyncio.gather(*(self.publish(topic, payload, qos=1, retain=retain) for payload in payloads))
        self.answered = True
        self.check()
        self.told.add(topic)

    def room(self, topic: str) -> int:
        """Return how many bytes a payload may have: the broker ends a connection that brings it more."""
        return max(0, self.packet_bytes_max - len(topic.encode()) - HEADER_BYTES) if self.packet_bytes_max else 1 << 28

    def measure(self, payload: bytes) -> None:
        """Raise Trouble for a payload that is longer than the broker takes."""
        if len(payload) > self.room(self.topic):
            raise Trouble(
                f"what is to be told on {self.topic} has {len(payload):,} bytes, and the broker takes packets of"
                f" {self.packet_bytes_max:,} at most",
                "let it take longer ones (`max_packet_size` of mosquitto)",
                lasting=True,
            )

    def check(self) -> None:
        """Raise Trouble if a publish was refused; some brokers then end the connection, too."""
        if self.refusal:
            raise Trouble(
                f"the broker refuses what is told on {self.topic}: {self.refusal}",
                f"let the user write to {self.topic} (its access list, `acl_file` of mosquitto)",
                lasting=True,
            )

    async def hear(self, topic: str) -> None:
        """Subscribe; a message says whether it was sent with the retain flag. Raises Trouble if the broker refuses."""
        granted = await self.subscribe(topic, options=SubscribeOptions(qos=1, retainAsPublished=True))
        code = granted[0]
        if getattr(code, "value", code) >= 0x80:
            raise Trouble(
                f"the broker does not let us hear {topic}: {code}", f"let the user read {topic}", lasting=True
            )

    def drop(self) -> None:
        """Close the socket of a connection that did not come about; the library leaves it open."""
        sock = cast("socket.socket | None", self._client.socket())
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def password_of(account: Account) -> str | None:
    """Return the password, None without one. Raises Trouble."""
    if account.user is None:
        return None
    env = os.environ if account.credential else {}
    try:
        return secret(account.password, account.credential, account.password_file, env) or None
    except PermissionError as error:
        hint = "let the daemon's user read it; a command needs `sudo`"
        raise Trouble(f"the password cannot be read: {error}", hint, lasting=True) from None
    except (OSError, ValueError) as error:
        hint = "correct `mqtt: password_file` in the settings"
        raise Trouble(f"there is no password: {error}", hint, lasting=True) from None


def _context(account: Account) -> ssl.SSLContext | None:
    """Return what TLS is done with, read anew each time: certificates are renewed. Raises Trouble."""
    if not account.secured:
        return None
    file = account.ca or "the system's certificates"
    try:
        context = ssl.create_default_context(cafile=account.ca)
        if account.certificate is not None:
            file = f"{account.certificate} with {account.key}"
            # One with a password would ask a terminal.
            context.load_cert_chain(account.certificate, account.key, password="")
    except OSError as error:  # an SSLError is one, too
        hint = "correct `mqtt: tls` in the settings; files are PEM, the key without a password"
        raise Trouble(f"{file} cannot be used: {error}", hint, lasting=True) from None
    return context


@contextlib.asynccontextmanager
async def connected(
    account: Account, identifier: str, *, will: tuple[str, bytes] | None = None
) -> AsyncIterator[Link]:
    """Connect, and disconnect in the end; with `will` the broker tells that if we are gone. Raises Trouble."""
    password = await asyncio.to_thread(password_of, account)
    context = await asyncio.to_thread(_context, account)
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = PACKET_BYTES_MAX
    heard, logger = _Heard(), logging.Logger("mqtt")
    logger.addHandler(heard)
    link = Link(
        account.host,
        account.port,
        identifier=identifier,
        protocol=aiomqtt.ProtocolVersion.V5,
        clean_start=True,  # what was asked while we were away is not done later, to everybody's surprise
        username=account.user,
        password=password,
        tls_context=context,
        will=aiomqtt.Will(will[0], will[1], 1, True) if will is not None else None,
        keepalive=round(account.keepalive_s),
        timeout=ANSWER_S,
        max_queued_incoming_messages=WAITING_MAX,
        max_inflight_messages=20,
        properties=properties,
        logger=logger,
    )
    link.pending_calls_threshold = 1_000  # it would warn of as many as are told together
    try:
        await link.__aenter__()
    except (aiomqtt.MqttError, OSError, ValueError) as error:
        link.drop()
        raise judge(error, account, heard.words) from None
    except asyncio.CancelledError:
        link.drop()
        raise
    try:
        yield link
    except (aiomqtt.MqttError, OSError) as error:
        link.check()
        raise judge(error, account, link.goodbye, connected=True) from None
    finally:
        link.timeout = FAREWELL_S
        try:
            await link.__aexit__(None, None, None)
        except (aiomqtt.MqttError, OSError):
            link.drop()


def judge(error: BaseException, account: Account, heard: str = "", *, connected: bool = False) -> Trouble:
    """Return what an error of the library means to the person who must act; `heard` is what it said before."""
    at, tls = account.at, account.secured
    code = code_of(error)
    words = str(error) or type(error).__name__
    if code in _REFUSED and not connected:
        who = f"user {account.user!r}" if account.user else "a client without a user"
        why, hint = _REFUSED[code]
        return Trouble(f"{at} {why.format(who=who)}", hint, lasting=True)
    if "CERTIFICATE_VERIFY_FAILED" in words:
        named = account.ca or "what the system trusts"
        if "ostname mismatch" in words or "IP address mismatch" in words:
            hint = "use the name that the certificate has as `mqtt: host`"
            return Trouble(f"the certificate of {at} is for another name: {_plain(words)}", hint, lasting=True)
        hint = f"`mqtt: tls: ca` must name the authority that signed the broker's certificate; now it is {named}"
        return Trouble(f"the certificate of {at} is not trusted: {_plain(words)}", hint, lasting=True)
    if (tls and "ALERT" in heard.upper() and "CERTIFICATE" in heard.upper()) or "ALERT_UNKNOWN_CA" in heard:
        hint = "name our certificate and key in `mqtt: tls`, signed by whom the broker trusts"
        return Trouble(f"{at} wants a certificate of ours: {_plain(heard)}", hint, lasting=True)
    if "WRONG_VERSION_NUMBER" in words or "record layer failure" in words.lower():
        hint = "name the port on which the broker speaks TLS, or remove `tls`"
        return Trouble(f"{at} does not speak TLS", hint, lasting=True)
    if tls and not connected and ("reset by peer" in words or "EOF occurred" in words):
        hint = "name the port on which the broker speaks TLS (8883 is usual), or remove `tls`"
        why = f"{at} is there, and ends the connection at once: it probably does not speak TLS on this port"
        return Trouble(why, hint, lasting=False, doubtful=True)
    if "timed out" in words and not connected:
        hint = (
            "is the broker at work, and is this its TLS port?" if tls
            else "is the broker at work? If this is its TLS port, set `mqtt: tls`"
        )  # fmt: skip
        if "Operation timed out" not in words:  # the library's own words for one that takes the connection
            return Trouble(f"{at} does not answer", hint, lasting=False)
        port = "it speaks no TLS on this port" if tls else "this is its TLS port"
        return Trouble(f"{at} takes the connection and does not answer: it hangs, or {port}", hint, lasting=False,
                       doubtful=True)  # fmt: skip
    if isinstance(error, socket.gaierror) or "Name or service" in words or "name resolution" in words:
        hint = "is `mqtt: host` right, and does this machine find names?"
        return Trouble(f"the name {account.host} is not known: {_plain(words)}", hint, lasting=False)
    if not connected and not tls and ("reset" in words or "Unspecified" in words):
        why = f"{at} is there, and ends the connection at once: this is probably its TLS port"
        return Trouble(why, "set `mqtt: tls`, or name its port without TLS", lasting=False, doubtful=True)
    if connected and words.startswith("Disconnected during"):
        words = f"the broker ended the connection: {heard}" if heard else "the broker, or the network, has gone"
    verb = "lost" if connected else "cannot be reached"
    hint = "is the broker at work, and is the network?"
    return Trouble(f"{at} {verb}: {_plain(words)}", hint, lasting=False)


def code_of(error: BaseException | None) -> int:
    """Return the broker's reason, 0 where it gave none."""
    reason = getattr(error, "rc", None)
    return reason.value if isinstance(reason, ReasonCode) else 0


def _plain(words: str) -> str:
    """Return a library's words for people: without numbers of errors, and without its own file and line."""
    words = _ERRNO.sub("", words.partition(" (_ssl.c")[0])
    return next((said for short, said in _WORDS.items() if short in words), words)
