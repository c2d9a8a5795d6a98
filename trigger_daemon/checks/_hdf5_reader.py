"""The child in which libhdf5 runs: it answers questions about files whose bytes its parent reads for it.

Started as a script (`python -P`), with the standard library and h5py only. It
opens nothing (no descriptor is left to it), has bounded memory and processor
time, and may be killed at any time. On standard input come questions (length,
JSON) and bytes (length, bytes), on standard output go `R` (offset, length),
which asks for bytes, and `A` (length, JSON), which answers.

    _hdf5_reader.py CPU_S MEMORY_BYTES
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import sys
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LINKS_MAX = 10_000  # data files of a set
VISITS_MAX = 100_000  # links of all kinds in a master; one has some hundred, and those to its data files
PAGE_BYTES = 16 * 2**10  # metadata lie close together: a file costs a handful of reads, not one for each of its parts
WORDS_MAX = 300  # characters of an error
# What h5py and numpy raise of a file that is not as it should be.
FAULTS = (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError, MemoryError)
NO_LIBRARY = 3  # exit code

_DATA = re.compile(r"data_(\d{1,9})")
_LENGTH, _READ = struct.Struct(">I"), struct.Struct(">QI")


class Served(io.RawIOBase):
    """A read-only file of which the parent has the bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._at = 0
        self._pages: dict[int, bytes] = {}  # all of them: the parent's budget is their limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._at < self._size:
            number, begins = divmod(self._at, PAGE_BYTES)
            part = self._page(number)[begins : begins + len(view) - done]
            if not part:
                break
            view[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        view[done:] = bytes(len(view) - done)  # libhdf5 does not ask how much came
        return done

    def _page(self, number: int) -> bytes:
        if number not in self._pages:
            _write(b"R" + _READ.pack(number * PAGE_BYTES, PAGE_BYTES))
            (length,) = _LENGTH.unpack(_read(_LENGTH.size))
            self._pages[number] = _read(length)
        return self._pages[number]


def master(h5py: Any, file: Any) -> dict[str, Any]:
    """Return the links `/entry/data/data_NNNNNN` in order, and the numbers of images and triggers.

    A link is [name, file, path]; `file` is '' for a data set in the master
    itself. `others`: all other links that lead to another file, by their paths.
    """
    group = file["/entry/data"]
    links: list[tuple[int, list[str]]] = []
    for name in group:
        number = _DATA.fullmatch(_text(name))
        if not number:
            continue
        if len(links) >= LINKS_MAX:
            return {"error": f"more than {LINKS_MAX:,} links to data files"}
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            links.append((int(number[1]), [_text(name), _text(link.filename), _text(link.path)]))
        else:
            links.append((int(number[1]), [_text(name), "", f"/entry/data/{_text(name)}"]))
    others, ended = _external(h5py, file)
    if not ended:
        return {"error": f"more than {VISITS_MAX:,} links"}
    known = {(target, path) for _, (_, target, path) in links}
    specific = file["/entry/instrument/detector/detectorSpecific"]
    return {
        "links": [link for _, link in sorted(links)],
        "others": [link for link in others if (link[1], link[2]) not in known],
        "nimages": _scalar(specific, "nimages"),
        "ntrigger": _scalar(specific, "ntrigger"),
    }


def _external(h5py: Any, file: Any) -> tuple[list[list[str]], bool]:
    """Return all links of a file that lead to others, and whether all links were looked at; none is followed."""
    found: list[list[str]] = []
    visits = 0

    def visit(name: bytes, info: Any) -> bool | None:
        nonlocal visits
        visits += 1
        if info.type == h5py.h5l.TYPE_EXTERNAL:
            target, path = file.id.links.get_val(name)
            found.append([_text(part) for part in (name, target, path)])
        return True if visits > VISITS_MAX or len(found) > 2 * LINKS_MAX else None

    stopped = file.id.links.visit(visit, info=True)
    return found, not stopped


def images(h5py: Any, file: Any, path: str) -> dict[str, Any]:
    """Return how many images a data set holds, and the numbers of its first and last (None: not written there)."""
    data = file[path]
    if not isinstance(data, h5py.Dataset) or data.is_virtual:
        return {"error": f"{path} is no data set with images"}
    low, high = (_attribute(h5py, data, name) for name in (b"image_nr_low", b"image_nr_high"))
    if low is not None and high is not None:
        numbered = max(0, high - low + 1)
        there = _written(data) if data.ndim in (3, 4) else numbered  # the numbers are written first
        return {"images": min(numbered, there), "low": low, "high": high}
    if data.ndim not in (3, 4):
        return {"error": f"{path} has {data.ndim} dimensions, and no image_nr_low and image_nr_high"}
    return {"images": _written(data), "low": None, "high": None}


def _written(data: Any) -> int:
    """Return for how many images there is place in the file; a data set may have the shape of more."""
    whole = int(data.shape[0])
    if not data.size or not data.id.get_storage_size():
        return 0
    if data.chunks is None or not hasattr(data.id, "get_num_chunks"):
        return whole
    each = math.prod(-(-side // chunk) for side, chunk in zip(data.shape[1:], data.chunks[1:], strict=True))
    return int(min(whole, data.id.get_num_chunks() // each * data.chunks[0]))


def _text(name: str | bytes) -> str:
    """h5py gives bytes for names that are not UTF-8."""
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def _scalar(group: Any, name: str) -> int | None:
    found = group.get(name)
    if found is None or getattr(found, "size", None) != 1 or found.dtype.kind not in "iu":
        return None
    return int(found[()] if found.shape == () else found[(0,) * found.ndim])


def _attribute(h5py: Any, data: Any, name: bytes) -> int | None:
    """Return a whole number; whatever else has this name is not read at all, it may be of any size."""
    if not h5py.h5a.exists(data.id, name):
        return None
    found = h5py.h5a.open(data.id, name)
    if found.shape not in ((), (1,)) or found.dtype.kind not in "iu":
        return None
    value = data.attrs[name.decode()]
    return int(value if found.shape == () else value[0])


def _answer(h5py: Any, question: dict[str, Any]) -> bytes:
    try:
        with h5py.File(Served(int(question["size"])), "r") as file:
            said = master(h5py, file) if question["do"] == "master" else images(h5py, file, question["path"])
        return json.dumps(said).encode()
    except FAULTS as fault:
        return json.dumps({"error": f"{type(fault).__name__}: {fault}"[:WORDS_MAX]}).encode()


def _read(length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(0, length - len(parts))
        if not part:
            os._exit(0)  # the parent has heard enough; what libhdf5 is in the midst of does not matter
        parts += part
    return bytes(parts)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _confine(cpu_s: int, memory_bytes: int) -> None:
    """Give up what a damaged file could misuse: descriptors, memory, processor time."""
    os.nice(10)
    if not hasattr(resource, "setrlimit"):
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes,) * 2)
    except OSError:
        pass  # no /proc here: the other limits hold
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def main(cpu_s: int, memory_bytes: int) -> None:
    """Answer questions until the parent hangs up."""
    try:
        import h5py  # takes most of the time
    except ImportError:
        sys.exit(NO_LIBRARY)
    h5py.File(io.BytesIO(), "w").close()  # whatever is loaded late is loaded now, while files can be opened
    _confine(cpu_s, memory_bytes)
    while True:
        (length,) = _LENGTH.unpack(_read(_LENGTH.size))
        words = _answer(h5py, json.loads(_read(length)))
        _write(b"A" + _LENGTH.pack(len(words)) + words)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
