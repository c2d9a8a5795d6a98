"""Does an HDF5 file (NeXus, too) end where its header says, and has its writer closed it?

The library that wrote it keeps both in the first bytes. It is never used here:
its way of opening a file takes a lock that makes the writer's own fail. A
writer that flushes an old-style file leaves it looking whole but for a flag
that is officially unused: that is suspect, no proof. So are holes, which a copy
leaves that sets the length first, and a writer that aligns its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._hdf5 import judge
from trigger_daemon.core.grammar import Options

OPTIONS: Options = {}


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Look at the header; one read of 128 bytes."""
    return judge(probe)
