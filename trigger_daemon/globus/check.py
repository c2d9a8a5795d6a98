"""Find out, before anything starts, what Globus would refuse a rule: credentials, collections, paths, index, flow.

Everything is asked of the service by the daemon's own account. Nothing is
transferred or started. One thing may be made: a destination's directory, which
the first transfer would make anyway; no other request tells whether it could.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from trigger_daemon.core.model import Scope
from trigger_daemon.core.regexes import PatternError
from trigger_daemon.core.rules import Rule
from trigger_daemon.core.templates import render, template_names
from trigger_daemon.globus.faults import Trouble, by_hand
from trigger_daemon.globus.login import ACTIONS, COMPUTE, TRANSFER, Identity, identity
from trigger_daemon.globus.paths import in_collection, join
from trigger_daemon.globus.service import Clients, Service

NAMES_COMPARED_MAX = 1_000  # of a directory, here and in the collection
LABEL_MAX = 64  # as the action cuts it
DEEP_MAX = 32  # directories of a destination that may be missing
WRITERS = frozenset({"owner", "admin", "writer"})
MANAGERS = frozenset({"administrator", "access_manager"})
TOKEN = "td-aaaaaaaaaaaaaaaa"  # as long as the tokens of runs
LOG_IN = "run `trigger-daemon globus login`"
SAMPLE = "sample"  # stands for what only a batch knows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `need`: who must act; 'wait' where Globus could not be reached."""

    rule: str  # '' where it concerns all
    what: str
    ok: bool = True
    why: str = ""
    hint: str = ""
    need: Literal["", "person", "wait"] = ""


class _Unreachable(Exception):
    """Globus itself cannot be reached: to ask on would only take long."""


def examine(service: Service, rules: Sequence[Rule]) -> tuple[Identity | None, list[Finding]]:
    """Return who we are to Globus, and what was found of each rule, in their order. Never raises Trouble."""
    try:
        # The one call that shows that the tokens are taken where transfers are.
        service.ask("use the account", lambda globus: globus.transfer.task_list(limit=1).data)
        me = identity(service)
    except Trouble as trouble:
        return None, [_fault("", "account", trouble, trouble.fault.hint)]
    found = [Finding("", "account", why=me.words())]
    examiner = _Examiner(service, me)
    try:
        for rule in rules:
            if rule.action in ACTIONS:
                found.extend(examiner.of_rule(rule))
    except _Unreachable as error:
        found.append(Finding("", "Globus", False, str(error), "what comes after it was not looked at", "wait"))
    return me, found


def _fault(rule: str, what: str, trouble: Trouble, hint: str) -> Finding:
    fault = trouble.fault
    waits = fault.kind == "transient" and fault.scope != Scope.DESTINATION
    if waits and hint == fault.hint:
        hint = by_hand(trouble)
    return Finding(rule, what, False, fault.why, hint, "wait" if waits else "person")


@dataclass(frozen=True, slots=True)
class _Fault:
    why: str
    hint: str


class _Examiner:
    """Asks once for what several rules need: the service counts requests."""

    def __init__(self, service: Service, me: Identity) -> None:
        self._service = service
        self._me = me
        self._known: dict[tuple[str, ...], Any] = {}

    def of_rule(self, rule: Rule) -> Iterator[Finding]:
        of = {TRANSFER: self._transfer, COMPUTE: self._compute}.get(rule.action, self._flow)
        yield from of(rule)

    # ------------------------------------------------------------------ asking

    def _ask(self, what: str, call: Callable[[Clients], T], *key: str) -> T:
        """Return an answer, or the one that was given before. Raises Trouble, _Unreachable."""
        if key and key in self._known:
            kept = self._known[key]
            if isinstance(kept, Trouble):
                raise kept
            answer: T = kept
            return answer
        try:
            answer = self._service.ask(what, call)
        except Trouble as trouble:
            if trouble.status == 0 and trouble.fault.kind == "transient":
                raise _Unreachable(trouble.fault.why) from None
            if key:
                self._known[key] = trouble
            raise
        if key:
            self._known[key] = answer
        return answer

    # ---------------------------------------------------------------- transfer

    def _transfer(self, rule: Rule) -> Iterator[Finding]:
        options = rule.options
        source, target = str(options["from"]).lower(), str(options["to"]).lower()
        roots = list(dict.fromkeys([rule.watch, *(one.root or rule.watch for one in rule.complete.companions)]))
        yield from self._source(rule, source, roots, by_flow=False)
        document, finding = self._collection(rule, "destination collection", target, "write", by_flow=False)
        yield finding
        if document is not None and finding.ok:
            directory = _fixed(str(options["path"]))
            yield self._writable(rule, target, directory, document)
            if options.get("access"):
                yield self._may_give(rule, document)
        if index := options.get("index"):
            yield self._index(rule, str(index["id"]))

    def _source(self, rule: Rule, collection: str, roots: Sequence[str], *, by_flow: bool) -> Iterator[Finding]:
        document, finding = self._collection(rule, "source collection", collection, "read", by_flow=by_flow)
        yield finding
        if document is None or not finding.ok:
            return
        for root in roots:
            yield self._shown(rule, "source directory", collection, root, document)

    def _collection(
        self, rule: Rule, what: str, collection: str, use: str, *, by_flow: bool
    ) -> tuple[Mapping[str, Any] | None, Finding]:
        """Return a collection's document, and whether it can be used."""
        try:
            document: Mapping[str, Any] = self._ask(
                f"look at collection {collection}",
                lambda globus: dict(globus.transfer.get_endpoint(collection).data), "endpoint", collection,
            )
            pauses: list[Mapping[str, Any]] = self._ask(
                f"ask whether collection {collection} is paused",
                lambda globus: [dict(one) for one in globus.transfer.my_effective_pause_rule_list(collection)],
                "pauses", collection,
            )
        except Trouble as trouble:
            hint = f"is the UUID right? else ask who manages the collection to let {self._me.words()} see it"
            return None, _fault(rule.name, what, trouble, hint if trouble.status in (403, 404) else trouble.fault.hint)
        fault = _unusable(document, pauses, use, by_flow=by_flow) or (
            None if by_flow or rule.proof != "required" else _unprovable(document)
        )
        if fault is None:
            return document, Finding(rule.name, what, why=_title(document))
        return document, Finding(rule.name, what, False, f"{_title(document)}: {fault.why}", fault.hint, "person")

    def _list(self, collection: str, path: str) -> list[str]:
        """Return names in a directory. Raises Trouble, _Unreachable."""
        return self._ask(
            f"list {path} of collection {collection}",
            lambda globus: [
                str(entry["name"])
                for entry in globus.transfer.operation_ls(
                    collection, path, limit=NAMES_COMPARED_MAX, show_hidden=False
                )
            ],
            "ls", collection, path,
        )  # fmt: skip

    def _shown(self, rule: Rule, what: str, collection: str, root: str, document: Mapping[str, Any]) -> Finding:
        """Say whether a collection shows a directory of this machine, and that very one."""
        path = in_collection(self._service.account.collections.get(collection, {}), root)
        if path is None:
            hint = f"add to the settings `globus: {{collections: {{{collection}: {{{root}: /}}}}}}`"
            return Finding(rule.name, what, False, f"{_title(document)} does not show {root}", hint, "person")
        try:
            names = self._list(collection, path)
        except Trouble as trouble:
            return self._refused(rule, what, trouble, document, path, "read")
        here = _names_here(root)
        if here and len(names) < NAMES_COMPARED_MAX and not here & set(names):
            why = f"{path} of {_title(document)} shows nothing of what lies in {root}"
            hint = "is the collection the right one, and what `globus: collections` in the settings say it shows?"
            return Finding(rule.name, what, False, why, hint, "person")
        return Finding(rule.name, what, why=f"{root} is {path}")

    def _refused(
        self, rule: Rule, what: str, trouble: Trouble, document: Mapping[str, Any], path: str, use: str
    ) -> Finding:
        """Say who can do something about a refusal of a path."""
        if trouble.scopes or (trouble.code == "ConsentRequired"):
            why = f"{_title(document)} wants a consent to use its data"
            return Finding(rule.name, "consent", False, why, LOG_IN, "person")
        if trouble.status == 403:
            may = "read" if use == "read" else "read and write"
            hint = f"ask {_manager(document)} to let {self._me.words()} {may} {path}"
        elif trouble.status == 404:
            hint = "are the rule, and `globus: collections` in the settings, right?"
        else:
            hint = trouble.fault.hint
        return _fault(rule.name, what, trouble, hint)

    def _writable(self, rule: Rule, collection: str, path: str, document: Mapping[str, Any]) -> Finding:
        """Make a destination's directory: the only request that shows the right to write without leaving a file."""
        what = "destination directory"
        try:
            self._made(collection, path)
            self._list(collection, path)
        except Trouble as trouble:
            return self._refused(rule, what, trouble, document, path, "write")
        return Finding(rule.name, what, why=path)

    def _made(self, collection: str, path: str, deep: int = 0) -> None:
        """Make a directory, and those above it; one that is there already is as good. Raises Trouble."""

        def make() -> None:
            try:
                self._ask(
                    f"make {path} in collection {collection}",
                    lambda globus: globus.transfer.operation_mkdir(collection, path).data, "mkdir", collection, path,
                )
            except Trouble as trouble:
                # What is answered for the top, which is always there, is not documented.
                if not trouble.code.endswith("Exists") and not (path == "/" and trouble.status in (400, 409)):
                    raise

        try:
            make()
        except Trouble as trouble:
            if trouble.status != 404 or path == "/" or deep >= DEEP_MAX:
                raise
            self._made(collection, path.rpartition("/")[0] or "/", deep + 1)
            del self._known["mkdir", collection, path]
            make()

    def _may_give(self, rule: Rule, document: Mapping[str, Any]) -> Finding:
        what = "access"
        if not document.get("acl_available", True):
            why = f"{_title(document)} has no access rules: only guest collections have"
            return Finding(rule.name, what, False, why, "leave `access` out, or send to a guest collection", "person")
        if not MANAGERS & set(document.get("my_effective_roles") or ()):
            why = f"this account may not give others access to {_title(document)}"
            hint = f"ask {_manager(document)} to make {self._me.words()} an access manager of it"
            return Finding(rule.name, what, False, why, hint, "person")
        return Finding(rule.name, what)

    def _index(self, rule: Rule, index: str) -> Finding:
        try:
            document: Mapping[str, Any] = self._ask(
                f"look at index {index}", lambda globus: dict(globus.search.get_index(index).data), "index", index
            )
            roles = document.get("permissions")
            if roles is None:
                mine: list[Mapping[str, Any]] = self._ask(
                    "list the indexes of this account",
                    lambda globus: [dict(one) for one in globus.search.index_list()], "indexes",
                )
                roles = next((one.get("permissions") for one in mine if one.get("id") == index), None)
        except Trouble as trouble:
            hint = f"is the UUID right? else ask the index's owner to let {self._me.words()} write to it"
            return _fault(rule.name, "index", trouble, hint if trouble.status in (403, 404) else trouble.fault.hint)
        title = f"{document.get('display_name') or index}"
        if not WRITERS & set(roles or ()):
            hint = f"ask the index's owner to make {self._me.words()} a writer of it"
            return Finding(rule.name, "index", False, f"this account may not write to {title}", hint, "person")
        return Finding(rule.name, "index", why=title)

    # ----------------------------------------------------------------- compute

    def _compute(self, rule: Rule) -> Iterator[Finding]:
        """Look at the endpoint, whether it is online, and at the function, whether it may run there."""
        endpoint, function = str(rule.options["endpoint"]).lower(), str(rule.options["function"]).lower()
        try:
            told: Mapping[str, Any] = self._ask(
                f"look at endpoint {endpoint}", lambda globus: dict(globus.compute.get_endpoint(endpoint).data),
                "compute endpoint", endpoint,
            )  # fmt: skip
            state: Mapping[str, Any] = self._ask(
                f"ask whether endpoint {endpoint} is online",
                lambda globus: dict(globus.compute.get_endpoint_status(endpoint).data), "compute status", endpoint,
            )
        except Trouble as trouble:
            hint = f"is the UUID right? else ask who manages the endpoint to let {self._me.words()} use it"
            yield _fault(rule.name, "endpoint", trouble, hint if trouble.status in (403, 404) else trouble.fault.hint)
        else:
            title = str(told.get("display_name") or told.get("name") or endpoint)
            if state.get("status") == "offline":
                hint = "start it where it runs (`globus-compute-endpoint start NAME`); tasks wait for it"
                yield Finding(rule.name, "endpoint", False, f"{title} is offline", hint, "person")
            else:
                yield Finding(rule.name, "endpoint", why=title)
        try:
            known: Mapping[str, Any] = self._ask(
                f"look at function {function}", lambda globus: dict(globus.compute.get_function(function).data),
                "compute function", function,
            )  # fmt: skip
        except Trouble as trouble:
            hint = f"is the UUID right? else let whoever registered it share it with {self._me.words()}"
            yield _fault(rule.name, "function", trouble, hint if trouble.status in (403, 404) else trouble.fault.hint)
        else:
            yield Finding(rule.name, "function", why=str(known.get("function_name") or function))

    # -------------------------------------------------------------------- flow

    def _flow(self, rule: Rule) -> Iterator[Finding]:
        options = rule.options
        number = str(options["flow"])
        if options.get("from") is not None:
            roots = list(dict.fromkeys([rule.watch, *(one.root or rule.watch for one in rule.complete.companions)]))
            yield from self._source(rule, str(options["from"]).lower(), roots, by_flow=True)
        if _uses(options.get("input"), "{manifest}"):
            yield from self._manifests(rule)
        try:
            flow: Mapping[str, Any] = self._ask(
                f"look at flow {number}", lambda globus: dict(globus.flows.get_flow(number).data), "flow", number
            )
        except Trouble as trouble:
            hint = f"is the UUID right? else ask the flow's owner to let {self._me.words()} see and start it"
            yield _fault(rule.name, "flow", trouble, hint if trouble.status in (403, 404) else trouble.fault.hint)
            return
        yield Finding(rule.name, "flow", why=str(flow.get("title") or number))
        yield self._takes(rule, number)

    def _manifests(self, rule: Rule) -> Iterator[Finding]:
        """Look at the collection that shows the manifests."""
        place = self._service.account.manifests
        if place is None:
            hint = "add to the settings `globus: {manifests: {path: DIRECTORY, collection: UUID}}`"
            why = "the settings do not say where manifests are written"
            yield Finding(rule.name, "manifests", False, why, hint, "person")
            return
        directory, collection = place
        document, finding = self._collection(rule, "manifests' collection", collection, "read", by_flow=True)
        yield finding
        if document is not None and finding.ok and os.path.isdir(directory):  # else the first batch makes it
            yield self._shown(rule, "manifests", collection, directory, document)

    def _takes(self, rule: Rule, number: str) -> Finding:
        """Ask the service whether it would start a run of this rule, with samples for what only a batch knows."""
        options, what = rule.options, "flow's input"
        body = _sampled(dict(options.get("input") or {}))
        said = " ".join(str(_sampled(str(options.get("label") or ""))).split())
        label = f"{said[: LABEL_MAX - len(TOKEN) - 1]} {TOKEN}".strip()
        people: dict[str, Any] = {
            f"run_{key}": named for key in ("managers", "monitors")
            if (named := [text for text in _texts(options.get(key)) if not _templated(text)])
        }  # fmt: skip
        try:
            self._ask(
                f"ask whether flow {number} takes the rule's input",
                lambda globus: globus.flow(number).validate_run(body, label=label, tags=[TOKEN], **people).data,
            )
        except Trouble as trouble:
            return self._not_taken(rule, what, trouble)
        return Finding(rule.name, what)

    def _not_taken(self, rule: Rule, what: str, trouble: Trouble) -> Finding:
        if trouble.code == "FLOW_INPUT_ERROR" and _only_samples(trouble.fault.why, rule.options.get("input")):
            return Finding(rule.name, what, why="whether it fits depends on each batch")
        if trouble.scopes or trouble.code == "MISSING_SCOPE" or trouble.status == 401:
            return _fault(rule.name, "consent", trouble, LOG_IN)
        if trouble.status == 403:
            hint = f"ask the flow's owner to make {self._me.words()} a starter of it"
            return _fault(rule.name, "permission to start the flow", trouble, hint)
        if trouble.status in (400, 422):
            return _fault(rule.name, what, trouble, "let `input` in the rule fit the flow's input schema")
        if trouble.status == 0:  # no token of the flow's own scope
            return _fault(rule.name, "consent", trouble, LOG_IN)
        return _fault(rule.name, what, trouble, trouble.fault.hint)


# --------------------------------------------------------------------------- collections


def _unusable(
    document: Mapping[str, Any], pauses: Sequence[Mapping[str, Any]], use: str, *, by_flow: bool
) -> _Fault | None:
    """Return why a collection cannot be transferred from (`read`) or to (`write`), None if it can."""
    manager = _manager(document)
    if document.get("entity_type") == "GCSv5_endpoint":
        return _Fault("it is an endpoint, not a collection", "take the UUID of a collection on it")
    if document.get("non_functional"):
        return _Fault("it does not work any more", f"ask {manager} to mend it, or take another collection")
    if document.get("gcp_connected") is False:
        return _Fault("Globus Connect Personal does not run there", "start it on that machine")
    if document.get("gcp_paused"):
        return _Fault("Globus Connect Personal is paused there", "let it go on, on that machine")
    for pause in pauses:
        if pause.get(f"pause_task_transfer_{use}", True):
            words = " ".join(str(pause.get("message") or "no reason given").split())
            return _Fault(f"it is paused by its manager: {words}", f"ask {manager} how long")
    if document.get("associated_flow_policy") and not by_flow:
        hint = "let the rule start that flow: `start: {globus_flow: {flow: UUID}}`"
        return _Fault("it takes files only by the flow that its manager has set", hint)
    return None


def _unprovable(document: Mapping[str, Any]) -> _Fault | None:
    """Return why what a collection sends or takes is never proved, None if it can be."""
    if not document.get("disable_verify"):
        return None
    hint = f"ask {_manager(document)} to allow it, or let the rule say `proof: none`"
    return _Fault("it forbids that checksums are compared (`disable_verify`), so nothing can be proved", hint)


def _title(document: Mapping[str, Any]) -> str:
    return f"collection {document.get('display_name') or document.get('id')}"


def _manager(document: Mapping[str, Any]) -> str:
    """Return whom to ask about a collection."""
    who = document.get("contact_email") or document.get("owner_string") or document.get("organization")
    return f"who manages {_title(document)}" + (f" ({who})" if who else "")


def _names_here(root: str) -> frozenset[str]:
    """Return names in a local directory that a collection surely shows; none where it cannot be read here."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in itertools.islice(entries, NAMES_COMPARED_MAX)]
    except OSError:
        return frozenset()
    if len(names) == NAMES_COMPARED_MAX:  # the others may be those that are listed
        return frozenset()
    return frozenset(name for name in names if not name.startswith(".") and name.isprintable())


def _fixed(path: str) -> str:
    """Return the part of a destination's path that is the same for every batch."""
    pieces = []
    for piece in path.strip("/").split("/"):
        if _templated(piece):
            break
        pieces.append(str(render(piece, {})))
    return join("/", "/".join(pieces)) if pieces != [""] else "/"


# ------------------------------------------------------------------------------- samples


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _uses(value: Any, text: str) -> bool:
    if isinstance(value, Mapping):
        return any(_uses(item, text) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_uses(item, text) for item in value)
    return bool(value == text)


def _templated(text: str) -> bool:
    try:
        return bool(template_names(text))
    except PatternError:
        return False


def _sampled(value: Any) -> Any:
    """Return a value of a flow's input as a batch might make it."""
    match value:
        case "{manifest}":
            nobody = "00000000-0000-4000-8000-000000000000"
            return {"collection": nobody, "path": "/sample.jsonl", "sha256": "0" * 64, "files": 1, "bytes": 1}
        case "{files}":
            return ["/sample"]
        case "{items}":
            return [{"source_path": "/sample", "destination_path": "/sample"}]
        case Mapping():
            return {key: _sampled(item) for key, item in value.items()}
        case list() | tuple():
            return [_sampled(item) for item in value]
        case str() if _templated(value):
            return render(value, dict.fromkeys(template_names(value), "1" if "|int}" in value else SAMPLE))
        case str():
            try:
                return render(value, {})
            except PatternError:
                return value
    return value


def _only_samples(why: str, value: Any) -> bool:
    """Say whether all that is wrong with an input is in places where a sample stands for what a batch brings."""
    places = re.findall(r"\$((?:\.[^\s.:;\[\]]+|\[[^\]]*\])*):", why)
    return bool(places) and all(_is_sample(value, re.findall(r"[^.\[\]'\"]+", place)) for place in places)


def _is_sample(value: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if isinstance(value, str):
            break
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list | tuple) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return False
    return isinstance(value, str) and _templated(value)
