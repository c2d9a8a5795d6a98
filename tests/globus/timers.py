"""Timers: transfers and flows that the service starts by the clock, which a test moves."""

from __future__ import annotations

from typing import Any

from . import collection as collections
from . import flows, transfer
from .answer import Answer, Caller, Refusal, Request, Route, route
from .state import Document, Store, instant, iso, new_id

_RUNS_AT_ONCE_MAX = 1000  # a clock moved by years must not start a million transfers


def _refuse(status: int, message: str, *loc: str) -> Refusal:
    if status == 422:
        return Refusal(422, {"detail": [{"loc": ["body", *loc], "msg": message, "type": "value_error"}]})
    return Refusal(status, {"error": {"code": "ERROR", "detail": message, "status": status}})


def _first(store: Store, schedule: Any) -> float:
    match schedule:
        case {"type": "once"}:
            text = schedule.get("datetime")
        case {"type": "recurring", "interval_seconds": int(seconds)} if seconds > 0:
            text = schedule.get("start")
        case _:
            raise _refuse(422, "a schedule is of the type once or recurring", "timer", "schedule")
    try:
        return instant(text) if text else store.now()
    except (ValueError, AttributeError):
        raise _refuse(422, f"invalid time {text!r}", "timer", "schedule") from None


def _create(request: Request) -> Answer:
    store, wanted = request.store, request.body.get("timer")
    if not isinstance(wanted, dict) or wanted.get("timer_type") not in ("transfer", "flow"):
        raise _refuse(422, "timer_type must be transfer or flow", "timer")
    kind, body, schedule = wanted["timer_type"], wanted.get("body"), wanted.get("schedule")
    first = _first(store, schedule)
    if not isinstance(body, dict):
        raise _refuse(422, "field required", "timer", "body")
    scope = None
    if kind == "flow":
        flow = flows.known(store, wanted.get("flow_id"))
        if flow is None:
            raise _refuse(404, "no such flow")
        scope = flow["globus_auth_scope"]
    else:
        _check_transfer(request, body)
    timer = {
        "job_id": new_id(), "name": wanted.get("name"), "timer_type": kind, "schedule": schedule, "body": body,
        "status": "new", "submitted_at": store.stamp(), "last_ran_at": None, "next_run": iso(first),
        "number_of_runs": 0, "number_of_errors": 0, "inactive_reason": None, "scope": scope, "results": [],
        "_identity": request.caller.identity, "_client": request.caller.client, "_flow_id": wanted.get("flow_id"),
        "_first": first,
    }  # fmt: skip
    store.put("timer", timer["job_id"], timer, request.caller.identity)
    store.ring()
    return 201, {"timer": _public(timer)}


def _check_transfer(request: Request, body: Document) -> None:
    """Refuse at once what could never run: collections that are missing, and consents."""
    found = [collections.find(request.store, body.get(f"{side}_endpoint")) for side in ("source", "destination")]
    known = [one for one in found if one is not None]
    if len(known) < 2:
        raise _refuse(422, "no such collection", "timer", "body")
    collections.require_consent(request.store, request.caller, known, request)


def _public(timer: Document) -> Document:
    """Return a timer with the fields of both interfaces, the older one having jobs with an interval."""
    shown = {key: value for key, value in timer.items() if not key.startswith("_")}
    recurring = timer["schedule"]["type"] == "recurring"
    ends = timer["schedule"].get("end") or {}
    flow_url = f"https://flows.automate.globus.org/flows/{timer['_flow_id']}/run"
    transfer_url = "https://transfer.actions.globus.org/transfer/run"
    return shown | {
        "start": iso(timer["_first"]), "interval": timer["schedule"].get("interval_seconds") if recurring else None,
        "stop_after": {"date": ends.get("datetime"), "n_runs": _count(timer)}, "n_runs": timer["number_of_runs"],
        "n_errors": timer["number_of_errors"], "results": {"data": timer["results"], "page_next": None},
        "callback_url": flow_url if timer["timer_type"] == "flow" else transfer_url,
        "callback_body": timer["body"] if timer["timer_type"] == "flow" else {"body": timer["body"]},
    }  # fmt: skip


def _count(timer: Document) -> int | None:
    """Return after how many runs a timer ends. The two published forms of the end condition both count."""
    if timer["schedule"]["type"] == "once":
        return 1
    ends = timer["schedule"].get("end") or {}
    return ends.get("count") or ends.get("iterations")


# -------------------------------------------------------------------- firing


def settle(store: Store) -> bool:
    """Start what is due; return whether any timer is still to come."""
    waiting = False
    for timer in store.all("timer"):
        if timer["status"] not in ("new", "loaded"):
            continue
        for _ in range(_RUNS_AT_ONCE_MAX):
            if timer["next_run"] is None or instant(timer["next_run"]) > store.now():
                break
            with store.transaction():
                timer = store.get("timer", timer["job_id"]) or timer
                if timer["status"] not in ("new", "loaded"):
                    break
                _fire(store, timer)
        waiting |= timer["next_run"] is not None
    return waiting


def _fire(store: Store, timer: Document) -> None:
    who = Caller(timer["_identity"], timer["_client"])
    result: Document = {"ran_at": store.stamp(), "status": 200, "errors": None, "data": {}}
    try:
        # A refusal must not take the record of this firing with it.
        result["data"] = _start(store, timer, who)
    except Refusal as refusal:
        timer["number_of_errors"] += 1
        result |= {"status": refusal.status, "errors": [refusal.body]}
    timer["number_of_runs"] += 1
    timer["last_ran_at"] = store.stamp()
    timer["results"] = [result, *timer["results"]][:20]
    timer["status"] = "loaded"
    timer["next_run"] = _next(timer)
    if timer["next_run"] is None:
        timer["status"] = "ended"
    store.put("timer", timer["job_id"], timer)


def _start(store: Store, timer: Document, who: Caller) -> Document:
    if timer["timer_type"] == "transfer":
        task_id = transfer.submit_for(store, who, timer["body"])
        return {"action_id": task_id, "status": "ACTIVE", "details": {"task_id": task_id}}
    flow = flows.known(store, timer["_flow_id"])
    if flow is None:
        raise _refuse(404, "no such flow")
    run = flows.start(store, flow, who, {"body": {}} | timer["body"])
    return flows.public(run)


def _next(timer: Document) -> str | None:
    count, ends = _count(timer), timer["schedule"].get("end") or {}
    if timer["schedule"]["type"] == "once" or (count is not None and timer["number_of_runs"] >= count):
        return None
    following = instant(timer["next_run"]) + timer["schedule"]["interval_seconds"]
    if ends.get("datetime") and following > instant(ends["datetime"]):
        return None
    return iso(following)


# -------------------------------------------------------------------- routes


def _timer(request: Request) -> Document:
    timer = request.store.get("timer", request.parts["job"])
    if timer is None or timer["_identity"] != request.caller.identity:
        raise _refuse(404, f"no timer {request.parts['job']}")
    return timer


def _list(request: Request) -> Answer:
    return 200, {"jobs": [_public(timer) for timer in request.store.all("timer", request.caller.identity)]}


def _get(request: Request) -> Answer:
    return 200, _public(_timer(request))


def _update(request: Request) -> Answer:
    timer = _timer(request) | {key: request.body[key] for key in ("name",) if key in request.body}
    request.store.put("timer", timer["job_id"], timer)
    return 200, _public(timer)


def _delete(request: Request) -> Answer:
    timer = _timer(request)
    request.store.remove("timer", timer["job_id"])
    return 200, _public(timer)


def _pause(request: Request) -> Answer:
    timer = _timer(request) | {"status": "inactive", "inactive_reason": {"cause": "user", "detail": None}}
    request.store.put("timer", timer["job_id"], timer)
    return 200, {"message": f"Successfully paused job {timer['job_id']}."}


def _resume(request: Request) -> Answer:
    timer = _timer(request) | {"status": "loaded", "inactive_reason": None}
    request.store.put("timer", timer["job_id"], timer)
    request.store.ring()
    return 200, {"message": f"Successfully resumed job {timer['job_id']}."}


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("POST", "/v2/timer", _create),
        ("GET", "/jobs", _list),
        ("GET", "/jobs/{job}", _get),
        ("PATCH", "/jobs/{job}", _update),
        ("DELETE", "/jobs/{job}", _delete),
        ("POST", "/jobs/{job}/pause", _pause),
        ("POST", "/jobs/{job}/resume", _resume),
    ]
    return [route("timers", method, path, handler) for method, path, handler in table]
