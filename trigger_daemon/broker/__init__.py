"""A broker, as who we go there, and which topics are the daemon's own. The library is not imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CREDENTIAL = "mqtt-password"  # its name among the service manager's credentials
# What the daemon says and hears below PREFIX/WORKSTATION/; nothing else may be said there.
OWN = frozenset({"status", "run", "alarm", "alarms", "storage", "reply", "hint", "order", "check"})


@dataclass(frozen=True, slots=True)
class Account:
    """Where the broker is, and as who we go there. Files are absolute paths, PEM but for the password."""

    host: str
    port: int
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    credential: str = ""  # name of the service manager's credential that holds the password, '' for none
    secured: bool = False  # by TLS
    ca: str | None = None  # None: what the system trusts
    certificate: str | None = None  # of ours, where the broker asks for one
    key: str | None = None
    keepalive_s: float = 30.0

    @property
    def at(self) -> str:
        """The broker, for people."""
        return f"{self.host}:{self.port}"


def account(written: Mapping[str, Any], credential: str = "") -> Account:
    """Return the account that sound settings, or a rule, describe; `tls` is a mapping of files, or true."""
    tls = written.get("tls")
    files = tls if isinstance(tls, Mapping) else {}
    return Account(
        host=str(written["host"]),
        port=int(written.get("port") or (1883 if tls in (None, False) else 8883)),
        user=written.get("user"),
        password=written.get("password"),
        password_file=written.get("password_file"),
        credential=credential,
        secured=tls not in (None, False),
        ca=files.get("ca"),
        certificate=files.get("certificate"),
        key=files.get("key"),
        keepalive_s=float(written.get("keepalive_s") or 30.0),
    )
