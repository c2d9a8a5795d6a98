"""A simulated microscope and beamline that write as instruments do, for the demo and for tests.

Every writer takes a path, sizes, and a `pause(seconds)`; it calls `pause`
after every single write (0 where an instrument would go straight on), so a
caller sees the file at each of its write boundaries, and may end the writer by
raising. What it returns says what an onlooker must find at the destination.
All pixels are pseudo-random and depend on `seed` alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Pause = Callable[[float], None]

SESSION = "supervisor_20250611_101500"
SAMPLE = "2025-06/lysozyme/a"  # experiment, sample, chip letter
FRAMES = 40  # of a TIFF movie
MRC_FRAMES = 20
STALLED_AFTER = 17  # frames of the movie whose writer stops for good
CHIP_IMAGES = 400  # of a mini chip
LATE_S = 4.0  # how long after its movie the late companion comes


@dataclass(frozen=True, slots=True)
class Written:
    """A file as its writer left it.

    `kind`: movie, companion, image, run. `odd`: what is unusual about it, ''
    if nothing. `arrives`: whether it may be sent at all by a rule that knows
    the number of frames and waits for companions.
    """

    path: Path
    sha256: str
    size: int
    kind: str
    odd: str = ""
    arrives: bool = True


class _File:
    """An unbuffered file: each write is on its own, and followed by the pause."""

    def __init__(self, path: Path, pause: Pause) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `_writing`
        self._pause = pause
        self.end = 0

    def append(self, data: bytes, pause_s: float = 0.0) -> int:
        """Write at the end and return where that was."""
        at, self.end = self.end, self.end + len(data)
        self.put(at, data, pause_s)
        return at

    def put(self, at: int, data: bytes, pause_s: float = 0.0) -> None:
        """Write in place."""
        self._file.seek(at)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
        self._pause(pause_s)

    def close(self) -> None:
        self._file.close()


@contextmanager
def _writing(path: Path, pause: Pause) -> Iterator[_File]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path, pause)
    try:
        yield file
    finally:
        file.close()


def _written(path: Path, kind: str, odd: str = "", *, arrives: bool = True) -> Written:
    data = path.read_bytes()
    return Written(path, hashlib.sha256(data).hexdigest(), len(data), kind, odd, arrives)


def tiff_movie(
    path: Path,
    *,
    frames: int,
    width: int,
    height: int,
    pause: Pause,
    frame_s: float = 0.0,
    seed: int = 0,
    stop_after: int | None = None,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write a movie of 8-bit frames as libtiff does: valid, with k frames, after each frame k.

    A frame is its pixels (two writes), then its directory, then the link to
    it from the directory before. `stop_after`: the writer ends for good in
    the middle of the frame after that one. `frame_s`: seconds a frame.
    """
    pixels = random.Random(seed)
    with _writing(path, pause) as file:
        file.append(struct.pack("<2sHI", b"II", 42, 0))
        link = 4
        for number in range(frames):
            data = pixels.randbytes(width * height)
            half = len(data) // 2
            begins = file.append(data[:half], frame_s / 2)
            if number == stop_after:
                break
            file.append(data[half:], frame_s / 2)
            if file.end % 2:  # directories begin on word boundaries
                file.append(b"\0")
            directory, next_at = _directory(width, height, begins)
            at = file.append(directory)
            file.put(link, struct.pack("<I", at))
            link = at + next_at
    return _written(path, "movie", odd, arrives=arrives)


def _directory(width: int, height: int, begins: int) -> tuple[bytes, int]:
    """Return the directory of one frame of a single strip, and where in it the link to the next is."""
    long, short = 4, 3
    entries = [
        (256, long, width), (257, long, height), (258, short, 8), (259, short, 1), (262, short, 1), (273, long, begins),
        (277, short, 1), (278, long, height), (279, long, width * height), (284, short, 1),
    ]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    body = struct.pack("<H", len(entries)) + packed
    return body + struct.pack("<I", 0), len(body)


def mrc_movie(
    path: Path,
    *,
    frames: int,
    width: int,
    height: int,
    pause: Pause,
    frame_s: float = 0.0,
    seed: int = 0,
    odd: str = "",
) -> Written:
    """Write a movie of 16-bit frames as a K3 does: final number in the header after frame 1, header again at the end.

    So the file has its final size before its last write.
    """
    pixels = random.Random(seed)
    frame_bytes = width * height * 2
    with _writing(path, pause) as file:
        file.append(_mrc_header(width, height, 0, statistics=False))
        for number in range(frames):
            data = pixels.randbytes(frame_bytes)
            file.append(data[: frame_bytes // 2], frame_s / 2)
            file.append(data[frame_bytes // 2 :], frame_s / 2)
            if number == 0:
                file.put(0, _mrc_header(width, height, frames, statistics=False))
        file.put(0, _mrc_header(width, height, frames, statistics=True), 0.1)
    return _written(path, "movie", odd)


def _mrc_header(width: int, height: int, frames: int, *, statistics: bool) -> bytes:
    header = bytearray(1024)
    struct.pack_into("<10i", header, 0, width, height, frames, 1, 0, 0, 0, width, height, frames)
    struct.pack_into("<6f3i", header, 40, width, height, frames, 90, 90, 90, 1, 2, 3)
    # "Not computed" is a maximum below the minimum, a mean below both, a deviation below nought.
    struct.pack_into("<3f", header, 76, *((-32768.0, 32767.0, -32769.0) if statistics else (0.0, -1.0, -2.0)))
    struct.pack_into("<f", header, 216, -1.0)
    struct.pack_into("<i", header, 108, 20140)
    header[208:216] = b"MAP \x44\x44\0\0"
    return bytes(header)


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
    with _writing(path, pause) as file:
        file.append(text[: len(text) // 3], 0.02)
        file.append(text[len(text) // 3 :])
    return _written(path, "companion", odd, arrives=arrives)


def cbf_image(path: Path, *, width: int, height: int, pause: Pause, seed: int = 0, number: int = 1) -> Written:
    """Write one miniCBF frame under a temporary name, `<name>.tmp`, and rename it: whole from the first look on.

    The payload is a true byte-offset compression, of one byte a pixel.
    """
    payload = random.Random(seed).randbytes(width * height).replace(b"\x80", b"\0")  # 0x80 begins a longer step
    temporary = path.with_name(path.name + ".tmp")
    with _writing(temporary, pause) as file:
        file.append(_cbf_header(path.stem, payload, width, height, number))
        file.append(payload[: len(payload) // 2])
        file.append(payload[len(payload) // 2 :])
        file.append(bytes(4095) + b"\r\n--CIF-BINARY-FORMAT-SECTION----\r\n;\r\n\r\n")
    os.rename(temporary, path)
    pause(0.0)
    return _written(path, "image")


def _cbf_header(name: str, payload: bytes, width: int, height: int, number: int) -> bytes:
    digest = base64.b64encode(hashlib.md5(payload, usedforsecurity=False).digest()).decode()
    lines = [
        "###CBF: VERSION 1.5, CBFlib v0.7.8 - simulated detector", "", f"data_{name}", "",
        '_array_data.header_convention "PILATUS_1.2"', "_array_data.header_contents", ";",
        "# Detector: simulated", "# Pixel_size 172e-6 m x 172e-6 m", "# Exposure_time 0.0190000 s",
        "# Exposure_period 0.0200000 s", "# Wavelength 0.96859 A", "# Detector_distance 0.35100 m",
        f"# Beam_xy ({width / 2:.2f}, {height / 2:.2f}) pixels", f"# Comment: position {number}", ";", "",
        "_array_data.data", ";", "--CIF-BINARY-FORMAT-SECTION--", "Content-Type: application/octet-stream;",
        '     conversions="x-CBF_BYTE_OFFSET"', "Content-Transfer-Encoding: BINARY", f"X-Binary-Size: {len(payload)}",
        "X-Binary-ID: 1", 'X-Binary-Element-Type: "signed 32-bit integer"',
        "X-Binary-Element-Byte-Order: LITTLE_ENDIAN", f"Content-MD5: {digest}",
        f"X-Binary-Number-of-Elements: {width * height}", f"X-Binary-Size-Fastest-Dimension: {width}",
        f"X-Binary-Size-Second-Dimension: {height}", "X-Binary-Size-Padding: 4095", "", "",
    ]
    return "\r\n".join(lines).encode() + b"\x0c\x1a\x04\xd5"


def chip(
    directory: Path, *, pause: Pause, images: int = CHIP_IMAGES, side: int = 220, period_s: float = 0.0, run: int = 1
) -> list[Written]:
    """Write the images of one chip, `<chip>_<run>_00001.cbf` and on, then `beamline_run<n>.json` with their number."""
    name = f"chip{directory.name}"
    written: list[Written] = []
    for number in range(1, images + 1):
        path = directory / f"{name}_{run}_{number:05d}.cbf"
        written.append(cbf_image(path, width=side, height=side, pause=pause, seed=run * 10**6 + number, number=number))
        pause(period_s)
    path = directory / f"beamline_run{run}.json"
    with _writing(path, pause) as file:
        file.append(json.dumps({"chip": name, "run": run, "images": images}, indent=1).encode())
    written.append(_written(path, "run", "the marker: written last"))
    return written


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
