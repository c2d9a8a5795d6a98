"""Laws of looks at what may hang: they end, they keep nobody else waiting, and who asked can end, too."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

if sys.platform != "linux":
    pytest.skip("FUSE and the mount table are Linux", allow_module_level=True)

from fuse_share import Share
from trigger_daemon import cli
from trigger_daemon.cli import program
from trigger_daemon.eyes import AGAIN_S, Eyes, Hangs
from trigger_daemon.mounts import Places

PATIENCE_S = 30.0


@pytest.fixture
def share(shm_path: Path) -> Iterator[Share]:
    point = shm_path / "share"
    point.mkdir()
    try:
        made = Share(point, {"a.tif": 3})
    except OSError as error:
        pytest.skip(f"needs FUSE: {error}")
    yield made
    made.close()


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def eyes(now: list[float]) -> Iterator[Eyes]:
    made = Eyes(lambda: now[0], deadline_s=0.5)
    yield made
    made.close()


def children() -> set[int]:
    told = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in told.split()}


def test_what_is_seen_through_the_child_is_what_is_there(shm_path: Path, share: Share, eyes: Eyes) -> None:
    """To the nanosecond, errors too; and a disk of this machine needs no child."""
    (shm_path / "here").write_bytes(b"12345")
    before = children()
    assert eyes.lstat(f"{shm_path}/here") == os.lstat(shm_path / "here")
    assert children() == before
    far = eyes.lstat(f"{shm_path}/share/a.tif")
    there = os.lstat(shm_path / "share/a.tif")
    assert (far, far.st_mtime_ns, far.st_ctime_ns) == (there, there.st_mtime_ns, there.st_ctime_ns)
    assert len(children() - before) == 1

    with pytest.raises(FileNotFoundError):
        eyes.lstat(f"{shm_path}/share/none.tif")
    with pytest.raises(OSError, match="null"):
        eyes.lstat(f"{shm_path}/share/a\0b")


@pytest.mark.parametrize("of", ["share/a.tif", "share", "link", "link/a.tif"])
def test_a_look_at_what_hangs_ends_and_what_lies_elsewhere_is_seen(
    shm_path: Path, share: Share, eyes: Eyes, now: list[float], wait_until: Callable[..., None], of: str
) -> None:
    """Also by a link; the mount is left alone for a while, without another child, and then it is asked again."""
    (shm_path / "link").symlink_to("share")
    (shm_path / "here").touch()
    look: Callable[[str], object] = eyes.statvfs if of in ("share", "link") else eyes.lstat
    share.mood = "hang"
    with pytest.raises(Hangs, match="does not answer"):
        look(f"{shm_path}/{of}")
    hanging = len(share.held)
    assert hanging
    for _ in range(3):
        with pytest.raises(Hangs):
            look(f"{shm_path}/{of}")
    assert len(share.held) == hanging
    assert eyes.lstat(f"{shm_path}/here").st_size == 0

    now[0] += AGAIN_S
    with pytest.raises(Hangs):  # the child that hangs there cannot be killed: another one would hang beside it
        look(f"{shm_path}/{of}")
    assert len(share.held) == hanging
    share.release()

    def is_asked_again() -> bool:
        now[0] += AGAIN_S
        try:
            look(f"{shm_path}/{of}")
        except OSError as error:  # of statvfs this share knows nothing
            return not isinstance(error, Hangs)
        return True

    wait_until(is_asked_again, PATIENCE_S)


def test_where_a_link_beyond_led_is_remembered_while_nobody_answers(
    shm_path: Path, share: Share, eyes: Eyes
) -> None:
    """Else a root would seem to be another place as soon as its share hangs."""
    share.links["link.tif"] = "/data/a.tif"
    assert Places(eyes.beyond).real(f"{shm_path}/share/link.tif") == "/data/a.tif"
    share.mood = "hang"

    assert Places(eyes.beyond).real(f"{shm_path}/share/link.tif") == "/data/a.tif"
    assert Places(eyes.beyond).real(f"{shm_path}/share/a.tif") == f"{shm_path}/share/a.tif"


def test_a_child_that_was_killed_is_replaced(shm_path: Path, share: Share, eyes: Eyes) -> None:
    """Somebody ended it: one look fails at the most."""
    before = children()
    assert eyes.lstat(f"{shm_path}/share/a.tif").st_size == 3
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    assert eyes.lstat(f"{shm_path}/share/a.tif").st_size == 3


ASK = """
import fcntl, os, sys
from trigger_daemon.eyes import Eyes, Hangs
lock = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
eyes = Eyes(deadline_s=0.5)
try:
    eyes.lstat(sys.argv[1])
except Hangs as error:
    print(error.strerror)
"""


def test_who_has_looked_at_what_hangs_can_end_and_leaves_its_locks(shm_path: Path, share: Share) -> None:
    """A server that has taken the question lets go of nobody who asked: that must not be the daemon, or a command."""
    share.mood = "hang"
    lock = shm_path / "lock"
    done = subprocess.run(
        [sys.executable, "-c", ASK, f"{shm_path}/share/a.tif", str(lock)], capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "its disk does not answer\n"), done.stderr

    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ------------------------------------------------------------------ where paths lead


def test_links_are_followed_up_to_what_may_hang(shm_path: Path, share: Share) -> None:
    """Then the path is as it is written: nobody was asked."""
    (shm_path / "one").symlink_to("two")
    (shm_path / "two").mkdir()
    (shm_path / "two" / "far").symlink_to(shm_path / "share")
    (shm_path / "loop").symlink_to("loop")
    share.mood = "hang"
    places = Places()

    assert places.real(f"{shm_path}/one/../one/x") == f"{shm_path}/two/x"
    assert places.real(f"{shm_path}/one/far/a/../b.tif") == f"{shm_path}/share/b.tif"
    assert places.real(f"{shm_path}/loop/x") == f"{shm_path}/loop/x"
    assert share.held == []
    mount = places.mount(f"{shm_path}/one/far")
    assert mount is not None and mount.fstype == "fuse"
    assert places.below(f"{shm_path}/one", f"{shm_path}/two/a.tif") == "a.tif"
    assert places.below(f"{shm_path}/one", f"{shm_path}/share/a.tif") is None


def test_an_open_file_tells_its_mount_however_it_was_reached(shm_path: Path) -> None:
    """A bind mount or a link in its path changes nothing."""
    (shm_path / "link").symlink_to(shm_path)
    places = Places()
    descriptor = os.open(shm_path / "link", os.O_RDONLY | os.O_DIRECTORY)
    try:
        mount = places.table.of_open(descriptor)
    finally:
        os.close(descriptor)
    device = shm_path.stat().st_dev

    assert mount == places.mount(str(shm_path)) is not None
    assert mount is not None and mount.device == f"{os.major(device)}:{os.minor(device)}"


def test_many_threads_look_at_once(tmp_path: Path) -> None:
    """None of them fails for another's look."""
    eyes, faults = Eyes(), []

    def look() -> None:
        for _ in range(2_000):
            try:
                eyes.lstat(str(tmp_path))
            except Exception as error:  # noqa: BLE001  whatever it is
                faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eyes.close()

    assert faults == []


def _parameters(of: click.Command, name: str = "trigger-daemon") -> Iterator[tuple[str, click.Parameter]]:
    yield from ((f"{name} {param.name}", param) for param in of.params)
    if isinstance(of, click.Group):
        for verb in of.list_commands(click.Context(of)):
            inner = of.get_command(click.Context(of), verb)
            assert inner is not None
            yield from _parameters(inner, f"{name} {verb}")


def test_no_command_looks_at_a_path_while_it_reads_its_words() -> None:
    """click.Path asks the file system of each path, whatever is done with it later: it may lie on a dead share."""
    looks = {name for name, param in _parameters(program) if isinstance(param.type, click.Path)}

    assert {" ".join(name.split()[:3]) for name in looks} == {"trigger-daemon globus flow"}  # definitions, read at once


def test_a_replay_of_what_hangs_ends(
    shm_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What rules watch, and where companions lie, may be a share that does not answer: the command says which."""
    monkeypatch.setattr("trigger_daemon.cli.replay.LOOK_S", 0.3)
    rule = {"name": "r", "watch": f"{shm_path}/share", "match": ["*.tif"], "existing": "process",
            "start": {"copy": {"to": f"{shm_path}/out"}}}  # fmt: skip
    (shm_path / "rules.yaml").write_text(json.dumps({"rules": [rule]}))
    share.mood = "hang"

    for words in ([f"{shm_path}/rules.yaml"], [f"{shm_path}/rules.yaml", f"{shm_path}/share"]):
        assert cli.run(["rules", "replay", *words]) == 1
        told = capsys.readouterr().err
        assert f"{shm_path}/share: its file system has not answered for 0.3 s" in told
        assert "hint: mount its share anew" in told
