"""`explain PATH...`: why a file was, or was not yet, sent.

Three are asked: the running daemon about files on their way, the journal about
what was batched, and the disk about what is there now. Nothing is written.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FILE_NAME, Command, Setup, absolute, pass_setup
from trigger_daemon.core.model import (
    CLAIM_BASELINE,
    CLAIM_MARKER,
    CLAIM_ONLY_FIRST,
    CLAIM_REWRITE_IGNORED,
    CLAIM_SKIPPED,
    CLAIM_UNKNOWN,
    RunState,
)
from trigger_daemon.errors import NotRunning, TriggerError
from trigger_daemon.eyes import Eyes, Hangs

if TYPE_CHECKING:
    from trigger_daemon.reader import ClaimOf, Reader, ReclaimOf

LOOK_S = 3.0  # a share that does not answer must not keep the command

IN_IT = "name a file in it; `trigger-daemon files list` shows what is not sent yet, `runs list` what was"

_CODES = {
    CLAIM_BASELINE: ("baseline", "it was there when the rule was accepted (existing: ignore)"),
    CLAIM_SKIPPED: ("skipped", "an operator left this version out (files skip)"),
    CLAIM_MARKER: ("skipped", "it acted as a marker of this rule (close_on), once"),
    CLAIM_REWRITE_IGNORED: ("skipped", "it was rewritten after it was batched (on_rewrite: ignore)"),
    CLAIM_ONLY_FIRST: ("skipped", "the batch of its group was full before it was complete (only_first)"),
    CLAIM_UNKNOWN: ("skipped", "it was there when the journal was recovered, which does not know whether it was sent"),
}
_STATES = {
    RunState.VERIFIED: "verified", RunState.HELD: "held", RunState.ABANDONED: "abandoned",
    RunState.CANCELLED: "abandoned", RunState.SUPERSEDED: "superseded",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Present:
    """What is at a path now: a version, or words why there is none."""

    version: tuple[int, int] | None  # size, mtime_ns
    words: str
    absent: bool = False
    hint: str = ""


@dataclass(slots=True)
class Answers:
    """What was gathered about one path."""

    path: str
    present: Present
    claims: Sequence[tuple[str, ClaimOf]]  # path below its root, claim; the newest batch first
    running: bool
    waits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # run -> what the daemon says of it
    away: Mapping[str, str] = field(default_factory=dict)  # root -> why it is away
    reclaims: Sequence[ReclaimOf] = ()  # the newest first


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=FILE_NAME)
@pass_setup
def explain(setup: Setup, paths: tuple[str, ...]) -> None:
    """Say for each rule where a file stands, and why it was or was not yet sent.

    Works when the daemon is down, as far as the journal knows. The path need not exist any more.
    """
    told = [_explain(setup, absolute(path), first=not number) for number, path in enumerate(paths)]
    if setup.json:
        setup.data(told[0] if len(told) == 1 else {"files": told})


def _explain(setup: Setup, path: str, *, first: bool) -> dict[str, Any]:
    """Tell of one path, as text or in what is returned."""
    reader, client = setup.reader, setup.client
    running = client.alive()
    heartbeat = client.heartbeat() or {}
    rules: list[dict[str, Any]] | None = None
    if running:
        try:
            rules = setup.ask("explain", path=path)["rules"]
        except NotRunning as error:
            text.note(f"{error.message}; this is what the journal knows")
            running = False
    if rules is None:
        rules = _from_rules(reader, path)
    claims = claims_below(reader, path)
    away = {
        root["path"]: f"{root['path']} is {root['health']}: {root['why']}"
        for root in heartbeat.get("roots", ()) if running and root["health"] in ("lost", "suspect")
    }  # fmt: skip
    answers = Answers(path, look(path), claims, running, away=away, reclaims=reclaims_below(reader, path))
    if running:
        answers.waits = _waits(setup, claims)
    found = [_about(answers, reader, about) for about in rules]
    named = {about["rule"] for about in rules if about["stage"] != "unmatched"}
    dealt = [*(claim.rule for _, claim in claims), *(one.rule for one in answers.reclaims if one.rule)]
    for rule in dict.fromkeys(rule for rule in dealt if rule not in named):
        found = [about for about in found if about["rule"] != rule]
        found.append(_about(answers, reader, {"rule": rule, "stage": "", "because": "", "until_time": None}))
    reclaim = _reclaim(setup, answers, heartbeat if running else None)
    found = [{**about, "reclaim": reclaim.get(about["rule"])} for about in found]
    if setup.json:
        reclaims = [text.timed(one._asdict()) for one in answers.reclaims]
        told = {"path": path, "rules": [text.timed(about) for about in found], "reclaims": reclaims}
        return {**told, "hint": answers.present.hint} if answers.present.hint else told
    if not first:
        click.echo()
    _print(answers, found)
    roots = sorted(reader.roots())
    if path in roots:
        click.echo("it is watched itself")
    elif not found:
        others = f"; watched are: {', '.join(map(text.name, roots))}"
        click.echo(f"no rule watches a directory above it{others}" if roots else "nothing is watched yet")
    if answers.present.hint:
        text.note(f"hint: {answers.present.hint}")
    return {}


def look(path: str) -> Present:
    """Return what is at a path now, waiting no longer than LOOK_S."""
    eyes = Eyes(deadline_s=LOOK_S, everywhere=True)
    try:
        found = eyes.lstat(path)
    except Hangs:
        return Present(None, f"its file system has not answered for {LOOK_S:g} s")
    except (FileNotFoundError, NotADirectoryError):
        return Present(None, "there is no such file", absent=True)
    except OSError as error:
        return Present(None, f"it cannot be looked at: {error.strerror}")
    finally:
        eyes.close()
    if stat.S_ISREG(found.st_mode):
        return Present((found.st_size, found.st_mtime_ns), "")
    kind = "a directory" if stat.S_ISDIR(found.st_mode) else (
        "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no regular file"
    )  # fmt: skip
    hint = IN_IT if stat.S_ISDIR(found.st_mode) else ""
    return Present(None, f"it is {kind}; rules deal with regular files only", hint=hint)


def claims_below(reader: Reader, path: str) -> list[tuple[str, ClaimOf]]:
    """Return every version of a file that a rule dealt with, below whichever root it lies, the newest batch first."""
    found: list[tuple[str, ClaimOf]] = []
    for root in reader.roots():
        above = root.rstrip("/") + "/"
        if path.startswith(above):
            below = path[len(above) :]
            found += [(below, claim) for claim in reader.claims_of(root, below)]
    return sorted(found, key=lambda item: -item[1].batch)


def reclaims_below(reader: Reader, path: str) -> list[ReclaimOf]:
    """Return every set that a file was taken away with, or was to be, below whichever root it lies, newest first."""
    found: list[ReclaimOf] = []
    for root in reader.roots():
        above = root.rstrip("/") + "/"
        if path.startswith(above):
            found += reader.reclaims_of(root, path[len(above) :])
    return sorted(found, key=lambda one: -one.id)


def _from_rules(reader: Reader, path: str) -> list[dict[str, Any]]:
    """Return what the rules last accepted say of a path, as the daemon would; stage '' where only the journal knows."""
    from trigger_daemon.config import parse_rules
    from trigger_daemon.core import patterns

    found = []
    for rule in parse_rules(reader.rule_texts()).rules:
        above = rule.watch.rstrip("/") + "/"
        if not path.startswith(above):
            continue
        stage, because = patterns.why_not(rule, path[len(above) :])
        told = {"stage": "", "because": ""} if stage == "matched" else {"stage": stage, "because": because}
        found.append({"rule": rule.name, **told, "until_time": None})
    return found


def _reclaim(setup: Setup, answers: Answers, beat: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what each rule with `reclaim` says of the version that is there, if it has taken it."""
    runs: dict[str, int] = {}
    for _, claim in answers.claims:  # the newest batch first
        if claim.batch > 0 and (claim.size, claim.mtime_ns) == answers.present.version:
            runs.setdefault(claim.rule, claim.batch)
    if not runs:
        return {}
    from trigger_daemon.cli.reclaim import of_file
    from trigger_daemon.config import parse_rules

    rules = parse_rules(setup.reader.rule_texts()).rules
    return of_file(setup, rules, answers.path, runs, beat)


def _waits(setup: Setup, claims: Sequence[tuple[str, ClaimOf]]) -> dict[str, dict[str, Any]]:
    ids = sorted({claim.batch for _, claim in claims if claim.batch > 0 and not claim.final})
    if not ids:
        return {}
    try:
        waits: dict[str, dict[str, Any]] = setup.ask("runs.waiting", timeout_s=2.0, ids=ids)["runs"]
    except TriggerError:
        return {}  # the journal's words stand
    return waits


# ------------------------------------------------------------------------ one rule


def _about(answers: Answers, reader: Reader, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the file stands in one rule: what the daemon said, or what journal and disk tell together."""
    rule = about["rule"]
    claims = [(below, claim) for below, claim in answers.claims if claim.rule == rule]
    history = [_version(claim, answers) for _, claim in claims]
    told = {"rule": rule, "stage": about["stage"], "because": about["because"], "until_time": about["until_time"]}
    told["run"] = about.get("run")
    if told["stage"] in ("", "batched"):
        told |= _taken_away(answers, rule) or _from_journal(answers, reader, claims)
    return {**told, "history": history}


def _taken_away(answers: Answers, rule: str) -> dict[str, Any] | None:
    """Say when, why and with what proof a file was deleted here; None if it was not."""
    if not answers.present.absent or not answers.reclaims:
        return None
    ended = (one for one in answers.reclaims if one.state == "done" and one.place in ("gone", "neither"))
    last = next(ended, answers.reclaims[0])
    if last.state in ("intended", "confirmed"):
        because = f"reclaim {last.id} is taking it away; until that is ended its name is {last.hidden}"
        return {"stage": "reclaimed", "because": because, "run": last.run}
    if last.state == "kept":  # it was there then, or somebody else had moved it
        return None
    proofs = []
    for proof in last.proofs:
        copies = [(to, digest) for full, to, digest in proof["copies"] if full == answers.path]
        where = " and ".join(f"{to} ({digest})" if digest else str(to) for to, digest in copies) or "a place not told"
        proofs.append(f"run {proof['run']} of {proof['rule']} at {text.rfc3339(proof['time'])}: {where}")
    because = f"deleted here at {text.rfc3339(last.changed_time)} by the `reclaim` of {last.rule}; proved by "
    return {"stage": "reclaimed", "because": because + "; ".join(proofs), "run": last.run}


def _from_journal(answers: Answers, reader: Reader, claims: Sequence[tuple[str, ClaimOf]]) -> dict[str, Any]:
    present = answers.present
    now = next((item for item in claims if (item[1].size, item[1].mtime_ns) == present.version), None)
    if now is not None:
        return _claimed(answers, reader, *now)
    if present.version is None:
        if not claims:
            stage, words = "unmatched", present.words
            if present.absent:
                stage, words = "gone", "no such file, and nothing is known of one"
            away = next((why for root, why in answers.away.items() if answers.path.startswith(root + "/")), "")
            return {"stage": "settling" if away else stage, "because": away or words, "run": None}
        told = _claimed(answers, reader, *claims[0])
        return {**told, "because": f"{told['because']}; now {present.words}"}
    because = "not looked at yet"
    if not answers.running:
        because = "the daemon is not running; it is looked at after its start"
    if claims:
        because = f"a newer version than {_taken(claims[0][1])}: {because}"
    return {"stage": "settling", "because": because, "run": None}


def _taken(claim: ClaimOf) -> str:
    return f"the one run {claim.batch} took" if claim.batch > 0 else "the one the rule left out"


def _claimed(answers: Answers, reader: Reader, below: str, claim: ClaimOf) -> dict[str, Any]:
    """Say what became of a version that a rule dealt with."""
    if claim.batch <= 0:
        stage, because = _CODES.get(claim.batch, ("skipped", f"left out (code {claim.batch})"))
        if claim.batch == CLAIM_SKIPPED and (order := reader.skipped(answers.path, claim.rule, claim.closed_time)):
            why = f": {order['why']}" if order["why"] else ", without saying why"
            because = f"{order['who']} left this version out at {text.rfc3339(order['time'])} (files skip){why}"
        return {"stage": stage, "because": because, "run": None}
    state = RunState(claim.state) if claim.state else None
    run = f"run {claim.batch}"
    match state:
        case RunState.VERIFIED:
            because = _proved(reader, below, claim)
        case RunState.HELD:
            because = f"{run} is held: {claim.error or claim.because}" + (f" ({claim.hint})" if claim.hint else "")
        case RunState.ABANDONED | RunState.CANCELLED | RunState.SUPERSEDED:
            because = f"{run} is {state}: {claim.because}"
        case RunState.SUCCEEDED if claim.final:
            because = f"{run} SUCCEEDED: {claim.because}; its rule asks for no proof"
        case _:
            live = answers.waits.get(str(claim.batch), {})
            waits = live.get("waiting_for") or (
                claim.because if state in (RunState.PENDING, RunState.INACTIVE) else ""
            )
            because = f"{run} is {state or 'unknown'}" + (f", waits for {waits}" if waits else "")
            if live.get("bytes_done"):
                because += f", {text.size(live['bytes_done'])} done"
            if not answers.running:
                because += "; the daemon is not running"
    return {"stage": _STATES.get(state, "batched") if state else "batched", "because": because, "run": claim.batch}


def _proved(reader: Reader, below: str, claim: ClaimOf) -> str:
    words = f"proved by run {claim.batch}"
    if claim.proof_time is not None:
        words += f" at {text.rfc3339(claim.proof_time)}"
    shown = reader.run(claim.batch) or {"manifest": ()}
    for member in shown["manifest"]:
        if member["path"] == below and (member["size"], member["mtime_ns"]) == (claim.size, claim.mtime_ns):
            if member["digest"]:
                words += f", {member['digest']}"
            if member["to"]:
                words += f", in {' and '.join(map(str, member['to']))}"
            break
    return words


def _version(claim: ClaimOf, answers: Answers) -> dict[str, Any]:
    """Return one version that a rule dealt with, for JSON and the history."""
    version = (claim.size, claim.mtime_ns)
    left_out = _CODES.get(claim.batch, ("skipped", ""))[0]
    return {
        "size": claim.size, "mtime_ns": claim.mtime_ns, "present": version == answers.present.version,
        "run": claim.batch if claim.batch > 0 else None, "state": claim.state,
        "stage": _STATES.get(RunState(claim.state), "batched") if claim.state else left_out,
        "reason": claim.reason, "claimed_time": claim.closed_time, "proof_time": claim.proof_time,
    }  # fmt: skip


# --------------------------------------------------------------------------- text


def _print(answers: Answers, found: Sequence[Mapping[str, Any]]) -> None:
    click.echo(text.name(answers.path))
    version = answers.present.version
    if version is not None:
        click.echo(f"    {text.size(version[0])}, written {_written(version[1])}")
    elif found:
        click.echo(f"    {text.safe(answers.present.words)}")
    if found and not answers.running:
        text.note("the daemon is not running; this is what the journal knows")
    for about in found:
        until = f" (until {text.clock(about['until_time'])})" if about["until_time"] else ""
        click.echo(f"{text.safe(about['rule'])}: {text.coloured(about['stage'])}")
        click.echo(f"    {text.safe(about['because'])}{until}")
        if about["reclaim"]:
            click.echo(f"    reclaim: {text.safe(about['reclaim']['because'])}")
        if about["stage"] == "blocked" or about["because"].endswith("(stalled)"):
            click.echo("    hint: `files go PATH` sends it as it is, `files skip PATH` leaves this version out")
        noun = "earlier version" if version is not None else "version"  # of a file that is gone, each was there once
        for one in about["history"]:
            if not one["present"]:
                run = f"run {one['run']}, {one['state']}" if one["run"] else one["stage"]
                when = text.ago(one["claimed_time"]) or "at an unknown time"
                click.echo(f"    {noun}: {text.size(one['size'])}, {run}, taken {when}")
    if answers.reclaims and answers.reclaims[0].state == "kept":
        last = answers.reclaims[0]
        click.echo(f"reclaim left it here {text.ago(last.changed_time)}: {text.safe(last.because)}")


def _written(mtime_ns: int) -> str:
    try:
        return text.clock(mtime_ns / 1e9)
    except (ValueError, OverflowError, OSError):  # an instrument's clock says anything
        return f"at {mtime_ns} ns, by its own clock"
