"""Who the daemon is to Globus, and how a person lends it an identity: log in, log out, say who.

A login asks for every scope that the daemon's clients will ask for with these
rules, and replaces the kept tokens in one step: one that is broken off leaves
the old ones. What is kept belongs to the owner of the state directory, who is
the daemon's user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.core.rules import Rule
from trigger_daemon.globus import Account, account
from trigger_daemon.globus.faults import LOGIN, Trouble, judge
from trigger_daemon.globus.paths import is_uuid
from trigger_daemon.globus.service import Clients, Service

TRANSFER, FLOW, COMPUTE = "globus_transfer", "globus_flow", "globus_compute"
ACTIONS = (TRANSFER, FLOW, COMPUTE)
COLLECTIONS_MAX = 50  # looked at before a login; a person agrees to each by hand
MAPPED = "GCSv5_mapped_collection"  # the one type that wants data_access, where it is not high assurance
AS_DAEMON = "run it as the daemon's user, or by sudo"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a set of rules needs of Globus."""

    collections: tuple[str, ...] = ()  # that files are transferred from and to by us
    flows: Mapping[str, tuple[str, ...]] | None = None  # -> collections that each may transfer between
    index: bool = False
    compute: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Who Globus says we are."""

    kind: str  # client or person
    client_id: str
    identity: str = ""
    username: str = ""
    name: str = ""
    linked: tuple[Mapping[str, str], ...] = ()  # further identities of the same person

    def words(self) -> str:
        return f"{self.username or self.identity} ({self.identity})"


def wanted(rules: Sequence[Rule], who: Account) -> Wanted:
    """Return what rules need. A flow's collections are not known: UUIDs of its input may be some."""
    collections: dict[str, None] = {}
    flows: dict[str, tuple[str, ...]] = {}
    index = compute = False
    for rule in rules:
        options = rule.options
        if rule.action == TRANSFER:
            collections |= dict.fromkeys(str(options[key]).lower() for key in ("from", "to"))
            index = index or bool(options.get("index"))
        elif rule.action == FLOW:
            of_flow = dict.fromkeys([*flows.get(options["flow"], ()), *_uuids(options.get("input"))])
            if options.get("from") is not None:
                of_flow[str(options["from"]).lower()] = None
                collections[str(options["from"]).lower()] = None  # `globus check` looks at what it shows
            if who.manifests is not None:
                of_flow[who.manifests[1]] = None
                collections[who.manifests[1]] = None
            flows[options["flow"]] = tuple(of_flow)
        elif rule.action == COMPUTE:
            compute = True
    return Wanted(tuple(collections), flows, index, compute)


def _uuids(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _uuids(item)
    elif isinstance(value, str) and is_uuid(value):
        yield value.lower()


# --------------------------------------------------------------------------- the files


@contextlib.contextmanager
def as_owner(state_dir: Path) -> Iterator[None]:
    """Act as the owner of the state directory: root reads and leaves there what the daemon can read."""
    try:
        there = state_dir.stat()
    except FileNotFoundError:
        yield
        return
    if os.geteuid() != 0 or there.st_uid == 0:
        yield
        return
    import pwd

    groups, group = os.getgroups(), os.getegid()
    try:
        os.initgroups(pwd.getpwuid(there.st_uid).pw_name, there.st_gid)
    except KeyError:
        os.setgroups([there.st_gid])
    os.setegid(there.st_gid)
    os.seteuid(there.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def known_account(settings: Mapping[str, Any], state_dir: Path) -> Account:
    """Return the account of the settings. Raises Trouble if its secret or tokens cannot be read."""
    if not settings.get("client_id"):
        hint = "register a client at app.globus.org/settings/developers, and set `globus: client_id` in the settings"
        raise _person("no Globus client is set", hint)
    try:
        who = account(settings, str(state_dir))
    except PermissionError as error:
        raise _person(f"the client's secret cannot be read: {error}", AS_DAEMON) from None
    except (OSError, ValueError) as error:
        hint = "mend that file, or `globus: client_secret_file` in the settings"
        raise _person(f"no secret for Globus: {error}", hint) from None
    if not who.client_secret and os.path.exists(who.tokens) and not os.access(who.tokens, os.R_OK, effective_ids=True):
        raise _person(f"{who.tokens} cannot be read", AS_DAEMON)
    return who


def _person(why: str, hint: str) -> Trouble:
    return Trouble(Fault("person", why, hint, Scope.CREDENTIAL), False)


def _may_write(state_dir: Path) -> None:
    """Raise Trouble if tokens that are left there would not be the daemon's."""
    try:
        owner = state_dir.stat().st_uid
    except OSError as error:
        hint = "start the daemon once, which makes it, or make it for the daemon's user"
        raise _person(f"the state directory {state_dir} cannot be used: {error.strerror}", hint) from None
    if owner != os.geteuid() or not os.access(state_dir, os.W_OK | os.X_OK, effective_ids=True):
        import pwd

        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"the user {owner}"
        hint = f"run `sudo -u {name} trigger-daemon globus login`"
        raise _person(f"{state_dir} belongs to {name}, and so must the tokens in it", hint)


# -------------------------------------------------------------------------------- login


def login(who: Account, want: Wanted, tell: Callable[[str], None]) -> Identity:
    """Let a person log in, or repeat a client's grant; return who it is. Raises Trouble.

    `tell` is told what a person must know. The SDK prints the address on standard output, and reads the code from
    standard input.
    """
    if who.client_secret:
        service = Service(who)
        try:
            service.ask("log in", lambda globus: _grant(globus, want))
            return identity(service)
        finally:
            service.close()
    _may_write(Path(who.tokens).parent)
    apart = replace(who, tokens=f"{who.tokens}.login")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(apart.tokens)
    try:
        try:
            _log_in(who, apart, want, tell)
        except Exception as error:
            raise _broken_off(error) from error
        os.replace(apart.tokens, who.tokens)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(apart.tokens)
    service = Service(who)
    try:
        return identity(service)
    finally:
        service.close()


def _log_in(who: Account, apart: Account, want: Wanted, tell: Callable[[str], None]) -> None:
    """Log in once; and once more if it turns out only then which collections want a consent of their own."""
    mapped: frozenset[str] = frozenset()
    known = False
    with contextlib.suppress(Trouble):
        if os.path.exists(who.tokens):
            mapped, known = _mapped(Clients(who), want), True
    clients = Clients(apart)
    _build(clients, want, mapped)
    clients.app.login(force=True)
    if known:
        return
    mapped = _mapped(clients, want)
    if mapped:
        named = ", ".join(sorted(mapped))
        tell(f"these collections want a consent of their own, for which you log in once more: {named}")
        _build(clients, want, mapped)
        clients.app.login(force=True)


def _broken_off(error: Exception) -> Trouble:
    from globus_sdk.login_flows import CommandLineLoginFlowEOFError

    if isinstance(error, CommandLineLoginFlowEOFError):
        return _person("no code was given", "run it in a terminal, open the address that it shows, and paste the code")
    trouble = judge(error, "log in")
    if trouble.code == "invalid_grant":
        return _person("Globus does not take this code", "it is good once, and for ten minutes: log in again")
    return trouble


def _grant(globus: Clients, want: Wanted) -> None:
    _build(globus, want, frozenset())
    globus.app.login(force=True)
    if mapped := _mapped(globus, want):
        _build(globus, want, mapped)
        globus.app.login(force=True)


def _build(globus: Clients, want: Wanted, mapped: frozenset[str]) -> None:
    """Make the clients that the daemon will make: each adds its scopes to what the app asks for."""
    ours = sorted(mapped & set(want.collections))
    transfer, timers, _ = globus.transfer, globus.timers, auth(globus)
    if ours:
        transfer.add_app_data_access_scope(ours)
        timers.add_app_transfer_data_access_scope(ours)
    _ = globus.flows
    if want.index:
        _ = globus.search
    if want.compute:
        _ = globus.compute
    for flow, collections in (want.flows or {}).items():
        starter = globus.flow(flow)
        if of_flow := sorted(mapped & set(collections)):
            starter.add_app_transfer_data_access_scope(of_flow)


def _mapped(globus: Clients, want: Wanted) -> frozenset[str]:
    """Return which collections want data_access: asked for any other, it breaks the login. Raises Trouble."""
    import globus_sdk

    found = set()
    asked = dict.fromkeys([*want.collections, *(one for many in (want.flows or {}).values() for one in many)])
    for collection in list(asked)[:COLLECTIONS_MAX]:
        try:
            document = globus.transfer.get_endpoint(collection).data
        except globus_sdk.TransferAPIError as error:
            if error.http_status in (403, 404):
                continue  # another thing of a flow's input; or a wrong id, which `globus check` tells
            raise judge(error, f"look at collection {collection}") from error
        except Exception as error:
            raise judge(error, f"look at collection {collection}") from error
        if wants_consent(document):
            found.add(collection)
    return frozenset(found)


def wants_consent(document: Mapping[str, Any]) -> bool:
    return document.get("entity_type") == MAPPED and not document.get("high_assurance")


# --------------------------------------------------------------------------- who, logout


def auth(globus: Clients) -> Any:
    """Return the client that says who we are."""
    import globus_sdk
    from globus_sdk.scopes import AuthScopes

    return globus._make("auth", globus_sdk.AuthClient, app_scopes=[AuthScopes.openid, AuthScopes.profile])


def identity(service: Service) -> Identity:
    """Ask Globus who we are. Raises Trouble."""
    if not service.account.client_secret and not os.path.exists(service.account.tokens):
        raise _person("nobody is logged in at Globus", LOGIN)
    told = service.ask("ask who we are", lambda globus: dict(auth(globus).userinfo().data))
    who = service.account
    mine, of_client = str(told.get("sub") or ""), f"{who.client_id}@clients.auth.globus.org"
    username = told.get("preferred_username") or (of_client if who.client_secret else "")
    return Identity(
        "client" if who.client_secret else "person", who.client_id, mine, str(username), str(told.get("name") or ""),
        tuple(
            {"identity": str(one.get("sub")), "username": str(one.get("username"))}
            for one in told.get("identity_set") or () if one.get("sub") != mine
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoggedOut:
    removed: bool
    revoked: int = 0
    failed: str = ""  # why not all could be revoked


def logout(who: Account) -> LoggedOut:
    """Remove a person's tokens; revoke them where Globus can be reached, so that copies are worthless, too."""
    import globus_sdk
    from globus_sdk.transport import RetryConfig

    from trigger_daemon.globus.tokens import TokenFile
    from trigger_daemon.globus.transport import Transport

    kept = TokenFile(who.tokens)
    if not os.path.exists(who.tokens):
        return LoggedOut(removed=False)
    _may_write(Path(who.tokens).parent)
    try:
        tokens = [
            token for data in kept.get_token_data_by_resource_server().values()
            for token in (data.refresh_token, data.access_token) if token
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError):  # of another version, or damaged: it is removed all the same
        tokens = []
    client = globus_sdk.NativeAppAuthClient(
        who.client_id, retry_config=RetryConfig(max_retries=0), transport=Transport("auth")
    )
    revoked, failed = 0, ""
    for token in tokens:
        try:
            client.oauth2_revoke_token(token)
        except Exception as error:  # noqa: BLE001  the SDK raises what it likes, and the file must go
            failed = judge(error, "revoke the tokens").fault.why
            break  # each of the others would wait as long
        revoked += 1
    return LoggedOut(kept.remove(), revoked, failed)
