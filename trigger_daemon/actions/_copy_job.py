"""One attempt of `copy`, as a worker carries it out.

The order that holds, for each group of small files and each large one: write
under temporary names, sync, read back past the page cache, record the proof,
rename, fsync the directories. Whatever ends this process between any two of
these steps, repeating the attempt ends in the same state: nothing partial
stands under a final name, and nothing that was proven is believed unproven or
the other way round.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sqlite3
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from trigger_daemon.actions._copy_destination import IN_MEMORY, Destination, Homes
from trigger_daemon.actions._copy_files import (
    Changed,
    Differs,
    Hash,
    OwnDigest,
    Source,
    Trouble,
    at_destination,
    file_tag,
    new_hash,
    ours,
    printable,
    read_back,
    temp_name,
    version_tag,
)
from trigger_daemon.actions._copy_pace import Cancelled, Pace
from trigger_daemon.actions._copy_room import Rooms
from trigger_daemon.actions._copy_store import Proven, Store, Wrote, inode_key
from trigger_daemon.actions._copy_sums import merge_sums
from trigger_daemon.actions._copy_system import (
    AHEAD_FILES,
    RangeLocks,
    begin_to_write_out,
    fsync_directory,
    fsync_path,
    rename_new,
    syncfs,
)
from trigger_daemon.core.storage import Amount
from trigger_daemon.failpoints import fail_point
from trigger_daemon.mounts import Changes, Mount, Table

LARGE = 64 * 1024 * 1024  # above: by itself, in segments; up to here: in groups
GROUP_FILES = 1000  # one sync a group; more would hold finished files back for longer
GROUP_BYTES = 256 * 1024 * 1024
GROUP_S = 5.0  # a slow copy shows its finished files this often
AHEAD_BYTES = 64 * 1024 * 1024  # of sources that the disk begins to write out while the first of them is read
SYNC_EACH = 16  # below so many files each is fsynced: syncfs waits for everybody else's data too
READERS = 8  # threads that read back
TROUBLES_MAX = 100  # files that may fail before the attempt is given up
DIRECTORIES_MAX = 10_000  # whose leftovers a worker remembers to have looked for
OWN_WAIT_S = 5.0  # for an earlier worker of the same run to be gone
LOCK_SUMS = 1 << 62
MODE_MIN = 0o600
NO_VERSION = "0" * 8  # in the temporary name of a list of digests
_WHERE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC  # opened only to ask where it lies


@dataclass(slots=True)
class File:
    index: int
    root: str
    path: str
    size: int
    mtime_ns: int
    source: bytes
    content: str = ""  # md5:HEX:OFFSET:LENGTH where the file carries a digest that is to be verified

    def own_digest(self) -> OwnDigest | None:
        """Return a new check of the digest that the file carries, None without one. Raises Trouble."""
        return OwnDigest(self.content, self.size, self.source) if self.content else None

    def open(self, units: Iterable[Unit]) -> Source:
        """Open it to be read for these units. Raises Changed, Trouble."""
        source = Source(self.source, self.size, self.mtime_ns, os.fsencode(self.root))
        for unit in units:
            unit.read = source.state.st_ctime_ns, source.state.st_ino
        return source

    def identity(self) -> bytes:
        """Return what tells this file from all others, whichever version it has."""
        return os.fsencode(self.root) + b"\0" + os.fsencode(self.path)


@dataclass(slots=True)
class Unit:
    """One file at one destination."""

    file: File
    dest: Destination
    target: bytes
    replaces: bool
    temp: bytes = b""
    digest: str = ""
    inode: int = 0
    mtime_ns: int = 0
    reserve: int = 0  # bytes that our writes leave free where it truly lies
    has_room: bool = True  # all its bytes are allocated, or nobody asks for that
    elsewhere: bool = False  # a link below the destination has led to another file system
    how: str = ""
    wrote: tuple[Wrote, ...] = ()  # what we wrote at the target, when it was looked at
    read: tuple[int, int] = (0, 0)  # ctime_ns and inode of the source that was read
    ctime_ns: int = 0  # of the copy under its name


@dataclass(slots=True)
class Group:
    units: list[Unit] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    began: float = field(default_factory=time.monotonic)

    def is_full(self) -> bool:
        return (self.files >= GROUP_FILES or self.bytes >= GROUP_BYTES
                or (self.files > 0 and time.monotonic() - self.began > GROUP_S))


class Memory:
    """What a worker knows from its earlier jobs; void when the generation changes."""

    def __init__(self, state_dir: str) -> None:
        self.generation = -1
        self.rooms = Rooms(state_dir)
        self.kept: OrderedDict[bytes, dict[bytes, list[bytes]]] = OrderedDict()  # directory -> file tag -> leftovers
        self.homes: Homes = {}
        self.mounts = Changes()
        self.table = Table()
        self.mounted: dict[int, Mount | None] = {}  # st_dev of what was opened -> its mount
        self.readers = ThreadPoolExecutor(READERS, "read-back")
        self.finisher = ThreadPoolExecutor(1, "finish")

    def use(self, generation: int) -> None:
        if generation != self.generation:
            self.generation = generation
            self.kept.clear()
        changed = self.mounts.any()
        if changed:
            self.kept.clear()
            self.table = Table()
            self.mounted.clear()
        if changed or len(self.homes) > DIRECTORIES_MAX:
            self.homes.clear()

    def mount_of(self, fd: int) -> Mount | None:
        """Return the mount on which an open file or directory lies, None where that cannot be told."""
        device = os.fstat(fd).st_dev
        if device not in self.mounted:
            self.mounted[device] = self.table.of_open(fd)
        return self.mounted[device]


class Job:
    """One order of the daemon: copy, prove or clean."""

    def __init__(self, order: Mapping[str, Any], store: Store, locks: RangeLocks, pace: Pace, memory: Memory) -> None:
        self.do: str = order["do"]
        self.run_id: int = order["run"]
        self.attempt: int = order["attempt"]
        self.owner: str = order["owner"]
        self.replace: bool = order["if_exists"] == "replace"
        self.digest: str = order["digest"]
        self.flat: bool = order["layout"] == "flat"
        self.sums: bytes = os.fsencode(order["sums"] or "")
        self.state_dir: str = order["state_dir"]
        self.segment_bytes: int = order["segment"]
        self.large: int = order["large"]
        self.keep = {os.fsencode(to): path for to, path in order["keep"].items()}  # nobody else has what stands there
        self.store = store
        self.locks = locks
        self.pace = pace
        self.memory = memory
        self.files = [
            File(i, root, path, size, mtime_ns, os.fsencode(root) + b"/" + os.fsencode(path), content)
            for i, (root, path, size, mtime_ns, content) in enumerate(order["files"])
        ]
        self.dests = [
            Destination(i, os.fsencode(path), os.fsencode(static)) for i, (path, static) in enumerate(order["to"])
        ]
        self.reserves: dict[str, Amount] = {}
        self.spare(order["rooms"])
        self.proven: dict[tuple[int, int], tuple[bytes, int, int, int, dict[str, Any]]] = {}
        self.hexes: dict[tuple[int, int], str] = {}  # what is done: (file, destination) -> digest
        self.wanting = [len(self.dests)] * len(self.files)  # destinations still to be done
        self.left = False  # parts stay for a later attempt
        self.files_done = 0
        self.bytes_done = 0
        self.resumed = 0  # bytes of earlier attempts that were proven, not copied
        self.moving = 0  # bytes of the large file under way
        self.equal = 0
        self.changed: list[str] = []
        self.differs: dict[str, str] = {}
        self.troubles: list[Trouble] = []
        self.redo: dict[int, File] = {}
        self.damaged: set[int] = set()  # files that do not match their own digest
        self.second = False
        self.hows: set[str] = set()
        self.fresh: set[bytes] = set()  # directories with new directories in them
        self.make: Callable[[], Hash]

    def spare(self, rooms: Mapping[str, Any]) -> None:
        """Leave so much free from now on; any thread."""
        for dest, reserve in zip(self.dests, rooms["to"], strict=True):
            dest.reserve = reserve
        self.reserves = {device: Amount(*amount) for device, amount in rooms["reserves"].items()}

    # ------------------------------------------------------------------ the order

    def run(self) -> dict[str, Any]:
        """Carry the order out and say what became of it."""
        began = time.monotonic()
        status = "succeeded"
        try:
            self.make = new_hash(self.digest)
            self._own()
            if self.do == "clean":
                self._clean()
                status = "cancelled"
            else:
                self._work()
        except Cancelled:
            self._clean()
            status = "cancelled"
        except Trouble as trouble:
            self.troubles.append(trouble)
        except sqlite3.Error as fault:
            self.troubles.append(Trouble("transient", "batch", f"cannot keep proofs in {self.state_dir}: {fault}",
                                         "is that disk full?", counts=False))
        except ImportError as fault:
            self.troubles.append(Trouble("person", "batch", f"digest {self.digest} needs a library: {fault}",
                                         f"install it, or choose another digest than {self.digest}"))
        finally:
            for dest in self.dests:
                if dest.sync_fd >= 0:
                    os.close(dest.sync_fd)
            self.locks.give(self.run_id)
        troubles = self.troubles + [dest.trouble for dest in self.dests if dest.trouble]
        if troubles and status == "succeeded":
            status = "failed"
        return {
            "status": status,
            "fault": _worst(troubles) if status == "failed" else None,
            "changed": self.changed,
            "differs": self.differs,
            "files": self.files_done,
            "bytes": self.bytes_done,
            "left": self.left,
            "output": {
                "files": self.files_done, "bytes": self.bytes_done, "equal_already": self.equal,
                "resumed_bytes": self.resumed, "read_back": sorted(self.hows),
                "seconds": round(time.monotonic() - began, 3),
            },
        }  # fmt: skip

    def _own(self) -> None:
        """Take the run's lock: a worker of an earlier daemon may be dying in a hung call, and could still rename."""
        until = time.monotonic() + OWN_WAIT_S
        while not self.locks.take(self.run_id):
            self.pace.check()
            if time.monotonic() > until:
                raise Trouble("transient", "destination", "an earlier worker of this run hangs at the destination",
                              "is the destination's server well? the copy goes on once that worker is gone",
                              counts=False)
            time.sleep(0.02)

    def _work(self) -> None:
        for dest in self.dests:
            self.pace.doing = f"looking at {printable(dest.static)}"
            dest.open(self.memory.homes, self.locks, self.state_dir)
        if all(dest.trouble for dest in self.dests):
            return
        self.proven = self.store.proofs(self.run_id)
        if self.do == "prove":
            self._prove_all()
            return
        self._copy_all(self.files)
        if self.redo:
            # Written, and lost or changed on the way to the disk: everything anew, from the source, once.
            again, self.redo, self.second = list(self.redo.values()), {}, True
            self._copy_all(again)
        if self.sums:
            self._write_sums()

    def _copy_all(self, files: Sequence[File]) -> None:
        """Copy in groups; a group is finished (synced, read back, renamed) while the next is written."""
        from trigger_daemon.actions._copy_large import copy_large

        group = Group()
        finishing: Future[None] | None = None
        try:
            for number, file in enumerate(files):
                if number % AHEAD_FILES == 0:
                    self.pace.check()
                    self.pace.doing = "looking at " + file.path
                    begin_to_write_out(list(_ahead(files[number : number + AHEAD_FILES])))
                try:
                    if file.size > self.large:
                        copy_large(self, file, self._wanted(file, group))
                    else:
                        self._write_small(file, self._wanted(file, group), group)
                except Changed as change:
                    self._note_change(file, str(change))
                except Trouble as trouble:
                    self._note(trouble)
                if group.is_full():
                    if finishing:
                        finishing.result()
                    finishing = self.memory.finisher.submit(self._finish, group)
                    group = Group()
                if len(self.troubles) > TROUBLES_MAX or all(dest.trouble for dest in self.dests):
                    break
            if finishing:
                finishing.result()
                finishing = None
            self._finish(group)
        except BaseException:
            if finishing:
                with contextlib.suppress(Exception):
                    finishing.result()
            self._unlink(unit.temp for unit in group.units)
            raise

    def _note(self, trouble: Trouble) -> None:
        if trouble.scope == "batch":
            raise trouble
        self.troubles.append(trouble)

    def _note_change(self, file: File, why: str) -> None:
        self.changed.append(file.path)
        self.store.change(self.run_id, file.index, file.path, why)

    def note_at(self, dest: Destination, fault: OSError, doing: str, path: bytes) -> None:
        """Note an error while touching a target: of the file, or of the whole destination, which is then left alone."""
        trouble = at_destination(fault, doing, path)
        if trouble.scope != "file":
            dest.trouble = dest.trouble or trouble
        else:
            self.troubles.append(trouble)

    def refuse(self, unit: Unit, trouble: Trouble) -> None:
        """Throw away a copy of what was damaged at the source; told once a file, however many destinations it has."""
        self._unlink([unit.temp])
        unit.temp = b""
        if unit.file.index not in self.damaged:
            self.damaged.add(unit.file.index)
            self.troubles.append(trouble)

    def done(self, unit: Unit) -> None:
        """Count one file at one destination as finished."""
        self.hexes[unit.file.index, unit.dest.index] = unit.digest
        self.wanting[unit.file.index] -= 1
        if not self.wanting[unit.file.index]:
            self.files_done += 1
            self.bytes_done += unit.file.size

    # --------------------------------------------------------------- destinations

    def target(self, file: File, dest: Destination) -> bytes:
        path = os.fsencode(file.path)
        return dest.path + b"/" + (path.rpartition(b"/")[2] if self.flat else path)

    # ------------------------------------------------------------ what stands there

    def _wanted(self, file: File, group: Group) -> list[Unit]:
        """Return where a file still has to be written; note what is done, and what stands in the way.

        Raises Trouble for a file that cannot be copied anywhere.
        """
        wanted = []
        self.pace.check()
        file.own_digest()  # one that nothing could match stops the file before anything is read
        for dest in self.dests:
            if dest.trouble or (file.index, dest.index) in self.hexes:
                continue
            unit = Unit(file, dest, self.target(file, dest), False)
            self.pace.doing = "looking at the target of " + file.path
            try:
                self._sweep(unit)
                if self._must_write(unit, group):
                    wanted.append(unit)
            except Trouble as trouble:
                self._note(trouble)
            except OSError as fault:
                self.note_at(dest, fault, "look at", unit.target)
        return wanted

    def _must_write(self, unit: Unit, group: Group) -> bool:
        unit.wrote = self.store.wrote(unit.target)  # first: what comes into being after it is foreign
        there = _state(unit.target)
        known = self.proven.get((unit.file.index, unit.dest.index))
        if known:
            temp, inode, size, mtime_ns, record = known
            unit.digest = record["digest"].partition(":")[2]
            unit.how = record["read_back"]
            unit.read = record.get("ctime_ns", 0), record.get("inode", 0)
            enough = _proves_own(unit.file, record)
            if (enough and there
                    and (inode_key(there.st_ino), there.st_size, there.st_mtime_ns) == (inode, size, mtime_ns)):
                # Proven by an attempt that was cut short; the name may not be durable yet.
                fsync_directory(unit.target.rpartition(b"/")[0])
                self.done(unit)
                return False
            waiting = _state(temp) if temp and enough else None
            if waiting and (inode_key(waiting.st_ino), waiting.st_size, waiting.st_mtime_ns) == (inode, size, mtime_ns):
                unit.replaces = there is not None
                if there is None or self._is_earlier(unit, there):
                    # Proven, and not renamed: the group's end renames it.
                    unit.temp, unit.inode, unit.mtime_ns = temp, inode, mtime_ns
                    group.units.append(unit)
                    group.files += 1
                    return False
            self._unlink([temp])
            unit.digest = unit.how = ""
        if there is None:
            return True
        unit.replaces = True
        if self._is_source(unit, there):
            raise Trouble("person", "file", f"{printable(unit.target)} is the source itself, by another way",
                          "choose another `to`: this would be no copy")
        return self._may_replace(unit, there)

    def _is_source(self, unit: Unit, there: os.stat_result) -> bool:
        source = _state(unit.file.source)
        return source is not None and (source.st_dev, source.st_ino) == (there.st_dev, there.st_ino)

    def _is_ours(self, unit: Unit, there: os.stat_result) -> bool:
        """Tell whether we wrote what stands there, for this very source."""
        return (stat.S_ISREG(there.st_mode)
                and Wrote(there.st_size, there.st_mtime_ns, unit.file.identity()) in unit.wrote)

    def _is_earlier(self, unit: Unit, there: os.stat_result) -> bool:
        """Tell whether an earlier version stands there, written by us."""
        version = (unit.file.size, unit.file.mtime_ns)
        if unit.target in self.keep or (there.st_size, there.st_mtime_ns) == version:
            return False
        return self._is_ours(unit, there)

    def _may_replace(self, unit: Unit, there: os.stat_result) -> bool:
        """Say whether what stands at the target gives way; False: it is equal, and now proven. Raises Trouble."""
        if self._is_earlier(unit, there):
            return True
        if stat.S_ISREG(there.st_mode) and there.st_size == unit.file.size and self._prove(unit):
            return False
        if only := self.keep.get(unit.target):
            raise Trouble("person", "file", f"{printable(unit.target)} may be all that is left of {only}, and "
                          "would be replaced", "move that copy elsewhere, then `runs retry`")
        if self._is_ours(unit, there) or (self.replace and not stat.S_ISDIR(there.st_mode)):
            return True
        for size, mtime_ns, source in unit.wrote:
            if (there.st_size, there.st_mtime_ns) == (size, mtime_ns) and source:
                other, shown = printable(source.replace(b"\0", b"/")), printable(unit.target)
                raise Trouble("person", "file", f"{shown} exists already, and was written for another source: {other}",
                              f"{other} and {printable(unit.file.source)} both go to {shown}: give one another `to` or "
                              "`layout` (or set `if_exists: replace`), then `trigger-daemon runs retry`")
        raise Trouble("person", "file", f"{printable(unit.target)} exists already, and is not what we wrote",
                      "move it away (or set `if_exists: replace`), then `trigger-daemon runs retry`")

    def _prove(self, unit: Unit) -> bool:
        """Read source and target, whole; record the proof if they are equal. Raises Changed, Trouble, OSError."""
        file, dest = unit.file, unit.dest
        own = file.own_digest()
        self.pace.doing = "reading " + file.path
        source = file.open([unit])
        try:
            whole = self.make()
            for piece in source.pieces(self.pace):
                whole.update(piece)
        finally:
            source.close()
        self.pace.doing = "reading back " + printable(unit.target)
        fsync_path(unit.target, os.O_NOFOLLOW)
        try:
            digest, state, direct = read_back(
                unit.target, self.make, self.pace, places=len(self.dests), direct=dest.direct, own=own
            )
        except Differs:
            return False
        if digest != whole.hexdigest():
            return False
        if own:
            own.check()
        fsync_directory(unit.target.rpartition(b"/")[0])
        unit.digest, unit.inode, unit.mtime_ns = digest, state.st_ino, state.st_mtime_ns
        unit.ctime_ns = state.st_ctime_ns
        with _nearest(unit) as directory:
            self.memory.mount_of(directory)
        unit.how = self.how(dest, direct, state.st_dev)
        self.store.prove(self.run_id, [self.proof(unit)])
        self.equal += 1
        self.done(unit)
        return True

    def how(self, dest: Destination, direct: bool, device: int) -> str:
        """Return the word for how the copy, which lies on this st_dev, was read back."""
        mount = self.memory.mounted.get(device)
        in_memory = dest.in_memory if mount is None else mount.fstype in IN_MEMORY
        word = "memory" if in_memory else "direct" if direct else "dropped"
        self.hows.add(word)
        return word

    def proof(self, unit: Unit) -> Proven:
        file = unit.file
        record = {
            "path": file.path, "root": file.root, "size": file.size, "mtime_ns": file.mtime_ns,
            "digest": f"{self.digest}:{unit.digest}", "to": os.fsdecode(unit.target), "to_inode": unit.inode,
            "to_mtime_ns": unit.mtime_ns, "read_back": unit.how, "attempt": self.attempt,
        }  # fmt: skip
        if unit.read[0]:
            record |= {"ctime_ns": unit.read[0], "inode": unit.read[1]}
        if unit.ctime_ns:
            record["to_ctime_ns"] = unit.ctime_ns
        if own := file.own_digest():
            record["content"] = own.said
        return Proven(file.index, unit.dest.index, unit.target, unit.temp, unit.inode, file.size, unit.mtime_ns, record,
                      file.identity(), unit.wrote[0] if unit.wrote else None)

    def _prove_all(self) -> None:
        """Prove what stands there now: untouched since it was read back, or by reading both sides."""
        changed = self.store.changed(self.run_id)
        for file in self.files:
            self.pace.check()
            if file.index in changed:
                continue
            for dest in self.dests:
                if dest.trouble:
                    continue
                unit = Unit(file, dest, self.target(file, dest), False)
                try:
                    why = self._why_unproven(unit)
                    if why:
                        self.differs[file.path] = f"{printable(unit.target)} {why}"
                        self.store.unprove(self.run_id, file.index, dest.index)
                except Changed as change:
                    self.store.unprove(self.run_id, file.index, dest.index)
                    self._note_change(file, str(change))
                    break
                except Trouble as trouble:
                    self._note(trouble)
                except OSError as fault:
                    self.note_at(dest, fault, "read back", unit.target)

    def _why_unproven(self, unit: Unit) -> str:
        """Return '' if the target is equal to the manifest's version, else what is wrong. Raises Changed and others."""
        there = _state(unit.target)
        if there is None:
            file = unit.file
            Source(file.source, file.size, file.mtime_ns, os.fsencode(file.root)).close()
            return "is missing"
        known = self.proven.get((unit.file.index, unit.dest.index))
        if (known and (inode_key(there.st_ino), there.st_size, there.st_mtime_ns) == known[1:4]
                and known[4].get("to_ctime_ns", there.st_ctime_ns) == there.st_ctime_ns
                and not _touched(unit.file, known[4]) and _proves_own(unit.file, known[4])):
            self.done(unit)
            return ""
        if self._is_source(unit, there):
            return "is the source itself"
        return "" if there.st_size == unit.file.size and self._prove(unit) else "differs"

    # ------------------------------------------------------------------- leftovers

    def _sweep(self, unit: Unit) -> None:
        """Remove what workers that were killed left of this file, and of others that nobody will come back to."""
        directory, _, name = unit.target.rpartition(b"/")
        kept = self.memory.kept.get(directory)
        if kept is None:
            kept = self._sweep_directory(directory)
            self.memory.kept[directory] = kept
            if len(self.memory.kept) > DIRECTORIES_MAX:
                self.memory.kept.popitem(last=False)
        if not kept:
            return
        own = self.store.temps(self.run_id)
        self._unlink(temp for temp in kept.pop(file_tag(name), []) if temp not in own)

    def _sweep_directory(self, directory: bytes) -> dict[bytes, list[bytes]]:
        """List a directory once; return file tag -> leftovers that a repeated attempt may still want."""
        kept: dict[bytes, list[bytes]] = {}
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return kept
        wanted: dict[int, set[bytes]] = {}
        for name in names:
            found = ours(name, self.owner) if name.endswith(b".part") else None
            if found is None:
                continue
            tag, run = found
            temp = directory + b"/" + name
            if run != self.run_id and not self._is_over(run):
                continue
            if run not in wanted:
                wanted[run] = self.store.temps(run)
            if temp in wanted[run]:
                kept.setdefault(tag, []).append(temp)
            else:
                self._unlink([temp])
        return kept

    def _is_over(self, run: int) -> bool:
        """Tell whether no worker works for another run now."""
        if not self.locks.take(run):
            return False
        self.locks.give(run)
        return True

    def _unlink(self, temps: Iterable[bytes]) -> None:
        for temp in temps:
            if temp:
                with contextlib.suppress(OSError):  # a destination that is away: swept when it is back
                    fail_point("copy.unlink")
                    os.unlink(temp)

    def _clean(self) -> None:
        """Remove every temporary file of this run; what has its final name stays."""
        self.pace.cancelled = False
        self._unlink(self.store.temps(self.run_id))
        for directory in {self.target(f, d).rpartition(b"/")[0] for f in self.files for d in self.dests}:
            with contextlib.suppress(OSError):
                for name in os.listdir(directory):
                    found = ours(name, self.owner)
                    if found and found[1] == self.run_id:
                        self._unlink([directory + b"/" + name])
        self.store.forget(self.run_id)

    # ----------------------------------------------------------------- small files

    def open_temp(self, unit: Unit, mode: int) -> int:
        """Create the temporary file beside a target, exclusively. Raises OSError; NoRoom before anything is made."""
        unit.dest.check()
        if unit.dest.reserve or self.reserves:
            with contextlib.suppress(FileNotFoundError), _nearest(unit) as directory:
                if reserve := self.reserve_at(directory, unit.dest):
                    self.memory.rooms.look(directory, unit.file.size, reserve)
        version = version_tag(unit.file.size, unit.file.mtime_ns, self.digest)
        unit.temp = temp_name(unit.target, self.owner, version, self.run_id, self.attempt)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = (mode & 0o777) | MODE_MIN
        for _ in range(2):
            try:
                return os.open(unit.temp, flags, mode)
            except FileExistsError:
                os.unlink(unit.temp)  # of this very attempt, cut short
            except FileNotFoundError:
                self.fresh |= unit.dest.make_directory(unit.temp.rpartition(b"/")[0])
        return os.open(unit.temp, flags, mode)

    def reserve_at(self, fd: int, dest: Destination) -> int:
        """Return how many bytes stay free where an open file lies: a link below the destination may lead anywhere."""
        mount = self.memory.mount_of(fd) if self.reserves else None
        if mount is None:
            return dest.reserve
        amount = self.reserves.get(mount.device)
        if amount is None:
            return 0
        whole = os.fstatvfs(fd)
        return amount.of(whole.f_blocks * whole.f_frsize)

    def lies(self, unit: Unit, fd: int) -> None:
        """Note where a file lies that is open."""
        self.memory.mount_of(fd)
        unit.reserve = self.reserve_at(fd, unit.dest)
        unit.elsewhere = os.fstat(fd).st_dev != os.fstat(unit.dest.sync_fd).st_dev

    def take_room(self, unit: Unit, fd: int) -> None:
        """See that the reserve of its file system stays free, and allocate. Raises NoRoom, OSError, Cancelled."""
        self.lies(unit, fd)
        unit.has_room = not unit.reserve or self.memory.rooms.take(fd, unit.file.size, unit.reserve, self.pace)

    def look_for_room(self, unit: Unit, fd: int, size: int) -> None:
        """Look before `size` bytes are written that could not be allocated before. Raises NoRoom."""
        if not unit.has_room:
            self.memory.rooms.look(fd, size, unit.reserve)

    def _write_small(self, file: File, units: Sequence[Unit], group: Group) -> None:
        """Read a file once, hashing, and write it under temporary names. Raises Changed, Trouble."""
        if not units:
            return
        self.pace.doing = "reading " + file.path
        source = file.open(units)
        open_units: list[tuple[Unit, int]] = []
        try:
            whole = self.make()
            self._open_temps(units, source.state, open_units)
            for piece in source.pieces(self.pace):
                whole.update(piece)
                open_units = self._write_piece(open_units, piece)
            digest = whole.hexdigest()
            self._close_temps(open_units, digest, source.state, group)
            open_units = []
        finally:
            source.close()
            for unit, fd in open_units:
                os.close(fd)
                self._unlink([unit.temp])
        group.files += 1
        group.bytes += file.size

    def _open_temps(self, units: Sequence[Unit], state: os.stat_result, opened: list[tuple[Unit, int]]) -> None:
        """Add to `opened` where it can be written. Raises Cancelled."""
        for unit in units:
            self.pace.doing = "writing " + printable(unit.target)
            try:
                fd = self.open_temp(unit, state.st_mode)
            except OSError as fault:
                self.note_at(unit.dest, fault, "write", unit.target)
                continue
            opened.append((unit, fd))
            try:
                self.take_room(unit, fd)
            except OSError as fault:
                opened.pop()
                os.close(fd)
                self._unlink([unit.temp])
                self.note_at(unit.dest, fault, "write", unit.target)

    def _write_piece(self, opened: list[tuple[Unit, int]], data: memoryview) -> list[tuple[Unit, int]]:
        """Write to all that still work, and return those."""
        working = []
        for unit, fd in opened:
            try:
                fail_point("copy.write")
                self.look_for_room(unit, fd, len(data))
                written = os.write(fd, data)
                while written < len(data):
                    written += os.write(fd, data[written:])
            except OSError as fault:
                os.close(fd)
                self._unlink([unit.temp])
                self.note_at(unit.dest, fault, "write", unit.target)
            else:
                working.append((unit, fd))
        return working

    def _close_temps(self, opened: list[tuple[Unit, int]], digest: str, state: os.stat_result, group: Group) -> None:
        for unit, fd in opened:
            unit.digest = digest
            try:
                try:
                    os.utime(fd, ns=(state.st_mtime_ns, unit.file.mtime_ns))
                    there = os.fstat(fd)
                finally:
                    os.close(fd)
            except OSError as fault:
                self._unlink([unit.temp])
                self.note_at(unit.dest, fault, "write", unit.target)
                continue
            unit.inode, unit.mtime_ns = there.st_ino, there.st_mtime_ns
            group.units.append(unit)
        fail_point("copy.written")

    # ------------------------------------------------------------- a group's end

    def _finish(self, group: Group) -> None:
        """Sync, read back, record, rename, fsync directories."""
        units = group.units
        try:
            fresh = [unit for unit in units if not unit.how]  # the others were proven before
            for dest in self.dests:
                self._sync(dest, [unit for unit in fresh if unit.dest is dest])
            fail_point("copy.synced")
            fresh = [unit for unit in fresh if unit.temp]
            if len(fresh) > 3:
                list(self.memory.readers.map(self._verify, fresh))
            else:
                for unit in fresh:
                    self._verify(unit)
            self.put_in_place([unit for unit in units if unit.temp])
        except BaseException:
            self._unlink(unit.temp for unit in units)
            raise

    def _sync(self, dest: Destination, units: Sequence[Unit]) -> None:
        """Make what was written durable. A failed sync is never repeated: the files are written anew."""
        if not units:
            return
        self.pace.doing = f"syncing {printable(dest.path)}"
        try:
            fail_point("copy.sync")
            if dest.whole_sync and len(units) >= SYNC_EACH:
                syncfs(dest.sync_fd)
                units = [unit for unit in units if unit.elsewhere]
            if len(units) > 3:
                list(self.memory.readers.map(self._sync_one, units))
            else:
                for unit in units:
                    self._sync_one(unit)
        except OSError as fault:
            for unit in units:
                self.again(unit, at_destination(fault, "sync", unit.target))

    def _sync_one(self, unit: Unit) -> None:
        fsync_path(unit.temp)
        self.pace.step()

    def again(self, unit: Unit, trouble: Trouble) -> None:
        """Throw away what was written; write it anew once, then the destination is in trouble."""
        self._unlink([unit.temp])
        unit.temp = b""
        if self.second or not trouble.counts:  # no room: writing anew makes none
            unit.dest.trouble = unit.dest.trouble or trouble
        else:
            self.redo[unit.file.index] = unit.file

    def _verify(self, unit: Unit) -> None:
        """Read back past the page cache and compare."""
        self.pace.doing = "reading back " + printable(unit.target)
        try:
            if fail_point("copy.flip"):
                damage(unit.temp, unit.file.size // 2)
            own = unit.file.own_digest()
            digest, state, direct = read_back(
                unit.temp, self.make, self.pace, places=len(self.dests), direct=unit.dest.direct, own=own
            )
        except OSError as fault:
            self.again(unit, at_destination(fault, "read back", unit.target))
        except Differs:
            self.again(unit, reads_differently(unit))
        else:
            if digest != unit.digest or state.st_ino != unit.inode:
                self.again(unit, reads_differently(unit))
                return
            unit.dest.direct = direct
            if own:
                try:
                    own.check()
                except Trouble as trouble:
                    self.refuse(unit, trouble)
                    return
            unit.how = self.how(unit.dest, direct, state.st_dev)

    def put_in_place(self, units: Sequence[Unit]) -> None:
        """Record the proofs, give the files their names, make the names durable."""
        if not units:
            return
        self.pace.doing = "recording proofs"
        fail_point("copy.verified")
        lost = self.store.prove(self.run_id, [self.proof(unit) for unit in units], replace=self.replace)
        fail_point("copy.proved")
        for unit in units:
            if (unit.file.index, unit.dest.index) in lost:
                self.store.unprove(self.run_id, unit.file.index, unit.dest.index)
                self._came_into_being(unit)
        units = [unit for unit in units if unit.temp]
        if not units:
            return
        placed = [unit for unit in units if self._rename(unit)]
        fail_point("copy.renamed")
        self._note_names(placed)
        fresh, self.fresh = self.fresh, set()
        directories: dict[bytes, Destination] = {unit.target.rpartition(b"/")[0]: unit.dest for unit in placed}
        for directory in fresh:
            directories.setdefault(directory, units[0].dest)
        for directory, dest in directories.items():
            self.pace.step()
            self.pace.doing = f"syncing {printable(directory)}"
            try:
                fail_point("copy.directory_sync")
                fsync_directory(directory)
            except OSError as fault:
                self.note_at(dest, fault, "sync", directory)
        for unit in placed:
            if not unit.dest.trouble:
                self.done(unit)
        fail_point("copy.placed")

    def _rename(self, unit: Unit) -> bool:
        self.pace.step()
        self.pace.doing = "renaming to " + printable(unit.target)
        try:
            fail_point("copy.rename")
            unit.dest.check()
            if unit.replaces:
                there = None if self.replace else _state(unit.target)
                if there and not self._is_ours(unit, there):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                os.rename(unit.temp, unit.target)
            else:
                rename_new(unit.temp, unit.target)
        except OSError as fault:
            self.store.not_placed(self.run_id, self.proof(unit))
            if isinstance(fault, FileExistsError):
                self._came_into_being(unit)
            else:
                self._unlink([unit.temp])
                self.note_at(unit.dest, fault, "rename to", unit.target)
            return False
        return True

    def _note_names(self, units: Sequence[Unit]) -> None:
        """Add to the proofs what the copies look like under their names: a rename is a change of its own.

        Without that a copy is read once more before its source may go.
        """
        for unit in units:
            with contextlib.suppress(OSError):
                there = os.lstat(unit.target)
                if (there.st_ino, there.st_size, there.st_mtime_ns) == (unit.inode, unit.file.size, unit.mtime_ns):
                    unit.ctime_ns = there.st_ctime_ns
        self.store.add(self.run_id, [self.proof(unit) for unit in units if unit.ctime_ns])

    def _came_into_being(self, unit: Unit) -> None:
        """Look once more at a target that another took meanwhile: it may be equal, or is foreign."""
        self._unlink([unit.temp])
        unit.temp = b""
        self.proven.pop((unit.file.index, unit.dest.index), None)
        if not self.second:
            self.redo[unit.file.index] = unit.file
            return
        self.troubles.append(Trouble(
            "transient", "file", f"{printable(unit.target)} came into being while it was copied",
            "who else writes there?",
        ))  # fmt: skip

    # ------------------------------------------------------------------------ sums

    def _write_sums(self) -> None:
        """Merge a line a file into the digest list of each target directory (`sha256sum -c` reads it)."""
        lines: dict[tuple[int, bytes], dict[bytes, str]] = {}
        for (index, place), digest in self.hexes.items():
            directory, _, name = self.target(self.files[index], self.dests[place]).rpartition(b"/")
            lines.setdefault((place, directory), {})[name] = digest
        for (place, directory), new in lines.items():
            dest = self.dests[place]
            if dest.trouble:
                continue
            self.pace.check()
            self.pace.doing = f"writing {printable(directory)}/{printable(self.sums)}"
            lock = LOCK_SUMS + int.from_bytes(file_tag(directory), "big")
            self.locks.take(lock, wait=True)
            try:
                target = directory + b"/" + self.sums
                temp = temp_name(target, self.owner, NO_VERSION, self.run_id, self.attempt)
                merge_sums(target, temp, new, functools.partial(self._look_for_sums, dest))
            except OSError as fault:
                self.note_at(dest, fault, "write", directory + b"/" + self.sums)
            finally:
                self.locks.give(lock)

    def _look_for_sums(self, dest: Destination, fd: int, size: int) -> None:
        """See that a list of digests fits above the reserve. Raises NoRoom."""
        if reserve := self.reserve_at(fd, dest):
            self.memory.rooms.look(fd, size, reserve)


def _ahead(files: Sequence[File]) -> Iterator[bytes]:
    """Yield the sources of as many files as the disk may begin with."""
    size = 0
    for file in files:
        size += file.size
        if size > AHEAD_BYTES:
            return
        yield file.source


@contextlib.contextmanager
def _nearest(unit: Unit) -> Iterator[int]:
    """Open the directory of a target, or the nearest above it that is there. Raises OSError."""
    here = unit.target.rpartition(b"/")[0]
    while not os.path.isdir(here) and len(here) > len(unit.dest.static):
        here = here.rpartition(b"/")[0]
    fd = os.open(here, _WHERE)
    try:
        yield fd
    finally:
        os.close(fd)


def _proves_own(file: File, record: Mapping[str, Any]) -> bool:
    """Tell whether a proof says as much of the file's own digest as is asked for now."""
    own = file.own_digest()
    return own is None or record.get("content") == own.said


def _touched(file: File, record: Mapping[str, Any]) -> bool:
    """Tell whether this version of a source was touched since it was read: perhaps rewritten with its size and time."""
    there = _state(file.source)
    return (there is not None and (there.st_size, there.st_mtime_ns) == (file.size, file.mtime_ns)
            and (there.st_ctime_ns, there.st_ino) != (record.get("ctime_ns"), record.get("inode")))


def reads_differently(unit: Unit) -> Trouble:
    return Trouble("person", "destination",
                   f"{printable(unit.target)}: what was read back is not what was written, twice",
                   "suspect the disk, its cable or memory at the destination before retrying")


def damage(path: bytes, offset: int) -> None:
    """Flip one bit on the disk: for tests of the reading back."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _state(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _worst(troubles: Sequence[Trouble]) -> dict[str, Any]:
    """Return the fault to report: a person's first, because it does not mend itself."""
    order = {"person": 0, "permanent": 1, "transient": 2}
    worst = min(troubles, key=lambda trouble: order[trouble.kind])
    fault = worst.fault()
    if len(troubles) > 1:
        fault["why"] += f" (and {len(troubles) - 1} more)"
    return fault

