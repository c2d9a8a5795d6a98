"""Small files of every format, made by hand, and a window on bytes in memory. For tests of the completeness checks."""

from __future__ import annotations

import base64
import hashlib
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trigger_daemon import simulator
from trigger_daemon.checks import Outcome
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import BYTES_MAX, READS_MAX, TooMuch


class Bytes:
    """A window on bytes in memory, with a real one's budget."""

    def __init__(
        self, data: bytes, name: str = "x", siblings: Sequence[int] = (), *, open_for_writing: bool | None = None
    ) -> None:
        self.name = name
        self.data = data
        self.size = len(data)
        self.siblings = siblings
        self.reads = 0
        self.bytes_read = 0
        self._open_for_writing = open_for_writing

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0:
            raise ValueError(f"read of {length} bytes at {offset}")
        found = self.data[offset : offset + length]
        self.reads += bool(found)
        self.bytes_read += len(found)
        if self.reads > READS_MAX or self.bytes_read > BYTES_MAX:
            raise TooMuch("beyond the budget")
        return found

    def holes(self) -> bool:
        return False

    def writers(self) -> bool | None:
        return self._open_for_writing


def look(
    check: ModuleType, window: Bytes, options: Mapping[str, Any], beside: Mapping[str, bytes] | None = None
) -> Outcome:
    """Run a check on a window, with companions of these contents."""
    companions = {name: Bytes(data, name.rpartition("/")[2]) for name, data in (beside or {}).items()}
    outcome: Outcome = check.check(window, options, companions)
    return outcome


def judge(check: ModuleType, data: bytes, **options: Any) -> Outcome:
    return look(check, Bytes(data), options)


def verdict(check: ModuleType, data: bytes, **options: Any) -> Verdict:
    return judge(check, data, **options).verdict


def simulated(write: Callable[..., simulator.Written], name: str, **sizes: int) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write(Path(directory) / name, pause=lambda _: None, **sizes).path.read_bytes()


def tiff_of(
    frames: int, *, order: str = "<", big: bool = False, first: dict[int, tuple[int, bytes]] | None = None,
    compression: int = 1, strips: int = 4, tiled: bool = False, last_compression: int | None = None,
) -> bytes:
    """Make a TIFF by hand: per frame its strips, the arrays of their offsets and lengths, its directory."""
    word, number = ("Q", "Q") if big else ("I", "H")
    width = struct.calcsize(order + word)
    head = struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42)
    out = bytearray((b"II" if order == "<" else b"MM") + head)
    link = len(out)
    out += bytes(width)
    for frame in range(frames):
        offsets = []
        for strip in range(strips):
            offsets.append(len(out))
            out += bytes([frame % 255 + 1, strip + 1] * 50)

        def value(kind: int, count: int, data: bytes) -> bytes:
            nonlocal out
            if len(data) > width:
                at = len(out)
                out += data
                data = struct.pack(order + word, at)
            return struct.pack(f"{order}H{word}", kind, count) + data.ljust(width, b"\0")

        chosen = last_compression if last_compression is not None and frame == frames - 1 else compression
        entries = {
            256: value(3, 1, struct.pack(order + "H", 100)),
            259: value(3, 1, struct.pack(order + "H", chosen)),
            324 if tiled else 273: value(4, strips, struct.pack(f"{order}{strips}I", *offsets)),
            325 if tiled else 279: value(4, strips, struct.pack(f"{order}{strips}I", *[100] * strips)),
        }
        for tag, (kind, data) in (first or {}).items() if frame == 0 else ():
            entries[tag] = value(kind, len(data), data)
        at = len(out)
        struct.pack_into(order + word, out, link, at)
        out += struct.pack(order + number, len(entries))
        for tag in sorted(entries):
            out += struct.pack(order + "H", tag) + entries[tag]
        link = len(out)
        out += bytes(width)
    return bytes(out)


def directory_first() -> bytes:
    """Make a TIFF of one frame as others than libtiff do: directory, arrays, and the pixels last."""
    entries = [(257, 4, 1, 30), (273, 4, 3, 62), (278, 4, 1, 10), (279, 4, 3, 74)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", 4) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + bytes(4) + struct.pack("<3I", 86, 486, 886) + struct.pack("<3I", 400, 400, 400) + b"p" * 1200


ACQUISITION = b"""<metadata>
 <item name="exposureTime" unit="s">2.0</item>
 <item name="numberOfFrames">%d</item>
</metadata>
"""


def eer_of(frames: int, announced: int, *, final: bool = False) -> bytes:
    return tiff_of(
        frames + final, big=True, first={65001: (7, ACQUISITION % announced)}, compression=65001, strips=1,
        last_compression=1 if final else None,
    )


TILTS = "T = SerialEM\r\nVoltage = 300\r\n\r\n[T = a title]\r\n" + "".join(
    f"\r\n[ZValue = {n}]\r\nTiltAngle = {n * 3}\r\nSubFramePath = D:\\{n}.tif\r\nDateTime = 06-Dec-20  13:05:2{n}\r\n"
    for n in range(5)
)
FRAME_SET = (
    "T = SerialEM\r\n\r\n[FrameSet = 0]\r\nTiltAngle = 0\r\nNumSubFrames = 40\r\nDateTime = 06-Dec-20  13:05:20\r\n"
    "FilterSlitAndLoss = 0 0\r\n"
)
SMALL_XML = b"""\xef\xbb\xbf<?xml version="1.0"?>
<!-- c --><a:b xmlns:a="u" x="1>2">
 <c/> <![CDATA[ </a:b> ]]> t\xc3\xa9xt
</a:b >
"""
WIDE_XML = ("\ufeff" + '<?xml version="1.0" encoding="utf-16"?><a>\u00e9<b/></a>').encode("utf-16-le")
LARGE_XML = b"<?xml version='1.0'?>\n<!DOCTYPE r>\n<r>\n" + b" <item n='1'>value</item>\n" * 60_000 + b"</r>\r\n\0\0"
TWO_IMAGES = simulated(simulator.cbf_image, "i.cbf", width=60, height=50) * 2


def mrc_header(
    nx: int, ny: int, nz: int, mode: int, extended: int = 0, order: str = "<", stamp: bytes = b"DD"
) -> bytes:
    header = bytearray(1024)
    struct.pack_into(f"{order}4i", header, 0, nx, ny, nz, mode)
    struct.pack_into(f"{order}i", header, 92, extended)
    header[208:214] = b"MAP " + stamp
    return bytes(header)


def cbf_of(*payloads: bytes, padding: int = 20, md5: bool = True, end: bytes = b"\r\n;\r\n") -> bytes:
    """Make a miniCBF of these payloads, or with several an imgCIF, with the line ends of a PILATUS."""
    out = bytearray(b"###CBF: VERSION 1.5\r\ndata_x\r\n_array_data.data\r\n")
    for payload in payloads:
        digest = base64.b64encode(hashlib.md5(payload, usedforsecurity=False).digest())
        out += b";\r\n--CIF-BINARY-FORMAT-SECTION--\r\nContent-Type: application/octet-stream;\r\n"
        out += b"X-Binary-Size: %d\r\nX-Binary-Size-Padding: %d\r\n" % (len(payload), padding)
        out += (b"Content-MD5: %b\r\n" % digest if md5 else b"") + b"\r\n\x0c\x1a\x04\xd5" + payload + bytes(padding)
        out += b"\r\n--CIF-BINARY-FORMAT-SECTION----" + end
    return bytes(out)
