"""`python -m tests.prove [--quick] [PART...]`: prove the promises, and write a report.

Exit code 0 if nothing is broken and everything was done, 1 if a promise is
broken, 3 if something could not be done here (the report says what and why).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.prove.results import Result

PARTS = (
    "mutants", "crashpoints", "reclaims", "simulation", "sweep", "faults", "storage", "remote", "recovery", "week",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them without any")
    parser.add_argument("--quick", action="store_true", help="some of each, in minutes")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn by chance")
    parser.add_argument("--report", type=Path, default=Path("build/prove"), help="directory of the report")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    begun = time.time()
    results: list[tuple[Result, float]] = []
    for part in given.parts or PARTS:
        at = time.monotonic()
        results.append((_run(part, quick=given.quick, seed=given.seed), time.monotonic() - at))
        _write(given.report, results, begun, given.seed)
    broken = sum(len(result.violations) for result, _ in results)
    undone = sum(len(result.not_done) for result, _ in results)
    print(f"{broken} promises broken, {undone} things not done; the report is {given.report / 'report.md'}")
    return 1 if broken else 3 if undone else 0


def _run(part: str, *, quick: bool, seed: int) -> Result:
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    work = Path(tempfile.mkdtemp(prefix="prove", dir=parent))
    print(f"{part} ...", flush=True)
    try:
        module = importlib.import_module(f"tests.prove.{part}")
        result: Result = module.run(quick=quick, seed=seed, work=work, tell=_tell)
        return result
    except Exception as error:  # noqa: BLE001 one part that fails must not hide what the others found
        traceback.print_exc()
        return Result(part, {}, [], [f"{part} failed itself: {type(error).__name__}: {error}"])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tell(words: str) -> None:
    print(f"  {words}", flush=True)


def _write(directory: Path, results: Sequence[tuple[Result, float]], begun: float, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    plain = [{**asdict(result), "seconds": round(seconds, 1)} for result, seconds in results]
    (directory / "report.json").write_text(json.dumps({"begun": begun, "seed": seed, "parts": plain}, indent=1))
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(begun))
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    lines = ["# Proof of the promises", "", f"{day}, {machine}, seed {seed}.", ""]
    lines += ["| part | seconds | figures | broken | not done |", "| - | -: | - | -: | -: |"]
    for result, seconds in results:
        figures = ", ".join(f"{name}: {_number(value)}" for name, value in result.figures.items())
        cells = (result.part, f"{seconds:.0f}", figures, len(result.violations), len(result.not_done))
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    for result, _ in results:
        lines += ["", f"## {result.part}", ""]
        lines += [f"* **broken**: {_cell(words)}" for words in result.violations]
        lines += [f"* not done: {_cell(words)}" for words in result.not_done]
        if result.rows:
            heads = list(dict.fromkeys(head for row in result.rows for head in row))
            lines += ["", "| " + " | ".join(heads) + " |", "|" + " - |" * len(heads)]
            lines += ["| " + " | ".join(_cell(row.get(head, "")) for head in heads) + " |" for row in result.rows]
    (directory / "report.md").write_text("\n".join(lines) + "\n")


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
