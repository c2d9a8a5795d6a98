"""The programs in rules/scripts: alone, and as the example rules start them, by the real daemon on simulated data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.site import Site
from trigger_daemon import simulator, simulator_hdf5

RULES = Path(__file__).resolve().parent.parent / "rules"
LOOK, RATE = RULES / "scripts" / "first_look.py", RULES / "scripts" / "hit_rate.py"
KEYS = ("mean", "sd", "min", "max", "dead")


def at_once(seconds: float) -> None:
    """The simulator's pause: there is none."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "site", quiescence="100ms", sweep="500ms")
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def use(site: Site, example: str, instead: Mapping[str, str]) -> None:
    """Put an example in force, with other words in place of some of its own."""
    text = (RULES / f"{example}.yaml").read_text()
    for words, others in instead.items():
        assert words in text, words
        text = text.replace(words, others)
    (site.rules_dir / f"{example}.yaml").write_text(text)


def run(program: Path, base: Path, *files: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program over files as `command` does."""
    told = [{"root": str(file.parent), "path": file.name, "absolute": str(file)} for file in files]
    (base / "manifest").write_text(json.dumps({"rule": "r", "run": 7, "group": {"session": "<s>"}, "files": told}))
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, "-P", str(program), str(base / "manifest"), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def told_by(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the run's output, as `command` takes it."""
    found: dict[str, Any] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    return found


# ------------------------------------------------------------------------- a first look


def looked(site: Site) -> list[dict[str, Any]]:
    return [json.loads(output) for (output,) in site.ask("SELECT output FROM run WHERE state = 'SUCCEEDED'")]


def test_each_batch_gets_a_page_with_thumbnails_and_true_statistics(site: Site, tmp_path: Path) -> None:
    """MRC and TIFF, by the example rules: what is told equals what other libraries read in the whole files."""
    looks = tmp_path / "looks"
    looks.mkdir()
    here = site.data / "s1"
    for number, name in enumerate("ab"):
        simulator.mrc_movie(here / f"{name}.mrc", frames=3, width=96, height=64, pause=at_once, seed=number)
        simulator.tiff_movie(here / f"{name}.tif", frames=4, width=80, height=50, pause=at_once, seed=number)
    use(site, "first-look", {
        "/data/screening": str(site.data), "/opt/looks/first_look.py": f"{sys.executable}, {LOOK}",
        "/srv/looks": str(looks), "files: 20": "files: 2", "quiescence: 30s": "quiescence: 100ms",
    })  # fmt: skip
    site.start()
    site.until(lambda: len(looked(site)) == 2, 40, "two batches were looked at")
    read = {
        ".mrc": np.stack([mrcfile.read(here / f"{name}.mrc") for name in "ab"]).astype(float),
        ".tif": np.stack([tifffile.imread(here / f"{name}.tif") for name in "ab"]).astype(float),
    }

    for told in looked(site):
        content = read[Path(told["per_file"][0]["path"]).suffix]
        place = Path(told["report"]).parent
        assert told["files"] == 2 and told["unreadable"] == []
        assert [told[key] for key in KEYS[:4]] == pytest.approx(
            [content.mean(), content.std(), content.min(), content.max()]
        )
        for one, movie in zip(sorted(told["per_file"], key=lambda one: one["path"]), content, strict=True):
            assert [one[key] for key in KEYS] == pytest.approx(
                [movie.mean(), movie.std(), movie.min(), movie.max(), (movie == 0).all(axis=0).mean()], abs=1e-6
            )
            assert one["picture"] in (place / "index.html").read_text()
            with Image.open(place / one["picture"]) as picture:
                assert picture.size == (movie.shape[2], movie.shape[1])
        assert json.loads((place / "report.json").read_text())["per_file"] == told["per_file"]


def test_a_large_frame_becomes_a_small_picture(tmp_path: Path) -> None:
    """By the mean of squares of pixels, in bands; dead pixels and rows that fill no square are counted, not shown."""
    content = np.random.default_rng(1).integers(1, 200, (3001, 4003)).astype(np.uint16)
    content[:30, :] = 0
    path, to = tmp_path / "big" / "a.tif", tmp_path / "looks"
    path.parent.mkdir()
    to.mkdir()
    tifffile.imwrite(path, content, rowsperstrip=64)
    done = run(LOOK, tmp_path, path, to=to, side=256)
    told = told_by(done)

    assert done.returncode == 0, done.stderr
    assert [told[key] for key in KEYS] == pytest.approx(
        [content.mean(), content.std(), 0, 199, (content == 0).mean()], abs=1e-5
    )
    with Image.open(to / "r-7" / "00000.png") as picture:
        assert picture.size == (4003 // 16, 3001 // 16)
        assert np.asarray(picture)[0].max() == 0 < np.asarray(picture)[20].min()
    assert "<s>" not in (to / "r-7" / "index.html").read_text()


def test_a_compressed_movie_is_read(tmp_path: Path) -> None:
    """LZW, as cameras write it."""
    path, to = tmp_path / "s" / "a.tif", tmp_path / "looks"
    to.mkdir()
    simulator.lzw_movie(path, frames=2, strips=4, pause=at_once)
    done = run(LOOK, tmp_path, path, to=to)

    assert done.returncode == 0, done.stderr
    assert told_by(done)["per_file"][0]["frames"] == 2 and told_by(done)["sd"] > 0


def test_a_file_that_cannot_be_read_is_for_a_person_and_hides_no_other(tmp_path: Path) -> None:
    """The page is there, names it, and shows the others."""
    path, to = tmp_path / "s" / "good.tif", tmp_path / "looks"
    to.mkdir()
    simulator.tiff_movie(path, frames=1, width=8, height=8, pause=at_once)
    (tmp_path / "s" / "bad.mrc").write_bytes(b"no movie")
    done = run(LOOK, tmp_path, tmp_path / "s" / "bad.mrc", path, tmp_path / "s" / "gone.tif", to=to)

    assert done.returncode == 65 and "2 files cannot be read, the first: bad.mrc" in done.stderr
    assert told_by(done)["files"] == 1
    assert re.search("<li>bad.mrc", (to / "r-7" / "index.html").read_text())


def test_a_page_that_cannot_be_written_now_is_made_later(tmp_path: Path) -> None:
    """A share that is away, or full, is no reason to call anybody; a watched directory is one."""
    path = tmp_path / "s" / "a.tif"
    simulator.tiff_movie(path, frames=1, width=8, height=8, pause=at_once)
    away, full, watched = (run(LOOK, tmp_path, path, to=to) for to in (tmp_path / "away", "/proc/self", path.parent))

    assert [away.returncode, full.returncode, watched.returncode] == [75, 75, 65]
    assert "is its disk mounted?" in away.stderr and "is watched" in watched.stderr


def test_a_look_that_is_repeated_replaces_the_first(tmp_path: Path) -> None:
    """An attempt that was broken off leaves no page that is half another's."""
    path, to = tmp_path / "s" / "a.tif", tmp_path / "looks"
    to.mkdir()
    simulator.tiff_movie(path, frames=1, width=8, height=8, pause=at_once)
    first, again = (run(LOOK, tmp_path, path, to=to) for _ in range(2))

    assert first.stdout == again.stdout
    assert sorted(file.name for file in (to / "r-7").iterdir()) == ["00000.png", "index.html", "report.json"]


# ------------------------------------------------------------------------- the gate of a chip


def chip(directory: Path, *, hits: int, images: range) -> None:
    """Write images of a chip, of which the first `hits` show diffraction."""
    for number in images:
        simulator.cbf_image(
            directory / f"x_1_{number:05}.cbf", width=90, height=70, pause=at_once, seed=number,
            spots=30 if number <= hits else 2,
        )  # fmt: skip


def test_only_a_chip_with_enough_hits_has_its_images_sent(site: Site) -> None:
    """The example rules: the good chip's images go; those of the empty one wait, and a person is told with numbers."""
    use(site, "pilatus-ssx", {
        "/data/ssx": str(site.data), "/opt/qc/hit_rate.py": f"{sys.executable}, {RATE}",
        "/mnt/cluster/ssx": str(site.out), "only_first: 1000": "only_first: 20", "idle: 1m": "idle: 1s",
        "quiescence: 5s": "quiescence: 100ms",
        '"0.05"': '"0.2"',
    })  # fmt: skip
    hits = {"good": 8, "empty": 1}
    for name, count in hits.items():
        chip(site.data / "e" / "s" / name, hits=count, images=range(1, 21))
    site.start()
    # Many are checked at once, and complete in any order: those that are the first must be so beyond doubt.
    site.until(lambda: site.ask("SELECT count(*) FROM batch JOIN rule ON rule.id = batch.rule"
                                " WHERE rule.name = 'chip-qc'") == [(2,)], 40, "both chips have their first images")
    for name, count in hits.items():
        chip(site.data / "e" / "s" / name, hits=count, images=range(21, 31))
    question = (
        "SELECT rule.name, json_extract(batch.captures, '$.chip'), run.state, run.output, run.error"
        " FROM run JOIN batch ON batch.id = run.id JOIN rule ON rule.id = batch.rule"
    )
    stands = {("chip-qc", "good", "SUCCEEDED"), ("chip-qc", "empty", "HELD"), ("chip-images", "good", "VERIFIED"),
              ("chip-images", "empty", "PENDING")}  # fmt: skip
    site.until(lambda: {row[:3] for row in site.ask(question)} == stands, 40, "one goes, the other waits")
    found = {row[:2]: row[2:] for row in site.ask(question)}
    output = {name: json.loads(found["chip-qc", name][1]) for name in ("good", "empty")}

    assert (output["good"]["images"], output["good"]["hits"], output["good"]["passed"]) == (20, 8, True)
    assert (output["empty"]["hits"], output["empty"]["hit_rate"], output["empty"]["passed"]) == (1, 0.05, False)
    assert "1 of 20 images are hits, 5.0%; 20.0% are wanted" in found["chip-qc", "empty"][2]
    good = site.out / "e" / "s" / "good"
    site.until(lambda: len(list(good.glob("[!.]*"))) == 30, 40, "those after the first go too")
    assert not (site.out / "e" / "s" / "empty").exists()


def test_spots_are_counted_in_every_form(tmp_path: Path) -> None:
    """CBF, HDF5 with its gaps left out, and the acquisition's own numbers, which need no image."""
    cbf, master = tmp_path / "a.cbf", tmp_path / "s_master.h5"
    simulator.cbf_image(cbf, width=90, height=70, pause=at_once, spots=25)
    simulator_hdf5.eiger_set(
        tmp_path, series="s", images=4, per_file=2, width=60, height=40, pause=at_once
    )
    import h5py

    for number in (1, 2):
        with h5py.File(tmp_path / f"s_data_{number:06}.h5", "r+") as file:
            image = np.random.default_rng(number).poisson(2, (2, 40, 60)).astype(np.uint16)
            image[:, 3:8, :] = 65_535  # a gap
            if number == 2:
                image[:, 12::7, 3::7] = 500
            file["/entry/data/data"][...] = image
    (tmp_path / "daq.jsonl").write_text("".join(f'{{"image": {n}, "spots": {n}}}\n' for n in range(20)))

    assert told_by(run(RATE, tmp_path, cbf, least=0.5))["spots_mean"] == 25
    told = told_by(run(RATE, tmp_path, master, least=0.5))
    assert (told["images"], told["hits"]) == (4, 2) and told["spots_mean"] > 15
    told = told_by(run(RATE, tmp_path, tmp_path / "daq.jsonl", cbf, least=0.5, images=16))
    assert (told["images"], told["hits"]) == (16, 6)


def test_what_cannot_be_counted_is_for_a_person(tmp_path: Path) -> None:
    """No image, half an image, no sense: HELD, so that nothing is sent because nobody looked. A gap in time is not."""
    cbf = tmp_path / "a.cbf"
    simulator.cbf_image(cbf, width=90, height=70, pause=at_once, spots=25)
    (tmp_path / "half.cbf").write_bytes(cbf.read_bytes()[:3_000])
    (tmp_path / "none.cbf").write_bytes(b"nothing")
    (tmp_path / "text.txt").touch()
    codes = [
        run(RATE, tmp_path, tmp_path / name, least=0.5).returncode
        for name in ("half.cbf", "none.cbf", "text.txt", "gone.cbf")
    ]

    assert codes == [65, 65, 65, 75]
