"""Deliberate bugs, one and more for each law of the oracle: a proof that cannot fail proves nothing.

Run as a script it is the daemon with one bug: `mutants.py BUG serve --config FILE`.
Its copying processes have the bug, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# ------------------------------------------------------------------------- the bugs


def overlook() -> None:
    """A file that nobody hears of: its rows are dropped."""
    from trigger_daemon.core.settle import Settling

    found = Settling.found
    Settling.found = lambda self, fact, rows, earlier: found(  # type: ignore[method-assign]
        self, fact, [row for row in rows if row[0] != "3.tif"], earlier
    )


def hasten() -> None:
    """No quiet period: a file goes as soon as it is seen twice."""
    from trigger_daemon.core.settle import Settling

    made = Settling.__init__

    def make(self: Any, *args: Any, **keys: Any) -> None:
        made(self, *args, **keys)
        self.quiescence_s = 0.0

    Settling.__init__ = make  # type: ignore[method-assign]


def forget_attempts() -> None:
    """After a restart it does not recognise what it started: a program is executed again."""
    from trigger_daemon.actions.command import Action

    directory = Action._directory
    Action._directory = lambda self, request: f"{directory(self, request)}{os.getpid()}"  # type: ignore[method-assign]


def start_before_commit() -> None:
    """It acts first and writes down afterwards."""
    from trigger_daemon.core import model
    from trigger_daemon.daemon import Life

    write = Life._write_and_carry

    async def carry_first(self: Any, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, model.BatchClosed) and effect.request["action"] == "command":
                _execute(effect)
        await write(self, effects)

    Life._write_and_carry = carry_first  # type: ignore[method-assign]


def _execute(batch: Any) -> None:
    files = [{"path": m.path, "size": m.size, "mtime_ns": m.mtime_ns} for m in batch.members]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as manifest:
        json.dump({"files": files}, manifest)
        manifest.flush()
        run = [part.replace("{manifest}", manifest.name) for part in batch.request["options"]["run"]]
        subprocess.run(run, check=True)


def write_in_place() -> None:
    """No temporary name: what is half written lies under the final one."""
    from trigger_daemon.actions import _copy_job

    _copy_job.temp_name = lambda target, *rest: target  # type: ignore[assignment]


def believe() -> None:
    """Written is proved: nothing is read back. The disk flips a bit."""
    from trigger_daemon.actions import _copy_job

    def verify(self: Any, unit: Any) -> None:
        _copy_job.damage(unit.temp, unit.file.size // 2)
        os.utime(unit.temp, ns=(unit.mtime_ns, unit.mtime_ns))  # a disk that rots tells nobody
        unit.how = self.how(unit.dest, True, os.stat(unit.temp).st_dev)

    _copy_job.Job._verify = verify  # type: ignore[method-assign]


def tidy_up() -> None:
    """It removes what it has copied."""
    from trigger_daemon.actions import _copy_job

    done = _copy_job.Job.done

    def remove(self: Any, unit: Any) -> None:
        done(self, unit)
        os.unlink(unit.file.source)

    _copy_job.Job.done = remove  # type: ignore[method-assign]


class Mutant(NamedTuple):
    law: str
    bug: Callable[[], None]
    plan: str = ""  # where it dies in its first life, in the words of TRIGGER_FAIL


MUTANTS = {
    "overlook": Mutant("missed", overlook),
    "hasten": Mutant("early", hasten),
    "forget_attempts": Mutant("twice", forget_attempts, "executor.started:kill@1"),
    "start_before_commit": Mutant("twice", start_before_commit),
    "write_in_place": Mutant("partial", write_in_place, "copy.write:kill_parent@2"),
    "believe": Mutant("verified", believe),
    "tidy_up": Mutant("deleted", tidy_up),
}


# ---------------------------------------------------------------------- as the daemon


def _be(name: str, args: list[str]) -> None:
    from trigger_daemon.actions import _lanes

    MUTANTS[name].bug()
    if args[0] == "--lane":
        from trigger_daemon.actions import _lane

        sys.argv[1:] = args[1:]
        _lane.main()

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, argv: list[str], **keys: Any) -> None:
            if argv[2:4] == ["-m", "trigger_daemon.actions._lane"]:
                argv = [argv[0], argv[1], os.path.abspath(__file__), name, "--lane", *argv[4:]]
            super().__init__(argv, **keys)

    _lanes.subprocess = _Shim(Popen)  # type: ignore[assignment]
    from trigger_daemon.cli import main

    main(args)


class _Shim:
    def __init__(self, popen: type[Any]) -> None:
        self.Popen = popen

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


# ------------------------------------------------------------------------ as the proof


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Any:
    """Let the oracle look at each mutant. One that it does not see is a law that proves nothing: a violation."""
    from tests.prove.results import Result  # not above: as the daemon this file stands alone

    names = ["believe"] if quick else list(MUTANTS)
    rows, missed = [], []
    with ThreadPoolExecutor(2) as lanes:
        for name, laws in zip(names, lanes.map(lambda name: _caught(name, work), names), strict=True):
            law = MUTANTS[name].law
            if law not in laws:
                missed.append(f"the law {law!r} did not see the bug {name!r}; seen: {laws}")
            bug = (MUTANTS[name].bug.__doc__ or "").splitlines()[0]
            rows.append({"law": law, "bug": bug, "seen by": ", ".join(laws)})
            tell(f"mutants: {len(rows)} of {len(names)}, {len(missed)} not seen")
    return Result("mutants", {"deliberate bugs": len(names), "caught": len(names) - len(missed)}, missed, [], rows)


def _caught(name: str, work: Path) -> list[str]:
    with tempfile.TemporaryDirectory(dir=work) as base:
        return catch(name, Path(base))


def catch(name: str, base: Path) -> list[str]:
    """Run a mutant through the stage; return the laws that it was seen to break."""
    from tests.prove.stage import Stage

    mutant = MUTANTS[name]
    stage = Stage(base)
    program = (os.path.abspath(__file__), name)
    laws: list[str] = []
    try:
        stage.before()
        stage.site.start(wait=False, env={"TRIGGER_FAIL": mutant.plan}, program=program)
        for number in range(4):  # slow enough for a hasty one
            stage.writer.parts(f"c/{number}.tif", *(bytes([number, part]) * 999 for part in range(4)), pause_s=0.25)
        laws += _watched(stage, mutant, idle=not mutant.plan)
        if mutant.plan and mutant.law not in laws:
            stage.site.start(wait=False, program=program)
            laws += _watched(stage, mutant, idle=True)
    finally:
        stage.close()
    return sorted(set(laws))


def _watched(stage: Any, mutant: Mutant, *, idle: bool) -> Iterator[str]:
    """Yield the laws that are broken by the time it is done, has died, or ten seconds have passed."""
    process = stage.site.process
    try:
        stage.site.until(lambda: process.poll() is not None or (idle and stage.is_idle()), 10.0, "it is done")
    except AssertionError:
        pass
    if process.poll() is None:
        stage.site.kill()
    yield from (violation.law for violation in stage.judge(idle=idle))


if __name__ == "__main__":
    _be(sys.argv[1], sys.argv[2:])
