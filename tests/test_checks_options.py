"""Laws of what checks compare with: a rule's number, the mdoc, siblings, a done file, a lease, a digest in the file."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from formats import Bytes, cbf_of, eer_of, judge, look, mrc_header, tiff_of, verdict
from trigger_daemon import probe as probing
from trigger_daemon import registry
from trigger_daemon.checks import Outcome, cbf, eer, marker, mrc, size, tiff, writer
from trigger_daemon.checks._mdoc import BYTES_MAX
from trigger_daemon.checks._siblings import usual
from trigger_daemon.config import parse_rules
from trigger_daemon.core.grammar import OptionFault
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import Probe, run_checks

INCOMPLETE, SUSPECT, UNKNOWN, COMPLETE = Verdict.INCOMPLETE, Verdict.SUSPECT, Verdict.UNKNOWN, Verdict.COMPLETE
MDOC, SIBLINGS = {"frames": "mdoc"}, {"frames": "siblings"}


def stack_of(frames: int) -> bytes:
    return mrc_header(6, 5, frames, 2) + b"x" * (6 * 5 * 4 * frames)


MOVIES: list[tuple[ModuleType, Callable[[int], bytes]]] = [
    (tiff, tiff_of), (mrc, stack_of), (eer, lambda frames: eer_of(frames, frames)),
]
each_format = pytest.mark.parametrize(("check", "movie"), MOVIES, ids=["tiff", "mrc", "eer"])


# ------------------------------------------------------------------------- frames: mdoc


def section(path: str, frames: int, kind: str = "ZValue = 0") -> str:
    return f"[{kind}]\r\nSubFramePath = {path}\r\nNumSubFrames = {frames}\r\nDateTime = 06-Dec-20  13:05:20\r\n"


def with_mdoc(text: str, *, name: str = "x.tif", mdoc: str = "x.tif.mdoc", frames: int = 5) -> Outcome:
    return look(tiff, Bytes(tiff_of(frames), name), MDOC, {mdoc: text.encode()})


@each_format
def test_a_movie_has_as_many_frames_as_its_mdoc_says(check: ModuleType, movie: Callable[[int], bytes]) -> None:
    """Fewer are proof, more are suspect."""
    beside = {"x.mdoc": section(r"X:\a\x", 5, "FrameSet = 0").encode()}
    found = {n: look(check, Bytes(movie(n)), MDOC, beside) for n in (4, 5, 6)}

    assert {n: one.verdict for n, one in found.items()} == {4: INCOMPLETE, 5: COMPLETE, 6: SUSPECT}
    assert found[4].why.startswith("4 of 5 frames")
    assert found[6].why == "6 frames where 5 were expected"
    assert {(one.needs, one.measure) for one in found.values()} == {((), None)}


@each_format
def test_without_an_mdoc_it_is_asked_for(check: ModuleType, movie: Callable[[int], bytes]) -> None:
    """By the name that SerialEM gives it; nothing else is said of the file."""
    found = look(check, Bytes(movie(5), "m_001.tif"), MDOC)

    assert found == Outcome(INCOMPLETE, "its mdoc m_001.tif.mdoc is not there yet", ("m_001.tif.mdoc",))


@pytest.mark.parametrize(
    "path",
    [
        r"D:\DATA\s\frames\x.tif", r"\\host\StorageServer\OffloadData\\TemScripting\x.tif", "/data/s/frames/x.tif",
        "x.tif", r"D:/mixed\x.tif", r"D:\DATA\X.TIF", r"D:\DATA\x.tif   ",
    ],
)
def test_the_section_of_a_file_is_found_by_its_base_name(path: str) -> None:
    """Whatever the separators and the case, and whichever other sections there are."""
    series = section(r"D:\DATA\ax.tif", 7) + "\r\n" + section(path, 5) + "\r\n" + section(r"D:\x.tif\b.tif", 9)

    assert with_mdoc(series).verdict is COMPLETE
    assert with_mdoc(series.replace("\r\n", "\n"), mdoc="Position_1.mdoc").verdict is COMPLETE
    assert with_mdoc(series, frames=4).verdict is INCOMPLETE


def test_of_two_sections_of_one_file_the_last_counts() -> None:
    """A tilt that was taken again is written at the end."""
    assert with_mdoc(section("x.tif", 3) + section("b.tif", 4) + section("x.tif", 5)).verdict is COMPLETE


def test_a_lone_frame_set_is_believed_by_the_name_of_its_mdoc() -> None:
    """Files are renamed together with their mdoc, which still tells the old name; any other must name the file."""
    renamed = section(r"X:\old_name.tif", 5, "FrameSet = 0")
    with_sections = renamed + "[ZValue = 0]\r\nMean = 1\r\n[ZValue = 1]\r\nMean = 2\r\n"

    assert with_mdoc(renamed).verdict is COMPLETE
    assert with_mdoc(with_sections).verdict is COMPLETE
    assert with_mdoc(renamed, mdoc="other.mdoc").verdict is SUSPECT
    assert with_mdoc("[ZValue = 0]\r\nNumSubFrames = 5\r\n", mdoc="other.mdoc").verdict is COMPLETE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "x.tif.mdoc says nothing about it"),
        ("T = SerialEM\r\n", "x.tif.mdoc says nothing about it"),
        (section("a.tif", 5) + section("b.tif", 5), "x.tif.mdoc says nothing about it"),
        (section(r"D:\s\TS_1_000.tif", 5), "x.tif.mdoc says nothing about it"),
        ("[FrameSet = 0]\r\nSubFramePath = x.tif\r\n", "x.tif.mdoc has no NumSubFrames for it"),
        ("[FrameSet = 0]\r\nNumSubFrames = 5", "x.tif.mdoc has no NumSubFrames for it"),  # of 57, perhaps
        ("[FrameSet = 0]\r\nNumSubFrames = none\r\n", "x.tif.mdoc has no NumSubFrames for it"),
        ("[FrameSet = 0]\r\nNumSubFrames = 0\r\n", "x.tif.mdoc has no NumSubFrames for it"),
        ("#" * (BYTES_MAX + 1), "x.tif.mdoc is too large to be looked at (4.2 MB)"),
    ],
    ids=range(9),
)
def test_an_mdoc_that_does_not_say_it_makes_a_file_suspect(text: str, why: str) -> None:
    """Never complete; and a file that is cut stays incomplete all the same."""
    assert with_mdoc(text) == Outcome(SUSPECT, f"5 frames, but {why}")
    assert look(tiff, Bytes(tiff_of(5)[:-1], "x.tif"), MDOC, {"x.tif.mdoc": text.encode()}).verdict is INCOMPLETE
    assert look(mrc, Bytes(stack_of(5), "x.tif"), MDOC, {"x.tif.mdoc": text.encode()}).verdict is SUSPECT
    assert look(eer, Bytes(eer_of(5, 5), "x.tif"), MDOC, {"x.tif.mdoc": text.encode()}).verdict is SUSPECT


def test_which_mdoc_is_read() -> None:
    """The file's own; else the only one, wherever it lies; of several others none is chosen."""
    own, other = section("x.tif", 5).encode(), section("x.tif", 9).encode()
    movie = Bytes(tiff_of(5), "x.tif")

    assert look(tiff, movie, MDOC, {"a.mdoc": other, "x.tif.mdoc": own, "b.mdoc": other}).verdict is COMPLETE
    assert look(tiff, movie, MDOC, {"../series/TS_1.mdoc": own, "x.xml": b""}).verdict is COMPLETE
    assert look(tiff, movie, MDOC, {"X.MDOC": own}).verdict is COMPLETE
    assert look(tiff, movie, MDOC, {"a.mdoc": own, "b.mdoc": own}).needs == ("x.tif.mdoc",)


def test_a_name_that_is_no_utf8_is_found_in_an_mdoc(tmp_path: Path) -> None:
    """Compared as both can be written."""
    path = tmp_path / os.fsdecode(b"caf\xe9.tif")
    path.write_bytes(tiff_of(5))
    mdoc = tmp_path / "s.mdoc"
    mdoc.write_bytes(section("other.tif", 4).encode() + section("?", 5).encode().replace(b"?", b"X:\\caf\xe9.tif"))
    with Probe(path) as window, Probe(mdoc) as beside:
        assert tiff.check(window, MDOC, {"s.mdoc": beside}).verdict is COMPLETE


# ------------------------------------------------------------------------- siblings


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        ((), None), ((40,), None), ((40, 40), None), ((40, 40, 40), 40), ((17, 40, 40, 40), 40),
        ((40, 40, 40, 40, 40, 40, 20, 20, 20), 20),  # a new setting is learnt from three files
        ((40, 40, 40, 40, 17, 20), 40), ((40, 17, 40, 20, 40), 40), ((40, 40, 20, 20), None), ((1, 2, 3, 4), None),
        ((40, 20, 40, 20, 40, 20), 20), ((20, 40, 20, 40, 20, 40), 40),  # of equally many the newer
    ],
)
def test_what_is_usual_among_siblings(measures: tuple[int, ...], expected: int | None) -> None:
    """The newest three if they agree; else what most have, if three do."""
    assert usual(measures) == expected


@each_format
def test_a_movie_with_another_number_than_its_siblings_is_suspect(
    check: ModuleType, movie: Callable[[int], bytes]
) -> None:
    """More or fewer; what siblings have is no proof. The number found is told, for siblings to come."""
    found = {n: look(check, Bytes(movie(n), siblings=(12, 12, 12)), SIBLINGS) for n in (7, 12, 13)}

    assert {n: one.verdict for n, one in found.items()} == {7: SUSPECT, 12: COMPLETE, 13: SUSPECT}
    assert found[7].why == "7 frames where its siblings have 12"
    assert {n: one.measure for n, one in found.items()} == {7: 7, 12: 12, 13: 13}


@each_format
def test_without_enough_siblings_nothing_is_known(check: ModuleType, movie: Callable[[int], bytes]) -> None:
    """The first files of a rule, and those after a change; they are measured all the same."""
    few = look(check, Bytes(movie(7), siblings=(7, 7)), SIBLINGS)
    many = look(check, Bytes(movie(7), siblings=(7, 8, 9)), SIBLINGS)

    assert few == Outcome(UNKNOWN, "7 frames, but only 2 of 3 siblings to compare with so far", measure=7)
    assert many == Outcome(UNKNOWN, "7 frames, but its siblings do not agree (7, 8, 9)", measure=7)


@each_format
def test_a_number_by_rule_is_not_measured(check: ModuleType, movie: Callable[[int], bytes]) -> None:
    """Nothing is remembered that no one asks for; and siblings do not matter then."""
    assert look(check, Bytes(movie(7), siblings=(9, 9, 9)), {"frames": 7}).measure is None
    assert look(check, Bytes(movie(7), siblings=(9, 9, 9)), {"frames": 7}).verdict is COMPLETE


def test_a_cut_movie_is_incomplete_whatever_its_siblings_have() -> None:
    """Proof outweighs likeness."""
    assert look(tiff, Bytes(tiff_of(7)[:-1], siblings=(7, 7, 7)), SIBLINGS).verdict is INCOMPLETE
    assert look(mrc, Bytes(stack_of(7)[:-1], siblings=(7, 7, 7)), SIBLINGS).verdict is INCOMPLETE
    assert look(eer, Bytes(eer_of(6, 7), siblings=(6, 6, 6)), SIBLINGS).verdict is INCOMPLETE


def test_siblings_come_through_the_run_of_the_checks(tmp_path: Path) -> None:
    """Each check gets its own, and its measure comes back under its name."""
    path = tmp_path / "x.tif"
    path.write_bytes(tiff_of(4))
    with Probe(path) as probe:
        state = probe.state()
    asked = (("tiff", SIBLINGS), ("size", {"siblings": 0.05}))
    judged = run_checks(path, state, asked, {}, registry.find_check, {"tiff": (4, 4, 4), "size": (9000, 9000, 9000)})

    assert judged.why == f"{state[0]:,} bytes where its siblings have 9,000 bytes"
    assert judged.measures == (("tiff", 4), ("size", state[0]))


# ------------------------------------------------------------------------- eer


def test_an_eer_is_a_bigtiff_of_its_own_compressions() -> None:
    """Anything else under this name is suspect; `tiff` takes both."""
    assert judge(eer, tiff_of(3)) == Outcome(SUSPECT, "a TIFF, but no EER, which is a BigTIFF")
    why = "a TIFF, but no EER: its first frame has compression 5"
    assert judge(eer, tiff_of(3, big=True, compression=5)) == Outcome(SUSPECT, why)
    for compression in (65_000, 65_001, 65_002):
        assert verdict(eer, tiff_of(3, big=True, compression=compression), frames=3) is COMPLETE
    assert verdict(tiff, eer_of(3, 3)) is COMPLETE


def test_an_eer_that_announces_nothing_needs_a_number() -> None:
    """Cut after any frame it would look whole."""
    silent = tiff_of(3, big=True, compression=65_001)

    assert verdict(eer, silent) is UNKNOWN
    assert verdict(eer, silent, frames=3) is COMPLETE
    assert verdict(eer, silent, frames=4) is INCOMPLETE


def test_the_final_sum_of_an_eer_is_no_frame() -> None:
    """One directory more than frames is legal, of another compression."""
    assert judge(eer, eer_of(8, 8, final=True)).why.startswith("8 of 8 frames")
    assert verdict(eer, eer_of(7, 8, final=True)) is INCOMPLETE
    assert judge(eer, eer_of(9, 8)) == Outcome(SUSPECT, "9 frames where it announces 8")
    assert verdict(eer, eer_of(8, 8, final=True), frames=9) is INCOMPLETE


def test_directories_without_values_elsewhere_cost_few_bytes() -> None:
    """A movie of 4,000 frames is within the budget of reads: one a frame, and 200 bytes each."""
    window = Bytes(eer_of(4000, 4000))

    assert eer.check(window, {}, {}).verdict is COMPLETE
    assert window.reads <= 4_010
    assert window.bytes_read < 4000 * 200


# ------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("length", "siblings", "expected"),
    [
        (100, (100, 100, 100), COMPLETE), (105, (100, 100, 100), COMPLETE), (95, (100, 100, 100), COMPLETE),
        (106, (100, 100, 100), SUSPECT), (94, (100, 100, 100), SUSPECT), (0, (100, 100, 100), SUSPECT),
        (100, (1, 100, 100_000), COMPLETE), (102, (90, 95, 105, 110), COMPLETE), (94, (90, 95, 105, 110), SUSPECT),
        (100, (100, 100), UNKNOWN), (100, (), UNKNOWN), (0, (0, 0, 0), COMPLETE), (1, (0, 0, 0), SUSPECT),
    ],
)
def test_a_size_like_its_siblings(length: int, siblings: tuple[int, ...], expected: Verdict) -> None:
    """Within the tolerance of their median; three are needed. It is measured in any case."""
    found = look(size, Bytes(bytes(length), siblings=siblings), {"siblings": 0.05})

    assert (found.verdict, found.measure) == (expected, length)


def test_a_size_beside_its_siblings_carries_both_numbers() -> None:
    """To the byte where rounding would hide the difference."""
    options = {"siblings": 0.05}
    found = look(size, Bytes(bytes(84_000), siblings=(168_000,) * 3), options)
    near = look(size, Bytes(bytes(50_010), siblings=(50_000,) * 3), {"siblings": 0.0})

    assert found.why == "84.0 kB where its siblings have 168.0 kB"
    assert near.why == "50,010 bytes where its siblings have 50,000 bytes"


def test_other_bounds_of_a_size_decide_where_siblings_cannot() -> None:
    """And their proof comes first."""
    options = {"siblings": 0.05, "at_least": 100}

    assert look(size, Bytes(bytes(100)), options).verdict is COMPLETE
    assert look(size, Bytes(bytes(99), siblings=(99, 99, 99)), options).verdict is INCOMPLETE
    assert look(size, Bytes(bytes(200), siblings=(100, 100, 100)), options).verdict is SUSPECT
    assert look(size, Bytes(bytes(200)), {"exactly": 200, "siblings": 0.05}).verdict is COMPLETE


def test_a_size_without_anything_to_compare_with_is_a_fault_of_the_rule() -> None:
    """Any one of the three will do."""
    with pytest.raises(OptionFault, match="no size to compare with"):
        size.check_options({"at_least": None, "exactly": None, "siblings": None})
    for name in size.OPTIONS:
        size.check_options(dict.fromkeys(size.OPTIONS) | {name: 0})


# ------------------------------------------------------------------------- marker


@pytest.mark.parametrize(
    ("file", "name", "wanted"),
    [
        ("{stem}.done", "x.tif", "x.done"), ("{name}.done", "x.tif", "x.tif.done"), ("{stem}.done", "x", "x.done"),
        ("{stem}.done", "x.tar.gz", "x.tar.done"), ("{stem}.done", ".x", ".x.done"), ("run.done", "x.tif", "run.done"),
        ("{stem}_{name}", "x.tif", "x_x.tif"), ("done/{name}", "x.tif", "done/x.tif"), (None, "x.tif", "x.done"),
        ("{stem}.done", "{name}.tif", "{name}.done"),
    ],
)
def test_a_done_file_is_asked_for_until_it_is_there(file: str | None, name: str, wanted: str) -> None:
    """An empty one says as much as any."""
    options = {"file": file}
    marker.check_options(options)

    assert look(marker, Bytes(b"x", name), options) == Outcome(
        INCOMPLETE, f"its done file {wanted} is not there yet", (wanted,)
    )
    assert look(marker, Bytes(b"x", name), options, {wanted: b""}).verdict is COMPLETE


@pytest.mark.parametrize(
    "file",
    ["/done/{stem}", "../{stem}.done", "a/../b", "{movie}.done", "{stem", "stem}", "{}", "{{stem}}", "{name}", "",
     "a//b", "./{stem}.done", "done/", "a\0b"],
)
def test_a_name_that_cannot_be_a_done_files_is_a_fault_of_the_rule(file: str) -> None:
    """Told when the rule is loaded, not while files wait for it."""
    with pytest.raises(OptionFault) as fault:
        marker.check_options({"file": file})

    assert fault.value.option == "file"
    assert look(marker, Bytes(b"x", "x.tif"), {"file": file}).verdict is SUSPECT


def test_a_file_is_not_its_own_done_file() -> None:
    """It would wait for itself."""
    assert look(marker, Bytes(b"x", "x"), {"file": "{stem}"}, {"x": b"x"}).verdict is SUSPECT


# ------------------------------------------------------------------------- what rules accept


@pytest.mark.parametrize(
    ("checks", "fault"),
    [
        ("[tiff: {frames: 40}, eer: {frames: mdoc}, mrc: {frames: siblings}]", ""),
        ("[size: {siblings: 5%}, marker: {file: '{stem}.done'}, writer, eer, marker]", ""),
        ("[tiff: {frames: 0}]", "frames"),
        ("[tiff: {frames: many}]", "frames"),
        ("[size]", "size"),
        ("[size: {siblings: 5}]", "siblings"),
        ("[marker: {file: ../x.done}]", "../x.done"),
        ("[marker: {file: '{movie}.done'}]", "{movie}.done"),
    ],
)
def test_rules_with_these_options(checks: str, fault: str, tmp_path: Path) -> None:
    """What can never work is a fault where the rule is read."""
    text = f"""
rules:
  - name: movies
    watch: {tmp_path}
    match: ["{{movie}}.tif"]
    existing: process
    complete: {{checks: {checks}}}
    start: {{command: {{run: [/bin/true]}}}}
"""
    faults = [found.message for found in parse_rules([("x.yaml", text)]).faults]

    assert len(faults) == bool(fault)
    assert all(fault in message for message in faults)


# ------------------------------------------------------------------------- cbf


def test_a_cbf_hands_on_the_md5_of_its_payload() -> None:
    """As digits, with where the payload lies: what it says can be proved without knowing the format."""
    payload = bytes(range(256)) * 3
    data = cbf_of(payload, padding=30)
    kind, digest, offset, length = judge(cbf, data).content.split(":")
    part = data[int(offset) : int(offset) + int(length)]

    assert (kind, part) == ("md5", payload)
    assert digest == hashlib.md5(part, usedforsecurity=False).hexdigest()
    assert judge(cbf, data, md5=True).content == judge(cbf, data).content


def test_the_first_section_with_an_md5_is_handed_on() -> None:
    """One part of a file has one digest."""
    mixed = cbf_of(b"plain" * 9, md5=False) + cbf_of(b"second" * 9) + cbf_of(b"third" * 9)

    assert judge(cbf, mixed).content.endswith(f":{mixed.index(b'secondsecond')}:54")


def test_only_a_whole_cbf_hands_on_an_md5() -> None:
    """Not one that is cut, or damaged, or carries none, or one that cannot be an MD5."""
    data = cbf_of(b"payload" * 20)
    begin = data.index(b"Content-MD5: ") + len(b"Content-MD5: ")
    odd = data[:begin] + b"A" * 24 + data[begin + 24 :]  # 18 bytes
    broken = data[:begin] + b"A=" * 12 + data[begin + 24 :]

    assert judge(cbf, data[:-20]).content == ""
    assert judge(cbf, data.replace(b"payload", b"Payload", 1), md5=True) == Outcome(
        INCOMPLETE, judge(cbf, data.replace(b"payload", b"Payload", 1), md5=True).why
    )
    assert judge(cbf, data + b"\0garbage").content == ""
    assert judge(cbf, cbf_of(b"payload" * 20, md5=False)).content == ""
    assert [(judge(cbf, one).verdict, judge(cbf, one).content) for one in (odd, broken)] == [(COMPLETE, "")] * 2


# ------------------------------------------------------------------------- writer


def open_for_writing(path: Path) -> Outcome:
    with Probe(path) as probe:
        return writer.check(probe, {}, {})


@contextmanager
def elsewhere(path: Path, program: str) -> Iterator[None]:
    """Let another program do something with the file, and keep it so."""
    text = f"import mmap, os, sys\npath = sys.argv[1]\n{program}\nprint('ready', flush=True)\nsys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", text, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout
    try:
        assert child.stdout.readline() == "ready\n"
        yield
    finally:
        child.stdin.close()
        child.stdout.close()
        assert child.wait(30) == 0


@pytest.fixture
def leasable(tmp_path: Path) -> Path:
    path = tmp_path / "x.tif"
    path.write_bytes(b"x" * 9000)
    return path


MAPPED = "with open(path, 'r+b') as file: held = mmap.mmap(file.fileno(), 0)"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("held = open(path, 'r+b')", INCOMPLETE), ("held = open(path, 'ab')", INCOMPLETE),
        ("held = os.open(path, os.O_WRONLY)", INCOMPLETE), (MAPPED, INCOMPLETE),
        ("held = open(path, 'rb')", COMPLETE), ("with open(path, 'ab') as file: file.write(b'x')", COMPLETE),
        ("with open(path, 'rb') as file: held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)", COMPLETE),
    ],
    ids=["r+", "append", "write only", "writable map, closed", "reader", "writer that has closed", "map of a reader"],
)
def test_a_program_that_may_write_is_seen(program: str, expected: Verdict, leasable: Path) -> None:
    """Whoever holds a descriptor or a map that can write, and nobody else; when it is gone, so is the verdict."""
    with elsewhere(leasable, program):
        assert open_for_writing(leasable).verdict is expected

    assert open_for_writing(leasable) == Outcome(COMPLETE, "no program has it open for writing")


def test_a_writer_of_our_own_is_seen(leasable: Path) -> None:
    """A descriptor that may write, in the same process; a map that outlives it."""
    with leasable.open("r+b") as file:
        assert open_for_writing(leasable).verdict is INCOMPLETE
        held = mmap.mmap(file.fileno(), 0)
    assert open_for_writing(leasable).verdict is INCOMPLETE
    held.close()

    assert open_for_writing(leasable).verdict is COMPLETE


def test_the_lease_disturbs_neither_writers_nor_us(leasable: Path) -> None:
    """Writers come and go while leases are taken without a break: nobody is refused, nobody dies, none is kept."""
    over = threading.Event()
    refused: list[OSError] = []

    def write() -> None:
        while not over.is_set():
            try:
                os.close(os.open(leasable, os.O_WRONLY))
            except OSError as error:
                refused.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    with Probe(leasable) as probe:
        said = [probe.writers() for _ in range(3000)]
    over.set()
    for thread in threads:
        thread.join()

    assert refused == []
    assert set(said) <= {True, False}
    assert open_for_writing(leasable).verdict is COMPLETE


def test_breaking_a_lease_does_not_end_the_process(leasable: Path) -> None:
    """A writer that comes while it is held is refused if it does not block, and else waits until it is given back.

    The signal that the kernel sends for it would be deadly if nothing were done about it.
    """
    program = f"""
import errno, fcntl, os, subprocess, sys, threading
from trigger_daemon import probe
fd = os.open({str(leasable)!r}, os.O_RDONLY)
real = fcntl.fcntl
came = threading.Event()

def writer():
    os.close(os.open({str(leasable)!r}, os.O_WRONLY))
    came.set()

def breaking(held, command, argument=0):
    if command == fcntl.F_SETLEASE and argument == fcntl.F_UNLCK:
        try:
            os.open({str(leasable)!r}, os.O_WRONLY | os.O_NONBLOCK)
        except BlockingIOError:
            print("refused", flush=True)
        threading.Thread(target=writer).start()
        assert not came.wait(0.2)
    return real(held, command, argument)

fcntl.fcntl = breaking
print(probe._leased(fd, os.fsencode({str(leasable)!r})), came.wait(20), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)

    assert (done.returncode, done.stdout.split()) == (0, ["refused", "False", "True"]), done.stderr


def test_a_lease_that_the_kernel_took_away_is_a_writer(leasable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is when this process stood still for longer than lease-break-time while a writer waited."""
    real = probing.fcntl.fcntl

    def taken(fd: int, command: int, argument: int = 0) -> int:
        if (command, argument) == (probing.fcntl.F_SETLEASE, probing.fcntl.F_UNLCK):
            real(fd, command, argument)
            raise OSError(errno.EAGAIN, "no lease")
        return int(real(fd, command, argument))

    monkeypatch.setattr(probing.fcntl, "fcntl", taken)

    assert open_for_writing(leasable).verdict is INCOMPLETE


def test_where_no_lease_can_be_had_nothing_is_said() -> None:
    """The file of somebody else, a share, another system."""
    found = writer.check(Bytes(b"x"), {}, {})

    assert found.verdict is UNKNOWN
    assert "only for one's own files or with CAP_LEASE, and on a local Linux disk" in found.why


def test_writer_reads_nothing_and_has_no_options(leasable: Path) -> None:
    """Off unless a rule names it."""
    with Probe(leasable) as probe:
        writer.check(probe, {}, {})
        assert (probe.reads, probe.bytes_read, writer.OPTIONS) == (0, 0, {})


def test_all_words_are_for_people() -> None:
    """No option, class or Python word in what a microscopist reads at night."""
    said: list[Any] = [
        look(marker, Bytes(b"x"), {}), look(writer, Bytes(b"x", open_for_writing=True), {}),
        look(size, Bytes(b"x", siblings=(9, 9, 9)), {"siblings": 0.1}),
    ]

    assert [one.why for one in said] == [
        "its done file x.done is not there yet", "a program has it open for writing",
        "1 byte where its siblings have 9 bytes",
    ]


def rules_faults(**rule: Any) -> list[str]:
    base = {"name": "r", "watch": "/data", "match": ["{x}.cbf"], "existing": "process"}
    read = parse_rules([("r.yaml", json.dumps({"rules": [{**base, **rule}]}))])
    return [fault.message for fault in read.faults]


@pytest.mark.parametrize("check", ["marker", "eiger", {"tiff": {"frames": "mdoc"}}, {"eer": {"frames": "mdoc"}}])
def test_a_companions_check_that_asks_for_other_files_is_refused(check: Any) -> None:
    """It would never get them; with a number it asks for nothing."""
    start = {"copy": {"to": "/out"}}
    (fault,) = rules_faults(complete={"with": [{"file": "{x}.tif", "checks": [check]}]}, start=start)
    assert "asks for other files" in fault

    assert not rules_faults(complete={"with": [{"file": "{x}.tif", "checks": [{"tiff": {"frames": 3}}]}]}, start=start)


def test_a_companion_that_is_named_twice_is_refused() -> None:
    """One file has one verdict."""
    twice = [{"file": "{x}.xml", "checks": [{"size": {"at_least": "5B"}}]}, {"file": "{x}.xml", "checks": ["xml"]}]
    (fault,) = rules_faults(complete={"with": twice}, start={"copy": {"to": "/out"}})
    assert "there twice" in fault

    twice[1]["in"] = "/elsewhere"
    assert not rules_faults(complete={"with": twice}, start={"copy": {"to": "/out"}})


def test_an_own_digest_that_nobody_finds_is_refused() -> None:
    """`own_digest: verify` without `cbf` would prove nothing, in silence."""
    start = {"copy": {"to": "/out", "own_digest": "verify"}}
    (fault,) = rules_faults(start=start)
    assert "nothing would be verified" in fault

    assert not rules_faults(start=start, complete={"checks": ["cbf"]})
    assert not rules_faults(start=start, complete={"with": [{"file": "{x}.b.cbf", "checks": ["cbf"]}]})


def test_an_image_too_large_for_its_md5_still_hands_its_digest_on() -> None:
    """The stricter option proves no less: what a check may not read, the copy verifies."""
    data = cbf_of(bytes(cbf.MD5_BYTES_MAX + 1))
    outcome = look(cbf, Bytes(data), {"md5": True})

    assert (outcome.verdict, outcome.content) == (Verdict.UNKNOWN, look(cbf, Bytes(data), {}).content)
    assert outcome.content
    assert "let the copy verify it" in outcome.why
