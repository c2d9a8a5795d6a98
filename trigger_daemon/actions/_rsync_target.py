"""Where an `rsync` rule delivers to, and what rsync and ssh are told of it.

Nothing here passes through a shell. What a person or a file name may contain
can become neither an option nor a command: hosts, users and paths of keys are
held to an alphabet, and every path stands behind `--`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trigger_daemon.core.grammar import OptionFault

SSH_PORT, DAEMON_PORT = 22, 873
TIMEOUT_MIN_S = 60
CONNECT_S = 15  # until a connection must stand
ALIVE_S, ALIVE_MAX = 15, 4  # ssh asks its peer this often; so many answers missing end it

_USER = r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
_HOST = r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])"
_SSH = re.compile(rf"{_USER}{_HOST}:(?P<path>/.*)", re.DOTALL)
_DAEMON = re.compile(rf"rsync://{_USER}{_HOST}(?::(?P<port>[0-9]+))?/(?P<path>[^/].*)", re.DOTALL)
_LOCAL_FILE = re.compile(r"/[A-Za-z0-9_./@:=+,-]+")
_FORMS = "write /mnt/archive, user@host:/archive or rsync://user@host/module/archive"

FOR = {  # option -> the kinds it means something to
    "port": ("ssh",), "identity": ("ssh",), "known_hosts": ("ssh",), "ssh_config": ("ssh",), "rrsync": ("ssh",),
    "password_file": ("daemon",), "compress": ("ssh", "daemon"),
}  # fmt: skip
FILES = ("identity", "known_hosts", "ssh_config", "password_file")
_KINDS = {"local": "a local directory", "ssh": "ssh", "daemon": "an rsync daemon"}


@dataclass(frozen=True, slots=True)
class Target:
    """A directory. `static` must exist there: up to the first name that holds a template, all of `path` without one."""

    kind: Literal["local", "ssh", "daemon"]
    user: str
    host: str
    port: int
    path: str  # of a daemon: module/path
    static: str

    @property
    def is_remote(self) -> bool:
        return self.kind != "local"

    @property
    def seat(self) -> str:
        """Return the word for what is down when it is down."""
        if self.kind == "local":
            return self.static
        plain = SSH_PORT if self.kind == "ssh" else DAEMON_PORT
        where = self.host if self.port == plain else f"{self.host}:{self.port}"
        return where if self.kind == "ssh" else f"rsync://{where}/{self.path.partition('/')[0]}"

    def url(self, path: str = "") -> str:
        """Return a name of this directory, or of a file below it, that no other place has."""
        below = f"{self.path}/{path}" if path else self.path
        if self.kind == "local":
            return below
        user = f"{self.user}@" if self.user else ""
        scheme, slash = ("ssh", "") if self.kind == "ssh" else ("rsync", "/")
        return f"{scheme}://{user}{self.host}:{self.port}{slash}{below}"

    def argument(self, path: str) -> str:
        """Return what rsync calls a directory there. The dot at its end: rsync makes none that is missing."""
        if self.kind == "local":
            return f"{path}/."
        if self.kind == "daemon":
            user = f"{self.user}@" if self.user else ""
            return f"rsync://{user}{self.host}:{self.port}/{path}/."
        return f"{f'{self.user}@' if self.user else ''}{self.host}:{path}/."


def target_of(options: Mapping[str, Any], written: str | None = None) -> Target:
    """Return the place that `to` names; `written` is `to` as the rule has it, with templates. Raises OptionFault."""
    to = str(options["to"])
    kind, user, host, port, path = _parsed(to)
    kind_written, *others, fixed = _parsed(written or to)
    if (kind_written, *others) != (kind, user, host, port):
        raise OptionFault("to", f"{to!r} is another host than the rule names", "only the path can be a template")
    static = "/".join(itertools.takewhile(lambda name: "{" not in name, fixed.split("/"))) or "/"
    if kind == "daemon" and "{" in fixed.partition("/")[0]:
        raise OptionFault("to", "the module cannot be a template", "write its name; the path behind it may be one")
    if not f"{path}/".startswith(f"{static.rstrip('/')}/"):
        raise OptionFault("to", f"{to!r} does not lie below {static}", "let captures be names, not paths")
    plain = {"local": 0, "ssh": SSH_PORT, "daemon": DAEMON_PORT}[kind]
    given = options.get("port") if kind == "ssh" else port
    number = plain if given is None else int(given)
    if kind != "local" and not 1 <= number <= 65_535:
        raise OptionFault("port" if kind == "ssh" else "to", f"{number} is no port", "take 1 to 65535")
    return Target(kind, user, host, number, path, static)


def _parsed(to: str) -> tuple[Literal["local", "ssh", "daemon"], str, str, int | None, str]:
    """Return kind, user, host, port and path. Raises OptionFault."""
    kind: Literal["local", "ssh", "daemon"] = "local"
    found = re.fullmatch(r"(?P<path>/.*)", to, re.DOTALL)
    if to.startswith("rsync://"):
        kind, found = "daemon", _DAEMON.fullmatch(to)
    elif not to.startswith("/"):
        kind, found = "ssh", _SSH.fullmatch(to)
    if found is None:
        raise OptionFault("to", f"{to!r} is no destination of rsync", _FORMS)
    parts = found.groupdict()
    path = parts["path"]
    if ".." in path.split("/"):
        raise OptionFault("to", f"{to!r} goes upwards", "write the path without `..`")
    if any(character in path for character in "\0\r\n"):
        raise OptionFault("to", f"{to!r} holds a line break", _FORMS)
    port = parts.get("port")
    path = "/".join(name for name in path.split("/") if name not in ("", "."))
    return kind, parts.get("user") or "", parts.get("host") or "", int(port) if port else None, (
        path if kind == "daemon" else f"/{path}"
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionFault for what does not go together, or could be taken for something else by rsync or ssh."""
    target = target_of(options)
    if float(options.get("timeout", TIMEOUT_MIN_S)) < TIMEOUT_MIN_S:
        raise OptionFault("timeout", "is too short: a transfer may be stopped for half of it", "write 60s or more")
    for name, kinds in FOR.items():
        if options.get(name) not in (None, False) and target.kind not in kinds:
            meant = " or ".join(_KINDS[kind] for kind in kinds)
            raise OptionFault(name, f"means nothing for {_KINDS[target.kind]}", f"it is for {meant}: leave it out")
    for name in FILES:
        path = options.get(name)
        if path is not None and not _LOCAL_FILE.fullmatch(path):
            why = f"{path!r} is no absolute path that ssh and rsync take as it is"
            raise OptionFault(name, why, "use letters, digits and / . _ - @ : = + , only")


def ssh_command(options: Mapping[str, Any], target: Target) -> list[str]:
    """Return ssh and its options. A host is never trusted that is not in a list of known hosts; nobody is asked."""
    known, identity = options.get("known_hosts"), options.get("identity")
    return [
        "ssh", "-F", options.get("ssh_config") or "none", "-p", str(target.port), "-T",
        *(("-i", identity, "-o", "IdentitiesOnly=yes") if identity else ()),
        *(("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=none") if known else ()),
        "-o", "StrictHostKeyChecking=yes", "-o", "UpdateHostKeys=no", "-o", "BatchMode=yes",
        "-o", f"ConnectTimeout={CONNECT_S}", "-o", "TCPKeepAlive=yes",
        "-o", f"ServerAliveInterval={ALIVE_S}", "-o", f"ServerAliveCountMax={ALIVE_MAX}",
        "-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes",
        "-o", "ForwardAgent=no", "-o", "PermitLocalCommand=no", "-o", "LogLevel=ERROR",
    ]  # fmt: skip


def reaching(options: Mapping[str, Any], target: Target) -> list[str]:
    """Return the options of rsync that lead to the target."""
    # Paths go to the far side apart from the command that its shell sees; rrsync refuses that, there they are escaped.
    apart = ("--no-protect-args", "--no-old-args") if options.get("rrsync") else ("--protect-args",)
    if target.kind == "ssh":  # every word is of the alphabet above, so that rsync takes it apart as it was put together
        return [*apart, "--rsh", " ".join(ssh_command(options, target))]
    if target.kind == "daemon":
        password = options.get("password_file")
        return [*apart, f"--contimeout={CONNECT_S}", *((f"--password-file={password}",) if password else ())]
    return [*apart]


def environment() -> dict[str, str]:
    """Return what rsync and ssh need, and nothing that changes what they do: RSYNC_RSH, RSYNC_PASSWORD and the like."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
