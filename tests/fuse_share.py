"""A file system in user space with one directory of files, told to answer, to fail, or not to answer at all.

The kernel's FUSE protocol by hand, as little of it as stat, opendir and readdir
need. It stands in for a network share: its type is not local, its calls hang.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LOOKUP, _FORGET, _GETATTR, _READLINK, _STATFS, _INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = (
    1, 2, 3, 5, 17, 26, 27, 28, 29, 36, 42,
)  # fmt: skip
_UNANSWERED = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_LAZY = 2


class Share:
    """Serves `files` (name -> size) in its root. `mood`: answer, hang, or an errno (but for the root itself)."""

    def __init__(self, point: Path, files: dict[str, int]) -> None:
        self.files = files
        self.links: dict[str, str] = {}  # name -> where it leads
        self.mood: str | int = "answer"
        self.held: list[bytes] = []  # requests left without an answer
        self._point = os.fsencode(point)
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0".encode()
        if _LIBC.mount(b"share", self._point, b"fuse", 0, options) != 0:
            raise OSError(ctypes.get_errno(), "mount fuse")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Answer again, also what was held."""
        self.mood = "answer"
        held, self.held = self.held, []
        for request in held:
            self._answer(request)

    def close(self) -> None:
        self.release()
        _LIBC.umount2(self._point, _LAZY)
        self._thread.join(2.0)  # it ends with the mount; its descriptor's number must not be another file's meanwhile
        os.close(self._device)

    def _run(self) -> None:
        while True:
            try:
                request = os.read(self._device, 1 << 17)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                return
            opcode = struct.unpack_from("<II", request)[1]
            if self.mood == "hang" and opcode not in (*_UNANSWERED, _INIT):
                self.held.append(request)
            else:
                self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode in _UNANSWERED:
            return
        code, body = self._reply(opcode, node, request[40:])
        try:
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), -code, unique) + body)
        except OSError:
            pass  # who asked was killed

    def _reply(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        names = [*sorted(self.files), *self.links]
        if opcode == _INIT:
            return 0, struct.pack("<IIIIHHIIHHII24x", 7, 31, 1 << 16, 0, 8, 6, 1 << 16, 1, 16, 0, 0, 0)
        if isinstance(self.mood, int) and (opcode == _LOOKUP or node != 1):
            return self.mood, b""
        if opcode == _GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if opcode == _LOOKUP:
            name = os.fsdecode(body.rstrip(b"\0"))
            if name not in names:
                return errno.ENOENT, b""
            node = 2 + names.index(name)
            return 0, struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)
        if opcode == _READLINK:
            return 0, self.links[names[node - 2]].encode()
        if opcode == _OPENDIR:
            return 0, struct.pack("<QII", 0, 0, 0)
        if opcode == _READDIR:
            offset = struct.unpack_from("<QQ", body)[1]
            return 0, b"".join(
                struct.pack("<QQII", 2 + at, at + 1, len(name), 8) + name.encode() + b"\0" * (-len(name) % 8)
                for at, name in enumerate(names)
                if at >= offset
            )
        if opcode == _RELEASEDIR:
            return 0, b""
        return errno.ENOSYS, b""

    def _attributes(self, node: int) -> bytes:
        directory = node == 1
        names = [*sorted(self.files), *self.links]
        size = 0 if directory else self.files.get(names[node - 2], 0)
        mode, links = (0o40755, 2) if directory else (0o100644, 1)
        if not directory and names[node - 2] in self.links:
            mode = 0o120777
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, 0, 1, 1, 1, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)
