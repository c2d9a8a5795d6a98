"""Write movies as a camera does, as fast as the disk takes them.

    movies.py DIRECTORY FRAMES WARM_S LAST_S BYTES_MAX cached|direct

A movie is an MRC stack of FRAMES frames of 16 MiB. Each frame is one write, the
end of each movie an fdatasync; nothing waits in between. `direct` writes past
the page cache. After WARM_S seconds the counting begins with the next movie; it
ends with the one that passes LAST_S more, or BYTES_MAX bytes in all. Each
finished movie's name is printed as a line; the last line is a JSON object:
`movies` in all, `counted` ones and their `bytes`, `s` from the beginning of the
first counted one to the end of the last, and how long each `write` and each
`sync` of theirs took (seconds).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import time

SIDE = 4096  # pixels
FRAME_BYTES = SIDE * SIDE  # mode 0: a byte a pixel
HEADER_BYTES = 4096  # with an extended header, so that all is aligned


def header(frames: int) -> bytes:
    """Return an MRC header with an empty extended one."""
    text = bytearray(HEADER_BYTES)
    struct.pack_into("<10i", text, 0, SIDE, SIDE, frames, 0, 0, 0, 0, SIDE, SIDE, frames)
    struct.pack_into("<i", text, 92, HEADER_BYTES - 1024)
    text[208:216] = b"MAP \x44\x44\0\0"
    return bytes(text)


def main(directory: str, frames: int, warm_s: float, last_s: float, bytes_max: int, way: str) -> None:
    # No two frames are alike (a disk may look for equal blocks), and memory is aligned.
    noise = memoryview(mmap.mmap(-1, 2 * FRAME_BYTES))
    noise[:] = os.urandom(len(noise))
    first = memoryview(mmap.mmap(-1, HEADER_BYTES))
    first[:] = header(frames)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if way == "direct" else 0)
    writes: list[float] = []
    syncs: list[float] = []
    number = counted = written = 0
    began = now = time.monotonic()
    counting = False
    while (not counting or now - began < last_s) and written < bytes_max:
        if not counting and now - began >= warm_s:
            counting, began = True, now
        name = f"movie_{number:05d}.mrc"
        out = os.open(os.path.join(directory, name), flags, 0o644)
        written += os.write(out, first)
        for frame in range(frames):
            shift = (number * frames + frame) % (FRAME_BYTES // HEADER_BYTES) * HEADER_BYTES
            rest = noise[shift : shift + FRAME_BYTES]
            before = time.monotonic()
            while rest:
                count = os.write(out, rest)
                written += count
                rest = rest[count:]
            if counting:
                writes.append(time.monotonic() - before)
        before = time.monotonic()
        os.fdatasync(out)
        now = time.monotonic()
        os.close(out)
        print(name, flush=True)
        number += 1
        if counting:
            counted += 1
            syncs.append(now - before)
    total = counted * (HEADER_BYTES + frames * FRAME_BYTES)
    print(json.dumps({
        "movies": number, "counted": counted, "bytes": total, "s": now - began, "write": writes, "sync": syncs,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
