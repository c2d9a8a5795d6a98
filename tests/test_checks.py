"""Laws of the completeness checks: what is cut is never complete, what is damaged never stops a check."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
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
    cbf_of,
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


Tags = Mapping[int, tuple[int, ...]]


def directories(*entries: Tags, pixels: int = 100, apart: tuple[int, ...] = ()) -> bytes:
    """Make a TIFF of directories of LONGs, each with its values behind it, from byte 8 + `pixels` on.

    Each leads to the next, but to none of those `apart`. A value of -N stands
    for the place of directory N.
    """
    out = bytearray(b"II*\0" + bytes(4) + b"p" * pixels)
    places, links, refer = [], [4], []
    for tags in entries:
        places.append(len(out))
        out += struct.pack("<H", len(tags))
        values_at = len(out) + 12 * len(tags) + 4
        values = bytearray()
        for tag, numbers in sorted(tags.items()):
            refer += [
                (values_at + len(values) + 4 * n if len(numbers) > 1 else len(out) + 8, -number)
                for n, number in enumerate(numbers) if number < 0
            ]
            packed = struct.pack(f"<{len(numbers)}I", *(max(0, number) for number in numbers))
            if len(numbers) > 1:
                out += struct.pack("<HHII", tag, 4, len(numbers), values_at + len(values))
                values += packed
            else:
                out += struct.pack("<HHI", tag, 4, len(numbers)) + (packed or bytes(4))
        links.append(len(out))
        out += bytes(4) + values
    for number, place in enumerate(places):
        if number not in apart:
            struct.pack_into("<I", out, links[number], place)
    for at, number in refer:
        struct.pack_into("<I", out, at, places[number])
    return bytes(out)


PIXELS: Tags = {273: (8,), 279: (100,)}


@pytest.mark.parametrize("width", [b"", b"\0" * 4])
@pytest.mark.parametrize(
    "without",
    [
        {273: (0,), 279: (0,)}, {273: (8,), 279: (0,)}, {273: (0,), 279: (100,)}, {273: (0, 0), 279: (0, 0)},
        {273: (8, 58), 279: (50, 0)}, {273: (), 279: ()}, {324: (0,), 325: (0,)}, {324: (0,) * 9, 325: (0,) * 9},
        {273: (0,)}, {273: (8, 0)},
    ],
)
def test_a_frame_without_pixels_is_incomplete(without: Tags, width: bytes) -> None:
    """A directory is written before, or together with, the pixels that it tells of: first, last, or all of them."""
    for frames in ((without,) * 3, (PIXELS, PIXELS, without), (PIXELS, without, PIXELS), (without, PIXELS, PIXELS)):
        written = frames.index(without)
        outcome = judge(tiff, directories(*frames) + width, frames=3)
        assert outcome.verdict is Verdict.INCOMPLETE
        assert f"{written} of 3 frames" in outcome.why and f"frame {written + 1} has no pixels yet" in outcome.why

    assert verdict(tiff, directories(PIXELS, without) + width) is Verdict.INCOMPLETE
    assert verdict(tiff, directories(PIXELS, PIXELS, PIXELS) + width, frames=3) is Verdict.COMPLETE


@pytest.mark.parametrize("tags", [(273, 279), (324, 325)])
def test_strips_that_are_left_out_are_suspect(tags: tuple[int, int]) -> None:
    """Sparse files (GDAL) leave some out for good, and a file that is being written has them yet to come."""
    sparse = {tags[0]: (0, 8, 0), tags[1]: (0, 100, 0)}

    assert judge(tiff, directories(PIXELS, sparse), frames=2) == Outcome(
        Verdict.SUSPECT, "frame 2 has no pixels in 2 of 3 strips or tiles"
    )
    assert verdict(tiff, directories(PIXELS, sparse)) is Verdict.SUSPECT
    assert verdict(tiff, directories(sparse, PIXELS), frames=3) is Verdict.INCOMPLETE


@pytest.mark.parametrize("odd", [{256: (5,)}, {273: (8, 58), 279: (50,)}, {273: (8,), 279: (50, 50)}])
def test_a_frame_that_tells_too_little_of_its_pixels_is_suspect(odd: Tags) -> None:
    """Neither strips nor tiles, or other lengths than places."""
    assert verdict(tiff, directories(PIXELS, odd), frames=2) is Verdict.SUSPECT
    assert verdict(tiff, directories(PIXELS, odd), frames=3) is Verdict.INCOMPLETE


def test_a_frame_of_an_eer_without_pixels_is_incomplete() -> None:
    """So it is whichever check looks at it."""
    data = eer_of(5, 5)
    (first,) = struct.unpack_from("<Q", data, 8)
    lengths = data.index(struct.pack("<HHQ", 279, 4, 1), first) + 12
    without = data[:lengths] + bytes(8) + data[lengths + 8 :]

    assert verdict(eer, without) is Verdict.INCOMPLETE
    assert verdict(tiff, without) is Verdict.INCOMPLETE


@pytest.mark.parametrize("count", [8_192, 8_193, 20_000, 100_000])
def test_every_strip_is_looked_at(count: int) -> None:
    """Wherever the one stands that was written last, within the budget of bytes."""
    for last in (0, 4_500, count // 2, count - 1):
        places = [12 + 4 * n for n in range(count)]
        places[last], places[-1] = places[-1], places[last]
        whole = directories({324: tuple(places), 325: (4,) * count}, pixels=4 + 4 * count)
        swapped = whole[8 + 4 + 4 * count :]
        end = len(swapped) + 8  # the directory first, the pixels behind it
        moved = {324: tuple(place - 12 + end for place in places), 325: (4,) * count}
        behind = directories(moved, pixels=0) + b"p" * (4 * count)
        window = Bytes(behind)

        assert tiff.check(window, {"frames": 1}, {}).verdict is Verdict.COMPLETE
        assert window.bytes_read < 8 * count + 10_000
        assert verdict(tiff, whole, frames=1) is Verdict.COMPLETE
        assert verdict(tiff, behind[:-1], frames=1) is Verdict.INCOMPLETE


def test_more_strips_than_can_be_looked_at_are_unknown() -> None:
    """Never complete."""
    many = directories({324: (8,) * 2_100_000, 325: (4,) * 2_100_000})

    assert judge(tiff, many, frames=1).why.startswith("too many directories and strips")
    assert verdict(tiff, many, frames=1) is Verdict.UNKNOWN


CHAIN: Tags = {**PIXELS, 330: (-1,)}


@pytest.mark.parametrize("subs", [1, 2, 3])
def test_reduced_images_are_followed_from_one_to_the_next(subs: int) -> None:
    """One may be named and lead to the others, or all be named; each must be there, with its pixels."""
    below = ({273: (8,), 279: (50,)},) * (subs - 1)
    last = {273: (8, 58), 279: (50, 50)}
    named = {**CHAIN, 330: tuple(-n for n in range(1, subs + 1))}
    for first in (CHAIN, named):
        whole = directories(first, *below, last, apart=(1,))

        assert judge(tiff, whole, frames=1).verdict is Verdict.COMPLETE
        assert [n for n in range(1, 20) if verdict(tiff, whole[:-n], frames=1) is not Verdict.INCOMPLETE] == []
        for gone in ({273: (0,), 279: (0,)}, {273: (8,), 279: (1_000,)}):
            assert verdict(tiff, directories(first, *below, gone, apart=(1,)), frames=1) is Verdict.INCOMPLETE


def test_reduced_images_below_reduced_images_are_followed() -> None:
    """However deep; a place of nought is filled in later."""
    def deep(last: Tags) -> bytes:
        return directories(CHAIN, {273: (8,), 279: (50,), 330: (-2,)}, last, apart=(1, 2))

    assert verdict(tiff, deep({273: (8,), 279: (90,)}), frames=1) is Verdict.COMPLETE
    assert verdict(tiff, deep({273: (8,), 279: (900,)}), frames=1) is Verdict.INCOMPLETE
    assert verdict(tiff, directories({**PIXELS, 330: (0,)}), frames=1) is Verdict.INCOMPLETE


def test_reduced_images_in_a_circle_are_suspect() -> None:
    """A walk ends, wherever the links lead."""
    data = bytearray(directories(CHAIN, PIXELS, PIXELS, apart=(1,)))
    (second,) = struct.unpack_from("<I", data, 8 + 100 + 2 + 2 * 12 + 8)
    struct.pack_into("<I", data, len(data) - 4, second)

    assert verdict(tiff, bytes(data), frames=1) is Verdict.SUSPECT


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
        (b"<!DOCTYPE a><a></a>", "complete"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", "unknown"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a><!-- <end> -->", "unknown"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a b='&x;'/>", "unknown"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a><a>&x;</a>", "unknown"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;", "incomplete"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a><b>&x;</b>", "incomplete"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a><a>", "incomplete"),
        (b"<a></a><!-- no end", "incomplete"),
        (b"<a><!-- </a>", "incomplete"),
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


def test_a_large_xml_file_is_parsed_to_its_end() -> None:
    """An element with the name of the first does not end it, nor does what stands in a comment."""
    nested = LARGE_XML.rstrip(b"\0\r\n")[: -len(b"</r>")] + b"<r>" + b"<r>1</r>\n" * 1000

    assert verdict(xml, LARGE_XML) is Verdict.COMPLETE
    assert verdict(xml, nested + b"</r></r>") is Verdict.COMPLETE
    assert verdict(xml, nested + b"</r>") is Verdict.INCOMPLETE
    assert verdict(xml, nested + b"</r></r><!-- </r>") is Verdict.INCOMPLETE
    assert verdict(xml, nested + b"<!-- </r></r>") is Verdict.INCOMPLETE
    assert verdict(xml, LARGE_XML + b"<r>") is Verdict.INCOMPLETE
    assert {verdict(xml, LARGE_XML[:-n]) for n in (5, 6, 8, 9, 10, 30, 1_000_000)} == {Verdict.INCOMPLETE}


def test_a_very_large_xml_file_is_never_complete() -> None:
    """Two reads, whatever its size; its two ends can only tell that it is not whole."""
    window = Bytes(b"<r>" + b" <item n='1'>value</item>\n" * (xml.PARSE_MAX // 26 + 1) + b"</r>\0")

    assert window.size > xml.PARSE_MAX
    assert xml.check(window, {}, {}).verdict is Verdict.UNKNOWN
    assert (window.reads, window.bytes_read < 70_000) == (2, True)
    assert verdict(xml, window.data[:-5]) is Verdict.INCOMPLETE
    assert verdict(xml, window.data[:-5] + b"<!-- <b> -->") is Verdict.UNKNOWN


def test_a_crafted_xml_file_takes_neither_time_nor_memory() -> None:
    """Elements in each other without end, declarations by the hundred thousand: the parse ends, and says so."""
    declared = b"".join(b"<!ATTLIST r a%d CDATA 'x'>" % n for n in range(100_000))
    deep = b"<r>" * 1_000_000

    assert verdict(xml, deep + b"</r>") is Verdict.UNKNOWN
    assert judge(xml, b"<!DOCTYPE r [" + declared + b"]><r></r>").why.endswith("not read here")


def test_a_nested_entity_bomb_costs_nothing() -> None:
    """The declarations alone end the parse."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "boom">{levels}]><a>&e11;</a>'.encode()

    assert verdict(xml, bomb) is Verdict.UNKNOWN


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
    assert verdict(cbf, TWO_IMAGES) is Verdict.UNKNOWN
    assert verdict(cbf, TWO_IMAGES[:-8]) is Verdict.INCOMPLETE
    assert verdict(cbf, TWO_IMAGES[: len(TWO_IMAGES) // 2 + 600]) is Verdict.INCOMPLETE


ONE = cbf_of(b"payload" * 30)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", "complete"), (b"\r\n", "complete"), (b"\n;", "complete"), (b"\r\n;\r\n\r\n\r\n", "complete"),
        (b"\r\n;\r\n;", "incomplete"), (b"\n;\n;\n-", "incomplete"), (b"\n;\n;\n--CIF-BINARY", "incomplete"),
        (b"\n;\n--CIF-BINARY-FORMAT-SECTION-", "incomplete"), (b"\n;\n\n--CIF-BINARY-FORMAT-SECTION--", "incomplete"),
        (b"\n;\n2\n;\n--CIF-BINARY-FORMAT-SECTION--\nX-Bin", "incomplete"), (b"\n;\n_a\n;text\n", "incomplete"),
        (b"\n;\ndata_2\n", "unknown"), (b"\n;\nloop_\n_a\n1\n", "unknown"), (b"\n;\n_a\n;\ntext\n;\n", "unknown"),
        (b"\n;\n#" + b"c" * 70_000, "unknown"), (b"\n" * 70_000, "unknown"), (b"\n;\n" + bytes(90), "suspect"),
    ],
)
def test_only_the_end_of_its_text_may_follow_an_image(tail: bytes, expected: str) -> None:
    """What has begun is incomplete; of any other text nobody knows whether it has ended."""
    data = ONE[: ONE.index(cbf.CLOSING) + len(cbf.CLOSING)] + tail

    assert verdict(cbf, data) == expected
    assert verdict(cbf, data, md5=True) == expected


def test_images_in_a_loop_are_never_surely_all_there() -> None:
    """Nor are several of them: no file says how many."""
    item = b"_array_data.data\r\n"
    loops = (b"loop_\r\n_array_data.array_id\r\n" + item + b"a\r\n", b"LOOP_\n_a.b " + item, b"loop_\t" + item)
    others = (b"loop_\r\n_axis.id\r\nx\r\n" + item, b"_a.loop_ x\r\n" + item)

    assert {verdict(cbf, ONE.replace(item, one, 1)) for one in loops} == {Verdict.UNKNOWN}
    assert {verdict(cbf, ONE.replace(item, one, 1)) for one in others} == {Verdict.COMPLETE}


def md5_written(as_: str) -> bytes:
    line = next(line for line in ONE.split(b"\r\n") if line.startswith(b"Content-MD5"))
    return ONE.replace(line, as_.format(line.decode().split()[1]).encode(), 1)


@pytest.mark.parametrize(
    "line", ["Content-MD5: {0}", 'Content-MD5: "{0}"', "content-md5:'{0:.22}'", "Content-MD5: {0:.22}",
             "Content-MD5:\t{0:.23}  ", "Content-MD5 : {0}", "Content-MD5:\r\n  {0}"],
)
def test_an_md5_is_understood_however_it_is_written(line: str) -> None:
    """Its padding may be missing, quotes may be set; it is compared, and handed on."""
    data = md5_written(line)
    changed = data.replace(b"payload", b"Payload", 1)

    assert verdict(cbf, data, md5=True) is Verdict.COMPLETE
    assert verdict(cbf, changed, md5=True) is Verdict.INCOMPLETE
    assert judge(cbf, data).content.split(":")[1] == judge(cbf, ONE).content.split(":")[1] != ""


@pytest.mark.parametrize(
    "line",
    ["Content-MD5:", "Content-MD5: {0:.21}", "Content-MD5: {0:.20}!!==", "Content-MD5: none", "Content-MD5: {0}AA"],
)
def test_an_md5_that_cannot_be_read_is_suspect_where_it_is_asked_for(line: str) -> None:
    """Nothing was compared; without `md5` nobody asked, and nothing is handed on."""
    data = md5_written(line)

    assert verdict(cbf, data, md5=True) is Verdict.SUSPECT
    assert judge(cbf, data, md5=True).content == judge(cbf, data).content == ""
    assert verdict(cbf, data) is Verdict.COMPLETE
    assert verdict(cbf, data[:-30], md5=True) is Verdict.INCOMPLETE
    assert verdict(cbf, cbf_of(b"payload" * 30, md5=False), md5=True) is Verdict.COMPLETE


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
    assert verdict(mdoc, FRAME_SET.replace("NumSubFrames", "N").encode()) is Verdict.INCOMPLETE


def test_a_section_without_another_of_its_kind_is_never_surely_finished() -> None:
    """Which keys follow DateTime differs, so a cut at a line's end after it cannot be told."""
    cut = FRAME_SET[: FRAME_SET.index("Filter")].encode()
    # Frame sets followed by sections without DateTime are real.
    below = (FRAME_SET + "\r\n[ZValue = 0]\r\nTiltAngle = 0\r\n").encode()

    for text in (FRAME_SET.encode(), cut):
        assert {verdict(mdoc, text), verdict(mdoc, text, sections=1)} == {Verdict.UNKNOWN}
    assert verdict(mdoc, below, sections=2) is Verdict.UNKNOWN
    assert verdict(mdoc, below + b"\r\n[ZValue = 1]\r\nTiltAngle = 3\r\n", sections=3) is Verdict.COMPLETE


def test_an_empty_section_is_incomplete() -> None:
    """Its name alone is no section, whatever the number says."""
    assert verdict(mdoc, b"[ZValue = 0]\n", sections=1) is Verdict.INCOMPLETE
    assert verdict(mdoc, b"[ZValue = 0]\n\n[ZValue = 1]\n", sections=2) is Verdict.INCOMPLETE
    assert verdict(mdoc, b"[ZValue = 0]\nTiltAngle = 3\n", sections=1) is Verdict.UNKNOWN


@pytest.mark.parametrize("text", [FRAME_SET, TILTS], ids=["one movie", "tilts"])
def test_an_mdoc_with_zeros_in_it_is_not_complete(text: str) -> None:
    """What a copy left out is not text, though the last line has its end."""
    options = {"sections": text.count("\n[") - text.count("\n[T")}
    data = text.encode()

    assert verdict(mdoc, data + bytes(2000) + b"\n", **options) is Verdict.SUSPECT
    assert verdict(mdoc, data.replace(b"TiltAngle", bytes(200) + b"TiltAngle", 1), **options) is Verdict.SUSPECT
    assert verdict(mdoc, data + bytes(2000), **options) is Verdict.INCOMPLETE


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
@given(name=st.sampled_from(sorted(SAMPLES)), edits=st.lists(
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
