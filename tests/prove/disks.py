"""Small real file systems whose power can be cut, and that leave nothing behind.

An image on tmpfs, attached to a loop device and mounted in a mount namespace of
this process alone. The image has no name any more once it is attached, the
device lets go of it when nobody uses it, and the mounts go with the namespace:
when this process ends, however it ends, all is gone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

FILESYSTEMS = {  # what makes it, the Debian package that has that, the size of the image, options of the mount
    # ext4 writes its log and flushes files on rename by itself, after a while or in some cases: here only when it must.
    "ext4": (("mkfs.ext4", "-q", "-F", "-m", "0"), "e2fsprogs", 64 << 20, "commit=300,noauto_da_alloc"),
    "xfs": (("mkfs.xfs", "-q", "-f"), "xfsprogs", 300 << 20, ""),  # mkfs makes none that is smaller
}
UNMOUNT_S = 10.0  # processes that were killed may still be going
MOUNT_TRIES_MAX = 50

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 1 << 19
_MNT_DETACH = 2
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
_NO_LOG_FLUSH = 2
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LOOP_AUTOCLEAR = 4
_PR_SET_PDEATHSIG = 1
_BLKFLSBUF = 0x1261  # what the kernel remembers of a device is of the past
_CHUNK = 1 << 20


def missing(kind: str) -> str:
    """Return why a disk of this kind cannot be had here, '' if it can."""
    (program, *_), package, _, _ = FILESYSTEMS[kind]
    if os.geteuid():
        return f"{kind}: only root mounts file systems"
    if shutil.which(program) is None:
        return f"{kind}: {program} is missing (Debian package {package})"
    if kind not in Path("/proc/filesystems").read_text().split() and not _load_module(kind):
        return f"{kind}: this kernel does not know it"
    if not os.path.exists("/dev/loop-control"):
        return f"{kind}: this machine has no loop devices"
    return ""


def _load_module(name: str) -> bool:
    modprobe = shutil.which("modprobe")
    return modprobe is not None and subprocess.run([modprobe, name], capture_output=True).returncode == 0


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def private_mounts() -> None:
    """Let what this process mounts be seen by it and its children only. Raises OSError."""
    _call(_libc.unshare(_CLONE_NEWNS), "a mount namespace")
    _call(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "a mount namespace")


class Disk:
    """One file system at `path`; `private_mounts` comes first."""

    def __init__(self, kind: str, work: Path, size: int = 0) -> None:
        """Make and mount it, of its usual size or of `size` bytes. Raises OSError, or CalledProcessError of mkfs."""
        make, _, usual, self._options = FILESYSTEMS[kind]
        self.kind = kind
        self.path = work / kind
        self.path.mkdir()
        self._device = -1
        self._root = -1  # a descriptor of the mounted root directory, for the cut
        image = work / f"{kind}.img"
        try:
            with image.open("xb") as file:
                file.truncate(size or usual)
            subprocess.run([*make, str(image)], check=True, capture_output=True, timeout=60)
            self._attach(image)
        finally:
            image.unlink(missing_ok=True)
        try:
            self.mount()
        except BaseException:
            self.close()
            raise

    def _attach(self, image: Path) -> None:
        """Find a free loop device; another process may be quicker."""
        backing = os.open(image, os.O_RDWR)
        try:
            for _ in range(MOUNT_TRIES_MAX):
                control = os.open("/dev/loop-control", os.O_RDWR)
                try:
                    number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                finally:
                    os.close(control)
                self._name = f"/dev/loop{number}"
                device = os.open(self._name, os.O_RDWR)
                information = bytearray(232)  # struct loop_info64: all by default but its flags
                struct.pack_into("I", information, 52, _LOOP_AUTOCLEAR)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, struct.pack("II", backing, 0) + bytes(information) + bytes(64))
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:
                        raise
                    continue
                self._device = device
                return
            raise OSError(errno.EBUSY, "no free loop device")
        finally:
            os.close(backing)

    def mount(self) -> None:
        """Mount it, as after the power came back: what was in its log is done first."""
        source, target = os.fsencode(self._name), os.fsencode(self.path)
        flags = ctypes.c_ulong(0)
        _call(_libc.mount(source, target, self.kind.encode(), flags, self._options.encode()), f"mount {self.kind}")
        self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def cut(self) -> None:
        """Cut the power: from now on nothing reaches the disk, nor what was not yet there."""
        fcntl.ioctl(self._root, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))

    def unmount(self) -> None:
        """Unmount it; nobody may use it any more. Raises OSError (EBUSY) if somebody does."""
        if self._root < 0:
            return
        os.close(self._root)
        self._root = -1
        end = time.monotonic() + UNMOUNT_S
        while _libc.umount2(os.fsencode(self.path), 0):
            if ctypes.get_errno() != errno.EBUSY or time.monotonic() > end:
                _call(-1, f"unmount {self.path}")
            time.sleep(0.01)

    def again(self) -> None:
        """Unmount and mount."""
        self.unmount()
        self.mount()

    def sync(self) -> None:
        """Make durable what is there."""
        _call(_libc.syncfs(self._root), "syncfs")

    def renew(self) -> None:
        """Make it anew: a file system that was cut too often has damage of its own."""
        self.unmount()
        make = FILESYSTEMS[self.kind][0]
        subprocess.run([*make, self._name], check=True, capture_output=True, timeout=60)
        self.mount()

    def image(self) -> bytes:
        """Return all of it, to be put back by `restore`."""
        self.unmount()
        with open(self._name, "rb") as device:
            image = device.read()
        self.mount()
        return image

    def restore(self, image: bytes) -> None:
        """Make it what it was: the same files, inodes and times."""
        self.unmount()
        with open(self._name, "r+b", buffering=0) as device:
            for at in range(0, len(image), _CHUNK):
                device.write(image[at : at + _CHUNK])
            fcntl.ioctl(device, _BLKFLSBUF)
        self.mount()

    def errors(self) -> int:
        """Return how often it has met damage of its own (ext4 tells), of which no program can be the cause."""
        try:
            return int(Path(f"/sys/fs/{self.kind}/{Path(self._name).name}/errors_count").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def close(self) -> None:
        """Give everything up; idempotent."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
            _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        if self._device >= 0:
            os.close(self._device)
            self._device = -1


def _call(answer: int, what: str) -> None:
    if answer:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
