"""Laws of how `copy` lives beside the instrument: one limit for all, standing still, and room that stays free."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from test_copy import MIB, Lab, lab, needs_root, noise
from trigger_daemon.actions import Request, _copy_pace, _copy_room
from trigger_daemon.actions._copy_files import BLOCK, PIECE
from trigger_daemon.actions._copy_pace import BURST_S, PIECES_PER_S, RULES, Pace, Tills
from trigger_daemon.actions._copy_room import NoRoom, Rooms
from trigger_daemon.actions._copy_system import cached_blocks
from trigger_daemon.core.model import Scope

__all__ = ["lab"]

LIMIT = 20_000_000
WINDOW_S = 4.0


def read_by(pid: int) -> int:
    """What the thread that reads the sources has read, in bytes: the kernel's figure."""
    return int(Path(f"/proc/{pid}/task/{pid}/io").read_text().split()[1])


def begin(lab: Lab, requests: list[Request]) -> list[int]:
    """Start them, each in a lane of its own; return the lanes once all of them read."""
    lab.settings["lanes"] = len(requests)
    for request in requests:
        lab.action.start(request, None)
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        pids = lab.action._lanes.pids() if lab.action._lanes else []
        if len(pids) == len(requests) and all(read_by(pid) > 4 * MIB for pid in pids):
            return pids
        time.sleep(0.01)
    raise AssertionError("not all of them began to read")


def over_a_window(pids: list[int]) -> tuple[list[float], float]:
    """What each lane reads in a window, and how long that was at the most."""
    began = time.monotonic()
    before = [read_by(pid) for pid in pids]
    time.sleep(WINDOW_S)
    after = [read_by(pid) for pid in pids]
    return [b - a for a, b in zip(before, after, strict=True)], time.monotonic() - began


def most(limit: float, lanes: int, seconds: float) -> float:
    """What the limit allows: what was left over before may be caught up, and each lane has a piece in hand."""
    return limit * (seconds + BURST_S + 2 * lanes / PIECES_PER_S)


def large(lab: Lab, count: int, **options: Any) -> list[Request]:
    """Copies of one file of 200 MB each to a directory of its own."""
    requests = []
    content = noise(200_000_000)
    for number in range(count):
        name = lab.write(f"l{lab.runs}", content)
        to = lab.base / f"to{lab.runs}"
        to.mkdir()
        requests.append(lab.request(name, to=[str(to)], **options))
        requests[-1] = dataclasses.replace(requests[-1], rule=f"r{number}")
    return requests


def calls_of(pid: int) -> tuple[int, int]:
    """How often a lane has called for reading and for writing: the kernel's figures."""
    told = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(told["syscr"]), int(told["syscw"])


def test_a_large_file_is_asked_of_the_disk_in_pieces(lab: Lab) -> None:
    """A disk ends what it has begun before it serves the instrument: no write, no reading back exceeds a piece."""
    pieces = 128
    lab.write("first", b"1")
    lab.copy("first")  # a warm lane
    assert lab.action._lanes is not None
    (pid,) = lab.action._lanes.pids()
    lab.write("movie", noise(pieces * PIECE))
    reads, writes = calls_of(pid)
    lab.copy("movie")
    reads_then, writes_then = calls_of(pid)

    assert writes_then - writes >= pieces
    assert reads_then - reads >= 2 * pieces  # of the source, and at the destination


@pytest.mark.serial
@pytest.mark.parametrize("copies", [1, 4])
def test_the_limit_is_one_for_all_copies(lab: Lab, copies: int) -> None:
    """However many there are: no more than the limit, and not much less."""
    lab.limit = LIMIT
    read, seconds = over_a_window(begin(lab, large(lab, copies)))

    assert sum(read) <= most(LIMIT, copies, seconds)
    assert sum(read) >= 0.85 * LIMIT * WINDOW_S


@pytest.mark.serial
def test_what_a_slow_copy_leaves_is_taken_by_the_others(lab: Lab) -> None:
    """A rate of its own binds a copy; its share of the limit is not lost."""
    lab.limit = LIMIT
    own = 3_000_000
    pids = begin(lab, [*large(lab, 2, bandwidth=own), *large(lab, 1)])
    read, seconds = over_a_window(pids)
    slow, fast = sorted(read)[:2], max(read)

    assert all(one <= most(own, 1, seconds) + MIB for one in slow)
    assert sum(read) <= most(LIMIT, 3, seconds)
    assert fast >= 0.8 * (LIMIT - 2 * own) * WINDOW_S


@pytest.mark.serial
def test_the_rate_of_a_rule_holds_for_all_its_runs_together(lab: Lab) -> None:
    """`limits: {bandwidth}` is of the rule, not of each run."""
    limit = 6_000_000
    requests = [dataclasses.replace(request, rule="one", bandwidth=limit) for request in large(lab, 2)]
    read, seconds = over_a_window(begin(lab, requests))

    assert sum(read) <= most(limit, 2, seconds)
    assert sum(read) >= 0.8 * limit * WINDOW_S


@pytest.mark.parametrize(("destinations", "least_s"), [(1, 0.2), (2, 0.1)])
def test_what_is_read_back_keeps_the_limit_at_each_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destinations: int, least_s: float
) -> None:
    """Beyond what was lately written, a destination is read no faster than the limit; the sources' till is another."""
    monkeypatch.setattr(_copy_pace, "BACK_BURST", 0)
    pace = Pace(Tills(Tills.make(RULES + 1, str(tmp_path))))
    pace.limit = 1e6
    began = time.monotonic()
    for _ in range(2):  # the first is at once
        pace.spend_back(200_000, destinations)
    took_s = time.monotonic() - began

    assert took_s >= least_s
    began = time.monotonic()
    pace.spend(1000)
    assert time.monotonic() - began < 0.1


# ------------------------------------------------------------------ standing still


def until(predicate: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


@pytest.mark.serial
def test_a_copy_to_a_stopped_volume_stands_still_and_the_others_go_on(lab: Lab) -> None:
    """Within a second; no deadline ends it, it says why, and it goes on by itself."""
    lab.settings["deadline_s"] = 2.0
    lab.limit = LIMIT
    first, second = large(lab, 2)
    pids = begin(lab, [first, second])
    handle = {"run": first.run, "attempt": first.attempt}
    lab.stopped[first.options["to"][0]] = "/data is critically full"
    time.sleep(1.0)
    before = [read_by(pid) for pid in pids]
    time.sleep(3.0)  # longer than the deadline
    stood = sorted(b - a for a, b in zip(before, [read_by(pid) for pid in pids], strict=True))
    progress = lab.action.poll(first, handle)

    assert stood[0] < MIB < stood[1]
    assert progress.status == "active" and "/data is critically full" in progress.why and progress.hint
    lab.stopped.clear()
    lab.limit = None
    assert lab.wait(first, handle).status == "succeeded"
    assert lab.action.poll(first, handle).why == ""


def test_a_copy_to_a_stopped_volume_takes_no_lane(lab: Lab) -> None:
    """It does not begin, and says so; what goes elsewhere is done meanwhile."""
    lab.settings["lanes"] = 1
    lab.write("a", b"1")
    other = lab.base / "other"
    other.mkdir()
    lab.stopped[str(other)] = "/data is critically full"
    waits = lab.request("a", to=[str(other)])
    handle = lab.action.start(waits, None)
    assert lab.copy("a").status == "succeeded"
    progress = lab.action.poll(waits, handle)

    assert progress.status == "active" and "/data is critically full" in progress.why
    assert lab.there(other) == {}
    lab.stopped.clear()
    assert lab.wait(waits, handle).status == "succeeded"


@pytest.mark.serial
def test_a_stopped_copy_can_be_cancelled(lab: Lab) -> None:
    """To remove what it left frees space."""
    lab.limit = LIMIT
    (request,) = large(lab, 1)
    begin(lab, [request])
    to = Path(request.options["to"][0])
    lab.stopped[str(to)] = "/data is critically full"
    handle = {"run": request.run, "attempt": request.attempt}
    until(lambda: lab.action.poll(request, handle).why != "", "it says that it stands still")
    lab.action.cancel(request, handle)

    assert lab.wait(request, handle).status == "cancelled"
    assert lab.there(to) == {}


# ------------------------------------------------------------------ memory and priority


def cached(path: Path) -> set[int]:
    """Which blocks of a file have a page in memory."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = cached_blocks(file.fileno(), size, BLOCK)
    return {number for number in range(-(-size // BLOCK)) if number in found}


@pytest.mark.serial
def test_what_others_have_in_memory_stays_there_and_nothing_is_added(lab: Lab) -> None:
    """The page cache is the instrument's: files it has in memory stay, others do not come to take their place."""
    content = noise(5 * BLOCK + 1)
    warm, cold, part = (lab.source / lab.write(name, content) for name in ("warm", "cold", "part"))
    half = 2 * BLOCK
    for path in (warm, cold, part):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            if path == warm:
                file.read()
            elif path == part:
                file.read(half)
    before = {path: cached(path) for path in (warm, cold, part)}
    if before[cold]:
        pytest.skip(f"{lab.base} is not on a disk")
    assert lab.copy("warm", "cold", "part").status == "succeeded"

    assert {path: cached(path) for path in before} == before


def test_every_thread_of_a_lane_reads_only_when_the_disk_is_idle(lab: Lab) -> None:
    """The idle class of the I/O scheduler, and little of the processor."""
    lab.write("a", b"1")
    assert lab.copy("a").status == "succeeded"
    (pid,) = lab.action._lanes.pids() if lab.action._lanes else []
    libc = ctypes.CDLL(None)
    number = {"x86_64": 252, "aarch64": 31, "ppc64le": 274, "riscv64": 31}[platform.machine()]  # ioprio_get
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]

    assert {libc.syscall(number, 1, thread) >> 13 for thread in threads} == {3}
    assert min(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads) >= 10


# ------------------------------------------------------------------ room


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MB."""
    point = tmp_path / "small"
    point.mkdir()
    what = ["-t", "tmpfs", "-o", "size=300m", "tmpfs"]
    if request.param == "ext4":
        image = tmp_path / "small.img"
        with image.open("xb") as file:
            file.truncate(300 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
        what = ["-o", "loop", str(image)]
    if subprocess.run(["mount", *what, str(point)], capture_output=True).returncode:
        pytest.skip(f"mount of {request.param} is refused here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


class Sampler:
    """Free space every few milliseconds; the least of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.least = 1 << 62
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.002):
            room = os.statvfs(self.path)
            self.least = min(self.least, room.f_bavail * room.f_frsize)

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.least


@pytest.mark.serial
@needs_root
def test_nobody_counts_bytes_that_another_is_about_to_take(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking and allocating are one step, however slow it is: if there is room for three of eight, three have it."""
    size = 10 * MIB
    room = os.statvfs(small_disk)
    reserve = room.f_bavail * room.f_frsize - 3 * size - size // 2

    def slowly(fd: int, size: int) -> None:
        time.sleep(0.1)
        os.posix_fallocate(fd, 0, size)

    monkeypatch.setattr(_copy_room, "allocate", slowly)
    pace = Pace(Tills(Tills.make(RULES + 1, str(tmp_path))))
    took: list[bool] = []

    def take(number: int) -> None:
        with (small_disk / str(number)).open("wb") as file:
            try:
                took.append(Rooms(str(tmp_path)).take(file.fileno(), size, reserve, pace))
            except NoRoom:
                took.append(False)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(took) == [False] * 5 + [True] * 3


def test_what_finds_no_room_leaves_no_trace(lab: Lab) -> None:
    """Not even a name or a directory: below the reserve they would take room too."""
    lab.reserve = 1 << 60
    names = [lab.write("small/a", b"1"), lab.write("middle/b", noise(MIB)), lab.write("large/c", noise(65 * MIB))]
    refused = [lab.copy(name) for name in names]

    assert [end.fault is not None and "than the reserve" in end.fault.why for end in refused] == [True] * 3
    assert list(lab.archive.rglob("*")) == []


def file_system(path: Path) -> str:
    """Return its number as the mount table writes it."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def linked(lab: Lab, to: Path) -> Path:
    """Let `link` below the destination lead there."""
    (lab.archive / "link").symlink_to(to)
    return to


@pytest.mark.parametrize("amount", [(1 << 60, None), (None, 0.9999)], ids=["bytes", "ratio"])
def test_a_link_leads_to_a_volume_without_room_and_no_trace_is_left_there(
    lab: Lab, shm_path: Path, amount: tuple[int | None, float | None]
) -> None:
    """What counts is where the bytes would lie; the destination's own volume has room."""
    there = linked(lab, shm_path)
    lab.reserves = {file_system(there): amount}
    names = [lab.write("link/small", b"1"), lab.write("link/new/b", noise(MIB)), lab.write("link/c", noise(65 * MIB))]
    refused = [lab.copy(name) for name in names]

    assert [end.fault is not None and "than the reserve" in end.fault.why for end in refused] == [True] * 3
    assert [end.fault.counts for end in refused if end.fault] == [False] * 3
    assert list(there.rglob("*")) == []
    assert lab.copy(lab.write("beside", b"1")).status == "succeeded"


@pytest.mark.parametrize("by_link", [False, True])
def test_a_reserve_that_grows_binds_the_run_that_is_under_way(lab: Lab, shm_path: Path, by_link: bool) -> None:
    """What has its name by then stays; nothing more is written."""
    there = linked(lab, shm_path) if by_link else lab.archive
    names = [lab.write(f"link/{number}" if by_link else str(number), noise(MIB, number)) for number in range(30)]
    lab.limit = 5 * MIB
    request = lab.request(*names)
    handle = lab.action.start(request, None)
    lab.wait(request, handle, until=lambda progress: progress.bytes_done > 0 or bool(list(there.rglob("*"))))
    if by_link:
        lab.reserves = {file_system(there): (1 << 60, None)}
    else:
        lab.reserve = 1 << 60
    end = lab.wait(request, handle)

    assert end.fault is not None and "than the reserve" in end.fault.why
    assert len(lab.there(there)) < 30


def test_a_link_leads_away_from_a_volume_without_room(lab: Lab, shm_path: Path) -> None:
    """The reserve is that of the volume, not of the path: elsewhere nobody asked for one."""
    there = linked(lab, shm_path)
    lab.reserves = {file_system(lab.archive): (1 << 60, None)}
    assert lab.copy(lab.write("link/a", b"1")).status == "succeeded"
    refused = lab.copy(lab.write("beside", b"1"))

    assert lab.there(there) == {"a": b"1"}
    assert refused.fault is not None and "than the reserve" in refused.fault.why


def test_a_list_of_digests_grows_only_above_the_reserve(lab: Lab, shm_path: Path) -> None:
    """Also where all else is there already, and a link leads to it."""
    there = linked(lab, shm_path)
    (there / "a").write_bytes(b"1")
    name = lab.write("link/a", b"1")
    lab.reserves = {file_system(there): (1 << 60, None)}
    refused = lab.run(request := lab.request(name, sums="SHA256SUMS"))
    assert refused.fault is not None and "than the reserve" in refused.fault.why
    assert lab.there(there) == {"a": b"1"}
    lab.reserves = {}

    assert lab.run(dataclasses.replace(request, attempt=2)).status == "succeeded"
    assert sorted(lab.there(there)) == ["SHA256SUMS", "a"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_copy_that_a_link_has_led_into_memory_says_so(lab: Lab, shm_path: Path, is_there: bool) -> None:
    """Reclaim lets no file go for such a copy."""
    there = linked(lab, shm_path)
    if is_there:
        (there / "a").write_bytes(b"1")
    request = lab.request(lab.write("link/a", b"1"))
    assert lab.run(request).status == "succeeded"

    assert [member["read_back"] for member in lab.prove(request).members] == ["memory"]


@pytest.mark.serial
@needs_root
@pytest.mark.parametrize("by_link", [False, True])
def test_the_reserve_stays_free(lab: Lab, small_disk: Path, by_link: bool) -> None:
    """Eight copies at once never take free space below it; they wait, and all is proved when there is room.

    Also where each reaches that disk only by a link below its destination.
    """
    copies, files = 8, 11
    lab.settings["lanes"] = copies
    reserve = 40 * MIB
    if by_link:
        lab.reserves = {file_system(small_disk): (reserve, None)}
    else:
        lab.reserve = reserve
    sizes = [6 * MIB, 300_000, 900_000, 5 * MIB, 10_000, 2 * MIB]
    requests = []
    for number in range(copies):
        there = to = small_disk / f"to{number}"
        there.mkdir()
        if by_link:
            to = lab.archive / f"to{number}"
            to.mkdir()
            (there / str(number)).mkdir()
            (to / str(number)).symlink_to(there / str(number))
        names = [lab.write(f"{number}/{i}", noise(sizes[(i + number) % len(sizes)], i)) for i in range(files)]
        requests.append(lab.request(*names, to=[str(to)]))
    total = sum(file.size for request in requests for file in request.files)
    room = os.statvfs(small_disk)
    filler = small_disk / "filler"
    fill = room.f_bavail * room.f_frsize - reserve - total * 2 // 3
    assert fill > total // 3
    with filler.open("wb") as out:
        out.write(bytes(fill))
    os.sync()
    sampler = Sampler(small_disk)
    try:
        for attempt in (1, 2, 3):
            requests = [dataclasses.replace(request, attempt=attempt) for request in requests]
            handles = [lab.action.start(request, None) for request in requests]
            ends = [lab.wait(request, handle) for request, handle in zip(requests, handles, strict=True)]
    finally:
        least = sampler.stop()
    refused = [end.fault for end in ends if end.status == "failed"]

    assert least >= reserve
    assert least < reserve + 8 * MIB, "what may be used is used"
    assert refused
    for fault in refused:
        assert fault is not None and "than the reserve of 41.94 MB free" in fault.why and fault.hint
        assert (fault.kind, fault.scope, fault.counts, fault.retry_after_s) == ("transient", Scope.BATCH, False, 30.0)
    assert not list(small_disk.rglob(".*.part")), "what found no room holds none"

    filler.unlink()
    for number, request in enumerate(requests):
        again = dataclasses.replace(request, attempt=4)
        assert lab.run(again).status == "succeeded"
        assert lab.there(small_disk / f"to{number}").keys() == {file.path for file in request.files}
