"""A script on watchdog that notes each closed file: `watching.py ROOT OUTPUT`. What is compared with, not ours."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer


class Notes(FileSystemEventHandler):
    def __init__(self, output: Path) -> None:
        self.file = output.open("w")

    def on_closed(self, event: Any) -> None:
        self.file.write(f"{event.src_path}\n")


def main(root: str, output: Path) -> None:
    observer = Observer()
    notes = Notes(output.with_suffix(".new"))
    observer.schedule(notes, root, recursive=True)
    observer.start()
    output.with_suffix(".new").rename(output)
    while True:
        time.sleep(0.2)
        notes.file.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
