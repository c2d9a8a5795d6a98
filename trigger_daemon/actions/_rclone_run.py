"""Calls of rclone by a worker: what a remote is, what stands there, and what is to be done there.

Lists of names go in on standard input, line by line. One rclone is told another
rate while it runs, through a socket in the daemon's own directory. That it ends
with 0 says nothing of a listed file that does not exist: who calls compares.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from trigger_daemon.actions._batch import READ_BYTES_PER_S
from trigger_daemon.actions._child import Child, End, Tell, listed, nothing
from trigger_daemon.actions._copy_files import Trouble
from trigger_daemon.actions._copy_pace import Pace
from trigger_daemon.actions._rclone_target import OLDEST, Target, arguments, config_of, environment
from trigger_daemon.actions._rclone_words import RETRY, Complaints, parsed, trouble_of

MISSING = 3  # its exit code for a directory that is not there
ONE_BY_ONE_MAX = 200  # of so many names each is asked for; for more the directories are listed, whatever else is there
NO_TIMES_NS = 10**15  # a precision of this or worse: it keeps no times
USER = "worker"
SAY_S = 5.0  # for an answer through the socket
KNOWN_S = 300.0  # what a remote is, is asked again after this

# What writes whole files or none: objects, which appear when all of them is there. Buckets do, too.
_WHOLE = frozenset({"drive", "onedrive", "dropbox", "box", "pcloud", "jottacloud", "mega", "pikpak", "protondrive"})
_VERSION = re.compile(r"rclone v(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Far:
    """What a remote is. `kind`, its type, may be ''. `local`: the directory, '' of a remote elsewhere."""

    kind: str
    hashes: tuple[str, ...]
    precision_ns: int
    is_bucket: bool
    writes_aside: bool  # under a name of rclone's, which is renamed
    moves: bool
    local: str

    @property
    def keeps_times(self) -> bool:
        return self.precision_ns < NO_TIMES_NS

    @property
    def writes_whole(self) -> bool:
        return self.is_bucket or self.writes_aside or self.kind in _WHOLE


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands under a name. `mtime_ns` 0 and `digest` '' where they were not asked for, or are not kept."""

    size: int
    mtime_ns: int = 0
    digest: str = ""


@dataclass
class Moving:
    """How far a transfer is, as its log tells; `done`: names that it says are there now."""

    bytes: int = 0
    files: int = 0
    done: set[str] = field(default_factory=set)

    def take(self, told: Mapping[str, Any]) -> None:
        if (stats := told.get("stats")) is not None:
            self.bytes, self.files = int(stats.get("bytes", 0)), int(stats.get("transfers", 0))
        elif told.get("level") == "info" and _DONE.match(str(told.get("msg", ""))):
            self.done.add(str(told.get("object", "")))


_DONE = re.compile(r"(Multi-thread )?Copied|Moved|Renamed")
_KNOWN: dict[tuple[Any, ...], tuple[float, Any]] = {}  # of this process: what was asked, when, and the answer


class Rclone:
    """One program with one configuration, for one run. Its calls raise Cancelled, and Trouble."""

    def __init__(
        self, path: str, options: Mapping[str, Any], target: Target, *, lock: int, pace: Pace, state_dir: str, run: int,
        rerun_s: float,
    ) -> None:  # fmt: skip
        self.options = options
        self.target = target
        self._path = path
        self._lock = lock
        self._pace = pace
        self._state_dir = state_dir
        self._socket = f"run-{run}.rc"
        self._rerun_s = rerun_s
        self._word = os.urandom(16).hex()  # that it takes orders with: others may reach the socket
        self.begun = 0  # rclones that transferred

    # ------------------------------------------------------------------ what there is

    def look_at_itself(self) -> None:
        """See that this rclone does what is promised of it, and that nobody else reads its secrets. Raises Trouble."""
        config = config_of(self.options)
        if (why := open_to_others(config)) is not None:
            raise Trouble("person", "credential", f"{config}: {why}", f"chmod 600 {config}; it must belong to the "
                          f"daemon's user, {RETRY}")  # fmt: skip
        version = self._once(("version", self._path, os.stat(self._path).st_mtime_ns), self._version)
        if version < OLDEST:
            raise Trouble("person", "destination", too_old(version), f"install rclone {_shown(OLDEST)} or newer "
                          f"(rclone.org/downloads), {RETRY}")  # fmt: skip

    def _version(self) -> tuple[int, int]:
        said: list[str] = []
        self.call(["version"], line=lambda told: said.append(told.decode("utf-8", "replace")))
        return version_of("\n".join(said))

    def far(self) -> Far:
        """Say what the remote is; it may be asked for that."""
        config = config_of(self.options)
        stamp = os.stat(config).st_mtime_ns if os.path.exists(config) else 0
        return self._once((self._path, config, stamp, self.target.remote, self.target.static), self._ask)  # type: ignore[no-any-return]

    def _ask(self) -> Far:
        said: list[bytes] = []
        self._well(self.call(["backend", "features", self.url()], line=said.append))
        far = far_of(b"\n".join(said))
        if far.writes_whole:
            return far
        kinds: list[bytes] = []
        self._well(self.call(["listremotes", "--long"], line=kinds.append))
        return replace(far, kind=kind_of(b"\n".join(kinds), self.target))

    def _once(self, what: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
        """Ask what does not change at once for each batch."""
        asked_at, answer = _KNOWN.get(what, (0.0, None))
        if answer is None or time.monotonic() - asked_at > KNOWN_S:
            answer = ask()
            _KNOWN[what] = time.monotonic(), answer
        return answer

    def url(self, path: str = "") -> str:
        """Return what must exist, or a path below it."""
        return f"{self.target.remote}:{f'{self.target.static}/{path}' if path else self.target.static}"

    def is_there(self) -> bool:
        """Say whether the static part is."""
        end = self.call(["lsjson", "--stat", "--no-modtime", "--no-mimetype", self.url()])
        if end.code == MISSING:
            return False
        self._well(end)
        return True

    def standing(self, names: Sequence[str], *, hash: str = "", times: bool = False, size: int = 0) -> dict[str, Entry]:
        """Return what stands under these names; `size`: of what must be read there for the digests, in bytes."""
        found: dict[str, Entry] = {}

        def line(told: bytes) -> None:
            if told.startswith(b"{"):
                item = json.loads(told.rstrip(b","))
                when = _ns(item["ModTime"]) if times else 0
                found[item["Path"]] = Entry(item["Size"], when, item.get("Hashes", {}).get(hash, ""))

        how = ["--hash", "--hash-type", hash] if hash else []
        end = self.call(
            ["lsjson", "--recursive", "--files-only", "--no-mimetype", *how, *(() if times else ("--no-modtime",)),
             *listed_by(names), self.target.url()],
            names=names, line=line, size=size,
        )  # fmt: skip
        if end.code != MISSING:
            self._well(end)
        wanted = set(names)
        return {name: entry for name, entry in found.items() if name in wanted}

    def read(self, names: Sequence[str], *, hash: str, size: int) -> dict[str, str]:
        """Return the digests of what stands under these names, of what is read there and sent here."""
        found: dict[str, str] = {}

        def line(told: bytes) -> None:
            digest, gap, name = told.decode("utf-8", "surrogateescape").partition("  ")
            if gap and digest.strip():
                found[name] = digest.strip()

        end = self.call(["hashsum", hash, "--download", *listed_by(names), self.target.url()], names=names, line=line,
                        size=size)  # fmt: skip
        if end.code != MISSING:
            self._well(end)
        return found

    def below(self, directories: Sequence[str], suffix: str) -> list[str]:
        """Return the names in these directories, not below them, that end so."""
        found: list[str] = []

        def line(told: bytes) -> None:
            if told.startswith(b"{"):
                found.append(json.loads(told.rstrip(b","))["Path"])

        rules = [f"+ {_literal(f'/{directory}' if directory else '')}/*{suffix}" for directory in directories]
        end = self.call(["lsjson", "--recursive", "--files-only", "--no-mimetype", "--no-modtime", "--filter-from", "-",
                         self.target.url()], names=[*rules, "- *"], line=line)  # fmt: skip
        if end.code != MISSING:
            self._well(end)
        return found

    # ------------------------------------------------------------------- what is done

    def transfer(
        self, verb: str, source: str, to: str, names: Sequence[str], how: Sequence[str], *, size: int, moving: Moving,
        retries: int,
    ) -> End:  # fmt: skip
        """Copy or move; begin again where its pace asks for that, with what is not done. Return its last end."""
        for rerun_s in (self._rerun_s * 2**times for times in itertools.count()):
            left = [name for name in names if name not in moving.done]
            rate = self._pace.rate()
            self.begun += 1
            with self._tuned() as retune:
                end = self.call(
                    [verb, *how, *listed_by(left), "--stats", "500ms", "--retries", str(retries),
                     "--retries-sleep", "2s", "--transfers", str(self.options["transfers"]), "--rc", "--rc-addr", f"unix://{self._socket}",
                     *(("--bwlimit", _bytes(rate)) if rate is not None else ()), source, to],
                    names=left, size=size, told=moving.take, moved=lambda: moving.bytes + len(moving.done),
                    retune=retune, rerun_s=rerun_s,
                )  # fmt: skip
            if not (end.again and end.code):
                return end
        raise AssertionError("there is always another time")

    def delete(self, names: Sequence[str]) -> None:
        """Delete these, and nothing else."""
        self._well(self.call(["delete", *listed_by(names), self.target.url()], names=names))

    def purge(self, path: str) -> None:
        """Delete a directory below the static part, and all in it."""
        end = self.call(["purge", self.url(path)])
        if end.code != MISSING:
            self._well(end)

    # ------------------------------------------------------------------------- inside

    def call(
        self, command: Sequence[str], *, names: Sequence[str] = (), line: Tell = nothing, size: int = 0,
        told: Callable[[dict[str, Any]], None] | None = None, moved: Callable[[], int] | None = None,
        retune: Callable[[float | None], bool] | None = None, rerun_s: float | None = None,
    ) -> End:  # fmt: skip
        """Run it; what it says at its end are the errors of its log, one a line."""
        self._pace.check()
        complaints = Complaints()

        def complaint(text: bytes) -> None:
            if text.strip():
                one = parsed(text)
                complaints.take(one)
                if told is not None:
                    told(one)

        argv = [self._path, *command, *arguments(self.options)]
        fd = listed([os.fsencode(name) for name in names], b"\n")
        try:
            end = Child(
                argv, names=fd, lock=self._lock, pace=self._pace, far=True, cwd=self._state_dir,
                environment={**environment(), "RCLONE_RC_USER": USER, "RCLONE_RC_PASS": self._word},
                silent_s=float(self.options["timeout"]) + size / READ_BYTES_PER_S, rerun_s=rerun_s, line=line,
                complaint=complaint, moved=moved,
                **({} if retune is None else {"retune": retune}),  # type: ignore[arg-type]
            ).run()  # fmt: skip
        except OSError as fault:
            raise Trouble("transient", "batch", f"cannot start rclone: {fault}", "was memory short?",
                          counts=False) from None
        finally:
            os.close(fd)
        return End(end.code, "\n".join(complaints.lines()), end.again)

    def _well(self, end: End) -> None:
        """Raise what it means if it has failed."""
        if end.code:
            raise trouble_of(end.code, end.said.splitlines(), self.target)

    @contextlib.contextmanager
    def _tuned(self) -> Iterator[Callable[[float | None], bool]]:
        """Yield how an rclone that has our socket is told another rate. A path of a socket must be short."""
        directory = os.open(self._state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        path = f"/proc/self/fd/{directory}/{self._socket}"
        word = base64.b64encode(f"{USER}:{self._word}".encode())

        def retune(rate: float | None) -> bool:
            body = json.dumps({"rate": _bytes(rate) if rate is not None else "off"}).encode()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as line:
                line.settimeout(SAY_S)
                line.connect(path)
                line.sendall(
                    b"POST /core/bwlimit HTTP/1.0\r\nHost: rclone\r\nContent-Type: application/json\r\n"
                    b"Authorization: Basic %b\r\nContent-Length: %d\r\n\r\n%b" % (word, len(body), body)
                )
                return line.recv(64).split(b" ")[1:2] == [b"200"]
            return False

        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        try:
            yield retune
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(directory)


def kind_of(remotes: bytes, target: Target) -> str:
    """Return what type of remote it is, as `listremotes --long` tells."""
    kinds = dict(line.split(":", 1) for line in remotes.decode("utf-8", "replace").splitlines() if ":" in line)
    return kinds.get(target.remote, "").strip()


def far_of(features: bytes) -> Far:
    """Return what `backend features` tells of a remote; not its kind."""
    told = json.loads(features)
    has = told["Features"]
    words, mark = str(told.get("String", "")), "Local file system at "
    return Far(
        kind="", hashes=tuple(told.get("Hashes") or ()),
        precision_ns=int(told.get("Precision", NO_TIMES_NS)), is_bucket=bool(has.get("BucketBased")),
        writes_aside=bool(has.get("PartialUploads")), moves=bool(has.get("Move")),
        local=words.removeprefix(mark) if words.startswith(mark) else "",
    )  # fmt: skip


def version_of(said: str) -> tuple[int, int]:
    """Return what `rclone version` says; (0, 0) if it says nothing of the kind."""
    found = _VERSION.search(said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def too_old(version: tuple[int, int]) -> str:
    return f"rclone {_shown(version)} writes files under their final names before they are whole"


def open_to_others(config: str) -> str | None:
    """Return what is wrong with who may read the configuration; None if nothing is, or if there is none."""
    try:
        mode = os.stat(config).st_mode & 0o7777
        with open(config, "rb"):
            pass
    except FileNotFoundError:
        return None  # the environment may describe all remotes
    except OSError as fault:
        return str(fault.strerror)
    return f"others can read it (mode {mode:04o})" if mode & 0o077 else None


def listed_by(names: Sequence[str]) -> list[str]:
    """Return the options that have rclone take names from its standard input."""
    return ["--files-from-raw", "-", *(("--no-traverse",) if len(names) <= ONE_BY_ONE_MAX else ())]


def _literal(path: str) -> str:
    """Return a pattern of rclone's that matches a path and no other."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path)


def _bytes(rate: float) -> str:
    return f"{max(1024, int(rate))}B"


def _ns(text: str) -> int:
    """Return an instant of RFC 3339 in ns: Python's own knows microseconds only."""
    found = re.fullmatch(r"(.*?)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", text)
    if found is None:
        return 0
    whole = datetime.fromisoformat(found[1] + found[3].replace("Z", "+00:00"))
    return int(whole.timestamp()) * 10**9 + int((found[2] or "0").ljust(9, "0")[:9])


def _shown(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
