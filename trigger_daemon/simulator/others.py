"""Instruments whose formats have no check of their own: a light-sheet microscope, a sequencer, an MRI scanner."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from trigger_daemon.simulator.files import Pause, Written, small_file, writing, written
from trigger_daemon.simulator.movies import tiff_movie


def light_sheet(
    directory: Path,
    *,
    points: int,
    channels: int = 2,
    planes: int = 20,
    side: int = 32,
    form: Literal["tif", "raw"] = "tif",
    pause: Pause,
    point_s: float = 30.0,
    without_json: Collection[int] = (),
    cut: Collection[int] = (),
) -> list[Written]:
    """Write a stack a channel, `t00001_c0.tif` (or .raw), for each time point, then `t00001.json` that describes them.

    `cut`: time points whose last stack ends in the middle.
    """
    found: list[Written] = []
    for point in range(1, points + 1):
        for channel in range(channels):
            path = directory / f"t{point:05d}_c{channel}.{form}"
            stop = planes // 2 if point in cut and channel == channels - 1 else None
            odd = f"cut after {stop} of {planes} planes" if stop else ""
            odd = odd or ("its description never comes" if point in without_json else "")
            plane_s = point_s / 3 / channels / planes
            seed = point * 10 + channel
            if form == "tif":
                found.append(tiff_movie(
                    path, frames=planes, width=side, height=side, pause=pause, frame_s=plane_s, seed=seed,
                    stop_after=stop, odd=odd, arrives=not odd,
                ))  # fmt: skip
                continue
            pixels = random.Random(seed)
            with writing(path, pause) as file:
                for _ in range(planes if stop is None else stop):
                    file.append(pixels.randbytes(side * side * 2), plane_s)
            found.append(written(path, "movie", odd, arrives=not odd))
        if point not in without_json:
            words = {"time_point": point, "channels": channels, "planes": planes, "pixels": [side, side]}
            path = directory / f"t{point:05d}.json"
            found.append(small_file(path, json.dumps(words, indent=1).encode(), kind="companion", pause=pause))
        pause(point_s * 2 / 3)
    return found


def sequencer_run(
    directory: Path,
    *,
    cycles: int,
    lanes: int = 2,
    tiles: int = 2,
    pause: Pause,
    cycle_s: float = 300.0,
    finished: bool = True,
) -> list[Written]:
    """Write a sequencer's run folder: base calls of each lane and tile a cycle, metrics that grow, then its marker.

    `RunInfo.xml` and `RunParameters.xml` come first, `RTAComplete.txt` last
    (not at all if the run is not `finished`). Metrics are recorded as they
    are in the end.
    """
    info = f'<?xml version="1.0"?><RunInfo><Run Id="{directory.name}"><Reads NumCycles="{cycles}"/></Run></RunInfo>'
    found = [
        small_file(directory / name, info.encode(), kind="run", pause=pause)
        for name in ("RunInfo.xml", "RunParameters.xml")
    ]
    calls = random.Random(0)
    metrics = directory / "InterOp" / "ExtractionMetricsOut.bin"
    for cycle in range(1, cycles + 1):
        for lane in range(1, lanes + 1):
            for tile in range(1101, 1101 + tiles):
                path = directory / f"Data/Intensities/BaseCalls/L{lane:03d}/C{cycle}.1/s_{lane}_{tile}.bcl"
                with writing(path, pause) as file:
                    file.append(struct.pack("<I", 400))  # clusters, then a byte of each
                    file.append(calls.randbytes(400))
                found.append(written(path, "calls"))
        with writing(metrics, pause, mode="xb" if cycle == 1 else "r+b") as file:
            file.append((b"\x02\x26" if cycle == 1 else b"") + struct.pack("<HHH", 1, 1101, cycle) + bytes(32))
        pause(cycle_s)
    found.append(written(metrics, "metrics", "grows with each cycle"))
    if finished:
        text = b"11/25/2026,06:37:27.215,simulated real-time analysis\r\n"
        found.append(small_file(directory / "RTAComplete.txt", text, kind="marker", pause=pause))
    return found


def mri_series(
    directory: Path,
    *,
    volumes: int,
    side: int = 16,
    series: int = 1,
    pause: Pause,
    volume_s: float = 2.0,
    done: bool = True,
    left_over: bool = False,
) -> list[Written]:
    """Write one DICOM file a volume, `IM-0001-0001.dcm`, under a temporary name that is renamed; then `series.done`.

    `left_over`: the last file's export was broken off under its temporary name.
    """
    found: list[Written] = []
    for number in range(1, volumes + 1):
        path = directory / f"IM-{series:04d}-{number:04d}.dcm"
        data = dicom(series, number, side, random.Random(number).randbytes(side * side * 2))
        temporary = path.with_name(path.name + ".part")
        with writing(temporary, pause) as file:
            file.append(data[: len(data) // 2])
            if left_over and number == volumes:
                found.append(written(temporary, "image", "its export was broken off", arrives=False))
                break
            file.append(data[len(data) // 2 :])
        os.rename(temporary, path)
        pause(volume_s)
        found.append(written(path, "image"))
    if done:
        found.append(small_file(directory / "series.done", b"", kind="marker", pause=pause))
    return found


def dicom(series: int, number: int, side: int, pixels: bytes) -> bytes:
    """Return a minimal DICOM file: preamble, meta information, one MR image of 16-bit pixels."""

    def element(group: int, tag: int, kind: bytes, value: bytes) -> bytes:
        value += (b"\0" if kind in (b"UI", b"OW", b"OB") else b" ") * (len(value) % 2)
        if kind in (b"OB", b"OW"):
            return struct.pack("<HH2sHI", group, tag, kind, 0, len(value)) + value
        return struct.pack("<HH2sH", group, tag, kind, len(value)) + value

    image = f"1.2.826.0.1.3680043.2.1125.{series}.{number}".encode()
    storage = b"1.2.840.10008.5.1.4.1.1.4"  # MR image
    meta = b"".join([
        element(2, 1, b"OB", b"\0\1"), element(2, 2, b"UI", storage), element(2, 3, b"UI", image),
        element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1"),
    ])  # fmt: skip
    words = [(0x28, 2, 1), (0x28, 0x10, side), (0x28, 0x11, side), (0x28, 0x100, 16), (0x28, 0x101, 16)]
    body = b"".join([
        element(8, 0x16, b"UI", storage), element(8, 0x18, b"UI", image), element(8, 0x60, b"CS", b"MR"),
        element(0x20, 0x11, b"IS", str(series).encode()), element(0x20, 0x13, b"IS", str(number).encode()),
        *(element(group, tag, b"US", struct.pack("<H", value)) for group, tag, value in words),
        element(0x7FE0, 0x10, b"OW", pixels),
    ])  # fmt: skip
    return bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + body
