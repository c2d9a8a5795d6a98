"""Globus Groups: who belongs to which group, which is what access rules and entries refer to."""

from __future__ import annotations

from typing import Any

from . import auth
from .answer import Answer, Refusal, Request, Route, route
from .state import Document, Store, new_id

_WRITE = {"urn:globus:auth:scope:groups.api.globus.org:all"}


def make(store: Store, name: str, members: dict[str, str], group_id: str | None = None) -> Document:
    """Make a group; `members` maps identities to roles."""
    group = {"id": group_id or new_id(), "name": name, "members": members}
    store.put("group", group["id"], group)
    return group


def _public(store: Store, group: Document, who: str) -> Document:
    mine = [_membership(store, group, who)] if who in group["members"] else []
    return {
        "id": group["id"], "name": group["name"], "description": "", "parent_id": None, "group_type": "regular",
        "enforce_session": False, "session_limit": 28800, "session_timeouts": {}, "my_memberships": mine,
        "policies": {"group_visibility": "private", "group_members_visibility": "managers", "is_high_assurance": False,
                     "join_requests": False, "signup_fields": []},
        "subscription_id": None, "subscription_info": None,
    }  # fmt: skip


def _membership(store: Store, group: Document, identity: str) -> Document:
    return {"group_id": group["id"], "identity_id": identity, "username": auth.username(store, identity),
            "role": group["members"][identity], "status": "active"}  # fmt: skip


def _refuse(status: int, code: str, detail: str) -> Refusal:
    return Refusal(status, {"errors": [{"status": str(status), "code": code, "title": code, "detail": detail}]})


def _group(request: Request) -> Document:
    group = request.store.get("group", request.parts["group"])
    if group is None:
        raise _refuse(404, "NOT_FOUND", "There is no such group")
    return group


def _my_groups(request: Request) -> Answer:
    who = request.caller.identity
    return 200, [_public(request.store, one, who) for one in request.store.all("group") if who in one["members"]]


def _get(request: Request) -> Answer:
    group, who = _group(request), request.caller.identity
    document = _public(request.store, group, who)
    if "memberships" in request.one("include"):
        document["memberships"] = [_membership(request.store, group, one) for one in group["members"]]
    return 200, document


def _writes(request: Request) -> str:
    if not _WRITE & set(request.caller.scopes):
        raise _refuse(403, "FORBIDDEN", "the token does not have the scope to change groups")
    return request.caller.identity


def _create(request: Request) -> Answer:
    who = _writes(request)
    group = make(request.store, request.body.get("name", ""), {who: "admin"})
    return 201, _public(request.store, group, who)


def _change_members(request: Request) -> Answer:
    """Do a batch of membership actions; only adding, removing and changing the role change anything here."""
    who, group = _writes(request), _group(request)
    if group["members"].get(who) not in ("admin", "manager"):
        raise _refuse(403, "FORBIDDEN", "only managers change the members of a group")
    done: Document = {}
    for action, rows in request.body.items():
        done[action] = [_act(request.store, group, action, row) for row in rows]
    request.store.put("group", group["id"], group)
    return 200, done


def _act(store: Store, group: Document, action: str, row: Document) -> Document:
    identity = row["identity_id"]
    match action:
        case "add" | "change_role":
            group["members"][identity] = row.get("role", "member")
            return _membership(store, group, identity)
        case "remove":
            role = group["members"].pop(identity, "member")
            return {"group_id": group["id"], "identity_id": identity, "role": role, "status": "removed",
                    "username": auth.username(store, identity)}  # fmt: skip
    raise _refuse(400, "BAD_REQUEST", f"the emulator does not know the action {action!r}")


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("GET", "/v2/groups/my_groups", _my_groups),
        ("POST", "/v2/groups", _create),
        ("GET", "/v2/groups/{group}", _get),
        ("POST", "/v2/groups/{group}", _change_members),
    ]
    return [route("groups", method, path, handler) for method, path, handler in table]
