"""Faults of the surroundings, made for real while the real daemon works: each must end with every promise kept.

A scenario sets the stage, makes one fault, writes down what the daemon did and
what `status` said meanwhile, takes the fault away, does what the status asked
of the operator, and leaves the judgement to the oracle. Needs root (mounts),
/dev/fuse, mke2fs and a C compiler; a scenario whose means are missing says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.prove.faulty_fuse import FaultyShare, Unable
from tests.prove.oracle import Violation, judge, read_journal
from tests.prove.results import Result
from tests.prove.stage import IDLE_S, Stage, content

PART = "faults"
STOP_S = 10.0  # a service manager's patience
SEEN_S = 20.0  # a fault that is met by then was met at once
HANG_S = 150.0  # a copying worker that makes no progress for two minutes is called hung, and gives its place up
BACK_S = 45.0  # the longest wait of a retry, a sweep or a probe, with a margin for a busy machine
DAY_S = 86_400
HEARD_S = 6.0  # a heartbeat older than this is worth a word; one comes every two seconds
EVENTS_MAX = 16_384  # the kernel's queue for one reader (fs.inotify.max_queued_events)
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
NEW_MOUNTS, RECURSIVE, PRIVATE = 0x20000, 0x4000, 1 << 18  # CLONE_NEWNS, MS_REC, MS_PRIVATE
LOSE_LOG = 2  # as a disk that is torn off: what is not on it is gone
RETRY = {"initial": "500ms", "longest": "1s", "give_up_after": "7d"}
SIGTERMS, SIGTERMS_QUICK = 20, 4
TOLD_MAX = 8  # violations of one scenario: the first ones tell
AT_ONCE = 2  # scenarios: each waits most of its time

MUTANT = """\
import os
_fsync = os.fsync
def fsync(fd):
    try:
        _fsync(fd)
    except OSError:
        pass
os.fsync = fsync
"""

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long long *ahead;
static int (*real_clock)(clockid_t, struct timespec *);
static int (*real_day)(struct timeval *, void *);
__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("PROVE_CLOCK");
    int fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    real_day = dlsym(RTLD_NEXT, "gettimeofday");
    if (fd >= 0) {
        void *seen = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
        if (seen != MAP_FAILED) ahead = seen;
        close(fd);
    }
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = real_clock(id, now);
    if (!code && ahead && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *ahead;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    int code = real_day(now, zone);
    if (!code && ahead) now->tv_sec += *ahead;
    return code;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


# --------------------------------------------------------------------------- scene


class Place(Stage):
    """The stage, where the daemon may see source and destination through a share; the oracle looks behind it."""

    def __init__(self, base: Path, *, watch: Path | None = None, to: Path | None = None, batch: int = 2) -> None:
        self._watch, self._to, self._batch = watch, to, batch
        self.more: list[dict[str, Any]] = []
        super().__init__(base, base / "disk")

    def rules(self) -> list[dict[str, Any]]:
        to = str(self._to or self.site.out)
        keys: dict[str, Any] = {"watch": str(self._watch or self.site.data), "match": ["**/*.tif"], "retry": RETRY}
        copy = self.site.rule(
            "copy", **keys, batch={"files": self._batch, "idle": f"{IDLE_S:g}s"}, start={"copy": {"to": to}}
        )
        work = self.site.rule("work", **keys, start={"command": {"run": self.program}})
        return [copy, work, *self.more]


class Case:
    """One scenario under way: its scene, what was seen, and what has to be undone."""

    def __init__(self, base: Path, *, seed: int, rounds: int, mutant: Path | None = None) -> None:
        self.base = base
        self.seed, self.rounds = seed, rounds
        self.env = {"PYTHONPATH": os.pathsep.join([str(mutant), *sys.path])} if mutant else {}
        self.row = {"fault": "", "daemon": "", "status": "", "recovered": ""}
        self.broken: list[str] = []
        self.judged: dict[str, Any] = {}
        self._undo: list[Callable[[], object]] = []
        self._stage: Place | None = None
        self.at = 0.0

    # ------------------------------------------------------------------ scene

    @property
    def disk(self) -> Path:
        return self.base / "disk"

    @property
    def stage(self) -> Place:
        assert self._stage is not None
        return self._stage

    def set(self, **keys: Any) -> Place:
        """Build the stage; mounts below `disk` come before."""
        self._stage = Place(self.base, **keys)
        self._undo.append(self._stage.close)
        return self._stage

    def start(self, *, work: bool = True, **keys: Any) -> None:
        """Start the daemon; with `work`, let it do a first piece of it, so that everything was used once."""
        self.stage.site.write_rules(*self.stage.rules())
        if work:
            self.stage.before()
        self.stage.site.start(env={**self.env, **keys.pop("env", {})}, **keys)
        if work:
            self.stage.until_idle(BACK_S)

    def tmpfs(self, point: Path, options: str) -> None:
        point.mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "-o", options, "td-faults", point)
        self._undo.append(lambda: subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False))

    def share(self, directory: Path, point: Path) -> FaultyShare:
        made = FaultyShare(directory, point)
        self._undo.append(made.close)
        return made

    def ext4(self, point: Path) -> Loop:
        made = Loop(self.base / f"{point.name}.img", point)
        self._undo.append(made.close)
        return made

    def close(self) -> None:
        """Undo everything, the last made first: the daemon ends before its disks go."""
        for step in reversed(self._undo):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                step()

    # --------------------------------------------------------------- what is seen

    def expect(self, kept: object, promise: str) -> None:
        """Note a promise that is not kept."""
        if not kept:
            self.broken.append(promise)

    def logged(self, event: str) -> int:
        return self.stage.site.log.read_text(errors="replace").count(f'"{event}"') - self._before[event]

    @property
    def alive(self) -> bool:
        process = self.stage.site.process
        return process is not None and process.poll() is None

    def begin(self) -> None:
        """The fault is about to be made: what is told from now on is told of it."""
        self.at = time.monotonic()
        self._before = Counter(event for event, _ in self._log())

    def until(self, predicate: Callable[[], bool], what: str, timeout_s: float = SEEN_S) -> bool:
        """Wait for what must come; if it does not, that is a broken promise, and the scenario goes on."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if predicate():
                return True
            time.sleep(0.05)  # another process is awaited
        self.broken.append(f"in {timeout_s:g} s not seen: {what}; runs {dict(self.states())}; {self.look()}")
        return False

    def alarm(self, *words: str, health: str = "alarm") -> None:
        """Wait until status names the fault: an alarm with all these words and a hint."""

        def told() -> bool:
            beat = self.stage.site.heartbeat() or {}
            return any(all(w in a["what"] for w in words) and a["hint"] for a in beat.get("alarms", ()))

        if self.until(told, f"an alarm that says {' and '.join(words) or 'anything'}, with a hint"):
            self.observe()
            self.expect(f"health {health}" in self.row["status"], f"status tells health {health} with an alarm")

    def states(self) -> Counter[str]:
        """Return how many runs are in each state; none where the journal cannot be read."""
        with contextlib.suppress(sqlite3.Error):
            return self.stage.site.states()
        return Counter()

    def observe(self) -> None:
        """Write down what the daemon does and what the operator reads, now, in the middle of the fault."""
        site = self.stage.site
        runs = ", ".join(f"{state} {n}" for state, n in sorted(self.states().items()))
        events = Counter(event for event, level in self._log() if level in ("warning", "error", "critical"))
        events.subtract(self._before)
        told = ", ".join(f"{event} x{n}" if n > 1 else event for event, n in sorted(events.items()) if n > 0)
        state = "lives" if self.alive else f"ended with {site.process.poll() if site.process else None}"
        self.row["daemon"] = f"{state}; runs: {runs or 'none'}; log: {told or 'nothing'}"
        self.row["status"] = self.look()

    def look(self) -> str:
        """Return what the operator reads now."""
        site = self.stage.site
        done = site.cli("status", "-F", "json", check=False)
        try:
            status = json.loads(done.stdout)
            status["daemon"]["health"], status["alarms"]
        except (ValueError, KeyError):
            return f"exit {done.returncode}: {(done.stderr or done.stdout).strip()[:300]}"
        alarms = [f"{a['what']} [{a['hint']}]" for a in status["alarms"]]
        waiting = Counter(
            f"{w['state']}: {w['error'] or w['waiting_for']} [{w['hint']}]"
            for w in status.get("waiting", ())
            if w["state"] == "HELD" or w["error"]
        )
        health = status["daemon"]["health"] if status["daemon"]["running"] else "not running"
        words = f"health {health}; alarms: {'; '.join(alarms) or 'none'}"
        if status["daemon"].get("heartbeat_age_s", 0) > HEARD_S:
            words += f"; last heard of {status['daemon']['heartbeat_age_s']:.0f} s ago"
        return "; ".join([words, *(f"{n} {what}" for what, n in waiting.items())])

    def _log(self) -> Iterator[tuple[str, str]]:
        log = self.stage.site.log
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            try:
                said = json.loads(line.partition(">")[2] if line.startswith("<") else line)
                yield said["event"], said["level"]
            except (ValueError, KeyError, TypeError):
                continue

    # ------------------------------------------------------------------- the end

    def recover(self, how: str = "by itself", timeout_s: float = BACK_S) -> None:
        """The fault is over: all work must end now; say how long that took."""
        begun = time.monotonic()
        try:
            self.stage.until_idle(timeout_s)
        except (AssertionError, sqlite3.Error) as error:
            self.broken.append(f"did not recover ({how}): {str(error)[:1_500]}")
            return
        held = self.stage.site.states()["HELD"]
        self.expect(not held, f"{held} runs are HELD after the fault")
        self.row["recovered"] = f"{how}, {time.monotonic() - begun:.1f} s after"

    def stop(self) -> None:
        """End the daemon as a service manager does."""
        begun = time.monotonic()
        try:
            code = self.stage.site.stop()
        except subprocess.TimeoutExpired:
            self.broken.append("SIGTERM did not end it within 20 s")
            return
        took = time.monotonic() - begun
        self.expect(took < STOP_S, f"its end took {took:.1f} s")
        self.expect(code == 0, f"it ended with {code}: {self.stage.site.tail()[-800:]}")

    def retry_held(self) -> int:
        """Do what a HELD run asks the operator for; return how many there were."""
        held = [str(run) for (run,) in self.stage.site.ask("SELECT id FROM run WHERE state = 'HELD'")]
        for run in held:
            self.stage.site.cli("runs", "retry", run)
        return len(held)

    def verdict(self) -> list[Violation]:
        return judge(self.stage.scene(**self.judged), idle=True)


class Loop:
    """A small ext4 on an image: a disk that can be torn off, break, and be mounted again."""

    def __init__(self, image: Path, point: Path) -> None:
        """Make and mount it. Raises Unable."""
        self.image, self.point = image, point
        point.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(48 << 20)
        done = command("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0", str(image))
        if done.returncode:
            raise Unable(f"mke2fs (package e2fsprogs): {done.stderr.strip()}")
        done = command("losetup", "--show", "-f", str(image))
        if done.returncode:
            raise Unable(f"losetup: {done.stderr.strip()}")
        self.device = done.stdout.strip()
        try:
            self.mount()
        except Unable:
            self.close()
            raise

    def mount(self) -> None:
        mount("-t", "ext4", "-o", "errors=remount-ro", self.device, self.point)
        (self.point / "lost+found").rmdir() if (self.point / "lost+found").exists() else None

    def tear_off(self) -> None:
        """Every call fails with EIO from now on."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", LOSE_LOG))
        finally:
            os.close(fd)

    def break_read_only(self) -> None:
        """Let the file system find an error in itself: it turns read-only. Raises Unable."""
        switch = Path(f"/sys/fs/ext4/{Path(self.device).name}/trigger_fs_error")
        try:
            switch.write_text("proved\n")
        except OSError as error:
            raise Unable(f"{switch}: {error.strerror}") from error

    def mount_again(self, timeout_s: float = 15.0) -> bool:
        """Take it away and mount it anew, as an operator does; False while somebody holds the broken one."""
        command("umount", "-l", str(self.point))
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            command("e2fsck", "-p", self.device)  # refuses while it is in use
            if command("mount", "-t", "ext4", self.device, str(self.point)).returncode == 0:
                try:
                    (self.point / ".try").touch()
                    (self.point / ".try").unlink()
                    return True
                except OSError:
                    command("umount", "-l", str(self.point))
            time.sleep(0.2)
        return False

    def close(self) -> None:
        command("umount", "-l", str(self.point))
        command("losetup", "-d", self.device)
        self.image.unlink(missing_ok=True)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(argv, 127, "", str(error))


def mount(*arguments: str | Path) -> None:
    """Mount. Raises Unable."""
    done = command("mount", *map(str, arguments))
    if done.returncode:
        raise Unable(f"cannot mount: {done.stderr.strip()} (needs root)")


def fill(directory: Path) -> Path:
    """Leave not a byte on a file system; may be called again."""
    path = directory / ".filler"
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4_096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    return path


def until_journal_full(case: Case, directory: Path) -> None:
    """Take every byte, also the ballast's, and give the daemon something to commit until it says that it cannot."""
    number = itertools.count()

    def refused() -> bool:
        fill(directory)
        case.stage.writer.whole(f"c/full{next(number)}.tif", content("full", 400))
        return case.logged("journal.full") > 0

    case.until(refused, "journal.full in the log")


def fill_names(directory: Path) -> Path:
    """Leave no inode on a file system; may be called again."""
    path = directory / ".filler"
    with contextlib.suppress(OSError):
        path.mkdir(exist_ok=True)
        for n in range(len(os.listdir(path)), 100_000):
            (path / str(n)).touch()
    return path


# ----------------------------------------------------------------------- scenarios


@dataclass
class Scenario:
    fault: str
    act: Callable[[Case], None]
    quick: bool = False


SCENARIOS: dict[str, Scenario] = {}


def scenario(fault: str, *, quick: bool = False) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def add(act: Callable[[Case], None]) -> Callable[[Case], None]:
        SCENARIOS[act.__name__] = Scenario(fault, act, quick)
        return act

    return add


# ---------------------------------------------------------------------- full disks


@scenario("no byte left on the journal's disk")
def journal_full(case: Case) -> None:
    case.tmpfs(case.disk / "state", "size=24m")
    stage = case.set()
    case.start()
    case.begin()
    filler = fill(stage.site.state)
    started = len(stage.site.ask("SELECT 1 FROM attempt"))
    stage.meanwhile()

    until_journal_full(case, stage.site.state)
    case.until(lambda: "health ok" not in case.look(), "status tells that something is wrong", 30)
    told_s = time.monotonic() - case.at
    case.observe()
    case.row["status"] += f" (told after {told_s:.0f} s)"
    case.expect(case.alive, "the daemon lives on")
    case.expect(len(stage.site.ask("SELECT 1 FROM attempt")) >= started, "no attempt is forgotten")
    filler.unlink()
    case.recover()


@scenario("no byte left at the destination")
def destination_full(case: Case) -> None:
    case.tmpfs(case.disk / "out", "size=2m")
    stage = case.set()
    case.start()
    case.begin()
    filler = fill(stage.site.out)
    stage.meanwhile()
    stage.writer.whole("c/6.tif", content("6", 400_000))
    case.alarm("destination")
    filler.unlink()
    case.recover()


@scenario("no byte left, journal and destination on one disk", quick=True)
def both_full(case: Case) -> None:
    case.tmpfs(case.disk, "size=26m")
    stage = case.set()
    case.start()
    case.begin()
    stage.meanwhile()
    filler = fill(case.disk)
    stage.writer.whole("c/6.tif", content("6", 400_000))
    until_journal_full(case, case.disk)
    time.sleep(2)
    stage.writer.whole("c/7.tif", content("7", 4_000))
    case.observe()
    case.expect(case.alive, "the daemon lives on")
    filler.unlink()
    case.recover()


@scenario("no inode left at the destination")
def destination_no_inodes(case: Case) -> None:
    case.tmpfs(case.disk / "out", "size=8m,nr_inodes=100")
    stage = case.set()
    case.start()
    case.begin()
    filler = fill_names(stage.site.out)
    stage.meanwhile()
    stage.writer.whole("c/6.tif", content("6", 4_000))
    case.alarm("destination")
    shutil.rmtree(filler)
    case.recover()


@scenario("no inode left on the journal's disk")
def journal_no_inodes(case: Case) -> None:
    case.tmpfs(case.disk / "state", "size=32m,nr_inodes=300")
    stage = case.set()
    case.start()
    case.begin()
    filler = fill_names(stage.site.state)
    stage.meanwhile()
    time.sleep(4)
    fill_names(stage.site.state)
    stage.writer.whole("c/6.tif", content("6", 4_000))
    time.sleep(3)
    case.observe()
    case.expect(case.alive, "the daemon lives on")
    shutil.rmtree(filler)
    case.recover()


# ------------------------------------------------------------------------ I/O errors


def _share_errs(case: Case, side: str, rule: dict[str, Any], *, lasts: bool) -> FaultyShare:
    """Let one kind of call fail on a share, once or for some seconds, while files are written."""
    if side == "source":
        share = case.share(case.base / "data", case.base / "instrument")
        stage = case.set(watch=share.point)
    else:
        share = case.share(case.disk / "out", case.base / "archive")
        stage = case.set(to=share.point)
    case.start()
    case.begin()
    share.rules(rule if lasts else {**rule, "times": 1})
    stage.meanwhile()
    case.until(lambda: share.hits() > 0, "the fault met a call of the daemon")
    if lasts:
        stage.writer.whole("c/6.tif", content("6", 150_000))
        time.sleep(3)
    case.observe()
    case.expect(case.alive, "the daemon lives on")
    if lasts:
        case.expect("Input/output error" in case.row["status"], "status names the fault")
    share.rules()
    case.recover()
    return share


@scenario("EIO on one read of a source")
def source_read_once(case: Case) -> None:
    _share_errs(case, "source", {"op": "read", "name": "*.tif", "act": "EIO"}, lasts=False)


@scenario("EIO on every read of a source for some seconds")
def source_read_while(case: Case) -> None:
    _share_errs(case, "source", {"op": "read", "name": "*.tif", "act": "EIO"}, lasts=True)


@scenario("EIO on every listing of the source for some seconds", quick=True)
def source_listing_while(case: Case) -> None:
    _share_errs(case, "source", {"op": "opendir", "name": "*", "act": "EIO"}, lasts=True)


@scenario("EIO on one write to the destination")
def destination_write_once(case: Case) -> None:
    _share_errs(case, "destination", {"op": "write", "act": "EIO"}, lasts=False)


@scenario("EIO on every write to the destination for some seconds")
def destination_write_while(case: Case) -> None:
    _share_errs(case, "destination", {"op": "write", "act": "EIO"}, lasts=True)


@scenario("EIO on one rename at the destination")
def destination_rename_once(case: Case) -> None:
    _share_errs(case, "destination", {"op": "rename*", "act": "EIO"}, lasts=False)


@scenario("EIO on one fsync of a directory at the destination")
def destination_fsyncdir_once(case: Case) -> None:
    _share_errs(case, "destination", {"op": "fsyncdir", "act": "EIO"}, lasts=False)


@scenario("EIO on one fsync at the destination, whose server then loses what is not durable")
def destination_fsync_once(case: Case) -> None:
    share = _share_errs(case, "destination", {"op": "fsync", "act": "EIO"}, lasts=False)
    case.row["recovered"] += f"; the server lost {len(share.reboot())} files"


@scenario("EIO on every fsync at the destination, whose server then loses what is not durable", quick=True)
def destination_fsync_while(case: Case) -> None:
    share = _share_errs(case, "destination", {"op": "fsync", "act": "EIO"}, lasts=True)
    case.row["recovered"] += f"; the server lost {len(share.reboot())} files"


def _journal_errs(case: Case, point: str) -> None:
    stage = case.set()
    stage.site.start(env={**case.env, "TRIGGER_FAIL": point})
    case.begin()
    stage.before()
    stage.meanwhile()
    case.until(lambda: case.logged("journal.broken") > 0, "journal.broken in the log")
    case.observe()
    case.expect(case.alive, "the daemon lives on")
    case.recover()


@scenario("EIO on one commit of the journal, before it was made")
def journal_commit_fails(case: Case) -> None:
    _journal_errs(case, "journal.commit:eio@6")


@scenario("EIO on one commit of the journal, which was made all the same")
def journal_commit_doubtful(case: Case) -> None:
    _journal_errs(case, "journal.committed:eio@6")


# --------------------------------------------------------------- disks that go, read-only


def _journal_disk(case: Case, break_it: Callable[[Loop], object]) -> None:
    disk = case.ext4(case.disk / "state")
    stage = case.set()
    case.start()
    command("sync", "-f", str(stage.site.state))
    case.begin()
    break_it(disk)
    stage.meanwhile()
    stage.writer.whole("c/6.tif", content("6", 4_000))
    time.sleep(5)
    case.observe()
    case.expect(case.alive, "the daemon lives on")
    case.expect("is damaged" not in stage.site.tail(), "a disk that fails is not called a damaged journal")
    case.expect("health ok" not in case.row["status"], "status tells that something is wrong")
    how = "its disk was checked and mounted again"
    if not disk.mount_again():
        how = "stopped, its disk checked and mounted again, started"
        case.stop()
        if not disk.mount_again():
            raise Unable(f"{disk.device} is held by somebody else")
    if not case.alive:
        how += ", the daemon started again"
        stage.site.start(env=case.env)
    case.recover(how)


@scenario("the journal's disk is torn off (EIO on everything)")
def journal_disk_gone(case: Case) -> None:
    _journal_disk(case, Loop.tear_off)


@scenario("the journal's disk finds an error and turns read-only")
def journal_disk_read_only(case: Case) -> None:
    _journal_disk(case, Loop.break_read_only)


@scenario("the journal's disk is unmounted lazily, leaves an empty directory, and is mounted again", quick=True)
def journal_disk_unmounted(case: Case) -> None:
    disk = case.ext4(case.disk / "state")
    stage = case.set()
    case.start()
    case.begin()
    command("umount", "-l", str(disk.point))
    stage.meanwhile()
    time.sleep(6)
    case.observe()
    case.expect(not (disk.point / "journal.db").exists(), "no new journal is begun in the empty mount point")
    case.expect("health ok" not in case.row["status"], "status tells that something is wrong")
    case.expect(disk.mount_again(), "the daemon lets go of what is no longer there")
    if not case.alive:
        stage.site.start(env=case.env)
    case.recover("mounted again")


@scenario("the destination's disk is torn off (EIO on everything)", quick=True)
def destination_disk_gone(case: Case) -> None:
    disk = case.ext4(case.disk / "out")
    stage = case.set()
    case.start()
    command("sync", "-f", str(stage.site.out))
    case.begin()
    disk.tear_off()
    stage.meanwhile()
    stage.writer.whole("c/6.tif", content("6", 4_000))
    case.alarm("destination")
    case.expect(disk.mount_again(), "the daemon holds nothing on the broken disk")
    case.recover("its disk was checked and mounted again")


@scenario("the destination is mounted read-only, and writable again")
def destination_read_only(case: Case) -> None:
    case.tmpfs(case.disk / "out", "size=16m")
    stage = case.set()
    case.start()
    case.begin()
    mount("-o", "remount,ro", stage.site.out)
    stage.meanwhile()
    case.until(
        lambda: stage.site.states()["HELD"] > 0 or bool((stage.site.heartbeat() or {}).get("alarms")), "a word of it"
    )
    time.sleep(2)
    case.observe()
    case.expect("HELD" in case.row["status"] or "alarms: none" not in case.row["status"], "status names the fault")
    mount("-o", "remount,rw", stage.site.out)
    held = case.retry_held()
    case.recover(f"`runs retry` of {held} runs, as their hints say" if held else "by itself")


# ---------------------------------------------------------------------- hung and lost shares


def _beside(case: Case) -> tuple[Path, Path]:
    """Let another rule copy from one local directory to another."""
    near, there = case.base / "near", case.base / "near-out"
    near.mkdir()
    there.mkdir()
    site = case.stage.site
    case.stage.more.append(
        site.rule("near", watch=str(near), match=["**"], retry=RETRY, start={"copy": {"to": str(there)}})
    )
    return near, there


def _goes_on(case: Case, near: Path, there: Path, name: str, timeout_s: float = SEEN_S) -> None:
    """Demand that the other rule's file arrives while the share hangs."""
    (near / name).write_bytes(content(name, 20_000))
    begun = time.monotonic()
    if case.until((there / name).exists, f"{name}, of another rule, is copied meanwhile", timeout_s):
        case.row["daemon"] += f"; another rule's file took {time.monotonic() - begun:.1f} s"


@scenario("the source's share answers nothing more")
def source_hangs(case: Case) -> None:
    share = case.share(case.base / "data", case.base / "instrument")
    stage = case.set(watch=share.point)
    near, there = _beside(case)
    case.start()
    case.begin()
    share.hang()
    stage.meanwhile()
    _goes_on(case, near, there, "meanwhile.tif")
    time.sleep(1)
    went_on, case.row["daemon"] = case.row["daemon"], ""
    case.observe()
    case.row["daemon"] += went_on
    case.row["status"] += " (at first: a server that reboots is given half a minute, see tests/test_faults.py)"
    case.stop()
    stage.site.start(wait=False, env=case.env)
    _goes_on(case, near, there, "after a restart.tif")
    share.release()
    case.recover("stopped and started meanwhile; by itself")


@scenario("the destination's share answers nothing more, in the middle of a copy", quick=True)
def destination_hangs(case: Case) -> None:
    share = case.share(case.disk / "out", case.base / "archive")
    stage = case.set(to=share.point)
    near, there = _beside(case)
    case.start()
    case.begin()
    share.rules({"op": "write", "act": "hang"}, {"op": "fsync", "act": "hang"})
    stage.meanwhile()
    case.until(lambda: share.hits() > 0, "a copy hangs")
    share.hang()
    _goes_on(case, near, there, "meanwhile.tif", HANG_S)
    went_on, case.row["daemon"] = case.row["daemon"], ""
    case.observe()
    case.row["daemon"] += went_on
    case.stop()
    stage.site.start(env=case.env)
    _goes_on(case, near, there, "after a restart.tif")
    share.release()
    case.recover("stopped and started meanwhile; by itself")


@scenario("the destination's share answers nothing more, and there is work for it in every slot")
def destination_hangs_for_all(case: Case) -> None:
    share = case.share(case.disk / "out", case.base / "archive")
    stage = case.set(to=share.point)
    near, there = _beside(case)
    case.start()
    case.begin()
    share.hang()
    for n in range(12):
        stage.writer.whole(f"h/{n}.tif", content(f"h{n}", 5_000))
    case.until(lambda: case.states()["ACTIVE"] >= 4, "four copies hang")
    _goes_on(case, near, there, "meanwhile.tif", HANG_S)
    went_on, case.row["daemon"] = case.row["daemon"], ""
    case.observe()
    case.row["daemon"] += went_on
    case.stop()
    stage.site.start(wait=False, env=case.env)
    share.release()
    case.recover("stopped and started meanwhile; by itself")


@scenario("the source's share dies, leaves an empty directory, and comes back")
def source_dies(case: Case) -> None:
    share = case.share(case.base / "data", case.base / "instrument")
    stage = case.set(watch=share.point)
    case.start()
    batches = len(read_journal(stage.site.state / "journal.db"))
    case.begin()
    share.die()
    stage.meanwhile()
    case.alarm(str(share.point))
    share.unmount()
    time.sleep(3)
    case.observe()
    case.expect("alarms: none" not in case.row["status"], "an empty mount point is told")
    case.expect(len(read_journal(stage.site.state / "journal.db")) == batches, "nothing is batched meanwhile")
    share.mount()
    case.recover()


@scenario("the destination's share dies, leaves an empty directory, over a restart too, and comes back")
def destination_dies(case: Case) -> None:
    share = case.share(case.disk / "out", case.base / "archive")
    stage = case.set(to=share.point)
    case.start()
    case.begin()
    share.die()
    stage.meanwhile()
    case.alarm("destination")
    share.unmount()
    stage.writer.whole("c/6.tif", content("6", 4_000))
    time.sleep(2)
    case.stop()
    stage.site.start(env=case.env)
    time.sleep(2)
    case.alarm("not mounted")
    astray = sorted(str(path) for path in share.point.rglob("*"))
    case.expect(not astray, f"nothing is copied into the empty mount point: {astray[:5]}")
    share.mount()
    case.recover()


@scenario("the destination is unmounted lazily in the middle of a batch, and mounted again")
def destination_unmounted_in_a_batch(case: Case) -> None:
    share = case.share(case.disk / "out", case.base / "archive")
    stage = case.set(to=share.point, batch=8)
    stage.site.settings["throttle"] = {"bandwidth": "500KB/s"}
    case.start()
    case.begin()
    for n in range(8):
        stage.writer.whole(f"n/{n}.tif", content(f"n{n}", 150_000))
    case.until(lambda: bool(list(case.disk.glob("out/n/.*"))), "the copy is under way")
    ctypes.CDLL(None).umount2(os.fsencode(share.point), 2)
    time.sleep(5)
    case.observe()
    astray = sorted(str(path) for path in share.point.rglob("*") if path.is_file())
    case.expect(not astray, f"{len(astray)} of 8 files were copied into the empty mount point")
    share.unmount()
    share.mount()
    case.recover()


# ------------------------------------------------------------------------------ clock


@scenario("the wall clock is set a day ahead and two back, again and again", quick=True)
def clock_steps(case: Case) -> None:
    source, library, ahead = case.base / "clock.c", case.base / "clock.so", case.base / "clock"
    source.write_text(CLOCK)
    done = command("cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl")
    if done.returncode:
        raise Unable(f"no C compiler (package gcc): {done.stderr.strip()[:200]}")
    ahead.write_bytes(struct.pack("q", 0))
    env = {"LD_PRELOAD": str(library), "PROVE_CLOCK": str(ahead)}
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **env, "PROVE_CLOCK": str(ahead)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert abs(float(told.stdout) - time.time()) < 60
    case.judged = {"check_times": False}
    stage = case.set()

    def step(seconds: int) -> None:
        with ahead.open("r+b") as file:
            file.write(struct.pack("q", seconds))

    stage.site.start(wait=False, env={**case.env, **env})
    case.until(lambda: stage.site.heartbeat() is not None, "the daemon is ready")
    stage.before()
    stage.until_idle()
    case.begin()
    for round_, days in enumerate((1, -1, 1, -2, 0)):
        path = f"clock/{round_}.tif"
        half = content(path, 3_000)
        step(days * DAY_S)
        stage.writer.parts(path, half, half, pause_s=0.2)
        step(-days * DAY_S)
        stage.writer.whole(f"clock/{round_}-more.tif", content(f"{path} more", 2_000))
        step(days * DAY_S)
        time.sleep(0.8)
    stepped = stage.site.ask("SELECT max(closed_time) - min(closed_time) FROM batch")[0][0]
    case.expect(stepped > DAY_S / 2, "the daemon saw the clock step")
    # The last heartbeat may still carry a time of two days ago; the next one does not.
    case.until(lambda: "health ok" in case.look(), "a stepped clock is no alarm by itself")
    case.observe()
    case.recover()


# ---------------------------------------------------------------------------- inotify


@scenario("the limit of inotify watches is reached (in a user namespace)")
def watch_limit(case: Case) -> None:
    stage = case.set()
    box = "echo 2 >/proc/sys/user/max_inotify_watches && exec \"$@\""
    if command("unshare", "-Ur", "true").returncode:
        raise Unable("user namespaces are refused here")
    stage.before()
    for n in range(6):
        stage.writer.whole(f"deep{n}/d/8.tif", content(f"deep{n}", 500))
    stage.site.start(env=case.env, prefix=("unshare", "-Ur", "sh", "-c", box, "sh"), wait=False)
    case.until(lambda: stage.site.heartbeat() is not None, "the daemon is ready")
    case.begin()
    stage.meanwhile()
    stage.writer.whole("deep3/d/9.tif", content("9", 500))
    case.alarm("max_inotify_watches")
    case.recover("nothing lost meanwhile: swept instead")


@scenario("the queue of inotify overflows")
def queue_overflow(case: Case) -> None:
    stage = case.set()
    stage.site.settings["sweep"] = {"every": "60s", "full": "10m"}  # so that no sweep of its own finds them first
    case.start()
    assert stage.site.process is not None
    case.begin()
    stage.site.process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{stage.site.process.pid}/stat")
    case.until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the daemon stands still")
    one, other = stage.site.data / "b/noise1.log", stage.site.data / "b/noise2.log"
    for name in ("b/noise1.log", "b/noise2.log"):
        stage.writer.whole(name, b"")
    for _ in range(EVENTS_MAX):  # in turn: the same event twice is one
        for path in (one, other):
            os.close(os.open(path, os.O_WRONLY))
    for name in ("b/noise1.log", "b/noise2.log"):
        stage.writer.remove(name)
    stage.meanwhile()  # nobody hears of these
    stage.site.process.send_signal(signal.SIGCONT)
    case.until(lambda: ((stage.site.heartbeat() or {}).get("daemon", {}).get("hints") or {}).get("overflows", 0) > 0,
               "the overflow is counted")  # fmt: skip
    case.observe()
    case.recover("swept at once", timeout_s=20)


# ------------------------------------------------------------------------- the process


@scenario("no file descriptor left, and some again")
def no_descriptors(case: Case) -> None:
    stage = case.set()
    case.start()
    assert stage.site.process is not None
    pid = stage.site.process.pid
    case.begin()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir(f"/proc/{pid}/fd")))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(3, used // 2), before[1]))
    stage.meanwhile()
    stage.writer.whole("deep/er/6.tif", content("6", 4_000))
    time.sleep(6)
    case.observe()
    alive = case.alive
    case.expect(alive, f"the daemon lives on: {stage.site.tail()[-600:]}")
    if alive:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    else:
        stage.site.start(env=case.env)
    case.recover("by itself" if alive else "started again")


@scenario("no memory left (RLIMIT_AS), and some again")
def no_memory(case: Case) -> None:
    stage = case.set()
    case.start()
    assert stage.site.process is not None
    pid = stage.site.process.pid
    case.begin()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size // 2, before[1]))
    stage.meanwhile()
    for n in range(40):
        stage.writer.whole(f"deep/er/{n}.tif", content(f"m{n}", 4_000))
    time.sleep(5)
    case.observe()
    alive = case.alive
    if alive:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    else:  # a service manager does that
        stage.site.start(env=case.env)
    died = "can't start new thread" in stage.site.log.read_text(errors="replace")
    case.recover("by itself" if alive else "ended, and was started again", timeout_s=25)
    if died and case.broken:
        case.broken.append("a thread of the daemon ended, which nobody noticed")


@scenario("SIGTERM in the middle of everything, again and again", quick=True)
def sigterms(case: Case) -> None:
    stage = case.set()
    rand = random.Random(case.seed)
    stage.site.settings["throttle"] = {"bandwidth": "2MB/s"}
    stage.site.write_rules(*stage.rules())
    slowest = 0.0
    for n in range(case.rounds):
        stage.writer.whole(f"r{n}/{n}.tif", content(f"{n}", rand.choice((500, 90_000, 900_000))))
        stage.writer.whole("again.tif", content(f"again {n}", 1_000 + n))
        case.begin()
        stage.site.start(env=case.env, wait=False)
        case.until(lambda: case.logged("daemon.started") > 0, "the daemon starts")
        time.sleep(rand.uniform(0.0, 1.2))
        begun = time.monotonic()
        case.stop()
        slowest = max(slowest, time.monotonic() - begun)
        if case.broken:
            return
    case.observe()
    stage.site.settings["throttle"] = {}
    stage.site.start(env=case.env)
    case.row["daemon"] = f"{case.rounds} ends, each with 0, the slowest in {slowest:.1f} s; {case.row['daemon']}"
    case.recover("after the last start")


@scenario("a second daemon on the same journal, while the first works")
def second_daemon(case: Case) -> None:
    stage = case.set()
    case.start()
    case.begin()
    stage.meanwhile()
    refused = 0
    for _ in range(2):
        second = command(sys.executable, "-P", "-m", "trigger_daemon", "serve", "--config", str(stage.site.config))
        assert stage.site.process is not None
        if second.returncode == 1 and str(stage.site.process.pid) in second.stderr:
            refused += 1
        stage.writer.whole(f"s/{refused}.tif", content(f"s{refused}", 3_000))
    case.observe()
    case.expect(refused == 2, f"a second daemon is refused by the name of the first ({refused} of 2)")
    case.row["daemon"] = f"refused the second one, {refused} of 2; {case.row['daemon']}"
    case.recover()


@scenario("copying workers are killed in the middle of their work (memory was short)")
def workers_killed(case: Case) -> None:
    stage = case.set()
    stage.site.settings["throttle"] = {"bandwidth": "2MB/s"}
    case.start()
    case.begin()
    stage.meanwhile()
    killed = 0
    for n in range(4):
        stage.writer.whole(f"k/{n}.tif", content(f"k{n}", 900_000))
        case.until(lambda: bool(list((stage.site.out / "k").glob(".*"))), "a copy is under way")
        for lane in _children(case):
            with contextlib.suppress(ProcessLookupError):
                os.kill(lane, signal.SIGKILL)
                killed += 1
    case.observe()
    case.row["daemon"] = f"{killed} workers killed; {case.row['daemon']}"
    case.recover()


def _children(case: Case) -> list[int]:
    """Return the daemon's copying workers."""
    assert case.stage.site.process is not None
    pid = case.stage.site.process.pid
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"_lane" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


# ---------------------------------------------------------------------------- running


@dataclass
class Outcome:
    row: dict[str, str]
    broken: list[str] = field(default_factory=list)
    not_done: str = ""
    seconds: float = 0.0


def play(name: str, base: Path, *, seed: int = 1, rounds: int = SIGTERMS, mutant: Path | None = None) -> Outcome:
    """Play one scenario below `base`, and clean up behind it, whatever happens.

    It has a thread with a mount namespace of its own: nobody else sees its
    mounts, holds them, or is disturbed by them, and none outlives it.
    """
    with ThreadPoolExecutor(1, initializer=_have_own_mounts) as alone:
        return alone.submit(_play, name, base, seed, rounds, mutant).result()


def _have_own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) == 0:  # without the privilege the first mount says so
        libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None)


def _play(name: str, base: Path, seed: int, rounds: int, mutant: Path | None) -> Outcome:
    one = SCENARIOS[name]
    begun = time.monotonic()
    base.mkdir(parents=True)
    case = Case(base, seed=seed, rounds=rounds, mutant=mutant)
    case.row["fault"] = one.fault
    outcome = Outcome(case.row)
    try:
        one.act(case)
        if not case.broken:
            case.stop()
        violations = case.verdict()
        outcome.broken = case.broken + _short([f"{v.law}: {v.what}" for v in violations])
        case.row["oracle"] = f"{len(violations)} violations"
    except Unable as error:
        outcome.not_done = str(error)
    except (AssertionError, OSError, sqlite3.Error) as error:  # the stage could not be set
        outcome.broken = [*case.broken, f"the scenario failed: {str(error)[:2_000]}"]
    finally:
        case.close()
        shutil.rmtree(base, ignore_errors=True)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _short(broken: list[str]) -> list[str]:
    return [*broken[:TOLD_MAX], f"and {len(broken) - TOLD_MAX} more"] if len(broken) > TOLD_MAX else broken


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Play every scenario, or the quick ones, two at once, and the mutant that one of them must catch."""
    names = [name for name, one in SCENARIOS.items() if one.quick or not quick]
    rounds = SIGTERMS_QUICK if quick else SIGTERMS
    rows, broken, not_done = [], [], []
    slowest = 0.0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = pool.map(lambda name: play(name, work / name, seed=seed, rounds=rounds), names)
        for name, outcome in zip(names, outcomes, strict=True):
            slowest = max(slowest, outcome.seconds)
            if outcome.not_done:
                not_done.append(f"{SCENARIOS[name].fault}: {outcome.not_done}")
            else:
                rows.append(outcome.row)
            broken += [f"faults {name} (seed {seed}): {words}" for words in outcome.broken]
            tell(f"{name}: {outcome.not_done or ('BROKEN' if outcome.broken else 'kept')}, {outcome.seconds:.1f} s")
    caught = None
    try:
        caught = mutant_caught(work, seed=seed)
        if not caught:
            broken.append("faults: a daemon that ignores errors of fsync passes destination_fsync_while")
    except Unable as error:
        not_done.append(f"the mutant: {error}")
    figures: dict[str, int | float | str] = {
        "scenarios": len(rows), "violations": len(broken), "slowest_s": round(slowest, 1),
        "mutants_caught": "none tried" if caught is None else f"{int(caught)} of 1",
    }  # fmt: skip
    return Result(PART, figures, broken, not_done, rows)


def mutant_caught(work: Path, *, seed: int = 1) -> bool:
    """Say whether a daemon that ignores errors of fsync is found out. Raises Unable."""
    place = work / "mutant"
    place.mkdir()
    (place / "sitecustomize.py").write_text(MUTANT)
    try:
        outcome = play("destination_fsync_while", work / "with-mutant", seed=seed, mutant=place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if outcome.not_done:
        raise Unable(outcome.not_done)
    return any(words.startswith("verified:") for words in outcome.broken)
