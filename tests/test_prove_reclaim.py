"""Killed, attacked or without power at steps of reclaim: nothing goes without proof, nothing is forgotten.

A quick look; `make prove` dies at every step. The oracle proves itself: what is
broken on purpose does not pass.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.oracles import sees_what_is_broken
from tests.prove import disks, reclaims
from tests.prove.reclaim_oracle import LAWS, Scene, Wrote, judge
from tests.prove.tracer import SUPPORTED, UNSUPPORTED


class World:
    """What the oracle is given: one set that is gone with its proofs, a file that is there, a journal that says so."""

    def __init__(self, base: Path) -> None:
        self.data, self.out, self.tape = base / "data", base / "out", base / "tape"
        for directory in (self.data, self.out, self.tape):
            directory.mkdir()
        self.wrote: list[Wrote] = []
        for name in ("a.tif", "a.xml", "b.tif"):
            for directory in (self.data, self.out, self.tape):
                (directory / name).write_text(f"content of {name}")
            seen = (self.data / name).stat()
            digest = hashlib.sha256((self.data / name).read_bytes()).hexdigest()
            self.wrote.append(Wrote(name, seen.st_size, seen.st_mtime_ns, digest))
        self.sql = sqlite3.connect(base / "journal.db", isolation_level=None)
        self.sql.executescript(
            "CREATE TABLE reclaim (id, state, because);"
            "CREATE TABLE reclaim_file (reclaim, path, number, size, mtime_ns, place, hidden);"
            "INSERT INTO reclaim VALUES (1, 'done', 'proved elsewhere');"
        )
        for number, one in enumerate(self.wrote[:2]):
            (self.data / one.path).unlink()
            row = (1, one.path, number, one.size, one.mtime_ns, "gone", hidden(number))
            self.sql.execute("INSERT INTO reclaim_file VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self.explained = {"a.tif": "reclaimed", "a.xml": "reclaimed", "b.tif": "verified"}
        destinations = {"disk": self.out, "tape": self.tape}
        self.scene = Scene(self.data, base / "journal.db", self.wrote, destinations, explained=self.explained)


def hidden(number: int) -> str:
    return f".trigger-daemon-reclaim-0123456789abcdef-{number}"


def nothing(world: World) -> None:
    """All is well."""


def no_copy(world: World) -> None:
    (world.tape / "a.xml").unlink()


def copy_differs(world: World) -> None:
    (world.out / "a.tif").write_text("other of a.tif")


def no_row(world: World) -> None:
    world.sql.execute("DELETE FROM reclaim_file")


def not_done(world: World) -> None:
    world.sql.execute("UPDATE reclaim SET state = 'kept'")


def still_there(world: World) -> None:
    for name in ("a.tif", "a.xml"):
        shutil.copy(world.out / name, world.data / name)
        world.explained[name] = "verified"


def one_is_there(world: World) -> None:
    shutil.copy(world.out / "a.xml", world.data / "a.xml")
    world.sql.execute("UPDATE reclaim_file SET place = 'at its name' WHERE path = 'a.xml'")
    world.explained["a.xml"] = "verified"


def one_is_there_and_told(world: World) -> None:
    one_is_there(world)
    world.sql.execute("UPDATE reclaim SET because = 'proved elsewhere; not all of it: it was opened'")


def hidden_for_ever(world: World) -> None:
    (world.data / "b.tif").rename(world.data / hidden(2))


def hidden_and_told(world: World) -> None:
    hidden_for_ever(world)
    world.scene.told = f"{world.data}/{hidden(2)} stands there"


def hidden_told_and_known(world: World) -> None:
    hidden_and_told(world)
    world.sql.execute("UPDATE reclaim_file SET hidden = ?", (hidden(2),))


def under_way(world: World) -> None:
    world.sql.execute("INSERT INTO reclaim VALUES (2, 'intended', '')")


def never_written(world: World) -> None:
    (world.data / "b.tif").write_text("neither version")
    (world.out / "b.tif").unlink()


def kept_beside(world: World) -> None:
    (world.data / "b.tif").rename(world.data / "b.tif.kept-1")


def hidden_name_sent(world: World) -> None:
    (world.tape / hidden(0)).write_text("content of a.tif")


def explained_as_there(world: World) -> None:
    world.explained["a.tif"] = "verified"


def explained_as_gone(world: World) -> None:
    world.explained["b.tif"] = "reclaimed"


BROKEN: list[tuple[Callable[[World], None], set[str]]] = [
    (nothing, set()), (kept_beside, set()), (one_is_there_and_told, set()),
    (no_copy, {"lost"}), (copy_differs, {"lost"}), (no_row, {"untold"}), (not_done, {"untold"}),
    (still_there, {"untrue"}), (one_is_there, {"apart"}), (hidden_for_ever, {"hidden"}),
    (hidden_and_told, set()), (hidden_told_and_known, {"hidden"}), (under_way, {"open"}),
    (never_written, {"stranger", "lost", "untold"}), (hidden_name_sent, {"sent"}), (explained_as_there, {"explain"}),
    (explained_as_gone, {"explain"}),
]  # fmt: skip


test_the_oracle_sees_what_is_broken_and_nothing_else = sees_what_is_broken(World, judge, BROKEN)


def test_a_hidden_file_that_no_set_under_way_knows_is_forgotten(tmp_path: Path) -> None:
    """Under way a hidden name is well, if the journal has it."""
    world = World(tmp_path)
    (world.data / "b.tif").rename(world.data / hidden(2))
    assert {violation.law for violation in judge(world.scene, idle=False)} == {"forgotten"}

    one = world.wrote[2]
    world.sql.execute("INSERT INTO reclaim VALUES (2, 'intended', '')")
    row = (2, one.path, 0, one.size, one.mtime_ns, "", hidden(2))
    world.sql.execute("INSERT INTO reclaim_file VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    assert judge(world.scene, idle=False) == []


def test_each_law_of_the_oracle_is_seen_to_be_broken() -> None:
    """A law that nothing breaks proves nothing."""
    assert {law for _, laws in BROKEN for law in laws} | {"forgotten"} == set(LAWS)


@pytest.mark.serial
def test_killed_at_steps_of_reclaim_nothing_is_lost_or_forgotten(shm_path: Path) -> None:
    """Started again, also after files, copies, settings or the journal were changed meanwhile; one bug is seen."""
    told: list[str] = []
    result = reclaims.run(quick=True, seed=1, work=shm_path, tell=told.append)

    assert not result.violations, result.violations
    assert not result.not_done, result.not_done
    assert int(result.figures["deaths"]) >= len(reclaims.QUICK)


@pytest.mark.serial
def test_without_power_nothing_is_lost_or_forgotten(shm_path: Path) -> None:
    """Journal on one disk, sources on another; cut when all is done, and what was called done is."""
    if not SUPPORTED or (reason := disks.missing("ext4")):
        pytest.skip(reason if SUPPORTED else UNSUPPORTED)
    said = reclaims.cut_lane(("ext4", "ext4"), shm_path / "cuts", 15.0, 1)

    assert sum(one.get("reached", False) for one in said) >= 2
    assert [words for one in said for words in one.get("broken", ())] == []


@pytest.mark.serial
@pytest.mark.parametrize("bug", [*reclaims.CUT_BUGS])
def test_a_power_cut_shows_what_was_not_durable(shm_path: Path, bug: str) -> None:
    """A daemon that says `done` too early is seen."""
    if not SUPPORTED or (reason := disks.missing("ext4")):
        pytest.skip(reason if SUPPORTED else UNSUPPORTED)
    code, law = reclaims.CUT_BUGS[bug]
    first, *_ = reclaims.cut_lane(("ext4", "ext4"), shm_path / "cuts", 5.0, 1, code)

    assert any(f" {law}: " in words for words in first["broken"]), first
