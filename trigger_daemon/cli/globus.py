"""`globus`: the daemon's account at Globus, and what its rules need there."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon.cli import deploy as _deploy  # noqa: F401  adds its commands to `flow`
from trigger_daemon.cli import text
from trigger_daemon.cli.commands import FAILURE, NEEDS_PERSON, OK, Group, Setup, pass_setup
from trigger_daemon.cli.flow import flow
from trigger_daemon.cli.timer import timer
from trigger_daemon.errors import ConfigError, TriggerError

if TYPE_CHECKING:
    from trigger_daemon.config import Settings
    from trigger_daemon.core.rules import Rule
    from trigger_daemon.globus import Account
    from trigger_daemon.globus.check import Finding
    from trigger_daemon.globus.login import Identity
    from trigger_daemon.globus.service import Service


@click.group(cls=Group)
def globus() -> None:
    """The daemon's account at Globus, and what its rules need there.

    Each command acts as the daemon's user when root calls it, so that `sudo` does no harm to the kept tokens.
    """


globus.add_command(flow)
globus.add_command(timer)


# ------------------------------------------------------------------------- shared


@contextlib.contextmanager
def account_of(settings: Settings) -> Iterator[Account]:
    """Act as the daemon's user, for the account of the settings. Raises Trouble, TriggerError."""
    if importlib.util.find_spec("globus_sdk") is None:
        raise TriggerError("the SDK of Globus is not installed", hint="`pip install 'trigger-daemon[globus]'`")
    from trigger_daemon.globus.login import as_owner, known_account

    state_dir = Path(settings.state_dir)
    with as_owner(state_dir):
        yield known_account(settings.globus.plain(), state_dir)


@contextlib.contextmanager
def service_of(settings: Settings) -> Iterator[Service]:
    """Ask Globus as the daemon does. Raises Trouble, TriggerError."""
    from trigger_daemon.globus.service import Service

    with account_of(settings) as who:
        service = Service(who)
        try:
            yield service
        finally:
            service.close()


@contextlib.contextmanager
def told(setup: Setup) -> Iterator[None]:
    """Tell what Globus refuses, and end the command: with 4 if a person must act at Globus, else with 1."""
    from trigger_daemon.globus.faults import Trouble, by_hand

    try:
        yield
    except Trouble as trouble:
        setup.fail(trouble.fault.why, by_hand(trouble))
        raise click.exceptions.Exit(NEEDS_PERSON if trouble.fault.kind == "person" else FAILURE) from None


def rules_of(settings: Settings, *, whole: bool = True) -> tuple[Rule, ...]:
    """Return the rules of the settings. Raises ConfigError if they have faults; without `whole`, it is only said."""
    from trigger_daemon.cli.rules import read_rules

    read = read_rules((Path(settings.rules_dir),), settings)
    if read.faults and whole:
        raise ConfigError(read.faults)
    if read.faults:
        text.note("the rules have faults (`trigger-daemon rules check`); only those that can be read are counted")
    return tuple(read.rules)


def examined(settings: Settings, rules: Sequence[Rule]) -> tuple[Identity | None, list[Finding]]:
    """Return who the daemon is to Globus, and what was found of each rule. Raises TriggerError."""
    from trigger_daemon.globus.check import Finding, examine
    from trigger_daemon.globus.faults import Trouble

    try:
        with service_of(settings) as service:
            return examine(service, rules)
    except Trouble as trouble:
        fault = trouble.fault
        return None, [Finding("", "account", False, fault.why, fault.hint, "person")]


def exit_code(found: Sequence[Finding]) -> int:
    """Return 4 if a person is needed for something, 1 if Globus could not be reached, else 0."""
    needs = {each.need for each in found if not each.ok}
    return NEEDS_PERSON if "person" in needs else FAILURE if needs else OK


def findings_json(found: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {"rule": each.rule or None, "what": each.what, "ok": each.ok, "why": each.why, "hint": each.hint}
        for each in found
    ]


def show_findings(found: Sequence[Finding]) -> None:
    """Print findings by rule, each fault with what to do."""
    rule = ""
    for each in found:
        if each.rule != rule:
            rule = each.rule
            click.echo(text.safe(rule))
        indent = "  " if rule else ""
        words = f"{each.what}: {each.why}" if each.why else each.what
        click.echo(f"{indent}{'ok   ' if each.ok else 'fault'}  {text.safe(words)}")
        if not each.ok and each.hint:
            click.echo(f"{indent}       hint: {text.safe(each.hint)}")


# ----------------------------------------------------------------- login, logout, who


@globus.command("login")
@pass_setup
def login(setup: Setup) -> None:
    """Give the daemon your identity at Globus, with every consent that its rules need.

    It shows an address; open it in any browser, log in, and paste the code that is shown. What is kept in the state
    directory is a token, not a password, and only the daemon's user can read it. A running daemon takes it up by
    itself. Log in again after rules have begun to use another collection, flow or index.

    With a client secret in the settings nobody has to log in: then this says whether Globus knows the two.
    """
    from trigger_daemon.globus.login import login as log_in
    from trigger_daemon.globus.login import wanted

    settings = setup.settings()
    rules = rules_of(settings, whole=False)
    # The SDK shows the address and asks on stdout, which is for data.
    with told(setup), account_of(settings) as who, contextlib.redirect_stdout(sys.stderr):
        me = log_in(who, wanted(rules, who), text.note)
    if setup.json:
        setup.data({"ok": True, **_identity(me)})
        return
    click.echo(f"logged in as {text.safe(me.words())}")
    if me.kind == "person":
        text.note("a running daemon takes it up by itself; `trigger-daemon globus check` tells whether all is there")
    else:
        text.note("it is a client with a secret: the daemon logs in by itself, and nothing is kept")


@globus.command("logout")
@pass_setup
def logout(setup: Setup) -> None:
    """Revoke and remove the tokens of a person's login. Transfers that run go on; new ones are held.

    If Globus cannot be reached, they are removed all the same.
    """
    from trigger_daemon.globus.login import logout as log_out

    with told(setup), account_of(setup.settings()) as who:
        if who.client_secret:
            text.note("this account is a client with a secret: remove `client_secret_file` from the settings instead")
        done = log_out(who)
    if done.failed:
        text.note(f"not all could be revoked ({done.failed}); do it at https://app.globus.org/settings/consents")
    if setup.json:
        setup.data({"ok": True, "removed": done.removed, "revoked": done.revoked, "failed": done.failed})
    else:
        click.echo("logged out" if done.removed else "nobody was logged in")


@globus.command("whoami")
@pass_setup
def whoami(setup: Setup) -> None:
    """Say who the daemon is to Globus: whom to name when asking somebody for a permission."""
    from trigger_daemon.globus.login import identity

    with told(setup), service_of(setup.settings()) as service:
        me = identity(service)
    if setup.json:
        setup.data(_identity(me))
        return
    click.echo(text.pairs([
        ("username", text.safe(me.username)), ("identity", me.identity), ("name", text.safe(me.name)),
        ("is", "a client with a secret" if me.kind == "client" else "a person who has logged in"),
        ("client", me.client_id),
        ("also", ", ".join(text.safe(f"{one['username']} ({one['identity']})") for one in me.linked)),
    ]))  # fmt: skip


def _identity(me: Identity) -> dict[str, Any]:
    return {
        "kind": me.kind, "client_id": me.client_id, "identity": me.identity, "username": me.username, "name": me.name,
        "linked": [dict(one) for one in me.linked],
    }  # fmt: skip


# -------------------------------------------------------------------------- check


@globus.command("check")
@pass_setup
def check(setup: Setup) -> None:
    """Ask Globus, for each rule, whether all that it needs is there, and say whom to ask for what is not.

    The account, collections and their directories, consents, the index, the flow and its input. Nothing is started; a
    destination's directory is made if it is missing, since nothing else shows the right to write there. Exit code 4 if
    a person is needed, 1 if Globus cannot be reached.
    """
    settings = setup.settings()
    rules = rules_of(settings)
    me, found = examined(settings, rules)
    code = exit_code(found)
    if setup.json:
        checks = findings_json(found)
        setup.data({"ok": code == OK, "account": _identity(me) if me is not None else None, "checks": checks})
    else:
        show_findings(found)
        faults = sum(not each.ok for each in found)
        text.note(text.counted(faults, "fault") if faults else "no faults")
        if not rules:
            text.note(f"there are no rules in {settings.rules_dir}: only the account was looked at")
    if code != OK:
        raise click.exceptions.Exit(code)
