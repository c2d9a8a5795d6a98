"""A quick selection of the proof, and of its oracle: `make prove` runs all of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.oracles import sees_what_is_broken
from tests.prove import crashpoints, mutants, reclaims, recovery
from tests.prove.oracle import LAWS, Promise, Scene, judge
from tests.prove.stage import Writer, content
from trigger_daemon import failpoints


def told(words: str) -> None:
    """Progress is for people who wait."""


class World:
    """What an oracle is given: a source, its record, a destination, a journal; all as they should be at first."""

    def __init__(self, base: Path) -> None:
        self.source, self.out = base / "source", base / "out"
        self.source.mkdir()
        self.out.mkdir()
        self.journal, self.executions = base / "journal.db", base / "executions"
        self.writer = Writer(self.source, base / "record")
        self.writer.whole("a.tif", content("a", 500))
        (self.out / "a.tif").write_bytes(content("a", 500))
        seen = (self.source / "a.tif").stat()
        self.version = [seen.st_size, seen.st_mtime_ns]
        self.sql = sqlite3.connect(self.journal, isolation_level=None)
        self.sql.executescript(
            "CREATE TABLE rule (id INTEGER PRIMARY KEY, name); CREATE TABLE batch (id, rule, closed_time, manifest);"
            "CREATE TABLE run (id, state, final, because); INSERT INTO rule VALUES (1, 'copy'), (2, 'work');"
        )
        self.closed = seen.st_mtime_ns / 1e9 + 1.0
        for rule in (1, 2):
            self.batch(rule, rule, "VERIFIED" if rule == 1 else "SUCCEEDED")
        self.executed()
        promises = [
            Promise("copy", lambda path: path.endswith(".tif"), self.out, 0.5),
            Promise("work", lambda path: path.endswith(".tif"), None, 0.5),
        ]
        self.scene = Scene(self.source, base / "record", self.executions, self.journal, promises)

    def batch(self, number: int, rule: int, state: str, **keys: Any) -> None:
        member = [1, "", "a.tif", *keys.get("version", self.version), "", "", ""]
        closed = keys.get("closed", self.closed)
        self.sql.execute("INSERT INTO batch VALUES (?, ?, ?, ?)", (number, rule, closed, json.dumps([member])))
        self.sql.execute("INSERT INTO run VALUES (?, ?, 1, '')", (number, state))

    def executed(self) -> None:
        with self.executions.open("a") as file:
            line = {"execution": file.tell(), "rule": "work", "files": [["a.tif", *self.version]]}
            file.write(json.dumps(line) + "\n" + json.dumps({"execution": line["execution"], "exit": 0}) + "\n")


def nothing(world: World) -> None:
    """All is well."""


def no_batch(world: World) -> None:
    world.sql.execute("DELETE FROM batch WHERE id = 1")


def not_ended(world: World) -> None:
    world.sql.execute("UPDATE run SET state = 'HELD' WHERE id = 2")


def too_soon(world: World) -> None:
    world.sql.execute("UPDATE batch SET closed_time = closed_time - 0.6 WHERE id = 1")


def half_a_file(world: World) -> None:
    world.batch(3, 2, "SUCCEEDED", version=[100, world.version[1]])


def two_batches(world: World) -> None:
    world.batch(3, 2, "SUCCEEDED")


def executed_again(world: World) -> None:
    world.executed()


def executed_unknown(world: World) -> None:
    world.sql.execute("DELETE FROM batch WHERE id = 2")


def never_executed(world: World) -> None:
    world.executions.write_text("")


def cut_at_the_destination(world: World) -> None:
    (world.out / "a.tif").write_bytes(content("a", 499))


def left_over(world: World) -> None:
    (world.out / ".a.tif.part").write_bytes(b"x")


def not_there(world: World) -> None:
    (world.out / "a.tif").unlink()


def source_removed(world: World) -> None:
    (world.source / "a.tif").unlink()


def source_changed(world: World) -> None:
    (world.source / "a.tif").write_bytes(b"other")


def source_littered(world: World) -> None:
    (world.source / ".hidden").write_bytes(b"x")


BROKEN: list[tuple[Callable[[World], None], set[str]]] = [
    (nothing, set()), (no_batch, {"missed"}), (not_ended, {"missed"}), (too_soon, {"early"}), (half_a_file, {"early"}),
    (two_batches, {"twice"}), (executed_again, {"twice"}), (executed_unknown, {"twice", "missed"}),
    (never_executed, {"missed"}),
    (cut_at_the_destination, {"partial", "verified"}), (left_over, {"partial"}), (not_there, {"verified"}),
    (source_removed, {"deleted"}), (source_changed, {"deleted"}), (source_littered, {"deleted"}),
]  # fmt: skip


test_the_oracle_sees_what_is_broken_and_nothing_else = sees_what_is_broken(World, judge, BROKEN)


def test_each_law_has_a_mutant() -> None:
    """A law that no bug was seen to break proves nothing."""
    assert {mutant.law for mutant in mutants.MUTANTS.values()} == set(LAWS)


def test_a_bug_in_the_daemon_is_seen(shm_path: Path) -> None:
    """One that calls verified what it has not read back."""
    result = mutants.run(quick=True, seed=1, work=shm_path, tell=told)

    assert result.violations == [] and result.figures["caught"] == 1


def test_every_fail_point_is_died_at_or_says_why_not() -> None:
    """A step nobody dies at is a step nobody has thought about."""
    names = set(failpoints.names())

    assert set(crashpoints.NOT_DEATHS) <= names and set(crashpoints.FIRST) <= names and set(crashpoints.QUICK) <= names
    assert {*crashpoints.points(), *reclaims.points(), *crashpoints.NOT_DEATHS} == names
    assert set(reclaims.BESIDE) | set(reclaims.AFTER) <= set(reclaims.points()) and set(reclaims.AROUND) <= names
    assert len(names) > 30


def test_killed_at_some_crash_points_it_keeps_its_promises(shm_path: Path) -> None:
    """Between decision, commit, start and rename: started again, it ends the work; nothing twice, nothing partial."""
    result = crashpoints.run(quick=True, seed=1, work=shm_path, tell=told)

    assert result.violations == [] and result.not_done == []
    assert result.figures["deaths at them"] == len(crashpoints.QUICK)


def test_a_killed_daemon_with_many_files_batches_none_again(shm_path: Path) -> None:
    """Twenty thousand done and a thousand open ones are met by the first sweep, and stay what they were."""
    result = recovery.run(quick=True, seed=1, work=shm_path, tell=told)

    assert result.violations == []
