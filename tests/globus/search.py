"""Globus Search: indexes, ingests that take effect in order, and enough of queries to see what was ingested."""

from __future__ import annotations

import json
from typing import Any

from .answer import Answer, Refusal, Request, Route, route
from .state import Document, Store, iso, new_id

_INGEST_MAX_BYTES = 10_000_000
_SUBJECT_MAX_BYTES = 500
_VISIBLE_TO_MAX = 100
_WRITE_SCOPES = {f"urn:globus:auth:scope:search.api.globus.org:{name}" for name in ("ingest", "all")}


def error(status: int, code: str, message: str, **more: Any) -> Refusal:
    body = {"@datatype": "GError", "@version": "2017-09-01", "code": code, "message": message, "status": status,
            "request_id": new_id().replace("-", ""), "error_data": None} | more  # fmt: skip
    return Refusal(status, body)


def make_index(store: Store, name: str, writers: list[str] | None = None, index_id: str | None = None) -> Document:
    """Make an index; without a list of writers everybody may write."""
    index = {
        "@datatype": "GSearchIndex", "@version": "2017-09-01", "id": index_id or new_id(), "display_name": name,
        "description": "", "status": "open", "is_trial": False, "subscription_id": None, "max_size_in_mb": 1000,
        "size_in_mb": 0, "num_subjects": 0, "num_entries": 0, "_writers": writers,
        "creation_date": store.stamp()[:19].replace("T", " "),
    }  # fmt: skip
    store.put("index", index["id"], index)
    return index


def _public(store: Store, index: Document) -> Document:
    entries = store.all("entry", index["id"])
    counts = {"num_entries": len(entries), "num_subjects": len({entry["subject"] for entry in entries})}
    return {key: value for key, value in index.items() if not key.startswith("_")} | counts


def settle(store: Store) -> None:
    """Carry out the ingests whose time has come, each index in the order in which they came."""
    waiting: set[str] = set()
    for task in store.all("ingest", "open"):
        if task["index_id"] in waiting or task["_ready"] > store.now():
            waiting.add(task["index_id"])
            continue
        for entry in task.pop("_entries"):
            entry["id"] = entry.get("id")
            key = json.dumps([task["index_id"], entry["subject"], entry["id"]])
            store.put("entry", key, entry, task["index_id"])
        task |= {"state": "SUCCESS", "state_description": "Task succeeded", "completion_date": store.stamp()[:19]}
        store.remove("ingest", task["task_id"])  # moves it from the open ones to the others
        store.put("ingest", task["task_id"], task, "done")


def ingest_for(store: Store, index_id: str, identity: str, body: Any, *, size_bytes: int = 0) -> Document:
    """Accept an ingest for an identity and return its task. Raises Refusal."""
    index = store.get("index", index_id)
    if index is None:
        raise error(404, "NotFound.NoSuchIndex", f"There is no index {index_id}")
    if index["_writers"] is not None and identity not in index["_writers"]:
        raise error(403, "Forbidden.Generic", "ingest request denied by service")
    if size_bytes > _INGEST_MAX_BYTES:
        raise error(413, "RequestTooLarge", "The request exceeds 10 MB")
    task = {
        "task_id": new_id(), "index_id": index_id, "task_type": "INGEST", "state": "PENDING",
        "state_description": "Task is pending", "creation_date": iso(store.now())[:19], "completion_date": None,
        "message": None, "additional_details": None, "_entries": _entries(body),
        "_ready": store.now() + store.setting("ingest_s"),
    }  # fmt: skip
    store.put("ingest", task["task_id"], task, "open")
    store.ring()
    return task


def _entries(body: Any) -> list[Document]:
    if not isinstance(body, dict):
        raise error(400, "BadRequest.ValidationError", "The body must be an object")
    match body.get("ingest_type"), body.get("ingest_data"):
        case "GMetaEntry", dict() as entry:
            entries: list[Any] = [entry]
        case "GMetaList", {"gmeta": list() as entries}:
            pass
        case _:
            raise error(400, "BadRequest.ValidationError", "ingest_type and ingest_data do not fit together")
    for entry in entries:
        if wrong := _wrong(entry):
            raise error(400, "BadRequest.ValidationError", wrong)
    return entries


def _wrong(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("subject"), str) or not entry["subject"]:
        return "an entry needs a subject"
    if len(entry["subject"].encode()) > _SUBJECT_MAX_BYTES:
        return f"a subject must not exceed {_SUBJECT_MAX_BYTES} bytes"
    visible = entry.get("visible_to")
    if not isinstance(visible, list) or not visible or len(visible) > _VISIBLE_TO_MAX:
        return f"visible_to must be a list of 1 to {_VISIBLE_TO_MAX} principals"
    for one in visible:
        if one not in ("public", "all_authenticated_users") and not str(one).startswith("urn:globus:"):
            return f"not a principal: {one!r}"
    if not isinstance(entry.get("content"), dict):
        return "content must be an object"
    return None


# -------------------------------------------------------------------- routes


def _ingest(request: Request) -> Answer:
    if not _WRITE_SCOPES & set(request.caller.scopes):
        raise error(403, "Forbidden.Generic", "the token does not have the scope for an ingest")
    task = ingest_for(
        request.store, request.parts["index"], request.caller.identity, request.body, size_bytes=request.size_bytes
    )
    return 200, {"acknowledged": True, "task_id": task["task_id"], "success": True, "num_documents_ingested": 0}


def _task(request: Request) -> Answer:
    settle(request.store)
    task = request.store.get("ingest", request.parts["task"])
    if task is None:
        raise error(404, "NotFound.Generic", "There is no such task")
    return 200, {key: value for key, value in task.items() if not key.startswith("_")}


def _index(request: Request) -> Document:
    settle(request.store)
    index = request.store.get("index", request.parts["index"])
    if index is None:
        raise error(404, "NotFound.NoSuchIndex", f"There is no index {request.parts['index']}")
    return index


def _get_index(request: Request) -> Answer:
    return 200, _public(request.store, _index(request))


def _index_list(request: Request) -> Answer:
    settle(request.store)
    indexes = []
    for one in request.store.all("index"):
        writes = one["_writers"] is None or request.caller.identity in one["_writers"]
        indexes.append(_public(request.store, one) | {"permissions": ["owner"] if writes else []})
    return 200, {"index_list": [one for one in indexes if one["permissions"]]}


def _results(entries: list[Document]) -> list[Document]:
    """Group entries by subject, as queries answer."""
    subjects: dict[str, list[Document]] = {}
    for entry in entries:
        shown = {"content": entry["content"], "entry_id": entry["id"], "matched_principal_sets": []}
        subjects.setdefault(entry["subject"], []).append(shown)
    return [
        {"@datatype": "GMetaResult", "@version": "2019-08-27", "subject": subject, "entries": shown}
        for subject, shown in subjects.items()
    ]


def _search(request: Request) -> Answer:
    """Find entries whose subject or content holds every word of the query; `*` finds all."""
    index = _index(request)
    body = request.body if request.method == "POST" else {}
    text = body.get("q") or request.one("q") or "*"
    words = [word for word in text.lower().split() if word != "*"]
    entries = [
        entry for entry in request.store.all("entry", index["id"])
        if all(word.strip('"') in json.dumps([entry["subject"], entry["content"]]).lower() for word in words)
    ]  # fmt: skip
    results = _results(entries)
    offset = int(body.get("offset") or request.number("offset", 0))
    limit = int(body.get("limit") or request.number("limit", 10))
    page = results[offset : offset + limit]
    return 200, {
        "@datatype": "GSearchResult", "@version": "2017-09-01", "count": len(page), "total": len(results),
        "offset": offset, "has_next_page": offset + limit < len(results), "gmeta": page, "facet_results": None,
    }  # fmt: skip


def _of_subject(request: Request) -> list[Document]:
    index = _index(request)
    entries = [one for one in request.store.all("entry", index["id"]) if one["subject"] == request.one("subject")]
    if not entries:
        raise error(404, "NotFound.Generic", "There is no such subject")
    return entries


def _subject(request: Request) -> Answer:
    return 200, _results(_of_subject(request))[0]


def _delete_subject(request: Request) -> Answer:
    entries = _of_subject(request)
    for entry in entries:
        key = json.dumps([request.parts["index"], entry["subject"], entry["id"]])
        request.store.remove("entry", key)
    task = {"task_id": new_id(), "index_id": request.parts["index"], "state": "SUCCESS", "task_type": "DELETE",
            "state_description": "Task succeeded", "creation_date": request.store.stamp()[:19], "message": None,
            "completion_date": request.store.stamp()[:19], "additional_details": None}  # fmt: skip
    request.store.put("ingest", task["task_id"], task, "done")
    return 200, {"task_id": task["task_id"]}



def routes() -> list[Route]:
    one = "/v1/index/{index}"
    table: list[tuple[str, str, Any]] = [
        ("GET", "/v1/index_list", _index_list),
        ("GET", one, _get_index),
        ("POST", f"{one}/ingest", _ingest),
        ("GET", f"{one}/search", _search),
        ("POST", f"{one}/search", _search),
        ("GET", f"{one}/subject", _subject),
        ("DELETE", f"{one}/subject", _delete_subject),
        ("GET", "/v1/task/{task}", _task),
    ]
    return [route("search", method, path, handler) for method, path, handler in table]
