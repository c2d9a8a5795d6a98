"""The writer all consumers are measured with: C where there is a compiler, else Python.

Run as a program it takes the arguments of writer.c and does the same, slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

from measure import NotMeasured

HERE = Path(__file__).resolve().parent


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def compiled(name: str, build: Path) -> Path:
    """Compile NAME.c of this directory, once; raises NotMeasured where there is no compiler."""
    program = build / name
    if not program.exists():
        if not (command := compiler()):
            raise NotMeasured("there is no C compiler")
        subprocess.run([command, "-O2", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


@dataclass(frozen=True, slots=True)
class Written:
    """What one run of the writer did; `closed_ns[i]` is when file i was closed (CLOCK_MONOTONIC)."""

    files: int
    elapsed_s: float
    closed_ns: array[int]


class Writer:
    """Writes small files into `directories` directories of a root, in a process of its own."""

    def __init__(self, build: Path) -> None:
        self.directories = 100
        if compiler():
            self.command, self.kind = [str(compiled("writer", build))], "C"
        else:
            self.command, self.kind = [sys.executable, str(HERE / "writer.py")], "Python"

    def prepare(self, root: Path) -> None:
        for number in range(self.directories):
            (root / f"d{number:03d}").mkdir(parents=True)

    def write(self, root: Path, *, files: int, per_second: float, size_bytes: int = 4096) -> Written:
        """Write `files` files at `per_second` (0: full speed) and return when each was closed."""
        log = root.with_suffix(".closed")
        done = subprocess.run(
            [*self.command, str(root), str(self.directories), str(files), str(per_second), str(size_bytes), str(log)],
            check=True, capture_output=True, text=True,
        )
        closed_ns: array[int] = array("q")
        closed_ns.frombytes(log.read_bytes())
        log.unlink()
        return Written(files, float(done.stdout), closed_ns)


def main(root: str, directories: int, files: int, per_second: float, size_bytes: int, log: str) -> None:
    block = b"x" * size_bytes
    closed = array("q")
    os.chdir(root)
    start = time.monotonic()
    for number in range(files):
        if per_second:
            early_s = start + number / per_second - time.monotonic()
            if early_s > 0:
                time.sleep(early_s)
        name = f"d{number % directories:03d}/f{number:07d}.tif"
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, block)
        os.close(descriptor)
        closed.append(time.monotonic_ns())
    elapsed_s = time.monotonic() - start
    Path(log).write_bytes(closed.tobytes())
    print(f"{elapsed_s:.6f}")


if __name__ == "__main__":
    _, _root, _directories, _files, _per_second, _size, _log = sys.argv
    main(_root, int(_directories), int(_files), float(_per_second), int(_size), _log)
