#!/usr/bin/env python3
"""A first look at a batch of micrographs and movies: a thumbnail and statistics of each file, and a page with all.

    first_look.py MANIFEST --to /mnt/looks [--side 512]

MANIFEST is what `command` gives as {manifest}. The page is /mnt/looks/RULE-RUN/index.html, with a PNG for each file
and report.json, which are there before it; made again for the same run, they are replaced. The last line on standard
output is the summary as JSON, which becomes the run's output. Exit codes: 0; 75 not now (disk full, share away); 65 a
person is needed (a file that cannot be read, which the page names, too).

One frame is in memory at a time, whatever a movie holds. Needed are numpy and Pillow; mrcfile for MRC, and tifffile for
TIFF.
"""

import argparse
import html
import json
import mmap
import os
import sys
from pathlib import Path

AGAIN, PERSON = 75, 65
FORMATS = {".mrc": "mrc", ".mrcs": "mrc", ".tif": "tiff", ".tiff": "tiff"}
BAND_BYTES = 16 * 2**20  # of a frame that is worked on as floating point at once
TOLD_MAX = 50  # files in the run's output; report.json has all
FRAMES_MAX = 100_000


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("manifest", type=Path)
    ask.add_argument("--to", type=Path, required=True, help="a directory that is there; not one that is watched")
    ask.add_argument("--side", type=int, default=512, help="pixels of a thumbnail, at most")
    told = ask.parse_args()
    batch = json.loads(told.manifest.read_text())
    if inside := [file["root"] for file in batch["files"] if told.to.resolve().is_relative_to(file["root"])]:
        return stop(PERSON, f"{told.to} lies in {inside[0]}, which is watched: each page would be a new file")
    if not told.to.is_dir():
        return stop(AGAIN, f"{told.to} is not there: is its disk mounted?")
    try:
        return look(batch, told.to, told.side)
    except ImportError as error:
        return stop(PERSON, f"{error}: install numpy, Pillow, mrcfile and tifffile for {sys.executable}")
    except OSError as error:  # of where the page goes: what is wrong with one file was told on it
        return stop(AGAIN, f"{error.filename or told.to}: {error.strerror or error}")


def look(batch: dict, to: Path, side: int) -> int:
    place = to / f"{batch['rule']}-{batch['run']}"
    place.mkdir(exist_ok=True)
    seen, bad = [], []
    for number, file in enumerate(one for one in batch["files"] if Path(one["path"]).suffix.lower() in FORMATS):
        try:
            found, small = measured(Path(file["absolute"]), side)
        except (ValueError, KeyError, EOFError, SyntaxError, FileNotFoundError) as error:
            bad.append({"path": file["path"], "why": str(error)[:200]})
            continue
        picture = f"{number:05}.png"
        write_whole(place / picture, png(small))
        seen.append({"path": file["path"], "picture": picture, **found})
    summary = {"files": len(seen), **together(seen), "unreadable": bad[:TOLD_MAX], "report": str(place / "index.html")}
    write_whole(place / "report.json", json.dumps({**summary, "unreadable": bad, "per_file": seen}).encode())
    write_whole(place / "index.html", page(batch, summary, seen, bad).encode("utf-8", "replace"))
    print(json.dumps({**summary, "per_file": seen[:TOLD_MAX]}))
    return stop(PERSON, f"{len(bad)} files cannot be read, the first: {bad[0]['path']}: {bad[0]['why']}") if bad else 0


def measured(path: Path, side: int) -> tuple[dict, object]:
    """Return statistics over all frames, and their mean, binned to a small picture. Raises ValueError."""
    import numpy as np

    count = total = squares = frames = 0
    least, most = float("inf"), float("-inf")
    small = alive = None
    for frame in frames_of(path):
        if frames == FRAMES_MAX:
            raise ValueError(f"more than {FRAMES_MAX:,} frames")
        if small is None:
            shape, factor = frame.shape, -(-max(frame.shape) // side)
            rows, columns = (size // factor for size in shape)
            small, alive = np.zeros((rows, columns)), np.zeros(shape, bool)
            band = max(1, BAND_BYTES // (8 * shape[1] * factor)) * factor
        if frame.shape != shape:
            raise ValueError(f"frame {frames + 1} has {frame.shape}, the first {shape}")
        for top in range(0, shape[0], band):
            part = np.asarray(frame[top : top + band], np.float64)
            total, squares = total + part.sum(), squares + np.square(part).sum()
            least, most = min(least, part.min()), max(most, part.max())
            alive[top : top + band] |= part != 0
            whole = part[: part.shape[0] // factor * factor, : columns * factor]
            binned = whole.reshape(-1, factor, columns, factor).mean(axis=(1, 3))
            small[top // factor : top // factor + len(binned)] += binned
        frames, count = frames + 1, count + frame.size
    if not frames:
        raise ValueError("it holds no frame")
    mean = total / count
    found = {
        "frames": frames, "height": shape[0], "width": shape[1], "mean": mean,
        "sd": max(0.0, squares / count - mean**2) ** 0.5, "min": least, "max": most,
        "dead": 1 - float(alive.mean()),  # the share of pixels that are 0 in every frame
    }  # fmt: skip
    return {key: round(float(value), 6) if key not in ("frames", "height", "width") else value
            for key, value in found.items()}, small / frames  # fmt: skip


def frames_of(path: Path):
    """Yield a file's frames, each read when it comes to it."""
    if FORMATS[path.suffix.lower()] == "mrc":
        import mrcfile

        with mrcfile.mmap(path, mode="r") as opened:
            data = opened.data
            for frame in data if data.ndim > 2 else [data]:
                yield frame
                data._mmap.madvise(mmap.MADV_DONTNEED)  # what was read of the file is not kept in memory
        return
    import tifffile

    with tifffile.TiffFile(path) as opened:
        for number, image in enumerate(opened.pages):
            try:
                frame = image.asarray()
            except ValueError as error:  # a compression that it knows only with further packages
                frame = by_pillow(path, number, error)
            if frame.ndim != 2:
                raise ValueError(f"frame {number + 1} is no grey image")
            yield frame


def by_pillow(path: Path, number: int, error: ValueError):
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # a camera's frame is no bomb
    try:
        with Image.open(path) as opened:
            opened.seek(number)
            return np.asarray(opened)
    except OSError:
        raise error from None


def png(small) -> bytes:
    """Return a picture that shows 98 of 100 grey values."""
    import io

    import numpy as np
    from PIL import Image

    low, high = np.percentile(small, (1, 99))
    grey = np.clip((small - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
    made = io.BytesIO()
    Image.fromarray(grey).save(made, "PNG")
    return made.getvalue()


def together(seen: list) -> dict:
    """Return the statistics of all files as if they were one."""
    pixels = [one["frames"] * one["height"] * one["width"] for one in seen]
    if not sum(pixels):
        return {}
    mean = sum(n * one["mean"] for n, one in zip(pixels, seen, strict=True)) / sum(pixels)
    squares = sum(n * (one["sd"] ** 2 + one["mean"] ** 2) for n, one in zip(pixels, seen, strict=True)) / sum(pixels)
    return {
        "mean": round(mean, 6), "sd": round(max(0.0, squares - mean**2) ** 0.5, 6),
        "min": min(one["min"] for one in seen), "max": max(one["max"] for one in seen),
        "dead": max(one["dead"] for one in seen),  # of the worst
    }  # fmt: skip


def page(batch: dict, summary: dict, seen: list, bad: list) -> str:
    title = html.escape(f"{batch['rule']} {batch['run']} {' '.join(batch['group'].values())}")
    keys = ("frames", "mean", "sd", "min", "max", "dead")
    rows = "".join(
        f'<tr><td><img src="{one["picture"]}" width="192" loading="lazy"><td>{html.escape(one["path"])}'
        + "".join(f"<td>{one[key]:.5g}" for key in keys)
        for one in seen
    )
    whole = ", ".join(f"{key} {summary[key]:.5g}" for key in keys if key in summary)
    faults = "".join(f"<li>{html.escape(one['path'])}: {html.escape(one['why'])}" for one in bad)
    head = "".join(f"<th>{key}" for key in ("", "file", *keys))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        f"<p>{len(seen)} files: {whole}</p><ul>{faults}</ul><table><tr>{head}{rows}</table>\n"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Let the file be there whole, or as it was."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def stop(code: int, why: str) -> int:
    print(why, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
