"""Copy files to one or several directories, verified: the embedded action and the reference for all others.

Each file is read once while it is hashed, written under a temporary name beside
its target, made durable, read back past the page cache, recorded as proven, and
only then renamed. The work is done by worker processes (lanes) of low priority;
this class never touches a source or a destination itself, so neither a hung
share nor a slow disk can hold the daemon up. `verify` returns what was read back.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from trigger_daemon.actions import Context, Differs, File, Json, Progress, Proof, Refused, Request, Unknown, Unproven
from trigger_daemon.actions._copy_files import DIGESTS
from trigger_daemon.actions._copy_store import Store
from trigger_daemon.actions._copy_sums import said_by
from trigger_daemon.actions._lanes import Lanes, Pace, Work, awaited, fault_of, lane_environment, progress_of
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault, Scope

LANES = 4  # `lanes` in the settings
DEADLINE_S = 120.0  # without progress, a lane is killed
LARGE_BYTES = 64 * 1024 * 1024  # larger files are copied in segments
SEGMENT_BYTES = 256 * 1024 * 1024
ENDED_MAX = 10_000  # ended attempts remembered; an older one is asked of the disk again
THIN_EVERY = 10_000  # attempts between two looks at the size of the store

TELLING = 3  # a shorter captured value may stand in a path by chance
_DATE = re.compile(r"\d{4}-?\d{2}-?\d{2}")
DEFAULT_DIGEST = "xxh3"
_TEMPLATE = re.compile(r"\{[^{}]*\}")
_LIBRARIES = {"xxh3": "xxhash", "blake3": "blake3"}


class Action:
    """The provider; see the module."""

    OPTIONS: Options = {
        "to": Option("texts", "where to: an existing directory, or a list of them (each is proved)",
                     required=True, template=True),
        "layout": Option("enum", "keep the path below the root, or put all files flat into `to`",
                         default="keep", choices=("keep", "flat")),
        "if_exists": Option("enum", "a different file that we did not write stands at the target: hold, or replace it",
                            default="hold", choices=("hold", "replace")),
        "digest": Option("enum", "what content is hashed with; absent: xxh3, or what the name of `sums` says",
                         choices=DIGESTS),
        "own_digest": Option("enum", "the digest that a file carries itself (Content-MD5 of CBF): ignore or verify it",
                             default="ignore", choices=("ignore", "verify")),
        "sums": Option("text", "keep a list of digests under this name in each target directory, such as SHA256SUMS",
                       template=True),
        "bandwidth": Option("rate", "read no faster than this, for each run"),
    }  # fmt: skip
    VERIFIES = True
    PREPARES = False
    LEAVES_OUT = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._work: OrderedDict[tuple[int, int], Work] = OrderedDict()
        self._life = os.urandom(6).hex()  # of this object: a handle of another daemon's life is told by it
        self._started = 0
        self._store: Store | None = None
        self._lanes: Lanes | None = None
        self._owner = ""
        self._closed = False

    # --------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        paths = _paths(options)
        if not paths:
            raise OptionFault("to", "names no directory")
        for path in paths:
            if not os.path.isabs(path):
                raise OptionFault("to", f"{path!r} is not absolute", "write it from the root, such as /mnt/archive")
            if ".." in path.split("/"):
                raise OptionFault("to", f"{path!r} goes upwards", "write the path without `..`")
        if len({os.path.normpath(path) for path in paths}) != len(paths):
            raise OptionFault("to", "names a directory twice")
        sums = options.get("sums")
        if sums is not None and (not sums or "/" in sums or sums in (".", "..")):
            raise OptionFault("sums", f"{sums!r} is not a file name", "write a name such as SHA256SUMS")
        _check_digest(options)

    def destination(self, options: Mapping[str, Any]) -> str:
        return " + ".join(_static(path, {}) for path in _paths(options))

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_static(path, {}) for path in _paths(options))

    def targets(self, request: Request) -> Iterator[tuple[str, File]]:
        """Yield where the files of a request would be written."""
        flat = request.options.get("layout", "keep") == "flat"
        for path in _paths(request.options):
            for file in request.files:
                yield f"{os.path.normpath(path)}/{file.path.rpartition('/')[2] if flat else file.path}", file

    # -------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        return None

    def start(self, request: Request, prepared: Json) -> Json:
        """Hand the attempt to a lane and return at once. Raises Refused for a request that no disk could fulfil."""
        key = (request.run, request.attempt)
        with self._lock:
            if self._closed:
                raise Unknown("the copy action is closed")
            if key not in self._work:
                self._submit(request, "copy")
        return {"run": request.run, "attempt": request.attempt, "life": self._life}

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Return a live attempt's handle. Lanes end with the daemon, so what is not known here surely does not run."""
        with self._lock:
            known = (request.run, request.attempt) in self._work
        return {"run": request.run, "attempt": request.attempt, "life": self._life} if known else None

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how it stands; an attempt of an earlier daemon is taken up again, and goes on where it was."""
        with self._lock:
            work = self._work.get((request.run, request.attempt))
            if work is None:
                if self._closed:
                    raise Unknown("the copy action is closed")
                try:
                    work = self._submit(request, "copy")
                except Refused as refused:
                    return Progress("failed", why=refused.fault.why, hint=refused.fault.hint, fault=refused.fault)
        return progress_of(work)

    def cancel(self, request: Request, handle: Json) -> None:
        with self._lock:
            if self._closed:
                return
            work = self._work.get((request.run, request.attempt))
            if work is None:
                self._submit(request, "clean")
            elif work.report is None:
                self._pool().cancel(work)
            elif work.report["status"] != "cancelled":
                # It has ended; parts it left for a later attempt are not wanted any more.
                del self._work[request.run, request.attempt]
                self._submit(request, "clean")

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Return what was read back before the rename if the targets are untouched; else read both sides again."""
        with self._lock:
            if self._closed:
                return Unproven(Fault("transient", "the copy action is closed", counts=False))
            try:
                work = self._submit(request, "prove")
            except Refused as refused:
                return Unproven(refused.fault)
        if (hangs := awaited(work)) is not None:
            return Unproven(hangs)
        report = work.report or {"fault": None, "differs": {}, "changed": []}
        if report["differs"]:
            return Differs(report["differs"], tuple(report["changed"]))
        found = None if report["fault"] else self._proof(request)
        if found is not None:
            return found
        fault = report["fault"]
        return Unproven(fault_of(fault) if fault else Fault("transient", "the proof was cut short", counts=False))

    def forget(self, run: int) -> None:
        """Drop the records of a run: the journal has its proof, or nobody wants it any more."""
        with self._lock:
            if not self._closed:
                self._records().forget(run)
                for key in [key for key in self._work if key[0] == run and self._work[key].report is not None]:
                    del self._work[key]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes, store = self._lanes, self._store
            pending = [work for work in self._work.values() if work.report is None]
        if lanes:
            lanes.close()
        for work in pending:
            work.ended.set()  # nobody may wait for it any longer
        if store:
            store.close()

    # ---------------------------------------------------------------------- inside

    def _submit(self, request: Request, do: str) -> Work:
        """Make the order and queue it; the lock is held."""
        pool = self._pool()
        order = self._order(request, do)
        destination = " + ".join(static for _, static in order["to"])
        hung = pool.hangs(destination)
        if hung:
            raise Refused(Fault("transient", f"{destination} does not answer: {hung}",
                                "is its server well? the copy goes on when the hung call has ended",
                                Scope.DESTINATION, counts=False))  # fmt: skip
        work = Work(order, destination)
        if do != "prove":
            self._work[request.run, request.attempt] = work
        self._forget_ended()
        pool.submit(work)
        return work

    def _order(self, request: Request, do: str) -> dict[str, Any]:
        options = request.options
        to = list(zip(map(os.path.normpath, _paths(options)), _fixed(request), strict=True))
        _refuse_impossible(request, [path for path, _ in to])
        settings = self._context.settings
        verifies = options.get("own_digest", "ignore") == "verify"
        return {
            "do": do, "run": request.run, "attempt": request.attempt, "owner": self._owner,
            "files": [(file.root.rstrip("/"), file.path, file.size, file.mtime_ns, file.content if verifies else "")
                      for file in request.files],
            "to": to, "keep": dict(request.keep),
            "layout": options.get("layout", "keep"), "if_exists": options.get("if_exists", "hold"),
            "digest": _digest(options), "sums": options.get("sums"),
            "bandwidth": options.get("bandwidth"), "rule": request.rule, "rule_bandwidth": request.bandwidth,
            "state_dir": self._context.state_dir,
            "large": settings.get("large_bytes", LARGE_BYTES), "segment": settings.get("segment_bytes", SEGMENT_BYTES),
        }  # fmt: skip

    def _pool(self) -> Lanes:
        if self._lanes is None:
            settings = self._context.settings
            self._records()
            self._lanes = Lanes(
                state_dir=self._context.state_dir,
                most=settings.get("lanes", LANES),
                deadline_s=settings.get("deadline_s", DEADLINE_S),
                pace=self._pace,
                stopped=self._stopped,
                rooms=self._rooms,
                news=self._news,
                env=lane_environment(),
            )
        return self._lanes

    def _records(self) -> Store:
        if self._store is None:
            os.makedirs(self._context.state_dir, exist_ok=True)
            self._store = Store(self._context.state_dir, make=True)
            self._owner = self._store.owner()
        return self._store

    def _pace(self) -> Pace:
        return self._context.bandwidth(), self._context.paused()

    def _stopped(self, order: Mapping[str, Any]) -> str:
        """Return why none of its destinations may be written to now: a file goes to all of them at once."""
        return next(filter(None, (self._context.stopped(path) for path, _ in order["to"])), "")

    def _rooms(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return what must stay free: at each destination, and on each file system that links may lead to."""
        return {"to": [self._context.reserve(path) for path, _ in order["to"]],
                "reserves": {device: list(amount) for device, amount in self._context.reserves().items()}}  # fmt: skip

    def _news(self, work: Work) -> None:
        self._context.nudge(work.order["run"], work.order["attempt"])

    def _forget_ended(self) -> None:
        self._started += 1
        if self._started % THIN_EVERY == 0:
            self._records().thin()
        while len(self._work) > ENDED_MAX:
            key = next((key for key, work in self._work.items() if work.report is not None), None)
            if key is None:
                return
            del self._work[key]

    def _proof(self, request: Request) -> Proof | None:
        """Return the proof if there is a record for every file at every destination, but for changed files."""
        with self._lock:
            if self._closed:
                return None
            store = self._records()
        changed = store.changed(request.run)
        rows = store.proofs(request.run)
        places = range(len(_paths(request.options)))
        members = []
        for index in range(len(request.files)):
            if index in changed:
                continue
            for place in places:
                row = rows.get((index, place))
                if row is None:
                    return None
                members.append(row[4])
        return Proof(tuple(members), tuple(path for path, _ in changed.values()))


def _paths(options: Mapping[str, Any]) -> list[str]:
    to = options["to"]
    return [to] if isinstance(to, str) else list(to)


def _digest(options: Mapping[str, Any]) -> str:
    """Return the digest of a request. A written one goes first: requests of earlier versions always have it."""
    said = said_by(options.get("sums") or "")
    return options.get("digest") or (said if said in DIGESTS else DEFAULT_DIGEST)


def _check_digest(options: Mapping[str, Any]) -> None:
    """Raise OptionFault where `digest` and the name of `sums` disagree, or no such digest can be made here."""
    written = options.get("digest")
    sums = _TEMPLATE.sub("x", options.get("sums") or "")  # a capture's name says nothing
    said = said_by(sums)
    if said and said not in DIGESTS:
        raise OptionFault("sums", f"the name says {said}, which copy cannot make",
                          f"choose a name that says one of {', '.join(DIGESTS)}, such as SHA256SUMS")
    if written and said and written != said:
        raise OptionFault("digest", f"{written}, but the name of `sums` says {said}",
                          f"leave `digest` out, or write {said}, or choose a name that says {written} or nothing")
    digest = written or said or DEFAULT_DIGEST
    library = _LIBRARIES.get(digest)
    if library and importlib.util.find_spec(library) is None:
        raise OptionFault("sums" if said and not written else "digest", f"{digest} needs the library {library}",
                          f"install {library}, or choose sha256")


def _fixed(request: Request) -> list[str]:
    """Return the part of each `to` that must exist: up to the first component with a template, all without one."""
    if request.written is None:  # of an earlier version
        values = {**request.group, **request.captures}
        return [_static(os.path.normpath(path), values) for path in _paths(request.options)]
    fixed = []
    for path in _paths({**request.options, **request.written}):
        components = os.path.normpath(path).split("/")
        kept = list(itertools.takewhile(lambda component: "{" not in component, components))
        fixed.append("/".join(kept) or "/")
    return fixed


def _static(path: str, values: Mapping[str, str]) -> str:
    """Return the part of a `to` that must exist: up to the first component that a template made.

    A rendered request no longer says where its templates were, so a component
    that holds a captured value, or a date, counts as one; a value of a letter
    or two only by itself or behind its name (`disc1`, not `krios1`). A mistake
    either makes the part shorter (the mount it lies on is checked as well), or
    asks for a directory that should be created.
    """
    kept = []
    for component in path.split("/"):
        if "{" in component or _DATE.search(component) or any(_holds(component, *item) for item in values.items()):
            break
        kept.append(component)
    return "/".join(kept) or "/"


def _holds(component: str, name: str, value: str) -> bool:
    if len(value) >= TELLING:
        return value in component
    return bool(value) and re.search(rf"(^|{re.escape(name)}[-_.]?){re.escape(value)}$", component) is not None


def _refuse_impossible(request: Request, to: list[str]) -> None:
    """Raise Refused for two members with one target, and for targets in a watched directory."""
    flat = request.options.get("layout", "keep") == "flat"
    sums = request.options.get("sums")
    seen: dict[str, str] = {}
    roots = {file.root.rstrip("/") + "/" for file in request.files}
    for file in request.files:
        place = file.path.rpartition("/")[2] if flat else file.path
        if place in seen:
            raise Refused(Fault(
                "permanent", f"{seen[place]} and {file.root}/{file.path} would both become {to[0]}/{place}",
                "use `layout: keep`, or a `to` that tells them apart, such as {session}",
            ))  # fmt: skip
        seen[place] = f"{file.root}/{file.path}"
        if sums and place.rpartition("/")[2] == sums:
            raise Refused(Fault("permanent", f"{seen[place]} has the name of the digest list ({sums})",
                                "choose another name for `sums`"))
        for path in to:
            if any(f"{path}/{place}".startswith(root) for root in roots):
                raise Refused(Fault("permanent", f"{path}/{place} lies in the watched directory",
                                    "choose a `to` outside of it: the daemon never writes where it watches"))
