"""`rules replay`: what rules would have started, from a directory or a recorded trace; nothing is started."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FILE_PATH, Command, Setup, absolute, pass_setup
from trigger_daemon.core.model import counted
from trigger_daemon.errors import ConfigError, TriggerError
from trigger_daemon.eyes import Eyes, Hangs

if TYPE_CHECKING:
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.replay import Report

SHOWN_MAX = 40  # lines of each table; JSON has all
FILES_SHOWN = 3  # names of a batch
LOOK_S = 3.0  # a share that does not answer must not keep the command
ALIKE_MAX = 3  # files left for one reason that are named one by one
_NUMBERS = re.compile("[0-9]+")


@click.command(cls=Command)
@click.argument("paths", nargs=-1, metavar="[RULES]... [DIR|TRACE]", type=FILE_PATH)
@click.option(
    "--root", "pairs", multiple=True, metavar="WATCH=DIR",
    help="DIR stands for what a rule watches, or for where its companions lie.",
)
@click.option(
    "--speed", type=float, default=1.0, metavar="N", show_default=True,
    help="Files of a directory arrive N times as fast as their times of modification say.",
)
@pass_setup
def replay(setup: Setup, paths: tuple[Path, ...], pairs: tuple[str, ...], speed: float) -> None:
    """Show what rules would have started, and what not, without starting anything.

    RULES are rule files or directories of them; without any, the `rules_dir` of
    the settings, or the rules that a trace was recorded with. From a directory,
    each file arrives, whole, at its time of modification, as if the daemon had
    watched from the start. DIR stands for what the rules watch, or is a part of
    it; without it, what the rules watch is looked at. A TRACE is written by
    `serve --record`. The daemon need not run.
    """
    *given, source = paths = paths or (Path(setup.settings().rules_dir),)
    if not 1e-3 <= speed <= 1e9:
        raise click.UsageError("--speed takes a number from 0.001 to 1000000000")
    for path in paths:
        _must_answer(str(path))
    for path in given:
        if not path.exists():
            raise TriggerError(f"there is no {path}", hint="name rule files, or directories of them, before the data")
        if _is_trace(path):
            raise TriggerError(f"{path} is a trace", hint="give the trace last, after the rules")
        if path.is_dir() and not any(path.glob("*.yaml")):
            raise TriggerError(f"there are no rule files (*.yaml) in {path}", hint="the data's directory goes last")
    if _is_trace(source):
        if pairs or speed != 1.0:
            raise click.UsageError("--root and --speed belong to a directory; a trace has its own roots and times")
        report = _trace(given, source)
    elif source.is_dir() and not given and any(source.glob("*.yaml")):  # rules alone: what they watch
        report = _roots(setup, _rules(setup, paths), pairs, speed)
    elif source.is_dir():
        report = _directory(setup, given, source, pairs, speed)
    elif source.suffix in (".yaml", ".yml") and source.exists():  # no directory: what the rules watch
        report = _roots(setup, _rules(setup, paths), pairs, speed)
    else:
        raise TriggerError(
            f"{source} is neither a directory nor a trace" if source.exists() else f"there is no {source}",
            hint="give the directory with the data last, or a file written by `trigger-daemon serve --record FILE`",
        )
    if setup.json:
        setup.data(_json(report))
    else:
        _show(report)


def _must_answer(path: str, hint: str = "mount its share anew, or name another directory") -> None:
    """Raise TriggerError if the file system of a path does not answer; whether the path is there is another matter."""
    eyes = Eyes(deadline_s=LOOK_S)
    try:
        eyes.statvfs(absolute(path))
    except Hangs as error:
        raise TriggerError(f"{path}: its file system has not answered for {LOOK_S:g} s", hint=hint) from error
    except OSError:
        pass
    finally:
        eyes.close()


def _is_trace(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(9).startswith(b'{"trace":')
    except OSError:
        return False


def _rules(setup: Setup, given: Sequence[Path]) -> tuple[Rule, ...]:
    from trigger_daemon.cli.rules import read_rules

    rules_dir = Path(setup.settings().rules_dir)
    if not given and not rules_dir.is_dir():
        raise TriggerError(
            f"no rules are named, and there is no {rules_dir} of the settings",
            hint="write `trigger-daemon rules replay RULES DIR`: rule files first, then the directory with the data",
        )
    read = read_rules(tuple(given) or (rules_dir,))
    if read.faults:
        raise ConfigError(read.faults)
    if not read.rules:
        raise TriggerError("there are no rules to replay", hint="name a rule file before the directory")
    return read.rules


def _trace(given: Sequence[Path], source: Path) -> Report:
    from trigger_daemon import replay
    from trigger_daemon.cli.rules import read_rules

    if not given:
        return replay.replay_trace(source)
    read = read_rules(tuple(given))
    if read.faults:
        raise ConfigError(read.faults)
    recorded = replay.recorded_rules(source)
    if recorded and all(replay.same_rules(read.rules, rules) for rules in recorded):
        return replay.replay_trace(source)
    report = replay.replay_history(read.rules, source)
    report.notes.insert(0, "these are other rules than those recorded: only files that those looked at are known")
    return report


def _roots(setup: Setup, rules: Sequence[Rule], pairs: Sequence[str], speed: float) -> Report:
    from trigger_daemon import replay

    roots, notes = _stand_ins(rules, pairs, {})
    return _noted(replay.replay_directory(rules, roots, speed=speed, time_zone=setup.settings().zone), notes)


def _directory(setup: Setup, given: Sequence[Path], source: Path, pairs: Sequence[str], speed: float) -> Report:
    """Find out what of the rules the directory stands for."""
    from trigger_daemon import replay

    rules = _rules(setup, given)
    _stand_ins(rules, pairs, {})  # a misspelt --root is told before anything is concluded from it
    here = absolute(str(source))
    watched = sorted({rule.watch for rule in rules})
    inside = [watch for watch in watched if watch == here or watch.startswith(here.rstrip("/") + "/")]
    above = [watch for watch in watched if here.startswith(watch.rstrip("/") + "/")]
    only: dict[str, str] = {}
    if inside:
        chosen = {watch: watch for watch in inside}
    elif above:
        chosen = {watch: watch for watch in above}
        only = {watch: os.path.relpath(here, watch) for watch in above}
    elif len(watched) == 1:
        chosen = {watched[0]: here}
    else:
        free = [watch for watch in watched if not any(pair.startswith(f"{watch}=") for pair in pairs)]
        if len(free) != 1:
            raise TriggerError(
                f"the rules watch {', '.join(map(text.name, watched))}: for which of them does {source} stand?",
                hint=f"say it: --root {watched[0]}={source}",
            )
        chosen = {free[0]: here}
    replayed = [rule for rule in rules if rule.watch in chosen or any(p.startswith(f"{rule.watch}=") for p in pairs)]
    roots, notes = _stand_ins(replayed, pairs, chosen)
    if left_out := sorted({rule.name for rule in rules} - {rule.name for rule in replayed}):
        notes.append(f"not replayed, as they watch something else: {', '.join(left_out)}")
    zone = setup.settings().zone
    report = replay.replay_directory(replayed, roots, speed=speed, only_below=only, time_zone=zone)
    return _noted(report, notes)


def _stand_ins(
    rules: Sequence[Rule], pairs: Sequence[str], chosen: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return which real directory stands for each that the rules name, and notes on those that are not there."""
    roots = dict(chosen)
    named = {rule.watch for rule in rules} | {c.root for rule in rules for c in rule.complete.companions}
    for pair in pairs:
        watch, equals, directory = pair.partition("=")
        watch = watch.rstrip("/") or "/"
        if not equals or not directory:
            raise click.UsageError(f"{pair!r} is not of the form WATCH=DIR")
        if watch not in named:
            raise TriggerError(
                f"no rule watches {watch}, nor has companions there", hint=f"they name: {', '.join(sorted(named))}"
            )
        roots[watch] = absolute(directory)
        _must_answer(roots[watch])
        if not os.path.isdir(roots[watch]):
            raise TriggerError(f"there is no directory {roots[watch]}", hint=f"it was to stand for {watch} (--root)")
    notes = []
    roots.update({path: path for path in named - roots.keys()})
    for path, real in sorted(roots.items()):
        _must_answer(real, f"mount its share anew, or let another directory stand for it: --root {path}=DIR")
        if not os.path.isdir(real):
            notes.append(f"{real} is not there, so no file of it is replayed; name another with --root {path}=DIR")
    return roots, notes


def _noted(report: Report, notes: Sequence[str]) -> Report:
    report.notes = [*notes, *report.notes]
    return report


# -------------------------------------------------------------------------- showing


def _json(report: Report) -> dict[str, Any]:
    shown: dict[str, Any] = {"batches": report.batches, "left": report.left}
    if report.more:
        shown["more"] = report.more
    if report.as_recorded is not None:
        shown["as_recorded"] = report.as_recorded
    if report.notes or report.ended:
        shown["notes"] = [*report.notes, *([report.ended] if report.ended else [])]
    return shown


def _show(report: Report) -> None:
    for note in report.notes:
        text.note(note)
    if report.batches:
        _show_batches(report.batches)
    else:
        click.echo("nothing would have been started")
    if report.left:
        _show_left(report)
    files = sum(len(batch["files"]) for batch in report.batches)
    click.echo(
        f"{counted(len(report.batches), 'batch')} of {text.counted(files, 'file')} with their companions,"
        f" {text.counted(len(report.left) + report.more, 'file')} left; nothing was started (times are UTC)"
    )
    if report.as_recorded is not None:
        same = "just these batches" if report.as_recorded else "other batches: this version decides otherwise"
        text.note(f"the daemon that was recorded made {same}")
    if report.ended:
        text.note(f"the recording ended before the daemon did: {report.ended}")


def _show_batches(batches: Sequence[Mapping[str, Any]]) -> None:
    shown = text.table(
        ("time", "word"), ("rule", "name"), ("group or files", "wide"), ("files", "right"), ("because", "wide")
    )
    for batch in batches[:SHOWN_MAX]:
        files = len(batch["files"])
        words = " ".join(f"{key}={value}" for key, value in batch["group"].items())
        if not words:
            words = ", ".join(map(text.name, batch["files"][:FILES_SHOWN])) + ("…" if files > FILES_SHOWN else "")
        because = batch["reason"]
        if suspect := len(batch.get("suspect", ())):
            because += f"; {suspect:,} suspect, which waited longer: see `explain`, or checks and their numbers"
        text.row(shown, batch["time"][:19].replace("T", " "), batch["rule"], words, f"{files:,}", because)
    text.console().print(shown)
    if (more := len(batches) - SHOWN_MAX) > 0:
        click.echo(f"… and {counted(more, 'batch')} more (-F json has all)")


# What a person should look at comes first; what rules leave out on purpose, last.
_ORDER = ("blocked", "incomplete", "missing", "unreadable", "settling", "waiting", "companion", "unmatched", "marker")


def _show_left(report: Report) -> None:
    """Name the files that are left; of many for the same reason, the first and their number."""
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in report.left:
        stage = entry["stage"]
        # What hides behind the first must be of its kind: a pattern that is too wide leaves out data.
        reason = _NUMBERS.sub("#", PurePath(entry["path"]).suffix) if stage == "unmatched" else entry["because"]
        alike.setdefault((stage, entry["rule"] or "", reason), []).append(entry)
    rank = {stage: number for number, stage in enumerate(_ORDER)}
    several = len({entry["root"] for entry in report.left}) > 1
    click.echo(f"\nleft, {text.counted(len(report.left) + report.more, 'file')}:")
    shown = text.table(("file", "path"), ("rule", "name"), ("because", "wide"))
    groups = sorted(alike.items(), key=lambda item: rank.get(item[0][0], len(rank)))
    for _, entries in groups[:SHOWN_MAX]:
        for entry in entries[: 1 if len(entries) > ALIKE_MAX else ALIKE_MAX]:
            path = f"{entry['root'].rstrip('/')}/{entry['path']}" if several else entry["path"]
            because = entry["because"]
            if len(entries) > ALIKE_MAX:
                because += f" – and {len(entries) - 1:,} more like it"
            text.row(shown, text.name(path), entry["rule"] or "–", because)
    text.console().print(shown)
    if (more := sum(len(entries) for _, entries in groups[SHOWN_MAX:]) + report.more) > 0:
        click.echo(f"… and {text.counted(more, 'file')} more (-F json has them)")
