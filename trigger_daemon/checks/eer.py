"""Does an EER movie hold everything its directories refer to, and as many frames as its acquisition data announce?

`frames` is used in place of what the file announces. A directory of another
compression is the final sum, no frame. A TIFF that is no EER is suspect.
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
    """Walk all directories: a read a frame, of some 300 bytes where a directory has all its values in itself."""
    return judge(probe, options.get("frames"), companions, must_be_eer=True)
