"""The whole daemon while its surroundings fail: roots that go or hang, stopped readers, full disks, restarts."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon.control import ControlClient

if sys.platform != "linux":
    pytest.skip("mounts, FUSE and signals are Linux", allow_module_level=True)

from fuse_share import Share

EVENTS = ("auto", "none")
MiB = 1 << 20


@pytest.fixture
def site(shm_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**keys: Any) -> Site:
        made.append(Site(shm_path / f"site{len(made)}", **keys))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()


class Mounts:
    """Mounts below a test's own directory, undone at its end, the last made first."""

    def __init__(self) -> None:
        """Mount nothing yet."""
        self._points: list[Path] = []

    def _mount(self, *arguments: str | Path) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs to mount: {done.stderr}")
        self._points.append(Path(arguments[-1]))

    def tmpfs(self, point: Path, *, source: str = "td-faults", size: str = "64m") -> None:
        point.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={size}", source, point)

    def resize(self, point: Path, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(point)], check=True, capture_output=True)

    def bind(self, source: Path, point: Path) -> None:
        """Show a directory at another place too: what is unmounted there lives on here."""
        point.mkdir(parents=True, exist_ok=True)
        self._mount("--bind", source, point)

    def away(self, point: Path, *options: str) -> None:
        """Unmount; without `-l` that is refused while anybody holds a descriptor in it."""
        done = subprocess.run(["umount", *options, str(point)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self._points.remove(point)

    def close(self) -> None:
        for point in reversed(self._points):
            subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


@pytest.fixture
def mounts(shm_path: Path) -> Iterator[Mounts]:
    """After `shm_path` and before `site` in a test's arguments: unmounted once the daemon is gone."""
    made = Mounts()
    yield made
    made.close()


def put(directory: Path, count: int, word: str = "file", size: int = 100) -> None:
    """Make files that all differ."""
    directory.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (directory / f"{word}{n}.tif").write_bytes((f"{word} {n} ".encode() * size)[:size])


def root_of(here: Site, path: Path | None = None) -> dict[str, Any]:
    """Return what the last heartbeat says of a root, {} if nothing."""
    beat = here.heartbeat() or {"roots": []}
    return next((root for root in beat["roots"] if root["path"] == str(path or here.data)), {})


def health(here: Site, *words: str, path: Path | None = None) -> Callable[[], bool]:
    return lambda: root_of(here, path).get("health") in words


def alarms(here: Site) -> list[dict[str, Any]]:
    beat: dict[str, Any] = here.heartbeat() or {}
    return list(beat.get("alarms", ()))


def claims(here: Site) -> int:
    return int(here.ask("SELECT count(*) FROM claim")[0][0])


# ------------------------------------------------------------------ roots that come and go


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("point", ["missing", "empty"])
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_root_that_is_mounted_later_is_waited_for(mounts, site, kind, point, events):
    """No root yet: the status says so with a hint, nothing is created; once it is there all of it goes, once."""
    here = site(events=events)
    here.write_rules(here.rule(batch={"files": 500, "idle": "1s"}))
    disk = here.base / "disk"
    if kind == "tmpfs":
        mounts.tmpfs(disk)
    put(disk / "d", 40)
    if point == "missing":
        here.data.rmdir()
    here.start()
    if point == "missing":
        here.until(health(here, "lost"), 10, "the missing root is told")
        told = root_of(here)

        assert "does not exist yet" in told["why"] and "never created" in told["hint"]
        assert any(str(here.data) in alarm["what"] and alarm["hint"] for alarm in alarms(here))
        assert not here.data.exists()
    assert here.ask("SELECT 1 FROM batch") == []

    mounts.bind(disk, here.data)
    here.until_verified(40)
    here.until(health(here, "ok"), 20, "the root is ok")
    put(here.data / "d", 5, "more")
    here.until_verified(45)
    here.judge()
    assert here.stop() == 0


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("lazy", [True, False])
def test_a_root_unmounted_while_files_settle_loses_and_repeats_nothing(mounts, site, events, lazy):
    """We hold nothing open, no batch closes on what vanished, and all of it goes once after the return."""
    here = site(events=events, quiescence="3s")
    here.write_rules(here.rule(batch={"idle": "1s", "files": 10_000}))
    disk = here.base / "disk"
    mounts.tmpfs(disk)
    mounts.bind(disk, here.data)
    put(here.data / "a", 30, "before")
    here.start()
    here.until_verified(30)
    batches = here.ask("SELECT count(*) FROM batch")
    put(here.data / "a", 30, "settling")
    time.sleep(1)  # within the quiet period

    mounts.away(here.data, *(["-l"] if lazy else []))
    here.until(health(here, "lost", "suspect"), 20, "the root is told to be away")
    assert root_of(here)["hint"]
    put(disk / "a", 10, "meanwhile")
    time.sleep(5)  # longer than quiet period and idle together
    assert here.ask("SELECT count(*) FROM batch") == batches
    assert list(here.data.iterdir()) == []

    mounts.bind(disk, here.data)
    here.until_verified(70)
    put(here.data / "b", 5, "after")
    here.until_verified(75)
    here.until(health(here, "ok"), 20, "the root is ok")
    here.judge()
    assert claims(here) == 75
    mounts.away(here.data)
    assert here.stop() == 0


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("kind", ["other file system", "same file system"])
def test_an_empty_mount_point_is_no_deletion(mounts, site, events, kind):
    """The disk goes and leaves an empty directory: no claim is given up, over a restart too; nothing goes again."""
    here = site(events=events)
    here.settings["keep_done"] = "1s"  # after which the claims of files that are gone are given up
    here.write_rules(here.rule())
    disk = here.base / "disk"
    if kind == "other file system":
        mounts.tmpfs(disk)
    else:
        disk.mkdir()
    mounts.bind(disk, here.data)
    put(here.data, 12)
    here.start()
    here.until_verified(12)

    mounts.away(here.data)
    here.until(health(here, "lost", "suspect"), 20, "the root is told to be away")
    assert here.stop() == 0
    here.start()
    here.until(health(here, "lost", "suspect"), 20, "the root is told to be away after a restart too")
    time.sleep(6)  # a full sweep is due each 5 s
    assert claims(here) == 12
    assert any(str(here.data) in alarm["what"] and alarm["hint"] for alarm in alarms(here))

    mounts.bind(disk, here.data)
    here.until(health(here, "ok"), 20, "the root is back")
    put(here.data, 3, "more")
    here.until_verified(15)
    here.judge()
    assert claims(here) == 15
    (here.data / "file0.tif").unlink()
    here.until(lambda: claims(here) == 14, 20, "a file that is really gone is forgotten")
    assert here.stop() == 0


# ------------------------------------------------------------------ a share that hangs


@pytest.fixture
def share(shm_path: Path) -> Iterator[Share]:
    point = shm_path / "share"
    point.mkdir()
    try:
        made = Share(point, {"a.tif": 3, "b.tif": 4})
    except OSError as error:
        pytest.skip(f"needs FUSE: {error}")
    yield made
    made.close()


@pytest.mark.parametrize("events", EVENTS)
def test_a_share_that_hangs_delays_nobody_else(shm_path, share, site, events):
    """The other root is served within seconds, status names the hang, the end does not wait; released, it goes on."""
    here, point = site(events=events), shm_path / "share"
    noop = {"command": {"run": ["/bin/true"]}}
    here.write_rules(here.rule(), here.rule("remote", watch=str(point), match=["*.tif"], start=noop, proof="none"))
    here.start()
    here.until(lambda: len(here.taken("remote")) == 2, 20, "the share's files are batched")
    share.mood = "hang"
    begun = time.monotonic()
    for n in range(5):
        put(here.data, 1, f"round{n}")
        asked = time.monotonic()
        here.until_verified(n + 1, 10)
        assert time.monotonic() - asked < 6
    here.until(health(here, "lost", path=point), 60, "the hang is told")
    told = root_of(here, point)
    assert told["why"].partition("hung in ")[2] and told["hint"], told
    assert time.monotonic() - begun > 20, "a server that reboots is given half a minute"
    put(here.data, 1, "late")
    here.until_verified(6, 10)
    begun = time.monotonic()
    assert here.stop() == 0
    assert time.monotonic() - begun < 8

    here.start(wait=False)
    put(here.data, 1, "again")
    here.until_verified(7, 15)
    share.files["c.tif"] = 5
    share.release()
    here.until(lambda: len(here.taken("remote")) == 3, 60, "the share is served again")
    assert set(here.taken("remote").values()) == {1}
    here.judge()
    begun = time.monotonic()
    assert here.stop() == 0
    assert time.monotonic() - begun < 8


# ------------------------------------------------------------------ much at once


FILES_AT_START = int(os.environ.get("TD_FAULTS_FILES", "30000"))


@pytest.mark.parametrize("events", EVENTS)
def test_much_at_the_start_does_not_make_it_deaf(site, events):
    """Many files and twenty rules at the start: orders are answered within two seconds, memory is bounded."""
    here = site(events=events, quiescence="1s", sweep="5s")
    noop = {"command": {"run": ["/bin/true"]}}
    groups = 20
    for d in range(200):
        directory = here.data / f"g{d % groups}" / f"d{d}"
        directory.mkdir(parents=True)
        for n in range(FILES_AT_START // 200):
            (directory / f"{n}.tif").touch()
            os.truncate(directory / f"{n}.tif", 1)
    here.write_rules(*(
        here.rule(f"r{n}", match=[f"g{n}/**"], existing="process" if n < 5 else "ignore", start=noop, proof="none",
                  batch={"files": 1_000, "idle": "2s"})
        for n in range(groups)
    ))  # fmt: skip
    here.start(wait=False)
    here.until(lambda: here.heartbeat() is not None, 30, "the first heartbeat")
    client, waits, ages = ControlClient(here.state), [], []
    process = FILES_AT_START * 5 // groups
    question = (
        "SELECT coalesce(sum(batch.files), 0) FROM run JOIN batch ON batch.id = run.id WHERE run.state = 'SUCCEEDED'"
    )
    end = time.monotonic() + 60 + FILES_AT_START / 500
    done = False
    while time.monotonic() < end and not done:
        for verb, args in (("files.list", {"stage": "blocked"}), ("pause", {}), ("resume", {})):
            begun = time.monotonic()
            assert client.ask(verb, args, "test", "", timeout_s=20)["ok"]
            waits.append(time.monotonic() - begun)
        begun = time.monotonic()
        beat = here.heartbeat()
        assert beat is not None and time.monotonic() - begun < 1
        ages.append(_beat_age(here))
        left = len(here.ask("SELECT 1 FROM baseline"))
        done = here.ask(question) == [(process,)] and left == groups
        time.sleep(0.2)
    assert here.process is not None
    status = Path(f"/proc/{here.process.pid}/status").read_text()
    peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(
        f"{FILES_AT_START} files, {events}: {len(waits)} orders, longest wait {max(waits):.2f} s, oldest heartbeat"
        f" {max(ages):.2f} s, VmHWM {peak_mib:.0f} MiB, {end - time.monotonic():.0f} s to spare"
    )

    assert done, (here.ask(question), process, here.tail())
    assert max(waits) < 2, sorted(waits)[-5:]
    assert max(ages) < 5, sorted(ages)[-5:]
    assert peak_mib < 150 + FILES_AT_START / 1_000
    assert all(set(here.taken(f"r{n}").values()) == {1} for n in range(5))
    assert all(not here.taken(f"r{n}") for n in range(5, groups))
    (here.data / "g19" / "new.tif").write_bytes(b"x")
    here.until(lambda: len(here.taken("r19")) == 1, 30, "a new file of a rule that leaves out what was there")
    assert here.stop() == 0


def _beat_age(here: Site) -> float:
    """Return how old the heartbeat is, in seconds; infinity while there is none."""
    try:
        connection = sqlite3.connect(f"file:{here.state}/control.db?mode=ro", uri=True, timeout=5)
        try:
            row = connection.execute("SELECT time FROM heartbeat").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError:  # it is just being replaced
        row = None
    return time.time() - row[0] if row else float("inf")


# ------------------------------------------------------------------ stopped readers


HOLDER = """
import sqlite3, sys
held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=20)
for statement in sys.argv[2:]:
    held.execute(statement).fetchone()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stopped() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Processes that hold a database, stopped in the middle of it."""
    made: list[subprocess.Popen[str]] = []

    def stop(path: Path, *statements: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), *statements],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        made.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        return process

    yield stop
    for process in made:
        process.kill()
        process.communicate()


def _commit_waits(here: Site, count: int, word: str) -> list[float]:
    """Return, for files written one after the other, how long after its quiet period each one's batch was durable."""
    waits = []
    for n in range(count):
        put(here.data, 1, f"{word}{n}-")
        name = f"{word}{n}-0.tif".encode()
        written = time.time()
        while not any(path == name for path, _, _ in here.taken()):
            assert time.time() - written < 20, here.tail()
            time.sleep(0.02)
        waits.append(time.time() - written - 0.5)
    return waits


def test_stopped_readers_delay_no_commit(site, stopped):
    """One stopped in a read of the journal, one in a write of the control file: commits take as long as without."""
    here = site()
    here.write_rules(here.rule())
    here.start()
    before = _commit_waits(here, 4, "before")
    stopped(here.state / "journal.db", "BEGIN", "SELECT count(*) FROM batch")
    stopped(here.state / "control.db", "BEGIN IMMEDIATE", "SELECT count(*) FROM orders")
    during = _commit_waits(here, 12, "during")

    assert max(during) < max(before) + 1.0, (before, during)
    here.until_verified(16)
    here.until(lambda: _beat_age(here) < 5, 60, "the stuck control file was replaced")
    assert ControlClient(here.state).ask("pause", {}, "test", "", timeout_s=10)["ok"]
    assert ControlClient(here.state).ask("resume", {}, "test", "", timeout_s=10)["ok"]
    here.judge()
    assert here.stop() == 0


# ------------------------------------------------------------------ full disks


def fill(directory: Path) -> Path:
    """Leave no room on a file system."""
    path = directory / "fill"
    with path.open("ab", buffering=0) as file:
        for size in (MiB, 4_096, 512):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue
    return path


def test_a_full_disk_does_not_stop_the_journal_from_recording(mounts, site):
    """The ballast is given up: what is under way ends, new files go, an alarm tells; with room it is made again."""
    here = site()
    mounts.tmpfs(here.state, size="64m")
    here.write_rules(here.rule())
    here.start()
    ballast = here.state / "ballast"
    here.until(ballast.exists, 10, "the ballast is made")
    size = ballast.stat()
    assert size.st_blocks * 512 >= size.st_size == 64 * MiB // 20
    put(here.data / "a", 5, "before")
    here.until_verified(5)

    filler = fill(here.state)
    put(here.data / "b", 40, "during")
    here.until_verified(45)
    here.until(lambda: any(alarm["key"] == "ballast" for alarm in alarms(here)), 10, "the alarm tells of it")
    assert not ballast.exists() and "journal.full" not in here.log.read_text()

    filler.unlink()
    here.stop()
    here.start()
    here.until(ballast.exists, 10, "the ballast is made again")
    here.until(lambda: not any(alarm["key"] == "ballast" for alarm in alarms(here)), 10, "the alarm is over")
    here.judge()


@pytest.mark.parametrize(("events", "used"), [("auto", True), ("none", False)])
def test_a_full_journal_starts_nothing_and_makes_up_for_it(mounts, site, events, used):
    """No room for the journal: nothing starts, the log says why; with room again every file goes, once."""
    here = site(events=events)
    mounts.tmpfs(here.state, size="24m")
    here.write_rules(here.rule())
    here.start()
    first = 5 if used else 0
    put(here.data / "a", first, "before")
    if used:
        here.until_verified(5)
    here.until((here.state / "ballast").exists, 10, "the ballast is made")
    (here.state / "ballast").unlink()  # it was given up before
    filler = fill(here.state)
    attempts = here.ask("SELECT count(*) FROM attempt")
    put(here.data / "b", 400, "during", 3_000)
    here.until(lambda: "journal.full" in here.log.read_text(), 60, "the full disk is told in the log")
    delivered = len(here.digests(here.out))
    time.sleep(6)

    assert here.process is not None and here.process.poll() is None, here.tail()
    committed = len({path for path, _, _ in here.taken() if path.startswith(b"b/")})
    assert len(here.digests(here.out)) <= first + committed, "a copy was started that no committed batch asked for"
    assert len(here.digests(here.out)) == delivered or committed
    if committed == 0:
        assert here.ask("SELECT count(*) FROM attempt") == attempts
    told = [alarm for alarm in alarms(here) if alarm["key"] == "journal"]
    assert not told or "make room" in told[0]["hint"]
    put(here.data / "c", 5, "later")

    filler.unlink()
    here.until_verified(first + 405, 120)
    here.judge()
    here.until(lambda: not any(alarm["key"] == "journal" for alarm in alarms(here)), 10, "the alarm is over")
    assert here.json("journal", "check")["problems"] == []
    assert "journal.broken" not in here.log.read_text(), "something was done that the journal did not know"

    (here.state / "ballast").unlink(missing_ok=True)
    filler = fill(here.state)
    before = here.log.read_text().count("journal.full")
    put(here.data / "d", 400, "at the end", 3_000)
    here.until(lambda: here.log.read_text().count("journal.full") > before, 60, "the full disk is told again")
    begun = time.monotonic()
    assert here.stop() == 0
    assert time.monotonic() - begun < 10
    filler.unlink()
    here.start()
    here.until_verified(first + 805, 120)
    here.judge()
    assert here.stop() == 0
    assert "daemon.crashed" not in here.log.read_text()


def test_a_full_destination_is_waited_for(mounts, site):
    """No room where copies go: runs wait, an alarm says why, final names are whole; with room all goes on."""
    here = site()
    mounts.tmpfs(here.out, size="2m")
    here.write_rules(here.rule(retry={"initial": "1s", "longest": "3s", "give_up_after": "7d"}))
    here.start()
    for n in range(8):
        (here.data / f"{n}.tif").write_bytes(os.urandom(MiB // 2))
    here.until(lambda: any(alarm["hint"] for alarm in alarms(here)), 30, "an alarm with a hint")
    time.sleep(4)
    source = here.digests(here.data)
    copied = here.digests(here.out)
    there = {path: digest for path, digest in copied.items() if not os.path.basename(path).startswith(b".")}

    assert there.items() <= source.items(), "something partial has a final name"
    assert set(here.states()) <= {"PENDING", "STARTING", "ACTIVE", "INACTIVE", "SUCCEEDED", "VERIFIED"}, here.states()
    assert here.json("status", check=False)["alarms"]

    mounts.resize(here.out, "16m")
    here.until_verified(8, 60)
    here.judge()
    here.until(lambda: alarms(here) == [], 20, "the alarm is over")
    assert here.stop() == 0


# ------------------------------------------------------------------ two of them, ends, reloads


def test_a_second_daemon_is_refused(site):
    """By name and pid of the first, which goes on."""
    here = site()
    here.write_rules(here.rule())
    here.start()
    first = here.process
    assert first is not None
    second = subprocess.run(
        [sys.executable, "-P", "-m", "trigger_daemon", "serve", "--config", str(here.config)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip

    assert second.returncode == 1
    assert str(first.pid) in second.stderr and "trigger-daemon" in second.stderr, second.stderr
    put(here.data, 3)
    here.until_verified(3)
    here.judge()
    assert here.stop() == 0


def test_an_end_in_the_middle_of_copies_is_quick_and_they_are_resumed(site):
    """SIGTERM while large files are copied: exit 0 within ten seconds; after the start the same attempts go on."""
    here = site()
    here.settings["throttle"] = {"bandwidth": "8MB/s"}
    here.write_rules(here.rule())
    for n in range(3):
        (here.data / f"{n}.tif").write_bytes(os.urandom(24 * MiB))
    here.start()

    def written() -> int:
        return sum(path.stat().st_size for path in here.out.rglob(".*") if path.is_file())

    here.until(lambda: written() > MiB, 20, "copies are under way")
    time.sleep(1)
    assert here.ask("SELECT 1 FROM run WHERE state = 'ACTIVE'")
    begun = time.monotonic()
    assert here.stop() == 0
    assert time.monotonic() - begun < 10
    assert not [path for path in here.out.rglob("[!.]*") if path.is_file() and path.stat().st_size < 24 * MiB]
    there = written()

    here.settings["throttle"] = {}
    here.start()
    here.until_verified(3)
    here.judge()
    assert there > MiB
    assert here.ask("SELECT max(attempt) FROM attempt") == [(1,)]
    assert here.stop() == 0


def test_a_reload_takes_effect_and_a_fault_leaves_the_last_good_rules(site):
    """SIGHUP: other rules from now on. A fault is told by its place; the last good set goes on, over a restart too."""
    here = site()
    here.write_rules(here.rule(match=["*.tif"]))
    here.start()
    put(here.data, 2)
    here.until_verified(2)
    (here.data / "a.mrc").write_bytes(b"mrc")
    here.write_rules(here.rule(match=["*.tif", "*.mrc"]))
    assert here.process is not None
    here.process.send_signal(signal.SIGHUP)
    here.until_verified(3, 20)

    good = here.rule(match=["*.tif", "*.mrc"])
    text = json.dumps({"rules": [{**good, "quiescense": "1s"}]}, indent=1)
    (here.rules_dir / "rules.yaml").write_text(text)
    here.process.send_signal(signal.SIGHUP)
    here.until(lambda: bool((here.heartbeat() or {}).get("rules_fault")), 10, "the fault is told")
    for _ in range(2):
        fault = (here.heartbeat() or {})["rules_fault"]
        line = next(n for n, words in enumerate(text.splitlines(), 1) if "quiescense" in words)
        assert fault["file"].endswith("rules.yaml") and (fault["line"], fault["column"]) == (line, 4), fault
        assert "quiescense" in fault["message"]
        before = len(here.taken())
        put(here.data, 2, f"after{before}-")
        here.until_verified(before + 2, 20)
        assert here.stop() == 0
        here.start()
        here.until(lambda: bool((here.heartbeat() or {}).get("rules_fault")), 10, "the fault is told after a restart")

    here.write_rules(here.rule(match=["**"]))
    here.until(lambda: not (here.heartbeat() or {"rules_fault": 1})["rules_fault"], 20, "mended")
    (here.data / "any").write_bytes(b"any")
    here.until_verified(8, 20)
    here.judge()
    assert here.stop() == 0
