"""The emulator as tests hold it: a process of its own, its address, and every order of the control plane.

    with Emulator(tmp_path / "globus") as globus:
        globus.client(CLIENT, "secret")
        krios = globus.collection("Krios", tmp_path / "krios")
        globus.fault("POST /v0.10/transfer", "drop_after")
"""

from __future__ import annotations

import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

Document = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
_SPACE = uuid.UUID("6f0c8f1e-9d0a-4b6e-9a55-2f6d0f6f7a11")
_START_S = 30.0  # of a loaded machine; an unloaded one needs a fifth of a second
_CALL_S = 30.0
_SERVICES = ("AUTH", "TRANSFER", "FLOWS", "TIMER", "SEARCH", "GROUPS", "COMPUTE")


class ControlError(Exception):
    """The control plane refused an order."""


def named(text: str) -> str:
    """Return a UUID as it is, and for a name always the same UUID."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(_SPACE, text))


class Emulator:
    """Runs the service over one state directory; it can be killed and started again at the same port."""

    def __init__(self, directory: Path, *, config: Document | None = None, python_path: Path | None = None) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.url = ""
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._python_path = python_path
        self._config = self.directory / "config.json" if config else None
        if self._config:
            self._config.write_text(json.dumps(config))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # ---------------------------------------------------------------- process

    def start(self) -> None:
        """Start the service, at the port it had before, and wait until it listens."""
        if self._process is not None:
            raise RuntimeError("the emulator runs already")
        command = [sys.executable, "-m", "tests.globus.service", "--state", str(self.directory / "state"),
                   "--port", str(self._port), "--end-with-stdin"]  # fmt: skip
        if self._config:
            command += ["--config", str(self._config)]
        paths = [str(_ROOT)] + ([str(self._python_path)] if self._python_path else [])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.url = _first_line(self._process)
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """Kill the service as a power cut would; what it answered stays."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the emulator does not run")
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """Return what points the SDK and the CLI here; set it before any client is made."""
        urls = {f"GLOBUS_SDK_SERVICE_URL_{name}": self.url + "/" for name in _SERVICES}
        return urls | {"GLOBUS_SDK_HTTP_TIMEOUT": "5", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def control(self, method: str, path: str, body: Any = None) -> Any:
        """Send one order by hand. Raises ControlError with what the service said."""
        request = urllib.request.Request(
            f"{self.url}/_control/{path}", method=method, data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_CALL_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ControlError(f"{method} {path}: {error.code} {error.read().decode()}") from None

    def reset(self) -> None:
        """Forget everything: cheaper between tests than another process."""
        self.control("POST", "reset")

    def settings(self, **changes: Any) -> Document:
        """Turn settings (state.SETTINGS) and return all of them."""
        return self.control("POST", "settings", changes)

    # ------------------------------------------------------------- inhabitants

    def client(self, client_id: str, secret: str | None = None, name: str = "trigger-daemon") -> str:
        """Register a client; without a secret it is a native app, for logins of people."""
        return self.control("POST", "client", {"id": client_id, "secret": secret, "name": name})["id"]

    def identity(self, username: str) -> str:
        return self.control("POST", "identity", {"id": named(username), "username": username})["id"]

    def code(self, identity: str, scope: str) -> str:
        """Return the authorization code that a login page would show after the person agreed to these scopes."""
        return self.control("POST", "code", {"identity": identity, "scope": scope})["code"]

    def collection(
        self, key: str, directory: Path, *, entity_type: str = "GCSv5_guest_collection", owner: str | None = None,
        **document: Any,
    ) -> str:  # fmt: skip
        """Show a directory as a collection. With an owner, everybody else needs an access rule."""
        directory.mkdir(parents=True, exist_ok=True)
        body = {"id": named(key), "directory": str(directory), "entity_type": entity_type, "owner": owner}
        if named(key) != key:
            body["display_name"] = key
        return self.control("POST", "collection", body | document)["id"]

    def flow(self, definition: Document, input_schema: Document | None = None, **fields: Any) -> str:
        body = {"definition": definition, "input_schema": input_schema or {}} | fields
        return self.control("POST", "flow", body)["id"]

    def index(self, name: str = "Visits", writers: list[str] | None = None) -> str:
        return self.control("POST", "index", {"id": named(name), "name": name, "writers": writers})["id"]

    def group(self, name: str = "Visit", members: dict[str, str] | None = None) -> str:
        return self.control("POST", "group", {"id": named(name), "name": name, "members": members or {}})["id"]

    def provider(self, url: str, **order: Any) -> None:
        """Order what an action provider answers: status, details, error, seconds, times."""
        self.control("POST", "provider", {"url": url} | order)

    def function(self, **order: Any) -> str:
        """Order what a Compute function gives (output, error, lost, callable, seconds); return its id."""
        return self.control("POST", "function", order)["function_id"]

    def endpoint(self, key: str = "Cluster", **fields: Any) -> str:
        """Let there be a Compute endpoint, or change one: online, denied, functions (those that may run)."""
        return self.control("POST", "endpoint", {"id": named(key)} | fields)["uuid"]

    # ------------------------------------------------------------------ faults

    def fault(
        self, pattern: str, kind: str, *, times: int | None = None, probability: float | None = None, seed: int = 0,
        **more: Any,
    ) -> None:  # fmt: skip
        """Order a fault: once unless `times` says otherwise, and without end if there is a probability."""
        order: Document = {"pattern": pattern, "kind": kind, "probability": probability, "seed": seed} | more
        if times is not None:
            order["times"] = times
        self.control("POST", "fault", order)

    def clear_faults(self) -> None:
        self.control("DELETE", "faults")

    def faults(self) -> list[Document]:
        return self.control("GET", "faults")["faults"]

    def expire_tokens(self, *, refresh: bool = False) -> int:
        """Make every access token worthless; with `refresh` the refresh tokens are revoked too."""
        return self.control("POST", "expire", {"refresh": refresh})["expired"]

    def require_consent(self, collection: str) -> None:
        """From now on a collection asks for data access, and what was consented to before is gone."""
        self.mood(collection, consent=True)

    def mood(self, collection: str, **moods: Any) -> None:
        """Set down, quota_bytes, denied, pause_rules, corrupt, lies or keeps_times of a collection."""
        self.control("POST", f"collection/{named(collection)}", moods)

    def pause_task(self, task_id: str, *, reason: str = "paused", message: str = "paused by the site") -> None:
        """Pause a task; with the reason `credentials` it becomes INACTIVE instead."""
        self.control("POST", f"task/{task_id}", {"action": "pause", "reason": reason, "message": message})

    def resume_task(self, task_id: str) -> None:
        self.control("POST", f"task/{task_id}", {"action": "resume"})

    def speed(self, *, bytes_per_s: float | None = None, task_seconds: float | None = None) -> None:
        """Slow transfers down, per task; zero lifts the limit again."""
        wanted = {"bytes_per_s": bytes_per_s, "task_seconds": task_seconds}
        self.settings(**{key: value for key, value in wanted.items() if value is not None})

    def clock(self, *, advance_s: float = 0.0, scale: float | None = None) -> float:
        """Move the service's clock, or let it run faster; return the seconds it shows."""
        return self.control("POST", "clock", {"advance_s": advance_s, "scale": scale})["now"]

    # ------------------------------------------------------------------- looks

    def requests(self, pattern: str = "", since: int = 0) -> list[Document]:
        """Return the log: method, path, status that the route gave, carried_out, fault, time, body.

        A pattern such as `POST /flows/*/run` picks some of them.
        """
        lines = self.control("GET", f"requests?since={since}")["requests"]
        return [one for one in lines if fnmatch.fnmatchcase(f"{one['method']} {one['path']}", pattern or "*")]

    def tasks(self) -> list[Document]:
        """Return every task of everybody, oldest first, with its events."""
        return self.control("GET", "tasks")["tasks"]

    def items(self, task_id: str) -> list[Document]:
        return self.control("GET", f"task/{task_id}/items")["items"]

    def runs(self) -> list[Document]:
        return self.control("GET", "runs")["runs"]

    def computed(self) -> list[Document]:
        """Return every task of Compute, oldest first, with what the interface hides."""
        return self.control("GET", "compute")["tasks"]

    def entries(self, index: str) -> list[Document]:
        return self.control("GET", f"index/{named(index)}")["entries"]

    def access(self, collection: str) -> list[Document]:
        """Return the access rules of a collection."""
        return self.control("GET", f"collection/{named(collection)}/access")["access"]

    def notifications(self) -> list[Document]:
        return self.control("GET", "notifications")["notifications"]

    def wait(self, look: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        """Return the first true value of `look`; raise TimeoutError if none comes."""
        deadline = time.monotonic() + timeout_s
        while True:
            if value := look():
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s in vain; tasks: {self.tasks()}, runs: {self.runs()}")
            time.sleep(0.01)


def _first_line(process: subprocess.Popen[bytes]) -> str:
    lines: queue.Queue[bytes] = queue.Queue()
    stdout: IO[bytes] = process.stdout  # type: ignore[assignment]
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=_START_S)
    except queue.Empty:
        line = b""
    if not line:
        process.kill()
        process.wait()
        raise RuntimeError("the emulated Globus did not start; what it said is on standard error")
    return line.decode().strip()
