"""The action `mqtt`: one message a batch, at least once, confirmed by a real broker, from a real daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker import Broker, Listener, running
from tests.message_chaos import chaos
from tests.site import Site
from trigger_daemon.actions import File, Refused, Request, mqtt
from trigger_daemon.broker import OWN
from trigger_daemon.config import load_settings, parse_rules

HOW_TO = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "mqtt.md"
TOPIC = "facility/{rule}"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker", topics=["write facility/#"]) as made:
        yield made


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    made = Listener(broker, "facility/#")
    yield made
    made.close()


@pytest.fixture
def site(tmp_path: Path, broker: Broker) -> Iterator[Site]:
    """A daemon that publishes a message for each file."""
    made = Site(tmp_path / "site", quiescence="100ms", sweep="500ms")
    made.settings["mqtt"] = broker.settings()
    publish(made)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def publish(site: Site, topic: str = TOPIC, rule: dict[str, Any] | None = None, **options: Any) -> None:
    keys = {"retry": {"initial": "200ms", "longest": "1s"}, "start": {"mqtt": {"topic": topic, **options}}}
    site.write_rules(site.rule(**keys, **(rule or {})))


def put(site: Site, *names: str) -> None:
    for name in names:
        (site.data / name).parent.mkdir(parents=True, exist_ok=True)
        (site.data / name).write_bytes(b"x" * 100)


def until_all(site: Site, runs: int, state: str = "SUCCEEDED", timeout_s: float = 30.0) -> None:
    site.until(lambda: site.states() == {state: runs}, timeout_s, f"{runs} runs are {state}")


# ------------------------------------------------------------------------- what is published


def test_a_batch_is_one_message_with_what_the_how_to_says(site: Site, listener: Listener) -> None:
    """Confirmed, counted, and each of its fields is documented; its id is among the properties, too."""
    publish(site, files=True, expiry="1h", rule={
        "match": ["{session}/{name}.tif"], "batch": {"group_by": ["session"], "files": 2},
    })  # fmt: skip
    put(site, "s1/a.tif", "s1/b.tif")
    site.start()
    until_all(site, 1)
    listener.until("first", bool)
    (told,), (message,) = listener.of("first"), listener.messages
    properties, section = message.properties, HOW_TO.read_text().partition("## Publish a message for each batch")[2]

    assert told["rule"] == "first" and told["run"] == told["batch"] == 1 and told["workstation"] == "krios1"
    assert (told["files"], told["bytes"], told["group"]) == (2, 200, {"session": "s1"})
    assert sorted(member["path"] for member in told["members"]) == ["s1/a.tif", "s1/b.tif"]
    assert [key for key in {**told, **told["members"][0]} if f'"{key}"' not in section] == []
    assert properties.CorrelationData.decode() == told["id"] == dict(properties.UserProperty)["id"]
    assert dict(properties.UserProperty)["attempt"] == "1" and message.qos == 1 and not message.retain
    assert 3_500 < properties.MessageExpiryInterval <= 3_600 and properties.ContentType == "application/json"
    shown = site.json("runs", "show", "1")
    assert shown["output"] == {"topic": "facility/first", "id": told["id"], "bytes": len(message.payload)}


def test_a_payload_of_the_rules_own_is_filled_in(site: Site, listener: Listener) -> None:
    """Captures become text or numbers; whole values stand for the batch, also deep inside; the rest stays."""
    publish(site, payload={
        "do": "index", "scan": "{scan|int}", "at": {"id": "{message_id}", "n": ["{members_count}", "{members_bytes}"]},
        "list": "{members}", "path": "/data/{scan}/raw", "literally": "{{members}}",
    }, rule={"match": ["{scan:[0-9]+}/*"]})  # fmt: skip
    put(site, "17/a.tif")
    site.start()
    told = listener.until("first", bool)

    assert (told["do"], told["scan"], told["path"], told["literally"]) == ("index", 17, "/data/17/raw", "{members}")
    assert told["at"]["n"] == [1, 100] and told["at"]["id"].startswith("1-")
    assert [member["path"] for member in told["list"]] == ["17/a.tif"]


def test_another_broker_retains_it_for_those_who_come_later(site: Site, broker: Broker) -> None:
    """Where it is, TLS, user and password come from the rule alone. That nobody has subscribed is in the output."""
    own = site.settings.pop("mqtt")
    del own["workstation"]
    publish(site, broker=own, retain=True)
    put(site, "a.tif")
    site.start()
    until_all(site, 1)
    later = Listener(broker, "facility/#")
    stands = later.until("first", bool)
    later.close()

    assert stands["run"] == 1
    assert site.json("runs", "show", "1")["output"]["subscribers"] == 0


# ------------------------------------------------------------------------- at least once


def test_a_broker_that_is_killed_and_comes_back_gets_every_message(
    site: Site, broker: Broker, listener: Listener
) -> None:
    """Runs wait for it, HELD is none, and they go on by themselves; what comes twice has one id.

    It hangs first, so that messages are on their way that it takes with it.
    """
    site.start()
    put(site, *(f"{number:02}.tif" for number in range(20)))
    until_all(site, 20)
    # It would lose what it has confirmed and not passed on.
    site.until(lambda: len(listener.of("first")) >= 20, 10, "the first were told")
    broker.hang()
    put(site, *(f"{number:02}.tif" for number in range(20, 40)))
    site.until(lambda: site.states()["ACTIVE"] >= 4, 20, "messages are on their way")
    broker.stop(signal.SIGKILL, go=False)
    site.until(lambda: "destination broker localhost" in str(site.heartbeat()), 20, "the broker is told to be down")
    states = site.states()
    broker.start()
    until_all(site, 40)
    listener.until("first", lambda told: told["run"] == max(run for (run,) in site.ask("SELECT id FROM run")))
    ids: dict[int, set[str]] = {}
    for told in listener.of("first"):
        ids.setdefault(told["run"], set()).add(told["id"])

    assert "HELD" not in states and states["SUCCEEDED"] < 40
    assert sorted(ids) == list(range(1, 41))
    assert {len(names) for names in ids.values()} == {1}


def test_an_answer_that_was_lost_means_the_same_message_once_more(site: Site, listener: Listener) -> None:
    """The daemon is killed when the broker has confirmed, before the journal knows: byte for byte the same, again."""
    put(site, "a.tif")
    site.start(wait=False, env={"TRIGGER_FAIL": "mqtt.published:kill"})
    assert site.process is not None and site.process.wait(30) == -signal.SIGKILL
    site.start()
    until_all(site, 1)
    site.until(lambda: len(listener.messages) >= 2, 10, "it came twice")
    first, second = listener.messages

    assert first.payload == second.payload
    assert first.properties.CorrelationData == second.properties.CorrelationData


def test_no_batch_is_left_untold_whatever_is_killed(tmp_path: Path) -> None:
    """The daemon, at random moments; `python -m tests.message_chaos` is the long one, with a broker that hangs."""
    report = chaos(tmp_path, files=80, batch=2, kills=1, hangs=0, seed=3, per_s=60)

    assert report.broken == () and report.batches >= 40


def test_a_repeated_attempt_tells_the_same_id(tmp_path: Path) -> None:
    """Another attempt, and another life, are the same message to whom it may concern; another batch is not."""
    def id_of(**keys: Any) -> str:
        action = mqtt.Action(context(tmp_path))
        told = action.prepare(request(**keys))["id"]
        action.close()
        return str(told)

    assert id_of(attempt=1) == id_of(attempt=2)
    assert len({id_of(), id_of(run=2), id_of(size=5), id_of(topic="x/z")}) == 4


# ------------------------------------------------------------------------- what a person mends


def test_a_topic_that_the_broker_keeps_holds_the_run(site: Site, broker: Broker) -> None:
    """With who is refused what; once it may, a retry publishes it."""
    publish(site, topic="other/{rule}")
    put(site, "a.tif")
    site.start()
    until_all(site, 1, "HELD")
    held = site.json("runs", "show", "1")
    broker.allow("readwrite trigger-daemon/#", "write other/#")
    broker.reload()
    listener = Listener(broker, "other/#")
    site.cli("runs", "retry", "1")
    until_all(site, 1)
    told = listener.until("first", bool)
    listener.close()

    assert "other/first" in held["error"] and "Not authorized" in held["error"] and "acl_file" in held["hint"]
    assert told["run"] == 1


def test_a_message_too_large_for_the_broker_holds_its_run_alone(tmp_path: Path, site: Site) -> None:
    """It is not even sent, for it would end the connection; the next message goes."""
    with running(tmp_path / "small", topics=["write facility/#"], more=["max_packet_size 2000"]) as small:
        site.settings["mqtt"] = small.settings()
        publish(site, files=True, rule={
            "match": ["{session}/*"], "batch": {"group_by": ["session"], "idle": "500ms"},
        })  # fmt: skip
        put(site, *(f"s1/{number:03}.tif" for number in range(50)))
        site.start()
        until_all(site, 1, "HELD")
        put(site, "s2/a.tif")
        site.until(lambda: site.states() == {"HELD": 1, "SUCCEEDED": 1}, 20, "the small one goes")
        held = site.json("runs", "show", "1")

    assert "the broker takes 2,000" in held["error"] and "files: true" in held["hint"]


def test_a_broker_that_lets_nobody_in_stops_the_way_and_no_run(
    site: Site, broker: Broker, listener: Listener
) -> None:
    """The destination is down, told with what to do; settings that are mended and read again let all go on."""
    right = site.settings["mqtt"]
    site.settings["mqtt"] = right | {"user": "stranger"}
    put(site, "a.tif", "b.tif")
    site.start()
    site.until(lambda: "does not let user 'stranger' in" in str(site.heartbeat()), 20, "it is told")
    states = site.states()
    site.config.write_text(json.dumps(site.settings | {"mqtt": right}))
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    until_all(site, 2)

    assert "HELD" not in states
    assert {told["run"] for told in listener.of("first")} == {1, 2}


# ------------------------------------------------------------------------- what is refused before anything is sent


def loaded(tmp_path: Path, *, settings: dict[str, Any] | None = None, match: str = "{a}/{b}/*", **options: Any) -> str:
    """Return the faults of a rule with these options, in words."""
    rule = {
        "name": "r", "watch": "/data", "match": [match], "existing": "process", "start": {"mqtt": options},
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    mqtt = {"host": "broker", "workstation": "krios1"} if settings is None else settings
    config.write_text(json.dumps({"mqtt": mqtt}))
    read = parse_rules([("r.yaml", json.dumps({"rules": [rule]}))], settings=load_settings(config, {}))
    return "; ".join(f"{fault.message} {fault.hint}" for fault in read.faults)


@pytest.mark.parametrize("topic", [
    "trigger-daemon/krios1/order", "trigger-daemon/krios2/order", "trigger-daemon/krios1/hint",
    "trigger-daemon/{a}/order", "trigger-daemon/{host}/{a}", "trigger-daemon/krios1/{a}", "trigger-daemon/krios1/o{a}r",
    *(f"trigger-daemon/krios1/{leaf}" for leaf in sorted(OWN)),
])  # fmt: skip
def test_a_topic_of_the_daemons_own_is_refused(tmp_path: Path, topic: str) -> None:
    """Also one that may become it: an order to oneself is a loop, and a status that others tell is a lie."""
    assert "the daemon's own" in loaded(tmp_path, topic=topic)


@pytest.mark.parametrize("topic", [
    "facility/{a}/{b}", "trigger-daemon/krios1/batch/{a}", "trigger-daemon/krios2/hint", "{a}/{b}/{rule}", "order",
    "trigger-daemon/krios1/x{a}",
])  # fmt: skip
def test_other_topics_are_well(tmp_path: Path, topic: str) -> None:
    """A hint to another workstation, too: it only has it look."""
    assert loaded(tmp_path, topic=topic) == ""


@pytest.mark.parametrize(("options", "words"), [
    ({"topic": "a/+/b"}, "'+' cannot stand"), ({"topic": "a/#"}, "'#' cannot stand"),
    ({"topic": "a//b"}, "empty level"), ({"topic": "/a"}, "empty level"), ({"topic": "$SYS/a"}, "begin with $"),
    ({"topic": "a/{nobody}"}, "nobody"), ({"topic": "a/{message_id}"}, "cannot stand in its topic"),
    ({"topic": "a", "payload": {"k": ["id: {message_id}"]}}, "must be the whole value"),
    ({"topic": "a", "payload": {"k": 1}, "files": True}, "{members}"),
    ({"topic": "a", "expiry": "100ms"}, "at least 1s"),
    ({"topic": "a", "broker": {"port": 1}}, "lacks the key `host`"),
    ({"topic": "a", "broker": {"host": "b", "password": "p"}}, "password_file"),
    ({"topic": "a", "broker": {"host": "b", "prot": 1}}, "`port`"),
    ({"topic": "a", "broker": {"host": "b", "port": "x"}}, "`port` cannot be 'x'"),
    ({"topic": "a", "broker": {"host": "b", "tls": {"key": "/k"}}}, "go together"),
    ({"topic": "a", "settings": {}}, "no broker is named"),
])  # fmt: skip
def test_what_can_never_work_is_told_at_load_time(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """With the option, and what to write instead."""
    assert words in loaded(tmp_path, **options)


@pytest.mark.parametrize("topic", [
    "a/x+y", "a/#1", "a//b", "a/\udcff", "trigger-daemon/krios1/order", "a/" + "x" * 1_000,
])  # fmt: skip
def test_a_topic_that_captures_have_spoilt_is_refused(tmp_path: Path, topic: str) -> None:
    """What a rule could not know: a person sees it, and nothing is sent."""
    action = mqtt.Action(context(tmp_path))
    with pytest.raises(Refused) as refused:
        action.prepare(request(topic=topic))
    action.close()

    assert refused.value.fault.kind == "permanent" and "--anew" in refused.value.fault.hint


def test_a_list_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """A message is no place for data: the limit is told, and what to leave out."""
    action = mqtt.Action(context(tmp_path))
    with pytest.raises(Refused) as refused:
        action.prepare(request(count=20_000, files=True))
    action.prepare(request(count=20_000))
    action.close()

    assert "1,000,000" in refused.value.fault.why and "files: true" in refused.value.fault.hint


def test_brokers_that_hang_end_together(tmp_path: Path) -> None:
    """However many they are: the service manager waits."""
    action = mqtt.Action(context(tmp_path))
    for number in range(4):
        os.mkfifo(tmp_path / f"{number}", 0o600)  # a password on a server that is away
        broker = {"host": "127.0.0.1", "user": "u", "password_file": str(tmp_path / f"{number}")}
        action.start(request(run=number, broker=broker), action.prepare(request(run=number)))
    time.sleep(0.1)
    began = time.monotonic()
    action.close()
    took_s = time.monotonic() - began
    for number in range(4):
        (tmp_path / f"{number}").write_text("x")

    assert took_s < 4


def test_what_has_ended_holds_no_message(tmp_path: Path) -> None:
    """A thousand runs that are held would hold a thousand megabytes."""
    action = mqtt.Action(context(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    asked = request(count=100, files=True, broker={"host": "127.0.0.1", "port": port})
    handle = action.start(asked, action.prepare(asked))
    while action.poll(asked, handle).status != "failed":
        time.sleep(0.02)
    kept = action._parcels[1][1]
    action.close()

    assert (kept.payload, kept.size > 1_000) == (b"", True)


def context(base: Path) -> mqtt.Context:
    settings = {"mqtt": {"host": "localhost", "prefix": "trigger-daemon", "workstation": "krios1"}}
    return mqtt.Context(state_dir=str(base), nudge=lambda run, attempt: None, settings=settings)


def request(
    *, run: int = 1, attempt: int = 1, topic: str = "x/y", size: int = 1, count: int = 1, **options: Any
) -> Request:
    files = tuple(File("/data", f"a/{number:06}.tif", size, 1) for number in range(count))
    defaults = {name: option.default for name, option in mqtt.Action.OPTIONS.items()}
    return Request(run, attempt, "r", {}, {}, files, {**defaults, "topic": topic, **options}, written={})
