"""Transfer each batch by rsync, to another host over ssh, to an rsync daemon, or to a local directory.

One rsync a batch, in a worker process of low priority that ends with the
daemon; what it had is gone on with. Nothing partial stands under a final name,
and nobody's file is replaced unless the rule says so. Proof is a second rsync,
which reads both sides and compares digests, file by file: what the first one's
success says is no proof. `_rsync_job.py` does the work; this class never
touches a source or a destination itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trigger_daemon.actions import Context, File, Refused, Request
from trigger_daemon.actions._attempts import Attempts, ByAttempts, refuse_twins
from trigger_daemon.actions._copy_files import Trouble
from trigger_daemon.actions._lanes import fault_of, lane_environment
from trigger_daemon.actions._looked import Looked
from trigger_daemon.actions._rsync_check import look, standing
from trigger_daemon.actions._rsync_target import Target, check_options, target_of
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault, Scope

RERUN_S = 10.0  # until one may be begun again for another rate; twice as long each time, so that it comes to its end
RSYNC = "rsync"
OF_RUN = ("run-{}.worker", "run-{}.rsync", "skeleton-{}", "phantom-{}")  # what is kept of a run


class Action(ByAttempts):
    """The provider; see the module."""

    OPTIONS: Options = {
        "to": Option("text", "where to: /mnt/archive, user@host:/archive or rsync://user@host/module/archive; the "
                             "directory must exist there, files keep their path below the root",
                     required=True, template=True),
        "if_exists": Option("enum", "a different file that we did not write stands at the target: hold, or replace it",
                            default="hold", choices=("hold", "replace")),
        "digest": Option("enum", "what both sides are compared by; md5 where the rsync there is older than 3.2",
                         default="xxh3", choices=("xxh3", "md5", "sha1")),
        "port": Option("int", "of the ssh server", minimum=1),
        "identity": Option("text", "private key for ssh; absent: those in ~/.ssh of the daemon's user"),
        "known_hosts": Option("text", "the host keys that are trusted; absent: ~/.ssh/known_hosts and the system's"),
        "ssh_config": Option("text", "a configuration for ssh, to go through a jump host; absent: none is read"),
        "rrsync": Option("bool", "the key leads to rrsync there, which keeps it to one directory; `to` is below that",
                         default=False),
        "password_file": Option("text", "a file of mode 0600 with the password of the daemon's module"),
        "compress": Option("bool", "compress what is sent; for slow lines", default=False),
        "fsync": Option("bool", "let the far side write each file to its disk; needs rsync 3.2.4 there", default=True),
        "timeout": Option("duration", "a far side that is silent for this long, and for as long as its disk may have "
                                      "to read, is given up", default=120.0),
        "bandwidth": Option("rate", "read no faster than this, for each run"),
    }  # fmt: skip
    VERIFIES = True
    PREPARES = False
    LEAVES_OUT = True
    POOL = "rsync"  # a proof waits long for a far side, and keeps no copy waiting
    PROVES_PARTS = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._attempts = Attempts(
            "rsync", context, worker="trigger_daemon.actions._rsync_job", order=self._order, stopped=self._stopped,
            rooms=self._rooms, environment=lane_environment, of_run=OF_RUN,
        )  # fmt: skip

    # --------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        check_options(options)

    @staticmethod
    def look_online(options: Mapping[str, Any]) -> Iterator[Looked]:
        """Yield what a try finds: rsync here, keys, the far side, whether it can be written to."""
        return look(options, RSYNC)

    def destination(self, options: Mapping[str, Any]) -> str:
        return target_of(options).seat

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        try:
            target = target_of(options)
        except OptionFault:  # of a rule that is refused for it
            return ()
        return () if target.is_remote else (target.static,)

    def targets(self, request: Request) -> Iterator[tuple[str, File]]:
        """Yield where the files of a request would be written."""
        target = _target(request)
        for file in request.files:
            yield target.url(file.path), file

    def standing(self, request: Request, tos: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """Return (-1, 0), for what is not told, if something is at a far target; None if nothing is. Raises Refused."""
        try:
            target = _target(request)
            names = {to: to.removeprefix(f"{target.url()}/") for to in tos}
            there = standing(request.options, target, set(names.values()), RSYNC)
            return {to: (-1, 0) if name in there else None for to, name in names.items()}
        except OptionFault as fault:
            raise Refused(Fault("permanent", fault.message, fault.hint)) from None
        except Trouble as trouble:
            raise Refused(fault_of(trouble.fault())) from None

    # ---------------------------------------------------------------------- inside

    def _order(self, request: Request, do: str) -> tuple[dict[str, Any], str]:
        try:
            target = _target(request)
        except OptionFault as fault:  # by what its captures hold
            raise Refused(Fault("permanent", fault.message, fault.hint)) from None
        _refuse_impossible(request, target)
        rsync = shutil.which(RSYNC)
        if rsync is None:
            raise Refused(Fault("person", "there is no rsync on this machine",
                                "install it (apt-get install rsync), then `trigger-daemon runs retry`",
                                Scope.DESTINATION))  # fmt: skip
        return {
            "rsync": os.path.abspath(rsync), "to": [] if target.is_remote else [target.static],
            "written": _written(request),
            "options": {name: request.options.get(name, option.default) for name, option in self.OPTIONS.items()},
            "rerun_s": self._context.settings.get("rerun_s", RERUN_S),
        }, target.seat  # fmt: skip

    def _rooms(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return what must stay free where it writes."""
        target = target_of(order["options"], order["written"])
        return {"reserve": 0 if target.is_remote else self._context.reserve(target.path)}

    def _stopped(self, order: Mapping[str, Any]) -> str:
        return next(filter(None, map(self._context.stopped, order["to"])), "")


def _written(request: Request) -> str:
    """Return `to` with its templates; without them all of it must exist."""
    return str({**request.options, **(request.written or {})}["to"])


def _target(request: Request) -> Target:
    return target_of(request.options, _written(request))


def _refuse_impossible(request: Request, target: Target) -> None:
    """Raise Refused for two members with one target, and for targets in a watched directory."""
    refuse_twins(request, target.url)
    roots = {file.root.rstrip("/") + "/" for file in request.files}
    for file in request.files:
        if not target.is_remote and any((where := target.url(file.path)).startswith(root) for root in roots):
            raise Refused(Fault("permanent", f"{where} lies in the watched directory",
                                "choose a `to` outside of it: the daemon never writes where it watches"))
