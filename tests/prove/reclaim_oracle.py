"""The oracle of reclaim: from what was written, what is there now, the copies and the journal it says what was broken.

It shares no code with the daemon. Of each version that the instrument wrote it
asks: does it stand somewhere, or is it gone with copies at every destination
and the journal's word for it? Under a hidden name nothing stands in the end, but
what the journal was made to forget: that is told.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.prove.oracle import Violation

LAWS = ("lost", "untold", "untrue", "hidden", "forgotten", "open", "apart", "stranger", "sent", "explain")
HIDDEN = re.compile(r"\.trigger-daemon-reclaim-[0-9a-f]+-\d+")


class Wrote(NamedTuple):
    """A version that the instrument wrote, durably; `path` below its root."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass
class Row:
    """A set of the journal's, file by file: version -> place, hidden name."""

    id: int
    state: str
    because: str
    files: dict[tuple[str, int, int], tuple[str, str]] = field(default_factory=dict)


@dataclass
class Scene:
    """Everything that there is to judge by."""

    data: Path
    journal: Path
    wrote: Sequence[Wrote]
    destinations: Mapping[str, Path]  # of each rule of `proven_by`
    overwritten: frozenset[Wrote] = frozenset()  # by the instrument itself, at their names
    excused: frozenset[Wrote] = frozenset()  # gone, and judged, before something was done to copies or journal
    frozen: str = ""  # why nothing may have been deleted since `excused` were
    told: str = ""  # what the daemon says of its roots
    explained: Mapping[str, str] = field(default_factory=dict)  # path -> stage


def judge(scene: Scene, *, idle: bool) -> list[Violation]:
    """Return every broken promise. `idle`: the daemon had the time to end what it had begun. Raises sqlite3.Error."""
    tree, rows = _tree(scene.data), read_rows(scene.journal)
    lost = [one for one in gone(scene, tree) if one not in scene.excused]
    found = [*_lost(scene, lost), *_untold(lost, rows, idle=idle), *_untrue(scene, tree, rows)]
    found += [*_hidden(scene, tree, rows, idle=idle), *_apart(scene, rows, tree), *_strangers(scene, tree)]
    found += _sent(scene)
    if idle:
        found += [Violation("open", f"set {row.id} is {row.state} still") for row in rows if row.state in _OPEN]
        found += _explained(scene, tree)
    return found


_OPEN = ("intended", "confirmed")


def gone(scene: Scene, tree: Mapping[str, str] | None = None) -> list[Wrote]:
    """Return the versions that stand nowhere in their directory, and that the instrument did not overwrite."""
    tree = _tree(scene.data) if tree is None else tree
    return [one for one in scene.wrote if one not in scene.overwritten and not _places(one, tree)]


def read_rows(path: Path) -> list[Row]:
    """Return the sets of the journal, none where there is none yet."""
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as sql:
        for id, state, because in sql.execute("SELECT id, state, because FROM reclaim ORDER BY id"):
            rows[id] = Row(id, state, because if isinstance(because, str) else os.fsdecode(because))
        question = "SELECT reclaim, path, size, mtime_ns, place, hidden FROM reclaim_file ORDER BY reclaim, number"
        for id, name, size, mtime_ns, place, hidden in sql.execute(question):
            rows[id].files[_text(name), size, mtime_ns] = place, _text(hidden)
    return list(rows.values())


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else os.fsdecode(value)


def _tree(base: Path) -> dict[str, str]:
    """Return the digest of every file below a directory; one that goes while we look is not there."""
    found = {}
    for directory, _, names in os.walk(base):
        for name in names:
            path = os.path.join(directory, name)
            try:
                with open(path, "rb") as file:
                    found[os.path.relpath(path, base)] = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                continue
    return found


def _places(one: Wrote, tree: Mapping[str, str]) -> list[str]:
    """Return under which names of its directory a version stands."""
    directory, name = os.path.split(one.path)
    good = re.compile(rf"{re.escape(name)}(\.kept-\d+)?|{HIDDEN.pattern}")
    return [
        path for path, digest in tree.items()
        if digest == one.sha256 and os.path.dirname(path) == directory and good.fullmatch(os.path.basename(path))
    ]  # fmt: skip


def _version(one: Wrote) -> tuple[str, int, int]:
    return one.path, one.size, one.mtime_ns


def _lost(scene: Scene, lost: Sequence[Wrote]) -> Iterator[Violation]:
    """What is gone has equal copies everywhere; a later version of the instrument's may have replaced these since."""
    newest = {one.path: one for one in scene.wrote}
    for one in lost:
        if scene.frozen:
            yield Violation("lost", f"{one.path} is gone, and {scene.frozen}")
        if newest[one.path] != one:
            continue
        for rule, to in scene.destinations.items():
            try:
                digest = hashlib.sha256((to / one.path).read_bytes()).hexdigest()
            except FileNotFoundError:
                digest = ""
            if digest != one.sha256:
                yield Violation("lost", f"{one.path} is gone, and its copy of {rule} {'differs' if digest else 'too'}")


def _untold(lost: Sequence[Wrote], rows: Sequence[Row], *, idle: bool) -> Iterator[Violation]:
    """What is gone was confirmed in the journal before, and is told as gone in the end."""
    for one in lost:
        told = [(row.state, row.files[_version(one)][0]) for row in rows if _version(one) in row.files]
        done = any(state == "done" and place in ("gone", "neither") for state, place in told)
        if not done and (idle or "confirmed" not in [state for state, _ in told]):
            yield Violation("untold", f"{one.path} is gone, and the journal says {told or 'nothing'}")


def _untrue(scene: Scene, tree: Mapping[str, str], rows: Sequence[Row]) -> Iterator[Violation]:
    """What is told as gone is not there."""
    known = {_version(one): one for one in scene.wrote}
    for row in rows:
        for version, (place, _) in row.files.items():
            if row.state != "done" or place not in ("gone", "neither") or version not in known:
                continue
            if where := _places(known[version], tree):
                yield Violation("untrue", f"set {row.id} says that {version[0]} is {place}, and it stands at {where}")


def _hidden(scene: Scene, tree: Mapping[str, str], rows: Sequence[Row], *, idle: bool) -> Iterator[Violation]:
    known = {
        os.path.join(os.path.dirname(path), hidden)
        for row in rows if row.state in _OPEN
        for (path, _, _), (_, hidden) in row.files.items()
    }  # fmt: skip
    ever = {hidden for row in rows for _, hidden in row.files.values()}
    for path in tree:
        if not HIDDEN.fullmatch(os.path.basename(path)):
            continue
        if idle and (os.path.basename(path) in ever or path not in scene.told):
            words = "and nobody is told" if path not in scene.told else "and the journal knows it"
            yield Violation("hidden", f"{path} stands under a hidden name, {words}")
        elif idle:
            continue
        elif path not in known:
            yield Violation("forgotten", f"no set under way knows of {path}")


def _apart(scene: Scene, rows: Sequence[Row], tree: Mapping[str, str]) -> Iterator[Violation]:
    """A set that ended is gone or there as a whole, or its row says that it is not."""
    known = {_version(one): one for one in scene.wrote if one not in scene.overwritten}
    for row in rows:
        if row.state in _OPEN:
            continue
        there = {bool(_places(known[version], tree)) for version in row.files if version in known}
        if row.state == "done" and len(there) > 1 and "not all of it" not in row.because:
            yield Violation("apart", f"of set {row.id}, which is {row.state} ({row.because}), a part is there")


def _strangers(scene: Scene, tree: Mapping[str, str]) -> Iterator[Violation]:
    """All that stands in the source was written by the instrument, and is where it was put or beside it."""
    good = {path for one in scene.wrote for path in _places(one, tree)}
    for path in tree.keys() - good:
        yield Violation("stranger", f"{path} holds what was never written there")


def _sent(scene: Scene) -> Iterator[Violation]:
    for rule, to in scene.destinations.items():
        for path in _tree(to):
            if HIDDEN.search(path):
                yield Violation("sent", f"{rule} has sent {path}, a hidden name, as a file of the instrument's")


def _explained(scene: Scene, tree: Mapping[str, str]) -> Iterator[Violation]:
    """`explain` says `reclaimed` of exactly those whose name is free and whose last version is gone."""
    missing = {one.path for one in gone(scene, tree) if one not in scene.excused}
    excused = {one.path for one in scene.excused}
    for path, stage in scene.explained.items():
        if (stage == "reclaimed") != (path in missing and path not in tree) and path not in excused:
            where = "gone" if path in missing else "there"
            yield Violation("explain", f"explain says {stage} of {path}, which is {where}")
