"""Judge a flow's input by its input schema: as much of JSON Schema as such schemas use."""

from __future__ import annotations

import re
from typing import Any

from .answer import is_uuid

Problem = tuple[str, str]  # where, in the form `$.a.b[0]`; what

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip
_PROBLEMS_MAX = 50


def problems(value: Any, schema: Any, where: str = "$") -> list[Problem]:
    """Return what is wrong, in document order; an empty list means that the value fits."""
    if schema is True or not isinstance(schema, dict):
        return [] if schema is not False else [(where, f"False schema does not allow {value!r}")]
    found = _kind(value, schema, where)
    if found:
        return found
    found = _general(value, schema, where)
    match value:
        case dict():
            found += _object(value, schema, where)
        case list():
            found += _array(value, schema, where)
        case str():
            found += _string(value, schema, where)
        case int() | float() if not isinstance(value, bool):
            found += _number(value, schema, where)
    return found[:_PROBLEMS_MAX]


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, (object,)))


def _kind(value: Any, schema: dict[str, Any], where: str) -> list[Problem]:
    kinds = schema.get("type")
    if kinds is None:
        return []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if any(_is(value, kind) for kind in kinds):
        return []
    return [(where, f"{value!r} is not of type {', '.join(map(repr, kinds))}")]


def _general(value: Any, schema: dict[str, Any], where: str) -> list[Problem]:
    found: list[Problem] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append((where, f"{value!r} is not one of {schema['enum']!r}"))
    if "const" in schema and value != schema["const"]:
        found.append((where, f"{schema['const']!r} was expected"))
    for one in schema.get("allOf", []):
        found += problems(value, one, where)
    if "anyOf" in schema and all(problems(value, one, where) for one in schema["anyOf"]):
        found.append((where, f"{value!r} is not valid under any of the given schemas"))
    if "oneOf" in schema and sum(not problems(value, one, where) for one in schema["oneOf"]) != 1:
        found.append((where, f"{value!r} is not valid under exactly one of the given schemas"))
    return found


def _object(value: dict[str, Any], schema: dict[str, Any], where: str) -> list[Problem]:
    known = schema.get("properties", {})
    found = [
        (where, f"{name!r} is a required property") for name in schema.get("required", []) if name not in value
    ]  # fmt: skip
    for name, one in value.items():
        if name in known:
            found += problems(one, known[name], f"{where}.{name}")
        elif schema.get("additionalProperties", True) is False:
            found.append((where, f"Additional properties are not allowed ({name!r} was unexpected)"))
        else:
            found += problems(one, schema.get("additionalProperties", True), f"{where}.{name}")
    return found


def _array(value: list[Any], schema: dict[str, Any], where: str) -> list[Problem]:
    found: list[Problem] = []
    if len(value) < schema.get("minItems", 0):
        found.append((where, f"{value!r} is too short"))
    if len(value) > schema.get("maxItems", float("inf")):
        found.append((where, f"{value!r} is too long"))
    for number, one in enumerate(value):
        found += problems(one, schema.get("items", True), f"{where}[{number}]")
    return found


def _string(value: str, schema: dict[str, Any], where: str) -> list[Problem]:
    found: list[Problem] = []
    if len(value) < schema.get("minLength", 0):
        found.append((where, f"{value!r} is too short"))
    if len(value) > schema.get("maxLength", float("inf")):
        found.append((where, f"{value!r} is too long"))
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append((where, f"{value!r} does not match {schema['pattern']!r}"))
    if schema.get("format") in ("uuid", "globus-collection", "globus-principal") and not is_uuid(value[-36:]):
        found.append((where, f"{value!r} is not a {schema['format']!r}"))
    return found


def _number(value: float, schema: dict[str, Any], where: str) -> list[Problem]:
    found: list[Problem] = []
    for name, wrong, words in (
        ("minimum", lambda a, b: a < b, "less than the minimum"),
        ("maximum", lambda a, b: a > b, "greater than the maximum"),
        ("exclusiveMinimum", lambda a, b: a <= b, "less than or equal to the minimum"),
        ("exclusiveMaximum", lambda a, b: a >= b, "greater than or equal to the maximum"),
    ):
        if name in schema and wrong(value, schema[name]):
            found.append((where, f"{value!r} is {words} of {schema[name]!r}"))
    return found
