"""Check a flow definition before it is kept: shape of every state, and that every way leads somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Problem = tuple[list[Any], str]  # location in the document, message

_TOP = {"StartAt", "States", "Comment"}
_NEXT = {"Next", "End"}
_COMMON = {"Type", "Comment"}
# type -> keys besides the common ones; Choice and Fail have no Next
_KEYS: dict[str, set[str]] = {
    "Action": {"ActionUrl", "Handler", "ActionScope", "Parameters", "InputPath", "ResultPath", "WaitTime",
               "ExceptionOnActionFailure", "RunAs", "Catch"} | _NEXT,
    "ExpressionEval": {"Parameters", "ResultPath"} | _NEXT,
    "Pass": {"Parameters", "InputPath", "Result", "ResultPath"} | _NEXT,
    "Choice": {"Choices", "Default"},
    "Wait": {"Seconds", "SecondsPath", "Timestamp", "TimestampPath"} | _NEXT,
    "Fail": {"Error", "ErrorPath", "Cause", "CausePath"},
    "CreateWebInput": {"Parameters", "InputPath", "ResultPath", "Catch"} | _NEXT,
    "AwaitWebInput": {"Parameters", "InputPath", "ResultPath", "Catch"} | _NEXT,
}  # fmt: skip
_WAITS = ("Seconds", "SecondsPath", "Timestamp", "TimestampPath")
_NAME_MAX = 128


def problems(definition: Any) -> list[Problem]:
    """Return everything that is wrong with a definition; an empty list means that it would be accepted."""
    if not isinstance(definition, dict):
        return [(["definition"], "The definition must be an object")]
    found: list[Problem] = [
        (["definition", key], "extra fields not permitted") for key in sorted(definition.keys() - _TOP)
    ]
    states = definition.get("States")
    if not isinstance(states, dict) or not states:
        return [*found, (["definition", "States"], "States must hold at least one state")]
    start = definition.get("StartAt")
    if start not in states:
        found.append((["definition", "StartAt"], f"StartAt names no state: {start!r}"))
    for name, state in states.items():
        found += [(["definition", "States", name, *more], message) for more, message in _state(name, state)]
        for target in _targets(state):
            if target not in states:
                found.append((["definition", "States", name], f"There is no state {target!r}"))
    if not found:
        reached = _reached(start, states)
        found += [(["definition", "States", name], "The state cannot be reached") for name in states.keys() - reached]
    return found


def _state(name: str, state: Any) -> Iterator[Problem]:
    if not 1 <= len(name) <= _NAME_MAX:
        yield [], f"A state name has 1 to {_NAME_MAX} characters"
    kind = state.get("Type") if isinstance(state, dict) else None
    if kind not in _KEYS:
        yield [], f"Unknown state type {kind!r}"
        return
    for key in sorted(state.keys() - _KEYS[kind] - _COMMON):
        yield [key], "extra fields not permitted"
    if "Next" in _KEYS[kind] and ("Next" in state) == (state.get("End") is True):
        yield [], (f"A state of type '{kind}' must be defined as either terminal (\"End\": true)"
                   ' or transitional ("Next": "NextStateId")')  # fmt: skip
    if "Parameters" in state and "InputPath" in state:
        yield [], "Parameters and InputPath exclude each other"
    match kind:
        case "Action" if ("ActionUrl" in state) == ("Handler" in state):
            yield [], "An Action needs an ActionUrl or a Handler"
        case "Action" if not str(state.get("ActionUrl", "https://")).startswith(("https://", "http://127.0.0.1")):
            yield ["ActionUrl"], "ActionUrl must be an https URL"
        case "Wait" if sum(key in state for key in _WAITS) != 1:
            yield [], f"A Wait needs exactly one of {', '.join(_WAITS)}"
        case "Choice" if not state.get("Choices"):
            yield ["Choices"], "A Choice needs at least one rule"
        case "ExpressionEval" if "Parameters" not in state or "ResultPath" not in state:
            yield [], "An ExpressionEval needs Parameters and ResultPath"
    yield from _paths(state.get("Parameters", {}), ["Parameters"])


def _paths(value: Any, where: list[Any]) -> Iterator[Problem]:
    match value:
        case dict():
            for key, one in value.items():
                if key.endswith(".$") and not (isinstance(one, str) and one.startswith("$")):
                    yield [*where, key], "A path starts with '$'"
                yield from _paths(one, [*where, key])
        case list():
            for number, one in enumerate(value):
                yield from _paths(one, [*where, number])


def _targets(state: Any) -> Iterator[str]:
    if not isinstance(state, dict):
        return
    for key in ("Next", "Default"):
        if key in state:
            yield state[key]
    for key in ("Choices", "Catch"):
        for rule in state.get(key, []):
            yield rule.get("Next")


def _reached(start: Any, states: dict[str, Any]) -> set[str]:
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += _targets(states[name])
    return reached
