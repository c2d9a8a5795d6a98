"""Take proven source files away: aside under a hidden name, looked at again, then unlinked or put back.

The file-level part of a reclaim, for a set of files that goes together. It
knows nothing of proofs: the caller decides, journals the intent before
`aside`, that all are aside before `gone`, and calls only while the root is
believed. Every phase may be repeated after a kill at any step. Nothing here
replaces a file, removes a directory, follows a link below a root, or raises
OSError; a call may hang on a dead mount, so it belongs on a worker thread.

Not seen: a writer on another host, also a client of this disk's NFS export.
Where a file system cannot rename without replacing (NFS, some FUSE), absence
is looked for just before; a file made in between, or unknown to this host's
cache, would be replaced. `need_lease`, on unless a person decided otherwise,
refuses network file systems altogether.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from trigger_daemon import mounts
from trigger_daemon.core.model import State, split
from trigger_daemon.errors import TriggerError
from trigger_daemon.failpoints import fail_point
from trigger_daemon.looks import TROUBLE

try:
    import fcntl
except ImportError:  # Windows has no leases
    fcntl = None  # type: ignore[assignment]

DIRECTORIES_MAX = 64  # open at once; a set is a movie and its companions, in a few directories
KEPT_MAX = 100  # names tried for a file whose own name is taken
NAME_MAX = 143  # bytes that every file system takes (eCryptfs); a kept name gets longer only if the file's own is

_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC  # fsync needs more than O_PATH
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC
_FILE = os.O_RDONLY | _NO_LINK | _CLOEXEC | getattr(os, "O_NONBLOCK", 0)
_SET_SIGNAL = getattr(fcntl, "F_SETSIG", 10)  # known to the module from Python 3.14 on
_RENAME_NOREPLACE = 1
_KEPT = "nothing to do: what is there is kept"
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_RENAMEAT2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None


class Place(StrEnum):
    """Where a target is; ASIDE, BOTH and UNKNOWN are not the end of it."""

    AT_NAME = "at its name"  # something is; from `left` it may be another version
    ASIDE = "aside"
    BOTH = "both"  # aside, and something new stands at its name
    NEITHER = "neither"  # deleted, perhaps by a call that was killed
    LOST = "lost"  # its directory is gone: moved away with it, or deleted
    GONE = "gone"  # this very call has unlinked it
    KEPT = "kept"  # beside its name, which is taken: `Outcome.kept`
    UNKNOWN = "unknown"  # cannot be looked at now


@dataclass(frozen=True, slots=True)
class Target:
    """A file version to take away.

    A ctime_ns or inode of 0 in `state` is not known and not compared; ctime is
    compared only before the file is moved, so a set that was put back needs a
    new look. `hidden`: a short name in the same directory that no other set
    of any time has, or `back` could give a stranger this file's name.
    """

    root: str  # absolute; may itself be a link
    path: str  # root-relative, surrogate escapes
    state: State
    hidden: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a phase did; `places` in the order of its targets. Not ok: `why`, and what to do next."""

    ok: bool
    places: tuple[Place, ...]
    why: str = ""
    hint: str = ""
    kept: tuple[tuple[str, str], ...] = ()  # absolute: the name that is taken, where its old file is now
    writers_known: bool = True  # False: some file's writers could not be told, and `need_lease` was off
    moved: bool = field(default=True, compare=False)  # False: this call has renamed nothing


class _Refused(TriggerError):
    """This target cannot be taken away now."""


def aside(targets: Sequence[Target], *, need_lease: bool = True) -> Outcome:
    """Rename all to their hidden names and look again; anything different puts all back. ok: all are aside."""
    with _Hands(targets, need_lease) as hands:
        try:
            # Whatever is hidden already was moved by a call that was killed; the second look judges it.
            waiting = [one for one in targets if hands.place(one) in (Place.AT_NAME, Place.NEITHER, Place.LOST)]
            for one in waiting:
                hands.look(one, split(one.path)[1], moved=False)
            for one in waiting:
                hands.set_aside(one)
            for one in targets:
                fail_point("removal.again")
                hands.stay(one)
                hands.look(one, one.hidden, moved=True)
            fail_point("removal.aside")
        except (OSError, _Refused) as error:
            hands.refuse(error)
            return hands.put_back()
        return hands.outcome([Place.ASIDE] * len(targets))


def gone(targets: Sequence[Target], *, need_lease: bool = True) -> Outcome:
    """Unlink all that are aside and still what they were; a different one is put back, never unlinked.

    As long as none is unlinked, one difference puts all back. ok: all are gone
    or were found under neither name.
    """
    with _Hands(targets, need_lease) as hands:
        places = [hands.attempt(hands.ready, one) for one in targets]
        for number, one in enumerate(targets):
            if places[number] is Place.ASIDE and (Place.UNKNOWN not in places or _begun(places)):
                places[number] = hands.attempt(hands.unlink, one)
        if not _begun(places):
            return hands.put_back()
        for number, one in enumerate(targets):
            if places[number] is Place.UNKNOWN:
                places[number] = hands.attempt(hands.give_back, one)
        hands.sync()
        return hands.outcome(places)


def back(targets: Sequence[Target]) -> Outcome:
    """Put back what is aside; where the name is taken, beside it as NAME.kept-N. ok: nothing is hidden any more."""
    with _Hands(targets, False) as hands:
        return hands.put_back()


def left(targets: Sequence[Target]) -> tuple[Place, ...]:
    """Say where each is now: AT_NAME, ASIDE, BOTH, NEITHER or UNKNOWN. Changes nothing."""
    with _Hands(targets, False) as hands:
        return tuple(hands.attempt(hands.place, one) for one in targets)


class _Hands:
    """One phase at work: its open directories, and the first thing that stood in its way.

    The directories stay open for the whole call, so that a file goes back to
    where it came from even if its directory is renamed meanwhile.
    """

    def __init__(self, targets: Sequence[Target], need_lease: bool) -> None:
        self.targets = targets
        self._need_lease = need_lease
        self._roots: dict[str, tuple[int, bool]] = {}  # device; whether other hosts may write there
        self._directories: dict[tuple[str, str], int] = {}
        self._why, self._hint = "", ""
        self._about = ""  # what is being done to, for the words of an OSError
        self._kept: list[tuple[str, str]] = []
        self._writers_known = True
        self._moved = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._directories.values():
            os.close(descriptor)

    def refuse(self, error: OSError | _Refused) -> None:
        """Note why this phase does not succeed; the first reason stays."""
        if self._why:
            return
        if isinstance(error, _Refused):
            self._why, self._hint = error.message, error.hint
        else:
            self._why = f"{self._about}: {error.strerror or error}"
            self._hint = _hint(error.errno or errno.EIO)

    def attempt(self, step: Callable[[Target], Place], target: Target) -> Place:
        """Return the place that a step tells; UNKNOWN, and why is noted, if it could not be done."""
        try:
            return step(target)
        except (OSError, _Refused) as error:
            self.refuse(error)
            return Place.UNKNOWN

    def outcome(self, places: Sequence[Place]) -> Outcome:
        kept = tuple(self._kept)
        return Outcome(not self._why, tuple(places), self._why, self._hint, kept, self._writers_known, self._moved)

    # ------------------------------------------------------------------ looking

    def place(self, target: Target) -> Place:
        """Say under which of its two names something stands. Raises OSError, _Refused."""
        try:
            at = self._directory(target)
        except FileNotFoundError:
            return Place.LOST
        match _lstat(at, split(target.path)[1]) is not None, _lstat(at, target.hidden) is not None:
            case True, True:
                return Place.BOTH
            case True, False:
                return Place.AT_NAME
            case False, True:
                return Place.ASIDE
        return Place.NEITHER

    def look(self, target: Target, name: str, *, moved: bool) -> None:
        """Raise unless this is the version, a regular file of one name, and nobody has it open for writing."""
        fail_point("removal.look")
        at = self._directory(target)
        device, remote = self._root(target.root)
        seen = os.stat(name, dir_fd=at, follow_symlinks=False)
        _compare(target, seen, device, moved=moved)
        fail_point("removal.lease")
        held = None if remote else _open(name, at)
        if held is None:
            writer = None
        else:
            try:
                writer = _has_writer(held)
                _compare(target, os.fstat(held), device, moved=moved)  # one that closed just before the lease
            finally:
                os.close(held)
        if writer:
            raise _Refused(f"a program has {_full(target)} open for writing", hint=_KEPT)
        if writer is None and self._need_lease:
            raise _Refused(
                f"whether a program has {_full(target)} open for writing cannot be told",
                hint="only for one's own files or with CAP_LEASE, and on a local Linux disk",
            )
        self._writers_known = self._writers_known and writer is not None

    def stay(self, target: Target) -> None:
        """Raise unless the path still leads to the directory that was opened."""
        again = self._walk(target)
        try:
            same = os.path.samestat(os.fstat(again), os.fstat(self._directory(target)))
        finally:
            os.close(again)
        if not same:
            raise _Refused(f"the directory of {_full(target)} was replaced", hint=_KEPT)

    def ready(self, target: Target) -> Place:
        """Return ASIDE if it may be unlinked, NEITHER if there is nothing to unlink. Raises OSError, _Refused."""
        at = self._directory(target)
        if self.place(target) in (Place.ASIDE, Place.BOTH):
            self.look(target, target.hidden, moved=True)
            return Place.ASIDE
        name = split(target.path)[1]
        seen = _lstat(at, name)
        if seen is not None and _is_version(target, seen):
            raise _Refused(f"{_full(target)} stands at its name again", hint=_KEPT)
        if _find_kept(target, at, name):
            raise _Refused(f"{_full(target)} was put back beside its name", hint=_KEPT)
        return Place.NEITHER  # unlinked; what else stands at its name was written since

    # ------------------------------------------------------------------ moving

    def set_aside(self, target: Target) -> None:
        fail_point("removal.rename")
        self._moved = True
        _rename_new(self._directory(target), split(target.path)[1], target.hidden)
        fail_point("removal.renamed")

    def unlink(self, target: Target) -> Place:
        self.look(target, target.hidden, moved=True)
        fail_point("removal.unlink")
        os.unlink(target.hidden, dir_fd=self._directory(target))
        fail_point("removal.unlinked")
        return Place.GONE

    def put_back(self) -> Outcome:
        """Put all of the set back."""
        places = [self.attempt(self.give_back, one) for one in self.targets]
        self.sync()
        return self.outcome(places)

    def give_back(self, target: Target) -> Place:
        """Put one back if it stands under its hidden name. Raises OSError, _Refused."""
        place = self.place(target)
        if place in (Place.NEITHER, Place.LOST):
            return place
        at, name = self._directory(target), split(target.path)[1]
        if place is Place.ASIDE:
            fail_point("removal.back")
            try:
                _rename_new(at, target.hidden, name)
                fail_point("removal.returned")
                return Place.AT_NAME
            except FileExistsError:
                place = Place.BOTH
        kept = _find_kept(target, at, name) if place is Place.AT_NAME else _keep(target, at, name)
        if not kept:
            return place
        full = _full(target)
        self._kept.append((full, full[: len(full) - len(name)] + kept))
        return Place.KEPT

    def sync(self) -> None:
        """Make names durable before the caller journals them; shares that refuse it write names through."""
        for (root, directory), descriptor in self._directories.items():
            self._about = f"{root}/{directory}"
            try:
                fail_point("removal.sync")
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED | {errno.EBADF}:
                    self.refuse(error)

    # ------------------------------------------------------------------ directories

    def _root(self, root: str) -> tuple[int, bool]:
        if root not in self._roots:
            try:
                device = os.stat(root).st_dev
            except FileNotFoundError as error:
                raise _Refused(f"{root} is not there", hint="mount it; it is never created from here") from error
            mount = mounts.mount_of(os.path.realpath(root))
            self._roots[root] = device, mount is None or mounts.remote(mount.fstype)
        return self._roots[root]

    def _directory(self, target: Target) -> int:
        self._about = _full(target)
        key = target.root, split(target.path)[0]
        if key not in self._directories:
            if len(self._directories) >= DIRECTORIES_MAX:
                raise _Refused(f"a set in more than {DIRECTORIES_MAX} directories", hint="reclaim it in smaller sets")
            self._directories[key] = self._walk(target)
        return self._directories[key]

    def _walk(self, target: Target) -> int:
        """Open its directory name by name; the caller closes it. Raises OSError, _Refused."""
        *above, name = target.path.split("/")
        if {"", ".", ".."} & {*above, name, target.hidden} or "/" in target.hidden or target.hidden == name:
            raise _Refused(f"{target.path!r} or {target.hidden!r} is no name below a root", hint="report this as a bug")
        device, _ = self._root(target.root)
        fail_point("removal.open")
        at = os.open(target.root, _SEARCH if above else _READ)
        try:
            for number, part in enumerate(above, 1):
                deeper = os.open(part, (_SEARCH if number < len(above) else _READ) | _NO_LINK, dir_fd=at)
                os.close(at)
                at = deeper
                if os.fstat(at).st_dev != device:
                    raise _Refused(f"another file system is mounted above {_full(target)}", hint="watch that one too")
        except BaseException:
            os.close(at)
            raise
        return at


def _begun(places: Sequence[Place]) -> bool:
    """Say whether some of the set are gone for good, by this call or one before."""
    return Place.GONE in places or Place.NEITHER in places


def _keep(target: Target, at: int, name: str) -> str:
    """Give a hidden file a visible name beside its own, which is taken."""
    for kept in kept_names(name):
        fail_point("removal.keep")
        try:
            _rename_new(at, target.hidden, kept)
        except FileExistsError:
            continue
        fail_point("removal.kept")
        return kept
    raise _Refused(f"{_full(target)} is hidden as {target.hidden}", hint=f"tidy up its {KEPT_MAX} .kept- files")


def _find_kept(target: Target, at: int, name: str) -> str:
    """Return the name that a call has given it which was killed then, or ''."""
    for kept in kept_names(name):
        seen = _lstat(at, kept)
        if seen is None:
            return ""
        if _is_version(target, seen):
            return kept
    return ""


def kept_names(name: str) -> Iterator[str]:
    """Yield visible names beside a taken one, its end cut where it would grow too long."""
    plain = os.fsencode(name)
    for number in range(1, KEPT_MAX + 1):
        suffix = f".kept-{number}".encode()
        yield os.fsdecode(plain[: max(len(plain), NAME_MAX) - len(suffix)] + suffix)


def _full(target: Target) -> str:
    return f"{target.root.rstrip('/')}/{target.path}"


def _lstat(at: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_version(target: Target, seen: os.stat_result) -> bool:
    size, mtime_ns, _, inode = target.state
    return (seen.st_size, seen.st_mtime_ns) == (size, mtime_ns) and inode in (0, seen.st_ino)


def _compare(target: Target, seen: os.stat_result, device: int, *, moved: bool) -> None:
    path, ctime_ns = _full(target), target.state[2]
    if seen.st_dev != device:
        raise _Refused(f"something is mounted at {path}", hint=_KEPT)
    if not stat.S_ISREG(seen.st_mode):
        raise _Refused(f"{path} is no regular file any more", hint=_KEPT)
    if seen.st_nlink != 1:
        raise _Refused(f"{path} has {seen.st_nlink} names (hard links)", hint="remove the others, or leave it")
    if not _is_version(target, seen) or (ctime_ns and not moved and seen.st_ctime_ns != ctime_ns):
        raise _Refused(f"{path} is not what was proved any more", hint="nothing to do: its new version comes first")


def _open(name: str, at: int) -> int | None:
    """Open for a lease only; None where that is not allowed."""
    try:
        return os.open(name, _FILE, dir_fd=at)
    except PermissionError:
        return None


def _has_writer(held: int) -> bool | None:
    """Take a read lease and give it back: EAGAIN while any descriptor or map can write; None where it is refused."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        # Whoever breaks the lease sends a signal: SIGIO would end this process, SIGURG is ignored by default.
        fcntl.fcntl(held, _SET_SIGNAL, signal.SIGURG)
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    return False


def _rename_new(at: int, name: str, new: str) -> None:
    """Rename within a directory without replacing; raise FileExistsError if something stands there."""
    if _RENAMEAT2 is not None and not fail_point("removal.replacing"):
        if _RENAMEAT2(at, os.fsencode(name), at, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code), name)
    if _lstat(at, new) is not None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(name, new, src_dir_fd=at, dst_dir_fd=at)


def _hint(code: int) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return "give the daemon's user the right to read, rename and delete there"
    if code == errno.EROFS:
        return "mount it for writing, or leave its files out of reclaim"
    if code in TROUBLE:
        return "check the disk, mount or server"
    if code in (errno.ENOTDIR, errno.ELOOP):
        return "a link stands there, which is not followed; bring the directory back"
    return _KEPT
