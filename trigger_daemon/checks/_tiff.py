"""Walk the directories of a TIFF, BigTIFF or EER file, count its frames, and judge it by what they refer to.

Nothing is decoded. Bytes, reads, directories, entries and values are limited,
so that no crafted file keeps a worker busy.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._frames import Expected, expect
from trigger_daemon.checks._words import NEVER_WRITTEN, amount, frames
from trigger_daemon.core.model import Verdict

DIRECTORIES_MAX = 20_000  # frames of the longest movies, with room; the byte budget ends most walks before
ENTRIES_MAX = 4_096  # in one directory; real ones have 10 to 60
# Strips and tiles are looked at one by one, about a second for so many. The byte budget ends most walks before, but a
# crafted file may refer to the same bytes again and again.
WORK_MAX = 4_000_000
ENTRY_WORK = 8  # an entry of a directory is as much work as so many strips
PART_VALUES = 2**16  # of an array, read at once
TAIL_MAX = 16  # bytes after the last thing referred to; writers round up
CHUNK_BYTES, BEFORE_BYTES = 2_048, 512  # one read brings a directory with the values libtiff puts around it
SPARE_BYTES = 64  # beyond a directory like the last one: some entries more
XML_BYTES_MAX = 64 * 2**10  # acquisition data of an EER file, a few kB

COMPRESSION, STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS, SUB_DIRECTORIES = 259, 273, 279, 324, 325, 330
PIXELS = (STRIP_OFFSETS, STRIP_COUNTS), (TILE_OFFSETS, TILE_COUNTS)
ARRAYS = {STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS, SUB_DIRECTORIES}  # read if they lie elsewhere
EER_COMPRESSIONS = range(65_000, 65_003)
EER_ACQUISITION = 65_001
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

_NUMBER_OF_FRAMES = re.compile(rb"""<item[^>]*name=["']numberOfFrames["'][^>]*>\s*(\d{1,9})\s*</item>""")


def judge(
    probe: Window, wanted: int | str | None, companions: Mapping[str, Window], *, must_be_eer: bool = False
) -> Outcome:
    """Say whether the file is whole; `wanted`: the option `frames`. One read a frame, 2 kB or less."""
    head = probe.read(0, 16)
    if not any(head):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    if len(head) < 8:
        return Outcome(Verdict.INCOMPLETE, f"{len(head)} of the 8 bytes of the header")
    layout = _layout(head)
    if layout is None:
        return Outcome(Verdict.SUSPECT, "does not begin like a TIFF")
    if layout.big and len(head) < 16:
        return Outcome(Verdict.INCOMPLETE, f"{len(head)} of the 16 bytes of the header")
    if must_be_eer and not layout.big:
        return Outcome(Verdict.SUSPECT, "a TIFF, but no EER, which is a BigTIFF")
    expected = expect(wanted, probe, companions)
    if isinstance(expected, Outcome):
        return expected
    walk = _Walk(probe, layout)
    try:
        walk.run(layout.offset.unpack_from(head, 8 if layout.big else 4)[0])
    except _Cut as cut:
        of = expected.number or walk.announced
        have = f"{walk.frames:,} of {frames(of)}" if of else f"{frames(walk.frames)} so far"
        return Outcome(Verdict.INCOMPLETE, f"{have}, {amount(probe.size)}: {cut}")
    except _Odd as odd:
        return Outcome(Verdict.SUSPECT, f"{frames(walk.frames)}, then {odd}")
    except _Endless:
        return Outcome(Verdict.UNKNOWN, f"too many directories and strips to look at all, {frames(walk.frames)} seen")
    if must_be_eer and not walk.eer:
        return Outcome(Verdict.SUSPECT, f"a TIFF, but no EER: its first frame has compression {walk.compression}")
    verdict, why = _compare(walk, expected, probe.size, must_be_eer=must_be_eer)
    if verdict in (Verdict.COMPLETE, Verdict.UNKNOWN) and probe.holes():
        verdict, why = Verdict.SUSPECT, f"{frames(walk.frames)} by its length, {NEVER_WRITTEN}"
    return Outcome(verdict, why, measure=expected.measure(walk.frames))


def _compare(walk: _Walk, expected: Expected, size: int, *, must_be_eer: bool) -> tuple[Verdict, str]:
    wanted = walk.announced if expected.number is None else expected.number
    have = frames(walk.frames) if wanted is None else f"{walk.frames:,} of {frames(wanted)}"
    if wanted is not None and walk.frames < wanted:
        return Verdict.INCOMPLETE, f"{have}, {amount(size)}"
    if expected.number is None and wanted is not None and walk.frames > wanted:
        return Verdict.SUSPECT, f"{frames(walk.frames)} where it announces {wanted:,}"
    if odd := expected.odd(walk.frames) or walk.odd:
        return Verdict.SUSPECT, odd
    if (tail := size - walk.end) > TAIL_MAX and walk.ends_known:
        return Verdict.SUSPECT, f"{have}, and {tail:,} bytes after them that nothing refers to"
    if expected.doubt:
        return expected.doubt[0], f"{frames(walk.frames)}, but {expected.doubt[1]}"
    if wanted is not None or expected.usual is not None:
        return Verdict.COMPLETE, f"{have}, {amount(size)}" + (", as its siblings" if expected.usual is not None else "")
    if must_be_eer:  # every EER file that is known says it
        return Verdict.UNKNOWN, f"{have}, but neither the file nor the rule says how many there must be"
    return Verdict.COMPLETE, f"{have}, {amount(size)}; the rule gives no number to compare with"


class _Cut(Exception):
    """Something referred to is not there: proof that bytes are missing."""


class _Odd(Exception):
    """No directory can look like this."""


class _Endless(Exception):
    """More to look at than a check may."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How numbers are written: all that TIFF and BigTIFF, little and big endian differ in."""

    order: str
    big: bool
    number: struct.Struct  # of entries
    entry: struct.Struct  # tag, type, count, value or its offset
    offset: struct.Struct


@dataclass(frozen=True, slots=True)
class _Entry:
    type: int
    count: int
    value: bytes  # the value itself, or where it is


_Directory = dict[int, _Entry]


def _layout(head: bytes) -> _Layout | None:
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        return None
    magic, offset_bytes, zero = struct.unpack_from(f"{order}3H", head, 2)
    if magic == 42:
        return _Layout(order, False, *(struct.Struct(order + form) for form in ("H", "HHI4s", "I")))
    if magic == 43 and offset_bytes == 8 and zero == 0:
        return _Layout(order, True, *(struct.Struct(order + form) for form in ("Q", "HHQ8s", "Q")))
    return None


class _Walk:
    """One walk over all directories: counts frames, and finds the last byte that anything refers to."""

    def __init__(self, probe: Window, layout: _Layout) -> None:
        self.frames = 0
        self.end = 0
        self.ends_known = True
        self.announced: int | None = None  # what an EER file says of itself
        self.eer = False
        self.compression = 0  # of the first frame
        self.odd = ""  # what no whole file should have, and some may
        self._first = True
        self._probe = probe
        self._layout = layout
        # How many bytes before a place, and in all, are read at once: enough for a directory like the last one.
        self._around = BEFORE_BYTES, CHUNK_BYTES
        self._seen: set[int] = set()
        self._work = 0
        self._chunks: list[tuple[int, bytes]] = []

    def run(self, at: int) -> None:
        if not at:
            raise _Cut("no frame's directory is written yet")
        while at:
            directory, at = self._read(at, "the next frame's directory")
            self._pixels(directory, f"frame {self.frames + 1:,}")
            self._count(directory)
            self._reduced(directory)

    def _reduced(self, directory: _Directory) -> None:
        """Walk the directories below one: those it names, those these lead to, and those below them."""
        places = self._below(directory)
        chains: dict[int, int] = {}  # directory -> the chain on which it was met
        while places:
            chain = at = places.pop()
            if at in chains:  # it is named, and led to as well
                continue
            while at and at not in chains:
                chains[at] = chain
                below, at = self._read(at, "a reduced image's directory")
                self._pixels(below, "a reduced image")
                places += self._below(below)
            if at and chains[at] == chain:
                raise _Odd("reduced images that lead in a circle")

    def _below(self, directory: _Directory) -> list[int]:
        entry = directory.get(SUB_DIRECTORIES)
        places = [at for part in self._integers(entry) for at in part]
        if entry is not None and (0 in places or not places):  # so libtiff leaves them until they are written
            raise _Cut("a reduced image's directory is not written yet")
        return places

    def _read(self, at: int, what: str) -> tuple[_Directory, int]:
        """Return a directory, and where the next one is (0: none)."""
        if at in self._seen:
            raise _Odd("directories that lead in a circle")
        if len(self._seen) >= DIRECTORIES_MAX:
            raise _Endless
        self._seen.add(at)
        layout = self._layout
        self._within(at, layout.number.size, what)
        (count,) = layout.number.unpack(self._bytes(at, layout.number.size))
        if not count:
            raise _Cut(f"{what} is still empty")
        if count > ENTRIES_MAX:
            raise _Odd(f"a directory of {count:,} entries")
        self._spend(count * ENTRY_WORK)
        length = count * layout.entry.size
        begins = at + layout.number.size
        self._within(begins, length + layout.offset.size, what)
        data = self._bytes(begins, length + layout.offset.size)
        self._around = 0, layout.number.size + len(data) + SPARE_BYTES
        directory: _Directory = {}
        for tag, kind, values, value in layout.entry.iter_unpack(data[:length]):
            directory[tag] = _Entry(kind, values, value)
            size = values * TYPE_BYTES.get(kind, 0)
            if size > layout.offset.size:
                if tag in ARRAYS:
                    self._around = BEFORE_BYTES, CHUNK_BYTES
                self._within(layout.offset.unpack(value)[0], size, f"a value of the next frame (tag {tag})")
        return directory, layout.offset.unpack_from(data, length)[0]

    def _pixels(self, directory: _Directory, image: str) -> None:
        """Make sure that all strips and tiles are there, and that there are any."""
        found = [pair for pair in PIXELS if pair[0] in directory]
        for offsets, counts in found:
            self._strips(directory[offsets], directory.get(counts), image)
        if not found:
            self.odd = self.odd or f"{image} has neither strips nor tiles"

    def _strips(self, begins: _Entry, lengths: _Entry | None, image: str) -> None:
        """Look at every strip or tile of an image.

        One that has neither a place nor a length is yet to come, or left out
        for good as sparse files do; nothing tells these apart. One that has
        only one of them is yet to come.
        """
        if not begins.count or (lengths and not lengths.count):  # so libtiff leaves them until they are written
            raise _Cut(f"{image} has no pixels yet")
        if begins.type not in INTEGERS or (lengths and lengths.type not in INTEGERS):
            raise _Odd("an image whose strips have no places")
        if lengths is None:  # very old writers left them out: only where the strips begin can be tested
            self.ends_known = False
        elif lengths.count != begins.count:
            self.odd = self.odd or f"{image} has {begins.count:,} strips or tiles, but {lengths.count:,} lengths"
        without = 0
        sizes = self._integers(lengths)
        for places in self._integers(begins):
            counts = next(sizes, ()) if lengths else (1,) * len(places)
            if 0 in places or 0 in counts:
                neither = sum(not (at or count) for at, count in zip(places, counts, strict=False))
                if counts.count(0) != neither or places.count(0) != neither:
                    raise _Cut(f"{image} has no pixels yet")
                without += neither
            self._within(max(map(operator.add, places, counts), default=0), 0, "the next frame")
        if without == begins.count:
            raise _Cut(f"{image} has no pixels yet")
        if without:
            self.odd = self.odd or f"{image} has no pixels in {without:,} of {begins.count:,} strips or tiles"

    def _count(self, directory: _Directory) -> None:
        """Count a frame; in EER only those with its compression, for the final sum may follow."""
        compression = next((part[0] for part in self._integers(directory.get(COMPRESSION))), 0)
        if self._first:
            self._first = False
            self.compression, self.eer = compression, compression in EER_COMPRESSIONS
            if self.eer:
                self._announce(directory.get(EER_ACQUISITION))
        if not self.eer or compression in EER_COMPRESSIONS:
            self.frames += 1

    def _announce(self, entry: _Entry | None) -> None:
        size = self._layout.offset.size
        if entry is None or TYPE_BYTES.get(entry.type) != 1 or entry.count <= size:
            return
        text = self._probe.read(self._layout.offset.unpack(entry.value)[0], min(entry.count, XML_BYTES_MAX))
        if said := _NUMBER_OF_FRAMES.search(text):
            self.announced = int(said[1])

    def _integers(self, entry: _Entry | None) -> Iterator[tuple[int, ...]]:
        """Yield an entry's values in parts, none of them empty; nothing if they are no integers."""
        if entry is None or entry.type not in INTEGERS:
            return
        form, size = INTEGERS[entry.type], TYPE_BYTES[entry.type]
        inline = entry.count * size <= self._layout.offset.size
        at = 0 if inline else self._layout.offset.unpack(entry.value)[0]
        for start in range(0, entry.count, PART_VALUES):
            count = min(PART_VALUES, entry.count - start)
            self._spend(count)
            data = entry.value if inline else self._bytes(at + start * size, count * size)
            if whole := min(count, len(data) // size):
                yield struct.unpack_from(f"{self._layout.order}{whole}{form}", data)

    def _within(self, offset: int, length: int, what: str) -> None:
        if offset + length > self._probe.size:
            raise _Cut(f"{what} ends at byte {offset + length:,}")
        self.end = max(self.end, offset + length)

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > WORK_MAX:
            raise _Endless

    def _bytes(self, offset: int, length: int) -> bytes:
        """Read through the two newest chunks, so that a directory and its values cost one read."""
        for start, data in self._chunks:
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        before, in_all = self._around
        start = max(0, offset - before)
        data = self._probe.read(start, max(in_all, offset + length - start))
        self._chunks = [(start, data), *self._chunks[:1]]
        return data[offset - start : offset - start + length]
