"""Fill captures into the strings of an action, and into the paths of companions.

Pure. `{name}` is replaced by its value, `{{` and `}}` are braces, and a value
that is only `{name|int}` becomes a number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from trigger_daemon.core.regexes import PatternError

COMPILED_MAX = 10_000  # templates kept read: 1,000 rules with some of each

_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?:\|([^{}]*))?\}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


@functools.lru_cache(maxsize=COMPILED_MAX)
def _template(text: str) -> tuple[str | tuple[str, bool], ...]:
    """Return the pieces of a template: literal text, or (name, whether a number is wanted)."""
    pieces: list[str | tuple[str, bool]] = []
    at = 0
    while at < len(text):
        if text.startswith(("{{", "}}"), at):
            pieces.append(text[at])
            at += 2
        elif text[at] == "{":
            found = _NAME.match(text, at)
            if found is None:
                raise PatternError(
                    "a { here begins the name of a capture", at, "write {{ and }} where braces are meant literally",
                )
            if found[2] is not None and (found[2] != "int" or found[0] != text):
                raise PatternError(
                    f"{found[0]} is not understood", at, f"a value that is only '{{{found[1]}|int}}' becomes a number",
                )
            pieces.append((found[1], found[2] is not None))
            at = found.end()
        elif text[at] == "}":
            raise PatternError("there is a } without a {", at, "write {{ and }} where braces are meant literally")
        else:
            end = min((i for i in (text.find("{", at), text.find("}", at)) if i >= 0), default=len(text))
            pieces.append(text[at:end])
            at = end
    return tuple(pieces)


def pieces(text: str) -> tuple[str | tuple[str, bool], ...]:
    """Return literal texts and (name, whether a number is wanted), in order; raise PatternError for no template."""
    return _template(text)


def template_names(text: str) -> tuple[str, ...]:
    """Return the names a template uses, each once; raise PatternError if it is none."""
    return tuple(dict.fromkeys(piece[0] for piece in _template(text) if not isinstance(piece, str)))


def wants_number(text: str) -> bool:
    """Say whether a template is only `{name|int}`."""
    pieces = _template(text)
    return len(pieces) == 1 and not isinstance(pieces[0], str) and pieces[0][1]


def render(text: str, values: Mapping[str, str]) -> str | int:
    """Fill a template; `{run|int}` alone gives a number.

    Raises PatternError, KeyError for a name without a value, ValueError for
    text that is no number.
    """
    if "{" not in text and "}" not in text:
        return text
    pieces = _template(text)
    if wants_number(text):
        value = values[pieces[0][0]]
        if not _NUMBER.fullmatch(value):
            raise ValueError(f"{value!r}, captured as {text}, is no whole number")
        return int(value)
    return "".join(piece if isinstance(piece, str) else values[piece[0]] for piece in pieces)


def render_all(value: Any, values: Mapping[str, str]) -> Any:
    """Fill every template in nested lists and mappings (their keys stay as they are)."""
    if isinstance(value, str):
        return render(value, values)
    if isinstance(value, Mapping):
        return {key: render_all(item, values) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [render_all(item, values) for item in value]
    return value


def literally(text: str) -> str:
    """Return a template that renders to exactly this text."""
    return text.replace("{", "{{").replace("}", "}}")
