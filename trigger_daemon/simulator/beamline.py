"""A beamline for serial crystallography with a PILATUS: one CBF file a frame, and a small file with their number."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import struct
from collections.abc import Collection
from pathlib import Path

from trigger_daemon.simulator.files import Pause, Written, writing, written

CHIP_IMAGES = 400  # of a mini chip
CHUNK_BYTES = 64 * 2**10  # of an image that is written under its own name


def cbf_image(
    path: Path,
    *,
    width: int,
    height: int,
    pause: Pause,
    seed: int = 0,
    number: int = 1,
    direct: bool = False,
    chunk_s: float = 0.0,
    stop_after: int | None = None,
    spots: int | None = None,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write one miniCBF frame under a temporary name, `<name>.tmp`, and rename it: whole from the first look on.

    `direct`: under its own name, in chunks of 64 KiB, `chunk_s` apart;
    `stop_after`: the writer ends for good after so many of them. The payload
    is a true byte-offset compression, of one byte a pixel; with `spots` it is
    an image: a faint background, and so many bright pixels, seven apart.
    """
    if spots is None:
        payload = random.Random(seed).randbytes(width * height).replace(b"\x80", b"\0")  # 0x80 begins a longer step
    else:
        payload = _compressed(_image(width, height, spots, random.Random(seed)))
    header = _cbf_header(path.stem, payload, width, height, number)
    tail = bytes(4095) + b"\r\n--CIF-BINARY-FORMAT-SECTION----\r\n;\r\n\r\n"
    if direct:
        whole = header + payload + tail
        with writing(path, pause) as file:
            for chunk in range(0, len(whole), CHUNK_BYTES)[:stop_after]:
                file.append(whole[chunk : chunk + CHUNK_BYTES], chunk_s)
        return written(path, "image", odd, arrives=arrives)
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary, pause) as file:
        file.append(header)
        file.append(payload[: len(payload) // 2])
        file.append(payload[len(payload) // 2 :])
        file.append(tail)
    os.rename(temporary, path)
    pause(0.0)
    return written(path, "image", odd, arrives=arrives)


def _image(width: int, height: int, spots: int, luck: random.Random) -> list[int]:
    """Return the counts of an image, row by row."""
    counts = [byte % 4 for byte in luck.randbytes(width * height)]
    places = [(row, column) for row in range(3, height, 7) for column in range(3, width, 7)]
    for row, column in luck.sample(places, spots):
        counts[row * width + column] = luck.choice((100, 1_000, 100_000))
    return counts


def _compressed(counts: list[int]) -> bytes:
    """Return counts as byte offsets: the step from the one before, in one byte, or after 0x80 in two, or in four."""
    found, before = bytearray(), 0
    for count in counts:
        step, before = count - before, count
        if abs(step) < 2**7:
            found += struct.pack("<b", step)
        elif abs(step) < 2**15:
            found += struct.pack("<Bh", 0x80, step)
        else:
            found += struct.pack("<Bhi", 0x80, -(2**15), step)
    return bytes(found)


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
    directory: Path,
    *,
    pause: Pause,
    images: int = CHIP_IMAGES,
    side: int = 220,
    period_s: float = 0.0,
    run: int = 1,
    missing: Collection[int] = (),
    direct: bool = False,
) -> list[Written]:
    """Write the images of one chip, `<chip>_<run>_00001.cbf` and on, then `beamline_run<n>.json` with their number.

    `missing`: numbers of frames that never come; the time passes all the same.
    """
    name = f"chip{directory.name}"
    found: list[Written] = []
    for number in range(1, images + 1):
        if number not in missing:
            path = directory / f"{name}_{run}_{number:05d}.cbf"
            found.append(
                cbf_image(
                    path, width=side, height=side, pause=pause, seed=run * 10**6 + number, number=number, direct=direct
                )
            )
        pause(period_s)
    path = directory / f"beamline_run{run}.json"
    with writing(path, pause) as file:
        file.append(json.dumps({"chip": name, "run": run, "images": images}, indent=1).encode())
    found.append(written(path, "run", "the marker: written last"))
    return found
