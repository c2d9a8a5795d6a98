"""Paths and expressions of flow definitions, evaluated over the syntax tree and never by `eval`.

Only what published definitions use is known; anything else is an error of the flow, not a guess.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+|-\d+)\]|\[(['\"])(.+?)\3\]")
_BACKTICK = re.compile(r"`(\$[^`]*)`")
_RESULT_MAX = 1 << 20  # longest text or list an expression may build; more than a whole run may hold
_STRING_METHODS = {
    "split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip", "startswith", "endswith", "lower",
    "upper", "replace", "join", "format", "removeprefix", "removesuffix",
}  # fmt: skip
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


class PathError(LookupError):
    """A path that leads nowhere, or an expression that cannot be evaluated."""


def look_up(path: str, data: Any) -> Any:
    """Follow `$.a.b[0]['c']`. Raises PathError."""
    value, end = data, 1
    if not path.startswith("$"):
        raise PathError(f"{path!r} does not start with $")
    while end < len(path):
        step = _STEP.match(path, end)
        if step is None:
            raise PathError(f"{path!r} is not understood at position {end}")
        key: Any = step[1] or step[4] or int(step[2])
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise PathError(f"{path!r} leads nowhere: there is no {key!r}") from None
        end = step.end()
    return value


def put(path: str | None, data: Any, value: Any) -> Any:
    """Return the data with a value at `$.a.b`; `$` replaces everything, and no path drops the value."""
    if path is None:
        return data
    if path == "$":
        return value
    keys = path.removeprefix("$.").split(".")
    data = dict(data) if isinstance(data, dict) else {}
    here = data
    for key in keys[:-1]:
        here[key] = dict(here[key]) if isinstance(here.get(key), dict) else {}
        here = here[key]
    here[keys[-1]] = value
    return data


def evaluate(text: str, data: Any) -> Any:
    """Evaluate an expression whose names are the keys of the data. Raises PathError."""
    paths: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        paths.append(match[1])
        return f"__path_{len(paths) - 1}"

    try:
        tree = ast.parse(_BACKTICK.sub(stand_in, text).strip(), mode="eval")
        names = {f"__path_{number}": look_up(path, data) for number, path in enumerate(paths)}
        return _Evaluation(data, names).of(tree.body)
    except PathError:
        raise
    except (SyntaxError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise PathError(f"{text!r}: {error}") from None


class _Evaluation:
    def __init__(self, data: Any, names: dict[str, Any]) -> None:
        self._data = data if isinstance(data, dict) else {}
        self._names = names

    def of(self, node: ast.expr) -> Any:
        value = self._of(node)
        if isinstance(value, str | list) and len(value) > _RESULT_MAX:
            raise PathError("the result is too long")
        return value

    def _of(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name)
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self.of(part) for part in parts]
            case ast.Dict(keys=keys, values=values):
                return {self.of(key): self.of(value) for key, value in zip(keys, values, strict=True) if key}
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self._binary(_BINARY[type(op)], self.of(left), self.of(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self.of(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.of(operand)
            case ast.BoolOp(op=op, values=values):
                return self._boolean(op, values)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self.of(body) if self.of(test) else self.of(other)
            case ast.Attribute(value=value, attr=name):
                return self.of(value)[name]
            case ast.Subscript(value=value, slice=ast.Slice() as cut):
                bounds = (self.of(part) if part else None for part in (cut.lower, cut.upper, cut.step))
                return self.of(value)[slice(*bounds)]
            case ast.Subscript(value=value, slice=key):
                return self.of(value)[self.of(key)]
            case ast.ListComp():
                return self._comprehension(node)
            case ast.Call():
                return self._call(node)
            case ast.JoinedStr(values=parts):
                return "".join(str(self.of(part.value if isinstance(part, ast.FormattedValue) else part))
                               for part in parts)  # fmt: skip
        raise PathError(f"{ast.unparse(node)!r} is not part of the expression language")

    def _name(self, name: str) -> Any:
        for scope in (self._names, self._data):
            if name in scope:
                return scope[name]
        raise PathError(f"there is no {name!r}")

    def _binary(self, apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        for text, count in ((left, right), (right, left)):
            if apply is operator.mul and isinstance(text, str | list) and isinstance(count, int):
                count = min(count, _RESULT_MAX // max(len(text), 1) + 1)
                return text * count
        return apply(left, right)

    def _boolean(self, op: ast.boolop, values: list[ast.expr]) -> Any:
        value: Any = None
        for one in values:
            value = self.of(one)
            if bool(value) is isinstance(op, ast.Or):
                return value
        return value

    def _compare(self, node: ast.Compare) -> bool:
        left = self.of(node.left)
        for op, one in zip(node.ops, node.comparators, strict=True):
            right = self.of(one)
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def _comprehension(self, node: ast.ListComp) -> list[Any]:
        if len(node.generators) != 1 or not isinstance(node.generators[0].target, ast.Name):
            raise PathError("a comprehension has one loop over one name")
        loop = node.generators[0]
        name = loop.target.id  # type: ignore[attr-defined]
        found = []
        for value in self.of(loop.iter):
            inner = _Evaluation(self._data, self._names | {name: value})
            if all(inner.of(test) for test in loop.ifs):
                found.append(inner.of(node.elt))
        return found

    def _call(self, node: ast.Call) -> Any:
        if node.keywords:
            raise PathError("calls take no keywords")
        values = [self.of(value) for value in node.args]
        match node.func, values:
            case ast.Name(id="len"), [value]:
                return len(value)
            case ast.Name(id="str"), [value]:
                return str(value)
            case ast.Name(id="int"), [value]:
                return int(value)
            case ast.Name(id="pathsplit"), [str(path)]:
                return _path_split(path)
            case ast.Name(id="is_present"), [str(path)]:
                return self._present(path)
            case ast.Name(id="getattr"), [str(path), default]:
                return look_up("$." + path, self._data) if self._present(path) else default
            case ast.Attribute(value=target, attr=name), _ if name in _STRING_METHODS:
                text = self.of(target)
                if not isinstance(text, str):
                    raise PathError(f"{name} is a method of text")
                found = getattr(text, name)(*values)
                return list(found) if isinstance(found, tuple) else found
        raise PathError(f"{ast.unparse(node)!r} is not a known call")

    def _present(self, path: str) -> bool:
        try:
            look_up(path if path.startswith("$") else "$." + path, self._data)
        except PathError:
            return False
        return True


def _path_split(path: str) -> list[str]:
    """Split a collection path into its folder, with the slash, and the last name."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    return [folder + slash, name]


def parameters(template: Any, data: Any) -> Any:
    """Fill in a Parameters block: `name.$` is a path, `name.=` an expression, at any depth. Raises PathError."""
    match template:
        case dict():
            filled: dict[str, Any] = {}
            for key, value in template.items():
                if key == "__Private_Parameters":
                    continue
                if key.endswith(".$"):
                    filled[key[:-2]] = look_up(value, data)
                elif key.endswith(".="):
                    filled[key[:-2]] = evaluate(value, data)
                else:
                    filled[key] = parameters(value, data)
            return filled
        case list():
            return [parameters(one, data) for one in template]
    return template
