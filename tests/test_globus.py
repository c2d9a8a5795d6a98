"""The daemon against the emulated Globus: each batch is one task, one run, whatever goes wrong.

A small part of `python -m tests.globus.chaos`, and a kill at every named place
between what is asked of the service and what the journal knows of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.globus.chaos import Chaos

PLACES = (
    "executor.prepare", "executor.prepared", "executor.start", "globus.submit", "globus.submitted", "globus.run",
    "globus.running", "executor.started", "executor.poll", "executor.polled", "executor.verify", "globus.access",
    "globus.ingest", "executor.verified",
)  # fmt: skip


def test_every_fault_at_random_and_kills(tmp_path: Path) -> None:
    """Refused, lost, slow, cut and false answers, and SIGKILLs: one task and one run a batch, all proved."""
    chaos = Chaos(tmp_path, seed=20)
    with chaos.globus:
        chaos.set_up()
        chaos.faults(0.01)  # of each kind: every eleventh request meets one
        try:
            chaos.work(20, 4, 100)
            chaos.globus.clear_faults()
            figures = chaos.judge()
        finally:
            chaos.site.stop()

    assert (figures["tasks"], figures["runs"], figures["kills"]) == (20, 20, 4)
    assert figures["faults met"] > 10


@pytest.mark.parametrize(
    "plan",
    [f"{place}:kill" for place in PLACES]
    + [f"loop.{when}_commit:kill@{visit}" for when in ("before", "after") for visit in (4, 6)],
)
def test_killed_between_question_and_answer(tmp_path: Path, plan: str) -> None:
    """Between id, journal, POST, proof, permission and index: the next life asks what became of it."""
    chaos = Chaos(tmp_path)
    with chaos.globus:
        chaos.set_up()
        chaos.write(0)
        chaos.start(plan)
        process = chaos.site.process
        assert process is not None
        assert process.wait(60) == -9, f"it never came there: {chaos.site.tail()}"
        chaos.start()
        try:
            chaos.site.until(lambda: chaos.done() >= 1, 60, "both rules have done with the file")
            figures = chaos.judge()
        finally:
            chaos.site.stop()

    assert (figures["tasks"], figures["runs"]) == (1, 1)
