"""A K3 camera under SerialEM: movies with their mdoc, in the sizes and at the pace of a real one.

The figures are statistics of 76 saving conditions of 30 movies each, measured
at one microscope (Dustin R. Morado's K3 timing logs, SciLifeLab Stockholm,
2020): median seconds, mean bytes, how far sizes spread, how often a writer
paused inside a movie.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trigger_daemon.simulator.files import Pause, Written, small_file, writing, written
from trigger_daemon.simulator.movies import lzw_movie, mrc_movie, mrc_stack_section, tiff_movie


@dataclass(frozen=True, slots=True)
class K3:
    """How movies are saved: seconds from one to the next, and from the first byte to the last."""

    form: Literal["tif", "mrc"]
    frames: int
    movie_bytes: int
    cadence_s: float
    window_s: float


CONDITIONS = {
    "tif-counting": K3("tif", 40, 168_032_361, 3.782, 2.938),
    "tif-counting-normalised": K3("tif", 40, 305_385_014, 5.079, 4.258),
    "tif-super-resolution": K3("tif", 40, 329_513_136, 6.562, 5.000),
    "mrc-counting": K3("mrc", 40, 942_797_824, 3.063, 2.219),
    "mrc-super-resolution": K3("mrc", 120, 11_313_562_624, 16.125, 14.609),
}
# Of 2,310 movies so many had a longest pause inside of these seconds; all others a shorter one.
PAUSES = ((3, 2.0, 2.47), (50 - 3, 1.0, 2.0), (375 - 50, 0.5, 1.0))
PAUSES_OF = 2_310
HEADER_S = (0.09, 1.6)  # the header of an MRC movie is written again so long after its last frame: median, longest
LATE_HEADERS = 0.02  # of them are as late as the longest; the logs give median and longest only
STRIP_BYTES, FRAME_BYTES = 199, 134  # of `lzw_movie`, about: a strip with its two numbers; the rest of a frame

TILTS_S = (47.0, 107.0)  # from one tilt to the next, in a real series of 41
MDOC_TITLE = "T = SerialEM: simulated"


def k3_movies(
    directory: Path,
    *,
    movies: int,
    pause: Pause,
    condition: str = "tif-counting",
    scale: float = 0.01,
    name: str = "set",
    begins_s: int = 47_116,
    mdoc: Literal["late", "early", "none"] = "late",
    gain: str = "SuperRef.dm4",
    stalled: Sequence[int] = (),
    without_mdoc: Sequence[int] = (),
    seed: int = 0,
) -> list[Written]:
    """Write the gain reference and so many movies, one after the other, with an mdoc each.

    Movies are called `<name>_<nnn>_<hh.mm.ss>.tif`, the mdoc as its movie and
    `.mdoc`. It comes one cadence after its movie began (`late`), or when three
    quarters of the movie are written (`early`: the camera's saving is
    asynchronous). `scale` multiplies bytes, not seconds. `begins_s`: time of
    day of the first movie. `stalled`: numbers of movies whose writer ends for
    good after seven eighths.
    """
    k3, luck = CONDITIONS[condition], random.Random(seed)
    found = [gain_reference(directory / gain, pause=pause, side=max(32, round(4000 * scale**0.5)), seed=seed)]
    for number in range(movies):
        clock = round(begins_s + number * k3.cadence_s)
        path = directory / f"{name}_{number:03d}_{clock // 3600:02d}.{clock // 60 % 60:02d}.{clock % 60:02d}.{k3.form}"
        late = mdoc == "late" and number not in without_mdoc
        early = mdoc == "early" and number not in without_mdoc

        def write_mdoc(path: Path = path, number: int = number) -> None:
            found.append(movie_mdoc(path.with_name(path.name + ".mdoc"), movie=path.name, frames=k3.frames,
                                    gain=gain, pause=pause, seed=number))  # fmt: skip

        def after_frame(frames: int, early: bool = early) -> None:
            if early and frames == k3.frames * 3 // 4:
                write_mdoc()

        stop = k3.frames * 7 // 8 if number in stalled else None
        odd = f"its writer stopped after {stop} of {k3.frames} frames" if stop else ""
        odd = odd or ("its mdoc never comes" if number in without_mdoc else "")
        frame_s = _seconds_of_frames(k3, luck)
        if k3.form == "tif":
            strips = round((k3.movie_bytes * scale / k3.frames - FRAME_BYTES) / STRIP_BYTES)
            movie = lzw_movie(
                path, frames=k3.frames, strips=strips, pause=pause, frame_s=frame_s, seed=seed * 1000 + number,
                stop_after=stop, after_frame=after_frame, odd=odd, arrives=not odd,
            )  # fmt: skip
        else:
            side = max(8, round((k3.movie_bytes * scale / k3.frames / 2) ** 0.5))
            movie = mrc_movie(
                path, frames=k3.frames, width=side, height=side, pause=pause, frame_s=frame_s,
                header_s=HEADER_S[1] if luck.random() < LATE_HEADERS else HEADER_S[0], seed=seed * 1000 + number,
                stop_after=stop, after_frame=after_frame, odd=odd, arrives=not odd,
            )  # fmt: skip
        found.append(movie)
        pause(k3.cadence_s - k3.window_s)
        if late:
            write_mdoc()
    return found


def _seconds_of_frames(k3: K3, luck: random.Random) -> list[float]:
    """Return how long each frame takes: as long as all others, but for one pause that some movies have."""
    drawn, longest = luck.randrange(PAUSES_OF), 0.0
    for count, least, most in PAUSES:
        if drawn < count:
            longest = min(luck.uniform(least, most), k3.window_s / 2)
            break
        drawn -= count
    seconds = [(k3.window_s - longest) / k3.frames] * k3.frames
    seconds[luck.randrange(1, k3.frames)] += longest
    return seconds


def gain_reference(path: Path, *, pause: Pause, side: int, seed: int = 0) -> Written:
    """Write a gain reference: a name and a size, for no check reads inside of one."""
    numbers = random.Random(seed)
    with writing(path, pause) as file:
        file.append(bytes((0, 0, 0, 4)) + (side * side * 4).to_bytes(8, "big") + bytes((0, 0, 0, 1)))
        file.append(numbers.randbytes(side * side * 4))
    return written(path, "gain")


def movie_mdoc(path: Path, *, movie: str, frames: int, gain: str, pause: Pause, seed: int = 0) -> Written:
    """Write the mdoc of one movie: one frame set, lines that end with blanks and CR LF, a Windows path."""
    text = "\r\n".join([
        f"{MDOC_TITLE}    ", "Voltage = 300", "", "[FrameSet = 0]", f"TiltAngle = {seed * 0.01:.4f}  ",
        "Magnification = 105000", "ExposureTime = 1.5984", "Binning = 1", "DividedBy2 = 0",
        rf"SubFramePath = X:\DoseFractions\session\{movie}", f"NumSubFrames = {frames}",
        f"FrameDosesAndNumber = 0 {frames}", f"GainReference = {gain}", "DateTime = 06-Dec-20  13:05:20",
        "FilterSlitAndLoss = 20 0", "",
    ]).encode()  # fmt: skip
    return small_file(path, text, kind="mdoc", pause=pause)


def tilt_angles(tilts: int, step: float = 3.0) -> list[float]:
    """Return the angles of a dose-symmetric series in the order of their exposure: 0, 3, -3, -6, 6, 9, …"""
    angles = [0.0]
    for ring in range(1, tilts):
        pair = (ring * step, -ring * step)
        angles.extend(pair if ring % 2 else pair[::-1])
    return angles[:tilts]


def serialem_tilt_series(
    directory: Path,
    *,
    series: str = "TS_01",
    tilts: int = 41,
    frames: int = 8,
    side: int = 16,
    pause: Pause,
    stop_after: int | None = None,
    seed: int = 0,
) -> list[Written]:
    """Write `frames/<series>_<nnn>_<angle>.tif` a tilt; with each, `<series>.mrc` and `<series>.mrc.mdoc` grow.

    `stop_after`: the series ends for good after so many tilts. Stack and mdoc
    are recorded as they are in the end.
    """
    luck = random.Random(seed)
    stack, mdoc = directory / f"{series}.mrc", directory / f"{series}.mrc.mdoc"
    found: list[Written] = []
    for number, angle in enumerate(tilt_angles(tilts)[:stop_after]):
        movie = directory / "frames" / f"{series}_{number:03d}_{angle:.1f}.tif"
        found.append(
            tiff_movie(movie, frames=frames, width=side, height=side, pause=pause, frame_s=0.1, seed=seed + number)
        )
        with writing(stack, pause, mode="r+b" if number else "xb") as file:
            mrc_stack_section(file, number, luck.randbytes(side * side * 2), side, side)
        with writing(mdoc, pause, mode="r+b" if number else "xb") as file:
            if not number:
                file.append(f"ImageFile = {series}.mrc\nImageSize = {side} {side}\n\n[{MDOC_TITLE}]\n\n".encode())
            file.append(tilt_section(number, angle, movie.name, frames).encode())
        pause(luck.uniform(*TILTS_S) - 0.1 * frames)
    return [*found, written(stack, "stack"), written(mdoc, "mdoc", "the marker: grows with each tilt")]


def tilt_section(number: int, angle: float, movie: str, frames: int) -> str:
    """Return the section of one tilt."""
    return (
        f"[ZValue = {number}]\nTiltAngle = {angle}\nMagnification = 42000\nPixelSpacing = 2.1\nExposureTime = 0.8\n"
        f"SubFramePath = D:\\DATA\\session\\frames\\{movie}\nNumSubFrames = {frames}\n"
        f"DateTime = 30-Nov-15  {15 + number // 60:02d}:{number % 60:02d}:38\n\n"
    )
