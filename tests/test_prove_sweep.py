"""Killed, or without power, before any call by which it changes a disk, the daemon keeps its promises.

A quick look; `make prove` sweeps over all calls. The tracer, the disks and the
oracle prove themselves: what is broken on purpose does not pass.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prove import disks, sweep
from tests.prove.tracer import SUPPORTED, UNSUPPORTED, Answer, Call, Tracer, command

pytestmark = pytest.mark.skipif(not SUPPORTED, reason=UNSUPPORTED)

BUSY = """
import os, subprocess, sys, threading
os.chdir(sys.argv[1])
def work(n):
    with open(f"thread{n}", "w") as file:
        file.write("x")
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"thread{n}", f"done{n}")
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
subprocess.run([sys.executable, "-I", "-S", "-c", "import os; os.mkdir('child'); open('/dev/null', 'w').write('no')"])
if os.fork() == 0:
    os.unlink("done0", dir_fd=os.open(".", os.O_RDONLY))
    os._exit(0)
os.wait()
open("done1").read()
os.execv("/bin/sh", ["sh", "-c", "echo last > shell"])
"""


def run_traced(directory: Path, code: str, ask: Callable[[Call], Answer]) -> Tracer:
    tracer = Tracer(command([sys.executable, "-I", "-c", code, str(directory)]), [directory], ask)
    tracer.wait(30)
    return tracer


def test_each_call_of_threads_children_and_what_they_become_is_announced(tmp_path: Path) -> None:
    """Whoever changes something below the directory is stopped before it does; whoever looks only is not."""
    calls: list[tuple[str, str]] = []

    def ask(call: Call) -> Answer:
        calls.append((call.name, call.path.replace(str(tmp_path), "")))
        return Answer.GO

    tracer = run_traced(tmp_path, BUSY, ask)

    expected = Counter([("mkdir", "/child"), ("unlinkat", "/done0"), ("openat", "/shell"), ("write", "/shell")])
    for n in range(4):
        for name in ("openat", "write", "fsync"):
            expected[(name, f"/thread{n}")] += 1
        expected[("rename", f"/thread{n} -> /done{n}")] += 1
    assert tracer.status == 0
    assert Counter(calls) == expected


@pytest.mark.parametrize("k", [1, 7, 16])
def test_a_kill_leaves_the_call_undone_and_nobody_alive(tmp_path: Path, k: int) -> None:
    """Before the k-th call all processes are killed: k - 1 calls were done, and the k-th was not."""
    calls: list[Call] = []

    def ask(call: Call) -> Answer:
        calls.append(call)
        return Answer.KILL if call.number == k else Answer.GO

    tracer = run_traced(tmp_path, BUSY, ask)

    last = calls[-1]
    assert tracer.status == -signal.SIGKILL
    assert len(calls) == k
    if last.name == "openat":
        assert not Path(last.path).exists()
    if last.name == "rename":
        assert Path(last.path.split(" -> ")[0]).exists()


def test_a_call_can_be_passed_over_as_if_it_were_done(tmp_path: Path) -> None:
    """The caller is told of success, and nothing happened: a disk that lies."""
    code = "import os, sys; os.mkdir(sys.argv[1] + '/a'); os.mkdir(sys.argv[1] + '/b')"
    tracer = run_traced(tmp_path, code, lambda call: Answer.PRETEND if call.path.endswith("/a") else Answer.GO)

    assert tracer.status == 0
    assert os.listdir(tmp_path) == ["b"]


def test_a_plan_names_every_kind_of_call_and_all_that_are_no_plain_writes() -> None:
    """A place of each kind comes first; nothing but writes amid equal ones is passed over, and that is counted."""
    round_ = [("pwrite64", "wal")] * 20 + [("fdatasync", "wal")]
    calls = [("openat", "wal"), *round_, *round_, ("rename", "a -> b"), ("pwrite64", "journal.db-shm")]

    places, passed = sweep.plan(calls, seed=1)

    kinds = set(calls)
    assert {(place.name, place.file) for place in places[: len(kinds)]} == kinds
    assert sum(place.name == "fdatasync" for place in places) == 2
    ends = {("pwrite64", "wal", n) for n in (1, 20, 21, 40)}
    assert ends <= set(places)
    assert len(places) + passed.total() == len(calls)
    assert passed.keys() == {("pwrite64", "wal")}


@pytest.mark.serial
def test_killed_anywhere_it_keeps_its_promises(shm_path: Path) -> None:
    """All of it, or the process that makes the call: at telling calls."""
    told: list[str] = []
    result = sweep.run(quick=True, seed=1, work=shm_path, tell=told.append, budgets={"tmpfs": sweep.QUICK_S})

    assert not result.violations, result.violations
    assert not result.not_done, result.not_done
    assert int(result.figures["kills"]) >= len(sweep.QUICK["tmpfs"])


def need(kind: str) -> None:
    reason = disks.missing(kind)
    if reason:
        pytest.skip(reason)


@pytest.mark.serial
def test_without_power_it_keeps_its_promises(shm_path: Path) -> None:
    """What was not durable is gone, and nothing that was told depends on it."""
    need("ext4")
    told: list[str] = []
    result = sweep.run(quick=True, seed=1, work=shm_path, tell=told.append, budgets={"ext4": sweep.QUICK_S})

    assert not result.violations, result.violations
    assert not result.not_done, result.not_done
    assert int(result.figures["power cuts on ext4"]) >= len(sweep.QUICK["ext4"])


@pytest.mark.serial
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_broken_daemon_is_noticed(shm_path: Path, kind: str) -> None:
    """A disk that does not sync, a copy or a journal that does not wait for it, a program started twice: each shows."""
    if kind != "tmpfs":
        need(kind)
    found, broken = sweep.sweep_mutants(kind, shm_path)

    assert found
    assert not broken, broken
    for name, violations in found.items():
        assert violations, f"nobody noticed {name}"
        laws = {words.partition(" ")[0] for words in violations}
        assert laws & {"twice", "verified", "partial"}, violations


LOSES = """
import os, sys
from pathlib import Path
from tests.prove import disks
disks.private_mounts()
disk = disks.Disk(sys.argv[1], Path(sys.argv[2]))
def write(name, sync):
    fd = os.open(disk.path / name, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x" * 10_000)
    if sync: os.fsync(fd)
    os.close(fd)
write("durable", True)
write("not", False)
disk.cut()
disk.again()
print(*sorted(name for name in os.listdir(disk.path) if os.path.getsize(disk.path / name) == 10_000), flush=True)
if sys.argv[3] == "hang":
    sys.stdin.read()
disk.close()
"""


def loses(kind: str, work: Path, then: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.append({sweep._ROOT!r})\n{LOSES}"
    argv = [sys.executable, "-P", "-c", code, kind, str(work), then]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.serial
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_cut_takes_what_was_not_durable(shm_path: Path, kind: str) -> None:
    """After the power came back there is what was synced, and nothing else."""
    need(kind)
    with loses(kind, shm_path, "end") as process:
        said, _ = process.communicate(timeout=30)

    assert (process.returncode, said.split()) == (0, ["durable"])


@pytest.mark.serial
def test_a_killed_harness_leaves_nothing_behind(shm_path: Path) -> None:
    """No mount, no loop device, no image: they go with the process."""
    need("ext4")
    before = loops()
    with loses("ext4", shm_path, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["durable"]
        assert loops() - before
        process.kill()

    end = time.monotonic() + 10  # the kernel lets go of the device a moment later
    while loops() - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not loops() - before
    assert str(shm_path) not in Path("/proc/mounts").read_text()
    assert list(shm_path.rglob("*")) == [shm_path / "ext4"]


def loops() -> set[str]:
    """Return the loop devices in use."""
    return {path.parts[3] for path in Path("/sys/block").glob("loop*/loop/backing_file")}
