"""Laws of the `copy` action: whole or not there, proven, resumed, and never in the instrument's way."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fuse_share import Share
from trigger_daemon import failpoints
from trigger_daemon.actions import Action as Provider
from trigger_daemon.actions import Context, Differs, File, Progress, Proof, Refused, Request, Unproven
from trigger_daemon.actions._copy_sums import said_by
from trigger_daemon.actions._copy_system import begin_to_write_out
from trigger_daemon.actions.copy import Action
from trigger_daemon.core.grammar import OptionFault
from trigger_daemon.core.model import Scope

MIB = 1024 * 1024
SMALL = {"large_bytes": MIB, "segment_bytes": 8 * MIB}  # so that 20 MiB are three segments
PATIENCE_S = 60.0

POINTS = [
    "copy.write", "copy.written", "copy.sync", "copy.synced", "copy.verified", "copy.proved", "copy.renamed",
    "copy.placed", "copy.large_write", "copy.large_sync", "copy.large_segment", "copy.sums", "copy.rename",
    "copy.directory_sync", "copy.unlink",
]  # fmt: skip

# A daemon in little: starts one attempt, polls it to its end, prints what it says.
DAEMON = """
import json, sys, threading
from trigger_daemon.actions import Context, File, Request
from trigger_daemon.actions.copy import Action
told = json.loads(sys.argv[1])
news = threading.Event()
action = Action(Context(told["state"], lambda run, attempt: news.set(), settings=told["settings"]))
request = Request(told["run"], told["attempt"], "r", {}, {}, tuple(File(*f) for f in told["files"]), told["options"])
handle = action.start(request, None)
print("started", flush=True)
while (progress := action.poll(request, handle)).status == "active":
    news.wait(0.2)
    news.clear()
print(progress.status, progress.fault, flush=True)
proof = action.verify(request, handle)
print(json.dumps(list(proof.members)), flush=True)
action.close()
"""


class Lab:
    """A watched directory, a destination, and a provider between them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.source = base / "source"
        self.archive = base / "archive"
        self.source.mkdir()
        self.archive.mkdir()
        self.state = base / "state"
        self.limit: float | None = None
        self.paused = False
        self.stopped: dict[str, str] = {}  # destination -> why
        self.reserve = 0
        self.reserves: dict[str, tuple[int | None, float | None]] = {}  # file system -> bytes, or a ratio
        self.runs = 0
        self._news = threading.Event()
        self._action: Action | None = None
        self.settings: dict[str, Any] = dict(SMALL)

    @property
    def action(self) -> Action:
        if self._action is None:
            self._action = Action(Context(
                str(self.state), lambda run, attempt: self._news.set(), lambda: self.limit, lambda: self.paused,
                self.settings, lambda path: self.stopped.get(path, ""), lambda path: self.reserve,
                lambda: self.reserves,
            ))  # fmt: skip
        return self._action

    def restart(self) -> None:
        """Begin another life of the daemon on the same state."""
        self.close()
        self._action = None

    def close(self) -> None:
        if self._action:
            self._action.close()

    def write(self, name: str | bytes, content: bytes) -> str:
        path = os.fsencode(self.source) + b"/" + os.fsencode(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as out:
            out.write(content)
        return os.fsdecode(name)

    def request(self, *names: str, run: int = 0, attempt: int = 1, **options: Any) -> Request:
        """Make a request for what is in the source now."""
        if not run:
            self.runs += 1
        files = []
        for name in names:
            state = os.lstat(os.fsencode(self.source) + b"/" + os.fsencode(name))
            files.append(File(str(self.source), name, state.st_size, state.st_mtime_ns))
        return Request(run or self.runs, attempt, "r", {}, {}, tuple(files), {"to": [str(self.archive)], **options})

    def wait(self, request: Request, handle: Any, until: Callable[[Progress], bool] | None = None) -> Progress:
        ends = time.monotonic() + PATIENCE_S
        while True:
            progress = self.action.poll(request, handle)
            if until(progress) if until else progress.status not in ("active", "inactive"):
                return progress
            assert time.monotonic() < ends, f"nothing came of it: {progress}"
            self._news.wait(0.02)
            self._news.clear()

    def copy(self, *names: str, **options: Any) -> Progress:
        return self.run(self.request(*names, **options))

    def run(self, request: Request) -> Progress:
        return self.wait(request, self.action.start(request, None))

    def prove(self, request: Request) -> Proof:
        proof = self.action.verify(request, None)
        assert isinstance(proof, Proof), proof
        return proof

    def there(self, where: Path | None = None) -> dict[str, bytes]:
        """Return all files at the destination, hidden ones too."""
        where = where or self.archive
        return {os.path.relpath(path, where): path.read_bytes() for path in where.rglob("*") if path.is_file()}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()
    failpoints.plan("")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def hexes(digest: str) -> Callable[[bytes], str]:
    return {
        "xxh3": lambda data: xxhash.xxh3_128(data).hexdigest(),
        "sha256": lambda data: hashlib.sha256(data).hexdigest(),
        "md5": lambda data: hashlib.md5(data).hexdigest(),
    }[digest]


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


# ------------------------------------------------------------------------- the copy


def test_fulfils_the_protocol(lab: Lab) -> None:
    """The reference provider is a provider."""
    assert isinstance(lab.action, Provider)


@pytest.mark.parametrize("digest", ["xxh3", "sha256", "md5"])
def test_a_copy_is_equal_and_its_proof_is_the_digest_of_the_destination(lab: Lab, digest: str) -> None:
    """What `verify` says is what an independent reader of the destination finds."""
    content = {"a/b/small": b"x" * 10, "empty": b"", "middle": noise(900_001), "large": noise(20 * MIB + 12345)}
    for name, data in content.items():
        lab.write(name, data)
    request = lab.request(*content, digest=digest)
    progress = lab.run(request)
    assert progress.status == "succeeded", progress

    assert lab.there() == content
    members = {member["path"]: member for member in lab.prove(request).members}
    for name, data in content.items():
        assert members[name]["digest"] == f"{digest}:{hexes(digest)(Path(members[name]['to']).read_bytes())}"
        assert members[name]["size"] == len(data)
        assert os.stat(lab.archive / name).st_mtime_ns == os.stat(lab.source / name).st_mtime_ns


def test_many_small_files_go_in_groups(lab: Lab) -> None:
    """More files than a group holds all arrive, proven."""
    content = {f"d{i % 7}/f{i}": noise(100 + i, i) for i in range(2300)}
    for name, data in content.items():
        lab.write(name, data)
    request = lab.request(*content)
    progress = lab.run(request)
    assert (progress.status, progress.files_done, progress.bytes_done) == (
        "succeeded", 2300, sum(map(len, content.values())))

    assert lab.there() == content
    assert len(lab.prove(request).members) == 2300


@pytest.mark.parametrize("name", [
    "line\nbreak", "[30.0] -b 'quoted' \"\\ *", "-rf", b"not-utf8-\xff\xfe", "é" * 127 + "x", "x" * 255,
    "dir \n/" + "y" * 255,
])  # fmt: skip
def test_any_legal_name_is_copied(lab: Lab, name: str | bytes) -> None:
    """A name is bytes; none is too strange or too long for a temporary name beside it."""
    text = lab.write(name, b"content")
    large = lab.write(os.fsencode(name)[:-1] + b"L", noise(2 * MIB))
    request = lab.request(text, large)
    assert lab.run(request).status == "succeeded"

    target = os.fsencode(lab.archive) + b"/" + os.fsencode(name)
    assert Path(os.fsdecode(target)).read_bytes() == b"content"
    assert [member["path"] for member in lab.prove(request).members] == [text, large]
    assert len(lab.there()) == 2


def test_two_destinations_are_each_proved(lab: Lab) -> None:
    """One read, two copies, two proofs for each file."""
    second = lab.base / "second"
    second.mkdir()
    content = {"s": b"small", "l": noise(20 * MIB)}
    for name, data in content.items():
        lab.write(name, data)
    request = lab.request(*content, to=[str(lab.archive), str(second)])
    assert lab.run(request).status == "succeeded"

    assert lab.there() == lab.there(second) == content
    assert len({member["to"] for member in lab.prove(request).members}) == 4


def test_one_broken_destination_does_not_stop_the_other(lab: Lab) -> None:
    """What can be copied is; the fault names the destination; the next attempt does the rest."""
    lab.write("a", b"1")
    missing = lab.base / "missing"
    request = lab.request("a", to=[str(missing), str(lab.archive)])
    progress = lab.run(request)
    assert progress.status == "failed" and progress.fault is not None
    assert progress.fault.scope is Scope.DESTINATION and progress.fault.kind == "transient"
    assert str(missing) in progress.fault.why
    assert lab.there() == {"a": b"1"}

    missing.mkdir()
    again = lab.request("a", run=request.run, attempt=2, to=[str(missing), str(lab.archive)])
    assert lab.run(again).status == "succeeded"
    assert lab.there(missing) == {"a": b"1"}
    assert len(lab.prove(again).members) == 2


def test_flat_layout_drops_directories_and_refuses_a_clash(lab: Lab) -> None:
    """Two members never render to one target: refused, and both are named."""
    for name in ("x/one", "y/two", "z/one"):
        lab.write(name, name.encode())
    assert lab.copy("x/one", "y/two", layout="flat").status == "succeeded"
    assert lab.there() == {"one": b"x/one", "two": b"y/two"}

    with pytest.raises(Refused) as refused:
        lab.copy("x/one", "z/one", layout="flat")
    assert refused.value.fault.kind == "permanent"
    assert "x/one" in refused.value.fault.why and "z/one" in refused.value.fault.why


def test_nothing_is_written_where_we_watch(lab: Lab) -> None:
    """A destination inside the watched directory is refused."""
    lab.write("a", b"1")
    with pytest.raises(Refused):
        lab.copy("a", to=str(lab.source / "copies"))


def test_a_destination_is_never_created_above_its_template(lab: Lab) -> None:
    """A missing mount is waited for; directories below the configured part are made."""
    lab.write("a", b"1")
    request = lab.request("a", to=str(lab.base / "mnt" / "S1" / "raw"))
    request = Request(request.run, 1, "r", {"session": "S1"}, {"session": "S1"}, request.files, request.options)
    progress = lab.run(request)
    assert progress.fault is not None and progress.fault.kind == "transient" and not progress.fault.counts
    assert not (lab.base / "mnt").exists()

    (lab.base / "mnt").mkdir()
    again = Request(request.run, 2, "r", {"session": "S1"}, {"session": "S1"}, request.files, request.options)
    assert lab.run(again).status == "succeeded"
    assert (lab.base / "mnt" / "S1" / "raw" / "a").read_bytes() == b"1"


def test_sums_are_what_sha256sum_checks(lab: Lab) -> None:
    """The list is merged over runs, and the ordinary tool agrees with it."""
    lab.write("d/a", b"1")
    lab.write("d/b\nc", b"2")
    lab.write("d/e", noise(2 * MIB))
    assert lab.copy("d/a", digest="sha256", sums="SHA256SUMS").status == "succeeded"
    assert lab.copy("d/b\nc", "d/e", digest="sha256", sums="SHA256SUMS").status == "succeeded"

    assert sorted(lab.there()) == ["d/SHA256SUMS", "d/a", "d/b\nc", "d/e"]
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=lab.archive / "d", capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 3, checked


def test_the_name_of_the_list_says_the_digest(lab: Lab) -> None:
    """Without `digest`, what is written into SHA256SUMS is what `sha256sum -c` expects, and the proof says so."""
    lab.write("d/a", b"1")
    request = lab.request("d/a", digest=None, sums="SHA256SUMS")
    assert lab.run(request).status == "succeeded"
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=lab.archive / "d", capture_output=True, text=True,
    )  # fmt: skip
    proof = lab.prove(request)

    assert checked.returncode == 0 and checked.stdout.count(": OK") == 1, checked
    assert [member["digest"] for member in proof.members] == ["sha256:" + hashlib.sha256(b"1").hexdigest()]


def test_a_digest_in_a_request_goes_before_the_name(lab: Lab) -> None:
    """A request that was written down with a digest goes on with it, whatever its list is called."""
    lab.write("a", b"1")
    request = lab.request("a", digest="xxh3", sums="SHA256SUMS")
    assert lab.run(request).status == "succeeded"

    assert lab.prove(request).members[0]["digest"] == "xxh3:" + hexes("xxh3")(b"1")


@pytest.mark.parametrize(("name", "digest"), [
    ("SHA256SUMS", "sha256"), ("sha256sums.txt", "sha256"), ("foo.sha256", "sha256"), ("S1_SHA256", "sha256"),
    ("SHA-256SUMS", "sha256"), ("MD5SUMS", "md5"), ("checksum.md5", "md5"), ("B3SUMS", "blake3"),
    ("BLAKE3SUMS", "blake3"), ("a.b3", "blake3"), ("XXH128SUMS", "xxh3"), ("Xxh3Sums", "xxh3"),
    ("SHA512SUMS", "sha512"), ("sums.txt", ""), ("CHECKSUMS", ""), ("square_b3.txt", ""), ("amd5", ""), ("", ""),
])  # fmt: skip
def test_what_names_of_lists_say(name: str, digest: str) -> None:
    """The usual names say their digest in upper and lower case; a chance likeness says nothing."""
    assert said_by(name) == digest


@pytest.mark.parametrize(("options", "agrees"), [
    ({"sums": "SHA256SUMS", "digest": "sha256"}, True), ({"sums": "SHA256SUMS", "digest": None}, True),
    ({"sums": "sums.txt", "digest": "md5"}, True), ({"sums": "{md5}.txt", "digest": "xxh3"}, True),
    ({"sums": "SHA256SUMS", "digest": "xxh3"}, False), ({"sums": "{session}.md5", "digest": "sha256"}, False),
    ({"sums": "SHA512SUMS", "digest": None}, False),
])  # fmt: skip
def test_a_list_never_bears_the_name_of_another_digest(lab: Lab, options: dict[str, Any], agrees: bool) -> None:
    """A `digest` that contradicts the name of `sums` is found when the rule is read, with what to do."""
    if agrees:
        lab.action.check({"to": "/a", **options})
        return
    with pytest.raises(OptionFault) as fault:
        lab.action.check({"to": "/a", **options})

    assert fault.value.hint


# --------------------------------------------------------------- what stands there


def test_foreign_content_is_held_and_named(lab: Lab) -> None:
    """A different file that we did not write is never replaced unless asked; other files go on."""
    lab.write("a", b"ours")
    lab.write("b", b"ours")
    (lab.archive / "a").write_bytes(b"else")
    progress = lab.copy("a", "b")
    assert progress.status == "failed" and progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("person", Scope.FILE)
    assert str(lab.archive / "a") in progress.fault.why and progress.fault.hint
    assert lab.there() == {"a": b"else", "b": b"ours"}

    assert lab.copy("a", if_exists="replace").status == "succeeded"
    assert lab.there() == {"a": b"ours", "b": b"ours"}


def test_equal_content_is_proof_and_is_not_written_again(lab: Lab) -> None:
    """A target equal to the source is proved by reading both, and left alone."""
    for name, data in (("a", b"same"), ("l", noise(3 * MIB))):
        lab.write(name, data)
        (lab.archive / name).write_bytes(data)
    before = os.stat(lab.archive / "a").st_ino
    request = lab.request("a", "l")
    assert lab.run(request).status == "succeeded"

    assert os.stat(lab.archive / "a").st_ino == before
    assert len(lab.prove(request).members) == 2


def test_our_own_earlier_version_is_replaced(lab: Lab) -> None:
    """A rewritten source goes over what we wrote; not over what someone made of it since."""
    lab.write("a", b"version 1")
    assert lab.copy("a").status == "succeeded"
    lab.write("a", b"version two")
    assert lab.copy("a").status == "succeeded"
    assert lab.there() == {"a": b"version two"}

    (lab.archive / "a").write_bytes(b"edited by a person")
    lab.write("a", b"version three")
    progress = lab.copy("a")
    assert progress.fault is not None and progress.fault.kind == "person"
    assert lab.there() == {"a": b"edited by a person"}


@pytest.mark.parametrize("size", [10, 3 * MIB])
@pytest.mark.parametrize("other", ["in a directory", "of another root"])
def test_what_was_written_for_another_source_is_foreign(lab: Lab, other: str, size: int) -> None:
    """Two sources with one target: equal is proof, different is held; `replace` replaces."""
    lab.write("a/x", noise(size, 1))
    lab.write("b/x", noise(size + 1, 2))

    def copy(which: str, **options: Any) -> Progress:
        if other == "in a directory":
            return lab.copy(f"{which}/x", layout="flat", **options)
        request = lab.request(f"{which}/x", **options)
        root = File(str(lab.source / which), "x", request.files[0].size, request.files[0].mtime_ns)
        return lab.run(dataclasses.replace(request, files=(root,)))

    assert copy("a").status == "succeeded"
    progress = copy("b")
    assert progress.fault is not None and (progress.fault.kind, progress.fault.scope) == ("person", Scope.FILE)
    for part in (lab.source / "a/x", lab.source / "b/x", lab.archive / "x"):
        assert str(part) in progress.fault.hint
    assert lab.there() == {"x": noise(size, 1)}

    assert copy("b", if_exists="replace").status == "succeeded"
    lab.write("a/x", noise(size + 2, 3))
    progress = copy("a")
    assert progress.fault is not None and progress.fault.kind == "person"
    assert lab.there() == {"x": noise(size + 1, 2)}

    lab.write("a/x", noise(size + 1, 2))
    assert copy("a").status == "succeeded"


@pytest.mark.parametrize("size", [10_000, 3 * MIB])
def test_two_sources_that_race_for_a_target_never_overwrite(lab: Lab, size: int) -> None:
    """Who records first has the target; the other is held, also where size and time are the same."""
    for name in ("a/x", "b/x"):
        lab.write(name, noise(size, ord(name[0])))
        os.utime(lab.source / name, ns=(10**18, 10**18))
    requests = [lab.request(f"{name}/x", layout="flat") for name in "ab"]
    lab.limit = size  # both look at the target before either has it
    handles = [lab.action.start(request, None) for request in requests]
    ended = [lab.wait(request, handle) for request, handle in zip(requests, handles, strict=True)]
    assert sorted(progress.status for progress in ended) == ["failed", "succeeded"]
    winner = [progress.status for progress in ended].index("succeeded")
    before = lab.there()
    assert before == {"x": noise(size, ord("ab"[winner]))}

    again = dataclasses.replace(requests[1 - winner], attempt=2)
    lab.limit = None
    progress = lab.run(again)
    assert progress.fault is not None and progress.fault.kind == "person", progress
    assert lab.there() == before


def test_records_of_an_earlier_version_name_no_source(lab: Lab) -> None:
    """A store without sources is taken over; what it knows as ours is foreign unless equal."""
    lab.write("a", b"one")
    assert lab.copy("a").status == "succeeded"
    lab.close()
    with sqlite3.connect(lab.state / "copy.db") as db:
        db.execute("ALTER TABLE wrote DROP COLUMN source")
        db.execute("ALTER TABLE wrote DROP COLUMN before_source")
    db.close()
    lab.restart()
    assert lab.copy("a").status == "succeeded"
    lab.write("a", b"second")
    progress = lab.copy("a")
    assert progress.fault is not None and progress.fault.kind == "person"
    assert lab.copy("a", if_exists="replace").status == "succeeded"
    lab.write("a", b"the third")
    assert lab.copy("a").status == "succeeded"


def test_a_target_that_is_the_source_is_no_copy(lab: Lab) -> None:
    """A hard link to the source is refused: it would prove nothing."""
    lab.write("a", b"1")
    os.link(lab.source / "a", lab.archive / "a")
    progress = lab.copy("a")

    assert progress.fault is not None and progress.fault.kind == "person" and "source itself" in progress.fault.why


def test_a_link_at_the_target_is_not_followed(lab: Lab) -> None:
    """A symbolic link is foreign; replacing it replaces the link, not what it names."""
    lab.write("a", b"new")
    victim = lab.base / "victim"
    victim.write_bytes(b"precious")
    (lab.archive / "a").symlink_to(victim)
    progress = lab.copy("a")
    assert progress.fault is not None and progress.fault.kind == "person"

    assert lab.copy("a", if_exists="replace").status == "succeeded"
    assert victim.read_bytes() == b"precious" and not (lab.archive / "a").is_symlink()


# --------------------------------------------------------------------- the source


def test_a_changed_source_is_reported_and_never_proved(lab: Lab) -> None:
    """A file that is not the manifest's version any more is left out; the others arrive."""
    names = [lab.write(name, b"12345") for name in ("gone", "grown", "touched", "swapped", "good")]
    request = lab.request(*names)
    (lab.source / "gone").unlink()
    (lab.source / "grown").write_bytes(b"123456")
    os.utime(lab.source / "touched", ns=(1, 1))
    (lab.source / "swapped").unlink()
    (lab.source / "swapped").symlink_to(lab.source / "good")
    progress = lab.run(request)

    assert progress.status == "succeeded"
    assert set(progress.changed) == {"gone", "grown", "touched", "swapped"}
    assert lab.there() == {"good": b"12345"}
    proof = lab.prove(request)
    assert [member["path"] for member in proof.members] == ["good"] and set(proof.changed) == set(progress.changed)


def test_what_is_written_through_a_map_after_it_was_read_is_seen(lab: Lab) -> None:
    """Also to a page that was in memory only: else the file would look as it was, and be taken for what was copied."""
    size = 9 * MIB  # of less, the whole disk is synced, and here that of the source as well
    path = lab.source / lab.write("mapped", b"")
    last = lab.source / lab.write("last", b"on the disk: so nothing is begun with ahead")
    with last.open("rb") as file:
        os.fsync(file.fileno())
    with path.open("r+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as mapped:
            mapped[:5] = b"first"
            request = lab.request("mapped", "last")
            assert lab.run(request).status == "succeeded"
            before = path.stat()
            mapped[:5] = b"other"

    assert lab.there()["mapped"][:5] == b"first"
    assert path.stat().st_mtime_ns > before.st_mtime_ns


def test_the_disk_begins_with_all_before_the_first_is_waited_for(lab: Lab) -> None:
    """Files that were just written: each would be waited for by itself, and of those on their disk nothing is asked."""
    paths = [os.fsencode(lab.source / lab.write(f"{n}", noise(20_000))) for n in range(3)]
    if _in_memory_only(paths[0]) is None:
        pytest.skip("this kernel does not tell: Linux 6.5 does")
    before = [_in_memory_only(path) for path in paths]
    with open(paths[2], "rb") as file:
        os.fsync(file.fileno())
    begin_to_write_out(paths)
    skipped = [_in_memory_only(path) for path in paths]
    begin_to_write_out([paths[2], b"/nowhere", *paths[:2]])

    assert before == [5, 5, 5]
    assert skipped == [5, 5, 0]
    assert [_in_memory_only(path) for path in paths] == [0, 0, 0]


def _in_memory_only(path: bytes) -> int | None:
    """Return how many pages of a file are, None where that is not told."""
    told, span = (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 2)(0, 0)
    with open(path, "rb") as file:
        if ctypes.CDLL(None).syscall(451, file.fileno(), span, told, 0) != 0:
            return None
    return told[1]


def test_a_large_source_written_to_while_copied_is_dropped(lab: Lab) -> None:
    """A change during the copy is found at the end at the latest; no part of it stays."""
    lab.limit = 10e6
    lab.write("l", noise(24 * MIB))
    request = lab.request("l")
    handle = lab.action.start(request, None)
    lab.wait(request, handle, lambda progress: progress.bytes_done > 0)
    with open(lab.source / "l", "r+b") as out:
        out.write(b"changed")
    lab.limit = None
    progress = lab.wait(request, handle)

    assert progress.status == "succeeded" and progress.changed == ("l",)
    assert lab.there() == {}


@pytest.mark.parametrize("is_there", [True, False])
def test_an_emptied_root_is_not_believed_to_be_deletion(lab: Lab, is_there: bool) -> None:
    """All gone looks like a lost mount: the attempt waits, the file is not `changed`."""
    lab.write("d/a", b"1")
    request = lab.request("d/a")
    shutil.rmtree(lab.source)
    if is_there:
        lab.source.mkdir()
    progress = lab.run(request)

    assert progress.status == "failed" and progress.fault is not None and progress.fault.kind == "transient"
    assert progress.changed == ()


def test_files_whose_directory_is_gone_are_gone(lab: Lab) -> None:
    """A directory renamed, removed or replaced below a healthy root is no lost mount."""
    names = [lab.write(name, b"1") for name in ("renamed/x/a", "removed/a", "replaced/a", "good")]
    request = lab.request(*names)
    (lab.source / "renamed").rename(lab.source / "elsewhere")
    shutil.rmtree(lab.source / "removed")
    shutil.rmtree(lab.source / "replaced")
    (lab.source / "replaced").write_bytes(b"a file")
    progress = lab.run(request)

    assert progress.status == "succeeded", progress
    assert set(progress.changed) == set(names) - {"good"}
    assert [member["path"] for member in lab.prove(request).members] == ["good"]


def test_an_emptied_directory_may_be_a_lost_mount(lab: Lab) -> None:
    """A disk mounted below the root leaves an empty directory when it goes: its files are waited for."""
    lab.write("good", b"1")
    lab.write("disk/a", b"1")
    request = lab.request("disk/a")
    (lab.source / "disk/a").unlink()
    progress = lab.run(request)

    assert progress.status == "failed" and progress.fault is not None and progress.fault.kind == "transient"
    assert progress.changed == ()


@pytest.mark.parametrize("size", [MIB // 2, 24 * MIB])
def test_a_source_written_to_while_copied_with_its_time_put_back_is_read_again(lab: Lab, size: int) -> None:
    """Size and mtime as before do not hide that a copy may be torn."""
    lab.limit = size / 2
    lab.write("a", noise(size))
    state = os.stat(lab.source / "a")
    request = lab.request("a")
    handle = lab.action.start(request, None)
    lab.wait(request, handle, lambda _: any(lab.there()))  # the source is open
    with open(lab.source / "a", "r+b") as out:
        out.write(b"changed")
    os.utime(lab.source / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
    lab.limit = None
    progress = lab.wait(request, handle)

    assert progress.status == "failed" and progress.fault is not None and progress.fault.kind == "transient"
    assert "a" not in lab.there() and progress.changed == ()  # the same version: nobody else would send it


# ----------------------------------------------------------- what a file says of itself


HEADER = b"Content-MD5: ...\r\n\x0c\x1a\x04\xd5"


def image(lab: Lab, name: str, size: int, *, flip: int | None = None) -> File:
    """Write an image with a payload of `size` bytes, whose byte `flip` was damaged after its digest was made."""
    payload = bytearray(noise(size, len(name)))
    said = hashlib.md5(payload).hexdigest()
    if flip is not None:
        payload[flip] ^= 1
    lab.write(name, HEADER + payload + b"\r\n--end--;\r\n")
    state = os.stat(lab.source / name)
    content = f"md5:{said}:{len(HEADER)}:{size}"
    return File(str(lab.source), name, state.st_size, state.st_mtime_ns, content=content)


def images(lab: Lab, *files: File, run: int = 1, attempt: int = 1, own_digest: str = "verify", **more: Any) -> Request:
    options = {"to": [str(lab.archive)], "own_digest": own_digest, **more}
    return Request(run, attempt, "r", {}, {}, files, options)


def held_for(progress: Progress, name: str) -> bool:
    """Tell whether a person is asked about this image, and told where it was damaged."""
    fault = progress.fault
    return (progress.status == "failed" and fault is not None and bool(fault.hint)
            and (fault.kind, fault.scope) == ("person", Scope.FILE) and f"/{name}: " in fault.why
            and "does not match its own Content-MD5: it was damaged before it was copied" in fault.why)  # fmt: skip


LARGE_AT = 20 * MIB - 1  # in the last of three segments


@pytest.mark.parametrize("size", [1, 100_000, 3 * MIB + 5, 20 * MIB])
def test_an_intact_image_is_proved_against_its_own_digest(lab: Lab, size: int) -> None:
    """The proof says which digest of the file itself was verified, and says nothing for files without one."""
    lab.settings["large_bytes"] = 8 * MIB
    plain = lab.write("plain", b"1")
    file = image(lab, "x.cbf", size)
    request = images(lab, file, *lab.request(plain).files)
    progress = lab.run(request)
    assert progress.status == "succeeded", progress

    first, second = lab.prove(request).members
    assert first["content"] == "md5:" + file.content.split(":")[1] and "content" not in second
    lab.action.forget(request.run)
    assert lab.prove(request).members[0]["content"] == first["content"]


@pytest.mark.parametrize(("size", "flip"), [(100_000, 0), (100_000, 99_999), (20 * MIB, 0), (20 * MIB, LARGE_AT)])
@pytest.mark.parametrize("others", [1, 30])
def test_an_image_damaged_before_the_copy_is_held_and_the_others_are_copied(
    lab: Lab, size: int, flip: int, others: int
) -> None:
    """A byte flipped after the detector's digest: no final name, nothing temporary; what is intact is proved."""
    second = lab.base / "second"
    second.mkdir()
    good = [image(lab, f"d/good{i}.cbf", 5_000 + i) for i in range(others)] + [image(lab, "large.cbf", 9 * MIB)]
    bad = image(lab, "d/bad.cbf", size, flip=flip)
    to = [str(lab.archive), str(second)]
    progress = lab.run(images(lab, good[0], bad, *good[1:], to=to, sums="SHA256SUMS"))

    assert held_for(progress, "d/bad.cbf") and progress.fault and "more)" not in progress.fault.why
    for place in (lab.archive, second):
        there = {name for name in lab.there(place) if not name.endswith("SHA256SUMS")}
        assert there == {file.path for file in good}
        assert b"bad.cbf" not in (place / "d" / "SHA256SUMS").read_bytes()
    assert len(lab.prove(images(lab, *good, to=to)).members) == 2 * len(good)


@pytest.mark.parametrize("size", [100_000, 20 * MIB])
def test_without_the_option_an_image_is_copied_as_it_is(lab: Lab, size: int) -> None:
    """`own_digest: ignore`, and requests of earlier versions: the copy equals the source, and that is all it says."""
    bad = image(lab, "bad.cbf", size, flip=7)
    for run, request in enumerate((images(lab, bad, own_digest="ignore"), lab.request("bad.cbf", run=2)), 1):
        assert lab.run(request).status == "succeeded", run
        assert lab.there() == {"bad.cbf": (lab.source / "bad.cbf").read_bytes()}
        assert "content" not in lab.prove(request).members[0]


@pytest.mark.parametrize("size", [100_000, 3 * MIB])
def test_an_equal_target_is_no_proof_of_a_damaged_image(lab: Lab, size: int) -> None:
    """Both sides may have the same damage: the file's own digest is asked there too, in `start` and in `verify`."""
    bad, good = image(lab, "bad.cbf", size, flip=7), image(lab, "good.cbf", size)
    for file in (bad, good):
        shutil.copy(lab.source / file.path, lab.archive / file.path)
    found = lab.action.verify(images(lab, bad, good), None)
    assert isinstance(found, Unproven) and "its own Content-MD5" in found.fault.why and found.fault.kind == "person"

    assert held_for(lab.run(images(lab, bad, good, run=2)), "bad.cbf")
    assert held_for(lab.run(images(lab, bad, good, run=3, if_exists="replace")), "bad.cbf")
    assert "content" in lab.prove(images(lab, good, run=4)).members[0]


def test_a_source_that_rotted_does_not_go_over_its_good_copy(lab: Lab) -> None:
    """What was copied while it was intact stays, whatever the disk makes of the source later."""
    good = image(lab, "x.cbf", 100_000)
    assert lab.run(images(lab, good)).status == "succeeded"
    content = lab.there()
    rotten = image(lab, "x.cbf", 100_000, flip=7)
    os.utime(lab.source / "x.cbf", ns=(0, good.mtime_ns))
    progress = lab.run(images(lab, dataclasses.replace(rotten, mtime_ns=good.mtime_ns), run=2))

    assert held_for(progress, "x.cbf")
    assert lab.there() == content


@pytest.mark.parametrize("point", ["copy.written", "copy.synced", "copy.verified", "copy.proved", "copy.renamed"])
def test_a_repeated_attempt_does_not_skip_the_own_digest(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whatever step the worker died at, the repetition holds what is damaged and proves the rest in full."""
    bad, good = image(lab, "bad.cbf", 50_000, flip=7), image(lab, "good.cbf", 50_000)
    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:kill@1")
    assert not held_for(lab.run(images(lab, bad, good)), "bad.cbf")
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()

    assert held_for(lab.run(images(lab, bad, good, attempt=2)), "bad.cbf")
    assert list(lab.there()) == ["good.cbf"]
    assert "content" in lab.prove(images(lab, good)).members[0]


@pytest.mark.parametrize("flip", [None, 0, LARGE_AT])
def test_a_resumed_large_image_is_proved_as_a_whole(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, flip: int | None
) -> None:
    """What an earlier attempt left counts too: its damage is found, and without damage nothing is copied twice."""
    file = image(lab, "l.cbf", 20 * MIB, flip=flip)
    monkeypatch.setenv("TRIGGER_FAIL", "copy.large_segment:kill@2")
    assert lab.run(images(lab, file)).status == "failed"
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()
    progress = lab.run(images(lab, file, attempt=2))

    assert progress.output["resumed_bytes"] == 16 * MIB
    if flip is None:
        assert progress.status == "succeeded" and "content" in lab.prove(images(lab, file)).members[0]
    else:
        assert held_for(progress, "l.cbf") and lab.there() == {}


@pytest.mark.parametrize(("point", "left"), [("copy.proved", []), ("copy.renamed", ["bad.cbf"])])
def test_a_proof_without_the_own_digest_is_not_enough_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, point: str, left: list[str]
) -> None:
    """What was proved while nobody asked for the file's own digest is proved again once somebody does."""
    bad = image(lab, "bad.cbf", 50_000, flip=7)
    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:kill@1")
    assert lab.run(images(lab, bad, own_digest="ignore")).status == "failed"
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()

    assert held_for(lab.run(images(lab, bad, attempt=2)), "bad.cbf")
    assert list(lab.there()) == left
    assert not isinstance(lab.action.verify(images(lab, bad), None), Proof)


@pytest.mark.parametrize("content", [
    "md5", "md5:xyz:0:1", f"sha1:{'0' * 32}:0:1", f"md5:{'0' * 32}:-1:1", f"md5:{'0' * 32}:0", f"md5:{'0' * 32}:0:1:2",
    f"md5:{'0' * 32}:0:1025", f"md5:{'0' * 32}:1025:0", f"md5:{'0' * 32}:999999999999999999:1",
    f"md5:{'0' * 32}:{'9' * 5000}:1", f"md5:{'0' * 32}:\u0661:1", "\udcff",
])  # fmt: skip
def test_a_digest_that_no_file_could_match_is_a_fault_of_this_file(lab: Lab, content: str) -> None:
    """Malformed, or of bytes the file does not have: said of this file, for good; the others are copied."""
    for name in ("a", "b"):
        lab.write(name, b"x" * 1024)
    wrong, right = lab.request("a", "b").files
    wrong = dataclasses.replace(wrong, content=content)
    progress = lab.run(images(lab, wrong, right))

    assert progress.fault is not None and progress.fault.hint and f"{lab.source}/a: " in progress.fault.why
    assert (progress.fault.kind, progress.fault.scope) == ("permanent", Scope.FILE)
    assert lab.there() == {"b": b"x" * 1024}
    assert not isinstance(lab.action.verify(images(lab, wrong, right), None), Proof)


# ------------------------------------------------------------- disks that misbehave


@pytest.mark.parametrize(("name", "point"), [("small", "copy.flip"), ("large", "copy.large_flip")])
def test_a_bit_flipped_on_the_way_to_the_disk_is_caught(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, point: str
) -> None:
    """What is read back is compared: once wrong it is written anew, twice wrong is a person's matter."""
    lab.write(name, noise(100 if name == "small" else 20 * MIB))
    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:flag@1")
    request = lab.request(name)
    assert lab.run(request).status == "succeeded"
    assert lab.there() == {name: (lab.source / name).read_bytes()}
    (lab.archive / name).unlink()
    lab.restart()

    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:flag")
    progress = lab.copy(name)
    assert progress.status == "failed" and progress.fault is not None and progress.fault.kind == "person"
    assert progress.fault.scope is Scope.DESTINATION
    assert lab.there() == {}


@pytest.mark.parametrize(("name", "point"), [("small", "copy.sync"), ("large", "copy.large_sync")])
def test_after_a_failed_sync_all_is_written_anew(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, point: str
) -> None:
    """A second sync of the same data proves nothing, so there is none: the data is written once more."""
    lab.write(name, noise(100 if name == "small" else 20 * MIB))
    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:eio@1")
    assert lab.copy(name).status == "succeeded"
    assert lab.there() == {name: (lab.source / name).read_bytes()}
    (lab.archive / name).unlink()
    lab.restart()

    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:eio")
    progress = lab.copy(name)
    assert progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("transient", Scope.DESTINATION)
    assert lab.there() == {}


@pytest.mark.parametrize(("code", "kind"), [("enospc", "transient"), ("edquot", "transient"), ("erofs", "person"),
                                            ("eacces", "person"), ("estale", "transient")])  # fmt: skip
@pytest.mark.parametrize(("name", "point"), [("small", "copy.write"), ("large", "copy.large_write")])
def test_errors_of_the_destination_say_who_must_act(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, point: str, code: str, kind: str
) -> None:
    """No room and a mount that is away mend themselves; a read-only disk needs a person."""
    lab.write(name, noise(100 if name == "small" else 20 * MIB))
    monkeypatch.setenv("TRIGGER_FAIL", f"{point}:{code}")
    progress = lab.copy(name)

    assert progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == (kind, Scope.DESTINATION)
    assert str(lab.archive / name) in progress.fault.why
    assert not [there for there in lab.there() if not there.startswith(".")]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    point = tmp_path / "tiny"
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(point)], capture_output=True).returncode:
        pytest.skip("mount is refused here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.serial
@needs_root
def test_a_full_disk_is_waited_for(lab: Lab, tiny_disk: Path) -> None:
    """What fits is there and whole, nothing partial stays, and the rest goes on when there is room."""
    names = [lab.write(f"f{i}", noise(900_000, i)) for i in range(12)] + [lab.write("l", noise(5 * MIB))]
    options: dict[str, Any] = {"to": str(tiny_disk)}
    request = lab.request(*names, **options)
    progress = lab.run(request)
    assert progress.fault is not None and not progress.fault.counts
    assert (progress.fault.kind, progress.fault.scope) == ("transient", Scope.DESTINATION)
    there = lab.there(tiny_disk)
    assert 0 < len(there) < 13
    assert all(data == (lab.source / name).read_bytes() for name, data in there.items())

    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    assert lab.run(lab.request(*names, run=request.run, attempt=2, **options)).status == "succeeded"
    assert len(lab.there(tiny_disk)) == 13


@pytest.mark.serial
@needs_root
def test_a_read_only_destination_needs_a_person(lab: Lab, tiny_disk: Path) -> None:
    """EROFS does not mend itself."""
    lab.write("a", b"1")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    progress = lab.copy("a", to=str(tiny_disk))

    assert progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("person", Scope.DESTINATION)


@pytest.mark.serial
@needs_root
def test_an_unmounted_destination_is_not_filled_below_its_mount_point(lab: Lab, tiny_disk: Path) -> None:
    """An empty mount point looks like an empty disk; the mount that was there is remembered."""
    lab.write("a", b"1")
    lab.write("b", b"2")
    assert lab.copy("a", to=str(tiny_disk)).status == "succeeded"
    subprocess.run(["umount", str(tiny_disk)], check=True)
    for _ in ("a lane that knew the mount", "a new one"):
        progress = lab.copy("b", to=str(tiny_disk))
        assert progress.fault is not None
        assert (progress.fault.kind, progress.fault.scope) == ("transient", Scope.DESTINATION)
        assert "not mounted" in progress.fault.why
        assert lab.there(tiny_disk) == {}
        lab.restart()

    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tiny_disk)], check=True)
    assert lab.copy("b", to=str(tiny_disk)).status == "succeeded"


# ------------------------------------------------------------- crash and repetition


class Observer(threading.Thread):
    """Looks at the destination all the time: whatever has a final name must be whole."""

    def __init__(self, where: Path, expected: Mapping[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.where = where
        self.expected = expected
        self.wrong: list[str] = []
        self.looks = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for name, content in self.expected.items():
                try:
                    found = (self.where / name).read_bytes()
                except FileNotFoundError:
                    continue
                self.looks += 1
                if found != content:
                    self.wrong.append(name)
            time.sleep(0.001)


class Crash:
    """One attempt in a daemon of its own, killed and repeated."""

    def __init__(self, base: Path, **more: Any) -> None:
        self.lab = Lab(base)
        self.content = {f"d/s{i}": noise(3000 + i, i) for i in range(40)}
        self.content |= {"l1": noise(20 * MIB + 77, 1), "l2": noise(9 * MIB, 2)}
        for name, data in self.content.items():
            self.lab.write(name, data)
        options: dict[str, Any] = {"to": [str(self.lab.archive)], "sums": "SHA256SUMS", "digest": "sha256", **more}
        request = self.lab.request(*self.content, **options)
        self.told = json.dumps({
            "state": str(self.lab.state), "run": 1, "attempt": 1, "options": options, "settings": SMALL,
            "files": [(f.root, f.path, f.size, f.mtime_ns) for f in request.files],
        })  # fmt: skip

    def daemon(self, fail: str = "") -> subprocess.Popen[str]:
        env = {**os.environ, "TRIGGER_FAIL": fail, "PYTHONPATH": str(Path(failpoints.__file__).parents[1])}
        return subprocess.Popen([sys.executable, "-c", DAEMON, self.told], env=env, text=True, stdout=subprocess.PIPE)

    def finish(self) -> None:
        """Repeat the attempt undisturbed and check that all is as if nothing had happened."""
        last = self.daemon()
        out, _ = last.communicate(timeout=PATIENCE_S)
        lines = out.splitlines()
        assert lines[1].startswith("succeeded"), out
        there = self.lab.there()
        assert {name: there[name] for name in self.content} == self.content
        assert sorted(set(there) - set(self.content)) == ["SHA256SUMS", "d/SHA256SUMS"]
        for member in json.loads(lines[2]):
            assert member["digest"] == "sha256:" + hashlib.sha256(Path(member["to"]).read_bytes()).hexdigest()


def test_killed_at_any_moment_and_repeated_it_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL of the daemon, again and again: final names are whole at all times, and nothing else stays."""
    crash = Crash(tmp_path)
    observer = Observer(crash.lab.archive, crash.content)
    observer.start()
    chance = random.Random(7)
    for _ in range(12):
        daemon = crash.daemon()
        assert daemon.stdout
        daemon.stdout.readline()
        time.sleep(chance.uniform(0.05, 0.6))
        lanes = children(daemon.pid) if daemon.poll() is None else []
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        ends = time.monotonic() + 2.0
        while not all(map(is_gone, lanes)):
            assert time.monotonic() < ends, "a lane outlived its daemon"
            time.sleep(0.01)
    crash.finish()
    observer.stop.set()
    observer.join()

    assert observer.looks > 0 and observer.wrong == []


@pytest.mark.parametrize("who", ["kill", "kill_parent"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step_and_repeated_it_ends_the_same(tmp_path: Path, point: str, who: str) -> None:
    """Death of the worker, or of the daemon, between any two steps leaves nothing that a repetition does not mend."""
    crash = Crash(tmp_path)
    observer = Observer(crash.lab.archive, crash.content)
    observer.start()
    first = {"copy.unlink": "copy.sync:eio@1,"}.get(point, "")  # only trouble makes it remove something
    daemon = crash.daemon(f"{first}{point}:{who}@{2 if point in ('copy.write', 'copy.large_segment') else 1}")
    out, _ = daemon.communicate(timeout=PATIENCE_S)
    if who == "kill_parent":
        assert daemon.returncode == -signal.SIGKILL, out
    else:
        assert "killed by signal 9" in out, out
    crash.finish()
    observer.stop.set()
    observer.join()

    assert observer.wrong == []


def test_lanes_end_with_their_daemon(tmp_path: Path) -> None:
    """A daemon that is killed takes its workers along, in the middle of work that would go on for a minute."""
    crash = Crash(tmp_path, bandwidth=500_000)
    daemon = crash.daemon()
    ends = time.monotonic() + PATIENCE_S
    while not (lanes := children(daemon.pid)) or not crash.lab.there():
        assert time.monotonic() < ends
        time.sleep(0.02)
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    ends = time.monotonic() + 5.0
    while not all(map(is_gone, lanes)):
        assert time.monotonic() < ends, "a lane outlived its daemon"
        time.sleep(0.01)


def test_every_fail_point_is_exercised() -> None:
    """A step nobody kills at is a step nobody has thought about."""
    ours = {name for name in failpoints.names() if name.startswith("copy.")}

    assert ours == {*POINTS, "copy.flip", "copy.large_flip"}


def test_a_large_file_goes_on_where_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that were read back are compared with their digests, not copied again."""
    lab.write("l", noise(20 * MIB))
    monkeypatch.setenv("TRIGGER_FAIL", "copy.large_segment:kill@2")
    request = lab.request("l")
    assert lab.run(request).status == "failed"
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()
    progress = lab.run(lab.request("l", run=request.run, attempt=2))

    assert progress.status == "succeeded" and progress.output["resumed_bytes"] == 16 * MIB
    assert lab.there() == {"l": (lab.source / "l").read_bytes()}


def test_a_part_that_rotted_is_not_believed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed beginning is proven: one flipped bit in it and all is copied again."""
    lab.write("l", noise(20 * MIB))
    monkeypatch.setenv("TRIGGER_FAIL", "copy.large_segment:kill@2")
    request = lab.request("l")
    assert lab.run(request).status == "failed"
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()
    (part,) = lab.archive.iterdir()
    with open(part, "r+b") as out:
        out.seek(5 * MIB)
        out.write(bytes([noise(20 * MIB)[5 * MIB] ^ 4]))
    progress = lab.run(lab.request("l", run=request.run, attempt=2))

    assert progress.status == "succeeded" and progress.output["resumed_bytes"] == 0
    assert lab.there() == {"l": (lab.source / "l").read_bytes()}


def test_what_a_dead_run_left_is_removed_with_the_next_of_its_file(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leftovers of an older version go, whoever left them of ours; those of others stay."""
    lab.write("l", noise(20 * MIB))
    lab.write("s", b"old")
    monkeypatch.setenv("TRIGGER_FAIL", "copy.large_segment:kill@2")
    assert lab.copy("s", "l").status == "failed"
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()
    assert any(name.startswith(".l.") for name in lab.there())
    (lab.archive / ".l.part").write_bytes(b"somebody else's")
    lab.write("l", noise(3 * MIB))
    lab.write("s", b"new")
    assert lab.copy("s", "l").status == "succeeded"

    assert sorted(lab.there()) == [".l.part", "l", "s"]


def test_the_proof_survives_until_it_is_taken(lab: Lab) -> None:
    """After a restart `verify` still returns it; after `forget` both sides are read again."""
    lab.write("a", b"1")
    request = lab.request("a")
    assert lab.run(request).status == "succeeded"
    lab.restart()
    first = lab.prove(request)
    lab.action.forget(request.run)
    again = lab.prove(request)
    assert first.members[0]["digest"] == again.members[0]["digest"]

    lab.action.forget(request.run)
    os.utime(lab.archive / "a", ns=(5, 5))
    (lab.archive / "a").write_bytes(b"2")
    assert isinstance(lab.action.verify(request, None), Differs)


def test_a_handle_of_an_earlier_life_is_taken_up_again(lab: Lab) -> None:
    """`find` says none, `poll` of an old handle goes on with the same attempt: no attempt is burnt."""
    lab.limit = 5e6
    lab.write("l", noise(20 * MIB))
    request = lab.request("l")
    handle = json.loads(json.dumps(lab.action.start(request, None)))
    lab.wait(request, handle, lambda progress: progress.bytes_done > 0)
    lab.restart()
    assert lab.action.find(request, None) is None
    lab.limit = None
    progress = lab.wait(request, handle)

    assert progress.status == "succeeded"
    assert lab.there() == {"l": (lab.source / "l").read_bytes()}


def test_starting_twice_is_starting_once(lab: Lab) -> None:
    """An identical repetition returns the same handle and does the work once."""
    lab.write("a", b"1")
    request = lab.request("a")
    assert lab.action.start(request, None) == lab.action.start(request, None) == lab.action.find(request, None)
    assert lab.wait(request, None).status == "succeeded"


# --------------------------------------------------------------- yielding and ending


def test_cancel_removes_what_was_under_way(lab: Lab) -> None:
    """After the provider says cancelled there is nothing temporary left."""
    lab.limit = 10e6
    lab.write("l", noise(20 * MIB))
    request = lab.request("l")
    handle = lab.action.start(request, None)
    lab.wait(request, handle, lambda progress: progress.bytes_done > 0)
    assert lab.there()
    lab.action.cancel(request, handle)
    assert lab.wait(request, handle).status == "cancelled"

    assert lab.there() == {}


def test_cancel_of_what_another_life_left(lab: Lab) -> None:
    """A cancel after a restart still cleans the destination."""
    lab.limit = 10e6
    lab.write("l", noise(20 * MIB))
    request = lab.request("l")
    handle = lab.action.start(request, None)
    lab.wait(request, handle, lambda progress: progress.bytes_done > 0)
    lab.restart()
    assert lab.there()
    lab.action.cancel(request, handle)
    assert lab.wait(request, handle).status == "cancelled"

    assert lab.there() == {}


@pytest.mark.serial
def test_the_rate_is_kept(lab: Lab) -> None:
    """Two seconds at a limit carry the limit, within a fifth; several runs share it."""
    lab.limit = 20e6
    names = [lab.write(f"l{i}", noise(100_000_000, i)) for i in range(2)]
    requests = [lab.request(name) for name in names]
    handles = [lab.action.start(request, None) for request in requests]

    def moved() -> int:
        pairs = zip(requests, handles, strict=True)
        return sum(lab.action.poll(request, handle).bytes_done for request, handle in pairs)

    while not all(lab.action.poll(r, h).bytes_done for r, h in zip(requests, handles, strict=True)):
        time.sleep(0.01)
    began, before = time.monotonic(), moved()
    time.sleep(4.0)
    rate = (moved() - before) / (time.monotonic() - began)

    assert rate == pytest.approx(20e6, rel=0.2)


@pytest.mark.serial
def test_the_rules_own_rate_over_two_seconds(lab: Lab) -> None:
    """`bandwidth` of the rule holds when nothing else limits, small files included."""
    names = [lab.write(f"f{i}", noise(200_000, i)) for i in range(150)]
    lab.copy("f0")  # a warm lane
    (pid,) = lab.action._lanes.pids() if lab.action._lanes else []
    request = lab.request(*names, bandwidth=10_000_000)
    handle = lab.action.start(request, None)

    def read() -> int:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])

    first = read()
    while read() < first + 1_000_000:
        time.sleep(0.01)
    began, before = time.monotonic(), read()
    time.sleep(2.0)  # within one group, so nothing is read back meanwhile
    rate = (read() - before) / (time.monotonic() - began)
    assert lab.wait(request, handle).status == "succeeded"

    assert rate == pytest.approx(10e6, rel=0.2)


@pytest.mark.serial
def test_pause_stops_within_a_second(lab: Lab) -> None:
    """Paused, nothing moves; resumed, all is copied."""
    lab.limit = 20e6
    lab.write("l", noise(60_000_000))
    request = lab.request("l")
    handle = lab.action.start(request, None)
    lab.wait(request, handle, lambda progress: progress.bytes_done > 0)
    lab.paused = True
    time.sleep(1.6)
    before = lab.action.poll(request, handle).bytes_done
    time.sleep(1.2)
    assert lab.action.poll(request, handle).bytes_done == before

    lab.paused, lab.limit = False, None
    assert lab.wait(request, handle).status == "succeeded"


def test_a_lane_that_hangs_is_killed_and_the_next_attempt_succeeds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress for the deadline: the worker is ended, the fault names what it hung in."""
    lab.settings["deadline_s"] = 4.0
    lab.write("a", b"1")
    monkeypatch.setenv("TRIGGER_FAIL", "copy.write:hang")
    request = lab.request("a")
    progress = lab.run(request)
    assert progress.status == "failed" and progress.fault is not None
    assert progress.fault.scope is Scope.DESTINATION and "writing" in progress.fault.why
    monkeypatch.delenv("TRIGGER_FAIL")
    lab.restart()
    assert lab.run(lab.request("a", run=request.run, attempt=2)).status == "succeeded"

    assert lab.there() == {"a": b"1"}


@pytest.mark.serial
@needs_root
def test_an_attempt_has_not_ended_while_its_worker_hangs_in_the_kernel(lab: Lab) -> None:
    """A share that does not answer: not even SIGKILL ends the worker, so nothing new is started there until it does."""
    point = lab.base / "share"
    point.mkdir()
    lab.settings["deadline_s"] = 3.0
    lab.write("a", b"1")
    assert lab.copy("a").status == "succeeded"
    try:
        share = Share(point, {})
    except OSError as fault:
        pytest.skip(f"no FUSE here: {fault}")
    try:
        share.mood = "hang"
        request = lab.request("a", to=str(point))
        handle = lab.action.start(request, None)
        progress = lab.wait(request, handle, lambda progress: progress.status == "inactive")
        assert str(point) in progress.why
        with pytest.raises(Refused) as refused:
            lab.action.start(lab.request("a", to=str(point)), None)
        assert refused.value.fault.scope is Scope.DESTINATION and not refused.value.fault.counts
        lab.write("b", b"2")
        assert lab.copy("b").status == "succeeded"  # elsewhere, work goes on

        share.release()
        progress = lab.wait(request, handle)
        assert progress.status == "failed" and progress.fault is not None and progress.fault.kind == "transient"
    finally:
        share.close()


@pytest.mark.serial
@needs_root
def test_a_proof_is_not_waited_for_while_its_worker_hangs_in_the_kernel(lab: Lab) -> None:
    """Who asked for it has other things to do; it is asked for again."""
    point = lab.base / "share"
    point.mkdir()
    lab.settings["deadline_s"] = 2.0
    lab.write("a", b"1")
    try:
        share = Share(point, {"a": 1})
    except OSError as fault:
        pytest.skip(f"no FUSE here: {fault}")
    try:
        share.mood = "hang"
        answer = lab.action.verify(lab.request("a", to=str(point)), None)
    finally:
        share.close()

    assert isinstance(answer, Unproven) and "hangs" in answer.fault.why
    assert (answer.fault.kind, answer.fault.scope, answer.fault.counts) == ("transient", Scope.DESTINATION, False)


def test_lanes_are_humble(lab: Lab) -> None:
    """Workers run at low priority."""
    lab.write("a", b"1")
    assert lab.copy("a").status == "succeeded"
    (pid,) = lab.action._lanes.pids() if lab.action._lanes else []

    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    assert "trigger_daemon.actions._lane" in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_lane_imports_no_heavy_library() -> None:
    """A worker starts fast: the standard library and hashes only."""
    heavy = {"pydantic", "click", "rich", "structlog", "watchdog", "asyncio", "httpx", "ruamel"}
    code = "import sys; import trigger_daemon.actions._lane; print(*{m.partition('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert heavy & set(out.split()) == set()


@pytest.mark.parametrize(("options", "wrong"), [
    ({"to": "relative"}, "to"), ({"to": []}, "to"), ({"to": ["/a", "/a/"]}, "to"), ({"to": "/a/../b"}, "to"),
    ({"to": "/a", "sums": "x/y"}, "sums"),
])  # fmt: skip
def test_options_that_cannot_be_meant(lab: Lab, options: dict[str, Any], wrong: str) -> None:
    """Faults are found when the rule is read, and name the option."""
    with pytest.raises(OptionFault) as fault:
        lab.action.check(options)
    assert fault.value.option == wrong


def test_the_destination_is_the_part_before_the_template(lab: Lab) -> None:
    """What is down when it is down: the configured directory, not each session's."""
    options = {"to": ["/mnt/a/{session}/raw", "/mnt/b"]}

    assert lab.action.destination(options) == "/mnt/a + /mnt/b"
    assert lab.action.writes(options) == ("/mnt/a", "/mnt/b")


def test_a_destination_that_is_called_like_its_rule_is_never_made(lab: Lab) -> None:
    """Only what a template made is made: by the rule's own words, not by what a rendered path looks like."""
    lab.write("a", b"1")
    gone = lab.base / "r-2026-01-01"
    plain = dataclasses.replace(lab.request("a", to=str(gone)), written={})
    assert lab.run(plain).status == "failed"
    assert not gone.exists()

    made = dataclasses.replace(lab.request("a", to=str(gone)), written={"to": f"{lab.base}/{{rule}}-{{date}}"})
    assert lab.run(made).status == "succeeded"
    assert (gone / "a").read_bytes() == b"1"
