"""Runs inside the guest: serve a directory by NFS or SMB, mount it here, play the scenes, carry the results out.

    python -m tests.prove.guest.inside nfs|smb RESULTS

What the oracle needs ends below RESULTS, a directory for each role; and
`told.json`, what came of the scenes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.prove.guest.scenes import Role, Share, ShareStage, Told, behind, play

BASE = Path("/run/facility")  # on the guest's own tmpfs: what lies in it is served, state and all
ROLES: tuple[Role, ...] = ("watched", "destination")
TIMES = "times.json"
CACHE_S = 1  # the mounts keep attributes so long
SERVER_S = 20.0


class Server:
    """A server of this guest, and the mount of one of its directories."""

    name: str
    tick_ns = 1
    quiet_s = 2.0 * CACHE_S + 0.5
    prefix: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.point = BASE

    def mount(self, point: Path, served: Path) -> None:
        """Mount a served directory."""
        self.point = point
        self._mount(served.relative_to(BASE))

    def _mount(self, below: Path) -> None:
        raise NotImplementedError

    def lose(self) -> None:
        raise NotImplementedError

    def bring_back(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        call("umount", "-l", str(self.point))


class Nfs(Server):
    """The kernel's own server; without threads it answers nobody, and a soft mount gives EIO after seconds."""

    name = "NFS 4.2"

    def __init__(self) -> None:
        super().__init__()
        modules("nfsd", "nfs", "nfsv4")
        call("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        call("mount", "-t", "tmpfs", "tmpfs", "/var/lib/nfs")
        for directory in ("rpc_pipefs", "v4recovery"):
            Path("/var/lib/nfs", directory).mkdir()
        for table in ("etab", "rmtab"):
            Path("/var/lib/nfs", table).touch()
        call("exportfs", "-o", "rw,no_root_squash,fsid=0,insecure,no_subtree_check", f"*:{BASE}")
        call("rpc.mountd", "--no-nfs-version", "3")
        # After a restart it first waits for its former clients; here they are known to be one.
        call("rpc.nfsd", "--no-nfs-version", "3", "--grace-time", "10", "--lease-time", "10", "2")

    def _mount(self, below: Path) -> None:
        options = f"vers=4.2,soft,timeo=20,retrans=1,actimeo={CACHE_S}"
        call("mount", "-t", "nfs4", "-o", options, f"127.0.0.1:/{below}", str(self.point))

    def lose(self) -> None:
        Path("/proc/fs/nfsd/threads").write_text("0\n")

    def bring_back(self) -> None:
        Path("/proc/fs/nfsd/threads").write_text("2\n")


CONFIGURATION = """\
[global]
 interfaces = lo
 bind interfaces only = yes
 security = user
 map to guest = Bad User
 guest account = root
 smb ports = 445
 disable netbios = yes
 load printers = no
 disable spoolss = yes
 private dir = {own}
 state directory = {own}
 cache directory = {own}
 lock directory = {own}
 pid directory = {own}
 ncalrpc dir = {own}/rpc
 log file = {own}/log
[served]
 path = {base}
 guest ok = yes
 read only = no
 force user = root
"""


class Smb(Server):
    """Samba; killed, it leaves a mount that says 'Host is down' after a while."""

    name = "SMB 3.1.1"
    tick_ns = 100

    def __init__(self) -> None:
        super().__init__()
        modules(
            "cmac", "hmac", "md5", "md4", "sha256_generic", "sha512_generic", "aes_generic", "ccm", "gcm",
            "ghash-generic", "ctr", "ecb", "nls_utf8", "cifs",
        )  # fmt: skip
        own = Path("/run/samba")
        (own / "rpc").mkdir(parents=True)
        call("mount", "-t", "tmpfs", "tmpfs", "/var/log")  # it makes a directory there
        self._configuration = own / "smb.conf"
        self._configuration.write_text(CONFIGURATION.format(own=own, base=BASE))
        self.bring_back()

    def _mount(self, below: Path) -> None:
        options = f"guest,vers=3.1.1,soft,echo_interval=2,actimeo={CACHE_S}"
        call("mount", "-t", "cifs", "-o", options, f"//127.0.0.1/served/{below}", str(self.point))

    def lose(self) -> None:
        for process in Path("/proc").glob("[0-9]*/comm"):
            try:
                if process.read_text().strip() == "smbd":
                    os.kill(int(process.parent.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def bring_back(self) -> None:
        call("smbd", "-D", "-s", str(self._configuration))
        end = time.monotonic() + SERVER_S
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", 445), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"smbd does not answer: {(self._configuration.parent / 'log').read_text()[-500:]}")


SERVERS: dict[str, Callable[[], Server]] = {"nfs": Nfs, "smb": Smb}


def modules(*names: str) -> None:
    """Load modules of the guest's kernel."""
    for name in names:
        call("modprobe", "-q", "-d", "/run/modules", name)


def call(*command: str) -> None:
    """Run what must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}".strip())


def carry_out(stage: ShareStage, results: Path) -> None:
    """Copy record, trees and journal to the host."""
    results.mkdir(parents=True)
    times = {}  # the host's files take whole seconds from here
    for tree in ("data", "out"):
        shutil.copytree(stage.base / tree, results / tree)
        for path in (stage.base / tree).rglob("*"):
            times[str(path.relative_to(stage.base))] = path.lstat().st_mtime_ns
    (results / TIMES).write_text(json.dumps(times))
    for file in ("written", "executed"):
        shutil.copy(stage.base / file, results / file)
    shutil.copy(stage.site.log, results / "daemon.log")
    (results / "state").mkdir()
    journal, copy = stage.site.state / "journal.db", Path("/run/tmp/journal.db")
    copy.unlink(missing_ok=True)
    read, write = sqlite3.connect(f"file:{journal}?mode=ro", uri=True), sqlite3.connect(copy)
    read.backup(write)
    read.close()
    write.close()
    shutil.copy(copy, results / "state" / "journal.db")


def main(kind: str, results: Path) -> None:
    """Set the scene, play, carry out. Raises RuntimeError, whose words are the last of the output."""
    BASE.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(BASE)], check=True)
    began = time.monotonic()
    server = SERVERS[kind]()
    told = Told(seconds={"server": round(time.monotonic() - began, 1)})
    for role in ROLES:
        base = BASE / role
        for directory in (base / "share", behind(base, role)):
            directory.mkdir(parents=True)
        server.mount(base / "share", behind(base, role))
        share: Share = server
        stage = ShareStage(base, share, role)
        try:
            play(stage, told, restart=False, tell=lambda words: print(words, flush=True))
        finally:
            stage.close()
        carry_out(stage, results / role)
        server.unmount()
    (results / "told.json").write_text(json.dumps(asdict(told)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
