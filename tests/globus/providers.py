"""The action providers that runs can call, acted out on this service's own Transfer, Search and Flows.

An action is begun once, in the transaction that notes it, and looked at until it ends.
A provider that nobody wrote can be ordered by the control plane.
"""

from __future__ import annotations

import fnmatch
import importlib
import traceback
from typing import Any

from . import collection as collections
from . import flows, search, transfer
from .answer import Caller, Refusal, Request
from .state import Document, Store, new_id

_TRANSFER = "https://transfer.actions.globus.org/"
_SEARCH = "https://actions.globus.org/search/ingest"
_COMPUTE = "https://compute.actions.globus.org/v3"
_NOTIFY = "https://actions.globus.org/notification/notify"
_HELLO = "https://actions.globus.org/hello_world"
_FLOW = "https://flows.globus.org/flows/"
_RETIRED = ("https://actions.globus.org/transfer/", "https://actions.automate.globus.org/transfer/")


class Unable(Exception):
    """The provider refused the action; it never began."""


def begin(store: Store, url: str, who: Caller, body: Document) -> Document:
    """Start an action and return its state: `status`, `details` and, while it is ACTIVE, what to look at.

    Raises Unable, and Refusal with ConsentRequired when the person must agree to something first.
    """
    url = url.rstrip("/")
    if ordered := _ordered(store, url):
        if ordered["error"]:
            raise Unable(ordered["error"])
        return _timed(store, ordered["seconds"], ordered["status"], ordered["details"])
    if url.startswith(_RETIRED):
        raise Unable(f"the action provider {url} was retired")
    try:
        return _begin(store, url, who, body)
    except Refusal as refusal:
        if isinstance(refusal.body, dict) and refusal.body.get("code") == "ConsentRequired":
            raise
        raise Unable(str(refusal.body)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise Unable(f"the input does not fit: {type(error).__name__}: {error}") from None


def _begin(store: Store, url: str, who: Caller, body: Document) -> Document:
    if url.startswith(_TRANSFER):
        return _transfer(store, url.removeprefix(_TRANSFER), who, body)
    if url.startswith(_FLOW):
        return _flow(store, url.removeprefix(_FLOW), who, body)
    match url:
        case x if x == _SEARCH:
            return _ingest(store, who, body)
        case x if x == _COMPUTE:
            return _compute(store, body)
        case x if x == _NOTIFY:
            store.append("notifications", body | {"time": store.stamp()})
            return _done({"message_id": new_id()})
        case x if x == _HELLO:
            details = {"Hello": "World", "hello": body.get("echo_string")}
            return _timed(store, float(body.get("sleep_time", 0)), "SUCCEEDED", details)
    raise Unable(f"there is no action provider at {url}")


def look(store: Store, action: Document) -> Document:
    """Return the action as it stands now."""
    match action["watch"]:
        case {"task": task_id}:
            task = store.get("task", task_id) or {"status": "FAILED"}
            status = task["status"] if task["status"] in ("SUCCEEDED", "FAILED") else "ACTIVE"
            return action | {"status": status, "details": transfer.public(store, task)}
        case {"ingest": task_id}:
            search.settle(store)
            task = store.get("ingest", task_id) or {"state": "FAILED"}
            status = {"SUCCESS": "SUCCEEDED", "FAILED": "FAILED"}.get(task["state"], "ACTIVE")
            return action | {"status": status, "details": {k: v for k, v in task.items() if not k.startswith("_")}}
        case {"run": run_id}:
            run = store.get("run", run_id) or {"status": "FAILED", "details": {}}
            status = run["status"] if run["status"] in flows.ENDED else "ACTIVE"
            return action | {"status": status, "details": run["details"]}
        case {"until": until, "status": status, "details": details}:
            return action | ({"status": status, "details": details} if store.now() >= until else {})
    return action


def _action(status: str, details: Any, watch: Document | None = None) -> Document:
    return {"action_id": new_id(), "status": status, "details": details, "watch": watch}


def _done(details: Any, status: str = "SUCCEEDED") -> Document:
    return _action(status, details)


def _timed(store: Store, seconds: float, status: str, details: Any) -> Document:
    if seconds <= 0:
        return _done(details, status)
    return _action("ACTIVE", {}, {"until": store.now() + seconds, "status": status, "details": details})


def _ordered(store: Store, url: str) -> Document | None:
    for one in store.all("provider"):
        if one["times"] != 0 and fnmatch.fnmatchcase(url, one["url"].rstrip("/")):
            if one["times"] is not None:
                store.put("provider", one["id"], one | {"times": one["times"] - 1})
            return one
    return None


# ------------------------------------------------------------------ Transfer


def _transfer(store: Store, name: str, who: Caller, body: Document) -> Document:
    match name:
        case "transfer" | "delete":
            document = body | ({"DATA_TYPE": "delete"} if name == "delete" else {})
            task_id = transfer.submit_for(store, who, document)
            return _action("ACTIVE", {"task_id": task_id}, {"task": task_id})
        case "stat":
            return _stat(store, who, body)
        case "ls":
            query = {key: [str(body[key])] for key in ("path", "filter", "limit", "offset") if key in body}
            return _done(collections.ls(_operation(store, who, "ls", body, query=query))[1])
        case "mkdir":
            return _done(collections.mkdir(_operation(store, who, "mkdir", body))[1])
        case "collection_info":
            return _done(collections.get_endpoint(_operation(store, who, "", body))[1])
        case "manage_permission":
            return _permission(store, who, body)
    raise Unable(f"there is no action provider at {_TRANSFER}{name}")


def _operation(store: Store, who: Caller, name: str, body: Document, **more: Any) -> Request:
    parts = {"collection": body["endpoint_id"]}
    path = f"/v0.10/operation/endpoint/{body['endpoint_id']}/{name}"
    return Request(store, "POST", path, parts, body=body, caller=who, **more)


def _stat(store: Store, who: Caller, body: Document) -> Document:
    """A path that is missing is an answer and no failure: that is how flows wait for a file."""
    try:
        return _done(collections.stat_path(_operation(store, who, "stat", body, query={"path": [body["path"]]}))[1])
    except Refusal as refusal:
        if refusal.status == 404 and refusal.body["code"] != "EndpointNotFound":
            return _done(refusal.body | {"code": "NotFound"})
        raise


def _permission(store: Store, who: Caller, body: Document) -> Document:
    request = _operation(store, who, "access", body)
    rule = {"collection": body["endpoint_id"], "rule": body.get("rule_id", "")}
    match body.get("operation"):
        case "CREATE":
            return _done(collections.access_create(request)[1])
        case "UPDATE":
            return _done(collections.access_update(Request(store, "PUT", request.path, rule, body=body, caller=who))[1])
        case "DELETE":
            return _done(collections.access_delete(Request(store, "DELETE", request.path, rule, caller=who))[1])
    raise Unable(f"no operation {body.get('operation')!r}")


# ---------------------------------------------------- Search, Compute, Flows


def _ingest(store: Store, who: Caller, body: Document) -> Document:
    entry = {key: body[key] for key in ("subject", "visible_to", "content", "id") if key in body}
    document = {"ingest_type": "GMetaEntry", "ingest_data": entry}
    task = search.ingest_for(store, body["search_index"], who.identity, document)
    return _action("ACTIVE", {"task_id": task["task_id"]}, {"ingest": task["task_id"]})


def _compute(store: Store, body: Document) -> Document:
    """Answer with what was ordered for each function; the longest one decides how long the action takes."""
    results: list[Document] = []
    longest_s = 0.0
    failed = False
    for task in body["tasks"]:
        function = store.get("function", task["function_id"])
        if function is None:
            raise Unable(f"there is no function {task['function_id']}")
        longest_s = max(longest_s, function.get("seconds", 0.0))
        result = {"task_id": new_id(), "status": "success"}
        error = function.get("error")
        if not error:
            try:
                result["output"] = _output(function, task)
            except Exception:  # noqa: BLE001  what is called is a test's own
                error = traceback.format_exc()
        if error:
            failed = True
            result |= {"status": "failed", "exception": error}
        results.append(result)
    details = {"results": results, "result": [one.get("output") for one in results]}
    return _timed(store, longest_s, "FAILED" if failed else "SUCCEEDED", details)


def _output(function: Document, task: Document) -> Any:
    if "callable" not in function:
        return function.get("output")
    module, _, name = function["callable"].partition(":")
    called = getattr(importlib.import_module(module), name)
    return called(*task.get("args", []), **task.get("kwargs", {}))


def _flow(store: Store, flow_id: str, who: Caller, body: Document) -> Document:
    flow = flows.known(store, flow_id)
    if flow is None:
        raise Unable(f"there is no flow {flow_id}")
    run = flows.start(store, flow, who, {"body": body})
    return _action("ACTIVE", {"run_id": run["run_id"]}, {"run": run["run_id"]})
