"""Execute runs: one thread that takes every open run a state further.

Where a run stands is in its document after every step, so a run goes on after a kill
with the action it had begun, and never begins one twice.
"""

from __future__ import annotations

import fnmatch
import json
import threading
from typing import Any

from . import compute, expressions, flows, providers, search, timers
from .answer import Caller, Refusal
from .expressions import PathError
from .state import Document, Store, instant, new_id

_WAIT_TIME_S = 300  # of an Action that names none
_IDLE_S = 0.2       # between two looks at timers and ingests while nothing else is open


class _StateError(Exception):
    """An error of a state, by the name that a Catch knows it under."""

    def __init__(self, name: str, cause: Any) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause


class Runner(threading.Thread):
    def __init__(self, store: Store) -> None:
        super().__init__(name="runner", daemon=True)
        self._store = store
        self._bell = store.bell()

    def run(self) -> None:
        store = self._store
        while True:
            self._bell.clear()
            busy = False
            for row in store.all("open_run"):
                busy |= self._go_on(row["run_id"])
            waiting = bool(store.sql("SELECT 1 FROM docs WHERE kind = 'ingest' AND owner = 'open' LIMIT 1"))
            if waiting:
                with store.transaction():
                    search.settle(store)
            timed = timers.settle(store)
            busy |= compute.settle(store)
            if busy:
                rest_s: float | None = store.setting("flow_poll_s")
            else:
                rest_s = _IDLE_S if waiting or timed or store.all("open_run") else None
            self._bell.wait(rest_s)

    def _go_on(self, run_id: str) -> bool:
        """Take a run as far as it goes without waiting; tell whether it should be looked at again soon."""
        while True:
            with self._store.transaction():
                run = self._store.get("run", run_id)
                if run is None or run["status"] in flows.ENDED:
                    self._store.remove("open_run", run_id)
                    return False
                if not _step(self._store, run):
                    return run["status"] == "ACTIVE"


# --------------------------------------------------------------------- steps


def _step(store: Store, run: Document) -> bool:
    """Do one step; return whether the run can go on at once."""
    run["_steps"] += 1
    state = store.get("run_definition", run["run_id"])["definition"]["States"][run["_state"]]  # type: ignore[index]
    try:
        if run["_wait"] is None:
            _begin(store, run, state)
            # What was begun is kept before anything is looked at.
            if run["status"] not in flows.ENDED:
                store.put("run", run["run_id"], run)
        if run["_wait"] is not None and not _waited(store, run, state):
            return False
    except _StateError as error:
        _caught(store, run, state, error)
    except PathError as error:
        _caught(store, run, state, _StateError("States.ParameterPathFailure", str(error)))
    if run["status"] not in flows.ENDED:
        _check_size(store, run)
        if run["status"] not in flows.ENDED:
            store.put("run", run["run_id"], run)
    return run["status"] not in flows.ENDED


def _check_size(store: Store, run: Document) -> None:
    largest = store.setting("flow_state_max_bytes")
    size = len(json.dumps(run["_data"]))
    if size > largest:
        flows.end(store, run, "FAILED", "FlowFailed", "The state of the run is too large",
                  error="States.DataLimitExceeded", cause=f"{size} bytes, {largest} are allowed")  # fmt: skip
    elif run["_steps"] > store.setting("flow_steps_max"):
        flows.end(store, run, "FAILED", "FlowFailed", "The run has taken too many steps", error="States.Runtime")


def _view(run: Document) -> Document:
    """Return the data as paths and expressions see it."""
    context = {"flow_id": run["flow_id"], "run_id": run["run_id"], "user_id": run["_identity"],
               "username": f"{run['_identity']}@clients.auth.globus.org", "email": None,
               "identities": [run["_identity"]], "token_info": {}}  # fmt: skip
    return (run["_data"] if isinstance(run["_data"], dict) else {}) | {"_context": context}


def _input(run: Document, state: Document) -> Any:
    if "Parameters" in state:
        return expressions.parameters(state["Parameters"], _view(run))
    return expressions.look_up(state.get("InputPath", "$"), _view(run) if "InputPath" in state else run["_data"])


def _log(store: Store, run: Document, kind: str, what: str, **details: Any) -> None:
    name = run["_state"]
    flows.log(
        store, run["run_id"], f"{kind}{what}", f"State {name} of type {kind} {what.lower()}",
        {"state_name": name, "state_type": kind} | details,
    )  # fmt: skip


def _begin(store: Store, run: Document, state: Document) -> None:
    kind = state["Type"]
    if kind != "Action":
        _log(store, run, kind, "Started", input=run["_data"])
    match kind:
        case "Action":
            _begin_action(store, run, state)
        case "ExpressionEval":
            _leave(store, run, state, _input(run, state))
        case "Pass":
            result = state["Result"] if "Result" in state else _input(run, state)
            _leave(store, run, state, result)
        case "Choice":
            _go(store, run, _chosen(state, _view(run)))
        case "Wait":
            run["_wait"] = {"kind": "until", "until": _until(store, run, state)}
        case "Fail":
            data = _view(run)
            error, cause = (
                expressions.look_up(state[f"{key}Path"], data) if f"{key}Path" in state else state.get(key)
                for key in ("Error", "Cause")
            )
            flows.end(store, run, "FAILED", "FlowFailed", "The Flow reached a Fail state", error=error, cause=cause,
                      state_name=run["_state"])  # fmt: skip
        case "CreateWebInput":
            _leave(store, run, state, {"web_input_id": _web_input(store, run, _input(run, state))})
        case "AwaitWebInput":
            found = _input(run, state)
            run["_wait"] = {"kind": "web", "id": found.get("web_input_id") or found.get("WebInputId")}


def _waited(store: Store, run: Document, state: Document) -> bool:
    """Look at what the run waits for; return whether it has come, and then the state is left."""
    wait = run["_wait"]
    match wait["kind"]:
        case "until" if store.now() >= wait["until"]:
            _leave(store, run, state, None, keep=True)
            return True
        case "web":
            return _web_answered(store, run, state, wait["id"])
        case "action":
            return _looked(store, run, state, wait)
    return False


def _leave(store: Store, run: Document, state: Document, result: Any, *, keep: bool = False) -> None:
    """Put the result where the state wants it, and go where it leads."""
    if not keep:
        run["_data"] = expressions.put(state.get("ResultPath", "$"), run["_data"], result)
    _log(store, run, state["Type"], "Completed", output=result)
    run["_wait"] = None
    if state.get("End"):
        flows.end(store, run, "SUCCEEDED", "FlowSucceeded", "The Flow run reached a successful completion state",
                  output=run["_data"])  # fmt: skip
    else:
        run["_state"] = state["Next"]


def _go(store: Store, run: Document, target: str) -> None:
    _log(store, run, "Choice", "Completed", output={"next": target})
    run["_state"] = target


def _caught(store: Store, run: Document, state: Document, error: _StateError) -> None:
    run["_wait"] = None
    run["blocking_web_input_id"] = None
    told = {"Error": error.name, "Cause": error.cause}
    _log(store, run, state["Type"], "Failed", **told)
    for rule in state.get("Catch", []):
        if error.name in rule["ErrorEquals"] or {"States.ALL", "States.All"} & set(rule["ErrorEquals"]):
            run["_data"] = expressions.put(rule.get("ResultPath", "$"), run["_data"], told)
            run["_state"] = rule["Next"]
            return
    flows.end(store, run, "FAILED", "FlowFailed", f"State {run['_state']} failed", error=error.name, cause=error.cause,
              state_name=run["_state"])  # fmt: skip


# ------------------------------------------------------------------- actions


def _begin_action(store: Store, run: Document, state: Document) -> None:
    body = _input(run, state)
    url = state.get("ActionUrl") or state["Handler"].get("Url", "")
    _log(store, run, "Action", "Started", input=body)
    try:
        action = providers.begin(store, url, Caller(run["_identity"], run["_client"]), body)
    except providers.Unable as error:
        raise _StateError("ActionUnableToRun", str(error)) from None
    except Refusal as refusal:
        _suspend(store, run, refusal.body)
        return
    run["_wait"] = {"kind": "action", "began": store.now(), "start_time": store.stamp(), "action": action}


def _suspend(store: Store, run: Document, body: Document) -> None:
    """The person must agree to something; the state begins anew when the run is resumed."""
    description = "Resuming this run requires a consent"
    run |= {"status": "INACTIVE", "display_status": "INACTIVE", "_wait": {"kind": "consent"}}
    run["details"] = {"code": "ConsentRequired", "description": description,
                      "required_scope": body["required_scopes"][0]}  # fmt: skip
    _log(store, run, "Action", "Inactive", **body)


def _looked(store: Store, run: Document, state: Document, wait: Document) -> bool:
    action = wait["action"]
    if action["status"] == "ACTIVE":
        action = providers.look(store, action)
    if action["status"] == "ACTIVE":
        if store.now() - wait["began"] > state.get("WaitTime", _WAIT_TIME_S):
            raise _StateError("ActionTimeout", {"action_id": action["action_id"], "details": action["details"]})
        return False
    result = {
        "action_id": action["action_id"], "status": action["status"], "display_status": action["status"],
        "details": action["details"], "start_time": wait["start_time"], "completion_time": store.stamp(),
        "creator_id": flows.urn(run["_identity"]), "label": None, "monitor_by": [], "manage_by": [],
        "release_after": None, "state_name": run["_state"],
    }  # fmt: skip
    if action["status"] == "FAILED" and state.get("ExceptionOnActionFailure", True):
        raise _StateError("ActionFailedException", result)
    _leave(store, run, state, result)
    return True


# ---------------------------------------------------------------- web inputs


def _web_input(store: Store, run: Document, wanted: Document) -> str:
    options = [
        {"option_id": new_id(), "label": one.get("Label", ""), "description": one.get("Description", ""),
         "_value": one.get("Value")}
        for one in wanted.get("Options", [])
    ]  # fmt: skip
    context = {key.lower(): value for key, value in (wanted.get("Context") or {}).items()}
    found = {
        "id": new_id(), "status": "open", "input_type": str(wanted.get("InputType", "Selection")).lower(),
        "input_schema": {"type": "string", "title": "Please select an option",
                         "oneOf": [{"const": one["option_id"], "title": one["label"],
                                    "description": one["description"]} for one in options]},
        "context": {"title": "", "presentation_style": "text", "text": ""} | context, "options": options,
        "roles": {"viewer_urns": [], "respondent_urns": wanted.get("RespondentUrns") or [flows.urn(run["_identity"])]},
        "creator_urn": flows.urn(run["_identity"]), "flow": {"id": run["flow_id"], "title": run["flow_title"]},
        "run": {"id": run["run_id"], "label": run["label"]}, "created_timestamp": store.stamp(),
        "edited_timestamp": store.stamp(), "closed_timestamp": None, "_response": None,
    }  # fmt: skip
    store.put("web_input", found["id"], found)
    return str(found["id"])


def _web_answered(store: Store, run: Document, state: Document, key: Any) -> bool:
    found = store.get("web_input", key) if isinstance(key, str) else None
    if found is None:
        raise _StateError("States.Runtime", f"there is no web input {key!r}")
    if found["_response"] is None:
        if run["blocking_web_input_id"] != key:
            run |= {"status": "INACTIVE", "display_status": "INACTIVE", "blocking_web_input_id": key}
            run["details"] = {"code": "WebInputRequired", "description": "The run waits for an answer", "details": {}}
            store.put("run", run["run_id"], run)
        return False
    run |= {"status": "ACTIVE", "display_status": "ACTIVE", "blocking_web_input_id": None}
    option = found["_response"]
    response = {"value": option["_value"], "label": option["label"], "option_id": option["option_id"]}
    _leave(store, run, state, {"web_input_id": key, "response": response})
    return True


# ------------------------------------------------------------ waits, choices


def _until(store: Store, run: Document, state: Document) -> float:
    data = _view(run)
    if "Timestamp" in state or "TimestampPath" in state:
        text = state.get("Timestamp") or expressions.look_up(state["TimestampPath"], data)
        try:
            return instant(text)
        except (ValueError, AttributeError):
            raise _StateError("States.Runtime", f"not a time: {text!r}") from None
    seconds = state["Seconds"] if "Seconds" in state else expressions.look_up(state["SecondsPath"], data)
    return float(store.now() + seconds * store.setting("flow_wait_scale"))


def _chosen(state: Document, data: Document) -> str:
    for rule in state["Choices"]:
        if _holds(rule, data):
            return str(rule["Next"])
    if "Default" not in state:
        raise _StateError("States.Runtime", "no rule of the Choice matches, and it has no Default")
    return str(state["Default"])


_ORDERS = {
    "Equals": lambda a, b: a == b, "LessThan": lambda a, b: a < b, "GreaterThan": lambda a, b: a > b,
    "LessThanEquals": lambda a, b: a <= b, "GreaterThanEquals": lambda a, b: a >= b,
}  # fmt: skip


def _holds(rule: Document, data: Document) -> bool:
    if "And" in rule:
        return all(_holds(one, data) for one in rule["And"])
    if "Or" in rule:
        return any(_holds(one, data) for one in rule["Or"])
    if "Not" in rule:
        return not _holds(rule["Not"], data)
    present, value = True, None
    try:
        value = expressions.look_up(rule["Variable"], data)
    except PathError:
        present = False
    test, wanted = next((key, one) for key, one in rule.items() if key not in ("Variable", "Next", "Comment"))
    if test == "IsPresent":
        return present is wanted
    if not present:
        raise PathError(f"{rule['Variable']!r} leads nowhere")
    if test.startswith("Is"):
        return _is(value, test.removeprefix("Is")) is wanted
    if test.endswith("Path"):
        test, wanted = test.removesuffix("Path"), expressions.look_up(wanted, data)
    if test == "StringMatches":
        return isinstance(value, str) and fnmatch.fnmatchcase(value, wanted.replace("[", "[[]"))
    return _compared(test, value, wanted)


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "Null":
            return value is None
        case "String":
            return isinstance(value, str)
        case "Boolean":
            return isinstance(value, bool)
        case "Numeric":
            return isinstance(value, int | float) and not isinstance(value, bool)
    try:
        instant(value)
    except (ValueError, AttributeError):
        return False
    return True


def _compared(test: str, value: Any, wanted: Any) -> bool:
    """Compare as a kind; a value of another kind never matches."""
    for kind in ("String", "Numeric", "Timestamp", "Boolean"):
        if test.startswith(kind):
            if not (_is(value, kind) and _is(wanted, kind)):
                return False
            if kind == "Timestamp":
                value, wanted = instant(value), instant(wanted)
            return bool(_ORDERS[test.removeprefix(kind)](value, wanted))
    raise _StateError("States.Runtime", f"unknown comparison {test!r}")
