"""Laws of `journal export`: every file of every batch once, with all that is known of it, in bounded memory."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_journal import batch, finished, moved
from tests.test_reclaiming import Taking
from trigger_daemon import export as export_module
from trigger_daemon.cli.journal import _ended_by_signals, _write_whole
from trigger_daemon.core.model import Member, Ordered, ProofKept, RulesAccepted
from trigger_daemon.errors import TriggerError
from trigger_daemon.export import COLUMNS, Wanted, export
from trigger_daemon.journal import Journal

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal with rules a (1) and b (2) and the root /data (1)."""
    opened = Journal.open(tmp_path / "state")
    opened.rule_ids(["a", "b"])
    opened.root_id("/data")
    yield opened
    opened.close()


def told(journal: Journal, **wanted: Any) -> list[dict[str, Any]]:
    """Return the lines."""
    pages = export(journal.state_dir, Wanted(**wanted), "jsonl")
    return [json.loads(line) for page in pages for line in page.splitlines()]


def paths(lines: list[dict[str, Any]]) -> list[str]:
    return [line["path"] for line in lines if line["kind"] == "file"]


def command(state_dir: Path, *args: str, **keys: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "trigger_daemon", "journal", "export", *args],
        env={**os.environ, "TRIGGER_DAEMON_STATE_DIR": str(state_dir)}, stdin=subprocess.DEVNULL, capture_output=True,
        check=False, timeout=60, **keys,
    )  # fmt: skip


# ---------------------------------------------------------------------- what is told


def test_a_line_tells_the_whole_story_of_a_file(journal):
    """Which file, by which rule set, what became of its run and when, where to, proved by which digest."""
    journal.append([RulesAccepted([{"file": "r.yaml", "text": "old"}], 50.0)])
    journal.append([RulesAccepted([{"file": "r.yaml", "text": "new"}], 150.0)])
    journal.append(finished(1, at=100.0))
    (line,) = told(journal)

    assert list(line) == list(COLUMNS)
    said = {key: line[key] for key in ("kind", "rule", "rule_set", "run", "root", "path", "size", "mtime_ns", "state")}
    assert said == {
        "kind": "file", "rule": "a", "rule_set": 1, "run": 1, "root": "/data", "path": "s/f1", "size": 10,
        "mtime_ns": 7, "state": "VERIFIED",
    }  # fmt: skip
    assert (line["to"], line["digest"], line["handle"], line["action"]) == (["/mnt/f"], "xxh3:1", {"h": 1}, "copy")
    assert [move["to"] for move in line["transitions"]] == ["PENDING", "STARTING", "ACTIVE", "SUCCEEDED", "VERIFIED"]
    assert line["time"] == line["proof_time"] == "1970-01-01T00:01:40.000Z" and line["thinned"] is False


def test_orders_follow_with_who_and_why(journal):
    """What a person ordered is told after the files, with the reason given; not where one rule is asked for."""
    journal.append(finished(1, at=100.0))
    journal.append([Ordered(7, "runs.cancel", {"ids": [1]}, "ana (as root)", "wrong sample", {"ok": True}, 300.0)])

    assert [line["kind"] for line in told(journal)] == ["file", "order"]
    order = told(journal)[-1]
    assert (order["verb"], order["who"], order["why"]) == ("runs.cancel", "ana (as root)", "wrong sample")
    assert [line["kind"] for line in told(journal, rule="a")] == ["file"]


def test_the_newest_proof_counts(journal):
    """A batch that was copied twice is told where it lies now."""
    journal.append(finished(1, at=100.0)[:-2])
    for number in (1, 2):
        record = {"path": "s/f1", "digest": f"xxh3:{number}", "to": f"/mnt/{number}"}
        journal.append([ProofKept(1, number, [record], 90.0)])

    (line,) = told(journal)

    assert (line["digest"], line["to"]) == ("xxh3:2", ["/mnt/2"])


def test_what_was_thinned_is_told_by_its_claims(journal):
    """Of an old batch the file, its rule and its end stay; what is not known any more is said to be so."""
    journal.append(finished(1, at=100.0))
    journal.append(finished(2, at=900.0))
    journal.thin(500.0, 10)

    new, old = told(journal)

    assert (old["path"], old["rule"], old["state"], old["size"], old["thinned"]) == ("s/f1", "a", "VERIFIED", 10, True)
    assert old["digest"] is old["transitions"] is None
    assert (new["path"], new["thinned"]) == ("s/f2", False)
    assert told(journal, since=500.0) == [new] and told(journal, until=500.0) == [old]


def test_what_reclaim_deleted_is_told_with_its_proofs(tmp_path):
    """Of a file that is gone: when, why, and where each proved copy is, with its digest; and there it is."""
    store = Taking(tmp_path)
    try:
        store.begin()
        store.until_ended(1, "done")
        lines = [json.loads(line) for line in store.site.cli("journal", "export").stdout.splitlines()]
    finally:
        store.site.stop()
    (movie,) = [line for line in lines if line["rule"] == "disk" and line["path"] == "a.tif"]

    assert movie["reclaim_state"] == "done" and movie["reclaim_because"] and movie["reclaim_time"] > movie["proof_time"]
    proofs = movie["reclaim_proofs"]
    assert {proof["rule"] for proof in proofs} == {"disk", "tape"}
    assert all(Path(proof["to"]).is_file() and proof["digest"] == movie["digest"] for proof in proofs)
    assert not (store.site.data / "a.tif").exists()


# ---------------------------------------------------------------------------- which


def test_times_and_rules_choose_batches(journal):
    """`since` is included, `until` is not; a rule that never was is an error that names those that were."""
    for number in (1, 2, 3):
        journal.append([batch(number, rule=1 + number % 2, at=100.0 * number)])

    assert paths(told(journal, since=200.0)) == ["s/f2", "s/f3"]
    assert paths(told(journal, since=100.0, until=200.0)) == ["s/f1"]
    assert paths(told(journal, rule="b")) == ["s/f1", "s/f3"]
    with pytest.raises(TriggerError, match="knows no rule 'c'") as unknown:
        told(journal, rule="c")
    assert "a, b" in unknown.value.hint


@pytest.mark.parametrize("said", ["yesterday", "2026-13-01", "5"])
def test_a_time_that_is_none_is_refused(journal, said):
    """What cannot be read as a time is a fault of use, with the forms that can."""
    done = command(journal.state_dir, "--since", said)

    assert done.returncode == 2 and b"2026-11-25" in done.stderr and not done.stdout


def test_times_are_read_as_people_write_them(journal):
    """A day, an instant with a zone, and an age are understood."""
    journal.append(finished(1, at=1_800_000_000.0))  # 2027-01-15T08:00Z

    def lines(*args: str) -> int:
        return len(command(journal.state_dir, *args).stdout.splitlines())

    assert [lines("--since", said) for said in ("2027-01-14", "2027-01-15T08:00Z", "2027-01-15T08:01Z")] == [1, 1, 0]
    assert [lines("--until", said) for said in ("2027-01-15T08:00Z", "2027-01-17")] == [0, 1]
    assert lines("--since", "30000d") == 1


# ---------------------------------------------------------------------------- pages


def test_pages_lose_and_double_nothing(journal, monkeypatch):
    """However small the pages are, the lines are the same."""
    for number in range(1, 12):
        names = [f"n{number}-{n}" for n in range(number % 4 + 1)]
        at = 100.0 if number < 6 else 900.0
        journal.append([batch(number, *names, rule=1 + number % 2, directory=f"d{number % 3}", at=at)])
        journal.append([moved(number, "PENDING", "CANCELLED", final=True, at=at)])
        journal.append([Ordered(number, "pause", {}, "ana", "", {}, 900.0)])
    journal.thin(500.0, 100)
    whole = {form: b"".join(export(journal.state_dir, Wanted(), form)) for form in ("jsonl", "csv")}
    by_rule = told(journal, rule="b")
    for name in ("PAGE_FILES", "PAGE_BATCHES", "PAGE_IDS", "PAGE_CLAIMS", "PAGE_ORDERS", "LINES"):
        monkeypatch.setattr(export_module, name, 2)

    assert len(whole["jsonl"].splitlines()) == sum(n % 4 + 1 for n in range(1, 12)) + 11
    assert {form: b"".join(export(journal.state_dir, Wanted(), form)) for form in ("jsonl", "csv")} == whole
    assert told(journal, rule="b") == by_rule and len(by_rule) == sum(n % 4 + 1 for n in range(1, 12, 2))


def test_the_daemon_is_not_kept_between_two_pages(journal, monkeypatch):
    """A reader that stands still in the middle holds no snapshot: the -wal is folded, and new batches are not told."""
    monkeypatch.setattr(export_module, "PAGE_FILES", 1)
    for number in (1, 2, 3):
        journal.append(finished(number, at=100.0))
    pages = export(journal.state_dir, Wanted(), "jsonl")
    first = next(pages)

    journal.append(finished(4, at=100.0))
    busy, left, _ = _folded(journal.path)
    rest = b"".join(pages)

    assert (busy, left) == (0, 0) and journal.wal_bytes() == 0
    assert paths([json.loads(line) for line in (first + rest).splitlines()]) == ["s/f1", "s/f2", "s/f3"]


def test_a_batch_that_is_thinned_meanwhile_is_not_lost(journal, monkeypatch):
    """Thinned before its page came, it is told by its claims."""
    monkeypatch.setattr(export_module, "PAGE_FILES", 1)
    for number in (1, 2, 3):
        journal.append(finished(number, at=100.0))
    pages = export(journal.state_dir, Wanted(), "jsonl")
    first = next(pages)
    journal.thin(500.0, 10)
    lines = [json.loads(line) for line in (first + b"".join(pages)).splitlines()]

    assert {(path, line["thinned"]) for path, line in zip(paths(lines), lines, strict=True)} >= {
        ("s/f1", False), ("s/f2", True), ("s/f3", True),
    }  # fmt: skip


def _folded(path: Path) -> tuple[int, int, int]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()


def test_memory_does_not_grow_with_the_journal(tmp_path):
    """Ten times the lines take the memory of a few."""

    def peak_kib(batches: int) -> tuple[int, int]:
        state = tmp_path / str(batches)
        journal = Journal.open(state)
        journal.rule_ids(["a"])
        journal.root_id("/data")
        for number in range(1, batches + 1):
            members = [Member(1, f"d{number}", f"a-long-name-of-a-file-{n}", 10, 7) for n in range(500)]
            records = [{"path": member.path, "digest": "xxh3:1", "to": f"/mnt/{member.path}"} for member in members]
            journal.append([batch(number, members=members), ProofKept(number, 1, records, 1.0)])
        journal.close()
        code = (
            "import os, resource, sys\nfrom pathlib import Path\nfrom trigger_daemon.export import Wanted, export\n"
            "lines = sum(page.count(b'\\n') for page in export(Path(sys.argv[1]), Wanted(), 'jsonl'))\n"
            "print(lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        said = subprocess.run([sys.executable, "-c", code, str(state)], capture_output=True, text=True, check=True)
        lines, peak = map(int, said.stdout.split())
        return lines, peak

    (few, small), (many, large) = peak_kib(12), peak_kib(120)

    assert (few, many) == (6_000, 60_000)
    assert large < small + 8 * 1024


# ---------------------------------------------------------------------------- forms


def test_csv_says_what_jsonl_says(journal):
    """The table has the same cells; a name with an end of line, a quote or a byte that is no UTF-8 survives in both."""
    names = ["plain", 'two\nlines, "quoted"', os.fsdecode(b"caf\xe9"), "=1+1", "a\rreturn"]
    journal.append([batch(1, *names)])
    objects = told(journal)
    text = b"".join(export(journal.state_dir, Wanted(), "csv")).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))

    assert [os.fsdecode(os.fsencode(line["path"])) for line in objects] == [f"s/{name}" for name in names]
    assert [row["path"] for row in rows] == [f"s/{names[0]}", f"s/{names[1]}", "s/caf\\udce9", "s/=1+1", "s/a\rreturn"]
    for row, line in zip(rows, objects, strict=True):
        for column in set(COLUMNS) - {"path"}:
            value = line[column]
            shown = json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict | bool) else value
            assert row[column] == ("" if shown is None else str(shown)), column


def test_a_file_is_written_whole_or_not_at_all(journal, tmp_path):
    """What fails leaves the file that was there, and nothing beside it."""
    journal.append(finished(1, at=100.0))
    out = tmp_path / "audit" / "out.csv"
    out.parent.mkdir()
    out.write_text("before")

    failed = command(journal.state_dir, "-F", "csv", "-o", str(out), "--force", "--rule", "unknown")
    after_failure = (out.read_text(), os.listdir(out.parent))
    refused = command(journal.state_dir, "-F", "csv", "-o", str(out))
    after_refusal = (out.read_text(), os.listdir(out.parent))
    done = command(journal.state_dir, "-F", "csv", "-o", str(out), "--force")

    assert failed.returncode == 1 and b"there are: a, b" in failed.stderr
    assert refused.returncode == 1 and b"is there already" in refused.stderr and b"--force" in refused.stderr
    assert after_failure == after_refusal == ("before", ["out.csv"])
    assert done.returncode == 0 and done.stdout == b"" and b"1 line" in done.stderr
    assert len(out.read_text().splitlines()) == 2 and os.listdir(out.parent) == ["out.csv"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_ended_leaves_nothing_behind(tmp_path, number):
    """As Ctrl-C does; and the signals are as they were afterwards."""
    before = signal.getsignal(number)

    def pages():
        yield b"one\n"
        assert os.listdir(tmp_path) == [f".out.{os.getpid()}.new"]
        os.kill(os.getpid(), number)
        time.sleep(5)
        yield b"two\n"

    with pytest.raises(SystemExit) as ended, _ended_by_signals():
        _write_whole(str(tmp_path / "out"), pages(), force=False)

    assert ended.value.code == 128 + number and os.listdir(tmp_path) == []
    assert signal.getsignal(number) == before


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path):
    """It was looked for before, too; the second look is at the end."""

    def pages():
        (tmp_path / "out").write_text("somebody else's")
        yield b"one\n"

    with pytest.raises(TriggerError, match="is there already"):
        _write_whole(str(tmp_path / "out"), pages(), force=False)

    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "somebody else's"


def test_a_reader_that_leaves_early_is_no_error(journal):
    """`export | head` ends quietly."""
    journal.append([batch(1, *(f"f{n}" for n in range(5_000)))])
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -P -m trigger_daemon journal export | head -1"],
        env={**os.environ, "TRIGGER_DAEMON_STATE_DIR": str(journal.state_dir)}, capture_output=True, check=False,
        timeout=60,
    )  # fmt: skip

    assert done.stderr == b"" and len(done.stdout.splitlines()) == 1


def test_without_a_journal_it_says_so(tmp_path):
    """Nothing to tell is an error with a hint, not an empty file."""
    out = tmp_path / "out"

    done = command(tmp_path / "nowhere", "-o", str(out))

    assert done.returncode == 1 and b"hint:" in done.stderr and not out.exists()


def test_every_column_is_in_the_guide():
    """The guide says of each column what it means, in its order."""
    guide = (REPOSITORY / "docs" / "how-to" / "audit.md").read_text()

    assert re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE))) == list(COLUMNS)
