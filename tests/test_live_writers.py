"""Law: while a real writer is at work, no check says complete before its last byte, but for the blind spots named here.

Each writer runs in a child that stands still at every one of its system calls,
so that a file is judged in each state that anybody could ever have found it in.

    python tests/test_live_writers.py TABLE.md      writes what was seen as a table
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trigger_daemon import registry
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Judged, Probe, run_checks

STATES_MAX = 5_000  # of one writer; the longest has some hundred
CALLS_MAX = 200_000  # a writer that makes more hangs

# What no look at the bytes can tell (docs/reference/rules.md): (writer, check with its options).
VALID_AFTER_EACH_FRAME = "a TIFF is valid after each frame; only the expected number tells"
HEADER_LAST = "all pixels are there, and the header, with its final number of frames, is written once more"
BLIND = {
    ("tifffile, frame by frame", "tiff"): VALID_AFTER_EACH_FRAME,
    ("tifffile, BigTIFF", "tiff"): VALID_AFTER_EACH_FRAME,
    ("simulator, TIFF movie", "tiff"): VALID_AFTER_EACH_FRAME,
    ("simulator, MRC movie", "mrc"): HEADER_LAST,
    ("simulator, MRC movie", "mrc: {frames: 6}"): HEADER_LAST,
}

FRAMES = {"frames": 6}
VERDICTS = ("incomplete", "suspect", "unknown", "complete")


@dataclass(frozen=True)
class Live:
    """A writer: what it imports, what it does before it is watched, and what it does then to `path`."""

    name: str
    file: str
    checks: tuple[tuple[str, dict[str, Any]], ...]
    imports: str
    writes: str
    before: str = "pass"


_NUMPY = "import numpy\nframes = numpy.random.default_rng(1).integers(1, 4000, (6, 64, 48)).astype('u2')\n"
_SIMULATOR = "from trigger_daemon import simulator, simulator_hdf5\nimport h5py\nquick = lambda _: mark()\n"
TIFF, MRC = (("tiff", {}), ("tiff", FRAMES)), (("mrc", {}), ("mrc", FRAMES))
HDF5, CBF = (("hdf5", {}),), (("cbf", {}), ("cbf", {"md5": True}))
EIGER = (("eiger", {"images": 12, "per_file": 5}), ("eiger", {}))
_H5PY = """
with h5py.File(path, 'w'{layout}) as file:
    data = file.create_dataset('entry/data', {shape}, dtype='u2')
    {start}
    for number, frame in enumerate(frames):
        {grow}
        data[number] = frame
        mark()
        {flush}
"""
_GROWING = {"shape": "(0, 64, 48), maxshape=(None, 64, 48), chunks=(1, 64, 48)", "grow": "data.resize(number + 1, 0)"}
_PLAIN = {"layout": "", "start": "pass", "flush": "pass"}

LIVE = (
    Live(
        "tifffile, frame by frame", "x.tif", TIFF, _NUMPY + "import tifffile",
        "with tifffile.TiffWriter(path) as file:\n    for frame in frames: file.write(frame, contiguous=False)",
    ),
    Live(
        "tifffile, BigTIFF", "x.tif", TIFF, _NUMPY + "import tifffile",
        "with tifffile.TiffWriter(path, bigtiff=True) as file:\n"
        "    for frame in frames: file.write(frame, contiguous=False)",
    ),
    Live(
        "tifffile, one stack", "x.tif", TIFF, _NUMPY + "import tifffile",
        "tifffile.imwrite(path, frames, photometric='minisblack')",
    ),
    Live("mrcfile, at once", "x.mrc", MRC, _NUMPY + "import mrcfile",
         "with mrcfile.new(path) as file: file.set_data(frames)"),
    Live(
        "mrcfile, memory-mapped", "x.mrc", MRC, _NUMPY + "import mrcfile",
        "with mrcfile.new_mmap(path, frames.shape, mrc_mode=6) as file:\n"
        "    mark()\n"
        "    for number, frame in enumerate(frames):\n"
        "        file.data[number] = frame\n"
        "        mark()",
    ),
    Live("h5py, v0", "x.h5", HDF5, _NUMPY + "import h5py", _H5PY.format(**_PLAIN, **_GROWING)),
    Live("h5py, v0, spilling", "x.h5", HDF5, _NUMPY + "import h5py\nframes = numpy.repeat(frames, 20, 0)",
         _H5PY.format(**{**_PLAIN, "layout": ", rdcc_nbytes=100_000"}, **_GROWING)),
    Live("h5py, v0 with flush", "x.h5", HDF5, _NUMPY + "import h5py",
         _H5PY.format(**{**_PLAIN, "flush": "file.flush()"}, **_GROWING)),
    Live("h5py, contiguous with flush", "x.h5", HDF5, _NUMPY + "import h5py",
         _H5PY.format(**{**_PLAIN, "flush": "file.flush()"}, shape="(6, 64, 48)", grow="pass")),
    Live("h5py, latest", "x.h5", HDF5, _NUMPY + "import h5py",
         _H5PY.format(**{**_PLAIN, "layout": ", libver='latest'", "flush": "file.flush()"}, **_GROWING)),
    Live(
        "h5py, SWMR", "x.h5", HDF5, _NUMPY + "import h5py",
        _H5PY.format(layout=", libver='latest'", start="file.swmr_mode = True", flush="file.flush()", **_GROWING),
    ),
    Live(
        "h5py, appends to a finished file", "x.h5", HDF5, _NUMPY + "import h5py",
        "with h5py.File(path, 'a') as file:\n"
        "    for number in range(3):\n"
        "        file[f'more{number}'] = frames\n"
        "        file.flush()",
        before="with h5py.File(path, 'w') as file: file['x'] = frames",
    ),
    Live("simulator, TIFF movie", "x.tif", TIFF, _SIMULATOR,
         "simulator.tiff_movie(path, frames=6, width=31, height=33, pause=quick)"),
    Live("simulator, MRC movie", "x.mrc", MRC, _SIMULATOR,
         "simulator.mrc_movie(path, frames=6, width=32, height=32, pause=quick)"),
    Live("simulator, CBF image", "x.cbf", CBF, _SIMULATOR,
         "simulator.cbf_image(path, width=64, height=64, pause=quick)"),
    Live("simulator, companion XML", "x.xml", (("xml", {}),), _SIMULATOR,
         "simulator.companion_xml(path, movie='x', pause=quick)"),
    *(
        Live(f"simulator, HDF5 {manner}", "x.h5", HDF5, _SIMULATOR,
             f"simulator_hdf5.hdf5_file(path, images=6, width=64, height=48, pause=quick, manner={manner!r})")
        for manner in ("v0", "v0-flush", "contiguous", "swmr")
    ),
    *(
        Live(f"simulator, Eiger set, {libver}", "x_master.h5", EIGER, _SIMULATOR,
             "simulator_hdf5.eiger_set(path.parent, series='x', images=12, per_file=5, width=16, height=8, "
             f"pause=quick, libver={libver!r})")
        for libver in ("earliest", "latest")
    ),
)


# ------------------------------------------------------------------------- a writer, call by call

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_GOOD_AND_EXITKILL = 0x00100001  # a stop at a call is told from a signal; the child ends with us
_WALL = 0x40000000

_CHILD = """
import ctypes, os, signal, sys
from pathlib import Path
path, mark = Path(sys.argv[1]), os.getppid
{imports}
{before}
ctypes.CDLL(None).ptrace({traceme}, 0, 0, 0)
os.kill(os.getpid(), signal.SIGSTOP)
{writes}
"""


def states(live: Live, path: Path) -> Iterator[dict[str, bytes]]:
    """Run the writer, and yield the contents of its directory in each state that differs from the one before."""
    program = _CHILD.format(imports=live.imports, before=live.before, writes=live.writes, traceme=_TRACEME)
    child = subprocess.Popen([sys.executable, "-P", "-c", program, str(path)], stderr=subprocess.PIPE)
    assert child.stderr
    last: dict[str, bytes] | None = None
    forward = 0
    try:
        status = _wait(child)
        assert os.WIFSTOPPED(status), child.stderr.read().decode()
        _ptrace(_SETOPTIONS, child.pid, _GOOD_AND_EXITKILL)
        for _ in range(CALLS_MAX):
            now = {found.name: found.read_bytes() for found in sorted(path.parent.iterdir())}
            if now != last:
                last = now
                yield now
            _ptrace(_SYSCALL, child.pid, forward)
            status = _wait(child)
            if not os.WIFSTOPPED(status):
                break
            stopped_by = os.WSTOPSIG(status)
            forward = 0 if stopped_by & 0x80 else stopped_by
        assert os.waitstatus_to_exitcode(status) == 0, child.stderr.read().decode()
        child.returncode = 0
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
        child.stderr.close()


def _wait(child: subprocess.Popen[bytes]) -> int:
    return os.waitpid(child.pid, _WALL)[1]


def _ptrace(request: int, pid: int, data: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes, call.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    if call(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


# ------------------------------------------------------------------------- what the checks say of it


@dataclass
class Seen:
    """What one check said of a writer's states; `early`: the states, short of the last, that it called complete."""

    said: Counter[str] = field(default_factory=Counter)
    early: list[str] = field(default_factory=list)
    last: str = ""


def judge(path: Path, check: str, options: dict[str, Any], known: dict[bytes, Judged]) -> Judged:
    """Judge the file as the core does, with the files that it needs; a master that is unchanged is not asked again."""
    content = path.read_bytes()
    with Probe(path) as probe:
        state = probe.state()

    def run(there: dict[str, str]) -> Judged:
        return run_checks(path, state, ((check, options),), there, registry.find_check)

    if content not in known:
        known[content] = run({})
    first = known[content]
    there = {name: str(path.parent / name) for name in first.needs if (path.parent / name).exists()}
    return run(there) if first.needs and len(there) == len(first.needs) else first


def watch(live: Live, directory: Path) -> dict[str, Seen]:
    """Run a writer, and every check at each of its states."""
    path = directory / live.file
    seen = {_named(check, options): Seen() for check, options in live.checks}
    known: dict[str, dict[bytes, Judged]] = {name: {} for name in seen}
    said: dict[str, list[tuple[Judged, dict[str, bytes]]]] = {name: [] for name in seen}
    first: dict[str, bytes] = {}
    for number, now in enumerate(states(live, path)):
        assert number < STATES_MAX
        first = first or now
        if live.file not in now or (now == first and live.before != "pass"):
            continue  # not there yet; or still the finished file that it began with
        for check, options in live.checks:
            name = _named(check, options)
            said[name].append((judge(path, check, options, known[name]), now))
    for name, looks in said.items():
        final = looks[-1][1]
        assert all(path.parent.joinpath(one).read_bytes() == data for one, data in final.items())
        for judged, now in looks[:-1]:
            seen[name].said[str(judged.verdict)] += 1
            if judged.verdict is Verdict.COMPLETE and any(now.get(one) != data for one, data in final.items()):
                seen[name].early.append(judged.why)
        seen[name].last = f"{looks[-1][0].verdict}: {looks[-1][0].why}"
    return seen


def _named(check: str, options: dict[str, Any]) -> str:
    said = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
    return f"{check}: {{{said}}}" if options else check


@pytest.mark.parametrize("live", LIVE, ids=lambda live: live.name)
def test_no_check_is_early_but_for_its_blind_spots(live: Live, tmp_path: Path) -> None:
    """Complete is said of no state but the last, except where BLIND says why; and of the last it is said."""
    directory = tmp_path / "d"
    directory.mkdir()
    seen = watch(live, directory)

    blind = {check for writer, check in BLIND if writer == live.name}

    assert {name for name, one in seen.items() if one.early} == blind
    assert [one.last for one in seen.values() if not one.last.startswith("complete")] == []


@pytest.mark.parametrize("live", [one for one in LIVE if one.checks == TIFF], ids=lambda live: live.name)
def test_the_expected_number_takes_the_blindness_from_tiff(live: Live) -> None:
    """No TIFF check that is given the number of frames is among the blind spots."""
    assert not any(key[0] == live.name and "frames" in key[1] for key in BLIND)


def test_every_flushed_old_style_file_is_suspect_not_complete(tmp_path: Path) -> None:
    """After each flush the header says that all is there; the flag alone tells, and it is no proof."""
    flushed = next(live for live in LIVE if live.name == "h5py, v0 with flush")
    seen = watch(flushed, tmp_path)["hdf5"]

    assert set(seen.said) == {"incomplete", "suspect"}
    assert seen.said["suspect"] >= 6


def table() -> str:
    """Return what the checks said of all writers, in Markdown."""
    head = ["writer", "check", "states before the last", *VERDICTS, "after the last byte", "blind spot"]
    rows = [head, ["---"] * len(head)]
    for live in LIVE:
        with tempfile.TemporaryDirectory() as directory:
            for name, seen in watch(live, Path(directory)).items():
                counts = [str(seen.said[verdict]) for verdict in VERDICTS]
                blind = BLIND.get((live.name, name), "")
                rows.append([live.name, f"`{name}`", str(seen.said.total()), *counts, seen.last, blind])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
