"""EPU and Tomography 5 with a Falcon: a tree of metadata, and movies of the same stems in another tree.

The order of an exposure's small files is not guaranteed, before or after its
movie; session and grid-square files are rewritten in place.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from trigger_daemon.simulator.files import Pause, Written, small_file, writing, written
from trigger_daemon.simulator.movies import eer_movie, mrc_movie, tiff_movie
from trigger_daemon.simulator.serialem import TILTS_S, tilt_angles, tilt_section

MovieForm = Literal["eer", "mrc", "tiff"]
MOVIE_NAMES: dict[MovieForm, str] = {"eer": "_EER.eer", "mrc": "_Fractions.mrc", "tiff": "_fractions.tiff"}
EXPOSURE_S = 8.0  # from one exposure to the next: 450 an hour
MOVIE_S = 4.0
MUCH_LATER_S = 120.0  # of an XML file that comes after several more exposures


def companion_xml(path: Path, *, movie: str, pause: Pause, odd: str = "", arrives: bool = True) -> Written:
    """Write the small XML file that EPU puts beside an exposure, in two writes."""
    text = (
        '<?xml version="1.0" encoding="utf-8"?>\r\n'
        '<MicroscopeImage xmlns="http://schemas.datacontract.org/2004/07/Fei.SharedObjects">\r\n'
        f"  <name>{movie}</name>\r\n"
        "  <microscopeData><optics><Defocus>-1.2E-06</Defocus></optics><stage><Position><A>0.0</A></Position></stage>"
        "</microscopeData>\r\n"
        + "".join(f"  <CustomData><Key>Dose{n}</Key><Value>{n * 0.1:.1f}</Value></CustomData>\r\n" for n in range(40))
        + "</MicroscopeImage>"
    ).encode()
    return small_file(path, text, kind="companion", pause=pause, odd=odd, arrives=arrives)


@dataclass(frozen=True, slots=True)
class Odd:
    """Numbers of exposures that are not as the others; they count from 0 through all grid squares."""

    without_xml: Collection[int] = ()
    late_xml: Collection[int] = ()
    stalled: Collection[int] = ()


NOTHING_ODD = Odd()


def _stamp(seconds: float) -> str:
    """Return date and time in a name, so long after the session began."""
    clock = 10 * 3600 + 15 * 60 + round(seconds)
    return f"20250611_{clock // 3600:02d}{clock // 60 % 60:02d}{clock % 60:02d}"


@dataclass(slots=True)
class _Epu:
    """One session in the making."""

    metadata: Path
    movies: Path
    pause: Pause
    form: MovieForm
    frames: int
    side: int
    odd: Odd
    found: list[Written] = field(default_factory=list)
    owed: list[tuple[float, Path, str]] = field(default_factory=list)  # seconds left, late XML, its movie's stem
    luck: random.Random = field(default_factory=lambda: random.Random(0))

    def wait(self, seconds: float) -> None:
        """Let time pass, and late files come."""
        self.pause(seconds)
        self.owed = [(left - seconds, path, stem) for left, path, stem in self.owed]
        for _, path, stem in [one for one in self.owed if one[0] <= 0]:
            self.found.append(companion_xml(path, movie=stem, pause=self.pause, odd="comes much later than its movie"))
        self.owed = [one for one in self.owed if one[0] > 0]

    def dm(self, path: Path, visited: int) -> None:
        """Write or rewrite one of EPU's own records, longer each time."""
        entries = "".join(f"<Visited>{n}</Visited>" for n in range(visited))
        data = f'<?xml version="1.0"?><EpuSessionXml>{entries}</EpuSessionXml>'.encode()
        one = small_file(path, data, kind="metadata", pause=self.pause, rewrite=True)
        self.found = [*(known for known in self.found if known.path != path), one]

    def expose(self, number: int, data: Path) -> None:
        """Take one exposure: small files in any order, some before the movie, some after it."""
        stem = f"FoilHole_{7_000_100 + number}_Data_{7_000_050 + number % 4}_0_{_stamp(number * EXPOSURE_S)}"
        here = data.relative_to(self.metadata)
        small: list[str] = self.luck.sample(["xml", "jpg", "mrc"], 3)
        after = self.luck.randrange(4)  # so many of them come after the movie
        for kind in small[after:]:
            self.small(kind, data / f"{stem}.{kind}", stem, number)
        path = self.movies / here / f"{stem}{MOVIE_NAMES[self.form]}"
        stop = self.frames // 2 if number in self.odd.stalled else None
        odd = "its companion never comes" if number in self.odd.without_xml else ""
        odd = f"its writer stopped after {stop} of {self.frames} frames" if stop else odd
        self.found.append(movie_of(
            self.form, path, frames=self.frames, side=self.side, pause=self.pause, frame_s=MOVIE_S / self.frames,
            seed=number, stop_after=stop, odd=odd, arrives=not odd,
        ))  # fmt: skip
        for kind in small[:after]:
            self.small(kind, data / f"{stem}.{kind}", stem, number)
        self.wait(EXPOSURE_S - MOVIE_S)

    def small(self, kind: str, path: Path, stem: str, number: int) -> None:
        if kind == "xml":
            if number in self.odd.late_xml:
                self.owed.append((MUCH_LATER_S, path, stem))
            elif number not in self.odd.without_xml:
                self.found.append(companion_xml(path, movie=stem, pause=self.pause))
        elif kind == "jpg":
            data = b"\xff\xd8\xff\xe0" + self.luck.randbytes(60) + b"\xff\xd9"
            self.found.append(small_file(path, data, kind="preview", pause=self.pause))
        else:
            sum_ = mrc_movie(path, frames=1, width=8, height=8, pause=self.pause, seed=number)
            self.found.append(replace(sum_, kind="preview"))


def epu_session(
    metadata: Path,
    movies: Path,
    *,
    session: str = "supervisor_20250611_101500",
    squares: int = 2,
    exposures: int = 10,
    form: MovieForm = "eer",
    frames: int = 40,
    side: int = 32,
    pause: Pause,
    odd: Odd = NOTHING_ODD,
) -> list[Written]:
    """Write a session below the roots `metadata` and `movies`, with so many exposures in each grid square.

    All grid squares' records are there early and rewritten when visited.
    """
    run = metadata / session
    epu = _Epu(run, movies / session, pause, form, frames, side, odd)
    names = [f"GridSquare_{5_101_101 + number}" for number in range(squares)]
    epu.dm(run / "EpuSession.dm", 0)
    for name in names:
        epu.dm(run / "Metadata" / f"{name}.dm", 0)
    for number, name in enumerate(names):
        square = run / "Images-Disc1" / name
        for kind in ("xml", "jpg", "mrc"):
            epu.small(kind, square / f"{name}_{_stamp(number * 900)}.{kind}", name, -1)
        epu.dm(run / "Metadata" / f"{name}.dm", exposures)
        for exposure in range(exposures):
            epu.expose(number * exposures + exposure, square / "Data")
        epu.dm(run / "EpuSession.dm", number + 1)
    while epu.owed:
        epu.wait(EXPOSURE_S)
    return epu.found


def movie_of(
    form: MovieForm, path: Path, *, frames: int, side: int, pause: Pause, frame_s: float, seed: int,
    stop_after: int | None = None, odd: str = "", arrives: bool = True,
) -> Written:  # fmt: skip
    """Write a movie in one of the three formats of a Falcon's detector server."""
    if form == "eer":
        return eer_movie(path, frames=frames, side=side, pause=pause, frame_s=frame_s, seed=seed,
                         final_sum=seed % 2 == 1, stop_after=stop_after, odd=odd, arrives=arrives)  # fmt: skip
    write = mrc_movie if form == "mrc" else tiff_movie
    return write(path, frames=frames, width=side, height=side, pause=pause, frame_s=frame_s, seed=seed,
                 stop_after=stop_after, odd=odd, arrives=arrives)  # fmt: skip


def tomo5_series(
    directory: Path,
    *,
    position: str = "1",
    tilts: int = 41,
    form: MovieForm = "eer",
    frames: int = 8,
    side: int = 16,
    brackets: bool = False,
    pause: Pause,
    stop_after: int | None = None,
    seed: int = 0,
) -> list[Written]:
    """Write `Position_1_001_0.0_<date>_<time>_EER.eer` a tilt, and `Position_1.mdoc` when the series is over.

    `brackets`: angles as older versions write them, `[-30.0]`. `stop_after`:
    the series is given up after so many tilts, and no mdoc comes.
    """
    luck = random.Random(seed)
    found: list[Written] = []
    sections = []
    for number, angle in enumerate(tilt_angles(tilts)[:stop_after]):
        shown = f"[{angle:.1f}]" if brackets else f"{angle:.1f}"
        stem = f"Position_{position}_{number + 1:03d}_{shown}_{_stamp(number * TILTS_S[0])}"
        path = directory / f"{stem}{MOVIE_NAMES[form]}"
        found.append(movie_of(
            form, path, frames=frames, side=side, pause=pause, frame_s=0.1, seed=seed + number,
        ))  # fmt: skip
        sections.append(tilt_section(number, angle, path.name, frames))
        pause(luck.uniform(*TILTS_S) - 0.1 * frames)
    if stop_after is None:
        with writing(directory / f"Position_{position}.mdoc", pause) as file:
            file.append(f"ImageFile = Position_{position}.mrc\n\n".encode())
            for section in sections:
                file.append(section.encode())
        found.append(written(directory / f"Position_{position}.mdoc", "mdoc", "the marker: written last"))
    return found
