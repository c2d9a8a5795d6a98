"""Laws of `globus login | logout | whoami | check | timer` and `rules check --online`, against the emulated service."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from globus.emulator import Emulator, named

pytest.importorskip("globus_sdk")

from trigger_daemon import cli
from trigger_daemon.core.model import ReclaimFile, ReclaimIntended, ReclaimMoved, ReclaimSet
from trigger_daemon.journal import Journal

CLIENT = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f"
NATIVE = "9b2f7c14-3e5d-4a7c-8b1e-6d4f2a0c9e7b"
FLOWS, TIMERS = "eec9b274-0c81-4334-bdc2-54e90e689b9a", "524230d7-ea86-4a52-8312-86065a9e0417"
NOBODY = "00000000-0000-4000-8000-000000000001"
SECRET = "not-a-secret"
MAPPED = "GCSv5_mapped_collection"
OK, FAILURE, USAGE, CONFIGURATION, PERSON, INTERRUPTED = 0, 1, 2, 3, 4, 130
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
HELLO = {"StartAt": "Hello", "States": {"Hello": {"Type": "Pass", "End": True}}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(tmp_path_factory.mktemp("globus")) as globus:
        yield globus


class Browser:
    """Stands in for stdin: a person who opens the address that was shown, logs in, and pastes the code."""

    def __init__(self, shown: Callable[[], str]) -> None:
        self._shown = shown
        self.asked: list[str] = []  # the scopes of each page

    def readline(self) -> str:
        addresses = re.findall(r"http\S+", self._shown())
        if not addresses:
            return ""
        self.asked.append(urllib.parse.parse_qs(urllib.parse.urlsplit(addresses[-1]).query)["scope"][0])
        with urllib.request.urlopen(addresses[-1], timeout=10) as page:
            return f"{json.load(page)['code']}\n"


class Microscope:
    """A machine with the daemon's settings and rules, and the collections of its site."""

    def __init__(self, globus: Emulator, base: Path) -> None:
        self.globus, self.base = globus, base
        self.data, self.archive_dir, self.state = base / "data", base / "archive", base / "state"
        self.rules_dir = base / "rules"
        for directory in (self.data, self.archive_dir, self.state, self.rules_dir):
            directory.mkdir()
        (self.data / "one.tif").write_bytes(b"frames")
        globus.client(CLIENT, SECRET)
        globus.client(NATIVE)
        self.krios = globus.collection("Krios", self.data)
        self.archive = globus.collection("Archive", self.archive_dir)
        self.settings: dict[str, Any] = {"client_id": CLIENT, "collections": {self.krios: {str(self.data): "/"}}}
        self.config = base / "config.yaml"
        self.configure()
        self.rule()

    def configure(self, **globus: Any) -> None:
        self.settings |= globus
        self.config.write_text(json.dumps({
            "state_dir": str(self.state), "rules_dir": str(self.rules_dir), "globus": self.settings,
            "time_zone": "UTC",
        }))  # fmt: skip

    def rule(self, name: str = "movies", **options: Any) -> None:
        """Put one rule in force: a transfer, with what is given instead."""
        given = {"from": self.krios, "to": self.archive, "path": "/visits/v1", **options}
        self.start({"globus_transfer": given}, name)

    def flow(self, flow: str, **options: Any) -> None:
        self.start({"globus_flow": {"flow": flow, **options}}, "deliver", proof="none")

    def start(self, what: dict[str, Any], name: str, **keys: Any) -> None:
        rule = {"name": name, "watch": str(self.data), "match": ["{movie}.tif"], "existing": "process", "start": what}
        (self.rules_dir / "rules.yaml").write_text(json.dumps({"rules": [rule | keys]}))

    def is_a_person(self, username: str = "ada@example.org") -> str:
        """Let the settings be those of an account that a person lends."""
        self.configure(client_id=NATIVE)
        identity = self.globus.identity(username)
        self.globus.control("POST", "login", {"identity": identity})
        return identity

    @property
    def tokens(self) -> Path:
        return self.state / "globus-tokens.json"


@pytest.fixture
def site(service: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Microscope:
    service.reset()
    for key, value in service.environment().items():
        monkeypatch.setenv(key, value)
    made = Microscope(service, tmp_path)
    monkeypatch.setenv("TRIGGER_DAEMON_CONFIG", str(made.config))
    monkeypatch.setenv("TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET", SECRET)
    return made


@pytest.fixture
def person(site: Microscope, monkeypatch: pytest.MonkeyPatch) -> Microscope:
    """The same machine, where a person lends the daemon an account."""
    monkeypatch.delenv("TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET")
    site.is_a_person()
    return site


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Run a command; return its exit code and its JSON."""

    def run(*args: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = cli.run([*args, "-F", "json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Browser:
    made = Browser(lambda: capsys.readouterr().err)
    monkeypatch.setattr(sys, "stdin", made)
    return made


def faults(answer: dict[str, Any], key: str = "checks") -> dict[str, dict[str, Any]]:
    """Return what was found wrong, by what it concerns."""
    return {each["what"]: each for each in answer[key] if not each["ok"]}


# ------------------------------------------------------------------------ who it is


def test_a_client_is_named_as_others_know_it(site, call):
    """Permissions are given to the identity that whoami shows."""
    code, me = call("globus", "whoami")

    assert code == OK
    assert (me["identity"], me["username"]) == (CLIENT, f"{CLIENT}@clients.auth.globus.org")
    assert me["kind"] == "client"


def test_login_of_a_client_repeats_the_grant_and_keeps_nothing(site, call):
    """A secret is all a client needs: there is no page to open, and no token to keep."""
    code, answer = call("globus", "login")

    assert code == OK
    assert answer["identity"] == CLIENT
    assert not site.tokens.exists()


@pytest.mark.parametrize("command", ["login", "whoami", "check"])
def test_a_wrong_secret_needs_a_person(site, call, monkeypatch, command):
    """No repetition mends it, so the exit code says who must act."""
    monkeypatch.setenv("TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET", "another")
    code, answer = call("globus", command)

    assert code == PERSON
    told = answer if command != "check" else faults(answer)["account"]
    assert "client_secret_file" in told["hint"]


@pytest.mark.parametrize("command", ["login", "whoami", "check"])
def test_without_a_client_the_settings_are_named(site, call, command):
    """Who has configured nothing is told the key; what needs the rules, where these lack it."""
    site.configure(client_id=None)
    code, answer = call("globus", command)

    assert code == (CONFIGURATION if command == "check" else PERSON)
    assert "globus: client_id" in (answer["faults"][0] if command == "check" else answer)["hint"]


def test_nobody_is_logged_in(person, call):
    """Said in these words, and not in those of tokens."""
    code, answer = call("globus", "whoami")

    assert code == PERSON
    assert answer["error"] == "nobody is logged in at Globus"
    assert "globus login" in answer["hint"]


def test_a_globus_out_of_reach_needs_nobody(site, call):
    """What goes on by itself is a failure, not a matter for a person."""
    site.globus.kill()
    try:
        codes = [call("globus", command)[0] for command in ("whoami", "check", "login")]
    finally:
        site.globus.start()

    assert codes == [FAILURE] * 3


# ---------------------------------------------------------------- login and logout


def test_a_login_lends_the_daemon_an_identity(person, call, browser):
    """After the login every command acts as the person; the tokens are for the daemon's user alone."""
    code, answer = call("globus", "login")
    assert (code, answer["username"], answer["kind"]) == (OK, "ada@example.org", "person")
    assert stat.S_IMODE(person.tokens.stat().st_mode) == 0o600
    assert [name.name for name in person.state.iterdir()] == ["globus-tokens.json"]

    assert call("globus", "whoami")[1]["username"] == "ada@example.org"
    assert call("globus", "check")[0] == OK


def test_a_login_asks_for_all_that_the_rules_need(person, call, browser):
    """One page holds the scopes of every client the daemon will make, and of no other."""
    index = person.globus.index("Visits")
    person.rule(index={"id": index, "subject": "s", "visible_to": ["public"]})
    call("globus", "login")

    assert len(browser.asked) == 1
    for part in ("transfer.api.globus.org:all", "search.api.globus.org:all", f"{FLOWS}/all", f"{TIMERS}/timer"):
        assert part in browser.asked[0]
    assert "data_access" not in browser.asked[0]


def test_consents_of_collections_are_asked_for_where_there_are_any(person, call, browser):
    """data_access is asked for on mapped collections only: on others it would break the login."""
    person.krios = person.globus.collection("Mapped", person.data, entity_type=MAPPED)
    person.configure(collections={person.krios: {str(person.data): "/"}})
    person.rule()
    assert call("globus", "login")[0] == OK
    assert [f"{person.krios}/data_access" in page for page in browser.asked] == [False, True]
    assert call("globus", "check")[0] == OK

    assert call("globus", "login")[0] == OK
    assert [f"{person.krios}/data_access" in page for page in browser.asked[2:]] == [True]
    assert not any(f"{person.archive}/data_access" in page for page in browser.asked)


def test_a_client_consents_by_itself(site, call):
    """A mapped collection needs no person where the account is a client."""
    site.krios = site.globus.collection("Mapped", site.data, entity_type=MAPPED)
    site.configure(collections={site.krios: {str(site.data): "/"}})
    site.rule()

    assert call("globus", "login")[0] == OK
    assert call("globus", "check")[0] == OK


def test_a_login_that_is_broken_off_leaves_the_old_one(person, call, browser, monkeypatch):
    """Nothing is lost by trying, neither by no code nor by a wrong one."""
    call("globus", "login")
    before = person.tokens.read_bytes()
    for answer in ("", "wrong\n"):
        monkeypatch.setattr(browser, "readline", lambda answer=answer: answer)
        assert call("globus", "login")[0] == PERSON

    assert person.tokens.read_bytes() == before
    assert [name.name for name in person.state.iterdir()] == ["globus-tokens.json"]


def test_another_person_can_take_over(person, call, browser):
    """Who logs in last is who the daemon is."""
    call("globus", "login")
    person.is_a_person("grace@example.org")

    assert call("globus", "login")[1]["username"] == "grace@example.org"
    assert call("globus", "whoami")[1]["username"] == "grace@example.org"


@ROOT
def test_tokens_left_by_root_are_the_daemon_users(person, call, browser):
    """`sudo trigger-daemon globus ...` locks the daemon out of nothing, whatever it writes."""
    nobody = 65_534
    base = Path(tempfile.mkdtemp())  # pytest's own directories are root's alone
    try:
        base.chmod(0o755)
        person.state = base / "state"
        person.state.mkdir(mode=0o700)
        os.chown(person.state, nobody, nobody)
        person.configure()
        assert call("globus", "login")[0] == OK
        written = [person.tokens.stat()]
        person.globus.control("POST", "clock", {"advance_s": 3 * 86_400})
        assert call("globus", "whoami")[0] == OK  # with refreshed tokens
        written.append(person.tokens.stat())

        assert {(each.st_uid, stat.S_IMODE(each.st_mode)) for each in written} == {(nobody, 0o600)}
        assert os.geteuid() == 0
    finally:
        shutil.rmtree(base)


@ROOT
def test_nobody_else_leaves_tokens(person, call):
    """Tokens that the daemon could not read are refused before anybody has logged in."""
    assert call("globus", "whoami")[0] == PERSON  # and all is imported, from where another user may not read
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        for name in ("state", "rules"):
            (base / name).mkdir()
            (base / name).chmod(0o777)
        config = base / "config.yaml"
        settings = {"state_dir": str(base / "state"), "rules_dir": str(base / "rules"), "globus": {"client_id": NATIVE}}
        config.write_text(json.dumps(settings))
        os.seteuid(65_534)
        try:
            code, answer = call("globus", "login", "--config", str(config))
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(base)

    assert code == PERSON
    assert "sudo -u root" in answer["hint"]


def test_logout_leaves_nothing_that_is_worth_anything(person, call, browser):
    """The file goes, and a copy of it is worthless, since the service has revoked what was in it."""
    call("globus", "login")
    copy = person.tokens.read_bytes()
    code, answer = call("globus", "logout")
    assert (code, answer["removed"], answer["failed"]) == (OK, True, "")
    assert not person.tokens.exists()
    assert call("globus", "whoami")[0] == PERSON

    person.tokens.write_bytes(copy)
    assert call("globus", "whoami")[0] == PERSON
    assert call("globus", "check")[0] == PERSON


def test_logout_removes_what_cannot_be_revoked(person, call, browser):
    """Without a network the tokens go from this machine all the same, and it is said that they may live on."""
    call("globus", "login")
    person.globus.fault("POST /v2/oauth2/token/revoke", "refuse", times=50)
    code, answer = call("globus", "logout")

    assert (code, answer["removed"]) == (OK, True)
    assert answer["failed"]
    assert call("globus", "logout")[1]["removed"] is False


# ------------------------------------------------------------------- globus check


def test_a_rule_that_lacks_nothing_is_told_so(site, call):
    """Every part is named, nothing is started, and the destination's directory is all that is made."""
    code, answer = call("globus", "check")

    assert (code, answer["ok"]) == (OK, True)
    assert answer["account"]["identity"] == CLIENT
    assert [each["what"] for each in answer["checks"] if each["rule"] == "movies"] == [
        "source collection", "source directory", "destination collection", "destination directory",
    ]  # fmt: skip
    assert [str(path.relative_to(site.archive_dir)) for path in site.archive_dir.rglob("*")] == ["visits", "visits/v1"]
    assert site.globus.tasks() == []
    assert call("globus", "check")[0] == OK


def test_only_the_fixed_part_of_a_destination_is_looked_at(site, call):
    """What depends on a batch is made by its transfer."""
    site.rule(path="/visits/{movie}/raw")

    assert call("globus", "check")[0] == OK
    assert [path.name for path in site.archive_dir.rglob("*")] == ["visits"]


def _paused(site: Microscope) -> None:
    site.globus.mood(site.archive, pause_rules=[{"id": NOBODY, "message": "the tape is full"}])


def _down(site: Microscope) -> None:
    site.globus.collection(site.krios, site.data, entity_type="GCP_mapped_collection", display_name="Krios")
    site.globus.mood(site.krios, down="GC_NOT_CONNECTED")


def _not_writable(site: Microscope) -> None:
    owner = site.globus.identity("owner@example.org")
    site.globus.collection(site.archive, site.archive_dir, display_name="Archive", owner=owner)
    # Rules are the owner's to give; the emulated owner is asked directly.
    site.globus.mood(site.archive, owner=None)
    (site.archive_dir / "visits" / "v1").mkdir(parents=True)
    site.globus.mood(site.archive, owner=owner)


def _another(site: Microscope) -> None:
    other = site.base / "other"
    other.mkdir()
    (other / "two.tif").touch()
    site.globus.collection(site.krios, other, display_name="Krios")


FAULTS: dict[str, tuple[Callable[[Microscope], None], str, str]] = {
    "no such source": (
        lambda site: (site.configure(collections={NOBODY: {str(site.data): "/"}}), site.rule(**{"from": NOBODY}))[0],
        "source collection", "UUID",
    ),
    "no such destination": (lambda site: site.rule(to=NOBODY), "destination collection", "UUID"),
    "not connected": (_down, "source collection", "start it"),
    "paused": (_paused, "destination collection", "ask who manages"),
    "out of order": (
        lambda site: void(site.globus.collection(site.archive, site.archive_dir, non_functional=True)),
        "destination collection", "ask who manages",
    ),
    "a flow is demanded": (
        lambda site: void(site.globus.collection(site.archive, site.archive_dir, associated_flow_policy={"x": 1})),
        "destination collection", "globus_flow",
    ),
    "not readable": (lambda site: site.globus.mood(site.krios, denied=["/"]), "source directory", CLIENT),
    "no such directory": (
        lambda site: site.configure(collections={site.krios: {str(site.data): "/nowhere"}}),
        "source directory", "globus: collections",
    ),
    "another directory": (_another, "source directory", "the right one"),
    "not writable": (_not_writable, "destination directory", CLIENT),
    "access without the role": (
        lambda site: (
            site.rule(access=[f"identity:{NOBODY}"]),
            site.globus.collection(site.archive, site.archive_dir, entity_type=MAPPED, high_assurance=True),
        )[0],
        "access", "guest collection",
    ),
    "no such index": (
        lambda site: site.rule(index={"id": NOBODY, "subject": "s", "visible_to": ["public"]}), "index", "owner",
    ),
}  # fmt: skip


def void(_: Any) -> None:
    """Drop a value."""


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_is_told_with_who_can_mend_it(site, call, name):
    """Each fault is found before anything starts, is the only one told, and names a remedy."""
    spoil, what, hint = FAULTS[name]
    spoil(site)
    code, answer = call("globus", "check")

    assert (code, list(faults(answer))) == (PERSON, [what])
    assert answer["ok"] is False
    assert hint in faults(answer)[what]["hint"]
    assert faults(answer)[what]["rule"] == "movies"


def test_a_lapsed_consent_is_told_and_a_login_mends_it(person, call, browser):
    """The one remedy for a missing consent is a login, which then asks for it."""
    person.krios = person.globus.collection("Mapped", person.data, entity_type=MAPPED)
    person.configure(collections={person.krios: {str(person.data): "/"}})
    person.rule()
    code, answer = call("globus", "login")
    assert code == OK, answer
    person.globus.require_consent(person.krios)
    code, answer = call("globus", "check")
    assert (code, list(faults(answer))) == (PERSON, ["consent"]), answer
    assert "trigger-daemon globus login" in faults(answer)["consent"]["hint"]

    assert call("globus", "login")[0] == OK
    assert call("globus", "check")[0] == OK


def test_an_expired_login_is_told_once(person, call, browser):
    """Without an account nothing else can be looked at, and one fault is not told as many."""
    call("globus", "login")
    person.globus.expire_tokens(refresh=True)
    code, answer = call("globus", "check")

    assert code == PERSON
    assert [each["what"] for each in answer["checks"]] == ["account"]
    assert "globus login" in answer["checks"][0]["hint"]


def test_an_outage_in_the_middle_ends_the_questions(site, call):
    """A service that has gone away is not asked for each of a hundred rules."""
    site.globus.fault("GET /v0.10/endpoint/*", "refuse", times=50)
    code, answer = call("globus", "check")

    assert code == FAILURE
    assert list(faults(answer)) == ["Globus"]


def test_rules_with_faults_are_told_first(site, call):
    """The service is asked nothing about rules that the daemon would not take."""
    site.rule(to="nonsense")
    code, answer = call("globus", "check")

    assert code == CONFIGURATION
    assert answer["faults"]
    assert site.globus.requests("GET /v0.10/task_list") == []


def test_text_names_rule_and_remedy(site, capsys):
    """People read the same as programs."""
    _paused(site)
    code = cli.run(["globus", "check"])
    out = capsys.readouterr().out

    assert code == PERSON
    assert "movies\n" in out
    assert "fault  destination collection: collection Archive: it is paused by its manager: the tape is full" in out
    assert "hint: ask who manages collection Archive" in out


# ------------------------------------------------------------------------------ flows


def test_a_flow_that_takes_the_input_is_told_so(site, call):
    """The service judges a sample of the rule's input, and starts nothing."""
    schema = {"type": "object", "required": ["files"], "properties": {"files": {"type": "array"}}}
    site.flow(site.globus.flow(HELLO, schema), input={"files": "{files}"}, **{"from": site.krios})
    code, answer = call("globus", "check")

    assert (code, answer["ok"]) == (OK, True)
    assert {"flow", "flow's input"} <= {each["what"] for each in answer["checks"]}
    assert site.globus.runs() == []


def test_an_input_that_never_fits_is_told(site, call):
    """What no batch can mend is a fault of the rule."""
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}}
    site.flow(site.globus.flow(HELLO, schema), input={"count": "many"})
    code, answer = call("globus", "check")

    assert (code, list(faults(answer))) == (PERSON, ["flow's input"])
    assert "count" in faults(answer)["flow's input"]["why"]


def test_an_input_that_a_batch_makes_is_not_judged_by_its_sample(site, call):
    """A capture may be what the schema wants, so the sample's failure is no fault."""
    schema = {"type": "object", "properties": {"movie": {"type": "string", "pattern": "^[0-9]+$"}}}
    site.flow(site.globus.flow(HELLO, schema), input={"movie": "{movie}"}, label="{movie} of {rule}")
    code, answer = call("globus", "check")

    assert code == OK
    assert {each["what"]: each["why"] for each in answer["checks"]}["flow's input"].startswith("whether it fits")


def test_a_flow_that_may_not_be_started_is_told(site, call):
    """Seeing a flow is not starting it."""
    site.flow(site.globus.flow(HELLO, flow_starters=[]))
    code, answer = call("globus", "check")

    assert (code, list(faults(answer))) == (PERSON, ["permission to start the flow"])
    assert CLIENT in faults(answer)["permission to start the flow"]["hint"]


def test_a_flow_that_is_not_there_is_told(site, call):
    """A wrong UUID is found before a batch waits for it."""
    site.flow(NOBODY)
    code, answer = call("globus", "check")

    assert (code, list(faults(answer))) == (PERSON, ["flow"])


@pytest.mark.parametrize("proof", ["required", "none"])
def test_a_collection_that_forbids_checksums_is_told_to_who_wants_proofs(site, call, proof):
    """Batches would be sent, and never be proved."""
    site.globus.control("POST", "collection", {"id": site.archive, "directory": str(site.archive_dir),
                                               "display_name": "Archive", "disable_verify": True})  # fmt: skip
    start = {"globus_transfer": {"from": site.krios, "to": site.archive, "path": "/visits/v1"}}
    site.start(start, "movies", proof=proof)
    code, answer = call("globus", "check")

    assert code == (PERSON if proof == "required" else OK)
    assert list(faults(answer)) == ["destination collection"] * (proof == "required")


def test_a_flow_that_nobody_has_consented_to_wants_a_login(person, call, browser):
    """A person's login is for the flows of the rules at that time."""
    call("globus", "login")
    person.flow(person.globus.flow(HELLO))
    code, answer = call("globus", "check")
    assert (code, list(faults(answer))) == (PERSON, ["consent"]), answer

    assert call("globus", "login")[0] == OK
    assert call("globus", "check")[0] == OK


# -------------------------------------------------------------- rules check --online


COMPUTE = "https://auth.globus.org/scopes/facd7ccc-c5f4-42aa-916b-a0e270e2c2a9/all"


@pytest.mark.parametrize("trouble", ["", "offline", "no endpoint", "no function"])
def test_what_a_function_lacks_is_told(site, call, trouble):
    """Endpoint and function are there, and the endpoint is online: or it is said which is not, and what to do."""
    if trouble != "no endpoint":
        site.globus.endpoint("Cluster", online=trouble != "offline")
    if trouble != "no function":
        site.globus.function(function_id=named("count"), output=1, name="count")
    start = {"globus_compute": {"endpoint": named("Cluster"), "function": named("count")}}
    site.start(start, "count", proof="none")
    code, answer = call("globus", "check")

    wrong = faults(answer)
    assert code == (PERSON if trouble else OK)
    assert list(wrong) == {"": [], "no function": ["function"]}.get(trouble, ["endpoint"])
    assert all(one["hint"] for one in wrong.values())


def test_a_login_asks_for_compute_only_where_a_rule_needs_it(person, call, browser):
    """Nobody agrees to what nothing is done with."""
    assert call("globus", "login")[0] == OK
    start = {"globus_compute": {"endpoint": named("Cluster"), "function": named("count")}}
    person.start(start, "count", proof="none")
    assert call("globus", "login")[0] == OK

    assert [COMPUTE in scope for scope in browser.asked] == [False, True]


def test_rules_are_asked_about_online_on_demand(site, call):
    """Without --online nothing is asked; with it, a rule that the service would refuse needs a person."""
    site.rule(to=NOBODY)
    file = str(site.rules_dir / "rules.yaml")
    code, answer = call("rules", "check", file)
    assert (code, answer["ok"]) == (OK, True)
    assert "online" not in answer
    assert site.globus.requests("GET /v0.10/task_list") == []

    code, answer = call("rules", "check", "--online", file)
    assert (code, answer["ok"], answer["faults"]) == (PERSON, False, [])
    assert list(faults(answer, "online")) == ["destination collection"]


def test_faults_of_the_files_come_before_those_of_the_service(site, call):
    """A file that cannot be read is mended first."""
    site.rule(to="nonsense")
    code, answer = call("rules", "check", "--online")

    assert (code, answer["online"]) == (CONFIGURATION, [])
    assert site.globus.requests("GET /v0.10/task_list") == []


def test_rules_that_lack_nothing_pass_online(site, call, capsys):
    """The same checks as `globus check`."""
    assert call("rules", "check", "--online")[1]["online"] == call("globus", "check")[1]["checks"]
    assert cli.run(["rules", "check", "--online"]) == OK


def test_rules_without_globus_need_no_account(site, call):
    """Who copies to a disk is not asked for a client."""
    site.configure(client_id=None)
    site.start({"copy": {"to": str(site.base / "out")}}, "copy")

    assert call("rules", "check", "--online") == (
        OK, {"ok": True, "files": 1, "rules": 1, "faults": [], "notes": [], "online": []},
    )  # fmt: skip


# ----------------------------------------------------------------------------- timers


def test_a_timer_sends_what_the_daemon_has_not(site, call):
    """At its time, with nobody at work here, the service makes the destination equal by checksum."""
    code, answer = call("globus", "timer", "create", "movies", "--every", "1d")
    assert code == OK
    timer = answer["timer"]
    assert timer["name"].startswith("td movies ")
    assert timer["every_s"] == 86_400
    site.globus.wait(lambda: (site.archive_dir / "visits" / "v1" / "one.tif").exists())

    [listed] = call("globus", "timer", "list")[1]["timers"]
    assert listed["id"] == timer["id"]
    [task] = site.globus.tasks()
    assert (task["sync_level"], task["verify_checksum"], task["preserve_timestamp"]) == (3, True, True)


def test_a_timer_begins_when_it_is_told_to(site, call):
    """The first start is an instant with a zone, or a time of day in the settings' zone."""
    assert call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")[0] == OK
    [timer] = call("globus", "timer", "list")[1]["timers"]

    assert timer["next_time"] == "2099-01-01T02:30:00.000Z"
    assert site.globus.tasks() == []


def test_a_rule_has_one_timer(site, call):
    """To create it twice would read everything twice; the one that is there is named."""
    made = call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")[1]["timer"]
    code, answer = call("globus", "timer", "create", "movies")

    assert code == FAILURE
    assert made["id"] in answer["error"]
    assert len(call("globus", "timer", "list")[1]["timers"]) == 1


@pytest.mark.parametrize("reclaimed", ["movies", "other"])
def test_a_timer_replaces_no_only_copy(site, call, reclaimed):
    """The service does not know what was deleted here: a rule that lets sources go has no timer."""
    watch, (data, archive) = str(site.data), (site.krios, site.archive)
    start = {"globus_transfer": {"from": data, "to": archive, "path": "/visits/v1"}}
    rules = [{"name": "movies", "watch": watch, "match": ["*.tif"], "existing": "process", "start": start}]
    rules.append({**rules[0], "name": "other"})
    next(rule for rule in rules if rule["name"] == reclaimed)["reclaim"] = {"proven_by": ["movies"]}
    (site.rules_dir / "rules.yaml").write_text(json.dumps({"rules": rules}))
    code, answer = call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")

    assert (code, "replace the only copy" in answer["error"]) == (FAILURE, True)
    assert call("globus", "timer", "list")[1]["timers"] == []


@pytest.mark.parametrize(("path", "refused"), [("/visits/v1", True), ("/visits/v2", False)])
def test_a_timer_goes_nowhere_where_only_copies_lie(site, call, path, refused):
    """Of an earlier rule, too: the journal knows where they are."""
    copy = f"globus://{site.archive.upper()}/visits/v1/a/one.tif"
    copies = [{"rule": "gone", "run": 1, "time": 5.0, "copies": [["/data/one.tif", copy, "md5:1"]]}]
    with contextlib.closing(Journal.open(site.state)) as journal:
        of = ReclaimSet(1, 1, (ReclaimFile(1, "one.tif", (10, 7, 8, 9), ".h"),), copies)
        journal.append([ReclaimIntended(1, of, 10.0)])
        journal.append([ReclaimMoved(1, "confirmed", "", ("aside",), 20.0)])
    site.rule(path=path)
    code, answer = call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")

    assert code == (FAILURE if refused else OK)
    assert not refused or "all that is left" in answer["error"]


def test_a_timer_cannot_know_a_batch(site, call):
    """A destination that depends on captures is refused; what is the same for all batches is filled in."""
    site.rule(path="/visits/{movie}")
    code, answer = call("globus", "timer", "create", "movies")
    assert code == FAILURE
    assert "{movie}" in answer["error"]

    site.rule(path="/visits/{rule}")
    assert call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")[0] == OK


@pytest.mark.parametrize("words", [("--every", "5m"), ("--every", "often"), ("--start", "soon"),
                                   ("--start", "2001-01-01T00:00")])  # fmt: skip
def test_times_that_make_no_sense_are_refused(site, call, words):
    """The command was used wrongly, and nothing is created."""
    assert call("globus", "timer", "create", "movies", *words)[0] == USAGE
    assert call("globus", "timer", "list")[1]["timers"] == []


def test_a_timer_of_no_transfer_is_refused(site, call):
    """The rules that could have one are named."""
    code, answer = call("globus", "timer", "create", "other")

    assert code == FAILURE
    assert "movies" in answer["hint"]


def test_deleting_a_timer_is_asked_about(site, call, capsys, monkeypatch):
    """Without an answer it stays; with --yes it goes."""
    timer = call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")[1]["timer"]
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert cli.run(["globus", "timer", "delete", timer["id"]]) == INTERRUPTED
    assert len(call("globus", "timer", "list")[1]["timers"]) == 1

    assert call("globus", "timer", "delete", timer["id"], "--yes")[0] == OK
    assert call("globus", "timer", "list")[1]["timers"] == []
    assert call("globus", "timer", "delete", named("another"), "--yes")[0] == PERSON


def test_timers_are_listed_for_people(site, call, capsys):
    """Name, status and next run, and a line where there are none."""
    cli.run(["globus", "timer", "list"])
    assert "there are no timers" in capsys.readouterr().out

    call("globus", "timer", "create", "movies", "--start", "2099-01-01T02:30")
    cli.run(["globus", "timer", "list"])
    assert "2099-01-01" in capsys.readouterr().out
