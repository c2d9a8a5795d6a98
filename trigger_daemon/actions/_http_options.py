"""The options of `http` that are mappings, read once; and what is wrong with them, each at its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from trigger_daemon.actions._http_fill import CREDENTIAL_NAME, LISTS, SECRET_NAME, judge_expression
from trigger_daemon.actions._http_send import DEADLINE_MAX_S
from trigger_daemon.core.grammar import OptionFault, duration_s, nearest
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.templates import pieces, template_names

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
EVERY_S = 10.0
EVERY_MIN_S = 0.1
LISTED_AFTER_S = 10.0
STATES = ("active", "inactive", "succeeded", "failed", "again", "cancelled")  # that a poll may find
_POLL = ("url", "method", "json", "every", *STATES, "why", "output")
_FIND = ("url", "method", "json", "handle", "absent", "listed_after")
_CANCEL = ("url", "method", "json")
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "content-encoding"})
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name, RFC 9110
SAFE = frozenset({"key", "rule", "batch", "date"})  # that may stand in any expression
HANDLE_HINT = "`handle` is known once the start is answered: use {key} here"


@dataclass(frozen=True, slots=True)
class Poll:
    """How a run is asked about. `found`: state -> expression."""

    url: str
    method: str
    json: Any
    every_s: float
    found: Mapping[str, str]
    why: str | None
    output: str | None


@dataclass(frozen=True, slots=True)
class Find:
    """How an attempt is looked for whose answer was lost."""

    url: str
    method: str
    json: Any
    handle: str
    absent: tuple[int, ...]
    listed_after_s: float


def poll_of(options: Mapping[str, Any]) -> Poll | None:
    """Return `poll` of options that `faults` finds nothing wrong with."""
    told = options.get("poll")
    if not told:
        return None
    return Poll(
        told["url"], told.get("method") or "GET", told.get("json"), _seconds(told.get("every"), EVERY_S),
        {state: told[state] for state in STATES if told.get(state)}, told.get("why"), told.get("output"),
    )  # fmt: skip


def find_of(options: Mapping[str, Any]) -> Find | None:
    """Return `find` of options that `faults` finds nothing wrong with."""
    told = options.get("find")
    if not told:
        return None
    return Find(
        told["url"], told.get("method") or "GET", told.get("json"), told["handle"],
        _numbers(told.get("absent")), _seconds(told.get("listed_after"), LISTED_AFTER_S),
    )  # fmt: skip


def already(options: Mapping[str, Any]) -> tuple[int, ...]:
    return _numbers(options.get("already"))


def uses(value: Any, names: frozenset[str] | tuple[str, ...]) -> bool:
    """Say whether a template, or one in a nested value, uses one of these names."""
    return bool(set(_names(value)) & set(names))


def seat(options: Mapping[str, Any]) -> str:
    """Return scheme, host and port of the address, or where the secret is that it is: names differ by rule."""
    url = str(options["url"])
    parts = urlsplit(url.partition("{")[0])
    if parts.netloc:
        return f"{parts.scheme}://{parts.netloc}"
    name = url.strip("{}")
    return str((options.get("secrets") or {}).get(name, name))


def faults(options: Mapping[str, Any]) -> Iterator[OptionFault]:
    """Yield what is wrong with options that are valid one by one; keys below an option follow a dot."""
    secrets = options.get("secrets") or {}
    yield from _secrets(secrets, options)
    yield from _url("url", options.get("url"), secrets, handle=False)
    yield from _headers(options, secrets)
    yield from _body("json", options.get("json"), options.get("method"))
    for key in ("accepted", "handle", "output"):
        if options.get(key) is not None:
            yield from judge_expression(key, options[key], SAFE)
    if (timeout := options.get("timeout")) is not None and not 0.1 <= timeout <= DEADLINE_MAX_S:
        yield OptionFault("timeout", "an answer is waited for between 100 ms and 100 s", "write for example 30s")
    if options.get("poll"):
        yield from _poll(options, secrets)
    if options.get("find"):
        yield from _find(options["find"], secrets)
    if options.get("cancel"):
        yield from _request("cancel", options["cancel"], _CANCEL, secrets, handle=True)
    yield from _together(options)


def _together(options: Mapping[str, Any]) -> Iterator[OptionFault]:
    sends_key = bool(options.get("idempotency_header")) or uses([options.get("url"), options.get("json")], ("key",))
    if options.get("idempotent") and not sends_key:
        hint = "set `idempotency_header`, or write {key} into `json` or `url`"
        yield OptionFault("idempotent", "the service is told no key that it could know a repetition by", hint)
    if options.get("find") and not sends_key:
        hint = "set `idempotency_header`, or write {key} into `json` or `url`"
        yield OptionFault("find", "the service is told no key that an attempt could be found by", hint)
    if options.get("key_kept") is not None and not options.get("idempotent"):
        yield OptionFault("key_kept", "it says how long `idempotent: true` holds", "add that, or leave `key_kept` out")
    if options.get("poll") and options.get("output") is not None:
        yield OptionFault("output", "where a run is polled, its end tells the output", "move it into `poll`")
    if options.get("cancel") and not options.get("poll"):
        yield OptionFault("cancel", "without `poll` a run has ended once it was accepted", "add `poll`")


def _secrets(secrets: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[OptionFault]:
    told = [options.get(key) for key in ("url", "headers", "json", "poll", "find", "cancel")]
    for name, where in secrets.items():
        option = f"secrets.{name}"
        if not SECRET_NAME.fullmatch(name):
            yield OptionFault(option, f"`{name}` is no name of a secret", "capital letters, digits and _, as in TOKEN")
        elif not isinstance(where, str) or not (where.startswith("/") or CREDENTIAL_NAME.fullmatch(where)):
            # Not shown: the secret itself may stand there by mistake.
            hint = "name a credential of the service manager, or a file of mode 0600, from / on"
            yield OptionFault(option, "what stands there is no name of a secret", hint)
        elif not uses(told, (name,)):
            hint = f'as in `headers: {{Authorization: "Bearer {{{name}}}"}}`'
            yield OptionFault(option, f"nothing uses {{{name}}}", hint)


def _url(option: str, url: Any, secrets: Mapping[str, Any], *, handle: bool) -> Iterator[OptionFault]:
    hint = "write for example https://service.example.org/api/runs"
    if not isinstance(url, str):
        yield OptionFault(option, "an address is missing", hint)
        return
    found = _pieces(url)
    first = found[0] if found else ""
    if not isinstance(first, str):
        if len(found) != 1 or first[0] not in secrets:
            yield OptionFault(option, "a template cannot say the host; only a secret may be a whole address", hint)
        return
    try:
        parts = urlsplit(first)
        parts.port  # noqa: B018  raises for a port that is none
    except ValueError:
        yield OptionFault(option, "this is no address", hint)
        return
    if parts.scheme in ("http", "https") and len(found) > 1 and not (parts.path or parts.query):
        yield OptionFault(option, "a template cannot say the host or the port", hint)
    elif parts.scheme not in ("http", "https") or not parts.hostname:
        yield OptionFault(option, "this is no address of http or https", hint)
    elif "@" in parts.netloc:
        yield OptionFault(option, "a user or password cannot stand in an address", "use `headers` and `secrets`")
    if not handle and uses(url, ("handle",)):
        yield OptionFault(option, "{handle} has no value here", HANDLE_HINT)
    if uses(url, LISTS):
        yield OptionFault(option, "a list of files cannot stand in an address", "put it into `json`")


def _headers(options: Mapping[str, Any], secrets: Mapping[str, Any]) -> Iterator[OptionFault]:
    key, given = str(options.get("idempotency_header") or "").lower(), set()
    for name, value in (options.get("headers") or {}).items():
        option = f"headers.{name}"
        if name.lower() == key:
            hint = "leave it out, or set `idempotency_header: ''`"
            yield OptionFault(option, "it carries the attempt's key already", hint)
        elif name.lower() in given:
            yield OptionFault(option, f"`{name}` stands there twice", "case makes no other header")
        given.add(name.lower())
        if not _TOKEN.fullmatch(name) or name.lower() in _OURS:
            yield OptionFault(option, f"`{name}` cannot be a header here", "leave it out")
        elif not isinstance(value, str | int) or isinstance(value, bool):
            yield OptionFault(option, "a header is a text", "write it in quotes")
        elif not str(value).isprintable():
            yield OptionFault(option, "a header is one line", "leave out what cannot be seen")
        elif uses(value, (*LISTS, "handle")):
            yield OptionFault(option, "neither files nor {handle} can stand in a header", "put it into `json`")
    header = options.get("idempotency_header")
    if header and (not _TOKEN.fullmatch(header) or header.lower() in _OURS):
        yield OptionFault("idempotency_header", f"`{header}` is no name of a header", "such as Idempotency-Key")


def _body(option: str, body: Any, method: Any, *, handle: bool = False) -> Iterator[OptionFault]:
    if body is None:
        return
    try:
        json.dumps(body, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        yield OptionFault(option, f"it cannot be said in JSON: {error}", "texts, numbers, lists and mappings")
        return
    if method == "GET":
        yield OptionFault(option, "a GET carries no body", "set `method: POST`")
    for text in _texts(body):
        if uses(text, LISTS) and text not in ("{manifest}", "{files}"):
            hint = "write '{manifest}' or '{files}' as the whole value"
            yield OptionFault(option, "a list of files cannot stand within a text", hint)
            return
        if not handle and uses(text, ("handle",)):
            yield OptionFault(option, "{handle} has no value here", HANDLE_HINT)
            return


def _request(
    name: str, told: Mapping[str, Any], known: tuple[str, ...], secrets: Mapping[str, Any], *, handle: bool
) -> Iterator[OptionFault]:
    for key in told:
        if key not in known:
            yield OptionFault(f"{name}.{key}", f"`{name}` has no key `{key}`", nearest(key, known, "key"))
    if "url" not in told:
        yield OptionFault(name, f"`{name}` needs a `url`", "add it")
    else:
        yield from _url(f"{name}.url", told["url"], secrets, handle=handle)
    method = told.get("method")
    if method is not None and method not in METHODS:
        yield OptionFault(f"{name}.method", f"`{method}` is not a method", f"known are: {', '.join(METHODS)}")
    default = "POST" if name == "cancel" else "GET"
    yield from _body(f"{name}.json", told.get("json"), method or default, handle=handle)


def _poll(options: Mapping[str, Any], secrets: Mapping[str, Any]) -> Iterator[OptionFault]:
    told = options["poll"]
    yield from _request("poll", told, _POLL, secrets, handle=True)
    for key in ("succeeded", "failed"):
        if not told.get(key):
            yield OptionFault("poll", f"`poll` needs the expression `{key}`", "it says how the run's end is known")
    for key in (*STATES, "why", "output"):
        if told.get(key) is not None:
            yield from judge_expression(f"poll.{key}", told[key], SAFE | {"handle"})
    yield from _duration("poll.every", told.get("every"), EVERY_MIN_S)


def _find(told: Mapping[str, Any], secrets: Mapping[str, Any]) -> Iterator[OptionFault]:
    yield from _request("find", told, _FIND, secrets, handle=False)
    if not told.get("handle"):
        yield OptionFault("find", "`find` needs the expression `handle`", "such as `[0].id`: null is for none")
    else:
        yield from judge_expression("find.handle", told["handle"], SAFE)
    if not uses([told.get("url"), told.get("json"), told.get("handle")], ("key",)):
        yield OptionFault("find", "nothing in it says which attempt", "write {key} into `url`, `json` or `handle`")
    absent = told.get("absent")
    numbers = absent if isinstance(absent, list | tuple) else [] if absent is None else [absent]
    if not all(isinstance(number, int) and 400 <= number <= 499 for number in numbers):
        yield OptionFault("find.absent", "statuses from 400 to 499 are expected", "write for example [404]")
    yield from _duration("find.listed_after", told.get("listed_after"), 0.0)


def _duration(option: str, value: Any, least_s: float) -> Iterator[OptionFault]:
    if value is None:
        return
    try:
        if duration_s(str(value)) < least_s:
            yield OptionFault(option, f"it must be at least {least_s * 1_000:g} ms", "write for example 10s")
    except ValueError as error:
        yield OptionFault(option, str(error), "write for example 10s")


def _seconds(value: Any, default: float) -> float:
    return default if value is None else duration_s(str(value))


def _numbers(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _names(value: Any) -> Iterator[str]:
    for text in _texts(value):
        try:
            yield from template_names(text)
        except PatternError:  # told where templates are looked at
            continue


def _pieces(text: str) -> tuple[str | tuple[str, bool], ...]:
    try:
        return pieces(text)
    except PatternError:
        return (text,)
