"""Run one program and keep its end: the small process that stands between the daemon and a command.

It outlives the daemon. Everything it knows is in its directory, each record
durable (fsync of file and directory, rename in between) before the next step
is taken, so that whoever looks later, after a crash of anybody at any line,
can tell what happened:

    lock held                            it is under way
    end.json                             it ended, and how
    neither, no begun.json               the program was never executed
    neither, begun.json, process there   the supervisor was killed, the program goes on
    neither, begun.json, no process      nobody knows

`begun.json` is written after the fork and before the exec: the child waits at
a gate until it stands on disk, and gives up when the gate closes unopened.
A program ends with all it started: what it leaves in the background is ended
too, else a new attempt could meet the remains of the last one.

Started as a script (`python -I -S`), with the standard library only; it
imports little, because it starts once a run. As a module it gives its file
names to `command.py`.

    _supervisor.py DIRECTORY TIMEOUT_S GRACE_S PROGRAM CWD ARGV...     (the environment is the program's)

On standard output it tells its parent one line: `begun`, `busy`, or
`refused STEP ERRNO`; the end of the stream is its own end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

LOCK = "lock"  # flocked while the supervisor lives
BEGUN = "begun.json"
END = "end.json"
CHANGED = "changed.json"  # paths of members that were no longer the manifest's version at the end
CANCEL = "cancel"  # exists: the attempt is to end
MANIFEST = "manifest.json"
FILES = "files"  # absolute paths, NUL after each, in the manifest's order
STDOUT = "stdout"
STDERR = "stderr"

KEPT_BYTES = 64 * 1024  # of each stream, from its beginning and again from its end: enough for any traceback
READ_BYTES = 64 * 1024  # the usual size of a pipe
DRAIN_READS_MAX = 32  # a pipe holds 1 MiB at most; what still comes after that is from something left behind
TICK_S = 0.5  # how soon a cancel or the timeout is noticed
LOCK_TRIES_MAX = 20  # 2 s: somebody who only asks holds the lock for microseconds
RECORD_TRIES_MAX = 3600  # an hour for a full disk to be emptied, before the end of a program is lost

_PR_SET_CHILD_SUBREAPER = 36
_ENDING = ("SIGTERM", "SIGINT", "SIGHUP")


def boot_id() -> str:
    """Return what names this boot of the machine; '' where the system has no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def stat_of(pid: int) -> tuple[str, int, int, int] | None:
    """Return state letter, parent, process group and start (clock ticks since boot); None if it is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()  # the name before it may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[19])


def descendants(of: int) -> list[tuple[int, int]]:
    """Return (pid, process group) of every living process below `of`."""
    below: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := stat_of(int(name))) and stat[0] != "Z":
            below.setdefault(stat[1], []).append((int(name), stat[2]))
    found: list[tuple[int, int]] = []
    waiting = [of]
    while waiting:
        children = below.pop(waiting.pop(), [])
        found += children
        waiting += [pid for pid, _ in children]
    return found


def signal_all(of: int, number: int, *, group: int | None) -> None:
    """Signal everything below `of`; `group`, a process group known to be ours still, at one blow."""
    if group is not None:
        _kill(-group, number)
    for pid, its_group in descendants(of):
        if its_group != group:  # a second TERM would read as "now, at once"
            _kill(pid, number)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # gone already; or it changed its user, then we can only wait
        return


def record(path: str, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, also after a power cut."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o660)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)
    sync_directory(directory or ".")


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def changed_members(directory: str) -> list[str]:
    """Return the paths of members that are gone or no longer have the manifest's size and mtime_ns."""
    import json  # here, because it costs as much as the rest of the start

    with open(os.path.join(directory, MANIFEST), encoding="utf-8") as file:
        members = json.load(file)["files"]
    with open(os.path.join(directory, FILES), "rb") as file:
        names = file.read().split(b"\0")
    changed = []
    for member, name in zip(members, names, strict=False):
        try:
            now = os.lstat(name)
        except FileNotFoundError:
            changed.append(member["path"])
            continue
        except OSError:  # a mount that is away: not known, and never "gone"
            continue
        if (now.st_size, now.st_mtime_ns) != (member["size"], member["mtime_ns"]):
            changed.append(member["path"])
    return changed


class Stream:
    """One output of the program: its first and last KEPT_BYTES; a program that prints for ever fills no disk."""

    def __init__(self, name: str, source: int) -> None:
        self.source = source
        self._file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o660)
        self._head_bytes = 0
        self._tail = bytearray()
        self._total_bytes = 0
        os.set_blocking(source, False)

    def pump(self) -> bool:
        """Take what waits; false at the end of the stream."""
        try:
            data = os.read(self.source, READ_BYTES)
        except BlockingIOError:
            return True
        self._total_bytes += len(data)
        head = data[: KEPT_BYTES - self._head_bytes]
        if head:
            self._head_bytes += len(head)
            self._write(head)  # at once, for people who look while it runs
        self._tail += data[len(head) :]
        if len(self._tail) > 2 * KEPT_BYTES:
            del self._tail[:-KEPT_BYTES]
        return bool(data)

    def finish(self) -> None:
        """Take the rest that is there now, write the tail, make it durable."""
        for _ in range(DRAIN_READS_MAX):
            before = self._total_bytes
            if not self.pump() or self._total_bytes == before:
                break
        os.close(self.source)  # what still writes to it gets SIGPIPE
        del self._tail[:-KEPT_BYTES]
        left_out = self._total_bytes - self._head_bytes - len(self._tail)
        if left_out:
            self._write(b"\n[... %d bytes are not kept ...]\n" % left_out)
        self._write(bytes(self._tail))
        try:
            os.fsync(self._file)
            os.close(self._file)
        except OSError:  # a full disk loses the words of a program, not its end
            return

    def _write(self, data: bytes) -> None:
        try:
            _write_all(self._file, data)
        except OSError:
            return


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Supervisor:
    """One program from its fork to its end, in the current directory; the lock is ours."""

    def __init__(self, program: str, cwd: str, argv: list[str], *, timeout_s: float, grace_s: float) -> None:
        self._program = program
        self._cwd = cwd
        self._argv = argv
        self._timeout_s = timeout_s
        self._grace_s = grace_s  # between TERM and KILL
        self._told_to_end = False

    def run(self) -> None:
        """Fork, record, execute, wait, record."""
        self._listen()
        out, out_child = os.pipe()
        err, err_child = os.pipe()
        gate_child, gate = os.pipe()
        fault, fault_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            self._become(out_child, err_child, gate_child, fault_child)
        for descriptor in (out_child, err_child, gate_child, fault_child):
            os.close(descriptor)
        began = time.monotonic()
        try:
            self._record_begun(pid, began)
        except OSError as why:
            os.close(gate)  # the child gives up
            os.waitpid(pid, 0)
            _remove(BEGUN)
            say(f"refused record {why.errno}")
            return
        streams = [Stream(STDOUT, out), Stream(STDERR, err)]
        os.write(gate, b"x")
        os.close(gate)
        status, because, step = self._wait(pid, fault, streams, deadline=began + self._timeout_s)
        for stream in streams:
            stream.finish()
        record_end(because=because, status=status, step=step, seconds=time.monotonic() - began)
        self._end_what_is_left()
        self._record_changed()

    def _listen(self) -> None:
        """Become the parent of all orphans below us, and hear of children and signals through one descriptor."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._woken, wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for name in _ENDING:
            signal.signal(getattr(signal, name), self._on_end)

    def _on_end(self, *_: object) -> None:
        self._told_to_end = True

    def _become(self, out: int, err: int, gate: int, fault: int) -> None:
        """In the child: wait at the gate, then become the program. Never returns."""
        try:
            os.setsid()
            for name in (*_ENDING, "SIGCHLD", "SIGPIPE", "SIGXFSZ"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            os.dup2(out, 1)
            os.dup2(err, 2)
            if os.read(gate, 1) == b"x":
                step = b"cwd"
                os.chdir(self._cwd)
                step = b"program"
                os.execve(self._program, self._argv, os.environ)
        except OSError as why:
            os.write(fault, b"%s %d" % (step, why.errno or 0))
        finally:
            os._exit(127)

    def _record_begun(self, pid: int, began: float) -> None:
        stat = stat_of(pid)
        text = (
            f'{{"pid": {pid}, "start": {stat[3] if stat else 0}, "boot": "{boot_id()}", "supervisor": {os.getpid()}, '
            f'"time": {time.time():.3f}, "ends_at": {began + self._timeout_s:.3f}}}\n'
        )
        record(BEGUN, text.encode())

    def _wait(self, pid: int, fault: int, streams: list[Stream], *, deadline: float) -> tuple[int, str, str]:
        """Return the program's wait status, why it ended, and where it failed to begin ('STEP ERRNO')."""
        waiting = select.poll()
        sources = {stream.source: stream for stream in streams}
        for descriptor in (*sources, fault, self._woken):
            waiting.register(descriptor, select.POLLIN)
        because, kill_at = "exit", 0.0
        step: str | None = None
        while True:
            for descriptor, _ in waiting.poll(int(TICK_S * 1000)):
                if descriptor == self._woken:
                    _empty(self._woken)
                elif descriptor == fault:
                    waiting.unregister(fault)
                    step = _told_by(fault)
                elif not sources[descriptor].pump():
                    waiting.unregister(descriptor)
            for ended, status in _reaped():
                if ended == pid:
                    return status, because, _told_by(fault) if step is None else step
            now = time.monotonic()
            if because == "exit":
                because = self._why_end(now, deadline)
                if because != "exit":
                    signal_all(os.getpid(), signal.SIGTERM, group=pid)
                    kill_at = now + self._grace_s
            elif now >= kill_at:  # again and again: a fork may have slipped through
                signal_all(os.getpid(), signal.SIGKILL, group=pid)

    def _why_end(self, now: float, deadline: float) -> str:
        if os.path.exists(CANCEL):
            return "cancelled"
        if self._told_to_end:
            return "stopped"
        return "timeout" if now >= deadline else "exit"

    def _end_what_is_left(self) -> None:
        """End what the program left in the background; without a limit, for what the kernel holds is not over."""
        number, kill_at = signal.SIGTERM, time.monotonic() + self._grace_s
        while _has_children():
            if number == signal.SIGTERM or time.monotonic() >= kill_at:
                signal_all(os.getpid(), number, group=None)
                number = signal.SIGKILL
            ready, _, _ = select.select([self._woken], [], [], TICK_S)
            if ready:
                _empty(self._woken)

    def _record_changed(self) -> None:
        import json

        try:
            record(CHANGED, json.dumps(changed_members(".")).encode())
        except OSError:  # then whoever asks looks himself
            return


def _told_by(fault: int) -> str:
    """Return what the child says of its exec ('' once that went well: exec closes the pipe), and tell our parent."""
    step = os.read(fault, 64).decode()
    say(f"refused {step}" if step else "begun")
    return step


def _reaped() -> Iterator[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _has_children() -> bool:
    for _ in _reaped():
        continue
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _empty(descriptor: int) -> None:
    try:
        while os.read(descriptor, 512):
            continue
    except BlockingIOError:
        return


def _remove(name: str) -> None:
    try:
        os.unlink(name)
    except FileNotFoundError:
        return


def record_end(*, because: str, status: int | None = None, step: str = "", seconds: float = 0.0) -> None:
    """Record the end, trying for an hour when the disk is full: until then the attempt counts as under way."""
    code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else -1
    number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
    text = (
        f'{{"because": "{because}", "code": {code}, "signal": {number}, "step": "{step}", '
        f'"seconds": {seconds:.3f}, "time": {time.time():.3f}}}\n'
    )
    for _ in range(RECORD_TRIES_MAX):
        try:
            return record(END, text.encode())
        except OSError as why:
            if why.errno == errno.ENOENT:  # the directory itself was taken away: nobody waits
                return
            time.sleep(1.0)


def say(line: str) -> None:
    """Tell the parent, if it is still there."""
    try:
        os.write(1, line.encode() + b"\n")
    except OSError:
        return


def take_lock() -> bool:
    """Hold the directory's lock for the rest of this process's life; false if somebody else does."""
    import fcntl  # not on Windows, where this module is still imported for its names

    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    for _ in range(LOCK_TRIES_MAX):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def main(arguments: list[str]) -> None:
    directory, timeout_s, grace_s, program, cwd, *argv = arguments
    os.chdir(directory)
    if not take_lock() or os.path.exists(BEGUN) or os.path.exists(END):
        say("busy")
    elif os.path.exists(CANCEL):
        record_end(because="cancelled")
    elif os.path.exists(MANIFEST):  # it is the first to go when an attempt is taken back
        Supervisor(program, cwd, argv, timeout_s=float(timeout_s), grace_s=float(grace_s)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
