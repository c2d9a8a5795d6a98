"""`doctor`: test what the daemon stands on, and say what to do about each fault.

Never hangs: whatever may lie on a dead mount is asked of child processes, each
with its deadline; what is not answered by the end of the whole is told as such.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from trigger_daemon import points
from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FILE_NAME, NEEDS_PERSON, NOT_RUNNING, OK, Command, Setup, pass_setup
from trigger_daemon.doctor import CHECKS, LEVELS, Finding

if TYPE_CHECKING:
    from trigger_daemon.config import Settings

AT_ONCE = 8  # questions under way; each is a process
PLAN_S = 20.0  # a thousand rules take seconds to read
PATIENCE_S = 12.0  # for a root, whose test takes up to EVENT_S and COUNT_S by itself
QUICK_S = 20.0  # every page of a journal; a reader that stands longer lets the -wal grow
ONLINE_S = 60.0
WHOLE_S = 90.0  # for all questions, however many hang
GRACE_S = 5.0  # to end those that do


class Question(NamedTuple):
    check: str
    about: str
    function: str
    args: tuple[Any, ...]
    deadline_s: float


@click.command(cls=Command)
@click.argument("roots", nargs=-1, metavar="[ROOT]...", type=FILE_NAME)
@click.option("--only", multiple=True, type=click.Choice(CHECKS), metavar="CHECK",
              help=f"Test this alone: {', '.join(CHECKS)}. May be given several times.")
@click.option("--online", is_flag=True, help="Ask Globus, too, what the rules need there.")
@click.option("--patience", type=click.FloatRange(1, 60), default=PATIENCE_S, metavar="SECONDS", show_default=True,
              help="How long each place gets to answer.")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show what is in order, too.")
@pass_setup
def doctor(
    setup: Setup, roots: tuple[str, ...], only: tuple[str, ...], online: bool, patience: float, verbose: bool
) -> None:
    """Test what the daemon stands on: watches, clocks, mounts, free space, journal, destinations, credentials.

    With ROOT, only these directories are tested, whether a rule watches them or
    not. A hidden canary is written in watched directories and destinations, and
    removed again; what cannot be written is told as read-only. Nothing hangs: a
    mount that does not answer is named after some seconds. Faults come first;
    what is in order is counted.

    Exit code 4 if there is a fault, 5 if there is none but the daemon does not run.
    """
    began = time.monotonic()
    wanted = set(only) or ({"roots"} if roots else set(CHECKS))
    settings = setup.settings()
    found = examine(settings, setup.config, tuple(map(_absolute, roots)), wanted, online=online, patience_s=patience)
    if setup.json:
        setup.data({
            "ok": not any(each.level == "fault" for each in found),
            "faults": _count(found, "fault"), "warnings": _count(found, "warning"),
            "findings": [each._asdict() for each in found], "took_s": round(time.monotonic() - began, 1),
        })  # fmt: skip
    else:
        for line in lines(found, verbose=verbose):
            click.echo(line)
    raise click.exceptions.Exit(exit_code(found))


def _absolute(path: str) -> str:
    """Return a path from the top, without a look at it or at the working directory, which may hang."""
    here = os.environ.get("PWD", "")
    return os.path.normpath(os.path.join(here if os.path.isabs(here) else os.getcwd(), path))


def exit_code(found: Sequence[Finding]) -> int:
    """Return 4 for a fault, 5 if the daemon does not run and that is all, else 0."""
    if _count(found, "fault"):
        return NEEDS_PERSON
    return NOT_RUNNING if any(each.figures.get("running") is False for each in found) else OK


def _count(found: Sequence[Finding], level: str) -> int:
    return sum(each.level == level for each in found)


# ------------------------------------------------------------------------ examine


def examine(
    settings: Settings,
    config: Path | None,
    roots: tuple[str, ...],
    wanted: set[str],
    *,
    online: bool,
    patience_s: float,
) -> list[Finding]:
    """Return all findings, in the order of CHECKS."""
    until = time.monotonic() + WHOLE_S
    state = settings.state_dir
    given = str(Path(config).absolute()) if config else None
    found: list[Finding] = []
    plan: dict[str, Any] = {"roots": list(roots), "writes": [], "globus": False}
    if not roots and wanted & {"rules", "roots", "inotify", "destinations", "credentials"}:
        told = _ask(Question("rules", settings.rules_dir, "trigger_daemon.doctor.plan:plan", (given,), PLAN_S), until)
        if isinstance(told, Finding):
            found.append(told)
        else:
            plan = told
            found += [each for each in _rules(settings, plan) if "rules" in wanted or each.level == "fault"]
    kept: dict[str, Any] = {"uid": os.getuid(), "watches": None, "pid": None}
    if wanted & {"roots", "inotify", "destinations"}:
        told = _ask(Question("daemon", state, "trigger_daemon.doctor.machine:state", (state,), patience_s), until)
        if isinstance(told, Finding):
            found.append(told)
        else:
            kept = told
    questions = _questions(settings, plan, patience_s, counted=kept["watches"] is not None, pid=kept["pid"])
    asked = [each for each in questions if each.check in wanted]
    if online and "credentials" in wanted:
        asked.append(Question("credentials", "globus", "trigger_daemon.cli.doctor:ask_globus", (given,), ONLINE_S))
    for answer in _answers(asked, until):
        found += answer
    if "inotify" in wanted and settings.events != "none":
        found += _inotify(settings, found, kept)
    if "clock" in wanted:
        from trigger_daemon.doctor.machine import clock

        found += clock(settings.zone, settings.time_zone is not None)
    found += _missing(settings, kept["uid"], wanted)
    order = {name: place for place, name in enumerate(CHECKS)}
    return sorted(found, key=lambda each: order[each.check])


def _questions(
    settings: Settings, plan: dict[str, Any], patience_s: float, *, counted: bool, pid: int | None
) -> Iterator[Question]:
    state, places, machine = settings.state_dir, "trigger_daemon.doctor.places", "trigger_daemon.doctor.machine"
    yield Question("daemon", state, f"{machine}:daemon", (state,), patience_s)
    for root in plan["roots"]:
        yield Question("roots", root, f"{places}:root", (root, settings.events, not counted, pid), patience_s)
    book = os.path.join(state, points.VOLUMES)
    for volume in settings.volumes:
        reserve, low = volume.limits().reserve, volume.limits().low
        amounts = (reserve.bytes or 0, reserve.ratio or 0.0, low.bytes or 0, low.ratio or 0.0)
        yield Question("space", volume.path, f"{places}:space", (volume.path, *amounts, book), patience_s)
    yield Question("space", state, f"{places}:space", (state, 0, 0.0, STATE_LOW_BYTES, 0.0), patience_s)
    yield Question("journal", state, f"{machine}:journal", (state,), patience_s)
    yield Question("journal", state, f"{machine}:journal_quick", (state,), QUICK_S)
    for path in plan["writes"]:
        yield Question("destinations", path, f"{places}:destination", (path, pid), patience_s)
    globus = settings.globus.plain()
    globus["client_secret"] = "given" if globus.get("client_secret") else None  # it is nobody else's
    yield Question("credentials", "globus", f"{machine}:credentials", (state, globus, plan["globus"]), patience_s)
    if (broker := _broker(settings)) is not None:
        yield Question("broker", f"{broker[0]}:{broker[1]}", f"{machine}:broker", broker, patience_s)


STATE_LOW_BYTES = 1 << 30  # a journal of a million files has some 0.3 GB, and a -wal beside it


def _broker(settings: Settings) -> tuple[str, int] | None:
    wanted = settings.mqtt
    return None if wanted.host is None else (wanted.host, wanted.port_or_default)


def _answers(asked: Sequence[Question], until: float) -> Iterator[list[Finding]]:
    """Yield each answer, or that there is none; by threads that do not keep this process from ending."""
    waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
    done: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()
    for question in asked:
        waiting.put(question)

    def work() -> None:
        while True:
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                return
            told = _ask(question, until)
            done.put([told] if isinstance(told, Finding) else [Finding(*row) for row in told])

    for _ in range(min(AT_ONCE, len(asked))):
        threading.Thread(target=work, daemon=True).start()
    for _ in asked:
        try:
            yield done.get(timeout=max(0.0, until - time.monotonic()) + GRACE_S)
        except queue.Empty:
            yield [Finding("daemon", "doctor", "fault", "tests ended without an answer", "report this as a bug")]
            return


def _ask(question: Question, until: float) -> Any:
    """Return what a child answers, or a finding that says why it does not."""
    from trigger_daemon.apart import Late, ask
    from trigger_daemon.errors import TriggerError

    left_s = min(question.deadline_s, until - time.monotonic())
    if left_s <= 0:
        return Finding(question.check, question.about, "fault", f"was not reached within {WHOLE_S:g} s",
                       "see to those that do not answer, and ask again")  # fmt: skip
    try:
        told = ask(question.function, *question.args, deadline_s=left_s)
    except TriggerError as error:
        return Finding(question.check, question.about, "fault", error.message, error.hint)
    except OSError as error:
        why = error.strerror or str(error)
        return Finding(question.check, question.about, "fault", why, "check the path and who may read it")
    return _late(question, told.why) if isinstance(told, Late) else told


def _late(question: Question, why: str) -> Finding:
    if question.function.endswith(":journal_quick"):
        return Finding(question.check, question.about, "note", f"too large to be looked through in {QUICK_S:g} s",
                       "`trigger-daemon journal check` takes the time it needs")  # fmt: skip
    if not question.about.startswith("/"):
        return Finding(question.check, question.about, "fault", why, "look at the network and at name resolution")
    from trigger_daemon.mounts import mount_of  # touches nothing

    mount = mount_of(question.about)
    where = f"{mount.fstype} from {mount.source}, mounted on {mount.mountpoint}" if mount else "its file system"
    hint = f"{where}: see whether its server answers, or `umount -l` it; the daemon waits, and goes on with the others"
    return Finding(question.check, question.about, "fault", why, hint)


def _rules(settings: Settings, plan: dict[str, Any]) -> Iterator[Finding]:
    if plan["faults"]:
        words = f"{text.counted(len(plan['faults']), 'fault')}, the first: {plan['faults'][0]}"
        yield Finding("rules", settings.rules_dir, "fault", words, "`trigger-daemon rules check` shows all")
    elif not plan["rules"]:
        yield Finding("rules", settings.rules_dir, "warning", "there are none: nothing is watched", "write one")
    else:
        yield Finding("rules", settings.rules_dir, "ok", f"{text.counted(plan['rules'], 'rule')} without a fault")


def _inotify(settings: Settings, found: Sequence[Finding], kept: dict[str, Any]) -> list[Finding]:
    import sys

    from trigger_daemon.doctor.machine import inotify

    if sys.platform != "linux" or settings.events == "watchdog":
        return []
    counts = [each.figures for each in found if "directories" in each.figures]
    directories = sum(int(figures["directories"]) for figures in counts)
    counted = f"{directories:,} directories"
    if not all(figures["directories_all"] for figures in counts):
        counted = f"at least {counted}"
    if kept["watches"] is not None:
        directories = kept["watches"] + kept["unwatched"]
        counted = f"{directories:,} directories"
    return inotify(directories, counted, kept["watches"], kept["uid"])


def _missing(settings: Settings, owner: int, wanted: set[str]) -> Iterator[Finding]:
    """Yield what was not tested, and why."""
    if "broker" in wanted and _broker(settings) is None:
        yield Finding("broker", "", "ok", "none is configured")
    if os.getuid() == 0 and owner != 0 and wanted & {"roots", "destinations"}:
        words = f"asked by root: what user {owner}, who owns {settings.state_dir}, may read and write was not tested"
        yield Finding("daemon", "rights", "note", words, f"`sudo -u '#{owner}' trigger-daemon doctor` tests that")


def ask_globus(config: str | None) -> list[Finding]:
    """Ask Globus what the rules need; in a child process."""
    from trigger_daemon.cli.globus import examined, rules_of
    from trigger_daemon.config import load_settings

    settings = load_settings(Path(config) if config else None, os.environ)
    who, findings = examined(settings, rules_of(settings, whole=False))
    told = [Finding("credentials", "globus", "ok", f"the service knows us: {who.name or who.username}")] if who else []
    return told + [
        Finding("credentials", one.rule or "globus", "ok" if one.ok else "fault", f"{one.what}: {one.why}", one.hint)
        for one in findings
    ]


# --------------------------------------------------------------------------- text


def lines(found: Sequence[Finding], *, verbose: bool) -> Iterator[str]:
    """Yield a line a finding, faults first; a hint below, the sum at the end.

    What is in order is counted, or with `verbose` told, that of one place on one line.
    """
    told: set[tuple[str, str]] = set()
    shown = [each for each in found if verbose or each.level != "ok"]
    for each in sorted(shown, key=lambda each: -LEVELS.index(each.level)):
        key = (each.check, each.about)
        words = each.what
        if each.level == "ok":
            if key in told:
                continue
            told.add(key)
            words = "; ".join(other.what for other in found if (*key, "ok") == other[:3])
        about = f"{text.name(each.about)}: " if each.about else ""
        pad = " " * (7 - len(each.level))
        yield f"{text.coloured(each.level)}{pad}  {each.check:<12}  {about}{text.safe(words)}"
        if each.hint and each.level != "ok":
            yield f"{'':23}hint: {text.safe(each.hint)}"
    if not verbose and (good := {each[:2]: each.check for each in found if each.level == "ok"}):
        words = f"{len(good)} in order ({', '.join(dict.fromkeys(good.values()))}): -v shows them"
        yield f"{text.coloured('ok')}       {words}"
    counts = {level: _count(found, level) for level in LEVELS[:0:-1]}
    yield "\n" + (", ".join(text.counted(count, level) for level, count in counts.items() if count) or "all is well")
