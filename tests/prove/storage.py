"""Storage: a small real file system fills, eight runs at once, a neighbour beside them; the reserve stays free.

What is to be copied is more than fits, of many sizes, and grows and is written
anew while it is copied: nobody knows how much will come. First only we write;
then a neighbour takes room, below the reserve too, and gives it back, while a
tape carries away what is verified; at last there is room. Free space is looked
at each millisecond by a process of its own, which knows to the block what is
the neighbour's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.prove.disks import Disk, missing, private_mounts
from tests.prove.neighbour import Neighbour
from tests.prove.results import Result
from tests.site import Site

PART = "storage"
MB, MIB = 10**6, 2**20
RUNS = 8
FILES = 4  # in a batch
MORE = 1.5  # times what fits above the reserve
RESERVE = 0.1  # of the file system
RECORDS = 2 * MIB  # what copies leave above the reserve for the file system's own records
# A copy that was begun is ended also while the neighbour is below the reserve: names and maps of blocks, kilobytes.
ENDS = 64 * 1024 * RUNS
BUG_ROUNDS = 6  # of a daemon with a bug: one that has it may be lucky
AT_WORK = 3  # runs that have begun, with most of their files to come, when the neighbour takes room
BELOW_S = 2.0  # how long the neighbour stays below the reserve
UNDER = 0.03  # of the file system: how far it goes below the reserve
PAUSE_S = 0.4  # between two parts of a growing file: longer than the quiet period, so that parts are taken for whole
FULL_S, DONE_S = 120.0, 300.0  # a daemon that has not filled it, or ended its work, by then never will
OWN_BYTES = 16_384  # which the file system takes and gives back by itself, between two looks
STILL_S = 3.0  # nothing moved for so long, over two readings: all that may begin has begun

# Around the sizes that are treated in another way, and in between.
SIZES = (1_000, 40_000, 64 * 1024, 64 * 1024 + 1, 300_000, MB, 3 * MB, 8 * MIB, 8 * MIB + 1, 17 * MB)
LARGE = (40 * MB, 64 * MIB + 1, 90 * MB)
BRIM = {"b1": 300_000, "b2": 20_000, "b3": 1_000}  # rules of their own: what waits in one keeps none of another waiting
BRIM_FILES = 60  # of each: together more than what large files leave


class Scale(NamedTuple):
    """How large all is."""

    size: int  # of the file system
    sizes: tuple[int, ...]  # of files
    bandwidth: int  # bytes/s: so that copies are under way when the neighbour comes
    rounds: int  # of the neighbour


FULL = Scale(2_000 * MB, SIZES + LARGE, 150 * MB, 8)
QUICK = Scale(160 * MB, SIZES[:-1], 30 * MB, 2)
LEAST = {"xfs": 320 * MB}  # mkfs makes none that is smaller


# --------------------------------------------------------------------------- deliberate bugs

NO_LOOK = """\
if "trigger_daemon.actions._lane" in sys.orig_argv:
    from trigger_daemon.actions import _copy_room
    _copy_room.Rooms.look = lambda self, *of: None
"""
NO_PROMISE = """\
if "serve" in sys.orig_argv:
    from trigger_daemon.core import storage
    storage.Storage.hold = lambda self, *of: None
"""
MUTANTS = {
    "copies do not look at free space": f"import sys\n{NO_LOOK}",
    "neither do copies look, nor are bytes promised to runs": f"import sys\n{NO_LOOK}{NO_PROMISE}",
}


# --------------------------------------------------------------------------- who writes


class Version(NamedTuple):
    size: int
    mtime_ns: int


class Instrument(threading.Thread):
    """Write files below a directory: some at once, some in parts with pauses, some anew and larger later."""

    def __init__(self, directory: Path, scale: Scale, total: int, seed: int) -> None:
        super().__init__(name="instrument")
        self._directory = directory
        self._chance = random.Random(seed)
        self._noise = memoryview(self._chance.randbytes(MB))
        self._scale, self._total = scale, total
        self._beside: list[threading.Thread] = []
        self.sums: dict[str, dict[Version, str]] = {}  # every version a quiet look could take for whole
        self.last: dict[str, Version] = {}  # of files that stay as they are
        self.again: list[str] = []  # files that a second wave writes anew
        self.trouble = ""

    def run(self) -> None:
        try:
            self._first_wave()
        except OSError as error:
            self.trouble = f"the instrument could not write: {error}"

    def _first_wave(self) -> None:
        written = number = 0
        while written < self._total:
            sizes = list(self._scale.sizes)
            self._chance.shuffle(sizes)
            for size in sizes:
                path, kind = f"all/{number // 10:03d}/{number:05d}.dat", number % 4
                number += 1
                written += size
                if kind == 1:  # it grows, while others are written
                    self._beside = [one for one in self._beside if one.is_alive()]
                    while len(self._beside) > 16:
                        self._beside.pop(0).join()
                    self._beside.append(threading.Thread(target=self.write, args=(path, size), kwargs={"parts": 3}))
                    self._beside[-1].start()
                else:
                    self.write(path, size, stays=kind != 2)
                    if kind == 2:
                        self.again.append(path)
        for one in self._beside:
            one.join()

    def second_wave(self) -> None:
        """Write the others anew, larger, one after the other."""
        for path in self.again:
            self.write(path, round(max(self.sums[path]).size * 1.2) + 1)

    def anew(self, paths: Sequence[str]) -> None:
        """Write files that were carried away anew: there is always something to copy."""
        for path in paths:
            self.write(path, self.last.pop(path).size + 1)

    def to_the_brim(self) -> None:
        """Write ever smaller files: the last of them fit where no others do."""
        for directory, size in BRIM.items():
            for number in range(BRIM_FILES * (16 if size > 100_000 else 1)):
                self.write(f"{directory}/{number:05d}.dat", size)

    def write(self, path: str, size: int, *, parts: int = 1, stays: bool = True) -> None:
        """Write a file; where a part ends it could be whole."""
        target = self._directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        sha, seen = hashlib.sha256(), self.sums.setdefault(path, {})
        begin = random.Random(f"{path} {size}").randrange(MB // 2)
        with target.open("wb", buffering=0) as file:
            for part in range(parts):
                if part:
                    time.sleep(PAUSE_S)  # the pace of an instrument
                left = size // parts if part < parts - 1 else size - size // parts * (parts - 1)
                while left:
                    piece = self._noise[begin : begin + min(left, MB // 2)]
                    sha.update(piece)
                    left -= file.write(piece)
                state = os.fstat(file.fileno())
                seen[Version(state.st_size, state.st_mtime_ns)] = sha.hexdigest()
        if stays:
            self.last[path] = max(seen, key=lambda version: version.mtime_ns)


class Tape:
    """Carry away what is verified and will not change any more, and look at it."""

    def __init__(self, site: Site, point: Path, instrument: Instrument) -> None:
        self._site, self._point, self._instrument = site, point, instrument
        self.gone: set[str] = set()
        self.wrong: list[str] = []

    def verified(self) -> set[tuple[str, Version]]:
        """Return the files that verified runs were for, and in which version."""
        rows = self._site.ask(
            "SELECT batch.manifest FROM run JOIN batch ON batch.id = run.id WHERE run.state = 'VERIFIED'"
        )
        return {
            (f"{directory}/{name}", Version(size, mtime_ns))
            for (manifest,) in rows for _, directory, name, size, mtime_ns, *_ in json.loads(manifest)
        }  # fmt: skip

    def carry(self, most: int = 1 << 62) -> list[str]:
        """Remove files, some more than so many bytes; return which."""
        carried: list[str] = []
        done = 0
        for path, version in sorted(self.verified()):
            if path in self.gone or self._instrument.last.get(path) != version:
                continue
            if done >= most:
                break
            self.look(path, version)
            with contextlib.suppress(FileNotFoundError):
                (self._point / path).unlink()
            self.gone.add(path)
            carried.append(path)
            done += version.size
        return carried

    def look(self, path: str, version: Version) -> None:
        """Note a file that is not what was written."""
        try:
            with (self._point / path).open("rb") as file:
                state = os.fstat(file.fileno())
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            self.wrong.append(f"{path} is called verified, and is not there")
            return
        if (state.st_size, state.st_mtime_ns) != version or found != self._instrument.sums[path][version]:
            self.wrong.append(f"{path} is called verified, and is not what was written")


# --------------------------------------------------------------------------- one file system


@dataclass
class Outcome:
    row: dict[str, str] = field(default_factory=dict)
    figures: dict[str, int | float | str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    not_done: str = ""
    seconds: float = 0.0


def play(kind: str, scale: Scale, base: Path, *, seed: int = 1, mutant: str = "") -> Outcome:
    """Fill one file system, in a thread with mounts of its own. `mutant`: a deliberate bug, and only until it shows."""
    if why := missing(kind):
        return Outcome(not_done=why)
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_play, kind, scale, base, seed, mutant).result()


def _play(kind: str, scale: Scale, base: Path, seed: int, mutant: str) -> Outcome:
    size = max(scale.size, LEAST.get(kind, 0))
    outcome = Outcome()
    begun = time.monotonic()
    base.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, base, ignore_errors=True)
        try:
            private_mounts()
            disk = Disk(kind, base, size)
        except (OSError, subprocess.SubprocessError) as error:
            outcome.not_done = f"{kind}: it cannot be made and mounted: {error}"
            return outcome
        undo.callback(disk.close)
        scene = Scene(disk.path, size, scale, base, seed, mutant)
        undo.callback(scene.close)
        try:
            scene.alone(outcome)
            if not (mutant and outcome.broken):
                scene.beside(outcome)
            if not mutant:
                scene.room(outcome)
        except AssertionError as error:
            outcome.broken.append(f"{kind}: {str(error)[:2_000]}")
    outcome.seconds = time.monotonic() - begun
    outcome.row = {"file system": f"{kind}, {size // MB:,} MB", **{k: str(v) for k, v in outcome.figures.items()}}
    return outcome


class Scene:
    """A file system, the daemon, who writes at the source, and the neighbour."""

    def __init__(self, point: Path, size: int, scale: Scale, base: Path, seed: int, mutant: str) -> None:
        self._point, self._size, self._scale = point, size, scale
        self._reserve = round(size * RESERVE) // MB * MB
        self.site = site = Site(base / "site", quiescence="200ms", sweep="500ms")
        volume = {"path": str(point), "reserve": f"{self._reserve // MB}MB", "critical": "1%"}
        site.settings["volumes"] = [volume]
        site.settings["throttle"] = {"runs": RUNS, "bandwidth": f"{scale.bandwidth // MB}MB/s"}
        keys = {"batch": {"files": FILES, "idle": "300ms"}, "start": {"copy": {"to": str(point)}}}
        brim = [site.rule(name, match=[f"{name}/*.dat"], **keys) for name in BRIM]
        site.write_rules(site.rule(match=["all/**"], **keys), *brim)
        self.instrument = Instrument(site.data, scale, round((size - self._reserve) * MORE), seed)
        self.second = threading.Thread(target=self.instrument.second_wave, name="second wave")
        self.tape = Tape(site, point, self.instrument)
        self._env = {}
        if mutant:
            bug = base / "bug"
            bug.mkdir()
            (bug / "sitecustomize.py").write_text(MUTANTS[mutant])
            self._env = {"PYTHONPATH": os.pathsep.join([str(bug), *sys.path])}
        self.neighbour = Neighbour(point, self._reserve)

    def close(self) -> None:
        """End all that works on the file system."""
        self.neighbour.close()
        if self.site.process is not None and self.site.process.poll() is None:
            self.site.kill()
        for thread in (self.instrument, self.second):
            if thread.is_alive():
                thread.join()

    # ------------------------------------------------------------------ acts

    def alone(self, outcome: Outcome) -> None:
        """Only we write, and more than fits: what may be used is used, and not a byte of the reserve."""
        self.site.start(env=self._env)
        self.instrument.start()
        self._until_still()
        if not self._env:  # a bug shows without it
            self.instrument.to_the_brim()
            self._until_still()
        seen = self._kept(outcome, "only we write")
        if self._env and outcome.broken:
            return
        waiting = self.site.json("storage")["waiting"]
        room = int(seen["free"]) - self._reserve - RECORDS
        if not waiting or room >= min(run["bytes"] for run in waiting) + OWN_BYTES:
            outcome.broken.append(f"{room:,} bytes above the reserve are not used; what waits: {waiting[:3]}")
        outcome.figures |= {
            "looks": seen["looks"], "between looks, ms": f"{seen['median_s'] * 1e3:.1f}, at most "
            f"{seen['longest_s'] * 1e3:.0f}", "reserve, MB": self._reserve // MB,
            "least free, alone, MB": f"{seen['least'] / MB:.6f}", "runs waiting": len(waiting),
        }  # fmt: skip

    def beside(self, outcome: Outcome) -> None:
        """A neighbour takes room, below the reserve too, while copies are under way: we never write further below."""
        self.second.start()
        dips: list[Mapping[str, Any]] = []
        for _ in range(BUG_ROUNDS if self._env else self._scale.rounds):
            carried: list[str] = []
            self.site.until(lambda carried=carried: self._carries(carried), FULL_S, "there is something to carry away")
            self.neighbour.ask("mark")
            self.instrument.anew(carried)
            self.tape.gone.difference_update(carried)
            self.site.until(lambda: self.site.states()["ACTIVE"] >= AT_WORK, FULL_S, "copies go on")
            free = self.neighbour.ask("look")["free"]
            self.neighbour.ask(f"take {free - self._reserve + round(self._size * UNDER)}")
            time.sleep(BELOW_S)
            dips.append(self.neighbour.ask("give"))
            self._judge(outcome, dips[-1], f"a neighbour went below, {len(dips)}", ENDS)
            if self._env and outcome.broken:
                return
        outcome.figures |= {
            "times the neighbour went below": sum(seen["below"] for seen in dips),
            "least free with it, MB": f"{min(seen['least'] for seen in dips) / MB:.3f}",
            "ours below, at most a time, bytes": max(seen["crossed"] for seen in dips),
            "ours deeper, at most, bytes": max(seen["deeper"] for seen in dips),
            "raced, bytes": sum(seen["raced"] for seen in dips),
        }
        if not all(seen["below"] for seen in dips):
            outcome.broken.append("the neighbour did not go below the reserve: nothing is proved")

    def _carries(self, carried: list[str]) -> bool:
        """Add to `carried` what the tape takes; say whether that is enough to make room for many runs."""
        carried += self.tape.carry(self._size // 2)
        return sum(self.instrument.last[path].size for path in carried) > self._size // 3

    def room(self, outcome: Outcome) -> None:
        """There is room: all that waited goes on, and is verified."""
        self.neighbour.ask("mark")

        def all_done() -> bool:
            self.tape.carry()
            open_runs = self.site.ask("SELECT 1 FROM run WHERE final = 0")
            return not self.second.is_alive() and not open_runs and self.tape.gone >= self.instrument.last.keys()

        self.site.until(all_done, DONE_S, "all is verified and on the tape")
        self._kept(outcome, "room is made")
        states = self.site.states()
        deferred = self.site.ask("SELECT count(*) FROM attempt WHERE outcome LIKE '%than the reserve of%'")[0][0]
        left = [str(path) for path in self._point.rglob(".*.part")]
        files = len(self.instrument.sums)
        if self.instrument.trouble:
            outcome.broken.append(self.instrument.trouble)
        if len(self.instrument.last) != files:
            outcome.broken.append(f"of {files} files {len(self.instrument.last)} came to their end")
        if odd := {state: count for state, count in states.items() if state not in ("VERIFIED", "SUPERSEDED")}:
            outcome.broken.append(f"runs did not end verified: {odd}")
        if left:
            outcome.broken.append(f"{len(left)} temporary files are left: {left[:3]}")
        outcome.broken += self.tape.wrong[:5]
        outcome.figures |= {
            "files": files, "versions": sum(map(len, self.instrument.sums.values())),
            "MB": sum(version.size for seen in self.instrument.sums.values() for version in seen) // MB,
            "runs verified": states["VERIFIED"], "superseded": states["SUPERSEDED"], "copies deferred": deferred,
        }  # fmt: skip

    # ------------------------------------------------------------------ what is seen

    def _until_still(self) -> None:
        """Wait until all is written, and whatever has not begun waits for space."""
        since, last = time.monotonic(), -1

        def still() -> bool:
            nonlocal since, last
            seen = self.neighbour.ask("look")
            if self._env and seen["crossed"]:
                return True  # a bug: it will never be still
            ours = seen["ours"]
            states = {state for (state,) in self.site.ask("SELECT state FROM run WHERE final = 0")}
            if ours != last or states != {"PENDING"} or self.instrument.is_alive():
                since, last = time.monotonic(), ours
            return time.monotonic() - since > STILL_S

        self.site.until(still, FULL_S, "it is full, and the rest waits")

    def _kept(self, outcome: Outcome, when: str) -> Mapping[str, Any]:
        """Judge the time in which only we wrote."""
        seen = self.neighbour.ask("look")
        if seen["least"] < self._reserve:
            under = self._reserve - seen["least"]
            outcome.broken.append(f"{when}: {seen['least']:,} bytes were free, {under:,} less than the reserve")
        self._judge(outcome, seen, when)
        return seen

    def _judge(self, outcome: Outcome, seen: Mapping[str, Any], when: str, most: int = 0) -> None:
        if seen["crossed"] > most:
            outcome.broken.append(f"{when}: ours took {seen['crossed']:,} bytes of the reserve; first: {seen['first']}")


# --------------------------------------------------------------------------- the proof


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Fill each kind of file system, and let each deliberate bug be seen."""
    scale = QUICK if quick else FULL
    rows: list[Mapping[str, str]] = []
    broken: list[str] = []
    not_done: list[str] = []
    with roomy(work, scale) as place:
        if place is None:
            return Result(PART, {}, [], [f"neither {work} nor {tempfile.gettempdir()} has {need(scale) // MB:,} MB"])
        for kind in ("ext4", "xfs"):
            outcome = play(kind, scale, place / kind, seed=seed)
            if outcome.not_done:
                not_done.append(outcome.not_done)
            else:
                rows.append(outcome.row)
            broken += [f"storage {kind} (seed {seed}): {words}" for words in outcome.broken]
            tell(f"{kind}: {outcome.not_done or ('BROKEN' if outcome.broken else 'kept')}, {outcome.seconds:.0f} s")
        caught = 0
        for number, bug in enumerate(MUTANTS):
            outcome = play("ext4", QUICK, place / f"bug{number}", seed=seed, mutant=bug)
            if outcome.not_done:
                not_done.append(f"the bug: {bug}: {outcome.not_done}")
            elif not outcome.broken:
                broken.append(f"storage: it was not seen that {bug}")
            else:
                caught += 1
            tell(f"bug, {bug}: {outcome.not_done or (outcome.broken or ['NOT SEEN'])[0]}")
    figures: dict[str, int | float | str] = {
        "file systems": len(rows), "violations": len(broken), "bugs seen": f"{caught} of {len(MUTANTS)}",
    }  # fmt: skip
    return Result(PART, figures, broken, not_done, rows)


def need(scale: Scale) -> int:
    """Return how many bytes the image and the source need, with a margin."""
    size = max(scale.size, *LEAST.values())
    return round(size * (1 + 2 * MORE))


@contextlib.contextmanager
def roomy(work: Path, scale: Scale) -> Iterator[Path | None]:
    """Give a directory with room for one of these: below `work`, or on a disk; None if there is none."""
    if shutil.disk_usage(work).free > need(scale):
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="prove", ignore_cleanup_errors=True) as place:
        yield Path(place) if shutil.disk_usage(place).free > need(scale) else None
