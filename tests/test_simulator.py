"""Laws of the simulated instruments: they write as the real ones do, and say truly what they wrote."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trigger_daemon import simulator
from trigger_daemon.checks import cbf, mrc, tiff, xml
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Probe, run_checks

CHECKS = {"cbf": cbf, "mrc": mrc, "tiff": tiff, "xml": xml}


class Onlooker:
    """A pause that takes no time, and looks at the file at each of its write boundaries."""

    def __init__(self, path: Path, check: str, **options: Any) -> None:
        self.path, self.check, self.options = path, check, options
        self.seen: list[tuple[Verdict, str, bytes]] = []

    def __call__(self, seconds: float) -> None:
        if self.path.exists():
            with Probe(self.path) as probe:
                state = probe.state()
            verdict, why, *_ = run_checks(self.path, state, ((self.check, self.options),), {}, CHECKS.__getitem__)
            self.seen.append((verdict, why, self.path.read_bytes()))

    def premature(self, whole: bytes) -> list[str]:
        """The whys of all looks that said complete of other bytes than the last ones."""
        return [why for verdict, why, data in self.seen if verdict is Verdict.COMPLETE and data != whole]


def test_no_tiff_movie_is_complete_before_its_last_byte(tmp_path: Path) -> None:
    """With the expected number of frames, a movie is incomplete at every write boundary but the last."""
    path = tmp_path / "m.tiff"
    onlooker = Onlooker(path, "tiff", frames=12)
    simulator.tiff_movie(path, frames=12, width=31, height=33, pause=onlooker)

    assert len(onlooker.seen) == 1 + 12 * 4 + 12  # header; two halves, directory, link; a byte to the word boundary
    assert onlooker.premature(path.read_bytes()) == []
    assert {verdict for verdict, *_ in onlooker.seen[:-1]} == {Verdict.INCOMPLETE}
    assert onlooker.seen[-1][:2] == (Verdict.COMPLETE, "12 of 12 frames, 13.8 kB")


def test_a_tiff_movie_is_valid_after_each_of_its_frames(tmp_path: Path) -> None:
    """As libtiff leaves it: without the expected number nothing tells half a movie from a whole one."""
    path = tmp_path / "m.tiff"
    onlooker = Onlooker(path, "tiff")
    simulator.tiff_movie(path, frames=12, width=32, height=32, pause=onlooker)

    complete = [why for verdict, why, _ in onlooker.seen if verdict is Verdict.COMPLETE]
    assert [why.split(",")[0] for why in complete] == ["1 frame", *(f"{n} frames" for n in range(2, 13))]


def test_a_stalled_movie_stays_incomplete_for_good(tmp_path: Path) -> None:
    """A writer that stops mid-file leaves a file that no look calls complete."""
    path = tmp_path / "m.tiff"
    onlooker = Onlooker(path, "tiff", frames=40)
    written = simulator.tiff_movie(path, frames=40, width=32, height=32, pause=onlooker, stop_after=17)

    assert {verdict for verdict, *_ in onlooker.seen} == {Verdict.INCOMPLETE}
    assert onlooker.seen[-1][1].startswith("17 of 40 frames")
    assert written.size == path.stat().st_size


def test_no_mrc_movie_is_complete_before_its_last_pixel(tmp_path: Path) -> None:
    """Though its header holds the final number of frames since the first.

    The header that is written again after the last frame cannot be foreseen
    by any look: that is what the quiet period is for.
    """
    path = tmp_path / "m.mrc"
    onlooker = Onlooker(path, "mrc", frames=8)
    simulator.mrc_movie(path, frames=8, width=16, height=16, pause=onlooker)
    whole = path.stat().st_size

    assert [len(data) == whole for verdict, _, data in onlooker.seen if verdict is Verdict.COMPLETE] == [True, True]
    assert {verdict for verdict, _, data in onlooker.seen if len(data) < whole} == {Verdict.INCOMPLETE}
    assert onlooker.seen[3][2][8:12] == (8).to_bytes(4, "little"), "the final number is there after frame 1"
    assert onlooker.seen[-1][2] != onlooker.seen[-2][2], "the header is the last that is written"


def test_an_xml_companion_is_complete_only_when_written(tmp_path: Path) -> None:
    """Half a companion does not end in its first element's end."""
    path = tmp_path / "m.xml"
    onlooker = Onlooker(path, "xml")
    simulator.companion_xml(path, movie="m", pause=onlooker)

    assert [verdict for verdict, *_ in onlooker.seen] == [Verdict.INCOMPLETE, Verdict.COMPLETE]


def test_a_cbf_image_appears_whole_under_its_name(tmp_path: Path) -> None:
    """It is written under a temporary name and renamed: the first look finds all of it, and its MD5 is right."""
    path = tmp_path / "i.cbf"
    onlooker = Onlooker(path, "cbf", md5=True)
    hidden = Onlooker(path.with_name("i.cbf.tmp"), "cbf", md5=True)

    def both(seconds: float) -> None:
        onlooker(seconds)
        hidden(seconds)

    simulator.cbf_image(path, width=40, height=30, pause=both)
    data = path.read_bytes()
    begins = data.index(b"\x0c\x1a\x04\xd5") + 4

    assert [verdict for verdict, *_ in onlooker.seen] == [Verdict.COMPLETE]
    assert hidden.premature(data) == []
    assert os.listdir(tmp_path) == ["i.cbf"]
    assert base64.b64encode(hashlib.md5(data[begins : begins + 1200]).digest()) in data[:begins]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    """A failure that is seen once can be seen again."""
    one, two, other = (
        simulator.tiff_movie(tmp_path / name, frames=2, width=16, height=16, pause=lambda _: None, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )

    assert one.sha256 == two.sha256 != other.sha256


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[simulator.Written]:
    root = tmp_path_factory.mktemp("session")
    return simulator.session(root / "epu", root / "ssx", lambda _: None, scale=0.002)


def test_a_session_says_truly_what_it_wrote(written: list[simulator.Written]) -> None:
    """Every file on disk is in the list once, with its digest and size, and nothing else is."""
    root = written[0].path
    while root.name != "epu":
        root = root.parent
    on_disk = {path for path in root.parent.rglob("*") if path.is_file()}

    assert {item.path for item in written} == on_disk
    assert len(written) == len(on_disk)
    assert all(item.sha256 == hashlib.sha256(item.path.read_bytes()).hexdigest() for item in written)
    assert all(item.size == item.path.stat().st_size for item in written)
    assert Counter(item.kind for item in written) == {"movie": 18, "companion": 17, "image": 400, "run": 1}


def test_what_arrives_is_what_the_checks_call_complete(written: list[simulator.Written]) -> None:
    """The oracle and the checks agree: only the stalled movie is not whole; a movie without companion cannot go."""
    options: dict[str, dict[str, Any]] = {
        "tiff": {"frames": 40}, "mrc": {"frames": 20}, "cbf": {"md5": True}, "xml": {},
    }
    for item in written:
        if item.kind == "run":
            continue
        with Probe(item.path) as probe:
            state = probe.state()
        check = item.path.suffix[1:]
        verdict, why, *_ = run_checks(item.path, state, ((check, options[check]),), {}, CHECKS.__getitem__)
        whole = "writer stopped" not in item.odd or item.kind != "movie"
        assert (verdict is Verdict.COMPLETE) is whole, (item, why)
    movies = [item for item in written if item.kind == "movie"]
    lonely = [m for m in movies if not (m.path.parent / (m.path.name.rsplit("_", 1)[0] + ".xml")).exists()]

    assert [m.odd for m in lonely] == ["its companion never comes"]
    assert [m.odd for m in movies if not m.arrives] == [
        "its companion never comes", "its writer stopped after 17 of 40 frames",
    ]


def test_companions_come_before_and_after_their_movies(tmp_path: Path) -> None:
    """No order between a movie and its companion may be relied on."""
    order: dict[str, list[str]] = {}
    for item in simulator.session(tmp_path / "epu", tmp_path / "ssx", lambda _: None, scale=0.002):
        if item.kind in ("movie", "companion"):
            stem = item.path.stem.replace("_fractions", "").replace("_Fractions", "")
            order.setdefault(stem, []).append(item.kind)

    assert {tuple(kinds) for kinds in order.values()} == {
        ("movie", "companion"), ("companion", "movie"), ("movie",),
    }


def test_a_session_takes_its_time_and_size_from_its_arguments(tmp_path: Path) -> None:
    """At scale 1 it is about 100 MB, and its four writers pause for about 20 s each, the late companion for 11 s."""
    pauses: list[float] = []
    written = simulator.session(tmp_path / "epu", tmp_path / "ssx", pauses.append, scale=0.1)
    movies = sum(item.size for item in written if item.kind == "movie")

    assert 7e6 < movies < 9e6
    assert 50 < sum(pauses) < 75


@pytest.mark.parametrize("at", [0, 100, 900])
def test_a_pause_that_raises_ends_the_whole_session(tmp_path: Path, at: int) -> None:
    """Whoever paces the writers can stop them: the error comes out, and no other writer goes on."""
    calls = iter(range(10**9))
    failed = threading.Event()
    after: list[float] = []

    class Enough(Exception):
        pass

    def pause(seconds: float) -> None:
        if failed.is_set():
            after.append(seconds)
            threading.Event().wait(0.05)  # the others' pauses take time, as real ones do
        elif next(calls) == at:
            failed.set()
            raise Enough

    with pytest.raises(Enough):
        simulator.session(tmp_path / "epu", tmp_path / "ssx", pause, scale=0.002)

    assert len(after) < 50
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("simulator")]
