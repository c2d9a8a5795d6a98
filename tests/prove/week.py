"""The week of tests/week.py on a real disk: the real daemon, a loop-mounted ext4, a writer that is another process.

All is made smaller by one factor in bytes and one in time: the disk of 20 TB is
one of 200 MB, an hour takes 2 s (0.6 s with `--quick`, and three days instead
of seven). What the daemon does at its own pace is not: it reads free space
each 2 s, so that it sees the disk once an hour instead of 1,800 times. What it
needs beyond what arithmetic says is therefore told in seconds, LATE_S.

`python -m tests.prove.week` draws docs/images/week-real.svg of one full run.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.prove import disks
from tests.prove.results import Result
from tests.site import Site
from tests.week import (
    ARCHIVE_BYTES_PER_S,
    BYTES_PER_S,
    CRITICAL,
    HOUR,
    IMAGE,
    KEEP_FOR_S,
    RESERVE,
    TB,
    TOTAL,
    WIDE,
    Outage,
    Sample,
    allowed,
    caught_up,
    drawn,
    writes_at,
)

LATE_S = 6.0  # a reading, the quiet period, a batch that closes, an answer of the hands, and a machine that is busy
SAMPLE_S = 0.1
SQUARE = 50  # movies in a directory
MOVIE_BYTES = 40_000_000_000  # in life: so large that the sets which can be deleted in a second, at any scale, suffice
RESULT_EVERY = 20  # of so many movies one is worked on: 5 % of the bytes, as in the simulation


@dataclass(frozen=True)
class Scale:
    """How much smaller than life."""

    disk_bytes: int
    hour_s: float
    hours: float
    outage: Outage

    def s(self, seconds: float) -> float:
        """Return how long a time of the simulated week takes here."""
        return seconds / HOUR * self.hour_s


FULL = Scale(200 << 20, 2.0, 168.0, Outage(72.0, 30.0))
QUICK = Scale(100 << 20, 0.6, 66.0, Outage(25.0, 18.0))


class Movie(NamedTuple):
    """One that was written, by the writer's own record. `size` 0: there was no room for it."""

    time: float
    name: str
    size: int
    digest: str


class Seen(NamedTuple):
    time: float
    free: int


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Live through it, and judge."""
    if why := disks.missing("ext4"):
        return Result("week", not_done=[why])
    lived = live(QUICK if quick else FULL, work)
    tell(f"week: {len(lived.movies)} movies, {len(lived.done)} sets deleted")
    return Result("week", lived.figures(), lived.judge())


def live(scale: Scale, work: Path) -> Lived:
    """Run daemon and writer on a disk of this scale."""
    with _disk(work / "disk", scale.disk_bytes) as disk, _disk(work / "vault", 4 * scale.disk_bytes) as vault:
        return Lived(scale, work, disk, vault / "archive")


@contextmanager
def _disk(point: Path, size: int) -> Iterator[Path]:
    """Mount a new ext4: for the archive too, since a copy that is in memory only lets nothing go."""
    image = point.with_suffix(".img")
    point.mkdir()
    with image.open("xb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


class Lived:
    """One run, and what was seen of it from outside."""

    def __init__(self, scale: Scale, work: Path, disk: Path, archive: Path) -> None:
        self.scale = scale
        room = os.statvfs(disk)
        self.total = room.f_blocks * room.f_frsize
        self.factor = TOTAL / self.total
        self.archive, self.record = archive, work / "record"
        self.site = Site(work / "site", quiescence="200ms", sweep="5s")
        self.site.data = disk / "movies"
        self.results = disk / "results"
        for directory in (self.site.data, self.results, self.archive / "movies"):
            directory.mkdir(parents=True)
        self.record.touch()
        self.seen: list[Seen] = []
        self.began = self.away = self.back = 0.0
        self._settings()
        self.site.start()
        command = [sys.executable, "-P", "-c", _WRITER, str(Path(__file__).parents[2]), str(disk), str(self.record)]
        self.began = time.time()
        writer = subprocess.Popen([*command, *(repr(value) for value in (scale.hour_s, scale.hours))])
        try:
            self._watch()
        finally:
            try:
                writer.wait(30)
            finally:
                writer.kill()
                self._end()
        self._read()

    def _end(self) -> None:
        """Let what is under way come to its end."""
        try:
            self.site.cli("pause")
            question = "SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"
            self.site.until(lambda: not self.site.ask(question), 30, "no set is under way")
        finally:
            self.site.stop()

    def _settings(self) -> None:
        keep = f"{self.scale.s(KEEP_FOR_S) * 1e3:.0f}ms"
        amounts = {"reserve": RESERVE, "low": WIDE.low, "enough": WIDE.enough, "critical": CRITICAL}
        disk = {name: f"{amount / TOTAL:.4%}" for name, amount in amounts.items()}
        self.site.settings["volumes"] = [{"path": str(self.site.data.parent), **disk}]
        self.site.settings["reclaim"] = "enabled"
        common: dict[str, Any] = {
            "retry": {"initial": "500ms", "longest": "1s"}, "batch": {"files": 10, "oldest_waits": "500ms"},
        }  # fmt: skip
        rate = ARCHIVE_BYTES_PER_S / self.factor * HOUR / self.scale.hour_s
        companion = {"file": "{square}/{movie}.xml", "wait": "5s"}
        self.site.write_rules(
            self.site.rule(
                "movies", match=["{square}/{movie}.tif"], start={"copy": {"to": str(self.archive / "movies")}},
                complete={"quiescence": "200ms", "with": [companion]}, limits={"bandwidth": f"{rate:.0f}B/s"},
                reclaim={"proven_by": ["movies"], "keep_for": keep}, **common,
            ),
            self.site.rule(
                "motion", match=["{square}/{movie}s.tif"], start={"copy": {"to": str(self.results)}}, priority=9,
                **common,
            ),
        )  # fmt: skip

    def _watch(self) -> None:
        """Look at free space until the time is over; let the archive go and come."""
        gone = self.archive.with_name("archive.away")
        outage = self.scale.outage
        away, back = (self.began + hour * self.scale.hour_s for hour in (outage.begin, outage.end))
        end = self.began + self.scale.hours * self.scale.hour_s
        while (now := time.time()) < end:
            room = os.statvfs(self.site.data)
            self.seen.append(Seen(now, room.f_bavail * room.f_frsize))
            if not self.away and now >= away:
                self.archive.rename(gone)
                self.away = now
            if not self.back and now >= back:
                gone.rename(self.archive)
                self.back = now
            self._take_results(now)
            time.sleep(SAMPLE_S)

    def _take_results(self, now: float) -> None:
        """Be the person who takes results away after some hours."""
        for path in self.results.glob("*/[!.]*"):
            if now - path.stat().st_ctime > self.scale.s(KEEP_FOR_S):
                path.unlink()

    def _read(self) -> None:
        """Take from journal and record what they say."""
        self.movies = [Movie(*json.loads(line)) for line in self.record.read_text().splitlines()]
        self.proofs: dict[int, float] = {}  # run -> since when it is proved
        self.runs: dict[int, tuple[str, list[str], int]] = {}  # run -> rule, its files, bytes
        for number, rule, manifest, size, proved in self.site.ask(
            "SELECT batch.id, rule.name, batch.manifest, batch.bytes, max(proof.time) FROM batch"
            " JOIN rule ON rule.id = batch.rule LEFT JOIN proof ON proof.run = batch.id GROUP BY batch.id"
        ):
            self.runs[number] = rule, [f"{row[1]}/{row[2]}" for row in json.loads(manifest)], size
            if proved is not None:
                self.proofs[number] = proved
        self.done: list[tuple[int, float, list[str]]] = []  # run, when it was chosen, files; in order of choice
        files: dict[int, list[str]] = {}
        for reclaim, path in self.site.ask("SELECT reclaim, path FROM reclaim_file ORDER BY number"):
            files.setdefault(reclaim, []).append(os.fsdecode(path))
        for reclaim, of, made in self.site.ask(
            "SELECT id, run, made_time FROM reclaim WHERE state = 'done' ORDER BY id"
        ):
            self.done.append((of, made, files[reclaim]))
        # One that was put back is left alone for ten minutes, at any scale.
        ((self.refused,),) = self.site.ask("SELECT coalesce(sum(bytes), 0) FROM reclaim WHERE state = 'kept'")
        self.left = self.site.digests(self.site.data)
        self.kept = self.site.digests(self.archive / "movies")

    # ------------------------------------------------------------------ in the units of the week

    def samples(self) -> list[Sample]:
        """Return it minute by minute, as large and as long as in life."""
        times = [one.time for one in self.seen]
        wrote = _sums([(one.time, one.size * (1 + 1 / RESULT_EVERY)) for one in self.movies])
        proved = _sums(sorted((time, float(self.runs[run][2])) for run, time in self.proofs.items()
                              if self.runs[run][0] == "movies"))  # fmt: skip
        put = _sums([(one.time, float(one.size)) for one in self.movies])
        found = []
        for minute in range(1, round(self.scale.hours * 60)):
            at = self.began + minute / 60 * self.scale.hour_s
            free = self.seen[min(bisect.bisect(times, at), len(self.seen) - 1)].free
            backlog = max(0.0, _at(put, at) - _at(proved, at))
            units = (free, backlog, _at(wrote, at))
            found.append(Sample(minute / 60, *(round(one * self.factor) for one in units)))
        return found

    def _slack(self) -> float:
        """Return what the instrument writes in LATE_S, in bytes of the week: it is always under way."""
        return BYTES_PER_S * LATE_S * HOUR / self.scale.hour_s

    def _gone_after(self, samples: list[Sample]) -> float:
        end, rest = self.scale.outage.end, self._slack()
        return next((one.hour - end for one in samples if one.hour > end and one.backlog < rest), float("inf"))

    def figures(self) -> dict[str, int | float | str]:
        samples = self.samples()
        return {
            "movies": len(self.movies),
            "sets deleted": len(self.done),
            "TB put back as the archive went": round(self.refused * self.factor / TB, 2),
            "TB free at least": round(min(one.free for one in self.seen) * self.factor / TB, 2),
            "TB of backlog at most": round(max(one.backlog for one in samples) / TB, 1),
            "h after the outage, backlog gone": round(self._gone_after(samples), 1),
        }

    # ------------------------------------------------------------------ the laws

    def judge(self) -> list[str]:
        """Return what was broken."""
        return [*self._room(), *self._proof(), *self._when(), *self._order()]

    def _room(self) -> Iterator[str]:
        """The instrument meets no full disk, and has what arithmetic leaves it."""
        if lost := [movie for movie in self.movies if not movie.size]:
            yield f"{len(lost)} movies met a full disk, the first {lost[0].name}"
        samples = self.samples()
        slack = (self.refused + self.total - self.seen[0].free) * self.factor + 0.01 * TOTAL  # what ext4 needs itself
        could = allowed(samples, self.scale.outage, WIDE)
        late = round(LATE_S / self.scale.hour_s * 60)
        short = []
        for number, one in enumerate(samples):
            before = max(0, number - late)
            least = min(could[before : number + 1]) - (one.written - samples[before].written)
            if one.free < least - slack:
                short.append((one.hour, one.free, round(least)))
        if short:
            yield f"in {len(short)} minutes less was free than could be, the first: {short[0]}"
        after, soonest = self._gone_after(samples), caught_up(samples, self.scale.outage)
        if after > soonest + LATE_S / self.scale.hour_s:
            yield f"the backlog was gone {after:.1f} h after the outage, arithmetic says {soonest:.1f} h"

    def _proof(self) -> Iterator[str]:
        """What is gone lies in the archive as it was written, and was told to be deleted; all else stands as it was."""
        deleted = {name for _, _, names in self.done for name in names}
        for movie in self.movies:
            path = os.fsencode(movie.name)
            if movie.size and path not in self.left and movie.name not in deleted:
                yield f"{movie.name} is gone, and nobody says why"
            if movie.size and path not in self.left and self.kept.get(path) != movie.digest:
                yield f"{movie.name} is gone, and its copy is {self.kept.get(path, 'nowhere')}"
            if self.left.get(path, movie.digest) != movie.digest:
                yield f"{movie.name} is not what was written"
            if (path in self.left) != (os.fsencode(movie.name.replace(".tif", ".xml")) in self.left):
                yield f"{movie.name} and its companion are not together"

    def _when(self) -> Iterator[str]:
        """Only what has been proved for long enough, while the archive is there, while the disk is low."""
        times, low = self._low_times()
        keep = self.scale.s(KEEP_FOR_S)
        for run, made, names in self.done:
            if made < self.proofs.get(run, float("inf")) + keep:
                since = made - self.proofs.get(run, float("inf"))
                yield f"{names[0]} was to be deleted {since:.2f} s after its proof, not {keep:.2f}"
            if self.away + 2.0 < made < self.back:
                yield f"{names[0]} was deleted while its copy was away"
            near = low[bisect.bisect(times, made - LATE_S) : bisect.bisect(times, made) + 1]
            if not any(near):
                yield f"{names[0]} was deleted while the disk was not low"
        first = low.index(True) if True in low else len(low)
        most = max((one.free for one in self.seen[first:]), default=0)
        if most * self.factor > WIDE.enough + 0.01 * TOTAL:
            yield f"it deleted until {most * self.factor / TB:.2f} TB were free"

    def _low_times(self) -> tuple[list[float], list[bool]]:
        """Say when the disk was low; it has enough only once every reading has seen that."""
        state, low, since = "ok", [], 0.0
        for one in self.seen:
            free = one.free * self.factor
            since = one.time if free < WIDE.enough else since
            if free < WIDE.low or (state == "low" and one.time - since < LATE_S):
                state = "low"
            else:
                state = "ok"
            low.append(state == "low")
        return [one.time for one in self.seen], low

    def _order(self) -> Iterator[str]:
        """No movie goes while an older one could."""
        keep = self.scale.s(KEEP_FOR_S)
        worked = {name: self.proofs.get(run, float("inf"))
                  for run, (rule, names, _) in self.runs.items() if rule == "motion" for name in names}  # fmt: skip
        chosen: dict[int, tuple[float, float]] = {}  # run -> when its first set was chosen, when it could go
        for run, made, names in self.done:
            if self.runs[run][0] == "movies" and run not in chosen:
                due = max([self.proofs.get(run, float("inf")), *(worked.get(name, 0.0) for name in names)]) + keep
                chosen[run] = made, due
        for run, (made, _) in chosen.items():
            since = self.back if made > self.back else 0.0  # a look that began before could not see the first copies
            older = [other for other, (later, due) in chosen.items()
                     if other < run and later > made and max(due, since) + LATE_S < made]  # fmt: skip
            if older:
                yield f"run {run} went before run {min(older)}, which was due"


def _sums(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    total, sums = 0.0, []
    for _, amount in points:
        total += amount
        sums.append(total)
    return [time for time, _ in points], sums


def _at(sums: tuple[list[float], list[float]], at: float) -> float:
    index = bisect.bisect(sums[0], at)
    return sums[1][index - 1] if index else 0.0


# A process of its own, which must find this package wherever the daemon comes from.
_WRITER = """
import sys
root, disk, record, hour_s, hours = sys.argv[1:]
sys.path.append(root)
from tests.prove import week
week.write(week.Path(disk), week.Path(record), float(hour_s), float(hours))
"""


def write(disk: Path, record: Path, hour_s: float, hours: float) -> None:
    """Be the instrument: write movies and their metadata at its rate, with its pauses; note each one."""
    room = os.statvfs(disk)
    factor = TOTAL / (room.f_blocks * room.f_frsize)
    size = round(MOVIE_BYTES / factor)
    began, number, due, before = time.monotonic(), 0, 0.0, 0.0
    with record.open("a") as notes:
        while (second := (time.monotonic() - began) / hour_s * HOUR) < (hours - 2.0) * HOUR:
            due += writes_at(second) * (second - before) * BYTES_PER_S / factor
            before = second
            while due >= size:
                due -= size
                number += 1
                stem = f"s{number // SQUARE:03}/m{number:05}{'s' if number % RESULT_EVERY == 0 else ''}"
                notes.write(json.dumps(_movie(disk / "movies", stem, size)) + "\n")
                notes.flush()
            time.sleep(0.01)


def _movie(directory: Path, stem: str, size: int) -> Movie:
    content = os.urandom(size)
    path = directory / f"{stem}.tif"
    path.parent.mkdir(exist_ok=True)
    try:
        (directory / f"{stem}.xml").write_text(f"<movie>{stem}</movie>")
        path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)
        (directory / f"{stem}.xml").unlink(missing_ok=True)
        return Movie(time.time(), f"{stem}.tif", 0, "")
    return Movie(time.time(), f"{stem}.tif", size, hashlib.sha256(content).hexdigest())


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        lived = live(FULL, Path(work))
        IMAGE.with_name("week-real.svg").write_text(drawn(lived.samples(), FULL.outage, WIDE))
        print(lived.figures(), lived.judge()[:10] or "nothing broken")


if __name__ == "__main__":
    main()
