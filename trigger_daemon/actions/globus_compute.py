"""Run a registered function at a Globus Compute endpoint for each batch: `start: {globus_compute: {...}}`.

Submitted once, as nearly as the service allows: it takes no id of ours, so a
task group that no other attempt uses is journaled first, and a task that is
new in it is ours. Watched to the end: what the function returns becomes the
run's output, what it raises the reason why the run is held. Arguments go as
JSON, and results are read as JSON only: a pickled one is never opened.

In `args` and `kwargs`, captures are filled in, and a value that is only one of
these becomes more than a text:

    '{files}'     the list of the files' paths, as the endpoint sees them
    '{manifest}'  the list of {path, size, mtime_ns}, and role for companions
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trigger_daemon.actions import Context, Differs, Json, Progress, Proof, Refused, Request, Unknown, Unproven
from trigger_daemon.actions._globus_batch import short, uses, uuid_of
from trigger_daemon.actions._globus_groups import NOTED, Groups
from trigger_daemon.actions._globus_polls import Polls
from trigger_daemon.actions._globus_sent import Sent
from trigger_daemon.actions._members import changed_members
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.failpoints import fail_point
from trigger_daemon.globus import NO_CLIENT
from trigger_daemon.globus.faults import Trouble
from trigger_daemon.globus.paths import is_uuid, join
from trigger_daemon.globus.serialized import JSON_DATA, RETURN_JSON, Unreadable, pack, read
from trigger_daemon.globus.service import Clients, Seat

ARGUMENTS_MAX = 5_000_000  # characters; the service takes 10 MB, with all that it adds
OUTPUT_BYTES_MAX = 65_536
EXCEPTION_TOLD = 4_000  # characters of its end
POLL_SHARE = 4  # a task of some age is looked at again after this part of it
POLL_LONGEST_S = 120.0
ASLEEP_S = 30.0  # a task that no worker has by then: is its endpoint online?
ASLEEP_AGAIN_S = 60.0
ENDPOINTS_MAX = 1_000
# A worker, or the job of the batch system that it ran in, went away under the task: not the function's fault.
_LOST = re.compile(r"\b(?:parsl|globus_compute_endpoint|funcx_endpoint)\.[\w.]{0,200}\b(?:WorkerLost|ManagerLost)\b")
_FORMS = re.compile(r"\b(?:DeserializationError|SerializationError|Invalid header|serializ)", re.IGNORECASE)


class Action:
    """Globus Compute."""

    OPTIONS: Options = {
        "endpoint": Option("uuid", "UUID of the endpoint that runs the function", required=True),
        "function": Option("uuid", "UUID of the function, as its registration has told it", required=True),
        "args": Option("list", "the function's arguments by position; '{files}' and '{manifest}' stand for the batch",
                       None, template=True),
        "kwargs": Option("map", "the function's arguments by name; '{files}' and '{manifest}' stand for the batch",
                         None, template=True),
        "at": Option("text", "where the endpoint sees the watched directory; absent: at the same path", None,
                     template=True),
        "user_endpoint_config": Option("map", "what a multi-user endpoint is to be configured with", None,
                                       template=True),
        "timeout": Option("duration", "a task that has not ended by then is told as standing still", 86_400.0,
                          minimum=1),
    }  # fmt: skip
    EXTRA_NAMES = ("files", "manifest")
    VERIFIES = False
    PREPARES = True
    LEAVES_OUT = False
    POOL = "globus"  # a slow service keeps no copy waiting

    def __init__(self, context: Context) -> None:
        self._globus = Seat(context.settings.get("globus") or {}, os.path.dirname(os.path.dirname(context.state_dir)))
        self._groups = Groups(os.path.join(context.state_dir, "groups.json"))
        self._lock = threading.Lock()
        self._started: dict[tuple[int, int], Json] = {}
        self._sent = Sent()
        self._polls = Polls()
        self._unsent: set[tuple[int, int]] = set()  # attempts that surely were not sent: only these are, without a look
        self._given_up: set[tuple[int, int]] = set()  # attempts that nobody waits for any more
        self._settled: set[tuple[int, int]] = set()  # attempts whose group others may have
        self._endpoints: dict[str, tuple[float, bool]] = {}  # endpoint -> when it was asked about, whether it is online

    # -------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        for key in ("endpoint", "function"):
            if not is_uuid(options[key]):
                hint = "endpoints are listed at app.globus.org/compute; a registration returns the function's"
                raise OptionFault(key, f"{options[key]!r} is not a UUID", hint)
        at = options.get("at")
        if at is not None and not str(at).startswith(("/", "{")):
            raise OptionFault("at", f"{at!r} is not an absolute path", "write it from the top, such as /mnt/krios")

    def check_roots(self, options: Mapping[str, Any], roots: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Raise OptionFault if there is no account, or if `at` could mean either of two directories."""
        if not settings["globus"].get("client_id"):
            raise OptionFault("", *NO_CLIENT)
        if options.get("at") is not None and len(set(roots)) > 1:
            hint = "leave `at` out, and let the endpoint see both at the same paths as here"
            raise OptionFault("at", "companions lie in another directory, which `at` does not name", hint)

    def destination(self, options: Mapping[str, Any]) -> str:
        return f"endpoint {options['endpoint']}"

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    # ------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        """Take a task group of its own, and note what is in it. Raises Refused."""
        _refuse_large(request)
        try:
            group, before = self._groups.take(_user(request))
        except OSError as error:
            why = f"cannot note the task group: {error.strerror or error}"
            raise Refused(Fault("transient", why, "make room for the daemon's state directory")) from None
        with self._lock:
            self._unsent.add((request.run, request.attempt))
        return {"group": group, "before": before, "time": time.time()}

    def start(self, request: Request, prepared: Json) -> Json:
        """Submit the task; one POST, never repeated by itself. Raises Refused, Unknown."""
        key = (request.run, request.attempt)
        with self._lock:
            if (known := self._started.get(key)) is not None:
                return known
            unsent = key in self._unsent
        if not unsent:  # an earlier call, or another life, may have sent it
            found = self.find(request, prepared)
            if found is not None:
                return found
            if prepared.get("group") is not None:  # one that was sent may come into it yet: nobody may take it for his
                self._groups.drop(prepared["group"])
        options, group = request.options, prepared.get("group")
        document: dict[str, Any] = {
            "tasks": {options["function"]: [_payload(request)]}, "create_queue": False,
            "result_serializers": [JSON_DATA],
        }  # fmt: skip
        if group is not None:
            document["task_group_id"] = group
        if options.get("user_endpoint_config"):
            document["user_endpoint_config"] = options["user_endpoint_config"]

        def submit(globus: Clients) -> dict[str, str]:
            answer = globus.compute_submits.submit(options["endpoint"], document).data
            (task,) = [task for tasks in answer["tasks"].values() for task in tasks]
            return {"task": uuid_of(task), "group": uuid_of(answer["task_group_id"])}

        with self._sent.under_way(key):
            with self._lock:
                if key not in self._unsent:  # another call has sent it between our look and this
                    raise Unknown("it was sent meanwhile; what became of it is looked for")
                self._unsent.discard(key)
            fail_point("globus.compute")
            try:
                told = self._globus.ask("submit the function", submit, first=True)
            except Trouble as trouble:
                if trouble.done is False:
                    raise Refused(self._refused(request, group, trouble)) from None
                raise Unknown(trouble.words()) from None
        fail_point("globus.computing")
        if group is None:
            self._groups.enter(told["group"], _user(request))
        return self._known(key, told, prepared)

    def _refused(self, request: Request, group: str | None, trouble: Trouble) -> Fault:
        """Return what a refusal means; the group's own end is no fault of the rule."""
        if group is None:
            return trouble.fault
        if trouble.status in (403, 404):
            try:
                self._tasks(group)
            except Trouble as of_group:
                if of_group.status in (403, 404):  # forgotten by the service, or another account's
                    self._groups.drop(group)
                    why = f"the task group {group} is not there any more"
                    return Fault("transient", why, "another one is made; it goes on by itself", counts=False,
                                 retry_after_s=1.0)  # fmt: skip
        self._groups.give_back(group, _user(request))
        return trouble.fault

    def _tasks(self, group: str) -> list[str]:
        def tasks(globus: Clients) -> list[str]:
            told = globus.compute.get_task_group(group).data
            if str(told["taskgroup_id"]) != group:
                raise ValueError("it is of another group")
            return [uuid_of(task["id"]) for task in told["tasks"]]

        return self._globus.ask("ask what is in the task group", tasks, first=True)

    def _known(self, key: tuple[int, int], told: Mapping[str, str], prepared: Json) -> Json:
        handle = {**told, "time": prepared["time"]}
        with self._lock:
            self._started[key] = handle
        return handle

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Look for the task in its group. None only after so long that it would surely be listed.

        Without a group there is nothing to look in: then the handle is of a task that a person must look for.
        """
        key = (request.run, request.attempt)
        if prepared.get("group") is None:
            with self._lock:
                if key in self._unsent:
                    return None
            self._sent.look(key, lambda: None, 0.0)  # not while it is being sent
            return self._known(key, {"task": "", "group": ""}, prepared)
        found = self._sent.look(key, lambda: self._look_for(request, prepared), self._globus.account.listed_after_s)
        if found is None:
            with self._lock:
                self._unsent.add(key)
        return found

    def _look_for(self, request: Request, prepared: Json) -> Json | None:
        group, before = prepared["group"], set(prepared["before"])
        try:
            tasks = self._tasks(group)
        except Trouble as trouble:
            raise Unknown(trouble.words()) from None
        new = [task for task in tasks if task[:NOTED] not in before]
        if len(new) > 1:
            raise Unknown(f"{len(new)} tasks are new in the task group, and one at most is this attempt's")
        return self._known((request.run, request.attempt), {"task": new[0], "group": group}, prepared) if new else None

    # ---------------------------------------------------------------------- the end

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how the task stands, and what it waits for."""
        number = handle["task"]
        if not number:
            return _lost(request)
        key = (request.run, request.attempt)
        if key not in self._settled:  # its handle is journaled: nobody looks for it in the group any more
            self._groups.give_back(handle["group"], _user(request), number)
            with self._lock:
                self._settled.add(key)
        if (last := self._polls.crowded(number)) is not None:
            return last
        with self._polls.asking(number) as asked:
            asked.progress = self._stands(request, handle, number)
        return asked.progress

    def _stands(self, request: Request, handle: Json, number: str) -> Progress:
        try:
            told = self._globus.ask(
                "ask how the task stands", lambda globus: dict(globus.compute.get_task(number).data)
            )
        except Trouble as trouble:
            if trouble.status == 404 and (fault := self._polls.gone(number, "the task", request.run)):
                return Progress("failed", fault.why, fault.hint, fault)
            if trouble.fault.scope == Scope.CREDENTIAL:
                return Progress("inactive", trouble.fault.why, trouble.fault.hint, again_in_s=60.0)
            raise Unknown(trouble.words()) from None
        if str(told.get("task_id")) != number or not isinstance(told.get("status"), str):
            raise Unknown("Globus answered with something else than the task that was asked about")
        self._polls.there(number)
        match told["status"].lower():
            case "success":
                size = sum(file.size for file in request.files)
                return Progress(
                    "succeeded", "the function has returned", files_done=len(request.files), bytes_done=size,
                    output=_output(request, told), changed=changed_members(request),
                )  # fmt: skip
            case "failed":
                return _failed(request, told)
            case status if (request.run, request.attempt) in self._given_up:
                why = f"Globus Compute cannot end a task: it is {short(status)} there, and not waited for any more"
                return Progress("cancelled", why, output=_output(request, told))
            case status:
                return self._waits(request, handle, status)

    def _waits(self, request: Request, handle: Json, status: str) -> Progress:
        age_s = max(0.0, time.time() - float(handle["time"]))
        again_s = min(max(self._globus.account.poll_s, age_s / POLL_SHARE), POLL_LONGEST_S)
        endpoint, timeout_s = request.options["endpoint"], float(request.options["timeout"])
        if status != "running" and age_s >= ASLEEP_S and not self._online(endpoint):
            why = f"endpoint {endpoint} is offline; the task waits for it at Globus"
            hint = "start the endpoint (`globus-compute-endpoint start NAME`) where it runs; it goes on by itself"
            return Progress("inactive", why, hint, again_in_s=min(again_s, ASLEEP_AGAIN_S))
        if age_s >= timeout_s:
            why = f"the function has not ended for {timeout_s:.0f} s; the task is {status}"
            hint = "look at the endpoint, and at its queue; or let `timeout` in the rule be longer"
            return Progress("inactive", why, hint, again_in_s=again_s)
        return Progress("active", f"the task is {short(status)}", again_in_s=again_s)

    def _online(self, endpoint: str) -> bool:
        """Say whether an endpoint is online; yes, if it cannot be told."""
        now = time.monotonic()
        with self._lock:
            asked_at, online = self._endpoints.get(endpoint, (-1e9, True))
        if now - asked_at < ASLEEP_AGAIN_S / 2:
            return online
        try:
            told = self._globus.ask(
                "ask whether the endpoint is online",
                lambda globus: str(globus.compute.get_endpoint_status(endpoint)["status"]),
            )
            online = told.lower() != "offline"
        except Trouble:
            online = True
        with self._lock:
            if len(self._endpoints) > ENDPOINTS_MAX:
                self._endpoints.clear()
            self._endpoints[endpoint] = now, online
        return online

    def cancel(self, request: Request, handle: Json) -> None:
        """Wait for the task no more: the service has no way to end it."""
        with self._lock:
            self._given_up.add((request.run, request.attempt))

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        return Unproven(Fault("permanent", "a function's end says nothing of what lies where", "set `proof: none`"))

    def forget(self, run: int) -> None:
        with self._lock:
            for key in [key for key in self._started if key[0] == run]:
                self._polls.forget(self._started.pop(key)["task"])
            for keys in (self._unsent, self._given_up, self._settled):
                keys.difference_update([key for key in keys if key[0] == run])
        self._sent.forget(run)

    def close(self) -> None:
        self._globus.close()


# ---------------------------------------------------------------------- what is sent


def _user(request: Request) -> str:
    return f"{request.run}-{request.attempt}"


def _payload(request: Request) -> str:
    """Return the arguments: what the journal holds, with the batch put where the rule says. Raises ValueError."""
    options, written = request.options, request.options if request.written is None else request.written
    at = options.get("at")

    def place(root: str, path: str) -> str:
        return join(str(at or root), path)

    def manifest() -> list[dict[str, Any]]:
        told = []
        for file in request.files:
            about = {"path": place(file.root, file.path), "size": file.size, "mtime_ns": file.mtime_ns}
            told.append({**about, "role": file.role} if file.role else about)
        return told

    def fill(value: Any, template: Any) -> Any:
        match template:  # where the rule says so, and not where a capture happens to read so
            case "{manifest}":
                return manifest()
            case "{files}":
                return [place(file.root, file.path) for file in request.files]
            case Mapping():
                return {key: fill(item, template.get(key)) for key, item in value.items()}
            case list() | tuple():
                return [fill(item, each) for item, each in zip(value, template, strict=True)]
        return value

    args = fill(list(options.get("args") or ()), list(written.get("args") or ()))
    return pack(args, fill(dict(options.get("kwargs") or {}), dict(written.get("kwargs") or {})))


def _refuse_large(request: Request) -> None:
    try:
        size = len(_payload(request))
    except (ValueError, TypeError) as error:
        hint = "write only texts, numbers, lists and mappings in `args` and `kwargs`"
        raise Refused(Fault("permanent", f"the arguments cannot be said in JSON: {error}", hint)) from None
    if size > ARGUMENTS_MAX:
        why = f"the arguments have {size:,} characters; {ARGUMENTS_MAX:,} are sent at most"
        hint = "take fewer files for a batch, or tell the function the directory instead of '{manifest}'"
        raise Refused(Fault("permanent", why, hint if _lists(request) else "make them shorter"))


def _lists(request: Request) -> bool:
    written = request.options if request.written is None else request.written
    return any(uses(written.get(key), name) for key in ("args", "kwargs") for name in ("files", "manifest"))


# -------------------------------------------------------------------- what came of it


def _output(request: Request, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task has come to, for people and for who asks for the run's output."""
    options = request.options
    output = {"task_id": told["task_id"], "endpoint": options["endpoint"], "function": options["function"],
              "status": short(told["status"].lower())}  # fmt: skip
    if (ended := _time(told.get("completion_t"))) is not None:
        output["completion_time"] = ended
    if "result" not in told and output["status"] != "success":
        return output
    output["output"] = None
    if "result" not in told:
        return {**output, "unread": "the service gives no result"}
    try:
        value = read(told["result"])
    except Unreadable as error:
        return {**output, "unread": str(error), "hint": RETURN_JSON}
    if len(told["result"]) > OUTPUT_BYTES_MAX:
        why = f"the result has {len(told['result']):,} characters; {OUTPUT_BYTES_MAX:,} are kept at most"
        return {**output, "unread": why, "hint": "let the function write it to a file, and return where"}
    return {**output, "output": value}


def _time(told: Any) -> str | None:
    """Return an instant that is told in Unix seconds, as other services tell it."""
    try:
        return datetime.fromtimestamp(float(told), UTC).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _failed(request: Request, told: Mapping[str, Any]) -> Progress:
    """Return why a task has failed: the function's own exception, or what went away under it."""
    # Cut first: it may have megabytes, and nothing else of ours runs while an expression is searched for in it.
    words = str(told.get("exception") or told.get("reason") or "no reason given")[-EXCEPTION_TOLD:]
    last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "")
    output = {**_output(request, told), "exception": words}
    if _LOST.search(words):
        why = f"a worker of the endpoint was lost: {short(last)}"
        hint = "it is submitted again; if it stays, has the job too little memory or time, or another Python?"
        fault = Fault("transient", why, hint)
    elif "exception" in told and not _FORMS.search(last):
        hint = f"mend what it names, then `trigger-daemon runs retry {request.run}`; `runs show` tells all of it"
        fault = Fault("permanent", f"the function has failed: {short(last)}", hint)
    else:
        hint = f"does the endpoint's version take JSON arguments? then `trigger-daemon runs retry {request.run}`"
        fault = Fault("permanent", f"the function could not be run: {short(last)}", hint)
    return Progress("failed", fault.why, fault.hint, fault, output=output, changed=changed_members(request))


def _lost(request: Request) -> Progress:
    why = "whether the function was submitted cannot be told: the answer was lost, and it was in no task group yet"
    hint = (
        "see at the endpoint, by what it makes, whether it ran; if not,"
        f" `trigger-daemon runs retry {request.run}` submits it again, else `runs abandon` ends the run"
    )
    return Progress("failed", why, hint, Fault("person", why, hint))
