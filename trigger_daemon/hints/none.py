"""Hear nothing: sweeps and deadlines alone find what is there."""

from __future__ import annotations

from collections.abc import Callable

from trigger_daemon.hints import Hints


class Source:
    """A source that is silent, by wish (`events: none`) or because of what `why` says is missing."""

    kind = "none"

    def __init__(self, why: str = "") -> None:
        self._why = why

    def open(self, root: int, path: bytes, wake: Callable[[], None]) -> None:
        pass

    def close(self, root: int) -> None:
        pass

    def watch(self, root: int, directory: bytes) -> None:
        pass

    def take(self, root: int) -> Hints | None:
        return None

    def alive(self) -> str:
        """Return why there are no hints, '' if nobody asked for any."""
        return self._why

    def counters(self) -> dict[str, int]:
        return {"watches": 0, "events": 0, "overflows": 0, "restarts": 0}

    def stop(self) -> None:
        pass
