"""Measure what the daemon adds to Globus: starts, latency, requests and CPU, against the emulated service.

    python benchmarks/globus.py            some five minutes; needs trigger-daemon[globus]
    python benchmarks/globus.py --quick    about a minute: fewer starts, and 12 s instead of a minute for "long"
    python benchmarks/globus.py --json     a JSON object instead of the tables

The service is `tests/globus`, over loopback and as fast as it goes; the real one answers in some 100 ms, so read the
ratios. Every instant is real, and the service's clock is not scaled; settings are the defaults but for `throttle: runs`
(40) and a quiet period of 1 s. Only "computed" figures are on a clock turned by hand: there the actions' own code
polls a service that answers at once, from the core's first look on.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from processes import cpu_s

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the daemon is the installed one
from tests.globus.emulator import Emulator
from tests.site import Site
from trigger_daemon import actions
from trigger_daemon.actions import globus_flow, globus_transfer
from trigger_daemon.core.runs import FIRST_POLL_S
from trigger_daemon.globus import POLL_S, TASKS_MAX, account

CLIENT, SECRET = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f", "not-a-secret"
QUIET_S, RUNS, MANY = 1.0, 40, 500
MODULES: dict[str, Any] = {"transfer": globus_transfer, "flow": globus_flow}
POLLS = {"transfer": "GET /v0.10/task_list", "flow": "GET /runs/*"}
FIRST = {"transfer": "GET /v0.10/submission_id", "flow": "* /flows/*"}
ACCEPTED = {"transfer": "POST /v0.10/transfer", "flow": "POST /flows/*/run"}
SLEEP = {"StartAt": "Sleep", "States": {"Sleep": {
    "Type": "Action", "ActionUrl": "https://actions.globus.org/hello_world", "ResultPath": "$.done", "End": True,
    "Parameters": {"echo_string": "x", "sleep_time.$": "$.seconds"},
}}}  # fmt: skip
_RUNS = """
SELECT batch.manifest, attempt.prepared, attempt.handle, run.changed_time,
  (SELECT max(time) FROM transition WHERE transition.run = run.id AND to_state = 'ACTIVE')
FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule
JOIN attempt ON attempt.run = run.id AND attempt.attempt = run.attempts WHERE rule.name = ? AND run.final = 1
"""


@dataclass(frozen=True)
class Life:
    """When one batch was prepared and accepted, its first poll could be set, its task ended, and its run was done."""

    name: str
    prepared: float
    accepted: float
    active: float
    ended: float
    done: float


class Place:
    """One daemon and one emulated Globus. A file below DIR/SECONDS/ is a batch (of many below DIR-many) of rule DIR."""

    def __init__(self, base: Path, *, timed: bool = False) -> None:
        self.site, self.globus = Site(base, quiescence=f"{QUIET_S:g}s"), Emulator(base / "globus")
        self.timed, self.written = timed, itertools.count()
        self.closed: dict[str, float] = {}  # by name, when

    def start(self, *, wait: bool = True) -> None:
        globus, site = self.globus, self.site
        globus.start()
        globus.client(CLIENT, SECRET)
        self.source, self.target = globus.collection("Krios", site.data), globus.collection("Archive", site.out)
        self.flow = globus.flow(SLEEP, {"type": "object"})
        group, index = globus.group("Visit"), globus.index("Visits", writers=[CLIENT])
        globus.settings(pending_max=100_000, flow_poll_s=0.1, bytes_per_s=1_000 if self.timed else 0)
        del site.settings["sweep"]
        site.settings |= {"throttle": {"runs": RUNS}, "globus": {
            "client_id": CLIENT, "collections": {self.source: {str(site.data): "/"}}}}  # fmt: skip
        plain = {"from": self.source, "to": self.target, "path": "/raw"}
        full = plain | {"path": "/full", "access": f"group:{group}", "index": {"id": index}}
        run = {"flow": self.flow, "from": self.source, "input": {"files": "{files}", "seconds": "{seconds}"}}
        starts = {"transfer": {"globus_transfer": plain}, "full": {"globus_transfer": full},
                  "flow": {"globus_flow": run}}  # fmt: skip
        rules = [site.rule(name, match=[f"{name}/{{seconds}}/{{name}}"], start=start) for name, start in starts.items()]
        batch = {"group_by": ["seconds"], "files": MANY, "idle": "2s"}
        many = [rule | {"name": f"{rule['name']}-many", "match": [f"{rule['name']}-many/{{seconds}}/{{name}}"],
                        "batch": batch} for rule in rules]  # fmt: skip
        site.write_rules(*rules, *([] if self.timed else many))
        self.environment = {**globus.environment(), "TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": SECRET}
        site.start(wait=wait, env=self.environment)

    def stop(self) -> None:
        self.site.stop()
        self.globus.kill()

    def write(self, rule: str, *, seconds: float = 0.0, files: int = 1) -> None:
        """Write files whose task or flow will take so long."""
        directory = self.site.data / rule / f"{seconds:g}"
        directory.mkdir(parents=True, exist_ok=True)
        for _ in range(files):
            name = f"f{next(self.written):05}"
            (directory / name).write_bytes(b"x" * max(1, round(seconds * 1_000)))
            self.closed[name] = time.time()

    def until(self, timeout_s: float = 240.0, **runs: int) -> None:
        """Wait until so many runs of each rule have come to their end."""
        question = ("SELECT rule.name, count(*) FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule"
                    " WHERE run.final = 1 GROUP BY 1")  # fmt: skip
        wanted = Counter({name.replace("_", "-"): n for name, n in runs.items()})
        self.site.until(lambda: Counter(dict(self.site.ask(question))) >= wanted, timeout_s, f"{runs} are at their end")

    def lives(self, rule: str) -> list[Life]:
        tasks = {one["task_id"]: (one["request_time"], one["completion_time"]) for one in self.globus.tasks()}
        tasks |= {one["run_id"]: (one["start_time"], one["completion_time"]) for one in self.globus.runs()}
        found = []
        for manifest, prepared, handle, done, active in self.site.ask(_RUNS, rule):
            told = json.loads(handle)
            accepted, ended = (_seconds(text) for text in tasks[told.get("task") or told["run"]])
            name = json.loads(manifest)[0][2]
            found.append(Life(name, json.loads(prepared)["time"], accepted, active, ended, done))
        return found

    def mark(self) -> int:
        seen: list[int] = [one["seq"] for one in self.globus.requests()]
        return max(seen, default=0)

    def rate(self, kind: str, since: int) -> float:
        """Return starts per second, from the first request to the last one that was accepted."""
        first = min(one["time"] for one in self.globus.requests(FIRST[kind], since))
        taken = [one["time"] for one in self.globus.requests(ACCEPTED[kind], since) if one["carried_out"]]
        return float(len(taken) / (max(taken) - first))

    def rest(self) -> None:
        """Wait until the service has nothing to do."""
        live = ("ACTIVE", "INACTIVE")
        while any(one["status"] in live for one in self.globus.tasks() + self.globus.runs()):
            time.sleep(0.2)

    @property
    def pid(self) -> int:
        assert self.site.process
        return int(self.site.process.pid)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def middle(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"n": len(ordered), "p50": round(statistics.median(ordered), digits), "p95": round(p95, digits)}


# ----------------------------------------------------------------------------- starts


def plain_loop(place: Place, kind: str, count: int) -> tuple[float, float]:
    """Start as many with the bare SDK, one after the other; return starts per second, and CPU seconds of each."""
    import globus_sdk

    app = globus_sdk.ClientApp("bench", client_id=CLIENT, client_secret=SECRET,
                               config=globus_sdk.GlobusAppConfig(token_storage="memory"))  # fmt: skip
    transfer, flow = globus_sdk.TransferClient(app=app), globus_sdk.SpecificFlowClient(place.flow, app=app)
    number = place.mark()
    source = next((place.site.data / "transfer" / "0").iterdir())

    def once(index: int) -> None:
        path = f"/transfer/0/{source.name}"
        if kind == "flow":
            flow.run_flow({"files": [path], "seconds": "0"}, label=f"plain {number} {index}")
            return
        item = {"DATA_TYPE": "transfer_item", "source_path": path, "recursive": False,
                "destination_path": f"/plain/{number}-{index}"}  # fmt: skip
        transfer.submit_transfer({
            "DATA_TYPE": "transfer", "submission_id": transfer.get_submission_id()["value"], "verify_checksum": True,
            "source_endpoint": place.source, "destination_endpoint": place.target, "label": f"plain {index}",
            "DATA": [item],
        })  # fmt: skip

    once(-1)  # tokens and connections are there
    since, before = place.mark(), time.process_time()
    for index in range(count):
        once(index)
    return place.rate(kind, since), (time.process_time() - before) / count


def starts(place: Place, counts: dict[str, int]) -> dict[str, Any]:
    """Plain, daemon, plain: interleaved, so that a machine that slows down slows both."""
    found: dict[str, Any] = {}
    os.environ.update(place.globus.environment())
    place.write("transfer")
    place.write("flow")
    place.until(transfer=1, flow=1)
    for kind, count in counts.items():
        ended = len(place.lives(kind))
        first, first_cpu_s = plain_loop(place, kind, count)
        place.rest()
        since, before = place.mark(), cpu_s(place.pid)
        place.write(kind, files=count)
        place.until(**{kind: ended + count})
        used = cpu_s(place.pid) - before
        rate = place.rate(kind, since)
        last, last_cpu_s = plain_loop(place, kind, count)
        place.rest()
        plain, plain_cpu_s = statistics.mean((first, last)), statistics.mean((first_cpu_s, last_cpu_s))
        found[kind] = {
            "n": count, "plain_before_per_s": round(first, 1), "daemon_per_s": round(rate, 2),
            "plain_after_per_s": round(last, 1), "ratio": round(rate / plain, 3),
            "most_by_first_look_per_s": round((TASKS_MAX if kind == "transfer" else RUNS) / FIRST_POLL_S, 1),
            "daemon_cpu_ms_per_batch": round(used / count * 1e3, 1),
            "plain_cpu_ms_per_start": round(plain_cpu_s * 1e3, 1),
        }  # fmt: skip
    return found


# ---------------------------------------------------------------------------- latency


def paced(place: Place, count: int) -> dict[str, Any]:
    """One file at a time for each rule, and tasks that end at once: what lies before the request and behind the end."""
    ended = {kind: len(place.lives(kind)) for kind in MODULES}
    for _ in range(count):
        for kind in MODULES:
            place.write(kind)
        time.sleep(random.uniform(0.5, 0.9))  # fewer than three transfers are under way: none waits for a place
    place.until(**{kind: ended[kind] + count for kind in MODULES})
    found: dict[str, Any] = {}
    for kind in MODULES:
        lives = sorted(place.lives(kind), key=lambda life: life.accepted)[-count:]
        found[kind] = {
            "before_ms": middle([(life.accepted - place.closed[life.name] - QUIET_S) * 1e3 for life in lives], 0),
            "behind_s": middle([life.done - life.ended for life in lives]),
        }
    return found


# ------------------------------------------------------------------------------ polls


def computed(kind: str, lives: Sequence[Life]) -> tuple[int, list[float]]:
    """Let the action's own `poll` see such lives on a clock turned by hand; return requests and when ends are seen."""
    now, requests = 0.0, 0
    number = {str(index): life for index, life in enumerate(lives)}

    def document(key: str) -> dict[str, Any]:
        status = "SUCCEEDED" if now >= number[key].ended else "ACTIVE"
        return {"task_id": key, "run_id": key, "status": status, "nice_status": "OK"}

    def task_list(filter: Any, limit: int) -> list[dict[str, Any]]:
        nonlocal requests
        requests += 1
        return [document(key) for key in filter["task_id"]]

    def get_run(key: str) -> Any:
        nonlocal requests
        requests += 1
        return SimpleNamespace(data=document(key))

    clients = SimpleNamespace(transfer=SimpleNamespace(task_list=task_list), flows=SimpleNamespace(get_run=get_run))
    module = MODULES[kind]
    seen = [0.0] * len(lives)
    due = [(life.active + FIRST_POLL_S, index) for index, life in enumerate(lives)]
    heapq.heapify(due)
    context = actions.Context(tempfile.gettempdir(), lambda run, attempt: heapq.heappush(due, (now, run)))
    action = module.Action(context)
    action._globus = SimpleNamespace(ask=lambda what, call: call(clients), account=account({}, ""))
    with mock.patch.object(module, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now)):
        while due:
            now, index = heapq.heappop(due)
            if seen[index]:  # it was nudged before
                continue
            request = actions.Request(index, 1, "bench", {}, {}, (), {"stuck_after": 3_600.0})
            told = action.poll(request, {"task": str(index), "run": str(index), "time": lives[index].prepared})
            if told.status == "active":
                heapq.heappush(due, (now + told.again_in_s, index))
            else:
                seen[index] = now
    return requests, seen


def alike(age_s: float, at: Sequence[float] = (0.0,)) -> list[Life]:
    return [Life("", begun, begun, begun, begun + age_s, 0.0) for begun in at]


def schedule() -> dict[str, Any]:
    """Requests for each hour of a task's life, and how late an end is seen at some ages, all computed."""
    found: dict[str, Any] = {}
    three = {"3 together": (0.0, 0.0, 0.0), "3 apart": (0.0, 17.0, 39.0)}
    cases = {"transfer": {"1": (0.0,), **three}, "flow": {"1": (0.0,), str(RUNS): (0.0,) * RUNS}}
    for kind, of in cases.items():
        for name, at in of.items():
            asked = {f"{age:g}": computed(kind, alike(age, at))[0] for age in (60.0, 3_600.0, 86_400.0)}
            per_hour = {age: round(n * 3_600 / float(age) / len(at), 1) for age, n in asked.items()}
            found[f"{kind}, {name}"] = {"per_task_hour": per_hour, "first_hour_in_all": asked["3600"]}
        for age in (5.0, 60.0, 600.0, 3_600.0):
            ends = [alike(age * (0.8 + 0.4 * i / 199))[0] for i in range(200)]
            late = [computed(kind, [life])[1][0] - life.ended for life in ends]
            found.setdefault(f"{kind}, late", {})[f"{age:g}"] = middle(late)
    return found


def live(base: Path, *, short: int, crowds: int, long_s: float) -> dict[str, Any]:
    """Several places side by side: tasks of some 5 s in one, of `long_s` in the others, and all their polls counted."""
    groups: dict[str, list[tuple[str, Sequence[float]]]] = {  # each of its own place: kind, and when each is begun
        "1": [("transfer", (0,)), ("flow", (0,))], "3 together": [("transfer", (0,) * 3)],
        "40": [("flow", (0,) * RUNS)],
    }  # fmt: skip
    groups |= {f"3 apart #{n}": [("transfer", (0, 4 + n, 11 + 2 * n))] for n in range(crowds)}
    groups["short"] = [("transfer", (0,) * short), ("flow", (0,) * short)]
    merged = {"3 together": "40"}  # these two share one daemon
    places = {name: Place(base / name.replace(" ", "-").replace("#", ""), timed=True)
              for name in groups if name not in merged}  # fmt: skip
    try:
        for place in places.values():
            place.start(wait=False)
        for place in places.values():
            place.site.until(lambda p=place: p.site.heartbeat() is not None, 60, "the daemon watches")
        plan, wanted = [], {name: Counter[str]() for name in places}
        for name, kinds in groups.items():
            middle_s = 5.0 if name == "short" else long_s
            for kind, at in kinds:
                lengths = [middle_s * (0.8 + 0.4 * (i + 0.5) / len(at)) for i in range(len(at))]
                random.shuffle(lengths)
                place_name = merged.get(name, name)
                wanted[place_name][kind] += len(at)
                plan += [(begin, place_name, kind, length) for begin, length in zip(at, lengths, strict=True)]
        began = time.monotonic()
        for begin, name, kind, length in sorted(plan):
            time.sleep(max(0.0, began + begin - time.monotonic()))
            places[name].write(kind, seconds=round(length, 2))
        pid = places["40"].pid
        time.sleep(5)
        before = cpu_s(pid)
        time.sleep(long_s / 2)
        used = (cpu_s(pid) - before) / (long_s / 2)
        for name, place in places.items():
            place.until(**wanted[name])
        return {"cpu_ms_per_s_3_and_40": round(used * 1e3, 1), **_live_figures(groups, merged, places)}
    finally:
        for place in places.values():
            place.stop()


def _live_figures(groups: Any, merged: dict[str, str], places: dict[str, Place]) -> dict[str, Any]:
    late: dict[str, list[float]] = {}
    polls: dict[str, Counter[str]] = {}
    idle: dict[str, float] = {}
    for name, kinds in groups.items():
        place = places[merged.get(name, name)]
        for kind, _ in kinds:
            lives = place.lives(kind)
            age = "5" if name == "short" else "long"
            late.setdefault(f"{kind}, {age}", []).extend(life.done - life.ended for life in lives)
            if name == "short":  # the fourth waits for a place
                idle[kind] = _idle(lives)
                continue
            asked, seen = computed(kind, lives)
            late.setdefault(f"{kind}, {age} computed", []).extend(
                at - life.ended for at, life in zip(seen, lives, strict=True)
            )
            count = polls.setdefault(f"{kind}, {name.partition(' #')[0]}", Counter())
            hours = sum(life.done - life.accepted for life in lives) / 3_600
            count.update(counted=len(place.globus.requests(POLLS[kind])), computed=asked, task_s=round(hours * 3_600))
    told = {
        key: {**one, "per_task_hour": round(one["counted"] * 3_600 / one["task_s"])} for key, one in polls.items()
    }
    late_s = {key: middle(values) for key, values in late.items()}
    return {"late_s": late_s, "polls": told, "places_idle_percent": round(idle["transfer"] * 100, 1)}


def _idle(lives: Sequence[Life]) -> float:
    """Return the share of time in which the service could have worked on another transfer, until the last was sent."""
    end = max(life.accepted for life in lives)
    begin = min(life.accepted for life in lives)
    busy = sum(min(life.ended, end) - life.accepted for life in lives)
    return 1 - busy / (end - begin) / TASKS_MAX


# --------------------------------------------------------------------------- requests


def by_route(place: Place) -> dict[str, dict[str, int]]:
    """Count what one batch asks for; the first one with `access` and `index` also gives the access."""
    found: dict[str, dict[str, int]] = {}
    for rule, many in itertools.product(("transfer", "full", "flow"), (False, True)):
        name = f"{rule}-many" if many else rule
        for turn in ("first", "next") if name == "full" else ("any",):
            ended, since = len(place.lives(name)), place.mark()
            place.write(name, files=MANY if many else 1)
            place.until(**{name.replace("-", "_"): ended + 1})
            routes = Counter(
                re.sub(r"[0-9a-f]{8}-[-0-9a-f]{27}", "*", f"{one['method']} {one['path']}")
                for one in place.globus.requests(since=since)
            )
            found[f"{rule}, {MANY if many else 1}, {turn}"] = dict(routes)
    return found


# ------------------------------------------------------------------------------ report


def table(title: str, rows: Sequence[Sequence[Any]]) -> None:
    """Print rows, the first of them the head."""
    print(f"\n### {title}\n")
    lines = [[str(cell) for cell in row] for row in rows]
    for number, row in enumerate(lines):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|" + "---|" * len(row))


def report(told: dict[str, Any]) -> None:
    first = next(iter(told["starts"].values()))
    rows = [[kind, *one.values()] for kind, one in told["starts"].items()]
    table(f"Starts: one-file batches, plain SDK loop before and after; {TASKS_MAX} transfers or {RUNS} flows at once, "
          f"first look after {FIRST_POLL_S:g} s, poll {POLL_S:g} s", [["", *first], *rows])  # fmt: skip
    rows = [[kind, *one["before_ms"].values(), *one["behind_s"].values()] for kind, one in told["paced"].items()]
    table("Latency, tasks that end at once: close to accepted beyond the quiet period (ms), and end to done (s)",
          [["", "n", "p50 ms", "p95 ms", "n", "p50 s", "p95 s"], *rows])  # fmt: skip
    late = {f"live: {key}": one for key, one in told["live"]["late_s"].items()}
    late |= {f"computed: {kind}, {age} s": one for kind in MODULES
             for age, one in told["schedule"][f"{kind}, late"].items()}  # fmt: skip
    table(f"Latency: the task's end to VERIFIED or SUCCEEDED; long is {told['long_s']:g} s ± 20 %. Of three places for "
          f"transfers of 5 s, {told['live']['places_idle_percent']} % stood idle",
          [["", "n", "p50 s", "p95 s"], *([key, *one.values()] for key, one in late.items())])  # fmt: skip
    rows = [[key, *one["per_task_hour"].values(), one["first_hour_in_all"]]
            for key, one in told["schedule"].items() if "late" not in key]  # fmt: skip
    table("Polls for each task and hour, computed: tasks of a minute, an hour, a day; and in all in their first hour",
          [["", "60 s", "1 h", "24 h", "first hour, all"], *rows])  # fmt: skip
    rows = [[key, *one.values()] for key, one in told["live"]["polls"].items()]
    table(f"Polls counted by the service, and computed for the same lives; CPU of the daemon with 3 and {RUNS}: "
          f"{told['live']['cpu_ms_per_s_3_and_40']} ms/s", [["", "counted", "computed", "task seconds", "per task and "
          "hour"], *rows])  # fmt: skip
    routes = [[name, sum(of.values()), ", ".join(f"{n} {route}" for route, n in of.items())]
              for name, of in told["routes"].items()]  # fmt: skip
    table("Requests for one batch: rule, files, and which", [["", "in all", "by route"], *routes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--starts", type=int, help="batches of each kind (200; quick: 30)")
    given = parser.parse_args()
    count = given.starts or (30 if given.quick else 200)
    long_s = 12.0 if given.quick else 60.0
    told: dict[str, Any] = {"long_s": long_s, "cores": os.cpu_count(), "schedule": schedule()}
    with tempfile.TemporaryDirectory(prefix="td-bench-globus-", dir="/var/tmp") as base:
        place = Place(Path(base) / "main")
        try:
            place.start()
            told["starts"] = starts(place, {"transfer": count, "flow": count})
            told["paced"] = paced(place, 8 if given.quick else 25)
            told["routes"] = by_route(place)
        finally:
            place.stop()
        told["live"] = live(Path(base), short=6 if given.quick else 21, crowds=1 if given.quick else 6, long_s=long_s)
    if given.json:
        print(json.dumps(told, indent=1))
    else:
        report(told)


if __name__ == "__main__":
    main()
