"""Which mount a path lies on, told from /proc/self/mountinfo alone.

Never touches the path itself: a stat on a hung network mount would hang the
asker too. Symbolic links are therefore not followed; resolve them first where
that is safe.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

MOUNTINFO = "/proc/self/mountinfo"

# Types on which other hosts (or a program in user space) may change files
# without this kernel's knowledge, and where locks and shared memory are not to
# be trusted. Every `fuse...` counts as well, see `remote`.
REMOTE_TYPES = frozenset({
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "virtiofs", "afs", "ncpfs", "ncp", "coda", "ceph",
    "lustre", "gpfs", "mmfs", "beegfs", "glusterfs", "orangefs", "pvfs2", "panfs", "ocfs2", "gfs2", "davfs", "webdav",
    "vboxsf", "vmhgfs", "prl_fs",
})  # fmt: skip

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. `device` is "major:minor" as in mountinfo; `source` what was mounted (//server/share, /dev/sda1)."""

    fstype: str
    source: str
    mountpoint: str
    device: str


class _Entry(NamedTuple):
    id: int
    parent: int
    point: bytes
    mount: Mount


def remote(fstype: str) -> bool:
    """Say whether files of this type may change behind the kernel's back (network, FUSE, shared from a host)."""
    return fstype in REMOTE_TYPES or fstype.startswith("fuse")


def mount_of(path: str | bytes | os.PathLike[str], mountinfo: bytes | None = None) -> Mount | None:
    """Return the mount an absolute path lies on; None where that cannot be told (no /proc, not an absolute path).

    `mountinfo` stands in for the content of /proc/self/mountinfo.
    """
    wanted = os.path.normpath(os.fsencode(path))
    if not wanted.startswith(b"/"):
        return None
    if mountinfo is None:
        try:
            with open(MOUNTINFO, "rb") as table:
                mountinfo = table.read()
        except OSError:
            return None
    entries = [entry for entry in map(_parse, mountinfo.splitlines()) if entry and _holds(entry.point, wanted)]
    ids = {entry.id for entry in entries}
    here = [entry for entry in entries if entry.parent not in ids or entry.parent == entry.id]
    found: _Entry | None = None
    # Walk as the kernel does: of the mounts on the present one, the path crosses
    # the outermost first. A longer mount point may lie hidden below a later mount.
    while here:
        found = min(here, key=lambda entry: len(entry.point))
        entries.remove(found)
        here = [entry for entry in entries if entry.parent == found.id]
    return found.mount if found else None


def _parse(line: bytes) -> _Entry | None:
    """Read `id parent major:minor root mountpoint options [tags] - type source options`; None for anything else."""
    left, separator, right = line.partition(b" - ")
    fields, about = left.split(b" "), right.split(b" ")
    if not separator or len(fields) < 6 or len(about) < 2 or not (fields[0].isdigit() and fields[1].isdigit()):
        return None
    point = _plain(fields[4])
    mount = Mount(
        fstype=os.fsdecode(_plain(about[0])),
        source=os.fsdecode(_plain(about[1])),
        mountpoint=os.fsdecode(point),
        device=os.fsdecode(fields[2]),
    )
    return _Entry(int(fields[0]), int(fields[1]), point, mount)


def _plain(field: bytes) -> bytes:
    """Undo the kernel's octal escapes (blank, tab, newline, backslash, #)."""
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)


def _holds(point: bytes, path: bytes) -> bool:
    return point == b"/" or path == point or path.startswith(point + b"/")
