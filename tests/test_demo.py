"""Laws of the demo: it ends by itself and well, its oracle is not to be deceived, and nothing stays behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from trigger_daemon.cli import text
from trigger_daemon.cli.demo import verdict
from trigger_daemon.cli.demo.facility import Facility
from trigger_daemon.config import load_rules, load_settings
from trigger_daemon.simulator import Written

RUN = [sys.executable, "-m", "trigger_daemon", "demo"]


def environment(tmp: Path) -> dict[str, str]:
    """The demo's temporary directories in ours, and settings of another daemon that must not reach it."""
    return {**os.environ, "TMPDIR": str(tmp), "TRIGGER_DAEMON_STATE_DIR": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}


def left(tmp: Path) -> list[str]:
    """What is left: files, and processes that were started by a demo in `tmp`."""
    found = [str(path) for path in tmp.rglob("*")]
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(tmp) in words and process.info["pid"] != os.getpid():
            found.append(words)
    return found


def test_the_demo_ends_by_itself_and_everything_arrived(tmp_path: Path) -> None:
    """Exit 0, each copy as its writer wrote it, the odd ones where they belong; and nothing is left behind."""
    done = subprocess.run([*RUN, "-F", "json"], env=environment(tmp_path), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{done.stdout[-3_000:]}\n{done.stderr[-3_000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    stages = {item["odd"]: {about["stage"] for about in item["rules"]} for item in found["odd"]}

    assert found["ok"] is True and found["why"] == []
    assert found["oracle"] == {
        "may_arrive": 433, "equal": 433, "missing": [], "different": [], "unexpected": [],
    }  # fmt: skip
    assert found["written"]["files"] == 436
    assert found["verified"]["files"] == 433 and found["verified"]["digests"] == ["xxh3"]
    assert {rule["rule"]: rule["done"] for rule in found["rules"]} == {
        "krios-tiff": 12, "krios-mrc": 4, "chip-qc": 60, "chip-images": 400,
    }  # fmt: skip
    assert stages == {
        "its companion comes 4 s late": {"verified"},
        "its companion never comes": {"blocked"},
        "its writer stopped after 17 of 40 frames": {"incomplete"},
        "an image, but not among the first of its chip": {"skipped", "verified"},
    }
    assert any("17 of 40 frames" in event for event in found["events"])
    assert found["directory"] is None
    said = io.StringIO()
    verdict.tell(text.console(said), found)
    assert "Everything arrived as it was written" in said.getvalue()
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_an_interrupted_demo_goes_on(tmp_path: Path, wait_until: Any, number: signal.Signals) -> None:
    """Ctrl-C and TERM leave neither file nor process; after KILL at least no process goes on."""
    demo = subprocess.Popen(
        RUN, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert demo.stdout is not None
    try:
        for line in demo.stdout:
            if "closed by" in line:  # the daemon runs, and a command is about to
                break
        demo.send_signal(number)
        rest = demo.communicate(timeout=60)[0]
    finally:
        demo.kill()
    assert demo.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], rest

    assert "Traceback" not in rest
    if number != signal.SIGKILL:
        assert left(tmp_path) == []
    else:
        wait_until(lambda: not [word for word in left(tmp_path) if "python" in word], 30, what="its daemon to end")


def test_a_directory_in_use_is_not_touched(tmp_path: Path) -> None:
    """`--dir` with something in it is refused, and what is there stays."""
    (tmp_path / "mine").write_text("precious")
    done = subprocess.run([*RUN, "--dir", str(tmp_path)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "not an empty directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ------------------------------------------------------------------------- oracle


@pytest.fixture
def arrived(tmp_path: Path) -> tuple[Facility, list[Written]]:
    """Three files of an instrument, of which two may arrive and did."""
    facility = Facility(tmp_path / "a \"b\" 'c' $d: # é")
    facility.lay_out()
    written = []
    for name, arrives in (("a.tiff", True), ("b.tiff", True), ("c.tiff", False)):
        data = name.encode() * 100
        path = facility.epu / "session" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if arrives:
            facility.copy_of(path).parent.mkdir(exist_ok=True)
            facility.copy_of(path).write_bytes(data)
        written.append(Written(path, hashlib.sha256(data).hexdigest(), len(data), "movie", arrives=arrives))
    return facility, written


def test_the_oracle_is_content_with_equal_copies_only(arrived: tuple[Facility, list[Written]]) -> None:
    """One flipped bit, a file that is not there, one that should not be, a forgotten temporary one: each is told."""
    facility, written = arrived
    assert verdict.compare(facility, written)["equal"] == 2
    a, b, c = (facility.copy_of(item.path) for item in written)
    a.write_bytes(a.read_bytes()[:-1] + b"\0")
    b.unlink()
    c.write_bytes(written[2].path.read_bytes())
    (c.parent / ".a.tiff.1-1").write_bytes(b"half")

    assert verdict.compare(facility, written) == {
        "may_arrive": 2, "equal": 0, "missing": [str(b)], "different": [str(a)],
        "unexpected": sorted([str(c), str(c.parent / ".a.tiff.1-1")]),
    }  # fmt: skip


def test_the_rules_of_the_demo_stand_in_any_directory(arrived: tuple[Facility, list[Written]]) -> None:
    """Quotes, blanks, dollars and letters in its path are taken as they are."""
    facility, _ = arrived
    found = load_rules(facility.rules)
    targets = {rule.name: rule.options.get("to") for rule in found.rules}

    assert found.faults == []
    assert {rule.watch for rule in found.rules} == {str(facility.epu), str(facility.ssx)}
    assert (targets["krios-tiff"], targets["chip-images"]) == ([str(facility.krios)], [str(facility.chips)])
    assert Path(load_settings(facility.config, {}).state_dir) == facility.state
