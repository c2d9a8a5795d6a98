"""Hear from macOS and Windows, or on request, through the watchdog library, which is held on a short leash.

One observer a root, started by the root's own worker. The library forgets to say
that events were lost, dies of a handler's exception while looking alive, and stays
deaf to a root made anew: so it is watched by `alive`, its log lines are read, and
whatever looks wrong ends as a sweep and a new observer. It is imported when used.
"""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trigger_daemon.clock import Clock, SystemClock
from trigger_daemon.core.model import Signal
from trigger_daemon.errors import TriggerError
from trigger_daemon.hints import Hints, WatchLimit
from trigger_daemon.hints.box import NAMES_MAX, Box

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

NEEDED = ((7, 1), (8,))  # 6.0 stays blind after an overflow, 7.0's reader dies in a `mkdir -p`
OVERFLOWS_MAX = 5  # within OVERFLOWS_S; its recovery removes every watch and so feeds the next overflow
OVERFLOWS_S = 60.0
SCAN_ONLY_S = 900.0  # after that many overflows it rests so long
BACKLOG_MAX = 100_000  # events between the library's own threads; its queue has no bound
RESTART_MAX_S = 60.0  # longest pause between two observers of a root
DIRECTORIES_MAX = 8_192  # where the kernel's queue size cannot be read


class _Root(Box):
    """A root's box and its observer."""

    __slots__ = ("counted", "failures", "identity", "not_before", "observer", "real", "refused", "starting")

    def __init__(self, root: int, path: bytes, wake: Callable[[], None], *, names_max: int) -> None:
        super().__init__(root, path, wake, names_max=names_max)
        self.real = path  # symlinks resolved: what some platforms report
        self.observer: BaseObserver | None = None
        self.starting = False
        self.identity = (0, 0)  # device and inode the observer was started on
        self.counted: set[bytes] = set()  # directories asked for, where each costs a watch
        self.failures = 0  # in a row
        self.not_before = 0.0
        self.refused = ""  # why there is no observer


class Source:
    """Events of the watchdog library; fulfils `hints.HintSource`. All methods may be called from any thread."""

    kind = "watchdog"

    def __init__(
        self, *, clock: Clock | None = None, names_max: int = NAMES_MAX, directories_max: int | None = None
    ) -> None:
        """Look for the library; raises TriggerError if it is not there in a version that works."""
        _check_version()
        self._clock: Clock = clock or SystemClock()
        self._names_max = names_max
        # Half the kernel's queue: its recovery queues an event for each watch. Elsewhere a tree is one watch.
        self._directories_max = _half_queue() if directories_max is None else directories_max
        self._lock = threading.Lock()
        self._roots: dict[int, _Root] = {}
        self._events = 0
        self._overflows = 0
        self._restarts = 0
        self._recent: deque[float] = deque(maxlen=OVERFLOWS_MAX)
        self._scan_only_until = 0.0
        self._trouble = ""  # what the library's threads said or died of, since the last `alive`
        self._stopped = False
        self._listener = _Listener(self._heard_line)
        logger = logging.getLogger("watchdog")
        logger.addHandler(self._listener)
        logger.propagate = False  # megabytes of warnings for a few thousand new directories
        logger.setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_died

    # ------------------------------------------------------------------ asked by roots

    def open(self, root: int, path: bytes, wake: Callable[[], None]) -> None:
        """Begin a root; a root that is open already begins anew."""
        self.close(root)
        with self._lock:
            self._roots[root] = _Root(root, path, wake, names_max=self._names_max)

    def close(self, root: int) -> None:
        """Forget a root and end its observer."""
        with self._lock:
            box = self._roots.pop(root, None)
            observer = box.observer if box is not None else None
        _end(observer)

    def watch(self, root: int, directory: bytes) -> None:
        """Start the root's observer when asked for the root itself; count the directories below it.

        Raises WatchLimit while the root can only be swept, OSError if the root is gone.
        """
        with self._lock:
            box = self._roots.get(root)
            if box is None:
                raise OSError(errno.ENOENT, f"root {root} is not open")
            dropped = self._count(box, directory) if directory and box.observer is not None else None
        _end(dropped)
        if not directory:
            self._watch_root(box)
        if box.refused:
            raise WatchLimit(box.refused, hint="until then sweeps alone find what is new; `events: none` says so")

    def take(self, root: int) -> Hints | None:
        """Return and clear what gathered, None if nothing."""
        with self._lock:
            box = self._roots.get(root)
            return box.take() if box is not None else None

    # ------------------------------------------------------------------ asked by the daemon

    def alive(self) -> str:
        """Return '' or what is wrong; to be called each second or so. Ends observers that do not work any more."""
        now = self._clock.monotonic()
        complaints: list[str] = []
        woken: list[_Root] = []
        ended: list[BaseObserver | None] = []
        with self._lock:
            if self._stopped:
                return ""
            if self._trouble:
                complaints.append(self._trouble)
                self._trouble = ""
            if len(self._recent) == OVERFLOWS_MAX and now - self._recent[0] < OVERFLOWS_S:
                self._recent.clear()
                self._scan_only_until = now + SCAN_ONLY_S
            for box in self._roots.values():
                if box.observer is not None:
                    wrong, gone = _diagnose(box.observer)
                    if now < self._scan_only_until:
                        wrong = f"it overflowed {OVERFLOWS_MAX} times within {OVERFLOWS_S:.0f} s"
                    if not wrong:
                        if box.failures and now > box.not_before + RESTART_MAX_S:
                            box.failures = 0
                        continue
                    ended.append(box.observer)
                    box.observer = None
                    pause_s = min(RESTART_MAX_S, 2.0 ** min(box.failures, 6)) - 1.0  # none the first time
                    box.not_before = max(self._scan_only_until, now + pause_s)
                    box.failures += 1
                    box.refused = f"watchdog is not used for {os.fsdecode(box.path)}: {wrong}"
                    self._restarts += 1
                    if box.mark_gone() if gone else box.mark_all():
                        woken.append(box)
                elif box.refused and not box.starting and box.not_before <= now and box.mark_all():
                    woken.append(box)  # its sweep starts another one
                if box.refused:
                    complaints.append(box.refused)
        for observer in ended:
            _end(observer)
        self._ring(woken)
        return "; ".join(complaints)

    def counters(self) -> dict[str, int]:
        """Return watches (trees, or directories where each costs a watch), events, overflows, restarts."""
        with self._lock:
            return {
                "watches": sum(max(1, len(b.counted)) for b in self._roots.values() if b.observer is not None),
                "events": self._events,
                "overflows": self._overflows,
                "restarts": self._restarts,
            }

    def stop(self) -> None:
        """End all observers, in threads of their own: theirs may hang with their mount."""
        with self._lock:
            self._stopped = True
            observers = [box.observer for box in self._roots.values()]
            self._roots.clear()
        for observer in observers:
            _end(observer)
        logging.getLogger("watchdog").removeHandler(self._listener)
        if threading.excepthook == self._thread_died:
            threading.excepthook = self._excepthook

    # ------------------------------------------------------------------ starting an observer

    def _watch_root(self, box: _Root) -> None:
        """Make sure that an observer stands on the root as it is now. Runs in the root's worker and may hang there."""
        status = os.stat(box.path)
        identity = (status.st_dev, status.st_ino)
        now = self._clock.monotonic()
        with self._lock:
            if self._stopped or box.starting or now < box.not_before:
                return
            if box.observer is not None and box.identity == identity:
                return
            replaced, box.observer = box.observer, None
            box.starting = True
            box.counted.clear()
        _end(replaced)
        observer = None
        refused = ""
        try:
            if _more_directories(box.path, self._directories_max):
                refused = (
                    f"{os.fsdecode(box.path)} holds more than {self._directories_max} directories, "
                    "after which watchdog does not recover from an overflow"
                )
            else:
                observer = self._start(box)
        except (OSError, RuntimeError) as error:  # limits of watches, instances, threads
            refused = f"watchdog cannot watch {os.fsdecode(box.path)}: {error}"
        finally:
            with self._lock:
                box.starting = False
                box.refused = refused
                if refused:
                    box.not_before = now + RESTART_MAX_S
                wanted = not self._stopped and self._roots.get(box.root) is box
                if wanted:
                    box.observer, box.identity = observer, identity
        if not wanted:
            _end(observer)

    def _start(self, box: _Root) -> BaseObserver:
        from watchdog import events, observers

        box.real = os.path.realpath(box.path)
        observer = observers.Observer()
        try:
            observer.schedule(
                _handler(self, box),
                os.fsdecode(box.real),
                recursive=True,
                # No Opened, ClosedNoWrite, Modified: our own sweeps would drown it.
                event_filter=[
                    events.FileCreatedEvent,
                    events.FileClosedEvent,
                    events.FileMovedEvent,
                    events.DirCreatedEvent,
                    events.DirMovedEvent,
                ],
            )
            observer.start()
        except BaseException:
            _end(observer)
            raise
        return observer

    def _count(self, box: _Root, directory: bytes) -> BaseObserver | None:
        """Count one more directory (under the lock); return the observer to be ended if there are too many."""
        if not self._directories_max:
            return None
        box.counted.add(directory)
        if len(box.counted) <= self._directories_max:
            return None
        observer, box.observer = box.observer, None
        box.counted.clear()
        box.not_before = self._clock.monotonic() + SCAN_ONLY_S
        box.refused = (
            f"{os.fsdecode(box.path)} has grown beyond {self._directories_max} directories, "
            "after which watchdog does not recover from an overflow"
        )
        return observer

    # ------------------------------------------------------------------ called by the library's threads

    def _heard(self, box: _Root, event: Any) -> None:
        """Fold one event. Never raises: an exception here would end the library's dispatcher, in silence."""
        try:
            path = os.fsencode(event.dest_path or event.src_path)
            moved = event.event_type == "moved"
            if os.sep != "/":
                path = path.replace(os.fsencode(os.sep), b"/")
            below = _below(path, box.real)
            if below is None:  # moved out
                return
            with self._lock:
                self._events += 1
                if not below:
                    woken = box.mark_gone() if moved else False
                elif event.is_directory:
                    woken = box.put_directory(below)
                else:
                    directory, _, name = below.rpartition(b"/")
                    signal: Signal = "none"
                    if event.event_type == "closed":
                        signal = "close"
                    elif moved and not event.is_synthetic:  # synthetic: only a directory above it was moved
                        signal = "rename"
                    woken = box.put(directory, {name: signal})
            if woken:
                self._ring([box])
        except Exception as error:  # noqa: BLE001  a subscriber: see above
            self._lost(f"an event could not be understood: {error!r}")

    def _heard_line(self, record: logging.LogRecord) -> None:
        """Take a warning of the library for what it is: its only way to say that events were lost."""
        message = record.getMessage()
        self._lost(f"watchdog says: {message}", overflow="overflow" in message and "events were lost" in message)

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and type(args.thread).__module__.startswith("watchdog."):
            self._lost(f"a thread of watchdog died: {args.exc_value!r}")
            return
        self._excepthook(args)

    def _lost(self, why: str, *, overflow: bool = False) -> None:
        with self._lock:
            self._trouble = why
            if overflow:
                self._overflows += 1
                self._recent.append(self._clock.monotonic())
            woken = [box for box in self._roots.values() if box.mark_all()]
        self._ring(woken)

    def _ring(self, boxes: Iterable[_Root]) -> None:
        """Wake the workers, outside the lock."""
        for box in boxes:
            try:
                box.wake()
            except Exception as error:  # noqa: BLE001  a subscriber: one that fails must not silence the others
                self._trouble = f"the worker of {os.fsdecode(box.path)} could not be woken: {error!r}"


class _Listener(logging.Handler):
    """Hands the library's warnings on and prints nothing."""

    def __init__(self, heard: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard(record)


def _handler(source: Source, box: _Root) -> Any:
    """Return a handler as the library wants it; made here because its base class must be imported late."""
    from watchdog.events import FileSystemEvent, FileSystemEventHandler

    class Handler(FileSystemEventHandler):
        def dispatch(self, event: FileSystemEvent) -> None:
            source._heard(box, event)

    return Handler()


def _diagnose(observer: BaseObserver) -> tuple[str, bool]:
    """Return what is wrong with an observer ('' if nothing), and whether that means its root is gone."""
    if not observer.is_alive():
        return "its dispatcher has ended", False
    reader = getattr(observer, "_inotify_fd", None)  # on Linux a third thread, which `is_alive` does not know of
    if reader is not None and not reader.is_alive():
        return "its reader has ended", False
    emitters = list(observer.emitters)
    if not emitters or not all(emitter.is_alive() for emitter in emitters):
        return "its emitter has ended, as it does when the root is deleted", True
    backlog = observer.event_queue.qsize()
    if backlog > BACKLOG_MAX:
        return f"{backlog} events wait in it", False
    return "", False


def _end(observer: BaseObserver | None) -> None:
    """End an observer without waiting: its threads are joined by its `stop`, and may hang with a mount."""
    if observer is None:
        return

    def end() -> None:
        try:
            observer.stop()
        except (OSError, RuntimeError):  # closed or never started
            return

    threading.Thread(target=end, name="watchdog-end", daemon=True).start()


def _below(path: bytes, root: bytes) -> bytes | None:
    """Return a path relative to its root, None if it is not inside."""
    if path == root:
        return b""
    prefix = root.rstrip(b"/") + b"/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _more_directories(path: bytes, limit: int) -> bool:
    """Return whether a tree has more directories than that; 0 means any number will do."""
    if not limit:
        return False
    return any(number > limit for number, _ in enumerate(_directories(path), start=1))


def _directories(path: bytes) -> Iterator[bytes]:
    """Yield a directory and all below it; one that cannot be listed counts as itself."""
    waiting = [path]
    while waiting:
        here = waiting.pop()
        yield here
        try:
            with os.scandir(here) as entries:
                waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:  # gone, or not ours to list: the sweep says so
            continue


def _half_queue() -> int:
    """Return half the size of the kernel's queue of events, 0 where there is none."""
    if sys.platform != "linux":
        return 0
    try:
        return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text("ascii")) // 2
    except (OSError, ValueError):
        return DIRECTORIES_MAX


def _check_version() -> None:
    oldest, below = NEEDED
    wanted = f">={oldest[0]}.{oldest[1]},<{below[0]}"
    hint = f"install `watchdog{wanted}`, or set `events: none`"
    try:
        version = importlib.metadata.version("watchdog")
    except importlib.metadata.PackageNotFoundError as error:
        raise TriggerError("the watchdog library is not installed", hint=hint) from error
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not oldest <= numbers < below:
        raise TriggerError(f"watchdog {version} loses events without a word", hint=hint)
