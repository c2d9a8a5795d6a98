"""Laws of the window on a file, and of the run of a rule's checks through it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trigger_daemon import probe as probing
from trigger_daemon.checks import Outcome, Window
from trigger_daemon.core.model import State, Verdict
from trigger_daemon.probe import CannotRead, Changed, Companions, Probe, TooMuch, run_checks

Body = Callable[[Window, Mapping[str, Any], Mapping[str, Window]], Any]


class Made:
    """A check made from a function."""

    def __init__(self, body: Body) -> None:
        self.check = body


def says(verdict: Verdict, why: str = "", needs: tuple[str, ...] = ()) -> Body:
    return lambda probe, options, companions: Outcome(verdict, why, needs)


def state_of(path: Path) -> State:
    found = path.lstat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def run(path: Path, *bodies: Body, state: State | None = None, companions: Mapping[str, Path] | None = None) -> Any:
    checks = {f"c{number}": Made(body) for number, body in enumerate(bodies)}
    beside = {name: os.fspath(where) for name, where in (companions or {}).items()}
    asked = [(name, {}) for name in checks]
    return run_checks(str(path), state or state_of(path), asked, beside, checks.__getitem__)[:3]


def descriptors(path: Path) -> list[str]:
    """Names in /proc/self/fd that stand for `path`."""
    held = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == str(path):
                held.append(fd)
        except OSError:
            continue
    return held


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.mrc"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_a_window_reads_what_is_asked_for(file: Path) -> None:
    """Any part, cut at the end of the file; beyond it there is nothing."""
    with Probe(file) as probe:
        assert (probe.name, probe.size) == ("m.mrc", 10_240)
        assert probe.read(256, 3) == b"\0\1\2"
        assert probe.read(10_238, 2**62) == b"\xfe\xff"
        assert probe.read(2**70, 1) == b""
        assert probe.bytes_read == 5


def test_a_window_is_opened_so_that_it_disturbs_nobody(file: Path) -> None:
    """Read only, no link followed, no waiting, not inherited; the time of access stays, and a writer can lock."""
    os.utime(file, ns=(1, 2))
    with Probe(file) as probe:
        probe.read(0, 100)
        (fd,) = descriptors(file)
        flags = fcntl.fcntl(int(fd), fcntl.F_GETFL)
        with open(file, "r+b") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)

        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert flags & os.O_NOFOLLOW
        assert flags & os.O_NONBLOCK
        assert not os.get_inheritable(int(fd))

    assert file.stat().st_atime_ns == 1


def test_a_closed_window_holds_nothing_and_opens_again(file: Path) -> None:
    """A descriptor lives as long as somebody reads; the window longer."""
    probe = Probe(file)
    probe.close()
    assert descriptors(file) == []

    assert probe.read(0, 2) == b"\0\1"
    assert len(descriptors(file)) == 1
    probe.close()


def test_a_window_that_opens_again_sees_the_same_state_or_nothing(file: Path) -> None:
    """Bytes of two states are never mixed."""
    probe = Probe(file)
    probe.close()
    file.write_bytes(b"other")

    with pytest.raises(Changed, match="from 10,240 to 5 bytes"):
        probe.read(0, 2)
    assert descriptors(file) == []


@pytest.mark.parametrize("kind", ["pipe", "link", "directory", "long"])
def test_only_regular_files_are_opened(
    tmp_path: Path, file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is even tried: opening a pipe would let its writer run on."""
    tried: list[object] = []
    path = tmp_path / ("odd" if kind != "long" else "x" * 300)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(file)
        case "directory":
            path.mkdir()
    monkeypatch.setattr(os, "open", lambda *args: tried.append(args))

    with pytest.raises(CannotRead):
        Probe(path)
    assert tried == []


def test_a_file_that_is_gone_has_changed(tmp_path: Path) -> None:
    """It is no fault of access: there is nothing to judge any more."""
    with pytest.raises(Changed, match="is gone"):
        Probe(tmp_path / "none")


def test_a_window_ends_at_its_budget(file: Path) -> None:
    """Neither more bytes nor more reads than allowed, before anything is read."""
    with Probe(file, bytes_max=100) as probe:
        probe.read(0, 100)
        with pytest.raises(TooMuch, match="100 bytes"):
            probe.read(0, 1)
    with Probe(file, reads_max=2) as probe:
        probe.read(0, 1)
        probe.read(0, 1)
        with pytest.raises(TooMuch, match="2 reads"):
            probe.read(0, 1)


def test_a_window_stays_as_long_as_it_was(file: Path) -> None:
    """What a writer appends meanwhile belongs to another state."""
    with Probe(file) as probe:
        with open(file, "ab") as writer:
            writer.write(b"more")

        assert probe.size == 10_240
        assert probe.read(10_239, 100) == b"\xff"
        assert probe.state()[0] == 10_244
        with pytest.raises(Changed):
            probe.recheck()


def test_the_worst_verdict_of_a_set_is_the_sets(file: Path) -> None:
    """incomplete before suspect before unknown before complete; the whys are those of the worst."""
    good, unsure = says(Verdict.COMPLETE, "good"), says(Verdict.UNKNOWN, "unsure")
    odd, short = says(Verdict.SUSPECT, "odd"), says(Verdict.INCOMPLETE, "short")

    assert run(file, good) == (Verdict.COMPLETE, "good", ())
    assert run(file, good, unsure, good) == (Verdict.UNKNOWN, "unsure", ())
    assert run(file, unsure, odd, good) == (Verdict.SUSPECT, "odd", ())
    assert run(file, good, odd, short, unsure) == (Verdict.INCOMPLETE, "short", ())
    assert run(file) == (Verdict.UNKNOWN, "no check is asked for", ())


def test_proof_ends_the_run(file: Path) -> None:
    """What is surely incomplete is not read on."""
    asked: list[int] = []
    run(file, says(Verdict.INCOMPLETE), lambda probe, *_: asked.append(1))

    assert asked == []


def test_needs_of_all_checks_are_gathered(file: Path) -> None:
    """Each name once, in the order asked for."""
    one, two = says(Verdict.COMPLETE, "", ("b", "a")), says(Verdict.COMPLETE, "", ("a", "sub/c"))

    assert run(file, one, two)[2] == ("b", "a", "sub/c")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "", "a\0b"])
def test_needs_stay_below_the_files_directory(file: Path, name: str) -> None:
    """A name that leads elsewhere comes from a damaged file."""
    verdict, why, needs = run(file, says(Verdict.COMPLETE, "", (name,)))

    assert (verdict, needs) == (Verdict.SUSPECT, ())
    assert "needs" in why


def fails(probe: Window, *_: Any) -> Outcome:
    raise ZeroDivisionError("by nought")


def reads_on(probe: Window, *_: Any) -> Outcome:
    while True:
        probe.read(0, 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (fails, "check c0 failed: ZeroDivisionError: by nought"),
        (reads_on, "check c0 gave up: more than 20,480 reads of m.mrc"),
        (lambda *_: None, "check c0 failed: AttributeError"),
        (lambda probe, *_: probe.read(-1, 1), "check c0 failed: ValueError"),
    ],
)
def test_a_check_that_fails_never_passes_a_file(file: Path, body: Body, words: str) -> None:
    """It is suspect (unread, where its budget ended: unknown), why names check and error, worse verdicts stand."""
    verdict, why, _ = run(file, body, says(Verdict.COMPLETE, "good"))

    assert verdict is (Verdict.UNKNOWN if "gave up" in words else Verdict.SUSPECT)
    assert why.startswith(words)
    assert run(file, body, says(Verdict.INCOMPLETE, "short"))[:2] == (Verdict.INCOMPLETE, "short")


def test_an_unknown_check_never_passes_a_file(file: Path) -> None:
    """A rule may outlive the plug-in it names."""
    nothing: dict[str, Any] = {}
    verdict, why, *_ = run_checks(str(file), state_of(file), (("gone", {}),), {}, nothing.__getitem__)

    assert (verdict, why) == (Verdict.SUSPECT, "check gone failed: KeyError: 'gone'")


@pytest.mark.parametrize("field", range(4))
def test_only_the_expected_state_is_judged(file: Path, field: int) -> None:
    """Size, both times and the inode must be those of the look that asked."""
    state = list(state_of(file))
    state[field] += 1

    with pytest.raises(Changed):
        run(file, says(Verdict.COMPLETE), state=(state[0], state[1], state[2], state[3]))


def test_an_inode_of_zero_is_not_compared(file: Path) -> None:
    """Some file systems invent them."""
    size, mtime_ns, ctime_ns, _ = state_of(file)

    assert run(file, says(Verdict.COMPLETE), state=(size, mtime_ns, ctime_ns, 0))[0] is Verdict.COMPLETE


def append(path: Path) -> None:
    with open(path, "ab") as writer:
        writer.write(b"x")


def overwrite(path: Path) -> None:
    with open(path, "r+b") as writer:
        writer.write(b"x")
    os.utime(path, ns=(0, 1))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [append, overwrite, replace, os.unlink, lambda path: os.truncate(path, 7)])
@pytest.mark.parametrize("which", ["file", "companion"])
def test_a_change_during_the_checks_voids_the_verdict(
    tmp_path: Path, file: Path, change: Callable[[Path], None], which: str
) -> None:
    """Also of a companion that was read, and also when the file was replaced by one of the same size and time."""
    beside = tmp_path / "m.xml"
    beside.write_bytes(b"<a/>")

    def body(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
        companions["m.xml"].read(0, 4)
        change(file if which == "file" else beside)
        return Outcome(Verdict.COMPLETE, "")

    with pytest.raises(Changed):
        run(file, body, companions={"m.xml": beside})
    assert descriptors(file) == descriptors(beside) == []


def test_no_descriptor_is_held_between_checks(file: Path) -> None:
    """Each check leaves the file as nobody's; so does the run."""
    held: list[int] = []

    def body(probe: Window, *_: Any) -> Outcome:
        held.append(len(descriptors(file)))
        probe.read(0, 1)
        held.append(len(descriptors(file)))
        return Outcome(Verdict.COMPLETE, "")

    run(file, body, body)

    assert held == [1, 1, 0, 1]
    assert descriptors(file) == []


def test_companions_are_opened_when_asked_for_and_few_at_once(tmp_path: Path) -> None:
    """A set of hundreds of files does not use up the process's descriptors."""
    paths = {f"d{number}": str(tmp_path / f"d{number}") for number in range(100)}
    for path in paths.values():
        Path(path).write_bytes(b"data")
    companions = Companions(paths)
    known = set(paths.values())

    def held() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link) in known for link in links if os.path.islink(link))

    assert len(companions) == 100
    assert "d1" in companions
    assert "e1" not in companions
    assert held() == 0
    assert companions.get("e1") is None
    for name in companions:
        assert companions[name].read(0, 4) == b"data"
        assert held() <= probing.OPEN_MAX
    assert companions["d0"].read(1, 2) == b"at"
    companions.close()
    assert held() == 0


def test_a_file_that_cannot_be_read_has_no_verdict(tmp_path: Path, file: Path) -> None:
    """Not yet is neither unknown nor incomplete: the caller looks again later."""
    link = tmp_path / "l"
    link.symlink_to(file)

    with pytest.raises(CannotRead, match="no regular file"):
        run(file, lambda probe, options, companions: companions["l"], companions={"l": link})


def test_a_name_that_is_no_utf8_can_be_judged(tmp_path: Path) -> None:
    """Paths come as strings with surrogate escapes, or as bytes."""
    raw = os.fsencode(tmp_path) + b"/\xff.mrc"
    with open(raw, "wb") as writer:
        writer.write(b"x")

    with Probe(raw) as one, Probe(os.fsdecode(raw)) as other:
        assert one.name == other.name == "\udcff.mrc"


@pytest.mark.parametrize(("written", "holes"), [(slice(0, 40_960), False), (slice(0, 8_192), True)])
def test_a_file_whose_length_was_set_first_has_holes(shm_path: Path, written: slice, holes: bool) -> None:
    """On a file system where every written byte has its block; small files are not judged."""
    path = shm_path / "m.mrc"
    with path.open("wb") as file:
        file.truncate(40_960)
        file.write(bytes(40_960)[written])
    with Probe(path) as probe:
        assert probe.holes() is holes
    os.truncate(path, 0)
    os.truncate(path, 12_000)
    with Probe(path) as probe:
        assert probe.holes() is False
