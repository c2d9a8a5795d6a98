"""Look at what lies on a file system that may hang: in a child process, with a deadline.

A call into a dead mount is ended by nobody once its server has taken it; nor is
the thread that made it, nor that thread's process, which keeps its locks. So a
child makes such calls. When it is late it is killed, left behind, and nothing
on that mount is asked for a while. Disks of this machine are looked at directly.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import trigger_daemon
from trigger_daemon.mounts import PLACES_MAX, Changes, Mount, Places, may_hang

DEADLINE_S = 10.0  # of one look: servers that live answer in less, soft mounts give up after 6 to 10 s
AGAIN_S = 60.0  # how long a mount that was late is left alone, longer if its child cannot be killed
FRESH_S = 10.0  # how long it is believed where links lead
START_S = 30.0  # for the child to be there, on a machine that is busy
SILENT = "its disk does not answer"

_SERVE = "from trigger_daemon.eyes import serve; serve()"


def _make(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))


_CALLS: dict[str, Callable[[str], Any]] = {
    "lstat": os.lstat, "real": os.path.realpath, "make": _make, "unlink": os.unlink,
}  # fmt: skip
if hasattr(os, "statvfs"):
    _CALLS["statvfs"] = lambda path: os.statvfs(path)


class Hangs(OSError):
    """The file system has not answered, now or a short while ago."""


class Eyes:
    """Any thread may look. One child, so whoever comes behind a look that is late waits for its deadline, too.

    `everywhere`: disks of this machine are asked through the child as well; for one look, whatever may be wrong.
    """

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, *, deadline_s: float = DEADLINE_S,
        everywhere: bool = False,
    ) -> None:  # fmt: skip
        self._monotonic = monotonic
        self._deadline_s = deadline_s
        self._everywhere = everywhere
        self._lock = threading.Lock()  # of the child; held while a look is under way
        self._where = threading.Lock()
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._hung: dict[str, tuple[float, subprocess.Popen[bytes]]] = {}  # mount point -> until, and who hangs there
        self._reals: dict[str, str] = {}  # where paths beyond led when that was last told
        self._changes = Changes()
        self._places = Places(self.beyond)
        self._fresh_until = monotonic() + FRESH_S
        self._closed = False

    def lstat(self, path: str) -> os.stat_result:
        """Return what stands at a path itself. Raises OSError, Hangs among them."""
        found: os.stat_result = self._look("lstat", path, self._way(path))
        return found

    def make(self, path: str) -> None:
        """Make an empty file, unless it is there. Raises OSError, Hangs among them."""
        self._look("make", path, self._way(path))

    def unlink(self, path: str) -> None:
        """Remove a file. Raises OSError, Hangs among them."""
        self._look("unlink", path, self._way(path))

    def mount(self, directory: str) -> Mount | None:
        """Return the mount on which a directory lies, wherever links lead; None where that cannot be told."""
        return self._fresh().mount(directory)

    def known_as(self, path: str) -> frozenset[str]:
        """Return what a file may be known by: its path, where links lead, and where that lies on its file system."""
        directory, _, name = path.rpartition("/")
        places = self._fresh()
        real, mount = places.real(directory or "/"), places.mount(directory or "/")
        found = {path, os.path.join(real, name)}
        if mount is not None:
            # A disk or a share has a name that a restart does not change; what has none has its number for now.
            source = mount.source if "/" in mount.source else mount.device
            found.add(f"{source}\t{os.path.join(places.of(directory or '/')[1], name)}")
        return frozenset(found)

    def _way(self, path: str) -> Mount | None:
        """Return the mount that may hang on the way to a name, None if there is none."""
        places = self._fresh()
        directory, _, name = path.rpartition("/")
        if self._everywhere:
            mount = places.table.of(path)
        elif (mount := places.crosses(directory or "/")) is None:
            whole = os.path.join(places.real(directory or "/"), name)
            mount = places.table.of(whole) if whole in places.table.points else None
            mount = mount if may_hang(mount) else None
        return mount

    def statvfs(self, path: str) -> os.statvfs_result:
        """Return how full the file system is. Raises OSError, Hangs among them."""
        found: os.statvfs_result = self._look("statvfs", path, self._fresh().crosses(path))
        return found

    def close(self) -> None:
        """End the child; a look that is under way fails. Waits for nothing."""
        self._closed = True
        if child := self._child:
            child[0].kill()

    # ------------------------------------------------------------------ where

    def _fresh(self) -> Places:
        now = self._monotonic()
        with self._where:
            if now >= self._fresh_until or self._changes.any():
                self._fresh_until = now + FRESH_S
                self._places = Places(self.beyond)
            return self._places

    def beyond(self, path: str, mount: Mount) -> str:
        """Return where a path leads that crosses this mount: as it was last known, or is written, if nobody answers."""
        try:
            real: str = self._look("real", path, mount)
        except OSError:
            return self._reals.get(path, os.path.normpath(path))
        if len(self._reals) >= PLACES_MAX:
            self._reals.clear()
        self._reals[path] = real
        return real

    # ------------------------------------------------------------------ the child

    def _look(self, call: str, path: str, mount: Mount | None) -> Any:
        """Look; through the child if there is a mount on the way that may hang. Raises OSError."""
        if not self._everywhere and mount is None:
            return _CALLS[call](path)
        point = mount.mountpoint if mount else ""
        with self._lock:
            self._refuse(point, path)
            child, pipe = self._ready()
            try:
                pipe.send((call, path))
                if not pipe.poll(self._deadline_s):
                    self._hung[point] = self._monotonic() + AGAIN_S, child
                    self._drop()
                    self._refuse(point, path)
                answer = pipe.recv()
            except (EOFError, pickle.UnpicklingError, BrokenPipeError, ConnectionError):
                self._drop()
                raise OSError(errno.EIO, "the process that looks at it has ended", path) from None
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _refuse(self, point: str, path: str) -> None:
        """Raise Hangs if this mount was late, and its child is not gone or that was not long ago."""
        if point in self._hung:
            until, child = self._hung[point]
            if self._monotonic() < until or child.poll() is None:
                raise Hangs(errno.ETIMEDOUT, SILENT, path)
            del self._hung[point]

    def _ready(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """Return a child that waits for a question. Raises OSError."""
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "it is not looked at any more")
        if self._child is None or self._child[0].poll() is not None:
            self._drop()
            ours, theirs = socket.socketpair()
            with theirs:
                source = os.path.dirname(os.path.dirname(os.path.abspath(trigger_daemon.__file__)))
                search = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
                child = subprocess.Popen(
                    [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], cwd="/", env={**os.environ, "PYTHONPATH": search},
                    # Whoever reads what we print does not wait for a child that nobody can end.
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            self._child = child, Connection(ours.detach())
            if not self._child[1].poll(START_S):
                self._drop()
                raise OSError(errno.EAGAIN, "no process could be started that looks at it")
            self._child[1].recv()
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            child, pipe = self._child
            self._child = None
            child.kill()
            pipe.close()


def serve() -> None:
    """Be the child: answer until the other end is closed."""
    pipe = Connection(int(sys.argv[1]))
    pipe.send("ready")
    try:
        while True:
            call, path = pipe.recv()
            try:
                answer = _CALLS[call](path)
            except OSError as error:
                answer = error
            except ValueError as error:  # no name that any file system has
                answer = OSError(errno.EINVAL, str(error), path)
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)
