"""Transfer: what the service accepts as a task, what it tells about one, and how it is stopped.

A task is durable before its answer goes out. The bytes are moved in mover.py.
"""

from __future__ import annotations

import json
from typing import Any

from . import collection as collections
from .answer import Answer, Caller, Request, Route, is_uuid, route
from .state import Document, Store, instant, iso, new_id

_ITEM_KEYS = {
    "DATA_TYPE", "source_path", "destination_path", "recursive", "external_checksum", "checksum_algorithm",
}  # fmt: skip
_ALGORITHMS = {"MD5", "SHA1", "SHA256", "SHA512"}
_BOOLEANS = (
    "verify_checksum", "preserve_timestamp", "encrypt_data", "skip_source_errors", "fail_on_quota_errors",
    "delete_destination_extra", "notify_on_succeeded", "notify_on_failed", "notify_on_inactive",
)  # fmt: skip
OPEN = ("ACTIVE", "INACTIVE")
EVENTS_MAX = 1000  # a page of events, and as many are kept of one task


# ------------------------------------------------------------- submission ids


def submission_id(request: Request) -> Answer:
    value = new_id()
    document = {"value": value, "task_id": None, "time": request.store.now()}
    request.store.put("submission", value, document, request.caller.identity)
    return 200, {"value": value}


def _submission(request: Request, value: Any) -> Document:
    """Return the record of a submission id; refuse one that the service would not know."""
    store = request.store
    if not is_uuid(value):
        raise collections.refuse(request, 400, "BadRequest", "Missing or invalid submission_id")
    known = store.get("submission", value)
    memory_s = store.setting("submission_id_memory_s")
    if known is not None and memory_s and store.now() - known["time"] > memory_s:
        known = None
    if known is None and store.setting("submission_ids") == "issued":
        raise collections.refuse(request, 400, "BadRequest", f"Unknown submission_id '{value}'")
    return known or {"value": value, "task_id": None, "time": store.now()}


# ----------------------------------------------------------------- validation


def _bad(request: Request, message: str, code: str = "BadRequest") -> Exception:
    return collections.refuse(request, 400, code, message)


def _check_document(request: Request, body: Any, kind: str) -> None:
    if not isinstance(body, dict):
        raise _bad(request, "The body must be a JSON object")
    if body.get("DATA_TYPE", kind) != kind:
        raise _bad(request, f"DATA_TYPE must be '{kind}'")
    largest = request.store.setting("submission_max_bytes")
    if largest and request.size_bytes > largest:
        raise collections.refuse(request, 413, "RequestTooLarge", f"The document exceeds {largest} bytes")
    _check_label(request, body.get("label"))
    for name in _BOOLEANS:
        if not isinstance(body.get(name, False), bool):
            raise _bad(request, f"{name} must be a boolean")
    level = body.get("sync_level")
    if level is not None and (isinstance(level, bool) or level not in (0, 1, 2, 3)):
        raise _bad(request, "sync_level must be 0, 1, 2, 3 or null")
    _deadline(request, body.get("deadline"))


def _check_label(request: Request, label: Any) -> None:
    if label is None:
        return
    longest = request.store.setting("label_max")
    if not isinstance(label, str) or not label:
        raise _bad(request, "label must be a non-empty string or null")
    if len(label) > longest:
        raise _bad(request, f"label must not exceed {longest} characters")
    if label != label.strip() or "\n" in label or "\r" in label:
        raise _bad(request, "label must not begin or end with blanks or contain line ends")


def _deadline(request: Request, text: Any) -> float:
    if text is None:
        return float(request.store.now() + request.store.setting("deadline_s"))
    try:
        return instant(text)
    except (ValueError, AttributeError):
        raise _bad(request, f"Invalid deadline '{text}'") from None


def _check_items(request: Request, items: Any) -> None:
    if not isinstance(items, list) or not items:
        message = "A transfer requires at least one item"
        raise _bad(request, message, "ClientError.BadRequest.NoTransferItems")
    for number, item in enumerate(items):
        if not isinstance(item, dict) or item.get("DATA_TYPE", "transfer_item") != "transfer_item":
            raise _bad(request, f"DATA[{number}] is not a transfer_item")
        if unknown := item.keys() - _ITEM_KEYS:
            raise _bad(request, f"DATA[{number}] has unknown fields {sorted(unknown)}")
        for key in ("source_path", "destination_path"):
            if not _absolute(item.get(key)):
                raise _bad(request, f"DATA[{number}].{key} must be an absolute path")
        if not isinstance(item.get("recursive", False), bool | None):
            raise _bad(request, f"DATA[{number}].recursive must be a boolean")
        if item.get("recursive") and item.get("external_checksum"):
            raise _bad(request, f"DATA[{number}]: an external checksum is for files only")
        if item.get("checksum_algorithm") is not None and item["checksum_algorithm"].upper() not in _ALGORITHMS:
            raise _bad(request, f"DATA[{number}]: unknown checksum_algorithm")


def _absolute(path: Any) -> bool:
    return isinstance(path, str) and path.startswith(("/", "~/")) and "\0" not in path


def _collection(request: Request, body: Document, key: str) -> Document:
    value = body.get(key)
    if not is_uuid(value):
        raise _bad(request, f"{key} must be a UUID")
    found = collections.find(request.store, value)
    if found is None:
        raise collections.refuse(request, 404, "EndpointNotFound", f"No such endpoint '{value}'")
    return found


def _allowed(request: Request, found: Document, need: str) -> None:
    if not collections.may(request.store, found, request.caller.identity, None, need):
        name = found["document"]["display_name"]
        raise collections.refuse(request, 403, "PermissionDenied", f"You have no access to '{name}'")
    policy = found["document"]["associated_flow_policy"]
    if policy:
        raise collections.refuse(request, 403, "PermissionDenied", "This collection takes transfers of its flow only")


def _pair(collection_id: str, path: str) -> str:
    return f"{collection_id}:{path}"


def _check_conflict(request: Request, source: Document, destination: Document, items: list[Document]) -> None:
    """Refuse paths that a task of anybody has under way."""
    rule = request.store.setting("conflict")
    if rule == "off":
        return
    found: list[set[str]] = []
    for item in items:
        rows = request.store.sql(
            "SELECT items.task_id FROM items JOIN open_tasks USING (task_id) WHERE source = ? AND destination = ?",
            _pair(source["id"], item["source_path"]), _pair(destination["id"], item["destination_path"]),
        )  # fmt: skip
        found.append({row[0] for row in rows})
        if rule == "any" and rows:
            break
    equal = any(found) if rule == "any" else bool(set.intersection(*found))
    if equal:
        message = "A transfer with identical paths has not yet completed"
        raise collections.refuse(request, 409, "Conflict", message)


def _check_pending(request: Request, identity: str) -> None:
    pending = request.store.sql(
        "SELECT count(*) FROM open_tasks JOIN docs ON docs.kind = 'task' AND docs.id = task_id WHERE owner = ?",
        identity,
    )[0][0]
    if pending >= request.store.setting("pending_max"):
        raise collections.refuse(request, 409, "TooManyPendingJobs", f"You have {pending} tasks that are not complete")


# ----------------------------------------------------------------- submission


def submit_transfer(request: Request) -> Answer:
    return _submit(request, "transfer")


def submit_delete(request: Request) -> Answer:
    return _submit(request, "delete")


def _submit(request: Request, kind: str) -> Answer:
    store, body, who = request.store, request.body, request.caller
    _check_document(request, body, kind)
    submission = _submission(request, body.get("submission_id"))
    kind_of_answer = f"{kind}_result"
    if submission["task_id"] is not None:
        message = "This submission was already accepted"
        done = collections.result(request, "Duplicate", message, kind_of_answer)
        link = _link(submission["task_id"])
        more = {"submission_id": submission["value"], "task_id": submission["task_id"], "task_link": link}
        return store.setting("duplicate_status"), done | more
    _check_pending(request, who.identity)
    task = _make_transfer(request, body) if kind == "transfer" else _make_delete(request, body)
    store.put("submission", submission["value"], submission | {"task_id": task["task_id"]}, who.identity)
    _record(store, task)
    message = f"The {kind} has been accepted and a task has been created and queued for execution"
    done = collections.result(request, "Accepted", message, kind_of_answer)
    more = {"submission_id": submission["value"], "task_id": task["task_id"], "task_link": _link(task["task_id"])}
    return 200, done | more


def _link(task_id: str) -> Document:
    return {"DATA_TYPE": "link", "rel": "related", "resource": "task", "title": "related task",
            "href": f"/v0.10/task/{task_id}?format=json"}  # fmt: skip


def submit_for(store: Store, who: Caller, body: Document) -> str:
    """Submit on behalf of a flow or a timer, and return the task id; raises Refusal as the route would."""
    kind = "delete" if body.get("DATA_TYPE") == "delete" else "transfer"
    value = new_id()
    store.put("submission", value, {"value": value, "task_id": None, "time": store.now()}, who.identity)
    body = {key: one for key, one in body.items() if one is not None} | {"submission_id": value, "DATA_TYPE": kind}
    request = Request(store, "POST", f"/v0.10/{kind}", body=body, caller=who)
    return str(_submit(request, kind)[1]["task_id"])


def _make_transfer(request: Request, body: Document) -> Document:
    _check_items(request, body.get("DATA"))
    source, destination = (_collection(request, body, key) for key in ("source_endpoint", "destination_endpoint"))
    _allowed(request, source, "r")
    _allowed(request, destination, "rw")
    collections.require_consent(request.store, request.caller, [source, destination], request)
    _check_conflict(request, source, destination, body["DATA"])
    task = _task(request, body, "TRANSFER", source, destination)
    items = [
        {"source_path": item["source_path"], "destination_path": item["destination_path"],
         "recursive": bool(item.get("recursive")), "external_checksum": item.get("external_checksum"),
         "checksum_algorithm": item.get("checksum_algorithm")}
        for item in body["DATA"]
    ]  # fmt: skip
    _add_items(request.store, task["task_id"], source["id"], destination["id"], items)
    return task


def _make_delete(request: Request, body: Document) -> Document:
    items = body.get("DATA")
    if not isinstance(items, list) or not items:
        raise _bad(request, "A delete requires at least one item", "ClientError.BadRequest.NoTransferItems")
    if not all(isinstance(item, dict) and _absolute(item.get("path")) for item in items):
        raise _bad(request, "Every item needs an absolute path")
    found = _collection(request, body, "endpoint")
    _allowed(request, found, "rw")
    collections.require_consent(request.store, request.caller, [found], request)
    task = _task(request, body, "DELETE", found, None)
    task["_recursive"] = bool(body.get("recursive"))
    task["_ignore_missing"] = bool(body.get("ignore_missing"))
    rows = [
        {"source_path": item["path"], "destination_path": None, "recursive": task["_recursive"]} for item in items
    ]  # fmt: skip
    _add_items(request.store, task["task_id"], found["id"], "", rows)
    return task


def _add_items(store: Store, task_id: str, source_id: str, destination_id: str, items: list[Document]) -> None:
    store.sql_many(
        "INSERT INTO items (task_id, number, source, destination, state, doc) VALUES (?, ?, ?, ?, 'pending', ?)",
        [
            (task_id, number, _pair(source_id, item["source_path"]),
             _pair(destination_id, item["destination_path"] or ""), json.dumps(item))
            for number, item in enumerate(items)
        ],
    )  # fmt: skip


def _task(request: Request, body: Document, kind: str, source: Document, destination: Document | None) -> Document:
    store, who = request.store, request.caller
    now = store.now()
    other = destination["document"] if destination else None
    return {
        "DATA_TYPE": "task", "task_id": new_id(), "type": kind, "status": "ACTIVE", "label": body.get("label"),
        "owner_id": who.identity, "username": f"u_{who.identity[:8]}", "command": "API 0.10",
        "request_time": iso(now), "completion_time": None, "deadline": iso(_deadline(request, body.get("deadline"))),
        "source_endpoint": source["document"]["display_name"], "source_endpoint_id": source["id"],
        "source_endpoint_display_name": source["document"]["display_name"],
        "destination_endpoint": other["display_name"] if other else None,
        "destination_endpoint_id": other["id"] if other else None,
        "destination_endpoint_display_name": other["display_name"] if other else None,
        "sync_level": body.get("sync_level"),
        "verify_checksum": body.get("verify_checksum", False) and not any(
            one["document"]["disable_verify"] for one in (source, destination) if one
        ),
        "encrypt_data": body.get("encrypt_data", False), "preserve_timestamp": body.get("preserve_timestamp", False),
        "skip_source_errors": body.get("skip_source_errors", False),
        "fail_on_quota_errors": body.get("fail_on_quota_errors", False),
        "delete_destination_extra": body.get("delete_destination_extra", False),
        "recursive_symlinks": "ignore", "filter_rules": body.get("filter_rules"),
        "files": 0, "directories": 0, "symlinks": 0, "files_skipped": 0, "files_transferred": 0,
        "bytes_transferred": 0, "bytes_checksummed": 0, "effective_bytes_per_second": 0, "faults": 0,
        "subtasks_total": 0, "subtasks_pending": 0, "subtasks_retrying": 0, "subtasks_succeeded": 0,
        "subtasks_expired": 0, "subtasks_canceled": 0, "subtasks_failed": 0, "subtasks_skipped_errors": 0,
        "fatal_error": None, "is_ok": True, "is_paused": False, "nice_status": "Queued",
        "nice_status_short_description": "queued", "nice_status_details": None, "nice_status_expires_in": None,
        "history_deleted": False, "canceled_by_admin": None, "canceled_by_admin_message": None,
        "_client": who.client, "_request": now, "_started": None, "_pause": None, "_events": 0,
    }  # fmt: skip


def _record(store: Store, task: Document) -> None:
    count_items(store, task)
    store.put("task", task["task_id"], task, task["owner_id"])
    seq = store.sql("SELECT seq FROM docs WHERE kind = 'task' AND id = ?", task["task_id"])[0][0]
    store.sql("INSERT INTO open_tasks VALUES (?, ?)", task["task_id"], seq)
    store.ring()


def count_items(store: Store, task: Document) -> None:
    """Bring the counters of a task in line with its items; every file counts for two subtasks."""
    rows = store.sql("SELECT state, count(*) FROM items WHERE task_id = ? GROUP BY state", task["task_id"])
    counts = dict(rows)
    task["files"] = sum(count for state, count in rows if state not in ("listed", "directory"))
    task["directories"] = counts.get("listed", 0) + counts.get("directory", 0)
    task["files_transferred"] = counts.get("done", 0)
    task["files_skipped"] = counts.get("same", 0)
    task["subtasks_total"] = 2 * task["files"]
    task["subtasks_retrying"] = counts.get("retrying", 0)
    task["subtasks_skipped_errors"] = counts.get("skipped", 0)
    task["subtasks_succeeded"] = 2 * (counts.get("done", 0) + counts.get("same", 0)) + counts.get("skipped", 0)
    open_count = 2 * counts.get("pending", 0) + counts.get("retrying", 0)
    task["subtasks_pending"] = open_count
    if task["status"] == "FAILED":
        ending = {"CANCELED": "subtasks_canceled", "EXPIRED": "subtasks_expired"}
        code = (task["fatal_error"] or {}).get("code", "")
        task[ending.get(code, "subtasks_failed")] = open_count + task["subtasks_retrying"]
        task["subtasks_pending"] = task["subtasks_retrying"] = 0


def event(store: Store, task: Document, code: str, description: str, details: Any, *, error: bool = False) -> None:
    """Note an event; of a task that goes on failing only so many are kept."""
    if task["_events"] >= EVENTS_MAX:
        return
    task["_events"] += 1
    document = {
        "DATA_TYPE": "event", "code": code, "is_error": error, "description": description,
        "details": details if isinstance(details, str) else json.dumps(details), "time": store.stamp(),
    }  # fmt: skip
    store.append(f"events {task['task_id']}", document)


def finish(store: Store, task: Document, status: str, code: str = "", description: str = "") -> None:
    """End a task for good; the counters are settled in the same transaction."""
    task["status"] = status
    task["completion_time"] = store.stamp()
    task["is_ok"] = task["nice_status"] = task["nice_status_short_description"] = None
    task["nice_status_details"] = task["nice_status_expires_in"] = None
    task["is_paused"] = False
    if status == "FAILED":
        task["fatal_error"] = {"code": code, "description": description}
        event(store, task, code, description, "", error=code not in ("CANCELED",))
    else:
        event(store, task, "SUCCEEDED", "succeeded", {"files_succeeded": task["files_transferred"]})
    count_items(store, task)
    elapsed_s = max(store.now() - (task["_started"] or task["_request"]), 0.001)
    task["effective_bytes_per_second"] = int(task["bytes_transferred"] / elapsed_s)
    store.put("task", task["task_id"], task)
    store.sql("DELETE FROM open_tasks WHERE task_id = ?", task["task_id"])


# -------------------------------------------------------------- about a task


def public(store: Store, task: Document) -> Document:
    document = {key: value for key, value in task.items() if not key.startswith("_")}
    document["history_deleted"] = _forgotten(store, task)
    return document


def _forgotten(store: Store, task: Document) -> bool:
    done = task["completion_time"]
    return done is not None and store.now() - instant(done) > store.setting("history_s")


def _task_of(request: Request) -> Document:
    task = request.store.get("task", request.parts["task"].lower())
    if task is None or task["owner_id"] != request.caller.identity:
        message = f"Task ID {request.parts['task']} was not found"
        raise collections.refuse(request, 404, "ClientError.NotFound", message)
    return task


def _fields(request: Request, document: Document) -> Document:
    names = set(filter(None, request.one("fields").split(",")))
    return {key: value for key, value in document.items() if key in names} if names else document


def get_task(request: Request) -> Answer:
    return 200, _fields(request, public(request.store, _task_of(request)))


def update_task(request: Request) -> Answer:
    task, body = _task_of(request), request.body
    if unknown := body.keys() - {"DATA_TYPE", "label", "deadline"}:
        raise _bad(request, f"These fields cannot be changed: {sorted(unknown)}")
    if task["status"] not in OPEN and "deadline" in body:
        raise collections.refuse(request, 409, "Conflict", "The task is complete")
    _check_label(request, body.get("label"))
    if "label" in body:
        task["label"] = body["label"]
    if "deadline" in body:
        task["deadline"] = iso(_deadline(request, body["deadline"]))
    request.store.put("task", task["task_id"], task)
    request.store.ring()
    return 200, collections.result(request, "Updated", "The task has been updated successfully.")


def cancel_task(request: Request) -> Answer:
    task = _task_of(request)
    if task["status"] not in OPEN:
        message = "The task completed before the cancel request was processed."
        return 200, collections.result(request, "TaskComplete", message)
    finish(request.store, task, "FAILED", "CANCELED", "canceled")
    request.store.ring()
    return 200, collections.result(request, "Canceled", "The task has been cancelled successfully.")


def task_list(request: Request) -> Answer:
    tasks = [public(request.store, task) for task in request.store.all("task", request.caller.identity)]
    for text in request.query.get("filter", []):
        tasks = _filtered(request, tasks, text)
    order = request.one("orderby") or "request_time DESC"
    for clause in reversed(order.split(",")):
        key, _, way = clause.strip().partition(" ")
        tasks.sort(key=lambda task, key=key: str(task.get(key) or ""), reverse=way.upper() == "DESC")
    offset, limit = request.number("offset", 0), min(request.number("limit", 10), 1000)
    rows = [_fields(request, task) for task in tasks[offset : offset + limit]]
    return 200, {"DATA_TYPE": "task_list", "length": len(rows), "limit": limit, "offset": offset,
                 "total": len(tasks), "DATA": rows}  # fmt: skip


def _filtered(request: Request, tasks: list[Document], text: str) -> list[Document]:
    for clause in filter(None, text.split("/")):
        key, _, value = clause.partition(":")
        match key:
            case "request_time" | "completion_time":
                begin, end = _between(request, value)
                tasks = [task for task in tasks if task[key] and begin <= instant(task[key]) <= end]
            case "task_id" | "status" | "type" | "label" | "username" | "is_paused":
                values = value.split(",")
                tasks = [
                    task for task in tasks
                    if any(collections.matches(_text(task[key]), one) for one in values)
                ]  # fmt: skip
            case _:
                raise _bad(request, f"Unknown filter '{key}'")
    return tasks


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _between(request: Request, text: str) -> tuple[float, float]:
    begin, _, end = text.partition(",")
    try:
        return (instant(begin) if begin else 0.0), (instant(end) if end else float("inf"))
    except ValueError:
        raise _bad(request, f"Invalid time range '{text}'") from None


def event_list(request: Request) -> Answer:
    task = _task_of(request)
    events = request.store.lines(f"events {task['task_id']}")[::-1]
    if request.one("filter").replace("=", ":") == "is_error:1":
        events = [one for one in events if one["is_error"]]
    offset, limit = request.number("offset", 0), min(request.number("limit", 10), EVENTS_MAX)
    rows = events[offset : offset + limit]
    return 200, {"DATA_TYPE": "event_list", "length": len(rows), "limit": limit, "offset": offset,
                 "total": len(events), "DATA": rows}  # fmt: skip


def successful_transfers(request: Request) -> Answer:
    task = _task_of(request)
    if task["type"] != "TRANSFER" or task["status"] != "SUCCEEDED":
        message = "Successful transfers are listed for transfer tasks that have succeeded"
        raise collections.refuse(request, 400, "BadRequest", message)
    return 200, _by_marker(request, task, "done", "successful_transfers", _successful)


def _successful(item: Document) -> Document:
    return {
        "DATA_TYPE": "successful_transfer", "source_path": item["source_path"],
        "destination_path": item["destination_path"], "size": item.get("size"), "checksum": item.get("checksum"),
        "checksum_algorithm": item.get("algorithm"), "dynamic": False,
    }  # fmt: skip


def skipped_errors(request: Request) -> Answer:
    return 200, _by_marker(request, _task_of(request), "skipped", "skipped_errors", _skipped)


def _skipped(item: Document) -> Document:
    return {
        "DATA_TYPE": "skipped_error", "error_code": item.get("error_code"),
        "error_details": item.get("error_details"), "error_time": item.get("error_time"),
        "source_path": item["source_path"], "destination_path": item["destination_path"],
        "is_directory": bool(item.get("recursive")), "is_symlink": False, "is_delete_destination_extra": False,
        "external_checksum": item.get("external_checksum"), "checksum_algorithm": item.get("checksum_algorithm"),
    }  # fmt: skip


def _by_marker(request: Request, task: Document, state: str, kind: str, show: Any) -> Document:
    marker = request.number("marker", 0)
    size = max(1, min(request.number("limit", 100), 1000))
    rows: list[tuple[Any, ...]] = []
    if not _forgotten(request.store, task):
        rows = request.store.sql(
            "SELECT number, doc FROM items WHERE task_id = ? AND state = ? AND number >= ? ORDER BY number LIMIT ?",
            task["task_id"], state, marker, size + 1,
        )  # fmt: skip
    following = rows[size][0] if len(rows) > size else None
    shown = [show(item) for item in (json.loads(row[1]) for row in rows[:size]) if not item.get("lied")]
    return {"DATA_TYPE": kind, "marker": marker, "next_marker": following, "DATA": shown}


def pause_info(request: Request) -> Answer:
    task = _task_of(request)
    message = task["_pause"]["message"] if task["_pause"] else None
    return 200, {
        "DATA_TYPE": "pause_info_limited", "pause_rules": pausing(request.store, task),
        "source_pause_message": message, "destination_pause_message": None, "source_pause_message_share": None,
        "destination_pause_message_share": None,
    }  # fmt: skip


def pausing(store: Store, task: Document) -> list[Document]:
    """Return the pause rules of both collections that hold a task."""
    rules: list[Document] = []
    for key in ("source_endpoint_id", "destination_endpoint_id"):
        found = collections.find(store, task[key])
        rules += found["pause_rules"] if found else []
    return rules


def routes() -> list[Route]:
    base, one = "/v0.10", "/v0.10/endpoint/{collection}"
    operation = "/v0.10/operation/endpoint/{collection}"
    table: list[tuple[str, str, Any]] = [
        ("GET", f"{base}/submission_id", submission_id),
        ("POST", f"{base}/transfer", submit_transfer),
        ("POST", f"{base}/delete", submit_delete),
        ("GET", f"{base}/task_list", task_list),
        ("GET", f"{base}/task/{{task}}", get_task),
        ("PUT", f"{base}/task/{{task}}", update_task),
        ("POST", f"{base}/task/{{task}}/cancel", cancel_task),
        ("GET", f"{base}/task/{{task}}/event_list", event_list),
        ("GET", f"{base}/task/{{task}}/successful_transfers", successful_transfers),
        ("GET", f"{base}/task/{{task}}/skipped_errors", skipped_errors),
        ("GET", f"{base}/task/{{task}}/pause_info", pause_info),
        ("GET", f"{base}/endpoint_search", collections.endpoint_search),
        ("GET", one, collections.get_endpoint),
        ("PUT", one, collections.update_endpoint),
        ("GET", f"{one}/my_effective_pause_rule_list", collections.pause_rules),
        ("GET", f"{one}/access_list", collections.access_list),
        ("POST", f"{one}/access", collections.access_create),
        ("GET", f"{one}/access/{{rule}}", collections.access_get),
        ("PUT", f"{one}/access/{{rule}}", collections.access_update),
        ("DELETE", f"{one}/access/{{rule}}", collections.access_delete),
        ("GET", f"{operation}/ls", collections.ls),
        ("GET", f"{operation}/stat", collections.stat_path),
        ("POST", f"{operation}/mkdir", collections.mkdir),
        ("POST", f"{operation}/rename", collections.rename),
    ]
    return [route("transfer", method, path, handler) for method, path, handler in table]
