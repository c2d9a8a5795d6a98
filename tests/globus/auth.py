"""Globus Auth: clients, users, tokens and consents.

A token is good for one resource server. Consents are kept per client and identity,
because that is what a later request for data access is judged by.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from typing import Any

from .answer import Answer, Caller, Refusal, Request, Route, is_uuid, route
from .state import Document, Store, iso, new_id

TRANSFER = "transfer.api.globus.org"
FLOWS = "flows.globus.org"
SEARCH = "search.api.globus.org"
GROUPS = "groups.api.globus.org"
TIMERS = "524230d7-ea86-4a52-8312-86065a9e0417"
COMPUTE = "funcx_service"
AUTH = "auth.globus.org"

_RENAMED = {"eec9b274-0c81-4334-bdc2-54e90e689b9a": FLOWS, "facd7ccc-c5f4-42aa-916b-a0e270e2c2a9": COMPUTE}
_URN = re.compile(r"urn:globus:auth:scope:([^:]+):.+")
_URL = re.compile(r"https://auth\.globus\.org/scopes/([^/]+)/.+")
_DATA_ACCESS = re.compile(r"https://auth\.globus\.org/scopes/([0-9a-f-]{36})/data_access")
_SCOPE_DEPTH_MAX = 10  # nobody nests deeper; a text of brackets must not exhaust the stack


def resource_server(scope: str) -> str:
    """Return the service that a scope belongs to; bare words such as `openid` belong to Auth."""
    if match := _URN.fullmatch(scope):
        return match[1]
    if match := _URL.fullmatch(scope):
        return _RENAMED.get(match[1], match[1])
    return AUTH


def scope_paths(text: str) -> list[tuple[str, ...]]:
    """Return every path from a top scope down, `a[*b c]` being (a), (a, b), (a, c). Raises ValueError."""
    paths: list[tuple[str, ...]] = []
    stack: list[str] = []
    last = ""
    for token in re.findall(r"\[|\]|[^\s\[\]]+", text):
        if token == "[":
            if not last or len(stack) >= _SCOPE_DEPTH_MAX:
                raise ValueError(f"bracket without a scope: {text!r}")
            stack.append(last)
            last = ""
        elif token == "]":
            if not stack:
                raise ValueError(f"bracket never opened: {text!r}")
            last = stack.pop()
        else:
            last = token.removeprefix("*")
            paths.append((*stack, last))
    if stack:
        raise ValueError(f"bracket never closed: {text!r}")
    return paths


# ---------------------------------------------------------------- identities


def add_client(store: Store, client_id: str, secret: str | None, name: str = "") -> None:
    """Register a client; without a secret it is a native app. It is also an identity of its own."""
    digest = hashlib.sha256(secret.encode()).hexdigest() if secret is not None else None
    store.put("client", client_id, {"id": client_id, "secret_sha256": digest, "name": name})
    add_identity(store, f"{client_id}@clients.auth.globus.org", identity=client_id, name=name)


def add_identity(store: Store, username: str, *, identity: str | None = None, name: str = "") -> str:
    identity = identity or new_id()
    client = username.endswith("@clients.auth.globus.org")
    document = {
        "id": identity, "username": username, "email": None if client else username, "name": name or None,
        "organization": None, "status": "used", "identity_provider": AUTH, "identity_type": "login",
    }  # fmt: skip
    store.put("identity", identity, document)
    return identity


def username(store: Store, identity: str) -> str:
    document = store.get("identity", identity)
    return document["username"] if document else identity


# -------------------------------------------------------------------- tokens


def caller(store: Store, headers: dict[str, str], servers: tuple[str, ...]) -> Caller | None:
    """Return who holds the bearer token, or None if it is missing, expired, or of another service."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    token = store.get("token", value.strip()) if kind.lower() == "bearer" else None
    if token is None or token["use"] != "access" or token["expires"] <= store.now():
        return None
    if servers and token["resource_server"] not in servers:
        return None
    return Caller(token["identity"], token["client"], tuple(token["scope"].split()))


def expire_tokens(store: Store, *, refresh: bool = False) -> int:
    """Make every access token worthless at once; with `refresh` the refresh tokens are revoked too."""
    count = 0
    for token in store.all("token"):
        if token["use"] == "access" or refresh:
            store.remove("token", token["value"])
            count += 1
    return count


def has_consent(store: Store, who: Caller, collection: str) -> bool:
    scope = f"https://auth.globus.org/scopes/{collection}/data_access"
    return any(
        consent["scope_name"] == scope and consent["client"] == who.client
        for consent in store.all("consent", who.identity)
    )


def revoke_consent(store: Store, collection: str) -> None:
    scope = f"https://auth.globus.org/scopes/{collection}/data_access"
    for consent in store.all("consent"):
        if consent["scope_name"] == scope:
            store.remove("consent", consent["key"])


def _record_consents(store: Store, client: str, identity: str, paths: list[tuple[str, ...]]) -> None:
    known = {consent["key"]: consent["id"] for consent in store.all("consent", identity)}
    for path in paths:
        key = json.dumps([client, identity, path])
        if key in known:
            continue
        above = [known[json.dumps([client, identity, path[:end]])] for end in range(1, len(path))]
        number = store.meta("consents", 1000) + 1
        store.set_meta("consents", number)
        known[key] = number
        document = {
            "key": key, "id": number, "scope_name": path[-1], "scope": new_id(), "client": client,
            "effective_identity": identity, "dependency_path": [*above, number], "status": "approved",
            "created": store.stamp(), "updated": store.stamp(), "last_used": store.stamp(),
            "allows_refresh": True, "atomically_revocable": False, "auto_approved": False,
        }  # fmt: skip
        store.put("consent", key, document, identity)


def _check_scopes(store: Store, paths: list[tuple[str, ...]]) -> None:
    """Data access exists only on collections that ask for it; a request for another one breaks the login."""
    for path in paths:
        if match := _DATA_ACCESS.fullmatch(path[-1]):
            collection = store.get("collection", match[1])
            if collection is None or not needs_data_access(collection):
                raise Refusal(400, {"error": "unknown_scope", "error_description": f"Unknown Scope: {path[-1]}"})


def needs_data_access(collection: Document) -> bool:
    document = collection["document"]
    mapped = document["entity_type"] == "GCSv5_mapped_collection" and not document["high_assurance"]
    return bool(mapped or collection.get("consent"))


def _grant(store: Store, client: str, identity: str, scope: str, *, refresh: bool) -> Document:
    """Make one access token per resource server that the scopes name; the first is the top document."""
    try:
        paths = scope_paths(scope)
    except ValueError as error:
        raise Refusal(400, {"error": "invalid_scope", "error_description": str(error)}) from None
    if not paths:
        raise Refusal(400, {"error": "invalid_scope"})
    _check_scopes(store, paths)
    _record_consents(store, client, identity, paths)
    servers: dict[str, list[str]] = {}
    for path in paths:
        if len(path) == 1:
            scopes = servers.setdefault(resource_server(path[0]), [])
            if path[0] not in scopes:
                scopes.append(path[0])
    documents = [
        _tokens(store, client, identity, server, " ".join(scopes), refresh=refresh)
        for server, scopes in servers.items()
    ]
    return documents[0] | {"other_tokens": documents[1:]}


def _tokens(store: Store, client: str, identity: str, server: str, scope: str, *, refresh: bool) -> Document:
    lifetime_s = store.setting("token_lifetime_s")
    document = {
        "access_token": _token(store, client, identity, server, scope, "access", store.now() + lifetime_s),
        "scope": scope, "expires_in": lifetime_s, "token_type": "Bearer", "resource_server": server,
    }  # fmt: skip
    if refresh:
        document["refresh_token"] = _token(store, client, identity, server, scope, "refresh", float("1e12"))
    return document


def _token(store: Store, client: str, identity: str, server: str, scope: str, use: str, expires: float) -> str:
    value = secrets.token_urlsafe(24)
    document = {
        "value": value, "client": client, "identity": identity, "resource_server": server, "scope": scope,
        "use": use, "expires": expires,
    }  # fmt: skip
    store.put("token", value, document, identity)
    return value


# -------------------------------------------------------------------- routes


def _client_of(request: Request) -> Document:
    """Return the client that the request names, its secret checked. Native apps have none to check."""
    form = request.body if isinstance(request.body, dict) else {}
    client_id, secret = form.get("client_id", ""), form.get("client_secret")
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            client_id, _, secret = base64.b64decode(value).decode().partition(":")
        except ValueError:
            raise Refusal(401, {"error": "invalid_client"}) from None
    client = request.store.get("client", client_id)
    if client is None:
        raise Refusal(401, {"error": "invalid_client"})
    if client["secret_sha256"] is not None:
        digest = hashlib.sha256((secret or "").encode()).hexdigest()
        if not hmac.compare_digest(digest, client["secret_sha256"]):
            raise Refusal(401, {"error": "invalid_client"})
    return client


def _token_route(request: Request) -> Answer:
    store, form = request.store, request.body if isinstance(request.body, dict) else {}
    client = _client_of(request)
    match form.get("grant_type"):
        case "client_credentials":
            if client["secret_sha256"] is None:
                raise Refusal(401, {"error": "unauthorized_client"})
            return 200, _grant(store, client["id"], client["id"], form.get("scope", ""), refresh=False)
        case "refresh_token":
            token = store.get("token", form.get("refresh_token", ""))
            if token is None or token["use"] != "refresh" or token["client"] != client["id"]:
                raise Refusal(400, {"error": "invalid_grant"})
            server, scope = token["resource_server"], token["scope"]
            document = _tokens(store, client["id"], token["identity"], server, scope, refresh=False)
            return 200, document | {"refresh_token": token["value"], "other_tokens": []}
        case "authorization_code":
            return 200, _exchange(request, client, form)
        case _:
            raise Refusal(400, {"error": "unsupported_grant_type"})


def _exchange(request: Request, client: Document, form: dict[str, str]) -> Document:
    """Trade a code from the control plane for tokens; the scopes are those of the page that was shown."""
    store = request.store
    code = store.get("code", form.get("code", ""))
    if code is None or not store.remove("code", code["value"]):
        raise Refusal(401, {"error": "invalid_grant"})
    document = _grant(store, client["id"], code["identity"], code["scope"], refresh=True)
    scopes = {path[0] for path in scope_paths(code["scope"])}
    document["state"] = form.get("state", "_default")
    if "openid" in scopes:
        document["id_token"] = _id_token(store, request.base_url, client["id"], code["identity"])
    return document


def _authorize(request: Request) -> Answer:
    """Stand in for the login page: whoever the control plane named last logs in and reads the code off it."""
    store = request.store
    identity = store.meta("login_as", None)
    if identity is None or store.get("client", request.one("client_id")) is None:
        raise Refusal(403, {"error": "login_required"})
    code = secrets.token_urlsafe(16)
    store.put("code", code, {"value": code, "identity": identity, "scope": request.one("scope")}, identity)
    return 200, {"code": code, "state": request.one("state")}


def _identities(request: Request) -> Answer:
    _authenticated(request)
    wanted_ids = {key for text in request.query.get("ids", []) for key in text.split(",")}
    wanted_names = {name for text in request.query.get("usernames", []) for name in text.split(",")}
    found = [
        document for document in request.store.all("identity")
        if document["id"] in wanted_ids or document["username"] in wanted_names
    ]  # fmt: skip
    return 200, {"identities": found}


def _authenticated(request: Request) -> str:
    """Return the identity; a confidential client may also come with its id and secret."""
    if request.headers.get("authorization", "").lower().startswith("basic "):
        return str(_client_of(request)["id"])
    who = caller(request.store, request.headers, (AUTH,))
    if who is None:
        error = {"status": "401", "id": new_id(), "code": "UNAUTHORIZED", "title": "Unauthorized",
                 "detail": "Call must be authenticated"}  # fmt: skip
        raise Refusal(401, {"errors": [error], "error": "unauthorized", "error_description": "Unauthorized"})
    return who.identity


def _userinfo(request: Request) -> Answer:
    identity = request.store.get("identity", _authenticated(request))
    if identity is None:
        raise Refusal(403, {"error": "forbidden"})
    short = {"sub": identity["id"], "username": identity["username"], "name": identity["name"],
             "email": identity["email"], "identity_provider": identity["identity_provider"]}  # fmt: skip
    return 200, {
        "sub": identity["id"], "preferred_username": identity["username"], "name": identity["name"],
        "email": identity["email"], "identity_provider": identity["identity_provider"],
        "last_authentication": int(request.store.now()), "identity_set": [short],
    }  # fmt: skip


def _consents(request: Request) -> Answer:
    identity = request.parts["identity"]
    if _authenticated(request) != identity:
        raise Refusal(403, {"error": "forbidden"})
    consents = request.store.all("consent", identity)
    return 200, {"consents": [{key: value for key, value in one.items() if key != "key"} for one in consents]}


def _revoke(request: Request) -> Answer:
    _client_of(request)
    removed = request.store.remove("token", (request.body or {}).get("token", ""))
    return 200, {"active": not removed}


def _validate(request: Request) -> Answer:
    _client_of(request)
    token = request.store.get("token", (request.body or {}).get("token", ""))
    return 200, {"active": token is not None and token["expires"] > request.store.now()}


# ----------------------------------------------------------------- id tokens
# A user login is bound to an identity by a signed token that the SDK verifies, so
# the emulator signs for real. The key is made when first needed and stays in the state.


def _key(store: Store) -> tuple[int, int, int]:
    """Return modulus, public and private exponent of the signing key."""
    kept = store.meta("rsa", None)
    if kept is None:
        from cryptography.hazmat.primitives.asymmetric import rsa  # slow to import, and seldom needed

        made = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_numbers()
        kept = [str(made.public_numbers.n), str(made.public_numbers.e), str(made.d)]
        store.set_meta("rsa", kept)
    return int(kept[0]), int(kept[1]), int(kept[2])


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return _b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _id_token(store: Store, issuer: str, client: str, identity: str) -> str:
    modulus, _, private = _key(store)
    now = int(store.now())
    claims = {
        "iss": issuer, "sub": identity, "aud": client, "iat": now, "exp": now + store.setting("token_lifetime_s"),
        "preferred_username": username(store, identity), "at_hash": "",
    }  # fmt: skip
    head = {"alg": "RS256", "typ": "JWT", "kid": "emulator"}
    text = ".".join(_b64(json.dumps(part).encode()) for part in (head, claims))
    # PKCS #1 v1.5: the DER prefix names SHA-256, the digest stands at the end, ones fill the rest.
    prefix = bytes.fromhex("3031300d060960864801650304020105000420")
    tail = b"\0" + prefix + hashlib.sha256(text.encode()).digest()
    length = (modulus.bit_length() + 7) // 8
    block = b"\0\1" + b"\xff" * (length - 2 - len(tail)) + tail
    signature = pow(int.from_bytes(block, "big"), private, modulus).to_bytes(length, "big")
    return f"{text}.{_b64(signature)}"


def _openid_configuration(request: Request) -> Answer:
    base = request.base_url
    return 200, {
        "issuer": base, "authorization_endpoint": f"{base}/v2/oauth2/authorize",
        "token_endpoint": f"{base}/v2/oauth2/token", "userinfo_endpoint": f"{base}/v2/oauth2/userinfo",
        "revocation_endpoint": f"{base}/v2/oauth2/token/revoke", "jwks_uri": f"{base}/jwk.json",
        "id_token_signing_alg_values_supported": ["RS256"],
    }  # fmt: skip


def _jwk(request: Request) -> Answer:
    modulus, public, _ = _key(request.store)
    key = {"alg": "RS256", "kty": "RSA", "use": "sig", "kid": "emulator", "n": _number(modulus), "e": _number(public)}
    return 200, {"keys": [key]}


def code_for(store: Store, identity: str, scope: str) -> str:
    """Give out an authorization code as if the person had just agreed to these scopes."""
    if not is_uuid(identity) or store.get("identity", identity) is None:
        raise Refusal(404, {"error": f"no identity {identity}"})
    code = secrets.token_urlsafe(16)
    store.put("code", code, {"value": code, "identity": identity, "scope": scope, "time": iso(store.now())}, identity)
    return code


def routes() -> list[Route]:
    table: list[tuple[str, str, Any]] = [
        ("POST", "/v2/oauth2/token", _token_route),
        ("GET", "/v2/oauth2/authorize", _authorize),
        ("GET", "/v2/oauth2/userinfo", _userinfo),
        ("POST", "/v2/oauth2/token/revoke", _revoke),
        ("POST", "/v2/oauth2/token/validate", _validate),
        ("GET", "/v2/api/identities", _identities),
        ("GET", "/v2/api/identities/{identity}/consents", _consents),
        ("GET", "/.well-known/openid-configuration", _openid_configuration),
        ("GET", "/jwk.json", _jwk),
    ]
    return [route("auth", method, path, handler) for method, path, handler in table]
