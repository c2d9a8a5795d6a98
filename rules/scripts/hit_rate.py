#!/usr/bin/env python3
"""The gate of a chip: does a large enough share of its first images show diffraction?

    hit_rate.py MANIFEST --least 0.05 [--spots 10] [--images 1000] [--dataset /entry/data]

MANIFEST is what `command` gives as {manifest}. An image with SPOTS spots or more is a hit. Read are CBF (byte offset)
and HDF5 images (needs h5py), and numbers that the acquisition has counted itself: a file *.jsonl with a line
{"spots": n} for each image. Exit code 0: LEAST or more of the images are hits, what waits for it by `after` may go. 65:
fewer, or nothing could be counted: a person decides. 75: not now. The last line on standard output is what was counted,
as JSON.

The count is simple on purpose: pixels well above the background, neighbours taken together. It tells an empty chip from
a full one; it is no spot finder. Needed is numpy.
"""

import argparse
import json
import re
import sys
from itertools import islice
from pathlib import Path

AGAIN, PERSON = 75, 65
SIGMAS, COUNTS = 6.0, 8.0  # above the background by both
CELL = 5  # pixels; brighter ones within such a square are one spot
LINE_BYTES_MAX = 65_536
HEADER = re.compile(rb"X-Binary-Size-(Fastest|Second)-Dimension: *(\d+)|X-Binary-Size: *(\d+)")
STARTS = b"\x0c\x1a\x04\xd5"


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("manifest", type=Path)
    ask.add_argument("--least", type=float, required=True, help="share of hits, such as 0.05")
    ask.add_argument("--spots", type=int, default=10, help="that make an image a hit")
    ask.add_argument("--images", type=int, default=1000, help="of which the share is taken")
    ask.add_argument("--dataset", default="/entry/data", help="group or dataset of an HDF5 file")
    told = ask.parse_args()
    files = [Path(file["absolute"]) for file in json.loads(told.manifest.read_text())["files"]]
    try:
        counts = list(islice(spots_of(files, told.dataset), told.images))
    except ImportError as error:
        return stop(PERSON, f"{error}: install numpy, and h5py for HDF5, for {sys.executable}")
    except (ValueError, KeyError) as error:
        return stop(PERSON, f"an image cannot be read: {error}")
    except OSError as error:
        return stop(AGAIN, f"{error.filename or ''}: {error.strerror or error}")
    hits = sum(count >= told.spots for count in counts)
    rate = hits / len(counts) if counts else 0.0
    passed = bool(counts) and rate >= told.least
    print(json.dumps({
        "images": len(counts), "hits": hits, "hit_rate": round(rate, 6), "least": told.least, "passed": passed,
        "spots_mean": round(sum(counts) / max(1, len(counts)), 3),
    }))  # fmt: skip
    if not counts:
        return stop(PERSON, "no image among its files, and no numbers of the acquisition")
    if not passed:
        return stop(PERSON, f"{hits} of {len(counts)} images are hits, {rate:.1%}; {told.least:.1%} are wanted")
    return 0


def spots_of(files: list, dataset: str):
    """Yield the number of spots of each image, one image in memory at a time; the acquisition's own where there are."""
    numbers = [path for path in files if path.suffix == ".jsonl"]
    for path in numbers or files:
        if path.suffix == ".jsonl":
            with path.open("rb") as opened:
                while line := opened.readline(LINE_BYTES_MAX):
                    yield int(json.loads(line)["spots"])
        elif path.suffix == ".cbf":
            yield spots(cbf(path.read_bytes(), path.name))
        elif path.suffix in (".h5", ".nxs", ".hdf5"):
            yield from map(spots, hdf5(path, dataset))


def spots(image) -> int:
    """Return how many places of an image are far above its background. Negative values, and the largest, are gaps."""
    import numpy as np

    valid = image[(image >= 0) & (image < np.iinfo(image.dtype).max)] if image.dtype.kind in "iu" else image.ravel()
    if not valid.size:
        return 0
    sample = valid[:: max(1, valid.size // 100_000)].astype(np.float64)
    level = float(np.median(sample))
    sample = sample[sample <= np.percentile(sample, 98)]  # spots are no background
    limit = level + max(SIGMAS * float(sample.std()), COUNTS)
    rows, columns = np.nonzero((image > limit) & (image < most(image.dtype)))
    return len(np.unique((rows // CELL).astype(np.int64) * (image.shape[1] // CELL + 1) + columns // CELL))


def most(dtype):
    import numpy as np

    return np.iinfo(dtype).max if dtype.kind in "iu" else np.inf


def cbf(content: bytes, name: str):
    """Return the image of a CBF with byte-offset compression. Raises ValueError."""
    import numpy as np

    begins = content.find(STARTS)
    header = {found[1] or b"size": int(found[2] or found[3]) for found in HEADER.finditer(content[:begins])}
    if begins < 0 or b"x-CBF_BYTE_OFFSET" not in content[:begins] or len(header) != 3:
        raise ValueError(f"{name} is no CBF with byte offsets")
    width, height, size = header[b"Fastest"], header[b"Second"], header[b"size"]
    raw = np.frombuffer(content, np.uint8, min(size, len(content) - begins - 4), begins + 4)
    steps = np.empty(width * height, np.int32)
    at = filled = 0
    for escape in [*np.flatnonzero(raw == 0x80).tolist(), len(raw)]:
        if escape < at:
            continue  # it is part of a longer step
        some = raw[at:escape].view(np.int8)[: len(steps) - filled]
        steps[filled : filled + len(some)] = some
        filled, at = filled + len(some), escape
        if filled == len(steps) or escape == len(raw):
            break
        step, at = int.from_bytes(content[begins + 5 + at : begins + 7 + at], "little", signed=True), at + 3
        if step == -(2**15):
            step, at = int.from_bytes(content[begins + 4 + at : begins + 8 + at], "little", signed=True), at + 4
        steps[filled], filled = step, filled + 1
    if filled < len(steps):
        raise ValueError(f"{name} ends after {filled:,} of {len(steps):,} pixels")
    return np.cumsum(steps, dtype=np.int32).reshape(height, width)


def hdf5(path: Path, dataset: str):
    import h5py

    with h5py.File(path, "r") as opened:
        found = opened[dataset]
        parts = [found] if isinstance(found, h5py.Dataset) else [found[key] for key in sorted(found)]
        for part in parts:
            yield from (part if part.ndim > 2 else [part[()]])


def stop(code: int, why: str) -> int:
    print(why, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
