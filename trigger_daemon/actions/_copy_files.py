"""Single files, as the copying workers handle them: names, digests, versions, faults, reading back.

Nothing here decides what becomes of a batch; that is `_copy_job`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._copy_room import NoRoom
from trigger_daemon.actions._copy_system import (
    ALIGNMENT,
    O_DIRECT,
    O_NOATIME,
    aligned_buffer,
    cached_blocks,
    drop_cached,
    write_out,
)

NAME_MAX = 255  # bytes of a name on every file system we know
BLOCK = 8 * 1024 * 1024
AGAIN_BLOCKS = 4  # of the page cache given back with each block
PIECE = 1024 * 1024  # read, hashed and written at once: it stays in the processor's cache
DIGESTS = ("xxh3", "blake3", "sha256", "md5")
ROOM_AGAIN_S = 30.0  # how soon a copy that found no room looks again
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
AWAY = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENODEV,
    errno.ENXIO, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.ETXTBSY,
})  # fmt: skip
_CONTENT = re.compile(r"(md5):([0-9a-f]{32}):([0-9]{1,18}):([0-9]{1,18})", re.IGNORECASE)
_TEMP = re.compile(rb"\.(?P<name>.*)\.(?P<owner>[0-9a-f]{6})(?P<file>[0-9a-f]{6})"
                   rb"\.(?P<version>[0-9a-f]{8})\.(?P<run>\d+)-(?P<attempt>\d+)\.part", re.DOTALL)  # fmt: skip


class Hash(Protocol):
    def update(self, data: Any, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


def new_hash(name: str) -> Callable[[], Hash]:
    """Return what makes a hash object for a `digest` option; raise ImportError if its library is not there."""
    if name in ("sha256", "md5"):
        return getattr(hashlib, name)  # type: ignore[no-any-return]
    if name == "blake3":
        return importlib.import_module("blake3").blake3  # type: ignore[no-any-return]
    return importlib.import_module("xxhash").xxh3_128  # type: ignore[no-any-return]


class Trouble(Exception):
    """Something that stops a file, a destination, or the whole attempt (`scope`: file, destination, batch)."""

    def __init__(
        self, kind: str, scope: str, why: str, hint: str = "", *, counts: bool = True,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(why)
        self.kind = kind
        self.scope = scope
        self.why = why
        self.hint = hint
        self.counts = counts
        self.retry_after_s = retry_after_s

    def fault(self) -> dict[str, Any]:
        return {"kind": self.kind, "scope": self.scope, "why": self.why, "hint": self.hint, "counts": self.counts,
                "retry_after_s": self.retry_after_s}


class Changed(Exception):
    """The source is no longer the manifest's version; the text says how."""


class Differs(Exception):
    """What was read back is not what was written."""


class OwnDigest:
    """The digest that a file carries of a part of itself, and that of this part as it is read.

    `content` is md5:HEX:OFFSET:LENGTH, from the manifest. Raises Trouble if it
    is not, or if the part does not lie in the file.
    """

    def __init__(self, content: str, size: int, path: bytes) -> None:
        found = _CONTENT.fullmatch(content)
        if found is None:
            raise self._useless(path, f"{content[:100]!r} in its manifest is no digest of a part of it")
        self.said = f"md5:{found[2].lower()}"
        self.path = path
        self.begin = int(found[3])
        self.end = self.begin + int(found[4])
        if self.end > size:
            raise self._useless(path, f"its own digest is of bytes {self.begin:,} to {self.end:,}, and it has {size:,}")
        self._found = hashlib.md5(usedforsecurity=False)

    def _useless(self, path: bytes, why: str) -> Trouble:
        return Trouble("permanent", "file", f"{printable(path)}: {why}",
                       "report this as a fault of the check; `own_digest: ignore` copies the file without it")

    def feed(self, view: memoryview, offset: int) -> None:
        """Take in what the file has at `offset`. Everything must come once, in order: what is left out differs."""
        begin, end = max(self.begin - offset, 0), min(self.end - offset, len(view))
        if begin < end:
            self._found.update(view[begin:end])

    def check(self) -> None:
        """Raise Trouble if the part is not what the file says of it."""
        found = f"md5:{self._found.hexdigest()}"
        if found != self.said:
            raise Trouble("person", "file",
                          f"{printable(self.path)}: the image does not match its own Content-MD5: it was damaged "
                          f"before it was copied (bytes {self.begin:,} to {self.end:,} have {found}, "
                          f"the file says {self.said})",
                          "suspect the disk, its cable or memory at the source; `trigger-daemon runs retry` reads it "
                          "again; to send it as it is, say `own_digest: ignore`, then `files resend`")


def at_destination(fault: OSError, doing: str, path: bytes) -> Trouble:
    """Return what an error while touching a target means, in words for the person who must act."""
    shown = printable(path)
    words = f"cannot {doing} {shown}: {fault.strerror or fault}"
    code = fault.errno
    if isinstance(fault, NoRoom):  # a smaller file may find room: the destination itself is well
        return Trouble("transient", "batch", words, "make room there; the copy goes on by itself", counts=False,
                       retry_after_s=ROOM_AGAIN_S)
    if code in NO_SPACE:
        return Trouble("transient", "destination", words, "make room there; the copy goes on by itself", counts=False)
    if code == errno.EROFS:
        return Trouble("person", "destination", words,
                       "it is read-only: look at its disk (dmesg) and mount it writable, the copy goes on by itself; a "
                       "service writes only where its unit lets it (`systemctl edit trigger-daemon`: ReadWritePaths=)")
    if code in (errno.EACCES, errno.EPERM):
        return Trouble("person", "destination", words,
                       "give the daemon's user the right to write there, then `trigger-daemon runs retry`")
    if code in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
        return Trouble("permanent", "file", words, "the destination cannot hold this name; rename the file")
    if code in (errno.EFBIG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
        return Trouble("person", "file", words, "move aside what stands in the way, then `trigger-daemon runs retry`")
    if code in AWAY:
        return Trouble("transient", "destination", words, "is the destination mounted, and its server or disk well?")
    return Trouble("transient", "destination", words)


def at_source(fault: OSError, path: bytes) -> Trouble:
    """Return what an error while reading a source means; never that the file is gone."""
    hint = {
        errno.EACCES: "the daemon's user must be able to read it",
        errno.EPERM: "the daemon's user must be able to read it",
        errno.EIO: "look at the disk that it lies on, or its server (dmesg)",
    }.get(fault.errno or 0, "")
    return Trouble("transient", "file", f"cannot read {printable(path)}: {fault.strerror or fault}", hint)


def printable(path: bytes) -> str:
    """Return a path for people: bytes that are no UTF-8, and control characters, as escapes."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------- names


def file_tag(name: bytes) -> bytes:
    """Return six hex digits for a target's name: a trimmed temporary name alone would not tell two targets apart."""
    return hashlib.blake2b(name, digest_size=3).hexdigest().encode()


def version_tag(size: int, mtime_ns: int, digest: str) -> str:
    """Return eight hex digits for a version and the way it is digested."""
    return hashlib.blake2b(f"{size}:{mtime_ns}:{digest}".encode(), digest_size=4).hexdigest()


def temp_name(target: bytes, owner: str, version: str, run: int, attempt: int) -> bytes:
    """Return the temporary path beside a target: hidden, ours, of this file, version, run and attempt."""
    directory, _, name = target.rpartition(b"/")
    tail = b".%s%s.%s.%d-%d.part" % (owner.encode(), file_tag(name), version.encode(), run, attempt)
    return directory + b"/." + name[: NAME_MAX - 1 - len(tail)] + tail


def ours(name: bytes, owner: str) -> tuple[bytes, int] | None:
    """Return the file tag and the run of a temporary name of ours, else None."""
    found = _TEMP.fullmatch(name)
    if not found or found["owner"] != owner.encode():
        return None
    return found["file"], int(found["run"])


# -------------------------------------------------------------------------- sources


class Source:
    """One file version, open for reading. Raises Changed when it is, or becomes, another version."""

    def __init__(self, path: bytes, size: int, mtime_ns: int, root: bytes) -> None:
        self.path = path
        self.root = root or b"/"
        self.first: os.stat_result | None = None
        self.size = size
        self.mtime_ns = mtime_ns
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
        try:
            self.fd = _open_quietly(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing() from None
        except OSError as fault:
            if fault.errno in (errno.ELOOP, errno.ENXIO):
                raise Changed("is no longer a regular file") from None
            raise at_source(fault, path) from fault
        try:
            self.state = self.first = self.check()
        except BaseException:
            os.close(self.fd)
            raise
        write_out(self.fd)
        self._warm = cached_blocks(self.fd, size, BLOCK)  # somebody had them in memory before us
        self._cold_from = -1  # where the blocks begin, one after the other, that only we brought there

    def _missing(self) -> Changed | Trouble:
        """Tell a file that is gone from a disk that is lost: an empty directory may be its mount point."""
        gone = self.path
        while True:
            above = gone.rpartition(b"/")[0] or b"/"
            is_root = len(above) <= len(self.root)
            try:
                with os.scandir(above) as entries:
                    lists = any(True for _ in entries)
                if not lists:
                    break
                state = os.lstat(gone)
                if gone != self.path and stat.S_ISREG(state.st_mode):
                    return Changed("is gone")  # a file stands where its directory was
                return Trouble("transient", "file", f"cannot read {printable(self.path)}: it comes and goes")
            except (FileNotFoundError, NotADirectoryError) as fault:
                if fault.filename == gone:
                    return Changed("is gone")
                if is_root:
                    break
                gone = above
            except OSError as fault:
                return at_source(fault, self.path)
        return Trouble("transient", "file", f"{printable(self.path)} is gone, and all beside it",
                       "is the watched directory mounted?")

    def check(self) -> os.stat_result:
        try:
            state = os.fstat(self.fd)
        except OSError as fault:
            raise at_source(fault, self.path) from fault
        if not stat.S_ISREG(state.st_mode):
            raise Changed("is no longer a regular file")
        if state.st_size != self.size:
            raise Changed(f"had {self.size} bytes, has {state.st_size}")
        if state.st_mtime_ns != self.mtime_ns:
            raise Changed("was written again")
        first = self.first or state
        if (state.st_ctime_ns, state.st_ino) != (first.st_ctime_ns, first.st_ino):
            # Written to, perhaps, and its time put back; or only its permissions changed. It is the same version
            # still, so nobody else will send it: what was read is thrown away, and it is read again.
            raise Trouble("transient", "file", f"{printable(self.path)} was touched while it was read")
        return state

    def fill(self, view: memoryview, offset: int, pace: Pace) -> None:
        """Read exactly `len(view)` bytes at `offset`, at the allowed rate."""
        got = 0
        while got < len(view):
            want = min(len(view) - got, pace.piece())
            pace.spend(want)
            try:
                n = os.preadv(self.fd, [view[got : got + want]], offset + got)
            except OSError as fault:
                raise at_source(fault, self.path) from fault
            if n == 0:
                self.check()
                raise Changed("ended before its size")
            got += n
        self._give_back(offset, offset + len(view))

    def _give_back(self, begin: int, end: int) -> None:
        """Let go of the page cache that nobody used before us: it is the instrument's.

        The kernel keeps memory in pieces of up to some MiB, and lets go of those
        only that lie wholly in what is given back: so it is asked again for what
        came before.
        """
        number = begin // BLOCK
        if number in self._warm:
            self._cold_from = (number + 1) * BLOCK
            return
        if self._cold_from < 0:
            self._cold_from = number * BLOCK
        if end == self.size or end % BLOCK == 0:
            start = max(self._cold_from, end - AGAIN_BLOCKS * BLOCK)
            drop_cached(self.fd, start, 0 if end == self.size else end - start)  # 0: and all that was read ahead

    def pieces(self, pace: Pace) -> Iterator[memoryview]:
        """Yield the content in views of this thread's buffer; the version is checked at the end."""
        view = _thread_buffer()
        offset = 0
        while offset < self.size:
            part = view[: min(len(view), self.size - offset)]
            self.fill(part, offset, pace)
            yield part
            offset += len(part)
        self.check()

    def close(self) -> None:
        os.close(self.fd)


def _open_quietly(path: bytes, flags: int) -> int:
    try:
        return os.open(path, flags | O_NOATIME)
    except PermissionError:
        return os.open(path, flags)  # only the owner may ask for O_NOATIME


# ------------------------------------------------------------------------ read back

_space = threading.local()


def _thread_buffer() -> memoryview:
    """Return this thread's aligned buffer: fresh memory for each file would cost more than reading it."""
    buffer: memoryview | None = getattr(_space, "buffer", None)
    if buffer is None:
        buffer = _space.buffer = aligned_buffer(PIECE)
    return buffer


def open_past_cache(path: bytes, direct: bool) -> tuple[int, bool]:
    """Open for reading from the disk; return the descriptor and whether O_DIRECT was granted."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    if direct and O_DIRECT:
        try:
            return os.open(path, flags | O_DIRECT), True
        except OSError as fault:
            if fault.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags), False


def read_back(
    path: bytes, make: Callable[[], Hash], pace: Pace, *, places: int, direct: bool, own: OwnDigest | None = None
) -> tuple[str, os.stat_result, bool]:
    """Return digest and state of a file as the disk has it, and whether O_DIRECT served it; `own` is fed with it.

    Where O_DIRECT is refused the page cache is dropped first, which needs the
    file to be synced: dirty pages would stay and be read instead of the disk.
    `places`: how many destinations are read like this one.
    """
    fd, direct = open_past_cache(path, direct)
    try:
        whole = make()
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise Differs("is not a regular file")
        drop_cached(fd)
        buffer = _thread_buffer()
        offset = 0
        while offset < state.st_size:
            pace.spend_back(min(len(buffer), state.st_size - offset), places)
            want = min(len(buffer), -(-(state.st_size - offset) // ALIGNMENT) * ALIGNMENT)
            try:
                n = os.preadv(fd, [buffer[:want]], offset)
            except OSError as fault:
                if not direct or fault.errno != errno.EINVAL:
                    raise
                again, direct = open_past_cache(path, False)
                os.close(fd)
                fd = again
                drop_cached(fd)
                continue
            if n == 0:
                raise Differs("ended before its size")
            whole.update(buffer[:n])
            if own is not None:
                own.feed(buffer[:n], offset)
            offset += n
        if not direct:
            drop_cached(fd)
        return whole.hexdigest(), state, direct
    finally:
        os.close(fd)
