"""Transfer each batch from one Globus collection to another: `start: {globus_transfer: {from: .., to: ..}}`.

Started once: a submission id is fetched and journaled before the task is
submitted, and repeated submissions of one id are one task to the service. The
label carries a token of the batch, so that a task whose answer was lost is
found by it. Watched to the end: all tasks are asked about in one request. A
task that does not move is told in words, and ended or kept as the rule says.

Proof: the task SUCCEEDED, nothing was skipped, expired, cancelled or failed,
and every file of the manifest is among the successful transfers, whose
checksums the service compared. It also notes when each copy was written, so
that one which somebody has replaced is told later. Then who the rule names is
given access, and the batch is told to the index.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import logging
import os
import posixpath
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from trigger_daemon.actions import (
    Context,
    Differs,
    File,
    Json,
    Progress,
    Proof,
    Refused,
    Request,
    Unknown,
    Unproven,
)
from trigger_daemon.actions._globus_polls import Polls
from trigger_daemon.actions._globus_sent import Sent
from trigger_daemon.actions._globus_written import as_delivered, instant, place_of, stat, times, why_not
from trigger_daemon.core.grammar import Option, OptionFault, Options, raise_all
from trigger_daemon.core.model import Fault, Scope
from trigger_daemon.failpoints import fail_point
from trigger_daemon.globus import FILES_PER_TASK, NO_CLIENT, TASKS_MAX, kept
from trigger_daemon.globus.faults import CHECK, LOGIN, Trouble, judge
from trigger_daemon.globus.paths import in_collection, is_uuid, join, shown_here, shown_roots, unsendable
from trigger_daemon.globus.service import Clients, Seat

LABEL_MAX = 128  # of the service
TOKEN_LETTERS = 16
TASKS_ASKED_MAX = 50  # ids in one request: they stand in its address, which proxies cut at some kilobytes
AWAY_S = 30.0  # a source that cannot be looked at is looked at again after this long
POLL_SHARE = 4  # a task of some age is looked at again after this part of it
POLL_LONGEST_S = 60.0
QUEUED_LONGEST_S = 300.0
EVENTS_READ = 20
PAUSE_REASON_S = 300.0  # how long the reason of a pause is believed
INDEX_AGAIN_S = 5.0
ENDS_KEPT_S = 90 * 86_400.0  # a task has ended long before
DELIVERED_READ_MAX = 10 * FILES_PER_TASK  # of a list that would not end
GONE = "trigger-daemon.gone"  # a code of ours: the service does not know the task
INDEX_BYTES_MAX = 10_000_000  # of an entry, by the service
MEMBERS_INDEXED_MAX = 1_000
SYNC_CHECKSUM = 3
MOVES = ("bytes_transferred", "files_transferred", "files_skipped", "bytes_checksummed", "subtasks_succeeded")

# Event codes and what follows, from the public documentation; the format is for people and may change.
OPERATOR = frozenset({
    "GC_NOT_CONNECTED", "GC_PAUSED", "PAUSED", "NO_CREDENTIALS", "AUTH", "ACL_CHANGED", "NO_PHYSICALS",
    "INVALID_SERVICE_CREDENTIAL", "GSI_DN_MISMATCH",
})
FULL = frozenset({"QUOTA_EXCEEDED", "NO_SPACE_LEFT"})
WRONG = frozenset({
    "FILE_NOT_FOUND", "PERMISSION_DENIED", "FILE_ACCESS", "AMBIGUOUS_PATH", "INVALID_PATH_NAME", "INVALID_SYMLINK",
    "IS_A_DIRECTORY", "IS_A_FILE", "NOT_A_DIRECTORY", "NOT_A_FILE", "NOT_A_SYMLINK", "NO_APPEND_FILESYSTEM",
})
CHANGED = frozenset({"FILE_SIZE_CHANGED"})
DIFFERENT = frozenset({"VERIFY_CHECKSUM", "EXTERNAL_CHECKSUM_MISMATCH"})
QUEUED = "Queued"
FINE = frozenset({"", "OK", QUEUED})
ENDED = ("SUCCEEDED", "FAILED")
_PARTS = ("subtasks_failed", "subtasks_expired", "subtasks_canceled", "subtasks_skipped_errors")
NOT_COMPARED = "the task has compared no checksums, so what it has delivered is not proved"
NOT_COMPARED_HINT = (
    "a collection can forbid the comparison (`disable_verify`): ask its manager to allow it, then `runs retry --anew`; "
    "or let the rule say `proof: none`"
)
_HINTS = {
    "FILE_NOT_FOUND": "is the file still there, and are `globus: collections` in the settings right?",
    "PERMISSION_DENIED": f"the collection refuses the path: give this account the permission. {CHECK}",
    "FILE_ACCESS": f"the collection refuses the path: give this account the permission. {CHECK}",
    "QUOTA_EXCEEDED": "make room at the destination, or have its quota raised",
    "NO_SPACE_LEFT": "make room at the destination",
    "GC_NOT_CONNECTED": "start Globus Connect Personal on that machine",
    "GC_PAUSED": "let Globus Connect Personal go on on that machine",
    "NO_CREDENTIALS": LOGIN,
    "AUTH": LOGIN,
    "ENDPOINT_TOO_BUSY": "the collection is at its limit; it goes on by itself",
    "VERIFY_CHECKSUM": "is the source, or a disk on the way, damaged? the service repeats it",
    "FILE_SIZE_CHANGED": "it was still being written: raise `quiescence`, or add a check to `complete`",
}


@dataclass(slots=True)
class _Task:
    """What was last heard of a task, and since when it has not moved."""

    document: Mapping[str, Any] = field(default_factory=dict)
    heard_at: float = -1e9
    asked_at: float = 0.0
    moved: tuple[int, ...] = ()
    moved_at: float = 0.0
    trouble: str = ""  # the last error since it has moved: one that comes and goes is one that stays
    ended_for: Fault | None = None  # we have wished its end, for this
    of: tuple[int, int] = (0, 0)  # its run and attempt
    pause: tuple[float, str] = (-1e9, "")


class Action:
    """Globus Transfer."""

    OPTIONS: Options = {
        "from": Option("uuid", "UUID of the collection that shows the watched directory", required=True),
        "to": Option("uuid", "UUID of the collection that the files go to", required=True),
        "path": Option("text", "directory at the destination; files keep their path below the root",
                       "/", template=True),
        "sync_level": Option("enum", "leave out what is there already: exists, size, mtime or checksum", None,
                             choices=("exists", "size", "mtime", "checksum")),
        "encrypt": Option("bool", "encrypt what is sent, where the collections do not demand it anyway", False),
        "deadline": Option("duration", "the service gives a task up after this long", 86_400.0, minimum=60),
        "stuck_after": Option("duration", "a task with an error that has not moved for this long is stuck", 3_600.0,
                              minimum=1),
        "stuck": Option("enum", "cancel a stuck task whose files are at fault, or keep it", "cancel",
                        choices=("cancel", "keep")),
        "access": Option("texts", "who may read `path`, once a batch is proved: group:UUID, identity:UUID, with ` rw` "
                                  "behind it to write", None, template=True),
        "index": Option("map", "Search index that each batch is told to: id, and subject, visible_to, content", None,
                        template=True),
    }  # fmt: skip
    VERIFIES = True
    PREPARES = True
    LEAVES_OUT = False
    POOL = "globus"  # a slow service keeps no copy waiting
    AT_ONCE = TASKS_MAX
    FILES_MAX = FILES_PER_TASK

    def __init__(self, context: Context) -> None:
        settings = context.settings.get("globus") or {}
        self._globus = Seat(settings, os.path.dirname(os.path.dirname(context.state_dir)))
        self._collections = settings.get("collections") or {}
        self._nudge = context.nudge
        self._ends = os.path.join(context.state_dir, "ended")
        self._sent = Sent()
        self._polls = Polls()
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self._granted: set[tuple[str, ...]] = set()
        self._ingested: dict[tuple[int, int], str] = {}
        self._doubtful: set[tuple[int, int]] = set()  # attempts of which a submission may have been taken
        self._refused: dict[tuple[int, int], Fault] = {}  # and then one was refused: only looked for from then on
        self._written: dict[tuple[int, int], dict[tuple[str, str], int]] = {}  # attempt -> when copies were written

    # -------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        raise_all(_option_faults(options))

    def check_roots(self, options: Mapping[str, Any], roots: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Raise OptionFault if there is no account, or the source collection does not show all of these directories."""
        raise_all(_settings_faults(options, roots, settings["globus"]))

    def writes_here(self, options: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the directories of this machine that the destination surely is, as far as the settings tell."""
        collections = settings["globus"].get("collections") or {}
        return shown_here(collections.get(str(options["to"]).lower(), {}), str(options["path"]))

    def destination(self, options: Mapping[str, Any]) -> str:
        return f"collection {str(options['to']).lower()}"

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def place(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """Return where the files keep their paths below: nothing there says whose a file is."""
        return f"globus://{str(options['to']).lower()}", "/".join(filter(None, str(options["path"]).split("/")))

    _collections: Mapping[str, Mapping[str, str]] = {}

    def refuses(self, options: Mapping[str, Any], root: str, path: str) -> str:
        """Return why a file of this name can never be sent, '' if it can, as far as the rule alone tells."""
        shown = in_collection(self._collections.get(str(options["from"]).lower(), {}), root) or ""
        directory = "" if "{" in str(options["path"]) else str(options["path"])
        why = unsendable(join(shown, path)) or unsendable(join(f"/{directory.strip('/')}", path))
        return f"{why}; rename it, or send it by another action" if why else ""

    # ------------------------------------------------------------------- attempts

    def prepare(self, request: Request) -> Json:
        """Fetch a submission id. All else of the document follows from the request and what is returned here."""
        options = request.options
        try:
            roots = shown_roots(self._globus.account, options["from"], [file.root for file in request.files])
        except Trouble as trouble:
            raise Refused(trouble.fault) from None
        left, unseen = _changed(request)  # as with any action, the others go without them
        if unseen:
            raise Refused(_away(unseen))
        left_out = [[file.root, file.path] for file in left]
        now = time.time()
        if len(left) == len(request.files):  # nothing is sent, and the proof says why
            return {"roots": roots, "time": now, "left_out": left_out}
        _refuse_impossible(request, roots, left_out)
        token = _token(request)

        def fetch(globus: Clients) -> tuple[str, float]:
            answer = globus.transfer.get_submission_id()
            return str(answer["value"]), _time_of(answer.headers, now)

        try:
            number, their_now = self._globus.ask("get a submission id", fetch)
        except Trouble as trouble:
            raise Refused(trouble.fault) from None
        return {
            "submission_id": number, "token": token, "label": _label(request, token), "roots": roots,
            "time": now, "deadline": _utc(their_now + float(options["deadline"])),
            **({"left_out": left_out} if left else {}),
        }  # fmt: skip

    def start(self, request: Request, prepared: Json) -> Json:
        """Submit the task; submitting it again is the same task."""
        if "submission_id" not in prepared:
            return _handle("", prepared)
        document = _document(request, prepared)
        with self._sent.under_way((request.run, request.attempt)):
            fail_point("globus.submit")
            try:
                told = self._globus.ask(
                    "submit the transfer",
                    lambda globus: dict(globus.transfer.submit_transfer(document).data),
                    first=True,
                )
            except Trouble as trouble:
                return self._not_submitted(request, prepared, trouble)
        fail_point("globus.submitted")
        if told.get("code") not in ("Accepted", "Duplicate") or not is_uuid(told.get("task_id")):
            raise Unknown(f"Globus answered the submission with {told.get('code')!r}: {told.get('message', '')}")
        self._settled((request.run, request.attempt))
        return _handle(told["task_id"], prepared)

    def _not_submitted(self, request: Request, prepared: Json, trouble: Trouble) -> Json:
        fault = trouble.fault
        if trouble.status == 409 and trouble.code == "TooManyPendingJobs":
            why = "this account has as many transfers at Globus as may wait there; it begins when some have ended"
            hint = "others may use the same account; what waits is shown at https://app.globus.org/activity"
            fault = Fault("transient", why, hint, counts=False, retry_after_s=60.0)
        elif trouble.status == 409 and trouble.code != "OperationPaused":
            found = self._look_for(request, prepared, live_only=True)
            if found is not None:
                return found
            why = "another transfer of the same paths has not ended; this one begins after it"
            fault = Fault("transient", why, trouble.fault.hint, counts=False, retry_after_s=60.0)
        key = (request.run, request.attempt)
        if trouble.done is False and key not in self._doubtful:
            raise Refused(fault)
        self._doubtful.add(key)  # that this call was refused says nothing of the one before
        if trouble.done is False and fault.kind != "transient":
            # Repeated, it would be refused again, by whomever; whether an earlier one was taken is looked for.
            self._refused[key] = fault
        raise Unknown(trouble.words())

    def find(self, request: Request, prepared: Json) -> Json | None:
        """Look for the task by its label: the service may have forgotten the id, and no clock of ours tells when.

        Where none is listed, repeating the submission tells. Where that was refused, nothing is repeated any more:
        once the task would surely be listed it was never taken, and another attempt has an id of its own.
        """
        if "submission_id" not in prepared:
            return None
        key = (request.run, request.attempt)
        self._doubtful.add(key)
        if (refused := self._refused.get(key)) is None:
            return self._look_for(request, prepared, live_only=False)
        if (found := self.look(request, prepared)) is None:
            self._settled(key)
            raise Refused(Fault("transient", refused.why, refused.hint))
        return found

    def _settled(self, key: tuple[int, int]) -> None:
        self._doubtful.discard(key)
        self._refused.pop(key, None)

    def look(self, request: Request, prepared: Json) -> Json | None:
        """Look for a task that nobody wants any more. None only after so long that it would surely be listed."""
        if "submission_id" not in prepared:
            return None
        listed_after_s = self._globus.account.listed_after_s
        key = (request.run, request.attempt)
        return self._sent.look(key, lambda: self._look_for(request, prepared, live_only=False), listed_after_s)

    def _look_for(self, request: Request, prepared: Json, *, live_only: bool) -> Json | None:
        wanted: dict[str, str | list[str]] = {"label": [f"~*{prepared['token']}*"]}
        try:
            tasks = self._globus.ask(
                "look for the transfer by its label",
                lambda globus: [dict(task) for task in globus.transfer.task_list(filter=wanted, limit=100)],
                first=True,
            )
        except Trouble as trouble:
            raise Unknown(trouble.words()) from None
        for task in tasks:
            live = task.get("status") in ("ACTIVE", "INACTIVE")
            if task.get("label") == prepared["label"] or (live_only and live):
                if not is_uuid(task.get("task_id")):
                    raise Unknown("look for the transfer by its label: Globus lists it without an id")
                self._settled((request.run, request.attempt))
                return _handle(task["task_id"], prepared)
        return None

    def poll(self, request: Request, handle: Json) -> Progress:
        """Say how the task stands, and why if it does not move."""
        number = handle["task"]
        if not number:  # nothing was left to send
            return Progress("succeeded", "all its files have changed or are gone", changed=_paths(_changed(request)[0]))
        if (last := self._polls.crowded(number)) is not None:
            return last
        with self._polls.asking(number) as asked:
            asked.progress = self._stands(request, handle)
        return asked.progress

    def _stands(self, request: Request, handle: Json) -> Progress:
        try:
            task = self._heard(handle["task"], (request.run, request.attempt))
        except Trouble as trouble:
            if trouble.code == GONE and (fault := self._polls.gone(handle["task"], "task", request.run)):
                return Progress("failed", fault.why, fault.hint, fault)
            if trouble.fault.scope == Scope.CREDENTIAL:
                return Progress("inactive", why=trouble.fault.why, hint=trouble.fault.hint, again_in_s=POLL_LONGEST_S)
            raise Unknown(trouble.words()) from None
        self._polls.there(handle["task"])
        document = task.document
        done: dict[str, Any] = {
            "files_done": _number(document, "files_transferred") + _number(document, "files_skipped"),
            "bytes_done": _number(document, "bytes_transferred"),
        }
        match document.get("status"):
            case "SUCCEEDED":
                return Progress("succeeded", why="the transfer succeeded", output=_output(document), **done)
            case "FAILED":
                return self._ended(request, handle, task, done)
            case "INACTIVE":
                why = f"the transfer is suspended: {_nice(document) or 'its credentials have expired'}"
                hint = _HINTS.get(_nice(document), LOGIN)
                return Progress("inactive", why=why, hint=hint, again_in_s=POLL_LONGEST_S, **done)
            case "ACTIVE":
                pass
            case status:
                raise Unknown(f"Globus tells a status that is not known: {status!r}")
        if document.get("is_paused"):
            why = f"the transfer is paused: {self._pause_reason(handle['task'], task)}"
            hint = "the collection's manager can let it go on; it does so by itself then"
            return Progress("inactive", why=why, hint=hint, again_in_s=POLL_LONGEST_S, **done)
        again_s = self._again_s(handle, document)
        if _nice(document) == QUEUED:
            why = f"it waits in the service's queue: other tasks of this user are active, {TASKS_MAX} at once"
            return Progress("active", why=why, again_in_s=again_s, **done)
        if _nice(document) in FINE and not task.trouble:
            return Progress("active", again_in_s=again_s, **done)
        if _nice(document) in FINE:  # for a moment: it is told, and not ended
            stuck = time.monotonic() - task.moved_at >= float(request.options["stuck_after"])
            why = f"the transfer has not moved since {task.trouble}, though Globus says now that all is well"
            hint = CHECK if stuck else ""
            return Progress("inactive" if stuck else "active", why=why, hint=hint, again_in_s=again_s, **done)
        return self._troubled(request, handle, task, again_s, done)

    def _troubled(
        self, request: Request, handle: Json, task: _Task, again_s: float, done: Mapping[str, Any]
    ) -> Progress:
        """A live task has an error: the service repeats. Once it is stuck, read why, and do as the rule says."""
        code = _nice(task.document)
        still_s = time.monotonic() - task.moved_at
        if still_s < float(request.options["stuck_after"]):
            return Progress("active", why=f"the service repeats it: {code}", again_in_s=again_s, **done)
        fault = self._fault(handle["task"], code)
        span = f"{still_s / 60:.0f} min" if still_s >= 120 else f"{still_s:.0f} s"
        why = f"the transfer has not moved for {span}: {fault.why}"
        ends = _codes(code, fault) & (WRONG | CHANGED | DIFFERENT)
        if request.options["stuck"] == "cancel" and (ends or task.ended_for is not None):
            if task.ended_for is None:
                task.ended_for = Fault(fault.kind, why, fault.hint, fault.scope)
                self._note_end(handle["task"], task.ended_for)
            self.cancel(request, handle)  # at each look, until it has ended: the wish may be lost
            return Progress("active", why=f"{why}; it is cancelled", again_in_s=2.0, **done)
        return Progress("inactive", why=why, hint=fault.hint, again_in_s=POLL_LONGEST_S, **done)

    def _ended(self, request: Request, handle: Json, task: _Task, done: Mapping[str, Any]) -> Progress:
        """The task FAILED: cancelled, out of time, or for an error of its own."""
        document = task.document
        fatal = _fatal(document)
        code = str(fatal.get("code") or "")
        output = _output(document)
        gone, unseen = _changed(request)  # another attempt cannot send it either
        changed = _paths(gone)
        if code == "CANCELED" and task.ended_for is None:
            task.ended_for = self._ended_before(handle["task"])
        if code == "CANCELED" and task.ended_for is None:
            who = str(document.get("canceled_by_admin") or "")
            words = document.get("canceled_by_admin_message") or "no reason given"
            why = f"cancelled by the administrator of {who}: {words}" if who else "cancelled at Globus"
            return Progress("cancelled", why=why, output=output, changed=changed, **done)
        fault = task.ended_for or self._fault(handle["task"], code, str(fatal.get("description") or ""))
        fresh = [file for file in gone if [file.root, file.path] not in handle.get("left_out", ())]
        if fresh and not unseen and fault.kind == "person" and code not in OPERATOR:
            # Whatever else it may be: the next attempt leaves these out, and shows what is left.
            number = f"{len(fresh)} of {len(request.files)} files"
            why = f"{fault.why}; {number} have changed or are gone, and the others go again without them"
            fault = Fault("transient", why, fault.hint)
        return Progress("failed", fault.why, fault.hint, fault, output=output, changed=changed, **done)

    def _note_end(self, number: str, fault: Fault) -> None:
        """Remember over a restart that it was us who wished a task's end: a cancel of a stranger's is not undone."""
        try:
            os.makedirs(self._ends, exist_ok=True)
            kept.thin(self._ends, ENDS_KEPT_S)
            kept.write(
                os.path.join(self._ends, number),
                {"kind": fault.kind, "why": fault.why, "hint": fault.hint, "scope": str(fault.scope)},
            )
        except OSError as error:  # then, after a restart, a person is asked
            logging.getLogger(__name__).warning("globus.end_not_noted", extra={"task": number, "why": str(error)})

    def _ended_before(self, number: str) -> Fault | None:
        """Return for what an earlier life has cancelled a task, None if it has not."""
        try:
            with open(os.path.join(self._ends, number), encoding="utf-8") as file:
                told = json.load(file)
            return Fault(told["kind"], told["why"], told["hint"], Scope(told["scope"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _fault(self, task: str, code: str, description: str = "") -> Fault:
        """Return what an error of a task means, by the newest events that are errors."""
        try:
            events = self._globus.ask(
                "read the transfer's events",
                lambda globus: [
                    dict(event)
                    for event in globus.transfer.task_event_list(
                        task, limit=EVENTS_READ, query_params={"filter": "is_error:1"}
                    )
                ],
            )
        except Trouble:
            events = []
        event: dict[str, Any] = next((e for e in events if e.get("code") not in ("CANCELED", "EXPIRED")), {})
        named = str(event.get("code") or "")
        late = "its deadline has passed; " if code == "EXPIRED" and named else ""
        if code in ("", "CANCELED", "EXPIRED") and named:
            code = named
        words = " ".join(str(event.get("details") or event.get("description") or description).split())[:300]
        why = late + (f"{code or 'error'}: {words}" if words else code or "the service gave no reason")
        hint = _HINTS.get(code, "")
        if code in FULL:
            return Fault("transient", why, hint, Scope.DESTINATION)
        if code in CHANGED or code in DIFFERENT:
            return Fault("transient", why, hint)
        if code in WRONG:
            return Fault("person", why, hint or "mend it, then `trigger-daemon runs retry`")
        if code in OPERATOR:
            return Fault("person", why, hint or CHECK)
        return Fault("transient", why, hint)

    def _pause_reason(self, number: str, task: _Task) -> str:
        asked_at, reason = task.pause
        if time.monotonic() - asked_at > PAUSE_REASON_S:
            try:
                told = self._globus.ask(
                    "ask why it is paused", lambda globus: dict(globus.transfer.task_pause_info(number).data)
                )
            except Trouble:
                return reason or "no reason is known yet"
            given = told.get("pause_rules")
            rules = [str(rule.get("message") or "") for rule in given or () if isinstance(rule, Mapping)]
            words = [str(told.get(key) or "") for key in ("source_pause_message", "destination_pause_message")]
            reason = "; ".join(filter(None, [*rules, *words])) or "the collection's manager gave no reason"
            task.pause = (time.monotonic(), reason)
        return reason

    def cancel(self, request: Request, handle: Json) -> None:
        """Wish the end of the task; whatever is answered, polls tell when it has come."""
        try:
            number = handle["task"]
            self._globus.ask("cancel the transfer", lambda globus: globus.transfer.cancel_task(number).data, first=True)
        except Trouble as trouble:
            if trouble.status != 404 and (trouble.done is None or trouble.fault.kind != "permanent"):
                raise Unknown(trouble.words()) from None
        with self._lock:
            if (task := self._tasks.get(handle["task"])) is not None:
                task.heard_at = -1e9

    # ------------------------------------------------------------- all tasks at once

    def _heard(self, number: str, of: tuple[int, int]) -> _Task:
        """Return what is known of a task, asked for at most once a while, together with all others. Raises Trouble."""
        now = time.monotonic()
        with self._lock:
            task = self._tasks.setdefault(number, _Task(moved_at=now))
            task.asked_at, task.of = now, of
        if now - task.heard_at >= self._globus.account.poll_s:
            self._globus.ask("ask how the transfers stand", lambda globus: self._hear(globus, number))
        if not task.document:
            why = f"Globus does not list task {number}: is it of another account, or months old?"
            raise Trouble(Fault("transient", why), code=GONE)
        return task

    def _hear(self, globus: Clients, number: str) -> None:
        """Ask about every live task in one request: on the service's thread, where callers that waited are served."""
        now = time.monotonic()
        with self._lock:
            task = self._tasks.get(number)
            if task is None or now - task.heard_at < self._globus.account.poll_s:
                return  # its run is over, or another caller's request has brought it
            others = (
                key for key, task in self._tasks.items()
                if key != number and task.document.get("status") not in ENDED
            )  # fmt: skip
            wanted = [number, *itertools.islice(others, TASKS_ASKED_MAX - 1)]
        told = list(globus.transfer.task_list(filter={"task_id": wanted}, limit=len(wanted)))
        at = time.monotonic()
        ended = []
        listed = {str(document["task_id"]) for document in told}
        with self._lock:
            if number not in listed and number in self._tasks:  # forgotten, or never ours: the old words hold no more
                self._tasks[number].document, self._tasks[number].heard_at = {}, at
            for document in told:
                if (task := self._tasks.get(str(document["task_id"]))) is None:
                    continue
                if str(document["task_id"]) != number and document["status"] in ENDED:
                    ended.append(task.of)
                task.document, task.heard_at = dict(document), at
                moved = tuple(_number(document, key) for key in MOVES)
                rests = document.get("is_paused") or document["status"] == "INACTIVE" or _nice(document) == QUEUED
                if rests or moved != task.moved:
                    task.trouble, task.moved_at = "", at
                if _nice(document) not in FINE and not rests:
                    task.trouble = _nice(document)
                elif not task.trouble:
                    task.moved_at = at
                task.moved = moved
        for run, attempt in ended:  # their own next look may be a minute away, and their places are wanted
            self._nudge(run, attempt)

    def _again_s(self, handle: Json, document: Mapping[str, Any]) -> float:
        age_s = max(0.0, time.time() - float(handle["time"]))
        longest = QUEUED_LONGEST_S if _nice(document) == QUEUED else POLL_LONGEST_S
        return min(max(self._globus.account.poll_s, age_s / POLL_SHARE), longest)

    # ---------------------------------------------------------------------- proof

    def verify(self, request: Request, handle: Json) -> Proof | Differs | Unproven:
        """Compare what the service delivered with the manifest; then give access, and tell the index."""
        number = handle["task"]
        if not number:
            return _nothing_sent(request, handle)
        try:
            document = self._globus.ask("get the transfer", lambda globus: dict(globus.transfer.get_task(number).data))
            if why := _unlike(document, number):  # another shape, or another task: it is asked again
                return Unproven(judge(ValueError(why), "get the transfer").fault)
            if not document["verify_checksum"]:
                return Unproven(Fault("person", NOT_COMPARED, NOT_COMPARED_HINT))
            if refusal := _refusal(document):
                return Differs({file.path: refusal for file in request.files})
            delivered, skipped = self._globus.ask(
                "list what was delivered", lambda globus: _delivered(globus, document)
            )
        except Trouble as trouble:
            return Unproven(trouble.fault)
        if document.get("history_deleted"):
            why = f"Globus no longer keeps what task {number} delivered"
            hint = "compare source and destination, then `runs retry --anew` (a checksum sync) or `runs abandon`"
            return Unproven(Fault("person", why, hint))
        members, which = _compared(request, handle, document, delivered, skipped)
        gone, unseen = _changed(request)
        changed = _paths(gone)
        if unseen:
            return Unproven(_away(unseen))
        which = {path: why for path, why in which.items() if path not in changed}
        if which:
            return Differs(which, changed)
        members = [member for member in members if member["path"] not in changed]
        try:
            self._note_written(request, document, delivered, members)
            proof = Proof(tuple(members), changed)
            self._give_access(request)
            told = self._tell_index(request, proof)
        except Trouble as trouble:
            return Unproven(trouble.fault)
        except OptionFault as wrong:  # what a capture has filled in
            why = f"the files are there, but `{wrong.option}` cannot be done: {wrong.message}"
            return Unproven(Fault("person", why, f"{wrong.hint}; then `runs retry --anew`"))
        return told or proof

    def _note_written(
        self, request: Request, document: Mapping[str, Any], delivered: Mapping[str, Any], members: list[dict[str, Any]]
    ) -> None:
        """Note in the proof when each copy was written, asked once for an attempt: reclaim compares it.

        Raises Trouble.
        """
        key = (request.run, request.attempt)
        if key not in self._written:
            about = [(member, _normal(place_of(member["to"])) in delivered) for member in members]
            self._written[key] = times(self._globus.ask, str(request.options["to"]), document, about)
        for member in members:
            if (time_s := self._written[key].get((member["root"], member["path"]))) is not None:
                member["to_mtime_s"] = time_s

    def targets(self, request: Request) -> Iterator[tuple[str, File]]:
        """Yield where the files of a request would be written."""
        directory = _directory(request)
        for file in request.files:
            yield _to(request, join(directory, file.path)), file

    def standing(self, request: Request, tos: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """Return size and mtime_ns of what is at each target, None if nothing is. Raises Refused."""
        return {to: self._at(request, to) for to in tos}

    def _at(self, request: Request, to: str) -> tuple[int, int] | None:
        try:
            seen = self._globus.ask("look at a target", stat(str(request.options["to"]), place_of(to)))
        except Trouble as trouble:
            if trouble.status == 404 and trouble.code in ("NotFound", "ClientError.NotFound"):
                return None
            raise Refused(trouble.fault) from None
        return int(seen.get("size") or 0), round(instant(seen.get("last_modified"), 0.0) * 1e9)

    def stands(self, request: Request, handle: Json, record: Mapping[str, Any]) -> str:
        """Return why a copy is not what this run has proved, '' if it is: there, as large, and not written since."""
        to = str(record.get("to"))
        try:
            seen = self._globus.ask("look at a copy", stat(str(request.options["to"]), place_of(to)))
        except Trouble as trouble:
            return f"{to}: {trouble}"
        if not as_delivered(record, seen):
            return f"{to} is not what was delivered: {seen.get('type')} of {seen.get('size')} bytes"
        why = why_not(record, seen)
        return f"{to}: {why}" if why else ""

    def _give_access(self, request: Request) -> None:
        """Make the permissions that the rule names, each once. Raises Trouble."""
        collection = request.options["to"]
        path = _directory(request)
        for text in _texts(request.options.get("access")):
            kind, who, may = _principal(text)
            wanted = (collection, kind, who, path, may)
            if wanted in self._granted:
                continue

            def grant(globus: Clients, wanted: tuple[str, ...] = wanted) -> str:
                if not (has := _permitted(globus, wanted)):
                    keys = ("principal_type", "principal", "path", "permissions")
                    document = {"DATA_TYPE": "access", **dict(zip(keys, wanted[1:], strict=True))}
                    globus.transfer.add_endpoint_acl_rule(collection, document)
                return has or wanted[-1]

            def look(globus: Clients, wanted: tuple[str, ...] = wanted) -> str:
                return _permitted(globus, wanted)

            what = f"let {kind} {who} read {path}"
            fail_point("globus.access")
            try:
                has = self._globus.ask(what, grant)
            except Trouble as trouble:  # somebody else may have made it meanwhile
                if trouble.code != "Exists" or not (has := self._globus.ask(what, look)):
                    raise
            if has != may and has != "rw":
                why = f"{kind} {who} may only read {path} of collection {collection}, and the rule asks for {may}"
                hint = "let its permission there be changed, or let the rule ask for less; then `runs retry`"
                raise Trouble(Fault("person", f"the files are there, but {why}", hint), False)
            self._granted.add(wanted)

    def _tell_index(self, request: Request, proof: Proof) -> Unproven | None:
        """Ingest the batch's metadata; the same subject and id again is the same entry. Raises Trouble."""
        index = request.options.get("index")
        if not index:
            return None
        key = (request.run, request.attempt)
        if key not in self._ingested:
            entry = _entry(request, proof)
            if len(json.dumps(entry)) > INDEX_BYTES_MAX:
                hint = "give `index: content` less"
                return Unproven(Fault("permanent", "the batch's entry is larger than the index takes", hint))
            fail_point("globus.ingest")
            told = self._globus.ask(
                "tell the index", lambda globus: dict(globus.search.ingest(index["id"], entry).data)
            )
            self._ingested[key] = str(told["task_id"])
        number = self._ingested[key]
        told = self._globus.ask("ask the index", lambda globus: dict(globus.search.get_task(number).data))
        match told.get("state"):
            case "SUCCESS":
                return None
            case "FAILED":
                del self._ingested[key]
                words = told.get("message") or told.get("state_description") or "no reason given"
                why = f"the index refused the batch: {words}"
                return Unproven(Fault("person", why, "mend `index` in the rule, then `runs retry --anew`"))
            case _:
                why = "the index has not taken it yet"
                return Unproven(Fault("transient", why, counts=False, retry_after_s=INDEX_AGAIN_S))

    def forget(self, run: int) -> None:
        self._sent.forget(run)
        with self._lock:
            for key in [key for key in self._ingested if key[0] == run]:
                del self._ingested[key]
            self._doubtful = {key for key in self._doubtful if key[0] != run}
            for kept_by_attempt in (self._refused, self._written):
                for key in [key for key in kept_by_attempt if key[0] == run]:
                    del kept_by_attempt[key]
            for number in [number for number, task in self._tasks.items() if task.of[0] == run]:
                del self._tasks[number]
                self._polls.forget(number)

    def close(self) -> None:
        self._globus.close()


# ----------------------------------------------------------------------- the options


def _option_faults(options: Mapping[str, Any]) -> Iterator[OptionFault]:
    for key in ("from", "to"):
        if not is_uuid(options[key]):
            yield OptionFault(key, f"{options[key]!r} is not a UUID", "copy it from the collection's page")
    if {"..", ".", "~"} & set(str(options["path"]).split("/")):
        why = f"{options['path']!r} has a part that the service changes into another path"
        yield OptionFault("path", why, "write it from the top of the collection, such as /visits")
    if not str(options["path"]).startswith("/"):
        yield OptionFault("path", "a path in a collection begins with /", f"write /{options['path']}")
    for text in _texts(options.get("access")):
        if "{" not in text:
            try:
                _principal(text)
            except OptionFault as fault:
                yield fault
    try:
        _check_index(options.get("index"))
    except OptionFault as fault:
        yield fault


def _settings_faults(
    options: Mapping[str, Any], roots: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[OptionFault]:
    if not settings.get("client_id"):
        yield OptionFault("", *NO_CLIENT)
    if not is_uuid(options["from"]):
        return  # told already
    shown = (settings.get("collections") or {}).get(str(options["from"]).lower())
    if not shown:
        hint = f"add to the settings `globus: {{collections: {{{options['from']}: {{{roots[0]}: /}}}}}}`"
        yield OptionFault("from", "the settings do not say what this collection shows", hint)
        return
    for root in roots:
        if in_collection(shown, root) is None:
            hint = f"it shows {', '.join(shown)}; correct `globus: collections` in the settings, or `watch`"
            yield OptionFault("from", f"the collection does not show {root}", hint)
            return


# ------------------------------------------------------------------- what is asked for


def _token(request: Request) -> str:
    """Return letters that name this batch, and no other, in a label; without / and , which a filter reads."""
    about = [request.rule, request.run, [[f.root, f.path, f.size, f.mtime_ns] for f in request.files]]
    digest = hashlib.sha256(json.dumps(about).encode("ascii")).digest()
    return f"td-{base64.b32encode(digest).decode('ascii')[:TOKEN_LETTERS].lower()}"


def _label(request: Request, token: str) -> str:
    tail = f" {request.run}.{request.attempt} {token}"
    return f"{request.rule[: LABEL_MAX - len(tail)]}{tail}"


def _directory(request: Request) -> str:
    """Return the rule's `path`, as the collection's permissions want it: a slash at both ends."""
    inside = "/".join(filter(None, str(request.options["path"]).split("/")))
    return f"/{inside}/" if inside else "/"


def _to(request: Request, path: str) -> str:
    """Return how a copy's place is named in proofs: however the rule has spelled the UUID."""
    return f"globus://{str(request.options['to']).lower()}{path}"


def _pairs(
    request: Request, roots: Mapping[str, str], left_out: Sequence[Sequence[str]] = ()
) -> Iterator[tuple[File, str, str]]:
    """Yield each file that goes, with its path in the source collection and in the destination's."""
    directory = _directory(request)
    left = {(root, path) for root, path in left_out}
    for file in request.files:
        if (file.root, file.path) not in left:
            yield file, join(roots[file.root], file.path), join(directory, file.path)


def _document(request: Request, prepared: Json) -> dict[str, Any]:
    """Return the submission: a function of what the journal holds, so that a repetition is identical."""
    options = request.options
    level = options.get("sync_level")
    levels = {"exists": 0, "size": 1, "mtime": 2, "checksum": SYNC_CHECKSUM}
    document = {
        "DATA_TYPE": "transfer", "submission_id": prepared["submission_id"], "label": prepared["label"],
        "source_endpoint": options["from"], "destination_endpoint": options["to"],
        "verify_checksum": True, "preserve_timestamp": True, "fail_on_quota_errors": True,
        "skip_source_errors": False, "delete_destination_extra": False, "encrypt_data": bool(options.get("encrypt")),
        "deadline": prepared["deadline"],
        "notify_on_succeeded": False, "notify_on_failed": False, "notify_on_inactive": False,
        "DATA": [
            {"DATA_TYPE": "transfer_item", "source_path": source, "destination_path": target, "recursive": False}
            for _, source, target in _pairs(request, prepared["roots"], prepared.get("left_out", ()))
        ],
    }  # fmt: skip
    if request.attempt > 1:  # what an earlier attempt left may be half a file
        document["sync_level"] = SYNC_CHECKSUM
    elif level is not None:
        document["sync_level"] = levels[level]
    return document


def _handle(task: Any, prepared: Json) -> Json:
    left_out = {"left_out": prepared["left_out"]} if "left_out" in prepared else {}
    return {"task": str(task), "time": prepared["time"], "roots": prepared["roots"], **left_out}


def _refuse_impossible(request: Request, roots: Mapping[str, str], left_out: Sequence[Sequence[str]]) -> None:
    """Raise Refused for a batch that the service can never take."""
    targets: dict[str, str] = {}
    for file, source, target in _pairs(request, roots, left_out):
        if why := unsendable(source) or unsendable(target):
            shown = os.path.join(file.root, file.path).encode("utf-8", "backslashreplace").decode("ascii", "replace")
            hint = "rename it, or send it by another action"
            raise Refused(Fault("person", f"{shown} cannot be sent: {why}", hint, Scope.FILE))
        if (other := targets.setdefault(target, source)) != source:
            hint = "let their paths below their roots differ"
            raise Refused(Fault("person", f"{other} and {source} would both become {target}", hint))


# -------------------------------------------------------------------- what came of it


def _number(document: Mapping[str, Any], key: str) -> int:
    """Return a figure for people, 0 for what is none."""
    value = document.get(key)
    return int(value) if isinstance(value, int | float) and abs(value) < 1e18 else 0


def _fatal(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a task's fatal error; a text in its place is taken for its code."""
    told = document.get("fatal_error")
    if isinstance(told, Mapping):
        return told
    return {"code": str(told)[:300]} if told else {}


def _nice(document: Mapping[str, Any]) -> str:
    return str(document.get("nice_status") or "")


def _codes(code: str, fault: Fault) -> set[str]:
    """Return the codes that tell of a task's error: its status, and its newest event."""
    return {code, fault.why.partition(":")[0]}


def _output(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's figures, for people."""
    keys = ("task_id", "status", "request_time", "completion_time", "files", "files_transferred", "files_skipped",
            "bytes_transferred", "effective_bytes_per_second", "faults")  # fmt: skip
    told = {key: document[key] for key in keys if document.get(key) is not None}
    return {**told, "link": f"https://app.globus.org/activity/{document.get('task_id')}"}


def _unlike(document: Mapping[str, Any], number: str) -> str:
    """Return why an answer is not the service's word about the end of this task, '' if it is."""
    if str(document.get("task_id")).lower() != number.lower():
        return f"it tells of task {document.get('task_id')!r}, not of {number}"
    if document.get("status") not in ENDED:
        return f"it tells the status {document.get('status')!r} of a task that had ended"
    for key in ("files_skipped", *_PARTS):
        if not isinstance(document.get(key), int):
            return f"it does not tell `{key}`"
    if not isinstance(document.get("verify_checksum"), bool):
        return "it does not tell whether checksums were compared"
    return ""


def _refusal(document: Mapping[str, Any]) -> str:
    """Return why a task is no proof, '' if it may be."""
    if document.get("status") != "SUCCEEDED":
        return f"the task is {document.get('status')}"
    if document.get("fatal_error"):
        return f"the task has a fatal error: {document['fatal_error']}"
    for key in _PARTS:
        if document.get(key):
            return f"{document[key]} parts of the task are {key.removeprefix('subtasks_')}"
    return ""


def _delivered(globus: Clients, document: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Return what was transferred, by its path at the destination, and the sources that were skipped for an error."""
    task = document["task_id"]
    done: dict[str, Mapping[str, Any]] = {
        _normal(str(item["destination_path"])): dict(item)
        for item in itertools.islice(
            globus.transfer.paginated.task_successful_transfers(task).items(), DELIVERED_READ_MAX
        )
    }
    if not document.get("files_skipped"):  # what is not there is missing among those that were transferred
        return done, []
    errors = itertools.islice(globus.transfer.paginated.task_skipped_errors(task).items(), DELIVERED_READ_MAX)
    return done, [_normal(str(item.get("source_path"))) for item in errors]


def _normal(path: str) -> str:
    """Return a path as it is compared: services write slashes as they like."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _compared(
    request: Request, handle: Json, document: Mapping[str, Any],
    delivered: Mapping[str, Mapping[str, Any]], skipped: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Return the proof's members, and the files that it does not hold for, with why."""
    members: list[dict[str, Any]] = []
    which: dict[str, str] = {}
    pairs = list(_pairs(request, handle["roots"], handle.get("left_out", ())))
    for _, path in handle.get("left_out", ()):
        which[path] = "it was gone or had changed when the others were sent, and is there again"
    # What a checksum sync left out was equal already, and is listed nowhere: only the numbers tell of it.
    left_out = int(document.get("files_skipped") or 0)
    listed = sum(_normal(target) in delivered for _, _, target in pairs)  # what else is listed makes up for nothing
    equal = left_out > 0 and document.get("sync_level") == SYNC_CHECKSUM and left_out + listed == len(pairs)
    for file, source, target in pairs:
        item = delivered.get(_normal(target))
        if _normal(source) in skipped:
            which[file.path] = "the task has skipped it"
        elif item is None and not equal:
            which[file.path] = "it is not among the task's successful transfers"
        elif item is not None and item.get("source_path") and _normal(str(item["source_path"])) != _normal(source):
            which[file.path] = f"the task has delivered {item['source_path']} there"
        elif item is not None and item.get("size") is not None and int(item["size"]) != file.size:
            which[file.path] = f"{item['size']} bytes were delivered, {file.size} are in the manifest"
        else:
            checksum = (item or {}).get("checksum")
            kind = str((item or {}).get("checksum_algorithm") or "").lower()
            members.append({
                "root": file.root, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns,
                "digest": f"{kind}:{checksum}" if checksum else "",
                "to": _to(request, target), "by": "globus",
            })  # fmt: skip
    return members, which


def _nothing_sent(request: Request, handle: Json) -> Proof | Differs | Unproven:
    """Return the proof of a batch of which nothing was there to be sent."""
    gone, unseen = _changed(request)
    if unseen:
        return Unproven(_away(unseen))
    if len(gone) == len(request.files):
        return Proof((), _paths(gone))
    there = {file.path for file in request.files} - {file.path for file in gone}
    return Differs(dict.fromkeys(there, "it was gone or had changed when it was to be sent"), _paths(gone))


def _away(unseen: str) -> Fault:
    hint = "is the watched share there? it goes on when it is"
    return Fault("transient", f"the source cannot be looked at: {unseen}", hint, counts=False, retry_after_s=AWAY_S)


def _paths(files: Sequence[File]) -> tuple[str, ...]:
    return tuple(file.path for file in files)


def _changed(request: Request) -> tuple[list[File], str]:
    """Return the members that are no longer the manifest's version at the source, and why that cannot be told.

    What is gone counts as changed: in between it may have been another version, and that may be what was sent.
    """
    changed: list[File] = []
    unseen = ""
    for file in request.files:
        try:
            now = os.lstat(os.path.join(file.root, file.path))
        except FileNotFoundError:
            if not os.path.isdir(file.root):  # a mount that is away
                unseen = unseen or f"{file.root} is not there"
            changed.append(file)
            continue
        except OSError as error:
            unseen = unseen or str(error)
            continue
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            changed.append(file)
    return changed, unseen


# --------------------------------------------------------------------- access, index


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


_PRINCIPAL = re.compile(r"(group|identity):(\S+?)(?: +(r|rw))?")


def _principal(text: str) -> tuple[str, str, str]:
    """Return kind, UUID and permissions of `group:UUID rw`. Raises OptionFault."""
    found = _PRINCIPAL.fullmatch(text.strip())
    if found is None or not is_uuid(found[2]):
        hint = "write group:UUID or identity:UUID, and ` rw` behind it to write"
        raise OptionFault("access", f"{text!r} is not understood", hint)
    return found[1], found[2].lower(), found[3] or "r"


def _permitted(globus: Clients, wanted: tuple[str, ...]) -> str:
    """Return what somebody may do with a directory by a rule for it, '' if there is none."""
    collection, kind, who, path, _ = wanted
    for rule in globus.transfer.endpoint_acl_list(collection):
        if (rule.get("principal_type"), str(rule.get("principal")).lower(), rule.get("path")) == (kind, who, path):
            return str(rule.get("permissions"))
    return ""


def _check_index(index: Any) -> None:
    if index is None:
        return
    known = {"id", "subject", "visible_to", "content"}
    for key in index:
        if key not in known:
            raise OptionFault("index", f"`{key}` is not understood", f"known are {', '.join(sorted(known))}")
    if not is_uuid(str(index.get("id", ""))):
        raise OptionFault("index", "it must have the index's UUID as `id`", "index: {id: UUID}")
    if not isinstance(index.get("content", {}), Mapping):
        raise OptionFault("index", "`content` must be a mapping", "content: {sample: '{sample}'}")


def _entry(request: Request, proof: Proof) -> dict[str, Any]:
    """Return the ingest of a batch: visible to whom the rule says, else to whom it gives access."""
    index = request.options["index"]
    urns = {"group": "urn:globus:groups:id:", "identity": "urn:globus:auth:identity:"}
    granted = [f"{urns[kind]}{who}" for kind, who, _ in map(_principal, _texts(request.options.get("access")))]
    files = [
        {key: member[key] for key in ("path", "size", "digest", "to")} for member in proof.members[:MEMBERS_INDEXED_MAX]
    ]
    subject = index.get("subject") or f"globus://{request.options['to']}{_directory(request)}"
    content = {
        "rule": request.rule, **dict(request.captures), **dict(index.get("content") or {}),
        "files": files, "files_count": len(proof.members), "bytes": sum(int(m["size"]) for m in proof.members),
    }  # fmt: skip
    return {
        "ingest_type": "GMetaEntry",
        "ingest_data": {
            "subject": subject, "id": _token(request), "content": content,
            "visible_to": _texts(index.get("visible_to")) or granted,
        },
    }  # fmt: skip


def _time_of(headers: Mapping[str, str], else_: float) -> float:
    """Return what the service's clock shows: a deadline by ours, if that is wrong, may be past already."""
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return else_


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
