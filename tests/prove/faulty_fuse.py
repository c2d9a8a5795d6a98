"""A share with switchable faults: a FUSE file system that shows a directory, and errs, hangs or dies when told.

It speaks the kernel's protocol on /dev/fuse by itself, in a process of its own,
so that neither its hangs nor its death are those of the test. Nothing is
cached: each read, write and fsync of the daemon comes here and meets the rules.

    python -m tests.prove.faulty_fuse DIRECTORY MOUNT_POINT     (orders as JSON lines on stdin, answers on stdout)

It also keeps what a server's memory keeps: a file that was written and never
fsynced, or whose fsync failed, loses its content at a `reboot`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import select
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWER_S = 10.0  # a server that does not answer its own test by then is broken
LAZY = 2  # MNT_DETACH
READ_BYTES = 1 << 18  # the largest request is a write of 64 KiB
WRITE_BYTES = 1 << 16
DIRECT_IO = 1  # FOPEN_DIRECT_IO: no page cache between the daemon and us
HEADER = struct.Struct("<IIQQIIIHH")

OPCODES = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename",
    14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 25: "flush", 26: "init",
    27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir", 35: "create", 36: "interrupt", 38: "destroy",
    42: "batch_forget", 45: "rename2",
}  # fmt: skip
UNANSWERED = frozenset({"forget", "batch_forget", "interrupt"})

# valid bits of setattr
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _FH, _ATIME_NOW, _MTIME_NOW = (1 << bit for bit in range(9))


class Unable(Exception):
    """The scene could not be set here; the text says what is missing."""


class FaultyShare:
    """The test's hand on the server: mounts on being made, and is gone without a trace after `close`."""

    def __init__(self, directory: Path, point: Path) -> None:
        """Show `directory` at `point`. Raises Unable without the privilege to mount."""
        self.directory, self.point = directory, point
        directory.mkdir(parents=True, exist_ok=True)
        point.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.mount()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def mount(self) -> None:
        """Start the server, also after `die` and `unmount`."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.directory), str(self.point)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._told()
        except Unable:
            self._process.kill()
            self._process.wait()
            raise

    def rules(self, *rules: dict[str, Any]) -> None:
        """Put these in force instead of those before.

        A rule: `op` (a pattern for the call), `name` (a pattern for the last part of the path), `act` (an errno's
        name, or `hang`), `times` (how often; absent: always). The first that fits is followed.
        """
        self._ask({"rules": list(rules)})

    def hang(self) -> None:
        """Answer nothing any more."""
        self.rules({"op": "*", "name": "*", "act": "hang"})

    def release(self) -> None:
        """Follow no rule any more, and answer all that was left hanging."""
        self._ask({"rules": [], "release": True})

    def hits(self) -> int:
        """Return how many calls met a rule since the start."""
        return int(self._ask({})["hits"])

    def reboot(self) -> list[str]:
        """Lose what was never made durable; return the paths that lost their content."""
        return list(self._ask({"reboot": True})["lost"])

    def die(self) -> None:
        """End the server and leave the mount: every call is answered with ENOTCONN."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def unmount(self) -> None:
        """Take the mount away: its point is an empty directory again."""
        _libc().umount2(os.fsencode(self.point), LAZY)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Undo all of it; whoever hangs here is let go. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(Unable, OSError):
                self.release()
        self.unmount()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise Unable(f"the FUSE server for {self.point} does not answer")
        told: dict[str, Any] = json.loads(line)
        if "unable" in told:
            raise Unable(told["unable"])
        return told


# -------------------------------------------------------------------------- server


class Server:
    """One mount. Calls are answered one after the other; those that a rule leaves hanging are kept for `release`."""

    def __init__(self, directory: bytes, point: bytes) -> None:
        self._base = directory
        self._point = point
        self._paths: dict[int, bytes] = {1: b""}  # node -> path below the base
        self._nodes: dict[bytes, int] = {b"": 1}
        self._handles: dict[int, tuple[int, int]] = {}  # handle -> descriptor, node
        self._lists: dict[int, list[tuple[bytes, int, int]]] = {}
        self._next = 2
        self._rules: list[dict[str, Any]] = []
        self._held: list[bytes] = []
        self._hits = 0
        self._unsynced: set[int] = set()  # inodes written since their last fsync
        self._bad: set[int] = set()  # inodes of which an fsync failed: later ones succeed, and mend nothing
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d" % (self._device, os.getuid(), os.getgid())
        if _libc().mount(b"td-faulty", point, b"fuse", 0, options) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def serve(self) -> None:
        """Answer kernel and test until the test ends."""
        orders = b""
        while True:
            ready, _, _ = select.select([self._device, 0], [], [])
            if 0 in ready:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    _libc().umount2(self._point, LAZY)
                    return
                *lines, orders = (orders + chunk).split(b"\n")
                for line in lines:
                    tell(self._order(json.loads(line)))
            if self._device in ready:
                try:
                    request = os.read(self._device, READ_BYTES)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        continue
                    return  # unmounted
                self._take(request)

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"hits": self._hits}
        if "rules" in order:
            self._rules = order["rules"]
        if order.get("release"):
            held, self._held = self._held, []
            for request in held:
                self._take(request)
        if order.get("reboot"):
            told["lost"] = self._lose()
        return told

    def _lose(self) -> list[str]:
        gone, lost = self._unsynced | self._bad, []
        for directory, _, names in os.walk(self._base):
            for name in names:
                path = os.path.join(directory, name)
                if os.lstat(path).st_ino in gone:
                    os.truncate(path, 0)
                    lost.append(os.fsdecode(os.path.relpath(path, self._base)))
        self._unsynced.clear()
        self._bad.clear()
        return lost

    # ------------------------------------------------------------------- calls

    def _take(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        call = OPCODES.get(opcode, "")
        if call in UNANSWERED:
            return
        body = request[HEADER.size :]
        act = self._fault(call, node, body)
        if act == "hang":
            self._held.append(request)
            return
        try:
            if act:
                if call == "fsync":
                    self._bad.add(self._inode(body))
                raise OSError(getattr(errno, act), act)
            answer: Callable[[int, bytes], bytes] | None = getattr(self, f"_{call}", None) if call else None
            if answer is None:
                raise OSError(errno.ENOSYS, "not here")
            code, words = 0, answer(node, body)
        except OSError as error:
            code, words = error.errno or errno.EIO, b""
        with contextlib.suppress(OSError):  # who asked was killed
            os.write(self._device, struct.pack("<IiQ", 16 + len(words), -code, unique) + words)

    def _fault(self, call: str, node: int, body: bytes) -> str:
        if call in ("init", "destroy") or not self._rules:
            return ""
        name = self._paths.get(node, b"").rpartition(b"/")[2]
        if call in ("lookup", "unlink", "mkdir", "create", "rename", "rename2", "rmdir"):
            skip = {"mkdir": 8, "create": 16, "rename": 8, "rename2": 16}.get(call, 0)
            name = body[skip:].split(b"\0")[0]
        for rule in self._rules:
            if fnmatch.fnmatch(call, rule["op"]) and fnmatch.fnmatch(os.fsdecode(name), rule.get("name", "*")):
                if rule.get("times") == 0:
                    continue
                if "times" in rule:
                    rule["times"] -= 1
                self._hits += 1
                return str(rule["act"])
        return ""

    def _inode(self, body: bytes) -> int:
        return os.fstat(self._handles[struct.unpack_from("<Q", body)[0]][0]).st_ino

    def _full(self, node: int, name: bytes = b"") -> bytes:
        if node not in self._paths:
            raise OSError(errno.ENOENT, "gone")
        return b"/".join(part for part in (self._base, self._paths[node], name) if part)

    def _node(self, parent: int, name: bytes) -> int:
        path = self._paths[parent] + b"/" + name if self._paths[parent] else name
        if path not in self._nodes:
            self._nodes[path], self._paths[self._next] = self._next, path
            self._next += 1
        return self._nodes[path]

    def _forget_path(self, path: bytes) -> None:
        node = self._nodes.pop(path, None)
        if node is not None:
            del self._paths[node]

    def _entry(self, parent: int, name: bytes) -> bytes:
        seen = os.lstat(self._full(parent, name))
        return struct.pack("<QQQQII", self._node(parent, name), 0, 0, 0, 0, 0) + _attributes(seen)

    def _new_handle(self, fd: int, node: int) -> int:
        handle = self._next
        self._next += 1
        self._handles[handle] = (fd, node)
        return handle

    def _init(self, node: int, body: bytes) -> bytes:
        big_writes, truncate = 1 << 5, 1 << 3
        return struct.pack("<IIIIHHIIHHII24x", 7, 31, 0, big_writes | truncate, 16, 12, WRITE_BYTES, 1, 16, 0, 0, 0)

    def _destroy(self, node: int, body: bytes) -> bytes:
        return b""

    def _lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(node, body.split(b"\0")[0])

    def _getattr(self, node: int, body: bytes) -> bytes:
        flags, _, handle = struct.unpack_from("<IIQ", body)
        by_handle = flags & 1 and handle in self._handles
        seen = os.fstat(self._handles[handle][0]) if by_handle else os.lstat(self._full(node))
        return struct.pack("<QII", 0, 0, 0) + _attributes(seen)

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid = struct.unpack_from(
            "<IIQQQQQQIIIIIII", body
        )
        at: int | bytes = self._handles[handle][0] if valid & _FH and handle in self._handles else self._full(node)
        if valid & _MODE:
            os.chmod(at, stat.S_IMODE(mode))
        if valid & (_UID | _GID):
            os.chown(at, uid if valid & _UID else -1, gid if valid & _GID else -1)
        if valid & _SIZE:
            os.truncate(at, size)
            self._unsynced.add(os.stat(at).st_ino)
        if valid & (_ATIME | _MTIME):
            seen, now = os.stat(at), time.time_ns()
            access = now if valid & _ATIME_NOW else atime * 10**9 + atime_ns if valid & _ATIME else seen.st_atime_ns
            change = now if valid & _MTIME_NOW else mtime * 10**9 + mtime_ns if valid & _MTIME else seen.st_mtime_ns
            os.utime(at, ns=(access, change))
        return struct.pack("<QII", 0, 0, 0) + _attributes(os.stat(at))

    def _mkdir(self, node: int, body: bytes) -> bytes:
        name = body[8:].split(b"\0")[0]
        os.mkdir(self._full(node, name), stat.S_IMODE(struct.unpack_from("<I", body)[0]))
        return self._entry(node, name)

    def _unlink(self, node: int, body: bytes) -> bytes:
        name = body.split(b"\0")[0]
        path = self._full(node, name)
        self._gone(path)
        os.unlink(path)
        self._forget_path(self._paths[self._node(node, name)])
        return b""

    def _rmdir(self, node: int, body: bytes) -> bytes:
        name = body.split(b"\0")[0]
        os.rmdir(self._full(node, name))
        self._forget_path(self._paths[self._node(node, name)])
        return b""

    def _rename(self, node: int, body: bytes) -> bytes:
        return self._move(node, struct.unpack_from("<Q", body)[0], body[8:], 0)

    def _rename2(self, node: int, body: bytes) -> bytes:
        target, flags = struct.unpack_from("<QI", body)
        return self._move(node, target, body[16:], flags)

    def _move(self, node: int, target: int, names: bytes, flags: int) -> bytes:
        old, new = names.split(b"\0")[:2]
        source, goal = self._full(node, old), self._full(target, new)
        replaced = None if flags or not os.path.lexists(goal) else os.lstat(goal)
        if flags:
            if _libc().renameat2(-100, source, -100, goal, flags) != 0:
                raise OSError(ctypes.get_errno(), "rename")
        else:
            os.rename(source, goal)
        if replaced is not None and replaced.st_nlink == 1:
            self._unsynced.discard(replaced.st_ino)
            self._bad.discard(replaced.st_ino)
        before, after = self._paths[self._node(node, old)], self._paths[self._node(target, new)]
        self._forget_path(after)
        for path in [path for path in self._nodes if path == before or path.startswith(before + b"/")]:
            number = self._nodes.pop(path)
            moved = after + path[len(before) :]
            self._nodes[moved], self._paths[number] = number, moved
        return b""

    def _gone(self, path: bytes) -> None:
        seen = os.lstat(path)
        if seen.st_nlink == 1:  # its number may be another file's next
            self._unsynced.discard(seen.st_ino)
            self._bad.discard(seen.st_ino)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        name = body[16:].split(b"\0")[0]
        fd = os.open(self._full(node, name), _flags(flags) | os.O_CREAT, stat.S_IMODE(mode))
        self._unsynced.add(os.fstat(fd).st_ino)
        entry = self._entry(node, name)
        return entry + struct.pack("<QII", self._new_handle(fd, self._node(node, name)), DIRECT_IO, 0)

    def _open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0]
        fd = os.open(self._full(node), _flags(flags))
        return struct.pack("<QII", self._new_handle(fd, node), DIRECT_IO, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(self._handles[handle][0], size, offset)

    def _write(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        fd = self._handles[handle][0]
        written = os.pwrite(fd, body[40 : 40 + size], offset)
        self._unsynced.add(os.fstat(fd).st_ino)
        return struct.pack("<II", written, 0)

    def _fsync(self, node: int, body: bytes) -> bytes:
        self._unsynced.discard(self._inode(body))
        return b""

    def _fsyncdir(self, node: int, body: bytes) -> bytes:
        return b""

    def _flush(self, node: int, body: bytes) -> bytes:
        return b""

    def _release(self, node: int, body: bytes) -> bytes:
        os.close(self._handles.pop(struct.unpack_from("<Q", body)[0])[0])
        return b""

    def _statfs(self, node: int, body: bytes) -> bytes:
        seen = os.statvfs(self._base)
        counts = (seen.f_blocks, seen.f_bfree, seen.f_bavail, seen.f_files, seen.f_ffree)
        return struct.pack("<QQQQQIIII24x", *counts, seen.f_bsize, 255, seen.f_frsize, 0)

    def _opendir(self, node: int, body: bytes) -> bytes:
        with os.scandir(self._full(node)) as entries:
            found = [(e.name, e.inode(), stat.S_IFDIR if e.is_dir() else stat.S_IFREG) for e in entries]
        handle = self._next
        self._next += 1
        self._lists[handle] = found
        return struct.pack("<QII", handle, 0, 0)

    def _readdir(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        told = b""
        for at, (name, inode, kind) in enumerate(self._lists[handle][offset:], offset + 1):
            entry = struct.pack("<QQII", inode, at, len(name), kind >> 12) + name + b"\0" * (-len(name) % 8)
            if len(told) + len(entry) > size:
                break
            told += entry
        return told

    def _releasedir(self, node: int, body: bytes) -> bytes:
        self._lists.pop(struct.unpack_from("<Q", body)[0], None)
        return b""


def _attributes(seen: os.stat_result) -> bytes:
    times = (seen.st_atime_ns, seen.st_mtime_ns, seen.st_ctime_ns)
    return struct.pack(
        "<QQQQQQIIIIIIIIII",
        seen.st_ino, seen.st_size, seen.st_blocks, *(t // 10**9 for t in times), *(t % 10**9 for t in times),
        seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_gid, 0, 4096, 0,
    )  # fmt: skip


def _flags(flags: int) -> int:
    """Return the flags for the file behind: what is direct here may not be there, and reading may be needed too."""
    return (flags & ~(os.O_DIRECT | os.O_APPEND | os.O_NOFOLLOW | os.O_NOATIME)) | os.O_CLOEXEC


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def tell(words: dict[str, Any]) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def main() -> None:
    os.umask(0)
    try:
        server = Server(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]))
    except OSError as error:
        tell({"unable": f"cannot mount a FUSE file system: {error.strerror} (needs root and /dev/fuse)"})
        return
    tell({"ready": True})
    server.serve()


if __name__ == "__main__":
    main()
