"""Has a program the file open for writing, now? By a read lease, on local Linux disks only.

Off unless a rule names it, and to be used with care on the host that acquires:
the lease is held for some microseconds, after the quiet period, and a program
that opens the file for writing just then waits until it is given back; one
that opens it with O_NONBLOCK gets EWOULDBLOCK and may take that for a failure.
Were this process stopped in between, the kernel would take the lease away after
/proc/sys/fs/lease-break-time, 45 s as it comes.

It sees every descriptor and shared map of this host that may write, those of
other hosts never. It says nothing of what is in the file: a writer that
closes it between two frames is not seen, so name the format's check as well.
Files of other users need CAP_LEASE; without it the answer is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.core.grammar import Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {}


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Take a read lease and give it back; reads nothing."""
    match probe.writers():
        case True:
            return Outcome(Verdict.INCOMPLETE, "a program has it open for writing")
        case False:
            return Outcome(Verdict.COMPLETE, "no program has it open for writing")
    why = "only for one's own files or with CAP_LEASE, and on a local Linux disk"
    return Outcome(Verdict.UNKNOWN, f"whether a program has it open for writing cannot be told ({why})")
