"""Alarms reach people by a command and by mail: once, in words, and never at the cost of the work."""

from __future__ import annotations

import email
import email.policy
import json
import os
import re
import stat
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.site import Site
from trigger_daemon import config, programs, teller
from trigger_daemon.clock import SystemClock
from trigger_daemon.config import load_settings
from trigger_daemon.core.telling import CALM_S, KNOWN_MAX, Pace, Telling, Ways
from trigger_daemon.errors import ConfigError
from trigger_daemon.points import ABSENT

PACE = Pace(wait_s=60, every_s=300, repeat_s=43_200)
NIGHT = 1_700_000_000.0  # Unix seconds


def alarm(key: str = "destination:/mnt/a", since: float = NIGHT, acked: str | None = None, what: str = "") -> dict:
    return {"key": key, "what": what or f"{key} is down", "hint": "mount it", "since_time": since, "acked_by": acked}


class Night:
    """People and alarms, second by second: what would have been sent, as (at, [(kind, key)])."""

    def __init__(self, pace: Pace = PACE) -> None:
        self.telling = Telling(pace)
        self.sent: list[tuple[float, list[tuple[str, str]]]] = []
        self.news: list = []
        self.at = 0.0

    def goes_on(self, seconds: float, *alarms: dict, fails: bool = False, step: float = 2.0) -> None:
        end = self.at + seconds
        while self.at < end:
            self.telling.see(alarms, self.at)
            if news := self.telling.due(self.at):
                if fails:
                    self.telling.failed(self.at)
                else:
                    self.telling.told(news, self.at)
                self.news = news
                self.sent.append((self.at, [(item.kind, item.key) for item in news]))
            self.at += step


# ------------------------------------------------------------------------- damping


def test_what_comes_within_the_wait_is_one_message():
    """A dead destination raises several alarms; people get one message with all."""
    night = Night()
    night.goes_on(20, alarm("a"))
    night.goes_on(20, alarm("a"), alarm("b", NIGHT + 20))
    night.goes_on(600, alarm("a"), alarm("b", NIGHT + 20), alarm("c", NIGHT + 40))

    assert night.sent == [(60, [("new", "a"), ("new", "b"), ("new", "c")])]


def test_what_is_over_before_it_was_told_is_not_told():
    """A hiccup shorter than `wait` wakes nobody, neither by its beginning nor by its end."""
    night = Night()
    night.goes_on(58, alarm("a"))
    night.goes_on(3_000)

    assert night.sent == []


def test_an_end_shorter_than_the_wait_is_none():
    """What was told, and is over for a moment only, is told neither as over nor as new."""
    night = Night()
    night.goes_on(400, alarm("a"))
    night.goes_on(30)
    night.goes_on(1_000, alarm("a", NIGHT + 430))

    assert night.sent == [(60, [("new", "a")])]


def test_the_end_is_told_once_and_messages_keep_their_distance():
    """At most one message each `every`; the end of what was told is told, once."""
    night = Night()
    night.goes_on(80, alarm("a"))
    night.goes_on(100, alarm("b"))
    night.goes_on(3_000)

    assert night.sent == [(60, [("new", "a")]), (360, [("over", "a")])]


def test_new_alarms_wait_for_the_next_message():
    """However many alarms are raised one after the other, messages do not come faster."""
    night = Night()
    for number in range(100):
        night.goes_on(30, *(alarm(f"k{n}", NIGHT + n) for n in range(number + 1)))
    times = [at for at, _ in night.sent]

    assert len({key for _, items in night.sent for _, key in items}) > 90
    assert all(later - earlier >= 300 for earlier, later in pairwise(times)) and len(times) == 10


def test_an_acknowledged_alarm_is_neither_told_nor_repeated_but_its_end_is():
    """Whoever looks after it is left alone until it is over."""
    seen, told = Night(), Night()
    seen.goes_on(100_000, alarm(acked="ada"), step=60)
    told.goes_on(90, alarm())
    told.goes_on(100_000, alarm(acked="ada"), step=60)
    told.goes_on(600)

    assert seen.sent == []
    assert [items[0][0] for _, items in told.sent] == ["new", "over"]


def test_a_standing_alarm_that_nobody_acknowledged_is_repeated_at_its_rate():
    """Every 12 hours, no more often."""
    night = Night()
    night.goes_on(3 * 43_200, alarm(), step=30)

    assert [(round(at / 43_200), items[0][0]) for at, items in night.sent] == [(0, "new"), (1, "still"), (2, "still")]


def test_what_comes_and_goes_is_told_as_such_with_a_count():
    """A share that flaps all night is a handful of messages; each says how often, and its calm is told."""
    night = Night()
    for number in range(120):  # ten hours
        night.goes_on(150, alarm("a", NIGHT + number))
        night.goes_on(150)
    flapping = night.news
    night.goes_on(2 * CALM_S)
    kinds = [items[0][0] for _, items in night.sent]

    assert kinds == ["new", "over", "flaps", "over"], kinds
    assert flapping[0].times >= 3


def test_what_never_lasts_but_always_comes_back_is_told():
    """An alarm that is always over before `wait` has passed is told once it has come three times."""
    night = Night()
    for number in range(30):
        night.goes_on(20, alarm("a", NIGHT + number))
        night.goes_on(40)

    assert [items for _, items in night.sent] == [[("flaps", "a")]] and night.news[0].times == 3


def test_a_flap_between_two_looks_counts():
    """Over and raised again unseen, it has another beginning."""
    night = Night()
    night.goes_on(2, alarm("a", NIGHT))
    night.goes_on(2, alarm("a", NIGHT + 1))
    night.goes_on(2, alarm("a", NIGHT + 2))

    assert [items for _, items in night.sent] == [[("flaps", "a")]]


def test_a_pause_is_told_only_when_it_was_forgotten():
    """Somebody did it on purpose; half a day later it may have been forgotten."""
    night = Night()
    for _ in range(5):
        night.goes_on(60, alarm("paused"))
        night.goes_on(60)
    night.goes_on(50_000, alarm("paused"), step=60)

    assert [items for _, items in night.sent] == [[("new", "paused")]] and night.sent[0][0] > 43_200


def test_what_could_not_be_told_is_told_later():
    """A message that failed leaves everything due, and is tried again no sooner than any message."""
    night = Night()
    night.goes_on(400, alarm("a"), fails=True)
    night.goes_on(600, alarm("a"), alarm("b"))

    assert night.sent == [(60, [("new", "a")]), (360, [("new", "a")]), (660, [("new", "a"), ("new", "b")])]


def test_after_a_restart_what_was_told_is_not_told_again_and_its_end_is():
    """Told is told, over a restart; the wall clock may have been set meanwhile."""
    for stepped_s in (10, 86_400 * 365, -86_400 * 365):
        before, after = Night(), Night()
        before.goes_on(90, alarm("a"), alarm("b"))
        kept = json.loads(json.dumps(before.telling.kept(before.at, NIGHT)))
        after.telling.restore(kept, 0.0, NIGHT + stepped_s)
        after.goes_on(1_000, alarm("a"), alarm("b", acked="ada") if stepped_s > 86_400 else alarm("b"))
        after.goes_on(1_000)
        kinds = [kind for _, items in after.sent for kind, _ in items]

        assert "new" not in kinds and kinds.count("over") == 2, stepped_s
        assert kinds.count("still") <= 2


@pytest.mark.parametrize("stepped_s", [0, 86_400 * 365, -86_400 * 365])
def test_a_clock_that_was_set_over_a_restart_delays_no_message(stepped_s):
    """What stands is repeated within `repeat`, and what is new is told within `every`, whatever the clock says."""
    before, after = Night(), Night()
    before.goes_on(90, alarm("a"))
    after.telling.restore(json.loads(json.dumps(before.telling.kept(before.at, NIGHT))), 0.0, NIGHT + stepped_s)
    after.goes_on(43_500, alarm("a"), alarm("b"), step=10)

    assert "still" in [kind for _, items in after.sent for kind, _ in items]
    assert after.sent[0][0] <= 300 and ("new", "b") in after.sent[0][1]


def test_a_thousand_alarms_are_a_bounded_message():
    """What is beyond the limits is counted, in the records and in the message."""
    telling = Telling(PACE)
    telling.see([alarm(f"unreachable:{n}") for n in range(5_000)], 0.0)
    telling.see([alarm(f"unreachable:{n}") for n in range(5_000)], 60.0)
    news = telling.due(60.0)
    message = compose(news, standing=telling.standing())

    assert len(news) == KNOWN_MAX and telling.standing() == 5_000
    assert len(message["alarms"]) == teller.ITEMS_MAX and message["more"] == KNOWN_MAX - teller.ITEMS_MAX
    assert f"and {message['more']} more" in message["text"] and "5000 alarms stand" in message["text"]


# --------------------------------------------------------------------------- words


def compose(news: list, standing: int = 1, host: str = "krios1") -> dict:
    return teller.compose(news, host=host, utc=NIGHT + 90, standing=standing, pace=PACE, state_dir="/srv/state")


EVIL = "x\r\nBcc: all@example.org\r\n\r\nbody\x1b[2J\u202e\udcff ü " + "long " * 50


def test_a_message_says_what_an_operator_needs():
    """Which workstation, what, since when, what to do, what to type next."""
    night = Night()
    night.goes_on(90, alarm(what="destination /mnt/archive is down: no route to host"))
    message = compose(night.news)
    text = message["text"]

    assert message["subject"] == "[krios1] ALARM: destination /mnt/archive is down: no route to host"
    for word in ("krios1", "1 alarm stands", "no route to host", "since", "for 90 s", "do: mount it",
                 "trigger-daemon status",
                 "TRIGGER_DAEMON_STATE_DIR=/srv/state", "alarms ack destination:/mnt/a", "12 h"):  # fmt: skip
        assert word in text
    assert max(len(line) for line in text.splitlines() if "STATE_DIR" not in line) <= 78


def test_no_name_gets_into_the_header_or_hides_in_the_body():
    """File names come from instruments: nothing in them ends a line of the header or moves a terminal."""
    night = Night()
    night.goes_on(90, alarm(key="k\n\x1b", what=EVIL))
    message = compose(night.news, host="krios\n1\x1b")
    ways = Ways(to=("ops@example.org", "b@example.org"), sender="td@krios1", sendmail=("sendmail",), pace=PACE)
    letter = teller.mail(message, ways, NIGHT)
    head, _, body = letter.partition(b"\n\n")
    parsed = email.message_from_bytes(letter, policy=email.policy.default)

    assert sorted(parsed.keys()) == [
        "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version", "Message-ID",
        "Subject", "To", "X-Trigger-Daemon-Host",
    ]  # fmt: skip
    assert parsed["Subject"] == message["subject"] and len(message["subject"]) <= 69
    assert max(map(len, head.split(b"\n"))) <= 78 and max(map(len, body.split(b"\n"))) <= 998
    assert b"\x1b" not in letter and b"\r" not in letter
    assert "\\x1b[2J\\u202e\\udcff ü" in parsed.get_content().replace("\n ", " ").replace("  ", " ")


# ------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("alarms:\n  mail: {to: ['ops@example.org\\nBcc: x'], from: a@b}\n", (2, 15), "is not a mail address"),
        ("alarms:\n  mail: {to: []}\n", (2, 14), "empty"),
        ("alarms:\n  mail: {to: -oQ/tmp}\n", (2, 14), "is not a mail address"),
        ("alarms:\n  mail: {from: a@b}\n", (2, 9), "lacks the key `to`"),
        ("alarms:\n  every: 300\n", (2, 10), "has no unit"),
        ("alarms:\n  comand: [a]\n", (2, 3), "unknown setting"),
        ("alarms:\n  timeout: 1h\n", (2, 12), "less than or equal to 600"),
        ("alarms:\n  mail: {to: a@b, sendmail: []}\n", (2, 29), "empty"),
    ],
)
def test_a_fault_of_the_settings_has_its_place(tmp_path, text, place, word):
    """file:line:column, in words."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_settings(file, {})
    fault = refused.value.faults[0]

    assert (fault.line, fault.column) == place
    assert word in fault.message


def test_off_by_default():
    """Nothing is run unless the settings name it."""
    assert config.Settings().alarms.ways().programs() == {}


HOW_TO = Path(__file__).parent.parent / "docs" / "how-to" / "alarms.md"


def test_the_settings_of_the_how_to_are_accepted_and_its_defaults_are_ours(tmp_path):
    """What the page shows can be pasted; what it calls defaults are."""
    shown = HOW_TO.read_text().partition("```yaml\n")[2].partition("```")[0]
    file = tmp_path / "config.yaml"
    file.write_text(shown)
    ways = load_settings(file, {}).alarms.ways()

    assert ways.command == ("/usr/local/bin/page", "--team", "em") and ways.to == ("em-oncall@example.org",)
    assert (ways.pace, ways.timeout_s) == (Pace(), Ways().timeout_s)
    file.write_text("alarms: {mail: {to: root}}")
    assert load_settings(file, {}).alarms.ways().sendmail == ways.sendmail


def test_the_message_of_the_how_to_is_what_is_sent():
    """Every line of the example is one that is made for these alarms."""
    shown = HOW_TO.read_text().partition("```\nSubject: ")[2].partition("```")[0]
    night = Night()
    down = alarm("destination:/mnt/archive", what="destination /mnt/archive is down: /mnt/archive is not there")
    low = alarm("storage:/data", NIGHT + 26, what="/data has 410 GB free of 10.0 TB, full in 18 min: it is low")
    night.goes_on(90, down | {"hint": f"{ABSENT}; the copy goes on by itself"}, low | {
        "hint": "`trigger-daemon storage` shows what could be reclaimed, and what stands in the way of the rest"
    })  # fmt: skip
    message = teller.compose(
        night.news, host="krios1", utc=NIGHT + 62, standing=2, pace=Pace(), state_dir=teller.DEFAULT_STATE_DIR
    )
    subject, _, text = shown.partition("\n\n")
    clock = re.compile(r"\w{3} \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+")

    assert subject == message["subject"]
    assert clock.sub("", text) == clock.sub("", message["text"])


# ------------------------------------------------------------------------ programs


SECRETS = {
    "TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": "s3cret", "CREDENTIALS_DIRECTORY": "/run/credentials/x",
    "NOTIFY_SOCKET": "/run/x", "TRIGGER_FAIL": "",
}  # fmt: skip


def test_a_program_is_not_told_our_secrets(monkeypatch):
    """What the daemon's environment holds for the daemon alone does not reach what it starts; the rest does."""
    for name, value in (SECRETS | {"LAB": "b21"}).items():
        monkeypatch.setenv(name, value)
    ended = programs.run(["/usr/bin/env"], timeout_s=10, env={"TRIGGER_VOLUME": "/data"})
    names = {line.partition("=")[0] for line in ended.said.splitlines()}

    assert ended.fault == "" and names.isdisjoint(SECRETS)
    assert {"TRIGGER_VOLUME", "LAB"} <= names


def test_a_program_that_hangs_is_ended_with_all_it_started(tmp_path, wait_until):
    """TERM is ignored, a child holds the output open; both are gone after the timeout, and it is told."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; echo waits; wait; wait"
    programs_grace, programs.GRACE_S = programs.GRACE_S, 0.2
    try:
        ended = programs.run(["/bin/sh", "-c", script], timeout_s=0.5)
    finally:
        programs.GRACE_S = programs_grace
    parent, child = map(int, pids.read_text().split())

    assert ended.fault == "/bin/sh did not end within 0.5 s" and ended.code is None and ended.said == "waits"
    assert not Path(f"/proc/{parent}").exists()
    wait_until(lambda: _ended(child), what="its child is gone")


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_a_mailer_leaves_in_the_background_goes_on(tmp_path, wait_until):
    """A mailer that delivers in the background, holding our pipe, neither delays us nor is ended."""
    done = tmp_path / "done"
    ended = programs.run(["/bin/sh", "-c", f"(sleep 0.3; echo sent > {done}) & exit 0"], timeout_s=30)

    assert ended.fault == "" and not done.exists()
    wait_until(done.exists)


@pytest.mark.parametrize(
    ("argv", "stdin", "fault"),
    [
        (["/nowhere/page"], b"", "/nowhere/page cannot be started: No such file or directory"),
        (["/bin/sh", "-c", "echo no route >&2; exit 3"], b"", "/bin/sh ended with 3: no route"),
        (["/bin/sh", "-c", "echo refused; echo sorry; exit 75"], b"", "/bin/sh ended with 75: refused; sorry"),
        (["/bin/sh", "-c", "kill -9 $$"], b"", "/bin/sh was ended by signal 9"),
        (["/bin/true"], b"x" * 1_000_000, ""),
        (["/bin/sh", "-c", "yes | head -c 5000000; echo; wc -c"], b"x" * 1_000_000, ""),
    ],
    ids=["absent", "fails", "says more", "killed", "does not read", "talks much"],
)
@pytest.mark.parametrize("waitid", [True, False])
def test_how_a_program_ended_is_told(argv, stdin, fault, waitid, monkeypatch):
    """In words with its last line; what it does not read, or says too much, stops nothing and fills no memory."""
    if not waitid:
        monkeypatch.delattr(os, "waitid")
    ended = programs.run(argv, timeout_s=20, stdin=stdin)

    assert ended.fault == fault and len(ended.said) <= programs.SAID_BYTES
    if "wc -c" in argv[-1]:
        assert ended.said.splitlines()[-1].strip() == "1000000"


# -------------------------------------------------------------------------- daemon


@pytest.fixture
def here(shm_path):
    site = Site(shm_path)
    site.write_rules(site.rule())
    yield site
    if site.process is not None and site.process.poll() is None:
        site.kill()


def pager(site: Site, name: str, body: str) -> str:
    """Make a program of the operator's; Python, so that the same runs everywhere."""
    path = site.base / name
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def messages(site: Site) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(site.base.glob("message-*.json"))]


SAVE = """
message = json.load(sys.stdin)
name = f"{os.path.dirname(sys.argv[0])}/message-{time.time_ns()}"
with open(name, "w") as file:
    json.dump(message | {"environment": sorted(os.environ)}, file)
os.rename(name, name + ".json")
"""

QUICK = {"wait": "1ms", "every": "1ms"}


def test_an_alarm_reaches_the_command_once_over_a_restart_and_so_does_its_end(here):
    """JSON on its input, no secret in its environment; after a kill nobody is told again, of the end once."""
    here.settings["alarms"] = {"command": [pager(here, "page", SAVE)], **QUICK}
    (here.data / "a.tif").write_bytes(b"first")
    here.start(env=SECRETS)
    here.until_verified(1)
    away = here.data.rename(here.base / "away")
    here.until(lambda: len(messages(here)) == 1, 30, "the alarm is told")
    here.until(lambda: (here.state / teller.FILE).exists(), 10, "that it was told is kept")
    here.kill()
    here.start(env=SECRETS)
    here.cli("status")
    away.rename(here.data)
    here.until(lambda: len(messages(here)) == 2, 30, "its end is told")
    told, over = messages(here)

    assert told["subject"].startswith(f"[{os.uname().nodename[:20]}] ALARM: ") and told["standing"] == 1
    assert told["alarms"][0] | {"event": "new", "key": f"root:{here.data}", "stands": True} == told["alarms"][0]
    assert told["alarms"][0]["hint"] and told["alarms"][0]["since_time"].endswith("Z")
    assert set(told["environment"]).isdisjoint(SECRETS)
    assert [(item["event"], item["key"]) for item in over["alarms"]] == [("over", f"root:{here.data}")]


def test_a_program_that_hangs_or_fails_delays_nothing_and_is_shown(here):
    """The loop goes on while it hangs; it is ended; status names it, with a hint, and nobody is sent that in a loop."""
    hangs = pager(here, "hangs", "open(os.path.dirname(sys.argv[0]) + '/begun', 'w').close()\ntime.sleep(600)")
    letters = here.base / "letter"
    sendmail = pager(here, "sendmail", f"open({str(letters)!r}, 'ab').write(sys.stdin.buffer.read())\nsys.exit(75)")
    here.settings["alarms"] = {
        "command": [hangs], "mail": {"to": "ops@example.org", "sendmail": [sendmail, "-t"]}, "timeout": "2s",
        "wait": "1ms", "every": "1h",
    }  # fmt: skip
    here.start()
    (here.base / "lost").mkdir()
    (here.base / "lost" / "x.tif").write_bytes(b"x")
    here.write_rules(here.rule(), here.rule("second", watch=str(here.base / "never")))
    here.until((here.base / "begun").exists, 30, "it was begun")
    (here.data / "a.tif").write_bytes(b"while it hangs")
    here.until_verified(1)
    here.until(lambda: "telling" in {a["key"] for a in here.json("status")["alarms"]}, 30, "it is shown")
    done = here.cli("status")
    alarm = next(a for a in here.json("alarms", "list")["alarms"] if a["key"] == "telling")

    assert done.returncode == 4
    assert "did not end within 2 s" in alarm["what"] and "ended with 75" in alarm["what"] and "reload" in alarm["hint"]
    assert letters.read_bytes().count(b"Subject:") == 1 and b"telling" not in letters.read_bytes()


def test_a_program_that_is_not_there_is_shown_before_the_night(here):
    """The fault is found at the start, not by the first alarm; mended, a reload ends it."""
    here.settings["alarms"] = {"command": [str(here.base / "page")]}
    here.start()
    here.until(lambda: [a["key"] for a in here.json("status")["alarms"]] == ["telling"], 20, "it is shown")
    assert here.cli("status").returncode == 4
    acked = here.cli("alarms", "ack", "all")
    here.until(lambda: here.json("alarms", "list")["alarms"][0]["acked_by"], 10, "it was seen")
    assert acked.returncode == 0 and "telling: until the daemon ends" in acked.stdout
    assert here.cli("status").returncode == 0
    pager(here, "page", SAVE)
    here.process.send_signal(1)
    here.until(lambda: here.json("status")["alarms"] == [], 20, "it is over")

    assert here.cli("status").returncode == 0 and messages(here) == []


def test_a_damaged_record_of_what_was_told_stops_nothing(tmp_path, wait_until):
    """Then people are told once more, and the file is whole again."""
    said = []

    class Log:
        def __getattr__(self, level):
            return lambda event, **keys: said.append(event)

    for text in ("", "[]", "{}", '{"next_time": 1, "told": {"a": {"told": "x"}}}', '{"next_time": null, "told": {}}'):
        (tmp_path / teller.FILE).write_text(text)
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        ways = Ways(command=("/bin/sh", "-c", f"cat > {out}.new; mv {out}.new {out}"), pace=Pace(0, 1, 1_000))
        tells = teller.Teller(ways, state_dir=tmp_path, host="krios1", clock=SystemClock(), logger=Log())
        try:
            tells.see([alarm("a")])
            wait_until(out.exists)
            wait_until(lambda text=text: (tmp_path / teller.FILE).read_text() not in ("", text))
            assert json.loads((tmp_path / teller.FILE).read_text())["told"].keys() == {"a"}, text
        finally:
            tells.stop()
    assert said.count("alarms.told_not_known") == 5
