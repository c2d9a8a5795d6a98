"""Read free space of the volumes in the settings, cheaply, and never waiting for a dead mount.

The mount of each is remembered: where it is gone, the disk beneath is not taken for the volume.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from trigger_daemon import points
from trigger_daemon.core.model import Gauged, Mounted
from trigger_daemon.eyes import Eyes
from trigger_daemon.mounts import Mount, Places, Table
from trigger_daemon.workers import Workers

EVERY_S = 2.0
RESOLVE_EVERY_S = 10.0  # links that were set anew while nothing else changed are followed after so long
KEPT_EVERY_S = 10.0  # readings that the fill rate is told from
WINDOW_S = 600.0  # the fill rate is the slope over this long
SPAN_S = 120.0  # of readings, before it is told when a volume is full: one file in one burst is no trend
TREND_EVERY_S, TREND_S = 300.0, 2 * 86_400.0  # readings that people are shown
TREND_SHOWN = 72
DEADLINE_S = 10.0


@dataclass(slots=True)
class Gauge:
    """What is known of one volume."""

    path: str
    total_bytes: int = 0
    free_bytes: int = 0
    inodes: int = 0
    free_inodes: int = -1
    error: str = ""
    pending: bool = False
    history: deque[tuple[float, int]] = field(default_factory=deque)
    trend: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=round(TREND_S / TREND_EVERY_S)))

    def take(self, now: float, total: int, free: int, inodes: int = 0, free_inodes: int = -1) -> None:
        """Note a reading."""
        self.total_bytes, self.free_bytes, self.error = total, free, ""
        self.inodes, self.free_inodes = inodes, free_inodes
        if not self.history or now - self.history[-1][0] >= KEPT_EVERY_S:
            self.history.append((now, free))
        while now - self.history[0][0] > WINDOW_S:
            self.history.popleft()
        if not self.trend or now - self.trend[-1][0] >= TREND_EVERY_S:
            self.trend.append((now, free))

    def fill_bytes_per_s(self) -> float | None:
        """Return how fast free space shrinks (negative: it grows), None before there are two readings.

        The median of the slopes between all pairs: a burst, or one large removal, does not turn it.
        """
        points = list(self.history)
        slopes = [
            (free0 - free1) / (t1 - t0)
            for i, (t0, free0) in enumerate(points) for t1, free1 in points[i + 1 :] if t1 > t0
        ]  # fmt: skip
        return statistics.median(slopes) if slopes else None

    def words(self) -> dict[str, object]:
        """Return what status tells; the state of a volume of the settings is the core's."""
        rate = self.fill_bytes_per_s()
        return {
            "path": self.path,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "inodes": self.inodes,
            "free_inodes": max(self.free_inodes, 0),
            "fill_bytes_per_s": None if rate is None else round(rate),
            "full_in_s": self.full_in_s(rate),
            "state": "ok",
            "error": self.error or None,
        }

    def trend_words(self, now: float, utc: float) -> list[tuple[float, int]]:
        """Return at most TREND_SHOWN readings of the last days, the oldest first: UTC, free bytes."""
        step = max(1, -(-len(self.trend) // TREND_SHOWN))
        return [(round(utc - (now - at), 1), free) for at, free in list(self.trend)[::-step][::-1]]

    def full_in_s(self, rate: float | None) -> int | None:
        """Return when it is full at this rate, None while it does not fill, or a burst cannot be told from a trend."""
        if rate is None or rate <= 0 or self.history[-1][0] - self.history[0][0] < SPAN_S:
            return None
        return round(self.free_bytes / rate)


class Away(Exception):
    """The mount that a volume lay on is gone; the words are its mount point."""


class Volumes:
    """All gauges; `sample` is called from the loop and returns at once, the readings are posted."""

    def __init__(
        self, gauges: list[Gauge], monotonic: Callable[[], float], post: Callable[[Gauged | Mounted], None],
        *, book: str = "",
    ) -> None:  # fmt: skip
        """`book` is the file in which their mount points are remembered over a restart; without, until the end."""
        self.gauges = gauges
        self._monotonic = monotonic
        self._post = post
        self._workers = Workers("volumes", 2, monotonic)
        self._eyes = Eyes(monotonic, deadline_s=DEADLINE_S / 2)
        self._last = -EVERY_S
        self._table: Mapping[str, str] | None = None
        self._used: tuple[str, ...] = ()
        self._links: Mapping[str, str] = {}  # of paths that are used, those that lead elsewhere -> where
        self._resolving = False
        self._book = book
        self._points: dict[str, str] | None = None  # volume -> mount point; None before the book was read
        self._points_guard = threading.Lock()
        self._resolve_at = float("-inf")

    def used(self, paths: Iterable[str]) -> None:
        """Find also the volumes of these, which may be links to where they lie."""
        self._used = tuple(paths)
        self._resolve_at = float("-inf")

    def use(self, paths: list[str]) -> None:
        """Read these from now on; what is known of those that stay is kept."""
        known = {gauge.path: gauge for gauge in self.gauges}
        self.gauges = [known.get(path) or Gauge(path) for path in paths]
        self._table = None
        with self._points_guard:  # one that is left out, and comes again, may have been moved meanwhile
            self._points = {path: point for path, point in (self._points or {}).items() if path in paths} or None
        self._resolve_at = float("-inf")

    def devices(self) -> dict[str, str]:
        """Return on which file system ("major:minor") each volume lies now. Any thread."""
        places = Places()
        found = [
            (mount.device, gauge.path) for gauge in self.gauges
            if (mount := places.mount(gauge.path)) and not self._gone(gauge.path, places.real(gauge.path), mount)
        ]  # fmt: skip
        return dict(reversed(found))  # of two on one file system the first counts, as for the core

    def sample(self, now: float) -> None:
        """Begin a reading where one is due."""
        if now - self._last < EVERY_S:
            self._workers.supervise(now)
            return
        self._last = now
        if not self._resolving and now >= self._resolve_at:
            self._resolving, self._resolve_at = True, now + RESOLVE_EVERY_S
            self._workers.submit(self._resolve, deadline_s=DEADLINE_S)
        self._map(now)
        for gauge in self.gauges:
            if not gauge.pending:
                gauge.pending = True
                self._workers.submit(partial(self._read, gauge), deadline_s=DEADLINE_S, late=partial(self._late, gauge))

    def _map(self, now: float) -> None:
        """Say which mount points belong to which volume, where that has changed; no disk is touched."""
        found = Table()
        links = dict(self._links)
        devices: dict[str, str] = {}
        away: dict[str, str] = {}  # mount point that is gone -> its volume: nothing is written beneath
        for gauge in self.gauges:
            real = links.get(gauge.path, gauge.path)
            if (mount := found.of(real)) is None:
                continue
            if before := self._gone(gauge.path, real, mount):
                away.setdefault(before, gauge.path)
            else:
                devices.setdefault(mount.device, gauge.path)
        table = {one.mountpoint: devices.get(one.device, "") for one in found.mounts} | away
        for path, real in links.items():
            mount = found.of(real)
            beneath = next((volume for point, volume in away.items() if (real + "/").startswith(point + "/")), "")
            table[path] = beneath or (devices.get(mount.device, "") if mount else "")
        if table != self._table:
            self._table = table
            self._post(Mounted(table, now))

    def _resolve(self) -> None:
        paths, places = {*self._used, *(gauge.path for gauge in self.gauges)}, Places()
        self._links = {path: real for path in sorted(paths) if (real := places.real(path)) != path}
        self._resolving = False

    def _gone(self, path: str, real: str, mount: Mount) -> str:
        """Return the mount point that a volume lay on, if that is gone, else ''. Any thread."""
        before = (self._points or {}).get(path, "")
        return before if points.gone(real, before, mount.mountpoint) else ""

    def _standing(self, path: str) -> Mount | None:
        """Return the mount that a volume lies on, None where it cannot be told. Raises Away where it lay on another."""
        places = Places(self._eyes.beyond)
        if (mount := places.mount(path)) is None:
            return None
        with self._points_guard:
            if self._points is None:
                self._points = points.read(self._book) if self._book else {}
            if before := self._gone(path, places.real(path), mount):
                if not self._book or points.read(self._book).get(path) == before:
                    raise Away(before)
                self._points.pop(path, None)  # somebody has taken its line out
            if self._points.get(path) != mount.mountpoint:
                self._points[path] = mount.mountpoint
                served = {gauge.path for gauge in self.gauges}
                kept = {one: point for one, point in self._points.items() if one in served}
                with suppress(OSError):  # no room: it is remembered until the end
                    if self._book:
                        points.write(self._book, kept)
        return mount

    def _read(self, gauge: Gauge) -> None:
        began = self._monotonic()
        try:
            before = self._standing(gauge.path)
            found = self._eyes.statvfs(gauge.path)
            if self._standing(gauge.path) != before:
                raise OSError("it was mounted, or unmounted, meanwhile")
            total, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
            gauge.take(began, total, free, found.f_files, found.f_favail)
            self._post(Gauged(gauge.path, free, total, began, found.f_favail, found.f_files))
        except Away as error:
            gauge.error = f"{error} is not mounted"
            self._post(Gauged(gauge.path, 0, 0, began, error=gauge.error, away=points.hint(self._book)))
        except OSError as error:
            self._failed(gauge, error.strerror or str(error), began)
        gauge.pending = False

    def _late(self, gauge: Gauge) -> None:
        self._failed(gauge, "it does not answer", self._monotonic())

    def _failed(self, gauge: Gauge, why: str, at: float) -> None:
        gauge.error = why
        self._post(Gauged(gauge.path, 0, 0, at, error=why))

    def stop(self) -> None:
        """Let the threads go."""
        self._workers.stop()
        self._eyes.close()
