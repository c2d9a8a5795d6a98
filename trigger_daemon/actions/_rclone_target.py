"""Where an `rclone` rule delivers to, and what rclone is told of it.

A rule names a remote of rclone's own configuration and a path: no secret can
stand in it. Nothing passes through a shell, and what a person or a file name
may contain can become neither an option nor another remote.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trigger_daemon.core.grammar import OptionFault

RCLONE = "rclone"
OLDEST = (1, 63)  # before, files were written under their final names
TIMEOUT_MIN_S = 60
CONNECT_S = 15  # until a connection must stand

_TO = re.compile(r"(?P<remote>[\w.+@][\w.+@ -]*):(?P<path>.*)", re.DOTALL)
_LOCAL_FILE = re.compile(r"/[A-Za-z0-9_./@:=+,-]+")
# What rclone needs of our environment, and nothing by which flags of its own are set (RCLONE_INPLACE). One of
# AWS_CA_BUNDLE, which versions of it fail on, is left out.
_OF_ENVIRONMENT = re.compile(
    r"PATH|HOME|TMPDIR|XDG_CONFIG_HOME|RCLONE_CONFIG(_\w+)?|AWS_(?!CA_BUNDLE$)\w+|AZURE_\w+|GOOGLE_\w+|OS_\w+|"
    r"SSL_CERT_(FILE|DIR)|SSH_AUTH_SOCK|(?i:https?_proxy|no_proxy|all_proxy)"
)
# rclone lists names line by line, and has stand-ins for what a remote cannot hold, of which these are some.
_REFUSED = re.compile("[\0-\x1f\x7f\u201b\u2400-\u2421]")


@dataclass(frozen=True, slots=True)
class Target:
    """A directory of a remote. `static`: up to the first name that holds a template, all of `path` without one."""

    remote: str
    path: str
    static: str

    @property
    def seat(self) -> str:
        """Return the word for what is down when it is down."""
        return f"rclone:{self.remote}"

    def url(self, path: str = "") -> str:
        """Return what rclone calls this directory, or a file below it."""
        return f"{self.remote}:{joined(self.path, path)}"


def joined(*parts: str) -> str:
    """Return a path of several; the first alone says whether it is absolute."""
    return "/".join(part if part == "/" else part.rstrip("/") for part in parts if part).replace("//", "/", 1)


def target_of(options: Mapping[str, Any], written: str | None = None) -> Target:
    """Return the place that `to` names; `written` is `to` as the rule has it, with templates. Raises OptionFault."""
    to = str(options["to"])
    remote, path = _parsed(to)
    remote_written, fixed = _parsed(written or to)
    if remote != remote_written or "{" in remote:
        raise OptionFault("to", f"{to!r} is another remote than the rule names", "only the path can be a template")
    names = list(itertools.takewhile(lambda name: "{" not in name, fixed.split("/")))
    static = "/".join(names) or ("/" if fixed.startswith("/") else "")
    if static and not f"{path}/".startswith(f"{static.rstrip('/')}/"):
        raise OptionFault("to", f"{to!r} does not lie below {static}", "let captures be names, not paths")
    return Target(remote, path, static)


def _parsed(to: str) -> tuple[str, str]:
    """Return remote and path. Raises OptionFault."""
    if to.startswith("/"):
        raise OptionFault("to", f"{to!r} names no remote", "write NAME:path; for a directory here, take `copy`")
    if to.startswith(":") or "," in to.partition(":")[0]:
        raise OptionFault("to", f"{to!r} describes a remote itself",
                          "make it with `rclone config`, which keeps its secrets, and write NAME:path")  # fmt: skip
    found = _TO.fullmatch(to)
    if found is None:
        raise OptionFault("to", f"{to!r} is no destination of rclone", "write NAME:path, of a remote in rclone.conf")
    path = found["path"]
    if ".." in path.split("/"):
        raise OptionFault("to", f"{to!r} goes upwards", "write the path without `..`")
    if any(character in path for character in "\0\r\n"):
        raise OptionFault("to", f"{to!r} holds a line break", "write NAME:path")
    names = "/".join(name for name in path.split("/") if name not in ("", "."))
    return found["remote"], f"/{names}" if path.startswith("/") else names


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionFault for what does not go together."""
    target_of(options)
    if float(options.get("timeout", TIMEOUT_MIN_S)) < TIMEOUT_MIN_S:
        raise OptionFault("timeout", "is too short: a transfer may be stopped for half of it", "write 60s or more")
    config = options.get("config")
    if config is not None and not _LOCAL_FILE.fullmatch(config):
        raise OptionFault("config", f"{config!r} is no absolute path", "use letters, digits and / . _ - @ : = + , only")


def refused(path: str) -> str:
    """Return why rclone never takes a file of this name, '' if it does."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return "its name is not UTF-8, and rclone would give it another"
    if (found := _REFUSED.search(path)) is not None:
        return f"its name holds {found[0]!a}, which rclone's lists cannot carry"
    return ""


def program() -> str | None:
    """Return the path of rclone: on the PATH, or where this Python has its programs."""
    found = shutil.which(RCLONE) or shutil.which(RCLONE, path=os.path.dirname(sys.executable))
    return os.path.abspath(found) if found else None


def config_of(options: Mapping[str, Any]) -> str:
    """Return the path of rclone's configuration: the rule's, or that of the daemon's user."""
    if options.get("config"):
        return str(options["config"])
    if told := os.environ.get("RCLONE_CONFIG"):
        return told
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "rclone", "rclone.conf")


def environment() -> dict[str, str]:
    """Return what rclone is given of our environment."""
    kept = {name: value for name, value in os.environ.items() if _OF_ENVIRONMENT.fullmatch(name)}
    return {
        **kept, "LC_ALL": "C", "TZ": "UTC",
        # By names in the environment, where versions that do not know them pass over them. No bucket is made: a name
        # that is written wrongly would become one.
        "RCLONE_NO_UPDATE_DIR_MODTIME": "true", "RCLONE_S3_NO_CHECK_BUCKET": "true",
        "RCLONE_GCS_NO_CHECK_BUCKET": "true", "RCLONE_AZUREBLOB_NO_CHECK_CONTAINER": "true",
        "RCLONE_OOS_NO_CHECK_BUCKET": "true",
    }  # fmt: skip


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Return the options that every call has."""
    timeout_s = float(options.get("timeout") or TIMEOUT_MIN_S)
    tps = options.get("tpslimit")
    return [
        "--config", config_of(options), "--ask-password=false", "--use-json-log", "--log-level", "INFO",
        "--stats-log-level", "NOTICE", "--contimeout", f"{CONNECT_S}s", "--timeout", f"{int(timeout_s)}s",
        "--low-level-retries", str(options.get("retries") or 1), "--no-unicode-normalization",
        *(("--tpslimit", str(tps)) if tps else ()),
    ]  # fmt: skip
