"""The whole daemon on real files: nothing missed, nothing early, nothing twice, with every source of events."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.site import Site

EVENTS = ("auto", "watchdog", "none")


@pytest.fixture
def site(shm_path):
    made: list[Site] = []

    def make(**keys) -> Site:
        made.append(Site(shm_path / f"site{len(made)}", **keys))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()


def put(path: Path, data: bytes = b"x" * 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize("events", EVENTS)
def test_every_file_version_is_in_exactly_one_batch(site, events):
    """Made directories, renames, hard links, a moved directory, before the start and while down: all once."""
    here = site(events=events)
    here.write_rules(here.rule(batch={"files": 80, "idle": "1s"}))
    outside = here.base / "outside"
    for n in range(300):
        put(here.data / "before" / f"{n}.tif", b"before %d" % n)
    here.start()
    for n in range(700):
        put(here.data / "made" / f"d{n:04}" / "e" / "f.tif", b"made %d" % n)
    for n in range(700):
        put(outside / f"r{n}", b"renamed %d" % n)
        target = here.data / "renamed" / f"{n}.tif"
        target.parent.mkdir(exist_ok=True)
        (outside / f"r{n}").rename(target)
    for n in range(200):
        put(outside / f"l{n}", b"linked %d" % n)
        (here.data / "linked").mkdir(exist_ok=True)
        os.link(outside / f"l{n}", here.data / "linked" / f"{n}.tif")
    for n in range(400):
        put(outside / "moved" / f"{n}.tif", b"moved %d" % n)
    (outside / "moved").rename(here.data / "moved")
    here.until_verified(2_300, 45)
    here.kill()
    for n in range(300):
        put(here.data / "down" / f"{n}.tif", b"down %d" % n)
    here.start()
    here.until_verified(2_600, 60)

    here.judge()
    assert here.stop() == 0


class Writer(threading.Thread):
    """Writes as a difficult instrument does, and notes when each file was last written."""

    def __init__(self, scene) -> None:
        super().__init__()
        self.scene = scene
        self.last: dict[str, float] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.scene(self)
        except BaseException as error:  # noqa: BLE001  told by the test
            self.error = error


def pausing(path: Path):
    """Pauses for less than the quiet period, many times."""

    def scene(writer: Writer) -> None:
        with path.open("wb") as file:
            for n in range(12):
                file.write(b"%4d" % n)
                file.flush()
                writer.last[path.name] = time.time()
                time.sleep(0.7)

    return scene


def standing_mtime(path: Path):
    """Sets its mtime back after every write."""

    def scene(writer: Writer) -> None:
        for n in range(12):
            with path.open("ab") as file:
                file.write(b"%4d" % n)
            os.utime(path, (1_000_000_000, 1_000_000_000))
            writer.last[path.name] = time.time()
            time.sleep(0.5)

    return scene


def future_mtime(path: Path):
    """Its clock is a year ahead."""

    def scene(writer: Writer) -> None:
        for n in range(12):
            with path.open("ab") as file:
                file.write(b"%4d" % n)
            ahead = time.time() + 31_536_000
            os.utime(path, (ahead, ahead))
            writer.last[path.name] = time.time()
            time.sleep(0.5)

    return scene


@pytest.mark.parametrize("events", EVENTS)
def test_difficult_writers_are_never_batched_early(site, events):
    """A pausing writer, one with a standing mtime, one from the future: nothing fires before its quiet period."""
    here = site(quiescence="1s", events=events)
    here.write_rules(here.rule())
    here.start()
    writers = [Writer(scene(here.data / f"{scene.__name__}.tif")) for scene in (pausing, standing_mtime, future_mtime)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.error is None
    here.until_verified(3)
    closed = {
        os.fsdecode(path): when
        for (when,), manifest in zip(
            here.ask("SELECT closed_time FROM batch ORDER BY id"), here.manifests(), strict=True
        )
        for path, _, _ in manifest
    }
    last = {name: when for writer in writers for name, when in writer.last.items()}

    here.judge()
    assert {name: closed[name] - when >= 1.0 for name, when in last.items()} == dict.fromkeys(last, True)


@pytest.mark.parametrize("events", EVENTS)
def test_each_rewrite_ends_as_its_own_version(site, events):
    """A batched file that is rewritten is a new version, sent once, and the destination holds the newest."""
    here = site(events=events)
    here.write_rules(here.rule())
    here.start()
    for n in range(1, 4):
        put(here.data / "a.tif", b"version %d" % n * n)
        here.until_verified(n)

    assert [len(m) for m in here.manifests()] == [1, 1, 1]
    assert len(here.taken()) == 3
    assert (here.out / "a.tif").read_bytes() == b"version 3" * 3


def test_awkward_names_go_all_the_way(site):
    """Spaces, newlines, literal brackets, 255 bytes, non-UTF-8: match, batch, copy, explain, JSON."""
    here = site()
    names = [
        b"with space.tif",
        b"new\nline.tif",
        b"Position_1_[30.0]_(2).tif",
        b"n" * 251 + b".tif",
        b"caf\xe9 \xff.tif",
        b"-rf.tif",
        b"{brace}.tif",
        "Grüße.tif".encode(),
        b"tab\there\x1b[31m.tif",
    ]
    here.write_rules(
        here.rule(match=["{directory}/{name}.tif"], batch={"group_by": ["directory"], "files": len(names)})
    )
    here.start()
    directory = os.fsencode(here.data) + b"/d [1]\n\xfe"
    os.mkdir(directory)
    for name in names:
        with open(directory + b"/" + name, "wb") as file:
            file.write(name)
    here.until_verified(len(names))

    here.judge()
    for name in names:
        told = here.json("explain", os.fsdecode(directory + b"/" + name))
        assert os.fsencode(told["path"]) == directory + b"/" + name
        assert told["rules"][0]["stage"] == "verified"
    run = here.json("runs", "show", "1")
    assert {os.fsencode(m["path"]).rsplit(b"/")[-1] for m in run["manifest"]} == set(names)
    text = here.cli("files", "list").stdout + here.cli("runs", "show", "1").stdout
    assert "\x1b[31m" not in text


@pytest.mark.parametrize("events", ["auto", "none"])
def test_killed_ten_times_and_every_file_arrives_once(site, events):
    """All verified, each in one batch, none partial under a final name, no attempt twice; `make prove` kills more."""
    here = site(events=events)
    here.write_rules(here.rule(match=["{d}/{n}.tif"], batch={"files": 40, "idle": "1s"}))
    total, kills = 1_600, 10
    sizes = [100, 5_000, 70_000]
    seen: dict[str, str] = {}
    done = threading.Event()

    def write(writer: Writer) -> None:
        for n in range(total):
            path = here.data / f"d{n % 50}" / f"{n}.tif"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"%06d" % n * (sizes[n % 3] // 6))
            time.sleep(0.004)

    def observe(writer: Writer) -> None:
        """Whatever bears a final name is whole, at every moment."""
        while not done.is_set():
            for path in here.out.rglob("*.tif"):
                if path.name.startswith("."):
                    continue
                n = int(path.stem)
                if path.read_bytes() != b"%06d" % n * (sizes[n % 3] // 6):
                    seen[path.name] = "partial under its final name"
            time.sleep(0.05)

    writer, observer = Writer(write), Writer(observe)
    here.start()
    writer.start()
    observer.start()
    pauses = [0.05 + (n * 7_919 % 1_000) / 1_000 for n in range(kills)]
    for pause in pauses:
        time.sleep(pause)
        here.kill()
        here.start(wait=False)
    writer.join()
    here.until_verified(total, 180)
    done.set()
    observer.join()

    assert writer.error is None and observer.error is None
    assert seen == {}
    here.judge()
    repeated = here.ask("SELECT run, attempt, count(*) FROM attempt GROUP BY run, attempt HAVING count(*) > 1")
    assert repeated == []
    assert here.json("journal", "check")["problems"] == []
    assert here.stop() == 0
    assert not [p for p in here.out.rglob(".*") if p.is_file()], "temporary files were left"


def test_moved_root_content_is_not_confused_with_deletion(site):
    """A directory that is moved out of the tree takes nothing with it that was batched."""
    here = site()
    here.write_rules(here.rule())
    here.start()
    for n in range(50):
        put(here.data / "d" / f"{n}.tif", b"%d" % n)
    here.until_verified(50)
    shutil.move(here.data / "d", here.base / "away")
    shutil.move(here.base / "away", here.data / "d")
    put(here.data / "e.tif")
    here.until_verified(51)

    here.judge()
