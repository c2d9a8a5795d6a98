"""What a try shows before rules are in force: rclone here, its configuration, the remote, its proof, and a write.

It writes one small hidden file at the destination and removes it again.
`standing` says at which names something is there, and writes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trigger_daemon.actions import Refused
from trigger_daemon.actions._looked import PATIENCE_S, PROBE, Looked, readable
from trigger_daemon.actions._rclone_hash import common
from trigger_daemon.actions._rclone_run import MISSING, Far, far_of, kind_of, listed_by, too_old, version_of
from trigger_daemon.actions._rclone_target import (
    OLDEST,
    Target,
    arguments,
    config_of,
    environment,
    joined,
    program,
    target_of,
)
from trigger_daemon.actions._rclone_words import Complaints, parsed, trouble_of
from trigger_daemon.core.model import Fault, Scope

GLANCE_S = 15.0  # of one look, for which others wait
INSTALL = f"install rclone {OLDEST[0]}.{OLDEST[1]} or newer: rclone.org/downloads"


def look(options: Mapping[str, Any]) -> Iterator[Looked]:
    """Yield what is found, up to the first thing that keeps the others from being looked at."""
    target = target_of(options)
    rclone = program()
    if rclone is None:
        yield Looked("rclone", False, "there is none on this machine", INSTALL)
        return
    told = subprocess.run([rclone, "version"], capture_output=True, text=True, env=environment(), timeout=PATIENCE_S,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    version = version_of(told.stdout)
    if version < OLDEST:
        yield Looked("rclone", False, too_old(version), INSTALL)
        return
    yield Looked("rclone", True, told.stdout.partition("\n")[0].strip())
    config = config_of(options)
    if os.path.exists(config) or options.get("config"):
        yield (found := readable(f"config {config}", config, secret=True))
        if not found.ok:
            return
    yield from _remote(_Asking(rclone, options, target))


def standing(options: Mapping[str, Any], target: Target, names: Sequence[str]) -> set[str]:
    """Return those of these names, below the remote's directory, at which a file is. Raises Refused."""
    if (rclone := program()) is None:
        raise Refused(Fault("person", "there is no rclone on this machine", INSTALL, Scope.DESTINATION))
    asking = _Asking(rclone, options, target, patience_s=GLANCE_S / 2)
    what, lines = f"{target.url()} is looked at", "".join(f"{name}\n" for name in names).encode()
    how = ("--recursive", "--files-only", "--no-modtime", "--no-mimetype", *listed_by(names))
    told, code, wrong = asking.ask(what, "lsjson", *how, target.url(), says=lines)
    if wrong is None:
        return {item["Path"] for item in json.loads(told)} & set(names)
    if code == MISSING:  # of a place that is away nothing is there, either
        _, code, wrong = asking.ask(what, "lsjson", "--stat", "--no-modtime", "--no-mimetype", asking.place)
    if wrong is None:
        return set()
    raise Refused(Fault("transient", wrong.why, wrong.hint, Scope.DESTINATION))


class _Asking:
    """One rclone after the other, each with a time limit."""

    def __init__(
        self, rclone: str, options: Mapping[str, Any], target: Target, patience_s: float = PATIENCE_S
    ) -> None:
        self._rclone, self._options, self.target, self._patience_s = rclone, options, target, patience_s
        self.verify = str(options.get("verify") or "hash")
        self.place = f"{target.remote}:{target.static}"
        self.probe = f"{target.remote}:{joined(target.static, PROBE)}"

    def ask(self, what: str, *command: str, says: bytes = b"") -> tuple[bytes, int, Looked | None]:
        """Return its answer, its exit code, and what is wrong."""
        argv = [self._rclone, *command, *arguments(self._options), "--retries", "1"]
        try:
            ended = subprocess.run(argv, input=says, capture_output=True, env=environment(),
                                   timeout=self._patience_s, start_new_session=True)  # fmt: skip
        except subprocess.TimeoutExpired:
            why = f"no answer within {self._patience_s:g} s"
            return b"", -1, Looked(what, False, why, "is it well, and the line?", True)
        if ended.returncode == 0:
            return ended.stdout, 0, None
        trouble = trouble_of(ended.returncode, _said(ended.stderr.splitlines()), self.target)
        return b"", ended.returncode, Looked(what, False, trouble.why, trouble.hint, trouble.kind == "transient")


def _remote(asking: _Asking) -> Iterator[Looked]:
    answers = f"{asking.target.seat} answers"
    features, _, wrong = asking.ask(answers, "backend", "features", asking.place)
    remotes = b"" if wrong else asking.ask(answers, "listremotes", "--long")[0]
    if wrong:
        yield wrong
        return
    far = replace(far_of(features), kind=kind_of(remotes, asking.target))
    _, code, wrong = asking.ask(answers, "lsjson", "--stat", "--no-modtime", asking.place)
    if code == MISSING:
        missing = "make the bucket" if far.is_bucket else "create the directory"
        yield Looked(f"{asking.place} is there", False, "it is not", f"{missing}, or correct `to` in the rule")
        return
    if wrong:
        yield wrong
        return
    yield Looked(answers, True, f"of type {far.kind}" if far.kind else "")
    yield _proof(asking, far)
    written = f"{asking.place} can be written to"
    if (wrong := asking.ask(written, "rcat", asking.probe, says=b"check\n")[2]) is not None:
        yield wrong
        return
    stays = asking.ask(written, "deletefile", asking.probe)[2]
    yield Looked(written, True, f"{PROBE} stays there: removing it is refused" if stays else "")


def _proof(asking: _Asking, far: Far) -> Looked:
    what = f"what {asking.target.remote} gives as proof"
    if asking.verify == "none":
        return Looked(what, True, "none is wanted")
    if asking.verify == "download":
        return Looked(what, True, "each file is read back")
    if name := common(far.hashes):
        return Looked(what, True, f"its {name} is compared")
    return Looked(what, False, "it keeps no digest that could be compared",
                  "set `verify: download`, which reads each file back, or `verify: none` with `proof: none`")


def _said(lines: Sequence[bytes]) -> list[str]:
    complaints = Complaints()
    for line in lines:
        complaints.take(parsed(line))
    return complaints.lines()


