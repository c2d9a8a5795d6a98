"""`rules`: what staff wrote, as the daemon understands it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import CONFIGURATION, FILE_PATH, NEEDS_PERSON, Group, Setup, pass_setup, why_option
from trigger_daemon.cli.replay import replay
from trigger_daemon.core.rules import BUILT_IN_IGNORES
from trigger_daemon.errors import ConfigError, ConfigFault, TriggerError

if TYPE_CHECKING:
    from trigger_daemon.config import RuleSet, Settings
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.globus.check import Finding

CHOICES = {
    "same": "the files in the new place are the same ones: nothing is sent again",
    "all": "send all files in the new place, also those that were done in the old one",
    "new": "send only files that appear from now on",
}


@click.group(cls=Group)
def rules() -> None:
    """What is watched, when it is complete, and what is started."""


# -------------------------------------------------------------------------- check


@rules.command("check")
@click.argument("paths", nargs=-1, metavar="[DIR|FILE]...", type=FILE_PATH)
@click.option("--online", is_flag=True, help="Then ask Globus, and where rsync and rclone go. Exit 4 if one objects.")
@pass_setup
def check(setup: Setup, paths: tuple[Path, ...], online: bool) -> None:
    """Read rule files as the daemon would, and show every fault with its place. Exit code 3 if there is one.

    Without paths, the `rules_dir` of the settings. Files given together are one rule set.
    """
    from trigger_daemon.cli.globus import exit_code, findings_json, show_findings
    from trigger_daemon.cli.reclaim import one_disk

    settings = setup.settings() if not paths or setup.config or online else None
    read = read_rules(paths or (Path(setup.settings().rules_dir),), settings)
    found = _online(settings, read.rules) if online and settings is not None and not read.faults else []
    asking = ", ".join(rule.name for rule in read.rules if rule.reclaim)
    notes = [] if read.faults else list(one_disk(read.rules))
    if asking and not read.faults and settings is not None and settings.reclaim != "enabled":
        notes.insert(0, f"nothing of {asking} is deleted: the rules ask for `reclaim`, the settings do not enable it")
    if setup.json:
        setup.data({
            "ok": not read.faults and all(each.ok for each in found), "files": len(read.source),
            "rules": len(read.rules), "faults": [text.fault_words(fault) for fault in read.faults], "notes": notes,
        } | ({"online": findings_json(found)} if online else {}))  # fmt: skip
    elif read.faults:
        click.echo(text.faults(read.faults))
        text.note(f"{text.counted(len(read.faults), 'fault')}; the daemon would keep the rules it has")
    else:
        click.echo(f"{text.counted(len(read.rules), 'rule')} in {text.counted(len(read.source), 'file')}, no faults")
        for words in notes:
            text.note(words)
        show_findings(found)
    if read.faults:
        raise click.exceptions.Exit(CONFIGURATION)
    if code := exit_code(found):
        raise click.exceptions.Exit(code)


def _online(settings: Settings, rules: Sequence[Rule]) -> list[Finding]:
    """Return what Globus, and other far sides, say of rules; nothing is asked where none needs it."""
    from trigger_daemon import registry
    from trigger_daemon.cli.globus import examined
    from trigger_daemon.globus.check import Finding
    from trigger_daemon.globus.login import ACTIONS

    found = examined(settings, rules)[1] if any(rule.action in ACTIONS for rule in rules) else []
    for rule in rules:
        look = getattr(registry.find_action(rule.action), "look_online", None)
        for what, ok, why, hint, wait in look(rule.options) if look else ():
            found.append(Finding(rule.name, what, ok, why, hint, "" if ok else "wait" if wait else "person"))
    return found


def read_rules(paths: Sequence[Path], settings: Settings | None = None) -> RuleSet:
    """Return the rules of directories and files together. Never raises: faults are in the result."""
    from trigger_daemon.config import RuleSet, load_rules, parse_rules
    from trigger_daemon.config.settings import read_text

    faults: list[ConfigFault] = []
    files: list[tuple[str, str]] = []
    for path in paths:
        if path.is_dir() or (len(paths) == 1 and not path.exists()):
            one = load_rules(path, settings)
            if len(paths) == 1:
                return one
            files += [(item["file"], item["text"]) for item in one.source]
            faults += [fault for fault in one.faults if not fault.line]  # of the directory; the others are found below
        else:
            written = read_text(path, faults, missing_is_fault=True)
            if written is not None:
                files.append((str(path), written))
    read = parse_rules(files, settings=settings)
    return RuleSet(read.rules, read.source, list(dict.fromkeys([*faults, *read.faults])))


# --------------------------------------------------------------------------- list


@rules.command("list")
@pass_setup
def list_(setup: Setup) -> None:
    """Show the rules in force with their state and counts. Works when the daemon is down."""
    from trigger_daemon.cli.status import gather

    counted = {rule["name"]: rule for rule in gather(setup)["rules"]}
    accepted = {rule.name: rule for rule in _accepted(setup)}
    found = []
    for name in dict.fromkeys([*accepted, *counted]):
        rule = accepted.get(name)
        found.append({
            "name": name,
            "state": "active" if rule else "removed",
            "watch": rule.watch if rule else None,
            "action": rule.action if rule else None,
            "description": rule.description if rule else "",
            "file": rule.file if rule else None,
            "line": rule.line if rule else None,
            "settling": None, "complete": None, "blocked": None, "stalled": None, "runs": {}, "files_done": 0,
            "bytes_done": 0,
        } | counted.get(name, {}))  # fmt: skip
    if setup.json:
        setup.data({"rules": found})
        return
    if not found:
        click.echo("no rules are in force")
        return
    shown = text.table(
        ("rule", "name"), ("state", "word"), ("watches", "wide"), ("starts", "word"), ("held", "right"),
        ("files done", "right"),
    )  # fmt: skip
    for each in found:
        text.row(
            shown, each["name"], each["state"], text.name(each["watch"] or ""), each["action"] or "",
            f"{each['runs'].get('HELD', 0):,}", f"{each['files_done']:,}",
        )  # fmt: skip
    text.console().print(shown)


def _accepted(setup: Setup) -> tuple[Rule, ...]:
    """Return the rule set in force, from the journal."""
    from trigger_daemon.config import parse_rules

    return parse_rules(setup.reader.rule_texts()).rules


# --------------------------------------------------------------------------- show


@rules.command("show")
@click.argument("name")
@pass_setup
def show(setup: Setup, name: str) -> None:
    """Print a rule as the daemon understands it: with every default, and the built-in ignores.

    A rule that is not in force yet is taken from the rule files.
    """
    rule = next((rule for rule in _in_force(setup) if rule.name == name), None)
    if rule is None:
        read = read_rules((Path(setup.settings().rules_dir),), setup.settings())
        if read.faults:
            raise ConfigError(read.faults)
        rule = next((rule for rule in read.rules if rule.name == name), None)
        if rule is None:
            known = ", ".join(each.name for each in read.rules)
            raise TriggerError(f"there is no rule {name!r}", hint=f"there are: {known}" if known else "")
        text.note("not in force yet: from the rule files")
    if setup.json:
        setup.data({"rule": _json(rule)})
        return
    click.echo(f"# {text.safe(rule.file)}:{rule.line}" if rule.file else "# in force")
    for line in _yaml(_written(rule), ""):
        click.echo(line)


def _in_force(setup: Setup) -> tuple[Rule, ...]:
    from trigger_daemon.database import absent

    return () if absent(setup.reader.path) else _accepted(setup)


def _json(rule: Rule) -> dict[str, Any]:
    """Return a rule for programs: the names of the rule language, with units where there are any."""
    return {key: _jsonable(value) for key, value in dataclasses.asdict(rule).items() if key != "id"}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def _written(rule: Rule) -> dict[str, Any]:
    """Return a rule as it could be written in a file, nothing left out."""
    own = [pattern for pattern in rule.ignore if pattern not in BUILT_IN_IGNORES]
    complete, batch = rule.complete, rule.batch
    written: dict[str, Any] = {
        "name": rule.name,
        "description": rule.description or None,
        "watch": rule.watch,
        "match": list(rule.match),
        "ignore": own,
        "built_in_ignores": [pattern for pattern in rule.ignore if pattern in BUILT_IN_IGNORES] or False,
        "case": rule.case,
        "existing": rule.existing,
        "on_rewrite": rule.on_rewrite,
        "priority": rule.priority,
        "after": {"rule": rule.after.rule, "same": list(rule.after.same)} if rule.after else None,
        "complete": {
            "quiescence": _span(complete.quiescence_s),
            "trust": sorted(complete.trust),
            "checks": _checks(complete.checks),
            "suspect": _span(complete.suspect_s) or "block",
            "with": [
                {
                    "file": one.file, "in": one.root, "checks": _checks(one.checks), "wait": _span(one.wait_s),
                    "missing": one.missing, "shared": one.shared,
                }
                for one in complete.companions
            ],
            "allow_empty": complete.allow_empty,
            "stalled_after": _span(complete.stalled_after_s),
        },
        "batch": None,
        "start": {rule.action: dict(rule.options)},
        "proof": rule.proof,
        "limits": {"runs": rule.runs_max, "bandwidth": f"{rule.bandwidth} B/s" if rule.bandwidth else None},
        "retry": {
            "initial": _span(rule.retry.initial_s), "longest": _span(rule.retry.longest_s),
            "give_up_after": _span(rule.retry.give_up_after_s),
        },
        "reclaim": None,
    }  # fmt: skip
    if batch:
        marker = batch.close_on
        written["batch"] = {
            "group_by": list(batch.group_by), "files": batch.files, "bytes": batch.bytes and f"{batch.bytes} B",
            "oldest_waits": _span(batch.oldest_waits_s), "idle": _span(batch.idle_s), "expect": batch.expect,
            "close_on": marker and {
                "file": marker.file, "checks": _checks(marker.checks),
                "quiescence": _span(marker.quiescence_s) or _span(complete.quiescence_s), "include": marker.include,
            },
            "only_first": batch.only_first, "new_group_after": _span(batch.new_group_after_s) or "never",
            "at": list(batch.at),
        }  # fmt: skip
    if rule.reclaim:
        written["reclaim"] = {
            "proven_by": list(rule.reclaim.proven_by), "keep_for": _span(rule.reclaim.keep_for_s),
            "only_under": rule.reclaim.only_under,
        }  # fmt: skip
    return written


def _span(seconds: float | None) -> str | None:
    """Return a duration as the rule language writes it."""
    if seconds is None:
        return None
    for unit, worth in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        if seconds >= worth and seconds % worth == 0:
            return f"{seconds / worth:g}{unit}"
    return f"{seconds * 1000:g}ms"


def _checks(specs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
    return [{name: dict(options)} if options else name for name, options in specs]


def _yaml(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield lines of YAML in blocks; what is not set is a comment."""
    for key, item in value.items():
        if item is None or item == [] or (isinstance(item, Mapping) and _unset(item)):
            yield f"{indent}# {key}: none"
        elif key == "built_in_ignores" and item:
            yield f"{indent}built_in_ignores: true  # {' '.join(item)}"
        elif isinstance(item, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(item, indent + "  ")
        elif isinstance(item, list | tuple) and any(isinstance(each, Mapping) for each in item):
            yield f"{indent}{key}:"
            for each in item:
                yield f"{indent}  - {_flow(each)}"
        else:
            yield f"{indent}{key}: {_flow(item)}"


def _unset(mapping: Mapping[str, Any]) -> bool:
    return bool(mapping) and all(value is None for value in mapping.values())


def _flow(value: Any) -> str:
    """Return a value in one line of YAML."""
    import json

    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = value.replace("-", "").replace("_", "").replace("/", "").replace(".", "")
        simple = plain.isalnum() and plain.isascii() and value[0] not in "-." and not plain.isdigit()
        special = value.lower() in ("true", "false", "null", "none", "yes", "no", "on", "off")
        return value if simple and not special else json.dumps(value, ensure_ascii=True)
    return "null" if value is None else str(value)


@rules.command("schema")
@pass_setup
def schema(setup: Setup) -> None:
    """Print the JSON Schema of rule files, for editors. It knows every action and check that is installed."""
    from trigger_daemon.config import rules_schema

    setup.data(rules_schema())


# ------------------------------------------------------------------------- orders


@rules.command("pause")
@click.argument("name")
@why_option
@pass_setup
def pause(setup: Setup, name: str, why: str) -> None:
    """Let no run of a rule start until `rules resume`; it goes on to settle and batch files."""
    setup.order("rules.pause", why, rule=name)


@rules.command("waive")
@click.argument("name")
@click.option("--why", default="", help="For the record.")
@pass_setup
def waive(setup: Setup, name: str, why: str) -> None:
    """Let a rule that is paused or gone hold no file back from `reclaim` any more; ends when it works again."""
    setup.order("rules.waive", why, rule=name)


@rules.command("resume")
@click.argument("name")
@why_option
@pass_setup
def resume(setup: Setup, name: str, why: str) -> None:
    """Let the runs of a paused rule start again."""
    setup.order("rules.resume", why, rule=name)


@rules.command("apply")
@click.option(
    "--choice", type=click.Choice(list(CHOICES)), help="; ".join(f"{k}: {v}" for k, v in CHOICES.items()) + "."
)
@why_option
@pass_setup
def apply(setup: Setup, choice: str | None, why: str) -> None:
    """Decide about a change of rules that would start work again for files already done.

    Without --choice it shows what waits, and asks if there is a terminal; else it ends with exit code 4.
    """
    if choice is None:
        answer = setup.ask("rules.apply", choice="")
        undecided = answer.get("undecided") or {}
        if not undecided:
            if setup.json:
                setup.data({"undecided": {}})
            else:
                click.echo("no change of rules waits for a decision")
            return
        if setup.json:
            setup.data({"undecided": undecided})
        else:
            _undecided(undecided)
        if setup.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            text.note(f"decide by `trigger-daemon rules apply --choice {'|'.join(CHOICES)}`")
            raise click.exceptions.Exit(NEEDS_PERSON)
        choice = click.prompt("Which", type=click.Choice(list(CHOICES)), err=True)
    setup.order("rules.apply", why, choice=choice)


def _undecided(undecided: Mapping[str, Mapping[str, Any]]) -> None:
    for name, told in undecided.items():
        click.echo(
            f"{text.safe(name)}: moved from {text.name(told['was'])} to {text.name(told['now'])};"
            f" {text.counted(told['files_done'], 'file')} done there"
        )
    for choice, words in CHOICES.items():
        click.echo(f"  {choice:5} {words}")


rules.add_command(replay)
