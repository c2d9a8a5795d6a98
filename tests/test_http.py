"""The action `http`: once whatever becomes of the answer, secrets nowhere, and the recipes as they are written.

Against a real server (`rest.py`), which answers as Prefect and Airflow were
seen to, and spoils what it is told to.
"""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from broker import authority, free_port, signed
from rest import Service, running
from tests.rest_chaos import Chaos
from tests.site import Site
from trigger_daemon import registry
from trigger_daemon.actions import Context, File, Progress, Refused, Request, Unknown
from trigger_daemon.actions._globus_polls import GONE_S, Polls
from trigger_daemon.actions._http_fill import Filling, Secrets, ask
from trigger_daemon.actions.http import Action
from trigger_daemon.config import parse_rules
from trigger_daemon.core.model import Scope
from trigger_daemon.core.templates import render_all

REPOSITORY = Path(__file__).resolve().parent.parent
HOW_TO = REPOSITORY / "docs" / "how-to" / "http.md"
TOKEN = "t0ken/with+signs"
PLACES = ("http.send", "http.sent")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as one:
        yield one


@pytest.fixture
def token(tmp_path: Path) -> str:
    """The path of a secret."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return str(path)


class Life:
    """One life of the daemon, as far as the action sees it; `options` over those of a plain service."""

    def __init__(self, service: Service, **options: Any) -> None:
        self.action: Any = registry.find_action("http")(Context(state_dir="", nudge=lambda *_: None))
        self.options = {"url": f"{service.url}/runs", "handle": "id", "poll": poll(service), **options}

    def request(self, *, run: int = 1, files: tuple[File, ...] = (), **captures: str) -> Request:
        """What the core would freeze: templates filled in, and as they were written."""
        action = registry.find_action("http")
        given = {**{name: option.default for name, option in action.OPTIONS.items()}, **self.options}
        self.action.check(given)
        names = registry.extra_names(action, given)
        values = {**captures, "rule": "chips", "batch": str(run), "host": "krios1", "date": "2026-11-29",
                  **{name: "{" + name + "}" for name in names}}  # fmt: skip
        templated = {name for name, option in action.OPTIONS.items() if option.template and given[name] is not None}
        filled = {name: render_all(value, values) if name in templated else value for name, value in given.items()}
        written = {name: given[name] for name in templated if "{" in str(given[name])}
        return Request(run, 1, "chips", {}, captures, files, json.loads(json.dumps(filled)), written=written)

    def begin(self, request: Request) -> tuple[Any, Any]:
        prepared = self.action.prepare(request)
        return prepared, self.action.start(request, prepared)


def poll(service: Service, **more: str) -> dict[str, str]:
    return {"url": f"{service.url}/runs/{{handle}}", "every": "100ms", "succeeded": "state == 'COMPLETED'",
            "failed": "state == 'FAILED'", **more}  # fmt: skip


def find(service: Service, **more: str) -> dict[str, str]:
    return {"url": f"{service.url}/runs?key={{key}}", "handle": "[0].id", "listed_after": "0ms", **more}


def sent(service: Service, route: str = "POST /runs") -> list[dict[str, Any]]:
    return [one for one in service.requests if one["route"].startswith(route)]


# -------------------------------------------------------------------------------- once


@pytest.mark.parametrize("fault", ["lose", "half", "html", "huge", "500_after"])
@pytest.mark.parametrize("knows", ["find", "idempotent"])
def test_a_lost_answer_is_one_run(service: Service, fault: str, knows: str) -> None:
    """Whatever came in place of the answer: it is found, or sent once more with the same key and body."""
    how: dict[str, Any] = {"find": find(service)} if knows == "find" else {"idempotent": True}
    life = Life(service, json={"a": "{batch}"}, **how)
    request = life.request()
    service.fault("POST /runs", fault)
    prepared = life.action.prepare(request)
    with pytest.raises(Unknown):
        life.action.start(request, prepared)
    handle = life.action.find(request, prepared)
    if handle is None:
        handle = life.action.start(request, prepared)

    assert [run["id"] for run in service.runs()] == [handle["handle"]]
    told = {(one["headers"]["Idempotency-Key"], one["raw"]) for one in sent(service)}
    assert told == {(prepared["key"], b'{"a": "1"}')}
    assert len(sent(service)) == (1 if knows == "find" else 2)


def test_what_was_not_taken_is_sent_again_once_it_would_be_there(service: Service) -> None:
    """The connection broke before the service had it: not found, and so sent again."""
    life = Life(service, find=find(service))
    request = life.request()
    service.fault("POST /runs", "drop")
    prepared = life.action.prepare(request)
    with pytest.raises(Unknown):
        life.action.start(request, prepared)

    assert life.action.find(request, prepared) is None
    assert life.action.start(request, prepared)["handle"] == service.runs()[0]["id"]


def test_it_is_not_believed_to_be_absent_too_soon(service: Service) -> None:
    """Within `listed_after`, what is not found may still come."""
    life = Life(service, find=find(service, listed_after="1h"))
    request = life.request()
    service.fault("POST /runs", "drop")
    prepared = life.action.prepare(request)
    with pytest.raises(Unknown):
        life.action.start(request, prepared)

    with pytest.raises(Unknown, match="not listed yet"):
        life.action.find(request, prepared)


@pytest.mark.parametrize("fault", ["lose", "500", "500_after", "html", "half"])
def test_without_find_and_key_a_person_looks(service: Service, fault: str) -> None:
    """Nothing is sent twice to a service that knows no key; the fault names what to look for."""
    life = Life(service)
    request = life.request()
    service.fault("POST /runs", fault)
    prepared = life.action.prepare(request)
    try:
        handle = life.action.start(request, prepared)
    except Unknown:
        handle = Life(service).action.find(request, prepared)  # in this life or the next one
    progress = life.action.poll(request, handle)

    assert progress.status == "failed" and progress.fault.kind == "person"
    assert prepared["key"] in progress.hint
    assert len(sent(service)) == 1


def test_a_refusal_says_nothing_of_the_request_before_it(service: Service) -> None:
    """401 and 422 to a repetition: never a new attempt, for the first may have been taken."""
    life = Life(service, idempotent=True)
    request = life.request()
    service.fault("POST /runs", "lose")
    service.fault("POST /runs", "401")
    service.fault("POST /runs", "429")
    service.fault("POST /runs", "422")
    prepared = life.action.prepare(request)
    for _ in range(3):
        with pytest.raises(Unknown):
            if life.action.find(request, prepared) is None:
                life.action.start(request, prepared)
        life.action._pauses.clear()
    assert life.action.find(request, prepared) is None
    progress = life.action.poll(request, life.action.start(request, prepared))

    assert progress.fault.kind == "person" and "whether it was taken before is not known" in progress.why
    assert len(service.runs()) == 1


def test_a_key_that_the_service_has_forgotten_is_not_used_again(service: Service) -> None:
    """`key_kept`: beyond it, a repetition would be a second run."""
    life = Life(service, idempotent=True, key_kept=3_600.0)
    request = life.request()
    prepared = {**life.action.prepare(request), "time": time.time() - 3_601}
    handle = Life(service, idempotent=True).action.find(request, prepared)

    assert life.action.poll(request, handle).fault.kind == "person"


def test_an_attempt_that_nobody_wants_is_not_begun(service: Service) -> None:
    """`look` of a cancelled run sends nothing, and says None only if nothing was sent."""
    life = Life(service, idempotent=True)
    request = life.request()
    prepared = life.action.prepare(request)

    assert life.action.look(request, prepared) is None
    assert "lost" in Life(service).action.look(request, prepared)
    assert sent(service) == []


def test_keys_differ_by_attempt_and_by_what_they_are_of(service: Service) -> None:
    """And the same attempt has the same one in every life."""
    life = Life(service)
    one = life.action.prepare(life.request())["key"]
    same = Life(service).action.prepare(life.request())["key"]
    other = life.action.prepare(life.request(run=2))["key"]
    member = life.action.prepare(life.request(files=(File("/data", "a", 1, 1),)))["key"]

    assert one == same and len({one, other, member}) == 3
    assert re.fullmatch(r"[A-Za-z0-9.-]{10,100}", one)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fault", "kind", "scope", "counts"),
    [
        ("429", "transient", Scope.DESTINATION, False),
        ("408", "transient", Scope.DESTINATION, False),
        ("503", "transient", Scope.DESTINATION, False),
        ("401", "person", Scope.CREDENTIAL, True),
        ("404", "permanent", Scope.BATCH, True),
        ("422", "permanent", Scope.BATCH, True),
    ],
)
def test_what_was_surely_not_taken_is_refused(
    service: Service, fault: str, kind: str, scope: Scope, counts: bool
) -> None:
    """With the scope of who is at fault, and the first of what the service says."""
    life = Life(service)
    service.fault("POST /runs", fault, say={"detail": "the reason"})
    with pytest.raises(Refused) as refused:
        life.begin(life.request())
    told = refused.value.fault

    assert (told.kind, told.scope, told.counts) == (kind, scope, counts)
    assert fault in told.why and "the reason" in told.why
    assert told.hint


def test_a_service_that_is_not_there_burns_no_attempt(tmp_path: Path) -> None:
    """Nobody heard it: the destination is down."""
    nobody = Service(tmp_path / "service", free_port())
    life = Life(nobody)
    with pytest.raises(Refused) as refused:
        life.begin(life.request())

    assert (refused.value.fault.scope, refused.value.fault.counts) == (Scope.DESTINATION, False)
    assert "refused" in refused.value.fault.why


def test_a_service_that_wants_to_be_left_alone_is(service: Service) -> None:
    """Retry-After holds for every run to it, and for polls; nothing is sent meanwhile."""
    life = Life(service)
    _, handle = life.begin(life.request())
    service.fault("POST /runs", "429", after=120)
    with pytest.raises(Refused) as first:
        life.begin(life.request(run=2))
    count = len(service.requests)
    with pytest.raises(Refused) as second:
        life.begin(life.request(run=3))
    with pytest.raises(Unknown, match="asked again"):
        life.action.poll(life.request(), handle)

    assert first.value.fault.retry_after_s == 120
    assert 110 < (second.value.fault.retry_after_s or 0) <= 120
    assert len(service.requests) == count


@pytest.mark.parametrize("fault", ["dribble", "slow"])
def test_an_answer_that_does_not_end_is_given_up(service: Service, fault: str) -> None:
    """Also one of which each read brings a byte: the time is that of the whole."""
    life = Life(service, timeout=0.3)
    service.fault("POST /runs", fault, seconds=3.0)
    began = time.monotonic()
    with pytest.raises(Unknown, match="in time"):
        life.begin(life.request())

    assert time.monotonic() - began < 2.0


def test_what_is_not_accepted_is_no_success(service: Service) -> None:
    """Status 200, and the body says otherwise."""
    life = Life(service, accepted="ok")
    with pytest.raises(Refused, match="not accepted"):
        life.begin(life.request())


def test_a_redirect_is_followed_in_the_same_place_only(service: Service, tmp_path: Path, token: str) -> None:
    """There the request is sent again; a stranger sees neither it nor the secret."""
    with Service(tmp_path / "stranger") as stranger:
        life = Life(service, secrets={"TOKEN": token}, headers={"Authorization": "Bearer {TOKEN}"})
        service.fault("POST /runs", "redirect", to="/runs")
        _, handle = life.begin(life.request())
        service.fault("POST /runs", "redirect", to=f"{stranger.url}/runs")
        with pytest.raises(Refused, match="leads elsewhere"):
            life.begin(life.request(run=2))
        service.fault("POST /runs", "redirect", to=f"{stranger.url}/login", status=302)
        _, lost = life.begin(life.request(run=3))

    assert handle["handle"] == service.runs()[0]["id"]
    assert "lost" in lost
    assert stranger.requests == []


def test_trust_is_what_the_rule_says(tmp_path: Path) -> None:
    """A certificate of the site's own authority: taken with `ca`, and not without."""
    ca = authority(tmp_path)
    certificate, key = signed(tmp_path, "server", "IP:127.0.0.1")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with running(tmp_path, tls=tls) as service:
        trusting, other = Life(service, ca=str(ca)), Life(service)
        _, handle = trusting.begin(trusting.request())
        with pytest.raises(Refused, match="certificate is not trusted"):
            other.begin(other.request(run=2))
        looked = {found.what: found.ok for found in Action.look_online(trusting.options)}

    assert handle["handle"] == service.runs()[0]["id"]
    assert all(looked.values()) and any("answers" in what for what in looked)


# -------------------------------------------------------------------------------- secrets


def test_secrets_are_sent_and_stand_nowhere(
    service: Service, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that repeats all headers in every answer: handle, output, faults and log hold the name alone."""
    caplog.set_level(logging.DEBUG)
    service.token = TOKEN
    life = Life(
        service, secrets={"TOKEN": token}, headers={"Authorization": "Bearer {TOKEN}"},
        poll=poll(service, output="echo", why="echo.Authorization"), url=f"{service.url}/runs?t={{TOKEN}}",
    )  # fmt: skip
    request = life.request()
    prepared, handle = life.begin(request)
    progress: Progress = life.action.poll(request, handle)
    service.fault("POST /runs", "422", say={"detail": f"{'x' * 280} {TOKEN}"})
    with pytest.raises(Refused) as refused:
        life.begin(life.request(run=2))
    told = json.dumps([prepared, handle, progress.output, progress.why, request.options, request.written])
    told += refused.value.fault.why + caplog.text

    assert sent(service)[0]["headers"]["Authorization"] == f"Bearer {TOKEN}"
    assert progress.output["Authorization"] == "Bearer {TOKEN}"
    assert TOKEN not in told and TOKEN[:8] not in told and TOKEN.replace("/", "%2F") not in told


def test_a_secret_that_is_no_line_is_neither_sent_nor_told(service: Service, token: str) -> None:
    """Surely not sent, so the run waits for a person who writes it anew, and not for one who looks there."""
    Path(token).write_text("y" * 300 + "\0")
    life = Life(service, secrets={"TOKEN": token}, headers={"Authorization": "Bearer {TOKEN}"})
    with pytest.raises(Refused, match="control character") as refused:
        life.begin(life.request())

    assert "yyy" not in str(refused.value.fault)
    assert service.requests == []


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_leads_to_no_other_address(service: Service, name: str) -> None:
    """`..` is resolved before it is sent, percent-encoded or not: it would start something else. So for a handle."""
    life = Life(service, url=f"{service.url}/runs/{{chip}}/start")
    with pytest.raises(Refused, match="leads to another one"):
        life.begin(life.request(chip=name))
    other = Life(service)
    service.fault("POST /runs", "says", text=json.dumps({"id": name}))
    _, handle = other.begin(other.request())

    assert [one["route"] for one in service.requests] == ["POST /runs"]
    assert "finds no name of it" in handle["lost"]


def test_a_header_of_the_rules_own_is_sent_once(service: Service) -> None:
    """Whatever its case: a service may take the first of two."""
    life = Life(service, json={"a": 1}, headers={"Content-Type": "application/vnd.x+json"})
    life.begin(life.request())
    told = {name.lower(): value for name, value in sent(service)[0]["headers"].items()}

    assert told["content-type"] == "application/vnd.x+json"


@pytest.mark.parametrize(
    ("proxy", "kind"), [("socks9://:hush@x", "person"), ("http://u:hush@127.0.0.1:1", "transient")]
)
def test_a_proxy_of_the_environment_is_used_or_told(
    service: Service, monkeypatch: pytest.MonkeyPatch, proxy: str, kind: str
) -> None:
    """One that cannot be used is told without its password; nothing was sent, past it neither."""
    monkeypatch.setenv("HTTP_PROXY", proxy)
    life = Life(service)
    with pytest.raises(Refused) as refused:
        life.begin(life.request())

    assert refused.value.fault.kind == kind and "hush" not in str(refused.value.fault)
    assert service.requests == []


def test_a_file_cannot_be_named_like_a_secret(service: Service, token: str) -> None:
    """What a name holds is text, in addresses, headers, bodies and expressions."""
    name = "{TOKEN}/?#%`']"
    life = Life(
        service, secrets={"TOKEN": token}, headers={"X-Chip": "{chip} {TOKEN}"}, json={"chip": "{chip}"},
        url=f"{service.url}/runs?chip={{chip}}",
    )  # fmt: skip
    life.begin(life.request(chip=name))
    one = sent(service)[0]

    assert one["route"] == "POST /runs?chip=%7BTOKEN%7D%2F%3F%23%25%60%27%5D"
    assert (one["body"], one["headers"]["X-Chip"]) == ({"chip": name}, f"{name} {TOKEN}")


@pytest.mark.parametrize("trouble", ["missing", "open to others", "no credential"])
def test_a_secret_that_cannot_be_had_waits_for_a_person(service: Service, token: str, trouble: str) -> None:
    """HELD by its credential; nothing is sent, and a run under way is INACTIVE."""
    life = Life(service, secrets={"TOKEN": token}, headers={"Authorization": "Bearer {TOKEN}"})
    request = life.request()
    _, handle = life.begin(request)
    match trouble:
        case "missing":
            os.unlink(token)
        case "open to others":
            os.chmod(token, 0o644)
        case "no credential":
            life.options["secrets"] = {"TOKEN": "api-key"}
            request = life.request()
    count = len(service.requests)
    with pytest.raises(Refused) as refused:
        life.begin(life.request(run=2))

    assert (refused.value.fault.kind, refused.value.fault.scope) == ("person", Scope.CREDENTIAL)
    assert life.action.poll(request, handle).status == "inactive"
    assert len(service.requests) == count
    assert not next(iter(Action.look_online(life.options))).ok


def test_a_credential_of_the_service_manager(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name; read anew for each request, so that it can be renewed."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    life = Life(service, secrets={"TOKEN": "api-key"}, headers={"Authorization": "Bearer {TOKEN}"})
    for number, value in enumerate(("old", "new"), 1):
        (tmp_path / "api-key").write_text(value)
        life.begin(life.request(run=number))

    assert [one["headers"]["Authorization"] for one in sent(service)] == ["Bearer old", "Bearer new"]


# -------------------------------------------------------------------------------- what is filled in


def test_the_batch_in_the_body(service: Service) -> None:
    """Numbers, lists, what the day and the host were when it closed; also where it is nested."""
    files = (File("/data", "c1/a.cbf", 3, 5), File("/data", "c1/b.xml", 4, 6, role="companion"))
    life = Life(
        service, headers={"X-Day": "{date}"},
        json={"n": "{image|int}", "deep": [{"at": "{host} {date} {date}", "all": "{manifest}"}], "paths": "{files}",
              "who": "{rule} {batch} {key}", "braces": "{{x}}", "plain": [1, None, True]},
    )  # fmt: skip
    prepared, _ = life.begin(life.request(files=files, image="042"))
    one = sent(service)[0]
    a, b = ({"root": "/data", "path": f.path, "size": f.size, "mtime_ns": f.mtime_ns} for f in files)

    assert one["headers"]["X-Day"] == "2026-11-29"
    assert one["body"] == {
        "n": 42, "deep": [{"at": "krios1 2026-11-29 2026-11-29", "all": [a, {**b, "role": "companion"}]}],
        "paths": ["/data/c1/a.cbf", "/data/c1/b.xml"], "who": f"chips 1 {prepared['key']}", "braces": "{x}",
        "plain": [1, None, True],
    }  # fmt: skip


def test_a_name_that_is_no_utf8_is_refused_alone(service: Service) -> None:
    """Where files are listed; a rule that lists none takes it."""
    odd = os.fsdecode(b"\xff.cbf")
    lists, others = Life(service, json={"files": "{files}"}), Life(service, json={"chip": "c1"})

    assert "UTF-8" in lists.action.refuses(lists.options, "/data", odd)
    assert lists.action.refuses(lists.options, "/data", "a.cbf") == ""
    assert others.action.refuses(others.options, "/data", odd) == ""


# -------------------------------------------------------------------------------- polling


@pytest.mark.parametrize(
    ("state", "status", "kind"),
    [("COMPLETED", "succeeded", ""), ("FAILED", "failed", "person"), ("CRASHED", "failed", "transient"),
     ("PAUSED", "inactive", ""), ("CANCELLED", "cancelled", ""), ("RUNNING", "active", "")],
)  # fmt: skip
def test_states_are_what_the_rule_says(service: Service, state: str, status: str, kind: str) -> None:
    """Each by its expression; a failure that passes is another attempt's, any other a person's."""
    states = {"active": "RUNNING", "inactive": "PAUSED", "again": "CRASHED", "cancelled": "CANCELLED"}
    told = {name: f"state == '{word}'" for name, word in states.items()}
    life = Life(service, poll=poll(service, **told, why="join(' ', ['it is', state])", output="{{s: state}}"))
    request = life.request()
    _, handle = life.begin(request)
    service.ends, service.hold = state, state == "RUNNING"
    progress: Progress = life.action.poll(request, handle)

    assert progress.status == status
    assert (progress.fault.kind if progress.fault else "") == kind
    assert f"it is {state}" in progress.why
    assert progress.output == (None if status in ("active", "inactive") else {"s": state})


def test_a_state_that_nobody_knows_ends_nothing(service: Service) -> None:
    """With `active`, what no expression holds for is no word; without it, the run goes on."""
    service.ends = "DREAMING"
    strict, lax = Life(service, poll=poll(service, active="state == 'RUNNING'")), Life(service)
    request = strict.request()
    _, handle = strict.begin(request)

    with pytest.raises(Unknown, match="DREAMING"):
        strict.action.poll(request, handle)
    assert lax.action.poll(lax.request(), handle).status == "active"


@pytest.mark.parametrize("fault", ["500", "503", "429", "half", "html", "huge", "drop", "404"])
def test_a_poll_that_comes_to_nothing_ends_nothing(service: Service, fault: str) -> None:
    """The run goes on there, whatever is answered once."""
    life = Life(service)
    request = life.request()
    _, handle = life.begin(request)
    service.fault("GET /runs/", fault)
    with pytest.raises(Unknown):
        life.action.poll(request, handle)

    assert life.action.poll(request, handle).status == "succeeded"


def test_a_run_that_the_service_does_not_know_for_long_is_a_persons(service: Service) -> None:
    """404 once may be a restart; for ten minutes it is the end of what can be known."""
    life, now = Life(service), [0.0]
    life.action._polls = Polls(clock=lambda: now[0])
    request = life.request()
    _, handle = life.begin(request)
    service.fault("GET /runs/", "404", times=2)
    with pytest.raises(Unknown, match="does not know"):
        life.action.poll(request, handle)
    now[0] = GONE_S
    progress = life.action.poll(request, handle)

    assert (progress.status, progress.fault.kind) == ("failed", "person")


@pytest.mark.parametrize(("found", "expression"), [
    ("1e999", "o"), ("[" * 900 + "]" * 900, "o"), ("1", "&o"), ('"nan"', "to_number(o)"),
    ('"inf"', "ceil(to_number(o))"),
])  # fmt: skip
def test_an_output_can_be_read_by_whoever_reads_json(service: Service, found: str, expression: str) -> None:
    """Whatever was answered, and asked of it: the run ends, and no reader of the journal breaks at it."""
    life = Life(service, poll=poll(service, output=expression, succeeded="ok", why=expression))
    request = life.request()
    _, handle = life.begin(request)
    service.fault("GET /runs", "says", text='{"ok": 1, "o": ' + found + "}")
    progress: Progress = life.action.poll(request, handle)
    told = json.dumps(progress.output, allow_nan=False)

    assert progress.status == "succeeded"
    assert told.count("[") <= 50


def test_a_redirect_to_no_address_is_an_answer(service: Service) -> None:
    """Not a fault of ours after it was sent."""
    life = Life(service)
    service.fault("POST /runs", "redirect", to="http://[", status=307)
    with pytest.raises(Refused, match="leads elsewhere"):
        life.begin(life.request())


def test_what_a_service_calls_a_run_is_a_text_in_expressions(service: Service) -> None:
    """Whatever quotes it holds, it finds itself and nothing else."""
    name = "a`'\"\\]|@"
    filling = Filling(Life(service).request(), "key", name, Secrets({}))

    assert ask(filling.expression("[?id == {handle}].n"), [{"id": name, "n": 1}, {"id": "b", "n": 2}]) == [1]


def test_the_service_is_killed_and_comes_again(tmp_path: Path) -> None:
    """A run that was taken is polled to its end by the next life of both."""
    port = free_port()
    argv = [sys.executable, str(REPOSITORY / "tests" / "rest.py"), str(tmp_path / "service"), str(port)]

    def serve() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        return process

    service = Service(tmp_path / "service", port)
    life, process = Life(service), serve()
    try:
        request = life.request()
        _, handle = life.begin(request)
        before = life.action.poll(request, handle)
        process.kill()
        process.wait()
        with pytest.raises(Unknown, match="refused"):
            life.action.poll(request, handle)
        process = serve()
        (tmp_path / "go").touch()
        after = Life(service).action.poll(request, handle)
    finally:
        process.kill()
        process.wait()

    assert (before.status, after.status) == ("active", "succeeded")


# -------------------------------------------------------------------------------- rules


BAD = {
    "`handle`: this is no expression": "handle: '[0'",
    "`poll.succeeded`: this is no expression": "poll: {url: 'http://x/{handle}', failed: f, succeeded: 'a ==='}",
    "`poll` needs the expression `failed`": "poll: {url: 'http://x/{handle}', succeeded: s}",
    "did you mean `succeeded`?": "poll: {url: 'http://x/{handle}', succeded: s, failed: f, succeeded: s}",
    "without quotes around it": "find: {url: 'http://x/', handle: \"[?k == '{key}']\"}",
    "nothing in it says which attempt": "find: {url: 'http://x/', handle: '[0]'}",
    "the service is told no key": "idempotent: true, idempotency_header: ''",
    "`secrets.TOKEN`: nothing uses": "secrets: {TOKEN: x}",
    "`secrets.TOKEN`: what stands there is no name of a secret": "secrets: {TOKEN: 's3 cret'}",
    "`headers.Host`": "headers: {Host: x}",
    "the attempt's key already": "headers: {idempotency-key: x}",
    "stands there twice": "headers: {Accept: a, accept: b}",
    "`json`: it cannot be said in JSON": "json: {a: 1e999}",
    "nothing is called `TOKEN`": "headers: {A: '{TOKEN}'}",
    "the host": "find: {url: 'http://{chip}.org/{key}', handle: x}",
    "a list of files cannot stand within a text": "json: {a: 'x {files}'}",
    "a GET carries no body": "method: GET, json: {a: 1}",
    "between 100 ms and 100 s": "timeout: 5m",
    "{handle} has no value here": "json: {a: '{handle}'}",
}


@pytest.mark.parametrize("words", BAD)
def test_faults_are_told_when_the_rule_is_read(words: str) -> None:
    """In the file, at the line and column of what is wrong."""
    text = (
        "rules:\n  - name: x\n    watch: /data\n    match: ['{chip}/*']\n    existing: ignore\n    start:\n"
        f"      http:\n        {{url: 'http://x/runs',\n        {BAD[words]}}}\n"
    )
    faults = parse_rules([("x.yaml", text)]).faults
    told = [fault for fault in faults if words in f"{fault.message} {fault.hint}"]

    assert told, faults
    assert (told[0].file, told[0].line) == ("x.yaml", 9) and told[0].column > 9
    assert "s3 cret" not in told[0].message + told[0].hint


def test_it_proves_nothing() -> None:
    """A rule that demands a proof is refused."""
    text = (
        "rules: [{name: x, watch: /data, match: ['*'], existing: ignore, proof: required,"
        " start: {http: {url: 'http://x/runs'}}}]"
    )

    assert any("not possible" in fault.message for fault in parse_rules([("x.yaml", text)]).faults)


# -------------------------------------------------------------------------------- the daemon


def recipes() -> dict[str, str]:
    """The rules in the how-to, by their names."""
    found = re.findall(r"```yaml\n(rules:.*?)```", HOW_TO.read_text(), re.DOTALL)
    return {re.findall(r"name: (\S+)", text)[0]: text for text in found}


def adapted(text: str, site: Site, service: Service, secret: Path) -> str:
    """A recipe with places of this test; nothing else of it is changed."""
    for there, here in {
        "https://prefect.example.org": service.url, "https://airflow.example.org": service.url,
        "/data/chips": str(site.data), "idle: 2m": "idle: 300ms", "every: 10s": "every: 200ms",
        "prefect-api-key": str(secret), "/etc/trigger-daemon/airflow.token": str(secret),
        "absent: 404": "absent: 404\n          listed_after: 300ms",
        "chips-webhook": str(secret.with_name("hook")), "    existing: ignore":
        "    existing: process\n    complete: {quiescence: 300ms}\n    retry: {initial: 500ms, longest: 1s}",
    }.items():  # fmt: skip
        text = text.replace(there, here)
    return text


def test_the_recipes_as_they_are_written(tmp_path: Path, service: Service, token: str) -> None:
    """Prefect, Airflow and a webhook: each batch started once through a lost answer, and told as succeeded."""
    service.token = TOKEN
    hook = tmp_path / "hook"
    hook.write_text(f"{service.url}/hook/T0/B0/x")
    hook.chmod(0o600)
    site = Site(tmp_path / "site")
    found = recipes()
    for name, text in found.items():
        (site.rules_dir / f"{name}.yaml").write_text(adapted(text, site, service, Path(token)))
    service.fault("POST /api/deployments", "lose")
    service.fault("POST /api/v2/dags/process/dagRuns", "lose")
    service.token, held = "", service.token  # the webhook's secret is its address
    service.hold = True
    (site.data / "c1").mkdir()
    (site.data / "c1" / "a.cbf").write_bytes(b"x")
    site.start()
    try:
        site.until(lambda: site.states()["ACTIVE"] == 2 and site.states()["SUCCEEDED"] == 1, 60, "two are under way")
        service.hold = False
        site.until(lambda: site.states()["SUCCEEDED"] == 3, 30, "all have succeeded")
        shown = [site.cli("runs", "show", str(number)).stdout for number in (1, 2, 3)]
    finally:
        site.stop()
    kept = [path.read_bytes().decode("latin-1") for path in site.state.rglob("*.db*")]
    everywhere = "".join([*shown, site.tail(), *kept])

    assert list(found) == ["chips-prefect", "chips-airflow", "chips-told"]
    assert len(service.runs()) == 2 and len(service.hooks) == 1
    assert {json.dumps(run["body"], sort_keys=True) for run in service.runs()} == {
        json.dumps({"chip": "c1", "files": [str(site.data / "c1" / "a.cbf")]})
    }
    assert service.hooks[0]["text"].startswith("c1 is complete: batch ")
    assert held not in everywhere and "/hook/T0" not in everywhere
    assert sorted(json.loads(output or "null").get("run", "") for (output,) in
                  site.ask("SELECT output FROM run WHERE output IS NOT NULL")) == sorted(
        [service.by_key(run["key"])["id"] if "prefect" in run["key"] else run["key"] for run in service.runs()]
    )  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_killed_between_question_and_answer(tmp_path: Path, place: str) -> None:
    """Between key, journal, request and answer: the next life asks with the same key, and there is one run."""
    with running(tmp_path) as service:
        site = Site(tmp_path / "site")
        start = {"url": f"{service.url}/runs", "handle": "id", "idempotent": True, "poll": poll(service)}
        site.write_rules(site.rule(start={"http": start}, retry={"initial": "500ms", "longest": "1s"}))
        (site.data / "a.tif").write_bytes(b"x")
        site.start(wait=False, env={"TRIGGER_FAIL": f"{place}:kill"})
        assert site.process is not None
        assert site.process.wait(60) == -9, site.tail()
        site.start()
        try:
            site.until(lambda: site.states()["SUCCEEDED"] == 1, 60, "it has succeeded")
        finally:
            site.stop()

    assert len(service.runs()) == 1
    assert len({one["headers"]["Idempotency-Key"] for one in sent(service)}) == 1


def test_one_that_knows_no_key_is_held_after_a_kill(tmp_path: Path) -> None:
    """Nobody knows whether it was sent: a person is told where to look."""
    with running(tmp_path) as service:
        site = Site(tmp_path / "site")
        site.write_rules(site.rule(start={"http": {"url": f"{service.url}/hook"}}))
        (site.data / "a.tif").write_bytes(b"x")
        site.start(wait=False, env={"TRIGGER_FAIL": "http.sent:kill"})
        assert site.process is not None
        assert site.process.wait(60) == -9, site.tail()
        site.start()
        try:
            site.until(lambda: site.states()["HELD"] == 1, 60, "it is held")
            shown: Mapping[str, Any] = site.json("runs", "show", "1")
        finally:
            site.stop()

    assert len(service.hooks) == 1
    assert "whether the service has taken it is not known" in json.dumps(shown)


def test_faults_at_random_and_kills_of_both(tmp_path: Path) -> None:
    """A small part of `python -m tests.rest_chaos`: every batch accepted once, and told as succeeded."""
    chaos = Chaos(tmp_path, seed=3, faults=0.05)
    try:
        chaos.set_up(5)
        chaos.work(60, 1, 100)
        figures = chaos.judge()
    finally:
        chaos.end()

    assert (figures["files"], figures["kills"]) == (60, 1)
