"""Sweeps of one root: what is there that no hint told of, and what is claimed but gone.

Three depths: the mtimes of known directories; the names of those that moved
(and again until their mtime has stood for a tick, for a name made within the same one);
all names by lstat, joined with their claims. Each is a generator that gives
way after each directory or CHUNK_MAX names. Watch, then list, so that nothing
made meanwhile falls between. Nothing is called gone unless the whole sweep
succeeded, and then only after a second listing.

Between sweeps some 12 bytes a name are remembered: a name that was met before
is not matched again, and what looks as when it came to nothing (all rules that
want it had claimed it) is not joined with its claims again. The looks of about
GROUP files share a digest, so one changed file costs its neighbours' claims too.
"""

from __future__ import annotations

import errno
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, pairwise
from operator import itemgetter
from typing import Any

from trigger_daemon.core.model import Row, Seen, State, Sweep, Swept, Vanished, join, split
from trigger_daemon.core.patterns import Wants
from trigger_daemon.core.rules import HIDDEN
from trigger_daemon.desk import Claim, Desk
from trigger_daemon.looks import ABSENT, CHUNK_MAX, TROUBLE
from trigger_daemon.roots import hashes

DUTY = 50  # a sweep waits so many times its own duration for the next: at most 2 % of the time
LOST_DUTY = 4  # one that lost hints ask for may come sooner, but a storm must not become sweeping for ever
TICK_S = 2.0  # the coarsest clock that stamps directories (FAT): an mtime that stood longer cannot hide a new name
SCOPES_MAX = 512  # directories waiting to be swept one by one; beyond that the whole root is cheaper
FAULTS_MAX = 5  # faults of a sweep that are told; the rest is counted
HIDDEN_MAX = 1_000  # names of reclaim's that are remembered
GROUP = 4  # looks that share a digest, on average: 2 bytes a file, and some 7 are joined again where one changed
ASKED_COST = 2  # the claims of a single name cost as much as those of two when a whole directory's are read
STATS_MAX = 1_000  # known directories whose mtime is asked for between two givings-way

_UNREADABLE_HINT = "let the daemon's user read it (group or ACL), or ignore it in the rules"
_ENDED: Any = object()
_SENT = -1  # is no digest: Python keeps it for errors
_UNMET = array("q", [_SENT])

_Look = tuple[str, State]


class Dir:
    """What is remembered of one directory."""

    __slots__ = ("again", "flags", "fresh", "inode", "known", "met", "mtime_ns", "settled", "since")

    def __init__(self, mtime_ns: int, inode: int, met: int, names: array[int], since: float) -> None:
        self.mtime_ns = mtime_ns  # just before it was listed
        self.inode = inode
        self.met = met  # serial of the full sweep that met it last
        self.known = names  # hashes of its names: files, then directories
        self.since = since  # when these names and this mtime were met first
        self.again = True  # list once more even if mtime stays
        self.flags: bytes | None = None  # for each file whether a rule wants it; None: to be matched again
        self.fresh: set[int] | None = None  # hashes of names hinted since the listing
        # What came to nothing (all claimed), for each block of looks: its digest or _SENT, then those of its groups.
        # None: some claim may be of a name that is no longer listed, or of other rules; all are to be read again.
        self.settled: list[array[int]] | None = None

    def keeps(self, before: Dir) -> bool:
        """Say whether every name that was listed or hinted before is still listed."""
        if self.known == before.known and not before.fresh:
            return True
        return set(self.known).issuperset(chain(before.known, before.fresh or ()))

    def match(self, before: Dir | None, files: Sequence[str], wants: Wants) -> Wants:
        """Set the flags of these files, of new names by matching them; return who wants a name."""
        if before is None or before.flags is None:
            ids = list(map(wants, files))
            self.flags = bytes(map(bool, ids))
            return dict(zip(files, ids, strict=True)).__getitem__
        if self.known == before.known:
            self.flags = before.flags
        else:
            old = dict(zip(before.known, before.flags, strict=False))  # the files are the first of the names
            now = zip(files, self.known, strict=False)
            self.flags = bytes([old[mark] if mark in old else bool(wants(name)) for name, mark in now])
        return wants


@dataclass(slots=True)
class Walk:
    """One sweep under way."""

    full: bool
    epoch: int  # of the root when it began
    asked: int = 0
    todo: list[str] = field(default_factory=list)
    files: int = 0
    faults: int = 0
    why: list[str] = field(default_factory=list)
    watched: bool = True
    lacking: list[str] = field(default_factory=list)  # directories that lack claimed names

    def fault(self, why: str) -> None:
        self.faults += 1
        if len(self.why) < FAULTS_MAX:
            self.why.append(why)

    @property
    def words(self) -> str:
        more = self.faults - len(self.why)
        return "; ".join(self.why) + (f"; and {more} more" if more else "")


class Sweeper:
    """Plans the sweeps of one root and carries them out, a step at a time."""

    def __init__(self, desk: Desk, *, every_s: float, full_s: float) -> None:
        self._desk = desk
        self._every_s = every_s
        self._full_s = full_s
        self._epoch = 0
        self._dirs: dict[str, Dir] = {}
        self._nested: set[str] = set()  # directories on another device than the root
        self._serial = 0  # of the newest full sweep
        self._stale = 0  # counts `claims_stale`
        self._hidden: dict[str, float] = {}  # path of a name that reclaim gives -> when it was met first
        self._lost: dict[str, str] = {}  # those that stay -> what their file was called, as far as it can be told
        self._scopes: dict[str, None] = {}
        self._scope_walk: Iterator[None] | None = None
        self._walk: Iterator[None] | None = None
        self._walking: Walk | None = None
        self._asked = 0  # largest Sweep.ask not begun
        self._asked_full = False
        self._full_at = self._names_at = -1.0
        self._full_ended = 0.0
        self._full_work_s = 0.0
        self._names_work_s = 0.0
        self._work_s = 0.0  # of the sweep under way, without waiting
        self._files = 0
        self._found = 0
        self._sweeps = [0, 0]  # of names, full

    def status(self) -> dict[str, Any]:
        """Return what is known and what sweeps cost."""
        return {
            "directories": len(self._dirs),
            "files": self._files,
            "found_by_sweep": self._found,
            "sweeps": self._sweeps[0],
            "full_sweeps": self._sweeps[1],
            "full_sweep_s": round(self._full_work_s, 3),
            "full_every_s": round(max(self._full_s, DUTY * self._full_work_s), 1),
        }

    # ------------------------------------------------------------------ asked by the worker

    def ask(self, sweep: Sweep) -> None:
        """Let the next sweep that starts answer this."""
        self._asked = max(self._asked, sweep.ask)
        self._asked_full |= sweep.full

    def lost_hints(self) -> None:
        """Look for new names at once, and soon at all files."""
        self._names_at = -1.0
        self._full_at = min(self._full_at, self._full_ended + LOST_DUTY * self._full_work_s)

    def scope(self, directory: str) -> None:
        """Sweep a directory that was made or moved in, with all below."""
        if not self._desk.matcher.descends(directory):
            return
        self._scopes[directory] = None
        if len(self._scopes) > SCOPES_MAX:
            self._scopes = {}
            self._full_at = self._names_at = -1.0

    def knows(self, directory: str) -> bool:
        """Say whether a walk has reached this directory, so without links."""
        return directory in self._dirs

    def heard(self, directory: str, rows: Sequence[tuple[str, State]]) -> None:
        """Remember names that a hint's look has told of."""
        known = self._dirs.get(directory)
        if known is not None:
            known.fresh = known.fresh or set()  # most directories never have one
            known.fresh.update([hash(name) for name, _ in rows])

    def claims_stale(self) -> None:
        """Read claims anew before joining any more rows."""
        self._stale += 1

    def accept(self) -> None:
        """Take file systems that are no longer mounted below the root as gone."""
        self._nested.clear()

    def begin_anew(self) -> None:
        """Other rules: what came to nothing is matched and joined again, by a full sweep at once."""
        if self._walking is not None:
            self._asked = max(self._asked, self._walking.asked)
            self._asked_full |= self._walking.asked > 0 and self._walking.full
        self._walk = self._walking = self._scope_walk = None
        for known in self._dirs.values():
            known.flags = known.settled = None
        self._full_at = -1.0

    def due_at(self, *, hold: bool) -> float:
        """Return when there will be something to do, infinity if not by itself."""
        if hold or not self._desk.believed:
            return float("inf")
        return min(self._full_at, self._names_at)

    def step(self, *, hold: bool) -> bool:
        """Go one step on with what is due; return False when nothing is."""
        if self._desk.epoch != self._epoch:
            self._forget()
        believed = self._desk.believed
        if believed and hold:
            return False
        if self._scope_walk is not None:
            if next(self._scope_walk, _ENDED) is _ENDED:
                self._scope_walk = None
            return True
        if believed and self._scopes:
            todo, self._scopes = list(self._scopes), {}
            self._scope_walk = self._sweep_scopes(todo)
            return True
        if self._walk is None and believed:
            self._walk = self._next_sweep()
            self._work_s = 0.0
        if self._walk is None:
            return False
        began, blocked = self._desk.now(), self._desk.blocked_s
        ended = next(self._walk, _ENDED) is _ENDED
        self._work_s += self._desk.now() - began - (self._desk.blocked_s - blocked)
        if ended:
            self._walk = None
        return True

    def _forget(self) -> None:
        """The root came back: nothing that was known of it counts. A walk under way notices and ends itself."""
        self._epoch = self._desk.epoch
        self._dirs = {}
        self._nested = set()
        self._hidden, self._lost = {}, {}
        self._scopes = {}
        self._full_at = self._names_at = -1.0

    def _next_sweep(self) -> Iterator[None] | None:
        now = self._desk.now()
        if now >= self._full_at or self._asked_full:
            return self._sweep(full=True)
        if now >= self._names_at or self._asked:
            return self._sweep(full=False)
        return None

    # ------------------------------------------------------------------ one sweep

    def _valid(self, walk: Walk) -> bool:
        return walk.epoch == self._desk.epoch and self._desk.believed

    def _sweep(self, *, full: bool) -> Iterator[None]:
        """Sweep the root and tell that, with all that went wrong."""
        desk = self._desk
        if not desk.check(deep=True):
            return
        if desk.epoch != self._epoch:
            self._forget()
            full = True
        walk = self._walking = Walk(full, desk.epoch, asked=self._asked)
        self._asked, self._asked_full = 0, False
        # What is asked for from here on is not answered by this sweep: it may have passed the place already.
        self._names_at = math.inf
        if full:
            self._full_at = math.inf
        watermark = desk.now()
        if full:
            self._serial += 1
            walk.todo.append("")
            yield from self._visit_all(walk)
        else:
            yield from self._visit_changed(walk)
        self._walking = None
        valid = desk.check(deep=True) and self._valid(walk)
        if not valid:
            walk.fault(desk.at.why or "the root changed during the sweep")
        ended = desk.now()
        if valid:
            self._plan(walk, ended)
        desk.post(Swept(desk.root, full, watermark, ended, not walk.faults, walk.files, walk.asked, walk.words))
        if not valid:
            return
        if full:
            self._files = walk.files
            desk.returning = False
            desk.degrade("unreadable", "")
            desk.degrade("trouble", "")
            if walk.watched:
                desk.degrade("watch", "")
        self._find_lost()
        self._tell_faults(walk)
        if full and not walk.faults:
            yield from self._tell_vanished(walk)

    def _plan(self, walk: Walk, ended: float) -> None:
        """Set when the next sweeps are due; those asked for while this one was under way come soon."""
        self._sweeps[walk.full] += 1
        if walk.full:
            work_s = self._full_work_s = self._work_s
            self._full_ended = ended
            # One that failed is repeated sooner: a baseline may wait for the first complete one.
            wait_s = max(min(self._full_s, self._every_s) if walk.faults else self._full_s, DUTY * work_s)
            self._full_at = min(max(self._full_at, ended + LOST_DUTY * work_s), ended + wait_s)
        else:
            self._names_work_s = self._work_s
        # By their own work, whatever this sweep was: one of all files does not put off the cheap ones.
        wait_s = max(self._every_s, DUTY * self._names_work_s)
        self._names_at = min(max(self._names_at, ended + LOST_DUTY * self._names_work_s), ended + wait_s)

    def _tell_faults(self, walk: Walk) -> None:
        if walk.faults:
            self._desk.degrade(
                "unreadable", f"not all of {self._desk.path} could be read: {walk.words}", _UNREADABLE_HINT
            )
        self._desk.tell()

    def _find_lost(self) -> None:
        """Tell of files that stay under names of reclaim's: a journal put back from a backup knows nothing of them."""
        desk = self._desk
        for path, since in list(self._hidden.items()):
            directory, name = split(path)
            (looked,) = desk.lstat(directory, [name], known=True)
            if name in looked.absent:
                del self._hidden[path]
                self._lost.pop(path, None)
            elif path not in self._lost and looked.rows and desk.now() - since > TICK_S:
                self._lost[path] = self._name_of(directory, looked.rows[0][1])
        words = [desk.words(path) + (f" (was {was})" if was else "") for path, was in self._lost.items()]
        more = f"; and {len(words) - FAULTS_MAX} more" if len(words) > FAULTS_MAX else ""
        desk.degrade(
            "hidden",
            f"files of {desk.path} stand under hidden names: {'; '.join(words[:FAULTS_MAX])}{more}" if words else "",
            "what an alarm `reclaim:N` names is ended by itself; the journal has forgotten others: rename them back",
        )

    def _name_of(self, directory: str, state: State) -> str:
        """Return the claimed name that such a file had and nothing has now, '' unless there is just one."""
        claims = self._desk.claims.directory(self._desk.root, directory)[1]
        fit = [name for name, rows in claims.items() if any(row[1:3] == state[:2] for row in rows)]
        absent = [name for looked in self._desk.lstat(directory, fit, known=True) for name in looked.absent]
        return absent[0] if len(absent) == 1 else ""

    def _sweep_scopes(self, todo: list[str]) -> Iterator[None]:
        walk = Walk(True, self._desk.epoch, todo=todo)
        yield from self._visit_all(walk)
        if self._valid(walk):
            self._tell_faults(walk)

    def _visit_all(self, walk: Walk) -> Iterator[None]:
        while walk.todo and self._valid(walk):
            yield from self._visit(walk.todo.pop(), walk)

    def _visit(self, directory: str, walk: Walk) -> Iterator[None]:
        """Look at all wanted names of one directory; the directories in it are left to do."""
        matcher = self._desk.matcher.directory(directory)
        before = self._dirs.get(directory)
        listed = self._list(directory, walk)
        if listed is None:
            yield
            return
        now, files, dirs = listed
        walk.todo += self._descend(directory, dirs)
        ids_of = now.match(before, files, matcher.wants)
        wanted = list(compress(files, now.flags or ()))
        walk.files += len(wanted)
        joining = _Joining(self, directory, ids_of, now.settled)
        if now.settled is None and matcher.any:
            joining.read()
        now.settled = None  # until this visit has come to its end
        for start in range(0, len(wanted), CHUNK_MAX):
            joining.look(wanted[start : start + CHUNK_MAX], walk)
            yield
            if not self._valid(walk):
                return
        if joining.claims and not joining.claims.keys() <= set(files).union(dirs):
            walk.lacking.append(directory)
        else:
            now.settled = joining.settled
        if not wanted:
            yield

    def _visit_changed(self, walk: Walk) -> Iterator[None]:
        """Ask all known directories for their mtime, and list those where it moved."""
        if "" not in self._dirs:
            walk.todo.append("")
        for count, directory in enumerate(list(self._dirs), 1):
            known = self._dirs.get(directory)
            if known is None:
                continue
            try:
                found = self._desk.stat(directory)
            except OSError as error:
                self._unlisted(directory, error, walk)
                continue
            if found.st_ino != known.inode:
                walk.todo.append(directory)
            elif known.again or found.st_mtime_ns != known.mtime_ns:
                yield from self._visit_names(directory, known, walk)
            if count % STATS_MAX == 0:
                yield
            if not self._valid(walk):
                return
        yield from self._visit_all(walk)

    def _visit_names(self, directory: str, known: Dir, walk: Walk) -> Iterator[None]:
        """List a known directory and look at the names that are new in it."""
        old = set(known.known).union(known.fresh or ())
        listed = self._list(directory, walk)
        if listed is None:
            yield
            return
        now, files, dirs = listed
        now.met = known.met
        walk.todo += [path for path in self._descend(directory, dirs) if path not in self._dirs]
        ids_of = now.match(known, files, self._desk.matcher.directory(directory).wants)
        wanted = [name for name in compress(files, now.flags or ()) if hash(name) not in old]
        walk.files += len(wanted)
        self._found += len(wanted)
        joining = _Joining(self, directory, ids_of, None)
        for start in range(0, len(wanted), CHUNK_MAX):
            joining.look(wanted[start : start + CHUNK_MAX], walk)
            yield
            if not self._valid(walk):
                return
        if not wanted:
            yield

    # ------------------------------------------------------------------ one directory

    def _descend(self, directory: str, names: Sequence[str]) -> list[str]:
        descends = self._desk.matcher.descends
        return [path for name in names if descends(path := join(directory, name))]

    def _list(self, directory: str, walk: Walk) -> tuple[Dir, list[str], list[str]] | None:
        """Watch and list one directory; None if that failed, which is a fault unless it is simply gone."""
        desk = self._desk
        if not desk.watch(directory):
            walk.watched = False
        began = desk.now()
        try:
            listing = desk.listing(directory)
        except OSError as error:
            self._unlisted(directory, error, walk)
            return None
        if listing.device != desk.at.device:
            self._nested.add(directory)
        elif directory in self._nested:
            walk.fault(f"the file system mounted on {desk.words(directory)} is gone")
            return None
        for name in listing.files:
            if name.startswith(HIDDEN) and len(self._hidden) < HIDDEN_MAX:
                self._hidden.setdefault(join(directory, name), began)
        names = hashes(listing.files + listing.dirs)
        before = self._dirs.get(directory)
        now = self._dirs[directory] = Dir(listing.mtime_ns, listing.inode, self._serial, names, desk.now())
        stood = before is not None and (before.mtime_ns, before.inode) == (now.mtime_ns, now.inode)
        if before is not None and stood and before.known == names:
            now.since = before.since
            now.again = began - before.since < TICK_S
        if before is not None and before.settled is not None and now.keeps(before):
            now.settled = before.settled
        return now, listing.files, listing.dirs

    def _unlisted(self, directory: str, error: OSError, walk: Walk) -> None:
        desk = self._desk
        code = error.errno or errno.EIO
        known = self._dirs.get(directory)
        if (code in ABSENT or code == errno.ELOOP) and directory and directory not in self._nested:
            self._dirs.pop(directory, None)  # gone, or no directory any more: its parent is the one to tell
            return
        walk.fault(f"list {desk.words(directory)}: {os.strerror(code)}")
        if known is not None:  # kept as it was last known
            known.met = self._serial
            known.again = True
        if code in TROUBLE:
            desk.check()

    # ------------------------------------------------------------------ what is no longer there

    def _tell_vanished(self, walk: Walk) -> Iterator[None]:
        """After a complete sweep: look once more for what lacked, and tell what is claimed but gone."""
        desk = self._desk
        for directory in walk.lacking:
            claimed = desk.claims.directory(desk.root, directory)[1]
            try:
                listing = desk.listing(directory)
            except OSError:
                continue  # the next full sweep tells
            gone = sorted(claimed.keys() - set(listing.files).union(listing.dirs))
            for start in range(0, len(gone), CHUNK_MAX):
                if not desk.check(deep=True) or not self._valid(walk):
                    return
                desk.post(Vanished(desk.root, directory, tuple(gone[start : start + CHUNK_MAX]), desk.now()))
                yield
        unmet = [
            directory
            for directory in desk.claims.directories(desk.root)
            if (known := self._dirs.get(directory)) is None or known.met != self._serial
        ]
        for directory in unmet:
            if self._gone(directory) and desk.check(deep=True) and self._valid(walk):
                desk.post(Vanished(desk.root, directory, None, desk.now()))
            yield
            if not self._valid(walk):
                return
        for directory in [directory for directory, known in self._dirs.items() if known.met != self._serial]:
            del self._dirs[directory]

    def _gone(self, directory: str) -> bool:
        try:
            self._desk.stat(directory)
        except OSError as error:
            return error.errno in ABSENT
        return False


class _Joining:
    """Looks at blocks of one directory's names, and sends the rows whose version is not fully claimed."""

    def __init__(self, sweeper: Sweeper, directory: str, ids_of: Wants, settled: list[array[int]] | None) -> None:
        self.claims: Mapping[str, Sequence[Claim]] | None = None  # of the whole directory, if they were read
        self.settled: list[array[int]] = []  # as in `Dir`
        self._sweeper = sweeper
        self._desk = sweeper._desk
        self._directory = directory
        self._ids_of = ids_of
        self._before = settled or []
        self._known: set[int] | None = None  # all its digests, once they are needed
        self._claimed = math.inf if settled is None else 0  # names with claims, about
        self._as_of = -1
        self._stale = 0

    def read(self) -> None:
        """Read the claims of the whole directory."""
        self._stale = self._sweeper._stale
        self._as_of, self.claims = self._desk.claims.directory(self._desk.root, self._directory)
        self._claimed = len(self.claims)

    def look(self, names: Sequence[str], walk: Walk) -> None:
        """Look at up to CHUNK_MAX names, and join those that do not look as when they came to nothing."""
        desk, directory = self._desk, self._directory
        chunks = desk.lstat(directory, names, known=True)
        digest = hash(tuple(chain.from_iterable(looked.rows for looked in chunks)))
        block = len(self.settled)
        met = self._before[block] if block < len(self._before) else _UNMET
        settled = met if met[0] == digest else array("q", [digest])
        for looked in chunks:
            rows = [] if settled is met else self._left(looked.rows, settled)
            if rows:
                settled[0] = _SENT
                rows.sort(key=itemgetter(0))  # those that come together are the first, the second, ... as people count
                desk.post(Seen(desk.root, directory, rows, looked.began, looked.ended, "sweep", "none", self._as_of))
            if looked.failed:
                name, code = looked.failed[0]
                walk.fault(f"lstat {desk.words(directory, name)}: {os.strerror(code)}")
                desk.failed(directory, looked)
            walk.todo += self._sweeper._descend(directory, looked.dirs)
        self.settled.append(settled)

    def _left(self, looked: Sequence[_Look], settled: array[int]) -> list[Row]:
        """Return what is to be sent, and add the digests of what came to nothing."""
        if self._known is None:
            self._known = set(chain.from_iterable(self._before)) - {_SENT}
            self._claimed = self._claimed or GROUP * len(self._known)
        if known := self._known:
            groups = _groups(looked)
            digests = list(map(hash, groups))
            settled.extend([digest for digest in digests if digest in known])
            new = [group for digest, group in zip(digests, groups, strict=True) if digest not in known]
            looked = list(chain.from_iterable(new))
        rows = self._join(looked) if looked else []
        if len(rows) < len(looked):
            sent = {name for name, _, _ in rows}
            groups = _groups(looked)
            settled.extend([hash(g) for g in groups if not sent or sent.isdisjoint([name for name, _ in g])])
        return rows

    def _join(self, rows: Sequence[_Look]) -> list[Row]:
        """Return those that some rule wants and has not claimed, by their own claims or, if those are fewer, by all."""
        desk, claims = self._desk, self.claims
        if claims is None or self._stale != self._sweeper._stale:
            if len(rows) * ASKED_COST < self._claimed:
                names = [name for name, _ in rows]
                self._as_of, claims = desk.claims.names(desk.root, self._directory, names)
            else:
                self.read()
                claims = self.claims
        return desk.left(rows, self._ids_of, claims or {})


def _groups(rows: Sequence[_Look]) -> list[tuple[_Look, ...]]:
    """Cut rows where the hash of a name says so: a name that comes or goes moves no cut between others."""
    cuts = [at for at, (name, _) in enumerate(rows, 1) if not hash(name) % GROUP]
    return [tuple(rows[begin:end]) for begin, end in pairwise([0, *cuts, len(rows)]) if begin < end]
