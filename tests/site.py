"""A facility in a directory: roots, rules, destination, and the real daemon as a process; and an oracle beside it.

The oracle reads the journal and the destination with code of its own. It knows
what the writer wrote because the writer told it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trigger_daemon.control import ControlClient
from trigger_daemon.errors import TriggerError

READY_S = 30.0


class Site:
    """One daemon with its directories below `base`."""

    def __init__(self, base: Path, *, quiescence: str = "500ms", events: str = "auto", sweep: str = "1s") -> None:
        self.base = base
        self.data, self.out = base / "data", base / "out"
        self.rules_dir, self.state = base / "rules", base / "state"
        for directory in (self.data, self.out, self.rules_dir, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        self.quiescence = quiescence
        self.config = base / "config.yaml"
        self.settings: dict[str, Any] = {
            "state_dir": str(self.state),
            "rules_dir": str(self.rules_dir),
            "events": events,
            "sweep": {"every": sweep, "full": "5s"},
            "log": {"level": "info", "format": "json"},
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.log = base / "daemon.log"

    # ------------------------------------------------------------------ set-up

    def rule(self, name: str = "first", **keys: Any) -> dict[str, Any]:
        """Return a rule that copies everything below `data`, with what is given instead."""
        base: dict[str, Any] = {
            "name": name,
            "watch": str(self.data),
            "match": ["**"],
            "existing": "process",
            "complete": {"quiescence": self.quiescence},
            "start": {"copy": {"to": str(self.out)}},
        }
        base.update(keys)
        return base

    def write_rules(self, *rules: dict[str, Any], file: str = "rules.yaml") -> None:
        """Put rules in force at the next start or reload (JSON is YAML)."""
        temporary = self.rules_dir / f".{file}.new"
        temporary.write_text(json.dumps({"rules": list(rules)}, indent=1))
        temporary.rename(self.rules_dir / file)

    # ------------------------------------------------------------------ daemon

    def start(
        self,
        *,
        wait: bool = True,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "trigger_daemon"),
    ) -> None:
        """Start the daemon; with `wait`, until its heartbeat says it watches. `options` are those of `serve`."""
        self.config.write_text(json.dumps(self.settings))
        with self.log.open("ab") as log:
            serve = (*program, "serve", "--config", str(self.config), *options)
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-P", *serve],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )
        if wait:
            started = time.time()
            self.until(lambda: self._watches(started), READY_S, "the daemon is ready")

    def _watches(self, since: float) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.tail()}")
        beat = self.heartbeat()
        return beat is not None and beat["daemon"]["pid"] == self.process.pid and bool(beat["roots"])

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4_000:] if self.log.exists() else ""

    def cli(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the operator's."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trigger_daemon", *args, "--config", str(self.config)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode not in (0, 4):
            raise AssertionError(f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def json(self, *args: str, check: bool = True) -> Any:
        return json.loads(self.cli(*args, "-F", "json", check=check).stdout)

    # ------------------------------------------------------------------ oracle

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the journal, read-only."""
        path = self.state / "journal.db"
        if not path.exists():
            return []
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            return connection.execute(question, values).fetchall()
        except sqlite3.OperationalError:
            return []
        finally:
            connection.close()

    def heartbeat(self) -> dict[str, Any] | None:
        path = self.state / "control.db"
        if not path.exists():
            return None
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            row = connection.execute("SELECT snapshot FROM heartbeat").fetchone()
            return json.loads(row[0]) if row else None
        except sqlite3.OperationalError:
            return None
        finally:
            connection.close()

    def manifests(self, rule: str = "first") -> list[list[tuple[bytes, int, int]]]:
        """Return (path, size, mtime_ns) of the members of every batch of a rule, companions left out."""
        rows = self.ask(
            "SELECT batch.manifest FROM batch JOIN rule ON rule.id = batch.rule WHERE rule.name = ? ORDER BY batch.id",
            rule,
        )
        found = []
        for (text,) in rows:
            members = json.loads(text)
            found.append(
                [
                    (os.fsencode(f"{directory}/{name}" if directory else name), size, mtime)
                    for _, directory, name, size, mtime, role, *_ in members
                    if not role
                ]
            )
        return found

    def taken(self, rule: str = "first") -> Counter[tuple[bytes, int, int]]:
        """Return how many batches of a rule hold each file version."""
        return Counter(version for manifest in self.manifests(rule) for version in manifest)

    def states(self) -> Counter[str]:
        return Counter(state for (state,) in self.ask("SELECT state FROM run"))

    def versions(self, root: Path | None = None) -> set[tuple[bytes, int, int]]:
        """Return the versions that stand below a root now."""
        base = os.fsencode(root or self.data)
        found = set()
        for directory, _, names in os.walk(base):
            for name in names:
                path = os.path.join(directory, name)
                seen = os.lstat(path)
                found.add((os.path.relpath(path, base), seen.st_size, seen.st_mtime_ns))
        return found

    def digests(self, root: Path) -> dict[bytes, str]:
        """Return the SHA-256 of every file below a directory."""
        base = os.fsencode(root)
        found = {}
        for directory, _, names in os.walk(base):
            for name in names:
                path = os.path.join(directory, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, base)] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def until(self, predicate: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something holds; what went wrong is told with the daemon's log."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if predicate():
                return
            time.sleep(0.05)  # the daemon is another process; nothing to pass a clock to
        missed = sorted(self.versions() - set(self.taken()))
        raise AssertionError(
            f"after {timeout_s:g} s not true: {what}; runs {self.states()}; {len(missed)} not batched: {missed[:5]};"
            f" waiting: {self.waiting()}\n{self.tail()}"
        )

    def waiting(self) -> str:
        """Return what the live daemon says of files that wait."""
        try:
            answer = ControlClient(self.state).ask("files.list", {}, "test", "", timeout_s=5)
        except TriggerError as error:
            return str(error)
        return str(answer.get("files", answer))[:1_000]

    def until_verified(self, files: int, timeout_s: float = 60.0, rule: str = "first") -> None:
        """Wait until so many file versions of a rule lie in VERIFIED runs, and no run is open."""
        question = (
            "SELECT coalesce(sum(batch.files), 0) FROM run JOIN batch ON batch.id = run.id"
            " JOIN rule ON rule.id = batch.rule"
            " WHERE run.state = 'VERIFIED' AND rule.name = ?"
        )
        self.until(
            lambda: (
                (self.ask(question, rule) or [(0,)])[0][0] >= files
                and not self.ask("SELECT 1 FROM run WHERE final = 0")
            ),
            timeout_s,
            f"{files} files verified by {rule}",
        )

    def judge(self, rule: str = "first") -> None:
        """Every standing version was in exactly one batch; the destination holds just what the source does."""
        taken = self.taken(rule)
        twice = {version: count for version, count in taken.items() if count > 1}
        missed = self.versions() - set(taken)
        assert not twice, f"in two batches: {list(twice.items())[:5]}"
        assert not missed, f"{len(missed)} missed: {sorted(missed)[:5]}"
        source, destination = self.digests(self.data), self.digests(self.out)
        assert destination == source, _difference(source, destination)


def _difference(source: dict[bytes, str], destination: dict[bytes, str]) -> str:
    missing = sorted(source.keys() - destination.keys())
    extra = sorted(destination.keys() - source.keys())
    wrong = sorted(p for p in source.keys() & destination.keys() if source[p] != destination[p])
    return f"missing {missing[:5]} extra {extra[:5]} different {wrong[:5]}"
