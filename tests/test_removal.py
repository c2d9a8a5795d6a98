"""Taking source files away: what is not the proved version is never lost, and a set goes together or not at all."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.platform != "linux":
    pytest.skip("leases and renaming without replacing are Linux", allow_module_level=True)

from trigger_daemon import failpoints, mounts, removal
from trigger_daemon.removal import Place, Target, aside, back, gone, left

SET = ("d/movie.tif", "d/movie.xml", "e/f/movie.mdoc")
LONG_AGO_NS = 1_700_000_000_123_456_789
POINTS = {
    "removal.open", "removal.look", "removal.rename", "removal.replacing", "removal.renamed", "removal.again",
    "removal.aside", "removal.unlink", "removal.unlinked", "removal.back", "removal.returned", "removal.keep",
    "removal.kept", "removal.sync", "removal.lease",
}  # fmt: skip

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


def target_of(root: Path, path: str, number: int = 0) -> Target:
    """Return a file's version as it is now, as a look would give it."""
    seen = os.lstat(root / path)
    state = (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)
    return Target(str(root), path, state, f".trigger-daemon-reclaim-7-{number}")


def make_set(root: Path, paths: tuple[str, ...] = SET) -> list[Target]:
    """Write files of equal length that differ, last changed long ago."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path)[-8:].rjust(8))
        os.utime(root / path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return [target_of(root, path, number) for number, path in enumerate(paths)]


def tree(root: Path) -> dict[str, bytes]:
    """Return every regular file below a root, links not followed, with its content."""
    found = {}
    for where, _, names in os.walk(root):
        for name in names:
            path = Path(where, name)
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(root))] = path.read_bytes()
    return found


def hidden(root: Path) -> list[str]:
    return [path for path in tree(root) if "/.trigger-daemon-reclaim" in f"/{path}"]


@contextlib.contextmanager
def at_points(act: Callable[[str, int], Any]) -> Iterator[None]:
    """Call `act` with the name and the running number of each fail point that is passed, instead of failing there."""
    steps = itertools.count()

    def hook(name: str) -> bool:
        act(name, next(steps))
        return False

    before, removal.fail_point = removal.fail_point, hook  # type: ignore[attr-defined]
    try:
        yield
    finally:
        removal.fail_point = before  # type: ignore[attr-defined]


@contextlib.contextmanager
def once_at(point: str, visit: int, act: Callable[[], Any]) -> Iterator[None]:
    """Act when this fail point is passed for the `visit`th time."""
    visits = itertools.count(1)
    with at_points(lambda name, _: act() if name == point and next(visits) == visit else None):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def plan() -> Iterator[Callable[[str], None]]:
    """Plan failures for this process, in the words of TRIGGER_FAIL."""
    yield failpoints.plan
    failpoints.plan("")


# ------------------------------------------------------------------------- phases


def test_a_set_goes_and_nothing_else(root: Path) -> None:
    """All are aside, then all are gone; neighbours and directories stay, and repeating changes nothing."""
    targets = make_set(root)
    (root / "d/other.tif").write_bytes(b"other")
    assert left(targets) == (Place.AT_NAME,) * 3

    assert aside(targets) == aside(targets) == removal.Outcome(True, (Place.ASIDE,) * 3)
    assert left(targets) == (Place.ASIDE,) * 3 and len(hidden(root)) == 3
    assert gone(targets) == removal.Outcome(True, (Place.GONE,) * 3)
    assert gone(targets) == removal.Outcome(True, (Place.NEITHER,) * 3)
    assert back(targets).ok and left(targets) == (Place.NEITHER,) * 3
    assert tree(root) == {"d/other.tif": b"other"} and (root / "e/f").is_dir()


def test_what_is_put_back_is_what_it_was(root: Path) -> None:
    """Same names, inodes, contents and times; repeating changes nothing."""
    targets = make_set(root)
    before, inodes = tree(root), [os.stat(root / path).st_ino for path in SET]
    assert aside(targets).ok

    assert back(targets) == back(targets) == removal.Outcome(True, (Place.AT_NAME,) * 3)
    assert tree(root) == before and [os.stat(root / path).st_ino for path in SET] == inodes
    assert all(os.stat(root / path).st_mtime_ns == LONG_AGO_NS for path in SET)


def test_gone_takes_nothing_that_was_not_set_aside(root: Path) -> None:
    """After a power cut a rename may be undone: a proved version at its own name is left there, and so is its set."""
    targets = make_set(root)
    before = tree(root)
    assert gone(targets).places == (Place.AT_NAME,) * 3 and tree(root) == before
    assert aside(targets[:2]).ok

    outcome = gone(targets)

    assert not outcome.ok and "stands at its name again" in outcome.why
    assert tree(root) == before


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "d/../x", "d//x", "./x", "d/"])
def test_a_path_that_leads_out_of_the_root_is_refused(root: Path, path: str) -> None:
    """What the journal says is not trusted to be below the root."""
    outside = root.parent / "x"
    outside.write_bytes(b"x")
    target = Target(str(root), path, target_of(root.parent, "x").state, ".hidden")
    for phase in (aside, gone, back):
        outcome = phase([target])

        assert not outcome.ok and outcome.why and outcome.places == (Place.UNKNOWN,)
    assert outside.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "movie.tif"])
def test_a_hidden_name_is_a_name(root: Path, name: str) -> None:
    """It lies in the same directory and is another one."""
    (target,) = make_set(root, SET[:1])
    before = tree(root)

    assert not aside([Target(target.root, target.path, target.state, name)]).ok
    assert tree(root) == before


def test_surrogates_and_the_longest_names(root: Path) -> None:
    """Any bytes that are a name; 255 of them are as many as there can be, also beside a new file."""
    names = tuple(os.fsdecode(raw) for raw in (b"\xff\xfe.tif", "é".encode() * 127 + b"x", b"n" * 255, b"n" * 130))
    targets = make_set(root, names)
    assert aside(targets).ok
    for name in names:
        (root / name).write_bytes(b"new")
    outcome = back(targets)

    assert outcome.ok and outcome.places == (Place.KEPT,) * 4
    for (old, new), name in zip(outcome.kept, names, strict=True):
        assert old == f"{root}/{name}" and new.endswith(".kept-1")
        assert len(os.fsencode(os.path.basename(new))) <= max(len(os.fsencode(name)), removal.NAME_MAX)
    assert hidden(root) == [] and len(tree(root)) == 8


# ----------------------------------------------------------------------- refusals


def _append(file: Path) -> Any:
    with file.open("ab") as stream:
        stream.write(b"more")


def _rewrite(file: Path) -> Any:
    file.write_bytes(b"rewrote!")


def _replace(file: Path) -> Any:
    """Another file of the same length and times."""
    other = file.with_name("other")
    other.write_bytes(b"replaced")
    os.utime(other, ns=(LONG_AGO_NS, LONG_AGO_NS))
    os.replace(other, file)


def _restore_times(file: Path) -> Any:
    file.write_bytes(b"restored")
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))


def _link(file: Path) -> Any:
    os.link(file, file.with_name("link"))


def _symlink(file: Path) -> Any:
    os.rename(file, file.with_name("real"))
    file.symlink_to("real")


def _swap(file: Path) -> Any:
    directory = file.parent
    os.rename(directory, directory.with_name("moved"))
    directory.symlink_to("moved")


def _pipe(file: Path) -> Any:
    file.unlink()
    os.mkfifo(file)


def _writer(file: Path) -> Any:
    return file.open("r+b")


def _map(file: Path) -> Any:
    with file.open("r+b") as stream:
        return mmap.mmap(stream.fileno(), 0)


REFUSALS = {
    "append": (_append, "not what was proved"),
    "rewrite": (_rewrite, "not what was proved"),
    "replace": (_replace, "not what was proved"),
    "restore times": (_restore_times, "not what was proved"),
    "chmod": (lambda file: file.chmod(0o600), "not what was proved"),  # only ctime moves
    "hard link": (_link, "2 names"),
    "symlink": (_symlink, "no regular file"),
    "symlink of a directory": (_swap, "Not a directory"),
    "pipe": (_pipe, "no regular file"),
    "delete": (Path.unlink, "No such file"),
    "open writer": (_writer, "open for writing"),
    "writable map": (_map, "open for writing"),
}


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", REFUSALS)
def test_a_set_with_one_that_differs_stays(root: Path, how: str, which: int) -> None:
    """Whatever one of the set has become, none is moved, not even for an instant, and the words name it."""
    targets = make_set(root)
    do, words = REFUSALS[how]
    held = do(root / SET[which])
    before = tree(root)
    passed: set[str] = set()
    with at_points(lambda point, _: passed.add(point)):
        outcome = aside(targets)

    assert "removal.rename" not in passed
    assert not outcome.ok and words in outcome.why and outcome.hint
    assert str(root / SET[which]).rsplit("/", 1)[0] in outcome.why
    assert tree(root) == before
    del held


def test_a_reader_is_no_obstacle(root: Path) -> None:
    """Copies and viewers have files open, too."""
    targets = make_set(root)
    with (root / SET[0]).open("rb") as reader:
        assert aside(targets).ok and gone(targets).ok

        assert reader.read() == b"ovie.tif"


def test_what_is_not_known_of_a_state_is_not_compared(root: Path) -> None:
    """An invented inode and an unknown ctime are 0; size and mtime still count."""
    (target,) = make_set(root, SET[:1])
    (root / SET[0]).chmod(0o600)
    size, mtime_ns, _, _ = target.state
    assert not aside([Target(target.root, target.path, (size, mtime_ns + 1, 0, 0), target.hidden)]).ok

    assert aside([Target(target.root, target.path, (size, mtime_ns, 0, 0), target.hidden)]).ok


def test_unknown_writers_are_a_persons_matter(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a share other hosts' writers are not seen: refused, unless a person decided otherwise; then it is told."""
    targets = make_set(root)
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - nfs4 server:/export rw\n")
    monkeypatch.setattr(mounts, "MOUNTINFO", str(table))
    before = tree(root)
    outcome = aside(targets)
    assert not outcome.ok and "cannot be told" in outcome.why and tree(root) == before

    assert aside(make_set(root), need_lease=False) == removal.Outcome(True, (Place.ASIDE,) * 3, writers_known=False)
    assert not gone(targets).ok and tree(root) == before
    targets = make_set(root)
    assert aside(targets, need_lease=False).ok and gone(targets, need_lease=False).ok


@pytest.mark.serial
@needs_root
def test_a_file_of_another_user_has_unknown_writers(shm_path: Path) -> None:
    """Without CAP_LEASE no lease is had on it: unknown is not `nobody`."""
    shm_path.chmod(0o777)
    root = shm_path / "root"
    root.mkdir()
    targets = make_set(root, ("movie.tif",))
    root.chmod(0o777)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        answers = aside(targets), aside(targets, need_lease=False)
        os.write(write, json.dumps([[one.ok, one.writers_known, one.why] for one in answers]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    refused, moved = json.loads(os.read(read, 10_000))
    os.close(read)
    os.close(write)

    assert not refused[0] and "cannot be told" in refused[2]
    assert moved[0] and not moved[1]


def test_a_missing_root_says_nothing_of_its_files(tmp_path: Path) -> None:
    """It is never created; nothing is called gone."""
    root = tmp_path / "root"
    targets = make_set(root)
    assert aside(targets).ok
    root.rename(tmp_path / "away")
    for phase in (aside, gone, back):
        outcome = phase(targets)
        assert not outcome.ok and "not there" in outcome.why and outcome.hint
        assert outcome.places == (Place.UNKNOWN,) * 3
    assert left(targets) == (Place.UNKNOWN,) * 3 and not root.exists()

    (tmp_path / "away").rename(root)
    assert back(targets).ok and set(tree(root)) == set(SET)


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)


@pytest.mark.serial
@needs_root
@pytest.mark.parametrize("kind", ["another disk in the middle", "another disk's file", "a file of this disk"])
def test_what_is_mounted_below_the_root_is_left_alone(root: Path, tmp_path: Path, shm_path: Path, kind: str) -> None:
    """Neither a file system that a rename could not cross nor a file that stands in for another is touched."""
    make_set(root)
    arguments = ["-t", "tmpfs", "tmpfs", str(root / "e/f")]
    if "file" in kind:
        other = (tmp_path if "this" in kind else shm_path) / "other"
        other.write_bytes(b"standing")
        arguments = ["--bind", str(other), str(root / SET[0])]
    with mounted(*arguments):
        targets = make_set(root)
        before = tree(root)
        outcome = aside(targets)

        assert not outcome.ok and ("busy" if "this" in kind else " is mounted ") in outcome.why and tree(root) == before


@pytest.mark.serial
@needs_root
def test_what_lies_beneath_a_mount_is_not_gone(root: Path) -> None:
    """A disk mounted over a directory of the set hides it: nothing is unlinked, and later all is put back."""
    targets = make_set(root)
    before = tree(root)
    assert aside(targets).ok
    with mounted("-t", "tmpfs", "tmpfs", str(root / "e/f")):
        outcome = gone(targets)
        assert not outcome.ok and outcome.places == (Place.AT_NAME, Place.AT_NAME, Place.UNKNOWN)

    assert back(targets).ok and tree(root) == before


@pytest.mark.serial
@needs_root
@pytest.mark.parametrize("source", ["another disk", "this disk"])
def test_a_root_that_is_unmounted_at_any_step_loses_nothing_beneath(root: Path, tmp_path: Path, source: str) -> None:
    """What lies below the mount point stays, whatever it is called; gone is what is gone; the rest comes back."""
    beneath = {target.path: b"beneath!" for target in make_set(root)}
    for path, content in beneath.items():
        (root / path).write_bytes(content)
        os.utime(root / path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(unmount_at: int) -> int:
        """Take a set away and back, with the root unmounted at a step; return how many steps there are."""
        steps = 0

        def step(name: str, number: int) -> None:
            nonlocal steps
            steps = max(steps, number + 1)
            if number == unmount_at:
                subprocess.run(["umount", "-l", str(root)], check=True)

        subprocess.run(["mount", "--bind", str(disk), str(root)], check=True)
        targets = make_set(root)
        before = tree(disk)
        with at_points(step):
            done = [aside(targets)]
            done.append(gone(targets) if done[0].ok else back(targets))
        if unmount_at < steps:
            assert tree(root) == beneath
            subprocess.run(["mount", "--bind", str(disk), str(root)], check=True)
        try:
            taken = {target.path for one in done for target, place in zip(targets, one.places, strict=True)
                     if place is Place.GONE}  # fmt: skip
            assert back(targets).ok and tree(disk) == {path: before[path] for path in before.keys() - taken}
        finally:
            subprocess.run(["umount", str(root)], check=True)
        return steps

    with mounted("-t", "tmpfs", "tmpfs", str(disk)) if source == "another disk" else contextlib.nullcontext():
        number = 0
        while number < run(number):
            shutil.rmtree(disk / "d", ignore_errors=True)
            shutil.rmtree(disk / "e", ignore_errors=True)
            number += 1
    assert number > 20


def test_more_directories_than_a_set_has_are_refused(root: Path) -> None:
    """Descriptors have a limit; nothing is moved."""
    targets = make_set(root, tuple(f"d{number}/x" for number in range(removal.DIRECTORIES_MAX + 1)))
    before = tree(root)
    outcome = aside(targets)

    assert not outcome.ok and "directories" in outcome.why and tree(root) == before


# ---------------------------------------------------------------------- put back


def test_a_new_file_under_the_old_name_is_never_replaced(root: Path) -> None:
    """The old one is kept beside it under a visible name that is free, and repeating tells the same."""
    targets = make_set(root)
    old = (root / SET[0]).read_bytes()
    (root / f"{SET[0]}.kept-1").write_bytes(b"an earlier one")
    assert aside(targets).ok
    (root / SET[0]).write_bytes(b"new")
    assert left(targets) == (Place.BOTH, Place.ASIDE, Place.ASIDE)
    outcome = back(targets)

    assert outcome.ok and outcome == back(targets)
    assert outcome.places == (Place.KEPT, Place.AT_NAME, Place.AT_NAME)
    assert outcome.kept == ((f"{root}/{SET[0]}", f"{root}/{SET[0]}.kept-2"),)
    assert (root / SET[0]).read_bytes() == b"new"
    assert (root / f"{SET[0]}.kept-1").read_bytes() == b"an earlier one"
    assert (root / f"{SET[0]}.kept-2").read_bytes() == old and hidden(root) == []


def test_a_proved_version_goes_also_beside_a_new_one(root: Path) -> None:
    """What the instrument has written since under the old name is another file; after a kill in between, too."""
    targets = make_set(root)
    assert aside(targets).ok
    (root / SET[0]).write_bytes(b"new")
    assert aside(targets).ok
    assert gone(targets[:1]).places == (Place.GONE,)

    assert gone(targets) == removal.Outcome(True, (Place.NEITHER, Place.GONE, Place.GONE))
    assert tree(root) == {SET[0]: b"new"}


def test_a_kept_file_is_not_gone(root: Path) -> None:
    """Repeated after a death while putting back, the unlinking takes neither it nor the rest of its set."""
    targets = make_set(root)
    assert aside(targets).ok
    (root / SET[0]).write_bytes(b"new")
    assert back(targets[:1]).places == (Place.KEPT,)
    before = set(tree(root).values())
    outcome = gone(targets)

    assert not outcome.ok and outcome.places == (Place.KEPT, Place.AT_NAME, Place.AT_NAME) and len(outcome.kept) == 1
    assert set(tree(root).values()) == before and hidden(root) == []


def test_a_hundred_kept_files_stop_it_visibly(root: Path) -> None:
    """Then it stays hidden, and a person is told what to tidy up."""
    targets = make_set(root, SET[:1])
    assert aside(targets).ok
    for name in removal.kept_names(SET[0]):
        (root / name).write_bytes(b"x")
    (root / SET[0]).write_bytes(b"new")
    outcome = back(targets)

    assert not outcome.ok and targets[0].hidden in outcome.why and outcome.hint and len(hidden(root)) == 1


def test_a_file_system_that_cannot_refuse_to_replace_is_asked_first(root: Path, plan: Callable[[str], None]) -> None:
    """Without RENAME_NOREPLACE absence is looked for; the laws are the same, but for that instant."""
    plan("removal.replacing:flag")
    targets = make_set(root)
    assert aside(targets).ok
    (root / SET[0]).write_bytes(b"new")
    (root / f"{SET[0]}.kept-1").write_bytes(b"an earlier one")

    assert back(targets).places == (Place.KEPT, Place.AT_NAME, Place.AT_NAME)
    assert (root / SET[0]).read_bytes() == b"new" and len(tree(root)) == 5
    targets = make_set(root)
    assert aside(targets).ok and gone(targets).ok


# --------------------------------------------------------------- looked at once more


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["append", "rewrite", "replace", "hard link", "symlink", "pipe", "open writer"])
def test_a_difference_after_it_was_set_aside_puts_all_back(root: Path, how: str, which: int) -> None:
    """Through a descriptor or the hidden name: nothing of the set is unlinked, and all stand at their names."""
    targets = make_set(root)
    assert aside(targets).ok
    file = (root / SET[which]).with_name(targets[which].hidden)
    held = REFUSALS[how][0](file)
    before = {content for path, content in tree(root).items()}
    outcome = gone(targets)

    assert not outcome.ok and REFUSALS[how][1] in outcome.why
    assert outcome.places == (Place.AT_NAME,) * 3 and set(tree(root).values()) == before
    del held


def test_once_the_first_is_gone_the_others_follow_and_a_different_one_stays(root: Path) -> None:
    """A set half unlinked cannot be made whole again: what still is the proved version goes, the rest is put back."""
    targets = make_set(root)
    assert aside(targets).ok and gone(targets[:1]).ok
    _append((root / SET[1]).with_name(targets[1].hidden))
    outcome = gone(targets)

    assert not outcome.ok and outcome.places == (Place.NEITHER, Place.AT_NAME, Place.GONE)
    assert list(tree(root)) == [SET[1]]


@pytest.mark.parametrize("how", ["append", "rewrite", "replace", "hard link", "symlink", "pipe", "open writer"])
@pytest.mark.parametrize("point", ["removal.lease", "removal.rename"])
def test_what_changes_between_look_and_rename_comes_back(root: Path, point: str, how: str) -> None:
    """The second look decides: all stand at their names again, and what is different is what it was made."""
    targets = make_set(root)
    contents: list[set[bytes]] = []
    held: list[Any] = []

    def act() -> None:
        held.append(REFUSALS[how][0](root / SET[1]))
        contents.append(set(tree(root).values()))

    with once_at(point, 2, act):
        outcome = aside(targets)

    assert not outcome.ok and outcome.places == (Place.AT_NAME,) * 3
    assert set(tree(root).values()) == contents[0] and hidden(root) == []


@pytest.mark.parametrize("how", ["append", "rewrite", "replace", "hard link", "open writer"])
@pytest.mark.parametrize(("point", "visit"), [("removal.unlink", 1), ("removal.unlinked", 1), ("removal.lease", 5)])
def test_each_is_looked_at_just_before_it_is_unlinked(root: Path, how: str, point: str, visit: int) -> None:
    """The looks of the others take time; one that changes meanwhile is put back, with its new content."""
    targets = make_set(root)
    assert aside(targets).ok
    file = (root / SET[1]).with_name(targets[1].hidden)
    held: list[Any] = []
    with once_at(point, visit, lambda: held.append(REFUSALS[how][0](file))):
        outcome = gone(targets)

    assert not outcome.ok and outcome.places == (Place.GONE, Place.AT_NAME, Place.GONE)
    assert (root / SET[1]).exists() and hidden(root) == []


def test_a_new_file_at_the_very_instant_of_putting_back_is_not_replaced(root: Path) -> None:
    """Only the kernel can decide who was first; the loser is kept beside it."""
    targets = make_set(root, SET[:1])
    old = (root / SET[0]).read_bytes()
    assert aside(targets).ok
    with once_at("removal.back", 1, lambda: (root / SET[0]).write_bytes(b"new")):
        outcome = back(targets)

    assert outcome.ok and outcome.places == (Place.KEPT,)
    assert tree(root) == {SET[0]: b"new", f"{SET[0]}.kept-1": old}


@pytest.mark.parametrize("point", ["removal.rename", "removal.renamed", "removal.again", "removal.aside"])
def test_a_directory_that_is_replaced_meanwhile_gets_its_file_back(root: Path, point: str) -> None:
    """It goes back to where it came from, wherever that is called now; at the last step it stays aside, unharmed."""
    targets = make_set(root, SET[:1])
    content = (root / SET[0]).read_bytes()
    with once_at(point, 1, lambda: _swap(root / SET[0])):
        outcome = aside(targets)
    if point == "removal.aside":
        assert outcome.ok and not gone(targets).ok and back(targets).places == (Place.UNKNOWN,)
        os.unlink(root / "d")
        os.rename(root / "moved", root / "d")
        assert back(targets).ok and tree(root) == {SET[0]: content}
    else:
        assert not outcome.ok and tree(root) == {"moved/movie.tif": content}


# ------------------------------------------------------------------------ errors

CODES = ("eio", "enoent", "eacces", "erofs", "ebusy", "estale", "enotconn", "etimedout")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("point", sorted(POINTS - {"removal.unlink", "removal.unlinked"}))
def test_an_error_becomes_words_and_nothing_is_lost(
    root: Path, plan: Callable[[str], None], point: str, code: str
) -> None:
    """At any step of any phase: no exception, a reason with a hint; once it is over, all are back or gone."""
    targets = make_set(root)
    before = tree(root)
    words = os.strerror(getattr(errno, code.upper()))
    plan(f"{point}:{code}")
    outcome = aside(targets)
    if outcome.ok:
        (root / SET[0]).write_bytes(b"new")
        outcome = back(targets)
    assert not outcome.ok and words in outcome.why and outcome.hint and str(root) in outcome.why
    plan("")

    assert back(targets).ok and hidden(root) == []
    assert set(before.values()) <= set(tree(root).values())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("point", ["removal.look", "removal.unlink", "removal.unlinked", "removal.sync"])
@pytest.mark.parametrize("visit", [1, 2, 4, 6])
def test_an_error_while_unlinking_calls_nothing_gone_that_is_not(
    root: Path, plan: Callable[[str], None], point: str, code: str, visit: int
) -> None:
    """Each place that is told is true; repeated without the error, each is gone or back, none hidden."""
    targets = make_set(root)
    assert aside(targets).ok
    plan(f"{point}:{code}@{visit}")
    outcome = gone(targets)
    plan("")
    for target, place, now in zip(targets, outcome.places, left(targets), strict=True):
        assert place == now or (place, now) == (Place.GONE, Place.NEITHER)
        assert place is not Place.AT_NAME or (root / target.path).read_bytes()
    assert outcome.ok or (outcome.why and outcome.hint)
    assert not outcome.ok or point != "removal.sync" or visit > 2

    again = back(targets)
    assert again.ok and hidden(root) == []


# ---------------------------------------------------------------- an instrument at work


class Killed(BaseException):
    """The process is no more; nothing but the closing of descriptors may come after it."""


class Instrument:
    """Writes, replaces, links and moves what it believes to be its files, and knows what it has destroyed itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.live = set(tree(root).values())  # contents that nobody but a reclaim of a proved version may take
        self._writers: list[int] = []
        self._dead: set[int] = set()  # inodes that the instrument itself has unlinked
        self._contents = itertools.count(1)

    def new(self) -> bytes:
        content = f"i{next(self._contents):07d}".encode()  # as long as the proved ones
        self.live.add(content)
        return content

    def loses(self, path: Path) -> None:
        if path.is_file() and path.stat().st_nlink == 1:
            self.live.discard(path.read_bytes())
            self._dead.add(path.stat().st_ino)

    def rewrite(self, path: Path) -> None:
        with path.open("r+b" if path.exists() else "wb") as stream:
            self.live.discard(path.read_bytes())
            stream.truncate()
            stream.write(self.new())

    def append(self, path: Path) -> None:
        with path.open("ab") as stream:
            old = path.read_bytes()
            new = self.new()
            stream.write(new)
        self.live -= {old, new}
        self.live.add(old + new)

    def replace(self, path: Path) -> None:
        other = path.with_name("temporary")
        other.write_bytes(self.new())
        self.loses(path)
        os.replace(other, path)

    def delete(self, path: Path) -> None:
        self.loses(path)
        path.unlink()

    def link(self, path: Path) -> None:
        os.link(path, path.with_name(f"{path.name}.link{next(self._contents)}"))

    def open(self, path: Path) -> None:
        self._writers.append(os.open(path, os.O_RDWR))

    def write(self, _: Path) -> None:
        for writer in self._writers:
            self.live.discard(os.pread(writer, 100, 0))
            content = self.new()
            os.ftruncate(writer, 0)
            os.pwrite(writer, content, 0)
            if os.fstat(writer).st_ino in self._dead and os.fstat(writer).st_nlink == 0:
                self.live.discard(content)

    def close(self, _: Path) -> None:
        while self._writers:
            os.close(self._writers.pop())

    def swap(self, path: Path) -> None:
        """A directory goes elsewhere, and a link leads there."""
        os.rename(path.parent, path.parent.with_name("moved"))
        path.parent.symlink_to("moved")

    def unswap(self, path: Path) -> None:
        if path.parent.is_symlink():
            path.parent.unlink()
            os.rename(path.parent.with_name("moved"), path.parent)

    def afresh(self, path: Path) -> None:
        """A directory goes elsewhere, and a new one takes its name."""
        os.rename(path.parent, path.parent.with_name(f"old{next(self._contents)}"))
        path.parent.mkdir()

    def __call__(self, verb: str, path: str) -> None:
        with contextlib.suppress(OSError):  # an instrument, too, meets names that are not there
            getattr(self, verb)(self.root / path)


VERBS = ("rewrite", "append", "replace", "delete", "link", "open", "write", "close", "swap", "unswap")
ACTS = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(VERBS), st.sampled_from(SET)), max_size=6)


def reclaim(targets: list[Target], said: list[str]) -> removal.Outcome:
    """Do what a caller does, with `said` as its journal; called again after a death it recovers."""
    if not said:
        said.append("intent")
        outcome = aside(targets)
        if not outcome.ok:
            return outcome
        said.append("aside")
    if said[-1] == "aside":
        outcome = gone(targets)
    else:
        outcome = back(targets)
    said.append("over")
    return outcome


@settings(max_examples=300, deadline=None)
@given(acts=ACTS, afresh=st.none() | st.integers(0, 60), death=st.none() | st.integers(0, 50))
def test_nothing_but_the_proved_version_is_ever_lost(
    acts: list[tuple[int, str, str]], afresh: int | None, death: int | None
) -> None:
    """Whatever an instrument does at any step, and wherever we die, what it wrote can be read below the root.

    What is told to be gone is gone, and a proved version is gone only after
    all were aside and confirmed. Nothing hidden is left, but in a directory
    that was moved away.
    """
    root = Path(tempfile.mkdtemp(prefix="td", dir="/dev/shm"))
    try:
        targets = make_set(root)
        proved = {(root / path).read_bytes() for path in SET}
        instrument = Instrument(root)
        planned = collections.defaultdict(list)
        for step, verb, path in acts:
            planned[step].append((verb, path))
        if afresh is not None:
            planned[afresh].append(("afresh", SET[0]))
        said: list[str] = []

        def act(_: str, step: int) -> None:
            if step == death:
                raise Killed
            for verb, path in planned.pop(step, ()):
                instrument(verb, path)

        told: set[bytes] = set()
        contents = [(root / path).read_bytes() for path in SET]
        with at_points(act):
            while said[-1:] != ["over"]:
                with contextlib.suppress(Killed):
                    places = reclaim(targets, said).places
                    told |= {content for content, place in zip(contents, places, strict=True) if place == "gone"}
        for step in sorted(planned):  # what comes later comes now
            for verb, path in planned[step]:
                instrument(verb, path)
        instrument("write", "")
        instrument("close", "")
        for path in SET:
            instrument("unswap", path)
        last = back(targets)
        now = set(tree(root).values())

        assert not told & now
        assert instrument.live - proved <= now
        missing = (instrument.live & proved) - now
        assert missing == told or ("aside" in said and death is not None)
        assert missing <= proved and ("aside" in said or not missing)
        assert last.ok and (hidden(root) == [] or afresh is not None)
    finally:
        shutil.rmtree(root)


# ------------------------------------------------------------------------- deaths


@settings(max_examples=200, deadline=None)
@given(deaths=st.lists(st.integers(0, 45), max_size=4), spoilt=st.none() | st.integers(0, 2))
def test_dying_again_and_again_all_are_back_or_all_are_gone(deaths: list[int], spoilt: int | None) -> None:
    """Whatever steps it died at, also while recovering; and nothing hidden is left behind."""
    root = Path(tempfile.mkdtemp(prefix="td", dir="/dev/shm"))
    try:
        targets = make_set(root)
        if spoilt is not None:
            _append(root / SET[spoilt])
        before = tree(root)
        said: list[str] = []
        for death in [*deaths, None, None]:

            def act(_: str, step: int, death: int | None = death) -> None:
                if step == death:
                    raise Killed

            with at_points(act), contextlib.suppress(Killed):
                if said[-1:] != ["over"]:
                    reclaim(targets, said)
        now = tree(root)

        assert said[-1] == "over" and back(targets).ok
        assert now == before or (now == {} and spoilt is None and "aside" in said)
    finally:
        shutil.rmtree(root)


CHILD = """
import json, sys
from trigger_daemon.removal import Target, aside, back, gone

targets = [Target(root, path, tuple(state), hidden) for root, path, state, hidden in json.loads(sys.argv[1])]
journal = open(sys.argv[2], "a", buffering=1)
print("intent", file=journal)
if aside(targets).ok:
    print("aside", file=journal)
    if sys.argv[3] == "new file":
        print("intent", file=journal)
        open(f"{targets[0].root}/{targets[0].path}", "w").write("new")
        back(targets)
    else:
        gone(targets)
"""
STORIES = {
    "all goes": POINTS - {"removal.back", "removal.returned", "removal.keep", "removal.kept"},
    "one is refused": {"removal.open", "removal.look", "removal.sync"},
    "a writer is late": {"removal.open", "removal.look", "removal.rename", "removal.back", "removal.returned"},
    "new file": {"removal.open", "removal.back", "removal.returned", "removal.keep", "removal.kept", "removal.sync"},
}
DEATHS = sorted((story, point, visit) for story, points in STORIES.items() for point in points for visit in (1, 2, 3))


@pytest.mark.parametrize(("story", "point", "visit"), DEATHS)
def test_killed_at_any_step_a_set_is_recovered(root: Path, story: str, point: str, visit: int) -> None:
    """By what the journal says: put back before all were confirmed aside, gone after; a new file stays, too."""
    targets = make_set(root)
    if story == "one is refused":
        (root / SET[1]).chmod(0o600)
    before = tree(root)
    with contextlib.ExitStack() as held:
        if story == "a writer is late":  # one that a new look would see, but the first one did not
            held.enter_context((root / SET[2]).open("r+b"))
        journal = root.parent / "journal"
        wire = json.dumps([(one.root, one.path, one.state, one.hidden) for one in targets])
        child = subprocess.run(
            [sys.executable, "-c", CHILD, wire, str(journal), story],
            env={**os.environ, "TRIGGER_FAIL": f"{point}:kill@{visit}"}, check=False,
        )  # fmt: skip
    assert child.returncode in (-signal.SIGKILL, 0)  # it may come by less often
    last = journal.read_text().split()[-1]
    outcome = gone(targets) if last == "aside" else back(targets)
    now = tree(root)

    assert outcome.ok and hidden(root) == []
    if last == "aside":
        assert now == {}
    else:
        assert set(before.values()) <= set(now.values()) and set(now.values()) - set(before.values()) <= {b"new", b""}


def test_every_fail_point_is_exercised() -> None:
    """A step nobody fails at is a step nobody has thought about."""
    assert {name for name in failpoints.names() if name.startswith("removal.")} == POINTS
