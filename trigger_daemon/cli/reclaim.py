"""What commands say of `reclaim`: where one file stands, and whether copies lie on the disk of their sources.

Files and copies are looked at, for a while: a share that does not answer keeps no command.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trigger_daemon.cli import text
from trigger_daemon.errors import TriggerError
from trigger_daemon.eyes import Eyes
from trigger_daemon.mounts import Places, remote

if TYPE_CHECKING:
    from trigger_daemon.cli.commands import Setup
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.reader import ReclaimFileOf
    from trigger_daemon.reclaim import Candidate

FILE_S = 3.0  # that one file and its copies may take

SET_S = 10.0  # that the files of a set may take

T = TypeVar("T")


def in_time(call: Callable[[], T], within_s: float) -> T:
    """Return what a call returns, made in a thread: several shares may not answer, each for a while.

    Raises TriggerError, also if it is late.
    """
    answers: list[T | TriggerError] = []

    def answer() -> None:
        try:
            answers.append(call())
        except TriggerError as error:
            answers.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(within_s)
    if not answers:
        raise TriggerError(f"the files have not been looked at within {within_s:g} s: a share does not answer")
    if isinstance(answers[0], TriggerError):
        raise answers[0]
    return answers[0]


def device(path: str, places: Places) -> str:
    """Return the file system on which a path lies, '' if that cannot be told."""
    mount = places.mount(path)
    return "" if mount is None else mount.device


# ----------------------------------------------------------------------- one file


def of_file(
    setup: Setup, rules: Sequence[Rule], path: str, runs: Mapping[str, int], beat: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Return what those rules that ask for reclaim say of a file that they took, each in the run that `runs` names.

    `beat`: the daemon's heartbeat, None if it does not run. Never raises for what cannot be looked at.
    """
    from trigger_daemon.reclaim import Selection

    asking = [rule for rule in rules if rule.reclaim and rule.name in runs]
    if not asking:
        return {}
    settings = setup.settings()
    eyes = Eyes(deadline_s=FILE_S)

    def judge() -> tuple[dict[str, Candidate], str]:
        places = Places(eyes.beyond)
        here = device(os.path.dirname(path), places)
        volume = next((each.path for each in settings.volumes if here and device(each.path, places) == here), "")
        witnessed = beat["reclaim"]["witnessed_s"] if beat else None
        roots = setup.reader.root_paths()
        with setup.reader.at_length() as reader:
            selection = Selection(reader, rules, roots, now=time.time(), witnessed=witnessed, eyes=eyes,
                                  undecided=(beat or {}).get("undecided", ()))  # fmt: skip
            found = {rule.name: selection.of_file(rule.name, runs[rule.name], path) for rule in asking}
        return {name: one for name, one in found.items() if one is not None}, volume

    try:
        found, volume = in_time(judge, 2 * FILE_S)
    except TriggerError as error:
        return {rule.name: _told(False, f"it cannot be told: {error.message}") for rule in asking}
    finally:
        eyes.close()
    enabled = settings.reclaim == "enabled"
    return {rule.name: _words(found[rule.name], rule, volume, beat, enabled) for rule in asking if rule.name in found}


def _told(could_go: bool, because: str, until_time: float | None = None) -> dict[str, Any]:
    return {"could_go": could_go, "because": because, "until_time": until_time}


def _words(one: Candidate, rule: Rule, volume: str, beat: Mapping[str, Any] | None, enabled: bool) -> dict[str, Any]:
    assert rule.reclaim is not None
    low = rule.reclaim.only_under == "low"
    if one.why and one.until_time is None:
        because = f"kept: {one.why}" + (f" - {one.hint}" if one.hint else "")
        return _told(False, because if enabled else f"{because}; nor do the settings enable reclaim")
    if low and not volume:
        because = f"kept: {rule.watch} is on none of the `volumes` of the settings, so it is never low"
        return _told(False, because if enabled else f"{because}; nor do they enable reclaim")
    if one.until_time is not None:
        because = f"may go from {text.clock(one.until_time)[:-3]} on" + (f", once {volume} is low" if low else "")
    elif not low:
        because = "could go now"
    elif beat is None:
        because = f"could go, once {volume} is low"
    else:
        states = {each["path"]: each["state"] for each in beat["volumes"]}
        state = states.get(volume, "ok")
        because = f"could go now; {volume} is not low" if state == "ok" else f"could go now: {volume} is {state}"
    if not enabled:
        because += "; but the settings do not enable reclaim"
    elif beat is None:
        because += "; the daemon is not running"
    elif held := beat["paused"] or beat["reclaim"].get("held"):
        because += f"; {held}" + ("" if beat["paused"] else ": until that is mended, nothing goes")
    return _told(not one.why, because, one.until_time)


# ----------------------------------------------------------------------- one set


def show_set(setup: Setup, number: int) -> None:
    """Tell what became of a set, and where each of its files is now. Raises TriggerError."""
    found = setup.reader.reclaim_set(number)
    if found is None:
        raise TriggerError(f"nothing is known of a set {number}",
                           hint="alarms name sets, as `explain` does; old ones are thinned (`keep_done`)")  # fmt: skip
    of, files = found
    eyes = Eyes(deadline_s=FILE_S)
    try:
        now = in_time(lambda: [_stands(one, eyes) for one in files], SET_S)
    except TriggerError as error:
        now = [error.message] * len(files)
    finally:
        eyes.close()
    told: list[dict[str, Any]] = [
        {"path": f"{one.root.rstrip('/')}/{one.path}", "size": one.size, "hidden": one.hidden,
         "place": one.place or None, "now": stands}
        for one, stands in zip(files, now, strict=True)
    ]  # fmt: skip
    if setup.json:
        about = {"id": of.id, "rule": of.rule, "run": of.run, "state": of.state, "because": of.because,
                 "changed_time": of.changed_time, "proofs": of.proofs}  # fmt: skip
        setup.data(text.timed({**about, "files": told}))
        return
    click.echo(f"set {of.id} of {of.rule}, run {of.run}: {of.state} {text.ago(of.changed_time)}"
               + (f": {text.safe(of.because)}" if of.because else ""))  # fmt: skip
    for each in told:
        found_at = f", at the end {text.safe(each['place'])}" if each["place"] else ""
        click.echo(f"  {text.name(each['path'])}  {text.size(each['size'])}{found_at}")
        click.echo(f"    hidden as {text.name(each['hidden'])}; now {text.safe(each['now'])}")


def _stands(file: ReclaimFileOf, eyes: Eyes) -> str:
    """Say under which of its two names something stands."""
    full = f"{file.root.rstrip('/')}/{file.path}"
    there = []
    for path, words in ((full, "at its name"), (os.path.join(os.path.dirname(full), file.hidden), "hidden")):
        try:
            eyes.lstat(path)
            there.append(words)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"it cannot be looked at: {error.strerror}"
    return " and ".join(there) or "under neither name"


# ---------------------------------------------------------------------- one disk


def one_disk(rules: Sequence[Rule]) -> list[str]:
    """Say of which rules all copies that are proof lie on the disk of their sources. It asks no mount that hangs."""
    places = Places()
    named = {rule.name: rule for rule in rules}
    found = []
    for rule in rules:
        home = _disk(rule.watch, places) if rule.reclaim else ""
        if not home or rule.reclaim is None:
            continue
        proofs = [_written(named[name]) if name in named else () for name in rule.reclaim.proven_by]
        if proofs and all(to and all(_disk(path, places) == home for path in to) for to in proofs):
            found.append(f"the copies of {rule.name} lie on the same disk as their sources: one broken disk takes both;"
                         " let `proven_by` name a rule that copies to another")  # fmt: skip
    return found


def _written(rule: Rule) -> tuple[str, ...]:
    """Return the directories that a rule copies to, none if that is not known."""
    from trigger_daemon.config.rules import bare
    from trigger_daemon.registry import find_action

    try:
        return tuple(bare(find_action(rule.action)).writes(rule.options))
    except TriggerError:  # an action that is no longer installed
        return ()


def _disk(path: str, places: Places) -> str:
    """Return the file system of something that is there, on a disk of this machine; else ''."""
    if places.crosses(path) is not None:
        return ""
    mount = places.mount(path)
    return "" if mount is None or remote(mount.fstype) or not os.path.exists(path) else mount.device
