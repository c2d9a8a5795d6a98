"""Globus Compute: endpoints, functions, tasks and their groups; functions are executed, by a thread that settles tasks.

Arguments and results are in the forms of globus-compute-sdk 4.19, read and written here by code of its own. Whether
a task group of the client's choice is taken is a setting: the SDK's documentation says that it must exist.
"""

from __future__ import annotations

import base64
import json
import pickle
import traceback
from typing import Any

from . import providers
from .answer import Answer, Refusal, Request, Route, is_uuid, route
from .state import Document, Store, iso, new_id


def make_endpoint(store: Store, key: str, **fields: Any) -> Document:
    """Let there be an endpoint: `online`, `denied` (nobody may submit), `display_name`."""
    before = store.get("endpoint", key) or {"uuid": key, "online": True, "denied": False, "display_name": "Cluster"}
    endpoint = before | {name: value for name, value in fields.items() if value is not None}
    store.put("endpoint", key, endpoint)
    return endpoint


def _refusal(status: int, code: str, reason: str) -> Refusal:
    return Refusal(status, {"status": "Failed", "code": code, "reason": reason, "http_status_code": status})


def _endpoint(request: Request) -> Document:
    found = request.store.get("endpoint", request.parts["endpoint"].lower())
    if found is None:
        key = request.parts["endpoint"]
        raise _refusal(404, "ENDPOINT_NOT_FOUND", f"Endpoint {key} could not be resolved")
    return found


# -------------------------------------------------------------------- submit


def submit(request: Request) -> Answer:
    store, body = request.store, request.body
    endpoint = _endpoint(request)
    if endpoint["denied"]:
        raise _refusal(403, "ENDPOINT_ACCESS_FORBIDDEN", f"Unauthorized access to endpoint {endpoint['uuid']}")
    unknown = body.keys() - {"tasks", "create_queue", "task_group_id", "resource_specification",
                             "user_endpoint_config", "user_runtime", "result_serializers"}  # fmt: skip
    if unknown or not isinstance(body.get("tasks"), dict) or not body["tasks"]:
        raise _refusal(422, "REQUEST_MALFORMED", f"a batch holds tasks, and not {sorted(unknown)}")
    for function in body["tasks"]:
        if store.get("function", function) is None:
            raise _refusal(404, "FUNCTION_NOT_FOUND", f"Function {function} could not be resolved")
        if endpoint.get("functions") is not None and function not in endpoint["functions"]:
            raise _refusal(403, "FUNCTION_NOT_PERMITTED", f"Function {function} not permitted on endpoint")
    group = _group(request, body.get("task_group_id"))
    made: dict[str, list[str]] = {}
    for function, payloads in body["tasks"].items():
        for payload in payloads:
            task = {
                "task_id": new_id(), "status": "received", "_function": function, "_payload": payload,
                "_endpoint": endpoint["uuid"], "_group": group, "_owner": request.caller.identity,
                "_since": store.now(), "_serializers": body.get("result_serializers") or [],
                "_config": body.get("user_endpoint_config"),
            }  # fmt: skip
            store.put("compute_task", task["task_id"], task, group)
            store.put("compute_open", task["task_id"], {"task_id": task["task_id"]})
            made.setdefault(function, []).append(task["task_id"])
    store.ring()
    return 200, {"request_id": new_id(), "task_group_id": group, "endpoint_id": endpoint["uuid"], "tasks": made}


def _group(request: Request, wanted: Any) -> str:
    """Return the group of a submission: the one that is named, or a new one."""
    store, identity = request.store, request.caller.identity
    if wanted is None:
        key = new_id()
    else:
        key = str(wanted)
        found = store.get("task_group", key)
        if found is not None and found["owner"] != identity:
            raise _refusal(403, "TASK_GROUP_ACCESS_FORBIDDEN", f"Unauthorized access to task group {key}")
        if found is None and (store.setting("task_groups") != "any" or not is_uuid(key)):
            raise _refusal(404, "TASK_GROUP_NOT_FOUND", f"Task group {key} could not be resolved")
    store.put("task_group", key, {"id": key, "owner": identity})
    return key


# -------------------------------------------------------------------- look


def task_group(request: Request) -> Answer:
    store, key = request.store, request.parts["group"]
    found = store.get("task_group", key)
    if found is None or found["owner"] != request.caller.identity:
        raise _refusal(404, "TASK_GROUP_NOT_FOUND", f"Task group {key} could not be resolved")
    shown = store.now() - store.setting("task_listed_after_s")
    tasks = [
        {"id": task["task_id"], "created_at": iso(task["_since"])}
        for task in store.all("compute_task", key) if task["_since"] <= shown
    ]  # fmt: skip
    return 200, {"taskgroup_id": key, "create_websockets_queue": False, "tasks": tasks}


def _public(task: Document) -> Document:
    return {key: value for key, value in task.items() if not key.startswith("_")}


def get_task(request: Request) -> Answer:
    task = request.store.get("compute_task", request.parts["task"])
    if task is None or task["_owner"] != request.caller.identity:
        raise _refusal(404, "TASK_NOT_FOUND", f"Task {request.parts['task']} could not be resolved")
    return 200, _public(task)


def batch_status(request: Request) -> Answer:
    found = (request.store.get("compute_task", key) for key in request.body["task_ids"])
    mine = [task for task in found if task is not None and task["_owner"] == request.caller.identity]
    return 200, {"response": "batch", "results": {task["task_id"]: _public(task) for task in mine}}


def get_endpoint(request: Request) -> Answer:
    endpoint = _endpoint(request)
    return 200, {
        "uuid": endpoint["uuid"], "name": endpoint["display_name"].lower(), "display_name": endpoint["display_name"],
        "multi_user": False, "public": False, "endpoint_config": "", "user_config_template": "",
        "user_config_schema": {}, "description": "", "hostname": "cluster", "local_user": "user",
        "ip_address": "127.0.0.1", "endpoint_version": "4.19.0", "sdk_version": "4.19.0", "subscription_uuid": None,
    }  # fmt: skip


def endpoint_status(request: Request) -> Answer:
    endpoint = _endpoint(request)
    details = {"total_workers": 1, "idle_workers": 1, "pending_tasks": 0, "outstanding_tasks": 0, "managers": 1}
    return 200, {"status": "online" if endpoint["online"] else "offline", "details": details}


def allowed_functions(request: Request) -> Answer:
    endpoint = _endpoint(request)
    allowed = endpoint.get("functions")
    return 200, {"endpoint_id": endpoint["uuid"], "restricted": allowed is not None, "functions": allowed or []}


def get_function(request: Request) -> Answer:
    found = request.store.get("function", request.parts["function"])
    if found is None:
        raise _refusal(404, "FUNCTION_NOT_FOUND", f"Function {request.parts['function']} could not be resolved")
    return 200, {
        "function_uuid": found["function_id"], "function_name": found.get("name", "function"), "function_code": "",
        "description": "", "metadata": {"python_version": "3.12.6", "sdk_version": "4.19.0"},
    }  # fmt: skip


# ------------------------------------------------------------------- execute


def settle(store: Store) -> bool:
    """Take every open task as far as it goes now; say whether any is left."""
    left = False
    for row in store.all("compute_open"):
        with store.transaction():
            task = store.get("compute_task", row["task_id"])
            if task is not None and not _go_on(store, task):
                left = True
                continue
            store.remove("compute_open", row["task_id"])
    return left


def _go_on(store: Store, task: Document) -> bool:
    """Take one task further; say whether it has ended."""
    endpoint, function = store.get("endpoint", task["_endpoint"]), store.get("function", task["_function"])
    if endpoint is None or function is None or not endpoint["online"]:
        task["status"] = "waiting-for-ep"
    elif store.now() < task.setdefault("_running", store.now()) + function.get("seconds", 0.0):
        task["status"] = "running"
    else:
        _execute(store, task, function)
    store.put("compute_task", task["task_id"], task)
    return task["status"] in ("success", "failed")


def _execute(store: Store, task: Document, function: Document) -> None:
    task["completion_t"] = str(store.now())
    if lost := function.get("lost"):
        store.put("function", task["_function"], function | {"lost": lost - 1})
        words = "parsl.executors.high_throughput.errors.WorkerLost: Task failure due to loss of worker 0 on host node1"
        task |= {"status": "failed", "exception": f"Traceback (most recent call last):\n{words}\n"}
        return
    try:
        if function.get("error"):
            raise RuntimeError(function["error"])
        args, kwargs = unpack(task["_payload"])
        value = providers._output(function, {"args": args, "kwargs": kwargs})
        result = _result(value, task["_serializers"], store.setting("compute_results"))
    except Exception:  # noqa: BLE001  what is called is a test's own
        task |= {"status": "failed", "exception": traceback.format_exc()}
        return
    task |= {"status": "success", "result": result}


def unpack(payload: str) -> tuple[list[Any], dict[str, Any]]:
    """Read arguments as a worker does. Raises ValueError for what is not in the form."""
    found = []
    while payload:
        length, _, rest = payload.partition("\n")
        part, payload = rest[: int(length)], rest[int(length) :]
        if part[:3] != "11\n":
            raise ValueError(f"DeserializationError: Invalid header: {part[:3]!r} in data payload")
        found.append(json.loads(part[3:]))
    args, kwargs = found
    return args, kwargs


def _result(value: Any, serializers: list[str], how: str) -> str:
    in_json, pickled = f"11\n{json.dumps(value)}", f"00\n{base64.encodebytes(pickle.dumps(value)).decode()}"
    if how == "asked" and any(one.endswith(".JSONData") for one in serializers):
        return in_json
    if how == "pickled":
        return pickled
    return "13\n" + "".join(f"{len(part)}\n{part}" for part in (in_json, pickled))


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("POST", "/v3/endpoints/{endpoint}/submit", submit),
        ("GET", "/v3/endpoints/{endpoint}/allowed_functions", allowed_functions),
        ("GET", "/v2/taskgroup/{group}", task_group),
        ("GET", "/v2/tasks/{task}", get_task),
        ("POST", "/v2/batch_status", batch_status),
        ("GET", "/v2/endpoints/{endpoint}", get_endpoint),
        ("GET", "/v2/endpoints/{endpoint}/status", endpoint_status),
        ("GET", "/v2/functions/{function}", get_function),
    ]
    return [route("compute", method, path, handler) for method, path, handler in table]
