"""YAML with a position for everything, and faults that show the place and say what to write instead.

A file is composed to nodes, never constructed to objects: types follow YAML
1.2's core schema as read here from the text (no octal by a leading zero, no
sexagesimal, no `yes`), whatever a directive in the file says. Aliases are
allowed within a budget, so that no file can unfold without end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from trigger_daemon.core.grammar import nearest
from trigger_daemon.errors import ConfigFault

FILE_BYTES_MAX = 1_000_000  # 1,000 rules of some length
NODES_MAX = 300_000  # looked at in one file, aliases counted each time: 1,000 rules need about 60,000
DEPTH_MAX = 30  # of nesting; rules have about 8
BRACKETS_MAX = 200  # open at once, those in texts and comments included; beyond it the parser becomes slow
FAULTS_MAX = 100  # reported of one file: more than anybody reads
QUOTE_MAX = 500  # characters of the line shown with a fault

T = TypeVar("T")

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # where the YAML reader counts a new line
# What plain values are resolved to, by the rules of either YAML; how they are read is decided in `Value.kind`.
_TAGS = frozenset({"str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value"})
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_UNQUOTED = re.compile(r"(?:[:\-\[,]\s+|\[|,|^\s*)(\{[^\"'{}]*\}[^\s,\]}]|\{[^\"'{}]*\}\s*$|\*[^\s,\]]+)")


class Bad(Exception):
    """A value cannot be used; carries its fault to whoever collects them."""

    def __init__(self, fault: ConfigFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass
class Source:
    """One file: its text, and what was found wrong in it."""

    file: str
    text: str
    elsewhere: bool = False  # rules of another machine: what is not installed on this one is no fault of theirs
    faults: list[ConfigFault] = field(default_factory=list)
    lines: list[str] = field(init=False)
    visited: int = 0

    def __post_init__(self) -> None:
        self.lines = _BREAK.split(self.text)

    def fault(self, line: int, column: int, message: str, hint: str = "") -> ConfigFault:
        """Return a fault at a place counted from 0."""
        quote = self.lines[line][:QUOTE_MAX] if 0 <= line < len(self.lines) else ""
        return ConfigFault(self.file, line + 1, column + 1, message, hint, quote)

    def add(self, fault: ConfigFault) -> None:
        if len(self.faults) < FAULTS_MAX and fault not in self.faults:
            self.faults.append(fault)

    def compose(self, *, empty: str) -> Value | None:
        """Return the document's root, None after a fault; `empty` says what to write into an empty file."""
        if len(self.text.encode("utf-8", "surrogatepass")) > FILE_BYTES_MAX:
            self.add(ConfigFault(self.file, 0, 0, f"the file is larger than {FILE_BYTES_MAX:,} bytes", "split it"))
            return None
        if (deep := _too_deep(self.text)) is not None:
            before = _BREAK.split(self.text[:deep])
            hint = f"at most {DEPTH_MAX} levels are read"
            self.add(self.fault(len(before) - 1, len(before[-1]), "the file is nested too deeply", hint))
            return None
        try:
            node = YAML(typ="rt", pure=True).compose(self.text)
        except ReaderError as error:
            before = _BREAK.split(self.text[: error.position])
            self.add(self.fault(
                len(before) - 1, len(before[-1]), f"the character U+{_code(error.character):04X} cannot stand in YAML",
                "remove it; was the file damaged, or is it no text?",
            ))
            return None
        except MarkedYAMLError as error:
            self.add(self._syntax(error))
            return None
        except RecursionError:
            hint = f"at most {DEPTH_MAX} levels are read"
            self.add(ConfigFault(self.file, 0, 0, "the file is nested too deeply", hint))
            return None
        except (YAMLError, ValueError) as error:
            self.add(ConfigFault(self.file, 0, 0, f"this is not YAML: {error}", empty))
            return None
        if node is None:
            self.add(self.fault(0, 0, "the file is empty", empty))
            return None
        try:
            return Value(node, self, "", 0)
        except Bad as bad:  # a tag on the whole document
            self.add(bad.fault)
            return None

    def _syntax(self, error: MarkedYAMLError) -> ConfigFault:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        problem = str(error.problem or error.context or "it cannot be read")
        problem = problem.replace("<scalar>", "a text").replace("<stream end>", "the end of the file")
        while line > 0 and (line >= len(self.lines) or not self.lines[line].strip()):
            line -= 1  # the end of the file: show the last line that says something
            column = len(self.lines[line])
        text = self.lines[line]
        unquoted = _UNQUOTED.search(text)
        if "\t" in text[: column + 1] and not text[: column + 1].strip():
            hint = "indent with spaces; YAML allows no tabs there"
        elif "unknown escape" in problem:
            problem = "a backslash in double quotes begins an escape"
            hint = "write patterns and Windows paths in single quotes: '...'"
        elif unquoted:
            column = unquoted.start(1)
            problem = f"a value that begins with {text[column]} must be quoted"
            hint = f"write '{_value_at(text, column)}'"
        elif "single document" in str(error.context):
            problem = "a second document begins here"
            hint = "remove the line ---"
        elif "mapping values are not allowed" in problem:
            problem = "a `key: value` cannot stand here"
            hint = "check that this line is indented like its neighbours; quote a text that holds `: `"
        elif text[column : column + 1] in ("%", "@", "`"):
            problem = f"a value cannot begin with {text[column]}"
            hint = f"quote it: '{_value_at(text, column)}'"
        elif "block end" in problem or "document start" in problem or "end of the file" in problem:
            hint = "check that this line is indented like its neighbours, and that brackets and quotes are closed"
        else:
            hint = "check indentation, quotes and brackets on this line and the one above"
        return self.fault(line, column, problem, hint)


def _too_deep(text: str) -> int | None:
    """Return where brackets are nested so deeply that the parser would take minutes, whatever they mean there."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -min(depth, 1)
        if depth > BRACKETS_MAX:
            return bracket.start()
    return None


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(str(character)[0])


def _value_at(text: str, column: int) -> str:
    """Return the unquoted text that begins at a column, up to where a list or the line ends."""
    depth = 0
    for at in range(column, len(text)):
        char = text[at]
        depth += (char == "{") - (char == "}")
        if depth < 0 or (depth == 0 and (char in ",]" or text.startswith(" #", at))):
            return text[column:at].rstrip()
    return text[column:].rstrip()


class Value:
    """A node with its place and the key it belongs to. Readers raise Bad."""

    __slots__ = ("begin", "depth", "key", "node", "source")

    def __init__(self, node: Node, source: Source, key: str, depth: int, key_node: Node | None = None) -> None:
        self.node = node
        # Where nothing is written, YAML's own mark is somewhere below; the key is what people look for.
        nothing = key_node is not None and isinstance(node, ScalarNode) and node.style is None and node.value == ""
        self.begin = key_node.start_mark if nothing and key_node is not None else node.start_mark
        self.source = source
        self.key = key
        self.depth = depth
        source.visited += 1
        if source.visited > NODES_MAX or depth > DEPTH_MAX:
            line, column = self.begin.line, self.begin.column
            raise Bad(source.fault(
                line, column, "the file unfolds too far",
                f"at most {NODES_MAX:,} values in {DEPTH_MAX} levels are read, aliases counted",
            ))

        if str(node.tag).removeprefix("tag:yaml.org,2002:") not in _TAGS:
            self.bad(f"tags such as {node.tag} are not understood", "remove it; quote a text that begins with !")

    # ------------------------------------------------------------------ places

    def fault(self, message: str, hint: str = "", offset: int | None = None) -> ConfigFault:
        """Return a fault here; `offset` counts characters of the scalar's text from 0."""
        line, column = self.begin.line, self.begin.column
        if offset is not None:
            column += self._raw_offset(offset)
        return self.source.fault(line, column, message, hint)

    def bad(self, message: str, hint: str = "", offset: int | None = None) -> NoReturn:
        raise Bad(self.fault(message, hint, offset))

    def add(self, message: str, hint: str = "", offset: int | None = None) -> None:
        self.source.add(self.fault(message, hint, offset))

    @property
    def line(self) -> int:
        """The line, counted from 1."""
        return int(self.begin.line) + 1

    def _raw_offset(self, offset: int) -> int:
        """Return how far from its first character the character at `offset` is written; 0 if it spans lines."""
        start, end = self.node.start_mark, self.node.end_mark
        if not isinstance(self.node, ScalarNode) or start.line != end.line:
            return 0
        style = self.node.style
        if style not in ("'", '"'):
            return offset
        raw, at = self.source.lines[start.line], start.column + 1
        for _ in range(offset):
            if style == "'" and raw.startswith("''", at):
                at += 2
            elif style == '"' and raw.startswith("\\", at):
                at += {"x": 4, "u": 6, "U": 10}.get(raw[at + 1 : at + 2], 2)
            else:
                at += 1
        return int(at - start.column)

    # ------------------------------------------------------------------- kinds

    @property
    def kind(self) -> str:
        """null, bool, int, float, text, list or map."""
        node = self.node
        if isinstance(node, MappingNode):
            return "map"
        if isinstance(node, SequenceNode):
            return "list"
        if isinstance(node, ScalarNode) and node.style is not None:
            return "text"
        text = str(node.value)
        if text in ("", "~", "null", "Null", "NULL"):
            return "null"
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return "bool"
        if _INT.fullmatch(text):
            return "int"
        return "float" if _FLOAT.fullmatch(text) else "text"

    def words(self) -> str:
        """Return what is written here, for a message."""
        match self.kind:
            case "null":
                return "nothing"
            case "map":
                return "a mapping"
            case "list":
                return "a list"
            case _:
                return f"`{self.node.value[:80]}`"

    def _label(self) -> str:
        return f"`{self.key}`" if self.key else "this"

    def text(self, *, example: str = "") -> str:
        """Return a scalar as it is written, numbers too."""
        if isinstance(self.node, MappingNode) and self.node.flow_style:
            raw = self.source.lines[self.node.start_mark.line]
            self.bad(
                f"{self._label()}: a text that begins with {{ must be quoted, YAML takes it for a mapping",
                f"write '{_value_at(raw, self.node.start_mark.column)}'",
            )
        if self.kind in ("map", "list", "null"):
            hint = f"write for example {example}" if example else ""
            self.bad(f"{self._label()} must be a text, not {self.words()}", hint)
        return str(self.node.value)

    def integer(self, minimum: int | None = None) -> int:
        text = self.node.value
        if self.kind not in ("int", "text") or not _INT.fullmatch(text):
            plain = str(text).replace("_", "").replace(",", "") if self.kind in ("text", "float") else ""
            hint = f"write {int(plain)}" if _INT.fullmatch(plain) and len(plain) < 18 else "write for example 50"
            self.bad(f"{self._label()} must be a whole number, not {self.words()}", hint)
        digits = text.lstrip("+-")
        if len(digits) > 18:
            self.bad(f"{self._label()} is too large", "at most 18 digits are understood")
        if len(digits) > 1 and digits.startswith("0"):
            self.bad(f"{self._label()}: a number with a leading 0 is ambiguous", f"write {int(text)}")
        if minimum is not None and int(text) < minimum:
            self.bad(f"{self._label()} must be at least {minimum}, not {text}")
        return int(text)

    def boolean(self) -> bool:
        if self.kind == "bool":
            return str(self.node.value).lower() == "true"
        return self.bad(f"{self._label()} must be true or false, not {self.words()}", "write true or false")

    def quantity(self, read: Callable[[str], T], example_unit: str, noun: str) -> T:
        """Return a duration, size or rate; a bare number gets the hint to add a unit."""
        if self.kind in ("int", "float"):
            self.bad(
                f"{self._label()}: {self.node.value} has no unit",
                f"write a {noun} with its unit, such as {self.node.value}{example_unit}",
            )
        text = self.text(example=f"30{example_unit}")
        try:
            return read(text)
        except (ValueError, OverflowError) as error:
            return self.bad(f"{self._label()}: {error}", "a number, a dot for decimals, and a unit, nothing else")

    def choice(self, choices: Collection[str]) -> str:
        text = self.text(example=next(iter(choices), ""))
        if text not in choices:
            self.bad(f"{self._label()} must be one of {', '.join(choices)}, not `{text}`", nearest(text, choices))
        return text

    def items(self) -> list[Value]:
        """Return the items of a list."""
        if self.kind != "list":
            hint = "write each on a line of its own, after `- `"
            self.bad(f"{self._label()} must be a list, not {self.words()}", hint)
        return [Value(node, self.source, self.key, self.depth + 1) for node in self.node.value]

    def items_or_one(self) -> list[Value]:
        """Return the items of a list, or the one value that stands for it."""
        return self.items() if self.kind == "list" else [self]

    def pairs(self) -> Iterator[tuple[Value, Value]]:
        """Yield keys and values of a mapping; a key written twice is a fault, recorded."""
        if self.kind != "map":
            hint = "write each key on a line of its own, indented below it"
            if self.kind == "text" and ":" in str(self.node.value):
                hint = "write a space after the colon"
            self.bad(f"{self._label()} must be a mapping (`key: value`), not {self.words()}", hint)
        seen: dict[str, int] = {}
        for key_node, node in self.node.value:
            key = Value(key_node, self.source, self.key, self.depth + 1)
            if key.kind in ("map", "list"):
                key.add("a key must be a word", "a text that begins with { or [ must be quoted")
                continue
            name = str(key_node.value)
            if name == "<<":
                key.add("`<<` (merge) is not part of YAML 1.2", "write the keys out")
                continue
            if name in seen:
                key.add(f"`{name}` is written twice", f"it stands in line {seen[name]} already; remove one")
                continue
            seen[name] = key.line
            yield key, Value(node, self.source, name, self.depth + 1, key_node)

    def plain(self) -> Any:
        """Return the value as plain Python, keys as text."""
        match self.kind:
            case "null":
                return None
            case "bool":
                return self.boolean()
            case "int":
                return self.integer()
            case "float":
                return float(self.node.value)
            case "list":
                return [item.plain() for item in self.items()]
            case "map":
                return {str(key.node.value): value.plain() for key, value in self.pairs()}
            case _:
                return str(self.node.value)
