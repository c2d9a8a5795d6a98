"""Does a TIFF (BigTIFF, EER) hold everything its directories refer to, and as many frames as expected?

libtiff leaves a valid file after every frame, so only the expected number
tells a whole movie from half of one: say `frames`. EER says it itself, in the
acquisition data of its first directory. A frame of which nothing is written is
incomplete; strips or tiles that are left out, as in sparse files, are suspect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._frames import FRAMES, MDOC
from trigger_daemon.checks._tiff import judge
from trigger_daemon.core.grammar import Options

OPTIONS: Options = {"frames": FRAMES}


def asks(options: Mapping[str, Any]) -> bool:
    """Say whether the check asks for the file's mdoc."""
    return options.get("frames") == MDOC


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Walk all directories; about one read of 2 kB a frame."""
    return judge(probe, options.get("frames"), companions)
