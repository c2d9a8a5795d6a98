"""Laws of `globus flow deploy | update`: nothing faulty is sent, and no second flow comes of a repetition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from globus.emulator import Emulator

pytest.importorskip("globus_sdk")

from trigger_daemon import cli
from trigger_daemon.globus.deploys import KEPT, Deploy, Deploys, alone

CLIENT = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f"
OTHER = "8a3f6c1b-27d4-4b0e-8f65-1c9d2e7a4b30"
GROUP = "cccccccc-0000-4000-8000-000000000003"
SECRET = "not-a-secret"
HELLO = {"StartAt": "Hello", "States": {"Hello": {"Type": "Pass", "End": True}}}
SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
FAILURE, USAGE, CONFIGURATION, PERSON, INTERRUPTED = 1, 2, 3, 4, 130


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(tmp_path_factory.mktemp("globus")) as globus:
        yield globus


class Desk:
    """Somebody with the settings of a daemon and a definition in a file."""

    def __init__(self, globus: Emulator, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.globus, self.base, self.capsys = globus, base, capsys
        self.file, self.schema, self.state = base / "flow.json", base / "schema.json", base / "state"
        self.file.write_text(json.dumps(HELLO))
        self.schema.write_text(json.dumps(SCHEMA))

    def run(self, *words: str, form: str = "text") -> tuple[int, str, str]:
        code = cli.run(["-F", form, "globus", "flow", *words])
        shown = self.capsys.readouterr()
        return code, shown.out, shown.err

    def json(self, *words: str) -> Any:
        code, out, err = self.run(*words, form="json")
        assert code == 0, err
        return json.loads(out)

    def listed_after(self, span: str, *, really: float = 0.0) -> None:
        """Say when the command may take a flow for listed, and when it really is."""
        self.globus.settings(flow_listed_after_s=really)
        (self.base / "config.yaml").write_text(json.dumps({
            "state_dir": str(self.state), "rules_dir": str(self.base / "rules"),
            "globus": {"client_id": CLIENT, "listed_after": span},
        }))  # fmt: skip

    def sent(self, title: str = "Deliver", **about: Any) -> None:
        """Leave what a command leaves that was killed after it had noted what it would send."""
        Deploys(str(self.state / KEPT), 60.0).note(Deploy(CLIENT, title, time.time(), **about))

    def flows(self) -> list[dict[str, Any]]:
        sent = [one for one in self.globus.requests("POST /flows") if one["carried_out"] and one["status"] == 201]
        return [json.loads(one["body"]) for one in sent]


@pytest.fixture
def desk(
    service: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Desk:
    service.reset()
    service.client(CLIENT, SECRET)
    service.client(OTHER, SECRET)
    (tmp_path / "rules").mkdir()
    (tmp_path / "state").mkdir()
    for key, value in service.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TRIGGER_DAEMON_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET", SECRET)
    made = Desk(service, tmp_path, capsys)
    made.listed_after("500ms")
    return made


def test_a_definition_becomes_a_flow_that_validates_its_input(desk: Desk) -> None:
    """Definition, schema, words and people arrive as given; the id is what a rule needs."""
    told = desk.json(
        "deploy", str(desk.file), "--title", "Deliver", "--schema", str(desk.schema), "--subtitle", "a visit",
        "--keyword", "cryo", "--keyword", "em", "--starter", f"group:{GROUP}", "--viewer", "public",
    )  # fmt: skip

    (sent,) = desk.flows()
    assert (told["title"], told["created"]) == ("Deliver", True)
    assert (sent["definition"], sent["input_schema"], sent["subtitle"]) == (HELLO, SCHEMA, "a visit")
    assert (sent["keywords"], sent["flow_viewers"]) == (["cryo", "em"], ["public"])
    assert sent["flow_starters"] == [f"urn:globus:groups:id:{GROUP}"]
    assert told["link"].endswith(told["id"])


def test_a_repetition_makes_no_second_flow(desk: Desk) -> None:
    """The same title is refused with the command that changes it; --again is a wish."""
    first = desk.json("deploy", str(desk.file), "--title", "Deliver")
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert code == FAILURE
    assert f"update {first['id']}" in err
    assert len(desk.flows()) == 1
    assert desk.json("deploy", str(desk.file), "--title", "Deliver", "--again")["id"] != first["id"]


@pytest.mark.parametrize("kind", ["drop_after", "error_after", "cut"])
def test_a_lost_answer_is_looked_for(desk: Desk, kind: str) -> None:
    """The flow was made, its answer never came: it is found, and there is one."""
    desk.globus.fault("POST /flows", kind)
    told = desk.json("deploy", str(desk.file), "--title", "Deliver")

    assert told["created"]
    assert len(desk.flows()) == 1
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, told["id"] in err) == (FAILURE, True)


def test_what_was_surely_not_made_may_be_repeated(desk: Desk) -> None:
    """Nothing answered and nothing is there: the command says so, and repeating it makes the one."""
    desk.globus.fault("POST /flows", "error_before")
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, "was not made" in err, "repeat the command" in err) == (FAILURE, True, True)
    desk.listed_after("2s")
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, "looked for" in err, len(desk.flows())) == (0, False, 1)


def test_what_was_refused_may_be_mended_at_once(desk: Desk) -> None:
    """A refusal is an answer: nothing was made, and there is nothing to look for."""
    desk.globus.fault("POST /flows", "error_before", status=422)
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, "looked for" in err) == (FAILURE, False)

    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, "looked for" in err, len(desk.flows())) == (0, False, 1)


# ------------------------------------------------------------ a list that is late


def test_a_flow_that_is_listed_late_is_waited_for(desk: Desk) -> None:
    """A list that does not show a new flow proves nothing yet; what is waited for is said once."""
    desk.listed_after("60s", really=0.8)
    desk.globus.fault("POST /flows", "drop_after")
    code, out, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, err.count("it is looked for"), len(desk.flows())) == (0, 1, 1)
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, out.split()[0] in err, len(desk.flows())) == (FAILURE, True, 1)


def test_a_flow_that_was_made_just_now_is_known_before_it_is_listed(desk: Desk) -> None:
    """The command remembers the id, and asks for the flow itself; one that was deleted is no hindrance."""
    desk.listed_after("60s", really=3_600)
    first = desk.json("deploy", str(desk.file), "--title", "Deliver")["id"]
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, f"update {first}" in err, len(desk.flows())) == (FAILURE, True, 1)
    assert desk.json("deploy", str(desk.file), "--title", "Deliver", "--again")["id"] != first
    desk.globus.settings(flow_listed_after_s=0)
    desk.sent("Deleted", flow=OTHER)
    assert desk.json("deploy", str(desk.file), "--title", "Deleted")["created"]


def test_a_command_killed_before_the_answer_makes_no_second_flow(desk: Desk) -> None:
    """Repeated at once, with a list that does not show the flow yet: what was noted before it was sent is enough."""
    desk.listed_after("60s", really=2)
    desk.globus.fault("POST /flows", "delay", seconds=20, when="after")
    command = [sys.executable, "-P", "-m", "trigger_daemon", "globus", "flow", "deploy", str(desk.file)]
    with subprocess.Popen([*command, "--title", "Deliver"], env=os.environ) as process:
        try:
            desk.globus.wait(desk.flows)
        finally:
            process.kill()
    told = desk.json("deploy", str(desk.file), "--title", "Deliver")

    assert (told["created"], len(desk.flows())) == (True, 1)
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")
    assert (code, told["id"] in err, len(desk.flows())) == (FAILURE, True, 1)


def test_a_command_killed_before_it_sent_anything_costs_a_wait(desk: Desk) -> None:
    """What was noted may never have been sent: once it would be listed, the flow is made."""
    desk.sent()
    before = time.monotonic()
    told = desk.json("deploy", str(desk.file), "--title", "Deliver")

    assert told["created"]
    assert time.monotonic() - before >= 0.3
    assert len(desk.flows()) == 1


def test_a_flow_of_another_content_is_not_taken_for_ours(desk: Desk) -> None:
    """The same title and another definition: somebody else's work, told with its id, and nothing is made."""
    theirs = desk.globus.flow({**HELLO, "Comment": "another"}, title="Deliver", flow_owner=CLIENT)
    desk.sent()
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, f"already: {theirs}" in err, desk.flows()) == (FAILURE, True, [])


def test_a_service_that_goes_away_meanwhile_is_asked_again(desk: Desk) -> None:
    """A look that fails proves nothing: it is repeated as long as there is time."""
    desk.listed_after("60s", really=0.5)
    desk.globus.fault("POST /flows", "drop_after")
    desk.globus.fault("GET /flows", "refuse", skip=1, times=3)

    assert desk.json("deploy", str(desk.file), "--title", "Deliver")["created"]
    assert len(desk.flows()) == 1


def test_what_cannot_be_looked_for_stays_unknown(desk: Desk) -> None:
    """A service that stays away lets nobody say that there is no flow; a repetition finds it."""
    desk.globus.fault("POST /flows", "drop_after")
    desk.globus.fault("GET /flows", "refuse", skip=1, times=1_000)
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, "is not known" in err, "not made" in err) == (FAILURE, True, False)
    assert "looks for the flow before it makes one" in err
    desk.globus.clear_faults()
    assert desk.run("deploy", str(desk.file), "--title", "Deliver")[0] == FAILURE
    assert len(desk.flows()) == 1


def test_who_does_not_wait_is_told_what_is_not_known(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it is looked for: how long a repetition has to wait, and it makes no second flow."""
    desk.listed_after("2m", really=1)
    desk.globus.fault("POST /flows", "drop_after")
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", _interrupt)
        code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, "is not known" in err, "after 2 min" in err) == (INTERRUPTED, True, True)
    assert desk.json("deploy", str(desk.file), "--title", "Deliver")["created"]
    assert len(desk.flows()) == 1


def _interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_two_commands_at_once_make_one_flow(desk: Desk) -> None:
    """The second is refused before it asks for anything, and is let in when the first has ended."""
    with alone(str(desk.state), 60.0):
        code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, "under way" in err, desk.flows()) == (FAILURE, True, [])
    assert desk.json("deploy", str(desk.file), "--title", "Deliver")["created"]


def test_what_cannot_be_noted_is_not_sent(desk: Desk) -> None:
    """Without a state directory, or with notes that say nothing, no promise could be kept."""
    (desk.state / KEPT).write_text("[1")
    assert "cannot be understood" in desk.run("deploy", str(desk.file), "--title", "Deliver")[2]
    (desk.state / KEPT).unlink()
    for left in desk.state.iterdir():
        left.unlink()
    desk.state.rmdir()
    code, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (code, str(desk.state) in err, desk.flows()) == (FAILURE, True, [])


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "kind, status, code, hint",
    [
        ("error_before", 400, FAILURE, "mend what it names, and repeat the command"),
        ("error_before", 422, FAILURE, "mend what it names, and repeat the command"),
        ("error_before", 401, FAILURE, "try again; if it stays, run `trigger-daemon globus login`"),
        ("error_before", 409, FAILURE, "try again once"),
        ("error_before", 503, FAILURE, "try again later"),
        ("rate_limited", 429, FAILURE, "try again later"),
        ("refuse", 0, FAILURE, "try again later"),
        ("error_before", 403, PERSON, "globus whoami"),
        ("error_before", 404, PERSON, "is the id right"),
    ],
)
def test_a_refusal_says_what_its_reader_can_do(desk: Desk, kind: str, status: int, code: int, hint: str) -> None:
    """Nothing repeats a command that a person gave, and there is no run; 4 is only for who must act at Globus."""
    more = {"status": status} if kind == "error_before" else {}
    desk.globus.fault("GET /flows", kind, times=2, **more)
    told, _, err = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert (told, hint in err) == (code, True), err
    for words in ("by itself", "runs retry", "in the rule", "the run"):
        assert words not in err


def test_a_flow_of_somebody_else_is_no_hindrance(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles are compared among the account's own flows only; another's cannot be changed."""
    theirs = desk.globus.flow(HELLO, title="Deliver", owner=OTHER)
    mine = desk.json("deploy", str(desk.file), "--title", "Deliver")["id"]

    assert mine != theirs
    code, _, err = desk.run("update", theirs, str(desk.file))
    assert (code, "UPDATE" in err) == (PERSON, True)


def test_nothing_faulty_is_sent(desk: Desk) -> None:
    """A dangling state is told with its place, and the service hears of nothing."""
    desk.file.write_text('{"StartAt": "Hello",\n "States": {"Hello": {"Type": "Pass", "Next": "Gone"}}}')
    code, out, _ = desk.run("deploy", str(desk.file), "--title", "Deliver")

    assert code == CONFIGURATION
    assert f"{desk.file}:2:" in out
    assert desk.globus.requests("* /flows*") == []
    desk.file.write_text(json.dumps(HELLO))
    desk.schema.write_text('{"type": "nonsense"}')
    assert desk.run("deploy", str(desk.file), "--title", "D", "--schema", str(desk.schema))[0] == CONFIGURATION
    assert desk.globus.requests("* /flows*") == []


def test_update_changes_only_what_is_given(desk: Desk) -> None:
    """Title, people and schema stay unless they are named; doing it twice is doing it once."""
    flow = desk.json("deploy", str(desk.file), "--title", "Deliver", "--schema", str(desk.schema))["id"]
    new = {"StartAt": "Bye", "States": {"Bye": {"Type": "Pass", "End": True}}}
    desk.file.write_text(json.dumps(new))
    for _ in range(2):
        told = desk.json("update", flow, str(desk.file), "--description", "says goodbye")

    assert told == {**told, "id": flow, "title": "Deliver", "created": False}
    sent = [json.loads(one["body"]) for one in desk.globus.requests("PUT /flows/*")]
    assert sent == [{"definition": new, "description": "says goodbye"}] * 2


def test_people_that_are_not_understood_are_a_fault_of_usage(desk: Desk) -> None:
    """A name is no principal: it is refused here, with the form to write."""
    code, _, err = desk.run("deploy", str(desk.file), "--title", "D", "--starter", "ada@example.org")

    assert (code, "identity:UUID" in err) == (USAGE, True)
    assert desk.globus.requests("* /flows*") == []
