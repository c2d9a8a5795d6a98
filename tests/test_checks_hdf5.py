"""Laws of the checks `hdf5` and `eiger`: an open or cut file is never complete, and the library can harm nobody."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy
import psutil
import pytest

from trigger_daemon import registry, simulator_hdf5
from trigger_daemon.checks import Outcome, eiger, hdf5
from trigger_daemon.checks._hdf5 import SIGNATURE, CannotTell, Reader
from trigger_daemon.core.grammar import OptionFault
from trigger_daemon.core.model import Verdict
from trigger_daemon.mounts import mount_of
from trigger_daemon.probe import BLOCK_TYPES, BYTES_MAX, Companions, Judged, Probe, run_checks

SPECIFIC = "/entry/instrument/detector/detectorSpecific"
COMPLETE, INCOMPLETE, SUSPECT, UNKNOWN = Verdict.COMPLETE, Verdict.INCOMPLETE, Verdict.SUSPECT, Verdict.UNKNOWN


def nothing(_: float) -> None:
    """A pause that takes no time."""


def look(path: Path) -> Outcome:
    with Probe(path) as probe:
        return hdf5.check(probe, {}, {})


def superblock(version: int, *, flags: int = 0, end: int = 0, base: int = 0, width: int = 8) -> bytes:
    """Make a superblock by hand."""
    def address(value: int) -> bytes:
        return value.to_bytes(width, "little")

    undefined = b"\xff" * width
    if version < 2:
        head = SIGNATURE + bytes([version, 0, 0, 0, 0, width, width, 0]) + struct.pack("<HHI", 4, 16, flags)
        head += bytes(4) if version == 1 else b""
        return head + address(base) + undefined + address(end) + undefined + bytes(40)
    return SIGNATURE + bytes([version, width, width, flags]) + address(base) + undefined + address(end) + bytes(20)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / "x.h5"
        path.write_bytes(data)
        return path

    return make


# ------------------------------------------------------------------------- superblock


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_every_superblock_tells_size_and_flags(made: Callable[[bytes], Path], version: int, width: int) -> None:
    """In all versions and widths: EOF = size is whole, less is cut, more is a tail; an open file is never complete."""
    def verdict(size: int, **fields: int) -> Verdict:
        head = superblock(version, end=1000, width=width, **fields)
        return look(made(head.ljust(size, b"x"))).verdict

    assert verdict(1000) is COMPLETE
    assert verdict(999) is INCOMPLETE
    assert verdict(1001) is SUSPECT
    assert verdict(1000, flags=1) is (INCOMPLETE if version == 3 else SUSPECT)
    assert verdict(999, flags=1) is INCOMPLETE
    assert verdict(1001, flags=1) is INCOMPLETE
    assert verdict(1000, flags=5) is (INCOMPLETE if version == 3 else SUSPECT)


@pytest.mark.parametrize("block", [512, 1024, 2048, 65_536])
@pytest.mark.parametrize("filled", [b"\0", b"user text\n"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_user_block_is_looked_behind(tmp_path: Path, block: int, filled: bytes, libver: str) -> None:
    """The end is absolute, wherever the superblock is; a file cut behind it is incomplete."""
    path = tmp_path / "u.h5"
    with h5py.File(path, "w", userblock_size=block, libver=libver) as file:
        file["x"] = numpy.arange(1000)
    data = (filled * block)[:block] + path.read_bytes()[block:]
    path.write_bytes(data)

    assert look(path).verdict is COMPLETE
    path.write_bytes(data[:-1])
    assert look(path).verdict is INCOMPLETE


def test_a_block_put_before_the_file_later_moves_its_end(tmp_path: Path) -> None:
    """The library goes by where it finds the superblock, and so do we."""
    path = tmp_path / "j.h5"
    with h5py.File(path, "w") as file:
        file["x"] = numpy.arange(10)
    path.write_bytes(bytes(512) + path.read_bytes())

    assert list(h5py.File(path, locking=False)["x"]) == list(range(10))
    assert look(path).verdict is COMPLETE


@pytest.mark.parametrize("manner", simulator_hdf5.MANNERS)
def test_a_cut_file_is_incomplete_at_every_length(tmp_path: Path, manner: simulator_hdf5.Manner) -> None:
    """Proof, at each of the first and last bytes and at some between; a byte more is suspect."""
    path = tmp_path / "s.h5"
    size = simulator_hdf5.hdf5_file(path, images=3, width=20, height=20, pause=nothing, manner=manner).size
    data = path.read_bytes()
    cut = tmp_path / "cut.h5"
    lengths = [*range(200), *range(200, size - 200, 97), *range(size - 200, size)]
    said = {}
    for length in lengths:
        cut.write_bytes(data[:length])
        said[length] = look(cut).verdict
    cut.write_bytes(data + b"\0")

    assert look(path).verdict is COMPLETE
    assert {length for length, verdict in said.items() if verdict is not INCOMPLETE} == set()
    assert look(cut).verdict is SUSPECT


@pytest.mark.parametrize(
    ("data", "verdict", "why"),
    [
        (b"", INCOMPLETE, "still empty"),
        (bytes(5000), INCOMPLETE, "still empty"),
        (SIGNATURE[:4], INCOMPLETE, "ends within its header, 4 bytes so far"),
        (superblock(0)[:30], INCOMPLETE, "ends within its header, 30 bytes so far"),
        (b"SIMPLE  =  T" * 100, SUSPECT, "does not begin like HDF5"),
        (superblock(2).replace(b"\x02\x08\x08", b"\x07\x08\x08"), UNKNOWN,
         "version 7 of HDF5's header is not known here"),
        (superblock(3, width=8).replace(b"\x03\x08\x08", b"\x03\x09\x08"), SUSPECT,
         "its HDF5 header is damaged: addresses of an impossible width"),
        (superblock(0, end=20_000_000).ljust(12_000, b"x"), INCOMPLETE, "12.0 kB of 20.0 MB"),
        (superblock(3, flags=5, end=150).ljust(150), INCOMPLETE, "its writer has not closed it, 150 bytes so far"),
        (superblock(0, flags=1, end=150).ljust(150), SUSPECT,
         "150 bytes as its header says, but its writer has not closed it"),
        (superblock(0, end=150).ljust(170), SUSPECT,
         "all of 150 bytes, and 20 bytes more than its header accounts for"),
        (superblock(0, end=150).ljust(150), COMPLETE, "all of 150 bytes, and closed by its writer"),
    ],
)
def test_the_words_say_what_was_found(made: Callable[[bytes], Path], data: bytes, verdict: Verdict, why: str) -> None:
    """Numbers, and what a person can do something with."""
    found = look(made(data))

    assert (found.verdict, found.why) == (verdict, why)


def test_one_read_is_enough(made: Callable[[bytes], Path]) -> None:
    """128 bytes of a file without a user block, whatever its size; of any other, one read for each doubling."""
    with Probe(made(superblock(0, end=10**6).ljust(10**6))) as probe:
        hdf5.check(probe, {}, {})
        assert (probe.reads, probe.bytes_read) == (1, 128)
    with Probe(made(b"x" * 10**6)) as probe:
        hdf5.check(probe, {}, {})
        assert probe.reads <= 12


def test_a_file_with_holes_is_suspect(made: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a copy leaves it that sets the length first; what else is wrong with it comes first."""
    path = made(superblock(0, end=100_000).ljust(100_000, b"x"))
    assert look(path).verdict is COMPLETE

    monkeypatch.setattr(Probe, "holes", lambda probe: True)
    found = look(path)
    assert (found.verdict, found.why) == (
        SUSPECT,
        "100.0 kB and closed as its header says, "
        "but parts of it were never written (a program that sets the length first)",
    )
    path.write_bytes(superblock(0, end=100_001).ljust(100_000, b"x"))
    assert look(path).verdict is INCOMPLETE


def test_a_length_that_was_set_first_leaves_holes(made: Callable[[bytes], Path]) -> None:
    """Through the real window, where the file system shows them."""
    data = superblock(0, end=400_000).ljust(400_000, b"x")
    path = made(data)
    with Probe(path) as probe:
        if mount_of(os.fspath(path)).fstype not in BLOCK_TYPES or probe.holes():
            pytest.skip("a file system that does not show them")
    assert look(path).verdict is COMPLETE

    path.write_bytes(data[:100_000])
    os.truncate(path, len(data))
    assert look(path).verdict is SUSPECT


# ------------------------------------------------------------------------- Eiger sets


class Set:
    """A set in a directory, and what the check says of what is there."""

    def __init__(self, directory: Path, **sizes: Any) -> None:
        self.directory = directory
        sizes = {"images": 25, "per_file": 10, "width": 6, "height": 4, "libver": "latest", **sizes}
        self.written = simulator_hdf5.eiger_set(directory, series="a b", pause=nothing, **sizes)
        self.master, *self.data = (one.path for one in self.written)

    def judged(self, **options: Any) -> Judged:
        """As the core does: ask, look for what is needed, ask again with what is there."""
        first = self._run({}, options)
        there = {name: os.fspath(path) for name in first.needs if (path := self.directory / name).exists()}
        return self._run(there, options) if there else first

    def _run(self, there: dict[str, str], options: dict[str, Any]) -> Judged:
        with Probe(self.master) as probe:
            state = probe.state()
        return run_checks(self.master, state, (("eiger", options),), there, registry.find_check)

    def rewrite(self, change: Callable[[Any], None], path: Path | None = None) -> None:
        with h5py.File(path or self.master, "r+") as file:
            change(file)


@pytest.fixture
def made_set(tmp_path: Path) -> Set:
    return Set(tmp_path / "set")


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize(("images", "triggers"), [(25, 1), (5, 5), (20, 1), (3, 1)])
def test_a_whole_set_is_complete(tmp_path: Path, libver: str, images: int, triggers: int) -> None:
    """All images that the master announces, in the files that it names, and these are its needs."""
    whole = Set(tmp_path, images=images, triggers=triggers, libver=libver)
    found = whole.judged()

    assert found.verdict is COMPLETE
    assert found.why.startswith(f"{images * triggers} of {images * triggers} images in ")
    assert list(found.needs) == [path.name for path in whole.data]


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    """With any of its files missing a set is incomplete, and it says how many there are."""
    whole = Set(tmp_path)
    for missing in whole.data:
        aside = missing.rename(missing.with_suffix(".aside"))
        found = whole.judged()
        assert (found.verdict, found.why) == (INCOMPLETE, "2 of 3 data files")
        assert len(found.needs) == 3
        aside.rename(missing)

    assert whole.judged().verdict is COMPLETE


def test_the_worst_data_file_is_the_verdict(made_set: Set) -> None:
    """A cut one is incomplete, one with a tail is suspect, and both are named."""
    data = made_set.data[1].read_bytes()
    made_set.data[1].write_bytes(data[:-1])
    cut = made_set.judged()
    made_set.data[1].write_bytes(data + b"x")
    longer = made_set.judged()

    assert cut.verdict is INCOMPLETE and cut.why.startswith("a b_data_000002.h5: ")
    assert longer.verdict is SUSPECT and "1 bytes more" in longer.why


def test_a_data_file_with_holes_is_suspect(made_set: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a master, with `images` or without; whatever is missing besides is proof."""
    def holes(path: Path) -> None:
        monkeypatch.setattr(Probe, "holes", lambda probe: probe.name == path.name)

    assert made_set.judged().verdict is COMPLETE
    for path in (made_set.data[1], made_set.master):
        holes(path)
        for options in ({}, {"images": 25, "per_file": 10}):
            found = made_set.judged(**options)
            assert (found.verdict, len(found.needs)) == (SUSPECT, 3)
            assert "never written" in found.why
    made_set.data[2].unlink()

    assert made_set.judged().verdict is INCOMPLETE


def test_a_cut_or_open_master_is_not_asked_for_its_files(made_set: Set) -> None:
    """What it links to is not known before it is whole."""
    data = made_set.master.read_bytes()
    made_set.master.write_bytes(data[:-1])
    assert (made_set.judged().verdict, made_set.judged().needs) == (INCOMPLETE, ())

    opened = bytearray(data)
    opened[11] = 1
    made_set.master.write_bytes(opened)
    assert made_set.judged().why.startswith("its writer has not closed it")


def test_images_are_counted(made_set: Set) -> None:
    """By the numbers of the first and last, else by the shape of three or four dimensions."""
    def three(file: Any) -> None:
        for name in ("image_nr_low", "image_nr_high"):
            del file["entry/data/data"].attrs[name]

    def four(file: Any) -> None:
        del file["entry/data/data"]
        file["entry/data/data"] = numpy.zeros((10, 1, 4, 6), "u2")

    def two(file: Any) -> None:
        del file["entry/data/data"]
        file["entry/data/data"] = numpy.zeros((4, 6), "u2")

    made_set.rewrite(three, made_set.data[0])
    assert made_set.judged().verdict is COMPLETE
    made_set.rewrite(four, made_set.data[0])
    assert made_set.judged().verdict is COMPLETE
    made_set.rewrite(two, made_set.data[0])
    assert "2 dimensions" in made_set.judged().why


def test_a_file_of_an_older_series_is_found_out(made_set: Set, tmp_path: Path) -> None:
    """Too few images are incomplete, too many suspect, and so are the right number with the wrong image numbers."""
    kept = tmp_path / "kept"
    shutil.copy(made_set.data[1], kept)
    shutil.copy(Set(tmp_path / "short", images=24, per_file=8).data[1], made_set.data[1])
    fewer = made_set.judged()
    shutil.copy(Set(tmp_path / "long", images=24, per_file=12).data[1], made_set.data[1])
    more = made_set.judged()
    shutil.copy(made_set.data[0], made_set.data[1])
    twice = made_set.judged()
    shutil.copy(kept, made_set.data[1])

    words = "23 of 25 images in 3 data files; the fewest, 8, in a b_data_000002.h5"
    assert (fewer.verdict, fewer.why) == (INCOMPLETE, words)
    assert (more.verdict, more.why) == (SUSPECT, "27 images in 3 data files where 25 were announced")
    assert twice.verdict is SUSPECT and "begins with image 1" in twice.why
    assert made_set.judged().verdict is COMPLETE


@pytest.mark.parametrize("name", ["../x.h5", "/etc/passwd", "a/../../x.h5", ".", "a b_master.h5", "./a b_master.h5"])
def test_a_link_that_leads_elsewhere_is_suspect(made_set: Set, name: str) -> None:
    """Nothing outside the master's directory is asked for, nor the master itself."""
    def relink(file: Any) -> None:
        del file["entry/data/data_000002"]
        file["entry/data/data_000002"] = h5py.ExternalLink(name, "/entry/data/data")

    made_set.rewrite(relink)
    found = made_set.judged()

    assert (found.verdict, found.needs) == (SUSPECT, ())
    assert "data_000002" in found.why and name in found.why


def test_data_files_may_lie_below_and_images_in_the_master(made_set: Set) -> None:
    """A link into a directory below is a need; a data set of the master itself needs no file."""
    below = made_set.directory / "d" / "two.h5"
    below.parent.mkdir()
    made_set.data[1].rename(below)

    def relink(file: Any) -> None:
        del file["entry/data/data_000002"], file["entry/data/data_000003"]
        file["entry/data/data_000002"] = h5py.ExternalLink("./d//two.h5", "/entry/data/data")
        file["entry/data/data_000003"] = numpy.zeros((5, 4, 6), "u2")

    made_set.rewrite(relink)
    found = made_set.judged()

    assert (found.verdict, found.needs) == (COMPLETE, ("a b_data_000001.h5", "d/two.h5"))


@pytest.mark.parametrize("place", ["entry/data/threshold_2_data_000001", "entry/data/meta", "deep/below/it", "top"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_every_file_that_a_master_names_is_needed(tmp_path: Path, place: str, libver: str) -> None:
    """Wherever the link stands, and whatever it is called: it is awaited, and its header is looked at."""
    made_set = Set(tmp_path, libver=libver)
    target = made_set.directory / "more" / "a b_meta.h5"

    def link(file: Any) -> None:
        file[place] = h5py.ExternalLink("more/a b_meta.h5", "/entry/data/data")
        file["self"] = h5py.ExternalLink("./a b_master.h5", "/entry")
        file["again"] = h5py.ExternalLink("a b_data_000001.h5", "/entry")
        file["entry/loop"] = file["entry"]

    made_set.rewrite(link)
    missing = made_set.judged()
    Set(target.parent, per_file=25).data[0].rename(target)
    there = made_set.judged()
    whole = target.read_bytes()
    target.write_bytes(whole[:-1])
    cut = made_set.judged()
    target.write_bytes(whole + b"x")

    names = (*(path.name for path in made_set.data), "more/a b_meta.h5")
    assert (missing.verdict, missing.why, missing.needs) == (INCOMPLETE, "3 of 4 files", names)
    assert (there.verdict, there.why, there.needs) == (COMPLETE, "25 of 25 images in 3 data files", names)
    assert (cut.verdict, made_set.judged().verdict) == (INCOMPLETE, SUSPECT)


def test_a_further_threshold_with_other_images_is_suspect(made_set: Set) -> None:
    """It has as many as the first; what its files cannot tell is no proof."""
    other = Set(made_set.directory / "t", per_file=20)

    def link(file: Any, count: int = 2) -> None:
        for number in range(1, count + 1):
            name = f"t/a b_data_{number:06d}.h5"
            file[f"entry/data/threshold_2_data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")

    made_set.rewrite(lambda file: link(file, 1))
    fewer = made_set.judged()
    made_set.rewrite(lambda file: file["entry/data"].__delitem__("threshold_2_data_000001"))
    made_set.rewrite(link)

    assert (fewer.verdict, fewer.why) == (SUSPECT, "20 of 25 images of threshold_2")
    assert made_set.judged().verdict is COMPLETE
    made_set.rewrite(lambda file: file["entry/data"].__delitem__("data"), other.data[1])
    assert made_set.judged().verdict is SUSPECT


@pytest.mark.parametrize("name", ["/data/calibration/mask.h5", "../gain.h5", "a/../../x.h5"])
def test_a_further_link_that_leads_elsewhere_leaves_a_set_unknown(made_set: Set, name: str) -> None:
    """What lies outside is not looked at; what lies inside is judged as ever."""
    made_set.rewrite(lambda file: file.__setitem__("entry/mask", h5py.ExternalLink(name, "/mask")))
    found = made_set.judged()
    made_set.data[0].unlink()

    assert (found.verdict, len(found.needs)) == (UNKNOWN, 3)
    assert found.why == f"its link entry/mask leads to {name!r}, which is not looked at"
    assert made_set.judged().verdict is INCOMPLETE


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize(
    ("layout", "written", "there"),
    [
        ({"chunks": (1, 4, 6)}, range(1), 1), ({"chunks": (1, 4, 6)}, range(0), 0),
        ({"chunks": (1, 4, 6)}, (2, 5, 9), 3), ({"chunks": (1, 4, 6)}, range(10), 10),
        ({"chunks": (1, 2, 3)}, range(7), 7), ({"chunks": (4, 4, 6)}, range(10), 10),
        ({"chunks": (4, 4, 6)}, range(3), 4), ({"chunks": (1, 4, 6), "compression": "gzip"}, range(1), 1),
        ({"chunks": (1, 4, 6), "maxshape": (10, 4, 6)}, range(1), 1), ({"maxshape": None}, range(0), 0),
        ({"maxshape": None}, range(1), 10),  # contiguous: its place is taken as a whole
    ],
)
def test_images_without_a_place_in_the_file_are_none(
    tmp_path: Path, libver: str, attributes: bool, layout: dict[str, Any], written: Any, there: int
) -> None:
    """The shape of a data set, and the numbers of its images, may be set before any is written."""
    made_set = Set(tmp_path, libver=libver)

    def rewrite(file: Any) -> None:
        kept = dict(file["entry/data/data"].attrs)
        del file["entry/data/data"]
        data = file.create_dataset("entry/data/data", (10, 4, 6), "u2", **{"maxshape": (None, 4, 6), **layout})
        data.attrs.update(kept if attributes else {})
        for number in written:
            data[number] = 7

    with h5py.File(made_set.data[1], "r+", libver=libver) as file:
        rewrite(file)
    found = made_set.judged()

    assert found.verdict is (COMPLETE if there == 10 else INCOMPLETE)
    assert found.why.startswith(f"{15 + there} of 25 images")


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (lambda file: file.__delitem__("entry/data"), SUSPECT, "cannot read it"),
        (lambda file: file.__delitem__("entry"), SUSPECT, "cannot read it"),
        (lambda file: [file["entry/data"].__delitem__(name) for name in tuple(file["entry/data"])], SUSPECT, "no data"),
        (lambda file: file[SPECIFIC].__delitem__("nimages"), UNKNOWN, "does not say"),
        (lambda file: file[SPECIFIC]["nimages"].__setitem__((), -5), SUSPECT, "-5"),
    ],
)
def test_a_master_without_what_is_looked_for_is_no_proof(
    made_set: Set, change: Callable[[Any], None], verdict: Verdict, words: str
) -> None:
    """Suspect, or unknown: a set of another make must not wait for ever."""
    made_set.rewrite(change)
    found = made_set.judged()

    assert found.verdict is verdict
    assert words in found.why


def test_names_need_not_be_text(tmp_path: Path) -> None:
    """A path that is no UTF-8 is looked for like any other, and a name asked for as the file system has it."""
    made_set = Set(tmp_path, libver="earliest")  # which has no checksums
    data = made_set.master.read_bytes()
    made_set.master.write_bytes(data.replace(b"_data_000002.h5\0/entry/data", b"_data_000002.h5\0/entry/da\xffa"))
    path = made_set.judged()
    made_set.master.write_bytes(data.replace(b"a b_data_000002", b"a\xffb_data_000002"))
    name = made_set.judged()

    assert path.verdict is SUSPECT and path.why.startswith("a b_data_000002.h5: the HDF5 library cannot read it")
    assert (name.verdict, name.needs[1]) == (INCOMPLETE, "a\udcffb_data_000002.h5")


def test_of_what_is_huge_nothing_is_read(made_set: Set) -> None:
    """A number that is a terabyte of numbers, an attribute of a megabyte: passed over, within the budget."""
    def swell(file: Any) -> None:
        group = file[SPECIFIC]
        del group["nimages"]
        group.create_dataset("nimages", (10**12,), dtype="u8", chunks=(10**6,))

    made_set.rewrite(swell)
    began_at = time.monotonic()
    found = made_set.judged()

    assert found.verdict is UNKNOWN
    assert time.monotonic() - began_at < 5


def test_names_by_the_rule_need_no_library(made_set: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `images` the data files are known by name and number; the master is not read, the reader not started."""
    monkeypatch.setattr("subprocess.Popen", None)
    found = made_set.judged(images=25, per_file=10)
    more = made_set.judged(images=31, per_file=10)

    assert (found.verdict, len(found.needs)) == (COMPLETE, 3)
    assert "not counted" in found.why
    assert (more.verdict, more.why) == (INCOMPLETE, "3 of 4 data files")
    assert more.needs[3] == "a b_data_000004.h5"


def test_names_by_the_rule_need_a_masters_name(made_set: Set) -> None:
    """Of another file's name no series can be told."""
    made_set.master = made_set.master.rename(made_set.directory / "x.h5")

    assert made_set.judged(images=25).verdict is SUSPECT


def test_options_are_judged_when_the_rule_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without h5py a rule must say `images`; and a set cannot have more files than are looked at."""
    eiger.check_options({"images": None, "per_file": 1000})
    eiger.check_options({"images": 10**7, "per_file": 1000})
    with pytest.raises(OptionFault, match="more than"):
        eiger.check_options({"images": 10**7 + 1, "per_file": 1000})

    eiger.check_usable({"images": None, "per_file": 1000})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    eiger.check_usable({"images": 5, "per_file": 1000})
    with pytest.raises(OptionFault) as fault:
        eiger.check_usable({"images": None, "per_file": 1000})

    assert "pip install '.[eiger]'" in fault.value.hint
    assert "images: " in fault.value.hint


def test_a_set_of_many_files_stays_within_bounds(tmp_path: Path) -> None:
    """400 data files: at most 16 descriptors, and a few small reads each."""
    many = Set(tmp_path, images=400, per_file=1)
    with Probe(many.master) as probe:
        companions = Companions({path.name: os.fspath(path) for path in many.data})
        before = len(os.listdir("/proc/self/fd"))
        found = eiger.check(probe, {}, companions)
        opened = len(os.listdir("/proc/self/fd")) - before
        reads = [companions[path.name].reads for path in many.data]
        companions.close()

    assert found.verdict is COMPLETE
    assert opened <= 16
    assert max(reads) <= 4 and probe.reads < 20
    assert len(os.listdir("/proc/self/fd")) <= before


# ------------------------------------------------------------------------- the library at arm's length


class Bytes:
    """A window on bytes in memory."""

    name = "x"
    siblings = ()

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def writers(self) -> bool | None:
        return None


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
def no_child_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.mark.usefixtures("no_child_left")
@pytest.mark.parametrize(
    ("program", "verdict", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", SUSPECT, "broke down"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", SUSPECT, "did not come to an end"),
        ("import os; os.write(1, b'A' + b'\\xff' * 4)", SUSPECT, "broke down"),
        ("import os; os.write(1, b'A\\0\\0\\0\\2no')", SUSPECT, "broke down"),
        ("import os; os.write(1, b'A\\0\\0\\0\\2[]')", SUSPECT, "cannot read it"),
        ("import os; os.write(1, b'rubbish and more of it')", SUSPECT, "broke down"),
        ("import sys; sys.exit(3)", INCOMPLETE, "h5py"),
        ("while True: pass", INCOMPLETE, "within 0.5 s"),
        ("import time; time.sleep(60)", INCOMPLETE, "within 0.5 s"),
        ("import os\nwhile True: os.write(1, b'R' + bytes(12))", INCOMPLETE, "within 0.5 s"),
    ],
)
def test_whatever_the_child_does_there_is_a_verdict(tmp_path: Path, program: str, verdict: Verdict, words: str) -> None:
    """It may crash, hang, or talk rubbish: the check ends in time, and leaves no process."""
    path = tmp_path / "child.py"
    path.write_text(program)
    began_at = time.monotonic()
    deadline_s = 0.5 if "within" in words else 20.0
    with pytest.raises(CannotTell) as told, Reader(deadline_s=deadline_s, program=str(path)) as reader:
        reader.ask(Bytes(b"x" * 1000), do="master")

    assert told.value.outcome.verdict is verdict
    assert words in told.value.outcome.why
    assert time.monotonic() - began_at < 10


@pytest.mark.usefixtures("no_child_left")
def test_what_the_window_raises_ends_the_child(made_set: Set) -> None:
    """A file that changes, or the end of the budget, is told as by any other check."""
    with Probe(made_set.master, bytes_max=200) as probe, pytest.raises(Exception, match="more than 200 bytes"):
        eiger.check(probe, {}, {})


def test_nothing_that_a_file_names_is_opened(made_set: Set) -> None:
    """External links, external storage and virtual data sets lead nowhere: a pipe at their end does not hang us."""
    trap = made_set.directory / "trap"
    os.mkfifo(trap)

    def link(file: Any) -> None:
        del file["entry/data/data"]
        file["entry/data/data"] = h5py.ExternalLink(str(trap), "/entry/data/data")

    def store(file: Any) -> None:
        del file["entry/data/data"]
        file["entry/data"].create_dataset("data", (10, 4, 6), "u2", external=[(str(trap), 0, 480)])

    def virtual(file: Any) -> None:
        del file["entry/data/data"]
        layout = h5py.VirtualLayout((10, 4, 6), "u2", maxshape=(None, 4, 6))
        layout[:] = h5py.VirtualSource(str(trap), "x", (10, 4, 6), "u2", maxshape=(None, 4, 6))
        file["entry/data"].create_virtual_dataset("data", layout)

    for change in (link, store, virtual):
        made_set.rewrite(change, made_set.data[0])
        began_at = time.monotonic()
        found = made_set.judged()
        assert found.verdict in ((SUSPECT, COMPLETE) if change is store else (SUSPECT,)), found
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize(
    ("deed", "end"),
    [
        ("os.open('/dev/null', os.O_RDONLY)", "EMFILE"),
        ("bytearray(2**30)", "MemoryError"),
        ("exec('while True: pass')", f"signal {signal.SIGKILL}"),
    ],
)
def test_the_child_has_no_rights_left(deed: str, end: str) -> None:
    """Once confined it opens no file, and ends at its limits of memory and of processor time."""
    program = (
        "import errno, os\n"
        "from trigger_daemon.checks import _hdf5_reader\n"
        "_hdf5_reader._confine(1, 2**29)\n"
        "try:\n"
        f"    {deed}\n"
        "except OSError as error:\n"
        "    print(errno.errorcode[error.errno])\n"
        "except MemoryError:\n"
        "    print('MemoryError')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )

    assert (done.stdout.strip() or f"signal {-done.returncode}") == end, done.stderr


def test_a_damaged_master_harms_nobody(made_set: Set) -> None:
    """Each of many damages gives a verdict, and the process lives."""
    data = made_set.master.read_bytes()
    for at in range(48, len(data), len(data) // 5):
        for value in (0, 0xFF):
            made_set.master.write_bytes(data[:at] + bytes([value] * 8) + data[at + 8 :])
            found = made_set.judged()
            assert "check eiger failed" not in found.why, found


def test_the_whole_budget_is_more_than_a_master_needs(made_set: Set) -> None:
    """Two reads of a usual master: the header by us, one page by the library."""
    with Probe(made_set.master) as probe:
        eiger.check(probe, {}, {})

        assert probe.reads <= 3
        assert probe.bytes_read < BYTES_MAX // 100


def test_the_modules_do_not_import_the_library() -> None:
    """h5py and numpy are never loaded into the daemon by a check."""
    program = (
        "import sys\n"
        "from trigger_daemon import registry, simulator_hdf5\n"
        "registry.find_check('eiger'), registry.find_check('hdf5')\n"
        "sys.exit(bool({'h5py', 'numpy'} & set(sys.modules)))\n"
    )

    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0
