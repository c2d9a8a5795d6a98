"""Lists of digests beside the files, as `sha256sum` writes and checks them; merged, and replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping

from trigger_daemon.actions._copy_system import fsync_directory
from trigger_daemon.failpoints import fail_point

# What the usual names of lists say: SHA256SUMS, checksums.md5, b3sums, foo.sha256. `b3` needs a point before or `sum`
# behind it, because it is also a grid square. Other tools' digests are known in order to be refused.
_SAID = re.compile(r"(?<![a-z0-9])(?:(sha-?(?:1|224|256|384|512)|md5|blake[23]b?|b2|xxh3|xxh128|xxh64|xxh32)(?:sums?)?"
                   r"|(b3)sums?|(?<=\.)(b3))(?![a-z0-9])", re.IGNORECASE)  # fmt: skip
_MEANT = {"b3": "blake3", "xxh128": "xxh3"}  # our xxh3 has 128 bits


def said_by(name: str) -> str:
    """Return the digest that the name of a list says, also one that we cannot make; void if it says none."""
    said = [next(filter(None, found)).lower().replace("-", "") for found in _SAID.findall(name)]
    return _MEANT.get(said[-1], said[-1]) if said else ""


def merge_sums(
    target: bytes, temp: bytes, new: Mapping[bytes, str], look: Callable[[int, int], None] = lambda fd, size: None
) -> None:
    """Put a line for each of `new` (name -> digest) into the list at `target`, by way of `temp`. Raises OSError.

    The caller holds a lock; lines of others stay as they are. `look` may raise before so many bytes are written.
    """
    before: list[bytes] = []
    with contextlib.suppress(FileNotFoundError), open(target, "rb") as old:
        before = [line for line in old.read().split(b"\n") if line]
    entries = {sums_line(name, digest) for name, digest in new.items()}
    names = {_name(line) for line in entries}
    after = [line for line in before if _name(line) not in names] + sorted(entries, key=_name)
    if after == before:
        return
    try:
        with open(temp, "wb") as out:
            whole = b"".join(line + b"\n" for line in after)
            look(out.fileno(), len(whole))
            out.write(whole)
            out.flush()
            os.fsync(out.fileno())
        fail_point("copy.sums")
        os.rename(temp, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    fsync_directory(target.rpartition(b"/")[0])


def _name(line: bytes) -> bytes:
    return line.partition(b"  ")[2]


def sums_line(name: bytes, digest: str) -> bytes:
    """Return a line as `sha256sum` writes it: a name with a backslash or line break is escaped and marked."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != name else b"") + digest.encode() + b"  " + escaped
