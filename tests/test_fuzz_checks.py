"""Law: whatever the bytes, a check gives a verdict, within its bounds. An hour of it: `python tests/fuzz_checks.py`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz_checks import damaged, fuzz, make_seeds
from trigger_daemon import registry
from trigger_daemon.checks import xml
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Probe


@pytest.mark.parametrize("check", registry.check_names())
def test_damaged_files_give_verdicts(check: str) -> None:
    """No exception, no read beyond the budget, no time beyond the deadline, no descriptor and no process left."""
    tallies = fuzz(20_250_611, checks=[check], cases=8 if check == "eiger" else 300)

    assert sum(tallies[check].said.values()) >= tallies[check].cases


def test_a_case_can_be_had_again() -> None:
    """The same seed makes the same damage."""
    seeds = make_seeds()
    first, second = (damaged(random.Random("7:tiff:1"), seeds["movie.tif"], seeds) for _ in range(2))

    assert first == second != seeds["movie.tif"]


def test_an_entity_declared_at_the_very_end_is_no_failure(tmp_path: Path) -> None:
    """Found by damage: the parser tells of the declaration only when it hears that no more will come."""
    path = tmp_path / "x.xml"
    path.write_bytes(b'<!DOCTYPE a [<!ENTITY b "cccc"')
    with Probe(path) as probe:
        assert xml.check(probe, {}, {}).verdict is Verdict.INCOMPLETE
