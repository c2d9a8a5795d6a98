"""Flows: definitions, and what a client sees and orders of runs. The states are executed in runs.py."""

from __future__ import annotations

import re
from typing import Any

from . import definition as definitions
from . import schema
from .answer import Answer, Caller, Refusal, Request, Route, is_uuid, page, route
from .state import Document, Store, instant, iso, new_id

ENDED = ("SUCCEEDED", "FAILED", "ENDED")
_FIELDS = ("title", "subtitle", "description", "keywords", "flow_viewers", "flow_starters", "flow_administrators",
           "run_managers", "run_monitors", "definition", "input_schema", "subscription_id")  # fmt: skip
_RUN_KEYS = {"body", "label", "tags", "run_monitors", "run_managers", "activity_notification_policy"}


def urn(identity: str) -> str:
    return f"urn:globus:auth:identity:{identity}"


def refuse(status: int, code: str, detail: Any, message: str | None = None) -> Refusal:
    error = {"code": code, "detail": detail} | ({"message": message} if message else {})
    return Refusal(status, {"error": error, "debug_id": new_id()})


def scope_of(flow_id: str) -> str:
    return f"https://auth.globus.org/scopes/{flow_id}/flow_{flow_id.replace('-', '_')}_user"


def servers_of(store: Store, request: Request) -> tuple[str, ...]:
    """Return further resource servers whose token is good here: that of the flow itself, or of the run's flow."""
    if match := re.match(r"/flows/([0-9a-f-]{36})/", request.path):
        return (match[1],)
    if match := re.match(r"/runs/([0-9a-f-]{36})", request.path):
        run = store.get("run", match[1])
        return (run["flow_id"],) if run else ()
    return ()


def public(document: Document) -> Document:
    """Return what a client may see of a flow or run: the emulator's own notes begin with `_`."""
    return {key: value for key, value in document.items() if not key.startswith("_")}


# --------------------------------------------------------------- definitions


def create(store: Store, body: Document, owner: str) -> Document:
    """Keep a flow; without lists of people everybody may see and start it."""
    _check_definition(body.get("definition"))
    key = body.get("id") or new_id()
    now = store.stamp()
    flow = {
        "id": key, "title": "Deliver", "subtitle": "", "description": "", "keywords": [], "input_schema": {},
        "flow_viewers": ["public"], "flow_starters": ["all_authenticated_users"], "flow_administrators": [],
        "run_managers": [], "run_monitors": [], "subscription_id": None, "visible_to": [], "runnable_by": [],
        "administered_by": [], "created_at": now, "updated_at": now, "created_by": urn(owner),
        "flow_owner": urn(owner), "principal_urn": urn(key), "globus_auth_username": f"{key}@clients.auth.globus.org",
        "globus_auth_scope": scope_of(key), "synchronous": False, "log_supported": True, "types": ["Action"],
        "api_version": "1.0", "action_url": f"https://flows.globus.org/flows/{key}",
        "flow_url": f"https://flows.globus.org/flows/{key}", "authentication_policy_id": None,
        "_listed": store.now() + store.setting("flow_listed_after_s"),
    } | {name: body[name] for name in _FIELDS if name in body}  # fmt: skip
    store.put("flow", key, flow)
    return flow


def _check_definition(definition: Any) -> None:
    if found := definitions.problems(definition):
        details = [{"loc": loc, "msg": message, "type": "value_error"} for loc, message in found]
        first = ".".join(str(part) for part in found[0][0])
        message = f"{len(found)} validation error{'s'[: len(found) > 1]} in body. $.{first}: {found[0][1]}"
        raise refuse(422, "UNPROCESSABLE_ENTITY", details, message)


def _principals(store: Store, who: str) -> set[str]:
    groups = {f"urn:globus:groups:id:{one['id']}" for one in store.all("group") if who in one["members"]}
    return {urn(who), "public", "all_authenticated_users", *groups}


_ROLES = (
    ("flow_administrators", "flow_administrator"), ("flow_starters", "flow_starter"), ("flow_viewers", "flow_viewer"),
    ("run_managers", "run_manager"), ("run_monitors", "run_monitor"),
)  # fmt: skip


def _role(store: Store, flow: Document, who: str) -> str | None:
    if flow["flow_owner"] == urn(who):
        return "flow_owner"
    mine = _principals(store, who)
    return next((role for field, role in _ROLES if mine & set(flow[field])), None)


def _flow(request: Request, *, need: str = "VIEW") -> Document:
    """Return the flow that a path names; one that the caller may not see does not exist for them."""
    store, key = request.store, request.parts["flow"]
    flow = store.get("flow", key)
    role = _role(store, flow, request.caller.identity) if flow else None
    if flow is None or role is None:
        raise refuse(404, "NOT_FOUND", f"No flow exists with id value {key}")
    allowed = {"RUN": ("flow_owner", "flow_administrator", "flow_starter"),
               "UPDATE": ("flow_owner", "flow_administrator")}.get(need)  # fmt: skip
    if allowed and role not in allowed:
        raise refuse(
            403, "FORBIDDEN",
            "You do not have the necessary permissions to perform this action on the flow with id value"
            f" {key}. Missing permissions: {need}.",
        )  # fmt: skip
    return flow


def _shown(request: Request, flow: Document) -> Document:
    return public(flow) | {"user_role": _role(request.store, flow, request.caller.identity)}


def _get_flow(request: Request) -> Answer:
    return 200, _shown(request, _flow(request))


def _create_flow(request: Request) -> Answer:
    private = {"flow_viewers": [], "flow_starters": []}
    return 201, _shown(request, create(request.store, private | request.body, request.caller.identity))


def _update_flow(request: Request) -> Answer:
    flow = _flow(request, need="UPDATE")
    if "definition" in request.body:
        _check_definition(request.body["definition"])
    flow |= {name: request.body[name] for name in _FIELDS if name in request.body}
    flow["updated_at"] = request.store.stamp()
    request.store.put("flow", flow["id"], flow)
    return 200, _shown(request, flow)


def _delete_flow(request: Request) -> Answer:
    flow = _flow(request, need="UPDATE")
    request.store.remove("flow", flow["id"])
    return 200, _shown(request, flow) | {"DELETED": True, "deleted_at": request.store.stamp()}


def _list_flows(request: Request) -> Answer:
    now = request.store.now()
    flows = [_shown(request, flow) for flow in request.store.all("flow") if flow["_listed"] <= now]
    text = request.one("filter_fulltext").lower()
    flows = [flow for flow in flows if flow["user_role"] and text in flow["title"].lower()]
    if roles := request.one("filter_roles"):
        flows = [flow for flow in flows if flow["user_role"] in roles.split(",")]
    rows, size, marker = page(flows, request, 20)
    return 200, {"flows": rows, "limit": size, "has_next_page": marker is not None, "marker": marker}


def _validate_flow(request: Request) -> Answer:
    _check_definition(request.body.get("definition"))
    scopes = {"User": ["urn:globus:auth:scope:transfer.api.globus.org:all"]}
    return 200, {"scopes": scopes, "analysis": {"number_of_possibilities": 1}}


# ------------------------------------------------------------------ starting


def _check_run(request: Request, flow: Document) -> None:
    body, store = request.body, request.store
    if scope_of(flow["id"]) not in request.caller.scopes:
        raise refuse(403, "MISSING_SCOPE", f"This action requires the following scope: {scope_of(flow['id'])}")
    wrong: list[Document] = [
        {"loc": [key], "msg": "extra fields not permitted", "type": "value_error.extra"}
        for key in sorted(body.keys() - _RUN_KEYS)
    ]
    label, tags = body.get("label"), body.get("tags", [])
    longest = store.setting("flow_label_max")
    if label is not None and (not isinstance(label, str) or not 1 <= len(label) <= longest):
        wrong.append({"loc": ["label"], "msg": f"label has 1 to {longest} characters", "type": "value_error"})
    tag_max, tags_max = store.setting("flow_tag_max"), store.setting("flow_tags_max")
    if not isinstance(tags, list) or len(tags) > tags_max:
        wrong.append({"loc": ["tags"], "msg": f"there are at most {tags_max} tags", "type": "value_error"})
    elif any(not isinstance(tag, str) or not 1 <= len(tag) <= tag_max for tag in tags):
        wrong.append({"loc": ["tags"], "msg": f"a tag has 1 to {tag_max} characters", "type": "value_error"})
    if not isinstance(body.get("body"), dict):
        wrong.append({"loc": ["body"], "msg": "value is not a valid dict", "type": "type_error.dict"})
    if wrong:
        raise refuse(422, "UNPROCESSABLE_ENTITY", wrong)
    _check_input(flow, body["body"])


def _check_input(flow: Document, value: Document) -> None:
    found = schema.problems(value, flow["input_schema"])
    if found:
        details = [{"loc": [where], "type": "InvalidActionInput", "msg": message} for where, message in found]
        count = f"{len(found)} error{'s'[: len(found) > 1]}"
        raise refuse(400, "FLOW_INPUT_ERROR", details, f"Input failed schema validation with {count}.")


def start(store: Store, flow: Document, who: Caller, body: Document) -> Document:
    """Make a run. It is durable when the transaction ends, and listed when the service would list it."""
    now = store.now()
    run_id = new_id()
    run = {
        "run_id": run_id, "action_id": run_id, "flow_id": flow["id"], "flow_title": flow["title"],
        "flow_last_updated": flow["updated_at"], "start_time": iso(now), "completion_time": None, "status": "ACTIVE",
        "display_status": "ACTIVE",
        "details": {"code": "FlowStarting", "description": "The Flow is starting execution",
                    "details": {"input": body["body"]}},
        "label": body.get("label"), "tags": body.get("tags", []), "run_owner": urn(who.identity),
        "created_by": urn(who.identity), "run_managers": body.get("run_managers", []),
        "run_monitors": body.get("run_monitors", []), "manage_by": body.get("run_managers", []),
        "monitor_by": body.get("run_monitors", []), "user_role": "run_owner", "blocking_web_input_id": None,
        "search": {"task_id": new_id()},
        "_identity": who.identity, "_client": who.client, "_input": body["body"], "_data": body["body"],
        "_state": flow["definition"]["StartAt"], "_wait": None, "_steps": 0,
        "_listed": now + store.setting("run_listed_after_s"),
    }  # fmt: skip
    store.put("run", run_id, run, who.identity)
    store.put("open_run", run_id, {"run_id": run_id})
    kept = {"flow_id": flow["id"], "definition": flow["definition"], "input_schema": flow["input_schema"]}
    store.put("run_definition", run_id, kept)
    log(store, run_id, "FlowStarted", "The Flow Instance started execution", {"input": body["body"]})
    store.ring()
    return run


def log(store: Store, run_id: str, code: str, description: str, details: Document) -> None:
    entry = {"time": store.stamp(), "code": code, "description": description, "details": details}
    store.append(f"log {run_id}", entry)


def end(store: Store, run: Document, status: str, code: str, description: str, **details: Any) -> None:
    run |= {"status": status, "display_status": status, "completion_time": store.stamp(), "_wait": None,
            "blocking_web_input_id": None,
            "details": {"code": code, "description": description, "time": store.stamp()} | details}  # fmt: skip
    store.put("run", run["run_id"], run)
    store.remove("open_run", run["run_id"])
    log(store, run["run_id"], code, description, details)


def _run_flow(request: Request) -> Answer:
    flow = _flow(request, need="RUN")
    _check_run(request, flow)
    return 201, public(start(request.store, flow, request.caller, request.body))


def _validate_run(request: Request) -> Answer:
    _check_run(request, _flow(request, need="RUN"))
    return 200, {"message": "validation successful"}


# ---------------------------------------------------------------- about runs


def _run_role(store: Store, run: Document, who: str) -> str | None:
    mine = _principals(store, who)
    if run["run_owner"] in mine:
        return "run_owner"
    if mine & set(run["run_managers"]):
        return "run_manager"
    return "run_monitor" if mine & set(run["run_monitors"]) else None


def _run(request: Request, *, manage: bool = False) -> Document:
    store, key = request.store, request.parts["run"]
    run = store.get("run", key)
    role = _run_role(store, run, request.caller.identity) if run else None
    if run is None or role is None:
        raise refuse(404, "NOT_FOUND", f"No Run exists with id value {key}")
    if manage and role == "run_monitor":
        raise refuse(403, "FORBIDDEN", f"You may not manage the run {key}")
    run["user_role"] = role
    return run


def _get_run(request: Request) -> Answer:
    run = _run(request)
    shown = public(run)
    if request.one("include_flow_description").lower() in ("1", "true"):
        flow = request.store.get("flow", run["flow_id"]) or {}
        names = ("created_at", "created_by", "flow_owner", "description", "subtitle", "title", "updated_at", "keywords",
                 "globus_auth_scope", "id")  # fmt: skip
        shown["flow_description"] = {name: flow.get(name) for name in names}
    return 200, shown


def _list_runs(request: Request) -> Answer:
    store, who = request.store, request.caller.identity
    runs = [run for run in store.all("run") if run["_listed"] <= store.now()]
    for run in runs:
        run["user_role"] = _run_role(store, run, who)
    runs = [run for run in runs if _wanted(request, run)]
    key, _, way = (request.one("orderby") or "start_time DESC").partition(" ")
    runs.sort(key=lambda run: str(run.get(key) or ""), reverse=way.upper() != "ASC")
    without = store.setting("runs_listed_without")
    shown = [{key: value for key, value in public(run).items() if key not in without} for run in runs]
    rows, size, marker = page(shown, request, 20)
    return 200, {"runs": rows, "limit": size, "has_next_page": marker is not None, "marker": marker}


def _wanted(request: Request, run: Document) -> bool:
    if run["user_role"] is None:
        return False
    roles = _several(request, "filter_roles")
    if roles and run["user_role"] not in roles:
        return False
    flow_ids = _several(request, "filter_flow_id")
    if flow_ids and run["flow_id"] not in flow_ids:
        return False
    statuses = _several(request, "filter_status")
    if statuses and run["status"] not in statuses:
        return False
    if request.one("filter_label").lower() not in (run["label"] or "").lower():
        return False
    return all(_between(request.one(f"filter_{key}"), run[key]) for key in ("start_time", "completion_time"))


def _several(request: Request, name: str) -> set[str]:
    return {one for text in request.query.get(name, []) for one in text.split(",") if one}


def _between(span: str, value: str | None) -> bool:
    if not span:
        return True
    if value is None:
        return False
    begin, _, last = span.partition(",")
    try:
        return (not begin or instant(begin) <= instant(value)) and (not last or instant(value) <= instant(last))
    except ValueError:
        raise refuse(422, "UNPROCESSABLE_ENTITY", f"Invalid time range {span!r}") from None


def _run_log(request: Request) -> Answer:
    entries = request.store.lines(f"log {_run(request)['run_id']}")
    if request.one("reverse_order").lower() in ("1", "true"):
        entries.reverse()
    rows, size, marker = page(entries, request, 10)
    return 200, {"entries": rows, "limit": size, "has_next_page": marker is not None, "marker": marker}


def _run_definition(request: Request) -> Answer:
    return 200, request.store.get("run_definition", _run(request)["run_id"])


def _cancel_run(request: Request) -> Answer:
    run = _run(request, manage=True)
    if run["status"] not in ENDED:
        end(request.store, run, "FAILED", "FlowCanceled", "The Flow Instance was canceled by the user", details={})
    return 202, public(run)


def _resume_run(request: Request) -> Answer:
    run = _run(request, manage=True)
    if run["status"] == "INACTIVE" and run["_wait"] and run["_wait"]["kind"] == "consent":
        run |= {"status": "ACTIVE", "display_status": "ACTIVE", "_wait": None}
        run["details"] = {"code": "FlowResumed", "description": "The Flow was resumed", "details": {}}
        request.store.put("run", run["run_id"], run)
        log(request.store, run["run_id"], "FlowResumed", "The Flow was resumed", {})
        request.store.ring()
    return 200, public(run)


def _release_run(request: Request) -> Answer:
    run = _run(request, manage=True)
    if run["status"] not in ENDED:
        raise refuse(
            409, "STATE_CONFLICT",
            f"Run {run['run_id']} has status '{run['status']}' but must have status in {set(ENDED)} for requested"
            " operation",
        )  # fmt: skip
    request.store.remove("run", run["run_id"])
    return 200, public(run)


def _update_run(request: Request) -> Answer:
    run = _run(request, manage=True)
    names = ("label", "tags", "run_managers", "run_monitors")
    run |= {name: request.body[name] for name in names if name in request.body}
    request.store.put("run", run["run_id"], run)
    return 200, public(run)


# ---------------------------------------------------------------- web inputs


def _web_input(request: Request) -> Document:
    found = request.store.get("web_input", request.parts["input"])
    mine = _principals(request.store, request.caller.identity)
    urns = {*found["roles"]["respondent_urns"], found["creator_urn"]} if found else set()
    if found is None or not mine & urns:
        raise refuse(404, "NOT_FOUND", f"No web input exists with id value {request.parts['input']}")
    respondent = mine & set(found["roles"]["respondent_urns"])
    return found | {"user_roles": ["viewer", "respondent"] if respondent else ["viewer"]}


def _get_web_input(request: Request) -> Answer:
    found = _web_input(request)
    return 200, {key: value for key, value in found.items() if not key.startswith("_")}


def _list_web_inputs(request: Request) -> Answer:
    wanted = {one.lower() for one in _several(request, "filter_states")}
    names = ("id", "status", "input_type", "flow", "run", "created_timestamp", "edited_timestamp", "closed_timestamp")
    mine = _principals(request.store, request.caller.identity)
    rows = [
        {name: one[name] for name in names} | {"title": one["context"].get("title"),
                                               "user_roles": ["viewer", "respondent"]}
        for one in request.store.all("web_input")
        if mine & set(one["roles"]["respondent_urns"]) and (not wanted or one["status"] in wanted)
    ]  # fmt: skip
    shown, _, marker = page(rows, request, 20)
    return 200, {"web_input_summaries": shown, "marker": marker}


def _respond(request: Request) -> Answer:
    found = _web_input(request)
    if "respondent" not in found["user_roles"]:
        raise refuse(403, "FORBIDDEN", "You may not respond to this web input")
    if found["status"] != "open":
        raise refuse(409, "STATE_CONFLICT", "The web input is closed")
    value = (request.body.get("response") or {}).get("value")
    option = next((one for one in found["options"] if one["option_id"] == value), None)
    if option is None:
        raise refuse(422, "UNPROCESSABLE_ENTITY", f"{value!r} is not one of the options")
    kept = found | {"status": "closed", "closed_timestamp": request.store.stamp(), "_response": option}
    kept.pop("user_roles")
    request.store.put("web_input", kept["id"], kept)
    request.store.ring()
    return 200, {"status": "ok"}


def known(store: Store, flow_id: Any) -> Document | None:
    return store.get("flow", flow_id) if is_uuid(flow_id) else None


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("GET", "/flows", _list_flows),
        ("POST", "/flows", _create_flow),
        ("POST", "/flows/validate", _validate_flow),
        ("GET", "/flows/{flow}", _get_flow),
        ("PUT", "/flows/{flow}", _update_flow),
        ("DELETE", "/flows/{flow}", _delete_flow),
        ("POST", "/flows/{flow}/run", _run_flow),
        ("POST", "/flows/{flow}/validate_run", _validate_run),
        ("GET", "/runs", _list_runs),
        ("GET", "/runs/{run}", _get_run),
        ("PUT", "/runs/{run}", _update_run),
        ("GET", "/runs/{run}/log", _run_log),
        ("GET", "/runs/{run}/definition", _run_definition),
        ("POST", "/runs/{run}/cancel", _cancel_run),
        ("POST", "/runs/{run}/resume", _resume_run),
        ("POST", "/runs/{run}/release", _release_run),
        ("GET", "/web_inputs", _list_web_inputs),
        ("GET", "/web_inputs/{input}", _get_web_input),
        ("POST", "/web_inputs/{input}/respond", _respond),
    ]
    return [route("flows", method, path, handler) for method, path, handler in table]
