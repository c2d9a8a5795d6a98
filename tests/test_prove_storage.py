"""A quick look at storage as `make prove` proves it: a small xfs that fills, and bugs that must be seen on ext4.

xfs is the stricter one: it sets aside blocks for each change that is under way, below the reserve if nothing was left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("mounts and /proc are Linux", allow_module_level=True)

from tests.prove import disks, neighbour, storage

MIB = 2**20


@pytest.fixture
def place(shm_path: Path) -> Iterator[Path]:
    """A directory with room for a small file system and more than fits on it."""
    for kind in ("ext4", "xfs"):
        if why := disks.missing(kind):
            pytest.skip(why)
    with storage.roomy(shm_path, storage.QUICK) as found:
        if found is None:
            pytest.skip(f"neither {shm_path} nor the temporary directory has {storage.need(storage.QUICK):,} bytes")
        yield found


def played(kind: str, place: Path, mutant: str = "") -> storage.Outcome:
    """Fill it; skip where it cannot be mounted."""
    outcome = storage.play(kind, storage.QUICK, place / "scene", mutant=mutant)
    if outcome.not_done:
        pytest.skip(outcome.not_done)
    return outcome


@pytest.mark.serial
def test_eight_runs_of_unknown_size_leave_the_reserve_and_all_is_verified_when_there_is_room(place: Path) -> None:
    """Alone they never touch it; while a neighbour is below they take nothing more; then they go on by themselves."""
    outcome = played("xfs", place)

    assert outcome.broken == []
    assert outcome.figures["runs waiting"] and outcome.figures["times the neighbour went below"]


@pytest.mark.serial
@pytest.mark.parametrize("bug", storage.MUTANTS)
def test_a_daemon_that_writes_into_the_reserve_is_seen(place: Path, bug: str) -> None:
    """With copies that do not look, and with promises that nobody counts, the same scene breaks."""
    outcome = played("ext4", place, bug)

    assert any("of the reserve" in words for words in outcome.broken)


# ------------------------------------------------------------------------------ who watches


def test_the_neighbour_tells_its_own_bytes_from_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours below the reserve is seen to the byte; the neighbour's own is not ours; a race is counted by itself."""
    free = [100 * MIB]
    own = [0]
    now = [0.0]
    monkeypatch.setattr(neighbour.Watch, "_look", lambda self: free[0])
    monkeypatch.setattr(neighbour.Watch, "_own", lambda self: own[0])
    monkeypatch.setattr(neighbour.time, "monotonic", lambda: now[0])
    watch = neighbour.Watch(str(tmp_path), 20 * MIB)

    def later(*, ours: int = 0, theirs: int = 0, after_s: float = 1.0) -> tuple[object, object]:
        now[0] += after_s
        watch.sample()
        if theirs:
            own[0] += theirs
            free[0] -= theirs
            watch._taken, watch._before, watch._taken_at = own[0], theirs, now[0]
            watch.sample(theirs)
        free[0] -= ours
        watch.sample()
        told = watch.told()
        watch.mark()
        return told["crossed"], told["raced"]

    assert later(ours=80 * MIB) == (0, 0)
    assert later(ours=1) == (1, 0)
    assert later(ours=-50 * MIB - 1) == (0, 0)
    assert later(theirs=60 * MIB) == (0, 0)
    assert later(ours=MIB) == (MIB, 0)
    assert later(ours=-31 * MIB) == (0, 0)
    assert later(theirs=25 * MIB, ours=MIB) == (0, MIB)
