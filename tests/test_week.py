"""A week of 8 TB a day at a disk of 20 TB: nobody meets a full disk where arithmetic allows it, nothing goes unproved.

The week is simulated (tests/week.py); a shorter one is real (tests/prove/week.py).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.prove.disks import missing
from tests.prove.week import QUICK, live
from tests.week import (
    CRITICAL,
    GB,
    IMAGE,
    MOVIE,
    NARROW,
    OUTAGE,
    PER_DAY,
    TB,
    WIDE,
    Levels,
    Outage,
    Sample,
    Week,
    allowed,
    caught_up,
    drawn,
)
from trigger_daemon.core import model

pytestmark = pytest.mark.xdist_group("week")  # its simulations are shared: one worker makes each of them once

SLACK = 100 * GB  # what comes in a quarter of an hour, and ten movies
FIGURES = re.compile(
    r"least free is ([\d.]+) TB.*?gone ([\d.]+) h after.*?critical after ([\d.]+) h, and full ([\d.]+) h\s+later",
    re.DOTALL,
)


@cache
def week(
    outage: Outage, levels: Levels, days: float, per_destination: int | None = None, restart_at: float = -1.0
) -> Week:
    return Week(outage, levels, days=days, per_destination=per_destination, restart_at=restart_at).run()


def backlog_gone(samples: list[Sample], outage: Outage) -> float:
    """Return after how many hours nothing was left but what had just come."""
    return next(one.hour - outage.end for one in samples if one.hour > outage.end and one.backlog < 4 * MOVIE)


POSSIBLE = [(OUTAGE, WIDE, 7.0, None), (Outage(36.0, 30.0, silent=True), WIDE, 4.0, 2)]
IMPOSSIBLE = Outage(48.0, 30.0)  # with less than 10 TB free when it begins
NOT_POSSIBLE = (IMPOSSIBLE, NARROW, 5.0, None, 70.0)
possible = pytest.mark.parametrize("given", POSSIBLE, ids=["attempts fail", "nobody answers"])


@possible
def test_the_instrument_never_meets_a_full_disk(given: tuple[Outage, Levels, float, int | None]) -> None:
    """Arithmetic allows it: so there is no lost movie, no critical hour, and all laws hold at each instant."""
    lived = week(*given)
    assert min(allowed(lived.samples, *given[:2])) > CRITICAL + SLACK

    assert lived.broken == []
    assert lived.lost == []
    assert (lived.critical_at, lived.commands) == ([], [])
    assert lived.deleted > 1_000
    assert lived.used == sum(state[0] for state in lived.disk.values())


@possible
def test_no_less_is_free_than_could_be(given: tuple[Outage, Levels, float, int | None]) -> None:
    """In each minute as much as a program has that does at once what it may."""
    lived = week(*given)
    short = [
        (sample.hour, sample.free, round(could))
        for sample, could in zip(lived.samples, allowed(lived.samples, *given[:2]), strict=True)
        if sample.free < could - SLACK
    ]

    assert short == []


@possible
def test_after_the_outage_it_catches_up(given: tuple[Outage, Levels, float, int | None]) -> None:
    """As soon as the way to the archive allows it, and the longest wait between two attempts."""
    lived, outage = week(*given), given[0]
    soonest = caught_up(lived.samples, outage)

    assert soonest < 15.0
    assert backlog_gone(lived.samples, outage) < soonest + 1.0
    assert max(one.backlog for one in lived.samples) > 0.95 * PER_DAY * outage.hours / 24


def test_where_arithmetic_does_not_allow_it_it_is_told_in_time() -> None:
    """The command runs once, hours before the disk is full; what is ours stops above the reserve; then it recovers.

    It is killed once while the disk is critical, and does not run the command again.
    """
    lived = week(*NOT_POSSIBLE)
    restart_at = NOT_POSSIBLE[-1]
    assert min(allowed(lived.samples, IMPOSSIBLE, NARROW)) < MOVIE

    assert lived.broken == []
    assert lived.lost, "the instrument had to meet a full disk"
    assert lived.commands[0] < restart_at < lived.lost[-1]
    assert lived.commands == lived.critical_at
    assert len(lived.commands) == 1
    assert lived.lost[0] - lived.commands[0] > 0.9 * CRITICAL / PER_DAY * 24
    ended = [effect.key for effect in lived.effects if isinstance(effect, model.AlarmCleared)]
    assert ended.count("storage:/data:critical") == 1
    assert "storage:/data:critical" not in lived.engine.alarms.open
    last = lived.samples[-1]
    assert last.backlog < 4 * MOVIE, "all that was written is in the archive"
    assert last.free > NARROW.low - SLACK
    assert lived.used == sum(state[0] for state in lived.disk.values())


def test_a_reading_that_says_low_is_acted_on_at_once() -> None:
    """A burst may fill a small disk in minutes: what could go is looked for with that very reading."""
    fresh = Week(OUTAGE, NARROW)
    fresh.run_for(5.0)
    effects = fresh.step(model.Gauged("/data", NARROW.low - 1, 20 * TB, fresh.at))

    assert [type(effect) for effect in effects].count(model.Select) == 1


def test_what_could_go_is_not_looked_for_all_the_time() -> None:
    """While the disk is low and nothing may go, for a day, each file is looked at twice a minute at most."""
    lived = week(*NOT_POSSIBLE)
    asked = [hour for hour in lived.asked_for if IMPOSSIBLE.begin + 8 < hour < IMPOSSIBLE.end]
    low = [one for one in lived.samples if IMPOSSIBLE.begin + 8 < one.hour < IMPOSSIBLE.end]
    assert all(one.free < NARROW.low for one in low)

    assert len(low) / 2 < len(asked) <= 2 * (len(low) + 2)


def test_hands_that_name_too_much_delete_no_more_than_was_asked_for() -> None:
    """The core stops at `enough`, whatever could go."""
    lived = Week(Outage(40.0, 1.0), WIDE, days=1.5, greedy=True).run()

    assert lived.broken == []
    assert lived.deleted > 100


def test_hands_that_name_what_is_not_proved_delete_nothing_more() -> None:
    """What was chosen is judged once more when it is aside, and put back."""
    lived = Week(Outage(40.0, 8.0), WIDE, days=2.5, liar=True).run()

    assert lived.broken == []
    assert lived.refused > 10
    assert lived.used == sum(state[0] for state in lived.disk.values())


# ---------------------------------------------------------------------------- really


@pytest.mark.serial
def test_a_real_daemon_at_a_real_disk_keeps_these_laws(shm_path: Path) -> None:
    """Three days in forty seconds: a small ext4, a writer, an archive that goes away and comes back."""
    if why := missing("ext4"):
        pytest.skip(why)
    lived = live(QUICK, shm_path)

    assert lived.judge() == []
    assert lived.away < lived.back
    assert len(lived.done) > 50


# ---------------------------------------------------------------------- the documents


def test_the_plot_is_that_of_the_simulation() -> None:
    """`python -m tests.week` makes it again."""
    assert IMAGE.read_text() == drawn(week(*POSSIBLE[0]).samples, OUTAGE, WIDE)


def test_the_figures_of_the_documents_are_those_of_the_simulation() -> None:
    """What is told beside the plot is what it shows."""
    samples = week(*POSSIBLE[0]).samples
    told = FIGURES.search((Path(__file__).parent.parent / "docs" / "how-to" / "storage.md").read_text())

    assert told is not None
    least = min(one.free for one in samples)
    assert told.groups()[:2] == (f"{least / TB:.1f}", f"{backlog_gone(samples, OUTAGE):.1f}")
    narrow = week(*NOT_POSSIBLE)
    critical, full = narrow.critical_at[0], narrow.lost[0]
    assert told.groups()[2:] == (f"{critical - IMPOSSIBLE.begin:.1f}", f"{full - critical:.1f}")
