"""Start a Globus flow for each batch: `start: {globus_flow: {flow: UUID, input: {...}}}`.

Started once, as nearly as the service allows: it has no request id for runs,
so a token of the attempt goes into label and tags, is journaled first, and is
looked for before anything is sent a second time. Watched to the end: a flow
that waits for a person is told with its link, one that failed with the log of
the state that failed, and what it puts out becomes the run's output.

In `input`, captures are filled in, and a value that is only one of these
becomes more than a text:

    '{manifest}'  {collection, path, sha256, files, bytes} of a JSON-lines file that lists the batch
    '{files}'     the list of the files' paths in the collection `from`
    '{items}'     a transfer's items: source_path in `from`, and destination_path below `path`
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trigger_daemon.actions import (
    Context,
    Differs,
    Json,
    Progress,
    Proof,
    Refused,
    Request,
    Unknown,
    Unproven,
)
from trigger_daemon.actions._globus_batch import short, uses, uuid_of
from trigger_daemon.actions._globus_polls import Polls
from trigger_daemon.actions._globus_sent import Sent
from trigger_daemon.actions._members import changed_members
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.failpoints import fail_point
from trigger_daemon.globus import NO_CLIENT
from trigger_daemon.globus.faults import Trouble
from trigger_daemon.globus.judging import judge_input
from trigger_daemon.globus.paths import is_uuid, join, not_utf8, shown_roots, unsendable
from trigger_daemon.globus.service import Clients, Seat

LABEL_MAX = 64  # what action providers take; the service's own limit is not published
TOKEN_LETTERS = 16
INPUT_BYTES_MAX = 32_768  # a run's whole state may have 200 KB, and every action's result is added to it
SCHEMA_KEPT_S = 600.0  # how long a flow's input schema is believed
POLL_SHARE = 4  # a run of some age is looked at again after this part of it
POLL_LONGEST_S = 120.0  # the service itself looks at its actions every ten minutes in the end
LOG_READ = 50
LOG_TOLD = 5
OUTPUT_BYTES_MAX = 65_536
MANIFEST_KEPT_S = 30 * 86_400.0  # after its run was last known to be under way
MANIFEST_TOUCHED_S = 86_400.0
TOUCHED_MAX = 10_000
RUNS_READ_MAX = 10_000  # that a label may match
RESUME_S = 60.0  # a run that waits for a consent is let go on so long after it was seen to, then after twice that
RESUME_LONGEST_S = 600.0
_MANIFEST = re.compile(r"[a-z0-9-]+-[0-9]+-td-[a-z2-7]{16}\.jsonl")
WEB = "https://app.globus.org/runs"


class Action:
    """Globus Flows."""

    OPTIONS: Options = {
        "flow": Option("uuid", "UUID of the flow", required=True),
        "input": Option("map", "the flow's input; '{manifest}', '{files}' and '{items}' stand for the batch", None,
                        template=True),
        "label": Option("text", "what the run is called, before the batch's token", "{rule} {batch}", template=True),
        "managers": Option("texts", "who may manage the run: URNs of identities or groups", None, template=True),
        "monitors": Option("texts", "who may see the run: URNs of identities or groups", None, template=True),
        "from": Option("uuid", "UUID of the collection that shows the watched directory: for {files}, {items}", None),
        "path": Option("text", "directory at the destination, for {items}", "/", template=True),
    }  # fmt: skip
    EXTRA_NAMES = ("manifest", "files", "items")
    VERIFIES = False
    PREPARES = True
    LEAVES_OUT = False
    POOL = "globus"  # a slow service keeps no copy waiting

    def __init__(self, context: Context) -> None:
        self._globus = Seat(context.settings.get("globus") or {}, os.path.dirname(os.path.dirname(context.state_dir)))
        self._lock = threading.Lock()
        self._schemas: dict[str, tuple[float, Any]] = {}
        self._started: dict[tuple[int, int], Json] = {}
        self._sent = Sent()
        self._polls = Polls()
        self._resumes: dict[str, tuple[float, float]] = {}  # run without a consent -> when next, after what pause
        self._touched: dict[str, float] = {}  # manifest -> when it was last said to be needed
        self._unsent: set[tuple[int, int]] = set()  # attempts that surely were not sent: only these are, without a look

    # -------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        for key in ("flow", "from"):
            if options.get(key) is not None and not is_uuid(options[key]):
                raise OptionFault(key, f"{options[key]!r} is not a UUID", "copy it from app.globus.org")
        for name in ("files", "items"):
            if uses(options.get("input"), name) and options.get("from") is None:
                raise OptionFault("input", f"{{{name}}} needs the collection that shows the files", "add `from: UUID`")

    def check_roots(self, options: Mapping[str, Any], roots: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Raise OptionFault if there is no account, or what the input asks for cannot be named with these settings."""
        globus = settings["globus"]
        if not globus.get("client_id"):
            raise OptionFault("", *NO_CLIENT)
        if uses(options.get("input"), "manifest") and not globus.get("manifests"):
            hint = "add to the settings `globus: {manifests: {path: DIRECTORY, collection: UUID}}`"
            raise OptionFault("input", "the settings do not say where manifests are written", hint)
        if uses(options.get("input"), "manifest"):
            _check_place(str(globus["manifests"]["path"]), roots)
        if options.get("from") is None or not is_uuid(options["from"]):
            return
        shown = (globus.get("collections") or {}).get(str(options["from"]).lower(), {})
        for root in roots:
            if not any(root == r or root.startswith(r.rstrip("/") + "/") for r in shown):
                hint = f"add to the settings `globus: {{collections: {{{options['from']}: {{{root}: /}}}}}}`"
                raise OptionFault("from", f"the collection does not show {root}", hint)

    def destination(self, options: Mapping[str, Any]) -> str:
        return f"flow {options['flow']}"

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    # ------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        """Write the manifest, fix token and label, and see that the flow takes the input. Raises Refused."""
        token = _token(request)
        prepared: dict[str, Any] = {"token": token, "label": _label(request, token), "time": time.time()}
        try:
            if request.options.get("from") is not None:
                roots = [file.root for file in request.files]
                prepared["roots"] = shown_roots(self._globus.account, request.options["from"], roots)
            if uses(_written(request), "manifest"):
                prepared["manifest"] = self._write_manifest(request, token)
            body = _input(request, prepared)
            _refuse_large(body)
            schema = self._schema(request.options["flow"])
        except Trouble as trouble:
            raise Refused(trouble.fault) from None
        found = judge_input(schema, body) if schema else []
        if faults := [fault for fault in found if fault.severity == "error"]:
            words = "; ".join(f"{fault.json_path}: {fault.message}" for fault in faults[:3])
            hint = "let `input` in the rule fit the flow's input schema, then `runs retry --anew`"
            raise Refused(Fault("permanent", f"the flow does not take this input: {words}", hint))
        for fault in found:  # the service says its own word about it
            about = {"run": request.run, "flow": request.options["flow"], "why": fault.message}
            logging.getLogger(__name__).warning("globus.input_not_judged", extra=about)
        with self._lock:
            self._unsent.add((request.run, request.attempt))
        return prepared

    def _schema(self, flow: str) -> Any:
        with self._lock:
            asked_at, schema = self._schemas.get(flow, (-1e9, {}))
        if time.monotonic() - asked_at > SCHEMA_KEPT_S:
            schema = self._globus.ask(
                "get the flow", lambda globus: dict(globus.flows.get_flow(flow).data).get("input_schema") or {}
            )
            with self._lock:
                self._schemas[flow] = (time.monotonic(), schema)
        return schema

    def _write_manifest(self, request: Request, token: str) -> Json:
        """Write what the batch holds where a collection shows it; the same content under the same name, each time."""
        place = self._globus.account.manifests
        if place is None:
            hint = "add to the settings `globus: {manifests: {path: DIRECTORY, collection: UUID}}`"
            raise Trouble(Fault("person", "the settings do not say where manifests are written", hint), False)
        directory, collection = place
        lines = []
        for file in request.files:
            told = {"root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns}
            lines.append(json.dumps({**told, "role": file.role} if file.role else told))
        content = "".join(f"{line}\n" for line in lines).encode("ascii")
        name = f"{request.rule}-{request.run}-{token}.jsonl"
        try:
            os.makedirs(directory, exist_ok=True)
            _thin(directory)
            _write_whole(os.path.join(directory, name), content)
        except OSError as error:
            why = f"cannot write the manifest to {directory}: {error.strerror or error}"
            raise Trouble(Fault("transient", why, "make room there, or see who may write to it"), False) from None
        root = shown_roots(self._globus.account, collection, [directory])[directory]
        return {
            "collection": collection, "path": join(root, name), "sha256": hashlib.sha256(content).hexdigest(),
            "files": len(request.files), "bytes": sum(file.size for file in request.files),
            "file": os.path.join(directory, name),
        }  # fmt: skip

    def _keep_manifest(self, path: str) -> None:
        """A run that is under way needs its manifest, however old that is."""
        now = time.time()
        if path and abs(now - self._touched.get(path, 0.0)) > MANIFEST_TOUCHED_S:
            with contextlib.suppress(OSError):
                os.utime(path)
            if len(self._touched) > TOUCHED_MAX:
                self._touched.clear()
            self._touched[path] = now

    def start(self, request: Request, prepared: Json) -> Json:
        """Start the run; one POST, never repeated by itself. Raises Refused, Unknown."""
        key = (request.run, request.attempt)
        with self._lock:
            if (known := self._started.get(key)) is not None:
                return known
            unsent = key in self._unsent
        if not unsent:  # an earlier call, or another life, may have sent it
            found = self.find(request, prepared)
            if found is not None:
                return found
        options = request.options
        body = _input(request, prepared)

        def run(globus: Clients) -> Any:
            more: dict[str, Any] = {
                "run_managers": _texts(options.get("managers")) or None,
                "run_monitors": _texts(options.get("monitors")) or None,
            }
            answer = globus.flow(options["flow"]).run_flow(
                body,
                label=prepared["label"],
                tags=[prepared["token"]],
                activity_notification_policy={"status": []},
                **{name: value for name, value in more.items() if value is not None},
            )
            return {"run_id": uuid_of(answer["run_id"])}

        with self._sent.under_way(key):
            with self._lock:
                if key not in self._unsent:  # another call has sent it between our look and this
                    raise Unknown("it was sent meanwhile; what became of it is looked for")
                self._unsent.discard(key)
            fail_point("globus.run")
            try:
                told = self._globus.ask("start the flow", run, first=True)
            except Trouble as trouble:
                if trouble.done is False:
                    raise Refused(trouble.fault) from None
                raise Unknown(trouble.words()) from None
        fail_point("globus.running")
        return self._known(key, told, prepared)

    def _known(self, key: tuple[int, int], told: Mapping[str, Any], prepared: Json) -> Json:
        handle = {"run": str(told["run_id"]), "time": prepared["time"]}
        if manifest := prepared.get("manifest"):
            handle["manifest"] = manifest.get("file", "")
        with self._lock:
            self._started[key] = handle
        return handle

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Look for the run by its token. None only after so long that it would surely be listed."""
        key = (request.run, request.attempt)
        found = self._sent.look(key, lambda: self._look_for(request, prepared), self._globus.account.listed_after_s)
        if found is None:
            with self._lock:
                self._unsent.add(key)
        return found

    def _look_for(self, request: Request, prepared: Json) -> Json | None:
        # Not by its start time: a clock of ours that is wrong would hide it, and a second one would be started.
        asked = {"filter_label": prepared["token"]}
        flow = request.options["flow"]
        try:
            runs = self._globus.ask(
                "look for the run by its token",
                lambda globus: [
                    dict(run)
                    for run in itertools.islice(
                        globus.flows.paginated.list_runs(filter_flow_id=flow, query_params=asked).items(), RUNS_READ_MAX
                    )
                ],
                first=True,
            )
        except Trouble as trouble:
            raise Unknown(trouble.words()) from None
        for run in runs:
            if _carries(run, prepared["token"]):
                return self._known((request.run, request.attempt), run, prepared)
        return None

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how the run stands, and what it waits for."""
        number = handle["run"]
        if (last := self._polls.crowded(number)) is not None:
            return last
        self._keep_manifest(str(handle.get("manifest") or ""))
        with self._polls.asking(number) as asked:
            asked.progress = self._stands(request, handle, number)
        return asked.progress

    def _stands(self, request: Request, handle: Json, number: str) -> Progress:
        try:
            told = self._globus.ask("ask how the flow stands", lambda globus: dict(globus.flows.get_run(number).data))
        except Trouble as trouble:
            if trouble.status == 404 and (fault := self._polls.gone(number, "the run", request.run)):
                return Progress("failed", fault.why, fault.hint, fault)
            if trouble.fault.scope == Scope.CREDENTIAL:
                return Progress("inactive", trouble.fault.why, trouble.fault.hint, again_in_s=60.0)
            raise Unknown(trouble.words()) from None
        if str(told.get("run_id")) != number:
            raise Unknown("Globus answered with something else than the run that was asked about")
        self._polls.there(number)
        details = _map(told.get("details"), "description")
        words = short(str(details.get("description") or told.get("display_status") or ""))
        link = f"{WEB}/{number}"
        again_s = self._again_s(handle)
        match told.get("status"):
            case "ACTIVE":
                return Progress("active", again_in_s=again_s)
            case "INACTIVE" if told.get("blocking_web_input_id"):
                why = f"the flow waits for a person's answer: {link}"
                return Progress("inactive", why, f"answer it at {link}", again_in_s=min(again_s, 60.0))
            case "INACTIVE" if _wants_consent(details):
                why = f"the flow waits for a consent: {words}"
                if said := self._let_go_on(request, number):
                    why = f"{why}; {said}"
                hint = f"run `trigger-daemon globus login`; then it goes on by itself, or at once if resumed at {link}"
                return Progress("inactive", why, hint, again_in_s=min(again_s, RESUME_S))
            case "INACTIVE":
                hint = f"see {link}, and resume it there"
                return Progress("inactive", f"the flow stands still: {words}", hint, again_in_s=min(again_s, 60.0))
            case "SUCCEEDED":
                size = sum(file.size for file in request.files)
                output = _output(number, told, details.get("output"))
                changed = changed_members(request)
                done = len(request.files)
                return Progress(
                    "succeeded", words, files_done=done, bytes_done=size, output=output, changed=changed
                )
            case "FAILED" if details.get("code") == "FlowCanceled":
                return Progress("cancelled", words or "cancelled at Globus", output=_output(number, told))
            case "FAILED" | "ENDED" as status:
                state, log = self._log(number)
                where = f" in state {state}" if state else ""
                why = f"the flow {status}{where}: {_cause(details, log, words)}"
                fault = Fault("person", why, f"see {link}; then `trigger-daemon runs retry {request.run}`")
                output = {**_output(number, told), "failed_state": state, "log": log}
                return Progress("failed", why, fault.hint, fault, output=output, changed=changed_members(request))
            case status:  # whatever it is, it is no word that the attempt has ended
                raise Unknown(f"Globus tells a status that is not known: {status!r}")

    def _let_go_on(self, request: Request, number: str) -> str:
        """Try, now and then, to resume a run that waits for a consent: only that tells whether it was given."""
        now = time.monotonic()
        with self._lock:
            due_at, pause_s = self._resumes.setdefault(number, (now + RESUME_S, RESUME_S))
            if now < due_at:
                return ""
            pause_s = min(2 * pause_s, RESUME_LONGEST_S)
            self._resumes[number] = now + pause_s, pause_s
        try:
            self._globus.ask(
                "resume the flow", lambda globus: globus.flow(request.options["flow"]).resume_run(number).data
            )
        except Trouble as trouble:
            return trouble.words()
        return "it was resumed just now"

    def _log(self, number: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the state that failed, and the last of the run's log, oldest first."""
        try:
            entries = self._globus.ask(
                "read the flow's log",
                lambda globus: [
                    dict(entry) for entry in globus.flows.get_run_logs(number, limit=LOG_READ, reverse_order=True)
                ],
            )
        except Trouble:
            return "", []
        failed = next((e for e in entries if "Fail" in str(e.get("code")) and _state(e)), {})
        told = [
            {"time": e.get("time"), "code": e.get("code"), "state": _state(e), "said": short(str(e["description"]))}
            for e in entries[:LOG_TOLD] if "description" in e
        ]  # fmt: skip
        return _state(failed), told[::-1]

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the end of the run; polls tell when it has come."""
        try:
            number = handle["run"]
            self._globus.ask("cancel the flow", lambda globus: globus.flows.cancel_run(number).data, first=True)
        except Trouble as trouble:
            if trouble.status not in (400, 404, 409):  # it has ended already, or is not known: polls tell
                raise Unknown(trouble.words()) from None

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        return Unproven(Fault("permanent", "a flow's end says nothing of what lies where", "set `proof: none`"))

    def forget(self, run: int) -> None:
        with self._lock:
            for key in [key for key in self._started if key[0] == run]:
                number = self._started.pop(key)["run"]
                self._polls.forget(number)
                self._resumes.pop(number, None)
            self._unsent = {key for key in self._unsent if key[0] != run}
        self._sent.forget(run)

    def close(self) -> None:
        self._globus.close()

    def _again_s(self, handle: Json) -> float:
        age_s = max(0.0, time.time() - float(handle["time"]))
        return min(max(self._globus.account.poll_s, age_s / POLL_SHARE), POLL_LONGEST_S)


def _check_place(directory: str, roots: Sequence[str]) -> None:
    """Raise OptionFault for manifests that would be taken for new files: each would start a flow, for ever."""
    for root in roots:
        inside = directory.rstrip("/") + "/"
        if inside.startswith(root.rstrip("/") + "/"):
            below = inside[len(root.rstrip("/")) + 1 :].strip("/")
            if not any(part.startswith(".") for part in below.split("/")):
                why = f"manifests are written to {directory}, which this rule watches: each would be a new file"
                hint = "let `globus: {manifests: {path}}` name a directory that begins with a dot, or lies elsewhere"
                raise OptionFault("input", why, hint)


# ---------------------------------------------------------------------- what is sent


def _token(request: Request) -> str:
    """Return letters that name this attempt of this batch, and nothing else."""
    about = [request.rule, request.run, request.attempt]
    about += [[file.root, file.path, file.size, file.mtime_ns] for file in request.files]
    digest = hashlib.sha256(json.dumps(about).encode("ascii")).digest()
    return f"td-{base64.b32encode(digest).decode('ascii')[:TOKEN_LETTERS].lower()}"


def _label(request: Request, token: str) -> str:
    said = " ".join(str(request.options.get("label") or "").split())
    return f"{said[: LABEL_MAX - len(token) - 1]} {token}".strip()


def _input(request: Request, prepared: Json) -> Any:
    """Return the run's input: what the journal holds, with the batch put where the rule says."""
    roots = prepared.get("roots") or {}
    directory = f"/{str(request.options.get('path') or '/').strip('/')}"

    def sources() -> list[str]:
        return [_sendable(join(roots[file.root], file.path)) for file in request.files]

    def items() -> list[dict[str, str]]:
        targets = [_sendable(join(directory, file.path)) for file in request.files]
        return [{"source_path": s, "destination_path": t} for s, t in zip(sources(), targets, strict=True)]

    def fill(value: Any, written: Any) -> Any:
        match written:  # where the rule says so, and not where a capture happens to read so
            case "{manifest}":
                return {key: told for key, told in prepared["manifest"].items() if key != "file"}
            case "{files}":
                return sources()
            case "{items}":
                return items()
            case Mapping():
                return {key: fill(item, written.get(key)) for key, item in value.items()}
            case list() | tuple():
                return [fill(item, each) for item, each in zip(value, written, strict=True)]
        return value

    return fill(dict(request.options.get("input") or {}), _written(request))


def _sendable(path: str) -> str:
    """Return a path that a flow may be given. Raises Refused for one that Globus takes for another."""
    if why := unsendable(path):
        raise Refused(Fault("person", f"it cannot be sent: {why}", "rename it", Scope.FILE))
    return path


def _written(request: Request) -> Any:
    """Return the input as the rule has it; as it was filled in where that is not known any more."""
    filled = dict(request.options.get("input") or {})
    return filled if request.written is None else request.written.get("input", {})


def _refuse_large(body: Any) -> None:
    text = json.dumps(body)
    if len(text) > INPUT_BYTES_MAX:
        why = f"the input has {len(text):,} bytes; a flow takes {INPUT_BYTES_MAX:,}"
        raise Trouble(Fault("permanent", why, "give it '{manifest}' instead of lists of files"), False)
    if why := not_utf8(json.dumps(body, ensure_ascii=False)):
        raise Trouble(Fault("person", f"a file cannot be named in the input: {why}", "rename it", Scope.FILE), False)


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _write_whole(path: str, content: bytes) -> None:
    """Let the file be there whole, durably, or not at all."""
    new = f"{path}.part"
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _thin(directory: str) -> None:
    """Remove manifests of ours that no flow needs any more: they would fill the disk in some years."""
    before = time.time() - MANIFEST_KEPT_S
    with os.scandir(directory) as entries:
        for entry in entries:
            if not _MANIFEST.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # another user's, or gone by now
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before:
                    os.unlink(entry.path)


# -------------------------------------------------------------------- what came of it


def _output(number: str, told: Mapping[str, Any], result: Any = None) -> dict[str, Any]:
    """Return what a run puts out, for people."""
    keys = ("status", "start_time", "completion_time", "flow_title")
    output = {"run_id": number, "link": f"{WEB}/{number}", **{k: told[k] for k in keys if told.get(k) is not None}}
    if result is not None:
        size = len(json.dumps(result))
        output["output"] = result if size <= OUTPUT_BYTES_MAX else f"{size:,} bytes; see {output['link']}"
    return output


def _carries(run: Mapping[str, Any], token: str) -> bool:
    """Say whether a run that is listed is a token's: by tags or label, whichever the list tells. Raises Unknown."""
    tags, label = run.get("tags"), run.get("label")
    if not isinstance(tags, list) and not isinstance(label, str):
        raise Unknown("the list of runs tells neither labels nor tags: whether ours is among them is not known")
    return (isinstance(tags, list) and token in tags) or (isinstance(label, str) and token in label.split())


def _map(value: object, key: str) -> Mapping[str, Any]:
    """Return what should be an object; a text instead stands for its `key`."""
    if isinstance(value, Mapping):
        return value
    return {key: value} if isinstance(value, str) else {}


def _wants_consent(details: Mapping[str, Any]) -> bool:
    told = f"{details.get('code')} {details.get('description')}".lower()
    return "consent" in told or "required_scope" in details or "required_scopes" in details


def _state(entry: Mapping[str, Any]) -> str:
    details = entry.get("details")
    return str(details.get("state_name") or "") if isinstance(details, Mapping) else ""


def _cause(details: Mapping[str, Any], log: Sequence[Mapping[str, Any]], words: str) -> str:
    """Return why a run failed: what it says itself, with what its log says of the state."""
    inner = details.get("details")
    places = (details, inner) if isinstance(inner, Mapping) else (details,)
    told = next((short(str(found)) for at in places if (found := at.get("cause") or at.get("error"))), "")
    said = next((str(entry["said"]) for entry in reversed(log) if "Fail" in str(entry.get("code"))), "")
    return "; ".join(dict.fromkeys(filter(None, (words, told, said)))) or "no reason given"
