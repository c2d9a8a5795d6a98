"""Run a local program for each batch: `start: {command: {run: [...]}}`.

The program is executed without a shell, under a small supervisor process
(`_supervisor.py`) that outlives the daemon and records begin and end durably
in a directory of the attempt. So the outcome is known after a crash of the
daemon at any line; where it cannot be known (the machine restarted under it,
the supervisor was killed) the run is HELD, never repeated by itself.

What an end means:

    exit 0                    success
    exit code in `again`      not now: a new attempt, later (75, EX_TEMPFAIL)
    exit code in `hold`       a person is needed (65, EX_DATAERR)
    any other exit code       a person is needed too: a script that fails in a way it does not
                              declare is broken more often than unlucky, and repeating it for
                              a week would hide that; the end of its stderr says why
    killed by TERM, INT, HUP  somebody stopped it, or the machine went down: a new attempt
    any other signal          a person is needed
    longer than `timeout`     its processes are ended (TERM, after 10 s KILL), a person is needed

A program ends with all it started: what it leaves in the background is ended.
It is given `{manifest}` (JSON: rule, run, attempt, group, captures, files with
root, path, absolute, size, mtime_ns, role), and in its environment the
captures as TRIGGER_<NAME>, TRIGGER_RULE, TRIGGER_BATCH, TRIGGER_ATTEMPT,
TRIGGER_MANIFEST and TRIGGER_FILES (absolute paths, NUL after each). A JSON
object on the last line of its standard output becomes the run's output.

With `verify: [argv]` a second program proves the destination: 0 proves, 1 says
it differs, codes in `again` mean later, anything else that it could not tell.
"""

from __future__ import annotations

import errno
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trigger_daemon import programs
from trigger_daemon.actions import (
    Context,
    Differs,
    File,
    Json,
    Progress,
    Proof,
    Refused,
    Request,
    Unknown,
    Unproven,
    _supervisor,
)
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault
from trigger_daemon.failpoints import fail_point

GRACE_S = 10.0  # between TERM and KILL
ANSWER_S = 20.0  # a supervisor begins in some 20 ms; on a machine that is short of everything it may take seconds
POLL_WATCHED_S = 15.0  # the end of one's own supervisor is told at once; this is the net below
POLL_S = 1.0  # a supervisor of a former life of the daemon is only asked
WORDS_BYTES = 2_000  # of a stream's end, for people and for the journal
ATTEMPTS_KEPT = 3  # directories of one run; a run that is retried for a week must not fill the disk
CLOSE_S = 2.0  # how long close() waits for verifications to end

_NAME = re.compile(r"(\d+)-(\d+)(\.verify)?")  # of an attempt's directory: run, attempt
_STOPPING = (1, 2, 15)  # HUP, INT, TERM

Phase = Literal["absent", "fresh", "running", "orphaned", "ended", "lost"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What an attempt's directory tells.

    absent: nothing was done. fresh: laid out, and surely never executed.
    running: its supervisor lives. orphaned: the program lives, its supervisor
    does not. ended: `end` tells how. lost: executed, and nobody knows the end.
    """

    phase: Phase
    begun: Mapping[str, Any] | None = None
    end: Mapping[str, Any] | None = None


def standing(directory: str) -> Standing:
    """Tell how an attempt stands. The lock is asked first: once it is free, the records no longer change."""
    if not os.path.isdir(directory):
        return Standing("absent")
    held = _held(os.path.join(directory, _supervisor.LOCK))
    begun = _record(os.path.join(directory, _supervisor.BEGUN))
    end = _record(os.path.join(directory, _supervisor.END))
    if held:
        return Standing("running", begun, end)
    if end is not None:
        return Standing("ended", begun, end)
    if begun is None:
        return Standing("fresh")
    return Standing("orphaned" if _lives(begun) else "lost", begun)


def _held(lock: str) -> bool:
    import fcntl  # not on Windows, where this file is still imported for its options

    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _record(path: str) -> Mapping[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:  # a damaged record still says that there was one
        return {}
    return found if isinstance(found, dict) else {}


def _lives(begun: Mapping[str, Any]) -> bool:
    """Say whether the recorded process is still there: same boot, same pid, same start, and not a mere remnant."""
    if begun.get("boot") != _supervisor.boot_id():
        return False
    stat = _supervisor.stat_of(int(begun.get("pid", 0)))
    return stat is not None and stat[0] not in "ZX" and stat[3] == begun.get("start")


class Action:
    """A local program for each batch."""

    OPTIONS: Options = {
        "run": Option(
            "texts", "program and arguments; {manifest} is the path of a JSON file that lists the files",
            required=True, template=True,
        ),
        "timeout": Option("duration", "the program and all it started are ended after this long", default=1800.0),
        "again": Option("ints", "exit codes that mean: not now, try later", default=(75,), minimum=1),
        "hold": Option("ints", "exit codes that mean: a person is needed", default=(65,), minimum=1),
        "verify": Option("texts", "program and arguments that prove the result by exit code 0", template=True),
        "cwd": Option("text", "directory the program runs in; / where absent", template=True),
        "env": Option("map", "variables added to the program's environment", default={}, template=True),
    }
    VERIFIES = True  # where the rule sets `verify`, see verifies()
    PREPARES = False
    LEAVES_OUT = False  # a program that ended has had it, even if it has moved it away itself
    EXTRA_NAMES = ("manifest",)  # in templates: filled in here, at the start; until then they stay as they are

    def __init__(self, context: Context) -> None:
        self._context = context
        self._watcher = _Watcher(context)
        self._closing = threading.Event()
        self._verifying: set[str] = set()  # directories
        self._lock = threading.Lock()
        self._swept = False

    @staticmethod
    def verifies(options: Mapping[str, Any]) -> bool:
        """Say whether `proof: required` is possible with these options."""
        return bool(_texts(options.get("verify")))

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise OptionFault for what can never run."""
        for name in ("run", "verify"):
            argv = _texts(options.get(name))
            if (name == "run" and not argv) or "" in argv[:1]:
                raise OptionFault(name, "names no program", 'write for example ["/opt/qc/first-look", "{manifest}"]')
            if len(argv) == 1 and " " in argv[0]:
                hint = f"write it as a list: {json.dumps(argv[0].split())}"
                raise OptionFault(name, f"{argv[0]!r} is one word, and no shell takes it apart", hint)
        again, hold = _codes(options.get("again")), _codes(options.get("hold"))
        for name, codes in (("again", again), ("hold", hold)):
            if wrong := [code for code in codes if not 1 <= code <= 255]:
                raise OptionFault(name, f"{wrong[0]} is no exit code of a failure", "take 1 to 255; 0 is success")
        if both := sorted(again & hold):
            raise OptionFault("hold", f"exit code {both[0]} is in `again` too", "leave it in one of them")
        if float(options.get("timeout", 1.0)) <= 0:
            raise OptionFault("timeout", "must be longer than nothing")
        for name in options.get("env") or {}:
            if not name or "=" in name or "\0" in name:
                raise OptionFault("env", f"{name!r} is no name of a variable")
            if name.startswith("TRIGGER_"):
                raise OptionFault("env", f"{name} is the daemon's own", "take a name that does not begin with TRIGGER_")

    def destination(self, options: Mapping[str, Any]) -> str:
        """Return the program: when it is missing, all its runs wait."""
        return _texts(options["run"])[0]

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return nothing: what a program writes is not known."""
        return ()

    def prepare(self, request: Request) -> Json:
        """Return None: there is nobody to ask before the start."""
        return None

    def start(self, request: Request, prepared: Json) -> Json:
        """Execute the program, unless this attempt was executed before. Raises Refused, Unknown."""
        directory = self._directory(request)
        if standing(directory).phase == "absent":
            _program(request, "run", directory)  # before anything is laid out
            self._lay_out(request, directory)
            self._thin(request)
        self._launch(request, "run", directory)
        return self._handle(directory)

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Return the handle. A start that was broken off before the exec is completed, as a repeated `start` would.

        None: nothing is laid out (any more), and no supervisor can be on its
        way, for the directory stands before one is made and as long as one may come.
        """
        directory = self._directory(request)
        if standing(directory).phase == "absent":
            return None
        try:
            self._launch(request, "run", directory)
        except Refused:
            if standing(directory).phase == "absent":
                return None
        return self._handle(directory)

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how the attempt stands, from its directory alone."""
        directory = self._directory(request)
        now = standing(directory)
        cancelled = os.path.exists(os.path.join(directory, _supervisor.CANCEL))
        match now.phase:
            case "running":
                again_in_s = POLL_WATCHED_S if self._watcher.watches(directory) else POLL_S
                return Progress("active", why=_why_active(now, cancelled), again_in_s=again_in_s)
            case "orphaned":
                return self._orphaned(directory, now, cancelled)
            case "ended":
                return self._ended(request, directory, now.end or {})
            case _ if cancelled:
                return Progress("cancelled", why="ended after it was cancelled")
            case "fresh" if self._take_back(directory):
                return _failed(Fault("transient", "the program was never executed", counts=False))
            case "fresh":
                return Progress("active", why="begins", again_in_s=POLL_S)
            case _:
                return _failed(_lost(request, now, directory))

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the attempt to end: TERM to all its processes, after 10 s KILL."""
        directory = self._directory(request)
        if os.path.isdir(directory):
            _wish_end(directory)

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Run the verifying program to its end."""
        if not self.verifies(request.options):
            return Unproven(Fault("person", "the rule sets no `verify`", hint="set it in the rule, or `proof: none`"))
        directory = self._directory(request) + ".verify"
        with self._lock:
            self._verifying.add(directory)
        try:
            if standing(directory).phase not in ("running", "orphaned"):
                shutil.rmtree(directory, ignore_errors=True)  # a former answer proves nothing today
                _program(request, "verify", directory)
                self._lay_out(request, directory)
                self._launch(request, "verify", directory)
            if not self._wait(directory):
                return Unproven(Fault("transient", "the daemon stopped during the verification", counts=False))
            return self._judged(request, directory)
        except Refused as refused:
            return Unproven(refused.fault)
        finally:
            with self._lock:
                self._verifying.discard(directory)

    def forget(self, run: int) -> None:
        """Delete what is kept of a run whose outcome is journaled. What still lives is left alone."""
        for name in self._directories(run):
            directory = os.path.join(self._context.state_dir, name)
            if standing(directory).phase not in ("running", "orphaned"):
                self._remove(directory)

    def remembered(self) -> list[int]:
        """Return the runs of which something is kept, so that what a crash kept from `forget` can be forgotten."""
        return sorted({int(name.partition("-")[0]) for name in self._directories()})

    def close(self) -> None:
        """Let go: commands go on under their supervisors, verifications are ended."""
        self._closing.set()
        with self._lock:
            verifying = list(self._verifying)
        for directory in verifying:
            _wish_end(directory)
        patience = time.monotonic() + CLOSE_S
        while any(standing(directory).phase == "running" for directory in verifying) and time.monotonic() < patience:
            time.sleep(0.05)
        self._watcher.close()

    # ------------------------------------------------------------------ the directory of an attempt

    def _directory(self, request: Request) -> str:
        return os.path.join(self._context.state_dir, f"{request.run}-{request.attempt}")

    def _directories(self, run: int | None = None) -> list[str]:
        try:
            names = os.listdir(self._context.state_dir)
        except FileNotFoundError:
            return []
        found = [(name, _NAME.fullmatch(name)) for name in names]
        return [name for name, parts in found if parts and (run is None or int(parts[1]) == run)]

    def _sweep(self) -> None:
        """Once a life: remove what a crash left half made or half removed."""
        with self._lock:
            if self._swept:
                return
            os.makedirs(self._context.state_dir, exist_ok=True)
            for name in os.listdir(self._context.state_dir):
                if name.startswith("."):
                    shutil.rmtree(os.path.join(self._context.state_dir, name), ignore_errors=True)
            self._swept = True

    def _lay_out(self, request: Request, directory: str) -> None:
        """Make the directory with all a supervisor needs, as a whole, durable. Raises Refused."""
        making = ""
        try:
            self._sweep()
            making = tempfile.mkdtemp(prefix=".", dir=self._context.state_dir)
            os.chmod(making, 0o770)
            absolute = [os.path.join(file.root, file.path) for file in request.files]
            listed = b"".join(os.fsencode(path) + b"\0" for path in absolute)
            _supervisor.record(os.path.join(making, _supervisor.FILES), listed)
            _supervisor.record(os.path.join(making, _supervisor.MANIFEST), _manifest(request, absolute))
            fail_point("command.lay_out")
            os.rename(making, directory)
            fail_point("command.laid_out")
            _supervisor.sync_directory(self._context.state_dir)
        except OSError as why:
            if making:
                shutil.rmtree(making, ignore_errors=True)
            if why.errno in (errno.ENOTEMPTY, errno.EEXIST):  # the same start, made at the same time
                return
            raise Refused(_no_record(self._context.state_dir, str(why))) from why

    def _thin(self, request: Request) -> None:
        """Remove the directories of this run's attempts of long ago."""
        for name in self._directories(request.run):
            directory = os.path.join(self._context.state_dir, name)
            old = int(name.partition("-")[2].removesuffix(".verify")) <= request.attempt - ATTEMPTS_KEPT
            if old and standing(directory).phase not in ("running", "orphaned"):
                self._remove(directory)

    def _remove(self, directory: str) -> None:
        """Take it away at one blow, then delete: half a directory must never be taken for an attempt."""
        self._sweep()
        going = tempfile.mkdtemp(prefix=".", dir=self._context.state_dir)
        try:
            fail_point("command.remove")
            os.rename(directory, os.path.join(going, "gone"))
            fail_point("command.removed")
        except FileNotFoundError:
            pass  # somebody else was faster
        shutil.rmtree(going, ignore_errors=True)

    # ------------------------------------------------------------------ supervisors

    def _launch(self, request: Request, which: str, directory: str) -> None:
        """Make a supervisor if the attempt was never executed. Raises Refused if it surely was not, now or before."""
        if standing(directory).phase == "fresh":
            try:
                self._spawn(request, directory, *_program(request, which, directory))
            except Refused:
                if self._take_back(directory):
                    raise
        if step := (standing(directory).end or {}).get("step"):
            raise Refused(_not_executed(step, _argv(request, which, directory)[0], _cwd(request)))

    def _spawn(self, request: Request, directory: str, program: str, argv: list[str], cwd: str) -> None:
        """Make a supervisor and hear whether it began. Raises Refused, or Unknown when it does not say so in time."""
        timeout_s = float(request.options.get("timeout", self.OPTIONS["timeout"].default))
        supervisor = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(_supervisor.__file__)]
        fail_point("command.spawn")
        try:
            with open(os.path.join(directory, "supervisor.log"), "ab") as log:
                process = subprocess.Popen(
                    [*supervisor, directory, repr(timeout_s), repr(GRACE_S), program, cwd, *argv],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                    env=self._environment(request, directory), cwd="/", start_new_session=True,
                )
        except OSError as why:
            if why.errno == errno.E2BIG:
                hint = "give it {manifest} instead of long lists"
                raise Refused(Fault("person", "the program's arguments are too long for the system", hint)) from why
            raise Refused(Fault("transient", f"cannot make a process: {why}", counts=False)) from why
        fail_point("command.spawned")
        line = _first_line(process, ANSWER_S)
        if line is None or line == "begun\n":
            self._watcher.watch(process, directory, request)
        else:
            _finish(process)
        if line is None:
            raise Unknown(f"the supervisor of {os.path.basename(directory)} did not answer within {ANSWER_S:.0f} s")
        if line.startswith("refused record"):
            raise Refused(_no_record(directory, os.strerror(int(line.split()[2]))))
        if standing(directory).phase == "fresh":
            words = _tail(os.path.join(directory, "supervisor.log"))
            raise Refused(Fault("transient", f"the supervisor did not begin: {words}", counts=False))

    def _environment(self, request: Request, directory: str) -> dict[str, str]:
        """Return the program's environment, with the rate it may take now where there is one."""
        rates = [rate for rate in (self._context.bandwidth(), request.bandwidth) if rate is not None]
        told = {"TRIGGER_BANDWIDTH": str(int(min(rates)))} if rates else {}
        return _environment(request, directory) | told

    def _take_back(self, directory: str) -> bool:
        """Undo a layout of which surely nothing was and will be executed; false if somebody was faster.

        A supervisor that is still on its way finds the lock held, or no
        manifest, or no directory.
        """
        import fcntl

        try:
            lock = os.open(os.path.join(directory, _supervisor.LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(os.path.exists(os.path.join(directory, name)) for name in (_supervisor.BEGUN, _supervisor.END)):
                return False
            os.unlink(os.path.join(directory, _supervisor.MANIFEST))
            self._remove(directory)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True
        finally:
            os.close(lock)
        return True

    def _handle(self, directory: str) -> Json:
        begun = standing(directory).begun or {}
        return {"directory": os.path.basename(directory), "pid": begun.get("pid"), "boot": begun.get("boot")}

    def _wait(self, directory: str) -> bool:
        """Wait for the end of a verification, which its supervisor bounds; false when we are to stop."""
        while True:
            now = standing(directory)
            if now.phase not in ("running", "orphaned"):
                return True
            if now.phase == "orphaned":
                self._orphaned(directory, now, cancelled=False)
            if self._closing.is_set():
                return False
            self._watcher.wait(directory, POLL_S)

    def _orphaned(self, directory: str, now: Standing, cancelled: bool) -> Progress:
        """Do what its supervisor would do for a program that lost it: timeout and cancel."""
        begun = now.begun or {}
        late_s = time.monotonic() - float(begun.get("ends_at", 0.0))
        wished_s = _age_s(os.path.join(directory, _supervisor.CANCEL)) if cancelled else late_s
        if wished_s >= 0:
            pid = int(begun["pid"])
            _supervisor.signal_all(pid, 9 if wished_s > GRACE_S else 15, group=pid)
        why = f"its supervisor was killed; process {begun.get('pid')} goes on, and how it ends will not be known"
        return Progress("active", why=why, again_in_s=POLL_S)

    # ------------------------------------------------------------------ ends

    def _ended(self, request: Request, directory: str, end: Mapping[str, Any]) -> Progress:
        argv0 = _argv(request, "run", directory)[0]
        output = _output(os.path.join(directory, _supervisor.STDOUT))
        if end.get("because") == "cancelled":
            return Progress("cancelled", why="cancelled", output=output)
        if step := end.get("step"):
            return _failed(_not_executed(step, argv0, _cwd(request)))
        changed = _changed(directory)
        if end.get("code") == 0 and end.get("because") == "exit":
            size = sum(file.size for file in request.files)
            return Progress("succeeded", files_done=len(request.files), bytes_done=size, output=output, changed=changed)
        return _failed(_fault(request, argv0, directory, end), output=output, changed=changed)

    def _judged(self, request: Request, directory: str) -> Proof | Differs | Unproven:
        now = standing(directory)
        if now.phase != "ended" or now.end is None:
            return Unproven(Fault("transient", "the verification was broken off, and how it ended is not known"))
        argv0 = _argv(request, "verify", directory)[0]
        if step := now.end.get("step"):
            return Unproven(_not_executed(step, argv0, _cwd(request)))
        if now.end.get("because") in ("cancelled", "stopped"):
            return Unproven(Fault("transient", "the verification was broken off", counts=False))
        changed = _changed(directory)
        whole = [file for file in request.files if file.path not in changed]
        if now.end.get("because") == "exit" and now.end.get("code") == 0:
            shutil.rmtree(directory, ignore_errors=True)  # nothing in it to look at
            return Proof(tuple(_proved(file) for file in whole), changed)
        fault = _fault(request, argv0, directory, now.end)
        if now.end.get("because") == "exit" and now.end.get("code") == 1:
            return Differs({file.path: fault.why for file in whole}, changed)
        return Unproven(fault)


class _Watcher:
    """One thread that hears the ends of the supervisors made in this life, collects them, and nudges."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._watched: dict[str, tuple[subprocess.Popen[bytes], int, int]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, process: subprocess.Popen[bytes], directory: str, request: Request) -> None:
        with self._lock:
            self._watched[directory] = (process, request.run, request.attempt)
            self._selector.register(process.stdout, selectors.EVENT_READ, directory)  # type: ignore[arg-type]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="command-watcher", daemon=True)
                self._thread.start()
        os.write(self._wake, b"x")

    def watches(self, directory: str) -> bool:
        with self._lock:
            return directory in self._watched

    def wait(self, directory: str, seconds: float) -> None:
        """Wait for the end of a supervisor, `seconds` at most."""
        with self._lock:
            self._ended.wait(seconds)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        os.write(self._wake, b"x")
        if thread is not None:
            thread.join()
        for process, _, _ in self._watched.values():
            if process.stdout is not None:
                process.stdout.close()
            process.returncode = process.poll() or 0  # let go of on purpose; subprocess would warn of it
        self._selector.close()
        os.close(self._woken)
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fd == self._woken:
                    os.read(self._woken, 512)
                elif not os.read(key.fd, 512):
                    self._collect(key.data)

    def _collect(self, directory: str) -> None:
        with self._lock:
            process, run, attempt = self._watched.pop(directory)
            self._selector.unregister(process.stdout)  # type: ignore[arg-type]
        _finish(process)
        with self._lock:
            self._ended.notify_all()
        if not directory.endswith(".verify"):
            self._context.nudge(run, attempt)


# ---------------------------------------------------------------------- what is said to a program


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(part) for part in value]


def _codes(value: Any) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def _argv(request: Request, which: str, directory: str) -> list[str]:
    manifest = os.path.join(directory, _supervisor.MANIFEST)
    return [text.replace("{manifest}", manifest) for text in _texts(request.options[which])]


def _cwd(request: Request) -> str:
    return request.options.get("cwd") or "/"


def _program(request: Request, which: str, directory: str) -> tuple[str, list[str], str]:
    """Return the path of the program, its arguments, and where it runs. Raises Refused when something is missing."""
    if sys.platform != "linux":
        raise Refused(Fault("person", "`command` needs Linux", hint="take another action in this rule"))
    argv, cwd = _argv(request, which, directory), _cwd(request)
    if not os.path.isdir(cwd):
        raise Refused(_not_executed(f"cwd {errno.ENOENT}", argv[0], cwd))
    if "/" in argv[0]:
        path = os.path.join(cwd, argv[0])
        if not os.path.isfile(path):
            raise Refused(_not_executed(f"program {errno.ENOENT}", argv[0], cwd))
        if not os.access(path, os.X_OK):
            raise Refused(_not_executed(f"program {errno.EACCES}", argv[0], cwd))
        return path, argv, cwd
    found = shutil.which(argv[0], path=_environment(request, directory).get("PATH", os.defpath))
    if found is None:
        raise Refused(_not_executed(f"program {errno.ENOENT}", argv[0], cwd))
    return os.path.abspath(found), argv, cwd


def _environment(request: Request, directory: str) -> dict[str, str]:
    """Return the daemon's environment without what is the daemon's own, and what the program is to know."""
    kept = programs.environment()
    added = {name: str(value) for name, value in (request.options.get("env") or {}).items()}
    captures = {f"TRIGGER_{name.upper()}": value for name, value in request.captures.items()}
    return kept | added | captures | {
        "TRIGGER_RULE": request.rule,
        "TRIGGER_BATCH": str(request.run),
        "TRIGGER_ATTEMPT": str(request.attempt),
        "TRIGGER_MANIFEST": os.path.join(directory, _supervisor.MANIFEST),
        "TRIGGER_FILES": os.path.join(directory, _supervisor.FILES),
    }


def _manifest(request: Request, absolute: Sequence[str]) -> bytes:
    files = [
        {
            "root": file.root, "path": file.path, "absolute": path,
            "size": file.size, "mtime_ns": file.mtime_ns, "role": file.role,
        }
        for file, path in zip(request.files, absolute, strict=True)
    ]
    told = {
        "rule": request.rule, "run": request.run, "attempt": request.attempt,
        "group": dict(request.group), "captures": dict(request.captures), "files": files,
    }
    return json.dumps(told).encode("ascii")


# ---------------------------------------------------------------------- what a program says


def _first_line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """Return the supervisor's first line, '' if it ended without one, None if it said nothing in time."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return os.read(process.stdout.fileno(), 512).decode()  # a line is written at one blow


def _finish(process: subprocess.Popen[bytes]) -> None:
    """Collect a supervisor whose pipe is closed, or is about to be: by its end, and by nothing else."""
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _tail(path: str) -> str:
    """Return the last words of a file, one line, for people."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - WORDS_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-5:] if line.strip())


def _output(path: str) -> Json:
    """Return the JSON object on the last line of a program's output, else its last words, else None."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace").rstrip()  # bounded by the supervisor
    except OSError:
        return None
    last = text.rpartition("\n")[2].strip()
    if last.startswith("{"):
        try:
            return json.loads(last, parse_constant=lambda name: None)  # NaN is no JSON
        except (ValueError, RecursionError):
            pass  # words, then
    return text[-WORDS_BYTES:] or None


def _changed(directory: str) -> tuple[str, ...]:
    """Return the members that changed under the program, as its supervisor saw it at the end."""
    try:
        with open(os.path.join(directory, _supervisor.CHANGED), encoding="utf-8") as file:
            return tuple(json.load(file))
    except (FileNotFoundError, ValueError):
        return tuple(_supervisor.changed_members(directory))  # it was killed before it could look


def _proved(file: File) -> Mapping[str, Any]:
    return {
        "root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns,
        "digest": "", "to": "", "by": "command",
    }


# ---------------------------------------------------------------------- words for people


def _no_record(directory: str, why: str) -> Fault:
    hint = "make room there, or see who may write to it"
    return Fault("transient", f"cannot write to {directory}: {why}", hint, counts=False)


def _failed(fault: Fault, *, output: Json = None, changed: tuple[str, ...] = ()) -> Progress:
    return Progress("failed", why=fault.why, hint=fault.hint, fault=fault, output=output, changed=changed)


def _why_active(now: Standing, cancelled: bool) -> str:
    if now.end is not None:
        return "the program has ended; what it left in the background is being ended"
    if cancelled:
        return "cancelled; its processes are being ended"
    return f"runs as process {now.begun['pid']}" if now.begun else "begins"


def _not_executed(step: str, argv0: str, cwd: str) -> Fault:
    """Return the fault for a program that could not be executed; `step` is 'cwd ERRNO' or 'program ERRNO'."""
    where, _, number = step.partition(" ")
    code = int(number or 0)
    if where == "cwd":
        hint = "make the directory, or correct `cwd` in the rule"
        return Fault("person", f"cannot run in {cwd}: {os.strerror(code)}", hint)
    match code:
        case errno.ENOENT:
            hint = "install it, or correct the rule; for a script, look at its first line (#!)"
        case errno.EACCES:
            hint = f"make it executable for the daemon's user: chmod a+rx {argv0}"
        case errno.ENOEXEC:
            hint = "a script needs a first line such as #!/bin/sh"
        case errno.E2BIG:
            hint = "give it {manifest} instead of long lists"
        case _:
            hint = "see whether the daemon's user can execute it"
    return Fault("person", f"cannot execute {argv0}: {os.strerror(code)}", hint=hint)


def _fault(request: Request, argv0: str, directory: str, end: Mapping[str, Any]) -> Fault:
    """Return what the end of a program means for its run, when it is no success."""
    name = os.path.basename(argv0)
    said = _tail(os.path.join(directory, _supervisor.STDERR))
    words = f": {said}" if said else ", and said nothing on stderr"
    look = f"its output is in {directory}; then `trigger-daemon runs retry {request.run}`"
    code, number = int(end.get("code", -1)), int(end.get("signal", 0))
    match end.get("because"):
        case "timeout":
            timeout_s = float(request.options.get("timeout", 0.0))
            hint = f"raise `timeout` in the rule, or see what it waits for; {look}"
            return Fault("person", f"{name} did not end within {timeout_s:g} s and was ended{words}", hint)
        case "stopped":
            return Fault("transient", f"{name} was stopped from outside (machine or service going down)", counts=False)
        case _ if number in _STOPPING:
            return Fault("transient", f"{name} was stopped by signal {number}{words}")
        case _ if number:
            return Fault("person", f"{name} was killed by signal {number}{words}", hint=look)
        case _ if code in _codes(request.options.get("again")):
            return Fault("transient", f"{name} says: not now (exit code {code}){words}")
        case _ if code in _codes(request.options.get("hold")):
            return Fault("person", f"{name} asks for a person (exit code {code}){words}", hint=look)
        case _:
            return Fault("person", f"{name} failed with exit code {code}{words}", hint=look)


def _lost(request: Request, now: Standing, directory: str) -> Fault:
    argv0 = os.path.basename(_argv(request, "run", directory)[0])
    if now.phase == "absent":
        why = f"{directory} is gone"
    elif (now.begun or {}).get("boot") != _supervisor.boot_id():
        why = "the machine was restarted while it ran"
    else:
        why = "its supervisor was killed while it ran"
    hint = f"see what {argv0} has done, then `trigger-daemon runs retry {request.run}` or `runs abandon {request.run}`"
    return Fault("person", f"outcome unknown: {why}", hint=hint)


def _wish_end(directory: str) -> None:
    wish = os.path.join(directory, _supervisor.CANCEL)
    try:
        os.close(os.open(wish, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660))
    except (FileExistsError, FileNotFoundError):
        return  # wished before; or there is nothing to end


def _age_s(path: str) -> float:
    """Return how long ago a file of this boot was made; 0 if the wall clock was set back meanwhile."""
    try:
        return max(0.0, time.time() - os.stat(path).st_mtime)
    except FileNotFoundError:
        return 0.0
