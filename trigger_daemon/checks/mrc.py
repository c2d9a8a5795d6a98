"""Is an MRC image, stack or movie as long as its header says?

The header alone cannot tell that a writer is still rewriting it, nor that a
copy tool wrote zeros first; the quiet period is for that. A length that was
set first is told by the file's holes, where the file system shows them. A
stack that grows section by section looks whole after each: say `frames`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._frames import FRAMES, MDOC, expect
from trigger_daemon.checks._words import NEVER_WRITTEN, amount, frames, progress
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {
    "frames": FRAMES,
    "zeros": Option(
        "enum", "what to say when the last 64 KiB are all zero (a copy tool that sets the length first)",
        default="go", choices=("go", "suspect"),
    ),
}

HEADER_BYTES = 1024
TAIL_BYTES = 64 * 2**10  # 64 Ki pixels without one electron are no exposure
SIDE_MAX = 2**20  # pixels; larger than any detector or montage, small enough to reveal the wrong byte order
FRAMES_MAX = 2**24  # a multiple of 256 in the wrong byte order would be larger
PIXEL_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 6: 2, 12: 2}  # by mode; 101 is two pixels a byte
PACKED = 101
STAMPS = {b"\x44\x44": "<", b"\x44\x41": "<", b"\x11\x11": ">"}


def asks(options: Mapping[str, Any]) -> bool:
    """Say whether the check asks for the file's mdoc."""
    return options.get("frames") == MDOC


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Compare the size with what the header promises; one read, a second for `zeros: suspect`."""
    header = probe.read(0, HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return Outcome(Verdict.INCOMPLETE, f"{len(header):,} of the {HEADER_BYTES:,} bytes of the header")
    if not any(header[:16]):
        return Outcome(Verdict.INCOMPLETE, "the header is still empty")
    found = _header(header)
    if found is None:
        return Outcome(Verdict.SUSPECT, "the first 1,024 bytes are no MRC header")
    begins, frame_bytes, count = found
    if not frame_bytes or not count:
        return Outcome(Verdict.INCOMPLETE, "the header still says that there are no frames")
    whole = begins + frame_bytes * count
    there = max(0, (probe.size - begins) // frame_bytes)
    expected = expect(options.get("frames"), probe, companions)
    if isinstance(expected, Outcome):
        return expected
    if expected.number is not None and count < expected.number:
        have = f"{min(there, count):,} of {frames(expected.number)}, {amount(probe.size)}"
        return Outcome(Verdict.INCOMPLETE, have)
    if probe.size < whole:
        return Outcome(Verdict.INCOMPLETE, f"{there:,} of {frames(count)}, {progress(probe.size, whole)}")
    measure = expected.measure(count)
    if odd := expected.odd(count):
        return Outcome(Verdict.SUSPECT, odd, measure=measure)
    if probe.size > whole:
        why = f"all of {frames(count)}, and {amount(probe.size - whole)} more than the header accounts for"
        return Outcome(Verdict.SUSPECT, why, measure=measure)
    if options.get("zeros") == "suspect":
        tail = min(TAIL_BYTES, frame_bytes * count)
        if not any(probe.read(probe.size - tail, tail)):
            why = f"all of {frames(count)}, but the last {tail:,} bytes are all zero"
            return Outcome(Verdict.SUSPECT, why, measure=measure)
    if probe.holes():
        return Outcome(Verdict.SUSPECT, f"all of {frames(count)} by its length, {NEVER_WRITTEN}", measure=measure)
    if expected.doubt:
        return Outcome(expected.doubt[0], f"{frames(count)}, but {expected.doubt[1]}", measure=measure)
    alike = ", as its siblings" if expected.usual is not None else ""
    return Outcome(Verdict.COMPLETE, f"all of {frames(count)}, {amount(probe.size)}{alike}", measure=measure)


def _header(header: bytes) -> tuple[int, int, int] | None:
    """Return where the data begins, bytes a frame, number of frames; None if it is no header in either byte order.

    The stamp only decides which byte order is tried first: wrong stamps exist.
    """
    first = STAMPS.get(header[212:214], "<")
    for order in (first, "<" if first == ">" else ">"):
        nx, ny, nz, mode = struct.unpack_from(f"{order}4i", header)
        (extended,) = struct.unpack_from(f"{order}i", header, 92)
        if mode != PACKED and mode not in PIXEL_BYTES:
            continue
        if not (0 <= nx <= SIDE_MAX and 0 <= ny <= SIDE_MAX and 0 <= nz <= FRAMES_MAX and extended >= 0):
            continue
        row = (nx + 1) // 2 if mode == PACKED else nx * PIXEL_BYTES[mode]
        return HEADER_BYTES + extended, row * ny, nz
    return None
