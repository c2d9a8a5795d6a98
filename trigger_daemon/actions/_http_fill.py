"""What a rule writes, filled in: addresses, headers, bodies, and expressions over answers; secrets last.

A value of a batch is put only where the rule names it, each time in the way
of the place: percent-encoded in an address, as a text in an expression. So a
file's name can neither lead elsewhere nor be taken for a secret. Secrets are
read when something is sent, and hidden in whatever is said about it.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from trigger_daemon.actions import File, Request
from trigger_daemon.core.grammar import OptionFault
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.templates import pieces, template_names
from trigger_daemon.credentials import secret

EXPRESSION_MAX = 2_000  # characters
BODY_BYTES_MAX = 8 << 20
SECRET_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
CREDENTIAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LISTS = ("manifest", "files")  # values of a body that are nothing but these become lists
_UNKNOWN = {"host": ".*?", "date": r"\d{4}-\d\d-\d\d"}  # what the journal holds only where it was filled in
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_QUOTED = re.compile(r"""['"`]\{[A-Za-z_]+\}['"`]""")


class Unfilled(Exception):
    """Something cannot be filled in as it stands; words, and a hint for a person."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.why, self.hint = why, hint


class NoSecret(Unfilled):
    """A secret cannot be had."""


# ------------------------------------------------------------------------- secrets


class Secrets:
    """The secrets that a rule names, read when first used; `hide` takes them out of what is told."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self._named = named
        self._known: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def __getitem__(self, name: str) -> str:
        """Return a secret: a credential of the service manager, or a file of mode 0600. Raises NoSecret."""
        if name not in self._known:
            where = str(self._named[name])
            try:
                found = secret("", "", where, {}) if os.path.isabs(where) else secret("", where, "", os.environ)
            except (OSError, ValueError) as error:
                words = getattr(error, "strerror", None) or str(error)
                raise NoSecret(f"the secret {name} ({where}) cannot be had: {words}", "mend that file") from None
            if not found:
                hint = "give the service a credential of that name (LoadCredential=), or name a file of mode 0600"
                raise NoSecret(f"the secret {name} is not there: no credential `{where}`", hint)
            self._known[name] = found
        return self._known[name]

    def hide(self, value: Any) -> Any:
        """Return a value, nested or not, in which each secret is its name: also one that another request was sent."""
        for name in self._named:
            with contextlib.suppress(NoSecret):
                self[name]
        forms = [
            (form, name) for name, known in self._known.items()
            for form in {known, quote(known, safe=""), quote(known), html.escape(known), json.dumps(known)[1:-1]}
        ]  # fmt: skip
        forms.sort(key=lambda pair: -len(pair[0]))

        def hidden(value: Any) -> Any:
            match value:
                case str():
                    for form, name in forms:
                        value = value.replace(form, f"{{{name}}}")
                    return value
                case Mapping():
                    return {hidden(key): hidden(item) for key, item in value.items()}
                case list() | tuple():
                    return [hidden(item) for item in value]
            return value

        return hidden(value) if forms else value


# -------------------------------------------------------------------------- values


class Filling:
    """The values of one attempt, and the places they are put into."""

    def __init__(self, request: Request, key: str, handle: object, secrets: Secrets) -> None:
        self.written = {**request.options, **(request.written or {})}
        self.secrets = secrets
        self._request = request
        self._values = {
            **_learnt(request), **request.captures, "rule": request.rule, "batch": str(request.run), "key": key,
        }  # fmt: skip
        if handle is not None:
            self._values["handle"] = str(handle)

    def url(self, text: str) -> str:
        """Return an address. Raises Unfilled, also for one that a name would lead elsewhere."""
        filled = self._text(text, lambda value: quote(os.fsencode(value), safe=""))
        if any(unquote(part) in (".", "..") for part in re.split("[?#]", filled, maxsplit=1)[0].split("/")):
            hint = "rename the file, or put that capture into `json`, then `runs retry --anew`"
            raise Unfilled("a part of the address would be `.` or `..`, which leads to another one", hint)
        return filled

    def header(self, text: str) -> bytes:
        """Return a header's value. Raises Unfilled for one that is not one line."""
        sent = _utf8(self._text(text, str)).strip()
        if _CONTROL.search(sent):  # not shown: a secret may stand in it
            hint = "is it of a file's name? use another capture, or rename it; of a secret? write its file anew"
            raise Unfilled("what is put into a header is more than one line, or has a control character", hint)
        return sent

    def body(self, value: Any) -> bytes:
        """Return a JSON body. Raises Unfilled for one that cannot be sent."""
        sent = _utf8(json.dumps(self._value(value), ensure_ascii=False, allow_nan=False))
        if len(sent) > BODY_BYTES_MAX:
            hint = "let `batch: {files}` or `{bytes}` of the rule make smaller ones"
            raise Unfilled(f"the body has {len(sent):,} bytes; at most {BODY_BYTES_MAX:,} are sent", hint)
        return sent

    def expression(self, text: str) -> Any:
        """Return an expression, compiled; what the batch puts into it is a text, whatever it holds."""
        return compiled(self._text(text, literal, secrets=False))

    def _text(self, text: str, put: Callable[[str], str], *, secrets: bool = True) -> str:
        parts = []
        for piece in _pieces(text):
            if isinstance(piece, str):
                parts.append(piece)
            elif secrets and piece[0] in self.secrets:
                parts.append(self.secrets[piece[0]])
            elif piece[0] in self._values:
                parts.append(put(self._values[piece[0]]))
            else:
                raise Unfilled(f"{{{piece[0]}}} has no value here", "correct the rule, then `runs retry --anew`")
        return "".join(parts)

    def _value(self, value: Any) -> Any:
        match value:
            case "{manifest}":
                return [_member(file) for file in self._request.files]
            case "{files}":
                return [os.path.join(file.root, file.path) for file in self._request.files]
            case str():
                found = _pieces(value)
                text = self._text(value, str)
                return int(text) if len(found) == 1 and not isinstance(found[0], str) and found[0][1] else text
            case Mapping():
                return {str(key): self._value(item) for key, item in value.items()}
            case list() | tuple():
                return [self._value(item) for item in value]
        return value


def _member(file: File) -> dict[str, Any]:
    told = {"root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns}
    return {**told, "role": file.role} if file.role else told


def _pieces(text: str) -> tuple[str | tuple[str, bool], ...]:
    try:
        return pieces(text)
    except PatternError:  # of what was filled in where the rule is not known any more: as it stands
        return (text,)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.end + 20].encode("utf-8", "backslashreplace").decode()
        raise Unfilled(f"a name is not UTF-8, and cannot be sent: ...{shown}...", "rename the file") from None


def _learnt(request: Request) -> dict[str, str]:
    """Return {host} and {date} as they were when the batch closed: they stand only in what was filled in then."""
    known = {**request.captures, "rule": request.rule, "batch": str(request.run)}
    found: dict[str, str] = {}

    def learn(written: Any, filled: Any) -> None:
        match written, filled:
            case str(), str() if {"host", "date"} & set(template_names(written)):
                groups: set[str] = set()
                pattern = "".join(_likeness(piece, known, groups) for piece in pieces(written))
                if match := re.fullmatch(pattern, filled, re.DOTALL):
                    found.update(match.groupdict())
            case Mapping(), Mapping():
                for key, item in written.items():
                    learn(item, filled.get(key))
            case (list() | tuple()), (list() | tuple()):
                for one, other in zip(written, filled, strict=False):
                    learn(one, other)

    for name, written in (request.written or {}).items():
        learn(written, request.options.get(name))
    return found


def _likeness(piece: str | tuple[str, bool], known: Mapping[str, str], groups: set[str]) -> str:
    """Return a regular expression for what a piece of a template became."""
    if isinstance(piece, str):
        return re.escape(piece)
    name = piece[0]
    if name not in _UNKNOWN:
        return re.escape(known.get(name, f"{{{name}}}"))
    if name in groups:
        return f"(?P={name})"
    groups.add(name)
    return f"(?P<{name}>{_UNKNOWN[name]})"


# --------------------------------------------------------------------- expressions


def literal(value: str) -> str:
    """Return a text as JMESPath writes it."""
    return "`{}`".format(json.dumps(value).replace("`", "\\`"))


@functools.lru_cache(maxsize=1_000)
def compiled(text: str) -> Any:
    """Return a JMESPath expression; raise ValueError with what is wrong."""
    import jmespath

    if not text.strip():
        raise ValueError("it is empty")
    if len(text) > EXPRESSION_MAX:
        raise ValueError(f"it has {len(text):,} characters; at most {EXPRESSION_MAX:,} are allowed")
    try:
        return jmespath.compile(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except jmespath.exceptions.JMESPathError as error:
        raise ValueError(" ".join(str(error).split("\n")[0].split())) from None


def judge_expression(option: str, text: Any, names: frozenset[str]) -> Iterator[OptionFault]:
    """Yield what is wrong with an expression as the rule writes it; `names` may stand in it."""
    hint = "JMESPath, such as `state.type == 'COMPLETED'`; write {{ and }} for its own braces"
    if not isinstance(text, str):
        yield OptionFault(option, "an expression is a text", hint)
        return
    if _QUOTED.search(text):
        yield OptionFault(option, "a name in braces stands for a whole text here", "write it without quotes around it")
        return
    try:
        for name in template_names(text):
            if name not in names:
                yield OptionFault(option, f"{{{name}}} cannot stand in this expression", hint)
                return
        compiled("".join(piece if isinstance(piece, str) else literal("x") for piece in pieces(text)))
    except (ValueError, PatternError) as error:
        yield OptionFault(option, f"this is no expression: {error}", hint)


def ask(expression: Any, document: Any) -> Any:
    """Return what an expression finds in an answer; None where it cannot be applied to it."""
    import jmespath

    try:
        return expression.search(document)
    except (
        jmespath.exceptions.JMESPathError, RecursionError, TypeError, ValueError, AttributeError, ArithmeticError,
        LookupError,
    ):  # fmt: skip
        return None


def holds(found: Any) -> bool:
    """Say whether that is true, as JMESPath means it: 0 is, and what is empty is not."""
    return found is not None and found is not False and found not in ("", [], {})
