"""What the conformance suite needs to know of each action: one bench a file of `trigger_daemon/actions`.

A bench builds requests over given files, says what the destination should hold
and what it holds, and can spoil it. The laws are in `test_conformance.py`.
Run as a program it is another life of the daemon: it starts or polls what the
test's own life began, knowing nothing but the bench's directory.

    python conformance.py start|poll ACTION BASE      (request and handle lie in BASE)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from broker import Broker, Listener, running
from far import rclone_on_the_path
from globus.emulator import Emulator, named
from rest import Service
from trigger_daemon import actions, registry
from trigger_daemon.actions import Context, File, Progress, Request

PATIENCE_S = 90.0  # for a busy machine
SLOW_BYTES_PER_S = 200_000  # of a slow bench that moves bytes itself


class Bench:
    """One action over one directory: `source/`, `dest/`, `state/`."""

    name = ""
    ODD: bytes = b"s1/\xff\n.mrc"  # a name that is as odd as it takes
    REFUSED: bytes | None = None  # one that it does not take; None: it takes every name of a file system
    READS_AGAIN = True  # verify looks at the destination; otherwise it asks the provider what was delivered

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        """What has to run while benches of this directory are in use."""
        yield

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        self.base = base
        self.slow = slow  # an attempt takes so long that it can be interrupted; a later life is not slow
        self.source, self.dest, self.state = base / "source", base / "dest", base / "state"
        for directory in (self.source, self.dest, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        self.nudges: list[tuple[int, int]] = []

    # ---- what an action's own bench says

    def options(self) -> Mapping[str, Any]:
        """The options that the laws are run with, over the defaults."""
        raise NotImplementedError

    def settings(self) -> Mapping[str, Any]:
        """The daemon's settings, as far as the action reads them."""
        return {}

    def executions(self) -> int | None:
        """How often the work was begun; None where that leaves no trace."""
        return None

    def lie(self) -> bool:
        """Let the provider claim success for one file that it leaves out; false where nobody claims anything."""
        return False

    def delivered(self) -> dict[str, bytes]:
        """Everything that lies at the destination, hidden things too: path and content."""
        found = {}
        for where, _, names in os.walk(os.fsencode(self.dest)):
            for name in names:
                path = Path(os.fsdecode(os.path.join(where, name)))
                with contextlib.suppress(FileNotFoundError):  # what is temporary may be on its way out
                    found[str(path.relative_to(self.dest))] = path.read_bytes()
        return found

    def spoil(self, path: str, how: str) -> None:
        """Do to a delivered file what somebody else might: `overwritten` in one byte, `truncated`, `removed`."""
        there = self.dest / path
        content = bytearray(there.read_bytes())
        match how:
            case "overwritten":
                content[len(content) // 2] ^= 0xFF
                there.write_bytes(content)
            case "truncated":
                there.write_bytes(content[:-1])
            case "removed":
                there.unlink()

    def is_temporary(self, path: str) -> bool:
        """Whether this name at the destination can be taken for a finished file by nobody."""
        return Path(path).name.startswith(".")

    # ---- the same for all

    def write(self, path: str, content: bytes) -> File:
        """A member at the source."""
        there = self.source / path
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(content)
        stat = there.stat()
        return File(str(self.source), path, stat.st_size, stat.st_mtime_ns)

    def action(self) -> actions.Action:
        """A new one, as after a start of the daemon."""
        context = Context(
            state_dir=str(self.state), nudge=lambda *what: self.nudges.append(what),
            bandwidth=lambda: SLOW_BYTES_PER_S if self.slow else None, settings=self.settings(),
        )  # fmt: skip
        made: actions.Action = registry.find_action(self.name)(context)
        return made

    def request(self, files: tuple[File, ...], *, run: int = 1, attempt: int = 1) -> Request:
        defaults = {name: option.default for name, option in registry.find_action(self.name).OPTIONS.items()}
        return Request(
            run=run, attempt=attempt, rule="conformance", group={"chip": "c1"}, captures={"chip": "c1"},
            files=files, options={**defaults, **self.options()},
        )  # fmt: skip

    def elsewhere(self, verb: str, request: Request, handle: Any = None) -> Callable[[], dict[str, Any]]:
        """Begin the verb in another process; what is returned waits for its answer."""
        import subprocess

        (self.base / "request").write_bytes(pickle.dumps((request, handle, self.slow)))
        path = os.pathsep.join(part for part in sys.path if part)
        program = subprocess.Popen(
            [sys.executable, __file__, verb, self.name, str(self.base)], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

        def answer() -> dict[str, Any]:
            said, _ = program.communicate(timeout=PATIENCE_S)
            told: dict[str, Any] = json.loads(said)
            return told

        return answer


# A program that delivers every file of its manifest under its final name, and counts its executions.
DELIVER = """#!{python}
import json, os, shutil, sys, time
base, manifest, slow = sys.argv[1:]
with open(base + "/executions", "a") as file:
    file.write("x")
if slow == "slow":
    while not os.path.exists(base + "/go"):
        time.sleep(0.01)
for member in json.load(open(manifest))["files"]:
    target = os.path.join(base, "dest", member["path"])
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(member["absolute"], target + ".part")
    os.rename(target + ".part", target)
print(json.dumps(dict(delivered=True)))
"""

COMPARE = """#!{python}
import json, os, sys
base, manifest = sys.argv[1:]
for member in json.load(open(manifest))["files"]:
    with open(member["absolute"], "rb") as a, open(os.path.join(base, "dest", member["path"]), "rb") as b:
        if a.read() != b.read():
            sys.exit(1)
"""


class CommandBench(Bench):
    """A script delivers, a second one compares. A slow one waits until another life begins."""

    name = "command"

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        if not slow:
            (base / "go").touch()
        for name, text in (("deliver", DELIVER), ("compare", COMPARE)):
            if not (base / name).exists():  # it may be running
                (base / name).write_text(text.format(python=sys.executable))
                (base / name).chmod(0o755)

    def options(self) -> Mapping[str, Any]:
        slow = "slow" if self.slow else "fast"
        return {
            "run": (str(self.base / "deliver"), str(self.base), "{manifest}", slow),
            "verify": (str(self.base / "compare"), str(self.base), "{manifest}"),
        }

    def executions(self) -> int | None:
        trace = self.base / "executions"
        return len(trace.read_text()) if trace.exists() else 0


class CopyBench(Bench):
    """Below `dest`, as below the root."""

    name = "copy"

    def options(self) -> Mapping[str, Any]:
        return {"to": (str(self.dest),)}


class RsyncBench(Bench):
    """A local directory; the far ones are in test_rsync.py."""

    name = "rsync"

    def options(self) -> Mapping[str, Any]:
        return {"to": str(self.dest)}

    def is_temporary(self, path: str) -> bool:
        return any(part.startswith(".") for part in Path(path).parts)


class RcloneBench(Bench):
    """A remote of the type `local`; others are in test_rclone.py."""

    name = "rclone"
    ODD = "s1/é\u0301 #;'\".mrc".encode()
    REFUSED = b"s1/\n.mrc"

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        with rclone_on_the_path():
            yield

    def options(self) -> Mapping[str, Any]:
        config = self.base / "rclone.conf"
        if not config.exists():
            config.write_text("[there]\ntype = local\n")
            config.chmod(0o600)
        return {"to": f"there:{self.dest}", "config": str(config)}

    def is_temporary(self, path: str) -> bool:
        return path.endswith(".partial")


CLIENT, SECRET = named("trigger-daemon"), "not-a-secret"
SOURCE, DEST, FLOW = named("Source"), named("Dest"), named("Deliver")

# A flow that delivers the items of its input. It leaves out what is not there, as its own authors decide.
DELIVER_FLOW = {
    "StartAt": "Deliver",
    "States": {
        "Deliver": {
            "Type": "Action", "ActionUrl": "https://transfer.actions.globus.org/transfer", "ResultPath": "$.delivered",
            "Parameters": {
                "source_endpoint": SOURCE, "destination_endpoint": DEST, "DATA.$": "$.items",
                "skip_source_errors": True,
            },
            "End": True,
        },
    },
}  # fmt: skip


class GlobusBench(Bench):
    """The emulated service shows `source` and `dest` as collections. A slow one is fast again in another life."""

    ODD = b"s1/\n.mrc"
    REFUSED = b"\xff.mrc"

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        """The service, and the environment that leads there, which other processes inherit."""
        with Emulator(base / "globus") as globus:
            globus.client(CLIENT, SECRET)
            globus.collection(SOURCE, base / "source")
            globus.collection(DEST, base / "dest")
            globus.flow(DELIVER_FLOW, id=FLOW)
            globus.settings(run_listed_after_s=0.3)  # a run that is under way cannot be seen at once
            before = dict(os.environ)
            os.environ.update(globus.environment())
            try:
                yield
            finally:
                os.environ.clear()
                os.environ.update(before)

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        self.globus = Emulator(base / "globus")  # to give orders with: the process is of `around`
        self.globus.url = os.environ.get("GLOBUS_SDK_SERVICE_URL_AUTH", "").rstrip("/")
        if self.globus.url:  # what an action declares is asked for without a service
            self.globus.speed(bytes_per_s=SLOW_BYTES_PER_S if slow else 0)

    def settings(self) -> Mapping[str, Any]:
        return {
            "globus": {
                "client_id": CLIENT, "client_secret": SECRET, "collections": {SOURCE: {str(self.source): "/"}},
                "poll_s": 0.02, "listed_after_s": 1.0,
            }
        }  # fmt: skip


class GlobusTransferBench(GlobusBench):
    """The service compares checksums while it delivers; nobody can read the destination again."""

    name = "globus_transfer"
    READS_AGAIN = False

    def options(self) -> Mapping[str, Any]:
        return {"from": SOURCE, "to": DEST, "stuck_after": 1.0}

    def executions(self) -> int | None:
        return len(self.globus.tasks())

    def lie(self) -> bool:
        self.globus.mood(DEST, lies=1)
        return True


class GlobusFlowBench(GlobusBench):
    """A flow of one transfer."""

    name = "globus_flow"

    def options(self) -> Mapping[str, Any]:
        return {"flow": FLOW, "from": SOURCE, "input": {"items": "{items}"}, "label": "conformance"}

    def executions(self) -> int | None:
        return len(self.globus.runs())


CLUSTER, DELIVER_FUNCTION, NOTHING = named("Cluster"), named("deliver"), named("nothing")


class GlobusComputeBench(GlobusBench):
    """A function that copies, executed by the service. A slow one waits for its endpoint, until another life begins.

    An earlier batch has been there: without one there is no task group to look for tasks in.
    """

    name = "globus_compute"
    ODD = Bench.ODD
    REFUSED = None

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        with super().around(base):
            bench = cls(base)
            bench.globus.settings(task_listed_after_s=0.3)
            bench.globus.function(function_id=DELIVER_FUNCTION, callable="tests.globus.functions:deliver")
            bench.globus.function(function_id=NOTHING)
            action, request = bench.action(), bench.request((), run=1_000)
            request = dataclasses.replace(request, options={**request.options, "function": NOTHING})
            poll_to_end(action, request, action.start(request, action.prepare(request)))
            action.close()
            yield

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        if self.globus.url:
            self.globus.endpoint(CLUSTER, online=not slow)

    def options(self) -> Mapping[str, Any]:
        about = {"source": str(self.source), "dest": str(self.dest), "trace": str(self.base / "executions")}
        return {"endpoint": CLUSTER, "function": DELIVER_FUNCTION, "kwargs": {"files": "{manifest}", **about}}

    def executions(self) -> int | None:
        trace = self.base / "executions"
        return len(trace.read_text()) if trace.exists() else 0


class MqttBench(Bench):
    """A message names the files; what they hold is taken to be delivered. A slow broker hangs until another life."""

    name = "mqtt"
    TOPIC = "facility/conformance/c1"
    _running: ClassVar[dict[Path, tuple[Broker, Listener]]] = {}  # not in the other processes

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        """The broker, with who hears everything, and what other processes need to find it."""
        with running(base / "broker", topics=[f"write {cls.TOPIC}"]) as broker:
            assert broker.process is not None
            (base / "found").write_text(json.dumps({"pid": broker.process.pid, "mqtt": broker.settings()}))
            listener = Listener(broker, "#")
            cls._running[base] = broker, listener
            try:
                yield
            finally:
                broker.go()
                listener.close()
                del cls._running[base]

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        if (base / "found").exists():  # what an action declares is asked for without a broker
            os.kill(json.loads((base / "found").read_text())["pid"], signal.SIGSTOP if slow else signal.SIGCONT)

    def settings(self) -> Mapping[str, Any]:
        found = self.base / "found"
        return {"mqtt": json.loads(found.read_text())["mqtt"]} if found.exists() else {}

    def options(self) -> Mapping[str, Any]:
        return {"topic": self.TOPIC, "files": True}

    def messages(self) -> dict[str, dict[str, Any]]:
        """What came until now, by its id."""
        broker, listener = self._running[self.base]
        broker.go()
        fence = os.urandom(8).hex()
        listener.say("fence", {"fence": fence})
        listener.until("fence", lambda payload: payload["fence"] == fence)
        return {payload["id"]: payload for payload in listener.of("c1")}

    def executions(self) -> int | None:
        return len(self.messages())  # told twice it is one: whoever hears it skips what he has had

    def delivered(self) -> dict[str, bytes]:
        members = [member for message in self.messages().values() for member in message["members"]]
        return {member["path"]: Path(member["root"], member["path"]).read_bytes() for member in members}


class HttpBench(Bench):
    """A service that delivers what its manifest says. A slow one waits until another life begins."""

    name = "http"
    ODD = b"s1/\n.mrc"
    REFUSED = b"\xff.mrc"

    @classmethod
    @contextlib.contextmanager
    def around(cls, base: Path) -> Iterator[None]:
        """The service; its address lies in the directory."""
        with Service(base / "service") as service:
            (base / "url").write_text(service.url)
            yield

    def __init__(self, base: Path, *, slow: bool = False) -> None:
        super().__init__(base, slow=slow)
        if not slow:
            (base / "go").touch()

    def options(self) -> Mapping[str, Any]:
        address = self.base / "url"  # what an action declares is asked for without a service
        url = address.read_text() if address.exists() else "http://127.0.0.1:9"
        return {
            "url": f"{url}/runs", "json": {"to": str(self.dest), "files": "{manifest}"}, "handle": "id",
            "find": {"url": f"{url}/runs?key={{key}}", "handle": "[0].id", "listed_after": "300ms"},
            "poll": {
                "url": f"{url}/runs/{{handle}}", "every": "100ms", "active": "state == 'RUNNING'",
                "succeeded": "state == 'COMPLETED'", "failed": "state == 'FAILED'", "cancelled": "state == 'CANCELLED'",
            },
            "cancel": {"url": f"{url}/runs/{{handle}}", "method": "DELETE"},
        }  # fmt: skip

    def executions(self) -> int | None:
        return len(list((self.base / "service" / "runs").glob("*.json")))


BENCHES: Mapping[str, type[Bench]] = {
    bench.name: bench
    for bench in (
        CommandBench, CopyBench, RsyncBench, RcloneBench, GlobusTransferBench, GlobusFlowBench, GlobusComputeBench,
        HttpBench, MqttBench,
    )
}


def through_json(value: Any) -> Any:
    """What the journal gives back of a handle."""
    return json.loads(json.dumps(value))


def insist(ask: Callable[[], Any]) -> Any:
    """Ask, as the executor does, until the provider can tell."""
    patience = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except actions.Unknown:
            if time.monotonic() > patience:
                raise
            time.sleep(0.05)


def poll_to_end(action: actions.Action, request: Request, handle: Any) -> Progress:
    """Poll as the executor does, a little more often."""
    patience = time.monotonic() + PATIENCE_S
    while time.monotonic() < patience:
        try:
            progress = action.poll(request, handle)
        except actions.Unknown:
            time.sleep(0.05)
            continue
        if progress.status not in ("active", "inactive"):
            return progress
        time.sleep(min(progress.again_in_s, 0.05))
    raise AssertionError("the attempt did not end")


def _main(verb: str, name: str, base: str) -> None:
    request, handle, slow = pickle.loads((Path(base) / "request").read_bytes())
    if verb == "start":  # and die as a daemon dies: without a word to its provider
        bench = BENCHES[name](Path(base), slow=slow)
        action = bench.action()
        prepared = through_json(action.prepare(request)) if action.PREPARES else None
        print(json.dumps({"handle": action.start(request, prepared), "prepared": prepared}), flush=True)
        os.kill(os.getpid(), 9)
    bench = BENCHES[name](Path(base))
    action = bench.action()
    progress = poll_to_end(action, request, handle)
    action.close()
    print(json.dumps({"status": progress.status, "why": progress.why}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
