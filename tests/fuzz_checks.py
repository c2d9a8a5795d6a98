"""Damaged files for every check: whatever the bytes, there is a verdict, and bounds of reads and time are kept.

    python tests/fuzz_checks.py --seconds 3600 --seed 7       all checks, an equal part of the time each
    python tests/fuzz_checks.py --seed 7 --check tiff --case 4711       one case again

A case depends on seed, check and number alone. The first failure prints how to
get it again, keeps its file, and ends the run with 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy
import psutil
import tifffile

from trigger_daemon import registry, simulator, simulator_hdf5
from trigger_daemon.core.grammar import Option, OptionFault
from trigger_daemon.executor import CHECK_DEADLINE_S
from trigger_daemon.probe import BYTES_MAX, READS_MAX, CannotRead, Changed, Companions, Probe, run_checks

SLOW_S = 2.0  # reported, although the deadline is far
MEMORY_BYTES = 4 * 2**30  # of address space: a check that allocates what a file asks for fails here
TICK_S = 0.05  # what the kernel rounds the birth of a process to, and more
CHILD_S = 0.03  # no process can be started and ended in less; looking for children takes a millisecond
SEED_BYTES_MAX = 300_000
SPARSE_BYTES = (2**31, 2**32 + 5, 2**40)

Seeds = Mapping[str, bytes]


# ------------------------------------------------------------------------- whole files, tiny


def make_seeds() -> dict[str, bytes]:
    """Return a small valid file of each format and make, by name."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        quick = {"pause": lambda _: None}
        simulator.tiff_movie(here / "movie.tif", frames=5, width=20, height=12, **quick)
        simulator.mrc_movie(here / "movie.mrc", frames=5, width=20, height=12, **quick)
        simulator.cbf_image(here / "image.cbf", width=20, height=12, **quick)
        simulator.companion_xml(here / "exposure.xml", movie="exposure", **quick)
        for manner in simulator_hdf5.MANNERS:
            simulator_hdf5.hdf5_file(here / f"{manner}.h5", images=3, width=8, height=6, manner=manner, **quick)
        for libver in ("earliest", "latest"):
            simulator_hdf5.eiger_set(
                here / libver, series="x", images=5, per_file=2, width=8, height=6, libver=libver, **quick
            )
            for path in list((here / libver).iterdir()):
                path.rename(here / f"{libver}-{path.name}")
        with h5py.File(here / "user-block.h5", "w", userblock_size=1024) as file:
            file["x"] = numpy.arange(20)
        frames = numpy.arange(5 * 32 * 32, dtype="u2").reshape(5, 32, 32)
        tifffile.imwrite(here / "big.tif", frames, bigtiff=True, photometric="minisblack")
        tifffile.imwrite(here / "motorola.tif", frames, byteorder=">", photometric="minisblack")
        with tifffile.TiffWriter(here / "tiled.tif") as tiff:
            for frame in frames:
                tiff.write(frame, tile=(16, 16), subifds=1, photometric="minisblack")
                tiff.write(frame[::2, ::2], tile=(16, 16), subfiletype=1, photometric="minisblack")
        tifffile.imwrite(here / "strips.tif", frames, rowsperstrip=2, photometric="minisblack")
        (here / "movie.eer").write_bytes(_eer(here))
        seeds = {path.name: path.read_bytes() for path in sorted(here.iterdir()) if path.is_file()}
    seeds["movie.mdoc"] = (
        b"T = SerialEM: simulated\r\n\r\n[FrameSet = 0]\r\nNumSubFrames = 5\r\nPixelSpacing = 1.06\r\n"
        b"SubFramePath = X:\\Dose\\movie.tif\r\nDateTime = 11-Jun-25  10:15:27\r\n"
    )
    seeds["series.mdoc"] = b"PixelSpacing = 1.2\nImageFile = TS_01.mrc\n\n[T = a title]\n\n" + b"".join(
        b"[ZValue = %d]\nTiltAngle = %d\nNumSubFrames = 5\nDateTime = 11-Jun-25  10:15:27\n\n" % (n, 3 * n)
        for n in range(7)
    )
    seeds["wide.xml"] = '<?xml version="1.0"?><a><b>text</b></a>'.encode("utf-16")
    seeds["entities.xml"] = b'<!DOCTYPE a [<!ENTITY b "cccc">]><a>&b;</a>'
    seeds["motorola.mrc"] = struct.pack(">4i", 6, 5, 4, 1).ljust(92, b"\0") + struct.pack(">i", 64)
    seeds["motorola.mrc"] = seeds["motorola.mrc"].ljust(212, b"\0") + b"\x11\x11" + bytes(810 + 64) + bytes(range(240))
    seeds["empty"] = b""
    seeds["marker.done"] = b"done\n"
    return {name: data[:SEED_BYTES_MAX] for name, data in seeds.items()}


def _eer(here: Path) -> bytes:
    """Make a BigTIFF with the tags and compression of EER."""
    xml = b'<metadata><item name="numberOfFrames">5</item></metadata>'
    with tifffile.TiffWriter(here / "eer.tif", bigtiff=True) as tiff:
        for number in range(5):
            extra = [(65001, 7, len(xml), xml, False)] if number == 0 else []
            tiff.write(numpy.ones((8, 8), "u1"), extratags=extra, contiguous=False, photometric="minisblack")
    data = (here / "eer.tif").read_bytes()
    return data.replace(struct.pack("<HHQH", 259, 3, 1, 1), struct.pack("<HHQH", 259, 3, 1, 65_001))


# ------------------------------------------------------------------------- damage


def _number(rng: random.Random, size: int) -> int:
    special = (0, 1, 2, 3, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**6, 10**9)
    near = (size, size - 1, size + 1, size // 2, size * 2)
    return rng.choice((*special, *near, rng.randrange(size + 1), rng.getrandbits(64)))


def _place(rng: random.Random, data: bytearray) -> int:
    """Headers are hit more often than pixels."""
    return rng.randrange(min(len(data), rng.choice((16, 128, 1024, len(data), len(data)))) or 1)


def _flip(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _integer(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        width = rng.choice((1, 2, 4, 4, 8, 8))
        at = _place(rng, data) & ~(rng.choice((1, 2, 4)) - 1)
        order = rng.choice(("little", "little", "big"))
        data[at : at + width] = (_number(rng, len(data)) % 256**width).to_bytes(width, order)  # type: ignore[arg-type]


def _cut(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    del data[rng.choice((_place(rng, data), max(0, len(data) - rng.randrange(1, 20)))) :]


def _extend(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    count = rng.choice((1, 7, 16, 17, 512, 5_000))
    data += rng.choice((bytes(count), rng.randbytes(count), bytes(data[-count:])))


def _splice(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    other = seeds[rng.choice(sorted(seeds))]
    data[_place(rng, data) :] = other[rng.randrange(len(other) + 1) :]


def _move(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    """Copy, drop or repeat a part."""
    begin = _place(rng, data)
    part = bytes(data[begin : begin + rng.choice((1, 4, 12, 20, 64, 1024))])
    at = _place(rng, data)
    match rng.randrange(3):
        case 0:
            data[at : at + len(part)] = part
        case 1:
            del data[begin : begin + len(part)]
        case _:
            data[at:at] = part * rng.choice((1, 2, 50, 1_000))
            del data[SEED_BYTES_MAX:]


def _fill(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    begin, count = _place(rng, data), rng.choice((4, 16, 64, 1024))
    count = len(data[begin : begin + count])
    data[begin : begin + count] = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count)))


def _digits(rng: random.Random, data: bytearray, seeds: Seeds) -> None:
    """Change a number that is written in digits."""
    found = list(re.finditer(rb"\d+", bytes(data[:20_000])))
    if found:
        hit = rng.choice(found)
        written = b"%d" % _number(rng, len(data))
        said = (b"", b"-1", b"0", b"9" * 18, b"9" * 5_000, written, b"1e9", b"\xd9\xa3")
        data[hit.start() : hit.end()] = rng.choice(said)


DAMAGES: tuple[Callable[[random.Random, bytearray, Seeds], None], ...] = (
    _flip, _flip, _integer, _integer, _integer, _cut, _extend, _splice, _move, _fill, _digits,
)


def damaged(rng: random.Random, data: bytes, seeds: Seeds) -> bytes:
    """Return a file with one to six damages; now and then noise, or the file as it is."""
    if (luck := rng.random()) < 0.02:
        return rng.randbytes(rng.randrange(5_000))
    if luck < 0.08:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not changed:
            changed += rng.randbytes(20)
        rng.choice(DAMAGES)(rng, changed, seeds)
    return bytes(changed)


# ------------------------------------------------------------------------- options


def some_options(rng: random.Random, options: Mapping[str, Option], seeds: Seeds) -> dict[str, Any]:
    """Return a value that the grammar accepts for each option, often the default."""
    return {name: _value(rng, option, seeds) for name, option in options.items()}


def _value(rng: random.Random, option: Option, seeds: Seeds) -> Any:
    if not option.required and rng.random() < 0.4:
        return option.default
    if option.choices and (option.kind == "enum" or rng.random() < 0.5):
        return rng.choice(option.choices)
    least = option.minimum or 0
    text = rng.choice(("{stem}.done", "{name}.mdoc", "x", "marker.done", "movie.mdoc", "../x", "a/b", "ü\udcff"))
    match option.kind:
        case "int" | "size" | "rate":
            return max(least, rng.choice((0, 1, 4, 5, 6, 40, 1_000, 2**31, 10**12)))
        case "bool":
            return rng.random() < 0.5
        case "duration" | "percent":
            return rng.choice((0.0, 0.001, 0.05, 0.5, 1.0, 3.0))
        case "texts":
            return (text,)
        case "ints":
            return (max(least, 5),)
        case "list":
            return [text]
        case "map":
            return {}
        case _:
            return text


# ------------------------------------------------------------------------- one case


class Failed(Exception):
    """A law is broken."""


@dataclass
class Tally:
    """What became of the cases of one check."""

    cases: int = 0
    seconds: float = 0.0
    said: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0
    slowest_s: float = 0.0
    slowest_case: int = -1
    bytes_max: int = 0
    reads_max: int = 0


class _Watched:
    """A check that tells what it raised, and how much of which window it read."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.raised: str = ""
        self.windows: list[Probe] = []

    def check(self, probe: Any, options: Mapping[str, Any], companions: Mapping[str, Any]) -> Any:
        try:
            return self._module.check(probe, options, companions)
        except (Changed, CannotRead):
            raise
        except Exception as error:
            if type(error).__name__ != "TooMuch":
                self.raised = traceback.format_exc()
            raise
        finally:
            assert isinstance(companions, Companions)
            self.windows += [probe, *companions._probes.values()]


# Which seeds a check is given mostly; any other check gets all of them.
OWN = {
    "tiff": r".*\.(tif|eer)$", "eer": r".*\.(tif|eer)$", "mrc": r".*\.mrc$", "cbf": r".*\.cbf$", "xml": r".*\.xml$",
    "mdoc": r".*\.mdoc$", "hdf5": r".*\.h5$", "eiger": r".*_master\.h5$",
}


def run_case(seed: int, check: str, case: int, seeds: Seeds, directory: Path, tally: Tally) -> None:
    """Judge one damaged file; raise Failed if a law is broken."""
    rng = random.Random(f"{seed}:{check}:{case}")
    module = registry.find_check(check)
    own = [name for name in sorted(seeds) if re.match(OWN.get(check, ""), name)]
    chosen = rng.choice(own if rng.random() < 0.95 else sorted(seeds))
    options = some_options(rng, module.OPTIONS, seeds)
    try:
        getattr(module, "check_options", lambda _: None)(options)
    except OptionFault:
        options = {name: option.default for name, option in module.OPTIONS.items()}
    for old in directory.iterdir():
        old.unlink()
    name = rng.choice((chosen, "x_master.h5", "movie.tif"))
    path = directory / name
    path.write_bytes(damaged(rng, seeds[chosen], seeds))
    if rng.random() < 0.02:
        os.truncate(path, rng.choice(SPARSE_BYTES))
    stem = name.rpartition(".")[0]
    beside = {}
    for other in (f"{name}.mdoc", f"{stem}.mdoc", f"{stem}.done", "movie.mdoc", "exposure.xml"):
        if rng.random() < 0.5 and other != name:
            source = other if other in seeds else rng.choice(sorted(seeds)) if rng.random() < 0.2 else "movie.mdoc"
            (directory / other).write_bytes(damaged(rng, seeds[source], seeds))
            beside[other] = str(directory / other)
    siblings = {check: [rng.choice((5, 5, 5, 6, 0, 2**40)) for _ in range(rng.randrange(10))]}
    _judge(check, module, options, path, beside, siblings, rng, seeds, tally)


def _judge(
    check: str, module: Any, options: dict[str, Any], path: Path, beside: dict[str, str],
    siblings: dict[str, list[int]], rng: random.Random, seeds: Seeds, tally: Tally,
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    began_time = time.time()
    watched = _Watched(module)
    for again in (False, True):
        with Probe(path) as probe:
            state = probe.state()
        began_at = time.perf_counter()
        judged = run_checks(path, state, ((check, options),), beside, lambda _: watched, siblings)
        took_s = time.perf_counter() - began_at
        if watched.raised or f"check {check} failed" in judged.why:
            raise Failed(watched.raised or judged.why)
        if not judged.why:
            raise Failed(f"no words with {judged.verdict}")
        if took_s > CHECK_DEADLINE_S:
            raise Failed(f"{took_s:.1f} s")
        for window in watched.windows:
            tally.bytes_max = max(tally.bytes_max, window.bytes_read)
            tally.reads_max = max(tally.reads_max, window.reads)
            if window.bytes_read > BYTES_MAX or window.reads > READS_MAX:
                raise Failed(f"{window.bytes_read:,} bytes in {window.reads:,} reads of {window.name}")
        tally.said[str(judged.verdict)] += 1
        tally.gave_up += "gave up" in judged.why
        if took_s > tally.slowest_s:
            tally.slowest_s, tally.slowest_case = took_s, tally.cases
        if again or not judged.needs:
            break
        for name in judged.needs[:20]:
            wanted = path.parent / name
            if wanted.parent == path.parent and not wanted.exists() and len(os.fsencode(name)) < 200:
                like = f"latest-{name}" if f"latest-{name}" in seeds else rng.choice(sorted(seeds))
                wanted.write_bytes(damaged(rng, seeds[like], seeds) if rng.random() < 0.2 else seeds[like])
            if wanted.exists():
                beside[name] = str(wanted)
    left = set(os.listdir("/proc/self/fd")) - before
    if held := [fd for fd in left if os.path.exists(f"/proc/self/fd/{fd}")]:  # not that of the listing itself
        raise Failed(f"descriptors left: {held}")
    if took_s > CHILD_S:
        children = [child for child in psutil.Process().children() if child.create_time() > began_time - TICK_S]
        if children:  # of this case: earlier ones are those of whoever ran here before
            raise Failed(f"processes left: {children}")


# ------------------------------------------------------------------------- many cases


def fuzz(
    seed: int,
    *,
    checks: list[str] | None = None,
    cases: int | None = None,
    seconds: float | None = None,
    first: int = 0,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, Tally]:
    """Run so many cases of each check, or for so long, an equal part of the time each; raise Failed at the first."""
    seeds = make_seeds()
    tallies = {check: Tally(cases=first) for check in checks or registry.check_names()}
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    tell_at = time.monotonic() + 60
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        while time.monotonic() < until:
            due = [name for name, one in tallies.items() if cases is None or one.cases < first + cases]
            if not due:
                break
            check = min(due, key=lambda name: tallies[name].seconds)
            tally = tallies[check]
            began_at = time.perf_counter()
            try:
                run_case(seed, check, tally.cases, seeds, Path(place), tally)
            except Exception as error:
                kept = tempfile.mkdtemp(prefix=f"fuzz-{check}-{tally.cases}-")
                shutil.copytree(place, kept, dirs_exist_ok=True, copy_function=_copy_sparse)
                again = f"python tests/fuzz_checks.py --seed {seed} --check {check} --case {tally.cases}"
                raise Failed(f"{again}\nfiles kept in {kept}\n{error or traceback.format_exc()}") from error
            tally.seconds += time.perf_counter() - began_at
            tally.cases += 1
            if time.monotonic() > tell_at:
                tell_at += 60
                told(", ".join(f"{name} {one.cases:,}" for name, one in tallies.items()))
    return tallies


def _copy_sparse(source: str, target: str) -> None:
    """Keep what lies before the hole of a file that was made long; the case makes it again."""
    with open(source, "rb") as file:
        Path(target).write_bytes(file.read(2 * SEED_BYTES_MAX))


def report(tallies: Mapping[str, Tally]) -> str:
    """Return the result as a table in Markdown."""
    head = ["check", "cases", "complete", "unknown", "suspect", "incomplete", "gave up", "most bytes", "most reads"]
    rows = [[*head, "slowest (case)"], ["---"] * (len(head) + 1)]
    for name, one in sorted(tallies.items()):
        counts = [f"{one.said[verdict]:,}" for verdict in ("complete", "unknown", "suspect", "incomplete")]
        slowest = f"{one.slowest_s * 1000:,.1f} ms ({one.slowest_case})"
        bounds = [f"{one.gave_up:,}", f"{one.bytes_max:,}", f"{one.reads_max:,}"]
        rows.append([name, f"{one.cases:,}", *counts, *bounds, slowest])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="append", help="only this one (may be repeated)")
    parser.add_argument("--case", type=int, help="only this case of the check")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    single = {"first": asked.case, "cases": 1} if asked.case is not None else {"seconds": asked.seconds}
    try:
        tallies = fuzz(asked.seed, checks=asked.check, told=lambda words: print(words, flush=True), **single)
    except Failed as failed:
        print(failed)
        return 1
    print(report(tallies))
    if slow := [name for name, one in tallies.items() if one.slowest_s > SLOW_S]:
        print(f"slower than {SLOW_S:g} s: {', '.join(slow)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
