"""Laws of the journal: what was committed is there, what failed is not, and nobody is claimed twice."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigger_daemon import failpoints
from trigger_daemon import journal as journal_module
from trigger_daemon.core.model import (
    CLAIM_BASELINE,
    CLAIM_MARKER,
    CLAIM_SKIPPED,
    RELEASED,
    RIDER,
    AlarmAcked,
    AlarmCleared,
    AlarmRaised,
    AttemptChanged,
    AttemptMade,
    BaselineSet,
    BatchClosed,
    Claimed,
    ClaimsCarried,
    Effect,
    Forgotten,
    GroupForgotten,
    GroupSet,
    Kept,
    Look,
    Member,
    Ordered,
    ProofKept,
    ReclaimFile,
    ReclaimIntended,
    ReclaimMoved,
    ReclaimSet,
    Released,
    RulesAccepted,
    RunMoved,
    RunState,
)
from trigger_daemon.core.saved import SavedReclaim
from trigger_daemon.database import alive, holder
from trigger_daemon.errors import JournalConflict, JournalError, JournalFull
from trigger_daemon.journal import ClaimReader, Journal, Reader, RootIdentity, migrate

ODD = "d\udcffr"  # a name that is no UTF-8
FAR = 13_569_465_600 * 10**9  # an mtime in the year 2400: more than 64 bits of nanoseconds


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def journal(state_dir: Path) -> Iterator[Journal]:
    """A journal with rules a (1) and b (2) and the root /data (1)."""
    opened = Journal.open(state_dir)
    opened.rule_ids(["a", "b"])
    opened.root_id("/data")
    yield opened
    opened.close()


def batch(number: int, *names: str, rule: int = 1, directory: str = "s", at: float = 100.0, **more: Any) -> BatchClosed:
    members = [Member(1, directory, name, 10, 7) for name in names or (f"f{number}",)]
    return BatchClosed(
        batch=number,
        rule=rule,
        group=more.pop("group", {"chip": "c1"}),
        reason="2 files",
        time=at,
        members=more.pop("members", members),
        bytes=10 * len(members),
        request={"action": "copy"},
        destination="/mnt",
        **more,
    )


def moved(run: int, before: str, after: str, *, final: bool = False, at: float = 200.0, **more: Any) -> RunMoved:
    return RunMoved(run, RunState(before), RunState(after), f"to {after}", at, final, **more)


def finished(number: int, *names: str, at: float) -> list[Effect]:
    """A run with all its records, from its batch to its proof."""
    return [
        batch(number, *names, at=at),
        AttemptMade(number, 1, {"id": number}, at),
        moved(number, "PENDING", "STARTING", at=at, attempts=1),
        AttemptChanged(number, 1, handle={"h": number}),
        moved(number, "STARTING", "ACTIVE", at=at),
        AttemptChanged(number, 1, ended_time=at, outcome="succeeded"),
        moved(number, "ACTIVE", "SUCCEEDED", at=at),
        ProofKept(number, 1, [{"path": f"s/f{number}", "size": 10, "digest": "xxh3:1", "to": "/mnt/f"}], at),
        moved(number, "SUCCEEDED", "VERIFIED", final=True, at=at),
    ]


def in_child(work: Callable[[], None], *, wait: bool = True) -> int:
    """Run `work` in a forked process; return its wait status, or its pid at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] if wait else pid


def dump(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table but `program`."""
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as sql:
        tables = [name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: sql.execute(f"SELECT * FROM {name}").fetchall() for name in tables if name != "program"}
        rows["kept"] = [row for row in rows["kept"] if not str(row[0]).startswith("journal.")]  # where this one lies
    sql.close()
    return rows


# ---------------------------------------------------------------- what comes back


def test_all_that_the_engine_restores_comes_back_as_it_was_written(state_dir: Path, journal: Journal) -> None:
    """load() after a restart equals what was recorded, odd names and all."""
    fault = f"cannot read {ODD}"
    journal.append(
        [
            batch(1, group={"chip": ODD}, waits_on=(7, 8)),
            AttemptMade(1, 1, {"submission": ODD}, 101.0),
            AttemptMade(1, 2, None, 102.0),
            moved(1, "PENDING", "STARTING", at=103.0, attempts=2, error=fault, hint="ask", retry_time=500.0),
            AttemptChanged(1, 2, handle=["h"]),
            moved(1, "STARTING", "ACTIVE", at=104.0, output={"hits": 3}),
            *finished(2, at=100.0),
            BaselineSet(1, 1, 90.0),
            GroupSet(1, f'{{"chip":"{ODD}"}}', "taken", 1, 91.0),
            GroupSet(1, "{}", "at", 0, 92.0),
            GroupForgotten(1, "{}", "at"),
            AlarmRaised("disk", f"disk of {ODD} is full", "free some", 93.0),
            AlarmRaised("other", "x", "", 94.0),
            AlarmCleared("other", 95.0),
            AlarmAcked("disk", "ana", 96.0),
            Kept("paused", {"by": "ana"}),
            Kept("gone", 1),
            Kept("gone", None),
            RulesAccepted([{"file": "a.yaml", "text": "old"}], 80.0),
            RulesAccepted([{"file": "a.yaml", "text": "new"}], 81.0),
        ]
    )
    journal.close()

    again = Journal.open(state_dir)
    saved = again.load()
    again.close()
    (run,) = saved.runs

    assert saved.last_batch == 2
    assert (run.id, run.rule, run.group, run.state) == (1, 1, {"chip": ODD}, RunState.ACTIVE)
    assert (run.because, run.created_time, run.changed_time, run.attempts) == ("to ACTIVE", 100.0, 104.0, 2)
    assert (run.destination, run.waits_on, run.retry_time) == ("/mnt", (7, 8), 500.0)
    assert (run.error, run.hint, run.files, run.bytes) == (fault, "ask", 1, 10)
    assert (run.request, run.output) == ({"action": "copy"}, {"hits": 3})
    assert run.attempt is not None
    assert (run.attempt.attempt, run.attempt.prepared, run.attempt.handle) == (2, None, ["h"])
    assert (run.attempt.made_time, run.attempt.ended_time, run.attempt.outcome) == (102.0, None, None)
    assert saved.kept == {"paused": {"by": "ana"}, "witnessed": 0.0}
    assert saved.baselines == {(1, 1): 90.0}
    assert saved.groups == ((1, f'{{"chip":"{ODD}"}}', "taken", 1, 91.0),)
    assert saved.alarms == (("disk", f"disk of {ODD} is full", "free some", 93.0, 96.0, "ana"),)
    assert saved.rules_source == [{"file": "a.yaml", "text": "new"}]
    assert saved.tally[(1, "ACTIVE")] == (1, 1, 10) and saved.tally[(1, "VERIFIED")] == (1, 1, 10)
    assert saved.rules == {1: "a", 2: "b"} and saved.roots == {1: "/data"}


def test_a_new_journal_has_nothing_to_restore(state_dir: Path) -> None:
    """The first start finds no work, no rules and batch number 0."""
    journal = Journal.open(state_dir)
    saved = journal.load()
    journal.close()

    assert (saved.last_batch, saved.runs, saved.rules_source, saved.tally) == (0, (), None, {})


def test_members_and_claims_keep_names_and_times_exactly(journal: Journal) -> None:
    """Names that are no UTF-8 and mtimes beyond 64 bits come back equal, else the file would be sent for ever."""
    members = [
        Member(1, ODD, ODD, 10, FAR, "", "suspect"),
        Member(1, "", 'quote " back \\ ünï', 11, -FAR),
        Member(1, ODD, "gain", 12, 5, "shared"),
    ]
    journal.append([batch(1, members=members)])
    reader = ClaimReader(journal.path)

    assert journal.manifest(1) == tuple(members)
    assert reader.directory(1, ODD) == (1, {ODD: [(1, 10, FAR, 1)], "gain": [(RIDER + 1, 12, 5, 1)]})
    assert reader.directory(1, "") == (1, {'quote " back \\ ünï': [(1, 11, -FAR, 1)]})
    assert list(reader.directories(1)) == ["", ODD]
    assert journal.check() == []


def test_a_manifest_of_an_earlier_version_has_no_own_digests(state_dir: Path, journal: Journal) -> None:
    """Rows of seven load as before; rows of eight say what a file carries, and `runs show` shows it."""
    own = "md5:0123456789abcdef0123456789abcdef:4000:20"
    journal.append([batch(1), batch(2, members=[Member(1, "s", "x.cbf", 5000, 7, "", "", own)])])
    with closing(sqlite3.connect(journal.path)) as sql, sql:
        sql.execute("UPDATE batch SET manifest = ? WHERE id = 1", ('[[1,"s","f1",10,7,"",""]]',))
    reader = Reader(state_dir)

    assert journal.manifest(1) == (Member(1, "s", "f1", 10, 7),)
    assert journal.manifest(2) == (Member(1, "s", "x.cbf", 5000, 7, content=own),)
    assert [run["manifest"][0]["content"] for run in (reader.run(1), reader.run(2)) if run] == ["", own]
    assert [run["manifest"][0]["content_proved"] for run in (reader.run(1), reader.run(2)) if run] == [False, False]
    assert journal.check() == []


def test_a_version_that_its_batch_left_out_is_not_claimed_any_more(journal: Journal) -> None:
    """It is wanted again as it was; its history stays; and it can be left out a second time."""
    for number in (1, 2):
        journal.append([batch(number, "a", "b")])
        journal.append([Released(1, 1, number, ("s/a",))])

        claims = ClaimReader(journal.path).names(1, "s", ["a", "b"])[1]
        assert claims["a"] == [(RELEASED + 1, *claims["a"][0][1:3], number)]
        journal.append([Released(1, 1, number, ("s/b",))])
    assert journal.check() == []


@pytest.mark.parametrize("role", ["companion", "shared"])
def test_a_companion_travels_with_many_batches(journal: Journal, role: str) -> None:
    """A gain reference is in each manifest and claimed by none; the journal knows with which batch it went last."""
    gain = Member(1, "", "gain.mrc", 99, 1, role)
    for number in (1, 2):
        journal.append([batch(number, members=[Member(1, "s", f"m{number}", 1, 1), gain])])

    assert gain in journal.manifest(1) and gain in journal.manifest(2)
    assert ClaimReader(journal.path).names(1, "", ["gain.mrc"]) == (2, {"gain.mrc": [(RIDER + 1, 99, 1, 2)]})


def test_a_directory_is_read_with_the_batch_it_is_read_as_of(journal: Journal) -> None:
    """The core knows from `as_of` which of its batches the claims already hold."""
    journal.append([batch(1, "x", "y"), batch(2, "x", rule=2)])
    journal.append([Claimed(1, 1, "s", [("old", 3, 4)], CLAIM_BASELINE, 50.0)])
    journal.append([Claimed(-2, 1, "s", [("x", 1, 1)], CLAIM_MARKER, 5.0)])
    reader = ClaimReader(journal.path)

    as_of, claims = reader.directory(1, "s")

    assert as_of == 2
    assert sorted(claims["x"]) == [(-2, 1, 1, -2), (1, 10, 7, 1), (2, 10, 7, 2)]
    assert claims["old"] == [(1, 3, 4, 0)]
    assert reader.names(1, "s", ["y", "never"]) == (2, {"y": [(1, 10, 7, 1)]})
    assert reader.directory(1, "nowhere") == (2, {}) and reader.directory(9, "s") == (2, {})


def test_directories_are_listed_in_pages_without_losing_one(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory with claims is listed once, whatever the size of a page."""
    monkeypatch.setattr(journal_module, "DIRECTORIES_PAGE", 3)
    names = [f"d{number:02d}" for number in range(10)]
    journal.append([batch(number + 1, directory=name) for number, name in enumerate(names)])

    assert list(ClaimReader(journal.path).directories(1)) == names


def test_numbers_of_rules_and_roots_are_for_ever(state_dir: Path, journal: Journal) -> None:
    """A rule that comes back has its old number; so has a root, with what was known of its device."""
    identity = RootIdentity(2**63 + 5, 2, "nfs4", f"server:/{ODD}")
    root = journal.root_id("/other")
    journal.set_root_identity(root, identity)
    journal.close()

    again = Journal.open(state_dir)
    try:
        assert again.rule_ids(["c", "b"]) == {"c": 3, "b": 2}
        assert again.root_id("/other") == root and again.root_identity(root) == identity
        assert again.root_identity(1) is None
    finally:
        again.close()


# ------------------------------------------------------------------------- refusals


def test_a_version_is_claimed_by_one_batch_of_a_rule_only(journal: Journal) -> None:
    """The backstop of "exactly one batch": the second claim fails, names both, and nothing of its commit stays."""
    journal.append([batch(1, "x")])
    before = dump(journal.path)

    with pytest.raises(JournalConflict, match=r"batch 3 of rule a would take 's/x' again, which batch 1 has claimed"):
        journal.append([batch(2, "new", directory="elsewhere"), Kept("k", 1), batch(3, "y", "x")])

    assert dump(journal.path) == before
    journal.append([batch(2, "new", directory="elsewhere"), batch(3, "x", rule=2)])
    assert journal.check() == []


def test_one_commit_cannot_claim_a_version_twice_either(journal: Journal) -> None:
    """Two batches of one round, and one batch naming a file twice, are refused alike."""
    with pytest.raises(JournalConflict):
        journal.append([batch(1, "x"), batch(2, "x")])
    with pytest.raises(JournalConflict):
        journal.append([batch(1, "x", "x")])

    assert journal.load().last_batch == 0


def test_resending_moves_the_claim(journal: Journal) -> None:
    """`files resend` takes an existing claim to a new batch; also one without a batch."""
    journal.append([batch(1, "x"), Claimed(1, 1, "s", [("skipped", 10, 7)], CLAIM_SKIPPED, 5.0)])
    journal.append([batch(2, "y"), batch(3, "x", "skipped", again=True)])

    _, claims = ClaimReader(journal.path).directory(1, "s")

    assert claims == {"x": [(1, 10, 7, 3)], "y": [(1, 10, 7, 2)], "skipped": [(1, 10, 7, 3)]}


def test_a_baseline_never_takes_a_claim_from_a_batch(journal: Journal) -> None:
    """Versions dealt with already are left alone by later claims without a batch."""
    journal.append([batch(1, "x")])
    journal.append([Claimed(1, 1, "s", [("x", 10, 7), ("z", 1, 1)], CLAIM_BASELINE, 5.0)])

    assert ClaimReader(journal.path).directory(1, "s")[1] == {"x": [(1, 10, 7, 1)], "z": [(1, 1, 1, 0)]}


@pytest.mark.parametrize(
    "record",
    [
        moved(1, "ACTIVE", "SUCCEEDED"),
        moved(9, "PENDING", "STARTING"),
        AttemptChanged(1, 5, handle=1),
        AttemptMade(1, 1, None, 1.0),
    ],
)
def test_a_record_that_contradicts_the_journal_is_refused(journal: Journal, record: Effect) -> None:
    """A transition from another state, or a second birth of an attempt, is a bug and not written."""
    journal.append([batch(1), AttemptMade(1, 1, None, 1.0)])
    before = dump(journal.path)

    with pytest.raises(JournalConflict):
        journal.append([Kept("k", 1), record])

    assert dump(journal.path) == before


def test_only_records_are_written(journal: Journal) -> None:
    """An effect that is no record is a bug, and its commit leaves nothing."""
    with pytest.raises(TypeError, match="Look"):
        journal.append([batch(1), Look(1, "", ("x",))])

    assert journal.load().last_batch == 0


# ---------------------------------------------------------------------- one daemon


def test_a_second_daemon_is_refused_by_name(state_dir: Path, journal: Journal) -> None:
    """The error names the pid that holds the directory, and the directory."""
    with pytest.raises(JournalError, match=rf"pid {os.getpid()}, started 20.*{state_dir}"):
        Journal.open(state_dir)

    assert alive(state_dir)


def test_the_lock_of_a_dead_daemon_is_no_obstacle(state_dir: Path) -> None:
    """After a kill -9 the next start finds the lock file, and the committed work."""

    def die() -> None:
        journal = Journal.open(state_dir)
        journal.append([Kept("k", 1)])
        os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(die)

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert holder(state_dir) is not None and not alive(state_dir)
    journal = Journal.open(state_dir)
    assert journal.load().kept == {"k": 1}
    journal.close()


def test_children_do_not_inherit_the_lock(state_dir: Path) -> None:
    """A worker or a command that outlives its daemon must not keep the next one from starting."""
    read, write = os.pipe()

    def daemon() -> None:
        Journal.open(state_dir)
        worker = os.fork()
        if worker == 0:
            signal.pause()
        started = subprocess.Popen(["sleep", "1000"], close_fds=False)
        os.write(write, f"{worker} {started.pid}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(daemon)
    worker, started = map(int, os.read(read, 100).split())
    try:
        Journal.open(state_dir).close()
    finally:
        for pid in (worker, started):
            os.kill(pid, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_somebody_looking_whether_it_lives_does_not_stop_a_start(state_dir: Path) -> None:
    """`status` run again and again beside a starting daemon never makes it say "another daemon"."""
    Journal.open(state_dir).close()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            alive(state_dir)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            Journal.open(state_dir).close()
    finally:
        stop.set()
        looking.join()


def test_files_are_for_the_owner_and_the_group(state_dir: Path, journal: Journal) -> None:
    """Members of the group may read and order; nobody else, whatever the umask."""
    journal.append([Kept("k", 1)])

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state_dir.iterdir()}

    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o2770
    names = ("lock", "journal.db", "journal.db-wal", "journal.db-shm", "journal.last", "journal.made")
    assert modes == dict.fromkeys(names, 0o660)


def test_a_network_file_system_is_refused(state_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Locks and shared memory are not to be trusted there; nothing is made."""
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {tmp_path} rw - nfs4 srv:/x rw\n")
    monkeypatch.setattr("trigger_daemon.mounts.MOUNTINFO", str(table))

    with pytest.raises(JournalError, match=r"lies on nfs4 \(srv:/x\)") as refused:
        Journal.open(state_dir)

    assert "local disk" in refused.value.hint and not state_dir.exists()


# ------------------------------------------------------------- versions and damage


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"this is no database " * 300, "damaged"),
    ],
)
def test_a_damaged_journal_is_never_replaced(state_dir: Path, content: bytes, says: str) -> None:
    """A journal that lost everything is consistent with itself, so it is a person who decides."""
    state_dir.mkdir()
    path = state_dir / "journal.db"
    path.write_bytes(content)

    with pytest.raises(JournalError, match=says) as refused:
        Journal.open(state_dir)

    assert "backup" in refused.value.hint
    assert path.read_bytes() == content
    assert not alive(state_dir)


def test_another_programs_database_is_refused(state_dir: Path) -> None:
    """An SQLite file that is not a journal is not written to."""
    state_dir.mkdir()
    with sqlite3.connect(state_dir / "journal.db") as sql:
        sql.execute("CREATE TABLE x (y)")
    sql.close()

    with pytest.raises(JournalError, match="not a journal of this program"):
        Journal.open(state_dir)


def test_a_wal_without_its_journal_is_damage(state_dir: Path) -> None:
    """A deleted journal.db whose -wal still holds commits is not taken for a first start."""
    state_dir.mkdir()
    (state_dir / "journal.db-wal").write_bytes(b"x" * 5_000)

    with pytest.raises(JournalError, match="damaged"):
        Journal.open(state_dir)


def test_a_newer_journal_says_what_it_needs(state_dir: Path, journal: Journal) -> None:
    """An older program names the schema it met and the version that wrote it."""
    journal.close()
    with sqlite3.connect(state_dir / "journal.db") as sql:
        sql.execute("PRAGMA user_version = 99")
        sql.execute("INSERT INTO program (version, time) VALUES ('7.8.9', 1)")
    sql.close()

    with pytest.raises(JournalError, match="schema 99") as refused:
        Journal.open(state_dir)

    assert "7.8.9" in refused.value.hint


def test_a_migration_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    """A step that fails takes the earlier steps back, and the version with them."""
    sql = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    sql.executescript("CREATE TABLE a (x); INSERT INTO a VALUES (1); PRAGMA user_version = 1;")
    first = "ALTER TABLE a ADD COLUMN y; -- a comment; with a semicolon\nUPDATE a SET y = 'a;b';"

    with pytest.raises(sqlite3.Error):
        migrate(sql, [first, "INSERT INTO nowhere VALUES (1);"])
    failed = (sql.execute("PRAGMA user_version").fetchone(), sql.execute("SELECT * FROM a").fetchall())
    migrate(sql, [first, "CREATE TABLE b (z);"])

    assert failed == ((1,), [(1,)])
    assert sql.execute("PRAGMA user_version").fetchone() == (3,)
    assert sql.execute("SELECT * FROM a").fetchall() == [(1, "a;b")] and not sql.execute("SELECT * FROM b").fetchall()
    sql.close()


def test_a_sound_journal_has_no_faults_and_a_broken_one_names_them(state_dir: Path, journal: Journal) -> None:
    """check() finds a wrong count, a lost batch, a lost claim and a lost manifest."""
    journal.append([*finished(1, at=10.0), batch(2), batch(3), batch(4), Claimed(1, 1, "", [("o", 1, 1)], 0, 1.0)])
    sound = journal.check()
    journal.close()
    with sqlite3.connect(state_dir / "journal.db") as sql:
        sql.execute("UPDATE tally SET runs = runs + 1 WHERE state = 'VERIFIED'")
        sql.execute("DELETE FROM batch WHERE id = 2")
        sql.execute("DELETE FROM claim WHERE batch = 3")
        sql.execute("UPDATE batch SET manifest = NULL WHERE id = 4")
    sql.close()

    faults = "\n".join(Reader(state_dir).check())

    assert sound == []
    assert "the count of rule 1 in VERIFIED says 2 runs" in faults
    assert "run 2 has no batch" in faults and "1 claims belong to batch 2" in faults
    assert "batch 3: 1 members without a claim, the first is 's/f3'" in faults
    assert "run 4 is open (PENDING) and its manifest or request is gone" in faults


# -------------------------------------------------------------------- bad disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, *, leave: int = 0) -> Path:
    """Fill a file system to the last byte but `leave`."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@pytest.mark.serial
def test_a_full_disk_refuses_whole_commits_and_takes_the_same_rows_later(small_disk: Path) -> None:
    """JournalFull leaves nothing behind; with room again the same records go in, without reopening."""
    journal = Journal.open(small_disk / "state")
    journal.rule_ids(["a"])
    journal.root_id("/data")
    journal.append([batch(1)])
    before = dump(journal.path)
    records = [batch(2, *(f"name{number}" for number in range(2_000))), Kept("k", "v" * 10_000)]
    ballast = fill(small_disk, leave=20_480)

    for _ in range(3):
        with pytest.raises(JournalFull) as refused:
            journal.append(records)
    after_failure = dump(journal.path)
    ballast.unlink()
    journal.append(records)

    assert not refused.value.io and "free space" in refused.value.hint
    assert after_failure == before
    assert journal.check() == [] and journal.load().last_batch == 2
    journal.close()


@pytest.mark.serial
def test_what_the_ballast_leaves_lasts_for_many_small_commits(small_disk: Path) -> None:
    """Once it was given up, the -wal is put into the database early, and made again it grows as before."""
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    journal = Journal.open(small_disk / "state")
    journal.keep_ballast()
    filler = fill(small_disk)

    for number in range(2_000):
        journal.append([Kept("k", f"{number} " * 100)])
        if number == 100:
            journal.reopen()
    assert journal.ballast_given_up

    filler.unlink()
    journal.keep_ballast()
    assert not journal.ballast_given_up
    for number in range(500):
        journal.append([Kept("k", f"{number} " * 100)])
    assert (small_disk / "state" / "journal.db-wal").stat().st_size > 500 * 4_096
    journal.close()


@pytest.mark.serial
def test_a_full_disk_does_not_stop_a_start(small_disk: Path) -> None:
    """A daemon that starts on a full disk reads its journal, or says JournalFull; then it goes on as soon as it may."""
    state = small_disk / "state"
    journal = Journal.open(state)
    journal.append([Kept("k", 1)])
    journal.close()
    ballast = fill(small_disk)

    with suppress(JournalFull):
        journal = Journal.open(state)
        journal.close()
    with pytest.raises(JournalFull):
        Journal.open(small_disk / "new")
    ballast.unlink()
    journal = Journal.open(state)

    assert journal.load().kept == {"k": 1}
    journal.close()


@contextmanager
def no_file_beyond(limit_bytes: int) -> Iterator[None]:
    """Let the kernel refuse (EFBIG) every write beyond a size: SQLite sees an I/O error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_after_an_io_error_nothing_is_written_until_reopened(journal: Journal) -> None:
    """The error says io; more appends are refused; the reopened journal has what was committed before, and goes on."""
    journal.append([batch(1)])
    before = dump(journal.path)
    big = [batch(2, *(f"name{number}" for number in range(2_000)))]

    with no_file_beyond(journal.wal_bytes() + 8_192), pytest.raises(JournalError) as failed:
        journal.append(big)
    with pytest.raises(JournalError) as refused:
        journal.append([Kept("k", 1)])
    journal.reopen()

    assert failed.value.io and refused.value.io and not isinstance(failed.value, JournalFull)
    assert dump(journal.path) == before
    journal.append(big)
    assert journal.load().last_batch == 2 and journal.check() == []


@pytest.mark.parametrize(
    ("plan", "error", "stays"),
    [
        ("journal.commit:eio", JournalError, False),
        ("journal.commit:enospc", JournalFull, False),
        ("journal.commit:edquot", JournalFull, False),
        ("journal.committed:eio", JournalError, True),
    ],
)
def test_an_error_at_the_commit_is_settled_by_reopening(
    journal: Journal, plan: str, error: type[JournalError], stays: bool
) -> None:
    """Before the commit nothing stays; if the error came after it, load() tells that it is in."""
    failpoints.plan(plan)
    try:
        with pytest.raises(error):
            journal.append([batch(1)])
    finally:
        failpoints.plan("")
    journal.reopen()

    assert journal.load().last_batch == int(stays)
    journal.append([batch(2)])
    assert journal.check() == []


# ------------------------------------------------------------------------- readers


def stopped_reader(path: Path) -> int:
    """Start a process that stands still in the middle of reading; return its pid."""

    def question(sql: sqlite3.Connection) -> None:
        sql.execute("SELECT count(*) FROM batch").fetchone()
        os.kill(os.getpid(), signal.SIGSTOP)

    pid = in_child(lambda: Reader(path.parent)._ask(question), wait=False)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def test_a_reader_that_stands_still_delays_no_commit(journal: Journal) -> None:
    """`runs list | less`, stopped by ^Z in mid-read: commits and checkpoints go on; later the -wal is used anew."""
    journal.append([batch(1)])
    pid = stopped_reader(journal.path)
    slowest = 0.0
    try:
        for number in range(2, 40):
            begun = time.monotonic()
            journal.append([batch(number, *(f"{number}-{name:0200d}" for name in range(1_000)))])
            slowest = max(slowest, time.monotonic() - begun)
        grown = journal.wal_bytes()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for number in range(40, 80):
        journal.append([batch(number, *(f"{number}-{name:0200d}" for name in range(1_000)))])

    assert slowest < journal_module.WRITE_BUSY_S / 2
    assert grown > journal_module.CHECKPOINT_PAGES * 4096, "the test must go beyond a checkpoint"
    assert journal.wal_bytes() < 2 * grown
    assert journal.load().last_batch == 79


def test_people_read_while_the_daemon_writes_and_when_it_is_down(state_dir: Path, journal: Journal) -> None:
    """The same answer with the daemon up, stopped cleanly (no -wal), and killed; reading leaves no file behind."""
    journal.append(finished(1, at=10.0))
    up = Reader(state_dir).run(1)
    journal.close()
    files = sorted(path.name for path in state_dir.iterdir())
    down = Reader(state_dir).run(1)
    left = sorted(path.name for path in state_dir.iterdir())

    def die() -> None:
        Journal.open(state_dir).append([Kept("k", 1)])
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(die)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in state_dir.iterdir()}
    killed = Reader(state_dir).run(1)
    kept = Reader(state_dir).kept("k")
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in state_dir.iterdir()}

    assert up is not None and up == down == killed
    assert kept == 1, "the commit that lies only in the -wal"
    assert files == left == ["journal.db", "journal.last", "journal.made", "lock"]
    assert before == after, "recovery is the daemon's: a reader stopped in the middle of it would lock the next one out"


def as_nobody(work: Callable[[], None]) -> int:
    def drop() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        work()

    return os.waitstatus_to_exitcode(in_child(drop))


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory everybody may enter (tmp_path is only for its owner)."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


def needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")


@pytest.mark.parametrize("daemon", ["up", "down", "killed"])
def test_one_who_may_only_read_reads(open_place: Path, daemon: str) -> None:
    """A reader without write permission, neither to the files nor to the directory, gets his answer."""
    needs_root()
    state = open_place / "state"

    def write() -> None:
        journal = Journal.open(state)
        journal.append([batch(1)])
        journal.append([Kept("k", 1)])
        if daemon == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        journal.close()

    in_child(write)
    journal = Journal.open(state) if daemon == "up" else None
    state.chmod(0o755)
    for path in state.iterdir():
        path.chmod(0o644)

    def read() -> None:
        assert Reader(state).kept("k") == 1 and len(Reader(state).runs()) == 1

    code = as_nobody(read)
    if journal:
        journal.append([Kept("k", 2)])
        journal.close()

    assert code == 0


def test_one_who_may_not_read_is_told_the_group(open_place: Path) -> None:
    """Without permission: an error that names the group to ask for."""
    needs_root()
    state = open_place / "state"
    Journal.open(state).close()

    def read() -> None:
        with pytest.raises(JournalError, match="no permission") as refused:
            Reader(state).runs()
        assert "group root" in refused.value.hint

    assert as_nobody(read) == 0


def test_without_a_journal_the_reader_says_what_to_do(state_dir: Path) -> None:
    """A command before the first start is told so, and makes nothing."""
    with pytest.raises(JournalError, match="there is no") as refused:
        Reader(state_dir).runs()

    assert "start the daemon" in refused.value.hint and not state_dir.exists()


def test_runs_are_found_by_rule_state_and_group(
    state_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newest first, page by page, whatever is asked; open states come from the index and agree."""
    monkeypatch.setattr("trigger_daemon.reader.PAGE_IDS", 3)
    for number in range(1, 11):
        journal.append([batch(number, rule=1 + number % 2, group={"chip": f"c{number % 3}", "run": "1"})])
    journal.append([moved(4, "PENDING", "HELD", error="no consent", hint="log in")])
    journal.append([moved(5, "PENDING", "CANCELLED", final=True)])
    ask = Reader(state_dir)

    def ids(**question: Any) -> list[int]:
        return [row["id"] for row in ask.runs(**question)]

    assert ids() == list(range(10, 0, -1))
    assert ids(limit=3) == [10, 9, 8] and ids(limit=3, before_id=8) == [7, 6, 5] and ids(before_id=1) == []
    assert ids(rule="a") == [10, 8, 6, 4, 2] and ids(rule="nobody") == []
    assert ids(state="HELD") == [4] and ids(state="CANCELLED") == [5]
    assert ids(state="PENDING", rule="b", limit=2) == [9, 7] and ids(state="PENDING", before_id=3) == [2, 1]
    assert ids(group={"chip": "c1"}) == [10, 7, 4, 1] and ids(group={"chip": "c1", "run": "2"}) == []
    (held,) = ask.runs(state="HELD")
    assert (held["waiting_for"], held["error"], held["hint"]) == ("to HELD", "no consent", "log in")
    assert ask.batches(limit=1)[0]["reason"] == "2 files"


def test_a_run_is_shown_with_its_history_and_its_proof(state_dir: Path, journal: Journal) -> None:
    """`runs show`: attempts, handle, transitions from the closing on, and the digest of each member."""
    journal.append(finished(1, at=10.0))

    run = Reader(state_dir).run(1)

    assert run is not None and Reader(state_dir).run(2) is None
    assert [step["to"] for step in run["transitions"]] == ["PENDING", "STARTING", "ACTIVE", "SUCCEEDED", "VERIFIED"]
    assert run["handle"] == {"h": 1} and run["attempts_made"] == 1 and run["attempts"][0]["outcome"] == "succeeded"
    (member,) = run["manifest"]
    assert (member["path"], member["digest"], member["to"], member["root"]) == ("s/f1", "xxh3:1", ["/mnt/f"], "/data")


def test_every_claim_of_a_path_is_told(state_dir: Path, journal: Journal) -> None:
    """What `explain` needs of a file: each rule's versions, their runs, proof, and claims without a batch."""
    journal.append([*finished(1, at=10.0), moved(1, "VERIFIED", "VERIFIED", final=True)])
    journal.append([Claimed(2, 1, "s", [("f1", 3, 3)], CLAIM_BASELINE, 77.0)])
    journal.append([Claimed(-1, 1, "s", [("f1", 1, 1)], CLAIM_MARKER, 78.0)])

    claims = Reader(state_dir).claims_of("/data", "s/f1")

    assert [(claim.rule, claim.batch, claim.state, claim.closed_time) for claim in claims] == [
        ("a", 1, "VERIFIED", 10.0),
        ("b", 0, None, 77.0),
        ("a", -2, None, 78.0),
    ]
    assert claims[0].proof_time == 10.0 and claims[0].final and not claims[1].final
    assert Reader(state_dir).claims_of("/data", "s/other") == []


def test_status_reads_counts_alarms_and_rules(state_dir: Path, journal: Journal) -> None:
    """Counts come without reading history; alarms only while open; the rule set in force is the last accepted."""
    journal.append([*finished(1, at=10.0), batch(2), batch(3, rule=2), AlarmRaised("x", "what", "do", 5.0)])
    accepted = RulesAccepted([{"file": "r", "text": "rules: []"}], 7.0)
    journal.append([AlarmRaised("x", "what now", "do", 6.0), accepted, BaselineSet(1, 1, 8.0)])
    journal.append([Ordered(4, "pause", {"all": True}, "ana", "beam", {"ok": True}, 9.0)])
    ask = Reader(state_dir)

    assert ask.tally() == {"a": {"PENDING": (1, 1, 10), "VERIFIED": (1, 1, 10)}, "b": {"PENDING": (1, 1, 10)}}
    assert [(alarm["what"], alarm["since_time"]) for alarm in ask.open_alarms()] == [("what now", 5.0)]
    assert (ask.rule_texts(), ask.rules_time(), ask.version) == ([("r", "rules: []")], 7.0, journal_module.SCHEMA)
    assert ask.baselines() == {("a", "/data"): 8.0}
    assert ask.orders()[0]["who"] == "ana"


def test_orders_of_a_new_control_file_do_not_clash_with_old_ones(state_dir: Path, journal: Journal) -> None:
    """control.db may begin its numbers anew; each order has its own row."""
    for _ in range(2):
        journal.append([Ordered(1, "pause", {}, "ana", "", {"ok": True}, 9.0)])

    assert len(Reader(state_dir).orders()) == 2


# ------------------------------------------------------------------- thinning


def test_thinning_takes_the_details_of_old_final_runs_and_leaves_the_claims(state_dir: Path, journal: Journal) -> None:
    """Open and recent runs stay whole; an old one keeps numbers and claims, so nothing starts again."""
    journal.append([*finished(1, at=10.0), *finished(2, at=20.0), batch(3, at=11.0), *finished(4, at=900.0)])

    thinned = [journal.thin(500.0, 1), journal.thin(500.0, 1), journal.thin(500.0, 1)]

    old, recent = Reader(state_dir).run(1), Reader(state_dir).run(4)
    assert thinned == [1, 1, 0]
    assert old is not None and old["thinned"] and old["attempts"] == [] and old["files"] == 1
    assert recent is not None and recent["manifest"][0]["digest"] == "xxh3:1"
    assert journal.manifest(3) and journal.request(3) == {"action": "copy"}
    with pytest.raises(JournalError, match="thinned"):
        journal.manifest(1)
    assert set(ClaimReader(journal.path).directory(1, "s")[1]) == {"f1", "f2", "f3", "f4"}
    assert journal.check() == []


def test_thinning_spares_what_reclaim_needs_while_the_files_are_there(state_dir: Path, journal: Journal) -> None:
    """A disk that is not low for a year: proofs outlive `keep_done`. What is spared hides nothing behind it."""
    journal.append([record for number in range(1, 7) for record in finished(number, at=10.0)])
    journal.append([Forgotten(1, "s", ("f2",), 500.0)])

    thinned = [journal.thin(500.0, 2, spared={1}) for _ in range(4)]
    told = {number: Reader(state_dir).run(number) for number in range(1, 7)}

    assert sum(thinned) == 1
    assert [number for number, run in told.items() if run is None or run["thinned"]] == [2]
    assert Reader(state_dir).proof_of(1) is not None
    assert [journal.thin(500.0, 2) for _ in range(4)] == [2, 2, 1, 0]


def test_a_batch_is_spared_while_any_of_its_files_is_there(state_dir: Path, journal: Journal) -> None:
    """Whichever files of it somebody has deleted by hand: the others need the proof. Without any it goes."""
    journal.append(finished(1, "a", "b", "c", at=10.0))
    journal.append([Forgotten(1, "s", ("a", "b"), 500.0)])
    assert journal.thin(500.0, 2, spared={1}) == 0
    assert Reader(state_dir).proof_of(1) is not None
    journal.append([Forgotten(1, "s", ("c",), 501.0)])

    assert journal.thin(500.0, 2, spared={1}) == 1


def test_thinning_looks_for_so_many_files_at_a_time(
    state_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits wait for it. What is left is told as more to do, and none is passed over, however large."""
    monkeypatch.setattr("trigger_daemon.journal.THIN_LOOKS_MAX", 4)
    names = {number: [f"{number}-{file}" for file in range(5 if number == 2 else 2)] for number in range(1, 8)}
    for number, of in names.items():
        journal.append(finished(number, *of, at=float(number)))
        if number != 4:
            journal.append([Forgotten(1, "s", tuple(of), 500.0)])
    portions = []
    while not portions or portions[-1] == 10:
        portions.append(journal.thin(500.0, 10, spared={1}))

    assert portions[:-1] == [10] * 4
    told = {number: Reader(state_dir).run(number) for number in names}
    assert [number for number, run in told.items() if run is not None and not run["thinned"]] == [4]


def test_ended_reclaims_are_thinned_and_open_ones_are_not(journal: Journal) -> None:
    """The audit is kept as long as runs are."""
    of = ReclaimSet(1, 1, (ReclaimFile(1, "s/f1", (10, 7, 8, 9), ".h"),), [{"rule": "r", "copies": []}])
    for number in (1, 2, 3):
        journal.append([ReclaimIntended(number, of, 10.0)])
    journal.append([ReclaimMoved(1, "done", "proved", ("gone",), 20.0)])
    journal.append([ReclaimMoved(2, "confirmed", "", ("aside",), 20.0)])

    saved = journal.load()
    assert saved.reclaims == (SavedReclaim(2, True, of), SavedReclaim(3, False, of))
    assert saved.last_reclaim == 3
    assert [journal.thin(500.0, 10), journal.thin(500.0, 10)] == [1, 0]
    assert [one.id for one in journal.load().reclaims] == [2, 3]
    with pytest.raises(JournalConflict, match="not under way"):
        journal.append([ReclaimMoved(1, "kept", "", (), 30.0)])


def test_a_journal_of_schema_1_is_taken_over() -> None:
    """Made as version 1 made it: it becomes the one that is made now, and what is in it stays."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as sql:
        journal_module.make_tables(sql)
        sql.executescript(
            "DROP INDEX batch_rule; DROP TABLE sole; DROP TABLE reclaim_file; DROP TABLE reclaim;"
            " ALTER TABLE proof DROP COLUMN witnessed;"
            " INSERT INTO proof (run, attempt, time, members) VALUES (1, 1, 5.0, '[]'); PRAGMA user_version = 1;"
        )
        journal_module.migrate(sql, journal_module.MIGRATIONS)
        columns = {
            table: [row[1:4] for row in sql.execute(f"PRAGMA table_info({table})")]
            for table in ("proof", "reclaim", "reclaim_file", "sole")
        }
        indices = {name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        assert sql.execute("SELECT * FROM proof").fetchall() == [(1, 1, 5.0, "[]", 0.0)]
        assert sql.execute("PRAGMA user_version").fetchone() == (journal_module.SCHEMA,)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as sql:
        journal_module.make_tables(sql)
        new = {
            table: [row[1:4] for row in sql.execute(f"PRAGMA table_info({table})")]
            for table in ("proof", "reclaim", "reclaim_file", "sole")
        }
        assert columns == new
        assert indices == {name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}


def test_a_journal_of_schema_2_is_taken_over(state_dir: Path) -> None:
    """What version 2 wrote stays, and a rule's runs are found by the index that is made of it."""
    with closing(Journal.open(state_dir)) as made:
        made.rule_ids(["r"])
        made.root_id("/data")
        made.append(finished(1, at=10.0))
    with closing(sqlite3.connect(state_dir / "journal.db")) as sql:
        sql.executescript("DROP INDEX batch_rule; PRAGMA user_version = 2;")
    with closing(Journal.open(state_dir)) as taken:
        assert [run for run, _ in taken.ended_well(1, 10)[0]] == [1]
        assert taken.check() == []


def test_claims_of_vanished_files_are_forgotten_once_their_runs_are_old(journal: Journal) -> None:
    """A claim of an open or recent run, or a recent baseline, survives its file; an old one goes with it."""
    journal.append([*finished(1, at=10.0), *finished(2, at=900.0), batch(3, at=10.0)])
    journal.append([Claimed(1, 1, "s", [("b1", 1, 1)], 0, 10.0), Claimed(1, 1, "s", [("b2", 1, 1)], -1, 900.0)])
    journal.append([Claimed(1, 1, "gone", [("b3", 1, 1)], 0, 10.0)])
    reader = ClaimReader(journal.path)

    names = ("f1", "f2", "f3", "b1", "b2", "never")
    journal.append([Forgotten(1, "s", names, 500.0), Forgotten(1, "gone", None, 500.0)])

    assert set(reader.directory(1, "s")[1]) == {"f2", "f3", "b2"}
    assert list(reader.directories(1)) == ["s"], "a directory without claims is no longer asked about"
    journal.append([batch(9, directory="gone")])
    assert reader.directory(1, "gone")[1] == {"f9": [(1, 10, 7, 9)]}
    assert journal.check() == []


# --------------------------------------------------------------------- durability


def test_commits_are_synced(journal: Journal) -> None:
    """synchronous=FULL in WAL: with NORMAL a power cut takes commits back that the world was told about."""
    connection = journal._write

    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_cache_of_directories_is_bounded_and_forgets_what_was_rolled_back(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory numbered in a failed commit is numbered again, and never by a number another one got."""
    monkeypatch.setattr(journal_module, "DIRS_CACHED_MAX", 2)
    journal.append([batch(1, "x")])
    with pytest.raises(JournalConflict):
        journal.append([batch(2, "a", directory="new1"), Claimed(1, 1, "new2", [("z", 1, 1)], 0, 1.0), batch(3, "x")])
    journal.append([batch(2, "a", directory="new2"), batch(3, "a", directory="new1"), batch(4, "a", directory="new3")])

    reader = ClaimReader(journal.path)

    assert [reader.directory(1, f"new{number}")[1]["a"][0][3] for number in (1, 2, 3)] == [3, 2, 4]
    assert len(journal._dirs) <= 2 and journal.check() == []


@dataclass(frozen=True)
class Crash:
    """Where a daemon ends: in which commit, and how far in it."""

    commit: int
    where: str  # records | commit | committed | closed
    record: int


class Deadly(list[Effect]):
    """Records that kill their reader (or, raising, make it close) at one of them."""

    def __init__(self, records: Sequence[Effect], at: int, end: Callable[[], None]) -> None:
        super().__init__(records)
        self.at, self.end = at, end

    def __iter__(self) -> Iterator[Effect]:
        for number, record in enumerate(super().__iter__()):
            if number == self.at:
                self.end()
            yield record


_STEPS = (("PENDING", "STARTING"), ("STARTING", "ACTIVE"), ("ACTIVE", "SUCCEEDED"), ("SUCCEEDED", "VERIFIED"))


@st.composite
def histories(draw: st.DrawFn) -> list[list[Effect]]:
    """Commits of records that are consistent with one another."""
    commits: list[list[Effect]] = []
    stands: dict[int, int] = {}
    for _ in range(draw(st.integers(1, 6))):
        records: list[Effect] = []
        for _ in range(draw(st.integers(1, 5))):
            choices = ["batch", "claim", "kept", "alarm", "rules", "mark"]
            choices += ["move", "forget"] if stands else []
            match draw(st.sampled_from(choices)):
                case "batch":
                    number = len(stands) + 1
                    names = [f"{number}-{name}" for name in range(draw(st.integers(1, 4)))]
                    records.append(batch(number, *names, directory=draw(st.sampled_from(["", "a", ODD]))))
                    stands[number] = 0
                case "move":
                    run = draw(st.sampled_from(sorted(stands)))
                    if stands[run] < len(_STEPS):
                        before, after = _STEPS[stands[run]]
                        if after == "STARTING":
                            records.append(AttemptMade(run, 1, {"n": run}, 1.0))
                        if after == "VERIFIED":
                            records.append(ProofKept(run, 1, [{"path": "x", "digest": "y"}], 2.0))
                        records.append(moved(run, before, after, final=after == "VERIFIED"))
                        stands[run] += 1
                case "forget":
                    records.append(Forgotten(1, draw(st.sampled_from(["", "a", ODD])), None, 1e9))
                case "claim":
                    records.append(Claimed(2, 1, "a", [(draw(st.sampled_from("xyz")), 1, FAR)], 0, 3.0))
                case "kept":
                    records.append(Kept("k", draw(st.one_of(st.none(), st.integers()))))
                case "alarm":
                    records.append(draw(st.sampled_from([AlarmRaised("k", "w", "h", 1.0), AlarmCleared("k", 2.0)])))
                case "rules":
                    records.append(RulesAccepted([{"file": "x", "text": ""}], 1.0))
                case "mark":
                    records.append(GroupSet(1, draw(st.sampled_from(["{}", "x"])), "taken", 1, 1.0))
        if records:
            commits.append(records)
    return commits or [[Kept("k", 1)]]


def live_and_end(state: Path, commits: list[list[Effect]], crash: Crash, told: int) -> None:
    """Be the daemon: commit, tell the world after each commit, and end as planned."""
    journal = Journal.open(state)
    journal.rule_ids(["a", "b"])
    journal.root_id("/data")
    for number, records in enumerate(commits):
        if number == crash.commit:
            match crash.where:
                case "records":
                    records = Deadly(records, crash.record, lambda: os.kill(os.getpid(), signal.SIGKILL))
                case "closed":

                    def give_up() -> None:
                        raise KeyboardInterrupt

                    records = Deadly(records, crash.record, give_up)
                case word:
                    failpoints.plan(f"journal.{word}:kill")
        try:
            journal.append(records)
        except KeyboardInterrupt:
            journal.close()
            return
        os.write(told, b".")
    os.kill(os.getpid(), signal.SIGKILL)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_moment_of_death_the_journal_is_a_prefix_of_its_commits(data: st.DataObject) -> None:
    """Killed or closed at any record of any commit: every told commit is there, and no part of another."""
    commits = data.draw(histories())
    number = data.draw(st.integers(0, len(commits) - 1))
    crash = Crash(
        number,
        data.draw(st.sampled_from(["records", "commit", "committed", "closed"])),
        data.draw(st.integers(0, len(commits[number]) - 1)),
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        read, write = os.pipe()
        in_child(lambda: live_and_end(Path(place, "s"), commits, crash, write))
        os.close(write)
        told = len(os.read(read, 100))
        os.close(read)
        revived = Journal.open(Path(place, "s"))
        reference = Journal.open(Path(place, "reference"))
        reference.rule_ids(["a", "b"])
        reference.root_id("/data")
        committed = told + (crash.where == "committed")
        for records in commits[:committed]:
            reference.append(records)

        assert told == crash.commit
        assert dump(revived.path) == dump(reference.path)
        assert revived.load() == reference.load()
        assert revived.check() == []
        for records in commits[committed:]:  # and it goes on as if nothing had happened
            revived.append(records)
        revived.close()
        reference.close()


def test_carried_claims_hold_below_the_new_root(journal: Journal) -> None:
    """What a rule claimed below its old root, also as a marker, is claimed below the new one; of no other rule."""
    rules = journal.rule_ids(["a", "b"])
    old, new = journal.root_id("/old"), journal.root_id("/new")
    rows = [("x.tif", 3, 10**20)]  # an mtime beyond 64 bits is carried as it is
    journal.append([
        Claimed(rules["a"], old, "d/e", rows, 0, 5.0),
        Claimed(-rules["a"], old, "d", [("marker", 1, 2)], -2, 5.0),
        Claimed(rules["b"], old, "other", rows, 0, 5.0),
        ClaimsCarried(rules["a"], old, new),
        ClaimsCarried(rules["a"], old, new),
    ])  # fmt: skip
    reader = ClaimReader(journal.path)

    assert reader.directory(new, "d/e")[1] == reader.directory(old, "d/e")[1] != {}
    assert reader.directory(new, "d")[1] == reader.directory(old, "d")[1] != {}
    assert reader.directory(new, "other")[1] == {}
    assert sorted(reader.directories(new)) == ["d", "d/e"]
    reader.close()


def test_a_journal_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    """A removed journal would send every file again: it is told, until a person says so."""
    Journal.open(tmp_path).close()
    (tmp_path / "journal.db").unlink()

    with pytest.raises(JournalError, match="is gone") as told:
        Journal.open(tmp_path)
    assert "backup" in told.value.hint
    (tmp_path / "journal.made").unlink()
    Journal.open(tmp_path).close()


def test_a_running_daemon_notices_that_its_journal_was_removed_or_replaced(tmp_path: Path) -> None:
    """Rows written into a file without a name are lost with the process."""
    journal = Journal.open(tmp_path)
    assert journal.in_place()
    (tmp_path / "journal.db").rename(tmp_path / "away")
    gone = journal.in_place()
    (tmp_path / "journal.db").write_bytes(b"")
    replaced = journal.in_place()
    (tmp_path / "journal.db").unlink()
    (tmp_path / "away").rename(tmp_path / "journal.db")
    (tmp_path / "lock").unlink()

    assert (gone, replaced, journal.in_place()) == (False, False, False)
    journal.close()


def test_a_closed_journal_is_whole_without_its_wal(tmp_path: Path) -> None:
    """Whoever copies the file of a stopped daemon has all of it, also while a reader was left open."""
    journal = Journal.open(tmp_path)
    journal.append([batch(1, "x")])
    reader = ClaimReader(journal.path)
    journal.close()
    copy = tmp_path / "copy.db"
    copy.write_bytes((tmp_path / "journal.db").read_bytes())

    assert sqlite3.connect(copy).execute("SELECT count(*) FROM run").fetchone() == (1,)
    reader.close()


@pytest.mark.parametrize("kept", [str.lower, str.upper])
@pytest.mark.parametrize("asked", [str.lower, str.upper, str.title])
def test_an_only_copy_is_found_however_its_collection_is_spelled(
    journal: Journal, kept: Callable[[str], str], asked: Callable[[str], str]
) -> None:
    """Also where an earlier version has kept it in capitals; the path is another one in capitals."""
    there = "globus://{}/raw/a.tif"
    copies = [{"rule": "r", "copies": [["/data/s/a", there.format(kept("ab-cd")), ""]]}]
    of = ReclaimSet(1, 1, (ReclaimFile(1, "s/a", (10, 7, 8, 9), ".h"),), copies)
    journal.append([ReclaimIntended(1, of, 10.0)])
    journal.append([ReclaimMoved(1, "confirmed", "", ("aside",), 20.0)])
    digest = hashlib.sha256(there.format(kept("ab-cd")).encode()).digest()
    with closing(sqlite3.connect(journal.path)) as sql, sql:
        sql.execute("UPDATE sole SET target = ?", (int.from_bytes(digest[:8], "big", signed=True),))
    place = there.format(asked("ab-cd"))

    assert journal.sole_copies([place]) == {"/data/s/a": frozenset({(10, 7)})}
    assert journal.sole_copies([place.replace("raw", "RAW")]) == {}


def test_who_has_taken_a_path_is_known_below_every_root(journal: Journal) -> None:
    """Only who has begun to send it since; what was thinned is not told."""
    journal.append([*finished(1, at=10.0), *finished(2, at=20.0), batch(3, at=30.0)])

    assert [row[0] for row in journal.taken_as("s", "f1", 5.0)] == [1]
    assert journal.taken_as("s", "f1", 1_000.0) == journal.taken_as("s", "f9", 0.0) == []
    assert [number for number, _ in journal.requests_after(1, 10)] == [2, 3]
    assert journal.requests_after(0, 1)[0][1] == {"action": "copy"}
