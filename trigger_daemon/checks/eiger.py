"""Is an Eiger data set whole: the master, the data files that it names, and as many images as it announces?

The rule matches `*_master.h5` only; the data files are asked for by the check
and travel with it. Their order of arrival does not matter. Two things cannot
be told: a data file of an older series of the same name that holds the same
image numbers, and, with `images: N`, how many images there are in the files.
"""

from __future__ import annotations

import importlib.util
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._hdf5 import CannotTell, Reader, judge
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import ORDER

PER_FILE = 1000  # as the detectors come

OPTIONS: Options = {
    "images": Option(
        "int", "images of a whole set; the master is not read then, and the data files are named by this number",
        minimum=1,
    ),
    "per_file": Option(
        "int", "with `images`: images of a data file, as the detector is set", default=PER_FILE, minimum=1
    ),
}

MASTER = "_master.h5"
FILES_MAX = 10_000  # of one set


class _Link(NamedTuple):
    file: str  # '' for a data set in the master itself
    path: str


class _Master(NamedTuple):
    links: list[_Link]
    images: int | None  # announced


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionFault if the set is impossibly large."""
    images = options.get("images")
    if images is not None and (count := _files(images, options.get("per_file", PER_FILE))) > FILES_MAX:
        raise OptionFault(
            "per_file",
            f"a set of {count:,} data files is more than the {FILES_MAX:,} that a check looks at",
            "give the images per data file that the detector is set to",
        )


def check_usable(options: Mapping[str, Any]) -> None:
    """Raise OptionFault if the master could not be read here."""
    if options.get("images") is None and importlib.util.find_spec("h5py") is None:
        raise OptionFault(
            "",
            "the check eiger reads masters with h5py, which is not installed",
            "install the extra `eiger` (`pip install '.[eiger]'`), or say how many images a set has: images: 3600",
        )


def asks(options: Mapping[str, Any]) -> bool:
    """Say that the check asks for other files."""
    return True


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Look at the header of every file; without `images` read the master, and the numbers of images, with h5py."""
    own = judge(probe)
    if own.verdict in (Verdict.INCOMPLETE, Verdict.UNKNOWN):
        return own
    if options.get("images") is not None:
        found = _by_rule(probe, options["images"], options.get("per_file", PER_FILE), companions)
    else:
        try:
            with Reader() as reader:
                found = _by_master(probe, reader, companions)
        except CannotTell as none:
            found = none.outcome
    return _worst(found, Outcome(own.verdict, own.why, found.needs))


def _by_rule(probe: Window, images: int, per_file: int, companions: Mapping[str, Window]) -> Outcome:
    series = probe.name.removesuffix(MASTER)
    if series == probe.name:
        return Outcome(Verdict.SUSPECT, f"its name does not end with {MASTER}, so its data files cannot be named")
    count = _files(images, per_file)
    if count > FILES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{count:,} data files are too many to be looked at")
    names = [f"{series}_data_{number:06d}.h5" for number in range(1, count + 1)]
    if missing := _missing(names, companions):
        return missing
    worst = _headers(names, companions)
    if worst.verdict is not Verdict.COMPLETE:
        return worst
    whole = f"{_data_files(count)} for {images:,} images by the rule, each closed; images are not counted"
    return Outcome(Verdict.COMPLETE, whole, tuple(names))


def _by_master(probe: Window, reader: Reader, companions: Mapping[str, Window]) -> Outcome:
    said = reader.ask(probe, do="master")
    master = _understood(said, probe.name)
    if isinstance(master, Outcome):
        return master
    names = tuple(dict.fromkeys(link.file for link in master.links if link.file))
    if missing := _missing(names, companions):
        return missing
    headers = _headers(names, companions)
    if headers.verdict is Verdict.INCOMPLETE:
        return headers
    return _worst(_count(probe, master, reader, companions, names), headers)


def _headers(names: Sequence[str], companions: Mapping[str, Window]) -> Outcome:
    """Return what is said of the worst data file; the first that is incomplete is enough."""
    worst = Outcome(Verdict.COMPLETE, "", tuple(names))
    for name in names:
        one = judge(companions[name])
        worst = _worst(worst, Outcome(one.verdict, f"{name}: {one.why}", tuple(names)))
        if worst.verdict is Verdict.INCOMPLETE:
            break
    return worst


def _worst(first: Outcome, *others: Outcome) -> Outcome:
    return max(first, *others, key=lambda outcome: ORDER.index(outcome.verdict))


def _count(
    probe: Window, master: _Master, reader: Reader, companions: Mapping[str, Window], names: tuple[str, ...]
) -> Outcome:
    """Compare the images in the data files with the announced ones."""
    total, after = 0, None
    fewest: tuple[int, str] | None = None  # of all but the last data set, which may be short
    gap = ""
    for link in master.links:
        window, name = (companions[link.file], link.file) if link.file else (probe, probe.name)
        try:
            said = reader.ask(window, do="images", path=link.path)
        except CannotTell as none:
            return Outcome(none.outcome.verdict, f"{name}: {none.outcome.why}", names)
        images, low, high = said.get("images"), said.get("low"), said.get("high")
        if not isinstance(images, int):
            return Outcome(Verdict.SUSPECT, f"{name}: no number of images", names)
        if isinstance(low, int) and isinstance(high, int):
            if after is not None and low != after + 1 and not gap:
                gap = f"{name} begins with image {low:,}, and the one before it ends with image {after:,}"
            after = high
        else:
            after = None
        total += images
        if link is not master.links[-1] and (fewest is None or images < fewest[0]):
            fewest = images, name
    held = f"{total:,} {{}}images in {_data_files(len(names))}" if names else f"{total:,} {{}}images in the master"
    if master.images is None:
        return Outcome(Verdict.UNKNOWN, f"{held.format('')}; the master does not say how many were to come", names)
    if total < master.images:
        where = f"; the fewest, {fewest[0]:,}, in {fewest[1]}" if fewest else ""
        return Outcome(Verdict.INCOMPLETE, held.format(f"of {master.images:,} ") + where, names)
    if total > master.images:
        return Outcome(Verdict.SUSPECT, f"{held.format('')} where {master.images:,} were announced", names)
    if gap:
        return Outcome(Verdict.SUSPECT, f"files of another series? {gap}", names)
    return Outcome(Verdict.COMPLETE, held.format(f"of {master.images:,} "), names)


def _understood(said: Mapping[str, Any], name: str) -> _Master | Outcome:
    """Turn the child's answer into links; what it says is as little to be trusted as the file."""
    links: list[_Link] = []
    for entry in said.get("links") or ():
        if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry)):
            return Outcome(Verdict.SUSPECT, "its links cannot be understood")
        link, file, path = entry
        if file:
            there = posixpath.normpath(file)
            if file.startswith("/") or "\0" in file or there.split("/")[0] == ".." or there in (".", name):
                return Outcome(Verdict.SUSPECT, f"its link {link} leads to {file!r}, no file beside it or below")
            file = there
        links.append(_Link(file, path))
    if not links:
        return Outcome(Verdict.SUSPECT, "it names no data files (/entry/data/data_000001 and on)")
    if len(links) > FILES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{len(links):,} data files are too many to be looked at")
    nimages, ntrigger = said.get("nimages"), said.get("ntrigger")
    if not isinstance(nimages, int):
        return _Master(links, None)
    return _Master(links, nimages * (ntrigger if isinstance(ntrigger, int) else 1))


def _missing(names: Sequence[str], companions: Mapping[str, Window]) -> Outcome | None:
    have = sum(name in companions for name in names)
    if have == len(names):
        return None
    return Outcome(Verdict.INCOMPLETE, f"{have:,} of {_data_files(len(names))}", tuple(names))


def _files(images: int, per_file: int) -> int:
    return -(-images // per_file)


def _data_files(count: int) -> str:
    return f"{count:,} data file{'' if count == 1 else 's'}"
