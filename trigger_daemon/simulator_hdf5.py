"""The simulated instruments that write HDF5, through the real library: single files in four manners, and Eiger sets.

As in `simulator`, `pause` is called after every step of a writer. The library
decides itself what a step brings to the disk, so between two calls the file
looks as that of a real writer does. h5py (the extra `eiger`) is imported when
the first file is written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from trigger_daemon.simulator import Pause, Written, _written

Manner = Literal["v0", "v0-flush", "contiguous", "swmr"]
MANNERS: tuple[Manner, ...] = ("v0", "v0-flush", "contiguous", "swmr")
DATA = "/entry/data/data"


@contextmanager
def _writing(path: Path, pause: Pause, **layout: Any) -> Iterator[Any]:
    """Open a file of the library; one whose writer is ended by an exception stays as a killed writer leaves it."""
    import h5py  # a heavy import that only these writers need

    path.parent.mkdir(parents=True, exist_ok=True)
    file = h5py.File(path, "x", **layout)
    try:
        pause(0.0)
        yield file
    except BaseException:
        left = path.read_bytes()
        file.close()
        path.write_bytes(left)
        raise
    file.close()
    pause(0.0)


def _pixels(numbers: random.Random, width: int, height: int) -> Any:
    import numpy

    return numpy.frombuffer(numbers.randbytes(width * height * 2), dtype="<u2").reshape(height, width)


def hdf5_file(
    path: Path,
    *,
    images: int,
    width: int,
    height: int,
    pause: Pause,
    manner: Manner = "v0",
    image_s: float = 0.0,
    seed: int = 0,
    odd: str = "",
    arrives: bool = True,
) -> Written:
    """Write a stack of 16-bit images, one after the other, in one of four manners.

    `v0`: the library's default; nothing is flushed, so its caches decide when
    bytes reach the disk. `v0-flush`: flushed after each image, which makes the
    file look whole but for a flag. `contiguous`: as that, with the space of
    all images taken first. `swmr`: the newest layout, readable while written.
    `image_s`: seconds an image.
    """
    numbers = random.Random(seed)
    with _writing(path, pause, libver="latest" if manner == "swmr" else "earliest") as file:
        if manner == "contiguous":
            data = file.create_dataset(DATA, (images, height, width), dtype="<u2")
        else:
            data = file.create_dataset(
                DATA, (0, height, width), maxshape=(None, height, width), chunks=(1, height, width), dtype="<u2"
            )
        if manner == "swmr":
            file.swmr_mode = True
        pause(0.0)
        for number in range(images):
            if manner != "contiguous":
                data.resize(number + 1, axis=0)
                pause(0.0)
            data[number] = _pixels(numbers, width, height)
            pause(image_s)
            if manner != "v0":
                file.flush()
                pause(0.0)
    return _written(path, "image", odd, arrives=arrives)


def eiger_set(
    directory: Path,
    *,
    series: str,
    images: int,
    per_file: int,
    width: int,
    height: int,
    pause: Pause,
    triggers: int = 1,
    image_s: float = 0.0,
    seed: int = 0,
    libver: Literal["earliest", "latest"] = "latest",
) -> list[Written]:
    """Write a set as the detector's FileWriter does, and return its files, the master first.

    `<series>_master.h5` at once, when the detector is armed, with links to all
    data files; then `<series>_data_000001.h5` and on, each when its images
    are in; the last, short one at disarm. There are `images` for each of the
    `triggers`.
    """
    whole = images * triggers
    firsts = range(1, whole + 1, per_file)
    names = [f"{series}_data_{number:06d}.h5" for number in range(1, len(firsts) + 1)]
    written = [eiger_master(directory / f"{series}_master.h5", names, images, triggers, pause, libver)]
    for name, first in zip(names, firsts, strict=True):
        last = min(whole, first + per_file - 1)
        pause(image_s * (last - first + 1))
        written.append(_eiger_data(directory / name, first, last, (width, height), pause, seed, libver))
    return written


def eiger_master(path: Path, names: list[str], images: int, triggers: int, pause: Pause, libver: str) -> Written:
    """Write a master that links to the data files `names` and announces `images` for each of `triggers`."""
    import h5py

    with _writing(path, pause, libver=libver) as file:
        specific = file.create_group("/entry/instrument/detector/detectorSpecific")
        specific["nimages"], specific["ntrigger"] = images, triggers
        pause(0.0)
        links = file.create_group("/entry/data")
        for number, name in enumerate(names, 1):
            links[f"data_{number:06d}"] = h5py.ExternalLink(name, DATA)
            pause(0.0)
    return _written(path, "master")


def _eiger_data(
    path: Path, first: int, last: int, side: tuple[int, int], pause: Pause, seed: int, libver: str
) -> Written:
    width, height = side
    numbers = random.Random(seed * 10**6 + first)
    with _writing(path, pause, libver=libver) as file:
        data = file.create_dataset(
            DATA, (0, height, width), maxshape=(None, height, width), chunks=(1, height, width), dtype="<u2"
        )
        data.attrs["image_nr_low"] = first
        pause(0.0)
        for number in range(last - first + 1):
            data.resize(number + 1, axis=0)
            data[number] = _pixels(numbers, width, height)
            pause(0.0)
        data.attrs["image_nr_high"] = last
    return _written(path, "data")
