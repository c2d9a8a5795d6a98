"""Reclaim: a facility that gives space back; killed, attacked, without power at each step of it, and judged.

One life copies everything, and stops. The next gives space back, and dies at a
step; perhaps something is done to the files, the copies, the rules or the
journal; perhaps another life dies while it recovers. The last one ends it.
Power cuts begin each time from the same disks, taken down after the first life.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.prove import disks
from tests.prove.crashpoints import ELSEWHERE, NOT_DEATHS
from tests.prove.disks import Disk
from tests.prove.oracle import Violation
from tests.prove.reclaim_oracle import HIDDEN, Scene, Wrote, gone, judge
from tests.prove.results import Result
from tests.prove.stage import content
from tests.prove.sweep import Nursery, Place, kind_of, plan
from tests.prove.tracer import SUPPORTED, UNSUPPORTED, Answer, Call, Tracer
from tests.site import Site
from trigger_daemon import failpoints

VISITS = 3  # of each point of reclaim at which it is died
COMMITS_MAX = 20  # of each point of the journal's; a life that only gives space back comes to fewer
LANES = 2  # stages at once
KEEP_S = 1.0
SETTLED_S = 2.5  # of a life in which nothing is left to do: the first look comes after 1 s
DONE_S = 30.0
CUTS_S = 240.0  # for each arrangement of disks
PROGRAM = ("-m", "trigger_daemon")
ROOT = str(Path(__file__).resolve().parents[2])  # put last on sys.path: an installed daemon goes before

AROUND = ("loop.before_commit", "loop.after_commit", "journal.commit", "journal.committed")
# A point that only trouble leads to -> what is planned beside it, and what the life before died of and was done then.
_ASIDE = "removal.aside:kill@1"
BESIDE = {"removal.back": "removal.aside:eio@1,", "removal.returned": "removal.aside:eio@1,"}
AFTER = {"removal.keep": (_ASIDE, "rewritten"), "removal.kept": (_ASIDE, "rewritten")}

EXPLAIN = """\
import sys
from trigger_daemon import cli
for path in sys.argv[2:]:
    cli.run(["explain", path, "-F", "json", "--config", sys.argv[1]])
"""


class Case(NamedTuple):
    """Lives that die: what each is planned to die of, and what is done after it ('': nothing)."""

    plans: tuple[str, ...]
    acts: tuple[str, ...] = ()

    def __str__(self) -> str:
        acts = (*self.acts, *[""] * len(self.plans))
        return ", ".join(f"{plan} {act}".strip() for plan, act in zip(self.plans, acts, strict=False))


class Store:
    """A facility below `base`; journal and copies lie below `disk`, what the instrument writes below `source`."""

    def __init__(self, base: Path, disk: Path | None = None, source: Path | None = None) -> None:
        self.base, self.disk = base, disk or base
        self.explains = True
        self.recovered = False
        self.site = site = Site(base, quiescence="100ms", sweep="500ms")
        site.data, site.out, site.state = (source or self.disk) / "data", self.disk / "out", self.disk / "state"
        self.tape = self.disk / "tape"
        for directory in (site.data / "m", site.data / "side", site.out, site.state, self.tape):
            directory.mkdir(parents=True, exist_ok=True)
        site.settings["state_dir"] = str(site.state)
        companion = {"file": "side/{movie}.xml", "wait": "1s", "missing": "go"}
        self.rules = {
            "disk": site.rule(
                "disk", match=["m/{movie}.tif"], complete={"quiescence": "100ms", "with": [companion]},
                reclaim={"proven_by": ["disk", "tape"], "keep_for": f"{KEEP_S:g}s", "only_under": "always"},
            ),
            # It would take hidden names, too.
            "tape": site.rule("tape", built_in_ignores=False, start={"copy": {"to": str(self.tape)}}),
        }  # fmt: skip
        site.write_rules(*self.rules.values())
        self.scene = Scene(site.data, site.state / "journal.db", [], {"disk": site.out, "tape": self.tape})

    # -------------------------------------------------------------- the instrument

    def write(self, path: str, data: bytes) -> None:
        """Write a file, durably, and remember it."""
        target = self.site.data / path
        if target.exists():
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            old = {one for one in self.scene.wrote if (one.path, one.sha256) == (path, digest)}
            self.scene.overwritten |= old
        with target.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seen = target.stat()
        sha256 = hashlib.sha256(data).hexdigest()
        self.scene.wrote = [*self.scene.wrote, Wrote(path, seen.st_size, seen.st_mtime_ns, sha256)]

    def prepare(self) -> None:
        """Let a life without reclaim copy and prove all, and `keep_for` pass; it stops then."""
        for number in (1, 2):
            self.write(f"side/{number}.xml", content(f"xml {number}", 900))
            self.write(f"m/{number}.tif", content(f"tif {number}", 3_000))
        self.write("m/3.tif", content("tif 3", 4_000))
        self.site.settings["reclaim"] = "disabled"
        self.site.start()
        self.site.until(self._is_sent, DONE_S, "all is sent")
        proved = max(time_ for (time_,) in self.site.ask("SELECT witnessed FROM proof"))
        self.site.until(lambda: self._witnessed() > proved + KEEP_S, DONE_S, "`keep_for` is over")
        if self.site.stop():
            raise AssertionError(f"the daemon did not end well: {self.site.tail()}")
        self.site.settings["reclaim"] = "enabled"
        shutil.copytree(self.site.state, self.base / "backup")

    def _is_sent(self) -> bool:
        movies = {path for path in self.site.versions() if path[0].endswith(b".tif")}
        done = all(movies <= set(self.site.taken(rule)) for rule in self.rules)
        return done and not self.site.ask("SELECT 1 FROM run WHERE final = 0")

    def _witnessed(self) -> float:
        return float((self.site.heartbeat() or {}).get("reclaim", {}).get("witnessed_s", 0.0))

    # -------------------------------------------------------------- lives

    def live(self, plan: str = "", program: Sequence[str] = PROGRAM) -> bool:
        """Let a daemon live until it dies of its plan or has nothing to do; return whether it died."""
        self.site.start(wait=False, env={"TRIGGER_FAIL": plan}, program=tuple(program))
        process = self.site.process
        assert process is not None
        is_quiet = self.quiet(process.pid)
        self.site.until(lambda: process.poll() is not None or is_quiet(), DONE_S, "it dies, or all is ended")
        return process.poll() is not None

    def quiet(self, pid: int) -> Callable[[], bool]:
        """Return what says whether a daemon has nothing to do any more."""
        began: list[float] = []

        def is_quiet() -> bool:
            beat = self.site.heartbeat()
            if beat is None or beat["daemon"]["pid"] != pid or not beat["roots"]:
                return False
            if self.site.ask("SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"):
                return False
            if self.recovered:  # it is paused until a person has looked
                self.site.cli("resume")
                self.recovered = False
            if self.site.ask("SELECT 1 FROM run WHERE final = 0 AND state != 'HELD'"):
                return False
            told = json.dumps(beat["roots"])
            if any(HIDDEN.fullmatch(path.name) and path.name not in told for path in self.site.data.rglob("*")):
                return False  # they are told of after some seconds
            began.append(time.monotonic())
            return not list((self.site.data / "m").iterdir()) or began[-1] - began[0] > SETTLED_S

        return is_quiet

    def judge(self, *, idle: bool) -> list[Violation]:
        self.scene.told = json.dumps((self.site.heartbeat() or {}).get("roots"))
        if idle and self.explains:
            self.scene.explained = self._explain()
        return judge(self.scene, idle=idle)

    def _explain(self) -> dict[str, str]:
        names = sorted({one.path for one in self.scene.wrote})
        paths = [str(self.site.data / name) for name in names]
        argv = [sys.executable, "-P", "-c", EXPLAIN, str(self.site.config), *paths]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
        told, at = {}, 0
        while said[at:].strip():
            at += len(said[at:]) - len(said[at:].lstrip())
            one, length = json.JSONDecoder().raw_decode(said[at:])
            at += length
            stages = [rule["stage"] for rule in one["rules"] if rule["rule"] == "tape"]
            told[os.path.relpath(one["path"], self.site.data)] = stages[0] if stages else ""
        return told

    def last_life(self, program: Sequence[str] = PROGRAM) -> list[str]:
        """Let a life end all that was begun; say what is broken then."""
        broken = []
        try:
            if self.live("", program):
                broken.append(f"ended: the daemon died: {self.site.tail()[-500:]}")
        except AssertionError as error:
            broken.append(f"ended: {error}")
        broken += [f"{violation.law}: {violation.what}" for violation in self.judge(idle=True)]
        if self.site.stop():
            broken.append(f"the daemon did not end well: {self.site.tail()[-500:]}")
        return broken + [str(words) for words in self.site.json("journal", "check")["problems"][:1]]

    def close(self) -> None:
        if self.site.process is not None and self.site.process.poll() is None:
            self.site.kill()

    # -------------------------------------------------------------- acts

    def act(self, name: str) -> None:
        """Do something while no daemon lives. What is gone by now was judged."""
        self.scene.excused |= set(gone(self.scene))
        ACTS[name](self)


def rewritten(store: Store) -> None:
    """A new version of each movie is written at its name."""
    for number in (1, 2, 3):
        store.write(f"m/{number}.tif", content(f"new tif {number}", 2_500))


def copies_altered(store: Store) -> None:
    """The copies of all movies are altered."""
    for number in (1, 2, 3):
        (store.site.out / f"m/{number}.tif").write_bytes(content(f"bad {number}", 3_000))
    store.scene.frozen = "its copies were altered"


def copies_removed(store: Store) -> None:
    """The other copies of all movies are removed."""
    for number in (1, 2, 3):
        (store.tape / f"m/{number}.tif").unlink()
    store.scene.frozen = "its copies were removed"


def proof_wanted(store: Store) -> None:
    """A rule more, which has sent nothing, is to prove it."""
    third = store.site.rule("third", match=["m/**"], existing="ignore")
    reclaim = {**store.rules["disk"]["reclaim"], "proven_by": ["disk", "tape", "third"]}
    store.site.write_rules({**store.rules["disk"], "reclaim": reclaim}, store.rules["tape"], third)
    store.scene.frozen = "a rule of `proven_by` has sent nothing"


def rule_removed(store: Store) -> None:
    """The rule itself does not ask for reclaim any more."""
    store.site.write_rules({k: v for k, v in store.rules["disk"].items() if k != "reclaim"}, store.rules["tape"])
    store.scene.frozen = "no rule asks for reclaim"


def disabled(store: Store) -> None:
    """The settings say that nothing is deleted any more."""
    store.site.settings["reclaim"] = "disabled"
    store.scene.frozen = "reclaim is disabled"


def journal_older(store: Store) -> None:
    """The journal is put back from the last backup; the first was made before anything was chosen."""
    shutil.rmtree(store.site.state)
    shutil.copytree(store.base / "backup", store.site.state)


def backed_up(store: Store) -> None:
    """A backup of the journal is made."""
    shutil.rmtree(store.base / "backup")
    shutil.copytree(store.site.state, store.base / "backup")


def journal_recovered(store: Store) -> None:
    """The journal is damaged, and a person has it recovered."""
    with (store.site.state / "journal.db").open("r+b") as journal:
        journal.write(bytes(100))
    store.site.config.write_text(json.dumps(store.site.settings))
    store.site.cli("journal", "recover", "--send", "disk", "--send", "tape")
    store.recovered = True


ACTS: dict[str, Callable[[Store], None]] = {
    act.__name__: act
    for act in (
        rewritten, copies_altered, copies_removed, proof_wanted, rule_removed, disabled, journal_older, backed_up,
        journal_recovered,
    )
}  # fmt: skip


# --------------------------------------------------------------------------- cases


def points() -> list[str]:
    """Return the steps of reclaim at which it can die."""
    return [name for name in failpoints.names() if name.startswith(ELSEWHERE) and name not in NOT_DEATHS]


def at(point: str, visit: int) -> Case:
    """Die at a visit of a point; where only trouble leads to it, after that."""
    plan = f"{BESIDE.get(point, '')}{point}:kill@{visit}"
    if point in AFTER:
        before, act = AFTER[point]
        return Case((before, plan), (act,))
    return Case((plan,))


# Where something is done while no daemon lives: all is aside, one was put back, it is confirmed, a part is unlinked.
ATTACKED = ("removal.renamed:kill@1", "removal.aside:kill@1", "removal.unlink:kill@1", "removal.unlinked:kill@1")


def attacks() -> list[Case]:
    once = [Case((plan,), (act,)) for act in ACTS for plan in ATTACKED if act != "backed_up"]
    # A backup that knows of sets under way is put back after these have come to another end.
    older = [
        Case((plan, f"removal.unlinked:kill@{visit}"), ("backed_up", "journal_older"))
        for plan in ATTACKED[1:] for visit in (1, 2)
    ]  # fmt: skip
    return once + older


def twice() -> list[Case]:
    """Killed in the life that recovers, too: an intended set that is put back, a confirmed one that goes on."""
    back = [f"removal.{step}:kill@{visit}" for step in ("back", "returned", "sync") for visit in (1, 2)]
    on = [f"{step}:kill@1" for step in ("reclaim.judge", "removal.unlink", "removal.unlinked", "reclaim.told")]
    kills = [Case(("removal.aside:kill@1", plan)) for plan in back]
    return kills + [Case(("removal.unlink:kill@2", plan)) for plan in on]


QUICK = (
    at("removal.renamed", 1), at("removal.unlinked", 1), Case(("removal.aside:kill@1", "removal.returned:kill@1")),
    Case(("removal.unlink:kill@1",), ("copies_removed",)), Case(("removal.aside:kill@1",), ("journal_older",)),
)  # fmt: skip


def run_case(case: Case, base: Path, program: Sequence[str] = PROGRAM) -> tuple[bool, list[str]]:
    """Return whether each life died as planned, and what was broken."""
    store = Store(base)
    broken: list[str] = []
    died = True
    try:
        store.prepare()
        acts = (*case.acts, *[""] * len(case.plans))
        for number, plan in enumerate(case.plans):
            died = store.live(plan, program) and died
            if not died:
                store.site.kill()
            broken += [f"{case}: after death {number + 1}: {v.law}: {v.what}" for v in store.judge(idle=False)]
            if acts[number]:
                store.act(acts[number])
        broken += [f"{case}: in the end: {words}" for words in store.last_life(program)]
    except (AssertionError, subprocess.SubprocessError, sqlite3.Error) as error:
        broken.append(f"{case}: {type(error).__name__}: {error}")
    finally:
        store.close()
    return died, broken


# ------------------------------------------------------------------------- mutants

BUGS = {  # code that is run before the daemon -> where it must show
    "it unlinks before `confirmed` is in the journal": (
        "import trigger_daemon.removal as r\n"
        "aside, gone = r.aside, r.gone\n"
        "def unlinks(targets):\n"
        "    did = aside(targets)\n"
        "    if did.ok: gone(targets)\n"
        "    return did\n"
        "r.aside = unlinks\n",
        Case(("reclaim.told:kill@1",)),
        "untold",
    ),
    "a new life knows nothing of sets that were intended": (
        "import trigger_daemon.journal as j\n"
        "known = j._reclaims\n"
        "j._reclaims = lambda read: tuple(one for one in known(read) if one.confirmed)\n",
        Case(("removal.aside:kill@1",)),
        "hidden",
    ),
    "a confirmed set goes on without being judged again": (
        "from trigger_daemon.reclaimer import Reclaimer\nReclaimer._why_not = lambda *_: ''\n",
        Case(("removal.unlink:kill@1",), ("copies_removed",)),
        "lost",
    ),
    "what is put back replaces what is new": (
        "import os, trigger_daemon.removal as r\n"
        "r._rename_new = lambda at, old, new: os.rename(old, new, src_dir_fd=at, dst_dir_fd=at)\n"
        "place = r._Hands.place\n"
        "blind = {r.Place.BOTH: r.Place.ASIDE}\n"
        "r._Hands.place = lambda self, target: blind.get(place(self, target), place(self, target))\n",
        Case(("removal.aside:kill@1",), ("rewritten",)),
        "lost",
    ),
    "it says `done` of what it only means to unlink": (
        "import trigger_daemon.removal as r\n"
        "r.gone = lambda targets: r.Outcome(True, tuple(r.Place.GONE for _ in targets))\n",
        Case(("loop.after_commit:kill@99",)),
        "untrue",
    ),
}
CUT_BUGS = {  # shown by a power cut when all is done
    "it says `done` before the names are durably gone": (
        "import trigger_daemon.removal as r\nr._Hands.sync = lambda self: None\n", "untrue"
    ),
    "a journal that does not wait for the disk": (
        "import trigger_daemon.journal as journal\n"
        "opened = journal._open_for_writing\n"
        "def opens(path):\n"
        "    connection, version = opened(path)\n"
        "    connection.execute('PRAGMA synchronous = OFF')\n"
        "    return connection, version\n"
        "journal._open_for_writing = opens\n", "untold"
    ),
}  # fmt: skip


def be(code: str) -> tuple[str, ...]:
    """Return the arguments of a Python that is a daemon with a bug."""
    return ("-c", f"{code}\nimport sys\nfrom trigger_daemon.cli import main\nmain(sys.argv[1:])\n")


def caught(bug: str, base: Path) -> list[str]:
    """Return what the oracle says of a bug."""
    code, case, _ = BUGS[bug]
    return run_case(case, base, be(code))[1]


# --------------------------------------------------------------------- power cuts


class Cuts:
    """One facility on one disk, or with its sources on another, whose power is cut again and again."""

    def __init__(self, work: Path, kinds: Sequence[str], code: str = "") -> None:
        """Make it and let its first life end; `private_mounts` comes first."""
        self._work, self._code = work, code
        self._disks = []
        for number, kind in enumerate(kinds):
            (work / str(number)).mkdir()
            self._disks.append(Disk(kind, work / str(number)))
        self.store = Store(work, self._disks[0].path, self._disks[-1].path)
        self._nursery = Nursery()
        self.store.prepare()
        self.store.site.config.write_text(json.dumps(self.store.site.settings))
        self.store.explains = False  # kills show what is said
        for disk in self._disks:
            disk.sync()
        self._images = [disk.image() for disk in self._disks]
        self._wrote = self.store.scene.wrote
        self._seen: Counter[tuple[str, str]] = Counter()
        self.calls: list[tuple[str, str]] = []
        self._place: Place | None = None

    def cut(self, place: Place | None) -> tuple[bool, list[str]]:
        """Cut the power before a call (None: when all is done); return whether it came to it, and what was broken."""
        store = self.store
        for disk, image in zip(self._disks, self._images, strict=True):
            disk.restore(image)
        store.scene.wrote = self._wrote
        self._seen.clear()
        self.calls, self._place = [], place
        broken: list[str] = []
        below = [store.site.data, store.site.state]
        start = self._nursery.daemon(store.site.config, store.site.log, self._code)
        tracer = Tracer(start, below, self._ask, cut=self._all_off)
        try:
            is_quiet = store.quiet(tracer.pid)
            fired = tracer.fired.is_set
            store.site.until(lambda: fired() or self._holds(is_quiet), DONE_S, "it is cut, or all is done")
            if not (reached := fired()):
                self._all_off()
        finally:
            tracer.kill()
            tracer.wait(DONE_S)
            for disk in self._disks:
                disk.again()
        broken += [f"after the cut: {violation.law}: {violation.what}" for violation in store.judge(idle=False)]
        try:
            broken += [f"in the end: {words}" for words in store.last_life()]
        finally:
            store.close()
        return reached, broken

    def _ask(self, call: Call) -> Answer:
        what = (call.name, self._kind(call.path))
        self.calls.append(what)
        self._seen[what] += 1
        return Answer.CUT if self._place == (*what, self._seen[what]) else Answer.GO

    def _kind(self, path: str) -> str:
        name = HIDDEN.sub("HIDDEN", kind_of(path, str(self._work)))
        return re.sub(r"\b\d\.(?=tif|xml)", "N.", name)

    def _all_off(self) -> None:
        for disk in self._disks:
            disk.cut()

    @staticmethod
    def _holds(predicate: Callable[[], bool]) -> bool:
        try:
            return predicate()
        except (OSError, sqlite3.Error):
            return False  # the power went while we looked

    def close(self) -> None:
        self._nursery.close()
        for disk in self._disks:
            disk.close()


def cuts_main() -> None:
    """Cut one facility's power until the time is over, a JSON object a line. The main program of a lane's process."""
    disks.die_with_parent()
    disks.private_mounts()
    spec = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**words: Any) -> None:
        out.write(json.dumps(words) + "\n")

    end = time.monotonic() + spec["budget_s"]
    facility = Cuts(Path(spec["work"]), spec["kinds"], spec.get("code", ""))
    try:
        reached, broken = facility.cut(None)
        say(place="the end of the work", reached=True, broken=broken)
        if spec.get("code"):
            return
        places = [place for place in plan(facility.calls, spec["seed"])[0] if telling(place)]
        for number, place in enumerate(places):
            if time.monotonic() > end:
                say(left=len(places) - number, planned=len(places))
                return
            reached, broken = facility.cut(place)
            say(place=str(place), reached=reached, broken=broken)
    finally:
        facility.close()


def telling(place: Place) -> bool:
    """Say whether a call is one of reclaim or of the journal, and changes what is on the disk."""
    if place.name in ("openat", "fchown", "fchmod"):
        return False
    return "data" in place.file.split("/") or place.file.endswith(("journal.db-wal", "journal.db"))


def cut_lane(kinds: Sequence[str], work: Path, budget_s: float, seed: int, code: str = "") -> list[dict[str, Any]]:
    """Run a lane of power cuts; return what it said. Raises AssertionError if it failed itself."""
    work.mkdir()
    spec = {"kinds": kinds, "work": str(work), "budget_s": budget_s, "seed": seed, "code": code}
    main_ = f"import sys; sys.path.append({ROOT!r}); from tests.prove import reclaims; reclaims.cuts_main()"
    argv = [sys.executable, "-P", "-c", main_, json.dumps(spec)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=budget_s + 120, check=False)
    if done.returncode:
        raise AssertionError(f"a lane of power cuts ended with {done.returncode}: {done.stderr[-3_000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---------------------------------------------------------------------------- part


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Kill at each step of reclaim and of the journal's around it, attack, cut the power; then all bugs must show."""
    tally = _Tally(tell)
    with ThreadPoolExecutor(LANES) as lanes:

        def each(cases: Sequence[Case]) -> list[bool]:
            def one(case: Case) -> bool:
                with tempfile.TemporaryDirectory(dir=work) as base:
                    died, broken = run_case(case, Path(base))
                tally.take(case, died, broken)
                return died

            return list(lanes.map(one, cases))

        if quick:
            died = each(QUICK)
            tally.not_done += [f"{case}: was never come to" for case, yes in zip(QUICK, died, strict=True) if not yes]
        else:
            known = points()
            for visit in range(1, VISITS + 1):
                died = each([at(point, visit) for point in known])
                if visit == 1:
                    tally.not_done += [f"{p} was never come to" for p, yes in zip(known, died, strict=True) if not yes]
                known = [point for point, yes in zip(known, died, strict=True) if yes]
            around = list(AROUND)
            for visit in range(1, COMMITS_MAX + 1):
                died = each([at(point, visit) for point in around])
                around = [point for point, yes in zip(around, died, strict=True) if yes]
            each(attacks())
            died = each(twice())
            tally.not_done += [f"{case}: was never come to" for case, yes in zip(twice(), died, strict=True) if not yes]
        for bug in list(BUGS)[: 1 if quick else None]:
            with tempfile.TemporaryDirectory(dir=work) as base:
                words = caught(bug, Path(base))
            tally.bug(bug, BUGS[bug][2], words)
    for kinds in (("ext4",), ("ext4", "ext4"), ("xfs", "ext4")):
        if reason := next(filter(None, map(disks.missing, kinds)), ""):
            tally.not_done.append(f"power cuts: {reason}")
        elif not SUPPORTED:
            tally.not_done.append(UNSUPPORTED)
        elif not quick:
            _cut(tally, kinds, work, seed)
    return tally.result()


def _cut(tally: _Tally, kinds: Sequence[str], work: Path, seed: int) -> None:
    where = f"all on {kinds[0]}" if len(kinds) == 1 else f"journal on {kinds[0]}, sources on {kinds[1]}"
    what = f"power cuts, {where}"
    try:
        for said in cut_lane(kinds, work / "-".join(kinds), CUTS_S, seed):
            if "left" in said:
                tally.not_done.append(f"{what}: no time for {said['left']} of {said['planned']} places")
            else:
                tally.cut(what, said)
        if len(kinds) > 1 and kinds[0] == "ext4":
            for number, (bug, (code, law)) in enumerate(CUT_BUGS.items()):
                said, *_ = cut_lane(kinds, work / f"bug-{number}", CUTS_S, seed, code)
                tally.bug(bug, law, said["broken"])
    except AssertionError as error:
        tally.not_done.append(f"{what}: {error}")


@dataclass
class _Tally:
    tell: Callable[[str], None]
    deaths: int = 0
    attacked: int = 0
    cuts: Counter[str] = field(default_factory=Counter)
    bugs: int = 0
    violations: list[str] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)
    rows: dict[str, Counter[str]] = field(default_factory=dict)

    def take(self, case: Case, died: bool, broken: Sequence[str]) -> None:
        self.deaths += len(case.plans) if died else 0
        self.attacked += any(case.acts)
        self._note(re.sub(r":kill@\d+", "", str(case)), "deaths", died, broken)

    def cut(self, what: str, said: Mapping[str, Any]) -> None:
        self.cuts[what] += bool(said["reached"])
        broken = [f"{what}: {said['place']}: {words}" for words in said["broken"]]
        self._note(re.sub(r" no\. \d+$", "", said["place"]), "power cuts", said["reached"], broken)

    def bug(self, bug: str, law: str, words: Sequence[str]) -> None:
        self.bugs += 1
        if not any(f" {law}: " in each for each in words):
            self.violations.append(f"the law {law!r} did not see that {bug}; seen: {words}")

    def _note(self, what: str, kind: str, done: bool, broken: Sequence[str]) -> None:
        row = self.rows.setdefault(what, Counter())
        row[kind] += bool(done)
        row["violations"] += len(broken)
        self.violations += broken
        for words in broken:
            self.tell(f"VIOLATION {words}")
        if (number := self.deaths + self.cuts.total()) % 20 == 0:
            self.tell(f"reclaim: {number} deaths and power cuts, {len(self.violations)} violations")

    def result(self) -> Result:
        figures = {"deaths": self.deaths, "of these with something done before the next life": self.attacked}
        figures |= {**self.cuts, "bugs shown to the oracle": self.bugs, "violations": len(self.violations)}
        rows = [{"step": step, **{k: str(v) for k, v in row.items()}} for step, row in sorted(self.rows.items())]
        return Result("reclaim", figures, self.violations, self.not_done, rows)


def main() -> Iterator[str]:
    """One case, for a person: `python -m tests.prove.reclaims PLAN [ACT [PLAN ACT]...]`; an ACT of '' is nothing."""
    case = Case(tuple(sys.argv[1::2]), tuple(sys.argv[2::2]))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        died, broken = run_case(case, Path(base))
        words = (Path(base) / "daemon.log").read_text() if os.environ.get("LOG") else ""
    yield json.dumps({"died": died, "violations": broken}, indent=1) + words


if __name__ == "__main__":
    print(*main(), sep="\n")
