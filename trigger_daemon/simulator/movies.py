"""Movies in the three formats of electron cameras, written frame by frame as their libraries do."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from trigger_daemon.simulator.files import File, Pause, Written, times, writing, written

SHORT, LONG, UNDEFINED, LONG8 = 3, 4, 7, 16  # types of TIFF values
EER_COMPRESSION, EER_ACQUISITION = 65_001, 65_001  # the same number, as value of the tag 259 and as a tag
STRIP_SIDE = (256, 8)  # pixels of a strip of an LZW movie
POOL = 8  # strips of which LZW frames are composed: each is compressed once


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
    with writing(path, pause) as file:
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
            directory, next_at = _directory([*_grey(width, height), (273, LONG, begins), (279, LONG, width * height)])
            at = file.append(directory)
            file.put(link, struct.pack("<I", at))
            link = at + next_at
    return written(path, "movie", odd, arrives=arrives)


def _grey(width: int, height: int, *, compression: int = 1, rows: int | None = None) -> list[tuple[int, int, int]]:
    """Return (tag, type, value) of what describes 8-bit pixels."""
    return [
        (256, LONG, width), (257, LONG, height), (258, SHORT, 8), (259, SHORT, compression), (262, SHORT, 1),
        (277, SHORT, 1), (278, LONG, height if rows is None else rows), (284, SHORT, 1),
    ]  # fmt: skip


def _directory(entries: Sequence[tuple[int, int, int]], *, count: int = 1) -> tuple[bytes, int]:
    """Return a directory, and where in it the link to the next is; strips are `count` and lie in arrays elsewhere."""
    packed = b"".join(
        struct.pack("<HHII", tag, kind, count if tag in (273, 279) else 1, value)
        for tag, kind, value in sorted(entries)
    )
    body = struct.pack("<H", len(entries)) + packed
    return body + struct.pack("<I", 0), len(body)


def lzw_movie(
    path: Path,
    *,
    frames: int,
    strips: int,
    pause: Pause,
    frame_s: float | Sequence[float] = 0.0,
    seed: int = 0,
    stop_after: int | None = None,
    after_frame: Callable[[int], None] | None = None,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write a movie of sparse, LZW-compressed 8-bit frames of many strips: sizes differ a little, as real ones do.

    Otherwise as `tiff_movie`; a frame has `strips` (at least 2) of some 190
    bytes each. `after_frame` is called with the number of frames that are
    whole.
    """
    chosen = random.Random(seed)
    width, rows = STRIP_SIDE
    with writing(path, pause) as file:
        file.append(struct.pack("<2sHI", b"II", 42, 0))
        link = 4
        for number, seconds in enumerate(times(frame_s, frames)):
            parts = [chosen.choice(_strips()) for _ in range(max(2, strips))]
            half = len(parts) // 2
            begins = file.append(b"".join(parts[:half]), seconds / 2)
            if number == stop_after:
                break
            file.append(b"".join(parts[half:]), seconds / 2)
            if file.end % 2:
                file.append(b"\0")
            offsets, at = [], begins
            for part in parts:
                offsets.append(at)
                at += len(part)
            arrays = file.append(struct.pack(f"<{2 * len(parts)}I", *offsets, *map(len, parts)))
            described = _grey(width, rows * len(parts), compression=5, rows=rows)
            directory, next_at = _directory(
                [*described, (273, LONG, arrays), (279, LONG, arrays + 4 * len(parts))], count=len(parts)
            )
            at = file.append(directory)
            file.put(link, struct.pack("<I", at))
            link = at + next_at
            if after_frame:
                after_frame(number + 1)
    return written(path, "movie", odd, arrives=arrives)


@functools.cache
def _strips() -> tuple[bytes, ...]:
    electrons = random.Random(0)
    pixels = STRIP_SIDE[0] * STRIP_SIDE[1]
    return tuple(lzw(bytes(electrons.choices((0, 1, 2), weights=(95, 4, 1), k=pixels))) for _ in range(POOL))


def lzw(data: bytes) -> bytes:
    """Compress as TIFF does: codes of 9 to 12 bits, the highest bit first, each width left one code early."""
    clear, end, full = 256, 257, 4094
    codes: list[tuple[int, int]] = [(clear, 9)]
    table = {bytes((value,)): value for value in range(256)}
    following, width, known = 258, 9, b""
    for value in data:
        longer = known + bytes((value,))
        if longer in table:
            known = longer
            continue
        codes.append((table[known], width))
        table[longer], following, known = following, following + 1, longer[-1:]
        width = max(width, following.bit_length())
        if following > full:
            codes.append((clear, width))
            table = {bytes((one,)): one for one in range(256)}
            following, width = 258, 9
    if known:
        codes.append((table[known], width))
        width = max(width, (following + 1).bit_length())
    codes.append((end, width))
    bits = "".join(f"{code:0{size}b}" for code, size in codes)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def mrc_movie(
    path: Path,
    *,
    frames: int,
    width: int,
    height: int,
    pause: Pause,
    frame_s: float | Sequence[float] = 0.0,
    header_s: float = 0.1,
    seed: int = 0,
    stop_after: int | None = None,
    after_frame: Callable[[int], None] | None = None,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write a movie of 16-bit frames as a K3 does: final number in the header after frame 1, header again at the end.

    So the file has its final size before its last write, which comes
    `header_s` after the one before.
    """
    pixels = random.Random(seed)
    frame_bytes = width * height * 2
    with writing(path, pause) as file:
        file.append(mrc_header(width, height, 0, statistics=False))
        for number, seconds in enumerate(times(frame_s, frames)):
            data = pixels.randbytes(frame_bytes)
            file.append(data[: frame_bytes // 2], seconds / 2)
            if number == stop_after:
                return written(path, "movie", odd, arrives=arrives)
            file.append(data[frame_bytes // 2 :], seconds / 2 + (header_s if number == frames - 1 else 0.0))
            if number == 0:
                file.put(0, mrc_header(width, height, frames, statistics=False))
            if after_frame:
                after_frame(number + 1)
        file.put(0, mrc_header(width, height, frames, statistics=True))
    return written(path, "movie", odd, arrives=arrives)


def mrc_header(width: int, height: int, frames: int, *, statistics: bool) -> bytes:
    """Return the header of so many 16-bit frames."""
    header = bytearray(1024)
    struct.pack_into("<10i", header, 0, width, height, frames, 1, 0, 0, 0, width, height, frames)
    struct.pack_into("<6f3i", header, 40, width, height, frames, 90, 90, 90, 1, 2, 3)
    # "Not computed" is a maximum below the minimum, a mean below both, a deviation below nought.
    struct.pack_into("<3f", header, 76, *((-32768.0, 32767.0, -32769.0) if statistics else (0.0, -1.0, -2.0)))
    struct.pack_into("<f", header, 216, -1.0)
    struct.pack_into("<i", header, 108, 20140)
    header[208:216] = b"MAP \x44\x44\0\0"
    return bytes(header)


def eer_movie(
    path: Path,
    *,
    frames: int,
    side: int,
    pause: Pause,
    frame_s: float = 0.0,
    seed: int = 0,
    final_sum: bool = False,
    stop_after: int | None = None,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write an electron-event movie of a Falcon: a BigTIFF with a directory for every camera frame.

    The first directory leads to the acquisition data (XML), which announce the
    number of frames. `side`: of the frame, in pixels; a frame's events take
    about an eighth of a byte a pixel. `final_sum`: an uncompressed image of all
    frames follows, so that there is one directory more than frames.
    """
    events = random.Random(seed)
    with writing(path, pause) as file:
        file.append(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8

        def directory(begins: int, size: int, bits: int, compression: int, more: Sequence[bytes] = ()) -> None:
            nonlocal link
            grey = [
                (256, LONG, side), (257, LONG, side), (258, SHORT, bits), (259, SHORT, compression), (262, SHORT, 1),
                (273, LONG8, begins), (277, SHORT, 1), (278, LONG, side), (279, LONG8, size),
            ]  # fmt: skip
            packed = [struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in grey]
            body = struct.pack("<Q", len(packed) + len(more)) + b"".join([*packed, *more])
            at = file.append(body + struct.pack("<Q", 0))
            file.put(link, struct.pack("<Q", at))
            link = at + len(body)

        for number in range(frames):
            data = events.randbytes(max(8, side * side // 8 + events.randrange(-8, 8)))
            begins = file.append(data[: len(data) // 2], frame_s / 2)
            if number == stop_after:
                return written(path, "movie", odd, arrives=arrives)
            file.append(data[len(data) // 2 :], frame_s / 2)
            more = []
            if number == 0:
                xml = _acquisition(frames, side)
                more = [struct.pack("<HHQQ", EER_ACQUISITION, UNDEFINED, len(xml), file.append(xml))]
            directory(begins, len(data), 1, EER_COMPRESSION, more)
        if final_sum:
            data = events.randbytes(side * side)
            directory(file.append(data), len(data), 8, 1)
    return written(path, "movie", odd, arrives=arrives)


def _acquisition(frames: int, side: int) -> bytes:
    items = {
        "acquisitionID": "simulated", "sensorImageWidth": side, "sensorImageHeight": side,
        "numberOfFrames": frames, "exposureTime": f"{frames / 248:.6f}", "meanDoseRate": "8.1",
    }  # fmt: skip
    return ("<metadata>" + "".join(f'<item name="{k}">{v}</item>' for k, v in items.items()) + "</metadata>").encode()


def mrc_stack_section(file: File, number: int, data: bytes, width: int, height: int) -> None:
    """Append one section to a stack that grows, then say so in its header: structurally whole after each."""
    if number == 0:
        file.append(mrc_header(width, height, 0, statistics=False))
    file.append(data)
    file.put(0, mrc_header(width, height, number + 1, statistics=True))
