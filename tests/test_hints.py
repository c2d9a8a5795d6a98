"""Laws of the sources of hints, on real file systems with the kernel's own events."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trigger_daemon.errors import TriggerError
from trigger_daemon.hints import Hints, HintSource, WatchLimit, none, open_source, watchdog
from trigger_daemon.hints.box import Box

if sys.platform != "linux":
    pytest.skip("inotify and namespaces are Linux", allow_module_level=True)

from trigger_daemon.hints import inotify

DEADLINE_S = 20.0
REPOSITORY = Path(__file__).parent.parent


class Hand:
    """A monotonic clock moved by hand."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def monotonic(self) -> float:
        return self.at

    def utc(self) -> float:
        return self.at


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; fail with its name at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


class Worker:
    """A root's worker with nothing in it but the order: watch, then list, then go down."""

    def __init__(self, source: HintSource, path: Path, root: int = 1) -> None:
        self.source = source
        self.path = os.fsencode(path)
        self.root = root
        self.found: set[bytes] = set()
        self.heard: dict[bytes, str] = {}
        self.gone = False
        self.hold = threading.Event()  # while clear, whoever rings waits here: the source's reader
        self.hold.set()
        self.held = threading.Event()
        self.rings = threading.Event()
        self.ended = False
        source.open(root, self.path, self.ring)
        self.sweep(b"")
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def ring(self) -> None:
        self.rings.set()
        if not self.hold.is_set():
            self.held.set()
            self.hold.wait()

    def sweep(self, directory: bytes) -> None:
        here = b"/".join((self.path, directory)) if directory else self.path
        try:
            self.source.watch(self.root, directory)
            entries = list(os.scandir(here))
        except OSError:
            return
        for entry in entries:
            below = directory + b"/" + entry.name if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                self.sweep(below)
            else:
                self.found.add(below)

    def work(self) -> None:
        while not self.ended:
            self.rings.wait(0.2)
            self.rings.clear()
            hints = self.source.take(self.root)
            if hints is None:
                continue
            self.gone |= hints.root_gone
            for directory, names in hints.names.items():
                for name, signal in names.items():
                    below = directory + b"/" + name if directory else name
                    self.heard[below] = signal
                    if os.path.lexists(self.path + b"/" + below):
                        self.found.add(below)
            for directory in hints.dirs:
                self.sweep(directory)
            if hints.all:
                self.sweep(b"")

    def stop(self) -> None:
        self.ended = True
        self.hold.set()
        self.rings.set()
        self.thread.join(DEADLINE_S)


class Holder:
    """A root whose bell can be held: the reader that rings it stands still, and the kernel's queue fills."""

    def __init__(self, source: HintSource, path: Path) -> None:
        self.path = path
        self.source = source
        self.held, self.free = threading.Event(), threading.Event()
        self.free.set()
        source.open(1, os.fsencode(path), self.ring)
        source.watch(1, b"")

    def ring(self) -> None:
        if not self.free.is_set():
            self.held.set()
            self.free.wait(DEADLINE_S)

    def hold(self) -> None:
        """Hold the reader, at the cost of two events."""
        self.free.clear()
        (self.path / "bell").write_bytes(b"")
        until(self.held.is_set, "the reader held")

    def release(self) -> None:
        self.free.set()


@pytest.fixture
def source() -> Iterator[inotify.Source]:
    source = inotify.Source()
    yield source
    source.stop()


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def slow(hand: Hand) -> Iterator[inotify.Source]:
    """A source whose clock is moved by hand."""
    source = inotify.Source(clock=hand)
    yield source
    source.stop()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.stop()


def after(source: HintSource, events: int, root: int = 1) -> Hints:
    """Return what gathered once so many events were read in all."""
    until(lambda: source.counters()["events"] >= events, f"{events} events")
    hints = source.take(root)
    assert hints is not None
    return hints


def opened(source: HintSource, path: Path, *directories: str, root: int = 1) -> None:
    source.open(root, os.fsencode(path), lambda: None)
    for directory in ("", *directories):
        source.watch(root, os.fsencode(directory))


def kernel_watches(source: inotify.Source) -> int:
    """Count what the kernel holds, not what the source believes."""
    assert source._queue is not None
    return Path(f"/proc/self/fdinfo/{source._queue.fd}").read_text().count("inotify wd:")


# ------------------------------------------------------------------------ signals


def test_a_write_is_a_close_and_a_rename_a_rename(source: inotify.Source, tmp_path: Path) -> None:
    """The signal says how a file came: written and closed, renamed, or neither."""
    watched = tmp_path / "root"
    watched.mkdir()
    opened(source, watched)
    (tmp_path / "elsewhere").write_bytes(b"x")

    (watched / "written").write_bytes(b"x")  # create, close
    (tmp_path / "elsewhere").rename(watched / "renamed")  # moved to
    os.link(watched / "written", watched / "linked")  # create
    os.symlink("written", watched / "symlink")  # create

    assert after(source, 5).names == {
        b"": {b"written": "close", b"renamed": "rename", b"linked": "none", b"symlink": "none"}
    }


@pytest.mark.parametrize("reads", ["one", "two"])
def test_a_rename_does_not_vouch_for_a_file_made_after_it(source: inotify.Source, tmp_path: Path, reads: str) -> None:
    """A name taken by a new file loses what was said of the old one, heard in one read or in two."""
    holder = Holder(source, tmp_path)
    if reads == "one":
        holder.hold()
    (tmp_path / "a.tmp").write_bytes(b"x")
    (tmp_path / "a.tmp").rename(tmp_path / "a")
    if reads == "two":
        until(lambda: source.counters()["events"] >= 3, "the rename")
    (tmp_path / "a").unlink()
    handle = (tmp_path / "a").open("wb")
    holder.release()

    hints = after(source, 6 if reads == "one" else 4)
    handle.close()

    assert hints.names[b""][b"a"] == "none"


def test_a_growing_file_is_silent_until_it_is_closed(source: inotify.Source, tmp_path: Path) -> None:
    """Writes cost no events; neither do our own listings and reads."""
    opened(source, tmp_path)
    with (tmp_path / "movie").open("wb", buffering=0) as movie:
        for _ in range(1_000):
            movie.write(b"x")
        os.listdir(tmp_path)
        (tmp_path / "movie").read_bytes()

    hints = after(source, 2)

    assert hints.names == {b"": {b"movie": "close"}}
    assert source.counters()["events"] == 2


def test_names_are_bytes(source: inotify.Source, tmp_path: Path) -> None:
    """A name that is no UTF-8, of a file or of its directory, comes through as it is."""
    odd = os.fsencode(tmp_path) + b"/sub\xff"
    os.mkdir(odd)
    source.open(1, os.fsencode(tmp_path), lambda: None)
    source.watch(1, b"sub\xff")
    with open(odd + b"/f\xfe\n[1]", "wb"):
        pass

    assert after(source, 2).names == {b"sub\xff": {b"f\xfe\n[1]": "close"}}


def test_a_worker_is_woken_once_until_it_takes(source: inotify.Source, tmp_path: Path) -> None:
    """However much is heard, a box rings when it goes from none to some."""
    rings: list[int] = []
    source.open(1, os.fsencode(tmp_path), lambda: rings.append(1))
    source.watch(1, b"")
    for index in range(50):
        (tmp_path / f"{index}").write_bytes(b"")
    hints = after(source, 100)
    first = len(rings)
    (tmp_path / "more").write_bytes(b"")
    until(lambda: len(rings) == 2, "a second ring")

    assert (first, len(hints.names[b""])) == (1, 50)


# ------------------------------------------------------------------------ directories


def test_mkdir_p_loses_nothing(source: inotify.Source, tmp_path: Path, workers: list[Worker]) -> None:
    """Files written into directories made a moment before, by another process, are all found."""
    workers.append(Worker(source, tmp_path))
    script = """if True:
        import os, sys
        for i in range(500):
            os.makedirs(f"{sys.argv[1]}/{i}/b/c")
            open(f"{sys.argv[1]}/{i}/b/c/f", "wb").close()
        """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    wanted = {b"%d/b/c/f" % index for index in range(500)}

    until(lambda: wanted <= workers[0].found, "all files found")
    assert source.counters()["overflows"] == 0


def test_a_directory_moved_in_is_swept_and_watched(
    source: inotify.Source, tmp_path: Path, workers: list[Worker]
) -> None:
    """What it held is found, and what comes later, at any depth."""
    watched = tmp_path / "root"
    watched.mkdir()
    (tmp_path / "outside/deep").mkdir(parents=True)
    (tmp_path / "outside/deep/before").write_bytes(b"")
    workers.append(Worker(source, watched))

    (tmp_path / "outside").rename(watched / "in")
    until(lambda: b"in/deep/before" in workers[0].found, "what it held")
    (watched / "in/deep/later").write_bytes(b"")

    until(lambda: workers[0].heard.get(b"in/deep/later") == "close", "what came later")


def test_a_directory_renamed_inside_speaks_with_its_new_name(
    source: inotify.Source, tmp_path: Path, workers: list[Worker]
) -> None:
    """Its watches keep their numbers; the paths they stand for follow, at every depth."""
    (tmp_path / "old/deep").mkdir(parents=True)
    workers.append(Worker(source, tmp_path))

    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new/deep/first").write_bytes(b"")
    until(lambda: b"new/deep/first" in workers[0].found, "the first file")
    until(lambda: source.counters()["watches"] == 3, "all watched again")
    (tmp_path / "new/deep/second").write_bytes(b"")
    until(lambda: workers[0].heard.get(b"new/deep/second") == "close", "the second file")

    assert not any(path.startswith(b"old/") for path in workers[0].heard)
    assert kernel_watches(source) == 3


def test_a_directory_added_before_its_move_was_heard_is_swept_again(source: inotify.Source, tmp_path: Path) -> None:
    """The worker may see a rename before the reader does: the new path stands, the old is forgotten."""
    (tmp_path / "old").mkdir()
    holder = Holder(source, tmp_path)
    source.watch(1, b"old")
    holder.hold()
    (tmp_path / "old").rename(tmp_path / "new")
    source.watch(1, b"new")
    known = set(source._roots[1].watched)
    holder.release()

    assert known == {b"", b"new"}
    assert b"new" in after(source, 4).dirs  # bell twice, moved to, moved self


def test_a_directory_moved_out_says_nothing_more(source: inotify.Source, tmp_path: Path) -> None:
    """Its watches still report; a new directory at its old place must not be vouched for by them."""
    watched = tmp_path / "root"
    (watched / "a/deep").mkdir(parents=True)
    opened(source, watched, "a", "a/deep")

    (watched / "a").rename(tmp_path / "out")
    (watched / "a/deep").mkdir(parents=True)
    (tmp_path / "out/one").write_bytes(b"")
    (tmp_path / "out/deep/two").write_bytes(b"")
    (watched / "sentinel").write_bytes(b"")
    hints = after(source, 8)  # moved self, mkdir, two times two, two

    assert hints.names == {b"": {b"sentinel": "close"}}
    assert b"a" in hints.dirs


def test_watches_that_lead_nowhere_are_given_back_slowly(slow: inotify.Source, hand: Hand, tmp_path: Path) -> None:
    """A moved-out tree's and a closed root's watches go, but not while their directory may yet be added again."""
    (tmp_path / "root/a/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    opened(slow, tmp_path / "root", "a", "a/deep")
    opened(slow, tmp_path / "other", root=2)
    (tmp_path / "root/a").rename(tmp_path / "out")
    until(lambda: slow.counters()["watches"] == 2, "forgotten")
    slow.close(2)
    slow.alive()
    young = kernel_watches(slow)

    hand.at += inotify.STALE_S + 1
    slow.alive()

    until(lambda: kernel_watches(slow) == 1, "given back")
    assert young == 4
    assert slow.counters()["watches"] == 1


def test_a_deleted_directory_is_forgotten(source: inotify.Source, tmp_path: Path) -> None:
    """Deletion is for sweeps to judge: it is no hint, and costs no memory."""
    (tmp_path / "a").mkdir()
    opened(source, tmp_path, "a")
    (tmp_path / "a").rmdir()

    until(lambda: source.counters()["watches"] == 1, "forgotten")
    assert source.take(1) is None


def test_nested_roots_both_hear(source: inotify.Source, tmp_path: Path) -> None:
    """One directory in two roots has one watch, and both roots its hints."""
    (tmp_path / "inner").mkdir()
    opened(source, tmp_path, "inner")
    opened(source, tmp_path / "inner", root=2)
    (tmp_path / "inner/f").write_bytes(b"")

    assert after(source, 2).names == {b"inner": {b"f": "close"}}
    assert after(source, 2, root=2).names == {b"": {b"f": "close"}}


def test_only_directories_are_watched(source: inotify.Source, tmp_path: Path) -> None:
    """A file, a symlink or nothing at that place is an error, not a silent watch on something else."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_bytes(b"")
    opened(source, tmp_path)

    for name, code in ((b"link", errno.ENOTDIR), (b"file", errno.ENOTDIR), (b"none", errno.ENOENT)):
        with pytest.raises(OSError) as caught:
            source.watch(1, name)
        assert caught.value.errno == code


# ------------------------------------------------------------------------ roots


def test_a_deleted_root_is_told_and_its_successor_heard(
    source: inotify.Source, tmp_path: Path, workers: list[Worker]
) -> None:
    """A root made anew is deaf until it is watched again, which works."""
    root = tmp_path / "root"
    root.mkdir()
    workers.append(Worker(source, root))
    root.rmdir()
    until(lambda: workers[0].gone, "root gone")
    root.mkdir()
    source.watch(1, b"")
    (root / "f").write_bytes(b"")

    until(lambda: workers[0].heard.get(b"f") == "close", "heard again")


def test_a_root_renamed_away_is_gone_and_says_nothing_more(source: inotify.Source, tmp_path: Path) -> None:
    """What happens in the directory that moved away is not told of the path it left; watched again, it is heard."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    opened(source, root, "a")
    root.rename(tmp_path / "away")
    (tmp_path / "away/a/f").write_bytes(b"")
    away = after(source, 3)
    (tmp_path / "away").rename(root)
    until(lambda: source.counters()["events"] >= 4, "the way back")
    opened(source, root, "a")
    (root / "a/g").write_bytes(b"")
    back = after(source, 6)

    assert (away.root_gone, away.all, away.names) == (True, True, {})
    assert (back.root_gone, back.names) == (False, {b"a": {b"g": "close"}})


# ------------------------------------------------------------------------ bounds


def test_a_full_directory_becomes_one_hint(tmp_path: Path) -> None:
    """Past the bound the fullest directory is swept instead of its names; the others keep theirs."""
    source = inotify.Source(names_max=100)
    (tmp_path / "big").mkdir()
    opened(source, tmp_path, "big")
    (tmp_path / "small").write_bytes(b"")
    for index in range(100):
        (tmp_path / f"big/{index}").write_bytes(b"")
    hints = after(source, 202)
    source.stop()

    assert hints.dirs == {b"big"}
    assert hints.names[b""] == {b"small": "close"}
    assert not hints.all
    assert sum(map(len, hints.names.values())) <= 100


def test_too_much_everywhere_becomes_the_whole_root() -> None:
    """Names spread thin, or too many directories, end as one sweep of the root: never more than the bound is held."""
    names, directories = Box(1, b"/", lambda: None, names_max=100), Box(1, b"/", lambda: None)
    for index in range(101):
        names.put(b"%d" % index, {b"f": "none"})
    for index in range(20_001):
        directories.put_directory(b"%d" % index)

    assert names.take() == Hints(all=True)
    assert directories.take() == Hints(all=True)


def test_an_overflow_loses_nothing(source: inotify.Source, tmp_path: Path, workers: list[Worker]) -> None:
    """With the kernel's queue overflowed all is found by the sweep it asks for, and heard from then on, everywhere."""
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queue > 100_000:
        pytest.skip("this machine's queue is too long to overflow in a test")
    (tmp_path / "known").mkdir()
    worker = Worker(source, tmp_path)
    workers.append(worker)
    worker.hold.clear()
    (tmp_path / "first").write_bytes(b"")
    until(worker.held.is_set, "the reader held")
    wanted = {b"known/%d" % index for index in range(queue // 2 + 500)}
    for path in wanted:
        os.close(os.open(os.fsencode(tmp_path) + b"/" + path, os.O_CREAT | os.O_WRONLY))
    for index in range(50):
        (tmp_path / f"{index}/deep").mkdir(parents=True)
        (tmp_path / f"{index}/deep/f").write_bytes(b"")
        wanted.add(b"%d/deep/f" % index)
    worker.hold.set()

    until(lambda: wanted <= worker.found, "all found")
    assert source.counters()["overflows"] == 1

    later = {b"%d/deep/g" % index for index in range(50)} | {b"known/later"}
    until(lambda: source.counters()["watches"] == 102, "all watched")
    for path in later:
        (tmp_path / os.fsdecode(path)).write_bytes(b"")
    until(lambda: later <= worker.heard.keys(), "all heard")
    assert source.counters()["overflows"] == 1


def test_repeated_overflows_are_told(slow: inotify.Source, hand: Hand, tmp_path: Path) -> None:
    """The third overflow within a minute names the setting to raise; a quiet minute takes it back."""
    opened(slow, tmp_path)
    assert slow._queue is not None
    record = inotify.RECORD.pack(-1, inotify.IN_Q_OVERFLOW, 0, 0)
    slow._fold(slow._queue, record * 2)
    few = slow.alive()
    slow._fold(slow._queue, record)
    told = slow.alive()
    hand.at += 61

    assert few == ""
    assert "fs.inotify.max_queued_events" in told
    assert slow.alive() == ""


# ------------------------------------------------------------------------ what cannot happen


def test_a_live_directory_that_lost_its_watch_asks_for_a_sweep(source: inotify.Source, tmp_path: Path) -> None:
    """A watch that ends under a directory that lives on is not passed over."""
    (tmp_path / "a").mkdir()
    opened(source, tmp_path, "a")
    assert source._queue is not None
    inotify._inotify_rm_watch(source._queue.fd, source._roots[1].watched[b"a"])

    assert after(source, 1).all
    assert source.counters()["watches"] == 1


def test_an_unknown_watch_asks_for_a_sweep_once(source: inotify.Source, tmp_path: Path) -> None:
    """Events of a watch nobody knows mean that something is lost; once told, they are dropped."""
    (tmp_path / "a").mkdir()
    opened(source, tmp_path)
    assert source._queue is not None
    inotify._inotify_add_watch(source._queue.fd, os.fsencode(tmp_path / "a"), inotify.MASK)
    (tmp_path / "a/f").write_bytes(b"")
    first = after(source, 2)
    (tmp_path / "a/g").write_bytes(b"")
    until(lambda: source.counters()["events"] >= 4, "the second file")

    assert first.all
    assert source.take(1) is None


def test_a_worker_that_cannot_be_woken_is_told_and_the_others_hear(source: inotify.Source, tmp_path: Path) -> None:
    """One root's broken bell silences no other root."""

    def broken() -> None:
        raise RuntimeError("no such loop")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source.open(1, os.fsencode(tmp_path / "a"), broken)
    source.watch(1, b"")
    opened(source, tmp_path / "b", root=2)
    (tmp_path / "a/f").write_bytes(b"")
    (tmp_path / "b/f").write_bytes(b"")

    assert after(source, 4, root=2).names == {b"": {b"f": "close"}}
    assert "no such loop" in source.alive()
    assert source.alive() == ""


@pytest.mark.parametrize("broken", ["descriptor", "thread"])
def test_a_dead_reader_begins_again_and_asks_for_sweeps(
    slow: inotify.Source, tmp_path: Path, broken: str, hand: Hand
) -> None:
    """Whatever ends the reader, it is told, counted, started again, and every root is swept and then heard."""
    opened(slow, tmp_path)
    queue, reader = slow._queue, slow._reader
    assert queue is not None and reader is not None
    if broken == "descriptor":
        with open("/dev/null", "rb") as null:
            os.dup2(null.fileno(), queue.fd)
    else:
        queue.places = None  # type: ignore[assignment]
    (tmp_path / "unheard").write_bytes(b"")
    os.eventfd_write(queue.bell, 1)  # a descriptor that is another now says nothing
    reader.join(DEADLINE_S)
    told = slow.alive()
    hints = slow.take(1)
    slow.watch(1, b"")
    events = slow.counters()["events"]
    (tmp_path / "heard").write_bytes(b"")

    assert "ended" in told and "swept" in told
    assert hints is not None and hints.all
    assert after(slow, events + 2).names[b""][b"heard"] == "close"
    assert slow.counters()["restarts"] == 1
    assert slow.alive() == ""


def test_a_reader_that_keeps_dying_is_started_less_and_less_often(
    slow: inotify.Source, tmp_path: Path, hand: Hand
) -> None:
    """The pause doubles with each death in a row, and a minute of health takes it back."""
    opened(slow, tmp_path)

    def die() -> None:
        queue, reader = slow._queue, slow._reader
        assert queue is not None and reader is not None
        queue.bell, bell = -1, queue.bell
        os.close(queue.fd)
        os.eventfd_write(bell, 1)
        reader.join(DEADLINE_S)
        os.close(bell)

    die()
    first = slow.alive()
    die()
    at_once = slow.alive()
    hand.at += 1.1
    second = slow.alive()
    die()
    hand.at += 1.1
    third = slow.alive()
    hand.at += 1.0

    assert "swept" in first and "swept" in second
    assert "starts again in 1 s" in at_once and "starts again in 1 s" in third
    assert "swept" in slow.alive()
    assert slow.counters()["restarts"] == 3


def test_a_stuck_reader_is_told(slow: inotify.Source, hand: Hand, tmp_path: Path) -> None:
    """A reader that lives but does not read while events wait is not called healthy."""
    holder = Holder(slow, tmp_path)
    holder.hold()
    (tmp_path / "b").write_bytes(b"")
    before = slow.alive()
    hand.at += inotify.STUCK_S + 1
    told = slow.alive()
    holder.release()

    assert before == ""
    assert "has not read" in told
    until(lambda: slow.alive() == "", "healthy again")


def test_stop_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    """An idle reader ends at once, with its thread and its descriptors; a later call is refused, not fatal."""
    before = len(os.listdir("/proc/self/fd"))
    source = inotify.Source()
    opened(source, tmp_path)
    reader = source._reader
    began = time.monotonic()
    source.stop()
    took = time.monotonic() - began

    assert reader is not None and not reader.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before
    assert took < 0.5
    assert source.alive() == ""
    with pytest.raises(WatchLimit):
        source.watch(1, b"")


# ------------------------------------------------------------------------ limits, in a namespace of their own


def boxed(script: str, *arguments: object, flags: str = "-Ur") -> dict[str, object]:
    """Run a script in new namespaces; where they are refused that is a failure in CI and a skip elsewhere."""
    probe = subprocess.run(["unshare", flags, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail(f"namespaces are refused here: {probe.stderr}")
        pytest.skip(f"namespaces are refused here: {probe.stderr}")
    done = subprocess.run(
        ["unshare", flags, sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


WATCHES = """if True:
    import json, os, sys
    from pathlib import Path
    from trigger_daemon.hints import WatchLimit, inotify
    setting = Path("/proc/sys/user/max_inotify_watches")
    setting.write_text("10")
    root = Path(sys.argv[1])
    class Hand:
        at = 0.0
        def monotonic(self): return self.at
        def utc(self): return self.at
    hand = Hand()
    source = inotify.Source(clock=hand)
    source.open(1, os.fsencode(root), lambda: None)
    names = [b""] + [b"%d" % i for i in range(29)]
    for name in names[1:]: os.mkdir(os.fsencode(root) + b"/" + name)
    def sweep():
        refused = []
        for name in names:
            try: source.watch(1, name)
            except WatchLimit as error: refused.append((error.message, error.hint))
        return refused
    first = sweep()
    again = sweep()
    told, counters = source.alive(), source.counters()
    setting.write_text("25")
    cheap = len(sweep())
    hand.at += 31
    retried = len(sweep())
    source.take(1)
    setting.write_text("100")
    lifted = source.alive()
    hints = source.take(1)
    last = sweep()
    source.stop()
    print(json.dumps(dict(first=len(first), message=first[-1][0], hint=first[-1][1], again=len(again), told=told,
        counters=counters, cheap=cheap, retried=retried, all=bool(hints and hints.all), last=len(last),
        after=source.alive())))
"""


def test_the_watch_limit_is_named_and_outlived(tmp_path: Path) -> None:
    """Past the limit: the setting and its value by name, what is watched stays so, the kernel is asked seldom,
    and raising the setting has everything watched and swept."""
    fs_limit = Path("/proc/sys/fs/inotify/max_user_watches").read_text()
    answer = boxed(WATCHES, tmp_path)

    assert (answer["first"], answer["again"]) == (20, 20)
    message, hint = str(answer["message"]), str(answer["hint"])
    assert "fs.inotify.max_user_watches is " in message
    assert "user.max_inotify_watches of this user namespace (container) is 10" in message
    assert "10 directories are watched here, at least 20 are not" in message
    assert "sysctl -w user.max_inotify_watches=" in hint
    assert "max_inotify_watches" in str(answer["told"])
    assert answer["counters"] == {"watches": 10, "unwatched": 20, "events": 0, "overflows": 0, "restarts": 0}
    assert (answer["cheap"], answer["retried"]) == (20, 5)
    assert (answer["all"], answer["last"]) == (True, 0)
    assert Path("/proc/sys/fs/inotify/max_user_watches").read_text() == fs_limit


INSTANCES = """if True:
    import json, os, sys
    from pathlib import Path
    from trigger_daemon.hints import WatchLimit, inotify
    Path("/proc/sys/user/max_inotify_instances").write_text("1")
    other = inotify.Source()
    source = inotify.Source()
    source.open(1, os.fsencode(sys.argv[1]), lambda: None)
    try: source.watch(1, b"")
    except WatchLimit as error: refused = error.message
    told = source.alive()
    other.stop()
    source._again_at = 0.0
    begun = source.alive()
    hints = source.take(1)
    source.watch(1, b"")
    print(json.dumps(dict(refused=refused, told=told, all=bool(hints and hints.all), after=source.alive())))
    source.stop()
"""


def test_the_instance_limit_is_named_and_outlived(tmp_path: Path) -> None:
    """Without a descriptor the source lives, says why it is deaf, and hears as soon as one is to be had."""
    answer = boxed(INSTANCES, tmp_path)

    assert "fs.inotify.max_user_instances is " in str(answer["refused"])
    assert "user.max_inotify_instances of this user namespace (container) is 1" in str(answer["refused"])
    assert "starts again" in str(answer["told"])
    assert (answer["all"], answer["after"]) == (True, "")


HUNG = """if True:
    import ctypes, json, os, sys, threading, time
    from trigger_daemon.hints import inotify
    good, bad = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2])
    fuse = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse
    if libc.mount(b"hung", bad, b"fuse", 6, options):  # a server that never answers
        raise OSError(ctypes.get_errno(), "mount")
    source = inotify.Source()
    source.open(1, good, lambda: None)
    source.open(2, bad, lambda: None)
    stuck = threading.Thread(target=source.watch, args=(2, b"sub"), daemon=True)
    stuck.start()
    deadline = time.monotonic() + 10
    while source._queue.adding == 0 and time.monotonic() < deadline: time.sleep(0.001)
    source.watch(1, b"")
    open(good + b"/f", "wb").close()
    hints = None
    while hints is None and time.monotonic() < deadline: time.sleep(0.001); hints = source.take(1)
    alive = source.alive()
    began = time.monotonic()
    source.stop()
    took = time.monotonic() - began
    heard = [os.fsdecode(name) for name in hints.names[b""]]
    print(json.dumps(dict(heard=heard, stuck=stuck.is_alive(), alive=alive, took=took)))
    sys.stdout.flush()
    os._exit(0)
"""


def test_a_hung_mount_holds_only_its_own_worker(tmp_path: Path) -> None:
    """While one `watch` hangs in the kernel, others are added, events read, and the end is quick."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    answer = boxed(HUNG, tmp_path / "good", tmp_path / "bad", flags="-Urm")

    assert answer["heard"] == ["f"]
    assert (answer["stuck"], answer["alive"]) == (True, "")
    assert float(str(answer["took"])) < 0.5


# ------------------------------------------------------------------------ the others


def test_the_setting_chooses_the_source() -> None:
    """`auto` is inotify on Linux; each name gives its own source."""
    kinds = []
    for setting in ("auto", "inotify", "watchdog", "none"):
        chosen = open_source(setting)
        kinds.append(chosen.kind)
        chosen.stop()

    assert kinds == ["inotify", "inotify", "watchdog", "none"]


def test_none_says_nothing_and_why() -> None:
    """The silent source is healthy when it was asked for, and says what is missing when it was not."""
    silent = none.Source()
    silent.open(1, b"/", lambda: None)
    silent.watch(1, b"")

    assert (silent.take(1), silent.alive()) == (None, "")
    assert none.Source("watchdog is not installed").alive() == "watchdog is not installed"


@pytest.fixture
def dog(hand: Hand) -> Iterator[watchdog.Source]:
    source = watchdog.Source(clock=hand)
    yield source
    source.stop()


def test_watchdog_hints_like_inotify(dog: watchdog.Source, tmp_path: Path, workers: list[Worker]) -> None:
    """Through the library too: closes, renames, new directories and those moved in, odd names."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/before").write_bytes(b"")
    workers.append(Worker(dog, root))
    (root / "a/f").write_bytes(b"")
    until(lambda: workers[0].heard.get(b"a/f") == "close", "the close")
    (root / "a/f").rename(root / "a/g")
    until(lambda: workers[0].heard.get(b"a/g") == "rename", "the rename")
    (tmp_path / "out").rename(root / "in")
    until(lambda: b"in/deep/before" in workers[0].found, "what was moved in")
    with open(os.fsencode(root) + b"/a/\xff", "wb"):
        pass
    until(lambda: workers[0].heard.get(b"a/\xff") == "close", "the odd name")

    assert dog.alive() == ""


def test_watchdog_renaming_a_directory_vouches_for_no_file_in_it(
    dog: watchdog.Source, tmp_path: Path, workers: list[Worker]
) -> None:
    """The library invents a move for each file below; such a file may still be written."""
    (tmp_path / "a").mkdir()
    handle = (tmp_path / "a/growing").open("wb")
    workers.append(Worker(dog, tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    until(lambda: b"b/growing" in workers[0].heard, "the invented move")
    signal = workers[0].heard[b"b/growing"]
    handle.close()

    assert signal == "none"


def test_watchdog_a_deleted_root_is_told_and_its_successor_heard(
    dog: watchdog.Source, hand: Hand, tmp_path: Path, workers: list[Worker]
) -> None:
    """The library stays deaf and calls itself alive; we do not believe it."""
    root = tmp_path / "root"
    root.mkdir()
    workers.append(Worker(dog, root))
    root.rmdir()
    until(lambda: dog.alive() != "", "the complaint")
    until(lambda: workers[0].gone, "root gone")
    root.mkdir()
    hand.at += 5

    def healthy() -> bool:
        hand.at += 1
        return dog.alive() == ""

    until(healthy, "a new observer")
    (root / "f").write_bytes(b"")
    until(lambda: workers[0].heard.get(b"f") == "close", "heard again")
    assert dog.counters()["restarts"] == 1


def test_watchdog_a_root_replaced_by_another_is_watched_anew(
    dog: watchdog.Source, tmp_path: Path, workers: list[Worker]
) -> None:
    """The observer of a directory that moved away is not kept for the one that took its path."""
    root = tmp_path / "root"
    root.mkdir()
    workers.append(Worker(dog, root))
    root.rename(tmp_path / "away")
    root.mkdir()
    dog.watch(1, b"")
    (root / "f").write_bytes(b"")

    until(lambda: workers[0].heard.get(b"f") == "close", "heard")


def test_watchdog_overflows_ask_for_sweeps_and_then_for_rest(
    dog: watchdog.Source, hand: Hand, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A log line is the library's only word about lost events: each asks for sweeps, five in a minute end it."""
    opened(dog, tmp_path)
    printed = io.StringIO()
    console = logging.StreamHandler(printed)
    logging.getLogger().addHandler(console)
    request.addfinalizer(lambda: logging.getLogger().removeHandler(console))
    logger = logging.getLogger("watchdog.observers.inotify_c")
    logger.warning("Inotify queue overflowed; filesystem events were lost")
    first = dog.take(1)
    once = dog.alive()
    for _ in range(4):
        logger.warning("Inotify queue overflowed; filesystem events were lost")
    told = dog.alive()

    assert first is not None and first.all
    assert "events were lost" in once
    assert "overflowed 5 times" in told
    with pytest.raises(WatchLimit):
        dog.watch(1, b"")
    hand.at += watchdog.SCAN_ONLY_S + 1
    dog.watch(1, b"")
    assert dog.counters()["overflows"] == 5
    assert printed.getvalue() == ""


def test_watchdog_refuses_a_tree_it_could_not_recover(hand: Hand, tmp_path: Path) -> None:
    """Too many directories, at the start or by growth: swept only, and said so."""
    dog = watchdog.Source(clock=hand, directories_max=5)
    for index in range(4):
        (tmp_path / f"{index}").mkdir()
    opened(dog, tmp_path, *map(str, range(4)))
    healthy = dog.alive()
    with pytest.raises(WatchLimit):
        for index in range(10):
            dog.watch(1, b"new%d" % index)
    grown = dog.alive()
    (tmp_path / "4").mkdir()
    hand.at += watchdog.SCAN_ONLY_S + 1
    with pytest.raises(WatchLimit):
        dog.watch(1, b"")
    dog.stop()

    assert healthy == ""
    assert "grown beyond 5 directories" in grown


def test_watchdog_dead_threads_are_told_and_replaced(
    dog: watchdog.Source, hand: Hand, tmp_path: Path, workers: list[Worker], capfd: pytest.CaptureFixture[str]
) -> None:
    """A thread of the library that dies is told, without a trace on the terminal, and a new observer hears."""
    workers.append(Worker(dog, tmp_path))
    observer = dog._roots[1].observer
    assert observer is not None
    observer.event_queue.put(("no", "such", "event"))
    observer.join(DEADLINE_S)
    told = dog.alive()

    def healthy() -> bool:
        hand.at += 1
        return dog.alive() == ""

    until(healthy, "a new observer")
    (tmp_path / "f").write_bytes(b"")
    until(lambda: workers[0].heard.get(b"f") == "close", "heard again")
    assert "died" in told and "dispatcher has ended" in told
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("version", ["6.0.0", "7.0.0", "8.0.0"])
def test_watchdog_versions_that_lose_events_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only versions whose recovery was measured are used; the message says which."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(TriggerError) as caught:
        watchdog.Source()

    assert version in caught.value.message
    assert ">=7.1,<8" in caught.value.hint
