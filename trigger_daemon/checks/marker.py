"""Is the file's done file there? For instruments and scripts that say themselves when a file is finished.

The done file lies in the same directory (or below it), counts even if it is
empty, must be quiet as its file must, and travels along as a companion. The
rule's `match` must not name it, or it is taken for a file of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Verdict

DEFAULT = "{stem}.done"

OPTIONS: Options = {
    "file": Option(
        "text", "name of the done file; {name} is the file's name, {stem} the same without its last extension",
        default=DEFAULT,
    ),
}

_BRACES = re.compile(r"\{([^{}]*)\}")
_HINT = 'write for example file: "{stem}.done"'


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionFault for a name that can never be that of a done file."""
    file = _file(options)
    if fault := _fault(file):
        raise OptionFault("file", f"{file!r} {fault}", _HINT)


def asks(options: Mapping[str, Any]) -> bool:
    """Say that the check asks for other files."""
    return True


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Ask for the done file until it is there; reads nothing."""
    file = _file(options)
    marker = "" if _fault(file) else _filled(file, probe.name)
    if not marker or marker == probe.name:
        return Outcome(Verdict.SUSPECT, f"{file!r} names no done file of {probe.name}")
    if marker not in companions:
        return Outcome(Verdict.INCOMPLETE, f"its done file {marker} is not there yet", (marker,))
    return Outcome(Verdict.COMPLETE, f"its done file {marker} is there", (marker,))


def _file(options: Mapping[str, Any]) -> str:
    file = options.get("file")
    return DEFAULT if file is None else str(file)


def _fault(file: str) -> str:
    """Return what is wrong with the name, '' if nothing."""
    unknown = [name for name in _BRACES.findall(file) if name not in ("name", "stem")]
    if unknown or set(_BRACES.sub("", file)) & {"{", "}"}:
        return "has braces with something else than {name} or {stem} in them"
    if file == "{name}":
        return "names the file itself"
    if set(file) & {"*", "?"}:
        return "is no name: * and ? mean nothing here"
    if "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
        return "is not the name of a file in the same directory or below it"
    return ""


def _filled(file: str, name: str) -> str:
    """Fill in both at once, for a file's name may hold braces, too."""
    known = {"name": name, "stem": os.path.splitext(name)[0]}
    return _BRACES.sub(lambda found: known[found[1]], file)
