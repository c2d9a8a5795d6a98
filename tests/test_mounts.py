"""Which mount a path lies on is told without touching the path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trigger_daemon.mounts import mount_of, remote

TABLE = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:40 / /data rw,relatime shared:2 master:9 - nfs4 server:/export/my\040data rw,vers=4.2
24 23 0:41 / /data/k3 rw,relatime - cifs //camera/k3 rw
25 22 0:42 / /mnt/with\040blank rw - fuse.sshfs me@host:/ rw
26 22 8:1 / /over rw - xfs /dev/sda1 rw
27 26 8:2 / /over rw - btrfs /dev/sdb1 rw
28 22 8:3 / /hidden/deep rw - nfs server:/old rw
29 22 8:4 / /hidden rw - ext4 /dev/sdc1 rw
a line that is no mount
"""


@pytest.mark.parametrize(
    ("path", "fstype"),
    [
        ("/", "ext4"),
        ("/database", "ext4"),
        ("/data", "nfs4"),
        ("/data/krios1/x.tiff", "nfs4"),
        ("/data/k3/x", "cifs"),
        ("/data/k33", "nfs4"),
        ("/mnt/with blank/x", "fuse.sshfs"),
        ("/data/k3/../x", "nfs4"),
    ],
)
def test_the_innermost_mount_by_whole_names_is_found(path: str, fstype: str) -> None:
    """/data holds /data/x and not /database."""
    mount = mount_of(path, TABLE)

    assert mount is not None and mount.fstype == fstype


def test_octal_escapes_of_the_kernel_are_undone() -> None:
    """A mount source with a blank is shown as it is written on the server."""
    mount = mount_of("/data", TABLE)

    assert mount is not None and mount.source == "server:/export/my data"
    assert mount.device == "0:40" and mount.mountpoint == "/data"


def test_a_later_mount_covers_what_was_mounted_there_before() -> None:
    """The last mount on one point is the visible one, and it hides mounts below the earlier one."""
    over, hidden = mount_of("/over/x", TABLE), mount_of("/hidden/deep/x", TABLE)

    assert over is not None and over.fstype == "btrfs"
    assert hidden is not None and hidden.source == "/dev/sdc1"


def test_where_it_cannot_be_told_nothing_is_claimed() -> None:
    """A relative path, or no /proc, has no known mount."""
    assert mount_of("data/x", TABLE) is None
    assert mount_of("/data/x", b"") is None


def test_what_may_change_behind_the_kernels_back_is_remote() -> None:
    """Network file systems, FUSE and host shares; not local disks, not memory, not overlays."""
    far = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse", "fuseblk", "9p", "lustre", "virtiofs")
    near = ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "vfat")

    assert all(map(remote, far)) and not any(map(remote, near))


def test_the_own_table_agrees_with_the_kernel(tmp_path: Path) -> None:
    """The mount found for a real directory has the device the kernel reports for it."""
    mount = mount_of(os.fsencode(tmp_path))
    device = tmp_path.stat().st_dev

    assert mount is not None and mount.device == f"{os.major(device)}:{os.minor(device)}"
