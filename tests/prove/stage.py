"""The stage: an instrument that keeps a record of what it writes, two rules, a program that keeps one too, the daemon.

One rule copies, two files a batch; the other starts a program with each file.
What the stage does is the same every time, so that a fault at the k-th call of
one run is a fault at the k-th call of the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.prove.oracle import Promise, Scene, Violation, judge
from tests.site import Site

QUIET_S = 0.3
IDLE_S = 0.3
DONE_S = 60.0  # a daemon that has not ended its work then never will

PROGRAM = """\
import json, os, sys, time
record, rule, manifest = sys.argv[1:4]
files = [(f["path"], f["size"], f["mtime_ns"]) for f in json.load(open(manifest))["files"]]
execution = time.monotonic_ns()
out = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
os.write(out, (json.dumps({"execution": execution, "rule": rule, "files": files}) + "\\n").encode())
os.write(out, (json.dumps({"execution": execution, "exit": 0}) + "\\n").encode())
"""


class Writer:
    """An instrument: writes files, and keeps a record of each step outside of the daemon's reach."""

    def __init__(self, source: Path, record: Path) -> None:
        self._source = source
        self._record = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def close(self) -> None:
        os.close(self._record)

    def whole(self, path: str, content: bytes) -> None:
        """Write a file in one go."""
        self.parts(path, content)

    def parts(self, path: str, *parts: bytes, pause_s: float = 0.0) -> None:
        """Write a file part by part; only the last one makes it whole."""
        target = self._source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()
        with target.open("wb", buffering=0) as file:
            for number, part in enumerate(parts):
                if number:
                    time.sleep(pause_s)
                file.write(part)
                sha.update(part)
                self._step(path, sha.hexdigest() if number == len(parts) - 1 else None)

    def renamed(self, path: str, content: bytes) -> None:
        """Write under another name, which no rule takes, and give it its own at the end."""
        self.whole(f"{path}.tmp", content)
        os.rename(self._source / f"{path}.tmp", self._source / path)
        self._step(f"{path}.tmp", None)
        self._step(path, hashlib.sha256(content).hexdigest())

    def remove(self, path: str) -> None:
        (self._source / path).unlink()
        self._step(path, None)

    def _step(self, path: str, sha256: str | None) -> None:
        try:
            seen = os.lstat(self._source / path)
            version = [seen.st_size, seen.st_mtime_ns]
        except FileNotFoundError:
            version = None
        line = {"path": path, "version": version, "at": time.time(), "sha256": sha256}
        os.write(self._record, json.dumps(line).encode() + b"\n")


def content(seed: str, size: int) -> bytes:
    """Return bytes that no other file has."""
    block = hashlib.sha256(seed.encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def _is_tif(path: str) -> bool:
    return path.endswith(".tif")


class Stage:
    """A facility below `base`. What must survive, journal and destination, lies below `disk`."""

    def __init__(self, base: Path, disk: Path | None = None, *, events: str = "auto") -> None:
        self.base = base
        self.disk = disk or base
        self.site = Site(base, quiescence=f"{QUIET_S:g}s", events=events)
        self.site.state, self.site.out = self.disk / "state", self.disk / "out"
        self.site.settings["state_dir"] = str(self.site.state)
        for directory in (self.site.state, self.site.out):
            directory.mkdir(parents=True, exist_ok=True)
        self.record, self.executions = base / "written", base / "executed"
        self.writer = Writer(self.site.data, self.record)
        program = base / "program.py"
        program.write_text(PROGRAM)
        self.program = [sys.executable, "-I", str(program), str(self.executions), "work", "{manifest}"]
        self.site.write_rules(*self.rules())

    def rules(self) -> list[dict[str, Any]]:
        copy = self.site.rule("copy", match=["**/*.tif"], batch={"files": 2, "idle": f"{IDLE_S:g}s"})
        work = self.site.rule("work", match=["**/*.tif"], start={"command": {"run": self.program}})
        return [copy, work]

    def promises(self) -> list[Promise]:
        """What the rules are to do, in the oracle's words."""
        return [
            Promise("copy", _is_tif, self.site.out, QUIET_S),
            Promise("work", _is_tif, None, QUIET_S, frozenset({75})),
        ]

    def scene(self, **keys: Any) -> Scene:
        return Scene(
            self.site.data, self.record, self.executions, self.site.state / "journal.db", self.promises(), **keys
        )

    def judge(self, *, idle: bool, **keys: Any) -> list[Violation]:
        return judge(self.scene(**keys), idle=idle)

    # ------------------------------------------------------------------- acts

    def before(self) -> None:
        """What lies there when the daemon starts: a small file, a renamed one, one in another directory."""
        self.writer.whole("a/1.tif", content("1", 1_000))
        self.writer.renamed("a/2.tif", content("2", 70_000))
        self.writer.whole("b/3.tif", content("3", 300_000))
        self.writer.whole("b/notes.txt", b"no rule takes these")

    def meanwhile(self) -> None:
        """What is written while it works: a file in parts, and a new version of one that it may have taken."""
        self.writer.parts("b/4.tif", *(content(f"4{n}", 5_000) for n in range(3)), pause_s=0.05)
        self.writer.whole("a/1.tif", content("1, again", 1_100))

    def afterwards(self) -> None:
        """What is written before it starts again."""
        self.writer.whole("a/5.tif", content("5", 2_000))

    def until_idle(self, timeout_s: float = DONE_S, *, but_for: str = "") -> None:
        """Wait until every standing version is in a batch of each rule and no run is open. Raises AssertionError."""
        self.site.until(lambda: self.is_idle(but_for=but_for), timeout_s, "all is done")

    def is_idle(self, *, but_for: str = "") -> bool:
        standing = [(os.fsdecode(path), *version) for path, *version in self.site.versions()]
        for promise in self.promises():
            wanted = {(os.fsencode(path), size, mtime) for path, size, mtime in standing if promise.takes(path)}
            if promise.rule != but_for and not wanted <= set(self.site.taken(promise.rule)):
                return False
        # Asked last: a batch and its open run come in one commit.
        return not self.site.ask("SELECT 1 FROM run WHERE final = 0 AND state != 'HELD'")

    def close(self) -> None:
        if self.site.process is not None and self.site.process.poll() is None:
            self.site.kill()
        self.writer.close()
