"""Gather one root's hints until its worker takes them: a set, never a queue, so it can neither block nor grow.

Past its bounds a box says less about more: names become their directory, then
everything becomes the whole root. A box has no lock; its source holds one.
"""

from __future__ import annotations

from collections.abc import Callable

from trigger_daemon.core.model import Signal
from trigger_daemon.hints import Hints

# About 35 MB, or ten seconds at 20,000 files/s, of a worker that is away.
NAMES_MAX = 200_000
# Beyond so many directories to be swept one by one, one sweep of the root is cheaper.
DIRS_MAX = 20_000


class Box:
    """What gathered of one root. Every `put` and `mark` returns True if the root's worker must be woken."""

    __slots__ = ("_all", "_count", "_dirs", "_gone", "_names", "_names_max", "_stirred", "path", "root", "wake")

    def __init__(self, root: int, path: bytes, wake: Callable[[], None], *, names_max: int = NAMES_MAX) -> None:
        self.root = root
        self.path = path
        self.wake = wake
        self._names_max = names_max
        self._stirred = False
        self._clear()

    def _clear(self) -> None:
        self._names: dict[bytes, dict[bytes, Signal]] = {}
        self._count = 0  # names in all directories
        self._dirs: set[bytes] = set()
        self._all = False
        self._gone = False

    def put(self, directory: bytes, names: dict[bytes, Signal]) -> bool:
        """Add names heard in one directory; later signals replace earlier ones. Keeps `names` itself."""
        mine = self._names.get(directory)
        if mine is None:
            self._names[directory] = names
            self._count += len(names)
        else:
            before = len(mine)
            mine.update(names)
            self._count += len(mine) - before
        if self._count > self._names_max:
            self._shrink()
        return self._stir()

    def put_directory(self, directory: bytes) -> bool:
        """Ask for a sweep of a directory with all below; of the root, if there are too many."""
        if not directory:
            return self.mark_all()
        self._dirs.add(directory)
        if len(self._dirs) > DIRS_MAX:
            self._forget()
        return self._stir()

    def mark_all(self) -> bool:
        """Ask for a sweep of the whole root. Names stay: they are looked at sooner than a sweep comes to them."""
        self._all = True
        return self._stir()

    def mark_gone(self) -> bool:
        """Say that the root is no longer where it was."""
        self._gone = True
        return self.mark_all()

    def take(self) -> Hints | None:
        """Return and clear what gathered, None if nothing."""
        if not self._stirred:
            return None
        taken = Hints(names=self._names, dirs=self._dirs, all=self._all, root_gone=self._gone)
        self._clear()
        self._stirred = False
        return taken

    def _stir(self) -> bool:
        woken = not self._stirred
        self._stirred = True
        return woken

    def _shrink(self) -> None:
        """Fold the fullest directory; everything, when even that is small: folding it would gain little each time."""
        fullest = max(self._names, key=lambda directory: len(self._names[directory]))
        if not fullest or len(self._names[fullest]) * 8 < self._count:
            self._forget()
            return
        self._count -= len(self._names.pop(fullest))
        self.put_directory(fullest)

    def _forget(self) -> None:
        self._names = {}
        self._count = 0
        self._dirs = set()
        self._all = True
