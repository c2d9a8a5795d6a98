"""The control plane: what a test orders, and what it may look at. Loopback only, and no token is asked for.

Faults are chosen here. Chance is a function of the seed and of how often a fault was
asked, so that the same requests meet the same faults, also after a restart.
"""

from __future__ import annotations

import fnmatch
import json
import random
from dataclasses import dataclass
from typing import Any

from . import auth, compute, groups, search
from . import collection as collections
from .answer import Answer, Refusal, Request, Route, is_uuid, route
from .flows import create as create_flow
from .state import Document, Store, new_id
from .transfer import OPEN, event, finish

# kind -> whether the request is carried out, and the status that is answered
KINDS: dict[str, tuple[bool, int]] = {
    "refuse": (False, 0),
    "drop_after": (True, 0),
    "error_before": (False, 503),
    "error_after": (True, 502),
    "delay": (True, 0),
    "rate_limited": (False, 429),
    "html": (False, 200),
    "cut": (True, 200),
    "unauthorized_once": (False, 401),
    "drip": (False, 200),
    "endless": (False, 200),
    "redirect": (False, 307),
}
_BODY_LOGGED_MAX = 100_000  # of a body: enough for any document of a test


@dataclass(frozen=True)
class Fault:
    kind: str
    acts: bool
    status: int
    code: str
    seconds: float
    when: str
    retry_after: str
    body: Any
    to: str


# -------------------------------------------------------------------- faults


def add_fault(store: Store, order: Document) -> Document:
    """Order a fault for a route pattern such as `POST /v0.10/transfer` or `* /runs/*`. Raises ValueError."""
    kind = order.get("kind")
    if kind not in KINDS:
        raise ValueError(f"no fault {kind!r}; there are {', '.join(KINDS)}")
    known = {"pattern", "kind", "times", "probability", "seed", "skip", "status", "code", "seconds", "when",
             "retry_after", "body", "to"}  # fmt: skip
    if unknown := order.keys() - known:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    if order.get("when", "before") not in ("before", "after"):
        raise ValueError("when is 'before' or 'after'")
    chance = order.get("probability")
    fault = {
        "id": new_id(), "pattern": order["pattern"], "kind": kind, "asked": 0, "met": 0, "skip": order.get("skip", 0),
        "times": order.get("times", 1 if chance is None else None), "probability": 1.0 if chance is None else chance,
        "seed": order.get("seed", 0), "status": order.get("status") or KINDS[kind][1],
        "code": order.get("code", {"rate_limited": "TooManyRequests"}.get(kind, "ServiceUnavailable")),
        "seconds": order.get("seconds", 0.0), "when": order.get("when", "before"),
        "retry_after": str(order.get("retry_after", 1)), "body": order.get("body"),
        "to": order.get("to", "http://elsewhere.invalid/"),
    }  # fmt: skip
    store.put("fault", fault["id"], fault)
    return fault


def due(store: Store, method: str, path: str) -> list[Fault]:
    """Return the faults that this request meets: every delay, and at most one of the others."""
    chosen: list[Fault] = []
    for fault in store.all("fault"):
        if not _concerns(fault["pattern"], method, path):
            continue
        other = fault["kind"] != "delay"
        if (other and any(one.kind != "delay" for one in chosen)) or fault["times"] == 0:
            continue
        draw = random.Random(f"{fault['seed']}:{fault['asked']}").random()
        fault["asked"] += 1
        if fault["asked"] > fault["skip"] and draw < fault["probability"]:
            fault["met"] += 1
            fault["times"] = None if fault["times"] is None else fault["times"] - 1
            names = ("kind", "status", "code", "seconds", "when", "retry_after", "body", "to")
            chosen.append(Fault(acts=KINDS[fault["kind"]][0], **{name: fault[name] for name in names}))
        store.put("fault", fault["id"], fault)
    return chosen


def _concerns(pattern: str, method: str, path: str) -> bool:
    wanted, _, rest = pattern.partition(" ")
    if not rest:
        wanted, rest = "*", pattern
    return fnmatch.fnmatchcase(method, wanted) and fnmatch.fnmatchcase(path.rstrip("/"), rest.rstrip("/"))


def note(
    store: Store, request: Request, query: str, raw: bytes, status: int, carried_out: bool, fault: str | None
) -> None:
    """Write the line of a request: the status is what the route gave, whatever a fault made of it."""
    store.sql(
        "INSERT INTO requests (time, method, path, query, status, carried_out, fault, identity, body)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        store.now(), request.method, request.path, query, status, int(carried_out), fault,
        request.caller.identity or None, _logged(request.path, raw),
    )  # fmt: skip


def _logged(path: str, raw: bytes) -> str | None:
    """Return the body for the log; what is sent to Auth holds secrets and stays out."""
    if not raw or path.startswith("/v2/oauth2"):
        return None
    return raw[:_BODY_LOGGED_MAX].decode(errors="replace")


# -------------------------------------------------------------------- orders


def _settings(request: Request) -> Answer:
    request.store.turn(request.body)
    request.store.ring()
    return 200, request.store.settings()


def _reset(request: Request) -> Answer:
    """Forget everything but the signing key, which takes a moment to make."""
    key = request.store.meta("rsa", None)
    request.store.clear()
    if key is not None:
        request.store.set_meta("rsa", key)
    return 200, {}


def _client(request: Request) -> Answer:
    body = request.body
    key = body.get("id") or new_id()
    auth.add_client(request.store, key, body.get("secret"), body.get("name", ""))
    return 200, {"id": key}


def _identity(request: Request) -> Answer:
    body = request.body
    return 200, {"id": auth.add_identity(request.store, body["username"], identity=body.get("id"))}


def _login(request: Request) -> Answer:
    """From now on this person is the one who logs in at the emulated page."""
    request.store.set_meta("login_as", request.body["identity"])
    return 200, {}


def _code(request: Request) -> Answer:
    return 200, {"code": auth.code_for(request.store, request.body["identity"], request.body["scope"])}


def _expire(request: Request) -> Answer:
    with request.store.transaction():
        return 200, {"expired": auth.expire_tokens(request.store, refresh=bool(request.body.get("refresh")))}


def _collection(request: Request) -> Answer:
    body = dict(request.body)
    key = body.pop("id", None) or new_id()
    if not is_uuid(key):
        raise ValueError(f"{key!r} is not a UUID")
    found = collections.make(request.store, key, body.pop("directory"), body)
    return 200, {"id": key, "document": found["document"]}


def _change_collection(request: Request) -> Answer:
    """Set the moods of a collection: down, quota_bytes, denied, consent, pause_rules, corrupt, lies, keeps_times."""
    store = request.store
    with store.transaction():
        found = collections.find(store, request.parts["collection"])
        if found is None:
            raise Refusal(404, {"error": "no such collection"})
        for name, value in request.body.items():
            if name not in (
                "down", "quota_bytes", "denied", "consent", "pause_rules", "corrupt", "lies", "keeps_times", "owner",
            ):  # fmt: skip
                raise ValueError(f"no mood {name!r}")
            found[name] = value
        if request.body.get("consent"):
            auth.revoke_consent(store, found["id"])
        store.put("collection", found["id"], found)
    store.ring()
    return 200, found


def _fault(request: Request) -> Answer:
    return 200, add_fault(request.store, request.body)


def _faults(request: Request) -> Answer:
    return 200, {"faults": request.store.all("fault")}


def _clear_faults(request: Request) -> Answer:
    with request.store.transaction():
        for fault in request.store.all("fault"):
            request.store.remove("fault", fault["id"])
    return 200, {}


def _requests(request: Request) -> Answer:
    names = ("seq", "time", "method", "path", "query", "status", "carried_out", "fault", "identity", "body")
    since = request.number("since", 0)
    rows = request.store.sql(f"SELECT {', '.join(names)} FROM requests WHERE seq > ? ORDER BY seq", since)
    lines = [dict(zip(names, row, strict=True)) for row in rows]
    return 200, {"requests": [line | {"carried_out": bool(line["carried_out"])} for line in lines]}


def _clear_requests(request: Request) -> Answer:
    request.store.sql("DELETE FROM requests")
    return 200, {}


def _tasks(request: Request) -> Answer:
    store = request.store
    rows = store.all("task")
    return 200, {"tasks": [task | {"events": store.lines(f"events {task['task_id']}")} for task in rows]}


def _items(request: Request) -> Answer:
    rows = request.store.sql(
        "SELECT number, state, tries, doc FROM items WHERE task_id = ? ORDER BY number", request.parts["task"]
    )
    return 200, {
        "items": [json.loads(doc) | {"number": number, "state": state, "tries": tries}
                  for number, state, tries, doc in rows]
    }  # fmt: skip


def _change_task(request: Request) -> Answer:
    """Pause a task (`paused`), suspend it for want of credentials (`credentials`), or let it go on (`resume`)."""
    store, body = request.store, request.body
    with store.transaction():
        task = store.get("task", request.parts["task"])
        if task is None or task["status"] not in OPEN:
            raise Refusal(409, {"error": "no such open task"})
        match body["action"]:
            case "pause":
                reason = body.get("reason", "paused")
                if reason not in ("paused", "credentials"):
                    raise ValueError(f"no reason {reason!r}")
                task["_pause"] = {"reason": reason, "message": body.get("message", "paused by the site")}
                if reason == "credentials":
                    task["status"], task["nice_status"], task["is_ok"] = "INACTIVE", "NO_CREDENTIALS", False
                    event(store, task, "NO_CREDENTIALS", "credentials expired", "", error=True)
                else:
                    task["is_paused"], task["nice_status"] = True, "PAUSED"
                    event(store, task, "PAUSED", "paused", task["_pause"]["message"])
            case "resume":
                was, task["_pause"] = task["_pause"], None
                task["status"], task["nice_status"], task["is_ok"] = "ACTIVE", "OK", True
                task["is_paused"] = False
                if was and was["reason"] == "paused":
                    event(store, task, "UNPAUSED", "unpaused", "")
            case "cancel_by_admin":
                task["canceled_by_admin"] = body.get("side", "BOTH")
                task["canceled_by_admin_message"] = body.get("message", "")
                finish(store, task, "FAILED", "CANCELED", "canceled by an administrator")
            case other:
                raise ValueError(f"no action {other!r}")
        store.put("task", task["task_id"], task)
    store.ring()
    return 200, task


def _runs(request: Request) -> Answer:
    return 200, {"runs": request.store.all("run")}


def _clock(request: Request) -> Answer:
    body = request.body
    now = request.store.steer(advance_s=body.get("advance_s", 0.0), scale=body.get("scale"))
    return 200, {"now": now}


def _group(request: Request) -> Answer:
    body = request.body
    group = groups.make(request.store, body.get("name", "Visit"), body.get("members", {}), body.get("id"))
    return 200, {"id": group["id"]}


def _index(request: Request) -> Answer:
    body = request.body
    found = search.make_index(request.store, body.get("name", "Visits"), body.get("writers"), body.get("id"))
    return 200, {"id": found["id"]}


def _entries(request: Request) -> Answer:
    store = request.store
    with store.transaction():
        search.settle(store)
        return 200, {"entries": store.all("entry", request.parts["index"])}


def _flow(request: Request) -> Answer:
    with request.store.transaction():
        flow = create_flow(request.store, request.body, request.body.get("flow_owner") or new_id())
    return 200, {"id": flow["id"]}


def _provider(request: Request) -> Answer:
    """Order what an action provider answers: by URL (or glob), so many times, after so many seconds."""
    order = request.body
    key = new_id()
    provider = {
        "id": key, "url": order["url"], "status": order.get("status", "SUCCEEDED"), "details": order.get("details", {}),
        "seconds": order.get("seconds", 0.0), "times": order.get("times"), "error": order.get("error"),
    }  # fmt: skip
    request.store.put("provider", key, provider)
    return 200, provider


def _function(request: Request) -> Answer:
    """Order what a Compute function gives: an `output`, an `error`, or the `callable` (module:name) to call."""
    order = request.body
    key = order.get("function_id") or new_id()
    request.store.put("function", key, order | {"function_id": key})
    return 200, {"function_id": key}


def _endpoint(request: Request) -> Answer:
    """Let there be a Compute endpoint, or change one."""
    order = {key: value for key, value in request.body.items() if key != "id"}
    endpoint = compute.make_endpoint(request.store, request.body.get("id") or new_id(), **order)
    request.store.ring()
    return 200, endpoint


def _compute_tasks(request: Request) -> Answer:
    return 200, {"tasks": request.store.all("compute_task")}


def _access(request: Request) -> Answer:
    return 200, {"access": request.store.all("access", request.parts["collection"])}


def _notifications(request: Request) -> Answer:
    return 200, {"notifications": request.store.lines("notifications")}


def _health(request: Request) -> Answer:
    return 200, {"now": request.store.now()}


def configure(store: Store, config: Document) -> None:
    """Bring the state in line with a configuration file; what is there already is replaced, never doubled."""
    if "settings" in config:
        store.turn(config["settings"])
    with store.transaction():
        for one in config.get("clients", []):
            auth.add_client(store, one["id"], one.get("secret"), one.get("name", ""))
        for one in config.get("collections", []):
            fields = {key: value for key, value in one.items() if key not in ("id", "directory")}
            collections.make(store, one["id"], one["directory"], fields)
        for one in config.get("groups", []):
            groups.make(store, one["name"], one.get("members", {}), one["id"])
        for one in config.get("indexes", []):
            search.make_index(store, one["name"], one.get("writers"), one["id"])
        for one in config.get("flows", []):
            if store.get("flow", one["id"]) is None:
                create_flow(store, one, one.get("flow_owner") or new_id())


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("GET", "/health", _health),
        ("POST", "/settings", _settings),
        ("POST", "/reset", _reset),
        ("POST", "/client", _client),
        ("POST", "/identity", _identity),
        ("POST", "/login", _login),
        ("POST", "/code", _code),
        ("POST", "/expire", _expire),
        ("POST", "/collection", _collection),
        ("POST", "/collection/{collection}", _change_collection),
        ("GET", "/collection/{collection}/access", _access),
        ("POST", "/fault", _fault),
        ("GET", "/faults", _faults),
        ("DELETE", "/faults", _clear_faults),
        ("GET", "/requests", _requests),
        ("DELETE", "/requests", _clear_requests),
        ("GET", "/tasks", _tasks),
        ("GET", "/task/{task}/items", _items),
        ("POST", "/task/{task}", _change_task),
        ("GET", "/runs", _runs),
        ("POST", "/clock", _clock),
        ("POST", "/group", _group),
        ("POST", "/index", _index),
        ("GET", "/index/{index}", _entries),
        ("POST", "/flow", _flow),
        ("POST", "/provider", _provider),
        ("POST", "/function", _function),
        ("POST", "/endpoint", _endpoint),
        ("GET", "/compute", _compute_tasks),
        ("GET", "/notifications", _notifications),
    ]
    return [route("control", method, "/_control" + path, handler) for method, path, handler in table]
