"""A quick selection of the faults that `make prove` makes, those that no other test makes; and a bug they find."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("mounts, FUSE and LD_PRELOAD are Linux", allow_module_level=True)

from tests.prove import faults
from tests.prove.faulty_fuse import Unable


def played(name: str, place: Path) -> faults.Outcome:
    """Play a scenario; skip where its means are missing."""
    outcome = faults.play(name, place / name, rounds=faults.SIGTERMS_QUICK)
    if outcome.not_done:
        pytest.skip(outcome.not_done)
    return outcome


def test_verified_survives_a_server_that_loses_what_was_not_synced(shm_path: Path) -> None:
    """While fsync fails nothing is called verified, status says so; what is verified later outlives the server."""
    outcome = played("destination_fsync_while", shm_path)

    assert outcome.broken == []
    assert "Input/output error" in outcome.row["status"]


def test_a_daemon_that_ignores_a_failed_sync_is_caught(shm_path: Path) -> None:
    """The scenario can fail: with os.fsync made to swallow its errors, verified files are found empty."""
    try:
        caught = faults.mutant_caught(shm_path)
    except Unable as error:
        pytest.skip(str(error))

    assert caught


def test_a_clock_set_by_days_starts_nothing_early_and_nothing_twice(shm_path: Path) -> None:
    """Files written while the wall clock goes a day ahead and two back are taken whole, once, and all of them."""
    outcome = played("clock_steps", shm_path)

    assert outcome.broken == []


def test_a_journal_whose_disk_goes_away_is_not_begun_anew(shm_path: Path) -> None:
    """The journal's mount leaves an empty directory: nothing starts on an empty journal; mounted again, it goes on."""
    outcome = played("journal_disk_unmounted", shm_path)

    assert outcome.broken == []
