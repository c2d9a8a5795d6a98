"""What becomes of a run for each way in which Globus refuses, fails or stands still, as the reference tells it.

One daemon, one emulated Globus, one rule for each case. Each run is seen in
its trouble, then the trouble is mended, and the run must come to its end: what
went wrong loses nothing. `docs/reference/globus-errors.md` is held against
what was seen, word for word.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.globus.emulator import Emulator, named
from tests.site import Site

pytest.importorskip("globus_sdk")

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "globus-errors.md"
CLIENT, SECRET = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f", "not-a-secret"
NOBODY = "00000000-0000-4000-8000-000000000001"
SUBMIT, RUN = "POST /v0.10/transfer", "POST /flows/*/run"
OFTEN = 1_000  # a fault that stays until it is mended
PASS = {"StartAt": "Note", "States": {"Note": {"Type": "Pass", "End": True}}}
FAIL = {"StartAt": "Decide", "States": {"Decide": {"Type": "Fail", "Error": "TooFewHits", "Cause": "3 hits of 1,000"}}}
ASK = {"StartAt": "Ask", "States": {
    "Ask": {"Type": "CreateWebInput", "ResultPath": "$.asked", "Next": "Await", "Parameters": {
        "InputType": "Selection", "Context": {"Title": "Deliver?"}, "Options": [{"Value": "yes", "Label": "Yes"}]}},
    "Await": {"Type": "AwaitWebInput", "ResultPath": "$.answer", "End": True,
              "Parameters": {"web_input_id.$": "$.asked.web_input_id"}},
}}  # fmt: skip


class Desk:
    """The site, with what a case needs to know of its own rule."""

    def __init__(self, site: Site, globus: Emulator) -> None:
        self.site, self.globus = site, globus
        self.mended: list[Case] = []

    def run(self, rule: str) -> dict[str, Any]:
        """Return the rule's run as `runs show` tells it."""
        return self.site.json("runs", "show", str(self.brief(rule)[0]))

    def brief(self, rule: str) -> tuple[Any, ...]:
        """Return number, state and handle of the rule's run, Nones if there is none yet."""
        rows = self.site.ask(
            "SELECT batch.id, run.state, (SELECT max(handle) FROM attempt WHERE attempt.run = run.id) FROM run"
            " JOIN batch USING (id) JOIN rule ON rule.id = batch.rule WHERE rule.name = ?", rule,
        )  # fmt: skip
        return rows[0] if rows else (None, None, None)

    def until(self, rule: str, state: str, words: str = "", timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until the rule's run is in a state, and says what it must; return it."""
        wanted, seen = re.compile(words), {}

        def look() -> bool:
            nonlocal seen
            if self.brief(rule)[1] != state:
                return False
            seen = self.run(rule)
            return bool(seen["state"] == state and (seen["final"] or wanted.search(told(seen))))

        try:
            self.site.until(look, timeout_s, f"{rule} is {state} with /{words}/")
        except AssertionError as error:
            seen = self.run(rule) if self.brief(rule)[0] else {}
            shown = {key: seen.get(key) for key in ("state", "error", "hint", "waiting_for", "attempts")}
            raise AssertionError(f"{json.dumps(shown)[:1_500]}\n{str(error)[-1_500:]}") from None
        return seen

    def handle(self, rule: str, key: str) -> str:
        return str(self.run(rule)["handle"][key])


    def ended(self, case: Case) -> None:
        """See the run of a case come to its end, with one task or run that did work."""
        self.until(case.rule, case.then, timeout_s=90)
        if case.function is not None:
            tasks = [one for one in self.globus.computed() if one["_function"] == named(f"Function {case.rule}")]
            assert len([one for one in tasks if one["status"] == "success"]) == 1
        elif case.flow is None:
            tasks = [one for one in self.globus.tasks() if one["destination_endpoint_id"] == destination(case.rule)]
            worked = [one for one in tasks if one["files_transferred"]]
            assert len(worked) == 1 or not case.once, f"{len(worked)} tasks did work"
            assert len(tasks) == 1 or not case.alone, f"{len(tasks)} tasks were submitted"
        else:
            runs = [one for one in self.globus.runs() if one["flow_id"] == named(f"Flow {case.rule}")]
            assert len(runs) == 1


def destination(rule: str) -> str:
    """Return the collection that a case sends to: each has one of its own, so that none is down for another."""
    return named(f"Archive {rule}")


@dataclass(frozen=True)
class Case:
    """One row: what Globus does (`begin`, before the file; `later`, once the run is under way), and what follows."""

    title: str
    state: str
    words: str = ""  # what must be told, as a regular expression
    begin: Callable[[Desk, str], Any] = lambda desk, rule: None
    later: Callable[[Desk, str], Any] | None = None
    mend: Callable[[Desk, str], Any] = lambda desk, rule: None
    then: str = ""  # the end of it: VERIFIED, for flows SUCCEEDED; '' where nothing can mend it
    flow: Any = None  # a definition: the case is one of flows
    function: dict[str, Any] | None = None  # an order of what it gives: the case is one of Compute
    options: dict[str, Any] = field(default_factory=dict)
    by_itself: bool = False  # the trouble is seen to pass without any order
    proof: str = ""
    once: bool = True  # there was one task, or run, that did work
    alone: bool = False  # and no other one

    @property
    def rule(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")[:60]


def fault(route: str, kind: str, **more: Any) -> Callable[[Desk, str], None]:
    """Order a fault that stays until it is mended."""
    return lambda desk, _: desk.globus.fault(route, kind, **{"times": OFTEN, **more})


def clear(desk: Desk, rule: str) -> None:
    desk.globus.clear_faults()


def mood(**moods: Any) -> Callable[[Desk, str], None]:
    return lambda desk, rule: desk.globus.mood(destination(rule), **moods)


def other_secret(desk: Desk, rule: str) -> None:
    desk.globus.client(CLIENT, "another-secret")
    desk.globus.expire_tokens()


def cancelled_by_admin(desk: Desk, rule: str) -> None:
    body = {"action": "cancel_by_admin", "side": "DESTINATION", "message": "the store is being moved"}
    desk.globus.control("POST", f"task/{desk.handle(rule, 'task')}", body)


def forbids_checksums(desk: Desk, rule: str) -> None:
    about = {"id": destination(rule), "directory": str(desk.site.out / rule), "display_name": f"Archive {rule}"}
    desk.globus.control("POST", "collection", {**about, "owner": None, "disable_verify": True})


def out_of_time(desk: Desk, rule: str) -> None:
    desk.globus.clock(advance_s=90)


def forget_flow(desk: Desk, rule: str) -> None:
    desk.globus.control("POST", "flow", {"id": named(f"Flow {rule}"), "definition": PASS, "flow_owner": NOBODY,
                                         "flow_starters": [], "flow_viewers": []})


def give_flow(desk: Desk, rule: str) -> None:
    desk.globus.flow(PASS, id=named(f"Flow {rule}"))


def not_starter(desk: Desk, rule: str) -> None:
    desk.globus.flow(PASS, id=named(f"Flow {rule}"), flow_owner=NOBODY, flow_starters=[])


def endpoint(**fields: Any) -> Callable[[Desk, str], None]:
    return lambda desk, rule: desk.globus.endpoint(f"Cluster {rule}", **fields)


def give_function(desk: Desk, rule: str) -> None:
    desk.globus.function(function_id=named(f"Function {rule}"), output={"images": 1})


def answered(desk: Desk, rule: str) -> None:
    """A person gives the answer, at the service."""
    import globus_sdk

    client = globus_sdk.ConfidentialAppAuthClient(CLIENT, SECRET)
    flows = globus_sdk.FlowsClient(app=globus_sdk.ClientApp("person", login_client=client))
    question = flows.get_web_input(flows.get_run(desk.handle(rule, "run"))["blocking_web_input_id"])
    flows.respond_to_web_input(question["id"], question["options"][0]["option_id"])


SLOW: dict[str, Any] = {"stuck_after": "2s"}
GUEST = "GCSv5_guest_collection"
DOWN = {"code": "ExternalError.DirListingFailed.GCDisconnected", "status": 502}

CASES = (
    # ------------------------------------------------------------- a request comes to nothing
    Case("Globus cannot be reached", "PENDING", "no connection to Globus",
         fault("GET /v0.10/submission_id", "refuse"), mend=clear, then="VERIFIED"),
    Case("The answer to a submission is lost", "VERIFIED", "",
         fault(SUBMIT, "drop_after", times=1), then="VERIFIED", by_itself=True),
    Case("429, too many requests", "PENDING", "TooManyRequests",
         fault(SUBMIT, "rate_limited"), mend=clear, then="VERIFIED"),
    Case("A redirect of a submission, which is not followed", "PENDING", "where nothing is sent",
         fault(SUBMIT, "redirect"), mend=clear, then="VERIFIED"),
    Case("409 Conflict: another transfer has the same paths", "PENDING", "has not ended",
         fault(SUBMIT, "error_before", status=409, code="Conflict"), mend=clear, then="VERIFIED"),
    Case("409 TooManyPendingJobs: the account has too many tasks", "PENDING", "as many transfers",
         fault(SUBMIT, "error_before", status=409, code="TooManyPendingJobs"), mend=clear, then="VERIFIED"),
    Case("409 OperationPaused: the collection is paused", "PENDING", "OperationPaused",
         fault(SUBMIT, "error_before", status=409, code="OperationPaused"), mend=clear, then="VERIFIED"),
    Case("401, and again with a fresh token", "PENDING", "401|AuthenticationFailed",
         fault(SUBMIT, "unauthorized_once"), mend=clear, then="VERIFIED"),
    Case("400 BadRequest", "HELD", "ClientError.BadRequest",
         fault(SUBMIT, "error_before", status=400, code="ClientError.BadRequest"), mend=clear, then="VERIFIED"),
    Case("Any other refusal, 4xx", "HELD", "Odd",
         fault(SUBMIT, "error_before", status=418, code="Odd"), mend=clear, then="VERIFIED"),
    Case("403 EndpointPermissionDenied", "HELD", "EndpointPermissionDenied",
         fault(SUBMIT, "error_before", status=403, code="EndpointPermissionDenied"), mend=clear, then="VERIFIED"),
    Case("404 EndpointNotFound", "HELD", "EndpointNotFound",
         fault(SUBMIT, "error_before", status=404, code="EndpointNotFound"), mend=clear, then="VERIFIED"),
    Case("403 ConsentRequired, with a service account", "VERIFIED", "",
         lambda desk, rule: desk.globus.require_consent(f"Archive {rule}"), then="VERIFIED", by_itself=True),
    Case("Auth invalid_client: a wrong secret", "HELD", "does not know this client",
         other_secret, mend=lambda desk, rule: desk.globus.client(CLIENT, SECRET), then="VERIFIED"),
    Case("Auth answers 503", "PENDING", "503|ServiceUnavailable|no token",
         lambda desk, rule: (desk.globus.expire_tokens(), desk.globus.fault(
             "POST /v2/oauth2/token", "error_before", times=OFTEN)), mend=clear, then="VERIFIED"),
    # ------------------------------------------------------------------ a task is in trouble
    Case("PERMISSION_DENIED at the destination, rule says `stuck: cancel`", "HELD", "PERMISSION_DENIED",
         mood(denied=["/"]), mend=mood(denied=[]), then="VERIFIED", options=SLOW),
    Case("PERMISSION_DENIED at the destination, rule says `stuck: keep`", "INACTIVE", "PERMISSION_DENIED",
         mood(denied=["/"]), mend=mood(denied=[]), then="VERIFIED", options={**SLOW, "stuck": "keep"}),
    Case("FILE_NOT_FOUND: the collection does not show the file", "HELD", "FILE_NOT_FOUND",
         lambda desk, rule: None, options={**SLOW, "from": named("Elsewhere")}),
    Case("QUOTA_EXCEEDED", "PENDING", "QUOTA_EXCEEDED",
         mood(quota_bytes=1), mend=mood(quota_bytes=None), then="VERIFIED"),
    Case("GC_NOT_CONNECTED: the other machine is off", "INACTIVE", "GC_NOT_CONNECTED",
         mood(down="GC_NOT_CONNECTED"), mend=mood(down=None), then="VERIFIED", options=SLOW),
    Case("ENDPOINT_TOO_BUSY", "INACTIVE", "ENDPOINT_TOO_BUSY",
         mood(down="ENDPOINT_TOO_BUSY"), mend=mood(down=None), then="VERIFIED", options=SLOW),
    Case("VERIFY_CHECKSUM: what arrives differs, once", "VERIFIED", "",
         mood(corrupt=1), then="VERIFIED", by_itself=True, options=SLOW),
    Case("VERIFY_CHECKSUM: what arrives differs, always", "PENDING", "VERIFY_CHECKSUM",
         mood(corrupt=OFTEN), mend=mood(corrupt=0), then="VERIFIED", options=SLOW, once=False),
    Case("A rule of the collection pauses it", "INACTIVE", "the tape is full",
         mood(pause_rules=[{"id": NOBODY, "message": "the tape is full"}]), mend=mood(pause_rules=[]),
         then="VERIFIED"),
    Case("An administrator pauses the task", "INACTIVE", "maintenance until noon",
         mood(down="ENDPOINT_TOO_BUSY"),
         lambda desk, rule: desk.globus.pause_task(desk.handle(rule, "task"), message="maintenance until noon"),
         lambda desk, rule: (desk.globus.mood(destination(rule), down=None),
                             desk.globus.resume_task(desk.handle(rule, "task"))), then="VERIFIED"),
    Case("The task's credentials have expired", "INACTIVE", "NO_CREDENTIALS",
         mood(down="ENDPOINT_TOO_BUSY"),
         lambda desk, rule: desk.globus.pause_task(desk.handle(rule, "task"), reason="credentials"),
         lambda desk, rule: (desk.globus.mood(destination(rule), down=None),
                             desk.globus.resume_task(desk.handle(rule, "task"))), then="VERIFIED"),
    Case("An administrator cancels the task", "HELD", "the store is being moved",
         mood(down="ENDPOINT_TOO_BUSY"), cancelled_by_admin, mood(down=None), then="VERIFIED"),
    Case("EXPIRED: the task's deadline is past", "PENDING", "its deadline has passed",
         mood(down="ENDPOINT_TOO_BUSY"), out_of_time, mood(down=None), then="VERIFIED",
         options={"deadline": "60s"}, once=False),
    Case("Globus cannot be asked how it stands", "ACTIVE", "503|ServiceUnavailable",
         lambda desk, rule: (desk.globus.mood(destination(rule), down="ENDPOINT_TOO_BUSY"), None),
         fault("GET /v0.10/task_list", "error_before"),
         lambda desk, rule: (desk.globus.clear_faults(), desk.globus.mood(destination(rule), down=None)),
         then="VERIFIED"),
    # --------------------------------------------------------------------- after the transfer
    Case("SUCCEEDED, but a file is not among those delivered", "HELD", "not among the task's successful transfers",
         mood(lies=OFTEN), mend=mood(lies=0), then="VERIFIED", once=False),
    Case("Access cannot be given", "HELD", "PermissionDenied|403",
         fault("POST /v0.10/endpoint/*/access", "error_before", status=403, code="PermissionDenied"), mend=clear,
         then="VERIFIED", options={"access": [f"identity:{NOBODY}"]}, alone=True),
    Case("Access for what a capture fills in, and it is no UUID", "HELD", "is not understood",
         options={"access": ["identity:{rule}"]}),
    Case("The index refuses the batch", "HELD", "Forbidden|403",
         fault("POST /v1/index/*/ingest", "error_before", status=403, code="Forbidden.Generic"), mend=clear,
         then="VERIFIED", options={"index": {"id": named("Visits"), "visible_to": ["public"]}}, alone=True),
    Case("The collection forbids that checksums are compared", "HELD", "compared no checksums", forbids_checksums),
    # ---------------------------------------------------------------------------------- flows
    Case("A flow's start: the answer is lost", "SUCCEEDED", "",
         fault(RUN, "drop_after", times=1), flow=PASS, then="SUCCEEDED", by_itself=True),
    Case("A flow's start: the input does not fit the schema", "HELD", "does not take this input", flow=PASS,
         options={"input": {"n": "many"}}),
    Case("A flow's start: 422", "HELD", "UNPROCESSABLE_ENTITY",
         fault(RUN, "error_before", status=422, code="UNPROCESSABLE_ENTITY"), mend=clear, flow=PASS, then="SUCCEEDED"),
    Case("A flow's start: 403, not a starter of it", "HELD", "FORBIDDEN",
         not_starter, mend=give_flow, flow=PASS, then="SUCCEEDED"),
    Case("A flow's start: 404", "HELD", "NOT_FOUND",
         forget_flow, mend=give_flow, flow=PASS, then="SUCCEEDED"),
    Case("A flow's start: 429", "PENDING", "TooManyRequests",
         fault(RUN, "rate_limited"), mend=clear, flow=PASS, then="SUCCEEDED"),
    Case("A flow fails", "HELD", "3 hits of 1,000", flow=FAIL),
    Case("A flow waits for a person's answer", "INACTIVE", "waits for a person's answer",
         mend=answered, flow=ASK, then="SUCCEEDED"),
    # -------------------------------------------------------------------------------- Compute
    Case("A function's submission: 429", "PENDING", "TooManyRequests",
         fault("POST /v3/endpoints/*/submit", "rate_limited"), mend=clear, then="SUCCEEDED", function={"output": 1}),
    Case("A function's submission: 403, the endpoint is not for this account", "HELD", "ENDPOINT_ACCESS_FORBIDDEN",
         endpoint(denied=True), mend=endpoint(denied=False), then="SUCCEEDED", function={"output": 1}),
    Case("A function's submission: 404, there is no such function", "HELD", "FUNCTION_NOT_FOUND",
         mend=give_function, then="SUCCEEDED", function={}),
    Case("A function raises an exception", "HELD", "no images at all", function={"error": "no images at all"}),
    Case("A function's worker is lost", "PENDING", "WorkerLost", function={"output": 1, "lost": 1}, then="SUCCEEDED"),
    # --------- a submission whose outcome is open keeps one of the three places: these come last
    Case("503 to a submission", "STARTING", "ServiceUnavailable",
         fault(SUBMIT, "error_before"), mend=clear, then="VERIFIED"),
    Case("502 ExternalError: the collection does not answer", "STARTING", "ExternalError",
         fault(SUBMIT, "error_before", **DOWN), mend=clear, then="VERIFIED"),
    Case("Another page than Globus's answers", "STARTING", "the answer is not Globus's",
         fault(SUBMIT, "html"), mend=clear, then="VERIFIED"),
    Case("A flow's start: 503", "STARTING", "ServiceUnavailable|listed",
         fault(RUN, "error_before"), mend=clear, flow=PASS, then="SUCCEEDED"),
)  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    base = tmp_path_factory.mktemp("errors")
    with pytest.MonkeyPatch.context() as patch, Emulator(base / "globus") as globus:
        for key, value in globus.environment().items():
            patch.setenv(key, value)
        patch.setenv("TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET", SECRET)
        site = Site(base, sweep="500ms", quiescence="100ms")
        _facility(site, globus)
        site.start()
        try:
            desk = Desk(site, globus)
            yield desk
            for case in desk.mended:
                desk.ended(case)
        finally:
            site.stop()


def _facility(site: Site, globus: Emulator) -> None:
    """Let there be a rule for each case, with a directory, a destination and a flow of its own."""
    globus.client(CLIENT, SECRET)
    globus.settings(running_max=100, retry_max_s=0.1)
    krios, elsewhere = globus.collection("Krios", site.data), globus.collection("Elsewhere", site.base / "elsewhere")
    globus.index("Visits", writers=[CLIENT])
    site.settings["throttle"] = {"runs": 60}
    roots = {str(site.data): "/"}
    site.settings["globus"] = {
        "client_id": CLIENT, "collections": {krios: roots, elsewhere: roots}, "poll": "200ms", "listed_after": "4s",
    }  # fmt: skip
    rules = []
    for case in CASES:
        (site.data / case.rule).mkdir()
        if case.flow is not None:
            schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
            flow = globus.flow(case.flow, schema, id=named(f"Flow {case.rule}"), flow_owner=CLIENT)
            start: dict[str, Any] = {"globus_flow": {"flow": flow, **case.options}}
        elif case.function is not None:
            about = {"endpoint": globus.endpoint(f"Cluster {case.rule}"), "function": named(f"Function {case.rule}")}
            if case.function:
                globus.function(function_id=about["function"], **case.function)
            start = {"globus_compute": {**about, **case.options}}
        else:
            globus.collection(f"Archive {case.rule}", site.out / case.rule, owner=None)
            move = {"from": krios, "to": destination(case.rule), **case.options}
            start = {"globus_transfer": move}
        rules.append(site.rule(
            case.rule, watch=str(site.data / case.rule), start=start,
            # What is seen PENDING stays so until it is retried; what is STARTING is looked for again soon.
            retry={"initial": "60s", "longest": "60s"} if case.state == "PENDING" else
            {"initial": "500ms", "longest": "2s"},
        ))  # fmt: skip
    site.write_rules(*rules)


def plain(words: str, desk: Desk) -> str:
    """Return words without what differs from one run to another."""
    words = words.replace(str(desk.site.base), "").replace("|", "\\|")
    words = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID", words)
    words = words.removeprefix("the next attempt, after: ")  # a moment before, the journal says it without that
    words = re.sub(r" \(request [^)]*\)", "", words)
    words = re.sub(r"runs retry \d+", "runs retry ID", words)
    words = re.sub(r"\(\(?'Connection aborted.*?\)\)", "(...)", words)
    words = re.sub(r"\b(in|for) \d+ s\b", r"\1 N s", words)
    words = re.sub(r"\(\w+Error: .*\)", "(...)", words)
    return " ".join(words.split())


def told(run: dict[str, Any]) -> str:
    """Return what an operator reads of a run that is not at its end."""
    if run["state"] in ("HELD", "INACTIVE"):
        return str(run["error"] or "")
    return str(run["waiting_for"] or run["error"] or "")


def row(case: Case, run: dict[str, Any], desk: Desk, end: str) -> str:
    words = "" if run["final"] else plain(told(run), desk)
    hint = "" if run["final"] else plain(str(run["hint"] or ""), desk)
    return f"| {case.title} | `{run['state']}` | {words} | {hint} | {end} |"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_run_in_trouble(desk: Desk, case: Case) -> None:
    """State, words and hint are those of the reference; mended, the run comes to its end, with one task of work."""
    rule = case.rule
    case.begin(desk, rule)
    (desk.site.data / rule / "a.tif").write_bytes(uuid.uuid4().bytes)
    if case.later is not None:
        desk.site.until(lambda: desk.brief(rule)[2], 30, f"{rule} is under way")
        case.later(desk, rule)
    seen = desk.until(rule, case.state, case.words)
    ended = _mended(desk, case, seen)
    wanted = row(case, seen, desk, ended)
    rows = PAGE.read_text().splitlines() if PAGE.exists() else []
    assert wanted in rows, f"the reference must say\n{wanted}\nand says\n" + "\n".join(
        line for line in rows if line.startswith(f"| {case.title} |")
    )


def _mended(desk: Desk, case: Case, seen: dict[str, Any]) -> str:
    """Mend the trouble, see the run's end, and return what has brought it about."""
    number = str(seen["id"])
    if not case.then:  # the rule itself is wrong, or the flow has said its word
        desk.site.cli("runs", "abandon", number)
        return "a person mends it, then `runs retry`, `--anew` after a change of the rule; or `runs abandon`"
    if not seen["final"]:
        case.mend(desk, case.rule)
    if seen["state"] in ("PENDING", "HELD"):  # a pending one would go on by itself, later
        desk.site.cli("runs", "retry", number, check=seen["state"] == "HELD")
    how = "`runs retry`" if seen["state"] == "HELD" else "by itself"
    if seen["state"] == "INACTIVE":  # the next look may be a minute away: they are waited for together, in the end
        desk.mended.append(case)
    else:
        desk.ended(case)
    return f"{how}: `{case.then}`"
