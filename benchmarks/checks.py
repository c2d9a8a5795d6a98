"""Compare each completeness check with a full decode of the same file by its reference library, in one run.

    .venv/bin/python benchmarks/checks.py
    .venv/bin/python benchmarks/checks.py --only mrc --only tiff --repeat 3 --scale 0.1

Files are dropped from the page cache before each measurement. Every number is
a median over the rounds, and the order within a round is drawn anew. Machines
differ: read the ratios. Needs h5py, tifffile and mrcfile.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import mrcfile  # type: ignore[import-untyped]
import numpy
import tifffile

from measure import EMPTY, place, say
from trigger_daemon import registry, simulator, simulator_hdf5
from trigger_daemon.probe import Companions, Probe, run_checks

Decode = Callable[[Path], object]


@dataclass
class Subject:
    """A file, the check that judges it, and who decodes it in full."""

    name: str
    path: Path
    check: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decoder: str = ""
    decode: Decode | None = None
    check_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    said: str = ""
    bytes_read: int = 0
    reads: int = 0
    files: set[Path] = field(default_factory=set)


class _Counting:
    """A check that tells through which windows it read."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.windows: dict[bytes, Probe] = {}

    def check(self, probe: Probe, options: Mapping[str, Any], companions: Companions) -> Any:
        outcome = self._module.check(probe, options, companions)
        opened = (companions[name] for name in outcome.needs if name in companions)
        self.windows |= {window.path: window for window in (probe, *opened)}
        return outcome


# ------------------------------------------------------------------------- files


def _quick(_: float) -> None:
    """No pause."""


def _side(pixels: int, scale: float) -> int:
    return max(16, round(pixels * math.sqrt(scale)))


def make(here: Path, wanted: list[str], scale: float) -> list[Subject]:
    """Write the files that are asked for."""
    made: list[Subject] = []
    for name in wanted:
        say(f"writing the file for {name}")
        made.append(SUBJECTS[name](here / name.replace(" ", "-"), scale))
    return made


def _tiff(here: Path, scale: float) -> Subject:
    side = _side(1600, scale)
    path = simulator.tiff_movie(here / "x.tif", frames=40, width=side, height=side, pause=_quick).path
    return Subject("tiff", path, "tiff", {"frames": 40}, "tifffile", tifffile.imread)


def _eer(here: Path, scale: float) -> Subject:
    """1,000 directories with the tags and compression of EER, 8 kB each; a real one has 100 times the pixels."""
    here.mkdir(parents=True)
    path, frames = here / "x.eer", max(10, round(1000 * scale))
    xml = f'<metadata><item name="numberOfFrames">{frames}</item></metadata>'.encode()
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number in range(frames):
            extra = [(65001, 7, len(xml), xml, False)] if number == 0 else []
            tiff.write(numpy.ones((64, 128), "u1"), extratags=extra, contiguous=False, photometric="minisblack")
    plain, packed = (struct.pack("<HHQH", 259, 3, 1, compression) for compression in (1, 65_001))
    path.write_bytes(path.read_bytes().replace(plain, packed))
    check = "eer" if "eer" in registry.check_names() else "tiff"
    return Subject("eer", path, check, _defaults(check))


def _mrc(here: Path, scale: float) -> Subject:
    side = _side(3200, scale)
    path = simulator.mrc_movie(here / "x.mrc", frames=20, width=side, height=side, pause=_quick).path
    return Subject("mrc", path, "mrc", {"frames": 20}, "mrcfile", _read_mrc)


def _read_mrc(path: Path) -> object:
    with mrcfile.open(path) as file:
        return file.data


def _hdf5(here: Path, scale: float) -> Subject:
    side = _side(1000, scale)
    path = simulator_hdf5.hdf5_file(here / "x.h5", images=100, width=side, height=side, pause=_quick).path
    return Subject("hdf5", path, "hdf5", {}, "h5py", _read_hdf5)


def _read_hdf5(path: Path) -> object:
    with h5py.File(path, locking=False) as file:
        return file[simulator_hdf5.DATA][:]


def _eiger(here: Path, scale: float) -> Subject:
    side = _side(1000, scale)
    written = simulator_hdf5.eiger_set(
        here, series="x", images=100, per_file=10, width=side, height=side, pause=_quick
    )
    return Subject("eiger", written[0].path, "eiger", {}, "h5py", _read_eiger)


def _eiger_by_rule(here: Path, scale: float) -> Subject:
    subject = _eiger(here, scale)
    subject.name, subject.options = "eiger by rule", {"images": 100, "per_file": 10}
    return subject


def _read_eiger(path: Path) -> object:
    with h5py.File(path, locking=False) as file:
        return [file[f"entry/data/{name}"][:].sum() for name in file["entry/data"]]


def _cbf(here: Path, scale: float) -> Subject:
    width, height = _side(2463, scale), _side(2527, scale)
    path = simulator.cbf_image(here / "x.cbf", width=width, height=height, pause=_quick).path
    return Subject("cbf", path, "cbf", {"md5": False}, "numpy", _read_cbf)


def _cbf_md5(here: Path, scale: float) -> Subject:
    subject = _cbf(here, scale)
    subject.name, subject.options = "cbf md5", {"md5": True}
    return subject


def _read_cbf(path: Path) -> object:
    """Decode byte offsets: a step of one byte; -128 announces one of two bytes, as many do in a real frame."""
    data = path.read_bytes()
    begins = data.index(b"\x0c\x1a\x04\xd5") + 4
    size = int(data[: begins].partition(b"X-Binary-Size:")[2].split()[0])
    steps = numpy.frombuffer(data, numpy.int8, size, begins)
    assert not (steps == -128).any()  # the simulator writes none, which makes this the fastest decode there can be
    return numpy.cumsum(steps, dtype=numpy.int32)


def _xml(here: Path, scale: float) -> Subject:
    return Subject("xml", simulator.companion_xml(here / "x.xml", movie="x", pause=_quick).path, "xml")


def _mdoc(here: Path, scale: float) -> Subject:
    here.mkdir(parents=True)
    path, keys = here / "x.mdoc", "".join(f"Key{number} = {number * 1.5:.3f}\n" for number in range(25))
    path.write_text("PixelSpacing = 1.2\n\n" + "".join(f"[ZValue = {number}]\n{keys}\n" for number in range(41)))
    return Subject("mdoc", path, "mdoc", {"sections": 41})


SUBJECTS: dict[str, Callable[[Path, float], Subject]] = {
    "tiff": _tiff, "eer": _eer, "mrc": _mrc, "hdf5": _hdf5, "eiger": _eiger, "eiger by rule": _eiger_by_rule,
    "cbf": _cbf, "cbf md5": _cbf_md5, "xml": _xml, "mdoc": _mdoc,
}


def _defaults(check: str) -> dict[str, Any]:
    return {name: option.default for name, option in registry.find_check(check).OPTIONS.items()}


# ------------------------------------------------------------------------- measuring


def uncache(paths: set[Path]) -> None:
    """Make the next read come from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def judge(subject: Subject) -> None:
    """Judge the file as the daemon does: with a look before and after, and again with the files that it needs."""
    counting = _Counting(registry.find_check(subject.check))
    options = {**_defaults(subject.check), **subject.options}
    with Probe(subject.path) as probe:
        state = probe.state()
    began_at = time.perf_counter()
    judged = run_checks(subject.path, state, ((subject.check, options),), {}, lambda _: counting)
    windows = list(counting.windows.values())
    if judged.needs:
        there = {name: str(subject.path.parent / name) for name in judged.needs}
        judged = run_checks(subject.path, state, ((subject.check, options),), there, lambda _: counting)
        windows += counting.windows.values()
    subject.check_s.append(time.perf_counter() - began_at)
    subject.files |= {subject.path, *(subject.path.parent / name for name in judged.needs)}
    subject.bytes_read = sum(window.bytes_read for window in windows)
    subject.reads = sum(window.reads for window in windows)
    subject.said = f"{judged.verdict}: {judged.why}"


def decode(subject: Subject) -> None:
    assert subject.decode
    began_at = time.perf_counter()
    subject.decode(subject.path)
    subject.decode_s.append(time.perf_counter() - began_at)


def measure(subjects: list[Subject], repeat: int) -> None:
    for subject in subjects:
        judge(subject)  # which files there are, and whatever is imported late
        subject.check_s.clear()
    for number in range(repeat):
        tasks = [(judge, subject) for subject in subjects]
        tasks += [(decode, subject) for subject in subjects if subject.decode]
        random.shuffle(tasks)
        for task, subject in tasks:
            say(f"round {number + 1} of {repeat}: {task.__name__} {subject.name}")
            uncache(subject.files)
            task(subject)


def table(subjects: list[Subject]) -> str:
    head = [
        "check", "file MB", "check ms", "reads", "bytes read", "of the file", "full decode ms", "by", "decode / check",
        "verdict",
    ]
    rows = [head, ["---"] * len(head)]
    for one in subjects:
        size = sum(path.stat().st_size for path in one.files)
        check_ms = statistics.median(one.check_s) * 1000
        decode_ms = statistics.median(one.decode_s) * 1000 if one.decode_s else 0.0
        decoded = [f"{decode_ms:,.1f}", one.decoder, f"{decode_ms / check_ms:,.1f}"] if one.decode_s else [EMPTY] * 3
        rows.append([
            one.name, f"{size / 1e6:,.2f}", f"{check_ms:,.2f}", f"{one.reads:,}", f"{one.bytes_read:,}",
            f"{one.bytes_read / size:.5%}", *decoded, one.said,
        ])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="only this one (may be given several times)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the files' bytes (1.0: 100 to 400 MB each)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where files are written (/var/tmp)")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    asked = parser.parse_args()
    with place(asked.disk) as here:
        subjects = make(here, asked.only or list(SUBJECTS), asked.scale)
        measure(subjects, asked.repeat)
        text = table(subjects)
    print(text)
    if asked.output:
        asked.output.write_text(text)


if __name__ == "__main__":
    main()
