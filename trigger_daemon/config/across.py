"""What concerns several values of a rule, or several rules: captures, names, loops.

Only rules that could be read come here, so that one mistake gives one fault.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from trigger_daemon import registry
from trigger_daemon.config.rules import Draft, Read, ask_about, bare, can_verify, template_faults
from trigger_daemon.config.source import Bad, Value
from trigger_daemon.core.grammar import nearest
from trigger_daemon.core.patterns import Ignore, Pattern, PatternError, compiled
from trigger_daemon.core.rules import BUILT_IN_IGNORES, Rule, With

ALWAYS_NAMES = ("rule", "batch", "host", "date")  # in every action's strings


def check(drafts: Sequence[Draft], settings: Mapping[str, Any] | None = None) -> None:
    """Record every fault of a set of rules, over all its files; with the settings, what depends on them, too."""
    rules: dict[str, Draft] = {}
    for draft in drafts:
        other = rules.setdefault(draft.rule.name, draft)
        if other is not draft:
            draft.read.place("name").add(
                f"the name `{draft.rule.name}` is taken",
                f"by the rule in {other.rule.file}:{other.rule.line}; rename one",
            )
    for draft in drafts:
        try:
            matches = _compiled(draft)
            if matches is not None:
                _captures(draft, matches)
                _never(draft, matches)
            _companions_twice(draft)
            _asking(draft)
            _own_digest(draft)
            _after(draft, rules)
            _proven_by(draft, rules)
            _loops(draft, drafts, settings)
            _size(draft)
            _one_place(draft, drafts)
            _shown(draft, settings)
        except Bad as bad:
            draft.read.at.source.add(bad.fault)


def _compiled(draft: Draft) -> list[Pattern] | None:
    """Return the patterns of `match`, None if there are none or one has a fault of its own."""
    try:
        return [compiled(text, draft.rule.case) for text in draft.rule.match] or None
    except PatternError:
        return None


# ----------------------------------------------------------------------- captures


def _captures(draft: Draft, matches: Sequence[Pattern]) -> None:
    some = {name for pattern in matches for name in pattern.captures}
    every = {name for name in some if all(name in pattern.captures for pattern in matches)}
    lacks = {name: next(p.text for p in matches if name not in p.captures) for name in some - every}
    batch = draft.read["batch"]
    if batch is not None and batch["group_by"]:
        for item in batch.places["group_by"].items_or_one():
            name = str(item.node.value)
            if name not in every:
                item.add(*_unknown(name, every, lacks, "`group_by`"))
    group = set(draft.rule.batch.group_by) if draft.rule.batch is not None else every
    for companion, read in draft.companions:
        _companion(companion, read, every, lacks)
    close_on = batch["close_on"] if batch is not None else None
    if close_on is not None and draft.rule.batch is not None and draft.rule.batch.close_on is not None:
        _marker(close_on.place("file"), draft.rule.batch.close_on.file, draft.rule, every | set(lacks))
    _templates(draft, every, lacks, group)


def _unknown(name: str, every: set[str], lacks: Mapping[str, str], where: str) -> tuple[str, str]:
    if name in lacks:
        return (
            f"{where}: the capture `{name}` is not in every pattern of `match`",
            f"'{lacks[name]}' lacks it; use the same captures in all, or make two rules",
        )
    return f"{where}: `match` has no capture `{name}`", nearest(name, every, "capture")


def _companion(companion: With, read: Read, every: set[str], lacks: Mapping[str, str]) -> None:
    place = read.place("file")
    try:
        pattern = compiled(companion.file)
    except PatternError as error:
        place.add(f"{error.message}, in the companion '{companion.file}'", error.hint, error.offset)
        return
    wild = pattern.plain_wildcard()
    if wild is not None:
        place.add(
            "a companion must be exactly one file, so wildcards and regexes cannot stand in it",
            "use captures of `match`: what varies there can be captured, and written here as {name}", wild.offset,
        )
        return
    for name in pattern.captures:
        if name not in every:
            place.add(*_unknown(name, every, lacks, "companion"), companion.file.find("{" + name))


def _marker(place: Value, text: str, rule: Rule, known: set[str]) -> None:
    try:
        pattern = compiled(text, rule.case)
    except PatternError:
        return  # recorded where patterns are read
    for name in pattern.captures:
        if name not in known:
            hint = nearest(name, known, "capture")
            place.add(
                f"`close_on`: `match` has no capture `{name}`, so it could not tell which groups to close",
                f"{hint}; for text that does not matter, write *", text.find("{" + name),
            )


def _templates(draft: Draft, every: set[str], lacks: Mapping[str, str], group: set[str]) -> None:
    if draft.options is None or draft.action is None:
        return
    own = {*ALWAYS_NAMES, *registry.extra_names(draft.action, draft.options.values)}
    known = group | own
    for key, place in draft.options.places.items():
        option = draft.action.OPTIONS[key]
        if not option.template or key not in draft.options.values:
            continue
        for item, text, names, wrong in template_faults(place, option):
            if wrong is not None:
                item.add(f"`{key}`: {wrong.message}", wrong.hint, wrong.offset)
            for name in names:
                at = text.find("{" + name)
                if name in own and name in every | set(lacks):
                    item.add(
                        f"`{key}`: {{{name}}} means both a capture of `match` and the daemon's own",
                        "give the capture another name", at,
                    )
                elif name in known:
                    continue
                elif draft.rule.batch is not None and name in every:
                    item.add(
                        f"`{key}`: the files of a batch have different `{name}`",
                        f"add {name} to `group_by`, or use {{batch}}", at,
                    )
                elif name in lacks:
                    item.add(*_unknown(name, every, lacks, f"`{key}`"), at)
                else:
                    item.add(f"`{key}`: nothing is called `{name}`", nearest(name, known), at)


def _never(draft: Draft, matches: Sequence[Pattern]) -> None:
    """A pattern whose every match is ignored would wait for ever, in silence."""
    try:
        ignore = Ignore(draft.rule.ignore, draft.rule.case)
    except PatternError:
        return
    for item, pattern in zip(draft.read.places["match"].items_or_one(), matches, strict=True):
        samples = [pattern.sample(fill) for fill in ("x", "7")]
        found = {ignore.ignores(sample) for sample in samples if sample is not None}
        if len(found) == 1 and (text := found.pop()) is not None:
            built_in = text in BUILT_IN_IGNORES
            item.add(
                f"this pattern can never match: `{text}` ignores all of it",
                "set `built_in_ignores: false`, list those you want" if built_in else "remove one of the two",
            )


# ------------------------------------------------------------------- between rules


def _group(draft: Draft) -> set[str] | None:
    """Return the captures that name a run of this rule; None if they cannot be told."""
    if draft.rule.batch is not None:
        return set(draft.rule.batch.group_by)
    matches = _compiled(draft)
    if matches is None:
        return None
    return set(matches[0].captures).intersection(*(pattern.captures for pattern in matches))


def _after(draft: Draft, rules: Mapping[str, Draft]) -> None:
    after, read = draft.rule.after, draft.read["after"]
    if after is None or read is None or not after.rule:
        return
    other = rules.get(after.rule)
    if other is None:
        hint = nearest(after.rule, set(rules) - {draft.rule.name})
        read.place("rule").add(f"`after`: there is no rule `{after.rule}`", hint)
        return
    chain = [draft.rule.name]
    follow: Draft | None = other
    while follow is not None and follow.rule.name not in chain:
        chain.append(follow.rule.name)
        follow = rules.get(follow.rule.after.rule) if follow.rule.after is not None else None
    if follow is not None and follow.rule.name == draft.rule.name:
        read.place("rule").add(
            f"`after` goes in a circle: {' -> '.join([*chain, draft.rule.name])}",
            "none of them could ever start; remove one",
        )
        return
    if not after.same:
        return
    mine, theirs = _group(draft), _group(other)
    for item in read.places["same"].items_or_one():
        name = str(item.node.value)
        for owner, group, rule in (("this rule", mine, draft.rule), (f"the rule `{after.rule}`", theirs, other.rule)):
            if group is not None and name not in group:
                kind = "`group_by`" if rule.batch is not None else "`match`"
                item.add(f"`same`: {kind} of {owner} has no capture `{name}`", nearest(name, group, "capture"))


def _proven_by(draft: Draft, rules: Mapping[str, Draft]) -> None:
    reclaim, read = draft.rule.reclaim, draft.read["reclaim"]
    if reclaim is None or read is None or "proven_by" not in read.places or read["proven_by"] is None:
        return
    place = read.places["proven_by"]
    if not reclaim.proven_by:
        place.add("`proven_by` names no rule", "nothing is deleted without proof: name at least one rule that verifies")
    for item in place.items_or_one():
        name = str(item.node.value)
        other = rules.get(name)
        if other is None:
            item.add(f"`proven_by`: there is no rule `{name}`", nearest(name, rules))
        elif other.options is not None and other.options.whole and other.rule.proof == "none":
            able = other.action is not None and can_verify(other.action, other.rule.options)
            item.add(
                f"`proven_by`: the rule `{name}` proves nothing (`proof: none`)",
                "set `proof: required` there" if able else "name a rule whose action verifies, such as `copy`",
            )


def _loops(draft: Draft, drafts: Sequence[Draft], settings: Mapping[str, Any] | None) -> None:
    """What we write into a watched directory would be taken for new files, for ever."""
    if draft.action is None or draft.options is None or not draft.options.whole:
        return
    action, options = bare(draft.action), draft.options.values
    here = action.writes_here(options, settings) if settings is not None and hasattr(action, "writes_here") else ()
    for written in (*action.writes(options), *here):
        directory = _fixed(str(written))
        for other in drafts:
            watch = other.rule.watch
            if not watch or not (directory == watch or directory.startswith(watch.rstrip("/") + "/")):
                continue
            below = directory[len(watch.rstrip("/")) + 1 :]
            try:
                if below and Ignore(other.rule.ignore, other.rule.case).ignores(f"{below}/x") is not None:
                    continue
            except PatternError:
                continue
            place = draft.options.places.get("path", draft.options.at) if written in here else None
            (place or _writing_place(draft.options, str(written))).add(
                f"{written} lies inside {watch}, which the rule `{other.rule.name}` watches: copies would be new files",
                f'write elsewhere, or add "{below}/" to its `ignore`' if below else "write elsewhere",
            )
            break


def _one_place(draft: Draft, drafts: Sequence[Draft]) -> None:
    """Two roots whose files keep their paths below one directory elsewhere would overwrite each other's.

    One below that of another rule does too: directories of the other may be called so.
    """
    judge = getattr(draft.action, "place", None)
    if judge is None or draft.options is None or not draft.options.whole or not draft.rule.watch:
        return
    service, place = bare(draft.action).place(draft.options.values)  # type: ignore[arg-type]
    for other in itertools.takewhile(lambda one: one is not draft, drafts):
        if other.action is not draft.action or other.options is None or not other.options.whole:
            continue
        if not other.rule.watch:
            continue
        theirs, below = bare(other.action).place(other.options.values)  # type: ignore[arg-type]
        if theirs != service or not _collide(draft.rule, place, other.rule, below):
            continue
        at = draft.options.places.get("path") or draft.options.at
        at.add(
            f"the files of `{other.rule.name}`, below {other.rule.watch}, go to the same directory, or to one below the"
            " other: those of one name would overwrite each other",
            "give each rule a `path` of its own, such as /raw/one and /raw/two",
        )
        return


def _collide(one: Rule, place: str, other: Rule, below: str) -> bool:
    """Say whether two rules surely send to one directory, or one to where the other sends, and not the same files."""
    pair = sorted([(one.watch, one.name, place), (other.watch, other.name, below)], key=lambda it: len(it[0]))
    (high, deep), places = (watch.strip("/").split("/") for watch, _, _ in pair), []
    for _, name, path in pair:  # a batch has its number alone
        places.append([part.replace("{rule}", name) for part in path.split("/") if part])
    if any(a != b or "{batch}" in a for a, b in zip(*places, strict=False)):
        return False
    # The root of one lies in that of the other just as their places do: they are the same files.
    return not (deep[: len(high)] == high and places[1] == [*places[0], *deep[len(high) :]])


def _size(draft: Draft) -> None:
    """A provider that takes so many files at most would refuse the whole batch."""
    most = getattr(draft.action, "FILES_MAX", None)
    batch, read = draft.rule.batch, draft.read["batch"]
    if most is None or batch is None or read is None:
        return
    for key in ("files", "only_first", "expect"):
        if (wanted := getattr(batch, key)) is not None and wanted > most:
            read.place(key).add(
                f"`{key}` is {wanted}, but {draft.rule.action} takes {most} files at once", f"write at most {most}"
            )
    beside = sum(not companion.shared for companion, _ in draft.companions)
    if batch.only_first is not None and batch.only_first <= most < batch.only_first * (1 + beside):
        read.place("only_first").add(
            f"`only_first` is {batch.only_first}, with companions {batch.only_first * (1 + beside)} files, but"
            f" {draft.rule.action} takes {most} at once", f"write at most {most // (1 + beside)}",
        )  # fmt: skip


def _shown(draft: Draft, settings: Mapping[str, Any] | None) -> None:
    """Ask the action whether it can name the directories that the rule's files lie in."""
    judge = getattr(draft.action, "check_roots", None)
    if judge is None or settings is None or draft.options is None or not draft.options.whole or not draft.rule.watch:
        return
    roots = [draft.rule.watch, *(companion.root or draft.rule.watch for companion, _ in draft.companions)]
    ask_about(
        lambda values: bare(draft.action).check_roots(values, tuple(dict.fromkeys(roots)), settings),  # type: ignore[arg-type]
        draft.options, draft.options.at,
    )


def _fixed(path: str) -> str:
    """Return the directory a templated path surely lies in (or is)."""
    text = path.replace("\\", "/") if "\\" in path[:3] else path
    head, brace, _ = text.partition("{")
    return posixpath.normpath(posixpath.dirname(head) if brace else head)


def _writing_place(options: Read, written: str) -> Value:
    for place in options.places.values():
        if place.kind in ("text", "list"):
            for item in place.items_or_one():
                if str(item.node.value).startswith(written):  # an action may tell only the part before a capture
                    return item
    return options.at


# ------------------------------------------------------------------------- checks


def _companions_twice(draft: Draft) -> None:
    """One file has one verdict: what is to be checked of a companion stands in one entry."""
    seen: set[tuple[str, str]] = set()
    for companion, read in draft.companions:
        place = (companion.root, companion.file)
        if place in seen:
            read.place("file").add(
                f"the companion `{companion.file}` is there twice", "write all its checks into one entry of `with`"
            )
        seen.add(place)


def _asking(draft: Draft) -> None:
    """A companion's check gets no other files: one that asks for some would wait for ever."""
    for companion, read in draft.companions:
        for name, options in companion.checks:
            asks = getattr(registry.find_check(name), "asks", None)
            if asks is not None and asks(options):
                read.place("checks").add(
                    f"the check {name} asks for other files, which a companion's check cannot have",
                    "check the companion with a rule of its own, or with a check that looks at it alone",
                )


def _own_digest(draft: Draft) -> None:
    """What no check finds cannot be verified."""
    if draft.rule.options.get("own_digest") != "verify" or draft.options is None:
        return
    checks = [*draft.rule.complete.checks, *(spec for one, _ in draft.companions for spec in one.checks)]
    if not any(getattr(registry.find_check(name), "CARRIES_DIGEST", False) for name, _ in checks):
        draft.options.places["own_digest"].add(
            "no check of this rule finds the digest that files carry, so nothing would be verified",
            "add `checks: [cbf]` to `complete`",
        )
