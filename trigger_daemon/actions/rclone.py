"""Transfer each batch by rclone, to any remote that its configuration names: S3, SFTP, WebDAV, Google Drive and others.

One rclone a batch, in a worker process of low priority that ends with the
daemon. Nothing partial stands under a final name, and nobody's file is replaced
unless the rule says so. Proof are the digests that the remote keeps, compared
with those of the sources, or those of what is read back: what rclone says of
itself is no proof. `_rclone_job.py` does the work; this class never touches a
source or a remote itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trigger_daemon.actions import Context, File, Refused, Request
from trigger_daemon.actions._attempts import Attempts, ByAttempts, refuse_twins
from trigger_daemon.actions._lanes import lane_environment
from trigger_daemon.actions._looked import Looked
from trigger_daemon.actions._rclone_check import INSTALL, look, standing
from trigger_daemon.actions._rclone_target import Target, check_options, environment, program, refused, target_of
from trigger_daemon.core.grammar import Option, OptionFault, Options
from trigger_daemon.core.model import Fault, Scope

RERUN_S = 10.0  # until one that cannot be told another rate may be begun again for it; twice as long each time
OF_RUN = ("run-{}.worker", "run-{}.rclone", "run-{}.begun", "run-{}.rc")  # what is kept of a run


class Action(ByAttempts):
    """The provider; see the module."""

    OPTIONS: Options = {
        "to": Option("text", "where to: NAME:path, of a remote in rclone's configuration; the directory, or the "
                             "bucket, must exist there, files keep their path below the root",
                     required=True, template=True),
        "if_exists": Option("enum", "a different file that we did not write stands at the target: hold, or replace it",
                            default="hold", choices=("hold", "replace")),
        "verify": Option("enum", "what is proof: the hash that the remote keeps, a download of each file, or none",
                         default="hash", choices=("hash", "download", "none")),
        "config": Option("text", "rclone's configuration, of mode 0600; absent: that of the daemon's user"),
        "transfers": Option("int", "files that are sent at once", default=4, minimum=1),
        "retries": Option("int", "how often a request is made before it has failed; more where it is often too busy",
                          default=3, minimum=1),
        "tpslimit": Option("int", "requests that are made in a second at most; for services that count them",
                           minimum=1),
        "timeout": Option("duration", "a far side that is silent for this long, and for as long as its disk may have "
                                      "to read, is given up", default=120.0),
        "bandwidth": Option("rate", "read no faster than this, for each run"),
    }  # fmt: skip
    VERIFIES = True  # but for `verify: none`, see verifies()
    PREPARES = False
    LEAVES_OUT = True
    POOL = "rclone"  # a proof waits long for a far side, and keeps no copy waiting
    PROVES_PARTS = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._attempts = Attempts(
            "rclone", context, worker="trigger_daemon.actions._rclone_job", order=self._order,
            stopped=lambda order: "", rooms=lambda order: {}, of_run=OF_RUN,
            environment=lambda: {**environment(), **lane_environment()},
        )  # fmt: skip

    # --------------------------------------------------------------------- options

    def check(self, options: Mapping[str, Any]) -> None:
        check_options(options)

    def verifies(self, options: Mapping[str, Any]) -> bool:
        """Say whether a proof is made, with these options."""
        return options.get("verify") != "none"

    @staticmethod
    def look_online(options: Mapping[str, Any]) -> Iterator[Looked]:
        """Yield what a try finds: rclone here, its configuration, the remote, its proof, a write."""
        return look(options)

    def destination(self, options: Mapping[str, Any]) -> str:
        return target_of(options).seat

    def writes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def refuses(self, options: Mapping[str, Any], root: str, path: str) -> str:
        """Say why a file of this name is never taken, '' if it is."""
        return refused(path)

    def targets(self, request: Request) -> Iterator[tuple[str, File]]:
        """Yield where the files of a request would be written."""
        target = _target(request)
        for file in request.files:
            yield target.url(file.path), file

    def standing(self, request: Request, tos: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """Return (-1, 0), for what is not told, if something is at a far target; None if nothing is. Raises Refused."""
        try:
            target = _target(request)
        except OptionFault as fault:
            raise Refused(Fault("permanent", fault.message, fault.hint)) from None
        names = {to: to.removeprefix(target.url()).lstrip("/") for to in tos}
        there = standing(request.options, target, sorted(set(names.values())))
        return {to: (-1, 0) if name in there else None for to, name in names.items()}

    # ---------------------------------------------------------------------- inside

    def _order(self, request: Request, do: str) -> tuple[dict[str, Any], str]:
        try:
            target = _target(request)
        except OptionFault as fault:  # by what its captures hold
            raise Refused(Fault("permanent", fault.message, fault.hint)) from None
        refuse_twins(request, target.url)
        for file in request.files:
            if why := refused(file.path):
                raise Refused(Fault("person", f"{file.path!a} cannot be sent: {why}", "rename the file",
                                    Scope.FILE))  # fmt: skip
        if (rclone := program()) is None:
            raise Refused(Fault("person", "there is no rclone on this machine", f"{INSTALL}, then `trigger-daemon runs "
                                "retry`", Scope.DESTINATION))  # fmt: skip
        return {
            "rclone": rclone, "written": _written(request),
            "options": {name: request.options.get(name, option.default) for name, option in self.OPTIONS.items()},
            "rerun_s": self._context.settings.get("rerun_s", RERUN_S),
        }, target.seat  # fmt: skip


def _written(request: Request) -> str:
    """Return `to` with its templates; without them all of it must exist."""
    return str({**request.options, **(request.written or {})}["to"])


def _target(request: Request) -> Target:
    return target_of(request.options, _written(request))
