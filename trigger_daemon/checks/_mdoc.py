"""Read SerialEM's mdoc: sections of `key = value` lines below `[ZValue = 3]` or `[FrameSet = 0]`.

Lines end with LF or CR LF. A last line without its end is left out: a number
that is cut is a number, too. `[T = …]` is a title, not a section.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from trigger_daemon.checks import Window
from trigger_daemon.checks._words import amount

BYTES_MAX = 4 * 2**20  # a tilt series of 41 has 20 kB
FRAME_SET = "FrameSet"  # of one movie; a [ZValue] is one of many in a stack or a series

_FRAMES = re.compile(r"0*[1-9][0-9]{0,8}")


@dataclass(slots=True)
class Section:
    """`kind`: ZValue, FrameSet, MontSection."""

    kind: str
    values: dict[str, str] = field(default_factory=dict)


def sections(data: bytes) -> list[Section]:
    """Return the sections in the file's order; blanks around keys and values are left out."""
    found: list[Section] = []
    for line in data.decode("utf-8", "replace").split("\n")[:-1]:
        key, equals, value = line.strip().partition("=")
        key = key.strip()
        if key.startswith("["):
            if key != "[T" and value.endswith("]"):
                found.append(Section(key[1:].strip()))
        elif equals and found:
            found[-1].values[key] = value.strip()
    return found


def frames_of(mdoc: Window, name: str, *, own: bool) -> int | str:
    """Return the number of frames that an mdoc gives for the file `name`, or why there is none.

    The section that speaks of the file is the one whose SubFramePath ends with
    its name, whatever the directory and the case; of several the last. With
    `own` (the mdoc is named after the file) a lone frame set does so, too,
    whatever path it gives, for files are renamed together with their mdoc.
    """
    if mdoc.size > BYTES_MAX:
        return f"{mdoc.name} is too large to be looked at ({amount(mdoc.size)})"
    all_of_it = sections(mdoc.read(0, BYTES_MAX))
    wanted = _base(os.fsencode(name).decode("utf-8", "replace"))
    about = [section for section in all_of_it if _base(section.values.get("SubFramePath", "")) == wanted]
    if not about:
        frame_sets = [section for section in all_of_it if section.kind == FRAME_SET]
        if own and len(frame_sets) == 1:
            about = frame_sets
        elif len(all_of_it) == 1 and "SubFramePath" not in all_of_it[0].values:
            about = all_of_it
    if not about:
        return f"{mdoc.name} says nothing about it"
    said = about[-1].values.get("NumSubFrames", "")
    return int(said) if _FRAMES.fullmatch(said) else f"{mdoc.name} has no NumSubFrames for it"


def _base(path: str) -> str:
    """Return what follows the last separator of a Windows or POSIX path, in small letters."""
    return re.split(r"[\\/]", path)[-1].lower()
