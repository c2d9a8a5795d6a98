"""The JSON Schema of rule files, for editors. Made from the table that the reader uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigger_daemon import registry
from trigger_daemon.config.rules import NAME_MAX, RULE, RULES_MAX, Section, Special
from trigger_daemon.core.grammar import BIT_UNITS, SIZE_UNITS, Option
from trigger_daemon.core.patterns import PATTERN_MAX

Schema = dict[str, Any]

_NUMBER = r"\d+(\.\d+)?"
_SIZES = "|".join(SIZE_UNITS)
_QUANTITIES = {
    "duration": rf"^\s*{_NUMBER}\s*(ms|s|m|h|d)\s*$",
    "size": rf"^\s*{_NUMBER}\s*({_SIZES})\s*$",
    "percent": rf"^\s*{_NUMBER}\s*%\s*$",
    "rate": rf"^\s*{_NUMBER}\s*({_SIZES}|{'|'.join(BIT_UNITS)})/s\s*$",
}
_TEXT: Schema = {"type": ["string", "number"]}  # a number is taken as it is written
_PATTERN: Schema = {"type": "string", "minLength": 1, "maxLength": PATTERN_MAX}


def rules_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of rule files, with the options of every action and check that loads."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rules of trigger-daemon",
        "type": "object",
        "properties": {"rules": {"type": "array", "maxItems": RULES_MAX, "items": {"$ref": "#/$defs/rule"}}},
        "required": ["rules"],
        "additionalProperties": False,
        "$defs": {"rule": _mapping(RULE), "checks": _one_or_many(_checks()), "start": _start()},
    }


def _mapping(fields: Mapping[str, Option | Special | Section]) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": {name: _field(spec) for name, spec in fields.items()},
        "additionalProperties": False,
    }
    required = [name for name, spec in fields.items() if spec.required]
    return {**schema, "required": required} if required else schema


def _field(spec: Option | Special | Section) -> Schema:
    if isinstance(spec, Section):
        one = _mapping(spec.fields)
        return {"description": spec.doc, **({"type": "array", "items": one} if spec.many else one)}
    if isinstance(spec, Option):
        return _option(spec)
    match spec.kind:
        case "name":
            shape: Schema = {"type": "string", "pattern": "^[a-z0-9-]+$", "maxLength": NAME_MAX}
        case "root":
            shape = {"type": "string", "pattern": r"^(/|[A-Za-z]:[\\/]|\\\\)"}
        case "pattern":
            shape = _PATTERN
        case "patterns":
            shape = _one_or_many(_PATTERN, least=1)
        case "ignores":
            shape = _one_or_many(_PATTERN)
        case "times":
            shape = _one_or_many({"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"})
        case "checks" | "start":
            shape = {"$ref": f"#/$defs/{spec.kind}"}
    return {"description": spec.doc, **shape}


def _option(option: Option) -> Schema:
    shape: Schema
    match option.kind:
        case "text" | "uuid":
            shape = _TEXT
        case "int":
            shape = {"type": "integer"}
            if option.minimum is not None:
                shape["minimum"] = option.minimum
            if option.choices:
                shape = {"anyOf": [shape, {"enum": list(option.choices)}]}
        case "bool":
            shape = {"type": "boolean"}
        case "duration" | "size" | "rate" | "percent":
            shape = {"type": "string", "pattern": _QUANTITIES[option.kind]}
            if option.choices:
                shape = {"anyOf": [shape, {"enum": list(option.choices)}]}
        case "enum":
            shape = {"enum": list(option.choices)}
        case "texts":
            shape = _one_or_many({"enum": list(option.choices)} if option.choices else _TEXT)
        case "ints":
            shape = _one_or_many({"type": "integer"})
        case "list":
            shape = {}  # one value stands for a list of one
        case "map":
            shape = {"type": ["object", "null"]}
    if option.template and option.kind in ("int", "ints"):
        shape = {"anyOf": [shape, {"type": "string", "pattern": r"^\{\w+\|int\}$"}]}
    if option.default is None and not option.required and option.kind not in ("list", "map"):
        shape = {"anyOf": [shape, {"type": "null"}]}
    return {"description": option.doc, **shape}


def _one_or_many(item: Schema, least: int = 0) -> Schema:
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": least}]}


def _choice(names: list[str], options: Mapping[str, Mapping[str, Option] | None]) -> Schema:
    """Return the schema of a mapping with exactly one of these keys."""
    return {
        "type": "object",
        "properties": {
            name: {"anyOf": [{"type": "null"}, _mapping(declared)]} if (declared := options[name]) is not None else {}
            for name in names
        },
        "additionalProperties": False, "minProperties": 1, "maxProperties": 1,
    }


def _checks() -> Schema:
    names = registry.check_names()
    declared: dict[str, Mapping[str, Option] | None] = {}
    for name in names:
        try:
            declared[name] = registry.find_check(name).OPTIONS
        except registry.Unusable:
            declared[name] = None  # its options are not known here
    return {"anyOf": [{"enum": names}, _choice(names, declared)]}


def _start() -> Schema:
    names = registry.action_names()
    declared: dict[str, Mapping[str, Option] | None] = {}
    for name in names:
        try:
            declared[name] = registry.find_action(name).OPTIONS
        except registry.Unusable:
            declared[name] = None
    return {"anyOf": [{"enum": names}, _choice(names, declared)]}
