"""Laws of the completeness checks: what is cut is never complete, what is damaged never stops a check."""

from __future__ import annotations

import base64
import hashlib
import struct
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import (
    FRAME_SET,
    LARGE_XML,
    SMALL_XML,
    TILTS,
    TWO_IMAGES,
    WIDE_XML,
    Bytes,
    directory_first,
    eer_of,
    judge,
    mrc_header,
    simulated,
    tiff_of,
    verdict,
)
from trigger_daemon import simulator
from trigger_daemon.checks import Outcome, cbf, eer, marker, mdoc, mrc, size, tiff, writer, xml
from trigger_daemon.checks._words import amount, progress
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import run_checks

ALL = (cbf, eer, marker, mdoc, mrc, size, tiff, writer, xml)


# ------------------------------------------------------------------------- samples


SAMPLES: dict[str, tuple[ModuleType, bytes, dict[str, Any]]] = {
    "mrc": (mrc, simulated(simulator.mrc_movie, "m.mrc", frames=5, width=20, height=30), {}),
    "mrc frames": (mrc, simulated(simulator.mrc_movie, "m.mrc", frames=5, width=20, height=30), {"frames": 5}),
    "tiff": (tiff, simulated(simulator.tiff_movie, "m.tiff", frames=5, width=31, height=33), {"frames": 5}),
    "tiff big-endian": (tiff, tiff_of(5, order=">"), {"frames": 5}),
    "tiff tiled": (tiff, tiff_of(5, tiled=True), {"frames": 5}),
    "tiff directory first": (tiff, directory_first(), {"frames": 1}),
    "bigtiff": (tiff, tiff_of(5, big=True), {"frames": 5}),
    "bigtiff big-endian": (tiff, tiff_of(5, big=True, order=">"), {"frames": 5}),
    "eer": (eer, eer_of(30, 30), {}),
    "eer with final sum as eer": (eer, eer_of(30, 30, final=True), {}),
    "eer as tiff": (tiff, eer_of(30, 30), {}),
    "eer with final sum": (tiff, eer_of(30, 30, final=True), {"frames": 30}),
    "xml": (xml, SMALL_XML.rstrip(), {}),
    "xml utf-16": (xml, WIDE_XML, {}),
    "xml simulated": (xml, simulated(partial(simulator.companion_xml, movie="m"), "m.xml"), {}),
    "xml large": (xml, LARGE_XML.rstrip(b"\r\n\0"), {}),
    "cbf": (cbf, simulated(simulator.cbf_image, "i.cbf", width=60, height=50), {}),
    "cbf md5": (cbf, simulated(simulator.cbf_image, "i.cbf", width=60, height=50), {"md5": True}),
    "mdoc tilts": (mdoc, TILTS.encode(), {"sections": 5}),
    "size": (size, b"x" * 5000, {"exactly": 5000}),
    "size at least": (size, b"x" * 5000, {"at_least": 5000}),
}
ENDS_EARLY = {"cbf": 7, "cbf md5": 7}  # bytes that may be missing: line ends and `;` after the closing boundary


@pytest.mark.parametrize("name", SAMPLES)
def test_a_whole_file_is_complete(name: str) -> None:
    """Whatever the flavour of its format."""
    check, data, options = SAMPLES[name]

    assert verdict(check, data, **options) is Verdict.COMPLETE


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cut_file_is_incomplete(name: str) -> None:
    """At nothing, one byte, 10 to 99 %, 100 bytes and one byte short, and in all of the last 300 bytes.

    Of a CBF image the last seven bytes may be missing: its payload is there.
    """
    check, data, options = SAMPLES[name]
    whole = len(data) - ENDS_EARLY.get(name, 0)
    cuts = {0, 1, *(len(data) * percent // 100 for percent in (10, 50, 90, 99))}
    cuts |= {max(0, whole - n) for n in range(1, 300)}

    assert [n for n in cuts if verdict(check, data[:n], **options) is not Verdict.INCOMPLETE] == []


@pytest.mark.parametrize("name", ["mrc", "tiff", "eer", "cbf", "cbf md5", "xml", "mdoc tilts", "size"])
def test_every_cut_of_a_small_file_is_incomplete(name: str) -> None:
    """At each single length."""
    check, data, options = SAMPLES[name]
    whole = len(data) - ENDS_EARLY.get(name, 0)
    step = 1 if whole < 3000 else 7

    assert [n for n in range(0, whole, step) if verdict(check, data[:n], **options) is not Verdict.INCOMPLETE] == []


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.startswith(("size at", "xml", "mdoc"))])
def test_a_file_with_more_than_it_accounts_for_is_suspect(name: str) -> None:
    """A tail that nothing refers to: not proof of anything, but told."""
    check, data, options = SAMPLES[name]

    assert verdict(check, data + b"\0more bytes than were expected here", **options) is Verdict.SUSPECT


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.startswith(("xml", "cbf", "mdoc"))])
def test_a_file_whose_length_was_set_first_is_not_complete(name: str) -> None:
    """A copy tool that sets the length first leaves zeros at the end: text at the end shows it."""
    check, data, options = SAMPLES[name]
    half = data[: len(data) // 2]

    assert verdict(check, half.ljust(len(data), b"\0"), **options) is not Verdict.COMPLETE


def test_a_movie_whose_length_was_set_first_is_told_by_its_directories_or_its_zeros() -> None:
    """libtiff's directories lie among the frames; for MRC the rule may call a tail of zeros suspect."""
    movie = SAMPLES["tiff"][1]
    stack = simulated(simulator.mrc_movie, "m.mrc", frames=4, width=256, height=256)
    half = stack[: len(stack) // 2].ljust(len(stack), b"\0")

    assert verdict(tiff, movie[: len(movie) // 2].ljust(len(movie), b"\0"), frames=5) is Verdict.INCOMPLETE
    assert verdict(mrc, half, zeros="suspect") is Verdict.SUSPECT
    assert verdict(mrc, stack, zeros="suspect") is Verdict.COMPLETE


def test_verdicts_carry_numbers() -> None:
    """So that a person sees how far a file is."""
    movie = simulated(simulator.mrc_movie, "m.mrc", frames=40, width=100, height=100)

    assert judge(mrc, movie[: 1024 + 20_000 * 20]).why == "20 of 40 frames, 401.0 kB of 801.0 kB"
    assert judge(mrc, movie[:-1]).why == "39 of 40 frames, 801,023 of 801,024 bytes"
    assert judge(tiff, tiff_of(20), frames=40).why == "20 of 40 frames, 9,728 bytes"
    assert judge(tiff, tiff_of(20)[:5000], frames=40).why.startswith("10 of 40 frames, 5,000 bytes: the next frame")
    assert judge(cbf, SAMPLES["cbf"][1][:5000]).why == "the image ends early, 5,000 of 7,984 bytes"
    assert judge(mdoc, TILTS.encode(), sections=41).why == "5 of 41 sections"
    assert judge(size, bytes(50_000), exactly=100_000).why == "50.0 kB of 100.0 kB"
    assert (amount(9_999), amount(999_999_999), progress(5, 5)) == ("9,999 bytes", "1.0 GB", "5 of 5 bytes")


# ---------------------------------------------------------------------- the formats


@pytest.mark.parametrize(("mode", "row"), [(0, 5), (1, 10), (2, 20), (3, 20), (4, 40), (6, 10), (12, 10), (101, 3)])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("stamp", [b"DD", b"DA", b"\x11\x11", b"\0\0"])
def test_mrc_sizes_follow_mode_and_extended_header(mode: int, row: int, order: str, stamp: bytes) -> None:
    """In both byte orders, whatever the stamp says: wrong ones exist."""
    data = mrc_header(5, 7, 3, mode, 160, order, stamp) + bytes(160) + b"x" * (row * 7 * 3)

    assert verdict(mrc, data) is Verdict.COMPLETE
    assert verdict(mrc, data[:-1]) is Verdict.INCOMPLETE
    assert verdict(mrc, data + b"x") is Verdict.SUSPECT


def test_mrc_of_other_length_than_the_rule_expects() -> None:
    """A stack that grows section by section is whole after each: only the expected number tells."""
    stack = mrc_header(4, 4, 3, 0) + bytes(48)

    assert judge(mrc, stack, frames=5) == Outcome(Verdict.INCOMPLETE, "3 of 5 frames, 1,072 bytes")
    assert verdict(mrc, stack, frames=2) is Verdict.SUSPECT
    assert verdict(mrc, mrc_header(4, 4, 0, 0)) is Verdict.INCOMPLETE
    assert verdict(mrc, mrc_header(4, 4, 0, 0), frames=3) is Verdict.INCOMPLETE
    assert verdict(mrc, bytes(2000)) is Verdict.INCOMPLETE
    assert verdict(mrc, b"no header at all" * 100) is Verdict.SUSPECT


def test_a_tiff_of_other_length_than_the_rule_expects() -> None:
    """Fewer frames are incomplete, more are suspect, and without a number the structure alone is judged."""
    assert verdict(tiff, tiff_of(4), frames=5) is Verdict.INCOMPLETE
    assert verdict(tiff, tiff_of(6), frames=5) is Verdict.SUSPECT
    assert judge(tiff, tiff_of(1)).why == "1 frame, 494 bytes; the rule gives no number to compare with"


def test_an_eer_file_says_itself_how_many_frames_it_has() -> None:
    """Its first directory announces them; the final sum after them is no frame."""
    assert judge(tiff, eer_of(30, 30)).why.startswith("30 of 30 frames")
    assert judge(tiff, eer_of(29, 30)).verdict is Verdict.INCOMPLETE
    assert judge(tiff, eer_of(29, 30, final=True)).verdict is Verdict.INCOMPLETE
    assert judge(tiff, eer_of(31, 30)).verdict is Verdict.SUSPECT
    assert judge(tiff, eer_of(30, 30, final=True), frames=40).verdict is Verdict.INCOMPLETE


def test_a_long_movie_costs_a_read_a_frame() -> None:
    """1,000 directories are within the budget, at about 2 kB each."""
    window = Bytes(eer_of(1000, 1000))

    assert tiff.check(window, {}, {}).verdict is Verdict.COMPLETE
    assert window.reads < 1_100
    assert window.bytes_read < 2_500_000


def test_reduced_images_are_neither_frames_nor_a_tail() -> None:
    """A pyramid's sub-directories are walked, and their pixels must be there."""
    pixels = b"p" * 300
    body = tiff_of(2, first={})
    below_at = len(body) + len(pixels)
    entries = struct.pack("<HHII", 273, 4, 1, len(body)) + struct.pack("<HHII", 279, 4, 1, 300)
    whole = body + pixels + struct.pack("<H", 2) + entries + bytes(4)
    marked = bytearray(whole)
    (first,) = struct.unpack_from("<I", whole, 4)
    struct.pack_into("<HHII", marked, first + 2, 330, 4, 1, below_at)  # in place of the width

    assert verdict(tiff, bytes(marked), frames=2) is Verdict.COMPLETE
    assert verdict(tiff, bytes(marked[:-2]), frames=2) is Verdict.INCOMPLETE
    assert verdict(tiff, whole, frames=2) is Verdict.SUSPECT


def test_directories_in_a_circle_are_suspect() -> None:
    """A walk ends, wherever the links lead."""
    data = bytearray(tiff_of(3))
    (first,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, len(data) - 4, first)

    assert verdict(tiff, bytes(data), frames=3) is Verdict.SUSPECT
    assert verdict(tiff, b"II*\0\x08\0\0\0\x01\0" + bytes(12) + b"\x08\0\0\0") is Verdict.SUSPECT


def test_a_crafted_tiff_does_not_keep_a_worker_busy() -> None:
    """Directories of thousands of entries that overlap: the walk gives up, and says so."""
    length = 2 + 12 * 4000 + 4
    data = bytearray(400 * 50 + length)
    data[:8] = b"II*\0\x10\0\0\0"
    for n in range(400):
        at = 16 + 50 * n
        struct.pack_into("<H", data, at, 4000)
    for n in range(399):
        struct.pack_into("<I", data, 16 + 50 * n + 2 + 48_000, 16 + 50 * (n + 1))

    outcome = judge(tiff, bytes(data), frames=400)

    assert outcome.verdict is Verdict.UNKNOWN
    assert outcome.why.startswith("too many directories")


def test_other_bytes_than_a_tiffs_are_told_apart() -> None:
    """Zeros may still become one; text will not."""
    assert verdict(tiff, bytes(100)) is Verdict.INCOMPLETE
    assert verdict(tiff, b"II*\0\0\0\0\0" + b"pixels" * 9) is Verdict.INCOMPLETE
    assert verdict(tiff, b"no TIFF at all, is it?") is Verdict.SUSPECT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"<a/>", "complete"),
        (b"<a></a>\n\0\0\0", "complete"),
        (b"<?xml version='1.0'?><!-- </a> --><a><b></b></a><!-- end -->", "complete"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", "complete"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;", "incomplete"),
        (b"<a><b></a>", "suspect"),
        (b"<a></a><a></a>", "suspect"),
        (b"<a><a></a>", "incomplete"),
        (b"<a>\0\0\0\0</a>", "suspect"),
        (b"\0\0\0\0\0\0\0\0", "incomplete"),
        (b"  \r\n", "incomplete"),
        (b"{}", "suspect"),
        (b"<!-- nothing", "incomplete"),
    ],
)
def test_xml_ends_where_its_first_element_ends(text: bytes, expected: str) -> None:
    """Parsed where small; entities are never expanded."""
    assert verdict(xml, text) == expected


def test_a_large_xml_file_is_judged_by_its_two_ends() -> None:
    """Two reads, whatever its size."""
    window = Bytes(LARGE_XML)

    assert xml.check(window, {}, {}).verdict is Verdict.COMPLETE
    assert (window.reads, window.bytes_read < 70_000) == (2, True)
    assert verdict(xml, LARGE_XML + b"<r>") is Verdict.INCOMPLETE


def test_a_nested_entity_bomb_costs_nothing() -> None:
    """The declarations alone end the parse."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "boom">{levels}]><a>&e11;</a>'.encode()

    assert verdict(xml, bomb) is Verdict.COMPLETE


def test_a_changed_payload_byte_of_a_cbf_is_found_by_its_md5() -> None:
    """The structure cannot see it; with `md5` it is proof."""
    check, data, _ = SAMPLES["cbf"]
    at = data.index(cbf.MARKER) + 100
    changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    assert verdict(check, changed) is Verdict.COMPLETE
    assert verdict(check, changed, md5=True) is Verdict.INCOMPLETE


def test_a_cbf_costs_small_reads(tmp_path: Path) -> None:
    """The header and the end; the payload only for its MD5."""
    window = Bytes(simulated(simulator.cbf_image, "i.cbf", width=600, height=500))
    cbf.check(window, {}, {})

    assert window.reads <= 3
    assert window.bytes_read < 5_000


def test_all_sections_of_an_imgcif_are_walked() -> None:
    """A second image that is cut is as incomplete as a first."""
    assert judge(cbf, TWO_IMAGES, md5=True).why.startswith("2 images are closed")
    assert verdict(cbf, TWO_IMAGES[:-8]) is Verdict.INCOMPLETE
    assert verdict(cbf, TWO_IMAGES[: len(TWO_IMAGES) // 2 + 600]) is Verdict.INCOMPLETE


def test_cbf_oddities_are_told() -> None:
    """No size, no section, zeros where the end should be, something else there."""
    _, data, _ = SAMPLES["cbf"]
    end = data.index(cbf.CLOSING)

    assert verdict(cbf, data.replace(b"X-Binary-Size:", b"Y-Binary-Size:")) is Verdict.SUSPECT
    assert verdict(cbf, b"text" * 20_000) is Verdict.SUSPECT
    assert verdict(cbf, bytes(20_000)) is Verdict.INCOMPLETE
    assert verdict(cbf, data[:end] + bytes(100)) is Verdict.INCOMPLETE
    assert verdict(cbf, data[: end + 9] + bytes(100)) is Verdict.INCOMPLETE
    assert verdict(cbf, data[:end] + b"garbage" * 10) is Verdict.SUSPECT
    assert verdict(cbf, data.replace(b"\r\n", b"\n")) is Verdict.COMPLETE


def test_an_mdoc_without_an_expected_number_is_never_surely_finished() -> None:
    """More tilts may follow; a frame set alone is one movie's and needs its number of frames."""
    assert verdict(mdoc, TILTS.encode()) is Verdict.UNKNOWN
    assert verdict(mdoc, TILTS.encode(), sections=4) is Verdict.SUSPECT
    assert verdict(mdoc, FRAME_SET.encode()) is Verdict.COMPLETE
    assert verdict(mdoc, FRAME_SET.replace("NumSubFrames", "N").encode()) is Verdict.INCOMPLETE
    # Frame sets followed by sections without DateTime are real.
    assert verdict(mdoc, (FRAME_SET + "\r\n[ZValue = 0]\r\nTiltAngle = 0\r\n").encode(), sections=2) is Verdict.COMPLETE


def test_a_size_needs_a_size() -> None:
    """A rule that says neither gets no verdict from it."""
    assert verdict(size, b"x") is Verdict.UNKNOWN
    assert verdict(size, b"x" * 10, at_least=5) is Verdict.COMPLETE
    assert verdict(size, b"x" * 10, at_least=5, exactly=10) is Verdict.COMPLETE
    assert verdict(size, b"x" * 10, at_least=11, exactly=10) is Verdict.INCOMPLETE


# ------------------------------------------------------------------ damaged input


def judged_quietly(check: ModuleType, data: bytes, options: dict[str, Any]) -> Bytes:
    window = Bytes(data)
    outcome = check.check(window, options, {})
    assert isinstance(outcome, Outcome)
    assert outcome.verdict in Verdict
    assert 0 < len(outcome.why) < 300
    assert outcome.needs == () or check is marker
    return window


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(set(SAMPLES) - {"xml large"})), edits=st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=16)), max_size=6), cut=st.floats(0.5, 1))
def test_a_damaged_file_never_stops_a_check(name: str, edits: list[tuple[float, bytes]], cut: float) -> None:
    """Overwritten here and there and cut: a verdict in words, within the budget."""
    check, whole, options = SAMPLES[name]
    data = bytearray(whole)
    for place, patch in edits:
        at = int(place * len(data))
        data[at : at + len(patch)] = patch
    window = judged_quietly(check, bytes(data[: int(cut * len(data))] if cut < 1 else data), options)

    assert window.bytes_read <= 4 * len(whole) + 2**16


@settings(max_examples=400, deadline=None)
@given(
    check=st.sampled_from(ALL),
    begin=st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0", b"<a>",
                           b"<?xml", b"<!DOCTYPE", b"[FrameSet = 0]\r\n", b"\xff\xfe", b"\xfe\xff",
                           b"--CIF-BINARY-FORMAT-SECTION--\r\nX-Binary-Size: 3\r\n\r\n\x0c\x1a\x04\xd5"]),
    data=st.binary(max_size=3000),
    options=st.fixed_dictionaries({}, optional={
        "frames": st.one_of(st.integers(1, 5), st.just("siblings")), "sections": st.integers(1, 5),
        "md5": st.booleans(), "zeros": st.sampled_from(["go", "suspect"]), "exactly": st.integers(0, 5000)}),
)
def test_garbage_never_stops_a_check(check: ModuleType, begin: bytes, data: bytes, options: dict[str, Any]) -> None:
    """Whatever bytes a file holds."""
    window = judged_quietly(check, begin + data, options)

    assert window.reads <= 1500


@settings(max_examples=300, deadline=None)
@given(ints=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=24, max_size=24), order=st.sampled_from("<>"))
def test_any_numbers_in_an_mrc_header_are_answered(ints: list[int], order: str) -> None:
    """No size overflows, no division by nought."""
    judged_quietly(mrc, struct.pack(f"{order}24i", *ints) + bytes(1024), {"frames": 3, "zeros": "suspect"})


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.__name__.rpartition(".")[2])
def test_a_check_is_a_drop_in_file(check: ModuleType, tmp_path: Path) -> None:
    """It declares its options with a word for people, and runs by its name through the real window."""
    path = tmp_path / "f"
    path.write_bytes(b"some text")
    found = path.stat()
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    name = check.__name__.rpartition(".")[2]
    defaults = {option: spec.default for option, spec in check.OPTIONS.items()}
    outcome, why, needs, *_ = run_checks(path.as_posix(), state, ((name, defaults),), {}, {name: check}.__getitem__)

    assert outcome is not Verdict.COMPLETE or check is writer
    assert "failed" not in why
    assert needs == (("f.done",) if check is marker else ())
    assert all(spec.doc for spec in check.OPTIONS.values())


def test_the_samples_carry_their_true_md5() -> None:
    """What the CBF check compares with is what the payload hashes to."""
    _, data, _ = SAMPLES["cbf"]
    at = data.index(cbf.MARKER) + 4
    digest = hashlib.md5(data[at : at + 3000], usedforsecurity=False).digest()

    assert base64.b64encode(digest) in data
