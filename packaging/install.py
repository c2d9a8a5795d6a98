"""Install the daemon below a prefix: `make install`, and what the Debian package holds.

Everything lands below --destdir as it will lie on the machine: the program in
a virtual environment of its own, which knows no path but the final one, its
service, manual pages, completion, examples. What is in /etc already is kept.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PAGES = (
    ("cli", "trigger-daemon", 1, "watch an instrument's files, and start a transfer or a flow for each complete batch"),
    ("rules", "trigger-daemon.rules", 5, "rules of trigger-daemon: what to watch, when it is complete, what to start"),
    ("settings", "trigger-daemon.conf", 5, "settings of trigger-daemon"),
)
COMPLETION = {  # shell -> where it looks; zsh knows one place of the distribution's, and one of the machine's own
    "bash": "share/bash-completion/completions/trigger-daemon",
    "zsh": "share/zsh/{zsh}/_trigger-daemon",
    "fish": "share/fish/vendor_completions.d/trigger-daemon.fish",
}
DOCUMENTS = ("README.md", "CHANGELOG.md", "LICENSE")
NOT_INSTALLED = ("decisions", "images")  # of docs: for developers, and large


class Places:
    """Where things lie at the end, and where they are put now."""

    def __init__(self, destdir: str, prefix: str, opt: str) -> None:
        self.destdir = destdir.rstrip("/")
        self.prefix = Path(prefix)
        self.opt = Path(opt or (prefix + "/lib/trigger-daemon" if prefix != "/usr" else "/opt/trigger-daemon"))

    def now(self, final: Path | str) -> Path:
        """Return where what will be at `final` is put; its directory is there."""
        place = Path(f"{self.destdir}{final}")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


def install_program(places: Places, *, python: str, wheel: str, extras: str) -> None:
    """Make the environment with this wheel, for `python`; of its programs only ours stays."""
    opt = places.now(places.opt)
    shutil.rmtree(opt, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", "--symlinks", opt], check=True)
    pip = [sys.executable, "-m", "pip", "--python", opt / "bin" / "python", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, f"{wheel}[{extras}]" if extras else wheel], check=True)
    frozen = subprocess.run([*pip[:5], "freeze"], check=True, capture_output=True, text=True).stdout
    # Which versions are in it, for whoever has to answer for them.
    (opt / "versions.txt").write_text(re.sub(r"^trigger-daemon @.*\n", "", frozen, flags=re.MULTILINE))
    for file in (opt / "bin").iterdir():
        if not file.name.startswith("python") and file.name != "trigger-daemon":
            file.unlink()
    program = opt / "bin" / "trigger-daemon"
    # -I: neither the working directory nor variables of the caller's choose what is imported.
    program.write_text(
        f"#!{places.opt}/bin/python3 -I\nimport sys\n\nfrom trigger_daemon.cli import main\n\nsys.exit(main())\n"
    )
    home = os.path.dirname(python)
    (opt / "pyvenv.cfg").write_text(
        f"home = {home}\ninclude-system-site-packages = false\nversion = {_version(python)}\n"
    )
    for left in (opt / "lib64", opt / "include", opt / "share"):
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
    packages = next(opt.glob("lib/python3*/site-packages"))
    for tests in [*packages.glob("numpy/**/tests"), *packages.glob("h5py/tests")]:
        shutil.rmtree(tests)
    next(packages.glob("trigger_daemon-*/direct_url.json")).unlink()  # names the directory that this was built in
    # The service cannot write there, so that what is not compiled now would be compiled at each start.
    compiled = [python, "-m", "compileall", "-q", "-j0", "--invalidation-mode=unchecked-hash"]
    subprocess.run([*compiled, "-s", opt, "-p", places.opt, opt / "lib"], check=True)
    link = places.now(places.prefix / "bin" / "trigger-daemon")
    link.unlink(missing_ok=True)
    link.symlink_to(places.opt / "bin" / "trigger-daemon")


def _version(python: str) -> str:
    return subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"], check=True, capture_output=True, text=True
    ).stdout.strip()


def install_service(places: Places) -> None:
    """Put the unit, its user and its directories where systemd looks."""
    lib = places.prefix / "lib"
    unit = (HERE / "systemd" / "trigger-daemon.service").read_text()
    unit = unit.replace("/usr/bin/trigger-daemon", str(places.prefix / "bin" / "trigger-daemon"))
    _write(places.now(lib / "systemd/system/trigger-daemon.service"), unit)
    _write(places.now(lib / "sysusers.d/trigger-daemon.conf"), (HERE / "systemd" / "sysusers.conf").read_text())
    _write(places.now(lib / "tmpfiles.d/trigger-daemon.conf"), (HERE / "systemd" / "tmpfiles.conf").read_text())


def install_pages(places: Places, version: str) -> None:
    """Make the manual pages of the reference, and completion of the commands."""
    for source, name, section, what in PAGES:
        made = subprocess.run(
            [sys.executable, HERE / "man.py", REPOSITORY / f"docs/reference/{source}.md",
             name, str(section), version, what],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        _write(places.now(places.prefix / f"share/man/man{section}/{name}.{section}"), made.stdout)
    python = places.now(places.opt / "bin" / "python3")
    for shell, where in COMPLETION.items():
        made = subprocess.run(
            [python, "-I", "-m", "trigger_daemon"], check=True, capture_output=True, text=True,
            env={**os.environ, "_TRIGGER_DAEMON_COMPLETE": f"{shell}_source"},
        )  # fmt: skip
        zsh = "vendor-completions" if places.prefix == Path("/usr") else "site-functions"
        _write(places.now(places.prefix / where.format(zsh=zsh)), made.stdout)


def install_documents(places: Places) -> None:
    """Put documents and examples beside each other, and settings that watch nothing into /etc."""
    doc = places.prefix / "share/doc/trigger-daemon"
    for name in DOCUMENTS:
        _write(places.now(doc / ("copyright" if name == "LICENSE" else name)), (REPOSITORY / name).read_text())
    _write(places.now(doc / "examples/drop-in.conf"), (HERE / "systemd" / "drop-in.conf").read_text())
    for source, target in ((REPOSITORY / "rules", "examples/rules"), (REPOSITORY / "docs", "docs")):
        for file in _files(source):
            _write(places.now(doc / target / file.relative_to(source)), file.read_text())
    for name, final in (("config.yaml", "config.yaml"), ("rules-README", "rules/README")):
        place = places.now(f"/etc/trigger-daemon/{final}")
        if not place.exists():
            _write(place, (HERE / name).read_text())


def _files(top: Path) -> Iterator[Path]:
    return (path for path in sorted(top.rglob("*")) if path.is_file() and not set(path.parts) & set(NOT_INSTALLED))


def _write(place: Path, text: str) -> None:
    place.write_text(text)
    place.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--destdir", default="")
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--opt", default="", help="the environment's directory")
    parser.add_argument("--python", default="/usr/bin/python3", help="that it is for; the service must reach it")
    parser.add_argument("--wheel", required=True)
    parser.add_argument("--extras", default="")
    parser.add_argument("--version", required=True)
    given = parser.parse_args()
    os.umask(0o022)
    places = Places(given.destdir, given.prefix, given.opt)
    install_program(places, python=given.python, wheel=given.wheel, extras=given.extras)
    install_service(places)
    install_pages(places, given.version)
    install_documents(places)


if __name__ == "__main__":
    main()
