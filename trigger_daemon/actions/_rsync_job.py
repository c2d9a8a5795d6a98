"""One order of the `rsync` action in a worker: look, transfer, or prove, each by rsync itself.

    look      what stands at the targets: by size and time, then by content where something stands
    transfer  what is missing, without replacing; and what may be replaced
    prove     both sides read and compared by digest, file by file: only that is a proof

No file gets its name before it is whole: rsync writes aside and renames. What
an earlier attempt has left is gone on with. Two of one run never work at once:
one lock is its worker's, another that of all its rsyncs, given back by the last.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trigger_daemon.actions._batch import (
    NEVER,
    READ_BYTES_PER_S,
    File,
    Sources,
    alone,
    carried_out,
    files_of,
    no_record,
    slices,
    strangers,
    written_out,
)
from trigger_daemon.actions._child import Child, End, listed, nothing
from trigger_daemon.actions._copy_destination import Destination
from trigger_daemon.actions._copy_files import Trouble, at_destination, printable
from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._copy_room import NoRoom, Rooms
from trigger_daemon.actions._copy_system import AHEAD_FILES, RangeLocks, begin_to_write_out, syncfs
from trigger_daemon.actions._lane import serve
from trigger_daemon.actions._rsync_target import Target, environment, reaching, target_of
from trigger_daemon.actions._rsync_words import only_of_sources, trouble_of
from trigger_daemon.actions._written import VERSIONS_MAX, Written
from trigger_daemon.failpoints import fail_point
from trigger_daemon.points import ABSENT

# Beside the targets, by --delay-updates: what is not whole yet, and what waits for the others. Its own name for it:
# rrsync takes a --partial-dir for a path, and then nothing is renamed, without a word.
PARTIAL = ".~tmp~"
GUARD_S = 0.5  # how often free space is looked at, in a local directory where no room can be held
CHECKSUMS = {"xxh3": "xxh128", "md5": "md5", "sha1": "sha1"}

_ITEM = re.compile(rb"([<>ch.][fdLDS][^\s|]*) *\|")
_ESCAPE = re.compile(rb"\\#([0-7]{3})")
_PROGRESS = re.compile(rb"\s*(\d+)\s+\d+%(?:.*xfr#(\d+))?")


@dataclass(frozen=True, slots=True)
class Item:
    """What rsync says of a file: its flags as in the manual page, and the digest of the source."""

    flags: bytes
    digest: str = ""

    @property
    def is_missing(self) -> bool:
        return self.flags[2:3] == b"+"

    @property
    def is_same(self) -> bool:
        """Nothing to transfer: for `--checksum`, the contents are equal; else size and time are."""
        return self.flags.startswith(b".f") and self.flags[2:4] in (b"..", b"")


class Job:
    """See the module; what a lane asks of it is `run`, and how far it is."""

    def __init__(self, order: Mapping[str, Any], state_dir: str, pace: Pace) -> None:
        self.run_id: int = order["run"]
        self.attempt: int = order["attempt"]
        self.files_done = self.bytes_done = self.moving = 0
        self._do: str = order["do"]
        self._options: Mapping[str, Any] = order["options"]
        self._rsync: str = order["rsync"]
        self._target: Target = target_of(self._options, order["written"])
        self._reserve = 0
        self.spare(order["rooms"])
        self._state_dir = state_dir
        self._pace = pace
        self._files = files_of(order)
        self._sources = Sources(pace)
        self._differs: dict[str, str] = {}
        self._proved: list[dict[str, Any]] = []
        self._output: dict[str, Any] | None = None
        self._rerun_s: float = order["rerun_s"]
        self._guard_at = 0.0
        self._admitted = 0  # the reserve above which room is held
        self._give: Callable[[int], None] | None = None  # room back that is held for what rsync has written by now
        self._written_by = [0, 0]  # all rsyncs of a transfer: those that have ended, and the present one
        self._lock = -1

    def spare(self, rooms: Mapping[str, Any]) -> None:
        """Leave so much free from now on; any thread."""
        self._reserve = rooms["reserve"]

    def run(self) -> dict[str, Any]:
        """Carry the order out and return the report."""
        status, fault = carried_out(self._carry_out)
        if status == "cancelled":
            self._clean()
        return {
            "status": status, "changed": list(self._sources.changed), "differs": self._differs,
            "files": self.files_done, "bytes": self.bytes_done, "left": False, "output": self._output,
            "members": self._proved, "fault": fault,
        }  # fmt: skip

    def _carry_out(self) -> str:
        with alone(self._state_dir, self.run_id, "rsync", self._pace) as self._lock:
            match self._do:
                case "clean":
                    return "cancelled"
                case "prove":
                    self._prove()
                case _:
                    self._copy()
        return "succeeded"

    # ------------------------------------------------------------------------ copy

    def _copy(self) -> None:
        began = time.monotonic()
        files = self._sources.standing(self._files)
        if not files:
            return
        self._open()
        states = self._look(files)
        standing = [file for file in files if file.name in states and not states[file.name].is_missing]
        equal, others = self._compared(standing)
        self.files_done, self.bytes_done = len(equal), sum(file.size for file in equal)
        ours = others if self._options["if_exists"] == "replace" else self._of_ours(others)
        missing = [file for file in files if file.name in states and states[file.name].is_missing]
        strange = [file for file in others if file not in ours]
        with self._room(missing + ours):
            self._note(missing + ours)
            self._transfer(missing, "--ignore-existing")
            self._transfer(ours, "--ignore-times")  # one of the same size and time has another content
        files = self._sources.standing([replace(file, stat=NEVER) for file in files])  # the proof looks closer
        if strange := [file for file in strange if file in files]:
            raise strangers(self._target.url(strange[0].name), len(strange))
        if untold := [file for file in files if file.name not in states]:
            raise Trouble("transient", "file", f"{printable(untold[0].source)} could not be read",
                          "the daemon's user must be able to read it")
        self._sync()
        self.files_done, self.bytes_done, self.moving = len(files), sum(file.size for file in files), 0
        self._output = {
            "transferred": len(missing) + len(ours), "found_equal": len(equal), "to": self._target.url(),
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def _open(self) -> None:
        """See that the destination is there, and make what is below its static part. Raises Trouble."""
        target = self._target
        if not target.is_remote:
            place = self._local()
            try:
                place.make_directory(place.path)
            except OSError as fault:
                raise at_destination(fault, "create", place.path) from None
        elif target.path != target.static:
            below = target.path.removeprefix(target.static).strip("/")
            skeleton = os.path.join(self._state_dir, f"skeleton-{self.run_id}")
            try:
                os.makedirs(os.path.join(skeleton, below), exist_ok=True)
                self._pace.doing = f"making {target.url()}"
                end = self._call(
                    ["--dirs"], [os.fsencode(below)], source=skeleton, to=target.static, size=0, line=lambda line: None
                )
            except OSError as fault:
                raise no_record(skeleton, fault) from None
            finally:
                shutil.rmtree(skeleton, ignore_errors=True)
            if end.code:
                raise trouble_of(end.code, end.said, target, self._options)

    def _local(self) -> Destination:
        """Return the local destination, which is there, on the mount it was always on. Raises Trouble."""
        static = os.fsencode(self._target.static)
        place = Destination(0, os.fsencode(self._target.path), static, self._reserve)
        self._pace.doing = f"looking at {printable(static)}"
        place.open({}, RangeLocks(os.path.join(self._state_dir, "runs.lock")), self._state_dir)
        if place.sync_fd >= 0:
            os.close(place.sync_fd)
        if place.trouble:
            raise place.trouble
        return place

    def _look(self, files: Sequence[File]) -> dict[str, Item]:
        """Return what stands at the targets, by size and time."""
        self._pace.doing = f"looking at {self._target.url()}"
        return self._items(files, ["--times"], size=0)

    def _compared(self, files: Sequence[File]) -> tuple[list[File], list[File]]:
        """Return which of the files that stand there are equal to their sources, and which are not."""
        equal: list[File] = []
        others: list[File] = []
        for some in slices(files):
            items = self._by_content(some)
            for file in some:
                if (item := items.get(file.name)) is not None:
                    (equal if item.is_same else others).append(file)
        return equal, others

    def _by_content(self, files: Sequence[File]) -> dict[str, Item]:
        self._pace.doing = f"comparing with {self._target.url()}"
        checksum = f"--checksum-choice={CHECKSUMS[self._options['digest']]}"
        return self._items(files, ["--times", "--checksum", checksum], size=sum(file.size for file in files))

    def _of_ours(self, files: Sequence[File]) -> list[File]:
        """Return those where an earlier version of ours stands: of its size and time, as sparse files tell rsync."""
        found: list[File] = []
        if not files:
            return found
        versions = {file.name: Written(self._state_dir).versions(self._target.url(file.name)) for file in files}
        for rank in range(VERSIONS_MAX):
            asked = [file for file in files if file not in found and len(versions[file.name]) > rank]
            if not asked:
                break
            root = os.path.join(self._state_dir, f"phantom-{self.run_id}")
            try:
                for file in asked:
                    _phantom(os.path.join(os.fsencode(root), file.path), *versions[file.name][rank])
                items = self._items(asked, ["--times", "--modify-window=1"], size=0, source=root)
            except OSError as fault:
                raise no_record(root, fault) from None
            finally:
                shutil.rmtree(root, ignore_errors=True)
            found += [file for file in asked if file.name in items and items[file.name].is_same]
        return found

    @contextlib.contextmanager
    def _room(self, files: Sequence[File]) -> Iterator[None]:
        """Hold room for all of it, which a neighbour could take meanwhile. Raises Trouble where it does not fit."""
        path, size = os.fsencode(self._target.path), sum(file.size for file in files)
        if self._target.is_remote or not files:
            yield
            return
        self._admitted, self._written_by = self._reserve, [0, 0]
        rooms = Rooms(self._state_dir)
        try:
            with contextlib.ExitStack() as stack:
                try:
                    rooms.look(path, size, self._reserve)
                    if self._reserve:
                        self._give = stack.enter_context(rooms.hold(path, size, self._reserve, self._pace))
                except OSError as fault:
                    raise at_destination(fault, "write to", path) from None
                yield
        finally:
            self._give = None

    def _note(self, files: Sequence[File]) -> None:
        """Remember what is about to be written, before it is."""
        Written(self._state_dir).add((self._target.url(file.name), file.size, file.mtime_ns) for file in files)

    def _transfer(self, files: Sequence[File], how: str) -> None:
        if not files:
            return
        fail_point("rsync.transfer")
        self._pace.doing = f"transferring to {self._target.url()}"
        before = self.files_done, self.bytes_done

        def line(told: bytes) -> None:
            if (done := progress(told)) is not None:
                self.moving, self.files_done = done[0], min(before[0] + done[1], len(self._files))

        options = [
            "--times", how, "--delay-updates", "--info=progress2,name0,flist0", "--no-h",
            "--outbuf=N", *(("--fsync",) if self._options["fsync"] else ()),
        ]  # fmt: skip
        size = sum(file.size for file in files)
        end = self._call(options, self._named(files), size=size, line=line, writes=True)
        fail_point("rsync.transferred")
        self.bytes_done, self.moving = before[1] + size, 0
        if end.code and not (end.code in (23, 24) and only_of_sources(end.said)):
            self.files_done, self.bytes_done = before
            raise trouble_of(end.code, end.said, self._target, self._options)

    def _sync(self) -> None:
        """Make the names durable, where that can be done from here."""
        if self._target.is_remote or not self._options["fsync"]:
            return
        self._pace.doing = f"syncing {self._target.path}"
        path = os.fsencode(self._target.path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                syncfs(fd)
            finally:
                os.close(fd)
        except OSError as fault:
            raise at_destination(fault, "sync", path) from None

    # ----------------------------------------------------------------------- proof

    def _prove(self) -> None:
        files = self._sources.standing(self._files)
        if not self._target.is_remote:
            self._local()
        for some in slices(files):
            before = {file.name: self._seen(file) for file in some}
            for number, file in enumerate(some):
                self._pace.check()
                if number % AHEAD_FILES == 0:
                    begin_to_write_out([each.source for each in some[number : number + AHEAD_FILES]])
                written_out(file.source)
            items = self._by_content(some)
            kept = self._sources.standing(some)  # what changed while it was read is not what was compared
            for file in kept:
                self._judge(file, items.get(file.name), before[file.name], self._seen(file))
            self.files_done += len(kept)
            self.bytes_done += sum(file.size for file in kept)

    def _judge(self, file: File, item: Item | None, before: dict[str, int], after: dict[str, int]) -> None:
        where = self._target.url(file.name)
        if item is None:
            raise Trouble("transient", "file", f"rsync said nothing of {printable(file.source)}",
                          "the daemon's user must be able to read it")
        if item.is_missing:
            self._differs[file.name] = f"{where} is not there"
        elif not item.is_same:
            self._differs[file.name] = f"{where} has another content than its source"
        elif before != after:
            self._differs[file.name] = f"{where} was written to while it was read"
        else:
            self._proved.append({
                "root": os.fsdecode(file.root), "path": file.name, "size": file.size, "mtime_ns": file.mtime_ns,
                "digest": f"{self._options['digest']}:{item.digest}", "to": where, "by": "rsync", **after,
            })  # fmt: skip

    def _seen(self, file: File) -> dict[str, int]:
        """Return what a record says of a local copy, so that a look at it tells whether it still is what was proved."""
        if self._target.is_remote:
            return {}
        try:
            now = os.lstat(os.path.join(os.fsencode(self._target.path), file.path))
        except OSError:
            return {}
        return {"to_inode": now.st_ino, "to_mtime_ns": now.st_mtime_ns, "to_ctime_ns": now.st_ctime_ns}

    # ------------------------------------------------------------------- asking rsync

    def _items(
        self, files: Sequence[File], options: list[str], *, size: int, source: str = ""
    ) -> dict[str, Item]:  # fmt: skip
        """Return what a dry run says of each file, by name; nothing of what it cannot read. Raises Trouble."""
        if not files:
            return {}
        found: dict[str, Item] = {}
        absent = False

        def line(told: bytes) -> None:
            nonlocal absent
            absent = absent or told.startswith(b"created directory ")
            if (item := _ITEM.match(told)) is not None and item[1][1:2] == b"f":
                digest, _, name = told[item.end() :].partition(b"|")
                name = _ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), name)
                found[os.fsdecode(name)] = Item(item[1], digest.strip().decode("ascii", "replace"))

        options = [*options, "--dry-run", "--itemize-changes", "--itemize-changes", "--out-format=%i|%C|%n"]
        names = [file.path for file in files] if source else self._named(files)
        end = self._call(options, names, size=size, line=line, source=source)
        if end.code and not (end.code in (23, 24) and only_of_sources(end.said)):
            raise trouble_of(end.code, end.said, self._target, self._options)
        if absent:
            raise Trouble("transient", "destination", f"{self._target.url()} is not there",
                          f"{ABSENT}; the transfer goes on by itself", counts=False)
        return found

    @staticmethod
    def _named(files: Sequence[File]) -> list[bytes]:
        """Return names below `/`; what is before the dot is left off at the destination, so that roots can differ."""
        return [file.root.lstrip(b"/") + b"/./" + file.path if file.root else b"./" + file.path for file in files]

    def _call(
        self, options: Sequence[str], names: Sequence[bytes], *, size: int, line: Callable[[bytes], None],
        source: str = "", to: str = "", writes: bool = False,
    ) -> End:  # fmt: skip
        """Run rsync over these names; begin again as often as its pace asks for that. Raises Cancelled, Trouble."""
        target = self._target
        silent_s = float(self._options["timeout"]) + size / READ_BYTES_PER_S
        for rerun_s in (self._rerun_s * 2**times for times in itertools.count()):
            self._pace.check()
            rate = self._pace.rate() if writes else None
            fd = listed(names)
            argv = [
                self._rsync, "--from0", "--files-from=-", "--no-implied-dirs", "--omit-dir-times",
                "--8-bit-output", *reaching(self._options, target),
                *((f"--timeout={int(silent_s)}",) if target.is_remote else ()),
                *(("--compress",) if self._options["compress"] and writes else ()),
                *((f"--bwlimit={max(1, int(rate / 1024))}",) if rate is not None else ()),
                *options, "--", f"{source}/", target.argument(to or target.path),
            ]  # fmt: skip
            try:
                end = Child(
                    argv, names=fd, lock=self._lock, pace=self._pace, silent_s=silent_s, far=target.is_remote,
                    rerun_s=rerun_s if writes else None, line=line, environment=environment(),
                    guard=self._guard if writes else nothing,
                ).run()  # fmt: skip
            except OSError as fault:
                raise Trouble("transient", "batch", f"cannot start rsync: {fault}", "was memory short?",
                              counts=False) from None
            finally:
                os.close(fd)
            if not (end.again and end.code):
                return end
        raise AssertionError("there is always another time")

    def _guard(self, written: int) -> None:
        """Raise Trouble before what is written takes free space below the reserve, where no room is held for it."""
        if self._target.is_remote:
            return
        if self._give is not None:
            if written < self._written_by[1]:  # another rsync
                self._written_by[0] += self._written_by[1]
            if written != self._written_by[1]:
                self._written_by[1] = written
                self._give(sum(self._written_by))
            if self._reserve <= self._admitted:
                return
        if time.monotonic() < self._guard_at:
            return
        self._guard_at = time.monotonic() + GUARD_S
        path = os.fsencode(self._target.path)
        try:
            Rooms(self._state_dir).look(path, 0, self._reserve)
        except NoRoom as fault:
            raise at_destination(fault, "write to", path) from None
        except OSError:
            return  # rsync itself says what is wrong

    def _clean(self) -> None:
        """Remove what is not whole, where that can be done from here."""
        if self._target.is_remote:
            return
        for file in self._files:
            directory, _, name = os.path.join(os.fsencode(self._target.path), file.path).rpartition(b"/")
            partial = directory + b"/" + PARTIAL.encode()
            with contextlib.suppress(OSError):
                os.unlink(partial + b"/" + name)
            with contextlib.suppress(OSError):
                os.rmdir(partial)


def _phantom(path: bytes, size: int, mtime_ns: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def progress(line: bytes) -> tuple[int, int] | None:
    """Return the bytes and files that a line of `--info=progress2` tells, None if it is another."""
    found = _PROGRESS.match(line)
    return (int(found[1]), int(found[2] or 0)) if found else None


def main() -> None:
    serve(lambda state_dir: lambda order, pace: Job(order, state_dir, pace))


if __name__ == "__main__":
    main()
