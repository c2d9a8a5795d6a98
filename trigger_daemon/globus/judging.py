"""Hold a flow's input against its schema, within a time: the schema is somebody else's.

A pattern in it may take for ever on one text, with the interpreter's lock
held, so that the whole daemon stands; references may lead round without end.
What could do so is judged in a child with limits. What is not judged in time
is said to be so, and no fault: the service judges again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import subprocess
import sys
from typing import Any

from trigger_daemon.globus.definition import DefinitionFault, input_faults

JUDGE_S = 5.0  # a schema of a real flow takes some milliseconds, the child a quarter of a second to begin
MEMORY_BYTES_MAX = 1 << 30
ANSWER_BYTES_MAX = 1 << 20
# Without these a schema is walked along with the input, and that is all.
_UNBOUNDED = frozenset({"pattern", "patternProperties", "$ref", "$dynamicRef", "$recursiveRef"})


def judge_input(schema: Any, value: Any) -> list[DefinitionFault]:
    """Return what of an input does not fit; a warning alone if that could not be found out in time."""
    if not _unbounded(schema):
        return input_faults(schema, value)
    try:
        asked = json.dumps([schema, value]).encode()
    except (ValueError, TypeError, RecursionError):
        return input_faults(schema, value)  # refused before it is judged: no JSON, or too deep
    argv = [sys.executable, "-P", "-m", __name__]
    # Where the parent has its modules from, the child has them, too: with -P, not from where it stands.
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(argv, input=asked, capture_output=True, env=env, cwd="/", timeout=JUDGE_S, check=False)
    except subprocess.TimeoutExpired:
        return [_not_judged(f"within {JUDGE_S:g} s")]
    except OSError as error:
        return [_not_judged(f"as no process could be started: {error.strerror}")]
    try:
        if done.returncode or len(done.stdout) > ANSWER_BYTES_MAX:
            raise ValueError(done.stderr.decode("utf-8", "replace")[-500:])
        return [_fault(told) for told in json.loads(done.stdout)]
    except (ValueError, TypeError, KeyError) as error:  # out of memory or time, or an answer that is none
        logging.getLogger(__name__).warning("globus.input_not_judged", extra={"why": str(error)})
        return [_not_judged("with the memory and time that there is for it")]


def _not_judged(words: str) -> DefinitionFault:
    hint = "the service judges it again; look for a `pattern` that repeats a repetition, or a `$ref` in a circle"
    return DefinitionFault((), f"the input could not be held against the schema {words}", hint, "warning")


def _unbounded(schema: object) -> bool:
    waiting = [schema]
    while waiting:
        match waiting.pop():
            case dict() as found:
                if not _UNBOUNDED.isdisjoint(found):
                    return True
                waiting.extend(found.values())
            case list() as found:
                waiting.extend(found)
    return False


def _fault(told: dict[str, Any]) -> DefinitionFault:
    return DefinitionFault(**{**told, "path": tuple(told["path"])})


def main() -> None:
    """Judge what stands on standard input."""
    seconds = int(JUDGE_S) + 1  # a parent that was killed leaves nothing behind
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    schema, value = json.load(sys.stdin.buffer)
    json.dump([dataclasses.asdict(fault) for fault in input_faults(schema, value)], sys.stdout)


if __name__ == "__main__":
    main()
