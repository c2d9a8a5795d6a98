"""The program that the demo's rule `chip-qc` runs: a first look at some images.

It is copied beside the rules, and run with the path of a manifest. The JSON on
its last line becomes the output of the run.
"""

import json
import sys
import time

TAKES_S = 3  # a real one looks for spots, which takes its time; the copies wait for it


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        manifest = json.load(file)
    means = [mean_of(member["absolute"]) for member in manifest["files"]]
    time.sleep(TAKES_S)
    found = {"images": len(means), "mean": round(sum(means) / len(means), 1), "good": min(means) > 0}
    sys.stdout.write(json.dumps(found) + "\n")


def mean_of(path: str) -> float:
    """Return the mean byte of an image's compressed pixels."""
    with open(path, "rb") as file:
        data = file.read()
    pixels = data[data.index(b"\x0c\x1a\x04\xd5") + 4 : data.index(b"--CIF-BINARY-FORMAT-SECTION----")]
    return sum(pixels) / len(pixels)


if __name__ == "__main__":
    main()
