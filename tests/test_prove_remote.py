"""Network shares, the quick part: sshfs with a server of its own, whose connection is killed mid-way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.prove import remote
from tests.prove.guest.scenes import ShareStage

PATIENCE_S = 5.0  # of a test that waits for what a mutant never says

# Takes whatever lies at the destination for the file system that was there.
MUTANT = """\
import trigger_daemon.actions._copy_destination as place
place.Destination._check_home = lambda self, locks, book: ""
"""


def quiet(words: str) -> None:
    """Progress is for people."""


def test_shares_keep_the_promises(shm_path: Path) -> None:
    """Over sshfs every file is found, batched once and copied, from it and to it, though its connection is killed."""
    result = remote.run(quick=True, seed=0, work=shm_path, tell=quiet)
    if missing := [why for why in result.not_done if why.startswith("sshfs")]:
        pytest.skip("; ".join(missing))

    assert not result.violations
    assert [row["share"] for row in result.rows if "gone" in row["what was done"] and row["what status said"]] == [
        "sshfs: connection killed, watched",
        "sshfs: connection killed, destination",
    ]


def test_a_daemon_that_copies_into_an_empty_mount_point_is_noticed(shm_path: Path) -> None:
    """A daemon that does not tell one mount from another calls verified what no server holds: the proof says so."""

    def sabotage(stage: ShareStage) -> None:
        (shm_path / "sitecustomize.py").write_text(MUTANT)
        search = [str(shm_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        stage.environment["PYTHONPATH"] = os.pathsep.join(search)
        stage.told_s = stage.done_s = PATIENCE_S

    base = shm_path / "mutant"
    try:
        told, violations = remote.sshfs(
            base, "destination", "connection killed", quiet, restart=False, sabotage=sabotage
        )
    except remote.SceneNotSet as why:
        pytest.skip(str(why))

    assert told.broken
    assert {violation.partition(":")[0] for violation in violations} == {"verified", "partial"}
