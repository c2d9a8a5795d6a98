"""Tell how the daemon is, in Prometheus' text format: to a file, and to who asks a port of this machine.

Made of the snapshot that the heartbeat makes anyhow: the loop hands it over,
and threads here render and write it. A disk or a client that hangs holds one
of these, never the loop. Labels are rules, roots, volumes, and states, of which
there are few; what is beyond SERIES_MAX is told together.
"""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from trigger_daemon.core.model import RunState

SERIES_MAX = 500  # rules, roots and volumes each; further ones are summed up as REST
REST = "(others)"
CLIENTS_MAX = 8  # at once; the oldest is let go of for a new one
CLIENT_S = 5.0  # for each read and write
STOP_S = 1.0  # for the last of it; a disk that hangs keeps nobody
FILE_MODE = 0o644  # node_exporter is another user
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BIND_AGAIN_S = 15.0  # a port that another program holds is asked for so often

_HEALTHS = ("ok", "degraded", "alarm")
_ROOT_HEALTHS = ("ok", "degraded", "suspect", "lost", "returned")
_VOLUME_STATES = ("ok", "low", "critical")

Kind = Literal["gauge", "counter"]


class Metric(NamedTuple):
    kind: Kind
    labels: tuple[str, ...]
    help: str


# Every metric; docs/reference/metrics.md is held to this.
METRICS: dict[str, Metric] = {
    "info": Metric("gauge", ("version",), "The version that runs; always 1."),
    "start_time_seconds": Metric("gauge", (), "When this daemon began to work, Unix time."),
    "heartbeat_timestamp_seconds": Metric("gauge", (), "When these figures were made, Unix time."),
    "health": Metric("gauge", ("health",), "1 for the health that the daemon has: ok, degraded or alarm."),
    "paused": Metric("gauge", (), "1 while everything is paused by a person."),
    "alarms": Metric("gauge", ("acknowledged",), "Alarms that stand."),
    "rules_fault": Metric("gauge", (), "1 while the rule files have a fault and the last good ones are in force."),
    "rules_undecided": Metric("gauge", (), "Changed rules that wait for `rules apply`."),
    "rule_active": Metric("gauge", ("rule",), "1 for a rule in force, 0 for one that is paused, faulty or removed."),
    "rule_info": Metric("gauge", ("rule", "action"), "Which action a rule in force starts; always 1."),
    "files": Metric("gauge", ("rule", "stage"), "Files on their way to a batch: settling, complete, blocked, stalled."),
    "runs": Metric("gauge", ("rule", "state"), "Runs by their state, those of the past too."),
    "done_files_total": Metric("counter", ("rule",), "Files in runs that succeeded or were verified, ever."),
    "done_bytes_total": Metric("counter", ("rule",), "Bytes in runs that succeeded or were verified, ever."),
    "working_runs": Metric("gauge", (), "Runs at work, at most 50 are counted."),
    "working_bytes": Metric("gauge", (), "Bytes of these runs."),
    "working_done_bytes": Metric("gauge", (), "Bytes of these runs that are done."),
    "destinations_down": Metric("gauge", (), "Destinations that do not answer; nothing is started to them."),
    "root_health": Metric("gauge", ("root", "health"), "1 for the health that a watched directory has."),
    "watched_directories": Metric("gauge", (), "Directories of which the kernel tells what happens."),
    "unwatched_directories": Metric("gauge", (), "Directories that the kernel refuses to watch; sweeps look at them."),
    "hint_events_total": Metric("counter", (), "Events heard."),
    "hint_overflows_total": Metric("counter", (), "Times that events were lost, and all was swept instead."),
    "hint_restarts_total": Metric("counter", (), "Times that the source of hints was started anew."),
    "volume_size_bytes": Metric("gauge", ("volume",), "Size of a volume."),
    "volume_free_bytes": Metric("gauge", ("volume",), "Free space of a volume."),
    "volume_free_inodes": Metric("gauge", ("volume",), "Free inodes of a volume."),
    "volume_reserve_bytes": Metric("gauge", ("volume",), "What our own writes leave free."),
    "volume_promised_bytes": Metric("gauge", ("volume",), "What running work may still write."),
    "volume_fill_bytes_per_second": Metric("gauge", ("volume",), "How fast free space shrinks; negative: it grows."),
    "volume_state": Metric("gauge", ("volume", "state"), "1 for the state that a volume has: ok, low or critical."),
    "volume_readable": Metric("gauge", ("volume",), "0 while a volume does not answer; its figures are old then."),
    "bandwidth_limit_bytes_per_second": Metric("gauge", (), "The limit in force for all copies; absent: none."),
    "instrument_busy": Metric("gauge", (), "1 while all of ours stands still for the instrument."),
    "reclaim_sets": Metric("gauge", ("phase",), "Sets of files that reclaim has under way, and has queued."),
    "journal_wal_bytes": Metric("gauge", (), "Size of the journal's -wal; large: a program stands still, reading it."),
}  # fmt: skip

_Series = tuple[str, tuple[str, ...]]  # name, values of its labels
_Samples = dict[_Series, float]


class Metrics:
    """All of it, for the daemon's life. `show` may be called from the loop: it keeps a reference and returns."""

    def __init__(self) -> None:
        self.fault = ""  # what is wrong with the file or the port
        self._snapshot: Mapping[str, Any] | None = None
        self._lock = threading.Lock()  # of what rendering remembers; never held by `show`
        self._rendered: tuple[Mapping[str, Any] | None, str] = (None, "")
        self._said: _Samples = {}  # counters, as they were told last
        self._base: _Samples = {}  # what they had come to before they began anew
        self._raw: _Samples = {}  # what the snapshot said of them last
        self._known: dict[str, set[str]] = {}  # label -> values that have a series of their own
        self._settings: tuple[str | None, float, int | None] = (None, 15.0, None)
        self._kept_out: tuple[str, ...] = ()
        self._faults: dict[str, str] = {}
        self._changed = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None

    def use(self, file: str | None, every_s: float, port: int | None) -> None:
        """Tell there from now on. Returns at once: what it takes is done by the thread."""
        self._settings = (file, every_s, port)
        if self._thread is None and (file is not None or port is not None):
            self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
            self._thread.start()
        self._changed.set()

    def show(self, snapshot: Mapping[str, Any]) -> None:
        """Take the figures of a heartbeat, which nobody changes any more."""
        first, self._snapshot = self._snapshot is None, snapshot
        if first:
            self._changed.set()

    def keep_out(self, roots: Iterable[str]) -> None:
        """Write in none of these: watched directories are only read."""
        self._kept_out = tuple(root.rstrip("/") + "/" for root in roots)

    def stop(self) -> None:
        """End the thread and take the file away: figures that stand there would look like a daemon that runs."""
        self._stopped = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def text(self) -> str:
        """Return the figures as they are now, '' before the first."""
        snapshot = self._snapshot
        if snapshot is None:
            return ""
        with self._lock:
            if self._rendered[0] is not snapshot:  # of hundreds of rules that takes tenths of a second
                self._rendered = snapshot, render(self._steady(samples(snapshot)))
            return self._rendered[1]

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        """Write the file when it is due, and see that the port is served."""
        written = ""
        bound: int | None = None
        while not self._stopped:
            self._changed.clear()
            file, every_s, port = self._settings
            if port != bound or (port is not None and self._server is None):
                bound = port
                self._serve(port)
            if written and written != file:
                self._forget(written)
            written = file or ""
            if file is not None:
                self._write(file)
            else:
                self._faults.pop("file", None)
            self.fault = "; ".join(self._faults.values())
            self._changed.wait(every_s if file is not None else BIND_AGAIN_S)
        if written:
            self._forget(written)
        self._serve(None)

    def _write(self, file: str) -> None:
        """Replace the file whole; never named *.prom before it is."""
        if os.path.normpath(file).startswith(self._kept_out):
            self._faults["file"] = f"{file} lies in a directory that is watched, and so only read"
            return
        text = self.text()
        if not text:
            return
        new = os.path.join(os.path.dirname(file), f".{os.path.basename(file)}.new")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as opened:
                os.fchmod(descriptor, FILE_MODE)  # whatever the umask is
                opened.write(text)
            os.replace(new, file)
            self._faults.pop("file", None)
        except OSError as error:
            self._faults["file"] = f"{file} cannot be written: {error.strerror or error}"

    def _forget(self, file: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(file)

    def _serve(self, port: int | None) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None
        self._faults.pop("port", None)
        if port is None:
            return
        try:
            self._server = _Server("127.0.0.1", port, self)
        except OSError as error:
            self._faults["port"] = f"port {port} cannot be opened: {error.strerror or error}"

    # ------------------------------------------------------------------ series

    def _steady(self, found: _Samples) -> _Samples:
        """Fold what has too many values, and let no counter go down: what began anew goes on from where it was."""
        told: _Samples = {}
        for (name, values), value in found.items():
            labels = METRICS[name].labels
            place = tuple(self._own(label, each) for label, each in zip(labels, values, strict=True))
            told[name, place] = told.get((name, place), 0.0) + value
        for series, value in told.items():
            name = series[0]
            if METRICS[name].kind == "counter":
                if name.startswith("hint_"):  # of a source, which may have been started anew
                    if value < self._raw.get(series, 0.0):
                        self._base[series] = self._said[series]
                    self._raw[series] = value
                    value += self._base.get(series, 0.0)
                told[series] = self._said[series] = max(value, self._said.get(series, 0.0))
        return told

    def _own(self, label: str, value: str) -> str:
        if label not in ("rule", "root", "volume"):
            return value
        known = self._known.setdefault(label, set())
        if value not in known and len(known) >= SERIES_MAX:
            return REST
        known.add(value)
        return value


# ---------------------------------------------------------------------- from a snapshot


def samples(snapshot: Mapping[str, Any]) -> _Samples:
    """Return every figure of a heartbeat."""
    return {(name, values): float(value) for name, values, value in _all(snapshot)}


def _all(now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    daemon, hints = now["daemon"], now["daemon"].get("hints", {})
    yield "info", (daemon["version"],), 1
    yield "start_time_seconds", (), daemon["started_time"]
    yield "heartbeat_timestamp_seconds", (), daemon["time"]
    yield from _one_of("health", (), _HEALTHS, daemon["health"])
    yield "paused", (), bool(now["paused"])
    for word, acked in (("yes", True), ("no", False)):
        yield "alarms", (word,), sum(bool(alarm["acked_by"]) is acked for alarm in now["alarms"])
    yield "rules_fault", (), now["rules_fault"] is not None
    yield "rules_undecided", (), len(now["undecided"])
    for rule in now["rules"]:
        yield from _rule(rule)
    working = now["working"]
    yield "working_runs", (), len(working)
    yield "working_bytes", (), sum(run["bytes"] for run in working)
    yield "working_done_bytes", (), sum(run["bytes_done"] for run in working)
    yield "destinations_down", (), len(now["destinations_down"])
    for root in now["roots"]:
        yield from _one_of("root_health", (root["path"],), _ROOT_HEALTHS, root["health"])
    yield "watched_directories", (), hints.get("watches", 0)
    yield "unwatched_directories", (), hints.get("unwatched", 0)
    for what in ("events", "overflows", "restarts"):
        yield f"hint_{what}_total", (), hints.get(what, 0)
    for volume in now["volumes"]:
        yield from _volume(volume)
    throttle = now["throttle"]
    if throttle["bandwidth_bytes_per_s"] is not None:
        yield "bandwidth_limit_bytes_per_second", (), throttle["bandwidth_bytes_per_s"]
    yield "instrument_busy", (), bool(throttle["instrument"])
    for phase in ("under_way", "queued"):
        yield "reclaim_sets", (phase,), now["reclaim"][phase]
    yield "journal_wal_bytes", (), daemon["wal_bytes"]


def _rule(rule: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    name = rule["name"]
    yield "rule_active", (name,), rule["state"] == "active"
    if action := rule.get("action"):
        yield "rule_info", (name, action), 1
    for stage in ("settling", "complete", "blocked", "stalled"):
        yield "files", (name, stage), rule.get(stage) or 0
    for state in RunState:  # all of them: a series that appears with its first run hides that run from `rate`
        yield "runs", (name, str(state)), rule["runs"].get(state, 0)
    yield "done_files_total", (name,), rule["files_done"]
    yield "done_bytes_total", (name,), rule["bytes_done"]


def _volume(volume: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    where = (volume["path"],)
    yield "volume_readable", where, not volume["error"]
    for name, key in (
        ("size_bytes", "total_bytes"), ("free_bytes", "free_bytes"), ("free_inodes", "free_inodes"),
        ("reserve_bytes", "reserve_bytes"), ("promised_bytes", "promised_bytes"),
        ("fill_bytes_per_second", "fill_bytes_per_s"),
    ):  # fmt: skip
        if (value := volume.get(key)) is not None:
            yield f"volume_{name}", where, value
    yield from _one_of("volume_state", where, _VOLUME_STATES, volume["state"])


def _one_of(
    name: str, labels: tuple[str, ...], states: Iterable[str], state: str
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for each in states:
        yield name, (*labels, each), each == state


def render(found: _Samples) -> str:
    """Return the text: of each metric its help, its type, its samples."""
    by_name: dict[str, list[str]] = {}
    for (name, values), value in found.items():
        labels = ",".join(f'{key}="{_escaped(each)}"' for key, each in zip(METRICS[name].labels, values, strict=True))
        number = str(int(value)) if value.is_integer() else repr(value)
        line = f"trigger_daemon_{name}{{{labels}}} {number}" if labels else f"trigger_daemon_{name} {number}"
        by_name.setdefault(name, []).append(line)
    lines = []
    for name, metric in METRICS.items():
        if name in by_name:
            lines += [f"# HELP trigger_daemon_{name} {metric.help}", f"# TYPE trigger_daemon_{name} {metric.kind}"]
            lines += by_name[name]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    """Return a label's value; what is no UTF-8 as an escape."""
    value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# -------------------------------------------------------------------------- the port


class _Server(http.server.ThreadingHTTPServer):
    """Answers GET /metrics on a loopback address; a client that hangs is let go of for the next."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: str, port: int, metrics: Metrics) -> None:
        if not ipaddress.ip_address(address).is_loopback:
            raise OSError(f"{address} is open to the network")
        self.metrics = metrics
        self._clients: dict[socket.socket, float] = {}
        self._clients_lock = threading.Lock()
        super().__init__((address, port), _Handler)
        threading.Thread(target=self.serve_forever, name="metrics port", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._clients_lock:
            if len(self._clients) >= CLIENTS_MAX:
                oldest = min(self._clients, key=self._clients.__getitem__)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
                del self._clients[oldest]
            self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._clients_lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left, or was let go of, is nobody's concern."""

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = CLIENT_S
    server_version = "trigger-daemon"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self.server.metrics.text().encode("utf-8", "backslashreplace")
        if not body:
            self.send_error(503, "the daemon has just begun")
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: it would be the log's most frequent line."""
