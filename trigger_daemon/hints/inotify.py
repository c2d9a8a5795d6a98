"""Hear from Linux where something changed: one inotify descriptor and one thread that only reads.

The thread never touches a watched file system: it reads, decodes and folds into
one `Box` per root. `watch` runs in the root's own worker and may hang there, alone;
no lock is held meanwhile. Nothing heard is trusted further than "look there": what
is lost (overflow, unknown watch, a dead reader) ends as a sweep of the root, and
recovery adds watches again, never removes them (each removal is an event itself).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from trigger_daemon.clock import Clock, SystemClock
from trigger_daemon.core.model import Signal
from trigger_daemon.hints import Hints, WatchLimit
from trigger_daemon.hints.box import NAMES_MAX, Box

IN_CLOSE_WRITE = 0x8
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000
IN_DONT_FOLLOW = 0x2000000
IN_EXCL_UNLINK = 0x4000000
IN_ISDIR = 0x40000000

# No MODIFY, OPEN, ACCESS, CLOSE_NOWRITE: our own sweeps would drown us. No DELETE,
# MOVED_FROM: only sweeps judge absence. The kernel replaces a watch's mask by that of a later add, so all adds use one.
ROOT_MASK = (
    IN_CREATE | IN_MOVED_TO | IN_CLOSE_WRITE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR | IN_EXCL_UNLINK
)  # the root itself may be reached through a symlink
MASK = ROOT_MASK | IN_DONT_FOLLOW
CONTROL = IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT | IN_Q_OVERFLOW | IN_IGNORED

# What a plain event of a file says. The last word counts: a create after a rename is
# another file, and what was said of the old one must not vouch for it.
SIGNALS: dict[int, Signal] = {IN_CREATE: "none", IN_CLOSE_WRITE: "close", IN_MOVED_TO: "rename"}

RECORD = struct.Struct("iIII")  # wd, mask, cookie, length of the name with its padding
READ_BYTES = 256 * 1024
# One wake-up an event costs more than the event, here and at the writer; 2 ms of latency buy most of it back.
PAUSE_S = 0.002
# Beyond some 10,000 files/s work is saved by looking at more names of a directory at once, and a longer pause gathers
# them: each event is worth so much of it, so that a pause grows to the longest only where as many come as it foresees.
PAUSE_PER_EVENT_S, PAUSE_MAX_S = 0.000_05, 0.016

ADD_TRIES = 4  # a directory that keeps moving while it is added gets its sweep instead
STRAYS_MAX = 1_000  # unknown watch numbers that an add under way may still explain
BLIND_MAX = 100_000  # unwatched directories remembered by name; only their number is ever told
LIMIT_RETRY_S = 30.0  # how often a refused watch is asked for again: the kernel's answer rarely changes
STALE_S = 30.0  # a moved directory's watch is left alone so long: its worker is likely to add it again
PRUNE_MAX = 1_000  # watches removed at a time: each queues an event, and the queue holds 16,384
OVERFLOWS_MAX = 3  # within OVERFLOWS_S: no longer a burst
OVERFLOWS_S = 60.0
STUCK_S = 5.0  # events waiting so long without a read
RESTART_MAX_S = 60.0  # longest pause between two restarts
STOP_S = 1.0  # wait for the reader so long at the end

_libc = ctypes.CDLL(None, use_errno=True)
_inotify_init1 = _libc.inotify_init1
_inotify_init1.argtypes = [ctypes.c_int]
_inotify_add_watch = _libc.inotify_add_watch
_inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_inotify_rm_watch = _libc.inotify_rm_watch
_inotify_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]


class _Root(Box):
    """A root's box, and which of its directories are watched."""

    __slots__ = ("blind", "watched")

    def __init__(self, root: int, path: bytes, wake: Callable[[], None], *, names_max: int) -> None:
        super().__init__(root, path, wake, names_max=names_max)
        self.watched: dict[bytes, int] = {}  # directory -> watch number
        self.blind: set[bytes] = set()  # directories the kernel refused to watch


class _Queue:
    """One inotify descriptor, and what its watch numbers stand for."""

    __slots__ = ("adding", "bell", "early", "fd", "places", "retired", "stale")

    def __init__(self) -> None:
        """Open the descriptor; raises WatchLimit if there are too many."""
        try:
            self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # ends the reader's wait
        except OSError as error:
            raise _too_many_files(error) from error
        self.fd = _inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            code = ctypes.get_errno()
            os.close(self.bell)
            raise _too_many_instances(code)
        # One directory may stand in several roots (nested, or mounted twice): the kernel gives it one number.
        self.places: dict[int, tuple[tuple[_Root, bytes], ...]] = {}
        self.stale: dict[int, float] = {}  # watches that lead nowhere now, since when: their events are dropped
        self.early: set[int] = set()  # numbers heard before the add that made them returned
        self.adding = 0  # adds under way
        self.retired = False

    def retire(self) -> None:
        """Close the descriptors, or leave it to the last add under way: its number must not be given out again."""
        self.retired = True
        if not self.adding and self.fd >= 0:
            for descriptor in (self.fd, self.bell):
                try:
                    os.close(descriptor)
                except OSError:  # closed by whoever broke it
                    continue
            self.fd = -1

    def waiting_bytes(self) -> int:
        """Return how much is queued in the kernel; 0 if that cannot be told."""
        answer = bytearray(4)
        try:
            fcntl.ioctl(self.fd, termios.FIONREAD, answer)
        except OSError:
            return 0
        return int.from_bytes(answer, "little")


@dataclass(slots=True)
class _Limit:
    """The kernel refuses new watches, by these settings, and is not asked before `until`."""

    until: float
    settings: tuple[int, int]


class Source:
    """The kernel's own events; fulfils `hints.HintSource`. All methods may be called from any thread."""

    kind = "inotify"

    def __init__(self, *, clock: Clock | None = None, names_max: int = NAMES_MAX) -> None:
        self._clock: Clock = clock or SystemClock()
        self._names_max = names_max
        self._lock = threading.Lock()  # never held in a system call that can wait for a file system
        self._roots: dict[int, _Root] = {}
        self._queue: _Queue | None = None
        self._reader: threading.Thread | None = None
        self._down = ("inotify has not been started", "")  # why there is no queue: message, hint
        self._death: BaseException | None = None
        self._deaths = 0  # in a row
        self._again_at = 0.0  # no restart before
        self._started_at = 0.0
        self._limit: _Limit | None = None
        self._changes = 0  # watches that moved or ended: an add that saw one pass by asks again
        self._events = 0
        self._overflows = 0
        self._restarts = 0
        self._recent: deque[float] = deque(maxlen=OVERFLOWS_MAX)
        self._reads = 0
        self._unread: tuple[int, float] | None = None  # reads then, since when something waits
        self._deaf = ""  # a root that could not be woken
        self._stopped = False
        with self._lock:
            self._begin()

    # ------------------------------------------------------------------ asked by roots

    def open(self, root: int, path: bytes, wake: Callable[[], None]) -> None:
        """Begin a root; a root that is open already begins anew."""
        self.close(root)
        with self._lock:
            self._roots[root] = _Root(root, path, wake, names_max=self._names_max)

    def close(self, root: int) -> None:
        """Forget a root. The kernel's watches go a few at a time: each removal is an event."""
        with self._lock:
            box = self._roots.pop(root, None)
            if box is not None and self._queue is not None:
                self._unmap_tree(self._queue, box, b"")

    def watch(self, root: int, directory: bytes) -> None:
        """Watch one directory; it must be listed after this, not before.

        Raises WatchLimit (cheaply, without asking the kernel each time) or OSError.
        """
        with self._lock:
            box = self._roots.get(root)
            if box is None:
                raise OSError(errno.ENOENT, f"root {root} is not open")
            queue = self._admit(box, directory)
            queue.adding += 1
        path = box.path + b"/" + directory if directory else box.path
        mask = MASK if directory else ROOT_MASK
        rung = False
        passed: list[int] = []
        for tries_left in range(ADD_TRIES - 1, -1, -1):
            changes = self._changes
            number = _inotify_add_watch(queue.fd, path, mask)
            refused = 0 if number >= 0 else ctypes.get_errno()
            with self._lock:
                if not refused:
                    passed.append(number)
                    if changes != self._changes and tries_left:
                        continue  # what was added may have moved away before it could be written down
                    if self._roots.get(root) is box and queue is self._queue:  # else nobody asks any more, or all again
                        rung = self._map(queue, box, directory, number)
                        if changes != self._changes:
                            rung |= box.put_directory(directory)
                woken = self._end_add(queue, passed)
                limit = self._refuse(box, directory) if refused == errno.ENOSPC else None
                break
        self._ring([*woken, box] if rung else woken)
        if limit is not None:
            raise limit
        if refused:
            raise OSError(refused, os.strerror(refused), os.fsdecode(path))

    def take(self, root: int) -> Hints | None:
        """Return and clear what gathered, None if nothing."""
        with self._lock:
            box = self._roots.get(root)
            return box.take() if box is not None else None

    # ------------------------------------------------------------------ asked by the daemon

    def alive(self) -> str:
        """Return '' or what is wrong; to be called each second or so. Restarts a dead reader, prunes stale watches."""
        now = self._clock.monotonic()
        with self._lock:
            if self._stopped:
                return ""
            woken: list[_Root] = []
            if self._reader is None or not self._reader.is_alive():
                complaint, woken = self._restart(now)
            else:
                if self._deaths and now - self._started_at > RESTART_MAX_S:
                    self._deaths = 0
                woken = self._lift_limit()
                self._prune(now)
                complaint = self._complaint(now)
        self._ring(woken)
        return complaint

    def counters(self) -> dict[str, int]:
        """Return watches, unwatched (refused by the limit), events, overflows, restarts."""
        with self._lock:
            return {
                "watches": len(self._queue.places) if self._queue is not None else 0,
                "unwatched": sum(len(box.blind) for box in self._roots.values()),
                "events": self._events,
                "overflows": self._overflows,
                "restarts": self._restarts,
            }

    def stop(self) -> None:
        """End the thread and close the descriptor; watches end with it."""
        with self._lock:
            self._stopped = True
            queue, reader = self._queue, self._reader
            self._queue = None
            self._down = ("inotify has been stopped", "")
        if queue is None:
            return
        os.eventfd_write(queue.bell, 1)
        if reader is not None and reader is not threading.current_thread():
            reader.join(STOP_S)
        if reader is None or not reader.is_alive():  # else it still uses the descriptor, which ends with the process
            with self._lock:
                queue.retire()

    # ------------------------------------------------------------------ the reader

    def _run(self, queue: _Queue) -> None:
        try:
            self._read(queue)
        except Exception as error:  # noqa: BLE001  the top of a thread: `alive` says what ended it, and begins again
            self._death = error

    def _read(self, queue: _Queue) -> None:
        poll = select.poll()
        poll.register(queue.fd, select.POLLIN)
        poll.register(queue.bell, select.POLLIN)
        while True:
            poll.poll()
            if self._stopped:
                return
            try:
                data = os.read(queue.fd, READ_BYTES)
            except BlockingIOError:
                continue
            if not data:
                raise OSError(errno.EBADF, "the inotify descriptor reads as something else")
            self._reads += 1
            events = self._fold(queue, data)
            if len(data) < READ_BYTES // 2:  # else there is a backlog
                time.sleep(min(max(PAUSE_S, events * PAUSE_PER_EVENT_S), PAUSE_MAX_S))

    def _fold(self, queue: _Queue, data: bytes) -> int:
        """Fold one read into the boxes, without a lock: per event one record, name, and dict entry. Return how many."""
        heard: dict[int, dict[bytes, Signal]] = {}
        made: set[tuple[int, bytes]] = set()
        unpack, signal_of = RECORD.unpack_from, SIGNALS.get
        position, end, events = 0, len(data), 0
        last, names = 0, {}  # watch numbers begin at 1
        while position < end:
            number, mask, _, length = unpack(data, position)
            start = position + 16
            position = start + length
            events += 1
            signal = signal_of(mask)
            if signal is not None:
                if number != last:
                    last = number
                    found = heard.get(number)
                    names = heard[number] = {} if found is None else found
                names[data[start:position].rstrip(b"\0")] = signal
            elif mask & CONTROL:
                self._ring(self._pour(queue, heard, made))  # what was heard before is about the old places
                heard, made, last = {}, set(), 0
                self._ring(self._control(queue, number, mask))
            elif mask & IN_ISDIR:
                made.add((number, data[start:position].rstrip(b"\0")))
        self._ring(self._pour(queue, heard, made))
        self._events += events
        return events

    def _pour(
        self, queue: _Queue, heard: dict[int, dict[bytes, Signal]], made: set[tuple[int, bytes]]
    ) -> list[_Root]:
        """Pour what was heard, by watch number, into the boxes; return those to be woken."""
        woken: list[_Root] = []
        with self._lock:
            for number, names in heard.items():
                places = queue.places.get(number)
                if places is None:
                    woken += self._stray(queue, number)
                    continue
                for box, directory in places:
                    if box.put(directory, names if len(places) == 1 else dict(names)):
                        woken.append(box)
            for number, name in made:
                places = queue.places.get(number)
                if places is None:
                    woken += self._stray(queue, number)
                    continue
                for box, directory in places:
                    if box.put_directory(directory + b"/" + name if directory else name):
                        woken.append(box)
        return woken

    def _control(self, queue: _Queue, number: int, mask: int) -> list[_Root]:
        """Follow what happened to a watch itself, or to the queue; return the boxes to be woken."""
        with self._lock:
            if mask & IN_Q_OVERFLOW:
                self._overflows += 1
                self._recent.append(self._clock.monotonic())
                return self._mark_all()
            self._changes += 1
            places = queue.places.get(number)
            if mask & IN_IGNORED:  # the last word about a number
                queue.early.discard(number)
                queue.stale.pop(number, None)
            if places is None:
                return [] if mask & IN_IGNORED else self._stray(queue, number)
            woken: list[_Root] = []
            for box, directory in places:
                if mask & IN_MOVE_SELF:
                    self._unmap_tree(queue, box, directory)
                else:
                    self._unmap(queue, box, directory, number)
                if not directory and mask & (IN_MOVE_SELF | IN_DELETE_SELF | IN_UNMOUNT):
                    rung = box.mark_gone()
                elif mask & IN_MOVE_SELF:
                    # Perhaps it was added at its new place before this was heard, and that has just been unwritten.
                    rung = box.put_directory(directory)
                elif mask & (IN_UNMOUNT | IN_IGNORED):  # what lies under the mount; a live directory lost its watch
                    rung = box.mark_all()
                else:
                    rung = False  # deleted: for sweeps to judge
                if rung:
                    woken.append(box)
            if mask & IN_IGNORED:
                queue.stale.pop(number, None)
            return woken

    def _ring(self, boxes: Iterable[_Root]) -> None:
        """Wake the workers, outside the lock."""
        for box in boxes:
            try:
                box.wake()
            except Exception as error:  # noqa: BLE001  a subscriber: one that fails must not silence the others
                self._deaf = f"the worker of {os.fsdecode(box.path)} could not be woken: {error!r}"

    # ------------------------------------------------------------------ under the lock

    def _begin(self) -> None:
        """Start the reader on a new queue; `_down` says why not."""
        try:
            self._queue = _Queue()
        except WatchLimit as error:
            self._down = (error.message, error.hint)
            return
        reader = threading.Thread(target=self._run, args=(self._queue,), name="inotify", daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            self._death = error
            return
        self._reader = reader
        self._started_at = self._clock.monotonic()

    def _restart(self, now: float) -> tuple[str, list[_Root]]:
        """Begin again, later after each failure in a row; return what to tell and whom to wake."""
        if self._queue is not None:
            self._down = (f"the inotify reader ended: {self._death!r}", "")
        message, hint = self._down
        told = f"{message} ({hint})" if hint else message
        if now < self._again_at:
            return f"{told}; starts again in {self._again_at - now:.0f} s", []
        self._again_at = now + min(RESTART_MAX_S, 2.0 ** min(self._deaths, 6))
        self._deaths += 1
        if self._queue is not None:
            self._queue.retire()  # whatever broke it, the descriptor or what was known of it: begin with a new one
            self._queue = None
            for box in self._roots.values():
                box.watched.clear()
        self._begin()
        if self._reader is None or not self._reader.is_alive():
            return f"{told}; starts again in {self._again_at - now:.0f} s", []
        self._restarts += 1
        return f"{told}; it has been started again and every root is swept", self._mark_all()

    def _complaint(self, now: float) -> str:
        """Return what is wrong though the reader lives."""
        assert self._queue is not None
        if self._deaf:
            deaf, self._deaf = self._deaf, ""
            return deaf
        if self._unread is None or self._unread[0] != self._reads or not self._queue.waiting_bytes():
            self._unread = (self._reads, now)
        elif now - self._unread[1] > STUCK_S:
            return f"the inotify reader has not read for {now - self._unread[1]:.0f} s though events wait"
        if any(box.blind for box in self._roots.values()) or (self._limit is not None and now < self._limit.until):
            limit = self._watch_limit()
            return f"{limit.message} ({limit.hint})"
        if len(self._recent) == OVERFLOWS_MAX and now - self._recent[0] < OVERFLOWS_S:
            size = setting("fs/inotify/max_queued_events")
            return (
                f"the kernel's queue of events (fs.inotify.max_queued_events = {size}) has overflowed "
                f"{OVERFLOWS_MAX} times within {OVERFLOWS_S:.0f} s; every root was swept "
                f"(`sysctl -w fs.inotify.max_queued_events={max(size, 16_384) * 8}`, then restart the daemon)"
            )
        return ""

    def _mark_all(self) -> list[_Root]:
        return [box for box in self._roots.values() if box.mark_all()]

    def _map(self, queue: _Queue, box: _Root, directory: bytes, number: int) -> bool:
        """Write down which directory a number stands for; return True if the box must be woken."""
        box.blind.discard(directory)
        before = box.watched.get(directory)
        if before == number:
            return False
        queue.stale.pop(number, None)
        if number not in queue.places and self._limit is not None and self._clock.monotonic() >= self._limit.until:
            self._limit = None  # the kernel has room again
        rung = False
        if before is not None:  # another directory stands there now, so all known below is of the old one
            self._unmap_tree(queue, box, directory)
            rung = box.put_directory(directory) if directory else False
        others = []
        for place in queue.places.get(number, ()):
            if place[0] is not box:
                others.append(place)
            elif box.watched.get(place[1]) == number:  # renamed: the number keeps to the directory, not to the path
                del box.watched[place[1]]
        queue.places[number] = (*others, (box, directory))
        box.watched[directory] = number
        return rung

    def _unmap(self, queue: _Queue, box: _Root, directory: bytes, number: int) -> None:
        """Forget that a number stands for a directory; what else is heard from it is dropped."""
        if box.watched.get(directory) == number:
            del box.watched[directory]
        others = tuple(place for place in queue.places.get(number, ()) if place != (box, directory))
        if others:
            queue.places[number] = others
        else:
            queue.places.pop(number, None)
            queue.stale[number] = self._clock.monotonic()

    def _unmap_tree(self, queue: _Queue, box: _Root, directory: bytes) -> None:
        """The same for a directory and all below. A pass over all watches of the root: about 10 ms for 100,000."""
        below = directory + b"/"
        moved = [
            (path, number)
            for path, number in box.watched.items()
            if not directory or path == directory or path.startswith(below)
        ]
        for path, number in moved:
            self._unmap(queue, box, path, number)

    def _stray(self, queue: _Queue, number: int) -> list[_Root]:
        """Judge a number that stands for nothing: dropped, not written down yet, or lost, which asks for sweeps."""
        if number in queue.stale:
            return []
        if queue.adding:
            # The add that made it has not returned; its caller lists the directory after that, and finds what this was.
            queue.early.add(number)
            if len(queue.early) <= STRAYS_MAX:
                return []
        queue.stale[number] = self._clock.monotonic()
        return self._mark_all()

    def _end_add(self, queue: _Queue, passed: Iterable[int]) -> list[_Root]:
        """End an add that was given these numbers; with none under way, one heard early that none claimed is lost."""
        now = self._clock.monotonic()
        for number in passed:
            queue.early.discard(number)
            if number not in queue.places:
                queue.stale[number] = now
        queue.adding -= 1
        if queue.retired:
            queue.retire()
        if queue.adding or not queue.early:
            return []
        queue.stale.update((number, now) for number in queue.early)
        queue.early.clear()
        return self._mark_all()

    def _prune(self, now: float) -> None:
        """Give back watches that lead nowhere, slowly; only while no add could be about to use one again."""
        queue = self._queue
        if queue is None or queue.adding:
            return
        due: list[int] = []
        for number, since in queue.stale.items():  # oldest first
            if now - since < STALE_S or len(due) == PRUNE_MAX:
                break
            due.append(number)
        for number in due:
            if _inotify_rm_watch(queue.fd, number) < 0:  # ended already, and its IGNORED lost
                del queue.stale[number]
            else:
                queue.stale[number] = queue.stale.pop(number)  # until its IGNORED is read, or lost

    # ------------------------------------------------------------------ limits

    def _admit(self, box: _Root, directory: bytes) -> _Queue:
        """Return the queue to add to, or raise what is known to stand in the way."""
        if self._queue is None:
            raise WatchLimit(self._down[0], hint=self._down[1])
        if not directory:
            box.blind.clear()  # a sweep begins, and will name them again
        if (
            self._limit is not None
            and directory not in box.watched  # those the kernel takes again even at its limit
            and self._clock.monotonic() < self._limit.until
        ):
            if len(box.blind) < BLIND_MAX:
                box.blind.add(directory)
            raise self._watch_limit()
        return self._queue

    def _refuse(self, box: _Root, directory: bytes) -> WatchLimit:
        """Write down that the kernel refused a directory."""
        if len(box.blind) < BLIND_MAX:
            box.blind.add(directory)
        self._limit = _Limit(self._clock.monotonic() + LIMIT_RETRY_S, watch_settings())
        return self._watch_limit()

    def _lift_limit(self) -> list[_Root]:
        """Ask for sweeps, which add watches, of the roots that lack some, as soon as the kernel's settings changed."""
        if self._limit is None or self._limit.settings == watch_settings():
            return []
        self._limit = None
        return [box for box in self._roots.values() if box.blind and box.mark_all()]

    def _watch_limit(self) -> WatchLimit:
        """Say which limit stands in the way, from what was read when it was met."""
        host, namespace = self._limit.settings if self._limit is not None else watch_settings()
        watched = len(self._queue.places) if self._queue is not None else 0
        blind = sum(len(box.blind) for box in self._roots.values())
        message = f"the kernel refuses more watches: fs.inotify.max_user_watches is {host}"
        hint = f"`sysctl -w fs.inotify.max_user_watches={roomier(host, watched + blind)}`"
        if namespace >= 0:
            message += f", and user.max_inotify_watches of this user namespace (container) is {namespace}"
            hint += f" and `sysctl -w user.max_inotify_watches={roomier(namespace, watched + blind)}` in the namespace"
        message += f"; {watched} directories are watched here, at least {max(blind, 1)} are not"
        return WatchLimit(message, hint=f"raise it: {hint}; until then sweeps alone find what is in them")


def roomier(present: int, needed: int) -> int:
    """Propose a limit: a power of two, twice what is there and twice what is needed."""
    return 1 << (2 * max(present, needed, 8_192) - 1).bit_length()


def setting(name: str) -> int:
    """Return a kernel setting, -1 if it cannot be read."""
    try:
        return int(Path("/proc/sys", name).read_text("ascii"))
    except (OSError, ValueError):
        return -1


def _namespaced(name: str) -> int:
    """Return a setting of our user namespace, -1 if we are in the first one, where it only repeats the host's."""
    try:
        if Path("/proc/self/uid_map").read_text("ascii").split() == ["0", "0", "4294967295"]:
            return -1
    except OSError:
        return -1
    return setting(name)


def watch_settings() -> tuple[int, int]:
    return setting("fs/inotify/max_user_watches"), _namespaced("user/max_inotify_watches")


def _too_many_files(error: OSError) -> WatchLimit:
    return WatchLimit(
        f"inotify cannot be started: {error.strerror}",
        hint="raise the number of open files of the daemon (`LimitNOFILE=` in its systemd unit)",
    )


def _too_many_instances(code: int) -> WatchLimit:
    if code != errno.EMFILE:
        return WatchLimit(f"inotify cannot be started: {os.strerror(code)}", hint="see `trigger-daemon doctor`")
    host, namespace = setting("fs/inotify/max_user_instances"), _namespaced("user/max_inotify_instances")
    message = f"inotify cannot be started: fs.inotify.max_user_instances is {host}"
    hint = f"`sysctl -w fs.inotify.max_user_instances={roomier(host, 0)}`"
    if namespace >= 0:
        message += f", and user.max_inotify_instances of this user namespace (container) is {namespace}"
        hint += f" and `sysctl -w user.max_inotify_instances={roomier(namespace, 0)}` in the namespace"
    return WatchLimit(
        f"{message}; other programs of this user hold them all",
        hint=f"raise it: {hint}, or end one of those; until then sweeps alone find new files",
    )
