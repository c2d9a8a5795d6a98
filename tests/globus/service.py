"""Serve the emulated Globus: `python -m tests.globus.service --state DIR [--port 0] [--config FILE]`.

One port for all services. A request is read, faults that a test ordered are applied,
the route acts within one transaction together with its line in the log of requests,
and only then is the answer sent.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import threading
import time
import tomllib
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import auth, compute, control, flows, groups, search, timers, transfer
from .answer import NOBODY, Answer, Caller, Refusal, Request, Route
from .control import Fault
from .mover import Mover
from .runs import Runner
from .state import Store, new_id

_BODY_MAX_BYTES = 64 << 20  # a submission of a hundred thousand files is 20 MB
_ROUTES: list[Route] = [
    *control.routes(), *auth.routes(), *transfer.routes(), *flows.routes(), *search.routes(), *timers.routes(),
    *groups.routes(), *compute.routes(),
]  # fmt: skip
_SERVERS = {
    "transfer": (auth.TRANSFER,), "search": (auth.SEARCH,), "timers": (auth.TIMERS,), "groups": (auth.GROUPS,),
    "flows": (auth.FLOWS,), "compute": (auth.COMPUTE,),
}  # fmt: skip


class _Dropped(Exception):
    """The connection is closed without an answer, or in the middle of one."""


def _unauthorized(service: str, path: str) -> Refusal:
    """Say in the words of each service that the token is not good."""
    match service:
        case "transfer":
            body: Any = {"code": "AuthenticationFailed", "message": "Token is not active", "request_id": new_id()[:9],
                         "resource": path}  # fmt: skip
        case "flows":
            error = {"code": "AUTHENTICATION_ERROR", "detail": "Expired or invalid Bearer token"}
            body = {"error": error, "debug_id": new_id()}
        case "search":
            body = search.error(401, "Unauthorized.Token", "The token is not valid").body
        case "auth":
            body = {"error": "unauthorized", "error_description": "Unauthorized"}
        case _:
            body = {"errors": [{"status": "401", "code": "UNAUTHORIZED", "title": "Unauthorized",
                                "detail": "The token is not valid", "id": new_id()}]}  # fmt: skip
    return Refusal(401, body)


def error_body(service: str, status: int, code: str, path: str) -> Any:
    """Return a body for an ordered error, in the shape of the service that is hit."""
    message = f"emulated fault: {code}"
    match service:
        case "flows":
            return {"error": {"code": code, "detail": message}, "debug_id": new_id()}
        case "search":
            return search.error(status, code, message).body
        case "auth":
            return {"error": code}
        case "compute":
            return {"status": "Failed", "code": code, "reason": message, "http_status_code": status}
        case "timers":
            return {"error": {"code": code, "detail": message, "status": status}}
    return {"code": code, "message": message, "request_id": new_id()[:9], "resource": path}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "emulated-globus"
    wbufsize = -1                    # headers and body leave in one segment
    disable_nagle_algorithm = True
    timeout = 120                    # an idle connection gives its thread back
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log of requests is in the store."""

    def _serve(self) -> None:
        try:
            self._answer()
        except _Dropped:
            self.close_connection = True
            # With a linger of zero the peer sees a reset, as when a router forgets a connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile = open(os.devnull, "wb")  # noqa: SIM115 - closed by the base class
            self.connection.close()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        while path.startswith("//"):
            path = path[1:]  # a base URL that ends with a slash, joined to a path that begins with one
        length = int(self.headers.get("Content-Length") or 0)
        if length > _BODY_MAX_BYTES:
            self._send(413, {"code": "RequestTooLarge", "message": "too large"})
            raise _Dropped
        raw = self.rfile.read(length)
        found, parts = _find(self.command, path)
        request = Request(
            self.server.store, self.command, path, parts, parse_qs(split.query, keep_blank_values=True), None,
            {key.lower(): value for key, value in self.headers.items()}, base_url=self.server.url, size_bytes=length,
        )  # fmt: skip
        if found is not None and found.service == "control":
            self._send(*_control(found, request, raw))
            return
        self._under_faults(found, request, raw, split.query)

    def _under_faults(self, found: Route | None, request: Request, raw: bytes, query: str) -> None:
        store = self.server.store
        service = found.service if found else "transfer"
        with store.transaction():
            faults = control.due(store, request.method, request.path)
        for fault in faults:
            if fault.kind == "delay" and fault.when == "before":
                time.sleep(fault.seconds)
        fault = next((one for one in faults if one.kind != "delay"), None)
        name = fault.kind if fault else None
        if fault is not None and not fault.acts:
            status = 0 if fault.kind == "refuse" else fault.status
            control.note(store, request, query, raw, status, False, name)
            self._inject(fault, service, request)
            return
        status, body, headers = _act(found, request, raw, query, name)
        for one in faults:
            if one.kind == "delay" and one.when == "after":
                time.sleep(one.seconds)
        if fault is None:
            self._send(status, body, headers)
        else:
            self._inject(fault, service, request, status, body, headers)

    def _inject(
        self, fault: Fault, service: str, request: Request,
        status: int = 200, body: Any = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        match fault.kind:
            case "refuse" | "drop_after":
                raise _Dropped
            case "cut":
                self._send(status, body, headers, cut=True)
                raise _Dropped
            case "html":
                page = b"<html><head><title>Welcome</title></head><body>Please accept the terms.</body></html>"
                self._send_bytes(fault.status, page, "text/html", {})
            case "drip":
                self._pour(b" ", fault.seconds or 0.1)
            case "endless":
                self._pour(b" " * 1_000_000, 0.0)
            case "redirect":
                self._send(fault.status, None, {"Location": fault.to})
            case "unauthorized_once":
                refusal = _unauthorized(service, request.path)
                self._send(refusal.status, refusal.body)
            case "rate_limited":
                limited = error_body(service, 429, fault.code, request.path)
                self._send(429, limited, {"Retry-After": str(fault.retry_after)})
            case _:
                self._send(fault.status, fault.body or error_body(service, fault.status, fault.code, request.path))

    def _pour(self, part: bytes, every_s: float) -> None:
        """Answer without an end, until the other side has enough; a gigabyte at most."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for _ in range(1_000):
            self.wfile.write(part)
            self.wfile.flush()
            time.sleep(every_s)

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The `Date` of answers is that of the service's own clock."""
        return super().date_time_string(self.server.store.now() if timestamp is None else timestamp)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self._send_bytes(status, json.dumps(body).encode(), "application/json", headers or {}, cut=cut)

    def _send_bytes(
        self, status: int, data: bytes, kind: str, headers: dict[str, str], *, cut: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()


def _find(method: str, path: str) -> tuple[Route | None, dict[str, str]]:
    for one in _ROUTES:
        if one.method == method and (match := one.pattern.fullmatch(path)):
            return one, match.groupdict()
    return None, {}


def _body(request: Request, raw: bytes) -> Any:
    if not raw:
        return {}
    kind = request.headers.get("content-type", "")
    # What `curl -d` sends by itself is called a form; orders of the control plane are JSON whatever it says.
    if kind.startswith("application/x-www-form-urlencoded") and not request.path.startswith("/_control/"):
        return {key: " ".join(values) for key, values in parse_qs(raw.decode()).items()}
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, {"code": "BadRequest", "message": "The body is not a JSON object"})
    return body


def _control(found: Route, request: Request, raw: bytes) -> Answer:
    try:
        return found.handler(_with(request, body=_body(request, raw)))
    except Refusal as refusal:
        return refusal.status, refusal.body
    except (KeyError, ValueError, TypeError) as error:
        return 400, {"error": f"{type(error).__name__}: {error}"}


def _with(request: Request, **changes: Any) -> Request:
    return Request(**({name: getattr(request, name) for name in request.__dataclass_fields__} | changes))


def _caller(store: Store, found: Route, request: Request) -> Caller:
    if found.service == "auth":
        return NOBODY  # these look for themselves
    servers = _SERVERS[found.service]
    if found.service == "flows":
        servers = (*servers, *flows.servers_of(store, request))
    who = auth.caller(store, request.headers, servers)
    if who is None:
        raise _unauthorized(found.service, request.path)
    return who


def _act(
    found: Route | None, request: Request, raw: bytes, query: str, fault: str | None
) -> tuple[int, Any, dict[str, str]]:
    """Do what was asked; the effect and the line in the log are committed together."""
    store = request.store
    try:
        with store.transaction():
            if found is None:
                raise Refusal(404, {"code": "NotFound", "message": f"no route {request.method} {request.path}"})
            request = _with(request, caller=_caller(store, found, request), body=_body(request, raw))
            status, body = found.handler(request)
            control.note(store, request, query, raw, status, True, fault)
        return status, body, {}
    except Refusal as refusal:
        control.note(store, request, query, raw, refusal.status, False, fault)
        return refusal.status, refusal.body, refusal.headers
    except Exception:  # noqa: BLE001 - the top of a request: a mistake of the emulator must show as one
        traceback.print_exc()
        control.note(store, request, query, raw, 500, False, fault)
        message = "mistake of the emulator, see its standard error"
        return 500, {"code": "EmulatorMistake", "message": message, "request_id": new_id()[:9]}, {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: Store, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.store = store
        self.url = f"http://127.0.0.1:{self.server_port}"

    def server_bind(self) -> None:
        """Bind without asking the resolver for our own name, which can take seconds."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _config(path: Path) -> dict[str, Any]:
    text = path.read_text()
    return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)


def _end_with_parent() -> None:
    """Leave when standard input closes, so that a test run that dies leaves no service behind."""
    sys.stdin.buffer.read()
    os._exit(0)


def _die_loudly(failure: threading.ExceptHookArgs) -> None:
    """A mistake in a working thread must end the service, or tests would wait for what never comes."""
    if failure.exc_value is not None:
        traceback.print_exception(failure.exc_value)
    os._exit(70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="directory for the state; made if missing")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--config", type=Path, help="JSON or TOML: settings, clients, collections, flows, groups")
    parser.add_argument("--end-with-stdin", action="store_true")
    options = parser.parse_args()
    store = Store(options.state)
    server = _Server(store, options.port)
    if options.config:
        control.configure(store, _config(options.config))
    threading.excepthook = _die_loudly
    Mover(store).start()
    Runner(store).start()
    if options.end_with_stdin:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    print(server.url, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
