"""What the conformance suite needs to know of each action: one bench a file of `trigger_daemon/actions`.

A bench builds requests over given files, says what the destination should hold
and what it holds, and can spoil it. The laws are in `test_conformance.py`.
Run as a program it is another life of the daemon: it starts or polls what the
test's own life began, knowing nothing but the bench's directory.

    python conformance.py start|poll ACTION BASE      (request and handle lie in BASE)
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trigger_daemon import actions, registry
from trigger_daemon.actions import Context, File, Progress, Request

PATIENCE_S = 90.0  # for a busy machine
SLOW_BYTES_PER_S = 200_000  # of a slow bench that moves bytes itself


class Bench:
    """One action over one directory: `source/`, `dest/`, `state/`."""

    name = ""

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        self.base = base
        self.slow = slow  # an attempt takes so long that it can be interrupted; a later life is not slow
        self.source, self.dest, self.state = base / "source", base / "dest", base / "state"
        for directory in (self.source, self.dest, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        self.nudges: list[tuple[int, int]] = []

    # ---- what an action's own bench says

    def options(self) -> Mapping[str, Any]:
        """The options that the laws are run with, over the defaults."""
        raise NotImplementedError

    def executions(self) -> int | None:
        """How often the work was begun; None where that leaves no trace."""
        return None

    def delivered(self) -> dict[str, bytes]:
        """Everything that lies at the destination, hidden things too: path and content."""
        return {
            os.fsdecode(os.path.relpath(os.path.join(where, name), os.fsencode(self.dest))):
                Path(os.fsdecode(os.path.join(where, name))).read_bytes()
            for where, _, names in os.walk(os.fsencode(self.dest)) for name in names
        }  # fmt: skip

    def spoil(self, path: str, how: str) -> None:
        """Do to a delivered file what somebody else might: `overwritten` in one byte, `truncated`, `removed`."""
        there = self.dest / path
        content = bytearray(there.read_bytes())
        match how:
            case "overwritten":
                content[len(content) // 2] ^= 0xFF
                there.write_bytes(content)
            case "truncated":
                there.write_bytes(content[:-1])
            case "removed":
                there.unlink()

    def is_temporary(self, path: str) -> bool:
        """Whether this name at the destination can be taken for a finished file by nobody."""
        return Path(path).name.startswith(".")

    # ---- the same for all

    def write(self, path: str, content: bytes) -> File:
        """A member at the source."""
        there = self.source / path
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(content)
        stat = there.stat()
        return File(str(self.source), path, stat.st_size, stat.st_mtime_ns)

    def action(self) -> actions.Action:
        """A new one, as after a start of the daemon."""
        context = Context(
            state_dir=str(self.state), nudge=lambda *what: self.nudges.append(what),
            bandwidth=lambda: SLOW_BYTES_PER_S if self.slow else None,
        )  # fmt: skip
        made: actions.Action = registry.find_action(self.name)(context)
        return made

    def request(self, files: tuple[File, ...], *, run: int = 1, attempt: int = 1) -> Request:
        defaults = {name: option.default for name, option in registry.find_action(self.name).OPTIONS.items()}
        return Request(
            run=run, attempt=attempt, rule="conformance", group={"chip": "c1"}, captures={"chip": "c1"},
            files=files, options={**defaults, **self.options()},
        )  # fmt: skip

    def elsewhere(self, verb: str, request: Request, handle: Any = None) -> Callable[[], dict[str, Any]]:
        """Begin the verb in another process; what is returned waits for its answer."""
        import subprocess

        (self.base / "request").write_bytes(pickle.dumps((request, handle, self.slow)))
        path = os.pathsep.join(part for part in sys.path if part)
        program = subprocess.Popen(
            [sys.executable, __file__, verb, self.name, str(self.base)], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

        def answer() -> dict[str, Any]:
            said, _ = program.communicate(timeout=PATIENCE_S)
            told: dict[str, Any] = json.loads(said)
            return told

        return answer


# A program that delivers every file of its manifest under its final name, and counts its executions.
DELIVER = """#!{python}
import json, os, shutil, sys, time
base, manifest, slow = sys.argv[1:]
with open(base + "/executions", "a") as file:
    file.write("x")
if slow == "slow":
    while not os.path.exists(base + "/go"):
        time.sleep(0.01)
for member in json.load(open(manifest))["files"]:
    target = os.path.join(base, "dest", member["path"])
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(member["absolute"], target + ".part")
    os.rename(target + ".part", target)
print(json.dumps(dict(delivered=True)))
"""

COMPARE = """#!{python}
import json, os, sys
base, manifest = sys.argv[1:]
for member in json.load(open(manifest))["files"]:
    with open(member["absolute"], "rb") as a, open(os.path.join(base, "dest", member["path"]), "rb") as b:
        if a.read() != b.read():
            sys.exit(1)
"""


class CommandBench(Bench):
    """A script delivers, a second one compares. A slow one waits until another life begins."""

    name = "command"

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        if not slow:
            (base / "go").touch()
        for name, text in (("deliver", DELIVER), ("compare", COMPARE)):
            if not (base / name).exists():  # it may be running
                (base / name).write_text(text.format(python=sys.executable))
                (base / name).chmod(0o755)

    def options(self) -> Mapping[str, Any]:
        slow = "slow" if self.slow else "fast"
        return {
            "run": (str(self.base / "deliver"), str(self.base), "{manifest}", slow),
            "verify": (str(self.base / "compare"), str(self.base), "{manifest}"),
        }

    def executions(self) -> int | None:
        trace = self.base / "executions"
        return len(trace.read_text()) if trace.exists() else 0


class CopyBench(Bench):
    """Below `dest`, as below the root."""

    name = "copy"

    def options(self) -> Mapping[str, Any]:
        return {"to": (str(self.dest),)}


BENCHES: Mapping[str, type[Bench]] = {bench.name: bench for bench in (CommandBench, CopyBench)}


def through_json(value: Any) -> Any:
    """What the journal gives back of a handle."""
    return json.loads(json.dumps(value))


def poll_to_end(action: actions.Action, request: Request, handle: Any) -> Progress:
    """Poll as the executor does, a little more often."""
    patience = time.monotonic() + PATIENCE_S
    while time.monotonic() < patience:
        try:
            progress = action.poll(request, handle)
        except actions.Unknown:
            time.sleep(0.05)
            continue
        if progress.status not in ("active", "inactive"):
            return progress
        time.sleep(min(progress.again_in_s, 0.05))
    raise AssertionError("the attempt did not end")


def _main(verb: str, name: str, base: str) -> None:
    request, handle, slow = pickle.loads((Path(base) / "request").read_bytes())
    if verb == "start":  # and die as a daemon dies: without a word to its provider
        bench = BENCHES[name](Path(base), slow=slow)
        action = bench.action()
        prepared = through_json(action.prepare(request)) if action.PREPARES else None
        print(json.dumps({"handle": action.start(request, prepared), "prepared": prepared}), flush=True)
        os.kill(os.getpid(), 9)
    bench = BENCHES[name](Path(base))
    action = bench.action()
    progress = poll_to_end(action, request, handle)
    action.close()
    print(json.dumps({"status": progress.status, "why": progress.why}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
