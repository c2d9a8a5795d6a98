"""Move the bytes: one thread that steps every running task a chunk at a time.

A task is a generator that yields how long it may rest. It keeps nothing that matters in
memory: killed at any step it begins again from its items, and a file that has arrived
is not copied twice. A file shows under its own name only once it is whole.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from . import collection as collections
from .collection import PathFault
from .state import Document, Store, instant
from .transfer import OPEN, count_items, event, finish

Steps = Generator[float, None, None]

# Picked out by the database: reading a hundred whole documents at every submission would be most of its cost.
_OPEN_TASKS = """
SELECT task_id, owner, json_extract(doc, '$.type'), json_extract(doc, '$.status'), json_extract(doc, '$.deadline'),
  json_extract(doc, '$._pause.reason'), json_extract(doc, '$.is_paused'),
  json_extract(doc, '$.source_endpoint_id'), json_extract(doc, '$.destination_endpoint_id')
FROM open_tasks JOIN docs ON docs.kind = 'task' AND docs.id = task_id ORDER BY open_tasks.seq
"""

_CHUNK_BYTES = 1 << 20
_SETTLE_S = 0.005  # submissions that come in a burst are looked at together
_REFRESH_S = 0.25  # how late a deadline is noticed when nothing rings
_SOURCE_ERRORS = {"FILE_NOT_FOUND", "PERMISSION_DENIED"}


class Fatal(Exception):
    """What ends the whole task at once."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(code)
        self.code = code
        self.description = description


class Mover(threading.Thread):
    """Runs the first few tasks of every user and kind; the others are queued."""

    def __init__(self, store: Store) -> None:
        super().__init__(name="mover", daemon=True)
        self._store = store
        self._bell = store.bell()
        self._jobs: dict[str, Steps] = {}
        self._due: dict[str, float] = {}
        self._refreshed = 0.0

    def run(self) -> None:
        while True:
            since_s = time.monotonic() - self._refreshed
            if (self._bell.is_set() and since_s > _SETTLE_S) or since_s > _REFRESH_S:
                self._bell.clear()
                self._refresh()
            now = time.monotonic()
            for task_id in [one for one, due in self._due.items() if due <= now]:
                self._step(task_id)
            open_tasks = self._due or self._store.sql("SELECT 1 FROM open_tasks LIMIT 1")
            rest_s = min(self._due.values(), default=now + _REFRESH_S) - time.monotonic()
            if self._bell.is_set():
                time.sleep(max(0.0, min(rest_s, _SETTLE_S)))
            else:
                self._bell.wait(max(0.0, min(rest_s, _REFRESH_S)) if open_tasks else None)

    def _step(self, task_id: str) -> None:
        try:
            self._due[task_id] = time.monotonic() + next(self._jobs[task_id])
        except StopIteration:
            del self._jobs[task_id], self._due[task_id]
            self._bell.set()  # the next one in the queue may begin

    def _refresh(self) -> None:
        """Decide anew which tasks run; end those that are past their deadline."""
        self._refreshed = time.monotonic()
        store = self._store
        with store.transaction():
            running: dict[tuple[str, str], list[str]] = {}
            ruled = {one["id"] for one in store.all("collection") if one["pause_rules"]}
            for task_id, owner, kind, status, deadline, pause, paused, *ends in store.sql(_OPEN_TASKS):
                if store.now() > instant(deadline):
                    self._change(task_id, lambda task: finish(store, task, "FAILED", "EXPIRED", "expired"))
                    continue
                by_rule = not ruled.isdisjoint(ends)
                if (by_rule or pause == "paused") != bool(paused):
                    self._change(task_id, self._flip_pause)
                if pause or by_rule or status != "ACTIVE":
                    continue
                mine = running.setdefault((owner, kind), [])
                if len(mine) < store.setting("running_max"):
                    mine.append(task_id)
        chosen = {task_id for ids in running.values() for task_id in ids}
        for task_id in [one for one in self._jobs if one not in chosen]:
            self._jobs.pop(task_id).close()
            del self._due[task_id]
        for task_id in chosen - self._jobs.keys():
            self._jobs[task_id] = _task_steps(store, task_id)
            self._due[task_id] = 0.0

    def _change(self, task_id: str, change: Callable[[Document], None]) -> None:
        task = _open(self._store, task_id)
        if task is not None:
            change(task)

    def _flip_pause(self, task: Document) -> None:
        paused = not task["is_paused"]
        task["is_paused"] = paused
        task["nice_status"] = "PAUSED" if paused else "OK"
        event(self._store, task, "PAUSED" if paused else "UNPAUSED", "paused" if paused else "unpaused", "")
        self._store.put("task", task["task_id"], task)


# ------------------------------------------------------------------ one task


def _task_steps(store: Store, task_id: str) -> Steps:
    with store.transaction():
        task = _open(store, task_id)
        if task is None or task["_pause"]:
            return
        if task["_started"] is None:
            task["_started"], task["_began"] = store.now(), time.time()
            event(store, task, "STARTED", "started", {"type": task["type"]})
        if task["nice_status"] == "Queued":
            task["nice_status"], task["nice_status_short_description"] = "OK", "ok"
        store.put("task", task_id, task)
    while True:
        item = _next_item(store, task_id)
        if item is None:
            wait_s = _left_s(store, task_id)
            if wait_s is None:
                break
            yield wait_s
            continue
        try:
            task = _open(store, task_id)
            if task is None:
                return
            if task["type"] == "DELETE":
                _delete(store, task, item)
            else:
                yield from _transfer(store, task, item)
        except PathFault as fault:
            _note_fault(store, task_id, item, fault)
        except Fatal as fatal:
            with store.transaction():
                if task := _open(store, task_id):
                    finish(store, task, "FAILED", fatal.code, fatal.description)
            return
        yield 0.0
    yield from _last_rest(store, task_id)
    with store.transaction():
        task = _open(store, task_id)
        if task is not None and not task["_pause"]:  # a paused one ends when it is resumed
            count_items(store, task)
            if task["subtasks_skipped_errors"]:
                details = {"count": task["subtasks_skipped_errors"]}
                event(store, task, "SKIPPED_ERRORS", "skipped errors", details, error=True)
            finish(store, task, "SUCCEEDED")


def _open(store: Store, task_id: str) -> Document | None:
    """Return the task if it may still change: a cancel can come between any two steps."""
    task = store.get("task", task_id)
    return task if task is not None and task["status"] in OPEN else None


def _last_rest(store: Store, task_id: str) -> Steps:
    while True:
        task = store.get("task", task_id)
        if task is None or time.time() - task["_began"] >= store.setting("task_seconds"):
            return
        yield 0.02


def _next_item(store: Store, task_id: str) -> Document | None:
    for state in ("pending", "retrying"):
        rows = store.sql(
            "SELECT number, tries, doc FROM items WHERE task_id = ? AND state = ? AND due <= ?"
            " ORDER BY due, number LIMIT 1", task_id, state, time.time(),
        )  # fmt: skip
        if rows:
            return json.loads(rows[0][2]) | {"number": rows[0][0], "tries": rows[0][1]}
    return None


def _left_s(store: Store, task_id: str) -> float | None:
    """Return how long until the next try, or None if nothing is left to do."""
    rows = store.sql("SELECT min(due) FROM items WHERE task_id = ? AND state IN ('pending', 'retrying')", task_id)
    return None if rows[0][0] is None else max(0.0, rows[0][0] - time.time())


def _settle(store: Store, task_id: str, item: Document, state: str, **facts: Any) -> None:
    """Record how an item ended, unless the task ended first."""
    with store.transaction():
        task = _open(store, task_id)
        if task is None:
            return
        _write_item(store, task_id, item | facts, state, 0.0)
        task["bytes_transferred"] += facts.get("size", 0) if state == "done" and not facts.get("lied") else 0
        task["bytes_checksummed"] += facts.get("size", 0) if facts.get("checksum") else 0
        count_items(store, task)
        if not task["subtasks_retrying"] and not task["_pause"]:
            task["nice_status"], task["nice_status_short_description"], task["is_ok"] = "OK", "ok", True
        store.put("task", task_id, task)


def _write_item(store: Store, task_id: str, item: Document, state: str, due: float) -> None:
    doc = {key: value for key, value in item.items() if key not in ("number", "tries")}
    store.sql(
        "UPDATE items SET state = ?, tries = ?, due = ?, doc = ? WHERE task_id = ? AND number = ?",
        state, item["tries"], due, json.dumps(doc), task_id, item["number"],
    )  # fmt: skip


def _note_fault(store: Store, task_id: str, item: Document, fault: PathFault) -> None:
    """A fault does not end a task: it is noted, and the item is tried again later."""
    pause_s = min(store.setting("retry_s") * 2 ** min(item["tries"], 10), store.setting("retry_max_s"))
    with store.transaction():
        task = _open(store, task_id)
        if task is None:
            return
        _write_item(store, task_id, item | {"tries": item["tries"] + 1}, "retrying", time.time() + pause_s)
        words = fault.code.lower().replace("_", " ")
        task["faults"] += 1
        task["is_ok"], task["nice_status"], task["nice_status_short_description"] = False, fault.code, words
        task["nice_status_details"], task["nice_status_expires_in"] = fault.details, -1
        event(store, task, fault.code, words, fault.details, error=True)
        count_items(store, task)
        store.put("task", task_id, task)


# ------------------------------------------------------------------ one item


def _side(store: Store, task: Document, which: str) -> Document:
    found = collections.find(store, task[f"{which}_endpoint_id"])
    if found is None:
        raise PathFault("ENDPOINT_ERROR", f"the {which} collection is gone")
    return found


def _delete(store: Store, task: Document, item: Document) -> None:
    path = collections.check(store, _side(store, task, "source"), task["owner_id"], item["source_path"], "rw")
    try:
        collections.remove_path(path, recursive=task["_recursive"])
    except OSError as error:
        if not (task["_ignore_missing"] and isinstance(error, FileNotFoundError)):
            raise PathFault(collections.code_of(error), f"Path: {item['source_path']}") from None
    _settle(store, task["task_id"], item, "done")


def _transfer(store: Store, task: Document, item: Document) -> Steps:
    task_id = task["task_id"]
    source_side, destination_side = _side(store, task, "source"), _side(store, task, "destination")
    try:
        source = collections.check(store, source_side, task["owner_id"], item["source_path"], "r")
        if item["recursive"]:
            _list(store, task, item, source)
            return
        size = _source_size(source, item)
    except PathFault as fault:
        if task["skip_source_errors"] and fault.code in _SOURCE_ERRORS:
            facts = {"error_code": fault.code, "error_details": fault.details, "error_time": store.stamp()}
            _settle(store, task_id, item, "skipped", **facts)
            return
        raise
    destination = collections.check(store, destination_side, task["owner_id"], item["destination_path"], "rw")
    if item["destination_path"].endswith("/") or destination.is_dir():
        raise PathFault("IS_A_DIRECTORY", f"Path: {item['destination_path']}")
    if _same(task, source, destination):
        _settle(store, task_id, item, "same")
        return
    if _take(store, destination_side["id"], "lies"):
        _settle(store, task_id, item, "done", lied=True, size=size)
        return
    _check_quota(task, destination_side, size)
    facts = yield from _copy(store, task, item, source, destination)
    _settle(store, task_id, item, "done", **facts)


def _source_size(source: Path, item: Document) -> int:
    try:
        if source.is_dir():
            raise PathFault("IS_A_DIRECTORY", f"Path: {item['source_path']}")
        return source.stat().st_size
    except OSError as error:
        raise PathFault(collections.code_of(error), f"File: {item['source_path']}") from None


def _list(store: Store, task: Document, item: Document, source: Path) -> None:
    """Turn a directory into one item per file; symbolic links are left out, as the service does by default."""
    if not source.exists():
        raise PathFault("FILE_NOT_FOUND", f"Path: {item['source_path']}")
    if not source.is_dir():
        raise PathFault("NOT_A_DIRECTORY", f"Path: {item['source_path']}")
    destination = collections.check(
        store, _side(store, task, "destination"), task["owner_id"], item["destination_path"], "rw"
    )
    rules = task["filter_rules"] or []
    found: list[str] = []
    folders: list[str] = []
    for folder, below, names in os.walk(source):
        relative = os.path.relpath(folder, source)
        below[:] = sorted(name for name in below if _included(name, "dir", rules))
        folders.append(relative)
        found += [
            os.path.normpath(os.path.join(relative, name)) for name in sorted(names)
            if not os.path.islink(os.path.join(folder, name)) and _included(name, "file", rules)
        ]  # fmt: skip
    for relative in folders:
        (destination / relative).mkdir(parents=True, exist_ok=True)
    with store.transaction():
        if _open(store, task["task_id"]) is None:
            return
        start = store.sql("SELECT max(number) FROM items WHERE task_id = ?", task["task_id"])[0][0] + 1
        rows = []
        for number, relative in enumerate(found, start):
            one = {
                "source_path": f"{item['source_path'].rstrip('/')}/{relative}", "recursive": False,
                "destination_path": f"{item['destination_path'].rstrip('/')}/{relative}",
                "external_checksum": None, "checksum_algorithm": None,
            }  # fmt: skip
            pair = [f"{task[f'{side}_endpoint_id']}:{one[f'{side}_path']}" for side in ("source", "destination")]
            rows.append((task["task_id"], number, *pair, json.dumps(one)))
        store.sql_many(
            "INSERT INTO items (task_id, number, source, destination, state, doc) VALUES (?, ?, ?, ?, 'pending', ?)",
            rows,
        )
        _settle(store, task["task_id"], item, "listed")


def _included(name: str, kind: str, rules: list[Document]) -> bool:
    """Judge one name: the first rule that matches decides, and what no rule matches is included."""
    for rule in rules:
        if rule.get("type") in (None, kind) and fnmatch.fnmatchcase(name, rule.get("name", "*")):
            return bool(rule.get("method") != "exclude")
    return True


def _same(task: Document, source: Path, destination: Path) -> bool:
    """Tell whether the sync level of the task finds nothing to do for this file."""
    level = task["sync_level"]
    if level is None or not destination.exists():
        return False
    here, there = source.stat(), destination.stat()
    if level == 0:
        return True
    if here.st_size != there.st_size:
        return False
    if level == 2:
        return here.st_mtime <= there.st_mtime
    return level == 1 or _digest(source, "SHA256") == _digest(destination, "SHA256")


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm.lower()).hexdigest()


def _take(store: Store, collection_id: str, name: str) -> bool:
    """Use up one of the misdeeds that a test has ordered."""
    with store.transaction():
        found = collections.find(store, collection_id)
        if found is None or not found[name]:
            return False
        store.put("collection", collection_id, found | {name: found[name] - 1})
        return True


def _check_quota(task: Document, side: Document, size: int) -> None:
    quota = side["quota_bytes"]
    if quota is None or collections.usage_bytes(side) + size <= quota:
        return
    if task["fail_on_quota_errors"]:
        raise Fatal("QUOTA_EXCEEDED", "quota exceeded")
    raise PathFault("QUOTA_EXCEEDED", f"quota of {quota} bytes is used up")


def _copy(
    store: Store, task: Document, item: Document, source: Path, destination: Path
) -> Generator[float, None, Document]:
    """Copy one file and return what is known of it afterwards. The partial file never outlives the attempt."""
    algorithm = (item["checksum_algorithm"] or "MD5").upper()
    partial = destination.with_name(f".{destination.name[:180]}.{task['task_id'][:8]}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        facts = yield from _write(store, source, partial, algorithm)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PathFault(collections.code_of(error), f"File: {item['destination_path']}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    try:
        if _take(store, task["destination_endpoint_id"], "corrupt"):
            _spoil(partial)
        _compare(task, item, partial, facts)
        if task["preserve_timestamp"] and _side(store, task, "destination")["keeps_times"]:
            os.utime(partial, ns=(facts["mtime_ns"], facts["mtime_ns"]))
        if _open(store, task["task_id"]) is not None:
            partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    told = task["verify_checksum"] or item["external_checksum"]
    return {"size": facts["size"], "checksum": facts["checksum"] if told else None,
            "algorithm": algorithm if told else None}  # fmt: skip


def _write(store: Store, source: Path, partial: Path, algorithm: str) -> Generator[float, None, Document]:
    digest = hashlib.new(algorithm.lower())
    with source.open("rb") as reader, partial.open("wb") as writer:
        before = os.fstat(reader.fileno())
        while True:
            speed = store.setting("bytes_per_s")
            chunk = reader.read(max(1, min(_CHUNK_BYTES, int(speed / 20))) if speed else _CHUNK_BYTES)
            if not chunk:
                break
            digest.update(chunk)
            writer.write(chunk)
            yield len(chunk) / speed if speed else 0.0
        after = os.stat(source)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or writer.tell() != after.st_size:
            raise PathFault("FILE_SIZE_CHANGED", f"File: {source.name}: {before.st_size} -> {after.st_size} bytes")
    return {"size": after.st_size, "mtime_ns": after.st_mtime_ns, "checksum": digest.hexdigest(),
            "algorithm": algorithm}  # fmt: skip


def _spoil(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 0xFF]) if first else b"?")


def _compare(task: Document, item: Document, partial: Path, facts: Document) -> None:
    expected = item["external_checksum"]
    if expected and expected.lower() != facts["checksum"]:
        raise Fatal("EXTERNAL_CHECKSUM_MISMATCH", f"{item['source_path']} does not have the checksum that was given")
    if (task["verify_checksum"] or expected) and _digest(partial, facts["algorithm"]) != facts["checksum"]:
        raise PathFault("VERIFY_CHECKSUM", f"File: {item['destination_path']}: checksums differ")
