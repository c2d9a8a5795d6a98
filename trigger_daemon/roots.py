"""The health of a root: lost is not deleted, empty is not deleted, another disk is not this one.

`Root.check` asks whether the watched directory is there, is the one that was
accepted (device, inode, mount), and still holds what it held. It decides
nothing about files. It never creates a missing root, and keeps no descriptor
in the tree. Facts: a share whose server died can turn into an empty directory;
an unmounted disk leaves one behind.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from trigger_daemon.core.model import Health
from trigger_daemon.mounts import LOCAL_TYPES, Changes, Mount, mount_of
from trigger_daemon.points import ABSENT

# Of the local types, the ones whose directories have two links and one more for each directory in them.
COUNTING_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs"})

TOP_MIN = 4  # with fewer entries at the top, one person's tidying up is half of them; the rule for empty roots holds
EMPTIED_CONFIRM_S = 60.0  # a local root, surely the same, that stays emptied so long was emptied on purpose

_TROUBLED: tuple[Health, ...] = ("suspect", "lost")

Identity = Mapping[str, Any]  # device, inode, fstype, source


class IdentityStore(Protocol):
    """Keeps what is known of each root's file system; called from the roots' own threads."""

    def get(self, root: int) -> Identity | None:
        """Return what was set last; None if the root was never accepted."""

    def set(self, root: int, identity: dict[str, Any]) -> None:
        """Keep it durably."""


class Beat:
    """What a worker is doing in the file system, for its supervisor: (operation, path, since), None between."""

    __slots__ = ("doing",)

    def __init__(self) -> None:
        self.doing: tuple[str, str, float] | None = None


class Root:
    """One watched directory and whether it can be believed."""

    def __init__(
        self,
        path: str,
        *,
        identity: Identity | None,
        keep: Callable[[dict[str, Any]], None],
        has_claims: Callable[[], bool],
        monotonic: Callable[[], float],
        beat: Beat,
        local_types: frozenset[str] = LOCAL_TYPES,
        emptied_confirm_s: float = EMPTIED_CONFIRM_S,
    ) -> None:
        self.path = path
        self.health: Health = "ok"  # ok, suspect or lost
        self.why = ""
        self.hint = ""
        self.epoch = 0  # counts every return: what was known of the tree before is void
        self.mount: Mount | None = None
        self.device = 0
        self._identity = dict(identity) if identity else None
        self._present: dict[str, Any] | None = None  # what is there now, if that is not the accepted identity
        self._keep = keep
        self._has_claims = has_claims
        self._monotonic = monotonic
        self._beat = beat
        self._local_types = local_types
        self._emptied_confirm_s = emptied_confirm_s
        self._mounts = Changes()
        self._real = ""
        self._met = False  # has been there while we ran
        self._top: array[int] | None = None  # hashes of the names at the top when last believed
        self._top_key: tuple[int, int, int] | None = None
        self._expected: set[int] = set()  # hashes of names at the top that we take away ourselves
        self._emptied_at: float | None = None
        self._place: tuple[int, int] | None = None  # device and inode when last believed
        self._point = ""  # where its file system was mounted

    @property
    def believed(self) -> bool:
        """Whether absence in this root means anything."""
        return self.health not in _TROUBLED

    @property
    def remote(self) -> bool:
        """Whether calls here may hang, and writers elsewhere are unheard."""
        return self.mount is not None and self.mount.fstype not in self._local_types

    @property
    def counting(self) -> int:
        """The device, if on it the links of a directory tell how many directories are in it; else -1."""
        return self.device if self.mount is not None and self.mount.fstype in COUNTING_TYPES else -1

    def expect_gone(self, names: Iterable[str]) -> None:
        """Take names at the top that we take away ourselves: that they are missed soon means nothing."""
        self._expected.update(map(hash, names))

    def check(self, *, deep: bool = False, accept: bool = False) -> bool:
        """Look at the root itself and return whether it is believed.

        `deep`: compare its top-level names too, if it changed (before anything
        is called absent). `accept`: a person says that what is there now is it.
        """
        was_believed = self.believed
        self._beat.doing = ("stat", self.path, self._monotonic())
        try:
            now = os.stat(self.path)
            real = os.path.realpath(self.path) if self._moved(now) else self._real
        except (FileNotFoundError, NotADirectoryError):
            why = "is gone; waiting for it to come back" if self._met else "does not exist yet; waiting for it"
            hint = f"{ABSENT}; it is never created from here"
            mount = mount_of(self.path)
            if mount is not None and "/systemd-private-" in mount.root:  # PrivateTmp=
                hint = "a service has a /tmp of its own, and does not see the machine's: take another directory"
            return self._lost(f"{self.path} {why}", hint)
        except OSError as error:
            return self._lost(f"{self.path} cannot be reached: {error.strerror}", "check the disk, mount or server")
        finally:
            self._beat.doing = None
        if not stat.S_ISDIR(now.st_mode):
            return self._lost(f"{self.path} is not a directory", "correct `watch`, or put the directory there")
        if self.mount is None or real != self._real or self._mounts.any():
            self.mount = mount_of(real)
        self._real = real
        if not self._is_itself(now, accept=accept):
            return False
        changed = self._present is not None or self._top is None
        if (deep or accept or changed or not was_believed) and not self._is_full(now, accept=accept):
            return False
        place = (now.st_dev, now.st_ino)
        known = self._identity is not None
        if not was_believed or self._place not in (None, place) or (self._present is not None and known):
            self.epoch += 1
        self._place = place
        # A root met empty may be the mount point of a disk that is still to come: it is served, but not remembered.
        empty = self._top is not None and not self._top
        if self._present is not None and (known or accept or not empty):
            self._identity = self._present
            self._keep(dict(self._present))
        if self.mount is not None:
            self._point = self.mount.mountpoint
        self._met = True
        self.device = now.st_dev
        self.health, self.why, self.hint = "ok", "", ""
        return True

    def _moved(self, now: os.stat_result) -> bool:
        return not self._real or self._identity is None or self._identity.get("inode") != now.st_ino

    # ------------------------------------------------------------------ is it the same

    def _is_itself(self, now: os.stat_result, *, accept: bool) -> bool:
        fstype, source, point = "", "", ""
        if self.mount is not None:
            fstype, source, point = self.mount.fstype, self.mount.source, self.mount.mountpoint
        present = {"device": now.st_dev, "inode": now.st_ino, "fstype": fstype, "source": source}
        stored = self._identity
        if stored is not None and all(stored.get(key) == value for key, value in present.items()):
            self._present = None
            return True
        if stored is not None and not accept and (stored.get("fstype"), stored.get("source")) != (fstype, source):
            return self._is_elsewhere(stored, fstype, source, point)
        # New, or another device number or inode of the same mount, or as a person
        # wishes: accepted by `check`, unless it lost what it held.
        self._present = present
        return True

    def _is_elsewhere(self, stored: Identity, fstype: str, source: str, point: str) -> bool:
        was = f"{stored.get('fstype')} from {stored.get('source')}"
        covered = len(point) >= len(self._point) if self._point else point == self._real
        if not covered:
            return self._lost(
                f"the file system of {self.path} ({was}) is not mounted; beneath lies {fstype} from {source}",
                "mount it; if the data really moved, accept the root as it is",
            )
        return self._suspect(
            f"{self.path} lies on {fstype} from {source} now, was {was}",
            "mount the right file system, or accept the root as it is",
        )

    # ------------------------------------------------------------------ does it hold what it held

    def _is_full(self, now: os.stat_result, *, accept: bool) -> bool:
        key = (now.st_mtime_ns, now.st_ino, now.st_dev)
        if key == self._top_key and self._emptied_at is None:
            return True
        self._beat.doing = ("list", self.path, self._monotonic())
        try:
            names = os.listdir(self.path)
        except PermissionError:
            return True  # a matter of rights, told by the sweep; nothing is missing yet
        except OSError as error:
            return self._lost(f"{self.path} cannot be listed: {error.strerror}", "check the disk, mount or server")
        finally:
            self._beat.doing = None
        why = "" if accept else self._emptied(names)
        if why and not self._confirmed():
            return self._suspect(why, "if this is meant, accept the root as it is; otherwise bring the files back")
        self._emptied_at = None
        self._top = hashes(names)
        self._expected.intersection_update(self._top)
        self._top_key = key
        return True

    def _emptied(self, names: list[str]) -> str:
        """Return why the names look like those of a root that lost its contents, '' if they do not."""
        before = None if self._top is None else [name for name in self._top if name not in self._expected]
        if not names and (before is None or len(before) > 0) and self._has_claims():
            return f"{self.path} is empty, but files were taken from it before"
        if before is None or len(before) < TOP_MIN:
            return ""
        gone = len(before) - len(set(before).intersection(map(hash, names)))
        if gone * 2 <= len(before):
            return ""
        return f"{gone} of {len(before)} entries of {self.path} are gone at once"

    def _confirmed(self) -> bool:
        """Say whether an emptied local root stayed the accepted device, inode and mount long enough."""
        now = self._monotonic()
        if self._emptied_at is None:
            self._emptied_at = now
        same = self.mount is not None and not self.remote and (self._present is None or self._identity is None)
        return same and now - self._emptied_at >= self._emptied_confirm_s

    # ------------------------------------------------------------------ verdicts

    def _lost(self, why: str, hint: str) -> bool:
        self._emptied_at = None
        self.health, self.why, self.hint = "lost", why, hint
        return False

    def _suspect(self, why: str, hint: str) -> bool:
        self.health, self.why, self.hint = "suspect", why, hint
        return False


def hashes(names: Sequence[str]) -> array[int]:
    """Return 8 bytes a name: enough to know a name again, until the process ends."""
    return array("q", struct.pack(f"{len(names)}q", *map(hash, names)))  # twice as fast as from the numbers
