"""`globus flow`: flow definitions, checked on this machine, without asking the service.

JSON and YAML are read with a place for every key and value, so that each fault
is told as file:line:column.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import CONFIGURATION, Group, Setup, pass_setup
from trigger_daemon.errors import ConfigFault

if TYPE_CHECKING:
    from trigger_daemon.config.source import Value
    from trigger_daemon.globus.definition import DefinitionFault
    from trigger_daemon.globus.definition import Path as Keys

QUOTE_MAX = 500  # characters of a line shown with a fault

FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)


@click.group(cls=Group)
def flow() -> None:
    """Definitions of flows: checked without asking the service, and put to it."""


@flow.command("validate")
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--schema", metavar="FILE", type=FILE, help="The flow's input schema, which is checked too.")
@click.option("--input", "input_", metavar="FILE", type=FILE, help="An input, which has to fit the schema.")
@pass_setup
def validate(setup: Setup, file: str, schema: str | None, input_: str | None) -> None:
    """Check a flow's definition, and show every fault with its place. Exit code 3 if there is an error.

    Files are JSON or YAML; `-` is standard input. A warning tells what is likely
    a mistake, or is not known to work; it changes no exit code. The service may
    still refuse what is said here to have no faults: it knows more of actions
    and permissions.
    """
    from trigger_daemon.globus import definition as flows
    from trigger_daemon.globus.judging import judge_input

    if input_ is not None and schema is None:
        raise click.UsageError("--input is checked by a schema: give --schema, too")
    if [file, schema, input_].count("-") > 1:
        raise click.UsageError("standard input can be read once: only one of the files can be `-`")
    definition = read(file)
    documents = [definition]
    definition.check(flows.faults)
    if schema is not None:
        documents.append(wanted := read(schema))
        wanted.check(flows.schema_faults)
        _together(definition, wanted)
        if input_ is not None:
            documents.append(given := read(input_))
            given.check(lambda value: judge_input(wanted.value, value) if wanted.whole else [])
    _tell(setup, documents)


def checked(setup: Setup, file: str, schema: str | None) -> tuple[Any, Any]:
    """Return a definition, and a schema or None, to send; if they have faults, tell them and end the command."""
    from trigger_daemon.globus import definition as flows

    if file == schema == "-":
        raise click.UsageError("standard input can be read once: only one of the files can be `-`")
    documents = [definition := read(file)]
    definition.check(flows.faults)
    wanted = None
    if schema is not None:
        documents.append(wanted := read(schema))
        wanted.check(flows.schema_faults)
        _together(definition, wanted)
    if any(told["severity"] == "error" for document in documents for told, _ in document.told()):
        _tell(setup, documents)
    for document in documents:
        for told, _ in document.told():
            place = f"{told['file']}:{told['line']}:{told['column']}"
            text.note(text.safe(f"{place}: warning: {told['message']}"))
    return definition.value, wanted.value if wanted is not None else None


def _together(definition: Document, schema: Document) -> None:
    """Hold what the states need against what the input may hold."""
    from trigger_daemon.globus.definition import FAULTS_MAX, unfed

    if definition.whole and schema.whole and not schema.faults:
        definition.faults = [*definition.faults, *unfed(definition.value, schema.value)][:FAULTS_MAX]


def _tell(setup: Setup, documents: Iterable[Document]) -> None:
    found = [told for document in documents for told in document.told()]
    errors = sum(told["severity"] == "error" for told, _ in found)
    counts = [text.counted(errors, "error"), text.counted(len(found) - errors, "warning")]
    if setup.json:
        setup.data({"ok": not errors, "faults": [told for told, _ in found]})
    elif found:
        click.echo(text.faults([
            ConfigFault(
                told["file"], told["line"], told["column"], f"{told['severity']}: {told['path']}: {told['message']}",
                told["hint"], quote,
            )
            for told, quote in found
        ]))  # fmt: skip
        text.note(", ".join(count for count in counts if not count.startswith("0 ")))
    else:
        click.echo("no faults")
    if errors:
        raise click.exceptions.Exit(CONFIGURATION)


# ---------------------------------------------------------------------------- reading

Place = tuple[int, int]  # line and column, counted from 1


@dataclass
class Document:
    """A file that was read: its value, where everything stands in it, and what was found wrong."""

    file: str
    lines: list[str] = field(default_factory=list)
    value: Any = None
    whole: bool = False  # it could be read, so that its value says something
    places: dict[Keys, tuple[Place, Place]] = field(default_factory=dict)  # -> of the key, of the value
    unread: list[ConfigFault] = field(default_factory=list)
    faults: list[DefinitionFault] = field(default_factory=list)

    def check(self, faults: Any) -> None:
        if self.whole:
            self.faults = faults(self.value)

    def refuse(self, message: str, hint: str = "", *, line: int = 0, column: int = 0) -> None:
        self.unread.append(ConfigFault(self.file, line, column, message, hint))

    def place(self, fault: DefinitionFault) -> Place:
        """Return where a fault is; where nothing stands, what should hold it."""
        for length in range(len(fault.path), -1, -1):
            if (places := self.places.get(fault.path[:length])) is not None:
                return places[0 if fault.at_key or length < len(fault.path) else 1]
        return 0, 0

    def told(self) -> list[tuple[dict[str, Any], str]]:
        """Return faults for programs, each with the line it quotes, in the order of the file."""
        rows = [(fault.line, fault.column, "$", "error", fault.message, fault.hint) for fault in self.unread]
        rows.extend((*self.place(each), each.json_path, each.severity, each.message, each.hint) for each in self.faults)
        keys = ("line", "column", "path", "severity", "message", "hint")
        rows.sort(key=lambda row: row[:2])
        return [({"file": self.file, **dict(zip(keys, row, strict=True))}, self._quote(*row[:2])) for row in rows]

    def _quote(self, line: int, column: int) -> str:
        # Of a file in one long line, its beginning would explain nothing.
        return self.lines[line - 1][:QUOTE_MAX] if 1 <= line <= len(self.lines) and column <= QUOTE_MAX else ""


def read(file: str) -> Document:
    """Read a file, or standard input, as JSON or YAML. What cannot be read is in the document's faults."""
    from trigger_daemon.globus.definition import BYTES_MAX

    document = Document(file)
    if file == "-":
        content = sys.stdin.buffer.read(BYTES_MAX + 1)
    else:
        with Path(file).open("rb") as opened:
            content = opened.read(BYTES_MAX + 1)
    if len(content) > BYTES_MAX:
        hint = "lists of files belong into a manifest, which the flow is given the path of"
        document.refuse(f"the file is larger than {BYTES_MAX:,} bytes", hint)
        return document
    try:
        written = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        message = f"the file is not UTF-8: byte 0x{content[error.start]:02X}"
        document.refuse(message, "save it as UTF-8", line=before.count(b"\n") + 1, column=column)
        return document
    # YAML that begins with a brace is JSON, as a rule; what is wrong in it is told in the language of its name.
    braced = written.lstrip()[:1] in ("{", "[")
    if file.endswith(".json") or (braced and (not file.endswith((".yaml", ".yml")) or _is_json(written))):
        _read_json(document, written)
    else:
        _read_yaml(document, written)
    return document


# ------------------------------------------------------------------------------- JSON

_TOKEN = re.compile(r'\s*(?:("[^"\\]*(?:\\.[^"\\]*)*")|([{}\[\]:,])|[^\s{}\[\]:,"]+)', re.DOTALL)


def _loaded(written: str) -> Any:
    return json.loads(written, parse_constant=_no_constant)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _is_json(written: str) -> bool:
    try:
        _loaded(written)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json(document: Document, written: str) -> None:
    document.lines = [line.rstrip("\r") for line in written.split("\n")]
    try:
        document.value = _loaded(written)
    except json.JSONDecodeError as error:
        _syntax(document, error)
    except ValueError as error:
        document.refuse(str(error).partition(":")[0], "write it as a text")
    except RecursionError:
        from trigger_daemon.globus.definition import DEPTH_MAX

        document.refuse("the file is nested too deeply", f"at most {DEPTH_MAX} levels are read")
    else:
        document.whole = True
        _json_places(document, written)


def _syntax(document: Document, error: json.JSONDecodeError) -> None:
    if not error.doc.strip():
        document.refuse("the file is empty", 'write {"StartAt": ..., "States": {...}}', line=1, column=1)
        return
    before = error.doc[: error.pos].rstrip()
    hint = "check commas, quotes and brackets here and on the line above"
    comma = before.endswith(",") and error.doc[error.pos : error.pos + 1] in ("}", "]")
    if comma or "trailing comma" in error.msg:  # the latter as newer Pythons say it
        hint = "remove the comma: JSON allows none after the last value"
    elif "property name" in error.msg:
        hint = "a key stands in double quotes; JSON has no comments"
    elif "control character" in error.msg:
        hint = "write a line break in a text as \\n"
    elif "Extra data" in error.msg:
        hint = "one file holds one value"
    document.refuse(f"this is not JSON: {error.msg}", hint, line=error.lineno, column=error.colno)


@dataclass
class _Open:
    """An object or list whose end has not come."""

    path: Keys
    is_list: bool
    key: str | int | None = None  # of the value that comes next
    key_at: Place = (0, 0)
    seen: dict[str, int] = field(default_factory=dict)  # key -> line


def _json_places(document: Document, written: str) -> None:
    """Find where everything stands in a text that is known to be JSON."""
    from trigger_daemon.globus.definition import VALUES_MAX

    breaks = [0]
    breaks.extend(match.end() for match in re.finditer("\n", written))
    line = 0
    stack: list[_Open] = []
    for token in _TOKEN.finditer(written):
        mark, quoted = token[2], token[1]
        start = token.end() - len(token[0].lstrip())
        while line + 1 < len(breaks) and breaks[line + 1] <= start:
            line += 1
        at = (line + 1, start - breaks[line] + 1)
        inside = stack[-1] if stack else None
        if mark in ("}", "]"):
            stack.pop()
        elif mark == ",":
            if inside is not None:
                inside.key = inside.key + 1 if isinstance(inside.key, int) else None
        elif mark == ":":
            pass
        elif quoted is not None and inside is not None and not inside.is_list and inside.key is None:
            inside.key, inside.key_at = json.loads(quoted, strict=False), at
            _once(document, inside, at)
        else:
            path = (*inside.path, inside.key) if inside is not None and inside.key is not None else ()
            document.places[path] = (inside.key_at if inside is not None and not inside.is_list else at, at)
            if len(document.places) > VALUES_MAX:  # too many for the checks, too, which tell it
                return
            if mark is not None:
                stack.append(_Open(path, mark == "[", 0 if mark == "[" else None))


def _once(document: Document, inside: _Open, at: Place) -> None:
    from trigger_daemon.globus.definition import FAULTS_MAX

    key = str(inside.key)
    if key not in inside.seen:
        inside.seen[key] = at[0]
    elif len(document.unread) < FAULTS_MAX:
        hint = f"it stands in line {inside.seen[key]} already; remove one"
        document.refuse(f"`{key[:80]}` is written twice", hint, line=at[0], column=at[1])


# ------------------------------------------------------------------------------- YAML


def _read_yaml(document: Document, written: str) -> None:
    from trigger_daemon.config.source import FILE_BYTES_MAX, Bad, Source

    if len(written.encode()) > FILE_BYTES_MAX:
        hint = "write it as JSON, which is read faster"
        document.refuse(f"as YAML, at most {FILE_BYTES_MAX:,} bytes are read", hint)
        return
    source = Source(document.file, written)
    document.lines = source.lines
    root = source.compose(empty="write `StartAt:` and `States:`")
    if root is not None:
        try:
            document.value = _plain(document, root, (), _at(root))
            document.whole = True
        except Bad as bad:
            source.add(bad.fault)
    document.unread += source.faults


def _at(value: Value) -> Place:
    return value.begin.line + 1, value.begin.column + 1


def _plain(document: Document, value: Value, path: Keys, key_at: Place) -> Any:
    """Return a value as JSON would have it, and note the places of all below it."""
    document.places[path] = (key_at, _at(value))
    match value.kind:
        case "map":
            return {
                str(key.node.value): _plain(document, item, (*path, str(key.node.value)), _at(key))
                for key, item in value.pairs()
            }
        case "list":
            return [
                _plain(document, item, (*path, number), _at(item)) for number, item in enumerate(value.items())
            ]
        case _:
            return value.plain()
