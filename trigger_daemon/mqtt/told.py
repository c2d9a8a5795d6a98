"""What is told: the payloads, made of the heartbeat and of the journal's rows. Pure; their fields are documented.

Times are RFC 3339, UTC; sizes bytes. A byte of a name that is no UTF-8 appears
as its surrogate escape, so that every payload is ASCII.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from trigger_daemon.core.model import RunState
from trigger_daemon.database import to_json

WORDS_MAX = 1_000  # characters of a sentence
ALARMS_MAX = 100  # in one payload
VOLUMES_MAX = 100
OUTPUT_BYTES_MAX = 64_000  # of what a run returned: a message is no place for data
STALE_S = 15.0  # the heartbeat comes every 2 s; so long without one is worth an alarm

_OPEN = tuple(
    str(state)
    for state in (
        RunState.PENDING, RunState.STARTING, RunState.ACTIVE, RunState.INACTIVE, RunState.SUCCEEDED, RunState.HELD,
        RunState.CANCELLING,
    )
)  # fmt: skip

Payload = dict[str, Any]


def rfc3339(utc: float | None) -> str | None:
    """Return an instant for programs, to the millisecond."""
    if utc is None:
        return None
    return datetime.fromtimestamp(utc, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def encoded(payload: Payload) -> bytes:
    return to_json(payload).encode("ascii")


def fitted(payload: Payload, bytes_max: int) -> bytes:
    """Return a payload as it is sent. One that is too long for the broker: without a run's output, without the last of
    its alarms or volumes, with shorter words; if it is too long even then, as it is by then."""
    data = encoded(payload)
    if len(data) > bytes_max and payload.get("output") is not None:
        payload = payload | {"output": _left_out(payload["run"])}
        data = encoded(payload)
    for words_max in (200, 40):
        if len(data) > bytes_max:
            payload = {key: _cut(value, words_max) for key, value in payload.items()}
            data = encoded(payload)
    for key in ("alarms", "volumes"):
        rows = payload.get(key)
        while len(data) > bytes_max and isinstance(rows, list) and rows:
            rows = rows[: len(rows) // 2]
            data = encoded(payload | {key: rows})
    return data


def _cut(value: Any, words_max: int) -> Any:
    """Return a text, and those in a list or mapping, with at most so many characters."""
    if isinstance(value, str):
        return value if len(value) <= words_max else value[: words_max - 1] + "…"
    if isinstance(value, list):
        return [_cut(one, words_max) for one in value]
    if isinstance(value, Mapping):
        return {key: _cut(one, words_max) for key, one in value.items()}
    return value


def offline(workstation: str, host: str, speaker: str, why: str, connected_utc: float) -> Payload:
    """Return the status of one that is not there. The broker tells it for us if we cannot (`why` lost)."""
    return {
        "state": "offline", "workstation": workstation, "host": host, "speaker": speaker, "why": why,
        "connected_time": rfc3339(connected_utc),
    }  # fmt: skip


def online(workstation: str, host: str, speaker: str, beat: Mapping[str, Any], silent_s: float) -> Payload:
    """Return the status, without times that change while nothing happens. `silent_s`: age of the heartbeat."""
    daemon, rules = beat["daemon"], beat["rules"]
    runs: dict[str, int] = {}
    for rule in rules:
        for state, count in rule["runs"].items():
            runs[state] = runs.get(state, 0) + count
    alarms = [alarm for alarm in beat["alarms"] if not alarm["acked_by"]]
    stalled = silent_s > STALE_S
    first = f"the daemon has not said anything for {STALE_S:.0f} s and more" if stalled else ""
    return {
        "state": "online",
        "workstation": workstation,
        "host": host,
        "speaker": speaker,
        "version": daemon["version"],
        "health": "alarm" if stalled else daemon["health"],
        "started_time": rfc3339(daemon["started_time"]),
        "paused": _short(beat["paused"]),
        "rules": len(rules),
        "settling": sum(rule["settling"] for rule in rules),
        "complete": sum(rule["complete"] for rule in rules),
        "blocked": sum(rule["blocked"] for rule in rules),
        "runs": {state: runs.get(state, 0) for state in _OPEN if state != RunState.SUCCEEDED},
        "at_work": len(beat["working"]),
        "files_done": sum(rule["files_done"] for rule in rules),
        "bytes_done": sum(rule["bytes_done"] for rule in rules),
        "alarms": len(alarms) + stalled,
        "alarm": first or _short(alarms[0]["what"] if alarms else ""),
    }


def storage(workstation: str, beat: Mapping[str, Any], utc: float) -> Payload:
    """Return the gauges of all volumes that were read, or cannot be."""
    keys = ("path", "total_bytes", "free_bytes", "fill_bytes_per_s", "full_in_s", "state", "error")
    volumes = [{key: volume[key] for key in keys} for volume in beat["volumes"][:VOLUMES_MAX] if read(volume)]
    return {"workstation": workstation, "time": rfc3339(utc), "volumes": volumes}


def read(volume: Mapping[str, Any]) -> bool:
    """Say whether anything is known of a volume."""
    return bool(volume["total_bytes"] or volume["error"])


def alarms_of(beat: Mapping[str, Any]) -> dict[str, Payload]:
    """Return the alarms that stand, by their key."""
    return {
        alarm["key"]: {
            "key": alarm["key"], "what": _short(alarm["what"]), "hint": _short(alarm["hint"]),
            "since_time": rfc3339(alarm["since_time"]), "acked_by": alarm["acked_by"],
        }
        for alarm in beat["alarms"][:ALARMS_MAX]
    }  # fmt: skip


def standing(workstation: str, alarms: Mapping[str, Payload], utc: float) -> Payload:
    """Return the list of alarms that stand."""
    return {"workstation": workstation, "time": rfc3339(utc), "alarms": list(alarms.values())}


def changed(
    workstation: str, before: Mapping[str, Payload], now: Mapping[str, Payload], utc: float
) -> list[Payload]:
    """Return an event for each alarm that was raised or cleared."""
    common = {"workstation": workstation, "time": rfc3339(utc)}
    raised = [{"event": "raised", **common, **alarm} for key, alarm in now.items() if key not in before]
    return [{"event": "cleared", **common, **alarm} for key, alarm in before.items() if key not in now] + raised


def run(workstation: str, move: Mapping[str, Any]) -> Payload:
    """Return the event of a run's end or hold. Repeated, it is the same to the last byte, but for words of the run."""
    told: Payload = {
        "id": f"{move['run']}-{move['id']}",
        "workstation": workstation,
        "run": move["run"],
        "rule": move["rule"],
        "group": move["group"],
        "from": move["from"],
        "state": move["state"],
        "final": move["final"],
        "because": _short(move["because"]),
        "time": rfc3339(move["time"]),
        "created_time": rfc3339(move["created_time"]),
        "reason": _short(move["reason"]),
        "files": move["files"],
        "bytes": move["bytes"],
        "attempts": move["attempts"],
        "error": _short(move["error"]),
        "hint": _short(move["hint"]),
        "output": move["output"],
    }
    if move["output"] is not None and len(to_json(move["output"])) > OUTPUT_BYTES_MAX:
        told["output"] = _left_out(move["run"])
    return told


def _left_out(run: int) -> Payload:
    return {"left_out": f"`trigger-daemon runs show {run}` shows it: it is too long to be told"}


def lost(workstation: str, count: int, since: int, utc: float) -> Payload:
    """Return what stands in the place of events that were left out."""
    return {"id": f"lost-{since}", "workstation": workstation, "lost": count, "time": rfc3339(utc)}


def _short(words: str | None) -> str:
    words = words or ""
    return words if len(words) <= WORDS_MAX else words[: WORDS_MAX - 1] + "…"
