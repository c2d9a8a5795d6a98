"""Photographs of the command line: a real daemon in a made scene, its screens taken from a real terminal.

    python -m tests.photographs docs/images

Needs root, Linux and tmux: it makes a mount and a host name space of its own,
in which /mnt holds small disks in memory. The pictures differ a little each
time (times, rates); they are looked at by people, and compared by nobody.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

MB = 10**6
HOST = "krios1"
INSIDE = "PHOTOGRAPHS_INSIDE"
MNT = Path("/mnt")
DATA, ARCHIVE, STATE = MNT / "krios1", MNT / "archive", MNT / "daemon"
DISKS = {DATA: "900m", ARCHIVE: "420m", STATE: "200m"}
UNTIL_S = 120.0  # a scene takes its time

THEME = TerminalTheme(
    (24, 27, 31), (208, 212, 216),
    [(24, 27, 31), (224, 108, 117), (126, 198, 118), (229, 192, 103), (97, 175, 239), (198, 120, 221), (86, 182, 194),
     (208, 212, 216)],
    [(120, 126, 134), (240, 128, 136), (152, 215, 142), (240, 210, 130), (130, 195, 250), (215, 150, 235),
     (120, 205, 215), (245, 247, 250)],
)  # fmt: skip

CELL, LINE, PAD, BAR = 8.4, 18, 12, 30  # of the drawing: a character's width, a line's height, around it, above it
FONT = '"DejaVu Sans Mono", Menlo, Consolas, monospace'


class Terminal:
    """A terminal of tmux, with a socket of its own."""

    def __init__(self, base: Path, columns: int, lines: int, env: dict[str, str]) -> None:
        self._tmux = ["tmux", "-u", "-S", str(base / f"tmux-{columns}x{lines}"), "-f", "/dev/null"]
        self._env = {**{k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}, **env,
                     "LC_ALL": "C.UTF-8"}  # fmt: skip
        self._run("new", "-d", "-x", str(columns), "-y", str(lines), "exec bash --norc --noprofile -i")
        self._run("set", "-g", "status", "off")
        self.columns = columns
        self.type("PS1='$ '; clear")

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], env=self._env, capture_output=True, text=True, check=True)
        return done.stdout

    def type(self, line: str) -> None:
        self._run("send-keys", "-t", "0", "-l", line)
        self._run("send-keys", "-t", "0", "Enter")

    def key(self, name: str) -> None:
        self._run("send-keys", "-t", "0", name)

    def screen(self) -> str:
        """Return what is on it, with its colours."""
        return self._run("capture-pane", "-p", "-e", "-t", "0")

    def settled(self, until: Callable[[str], bool]) -> str:
        """Return the screen once it shows what is awaited and has stood still for a moment."""
        end, before = time.monotonic() + UNTIL_S, ""
        while time.monotonic() < end:
            now = self.screen()
            if until(re.sub(r"\x1b\[[\d;]*m", "", now)) and now == before:
                return now
            before = now
            time.sleep(0.3)
        raise AssertionError(f"it never came:\n{before}")

    def close(self) -> None:
        self._run("kill-server")


def photograph(screen: str, columns: int, to: Path, title: str) -> None:
    """Write a screen as an SVG."""
    lines = screen.rstrip("\n").split("\n")
    while lines and re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip() in ("", "$"):
        lines.pop()
    console = Console(width=columns, force_terminal=True, color_system="truecolor", legacy_windows=False)
    width, height = columns * CELL + 2 * PAD, len(lines) * LINE + BAR + 2 * PAD
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-size="14">',
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#{_hex(THEME.background_color)}"/>',
        f'<text x="{width / 2:g}" y="20" fill="#888" text-anchor="middle" font-family="sans-serif">'
        f"{escape(title)}</text>",
        f"<g font-family='{FONT}'>",
    ]  # fmt: skip
    carried = ""  # what one line switches on holds for the next
    for number, line in enumerate(lines):
        column = 0
        for segment in Text.from_ansi(carried + line).render(console):
            words = segment.text.rstrip("\n")
            drawn += _words(words, column, number, segment.style or Style())
            column += cell_len(words)
        carried = "".join(re.findall(r"\x1b\[[\d;]*m", carried + line)[-8:])
    to.write_text("\n".join([*drawn, "</g></svg>"]) + "\n")


def _words(words: str, column: int, line: int, style: Style) -> list[str]:
    """Draw the words of one style, each piece at its place: fonts differ in width."""
    colour = style.color.get_truecolor(THEME) if style.color else THEME.foreground_color
    look = f' fill="#{_hex(colour)}"' + (' font-weight="bold"' if style.bold else "")
    look += ' opacity="0.65"' if style.dim else ""
    drawn = []
    for piece in re.finditer(r"\S+(?: \S+)*", words):
        x, y = PAD + (column + cell_len(words[: piece.start()])) * CELL, BAR + PAD + line * LINE + 12
        long = f' textLength="{cell_len(piece[0]) * CELL:g}"'
        drawn.append(f'<text x="{x:g}" y="{y}"{long}{look}>{escape(piece[0])}</text>')
    return drawn


def _hex(colour: Sequence[int]) -> str:
    return "".join(f"{part:02x}" for part in colour)


class Scene:
    """A microscope's workstation: movies, their metadata, an archive, and a tape store that is not mounted."""

    def __init__(self, base: Path) -> None:
        self.base = base
        (DATA / "grid1").mkdir(parents=True)
        for made in (STATE / "rules", ARCHIVE / "movies", ARCHIVE / "maps"):
            made.mkdir()
        self.config = STATE / "config.yaml"
        self.config.write_text(json.dumps({
            "state_dir": str(STATE), "rules_dir": str(STATE / "rules"), "sweep": {"every": "1s", "full": "5s"},
            "volumes": [{"path": str(ARCHIVE), "reserve": "60MB", "low": "20%", "critical": "5%"},
                        {"path": str(DATA), "low": "10%", "critical": "3%"}],
            "throttle": {"runs": 3, "bandwidth": "4MB/s"}, "log": {"format": "json"},
        }))  # fmt: skip
        self.rules(*self._first())
        self.env = {"TRIGGER_DAEMON_CONFIG": str(self.config), "PATH": f"{base}:{os.environ['PATH']}"}
        command = base / "trigger-daemon"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m trigger_daemon "$@"\n')
        command.chmod(0o755)
        with (base / "log").open("ab") as log:
            self.daemon = subprocess.Popen(
                [str(command), "serve"], env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.until(lambda: bool(self.json("status")["roots"]))

    def _first(self) -> list[dict[str, Any]]:
        quick = {"quiescence": "1s"}
        return [
            {"name": "krios-movies", "watch": str(DATA), "match": ["{grid}/{movie}.tiff"], "existing": "process",
             "complete": quick, "batch": {"group_by": ["grid"], "files": 20, "idle": "3s"},
             "start": {"copy": {"to": str(ARCHIVE / "movies")}}},
            {"name": "krios-maps", "watch": str(DATA), "match": ["{grid}/{map}.mrc"], "existing": "process",
             "complete": {**quick, "with": [{"file": "{grid}/{map}.xml", "wait": "1h", "missing": "block"}]},
             "batch": {"files": 4}, "start": {"copy": {"to": str(ARCHIVE / "maps")}}},
            {"name": "first-look", "watch": str(DATA), "match": ["{grid}/{movie}.tiff"], "existing": "process",
             "complete": quick, "start": {"command": {"run": ["/bin/true"]}}},
        ]  # fmt: skip

    def rules(self, *rules: dict[str, Any]) -> None:
        new = STATE / "rules" / ".new"
        new.write_text(json.dumps({"rules": list(rules)}))
        new.rename(STATE / "rules" / "rules.yaml")

    def with_tape(self) -> None:
        """Add a rule whose destination is not mounted, and one whose program fails."""
        tape = {"name": "krios-tape", "watch": str(DATA), "match": ["{grid}/{movie}.tiff"], "existing": "process",
                "complete": {"quiescence": "1s"}, "batch": {"group_by": ["grid"], "idle": "2s"},
                "start": {"copy": {"to": "/mnt/tape/krios1"}}}  # fmt: skip
        quality = {"name": "quality", "watch": str(DATA), "match": ["{grid}/{map}.mrc"], "existing": "process",
                   "complete": {"quiescence": "1s"},
                   "start": {"command": {"run": ["/bin/sh", "-c", "echo no CUDA device >&2; exit 3"]}}}  # fmt: skip
        self.rules(*self._first(), tape, quality)

    def movies(self, first: int, count: int, megabytes: float = 2.0) -> None:
        for number in range(first, first + count):
            (DATA / "grid1" / f"{number:04}_fractions.tiff").write_bytes(os.urandom(int(megabytes * MB)))

    def json(self, *words: str) -> Any:
        done = subprocess.run(
            [str(self.base / "trigger-daemon"), *words, "-F", "json"], env={**os.environ, **self.env},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return json.loads(done.stdout)

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + UNTIL_S
        while not holds():
            if time.monotonic() > end:
                raise AssertionError(f"it never came: {self.json('status')}\n{(self.base / 'log').read_text()[-3000:]}")
            time.sleep(0.3)

    def rule(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next((r for r in self.json("status")["rules"] if r["name"] == name), {})
        return found

    def troubled(self) -> bool:
        now = self.json("status")
        reasons = " ".join(group["why"] for group in now["waits"]["groups"])
        return len(now["alarms"]) >= 3 and "storage" in reasons and now["waiting_counts"]["HELD"] == 4

    def active(self) -> list[int]:
        return [run["run"] for run in self.json("status")["working"] if run["bytes_done"]]


def take(scene: Scene, out: Path) -> None:
    terminals = [Terminal(scene.base, 80, 24, scene.env), Terminal(scene.base, 120, 30, scene.env)]
    high = [Terminal(scene.base, 80, 60, scene.env)]

    def shoot(name: str, line: str, on: list[Terminal] = terminals) -> None:
        for terminal in on:
            terminal.type(f"clear; {line}")
            screen = terminal.settled(lambda text: text.rstrip().endswith("$"))
            photograph(screen, terminal.columns, out / f"{name}-{terminal.columns}.svg", line)

    def watch(name: str) -> None:
        for terminal in terminals:
            terminal.type("clear; trigger-daemon status --watch")
        for terminal in terminals:
            time.sleep(2.5)
            screen = terminal.screen()
            assert "q quits" in screen, screen
            to = out / f"{name}-{terminal.columns}.svg"
            photograph(screen, terminal.columns, to, "trigger-daemon status --watch")
        for terminal in terminals:
            terminal.key("q")

    try:
        scene.movies(0, 100)
        for number in range(3):
            (DATA / "grid1" / f"map{number}.mrc").write_bytes(os.urandom(MB))
            (DATA / "grid1" / f"map{number}.xml").write_text("<map/>")
        scene.until(lambda: len(scene.active()) == 3)
        shoot("status-well", "trigger-daemon status")
        shoot("run-active", f"trigger-daemon runs show {scene.active()[-1]}", high)
        watch("watch-well")
        scene.until(lambda: scene.rule("krios-movies")["files_done"] == 100)
        scene.with_tape()
        scene.movies(100, 150)
        (DATA / "grid1" / "map3.mrc").write_bytes(os.urandom(MB))
        scene.until(scene.troubled)
        shoot("status-trouble", "trigger-daemon status")
        watch("watch-trouble")
        shoot("storage", "trigger-daemon storage", high)
        held = scene.json("runs", "list", "--state", "HELD")["runs"][0]["id"]
        shoot("run-held", f"trigger-daemon runs show {held}", high)
        bad = STATE / "bad.yaml"
        bad.write_text("rules:\n  - name: krios-movies\n    watch: /mnt/krios1\n    match: ['{movie}.tiff']\n"
                       "    exsiting: process\n    complete: {quiescence: 30}\n"
                       "    start:\n      copy: {to: /mnt/archive}\n")  # fmt: skip
        shoot("error", f"trigger-daemon rules check {bad}; trigger-daemon runs retry 4711")
        scene.daemon.send_signal(signal.SIGTERM)
        scene.daemon.wait(30)
        shoot("status-down", "trigger-daemon status")
    finally:
        for terminal in terminals + high:
            terminal.close()


def main(out: Path) -> None:
    """Make the name spaces, then the scene in them."""
    out = out.resolve()
    if INSIDE not in os.environ:
        if os.getuid() != 0 or shutil.which("tmux") is None:
            sys.exit("photographs need root and tmux")
        again = [sys.executable, "-m", "tests.photographs", str(out)]
        done = subprocess.run(
            ["unshare", "--mount", "--uts", "--propagation", "private", *again],
            env={**os.environ, INSIDE: "1"}, check=False,
        )  # fmt: skip
        sys.exit(done.returncode)
    socket.sethostname(HOST)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(MNT)], check=True)
    for disk, size in DISKS.items():
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="td") as base:
        scene = Scene(Path(base))
        try:
            take(scene, out)
        finally:
            if scene.daemon.poll() is None:
                scene.daemon.kill()
                scene.daemon.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
