"""Is the limit on copying held, and is it used? `throttle.py [--pause] [--limit MB/S] [--work DIRECTORY]`.

Without `--pause`, some two minutes:

One limit for 1 to 8 copies at once, of large files and of many small ones, on
real files. The figures are the kernel's (/proc/PID/task/PID/io), of the thread of
each worker that reads the sources. Of large files it is what this thread has
read (`rchar`). With small ones that would count its data base too, so it is what
the disk gave (`read_bytes`, of files nobody has in memory); of large ones the
kernel reads megabytes ahead. DIRECTORY must be on a disk. The status is 1 if a
figure breaks what is promised: over each 10 s no more than 105 % of the limit,
and at least 90 %.

With `--pause`, some four minutes: the real daemon copies, and a program that
`throttle.while` names is started and ended, again and again. How long do the
copies still write, what the kernel says of their processes (`wchar`), and when
do they go on? And where the condition has a `bandwidth`: when is the rate
down, and up again? The status is 1 if that is ever later than 2 s after the
program was started, or if the copies do not go on.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the daemon is the installed one
from tests.site import Site
from trigger_daemon.actions import Context, File, Request
from trigger_daemon.actions.copy import Action

MB = 1_000_000
WINDOW_S = 10.0
LONGER_S = 1.5  # than one window, so that there are several of it
SAMPLE_S = 0.1
WARM_UP_S = 1.0  # lanes start, the first directories are looked at
COPIES = (1, 2, 4, 8)
LARGE_BYTES, SMALL_BYTES = 75 * MB, 200_000
HELD, USED = 1.05, 0.90
COUNTED = {"large": "rchar", "small": "read_bytes"}

PROMISED_S = 2.0  # from the start of the program
TIMES = 20
PAUSE_LIMIT = 20  # MB/s
SLOW = 5  # that part of the limit, where the condition has a bandwidth
SEEN_S = 4.0  # so long they are looked at while the program runs: twice the promise
PATIENCE_S = 15.0  # for them to go on
LOOK_S = 0.005
PAUSE_BYTES = 1 * MB  # of a file: small, so that what is written is even
IN_HAND = 2 * MB  # what two copies have read by the time they hear of it
NOISE = 64 * 1024  # the copies' own data base
# Each time another one: what comes back soon holds for some seconds at least, and this is about the first time.
PROGRAMS = [f"acquires-now{number}" for number in range(TIMES)]


def make(directory: Path, size: int, total: int) -> list[File]:
    """Make files of `size`, in all `total` bytes, that are on the disk and not in memory."""
    directory.mkdir()
    files = []
    for number in range(-(-total // size)):
        path = directory / f"{number:05d}.dat"
        with path.open("wb") as out:
            out.write(os.urandom(MB) * (size // MB) + os.urandom(size % MB))
        state = path.stat()
        files.append(File(str(directory), path.name, state.st_size, state.st_mtime_ns))
    os.sync()
    return files


def forget(files: list[File]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        with open(os.path.join(file.root, file.path), "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def has_read(pids: list[int], counted: str) -> int:
    """Return what the main threads of these processes have read."""
    texts = [Path(f"/proc/{pid}/task/{pid}/io").read_text() for pid in pids]
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith(counted))


def measure(work: Path, files: list[File], copies: int, limit: int, counted: str) -> tuple[float, float, float]:
    """Return the rate over the slowest and the fastest 10 s, and over all, as shares of the limit."""
    forget(files)
    settings = {"lanes": copies}
    action = Action(Context(str(work / "state"), lambda run, attempt: None, lambda: float(limit), settings=settings))
    try:
        for place in range(copies):
            to = work / "to" / str(place)
            to.mkdir(parents=True)
            mine = tuple(files[place::copies])
            action.start(Request(place + 1, 1, f"rule{place}", {}, {}, mine, {"to": [str(to)]}), None)
        assert action._lanes is not None
        while len(action._lanes.pids()) < copies:
            time.sleep(0.05)
        time.sleep(WARM_UP_S)
        pids = action._lanes.pids()
        samples = []
        until = time.monotonic() + WINDOW_S + LONGER_S
        while time.monotonic() < until:
            samples.append((time.monotonic(), has_read(pids, counted)))
            time.sleep(SAMPLE_S)
    finally:
        action.close()
    rates = []
    for at, read in samples:
        later = next(((when, total) for when, total in samples if when - at >= WINDOW_S), None)
        if later:
            rates.append((later[1] - read) / (later[0] - at) / limit)
    (first, before), (last, after) = samples[0], samples[-1]
    return min(rates), max(rates), (after - before) / (last - first) / limit


# --------------------------------------------------------------------------- a program that was named


class Written:
    """What the copying processes of a daemon have written by when."""

    def __init__(self, daemon: int) -> None:
        self._daemon = daemon
        self.points: list[tuple[float, int]] = []
        self._pids = self._copying()

    def _copying(self) -> list[int]:
        paths = Path(f"/proc/{self._daemon}/task").glob("*/children")
        pids = [pid for path in paths for pid in path.read_text().split()]
        lane = b"trigger_daemon.actions._lane"
        return [int(pid) for pid in pids if lane in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def look(self) -> int:
        """Return the bytes written by now."""
        texts = [Path(f"/proc/{pid}/io").read_text() for pid in self._pids]
        total = sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("wchar"))
        self.points.append((time.monotonic(), total))
        return total

    def until(self, ends: float) -> None:
        """Look again and again until then."""
        while time.monotonic() < ends:
            self.look()
            time.sleep(LOOK_S)

    def slow_since(self, begin: float, rate: float, more: float) -> float:
        """Return since when no more than `rate`, and `more` bytes besides, was written; the end if it never was."""
        since, highest = begin, float("-inf")
        for at, total in reversed(self.points):
            beyond = total - rate * at
            highest = max(highest, beyond)
            if at < begin or highest - beyond > more:
                break
            since = at
        return since

    def slow_until(self, begin: float, rate: float, more: float) -> float:
        """Return until when no more than `rate`, and `more` bytes besides, was written; infinite if it still is so."""
        points = [point for point in self.points if point[0] >= begin]
        for at, total in points:
            if total - points[0][1] > rate * (at - begin) + more:
                return at
        return float("inf")


def beside_program(work: Path, limit: int, slow: int) -> tuple[list[float], list[float]]:
    """Start and end a named program beside copies; return after how many seconds they were slow, and fast again.

    `slow`: bytes/s that the condition leaves, 0: they stand still.
    """
    site = Site(work / "site", quiescence="200ms")
    slower = {"bandwidth": f"{slow}B/s"} if slow else {}
    conditions = [{"process": program, **slower} for program in PROGRAMS]
    site.settings["throttle"] = {"runs": 2, "bandwidth": f"{limit}B/s", "while": conditions}
    site.write_rules(site.rule(batch={"files": 50, "idle": "1s"}))
    for program in PROGRAMS:
        shutil.copy(shutil.which("sleep") or "/bin/sleep", work / program)
    # Each time it goes at full speed for the second drawn below, and until it is slow: enough where that never comes.
    make(site.data / "d", PAUSE_BYTES, int(TIMES * (1.0 + SEEN_S) * (limit + slow)))
    downs, ups = [], []
    dice = random.Random(1)  # when the program starts has nothing to do with when the daemon looks
    site.start()
    try:
        assert site.process is not None
        site.until(lambda: site.states()["ACTIVE"] >= 2, PATIENCE_S, "two runs copy")
        for program in PROGRAMS:
            written = Written(site.process.pid)
            written.until(time.monotonic() + dice.random())
            begun = time.monotonic()
            acquisition = subprocess.Popen([str(work / program), "600"])
            try:
                written.until(begun + SEEN_S + dice.random())
            finally:
                acquisition.kill()
                acquisition.wait()
            ended = time.monotonic()
            rate, more = (1.05 * slow, IN_HAND) if slow else (0.0, NOISE)
            # What is allowed besides may be the last of what was written fast: that much later at the most.
            downs.append(written.slow_since(begun, rate, more) - begun + more / limit)
            fast = float("inf")
            while fast == float("inf") and (now := time.monotonic()) < ended + PATIENCE_S:
                written.until(now + LOOK_S)
                fast = written.slow_until(ended, rate, more)
            ups.append(fast - ended)
            if fast == float("inf"):
                break  # they stay slow: there is nothing more to measure
    finally:
        site.stop()
        shutil.rmtree(work / "site")
    return downs, ups


def pause(work: Path, limit: int) -> int:
    """Print after how long copies are slow, and fast again; return how many figures break the promise."""
    broken = 0
    print(f"limit {limit // MB} MB/s; {TIMES} times; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{'while':22}{'down, median':>14}{'worst':>8}{'up, median':>14}{'worst':>8}   seconds")
    for words, slow in (("stand still", 0), (f"{limit // SLOW // MB} MB/s", limit // SLOW)):
        downs, ups = beside_program(work, limit, slow)
        bad = max(downs) > PROMISED_S or max(ups) == float("inf")
        broken += bad
        figures = (statistics.median(downs), max(downs), statistics.median(ups), max(ups))
        row = f"{words:22}" + "".join(f"{one:>{width}.2f}" for one, width in zip(figures, (14, 8, 14, 8), strict=True))
        print(row + ("  BROKEN" if bad else ""), flush=True)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help=f"MB/s (40; with --pause {PAUSE_LIMIT})")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a directory on a disk")
    parser.add_argument("--pause", action="store_true", help="how soon copies step aside for a named program")
    told = parser.parse_args()
    if told.pause:
        with tempfile.TemporaryDirectory(prefix="throttle", dir=told.work) as directory:
            return 1 if pause(Path(directory), (told.limit or PAUSE_LIMIT) * MB) else 0
    return rates(told.work, (told.limit or 40) * MB)


def rates(place: Path, limit: int) -> int:
    """Print how the limit is held, below `place`; return 1 if it is not."""
    need = int(limit * (WINDOW_S + LONGER_S + 2 * WARM_UP_S) * 2)  # one that is quicker than the others has enough
    work = Path(tempfile.mkdtemp(prefix="throttle", dir=place))
    broken = 0
    try:
        kinds = {"large": make(work / "large", LARGE_BYTES, need), "small": make(work / "small", SMALL_BYTES, need)}
        print(f"limit {limit // MB} MB/s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        print(f"{'files':8}{'copies':>7}{'least in 10 s':>15}{'most in 10 s':>14}{'over all':>10}")
        for kind, files in kinds.items():
            for copies in COPIES:
                least, most, whole = measure(work, files, copies, limit, COUNTED[kind])
                bad = most > HELD or least < USED
                broken += bad
                row = f"{kind:8}{copies:>7}{least:>15.1%}{most:>14.1%}{whole:>10.1%}"
                print(row + ("  BROKEN" if bad else ""), flush=True)
                shutil.rmtree(work / "to")
                shutil.rmtree(work / "state")
    finally:
        shutil.rmtree(work)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
