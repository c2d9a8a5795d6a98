"""The grammar of rule files, as a table, and its reader.

One table serves the reader and the JSON Schema, so that an editor and the
daemon agree. Values are checked one by one here; what concerns several of them
or several rules is checked in `across.py`.
"""

from __future__ import annotations

import ntpath
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from trigger_daemon import registry
from trigger_daemon.config.source import Bad, Source, Value
from trigger_daemon.core import grammar
from trigger_daemon.core.grammar import Option, OptionFault, Options, nearest
from trigger_daemon.core.patterns import (
    Case,
    Ignore,
    PatternError,
    compiled,
    template_names,
    wants_number,
    with_slashes,
)
from trigger_daemon.core.rules import (
    BUILT_IN_IGNORES,
    After,
    Batch,
    CheckSpec,
    CloseOn,
    Complete,
    Reclaim,
    Retry,
    Rule,
    With,
)

RULES_MAX = 1_000  # over all files; a busy workstation has 20
NAME_MAX = 64  # characters of a rule's name; it stands in tables and MQTT topics

SpecialKind = Literal["root", "pattern", "patterns", "ignores", "checks", "start", "times", "name"]


@dataclass(frozen=True, slots=True)
class Special:
    """A key with a reader of its own."""

    kind: SpecialKind
    doc: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping with fixed keys; `many`: a list of them."""

    doc: str
    fields: Mapping[str, Option | Special | Section]
    many: bool = False
    required: bool = False


Fields = Mapping[str, Option | Special | Section]

CHECKS = Special("checks", "completeness checks: names, or `name: {options}`")

COMPANION = Section("a file that must come with another", {
    "file": Special("pattern", "its path, written with captures of `match`", required=True),
    "in": Special("root", "the directory it lies in; `watch` where absent"),
    "checks": CHECKS,
    "wait": Option("duration", "how long it is waited for", default=600.0),
    "missing": Option("enum", "what happens then", default="block", choices=("block", "go")),
    "shared": Option("bool", "rides along with whoever needs it (a gain reference), is never reclaimed", default=False),
}, many=True)

COMPLETE = Section("when a file is complete", {
    "quiescence": Option("duration", "seen unchanged this long", default=30.0),
    "trust": Option("texts", "signals after which one look counts as quiet", default=(), choices=("close", "rename")),
    "checks": CHECKS,
    "suspect": Option("duration", "a suspect file goes, flagged, after this long", default=300.0, choices=("block",)),
    "with": COMPANION,
    "allow_empty": Option("bool", "an empty file can be complete", default=False),
    "stalled_after": Option("duration", "never quiet or never complete: an alarm", default=1800.0),
})

CLOSE_ON = Section("a marker file that closes open groups", {
    "file": Special("pattern", "pattern of the marker", required=True),
    "checks": CHECKS,
    "quiescence": Option("duration", "the rule's own where absent"),
    "include": Option("bool", "the marker travels with the batch", default=False),
})

BATCH = Section("files that travel together; absent: each file on its own", {
    "group_by": Option("texts", "captures; one open batch a group", default=()),
    "files": Option("int", "close at so many files", minimum=1),
    "bytes": Option("size", "close at so many bytes", minimum=1),
    "oldest_waits": Option("duration", "close when the oldest complete file has waited this long"),
    "idle": Option("duration", "close when nothing new came for this long"),
    "expect": Option("int", "close when this many have come", minimum=1),
    "close_on": CLOSE_ON,
    "only_first": Option("int", "one batch a group, of the first so many", minimum=1),
    "new_group_after": Option("duration", "a group idle this long begins anew"),
    "at": Special("times", "close all groups at these times of day, HH:MM"),
})

RULE: Fields = {
    "name": Special("name", "unique over all files: a-z, 0-9 and -", required=True),
    "description": Option("text", "for people", default=""),
    "watch": Special("root", "the directory that is watched, absolute", required=True),
    "match": Special("patterns", "patterns below it; the first that matches gives the captures", required=True),
    "ignore": Special("ignores", "patterns of what is left out, added to the built-in ones"),
    "built_in_ignores": Option("bool", f"leave out {' '.join(BUILT_IN_IGNORES)} too", default=True),
    "case": Option("enum", "upper and lower case in names", default="exact", choices=("exact", "fold")),
    "existing": Option(
        "enum", "files already there when the rule is first accepted", required=True, choices=("process", "ignore"),
    ),
    "on_rewrite": Option("enum", "a file that changes later", default="again", choices=("again", "ignore", "block")),
    "priority": Option("int", "higher goes first", default=0),
    "after": Section("runs wait until another rule's run for the same captures succeeded", {
        "rule": Option("text", "that rule's name", required=True),
        "same": Option("texts", "captures that must agree", default=()),
    }),
    "complete": COMPLETE,
    "batch": BATCH,
    "start": Special("start", "exactly one action with its options", required=True),
    "proof": Option("enum", "whether a run is done only when proved", choices=("required", "none")),
    "limits": Section("for this rule", {
        "runs": Option("int", "at once", minimum=1),
        "bandwidth": Option("rate", "of all its runs together", minimum=1),
    }),
    "retry": Section("after a transient fault", {
        "initial": Option("duration", "first pause", default=5.0),
        "longest": Option("duration", "longest pause", default=600.0),
        "give_up_after": Option("duration", "then the run is held", default=604_800.0),
    }),
    "reclaim": Section("delete proven sources; absent: no opinion", {
        "proven_by": Option("texts", "rules that must have verified the file", required=True),
        "keep_for": Option("duration", "after the last proof", default=172_800.0),
        "only_under": Option("enum", "low: when space is; or as soon as due", default="low", choices=("low", "always")),
    }),
}

_RULE_NAME = re.compile(r"[a-z0-9-]+")
_TIME = re.compile(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(slots=True)
class Read:
    """A mapping as read: values by key, and where each stands. Absent keys have their defaults and no place."""

    at: Value
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Value] = field(default_factory=dict)
    whole: bool = True  # nothing in it was wrong

    def place(self, key: str) -> Value:
        return self.places.get(key, self.at)

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)


@dataclass(slots=True)
class Draft:
    """A rule with the places of its parts, for the checks across rules."""

    rule: Rule
    read: Read
    action: type[Any] | None
    companions: list[tuple[With, Read]]
    options: Read | None


# ------------------------------------------------------------------------- reading


def read_file(source: Source) -> list[Draft]:
    """Return the rules of one file; what is wrong is recorded in the source."""
    root = source.compose(empty="write `rules:` and the rules below it, or `rules: []`; or remove the file")
    if root is None:
        return []
    try:
        return list(_rules_of(root))
    except Bad as bad:
        source.add(bad.fault)
        return []


def _rules_of(root: Value) -> Iterator[Draft]:
    if root.kind == "list":
        root.bad("a rule file is a mapping with the key `rules`", "write `rules:` above the first rule, and indent")
    if root.kind != "map":
        root.bad(f"a rule file has the key `rules`, not {root.words()}", "write `rules:` and the rules below it")
    rules = None
    for key, value in root.pairs():
        if key.node.value == "rules":
            rules = value
        else:
            key.add(f"unknown key `{key.node.value}`", _misplaced(str(key.node.value), {"rules"}))
    if rules is None:
        root.bad("the key `rules` is missing", "write `rules:` above the first rule, and indent the rules")
    if rules.kind == "null":
        rules.bad("`rules` is empty", "write `rules: []` if no rule is meant")
    if rules.kind == "map":
        rules.bad("`rules` must be a list", "begin each rule with `- name: ...`")
    items = rules.items()
    if len(items) > RULES_MAX:
        rules.bad(f"{len(items):,} rules", f"at most {RULES_MAX:,} are allowed")
    for item in items:
        try:
            draft = _rule(item)
        except Bad as bad:
            item.source.add(bad.fault)
            continue
        if draft is not None:
            yield draft


def _misplaced(key: str, known: set[str]) -> str:
    if key in RULE and "rules" in known:
        return "it belongs into a rule: indent it below `rules:`, after `- `"
    for section, inside in (("complete", COMPLETE), ("batch", BATCH)):
        if key in inside.fields and section in known:
            return f"it belongs under `{section}:`"
    return nearest(key, known)


def read_fields(value: Value, fields: Fields) -> Read:
    """Return a mapping with fixed keys; faults of its parts are recorded, not raised."""
    read = Read(value)
    before = len(value.source.faults)
    for key, item in value.pairs():
        name = str(key.node.value)
        if name not in fields:
            where = f" in `{value.key}`" if value.key not in ("", "rules") else ""
            key.add(f"unknown key `{name}`{where}", _misplaced(name, set(fields)))
            continue
        read.places[name] = item
        try:
            read.values[name] = _value(item, fields[name])
        except Bad as bad:
            value.source.add(bad.fault)
    for name, spec in fields.items():
        if name in read.places:
            continue
        if spec.required:
            owner = f"`{value.key}`" if value.key and value.key != "rules" else "the rule"
            value.add(f"{owner} lacks the key `{name}`", f"`{name}`: {spec.doc}" + _choices(spec))
        elif isinstance(spec, Option):
            read.values[name] = spec.default
        elif isinstance(spec, Section) and not spec.many:
            read.values[name] = None
    read.whole = len(value.source.faults) == before
    return read


def _choices(spec: Option | Special | Section) -> str:
    return f": {' or '.join(spec.choices)}" if isinstance(spec, Option) and spec.choices else ""


def _value(value: Value, spec: Option | Special | Section) -> Any:
    if isinstance(spec, Section):
        if spec.many:
            return [read_fields(item, spec.fields) for item in value.items()]
        if value.kind == "null":
            value.bad(f"`{value.key}` is empty", f"remove it, or write below it: {', '.join(spec.fields)}")
        return read_fields(value, spec.fields)
    if isinstance(spec, Option):
        return leaf(value, spec)
    match spec.kind:
        case "name":
            return _name(value)
        case "root":
            return root_of(value)
        case "checks":
            return _checks(value)
        case "times":
            return tuple(_time(item) for item in value.items_or_one())
        case "pattern":
            return value.text(example="'{session}/{movie}.mdoc'")
        case "patterns" | "ignores":
            texts = [item.text(example="'{session}/{movie}.tiff'") for item in value.items_or_one()]
            if not texts and spec.kind == "patterns":
                value.bad("`match` is empty", "write at least one pattern, such as '{session}/{movie}.tiff'")
            return texts
        case "start":
            return value  # read with the rule, which knows the captures


def leaf(value: Value, option: Option) -> Any:
    """Return the value of an option; templates are let through where the option allows them."""
    if value.kind == "null" and option.default is None and not option.required:
        return None
    if option.template and option.kind in ("int", "ints") and value.kind == "text" and "{" in str(value.node.value):
        return str(value.node.value)
    match option.kind:
        case "text":
            return value.text()
        case "uuid":  # in one spelling: places are compared
            return value.text().lower()
        case "int" | "duration" if value.kind == "text" and value.node.value in option.choices:
            return str(value.node.value)
        case "int" if option.choices and value.kind == "text":
            plain = str(value.node.value)
            hint = f"write {plain}, without quotes" if plain.isdigit() else ""
            value.bad(
                f"`{value.key}` cannot be {value.words()}", hint or f"write a number, or {' or '.join(option.choices)}"
            )
        case "int":
            return value.integer(option.minimum)
        case "percent":
            return value.quantity(grammar.percentage, "%", "percentage")
        case "bool":
            return value.boolean()
        case "duration":
            return _at_least(value, value.quantity(grammar.duration_s, "s", "duration"), option.minimum, "s")
        case "size":
            return _at_least(value, value.quantity(grammar.size_bytes, "MB", "size"), option.minimum)
        case "rate":
            return _at_least(value, value.quantity(grammar.rate_bytes_per_s, "MB/s", "rate"), option.minimum)
        case "enum":
            return value.choice(option.choices)
        case "texts":
            return [item.choice(option.choices) if option.choices else item.text() for item in value.items_or_one()]
        case "ints":
            return [leaf(item, Option("int", "", minimum=option.minimum, template=option.template))
                    for item in value.items_or_one()]
        case "list":
            return [] if value.kind == "null" else [item.plain() for item in value.items_or_one()]
        case "map":
            return {} if value.kind == "null" else {str(k.node.value): v.plain() for k, v in value.pairs()}


Number = TypeVar("Number", int, float)


def _at_least(value: Value, number: Number, minimum: int | None, unit: str = "") -> Number:
    if minimum is not None and number < minimum:
        value.bad(f"`{value.key}` must be at least {minimum}{unit}, not {value.node.value}")
    return number


def _name(value: Value) -> str:
    text = value.text(example="krios-movies")
    if not _RULE_NAME.fullmatch(text):
        better = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-") or "krios-movies"
        value.bad(f"`{text}` is no name of a rule: only a-z, 0-9 and - are allowed", f"write for example `{better}`")
    if len(text) > NAME_MAX:
        value.bad(f"the name has {len(text)} characters", f"at most {NAME_MAX} are allowed")
    return text


def _time(value: Value) -> str:
    text = value.text(example='"06:30"')
    if not _TIME.fullmatch(text):
        value.bad(f"`{text}` is not a time of day", 'write hours and minutes with two digits each, such as "06:30"')
    return text


def root_of(value: Value) -> str:
    """Return an absolute directory, `/` as separator, without one at its end (but for a bare drive)."""
    text = value.text(example="/data/krios1")
    if windows_root(text):
        unc = text.startswith("\\\\")
        parts = text.replace("\\", "/").split("/")
        kept = [part for part in parts if part not in ("", ".")]
        if ".." in parts or (unc and len(kept) < 2):
            value.bad(f"`{text}` is not a directory of its own", "write it out, such as C:\\data or \\\\server\\share")
        return "//" + "/".join(kept) if unc else "/".join(kept) + ("/" if len(kept) == 1 else "")
    if not text.startswith("/"):
        example = "C:\\data" if ntpath.splitdrive(text)[0] else "/data/krios1"
        value.bad(f"`{value.key}` must be an absolute path, not `{text}`", f"write it from the top, such as {example}")
    if ".." in text.split("/"):
        value.bad(f"`{text}` holds `..`", "write the directory itself")
    if any(char in text for char in "*{}"):
        value.bad(f"`{value.key}` is one directory, without wildcards", "end it before them; the rest is for `match`")
    path = posixpath.normpath(text)
    if os.name != "nt":
        path = "/" + path.lstrip("/")
    if path.strip("/") == "":
        value.bad(f"`{value.key}` cannot be the whole file system", "name the directory the instrument writes to")
    return path


def windows_root(text: str) -> bool:
    return bool(_DRIVE.match(text)) or text.startswith("\\\\")


def _checks(value: Value) -> tuple[CheckSpec, ...]:
    checks = []
    for item in value.items_or_one() if value.kind != "map" else value.bad(
        f"`{value.key}` must be a list", "write `- tiff: {frames: 40}` or [tiff: {frames: 40}]",
    ):
        try:
            checks.append(_check(item))
        except Bad as bad:
            value.source.add(bad.fault)
    return tuple(checks)


def _check(value: Value) -> CheckSpec:
    name, place, given = _one_of(value, "check")
    check = _find_check(place, name)
    before = len(value.source.faults)
    options = _options(place, given, check.OPTIONS, f"the check {name}")
    judges = ("check_options",) if value.source.elsewhere else ("check_options", "check_usable")
    for judge in filter(None, (getattr(check, hook, None) for hook in judges)):
        if len(value.source.faults) == before:
            ask_about(judge, options, given or place)
    return name, options.values


def _one_of(value: Value, noun: str) -> tuple[str, Value, Value | None]:
    """Return name, its place, and the options of `name` or `name: {options}`."""
    if value.kind != "map":
        return value.text(), value, None
    pairs = list(value.pairs())
    if len(pairs) != 1:
        names = ", ".join(str(key.node.value) for key, _ in pairs)
        hint = f"options of the {noun} are indented below it"
        value.bad(f"exactly one {noun} must stand here, not {len(pairs)}: {names}", hint)
    key, given = pairs[0]
    return str(key.node.value), key, given


def _find_check(place: Value, name: str) -> Any:
    try:
        return registry.find_check(name)
    except registry.Unregistered as error:
        place.bad(error.message, nearest(name, registry.check_names(), "check"))
    except registry.Unusable as error:
        place.bad(error.message, error.hint)


def _options(place: Value, given: Value | None, declared: Options, owner: str) -> Read:
    """Return validated options, defaults filled in."""
    if given is None or given.kind == "null":
        read = Read(given or place)
        for name, option in declared.items():
            if option.required:
                place.add(f"{owner} needs the option `{name}`", f"{name}: {option.doc}")
            read.values[name] = option.default
        return read
    if given.kind != "map":
        hint = f"known are: {', '.join(declared) or 'none'}"
        given.bad(f"the options of {owner} must be a mapping, not {given.words()}", hint)
    read = Read(given)
    for key, item in given.pairs():
        name = str(key.node.value)
        if name not in declared:
            key.add(f"{owner} has no option `{name}`", nearest(name, declared, "option"))
            continue
        read.places[name] = item
        try:
            read.values[name] = leaf(item, declared[name])
        except Bad as bad:
            place.source.add(bad.fault)
    for name, option in declared.items():
        if name not in read.places:
            if option.required:
                place.add(f"{owner} needs the option `{name}`", f"{name}: {option.doc}")
            read.values[name] = option.default
    return read


# -------------------------------------------------------------------------- a rule


def _rule(value: Value) -> Draft | None:
    if value.kind != "map":
        value.bad(f"a rule is a mapping, not {value.words()}", "begin it with `- name: ...`")
    faults_before = len(value.source.faults)
    read = read_fields(value, RULE)
    _patterns(read)
    action, name, options = _start(read)
    if read["name"] is None:
        return None
    complete, batch = read["complete"], read["batch"]
    companions = [
        (With(
            file=_slashed(read, one["file"]), root=one["in"] or read["watch"] or "", checks=one["checks"] or (),
            wait_s=one["wait"], missing=one["missing"], shared=one["shared"],
        ), one)
        for one in (complete["with"] or [] if complete else []) if one.whole
    ]
    rule = Rule(
        name=read["name"], watch=read["watch"] or "", match=tuple(_slashed(read, text) for text in read["match"] or ()),
        existing=read["existing"] or "process", action=name, options=options.values if options else {},
        description=read["description"] or "",
        ignore=(BUILT_IN_IGNORES if read["built_in_ignores"] is not False else ())
        + tuple(_slashed(read, text) for text in read["ignore"] or ()),
        case=read["case"] or "exact", on_rewrite=read["on_rewrite"] or "again", priority=read["priority"] or 0,
        after=_after(read["after"]), complete=_complete(complete, companions), batch=_batch(batch, read, action),
        proof=_proof(read, action, options), runs_max=(read["limits"] or {"runs": None})["runs"],
        bandwidth=(read["limits"] or {"bandwidth": None})["bandwidth"], retry=_retry(read["retry"]),
        reclaim=_reclaim(read["reclaim"]), file=value.source.file, line=value.line,
    )
    read.whole = len(value.source.faults) == faults_before
    return Draft(rule, read, action, companions, options)


def _slashed(read: Read, text: str | None) -> str:
    """Return a pattern with `/`, where the root is one of Windows."""
    if text is None:
        return ""
    watch = read.places.get("watch")
    return with_slashes(text) if watch is not None and windows_root(str(watch.node.value)) else text


def _patterns(read: Read) -> None:
    """Compile every pattern of a rule, and record what is wrong with it where it stands."""
    case: Case = "fold" if read["case"] == "fold" else "exact"
    for key in ("match", "ignore"):
        if read[key] is None:
            continue
        for item, text in zip(read.places[key].items_or_one(), read[key], strict=True):
            try:
                if key == "match":
                    compiled(_slashed(read, text), case)
                else:
                    Ignore([_slashed(read, text)], case)
            except PatternError as error:
                item.add(_pattern_words(error, text), error.hint, error.offset)
    batch = read["batch"]
    close_on = batch["close_on"] if batch else None
    if close_on is not None and close_on["file"] is not None:
        try:
            compiled(_slashed(read, close_on["file"]), case)
        except PatternError as error:
            close_on.place("file").add(_pattern_words(error, close_on["file"]), error.hint, error.offset)


def _pattern_words(error: PatternError, text: str) -> str:
    return f"{error.message}, in the pattern '{text}'"


def _complete(read: Read | None, companions: list[tuple[With, Read]]) -> Complete:
    if read is None:
        return Complete()
    default = Complete()
    return Complete(
        quiescence_s=_or(read["quiescence"], default.quiescence_s), trust=frozenset(read["trust"] or ()),
        checks=read["checks"] or (), suspect_s=None if read["suspect"] == "block" else _or(read["suspect"], 300.0),
        companions=tuple(companion for companion, _ in companions), allow_empty=bool(read["allow_empty"]),
        stalled_after_s=_or(read["stalled_after"], default.stalled_after_s),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _batch(batch: Read | None, read: Read, action: type[Any] | None) -> Batch | None:
    if batch is None:
        return None
    closing = batch["close_on"]
    marker = CloseOn(
        file=_slashed(read, closing["file"]), checks=closing["checks"] or (), quiescence_s=closing["quiescence"],
        include=bool(closing["include"]),
    ) if closing is not None else None
    conditions = ("files", "bytes", "oldest_waits", "idle", "expect", "close_on", "only_first", "at")
    if not any(condition in batch.places for condition in conditions):
        hint = f"add at least one of {', '.join(conditions)}; without `batch` each file goes on its own"
        batch.at.add("`batch` never closes", hint)
    return Batch(
        group_by=tuple(batch["group_by"] or ()), files=batch["files"], bytes=batch["bytes"],
        oldest_waits_s=batch["oldest_waits"], idle_s=batch["idle"], expect=batch["expect"], close_on=marker,
        only_first=batch["only_first"], new_group_after_s=batch["new_group_after"], at=batch["at"] or (),
        files_max=getattr(action, "FILES_MAX", None),
    )


def _after(read: Read | None) -> After | None:
    return After(read["rule"] or "", tuple(read["same"] or ())) if read is not None else None


def _retry(read: Read | None) -> Retry:
    if read is None:
        return Retry()
    default = Retry()
    retry = Retry(
        _or(read["initial"], default.initial_s), _or(read["longest"], default.longest_s),
        _or(read["give_up_after"], default.give_up_after_s),
    )
    if read.whole and (retry.initial_s <= 0 or retry.longest_s < retry.initial_s):
        read.place("initial").add("`initial` must be more than 0, at most `longest`", "write for example 5s and 10m")
    return retry


def _reclaim(read: Read | None) -> Reclaim | None:
    if read is None:
        return None
    return Reclaim(tuple(read["proven_by"] or ()), _or(read["keep_for"], 172_800.0), read["only_under"] or "low")


# ------------------------------------------------------------------------- actions


def _start(read: Read) -> tuple[type[Any] | None, str, Read | None]:
    """Return the action's class, its name, and its options."""
    value: Value | None = read["start"]
    if value is None:
        return None, "", None
    name = ""
    try:
        if value.kind == "null" or (value.kind == "map" and not value.node.value):
            value.bad("`start` names no action", f"known are: {', '.join(registry.action_names())}")
        name, place, given = _one_of(value, "action")
        action = _find_action(place, name)
        before = len(value.source.faults)
        options = _options(place, given, action.OPTIONS, f"the action {name}")
        options.whole = len(value.source.faults) == before
        if options.whole:
            ask_about(bare(action).check, options, given or place)
        return action, name, options
    except Bad as bad:
        value.source.add(bad.fault)
        return None, name, None


def _find_action(place: Value, name: str) -> type[Any]:
    try:
        return registry.find_action(name)
    except registry.Unregistered as error:
        place.bad(error.message, nearest(name, registry.action_names(), "action"))
    except registry.Unusable as error:
        place.bad(error.message, error.hint)


def bare(action: type[Any]) -> Any:
    """Return an instance for questions about options, which need nothing of a daemon's life and start nothing."""
    return object.__new__(action)


def ask_about(judge: Callable[[Mapping[str, Any]], None], options: Read, place: Value) -> None:
    """Let an action or a check judge its options together."""
    try:
        judge(options.values)
    except* OptionFault as found:
        for fault in found.exceptions:
            assert isinstance(fault, OptionFault)
            _within(options, fault.option, place).add(
                f"`{fault.option}`: {fault.message}" if fault.option else fault.message, fault.hint,
            )


def _within(options: Read, name: str, place: Value) -> Value:
    """Return where an option stands, or, behind a dot, one key of an option that is a mapping."""
    key, _, inner = name.partition(".")
    at = options.places.get(key, place)
    if not inner or at.kind != "map":
        return at
    return next((value for below, value in at.pairs() if str(below.node.value) == inner), at)


def _proof(read: Read, action: type[Any] | None, options: Read | None) -> Literal["required", "none"]:
    """Return `proof`: as written, else required where the action can verify."""
    able = action is not None and options is not None and can_verify(action, options.values)
    wish = read["proof"]
    if wish == "required" and action is not None and options is not None and options.whole and not able:
        depends = " with these options" if action.VERIFIES else ""
        read.place("proof").add(
            f"`proof: required` is not possible: the action cannot verify what it did{depends}",
            "write `proof: none`, or " + ("give it the option that verifies" if depends else "take another action"),
        )
    if wish in ("required", "none"):
        return "required" if wish == "required" else "none"
    return "required" if able else "none"


def can_verify(action: type[Any], options: Mapping[str, Any]) -> bool:
    """Say whether the action can prove what it did, with these options."""
    if not action.VERIFIES:
        return False
    return bool(bare(action).verifies(options)) if hasattr(action, "verifies") else True


def template_faults(value: Value, option: Option) -> Iterator[tuple[Value, str, tuple[str, ...], PatternError | None]]:
    """Yield every text below an option that is a template: its place, text, names, and what is wrong with it."""
    if value.kind == "map":
        for _, item in value.pairs():
            yield from template_faults(item, option)
    elif value.kind == "list":
        for item in value.items():
            yield from template_faults(item, option)
    elif value.kind == "text":
        text = str(value.node.value)
        try:
            names = template_names(text)
            wrong = None
            if names and wants_number(text) and option.kind not in ("int", "ints", "list", "map"):
                wrong = PatternError(f"`{text}` is a number, but `{value.key}` is a text", 0, f"write '{{{names[0]}}}'")
            yield value, text, names, wrong
        except PatternError as error:
            yield value, text, (), error


__all__ = ["RULE", "Draft", "Fields", "Read", "Section", "Special", "read_file"]
