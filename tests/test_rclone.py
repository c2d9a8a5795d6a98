"""Laws of `rclone`: to S3, SFTP, WebDAV and a local directory, with real servers on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conformance import poll_to_end
from far import REMOTES, S3, Directory, Far, RcloneServer, Sftp, WebDav, below, rclone_on_the_path
from tests.site import Site
from trigger_daemon.actions import Context, Differs, File, Progress, Proof, Refused, Request, Unproven
from trigger_daemon.actions._rclone_hash import DIGESTS
from trigger_daemon.actions._rclone_target import target_of
from trigger_daemon.actions._rclone_words import trouble_of
from trigger_daemon.actions.rclone import Action
from trigger_daemon.config import parse_rules

Wait = Callable[..., None]
MB = 10**6
ODD = ("s1/a [1] {é} *.tif", "s1/deep/er/b.tif", "-c.mrc", "s1/#d; |e'$(f)`g`.mrc", " blank ", "empty.dat")


@pytest.fixture(autouse=True)
def _path() -> Iterator[None]:
    with rclone_on_the_path():
        yield


class Lab:
    """One provider over a source and a remote."""

    def __init__(self, base: Path, far: Far) -> None:
        self.base, self.far = base, far
        self.source = base / "source"
        self.source.mkdir()
        (base / "state").mkdir()
        self.dest = far.there / "data"
        self.limit: float | None = None
        self.paused = False
        self.lives: list[Action] = []
        self.action = self.live()

    def live(self) -> Action:
        """Another life of the daemon."""
        context = Context(
            state_dir=str(self.base / "state"), nudge=lambda run, attempt: None, bandwidth=lambda: self.limit,
            paused=lambda: self.paused, settings={"rerun_s": 0.2},
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
        told = {**defaults, **self.far.options(), **options}
        return Request(run, attempt, "rule", {}, {}, files, told, None, {"to": told["to"]})

    def run(self, request: Request) -> Progress:
        self.action.check(request.options)
        return poll_to_end(self.action, request, self.action.start(request, None))

    def everything(self) -> dict[str, bytes]:
        """All that lies at the destination, under whatever name."""
        return {
            str(path.relative_to(self.dest)): path.read_bytes() for path in self.dest.rglob("*")
            if path.is_file() and not path.name.startswith(".rclone_temp_put_")  # of a server of S3 that was killed
        }  # fmt: skip

    def delivered(self) -> dict[str, bytes]:
        """What stands under final names."""
        return {
            path: content for path, content in self.everything().items()
            if not path.endswith(".partial") and not path.startswith(".trigger-daemon")
        }  # fmt: skip

    def rclones(self) -> list[int]:
        """The rclones that the workers have started."""
        far = getattr(self.far, "_process", None)
        return [pid for pid in below(os.getpid()) if _name(pid) == "rclone" and (far is None or pid != far.pid)]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return "X"  # gone


def _lab(base: Path, far: Far) -> Iterator[Lab]:
    with far:
        made = Lab(base, far)
        yield made
        for action in made.lives:
            action.close()


@pytest.fixture(params=["s3", "sftp", "webdav"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, REMOTES[request.param](tmp_path / "far"))


@pytest.fixture(params=["s3", "webdav"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """One that keeps digests and whole objects, and one that keeps nothing."""
    yield from _lab(tmp_path, REMOTES[request.param](tmp_path / "far"))


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, S3(tmp_path / "far"))


@pytest.fixture
def sftp(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, Sftp(tmp_path / "far"))


@pytest.fixture
def webdav(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, WebDav(tmp_path / "far"))


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Lab]:
    yield from _lab(tmp_path, Directory(tmp_path / "far"))


# ---------------------------------------------------------------------- the way that goes well


def test_every_name_arrives_and_is_proved(lab: Lab) -> None:
    """Whole, nothing beside it, and a record of each with the digest of its content."""
    files = tuple(lab.write(path, path.encode() * 99 if path != "empty.dat" else b"") for path in ODD)
    request = lab.request(*files)
    progress = lab.run(request)
    proof = lab.action.verify(request, {})

    assert progress.status == "succeeded", progress.why
    assert (progress.files_done, progress.bytes_done) == (len(files), sum(file.size for file in files))
    assert lab.everything() == {file.path: (lab.source / file.path).read_bytes() for file in files}
    assert isinstance(proof, Proof), proof
    assert {member["path"] for member in proof.members} == set(ODD)
    assert {member["to"] for member in proof.members} == {to for to, _ in lab.action.targets(request)}
    for member in proof.members:
        name, _, digest = member["digest"].partition(":")
        assert digest == hashlib.new(name, (lab.source / member["path"]).read_bytes()).hexdigest()


def test_companions_of_another_root_come_along(s3: Lab) -> None:
    """Each under its path below its own root."""
    file = s3.write("s1/a.mrc", b"frames")
    other = s3.base / "other"
    (other / "s1").mkdir(parents=True)
    (other / "s1" / "a.xml").write_bytes(b"<x/>")
    stat = (other / "s1" / "a.xml").stat()
    request = s3.request(file, File(str(other), "s1/a.xml", stat.st_size, stat.st_mtime_ns, "companion"))
    progress = s3.run(request)

    assert progress.status == "succeeded", progress.why
    assert s3.everything() == {"s1/a.mrc": b"frames", "s1/a.xml": b"<x/>"}
    assert isinstance(s3.action.verify(request, {}), Proof)


def test_what_a_template_names_is_made_and_nothing_above(lab: Lab) -> None:
    """A directory of the batch is created; neither a bucket nor the part before the template is."""
    file = lab.write("a.mrc", b"frames")
    to = lab.far.to("visit [7]/run 1")
    there = lab.run(replace(lab.request(file, to=to), written={"to": lab.far.to("{visit}/{run}")}))
    away = replace(lab.request(file, run=2, to="there:nowhere/7"), written={"to": "there:nowhere/{visit}"})
    lost = lab.run(away)

    assert there.status == "succeeded", there.why
    assert lab.everything() == {"visit [7]/run 1/a.mrc": b"frames"}
    assert lost.status == "failed" and lost.fault is not None
    kind = ("person", "destination", True) if isinstance(lab.far, S3) else ("transient", "destination", False)
    assert (lost.fault.kind, lost.fault.scope, lost.fault.counts) == kind
    assert "nowhere" in lost.why and lost.hint
    assert not (lab.far.there / "nowhere").exists()


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_the_digest_is_what_rclone_calls_so(name: str, tmp_path: Path) -> None:
    """Of nothing, of little, of what ends with a block and what does not; fed in odd pieces."""
    import subprocess

    from far import _rclone

    for size in (0, 1, 159, 160, 161, 4 * 1024 * 1024, 9_000_001):
        content = os.urandom(size)
        (tmp_path / "x").write_bytes(content)
        argv = [_rclone(), "--config", "/dev/null", "hashsum", name, str(tmp_path / "x")]
        told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[0]
        made = DIGESTS[name][1]()
        for at in range(0, size, 700_001):
            made.update(content[at : at + 700_001])

        assert made.hexdigest() == told, (name, size)


# ---------------------------------------------------------------------- proof


@pytest.mark.parametrize("how", ["one byte", "shorter", "removed"])
def test_a_copy_that_was_altered_is_not_proved(two: Lab, how: str) -> None:
    """Also one of the old size and time."""
    files = two.write("a.mrc", b"x" * 100_000), two.write("b.mrc", b"y")
    request = two.request(*files)
    two.run(request)
    assert isinstance(two.far, RcloneServer)
    copy = two.dest / "a.mrc"
    if how == "removed":
        copy.unlink()
    else:
        stat = copy.stat()
        copy.write_bytes(b"x" * 99_999 + (b"" if how == "shorter" else b"z"))
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    two.far.look_again()
    said = two.action.verify(request, {})

    assert isinstance(said, Differs), said
    assert set(said.which) == {"a.mrc"}
    assert "a.mrc" in said.which["a.mrc"]


def test_a_source_that_was_rewritten_behind_its_time_is_not_proved(s3: Lab) -> None:
    """Of the manifest's size and time, but other bytes: the copy differs from it."""
    file = s3.write("a.mrc", b"old bytes")
    request = s3.request(file)
    s3.run(request)
    s3.write("a.mrc", b"new bytes", file.mtime_ns)

    assert isinstance(s3.action.verify(request, {}), Differs)


def test_one_member_is_proved_alone(s3: Lab) -> None:
    """As reclaim asks: a request of some of the files reads only those."""
    files = s3.write("a.mrc", b"frames"), s3.write("b.mrc", b"y")
    request = s3.request(*files)
    s3.run(request)
    assert isinstance(s3.far, RcloneServer)
    (s3.dest / "b.mrc").unlink()
    s3.far.look_again()
    said = s3.action.verify(replace(request, files=files[:1]), {})

    assert Action.PROVES_PARTS
    assert isinstance(said, Proof)
    assert [member["path"] for member in said.members] == ["a.mrc"]


def test_a_far_side_that_is_away_leaves_it_unproven(two: Lab) -> None:
    """Neither proved nor different: later."""
    request = two.request(two.write("a.mrc", b"frames"))
    two.run(request)
    two.far.kill()
    said = two.action.verify(request, {})

    assert isinstance(said, Unproven)
    assert (said.fault.kind, said.fault.scope, said.fault.counts) == ("transient", "destination", False)


def test_a_remote_without_digests_is_not_believed(webdav: Lab) -> None:
    """Where a hash is wanted and none is kept a person is told so, before anything is sent."""
    file = webdav.write("a.mrc", b"frames")
    progress = webdav.run(webdav.request(file, verify="hash"))

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("person", "destination")
    assert "verify: download" in progress.hint
    assert webdav.everything() == {}


def test_without_verification_there_is_no_proof(webdav: Lab) -> None:
    """It delivers, and says that nothing is proved."""
    request = webdav.request(webdav.write("a.mrc", b"frames"), verify="none")
    progress = webdav.run(request)

    assert progress.status == "succeeded", progress.why
    assert webdav.everything() == {"a.mrc": b"frames"}
    assert not webdav.action.verifies(request.options)
    assert isinstance(webdav.action.verify(request, {}), Unproven)


# ---------------------------------------------------------------------- what stands there already


def test_a_strangers_file_is_held_and_stays(two: Lab) -> None:
    """The others are delivered; nothing of it is replaced, whatever its size and time are."""
    files = two.write("a.mrc", b"ours"), two.write("b.mrc", b"frames"), two.write("c.mrc", b"same")
    (two.dest / "a.mrc").write_bytes(b"ties")
    os.utime(two.dest / "a.mrc", ns=(0, files[0].mtime_ns))
    (two.dest / "c.mrc").write_bytes(b"same")
    request = two.request(*files)
    progress = two.run(request)
    held = two.everything()
    replaced = two.run(two.request(*files, attempt=2, if_exists="replace"))

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("person", "file")
    assert "a.mrc" in progress.why and "if_exists" in progress.fault.hint
    assert held == {"a.mrc": b"ties", "b.mrc": b"frames", "c.mrc": b"same"}
    assert replaced.status == "succeeded", replaced.why
    assert two.everything() == {"a.mrc": b"ours", "b.mrc": b"frames", "c.mrc": b"same"}
    assert isinstance(two.action.verify(request, {}), Proof)


def test_an_earlier_version_of_ours_is_replaced(two: Lab) -> None:
    """Also after a restart; but not if somebody has changed it since."""
    old = two.write("a.mrc", b"old"), two.write("b.mrc", b"old")
    assert two.run(two.request(*old)).status == "succeeded"
    two.action.close()
    two.live()
    assert isinstance(two.far, RcloneServer)
    (two.dest / "b.mrc").write_bytes(b"somebody's")
    two.far.look_again()
    if isinstance(two.far, S3):  # it kept the times in its memory
        os.utime(two.dest / "a.mrc", ns=(0, old[0].mtime_ns))
    new = two.write("a.mrc", b"newer"), two.write("b.mrc", b"newer")
    progress = two.run(two.request(*new, run=2))

    assert progress.status == "failed"
    assert "b.mrc" in progress.why
    assert two.everything() == {"a.mrc": b"newer", "b.mrc": b"somebody's"}


@pytest.mark.parametrize("far", ["sftp", "webdav"])
def test_a_file_that_is_put_there_meanwhile_is_not_replaced(
    far: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the look, before the transfer. rclone passes over it and ends with 0: that is no success."""
    monkeypatch.setenv("TRIGGER_FAIL", "rclone.transfer:stop")
    for lab in _lab(tmp_path, REMOTES[far](tmp_path / "far")):
        request = lab.request(lab.write("a.mrc", b"ours"), lab.write("b.mrc", b"frames"))
        handle = lab.action.start(request, None)
        wait_until(lambda lab=lab: any(_state(pid) == "T" for pid in lab.action._attempts.pids()))
        (lab.dest / "a.mrc").write_bytes(b"somebody's")
        assert isinstance(lab.far, RcloneServer)
        lab.far.look_again()
        for pid in lab.action._attempts.pids():
            os.kill(pid, signal.SIGCONT)
        progress = poll_to_end(lab.action, request, handle)

        assert progress.status == "failed" and progress.fault is not None
        assert (progress.fault.kind, progress.fault.scope) == ("transient", "file")
        assert "a.mrc" in progress.why
        assert lab.delivered() == {"a.mrc": b"somebody's", "b.mrc": b"frames"}


# ---------------------------------------------------------------------- killed


def slowly(lab: Lab, request: Request, wait_until: Wait) -> Any:
    """Begin so slowly that it is under way for seconds; return when bytes move."""
    lab.limit = 1.0 * MB
    handle = lab.action.start(request, None)
    wait_until(lambda: lab.action.poll(request, handle).bytes_done > 0, 20.0)
    return handle


def test_a_server_that_is_killed_and_comes_back(two: Lab, wait_until: Wait) -> None:
    """It is the destination that is down, which burns no attempt; the next one delivers and is proved."""
    files = two.write("a.mrc", os.urandom(6 * MB)), two.write("z.mrc", b"y")
    request = two.request(*files, transfers=1, retries=1)
    handle = slowly(two, request, wait_until)
    two.far.kill()
    progress = poll_to_end(two.action, request, handle)
    between = two.delivered()
    two.far.start()
    two.limit = None
    again = two.request(*files, attempt=2)
    later = two.run(again)

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope, progress.fault.counts) == ("transient", "destination", False)
    assert progress.fault.hint
    assert "a.mrc" not in between
    assert later.status == "succeeded", later.why
    assert isinstance(two.action.verify(again, {}), Proof)
    assert two.everything() == {file.path: (two.source / file.path).read_bytes() for file in files}


@pytest.mark.parametrize(("far", "paused"), [("sftp", False), ("webdav", True)])
def test_a_killed_worker_takes_its_rclone_along(far: str, paused: bool, tmp_path: Path, wait_until: Wait) -> None:
    """Nothing goes on behind the next attempt's back; that one removes what was left, and nobody else's."""
    for lab in _lab(tmp_path, REMOTES[far](tmp_path / "far")):
        (lab.dest / "other.mrc.0123abcd.partial").write_bytes(b"somebody's")
        file = lab.write("a.mrc", os.urandom(6 * MB))
        request = lab.request(file)
        handle = slowly(lab, request, wait_until)
        begun = lab.rclones()
        lab.paused = paused
        if paused:
            wait_until(lambda begun=begun: all(_state(pid) == "T" for pid in begun))
        (worker,) = lab.action._attempts.pids()
        os.kill(worker, signal.SIGKILL)
        progress = poll_to_end(lab.action, request, handle)
        wait_until(lambda begun=begun: all(_state(pid) in "ZX" for pid in begun))
        between = lab.delivered()
        lab.limit, lab.paused = None, False
        later = lab.run(lab.request(file, attempt=2))

        assert progress.status == "failed" and progress.fault is not None
        assert progress.fault.kind == "transient"
        assert between == {}
        assert later.status == "succeeded", later.why
        assert lab.everything() == {
            "a.mrc": (lab.source / "a.mrc").read_bytes(), "other.mrc.0123abcd.partial": b"somebody's",
        }  # fmt: skip


# ---------------------------------------------------------------------- the source changes


@pytest.mark.parametrize("how", ["grows", "goes"])
def test_a_source_that_changes_meanwhile_is_told(s3: Lab, wait_until: Wait, how: str) -> None:
    """It is no longer the manifest's version, and never proved as it; the others go."""
    files = s3.write("a.mrc", os.urandom(6 * MB)), s3.write("b.mrc", b"y")
    request = s3.request(*files, retries=1)
    handle = slowly(s3, request, wait_until)
    path = s3.source / "a.mrc"
    match how:
        case "grows":
            with path.open("ab") as file:
                file.write(b"more")
        case "goes":
            path.unlink()
    s3.limit = None
    progress = poll_to_end(s3.action, request, handle)
    said = s3.action.verify(request, {})

    assert progress.status == "succeeded", progress.why
    assert set(progress.changed) | set(said.changed if isinstance(said, Proof | Differs) else ()) == {"a.mrc"}
    assert not isinstance(said, Proof) or [member["path"] for member in said.members] == ["b.mrc"]


# ---------------------------------------------------------------------- pace


def test_another_rate_is_told_to_the_one_that_runs(sftp: Lab, wait_until: Wait) -> None:
    """Through its socket: it is not begun again, and at once as fast as it may."""
    request = sftp.request(sftp.write("a.mrc", os.urandom(20 * MB)))
    handle = slowly(sftp, request, wait_until)
    begun = sftp.rclones()
    sftp.limit = None
    progress = poll_to_end(sftp.action, request, handle)

    assert progress.status == "succeeded", progress.why
    assert progress.output["seconds"] < 15, "20 MB at the first rate take 20 s"
    assert progress.output["begun"] == 1
    assert len(begun) == 1


def test_a_pause_stops_every_byte(sftp: Lab, wait_until: Wait) -> None:
    """Of the rclone, too, which does not know of it; then it goes on. A cancel ends one that stands still."""
    request = sftp.request(sftp.write("a.mrc", os.urandom(6 * MB)))
    handle = slowly(sftp, request, wait_until)
    sftp.paused = True
    wait_until(lambda: {_state(pid) for pid in sftp.rclones()} == {"T"})
    sftp.action.cancel(request, handle)
    cancelled = poll_to_end(sftp.action, request, handle)
    left = sftp.everything()
    sftp.paused, sftp.limit = False, None
    progress = sftp.run(replace(request, run=2))

    assert cancelled.status == "cancelled"
    assert left == {}
    assert progress.status == "succeeded", progress.why


def test_a_limit_is_drawn_from_the_tills_of_all(s3: Lab) -> None:
    """What an rclone sends is drawn as `copy` draws, so that a limit holds for all of them together."""
    from trigger_daemon.actions import _lanes
    from trigger_daemon.actions._copy_pace import READING, Tills

    s3.limit = 100.0 * MB
    s3.action._attempts._pool()
    till = Tills(_lanes._SHARED.fd)
    before = till.ticket(READING, 0.0, s3.limit, 0.0)
    progress = s3.run(s3.request(s3.write("a.mrc", os.urandom(4 * MB))))

    assert progress.status == "succeeded", progress.why
    assert 3 * MB <= till.ticket(READING, 0.0, s3.limit, 0.0) - before < 8 * MB


# ---------------------------------------------------------------------- what goes wrong, in words


def fault_of(lab: Lab, *files: File, **options: Any) -> tuple[str, str, bool, str]:
    """Kind, scope and weight of what an attempt fails with, and all its words."""
    progress = lab.run(lab.request(*files, retries=1, **options))
    assert progress.status == "failed" and progress.fault is not None
    return progress.fault.kind, str(progress.fault.scope), progress.fault.counts, f"{progress.why} / {progress.hint}"


def test_faults_of_a_person_are_told_apart(lab: Lab) -> None:
    """Each with what must be done; and no secret is among the words."""
    assert isinstance(lab.far, RcloneServer)
    file = lab.write("a.mrc", b"frames")
    lab.far.configure("wrong-horse")
    kind, scope, _, words = fault_of(lab, file, run=1)
    assert (kind, scope) == ("person", "credential") and "rclone config" in words
    assert "wrong-horse" not in words

    lab.far.configure(lab.far.SECRET)
    lab.far.config.chmod(0o644)
    kind, scope, _, words = fault_of(lab, file, run=2)
    assert (kind, scope) == ("person", "credential") and "chmod 600" in words

    lab.far.config.chmod(0o600)
    kind, scope, _, words = fault_of(lab, file, run=3, to="elsewhere:data")
    assert (kind, scope) == ("person", "destination") and "listremotes" in words
    assert lab.everything() == {}


class Moody(BaseHTTPRequestHandler):
    """A service that answers each request with one status."""

    status, body = 503, b""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_PUT = do_HEAD = do_POST = do_PROPFIND = do_MKCOL = do_DELETE = do_MOVE = _answer

    def log_message(self, *_: Any) -> None:
        """Nobody wants to read it."""


@pytest.mark.parametrize(
    ("status", "kind", "scope", "counts", "waits"),
    [(429, "transient", "destination", False, True), (507, "transient", "destination", False, True),
     (403, "person", "destination", True, False), (500, "transient", "destination", False, False)],
)  # fmt: skip
def test_what_a_service_answers_is_told_apart(
    webdav: Lab, status: int, kind: str, scope: str, counts: bool, waits: bool
) -> None:
    """Too many requests and a full disk are waited for; a right that is missing is a person's matter."""
    assert isinstance(webdav.far, WebDav)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Now", (Moody,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    webdav.far.configure(webdav.far.SECRET, url=f"http://127.0.0.1:{server.server_address[1]}")
    progress = webdav.run(webdav.request(webdav.write("a.mrc", b"frames"), retries=1))
    server.shutdown()
    server.server_close()

    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope, progress.fault.counts) == (kind, scope, counts), progress.why
    assert bool(progress.fault.retry_after_s) == waits
    assert progress.fault.hint


@pytest.mark.parametrize(
    ("words", "kind", "scope"),
    [
        ("googleapi: Error 403: User rate limit exceeded., userRateLimitExceeded", "transient", "destination"),
        ("googleapi: Error 403: The user's Drive storage quota has been exceeded., storageQuotaExceeded", "transient",
         "destination"),
        ("SlowDown: Please reduce your request rate. status code: 503", "transient", "destination"),
        ("couldn't fetch token: invalid_grant: maybe token expired?", "person", "credential"),
        ("AccessDenied: Access Denied status code: 403", "person", "destination"),
        ("ssh: handshake failed: knownhosts: key mismatch", "person", "destination"),
        ("NoSuchBucket: The specified bucket does not exist", "person", "destination"),
        ("write /mnt/x/.a.partial: no space left on device", "transient", "destination"),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "transient", "destination"),
        ("RequestTimeTooSkewed: The difference", "person", "destination"),
        ("KeyTooLongError: Your key is too long", "permanent", "file"),
        ("corrupted on transfer: md5 hashes differ", "transient", "file"),
        ("open /x: file name too long", "permanent", "file"),
    ],
)  # fmt: skip
def test_words_of_many_services(words: str, kind: str, scope: str) -> None:
    """As they are given on by rclone; a quota is none of rights, though both are a 403."""
    trouble = trouble_of(1, [f"a.mrc: Failed to copy: {words}"], target_of({"to": "there:data"}))

    assert (trouble.kind, trouble.scope) == (kind, scope)
    assert words[:20] in trouble.why
    assert trouble.hint


def test_an_old_rclone_is_refused(local: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write under final names: a person is told which to install, and nothing is sent."""
    directory = local.base / "bin"
    directory.mkdir()
    (directory / "rclone").write_text("#!/bin/sh\ntouch \"$0.$1\"\necho rclone v1.60.1-DEV\n")
    (directory / "rclone").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    kind, scope, _, words = fault_of(local, local.write("a.mrc", b"frames"))

    assert (kind, scope) == ("person", "destination")
    assert "1.60" in words and "1.63" in words
    assert sorted(path.name for path in directory.iterdir()) == ["rclone", "rclone.version"]


def test_a_password_is_nowhere_to_be_seen(sftp: Lab, wait_until: Wait) -> None:
    """Neither in arguments nor in environments of any process, nor in what is told or kept."""
    assert isinstance(sftp.far, RcloneServer)
    (hidden,) = [line.split(" = ")[1] for line in sftp.far.config.read_text().splitlines() if line.startswith("pass")]
    request = sftp.request(sftp.write("a.mrc", os.urandom(6 * MB)))
    handle = slowly(sftp, request, wait_until)
    seen = b""
    for pid in [pid for pid in below(os.getpid()) if _name(pid) != "rclone" or pid in sftp.rclones()]:
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                seen += Path(f"/proc/{pid}/{what}").read_bytes()
    sftp.limit = None
    progress = poll_to_end(sftp.action, request, handle)
    kept = b"".join(path.read_bytes() for path in (sftp.base / "state").rglob("*") if path.is_file())

    assert progress.status == "succeeded", progress.why
    assert b"--config" in seen
    for secret in (sftp.far.SECRET, hidden):
        assert secret.encode() not in seen + kept + json.dumps([progress.output, handle]).encode()


def test_flags_of_the_environment_are_not_inherited(local: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the daemon was started with would change what is promised; a remote may be described there."""
    monkeypatch.setenv("RCLONE_DRY_RUN", "true")
    monkeypatch.setenv("RCLONE_CONFIG_ELSEWHERE_TYPE", "local")
    progress = local.run(local.request(local.write("a.mrc", b"frames"), to=f"elsewhere:{local.dest}"))

    assert progress.status == "succeeded", progress.why
    assert local.everything() == {"a.mrc": b"frames"}


def test_a_batch_that_cannot_be_is_refused(local: Lab) -> None:
    """Two files with one target; and a target in the watched directory is not written to."""
    file = local.write("a.mrc", b"x")
    with pytest.raises(Refused) as refused:
        local.action.start(local.request(file, File(str(local.base / "other"), "a.mrc", 1, 1)), None)
    kind, _, _, words = fault_of(local, file, run=2, to=f"there:{local.source}/below")

    assert refused.value.fault.kind == kind == "permanent"
    assert "watched" in words


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\udcffb", "a␊b", "‛a"])
def test_a_name_that_no_list_can_carry_is_said_before(local: Lab, name: str) -> None:
    """Such a file is blocked alone, with the reason, and is never passed over in silence."""
    options = local.request().options

    assert local.action.refuses(options, "/data", name)
    assert not local.action.refuses(options, "/data", "a b")
    with pytest.raises(Refused):
        local.action.start(local.request(File(str(local.source), name, 1, 1)), None)


# ---------------------------------------------------------------------- options

RULE = """\
rules:
  - name: out
    watch: /data
    match: ["{visit}/{movie}.mrc"]
    existing: process
    proof: {PROOF}
    start:
      rclone: {OPTIONS}
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('{to: "/mnt/archive"}', "copy"),
        ('{to: "archive"}', "no destination"),
        ('{to: ":sftp,host=h,pass=x:/a"}', "rclone config"),
        ('{to: "s3,access_key_id=x:a"}', "rclone config"),
        ('{to: "-x:/a"}', "no destination"),
        ('{to: "{visit}:/a"}', "no destination"),
        ('{to: "s3:a/../b"}', "upwards"),
        ('{to: "s3:a", config: "relative.conf"}', "no absolute path"),
        ('{to: "s3:a", timeout: 5s}', "60"),
        ('{to: "s3:a", if_exists: maybe}', "hold"),
        ('{to: "s3:a", transfers: 0}', "1"),
        ('{to: "s3:a", delete: true}', "delete"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_its_place(options: str, words: str) -> None:
    """Before anything runs: file, line and column; and nothing becomes an option of rclone, or another remote."""
    text = RULE.replace("{PROOF}", "required").replace("{OPTIONS}", options)
    (fault, *_) = parse_rules([("out.yaml", text)]).faults

    assert (fault.file, fault.line, fault.column > 1) == ("out.yaml", 8, True)
    assert words in f"{fault.message} {fault.hint}"


def test_a_proof_that_cannot_be_is_no_rule() -> None:
    """`verify: none` goes with `proof: none` only."""
    text = RULE.replace("{OPTIONS}", '{to: "dav:a/{visit}", verify: none}')
    wrong = parse_rules([("out.yaml", text.replace("{PROOF}", "required"))])
    right = parse_rules([("out.yaml", text.replace("{PROOF}", "none"))])

    assert ["proof: none" in fault.hint for fault in wrong.faults] == [True]
    assert right.faults == []


# ---------------------------------------------------------------------- a try before


def looked(options: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    defaults = {name: option.default for name, option in Action.OPTIONS.items()}
    return {each.what: (each.ok, f"{each.why} {each.hint}") for each in Action.look_online({**defaults, **options})}


def test_a_try_finds_all_in_order(lab: Lab) -> None:
    """rclone, its configuration, the remote, what is proof, a write; and it leaves nothing there."""
    (lab.dest / "somebody's").write_bytes(b"x")
    found = looked({**lab.far.options(), "to": lab.far.to("{visit}")})

    assert len(found) == 5 and all(ok for ok, _ in found.values()), found
    assert list(lab.everything()) == ["somebody's"]


def test_a_try_names_what_is_wrong(lab: Lab) -> None:
    """And stops there."""
    assert isinstance(lab.far, RcloneServer)
    nowhere = looked({**lab.far.options(), "to": "there:nowhere"})
    unknown = looked({**lab.far.options(), "to": "elsewhere:data"})
    unproved = looked({**lab.far.options(), "verify": "hash"})
    lab.far.configure("wrong-horse")
    wrong = looked(lab.far.options())
    lab.far.config.chmod(0o644)
    shown = looked(lab.far.options())

    assert [list(each.values())[-1][0] for each in (nowhere, unknown, wrong, shown)] == [False] * 4
    assert all(ok for ok, _ in unproved.values()) != isinstance(lab.far, WebDav)
    assert not (lab.far.there / "nowhere").exists()
    assert "chmod 600" in json.dumps(list(shown.values()))


# ---------------------------------------------------------------------- the whole daemon


def test_a_killed_daemon_goes_on_and_its_sources_may_go(tmp_path: Path) -> None:
    """Each file once, whole, proved, though the far side was killed as well; then the sources are reclaimed."""
    with S3(tmp_path / "far") as far:
        site = Site(tmp_path / "site")
        reclaim = {"proven_by": ["out"], "keep_for": "1s", "only_under": "always"}
        start = {"rclone": {**far.options(), "to": far.to("{visit}")}}
        site.write_rules(site.rule("out", match=["{visit}/*.tif"], start=start, reclaim=reclaim))
        site.settings |= {"reclaim": "enabled", "throttle": {"bandwidth": "1MB/s"}}
        path = site.data / "visit 7" / "large.tif"
        path.parent.mkdir()
        content = os.urandom(5 * MB)
        path.write_bytes(content)
        copy = far.there / "data" / "visit 7" / "visit 7" / "large.tif"
        try:
            site.start()
            site.until(lambda: bool(site.ask("SELECT 1 FROM run WHERE state = 'ACTIVE'")), 60, "it is under way")
            site.kill()
            far.kill()
            before = copy.exists()
            site.settings["throttle"] = {}
            site.start()
            far.start()
            under_way = "SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"  # under its hidden name
            site.until(lambda: not path.exists() and not site.ask(under_way), 90, "it is reclaimed")
            (about,) = site.json("explain", str(path))["rules"]
        finally:
            if site.process is not None and site.process.poll() is None:
                site.kill()

        assert not before
        assert copy.read_bytes() == content
        assert about["stage"] == "reclaimed"
        assert "there:data/visit 7" in about["because"]
