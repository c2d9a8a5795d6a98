"""Those who watch: nobody, a bare reader, inotifywait, watchman, watchdog, the daemon; all are asked the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import NotMeasured
from processes import cpu_s, rss_bytes

HERE = Path(__file__).resolve().parent
START_S = 120.0  # a million files are swept meanwhile


def wait(predicate: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise NotMeasured(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.02)


class Consumer:
    """Nobody: shows what the writer can do alone. The base of the others.

    `patience_s`: no progress for so long means that nothing more will come.
    """

    name = "nobody"
    patience_s = 0.0

    def __init__(self, work: Path) -> None:
        self.work = work
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, root: Path) -> None:
        """Return once changes below `root` will be noticed."""

    def progress(self) -> int:
        """Return a number that grows while the consumer gets on; cheap."""
        return 0

    def seen(self) -> int:
        """Return how many different files it reported."""
        return 0

    def cpu_s(self) -> float:
        return cpu_s(*(child.pid for child in self.children)) if self.children else 0.0

    def rss_bytes(self) -> int:
        return sum(rss_bytes(child.pid) for child in self.children)

    def drain(self, expected: int) -> float:
        """Wait until it has got on as far as it will; return the monotonic instant of its last progress."""
        last, changed = self.progress(), time.monotonic()
        while time.monotonic() - changed < self.patience_s and last < expected:
            time.sleep(0.02)
            now = self.progress()
            if now != last:
                last, changed = now, time.monotonic()
        return changed

    def stop(self) -> None:
        for child in reversed(self.children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self.children.clear()

    def _spawn(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if not shutil.which(command[0]):
            raise NotMeasured(f"{Path(command[0]).name} is not installed")
        child = subprocess.Popen(command, **options)
        self.children.append(child)
        return child


class Reader(Consumer):
    """reader.c: counts events and nothing else; the raw limit."""

    name = "C reader"
    patience_s = 1.0

    def __init__(self, work: Path, program: Path) -> None:
        super().__init__(work)
        self.program = program

    def start(self, root: Path) -> None:
        self.told = self.work / "reader.told"
        self._spawn([str(self.program), str(root), str(self.told)], stdin=subprocess.DEVNULL)
        wait(lambda: self.told.exists() and self._told(0), 20, "the reader's watches")

    def _told(self, which: int) -> int:
        data = self.told.read_bytes()
        return int(struct.unpack("3q", data)[which]) if len(data) == 24 else 0

    def progress(self) -> int:
        return self._told(1)

    def seen(self) -> int:
        return self._told(1)


class Inotifywait(Consumer):
    """`inotifywait -m -r`: prints one line an event, decides nothing, keeps nothing."""

    name = "inotifywait"
    patience_s = 1.0

    def start(self, root: Path) -> None:
        self.output, errors = self.work / "inotifywait.out", self.work / "inotifywait.err"
        with self.output.open("wb") as stdout, errors.open("wb") as stderr:
            self._spawn(
                ["inotifywait", "-m", "-r", "-e", "create", "-e", "close_write", "-e", "moved_to",
                 "--format", "%e %w%f", str(root)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            )
        wait(lambda: b"Watches established" in errors.read_bytes(), 20, "inotifywait's watches")

    def progress(self) -> int:
        # Lines are not counted here: reading 10 MB over and over would disturb.
        return -1 - self.output.stat().st_size

    def seen(self) -> int:
        with self.output.open("rb") as lines:
            return len({line for line in lines if line.startswith(b"CLOSE_WRITE")})


class Watchman(Consumer):
    """A watchman server and one client that subscribed; CPU is that of both."""

    name = "watchman"
    patience_s = 4.0  # its settle period grows with the stream of events

    def start(self, root: Path) -> None:
        socket = self.work / "wm.sock"
        server = ["watchman", f"--sockname={socket}", f"--statefile={self.work / 'wm.state'}"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._spawn(
            [*server, f"--logfile={self.work / 'wm.log'}", f"--pidfile={self.work / 'wm.pid'}", "--foreground",
             "--no-save-state"],
            stdin=subprocess.DEVNULL, **quiet,
        )
        wait(socket.exists, 10, "watchman's socket")
        client = [*server, "--no-spawn"]
        subprocess.run([*client, "watch", str(root)], check=True, timeout=60, **quiet)
        self.output = self.work / "watchman.out"
        with self.output.open("wb") as stdout:
            subscriber = self._spawn(
                [*client, "-j", "-p", "--no-pretty"], stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL
            )
        query = {"fields": ["name"], "expression": ["allof", ["type", "f"], ["match", "*.tif"]]}
        assert subscriber.stdin
        subscriber.stdin.write(json.dumps(["subscribe", str(root), "bench", query]).encode() + b"\n")
        subscriber.stdin.close()
        wait(lambda: b'"subscribe"' in self.output.read_bytes(), 20, "watchman's subscription")

    def progress(self) -> int:
        return -1 - self.output.stat().st_size

    def seen(self) -> int:
        names: set[str] = set()
        for line in self.output.read_text().splitlines():
            try:
                names.update(json.loads(line).get("files", ()))
            except ValueError:
                continue  # the last line may be cut
        return len(names)


class Watchdog(Consumer):
    """watching.py: the script that everybody writes first, with watchdog's default settings."""

    name = "watchdog"
    patience_s = 4.0

    def start(self, root: Path) -> None:
        self.output = self.work / "watchdog.out"
        command = [sys.executable, str(HERE / "watching.py"), str(root), str(self.output)]
        self._spawn(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait(self.output.exists, 20, "watchdog's watches")

    def progress(self) -> int:
        return -1 - self.output.stat().st_size

    def seen(self) -> int:
        with self.output.open("rb") as lines:
            return len(set(lines))


class Daemon(Consumer):
    """The daemon, spoken to through its command line and read through its journal.

    `rule` is the text of one rule without name, watch, match and existing.
    """

    name = "trigger-daemon"
    patience_s = 15.0

    def __init__(self, work: Path, state: Path, rule: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
        super().__init__(work)
        self.state = state
        self.rule = rule
        self.settings = settings or {}
        self._journal: sqlite3.Connection | None = None

    def start(self, root: Path) -> None:
        self.launch(root)
        wait(self._ready, START_S, f"the daemon's first sweep; its log ends: {self._last_words()}")

    def launch(self, root: Path) -> None:
        """Write rules and settings, and start it; it is not waited for."""
        rules = self.work / "rules"
        rules.mkdir()
        rule = {"name": "bench", "watch": str(root), "match": ["**/*.tif"], "existing": "process", **self.rule}
        # JSON is YAML.
        (rules / "bench.yaml").write_text(json.dumps({"rules": [rule]}))
        config = self.work / "config.yaml"
        settings = {"state_dir": str(self.state), "rules_dir": str(rules), "events": "inotify", **self.settings}
        config.write_text(json.dumps(settings))
        self.log = self.work / "daemon.log"
        paths = [str(HERE / "provider"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("wb") as log:
            self._spawn(
                [sys.executable, "-P", "-m", "trigger_daemon", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip

    def _ready(self) -> bool:
        if self.children[0].poll() is not None:
            raise NotMeasured(f"the daemon ended with {self.children[0].returncode}: {self._last_words()}")
        try:
            return bool(self.ask("SELECT count(*) FROM baseline")[0][0])
        except (sqlite3.OperationalError, FileNotFoundError):
            return False  # not made yet

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "(empty)"

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Read the journal; raises FileNotFoundError or sqlite3.OperationalError before it is there."""
        if self._journal is None:
            path = self.state / "journal.db"
            if not path.exists():
                raise FileNotFoundError(path)
            self._journal = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        return self._journal.execute(query).fetchall()

    def progress(self) -> int:
        return int(self.ask("SELECT coalesce(sum(files), 0) FROM batch")[0][0])

    def seen(self) -> int:
        return int(self.ask("SELECT count(*) FROM (SELECT DISTINCT dir, name FROM claim WHERE batch > 0)")[0][0])

    def heartbeat(self) -> dict[str, Any]:
        """Return what the daemon says of itself."""
        connection = sqlite3.connect(f"file:{self.state / 'control.db'}?mode=ro", uri=True, timeout=5)
        try:
            answer: dict[str, Any] = json.loads(connection.execute("SELECT snapshot FROM heartbeat").fetchone()[0])
            return answer
        finally:
            connection.close()

    def stop(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        super().stop()
