"""A service with a REST interface, for the action `http`: real HTTP, runs that outlive it, and faults on order.

It speaks as Prefect 3 and Airflow 3 were seen to, as far as the recipes go,
and in a plain way of its own; what it was started for lies in its directory,
so that one that is killed goes on. A run delivers the files of its manifest.

    python -m tests.rest DIR PORT [--faults 0.01] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ENDED = ("COMPLETED", "FAILED", "CANCELLED")
DEPLOYMENT = "f455c3ec-fb49-4401-90d5-82ae64b2f238"
AT_RANDOM = ("lose", "drop", "500", "503", "429", "half", "html")


class Service:
    """One service over one directory; `with` runs it on a thread."""

    def __init__(self, base: Path, port: int = 0, *, tls: Any = None, faults: float = 0.0, seed: int = 1) -> None:
        self.base = base
        self.runs_dir = base / "runs"
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        self.honours = True  # the same key is the same run
        self.token = ""  # that must be shown as `Authorization: Bearer TOKEN`
        self.hold = False  # runs stay RUNNING while this, or until `go` lies in the directory above
        self.ends = "COMPLETED"
        self.faults: list[tuple[str, str, dict[str, Any]]] = []  # (start of METHOD PATH, kind, how), each once
        self.requests: list[dict[str, Any]] = []
        self.hooks: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self._probability, self._dice = faults, random.Random(seed)
        self.port, self._tls = port, tls
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Service:
        service = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.service = service
                super().__init__(*args)

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, route: str, kind: str, times: int = 1, **how: Any) -> None:
        """Let the next requests whose `METHOD PATH` begins so meet a fault."""
        with self.lock:
            self.faults += [(route, kind, how)] * times

    def next_fault(self, route: str) -> tuple[str, dict[str, Any]]:
        with self.lock:
            for fault in self.faults:
                if route.startswith(fault[0]):
                    self.faults.remove(fault)
                    return fault[1], fault[2]
            if self._dice.random() < self._probability:
                return self._dice.choice(AT_RANDOM), {}
        return "", {}

    # ------------------------------------------------------------------ runs

    def begin(self, key: str, body: dict[str, Any], about: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the run of a key, and whether it is new."""
        with self.lock:
            if key and self.honours and (known := self.by_key(key)):
                return known, False
            run = {"id": str(uuid.uuid4()), "key": key, "body": body, "state": "RUNNING", "time": time.time(), **about}
            self.write(run)
            return run, True

    def by_key(self, key: str) -> dict[str, Any] | None:
        link = self.runs_dir / f"key-{key}"
        return self.run(link.read_text()) if link.exists() else None

    def run(self, number: str) -> dict[str, Any] | None:
        """Return a run as it stands; it goes on while it is looked at."""
        path = self.runs_dir / f"{number}.json"
        if "/" in number or not path.exists():
            return None
        with self.lock:
            run: dict[str, Any] = json.loads(path.read_text())
            if run["state"] == "RUNNING" and not self.hold and (self.base.parent / "go").exists():
                self.deliver(run)
                run["state"] = self.ends
                self.write(run)
        return run

    def write(self, run: dict[str, Any]) -> None:
        """As durable as a service that is killed, and not its machine, has to be."""
        if run["key"]:
            _put(self.runs_dir / f"key-{run['key']}", run["id"])
        _put(self.runs_dir / f"{run['id']}.json", json.dumps(run))

    def deliver(self, run: dict[str, Any]) -> None:
        to = run["body"].get("to")
        for member in run["body"].get("files") or () if to else ():
            target = Path(to, member["path"])
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(Path(member["root"], member["path"]), target.with_name(f".{target.name}.part"))
                os.rename(target.with_name(f".{target.name}.part"), target)

    def runs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.runs_dir.glob("*.json"))]


def _put(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{threading.get_ident()}")
    new.write_text(text)
    new.rename(path)


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        service, path = self.service, urlsplit(self.path).path
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(text) if text else {}
        with service.lock:
            service.requests.append({
                "route": f"{self.command} {self.path}", "headers": dict(self.headers.items()), "body": body,
                "raw": text,
            })  # fmt: skip
        kind, how = service.next_fault(f"{self.command} {path}")
        match kind:
            case "drop":
                return self._hang_up()
            case "500" | "503" | "429" | "401" | "404" | "408" | "422":
                extra = {"retry-after": str(how["after"])} if "after" in how else {}
                return self._answer(int(kind), how.get("say", {"detail": f"fault {kind}"}), extra)
            case "redirect":
                return self._answer(how.get("status", 307), {}, {"location": how["to"]})
            case "slow":
                time.sleep(how["seconds"])
            case "dribble":
                return self._dribble(how["seconds"])
        status, told = (401, {"detail": "Not authenticated"}) if not self._may() else self._route(path, body)
        match kind:
            case "lose":
                return self._hang_up()
            case "500_after":
                status, told = 500, {"detail": "after it was taken"}
            case "half":
                return self._half(status, told)
            case "html":
                told = "<html>log in</html>"
            case "says":
                told = how["text"]
            case "huge":
                told = {"x": "y" * (2 << 20)}
        self._answer(status, told)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    def _may(self) -> bool:
        return not self.service.token or self.headers.get("authorization") == f"Bearer {self.service.token}"

    def _route(self, path: str, body: Any) -> tuple[int, Any]:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match self.command, parts:
            # as Prefect 3.9.1 answered
            case "POST", ["api", "deployments", deployment, "create_flow_run"]:
                if deployment != DEPLOYMENT:
                    return 404, {"detail": "Deployment not found"}
                run, new = self.service.begin(body.get("idempotency_key", ""), body.get("parameters", {}), {})
                return (201 if new else 200), _prefect(run)
            case "POST", ["api", "flow_runs", "filter"]:
                found = map(self.service.by_key, body["flow_runs"]["idempotency_key"]["any_"])
                return 200, [_prefect(run) for run in found if run]
            case "GET", ["api", "flow_runs", number]:
                run = self.service.run(number)
                return (200, _prefect(run)) if run else (404, {"detail": "Flow run not found"})
            case "POST", ["api", "flow_runs", number, "set_state"]:
                return self._cancelled(number, 201)
            # as Airflow 3.3.2 answered
            case "POST", ["api", "v2", "dags", dag, "dagRuns"]:
                if dag != "process":
                    return 404, {"detail": f"Dag with dag_id: '{dag}' not found"}
                run, new = self.service.begin(body["dag_run_id"], body.get("conf") or {}, {})
                return (200, _airflow(run)) if new else (409, {"detail": {"reason": "Unique constraint violation"}})
            case "GET", ["api", "v2", "dags", dag, "dagRuns", key]:
                run = self.service.by_key(key)
                return (200, _airflow(run)) if run else (404, {"detail": f"The DagRun ... `{key}` was not found"})
            case "PATCH", ["api", "v2", "dags", dag, "dagRuns", key]:
                run = self.service.by_key(key)
                return self._cancelled(run["id"], 200) if run else (404, {})
            # plain
            case "POST", ["hook", *_]:
                with self.service.lock:
                    self.service.hooks.append(body)
                return 200, "ok"
            case "POST", ["runs"]:
                key = self.headers.get("idempotency-key") or ""
                run, new = self.service.begin(key, body, {})
                return (201 if new else 200), {"id": run["id"], "echo": dict(self.headers.items())}
            case "GET", ["runs"]:
                wanted = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
                run = self.service.by_key(wanted)
                return 200, [{"id": run["id"], "key": run["key"]}] if run else []
            case "GET", ["runs", number]:
                run = self.service.run(number)
                told = {"echo": dict(self.headers.items()), "state": run["state"]} if run else {}
                return (200, told) if run else (404, {"detail": "no such run"})
            case "DELETE", ["runs", number]:
                return self._cancelled(number, 202)
        return 404, {"detail": "no such place"}

    def _cancelled(self, number: str, status: int) -> tuple[int, Any]:
        with self.service.lock:
            run = self.service.run(number)
            if run is None:
                return 404, {}
            if run["state"] not in ENDED:
                self.service.write({**run, "state": "CANCELLED"})
        return status, {}

    # --------------------------------------------------------------- answers

    def _answer(self, status: int, told: Any, extra: dict[str, str] | None = None) -> None:
        data = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(told, str) else "application/json"
        for name, value in {"content-type": kind, "content-length": str(len(data)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _half(self, status: int, told: Any) -> None:
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self._hang_up()

    def _dribble(self, seconds: float) -> None:
        """A byte of the headers now and then: each read comes to something."""
        ends = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while time.monotonic() < ends:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.wfile.flush()
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _prefect(run: dict[str, Any]) -> dict[str, Any]:
    told = {"RUNNING": None, "COMPLETED": None, "CANCELLED": "Flow run was cancelled successfully."}
    message = told.get(run["state"], "Flow run encountered an exception: RuntimeError: asked to")
    state = {"type": run["state"], "name": run["state"].title(), "message": message}
    return {"id": run["id"], "idempotency_key": run["key"], "parameters": run["body"], "state": state,
            "state_type": run["state"], "name": "married-dove", "total_run_time": 0.5}  # fmt: skip


def _airflow(run: dict[str, Any]) -> dict[str, Any]:
    states = {"RUNNING": "running", "COMPLETED": "success", "FAILED": "failed", "CANCELLED": "failed"}
    return {"dag_run_id": run["key"], "dag_id": "process", "state": states[run["state"]], "conf": run["body"],
            "duration": 13.5, "note": None}  # fmt: skip


@contextlib.contextmanager
def running(base: Path, **how: Any) -> Iterator[Service]:
    """A service whose runs come to their end at once."""
    (base / "go").touch()
    with Service(base / "service", **how) as service:
        yield service


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with Service(given.base, given.port, faults=given.faults, seed=given.seed) as service:
        print(service.port, flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
