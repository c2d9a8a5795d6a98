"""What is installed is whole, and is what is tested."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import trigger_daemon

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = bool(os.environ.get("TEST_INSTALLED"))


def test_the_installed_package_is_tested():
    """Under make, nothing is imported from the source folder, also not by a child process."""
    if not INSTALLED:
        assert trigger_daemon.__file__
        return

    child = subprocess.run(
        [sys.executable, "-c", "import trigger_daemon; print(trigger_daemon.__file__)"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30,
    )

    assert "site-packages" in Path(trigger_daemon.__file__).parts
    assert child.stdout.strip() == trigger_daemon.__file__


def test_what_is_no_python_is_installed_too():
    """Every data file of the source folder is in the installed package, byte for byte."""
    source = REPOSITORY / "trigger_daemon"
    data = [
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".swp"}
    ]

    assert Path("journal.sql") in data
    for path in data:
        installed = resources.files("trigger_daemon").joinpath(*path.parts)
        assert installed.read_bytes() == (source / path).read_bytes(), path


@pytest.mark.skipif(not INSTALLED, reason="only under make is there an installed distribution to ask")
def test_the_distribution_knows_its_version_and_command():
    """The version has one source, and the command is installed."""
    distribution = importlib.metadata.distribution("trigger-daemon")
    commands = {entry.name: entry.value for entry in distribution.entry_points.select(group="console_scripts")}

    assert distribution.version == trigger_daemon.__version__
    assert commands == {"trigger-daemon": "trigger_daemon.cli:main"}


def test_a_skip_is_a_failure_in_ci(pytester_run):
    """With CI=true a skipped test and a skipped module fail, and say why; without, they are skipped."""
    failed = pytester_run(CI="true")
    skipped = pytester_run(CI="")

    assert "1 passed" in failed
    assert re.search(r"2 failed|1 failed.*1 error", failed), failed
    assert "skipped in CI, where everything must run" in failed
    assert "1 passed, 2 skipped" in skipped


@pytest.fixture
def pytester_run(tmp_path: Path):
    """Run a small suite that skips, under the rules of this one, in a process of its own."""
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_ok(): pass\ndef test_skips(): pytest.skip('no such tool')\n"
    )
    (tmp_path / "test_b.py").write_text("import pytest\npytest.importorskip('no_such_module_here')\n")

    def run(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60,
        )
        return done.stdout

    return run
