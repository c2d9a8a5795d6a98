"""Run a program, its threads and children, and stand before each call that changes what lies below some directories.

The kernel's filter (seccomp) lets every other call pass at full speed. At the
stop the call has not happened yet: whoever is asked may let it go on, pretend
that it was done, cut the power, kill one process or all. Linux on x86-64 only.

This file is also the small program that puts the filter on itself and then
becomes the command: standard library only, `python -I -S tracer.py ARGV...`.
"""

from __future__ import annotations

import ctypes
import enum
import os
import platform
import signal
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
UNSUPPORTED = "the tracer knows the system calls of Linux on x86-64 only"

# ------------------------------------------------------------------------ calls

# What an argument says: a descriptor, a path, or a path below a descriptor of a directory (the argument before it).
FD, PATH, AT = "fd", "path", "at"

# Number -> name, and where in its arguments the things lie that it changes.
CALLS: dict[int, tuple[str, tuple[tuple[str, int], ...]]] = {
    1: ("write", ((FD, 0),)),
    18: ("pwrite64", ((FD, 0),)),
    20: ("writev", ((FD, 0),)),
    296: ("pwritev", ((FD, 0),)),
    328: ("pwritev2", ((FD, 0),)),
    40: ("sendfile", ((FD, 0),)),
    275: ("splice", ((FD, 2),)),
    326: ("copy_file_range", ((FD, 2),)),
    16: ("ioctl", ((FD, 0),)),
    285: ("fallocate", ((FD, 0),)),
    77: ("ftruncate", ((FD, 0),)),
    76: ("truncate", ((PATH, 0),)),
    2: ("open", ((PATH, 0),)),
    85: ("creat", ((PATH, 0),)),
    257: ("openat", ((AT, 1),)),
    437: ("openat2", ((AT, 1),)),
    74: ("fsync", ((FD, 0),)),
    75: ("fdatasync", ((FD, 0),)),
    277: ("sync_file_range", ((FD, 0),)),
    306: ("syncfs", ((FD, 0),)),
    82: ("rename", ((PATH, 0), (PATH, 1))),
    264: ("renameat", ((AT, 1), (AT, 3))),
    316: ("renameat2", ((AT, 1), (AT, 3))),
    86: ("link", ((PATH, 0), (PATH, 1))),
    265: ("linkat", ((AT, 1), (AT, 3))),
    88: ("symlink", ((PATH, 1),)),
    266: ("symlinkat", ((AT, 2),)),
    87: ("unlink", ((PATH, 0),)),
    263: ("unlinkat", ((AT, 1),)),
    83: ("mkdir", ((PATH, 0),)),
    258: ("mkdirat", ((AT, 1),)),
    84: ("rmdir", ((PATH, 0),)),
    133: ("mknod", ((PATH, 0),)),
    259: ("mknodat", ((AT, 1),)),
    90: ("chmod", ((PATH, 0),)),
    91: ("fchmod", ((FD, 0),)),
    268: ("fchmodat", ((AT, 1),)),
    452: ("fchmodat2", ((AT, 1),)),
    92: ("chown", ((PATH, 0),)),
    93: ("fchown", ((FD, 0),)),
    94: ("lchown", ((PATH, 0),)),
    260: ("fchownat", ((AT, 1),)),
    132: ("utime", ((PATH, 0),)),
    235: ("utimes", ((PATH, 0),)),
    261: ("futimesat", ((AT, 1),)),
    280: ("utimensat", ((AT, 1),)),
    188: ("setxattr", ((PATH, 0),)),
    189: ("lsetxattr", ((PATH, 0),)),
    190: ("fsetxattr", ((FD, 0),)),
    197: ("removexattr", ((PATH, 0),)),
    198: ("lremovexattr", ((PATH, 0),)),
    199: ("fremovexattr", ((FD, 0),)),
}  # fmt: skip
SYNCS = frozenset({"fsync", "fdatasync", "sync_file_range", "syncfs"})

_OPENS = {2: 1, 257: 2}  # call -> the argument with its flags; only those that make or empty a file count
_OPEN_CHANGES = os.O_CREAT | os.O_TRUNC
_IOCTL = 16
_CLONES = (0x40049409, 0x4020940D)  # FICLONE, FICLONERANGE

# ----------------------------------------------------------------------- filter

_FILTERED, _FOLLOWED = b"g", b"f"  # what the tracer says at the gate

_ARCH_X86_64 = 0xC000003E
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06


def _filter() -> bytes:
    """Return the BPF program: TRACE for the calls above, ALLOW for all others."""
    nr, arch = 0, 4
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, arch),
        (_JUMP_EQUAL, 1, 0, _ARCH_X86_64),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_LOAD, 0, 0, nr),
    ]
    for number, argument in _OPENS.items():
        code += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_JUMP_ANY_BIT, 0, 1, _OPEN_CHANGES),
            (_RETURN, 0, 0, _RET_TRACE),
            (_RETURN, 0, 0, _RET_ALLOW),
        ]
    code += [
        (_JUMP_EQUAL, 0, 5, _IOCTL),
        (_LOAD, 0, 0, 16 + 8),
        (_JUMP_EQUAL, 1, 0, _CLONES[0]),
        (_JUMP_EQUAL, 0, 1, _CLONES[1]),
        (_RETURN, 0, 0, _RET_TRACE),
        (_RETURN, 0, 0, _RET_ALLOW),
    ]
    for number in sorted(CALLS.keys() - _OPENS.keys() - {_IOCTL}):
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _RET_TRACE)]
    code.append((_RETURN, 0, 0, _RET_ALLOW))
    return b"".join(struct.pack("HBBI", op, yes, no, value) for op, yes, no, value in code)


def pass_gate(gate: int) -> None:
    """Wait until the tracer is there, and put the filter on if it wants one; for the process that is to be traced."""
    word = os.read(gate, 1)
    os.close(gate)
    if not word:
        os._exit(127)  # the tracer is gone
    if word == _FOLLOWED:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    one, nothing = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.prctl(set_no_new_privileges, one, nothing, nothing, nothing) or libc.prctl(
        set_seccomp, ctypes.c_ulong(mode_filter), fprog, nothing, nothing
    ):
        sys.stderr.write(f"no seccomp filter: {os.strerror(ctypes.get_errno())}\n")
        os._exit(126)


def command(argv: Sequence[str], *, output: Path | None = None) -> Callable[[int], int]:
    """Return what a `Tracer` starts: a program, by its whole path, whose output goes to the end of a file."""

    def start(gate: int) -> int:
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, gate, 0)]
        if output is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            actions.append((os.POSIX_SPAWN_OPEN, 1, os.fspath(output), flags, 0o666))
            actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
        launcher = [sys.executable, "-I", "-S", os.path.abspath(__file__), *argv]
        return os.posix_spawn(sys.executable, launcher, os.environ, file_actions=actions)

    return start


# ----------------------------------------------------------------------- ptrace

_CONT, _GETREGS, _SETREGS, _GETEVENTMSG = 7, 12, 13, 0x4201
_SEIZE, _LISTEN = 0x4206, 0x4208
_EVENT_SECCOMP, _EVENT_STOP = 7, 128
# fork, vfork, clone, exec, seccomp; and whoever is traced dies with the tracer
_OPTIONS = 0x02 | 0x04 | 0x08 | 0x10 | 0x80 | 0x100000
_WAIT = 0x40000000 | 0x20000000  # __WALL, and only the children of this thread: others wait for theirs
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

_REGISTERS = struct.Struct("27Q")  # struct user_regs_struct
_RAX, _ORIG_RAX = 10, 15
_ARGUMENTS = (14, 13, 12, 7, 9, 8)  # rdi rsi rdx r10 r8 r9
_AT_FDCWD = -100
_PATH_MAX = 4096


class Answer(enum.Enum):
    """What is to become of a call, and of those who make calls."""

    GO = "go on"
    PRETEND = "it is not done, and its caller is told that it was"
    KILL = "not done; all processes are killed"
    KILL_ONE = "not done; the process whose call it is is killed, the others go on"
    CUT = "not done; the power is cut, and all processes are gone"


class Call(NamedTuple):
    """A call that is about to happen."""

    number: int  # in this run, from 1
    thread: int
    name: str
    path: str  # absolute; of a rename "old -> new"


class Tracer:
    """One traced command. `ask` is called in the tracer's own thread, one call at a time."""

    def __init__(
        self,
        start: Callable[[int], int],
        below: Sequence[Path],
        ask: Callable[[Call], Answer],
        *,
        cut: Callable[[], None] | None = None,
    ) -> None:
        """Start it: `start` makes a process that passes `pass_gate` with the descriptor given, and returns its id.

        With nothing `below` no call is stopped at; all still die with this
        process. Raises OSError where the kernel refuses.
        """
        if not SUPPORTED:
            raise OSError(UNSUPPORTED)
        self._make = start
        self._below = [os.path.realpath(directory) for directory in below]
        self._ask, self._cut = ask, cut
        self._tracees: set[int] = set()
        self._ending = False
        self._started, self._ended = threading.Event(), threading.Event()
        self.fired = threading.Event()  # an answer other than GO or PRETEND was given
        self.calls = 0
        self.pid = 0
        self.status: int | None = None  # of the command itself
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()
        self._started.wait()
        if self.error is not None:
            raise self.error

    # ------------------------------------------------------------- any thread

    @property
    def ended(self) -> bool:
        """All of them are gone, and reaped."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until all are gone; raise TimeoutError, or what went wrong in the tracer."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"after {timeout_s:g} s processes are left: {sorted(self._tracees)}")
        self._thread.join()
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """Kill all; returns at once."""
        self._ending = True
        for tracee in list(self._tracees):
            _kill(tracee)

    # ------------------------------------------------------------ own thread

    def _run(self) -> None:
        try:
            self._start()
            self._started.set()
            self._follow()
        except BaseException as error:  # noqa: BLE001  whoever waits gets it
            self.error = error
            self.kill()
        finally:
            self._started.set()
            self._ended.set()

    def _start(self) -> None:
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._ptrace.restype = ctypes.c_long
        self._registers = ctypes.create_string_buffer(_REGISTERS.size)
        gate, opener = os.pipe()
        try:
            self.pid = self._make(gate)
            self._tracees.add(self.pid)
            if self._do(_SEIZE, self.pid, 0, _OPTIONS) < 0:
                raise OSError(f"cannot trace: {os.strerror(ctypes.get_errno())}")
            os.write(opener, _FILTERED if self._below else _FOLLOWED)
        finally:
            os.close(gate)
            os.close(opener)

    def _do(self, request: int, tracee: int, address: int = 0, data: int = 0) -> int:
        return int(self._ptrace(request, tracee, address, data))

    def _follow(self) -> None:
        """Until nobody is left. A tracee that was killed meanwhile answers no request, and that is all right."""
        while True:
            try:
                tracee, status = os.waitpid(-1, _WAIT)
            except ChildProcessError:
                return
            if not os.WIFSTOPPED(status):
                self._tracees.discard(tracee)
                if tracee == self.pid:
                    self.status = os.waitstatus_to_exitcode(status)
                continue
            self._tracees.add(tracee)
            if self._ending:
                _kill(tracee)
                continue
            sig, event = os.WSTOPSIG(status), status >> 16
            if event == _EVENT_SECCOMP:
                self._stand_before(tracee)
            elif event == _EVENT_STOP and sig in _STOPS:
                self._do(_LISTEN, tracee)
            else:
                self._do(_CONT, tracee, 0, 0 if event else sig)

    def _stand_before(self, tracee: int) -> None:
        address = ctypes.addressof(self._registers)
        if self._do(_GETREGS, tracee, 0, address) < 0:
            return
        registers = list(_REGISTERS.unpack(self._registers.raw))
        name, things = CALLS[registers[_ORIG_RAX]]
        arguments = [registers[n] for n in _ARGUMENTS]
        path = self._path(tracee, things, arguments)
        answer = Answer.GO
        if path is not None:
            self.calls += 1
            answer = self._ask(Call(self.calls, tracee, name, path))
        if answer is Answer.GO:
            self._do(_CONT, tracee)
        elif answer is Answer.PRETEND:
            registers[_ORIG_RAX], registers[_RAX] = 2**64 - 1, 0  # no call has the number -1: the kernel passes over it
            ctypes.memmove(self._registers, _REGISTERS.pack(*registers), _REGISTERS.size)
            self._do(_SETREGS, tracee, 0, address)
            self._do(_CONT, tracee)
        elif answer is Answer.KILL_ONE:
            _kill(tracee)
            self.fired.set()
        else:
            if answer is Answer.CUT and self._cut is not None:
                self._cut()
            self.kill()
            self.fired.set()

    # ------------------------------------------------------------------ paths

    def _path(self, tracee: int, things: Sequence[tuple[str, int]], arguments: Sequence[int]) -> str | None:
        """Return what the call changes, if that lies below one of the directories."""
        paths = [self._thing(tracee, kind, at, arguments) for kind, at in things]
        if not any(self._is_below(path) for path in paths):
            return None
        return " -> ".join(paths)

    def _is_below(self, path: str) -> bool:
        return any(path == directory or path.startswith(directory + "/") for directory in self._below)

    def _thing(self, tracee: int, kind: str, at: int, arguments: Sequence[int]) -> str:
        try:
            if kind == FD:
                return _link(f"/proc/{tracee}/fd/{_number(arguments[at])}")
            text = _text(tracee, arguments[at])
            if text.startswith("/"):
                return os.path.normpath(text)
            directory = _number(arguments[at - 1]) if kind == AT else _AT_FDCWD
            here = "cwd" if directory == _AT_FDCWD else f"fd/{directory}"
            return os.path.normpath(os.path.join(_link(f"/proc/{tracee}/{here}"), text))
        except OSError:
            return ""  # a bad descriptor or address: the call will fail


def _link(path: str) -> str:
    return os.readlink(path).removesuffix(" (deleted)")


def _number(register: int) -> int:
    """Return the C int in a register."""
    return int(ctypes.c_int(register & 0xFFFFFFFF).value)


def _text(tracee: int, address: int) -> str:
    """Read a path from a tracee's memory, page by page: the next page may not be there."""
    if not address:
        return ""  # utimensat on the descriptor itself
    found = b""
    memory = os.open(f"/proc/{tracee}/mem", os.O_RDONLY)
    try:
        while len(found) < _PATH_MAX:
            page = os.pread(memory, 4096 - (address + len(found)) % 4096, address + len(found))
            end = page.find(b"\0")
            if end >= 0:
                return os.fsdecode(found + page[:end])
            if not page:
                break
            found += page
    finally:
        os.close(memory)
    return os.fsdecode(found)


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    beginning = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pass_gate(beginning)
    os.execv(sys.argv[1], sys.argv[1:])
