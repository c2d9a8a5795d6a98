"""Collections: a directory on this machine that the service shows under a UUID, with owners, rules and moods.

Also what a client does to one directly: the endpoint document, access rules, listing,
and the operations on single paths. A collection without an owner is everybody's.
"""

from __future__ import annotations

import fnmatch
import grp
import os
import posixpath
import pwd
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import auth
from .answer import Answer, Caller, Refusal, Request, is_uuid
from .state import Document, Store, iso, new_id

_ENTITY_TYPES = {
    "GCSv5_guest_collection", "GCSv5_mapped_collection", "GCSv5_endpoint", "GCP_mapped_collection",
    "GCP_guest_collection", "GCSv4_host", "GCSv4_share",
}  # fmt: skip
_LISTING_MAX = 100_000


class PathFault(Exception):
    """Something about one path, by the code that an event or a skipped error carries."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


def make(store: Store, collection_id: str, directory: str, fields: Document) -> Document:
    """Register a collection, or replace it. `fields` are parts of the public document, and `owner`."""
    fields = dict(fields)
    owner = fields.pop("owner", None)
    entity_type = fields.pop("entity_type", "GCSv5_guest_collection")
    if entity_type not in _ENTITY_TYPES:
        raise ValueError(f"no entity type {entity_type!r}")
    personal = entity_type.startswith("GCP")
    owner_id = owner or new_id()
    guest = entity_type.endswith("guest_collection")
    document = {
        "DATA_TYPE": "endpoint", "id": collection_id, "display_name": fields.pop("display_name", collection_id),
        "entity_type": entity_type, "owner_id": owner_id, "owner_string": auth.username(store, owner_id),
        "organization": "Site", "department": None, "contact_email": None, "contact_info": None, "info_link": None,
        "keywords": None, "description": None, "username": f"u_{owner_id[:8]}", "canonical_name": None, "name": None,
        "public": False, "high_assurance": False, "force_encryption": False, "force_verify": False,
        "disable_verify": False, "disable_anonymous_writes": False, "mfa_required": False,
        "default_directory": "/", "non_functional": False, "non_functional_endpoint_display_name": None,
        "non_functional_endpoint_id": None, "is_globus_connect": personal, "globus_connect_setup_key": None,
        "gcp_connected": True if personal else None, "gcp_paused": False if personal else None,
        "gcs_version": None if personal else "5.4.71", "gcs_manager_url": None, "tlsftp_server": None,
        "subscription_id": None, "subscription_admin_verified": None, "host_endpoint_id": None,
        "host_endpoint_display_name": None, "host_path": None, "https_server": None,
        "mapped_collection_id": new_id() if guest else None, "mapped_collection_display_name": None,
        "user_message": None, "user_message_link": None, "myproxy_server": None, "myproxy_dn": None,
        "oauth_server": None, "s3_url": None, "s3_owner_activated": False, "french_english_bilingual": False,
        "activated": False, "expires_in": -1, "expire_time": None, "in_use": False, "shareable": not guest,
        "acl_available": guest, "acl_editable": guest, "acl_max_expiration_period_mins": None,
        "authentication_timeout_mins": None, "max_concurrency": 4, "preferred_concurrency": 2, "max_parallelism": 8,
        "preferred_parallelism": 4, "network_use": "normal", "location": None, "force_consent": False,
        "associated_flow_policy": None, "last_accessed_time": None, "activity_notifications": None,
    } | fields  # fmt: skip
    kept = store.get("collection", collection_id) or {}
    lasting = ("down", "quota_bytes", "denied", "consent", "pause_rules", "keeps_times")
    moods = {key: kept[key] for key in lasting if key in kept}
    collection = {
        "id": collection_id, "directory": str(Path(directory).resolve()), "owner": owner, "document": document,
        "down": None, "quota_bytes": None, "denied": [], "consent": False, "pause_rules": [],
        "corrupt": 0, "lies": 0, "keeps_times": True,
    } | moods  # fmt: skip
    store.put("collection", collection_id, collection)
    return collection


def find(store: Store, key: Any) -> Document | None:
    return store.get("collection", key.lower()) if isinstance(key, str) else None


def public(collection: Document, who: str) -> Document:
    document = dict(collection["document"])
    owner = collection["owner"] in (None, who)
    if collection["down"] and document["gcp_connected"] is not None:
        document["gcp_connected"] = False
    role = "access_manager" if document["acl_available"] else "administrator"
    document["my_effective_roles"] = ["administrator", role] if owner and role != "administrator" else (
        ["administrator"] if owner else []
    )  # fmt: skip
    document["DATA"] = []
    return document


# --------------------------------------------------------------- permissions


def _principals(store: Store, who: str) -> set[tuple[str, str]]:
    groups = {("group", group["id"]) for group in store.all("group") if who in group["members"]}
    return {("identity", who), ("all_authenticated_users", ""), ("anonymous", ""), *groups}


def may(store: Store, collection: Document, who: str, path: str | None, need: str) -> bool:
    """Tell whether someone may read (`r`) or write (`rw`) a path; without a path, anything in the collection."""
    if collection["owner"] in (None, who):
        return True
    principals = _principals(store, who)
    for rule in store.all("access", collection["id"]):
        principal = rule["principal"] if rule["principal_type"] in ("identity", "group") else ""
        if (rule["principal_type"], principal) not in principals or (need == "rw" and rule["permissions"] != "rw"):
            continue
        if path is None or (path.rstrip("/") + "/").startswith(rule["path"]):
            return True
    return False


def local(collection: Document, path: str) -> Path:
    """Return where a collection path lies on this machine; it can never lie outside of the collection."""
    if path.startswith(("/~/", "~/")) or path in ("~", "/~", "~/"):
        path = collection["document"]["default_directory"] + "/" + path.split("~", 1)[1]
    return Path(collection["directory"]) / posixpath.normpath("/" + path).lstrip("/")


def check(store: Store, collection: Document, who: str, path: str, need: str) -> Path:
    """Return the local path, or raise the fault that moving or looking at it would meet."""
    if collection["down"]:
        raise PathFault(collection["down"], f"collection {collection['document']['display_name']} does not answer")
    denied = any(path == one or path.startswith(one.rstrip("/") + "/") for one in collection["denied"])
    if denied or not may(store, collection, who, path, need):
        raise PathFault("PERMISSION_DENIED", f"Path: {path}")
    return local(collection, path)


def code_of(error: OSError) -> str:
    """Return the event code for what the disk said."""
    match error:
        case FileNotFoundError():
            return "FILE_NOT_FOUND"
        case PermissionError():
            return "PERMISSION_DENIED"
        case IsADirectoryError():
            return "IS_A_DIRECTORY"
        case NotADirectoryError():
            return "NOT_A_DIRECTORY"
        case FileExistsError():
            return "FILE_ACCESS"
    return "NO_SPACE_LEFT" if error.errno == 28 else "ENDPOINT_ERROR"


def usage_bytes(collection: Document) -> int:
    total = 0
    for folder, _, names in os.walk(collection["directory"]):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


# -------------------------------------------------------------------- routes


def refuse(request: Request, status: int, code: str, message: str, **more: Any) -> Refusal:
    """Make a refusal as Transfer words it."""
    body = {"code": code, "message": message, "request_id": new_id()[:9], "resource": request.path}
    return Refusal(status, body | more)


def of(request: Request, key: str = "collection") -> Document:
    """Return the collection that a path names, if the caller may know of it."""
    found = find(request.store, request.parts[key])
    if found is None:
        raise refuse(request, 404, "EndpointNotFound", f"No such endpoint '{request.parts[key]}'")
    return found


def result(request: Request, code: str, message: str, kind: str = "result", **more: Any) -> Document:
    return {
        "DATA_TYPE": kind, "code": code, "message": message, "request_id": new_id()[:9], "resource": request.path,
    } | more  # fmt: skip


def get_endpoint(request: Request) -> Answer:
    return 200, public(of(request), request.caller.identity)


def update_endpoint(request: Request) -> Answer:
    collection = _managed(request)
    changes = {key: value for key, value in request.body.items() if key in collection["document"] and key != "id"}
    collection["document"] |= changes
    request.store.put("collection", collection["id"], collection)
    return 200, result(request, "Updated", "Endpoint updated successfully")


def endpoint_search(request: Request) -> Answer:
    text = request.one("filter_fulltext").lower()
    found = [
        public(one, request.caller.identity) for one in request.store.all("collection")
        if text in one["document"]["display_name"].lower() or text == one["id"]
    ]  # fmt: skip
    offset, limit = request.number("offset", 0), request.number("limit", 25)
    page = found[offset : offset + limit]
    return 200, {"DATA_TYPE": "endpoint_list", "DATA": page, "offset": offset, "limit": limit,
                 "has_next_page": offset + limit < len(found)}  # fmt: skip


def pause_rules(request: Request) -> Answer:
    return 200, {"DATA_TYPE": "pause_rule_limited_list", "DATA": of(request)["pause_rules"]}


def _managed(request: Request) -> Document:
    collection = of(request)
    if collection["owner"] not in (None, request.caller.identity):
        raise refuse(request, 403, "PermissionDenied", "This needs the role of an administrator or access manager")
    return collection


def access_list(request: Request) -> Answer:
    collection = _managed(request)
    rules = request.store.all("access", collection["id"])
    return 200, {"DATA_TYPE": "access_list", "endpoint": collection["id"], "length": len(rules), "DATA": rules}


def check_rule(rule: Document) -> str | None:
    """Return what is wrong with an access rule, or None."""
    kind = rule.get("principal_type")
    if kind not in ("identity", "group", "all_authenticated_users", "anonymous"):
        return f"Invalid principal_type '{kind}'"
    if kind in ("identity", "group") and not is_uuid(rule.get("principal")):
        return "principal must be a UUID"
    path = rule.get("path")
    if not isinstance(path, str) or not path.startswith("/") or not path.endswith("/"):
        return "path must start and end with '/'"
    if rule.get("permissions") not in ("r", "rw"):
        return "permissions must be 'r' or 'rw'"
    return None


def add_rule(store: Store, collection: Document, body: Document) -> tuple[Document, bool]:
    """Add a rule unless an equal one stands; return it and whether it is new."""
    key = ("principal_type", "principal", "path")
    for rule in store.all("access", collection["id"]):
        if all(rule[name] == body.get(name, "") for name in key):
            return rule, False
    rule = {
        "DATA_TYPE": "access", "id": new_id(), "principal_type": body["principal_type"],
        "principal": body.get("principal", ""), "path": body["path"], "permissions": body["permissions"],
        "role_id": None, "role_type": None, "create_time": store.stamp(),
        "expiration_date": body.get("expiration_date"),
    }  # fmt: skip
    store.put("access", rule["id"], rule, collection["id"])
    return rule, True


def access_create(request: Request) -> Answer:
    collection = _managed(request)
    if not collection["document"]["acl_available"]:
        raise refuse(request, 409, "NotSupported", "Access rules exist on guest collections only")
    if wrong := check_rule(request.body):
        raise refuse(request, 400, "BadRequest", wrong)
    rule, new = add_rule(request.store, collection, request.body)
    if not new and request.store.setting("access_repeat") == "conflict":
        raise refuse(request, 409, "Exists", "This principal already has an access rule on this path")
    done = result(request, "Created", "Access rule created successfully.", "access_create_result", access_id=rule["id"])
    return 201, done


def _rule(request: Request) -> tuple[Document, Document]:
    collection = _managed(request)
    rule = request.store.get("access", request.parts["rule"])
    if rule is None:
        raise refuse(request, 404, "AccessRuleNotFound", f"No such access rule '{request.parts['rule']}'")
    return collection, rule


def access_get(request: Request) -> Answer:
    return 200, _rule(request)[1]


def access_update(request: Request) -> Answer:
    _, rule = _rule(request)
    changed = rule | {key: request.body[key] for key in ("permissions", "expiration_date") if key in request.body}
    if wrong := check_rule(changed):
        raise refuse(request, 400, "BadRequest", wrong)
    request.store.put("access", rule["id"], changed)
    return 200, result(request, "Updated", "Access rule updated successfully.")


def access_delete(request: Request) -> Answer:
    _, rule = _rule(request)
    request.store.remove("access", rule["id"])
    return 200, result(request, "Deleted", "Access rule deleted successfully.")


# ---------------------------------------------------- operations on one path


def _operation(request: Request, path: str, need: str, act: str) -> Path:
    collection = of(request)
    require_consent(request.store, request.caller, [collection], request)
    try:
        return check(request.store, collection, request.caller.identity, path, need)
    except PathFault as fault:
        raise _path_refusal(request, fault, act) from None


def _path_refusal(request: Request, fault: PathFault, act: str) -> Refusal:
    match fault.code:
        case "PERMISSION_DENIED":
            return refuse(request, 403, "EndpointPermissionDenied", f"Denied by endpoint, Error ({act})")
        case "FILE_NOT_FOUND":
            code = "ClientError.NotFound" if act == "list" else "NotFound"
            return refuse(request, 404, code, f"Path not found, Error ({act})\n{fault.details}")
        case "GC_NOT_CONNECTED":
            return refuse(request, 502, "ExternalError.DirListingFailed.GCDisconnected", fault.details)
    return refuse(request, 502, "ExternalError.DirListingFailed." + fault.code.title().replace("_", ""), fault.details)


def require_consent(store: Store, who: Caller, collections: list[Document], request: Request) -> None:
    lacking = [
        one["id"] for one in collections
        if auth.needs_data_access(one) and not auth.has_consent(store, who, one["id"])
    ]  # fmt: skip
    if lacking:
        dependencies = " ".join(f"*https://auth.globus.org/scopes/{one}/data_access" for one in lacking)
        scope = f"urn:globus:auth:scope:transfer.api.globus.org:all[{dependencies}]"
        raise refuse(
            request, 403, "ConsentRequired", "Missing required data_access consent", required_scopes=[scope]
        )  # fmt: skip


def file_document(path: Path, name: str) -> Document:
    """Return the facts of one path as a listing gives them. Raises OSError."""
    facts = path.lstat()
    link = stat.S_ISLNK(facts.st_mode)
    target = os.readlink(path) if link else None
    if link and path.exists():
        facts = path.stat()
    kind = "dir" if stat.S_ISDIR(facts.st_mode) else "file" if stat.S_ISREG(facts.st_mode) else "invalid_symlink"
    try:
        user = pwd.getpwuid(facts.st_uid).pw_name
        group = grp.getgrgid(facts.st_gid).gr_name
    except KeyError:
        user, group = str(facts.st_uid), str(facts.st_gid)
    return {
        "DATA_TYPE": "file", "name": name, "type": kind, "size": facts.st_size, "user": user, "group": group,
        "permissions": f"{stat.S_IMODE(facts.st_mode):04o}",
        "last_modified": iso(int(facts.st_mtime)).replace("T", " "),
        "link_target": target, "link_size": None, "link_user": None, "link_group": None, "link_last_modified": None,
    }  # fmt: skip


_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
}  # fmt: skip


def _listed(document: Document, text: str) -> bool:
    """Judge one entry by a filter such as `name:~*.tif/type:file`."""
    for clause in filter(None, text.split("/")):
        key, _, values = clause.partition(":")
        value = str(document.get(key, ""))
        if not any(matches(value, one) for one in values.split(",")):
            return False
    return True


def matches(value: str, pattern: str) -> bool:
    """Judge one value: `=` exact, `~` wildcard without case, `!` and `!~` the opposites; bare is exact."""
    for sign, compare in _NUMBERS.items():
        if pattern.startswith(sign) and value.isdigit() and pattern[len(sign) :].isdigit():
            return compare(int(value), int(pattern[len(sign) :]))
    if pattern.startswith("!"):
        return not matches(value, pattern[1:])
    if pattern.startswith("~"):
        return fnmatch.fnmatchcase(value.lower(), pattern[1:].lower().replace("[", "[[]"))
    return value == pattern.removeprefix("=")


def ls(request: Request) -> Answer:
    collection = of(request)
    path = request.one("path") or collection["document"]["default_directory"]
    folder = _operation(request, path, "r", "list")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _path_refusal(request, PathFault(code_of(error), path), "list") from None
    entries = []
    for name in names[:_LISTING_MAX]:
        if name.startswith(".") and request.one("show_hidden", "1") in ("0", "false", "False"):
            continue
        try:
            entries.append(file_document(folder / name, name))
        except OSError:
            continue  # gone since it was listed
    filters = request.query.get("filter", [])
    entries = [entry for entry in entries if all(_listed(entry, text) for text in filters)]
    offset, limit = request.number("offset", 0), request.number("limit", 100_000)
    page = entries[offset : offset + limit]
    absolute = path if path.endswith("/") else path + "/"
    return 200, {
        "DATA_TYPE": "file_list", "endpoint": collection["id"], "path": absolute, "absolute_path": absolute,
        "rename_supported": True, "symlink_supported": False, "length": len(page), "offset": offset, "limit": limit,
        "total": len(entries), "has_next_page": offset + limit < len(entries), "DATA": page,
    }  # fmt: skip


def stat_path(request: Request) -> Answer:
    path = request.one("path")
    try:
        found = _operation(request, path, "r", "stat")
        return 200, file_document(found, posixpath.basename(path.rstrip("/")) or "/")
    except OSError as error:
        raise _path_refusal(request, PathFault(code_of(error), path), "stat") from None


def mkdir(request: Request) -> Answer:
    path = request.body.get("path", "")
    folder = _operation(request, path, "rw", "mkdir")
    try:
        folder.mkdir()
    except FileExistsError:
        raise refuse(request, 502, "ExternalError.MkdirFailed.Exists", f"Path already exists: {path}") from None
    except OSError as error:
        raise _path_refusal(request, PathFault(code_of(error), path), "mkdir") from None
    return 200, result(request, "DirectoryCreated", "The directory was created successfully", "mkdir_result")


def rename(request: Request) -> Answer:
    old, new = (_operation(request, request.body.get(key, ""), "rw", "rename") for key in ("old_path", "new_path"))
    if new.exists():
        raise refuse(request, 502, "ExternalError.RenameFailed.Exists", f"Path already exists: {new.name}")
    try:
        old.rename(new)
    except OSError as error:
        raise _path_refusal(request, PathFault(code_of(error), request.body.get("old_path", "")), "rename") from None
    return 200, result(request, "FileRenamed", "File or directory renamed successfully")


def remove_path(path: Path, *, recursive: bool) -> None:
    """Delete a file, or a directory if told to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        if not recursive:
            raise IsADirectoryError(21, "is a directory", str(path))
        shutil.rmtree(path)
    else:
        path.unlink()
