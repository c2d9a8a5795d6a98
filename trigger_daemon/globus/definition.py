"""Find what is wrong with a Globus flow before the service does: its definition, its input schema, an input.

Pure: takes parsed JSON, returns faults, asks nobody. What the service surely
refuses, or what would fail or never end, is an error; what is likely a mistake,
or not known to work, is a warning. The tables below are the language as far as
it is documented.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from trigger_daemon.core.grammar import nearest

BYTES_MAX = 2_000_000  # of a definition; the service keeps 200 KB of state, published definitions have at most 30 KB
INPUT_BYTES_MAX = 32_000  # of an input; file lists belong into a manifest, the state of a run holds 200 KB in all
DEPTH_MAX = 60  # of nesting; definitions have about 10
VALUES_MAX = 200_000  # in one definition
FAULTS_MAX = 100  # told of one definition: more than anybody reads
EXPRESSION_MAX = 4_000  # characters; Python's own parser gives up somewhat later
INTEGER_BITS_MAX = 1_024
NAME_MAX = 128  # characters of a state's name, by the service
LIKE_MAX = 2_000  # names that a misspelt one is compared with: comparing takes time
WORD_MAX = 200  # characters of a word that may be a misspelt one
KEYS_MAX = 1_000  # of the state that are followed through the flow
STEPS_MAX = 100_000  # taken to follow them
TRANSFER_WAIT_S = 3_600  # below it, a transfer of one batch is likely to be given up while it runs
WAIT_DEFAULT_S = 300
RUN_S_MAX = 31_536_000  # a run ends after a year

Path = tuple[str | int, ...]
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class DefinitionFault:
    """One fault. `path` leads to it by keys and numbers, so that a reader of files can tell line and column."""

    path: Path
    message: str
    hint: str = ""
    severity: Severity = "error"
    at_key: bool = False  # the key is wrong, or something is missing below it; else the value is wrong

    @property
    def json_path(self) -> str:
        """The path as JSONPath writes it."""
        return json_path(self.path)


def json_path(path: Path) -> str:
    """Return a path as text, such as `$.States.Deliver.Next`."""
    text = "$"
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"\w+", step):
            text += f".{step}"
        else:
            text += f"[{json.dumps(step, ensure_ascii=False)}]"
    return text


def faults(definition: object) -> list[DefinitionFault]:
    """Return everything wrong with a flow definition, at most FAULTS_MAX. Never raises for what is written there."""
    if (limit := _limit(definition)) is not None:
        return [limit]
    found = _Found()
    _definition(found, definition)
    order = sorted(found.faults, key=lambda fault: fault.severity)  # errors are not crowded out by warnings
    return order[:FAULTS_MAX]


# -------------------------------------------------------------------------- limits


def _limit(value: object, noun: str = "definition") -> DefinitionFault | None:
    """Return why a value is not looked at: too deep, too large, or no JSON. What passes can be walked by recursion."""
    waiting: list[tuple[Path, object]] = [((), value)]
    values = size = 0
    while waiting:
        path, item = waiting.pop()
        values += 1
        if len(path) > DEPTH_MAX:
            return DefinitionFault(path, f"the {noun} is nested too deeply", f"at most {DEPTH_MAX} levels are read")
        match item:
            case dict():
                if odd := [type(key).__name__ for key in item if not isinstance(key, str)]:
                    return DefinitionFault(path, f"a key must be a text, not {odd[0]}", "quote it")
                size += 2 + sum(len(key) + 4 for key in item)
                waiting.extend(((*path, key), each) for key, each in item.items())
            case list():
                size += 2 + len(item)
                waiting.extend(((*path, number), each) for number, each in enumerate(item))
            case str():
                size += len(item) + 2
            case float() if not math.isfinite(item):
                return DefinitionFault(path, "this number is not finite", "JSON has neither NaN nor Infinity")
            case int() if item.bit_length() > INTEGER_BITS_MAX:
                return DefinitionFault(path, "this number is too large", "write it as a text")
            case None | bool() | int() | float():
                size += 1
            case _:
                return DefinitionFault(path, f"JSON has no {type(item).__name__}", "write it as a text")
        if values + len(waiting) > VALUES_MAX or size > BYTES_MAX:
            most = f"at most {BYTES_MAX:,} bytes and {VALUES_MAX:,} values are read"
            return DefinitionFault((), f"the {noun} is too large", f"{most}; lists of files belong into a manifest")
    return None


# ------------------------------------------------------------------------ collecting


@dataclass
class _Found:
    """What was found so far."""

    faults: list[DefinitionFault] = field(default_factory=list)
    uses: dict[str, dict[str, Path]] = field(default_factory=dict)  # state -> keys of the run's state it needs, where
    state: str = ""  # the state that is looked at

    def error(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> None:
        self._add(DefinitionFault(path, message, hint, "error", key))

    def warning(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> None:
        self._add(DefinitionFault(path, message, hint, "warning", key))

    def _add(self, fault: DefinitionFault) -> None:
        if sum(each.severity == fault.severity for each in self.faults) < FAULTS_MAX:
            self.faults.append(fault)

    def uses_key(self, root: str, path: Path) -> None:
        if root:
            self.uses.setdefault(self.state, {}).setdefault(root, path)

    @property
    def full(self) -> bool:
        """No more errors are kept."""
        return sum(each.severity == "error" for each in self.faults) >= FAULTS_MAX


def _nearest(word: str, known: Collection[str], noun: str = "") -> str:
    """Return a hint for a word nobody knows; none where looking for one would take long."""
    return nearest(word, known, noun) if len(word) <= WORD_MAX and len(known) <= LIKE_MAX else ""


def _shown(value: object) -> str:
    """Return a value for a message."""
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return f"`{value[:60]}{'…' if len(value) > 60 else ''}`"
        case _:
            return f"`{json.dumps(value)[:60]}`"


def _unknown_keys(
    found: _Found, value: Mapping[str, Any], path: Path, known: Collection[str], what: str,
    foreign: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    for key in value:
        if key not in known:
            hint = (foreign or {}).get(key) or _nearest(key, known)
            found.error((*path, key), f"{what} has no `{key[:80]}`", hint, key=True)


def _text(found: _Found, value: object, path: Path, what: str) -> bool:
    if isinstance(value, str) and value.strip():
        return True
    found.error(path, f"{what} must be a text, not {'empty' if isinstance(value, str) else _shown(value)}")
    return False


# ----------------------------------------------------------------------- definition

_TOP = ("StartAt", "States", "Comment")
_TOP_FOREIGN = {
    "Version": "leave it out",
    "TimeoutSeconds": "leave it out; an action has a `WaitTime`",
    "definition": "this is a whole flow: validate what stands under its `definition`",
    "input_schema": "the schema is a file of its own: --schema",
}


def _definition(found: _Found, definition: object) -> None:
    if not isinstance(definition, dict):
        hint = 'write {"StartAt": ..., "States": {...}}'
        found.error((), f"a definition must be an object, not {_shown(definition)}", hint)
        return
    _unknown_keys(found, definition, (), _TOP, "a definition", _TOP_FOREIGN)
    if "Comment" in definition and not isinstance(definition["Comment"], str):
        found.error(("Comment",), f"`Comment` must be a text, not {_shown(definition['Comment'])}")
    states = definition.get("States")
    if "States" not in definition:
        found.error((), "`States` is missing", "write the states of the flow by their names", key=True)
    elif not isinstance(states, dict):
        found.error(("States",), f"`States` must be an object, not {_shown(states)}", "write states by their names")
    elif not states:
        found.error(("States",), "there is no state", "a flow has at least one")
    start = definition.get("StartAt")
    if "StartAt" not in definition:
        hint = f"write \"StartAt\": \"{next(iter(states))[:NAME_MAX]}\"" if states and isinstance(states, dict) else ""
        found.error((), "`StartAt` is missing", hint, key=True)
    elif not _text(found, start, ("StartAt",), "`StartAt`"):
        pass
    elif isinstance(start, str) and isinstance(states, dict) and states and start not in states:
        found.error(("StartAt",), f"there is no state {_shown(start)}", _nearest(start, states, "state"))
    if not isinstance(states, dict):
        return
    for name, state in states.items():
        found.state = name
        _state(found, name, state)
    _ways(found, start, states)


# ---------------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a state of one type has."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    moves: bool = True  # by `Next`, or ends by `End`

    @property
    def known(self) -> tuple[str, ...]:
        return ("Type", "Comment", *self.required, *self.optional, *(("Next", "End") if self.moves else ()))


_SHAPES = {
    "Action": _Shape((), (
        "ActionUrl", "Handler", "ActionScope", "Parameters", "InputPath", "ResultPath", "WaitTime",
        "ExceptionOnActionFailure", "RunAs", "Catch",
    )),
    "ExpressionEval": _Shape(("Parameters", "ResultPath")),
    "Pass": _Shape((), ("Parameters", "InputPath", "Result", "ResultPath")),
    "Choice": _Shape(("Choices",), ("Default",), moves=False),
    "Wait": _Shape((), ("Seconds", "SecondsPath", "Timestamp", "TimestampPath")),
    "Fail": _Shape((), ("Error", "ErrorPath", "Cause", "CausePath"), moves=False),
    "CreateWebInput": _Shape((), ("Parameters", "InputPath", "ResultPath", "Catch")),
    "AwaitWebInput": _Shape((), ("Parameters", "ResultPath", "Catch")),
}  # fmt: skip

# What the States Language has and flows have not.
_FOREIGN_TYPES = {
    "Task": "write \"Type\": \"Action\" with an `ActionUrl`",
    "Succeed": "write \"End\": true in the last state; after a Choice, let a Pass state end",
    "Parallel": "nothing runs side by side; put the states one after another, or start several runs",
    "Map": "repeat by a Choice state that leads back, as in a polling loop",
}
_FOREIGN_KEYS = {
    "Retry": "there is no retry; catch the error, and lead back through a Wait and a Choice that counts",
    "OutputPath": "a result is placed by `ResultPath`",
    "ResultSelector": "place the whole result by `ResultPath`, and pick from it by a path",
    "Resource": "write `ActionUrl`",
    "TimeoutSeconds": "write `WaitTime`",
    "HeartbeatSeconds": "write `WaitTime`",
    "Parameters.$": "write `Parameters` with keys that end in `.$`, or `InputPath`",
    "Parameters.=": "write `Parameters` with keys that end in `.=`",
}


def _state(found: _Found, name: str, state: object) -> None:
    path: Path = ("States", name)
    if not 1 <= len(name) <= NAME_MAX:
        found.error(path, f"a state's name has 1 to {NAME_MAX} characters, not {len(name)}", "rename it", key=True)
    if not isinstance(state, dict):
        found.error(path, f"a state must be an object, not {_shown(state)}", 'write {"Type": ...}')
        return
    if "Comment" in state and not isinstance(state["Comment"], str):
        found.error((*path, "Comment"), f"`Comment` must be a text, not {_shown(state['Comment'])}")
    kind = state.get("Type")
    if "Type" not in state:
        found.error(path, "`Type` is missing", f"known are: {', '.join(_SHAPES)}", key=True)
        return
    if not isinstance(kind, str) or kind not in _SHAPES:
        hint = (_FOREIGN_TYPES.get(kind) or _nearest(kind, _SHAPES)) if isinstance(kind, str) else ""
        found.error((*path, "Type"), f"there is no type {_shown(kind)}", hint)
        return
    _shape(found, state, path, kind)
    _READERS[kind](found, state, path)


def _shape(found: _Found, state: Mapping[str, Any], path: Path, kind: str) -> None:
    """Check what is the same for all types: known and required keys, `Next` or `End`, paths, `Catch`."""
    shape = _SHAPES[kind]
    article = "an" if kind[0] in "AE" else "a"
    foreign = dict(_FOREIGN_KEYS)
    if kind == "Choice":
        foreign["Next"] = "each choice has its own, and `Default` is for the rest"
        foreign["End"] = "lead to a state that ends"
    elif kind == "Fail":
        foreign |= {"Next": "it ends the run; leave it out", "End": "it ends the run; leave it out"}
    elif kind == "ExpressionEval":
        foreign["InputPath"] = "a Pass state takes an `InputPath`"
    _unknown_keys(found, state, path, shape.known, f"{article} {kind} state", foreign)
    for key in shape.required:
        if key not in state:
            found.error(path, f"{article} {kind} state must have `{key}`", key=True)
    if shape.moves:
        _next_or_end(found, state, path)
    if "Parameters" in state and "InputPath" in state and "InputPath" in shape.known:
        found.error((*path, "InputPath"), "`Parameters` and `InputPath` exclude each other", "keep one", key=True)
    if "Parameters" in state and "Parameters" in shape.known:
        if isinstance(state["Parameters"], dict):
            _parameters(found, state["Parameters"], (*path, "Parameters"))
        else:
            found.error((*path, "Parameters"), f"`Parameters` must be an object, not {_shown(state['Parameters'])}")
    if "InputPath" in state and "InputPath" in shape.known:
        _path(found, state["InputPath"], (*path, "InputPath"))
    if "ResultPath" in state and "ResultPath" in shape.known:
        _result_path(found, state["ResultPath"], (*path, "ResultPath"))
    if "Catch" in state and "Catch" in shape.known:
        _catch(found, state["Catch"], (*path, "Catch"))


def _next_or_end(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    if "Next" in state and "End" in state:
        found.error((*path, "End"), "`Next` and `End` exclude each other", "keep one", key=True)
    elif "Next" not in state and "End" not in state:
        found.error(path, "neither `Next` nor `End`", "name the next state, or write \"End\": true", key=True)
    if "End" in state and state["End"] is not True:
        hint = "leave it out if there is a `Next`"
        found.error((*path, "End"), f"`End` must be true, not {_shown(state['End'])}", hint)


# ------------------------------------------------------------------- types of states


def _action(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    url = ""
    if "ActionUrl" in state and "Handler" in state:
        found.error((*path, "Handler"), "`ActionUrl` and `Handler` exclude each other", "keep one", key=True)
    elif "ActionUrl" not in state and "Handler" not in state:
        hint = "write the action provider's address, such as https://transfer.actions.globus.org/transfer"
        found.error(path, "neither `ActionUrl` nor `Handler`", hint, key=True)
    if "ActionUrl" in state:
        url = _url(found, state["ActionUrl"], (*path, "ActionUrl"), "`ActionUrl`")
    if "Handler" in state:
        url = _handler(found, state["Handler"], (*path, "Handler")) or url
    for key in ("ActionScope", "RunAs"):
        if key in state:
            _text(found, state[key], (*path, key), f"`{key}`")
    failing = state.get("ExceptionOnActionFailure", True)
    if not isinstance(failing, bool):
        found.error((*path, "ExceptionOnActionFailure"), f"this must be true or false, not {_shown(failing)}")
    _wait_time(found, state, path, url)
    _provider(found, state, path, url)


def _handler(found: _Found, handler: object, path: Path) -> str:
    """Return the handler's address, if it has one."""
    if not isinstance(handler, dict):
        hint = 'write {"Type": "ActionProvider", "Url": ...}'
        found.error(path, f"`Handler` must be an object, not {_shown(handler)}", hint)
        return ""
    needed = {"ActionProvider": "Url", "RegisteredAPI": "Id"}
    kind = handler.get("Type")
    if not isinstance(kind, str) or kind not in needed:
        place = (*path, "Type") if "Type" in handler else path
        message = f"there is no type {_shown(kind)}" if "Type" in handler else "`Type` is missing"
        found.error(place, message, "write ActionProvider or RegisteredAPI", key="Type" not in handler)
        return ""
    key = needed[kind]
    known = ("Type", "Url", "Scope") if kind == "ActionProvider" else ("Type", "Id")
    _unknown_keys(found, handler, path, known, f"a handler of type {kind}")
    if key not in handler:
        found.error(path, f"a handler of type {kind} must have `{key}`", key=True)
        return ""
    for one in ("Id", "Scope"):
        if one in handler and one in known:
            _text(found, handler[one], (*path, one), f"`{one}`")
    return _url(found, handler["Url"], (*path, "Url"), "`Url`") if key == "Url" else ""


def _wait_time(found: _Found, state: Mapping[str, Any], path: Path, url: str) -> None:
    wait = state.get("WaitTime", WAIT_DEFAULT_S)
    place = (*path, "WaitTime")
    if isinstance(wait, bool) or not isinstance(wait, int | float) or wait <= 0:
        hint = "write for example 172800: two days"
        found.error(place, f"`WaitTime` is a number of seconds, not {_shown(wait)}", hint)
    elif url == _TRANSFER and wait < TRANSFER_WAIT_S:
        told = f"`WaitTime` is {wait:g} s" if "WaitTime" in state else f"`WaitTime` is {WAIT_DEFAULT_S} s unless set"
        found.warning(
            place if "WaitTime" in state else path, f"{told}: a transfer that takes longer is given up",
            "write 172800, two days", key="WaitTime" not in state,
        )
    elif wait > RUN_S_MAX:
        found.warning(place, "`WaitTime` is longer than a run may last", "a run ends after a year: 31536000 s")


def _expression_eval(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    """Nothing but what all types share."""


def _pass(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    if "Result" not in state:
        return
    place = (*path, "Result")
    if not isinstance(state["Result"], dict):
        found.error(place, f"`Result` must be an object, not {_shown(state['Result'])}")
        return
    for key in ("Parameters", "InputPath"):
        if key in state:
            found.warning((*path, key), f"`Result` is given, so `{key}` has no effect", "keep one", key=True)
    for key in state["Result"]:
        if key.endswith((".$", ".=")):
            found.warning(
                (*place, key), "`Result` is constant: this key stays as it is written",
                "write `Parameters` instead of `Result`", key=True,
            )


def _wait(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    given = [key for key in _SHAPES["Wait"].optional if key in state]
    if not given:
        found.error(path, "a Wait state must say how long", "write `Seconds`, or one of the others", key=True)
    for key in given[1:]:
        found.error((*path, key), f"`{key}` and `{given[0]}` exclude each other", "keep one", key=True)
    for key in given:
        place, value = (*path, key), state[key]
        if key.endswith("Path"):
            _path(found, value, place, one=True)
        elif key == "Timestamp":
            _timestamp(found, value, place)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            found.error(place, f"`Seconds` is a whole number, not {_shown(value)}", "write for example 120")
        elif value > RUN_S_MAX:
            found.warning(place, "this wait is longer than a run may last", "a run ends after a year: 31536000 s")


def _fail(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    for key in ("Error", "Cause"):
        if key in state and f"{key}Path" in state:
            found.error((*path, f"{key}Path"), f"`{key}` and `{key}Path` exclude each other", "keep one", key=True)
        if key in state and not isinstance(state[key], str):
            found.error((*path, key), f"`{key}` must be a text, not {_shown(state[key])}")
        if f"{key}Path" in state:
            _path(found, state[f"{key}Path"], (*path, f"{key}Path"), one=True)


def _create_web_input(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    parameters = state.get("Parameters")
    if not isinstance(parameters, dict):
        return
    place: Path = (*path, "Parameters")
    _required(found, parameters, place, ("InputType", "Options"), "a web input")
    kind = parameters.get("InputType", "Selection")
    if kind != "Selection":
        found.error((*place, "InputType"), f"there is no input of type {_shown(kind)}", "write Selection")
    options = parameters.get("Options", [{}])
    if not isinstance(options, list) or not options:
        found.error((*place, "Options"), "`Options` must be a list of at least one", 'write [{"Value", "Label"}]')
        return
    for number, option in enumerate(options if "Options" in parameters else ()):
        if isinstance(option, dict):
            _required(found, option, (*place, "Options", number), ("Value", "Label"), "an option")
        else:
            found.error((*place, "Options", number), f"an option must be an object, not {_shown(option)}")


def _await_web_input(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    parameters = state.get("Parameters")
    if isinstance(parameters, dict) and not {"web_input_id", "WebInputId"} & {_base(key) for key in parameters}:
        hint = "write \"web_input_id.$\": the path of the result of CreateWebInput, and .web_input_id"
        found.warning((*path, "Parameters"), "`web_input_id` is missing", hint, key=True)


# ----------------------------------------------------------------------------- Choice

_COMPARED = {"String": "a text", "Numeric": "a number", "Timestamp": "a time"}
_OPERATORS: dict[str, str] = {  # -> what its value must be
    f"{kind}{how}{end}": "a path" if end else value
    for kind, value in _COMPARED.items()
    for how in ("Equals", "LessThan", "GreaterThan", "LessThanEquals", "GreaterThanEquals")
    for end in ("", "Path")
} | {"BooleanEquals": "true or false", "BooleanEqualsPath": "a path", "StringMatches": "a text"} | {
    f"Is{what}": "true or false" for what in ("Present", "Null", "String", "Numeric", "Boolean", "Timestamp")
}  # fmt: skip
_JOINERS = ("And", "Or", "Not")


def _choice(found: _Found, state: Mapping[str, Any], path: Path) -> None:
    choices = state.get("Choices")
    if "Default" in state:
        _text(found, state["Default"], (*path, "Default"), "`Default`")
    if "Choices" not in state:
        return
    if not isinstance(choices, list) or not choices:
        told = "empty" if isinstance(choices, list) else _shown(choices)
        found.error((*path, "Choices"), f"`Choices` must be a list of at least one rule, not {told}")
        return
    for number, rule in enumerate(choices):
        _rule(found, rule, (*path, "Choices", number), top=True)
    if "Default" not in state and not _complementary(choices):
        found.warning(
            path, "without a `Default`, the run fails when no choice applies",
            "name the state that is to follow then", key=True,
        )


def _complementary(choices: Sequence[Any]) -> bool:
    """Say whether one rule asks for what another excludes, so that one of them always applies."""
    asked = {
        (json.dumps(rule.get("Variable")), key, value)
        for rule in choices if isinstance(rule, dict)
        for key, value in rule.items() if isinstance(value, bool)
    }  # fmt: skip
    return any((variable, key, not value) in asked for variable, key, value in asked)


def _rule(found: _Found, rule: object, path: Path, *, top: bool) -> None:
    if not isinstance(rule, dict):
        found.error(path, f"a choice rule must be an object, not {_shown(rule)}", 'write {"Variable": "$.a", ...}')
        return
    operators = [key for key in rule if key in _OPERATORS or key in _JOINERS]
    known = ("Variable", "Comment", *_JOINERS, *_OPERATORS, *(("Next",) if top else ()))
    foreign = {} if top else {"Next": "only the outermost rule of a choice leads somewhere"}
    _unknown_keys(found, rule, path, known, "a choice rule", foreign)
    if top and "Next" not in rule:
        found.error(path, "a choice must have `Next`", "name the state that follows", key=True)
    for key in operators[1:]:
        hint = 'join several by {"And": [...]}'
        found.error((*path, key), f"a rule asks one thing: `{key}` and `{operators[0]}`", hint, key=True)
    if not operators:
        asks = "say what is asked, such as \"IsPresent\": true"
        if all(key in known for key in rule):  # else a misspelt operator has been told
            found.error(path, "a choice rule without an operator", asks, key=True)
        return
    for key in operators:
        if key in _JOINERS:
            _joined(found, rule[key], (*path, key), key)
        else:
            _operand(found, rule[key], (*path, key), key)
    compares = any(key in _OPERATORS for key in operators)
    if compares and "Variable" not in rule:
        found.error(path, "`Variable` is missing", "write the path of what is looked at", key=True)
    elif not compares and "Variable" in rule:
        found.error((*path, "Variable"), f"`{operators[0]}` has no `Variable` of its own", "write it inside", key=True)
    elif compares:
        # That a key is absent is what IsPresent asks for.
        _path(found, rule["Variable"], (*path, "Variable"), one=True, needed="IsPresent" not in rule)


def _joined(found: _Found, value: object, path: Path, key: str) -> None:
    if key == "Not":
        _rule(found, value, path, top=False)
    elif not isinstance(value, list) or not value:
        told = "empty" if isinstance(value, list) else _shown(value)
        found.error(path, f"`{key}` must be a list of rules, not {told}")
    else:
        for number, inner in enumerate(value):
            _rule(found, inner, (*path, number), top=False)


def _operand(found: _Found, value: object, path: Path, key: str) -> None:
    wanted = _OPERATORS[key]
    right = {
        "a text": isinstance(value, str),
        "a number": isinstance(value, int | float) and not isinstance(value, bool),
        "true or false": isinstance(value, bool),
    }
    if wanted == "a path":
        _path(found, value, path, one=True)
    elif wanted == "a time":
        _timestamp(found, value, path)
    elif not right[wanted]:
        hint = f"to compare with a value of the state, write `{key}Path`" if f"{key}Path" in _OPERATORS else ""
        found.error(path, f"`{key}` takes {wanted}, not {_shown(value)}", hint)


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def _timestamp(found: _Found, value: object, path: Path) -> None:
    good = isinstance(value, str) and _RFC3339.fullmatch(value) is not None
    if good:
        try:
            datetime.fromisoformat(re.sub(r"\.\d+", "", str(value)))
        except ValueError:
            good = False
    if not good:
        found.error(path, f"{_shown(value)} is no time", "write it with its zone: 2026-11-25T02:08:00Z")


# ------------------------------------------------------------------------------ Catch

_ERRORS = (
    "ActionUnableToRun", "ActionFailedException", "ActionTimeout", "NoTokenException", "States.Runtime",
    "States.ParameterPathFailure", "Flows.WebInputExpired", "States.ALL",
)  # fmt: skip
_ALL = ("States.ALL", "States.All")  # the second is what some tools write


def _catch(found: _Found, catchers: object, path: Path) -> None:
    if not isinstance(catchers, list):
        hint = 'write [{"ErrorEquals": ["ActionTimeout"], "Next": ...}]'
        found.error(path, f"`Catch` must be a list, not {_shown(catchers)}", hint)
        return
    everything = False
    for number, catcher in enumerate(catchers):
        place: Path = (*path, number)
        if not isinstance(catcher, dict):
            found.error(place, f"a catcher must be an object, not {_shown(catcher)}")
            continue
        if everything:
            found.warning(place, "the catcher before it takes every error: this one is never used", "put it first")
        _unknown_keys(found, catcher, place, ("ErrorEquals", "Next", "ResultPath", "Comment"), "a catcher")
        for key in ("ErrorEquals", "Next"):
            if key not in catcher:
                found.error(place, f"a catcher must have `{key}`", key=True)
        if "ResultPath" in catcher:
            _result_path(found, catcher["ResultPath"], (*place, "ResultPath"))
        names = catcher.get("ErrorEquals", ["States.ALL"])
        if not isinstance(names, list) or not names:
            hint = 'write for example ["ActionTimeout", "ActionFailedException"]'
            found.error((*place, "ErrorEquals"), f"`ErrorEquals` must be a list of names, not {_shown(names)}", hint)
            continue
        everything = everything or any(name in _ALL for name in names)
        for at, name in enumerate(names):
            _error_name(found, name, (*place, "ErrorEquals", at))


def _error_name(found: _Found, name: object, path: Path) -> None:
    if not _text(found, name, path, "the name of an error") or name in _ERRORS or name in _ALL:
        return
    hint = _nearest(str(name), _ERRORS)
    if hint.startswith("did you mean"):
        found.error(path, f"there is no error {_shown(name)}, so it is never caught", hint)
    else:
        found.warning(path, f"{_shown(name)} is not among the errors that are known", hint)


# ------------------------------------------------------------------------- parameters

_PRIVATE = "__Private_Parameters"


def _base(key: str) -> str:
    """Return a parameter's name without the mark of a path or an expression."""
    return key[:-2] if key.endswith((".$", ".=")) else key


def _parameters(found: _Found, parameters: Mapping[str, Any], path: Path) -> None:
    names: dict[str, str] = {}
    for key, value in parameters.items():
        place, base = (*path, key), _base(key)
        if key == _PRIVATE:
            _private(found, value, place, parameters)
            continue
        if not base:
            found.error(place, "a parameter without a name", "write the name before `.$` or `.=`", key=True)
        if base in names:
            found.error(place, f"`{base[:80]}` is given twice: also as `{names[base][:80]}`", "keep one", key=True)
        names[base] = key
        if key.endswith(".$"):
            _path(found, value, place, parameter=True)
        elif key.endswith(".="):
            if isinstance(value, str):
                _expression(found, value, place)
            else:
                hint = f"for a constant write `{base[:80]}`"
                found.error(place, f"an expression must be a text, not {_shown(value)}", hint)
        else:
            _constant(found, key, value, place)


def _constant(found: _Found, key: str, value: object, path: Path) -> None:
    """Look into a constant for parameters further down, and for what was meant to be one."""
    if isinstance(value, dict):
        _parameters(found, value, path)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _constant(found, key, item, (*path, number))
    elif isinstance(value, str) and value.startswith(("$.", "$[")) and _PATH.fullmatch(value):
        inside = isinstance(path[-1], int)
        hint = "let an expression make the list" if inside else f"write `{key[:80]}.$` to get what is there"
        found.warning(path, f"{_shown(value)} is taken as a text, not as a path", hint)


def _private(found: _Found, names: object, path: Path, parameters: Mapping[str, Any]) -> None:
    if not isinstance(names, list):
        found.error(path, f"`{_PRIVATE}` must be a list of names, not {_shown(names)}")
        return
    known, missing = set(_names_below(parameters)), 0
    for number, name in enumerate(names):
        if not isinstance(name, str):
            found.error((*path, number), f"the name of a parameter must be a text, not {_shown(name)}")
        elif _base(name) not in known and (missing := missing + 1) <= FAULTS_MAX:
            found.warning((*path, number), f"there is no parameter {_shown(name)} to hide", _nearest(name, known))


def _names_below(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key != _PRIVATE:
                yield _base(key)
                yield from _names_below(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names_below(item)


# ------------------------------------------------------------------------------ paths

_KEY = r"""[^\s.\[\]'"`$*()?@,:+=<>]+"""
_QUOTED = r"""'[^'\\]+'|"[^"\\]+\""""
_SLICE = r"-?\d+|\*|-?\d*:-?\d*(?::-?\d*)?"
_PATH = re.compile(rf"\$(?:\.(?:{_KEY}|\*)|\[(?:{_SLICE}|{_QUOTED})\])*")  # of any number of values
_ONE = re.compile(rf"\$(?:\.{_KEY}|\[(?:-?\d+|{_QUOTED})\])*")  # of one value
_ROOT = re.compile(rf"""\$(?:\.({_KEY})|\['([^'\\]+)'\]|\["([^"\\]+)"\])""")


def _root(path: str) -> str:
    """Return the key of the state where a path begins; empty for the whole state."""
    match = _ROOT.match(path)
    return next((group for group in match.groups() if group), "") if match else ""


def _path(
    found: _Found, value: object, path: Path, *, one: bool = False, needed: bool = True, parameter: bool = False
) -> None:
    """Check a path that is read. `one`: it must lead to one value; `needed`: what it leads to must be there."""
    if not isinstance(value, str):
        hint = "for a constant, write the key without `.$`" if parameter else "write for example `$.source.path`"
        found.error(path, f"a path must be a text, not {_shown(value)}", hint)
        return
    if (_ONE if one else _PATH).fullmatch(value):
        if needed:
            found.uses_key(_root(value), path)
        return
    if not one and value.startswith("$") and ("[?" in value or ".." in value.rstrip(".")):
        found.warning(path, f"{_shown(value)}: filters and searches in paths are not known to work", "name each step")
        return
    found.error(path, *_path_fault(value, one, parameter))


def _path_fault(value: str, one: bool, parameter: bool) -> tuple[str, str]:
    if value.startswith("$$"):
        return f"{_shown(value)}: there is no `$$`", "what the service knows of the run is in `$._context`"
    if one and _PATH.fullmatch(value):
        return f"{_shown(value)} may lead to several values", "name one, by a number instead of `*` or `:`"
    if not value.startswith("$"):
        plain = f"$.{value.lstrip('.')}"
        hint = f"write `{plain[:80]}`" if _PATH.fullmatch(plain) else ""
        if parameter:
            hint += f"{'; ' if hint else ''}for a constant take `.$` off the key, for an expression write `.=`"
        return f"the path {_shown(value)} does not begin with `$.`", hint
    if (match := _PATH.match(value)) and value[match.end() :].lstrip()[:1] in tuple("+*=<>-/") and parameter:
        return f"{_shown(value)} is no path", "for an expression, end the key in `.=` instead of `.$`"
    end = match.end() if match else 0
    if end == 1 and re.match(r"\w", value[1:]):
        return f"{_shown(value)} is no path", f"write `$.{value[1:][:80]}`"
    return f"the path {_shown(value)} cannot be read from its character {end + 1}", "write for example `$.source.path`"


def _result_path(found: _Found, value: object, path: Path) -> None:
    """Check a path that is written."""
    if not isinstance(value, str):
        found.error(path, f"`ResultPath` must be a text, not {_shown(value)}", "write for example `$.delivered`")
    elif not _ONE.fullmatch(value):
        found.error(path, *_path_fault(value, one=True, parameter=False))


# ------------------------------------------------------------------------ expressions

_FUNCTIONS = ("pathsplit", "is_present", "getattr", "len", "str")
_METHODS = ("split", "rpartition", "rstrip", "endswith")
# Plausible for an evaluator of Python expressions, but seen in no published flow.
_MAYBE_FUNCTIONS = frozenset({
    "int", "float", "bool", "list", "dict", "set", "tuple", "range", "sum", "min", "max", "abs", "round", "sorted",
    "any", "all", "rand", "randint",
})  # fmt: skip
_MAYBE_METHODS = frozenset(name for kind in (str, list, dict) for name in dir(kind) if not name.startswith("_"))

_SURE = (
    ast.Expression, ast.expr_context, ast.boolop, ast.BoolOp, ast.BinOp, ast.Add, ast.Mult, ast.Compare, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Not, ast.USub, ast.UAdd, ast.UnaryOp, ast.IfExp,
    ast.Attribute, ast.Subscript, ast.Slice, ast.List, ast.Dict, ast.ListComp, ast.comprehension, ast.Call,
    ast.Constant, ast.Name,
)  # fmt: skip
_MAYBE: dict[type[ast.AST], str] = {
    ast.Sub: "`-`", ast.Div: "`/`", ast.FloorDiv: "`//`", ast.Mod: "`%`", ast.Pow: "`**`", ast.Is: "`is`",
    ast.IsNot: "`is not`", ast.Tuple: "a tuple", ast.Set: "a set", ast.SetComp: "a set comprehension",
    ast.DictComp: "a dict comprehension", ast.GeneratorExp: "a generator", ast.JoinedStr: "an f-string",
    ast.keyword: "an argument with a name",
}  # fmt: skip
_PART_OF_OTHERS = (ast.FormattedValue,)  # told as the f-string it is in
_NEVER: dict[type[ast.AST], str] = {
    ast.Lambda: "`lambda`", ast.NamedExpr: "`:=`", ast.Await: "`await`", ast.Yield: "`yield`",
    ast.YieldFrom: "`yield`", ast.Starred: "`*` before a value", ast.MatMult: "`@`", ast.BitAnd: "`&`",
    ast.BitOr: "`|`", ast.BitXor: "`^`", ast.Invert: "`~`", ast.LShift: "`<<`", ast.RShift: "`>>`",
}  # fmt: skip
_KNOWN_HINT = "known are +, *, comparisons, in, and/or/not, a if b else c, lists, dicts, [i] and [a:b]"


def _expression(found: _Found, text: str, path: Path) -> None:
    """Check an expression: Python's own syntax, after each path in backticks is replaced by a name."""
    if len(text) > EXPRESSION_MAX:
        found.warning(path, f"this expression has more than {EXPRESSION_MAX:,} characters; it was not checked")
        return
    if not text.strip():
        found.error(path, "this expression is empty", "for an empty text write `''`")
        return
    paths: dict[str, str] = {}
    prefix = "_path"
    while prefix in text:
        prefix += "_"

    def name(match: re.Match[str]) -> str:
        paths[f"{prefix}{len(paths)}"] = match[1]
        return f" {prefix}{len(paths) - 1} "

    # A text with a line break in it is no Python, but works in published flows.
    plain = re.sub(r"`([^`]*)`", name, re.sub(r"[\r\n\t\f]", " ", text)).strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python on what it parses: not of the flow
            tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        found.error(path, *_syntax(error, text, plain))
        return
    _nodes(found, tree, paths, path)


def _syntax(error: Exception, text: str, plain: str) -> tuple[str, str]:
    shown = _shown(text)
    if text.count("`") % 2:
        return f"{shown}: a backtick is not closed", "a path stands between two: `$.a.b`"
    if re.search(r"\$[.\[]", re.sub(r"'[^']*'|\"[^\"]*\"", "", plain)):
        return f"{shown} is no expression: a path stands in it", "write its keys with dots, or put it in backticks"
    if isinstance(error, SyntaxError):
        what = (error.msg or "it cannot be read").partition("(")[0].strip()
        if re.search(r"&&|\|\||(?<![=!<>])=(?!=)", plain):
            return f"{shown} is no expression: {what}", "write `and`, `or`, `not`, `==`, as Python does"
        return f"{shown} is no expression: {what}", "check quotes and brackets; a text stands in quotes"
    return f"{shown} is no expression", "it is nested too deeply, or holds a character that cannot stand there"


def _nodes(found: _Found, tree: ast.Expression, paths: Mapping[str, str], path: Path) -> None:
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    told: set[str] = set()

    def tell(how: Callable[..., None], message: str, hint: str = "") -> None:
        if message not in told:
            told.add(message)
            how(path, message, hint)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _call(tell, found, node)
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith("__"):
                tell(found.error, f"`{node.attr[:80]}` cannot be used in an expression")
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, str | int | float | None):
                shown = ast.unparse(node)[:60]
                tell(found.error, f"`{shown}` cannot be used in an expression", "JSON has no such value")
        elif isinstance(node, ast.Name):
            if id(node) in called or node.id in bound:
                continue
            if node.id in paths:
                _path(found, paths[node.id], path)
            elif node.id in ("true", "false", "null"):
                word = {"true": "True", "false": "False", "null": "None"}[node.id]
                tell(found.warning, f"`{node.id}` is taken as a key of the state", f"write {word}")
            else:
                found.uses_key(node.id, path)
        elif (kind := type(node)) in _MAYBE:
            tell(found.warning, f"{_MAYBE[kind]} is not known to work in expressions", _KNOWN_HINT)
        elif not isinstance(node, (*_SURE, *_PART_OF_OTHERS)):
            tell(found.error, f"{_NEVER.get(kind, kind.__name__)} cannot be used in an expression", _KNOWN_HINT)


def _call(tell: Callable[..., None], found: _Found, node: ast.Call) -> None:
    match node.func:
        case ast.Name(id=name) if name in _FUNCTIONS:
            first = node.args[0] if node.args else None
            quoted = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if first is None:
                tell(found.error, f"`{name}` takes an argument")
            elif name in ("is_present", "getattr") and not quoted:
                example = "getattr('a.b', default)" if name == "getattr" else "is_present('a.b')"
                tell(found.warning, f"`{name}` takes the path as a text", f"write {example}")
        case ast.Name(id=name) if name in _MAYBE_FUNCTIONS:
            tell(found.warning, f"the function `{name}` is not known to work", _nearest(name, _FUNCTIONS))
        case ast.Name(id=name):
            tell(found.error, f"there is no function `{name[:80]}`", _nearest(name, _FUNCTIONS))
        case ast.Attribute(attr=name) if name in _METHODS:
            pass
        case ast.Attribute(attr=name) if name in _MAYBE_METHODS:
            tell(found.warning, f"the method `{name}` is not known to work", _nearest(name, _METHODS))
        case ast.Attribute(attr=name):
            tell(found.error, f"there is no method `{name[:80]}`", _nearest(name, _METHODS))
        case _:
            tell(found.error, "only a function or a method can be called", f"known are: {', '.join(_FUNCTIONS)}")


# -------------------------------------------------------------------- action providers


@dataclass(frozen=True, slots=True)
class _Provider:
    """What an action provider must be given."""

    required: tuple[str, ...] = ()
    items: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a list -> what each of its items must have


_TRANSFER = "https://transfer.actions.globus.org/transfer"
_PROVIDERS = {
    _TRANSFER: _Provider(
        ("source_endpoint", "destination_endpoint", "DATA"), {"DATA": ("source_path", "destination_path")}
    ),
    "https://transfer.actions.globus.org/delete": _Provider(("endpoint", "DATA"), {"DATA": ("path",)}),
    "https://transfer.actions.globus.org/mkdir": _Provider(("endpoint_id", "path")),
    "https://transfer.actions.globus.org/ls": _Provider(("endpoint_id",)),
    "https://transfer.actions.globus.org/stat": _Provider(("endpoint_id", "path")),
    "https://transfer.actions.globus.org/manage_permission": _Provider(("operation", "endpoint_id")),
    "https://transfer.actions.globus.org/collection_info": _Provider(("endpoint_id",)),
    "https://transfer.actions.globus.org/gcp/create_guest_collection": _Provider(),
    "https://transfer.actions.globus.org/gcsv5/create_guest_collection": _Provider(),
    "https://compute.actions.globus.org/v3": _Provider(("endpoint_id", "tasks"), {"tasks": ("function_id",)}),
    "https://actions.globus.org/search/ingest": _Provider(("search_index", "subject", "visible_to", "content")),
    "https://actions.globus.org/search/delete": _Provider(("search_index", "delete_by")),
    "https://actions.globus.org/notification/notify": _Provider(("destination", "subject", "body_template")),
    "https://actions.globus.org/weboption/wait_for_option": _Provider(),
    "https://actions.globus.org/datacite/mint/basic_auth": _Provider(),
    "https://actions.globus.org/expression_eval": _Provider(),
    "https://actions.globus.org/hello_world": _Provider(),
}
_HOSTS = {urlsplit(url).netloc for url in _PROVIDERS}
_PERMISSION = {
    "CREATE": ("path", "principal_type", "permissions"), "UPDATE": ("rule_id", "permissions"), "DELETE": ("rule_id",),
}  # fmt: skip
_RETIRED_HOSTS = ("actions.globus.org", "actions.automate.globus.org")
_RENAMED_ACTIONS = {"set_permission": "manage_permission"}
_RENAMED_INPUTS = {
    "source_endpoint_id": "source_endpoint", "destination_endpoint_id": "destination_endpoint",
    "transfer_items": "DATA",
}  # fmt: skip


def _url(found: _Found, value: object, path: Path, what: str) -> str:
    """Return an action's address without the slash at its end; empty if it is none."""
    if not _text(found, value, path, what):
        return ""
    url = str(value)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme != "https" or not host or re.search(r"\s", url):
        hint = f"write https{url[4:80]}" if url.startswith("http://") else "write https://..."
        found.error(path, f"{what} must be an https address, not {_shown(url)}", hint)
        return ""
    steps = [step for step in parts.path.split("/") if step]
    plain = "/".join([f"https://{host}", *steps])
    if host in _RETIRED_HOSTS and steps[:1] == ["transfer"]:
        last = steps[-1] if len(steps) > 1 else "transfer"
        new = f"https://transfer.actions.globus.org/{_RENAMED_ACTIONS.get(last, last)}"
        hint = f"write {new if new in _PROVIDERS else 'an address under https://transfer.actions.globus.org/'}"
        if last == "transfer":
            hint += f"; inputs are now {', '.join(_RENAMED_INPUTS.values())}"
        found.error(path, f"{_shown(url)} was retired on 2025-01-22", hint)
    elif host in _HOSTS and plain not in _PROVIDERS:
        found.warning(path, f"{_shown(url)} is no action that is known", _nearest(plain, _PROVIDERS))
    return plain


def _provider(found: _Found, state: Mapping[str, Any], path: Path, url: str) -> None:
    """Tell what an action provider will miss. What comes as a path or an expression is not looked into."""
    provider, parameters = _PROVIDERS.get(url), state.get("Parameters")
    if provider is None or not isinstance(parameters, dict):
        return
    place: Path = (*path, "Parameters")
    what = f"the action {url.rpartition('/')[2]}" if url != "https://compute.actions.globus.org/v3" else "compute"
    required = list(provider.required)
    if url.endswith("/manage_permission") and "operation" in parameters:
        operation = parameters["operation"]
        if isinstance(operation, str) and operation in _PERMISSION:
            required += _PERMISSION[operation]
        else:
            hint = f"write {', '.join(_PERMISSION)}"
            found.warning((*place, "operation"), f"there is no operation {_shown(operation)}", hint)
    _required(found, parameters, place, required, what)
    for key, needed in provider.items.items():
        items = parameters.get(key)
        if key in parameters and not isinstance(items, list):
            found.warning((*place, key), f"`{key}` must be a list, not {_shown(items)}")
        for number, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict):
                _required(found, item, (*place, key, number), needed, f"an item of `{key}`")
            else:
                found.warning((*place, key, number), f"an item of `{key}` must be an object, not {_shown(item)}")


def _required(found: _Found, given: Mapping[str, Any], path: Path, required: Sequence[str], what: str) -> None:
    names = {_base(key) for key in given}
    for name in required:
        if name in names:
            continue
        old = next((old for old, new in _RENAMED_INPUTS.items() if new == name and old in names), None)
        hint = f"`{old}` is what the retired action took" if old else f"write `{name}`, `{name}.$` or `{name}.=`"
        found.warning(path, f"{what} needs `{name}`", hint, key=True)


_READERS: dict[str, Callable[[_Found, Mapping[str, Any], Path], None]] = {
    "Action": _action, "ExpressionEval": _expression_eval, "Pass": _pass, "Choice": _choice, "Wait": _wait,
    "Fail": _fail, "CreateWebInput": _create_web_input, "AwaitWebInput": _await_web_input,
}  # fmt: skip


# ------------------------------------------------------------------- ways through a flow


def _leads(state: object) -> Iterator[tuple[Path, str]]:
    """Yield where a state may lead: path within it, and name. A path that begins with `Catch` is taken by errors."""
    if not isinstance(state, dict):
        return
    for key in ("Next", "Default"):
        if isinstance(state.get(key), str):
            yield (key,), state[key]
    for key in ("Choices", "Catch"):
        several = state.get(key)
        for number, each in enumerate(several if isinstance(several, list) else ()):
            if isinstance(each, dict) and isinstance(each.get("Next"), str):
                yield (key, number, "Next"), each["Next"]


def _ways(found: _Found, start: object, states: Mapping[str, Any]) -> None:
    """Tell of states that do not exist, are never reached, never end, or need what an earlier one has replaced."""
    whole = True  # what follows from a fault that was told is not told again
    for name, state in states.items():
        for place, target in _leads(state):
            if target not in states:
                whole = False
                hint = "" if found.full else _nearest(target, states, "state")
                found.error(("States", name, *place), f"there is no state {_shown(target)}", hint)
        for place in _wrong_leads(state):
            whole = False
            found.error(("States", name, *place), "`Next` must be the name of a state")
        whole = whole and _leads_on(state)
    if not isinstance(start, str) or start not in states:
        return
    if whole:
        leads = {name: [target for _, target in _leads(state)] for name, state in states.items()}
        reached = _reached([start], leads)
        for name in states:
            if name not in reached:
                found.error(("States", name), f"nothing leads to {_shown(name)}", "remove it, or lead to it", key=True)
        _endless(found, states, reached)
    _replaced(found, start, states)


def _wrong_leads(state: object) -> Iterator[Path]:
    if not isinstance(state, dict):
        return
    if "Next" in state and not isinstance(state["Next"], str) and state.get("Type") not in ("Choice", "Fail"):
        yield ("Next",)
    for key in ("Choices", "Catch"):
        several = state.get(key)
        for number, each in enumerate(several if isinstance(several, list) else ()):
            if isinstance(each, dict) and "Next" in each and not isinstance(each["Next"], str):
                yield key, number, "Next"


def _leads_on(state: object) -> bool:
    """Say whether a state ends the run or leads somewhere, as its type has to."""
    return isinstance(state, dict) and (_ends(state) or any(place[0] != "Catch" for place, _ in _leads(state)))


def _ends(state: Mapping[str, Any]) -> bool:
    return state.get("Type") == "Fail" or state.get("End") is True


def _reached(start: Sequence[str], leads: Mapping[str, Sequence[str]]) -> set[str]:
    reached, waiting = set(start), list(start)
    while waiting:
        for name in leads.get(waiting.pop(), ()):
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached


def _endless(found: _Found, states: Mapping[str, Any], reached: set[str]) -> None:
    before: dict[str, list[str]] = {}
    for name, state in states.items():
        for _, target in _leads(state):
            before.setdefault(target, []).append(name)
    ending = _reached([name for name, state in states.items() if _ends(state)], before)
    endless = [name for name in states if name in reached and name not in ending]
    if endless:
        others = ", ".join(_shown(name) for name in endless[1:6])
        more = f" (nor from {others}{', …' if len(endless) > 6 else ''})" if others else ""
        found.error(
            ("States", endless[0]), f"from {_shown(endless[0])} no end can be reached{more}",
            "let a Choice lead out of the loop, to a state with \"End\": true", key=True,
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is in a run's state after it was replaced by a result: which keys, and by whose result."""

    keys: frozenset[str]
    by: frozenset[Path]


# What an action provider's status holds.
_STATUS = frozenset({
    "action_id", "status", "details", "display_status", "creator_id", "label", "monitor_by", "manage_by", "start_time",
    "completion_time", "release_after", "state_name",
})  # fmt: skip
_CAUGHT = frozenset({"Error", "Cause"})


def _replaced(found: _Found, start: str, states: Mapping[str, Any]) -> None:
    """Warn of results that replace the whole state while a later state needs what was in it.

    Only what is gone on every way to a state is told. None stands for a state
    that was never replaced: its keys come from the input, and may be any.
    """
    kept: dict[str, _Kept | None] = {start: None}
    waiting, steps = [start], 0
    while waiting:
        name = waiting.pop()
        for place, target in _leads(states[name]):
            steps += 1
            if steps > STEPS_MAX:
                return
            if target not in states:
                continue
            after = _after(states[name], name, place, kept[name])
            joined = _join(kept[target], after) if target in kept else after
            if target not in kept or joined != kept[target]:
                kept[target] = joined
                waiting.append(target)
    needed: dict[Path, tuple[str, str]] = {}  # who replaced -> who needs what
    for name, now in kept.items():
        for root in found.uses.get(name, ()):
            if now is not None and root not in now.keys and not root.startswith("_"):
                for place in sorted(now.by, key=str):
                    needed.setdefault(place, (name, root))
    for place, (name, root) in needed.items():
        explicit, by = len(place) > 2, str(place[1])
        found.warning(
            place, f"what {_shown(by)} returns replaces the whole state, but {_shown(name)} needs `$.{root[:80]}`",
            f"write \"ResultPath\": \"$.{re.sub(r'[^A-Za-z0-9_]', '_', by)[:40]}\"", key=not explicit,
        )


def unfed(definition: object, schema: object) -> list[DefinitionFault]:
    """Return where a state needs what neither the input holds, by its schema, nor any state writes.

    An error where the schema says that an input holds nothing else; where it may, only a warning.
    """
    if _limit(definition) or _limit(schema, "schema") or not isinstance(definition, dict):
        return []
    found = _Found()
    _definition(found, definition)
    states, inputs = definition.get("States"), _inputs(schema, schema)
    if not isinstance(states, dict) or inputs is None:
        return []
    known = set(inputs)
    for name, state in states.items():
        if not isinstance(state, dict):
            return []
        catches = state.get("Catch")
        leads: list[Path] = [("Next",)]
        if isinstance(catches, list) and all(isinstance(each, dict) for each in catches):
            leads += [("Catch", number) for number in range(len(catches))]
        for lead in leads:
            written = _after(state, name, lead, _Kept(frozenset(), frozenset()))
            if written is None:  # something whose keys nobody knows
                return []
            known |= written.keys
    assert isinstance(schema, dict)
    closed = schema.get("additionalProperties") is False and not (_COMBINED | {"$ref"}) & schema.keys()
    unknown = []
    for uses in found.uses.values():
        for root, path in uses.items():
            if root not in known and not root.startswith("_"):
                words = "" if closed else "; an input may hold it all the same, as the schema allows more than it names"
                told = f"`$.{root[:80]}` is neither in the input's schema nor written by a state{words}"
                sure = closed and not str(path[-1]).endswith(".=")  # an expression may ask whether it is there
                unknown.append(DefinitionFault(path, told, _nearest(root, known), "error" if sure else "warning"))
    return unknown[:FAULTS_MAX]


_COMBINED = frozenset({"allOf", "anyOf", "oneOf", "then", "else"})  # schemas that hold for the same value
_SCHEMAS_MAX = 1_000  # of these that are looked at: they may refer to each other without end


def _inputs(schema: object, root: object) -> set[str] | None:
    """Return the names that an input may have; None where that cannot be told."""
    names: set[str] = set()
    waiting, looked = [schema], 0
    while waiting:
        part, looked = waiting.pop(), looked + 1
        if part is True or part is False:
            continue
        if not isinstance(part, dict) or looked > _SCHEMAS_MAX or "patternProperties" in part:
            return None
        properties = part.get("properties", {})
        if not isinstance(properties, dict):
            return None
        names |= properties.keys()
        for key in _COMBINED & part.keys():
            waiting.extend(part[key] if isinstance(part[key], list) else [part[key]])
        if "$ref" in part:
            target = root
            for step in str(part["$ref"]).removeprefix("#").strip("/").split("/"):
                target = target.get(step) if isinstance(target, dict) else None
            if not str(part["$ref"]).startswith("#/"):
                return None
            waiting.append(target)
    return names or None


def _join(one: _Kept | None, other: _Kept | None) -> _Kept | None:
    if one is None or other is None or len(one.keys | other.keys) > KEYS_MAX:
        return None
    return _Kept(one.keys | other.keys, one.by | other.by)


def _after(state: Mapping[str, Any], name: str, lead: Path, now: _Kept | None) -> _Kept | None:
    """Return what is in the state after a result, or the error of a `Catch`, was placed in it."""
    kind, here = state.get("Type"), ("States", name)
    if lead[0] == "Catch":
        catchers: list[Any] = state["Catch"]
        place = catchers[int(lead[1])].get("ResultPath")  # what is done without one is not documented
        if place == "$":
            return _Kept(_CAUGHT, frozenset({(*here, *lead[:2], "ResultPath")}))
        return _placed(now, place)
    if kind in ("Choice", "Wait", "Fail"):
        return now
    place = state.get("ResultPath", "$")
    if place != "$":
        return _placed(now, place)
    by: frozenset[Path] = frozenset({(*here, "ResultPath") if "ResultPath" in state else here})
    parameters, result = state.get("Parameters"), state.get("Result")
    if kind == "Action":
        return _Kept(_STATUS, by)
    if kind in ("CreateWebInput", "AwaitWebInput"):
        return _Kept(frozenset({"web_input_id", "response"}), by)
    if isinstance(result, dict):
        return _Kept(frozenset(result), by)
    if isinstance(parameters, dict):
        return _Kept(frozenset(map(_base, parameters)), by)
    return None if "InputPath" in state else now


def _placed(now: _Kept | None, place: object) -> _Kept | None:
    if now is None or not isinstance(place, str):
        return None
    return _Kept(now.keys | {_root(place)}, now.by)


# ----------------------------------------------------------------- the input of a flow

_FORMATS = ("globus-collection", "globus-principal", "globus-transfer-transfer#0.10", "uuid")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PRINCIPAL = re.compile(rf"(?:urn:globus:(?:auth:identity|groups:id):)?{_UUID.pattern}")


def schema_faults(schema: object) -> list[DefinitionFault]:
    """Return what is wrong with an input schema."""
    if (limit := _limit(schema, "schema")) is not None:
        return [limit]
    if not isinstance(schema, dict):
        hint = 'write {"type": "object", ...}'
        return [DefinitionFault((), f"a schema must be an object, not {_shown(schema)}", hint)]
    from jsonschema.exceptions import SchemaError

    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        return [_told(error, "is no JSON Schema")]
    except RecursionError:
        return [DefinitionFault((), "the schema is nested too deeply")]
    return list(_odd_formats(schema, ()))[:FAULTS_MAX]


def input_faults(schema: object, value: object) -> list[DefinitionFault]:
    """Return what of a flow's input does not fit its schema. Nothing is fetched: a `$ref` stays within the schema."""
    if (limit := _limit(value, "input")) is not None:
        return [limit]
    if any(fault.severity == "error" for fault in schema_faults(schema)):
        return [DefinitionFault((), "the input was not checked, as its schema has faults", "mend the schema first")]
    from jsonschema.exceptions import ValidationError
    from referencing.exceptions import Unresolvable

    assert isinstance(schema, dict)
    found = []
    size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > INPUT_BYTES_MAX:
        hint = "deliver a manifest with the list of files, and pass its path, hash and count"
        found.append(DefinitionFault((), f"the input has {size:,} bytes; at most {INPUT_BYTES_MAX:,} are passed", hint))
    try:
        for error in _validator(schema)(schema, **_offline()).iter_errors(value):
            assert isinstance(error, ValidationError)
            found += _errors(error)
            if len(found) >= FAULTS_MAX:
                break
    except Unresolvable as error:
        hint = "write what it leads to into the schema, under $defs"
        found.append(DefinitionFault((), f"the schema refers to `{str(error.ref)[:200]}`, which is not in it", hint))
    except RecursionError:
        found.append(DefinitionFault((), "the schema refers to itself without end", "look for a `$ref` in a circle"))
    except re.error as error:
        found.append(DefinitionFault((), f"a pattern of the schema cannot be used: {error}"))
    return found[:FAULTS_MAX]


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema import Draft202012Validator, validators

    return validators.validator_for(schema, default=Draft202012Validator)


def _offline() -> dict[str, Any]:
    """Return formats, and a registry that fetches nothing: the library's own would ask the network for a `$ref`."""
    from jsonschema import FormatChecker
    from referencing.jsonschema import EMPTY_REGISTRY

    checker = FormatChecker()
    for name, check in _FORMAT_CHECKS.items():
        checker.checks(name)(check)
    return {"registry": EMPTY_REGISTRY, "format_checker": checker}


def _is_uuid(value: object) -> bool:
    return not isinstance(value, str) or _UUID.fullmatch(value) is not None


def _is_collection(value: object) -> bool:
    """A collection is its UUID, or an object with that and a path."""
    if isinstance(value, dict):
        return isinstance(value.get("id"), str) and _is_uuid(value["id"]) and isinstance(value.get("path", ""), str)
    return _is_uuid(value)


def _is_principal(value: object) -> bool:
    return not isinstance(value, str) or _PRINCIPAL.fullmatch(value) is not None


def _is_transfer(value: object) -> bool:
    if not isinstance(value, dict):
        return True
    items, ends = value.get("DATA"), (value.get("source_endpoint"), value.get("destination_endpoint"))
    return (
        all(isinstance(end, str) and _is_uuid(end) for end in ends)
        and isinstance(items, list)
        and len(items) > 0
        and all(
            isinstance(item, dict) and isinstance(item.get("source_path"), str)
            and isinstance(item.get("destination_path"), str)
            for item in items
        )
    )  # fmt: skip


_FORMAT_CHECKS: dict[str, Callable[[object], bool]] = {
    "uuid": _is_uuid, "globus-collection": _is_collection, "globus-principal": _is_principal,
    "globus-transfer-transfer#0.10": _is_transfer,
}  # fmt: skip
_FORMAT_HINTS = {
    "uuid": "write it as 8-4-4-4-12 hexadecimal digits",
    "globus-collection": "write the collection's UUID; as an object, {\"id\": UUID, \"path\": \"/...\"}",
    "globus-principal": "write urn:globus:auth:identity:UUID, urn:globus:groups:id:UUID, or the UUID alone",
    "globus-transfer-transfer#0.10":
        "write source_endpoint and destination_endpoint (UUIDs), and DATA: [{source_path, destination_path}]",
}  # fmt: skip


def _odd_formats(value: object, path: Path) -> Iterator[DefinitionFault]:
    """Yield misspelt formats of Globus: an unknown format is not checked by anybody."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "format" and isinstance(item, str) and item.startswith("globus") and item not in _FORMATS:
                hint = _nearest(item, _FORMATS)
                yield DefinitionFault((*path, key), f"there is no format {_shown(item)}", hint, "warning")
            yield from _odd_formats(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _odd_formats(item, (*path, number))


def _errors(error: Any) -> list[DefinitionFault]:
    """Return an error of the library as faults: one for each key that is missing or not foreseen."""
    path = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        patterns = error.schema.get("patternProperties", {})
        odd = [
            key for key in error.instance
            if key not in known and not any(re.search(pattern, key) for pattern in patterns)
        ]  # fmt: skip
        if error.validator_value is False:
            return [
                DefinitionFault((*path, key), f"the input has no `{key[:80]}`", _nearest(key, known), at_key=True)
                for key in odd[:FAULTS_MAX]
            ]
    return [_told(error, "does not fit the schema")]


def _told(error: Any, otherwise: str) -> DefinitionFault:
    """Return an error of the library in words for people."""
    path, value, asked = tuple(error.absolute_path), error.instance, error.validator_value
    shown = _shown(value)
    match error.validator:
        case "required":
            key = next((key for key in asked if key not in value), "?")
            missing = re.fullmatch(r"'(.*)' is a required property", error.message)
            return DefinitionFault(path, f"`{missing[1] if missing else key}` is missing", "write it", at_key=True)
        case "type":
            kinds = " or ".join([asked] if isinstance(asked, str) else map(str, asked))
            return DefinitionFault(path, f"this must be of type {kinds}, not {shown}")
        case "enum" if isinstance(asked, list):
            choices = ", ".join(json.dumps(choice, ensure_ascii=False)[:40] for choice in asked[:20])
            return DefinitionFault(path, f"{shown} is none of the choices", f"write one of {choices}")
        case "const":
            return DefinitionFault(path, f"this must be {json.dumps(asked, ensure_ascii=False)[:80]}, not {shown}")
        case "format":
            return DefinitionFault(path, f"{shown} is no {asked}", _FORMAT_HINTS.get(str(asked), ""))
        case "pattern":
            return DefinitionFault(path, f"{shown} does not match the pattern `{str(asked)[:80]}`")
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum" | "multipleOf":
            return DefinitionFault(path, f"{shown} is out of range", f"{error.validator} is {asked}")
        case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties":
            return DefinitionFault(path, f"this has a length of {len(value)}", f"{error.validator} is {asked}")
        case "anyOf" | "oneOf":
            inner = max(error.context, key=lambda each: len(each.absolute_path), default=None)
            told = _told(inner, otherwise) if inner is not None else None
            hint = f"the nearest: {told.json_path}: {told.message}" if told else "keep what only one form allows"
            return DefinitionFault(path, f"{shown} fits {'none' if told else 'several'} of the forms allowed", hint)
        case _:
            return DefinitionFault(path, f"{shown} {otherwise}", str(error.message)[:200])
