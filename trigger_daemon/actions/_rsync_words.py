"""What an end of rsync means: its exit code and what it, ssh and the far side said, in words for who must act.

The exit code alone tells little: 12 is a broken line as well as a missing
program, 23 a full disk as well as one unreadable file. So what was said is
looked through first, the most telling words before the others. All of it is
written with LC_ALL=C.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trigger_daemon.actions._copy_files import Trouble
from trigger_daemon.actions._rsync_target import Target
from trigger_daemon.points import ABSENT

AGAIN = "the transfer goes on by itself"
RETRY = "then `trigger-daemon runs retry`"
WORDS_MAX = 400  # of what was said, for people

# What is said of sources alone. Members that changed are looked for by their stat; what is left is unreadable.
_SOURCE = re.compile(
    r"file has vanished|link_stat .* failed|send_files failed to open|readlink_stat|read errors mapping|"
    r"skipping (non-regular file|directory)"
)

# (what is said, kind, scope, counts, what is put first, hint); names in braces are filled in. First match wins.
_SAID: tuple[tuple[str, str, str, bool, str, str], ...] = (
    # ------------------------------------------------------------- ssh
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "person", "destination", True,
     "the host key of {host} is not the known one",
     "is it the right machine? if its key was changed on purpose, ask its administrator for the new one, "
     "replace the line in {known}, " + RETRY),
    ("Host key verification failed|host key is known for", "person", "destination", True, "{host} is not known here",
     "have its administrator tell you the host key, put it into {known} (ssh-keyscan -p {port} {bare} shows what to "
     "compare), " + RETRY),
    ("UNPROTECTED PRIVATE KEY|bad permissions", "person", "credential", True, "the key {identity} is not private",
     "chmod 600 {identity}; it must belong to the daemon's user"),
    ("Identity file .* not accessible", "person", "credential", True, "the key {identity} cannot be read",
     "correct `identity` in the rule, or make the key readable for the daemon's user, for nobody else"),
    (r"Permission denied \((publickey|.*password|.*keyboard|gssapi)|Too many authentication failures", "person",
     "credential", True, "{host} does not accept the key",
     "put the public half of {identity} into ~/.ssh/authorized_keys of that user there, " + RETRY),
    ("Could not resolve hostname|getaddrinfo", "transient", "destination", False, "the name {bare} is not known",
     "is it written rightly, and is the name server well? " + AGAIN),
    (r"command not found|(?m:^\S*sh: .*(No such file or directory|not found|Permission denied)$)", "person",
     "destination", True, "there is no rsync on {host}", "install rsync there, " + RETRY),
    ("is your shell clean|protocol version mismatch", "person", "destination", True,
     "{host} says something else before rsync does",
     "the login scripts of that user there must print nothing: `ssh {host} true` shows what they print"),
    # ------------------------------------------------------------- the rsync daemon
    ("Unknown module", "person", "destination", True, "", "correct `to` in the rule, or rsyncd.conf there, " + RETRY),
    ("@ERROR: auth failed|password file|password mismatch", "person", "credential", True, "",
     "set `password_file` to a file with the module's password, of mode 0600 and owned by the daemon's user, " + RETRY),
    ("max connections", "transient", "destination", False, "", "it takes no more at once; " + AGAIN),
    ("@ERROR: access denied|@ERROR: invalid (uid|gid)", "person", "destination", True, "",
     "have its administrator allow this host in rsyncd.conf, " + RETRY),
    ("@ERROR: ch(dir|root) failed", "transient", "destination", False, "the module's directory is not there",
     "is its disk mounted there? " + AGAIN),
    ("module is read only", "person", "destination", True, "", "set `read only = no` in rsyncd.conf there, " + RETRY),
    # ------------------------------------------------------------- options that one side does not know
    (r"fsync: unknown option|unknown option.*fsync", "person", "destination", True, "the rsync there is old",
     "set `fsync: false` in the rule, or install rsync 3.2.4 or newer there"),
    ("[Uu]nknown checksum|checksum.* not supported|[Ff]ailed to negotiate a checksum", "person", "destination", True,
     "the rsync there cannot make this digest", "set `digest: md5` in the rule"),
    ("option -s has been disabled", "person", "destination", True, "the key leads to rrsync there",
     "set `rrsync: true` in the rule, and write `to` as a path below its directory"),
    ("unknown option|server is configured to refuse|option not allowed|not allowed to|rrsync", "person", "destination",
     True, "the far side refuses an option", "see which, and let it be allowed there (rsyncd.conf, rrsync)"),
    # ------------------------------------------------------------- the disk there
    (r"No space left on device|Disk quota exceeded|File too large", "transient", "destination", False, "",
     "make room there; " + AGAIN),
    ("Read-only file system", "person", "destination", True, "",
     "it is read-only: look at its disk (dmesg) and mount it writable, " + RETRY),
    (r"Transport endpoint|Stale file handle|Host is down|Input/output error", "transient", "destination", False, "",
     "is the disk, or the share, there well? " + AGAIN),
    (r"File name too long|Invalid argument \(22\)|Invalid or incomplete multibyte", "permanent", "file", True, "",
     "the destination cannot hold this name; rename the file"),
    (r"could not make way|Not a directory|Is a directory|Too many levels of symbolic links|cannot delete non-empty",
     "person", "file", True, "", "move aside what stands in the way, " + RETRY),
    (r"(mkdir|change_dir#3|push_dir#3) .*No such file or directory|change_dir .*failed", "transient", "destination",
     False, "{place} is not there", ABSENT + "; " + AGAIN),
    (r"(mkstemp|mkdir|rename|recv_generator|write failed|failed to set|open|chdir|change_dir).*"
     r"(Permission denied|Operation not permitted)", "person", "destination", True, "",
     "give the user of the transfer the right to write there, " + RETRY),
    # ------------------------------------------------------------- the line
    ("Connection refused", "transient", "destination", False, "{host} does not answer",
     "is its server running? " + AGAIN),
    (r"timed? ?out|not responding|No route to host|Network is unreachable|Connection (reset|closed)|Broken pipe|"
     r"connection unexpectedly closed|lost connection|kex_exchange", "transient", "destination", False,
     "the connection to {host} broke", "is the line, and the machine, well? " + AGAIN),
)  # fmt: skip

_CODES: Mapping[int, tuple[str, str, bool, str]] = {  # code -> kind, scope, counts, what it means
    1: ("person", "destination", True, "wrong usage, or refused"),
    2: ("person", "destination", True, "the two versions of rsync do not fit"),
    3: ("transient", "destination", False, "the destination is not there, or cannot be entered"),
    4: ("person", "destination", True, "one side cannot do what was asked"),
    5: ("transient", "destination", False, "the two sides did not come together"),
    10: ("transient", "destination", False, "no connection"),
    11: ("transient", "destination", False, "a file could not be read or written"),
    12: ("transient", "destination", True, "the connection broke, or there is no rsync there"),
    13: ("transient", "batch", True, "rsync had trouble with itself"),
    14: ("transient", "batch", True, "rsync had trouble with itself"),
    20: ("transient", "batch", False, "rsync was ended by a signal"),
    21: ("transient", "batch", True, "rsync had trouble with itself"),
    22: ("transient", "batch", True, "rsync was short of memory"),
    23: ("transient", "batch", True, "some files were not transferred"),
    24: ("transient", "batch", True, "files vanished while they were read"),
    25: ("transient", "batch", True, "rsync stopped at a limit"),
    30: ("transient", "destination", False, "the far side fell silent"),
    35: ("transient", "destination", False, "the daemon there did not answer in time"),
    126: ("person", "destination", True, "the program there cannot be executed"),
    127: ("person", "destination", True, "there is no rsync there"),
    255: ("transient", "destination", False, "ssh could not connect"),
}


def trouble_of(code: int, said: str, target: Target, options: Mapping[str, Any]) -> Trouble:
    """Return what this end of an rsync means. `code` is negative for a signal."""
    told = [line.strip() for line in said.splitlines() if line.strip()]
    words = "; ".join(line for line in told if not line.startswith(("rsync error:", "@@@@")))[-WORDS_MAX:]
    names = {
        "host": f"{target.user}@{target.host}" if target.user else target.host or "rsync",
        "bare": target.host, "port": target.port, "place": target.url(),
        "known": options.get("known_hosts") or "~/.ssh/known_hosts of the daemon's user",
        "identity": options.get("identity") or "the daemon's key",
    }  # fmt: skip
    there = "\n".join(line for line in told if not _SOURCE.search(line))  # what is said of sources tells nothing of it
    for pattern, kind, scope, counts, first, hint in _SAID:
        if re.search(pattern, there):
            why = f"{first.format(**names)}: {words}" if first else f"{target.seat}: {words}"
            return Trouble(kind, scope, why, hint.format(**names), counts=counts)
    if code < 0:
        return Trouble("transient", "batch", f"rsync was killed by signal {-code}", "was memory short?")
    if code in (23, 24) and words and only_of_sources(said):
        return Trouble("transient", "file", words, "the daemon's user must be able to read it")
    kind, scope, counts, meaning = _CODES.get(code, ("transient", "batch", True, "its exit code is not known"))
    why = f"rsync to {target.seat} ended with code {code} ({meaning})"
    hint = "" if kind == "transient" else f"mend it, {RETRY}"
    return Trouble(kind, scope, f"{why}: {words}" if words else why, hint, counts=counts)


def only_of_sources(said: str) -> bool:
    """Tell whether every line is about sources: then nothing is wrong with the destination."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("rsync error:", "rsync warn"))]
    return bool(lines) and all(_SOURCE.search(line) for line in lines)
