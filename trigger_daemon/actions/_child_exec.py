"""Become a program that ends with its parent: `python -I -S _child_exec.py PARENT_PID PROGRAM ARGV0 ...`.

The kernel kills it when the worker that waits for it has ended, whatever ended
that; what it has started gets a HUP if it stands still then, and so neither that
nor what it is stopped with may be ignored, as a daemon may have inherited it.
Standard library only, and little of it: it runs before every rsync and rclone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: str, program: str, *argv: str) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(0)
    for number in (signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    os.execv(program, argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
