"""Network shares: sshfs on this host, NFS 4.2 and SMB 3.1.1 in user-mode Linux, each with a server of its own.

The daemon watches the mount while the instrument writes on the server's side,
or copies to it; the server goes away mid-way and comes back. Judged by the
oracle, from the server's side.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import trigger_daemon
from tests.prove.guest.inside import TIMES
from tests.prove.guest.scenes import Role, ShareStage, Told, behind, play, scene_of
from tests.prove.oracle import judge
from tests.prove.results import Result

PART = "remote"
GUEST_S = 200.0  # a guest takes about 60 s
GUEST_MEMORY = "768M"
MOUNT_S = 10.0
END_S = 10.0
AT_ONCE = 4  # scenes, which mostly wait
GUEST = Path(__file__).parent / "guest"
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

# program -> Debian package
SSHFS_NEEDS = {
    "sshfs": "sshfs",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
GUEST_NEEDS = {
    "linux.uml": "user-mode-linux",
    "modprobe": "kmod",
    "ip": "iproute2",
    "setpriv": "util-linux",
    "gcc": "gcc",
}
SHARE_NEEDS = {
    "nfs": {"rpc.nfsd": "nfs-kernel-server", "mount.nfs4": "nfs-common"},
    "smb": {"smbd": "samba", "mount.cifs": "cifs-utils"},
}

Loss = Literal["connection killed", "client killed", "server hangs"]
LONG: tuple[tuple[Role, Loss], ...] = (
    ("destination", "server hangs"),
    ("watched", "server hangs"),
    ("watched", "client killed"),
)
SHORT: tuple[tuple[Role, Loss], ...] = (("watched", "connection killed"), ("destination", "connection killed"))


class SceneNotSet(Exception):
    """The machine cannot do this; says why."""


def run(*, quick: bool, seed: int, work: Path, tell: Callable[[str], None]) -> Result:
    """Prove the promises on shares; `quick`: sshfs alone, with the connection killed. The seed changes nothing."""
    scenes: dict[str, Callable[[], tuple[Told, list[str]]]] = {}
    if not quick:  # the longest first
        losses = LONG + SHORT
        scenes |= {name: partial(guest, work / name, name, tell) for name in SHARE_NEEDS}
    else:
        losses = SHORT
    for number, (role, loss) in enumerate(losses):
        # A copy that hangs is given up after two minutes: once is enough.
        restart = not quick and (role, loss) != ("destination", "server hangs")
        scene = partial(sshfs, work / f"sshfs{number}", role, loss, tell, restart=restart)
        scenes[f"sshfs, {role}, {loss}"] = scene
    figures: dict[str, int | float | str] = {}
    violations: list[str] = []
    not_done: list[str] = []
    rows: list[dict[str, str]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = {what: pool.submit(_timed, scene) for what, scene in scenes.items()}
        for what, future in began.items():
            try:
                told, broken, took_s = future.result()
            except SceneNotSet as why:
                not_done.append(f"{what}: {why}")
                tell(f"{what}: not done: {why}")
                continue
            figures[f"{what}, s"] = round(took_s, 1)
            violations += [f"{what}: {words}" for words in broken]
            rows += told.rows
    for words in violations:
        tell(f"BROKEN: {words}")
    not_done.append(
        "a rewrite that leaves size and time alike: SFTP tells whole seconds, so over sshfs two contents of one size"
        " within one second are one version"
    )
    return Result(PART, figures, violations, not_done, rows)


def _timed(scene: Callable[[], tuple[Told, list[str]]]) -> tuple[Told, list[str], float]:
    began = time.monotonic()
    told, violations = scene()
    return told, [*told.broken, *violations], time.monotonic() - began


# ---------------------------------------------------------------------------- sshfs


def sshfs(
    base: Path,
    role: Role,
    loss: Loss,
    tell: Callable[[str], None],
    *,
    restart: bool = True,
    sabotage: Callable[[ShareStage], None] = lambda stage: None,
) -> tuple[Told, list[str]]:
    """Play the scenes over sshfs; return what came of them, and every broken promise. Raises SceneNotSet.

    `sabotage` is done to the stage before, by tests that ask whether it would be noticed.
    """
    for directory in (base / "share", behind(base, role)):
        directory.mkdir(parents=True)
    told = Told()
    with Sshfs(base / "ssh", base / "share", behind(base, role), loss) as share:
        stage = ShareStage(base, share, role)
        try:
            sabotage(stage)
            play(stage, told, restart=restart, tell=tell)
        finally:
            stage.close()
    violations = [f"{law}: {what}" for law, what in stage.judge(idle=not told.broken)]
    # Seen from here, where the share never was mounted: what was written while it was away.
    if strays := sorted(path.name for path in (base / "share").iterdir()):
        violations.append(f"partial: {strays[:5]} written into the mount point while nothing was mounted there")
    return told, violations


class Sshfs:
    """An sshd on 127.0.0.1 and an sshfs mount of it, in a mount namespace that ends with them. Raises SceneNotSet."""

    tick_ns = 1_000_000_000  # SFTP tells whole seconds

    def __init__(self, base: Path, point: Path, served: Path, loss: Loss) -> None:
        need(SSHFS_NEEDS)
        if os.geteuid() != 0:
            raise SceneNotSet("mounting needs root")
        # One of the losses without a cache of attributes, so that files are quiet sooner.
        self._cache_s = 0 if loss == "connection killed" else 1
        self.quiet_s = 2.0 * self._cache_s + 0.5
        self.name = f"sshfs: {loss}"
        self.point, self._served, self._base, self._loss = point, served, base, loss
        self._log = base / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._client: subprocess.Popen[bytes] | None = None
        self._stopped: list[int] = []

    def __enter__(self) -> Sshfs:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        base = self._base
        base.mkdir(mode=0o700, parents=True)
        for key in ("host", "user"):
            command = [found("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(base / key)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=20)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = {
            "Port": port, "ListenAddress": "127.0.0.1", "PidFile": "none", "HostKey": base / "host",
            "AuthorizedKeysFile": base / "user.pub", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes",
            "PasswordAuthentication": "no", "Subsystem": "sftp internal-sftp",
        }  # fmt: skip
        client = {
            "HostName": "127.0.0.1", "Port": port, "User": "root", "IdentityFile": base / "user",
            "IdentitiesOnly": "yes", "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR", "BatchMode": "yes",
        }  # fmt: skip
        (base / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        (base / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in client.items()))
        # sshd insists on /run/sshd. In a namespace of its own it gets one, and nothing is left behind.
        space = "mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd && echo && exec sleep 100000"
        keeper = self._start("unshare", "--mount", "--propagation", "private", "sh", "-c", space, told=True)
        enter = (found("nsenter"), f"--mount=/proc/{keeper.pid}/ns/mnt", "--")
        self.prefix = (found("setpriv"), "--pdeathsig", "KILL", *enter)
        # The first of a process namespace: whom it serves ends with it, stopped or not.
        alone = (found("unshare"), "--pid", "--fork", "--kill-child")
        around = self._start(*self.prefix, *alone, found("sshd"), "-D", "-e", "-f", str(base / "sshd_config"))
        _until(lambda: _answers(port), MOUNT_S, lambda: f"sshd does not answer: {self._words()}")
        self._server = next(_descendants(around.pid))
        self._mount()

    def _mount(self) -> None:
        keeps = ",".join(f"dcache{what}_timeout={self._cache_s}" for what in ("", "_stat", "_dir"))
        options = f"entry_timeout=0,attr_timeout=0,{keeps if self._cache_s else 'dir_cache=no'}"
        where = [f"127.0.0.1:{self._served}", str(self.point)]
        command = [found("sshfs"), "-f", "-F", str(self._base / "ssh_config"), "-o", options, *where]
        self._client = self._start(*self.prefix, *command)
        _until(lambda: self._mounted() or self._ended(), MOUNT_S, lambda: f"sshfs does not mount: {self._words()}")
        if self._ended():
            raise SceneNotSet(f"sshfs ended: {self._words()}")

    def _start(self, *command: str, told: bool = False) -> subprocess.Popen[bytes]:
        """Start what ends with us; `told`: once it has said a line."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [found("setpriv"), "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if told else log,
                stderr=log,
            )
        self._processes.append(process)
        if told and process.stdout and not process.stdout.readline():
            raise SceneNotSet(f"no mount namespace: {self._words()}")
        return process

    def _mounted(self) -> bool:
        table = Path(f"/proc/{self._processes[0].pid}/mountinfo").read_text()
        return any(line.split()[4] == str(self.point) for line in table.splitlines())

    def _ended(self) -> bool:
        return self._client is not None and self._client.poll() is not None

    def _words(self) -> str:
        return self._log.read_text(errors="replace")[-500:].strip()

    # The server goes, and comes back

    def lose(self) -> None:
        assert self._client is not None
        serving = list(_descendants(self._server))
        match self._loss:
            case "connection killed":  # sshfs ends by itself, and leaves an empty directory
                _signal(serving, signal.SIGKILL)
                _until(lambda: self._ended() and not self._mounted(), END_S, lambda: "sshfs outlives its connection")
            case "client killed":  # the mount stays, and says ENOTCONN
                self._client.kill()
                self._client.wait(END_S)
            case "server hangs":  # calls wait
                _signal(serving, signal.SIGSTOP)
                self._stopped = serving

    def bring_back(self) -> None:
        if self._stopped:
            _signal(self._stopped, signal.SIGCONT)
            self._stopped = []
            return
        if self._mounted():
            subprocess.run([*self.prefix, "umount", "-l", str(self.point)], check=True, timeout=END_S)
        self._mount()

    def close(self) -> None:
        """End all of it; the mounts go with their namespace."""
        for process in reversed(self._processes):
            process.kill()
            process.wait(END_S)
            if process.stdout:
                process.stdout.close()


# ------------------------------------------------------------------ user-mode Linux


def guest(base: Path, name: str, tell: Callable[[str], None]) -> tuple[Told, list[str]]:
    """Play the scenes in a guest with a server of this kind, and judge what it left. Raises SceneNotSet."""
    need(GUEST_NEEDS | SHARE_NEEDS[name])
    exchange = base / "exchange"
    exchange.mkdir(parents=True)
    if " " in str(exchange):
        raise SceneNotSet(f"{exchange} has a blank in it, which a kernel's command line cannot hold")
    module = "tests.prove.guest.inside"
    _write_command(exchange, sys.executable, "-P", "-m", module, name, "/run/exchange/results")
    began = time.monotonic()
    _boot(exchange)
    took = time.monotonic() - began
    said = exchange / "results" / "told.json"
    if not said.exists():
        words = exchange / "output" if (exchange / "output").exists() else base / "console"
        last = words.read_text(errors="replace")[-700:].strip()
        raise SceneNotSet(f"ended after {took:.0f} s without results: {last}")
    told = Told(**json.loads(said.read_text()))
    for row in told.rows:
        tell(f"{row['share']}: {row['what was done']}: {row['what status said']}; {row['result']}")
    violations = []
    for role in told.quiet_s:
        results = exchange / "results" / role
        for path, mtime_ns in json.loads((results / TIMES).read_text()).items():
            os.utime(results / path, ns=(mtime_ns, mtime_ns))
        scene = scene_of(results, told.quiet_s[role])
        violations += [f"{role}: {law}: {what}" for law, what in judge(scene, idle=not told.broken)]
    return told, violations


def _write_command(exchange: Path, *command: str) -> None:
    """Write what the guest's init runs: this very product and these tests, as they are imported here."""
    product, tests = Path(trigger_daemon.__file__).resolve().parents[1], Path(__file__).resolve().parents[2]
    for place in (product, tests, Path(sys.executable)):
        if place.parts[1] in ("dev", "run", "proc", "sys"):
            raise SceneNotSet(f"{place} is not to be seen in a guest")
    environment = {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(product), str(tests)])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
    }
    words = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    (exchange / "command").write_text("\n".join([*words, "exec " + shlex.join(command)]) + "\n")


def _boot(exchange: Path) -> None:
    """Run a guest to its end. Its processes are in a namespace that ends with us."""
    memory = next(str(place) for place in (Path("/dev/shm"), exchange) if os.access(place, os.W_OK))
    kernel = [
        found("linux.uml"), f"mem={GUEST_MEMORY}", "rootfstype=hostfs", "rootflags=/", "ro",
        f"init={GUEST / 'init'}", f"exchange={exchange}", "con=null", "con0=fd:0,fd:1", "con1=null", "ssl=null",
        "quiet", "loglevel=3",
    ]  # fmt: skip
    environment = {"HOME": str(exchange.parent), "TMPDIR": memory, "LD_PRELOAD": str(_fpu(exchange.parent))}
    console = exchange.parent / "console"
    with console.open("wb") as out:
        process = subprocess.Popen(
            [found("setpriv"), "--pdeathsig", "KILL", found("unshare"), "--pid", "--fork", "--kill-child", *kernel],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
        )
    try:
        _until(
            lambda: process.poll() is not None or b"Kernel panic" in console.read_bytes()[:10_000],
            GUEST_S,
            lambda: f"the guest did not end within {GUEST_S:g} s",
        )
    finally:
        process.kill()
        process.wait(END_S)


def _fpu(base: Path) -> Path:
    """Build what the guest's kernel needs on processors with a large vector state."""
    library = base / "fpu.so"
    command = [found("gcc"), "-O2", "-shared", "-fPIC", "-o", str(library), str(GUEST / "fpu.c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SceneNotSet(f"gcc: {done.stderr[-500:].strip()} (needs the Debian package libc6-dev)")
    return library


# ------------------------------------------------------------------------- machine


def need(programs: dict[str, str]) -> None:
    """Raise SceneNotSet unless all these programs are there."""
    missing = sorted({package for program, package in programs.items() if not _which(program)})
    if missing:
        raise SceneNotSet(f"needs the Debian packages {' '.join(missing)}")


def found(program: str) -> str:
    """Return the path of a program, also of one that only root's PATH has. Raises SceneNotSet."""
    path = _which(program)
    if path is None:
        raise SceneNotSet(f"{program} is missing")
    return path


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *SBIN]))


def _until(predicate: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            raise SceneNotSet(why())
        time.sleep(0.02)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes that this one made, and those that they made."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _signal(pids: Sequence[int] | Iterator[int], number: int) -> None:
    for pid in list(pids):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
