"""Look at the machine and at what the daemon keeps: inotify's limits, clocks, the journal, secrets, the broker.

The functions that touch the state directory or the network run in a child
process; the others read /proc and ask the kernel, which do not wait.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trigger_daemon import __version__
from trigger_daemon.database import JOURNAL, alive, ask, holder
from trigger_daemon.doctor import Finding
from trigger_daemon.hints.inotify import roomier, watch_settings
from trigger_daemon.journal import SCHEMA

PROCESSES_MAX = 20_000  # looked through for inotify descriptors
CONNECT_S = 3.0
SYSTEMCTL_S = 3.0
CROWDED = 0.8  # of a limit
BEAT_OLD_S = 15.0  # as `status` calls it
WAL_LARGE_BYTES = 256 << 20
STA_UNSYNC = 0x40
UNIT = "trigger-daemon.service"


# ------------------------------------------------------------------------ inotify


def inotify(directories: int, counted: str, watches_now: int | None, uid: int) -> list[Finding]:
    """Compare the kernel's limits with what the daemon needs and others of its user hold.

    `watches_now`: what the running daemon holds, None if none runs.
    """
    instances, watches = _held(uid)
    limit = min(value for value in (*watch_settings(), 1 << 40) if value >= 0)
    instances_max = _sysctl("fs/inotify/max_user_instances")
    others = watches - (watches_now or 0)
    needed = max(others, 0) + max(directories, watches_now or 0)
    figures = {"directories": directories, "watches": watches, "watches_max": limit, "instances": instances,
               "instances_max": instances_max}  # fmt: skip
    words = f"{counted} to watch, {max(others, 0):,} watches of other programs, of {limit:,} allowed"
    found = [Finding("inotify", "watches", "ok", words, "", figures)]
    if needed > CROWDED * limit:
        line = f"fs.inotify.max_user_watches = {roomier(limit, needed)}"
        found = [Finding(
            "inotify", "watches", "fault" if needed > limit else "warning", words,
            f"put `{line}` into /etc/sysctl.d/60-trigger-daemon.conf, then `sysctl --system`; until then sweeps alone"
            " find what is in the others", figures,
        )]  # fmt: skip
    words = f"{instances:,} of {instances_max:,} instances are held by programs of the daemon's user"
    if instances_max >= 0 and instances + (watches_now is None) > CROWDED * instances_max:
        line = f"fs.inotify.max_user_instances = {roomier(instances_max, 0)}"
        hint = f"put `{line}` into /etc/sysctl.d/60-trigger-daemon.conf, then `sysctl --system`"
        full = instances + (watches_now is None) > instances_max
        found.append(Finding("inotify", "instances", "fault" if full else "warning", words, hint))
    else:
        found.append(Finding("inotify", "instances", "ok", words))
    return found


def _sysctl(name: str) -> int:
    try:
        return int(Path("/proc/sys", name).read_text("ascii"))
    except (OSError, ValueError):
        return -1


def _held(uid: int) -> tuple[int, int]:
    """Return how many instances and watches programs of a user hold, as far as we may look."""
    instances = watches = 0
    with suppress(OSError), os.scandir("/proc") as entries:
        for number, entry in enumerate(entries):
            if number >= PROCESSES_MAX:
                break
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                if entry.stat().st_uid != uid:
                    continue
                for fd in os.listdir(f"/proc/{entry.name}/fd"):
                    with suppress(OSError):
                        if os.readlink(f"/proc/{entry.name}/fd/{fd}") == "anon_inode:inotify":
                            instances += 1
                            info = Path(f"/proc/{entry.name}/fdinfo/{fd}").read_bytes()
                            watches += info.count(b"inotify wd:")
    return instances, watches


# -------------------------------------------------------------------------- clock


class _Timex(ctypes.Structure):
    _fields_ = [("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long),
                ("maxerror", ctypes.c_long), ("esterror", ctypes.c_long), ("status", ctypes.c_int),
                ("rest", ctypes.c_byte * 256)]  # fmt: skip


def clock(zone: str, zone_is_set: bool) -> list[Finding]:
    """Say in which time zone times of day are meant, and whether the kernel's clock is kept."""
    found = [Finding("clock", "time zone", "ok", f"{zone}, " + ("by `time_zone`" if zone_is_set else "the machine's"))]
    if zone == "UTC" and not zone_is_set:
        found = [Finding("clock", "time zone", "note", "UTC: the machine has no other, and `time_zone` is not set",
                         "set `time_zone` if rules have times of day (`at`)")]  # fmt: skip
    now = _Timex()
    try:
        refused = ctypes.CDLL(None).adjtimex(ctypes.byref(now)) < 0
    except (OSError, AttributeError):
        refused = True
    if refused:
        found.append(Finding("clock", "synchronisation", "note", "whether the clock is kept cannot be told here"))
    elif now.status & STA_UNSYNC:
        found.append(Finding(
            "clock", "synchronisation", "warning", "nothing keeps this machine's clock",
            "run chrony or `timedatectl set-ntp true`; ages are measured without it, but records and `at` go by it",
        ))  # fmt: skip
    else:
        words = f"the clock is kept, to within {now.maxerror / 1e3:,.0f} ms"
        found.append(Finding("clock", "synchronisation", "ok", words, "", {"maxerror_s": now.maxerror / 1e6}))
    return found


# ------------------------------------------------------------------------- broker


def broker(host: str, port: int) -> list[Finding]:
    """Connect once, and say nothing to it."""
    name, began = f"{host}:{port}", time.monotonic()
    try:
        with socket.create_connection((host, port), CONNECT_S):
            took_s = time.monotonic() - began
    except OSError as error:
        why = error.strerror or str(error)
        hint = "is it running, and its port open from here? The work goes on without it"
        return [Finding("broker", name, "warning", f"cannot be reached: {why}", hint)]
    return [Finding("broker", name, "ok", f"answers after {took_s * 1e3:.0f} ms", "", {"connect_s": round(took_s, 4)})]


# ------------------------------------------------------------------ the state directory


def daemon(state_dir: str) -> list[Finding]:
    """Say whether the daemon runs and speaks, and what the service manager thinks of it."""
    from trigger_daemon.control import ControlClient

    found = _unit()
    directory = Path(state_dir)
    if not alive(directory):
        hint = "`systemctl start trigger-daemon`, or `trigger-daemon serve`"
        words = f"does not run: nobody holds {state_dir}"
        found.insert(0, Finding("daemon", "", "warning", words, hint, {"running": False}))
        return found
    who, beat = holder(directory), ControlClient(directory).heartbeat()
    pid = who.pid if who else None
    if beat is None:
        words = f"runs (pid {pid}), and has said nothing yet"
        return [Finding("daemon", "", "fault", words, "look at its log"), *found]
    age_s = max(0.0, time.time() - beat["time"])
    figures = {"running": True, "pid": pid, "heartbeat_age_s": round(age_s, 1), "health": beat["daemon"]["health"]}
    words = f"runs (pid {pid}), its heartbeat is {age_s:.0f} s old, its health {beat['daemon']['health']}"
    if age_s > BEAT_OLD_S:
        hint = "it hangs, or the disk of its state directory does: look at its log and at `dmesg`"
        found.insert(0, Finding("daemon", "", "fault", words, hint, figures))
    elif beat["daemon"]["health"] == "alarm":
        found.insert(0, Finding("daemon", "", "warning", words, "`trigger-daemon status` names the alarms", figures))
    else:
        found.insert(0, Finding("daemon", "", "ok", words, "", figures))
    if (theirs := beat["daemon"]["version"]) != __version__:
        found.append(Finding("daemon", "version", "warning", f"{theirs} runs, {__version__} is installed",
                             "restart it: `systemctl restart trigger-daemon`"))  # fmt: skip
    return found


def _unit() -> list[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        return []
    asked = ["systemctl", "show", UNIT, "--property=LoadState,ActiveState,SubState,UnitFileState,NRestarts"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SYSTEMCTL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("daemon", UNIT, "note", f"systemd does not answer: {error}")]
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    if said.get("LoadState") != "loaded":
        return [Finding("daemon", UNIT, "note", "is no unit of this machine: after a reboot nobody starts the daemon")]
    words = f"{said.get('ActiveState')} ({said.get('SubState')}), {said.get('UnitFileState')}"
    if said.get("ActiveState") == "failed":
        return [Finding("daemon", UNIT, "fault", words, f"`systemctl status {UNIT}` tells why")]
    if (restarts := said.get("NRestarts", "0")) not in ("", "0"):
        hint = f"`journalctl -u {UNIT}` tells why"
        return [Finding("daemon", UNIT, "warning", f"{words}, started again {restarts} times", hint)]
    if said.get("UnitFileState") not in ("enabled", "enabled-runtime", "static"):
        return [Finding("daemon", UNIT, "warning", words, f"`systemctl enable {UNIT}`: else a reboot ends it")]
    return [Finding("daemon", UNIT, "ok", words)]


def state(state_dir: str) -> dict[str, Any]:
    """Return whose the state directory is; of a running daemon its pid, and how many watches it holds and lacks."""
    from trigger_daemon.control import ControlClient

    directory = Path(state_dir)
    uid = directory.stat().st_uid
    if not alive(directory):
        return {"uid": uid, "watches": None, "unwatched": None, "pid": None}
    who = holder(directory)
    beat = ControlClient(directory).heartbeat()
    counters = (beat or {}).get("daemon", {}).get("hints", {})
    return {
        "uid": uid, "watches": counters.get("watches", 0), "unwatched": counters.get("unwatched", 0),
        "pid": who.pid if who else None,
    }  # fmt: skip


def journal(state_dir: str) -> list[Finding]:
    """Say how large it is, of which schema, and when it was last folded; nothing that takes long."""
    path = Path(state_dir) / JOURNAL
    try:
        seen = path.stat()
    except FileNotFoundError:
        words = "there is none yet: the daemon makes it at its first start"
        return [Finding("journal", str(path), "note", words)]
    with suppress(OSError):
        wal = path.with_name(f"{JOURNAL}-wal").stat().st_size
        if wal > WAL_LARGE_BYTES:
            return [Finding("journal", str(path), "warning", f"its -wal has {wal >> 20:,} MiB: a program stands still,"
                            " reading the journal", f"find it with `fuser -v {path}` and end it")]  # fmt: skip
    version = ask(path, lambda sql: int(sql.execute("PRAGMA user_version").fetchone()[0]))
    age_s = max(0.0, time.time() - seen.st_mtime)
    figures = {"bytes": seen.st_size, "schema": version, "checkpoint_age_s": round(age_s)}
    words = f"{seen.st_size / 1e6:,.1f} MB, schema {version}, last checkpoint {age_s / 3600:,.1f} h ago"
    if version > SCHEMA:
        hint = "install the version that wrote it, or a newer one"
        return [Finding("journal", str(path), "fault", f"{words}; this program knows {SCHEMA} at most", hint, figures)]
    if version < SCHEMA:
        words += f"; it becomes {SCHEMA} at the next start"
    return [Finding("journal", str(path), "ok", words, "", figures)]


def journal_quick(state_dir: str) -> list[Finding]:
    """Let SQLite look through every page."""
    path = Path(state_dir) / JOURNAL
    if not path.exists():
        return []
    wrong = ask(path, lambda sql: [row[0] for row in sql.execute("PRAGMA quick_check(10)")])
    if wrong == ["ok"]:
        return [Finding("journal", str(path), "ok", "SQLite finds nothing wrong (`journal check` asks more)")]
    return [Finding("journal", str(path), "fault", f"it is damaged: {wrong[0]}",
                    "keep a copy of it, then `trigger-daemon journal recover`")]  # fmt: skip


# ---------------------------------------------------------------------- credentials


def credentials(state_dir: str, globus: dict[str, Any], wanted: bool) -> list[Finding]:
    """Say who the daemon would be to Globus, and whether what is secret is. `wanted`: a rule uses Globus."""
    from trigger_daemon.globus import TOKENS, account

    tokens = Path(state_dir) / TOKENS
    found: list[Finding] = []
    try:
        who = account(globus, state_dir)
    except (OSError, ValueError) as error:
        words = str(error) if isinstance(error, ValueError) else f"{error.filename}: {error.strerror}"
        return [Finding("credentials", "globus", "fault", f"the client's secret cannot be had: {words}",
                        "a file of the daemon's user, mode 0600, with the secret alone on one line")]  # fmt: skip
    logged_in = False
    with suppress(OSError):
        mode = tokens.stat().st_mode & 0o777
        logged_in = True
        if mode & 0o077:
            found.append(Finding("credentials", str(tokens), "fault", f"others can read it (mode {mode:04o})",
                                 f"chmod 600 {tokens}, then `trigger-daemon globus logout` and `login`"))  # fmt: skip
        try:
            json.loads(tokens.read_bytes())
        except ValueError:
            hint = "`trigger-daemon globus login`"
            found.append(Finding("credentials", str(tokens), "fault", "cannot be read", hint))
    if who.client_secret:
        found.append(Finding("credentials", "globus", "ok", f"client {who.client_id}, its secret is there"))
    elif logged_in:
        found.append(Finding("credentials", "globus", "ok", "a person has logged in"))
    elif wanted:
        found.append(Finding("credentials", "globus", "fault", "rules use Globus, and nobody has logged in",
                             "`trigger-daemon globus login`, or set `globus.client_id` and its secret"))  # fmt: skip
    else:
        found.append(Finding("credentials", "globus", "ok", "not configured, and no rule uses it"))
    return found
