"""The example rules: each loads, and each is replayed on a tree that its simulated instrument has written.

The trees are made at once, with the times of modification that they would have
had. Every test says which batches come out and why, and which files are left
and why: one that is not whole, one without its companion, one that is ignored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trigger_daemon import simulator, simulator_hdf5
from trigger_daemon.config import parse_rules
from trigger_daemon.core.rules import Rule
from trigger_daemon.replay import Report, replay_directory
from trigger_daemon.simulator.serialem import TILTS_S

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((REPOSITORY / "rules").glob("*.yaml"))
HOW_TO = REPOSITORY / "docs" / "how-to" / "instruments.md"
BEGINS = 1_750_000_000.0  # 2025-06-15T15:06:40Z


def rules_of(example: str) -> tuple[Rule, ...]:
    read = parse_rules([(example, (REPOSITORY / "rules" / f"{example}.yaml").read_text())])
    assert not read.faults, read.faults
    return read.rules


class Closed(NamedTuple):
    """A batch, in the words of these tests: names of files without their directories."""

    rule: str
    group: str
    reason: str
    after_s: float
    names: list[str]


def replayed(example: str, *notes: str, **roots: Path) -> tuple[list[Closed], dict[tuple[str, str | None], str]]:
    """Replay an example; `roots`: watched directory, with `_` for `/`. Return batches, and why files were left.

    It must say just these `notes`.
    """
    watched = {"/" + name.replace("_", "/"): str(path) for name, path in roots.items()}
    report = replay_directory(rules_of(example), watched)
    assert report.notes == list(notes) and not report.more
    return [closed(batch) for batch in report.batches], left(report)


def closed(batch: dict[str, Any]) -> Closed:
    group = " ".join(batch["group"].values())
    after_s = seconds(batch["time"]) - BEGINS
    return Closed(batch["rule"], group, batch["reason"], after_s, [os.path.basename(path) for path in batch["files"]])


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def left(report: Report) -> dict[tuple[str, str | None], str]:
    return {(os.path.basename(one["path"]), one["rule"]): one["because"] for one in report.left}


def names(written: Sequence[simulator.Written], *kinds: str, odd: str | None = None) -> list[str]:
    """Return the names of what was written, of these kinds, in that order; `odd`: only with these words."""
    return [
        one.path.name for one in written if one.kind in kinds and (odd is None or (odd in one.odd and bool(one.odd)))
    ]


def put(path: Path, clock: simulator.Dated, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    clock.date(path)


@pytest.fixture
def clock() -> simulator.Dated:
    return simulator.Dated(BEGINS)


# --------------------------------------------------------------------------- all


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads(example: Path) -> None:
    """An example that is copied to the rules directory is accepted as it stands."""
    assert rules_of(example.stem)


def test_every_example_is_replayed_and_explained() -> None:
    """No example without a test of its own in this file and a section in the how-to page."""
    mine, page = Path(__file__).read_text(), HOW_TO.read_text()

    assert [path.stem for path in EXAMPLES if f'replayed("{path.stem}"' not in mine] == []
    assert [path.name for path in EXAMPLES if f"rules/{path.name}" not in page] == []


def test_examples_can_be_used_together() -> None:
    """No name of a rule is used twice, so that all may lie in one rules directory."""
    texts = [(path.name, path.read_text()) for path in EXAMPLES]

    assert parse_rules(texts).faults == []


# ------------------------------------------------------------------- microscopes


def test_movies(tmp_path: Path, clock: simulator.Dated) -> None:
    """The smallest example: complete movies of a session go ten minutes after the first; half a movie stays."""
    for number in range(3):
        simulator.tiff_movie(
            tmp_path / "monday" / f"m{number}.tif", frames=40, width=8, height=8, pause=clock, frame_s=0.1,
            stop_after=17 if number == 2 else None,
        )  # fmt: skip
    put(tmp_path / "monday" / "m_test_1.tif", clock)
    batches, why = replayed("movies", data_microscope=tmp_path)

    assert [batch[:3] for batch in batches] == [("movies", "monday", "oldest_waits: 600 s")]
    assert batches[0].names == ["m0.tif", "m1.tif"]
    assert why[("m2.tif", "movies")].startswith("17 of 40 frames")
    assert why[("m_test_1.tif", "movies")].startswith("ignored by the pattern `*_test_*`")


def test_first_look(tmp_path: Path, clock: simulator.Dated) -> None:
    """Whole movies of either format are looked at two minutes after the first; half a one is not."""
    for number in range(3):
        simulator.mrc_movie(
            tmp_path / "monday" / f"s{number}.mrc", frames=3, width=8, height=8, pause=clock, frame_s=0.1,
            stop_after=1 if number == 2 else None,
        )  # fmt: skip
        simulator.tiff_movie(
            tmp_path / "monday" / f"m{number}.tif", frames=4, width=8, height=8, pause=clock, frame_s=0.1
        )
    batches, why = replayed("first-look", data_screening=tmp_path)

    assert sorted(batch[:3] for batch in batches) == [
        ("first-look-mrc", "monday", "oldest_waits: 120 s"), ("first-look-tiff", "monday", "oldest_waits: 120 s"),
    ]  # fmt: skip
    assert {batch.rule: batch.names for batch in batches} == {
        "first-look-mrc": ["s0.mrc", "s1.mrc"], "first-look-tiff": ["m0.tif", "m1.tif", "m2.tif"],
    }  # fmt: skip
    assert why[("s2.mrc", "first-look-mrc")].startswith("1 of 3 frames")


def test_rsync_archive(tmp_path: Path, clock: simulator.Dated) -> None:
    """All whole movies of a session go to the archive, the first five to the node as well."""
    for number in range(7):
        simulator.tiff_movie(
            tmp_path / "monday" / f"m{number}.tif", frames=40, width=8, height=8, pause=clock, frame_s=0.1,
            stop_after=17 if number == 6 else None,
        )  # fmt: skip
    batches, why = replayed("rsync-archive", **{"data_rsync-microscope": tmp_path})

    assert [batch[:3] for batch in batches if batch.rule == "archive-by-ssh"] == [
        ("archive-by-ssh", "monday", "oldest_waits: 600 s")
    ]
    assert [len(batch.names) for batch in batches if batch.rule == "archive-by-ssh"] == [6]
    assert why[("m6.tif", "archive-by-ssh")].startswith("17 of 40 frames")


def test_epu_falcon_eer(tmp_path: Path, clock: simulator.Dated) -> None:
    """Movies and XML of two trees travel together, per grid square, whatever their order; odd ones stay.

    60 exposures a square: the first 50 complete ones fill a batch, the rest
    goes ten minutes later. One XML comes two minutes late: its movie is in a
    batch all the same. One never comes; one movie stops half-way.
    """
    odd = simulator.Odd(late_xml=(5,), without_xml=(3,), stalled=(67,))
    written = simulator.epu_session(
        tmp_path / "epu", tmp_path / "falcon", exposures=60, frames=6, side=16, pause=clock, odd=odd
    )
    batches, why = replayed("epu-falcon", data_falcon=tmp_path / "falcon", mnt_epu=tmp_path / "epu")
    movies = [batch for batch in batches if batch.rule == "falcon-eer"]
    sent = Counter(name for batch in movies for name in batch.names)
    alone, half = names(written, "movie", odd="companion never")[0], names(written, "movie", odd="stopped")[0]

    assert [(batch.group.split()[1], batch.reason, len(batch.names)) for batch in movies] == [
        ("GridSquare_5101101", "files: 50 of 50", 100),
        ("GridSquare_5101102", "files: 50 of 50", 100),
        ("GridSquare_5101101", "oldest_waits: 600 s", 2 * 9),
        ("GridSquare_5101102", "oldest_waits: 600 s", 2 * 9),
    ]
    assert set(sent) == {one.path.name for one in written if one.kind == "movie" and one.arrives} | {
        name.replace("_EER.eer", ".xml") for name in names(written, "movie") if name not in (alone, half)
    }
    assert set(sent.values()) == {1}
    assert names(written, "companion", odd="much later")[0] in movies[0].names
    assert why[(alone, "falcon-eer")].endswith("not there yet; waited 600 s for it")
    assert why[(half, "falcon-eer")].startswith("3 of 6 frames")


def test_epu_records_are_sent_when_they_rest(tmp_path: Path, clock: simulator.Dated) -> None:
    """EPU's own records go in their last version, after a quarter of an hour of rest; images beside them do not."""
    written = simulator.epu_session(
        tmp_path / "epu", tmp_path / "falcon", exposures=3, frames=4, form="mrc", pause=clock
    )
    batches, why = replayed("epu-falcon", data_falcon=tmp_path / "falcon", mnt_epu=tmp_path / "epu")
    records = [batch for batch in batches if batch.rule == "epu-records"]
    jpg = next(one.path.name for one in written if one.path.suffix == ".jpg")

    assert [(batch.reason, sorted(batch.names)) for batch in records] == [
        ("idle: nothing new for 900 s", ["EpuSession.dm", "GridSquare_5101101.dm", "GridSquare_5101102.dm"])
    ]
    assert why[(jpg, "epu-records")].startswith("it lies 3 directories below the root, the pattern wants 1")


def test_epu_falcon_mrc(tmp_path: Path, clock: simulator.Dated) -> None:
    """MRC movies with as many fractions as their siblings; one with half of them is no whole file and stays."""
    written = simulator.epu_session(
        tmp_path / "epu", tmp_path / "falcon", squares=1, exposures=8, frames=4, form="mrc", pause=clock,
        odd=simulator.Odd(stalled=(6,)),
    )  # fmt: skip
    batches, why = replayed("epu-falcon", data_falcon=tmp_path / "falcon", mnt_epu=tmp_path / "epu")
    movies = [batch for batch in batches if batch.rule == "falcon-mrc"]
    half = names(written, "movie", odd="stopped")[0]

    assert [(batch.reason, len(batch.names)) for batch in movies] == [("oldest_waits: 600 s", 14)]
    assert why[(half, "falcon-mrc")].startswith("2 of 4 frames")


@pytest.mark.parametrize("mdoc", ["late", "early"])
def test_serialem_k3(tmp_path: Path, clock: simulator.Dated, mdoc: Any) -> None:
    """Movies go with mdoc and gain reference, as soon as they hold the frames that the mdoc says; the others stay.

    The order of movie and mdoc plays no part. Half a movie is found out though
    its mdoc is there and it is a valid TIFF.
    """
    written = simulator.k3_movies(
        tmp_path / "s1", movies=54, pause=clock, scale=0.0002, mdoc=mdoc, stalled=(7,), without_mdoc=(9,)
    )
    put(tmp_path / "s1" / "set_test_1.tif", clock)
    batches, why = replayed("serialem-k3", data_k3=tmp_path)
    half, alone = names(written, "movie", odd="stopped")[0], names(written, "movie", odd="mdoc never")[0]
    whole = [one.path.name for one in written if one.kind == "movie" and one.arrives]

    assert [(batch.reason, len(batch.names)) for batch in batches] == [
        ("files: 50 of 50", 101), ("oldest_waits: 600 s", 5),
    ]  # fmt: skip
    assert Counter(name for batch in batches for name in batch.names) == {
        **dict.fromkeys(whole, 1), **{f"{name}.mdoc": 1 for name in whole}, "SuperRef.dm4": 2,
    }  # fmt: skip
    assert why[(half, "k3-movies")].startswith("35 of 40 frames")
    assert why[(alone, "k3-movies")] == f"companion s1/{alone}.mdoc: not there yet; waited 600 s for it"
    assert why[("set_test_1.tif", "k3-movies")].startswith("ignored by the pattern `*_test_*`")


def test_serialem_k3_without_gain_reference(tmp_path: Path, clock: simulator.Dated) -> None:
    """Movies wait half an hour for a gain reference that does not come, then go without it."""
    written = simulator.k3_movies(tmp_path / "s1", movies=3, pause=clock, scale=0.0002)
    (tmp_path / "s1" / "SuperRef.dm4").unlink()
    batches, _ = replayed(
        "serialem-k3",
        "rule k3-movies: no file came with a companion `{session}/SuperRef.dm4` (in /data/k3)",
        data_k3=tmp_path,
    )

    assert [sorted(batch.names) for batch in batches] == [sorted(names(written, "movie", "mdoc"))]
    assert batches[0].after_s > 1800


def test_tilt_series_of_tomography_5(tmp_path: Path, clock: simulator.Dated) -> None:
    """A series closes when its mdoc comes, in one batch with it; one that was given up, by half an hour of silence.

    Names hold positions of two numbers, brackets and negative decimals.
    """
    whole = simulator.tomo5_series(tmp_path / "v1", tilts=41, pause=clock)
    given_up = simulator.tomo5_series(
        tmp_path / "v1", position="1_2", tilts=41, stop_after=11, brackets=True, pause=clock
    )
    simulator.eer_movie(
        tmp_path / "v1" / "Position_2_001_-1.5_20250611_120000_EER.eer", frames=8, side=16, pause=clock, stop_after=3
    )
    put(tmp_path / "v1" / "SearchMaps" / "Search.xml", clock)
    batches, why = replayed("tilt-series", data_tomo=tmp_path)

    assert [batch[:3] for batch in batches] == [
        ("tomo5-series", "v1 1", "close_on: v1/Position_1.mdoc"),
        ("tomo5-series", "v1 1_2", "idle: nothing new for 1800 s"),
    ]
    assert batches[0].names == names(whole, "movie", "mdoc")
    assert batches[1].names == names(given_up, "movie")
    assert "Position_1_2_011_[-15.0]_20250611_102250_EER.eer" in batches[1].names
    assert why[("Position_2_001_-1.5_20250611_120000_EER.eer", "tomo5-series")].startswith("3 of 8 frames")
    assert why[("Search.xml", None)] == "no rule matches it"


def test_tilt_series_of_serialem(tmp_path: Path, clock: simulator.Dated) -> None:
    """The mdoc closes the series once it has its 41 sections; the stack and it follow when both rest.

    Of a series that was given up after 20 tilts the mdoc closes nothing:
    silence does, and stack and mdoc go as they are.
    """
    whole = simulator.serialem_tilt_series(tmp_path / "v2", tilts=41, pause=clock)
    given_up = simulator.serialem_tilt_series(tmp_path / "v2", series="TS_02", tilts=41, stop_after=20, pause=clock)
    simulator.tiff_movie(
        tmp_path / "v2" / "frames" / "TS_02_020_30.0.tif", frames=8, width=16, height=16, pause=clock, stop_after=5
    )
    batches, why = replayed("tilt-series", data_tomo=tmp_path)
    by_rule = {(batch.rule, batch.names[0][:5]): batch for batch in batches}

    assert len(batches) == 4
    assert by_rule["serialem-series", "TS_01"][1:3] == ("v2 TS_01", "close_on: v2/TS_01.mrc.mdoc")
    assert by_rule["serialem-series", "TS_01"].names == names(whole, "movie")
    assert by_rule["serialem-series", "TS_02"].reason == "idle: nothing new for 1800 s"
    assert by_rule["serialem-series", "TS_02"].names == names(given_up, "movie")
    assert by_rule["serialem-stacks", "TS_01"].names == ["TS_01.mrc", "TS_01.mrc.mdoc"]
    assert by_rule["serialem-stacks", "TS_02"].names == ["TS_02.mrc", "TS_02.mrc.mdoc"]
    for one in (whole[-2], given_up[-2]):
        rested_s = by_rule["serialem-stacks", one.path.stem].after_s - (one.path.stat().st_mtime - BEGINS)
        assert rested_s > max(TILTS_S), "a stack that grows is not sent between two tilts"
    assert why[("TS_02_020_30.0.tif", "serialem-series")].startswith("5 of 8 frames")


def test_light_sheet_tif(tmp_path: Path, clock: simulator.Dated) -> None:
    """Twenty stacks fill a batch, with the description of each time point they are of, in both batches if need be."""
    written = simulator.light_sheet(tmp_path / "fish", points=13, side=16, pause=clock, without_json=(4,), cut=(7,))
    put(tmp_path / "fish" / "preview.tif.tmp", clock)
    batches, why = replayed("light-sheet", data_lightsheet=tmp_path)
    half = names(written, "movie", odd="cut")[0]

    assert [(batch.rule, batch.reason, len(batch.names)) for batch in batches] == [
        ("light-sheet-tif", "files: 20 of 20", 20 + 11), ("light-sheet-tif", "oldest_waits: 900 s", 3 + 2),
    ]  # fmt: skip
    assert "t00012.json" in batches[0].names and "t00012.json" in batches[1].names
    assert why[(half, "light-sheet-tif")].startswith("10 of 20 frames")
    assert {why[(f"t00004_c{channel}.tif", "light-sheet-tif")] for channel in (0, 1)} == {
        "companion fish/t00004.json: not there yet; waited 900 s for it"
    }
    assert why[("preview.tif.tmp", "light-sheet-tif")].startswith("ignored by the pattern `*.tmp`")


def test_light_sheet_raw(tmp_path: Path, clock: simulator.Dated) -> None:
    """A raw stack that is shorter than its siblings is for a person to judge; the others go."""
    written = simulator.light_sheet(tmp_path / "fly", points=8, side=16, form="raw", pause=clock, cut=(6,))
    batches, why = replayed("light-sheet", data_lightsheet=tmp_path)
    half = names(written, "movie", odd="cut")[0]

    assert [(batch.rule, batch.reason, len(batch.names)) for batch in batches] == [
        ("light-sheet-raw", "oldest_waits: 900 s", 15 + 8)
    ]
    assert why[(half, "light-sheet-raw")].startswith("suspect: 5,120 bytes where its siblings have 10.2 kB")


# --------------------------------------------------------------------- beamlines


def test_pilatus_ssx(tmp_path: Path, clock: simulator.Dated) -> None:
    """QC on the first thousand complete images, though frames are missing; batches of 512, a partial last one.

    One image is cut. A mini chip of 400, written under its own names in
    chunks, has all its images in QC. The first chip's name is used again three
    hours later: QC comes again.
    """
    chips = tmp_path / "2025-06" / "lysozyme"
    missing = set(range(77, 1700, 100)) | {512}
    first = simulator.chip(chips / "a", images=1700, pause=clock, period_s=0.02, side=6, missing=missing)
    mini = simulator.chip(chips / "b", images=400, pause=clock, period_s=0.02, side=6, direct=True)
    cut = simulator.cbf_image(
        chips / "b" / "chipb_1_00401.cbf", width=300, height=300, pause=clock, direct=True, stop_after=1
    )
    put(chips / "b" / "chipb_1_00402.cbf.tmp", clock)
    clock(3 * 3600)
    for number in range(5001, 5011):
        simulator.cbf_image(chips / "a" / f"chipa_1_{number:05d}.cbf", width=6, height=6, pause=clock)
    batches, why = replayed("pilatus-ssx", data_ssx=tmp_path)
    qc = [batch for batch in batches if batch.rule == "chip-qc"]
    images = [batch for batch in batches if batch.rule == "chip-images"]

    assert [(batch.group.split()[2], batch.reason, len(batch.names)) for batch in qc] == [
        ("a", "only_first: 1000 files complete", 1000), ("b", "idle: nothing new for 120 s", 400),
        ("a", "idle: nothing new for 120 s", 10),
    ]  # fmt: skip
    assert qc[0].names == names(first, "image")[:1000]
    assert [(batch.group.split()[2], batch.reason, len(batch.names)) for batch in images] == [
        ("a", "files: 512 of 512", 512), ("a", "files: 512 of 512", 512), ("a", "files: 512 of 512", 512),
        ("a", "idle: nothing new for 60 s", 1700 - 18 - 3 * 512), ("b", "idle: nothing new for 60 s", 400),
        ("a", "idle: nothing new for 60 s", 10),
    ]  # fmt: skip
    assert [name for batch in images for name in batch.names] == [
        *names(first, "image"), *names(mini, "image"), *(f"chipa_1_{number:05d}.cbf" for number in range(5001, 5011)),
    ]  # fmt: skip
    assert [batch.names for batch in batches if batch.rule == "chip-records"] == [["beamline_run1.json"]] * 2
    assert why[("chipa_1_01700.cbf", "chip-qc")] == "only_first: the batch of its group was full"
    assert why[(cut.path.name, "chip-images")].startswith("the image ends early, 65.5 kB of 95.0 kB")
    assert why[("chipb_1_00402.cbf.tmp", "chip-qc")].startswith("ignored by the pattern `*.tmp`")


def test_globus_cryo_em(tmp_path: Path, clock: simulator.Dated) -> None:
    """Movies go in two ways: with their XML to the archive, by visit; fifty of a square at a time to the analysis."""
    for number in range(60):
        movie = tmp_path / "bi1" / "s1" / f"m{number:02}.tiff"
        simulator.tiff_movie(movie, frames=40, width=4, height=4, pause=clock, frame_s=0.1)
        simulator.companion_xml(movie.with_suffix(".xml"), movie=movie.name, pause=clock)
    batches, _ = replayed("globus-cryo-em", data_krios=tmp_path)

    (raw,) = (batch for batch in batches if batch.rule == "em-raw")
    assert (raw.group, raw.reason, len(raw.names)) == ("bi1", "oldest_waits: 600 s", 120)
    assert [(batch.group, batch.reason, len(batch.names)) for batch in batches if batch.rule == "em-analysis"] == [
        ("bi1 s1", "files: 50 of 50", 50), ("bi1 s1", "idle: nothing new for 600 s", 10),
    ]  # fmt: skip


def test_globus_thumbnails(tmp_path: Path, clock: simulator.Dated) -> None:
    """A grid's images go together once nothing new has come for a while; those of another grid apart."""
    for grid, number in (("g1", 0), ("g1", 1), ("g2", 0)):
        image = tmp_path / grid / f"m{number}.tif"
        image.parent.mkdir(exist_ok=True)
        simulator.tiff_movie(image, frames=1, width=4, height=4, pause=clock, frame_s=0.1)
    batches, _ = replayed("globus-thumbnails", data_krios=tmp_path)

    assert [(batch.group, batch.reason, batch.names) for batch in batches] == [
        ("g1", "idle: nothing new for 120 s", ["m0.tif", "m1.tif"]), ("g2", "idle: nothing new for 120 s", ["m0.tif"]),
    ]  # fmt: skip


def test_globus_ssx(tmp_path: Path, clock: simulator.Dated) -> None:
    """A chip's first thousand images are judged; all are archived a thousand at a time, and analysed a hundred."""
    for number in range(1, 1_251):
        simulator.cbf_image(tmp_path / "mx1" / "c1" / f"c_{number:05}.cbf", width=4, height=4, pause=clock)
        clock(0.02)
    batches, _ = replayed("globus-ssx", data_i24=tmp_path)

    sizes = {rule: [len(b.names) for b in batches if b.rule == rule] for rule in ("ssx-qc", "ssx-raw", "ssx-analysis")}
    assert sizes == {"ssx-qc": [1_000], "ssx-raw": [1_000, 250], "ssx-analysis": [100] * 12 + [50]}


def test_eiger(tmp_path: Path, clock: simulator.Dated) -> None:
    """A set goes as one batch when its last data file is there; one that lacks a file, or images, stays.

    The master is there from the beginning, the last, short data file comes at
    disarm.
    """
    here = tmp_path / "p1" / "crystal"
    sizes: dict[str, Any] = {"per_file": 10, "width": 8, "height": 6, "image_s": 0.1, "pause": lambda s: None}
    for series, images in (("whole", 25), ("lacking", 25)):
        for number, one in enumerate(simulator_hdf5.eiger_set(here, series=series, images=images, **sizes)):
            clock(0.1 * min(10, images - (number - 1) * 10) if number else 0.0)
            clock.date(one.path)
    (here / "lacking_data_000002.h5").unlink()
    put(here / "preview.h5", clock)
    batches, why = replayed("eiger", data_eiger=tmp_path)

    assert [(batch.rule, batch.names) for batch in batches] == [
        ("eiger", ["whole_master.h5", *(f"whole_data_00000{number}.h5" for number in (1, 2, 3))])
    ]
    assert 2.5 + 10 <= batches[0].after_s < 2.5 + 30
    assert "lacking_data_000002.h5" in why[("lacking_master.h5", "eiger")]
    assert why[("preview.h5", "eiger")].startswith("its end does not fit that of")


# ----------------------------------------------------------------- sequencer, MRI


def test_sequencer(tmp_path: Path, clock: simulator.Dated) -> None:
    """A run is one batch once RTAComplete.txt is there, metrics in their last version; an unfinished one waits."""
    written = simulator.sequencer_run(tmp_path / "run1", cycles=5, pause=clock)
    put(tmp_path / "run1" / "Logs" / "rta.log", clock)
    simulator.sequencer_run(tmp_path / "run2", cycles=3, pause=clock, finished=False)
    batches, why = replayed("sequencer", data_sequencer=tmp_path)

    assert [batch[:3] for batch in batches] == [("sequencer-run", "run1", "close_on: run1/RTAComplete.txt")]
    assert Counter(batches[0].names) == Counter(one.path.name for one in written)
    assert why[("ExtractionMetricsOut.bin", "sequencer-run")] == (
        "in an open batch of 15 files; closed once run2/RTAComplete.txt is complete"
    )
    assert why[("rta.log", "sequencer-run")].startswith("ignored by the pattern `*.log`")


def test_fmri(tmp_path: Path, clock: simulator.Dated) -> None:
    """A series closes by its done file, or after two minutes of silence; a broken-off export is left."""
    first = simulator.mri_series(tmp_path / "sub-01" / "1", volumes=30, pause=clock)
    second = simulator.mri_series(
        tmp_path / "sub-01" / "2", volumes=30, series=2, pause=clock, done=False, left_over=True
    )
    put(tmp_path / "sub-01" / "2" / "IM-0002-0031.dcm", clock, bytes(100))
    batches, why = replayed("fmri", data_mri=tmp_path)

    assert [batch[:4] for batch in batches] == [
        ("fmri-series", "sub-01 1", "close_on: sub-01/1/series.done", pytest.approx(60 + 5, abs=1)),
        ("fmri-series", "sub-01 2", "idle: nothing new for 120 s", pytest.approx(118 + 5 + 120, abs=6)),
    ]
    assert [batch.names for batch in batches] == [names(first, "image"), names(second, "image")[:29]]
    assert why[("IM-0002-0030.dcm.part", "fmri-series")].startswith("ignored by the pattern `*.part`")
    assert why[("IM-0002-0031.dcm", "fmri-series")].startswith("100 of 132 bytes")
