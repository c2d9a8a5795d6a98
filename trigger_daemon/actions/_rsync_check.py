"""What a try shows before rules are in force: rsync here, its keys, the far side, and whether it can be written to.

It writes one empty hidden file at the destination and has rsync remove it
again; where that is refused the file stays, and the words say so. `standing`
says at which far paths something is, and writes nothing.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trigger_daemon.actions._copy_files import Trouble
from trigger_daemon.actions._looked import PATIENCE_S, PROBE, Looked, readable
from trigger_daemon.actions._rsync_target import FILES, Target, environment, reaching, target_of
from trigger_daemon.actions._rsync_words import trouble_of
from trigger_daemon.points import ABSENT

GLANCE_S = 15.0  # of one look, at many names, for which others wait

_NO_DIRECTORY = re.compile(rb"(mkdir|change_dir|chdir).*No such file or directory \(2\)")
_ITEM = re.compile(rb"([<>.ch]f[^\s|]*) *\|(.+)")
_ESCAPE = re.compile(rb"\\#([0-7]{3})")

def look(options: Mapping[str, Any], program: str) -> Iterator[Looked]:
    """Yield what is found, up to the first thing that keeps the others from being looked at."""
    target = target_of(options)
    rsync = shutil.which(program)
    if rsync is None:
        yield Looked("rsync", False, "there is none on this machine", "apt-get install rsync")
        return
    told = subprocess.run([rsync, "--version"], capture_output=True, text=True, env=environment(), timeout=PATIENCE_S)
    yield Looked("rsync", True, told.stdout.partition("\n")[0].strip())
    secrets = [
        readable(f"{name} {options[name]}", str(options[name]), secret=name in ("identity", "password_file"))
        for name in FILES
        if options.get(name)
    ]
    yield from secrets
    if not all(found.ok for found in secrets):
        return
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, PROBE), "wb"):
            pass
        reached = _try(rsync, options, target, directory, ["--dry-run", f"--include=/{PROBE}", "--exclude=*"])
        if reached is not None:
            yield reached
            return
        yield Looked(f"{target.seat} answers", True)
        written = _try(rsync, options, target, directory, [f"--include=/{PROBE}", "--exclude=*"])
        if written is not None:
            yield written
            return
        os.unlink(os.path.join(directory, PROBE))
        kept = _try(rsync, options, target, directory, ["--delete", f"--include=/{PROBE}", "--exclude=*"])
        stays = f"{PROBE} stays there: removing it is refused" if kept else ""
        yield Looked(f"{_place(target)} can be written to", True, stays)


def standing(options: Mapping[str, Any], target: Target, paths: Collection[str], program: str) -> set[str]:
    """Return at which of these paths below a far target something is, whichever links lead there. Raises Trouble.

    A directory is looked at at once; not all of them: rsync follows no link below the directory that it is given.
    """
    names: dict[str, set[str]] = {}
    for path in paths:
        directory, name = posixpath.split(f"{target.path}/{path}")
        names.setdefault(directory, set()).add(name)
    found: set[str] = set()
    for base, these in names.items():
        directory, there = base, _glance(options, target, base, these, program)
        while there is None and len(directory) > len(target.static):  # it is not there: is it in its own?
            directory, name = posixpath.split(directory)
            there = _glance(options, target, directory, {name}, program)
        if there is None:
            raise Trouble("transient", "destination", f"{_place(target)} is not there", "is its disk mounted there?",
                          counts=False)
        there = there if directory == base else these if there else set()  # it may be behind what stands in its way
        found |= {f"{base}/{name}" for name in there}
    return {path for path in paths if f"{target.path}/{path}" in found}


def _glance(
    options: Mapping[str, Any], target: Target, directory: str, names: Collection[str], program: str
) -> set[str] | None:
    """Return which of these names are in a far directory; None if that is not there. Raises Trouble.

    A dry run says what it would do with empty files of these names: this asks for no right that a proof does not need.
    """
    with tempfile.TemporaryDirectory() as source:
        for name in names:
            with open(os.path.join(source, name), "wb"):
                pass
        argv = [
            program, "--recursive", "--dry-run", "--itemize-changes", "--itemize-changes", "--8-bit-output",
            "--out-format=%i|%n", *reaching(options, target), f"--timeout={GLANCE_S:.0f}", "--", f"{source}/",
            target.argument(directory),
        ]  # fmt: skip
        try:
            ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment(),
                                   timeout=GLANCE_S, start_new_session=True, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            why = f"{target.seat} has not answered within {GLANCE_S:g} s"
            raise Trouble("transient", "destination", why, "is the machine, and the line, well?",
                          counts=False) from None
        except OSError as fault:
            raise Trouble("transient", "batch", f"cannot start rsync: {fault}", "was memory short?",
                          counts=False) from None
    if b"created directory " in ended.stdout or (ended.returncode and _NO_DIRECTORY.search(ended.stderr)):
        return None
    if ended.returncode:
        raise trouble_of(ended.returncode, ended.stderr.decode("utf-8", "backslashreplace"), target, options)
    told = {item[2]: item[1] for item in map(_ITEM.match, ended.stdout.splitlines()) if item}
    found = {os.fsdecode(_ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), name)): of for name, of in told.items()}
    if silent := set(names) - found.keys():
        raise Trouble("transient", "destination", f"rsync said nothing of {min(silent)} in {target.seat}",
                      "look there by hand")  # fmt: skip
    return {name for name in names if found[name][2:3] != b"+"}


def _try(rsync: str, options: Mapping[str, Any], target: Target, source: str, how: list[str]) -> Looked | None:
    """Run rsync from a directory of ours to the part that must exist; return what is wrong, None if nothing is."""
    argv = [
        rsync, "--recursive", "--omit-dir-times", "--itemize-changes", *reaching(options, target),
        *(("--timeout=30",) if target.is_remote else ()), *(("--fsync",) if options.get("fsync") else ()), *how,
        "--", f"{source}/", target.argument(target.static),
    ]  # fmt: skip
    what = f"{target.seat} answers" if "--dry-run" in how else f"{_place(target)} can be written to"
    try:
        ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment(),
                               timeout=PATIENCE_S, start_new_session=True)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Looked(what, False, f"no answer within {PATIENCE_S:g} s", "is the machine, and the line, well?", True)
    if ended.returncode == 0 and b"created directory" in ended.stdout:
        return Looked(what, False, f"{_place(target)} is not there", ABSENT)
    if ended.returncode == 0:
        return None
    trouble = trouble_of(ended.returncode, ended.stderr.decode("utf-8", "backslashreplace"), target, options)
    return Looked(what, False, trouble.why, trouble.hint, trouble.kind == "transient")


def _place(target: Target) -> str:
    return target.url().removesuffix(target.path) + target.static
