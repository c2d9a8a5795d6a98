"""The benchmarks' own arithmetic: a ratio is of one round, and a target that is missed is told as missed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from measure import Found, NotMeasured, exponent, rounds
from report import Row, picture, row_of, table


def test_a_ratio_is_that_of_one_round():
    """Rounds in which one of the two is missing count for neither; medians of different rounds are never divided."""
    found = Found()
    found.turns = [{"us": {"s": 1.0}, "cp": {"s": 2.0}}, {"us": {"s": 9.0}}, {"us": {"s": 30.0}, "cp": {"s": 10.0}}]

    assert found.ratios("us", "cp", "s") == [0.5, 3.0]


def test_who_cannot_be_measured_is_named_and_not_asked_again():
    """Others are measured all the same."""
    asked = []

    def absent():
        asked.append(1)
        raise NotMeasured("it is not installed")

    found = rounds(3, {"us": lambda: {"s": 1.0}, "rclone": absent}, "copy")

    assert found.values("us", "s") == [1.0, 1.0, 1.0]
    assert (found.failed, len(asked)) == ({"rclone": "it is not installed"}, 1)


@pytest.mark.parametrize(
    ("row", "reached", "missed_by"),
    [
        (Row(1, "lost", [0.0, 0.0], bound=0), True, 1.0),
        (Row(1, "lost", [1.0], bound=0), False, float("inf")),
        (Row(1, "CPU", [50.0], against="inotifywait", theirs=[10.0], ratios=[5.0], bound=2.5), False, 2.0),
        (Row(4, "speed", [9.0], against="inotifywait", theirs=[10.0], ratios=[0.9], bound=0.95, at_least=True), False,
         0.95 / 0.9),
        (Row(12, "idle", [0.1], bound=0.2), True, 0.5),
        (Row(3, "told", [5.0]), None, None),
        (Row(9, "start", [], bound=0.5), None, None),
    ],
)  # fmt: skip
def test_a_target_is_reached_or_missed_by_a_factor(row, reached, missed_by):
    """A figure with somebody beside it is judged by its ratio, one alone by itself, one not measured not at all."""
    assert row.reached is reached
    assert row.missed_by == (None if missed_by is None else pytest.approx(missed_by))


def test_growth_is_told_as_an_exponent():
    """Ten times the work at ten times the cost is 1, at a hundred times 2."""
    assert exponent([1, 10, 100], [2, 20, 200]) == pytest.approx(1.0)
    assert exponent([1, 10], [3, 300]) == pytest.approx(2.0)


def test_rows_come_back_from_their_figures_and_are_drawn():
    """A part that is measured again joins rows that were measured before."""
    row = Row(2, "drained | rate", [3.0, 4.0], "/s", "inotifywait", [2.0, 2.0], [1.5, 2.0], 1.0, at_least=True)
    told = {**{name: getattr(row, name) for name in row.__dataclass_fields__}, "reached": True}

    assert row_of(told) == row
    assert "| yes |" in table([row]) and "drained / rate" in table([row])
    assert 'class="yes"' in picture([row])
