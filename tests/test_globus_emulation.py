"""The emulated Globus keeps its word: driven by the SDK and the CLI as they are published, never by itself.

What the real service does was never observed; these tests hold the emulator to what
is documented, so that the daemon's tests stand on something that does not move.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from globus import expressions, schema
from globus.auth import scope_paths
from globus.definition import problems
from globus.emulator import ControlError, Emulator, named

globus_sdk = pytest.importorskip("globus_sdk")

from globus_sdk.gare import to_gare  # noqa: E402
from globus_sdk.globus_app import ClientApp, GlobusAppConfig, UserApp  # noqa: E402
from globus_sdk.login_flows import LoginFlowManager  # noqa: E402
from globus_sdk.scopes import GroupsScopes, SearchScopes  # noqa: E402
from globus_sdk.transport import RetryConfig  # noqa: E402

CLIENT = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f"
NATIVE = "9b2f7c14-3e5d-4a7c-8b1e-6d4f2a0c9e7b"
SECRET = "not-a-secret"
HELLO = "https://actions.globus.org/hello_world"
TRANSFER = "https://transfer.actions.globus.org/"

Look = Callable[[], Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(tmp_path_factory.mktemp("globus"), python_path=Path(__file__).parent) as globus:
        yield globus


class Site:
    """One emulated site: a microscope, an archive, and the clients of an unattended daemon."""

    def __init__(self, globus: Emulator, directory: Path) -> None:
        self.globus = globus
        self.krios_dir, self.archive_dir = directory / "krios", directory / "archive"
        globus.client(CLIENT, SECRET)
        self.krios = globus.collection("Krios", self.krios_dir)
        self.archive = globus.collection("Archive", self.archive_dir)
        self.app = self.app_of(CLIENT)
        self.transfer = globus_sdk.TransferClient(app=self.app, retry_config=_once())
        self.flows = globus_sdk.FlowsClient(app=self.app, retry_config=_once())

    def app_of(self, client_id: str, secret: str = SECRET) -> Any:
        login = globus_sdk.ConfidentialAppAuthClient(client_id, secret, retry_config=_once())
        return ClientApp("trigger-daemon", login_client=login, config=GlobusAppConfig(token_storage="memory"))

    def write(self, name: str, data: bytes = b"frames") -> bytes:
        path = self.krios_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data

    def document(self, *pairs: tuple[str, str], **fields: Any) -> dict[str, Any]:
        items = [{"source_path": source, "destination_path": destination} for source, destination in pairs]
        if "submission_id" not in fields:
            fields["submission_id"] = self.transfer.get_submission_id()["value"]
        return {
            "DATA_TYPE": "transfer", "source_endpoint": self.krios, "destination_endpoint": self.archive,
            "verify_checksum": True, "notify_on_succeeded": False, "DATA": items,
        } | fields  # fmt: skip

    def submit(self, *names: str, **fields: Any) -> str:
        pairs = [(f"/{name}", f"/visit/{name}") for name in names]
        return str(self.transfer.submit_transfer(self.document(*pairs, **fields))["task_id"])

    def ended(self, task_id: str) -> Any:
        return self.until(
            lambda: self.transfer.get_task(task_id), lambda task: task["status"] in ("SUCCEEDED", "FAILED")
        )

    def faulty(self, task_id: str, code: str) -> Any:
        return self.until(lambda: self.transfer.get_task(task_id), lambda task: task["nice_status"] == code)

    def until(self, look: Look, judge: Callable[[Any], bool]) -> Any:
        def once() -> Any:
            found = look()
            return found if judge(found) else None

        return self.globus.wait(once)

    def delivered(self, name: str) -> bytes:
        return (self.archive_dir / "visit" / name).read_bytes()

    def codes(self, task_id: str) -> list[str]:
        return [event["code"] for event in self.transfer.task_event_list(task_id, limit=1000)]

    def starter(self, flow_id: str, app: Any = None) -> Any:
        return globus_sdk.SpecificFlowClient(flow_id, app=app or self.app, retry_config=_once())

    def run(self, states: dict[str, Any], body: Any = None, start: str | None = None, **options: Any) -> str:
        flow_id = self.globus.flow({"StartAt": start or next(iter(states)), "States": states})
        return str(self.starter(flow_id).run_flow(body or {}, **options)["run_id"])

    def run_ended(self, run_id: str) -> Any:
        return self.until(
            lambda: self.flows.get_run(run_id), lambda run: run["status"] in ("SUCCEEDED", "FAILED", "ENDED")
        )


def _once() -> Any:
    return RetryConfig(max_retries=0)


@pytest.fixture
def site(service: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    service.reset()
    for name, value in service.environment().items():
        monkeypatch.setenv(name, value)
    return Site(service, tmp_path)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A service of the test's own, which it may kill."""
    with Emulator(tmp_path / "globus") as globus:
        for name, value in globus.environment().items():
            monkeypatch.setenv(name, value)
        yield Site(globus, tmp_path)


def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(globus_sdk.GlobusAPIError) as caught:
        call()
    return caught.value


# ---------------------------------------------------------------------- auth


def test_a_wrong_secret_is_an_invalid_client(site):
    """The operator must be told to fix the secret: 401 with `invalid_client`."""
    client = globus_sdk.TransferClient(app=site.app_of(CLIENT, "wrong"), retry_config=_once())

    error = refused(client.task_list)

    assert (error.http_status, error.raw_json) == (401, {"error": "invalid_client"})


def test_a_token_is_good_for_its_own_service_only(site):
    """A token of Search opens no door at Transfer."""
    site.app.add_scope_requirements({"search.api.globus.org": [SearchScopes.search]})
    header = site.app.get_authorizer("search.api.globus.org").get_authorization_header()

    status, body = raw(site, "GET", "/v0.10/task_list", {"Authorization": header})

    assert (status, body["code"]) == (401, "AuthenticationFailed")


def test_expired_tokens_are_refused_once_and_then_replaced(site):
    """Without retries the SDK drops the token on a 401, and its next call fetches a new one."""
    site.transfer.task_list()
    assert site.globus.expire_tokens() > 0

    error = refused(site.transfer.task_list)
    assert (error.http_status, error.code) == (401, "AuthenticationFailed")
    assert site.transfer.task_list()["DATA"] == []


def test_an_access_token_lives_as_long_as_it_says(site):
    """The clock of the service ends a token without anybody revoking it."""
    site.globus.settings(token_lifetime_s=3600)
    site.transfer.task_list()
    site.globus.clock(advance_s=3601)

    assert refused(site.transfer.task_list).http_status == 401


class CodeFromThePage(LoginFlowManager):
    """The person at the login page: agrees to everything and types the code."""

    def __init__(self, login_client: Any, globus: Emulator, person: str) -> None:
        super().__init__(login_client, request_refresh_tokens=True)
        self._globus = globus
        self._person = person

    def run_login_flow(self, auth_parameters: Any) -> Any:
        scopes = " ".join(auth_parameters.required_scopes)
        self.login_client.oauth2_start_flow(
            redirect_uri="http://127.0.0.1/done", requested_scopes=scopes, refresh_tokens=True
        )
        return self.login_client.oauth2_exchange_code_for_tokens(self._globus.code(self._person, scopes))


def person_app(site: Site) -> Any:
    site.globus.client(NATIVE, None)
    person = site.globus.identity("ada@example.org")
    login = globus_sdk.NativeAppAuthClient(NATIVE, retry_config=_once())
    config = GlobusAppConfig(
        token_storage="memory", request_refresh_tokens=True, token_validation_error_handler=None,
        login_flow_manager=CodeFromThePage(login, site.globus, person),
    )  # fmt: skip
    return UserApp("trigger-daemon", login_client=login, config=config)


def test_a_person_logs_in_and_is_refreshed_until_revoked(site):
    """The identity in the signed token is the person's; a revoked refresh token is `invalid_grant`."""
    app = person_app(site)
    client = globus_sdk.TransferClient(app=app, retry_config=_once())
    app.login(force=True)
    assert client.task_list()["DATA"] == []

    site.globus.expire_tokens()
    refused(client.task_list)
    assert client.task_list()["DATA"] == []

    site.globus.expire_tokens(refresh=True)
    refused(client.task_list)
    error = refused(client.task_list)

    assert (error.http_status, error.raw_json) == (400, {"error": "invalid_grant"})


def test_a_code_is_good_once(site):
    """An authorization code that was traded is worth nothing."""
    site.globus.client(NATIVE, None)
    person = site.globus.identity("ada@example.org")
    login = globus_sdk.NativeAppAuthClient(NATIVE, retry_config=_once())
    login.oauth2_start_flow(redirect_uri="http://127.0.0.1/done", requested_scopes=["openid"])
    code = site.globus.code(person, "openid email")
    tokens = login.oauth2_exchange_code_for_tokens(code)

    assert tokens.decode_id_token()["sub"] == person
    assert refused(lambda: login.oauth2_exchange_code_for_tokens(code)).raw_json == {"error": "invalid_grant"}


def test_identities_and_userinfo_name_the_service_account(site):
    """A client is the identity `<client>@clients.auth.globus.org`."""
    auth = globus_sdk.AuthClient(app=site.app, retry_config=_once())
    found = auth.get_identities(ids=CLIENT)["identities"]

    assert [one["username"] for one in found] == [f"{CLIENT}@clients.auth.globus.org"]
    assert auth.userinfo()["sub"] == CLIENT


def test_a_mapped_collection_asks_for_consent_and_then_takes_the_transfer(site):
    """A 403 that the SDK reads as a GARE; a new login with its scopes is all that is needed."""
    mapped = site.globus.collection("Storage", site.archive_dir, entity_type="GCSv5_mapped_collection")
    site.write("a.tif")
    document = site.document(("/a.tif", "/a.tif"), destination_endpoint=mapped)
    error = refused(lambda: site.transfer.submit_transfer(document))
    gare = to_gare(error)
    assert (error.http_status, error.code, gare.code) == (403, "ConsentRequired", "ConsentRequired")

    site.app.login(auth_params=gare.authorization_parameters)

    assert site.transfer.submit_transfer(document)["code"] == "Accepted"


def test_a_consent_can_lapse(site):
    """A collection that begins to ask refuses listings too, until there is a consent."""
    site.globus.require_consent("Krios")
    error = refused(lambda: site.transfer.operation_ls(site.krios))
    assert error.code == "ConsentRequired"

    site.transfer.add_app_data_access_scope(site.krios)
    site.app.login(force=True)

    assert list(site.transfer.operation_ls(site.krios)) == []


def test_data_access_where_nobody_asks_for_it_breaks_the_login(site):
    """A guest collection has no such scope."""
    site.transfer.add_app_data_access_scope(site.krios)

    error = refused(lambda: site.app.login(force=True))

    assert (error.http_status, error.raw_json["error"]) == (400, "unknown_scope")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", [("a",), ("b",)]),
        ("a[*b c[d]] e", [("a",), ("a", "b"), ("a", "c"), ("a", "c", "d"), ("e",)]),
        ("", []),
    ],
)
def test_scopes_are_read_with_their_dependencies(text, expected):
    """Brackets hold dependencies; an asterisk changes nothing here."""
    assert scope_paths(text) == expected


@pytest.mark.parametrize("text", ["a[b", "a]b", "[a]", "a[" * 50])
def test_broken_scopes_are_refused(text):
    """Brackets must pair."""
    with pytest.raises(ValueError, match="bracket"):
        scope_paths(text)


# ---------------------------------------------------------------- submission


def test_bytes_arrive_with_a_checksum(site):
    """A task that succeeded has moved the bytes, and says which and with what digest."""
    data = {name: site.write(name, os.urandom(3000)) for name in ("a.tif", "b.tif")}
    task_id = site.submit(*data, label="epu 0042 td-mfrggzdfmztwq2lk")
    task = site.ended(task_id)
    listed = list(site.transfer.paginated.task_successful_transfers(task_id).items())

    assert task["status"] == "SUCCEEDED"
    assert (task["files"], task["files_transferred"], task["bytes_transferred"]) == (2, 2, 6000)
    assert (task["subtasks_total"], task["subtasks_succeeded"], task["faults"]) == (4, 4, 0)
    assert {name: site.delivered(name) for name in data} == data
    assert [(one["source_path"], one["destination_path"], one["size"]) for one in listed] == [
        ("/a.tif", "/visit/a.tif", 3000), ("/b.tif", "/visit/b.tif", 3000),
    ]  # fmt: skip
    assert listed[0]["checksum"] == hashlib.md5(data["a.tif"]).hexdigest()
    assert site.codes(task_id) == ["SUCCEEDED", "STARTED"]


def test_the_same_submission_id_makes_one_task(site):
    """However often a document is sent, there is one task; the later answers say Duplicate."""
    site.write("a.tif")
    document = site.document(("/a.tif", "/a.tif"))
    first = site.transfer.submit_transfer(document)
    again = [site.transfer.submit_transfer(document) for _ in range(3)]

    assert first["code"] == "Accepted"
    assert {one["code"] for one in again} == {"Duplicate"}
    assert {one["task_id"] for one in again} == {first["task_id"]}
    assert {one.http_status for one in again} == {200}
    assert len(site.globus.tasks()) == 1


def test_duplicates_are_one_task_also_when_they_come_at_once(site):
    """Two daemons with one journal, or a retry that overtakes: still one task."""
    site.write("a.tif")
    document = site.document(("/a.tif", "/a.tif"))
    header = {"Authorization": site.app.get_authorizer("transfer.api.globus.org").get_authorization_header()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: raw(site, "POST", "/v0.10/transfer", header, document), range(8)))

    assert sorted(body["code"] for _, body in answers) == ["Accepted", *["Duplicate"] * 7]
    assert len(site.globus.tasks()) == 1


def test_submission_ids_are_those_that_the_service_gave(site):
    """An id of one's own is refused, unless the service is told to take any."""
    site.write("a.tif")
    document = site.document(("/a.tif", "/a.tif"), submission_id=str(uuid.uuid4()))
    assert refused(lambda: site.transfer.submit_transfer(document)).http_status == 400

    site.globus.settings(submission_ids="any")

    assert site.transfer.submit_transfer(document)["code"] == "Accepted"
    assert site.transfer.submit_transfer(document)["code"] == "Duplicate"


def test_a_forgotten_submission_id_is_refused(site):
    """Should the service forget ids, an old document is not silently submitted anew."""
    site.globus.settings(submission_id_memory_s=3600, token_lifetime_s=10**6)
    site.write("a.tif")
    document = site.document(("/a.tif", "/a.tif"))
    site.ended(site.transfer.submit_transfer(document)["task_id"])
    site.globus.clock(advance_s=4000)

    assert refused(lambda: site.transfer.submit_transfer(document)).http_status == 400


def test_equal_paths_conflict_until_the_first_task_ends(site):
    """409 while another task moves the same file to the same place; afterwards the same document is fine."""
    site.write("a.tif")
    site.write("b.tif")
    site.globus.speed(task_seconds=60)
    first = site.submit("a.tif")
    document = site.document(("/a.tif", "/visit/a.tif"), ("/b.tif", "/visit/b.tif"))
    error = refused(lambda: site.transfer.submit_transfer(document))
    assert (error.http_status, error.code) == (409, "Conflict")

    site.globus.settings(conflict="all")
    other = site.document(("/a.tif", "/visit/a.tif"), ("/b.tif", "/visit/b.tif"))
    assert site.transfer.submit_transfer(other)["code"] == "Accepted"
    site.transfer.cancel_task(first)
    site.transfer.cancel_task(site.globus.tasks()[-1]["task_id"])
    site.globus.settings(conflict="any")

    assert site.transfer.submit_transfer(document)["code"] == "Accepted"


def test_three_tasks_run_and_the_others_queue(site):
    """The fourth waits with `Queued` and begins when one of the three ends; another user has three of their own."""
    site.globus.speed(task_seconds=60)
    names = [f"{number}.tif" for number in range(5)]
    for name in names:
        site.write(name)
    ids = [site.submit(name) for name in names]
    site.until(lambda: [one["nice_status"] for one in site.globus.tasks()], lambda seen: seen[:3] == ["OK"] * 3)
    assert [one["nice_status"] for one in site.globus.tasks()[3:]] == ["Queued", "Queued"]
    assert not (site.archive_dir / "visit/3.tif").exists()

    site.transfer.cancel_task(ids[0])
    site.until(lambda: site.transfer.get_task(ids[3]), lambda task: task["nice_status"] == "OK")
    assert site.transfer.get_task(ids[4])["nice_status"] == "Queued"

    site.globus.speed(task_seconds=0)
    assert site.ended(ids[4])["status"] == "SUCCEEDED"


def test_too_many_pending_tasks_are_refused(site):
    """The limit is per user, and a task that ends makes room."""
    site.globus.settings(pending_max=2)
    site.globus.speed(task_seconds=60)
    first = site.submit("a.tif")
    site.submit("b.tif")
    document = site.document(("/c.tif", "/c.tif"))
    assert refused(lambda: site.transfer.submit_transfer(document)).http_status == 409

    site.transfer.cancel_task(first)

    assert site.transfer.submit_transfer(document)["code"] == "Accepted"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"DATA": []}, 400, "ClientError.BadRequest.NoTransferItems"),
        ({"DATA": [{"source_path": "a.tif", "destination_path": "/a.tif"}]}, 400, "BadRequest"),
        ({"DATA": [{"source_path": "/a.tif"}]}, 400, "BadRequest"),
        ({"DATA": [{"source_path": "/a", "destination_path": "/a", "colour": "blue"}]}, 400, "BadRequest"),
        ({"DATA": [{"source_path": "/a", "destination_path": "/a", "checksum_algorithm": "CRC"}]}, 400, "BadRequest"),
        ({"DATA": [{"source_path": "/a", "destination_path": "/a", "recursive": True, "external_checksum": "00"}]},
         400, "BadRequest"),
        ({"source_endpoint": "krios"}, 400, "BadRequest"),
        ({"destination_endpoint": str(uuid.uuid4())}, 404, "EndpointNotFound"),
        ({"label": "x" * 129}, 400, "BadRequest"),
        ({"label": "two\nlines"}, 400, "BadRequest"),
        ({"label": " blank"}, 400, "BadRequest"),
        ({"deadline": "tomorrow"}, 400, "BadRequest"),
        ({"sync_level": 4}, 400, "BadRequest"),
        ({"sync_level": "checksum"}, 400, "BadRequest"),
        ({"verify_checksum": "yes"}, 400, "BadRequest"),
        ({"submission_id": "1"}, 400, "BadRequest"),
        ({"DATA_TYPE": "delete"}, 400, "BadRequest"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_and_makes_no_task(site, change, status, code):
    """The code says what to do; nothing is kept, and the submission id stays good."""
    document = site.document(("/a.tif", "/a.tif"))

    error = refused(lambda: site.transfer.submit_transfer(document | change))

    assert (error.http_status, error.code) == (status, code)
    assert error.request_id
    assert site.globus.tasks() == []
    assert site.transfer.submit_transfer(document)["code"] == "Accepted"


def test_a_label_may_be_as_long_as_the_limit(site):
    """128 characters are fine."""
    assert site.submit("a.tif", label="x" * 128)


def test_without_a_rule_nobody_but_the_owner_transfers(site):
    """403 until a rule opens the collection; a rule for reading does not allow writing."""
    owner = str(uuid.uuid4())
    archive = site.globus.collection("Vault", site.archive_dir, owner=owner)
    site.write("a.tif")
    document = site.document(("/a.tif", "/visit/a.tif"), destination_endpoint=archive)
    error = refused(lambda: site.transfer.submit_transfer(document))
    assert (error.http_status, error.code) == (403, "PermissionDenied")
    assert refused(lambda: site.transfer.operation_ls(archive, path="/")).code == "EndpointPermissionDenied"
    assert refused(lambda: site.transfer.endpoint_acl_list(archive)).http_status == 403

    site.globus.client(owner, "owner")
    landlord = globus_sdk.TransferClient(app=site.app_of(owner, "owner"), retry_config=_once())
    rule = {"DATA_TYPE": "access", "principal_type": "identity", "principal": CLIENT, "path": "/visit/",
            "permissions": "r"}  # fmt: skip
    access_id = landlord.add_endpoint_acl_rule(archive, rule)["access_id"]
    assert refused(lambda: site.transfer.submit_transfer(document)).http_status == 403
    landlord.update_endpoint_acl_rule(archive, access_id, {"permissions": "rw"})
    task_id = site.transfer.submit_transfer(document)["task_id"]

    assert site.ended(task_id)["status"] == "SUCCEEDED"


def test_a_rule_of_a_group_reaches_its_members(site):
    """Principals are identities, groups, everybody."""
    group = site.globus.group("Visit 42", {CLIENT: "member"})
    vault = site.globus.collection("Vault", site.archive_dir, owner=str(uuid.uuid4()))
    assert refused(lambda: site.transfer.operation_ls(vault, path="/")).http_status == 403
    site.globus.mood("Vault", owner=CLIENT)
    rule = {"DATA_TYPE": "access", "principal_type": "group", "principal": group, "path": "/", "permissions": "r"}
    site.transfer.add_endpoint_acl_rule(vault, rule)
    site.globus.mood("Vault", owner=str(uuid.uuid4()))

    assert list(site.transfer.operation_ls(vault, path="/")) == []


def test_a_path_outside_the_rule_is_a_fault_of_the_task(site):
    """What the service learns only when it moves the file does not refuse the submission."""
    vault = site.globus.collection("Vault", site.archive_dir, owner=CLIENT)
    rule = {"DATA_TYPE": "access", "principal_type": "all_authenticated_users", "principal": "", "path": "/visit/",
            "permissions": "rw"}  # fmt: skip
    site.transfer.add_endpoint_acl_rule(vault, rule)
    site.globus.mood("Vault", owner=str(uuid.uuid4()))
    site.write("a.tif")
    document = site.document(("/a.tif", "/elsewhere/a.tif"), destination_endpoint=vault)

    task = site.faulty(site.transfer.submit_transfer(document)["task_id"], "PERMISSION_DENIED")

    assert task["status"] == "ACTIVE"


def test_a_collection_that_demands_its_flow_refuses_transfers(site):
    """`associated_flow_policy` shows in the document and refuses direct submissions."""
    bound = site.globus.collection("Bound", site.archive_dir, associated_flow_policy={"flow_id": str(uuid.uuid4())})
    document = site.document(("/a.tif", "/a.tif"), destination_endpoint=bound)

    assert site.transfer.get_endpoint(bound)["associated_flow_policy"]
    assert refused(lambda: site.transfer.submit_transfer(document)).http_status == 403


# ------------------------------------------------------------- the movement


def test_a_missing_source_keeps_the_task_active_until_its_deadline(site):
    """Faults do not end a task; the deadline does, with EXPIRED."""
    site.write("a.tif")
    task_id = site.submit("a.tif", "missing.tif")
    task = site.faulty(task_id, "FILE_NOT_FOUND")
    assert (task["status"], task["is_ok"], task["subtasks_retrying"]) == ("ACTIVE", False, 1)
    assert task["faults"] > 0
    errors = list(site.transfer.task_event_list(task_id, query_params={"filter": "is_error:1"}))
    assert {one["code"] for one in errors} == {"FILE_NOT_FOUND"}

    site.globus.settings(token_lifetime_s=10**7)
    site.globus.expire_tokens()
    refused(site.transfer.task_list)
    site.globus.clock(advance_s=86_500)
    task = site.ended(task_id)

    assert (task["status"], task["fatal_error"]["code"]) == ("FAILED", "EXPIRED")
    assert task["files_transferred"] == 1
    assert task["subtasks_expired"] > 0
    assert site.codes(task_id)[0] == "EXPIRED"


def test_a_file_that_appears_later_ends_the_faults(site):
    """The service goes on trying."""
    task_id = site.submit("late.tif")
    site.faulty(task_id, "FILE_NOT_FOUND")
    site.write("late.tif", b"late")
    task = site.ended(task_id)

    assert (task["status"], site.delivered("late.tif")) == ("SUCCEEDED", b"late")
    assert task["faults"] > 0


def test_skipped_errors_count_as_success_and_are_listed(site):
    """This is why SUCCEEDED alone is no proof."""
    for number in range(3):
        site.write(f"{number}.tif")
    task_id = site.submit(*[f"{number}.tif" for number in range(6)], skip_source_errors=True)
    task = site.ended(task_id)
    skipped = list(site.transfer.paginated.task_skipped_errors(task_id, query_params={"limit": 2}).items())
    listed = list(site.transfer.paginated.task_successful_transfers(task_id, query_params={"limit": 2}).items())

    assert (task["status"], task["subtasks_skipped_errors"]) == ("SUCCEEDED", 3)
    assert [(one["source_path"], one["error_code"]) for one in skipped] == [
        (f"/{number}.tif", "FILE_NOT_FOUND") for number in range(3, 6)
    ]
    assert [one["source_path"] for one in listed] == [f"/{number}.tif" for number in range(3)]


def test_a_wrong_external_checksum_fails_the_whole_task(site):
    """The bytes are not what the submitter hashed: nothing goes on."""
    site.write("a.tif")
    item = {"source_path": "/a.tif", "destination_path": "/visit/a.tif", "external_checksum": "00" * 32,
            "checksum_algorithm": "SHA256"}  # fmt: skip
    task = site.ended(site.transfer.submit_transfer(site.document(DATA=[item]))["task_id"])

    assert (task["status"], task["fatal_error"]["code"]) == ("FAILED", "EXTERNAL_CHECKSUM_MISMATCH")
    assert not (site.archive_dir / "visit/a.tif").exists()


def test_a_right_external_checksum_is_the_one_that_is_listed(site):
    """The algorithm of the item is the one that is used."""
    digest = hashlib.sha256(site.write("a.tif")).hexdigest()
    item = {"source_path": "/a.tif", "destination_path": "/visit/a.tif", "external_checksum": digest,
            "checksum_algorithm": "SHA256"}  # fmt: skip
    task_id = site.transfer.submit_transfer(site.document(DATA=[item]))["task_id"]
    site.ended(task_id)
    (one,) = site.transfer.task_successful_transfers(task_id)

    assert (one["checksum"], one["checksum_algorithm"]) == (digest, "SHA256")


@pytest.mark.parametrize(
    ("level", "here", "there", "newer", "skipped"),
    [
        (None, b"same", b"same", False, False),
        (0, b"long text", b"other", True, True),
        (1, b"same", b"size", True, True),
        (1, b"longer", b"size", False, False),
        (2, b"same", b"size", False, True),
        (2, b"same", b"size", True, False),
        (3, b"same", b"same", True, True),
        (3, b"same", b"size", False, False),
    ],
)
def test_sync_levels_leave_out_what_need_not_move(site, level, here, there, newer, skipped):
    """0 exists, 1 size, 2 time, 3 checksum; a file that was left out counts as skipped and is not listed."""
    site.write("a.tif", here)
    target = site.archive_dir / "visit/a.tif"
    target.parent.mkdir()
    target.write_bytes(there)
    os.utime(site.krios_dir / "a.tif", (2_000_000, 2_000_000 if newer else 1_000_000))
    os.utime(target, (1_500_000, 1_500_000))
    task_id = site.submit("a.tif", sync_level=level)
    task = site.ended(task_id)

    assert (task["files_skipped"], task["files_transferred"]) == ((1, 0) if skipped else (0, 1))
    assert len(list(site.transfer.task_successful_transfers(task_id))) == (0 if skipped else 1)
    assert target.read_bytes() == (there if skipped else here)


def test_a_corrupted_copy_is_found_and_made_again(site):
    """With verification the damage is a fault and a second try; without it, it arrives."""
    data = site.write("a.tif")
    site.globus.mood("Archive", corrupt=1)
    task_id = site.submit("a.tif")
    task = site.ended(task_id)
    assert (task["status"], task["faults"], site.delivered("a.tif")) == ("SUCCEEDED", 1, data)
    assert "VERIFY_CHECKSUM" in site.codes(task_id)

    site.globus.mood("Archive", corrupt=1)
    site.write("b.tif")
    site.ended(site.submit("b.tif", verify_checksum=False))

    assert site.delivered("b.tif") != data


def test_a_service_that_lies_is_found_by_the_list(site):
    """SUCCEEDED with every counter right, but one file is neither there nor listed."""
    for number in range(3):
        site.write(f"{number}.tif")
    site.globus.mood("Archive", lies=1)
    task_id = site.submit("0.tif", "1.tif", "2.tif")
    task = site.ended(task_id)
    listed = [one["source_path"] for one in site.transfer.task_successful_transfers(task_id)]

    assert (task["status"], task["files_transferred"], task["subtasks_failed"]) == ("SUCCEEDED", 3, 0)
    assert len(listed) == 2
    assert len(list((site.archive_dir / "visit").iterdir())) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_destination_fails_or_waits_as_the_task_asked(site, at_once):
    """`fail_on_quota_errors` decides; a task that waits ends when there is room."""
    site.write("a.tif", b"x" * 1000)
    site.globus.mood("Archive", quota_bytes=500)
    task_id = site.submit("a.tif", fail_on_quota_errors=at_once)
    if at_once:
        task = site.ended(task_id)
        assert (task["status"], task["fatal_error"]["code"]) == ("FAILED", "QUOTA_EXCEEDED")
        return
    site.faulty(task_id, "QUOTA_EXCEEDED")
    site.globus.mood("Archive", quota_bytes=None)

    assert site.ended(task_id)["status"] == "SUCCEEDED"


@pytest.mark.parametrize("code", ["GC_NOT_CONNECTED", "CONNECT_FAILED"])
def test_a_collection_that_is_down_holds_tasks_and_refuses_operations(site, code):
    """The task is accepted and waits; a listing is an error of the other side, 502."""
    site.write("a.tif")
    site.globus.mood("Krios", down=code)
    task_id = site.submit("a.tif")
    site.faulty(task_id, code)
    error = refused(lambda: site.transfer.operation_ls(site.krios))
    assert (error.http_status, error.code.startswith("ExternalError.")) == (502, True)

    site.globus.mood("Krios", down=None)

    assert site.ended(task_id)["status"] == "SUCCEEDED"


def test_a_denied_path_is_a_fault(site):
    """Permission at the source, even for a service that runs as root."""
    site.write("a.tif")
    site.globus.mood("Krios", denied=["/a.tif"])

    assert site.faulty(site.submit("a.tif"), "PERMISSION_DENIED")["status"] == "ACTIVE"


def test_a_source_that_grows_during_the_copy_is_a_fault(site):
    """What arrives is one state of the file, or nothing."""
    site.write("a.tif", b"x" * 20_000)
    site.globus.speed(bytes_per_s=20_000)
    task_id = site.submit("a.tif")
    site.globus.wait(lambda: list((site.archive_dir / "visit").glob(".*.part")))
    with (site.krios_dir / "a.tif").open("ab") as file:
        file.write(b"y" * 100)
    task = site.until(lambda: site.transfer.get_task(task_id), lambda task: task["faults"] > 0)
    assert task["nice_status"] == "FILE_SIZE_CHANGED"

    site.globus.speed(bytes_per_s=0)
    site.ended(task_id)

    assert site.delivered("a.tif") == b"x" * 20_000 + b"y" * 100


def test_a_file_shows_only_when_it_is_whole_and_a_cancel_leaves_no_part(site):
    """Cancelled is FAILED with CANCELED; a second cancel says that the task is complete."""
    site.write("a.tif", b"x" * 50_000)
    site.globus.speed(bytes_per_s=10_000)
    task_id = site.submit("a.tif")
    folder = site.archive_dir / "visit"
    site.globus.wait(lambda: list(folder.glob(".*.part")))
    assert not (folder / "a.tif").exists()
    assert site.transfer.cancel_task(task_id)["code"] == "Canceled"
    task = site.transfer.get_task(task_id)

    assert (task["status"], task["fatal_error"]["code"]) == ("FAILED", "CANCELED")
    assert task["subtasks_canceled"] == 2
    assert site.codes(task_id)[0] == "CANCELED"
    assert site.transfer.cancel_task(task_id)["code"] == "TaskComplete"
    site.globus.wait(lambda: not list(folder.iterdir()))


def test_a_paused_task_rests_and_says_why(site):
    """`is_paused` with a message, and UNPAUSED afterwards."""
    site.write("a.tif")
    site.globus.speed(task_seconds=60)
    task_id = site.submit("a.tif")
    site.globus.pause_task(task_id, message="the archive is full")
    task = site.transfer.get_task(task_id)
    assert (task["status"], task["is_paused"], task["nice_status"]) == ("ACTIVE", True, "PAUSED")
    assert site.transfer.task_pause_info(task_id)["source_pause_message"] == "the archive is full"

    site.globus.speed(task_seconds=0)
    site.globus.resume_task(task_id)
    site.ended(task_id)

    assert {"PAUSED", "UNPAUSED"} <= set(site.codes(task_id))


def test_expired_credentials_make_a_task_inactive(site):
    """INACTIVE is not an end: it needs a person, and then goes on."""
    site.write("a.tif")
    site.globus.speed(task_seconds=60)
    task_id = site.submit("a.tif")
    site.globus.pause_task(task_id, reason="credentials")
    assert site.transfer.get_task(task_id)["status"] == "INACTIVE"
    assert site.codes(task_id)[0] == "NO_CREDENTIALS"

    site.globus.speed(task_seconds=0)
    site.globus.resume_task(task_id)

    assert site.ended(task_id)["status"] == "SUCCEEDED"


def test_an_administrator_cancels(site):
    """The task says that it was not its owner."""
    task_id = site.submit("missing.tif")
    site.globus.control("POST", f"task/{task_id}", {"action": "cancel_by_admin", "message": "shutdown"})
    task = site.transfer.get_task(task_id)

    assert (task["status"], task["canceled_by_admin"], task["canceled_by_admin_message"]) == (
        "FAILED", "BOTH", "shutdown",
    )  # fmt: skip


def test_a_pause_rule_holds_every_task_of_its_collection(site):
    """The rule can be seen before submitting, and a task under it rests."""
    site.write("a.tif")
    assert list(site.transfer.my_effective_pause_rule_list(site.archive)) == []
    rule = {"DATA_TYPE": "pause_rule_limited", "id": str(uuid.uuid4()), "message": "maintenance"}
    site.globus.mood("Archive", pause_rules=[rule])
    assert [one["message"] for one in site.transfer.my_effective_pause_rule_list(site.archive)] == ["maintenance"]
    task_id = site.submit("a.tif")
    site.until(lambda: site.transfer.get_task(task_id), lambda task: task["is_paused"])
    assert site.transfer.task_pause_info(task_id)["pause_rules"] == [rule]

    site.globus.mood("Archive", pause_rules=[])

    assert site.ended(task_id)["status"] == "SUCCEEDED"


def test_a_directory_is_taken_with_what_lies_below_it(site):
    """Recursive items become one file each; filter rules leave out, links are ignored."""
    for name in ("raw/a.tif", "raw/deep/b.tif", "raw/note.txt"):
        site.write(name, name.encode())
    (site.krios_dir / "raw/link.tif").symlink_to("a.tif")
    data = globus_sdk.TransferData(site.krios, site.archive, submission_id=site.transfer.get_submission_id()["value"])
    data.add_item("/raw/", "/visit/", recursive=True)
    data.add_filter_rule("*.txt", method="exclude", type="file")
    task_id = site.transfer.submit_transfer(data)["task_id"]
    task = site.ended(task_id)

    assert (task["status"], task["files"], task["directories"]) == ("SUCCEEDED", 2, 1)
    assert site.delivered("deep/b.tif") == b"raw/deep/b.tif"
    assert sorted(one["source_path"] for one in site.transfer.task_successful_transfers(task_id)) == [
        "/raw/a.tif", "/raw/deep/b.tif",
    ]  # fmt: skip
    assert not (site.archive_dir / "visit/note.txt").exists()


def test_timestamps_are_kept_when_asked_for(site):
    """`preserve_timestamp` is about the time of modification."""
    site.write("a.tif")
    os.utime(site.krios_dir / "a.tif", ns=(10**18, 10**18))
    site.ended(site.submit("a.tif", preserve_timestamp=True))

    assert (site.archive_dir / "visit/a.tif").stat().st_mtime_ns == 10**18


def test_a_collection_path_cannot_leave_the_collection(site, tmp_path):
    """Dots lead nowhere."""
    (tmp_path / "secret").write_bytes(b"secret")

    assert site.faulty(site.submit("../secret"), "FILE_NOT_FOUND")["status"] == "ACTIVE"


def test_a_delete_task_removes(site):
    """A file, a directory if recursive, and what is missing if that is to be ignored."""
    for name in ("visit/a.tif", "visit/b/c.tif"):
        path = site.archive_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    data = globus_sdk.DeleteData(
        endpoint=site.archive, recursive=True, ignore_missing=True,
        submission_id=site.transfer.get_submission_id()["value"],
    )  # fmt: skip
    for path in ("/visit/a.tif", "/visit/b", "/visit/none"):
        data.add_item(path)
    task = site.ended(site.transfer.submit_delete(data)["task_id"])

    assert (task["type"], task["status"]) == ("DELETE", "SUCCEEDED")
    assert list((site.archive_dir / "visit").iterdir()) == []


# --------------------------------------------------------------- about tasks


def test_tasks_are_found_by_label_id_status_and_time(site):
    """The filters that a daemon reconciles with; only one's own tasks are seen."""
    for name in ("a.tif", "b.tif", "c.tif"):
        site.write(name)
    ids = [site.submit(name, label=f"epu {name[0]} td-{name[0] * 4}") for name in ("a.tif", "b.tif", "c.tif")]
    for task_id in ids:
        site.ended(task_id)
    other = str(uuid.uuid4())
    site.globus.client(other, SECRET)
    stranger = globus_sdk.TransferClient(app=site.app_of(other), retry_config=_once())

    def found(**filters: Any) -> set[str]:
        return {task["task_id"] for task in site.transfer.task_list(filter=filters, limit=1000)}

    assert found(label=["~*td-BBBB*"]) == {ids[1]}
    assert found(label=["=epu a td-aaaa"]) == {ids[0]}
    assert found(label=["!~*td-b*"]) == {ids[0], ids[2]}
    assert found(task_id=ids[:2]) == set(ids[:2])
    assert found(task_id=ids, status="FAILED") == set()
    assert found(status="SUCCEEDED", type="TRANSFER") == set(ids)
    assert found(request_time=["2020-01-01", ""]) == set(ids)
    assert found(request_time=["", "2020-01-01"]) == set()
    assert refused(lambda: found(colour="blue")).http_status == 400
    assert list(stranger.task_list()) == []
    assert refused(lambda: stranger.get_task(ids[0])).http_status == 404


def test_task_lists_come_in_pages(site):
    """Offset and limit, newest first; the SDK's paginator, which asks for a thousand at a time, gets all of them."""
    site.globus.speed(task_seconds=60)
    ids = [site.submit(f"{number}.tif") for number in range(5)]
    pages = [site.transfer.task_list(limit=2, offset=offset) for offset in (0, 2, 4)]

    assert [(page["length"], page["total"]) for page in pages] == [(2, 5), (2, 5), (1, 5)]
    assert [task["task_id"] for page in pages for task in page] == ids[::-1]
    assert [task["task_id"] for task in site.transfer.paginated.task_list().items()] == ids[::-1]
    narrow = site.transfer.task_list(query_params={"fields": "task_id,status"})["DATA"][0]
    assert narrow == {"task_id": ids[-1], "status": "ACTIVE"}


def test_only_label_and_deadline_of_a_task_change(site):
    """Anything else is refused."""
    task_id = site.submit("missing.tif")
    site.transfer.update_task(task_id, {"label": "new", "deadline": "2099-01-01T00:00:00+00:00"})
    task = site.transfer.get_task(task_id)

    assert (task["label"], task["deadline"]) == ("new", "2099-01-01T00:00:00+00:00")
    assert refused(lambda: site.transfer.update_task(task_id, {"status": "SUCCEEDED"})).http_status == 400


def test_the_service_forgets_the_files_after_a_month(site):
    """`history_deleted` is set and the list is empty: proof must be taken in time."""
    site.write("a.tif")
    task_id = site.submit("a.tif")
    site.ended(task_id)
    site.globus.clock(advance_s=31 * 86_400)
    refused(site.transfer.task_list)  # the token has expired as well

    assert site.transfer.get_task(task_id)["history_deleted"] is True
    assert list(site.transfer.task_successful_transfers(task_id)) == []


def test_a_task_of_nobody_is_not_found(site):
    """404 with a code of the client's fault."""
    error = refused(lambda: site.transfer.get_task(uuid.uuid4()))

    assert (error.http_status, error.code) == (404, "ClientError.NotFound")


def test_the_list_of_a_task_that_is_not_done_is_refused(site):
    """Successful transfers are known of tasks that have succeeded."""
    task_id = site.submit("missing.tif")

    assert refused(lambda: site.transfer.task_successful_transfers(task_id)).http_status == 400


# ---------------------------------------------------- collections and sharing


def test_operations_on_single_paths(site):
    """Look, make, rename; a directory that exists already is 502 with `Exists`."""
    site.write("raw/a.tif", b"abc")
    assert [(one["name"], one["type"]) for one in site.transfer.operation_ls(site.krios)] == [("raw", "dir")]
    found = site.transfer.operation_stat(site.krios, "/raw/a.tif")
    assert (found["type"], found["size"], found["name"]) == ("file", 3, "a.tif")
    error = refused(lambda: site.transfer.operation_stat(site.krios, "/none"))
    assert (error.http_status, error.code) == (404, "NotFound")
    assert refused(lambda: site.transfer.operation_ls(site.krios, path="/none")).http_status == 404

    assert site.transfer.operation_mkdir(site.krios, "/new")["code"] == "DirectoryCreated"
    error = refused(lambda: site.transfer.operation_mkdir(site.krios, "/new"))
    assert (error.http_status, error.code) == (502, "ExternalError.MkdirFailed.Exists")
    assert site.transfer.operation_rename(site.krios, "/new", "/old")["code"] == "FileRenamed"
    assert (site.krios_dir / "old").is_dir()


def test_listings_are_filtered_and_cut(site):
    """By name without case, by type, by size; offset and limit."""
    for number in range(4):
        site.write(f"{number}.TIF", b"x" * number)
    (site.krios_dir / "dir.tif").mkdir()

    def names(**options: Any) -> list[str]:
        return [one["name"] for one in site.transfer.operation_ls(site.krios, **options)]

    assert names(filter="name:~*.tif/type:file") == ["0.TIF", "1.TIF", "2.TIF", "3.TIF"]
    assert names(filter="name:~*.tif/type:file/size:>1") == ["2.TIF", "3.TIF"]
    assert names(limit=2, offset=1) == ["1.TIF", "2.TIF"]


def test_endpoint_documents_say_what_a_collection_is(site):
    """Roles, type, and the name that people read."""
    document = site.transfer.get_endpoint(site.archive)
    unknown = refused(lambda: site.transfer.get_endpoint(uuid.uuid4()))

    assert (document["display_name"], document["entity_type"]) == ("Archive", "GCSv5_guest_collection")
    assert "access_manager" in document["my_effective_roles"]
    assert (unknown.http_status, unknown.code) == (404, "EndpointNotFound")
    assert [one["id"] for one in site.transfer.endpoint_search("archi")] == [site.archive]


def test_access_rules_live_and_repeat_as_documented(site):
    """Created, listed, changed, deleted; an equal rule is 409 `Exists`, or switchable the first one again."""
    rule = {"DATA_TYPE": "access", "principal_type": "identity", "principal": str(uuid.uuid4()), "path": "/visit/",
            "permissions": "r"}  # fmt: skip
    created = site.transfer.add_endpoint_acl_rule(site.archive, rule)
    access_id = created["access_id"]
    assert (created.http_status, created["code"]) == (201, "Created")
    assert [one["id"] for one in site.transfer.endpoint_acl_list(site.archive)] == [access_id]
    error = refused(lambda: site.transfer.add_endpoint_acl_rule(site.archive, rule))
    assert (error.http_status, error.code) == (409, "Exists")
    site.globus.settings(access_repeat="again")
    assert site.transfer.add_endpoint_acl_rule(site.archive, rule)["access_id"] == access_id

    site.transfer.update_endpoint_acl_rule(site.archive, access_id, {"permissions": "rw"})
    assert site.transfer.get_endpoint_acl_rule(site.archive, access_id)["permissions"] == "rw"
    site.transfer.delete_endpoint_acl_rule(site.archive, access_id)
    assert refused(lambda: site.transfer.get_endpoint_acl_rule(site.archive, access_id)).http_status == 404


@pytest.mark.parametrize(
    "change",
    [{"path": "/visit"}, {"path": "visit/"}, {"permissions": "w"}, {"principal": "ada"}, {"principal_type": "x"}],
)
def test_a_wrong_access_rule_is_refused(site, change):
    """A path has a slash at both ends; principals are UUIDs."""
    rule = {"DATA_TYPE": "access", "principal_type": "identity", "principal": CLIENT, "path": "/v/", "permissions": "r"}

    assert refused(lambda: site.transfer.add_endpoint_acl_rule(site.archive, rule | change)).http_status == 400


# -------------------------------------------------------------------- faults


def raw(
    site: Site, method: str, path: str, headers: dict[str, str], body: Any = None
) -> tuple[int, dict[str, Any]]:
    """Send one request without the SDK, over a connection of its own."""
    host, _, port = site.globus.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


CONNECTION, NETWORK = "GlobusConnectionError", "NetworkError"


@pytest.mark.parametrize(
    ("kind", "more", "raised", "status", "acted"),
    [
        ("refuse", {}, CONNECTION, None, False),
        ("drop_after", {}, CONNECTION, None, True),
        ("error_before", {"status": 503}, "TransferAPIError", 503, False),
        ("error_after", {"status": 500, "code": "InternalError"}, "TransferAPIError", 500, True),
        ("rate_limited", {"retry_after": 7}, "TransferAPIError", 429, False),
        ("cut", {}, NETWORK, None, True),
        ("unauthorized_once", {}, "TransferAPIError", 401, False),
        ("html", {}, "ValueError", None, False),
        ("html", {"status": 502}, "TransferAPIError", 502, False),
    ],
)
def test_every_fault_shows_as_what_it_is_and_the_same_document_heals_it(site, kind, more, raised, status, acted):
    """The log tells whether the request was carried out; sent again, the document makes one task."""
    site.write("a.tif")
    document = site.document(("/a.tif", "/visit/a.tif"))
    site.globus.fault("POST /v0.10/transfer", kind, **more)
    expected = ValueError if raised == "ValueError" else getattr(globus_sdk, raised)
    with pytest.raises(expected) as caught:
        site.transfer.submit_transfer(document)["task_id"]
    (line,) = site.globus.requests("POST /v0.10/transfer")

    assert getattr(caught.value, "http_status", None) == status
    assert (line["carried_out"], line["fault"]) == (acted, kind)
    assert len(site.globus.tasks()) == int(acted)
    if kind == "rate_limited":
        assert caught.value.headers["Retry-After"] == "7"
    answer = site.transfer.submit_transfer(document)
    assert answer["code"] == ("Duplicate" if acted else "Accepted")
    assert len(site.globus.tasks()) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_delay_is_a_read_timeout_that_may_have_acted(site, when):
    """The client gives up; the service carries the request out all the same."""
    site.transfer.transport.http_timeout = 0.2
    document = site.document(("/a.tif", "/a.tif"))
    site.globus.fault("POST /v0.10/transfer", "delay", seconds=0.6, when=when)
    with pytest.raises(globus_sdk.GlobusTimeoutError):
        site.transfer.submit_transfer(document)

    assert len(site.globus.wait(site.globus.tasks)) == 1


def test_faults_by_chance_are_the_same_for_the_same_seed(site):
    """A random run can be repeated."""

    def outcomes(seed: int) -> list[bool]:
        site.globus.clear_faults()
        site.globus.fault("GET /v0.10/task_list", "error_before", probability=0.4, seed=seed)
        good = []
        for _ in range(30):
            try:
                site.transfer.task_list()
                good.append(True)
            except globus_sdk.TransferAPIError:
                good.append(False)
        return good

    first = outcomes(1)

    assert first == outcomes(1)
    assert first != outcomes(2)
    assert 5 < first.count(False) < 20


def test_faults_count_skip_and_match(site):
    """`times` and `skip` count requests; a pattern names a method and a path with wildcards."""
    site.globus.fault("GET /v0.10/task/*", "error_before", times=2, skip=1)
    task_id = site.submit("a.tif")
    site.transfer.task_list()
    site.transfer.get_task(task_id)
    assert [refused(lambda: site.transfer.get_task(task_id)).http_status for _ in range(2)] == [503, 503]
    site.transfer.get_task(task_id)

    with pytest.raises(ControlError, match="no fault"):
        site.globus.fault("/", "earthquake")


@pytest.mark.parametrize("service_name", ["flows", "search", "auth", "timers"])
def test_errors_speak_the_language_of_the_service(site, service_name):
    """Each SDK client finds the code where it looks for it; Auth has none and says `error`."""
    run, index, timers = uuid.uuid4(), uuid.uuid4(), globus_sdk.TimersClient(app=site.app, retry_config=_once())
    search = globus_sdk.SearchClient(app=site.app, retry_config=_once())
    path, call, kind = {
        "flows": (f"/runs/{run}", lambda: site.flows.get_run(run), globus_sdk.FlowsAPIError),
        "search": (f"/v1/index/{index}", lambda: search.get_index(index), globus_sdk.SearchAPIError),
        "timers": ("/jobs", timers.list_jobs, globus_sdk.TimersAPIError),
        "auth": ("/v2/oauth2/token", site.flows.list_runs, globus_sdk.AuthAPIError),
    }[service_name]
    site.globus.fault(path, "error_before", status=502, code="BadGateway")
    error = refused(call)

    assert (type(error), error.http_status) == (kind, 502)
    assert error.raw_json.get("error") == "BadGateway" if service_name == "auth" else error.code == "BadGateway"


@pytest.mark.parametrize("body", ["{", "[]", "null", '"text"'])
def test_a_body_that_is_no_object_is_refused(site, body):
    """Whatever comes in, the answer is an answer."""
    header = {"Authorization": site.app.get_authorizer("transfer.api.globus.org").get_authorization_header()}
    host, _, port = site.globus.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("POST", "/v0.10/transfer", body, header)
    status = connection.getresponse().status
    connection.close()

    assert status == 400
    assert raw(site, "GET", "/nowhere", header)[0] == 404


def test_sdk_retries_turn_one_run_into_two(site):
    """Why the daemon sends POST /run without retries: the default sends it again after a 502 that had acted."""
    flow_id = site.globus.flow({"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}})
    site.globus.fault(f"POST /flows/{flow_id}/run", "error_after")
    eager = globus_sdk.SpecificFlowClient(flow_id, app=site.app, retry_config=RetryConfig(backoff=lambda _: 0.0))
    eager.run_flow({})

    assert len(site.globus.runs()) == 2


# ------------------------------------------------------------------ restarts


def test_a_kill_in_the_middle_of_a_task_loses_nothing(own):
    """SIGKILL: accepted tasks, tokens, faults and settings are there again, and the file arrives once."""
    data = own.write("big.tif", os.urandom(200_000))
    own.globus.speed(bytes_per_s=100_000)
    document = own.document(("/big.tif", "/visit/big.tif"))
    task_id = own.transfer.submit_transfer(document)["task_id"]
    own.globus.wait(lambda: list((own.archive_dir / "visit").glob(".*.part")))
    os.kill(own.globus.pid, signal.SIGKILL)
    own.globus.kill()
    with pytest.raises(globus_sdk.GlobusConnectionError):
        own.transfer.get_task(task_id)

    own.globus.start()
    assert own.transfer.submit_transfer(document)["code"] == "Duplicate"
    own.globus.speed(bytes_per_s=0)
    task = own.ended(task_id)

    assert (task["status"], own.delivered("big.tif")) == ("SUCCEEDED", data)
    assert own.codes(task_id).count("STARTED") == 1
    assert [path.name for path in (own.archive_dir / "visit").iterdir()] == ["big.tif"]


def test_every_answer_survives_a_kill(own):
    """Whenever the service dies, what it accepted is exactly what it knows afterwards."""
    own.globus.speed(task_seconds=600)
    own.globus.settings(pending_max=1000)
    accepted: list[str] = []
    killer = threading.Timer(0.4, lambda: os.kill(own.globus.pid, signal.SIGKILL))
    documents = [own.document((f"/{number}", f"/{number}")) for number in range(40)]
    killer.start()
    lost = None
    for document in itertools.islice(itertools.cycle(documents), 100_000):  # until it dies
        try:
            accepted.append(own.transfer.submit_transfer(document)["task_id"])
        except globus_sdk.NetworkError:
            lost = document
            break
    killer.join()
    own.globus.kill()
    own.globus.start()
    known = [task["task_id"] for task in own.globus.tasks()]

    assert lost is not None
    assert set(accepted) <= set(known)
    assert len(known) - len(set(accepted)) <= 1
    assert own.transfer.submit_transfer(lost)["code"] in ("Accepted", "Duplicate")


def test_a_kill_in_the_middle_of_a_run_begins_no_action_twice(own):
    """The run goes on with the transfer that it had begun."""
    own.write("a.tif", b"x" * 50_000)
    own.globus.speed(bytes_per_s=50_000)
    run_id = own.run({"Deliver": transfer_state(own), "Done": {"Type": "Pass", "End": True}})
    own.globus.wait(own.globus.tasks)
    own.globus.kill()
    own.globus.start()
    own.globus.speed(bytes_per_s=0)
    run = own.run_ended(run_id)

    assert run["status"] == "SUCCEEDED"
    assert len(own.globus.tasks()) == 1


def test_a_service_ends_with_the_test_that_started_it(tmp_path):
    """No process is left when standard input closes."""
    globus = Emulator(tmp_path)
    globus.start()
    process = globus._process
    process.stdin.close()

    assert process.wait(timeout=20) == 0
    process.stdin = None
    globus.kill()


def test_a_configuration_file_makes_the_inhabitants(tmp_path, monkeypatch):
    """What a test makes by hand can be written down; read again at a restart, nothing is doubled."""
    krios = named("Krios")
    config = {
        "settings": {"running_max": 1},
        "clients": [{"id": CLIENT, "secret": SECRET}],
        "collections": [{"id": krios, "directory": str(tmp_path), "display_name": "Krios"}],
        "groups": [{"id": named("Visit"), "name": "Visit", "members": {CLIENT: "member"}}],
        "indexes": [{"id": named("Visits"), "name": "Visits"}],
        "flows": [{"id": named("Deliver"), "title": "Deliver", "definition": {
            "StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}}}],
    }  # fmt: skip
    with Emulator(tmp_path / "globus", config=config) as globus:
        globus.kill()
        globus.start()
        for name, value in globus.environment().items():
            monkeypatch.setenv(name, value)
        login = globus_sdk.ConfidentialAppAuthClient(CLIENT, SECRET)
        app = ClientApp("trigger-daemon", login_client=login, config=GlobusAppConfig(token_storage="memory"))

        assert globus_sdk.TransferClient(app=app).get_endpoint(krios)["display_name"] == "Krios"
        assert [flow["title"] for flow in globus_sdk.FlowsClient(app=app).list_flows()] == ["Deliver"]
        assert globus.settings()["running_max"] == 1


# --------------------------------------------------------------------- flows


def transfer_state(site: Site, **more: Any) -> dict[str, Any]:
    parameters = {
        "source_endpoint": site.krios, "destination_endpoint": site.archive, "verify_checksum": True,
        "DATA": [{"source_path": "/a.tif", "destination_path": "/visit/a.tif"}],
    }  # fmt: skip
    state = {"Type": "Action", "ActionUrl": TRANSFER + "transfer", "WaitTime": 172_800, "Parameters": parameters,
             "ResultPath": "$.delivered", "Next": "Done"}  # fmt: skip
    return state | more


def deliver(site: Site, group: str, index: str) -> dict[str, Any]:
    """The flow that a site would use: deliver, open it to the visit's group, index it."""
    return {"StartAt": "Deliver", "States": {
        "Deliver": {
            "Type": "Action", "ActionUrl": TRANSFER + "transfer", "WaitTime": 172_800,
            "Parameters": {
                "source_endpoint.$": "$.src.collection", "destination_endpoint.$": "$.dst.collection",
                "label.=": "'deliver ' + batch.token", "verify_checksum": True, "sync_level": 3,
                "DATA": [{"source_path.$": "$.src.path", "destination_path.=": "dst.path + pathsplit(src.path)[1]"}],
            },
            "ResultPath": "$.delivered", "Next": "Share",
            "Catch": [{"ErrorEquals": ["ActionTimeout", "ActionFailedException"], "ResultPath": "$.why",
                       "Next": "NotDelivered"}],
        },
        "Share": {
            "Type": "Action", "ActionUrl": TRANSFER + "manage_permission", "ExceptionOnActionFailure": False,
            "ResultPath": "$.shared", "Next": "Index",
            "Parameters": {"operation": "CREATE", "endpoint_id.$": "$.dst.collection", "path.$": "$.dst.path",
                           "principal_type": "group", "principal": group, "permissions": "r"},
        },
        "Index": {
            "Type": "Action", "ActionUrl": "https://actions.globus.org/search/ingest", "WaitTime": 3600,
            "ResultPath": "$.indexed", "End": True,
            "Parameters": {"search_index": index, "subject.=": "'globus://' + dst.collection + dst.path",
                           "visible_to.=": f"['urn:globus:groups:id:' + '{group}']", "content.$": "$.batch"},
        },
        "NotDelivered": {"Type": "Fail", "Error": "NotDelivered", "Cause": "the transfer failed or ran out of time"},
    }}  # fmt: skip


def delivery(site: Site) -> dict[str, Any]:
    return {
        "src": {"collection": site.krios, "path": "/a.tif"}, "dst": {"collection": site.archive, "path": "/visit/"},
        "batch": {"token": "td-mfrggzdfmztwq2lk", "files": 1},
    }  # fmt: skip


def test_a_flow_delivers_shares_and_indexes(site):
    """One run, three providers, real effects of each."""
    data = site.write("a.tif")
    group, index = site.globus.group("Visit 42"), site.globus.index("Visits")
    flow_id = site.globus.flow(deliver(site, group, index), title="Deliver")
    started = site.starter(flow_id).run_flow(
        delivery(site), label="epu 0042 td-mfrggzdfmztwq2lk", tags=["td-mfrggzdfmztwq2lk"],
        activity_notification_policy={"status": []},
    )  # fmt: skip
    assert (started.http_status, started["status"]) == (201, "ACTIVE")
    run = site.run_ended(started["run_id"])
    output = run["details"]["output"]

    assert (run["status"], run["details"]["code"]) == ("SUCCEEDED", "FlowSucceeded")
    assert site.delivered("a.tif") == data
    assert output["delivered"]["details"]["label"] == "deliver td-mfrggzdfmztwq2lk"
    assert [rule["principal"] for rule in site.transfer.endpoint_acl_list(site.archive)] == [group]
    assert output["shared"]["details"]["access_id"]
    (entry,) = site.globus.entries("Visits")
    assert entry["subject"] == f"globus://{site.archive}/visit/"
    assert entry["content"] == {"token": "td-mfrggzdfmztwq2lk", "files": 1}
    entries = list(site.flows.paginated.get_run_logs(started["run_id"], limit=2).items())
    assert [one["code"] for one in entries] == [
        "FlowStarted", "ActionStarted", "ActionCompleted", "ActionStarted", "ActionCompleted", "ActionStarted",
        "ActionCompleted", "FlowSucceeded",
    ]  # fmt: skip
    assert site.flows.get_run_definition(started["run_id"])["definition"]["StartAt"] == "Deliver"


def test_a_transfer_that_cannot_end_is_given_up_and_caught(site):
    """After WaitTime the action is given up with ActionTimeout; the transfer itself goes on."""
    site.globus.settings(deadline_s=10**7)
    flow_id = site.globus.flow(deliver(site, named("Visit"), site.globus.index()))
    run_id = site.starter(flow_id).run_flow(delivery(site))["run_id"]
    site.globus.wait(site.globus.tasks)
    site.globus.clock(advance_s=172_801)
    run = site.run_ended(run_id)

    assert (run["status"], run["details"]["error"]) == ("FAILED", "NotDelivered")
    assert site.globus.runs()[0]["_data"]["why"]["Error"] == "ActionTimeout"
    assert site.globus.tasks()[0]["status"] == "ACTIVE"


def test_a_bounded_loop_waits_for_a_marker(site):
    """The only way to repeat: look, decide, wait, count. Its waiting follows the clock of the service."""
    states = {
        "Begin": {"Type": "ExpressionEval", "Parameters": {"tries": 0}, "ResultPath": "$.poll", "Next": "Look"},
        "Look": {"Type": "Action", "ActionUrl": TRANSFER + "stat", "ResultPath": "$.seen", "Next": "Decide",
                 "Parameters": {"endpoint_id.$": "$.collection", "path.$": "$.marker"}},
        "Decide": {"Type": "Choice", "Default": "Pause", "Choices": [
            {"Variable": "$.seen.details.type", "IsPresent": True, "Next": "Found"},
            {"Variable": "$.poll.tries", "NumericGreaterThanEquals": 5, "Next": "TooLate"}]},
        "Pause": {"Type": "Wait", "Seconds": 120, "Next": "Count"},
        "Count": {"Type": "ExpressionEval", "Parameters": {"tries.=": "poll.tries + 1"}, "ResultPath": "$.poll",
                  "Next": "Look"},
        "Found": {"Type": "Pass", "Result": {"marker": "present"}, "ResultPath": "$.outcome", "End": True},
        "TooLate": {"Type": "Fail", "Error": "MarkerMissing", "Cause": "no marker"},
    }  # fmt: skip
    body = {"collection": site.krios, "marker": "/done"}
    missed = site.run(states, body)
    site.until(lambda: site.globus.runs(), lambda runs: runs[0]["_state"] == "Pause" and runs[0]["_wait"])
    site.globus.clock(advance_s=120)
    site.until(lambda: site.globus.runs(), lambda runs: runs[0]["_data"].get("poll") == {"tries": 1})
    site.globus.settings(flow_wait_scale=0.0)
    site.globus.clock(advance_s=120)
    assert site.run_ended(missed)["details"]["error"] == "MarkerMissing"

    site.write("done")
    found = site.run(states, body)
    assert site.run_ended(found)["details"]["output"]["outcome"] == {"marker": "present"}


def test_a_run_waits_for_a_consent_and_is_resumed(site):
    """INACTIVE until the person agreed; then the state begins anew."""
    site.write("a.tif")
    site.globus.require_consent("Archive")
    flow_id = site.globus.flow({"StartAt": "Deliver", "States": {"Deliver": transfer_state(site),
                                                                "Done": {"Type": "Pass", "End": True}}})  # fmt: skip
    starter = site.starter(flow_id)
    run_id = starter.run_flow({})["run_id"]
    run = site.until(lambda: site.flows.get_run(run_id), lambda run: run["status"] == "INACTIVE")
    assert run["details"]["code"] == "ConsentRequired"

    site.transfer.add_app_data_access_scope(site.archive)
    site.app.login(force=True)
    starter.resume_run(run_id)

    assert site.run_ended(run_id)["status"] == "SUCCEEDED"


def test_a_run_asks_a_person_and_goes_on_with_the_answer(site):
    """`blocking_web_input_id` is set while the question is open; the answer is the option's value."""
    states = {
        "Ask": {"Type": "CreateWebInput", "ResultPath": "$.asked", "Next": "Await", "Parameters": {
            "InputType": "Selection", "Context": {"Title": "Deliver?"},
            "Options": [{"Value": "yes", "Label": "Yes"}, {"Value": "no", "Label": "No"}]}},
        "Await": {"Type": "AwaitWebInput", "ResultPath": "$.answer", "End": True,
                  "Parameters": {"web_input_id.$": "$.asked.web_input_id"}},
    }  # fmt: skip
    run_id = site.run(states)
    run = site.until(lambda: site.flows.get_run(run_id), lambda run: run["status"] == "INACTIVE")
    question = site.flows.get_web_input(run["blocking_web_input_id"])
    site.flows.respond_to_web_input(question["id"], question["options"][0]["option_id"])
    run = site.run_ended(run_id)

    assert question["context"]["title"] == "Deliver?"
    assert run["details"]["output"]["answer"]["response"]["value"] == "yes"
    assert run["blocking_web_input_id"] is None
    assert site.flows.get_web_input(question["id"])["status"] == "closed"


@pytest.mark.parametrize("kept", [True, False])
def test_a_failed_action_is_an_exception_unless_the_state_says_otherwise(site, kept):
    """`ExceptionOnActionFailure: false` hands the failure on as a result."""
    site.globus.provider("https://example.org/action", status="FAILED", details={"why": "no beam"})
    state = {"Type": "Action", "ActionUrl": "https://example.org/action", "Parameters": {}, "ResultPath": "$.done",
             "End": True, "ExceptionOnActionFailure": not kept}  # fmt: skip
    run = site.run_ended(site.run({"Act": state}))

    if kept:
        assert run["details"]["output"]["done"]["details"] == {"why": "no beam"}
    else:
        assert (run["status"], run["details"]["error"]) == ("FAILED", "ActionFailedException")


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"Type": "Action", "ActionUrl": "https://example.org/none", "Parameters": {}}, "ActionUnableToRun"),
        ({"Type": "Action", "ActionUrl": "https://actions.globus.org/transfer/transfer", "Parameters": {}},
         "ActionUnableToRun"),
        ({"Type": "Pass", "Parameters": {"a.$": "$.none"}}, "States.ParameterPathFailure"),
        ({"Type": "ExpressionEval", "Parameters": {"a.=": "none + 1"}, "ResultPath": "$.a"},
         "States.ParameterPathFailure"),
    ],
)  # fmt: skip
def test_errors_of_states_have_names(site, state, error):
    """Uncaught they fail the run, and a Catch knows them by name."""
    run = site.run_ended(site.run({"S": state | {"End": True}}))
    assert (run["status"], run["details"]["error"]) == ("FAILED", error)
    if state["Type"] != "Action":
        return
    caught = state | {"End": True, "Catch": [{"ErrorEquals": ["States.ALL"], "ResultPath": "$.why", "Next": "Rescue"}]}
    run = site.run_ended(site.run({"S": caught, "Rescue": {"Type": "Pass", "End": True}}))

    assert run["details"]["output"]["why"]["Error"] == error


PASS = {"Type": "Pass", "End": True}


def test_a_state_that_grows_too_large_fails_the_run(site):
    """200 KB for everything that a run carries along."""
    states = {"Grow": {"Type": "ExpressionEval", "Parameters": {"text.=": "'x' * 300000"}, "ResultPath": "$.big",
                       "Next": "Done"}, "Done": PASS}  # fmt: skip
    run = site.run_ended(site.run(states))

    assert (run["status"], run["details"]["error"]) == ("FAILED", "States.DataLimitExceeded")


def test_compute_and_hello_and_notification(site):
    """Functions give what was ordered, or what a function of the test computes."""
    told = site.globus.function(output={"resolution": 2.1})
    called = site.globus.function(callable="operator:add")
    states = {
        "Hello": {"Type": "Action", "ActionUrl": HELLO, "Parameters": {"echo_string": "foo"}, "ResultPath": "$.hello",
                  "Next": "Compute"},
        "Compute": {"Type": "Action", "ActionUrl": "https://compute.actions.globus.org/v3", "ResultPath": "$.computed",
                    "Parameters": {"endpoint_id": str(uuid.uuid4()), "tasks": [
                        {"function_id": told, "args": [], "kwargs": {}},
                        {"function_id": called, "args": [1, 2], "kwargs": {}}]}, "Next": "Notify"},
        "Notify": {"Type": "Action", "ActionUrl": "https://actions.globus.org/notification/notify", "End": True,
                   "ResultPath": "$.told", "Parameters": {"destination": "ada@example.org", "subject": "done"}},
    }  # fmt: skip
    output = site.run_ended(site.run(states))["details"]["output"]

    assert output["hello"]["details"] == {"Hello": "World", "hello": "foo"}
    assert [one["output"] for one in output["computed"]["details"]["results"]] == [{"resolution": 2.1}, 3]
    assert [one["subject"] for one in site.globus.notifications()] == ["done"]


def test_a_function_that_raises_fails_its_action_and_nothing_else(site):
    """The run says what was raised, and the next one runs."""
    divide = site.globus.function(callable="operator:truediv")

    def divided(by: int) -> Any:
        task = {"function_id": divide, "args": [1, by], "kwargs": {}}
        state = {"Type": "Action", "ActionUrl": "https://compute.actions.globus.org/v3", "ResultPath": "$.computed",
                 "Parameters": {"endpoint_id": str(uuid.uuid4()), "tasks": [task]}, "End": True}  # fmt: skip
        return site.run_ended(site.run({"Divide": state}))

    failed = divided(0)
    assert failed["status"] == "FAILED"
    assert "ZeroDivisionError" in json.dumps(failed.data)
    assert divided(2)["status"] == "SUCCEEDED"


def test_runs_are_found_by_what_the_daemon_knows(site):
    """Label, flow, time, status; tags are in the answer; strangers see nothing."""
    flow_id = site.globus.flow({"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}})
    starter = site.starter(flow_id)
    ids = [starter.run_flow({}, label=f"epu td-{name}", tags=[f"td-{name}"])["run_id"] for name in ("aa", "bb", "cc")]
    for run_id in ids:
        site.run_ended(run_id)

    def found(**query: Any) -> list[str]:
        runs = site.flows.paginated.list_runs(filter_flow_id=flow_id, query_params={"per_page": 1} | query).items()
        return [run["run_id"] for run in runs]

    assert found() == ids[::-1]
    assert found(filter_label="TD-BB") == [ids[1]]
    assert found(filter_status="FAILED") == []
    assert found(filter_start_time="2020-01-01T00:00:00+00:00,") == ids[::-1]
    assert found(filter_start_time=",2020-01-01T00:00:00+00:00") == []
    assert site.flows.list_runs(filter_flow_id=uuid.uuid4())["runs"] == []
    other = str(uuid.uuid4())
    site.globus.client(other, SECRET)
    stranger = globus_sdk.FlowsClient(app=site.app_of(other), retry_config=_once())
    assert stranger.list_runs()["runs"] == []
    assert refused(lambda: stranger.get_run(ids[0])).http_status == 404


def test_a_new_run_may_be_listed_late(site):
    """How late is unknown; the run itself can be asked for at once."""
    site.globus.settings(run_listed_after_s=30)
    run_id = site.run({"A": {"Type": "Pass", "End": True}}, label="td-late")
    site.run_ended(run_id)
    assert site.flows.list_runs()["runs"] == []

    site.globus.clock(advance_s=31)

    assert [run["run_id"] for run in site.flows.list_runs()] == [run_id]


def test_a_new_flow_may_be_listed_late(site):
    """As a run; the flow itself can be asked for, and started, at once."""
    site.globus.settings(flow_listed_after_s=30)
    made = site.flows.create_flow("Late", {"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}}, {})
    assert [flow["id"] for flow in site.flows.list_flows()] == []
    assert site.flows.get_flow(made["id"]).data == made.data

    site.globus.clock(advance_s=31)

    assert [flow["id"] for flow in site.flows.list_flows()] == [made["id"]]


def test_a_run_is_cancelled_and_released(site):
    """202 and FlowCanceled; an active run cannot be released."""
    run_id = site.run({"Wait": {"Type": "Wait", "Seconds": 3600, "End": True}})
    error = refused(lambda: site.flows.delete_run(run_id))
    assert (error.http_status, error.code) == (409, "STATE_CONFLICT")
    cancelled = site.flows.cancel_run(run_id)
    assert (cancelled.http_status, cancelled["status"]) == (202, "FAILED")
    assert cancelled["details"]["code"] == "FlowCanceled"

    assert site.flows.delete_run(run_id)["run_id"] == run_id
    assert refused(lambda: site.flows.get_run(run_id)).http_status == 404


INPUT = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False}


def test_input_is_judged_before_a_run_begins(site):
    """validate_run and run answer alike: 400 with the place and the reason."""
    flow_id = site.globus.flow({"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}}, INPUT)
    starter = site.starter(flow_id)
    assert starter.validate_run({"n": 1}, label="x", tags=["y"])["message"] == "validation successful"
    for call in (starter.validate_run, starter.run_flow):
        error = refused(lambda call=call: call({"n": "x"}))
        assert (error.http_status, error.code) == (400, "FLOW_INPUT_ERROR")
        assert error.raw_json["error"]["detail"] == [
            {"loc": ["$.n"], "type": "InvalidActionInput", "msg": "'x' is not of type 'integer'"}
        ]
    assert refused(lambda: starter.validate_run({"n": 1}, tags=["x" * 200])).http_status == 422
    assert site.globus.runs() == []


def test_rights_to_a_flow(site):
    """Who may not see it gets 404, who may not start it 403, and who lacks the scope MISSING_SCOPE."""
    pass_flow = {"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}}
    hidden = site.globus.flow(pass_flow, flow_viewers=[], flow_starters=[])
    seen = site.globus.flow(pass_flow, flow_starters=[])
    open_flow = site.globus.flow(pass_flow)
    assert refused(lambda: site.flows.get_flow(hidden)).http_status == 404
    error = refused(lambda: site.starter(seen).run_flow({}))
    assert (error.http_status, error.code) == (403, "FORBIDDEN")
    header = {"Authorization": site.app.get_authorizer("flows.globus.org").get_authorization_header()}
    status, body = raw(site, "POST", f"/flows/{open_flow}/run", header, {"body": {}})

    assert (status, body["error"]["code"]) == (403, "MISSING_SCOPE")


def test_flows_are_made_changed_and_validated_by_clients(site):
    """A broken definition is 422 with the place; a good one is kept and can be changed."""
    good = {"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True}}}
    made = site.flows.create_flow("Deliver", good, {}, flow_starters=["all_authenticated_users"])
    site.flows.update_flow(made["id"], title="Deliver all")
    assert site.flows.get_flow(made["id"])["title"] == "Deliver all"
    error = refused(lambda: site.flows.validate_flow({"StartAt": "A", "States": {"A": {"Type": "Pass"}}}))

    assert (error.http_status, error.code) == (422, "UNPROCESSABLE_ENTITY")
    assert error.raw_json["error"]["detail"][0]["loc"] == ["definition", "States", "A"]
    assert site.flows.validate_flow(good)["scopes"]


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        ({"StartAt": "B", "States": {"A": PASS}}, "StartAt"),
        ({"StartAt": "A", "States": {}}, "at least one"),
        ({"StartAt": "A", "States": {"A": {"Type": "Pass", "Next": "B"}}}, "no state 'B'"),
        ({"StartAt": "A", "States": {"A": PASS, "B": PASS}}, "cannot be reached"),
        ({"StartAt": "A", "States": {"A": {"Type": "Pass", "End": True, "Next": "A"}}}, "terminal"),
        ({"StartAt": "A", "States": {"A": PASS | {"Retry": 3}}}, "extra fields"),
        ({"StartAt": "A", "States": {"A": PASS}, "TimeoutSeconds": 3}, "extra fields"),
        ({"StartAt": "A", "States": {"A": {"Type": "Parallel", "End": True}}}, "Unknown state type"),
        ({"StartAt": "A", "States": {"A": {"Type": "Wait", "End": True}}}, "exactly one"),
        ({"StartAt": "A", "States": {"A": {"Type": "Choice", "Choices": []}}}, "at least one rule"),
        ({"StartAt": "A", "States": {"A": {"Type": "Action", "End": True}}}, "ActionUrl"),
        ({"StartAt": "A", "States": {"A": PASS | {"Parameters": {"x.$": "y"}}}}, "starts with"),
        ({"StartAt": "A", "States": {"A": PASS | {"Parameters": {}, "InputPath": "$"}}}, "exclude"),
        ({"StartAt": "A", "States": {"x" * 129: PASS}}, "StartAt"),
        ([], "object"),
    ],
)
def test_broken_definitions_are_found(definition, says):
    """Shape of every state, and every way leads somewhere."""
    assert any(says in message for _, message in problems(definition))


DATA = {"batch": {"token": "td-a", "files": ["a.tif", "b.mrc"]}, "n": 3, "flag": False, "path": "/~/visit/a.tif"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'deliver ' + batch.token", "deliver td-a"),
        ("n + 1", 4),
        ("n * 2 - 1", 5),
        ("`$.batch.files[0]`", "a.tif"),
        ("batch.files[-1]", "b.mrc"),
        ("batch.files[:1]", ["a.tif"]),
        ("[f.split('.')[0] for f in batch.files if f.endswith('.tif')]", ["a"]),
        ("pathsplit(path)", ["/~/visit/", "a.tif"]),
        ("is_present('batch.token') and not is_present('batch.none')", True),
        ("getattr('batch.none', 'x')", "x"),
        ("getattr('batch.token', 'x')", "td-a"),
        ("len(batch.files) if not flag else 0", 2),
        ("{'a': [n, str(n)]}", {"a": [3, "3"]}),
        ("1 < n <= 3 and 'a.tif' in batch.files", True),
        ("path.rpartition('/')[2].rstrip('.tif')", "a"),
    ],
)
def test_expressions(text, value):
    """The subset of Python that published flows use."""
    assert expressions.evaluate(text, DATA) == value


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "n.__class__", "(lambda: 1)()", "open('/etc/passwd')", "batch.none", "n +", "2 ** 99",
     "'x' * 99999999 + 'y'", "[x for x in batch.files for y in batch.files]", "len(n, n)", "1 / 0", "`$.none`"],
)  # fmt: skip
def test_expressions_that_are_refused(text):
    """Never `eval`: what is not known is an error of the flow."""
    with pytest.raises(expressions.PathError):
        expressions.evaluate(text, DATA)


def test_the_schema_judges_as_the_reference_does():
    """Whether a value fits is the same as with the `jsonschema` package, keyword by keyword."""
    jsonschema = pytest.importorskip("jsonschema")
    whole = {
        "type": "object", "required": ["path", "n"], "additionalProperties": False,
        "properties": {
            "path": {"type": "string", "pattern": "^/", "minLength": 2, "maxLength": 9},
            "n": {"type": "integer", "minimum": 1, "exclusiveMaximum": 10},
            "x": {"type": ["number", "null"]}, "mode": {"enum": ["a", "b"]},
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "either": {"oneOf": [{"type": "string"}, {"const": 3}]}, "any": {"anyOf": [{"minimum": 5}, {"maximum": 1}]},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
    }  # fmt: skip
    good = {"path": "/ab", "n": 5}
    values: list[Any] = [
        good, {}, [], None, good | {"n": True}, good | {"n": 0}, good | {"n": 10}, good | {"n": 2.0}, good | {"n": 2.5},
        good | {"path": "ab"}, good | {"path": "/"}, good | {"path": "/" * 10}, good | {"x": None}, good | {"x": "1"},
        good | {"mode": "c"}, good | {"list": []}, good | {"list": [True]}, good | {"list": [1]}, good | {"y": 1},
        good | {"list": [True] * 3}, good | {"either": 3}, good | {"either": 4}, good | {"any": 3}, good | {"any": 9},
        good | {"map": {"a": 1}}, good | {"map": {"a": "1"}},
    ]  # fmt: skip
    for value in values:
        assert bool(schema.problems(value, whole)) != jsonschema.Draft7Validator(whole).is_valid(value), value


# --------------------------------------------------- search, groups, timers


def test_an_ingest_takes_effect_in_order_and_overwrites(site):
    """The task is PENDING until then; the same subject and id again replaces the entry."""
    index = site.globus.index("Visits")
    search = globus_sdk.SearchClient(app=site.app, app_scopes=[SearchScopes.all], retry_config=_once())
    site.globus.settings(ingest_s=60)

    def entry(value: int) -> dict[str, Any]:
        data = {"subject": "globus://archive/visit", "id": "batch", "visible_to": ["public"], "content": {"n": value}}
        return {"ingest_type": "GMetaEntry", "ingest_data": data}

    tasks = [search.ingest(index, entry(value))["task_id"] for value in (1, 2)]
    assert [search.get_task(task)["state"] for task in tasks] == ["PENDING", "PENDING"]
    site.globus.clock(advance_s=61)

    assert [search.get_task(task)["state"] for task in tasks] == ["SUCCESS", "SUCCESS"]
    found = search.search(index, "visit")["gmeta"]
    assert [one["entries"][0]["content"] for one in found] == [{"n": 2}]
    assert search.get_subject(index, "globus://archive/visit")["entries"][0]["entry_id"] == "batch"
    assert search.get_index(index)["num_entries"] == 1
    search.delete_subject(index, "globus://archive/visit")
    assert refused(lambda: search.get_subject(index, "globus://archive/visit")).http_status == 404


def test_an_ingest_needs_the_scope_the_role_and_a_good_document(site):
    """The scope that the SDK asks for by default only reads."""
    index, closed = site.globus.index("Visits"), site.globus.index("Closed", writers=[])
    entry = {"ingest_type": "GMetaEntry", "ingest_data": {"subject": "s", "visible_to": ["public"], "content": {}}}
    reader = globus_sdk.SearchClient(app=site.app_of(CLIENT), retry_config=_once())
    writer = globus_sdk.SearchClient(app=site.app, app_scopes=[SearchScopes.ingest], retry_config=_once())

    assert refused(lambda: reader.ingest(index, entry)).http_status == 403
    assert refused(lambda: writer.ingest(closed, entry)).http_status == 403
    assert refused(lambda: writer.ingest(uuid.uuid4(), entry)).http_status == 404
    for change in ({"subject": ""}, {"visible_to": ["ada"]}, {"content": 1}, {"subject": "x" * 501}):
        bad = entry | {"ingest_data": entry["ingest_data"] | change}
        assert refused(lambda bad=bad: writer.ingest(index, bad)).http_status == 400


def test_groups_are_listed_and_changed_with_the_right_scope(site):
    """The default scope only reads; a manager adds members."""
    other = str(uuid.uuid4())
    group = site.globus.group("Visit 42", {CLIENT: "manager"})
    reader = globus_sdk.GroupsClient(app=site.app_of(CLIENT), retry_config=_once())
    writer = globus_sdk.GroupsClient(app=site.app, app_scopes=[GroupsScopes.all], retry_config=_once())
    assert [one["name"] for one in reader.get_my_groups()] == ["Visit 42"]
    add = globus_sdk.BatchMembershipActions().add_members([other])
    assert refused(lambda: reader.batch_membership_action(group, add)).http_status == 403
    writer.batch_membership_action(group, add)
    members = writer.get_group(group, include="memberships")["memberships"]

    assert {one["identity_id"] for one in members} == {CLIENT, other}


def test_a_timer_starts_transfers_by_the_clock(site):
    """Nightly, so many times; paused it rests, and what it could not start is counted as an error."""
    site.write("a.tif")
    timers = globus_sdk.TimersClient(app=site.app, retry_config=_once())
    body = globus_sdk.TransferData(site.krios, site.archive, sync_level=3)
    body.add_item("/a.tif", "/visit/a.tif")
    start = "2099-01-01T00:00:00+00:00"
    schedule = globus_sdk.RecurringTimerSchedule(86_400, start=start, end={"condition": "iterations", "count": 2})
    made = timers.create_timer(globus_sdk.TransferTimer(name="nightly", schedule=schedule, body=body))
    job = made["timer"]["job_id"]
    assert (made.http_status, timers.get_job(job)["next_run"]) == (201, start)
    assert site.globus.tasks() == []

    def fired() -> list[dict[str, Any]]:
        return [task for task in site.globus.tasks() if task["status"] == "SUCCEEDED"]

    site.globus.settings(token_lifetime_s=10**11)
    site.globus.expire_tokens()
    refused(timers.list_jobs)
    timers.list_jobs()
    site.globus.clock(advance_s=75 * 365.25 * 86_400)
    site.globus.wait(lambda: timers.get_job(job)["status"] == "ended")
    site.globus.wait(fired)

    assert timers.get_job(job)["n_runs"] == 2
    assert (timers.pause_job(job)["message"], timers.list_jobs()["jobs"][0]["status"]) != ("", "ended")
    timers.resume_job(job)
    timers.delete_job(job)
    assert refused(lambda: timers.get_job(job)).http_status == 404


# -------------------------------------------------------------------- shapes


# What the published payloads have and the emulator leaves out: the test asks for a timer that runs once,
# the payload is of one that recurs.
LEFT_OUT = {"timer.create_timer": {".timer.schedule.interval_seconds", ".timer.schedule.start"}}


def _shapes(site: Site) -> dict[str, Callable[[], Any]]:
    site.write("a.tif")
    flow_id = site.globus.flow({"StartAt": "A", "States": {"A": {"Type": "Wait", "Seconds": 99, "End": True}}})
    starter = site.starter(flow_id)
    run_id = starter.run_flow({}, label="x")["run_id"]
    ended = site.run({"A": PASS})
    site.run_ended(ended)
    search = globus_sdk.SearchClient(app=site.app, retry_config=_once())
    groups = globus_sdk.GroupsClient(app=site.app, retry_config=_once())
    timers = globus_sdk.TimersClient(app=site.app, retry_config=_once())
    body = globus_sdk.TransferData(site.krios, site.archive)
    body.add_item("/a.tif", "/timer.tif")
    schedule = globus_sdk.OnceTimerSchedule(datetime="2099-01-01T00:00:00+00:00")
    index, group = site.globus.index(), site.globus.group(members={CLIENT: "member"})
    timer = timers.create_timer(globus_sdk.TransferTimer(name="t", schedule=schedule, body=body))
    job = timer["timer"]["job_id"]
    delete = globus_sdk.DeleteData(endpoint=site.archive, submission_id=site.transfer.get_submission_id()["value"])
    delete.add_item("/none")
    login = globus_sdk.ConfidentialAppAuthClient(CLIENT, SECRET)
    auth = globus_sdk.AuthClient(app=site.app, retry_config=_once())
    definition = {"StartAt": "A", "States": {"A": PASS}}
    return {
        "auth.oauth2_client_credentials_tokens": lambda: login.oauth2_client_credentials_tokens(
            requested_scopes=["urn:globus:auth:scope:transfer.api.globus.org:all"]),
        "auth.get_identities": lambda: auth.get_identities(ids=CLIENT),
        "transfer.get_submission_id": site.transfer.get_submission_id,
        "transfer.submit_transfer": lambda: site.transfer.submit_transfer(site.document(("/a.tif", "/b.tif"))),
        "transfer.submit_delete": lambda: site.transfer.submit_delete(delete),
        "transfer.task_list": site.transfer.task_list,
        "transfer.cancel_task": lambda: site.transfer.cancel_task(site.submit("missing")),
        "transfer.get_endpoint": lambda: site.transfer.get_endpoint(site.archive),
        "transfer.update_endpoint": lambda: site.transfer.update_endpoint(site.archive, {"description": "x"}),
        "transfer.operation_mkdir": lambda: site.transfer.operation_mkdir(site.krios, "/d"),
        "transfer.operation_rename": lambda: site.transfer.operation_rename(site.krios, "/d", "/e"),
        "transfer.operation_stat": lambda: site.transfer.operation_stat(site.krios, "/a.tif"),
        "transfer.endpoint_manager_task_successful_transfers": lambda: site.transfer.task_successful_transfers(
            _delivered(site)),
        "flows.get_flow": lambda: site.flows.get_flow(flow_id),
        "flows.create_flow": lambda: site.flows.create_flow("x", definition, {}),
        "flows.list_flows": site.flows.list_flows,
        "flows.validate_flow": lambda: site.flows.validate_flow(definition),
        "flows.run_flow": lambda: starter.run_flow({}),
        "flows.validate_run": lambda: starter.validate_run({}),
        "flows.get_run": lambda: site.flows.get_run(run_id, include_flow_description=True),
        "flows.list_runs": site.flows.list_runs,
        "flows.get_run_logs": lambda: site.flows.get_run_logs(ended),
        "flows.get_run_definition": lambda: site.flows.get_run_definition(run_id),
        "flows.update_run": lambda: site.flows.update_run(run_id, label="y"),
        "flows.resume_run": lambda: starter.resume_run(run_id),
        "flows.cancel_run": lambda: site.flows.cancel_run(run_id),
        "flows.delete_run": lambda: site.flows.delete_run(ended),
        "search.search": lambda: search.search(index, "*"),
        "search.index_list": search.index_list,
        "groups.get_my_groups": groups.get_my_groups,
        "groups.get_group": lambda: groups.get_group(group),
        "timer.create_timer": lambda: timer,
        "timer.get_job": lambda: timers.get_job(job),
        "timer.list_jobs": timers.list_jobs,
        "timer.pause_job": lambda: timers.pause_job(job),
        "timer.resume_job": lambda: timers.resume_job(job),
        "timer.delete_job": lambda: timers.delete_job(job),
    }  # fmt: skip


def _delivered(site: Site) -> str:
    task_id = site.submit("a.tif")
    site.ended(task_id)
    return task_id


def _missing(published: Any, emulated: Any, where: str = "") -> set[str]:
    """Return the places of keys that the published payload has and the emulator does not."""
    if isinstance(published, dict) and isinstance(emulated, dict):
        gone = {f"{where}.{key}" for key in published.keys() - emulated.keys()}
        for key in published.keys() & emulated.keys():
            gone |= _missing(published[key], emulated[key], f"{where}.{key}")
        return gone
    if isinstance(published, list) and isinstance(emulated, list) and published and emulated:
        return _missing(published[0], emulated[0], f"{where}[]")
    return set()


# Parts whose keys depend on what was asked and not on the interface.
FREE = re.compile(
    r"\.(definition|input_schema|input|output|body|callback_body|end|scopes|details\.(output|details))\b"
    r"|\.runs\[\]\.details|\.results\.data|^\.details|^\.DATA\[\]\.(hostname|uri|port|scheme|id|subject)$"
)


def test_answers_have_every_key_of_the_published_payloads(site):
    """The SDK ships payloads of the real service for its own tests; nothing that is in them may be missing here."""
    pytest.importorskip("responses")
    from globus_sdk.testing import get_response_set

    missing: dict[str, set[str]] = {}
    for name, call in _shapes(site).items():
        published = get_response_set(name).lookup("default")
        published = getattr(published, "responses", [published])[-1]
        gone = {place for place in _missing(published.json, call().data) if not FREE.search(place)}
        if gone := gone - LEFT_OUT.get(name, set()):
            missing[name] = gone

    assert missing == {}


# ----------------------------------------------------------------------- CLI


@pytest.fixture
def cli(site: Site, tmp_path: Path) -> Callable[..., Any]:
    """Run the published CLI as a subprocess; it keeps its tokens below a home of its own."""
    pytest.importorskip("globus_cli")
    client = {"GLOBUS_CLI_CLIENT_ID": CLIENT, "GLOBUS_CLI_CLIENT_SECRET": base64.b64encode(SECRET.encode()).decode(),
              "GLOBUS_CLI_INTERACTIVE": "0", "HOME": str(tmp_path / "home")}  # fmt: skip
    site.globus.client(CLIENT, client["GLOBUS_CLI_CLIENT_SECRET"])
    environment = os.environ | site.globus.environment() | client

    def run(*words: str, code: int = 0, text: bool = False) -> Any:
        command = [sys.executable, "-m", "globus_cli", *words, *([] if text else ["-F", "json"])]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout if text or code else json.loads(done.stdout)

    return run


def test_the_cli_transfers_and_looks(site, cli):
    """Transfers, tasks, listings and permissions, with the exit codes that scripts rely on."""
    site.write("a.tif")
    task = cli("transfer", f"{site.krios}:/a.tif", f"{site.archive}:/visit/a.tif", "--label", "by hand")["task_id"]
    cli("task", "wait", task, "--polling-interval", "1", text=True)
    assert "SUCCEEDED" in cli("task", "show", task, text=True)
    assert [one["label"] for one in cli("task", "list")["DATA"]] == ["by hand"]
    assert [one["code"] for one in cli("task", "event-list", task)["DATA"]] == ["SUCCEEDED", "STARTED"]
    assert "/visit/a.tif" in cli("task", "show", task, "--successful-transfers", text=True)
    assert cli("ls", f"{site.archive}:/visit", text=True).split() == ["a.tif"]
    assert cli("stat", f"{site.archive}:/visit/a.tif")["size"] == 6
    cli("mkdir", f"{site.archive}:/new", text=True)
    assert (site.archive_dir / "new").is_dir()
    cli("endpoint", "permission", "create", f"{site.archive}:/visit/", "--permissions", "r", "--identity", CLIENT,
        text=True)  # fmt: skip
    assert CLIENT in cli("endpoint", "permission", "list", site.archive, text=True)

    stuck = cli("transfer", f"{site.krios}:/none", f"{site.archive}:/none")["task_id"]
    assert "not paused" in cli("task", "pause-info", stuck, text=True)
    cli("task", "cancel", stuck, text=True)
    cli("task", "wait", stuck, text=True, code=1)
    cli("task", "show", str(uuid.uuid4()), code=1)


def test_the_cli_runs_flows_and_ingests(site, cli, tmp_path):
    """Runs, their logs, an ingest and a timer."""
    flow = site.globus.flow({"StartAt": "A", "States": {"A": {"Type": "Wait", "Seconds": 99, "End": True}}})
    run = cli("flows", "start", flow, "--input", "{}", "--label", "by hand")["run_id"]
    assert [one["run_id"] for one in cli("flows", "run", "list")["runs"]] == [run]
    assert "ACTIVE" in cli("flows", "run", "show", run, text=True)
    assert "FlowStarted" in cli("flows", "run", "show-logs", run, text=True)
    cli("flows", "run", "cancel", run, text=True)
    assert cli("flows", "run", "show", run)["details"]["code"] == "FlowCanceled"

    document = tmp_path / "entry.json"
    entry = {"subject": "globus://x", "visible_to": ["public"], "content": {"n": 1}}
    document.write_text(json.dumps({"ingest_type": "GMetaEntry", "ingest_data": entry}))
    task = cli("search", "ingest", site.globus.index(), str(document))["task_id"]
    site.globus.wait(lambda: site.globus.entries("Visits"))
    assert cli("search", "task", "show", task)["state"] == "SUCCESS"

    timer = cli("timer", "create", "transfer", f"{site.krios}:/a.tif", f"{site.archive}:/a.tif", "--interval", "1d",
                "--start", "2099-01-01", "--name", "nightly")  # fmt: skip
    assert timer["name"] == "nightly"
