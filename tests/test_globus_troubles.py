"""What a Globus that is slow, odd or forgetful, and people who decide meanwhile, must not bring about.

No second run or task, no proof of another version, nothing that is stuck in
silence, and nothing begun that nobody wants any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.globus.emulator import Emulator, named
from tests.globus.facility import CLIENT, SECRET, Facility

pytest.importorskip("globus_sdk")

from trigger_daemon import actions
from trigger_daemon.actions import _globus_polls, globus_flow, globus_transfer
from trigger_daemon.config import Settings, parse_rules
from trigger_daemon.globus import account, judging, service
from trigger_daemon.globus.faults import Trouble

WAIT = {"StartAt": "Rest", "States": {"Rest": {"Type": "Wait", "Seconds": 600, "End": True}}}
PASS = {"StartAt": "Note", "States": {"Note": {"Type": "Pass", "End": True}}}
UUID = "aaaaaaaa-0000-4000-8000-000000000001"


@pytest.fixture
def facility(tmp_path: Path) -> Iterator[Facility]:
    with Facility(tmp_path) as made:
        yield made


class Desk:
    """One action by itself, with a service."""

    def __init__(self, base: Path, globus: Emulator) -> None:
        self.base, self.globus = base, globus
        self.data = base / "krios"
        self.data.mkdir()
        globus.client(CLIENT, SECRET)
        self.krios = globus.collection("Krios", self.data)
        self.archive = globus.collection("Archive", base / "archive")
        self.made: list[Any] = []

    def action(self, kind: Any, **settings: Any) -> Any:
        plain = {"client_id": CLIENT, "client_secret": SECRET, "poll_s": 0.01, "listed_after_s": 3.0,
                 "collections": {self.krios: {str(self.data): "/"}}, **settings}  # fmt: skip
        place = self.base / "state" / "actions" / f"x{len(self.made)}"
        place.mkdir(parents=True)
        made = kind.Action(actions.Context(str(place), lambda run, attempt: None, settings={"globus": plain}))
        self.made.append(made)
        return made

    def request(self, options: dict[str, Any], *names: str, run: int = 1) -> actions.Request:
        files = []
        for name in names:
            path = self.data / name
            if not path.exists():
                path.write_bytes(os.urandom(50))
            seen = path.stat()
            files.append(actions.File(str(self.data), name, seen.st_size, seen.st_mtime_ns))
        return actions.Request(run, 1, "move", {}, {}, tuple(files), options)

    def transfer(self, *names: str, path: str = "/") -> actions.Request:
        options = {"from": self.krios, "to": self.archive, "path": path, "deadline": 600.0, "stuck_after": 600.0,
                   "stuck": "cancel"}  # fmt: skip
        return self.request(options, *names)

    def ended(self) -> None:
        self.globus.wait(lambda: self.globus.tasks()[-1]["status"] in ("SUCCEEDED", "FAILED"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with Emulator(tmp_path / "globus") as globus:
        for key, value in globus.environment().items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("GLOBUS_SDK_HTTP_TIMEOUT", "30")
        made = Desk(tmp_path, globus)
        yield made
        for action in made.made:
            action.close()


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (actions.Unknown, actions.Refused) as error:
        return error


# ----------------------------------------------------------------- started once


def test_a_start_that_has_not_been_answered_is_not_repeated(desk: Desk) -> None:
    """Its caller has given it up long ago, its answer will be lost, and the run is listed late: there is one run."""
    action = desk.action(globus_flow)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    prepared = action.prepare(request)
    desk.globus.settings(run_listed_after_s=2)
    desk.globus.fault("POST /flows/*/run", "delay", seconds=4)
    desk.globus.fault("POST /flows/*/run", "drop_after")
    first = threading.Thread(target=lambda: outcome(lambda: action.start(request, prepared)))
    first.start()
    desk.globus.wait(lambda: action._sent._under_way)
    handle: Any = None
    end = time.monotonic() + 30
    while not isinstance(handle, dict) and time.monotonic() < end:
        handle = outcome(lambda: action.find(request, prepared) or action.start(request, prepared))
        time.sleep(0.2)
    first.join()

    assert [run["run_id"] for run in desk.globus.runs()] == [handle["run"]]


@pytest.mark.parametrize("without", [["tags"], ["label"]])
def test_a_run_is_known_by_its_label_or_its_tags(desk: Desk, without: list[str]) -> None:
    """Whichever the list tells: the answer of its start was lost, and it is not started again."""
    desk.globus.settings(runs_listed_without=without)
    action = desk.action(globus_flow, listed_after_s=0.0)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    prepared = action.prepare(request)
    desk.globus.fault("POST /flows/*/run", "drop_after")
    assert isinstance(outcome(lambda: action.start(request, prepared)), actions.Unknown)
    found = outcome(lambda: action.find(request, prepared) or action.start(request, prepared))

    assert [found["run"]] == [run["run_id"] for run in desk.globus.runs()]


def test_a_list_that_names_no_run_proves_nothing(desk: Desk) -> None:
    """With neither labels nor tags, a run that stands there may be ours: it is not started again."""
    desk.globus.settings(runs_listed_without=["tags", "label"])
    action = desk.action(globus_flow, listed_after_s=0.0)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    prepared = action.prepare(request)
    desk.globus.fault("POST /flows/*/run", "drop_after")
    outcome(lambda: action.start(request, prepared))

    with pytest.raises(actions.Unknown, match="neither labels nor tags"):
        action.find(request, prepared)
    assert len(desk.globus.runs()) == 1


@pytest.mark.parametrize("orders", [("cancel",), ("hold", "abandon")])
@pytest.mark.parametrize("kind", ["flow", "transfer"])
def test_what_a_person_has_ended_is_never_begun(facility: Facility, kind: str, orders: tuple[str, ...]) -> None:
    """Its start came to nothing that could be told, and somebody decided: it does not come up again."""
    rule = facility.flow("note", facility.globus.flow(PASS)) if kind == "flow" else facility.transfer("note")
    facility.site.write_rules(rule)
    facility.globus.fault("POST /flows/*/run" if kind == "flow" else "POST /v0.10/transfer", "error_before", times=2)
    facility.start()
    facility.write("note")
    (run,) = facility.until("note", "STARTING")
    for order in orders:
        facility.site.cli("runs", order, str(run))

    facility.until("note", "CANCELLED" if orders == ("cancel",) else "ABANDONED", timeout_s=40)
    facility.site.until(lambda: facility.show(run)["final"], 40, "nothing is under way")
    assert facility.globus.runs() == facility.globus.tasks() == []


@pytest.mark.parametrize("kind", ["flow", "transfer"])
def test_what_was_taken_after_all_is_ended_for_who_has_cancelled_it(facility: Facility, kind: str) -> None:
    """The answer was lost, and the service has it: it is found, and cancelled there."""
    rule = facility.flow("note", facility.globus.flow(WAIT)) if kind == "flow" else facility.transfer("note")
    facility.site.write_rules(rule)
    facility.globus.mood("Archive", down="ENDPOINT_TOO_BUSY")
    facility.globus.settings(run_listed_after_s=1)
    post = "POST /flows/*/run" if kind == "flow" else "POST /v0.10/transfer"
    facility.globus.fault(post, "drop_after")
    facility.globus.fault(post, "error_before", times=100)
    facility.start()
    facility.write("note")
    (run,) = facility.until("note", "STARTING")
    facility.site.cli("runs", "cancel", str(run))

    facility.until("note", "CANCELLED", timeout_s=40)
    (found,) = facility.globus.runs() if kind == "flow" else facility.globus.tasks()
    assert found["status"] == "FAILED"


def settled(action: Any, request: actions.Request, prepared: Any) -> Any:
    """Return what becomes of a start whose answer was lost, asked as the daemon asks."""
    end = time.monotonic() + 20
    while isinstance(answer := outcome(lambda: action.find(request, prepared) or action.start(request, prepared)),
                     actions.Unknown) and time.monotonic() < end:  # fmt: skip
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("status", [400, 403, 413])
def test_a_refusal_says_nothing_of_the_submission_before(desk: Desk, status: int) -> None:
    """By a proxy, or by whomever: what was taken is found by its label."""
    desk.globus.speed(task_seconds=60)
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    desk.globus.fault("POST /v0.10/transfer", "drop_after")
    assert isinstance(outcome(lambda: action.start(request, prepared)), actions.Unknown)
    desk.globus.fault("POST /v0.10/transfer", "error_before", status=status, times=100, body={})
    answer = settled(action, request, prepared)

    assert [task["task_id"] for task in desk.globus.tasks()] == [answer["task"]]


def test_a_forgotten_id_is_not_taken_for_a_refused_task(desk: Desk) -> None:
    """Taken, its answer lost, its id forgotten by the service, and a clock of ours that was set back."""
    desk.globus.settings(submission_id_memory_s=60)
    desk.globus.speed(task_seconds=60)
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    desk.globus.fault("POST /v0.10/transfer", "drop_after")
    outcome(lambda: action.start(request, prepared))
    desk.globus.clock(advance_s=7_200)
    later = desk.action(globus_transfer)

    assert [task["task_id"] for task in desk.globus.tasks()] == [settled(later, request, prepared)["task"]]


def test_what_was_never_submitted_gets_an_id_of_its_own(desk: Desk) -> None:
    """Killed before the POST, and back when the service has forgotten the id: nobody else could mend it."""
    desk.globus.settings(submission_id_memory_s=60)
    action = desk.action(globus_transfer, listed_after_s=0.2)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    desk.globus.clock(advance_s=7_200)
    later = desk.action(globus_transfer, listed_after_s=0.2)
    answer = settled(later, request, prepared)
    assert isinstance(answer, actions.Refused) and answer.fault.kind == "transient"
    again = replace(request, attempt=2)

    assert later.start(again, later.prepare(again))["task"] == desk.globus.tasks()[0]["task_id"]


def test_a_first_refusal_needs_no_looking_for(desk: Desk) -> None:
    """Nothing was sent before it: a person is told at once."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    desk.globus.fault("POST /v0.10/transfer", "error_before", status=413, body={})
    answer = outcome(lambda: action.start(request, prepared))

    assert isinstance(answer, actions.Refused) and answer.fault.kind == "permanent"


def test_too_many_tasks_are_told_as_that(desk: Desk) -> None:
    """Not as another transfer of the same paths."""
    desk.globus.settings(pending_max=0)
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    answer = outcome(lambda: action.start(request, action.prepare(request)))

    assert isinstance(answer, actions.Refused)
    assert ("as many transfers" in answer.fault.why, answer.fault.kind) == (True, "transient")


@pytest.mark.parametrize("number", ["../../../evil", None, 7])
def test_a_task_without_an_id_is_not_believed(desk: Desk, number: Any) -> None:
    """Least of all as the name of a file."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    task = {"task_id": number, "status": "ACTIVE", "label": prepared["label"]}
    desk.globus.fault("GET /v0.10/task_list", "error_before", status=200, body={"DATA": [task]})

    assert isinstance(outcome(lambda: action.find(request, prepared)), actions.Unknown)


def test_a_stuck_task_is_cancelled_until_it_has_ended(desk: Desk) -> None:
    """The first wish is answered by a 503."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    request.options["stuck_after"] = 0.0  # type: ignore[index]
    desk.globus.mood("Archive", denied=["/"])
    handle = action.start(request, action.prepare(request))
    desk.globus.wait(lambda: desk.globus.tasks()[0]["faults"])
    desk.globus.fault("POST /v0.10/task/*/cancel", "error_before", status=503)

    desk.globus.wait(lambda: getattr(outcome(lambda: action.poll(request, handle)), "status", "") == "failed")
    assert len(desk.globus.requests("POST /v0.10/task/*/cancel")) == 2


@pytest.mark.parametrize("kind", ["flow", "transfer"])
def test_a_cancel_that_was_not_heard_is_repeated(facility: Facility, kind: str) -> None:
    """The service was busy when a person wished the end."""
    facility.before = "import trigger_daemon.core.runs as runs; runs.CANCEL_AGAIN_S = 1.0; "
    facility.before += "runs.Runs._wish_end.__defaults__ = (1.0,)"
    rule = facility.flow("note", facility.globus.flow(WAIT)) if kind == "flow" else facility.transfer("note")
    facility.site.write_rules(rule)
    facility.globus.mood("Archive", down="ENDPOINT_TOO_BUSY")
    route = "POST /runs/*/cancel" if kind == "flow" else "POST /v0.10/task/*/cancel"
    facility.globus.fault(route, "error_before", status=503)
    facility.start()
    facility.write("note")
    (run,) = facility.until("note", "ACTIVE")
    facility.site.until(lambda: facility.show(run)["handle"], 10, "it is under way")
    facility.site.cli("runs", "cancel", str(run))

    facility.until("note", "CANCELLED")


def test_a_retry_after_refused_access_sends_nothing_again(facility: Facility) -> None:
    """The copy is proved: only what came after it is done again."""
    facility.site.write_rules(facility.transfer(access=[f"identity:{UUID}"]))
    facility.globus.fault("POST /v0.10/endpoint/*/access", "error_before", status=403, code="PermissionDenied")
    facility.start()
    facility.write("move")
    (run,) = facility.until("move", "HELD")
    facility.site.cli("runs", "retry", str(run))
    facility.until("move", "VERIFIED")

    assert len(facility.globus.tasks()) == 1
    assert len(facility.globus.access(facility.archive)) == 1


# --------------------------------------------------------------------- what cannot be sent


def test_a_name_that_cannot_be_sent_is_told_alone(facility: Facility) -> None:
    """Before a batch holds it, and once it has another name it goes."""
    facility.site.write_rules(facility.transfer(rule={"batch": {"idle": "1s"}}))
    bad = facility.site.data / "move" / "b\udcff.tif"
    bad.write_bytes(b"x")
    facility.write("move", "a.tif")
    facility.start()
    facility.until("move", "VERIFIED")
    (blocked,) = facility.site.json("files", "list", "--stage", "blocked")["files"]
    assert "not UTF-8" in blocked["because"]
    bad.rename(bad.with_name("b.tif"))

    facility.until("move", "VERIFIED", "VERIFIED")
    assert sorted(path.name for path in (facility.site.out / "raw" / "move").iterdir()) == ["a.tif", "b.tif"]



@pytest.mark.parametrize(("name", "path"), [("~/a", "/"), ("~b", "/"), ("a", "/~"), ("a", "/~/x"), ("a", "/../x")])
def test_a_path_that_globus_takes_for_another_is_refused(desk: Desk, name: str, path: str) -> None:
    """A directory that is called ~ would be sent to, or from, somebody's home, and proved."""
    (desk.data / "~").mkdir()
    action = desk.action(globus_transfer)
    request = desk.transfer(name, path=path)

    assert isinstance(outcome(lambda: action.prepare(request)), actions.Refused)
    assert action.refuses({**request.options, "path": path}, str(desk.data), name)


def test_a_name_within_a_path_may_be_a_tilde(desk: Desk) -> None:
    """Only what a path begins with is a home directory."""
    (desk.data / "x" / "~").mkdir(parents=True)
    action = desk.action(globus_transfer)
    request = desk.transfer("x/~/a")
    handle = action.start(request, action.prepare(request))
    desk.ended()

    assert isinstance(action.verify(request, handle), actions.Proof)
    assert (desk.base / "archive" / "x" / "~" / "a").read_bytes() == (desk.data / "x" / "~" / "a").read_bytes()


def test_what_is_gone_is_left_out_and_the_others_go(desk: Desk) -> None:
    """As with any action: a batch is not held by what is no more."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", "b", "c")
    (desk.data / "b").unlink()
    (desk.data / "c").write_bytes(b"another version")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    proof = action.verify(request, handle)

    assert [item["source_path"] for item in desk.globus.items(handle["task"])] == ["/a"]
    assert ([member["path"] for member in proof.members], proof.changed) == (["a"], ("b", "c"))


def test_what_vanishes_from_a_task_is_left_out_of_the_next(desk: Desk) -> None:
    """The task can never end well, and its files are no fault of anybody who could mend it."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", "b")
    request.options["stuck_after"] = 0.0  # type: ignore[index]
    prepared = action.prepare(request)
    (desk.data / "b").unlink()
    handle = action.start(request, prepared)
    desk.globus.wait(lambda: desk.globus.tasks()[0]["faults"])
    desk.globus.wait(lambda: action.poll(request, handle).status == "failed")
    told = action.poll(request, handle)
    assert told.fault.kind == "transient" and "1 of 2 files have changed or are gone" in told.why
    again = replace(request, attempt=2)
    handle = action.start(again, action.prepare(again))
    desk.ended()

    assert [member["path"] for member in action.verify(again, handle).members] == ["a"]


def test_what_is_back_again_is_not_proved_by_having_been_left_out(desk: Desk) -> None:
    """It is sent, then."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", "b")
    (desk.data / "b").rename(desk.base / "b")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    (desk.base / "b").rename(desk.data / "b")
    answer = action.verify(request, handle)

    assert isinstance(answer, actions.Differs) and list(answer.which) == ["b"]


def test_a_batch_that_is_gone_asks_nobody(desk: Desk) -> None:
    """Nothing is submitted, and it is superseded."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    (desk.data / "a").unlink()
    prepared = action.prepare(request)
    assert action.find(request, prepared) is None and action.look(request, prepared) is None
    handle = action.start(request, prepared)

    assert action.poll(request, handle).status == "succeeded"
    assert action.verify(request, handle) == actions.Proof((), ("a",))
    assert desk.globus.tasks() == []


def test_a_share_that_is_away_is_waited_for_before_anything_is_sent(desk: Desk) -> None:
    """Its files are not gone."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    desk.data.rename(desk.base / "away")
    answer = outcome(lambda: action.prepare(request))

    assert isinstance(answer, actions.Refused) and answer.fault.kind == "transient"


# --------------------------------------------------------------------- odd answers


@pytest.mark.parametrize("odd", [
    None, {"task_id": UUID}, {"task_id": UUID, "status": "FAILED"}, {"status": "ACTIVE"}, {"verify_checksum": None},
    {"subtasks_failed": None}, {"files_skipped": "none"},
])  # fmt: skip
def test_an_odd_answer_at_the_proof_sends_nothing_again(desk: Desk, odd: dict[str, Any] | None) -> None:
    """It says nothing of what was delivered: the service is asked again."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    body = {} if odd is None else {**desk.globus.tasks()[0], **odd}
    desk.globus.fault("GET /v0.10/task/*", "error_before", status=200, body=body)
    answer = action.verify(request, handle)

    assert isinstance(answer, actions.Unproven) and answer.fault.kind == "transient"
    assert isinstance(action.verify(request, handle), actions.Proof)


@pytest.mark.parametrize("body", [{}, {"run_id": UUID, "status": "FAILED"}, {"status": "DONE"}, {"status": None}])
def test_an_odd_answer_does_not_end_a_run(desk: Desk, body: dict[str, Any]) -> None:
    """Only the provider's word that it has ended ends it: another attempt would be a second run."""
    action = desk.action(globus_flow)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    handle = action.start(request, action.prepare(request))
    desk.globus.fault("GET /runs/*", "error_before", status=200, body={"run_id": handle["run"], **body})

    assert isinstance(outcome(lambda: action.poll(request, handle)), actions.Unknown)
    assert action.poll(request, handle).status == "active"


@pytest.mark.parametrize("answer", [{"run_id": None}, {"run_id": "soon"}, {}])
def test_a_start_without_an_id_is_no_start(desk: Desk, answer: dict[str, Any]) -> None:
    """What was started is looked for."""
    action = desk.action(globus_flow)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    desk.globus.fault("POST /flows/*/run", "error_before", status=200, body=answer)

    assert isinstance(outcome(lambda: action.start(request, action.prepare(request))), actions.Unknown)


def test_a_status_that_is_not_known_is_told(desk: Desk) -> None:
    """Not as if all were well."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    task = {"DATA_TYPE": "task", "task_id": handle["task"], "status": "RESTING", "nice_status": None}
    body = {"DATA_TYPE": "task_list", "DATA": [task]}
    desk.globus.fault("GET /v0.10/task_list", "error_before", status=200, body=body)

    assert "RESTING" in str(outcome(lambda: action.poll(request, handle)))


@pytest.mark.parametrize("odd", [
    {"fatal_error": "CANCELED"}, {"fatal_error": ["x"]}, {"files_transferred": "many"}, {"faults": {}, "files": []},
])  # fmt: skip
def test_a_task_in_odd_shapes_is_told_in_words(desk: Desk, odd: dict[str, Any]) -> None:
    """What is a text or a list in place of something else is read as well as it can be, and is no mistake of ours."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    task = {**desk.globus.tasks()[0], "status": "FAILED", **odd}
    body = {"DATA_TYPE": "task_list", "DATA": [task]}
    desk.globus.fault("GET /v0.10/task_list", "error_before", status=200, probability=1.0, body=body)
    told = action.poll(request, handle)

    assert told.status == ("cancelled" if odd.get("fatal_error") == "CANCELED" else "failed")


@pytest.mark.parametrize("details", ["the visit is over", ["a"], None, 7])
def test_a_flow_in_odd_shapes_is_told_in_words(desk: Desk, details: Any) -> None:
    """Details that are a text are the words."""
    action = desk.action(globus_flow)
    request = desk.request({"flow": desk.globus.flow(WAIT), "input": {}, "label": "x", "path": "/"}, "a")
    handle = action.start(request, action.prepare(request))
    body = {"run_id": handle["run"], "status": "FAILED", "details": details}
    desk.globus.fault("GET /runs/*", "error_before", status=200, body=body)
    told = action.poll(request, handle)

    assert told.status == "failed"
    assert ("the visit is over" in told.why) is (details == "the visit is over")


def test_a_task_in_the_services_queue_is_told(desk: Desk) -> None:
    """Other tasks of the account are active: nothing is wrong, and nothing moves."""
    desk.globus.settings(running_max=0)
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    told = action.poll(request, action.start(request, action.prepare(request)))

    assert told.status == "active"
    assert "the service's queue" in told.why


def test_an_error_that_comes_and_goes_does_not_hide_that_nothing_moves(desk: Desk) -> None:
    """Only what is moved counts as moving; a look that says OK in between neither resets that nor ends a task."""
    action = desk.action(globus_transfer, poll_s=1e-6)
    request = desk.transfer("a")
    request.options["stuck_after"] = 0.5
    desk.globus.mood("Archive", denied=["/"])
    handle = action.start(request, action.prepare(request))
    desk.globus.wait(lambda: desk.globus.tasks()[0]["faults"])
    task = desk.globus.tasks()[0]

    def look(**said: Any) -> actions.Progress:
        desk.globus.clear_faults()
        body = {"DATA_TYPE": "task_list", "DATA": [{**task, **said}]}
        desk.globus.fault("GET /v0.10/task_list", "error_before", status=200, probability=1.0, body=body)
        found: actions.Progress = action.poll(request, handle)
        return found

    began = time.monotonic()
    assert "repeats" in look(nice_status="PERMISSION_DENIED").why
    while time.monotonic() - began < 0.6:
        look(nice_status="OK")
    told = look(nice_status="OK")
    assert (told.status, "has not moved since PERMISSION_DENIED" in told.why) == ("inactive", True)
    assert not desk.globus.requests("POST /v0.10/task/*/cancel")
    assert look(nice_status="OK", bytes_transferred=1) == actions.Progress("active", again_in_s=ANY, bytes_done=1)
    assert "repeats" in look(nice_status="PERMISSION_DENIED", bytes_transferred=1).why


def test_a_flow_goes_on_once_its_consent_is_given(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is resumed now and then, since only that tells whether the consent is there; no second run is started."""
    import globus_sdk

    now = time.monotonic()
    monkeypatch.setattr(globus_flow.time, "monotonic", lambda: now)
    items = [{"source_path": "/a.tif", "destination_path": "/visit/a.tif"}]
    deliver = {"Type": "Action", "ActionUrl": "https://transfer.actions.globus.org/transfer", "ResultPath": "$.done",
               "End": True, "WaitTime": 600,
               "Parameters": {"source_endpoint": desk.krios, "destination_endpoint": desk.archive, "DATA": items},
               }  # fmt: skip
    flow = desk.globus.flow({"StartAt": "Deliver", "States": {"Deliver": deliver}})
    desk.globus.require_consent("Archive")
    action = desk.action(globus_flow)
    request = desk.request({"flow": flow, "input": {}, "label": "x", "path": "/"}, "a.tif")
    handle = action.start(request, action.prepare(request))
    desk.globus.wait(lambda: desk.globus.runs()[0]["status"] == "INACTIVE")
    told = action.poll(request, handle)
    assert "waits for a consent" in told.why
    assert "runs retry" not in told.hint
    resumed = "POST /runs/*/resume"
    action.poll(request, handle)
    assert len(desk.globus.requests(resumed)) == 0, "its consent was missing a moment ago"
    for _ in range(3):
        now += globus_flow.RESUME_S
        action.poll(request, handle)
        desk.globus.wait(lambda: desk.globus.runs()[0]["status"] == "INACTIVE")
    assert len(desk.globus.requests(resumed)) == 2, "more seldom each time"

    app = globus_sdk.ClientApp("person", client_id=CLIENT, client_secret=SECRET,
                               config=globus_sdk.GlobusAppConfig(token_storage="memory"))  # fmt: skip
    globus_sdk.TransferClient(app=app).add_app_data_access_scope(desk.archive)
    app.login(force=True)
    now += globus_flow.RESUME_LONGEST_S
    action.poll(request, handle)
    desk.globus.wait(lambda: desk.globus.runs()[0]["status"] == "SUCCEEDED")
    assert len(desk.globus.runs()) == 1


def test_a_path_may_be_written_otherwise_by_the_service(desk: Desk) -> None:
    """Slashes more or less are the same path."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", path="/raw//deep/")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    item = {"source_path": "//a", "destination_path": "/raw//deep/a", "size": 50}
    body = {"DATA_TYPE": "successful_transfers", "marker": 0, "next_marker": None, "DATA": [item]}
    desk.globus.fault("GET /v0.10/task/*/successful_transfers", "error_before", status=200, body=body)

    assert isinstance(action.verify(request, handle), actions.Proof)


def test_a_list_that_does_not_end_is_not_read_for_ever(desk: Desk) -> None:
    """Each page says that there is another one."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    item = {"source_path": "/x", "destination_path": "/x", "size": 50}
    body = {"DATA_TYPE": "successful_transfers", "marker": 0, "next_marker": 5, "DATA": [item] * 1_000}
    desk.globus.fault(
        "GET /v0.10/task/*/successful_transfers", "error_before", status=200, probability=1.0, body=body
    )

    assert isinstance(action.verify(request, handle), actions.Differs)


# --------------------------------------------------------------------------- proofs


def test_a_task_that_has_compared_nothing_proves_nothing(desk: Desk) -> None:
    """A collection can forbid the comparison, whatever is asked for."""
    body = {"id": desk.archive, "directory": str(desk.base / "archive"), "display_name": "Archive"}
    desk.globus.control("POST", "collection", {**body, "disable_verify": True})
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    answer = action.verify(request, handle)

    assert isinstance(answer, actions.Unproven)
    assert (answer.fault.kind, "disable_verify" in answer.fault.hint) == ("person", True)


def test_what_is_foreign_makes_up_for_nothing(desk: Desk) -> None:
    """A list with another file in it, and one that was skipped: that is not two of ours."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", "b")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    task = {**desk.globus.tasks()[0], "sync_level": 3, "files_skipped": 1}
    desk.globus.fault("GET /v0.10/task/*", "error_before", status=200, body=task)
    item = {"source_path": "/foreign", "destination_path": "/foreign", "size": 50}
    body = {"DATA_TYPE": "successful_transfers", "marker": 0, "next_marker": None, "DATA": [item]}
    desk.globus.fault("GET /v0.10/task/*/successful_transfers", "error_before", status=200, body=body)
    answer = action.verify(request, handle)

    assert isinstance(answer, actions.Differs) and set(answer.which) == {"a", "b"}


@pytest.mark.parametrize(("has", "wants", "enough"), [("r", "rw", False), ("rw", "r", True), ("rw", "rw", True)])
def test_a_permission_that_is_there_is_enough_or_told(desk: Desk, has: str, wants: str, enough: bool) -> None:
    """Who may read only is not taken for one who may write, and nobody's permission is changed."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    request.options["access"] = [f"identity:{UUID} {has}"]  # type: ignore[index]
    handle = action.start(request, action.prepare(request))
    desk.ended()
    action.verify(request, handle)
    request.options["access"] = [f"identity:{UUID.upper()} {wants}"]  # type: ignore[index]
    answer = desk.action(globus_transfer).verify(request, handle)

    assert isinstance(answer, actions.Proof if enough else actions.Unproven)
    assert enough or (answer.fault.kind, "may only read" in answer.fault.why) == ("person", True)
    assert [rule["permissions"] for rule in desk.globus.access(desk.archive)] == [has]


def test_access_for_a_capture_that_is_nobody_is_told(desk: Desk) -> None:
    """What the rule fills in is known only then; the copy is there."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    request.options["access"] = ["identity:bob"]  # type: ignore[index]
    handle = action.start(request, action.prepare(request))
    desk.ended()
    answer = action.verify(request, handle)

    assert isinstance(answer, actions.Unproven)
    assert (answer.fault.kind, "identity:bob" in answer.fault.why) == ("person", True)


# --------------------------------------------------------------------- copies that were replaced


def proved(desk: Desk, action: Any, *names: str, to: str = "") -> tuple[actions.Request, Any, dict[str, Any]]:
    request = desk.transfer(*names)
    if to:
        request.options["to"] = to  # type: ignore[index]
    handle = action.start(request, action.prepare(request))
    desk.ended()
    return request, handle, {member["path"]: member for member in action.verify(request, handle).members}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("files", [1, 30])
def test_a_copy_stands_while_nobody_has_written_it(desk: Desk, keeps: bool, files: int) -> None:
    """Also where the storage does not keep the times of sources; few are looked at, and many listed."""
    desk.globus.mood("Archive", keeps_times=keeps)
    names = [f"f{n}" for n in range(files)]
    for name in names:
        (desk.data / name).write_bytes(b"x" * 50)
        os.utime(desk.data / name, (time.time() - 5_000,) * 2)
    action = desk.action(globus_transfer)
    request, handle, members = proved(desk, action, *names)

    assert [action.stands(request, handle, members[name]) for name in names] == [""] * files
    assert len(desk.globus.requests("GET /v0.10/operation/endpoint/*/ls")) == (files > 1)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("age_s", [86_400, 3, -3_600])
def test_a_copy_of_another_time_does_not_stand(desk: Desk, keeps: bool, age_s: int) -> None:
    """Of the same size, older or younger, as another machine's transfer with preserved times leaves it."""
    desk.globus.mood("Archive", keeps_times=keeps)
    (desk.data / "a").write_bytes(b"x" * 50)
    os.utime(desk.data / "a", (time.time() - 5_000,) * 2)
    action = desk.action(globus_transfer)
    request, handle, members = proved(desk, action, "a")
    copy = desk.base / "archive" / "a"
    copy.write_bytes(b"B" * 50)
    os.utime(copy, (time.time() - age_s,) * 2)

    assert "written after it was delivered" in action.stands(request, handle, members["a"])


def test_a_copy_that_was_replaced_before_its_proof_is_not_noted(desk: Desk) -> None:
    """The others of its batch show that the storage keeps times: its own is not its source's."""
    names = [f"f{n}" for n in range(3)]
    for name in names:
        (desk.data / name).write_bytes(b"x" * 50)
        os.utime(desk.data / name, (time.time() - 5_000,) * 2)
    action = desk.action(globus_transfer)
    request = desk.transfer(*names)
    handle = action.start(request, action.prepare(request))
    desk.ended()
    (desk.base / "archive" / "f1").write_bytes(b"B" * 50)
    members = {member["path"]: member for member in action.verify(request, handle).members}

    told = [action.stands(request, handle, members[name]) for name in names]
    assert [bool(why) for why in told] == [False, True, False]
    assert "cannot be told" in told[1]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_proof_without_a_note_holds_only_for_the_sources_time(desk: Desk, keeps: bool) -> None:
    """Of an earlier version, or where the collection would not be looked at: what cannot be told keeps the source."""
    desk.globus.mood("Archive", keeps_times=keeps)
    (desk.data / "a").write_bytes(b"x" * 50)
    os.utime(desk.data / "a", (time.time() - 5_000,) * 2)
    desk.globus.fault("GET /v0.10/operation/endpoint/*/stat", "error_before", status=403, code="PermissionDenied")
    action = desk.action(globus_transfer)
    request, handle, members = proved(desk, action, "a")
    why = action.stands(request, handle, members["a"])

    assert "to_mtime_s" not in members["a"]
    assert ("cannot be told" in why, bool(why)) == (not keeps, not keeps)


def test_a_uuid_in_capitals_is_the_same_place(desk: Desk) -> None:
    """Proofs name it in one spelling, and copies are found by either."""
    action = desk.action(globus_transfer)
    request, handle, members = proved(desk, action, "a", to=desk.archive.upper())

    assert members["a"]["to"] == f"globus://{desk.archive}/a"
    assert [to for to, _ in action.targets(request)] == [f"globus://{desk.archive}/a"]
    earlier = {**members["a"], "to": f"globus://{desk.archive.upper()}/a"}
    assert action.stands(request, handle, earlier) == ""


def test_a_capture_that_reads_like_a_placeholder_is_only_text(desk: Desk) -> None:
    """The rule says where lists of files stand, and not a directory's name."""
    action = desk.action(globus_flow)
    filled = {"session": "{files}", "list": "{files}", "deep": [{"m": "{manifest}"}]}
    written = {"session": "{session}", "list": "{files}", "deep": [{"m": "{session}"}]}
    options = {"flow": desk.globus.flow(PASS), "input": filled, "label": "x", "path": "/", "from": desk.krios}
    request = replace(desk.request(options, "a"), written={"input": written})
    handle = action.start(request, action.prepare(request))

    desk.globus.wait(lambda: desk.globus.runs()[0]["status"] == "SUCCEEDED")
    told = action.poll(request, handle).output["output"]
    assert told == {"session": "{files}", "list": ["/a"], "deep": [{"m": "{manifest}"}]}


def test_what_was_another_version_in_between_is_not_proved(desk: Desk) -> None:
    """Rewritten with the same size before it was sent, and removed before the proof was taken."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a", "b")
    prepared = action.prepare(request)
    (desk.data / "a").write_bytes(os.urandom(50))
    handle = action.start(request, prepared)
    desk.ended()
    (desk.data / "a").unlink()
    proof = action.verify(request, handle)

    assert [member["path"] for member in proof.members] == ["b"]
    assert proof.changed == ("a",)


def test_a_share_that_is_away_proves_nothing_and_loses_nothing(desk: Desk) -> None:
    """That its files are not there says nothing of them."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    desk.ended()
    desk.data.rename(desk.base / "away")
    assert isinstance(action.verify(request, handle), actions.Unproven)
    (desk.base / "away").rename(desk.data)

    assert isinstance(action.verify(request, handle), actions.Proof)


@pytest.mark.parametrize("kept", [
    "[1]", '"x"', "[" * 100_000, '{"x": {"bad": 1}}', '{"x": {"resource_server": 5, "scope": [], "access_token": 1}}',
])  # fmt: skip
def test_tokens_of_another_shape_are_as_good_as_none(tmp_path: Path, kept: str) -> None:
    """The login is asked for again."""
    from trigger_daemon.globus.tokens import TokenFile

    file = tmp_path / "tokens.json"
    file.write_text(kept)

    assert TokenFile(str(file)).get_token_data_by_resource_server() == {}


def test_tokens_that_others_can_read_are_not_used(tmp_path: Path) -> None:
    """Who reads them can act with them: a person is told, and what to do."""
    (tmp_path / "globus-tokens.json").write_text("{}")
    (tmp_path / "globus-tokens.json").chmod(0o644)
    thread = service.Service(account({"client_id": CLIENT}, str(tmp_path)))
    with pytest.raises(Trouble, match="can be read by others") as told:
        thread.ask("look", lambda globus: globus.transfer)
    thread.close()

    assert told.value.fault.kind == "person"
    assert "chmod 600" in told.value.fault.hint


@pytest.mark.parametrize(("one", "other", "collide"), [
    ("/k1 /raw/", "/k2 //raw", True),
    ("/k1 /raw", "/k2 /k2", False),
    ("/k1 /raw", "/k2 /raw/b", True),  # /k1 may hold a directory b
    ("/k1 /raw/b", "/k2 /", True),
    ("/k1 /raw/{s}", "/k2 /raw", True),
    ("/k1 /raw/{s}/one", "/k2 /raw/{s}/two", False),
    ("/k1 /raw/{rule}", "/k2 /raw/{rule}", False),
    ("/k1 /raw/{batch}", "/k2 /raw/{batch}", False),
    ("/k1 /raw", "/k1/b /raw/b", False),  # just where the first rule sends them
    ("/k1 /raw", "/k1/b /raw", True),
    ("/k1 /raw", "/k1 /raw", False),
    ("/k1 /raw", "/k1 /raw/b", True),
])  # fmt: skip
def test_two_roots_may_not_share_a_directory_elsewhere(one: str, other: str, collide: bool) -> None:
    """Their files would overwrite each other's, and both would be proved; however the collection is spelled."""
    places = (("a", UUID, *one.split()), ("b", UUID.upper(), *other.split()))
    text = "rules:\n" + "".join(
        f"  - {{name: {name}, watch: {watch}, match: ['{{s}}/*'], existing: ignore,\n"
        f"     start: {{globus_transfer: {{from: {UUID}, to: {to}, path: '{path}'}}}}}}\n"
        for name, to, watch, path in places
    )
    faults = parse_rules([("rules.yaml", text)]).faults

    assert [(fault.line, "overwrite each other" in fault.message) for fault in faults] == [(5, True)] * collide


def rule_faults(options: str, **globus: Any) -> list[tuple[str, str]]:
    text = (
        "rules:\n  - {name: a, watch: /data/krios, match: ['{visit}/*.tif'], existing: ignore, ignore: [back/],\n"
        f"     start: {{globus_transfer: {{{options}}}}}}}\n"
    )
    told = parse_rules([("rules.yaml", text)], settings=Settings(globus=globus)).faults
    return [(fault.message, fault.hint) for fault in told]


def test_all_that_is_wrong_with_a_transfer_is_told_at_once() -> None:
    """A person mends the file once; what follows from a mistake is not told as another."""
    told = rule_faults(
        "from: Krios, to: archive, path: ../x, access: [bob, 'group:x'], index: {id: y}", client_id=UUID
    )

    assert [re.match("`([a-z]+)`", message)[1] for message, _ in told] == [  # type: ignore[index]
        "from", "to", "path", "path", "access", "access", "index",
    ]  # fmt: skip
    assert not any("add to the settings" in hint for _, hint in told)


def test_a_rule_for_globus_needs_an_account() -> None:
    """Nothing of it could ever start: `rules check` says so, with all else that the settings lack."""
    told = rule_faults(f"from: {UUID}, to: {UUID}")
    assert [message for message, _ in told] == [
        "no Globus client is set", "`from`: the settings do not say what this collection shows",
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "loops"), [
    ("/", True), ("/out", True), ("/{visit}", True), ("/back", False), ("/back/{visit}", False),
])  # fmt: skip
def test_a_transfer_back_into_a_watched_directory_is_refused(path: str, loops: bool) -> None:
    """What is delivered there would be taken for new files, and be delivered again, for ever."""
    other = UUID.replace("a", "b")
    shown = {UUID: {"/data": "/"}, other: {"/data/krios": "/", "/elsewhere": "/far"}}
    told = rule_faults(f"from: {UUID}, to: {other}, path: '{path}'", client_id=UUID, collections=shown)

    assert [bool("which the rule `a` watches" in message) for message, _ in told] == [True] * loops
    assert rule_faults(f"from: {UUID}, to: {other}, path: /far/x", client_id=UUID,
                       collections={**shown, other: {"/elsewhere": "/far"}}) == []  # fmt: skip


# -------------------------------------------------------------------------- forgotten


def forget_tasks(globus: Emulator) -> None:
    """Let the service know nothing of any task or run, as after its history or another account."""
    state = globus.directory / "state"
    file = state if state.is_file() else next(path for path in state.iterdir() if path.suffix in (".db", ".sqlite"))
    with sqlite3.connect(file, timeout=10) as sql:
        sql.execute("DELETE FROM docs WHERE kind IN ('task', 'run')")
        sql.execute("DELETE FROM open_tasks")


@pytest.mark.parametrize("kind", ["flow", "transfer"])
def test_what_the_service_has_forgotten_is_told_and_can_be_ended(facility: Facility, kind: str) -> None:
    """A person is told, orders work, and its place is free for others."""
    facility.before = "import trigger_daemon.actions._globus_polls as polls; polls.GONE_S = 3"
    rule = facility.flow("note", facility.globus.flow(WAIT)) if kind == "flow" else facility.transfer("note")
    facility.site.write_rules(rule)
    facility.globus.mood("Archive", down="ENDPOINT_TOO_BUSY")
    facility.start()
    facility.write("note", "a.tif")
    facility.write("note", "b.tif")
    one, other = facility.until("note", "ACTIVE", "ACTIVE")
    facility.site.until(lambda: facility.show(other)["handle"], 10, "it is under way")
    facility.globus.kill()
    forget_tasks(facility.globus)
    facility.globus.start()
    facility.site.cli("runs", "cancel", str(one))

    facility.until("note", "CANCELLED", "HELD", timeout_s=60)
    told = facility.show(other)
    assert "no longer knows" in told["error"]
    assert f"runs retry {other}" in told["hint"]


def test_a_strangers_cancel_is_not_undone(desk: Desk) -> None:
    """An error that is long past is no reason of ours; only what we have noted before we cancelled is."""
    first = desk.action(globus_transfer)
    request = desk.transfer("a")
    desk.globus.mood("Archive", corrupt=1)
    desk.globus.speed(task_seconds=60)
    handle = first.start(request, first.prepare(request))
    desk.globus.wait(lambda: desk.globus.tasks()[0]["faults"])
    desk.globus.control("POST", f"task/{handle['task']}", {"action": "cancel_by_admin", "side": None})
    later = desk.action(globus_transfer)  # another life

    assert later.poll(request, handle).status == "cancelled"


def test_our_own_cancel_is_known_in_another_life(desk: Desk) -> None:
    """A task that was stuck is sent again, although the daemon was killed between its cancel and its end."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    request.options["stuck_after"] = 0.0  # type: ignore[index]
    desk.globus.mood("Archive", denied=["/"])
    handle = action.start(request, action.prepare(request))
    desk.globus.wait(lambda: "it is cancelled" in action.poll(request, handle).why)
    later = desk.action(globus_transfer)
    later._ends = action._ends
    desk.ended()

    told = later.poll(request, handle)
    assert (told.status, "PERMISSION_DENIED" in told.why) == ("failed", True)


# ----------------------------------------------------------------------------- manifests


def test_only_manifests_of_ours_that_nobody_needs_are_removed(desk: Desk) -> None:
    """Not another's file, not a directory, not that of a run that is under way, however long."""
    place = desk.data / ".manifests"
    place.mkdir()
    foreign, directory = place / "results.jsonl", place / "move-7-td-aaaaaaaaaaaaaaaa.jsonl"
    foreign.write_text("mine")
    directory.mkdir()
    ended = place / "move-6-td-aaaaaaaaaaaaaaaa.jsonl"
    ended.write_text("ours")
    action = desk.action(globus_flow, manifests={"path": str(place), "collection": named("Krios")})
    options = {"flow": desk.globus.flow(WAIT), "input": {"m": "{manifest}"}, "label": "x", "path": "/"}
    request = desk.request(options, "a")
    handle = action.start(request, action.prepare(request))
    (needed,) = place.glob("move-1-*")
    for path in (foreign, directory, ended, needed):
        os.utime(path, (1, 1))
    action.poll(request, handle)
    action.prepare(desk.request(options, "a", run=2))

    assert [path.exists() for path in (foreign, directory, ended, needed)] == [True, True, False, True]


def test_manifests_in_the_watched_directory_are_refused() -> None:
    """Each would be a new file, and start a flow with a manifest, for ever."""
    rule = (
        "rules:\n  - {name: a, watch: /data, match: ['**'], existing: ignore, proof: none,\n"
        f"     start: {{globus_flow: {{flow: {UUID}, input: {{m: '{{manifest}}'}}}}}}}}\n"
    )
    def faults(path: str) -> list[str]:
        settings = Settings(globus={"client_id": UUID, "manifests": {"path": path, "collection": UUID}})
        return [fault.message for fault in parse_rules([("rules.yaml", rule)], settings=settings).faults]

    assert [bool(faults(path)) for path in ("/data/m", "/data", "/data/.m", "/data/x/.m/y", "/m")] == [
        True, True, False, False, False,
    ]  # fmt: skip


# -------------------------------------------------------------------------- a slow service


def test_a_slow_service_keeps_neither_copies_nor_cancels_waiting(facility: Facility) -> None:
    """Polls that take seconds each: a cancel goes before them, and a copy needs none of their threads."""
    facility.site.write_rules(
        facility.flow("note", facility.globus.flow(WAIT)),
        facility._rule("copy", {"copy": {"to": str(facility.site.out / "copy")}}, None),
    )
    facility.start()
    for number in range(12):
        facility.write("note", f"{number}.tif")
    runs = facility.until("note", *["ACTIVE"] * 12)
    facility.globus.fault("GET /runs/*", "delay", seconds=2, probability=1.0)
    facility.globus.wait(lambda: [f for f in facility.globus.faults() if f["met"] > 3], 30)
    began = time.monotonic()
    (facility.site.out / "copy").mkdir()
    facility.write("copy")
    facility.site.cli("runs", "cancel", str(runs[0]))
    facility.until("copy", "VERIFIED", timeout_s=15)
    facility.globus.wait(lambda: facility.globus.requests("POST /runs/*/cancel"), 15)

    assert time.monotonic() - began < 2 * 12, "it has waited for its turn behind all polls"


def test_few_polls_wait_at_once() -> None:
    """What was last heard is told again instead, with the pause that it said."""
    polls = _globus_polls.Polls()
    with polls.asking("last") as asked:
        asked.progress = actions.Progress("inactive", "paused", bytes_done=7)
    assert polls.crowded("last") is None
    with polls.asking("a"), polls.asking("b"), polls.asking("c"):
        told = polls.crowded("last")
        assert told is not None
        assert (told.status, told.why, told.bytes_done) == ("inactive", "paused", 7)
        assert polls.crowded("never heard of") is None


@pytest.mark.parametrize("kind", [globus_flow, globus_transfer])
def test_what_was_heard_is_forgotten(desk: Desk, kind: Any) -> None:
    """Nothing is kept of runs that are over."""
    action = desk.action(kind)
    request = desk.transfer("a")
    request.options.update({"flow": desk.globus.flow(PASS), "input": {}, "label": "x"})  # type: ignore[attr-defined]
    handle = action.start(request, action.prepare(request))
    desk.globus.wait(lambda: action.poll(request, handle).status == "succeeded")
    action.forget(1)

    kept = {name: len(value) for name, value in {**vars(action), **vars(action._polls), **vars(action._sent)}.items()
            if isinstance(value, dict | set) and not re.search("schemas|touched|collections", name)}  # fmt: skip
    assert not any(kept.values()), kept


@pytest.mark.parametrize(("first", "fault"), [(500, False), (501, True)])
def test_the_first_of_a_group_count_with_their_companions(first: int, fault: bool) -> None:
    """They go in one batch, which cannot be split."""
    text = (
        "rules:\n  - {name: a, watch: /k1, match: ['{s}.tif'], existing: ignore,\n"
        f"     complete: {{with: [{{file: '{{s}}.xml'}}]}}, batch: {{only_first: {first}}},\n"
        f"     start: {{globus_transfer: {{from: {UUID}, to: {UUID}}}}}}}\n"
    )
    faults = parse_rules([("rules.yaml", text)]).faults

    assert ["with companions 1002 files" in one.message for one in faults] == [True] * fault


# ------------------------------------------------------------ answers that do not end


def test_a_schema_that_takes_for_ever_stops_nobody(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads go on meanwhile; what could not be judged is sent, since the service judges again."""
    monkeypatch.setattr(judging, "JUDGE_S", 1.0)
    schema = {"type": "object", "properties": {"s": {"type": "string", "pattern": "^(a+)+$"}}}
    action = desk.action(globus_flow)
    flow = desk.globus.flow(PASS, schema)
    request = desk.request({"flow": flow, "input": {"s": "a" * 27 + "!"}, "label": "x", "path": "/"}, "a")
    ended, longest = threading.Event(), [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not ended.wait(0.01):
            last, longest[0] = time.monotonic(), max(longest[0], time.monotonic() - last)

    watch = threading.Thread(target=tick)
    watch.start()
    prepared = outcome(lambda: action.prepare(request))
    ended.set()
    watch.join()
    assert prepared["token"]
    assert longest[0] < judging.JUDGE_S, "every thread stood still"

    wrong = desk.request({"flow": flow, "input": {"s": "b"}, "label": "x", "path": "/"}, "a")
    assert "does not match the pattern" in outcome(lambda: action.prepare(wrong)).fault.why


@pytest.mark.parametrize("method", ["GET /v0.10/task_list", "POST /v2/oauth2/token"])
def test_an_answer_that_drips_has_an_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A byte now and then is no answer; the thread is free again after its time, and the next question is answered."""
    monkeypatch.setenv("GLOBUS_SDK_HTTP_TIMEOUT", "0.5")
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    if "token" in method:
        desk.globus.fault(method, "drip")
        told = outcome(lambda: action.prepare(request))
        assert "no whole answer" in told.fault.why or "did not answer in time" in told.fault.why
    handle = action.start(request, action.prepare(request))
    if "token" not in method:
        desk.globus.fault(method, "drip")
        told = outcome(lambda: action.poll(request, handle))
        assert isinstance(told, actions.Unknown)
        assert "did not answer in time" in str(told)

    assert isinstance(action.poll(request, handle), actions.Progress)


def test_headers_that_drip_have_an_end(tmp_path: Path) -> None:
    """The time of an answer counts from its question, not from its first byte."""
    import requests

    from trigger_daemon.globus.transport import _Adapter

    listener = socket.create_server(("127.0.0.1", 0))
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", _Adapter(0.5, 1_000, lambda: float("inf")))

    def drip() -> None:
        there, _ = listener.accept()
        with there, contextlib.suppress(OSError):
            for letter in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100:
                there.sendall(bytes([letter]))
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    with listener, pytest.raises(requests.ReadTimeout, match="no whole answer"):
        session.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=10)


def test_an_answer_without_an_end_is_refused_in_words(desk: Desk) -> None:
    """It is read up to a limit, and neither kept nor parsed."""
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    handle = action.start(request, action.prepare(request))
    desk.globus.fault("GET /v0.10/task_list", "endless")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = outcome(lambda: action.poll(request, handle))

    assert isinstance(told, actions.Unknown)
    assert "larger than 8 MB" in str(told)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert isinstance(action.poll(request, handle), actions.Progress)


def test_a_document_is_sent_to_nobody_else(desk: Desk) -> None:
    """A redirect of a submission is told, and not followed: what is in it and who sends it concern Globus alone."""
    heard = []
    listener = socket.create_server(("127.0.0.1", 0))

    def hear() -> None:
        with contextlib.suppress(OSError):
            while True:
                heard.append(listener.accept())

    threading.Thread(target=hear, daemon=True).start()
    action = desk.action(globus_transfer)
    request = desk.transfer("a")
    prepared = action.prepare(request)
    to = f"http://localhost:{listener.getsockname()[1]}/v0.10/transfer"
    with listener:
        desk.globus.fault("POST /v0.10/transfer", "redirect", to=to)
        refused = outcome(lambda: action.start(request, prepared))
        desk.globus.fault("GET /v0.10/task_list", "redirect", to=to, status=302)
        handle = action.start(request, prepared)
        unknown = outcome(lambda: action.poll(request, handle))

    assert isinstance(refused, actions.Refused)
    assert "leads to http://localhost" in refused.fault.why
    assert "leads to http://localhost" in str(unknown)
    assert heard == []


def test_what_was_not_begun_in_time_is_not_begun_any_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller behind a slow one is answered, and nothing is done for it later that it has not heard of."""
    monkeypatch.setattr(service, "WAIT_S", 0.3)
    thread = service.Service(account({"client_id": CLIENT, "client_secret": SECRET}, str(desk.base)))
    free, done = threading.Event(), []
    slow = threading.Thread(target=lambda: thread.ask("be slow", lambda _: free.wait(30)))
    slow.start()
    with pytest.raises(Trouble, match="its turn has not come") as told:
        thread.ask("come second", lambda _: done.append("second"))
    free.set()
    slow.join()

    thread.ask("come third", lambda _: done.append("third"))
    thread.close()
    assert (told.value.done, done) == (False, ["third"])


def test_silence_is_not_told_as_work() -> None:
    """The last word is told again for a while only; then the service is one that does not answer."""
    now = 0.0
    polls = _globus_polls.Polls(lambda: now)
    with polls.asking("a"), polls.asking("b"), polls.asking("c"):
        with polls.asking("last") as asked:
            asked.progress = actions.Progress("active")
        now = _globus_polls.BELIEVED_S
        assert polls.crowded("last") is not None
        now += 1
        with pytest.raises(actions.Unknown, match="slow or silent"):
            polls.crowded("last")
