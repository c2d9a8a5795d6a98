"""Is an Eiger data set whole: the master, the data files that it names, and as many images as it announces?

The rule matches `*_master.h5` only; the data files, and all others that a link
of the master leads to, are asked for by the check and travel with it. Their
order of arrival does not matter. Two things cannot be told: a data file of an
older series of the same name that holds the same image numbers, and, with
`images: N`, how many images there are in the files and what else is linked to.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
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

_SERIES = re.compile(r"(.+)_data_\d{1,9}")  # threshold_2_data_000001


class _Link(NamedTuple):
    name: str
    file: str  # '' for a data set in the master itself
    path: str


class _Master(NamedTuple):
    links: list[_Link]
    images: int | None  # announced
    others: list[_Link]  # to further thresholds, or whatever else
    doubt: str  # a link that is not looked at

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(link.file for link in self.links if link.file))

    @property
    def series(self) -> Mapping[str, list[_Link]]:
        """Return the links of the further thresholds, in order."""
        found: dict[str, list[_Link]] = {}
        for link in sorted(self.others):
            if series := _SERIES.fullmatch(posixpath.basename(link.name)):
                found.setdefault(series[1], []).append(link)
        return found


class _Tally(NamedTuple):
    images: int
    fewest: tuple[int, str] | None  # of all but the last data set, which may be short
    gap: str


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
    names = tuple(dict.fromkeys((*master.files, *(link.file for link in master.others))))
    if len(names) > FILES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{len(names):,} files are too many to be looked at")
    if missing := _missing(names, companions, "data file" if names == master.files else "file"):
        return missing
    headers = _headers(names, companions)
    if headers.verdict is Verdict.INCOMPLETE:
        return headers
    doubt = Outcome(Verdict.UNKNOWN if master.doubt else Verdict.COMPLETE, master.doubt, names)
    return _worst(_count(probe, master, reader, companions, names), headers, doubt)


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
    found = _tally(probe, master.links, reader, companions)
    if isinstance(found, Outcome):
        return Outcome(found.verdict, found.why, names)
    total, files = found.images, len(master.files)
    held = f"{total:,} {{}}images in {_data_files(files)}" if files else f"{total:,} {{}}images in the master"
    if master.images is None:
        return Outcome(Verdict.UNKNOWN, f"{held.format('')}; the master does not say how many were to come", names)
    if total < master.images:
        where = f"; the fewest, {found.fewest[0]:,}, in {found.fewest[1]}" if found.fewest else ""
        return Outcome(Verdict.INCOMPLETE, held.format(f"of {master.images:,} ") + where, names)
    if total > master.images:
        return Outcome(Verdict.SUSPECT, f"{held.format('')} where {master.images:,} were announced", names)
    if found.gap:
        return Outcome(Verdict.SUSPECT, f"files of another series? {found.gap}", names)
    for series, links in master.series.items():
        also = _tally(probe, links, reader, companions)
        if isinstance(also, Outcome):
            return Outcome(also.verdict, also.why, names)
        if also.images != master.images:
            return Outcome(Verdict.SUSPECT, f"{also.images:,} of {master.images:,} images of {series}", names)
    return Outcome(Verdict.COMPLETE, held.format(f"of {master.images:,} "), names)


def _tally(
    probe: Window, links: Sequence[_Link], reader: Reader, companions: Mapping[str, Window]
) -> _Tally | Outcome:
    """Count the images of one series; an Outcome if they cannot be counted."""
    total, after = 0, None
    fewest: tuple[int, str] | None = None
    gap = ""
    for link in links:
        window, name = (companions[link.file], link.file) if link.file else (probe, probe.name)
        try:
            said = reader.ask(window, do="images", path=link.path)
        except CannotTell as none:
            return Outcome(none.outcome.verdict, f"{name}: {none.outcome.why}")
        images, low, high = said.get("images"), said.get("low"), said.get("high")
        if not isinstance(images, int):
            return Outcome(Verdict.SUSPECT, f"{name}: no number of images")
        if isinstance(low, int) and isinstance(high, int):
            if after is not None and low != after + 1 and not gap:
                gap = f"{name} begins with image {low:,}, and the one before it ends with image {after:,}"
            after = high
        else:
            after = None
        total += images
        if link is not links[-1] and (fewest is None or images < fewest[0]):
            fewest = images, name
    return _Tally(total, fewest, gap)


def _understood(said: Mapping[str, Any], name: str) -> _Master | Outcome:
    """Turn the child's answer into links; what it says is as little to be trusted as the file."""
    links, others = _links(said.get("links")), _links(said.get("others"))
    if links is None or others is None:
        return Outcome(Verdict.SUSPECT, "its links cannot be understood")
    for link in links:
        if link.file and not _beside(link.file, name):
            return Outcome(Verdict.SUSPECT, f"its link {link.name} leads to {link.file!r}, no file beside it or below")
    if not links:
        return Outcome(Verdict.SUSPECT, "it names no data files (/entry/data/data_000001 and on)")
    if len(links) > FILES_MAX:
        return Outcome(Verdict.UNKNOWN, f"{len(links):,} data files are too many to be looked at")
    others = [link for link in others if posixpath.normpath(link.file) != name]
    away = next((link for link in others if not _beside(link.file, name)), None)
    doubt = f"its link {away.name} leads to {away.file!r}, which is not looked at" if away else ""
    links = [link._replace(file=link.file and _beside(link.file, name)) for link in links]
    others = [link._replace(file=there) for link in others if (there := _beside(link.file, name))]
    nimages, ntrigger = said.get("nimages"), said.get("ntrigger")
    triggers = ntrigger if isinstance(ntrigger, int) else 1
    return _Master(links, nimages * triggers if isinstance(nimages, int) else None, others, doubt)


def _links(said: Any) -> list[_Link] | None:
    """Return links; None if they are none."""
    found: list[_Link] = []
    for entry in said or ():
        if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry)):
            return None
        found.append(_Link(*entry))
    return found


def _beside(file: str, master: str) -> str:
    """Return the file that a link leads to, as a name in the master's directory or below; '' if it is none."""
    there = posixpath.normpath(file)
    if file.startswith("/") or "\0" in file or there.split("/")[0] == ".." or there in (".", master):
        return ""
    return there


def _missing(names: Sequence[str], companions: Mapping[str, Window], kind: str = "data file") -> Outcome | None:
    have = sum(name in companions for name in names)
    if have == len(names):
        return None
    return Outcome(Verdict.INCOMPLETE, f"{have:,} of {_number(len(names), kind)}", tuple(names))


def _files(images: int, per_file: int) -> int:
    return -(-images // per_file)


def _data_files(count: int) -> str:
    return _number(count, "data file")


def _number(count: int, kind: str) -> str:
    return f"{count:,} {kind}{'' if count == 1 else 's'}"
