"""The thread that tells a broker what the daemon does, and hears what it is asked.

It has a loop of its own: a broker that hangs, a name that is not found, a TLS
handshake without end hold nobody else. From the daemon it takes a reference to
the last heartbeat, and reads ends and holds of runs from the journal, so that
between the two there is no queue that could fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from aiomqtt import Message, MqttError

from trigger_daemon.broker.link import FAREWELL_S, Link, Trouble, connected
from trigger_daemon.clock import Clock
from trigger_daemon.core.model import Order, Troubled
from trigger_daemon.errors import JournalError
from trigger_daemon.mqtt import asked, told, topic_of, workstation_of
from trigger_daemon.mqtt.spool import Spool

if TYPE_CHECKING:
    from trigger_daemon.config.settings import MqttSettings

ALARM = "mqtt"  # its key
AGAIN_S, AGAIN_MAX_S = 1.0, 30.0  # between two attempts to reach a broker that is away
LASTING_S = 60.0  # where only a person helps
DOUBTFUL_ALARM_S = 45.0  # one that was never reached, and seems to be another port than is meant
AWAY_ALARM_S = 600.0  # a broker is restarted now and then; nobody needs to be called for that
ENDED_MAX = 3  # connections that end over one topic, in a row: it is the topic, not the network
STEADY_S = 60.0  # a connection that held so long makes the next attempt come soon
READ_BACK_S = 5.0  # how long the own status may take to come back
STATUS_EVERY_S = 2.0  # at most so often, when it has changed
STATUS_LATEST_S = 60.0  # and so often when it has not: a sign of life
GATHER_S = 0.1  # ends of runs that come together are told together
LOOK_S = 1.0  # how often it is looked what is due
STOP_S = 2.5  # for the last events and the farewell; the daemon waits a little longer
REFUSED_LOGGED_S = 1.0  # messages that are not followed are logged at most so often
DISK_S = 5.0  # a disk that does not answer by then is not waited for: the status still says how things are
REPLIES_MAX = 200  # that wait to be told


T = TypeVar("T")


class Logger(Protocol):
    def info(self, event: str, **keys: Any) -> Any: ...
    def warning(self, event: str, **keys: Any) -> Any: ...


class Edge:
    """`show`, `stir`, `answer`, `words` and `stop` may be called from any thread, and none but `stop` waits."""

    def __init__(
        self,
        settings: MqttSettings,
        state_dir: Path,
        *,
        host: str,
        post: Callable[[Order | Troubled], None],
        hear: Callable[[Sequence[str]], Sequence[str]],
        clock: Clock,
        logger: Logger,
        after: Edge | None = None,
    ) -> None:
        """Begin. `hear` has paths looked at and returns those that lie nowhere; `after`: who is to end first."""
        self.settings = settings
        self._host = host
        self._post = post
        self._hear = hear
        self._clock = clock
        self._log = logger
        self._after = after
        self._workstation = workstation_of(settings)
        self._spool = Spool(state_dir, settings.spool)
        self._beat: tuple[Mapping[str, Any], float] | None = None  # the last heartbeat, and when it came
        self._moved = True  # there may be ends of runs to be told
        self._stopping = False
        self._orders = 0
        self._link: Link | None = None  # the last connection
        self._ended: Counter[str] = Counter()  # topic -> connections that ended over it, since something was told there
        self._asking: dict[int, str] = {}  # order -> what its reply is called
        self._replies: list[told.Payload] = []
        self._hints = asked.Rate(asked.HINTS_PER_S, asked.HINTS_AT_ONCE, clock.monotonic)
        self._wishes = asked.Rate(asked.ORDERS_PER_S, asked.ORDERS_AT_ONCE, clock.monotonic)
        self._refused, self._refused_at = 0, float("-inf")
        self._alarms: dict[str, told.Payload] = {}  # as far as they were told
        self._dropped = 0
        self._state, self._since_time, self._why, self._hint = "connecting", clock.utc(), "", ""
        self._away_at: float | None = clock.monotonic()
        self._alarmed: str | None = None  # the words of our alarm; None: an earlier life may have raised one
        self._speaker = secrets.token_hex(8)  # so that two of one name notice each other
        self._was_connected = False
        self._doubtful = False
        self._hanging: asyncio.Future[Any] | None = None  # the last call that touches the disk
        self._again = False  # somebody wants it tried at once
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._woken = False
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from the daemon

    def show(self, beat: Mapping[str, Any]) -> None:
        """Hand over the last heartbeat; not to be changed afterwards."""
        self._beat = (beat, self._clock.monotonic())
        self._wake()

    def stir(self) -> None:
        """Runs have ended, or were held."""
        self._moved = True
        self._wake()

    def answer(self, order: int, answer: Mapping[str, Any]) -> None:
        """What became of an order."""
        reply = self._asking.pop(order, "")
        self._log.info("mqtt.ordered", ok=bool(answer.get("ok")), text=answer.get("text") or answer.get("error") or "")
        if reply:
            self._reply(reply, answer)

    def again(self) -> None:
        """Try at once: a person may have mended what the broker refused."""
        self._again = True
        self._wake()

    def words(self) -> dict[str, Any]:
        """Return how it stands, for `status`."""
        return {
            "broker": self.settings.at,
            "topics": topic_of(self.settings, "#"),
            "state": self._state,
            "since_time": self._since_time,
            "why": self._why,
            "hint": self._hint,
            "dropped": self._dropped,
        }

    def stop(self) -> None:
        """Say farewell and end; a broker that hangs is not waited for."""
        self.leave()
        self._thread.join(STOP_S + LOOK_S)

    def leave(self) -> None:
        """Begin to end."""
        self._stopping = True
        self._woken = False
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._news.set)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        if self._after is not None:
            self._after.stop()  # it says "offline" on the topic that we are to say "online" on
            self._after = None
        self._loop.set_exception_handler(lambda loop, context: None)  # futures of the library that nobody asked again
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()  # waits for no thread: one may hang in a look-up of a name

    async def _main(self) -> None:
        serving = asyncio.ensure_future(self._serve())
        while not self._stopping and not serving.done():
            await asyncio.wait([serving], timeout=LOOK_S)
        await asyncio.wait([serving], timeout=STOP_S)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    async def _serve(self) -> None:
        """Be connected, and connect again, until the end."""
        while self._beat is None and not self._stopping:  # nothing is told before there is something to tell
            await self._wait(LOOK_S)
        wait_s = AGAIN_S
        while not self._stopping:
            self._again, self._link = False, None
            try:
                await self._connected()
            except Exception as error:  # noqa: BLE001  the top of a thread: a fault of ours must not end it in silence
                trouble = self._repeated(error) if isinstance(error, Trouble) else _bug(error)
                steady = self._state == "connected" and self._clock.utc() - self._since_time > STEADY_S
                self._troubled(trouble)
                wait_s = AGAIN_S if steady else wait_s
                await self._pause(LASTING_S if trouble.lasting else wait_s * random.uniform(0.7, 1.3))
                wait_s = min(wait_s * 2, AGAIN_MAX_S)

    def _repeated(self, trouble: Trouble) -> Trouble:
        """Return the trouble; one that comes each time over the same topic is lasting, however the broker puts it."""
        link = self._link
        if link is None:  # not even reached
            return trouble
        for topic in link.told:
            self._ended.pop(topic, None)
        if trouble.lasting or link.answered:
            return trouble
        self._ended[link.topic] += 1
        if self._ended[link.topic] < ENDED_MAX:
            return trouble
        return Trouble(
            f"{self.settings.at} ends the connection each time something is told on {link.topic}",
            "let the user write to it (`acl_file` of mosquitto), and let the broker take messages of some kB there",
            lasting=True,
        )

    async def _pause(self, pause_s: float) -> None:
        end = self._clock.monotonic() + pause_s
        while not self._stopping and not self._again and (left_s := end - self._clock.monotonic()) > 0:
            await self._wait(min(left_s, LOOK_S))
            self._tell_away()

    async def _wait(self, most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), most_s)
        self._news.clear()
        self._woken = False

    def _enter(self, state: str, why: str = "", hint: str = "") -> None:
        if (state, why) != (self._state, self._why):
            self._state, self._since_time, self._why, self._hint = state, self._clock.utc(), why, hint
            tell = self._log.info if state == "connected" else self._log.warning
            tell(f"mqtt.{state}", broker=self.settings.at, why=why, hint=hint)

    def _troubled(self, trouble: Trouble) -> None:
        if self._away_at is None:
            self._away_at = self._clock.monotonic()
        self._doubtful = trouble.doubtful and not self._was_connected  # one that was right is away, if anything
        self._enter("refused" if trouble.lasting else "away", trouble.why, trouble.hint)
        if trouble.lasting:
            self._alarm(f"MQTT: {trouble.why}", trouble.hint)
        self._tell_away()

    def _tell_away(self) -> None:
        away = self._state == "away" and self._away_at is not None
        patience_s = DOUBTFUL_ALARM_S if self._doubtful else AWAY_ALARM_S
        if away and self._clock.monotonic() - (self._away_at or 0.0) > patience_s:
            self._alarm(f"MQTT: {self._why}", self._hint)

    def _alarm(self, what: str, hint: str = "") -> None:
        if what != self._alarmed:
            self._alarmed = what
            self._post(Troubled(ALARM, what, hint, self._clock.monotonic()))

    async def disk(self, call: Callable[..., T], *args: Any) -> T:
        """Return what a call that touches the disk returns. Raises TimeoutError if it, or one before it, hangs."""
        if self._hanging is not None and not self._hanging.done():
            raise TimeoutError
        self._hanging = asyncio.ensure_future(asyncio.to_thread(call, *args))
        await asyncio.wait([self._hanging], timeout=DISK_S)
        if not self._hanging.done():
            raise TimeoutError
        result: T = self._hanging.result()
        return result

    # ------------------------------------------------------------ one connection

    async def _connected(self) -> None:
        """Tell and hear until the end, or until the connection is lost. Raises Trouble."""
        status = topic_of(self.settings, "status")
        since = self._clock.utc()
        will = told.encoded(told.offline(self._workstation, self._host, self._speaker, "lost", since))
        identifier = f"{self.settings.prefix}-{self._workstation}"
        async with connected(self.settings.account, identifier, will=(status, will)) as link:
            self._link = link
            if self._stopping:  # another one may speak for this machine by now
                return
            why = "refused"
            try:
                await self._birth(link, status)
                why = "stopped"
                self._enter("connected")
                self._away_at = None
                self._was_connected = True
                self._alarm("")
                await _first(self._listen(link), _Teller(self, link).run())
            except Trouble:
                why = "refused"
                raise
            finally:
                last = told.encoded(told.offline(self._workstation, self._host, self._speaker, why, since))
                with contextlib.suppress(MqttError, TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await link.publish(status, last, qos=1, retain=True)

    async def _birth(self, link: Link, status: str) -> None:
        """Say that we are there, and see that it is said: a broker may refuse in silence. Then begin to hear."""
        payload = told.encoded(self.status())
        await link.hear(status)
        await link.tell(status, payload, retain=True)
        try:
            async with asyncio.timeout(READ_BACK_S):
                while (heard := bytes((await anext(link.messages)).payload)) != payload:
                    self._compare(heard)
        except TimeoutError:
            raise Trouble(
                f"what is told on {status} does not come back: the broker refuses it, or does not let us read it",
                f"let the user write to and read {topic_of(self.settings, '#')} (`acl_file` of mosquitto)",
                lasting=True,
            ) from None
        await link.unsubscribe(status)
        for leaf, wanted in (("hint", self.settings.hints), ("order", bool(self.settings.orders))):
            if wanted:
                await link.hear(topic_of(self.settings, leaf))

    def _compare(self, heard: bytes) -> None:
        """See whether somebody else has spoken here since our last connection. Raises Trouble."""
        try:
            said = json.loads(heard)
        except (ValueError, RecursionError):
            return
        if not self._was_connected or not isinstance(said, dict) or said.get("speaker") == self._speaker:
            return
        raise Trouble(
            f"another daemon, on {str(said.get('host'))[:100]!r}, calls itself {self._workstation!r} at"
            f" {self.settings.at}, too",
            "give each its own `mqtt: workstation`",
            lasting=True,
        )

    def status(self) -> told.Payload:
        """Return what the status says now."""
        assert self._beat is not None
        beat, at = self._beat
        silent_s = self._clock.monotonic() - at
        return told.online(self._workstation, self._host, self._speaker, beat, silent_s) | {"dropped": self._dropped}

    # ------------------------------------------------------------ what is asked

    async def _listen(self, link: Link) -> None:
        async for message in link.messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        leaf = str(message.topic).rpartition("/")[2]
        if leaf not in ("hint", "order"):
            return  # our own status
        try:
            if message.retain:
                why = "it was sent with the retain flag, and would be followed again at each connection"
                raise asked.Refused(f"{why}; `mosquitto_pub -r -n` removes it")
            (self._hinted if leaf == "hint" else self._ordered)(bytes(message.payload))
        except asked.Refused as refused:
            self._tell_refused(leaf, refused)

    def _hinted(self, payload: bytes) -> None:
        if not self._hints.allow():
            raise asked.Refused(f"too many hints: {asked.HINTS_PER_S:g} a second are followed")
        hint = asked.hint_of(payload)
        nowhere = self._hear(hint.paths)
        if nowhere:
            what = f"{nowhere[0]!a}" + (f" and {len(nowhere) - 1} more" if len(nowhere) > 1 else "")
            raise asked.Refused(f"{what} lies below no directory that a rule watches now", hint.reply)
        if hint.reply:
            self._reply(hint.reply, {"ok": True, "text": f"{len(hint.paths)} looked at"})

    def _ordered(self, payload: bytes) -> None:
        if not self._wishes.allow():
            raise asked.Refused(f"too many orders: {asked.ORDERS_PER_S:g} a second are followed")
        wish = asked.order_of(payload, self.settings.orders)
        self._orders += 1
        number = -self._orders  # those of commands are above 0
        self._asking[number] = wish.reply
        self._log.info("mqtt.order", verb=wish.verb, args=dict(wish.args), who=wish.who, why=wish.why)
        self._post(Order(number, wish.verb, wish.args, wish.who, wish.why, self._clock.monotonic()))

    def _tell_refused(self, leaf: str, refused: asked.Refused) -> None:
        self._refused += 1
        now = self._clock.monotonic()
        if now - self._refused_at >= REFUSED_LOGGED_S:
            self._log.warning("mqtt.not_followed", topic=leaf, why=refused.why, messages=self._refused)
            self._refused, self._refused_at = 0, now
        if refused.reply:
            self._reply(refused.reply, {"ok": False, "error": refused.why, "hint": ""})

    def _reply(self, name: str, answer: Mapping[str, Any]) -> None:
        if len(self._replies) < REPLIES_MAX:
            common = {"reply": name, "workstation": self._workstation, "time": told.rfc3339(self._clock.utc())}
            self._replies.append({**common, **answer})
            self._wake()


class _Teller:
    """What is told over one connection."""

    def __init__(self, edge: Edge, link: Link) -> None:
        self._edge = edge
        self._link = link
        self._status: tuple[told.Payload, float] | None = None  # as last told, and when
        self._storage: tuple[list[str], float] | None = None  # states, and when
        self._standing: dict[str, told.Payload] | None = None  # None: not told over this connection
        edge._moved = True

    async def run(self) -> None:
        """Tell until the end. Raises Trouble, MqttError."""
        edge = self._edge
        while not edge._stopping:
            await self._replies()
            if edge._moved:
                edge._moved = False
                await self._runs()
            await self._beat()
            await edge._wait(LOOK_S)
            if edge._moved and not edge._stopping:
                await asyncio.sleep(GATHER_S)
        await self._runs()

    async def _tell(self, leaf: str, payload: told.Payload, *, retain: bool = False) -> None:
        topic = topic_of(self._edge.settings, leaf)
        await self._link.tell(topic, told.fitted(payload, self._link.room(topic)), retain=retain)

    async def _replies(self) -> None:
        edge = self._edge
        while edge._replies:
            await self._tell("reply", edge._replies[0])
            edge._replies.pop(0)

    async def _runs(self) -> None:
        """Tell the ends and holds of runs that were not told yet, in their order."""
        edge, topic = self._edge, topic_of(self._edge.settings, "run")
        while True:
            try:
                moves, dropped, after = await edge.disk(edge._spool.next)
            except (JournalError, OSError):  # full, hung or damaged: the daemon says so; the next look tries again
                edge._moved = True
                return
            if dropped:
                await self._tell("run", told.lost(edge._workstation, dropped, after, edge._clock.utc()))
            if not moves:
                return
            room = self._link.room(topic)
            payloads = [told.fitted(told.run(edge._workstation, move), room) for move in moves]
            await self._link.tell_all(topic, payloads)
            if dropped:
                edge._dropped += dropped
                edge._log.warning("mqtt.dropped", events=dropped, spool=edge.settings.spool)
            with contextlib.suppress(OSError):  # a full disk: after a crash they are told again
                await edge.disk(edge._spool.told, moves[-1])

    async def _beat(self) -> None:
        """Tell what the last heartbeat says, where it is due."""
        edge, now, utc = self._edge, self._edge._clock.monotonic(), self._edge._clock.utc()
        status = edge.status()
        if self._status is None or _due(now - self._status[1], changed=status != self._status[0]):
            await self._tell("status", {**status, "time": told.rfc3339(utc)}, retain=True)
            self._status = (status, now)
        assert edge._beat is not None
        beat, _ = edge._beat
        alarms = told.alarms_of(beat)
        if alarms != self._standing:
            await self._tell("alarms", told.standing(edge._workstation, alarms, utc), retain=True)
            self._standing = alarms
        for event in told.changed(edge._workstation, edge._alarms, alarms, utc):
            await self._tell("alarm", event)
        edge._alarms = alarms
        states = [volume["state"] for volume in beat["volumes"] if told.read(volume)]
        before, at = self._storage or ([], 0.0)
        if states != before or now - at >= edge.settings.storage_every_s:
            await self._tell("storage", told.storage(edge._workstation, beat, utc), retain=True)
            self._storage = (states, now)


def _bug(error: Exception) -> Trouble:
    why = f"a fault of our own, {type(error).__name__}: {error}"
    return Trouble(why, "please report it; nothing else is touched by it", lasting=True)


def _due(ago_s: float, *, changed: bool) -> bool:
    return ago_s >= (STATUS_EVERY_S if changed else STATUS_LATEST_S)


async def _first(*works: Any) -> None:
    """Do these until one ends, and end as it does."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["ALARM", "Edge"]
