"""Reclaim of what Globus has taken: a copy that cannot be looked at from here is asked for, each time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.globus.facility import Facility

pytest.importorskip("globus_sdk")

STAT = "GET /v0.10/operation/endpoint/*/stat"


@pytest.fixture
def facility(tmp_path: Path) -> Iterator[Facility]:
    with Facility(tmp_path) as made:
        made.site.settings["reclaim"] = "enabled"
        reclaim = {"proven_by": ["move"], "keep_for": "3s", "only_under": "always"}
        made.site.write_rules(made.transfer(rule={"reclaim": reclaim}))
        yield made


def gone(facility: Facility, path: Path) -> None:
    under_way = "SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"  # under its hidden name, perhaps
    facility.site.until(lambda: not path.exists() and not facility.site.ask(under_way), 60, "it is reclaimed")


def test_a_copy_at_globus_lets_its_source_go(facility: Facility) -> None:
    """It is looked at there, and `explain` says where it is."""
    path = facility.write("move")
    facility.start()
    gone(facility, path)

    assert facility.globus.requests(STAT)
    (about,) = facility.json("explain", str(path))["rules"]
    assert about["stage"] == "reclaimed"
    assert f"globus://{facility.archive}/raw/move/a.tif" in about["because"]


def live(facility: Facility, seconds: float) -> None:
    """Let the daemon live for so long."""
    beat = facility.site.heartbeat
    began = (beat() or {})["reclaim"]["witnessed_s"]
    facility.site.until(lambda: (beat() or {})["reclaim"]["witnessed_s"] > began + seconds, 60, "it lives")


def smaller(copy: Path) -> None:
    copy.write_bytes(b"x")


def removed(copy: Path) -> None:
    copy.unlink()


def written_later(copy: Path) -> None:
    later = copy.stat().st_mtime + 3_600
    copy.write_bytes(os.urandom(100))
    os.utime(copy, (later, later))


def directory(copy: Path) -> None:
    copy.unlink()
    copy.mkdir()


def replaced_by_an_older_one(copy: Path) -> None:
    """As another machine's transfer leaves it, that keeps the times of its sources."""
    copy.write_bytes(os.urandom(100))
    os.utime(copy, (copy.stat().st_mtime - 3_600,) * 2)


@pytest.mark.parametrize("attack", [smaller, removed, written_later, directory, replaced_by_an_older_one])
def test_a_copy_that_was_altered_keeps_its_source(facility: Facility, attack: Callable[[Path], None]) -> None:
    path = facility.write("move")
    facility.start()
    facility.until("move", "VERIFIED")
    attack(facility.site.out / "raw" / "move" / "a.tif")
    facility.globus.wait(lambda: facility.globus.requests(STAT))
    live(facility, 3.0)

    assert path.exists()
    ((state, because),) = facility.site.ask("SELECT state, because FROM reclaim")
    assert state == "kept" and "not as it was proved" in because


def test_a_collection_that_shows_the_source_holds_no_copy(facility: Facility) -> None:
    """It has its size and time, being the file itself; but while that stands under a hidden name, so does the copy."""
    path = facility.write("move")
    facility.start()
    facility.until("move", "VERIFIED")
    there = facility.site.out / "raw" / "move"
    there.rename(there.with_name("before"))
    there.symlink_to(path.parent)
    facility.site.until(lambda: facility.site.ask("SELECT 1 FROM reclaim WHERE state = 'kept'"), 40, "it is kept")

    ((_, because),) = facility.site.ask("SELECT state, because FROM reclaim")
    assert path.exists() and "is the file itself, by another way" in because


def test_a_service_that_does_not_answer_keeps_sources(facility: Facility) -> None:
    """What is not known is not proved."""
    facility.globus.fault(STAT, "error_before", status=503, times=100)
    path = facility.write("move")
    facility.start()
    facility.until("move", "VERIFIED")
    facility.globus.wait(lambda: facility.globus.requests(STAT))
    live(facility, 3.0)

    assert path.exists()
    ((state, because),) = facility.site.ask("SELECT state, because FROM reclaim")
    assert state == "kept" and "not as it was proved" in because


def test_a_storage_that_keeps_no_times_lets_sources_go(facility: Facility) -> None:
    """When each copy was written there was noted at its proof."""
    facility.globus.mood("Archive", keeps_times=False)
    path = facility.write("move")
    os.utime(path, (path.stat().st_mtime - 86_400,) * 2)
    facility.start()

    gone(facility, path)


def test_the_only_copy_is_known_however_the_collection_is_spelled(facility: Facility) -> None:
    """A UUID in capitals is the same place: what lies there is not replaced."""
    path = facility.write("move")
    content = path.read_bytes()
    facility.start()
    gone(facility, path)
    facility.site.write_rules(facility.transfer(to=facility.archive.upper()))
    facility.site.process.send_signal(signal.SIGHUP)
    facility.write("move")
    facility.until("move", "VERIFIED", "HELD")

    assert (facility.site.out / "raw" / "move" / "a.tif").read_bytes() == content


def test_a_copy_that_another_rule_has_written_since_is_none(facility: Facility) -> None:
    """Of the same size and time, so that the service shows nothing of it: the journal knows who has sent what where."""
    move = facility.transfer(path="/raw")
    facility.site.write_rules(move)
    (facility.site.data / "move" / "b").mkdir()
    mine = facility.write("move", "b/a.tif")
    facility.start()
    facility.until("move", "VERIFIED")
    facility.site.stop()
    other = facility.transfer("other", path="/raw/b")
    facility.site.write_rules(other)
    twin = facility.write("other")
    os.utime(twin, ns=(mine.stat().st_mtime_ns,) * 2)
    facility.start()
    facility.until("other", "VERIFIED")
    facility.site.stop()
    reclaim = {"proven_by": ["move"], "keep_for": "1s", "only_under": "always"}
    facility.site.write_rules({**move, "reclaim": reclaim})
    facility.start()
    facility.site.until(lambda: facility.site.ask("SELECT 1 FROM reclaim WHERE state = 'kept'"), 30, "it is judged")

    assert mine.exists()
    ((because,),) = facility.site.ask("SELECT because FROM reclaim")
    assert "to the same place since" in because
