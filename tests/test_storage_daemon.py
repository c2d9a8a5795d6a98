"""The daemon beside an instrument and within a small disk: a real volume, real programs."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon.clock import SystemClock
from trigger_daemon.core.model import Gauged, Mounted, Pressed
from trigger_daemon.core.storage import Condition, Limits, Storage
from trigger_daemon.critical import Commands, unable
from trigger_daemon.instrument import Instrument, Watch
from trigger_daemon.volumes import Gauge, Volumes

MB = 10**6
PROGRAM = f"EM{os.getpid()}"  # of this worker: those of others must not make its copies stand still
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    path = tmp_path / "volume"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64000k", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "site", quiescence="100ms", sweep="500ms")
    yield made
    made.stop()


def waiting_for(site: Site) -> list[str]:
    """Return what pending runs wait for, by the running daemon's own word."""
    found = site.json("runs", "list", "--state", "PENDING")["runs"]
    return [str(run["waiting_for"]) for run in found]


def write(site: Site, name: str, megabytes: int) -> None:
    (site.data / name).write_bytes(os.urandom(MB) * megabytes)


@ROOT
def test_a_run_waits_for_space_and_the_reserve_stays_free(site: Site, volume: Path) -> None:
    """What does not fit above the reserve is not begun; `storage` says what is missing; room lets it go."""
    site.settings["volumes"] = [{"path": str(volume), "reserve": "20MB", "low": "10%", "critical": "5%"}]
    site.write_rules(site.rule(start={"copy": {"to": str(volume)}}))
    site.start()
    write(site, "a.bin", 30)
    site.until_verified(1)
    write(site, "b.bin", 30)
    site.until(lambda: any("storage: 30 MB are needed" in words for words in waiting_for(site)), 20, "it waits")
    site.until(lambda: site.json("storage")["volumes"][0]["room_bytes"] < 30 * MB, 20, "the heartbeat tells it")
    told = site.json("storage")
    assert [(run["rule"], run["bytes"]) for run in told["waiting"]] == [("first", 30 * MB)]
    (one,) = told["volumes"]
    assert (one["path"], one["reserve_bytes"]) == (str(volume), 20 * MB)
    assert "needed on" in site.cli("storage").stdout
    assert os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize >= 20 * MB

    (volume / "a.bin").unlink()
    site.until_verified(2)


@ROOT
def test_a_link_below_the_destination_leads_to_a_volume_whose_reserve_stays_free(site: Site, volume: Path) -> None:
    """The run was admitted elsewhere, so it begins; what does not fit where the link leads waits, what fits goes."""
    site.settings["volumes"] = [{"path": str(volume), "reserve": "60%"}]
    (volume / "2026").mkdir()
    (site.out / "2026").symlink_to(volume / "2026")
    (site.data / "2026").mkdir()
    site.write_rules(site.rule())
    site.start()
    write(site, "2026/large.bin", 30)
    write(site, "2026/small.bin", 5)
    site.until(lambda: any("reserve of" in told for told in waiting_for(site)), 30, "the large one waits")
    site.until(lambda: (volume / "2026" / "small.bin").exists(), 30, "the small one has gone")

    assert sorted(path.name for path in (volume / "2026").iterdir()) == ["small.bin"]
    assert "reserve of 39.32 MB" in "; ".join(waiting_for(site))


@ROOT
def test_a_critical_volume_is_told_acted_on_once_and_spared(site: Site, volume: Path, tmp_path: Path) -> None:
    """The settings' command runs, told no secret; nothing of ours is written there; all goes on when there is room."""
    noted = tmp_path / "noted"
    command = ["/bin/sh", "-c", f'echo "$TRIGGER_VOLUME$TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET" >> {noted}']
    site.settings["volumes"] = [{"path": str(volume), "critical": "20%", "low": "30%", "on_critical": command}]
    site.write_rules(site.rule(start={"copy": {"to": str(volume)}}))
    filler = volume / "filler"
    filler.write_bytes(bytes(55 * MB))
    site.start(env={"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": "s3cret"})
    write(site, "a.bin", 1)
    site.until(lambda: any("is critical" in words for words in waiting_for(site)), 20, "it waits")
    site.until(noted.exists, 20, "the command has run")
    alarms = [alarm["key"] for alarm in site.json("alarms", "list")["alarms"]]
    assert f"storage:{volume}:critical" in alarms
    assert site.json("status", check=False)["volumes"][0]["state"] == "critical"
    assert not (volume / "a.bin").exists()

    filler.unlink()
    site.until_verified(1)
    assert noted.read_text().split() == [str(volume)]
    site.until(lambda: site.json("alarms", "list")["alarms"] == [], 20, "the alarms are gone")


def alarm(site: Site, key: str) -> str:
    """Return the words of an alarm, '' if it does not stand."""
    found = site.json("alarms", "list")["alarms"]
    return next((f"{one['what']}; {one['hint']}" for one in found if one["key"] == key), "")


def reload(site: Site, volumes: list[dict[str, Any]]) -> None:
    site.settings["volumes"] = volumes
    site.config.write_text(json.dumps(site.settings))
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)


def test_a_command_that_cannot_be_run_is_told_before_it_is_needed(site: Site) -> None:
    """Long before the disk is critical; with the settings corrected, and reloaded, it is over."""
    data, key = str(site.data), f"on_critical:{site.data}"
    never = {"path": data, "low": "1B", "critical": "0B"}
    site.settings["volumes"] = [{**never, "on_critical": ["/usr/local/bin/pause-aquisition", "now"]}]
    site.write_rules(site.rule())
    site.start()
    site.until(lambda: bool(alarm(site, key)), 20, "the alarm")
    words = f"the `on_critical` of {data} cannot be run: /usr/local/bin/pause-aquisition: No such file or directory; "
    assert alarm(site, key).startswith(f"{words}correct it")
    reload(site, [{**never, "on_critical": ["true"]}])

    site.until(lambda: not alarm(site, key), 20, "the alarm is over")


def test_a_command_that_failed_is_told_until_the_settings_are_read_again(site: Site) -> None:
    """With how it ended and its last words, over a restart, too: nobody has paused the acquisition."""
    data, key = str(site.data), f"on_critical:{site.data}"
    words = ["/bin/sh", "-c", "echo begun; echo the server is away >&2; exit 7"]
    always = {"path": data, "low": "100%", "critical": "100%", "on_critical": words}
    site.settings["volumes"] = [always]
    site.write_rules(site.rule())
    site.start()
    site.until(lambda: bool(alarm(site, key)), 20, "the alarm")
    assert "has failed: /bin/sh ended with 7: begun; the server is away; try it by hand" in alarm(site, key)
    site.stop()
    site.start()
    beat = site.heartbeat()
    site.until(lambda: site.heartbeat() != beat, 10, "the next heartbeat")
    assert "ended with 7" in alarm(site, key), "it is the same episode: it does not run again, and stands"
    reload(site, [always])

    site.until(lambda: not alarm(site, key), 20, "somebody has mended it, and says so")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"#!/bin/sh\nexit 0\n", 0o755, ""),
        (b"#!/bin/sh\nexit 0\n", 0o644, "it may not be executed (chmod +x)"),
        (b"#!/usr/bin/pyhton3 -u\n", 0o755, "its interpreter /usr/bin/pyhton3 cannot be run"),
        (b"echo paused\n", 0o755, "it is neither a program nor a script: one begins with #!, such as #!/bin/sh"),
        (b"", 0o755, "it is neither a program nor a script: one begins with #!, such as #!/bin/sh"),
        (b"#!", 0o755, "its interpreter (none) cannot be run"),
        (None, 0o755, "it is a directory"),
    ],
)
def test_it_is_said_why_a_program_cannot_be_run(tmp_path: Path, content: bytes | None, mode: int, words: str) -> None:
    """As the kernel would, without running it."""
    program = tmp_path / "pause"
    if content is None:
        program.mkdir()
    else:
        program.write_bytes(content)
        program.chmod(mode)

    assert unable(str(program)) == words


def test_a_program_is_looked_for_in_the_path() -> None:
    """By its bare name; and one that is compiled is one."""
    assert unable("sh") == unable(sys.executable) == ""

    assert unable("pause-aquisition") == "no program of this name is in PATH"


def test_a_program_on_a_disk_that_does_not_answer_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """Nothing is said until it is known, or late; what it answers then counts."""
    hang, now, real = threading.Event(), [0.0], os.stat

    def stat(path: Any, *more: Any, **keys: Any) -> Any:
        if path == "/dead/pause":
            hang.wait(30)
        return real(path, *more, **keys)

    monkeypatch.setattr(os, "stat", stat)
    commands = Commands(lambda: now[0], {"/data": ("/dead/pause",)}, {})
    told = lambda: [what for _, what, _ in commands.troubles()]  # noqa: E731
    assert told() == []
    now[0] = 11.0
    assert told() == ["the `on_critical` of /data cannot be run: /dead/pause: its disk does not answer"]
    hang.set()

    wait_until(lambda: "No such file" in told()[0])


def test_how_a_command_ended_counts_until_it_is_another_or_ends_well(wait_until: Any) -> None:
    """Also over a restart; of a command of other settings nothing stands."""
    sh = ("sh", "-c", "exit 1")

    def begun(argv: tuple[str, ...], standing: dict[str, str]) -> Commands:
        made = Commands(lambda: 0.0, {"/data": argv}, standing)
        wait_until(lambda: list(made.troubles()))
        return made

    def told(commands: Commands) -> dict[str, str]:
        return {key: what for key, what, _ in commands.troubles()}

    first = begun(sh, {})
    first.ended("/data", sh, "it ended with 1")
    standing = {**told(first), "on_critical:/gone": "it failed", "settings": "y"}
    again = begun(sh, standing)
    assert told(again) == {**told(first), "on_critical:/gone": ""}
    again.ended("/data", ("other",), "")
    assert told(again) == {**told(first), "on_critical:/gone": ""}
    again.ended("/data", sh, "")
    assert told(again) == {"on_critical:/data": "", "on_critical:/gone": ""}

    assert told(begun(("true",), standing)) == {"on_critical:/data": "", "on_critical:/gone": ""}


def test_all_stands_still_while_a_named_program_runs(site: Site, tmp_path: Path) -> None:
    """Nothing starts beside an acquisition; it begins when that has ended, and says so meanwhile."""
    program = tmp_path / PROGRAM
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    acquisition = subprocess.Popen([str(program), "600"])
    try:
        site.settings["throttle"] = {"while": [{"process": PROGRAM}]}
        site.write_rules(site.rule())
        site.start()
        site.until(lambda: b"work.throttled" in site.log.read_bytes(), 10, "it was seen")
        write(site, "a.bin", 1)
        site.until(lambda: waiting_for(site) == [f"the instrument: {PROGRAM} is running"], 20, "it waits")
        assert f"{PROGRAM} is running" in site.cli("storage").stdout
    finally:
        acquisition.kill()
        acquisition.wait()
    site.until_verified(1)


def test_copies_under_way_stand_still_while_a_named_program_runs(site: Site, shm_path: Path, tmp_path: Path) -> None:
    """They stop where they are, say why, and go on from there when it has ended."""
    program = tmp_path / PROGRAM
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    to = shm_path / "to"
    to.mkdir()
    site.settings["throttle"] = {"bandwidth": "10MB/s", "while": [{"process": PROGRAM}]}
    site.write_rules(site.rule(start={"copy": {"to": str(to)}}))
    site.start()
    write(site, "a.bin", 60)
    site.until(lambda: copied(to) > 0, 20, "it copies")
    acquisition = subprocess.Popen([str(program), "600"])
    try:
        seen = [(copied(to), time.monotonic())]

        def still() -> bool:
            if copied(to) != seen[-1][0]:
                seen.append((copied(to), time.monotonic()))
            return time.monotonic() - seen[-1][1] > 3  # a copy that goes on writes ten times a second

        site.until(still, 60, "nothing is written any more")
        assert 0 < copied(to) < 60 * MB
        assert not (to / "a.bin").exists()
        assert site.states() == {"ACTIVE": 1}
        assert f"{PROGRAM} is running" in site.cli("storage").stdout
    finally:
        acquisition.kill()
        acquisition.wait()
    site.until_verified(1)
    assert site.digests(to) == site.digests(site.data)
    assert site.ask("SELECT attempts FROM run") == [(1,)]


def copied(directory: Path) -> int:
    """Return how many bytes lie below a directory in memory, whatever their names are now."""
    return sum(os.lstat(path).st_blocks * 512 for path in directory.iterdir())


# ------------------------------------------------------------------------------ readings


def test_the_fill_rate_is_that_of_the_writer_and_not_of_bursts() -> None:
    """Ten minutes at 10 MB/s with a burst and a large removal are 10 MB/s."""
    gauge = Gauge("/data")
    free = 10_000 * MB
    for second in range(0, 600, 2):
        free -= 20 * MB
        free -= 900 * MB if second == 300 else 0
        free += 2_000 * MB if second == 400 else 0
        gauge.take(float(second), 20_000 * MB, free)

    rate = gauge.fill_bytes_per_s()
    assert rate is not None
    assert abs(rate - 10 * MB) < MB


def test_it_is_not_told_when_a_volume_is_full_before_the_readings_tell_a_trend() -> None:
    """One file in one burst, in the first minute, is none."""
    gauge = Gauge("/data")
    gauge.take(0.0, 284 * MB, 284 * MB)
    told = []
    for second in range(10, 140, 10):
        gauge.take(float(second), 284 * MB, 264 * MB - second * MB)
        told.append(gauge.words()["full_in_s"])

    assert told[:11] == [None] * 11
    assert told[11:] == [round((264 - second) / 1) for second in (120, 130)]


def test_the_trend_is_as_long_as_it_says() -> None:
    """Whatever was kept: no more points than fit on a line, the newest among them."""
    gauge = Gauge("/data")
    for number in range(700):
        gauge.take(number * 300.0, 10, number)
        shown = gauge.trend_words(number * 300.0, 0.0)
        assert len(shown) <= 72
        assert shown[-1] == (0.0, number)


@ROOT
def test_a_path_that_is_a_link_is_on_the_volume_that_it_leads_to(tmp_path: Path, volume: Path) -> None:
    """As facilities name their disks: /data -> /mnt/disk1/data. A link to nowhere is on none."""
    facts: queue.Queue[Gauged | Mounted] = queue.Queue()
    (volume / "data").mkdir()
    (tmp_path / "data").symlink_to(volume / "data")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    links = [str(tmp_path / "data"), str(tmp_path / "gone")]
    volumes = Volumes([Gauge(links[0])], time.monotonic, facts.put)
    volumes.used([*links, "/"])
    tables = []
    try:
        for number in range(100):
            volumes.sample(10.0 * number)
            fact = facts.get(timeout=10)
            tables += [fact.table] if isinstance(fact, Mounted) else []
            if tables and links[0] in tables[-1]:
                break
    finally:
        volumes.stop()
    storage = Storage([Limits(links[0])], [], None, out=[], alarms=None)  # type: ignore[arg-type]
    storage.mounts(tables[-1])

    assert storage.volume_of(f"{links[0]}/a/b.tif") == links[0]
    assert storage.volume_of(str(volume / "data" / "b.tif")) == links[0]
    assert storage.volume_of(f"{links[1]}/b.tif") == ""


def readings(volumes: Volumes, facts: queue.Queue[Gauged | Mounted], now: float) -> tuple[Gauged, dict[str, str]]:
    """Sample once; return the reading, and the newest table of mount points."""
    volumes.sample(now)
    table: dict[str, str] = {}
    while True:
        match facts.get(timeout=10):
            case Gauged() as fact:
                return fact, table
            case Mounted() as fact:
                table = dict(fact.table)


@ROOT
def test_the_disk_beneath_a_volume_that_is_not_mounted_is_not_the_volume(tmp_path: Path) -> None:
    """Its mount is remembered, over a restart too: it is away until that is back, or a person takes its line out."""
    point = tmp_path / "volume"
    path = point / "data"
    path.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(path)
    facts: queue.Queue[Gauged | Mounted] = queue.Queue()

    def book_of(path: Path) -> Path:
        return tmp_path / f"{path.name}.json"

    def of(path: Path) -> Volumes:
        return Volumes([Gauge(str(path))], time.monotonic, facts.put, book=str(book_of(path)))

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64000k", "tmpfs", str(point)], check=True)
    try:
        path.mkdir()
        for named in (path, link):
            volumes = of(named)
            fact, _ = readings(volumes, facts, 10.0)
            volumes.stop()
            assert (fact.error, fact.total_bytes) == ("", 64_000 * 1024)
    finally:
        subprocess.run(["umount", str(point)], check=True)
    for named in (path, link):
        volumes = of(named)
        fact, table = readings(volumes, facts, 10.0)
        assert (fact.volume, fact.error, fact.total_bytes) == (str(named), f"{point} is not mounted", 0)
        assert str(book_of(named)) in fact.away
        assert volumes.devices() == {}
        _, table = readings(volumes, facts, 20.0)
        assert table.get(str(point)) == str(named), "what is written beneath is written to the volume"
        assert str(named) not in {table[one] for one in table if one not in (str(point), str(link))}
        volumes.stop()
    book_of(path).write_text("{}")
    volumes = of(path)
    fact, _ = readings(volumes, facts, 10.0)
    volumes.stop()

    assert fact.error == ""
    assert fact.total_bytes > 64_000 * 1024


def beating(site: Site) -> dict[str, str]:
    """Return the words of the alarms that the last heartbeat has, by key: quicker than a command."""
    beat = site.heartbeat()
    return {one["key"]: f"{one['what']}; {one['hint']}" for one in beat["alarms"]} if beat else {}


@ROOT
def test_a_volume_that_is_unmounted_is_told_and_spared(site: Site, volume: Path) -> None:
    """Nothing begins on the disk beneath; alarm, `status`, `storage` and `doctor` name the mount; all ends with it."""
    key, words = f"storage:{volume}:unread", f"{volume} is not mounted"
    site.settings["volumes"] = [{"path": str(volume), "low": "1B", "critical": "0B"}]
    site.write_rules(site.rule(start={"copy": {"to": f"{volume}/{{rule}}"}}))
    site.start()
    site.until(lambda: (site.state / "volumes.json").exists(), 20, "it is remembered")
    subprocess.run(["umount", "-l", str(volume)], check=True)
    try:
        site.until(lambda: key in beating(site), 20, "the alarm")
        assert beating(site)[key].startswith(f"{volume} is away: {words}; nothing of ours writes there; mount it; ")
        write(site, "a.bin", 1)
        site.until(lambda: bool(site.json("status", check=False)["waits"]["groups"]), 20, "it waits")
        now = site.json("status", check=False)
        assert [of["why"] for of in now["waits"]["groups"]] == [f"storage: {volume} is away: {words}"]
        assert now["volumes"][0]["error"] == words
        assert words in site.cli("doctor", "--only", "space", check=False).stdout
        site.stop()
        assert site.json("storage", check=False)["volumes"][0]["error"] == words
        assert list(volume.iterdir()) == []
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64000k", "tmpfs", str(volume)], check=True)
    site.start()
    site.until_verified(1)

    site.until(lambda: key not in beating(site), 20, "the alarm is over")


def test_a_volume_that_the_settings_do_not_name_any_more_has_no_alarm(site: Site) -> None:
    """Neither after a reload nor after a restart."""
    gone, data = str(site.base / "gone"), str(site.data)
    always = {"path": data, "low": "100%", "critical": "100%"}
    keys = {f"storage:{gone}:unread", f"storage:{data}", f"storage:{data}:critical"}
    site.settings["volumes"] = [always, {"path": gone}]
    site.write_rules(site.rule())
    site.start()
    site.until(lambda: beating(site).keys() == keys, 20, "the alarms")
    reload(site, [always])
    site.until(lambda: beating(site).keys() == keys - {f"storage:{gone}:unread"}, 20, "one is over")
    site.stop()
    site.settings["volumes"] = []
    site.start()
    site.until(lambda: not beating(site), 10, "all are over")

    assert site.json("alarms", "list")["alarms"] == []


def test_a_volume_that_does_not_answer_keeps_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead mount: its gauge says so; the loop, and the other volume, go on."""
    hang, facts = threading.Event(), []
    real = os.statvfs

    def statvfs(path: str) -> Any:
        if path == "/dead":
            hang.wait(30)
        return real("/")

    monkeypatch.setattr(os, "statvfs", statvfs)
    now = [0.0]
    volumes = Volumes([Gauge("/dead"), Gauge("/")], lambda: now[0], facts.append)
    try:
        volumes.sample(0.0)
        deadline = 200
        while not any(isinstance(fact, Gauged) for fact in facts) and (deadline := deadline - 1):
            threading.Event().wait(0.05)
        now[0] = 60.0
        volumes._last = 60.0
        volumes.sample(61.0)
        told = [(fact.volume, fact.error) for fact in facts if isinstance(fact, Gauged)]
        assert told == [("/", ""), ("/dead", "it does not answer")]
        assert isinstance(facts[0], Mounted)
    finally:
        hang.set()
        volumes.stop()


@pytest.mark.parametrize(
    ("argv", "names", "found"),
    [
        ([PROGRAM], {PROGRAM}, {PROGRAM}),
        (["a-program-with-a-long-name"], {"a-program-with-a-long-name"}, {"a-program-with-a-long-name"}),
        (["a-program-with-a-long-name"], {"a-program-with-another"}, set()),
        (["other"], {PROGRAM}, set()),
    ],
)
def test_a_program_is_known_by_its_name(
    tmp_path: Path, argv: list[str], names: set[str], found: set[str], wait_until: Any
) -> None:
    """Also one whose name is longer than the kernel keeps."""
    program = tmp_path / argv[0]
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    process = subprocess.Popen([str(program), "600"])
    try:
        comm = Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: comm.read_text().strip() == argv[0][:15])  # it has its name a moment after it was started
        assert Instrument().running(frozenset(names)) == found
    finally:
        process.kill()
        process.wait()


def test_a_script_is_known_whatever_its_interpreter_is_told(tmp_path: Path, wait_until: Any) -> None:
    """Its options, and their values, come first."""
    script = tmp_path / "acquire.py"
    script.write_text("import time\ntime.sleep(600)\n")
    process = subprocess.Popen([sys.executable, "-X", "dev", "-W", "ignore", "-u", str(script)])
    try:
        wait_until(lambda: Instrument().running(frozenset({"acquire.py"})) == {"acquire.py"})
    finally:
        process.kill()
        process.wait()


def test_a_program_that_has_ended_stops_nothing(tmp_path: Path, wait_until: Any) -> None:
    """Its parent has not asked for its end: it keeps its name, and does nothing any more."""
    program = tmp_path / "ended-program"
    shutil.copy(shutil.which("true") or "/bin/true", program)
    process = subprocess.Popen([str(program)])
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(") ")[2].startswith("Z"))
        assert Instrument().running(frozenset({"ended-program"})) == frozenset()
    finally:
        process.wait()


def test_what_a_kernel_does_not_tell_is_none(tmp_path: Path) -> None:
    """Without pressure figures a condition on them never holds, and nothing fails."""
    assert Instrument(str(tmp_path)).pressure("io") is None
    assert Instrument(str(tmp_path)).cpu() is None
    assert Instrument(str(tmp_path)).running(frozenset({"x"})) == frozenset()
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "io").write_text("some avg10=31.40 avg60=1.00 avg300=0.00 total=1\nfull avg10=0.00\n")
    assert Instrument(str(tmp_path)).pressure("io") == pytest.approx(0.314)


def test_the_load_is_that_since_the_last_look(tmp_path: Path) -> None:
    """Idle time and waiting for disks are no load."""
    stat = tmp_path / "stat"
    machine = Instrument(str(tmp_path))
    stat.write_text("cpu  100 0 100 700 100 0 0 0\n")
    assert machine.cpu() is None
    stat.write_text("cpu  160 0 120 710 110 0 0 0\n")

    assert machine.cpu() == pytest.approx(0.8)


def test_what_runs_already_is_told_anew_when_the_conditions_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload that only takes the `bandwidth` off a program that runs has all of ours stand still beside it."""
    told: list[Pressed] = []
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_text(f"{PROGRAM}\n")
    (tmp_path / "7" / "stat").write_text(f"7 ({PROGRAM}) S 1")
    monkeypatch.setattr(Watch, "_begin", lambda self: None)  # its thread; it is looked by hand
    slower, still = Condition("process", PROGRAM, 5), Condition("process", PROGRAM)
    watch = Watch((slower,), lambda fact: told.append(fact) if isinstance(fact, Pressed) else None, SystemClock())
    watch._instrument = Instrument(str(tmp_path))
    watch.look()
    watch.look()
    assert len(told) == 1
    watch.use((still,))
    watch.look()

    assert [fact.processes for fact in told] == [(PROGRAM,), (PROGRAM,)]


@pytest.mark.parametrize("kind", ["io_pressure_above", "cpu_above"])
def test_a_load_that_stays_low_ends_the_pause(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """A machine at rest reads the same each second: that is told too, or all of ours would stand still for ever."""
    from trigger_daemon.core.alarms import Alarms

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        utc = monotonic

    condition, clock, out = Condition(kind, 0.3), Clock(), []
    storage = Storage((), (condition,), None, out=out, alarms=Alarms(out, lambda at: at))
    load = [0.9]
    monkeypatch.setattr(Instrument, "cpu", lambda self: load[0])
    monkeypatch.setattr(Instrument, "pressure", lambda self, what: load[0])
    monkeypatch.setattr(Watch, "_begin", lambda self: None)
    watch = Watch((condition,), lambda fact: storage.pressed(fact) if isinstance(fact, Pressed) else None, clock)
    watch.look()
    assert storage.instrument
    load[0] = 0.0
    for _ in range(7):
        clock.now += 1.0
        watch.look()

    assert storage.instrument == ""
