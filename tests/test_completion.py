"""Completion in real shells: what TAB offers, by the scripts that are installed."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from trigger_daemon.cli import program

SILENT_S = 15.0
SHELLS = ("bash", "zsh", "fish")
# In each shell: load the script, complete "trigger-daemon $WORDS", and print what is offered, one a line.
ASK = {
    "bash": (
        'COMP_WORDS=(trigger-daemon "$@"); COMP_CWORD=$#; compopt() { files="$*"; };'
        " _trigger_daemon_completion trigger-daemon;"
        ' printf "%s\\n" "${COMPREPLY[@]}"; case $files in *default*) compgen -f -- "${@: -1}" ;; esac'
    ),
    "fish": 'complete -C "trigger-daemon $argv"',
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The program on the path, its scripts where shells look, and a file to be named."""
    base = tmp_path_factory.mktemp("shells")
    program = base / "bin" / "trigger-daemon"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m trigger_daemon "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "HOME": str(base), "PATH": f"{program.parent}:{os.environ['PATH']}", "SITE": str(base),
           "XDG_CONFIG_HOME": str(base / "config"), "TERM": "dumb"}  # fmt: skip
    for shell, name in (("bash", "completion.sh"), ("zsh", "_trigger-daemon"),
                        ("fish", "config/fish/completions/trigger-daemon.fish")):  # fmt: skip
        said = subprocess.run([program], env={**env, "_TRIGGER_DAEMON_COMPLETE": f"{shell}_source"}, check=True,
                              capture_output=True, text=True)  # fmt: skip
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(said.stdout)
    (base / "movie 17.tif").touch()
    return env


def offered(shell: str, env: dict[str, str], wanted: str, *words: str) -> str:
    """Return what the shell offers, or makes of the line; zsh, which completes at a terminal only, until it has."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    if shell == "zsh":
        return _typed(["zsh", "-f", "-i"], env, wanted, " ".join(words))
    argv = {
        "bash": ["bash", "-c", f'. "$SITE/completion.sh"; {ASK["bash"]}', "bash", *words],
        "fish": ["fish", "-c", ASK["fish"], " ".join(words)],
    }[shell]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, cwd=env["HOME"])
    return done.stdout + done.stderr


def _typed(argv: list[str], env: dict[str, str], wanted: str, words: str) -> str:
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs, cwd=env["HOME"],
                             start_new_session=True)  # fmt: skip
    os.close(theirs)
    try:
        os.write(ours, b"fpath=($SITE $fpath); autoload -U compinit; compinit -u; print re''ady\n")
        _heard(ours, "ready")
        os.write(ours, f"trigger-daemon {words}\t".encode())
        return _heard(ours, wanted)
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _heard(terminal: int, wanted: str) -> str:
    """Return what a terminal has shown once it has shown what is wanted, or for long nothing."""
    shown = ""
    while wanted not in shown and select.select([terminal], [], [], SILENT_S)[0]:
        shown += os.read(terminal, 65_536).decode(errors="replace")
    return shown


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_verbs_and_files(shell: str, site: dict[str, str]) -> None:
    """What begins like a verb of the noun is completed, and where a path is wanted, what is there."""
    assert "retry" in offered(shell, site, "retry", "runs", "re")
    assert "17.tif" in offered(shell, site, "17.tif", "explain", str(Path(site["HOME"]) / "movie"))


@pytest.mark.parametrize("words", [
    ["explain"], ["files", "go"], ["files", "skip"], ["files", "resend"], ["doctor"], ["roots", "accept"],
    ["rules", "check"], ["rules", "replay"], ["journal", "export", "-o"], ["serve", "--record"], ["status", "--config"],
])  # fmt: skip
def test_every_path_is_completed(words: list[str]) -> None:
    """Wherever a command takes a path, the shell is told to offer files."""
    offers = ShellComplete(program, {}, "trigger-daemon", "_").get_completions(words, "/da")

    assert [(one.type, one.value) for one in offers] == [("file", "/da")]
