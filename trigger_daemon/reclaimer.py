"""The hands of reclaim: look for sets that could go, and take away those that the core has decided on.

One thread, so that a disk that is low is not asked for more at once than it
gives. What lies on a mount that may hang is looked at by a child with a
deadline (`eyes`), and never taken away. A call that hangs on a disk of this
machine is told, and left alone until it comes back: only the thread that began
a phase ends it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import os
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trigger_daemon import removal
from trigger_daemon.clock import Clock
from trigger_daemon.core import model
from trigger_daemon.core.rules import CANARY, HIDDEN, Rule
from trigger_daemon.errors import TriggerError
from trigger_daemon.eyes import Eyes, Hangs
from trigger_daemon.failpoints import fail_point
from trigger_daemon.mounts import Mount, may_hang, remote
from trigger_daemon.reader import Reader
from trigger_daemon.reclaim import Candidate, Part, Selection, stands
from trigger_daemon.workers import Workers

SETS_MAX = 500  # in one answer
DEADLINE_S = 120.0  # of a phase of one set; a whole disk may be asked for its metadata
SELECT_DEADLINE_S = 1_800.0  # a million files are looked at in less
FLOOR_S = 3_600.0  # how long it is believed that what was gone is gone
REFUSED_S = 6 * 3_600.0  # how long a copy is left alone that was read again, and differs
UNTOLD_S = 600.0  # and one of which that could not be told
BELIEVED_S = 120.0  # how long it is believed what a service has just said
AGAIN_MAX = 20  # runs proved again for one answer: each may read all of its files
PROVED_MAX = 20_000  # copies remembered
APART_S = 60.0  # how long it is believed that two directories are not one
APART_MAX = 10_000  # pairs of directories remembered
SHOWS_S = 20.0  # files stand under hidden names while a far side is asked

# (run, record of its proof, whether contents must be read) -> why it is not proved any more, whether that is sure;
# else the records that hold now
Again = Callable[[int, Mapping[str, Any], bool], tuple[str, bool, Sequence[Mapping[str, Any]]]]
# (run, where its copy would be) -> whether something stands there, at a place that cannot be looked at from here.
# Raises OSError where nobody can tell.
Shows = Callable[[int, str], bool]
# until when it holds, why it is not proved any more, else the record that is proved now; of which state of its source
_Told = tuple[float, str, Mapping[str, Any] | None, model.State | None]
_Home = tuple[object, object]  # device and inode of a root and of a directory below it, None for one that is gone


class Reclaimer:
    """Carries `Select` and `Remove` out."""

    def __init__(
        self, reader: Reader, *, post: Callable[[model.Fact], None], clock: Clock, roots: Mapping[int, str],
        witnessed: Callable[[], float], again: Again, shows: Shows,
    ) -> None:  # fmt: skip
        """`again` proves once more what cannot be told by a look from here, `shows` looks where that cannot be done."""
        self._reader = reader
        self._post = post
        self._clock = clock
        self._roots = roots
        self._witnessed = witnessed
        self._again = again
        self._shows = shows
        self._rules: Sequence[Rule] = ()
        self._workers = Workers("reclaim", 1, clock.monotonic)
        self._eyes = Eyes(clock.monotonic)
        self._after: dict[str, int] = {}
        self._after_at = clock.monotonic()
        self._proved: OrderedDict[tuple[int, str], _Told] = OrderedDict()  # (run, to) -> what was told of it
        self._apart: dict[tuple[str, str], float] = {}  # directories of a file and of a copy -> until when believed
        self._homes: dict[int, tuple[_Home, ...]] = {}  # set under way -> in which directories its files were hidden
        self._selecting = False
        self._read = 0  # runs proved again for the present answer

    def use(self, rules: Sequence[Rule]) -> None:
        """Work with these rules from now on."""
        self._rules = rules
        self._after = {}

    def carry(self, effect: model.Select | model.Remove) -> None:
        """Begin to carry one effect out; returns at once."""
        rules = self._rules
        if isinstance(effect, model.Select):
            hangs = f"no answer within {SELECT_DEADLINE_S:g} s"
            self._workers.submit(
                lambda: self._select(effect, rules), deadline_s=SELECT_DEADLINE_S,
                late=lambda: self._post(model.Selected((), effect.rules_at, self._clock.monotonic(), hangs)),
            )  # fmt: skip
        else:
            why = f"the file system has not answered within {DEADLINE_S:g} s"
            hint = "is its disk or share well?"
            late = functools.partial(model.Removed, effect.id, effect.phase, False, (), why, hint)
            self._workers.submit(
                lambda: self._remove(effect, rules), deadline_s=DEADLINE_S,
                late=lambda: self._post(late(self._clock.monotonic())),
            )  # fmt: skip

    def supervise(self, now: float) -> int:
        """Give up waiting for calls that hang; return how many do."""
        return self._workers.supervise(now)

    def stop(self) -> None:
        """Take no more; what is under way is ended after the next start."""
        self._workers.stop()
        self._eyes.close()

    # ------------------------------------------------------------------ which

    def _select(self, effect: model.Select, rules: Sequence[Rule]) -> None:
        self._selecting = True
        try:
            sets, why = self._sets(effect, rules), ""
        except Exception as error:  # noqa: BLE001  whatever it was: without an answer nobody would look again
            sets, why = (), str(error) or type(error).__name__
        self._selecting = False
        self._post(model.Selected(sets, effect.rules_at, self._clock.monotonic(), why))

    def _sets(self, effect: model.Select, rules: Sequence[Rule]) -> tuple[model.ReclaimSet, ...]:
        now = self._clock.monotonic()
        if now - self._after_at > FLOOR_S:
            self._after, self._after_at = {}, now
        self._read = 0
        found: list[model.ReclaimSet] = []
        taken: set[str] = set()  # a file that two rules have taken goes once
        size = 0
        with self._reader.at_length() as reader:
            for one in self._selection(reader, rules).candidates(rules=effect.rules):
                if one.why or not taken.isdisjoint(part.full for part in one.parts):
                    continue
                if (one.parts[0].number, one.parts[0].path) in effect.skipped:
                    continue
                taken.update(part.full for part in one.parts)
                found.append(self._set(one, rules))
                size += one.bytes
                if len(found) >= SETS_MAX or (effect.wanted_bytes is not None and size >= effect.wanted_bytes):
                    break
        return tuple(found)

    def _selection(self, reader: Reader, rules: Sequence[Rule]) -> Selection:
        return Selection(
            reader, rules, self._roots, now=self._clock.utc(), witnessed=self._witnessed(),
            standing=self._standing, after=self._after, eyes=self._eyes,
        )  # fmt: skip

    @staticmethod
    def _set(one: Candidate, rules: Sequence[Rule]) -> model.ReclaimSet:
        rule = next(rule for rule in rules if rule.name == one.rule)
        assert rule.reclaim is not None
        token = secrets.token_hex(8)  # not a number of ours: a journal put back from a backup gives numbers again
        files = tuple(
            model.ReclaimFile(part.number, part.path, part.state, f"{HIDDEN}{token}-{number}")
            for number, part in enumerate(one.parts)
        )
        return model.ReclaimSet(rule.id, one.batch, files, one.copies, rule.reclaim.only_under == "always")

    # ------------------------------------------------------------------ taking away

    def _remove(self, effect: model.Remove, rules: Sequence[Rule]) -> None:
        try:
            did = self._phase(effect, rules)
        except Exception as error:  # noqa: BLE001  whatever it was, the set is not forgotten: it is tried again
            places = (removal.Place.UNKNOWN,) * len(effect.of.files)
            did = removal.Outcome(False, places, str(error) or type(error).__name__)
        fail_point("reclaim.told")
        places_told = tuple(str(place) for place in did.places)
        at = self._clock.monotonic()
        self._post(model.Removed(effect.id, effect.phase, did.ok, places_told, did.why, did.hint, at, did.kept))

    def _phase(self, effect: model.Remove, rules: Sequence[Rule]) -> removal.Outcome:
        of = effect.of
        targets = [removal.Target(self._roots[file.root], file.path, file.state, file.hidden) for file in of.files]
        match effect.phase:
            case "aside":
                # Twice: nothing stays hidden while a service is asked, and what is local may change until the end.
                if why := self._why_not(of, rules):
                    return removal.Outcome(False, (removal.Place.AT_NAME,) * len(targets), why)
                did = removal.aside(targets)
                if not did.ok and not did.moved:  # they are where they were, whatever that is now
                    return replace(did, places=(removal.Place.AT_NAME,) * len(targets))
                if did.ok and (why := self._one_place(of, targets) or self._why_not(of, rules)):
                    did = _refused(removal.back(targets), why)
                elif did.ok:
                    self._homes[effect.id] = tuple(map(_home, targets))
            case _ if silent := self._silent(targets):
                did = removal.Outcome(False, (removal.Place.UNKNOWN,) * len(targets), silent, "is its server well?")
            case "gone":
                # Once more: it may have waited behind another set, and the machine may have slept.
                why = self._one_place(of, targets) or self._why_not(of, rules)
                did = _refused(removal.back(targets), why) if why else removal.gone(targets)
            case _:
                did = removal.back(targets)
        if effect.phase != "aside":
            did = self._where_hidden(effect.id, targets, did)
            if removal.Place.UNKNOWN not in did.places:
                self._homes.pop(effect.id, None)
        return did

    def _where_hidden(self, id: int, targets: Sequence[removal.Target], did: removal.Outcome) -> removal.Outcome:
        """Return what a phase did, less what it took for gone because the path leads elsewhere than when it was hidden.

        A root that is a link, or was mounted, may lead back again; a directory that was replaced stays so.
        """
        places = list(did.places)
        for number, (target, was) in enumerate(zip(targets, self._homes.get(id, ()), strict=False)):
            if places[number] in (removal.Place.NEITHER, removal.Place.AT_NAME) and (now := _home(target)) != was:
                places[number] = removal.Place.LOST if now[0] == was[0] else removal.Place.UNKNOWN
        if tuple(places) == did.places:
            return did
        return replace(did, ok=False, places=tuple(places), why="its path leads elsewhere than when it was hidden")

    def _silent(self, targets: Sequence[removal.Target]) -> str:
        """Return which root does not answer: a root may lie on a share now, and this thread must not hang there."""
        for root in {target.root for target in targets}:
            try:
                self._eyes.statvfs(root)
            except Hangs as error:
                return f"{root}: {error.strerror}"
            except OSError:
                continue  # told when it is entered
        return ""

    def _why_not(self, of: model.ReclaimSet, rules: Sequence[Rule]) -> str:
        """Return why a set is not proved any more, or not known to be."""
        fail_point("reclaim.judge")
        name = next((rule.name for rule in rules if rule.id == of.rule), "")
        parts = [
            Part(self._roots[file.root], file.path, file.state[0], file.state[1], file.root, file.state)
            for file in of.files
        ]
        try:
            with self._reader.at_length() as reader:
                return self._selection(reader, rules).judge(name, parts)
        except TriggerError as error:
            return str(error)

    def _one_place(self, of: model.ReclaimSet, targets: Sequence[removal.Target]) -> str:
        """Return why a copy may be the file itself, by another way, while the file stands under its hidden name.

        Through FUSE, overlay and NFS one file has two devices and inodes, and a server may have this very disk. A name
        that nobody has asked for is in no cache: where the hidden name shows beside a copy, both directories are one.
        """
        hidden = {f"{target.root.rstrip('/')}/{target.path}": target.hidden for target in targets}
        for proof in of.proofs:
            for path, to, *_ in proof.get("copies", ()):
                if path not in hidden or not to:
                    continue
                here, there = os.path.dirname(path), _place(path, to)
                try:
                    if self._is_one(proof["run"], os.path.join(here, hidden[path]), there):
                        why = f"its copy {to} is the file itself, by another way"
                        until = self._clock.monotonic() + REFUSED_S
                        self._remember((proof["run"], to), (until, why, None, None))
                        return why
                except OSError as error:
                    return f"nobody can tell whether {to} is the file itself, by another way: {error.strerror}"
        return self._one_copy(of)

    def _one_copy(self, of: model.ReclaimSet) -> str:
        """Return why copies that two rules have proved may be one file, which a pool or share shows twice."""
        copies = [
            (proof["run"], path, to) for proof in of.proofs for path, to, *_ in proof.get("copies", ())
            if os.path.isabs(to or "")
        ]  # fmt: skip
        for (run, path, to), (other_run, other_path, other) in itertools.combinations(copies, 2):
            if run == other_run or path != other_path:
                continue
            try:
                if self._are_one_copy(to, other):
                    why = f"its copies {to} and {other} are one file, by another way"
                    self._remember((run, to), (self._clock.monotonic() + REFUSED_S, why, None, None))
                    return why
            except OSError as error:
                return f"nobody can tell whether {to} and {other} are one file: {error.strerror}"
        return ""

    def _is_one(self, run: int, aside: str, there: str) -> bool:
        """Say whether a file that stands aside shows beside its copy, or one from there beside it. Raises OSError."""
        here, name = os.path.split(aside)
        beside = f"{there}{name}"
        if os.path.isabs(there):
            return self._is_there(beside) or self._comes_back(here, there)
        now = self._clock.monotonic()
        if now < self._apart.get((here, there), now):
            return False
        if self._asked(run, beside):
            return True
        self._keep_apart(here, there)
        return False

    def _asked(self, run: int, to: str) -> bool:
        """Ask a far side whether something stands there. Raises OSError, also if it is late."""
        answers: list[bool | OSError] = []

        def ask() -> None:
            try:
                answers.append(self._shows(run, to))
            except OSError as error:
                answers.append(error)

        asking = threading.Thread(target=ask, name="reclaim-shows", daemon=True)
        asking.start()
        asking.join(SHOWS_S)
        answer = answers[0] if answers else OSError(errno.ETIMEDOUT, f"no answer within {SHOWS_S:g} s")
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _are_one_copy(self, to: str, other: str) -> bool:
        """Say whether two copies lie in one directory, of which a pool or share makes two. Raises OSError."""
        here, there = os.path.dirname(to), os.path.dirname(other)
        mounts = self._eyes.mount(here), self._eyes.mount(there)
        if None not in mounts and len({mount.device for mount in mounts if mount}) == 1:  # there inodes have told it
            return False
        if not any(map(_may_show_others, mounts)):
            return False
        # Either way: what is made in the upper layer of a pool does not show in one below it.
        return self._shows_in(here, there) or self._shows_in(there, here)

    def _keep_apart(self, here: str, there: str) -> None:
        if len(self._apart) >= APART_MAX:
            self._apart.clear()
        self._apart[here, there] = self._clock.monotonic() + APART_S

    def _comes_back(self, here: str, there: str) -> bool:
        """Say whether a file that is made beside a copy shows beside the source.

        Only where a program or another host may answer from what it remembers. Raises OSError if none can be made.
        """
        mount = self._eyes.mount(there)
        return mount is not None and (remote(mount.fstype) or may_hang(mount)) and self._shows_in(here, there)

    def _shows_in(self, here: str, there: str) -> bool:
        """Say whether an empty file that is made in one directory shows in the other. Raises OSError if none can be."""
        now = self._clock.monotonic()
        if now < self._apart.get((here, there), now):
            return False
        # One name for each directory, so that the next look removes what one that was killed has left.
        about = f"{socket.gethostname()}\0{self._reader.path}\0{here}"
        name = CANARY + hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._eyes.make(os.path.join(there, name))
        try:
            if self._is_there(os.path.join(here, name)):
                return True
        finally:
            self._eyes.unlink(os.path.join(there, name))
        self._keep_apart(here, there)
        return False

    def _is_there(self, path: str) -> bool:
        try:
            self._eyes.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    # ------------------------------------------------------------------ copies

    def _standing(self, run: int, record: Mapping[str, Any], state: model.State, touched: bool) -> str:
        """Return why a copy is not what was proved: as its stat tells, else as whoever made it can prove once more.

        A source that was touched since it was read may have been rewritten with its old size and time: both sides are
        read again, and that holds as long as the source has the state that it had before. No clock tells it: clocks
        are set. A service is asked only for what is about to be taken away.
        """
        to = str(record.get("to") or "")
        local = os.path.isabs(to)
        why = stands(record, self._eyes) if local else f"{to or 'its copy'} cannot be looked at from here"
        if local and not why:
            if not touched:
                return ""
            why = "its source was touched since"
        now = self._clock.monotonic()
        until, refused, newer, of = self._proved.get((run, to), (now, "", None, None))
        if refused and now <= until:
            return refused
        holds = newer is not None and (of == state or not (of or touched))
        if holds and newer and not (stands(newer, self._eyes) if local else now > until):
            return ""
        if self._selecting and not local:
            return ""
        if local and self._read >= AGAIN_MAX:
            return f"{why}; it is proved again in its turn"
        self._read += local
        refused, surely, records = self._again(run, record, touched)
        now = self._clock.monotonic()  # both sides may have been read for long
        found = False
        for each in records:
            mine = str(each.get("to") or "") == to
            of = _read(each) or (state if mine else None)
            self._remember((run, str(each.get("to") or "")), (now + BELIEVED_S, "", each, of))
            found |= mine and of == state
        if not refused and not found:  # what was proved again does not hold this one, or it was touched once more
            refused = why
        if refused:
            self._remember((run, to), (now + (REFUSED_S if surely else UNTOLD_S), refused, None, None))
        return refused

    def _remember(self, key: tuple[int, str], what: _Told) -> None:
        self._proved[key] = what
        self._proved.move_to_end(key)
        while len(self._proved) > PROVED_MAX:
            self._proved.popitem(last=False)


def _place(path: str, to: str) -> str:
    """Return what a name in the directory of a copy begins with; `REMOTE:a.tif` has no slash."""
    own = os.path.basename(path)
    return to.removesuffix(own) if to.endswith(own) else f"{os.path.dirname(to)}/"


def _may_show_others(mount: Mount | None) -> bool:
    """Say whether what lies on a mount may lie on another file system, too."""
    return mount is None or mount.fstype == "overlay" or remote(mount.fstype) or may_hang(mount)


def _read(record: Mapping[str, Any]) -> model.State | None:
    """Return the state of the source that was read for a proof, None if that does not hold it."""
    if record.get("ctime_ns") is None:
        return None
    return record["size"], record["mtime_ns"], record["ctime_ns"], record["inode"]


def _home(target: removal.Target) -> _Home:
    return _identity(target.root), _identity(os.path.dirname(f"{target.root.rstrip('/')}/{target.path}"))


def _identity(directory: str) -> tuple[int, int] | None:
    try:
        seen = os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return seen.st_dev, seen.st_ino


def _refused(did: removal.Outcome, why: str) -> removal.Outcome:
    """Return what putting back did, as the outcome of what was refused."""
    return replace(did, ok=False, why=why if did.ok else f"{why}; and then: {did.why}")
