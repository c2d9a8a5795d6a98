"""Laws of `globus_compute`: one task a batch, whatever becomes of an answer; JSON in and out; failures in words.

Against the emulated service, by the real SDK. The bytes of arguments and
results were made by globus-compute-sdk 4.19.0 itself (Python 3.11, dill 0.3.9),
which the suite does not need.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("globus_sdk")

from tests.globus.emulator import Emulator, named
from tests.globus.facility import CLIENT, SECRET, Facility
from trigger_daemon import actions, registry
from trigger_daemon.actions import _globus_groups
from trigger_daemon.actions._globus_groups import Groups
from trigger_daemon.globus.serialized import Unreadable, pack, read

CLUSTER, COUNT = named("Cluster"), named("count")
SUBMIT = "POST /v3/endpoints/*/submit"

ARGUMENTS = (["/mnt/é", 3, {"a": [1, None, True]}], {"out": "/x\n", "n": 1.5})
PACKED = '45\n11\n["/mnt/\\u00e9", 3, {"a": [1, null, true]}]28\n11\n{"out": "/x\\n", "n": 1.5}'
VALUE = {"n": 2, "name": "é"}
AS_JSON = '11\n{"n": 2, "name": "\\u00e9"}'
AS_DILL = "00\ngASVFwAAAAAAAAB9lCiMAW6USwKMBG5hbWWUjALDqZR1Lg==\n"
AS_BOTH = f"13\n29\n{AS_JSON}52\n{AS_DILL}"
A_SET_AS_BOTH = "13\n32\n00\ngASVCQAAAAAAAACPlChLAUsCkC4=\n"


# ------------------------------------------------------------------------- in JSON


def test_arguments_are_packed_as_the_services_own_library_packs_them() -> None:
    """Character for character, so that every worker can read them."""
    assert pack(*ARGUMENTS) == PACKED


@pytest.mark.parametrize("result", [AS_JSON, AS_BOTH])
def test_a_result_in_json_is_read(result: str) -> None:
    """Alone, or beside the same value pickled."""
    assert read(result) == VALUE


class _Bomb:
    def __init__(self, where: Path) -> None:
        self.where = str(where)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.where,))


def test_a_pickled_result_is_never_opened(tmp_path: Path) -> None:
    """Opening it would run what its sender put into it."""
    bomb = f"00\n{base64.encodebytes(pickle.dumps(_Bomb(tmp_path / 'went off'))).decode()}"
    for result in (bomb, f"13\n{len(bomb)}\n{bomb}", AS_DILL, A_SET_AS_BOTH):
        with pytest.raises(Unreadable, match="pickled"):
            read(result)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "result",
    ["", "11\n", "11\n{", "13\n9\n11\n1", "13\nx\n11\n1", "13\n-1\n", "10000", None, 5, "11\n" + "[" * 100_000],
)
def test_a_damaged_result_is_told_as_that(result: Any) -> None:
    """In words, and never as a value."""
    with pytest.raises(Unreadable):
        read(result)


def test_what_is_no_number_in_json_is_nothing() -> None:
    """NaN in a result would make a journal that no other program reads."""
    assert read('11\n{"mean": NaN, "n": 1}') == {"mean": None, "n": 1}
    with pytest.raises(ValueError, match="JSON"):
        pack([float("nan")], {})


# -------------------------------------------------------------------------- groups


def test_a_group_is_lent_to_one_at_a_time(tmp_path: Path) -> None:
    """Also in another life; and who gives it back a second time takes it from nobody."""
    path = str(tmp_path / "groups" / "groups.json")
    first = Groups(path)
    first.enter("g", "1-1")

    assert first.take("2-1") == (None, [])
    first.give_back("g", "1-1", "aaaaaaaa-and-more")
    assert Groups(path).take("2-1") == ("g", ["aaaaaaaa"])
    later = Groups(path)
    later.give_back("g", "1-1", "aaaaaaaa-and-more")
    assert later.take("3-1") == (None, [])


def test_a_group_that_is_full_is_lent_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it goes with each attempt: it must not grow for ever; nor does it come back by an old user."""
    monkeypatch.setattr(_globus_groups, "USES_MAX", 3)
    groups = Groups(str(tmp_path / "groups.json"))
    groups.enter("g", "0-1")
    for number in range(3):
        groups.give_back("g", f"{number}-1", f"{number:08}")
        lent = groups.take(f"{number + 1}-1")
        assert lent[0] == ("g" if number < 2 else None)
    groups.give_back("g", "0-1", "00000000")

    assert groups.take("999-1") == (None, [])


# -------------------------------------------------------------------- one task a batch


class Desk:
    """The action at an emulated service, in as many lives as one likes."""

    def __init__(self, base: Path, globus: Emulator) -> None:
        self.globus, self.base, self.data = globus, base, base / "data"
        self.made: list[Any] = []
        self.data.mkdir()
        globus.client(CLIENT, SECRET)
        globus.endpoint("Cluster")
        globus.function(function_id=COUNT, output={"images": 1})

    def action(self) -> Any:
        settings = {"client_id": CLIENT, "client_secret": SECRET, "poll_s": 0.02, "listed_after_s": 1.0}
        context = actions.Context(
            state_dir=str(self.base / "state" / "actions" / "globus_compute"), nudge=lambda *_: None,
            settings={"globus": settings},
        )  # fmt: skip
        self.made.append(registry.find_action("globus_compute")(context))
        return self.made[-1]

    def request(self, run: int = 1, attempt: int = 1, *names: str, **options: Any) -> actions.Request:
        files = []
        for name in names or ("a.tif",):
            path = self.data / name
            path.write_bytes(b"frames")
            seen = path.stat()
            files.append(actions.File(str(self.data), name, seen.st_size, seen.st_mtime_ns))
        given = {"endpoint": CLUSTER, "function": COUNT, "timeout": 600.0, **options}
        return actions.Request(run, attempt, "count", {}, {}, tuple(files), given)

    def run(self, action: Any, request: actions.Request) -> actions.Progress:
        return self.to_end(action, request, action.start(request, action.prepare(request)))

    def to_end(self, action: Any, request: actions.Request, handle: Any) -> actions.Progress:
        def look() -> Any:
            told = action.poll(request, handle)
            return told if told.status not in ("active", "inactive") else None

        told: actions.Progress = self.globus.wait(look)
        return told


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(tmp_path_factory.mktemp("globus")) as globus:
        yield globus


@pytest.fixture
def desk(service: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    service.reset()
    for key, value in service.environment().items():
        monkeypatch.setenv(key, value)
    made = Desk(tmp_path, service)
    yield made
    for action in made.made:
        action.close()


def insist(globus: Emulator, call: Callable[[], Any]) -> Any:
    """Ask until it can be told; None counts."""

    def look() -> Any:
        try:
            return (call(),)
        except actions.Unknown:
            return None

    return globus.wait(look)[0]


@pytest.mark.parametrize("kind", ["drop_after", "cut", "error_after"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_task_whose_answer_was_lost_is_found(desk: Desk, kind: str, restarted: bool) -> None:
    """It is new in the group that the attempt had alone; also where earlier and later tasks are listed late."""
    desk.globus.settings(task_listed_after_s=0.3)
    action = desk.action()
    assert desk.run(action, desk.request(1)).status == "succeeded"
    request = desk.request(2)
    prepared = action.prepare(request)
    desk.globus.fault(SUBMIT, kind)
    with pytest.raises(actions.Unknown):
        action.start(request, prepared)
    if restarted:
        action = desk.action()
    handle = insist(desk.globus, lambda: action.start(request, prepared))

    assert desk.to_end(action, request, handle).status == "succeeded"
    assert [handle["task"]] == [task["task_id"] for task in desk.globus.computed()[1:]]


def test_what_was_not_taken_is_submitted_again(desk: Desk) -> None:
    """Once the group would surely list it, and not before."""
    action = desk.action()
    desk.run(action, desk.request(1))
    request = desk.request(2)
    prepared = action.prepare(request)
    desk.globus.fault(SUBMIT, "error_before")
    with pytest.raises(actions.Unknown):
        action.start(request, prepared)
    with pytest.raises(actions.Unknown, match="not listed yet"):
        action.start(request, prepared)
    handle = insist(desk.globus, lambda: action.start(request, prepared))

    assert desk.to_end(action, request, handle).status == "succeeded"
    assert len(desk.globus.computed()) == 2


@pytest.mark.parametrize("restarted", [False, True])
def test_without_a_group_a_lost_answer_waits_for_a_person(desk: Desk, restarted: bool) -> None:
    """The service made the group, and its name was lost: it is neither repeated nor taken for done."""
    action = desk.action()
    request = desk.request(1)
    prepared = action.prepare(request)
    desk.globus.fault(SUBMIT, "drop_after")
    with pytest.raises(actions.Unknown):
        action.start(request, prepared)
    if restarted:
        action = desk.action()
    told = action.poll(request, action.start(request, prepared))

    assert (told.status, told.fault.kind) == ("failed", "person")
    assert "cannot be told" in told.why
    assert len(desk.globus.requests(SUBMIT)) == 1


def test_attempts_at_once_have_groups_of_their_own(desk: Desk) -> None:
    """Two answers that are lost are not mixed up."""
    action = desk.action()
    several = [desk.request(run) for run in (1, 2)]
    handles = [action.start(one, action.prepare(one)) for one in several]
    for one, handle in zip(several, handles, strict=True):
        desk.to_end(action, one, handle)
    later = [desk.request(run, kwargs={"run": run}) for run in (3, 4)]
    prepared = [action.prepare(one) for one in later]
    desk.globus.fault(SUBMIT, "drop_after", times=2)
    for one, ready in zip(later, prepared, strict=True):
        with pytest.raises(actions.Unknown):
            action.start(one, ready)
    found = [insist(desk.globus, lambda one=one, ready=ready: action.start(one, ready))
             for one, ready in zip(later, prepared, strict=True)]  # fmt: skip

    payloads = {task["task_id"]: task["_payload"] for task in desk.globus.computed()}
    assert [f'{{"run": {run}}}' in payloads[handle["task"]] for run, handle in zip((3, 4), found, strict=True)] == [
        True, True
    ]  # fmt: skip
    assert len(payloads) == 4


def test_a_group_that_the_service_has_forgotten_is_replaced(desk: Desk) -> None:
    """The refusal is none of the rule's: the next attempt goes by itself."""
    action = desk.action()
    desk.run(action, desk.request(1))
    groups = desk.base / "state" / "actions" / "globus_compute" / "groups.json"
    (about,) = json.loads(groups.read_text()).values()
    groups.write_text(json.dumps({named("forgotten"): about}))
    action = desk.action()
    with pytest.raises(actions.Refused) as refused:
        action.start(desk.request(2), action.prepare(desk.request(2)))

    assert refused.value.fault.kind == "transient"
    assert desk.run(action, desk.request(2, 2)).status == "succeeded"


# ----------------------------------------------------------------- arguments and results


def test_the_batch_stands_where_the_rule_says(desk: Desk) -> None:
    """Deep in args and kwargs, as the endpoint sees it; a capture that reads like a placeholder stays a text."""
    args, deep = ["{files}", {"of": ["{manifest}"]}], {"all": "{files}"}
    written = {"args": args, "kwargs": {"sample": "{sample}", "deep": deep}}
    given = {"args": args, "kwargs": {"sample": "{files}", "deep": deep}}
    request = desk.request(1, 1, "a.tif", "é\udcff.tif", at="/mnt/krios", **given)
    request = actions.Request(**{**{k: getattr(request, k) for k in request.__slots__}, "written": written})
    action = desk.action()
    desk.run(action, request)
    from tests.globus.compute import unpack

    args, kwargs = unpack(desk.globus.computed()[0]["_payload"])
    files = ["/mnt/krios/a.tif", "/mnt/krios/é\udcff.tif"]
    assert args[0] == files
    assert [(one["path"], one["size"]) for one in args[1]["of"][0]] == [(path, 6) for path in files]
    assert kwargs == {"sample": "{files}", "deep": {"all": files}}


@pytest.mark.parametrize("how", ["asked", "both"])
def test_what_the_function_returns_is_the_output(desk: Desk, how: str) -> None:
    """In the form that was asked for, or in that of an endpoint that was not told of it."""
    desk.globus.settings(compute_results=how)
    told = desk.run(desk.action(), desk.request())

    assert told.output["output"] == {"images": 1}
    assert "unread" not in told.output


def test_a_pickled_result_is_told_and_the_run_has_succeeded(desk: Desk) -> None:
    """The work is done; what came of it is not read, and what to do about it is said."""
    desk.globus.settings(compute_results="pickled")
    told = desk.run(desk.action(), desk.request())

    assert (told.status, told.output["output"]) == ("succeeded", None)
    assert "never opened" in told.output["unread"]
    assert "JSONData" in told.output["hint"]


def test_a_large_result_is_not_kept(desk: Desk) -> None:
    """It would go through the journal with every look at the run."""
    desk.globus.function(function_id=COUNT, output="x" * 100_000)
    told = desk.run(desk.action(), desk.request())

    assert (told.status, told.output["output"]) == ("succeeded", None)
    assert "100,005 characters" in told.output["unread"]


def test_arguments_that_are_too_large_are_refused(desk: Desk) -> None:
    """Before anything is sent."""
    with pytest.raises(actions.Refused, match="5,000,000"):
        desk.action().prepare(desk.request(kwargs={"x": "x" * 5_000_001}))
    assert desk.globus.computed() == []


def test_a_multi_user_endpoint_is_told_its_configuration(desk: Desk) -> None:
    """As the rule says it."""
    desk.run(desk.action(), desk.request(user_endpoint_config={"partition": "gpu"}))

    assert desk.globus.computed()[0]["_config"] == {"partition": "gpu"}


# --------------------------------------------------------------------------- troubles


def test_what_a_function_raises_holds_the_run(desk: Desk) -> None:
    """With the exception's own words, and its traceback in the output, bounded."""
    desk.globus.function(function_id=COUNT, error="no images at all")
    told = desk.run(desk.action(), desk.request())

    assert (told.status, told.fault.kind) == ("failed", "permanent")
    assert told.why == "the function has failed: RuntimeError: no images at all"
    assert told.output["exception"].startswith("Traceback")


def test_a_lost_worker_is_no_fault_of_the_function(desk: Desk) -> None:
    """Another attempt is made."""
    desk.globus.function(function_id=COUNT, output=1, lost=1)
    action = desk.action()

    assert desk.run(action, desk.request()).fault.kind == "transient"
    assert desk.run(action, desk.request(1, 2)).status == "succeeded"


def test_a_long_exception_holds_nothing_up(desk: Desk) -> None:
    """A look for a lost worker in what a function raised took hours where that was made for it."""
    desk.globus.function(function_id=COUNT, error="parsl." * 50_000)
    began = time.monotonic()
    told = desk.run(desk.action(), desk.request())

    assert (told.status, len(told.output["exception"])) == ("failed", 4_000)
    assert time.monotonic() - began < 30


def test_an_endpoint_that_is_offline_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task waits at the service; the run stands still in words, and goes on by itself."""
    from trigger_daemon.actions import globus_compute

    monkeypatch.setattr(globus_compute, "ASLEEP_S", 0.0)
    monkeypatch.setattr(globus_compute, "ASLEEP_AGAIN_S", 0.0)
    desk.globus.endpoint("Cluster", online=False)
    action, request = desk.action(), desk.request()
    handle = action.start(request, action.prepare(request))
    told = desk.globus.wait(lambda: (seen := action.poll(request, handle)).status == "inactive" and seen)
    desk.globus.endpoint("Cluster", online=True)

    assert "is offline" in told.why
    assert desk.to_end(action, request, handle).status == "succeeded"


def test_a_function_that_takes_too_long_is_told(desk: Desk) -> None:
    """After `timeout`; it is not given up."""
    desk.globus.function(function_id=COUNT, seconds=1.5)
    action, request = desk.action(), desk.request(timeout=0.2)
    handle = action.start(request, action.prepare(request))
    told = desk.globus.wait(lambda: (seen := action.poll(request, handle)).status == "inactive" and seen)

    assert "has not ended" in told.why
    assert desk.to_end(action, request, handle).status == "succeeded"


@pytest.mark.parametrize("body", [
    {"request_id": "x"}, {"tasks": {}, "task_group_id": CLUSTER}, {"tasks": {COUNT: ["x"]}, "task_group_id": CLUSTER},
    {"tasks": {COUNT: [CLUSTER, CLUSTER]}, "task_group_id": CLUSTER}, {"tasks": {COUNT: [CLUSTER]}},
])  # fmt: skip
def test_an_answer_without_a_task_is_no_start(desk: Desk, body: dict[str, Any]) -> None:
    """It is not Globus's: what became of the submission is not known."""
    desk.globus.fault(SUBMIT, "error_after", status=200, body=body)
    action, request = desk.action(), desk.request()

    with pytest.raises(actions.Unknown):
        action.start(request, action.prepare(request))


@pytest.mark.parametrize("body", [{}, {"task_id": CLUSTER, "status": "success"}, {"status": "failed"}])
def test_an_odd_answer_does_not_end_a_task(desk: Desk, body: dict[str, Any]) -> None:
    """Of another task, or of none: it is asked about again."""
    action, request = desk.action(), desk.request()
    handle = action.start(request, action.prepare(request))
    desk.globus.fault("GET /v2/tasks/*", "error_after", status=200, body=body)

    with pytest.raises(actions.Unknown):
        action.poll(request, handle)
    assert desk.to_end(action, request, handle).status == "succeeded"


# ----------------------------------------------------------------- the daemon, and an example


def tiff(path: Path, level: int, side: int = 96) -> None:
    """Write a grey image of 16 bits, as detectors do."""
    tags = [(256, 3, side), (257, 3, side), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1),
            (278, 3, side), (279, 4, 2 * side * side)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head.ljust(200, b"\0") + struct.pack("<H", level) * side * side)


def test_thumbnails_of_each_grid(tmp_path: Path) -> None:
    """The example rule as it stands: a function makes small pictures of a batch, its statistics are the output."""
    import yaml

    rule = yaml.safe_load((Path(__file__).parent.parent / "rules" / "globus-thumbnails.yaml").read_text())["rules"][0]
    with Facility(tmp_path) as facility:
        globus, site, out = facility.globus, facility.site, tmp_path / "thumbnails"
        start = rule["start"]["globus_compute"]
        globus.endpoint(start["endpoint"])
        globus.function(function_id=start["function"], callable="tests.globus.functions:thumbnails")
        start["kwargs"]["out"] = start["kwargs"]["out"].replace("/scratch", str(tmp_path))
        start.pop("at")
        rule |= {"watch": str(site.data), "complete": {"quiescence": "200ms"}, "batch": {**rule["batch"], "idle": "1s"}}
        site.write_rules(rule)
        (site.data / "grid1").mkdir()
        facility.start()
        for number, level in enumerate((1_000, 3_000)):
            tiff(site.data / "grid1" / f"m{number}.tif", level)
        (run,) = facility.until(rule["name"], "SUCCEEDED")
        output = facility.show(run)["output"]["output"]

    assert output == {"thumbnails": ["m0.pgm", "m1.pgm"], "mean": 2_000.0, "darkest": 1_000.0, "brightest": 3_000.0}
    assert (out / "grid1" / "m1.pgm").read_bytes() == b"P5 64 64 255\n" + bytes([3_000 >> 8]) * 64 * 64


@pytest.mark.parametrize("place", ["globus.compute", "globus.computing"])
def test_killed_around_the_submission_it_runs_once(tmp_path: Path, place: str) -> None:
    """The next life asks the group what became of it."""
    with Facility(tmp_path, listed_after="2s") as facility:
        globus, site, trace = facility.globus, facility.site, tmp_path / "trace"
        globus.endpoint("Cluster")
        globus.function(function_id=COUNT, callable="tests.globus.functions:deliver")
        kwargs = {"files": "{manifest}", "source": str(site.data), "dest": str(site.out), "trace": str(trace)}
        (site.data / "move").mkdir()
        start = {"globus_compute": {"endpoint": CLUSTER, "function": COUNT, "kwargs": kwargs}}
        site.write_rules(site.rule("move", watch=str(site.data / "move"), start=start,
                                   retry={"initial": "500ms", "longest": "2s"}))  # fmt: skip
        facility.start()
        facility.write("move", "first.tif")
        facility.until("move", "SUCCEEDED")  # from now on there is a group
        site.stop()
        site.start(wait=False, env={**facility.environment, "TRIGGER_FAIL": f"{place}:kill"})
        facility.write("move", "second.tif")
        assert site.process is not None
        assert site.process.wait(30) == -9, f"it never came there: {site.tail()}"
        facility.start()
        facility.until("move", "SUCCEEDED", "SUCCEEDED")

        assert trace.read_text() == "xx"
        assert (site.out / "move" / "second.tif").exists()
