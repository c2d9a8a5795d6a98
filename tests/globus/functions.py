"""Functions as users register them at Globus Compute, executed by the emulated service: they import what they need."""

from __future__ import annotations

from typing import Any


def deliver(files: list[dict[str, Any]], source: str, dest: str, trace: str) -> dict[str, Any]:
    """Copy files from below one directory to below another, and note that it was called."""
    import os
    import shutil

    with open(trace, "a") as note:
        note.write("x")
    for file in files:
        path = os.path.relpath(file["path"], source)
        target = os.path.join(dest, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(file["path"]):
            shutil.copyfile(file["path"], f"{target}.part")
            os.rename(f"{target}.part", target)
    return {"files": len(files)}


def thumbnails(images: list[str], out: str, side: int = 64) -> dict[str, Any]:
    """Make a small grey picture (PGM) of each uncompressed TIFF image, and say how bright they are.

    Only the standard library, and only images of one strip with 8 or 16 bits, so that it runs anywhere.
    """
    import os
    import struct

    os.makedirs(out, exist_ok=True)
    made, levels = [], []
    for path in images:
        with open(path, "rb") as file:
            raw = file.read()
        order = "<" if raw[:2] == b"II" else ">"
        (at,) = struct.unpack_from(f"{order}I", raw, 4)
        (count,) = struct.unpack_from(f"{order}H", raw, at)
        tags = {}
        for number in range(count):
            entry = at + 2 + 12 * number
            tag, kind = struct.unpack_from(f"{order}HH", raw, entry)
            (tags[tag],) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", raw, entry + 8)
        width, height, start, wide = tags[256], tags[257], tags[273], tags.get(258, 8) // 8
        pixels = struct.unpack_from(f"{order}{width * height}{'BH'[wide - 1]}", raw, start)
        columns, rows = min(side, width), min(side, height)
        small = [
            pixels[(row * height // rows) * width + column * width // columns] >> 8 * (wide - 1)
            for row in range(rows) for column in range(columns)
        ]  # fmt: skip
        name = f"{os.path.splitext(os.path.basename(path))[0]}.pgm"
        with open(os.path.join(out, name), "wb") as picture:
            picture.write(b"P5 %d %d 255\n" % (columns, rows) + bytes(small))
        made.append(name)
        levels.append(sum(pixels) / len(pixels))
    return {"thumbnails": made, "mean": sum(levels) / len(levels), "darkest": min(levels), "brightest": max(levels)}
