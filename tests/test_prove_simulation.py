"""A quick selection of simulated histories, and proof that the harness would notice."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prove import simulation
from tests.prove.simulation import MUTANTS, SHAPES, Mutant, Told, found_out, history
from trigger_daemon.core.model import Scope

ROOT = Path(__file__).parent.parent
HISTORIES = 60
SEEDS = (3, 9, 12, 15)


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A directory in memory, where there is one: a journal's commits wait for no disk there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=base) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def histories(work: Path) -> list[Told]:
    return [history(seed, work) for seed in range(HISTORIES)]


def test_every_promise_holds_over_simulated_histories(histories: list[Told]) -> None:
    """Whatever fails, and whenever the process ends: nothing missed, early, twice, unproved, or without an end."""
    assert [f"seed {told.seed} ({told.kind}): {told.broken[0]}" for told in histories if told.broken] == []


def test_a_history_is_its_seed(work: Path) -> None:
    """What fails once fails again: also in another process, where sets of words have another order."""
    here = [history(seed, work, verbose=True).lines for seed in SEEDS]
    script = (
        "import sys; from pathlib import Path; from tests.prove.simulation import history\n"
        f"print(ascii([history(seed, Path(sys.argv[1]), verbose=True).lines for seed in {SEEDS}]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, str(work)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert sum(map(len, here)) > 100
    assert ast.literal_eval(said.stdout) == here


def test_the_histories_hold_what_they_are_for(histories: list[Told]) -> None:
    """They crash at many places, every kind of fault strikes, and every rule set has its turn."""
    counts = sum((told.counts for told in histories), Counter())
    kinds = {f"fault: {kind}, {scope}" for kind in ("transient", "permanent", "person") for scope in Scope}

    assert {told.kind for told in histories} == set(SHAPES)
    assert len([name for name in counts if name.startswith("crash: ")]) >= 8
    assert len(kinds & counts.keys()) >= 8
    assert counts.keys() >= {
        "fault: journal full", "fault: journal.commit:eio", "fault: journal.committed:eio", "fault: start lost",
        "fault: start answer lost", "fault: unreachable", "fault: inactive", "fault: failed after work",
        "fault: call given up", "fault: root away", "fault: sweep failed", "fault: differs",
    }  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.words.replace(" ", "-"))
def test_each_broken_promise_is_found_out(mutant: Mutant, work: Path) -> None:
    """With one deliberate bug the same histories break, and the judge of that promise says so first."""
    told = found_out(mutant, range(simulation.MUTANT_HISTORIES), work)

    assert told is not None
