"""A systemd of its own to prove the service under: this machine's files in a container that forgets every write.

`Box` boots what lies below / with systemd-nspawn: the root is an overlay whose
upper half is memory, the network is a loopback, and none of this machine's own
services is started. What the package installs, it installs there.

Needs root, systemd-nspawn (systemd-container), dbus-daemon (dbus), nsenter and
unshare (util-linux). Limits by control groups (MemoryMax= and the like) and
devices are not to be had inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

BOOT_S = 60.0
DOWN_S = 10.0
GROUP_TRIES_MAX = 100  # 5 s
PR_SET_PDEATHSIG = 1  # prctl(2)
NEEDED = {  # command -> Debian package
    "systemd-nspawn": "systemd-container", "dbus-daemon": "dbus", "nsenter": "util-linux", "unshare": "util-linux",
}  # fmt: skip
# They want to change the machine, or only cost time.
MASKED = (
    "systemd-sysctl.service", "systemd-hwdb-update.service", "systemd-update-utmp.service", "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer", "systemd-networkd-wait-online.service", "apt-daily.timer",
    "apt-daily-upgrade.timer",
)  # fmt: skip
TARGET = """\
[Unit]
Requires=basic.target dbus.service
After=basic.target dbus.service
AllowIsolate=yes
"""


def missing() -> list[str]:
    """Return what stands in the way of a box here, in words; nothing if one can be had."""
    found = [f"{command} (Debian: {package})" for command, package in NEEDED.items() if shutil.which(command) is None]
    if os.geteuid() != 0:
        found.append("root")
    return found


class Box:
    """One booted container; `sh` runs commands in it. End it with `close`."""

    def __init__(self, base: Path, *, binds: dict[Path, str], room: str = "1500m") -> None:
        self.base = base
        self._root, self._upper = base / "root", base / "upper"
        self._console = base / "console"
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0  # the container's process 1, as seen from here
        for directory in (base, self._root, self._upper):
            directory.mkdir(exist_ok=True)
        try:
            self._boot(binds, room)
        except BaseException:
            self.close()
            raise

    # --------------------------------------------------------------------- up

    def _boot(self, binds: dict[Path, str], room: str) -> None:
        name = f"box-{uuid.uuid4().hex[:8]}"  # the same in all trees: nspawn takes it for granted
        groups = [tree / name for tree in _group_trees()]
        options = [f"--machine={name}", *(f"--bind={source}:{target}" for source, target in binds.items())]
        if not Path("/run/systemd/system").exists():
            options.append("--keep-unit")  # no service manager here that could make a scope for it
        script = Path(__file__).resolve()
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", sys.executable, "-I", str(script),
                 str(self.base), room, ":".join(map(str, groups)), *options],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + BOOT_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            self._first = self._first or self._find_first()
            if self._first and self._ask("systemctl", "is-system-running") in ("running", "degraded"):
                return
            time.sleep(0.05)  # another machine, as it were; there is no clock to pass
        raise RuntimeError(f"systemd did not come up:\n{self._console.read_text(errors='replace')[-2_000:]}")

    def _find_first(self) -> int:
        """Return the container's systemd, a child of systemd-nspawn, 0 before it is there."""
        assert self._process is not None
        try:
            for nspawn in _children(self._process.pid):
                for pid in _children(nspawn):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                        return pid
        except OSError:
            pass
        return 0

    def _ask(self, *command: str) -> str:
        return self._enter(command, timeout=10).stdout.strip()

    # ----------------------------------------------------------------- inside

    def _enter(self, command: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "",
               "DEBIAN_FRONTEND": "noninteractive"}  # fmt: skip
        return subprocess.run(
            ["nsenter", "--target", str(self._first), "--all", "--", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="surrogateescape",
            timeout=timeout, env=env,
        )  # fmt: skip

    def sh(self, script: str, *, check: bool = True, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
        """Run a line of shell as root in the container, outside every unit."""
        done = self._enter(("/bin/sh", "-ec", f"cd /; {script}"), timeout)
        if check and done.returncode:
            raise AssertionError(f"{script}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def out(self, script: str) -> str:
        """Return what a line of shell prints."""
        return self.sh(script).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Put a file there."""
        place = Path(f"/proc/{self._first}/root{path}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def show(self, unit: str, *names: str) -> Any:
        """Return a property of a unit; of several, each by its name."""
        pairs = self.out(f"systemctl show {unit} -p {','.join(names)}").splitlines()
        found = dict(pair.split("=", 1) for pair in pairs)
        return found[names[0]] if len(names) == 1 else found

    def written_by(self, uid: int) -> list[str]:
        """Return what was written by a user to the container's root, other file systems in it left out."""
        assert self._process is not None
        upper = Path(f"/proc/{self._process.pid}/root{self._upper}/written")
        return [f"/{path.relative_to(upper)}" for path in upper.rglob("*") if path.lstat().st_uid == uid]

    # ------------------------------------------------------------------- down

    def close(self) -> None:
        """Power it off, orderly if it can be, and leave nothing; idempotent."""
        if self._process is not None:
            if self._first and self._process.poll() is None:
                with contextlib.suppress(subprocess.SubprocessError):
                    self._enter(("systemctl", "poweroff", "--force"), DOWN_S)
            try:
                self._process.wait(DOWN_S)
            except subprocess.TimeoutExpired:
                self._process.terminate()
                self._process.wait(DOWN_S)
            self._process = None
        shutil.rmtree(self.base, ignore_errors=True)


def _group_trees() -> list[Path]:
    """Return where this process lies in cgroup2 and, where there is one, in systemd's own hierarchy of version 1."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controller, path = line.split(":", 2)
        own["2" if number == "0" else controller] = path.strip("/")
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "2" in own:
            found.append(Path(place, own["2"]))
        elif kind == "cgroup" and "name=systemd" in options.split(",") and "name=systemd" in own:
            found.append(Path(place, own["name=systemd"]))
    return found


def _boot_here(base: Path, room: str, groups: list[Path], options: list[str]) -> None:
    """In a mount namespace of our own, which ends with us: build the root, and boot it."""
    root, upper = base / "root", base / "upper"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room},mode=0755", "box", upper], check=True)
    for part in ("written", "work"):
        (upper / part).mkdir()
    layers = f"lowerdir=/,upperdir={upper}/written,workdir={upper}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "box", root], check=True)
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")  # nspawn refuses that of its host
    (root / "etc/hostname").write_text("workstation\n")
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)  # which would keep packages from starting their services
    system = root / "etc/systemd/system"
    for wanted in system.glob("*.wants"):
        shutil.rmtree(wanted)
    for name in MASKED:
        (system / name).unlink(missing_ok=True)
        (system / name).symlink_to("/dev/null")
    (system / "box.target").write_text(TARGET)
    for group in groups:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
    os.environ["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = "1"
    argv = [
        "systemd-nspawn", "--quiet", f"--directory={root}", "--register=no", "--private-network", "--link-journal=no",
        "--resolv-conf=off", "--hostname=workstation", "--console=pipe", *options, "--boot", "systemd.unit=box.target",
    ]  # fmt: skip
    try:
        _guard(subprocess.Popen(argv))
    finally:
        for group in groups:
            _remove_group(group)


def _guard(container: subprocess.Popen[bytes]) -> None:
    """Wait for the container's end; end it ourselves when we are told to, or when the tests have ended."""

    def end(*_: object) -> None:
        for pid in _children(container.pid):  # its process 1, without which nothing in it lives
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    container.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _remove_group(group: Path) -> None:
    with contextlib.suppress(OSError):
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    for _ in range(GROUP_TRIES_MAX):
        for directory in sorted([group, *(path for path in group.rglob("*") if path.is_dir())], reverse=True):
            with contextlib.suppress(OSError):
                directory.rmdir()
        if not group.exists():
            return
        time.sleep(0.05)  # the last processes are being taken away


if __name__ == "__main__":
    base, room, groups, *options = sys.argv[1:]
    _boot_here(Path(base), room, [Path(group) for group in groups.split(":") if group], options)
