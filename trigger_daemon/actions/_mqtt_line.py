"""One connection to one broker, on a thread of its own, for as long as there is something to publish.

A parcel that is handed over ends once: with the broker's word, or with why
there is none. Nothing is repeated here: who repeats knows what the journal says.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trigger_daemon.broker import Account
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.failpoints import fail_point

if TYPE_CHECKING:
    from trigger_daemon.broker.link import Link, Trouble

TOGETHER = 20  # parcels that wait for the broker's word at once; further ones wait for their turn
IDLE_S = 60.0  # a connection that nobody needed for so long is ended
CLOSE_S = 2.0  # for the farewells of all; a broker that hangs is not waited for
NOBODY, TOO_LARGE = 0x10, 0x95  # reasons of MQTT 5: no matching subscribers; packet too large

# Reason codes of a refused publish that only a person can mend: what is to be done.
_PERSON = {
    0x87: "let the user write there (its access list, `acl_file` of mosquitto)",
    0x90: "name another `topic` in the rule, or let the broker take it",
    TOO_LARGE: "leave `files: true` out, let the rule's batches be smaller, or raise the broker's limit",
    0x99: "change the rule's `payload`",
}


@dataclass(eq=False, slots=True)
class Parcel:
    """A message, and what became of it: `code` once the broker has answered, or a fault."""

    topic: str
    payload: bytes
    id: str
    facts: tuple[tuple[str, str], ...]  # user properties
    retain: bool = False
    expiry_s: int | None = None
    state: str = "waiting"  # then sent; then ended, or dropped
    code: int = 0
    fault: Fault | None = None
    told: Callable[[], None] = field(default=lambda: None)
    size: int = field(init=False)  # of the payload, in bytes

    def __post_init__(self) -> None:
        self.size = len(self.payload)

    def end(self, *, code: int = 0, fault: Fault | None = None) -> None:
        """Note what became of it. A run that is held keeps its parcel for days, but no megabyte with it."""
        self.payload = b""
        self.code, self.fault = code, fault
        self.state = "ended"
        self.told()


class Line:
    """Any thread may use it; only `join` waits."""

    def __init__(self, account: Account, name: str) -> None:
        self._account = account
        # Two connections of one name throw each other out, and one of a daemon that was killed may still stand.
        self._name = f"{name}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._waiting: deque[Parcel] = deque()
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._task = self._loop.create_task(self._work())
        self._thread = threading.Thread(target=self._run, name="mqtt-line", daemon=True)
        self._thread.start()

    def send(self, parcel: Parcel) -> None:
        with self._lock:
            self._waiting.append(parcel)
        self._wake()

    def drop(self, parcel: Parcel) -> bool:
        """Take back what was not sent yet; false if it was."""
        with self._lock:
            if parcel.state == "waiting":
                parcel.state = "dropped"
            return parcel.state == "dropped"

    def end(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._task.cancel)

    def join(self, timeout_s: float) -> None:
        """Wait for the end that was asked for."""
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._news.set)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
            self._loop.run_until_complete(self._loop.shutdown_default_executor())  # a connect takes 5 s at most
        finally:
            self._loop.close()

    async def _work(self) -> None:
        from trigger_daemon.broker.link import Trouble, connected

        while True:
            await self._news.wait()
            self._news.clear()
            if not self._waiting:
                continue
            try:
                async with connected(self._account, self._name) as link:
                    await self._publish(link)
            except Trouble as trouble:
                self._give_up(_fault_of(trouble))
            except Exception as error:  # noqa: BLE001  the top of a thread: a fault of ours must not end it in silence
                why = f"a fault of our own, {type(error).__name__}: {error}"
                self._give_up(Fault("transient", why, "please report it"))

    def _give_up(self, fault: Fault) -> None:
        """Those that wait find the broker as those did that were sent."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for parcel in waiting:
            if parcel.state != "dropped":
                parcel.end(fault=fault)

    async def _publish(self, link: Link) -> None:
        """Publish what is handed over until nobody needs it any more. Raises what ends the connection."""
        from trigger_daemon.broker.link import code_of, judge

        under_way: dict[asyncio.Task[None], Parcel] = {}
        try:
            while True:
                while len(under_way) < TOGETHER and (parcel := self._next()) is not None:
                    under_way[asyncio.ensure_future(_deliver(link, parcel))] = parcel
                news = asyncio.ensure_future(self._news.wait())
                heard: set[asyncio.Future[Any]] = {news, link.lost, *under_way}
                await asyncio.wait(heard, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                idle = not (news.done() or under_way)
                news.cancel()
                self._news.clear()
                for task in [task for task in under_way if task.done()]:
                    task.result()
                    del under_way[task]
                if link.lost.done() and not under_way:
                    with contextlib.suppress(Exception):  # nothing was under way: the next one connects anew
                        link.lost.result()
                    break
                if idle:
                    break
        except Exception as error:
            sent = [parcel for parcel in under_way.values() if parcel.state == "sent"]
            if code_of(error) == TOO_LARGE and sent:  # one that says its limit only so
                largest = max(sent, key=lambda parcel: parcel.size)
                largest.end(fault=Fault("person", f"the broker refuses {largest.size:,} bytes as too large",
                                        _PERSON[TOO_LARGE]))  # fmt: skip
            fault = _fault_of(judge(error, self._account, connected=True))
            for parcel in sent:
                if parcel.state == "sent":
                    parcel.end(fault=fault)
            raise
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            if self._waiting:
                self._news.set()

    def _next(self) -> Parcel | None:
        with self._lock:
            while self._waiting:
                parcel = self._waiting.popleft()
                if parcel.state == "waiting":
                    parcel.state = "sent"
                    return parcel
        return None


async def _deliver(link: Link, parcel: Parcel) -> None:
    """Publish one parcel, and end it with the broker's word. Raises MqttError if there is none."""
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    from trigger_daemon.broker.link import HEADER_BYTES

    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.PayloadFormatIndicator = 1
    properties.ContentType = "application/json"
    properties.CorrelationData = parcel.id.encode("ascii")
    properties.UserProperty = list(parcel.facts)
    if parcel.expiry_s is not None:
        properties.MessageExpiryInterval = parcel.expiry_s
    topic = parcel.topic.encode("utf-8")
    size = HEADER_BYTES + len(topic) + parcel.size + len(properties.pack())  # type: ignore[no-untyped-call]
    if link.packet_bytes_max and size > link.packet_bytes_max:
        why = f"the message has {size:,} bytes; the broker takes {link.packet_bytes_max:,}"
        return parcel.end(fault=Fault("person", why, _PERSON[TOO_LARGE]))
    if not link.confirms:
        return parcel.end(fault=Fault("person", "the broker takes no QoS 1: it would confirm nothing",
                                      "let it, or name another broker", Scope.DESTINATION))  # fmt: skip
    if parcel.retain and not link.retains:
        return parcel.end(fault=Fault("person", "the broker retains nothing", "set `retain: false` in the rule"))
    fail_point("mqtt.publish")
    try:
        answer = await link.deliver(parcel.topic, parcel.payload, retain=parcel.retain, properties=properties)
    except ValueError as error:  # the library's word on this message
        return parcel.end(fault=Fault("permanent", f"it cannot be published: {error}"))
    fail_point("mqtt.published")
    if answer.code < 0x80:
        return parcel.end(code=answer.code)
    why = f"the broker refuses what is told on {parcel.topic}: {answer.words}"
    if answer.code in _PERSON:
        return parcel.end(fault=Fault("person", why, _PERSON[answer.code]))
    return parcel.end(fault=Fault("transient", why, "see the broker's log"))


def _fault_of(trouble: Trouble) -> Fault:
    """Return what trouble with the broker means for every message to it: they wait, and use up no attempts."""
    kind: Literal["person", "transient"] = "person" if trouble.lasting else "transient"
    return Fault(kind, trouble.why, trouble.hint, Scope.DESTINATION, counts=False)
