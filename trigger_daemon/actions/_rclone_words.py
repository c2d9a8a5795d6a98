"""What an end of rclone means: its exit code and what it said, in words for who must act.

The exit code tells little: 1 is a wrong key as well as a full disk. So the
errors of its log are looked through, the most telling words before the others.
They are those of many services, as rclone gives them on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trigger_daemon.actions._copy_files import Trouble
from trigger_daemon.actions._rclone_target import Target

AGAIN = "the transfer goes on by itself"
RETRY = "then `trigger-daemon runs retry`"
WORDS_MAX = 400  # of what was said, for people
BUSY_AGAIN_S = 60.0  # a service that has had too many requests is left alone for this long
ROOM_AGAIN_S = 30.0

# (what is said, kind, scope, counts, again in s, hint); {remote} is filled in. First match wins.
_SAID: tuple[tuple[str, str, str, bool, float | None, str], ...] = (
    # ------------------------------------------------------------- configuration
    ("didn't find section in config file|didn't find backend called|couldn't find type field", "person",
     "destination", True, None,
     "is {remote} the name that `rclone listremotes` shows? correct `to` or `config` in the rule, " + RETRY),
    ("config file.*(decrypt|password)|unable to decrypt configuration|failed to load config", "person", "credential",
     True, None, "set RCLONE_CONFIG_PASS in the daemon's environment, or mend rclone.conf, " + RETRY),
    # ------------------------------------------------------------- too much at once
    (r"\b429\b|TooManyRequests|Too Many Requests|SlowDown|[rR]ateLimitExceeded|RequestLimitExceeded|too_many_requests|"
     r"[tT]oo busy|\b503\b|Service ?Unavailable|ServerBusy", "transient", "destination", False, BUSY_AGAIN_S,
     "it is left alone for a while; `tpslimit` and `transfers` ask it for less at once"),
    # ------------------------------------------------------------- no room
    (r"[nN]o space left|[qQ]uota|insufficient[_ ]?(space|storage)|Insufficient Storage|\b507\b|StorageFull|"
     r"EntityTooLarge.*bucket|not enough (free )?space", "transient", "destination", False, ROOM_AGAIN_S,
     "make room there; " + AGAIN),
    # ------------------------------------------------------------- keys and rights
    ("knownhosts:|host key|key mismatch", "person", "destination", True, None,
     "the host key is not the one that {remote} trusts: have its administrator tell you the key, correct the file that "
     "`known_hosts_file` names in rclone.conf, " + RETRY),
    (r"SignatureDoesNotMatch|InvalidAccessKeyId|InvalidToken|ExpiredToken|NoCredentialProviders|no valid credential|"
     r"\b401\b|Unauthorized|unable to authenticate|no supported methods remain|invalid_grant|invalid_client|"
     r"couldn't fetch token|token expired|expired_access_token|invalid_access_token|AuthenticationFailed|"
     r"failed to (read|parse) private key|couldn't (read|open) .*key|530 |login incorrect", "person", "credential",
     True, None,
     "its key, password or token is not accepted: correct {remote} with `rclone config` "
     "(`rclone config reconnect {remote}:` for a token that has ended), " + RETRY),
    ("RequestTimeTooSkewed", "person", "destination", True, None, "set this machine's clock, " + RETRY),
    (r"AccessDenied|Access Denied|\b403\b|Forbidden|[pP]ermission denied|Operation not permitted|"
     "insufficient_?[pP]ermissions|insufficientFilePermissions", "person", "destination", True, None,
     "give the user of {remote} the right to read and write there, " + RETRY),
    ("[rR]ead-only file system|read only", "person", "destination", True, None,
     "it cannot be written to: mount it writable, " + RETRY),
    # ------------------------------------------------------------- places
    ("NoSuchBucket|bucket does not exist|ContainerNotFound|The specified bucket", "person", "destination", True, None,
     "make the bucket, which the daemon never does, or correct `to` in the rule, " + RETRY),
    ("file name too long|File name too long|KeyTooLong|invalid (file ?)?name|Invalid argument|malformed_path",
     "permanent", "file", True, None, "the destination cannot hold this name; rename the file"),
    ("is a directory|not a directory|Is a directory|Not a directory|is a file not a directory", "person", "file", True,
     None, "move aside what stands in the way, " + RETRY),
    # ------------------------------------------------------------- the file
    ("corrupted on transfer|source file is being updated|can't copy - source file", "transient", "file", True, None,
     "it is transferred again by itself; if that repeats, look at the memory of both sides, and at what lies between"),
    # ------------------------------------------------------------- the line
    (r"no such host|connection refused|no route to host|network is unreachable|connection reset|broken pipe|"
     r"i/o timeout|timed? ?out|TLS handshake|handshake failed|unexpected EOF|\bEOF\b|connection lost|"
     r"connection aborted|use of closed network|server closed|deadline exceeded|\b50[024]\b|Bad Gateway|InternalError|"
     r"Internal Server Error|RequestTimeout|server misbehaving|couldn't connect", "transient", "destination",
     False, None,
     "is it running, and the line well? " + AGAIN),
    ("input/output error|stale (NFS )?file handle|[hH]ost is down|Transport endpoint", "transient", "destination",
     False, None, "is the disk, or the share, there well? " + AGAIN),
)  # fmt: skip

# Exit codes whose words told nothing: kind, scope, counts, what they mean.
_CODES = {
    2: ("person", "batch", True, "it does not know an option that it was given: is it too old?"),
    3: ("transient", "destination", False, "a directory is not there"),
    5: ("transient", "destination", True, "a fault that may pass"),
    7: ("person", "destination", True, "a fault that does not pass"),
    8: ("transient", "batch", True, "a limit of transfers was reached"),
}


class Complaints:
    """The errors of one call, from its log: few are kept, the first and the last."""

    MAX = 40

    def __init__(self) -> None:
        self._first: list[str] = []
        self._last: list[str] = []

    def take(self, told: dict[str, Any]) -> None:
        msg = str(told.get("msg", "")).strip()
        if told.get("level") not in ("error", "critical", "alert", "emergency") and not msg.startswith("Failed to "):
            return
        words = f"{told['object']}: {msg}" if told.get("object") and told["object"] not in msg else msg
        if words in self._first or words in self._last:
            return
        (self._first if len(self._first) < self.MAX else self._last).append(words)
        del self._last[: -self.MAX]

    def lines(self) -> list[str]:
        return self._first + self._last


def parsed(line: bytes) -> dict[str, Any]:
    """Return what a line of the log tells; {'msg': …} for one that is no JSON, as that of a crash is."""
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {"msg": line.decode("utf-8", "backslashreplace"), "level": "error"}


def trouble_of(code: int, said: Sequence[str], target: Target) -> Trouble:
    """Return what this end of an rclone means. `code` is negative for a signal."""
    words = "; ".join(said)
    shown = words if len(words) <= WORDS_MAX else f"{words[: WORDS_MAX // 2]} ... {words[-WORDS_MAX // 2 :]}"
    for pattern, kind, scope, counts, again_s, hint in _SAID:
        if re.search(pattern, words):
            return Trouble(kind, scope, f"{target.remote}: {shown}", hint.format(remote=target.remote), counts=counts,
                           retry_after_s=again_s)  # fmt: skip
    if code < 0:
        return Trouble("transient", "batch", f"rclone was killed by signal {-code}", "was memory short?")
    kind, scope, counts, meaning = _CODES.get(code, ("transient", "batch", True, "it does not say why"))
    why = f"rclone to {target.remote} ended with code {code} ({meaning})"
    return Trouble(kind, scope, f"{why}: {shown}" if shown else why, "" if kind == "transient" else f"mend it, {RETRY}",
                   counts=counts)  # fmt: skip
