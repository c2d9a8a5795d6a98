"""Laws of looks, sweeps and root health, on real trees, real mounts and a file system that hangs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from trigger_daemon.clock import SystemClock
from trigger_daemon.core.model import (
    BatchClosed,
    Fact,
    HoldSweeps,
    Look,
    Mark,
    Marked,
    Member,
    RootChanged,
    Seen,
    Signal,
    Sweep,
    Swept,
    Unreadable,
    Vanished,
)
from trigger_daemon.core.rules import Complete, Rule
from trigger_daemon.desk import Claim
from trigger_daemon.hints import Hints, HintSource, WatchLimit
from trigger_daemon.journal import ClaimReader, Journal
from trigger_daemon.looks import CHUNK_MAX, CHUNK_S
from trigger_daemon.mounts import LOCAL_TYPES
from trigger_daemon.roots import EMPTIED_CONFIRM_S, Beat, Root, hashes
from trigger_daemon.scanner import Scanner
from trigger_daemon.sweeps import SCOPES_MAX, Dir
from trigger_daemon.worker import Stop, Worker

if sys.platform != "linux":
    pytest.skip("mounts and FUSE are Linux", allow_module_level=True)

from fuse_share import Share
from trigger_daemon.hints import inotify

F = TypeVar("F")
NEVER_S = 100_000.0


class Ledger:
    """Claims in memory, as the journal's reader answers them; notes which directories and names were asked for."""

    def __init__(self) -> None:
        self.as_of = 7
        self.claims: dict[str, dict[str, list[Claim]]] = {}
        self.joined: list[str] = []
        self.asked: list[str] = []
        self.broken = ""

    def __call__(self) -> Ledger:
        return self

    def claim(self, path: Path, name: str, *, rule: int = 1, batch: int = 5) -> None:
        """Claim the version that lies there now."""
        seen = (path / name).lstat()
        directory, _, base = name.rpartition("/")
        rows = self.claims.setdefault(directory, {}).setdefault(base, [])
        rows.append((rule, seen.st_size, seen.st_mtime_ns, batch))

    def directory(self, root: int, dir: str) -> tuple[int, Mapping[str, Sequence[Claim]]]:
        if self.broken:
            raise RuntimeError(self.broken)
        self.joined.append(dir)
        return self.as_of, dict(self.claims.get(dir, {}))

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def names(self, root: int, dir: str, names: Sequence[str]) -> tuple[int, Mapping[str, Sequence[Claim]]]:
        if self.broken:
            raise RuntimeError(self.broken)
        self.asked += names
        known = self.claims.get(dir, {})
        return self.as_of, {name: known[name] for name in names if name in known}

    def close(self) -> None:
        """Nothing is open."""

    def directories(self, root: int) -> Iterator[str]:
        return iter(sorted(self.claims))


class Told:
    """A source of hints that says what a test tells it, and notes what is watched."""

    kind = "inotify"

    def __init__(self) -> None:
        self.watched: list[bytes] = []
        self.on_watch: Callable[[bytes], None] = lambda directory: None
        self._wake: Callable[[], None] = lambda: None
        self._hints: Hints | None = None
        self.fault = ""

    def tell(self, **keys: Any) -> None:
        self._hints = Hints(**keys)
        self._wake()

    def names(self, directory: str, signal: Signal = "none", *names: str) -> None:
        self.tell(names={os.fsencode(directory): {os.fsencode(name): signal for name in names}})

    def open(self, root: int, path: bytes, wake: Callable[[], None]) -> None:
        self._wake = wake

    def close(self, root: int) -> None:
        pass

    def watch(self, root: int, directory: bytes) -> None:
        self.watched.append(directory)
        self.on_watch(directory)

    def take(self, root: int) -> Hints | None:
        hints, self._hints = self._hints, None
        return hints

    def alive(self) -> str:
        return self.fault

    def counters(self) -> dict[str, int]:
        return {}

    def stop(self) -> None:
        pass


class Identities(dict[int, Mapping[str, Any]]):
    """Keeps roots' identities in memory."""

    def set(self, root: int, identity: dict[str, Any]) -> None:
        self[root] = identity


class Core:
    """Takes facts, as the loop's inbox does."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.on_post: Callable[[Fact], None] = lambda fact: None
        self.gate = threading.Event()
        self.gate.set()

    def post(self, fact: Fact) -> None:
        self.gate.wait()
        self.facts.append(fact)
        self.on_post(fact)


class Bench:
    """A scanner on one root with a rule for `*.tif` at any depth; nothing is due but what a test asks for."""

    def __init__(self, path: Path, wait: Callable[..., Any], **keys: Any) -> None:
        self.path = path
        self.wait = wait
        self.core = Core()
        self.ledger = Ledger()
        self.told = Told()
        self.identities: Identities = keys.pop("identities", None) or Identities()
        self.rules: list[Rule] = keys.pop("rules", None) or [rule(path)]
        self.asked = 0
        self.read = 0
        claims = keys.pop("claims", self.ledger)
        hints: HintSource = keys.pop("hints", self.told)
        keys.setdefault("every_s", NEVER_S)
        keys.setdefault("full_s", NEVER_S)
        self.scanner = Scanner(
            post=self.core.post, claims=claims, hints=hints, clock=SystemClock(), identities=self.identities, **keys
        )

    def open(self) -> Bench:
        self.scanner.use(self.rules, {str(self.path): 1})
        return self

    def opened(self) -> Bench:
        """Open, and wait for the first full sweep."""
        self.open()
        self.next(Swept)
        return self

    def next(self, kind: type[F], where: Callable[[F], bool] = lambda fact: True, timeout: float = 10.0) -> F:
        """Return the next fact of a kind that was not returned yet, passing over others."""

        def found() -> F | None:
            while self.read < len(self.core.facts):
                fact = self.core.facts[self.read]
                self.read += 1
                if isinstance(fact, kind) and where(fact):
                    return fact
            return None

        answer: F = self.wait(found, timeout, what=kind.__name__)
        return answer

    def health(self, health: str) -> RootChanged:
        return self.next(RootChanged, lambda fact: fact.health == health)

    def sweep(self, *, full: bool) -> tuple[Swept, list[Seen]]:
        """Sweep, and return the answer with the rows that came with it."""
        begin = len(self.core.facts)
        self.asked += 1
        self.scanner.sweep(Sweep(1, full, self.asked))
        swept = self.next(Swept, lambda fact: fact.asked >= self.asked)
        return swept, [fact for fact in self.core.facts[begin:] if isinstance(fact, Seen)]

    def look(self, directory: str, *names: str) -> Seen:
        self.scanner.look(Look(1, directory, names))
        return self.next(Seen, lambda fact: fact.cause == "deadline")

    def settle(self) -> None:
        """Wait until all that was asked before has been answered."""
        self.scanner.mark(Mark(1))
        self.next(Marked)

    def recheck(self) -> None:
        """Let the worker look at its root now, as it does every few seconds."""
        self.told.tell(root_gone=True)

    def vanished(self) -> list[Vanished]:
        return [fact for fact in self.core.facts if isinstance(fact, Vanished)]


def rule(path: Path, number: int = 1, *, match: tuple[str, ...] = ("**/*.tif", "*.tif"), **keys: Any) -> Rule:
    return Rule(
        name=f"r{number}", id=number, watch=str(path), match=match, existing="process", action="copy", options={},
        **keys,
    )  # fmt: skip


def names_of(facts: Sequence[Seen]) -> list[str]:
    return sorted(f"{fact.dir}/{row[0]}" if fact.dir else row[0] for fact in facts for row in fact.rows)


def run(*argv: str | Path) -> None:
    subprocess.run([os.fspath(part) for part in argv], check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def bench(root: Path, wait_until: Callable[..., Any]) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(path: Path = root, **keys: Any) -> Bench:
        made.append(Bench(path, wait_until, **keys))
        return made[-1]

    yield make
    for one in made:
        one.core.gate.set()
        one.scanner.stop()


@pytest.fixture
def mounts(wait_until: Callable[..., Any]) -> Iterator[Callable[..., None]]:
    """Mount tmpfs file systems by (source, point); unmounted afterwards."""
    points: list[Path] = []

    def mount(source: str, point: Path) -> None:
        made = subprocess.run(["mount", "-t", "tmpfs", source, str(point)], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"needs to mount: {made.stderr}")
        points.append(point)

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


@pytest.fixture
def share(root: Path) -> Iterator[Share]:
    try:
        made = Share(root, {"a.tif": 3, "b.tif": 4})
    except OSError as error:
        pytest.skip(f"needs FUSE: {error}")
    yield made
    made.close()


# ------------------------------------------------------------------ looks


def test_a_look_answers_for_every_name(bench: Callable[..., Bench], root: Path) -> None:
    """Regular files have a state; what is absent, a link, a pipe or a directory has none."""
    (root / "a.tif").write_bytes(b"abc")
    (root / "to_a.tif").symlink_to("a.tif")
    os.mkfifo(root / "pipe.tif")
    (root / "dir.tif").mkdir()

    seen = bench().opened().look("", "a.tif", "to_a.tif", "pipe.tif", "dir.tif", "gone.tif")

    st = (root / "a.tif").stat()
    states = {name: state for name, state, _ in seen.rows}
    assert states == {
        "a.tif": (3, st.st_mtime_ns, st.st_ctime_ns, st.st_ino),
        "to_a.tif": None, "pipe.tif": None, "dir.tif": None, "gone.tif": None,
    }  # fmt: skip
    assert seen.began < seen.ended
    assert seen.as_of == 7


def test_a_look_says_who_still_wants_a_version(bench: Callable[..., Bench], root: Path) -> None:
    """Fully claimed: no wants. Claimed by one rule: the other wants. Another version: with its newest batch."""
    for name in ("new.tif", "both.tif", "one.tif", "old.tif"):
        (root / name).write_bytes(b"x")
    b = bench(rules=[rule(root), rule(root, 2)])
    for number in (1, 2):
        b.ledger.claim(root, "both.tif", rule=number)
    b.ledger.claim(root, "one.tif", rule=1)
    b.ledger.claim(root, "old.tif", rule=1, batch=3)
    b.ledger.claim(root, "old.tif", rule=1, batch=4)
    (root / "old.tif").write_bytes(b"longer")

    seen = b.opened().look("", "new.tif", "both.tif", "one.tif", "old.tif", "other.txt")

    assert {name: wants for name, _, wants in seen.rows} == {
        "new.tif": ((1, 0), (2, 0)),
        "both.tif": (),
        "one.tif": ((2, 0),),
        "old.tif": ((1, 4), (2, 0)),
        "other.txt": (),
    }


def test_a_missing_directory_means_absent_names(bench: Callable[..., Bench]) -> None:
    """ENOENT of the directory is the absence of its names, in a root that is believed."""
    seen = bench().opened().look("no/such", "a.tif")

    assert [(name, state) for name, state, _ in seen.rows] == [("a.tif", None)]


def test_a_look_does_not_follow_a_linked_directory(bench: Callable[..., Bench], root: Path, tmp_path: Path) -> None:
    """What lies behind a link, at any depth, is not in the root."""
    (tmp_path / "out" / "below").mkdir(parents=True)
    (tmp_path / "out" / "below" / "a.tif").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "out")

    seen = bench().opened().look("link/below", "a.tif")

    assert seen.rows[0][1] is None


def test_chunks_are_small_in_names(bench: Callable[..., Bench], root: Path) -> None:
    """No fact carries more than CHUNK_MAX looks, so its two instants stay close to each."""
    names = [f"{number}.tif" for number in range(CHUNK_MAX + 1)]
    for name in names:
        (root / name).touch()
    b = bench().opened()

    b.scanner.look(Look(1, "", tuple(names)))
    b.settle()
    seen = [fact for fact in b.core.facts if isinstance(fact, Seen)]

    assert max(len(fact.rows) for fact in seen) <= CHUNK_MAX
    assert len(names_of([fact for fact in seen if fact.cause == "deadline"])) == len(names)
    assert max(fact.ended - fact.began for fact in seen) < CHUNK_S + 1.0


def test_mark_comes_after_the_looks_asked_before(bench: Callable[..., Bench], root: Path) -> None:
    """`Marked` is behind every answer to what was asked before it."""
    (root / "a.tif").touch()
    b = bench().opened()

    for _ in range(20):
        b.scanner.look(Look(1, "", ("a.tif",)))
    b.scanner.mark(Mark(1))
    marked = b.next(Marked)

    assert sum(isinstance(fact, Seen) and fact.cause == "deadline" for fact in b.core.facts) == 20
    assert marked.as_of == 7


# ------------------------------------------------------------------ hints


def test_a_hinted_name_is_looked_at_at_once(bench: Callable[..., Bench], root: Path) -> None:
    """One chunk a signal, claims not consulted; names nobody wants are not looked at."""
    b = bench().opened()
    for name in ("a.tif", "b.tif", "c.txt"):
        (root / name).touch()

    b.told.tell(names={b"": {b"a.tif": "none", b"b.tif": "close", b"c.txt": "close", b"gone.tif": "none"}})
    seen = [b.next(Seen), b.next(Seen)]

    assert {(fact.cause, fact.signal, fact.as_of, fact.rows[0][0], fact.rows[0][2]) for fact in seen} == {
        ("hint", "none", -1, "a.tif", ((1, 0),)),
        ("hint", "close", -1, "b.tif", ((1, 0),)),
    }


def test_a_trusted_signal_comes_with_claims_joined(bench: Callable[..., Bench], root: Path) -> None:
    """A look that may count as quiet must not start again what was claimed."""
    b = bench(rules=[rule(root, complete=Complete(trust=frozenset({"close"})))]).opened()
    for name in ("new.tif", "claimed.tif"):
        (root / name).touch()
    b.ledger.claim(root, "claimed.tif")

    b.told.names("", "close", "new.tif", "claimed.tif")
    seen = b.next(Seen)

    assert (names_of([seen]), seen.as_of) == (["new.tif"], 7)


def test_a_tree_made_at_once_is_found_whole(bench: Callable[..., Bench], root: Path) -> None:
    """`mkdir -p` and a write right behind it: watch, then list, then go down, with the kernel's own events."""
    source = inotify.Source()
    b = bench(hints=source).opened()
    deep = [root / f"s{number}" / "a" / "b" for number in range(50)]

    for path in deep:
        path.mkdir(parents=True)
        (path / "x.tif").touch()

    wanted = {f"s{number}/a/b/x.tif" for number in range(50)}
    b.wait(lambda: wanted <= set(names_of([fact for fact in b.core.facts if isinstance(fact, Seen)])), what="all files")
    source.stop()


def test_lost_hints_are_made_up_for(bench: Callable[..., Bench], root: Path) -> None:
    """`all` asks for new names at once and for a full sweep soon."""
    b = bench().opened()
    (root / "a.tif").touch()

    b.told.tell(all=True)

    assert names_of([b.next(Seen)]) == ["a.tif"]
    b.next(Swept, lambda fact: fact.full)


@pytest.mark.parametrize("lost", [Hints(all=True), Hints(dirs={b"d%d" % n for n in range(SCOPES_MAX + 1)})])
def test_what_is_lost_during_a_sweep_is_made_up_for_after_it(
    bench: Callable[..., Bench], root: Path, lost: Hints
) -> None:
    """Hints lost while a sweep is under way, which may have passed the place: another sweep follows soon."""
    for number in range(3):
        (root / f"d{number}").mkdir()
    b = bench()
    passed: list[bytes] = []

    def lose(directory: bytes) -> None:
        """Behind the back of the sweep, once it is at its second directory."""
        passed.append(directory)
        if len(passed) == 3:
            (root / os.fsdecode(passed[1]) / "a.tif").touch()
            b.told.tell(all=lost.all, dirs=lost.dirs)

    b.told.on_watch = lose
    b.opened()

    assert names_of([b.next(Seen)]) == [f"{os.fsdecode(passed[1])}/a.tif"]
    b.next(Swept, lambda fact: fact.full)


def test_a_long_full_sweep_does_not_delay_the_sweeps_of_names(bench: Callable[..., Bench], root: Path) -> None:
    """The next names are due after the interval, however long all files took."""
    b = bench(every_s=0.05)
    b.told.kind = "none"
    b.core.on_post = lambda fact: None
    (root / "a.tif").touch()
    slow = threading.Event()

    def directory(number: int, path: str) -> tuple[int, Mapping[str, Sequence[Claim]]]:
        slow.wait(1.0)
        return 7, {}

    b.ledger.directory = directory  # type: ignore[method-assign]
    b.opened()
    (root / "b.tif").touch()

    assert names_of([b.next(Seen, lambda fact: len(fact.rows) == 1, timeout=5.0)]) == ["b.tif"]


def test_what_appears_between_watch_and_list_is_found(bench: Callable[..., Bench], root: Path) -> None:
    """Watch, then list: a file made right after the watch is in the listing."""
    (root / "d").mkdir()
    b = bench()
    b.told.on_watch = lambda directory: (root / os.fsdecode(directory) / "late.tif").touch()

    b.opened()

    found = names_of([fact for fact in b.core.facts if isinstance(fact, Seen)])
    assert found == ["d/late.tif", "late.tif"]


def test_a_watch_limit_is_told_once_and_the_rest_is_swept(bench: Callable[..., Bench], root: Path) -> None:
    """Without watches the tree is still swept; health says which limit, once."""
    for number in range(10):
        (root / f"d{number}").mkdir()
        (root / f"d{number}" / "a.tif").touch()
    b = bench()

    def refuse(directory: bytes) -> None:
        if directory:
            raise WatchLimit("the kernel refuses more watches", hint="sysctl")

    b.told.on_watch = refuse
    swept = (b.open(), b.next(Swept))[1]

    degraded = [fact for fact in b.core.facts if isinstance(fact, RootChanged) and fact.health == "degraded"]
    assert (len(degraded), degraded[0].hint) == (1, "sysctl")
    assert (swept.ok, swept.files) == (True, 10)

    b.told.on_watch = lambda directory: None
    b.sweep(full=True)
    b.health("ok")


# ------------------------------------------------------------------ sweeps


def test_a_full_sweep_sends_what_is_not_claimed(bench: Callable[..., Bench], root: Path) -> None:
    """Only regular files that a rule wants and has not claimed in this version; links are not followed."""
    (root / "s").mkdir()
    for name in ("s/new.tif", "s/claimed.tif", "s/changed.tif", "s/note.txt", ".hidden.tif"):
        (root / name).touch()
    (root / "s" / "loop").symlink_to(root)
    (root / "s" / "link.tif").symlink_to("new.tif")
    b = bench(rules=[rule(root, ignore=(".*",))])
    b.ledger.claim(root, "s/claimed.tif")
    b.ledger.claim(root, "s/changed.tif", batch=6)
    (root / "s/changed.tif").write_bytes(b"more")

    b.opened()
    swept, seen = b.sweep(full=True)

    assert {row[0]: row[2] for fact in seen for row in fact.rows} == {"new.tif": ((1, 0),), "changed.tif": ((1, 6),)}
    assert (swept.ok, swept.full, swept.why) == (True, True, "")
    assert swept.watermark <= seen[0].began <= seen[-1].ended <= swept.ended


def test_a_settled_directory_is_not_joined_again_until_it_changes(bench: Callable[..., Bench], root: Path) -> None:
    """What came to nothing costs only its lstat; one changed byte, and its claims are read again."""
    for number in range(3):
        (root / f"{number}.tif").touch()
    b = bench()
    for number in range(3):
        b.ledger.claim(root, f"{number}.tif")
    b.opened()
    b.ledger.joined.clear()

    assert b.sweep(full=True)[1] == []
    assert b.ledger.joined == []

    (root / "1.tif").write_bytes(b"x")
    assert names_of(b.sweep(full=True)[1]) == ["1.tif"]


def test_only_what_changed_or_appeared_is_joined(bench: Callable[..., Bench], root: Path) -> None:
    """Of 2,500 claimed files one changed, one came and one came and was claimed: two are handed on, and besides these
    three only some of their neighbours are joined."""
    names = [f"{number}.tif" for number in range(2 * CHUNK_MAX + CHUNK_MAX // 2)]
    for name in names:
        (root / name).touch()
    b = bench()
    for name in names:
        b.ledger.claim(root, name)
    b.opened()
    b.ledger.joined.clear()

    (root / "1200.tif").write_bytes(b"x")
    (root / "new.tif").touch()
    (root / "taken.tif").touch()
    b.ledger.claim(root, "taken.tif")

    assert names_of(b.sweep(full=True)[1]) == ["1200.tif", "new.tif"]
    assert b.ledger.joined == []
    assert {"1200.tif", "new.tif", "taken.tif"} <= set(b.ledger.asked)
    assert len(b.ledger.asked) < 250

    b.ledger.asked.clear()
    b.ledger.claim(root, "new.tif")
    assert names_of(b.sweep(full=True)[1]) == ["1200.tif"]
    assert b.ledger.joined == []
    assert len(b.ledger.asked) < 100


def test_a_sweep_of_names_leaves_the_rest_settled(bench: Callable[..., Bench], root: Path) -> None:
    """A directory that was listed because a name came is not joined as a whole by the next full sweep."""
    for number in range(500):
        (root / f"{number}.tif").touch()
    b = bench()
    for number in range(500):
        b.ledger.claim(root, f"{number}.tif")
    b.opened()
    b.ledger.joined.clear()
    (root / "new.tif").touch()

    assert names_of(b.sweep(full=False)[1]) == ["new.tif"]
    b.ledger.asked.clear()
    assert names_of(b.sweep(full=True)[1]) == ["new.tif"]
    assert b.ledger.joined == []
    assert len(b.ledger.asked) < 100


def test_names_that_were_met_before_are_not_matched_again() -> None:
    """A directory in which one name came and one went costs one match."""
    matched: list[str] = []

    def wants(name: str) -> tuple[int, ...]:
        matched.append(name)
        return (1,) if name.endswith(".tif") else ()

    def listed(*names: str) -> Dir:
        return Dir(0, 0, 0, hashes(names), 0.0)

    before, now = listed("a.tif", "b.txt", "c.tif"), listed("d.tif", "c.tif", "b.txt")
    before.match(None, ["a.tif", "b.txt", "c.tif"], wants)
    matched.clear()
    now.match(before, ["d.tif", "c.tif", "b.txt"], wants)

    assert (matched, list(now.flags or b"")) == (["d.tif"], [1, 1, 0])


@pytest.mark.parametrize("seed", range(4))
def test_a_full_sweep_hands_on_what_is_unclaimed_whatever_came_before(
    bench: Callable[..., Bench], root: Path, seed: int
) -> None:
    """Writes, replacements, removals, claims, hints and sweeps in any order: nothing missed, nothing that was claimed
    handed on, and every claimed name that is gone is told."""
    draw = random.Random(seed)
    folder = root / "s"
    folder.mkdir()
    b = bench()
    for number in range(100):
        (folder / f"{number}.tif").touch()
        b.ledger.claim(root, f"s/{number}.tif")
    claims = b.ledger.claims["s"]
    b.opened()

    def act(what: str, name: str) -> None:
        there = (folder / name).exists()
        if what == "write":
            (folder / name).write_bytes(b"x" * draw.randrange(100))
        elif what == "replace":
            (folder / "next.tmp").write_bytes(b"x" * draw.randrange(100))
            (folder / "next.tmp").rename(folder / name)
        elif what == "remove" and there:
            (folder / name).unlink()
        elif what == "claim" and there:
            b.ledger.claim(root, f"s/{name}")
        elif what == "forget" and not there:
            claims.pop(name, None)
        elif what == "hint" and there:
            b.told.names("s", "none", name)
            b.next(Seen, lambda fact: fact.cause == "hint")
        elif what == "names":
            b.sweep(full=False)

    for _ in range(80):
        some = [f"{draw.randrange(120)}.tif" for _ in range(3)]
        for _ in range(draw.choice([0, 1, 2, 10])):
            what = draw.choice(["write", "write", "replace", "remove", "claim", "claim", "forget", "hint", "names"])
            act(what, draw.choice(some))
        wanted = {
            path.name
            for path in folder.iterdir()
            if (st := path.lstat())
            and not any(row[1:3] == (st.st_size, st.st_mtime_ns) for row in claims.get(path.name, ()))
        }
        gone = {f"s/{name}" for name in claims if not (folder / name).exists()}
        begin = len(b.core.facts)
        _, seen = b.sweep(full=True)
        b.sweep(full=False)  # ends after what the full one tells of what is gone
        told = {
            f"{fact.dir}/{name}"
            for fact in b.core.facts[begin:]
            if isinstance(fact, Vanished)
            for name in fact.names or ()
        }

        assert names_of(seen) == sorted(f"s/{name}" for name in wanted)
        assert told == gone


def test_a_new_rule_sees_what_another_has_claimed(bench: Callable[..., Bench], root: Path) -> None:
    """Other rules, other wants: a settled directory is joined again, by a full sweep at once."""
    (root / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.opened()

    b.scanner.use([rule(root), rule(root, 2)], {str(root): 1})

    assert b.next(Seen).rows[0][2] == ((2, 0),)
    assert b.next(Swept).full


def test_a_names_sweep_finds_what_no_hint_told(bench: Callable[..., Bench], root: Path) -> None:
    """New names, also in new directories, are rows; hinted and known ones are not again."""
    (root / "s").mkdir()
    (root / "s" / "known.tif").touch()
    b = bench().opened()
    (root / "s" / "hinted.tif").touch()
    b.told.names("s", "none", "hinted.tif")
    b.next(Seen)
    (root / "s" / "unheard.tif").touch()
    (root / "s" / "deeper").mkdir()
    (root / "s" / "deeper" / "x.tif").touch()

    swept, seen = b.sweep(full=False)

    assert names_of(seen) == ["s/deeper/x.tif", "s/unheard.tif"]
    assert (swept.full, swept.ok) == (False, True)
    assert b.sweep(full=False)[1] == []


def test_a_name_made_within_the_tick_of_a_listing_is_found_a_cycle_later(
    bench: Callable[..., Bench], root: Path
) -> None:
    """A directory whose mtime moved is listed once more, even if its mtime stays."""
    b = bench().opened()
    b.sweep(full=False)
    b.sweep(full=False)
    (root / "a.tif").touch()
    b.sweep(full=False)
    before = root.stat().st_mtime_ns
    (root / "same_tick.tif").touch()
    os.utime(root, ns=(before, before))

    assert names_of(b.sweep(full=False)[1]) == ["same_tick.tif"]


def test_growth_is_found_by_a_full_sweep(bench: Callable[..., Bench], root: Path) -> None:
    """A directory's mtime says nothing of growth: only lstat of all does."""
    (root / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.opened()
    with (root / "a.tif").open("ab") as file:
        file.write(b"more")

    assert b.sweep(full=False)[1] == []
    assert names_of(b.sweep(full=True)[1]) == ["a.tif"]


def test_a_sweep_answers_only_what_was_asked_before_it_began(bench: Callable[..., Bench], root: Path) -> None:
    """A request that comes during a sweep is answered by the next one."""
    for number in range(3):
        (root / f"d{number}").mkdir()
    b = bench()
    first = threading.Event()
    go = threading.Event()

    def pause(directory: bytes) -> None:
        first.set()
        go.wait(10)

    b.told.on_watch = pause
    b.open()
    first.wait(10)
    b.scanner.sweep(Sweep(1, True, 41))
    asked_at = time.monotonic()
    go.set()

    one, two = b.next(Swept), b.next(Swept)
    assert (one.asked, two.asked) == (0, 41)
    assert one.watermark < asked_at < two.watermark


def test_sweeps_wait_while_held_and_looks_go_on(bench: Callable[..., Bench], root: Path) -> None:
    """The core has enough to chew: looks and hints are answered, sweeps are not begun."""
    (root / "a.tif").touch()
    b = bench().opened()

    b.scanner.hold(HoldSweeps(True))
    b.scanner.sweep(Sweep(1, True, 9))
    assert b.look("", "a.tif").rows
    b.told.names("", "none", "a.tif")
    b.next(Seen, lambda fact: fact.cause == "hint")
    b.settle()
    assert [fact.asked for fact in b.core.facts if isinstance(fact, Swept)] == [0]

    b.scanner.hold(HoldSweeps(False))
    assert b.next(Swept).asked == 9


def test_a_look_does_not_wait_for_a_sweep(bench: Callable[..., Bench], root: Path) -> None:
    """Deadlines come before sweeps: a look asked during a sweep is answered before the sweep ends."""
    for number in range(20):
        (root / f"d{number}").mkdir()
    (root / "a.tif").touch()
    b = bench()
    asked = threading.Event()

    def ask(directory: bytes) -> None:
        if not asked.is_set():
            b.scanner.look(Look(1, "", ("a.tif",)))
            asked.set()

    b.told.on_watch = ask
    b.open()

    b.next(Seen, lambda fact: fact.cause == "deadline")
    b.next(Swept)


def test_sweeps_come_by_themselves(bench: Callable[..., Bench], root: Path) -> None:
    """Without any hint a new file is found within the interval."""
    b = bench(every_s=0.05, full_s=0.2)
    b.told.kind = "none"
    b.opened()
    (root / "a.tif").touch()

    assert names_of([b.next(Seen)]) == ["a.tif"]
    b.next(Swept, lambda fact: fact.full)


@pytest.mark.parametrize("met", [False, True])
def test_rows_never_carry_claims_older_than_a_mark(bench: Callable[..., Bench], root: Path, met: bool) -> None:
    """Claims read before `Marked` are read again before they are joined after it, in directories new and known."""
    names = [f"{number:04}.tif" for number in range(2 * CHUNK_MAX)]
    for name in names:
        (root / name).touch()
    b = bench()
    if met:
        b.opened()

    def commit_and_mark(fact: Fact) -> None:
        """A batch is committed, and marked, while the first of two chunks of a directory is on its way."""
        if isinstance(fact, Seen) and b.ledger.as_of == 7:
            b.ledger.as_of = 8
            b.scanner.mark(Mark(1))

    b.core.on_post = commit_and_mark
    if met:
        b.sweep(full=True)
    else:
        b.opened()
    rows = [fact.as_of for fact in b.core.facts if isinstance(fact, Seen)]
    assert (rows[0], len(rows)) == (7, 4 if met else 2)

    at = next(index for index, fact in enumerate(b.core.facts) if isinstance(fact, Marked))
    marked = b.core.facts[at]
    assert isinstance(marked, Marked)
    assert all(fact.as_of >= marked.as_of for fact in b.core.facts[at:] if isinstance(fact, Seen))


def test_odd_names_are_carried(bench: Callable[..., Bench], root: Path) -> None:
    """Bytes that are no UTF-8, blanks, brackets and newlines come and go as surrogate escapes."""
    raw = [b"caf\xe9.tif", b"a b [30.0]\n.tif", b"-x.tif"]
    for name in raw:
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).touch()
    b = bench().opened()

    _, seen = b.sweep(full=True)
    assert sorted(map(os.fsencode, names_of(seen))) == sorted(raw)
    assert all(state for _, state, _ in b.look("", *map(os.fsdecode, raw)).rows)
    b.told.tell(names={b"": {raw[0]: "close"}})
    assert os.fsencode(b.next(Seen).rows[0][0]) == raw[0]


def test_a_path_beyond_4096_bytes_is_still_found(bench: Callable[..., Bench], root: Path) -> None:
    """`stat(path)` fails there; walking by descriptor does not."""
    names = ["d" * 200] * 25
    at = os.open(root, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=at)
        deeper = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = deeper
    os.close(os.open("deep.tif", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    b = bench().opened()

    _, seen = b.sweep(full=True)
    assert names_of(seen) == ["/".join([*names, "deep.tif"])]
    assert b.look("/".join(names), "deep.tif").rows[0][1] is not None
    assert b.sweep(full=False)[0].ok


# ------------------------------------------------------------------ what is gone


def test_a_full_sweep_tells_claimed_names_that_are_gone(bench: Callable[..., Bench], root: Path) -> None:
    """Gone names of a listed directory, and directories that are gone themselves; nothing that is there."""
    for name in ("a/x.tif", "a/y.tif", "b/z.tif", "keep/k.tif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    b = bench()
    for name in ("a/x.tif", "a/y.tif", "b/z.tif", "keep/k.tif"):
        b.ledger.claim(root, name)
    b.opened()
    assert b.vanished() == []
    (root / "a/x.tif").unlink()
    (root / "b/z.tif").unlink()
    (root / "b").rmdir()

    b.sweep(full=False)
    assert b.vanished() == []
    b.sweep(full=True)
    b.wait(lambda: len(b.vanished()) == 2)
    assert {(fact.dir, fact.names) for fact in b.vanished()} == {("a", ("x.tif",)), ("b", None)}


def test_what_only_a_hint_has_met_is_told_when_it_is_gone(bench: Callable[..., Bench], root: Path) -> None:
    """A file that came, was claimed and went between two sweeps leaves its directory as it was, and yet a claim."""
    (root / "a.tif").touch()
    (root / "b.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.ledger.claim(root, "b.tif")
    b.opened()
    (root / "c.tif").touch()
    b.told.names("", "none", "c.tif")
    b.next(Seen)
    b.ledger.claim(root, "c.tif")
    (root / "c.tif").unlink()

    b.sweep(full=True)

    b.wait(lambda: [fact.names for fact in b.vanished()] == [("c.tif",)])


def test_a_file_that_stays_under_a_hidden_name_is_told_with_the_name_it_had(
    bench: Callable[..., Bench], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal from a backup does not know that reclaim renamed it; what is hidden for a moment is not told."""
    monkeypatch.setattr("trigger_daemon.sweeps.TICK_S", 0.05)
    for name in ("a/x.tif", "a/y.tif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name * (1 + ("y" in name)))
    b = bench()
    b.ledger.claim(root, "a/x.tif")
    b.ledger.claim(root, "a/y.tif")
    hidden = root / "a/.trigger-daemon-reclaim-0123456789abcdef-0"
    (root / "a/x.tif").rename(hidden)
    b.opened()

    def told() -> str:
        b.sweep(full=False)
        return next((fact.why for fact in b.core.facts if isinstance(fact, RootChanged) and fact.why), "")

    why = b.wait(told)
    assert f"{hidden} (was x.tif)" in why and "y.tif" not in why
    hidden.rename(root / "a/x.tif")
    b.sweep(full=False)
    assert b.health("ok").why == ""


def test_a_directory_that_cannot_be_read_hides_nothing_of_its_siblings(
    shm_path: Path, wait_until: Callable[..., Any]
) -> None:
    """The sweep goes on, is not ok and names it; nothing is gone; health is degraded until it can be read."""
    root = shm_path / "root"
    for name in ("bad", "good"):
        (root / name).mkdir(parents=True)
        (root / name / "x.tif").touch()
    shm_path.chmod(0o755)
    (root / "bad").chmod(0o700)
    ledger = Ledger()
    ledger.claims = {"bad": {"x.tif": [(1, 0, 1, 5)], "gone.tif": [(1, 0, 1, 5)]}, "no": {"y.tif": [(1, 0, 1, 5)]}}
    core = Core()

    class Outlet:
        post = staticmethod(core.post)

        def done(self, serial: int) -> None:
            pass

        def keep(self, identity: dict[str, Any]) -> None:
            pass

    worker = Worker(
        1, str(root), [rule(root)], outlet=Outlet(), claims=ledger, hints=None, clock=SystemClock(), every_s=NEVER_S,
        full_s=NEVER_S,
    )  # fmt: skip

    def as_nobody() -> None:
        ctypes.CDLL(None).setfsuid(65_534)  # of this thread only; takes away root's override too
        worker.run()

    thread = threading.Thread(target=as_nobody, daemon=True)
    thread.start()

    def swept() -> list[Swept]:
        return [fact for fact in core.facts if isinstance(fact, Swept)]

    wait_until(swept)
    assert (swept()[0].ok, "bad: Permission denied" in swept()[0].why) == (False, True)
    assert names_of([fact for fact in core.facts if isinstance(fact, Seen)]) == ["good/x.tif"]
    worker.ask(0, Look(1, "bad", ("x.tif", "gone.tif")))
    wait_until(lambda: any(isinstance(fact, Unreadable) for fact in core.facts))
    assert worker.status()["health"] == "degraded"
    assert not any(isinstance(fact, Vanished) for fact in core.facts)

    (root / "bad").chmod(0o755)
    worker.ask(0, Sweep(1, True, 5))
    wait_until(lambda: swept()[-1].asked == 5)
    wait_until(lambda: sum(isinstance(fact, Vanished) for fact in core.facts) == 2)
    worker.ask(0, Stop())
    thread.join(10)
    assert (swept()[-1].ok, worker.status()["health"]) == (True, "ok")


# ------------------------------------------------------------------ roots


def test_a_missing_root_is_waited_for_and_never_made(bench: Callable[..., Bench], root: Path) -> None:
    """Lost at first, then returned, swept, ok."""
    root.rmdir()
    b = bench().open()
    assert "does not exist yet; waiting" in b.health("lost").why
    assert not root.exists()

    b.scanner.look(Look(1, "", ("a.tif",)))
    assert b.next(Unreadable).names == ("a.tif",)

    root.mkdir()
    (root / "a.tif").touch()
    b.scanner.accept(1)  # looks at the root now instead of within seconds
    b.health("returned")
    assert names_of([b.next(Seen)]) == ["a.tif"]
    assert b.next(Swept).ok
    b.health("ok")


def test_a_root_made_anew_on_the_same_file_system_is_accepted(bench: Callable[..., Bench], root: Path) -> None:
    """Another inode of the same mount: swept from the start, watched again."""
    (root / "a.tif").touch()
    b = bench().opened()
    identity = dict(b.identities[1])
    (root / "a.tif").rename(root.parent / "a.tif")
    root.rename(root.parent / "old")
    root.mkdir()
    (root / "b.tif").touch()
    watched = len(b.told.watched)

    b.recheck()

    b.health("returned")
    assert names_of([b.next(Seen)]) == ["b.tif"]
    b.health("ok")
    assert b.identities[1]["inode"] == root.stat().st_ino != identity["inode"]
    assert len(b.told.watched) > watched


def test_an_emptied_root_is_suspect_and_nothing_in_it_is_gone(bench: Callable[..., Bench], root: Path) -> None:
    """Empty is what a dead share looks like: no absence is concluded until entries are back."""
    (root / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.opened()
    (root / "a.tif").rename(root.parent / "a.tif")

    b.scanner.look(Look(1, "", ("a.tif",)))
    assert b.next(Unreadable).names == ("a.tif",)
    assert b.scanner.roots()[1]["health"] == "suspect"
    b.scanner.sweep(Sweep(1, True, 3))
    b.settle()
    assert b.vanished() == []

    (root.parent / "a.tif").rename(root / "a.tif")
    b.recheck()
    b.health("returned")
    assert b.next(Swept).ok
    b.health("ok")
    assert b.vanished() == []


def test_half_of_the_top_gone_at_once_is_suspect_until_accepted(bench: Callable[..., Bench], root: Path) -> None:
    """More than half of the entries at the top gone: a person says whether that was meant."""
    for number in range(10):
        (root / f"s{number}").mkdir()
        (root / f"s{number}" / "a.tif").touch()
    b = bench()
    for number in range(10):
        b.ledger.claim(root, f"s{number}/a.tif")
    b.opened()
    for number in range(6):
        (root / f"s{number}").rename(root.parent / f"s{number}")

    b.scanner.sweep(Sweep(1, True, 1))
    assert "6 of 10 entries" in b.health("suspect").why
    assert b.vanished() == []

    b.scanner.accept(1)
    b.health("returned")
    assert b.next(Swept).ok
    b.wait(lambda: len(b.vanished()) == 6)


def test_what_we_take_away_ourselves_is_no_sign_of_a_lost_root(bench: Callable[..., Bench], root: Path) -> None:
    """Reclaim may empty a directory at once; what it did not announce is doubted as ever, in the same look."""
    names = [f"a{number}.tif" for number in range(20)]
    for name in names:
        (root / name).touch()
    b = bench()
    for name in names:
        b.ledger.claim(root, name)
    b.opened()
    b.scanner.expect_gone(1, names[:12])
    for name in names[:12]:
        (root / name).unlink()
    b.scanner.sweep(Sweep(1, True, 1))
    assert b.next(Swept).ok

    for name in names[12:17]:
        (root / name).unlink()
    b.scanner.sweep(Sweep(1, True, 2))
    assert "5 of 8 entries" in b.health("suspect").why


def test_a_local_root_that_stays_emptied_was_emptied_on_purpose(root: Path) -> None:
    """The same device, inode and mount, empty for a minute: believed. A share is never believed by waiting."""
    at = [1_000.0]
    kept: list[dict[str, Any]] = []

    def made(local_types: frozenset[str]) -> Root:
        return Root(
            str(root), identity=kept[-1] if kept else None, keep=kept.append, has_claims=lambda: True,
            monotonic=lambda: at[0], beat=Beat(), local_types=local_types,
        )  # fmt: skip

    (root / "a.tif").touch()
    local = made(LOCAL_TYPES)
    assert local.check()
    remote = made(frozenset())
    assert remote.check()
    (root / "a.tif").unlink()

    for step in (0.0, EMPTIED_CONFIRM_S / 2):
        at[0] += step
        assert not local.check(deep=True)
        assert not remote.check(deep=True)
    at[0] += EMPTIED_CONFIRM_S
    assert (local.check(), local.epoch) == (True, 1)
    assert (remote.check(), remote.health) == (False, "suspect")
    assert remote.check(accept=True)
    assert remote.check(deep=True)


def test_an_empty_root_with_claims_is_suspect_at_the_start(bench: Callable[..., Bench], root: Path) -> None:
    """The journal remembers what was there before this start."""
    b = bench()
    b.ledger.claims = {"s": {"a.tif": [(1, 0, 1, 5)]}}

    b.open()

    assert b.health("suspect")
    b.settle()
    assert not any(isinstance(fact, Swept) for fact in b.core.facts)


@pytest.mark.serial
def test_an_unmounted_root_is_lost_and_comes_back(
    bench: Callable[..., Bench], root: Path, mounts: Callable[..., None]
) -> None:
    """The directory beneath is not the root; our watching never keeps a file system busy."""
    mounts("disk", root)
    (root / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.opened()
    b.look("", "a.tif")

    run("umount", root)  # not lazy: refused if anything were kept open
    b.scanner.look(Look(1, "", ("a.tif",)))
    assert b.next(Unreadable).names == ("a.tif",)
    assert "is not mounted" in b.scanner.roots()[1]["why"]
    assert b.scanner.roots()[1]["health"] == "lost"

    mounts("disk", root)
    (root / "b.tif").touch()
    b.recheck()
    b.health("returned")
    assert b.next(Swept).ok
    b.health("ok")


@pytest.mark.serial
def test_another_file_system_over_the_root_is_suspect_until_accepted(
    bench: Callable[..., Bench], root: Path, mounts: Callable[..., None]
) -> None:
    """Another source is another disk; a person may say that it is the root now."""
    mounts("first", root)
    (root / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "a.tif")
    b.opened()
    mounts("second", root)
    (root / "b.tif").touch()

    b.recheck()
    assert "from second now, was tmpfs from first" in b.health("suspect").why
    assert b.vanished() == []

    b.scanner.accept(1)
    b.health("returned")
    assert names_of([b.next(Seen)]) == ["b.tif"]
    assert b.identities[1]["source"] == "second"


@pytest.mark.serial
def test_a_file_system_gone_below_the_root_is_no_deletion(
    bench: Callable[..., Bench], root: Path, mounts: Callable[..., None]
) -> None:
    """A directory that was a mount point and is an ordinary one now did not lose its files."""
    (root / "disk").mkdir()
    (root / "x.tif").touch()
    mounts("disk", root / "disk")
    (root / "disk" / "a.tif").touch()
    b = bench()
    b.ledger.claim(root, "disk/a.tif")
    b.opened()
    run("umount", root / "disk")

    swept, _ = b.sweep(full=True)

    assert (swept.ok, "is gone" in swept.why) == (False, True)
    assert b.vanished() == []


def test_an_identity_outlives_the_daemon(bench: Callable[..., Bench], root: Path) -> None:
    """A root that lies on another source than when it was accepted is not believed at the next start."""
    seen = root.stat()
    kept = Identities({1: {"device": seen.st_dev + 1, "inode": 5, "fstype": "ext4", "source": "/dev/other"}})

    b = bench(identities=kept).open()

    b.wait(lambda: b.scanner.roots()[1]["health"] in ("lost", "suspect"))
    b.settle()
    assert not any(isinstance(fact, Swept) for fact in b.core.facts)


# ------------------------------------------------------------------ supervision


def test_a_hung_thread_is_given_up_and_replaced_once_it_is_gone(bench: Callable[..., Bench], root: Path) -> None:
    """Lost names operation, path and time; looks are refused; what the old worker says later does not count."""
    (root / "a.tif").touch()
    b = bench()
    inside, go = threading.Event(), threading.Event()

    def hang(directory: bytes) -> None:
        inside.set()
        go.wait(20)

    b.told.on_watch = hang
    b.open()
    inside.wait(10)
    b.scanner.look(Look(1, "", ("a.tif",)))

    b.scanner.supervise(time.monotonic() + 12)
    assert "hung in watch on" in b.health("lost").why
    assert b.next(Unreadable).names == ("a.tif",)
    b.scanner.look(Look(1, "", ("b.tif",)))
    assert b.next(Unreadable).names == ("b.tif",)
    b.scanner.supervise(time.monotonic() + 100)
    assert b.scanner.roots()[1]["health"] == "lost"

    b.told.on_watch = lambda directory: None
    go.set()

    def again() -> bool:
        b.scanner.supervise(time.monotonic() + 12)
        return b.scanner.roots()[1]["health"] != "lost"

    b.wait(again)
    b.wait(lambda: b.scanner.roots()[1]["health"] == "ok")
    told = [fact.health for fact in b.core.facts if isinstance(fact, RootChanged)]
    assert told == ["ok", "lost", "returned", "ok"]
    silent = [isinstance(fact, RootChanged) for fact in b.core.facts]
    lost, returned = [at for at, changed in enumerate(silent) if changed][1:3]
    assert all(isinstance(fact, Unreadable) for fact in b.core.facts[lost + 1 : returned])


def test_a_root_that_hangs_delays_no_other_and_not_the_end(
    bench: Callable[..., Bench], root: Path, tmp_path: Path
) -> None:
    """Other roots are served, status answers, stop returns."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.tif").touch()
    b = bench(rules=[rule(root), rule(other, 2)])
    inside, go = threading.Event(), threading.Event()
    watch = b.told.watch

    def hang(number: int, directory: bytes) -> None:
        if number == 1:
            inside.set()
            go.wait(20)
        watch(number, directory)

    b.told.watch = hang  # type: ignore[method-assign]
    b.scanner.use(b.rules, {str(root): 1, str(other): 2})
    inside.wait(10)

    assert b.next(Swept).root == 2
    began = time.monotonic()
    b.scanner.roots()
    b.scanner.stop()
    assert time.monotonic() - began < 1
    go.set()


def test_a_worker_that_fails_is_started_again(bench: Callable[..., Bench], root: Path) -> None:
    """A worker's end is told with its reason, and it is not the end of the root."""
    (root / "a.tif").touch()
    b = bench().opened()
    b.ledger.broken = "disk I/O error"
    b.scanner.look(Look(1, "", ("a.tif",)))

    def lost() -> bool:
        b.scanner.supervise(time.monotonic())
        return b.scanner.roots()[1]["health"] == "lost"

    b.wait(lost)
    assert "disk I/O error" in b.health("lost").why
    assert b.next(Unreadable).names == ("a.tif",)

    b.ledger.broken = ""
    b.wait(lambda: (b.scanner.supervise(time.monotonic() + 60), b.scanner.roots()[1]["health"] == "ok")[1])
    b.health("returned")


def test_a_worker_that_cannot_be_started_is_told_and_tried_again(
    bench: Callable[..., Bench], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that has run out of threads loses a root for a while, not the daemon."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    b = bench()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        b.open()
    assert "can't start new thread" in b.health("lost").why

    b.scanner.supervise(time.monotonic() + 60)
    assert b.next(Swept).ok


def test_asked_sweeps_and_marks_outlive_a_worker(bench: Callable[..., Bench], root: Path) -> None:
    """What a given-up worker did not answer is answered by the next one."""
    b = bench().opened()
    b.scanner.hold(HoldSweeps(True))
    b.settle()
    b.scanner.sweep(Sweep(1, True, 77))
    b.ledger.broken = "gone"
    b.scanner.mark(Mark(1))

    def lost() -> bool:
        b.scanner.supervise(time.monotonic())
        return b.scanner.roots()[1]["health"] == "lost"

    b.wait(lost)
    b.ledger.broken = ""
    b.scanner.supervise(time.monotonic() + 60)
    b.next(Marked)
    assert not any(isinstance(fact, Swept) and fact.asked for fact in b.core.facts)
    b.scanner.hold(HoldSweeps(False))
    assert b.next(Swept).asked == 77


def test_a_closed_root_is_no_longer_served(bench: Callable[..., Bench], root: Path) -> None:
    """A root no rule uses is closed, and a look at it is answered all the same."""
    b = bench().opened()

    b.scanner.use([], {})
    b.scanner.look(Look(1, "", ("a.tif",)))

    assert b.next(Unreadable).names == ("a.tif",)
    assert b.scanner.roots() == {}


def test_a_broken_source_of_hints_degrades_the_root(bench: Callable[..., Bench], root: Path) -> None:
    """What is wrong with the hints is told as the root's health, and that sweeps go on."""
    b = bench().opened()
    b.told.fault = "the reader died"

    b.scanner.supervise(time.monotonic())
    b.recheck()

    assert b.health("degraded").why == "the reader died"


# ------------------------------------------------------------------ file systems that hang


def remote_bench(bench: Callable[..., Bench], tmp_path: Path, **keys: Any) -> Bench:
    journal = Journal.open(tmp_path / "state")
    path = journal.path
    journal.close()
    return bench(claims=functools.partial(ClaimReader, path), **keys)


@pytest.mark.serial
def test_a_share_is_served_by_a_process_without_hints(
    bench: Callable[..., Bench], share: Share, tmp_path: Path
) -> None:
    """Remote writers cause no events, so none are listened to; looks and sweeps are the same."""
    b = remote_bench(bench, tmp_path).open()

    ok = b.health("ok")
    assert (ok.events, "sweeps only" in ok.why) == ("none", True)
    assert names_of([b.next(Seen)]) == ["a.tif", "b.tif"]
    assert b.next(Swept).ok
    assert [(name, state and state[0]) for name, state, _ in b.look("", "a.tif", "c.tif").rows] == [
        ("a.tif", 3),
        ("c.tif", None),
    ]
    b.settle()
    assert b.told.watched == []
    assert b.identities[1]["source"] == "share"


@pytest.mark.serial
def test_trouble_of_a_server_is_no_verdict_on_a_file(
    bench: Callable[..., Bench], share: Share, tmp_path: Path
) -> None:
    """EIO means unreadable and a root in trouble, never absent."""
    b = remote_bench(bench, tmp_path).opened()
    share.mood = errno.EIO

    b.scanner.look(Look(1, "", ("a.tif",)))
    assert b.next(Unreadable).why == os.strerror(errno.EIO)
    assert "Input/output error" in b.health("degraded").why
    swept, seen = b.sweep(full=True)
    assert (swept.ok, seen) == (False, [])

    share.mood = "answer"
    assert b.sweep(full=True)[0].ok
    b.health("ok")


@pytest.mark.serial
def test_a_hung_share_is_lost_and_served_again_once_it_answers(
    bench: Callable[..., Bench], share: Share, tmp_path: Path
) -> None:
    """The process is killed; no second one begins before the first is gone, which may take until the server answers."""
    b = remote_bench(bench, tmp_path, hang_remote_s=1.0).opened()
    share.mood = "hang"
    b.scanner.look(Look(1, "", ("a.tif",)))
    b.wait(lambda: share.held)

    def lost() -> bool:
        b.scanner.supervise(time.monotonic())
        return b.scanner.roots()[1]["health"] == "lost"

    b.wait(lost)
    assert "hung in lstat on" in b.health("lost").why
    assert b.next(Unreadable).names == ("a.tif",)
    former = b.scanner._slots[1].former
    assert former is not None
    for _ in range(3):
        b.scanner.supervise(time.monotonic())
    assert former.gone() or b.scanner._slots[1].host is None

    share.release()
    b.wait(lambda: (b.scanner.supervise(time.monotonic()), b.scanner.roots()[1]["health"] == "ok")[1], 20)
    b.health("returned")
    assert b.next(Swept).ok


@pytest.mark.serial
def test_stop_does_not_wait_for_a_hung_share(bench: Callable[..., Bench], share: Share, tmp_path: Path) -> None:
    """The end of the daemon waits for no server."""
    b = remote_bench(bench, tmp_path).opened()
    share.mood = "hang"
    b.scanner.look(Look(1, "", ("a.tif",)))
    b.wait(lambda: share.held)

    began = time.monotonic()
    b.scanner.stop()

    assert time.monotonic() - began < 1


@pytest.mark.serial
def test_a_share_behind_a_link_is_moved_to_a_process(
    bench: Callable[..., Bench], share: Share, tmp_path: Path
) -> None:
    """Where a root really lies is found by following its links, which only its worker does."""
    link = tmp_path / "link"
    link.symlink_to(share_path := tmp_path / "root")
    assert share_path.is_dir()
    b = remote_bench(bench, tmp_path, path=link, rules=[rule(link)]).open()

    def supervised() -> bool:
        b.scanner.supervise(time.monotonic())
        return any(isinstance(fact, Swept) for fact in b.core.facts)

    b.wait(supervised)
    assert b.scanner._slots[1].hangs
    assert names_of([fact for fact in b.core.facts if isinstance(fact, Seen)]) == ["a.tif", "b.tif"]


def test_a_process_does_what_a_thread_does(bench: Callable[..., Bench], root: Path, tmp_path: Path) -> None:
    """The same tree, the same facts, when the type of its file system is called unknown."""
    for name in ("s/a.tif", "s/b.tif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    b = remote_bench(bench, tmp_path, local_types=LOCAL_TYPES - {"ext4", "tmpfs", "overlay", "xfs", "btrfs"})
    b.opened()

    (root / "s" / "c.tif").touch()
    assert names_of(b.sweep(full=False)[1]) == ["s/c.tif"]
    b.scanner.use([rule(root), rule(root, 2)], {str(root): 1})
    assert b.next(Seen).rows[0][2] == ((1, 0), (2, 0))
    b.settle()


# ------------------------------------------------------------------ with the journal; cost


def test_claims_of_the_journal_are_honoured(bench: Callable[..., Bench], root: Path, tmp_path: Path) -> None:
    """What a committed batch took is not sent again; a later version is, with the batch that took the earlier."""
    (root / "s").mkdir()
    for name in ("s/a.tif", "s/b.tif"):
        (root / name).write_bytes(b"x")
    journal = Journal.open(tmp_path / "state")
    number = journal.rule_ids(["r1"])["r1"]
    place = journal.root_id(str(root))
    st = (root / "s/a.tif").stat()
    member = Member(place, "s", "a.tif", st.st_size, st.st_mtime_ns)
    journal.append([BatchClosed(1, number, {}, "files", 0.0, [member], 1, {}, "d")])
    b = bench(claims=functools.partial(ClaimReader, journal.path), rules=[rule(root, number)])
    b.scanner.use(b.rules, {str(root): place})

    seen = b.next(Seen)
    assert (names_of([seen]), seen.as_of) == (["s/b.tif"], 1)
    (root / "s/a.tif").write_bytes(b"longer")
    b.scanner.look(Look(place, "s", ("a.tif",)))
    assert b.next(Seen, lambda fact: fact.cause == "deadline").rows[0][2] == ((number, 1),)
    b.scanner.stop()
    journal.close()


def test_a_known_file_costs_few_bytes(bench: Callable[..., Bench], root: Path) -> None:
    """At most 100 bytes a known file stay between sweeps; a million known files fit anywhere."""
    for directory in range(4):
        (root / f"s{directory}").mkdir()
        for number in range(500):
            (root / f"s{directory}" / f"frame_{number:06}_fractions.tif").touch()
    b = bench()
    for path in root.glob("*/*"):
        b.ledger.claim(root, str(path.relative_to(root)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    b.opened()
    b.settle()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    assert kept / 2_000 < 100
