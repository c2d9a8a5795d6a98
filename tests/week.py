"""A week of an instrument at a disk of limited size, in simulated time: the real engine, an oracle, and a plot.

`python -m tests.week` makes docs/images/week.svg again. Nothing here sleeps.

The instrument writes 8 TB a day to a disk of 20 TB. A movie stands for ten of
1 GB, and the gauge is read each 20 s, so that a week runs in seconds; all else
is as it would be. `Week` is the disk, the instrument, the archive behind
2.5 Gbit/s, and the hands of reclaim. It knows what was written, what the
archive holds and since when, and judges by that alone. `allowed` knows only
rates: the free space of a program that does what it may at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.lab import ROOT, Lab, rule
from tests.plot import Band, Curve, Level, Plot, thinned
from trigger_daemon.core import model
from trigger_daemon.core.model import Fault, RunState, Scope
from trigger_daemon.core.rules import Complete, Reclaim, Rule, With
from trigger_daemon.core.storage import Amount, Limits
from trigger_daemon.removal import Place

GB, TB, HOUR = 10**9, 10**12, 3_600.0
TOTAL, RESERVE, CRITICAL = 20 * TB, 500 * GB, 1 * TB
RECLAIM_BYTES_PER_S = 500e6  # docs/how-to/storage.md
MOVIE, XML, RESULT = 10 * GB, 100_000, GB // 2
PER_DAY = 8 * TB
ARCHIVE_BYTES_PER_S = 2.5e9 / 8
KEEP_FOR_S = 12 * HOUR
MOTION_S = 60.0  # that one movie is worked on
STEP_S = 20.0
BEGAN = 1_000.0  # the lab's clock
SETS_MAX = 500  # in one answer of the hands, as the real ones

# Eight hours on a grid, the last 40 minutes to change it; a quarter of an hour on a square, three minutes to move.
GRID_S, ON_GRID_S, SQUARE_S, ON_SQUARE_S = 8 * HOUR, 440 * 60.0, 900.0, 720.0


class Outage(NamedTuple):
    """Hours from the beginning. `silent`: nobody answers; else each attempt fails."""

    begin: float
    hours: float
    silent: bool = False

    @property
    def end(self) -> float:
        return self.begin + self.hours


class Levels(NamedTuple):
    """What the settings call low, and enough, in bytes."""

    low: int
    enough: int

    def limits(self) -> Limits:
        amounts = [Amount(bytes=each) for each in (RESERVE, self.low, self.enough, CRITICAL)]
        return Limits("/data", *amounts, on_critical=("/bin/pause",))

    def grade(self, state: str, free: int) -> str:
        """Return the state of the volume, as docs/how-to/storage.md tells it."""
        if free < CRITICAL or (state == "critical" and free < CRITICAL + (self.low - CRITICAL) // 4):
            return "critical"
        return "low" if free < self.low or (state != "ok" and free < self.enough) else "ok"


NARROW = Levels(4 * TB, 6 * TB)  # as a volume has it whose settings say nothing, or nearly
WIDE = Levels(12 * TB, 14 * TB)  # holds what comes in 30 hours


class Sample(NamedTuple):
    """One minute. `written`: all that was ever written to the disk; `backlog`: what is not proved in the archive."""

    hour: float
    free: int
    backlog: int
    written: int


def writes_at(second: float) -> bool:
    """Say whether the instrument is at work."""
    on_grid = second % GRID_S
    return on_grid < ON_GRID_S and on_grid % SQUARE_S < ON_SQUARE_S


AT_WORK = sum(writes_at(second) for second in range(int(GRID_S))) / GRID_S
BYTES_PER_S = PER_DAY / 86_400.0 / AT_WORK  # while it is at work


def rules() -> tuple[Rule, ...]:
    """Movies go to the archive, and are worked on beside it; what comes of that goes to the archive too."""
    companion = With("movies/{movie}.xml", "/data")
    return (
        rule("movies", 1, match=("movies/{movie}.tif",), options={"to": "/archive"},
             complete=Complete(companions=(companion,)), reclaim=Reclaim(("movies",), KEEP_FOR_S)),
        rule("motion", 2, match=("movies/{movie}.tif",), options={"to": "/data/results"}, proof="none", priority=9),
        rule("results", 3, match=("results/{movie}.mrc",), options={"to": "/archive"},
             reclaim=Reclaim(("results",), KEEP_FOR_S)),
    )  # fmt: skip


class Pipe:
    """The way to the archive: all that is under way shares it."""

    def __init__(self) -> None:
        self.left: dict[int, float] = {}  # run -> bytes
        self.at = BEGAN

    def advance(self, at: float, *, up: bool) -> None:
        """Let time go on until then."""
        while up and self.at < at and (moving := [run for run, left in self.left.items() if left > 0]):
            share = ARCHIVE_BYTES_PER_S / len(moving)
            step = min(at - self.at, min(self.left[run] for run in moving) / share)
            for run in moving:
                self.left[run] = max(0.0, self.left[run] - share * step)
                if self.left[run] < 1.0:
                    self.left[run] = 0.0
            self.at += step
        self.at = at

    def wait_s(self, run: int) -> float:
        """Return when it is worth to ask again."""
        return max(1.0, self.left[run] * len(self.left) / ARCHIVE_BYTES_PER_S)


class Week(Lab):
    """A laboratory with a disk that can be full. What breaks a law is noted in `broken`."""

    def __init__(
        self, outage: Outage, levels: Levels, *, days: float = 7.0, liar: bool = False, greedy: bool = False,
        restart_at: float = -1.0, per_destination: int | None = None,
    ) -> None:  # fmt: skip
        """`liar`: the hands name what came last, proved or not. `greedy`: they name more than was asked for.

        `restart_at`: an hour at which the daemon is killed.
        """
        self.greedy = greedy
        self.outage, self.levels, self.days, self.liar, self.restart_at = outage, levels, days, liar, restart_at
        self.per_destination = per_destination
        self.broken: list[str] = []
        self.samples: list[Sample] = []
        self.used = self.written = self.backlog = 0
        self.pipe = Pipe()
        self.works_until: dict[int, float] = {}  # run of motion -> when it is done
        self.archived: dict[str, tuple[tuple[int, int], float]] = {}  # path -> version, since when
        self.worked: set[str] = set()  # movies that motion has finished with
        self.sets: dict[int, tuple[str, ...]] = {}  # run that was proved -> its files, which stand
        self.taken: set[int] = set()  # runs whose files were deleted
        self.answered: deque[int] = deque()  # runs of the hands' last answer
        self.told_down = False  # by an attempt that failed
        self.stopped = False  # what the core said last of copies to /data
        self.oracle = "ok"  # state of the volume by our own reckoning
        self.deleted = self.refused = 0
        self.asked_for: list[float] = []  # hours at which the hands were asked what could go
        self.lost: list[float] = []  # hours at which the instrument met a full disk
        self.critical_at: list[float] = []  # hours at which it became critical
        self.commands: list[float] = []  # hours at which `on_critical` ran
        self._due = 0.0
        self._movie = 0
        super().__init__(*rules(), limits=(levels.limits(),))
        self._greet()

    def _greet(self) -> None:
        self.engine.reclaims.enabled = True
        self.engine.runs.destination_max = self.per_destination
        self.step(model.Mounted({"/": "", "/data": "/data"}, self.at))
        self.step(model.RootChanged(ROOT, "ok", "", "", "inotify", self.at))

    # ------------------------------------------------------------------- time

    @property
    def hour(self) -> float:
        return (self.at - BEGAN) / HOUR

    @property
    def free(self) -> int:
        return TOTAL - self.used

    @property
    def up(self) -> bool:
        """Say whether the archive answers."""
        return not self.outage.begin <= self.hour < self.outage.end

    def run(self) -> Week:
        """Live through it."""
        for number in range(1, round(self.days * 86_400 / STEP_S) + 1):
            second = number * STEP_S
            for edge in (self.outage.begin * HOUR, self.outage.end * HOUR):
                if second - STEP_S < edge <= second:
                    self.pipe.advance(BEGAN + edge, up=edge != self.outage.end * HOUR)
            self.run_until(BEGAN + second)
            if writes_at(second):
                self._acquire()
            if second - STEP_S < self.restart_at * HOUR <= second:
                self.crash()
                self._greet()
            self._read()
            if second % 60 == 0:
                self.samples.append(Sample(self.hour, self.free, self.backlog, self.written))
        return self

    def _acquire(self) -> None:
        self._due += BYTES_PER_S * STEP_S
        while self._due >= MOVIE:
            self._due -= MOVIE
            if self.free < MOVIE + XML:
                self.lost.append(self.hour)
                continue
            self._movie += 1
            self._put(f"movies/m{self._movie:05}.xml", XML, heard=False)
            self._put(f"movies/m{self._movie:05}.tif", MOVIE)

    def _put(self, path: str, size: int, *, heard: bool = True) -> None:
        self.used += size
        self.written += size
        self.backlog += size
        self.write(path, size, heard=heard)

    def _read(self) -> None:
        before, self.oracle = self.oracle, self.levels.grade(self.oracle, self.free)
        if self.oracle == "critical" != before:
            self.critical_at.append(self.hour)
        self.step(model.Gauged("/data", self.free, TOTAL, self.at))

    # --------------------------------------------------------------- effects

    def _carry(self, effect: model.Effect) -> None:
        match effect:
            case model.Select():
                self.asked_for.append(self.hour)
                self.step(model.Selected(self._select(effect), effect.rules_at, self.at))
            case model.Remove():
                self.step(self._remove(effect))
            case model.Throttled():
                self.stopped = "/data" in effect.stopped
            case model.OnCritical():
                self.commands.append(self.hour)
            case _:
                super()._carry(effect)

    def _rule(self, run: int) -> str:
        return self.names[self.ledger.batches[run].rule]

    def _provide(self, effect: model.Effect) -> None:
        match effect:
            case model.Start(run, attempt) | model.Find(run, attempt):
                self._judge_order(run)
                if self._rule(run) == "motion":
                    self.works_until.setdefault(run, self.at + MOTION_S)
                elif not self.up and not self.outage.silent:
                    self.told_down = True
                    self.step(model.NotStarted(run, attempt, AWAY, self.at))
                    return
                else:
                    self.pipe.advance(self.at, up=self.up)
                    self.pipe.left.setdefault(run, float(self.ledger.batches[run].bytes))
                self.step(model.Started(run, attempt, {"n": attempt}, self.at))
            case model.Poll(run, attempt):
                self.step(self._motion(run, attempt) if self._rule(run) == "motion" else self._copy(run, attempt))
            case model.Verify(run, attempt):
                self.step(model.Proved(run, attempt, self._arrived(run), self.at))

    def _copy(self, run: int, attempt: int) -> model.Polled:
        self.pipe.advance(self.at, up=self.up)
        if not self.up and self.outage.silent:
            return model.Polled(run, attempt, "unreachable", self.at, "no route to the archive")
        if not self.up:
            self.told_down = True
            del self.pipe.left[run]
            return model.Polled(run, attempt, "failed", self.at, fault=AWAY)
        left = self.pipe.left[run]
        if left > 0:
            done = round(self.ledger.batches[run].bytes - left)
            return model.Polled(run, attempt, "active", self.at, bytes_done=done, again_in_s=self.pipe.wait_s(run))
        del self.pipe.left[run]
        self.told_down = False
        return model.Polled(run, attempt, "succeeded", self.at)

    def _motion(self, run: int, attempt: int) -> model.Polled:
        wait = self.works_until[run] - self.at
        if self.stopped or wait > 0:
            return model.Polled(run, attempt, "active", self.at, again_in_s=max(wait, STEP_S))
        (path,) = (member.path for member in self.ledger.batches[run].members)
        if self.free - RESULT < RESERVE:
            self._breaks(f"a result would leave {self.free - RESULT:,} bytes, less than the reserve")
        if self.oracle == "critical":
            self._breaks("something of ours was written while the disk was critical")
        self.worked.add(path)
        self._put(path.replace("movies/", "results/").replace(".tif", ".mrc"), RESULT)
        return model.Polled(run, attempt, "succeeded", self.at)

    def _arrived(self, run: int) -> list[dict[str, object]]:
        members = self.ledger.batches[run].members
        for member in members:
            self.archived[member.path] = ((member.size, member.mtime_ns), self.at)
            self.backlog -= member.size
        self.sets[run] = tuple(member.path for member in sorted(members, key=lambda one: bool(one.role)))
        return [{"path": member.path, "size": member.size} for member in members]

    # --------------------------------------------------------------- the hands

    def why_not(self, run: int) -> str:
        """Return why the files of a run may not be deleted now, '' if they may: the oracle."""
        if not self.up:
            return "its copy cannot be looked at"
        for path in self.sets.get(run) or (member.path for member in self.ledger.batches[run].members):
            state = self.disk[ROOT, path]
            version, since = self.archived.get(path, ((0, 0), 0.0))
            if version != state[:2]:
                return f"{path} is not in the archive"
            if self.at - since < KEEP_FOR_S:
                return f"{path} is there for {self.at - since:.0f} s only"
            if path.endswith(".tif") and path not in self.worked and "motion" not in self.engine.waived:
                return f"{path} is still needed"
        return ""

    def _select(self, effect: model.Select) -> tuple[model.ReclaimSet, ...]:
        found: list[model.ReclaimSet] = []
        size = 0
        if self.liar:
            runs = sorted(self.ledger.batches.keys() - self.taken, reverse=True)
        else:
            runs = sorted(self.sets) if self.up else []  # without the archive nothing may go: `why_not` of each
        for run in runs:
            if self._rule(run) not in effect.rules or (not self.liar and self.why_not(run)):
                continue
            found.append(self._set(run))
            size += found[-1].bytes
            enough = effect.wanted_bytes is not None and size >= effect.wanted_bytes
            if len(found) >= SETS_MAX or (enough and not self.greedy):
                break
        self.answered = deque(one.run for one in found)
        return tuple(found)

    def _set(self, run: int) -> model.ReclaimSet:
        members = sorted(self.ledger.batches[run].members, key=lambda one: bool(one.role))
        files = tuple(
            model.ReclaimFile(ROOT, one.path, self.disk[ROOT, one.path], f".hidden-{run}-{number}")
            for number, one in enumerate(members)
        )
        return model.ReclaimSet(self.ledger.batches[run].rule, run, files)

    def _remove(self, effect: model.Remove) -> model.Removed:
        of, ok, why, place = effect.of, True, "", Place.AT_NAME
        if effect.phase == "aside":
            self._judge_choice(of)
            why = self.why_not(of.run) if effect.phase == "aside" else ""
            ok, place = not why, Place.AT_NAME if why else Place.ASIDE
            self.refused += bool(why)
        elif effect.phase == "gone":
            if why_not := self.why_not(of.run):
                self._breaks(f"deleted, though {why_not}")
            for file in of.files:
                self.used -= file.state[0]
                self.remove(file.path)
            self.sets.pop(of.run, None)
            self.taken.add(of.run)
            self.deleted += 1
            place = Place.GONE
        return model.Removed(effect.id, effect.phase, ok, (place,) * len(of.files), why, "", self.at)

    # ------------------------------------------------------------------ the laws

    def _breaks(self, words: str) -> None:
        self.broken.append(f"hour {self.hour:.2f}: {words}")

    def _judge_order(self, run: int) -> None:
        """While the disk is low, nothing that fills it begins before what helps to empty it, and could begin."""
        if self._rule(run) != "motion" or self.oracle == "ok" or self.told_down:
            return
        if self.per_destination is not None and len(self.pipe.left) >= self.per_destination:
            return
        helps = [
            one for one in self.engine.runs.open
            if self._rule(one) != "motion" and self.ledger.states[one] == RunState.PENDING
        ]  # fmt: skip
        if helps:
            self._breaks(f"run {run} of motion began before run {min(helps)} of {self._rule(min(helps))}")

    def _judge_choice(self, of: model.ReclaimSet) -> None:
        """Only while the disk is low, only until it has enough, and what was first in the answer first."""
        if self.oracle == "ok" or self.free >= self.levels.enough:
            self._breaks(f"run {of.run} was to be deleted with {self.free:,} bytes free, {self.oracle}")
        while not self.liar and self.answered and (first := self.answered.popleft()) != of.run:
            self._breaks(f"run {of.run} was taken before run {first}, which is older")


AWAY = Fault("transient", "/archive is not there", "mount it", Scope.DESTINATION, counts=False)


def allowed(samples: Sequence[Sample], outage: Outage, levels: Levels) -> list[float]:
    """Return, for each minute, the free space of a program that does at once what it may.

    What was written goes to the archive as fast as the way there allows. `keep_for` later it may be deleted, if the
    archive answers, while less than `low` is free, and as fast as reclaim goes.
    """
    free, written = float(TOTAL), 0
    found: list[float] = []
    proved = _proved(samples, outage)
    keep = round(KEEP_FOR_S / 60)
    for number, sample in enumerate(samples):
        free, written = free - (sample.written - written), sample.written
        if _up(sample, outage):
            must_stay = written - (proved[number - keep] if number >= keep else 0.0)
            may = min(float(levels.low), TOTAL - must_stay, free + RECLAIM_BYTES_PER_S * 60.0)
            free = max(free, may)
        found.append(free)
    return found


def _proved(samples: Sequence[Sample], outage: Outage) -> list[float]:
    proved: list[float] = []
    for sample in samples:
        before = proved[-1] if proved else 0.0
        proved.append(min(float(sample.written), before + _up(sample, outage) * ARCHIVE_BYTES_PER_S * 60.0))
    return proved


def _up(sample: Sample, outage: Outage) -> bool:
    """Say whether the archive answered in the minute that ends with this sample."""
    return not outage.begin <= sample.hour - 1 / 60 < outage.end


def caught_up(samples: Sequence[Sample], outage: Outage) -> float:
    """Return how many hours after the outage arithmetic says that the backlog is gone."""
    for sample, proved in zip(samples, _proved(samples, outage), strict=True):
        if sample.hour > outage.end and proved >= sample.written:
            return sample.hour - outage.end
    return float("inf")


# ------------------------------------------------------------------------ the plot

OUTAGE = Outage(72.0, 30.0)
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "week.svg"


def drawn(samples: Sequence[Sample], outage: Outage, levels: Levels) -> str:
    """Return the plot of a week."""
    return Plot(
        "Free space of a disk of 20 TB in a week of 8 TB a day, with the archive away for 30 hours", "hours", "TB",
        x_max=168, y_max=20, x_step=24, y_step=2,
        curves=[
            Curve("free space", thinned([(one.hour, one.free / TB) for one in samples])),
            Curve("not in the archive yet", thinned([(one.hour, one.backlog / TB) for one in samples])),
        ],
        levels=[Level("enough", levels.enough / TB), Level("low", levels.low / TB),
                Level("critical", CRITICAL / TB), Level("reserve", RESERVE / TB)],
        band=Band("no archive", outage.begin, outage.end),
    ).svg()  # fmt: skip


def main() -> None:
    week = Week(OUTAGE, WIDE).run()
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(drawn(week.samples, OUTAGE, WIDE))
    print(f"{IMAGE}; broken: {week.broken or 'nothing'}")


if __name__ == "__main__":
    main()
