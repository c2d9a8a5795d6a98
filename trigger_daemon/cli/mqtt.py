"""`mqtt`: what the broker of the settings says: of this machine, and of all workstations of the facility."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, NEEDS_PERSON, OK, Group, Setup, pass_setup
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trigger_daemon.broker.link import Link, Trouble
    from trigger_daemon.config import MqttSettings

QUIET_S = 0.5  # what is retained comes at once: nothing more for so long means that it was all
FIRST_S = 3.0  # for the first of it
BACK_S = 5.0  # for what was just published
SHOW_S = 1.0
SILENT_S = 150.0  # a status comes each minute; clocks of two machines differ
WORKSTATIONS_MAX = 1_000
COUNT_MAX = 1 << 63  # of a number that anybody may have told: longer ones are none of ours, and no screen has room


@click.group(cls=Group)
def mqtt() -> None:
    """The broker of the settings, and what it knows of all workstations."""


def _settings(setup: Setup) -> MqttSettings:
    settings = setup.settings().mqtt
    if settings.host is None:
        raise TriggerError("the settings name no broker", hint="set `mqtt: host`; docs/how-to/mqtt.md goes through it")
    return settings


# -------------------------------------------------------------------------- check


class Finding(NamedTuple):
    what: str
    ok: bool
    why: str = ""
    hint: str = ""


@mqtt.command("check")
@pass_setup
def check(setup: Setup) -> None:
    """Connect as the daemon does, and see whether what is told there comes back.

    A running daemon is not disturbed: it is another client, and another topic (`check`, beside `status`). Exit code 4
    if a person is needed, 1 if the broker cannot be reached.
    """
    settings = _settings(setup)
    found, trouble = asyncio.run(_check(settings))
    ok = all(one.ok for one in found)
    if setup.json:
        setup.data({"ok": ok, "broker": settings.at, "checks": [one._asdict() for one in found]})
    else:
        for one in found:
            words = f"{one.what}: {one.why}" if one.why else one.what
            click.echo(f"{'ok   ' if one.ok else 'fault'}  {text.safe(words)}")
            if one.hint:
                click.echo(f"       hint: {text.safe(one.hint)}")
    if not ok:
        raise click.exceptions.Exit(NEEDS_PERSON if trouble is None or trouble.lasting else FAILURE)


async def _check(settings: MqttSettings) -> tuple[list[Finding], Trouble | None]:
    from trigger_daemon.broker.link import Trouble, connected
    from trigger_daemon.mqtt import topic_of

    found = []
    if settings.tls is None and settings.password_or_file and settings.host not in ("localhost", "127.0.0.1", "::1"):
        hint = "set `mqtt: tls`: anybody on the network can read it"
        found.append(Finding("TLS", False, f"the password goes to {settings.at} as it is", hint))
    try:
        async with connected(settings.account, _name()) as link:
            secured = "with TLS" if settings.tls is not None else "without TLS"
            found.append(Finding(settings.at, True, f"lets {settings.user or 'us'} in, {secured}"))
            topic = topic_of(settings, "check")
            await link.hear(topic)
            said = json.dumps({"check": uuid.uuid4().hex}).encode()
            await link.tell(topic, said)
            back = await _comes_back(link, said)
            why = "can be written and read" if back else "what is told there does not come back"
            hint = "" if back else f"let the user write to and read {topic_of(settings, '#')} (`acl_file` of mosquitto)"
            found.append(Finding(topic, back, why, hint))
            for leaf, wanted in (("hint", settings.hints), ("order", bool(settings.orders))):
                if wanted:
                    await link.hear(topic_of(settings, leaf))
                    found.append(Finding(topic_of(settings, leaf), True, "is subscribed to"))
    except Trouble as trouble:
        return [*found, Finding("broker", False, trouble.why, trouble.hint)], trouble
    return found, None


async def _comes_back(link: Link, said: bytes) -> bool:
    try:
        async with asyncio.timeout(BACK_S):
            async for message in link.messages:
                if message.payload == said:
                    return True
    except TimeoutError:
        pass
    return False


def _name() -> str:
    """Return an identifier that no daemon has: of two alike the broker throws one out."""
    return f"trigger-daemon-cli-{uuid.uuid4().hex[:12]}"


# -------------------------------------------------------------------------- watch


class Facility:
    """What was heard of every workstation."""

    def __init__(self, prefix: str) -> None:
        self._levels = prefix.count("/") + 1
        self.known: dict[str, dict[str, Any]] = {}

    def take(self, topic: str, payload: bytes) -> None:
        """Take a status, storage or alarms; what is no JSON object of ours is passed over."""
        levels = topic.split("/")
        name, leaf = levels[self._levels], levels[-1]
        try:
            said = json.loads(payload)
        except (ValueError, RecursionError):
            return
        if not isinstance(said, dict) or (name not in self.known and len(self.known) >= WORKSTATIONS_MAX):
            return
        one = self.known.setdefault(name, {"workstation": name, "status": None, "storage": None, "alarms": []})
        if leaf == "alarms":
            alarms = said.get("alarms")
            one["alarms"] = [each for each in alarms if isinstance(each, dict)] if isinstance(alarms, list) else []
        else:
            one[leaf] = said

    def rows(self) -> list[dict[str, Any]]:
        """Return the workstations, those that need somebody first."""
        told = [one for one in self.known.values() if one["status"] is not None]
        return sorted(told, key=lambda one: (_RANK.get(_state(one["status"]), 0), one["workstation"]))


_RANK = {"offline": 0, "alarm": 1, "degraded": 2, "ok": 3}


def _state(status: Mapping[str, Any]) -> str:
    """Return the health of one that is there, else `offline`."""
    return str(status.get("health")) if status.get("state") == "online" else "offline"


@mqtt.command("watch")
@click.option("--once", is_flag=True, help="Show what is known now, and end.")
@pass_setup
def watch(setup: Setup, once: bool) -> None:
    """Show all workstations that tell this broker what they do; those that need somebody come first.

    q or Ctrl-C ends. With `-F json` each change is one object a line. The daemon need not run here: any machine will do
    whose settings name the broker and a user that may read the topics. With --once the exit code is 4 if one of them is
    offline or has an alarm, and 1 if nobody ever told anything there.
    """
    from trigger_daemon.broker.link import Trouble

    settings = _settings(setup)
    facility = Facility(settings.prefix)
    try:
        if once:
            asyncio.run(_once(settings, facility))
            _show(setup, settings, facility)
        else:
            _live(setup, settings, facility)
            return
    except Trouble as trouble:
        setup.fail(trouble.why, trouble.hint)
        raise click.exceptions.Exit(NEEDS_PERSON if trouble.lasting else FAILURE) from None
    if not facility.rows():
        hint = f"may user {settings.user or 'nobody'} read it, and do the daemons have this `mqtt: prefix`?"
        text.complain(f"nobody has told anything below {settings.prefix} at {settings.at}", hint)
        raise click.exceptions.Exit(FAILURE)
    needed = any(_state(one["status"]) in ("offline", "alarm") for one in facility.rows())
    raise click.exceptions.Exit(NEEDS_PERSON if needed else OK)


def _show(setup: Setup, settings: MqttSettings, facility: Facility) -> None:
    rows = facility.rows()
    if setup.json:
        setup.data({"broker": settings.at, "workstations": rows})
        return
    text.console().print(_table(rows))


async def _once(settings: MqttSettings, facility: Facility) -> None:
    from trigger_daemon.broker.link import connected

    async with connected(settings.account, _name()) as link:
        wait_s = FIRST_S
        await _subscribe(link, settings)
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    message = await anext(link.messages)
            except TimeoutError:
                return
            facility.take(str(message.topic), bytes(message.payload))
            wait_s = QUIET_S


async def _subscribe(link: Link, settings: MqttSettings) -> None:
    for leaf in ("status", "storage", "alarms"):
        await link.hear(f"{settings.prefix}/+/{leaf}")


def _live(setup: Setup, settings: MqttSettings, facility: Facility) -> None:
    if setup.json or not sys.stdout.isatty():
        asyncio.run(_follow(settings, facility, lambda trouble: _line(setup, settings, facility, trouble)))
        return
    from rich.live import Live

    from trigger_daemon.cli.watching import keys

    with keys() as pressed, Live(console=text.console(), screen=True, auto_refresh=False) as live:

        def show(trouble: Trouble | None) -> bool:
            live.update(_screen(settings, facility, trouble), refresh=True)
            return pressed(0.0) in ("q", "Q")

        asyncio.run(_follow(settings, facility, show))


def _line(setup: Setup, settings: MqttSettings, facility: Facility, trouble: Trouble | None) -> bool:
    if setup.json:
        fault = trouble.why if trouble is not None else None
        setup.data({"broker": settings.at, "error": fault, "workstations": facility.rows()}, compact=True)
    else:
        text.console().print(_screen(settings, facility, trouble))
        click.echo()
    return False


async def _follow(settings: MqttSettings, facility: Facility, show: Callable[[Trouble | None], bool]) -> None:
    """Hear and show, each second, until `show` says that it is enough; connect again where the broker was away."""
    from trigger_daemon.broker.link import Trouble, connected

    failed = False
    while True:
        try:
            async with connected(settings.account, _name()) as link:
                await _subscribe(link, settings)
                async for _ in _seconds(link, facility):
                    failed = True  # it was reached: from now on one that is away may come back
                    if show(None):
                        return
        except Trouble as trouble:
            if trouble.lasting or not failed:
                raise
            for _ in range(5):
                if show(trouble):
                    return
                await asyncio.sleep(SHOW_S)


async def _seconds(link: Link, facility: Facility) -> AsyncIterator[None]:
    """Take what comes, and yield each second; the first time once all that is retained has come."""
    due = time.monotonic() + QUIET_S
    while True:
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                message = await anext(link.messages)
            facility.take(str(message.topic), bytes(message.payload))
        except TimeoutError:
            due = time.monotonic() + SHOW_S
            yield


def _screen(settings: MqttSettings, facility: Facility, trouble: Trouble | None) -> RenderableType:
    from rich.console import Group as Lines
    from rich.text import Text

    rows = facility.rows()
    head = f"{text.counted(len(rows), 'workstation')} at {settings.at}, {text.clock(time.time())}"
    parts: list[RenderableType] = [Text(head, style="bold"), _table(rows)]
    if trouble is not None:
        parts.insert(1, Text(text.safe(f"{trouble.why}; trying again"), style="bold red"))
    return Lines(*parts)


def _table(rows: list[dict[str, Any]]) -> RenderableType:
    from rich.console import Group as Lines
    from rich.text import Text

    shown = text.table(
        ("workstation", "name"), ("health", "word"), ("files", "right"), ("work", "right"), ("waiting", "right"),
        ("held", "right"), ("free", "right"), ("full in", "right"),
    )  # fmt: skip
    notes = []
    for one in rows:
        status = one["status"]
        runs = status["runs"] if isinstance(status.get("runs"), dict) else {}
        numbers = [
            _count(status.get("settling")) + _count(status.get("complete")),
            _count(status.get("at_work")),
            _count(runs.get("PENDING")),
            _count(runs.get("HELD")) + _count(runs.get("INACTIVE")) + _count(status.get("blocked")),
        ]
        there = status.get("state") == "online"
        free, full = _fullest(one["storage"])
        counts = (f"{number:,}" if there and number else "-" for number in numbers)
        text.row(shown, one["workstation"], _state(status), *counts, free, full)
        if note := _note(status, there=there):
            notes.append(Text(text.safe(f"! {one['workstation']}: {note}"), style="" if there else "red"))
    return Lines(shown, *notes)


def _note(status: Mapping[str, Any], *, there: bool) -> str:
    """Return what a person should know of one, in a line."""
    if not there:
        why = {"lost": "the daemon, its machine or its network has gone", "stopped": "the daemon was stopped"}
        return why.get(str(status.get("why")), "the broker refuses what it tells")
    heard = _utc(status.get("time"))
    silent = heard is None or time.time() - heard > SILENT_S
    words = [f"last heard {text.ago(heard) or 'never'}"] if silent else []
    return "; ".join([*words, *(str(status[key]) for key in ("paused", "alarm") if status.get(key))])


def _count(value: Any) -> int:
    """Return what a workstation says it is a number of, 0 for what is none."""
    return value if isinstance(value, int) and abs(value) < COUNT_MAX else 0


def _fullest(storage: Any) -> tuple[str, str]:
    """Return the least free share of the volumes, and when the first of them is full."""
    volumes = storage.get("volumes") if isinstance(storage, dict) else None
    known = [v for v in volumes if isinstance(v, dict)] if isinstance(volumes, list) else []
    shares = [_count(v.get("free_bytes")) / total for v in known if (total := _count(v.get("total_bytes")))]
    times = [v["full_in_s"] for v in known if type(v.get("full_in_s")) is int and 0 <= v["full_in_s"] < COUNT_MAX]
    return f"{100 * min(shares):.0f} %" if shares else "", text.age(min(times)) if times else ""


def _utc(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None
