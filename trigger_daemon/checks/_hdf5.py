"""What the checks `hdf5` and `eiger` share: the superblock of a file, and the HDF5 library in a process of its own.

The superblock is read by us, 128 bytes of it. What lies deeper is read by
libhdf5, which a damaged file can crash or send round in circles: so it runs in
a child that can open nothing and gets its bytes from the probe
(docs/decisions/0009).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._hdf5_reader import NO_LIBRARY
from trigger_daemon.checks._words import NEVER_WRITTEN, amount, progress
from trigger_daemon.core.model import Verdict

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEAD_BYTES = 128  # up to the end-of-file address in every version and width of addresses
USER_BLOCK_BYTES = 512  # the first place but 0 where a superblock may be; then at each double of it
WIDTHS = (2, 4, 8, 16, 32)  # bytes of an address; all that was ever seen is 8
OPEN_FOR_WRITING = 0x01  # from version 3 on; before, the flags are officially unused, yet the library sets them

READER_S = 40.0  # for a whole set; below the deadline of a check, so that the verdict says why
READER_CPU_S = 15  # 2,000 data files take 2; libhdf5 that goes round in circles ends here
READER_MEMORY_BYTES = 512 * 2**20  # beyond what the child has with h5py loaded
ANSWER_BYTES_MAX = 8 * 2**20  # 10,000 links of some hundred bytes

_ANSWER, _READ = struct.Struct(">I"), struct.Struct(">QI")


def judge(probe: Window) -> Outcome:
    """Compare the size with the end that the superblock gives, and say whether the writer has closed the file.

    A file with holes is suspect: a copy that was given its length first, or a
    writer that aligns its parts and leaves gaps between them.
    One read for a file without a user block; with one, a read for each double of 512 bytes before it.
    """
    head, at, empty = _superblock(probe)
    if not head:
        if empty:
            return Outcome(Verdict.INCOMPLETE, "still empty")
        return Outcome(Verdict.SUSPECT, "does not begin like HDF5")
    if len(head) < len(SIGNATURE) + 4:
        return Outcome(Verdict.INCOMPLETE, f"ends within its header, {amount(probe.size)} so far")
    version = head[8]
    if version > 3:
        return Outcome(Verdict.UNKNOWN, f"version {version} of HDF5's header is not known here")
    found = _fields(head, version)
    if found is None:
        return Outcome(Verdict.SUSPECT, "its HDF5 header is damaged: addresses of an impossible width")
    flags, base, end = found
    if end < 0:
        return Outcome(Verdict.INCOMPLETE, f"ends within its header, {amount(probe.size)} so far")
    end += at - base  # a user block was put before it, or taken away, after it was written
    if (version == 3 and flags & OPEN_FOR_WRITING) or (flags and end != probe.size):
        return Outcome(Verdict.INCOMPLETE, f"its writer has not closed it, {amount(probe.size)} so far")
    if end > probe.size:
        return Outcome(Verdict.INCOMPLETE, progress(probe.size, end))
    if end < probe.size:
        more = probe.size - end
        return Outcome(Verdict.SUSPECT, f"all of {amount(end)}, and {more:,} bytes more than its header accounts for")
    if flags:
        return Outcome(Verdict.SUSPECT, f"{amount(end)} as its header says, but its writer has not closed it")
    if probe.holes():
        return Outcome(Verdict.SUSPECT, f"{amount(end)} and closed as its header says, {NEVER_WRITTEN}")
    return Outcome(Verdict.COMPLETE, f"all of {amount(end)}, and closed by its writer")


def _superblock(probe: Window) -> tuple[bytes, int, bool]:
    """Return the superblock (empty: none), where it is, and whether only zeros were seen on the way."""
    at, empty = 0, True
    while at < probe.size:  # at most 55 times
        head = probe.read(at, HEAD_BYTES)
        if head and head[:8] == SIGNATURE[: len(head)]:
            return head, at, False
        empty = empty and not any(head)
        at = at * 2 or USER_BLOCK_BYTES
    return b"", 0, empty


def _fields(head: bytes, version: int) -> tuple[int, int, int] | None:
    """Return flags, base address and end of file (-1: the header is cut before it); None if it is damaged."""
    if version < 2:
        width, begins = head[13] if len(head) > 13 else 8, 24 if version == 0 else 28
        flags, end_at = int.from_bytes(head[20:24], "little"), begins + 2 * width
    else:
        width, begins = head[9], 12
        flags, end_at = head[11], begins + 2 * width
    if width not in WIDTHS:
        return None
    if len(head) < end_at + width:
        return flags, 0, -1
    base, end = (int.from_bytes(head[place : place + width], "little") for place in (begins, end_at))
    return flags, base, end


class CannotTell(Exception):
    """The library gave no answer; `outcome` is what follows for the file."""

    def __init__(self, verdict: Verdict, why: str) -> None:
        super().__init__(why)
        self.outcome = Outcome(verdict, why)


class Reader:
    """The HDF5 library in a child: it is asked a question about a window, and reads through that window only.

    A context manager. Starting it takes about 0.2 s. Raises CannotTell, and
    whatever the window raises.
    """

    def __init__(self, *, deadline_s: float = READER_S, program: str = "") -> None:
        self._until = time.monotonic() + deadline_s
        self._deadline_s = deadline_s
        own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_hdf5_reader.py")
        # -P: the directory of the script holds an xml.py and others that are not to be found by that name.
        argv = [sys.executable, "-P", program or own, str(READER_CPU_S), str(READER_MEMORY_BYTES)]
        # One thread, no plug-ins that a file could name.
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
        try:
            self._child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd="/", env=env, start_new_session=True, bufsize=0,
            )
        except OSError as error:
            why = f"it could not be read: no process for the HDF5 library, {error.strerror}"
            raise CannotTell(Verdict.INCOMPLETE, why) from error
        assert self._child.stdin and self._child.stdout
        self._into, self._out = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._into, False)
        os.set_blocking(self._out, False)

    def ask(self, window: Window, **question: Any) -> Mapping[str, Any]:
        """Return the child's answer to one question (_hdf5_reader.py)."""
        words = json.dumps({**question, "size": window.size}).encode()
        self._send(_ANSWER.pack(len(words)) + words)
        while True:
            kind = self._receive(1)
            if kind == b"R":
                offset, length = _READ.unpack(self._receive(_READ.size))
                data = window.read(offset, length)
                self._send(_ANSWER.pack(len(data)) + data)
                continue
            (length,) = _ANSWER.unpack(self._receive(_ANSWER.size))
            if kind != b"A" or length > ANSWER_BYTES_MAX:
                raise CannotTell(Verdict.SUSPECT, "the HDF5 library broke down on it")
            try:
                answer = json.loads(self._receive(length))
            except ValueError as error:
                raise CannotTell(Verdict.SUSPECT, "the HDF5 library broke down on it") from error
            if not isinstance(answer, dict) or "error" in answer:
                said = str(answer["error"]) if isinstance(answer, dict) else "nothing of use"
                raise CannotTell(Verdict.SUSPECT, f"the HDF5 library cannot read it: {said}")
            return answer

    def close(self) -> None:
        """End the child; it holds nothing that could be lost."""
        assert self._child.stdin and self._child.stdout
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._into, select.POLLOUT)
            try:
                view = view[os.write(self._into, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._died() from error

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self._wait(self._out, select.POLLIN)
            try:
                part = os.read(self._out, length - len(parts))
            except BlockingIOError:
                continue
            if not part:
                raise self._died()
            parts += part
        return bytes(parts)

    def _wait(self, fd: int, event: int) -> None:
        left_s = self._until - time.monotonic()
        poll = select.poll()
        poll.register(fd, event)
        if left_s <= 0 or not poll.poll(left_s * 1000):
            # As a check without an answer: not yet. It is tried again, and people hear of it when it stays so.
            raise CannotTell(Verdict.INCOMPLETE, f"it could not be read within {self._deadline_s:g} s")

    def _died(self) -> CannotTell:
        try:
            code = self._child.wait(max(0.1, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = 0
        if code == NO_LIBRARY:  # a set must not travel without its data files because something is not installed
            return CannotTell(Verdict.INCOMPLETE, "it could not be read: install 'trigger-daemon[eiger]' for h5py")
        if code == -signal.SIGKILL:
            return CannotTell(Verdict.SUSPECT, f"the HDF5 library did not come to an end within {READER_CPU_S} s")
        return CannotTell(Verdict.SUSPECT, f"the HDF5 library broke down on it (code {code})")
