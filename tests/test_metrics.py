"""Laws of the metrics: off unless asked, what Prometheus reads, never up and down where a counter, never in the way."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fuse_share import Share
from tests.site import Site
from trigger_daemon import metrics as metrics_module
from trigger_daemon.config import load_settings
from trigger_daemon.core.model import RunState
from trigger_daemon.errors import ConfigError
from trigger_daemon.metrics import CLIENTS_MAX, METRICS, REST, SERIES_MAX, Metrics

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")

RULE = {"name": "a", "action": "copy", "state": "active", "settling": 1, "complete": 2, "blocked": 0, "stalled": 0,
        "runs": {"VERIFIED": 3}, "files_done": 30, "bytes_done": 3_000}  # fmt: skip
VOLUME = {"path": "/data", "total_bytes": 1_000, "free_bytes": 400, "free_inodes": 9, "fill_bytes_per_s": -2,
          "state": "low", "error": None, "reserve_bytes": 5, "promised_bytes": 0}  # fmt: skip
SNAPSHOT: dict[str, Any] = {
    "daemon": {"version": "1.2", "started_time": 100.5, "time": 200.25, "health": "alarm", "wal_bytes": 7,
               "hints": {"watches": 5, "unwatched": 0, "events": 10, "overflows": 1, "restarts": 0}},
    "paused": "", "alarms": [{"acked_by": None}, {"acked_by": "ana"}, {"acked_by": None}], "rules_fault": None,
    "undecided": {}, "rules": [RULE], "working": [{"bytes": 10, "bytes_done": 4}], "destinations_down": {},
    "roots": [{"path": "/data", "health": "lost"}], "volumes": [VOLUME],
    "throttle": {"instrument": "", "bandwidth_bytes_per_s": None}, "reclaim": {"under_way": 1, "queued": 2},
}  # fmt: skip

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    """Return the samples as Prometheus' own parser reads them."""
    return {
        (sample.name.removeprefix("trigger_daemon_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip


def after(*snapshots: dict[str, Any]) -> list[Samples]:
    """Return what is told after each of these heartbeats of one daemon."""
    made = Metrics()
    told = []
    for snapshot in snapshots:
        made.show(snapshot)
        told.append(read(made.text()))
    return told


def changed(**daemon_or_rule: Any) -> dict[str, Any]:
    """Return the snapshot with other figures: of hints, or of the rule."""
    made = copy.deepcopy(SNAPSHOT)
    for key, value in daemon_or_rule.items():
        place = made["daemon"]["hints"] if key in made["daemon"]["hints"] else made["rules"][0]
        place[key] = value
    return made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fetched(port: int, path: str = "/metrics", **keys: Any) -> str:
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", **keys), timeout=10) as said:
        return str(said.read().decode())


@pytest.fixture
def made() -> Iterator[Metrics]:
    metrics = Metrics()
    yield metrics
    metrics.stop()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    here = Site(tmp_path / "site", quiescence="200ms")
    here.write_rules(here.rule())
    yield here
    here.stop()


# --------------------------------------------------------------------------- the daemon


def test_a_daemon_tells_its_figures_to_a_file_and_a_port(site, wait_until):
    """Both say the same, as Prometheus' parser reads it; anybody may read the file; a clean end takes it away."""
    file, port = site.base / "td.prom", free_port()
    site.settings["metrics"] = {"file": str(file), "every": "1s", "port": port}
    site.start(prefix=("sh", "-c", 'umask 077; exec "$@"', "sh"))
    for name in ("a.tif", "b.tif"):
        (site.data / name).write_bytes(b"x" * 500)
    site.until_verified(2)
    rule = ("rule", "first")
    wait_until(lambda: read(file.read_text()).get(("done_files_total", (rule,))) == 2, 20)

    for told in (read(file.read_text()), read(fetched(port))):
        assert told["done_bytes_total", (rule,)] == 1_000
        assert told["runs", (rule, ("state", "VERIFIED"))] == 2 and told["runs", (rule, ("state", "HELD"))] == 0
        assert told["volume_free_bytes", (("volume", str(site.state)),)] > 0
        assert told["root_health", (("health", "ok"), ("root", str(site.data)))] == 1
        assert {name for name, _ in told} <= set(METRICS)
        assert set(METRICS) - {name for name, _ in told} <= {
            "bandwidth_limit_bytes_per_second", "volume_reserve_bytes", "volume_promised_bytes",
            "volume_fill_bytes_per_second",
        }, "only what the settings do not ask for may be absent"  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [name for name in os.listdir(site.base) if name.endswith((".prom", ".new"))] == ["td.prom"]
    assert site.stop() == 0 and not file.exists()


def test_settings_that_are_read_again_hold(site, wait_until):
    """A reload moves the file; what is not asked for any more is taken away."""
    first, second = site.base / "first.prom", site.base / "second.prom"
    site.settings["metrics"] = {"file": str(first), "every": "1s"}
    site.start()
    wait_until(first.exists, 10)
    site.settings["metrics"] = {"file": str(second), "every": "1s"}
    site.config.write_text(json.dumps(site.settings))
    site.process.send_signal(signal.SIGHUP)

    wait_until(lambda: second.exists() and not first.exists(), 10)


def test_a_file_in_a_watched_directory_is_refused(site, wait_until):
    """Watched directories are only read: the alarm says so, and nothing is written there."""
    site.settings["metrics"] = {"file": str(site.data / "td.prom"), "every": "1s"}
    site.start()

    def refused() -> bool:
        return any(alarm["key"] == "metrics" and "watched" in alarm["what"] for alarm in site.heartbeat()["alarms"])

    site.until(refused, 10, "the alarm")
    assert os.listdir(site.data) == []


def test_nothing_is_told_unless_asked():
    """By default there is no file, no port and no thread."""
    made = Metrics()
    wanted = load_settings(None, {}).metrics
    made.use(wanted.file, wanted.every_s, wanted.port)

    assert (wanted.file, wanted.port, made._thread) == (None, None, None)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"port": "0.0.0.0:9100"}, "127.0.0.1"),
        ({"port": "example.org"}, "no port"),
        ({"port": 70_000}, "metrics"),
        ({"file": "/var/lib/x.txt"}, ".prom"),
        ({"file": "x.prom"}, "absolute"),
        ({"every": "10ms"}, "metrics"),
        ({"address": "::"}, "unknown setting"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, written, words):
    """A port that would be open to others, a file that nobody would read."""
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"metrics": written}))
    with pytest.raises(ConfigError) as refused:
        load_settings(file, {})
    (fault,) = refused.value.faults

    assert words in f"{fault.message} {fault.hint} {fault.quote}"


# --------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_heartbeat():
    """Each figure stands under its name and labels."""
    (told,) = after(SNAPSHOT)

    assert told["info", (("version", "1.2"),)] == 1
    assert told["start_time_seconds", ()] == 100.5 and told["heartbeat_timestamp_seconds", ()] == 200.25
    assert [told["health", (("health", word),)] for word in ("ok", "degraded", "alarm")] == [0, 0, 1]
    assert [told["alarms", (("acknowledged", word),)] for word in ("yes", "no")] == [1, 2]
    assert told["rule_info", (("action", "copy"), ("rule", "a"))] == 1
    assert told["files", (("rule", "a"), ("stage", "complete"))] == 2
    assert told["volume_fill_bytes_per_second", (("volume", "/data"),)] == -2
    assert told["volume_state", (("state", "low"), ("volume", "/data"))] == 1
    assert told["reclaim_sets", (("phase", "queued"),)] == 2 and told["working_done_bytes", ()] == 4
    assert sum(name == "runs" for name, _ in told) == len(RunState)


def test_counters_never_go_down():
    """A run that falls back takes nothing away, and a source of hints that begins anew goes on counting."""
    told = after(
        changed(files_done=30, events=100), changed(files_done=20, events=7), changed(files_done=40, events=9),
        changed(files_done=40, events=2),
    )  # fmt: skip
    rule = (("rule", "a"),)

    assert [each["done_files_total", rule] for each in told] == [30, 30, 40, 40]
    assert [each["hint_events_total", ()] for each in told] == [100, 107, 109, 111]


def test_labels_have_few_values(monkeypatch):
    """Beyond so many rules they are told together, with nothing lost; those that have a series keep it."""
    monkeypatch.setattr(metrics_module, "SERIES_MAX", 3)
    many = copy.deepcopy(SNAPSHOT)
    many["rules"] = [{**RULE, "name": f"r{n}"} for n in range(10)]
    fewer = copy.deepcopy(many)
    fewer["rules"] = list(reversed(many["rules"]))
    told = after(many, fewer)

    for each in told:
        done = {dict(labels)["rule"]: value for (name, labels), value in each.items() if name == "done_files_total"}
        assert done == {"r0": 30, "r1": 30, "r2": 30, REST: 7 * 30}
    assert SERIES_MAX >= 100


@pytest.mark.parametrize("path", ['/a "quoted"\\ path', "/two\nlines", "/caf\udce9", "/日本"])
def test_any_name_can_be_a_label(path):
    """What people call their directories is escaped as the format wants it."""
    odd = copy.deepcopy(SNAPSHOT)
    odd["volumes"][0]["path"] = path
    (told,) = after(odd)

    shown = path.encode("utf-8", "backslashreplace").decode()
    assert told["volume_free_bytes", (("volume", shown),)] == 400


# ------------------------------------------------------------------------------ port


def test_only_metrics_are_served_and_only_here(made, wait_until):
    """One path, one verb, one address: everything else is refused."""
    port = free_port()
    made.show(SNAPSHOT)
    made.use(None, 15.0, port)
    wait_until(lambda: made._server is not None, 10)

    assert read(fetched(port)) == read(made.text())
    for path, keys, code in (("/", {}, 404), ("/metrics/x", {}, 404), ("/metrics", {"data": b"x"}, 501)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetched(port, path, **keys)
        refused.value.close()
        assert refused.value.code == code
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), 5)
    with pytest.raises(OSError, match="open to the network"):
        metrics_module._Server("0.0.0.0", 0, made)


def test_clients_that_hang_keep_nobody(made, wait_until):
    """More of them than are served at once: who asks properly is answered, and a heartbeat does not wait."""
    port = free_port()
    made.show(SNAPSHOT)
    made.use(None, 15.0, port)
    wait_until(lambda: made._server is not None, 10)
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(CLIENTS_MAX + 3)]
    try:
        for client in hanging:
            client.sendall(b"GET /met")
        made.show(changed(files_done=77))

        assert read(fetched(port))["done_files_total", (("rule", "a"),)] == 77
        assert len(made._server._clients) <= CLIENTS_MAX
    finally:
        for client in hanging:
            client.close()


def test_clients_that_are_let_go_of_cost_nothing(made, monkeypatch, wait_until):
    """Whoever is let go of in the middle of a request, and whoever asks again, gets the figures of the heartbeat: they
    are put into words once."""
    rendered = []
    render = metrics_module.render
    monkeypatch.setattr(metrics_module, "render", lambda found: rendered.append(1) or render(found))
    port = free_port()
    made.show(SNAPSHOT)
    made.use(None, 15.0, port)
    wait_until(lambda: made._server is not None, 10)
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(4 * CLIENTS_MAX)]
    for client in hanging:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
    for client in hanging:
        client.close()
    told = {fetched(port) for _ in range(5)}
    wait_until(lambda: not made._server._clients, 10)

    assert len(told) == 1 and rendered == [1]
    made.show(changed(files_done=77))
    assert read(fetched(port))["done_files_total", (("rule", "a"),)] == 77


def test_a_port_that_is_taken_is_told_and_asked_for_again(made, monkeypatch, wait_until):
    """Another program holds it: the fault says so; once it is free it is served."""
    monkeypatch.setattr(metrics_module, "BIND_AGAIN_S", 0.05)
    made.show(SNAPSHOT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        made.use(None, 15.0, port)
        wait_until(lambda: f"port {port} cannot be opened" in made.fault, 10)

    wait_until(lambda: made.fault == "" and made._server is not None, 10)
    assert fetched(port)


# ------------------------------------------------------------------------------ file


def test_a_file_that_cannot_be_written_is_told_until_it_can(made, tmp_path, wait_until):
    """The directory is missing: that is the fault; it is never made, and the next time is tried again."""
    file = tmp_path / "collector" / "td.prom"
    made.show(SNAPSHOT)
    made.use(str(file), 0.05, None)
    wait_until(lambda: "cannot be written" in made.fault, 10)
    absent = not file.parent.exists()
    file.parent.mkdir()

    wait_until(lambda: made.fault == "" and file.exists(), 10)
    assert absent and read(file.read_text()) == read(made.text())


@ROOT
def test_a_disk_that_hangs_holds_neither_loop_nor_port(made, tmp_path, wait_until):
    """The thread that writes is lost in it; heartbeats are taken, the port answers, and the end comes."""
    point, port = tmp_path / "share", free_port()
    point.mkdir()
    share = Share(point, {})
    try:
        share.mood = "hang"
        made.show(SNAPSHOT)
        made.use(str(point / "td.prom"), 0.05, port)
        wait_until(lambda: share.held, 10, what="the write")
        made.show(changed(files_done=88))

        assert read(fetched(port))["done_files_total", (("rule", "a"),)] == 88
        made.stop()
        assert made._thread.is_alive()
    finally:
        share.close()


# ------------------------------------------------------------------------- documents


def test_names_follow_the_conventions():
    """A counter ends in _total, nothing else does; a unit is a base unit and stands in the name."""
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", name) and not re.search(r"_(ms|kb|mb|minutes|percent)\b", name), name
        assert metric.help.endswith("."), name


def test_every_metric_is_in_the_reference():
    """The reference names each metric, its kind and its labels, and none besides."""
    text = (REPOSITORY / "docs" / "reference" / "metrics.md").read_text()
    rows = re.findall(r"^\| `trigger_daemon_(\w+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE)

    assert [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows] == [
        (name, metric.kind, metric.labels) for name, metric in METRICS.items()
    ]
