"""MQTT with a real broker and a real daemon: what is told, what when either of them dies, and what may be asked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker import Broker, Listener, authority, running, signed
from tests.site import Site


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker") as made:
        yield made


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    made = Listener(broker)
    yield made
    made.close()


@pytest.fixture
def site(tmp_path: Path, broker: Broker) -> Iterator[Site]:
    """A daemon that tells the broker what it does; each file is a batch."""
    made = Site(tmp_path / "site", quiescence="100ms", sweep="500ms")
    made.settings["mqtt"] = broker.settings()
    made.write_rules(made.rule())
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def put(path: Path, data: bytes = b"x" * 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def online(payload: dict[str, Any]) -> bool:
    return payload["state"] == "online"


def alarm(site: Site) -> dict[str, Any] | None:
    """Return the alarm about MQTT, as an operator is shown it."""
    return next((one for one in site.json("status", check=False)["alarms"] if one["key"] == "mqtt"), None)


def ended(listener: Listener) -> list[int]:
    """Return the runs whose end was told, in order."""
    return [event["run"] for event in listener.of("run") if event.get("final")]


# ----------------------------------------------------------------------------- what is told


def test_a_run_is_told_with_what_became_of_it(site: Site, listener: Listener) -> None:
    """Each end is an event, with the fields that are documented; the status counts it."""
    site.start()
    put(site.data / "a.tif")
    event = listener.until("run", lambda event: event["final"])

    assert (event["workstation"], event["rule"], event["state"], event["files"]) == ("krios1", "first", "VERIFIED", 1)
    assert event["id"].startswith(f"{event['run']}-") and event["time"].endswith("Z")
    told = listener.until("status", lambda told: online(told) and told["files_done"] == 1)
    assert (told["health"], told["rules"], told["bytes_done"]) == ("ok", 1, 100)
    assert listener.until("storage", lambda told: told["volumes"])["volumes"][0]["total_bytes"] > 0


def test_a_hold_and_what_becomes_of_it_is_told(site: Site, listener: Listener) -> None:
    """HELD is told with error and hint, and so is that a person has gone on with it."""
    put(site.out / "a.tif", b"foreign")
    put(site.data / "a.tif")
    site.start()
    held = listener.until("run", lambda event: event["state"] == "HELD")
    (site.out / "a.tif").unlink()
    site.cli("runs", "retry", str(held["run"]))
    listener.until("run", lambda event: event["final"])

    assert not held["final"] and held["error"] and held["hint"]
    assert [(event["from"], event["state"]) for event in listener.of("run")][1:] == [
        ("HELD", "PENDING"), ("SUCCEEDED", "VERIFIED"),
    ]  # fmt: skip


def test_alarms_are_told_as_they_come_and_go(site: Site, listener: Listener) -> None:
    """Raised and cleared are events; what stands is a retained list."""
    site.start()
    site.cli("pause", "--why", "maintenance")
    raised = listener.until("alarm", lambda event: event["event"] == "raised")
    listener.until("alarms", lambda told: bool(told["alarms"]))
    site.cli("resume")
    listener.until("alarm", lambda event: event["event"] == "cleared")
    listener.until("alarms", lambda told: not told["alarms"])

    assert raised["key"] == "paused" and "maintenance" in raised["what"]


def test_the_status_says_offline_once_the_daemon_is_stopped(site: Site, broker: Broker, listener: Listener) -> None:
    """A stop is told by the daemon itself, and stays there for whoever asks later."""
    site.start()
    listener.until("status", online)
    assert site.stop() == 0
    listener.until("status", lambda told: told.get("why") == "stopped")
    later = Listener(broker)
    stands = later.until("status", lambda told: True)
    later.close()

    assert (stands["state"], stands["why"]) == ("offline", "stopped")


def test_a_killed_daemon_is_offline_and_back_when_it_is(site: Site, listener: Listener) -> None:
    """The last will after SIGKILL, and the birth after the next start."""
    site.start()
    listener.until("status", online)
    site.kill()
    listener.until("status", lambda told: told.get("why") == "lost")
    listener.forget()
    site.start()

    assert listener.until("status", online)["workstation"] == "krios1"


def test_nothing_is_told_without_a_broker_in_the_settings(site: Site, listener: Listener) -> None:
    """It is off by default, and `status` says so; what happens meanwhile is not told later."""
    told = site.settings.pop("mqtt")
    site.start()
    put(site.data / "a.tif")
    site.until_verified(1)
    assert site.heartbeat()["mqtt"] is None  # type: ignore[index]
    site.stop()
    site.settings["mqtt"] = told
    site.start()
    put(site.data / "b.tif")
    listener.until("run", lambda event: event["final"])

    assert ended(listener) == [2]


def test_settings_that_change_are_taken_up_by_a_reload(site: Site, listener: Listener) -> None:
    """The old name says offline before the new one says online."""
    site.start()
    listener.until("status", online)
    site.settings["mqtt"]["workstation"] = "krios2"
    site.config.write_text(json.dumps(site.settings))
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    listener.until("status", lambda told: told["workstation"] == "krios2" and online(told))

    assert listener.until("status", lambda told: told["state"] == "offline")["workstation"] == "krios1"


# ----------------------------------------------------------------------------- a broker that is away


@pytest.mark.parametrize("away", ["hung", "killed", "hung, then killed"])
def test_no_event_is_lost_while_the_broker_is_away(
    site: Site, broker: Broker, listener: Listener, away: str
) -> None:
    """Runs go on as if nothing were wrong; each end is told at least once, in order, with an id that shows repeats.

    A broker that is killed while it hangs takes with it what was sent and not confirmed.
    """
    files = 150
    site.start()
    listener.until("status", online)
    put(site.data / "first.tif")
    listener.until("run", lambda event: event["final"])
    if away == "killed":
        broker.stop(signal.SIGKILL)
    else:
        broker.hang()
    for number in range(files):
        put(site.data / f"{number:03}.tif")
    site.until_verified(files + 1)  # nobody waits for the broker
    if away == "hung":
        broker.go()
    else:
        broker.stop(signal.SIGKILL, go=False)
        broker.start()
    put(site.data / "last.tif")
    site.until_verified(files + 2)
    listener.until("run", lambda event: event["run"] == files + 2 and event["final"], 60)

    told = {event["id"]: event["run"] for event in listener.of("run") if event["final"]}  # once each, in order
    order = [run for (run,) in site.ask("SELECT run FROM transition WHERE to_state = 'VERIFIED' ORDER BY id")]
    assert list(told.values()) == order and len(order) == files + 2
    assert "dropped" not in site.tail()


def test_a_daemon_killed_while_the_broker_is_away_tells_all_of_it_later(
    site: Site, broker: Broker, listener: Listener
) -> None:
    """The journal is the spool: neither death takes an event with it."""
    site.start()
    listener.until("status", online)
    broker.stop(signal.SIGKILL)
    for number in range(20):
        put(site.data / f"{number:03}.tif")
    site.until_verified(20)
    site.kill()
    broker.start()
    site.start()
    listener.until("run", lambda event: event["run"] == 20)

    assert sorted(set(ended(listener))) == list(range(1, 21))


def test_beyond_the_spool_the_oldest_are_left_out_and_counted(site: Site, broker: Broker, listener: Listener) -> None:
    """What is not told is told as a number, where it is missing, and in the status."""
    site.settings["mqtt"]["spool"] = 5
    site.start()
    listener.until("status", online)
    broker.stop()
    for number in range(20):
        put(site.data / f"{number:03}.tif")
    site.until_verified(20)
    broker.start()
    lost = listener.until("run", lambda event: "lost" in event, 60)
    listener.until("status", lambda told: told.get("dropped") == 15)

    assert lost["lost"] == 15 and len(ended(listener)) == 5
    site.until(lambda: site.heartbeat()["mqtt"]["dropped"] == 15, 10, "it is counted")  # type: ignore[index]


def test_after_a_hung_broker_the_status_is_online_again(site: Site, broker: Broker, listener: Listener) -> None:
    """The will of a connection that was lost may come after all; the birth of the next one comes later."""
    site.settings["mqtt"]["keepalive"] = "5s"
    site.start()
    listener.until("status", online)
    broker.hang()
    site.until(lambda: site.heartbeat()["mqtt"]["state"] == "away", 30, "it is noticed")  # type: ignore[index]
    listener.forget()
    broker.go()
    site.until(lambda: site.heartbeat()["mqtt"]["state"] == "connected", 60, "it is back")  # type: ignore[index]
    later = Listener(broker)
    stands = later.until("status", lambda told: True)
    later.close()

    assert online(stands)


# ----------------------------------------------------------------------------- refusals


def wrong_password(broker: Broker, settings: dict[str, Any]) -> None:
    Path(settings["password_file"]).write_text("guessed")


def no_password(broker: Broker, settings: dict[str, Any]) -> None:
    del settings["password_file"], settings["user"]


def open_password(broker: Broker, settings: dict[str, Any]) -> None:
    Path(settings["password_file"]).chmod(0o644)


def other_authority(broker: Broker, settings: dict[str, Any]) -> None:
    settings["tls"] = {"ca": str(authority(broker.base, "other"))}


def no_authority(broker: Broker, settings: dict[str, Any]) -> None:
    settings["tls"] = {"ca": "/nowhere/ca.crt"}


def plain_port(broker: Broker, settings: dict[str, Any]) -> None:
    settings["port"] = broker.port


def may_not_write(broker: Broker, settings: dict[str, Any]) -> None:
    broker.allow("read trigger-daemon/#")
    broker.reload()


def may_not_read(broker: Broker, settings: dict[str, Any]) -> None:
    broker.allow("write trigger-daemon/#")
    broker.reload()


@pytest.mark.parametrize(("wrong", "what", "hint"), [
    (wrong_password, "does not let user 'daemon' in", "password"),
    (no_password, "does not let a client without a user in", "user"),
    (open_password, "can be read by others", "password_file"),
    (other_authority, "is not trusted", "tls: ca"),
    (no_authority, "/nowhere/ca.crt cannot be used", "tls"),
    (may_not_write, "refuses what is told on trigger-daemon/krios1/status", "acl_file"),
    (may_not_read, "does not come back", "acl_file"),
])  # fmt: skip
def test_what_only_a_person_mends_is_an_alarm(
    site: Site, broker: Broker, wrong: Callable[[Broker, dict[str, Any]], None], what: str, hint: str
) -> None:
    """`status` names what is wrong and what to do; `mqtt check` finds the same, and the work goes on."""
    wrong(broker, site.settings["mqtt"])
    site.start()
    site.until(lambda: alarm(site) is not None, 30, "there is an alarm")
    told = alarm(site)
    put(site.data / "a.tif")
    site.until_verified(1)

    assert told is not None and what in told["what"] and hint in told["hint"]
    check = site.cli("mqtt", "check", check=False)
    assert check.returncode == 4 and what.partition(" on ")[0] in check.stdout


@pytest.mark.parametrize("tls", [True, False])
def test_the_wrong_port_is_told(site: Site, broker: Broker, tls: bool) -> None:
    """The broker just says nothing, or hangs up; the words say what it may be, and what to do."""
    if tls:
        plain_port(broker, site.settings["mqtt"])
    else:
        del site.settings["mqtt"]["tls"]
    site.start()
    site.until(lambda: site.heartbeat()["mqtt"]["state"] == "away", 30, "it is noticed")  # type: ignore[index]

    told = site.json("status", check=False)["mqtt"]
    assert "TLS" in told["hint"] and "TLS" in told["why"]
    assert told["hint"] in " ".join(site.cli("status", check=False).stdout.split())


def test_what_a_person_has_mended_is_taken_up_by_a_reload(site: Site, broker: Broker, listener: Listener) -> None:
    """Nobody has to wait for the next attempt; the alarm goes by itself."""
    wrong_password(broker, site.settings["mqtt"])
    site.start()
    site.until(lambda: alarm(site) is not None, 30, "there is an alarm")
    broker.settings()
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    listener.until("status", online)

    site.until(lambda: alarm(site) is None, 10, "the alarm is gone")


def test_events_that_the_broker_refuses_are_kept(site: Site, broker: Broker, listener: Listener) -> None:
    """An access list that lets the status through and no runs: an alarm, and they are told once it is mended."""
    broker.allow("readwrite trigger-daemon/krios1/status", "read trigger-daemon/krios1/#")
    broker.reload()
    site.start()
    put(site.data / "a.tif")
    site.until(lambda: alarm(site) is not None, 30, "there is an alarm")
    broker.allow("readwrite trigger-daemon/krios1/#")
    broker.reload()
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    listener.until("run", lambda event: event["final"], 60)

    assert set(ended(listener)) == {1}


def test_a_refused_topic_is_named_whether_or_not_the_broker_ends_the_connection(site: Site, broker: Broker) -> None:
    """Some brokers end the connection, and some without a word before: it is told as lasting, and not as a flap."""
    broker.allow("readwrite trigger-daemon/krios1/status", "write trigger-daemon/krios1/alarms")
    broker.reload()
    site.start()
    site.until(lambda: alarm(site) is not None, 40, "there is an alarm")
    told = alarm(site)

    assert told is not None and "told on trigger-daemon/krios1/storage" in told["what"] and "acl_file" in told["hint"]


def test_an_event_that_is_too_long_for_the_broker_keeps_none_behind_it(
    site: Site, broker: Broker, listener: Listener
) -> None:
    """The broker would end the connection for it, again and again; it is told without what the run returned."""
    listener.close()
    broker.stop()
    with (broker.base / "mosquitto.conf").open("a") as conf:
        conf.write("max_packet_size 2000\n")
    broker.start()
    hears = Listener(broker)
    say = ["/bin/sh", "-c", "[ ! -e \"$0\" ] || head -c 1900 /dev/zero | tr '\\0' x", str(site.data / "a")]
    site.write_rules(site.rule(start={"command": {"run": say}}))
    site.start()
    put(site.data / "a")
    hears.until("run", lambda event: event["final"])
    (site.data / "a").unlink()
    put(site.data / "b")
    last = hears.until("run", lambda event: event["run"] == 2 and event["final"])
    first = hears.of("run")[0]
    hears.close()

    assert "left_out" in first["output"] and "left_out" not in str(last["output"])
    assert "mqtt.away" not in site.tail()


def test_two_daemons_of_one_name_are_told_so(site: Site, broker: Broker, tmp_path: Path) -> None:
    """They would speak over each other."""
    other = Site(tmp_path / "other", quiescence="100ms")
    other.settings["mqtt"] = broker.settings()
    other.write_rules(other.rule())
    site.start()
    site.until(lambda: site.heartbeat()["mqtt"]["state"] == "connected", 30, "connected")  # type: ignore[index]
    other.start()
    try:
        site.until(lambda: alarm(site) is not None, 30, "there is an alarm")
    finally:
        other.kill()
    told = alarm(site)

    assert told is not None and "another daemon" in told["what"] and "workstation" in told["hint"]


def test_a_certificate_of_ours_is_shown_where_the_broker_wants_one(tmp_path: Path) -> None:
    """Without it the alarm says so; with it all is well."""
    with running(tmp_path / "broker", asks_certificate=True) as broker:
        here = Site(tmp_path / "site")
        here.settings["mqtt"] = broker.settings()
        here.write_rules(here.rule())
        without = here.config.write_text(json.dumps(here.settings)) and here.cli("mqtt", "check", check=False)
        certificate, key = signed(broker.base, "client", "DNS:krios1")
        here.settings["mqtt"]["tls"] |= {"certificate": str(certificate), "key": str(key)}
        with_it = here.config.write_text(json.dumps(here.settings)) and here.cli("mqtt", "check")

    assert without.returncode == 4 and "wants a certificate of ours" in without.stdout
    assert with_it.returncode == 0


def test_a_hung_broker_does_not_keep_the_daemon_from_ending(site: Site, broker: Broker) -> None:
    """A service manager waits only so long; the last will tells the rest."""
    site.start()
    site.until(lambda: site.heartbeat()["mqtt"]["state"] == "connected", 30, "connected")  # type: ignore[index]
    broker.hang()

    assert site.stop() == 0


# ----------------------------------------------------------------------------- what may be asked


def asking(site: Site, listener: Listener, **keys: Any) -> Callable[..., dict[str, Any]]:
    """Start with hints or orders on; return what publishes one and waits for its reply."""
    site.settings["mqtt"] |= keys
    site.start()
    listener.until("status", online)
    count = iter(range(1_000))

    def ask(leaf: str, **payload: Any) -> dict[str, Any]:
        name = f"q{next(count)}"
        listener.say(f"trigger-daemon/krios1/{leaf}", {**payload, "reply": name})
        return listener.until("reply", lambda told: told["reply"] == name)

    return ask


def ordered(site: Site) -> list[tuple[Any, ...]]:
    return site.ask("SELECT verb, who, why FROM ordered ORDER BY id")


def test_a_hint_has_a_path_looked_at_and_makes_nothing_complete(site: Site, listener: Listener) -> None:
    """Without events and sweeps a file is found by the hint alone, and is quiet for its whole period then."""
    site.settings |= {"events": "none", "sweep": {"every": "1h", "full": "1h"}}
    site.write_rules(site.rule(match=["run*/**"], complete={"quiescence": "1s"}))
    ask = asking(site, listener, hints=True)
    site.cli("status", check=False)
    site.until(lambda: site.heartbeat()["roots"][0]["health"] == "ok", 20, "the first sweep is over")  # type: ignore[index]
    put(site.data / "run17" / "a.cbf")
    put(site.data / "run17" / "deeper" / "b.cbf")
    put(site.data / "run18" / "c.cbf")
    hinted = (site.data / "run17" / "a.cbf").stat().st_mtime
    told = ask("hint", paths=[str(site.data / "run17")])
    site.until_verified(2)

    assert told["ok"]
    assert site.ask("SELECT count(*), min(closed_time) > ? FROM batch", hinted + 1) == [(2, 1)]
    assert ask("hint", paths=[str(site.data / "run18" / "c.cbf")])["ok"]
    site.until_verified(3)


def test_a_hint_leads_nowhere_else(site: Site, listener: Listener) -> None:
    """A path that lies, or seems to lie, elsewhere is refused, with words."""
    ask = asking(site, listener, hints=True)
    for path in ("/etc/passwd", f"{site.data}/../out", f"{site.data}x/a", "a.tif", f"{site.data}//a", 5, ""):
        told = ask("hint", paths=[path])

        assert not told["ok"] and told["error"], path


def test_an_order_is_what_a_person_would_order(site: Site, listener: Listener) -> None:
    """It closes a batch, and stands in the journal with who and why; what is not allowed is not done."""
    site.write_rules(site.rule(match=["{chip}/{name}.cbf"], batch={"group_by": ["chip"], "files": 50}))
    ask = asking(site, listener, orders=["batches.close"])
    for name in ("c1/a.cbf", "c1/b.cbf", "c2/c.cbf"):
        put(site.data / name)
    site.until(lambda: site.heartbeat()["rules"][0]["complete"] == 3, 20, "they are complete")  # type: ignore[index]
    close = {"rule": "first", "captures": {"chip": "c1"}}
    told = ask("order", verb="batches.close", args=close, who="dozor", why="scan 17 is done")
    refused = ask("order", verb="pause")
    wrong = ask("order", verb="batches.close", args={"rule": "none"})
    event = listener.until("run", lambda event: event["final"])

    assert told["ok"] and told["closed"] == 1
    assert (event["group"], event["files"], event["reason"]) == ({"chip": "c1"}, 2, "closed by mqtt: dozor")
    assert not refused["ok"] and "batches.close" in refused["error"]
    assert not wrong["ok"] and "rules list" in wrong["hint"]
    assert ordered(site) == [("batches.close", "mqtt: dozor", "scan 17 is done"), ("batches.close", "mqtt", "")]
    assert site.heartbeat()["paused"] == ""  # type: ignore[index]


def test_nothing_is_heard_unless_the_settings_say_so(site: Site, listener: Listener) -> None:
    """Orders and hints are off by default."""
    site.start()
    listener.until("status", online)
    listener.say("trigger-daemon/krios1/order", {"verb": "pause", "reply": "x"})
    listener.say("trigger-daemon/krios1/hint", {"paths": [str(site.data)], "reply": "y"})
    put(site.data / "a.tif")
    listener.until("run", lambda event: event["final"])

    assert ordered(site) == [] and listener.of("reply") == [] and "mqtt.not_followed" not in site.tail()


def test_a_retained_order_is_not_followed(site: Site, listener: Listener) -> None:
    """It would be followed again at each connection: neither one that waits there, nor one that comes so."""
    order = {"verb": "pause", "reply": "old"}
    listener.say("trigger-daemon/krios1/order", order, retain=True)
    ask = asking(site, listener, orders=["pause", "resume"])
    site.until(lambda: "retain flag" in site.tail(), 20, "it is told in the log")
    listener.say("trigger-daemon/krios1/order", order, retain=True)

    assert ask("order", verb="resume")["ok"]
    assert [verb for verb, _, _ in ordered(site)] == ["resume"]


def test_too_many_orders_are_refused(site: Site, listener: Listener) -> None:
    """A program that has gone mad does not fill the journal."""
    asking(site, listener, orders=["resume"])
    for _ in range(60):
        listener.say("trigger-daemon/krios1/order", {"verb": "resume"})
    site.until(lambda: "too many orders" in site.tail(), 20, "it is told in the log")

    assert len(ordered(site)) < 40


def test_the_access_list_of_the_how_to_is_enough_and_no_more(site: Site, broker: Broker) -> None:
    """Workstation, dashboard and acquisition can do what they are there for; a dashboard orders nothing."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "how-to" / "mqtt.md").read_text()
    broker.write_list(text.partition("# acl_file\n")[2].partition("```")[0])
    for name in ("krios1", "dashboard", "daq"):
        broker.user(name, "pw")
    broker.reload()
    Path(site.settings["mqtt"]["password_file"]).write_text("pw")
    site.settings["mqtt"] |= {"user": "krios1", "orders": ["pause", "resume"], "hints": True}
    dashboard, daq = (Listener(broker, user=name, password="pw") for name in ("dashboard", "daq"))
    site.start()
    dashboard.until("status", online)
    dashboard.say("trigger-daemon/krios1/order", {"verb": "pause"})
    daq.say("trigger-daemon/krios1/order", {"verb": "resume", "reply": "x"})
    put(site.data / "a.tif")
    dashboard.until("run", lambda event: event["final"])

    assert daq.until("reply", lambda told: told["reply"] == "x")["ok"] and daq.of("run") == daq.of("status") == []
    assert [verb for verb, _, _ in ordered(site)] == ["resume"]
    assert site.cli("mqtt", "check").returncode == 0
    dashboard.close()
    daq.close()


# ----------------------------------------------------------------------------- the facility at a glance


def test_all_workstations_are_shown_at_a_glance(site: Site, broker: Broker, listener: Listener) -> None:
    """Whoever needs somebody comes first; what is no status of ours does no harm."""
    site.config.write_text(json.dumps(site.settings))
    nobody = site.cli("mqtt", "watch", "--once", check=False)
    assert nobody.returncode == 1 and "nobody has told anything below trigger-daemon" in nobody.stderr
    site.start()
    listener.until("status", online)
    listener.until("storage", lambda told: True)
    gone = {"state": "offline", "workstation": "glacios", "why": "lost", "connected_time": "2026-11-25T02:08:00.123Z"}
    listener.say("trigger-daemon/glacios/status", gone, retain=True)
    listener.say("trigger-daemon/aquilos/status", b"\xff{", retain=True)
    listener.say("trigger-daemon/talos/status", {"state": ["online"], "runs": 5, "time": {}}, retain=True)
    huge = 10**400  # no number of ours, and no float
    odd = {"free_bytes": huge, "total_bytes": 7, "full_in_s": huge}
    listener.say("trigger-daemon/talos/storage", {"volumes": [5, {"free_bytes": "x"}, odd]}, retain=True)
    listener.say("trigger-daemon/deep/status", b"[" * 50_000, retain=True)
    done = site.cli("mqtt", "watch", "--once", "-F", "json")
    told = json.loads(done.stdout)["workstations"]
    shown = site.cli("mqtt", "watch", "--once")

    assert [one["workstation"] for one in told] == ["glacios", "talos", "krios1"]
    assert told[2]["status"]["health"] == "ok" and told[2]["storage"]["volumes"]
    assert (done.returncode, shown.returncode) == (4, 4)
    assert shown.stdout.index("glacios") < shown.stdout.index("krios1") and "offline" in shown.stdout


def test_a_change_is_a_line_for_programs(site: Site, listener: Listener) -> None:
    """`mqtt watch -F json` goes on by itself."""
    site.start()
    listener.until("status", online)
    watching = subprocess.Popen(
        [sys.executable, "-P", "-m", "trigger_daemon", "mqtt", "watch", "-F", "json", "--config", str(site.config)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    site.kill()
    states = (json.loads(line)["workstations"][0]["status"]["state"] for line in watching.stdout)
    last = next(state for state in states if state == "offline")
    watching.send_signal(signal.SIGINT)

    assert first["workstations"][0]["status"]["state"] == "online" and last == "offline"
    assert watching.wait(10) == 130


def test_check_finds_what_is_right(site: Site, listener: Listener) -> None:
    """A daemon that runs is not thrown out by it."""
    ask = asking(site, listener, hints=True, orders=["pause"])
    told = site.json("mqtt", "check")

    assert told["ok"] and len(told["checks"]) == 4
    assert ask("hint", paths=[str(site.data)])["ok"] and "mqtt.away" not in site.tail()
