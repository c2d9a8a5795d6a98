"""One session of a microscope and one chip of a beamline, side by side: what the demo shows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from trigger_daemon.simulator.beamline import chip
from trigger_daemon.simulator.epu import companion_xml
from trigger_daemon.simulator.files import Pause, Written
from trigger_daemon.simulator.movies import mrc_movie, tiff_movie

SESSION = "supervisor_20250611_101500"
SAMPLE = "2025-06/lysozyme/a"  # experiment, sample, chip letter
FRAMES = 40  # of a TIFF movie
MRC_FRAMES = 20
STALLED_AFTER = 17  # frames of the movie whose writer stops for good
LATE_S = 4.0  # how long after its movie the late companion comes


class _Stopped(Exception):
    """The session is over before this writer was."""


def session(root_epu: Path, root_ssx: Path, pause: Pause, scale: float = 1.0) -> list[Written]:
    """Write one session of a microscope and one chip of a beamline side by side, and return all files.

    14 TIFF movies of 40 frames in two grid squares, 4 MRC movies, their
    companions (before and after the movie, one late, one never), one movie
    that stalls, 400 CBF images. `scale` multiplies the bytes of movies and
    images; at 1.0 all is about 100 MB and takes about 20 s of pauses. The
    directories are made below the roots; a file that is there already is an
    error. What a writer raises is raised here, once all have ended.
    """
    stop = threading.Event()

    def paused(seconds: float) -> None:
        if stop.is_set():
            raise _Stopped("another writer of the session failed")
        pause(seconds)

    writers: tuple[Callable[[], list[Written]], ...] = (
        lambda: _camera(root_epu / SESSION, paused, scale),
        lambda: _second_camera(root_epu / SESSION, paused, scale),
        lambda: _late_companion(root_epu / SESSION, paused),
        lambda: chip(root_ssx / SAMPLE, pause=paused, side=_side(220, scale), period_s=0.042),
    )
    with ThreadPoolExecutor(len(writers), thread_name_prefix="simulator") as pool:
        tasks = [pool.submit(writer) for writer in writers]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # all have ended, or one failed, or we are interrupted: let none go on for nothing
    if failed := [task for task in tasks if task.exception() and not isinstance(task.exception(), _Stopped)]:
        failed[0].result()
    return [written for task in tasks for written in task.result()]


LATE, NEVER, STALLED = 5, 9, 12  # numbers of the odd ones among the TIFF movies


def _stem(number: int) -> str:
    hole, acquired = 7_000_100 + number, f"20250611_10{15 + number:02d}27"
    return f"FoilHole_{hole}_Data_{7_000_050 + number % 4}_0_{acquired}"


def _data(session_dir: Path, number: int) -> Path:
    return session_dir / "Images-Disc1" / f"GridSquare_{5_101_101 + number % 2}" / "Data"


def _camera(session_dir: Path, pause: Pause, scale: float) -> list[Written]:
    """One TIFF movie after the other; even ones after their companion, odd ones before it."""
    written: list[Written] = []
    side = _side(320, scale)
    for number in range(14):
        data, stem = _data(session_dir, number), _stem(number)
        odd = {
            LATE: f"its companion comes {LATE_S:.0f} s late",
            NEVER: "its companion never comes",
            STALLED: f"its writer stopped after {STALLED_AFTER} of {FRAMES} frames",
        }.get(number, "")
        arrives = number not in (NEVER, STALLED)

        def companion(data: Path = data, stem: str = stem, odd: str = odd, arrives: bool = arrives) -> None:
            written.append(companion_xml(data / f"{stem}.xml", movie=stem, pause=pause, odd=odd, arrives=arrives))

        accompanied = number not in (LATE, NEVER)
        if accompanied and number % 2 == 0:
            companion()
        written.append(
            tiff_movie(
                data / f"{stem}_fractions.tiff", frames=FRAMES, width=side, height=side, pause=pause, frame_s=0.03,
                seed=number, stop_after=STALLED_AFTER if number == STALLED else None, odd=odd, arrives=arrives,
            )
        )
        if accompanied and number % 2 == 1:
            companion()
    return written


def _second_camera(session_dir: Path, pause: Pause, scale: float) -> list[Written]:
    """Four MRC movies of another camera, each with its companion after it."""
    written: list[Written] = []
    side = _side(384, scale)
    for number in range(20, 24):
        data, stem = _data(session_dir, number), _stem(number)
        movie = data / f"{stem}_Fractions.mrc"
        written.append(
            mrc_movie(movie, frames=MRC_FRAMES, width=side, height=side, pause=pause, frame_s=0.2, seed=number)
        )
        written.append(companion_xml(data / f"{stem}.xml", movie=stem, pause=pause))
    return written


def _late_companion(session_dir: Path, pause: Pause) -> list[Written]:
    # When its movie ends: as many movies, of as many frames, as come before it and with it.
    pause((LATE + 1) * FRAMES * 0.03 + LATE_S)
    path = _data(session_dir, LATE) / f"{_stem(LATE)}.xml"
    return [companion_xml(path, movie=_stem(LATE), pause=pause, odd=f"comes {LATE_S:.0f} s after its movie")]


def _side(pixels: int, scale: float) -> int:
    return max(8, round(pixels * math.sqrt(scale)))
