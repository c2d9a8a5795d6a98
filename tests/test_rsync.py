"""Laws of `rsync`: over ssh, to a daemon and to a local directory, with real servers on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance import PATIENCE_S, poll_to_end
from far import FARS, Far, RsyncDaemon, Sshd, below
from tests.site import Site
from trigger_daemon.actions import Context, Differs, File, Progress, Proof, Refused, Request, Unproven
from trigger_daemon.actions._child import STOP_MAX_S, Child, listed
from trigger_daemon.actions._copy_pace import READING, Cancelled, Pace, Tills
from trigger_daemon.actions._rsync_job import PARTIAL
from trigger_daemon.actions._rsync_target import TIMEOUT_MIN_S, environment
from trigger_daemon.actions.rsync import Action
from trigger_daemon.config import parse_rules

Wait = Callable[..., None]
MB = 10**6
ODD = ("s1/a [1] é.tif", "s1/deep/er/b.tif", os.fsdecode(b"s1/\xff\n\\#012.mrc"), "-c.mrc", "#d;|e'\"$(f)`g`.mrc")


class Lab:
    """One provider over a source and a far side."""

    def __init__(self, base: Path, far: Far, directory: str = "") -> None:
        self.base, self.far = base, far
        self.source = base / "source"
        self.source.mkdir()
        (base / "state").mkdir()
        self.dest = far.there / directory
        self.dest.mkdir(exist_ok=True)
        self.directory = directory
        self.limit: float | None = None
        self.paused = False
        self.reserve = 0
        self.lives: list[Action] = []
        self.action = self.live()

    def live(self) -> Action:
        """Another life of the daemon."""
        context = Context(
            state_dir=str(self.base / "state"), nudge=lambda run, attempt: None, bandwidth=lambda: self.limit,
            paused=lambda: self.paused, settings={"rerun_s": 0.2}, reserve=lambda path: self.reserve,
        )  # fmt: skip
        self.action = Action(context)
        self.lives.append(self.action)
        return self.action

    def write(self, path: str, content: bytes, mtime_ns: int | None = None) -> File:
        there = self.source / path
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(content)
        if mtime_ns is not None:
            os.utime(there, ns=(mtime_ns, mtime_ns))
        stat = there.stat()
        return File(str(self.source), path, stat.st_size, stat.st_mtime_ns)

    def request(self, *files: File, run: int = 1, attempt: int = 1, **options: Any) -> Request:
        defaults = {name: option.default for name, option in Action.OPTIONS.items()}
        told = {**defaults, **self.far.options(self.directory), **options}
        return Request(run, attempt, "rule", {}, {}, files, told, None, {"to": told["to"]})

    def run(self, request: Request) -> Progress:
        self.action.check(request.options)
        return poll_to_end(self.action, request, self.action.start(request, None))

    def delivered(self) -> dict[str, bytes]:
        """What stands under final names."""
        found = {}
        for where, directories, names in os.walk(os.fsencode(self.dest)):
            directories[:] = [name for name in directories if not name.startswith(b".")]
            for name in names:
                path = os.path.join(where, name)
                if not name.startswith(b"."):
                    found[os.path.relpath(os.fsdecode(path), self.dest)] = Path(os.fsdecode(path)).read_bytes()
        return found

    def rsyncs(self) -> list[int]:
        """The rsyncs that the workers have started, and what those have started."""
        return [pid for pid in below(os.getpid()) if _name(pid) in ("rsync", "ssh") and pid not in self._far_pids()]

    def _far_pids(self) -> list[int]:
        process = self.far._process
        return [] if process is None else [process.pid, *below(process.pid)]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@pytest.fixture(params=sorted(FARS))
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, FARS[request.param](tmp_path / "far"))


@pytest.fixture(params=["daemon", "ssh"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, FARS[request.param](tmp_path / "far"))


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, Sshd(tmp_path / "far"))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, RsyncDaemon(tmp_path / "far"))


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, FARS["local"](tmp_path / "far"))


def _lab(base: Path, far: Far) -> Iterator[Lab]:
    with far:
        made = Lab(base, far, "an [archive] é")
        yield made
        for action in made.lives:
            action.close()


# ---------------------------------------------------------------------- the way that goes well


def test_every_name_arrives_and_is_proved(lab: Lab) -> None:
    """Names of any bytes into a directory of any name: whole, with their times, and a record of each."""
    files = tuple(lab.write(path, path.encode("utf-8", "surrogateescape") * 99) for path in ODD)
    request = lab.request(*files)
    progress = lab.run(request)
    proof = lab.action.verify(request, {})

    assert progress.status == "succeeded", progress.why
    assert (progress.files_done, progress.bytes_done) == (len(files), sum(file.size for file in files))
    assert lab.delivered() == {file.path: (lab.source / file.path).read_bytes() for file in files}
    assert {(lab.dest / file.path).stat().st_mtime_ns for file in files} == {file.mtime_ns for file in files}
    assert isinstance(proof, Proof), proof
    assert {member["path"] for member in proof.members} == set(ODD)
    assert len({member["to"] for member in proof.members}) == len(files)
    assert {member["to"] for member in proof.members} == {to for to, _ in lab.action.targets(request)}


def test_the_digest_is_the_contents(local: Lab) -> None:
    """Written as other tools write it, so that a list of digests can be compared with it."""
    import hashlib

    import xxhash

    file = local.write("a.mrc", os.urandom(300_000))
    content = (local.source / "a.mrc").read_bytes()
    told = {}
    for run, digest in enumerate(("xxh3", "md5", "sha1"), 1):
        request = local.request(file, run=run, digest=digest)
        local.run(request)
        proof = local.action.verify(request, {})
        assert isinstance(proof, Proof)
        told[digest] = proof.members[0]["digest"]

    assert told == {
        "xxh3": f"xxh3:{xxhash.xxh3_128_hexdigest(content)}",
        "md5": f"md5:{hashlib.md5(content).hexdigest()}",
        "sha1": f"sha1:{hashlib.sha1(content).hexdigest()}",
    }


def test_companions_of_another_root_come_along(remote: Lab) -> None:
    """One rsync takes files of several roots, each under its path below its own."""
    file = remote.write("s1/a.mrc", b"frames")
    other = remote.base / "other"
    (other / "s1").mkdir(parents=True)
    (other / "s1" / "a.xml").write_bytes(b"<x/>")
    stat = (other / "s1" / "a.xml").stat()
    request = remote.request(file, File(str(other), "s1/a.xml", stat.st_size, stat.st_mtime_ns, "companion"))
    progress = remote.run(request)

    assert progress.status == "succeeded", progress.why
    assert remote.delivered() == {"s1/a.mrc": b"frames", "s1/a.xml": b"<x/>"}


def test_what_a_template_names_is_made_and_nothing_above(remote: Lab) -> None:
    """A directory of the batch is created; the part before the template is waited for, as a mount that is away."""
    file = remote.write("a.mrc", b"frames")
    made, away = remote.far.to(f"{remote.directory}/visit [7]/run 1"), remote.far.to("unmounted/visit [7]")
    written, elsewhere = remote.far.to(f"{remote.directory}/{{visit}}/{{run}}"), remote.far.to("unmounted/{visit}")
    there = remote.run(replace(remote.request(file, to=made), written={"to": written}))
    lost = remote.run(replace(remote.request(file, run=2, to=away), written={"to": elsewhere}))

    assert there.status == "succeeded", there.why
    assert remote.delivered() == {"visit [7]/run 1/a.mrc": b"frames"}
    assert lost.status == "failed" and lost.fault is not None
    assert (lost.fault.kind, lost.fault.scope, lost.fault.counts) == ("transient", "destination", False)
    assert "is not there" in lost.why
    assert not (remote.far.there / "unmounted").exists()


# ---------------------------------------------------------------------- proof


@pytest.mark.parametrize("how", ["one byte", "shorter", "removed"])
def test_a_copy_that_was_altered_is_not_proved(remote: Lab, how: str) -> None:
    """Also one of the old size and time: contents are compared."""
    files = remote.write("a.mrc", b"x" * 100_000), remote.write("b.mrc", b"y")
    request = remote.request(*files)
    remote.run(request)
    copy = remote.dest / "a.mrc"
    if how == "removed":
        copy.unlink()
    else:
        stat = copy.stat()
        copy.write_bytes(b"x" * 99_999 + (b"" if how == "shorter" else b"z"))
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    said = remote.action.verify(request, {})

    assert isinstance(said, Differs)
    assert set(said.which) == {"a.mrc"}
    assert "a.mrc" in said.which["a.mrc"]


def test_a_source_that_was_rewritten_behind_its_time_is_not_proved(remote: Lab) -> None:
    """Of the manifest's size and time, but other bytes: the copy differs from it."""
    file = remote.write("a.mrc", b"old bytes")
    request = remote.request(file)
    remote.run(request)
    remote.write("a.mrc", b"new bytes", file.mtime_ns)

    assert isinstance(remote.action.verify(request, {}), Differs)


def test_one_member_is_proved_alone(remote: Lab) -> None:
    """As reclaim asks: a request of some of the files reads only those."""
    files = remote.write("a.mrc", b"frames"), remote.write("b.mrc", b"y")
    request = remote.request(*files)
    remote.run(request)
    (remote.dest / "b.mrc").unlink()
    said = remote.action.verify(replace(request, files=files[:1]), {})

    assert Action.PROVES_PARTS
    assert isinstance(said, Proof)
    assert [member["path"] for member in said.members] == ["a.mrc"]


@pytest.mark.parametrize("files", [1, 2])
def test_a_directory_that_is_away_leaves_it_unproven(lab: Lab, files: int) -> None:
    """Its disk may not be mounted: that is no copy that differs. Rsync tells it otherwise of one file than of two."""
    request = lab.request(*(lab.write(f"{number}.mrc", b"frames") for number in range(files)))
    lab.run(request)
    lab.dest.rename(lab.base / "elsewhere")
    said = lab.action.verify(request, {})

    assert isinstance(said, Unproven)
    assert (said.fault.kind, said.fault.scope, said.fault.counts) == ("transient", "destination", False)
    assert "is not there" in said.fault.why


def test_a_far_side_that_is_away_leaves_it_unproven(remote: Lab) -> None:
    """Neither proved nor different: later."""
    request = remote.request(remote.write("a.mrc", b"frames"))
    remote.run(request)
    remote.far.kill()
    said = remote.action.verify(request, {})

    assert isinstance(said, Unproven)
    assert (said.fault.kind, said.fault.counts) == ("transient", False)


# ---------------------------------------------------------------------- what stands there already


def test_a_strangers_file_is_held_and_stays(lab: Lab) -> None:
    """The others are delivered; nothing of it is replaced, whatever its size and time are."""
    files = lab.write("a.mrc", b"ours"), lab.write("b.mrc", b"frames"), lab.write("c.mrc", b"same")
    (lab.dest / "a.mrc").write_bytes(b"ties")
    os.utime(lab.dest / "a.mrc", ns=(0, files[0].mtime_ns))
    (lab.dest / "c.mrc").write_bytes(b"same")
    progress = lab.run(lab.request(*files))

    assert progress.status == "failed" and progress.fault is not None
    assert progress.fault.kind == "person"
    assert "a.mrc" in progress.why and "if_exists" in progress.fault.hint
    assert lab.delivered() == {"a.mrc": b"ties", "b.mrc": b"frames", "c.mrc": b"same"}


def test_equal_content_is_proof(lab: Lab) -> None:
    """Whoever has put it there, and when."""
    file = lab.write("a.mrc", b"frames")
    (lab.dest / "a.mrc").write_bytes(b"frames")
    os.utime(lab.dest / "a.mrc", (1, 1))
    request = lab.request(file)
    progress = lab.run(request)

    assert progress.status == "succeeded", progress.why
    assert isinstance(lab.action.verify(request, {}), Proof)
    assert (lab.dest / "a.mrc").stat().st_mtime == 1


def test_an_earlier_version_of_ours_is_replaced(lab: Lab) -> None:
    """Also after a restart; but not if somebody has changed it since."""
    old = lab.write("a.mrc", b"old"), lab.write("b.mrc", b"old")
    assert lab.run(lab.request(*old)).status == "succeeded"
    lab.action.close()
    lab.live()
    (lab.dest / "b.mrc").write_bytes(b"somebody's")
    new = lab.write("a.mrc", b"newer"), lab.write("b.mrc", b"newer")
    progress = lab.run(lab.request(*new, run=2))

    assert progress.status == "failed"
    assert "b.mrc" in progress.why
    assert lab.delivered() == {"a.mrc": b"newer", "b.mrc": b"somebody's"}


def test_if_exists_replace_replaces(lab: Lab) -> None:
    """Also one of the same size and time."""
    files = lab.write("a.mrc", b"ours"), lab.write("b.mrc", b"frames")
    (lab.dest / "a.mrc").write_bytes(b"ties")
    os.utime(lab.dest / "a.mrc", ns=(0, files[0].mtime_ns))
    (lab.dest / "b.mrc").write_bytes(b"longer than ours")
    request = lab.request(*files, if_exists="replace")
    progress = lab.run(request)

    assert progress.status == "succeeded", progress.why
    assert lab.delivered() == {"a.mrc": b"ours", "b.mrc": b"frames"}
    assert isinstance(lab.action.verify(request, {}), Proof)


# ---------------------------------------------------------------------- killed


def slowly(lab: Lab, request: Request, wait_until: Wait) -> Any:
    """Begin so slowly that it is under way for seconds; return when bytes move."""
    lab.limit = 1.0 * MB
    handle = lab.action.start(request, None)
    wait_until(lambda: lab.action.poll(request, handle).bytes_done > 0 and bool(partial(lab)), PATIENCE_S)
    return handle


def partial(lab: Lab) -> list[Path]:
    """What lies at the destination and is not under its final name."""
    hidden = (path for path in lab.dest.rglob(".*") if path.is_file())
    return [*hidden, *lab.dest.rglob(f"{PARTIAL}/*")]


def test_a_server_that_is_killed_and_comes_back(remote: Lab, wait_until: Wait) -> None:
    """It is the destination that is down, which burns no attempt; the next one delivers and is proved."""
    files = remote.write("a.mrc", os.urandom(6 * MB)), remote.write("b.mrc", b"y")
    request = remote.request(*files)
    handle = slowly(remote, request, wait_until)
    remote.far.kill()
    progress = poll_to_end(remote.action, request, handle)
    between = remote.delivered()
    down = remote.run(remote.request(*files, attempt=2))
    remote.far.start()
    remote.limit = None
    again = remote.request(*files, attempt=3)
    later = remote.run(again)

    for failed in (progress, down):
        assert failed.status == "failed" and failed.fault is not None
        assert (failed.fault.kind, failed.fault.scope, failed.fault.counts) == ("transient", "destination", False)
        assert failed.fault.hint
    assert between == {}
    assert later.status == "succeeded", later.why
    assert isinstance(remote.action.verify(again, {}), Proof)


@pytest.mark.parametrize("paused", [False, True])
def test_a_killed_worker_takes_its_rsync_along(lab: Lab, wait_until: Wait, paused: bool) -> None:
    """Nothing goes on behind the next attempt's back, nothing stays stopped for ever; that one delivers."""
    file = lab.write("a.mrc", os.urandom(6 * MB))
    request = lab.request(file)
    handle = slowly(lab, request, wait_until)
    group = lab.rsyncs()
    lab.paused = paused
    if paused:
        wait_until(lambda: all(_state(pid) == "T" for pid in group if _name(pid) == "rsync"))
    (worker,) = lab.action._attempts.pids()
    os.kill(worker, signal.SIGKILL)
    progress = poll_to_end(lab.action, request, handle)
    wait_until(lambda: all(_state(pid) in "ZX" for pid in group))
    between = lab.delivered()
    lab.limit, lab.paused = None, False
    later = lab.run(lab.request(file, attempt=2))

    assert progress.status == "failed" and progress.fault is not None
    assert progress.fault.kind == "transient"
    assert between == {}
    assert later.status == "succeeded", later.why
    assert group and all(_state(pid) in "ZX" for pid in group)
    assert lab.delivered() == {"a.mrc": (lab.source / "a.mrc").read_bytes()}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_a_daemon_that_ended_stands_still_for_ever(
    local: Lab, wait_until: Wait, how: signal.Signals
) -> None:
    """Stopped for good or killed while its rsync stands still: no process of it is left, and no daemon comes back."""
    site = Site(local.base / "site")
    start = {"rsync": {"to": str(local.dest), "bandwidth": "1MB/s"}}
    site.write_rules(site.rule(start=start))
    with daemon_of(site) as process:
        (site.data / "a.mrc").write_bytes(os.urandom(9 * MB))
        site.until(lambda: bool(partial(local)), PATIENCE_S, "it transfers")
        site.cli("pause")
        left = below(process.pid)
        rsyncs = [pid for pid in left if _name(pid) == "rsync"]
        site.until(lambda: [_state(pid) for pid in rsyncs] == ["T"] * 3, PATIENCE_S, "all of it stands still")
        process.send_signal(how)
        process.wait(PATIENCE_S)
        wait_until(lambda: all(_state(pid) in "ZX" for pid in left), 5.0)

    assert local.delivered() == {}


@contextlib.contextmanager
def daemon_of(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    site.start()
    assert site.process is not None
    try:
        yield site.process
    finally:
        if site.process.poll() is None:
            site.kill()


def test_two_of_one_run_never_work_at_once(local: Lab, wait_until: Wait) -> None:
    """Whoever holds the lock of a run's rsyncs, the next attempt ends it, or waits; it begins none beside it."""
    file = local.write("a.mrc", b"frames")
    lock = os.open(local.base / "state" / "run-1.rsync", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # a process of an earlier life, which hangs in a call
    request = local.request(file)
    handle = local.action.start(request, None)
    wait_until(lambda: "an rsync of an earlier attempt" in local.action._attempts.doing(request))
    begun, status = local.rsyncs(), local.action.poll(request, handle).status
    os.close(lock)
    progress = poll_to_end(local.action, request, handle)

    assert (begun, status) == ([], "active")
    assert progress.status == "succeeded", progress.why


def test_every_process_of_an_rsync_holds_its_lock(local: Lab, wait_until: Wait) -> None:
    """The sender's children, too: they write."""
    slowly(local, local.request(local.write("a.mrc", os.urandom(6 * MB))), wait_until)
    lock = (local.base / "state" / "run-1.rsync").stat()
    open_files = {pid: [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")] for pid in local.rsyncs()}
    held = {pid: [os.stat(path).st_ino for path in paths] for pid, paths in open_files.items()}

    assert len(held) == 3
    assert all(lock.st_ino in inodes for inodes in held.values())


def test_what_an_attempt_had_is_gone_on_with(remote: Lab, wait_until: Wait) -> None:
    """After a stop in order the far side keeps the part, and the next life sends the rest."""
    file = remote.write("a.mrc", os.urandom(6 * MB))
    request = remote.request(file)
    handle = slowly(remote, request, wait_until)
    wait_until(lambda: remote.action.poll(request, handle).bytes_done > 2 * MB)
    remote.action.close()
    wait_until(lambda: any(path.parent.name == PARTIAL for path in partial(remote)))
    (part,) = [path for path in partial(remote) if path.parent.name == PARTIAL]
    had = part.stat().st_size
    remote.live()
    remote.limit = None
    progress = poll_to_end(remote.action, request, handle)

    assert had > MB
    assert progress.status == "succeeded", progress.why
    assert remote.delivered() == {"a.mrc": (remote.source / "a.mrc").read_bytes()}
    assert partial(remote) == []


# ---------------------------------------------------------------------- the source changes


@pytest.mark.parametrize("how", ["grows", "shrinks", "goes"])
def test_a_source_that_changes_meanwhile_is_told(remote: Lab, wait_until: Wait, how: str) -> None:
    """Rsync itself may call it a success; it is no longer the manifest's version, and never proved as it."""
    files = remote.write("a.mrc", os.urandom(6 * MB)), remote.write("b.mrc", b"y")
    request = remote.request(*files)
    handle = slowly(remote, request, wait_until)
    path = remote.source / "a.mrc"
    match how:
        case "grows":
            with path.open("ab") as file:
                file.write(b"more")
        case "shrinks":
            os.truncate(path, MB)
        case "goes":
            path.unlink()
    remote.limit = None
    progress = poll_to_end(remote.action, request, handle)
    said = remote.action.verify(request, {})

    assert progress.status == "succeeded", progress.why
    assert set(progress.changed) | set(said.changed if isinstance(said, Proof | Differs) else ()) == {"a.mrc"}
    assert not isinstance(said, Proof) or [member["path"] for member in said.members] == ["b.mrc"]


def test_a_root_that_is_away_is_no_change(local: Lab) -> None:
    """Its files are not gone: the run waits."""
    file = local.write("a.mrc", b"frames")
    local.source.rename(local.base / "elsewhere")
    progress = local.run(local.request(file))

    assert progress.status == "failed" and progress.fault is not None
    assert progress.fault.kind == "transient"
    assert progress.changed == ()


def test_a_source_that_is_touched_while_it_is_compared_is_not_proved(remote: Lab, wait_until: Wait) -> None:
    """Rewritten with its time put back, by somebody who is quick: its change time tells. It is compared again."""
    file = remote.write("a.mrc", os.urandom(6 * MB))
    request = remote.request(file)
    assert remote.run(request).status == "succeeded"
    remote.limit = 1.0 * MB
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(remote.action.verify(request, {})))
    thread.start()
    wait_until(lambda: any(_read(pid) > 0.2 * MB for pid in remote.rsyncs()))
    remote.write("a.mrc", (remote.source / "a.mrc").read_bytes(), file.mtime_ns)
    remote.limit = None
    thread.join(30)

    assert isinstance(said[0], Unproven), said
    assert "touched" in said[0].fault.why
    assert (said[0].fault.kind, said[0].fault.counts) == ("transient", False)
    assert isinstance(remote.action.verify(request, {}), Proof)


def _read(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    return 0


# ---------------------------------------------------------------------- pace


def test_a_pause_stops_every_byte(lab: Lab, wait_until: Wait) -> None:
    """Of the rsync, too, which does not know of it; then it goes on."""
    file = lab.write("a.mrc", os.urandom(6 * MB))
    request = lab.request(file)
    handle = slowly(lab, request, wait_until)
    lab.paused = True
    wait_until(lambda: {_state(pid) for pid in lab.rsyncs() if _name(pid) == "rsync"} == {"T"})
    before = lab.action.poll(request, handle).status
    lab.paused, lab.limit = False, None
    progress = poll_to_end(lab.action, request, handle)

    assert before == "active"
    assert progress.status == "succeeded", progress.why


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return "X"  # gone


def pull(lab: Lab, pace: Pace, **how: Any) -> Child:
    """An rsync of the lab's file, driven in this process."""
    lock = os.open(lab.base / "lock", os.O_RDWR | os.O_CREAT)
    argv = [
        "/usr/bin/rsync", "--from0", "--files-from=-", "--no-implied-dirs", "--delay-updates",
        "--bwlimit=2000", "--", f"{lab.source}/", f"{lab.far.to(lab.directory)}/.",
    ]  # fmt: skip
    return Child(
        argv, names=listed([b"a.mrc"]), lock=lock, pace=pace, silent_s=60.0,
        environment=environment(), guard=lambda written: None, **how,
    )  # fmt: skip


def pace_of(lab: Lab) -> Pace:
    pace = Pace(Tills(Tills.make(4, str(lab.base))))
    pace.begin(None)
    return pace


def test_no_far_side_gives_up_one_that_is_stopped() -> None:
    """However short `timeout` is written."""
    assert TIMEOUT_MIN_S >= 2 * STOP_MAX_S


def test_a_long_pause_ends_it_in_order(daemon: Lab, monkeypatch: pytest.MonkeyPatch, wait_until: Wait) -> None:
    """Before the far side gives it up: it keeps what it has, and is to be begun again."""
    monkeypatch.setattr("trigger_daemon.actions._child.STOP_MAX_S", 0.3)
    daemon.write("a.mrc", os.urandom(6 * MB))
    pace = pace_of(daemon)
    ends = []
    thread = threading.Thread(target=lambda: ends.append(pull(daemon, pace, far=True, rerun_s=None).run()))
    thread.start()
    wait_until(lambda: bool(partial(daemon)))
    pace.paused = True
    thread.join(30)
    wait_until(lambda: any(path.parent.name == PARTIAL for path in partial(daemon)))

    assert [(end.again, end.code) for end in ends] == [(True, 20)]


@pytest.mark.parametrize("rate", [None, 20.0 * MB, 0.1 * MB])
def test_another_rate_begins_it_again(
    daemon: Lab, wait_until: Wait, rate: float | None
) -> None:
    """It cannot be told one: where the new one is far from what it was begun with, it is ended in order."""
    daemon.write("a.mrc", os.urandom(6 * MB))
    pace = pace_of(daemon)
    pace.limit = 2.0 * MB
    ends = []
    thread = threading.Thread(target=lambda: ends.append(pull(daemon, pace, far=True, rerun_s=0.1).run()))
    thread.start()
    wait_until(lambda: bool(partial(daemon)))
    pace.limit = rate
    thread.join(30)

    assert [(end.again, end.code) for end in ends] == [(True, 20)]


def test_all_draw_from_one_till(local: Lab) -> None:
    """What an rsync reads is drawn as `copy` draws, so that a limit holds for all of them together."""
    local.write("a.mrc", os.urandom(3 * MB))
    pace = pace_of(local)
    pace.limit = 100.0 * MB
    end = pull(local, pace, far=False, rerun_s=None).run()
    drawn = pace._tills.ticket(READING, 0.0, pace.limit, 0.0)

    assert end.code == 0
    assert drawn >= 2 * MB


def test_copy_and_rsync_share_one_limit(local: Lab) -> None:
    """What either reads is drawn from the same till: a limit of the settings holds for both together."""
    from trigger_daemon.actions import _lanes, copy

    local.limit = 100.0 * MB
    files = local.write("a.mrc", os.urandom(3 * MB)), local.write("b.mrc", os.urandom(4 * MB))
    pool = local.action._attempts._pool()
    till = Tills(_lanes._SHARED.fd)
    first = till.ticket(READING, 0.0, local.limit, 0.0)
    assert local.run(local.request(files[0])).status == "succeeded"
    before = till.ticket(READING, 0.0, local.limit, 0.0)
    context = Context(str(local.base / "copies"), lambda run, attempt: None, bandwidth=lambda: local.limit)
    other = copy.Action(context)
    options = {name: option.default for name, option in copy.Action.OPTIONS.items()} | {"to": (str(local.dest),)}
    request = replace(local.request(files[1], run=2), options=options, written=None)
    copied = poll_to_end(other, request, other.start(request, None))
    other.close()

    assert pool is local.action._attempts._pool()
    assert before - first >= 3 * MB
    assert copied.status == "succeeded", copied.why
    assert till.ticket(READING, 0.0, local.limit, 0.0) - before >= 4 * MB


def test_a_cancel_ends_it(local: Lab, wait_until: Wait) -> None:
    """Also one that is paused."""
    local.write("a.mrc", os.urandom(6 * MB))
    pace = pace_of(local)
    rsync = pull(local, pace, far=False, rerun_s=None)
    raised: list[type[BaseException]] = []

    def run() -> None:
        try:
            rsync.run()
        except Cancelled:
            raised.append(Cancelled)

    thread = threading.Thread(target=run)
    thread.start()
    pace.paused = True
    pace.cancelled = True
    thread.join(30)

    assert raised == [Cancelled]
    assert rsync._process.returncode is not None


def test_the_reserve_is_kept(local: Lab) -> None:
    """A batch that would take free space below it is not begun; that burns no attempt."""
    file = local.write("a.mrc", os.urandom(MB))
    local.reserve = 10**15
    progress = local.run(local.request(file))

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.counts) == ("transient", False)
    assert "reserve" in progress.why
    assert local.delivered() == {}


def test_a_neighbour_gets_no_room_that_a_run_was_begun_with(local: Lab, wait_until: Wait) -> None:
    """What is left above the reserve is held for it: it comes to its end, and takes nothing of the reserve."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(local.dest)], check=True)
    try:
        file = local.write("a.mrc", os.urandom(40 * MB))
        local.reserve, local.limit = 50 * MB, 20e6
        request = local.request(file)
        handle = local.action.start(request, None)
        wait_until(lambda: any(path.stat().st_size > MB for path in local.dest.rglob("*") if path.is_file()))
        left = free(local.dest) - local.reserve - 2 * MB
        assert 0 < left < 120 * MB, "all that is still to be written is allocated, and more"
        (local.dest / "neighbour").write_bytes(bytes(left))
        least = [free(local.dest)]
        while local.action.poll(request, handle).status == "active":
            least.append(free(local.dest))
            time.sleep(0.005)  # another process takes it; nothing to pass a clock to
        progress = poll_to_end(local.action, request, handle)

        assert progress.status == "succeeded", progress.why
        assert min(least) > local.reserve
        wait_until(lambda: free(local.dest) > min(least) + 90 * MB)  # nothing is held any longer
    finally:
        for life in local.lives:
            life.close()
        subprocess.run(["umount", "-l", str(local.dest)], check=True)


def free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


# ---------------------------------------------------------------------- what goes wrong, in words


def fault_of(lab: Lab, *files: File, run: int = 1, **options: Any) -> tuple[str, str, str]:
    """Kind and scope of what an attempt fails with, and all its words."""
    progress = lab.run(lab.request(*files, run=run, **options))
    assert progress.status == "failed" and progress.fault is not None
    return progress.fault.kind, str(progress.fault.scope), f"{progress.why} / {progress.hint}"


def test_ssh_faults_are_told_apart(ssh: Lab) -> None:
    """Each with what must be done, and by whom; and a host key is never taken on trust."""
    assert isinstance(ssh.far, Sshd)
    file = ssh.write("a.mrc", b"frames")
    keys = ssh.far.base

    ssh.far.know("other")
    kind, scope, words = fault_of(ssh, file, run=1)
    assert (kind, scope) == ("person", "destination") and "host key" in words and str(keys / "known_hosts") in words

    (keys / "known_hosts").write_text("")
    kind, scope, words = fault_of(ssh, file, run=2)
    assert (kind, scope) == ("person", "destination") and "is not known here" in words
    assert (keys / "known_hosts").read_text() == ""

    ssh.far.know("hostkey")
    kind, scope, words = fault_of(ssh, file, run=3, identity=str(keys / "other"))
    assert (kind, scope) == ("person", "credential") and "authorized_keys" in words

    (keys / "other").chmod(0o644)
    ssh.far.allow("other")
    kind, scope, words = fault_of(ssh, file, run=4, identity=str(keys / "other"))
    assert (kind, scope) == ("person", "credential") and "chmod 600" in words

    kind, scope, words = fault_of(ssh, file, run=5, identity=str(keys / "none"))
    assert (kind, scope) == ("person", "credential") and str(keys / "none") in words

    ssh.far.allow("id", 'command="exec /nonexistent/rsync"')
    kind, scope, words = fault_of(ssh, file, run=6)
    assert (kind, scope) == ("person", "destination") and "no rsync on" in words

    ssh.far.allow("id", 'command="echo Welcome; cat"')
    kind, scope, words = fault_of(ssh, file, run=7)
    assert (kind, scope) == ("person", "destination") and "login scripts" in words

    ssh.far.allow("id")
    kind, scope, words = fault_of(ssh, file, run=8, to=ssh.far.to("nowhere"))
    assert (kind, scope) == ("transient", "destination") and "is not there" in words

    kind, scope, words = fault_of(ssh, file, run=9, to=f"host.invalid:{ssh.far.there}")
    assert (kind, scope) == ("transient", "destination") and "host.invalid" in words

    ssh.far.kill()
    kind, scope, words = fault_of(ssh, file, run=10)
    assert (kind, scope) == ("transient", "destination") and "does not answer" in words
    assert ssh.delivered() == {}


def test_daemon_faults_are_told_apart(daemon: Lab) -> None:
    """By the words of the daemon: its exit code is the same for most."""
    assert isinstance(daemon.far, RsyncDaemon)
    file = daemon.write("a.mrc", b"frames")

    def of(run: int, module: str, path: str = "", **options: Any) -> tuple[str, str, str]:
        assert isinstance(daemon.far, RsyncDaemon)
        return fault_of(daemon, file, run=run, to=daemon.far.to(path, module), **options)

    kind, scope, words = of(1, "nothing")
    assert (kind, scope) == ("person", "destination") and "Unknown module" in words
    kind, scope, words = of(2, "readonly")
    assert (kind, scope) == ("person", "destination") and "read only" in words
    kind, scope, words = of(3, "gone")
    assert (kind, scope) == ("transient", "destination") and "mounted" in words
    kind, scope, words = of(4, "locked")
    assert (kind, scope) == ("person", "credential") and "password_file" in words
    alice = daemon.far.to("", "locked").replace("//", "//alice@", 1)
    kind, scope, words = fault_of(daemon, file, run=5, to=alice, password_file=str(daemon.far.base / "wrong"))
    assert (kind, scope) == ("person", "credential") and "password_file" in words
    kind, scope, words = of(6, "full")
    assert (kind, scope) == ("transient", "destination") and "max connections" in words
    kind, scope, words = of(7, "nofsync")
    assert (kind, scope) == ("person", "destination") and "refuse" in words
    kind, scope, words = of(8, "denied")
    assert (kind, scope) == ("person", "destination") and "right to write" in words
    kind, scope, words = of(9, "data", "nowhere")
    assert (kind, scope) == ("transient", "destination") and "is not there" in words
    assert daemon.delivered() == {}


def test_a_full_disk_there_is_waited_for(remote: Lab, tmp_path: Path) -> None:
    """It burns no attempt, leaves no part under a final name, and goes on once there is room."""
    what = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(remote.dest)]
    if subprocess.run(what, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        files = remote.write("a.mrc", os.urandom(5 * MB)), remote.write("b.mrc", b"y")
        progress = remote.run(remote.request(*files))
        delivered = remote.delivered()
        subprocess.run(["mount", "-o", "remount,size=20m", str(remote.dest)], check=True)
        later = remote.run(remote.request(*files, attempt=2))
    finally:
        remote.action.close()
        subprocess.run(["umount", "-l", str(remote.dest)], check=True)

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope, progress.fault.counts) == ("transient", "destination", False)
    assert "make room" in progress.hint
    assert "a.mrc" not in delivered
    assert later.status == "succeeded", later.why


def test_a_key_that_leads_to_rrsync(ssh: Lab) -> None:
    """Such a key can do nothing but this; paths are then below the directory that it is kept to."""
    assert isinstance(ssh.far, Sshd)
    rrsync = shutil.which("rrsync")
    if rrsync is None:
        pytest.skip("rrsync is not installed")
    ssh.far.allow("id", f'command="{rrsync} -wo {ssh.far.there}",restrict')
    files = tuple(ssh.write(path, path.encode("utf-8", "surrogateescape")) for path in ODD)
    request = ssh.request(*files, to=f"127.0.0.1:/{ssh.directory}", rrsync=True)
    progress = ssh.run(request)
    kind, scope, words = fault_of(ssh, *files, run=2, to=f"127.0.0.1:/{ssh.directory}")

    assert progress.status == "succeeded", progress.why
    assert ssh.delivered() == {file.path: (ssh.source / file.path).read_bytes() for file in files}
    assert isinstance(ssh.action.verify(request, {}), Proof)
    assert (kind, scope) == ("person", "destination") and "rrsync: true" in words
    assert _standing(ssh, request) == [True] * len(ODD) + [False]


def _standing(lab: Lab, request: Request) -> list[bool]:
    """Say whether something is at each target, and at one where nothing was ever put."""
    places = [to for to, _ in lab.action.targets(request)]
    others = [to.rpartition("/")[0] + "/.never-there" for to in places[:1]]
    found = lab.action.standing(request, [*places, *others])
    return [found[to] is not None for to in (*places, *others)]


def test_what_stands_at_a_far_target_is_told(remote: Lab) -> None:
    """Through links as well, and of a directory that is gone nothing; where all of it is away, nobody knows."""
    files = tuple(remote.write(path, b"frames") for path in ("\\#012 [x] é.mrc", "deep/er/b.mrc"))
    request = remote.request(*files)
    assert remote.run(request).status == "succeeded"
    (remote.dest / "deep").rename(remote.far.there / "elsewhere")
    (remote.dest / "deep").symlink_to("../elsewhere")
    assert _standing(remote, request) == [True, True, False]
    (remote.dest / "deep").unlink()
    assert _standing(remote, request) == [True, False, False]
    remote.dest.rename(remote.far.there / "away")

    with pytest.raises(Refused, match="is not there"):
        _standing(remote, request)
    remote.far.kill()
    with pytest.raises(Refused):
        _standing(remote, request)


def test_a_thousand_far_targets_are_looked_at_at_once(daemon: Lab) -> None:
    """A batch that is retried is looked at within the time that one answer may take."""
    files = [daemon.write(f"{'ab'[number % 2]}/{number:04d}.mrc", b"f") for number in range(1_000)]
    assert daemon.run(daemon.request(*files[:10])).status == "succeeded"
    request = daemon.request(*files)
    began = time.monotonic()
    found = daemon.action.standing(request, [to for to, _ in daemon.action.targets(request)])

    assert [there is not None for there in found.values()] == [True] * 10 + [False] * 990
    assert time.monotonic() - began < 10


def test_a_password_is_nowhere_to_be_seen(daemon: Lab, wait_until: Wait) -> None:
    """Neither in arguments nor in environments of any process, nor in what is told or kept."""
    assert isinstance(daemon.far, RsyncDaemon)
    file = daemon.write("a.mrc", os.urandom(6 * MB))
    to = daemon.far.to(daemon.directory, "locked").replace("//", "//alice@", 1)
    request = daemon.request(file, to=to, password_file=str(daemon.far.base / "password"))
    handle = slowly(daemon, request, wait_until)
    seen = b""
    for pid in [os.getpid(), *below(os.getpid())]:
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                seen += Path(f"/proc/{pid}/{what}").read_bytes()
    daemon.limit = None
    progress = poll_to_end(daemon.action, request, handle)
    kept = b"".join(path.read_bytes() for path in (daemon.base / "state").rglob("*") if path.is_file())

    assert progress.status == "succeeded", progress.why
    assert b"--password-file=" in seen
    assert daemon.far.PASSWORD.encode() not in seen + kept + json.dumps([progress.output, handle]).encode()


def test_a_batch_that_cannot_be_is_refused(local: Lab) -> None:
    """Two files with one target, and a target in the watched directory."""
    file = local.write("a.mrc", b"x")
    twin = File(str(local.base / "other"), "a.mrc", 1, 1)
    for request in (local.request(file, twin), local.request(file, to=str(local.source / "below"))):
        with pytest.raises(Refused) as refused:
            local.action.start(request, None)
        assert refused.value.fault.kind == "permanent"
        assert refused.value.fault.hint


# ---------------------------------------------------------------------- options

RULE = """\
rules:
  - name: out
    watch: /data
    match: ["{visit}/{movie}.mrc"]
    existing: process
    start:
      rsync: {OPTIONS}
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('{to: "-oProxyCommand=touch /tmp/x:/a"}', "no destination"),
        ('{to: "host"}', "no destination"),
        ('{to: "host:relative"}', "no destination"),
        ('{to: "-x@host:/a"}', "no destination"),
        ('{to: "ho st:/a"}', "no destination"),
        ('{to: "rsync://host/"}', "no destination"),
        ('{to: "rsync://host"}', "no destination"),
        ('{to: "{visit}:/a"}', "no destination"),
        ('{to: "rsync://host/{visit}/a"}', "module"),
        ('{to: "host:/a/../b"}', "upwards"),
        ('{to: "rsync://host:99999/m/a"}', "no port"),
        ('{to: "host:/a", port: 70000}', "no port"),
        ('{to: "/mnt/a", identity: /k}', "means nothing for a local directory"),
        ('{to: "rsync://host/m", known_hosts: /k}', "means nothing for an rsync daemon"),
        ('{to: "host:/a", password_file: /k}', "means nothing for ssh"),
        ('{to: "host:/a", identity: "/k -oProxyCommand=x"}', "no absolute path"),
        ('{to: "host:/a", identity: relative}', "no absolute path"),
        ('{to: "host:/a", timeout: 5s}', "60"),
        ('{to: "host:/a", if_exists: maybe}', "hold"),
        ('{to: "host:/a", delete: true}', "delete"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_its_place(options: str, words: str) -> None:
    """Before anything runs: file, line and column; and nothing becomes an option of ssh or rsync."""
    (fault, *_) = parse_rules([("out.yaml", RULE.replace("{OPTIONS}", options))]).faults

    assert fault.file == "out.yaml"
    assert (fault.line, fault.column > 1) == (7, True)
    assert words in f"{fault.message} {fault.hint}"


@pytest.mark.parametrize(
    "options",
    [
        "{to: /mnt/archive}",
        '{to: "/mnt/archive/{visit}"}',
        '{to: "host:/archive"}',
        '{to: "user.name@host.example.org:/archive/{visit}", port: 2222, identity: /etc/k, known_hosts: /etc/h}',
        '{to: "user@[::1]:/archive"}',
        '{to: "rsync://user@host:8730/module/{visit}", password_file: /etc/p, compress: true}',
    ],
)
def test_these_options_are_right(options: str) -> None:
    assert parse_rules([("out.yaml", RULE.replace("{OPTIONS}", options))]).faults == []


def test_captures_cannot_lead_elsewhere(local: Lab) -> None:
    """Neither to another host nor upwards: what a template holds stays a part of the path."""
    file = local.write("a.mrc", b"x")
    for to, written in (("/mnt/../etc", "/mnt/{visit}"), ("evil:/a", "{visit}:/a"), ("/etc", "/mnt/{visit}")):
        with pytest.raises(Refused):
            local.action.start(replace(local.request(file, to=to), written={"to": written}), None)


# ---------------------------------------------------------------------- a try before


def looked(options: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    defaults = {name: option.default for name, option in Action.OPTIONS.items()}
    found = list(Action.look_online({**defaults, **options}))
    return {each.what: (each.ok, f"{each.why} {each.hint}") for each in found}


def test_a_try_finds_all_in_order(lab: Lab) -> None:
    """Rsync, keys, the far side, its directory; and it leaves nothing there, also beside others' files."""
    (lab.dest / "somebody's").write_bytes(b"x")
    found = looked(lab.far.options(f"{lab.directory}/{{visit}}"))

    assert found and all(ok for ok, _ in found.values()), found
    assert any(what.endswith("can be written to") for what in found)
    assert "version" in found["rsync"][1]
    assert sorted(path.name for path in lab.dest.iterdir()) == ["somebody's"]


def test_a_try_names_what_is_wrong(ssh: Lab, tmp_path: Path) -> None:
    """And stops there."""
    assert isinstance(ssh.far, Sshd)
    options = ssh.far.options(ssh.directory)
    (ssh.far.base / "other").chmod(0o644)
    open_key = looked({**options, "identity": str(ssh.far.base / "other")})
    no_place = looked(ssh.far.options("nowhere"))
    ssh.far.know("other")
    stranger = looked(options)

    assert [ok for ok, _ in open_key.values()] == [True, False, True]
    assert "chmod 600" in json.dumps(list(open_key.values()))
    assert "is not there" in list(no_place.values())[-1][1]
    assert not (ssh.far.there / "nowhere").exists()
    assert "host key" in list(stranger.values())[-1][1]


def test_a_try_that_may_not_remove_says_so(daemon: Lab) -> None:
    """The empty file stays where deleting is refused; that is no fault."""
    assert isinstance(daemon.far, RsyncDaemon)
    found = looked({"to": daemon.far.to(daemon.directory, "nodelete")})
    (why,) = [why for what, (_, why) in found.items() if what.endswith("can be written to")]

    assert all(ok for ok, _ in found.values())
    assert ".trigger-daemon-check stays there" in why


# ---------------------------------------------------------------------- the whole daemon


@pytest.fixture(params=["ssh", "daemon"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Site, Far]]:
    with FARS[request.param](tmp_path / "far") as far:
        made = Site(tmp_path / "site")
        reclaim = {"proven_by": ["out"], "keep_for": "3s", "only_under": "always"}
        (far.there / "raw").mkdir()
        start = {"rsync": far.options("raw/{visit}")}
        made.write_rules(made.rule("out", match=["{visit}/*.tif"], start=start, reclaim=reclaim))
        made.settings["reclaim"] = "enabled"
        yield made, far
        if made.process is not None and made.process.poll() is None:
            made.kill()


def written(site: Site, name: str) -> Path:
    path = site.data / "visit 7" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(100_000))
    return path


def test_rules_check_online_asks_the_far_side(site: tuple[Site, Far]) -> None:
    """As a person types it; exit code 4 where a person is needed, 1 where waiting may mend it."""
    made, far = site
    made.config.write_text(json.dumps(made.settings))
    well = made.cli("rules", "check", "--online", check=False)
    far.kill()
    away = made.cli("-F", "json", "rules", "check", "--online", check=False)

    assert (well.returncode, away.returncode) == (0, 1), well.stdout + away.stdout
    assert "can be written to" in well.stdout
    (fault,) = [each for each in json.loads(away.stdout)["online"] if not each["ok"]]
    assert (fault["rule"], bool(fault["why"]), bool(fault["hint"])) == ("out", True, True)


def test_a_far_copy_lets_its_source_go(site: tuple[Site, Far]) -> None:
    """Both sides are read once more before; `explain` says where it is."""
    made, far = site
    path = written(made, "a.tif")
    content = path.read_bytes()
    made.start()
    under_way = "SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"  # under its hidden name
    made.until(lambda: not path.exists() and not made.ask(under_way), 60, "it is reclaimed")

    assert (far.there / "raw" / "visit 7" / "visit 7" / "a.tif").read_bytes() == content
    (about,) = made.json("explain", str(path))["rules"]
    assert about["stage"] == "reclaimed"
    assert f":{far.port}/" in about["because"]


def test_a_far_copy_that_was_altered_keeps_its_source(site: tuple[Site, Far]) -> None:
    """Of the same size and time: contents are compared before anything is deleted. Others of its batch may go."""
    made, far = site
    rule = json.loads((made.rules_dir / "rules.yaml").read_text())["rules"][0]
    made.write_rules(rule | {"batch": {"files": 2, "group_by": ["visit"]}})
    path, other = written(made, "a.tif"), written(made, "b.tif")
    made.start()
    made.until_verified(2, rule="out")
    copy = far.there / "raw" / "visit 7" / "visit 7" / "a.tif"
    stat = copy.stat()
    copy.write_bytes(os.urandom(100_000))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    made.until(lambda: bool(made.ask("SELECT 1 FROM reclaim WHERE state = 'kept'")), 60, "it is asked for")
    made.until(lambda: not other.exists(), 60, "the other goes")

    assert path.exists()
    ((because,),) = made.ask("SELECT DISTINCT because FROM reclaim WHERE state = 'kept'")
    assert "another content" in because


def test_a_killed_daemon_goes_on_where_it_was(site: tuple[Site, Far]) -> None:
    """Also with the far side killed in between: each file once, whole, proved."""
    made, far = site
    made.settings |= {"reclaim": "disabled", "throttle": {"bandwidth": "1MB/s"}}
    path = made.data / "visit 7" / "large.tif"
    path.parent.mkdir()
    path.write_bytes(os.urandom(5 * MB))
    made.start()
    made.until(lambda: any(far.there.rglob(".large.tif.*")), 60, "it is under way")
    made.kill()
    far.kill()
    assert not (far.there / "raw" / "visit 7" / "visit 7" / "large.tif").exists()
    made.settings["throttle"] = {}
    made.start()
    far.start()
    made.until_verified(1, rule="out")

    assert (far.there / "raw" / "visit 7" / "visit 7" / "large.tif").read_bytes() == path.read_bytes()
    assert made.manifests("out") == [[(b"visit 7/large.tif", 5 * MB, path.stat().st_mtime_ns)]]
