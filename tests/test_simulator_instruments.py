"""The simulated instruments write as real ones do: orders, names, sizes, seconds; no half file passes its check."""

from __future__ import annotations

import itertools
import os
import random
import re
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import pytest
import tifffile

from trigger_daemon import registry, simulator
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Judged, Probe, run_checks
from trigger_daemon.simulator import beamline, movies, serialem


def judged(path: Path, check: str, companions: dict[str, Path] | None = None, **options: Any) -> Judged:
    with Probe(path) as probe:
        state = probe.state()
    others = {name: str(other) for name, other in (companions or {}).items()}
    return run_checks(path, state, ((check, options),), others, registry.find_check)


class Looks:
    """A pause that takes no time and judges a file at each of its write boundaries."""

    def __init__(self, path: Path, check: str, **options: Any) -> None:
        self.path, self.check, self.options = path, check, options
        self.seen: list[tuple[Verdict, str, bytes]] = []
        self.paused = 0.0

    def __call__(self, seconds: float) -> None:
        self.paused += seconds
        if self.path.exists():
            said = judged(self.path, self.check, **self.options)
            self.seen.append((said.verdict, said.why, self.path.read_bytes()))

    def premature(self) -> list[str]:
        whole = self.path.read_bytes()
        return [why for verdict, why, data in self.seen if verdict is Verdict.COMPLETE and data != whole]


@pytest.fixture
def clock() -> simulator.Dated:
    return simulator.Dated(1_750_000_000.0)


def times(written: list[simulator.Written]) -> list[float]:
    return [one.path.stat().st_mtime - 1_750_000_000.0 for one in written]


# ------------------------------------------------------------------------- files


def test_a_dated_pause_gives_files_the_times_they_would_have_had(tmp_path: Path, clock: simulator.Dated) -> None:
    """The last write of a file dates it, not what is waited for afterwards; a rename keeps its time."""
    first = simulator.tiff_movie(tmp_path / "a.tif", frames=4, width=8, height=8, pause=clock, frame_s=1.0)
    clock(10.0)
    second = simulator.cbf_image(tmp_path / "b.cbf", width=8, height=8, pause=clock)

    assert times([first, second]) == pytest.approx([4.0, 14.0])


# ------------------------------------------------------------------------ movies


def test_lzw_movies_are_read_back_by_others(tmp_path: Path, clock: simulator.Dated) -> None:
    """Directories, strips and codes are those of the format: decoded, the frames are the sparse ones composed."""
    path = simulator.lzw_movie(tmp_path / "m.tif", frames=3, strips=5, pause=clock).path
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        pages = [(page.shape, page.dataoffsets, page.databytecounts) for page in file.pages]  # type: ignore[union-attr]
    strips = [whole[at : at + size] for _, ats, sizes in pages for at, size in zip(ats, sizes, strict=True)]
    pixels = [unlzw(strip) for strip in strips]

    assert [shape for shape, *_ in pages] == [(40, 256)] * 3
    assert {len(data) for data in pixels} == {256 * 8}
    assert {value for data in pixels for value in data} == {0, 1, 2}


@pytest.mark.parametrize("data", [b"", b"a", bytes(40_000), bytes(range(256)) * 40, os.urandom(20_000)], ids=len)
def test_lzw_gives_back_what_it_took(data: bytes) -> None:
    """At every width of a code, and over a full table."""
    assert unlzw(movies.lzw(data)) == data


def unlzw(data: bytes) -> bytes:
    """Decode as the TIFF 6.0 specification says: clear is 256, end 257, widths change one code early."""
    bits, at, width = "".join(f"{byte:08b}" for byte in data), 0, 9
    table: list[bytes] = []
    out, before = bytearray(), b""
    while True:
        code = int(bits[at : at + width], 2)
        at += width
        if code == 257:
            return bytes(out)
        if code == 256:
            table, width, before = [bytes((value,)) for value in range(256)] + [b"", b""], 9, b""
            continue
        entry = table[code] if code < len(table) else before + before[:1]
        out += entry
        if before:
            table.append(before + entry[:1])
        before = entry
        width = max(9, min(12, (len(table) + 1).bit_length()))


def test_no_lzw_movie_is_complete_before_its_last_byte(tmp_path: Path) -> None:
    """With the expected number of frames; each directory leads to arrays of strips."""
    looks = Looks(tmp_path / "m.tif", "tiff", frames=6)
    simulator.lzw_movie(looks.path, frames=6, strips=4, pause=looks)

    assert looks.premature() == []
    assert {verdict for verdict, *_ in looks.seen[:-1]} == {Verdict.INCOMPLETE}
    assert looks.seen[-1][0] is Verdict.COMPLETE


@pytest.mark.parametrize("final_sum", [False, True])
def test_no_eer_movie_is_complete_before_its_last_frame(tmp_path: Path, final_sum: bool) -> None:
    """It announces its frames itself; a final sum comes after them, and is no frame."""
    looks = Looks(tmp_path / "m.eer", "eer")
    written = simulator.eer_movie(looks.path, frames=9, side=32, pause=looks, final_sum=final_sum)
    with tifffile.TiffFile(looks.path) as file:
        directories, xml = len(file.pages), file.pages[0].tags[65001].value  # type: ignore[union-attr]
    early = [why for verdict, why, data in looks.seen if verdict is Verdict.COMPLETE and len(data) < written.size]

    assert directories == 9 + final_sum
    assert b'<item name="numberOfFrames">9</item>' in xml
    assert looks.seen[-1][:1] == (Verdict.COMPLETE,)
    if final_sum:  # all frames are there before their sum: that no check can await
        assert {why.split(",")[0] for why in early} <= {"9 of 9 frames"}
    else:
        assert early == []


def test_a_stopped_eer_movie_stays_incomplete(tmp_path: Path) -> None:
    """At each look, and at the end with the number that was announced."""
    looks = Looks(tmp_path / "m.eer", "eer")
    simulator.eer_movie(looks.path, frames=9, side=32, pause=looks, stop_after=4)

    assert {verdict for verdict, *_ in looks.seen} == {Verdict.INCOMPLETE}
    assert looks.seen[-1][1].startswith("4 of 9 frames")


# -------------------------------------------------------------------- K3, SerialEM


@pytest.mark.parametrize("condition", simulator.CONDITIONS)
def test_k3_movies_have_the_sizes_and_the_pace_of_real_ones(
    tmp_path: Path, clock: simulator.Dated, condition: str
) -> None:
    """Bytes as measured, scaled; one cadence from movie to movie; TIFF sizes differ by well below a hundredth."""
    k3, scale, count = simulator.CONDITIONS[condition], 0.002, 6
    written = simulator.k3_movies(
        tmp_path, movies=count, pause=clock, condition=condition, scale=scale, mdoc="none"
    )
    sizes = [one.size for one in written if one.kind == "movie"]
    ends = times([one for one in written if one.kind == "movie"])

    assert statistics.mean(sizes) == pytest.approx(k3.movie_bytes * scale, rel=0.05)
    assert (max(sizes) - min(sizes)) / statistics.mean(sizes) < (0.01 if k3.form == "tif" else 1e-9)
    assert [b - a for a, b in itertools.pairwise(ends)] == pytest.approx([k3.cadence_s] * 5, abs=2.0)
    assert ends[0] == pytest.approx(k3.window_s, abs=2.0)


def test_some_k3_movies_pause_inside_as_often_as_real_ones() -> None:
    """Of 2,310, about 375 for more than half a second, 50 for more than a second, 3 for two; none beyond 2.5 s."""
    luck, k3 = random.Random(1), simulator.CONDITIONS["tif-super-resolution"]
    usual = k3.window_s / k3.frames
    share = 1 - 1 / k3.frames  # a pause makes the other frames come a little faster, so that the window is kept
    longest = [(max(serialem._seconds_of_frames(k3, luck)) - usual) / share for _ in range(23_100)]

    assert sum(pause > 0.5 for pause in longest) / 10 == pytest.approx(375, rel=0.1)
    assert sum(pause > 1.0 for pause in longest) / 10 == pytest.approx(50, rel=0.2)
    assert 2.0 < max(longest) < 2.5


def test_a_late_mdoc_comes_after_its_movie_and_an_early_one_before_its_end(
    tmp_path: Path, clock: simulator.Dated
) -> None:
    """One cadence after the movie began, or while it is still written: then it is no sign that the movie is whole."""
    late = simulator.k3_movies(tmp_path / "late", movies=3, pause=clock, scale=0.0002)
    early = simulator.k3_movies(tmp_path / "early", movies=3, pause=clock, scale=0.0002, mdoc="early")
    for written, before in ((late, False), (early, True)):
        at = {one.path.name: time for one, time in zip(written, times(written), strict=True)}
        movies_ = [one.path.name for one in written if one.kind == "movie"]
        assert len(movies_) == 3
        assert all((at[f"{name}.mdoc"] < at[name]) is before for name in movies_)

    path = next(one.path for one in late if one.kind == "movie")
    mdoc = path.with_name(path.name + ".mdoc")
    assert re.fullmatch(r"set_000_13\.05\.16\.tif", path.name)
    assert mdoc.read_bytes().endswith(b"\r\n") and rb"X:\DoseFractions" in mdoc.read_bytes()
    assert judged(path, "tiff", {mdoc.name: mdoc}, frames="mdoc").why.startswith("40 of 40 frames")
    assert judged(mdoc, "mdoc").verdict is Verdict.UNKNOWN


def test_a_serialem_series_grows_with_each_tilt(tmp_path: Path) -> None:
    """Stack and mdoc are valid after each tilt; only the number of tilts tells that the series is over."""
    stack, mdoc = tmp_path / "TS_01.mrc", tmp_path / "TS_01.mrc.mdoc"
    sections: list[tuple[int, Verdict, Verdict]] = []

    def pause(seconds: float) -> None:
        if seconds > 40:  # from one tilt to the next
            count = mdoc.read_text().count("[ZValue")
            sections.append((count, judged(stack, "mrc").verdict, judged(mdoc, "mdoc", sections=5).verdict))

    written = simulator.serialem_tilt_series(tmp_path, tilts=5, pause=pause)
    with mrcfile.open(stack) as file:
        shape = file.data.shape  # type: ignore[union-attr]

    assert [count for count, *_ in sections] == [1, 2, 3, 4, 5]
    assert {verdict for _, verdict, _ in sections} == {Verdict.COMPLETE}
    assert [verdict for *_, verdict in sections] == [Verdict.INCOMPLETE] * 4 + [Verdict.COMPLETE]
    assert shape[0] == 5
    assert [one.path.name for one in written[:5]] == [
        "TS_01_000_0.0.tif", "TS_01_001_3.0.tif", "TS_01_002_-3.0.tif", "TS_01_003_-6.0.tif", "TS_01_004_6.0.tif",
    ]  # fmt: skip


def test_a_tomography_5_series_ends_with_its_mdoc(tmp_path: Path, clock: simulator.Dated) -> None:
    """The mdoc is written last, with a section a tilt; a series that is given up has none."""
    written = simulator.tomo5_series(tmp_path, tilts=4, pause=clock)
    given_up = simulator.tomo5_series(tmp_path, position="2", tilts=4, pause=clock, stop_after=2, brackets=True)

    assert written[-1].path.name == "Position_1.mdoc" and times(written) == sorted(times(written))
    assert judged(written[-1].path, "mdoc", sections=4).verdict is Verdict.COMPLETE
    assert [one.path.name.split("_2025")[0] for one in given_up] == ["Position_2_001_[0.0]", "Position_2_002_[3.0]"]
    assert all(judged(one.path, "eer").verdict is Verdict.COMPLETE for one in [*written[:-1], *given_up])


# --------------------------------------------------------------------------- EPU


def test_small_files_of_epu_come_in_any_order(tmp_path: Path, clock: simulator.Dated) -> None:
    """XML before its movie, after it, minutes later, or never; movies lie in another tree of the same directories."""
    odd = simulator.Odd(late_xml=(4,), without_xml=(6,))
    written = simulator.epu_session(tmp_path / "epu", tmp_path / "eer", exposures=12, frames=4, side=8, pause=clock,
                                    odd=odd)  # fmt: skip
    at = {one.path: time for one, time in zip(written, times(written), strict=True)}
    lag: dict[int, float | None] = {}
    for number, movie in enumerate(one.path for one in written if one.kind == "movie"):
        beside = tmp_path / "epu" / movie.relative_to(tmp_path / "eer")
        xml = beside.with_name(movie.name.replace("_EER.eer", ".xml"))
        lag[number] = at[xml] - at[movie] if xml in at else None

    assert len(lag) == 24
    assert [number for number, value in lag.items() if value is None] == [6]
    assert [number for number, value in lag.items() if value is not None and value > 60] == [4]
    assert any(value is not None and value < 0 for value in lag.values())
    assert any(value is not None and 0 < value < 60 for value in lag.values())


def test_epu_rewrites_its_records(tmp_path: Path, clock: simulator.Dated) -> None:
    """A grid square's record is there before its first exposure, and changes when the square is visited."""
    seen: dict[str, set[bytes]] = {}

    def pause(seconds: float) -> None:
        for path in (tmp_path / "epu").rglob("*.dm"):
            seen.setdefault(path.name, set()).add(path.read_bytes())

    written = simulator.epu_session(tmp_path / "epu", tmp_path / "eer", exposures=2, frames=2, side=8, pause=pause)
    records = [one for one in written if one.kind == "metadata"]
    whole = {name: {data for data in texts if data.endswith(b">") and data.count(b"EpuSessionXml") == 2}
             for name, texts in seen.items()}  # fmt: skip

    assert {name: len(texts) for name, texts in whole.items()} == {
        "EpuSession.dm": 3, "GridSquare_5101101.dm": 2, "GridSquare_5101102.dm": 2,
    }  # fmt: skip
    assert sorted(one.path.name for one in records) == sorted(whole)
    assert all(judged(one.path, "xml").verdict is Verdict.COMPLETE for one in records)


# --------------------------------------------------------------------- beamline


def test_a_direct_image_grows_in_chunks_and_is_incomplete_until_the_last(tmp_path: Path) -> None:
    """Under its own name, 64 KiB at a time."""
    looks = Looks(tmp_path / "i.cbf", "cbf", md5=True)
    simulator.cbf_image(looks.path, width=500, height=400, pause=looks, direct=True)
    grown = [len(data) for *_, data in looks.seen]

    assert grown[:-1] == [beamline.CHUNK_BYTES * number for number in range(1, len(grown))] and len(grown) == 4
    assert [verdict for verdict, *_ in looks.seen] == [Verdict.INCOMPLETE] * 3 + [Verdict.COMPLETE]


def test_a_chip_may_lack_frames(tmp_path: Path, clock: simulator.Dated) -> None:
    """Their time passes, and the file with the number of frames knows nothing of it."""
    written = simulator.chip(tmp_path / "a", images=10, pause=clock, period_s=1.0, side=4, missing={3, 4})
    numbers = [int(one.path.stem.rsplit("_", 1)[1]) for one in written if one.kind == "image"]

    assert numbers == [1, 2, 5, 6, 7, 8, 9, 10]
    assert times(written) == [0.0, 1.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert '"images": 10' in written[-1].path.read_text()


# -------------------------------------------------------------------------- others


def test_the_description_of_a_time_point_comes_after_its_stacks(tmp_path: Path, clock: simulator.Dated) -> None:
    """And no later than the next time point; raw stacks are all of one size."""
    written = simulator.light_sheet(tmp_path / "a", points=3, pause=clock, side=8)
    raw = simulator.light_sheet(tmp_path / "b", points=3, pause=clock, side=8, form="raw")

    assert [one.path.name for one in written] == [
        f"t{point:05d}{end}" for point in (1, 2, 3) for end in ("_c0.tif", "_c1.tif", ".json")
    ]
    assert times([*written, *raw]) == sorted(times([*written, *raw]))
    assert {one.size for one in raw if one.kind == "movie"} == {20 * 8 * 8 * 2}


def test_a_sequencer_writes_its_marker_last(tmp_path: Path, clock: simulator.Dated) -> None:
    """Run information first; metrics grow until the last cycle."""
    written = simulator.sequencer_run(tmp_path / "r", cycles=4, pause=clock)
    at = {one.path.name: time for one, time in zip(written, times(written), strict=True)}

    assert [one.path.name for one in written[:2]] == ["RunInfo.xml", "RunParameters.xml"]
    assert max(at, key=lambda name: at[name]) == "RTAComplete.txt"
    assert at["ExtractionMetricsOut.bin"] == pytest.approx(3 * 300, abs=1)
    assert len(written) == 2 + 4 * 2 * 2 + 2


def test_dicom_files_appear_whole_under_their_names(tmp_path: Path) -> None:
    """By rename; each element follows the one before it to the end of the file, pixels last."""
    sizes: dict[str, set[int]] = {}

    def pause(seconds: float) -> None:
        for path in tmp_path.rglob("*.dcm"):
            sizes.setdefault(path.name, set()).add(path.stat().st_size)

    written = simulator.mri_series(tmp_path / "s", volumes=3, side=4, pause=pause)
    data = written[0].path.read_bytes()
    found = list(elements(data))
    (meta_bytes,) = struct.unpack("<I", found[0][1])
    after_meta = data.index(found[0][1]) + 4 + meta_bytes

    assert {len(each) for each in sizes.values()} == {1}
    assert sorted(sizes) == [f"IM-0001-000{number}.dcm" for number in (1, 2, 3)]
    assert data[:132] == bytes(128) + b"DICM"
    assert [tag for tag, _ in found] == sorted(tag for tag, _ in found)
    assert data[after_meta : after_meta + 4] == struct.pack("<HH", 8, 0x16), "the length of the meta information"
    assert found[-1][0] == (0x7FE0, 0x10) and len(found[-1][1]) == 4 * 4 * 2


def elements(data: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Yield tag and value of each DICOM element, explicit little endian."""
    at = 132
    while at < len(data):
        group, tag, kind, short = struct.unpack_from("<HH2sH", data, at)
        at, size = at + 8, short
        if kind in (b"OB", b"OW"):
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
        yield (group, tag), data[at : at + size]
        at += size
    assert at == len(data)
