"""Which mount a path lies on, told from /proc/self/mountinfo, and where its links lead.

`mount_of` never touches the path itself: a stat on a hung network mount would
hang the asker too. `Places` follows links, but looks by itself into no file
system whose calls may hang.
"""

from __future__ import annotations

import os
import re
import select
import threading
from collections.abc import Callable
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

# File systems whose calls end: disks and memory of this machine. On any other
# type (network, FUSE, unknown) a call may hang for ever, and remote writers
# cause no events. overlay: what is written underneath is unheard, but sweeps see it.
LOCAL_TYPES = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "nilfs2", "bcachefs", "tmpfs", "ramfs",
    "devtmpfs", "rootfs", "overlay", "vfat", "exfat", "ntfs3", "ntfs", "msdos", "iso9660", "udf", "squashfs", "erofs",
    "hfsplus",
})  # fmt: skip

PLACES_MAX = 10_000  # paths remembered
LINKS_MAX = 40  # as the kernel follows
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. `device` is "major:minor" as in mountinfo; `source` what was mounted (//server/share, /dev/sda1).

    `root`: which directory of the file system is mounted there, as bind mounts tell it.
    """

    fstype: str
    source: str
    mountpoint: str
    device: str
    root: str = "/"


class _Entry(NamedTuple):
    id: int
    parent: int
    point: bytes
    mount: Mount


def remote(fstype: str) -> bool:
    """Say whether files of this type may change behind the kernel's back (network, FUSE, shared from a host)."""
    return fstype in REMOTE_TYPES or fstype.startswith("fuse")


def may_hang(mount: Mount | None) -> bool:
    """Say whether a call on this mount may never end while we go on; not where nothing is known of mounts."""
    return mount is not None and mount.fstype not in LOCAL_TYPES and mount.mountpoint != "/"


class Table:
    """The mount table as it was when this was made. `mountinfo` stands in for the content of /proc/self/mountinfo."""

    def __init__(self, mountinfo: bytes | None = None) -> None:
        if mountinfo is None:
            try:
                with open(MOUNTINFO, "rb") as table:
                    mountinfo = table.read()
            except OSError:
                mountinfo = b""
        self._entries = [entry for entry in map(_parse, mountinfo.splitlines()) if entry]
        self.mounts = [entry.mount for entry in self._entries]
        self.points = frozenset(mount.mountpoint for mount in self.mounts)

    def of(self, path: str | bytes | os.PathLike[str]) -> Mount | None:
        """Return the mount an absolute path lies on, links not followed; None where that cannot be told."""
        wanted = os.path.normpath(os.fsencode(path))
        if not wanted.startswith(b"/"):
            return None
        entries = [entry for entry in self._entries if _holds(entry.point, wanted)]
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

    def of_open(self, descriptor: int) -> Mount | None:
        """Return the mount on which an open file or directory lies, whichever links led there; None if not told."""
        try:
            with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as told:
                number = next((int(line[7:]) for line in told if line.startswith("mnt_id:")), None)
        except OSError:
            return None
        return next((entry.mount for entry in self._entries if entry.id == number), None)


def mount_of(path: str | bytes | os.PathLike[str], mountinfo: bytes | None = None) -> Mount | None:
    """Return the mount an absolute path lies on; None where that cannot be told (no /proc, not an absolute path).

    `mountinfo` stands in for the content of /proc/self/mountinfo.
    """
    return Table(mountinfo).of(path)


class Changes:
    """Says whether anything was mounted or unmounted since it was last asked: the kernel raises a poll event.

    Any thread may ask; one of them is told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # two threads in one poll object raise
        try:
            self._file = open(MOUNTINFO, "rb", buffering=0)  # noqa: SIM115  lives as long as this
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLERR | select.POLLPRI)
        except (OSError, AttributeError):
            self._poll = None  # type: ignore[assignment]

    def any(self) -> bool:
        """Say it; true where it cannot be told."""
        with self._lock:
            return self._poll is None or bool(self._poll.poll(0))


class Places:
    """Where paths really are: one file system's directory has one place, whatever links and mounts lead to it.

    As mounts and links are when it is first asked. `beyond` resolves what lies on a mount that may hang, without
    hanging itself; without it links that lie on such a mount are not followed: none is ever looked at from here.
    """

    def __init__(self, beyond: Callable[[str, Mount], str] | None = None) -> None:
        self.table = Table()
        self._beyond = beyond
        self._known: dict[str, tuple[str, Mount | None, Mount | None]] = {}

    def real(self, path: str) -> str:
        """Return where a path leads; what is not there, or cannot be looked at, is as it is written."""
        return self._find(path)[0]

    def mount(self, path: str) -> Mount | None:
        """Return the mount on which that lies, None where it cannot be told."""
        return self._find(path)[1]

    def crosses(self, path: str) -> Mount | None:
        """Return the first mount on the way there that may hang, None if there is none."""
        return self._find(path)[2]

    def of(self, directory: str) -> tuple[str, str]:
        """Return the file system, and the path in it."""
        real, mount, _ = self._find(directory)
        if mount is None:
            return "", real
        inside = os.path.relpath(real, mount.mountpoint)
        return mount.device, os.path.normpath(f"{mount.root}/{inside}")

    def below(self, root: str, path: str) -> str | None:
        """Return a file's path below a directory, None if it is not below it. Links among the last names count."""
        directory, _, name = path.rpartition("/")
        (device, top), (where, inside) = self.of(root), self.of(directory or "/")
        if device != where:
            return None
        if inside == top:
            return name
        above = top.rstrip("/") + "/"
        return f"{inside[len(above):]}/{name}" if inside.startswith(above) else None

    def _find(self, path: str) -> tuple[str, Mount | None, Mount | None]:
        if (found := self._known.get(path)) is None:
            if len(self._known) >= PLACES_MAX:
                self._known.clear()
            real, crossed = self._walk(path) if path.startswith("/") else (os.path.realpath(path), None)
            found = self._known[path] = real, self.table.of(real), crossed
        return found

    def _walk(self, path: str) -> tuple[str, Mount | None]:
        """Follow links, name by name, up to a mount that may hang; return that mount, too."""
        done, rest, links = "/", [*filter(None, path.split("/"))], 0
        while rest:
            here = os.path.normpath(os.path.join(done, rest.pop(0)))
            mount = self.table.of(here) if here in self.table.points else None
            if mount is not None and may_hang(mount):
                whole = os.path.join(here, *rest)
                return (self._beyond(whole, mount) if self._beyond else os.path.normpath(whole)), mount
            try:
                to = os.readlink(here)
            except OSError:  # no link, or not there
                done = here
                continue
            links += 1
            if links > LINKS_MAX:
                return path, None
            rest = [*filter(None, to.split("/")), *rest]
            done = "/" if to.startswith("/") else done
        return done, None


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
        root=os.fsdecode(_plain(fields[3])),
    )
    return _Entry(int(fields[0]), int(fields[1]), point, mount)


def _plain(field: bytes) -> bytes:
    """Undo the kernel's octal escapes (blank, tab, newline, backslash, #)."""
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)


def _holds(point: bytes, path: bytes) -> bool:
    return point == b"/" or path == point or path.startswith(point + b"/")
