"""A journal that is damaged or gone: set aside, read as far as it goes, and gone on with care."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.prove.stage import Stage, content
from trigger_daemon.config import parse_rules
from trigger_daemon.core.rules import Rule
from trigger_daemon.errors import JournalDamaged, JournalError
from trigger_daemon.journal import Journal
from trigger_daemon.reader import faults_of
from trigger_daemon.salvage import ASIDE, salvage

NOW = 1_900_000_000.0


@pytest.fixture
def stage(shm_path: Path) -> Iterator[Stage]:
    made = Stage(shm_path)
    yield made
    made.close()


def damage(path: Path, kind: str) -> None:
    """Damage a file as disks, file systems and people do."""
    match kind:
        case "header":
            with path.open("r+b") as file:
                file.write(b"\0" * 4_096)
        case "page":
            with closing(sqlite3.connect(path)) as sql:  # of what a start reads
                (page,) = sql.execute("SELECT rootpage FROM sqlite_master WHERE name = 'rule_set'").fetchone()
            with path.open("r+b") as file:
                file.seek((page - 1) * 4_096)
                file.write(b"\xa5" * 4_096)
        case "gone":
            path.unlink()


@pytest.mark.parametrize("kind", ["header", "page", "gone"])
def test_after_a_recovery_nothing_is_lost_and_nothing_is_started_twice(stage: Stage, kind: str) -> None:
    """The start is refused with what to do; recovered, it is paused; unknown files are left out by name, or sent."""
    site = stage.site
    stage.before()
    site.start()
    stage.until_idle()
    site.kill()
    journal = site.state / "journal.db"
    with closing(sqlite3.connect(journal)) as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(journal, kind)
    stage.writer.whole("c/while-down.tif", content("w", 900))

    refused = site.cli("serve", check=False)
    assert refused.returncode == 4 and "journal recover" in refused.stderr, refused.stderr
    told = site.json("journal", "recover", "--send", "copy")
    assert told["left_out"] == ["work"] and told["sent_again"] == ["copy"]
    assert bool(told["aside"]) == (kind != "gone") and told["problems"]
    assert site.json("journal", "check")["problems"] == []
    site.start()
    beat = site.json("status")
    assert any("recovered" in alarm["what"] for alarm in beat["alarms"])
    stage.writer.whole("c/after.tif", content("a", 950))
    executed = stage.executions.read_bytes()
    site.until(lambda: len(site.taken("work")) >= 1, 20, "the file written after the recovery is batched")
    assert stage.executions.read_bytes() == executed, "something was started before a person said so"

    site.cli("resume")
    site.until(
        lambda: not site.ask("SELECT 1 FROM run WHERE final = 0 AND state != 'HELD'")
        and (site.out / "c/after.tif").exists() and b"after.tif" in stage.executions.read_bytes(),
        30, "what is new has gone",
    )  # fmt: skip
    site.until(lambda: site.taken("copy").keys() >= {v for v in site.versions() if v[0].endswith(b".tif")}, 30, "sent")
    left_out = site.json("explain", str(site.data / "c/while-down.tif"))["rules"]
    stages = {rule["rule"]: rule["stage"] for rule in left_out}
    assert stages == {"copy": "verified", "work": "skipped"}
    violations = [v for v in stage.judge(idle=True) if not (v.law == "missed" and v.what.startswith("work:"))]
    # What was executed before and is not known any more was told; nothing was executed twice.
    violations = [v for v in violations if "knows of no run of it" not in v.what]
    assert violations == []
    site.cli("files", "resend", str(site.data / "c/while-down.tif"), "--rule", "work")
    site.until(lambda: b"while-down" in stage.executions.read_bytes(), 20, "it is sent when a person says so")
    site.stop()


def test_a_recovery_that_was_killed_is_called_again(stage: Stage) -> None:
    """At each of its steps: the damaged journal is never lost, and the second call ends it."""
    site = stage.site
    stage.before()
    site.start()
    stage.until_idle()
    site.kill()
    journal = site.state / "journal.db"
    wal = journal.with_name("journal.db-wal")
    before = (journal.read_bytes(), wal.read_bytes())
    damaged = bytearray(before[0])
    damaged[0:16] = b"\0" * 16
    for step in ("copy", "new", "db aside", "all aside"):
        for path in [*site.state.glob(f"{ASIDE}*/*")]:
            path.unlink()
        journal.write_bytes(damaged)
        wal.write_bytes(before[1])
        rules = rules_of(stage)
        if step == "copy":
            (site.state / "journal.copy").mkdir()
        if step == "new":
            (site.state / "journal.recovered").write_bytes(b"half")
        if step.endswith("aside"):
            (site.state / "journal.recovered").write_bytes(b"whole")
            aside = site.state / f"{ASIDE}2030-01-01T000000Z"
            aside.mkdir(exist_ok=True)
            journal.rename(aside / journal.name)
        if step == "all aside":
            wal.rename(aside / wal.name)
        told = salvage(site.state, rules, (), NOW)

        aside = Path(told.aside)
        assert (aside / journal.name).read_bytes() == bytes(damaged), step
        assert (aside / wal.name).read_bytes() == before[1], step
        assert {p.name for p in site.state.glob("journal.[!d]*")} == {"journal.made", "journal.last"}, step
        assert sound(journal)


def rules_of(stage: Stage) -> tuple[Rule, ...]:
    return parse_rules([("rules.yaml", json.dumps({"rules": stage.rules()}))]).rules


def sound(journal: Path) -> bool:
    with closing(sqlite3.connect(journal)) as sql:
        return faults_of(sql) == []


def test_a_sound_journal_is_not_touched(stage: Stage) -> None:
    stage.before()
    stage.site.start()
    stage.until_idle()
    with pytest.raises(JournalError, match="another"):
        salvage(stage.site.state, rules_of(stage), (), NOW)
    stage.site.stop()
    before = (stage.site.state / "journal.db").read_bytes()

    with pytest.raises(JournalError, match="is sound"):
        salvage(stage.site.state, rules_of(stage), (), NOW)
    assert (stage.site.state / "journal.db").read_bytes() == before


def test_whatever_is_damaged_the_recovered_journal_agrees_with_itself(stage: Stage) -> None:
    """A hundred journals with damaged pages, bytes or ends: each recovers, or is as good as before; never a crash."""
    for n in range(40):
        stage.writer.whole(f"many/{n}.tif", content(str(n), 100 + n))
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.stop()
    journal = stage.site.state / "journal.db"
    whole = journal.read_bytes()
    rand = random.Random(4)
    known = set(batches(journal))
    recovered = kept = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rand.randint(1, 4)):
            at = rand.randrange(len(data))
            match rand.randrange(3):
                case 0:
                    data[at] ^= 1 << rand.randrange(8)
                case 1:
                    page = at // 4_096 * 4_096
                    data[page : page + 4_096] = rand.randbytes(4_096)
                case 2:
                    del data[max(at, 8_192) :]
        for path in stage.site.state.glob(f"{ASIDE}*/*"):
            path.unlink()
        journal.write_bytes(data)
        try:
            told = salvage(stage.site.state, rules_of(stage), (), NOW)
        except JournalError as error:
            assert "is sound" in error.message
            continue
        recovered += 1
        kept += told.batches
        assert sound(journal)
        assert set(batches(journal)) <= known
        opened = Journal.open(stage.site.state)
        saved = opened.load()
        opened.close()
        assert saved.kept["paused"] and saved.last_batch >= 1_000_000
        assert all(run.state == "HELD" for run in saved.runs)

    assert recovered > 50 and kept > recovered * len(known) // 4, "most of most journals can be read"


def batches(journal: Path) -> list[int]:
    with closing(sqlite3.connect(journal)) as sql:
        return [number for (number,) in sql.execute("SELECT id FROM batch")]


@pytest.mark.parametrize("clean", [True, False])
def test_a_journal_with_a_damaged_page_is_not_opened_after_a_crash(stage: Stage, clean: bool) -> None:
    """SQLite would notice only when it reads the page; a claim that is not seen is a file sent twice."""
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.stop()
    journal = stage.site.state / "journal.db"
    if clean:
        os.truncate(journal, journal.stat().st_size - 4_096)
    else:
        stage.site.start()
        stage.site.kill()  # its -wal holds a page or two, and not the one below
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as sql:
            (page,) = sql.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ordered'").fetchone()
        assert journal.with_name("journal.db-wal").stat().st_size
        data = bytearray(journal.read_bytes())
        data[(page - 1) * 4_096 : page * 4_096] = b"\xa5" * 4_096
        journal.write_bytes(data)

    with pytest.raises(JournalDamaged, match="damaged"):
        Journal.open(stage.site.state)


@pytest.mark.parametrize("how", ["gone", "no header", "cut"])
def test_a_wal_that_was_taken_away_or_damaged_is_noticed(stage: Stage, how: str) -> None:
    """SQLite goes on without it in silence, and every program in it would be started again."""
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.kill()
    wal = stage.site.state / "journal.db-wal"
    if how == "gone":
        wal.unlink()
    elif how == "cut":
        os.truncate(wal, wal.stat().st_size // 8)
    else:
        wal.write_bytes(bytes(32) + wal.read_bytes()[32:])
    refused = stage.site.cli("serve", check=False)
    assert refused.returncode == 4 and "journal recover" in refused.stderr
    executed = stage.executions.read_bytes()

    told = stage.site.json("journal", "recover")
    assert any("batches up to" in words for words in told["problems"])
    stage.site.start()
    stage.site.cli("resume")
    stage.writer.whole("c/new.tif", content("new", 500))
    stage.site.until(lambda: b"new.tif" in stage.executions.read_bytes(), 30, "what is new goes")
    assert stage.executions.read_bytes().startswith(executed)
    assert stage.executions.read_bytes().count(b"1.tif") == executed.count(b"1.tif")


def test_a_second_loss_gives_no_number_again_and_sets_nothing_over_the_first(stage: Stage) -> None:
    """A provider that knows the number would take new work for old; and each damaged journal is kept."""
    site = stage.site
    rules = rules_of(stage)
    stage.before()
    site.start()
    stage.until_idle()
    site.kill()
    floors, kept = [], []
    for round_ in range(3):
        journal = site.state / "journal.db"
        if round_ == 1:
            for path in site.state.glob("journal.db*"):
                path.unlink()
        else:
            data = bytearray(journal.read_bytes())
            data[:16] = bytes(16)
            journal.write_bytes(data)
            kept.append(bytes(data))
        told = salvage(site.state, rules, (), NOW)
        assert bool(told.aside) == (round_ != 1)
        opened = Journal.open(site.state)
        floors.append(opened.load().last_batch)
        opened.close()

    assert floors == sorted(set(floors)) and floors[0] >= 1_000_000
    assert sorted(path.read_bytes() for path in site.state.glob(f"{ASIDE}*/journal.db")) == sorted(kept)


def test_what_a_run_left_out_is_not_claimed_by_a_recovery(stage: Stage) -> None:
    """A manifest tells who was in a batch; the journal knows who of them was left out."""
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.stop()
    journal = stage.site.state / "journal.db"
    with closing(sqlite3.connect(journal, isolation_level=None)) as sql:
        sql.execute("UPDATE claim SET rule = rule + 2199023255552 WHERE name = CAST('1.tif' AS BLOB) AND rule = 1")
        (page,) = sql.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ordered'").fetchone()
        before = sql.execute("SELECT rule, batch FROM claim WHERE name = CAST('1.tif' AS BLOB) ORDER BY 1").fetchall()
    data = bytearray(journal.read_bytes())
    data[(page - 1) * 4_096 : page * 4_096] = b"\xa5" * 4_096
    journal.write_bytes(data)
    salvage(stage.site.state, rules_of(stage), (), NOW)

    with closing(sqlite3.connect(journal)) as sql:
        after = sql.execute("SELECT rule, batch FROM claim WHERE name = CAST('1.tif' AS BLOB) ORDER BY 1").fetchall()
    assert after == before


@pytest.mark.parametrize(
    "damage_",
    [
        "UPDATE kept SET value = '{' || value", "UPDATE batch SET manifest = '[' || manifest",
        "UPDATE batch SET request = 'x' || request", "UPDATE batch SET captures = '['",
        "UPDATE run SET state = 'PENDIMG'", "UPDATE rule_set SET source = '{' || source",
        "UPDATE rule_set SET source = replace(source, 'file', 'fike')",
        "UPDATE batch SET manifest = replace(manifest, '[[1,', '[[3,')",
        "UPDATE batch SET manifest = replace(manifest, '[[1,', '[[1e400,')",
        "UPDATE batch SET manifest = replace(manifest, '.tif', '.t\\ud800')",
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_damage(stage: Stage, damage_: str) -> None:
    """One flipped bit in a JSON: the start says so, and the recovery takes the rest over."""
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.stop()
    journal = stage.site.state / "journal.db"
    with closing(sqlite3.connect(journal, isolation_level=None)) as sql:
        sql.execute("INSERT OR REPLACE INTO kept VALUES ('k', '1')")
        sql.execute("UPDATE run SET state = 'HELD', final = 0 WHERE id = 1")
        sql.execute(damage_)
    if "rule_set" in damage_ or "kept" in damage_:
        with pytest.raises(JournalDamaged, match="nobody wrote"), closing(Journal.open(stage.site.state)) as refused:
            refused.load()
    told = salvage(stage.site.state, rules_of(stage), (), NOW)

    assert told.problems and told.batches
    opened = Journal.open(stage.site.state)
    assert opened.load().kept["paused"] and opened.check() == []
    opened.close()


def test_a_rule_that_comes_back_after_a_recovery_sends_nothing_again(stage: Stage) -> None:
    """It was out for maintenance when the journal was recovered; its files of before are as unknown as the others'."""
    stage.before()
    stage.site.start()
    stage.until_idle()
    stage.site.stop()
    stage.site.write_rules(stage.rules()[0])
    damage(stage.site.state / "journal.db", "header")
    executed = stage.executions.read_bytes()
    stage.site.json("journal", "recover")
    stage.site.start()
    stage.site.cli("resume")
    stage.site.write_rules(*stage.rules())
    stage.writer.whole("c/new.tif", content("new", 500))
    stage.site.until(lambda: b"new.tif" in stage.executions.read_bytes(), 30, "what is new goes")

    assert stage.executions.read_bytes().startswith(executed)
    assert stage.executions.read_bytes().count(b"exit") == executed.count(b"exit") + 1


def test_a_program_is_not_executed_twice_if_its_file_is_away_for_a_moment(stage: Stage) -> None:
    """A program that ended has had its file, even where it cannot be found when it ends."""
    program = stage.base / "program.py"
    program.write_text(program.read_text().replace("os.write(out, (json", "time.sleep(1)\nos.write(out, (json"))
    stage.site.write_rules(stage.rules()[1])
    stage.site.start()
    stage.writer.whole("a/1.tif", content("1", 900))
    stage.site.until(lambda: bool(stage.site.ask("SELECT 1 FROM attempt")), 20, "the program runs")
    os.rename(stage.site.data / "a", stage.base / "away")
    stage.site.until(lambda: not stage.site.ask("SELECT 1 FROM run WHERE final = 0"), 20, "it has ended")
    os.rename(stage.base / "away", stage.site.data / "a")
    stage.writer.whole("a/2.tif", content("2", 900))
    stage.site.until(lambda: b"2.tif" in stage.executions.read_bytes(), 20, "the next one runs")

    assert stage.executions.read_bytes().count(b"1.tif") == 1
