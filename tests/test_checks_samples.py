"""Laws of the completeness checks at every single length of small files: whole is complete, cut is never.

What no look at the bytes can tell is named here, length by length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from formats import Bytes, cbf_of, directory_first, eer_of, look, mrc_header, simulated, tiff_of
from trigger_daemon import registry, simulator
from trigger_daemon.checks import cbf, eer, mdoc, mrc, size, tiff, xml
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Probe, run_checks

INCOMPLETE, SUSPECT, UNKNOWN, COMPLETE = Verdict.INCOMPLETE, Verdict.SUSPECT, Verdict.UNKNOWN, Verdict.COMPLETE


def one_movie(frames: int, path: str = r"X:\DoseFractions\set\x.tif", *, end: str = "\r\n") -> bytes:
    """Make the mdoc of one movie, with a key after DateTime, as SerialEM's on the camera's PC."""
    lines = [
        "T = SerialEM: on a bench   01-Feb-24  10:00:00    ", "Voltage = 300", "", "[FrameSet = 0]", "TiltAngle = 0.01",
        "ImageShift = 0 0", f"SubFramePath = {path}", f"NumSubFrames = {frames}", f"FrameDosesAndNumber = 0 {frames}",
        "DateTime = 01-Feb-24  10:00:05", "FilterSlitAndLoss = 0 0",
    ]
    return "".join(line + end for line in lines).encode()


def tilt_series(tilts: int, *, end: str = "\n", frames: int = 8) -> bytes:
    """Make the mdoc of a tilt series; titles come before its first section."""
    head = ["PixelSpacing = 5.4", "ImageFile = TS_1.mrc", "", "[T = on a bench ]", "", "[T =  axis = 85 ]", ""]
    for tilt in range(tilts):
        head += [
            f"[ZValue = {tilt}]", f"TiltAngle = {tilt * 3 - 6}.5", "Magnification = 105000",
            rf"SubFramePath = D:\DATA\s\frames\TS_1_{tilt:03}_{tilt * 3 - 6}.0.mrc", f"NumSubFrames = {frames}",
            f"DateTime = 01-Feb-24  10:0{tilt}:00", "",
        ]
    return "".join(line + end for line in head[:-1]).encode()


SUB_SECTIONS = one_movie(40) + b"\r\n[ZValue = 0]\r\nMean = 1\r\nMin = 0\r\n\r\n[ZValue = 1]\r\nMean = 2\r\nMin = 1\r\n"


@dataclass(frozen=True)
class Case:
    """A whole file, how it is checked, and the lengths at which cutting it cannot be told."""

    check: ModuleType
    data: bytes
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, bytes] = field(default_factory=dict)
    siblings: tuple[int, ...] = ()
    whole: Verdict = COMPLETE
    blind: Mapping[int, Verdict] = field(default_factory=dict)  # length -> what is said there


def _last(data: bytes, count: int) -> dict[int, Verdict]:
    return {len(data) - short: COMPLETE for short in range(1, count + 1)}


def _line_ends(data: bytes, begin: bytes, stop: int) -> dict[int, Verdict]:
    """Return the lengths that end a line, from the section's first line on; its name alone is told."""
    first = data.index(b"\n", data.index(begin)) + 1
    return {n: UNKNOWN for n in range(first + 1, stop) if data[n - 1 : n] == b"\n"}


def _after_sections(data: bytes) -> dict[int, Verdict]:
    """Return the lengths, from the second section on, that end the last line of one or the blank one after it."""
    ends = [n for n in range(len(data)) if data[:n].endswith((b"\n[ZValue", b"\r\n[ZValue"))]
    blank = len(b"\r\n") if b"\r" in data else 1
    befores = [n - len(b"[ZValue") for n in ends[2:]]
    return {n: UNKNOWN for before in befores for n in (before, before - blank)}


MDOC_WORD = {"frames": "mdoc"}
SIBLINGS_WORD = {"frames": "siblings"}
MOVIE = {"x.mdoc": one_movie(5)}
IMAGE = cbf_of(bytes(range(7)) * 100)
TWO = cbf_of(b"one" * 50, b"two" * 60)
FIRST_ENDS = TWO.index(cbf.CLOSING) + len(cbf.CLOSING)
LOOP = TWO.replace(b"_array_data.data\r\n", b"loop_\r\n_array_data.binary_id\r\n_array_data.data\r\n1\r\n", 1)
LOOP_ENDS = LOOP.index(cbf.CLOSING) + len(cbf.CLOSING)
LIKE_I24 = cbf_of(b"\1\2" * 300, padding=4095)
PACKED = mrc_header(5, 7, 3, 101, 160) + bytes(160) + b"x" * (3 * 7 * 3)
BIG_ENDIAN = mrc_header(6, 5, 4, 2, 0, ">", b"\x11\x11") + b"x" * (6 * 5 * 4 * 4)
EPU = simulated(partial(simulator.companion_xml, movie="m"), "m.xml")
LONE, LONE_LF, TILTS, TILTS_CRLF = one_movie(40), one_movie(40, end="\n"), tilt_series(5), tilt_series(4, end="\r\n")
FIRST_TILT_END = TILTS.index(b"[ZValue = 1]") + 1

CASES: dict[str, Case] = {
    "mrc": Case(mrc, simulated(simulator.mrc_movie, "m.mrc", frames=4, width=9, height=7)),
    "mrc, big-endian": Case(mrc, BIG_ENDIAN),
    "mrc, packed, extended header": Case(mrc, PACKED),
    "mrc, number": Case(mrc, BIG_ENDIAN, {"frames": 4}),
    "mrc, mdoc": Case(mrc, BIG_ENDIAN, MDOC_WORD, {"x.mdoc": one_movie(4)}),
    "mrc, siblings": Case(mrc, BIG_ENDIAN, SIBLINGS_WORD, siblings=(4, 4, 4)),
    "tiff, little-endian": Case(tiff, tiff_of(5), {"frames": 5}),
    "tiff, no number": Case(tiff, tiff_of(5)),
    "tiff, big-endian": Case(tiff, tiff_of(5, order=">"), {"frames": 5}),
    "tiff, tiled": Case(tiff, tiff_of(4, tiled=True), {"frames": 4}),
    "tiff, one strip": Case(tiff, tiff_of(4, strips=1), {"frames": 4}),
    "tiff, directory first": Case(tiff, directory_first(), {"frames": 1}),
    "tiff, mdoc": Case(tiff, tiff_of(5), MDOC_WORD, MOVIE),
    "tiff, siblings": Case(tiff, tiff_of(5), SIBLINGS_WORD, siblings=(5, 5, 5)),
    "bigtiff, little-endian": Case(tiff, tiff_of(5, big=True), {"frames": 5}),
    "bigtiff, big-endian": Case(tiff, tiff_of(5, big=True, order=">"), {"frames": 5}),
    "eer": Case(eer, eer_of(8, 8)),
    "eer, final sum": Case(eer, eer_of(8, 8, final=True)),
    "eer, number": Case(eer, eer_of(8, 8, final=True), {"frames": 8}),
    "eer, mdoc": Case(eer, eer_of(5, 5), MDOC_WORD, MOVIE),
    "eer, siblings": Case(eer, eer_of(5, 5), SIBLINGS_WORD, siblings=(5, 5, 5)),
    "eer as tiff": Case(tiff, eer_of(8, 8)),
    # The payload is there, and only line ends and `;` are missing.
    "cbf": Case(cbf, IMAGE, blind=_last(IMAGE, 5)),
    "cbf, md5": Case(cbf, IMAGE, {"md5": True}, blind=_last(IMAGE, 5)),
    "cbf, padding of 4,095": Case(cbf, LIKE_I24, {"md5": True}, blind=_last(LIKE_I24, 5)),
    # At the end of the first image nothing says that a second will come, but for a loop; after it, a third might.
    "cbf, two images": Case(
        cbf, TWO, whole=UNKNOWN,
        blind=dict.fromkeys(_last(TWO, 5), UNKNOWN) | dict.fromkeys(range(FIRST_ENDS, FIRST_ENDS + 6), COMPLETE),
    ),
    "cbf, two images in a loop": Case(
        cbf, LOOP, {"md5": True}, whole=UNKNOWN,
        blind=dict.fromkeys(_last(LOOP, 5), UNKNOWN) | dict.fromkeys(range(LOOP_ENDS, LOOP_ENDS + 6), UNKNOWN),
    ),
    # A frame set alone needs NumSubFrames and DateTime; which keys follow is told by nothing.
    "mdoc, one movie": Case(mdoc, LONE, whole=UNKNOWN, blind={LONE.index(b"Filter"): UNKNOWN}),
    "mdoc, one movie, LF": Case(mdoc, LONE_LF, whole=UNKNOWN, blind={LONE_LF.index(b"Filter"): UNKNOWN}),
    "mdoc, frame set with sections": Case(mdoc, SUB_SECTIONS, {"sections": 3}),
    "mdoc, tilts, number": Case(mdoc, TILTS, {"sections": 5}),
    "mdoc, tilts, number, CR LF": Case(mdoc, TILTS_CRLF, {"sections": 4}),
    "mdoc, tilts": Case(
        mdoc, TILTS, whole=UNKNOWN,
        blind=_line_ends(TILTS, b"[ZValue = 0]", FIRST_TILT_END) | _after_sections(TILTS),
    ),
    "xml": Case(xml, EPU),
    "xml, UTF-16": Case(xml, '<?xml version="1.0" encoding="utf-16"?><a>\u00e9<b/></a>'.encode("utf-16")),
    "xml, UTF-8 with mark": Case(xml, b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- </a> --><a x='1>2'><a/>\xc3\xa9</a>"),
    "size": Case(size, b"x" * 700, {"exactly": 700}),
    "size, at least": Case(size, b"x" * 700, {"at_least": 700, "siblings": 0.05}, siblings=(700, 701, 690)),
}


def said(case: Case, length: int) -> Verdict:
    return look(case.check, Bytes(case.data[:length], siblings=case.siblings), case.options, case.beside).verdict


@pytest.mark.parametrize("name", CASES)
def test_whole_is_complete_and_every_cut_is_incomplete(name: str) -> None:
    """At each length from nothing to one byte short, but for those that `blind` names, where just that is said."""
    case = CASES[name]
    found = {n: said(case, n) for n in range(len(case.data) + 1)}
    whole = found.pop(len(case.data))

    assert whole is case.whole
    assert {n: verdict for n, verdict in found.items() if verdict is not INCOMPLETE} == case.blind


def test_no_blind_spot_is_larger_than_is_known() -> None:
    """The last bytes of a CBF image, in which its payload is not; all others are `unknown`."""
    blind = {name: sum(said is COMPLETE for said in case.blind.values()) for name, case in CASES.items()}

    assert {name: count for name, count in blind.items() if count} == {
        "cbf": 5, "cbf, md5": 5, "cbf, padding of 4,095": 5, "cbf, two images": 6,
    }


@pytest.mark.parametrize("name", CASES)
def test_files_on_disk_are_judged_alike(name: str, tmp_path: Path) -> None:
    """Through the real window, with the check found by its name, and the companions beside it."""
    case = CASES[name]
    check = case.check.__name__.rpartition(".")[2]
    path = tmp_path / "x"
    beside = {}
    for companion, data in case.beside.items():
        (tmp_path / companion).write_bytes(data)
        beside[companion] = tmp_path / companion

    def on_disk(length: int) -> Verdict:
        path.write_bytes(case.data[:length])
        with Probe(path) as probe:
            state = probe.state()
        asked = ((check, case.options),)
        return run_checks(path, state, asked, beside, registry.find_check, {check: case.siblings}).verdict

    whole = len(case.data)
    cuts = {0, 1, whole - 100, whole - 8, *(whole * percent // 100 for percent in (10, 50, 90, 99))}
    lengths = {max(0, cut) for cut in cuts} - case.blind.keys()

    assert on_disk(whole) is case.whole
    assert {n: on_disk(n) for n in lengths} == dict.fromkeys(lengths, INCOMPLETE)


@pytest.mark.parametrize("frames", range(1, 5))
@pytest.mark.parametrize(
    ("options", "beside", "siblings", "expected"),
    [
        ({"frames": 5}, {}, (), INCOMPLETE),
        (MDOC_WORD, MOVIE, (), INCOMPLETE),
        (SIBLINGS_WORD, {}, (5, 5, 5), SUSPECT),
        (SIBLINGS_WORD, {}, (5, 5), UNKNOWN),
        (MDOC_WORD, {"x.mdoc": b""}, (), SUSPECT),
    ],
    ids=["number", "mdoc", "siblings", "too few siblings", "empty mdoc"],
)
def test_a_movie_that_is_valid_after_each_frame_is_told_by_its_number(
    frames: int, options: dict[str, Any], beside: dict[str, bytes], siblings: tuple[int, ...], expected: Verdict
) -> None:
    """As libtiff and a growing stack leave it: only what is expected tells; what siblings have proves nothing."""
    stack = mrc_header(6, 5, frames, 2) + b"x" * (6 * 5 * 4 * frames)
    for check, data in ((tiff, tiff_of(frames)), (tiff, tiff_of(frames, big=True)), (mrc, stack)):
        assert look(check, Bytes(data, siblings=siblings), options, beside).verdict is expected
