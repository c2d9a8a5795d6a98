"""One order of the `rclone` action in a worker: look, transfer, or prove.

    look      what stands at the targets; by digest where something stands
    transfer  what is missing, without replacing; and what may be replaced
    prove     the digests that the remote tells, or of what is read there again, and those of the sources

No file gets its name before it is whole: rclone writes aside and renames, or
the remote shows whole objects only; where neither holds, a directory of ours is
filled first, and its files are moved. What rclone says of itself is no proof.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import Any

from trigger_daemon.actions._batch import (
    NEVER,
    File,
    Sources,
    alone,
    carried_out,
    files_of,
    no_record,
    slices,
    strangers,
    touched,
)
from trigger_daemon.actions._copy_files import Trouble, at_source, printable
from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._copy_system import write_out
from trigger_daemon.actions._lane import serve
from trigger_daemon.actions._rclone_hash import DIGESTS, PIECE, common
from trigger_daemon.actions._rclone_run import Entry, Far, Moving, Rclone
from trigger_daemon.actions._rclone_target import Target, target_of
from trigger_daemon.actions._rclone_words import RETRY, trouble_of
from trigger_daemon.actions._written import Written
from trigger_daemon.failpoints import fail_point

DOWNLOADED = "sha256"  # what is compared of a file that is read back
SUFFIX = ".partial"
PASSES = 2  # over a batch: each request has been tried again before, and rclone multiplies that
TRIMMED = 60  # of a long name rclone keeps the beginning: at least so much
SLACK_NS = 10**9  # between two tellings of one time

_PARTIAL = re.compile(r"(?P<name>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)


class Job:
    """See the module; what a lane asks of it is `run`, and how far it is."""

    def __init__(self, order: Mapping[str, Any], state_dir: str, pace: Pace) -> None:
        self.run_id: int = order["run"]
        self.attempt: int = order["attempt"]
        self.files_done = self.bytes_done = self.moving = 0
        self._order = order
        self._options: Mapping[str, Any] = order["options"]
        self._target: Target = target_of(self._options, order["written"])
        self._state_dir = state_dir
        self._pace = pace
        self._files = files_of(order)
        self._sources = Sources(pace)
        self._differs: dict[str, str] = {}
        self._proved: list[dict[str, Any]] = []
        self._output: dict[str, Any] | None = None
        self._digests: dict[tuple[bytes, str], str] = {}

    def spare(self, rooms: Mapping[str, Any]) -> None:
        """A remote has no volume of ours."""

    def run(self) -> dict[str, Any]:
        """Carry the order out and return the report."""
        status, fault = carried_out(self._carry_out)
        if status == "cancelled":
            self._pace.cancelled = self._pace.paused = False  # what it left is removed by calls, and moves nothing
            carried_out(lambda: self._with_rclone("clean"))
        return {
            "status": status, "changed": list(self._sources.changed), "differs": self._differs,
            "files": self.files_done, "bytes": self.bytes_done, "left": False, "output": self._output,
            "members": self._proved, "fault": fault,
        }  # fmt: skip

    def _carry_out(self) -> str:
        return "cancelled" if self._order["do"] == "clean" else self._with_rclone(self._order["do"])

    def _with_rclone(self, do: str) -> str:
        with alone(self._state_dir, self.run_id, "rclone", self._pace) as lock:
            self._rclone = Rclone(
                self._order["rclone"], self._options, self._target, lock=lock, pace=self._pace,
                state_dir=self._state_dir, run=self.run_id, rerun_s=self._order["rerun_s"],
            )  # fmt: skip
            if do == "clean":
                if os.path.exists(self._mark):
                    self._sweep(self._rclone.far())
                return "cancelled"
            self._pace.doing = f"asking {self._target.remote} what it is"
            self._rclone.look_at_itself()
            (self._prove if do == "prove" else self._copy)(self._rclone.far())
        return "succeeded"

    # ------------------------------------------------------------------------ copy

    def _copy(self, far: Far) -> None:
        began = time.monotonic()
        files = self._sources.standing(self._files)
        if not files:
            return
        self._refuse(far)
        self._sweep(far)
        self._pace.doing = f"looking at {self._target.url()}"
        there = self._rclone.standing([file.name for file in files])
        standing = [file for file in files if file.name in there]
        missing = [file for file in files if file.name not in there]
        equal, ours, strange = self._judged(far, standing)
        self.files_done, self.bytes_done = len(equal), sum(file.size for file in equal)
        self._note(missing + ours)
        self._transfer(far, missing, "--ignore-existing")
        self._transfer(far, ours, "--ignore-times")  # one of the same size and time has another content
        files = self._sources.standing([replace(file, stat=NEVER) for file in files])  # the proof looks closer
        if strange := [file for file in strange if file in [replace(one, stat=file.stat) for one in files]]:
            raise strangers(self._target.url(strange[0].name), len(strange))
        self.files_done, self.bytes_done, self.moving = len(files), sum(file.size for file in files), 0
        self._output = {
            "transferred": len(missing) + len(ours), "found_equal": len(equal), "to": self._target.url(),
            "begun": self._rclone.begun, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def _refuse(self, far: Far) -> None:
        """Raise Trouble for a remote that the promises cannot be kept at, and for one that is not there."""
        target = self._target
        if far.local and any(f"{far.local}/".startswith(f"{os.fsdecode(file.root)}/") for file in self._files):
            raise Trouble("permanent", "batch", f"{target.url()} lies in the watched directory",
                          "choose a `to` outside of it: the daemon never writes where it watches")
        if not far.writes_whole and not far.moves:
            raise Trouble("person", "destination", f"{target.remote} shows files before they are whole, and cannot "
                          "rename them", "take another remote, or another action")  # fmt: skip
        if far.is_bucket and not target.static.strip("/"):
            raise Trouble("person", "destination", f"{target.remote}: is a service of buckets, and `to` names none",
                          f"write {target.remote}:BUCKET/path, {RETRY}")
        if self._options["verify"] == "hash":
            self._compared_by(far)
        self._pace.doing = f"looking at {self._rclone.url()}"
        if not self._rclone.is_there():
            if far.is_bucket:
                raise Trouble("person", "destination", f"there is no bucket {self._rclone.url()}",
                              f"make it, which the daemon never does, or correct `to` in the rule, {RETRY}")
            raise Trouble("transient", "destination", f"{self._rclone.url()} is not there",
                          "create the directory, or mount it there; the transfer goes on by itself", counts=False)

    def _compared_by(self, far: Far) -> str:
        """Return the digest that both sides have. Raises Trouble if there is none."""
        if not (name := common(far.hashes)):
            raise Trouble("person", "destination", f"{self._target.remote} keeps no digest that could be compared",
                          "set `verify: download`, which reads each file back, or `verify: none` with `proof: none`")
        return name

    def _judged(self, far: Far, files: Sequence[File]) -> tuple[list[File], list[File], list[File]]:
        """Return which of the files that stand there are equal to their sources, which are ours, and a stranger's."""
        equal: list[File] = []
        ours: list[File] = []
        strange: list[File] = []
        replaces = self._options["if_exists"] == "replace"
        for some in slices(files):
            there = self._digested(far, some, times=True)
            for file in some:
                entry = there.get(file.name)
                if entry is not None and self._is_equal(far, file, entry):
                    equal.append(file)
                elif entry is None or replaces or self._is_ours(far, file, entry):  # None: it has gone meanwhile
                    ours.append(file)
                else:
                    strange.append(file)
        return equal, ours, strange

    def _digested(self, far: Far, files: Sequence[File], *, times: bool) -> dict[str, Entry]:
        """Return what stands there, with digests as the rule has them told; without where it wants none."""
        self._pace.doing = f"comparing with {self._target.url()}"
        names = [file.name for file in files]
        size = sum(file.size for file in files)
        verify = self._options["verify"]
        hash = self._compared_by(far) if verify == "hash" else ""
        there = self._rclone.standing(names, hash=hash, times=times and far.keeps_times, size=size)
        if verify == "download":
            sizes = {file.name: file.size for file in files}
            alike = [name for name, entry in there.items() if entry.size == sizes[name]]
            read = self._rclone.read(alike, hash=DOWNLOADED, size=size) if alike else {}
            there |= {name: replace(there[name], digest=digest) for name, digest in read.items()}
        return there

    def _hash(self, far: Far) -> str:
        """Return what rclone calls the digest that is compared; '' for none."""
        verify = self._options["verify"]
        return DOWNLOADED if verify == "download" else self._compared_by(far) if verify == "hash" else ""

    def _is_equal(self, far: Far, file: File, entry: Entry) -> bool:
        if entry.size != file.size:
            return False
        if hash := self._hash(far):
            return bool(entry.digest) and entry.digest == self._digest(file, hash)
        return far.keeps_times and _close(entry.mtime_ns, file.mtime_ns, far)

    def _is_ours(self, far: Far, file: File, entry: Entry) -> bool:
        """Say whether an earlier version of ours stands there: by size and time, by size where no times are kept."""
        versions = Written(self._state_dir).versions(self._target.url(file.name))
        return any(
            size == entry.size and (not far.keeps_times or _close(entry.mtime_ns, mtime_ns, far))
            for size, mtime_ns in versions
        )

    def _digest(self, file: File, hash: str) -> str:
        """Read a source and return its digest. Raises Trouble if it is not what it was, Cancelled."""
        known = self._digests.get((file.source, hash))
        if known is not None:
            return known
        self._pace.doing = f"reading {printable(file.source)}"
        made = DIGESTS[hash][1]()
        buffer = memoryview(bytearray(PIECE))
        try:
            with open(file.source, "rb", buffering=0) as source:
                write_out(source.fileno())
                while True:
                    self._pace.spend(min(self._pace.piece(), PIECE))
                    got = source.readinto(buffer[: min(self._pace.piece(), PIECE)])
                    if not got:
                        break
                    made.update(buffer[:got])
                now = os.fstat(source.fileno())
        except FileNotFoundError:
            return ""  # it is told as changed when it is looked for
        except OSError as fault:
            raise at_source(fault, file.source) from None
        if (now.st_ctime_ns, now.st_ino) != file.stat and (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns):
            raise touched(file)
        self._digests[file.source, hash] = made.hexdigest()
        return made.hexdigest()

    def _note(self, files: Sequence[File]) -> None:
        """Remember what is about to be written, before it is."""
        Written(self._state_dir).add((self._target.url(file.name), file.size, file.mtime_ns) for file in files)

    # -------------------------------------------------------------------- transfer

    def _transfer(self, far: Far, files: Sequence[File], how: str) -> None:
        if not files:
            return
        fail_point("rclone.transfer")
        self._touch_mark()
        self._pace.doing = f"transferring to {self._target.url()}"
        before = self.files_done, self.bytes_done
        # A second try of a whole transfer with --ignore-times would send everything once more.
        retries = min(PASSES, int(self._options["retries"])) if how == "--ignore-existing" else 1
        stage = "" if far.writes_whole else self._stage()
        for root, some in _by_root(files):
            names = [file.name for file in some]
            size = sum(file.size for file in some)
            source = os.fsdecode(root) or "/"
            done, moved = self.files_done, self.bytes_done
            if stage:
                self._call("copy", source, self._rclone.url(stage), names, (), size, retries)
                source, self.files_done = self._rclone.url(stage), done  # they are there when they have been moved
            self._call("move" if stage else "copy", source, self._target.url(), names, (how,), size, retries)
            self.files_done, self.bytes_done, self.moving = done + len(some), moved + size, 0
        fail_point("rclone.transferred")
        if stage:
            self._rclone.purge(stage)
        with suppress(FileNotFoundError):
            os.unlink(self._mark)
        self.files_done, self.bytes_done = before[0] + len(files), before[1] + sum(file.size for file in files)

    def _call(
        self, verb: str, source: str, to: str, names: Sequence[str], how: Sequence[str], size: int, retries: int
    ) -> None:  # fmt: skip
        """Copy or move, and see that every name was told of. Raises Trouble."""
        moving = _Told(self)
        end = self._rclone.transfer(verb, source, to, names, how, size=size, moving=moving, retries=retries)
        untold = {name for name in names if name not in moving.done}
        if not untold and not end.code:
            return
        self.moving = 0
        # Those that are no longer what they were are told as changed, and are no fault.
        left = self._sources.standing([file for file in self._files if file.name in untold])
        if end.code and (left or not untold):
            raise trouble_of(end.code, end.said.splitlines(), self._target)
        if left:
            raise Trouble("transient", "file", f"rclone said nothing of {printable(left[0].source)}",
                          "it is looked at again by itself: somebody may have put a file there at that moment")

    # ---------------------------------------------------------------------- remains

    @property
    def _mark(self) -> str:
        """Return the name of what says that something may be left of a transfer of this run."""
        return os.path.join(self._state_dir, f"run-{self.run_id}.begun")

    def _touch_mark(self) -> None:
        try:
            with open(self._mark, "wb"):
                pass
        except OSError as fault:
            raise no_record(self._mark, fault) from None

    def _stage(self) -> str:
        """Return our own directory at the destination, of this run and this daemon."""
        path = os.path.join(self._state_dir, "owner")
        try:
            with suppress(FileExistsError), open(path, "x") as file:
                file.write(os.urandom(6).hex())
            with open(path) as file:
                return f".trigger-daemon-{file.read()}-{self.run_id}"
        except OSError as fault:
            raise no_record(path, fault) from None

    def _sweep(self, far: Far) -> None:
        """Remove what an rclone of this run that was killed has left there: names of its own beside our targets."""
        if not os.path.exists(self._mark):
            return
        self._pace.doing = f"removing what is left of an earlier attempt at {self._target.url()}"
        if not far.writes_whole:
            self._rclone.purge(self._stage())
        elif far.writes_aside:
            places: dict[str, list[str]] = {}
            for file in self._files:
                directory, _, name = file.name.rpartition("/")
                places.setdefault(directory, []).append(name)
            if left := [path for path in self._rclone.below(sorted(places), SUFFIX) if _is_left(path, places)]:
                self._rclone.delete(left)
        with suppress(FileNotFoundError):
            os.unlink(self._mark)

    # ----------------------------------------------------------------------- proof

    def _prove(self, far: Far) -> None:
        if not (hash := self._hash(far)):
            raise Trouble("person", "batch", "this rule has no proof made: `verify: none`",
                          "set `verify: hash` or `verify: download`")
        files = self._sources.standing(self._files)
        if files and not self._rclone.is_there():
            raise Trouble("transient", "destination", f"{self._rclone.url()} is not there",
                          "is it mounted there? it is looked at again by itself", counts=False)
        for some in slices(files):
            there = self._digested(far, some, times=False)
            digests = {file.name: self._digest(file, hash) for file in some}
            kept = self._sources.standing(some)  # what changed while it was read is not what was compared
            for file in kept:
                self._judge(file, there.get(file.name), DIGESTS[hash][0], digests[file.name])
            self.files_done += len(kept)
            self.bytes_done += sum(file.size for file in kept)

    def _judge(self, file: File, entry: Entry | None, name: str, digest: str) -> None:
        where = self._target.url(file.name)
        if entry is None:
            self._differs[file.name] = f"{where} is not there"
        elif entry.size != file.size:
            self._differs[file.name] = f"{where} has {entry.size:,} bytes, its source {file.size:,}"
        elif not entry.digest:
            raise Trouble("person", "file", f"{self._target.remote} tells no digest of {where}",
                          "set `verify: download`, which reads each file back")
        elif entry.digest != digest:
            self._differs[file.name] = f"{where} has another content than its source"
        else:
            self._proved.append({
                "root": os.fsdecode(file.root), "path": file.name, "size": file.size, "mtime_ns": file.mtime_ns,
                "digest": f"{name}:{digest}", "to": where, "by": f"rclone {self._options['verify']}",
            })  # fmt: skip


class _Told(Moving):
    """How far a transfer is, as a job shows it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._before = job.files_done

    def take(self, told: Mapping[str, Any]) -> None:
        super().take(told)
        self._job.moving = self.bytes
        self._job.files_done = self._before + len(self.done)


def _by_root(files: Iterable[File]) -> Iterable[tuple[bytes, list[File]]]:
    """Yield files of one root after the other: rclone has one source."""
    for root, some in groupby(sorted(files, key=lambda file: file.root), key=lambda file: file.root):
        yield root, list(some)


def _close(a_ns: int, b_ns: int, far: Far) -> bool:
    return abs(a_ns - b_ns) <= max(SLACK_NS, far.precision_ns)


def _is_left(path: str, places: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether a name is one that rclone writes one of our files under."""
    directory, _, name = path.rpartition("/")
    found = _PARTIAL.fullmatch(name)
    if found is None or directory not in places:
        return False
    stem = found["name"]
    return any(one == stem or (len(stem) >= TRIMMED and one.startswith(stem)) for one in places[directory])


def main() -> None:
    serve(lambda state_dir: lambda order, pace: Job(order, state_dir, pace))


if __name__ == "__main__":
    main()
