"""The two pipelines of the tutorials, with the example rules and flows as they stand, on an emulated Globus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.globus import pipelines

Open = Callable[[str], pipelines.Facility]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    facilities: list[pipelines.Facility] = []

    def make(example: str) -> pipelines.Facility:
        facilities.append(facility := pipelines.Facility(tmp_path))
        facility.open(example)
        return facility

    yield make
    for facility in facilities:
        facility.close()


def test_cryo_em(opened: Open) -> None:
    """Raw movies with their XML to the archive, results too, each once; the visit, and only it, opened; all indexed."""
    figures = pipelines.cryo_em(opened("cryo-em"))

    assert (figures["movies"], figures["results"], figures["runs"]) == (120, 120, 4)


def test_ssx(opened: Open) -> None:
    """Only a chip that has passed its quality control goes on; only batches with enough hits are published."""
    figures = pipelines.ssx(opened("ssx"))

    assert (figures["images"], figures["published"] + figures["not_published"]) == (1_250, figures["runs"])
