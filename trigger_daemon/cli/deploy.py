"""`globus flow deploy | update`: a definition, once it has no faults, is put to the service.

The service has no request id for flows, so that a repetition could make a
second one: what was lost on the way is looked for by its title, for as long as
the service may not list it yet.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trigger_daemon.cli import text
from trigger_daemon.cli.commands import Setup, pass_setup
from trigger_daemon.cli.flow import FILE, checked, flow
from trigger_daemon.errors import TriggerError

if TYPE_CHECKING:
    from trigger_daemon.globus.deploys import Deploy, Deploys
    from trigger_daemon.globus.faults import Trouble
    from trigger_daemon.globus.service import Service

TITLE_MAX = 128  # of the service
PAUSE_S, PAUSE_MAX_S = 0.25, 5.0  # between two looks; doubles: most are listed soon, the others cost the service little
WEB = "https://app.globus.org/flows"
_PRINCIPAL = re.compile(r"(group|identity):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)
_URNS = {"group": "urn:globus:groups:id:", "identity": "urn:globus:auth:identity:"}

F = TypeVar("F", bound=Callable[..., Any])


def _who(_: click.Context, option: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """Return who is named, as the service names them."""
    everybody = {"viewers": "public", "starters": "all_authenticated_users"}.get(str(option.name), "")
    urns = []
    for who in given:
        if found := _PRINCIPAL.fullmatch(who):
            urns.append(f"{_URNS[found[1].lower()]}{found[2].lower()}")
        elif who == everybody or who.startswith("urn:globus:"):
            urns.append(who)
        else:
            also = f", or {everybody}" if everybody else ""
            raise click.BadParameter(f"{who!r} is not understood: write group:UUID or identity:UUID{also}")
    return urns


def _about(command: F) -> F:
    """Give a command the options that say what a flow is, and who may use it."""
    many: dict[str, Any] = {"multiple": True, "metavar": "WHO", "callback": _who}
    for option in reversed((
        click.option("--schema", metavar="FILE", type=FILE, help="The flow's input schema."),
        click.option("--subtitle", metavar="TEXT", help="One line below the title."),
        click.option("--description", metavar="TEXT", help="What it does, for those who may start it."),
        click.option("--keyword", "keywords", multiple=True, metavar="WORD", help="To find it by; may be repeated."),
        click.option("--starter", "starters", help="Who may start it; may be repeated: group:UUID, say.", **many),
        click.option("--viewer", "viewers", help="Who may see it; may be repeated.", **many),
        click.option("--administrator", "administrators", help="Who may change it; may be repeated.", **many),
        click.option("--subscription", metavar="UUID", help="The subscription that pays for it."),
    )):  # fmt: skip
        command = option(command)
    return command


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return what was given, in the words of the SDK."""
    words = {"starters": "flow_starters", "viewers": "flow_viewers", "administrators": "flow_administrators",
             "subscription": "subscription_id"}  # fmt: skip
    return {
        words.get(key, key): list(value) if isinstance(value, tuple) else value
        for key, value in given.items() if value
    }  # fmt: skip


@flow.command("deploy")
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--title", required=True, metavar="TEXT", help="What the flow is called; unique among the account's.")
@_about
@click.option("--again", is_flag=True, help="Make another one, although the account has a flow of this title.")
@pass_setup
def deploy(setup: Setup, file: str, title: str, schema: str | None, again: bool, **given: Any) -> None:
    """Check a flow's definition, and make a flow of it that the daemon's account owns.

    Nothing is sent if it has a fault (exit code 3). A title that the account has already is refused, so that the
    command can be repeated: no second flow comes of it. Where nothing tells what became of it, the command looks for
    the flow until it would surely be listed (`listed_after` in the settings), before it ends or makes one.

    WHO is group:UUID or identity:UUID; everybody is `public` for --viewer, `all_authenticated_users` for --starter.
    Without them only the account itself may see and start it.
    """
    from trigger_daemon.cli.globus import service_of, told
    from trigger_daemon.globus.deploys import alone

    title = title.strip()
    if not 1 <= len(title) <= TITLE_MAX:
        raise click.BadParameter(f"a title has 1 to {TITLE_MAX} characters", param_hint="--title")
    definition, input_schema = checked(setup, file, schema)
    new = _New(file, title, definition, input_schema or {}, _fields(given))
    settings = setup.settings()
    with (
        told(setup),
        service_of(settings) as service,
        alone(str(settings.state_dir), service.account.listed_after_s) as deploys,
    ):
        made = _deployed(setup, service, deploys, new, again=again)
    _told(setup, made, created=True)


@dataclass(frozen=True, slots=True)
class _New:
    """A flow that is to be made."""

    file: str
    title: str
    definition: Any
    input_schema: Any
    fields: dict[str, Any]

    def is_in(self, flow: dict[str, Any]) -> bool:
        """Say whether a flow of the service has this content."""
        # As JSON gives it back: keys of YAML that are numbers are text there.
        sent = json.loads(json.dumps([self.definition, self.input_schema]))
        return bool(sent == [flow.get("definition"), flow.get("input_schema") or {}])

    def there(self, flow: str) -> TriggerError:
        return TriggerError(
            f"the account has a flow {self.title!r} already: {flow}",
            hint=f"`trigger-daemon globus flow update {flow} {self.file}` changes it; --again makes another one",
        )


def _deployed(setup: Setup, service: Service, deploys: Deploys, new: _New, *, again: bool) -> dict[str, Any]:
    """Make a flow unless there is one; return it. Raises Trouble, TriggerError."""
    from trigger_daemon.globus.deploys import BEFORE_MAX, Deploy

    client = service.account.client_id
    last = deploys.last(client, new.title)
    if last is not None and not last.flow:
        with _interrupted(setup, service):
            found = _looked_for(service, last, new, deploys.left_s(last))
        if found is not None:
            deploys.note(last := replace(last, flow=str(found["id"])))
            if new.is_in(found):
                text.note("a command that did not live to tell it has made the flow")
                return found
    before = set(_of_title(service, new.title))
    if last is not None and last.flow and _is_there(service, last.flow, new.title):
        before.add(last.flow)
    if before and not again:
        raise new.there(min(before))
    sent = Deploy(client, new.title, time.time(), tuple(sorted(before)[:BEFORE_MAX]))
    deploys.note(sent)
    with _interrupted(setup, service):
        made, lost = _created(service, deploys, sent, new)
    # Its id is kept a while: a repetition would not find it in the list yet.
    deploys.note(replace(sent, time=time.time(), flow=str(made["id"])))
    if lost and not new.is_in(made):
        raise new.there(str(made["id"]))
    return made


def _created(service: Service, deploys: Deploys, sent: Deploy, new: _New) -> tuple[dict[str, Any], bool]:
    """Make a flow, and say whether the answer was lost; then it is what has come of this title.

    Raises Trouble, TriggerError.
    """
    from trigger_daemon.globus.faults import Trouble

    try:
        return service.ask("make the flow", lambda globus: _whole(
            globus.flows.create_flow(new.title, new.definition, new.input_schema, **new.fields).data
        )), False  # fmt: skip
    except Trouble as error:
        trouble = error
    if trouble.done is False:
        deploys.forget(sent)
        raise trouble
    # Counted from here: until the answer was given up it may have been on its way.
    deploys.note(sent := replace(sent, time=time.time()))
    found = _looked_for(service, sent, new, deploys.left_s(sent))
    if found is None:
        deploys.forget(sent)
        raise TriggerError(f"the flow was not made: {trouble.fault.why}", hint="repeat the command")
    if new.is_in(found):
        text.note("the service's answer was lost, but the flow is there")
    return found, True


def _looked_for(service: Service, sent: Deploy, new: _New, left_s: float) -> dict[str, Any] | None:
    """Return the flow that was sent, or another new one of its title; None if it surely was not made.

    It was not made if a list of `left_s` from now, or later, does not show it. Raises Trouble if there is none.
    """
    from trigger_daemon.globus.faults import Trouble

    end_at = time.monotonic() + left_s
    pause_s, said = PAUSE_S, False
    while True:
        over, trouble = time.monotonic() >= end_at, None
        try:
            found = [_flow(service, one) for one in _of_title(service, new.title) if one not in sent.before]
            if found:
                return next((one for one in found if new.is_in(one)), found[0])
        except Trouble as error:
            trouble = error
        if trouble is not None and (over or trouble.fault.kind != "transient"):
            raise _unknown(trouble)
        if over:
            return None
        if not said:
            said = True
            text.note(
                f"whether a flow {new.title!r} was made is not known; the service may list it late, so it is looked"
                f" for, {text.age(left_s)} at most"
            )
        time.sleep(max(0.0, min(pause_s, end_at - time.monotonic())))
        pause_s = min(2 * pause_s, PAUSE_MAX_S)


def _of_title(service: Service, title: str) -> list[str]:
    """Return the ids of the account's flows of a title, as far as they are listed. Raises Trouble."""
    return service.ask("list the account's flows", lambda globus: [
        str(one["id"]) for one in globus.flows.paginated.list_flows(filter_roles="flow_owner").items()
        if one.get("title") == title and one.get("user_role", "flow_owner") == "flow_owner"
    ])  # fmt: skip


def _flow(service: Service, flow: str) -> dict[str, Any]:
    """Return a flow, with what a list need not tell. Raises Trouble."""
    return service.ask("look at the flow", lambda globus: _whole(globus.flows.get_flow(flow).data))


def _is_there(service: Service, flow: str, title: str) -> bool:
    """Say whether a flow of this title is there, listed or not. Raises Trouble."""
    from trigger_daemon.globus.faults import Trouble

    try:
        return _flow(service, flow).get("title") == title
    except Trouble as trouble:
        if trouble.status == 404:
            return False
        raise


def _whole(answer: Any) -> dict[str, Any]:
    """Return a flow as the service tells it. Raises ValueError for what is none."""
    flow = dict(answer)
    if not flow.get("id"):
        raise ValueError("a flow without an id")
    return flow


def _unknown(trouble: Trouble) -> Trouble:
    hint = trouble.fault.hint
    if trouble.fault.kind == "transient":
        hint = "repeat the command when Globus answers: it looks for the flow before it makes one"
    why = f"whether the flow was made is not known: {trouble.fault.why}"
    return replace(trouble, fault=replace(trouble.fault, why=why, hint=hint))


@contextlib.contextmanager
def _interrupted(setup: Setup, service: Service) -> Iterator[None]:
    """Tell who ends the command while nothing is known how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        span = text.age(service.account.listed_after_s)
        setup.fail(
            "interrupted: whether the flow was made is not known",
            f"repeat the command after {span}; sooner, it waits itself until the flow would surely be listed",
        )
        raise


@flow.command("update")
@click.argument("flow_id", metavar="FLOW", type=click.UUID)
@click.argument("file", metavar="FILE", type=FILE)
@click.option("--title", metavar="TEXT", help="A new title.")
@_about
@pass_setup
def update(setup: Setup, flow_id: Any, file: str, title: str | None, schema: str | None, **given: Any) -> None:
    """Check a flow's definition, and give it to a flow that is there. Only what is given is changed.

    Runs that are under way go on as they began. A person's login needs the consent of a changed flow anew: see
    `globus check`. WHO is as in `deploy`; who is named takes the place of those who were.
    """
    from trigger_daemon.cli.globus import service_of, told

    definition, input_schema = checked(setup, file, schema)
    fields = _fields({**given, "title": title, "input_schema": input_schema})
    with told(setup), service_of(setup.settings()) as service:
        changed = service.ask("change the flow", lambda globus: dict(
            globus.flows.update_flow(str(flow_id), definition=definition, **fields).data
        ))  # fmt: skip
    _told(setup, changed, created=False)


def _told(setup: Setup, told: dict[str, Any], *, created: bool) -> None:
    key, title = str(told["id"]), str(told.get("title") or "")
    if setup.json:
        setup.data({"ok": True, "id": key, "title": title, "created": created, "link": f"{WEB}/{key}"})
        return
    click.echo(f"{key}  {text.safe(title)}")
    text.note(f"{'made' if created else 'changed'}: {WEB}/{key}")
    if created:
        text.note(f"in a rule: `start: {{globus_flow: {{flow: {key}, input: ...}}}}`")
        text.note("then `trigger-daemon globus check`; a person's login needs its consent: `globus login` first")
