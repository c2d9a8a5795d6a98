"""The parts of MQTT that need no broker: what is asked, how often, what is still to be told, and the settings."""

from __future__ import annotations

import json
import socket
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_journal import finished, moved
from trigger_daemon import log
from trigger_daemon.config import load_settings
from trigger_daemon.config.settings import MqttSettings, MqttVerb
from trigger_daemon.core.model import BatchClosed, Member, Troubled
from trigger_daemon.errors import ConfigError
from trigger_daemon.journal import Journal
from trigger_daemon.mqtt import asked, told
from trigger_daemon.mqtt.asked import Hint, Refused, Wish, below, hint_of, order_of
from trigger_daemon.mqtt.edge import Edge
from trigger_daemon.mqtt.spool import FILE, Spool, forget

HOW_TO = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "mqtt.md"

# ----------------------------------------------------------------------------- what is asked


def said(**payload: object) -> bytes:
    return json.dumps(payload).encode()


def test_a_hint_names_absolute_paths() -> None:
    """Also one that is no UTF-8, as its surrogate escape; a slash at the end is no other path."""
    hint = hint_of(said(paths=["/data/run17/", "/d/\udcff", "/"], reply="x"))

    assert hint == Hint(("/data/run17", "/d/\udcff", "/"), "x")


@pytest.mark.parametrize("payload", [
    b"", b"\xff", b"[]", b"5", b"null", b"[" * 60_000, b" " * 70_000, said(), said(paths=[]), said(paths="/a"),
    said(paths=["a"]), said(paths=[""]), said(paths=["/a/../b"]), said(paths=["/a/./b"]), said(paths=["/a//b"]),
    said(paths=["//a"]), said(paths=["/a\0b"]), said(paths=["/" + "x" * 5_000]), said(paths=["/\ud800"]),
    said(paths=["/a"] * 1_001), said(paths=[5]), said(path="/a"), said(paths=["/a"], reply=5),
    said(paths=["/a"], reply="\x1b[2J"), said(paths=["/a"], reply="x" * 201),
])  # fmt: skip
def test_what_is_no_hint_is_refused_with_words(payload: bytes) -> None:
    """Whatever it is: nothing else is raised, and the words are short and printable."""
    with pytest.raises(Refused) as refused:
        hint_of(payload)

    assert refused.value.why.isprintable() and 5 < len(refused.value.why) < 400


def test_an_order_has_the_arguments_of_its_verb_and_no_others() -> None:
    """What is allowed is taken, with who and why; a number stays a number."""
    args = {"rule": "a", "captures": {"run": "17"}}
    close = said(verb="batches.close", args=args, who="dozor", why="done", reply="r")

    assert order_of(close, ["batches.close"]) == Wish("batches.close", args, "mqtt: dozor", "done", "r")
    assert order_of(said(verb="runs.retry", args={"ids": [1, 2]}), asked.VERBS) == Wish(
        "runs.retry", {"ids": [1, 2]}, "mqtt"
    )


@pytest.mark.parametrize("payload", [
    said(), said(verb="pause "), said(verb=["pause"]), said(verb="rules.apply"), said(verb="files.resend"),
    said(verb="batches.close"), said(verb="batches.close", args=[]), said(verb="batches.close", args={"rule": ""}),
    said(verb="batches.close", args={"rule": "a", "captures": ["x"]}), said(verb="pause", args={"rule": "a"}),
    said(verb="batches.close", args={"rule": "a", "captures": {"x": 5}}),
    said(verb="runs.retry", args={"ids": []}), said(verb="runs.retry", args={"ids": [True]}),
    said(verb="runs.retry", args={"ids": ["1"]}), said(verb="files.go", args={"path": "/a/../b"}),
    said(verb="alarms.ack", args={"key": ""}), said(verb="pause", who=5), said(verb="pause", why="a\nb"),
    said(verb="pause", extra=1),
])  # fmt: skip
def test_what_is_no_order_is_refused_with_words(payload: bytes) -> None:
    """Also where everything is allowed."""
    with pytest.raises(Refused) as refused:
        order_of(payload, asked.VERBS)

    assert refused.value.why.isprintable() and 5 < len(refused.value.why) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries({"verb": st.sampled_from(sorted(asked.VERBS))}, optional={
    "args": st.dictionaries(st.sampled_from(["rule", "captures", "path", "ids", "key", "x"]), JSON), "who": JSON,
    "why": JSON, "reply": JSON,
}) | JSON)  # fmt: skip
def test_no_payload_gets_through_but_as_an_order_or_a_refusal(payload: object) -> None:
    """What a stranger sends is data."""
    data = json.dumps(payload).encode()
    for read in (hint_of, lambda data: order_of(data, asked.VERBS)):
        try:
            made = read(data)
        except Refused as refused:
            assert refused.why.isprintable()
        else:
            assert made.reply.isprintable()


def test_what_settings_may_allow_is_what_is_understood() -> None:
    """Each verb of the settings has its arguments, and no other verb has."""
    assert set(typing.get_args(MqttVerb)) == asked.VERBS


@pytest.mark.parametrize(("path", "root", "rest"), [
    ("/data/a", "/data", "a"), ("/data", "/data", ""), ("/database/a", "/data", None), ("/a", "/", "a"), ("/", "/", ""),
    ("/dat", "/data", None), ("/data/a/b", "/data/", "a/b"),
])  # fmt: skip
def test_a_path_lies_below_a_root_or_not(path: str, root: str, rest: str | None) -> None:
    """A name that only begins alike is another one."""
    assert below(path, root) == rest


def test_a_rate_allows_so_many_at_once_and_then_so_many_a_second() -> None:
    """Time alone gives room again, and never more than at first."""
    now = [0.0]
    rate = asked.Rate(2.0, 3, lambda: now[0])

    assert [rate.allow() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.5
    assert [rate.allow() for _ in range(2)] == [True, False]
    now[0] = 1_000.0
    assert [rate.allow() for _ in range(4)] == [True, True, True, False]


# ----------------------------------------------------------------------------- what is still to be told


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path / "state")
    opened.rule_ids(["a"])
    opened.root_id("/data")
    yield opened
    opened.close()


def drain(spool: Spool) -> tuple[list[int], int]:
    """Tell everything; return the runs, in order, and how many events were left out."""
    runs, lost = [], 0
    while True:
        moves, dropped, _ = spool.next()
        lost += dropped
        if not moves:
            return runs, lost
        runs += [move["run"] for move in moves]
        spool.told(moves[-1])


def test_what_happens_from_the_first_start_on_is_told_once(tmp_path: Path, journal: Journal) -> None:
    """Nothing of before; nothing twice; a new life goes on where the last one ended."""
    journal.append(finished(1, at=10.0))
    spool = Spool(tmp_path / "state", 100)
    assert drain(spool) == ([], 0)
    journal.append([*finished(2, at=20.0), *finished(3, at=30.0)])
    assert drain(spool) == ([2, 3], 0)
    journal.append(finished(4, at=40.0))

    assert drain(Spool(tmp_path / "state", 100)) == ([4], 0)
    assert drain(Spool(tmp_path / "state", 100)) == ([], 0)


def test_what_was_not_confirmed_is_told_again(tmp_path: Path, journal: Journal) -> None:
    """At least once: a crash between the broker's word and ours repeats the event, with the same id."""
    Spool(tmp_path / "state", 100).next()
    journal.append(finished(1, at=20.0))
    first, again = (Spool(tmp_path / "state", 100).next()[0] for _ in range(2))

    assert [told.run("w", move) for move in first] == [told.run("w", move) for move in again] != []


def test_the_spool_has_a_limit_and_says_what_is_beyond_it(tmp_path: Path, journal: Journal) -> None:
    """The oldest are left out."""
    spool = Spool(tmp_path / "state", 3)
    drain(spool)
    for number in range(1, 11):
        journal.append(finished(number, at=float(number)))

    assert drain(spool) == ([8, 9, 10], 7)


def test_numbers_that_begin_anew_hide_nothing(tmp_path: Path, journal: Journal) -> None:
    """Thinning takes old transitions, and SQLite gives their numbers again: what comes then is told."""
    spool = Spool(tmp_path / "state", 100)
    drain(spool)
    journal.append([*finished(1, at=10.0), *finished(2, at=20.0)])
    assert drain(spool) == ([1, 2], 0)
    journal.thin(500.0, 100)
    journal.append(finished(3, at=900.0))

    assert drain(spool) == ([3], 0)


@pytest.mark.parametrize("words", ["", "17", "x y\n", "\0" * 42])
def test_a_damaged_note_of_what_was_told_begins_anew(tmp_path: Path, journal: Journal, words: str) -> None:
    """From now on; the history is not told as news."""
    journal.append(finished(1, at=10.0))
    (tmp_path / "state" / FILE).write_text(words)
    spool = Spool(tmp_path / "state", 100)
    assert drain(spool) == ([], 0)
    journal.append(finished(2, at=20.0))

    assert drain(spool) == ([2], 0)


def test_forgetting_lets_what_happened_meanwhile_be_told_to_nobody(tmp_path: Path, journal: Journal) -> None:
    """It was switched off."""
    drain(Spool(tmp_path / "state", 100))
    forget(tmp_path / "state")
    journal.append(finished(1, at=20.0))

    assert drain(Spool(tmp_path / "state", 100)) == ([], 0)


def test_which_moves_of_a_run_are_told(tmp_path: Path, journal: Journal) -> None:
    """Ends and holds, what becomes of a held run, and a success that needs no proof; nothing on the way."""
    spool = Spool(tmp_path / "state", 100)
    drain(spool)
    for number in (1, 2):
        member = Member(1, "s", f"f{number}", 10, 7)
        journal.append([BatchClosed(number, 1, {}, "idle", 1.0, [member], 10, {"action": "copy"}, "/mnt")])
    journal.append([
        moved(1, "PENDING", "HELD", error="why", hint="do"), moved(1, "HELD", "PENDING"),
        moved(1, "PENDING", "STARTING"), moved(1, "STARTING", "ACTIVE"),
        moved(1, "ACTIVE", "SUCCEEDED", final=True, output={"n": 1}),
        moved(2, "PENDING", "STARTING"), moved(2, "STARTING", "ACTIVE"), moved(2, "ACTIVE", "SUCCEEDED"),
    ])  # fmt: skip
    moves, _, _ = spool.next()

    assert [(move["run"], move["from"], move["state"], move["final"]) for move in moves] == [
        (1, "PENDING", "HELD", False), (1, "HELD", "PENDING", False), (1, "ACTIVE", "SUCCEEDED", True),
    ]  # fmt: skip
    assert moves[-1]["output"] == {"n": 1}


# ----------------------------------------------------------------------------- payloads

BEAT = {
    "daemon": {"version": "1", "health": "ok", "started_time": 1.0},
    "rules": [{"runs": {"HELD": 2, "VERIFIED": 9}, "settling": 1, "complete": 2, "blocked": 3, "files_done": 4,
               "bytes_done": 5}],
    "alarms": [{"key": "k", "what": "x" * 5_000, "hint": "", "since_time": 1.0, "acked_by": None}],
    "paused": "", "working": [],
    "volumes": [{"path": "/", "total_bytes": 9, "free_bytes": 5, "fill_bytes_per_s": 1, "full_in_s": 5, "state": "ok",
                 "error": None, "trend": []}],
}  # fmt: skip
MOVE = {
    "id": 7, "run": 3, "rule": "a", "group": {}, "from": "ACTIVE", "state": "HELD", "because": "w", "time": 1.0,
    "final": False, "files": 1, "bytes": 1, "reason": "r", "attempts": 1, "error": None, "hint": None,
    "created_time": 1.0, "output": None,
}  # fmt: skip


def payloads() -> dict[str, told.Payload]:
    alarms = told.alarms_of(BEAT)
    return {
        "status": told.online("w", "h", "s", BEAT, 0.0) | {"time": "", "dropped": 0},
        "offline": told.offline("w", "h", "s", "lost", 1.0),
        "storage": told.storage("w", BEAT, 1.0),
        "volume": told.storage("w", BEAT, 1.0)["volumes"][0],
        "alarms": told.standing("w", alarms, 1.0),
        "alarm": told.changed("w", {}, alarms, 1.0)[0],
        "run": told.run("w", MOVE),
        "lost": told.lost("w", 5, 7, 1.0),
    }


def test_every_field_that_is_told_is_documented() -> None:
    """Whoever writes a consumer finds each field in the how-to."""
    text = HOW_TO.read_text()

    assert {field for payload in payloads().values() for field in payload if f'"{field}"' not in text} == set()


def test_a_payload_stays_small() -> None:
    """A message is no place for data: long words are cut, what a run returned is left out where it is large."""
    long = {**MOVE, "output": "x" * 100_000, "because": "y" * 100_000, "error": "z" * 100_000}

    assert len(told.encoded(told.run("w", long))) < 5_000
    assert len(told.encoded(payloads()["alarm"])) < 3_000


@pytest.mark.parametrize("bytes_max", [1_000, 4_000, 20_000])
def test_what_is_too_long_for_the_broker_is_told_shorter(bytes_max: int) -> None:
    """First a run goes without its output, then words are cut, then lists; what fits is told as it is."""
    run = told.run("w", {**MOVE, "output": "x" * 50_000, "because": "y" * 900, "error": "z" * 900})
    alarms = told.standing("w", {str(n): payloads()["alarm"] | {"key": str(n)} for n in range(100)}, 1.0)
    storage = payloads()["storage"] | {"volumes": [payloads()["volume"]] * 100}
    fitted = {name: told.fitted(payload, bytes_max) for name, payload in
              (("run", run), ("alarms", alarms), ("storage", storage))}  # fmt: skip
    said = json.loads(fitted["run"])

    assert all(len(data) <= bytes_max for data in fitted.values())
    assert said["output"] == {"left_out": "`trigger-daemon runs show 3` shows it: it is too long to be told"}
    assert (len(said["error"]) == 900) is (bytes_max > 1_000)
    assert (said["run"], said["state"], said["id"]) == (3, "HELD", "3-7")
    assert json.loads(fitted["alarms"])["alarms"][0]["key"] == "0"
    assert told.fitted(run, 1 << 20) == told.encoded(run)


def test_a_daemon_that_says_nothing_is_an_alarm() -> None:
    """The thread that tells lives on when the loop hangs."""
    status = told.online("w", "h", "s", BEAT, 16.0)

    assert (status["health"], status["alarms"]) == ("alarm", 2) and "16" not in status["alarm"]


# ----------------------------------------------------------------------------- settings


@pytest.fixture
def fault_of(tmp_path: Path) -> Callable[[str], tuple[int, int, str, str]]:
    def load(text: str) -> tuple[int, int, str, str]:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_settings(tmp_path / "config.yaml", {})
        (fault,) = refused.value.faults
        return fault.line, fault.column, fault.message, fault.hint

    return load


@pytest.mark.parametrize(("written", "column", "message", "hint"), [
    ("{port: 5}", 7, "lacks the key `host`", "name the broker"),
    ("{host: b, password: x}", 17, "a secret does not belong", "password_file"),
    ("{host: 'mqtt://b'}", 14, "a name or an address", "`port`"),
    ("{host: 'b:1883'}", 14, "a name or an address", "`port`"),
    ("{host: b, orders: [runs.abandon]}", 26, "must be one of", "runs.cancel"),
    ("{host: b, spool: 0}", 24, "`spool`", "0"),
    ("{host: b, prefix: 'a/+'}", 25, "cannot begin a topic", "without +"),
    ("{host: b, workstation: 'a/b'}", 30, "one level of a topic", "without /"),
    ("{host: b, keepalive: 1s}", 28, "`keepalive`", "1"),
    ("{host: b, tls: {certificate: /a}}", 22, "go together", "both"),
    ("{host: b, tls: {cert: /a}}", 23, "unknown setting `cert`", "certificate"),
    ("{host: b, password_file: /a}", 7, "without `user`", "user"),
])  # fmt: skip
def test_a_fault_in_the_settings_names_its_place(
    fault_of: Callable[[str], tuple[int, int, str, str]], written: str, column: int, message: str, hint: str
) -> None:
    """Line and column, what is wrong, and what to write."""
    line, at, words, advice = fault_of(f"mqtt: {written}\n")

    assert (line, at) == (1, column) and message in words and hint in advice


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    """Neither by a representation of the settings nor by a fault beside it."""
    (tmp_path / "config.yaml").write_text("mqtt: {host: b, user: u}\n")
    settings = load_settings(tmp_path / "config.yaml", {"TRIGGER_DAEMON_MQTT__PASSWORD": "s3cret"})

    assert settings.mqtt.password == "s3cret" and "s3cret" not in repr(settings)


# ----------------------------------------------------------------------------- a broker that is not there


class Fast:
    """A clock that goes so many times as fast."""

    def __init__(self, times: int) -> None:
        self._times = times

    def monotonic(self) -> float:
        return time.monotonic() * self._times

    utc = staticmethod(time.time)


@pytest.mark.parametrize(("listens", "after_s", "times", "words"), [
    (True, 45, 12, "takes the connection and does not answer: it hangs, or this is its TLS port"),
    (False, 600, 120, "nothing listens on this port (connection refused)"),
])  # fmt: skip
def test_what_looks_like_another_port_is_an_alarm_soon(
    tmp_path: Path, wait_until: Callable[..., object], listens: bool, after_s: float, times: int, words: str
) -> None:
    """One that just is not there may be restarting: nobody is called for that for ten minutes."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    posted: list[Troubled] = []
    if not listens:
        listener.close()
    clock, settings = Fast(times), MqttSettings(host="127.0.0.1", port=port)
    began = clock.monotonic()
    edge = Edge(settings, tmp_path, host="h", post=posted.append, hear=list, clock=clock, logger=log.get())
    try:
        edge.show({"alarms": []})
        wait_until(lambda: posted)
        assert words in posted[0].what and "Errno" not in posted[0].what
        assert after_s <= posted[0].at - began < after_s + 400
    finally:
        edge.stop()
        listener.close()
