"""A daemon, an emulated Globus, and what stands between them: an account, a login, a wall clock that can be wrong."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.globus.emulator import Emulator
from tests.site import Site

CLIENT, NATIVE = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f", "9b2f7c14-3e5d-4a7c-8b1e-6d4f2a0c9e7b"
SECRET = "bm90LWEtc2VjcmV0"  # base64, as real ones are: the published CLI looks at its form

# The daemon as it is, on a machine whose wall clock shows what a file says more, or less.
_SHIFTED = """
import os, runpy, struct, sys, time
clock, kept = time.time, os.open({path!r}, os.O_RDONLY)
time.time = lambda: clock() + struct.unpack("d", os.pread(kept, 8, 0))[0]
sys.argv[0] = "trigger-daemon"
runpy.run_module("trigger_daemon", run_name="__main__", alter_sys=True)
"""


class Facility:
    """One site with an account at one emulated service."""

    def __init__(self, base: Path, *, person: bool = False, **settings: Any) -> None:
        self.site = Site(base, sweep="500ms", quiescence="100ms")
        self.globus = Emulator(base / "globus")
        self.person = person
        self._clock = base / "clock"
        self.before = ""  # a line that is run before the daemon: to shorten what it waits for
        self._settings = settings
        self.shift(0.0)

    def __enter__(self) -> Self:
        self.globus.start()
        self.globus.client(CLIENT, SECRET)
        self.globus.client(NATIVE)
        self.krios = self.globus.collection("Krios", self.site.data)
        self.archive = self.globus.collection("Archive", self.site.out)
        self.site.settings["throttle"] = {"runs": 40}
        self.site.settings["globus"] = {
            "client_id": NATIVE if self.person else CLIENT, "poll": "200ms", "listed_after": "4s",
            "collections": {self.krios: {str(self.site.data): "/"}}, **self._settings,
        }  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.site.stop()
        self.globus.kill()

    @property
    def environment(self) -> dict[str, str]:
        secret = {} if self.person else {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": SECRET}
        return {**self.globus.environment(), **secret, "GLOBUS_SDK_HTTP_TIMEOUT": "20"}

    @property
    def _program(self) -> tuple[str, str]:
        return "-c", self.before + _SHIFTED.format(path=str(self._clock))

    def start(self, **keys: Any) -> None:
        self.site.start(env=self.environment, program=self._program, **keys)

    def json(self, *args: str) -> Any:
        """Run a command of the operator's, at that machine."""
        command = [sys.executable, "-P", *self._program, *args, "-F", "json", "--config", str(self.site.config)]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    def shift(self, seconds: float) -> None:
        """Set the wall clock of the daemon's machine, also while it runs."""
        descriptor = os.open(self._clock, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("d", seconds), 0)
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------- rules, runs

    def transfer(self, name: str = "move", *, to: str = "", rule: dict[str, Any] | None = None, **options: Any) -> Any:
        """Return a rule that sends what lies in data/NAME to /raw/NAME of the archive."""
        move = {"from": self.krios, "to": to or self.archive, "path": f"/raw/{name}", **options}
        return self._rule(name, {"globus_transfer": move}, rule)

    def flow(self, name: str, flow: str, *, rule: dict[str, Any] | None = None, **options: Any) -> Any:
        return self._rule(name, {"globus_flow": {"flow": flow, **options}}, rule)

    def _rule(self, name: str, start: dict[str, Any], more: dict[str, Any] | None) -> Any:
        watch = self.site.data / name
        watch.mkdir(exist_ok=True)
        retry = {"initial": "500ms", "longest": "2s"}
        return self.site.rule(name, watch=str(watch), start=start, retry=retry, **(more or {}))

    def write(self, rule: str, name: str = "a.tif", size: int = 100) -> Path:
        path = self.site.data / rule / name
        path.write_bytes(os.urandom(size))
        return path

    def runs(self, rule: str) -> list[tuple[int, str]]:
        """Return number and state of a rule's runs, oldest first."""
        return self.site.ask(
            "SELECT run.id, run.state FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule"
            " WHERE rule.name = ? ORDER BY run.id", rule,
        )  # type: ignore[return-value]  # fmt: skip

    def until(self, rule: str, *states: str, timeout_s: float = 30.0) -> list[int]:
        """Wait until a rule's runs are in these states, oldest first; return their numbers."""
        self.site.until(
            lambda: tuple(state for _, state in self.runs(rule)) == states, timeout_s, f"{rule}: {states}"
        )
        return [number for number, _ in self.runs(rule)]

    def show(self, run: int) -> Any:
        return self.site.json("runs", "show", str(run))

    # ------------------------------------------------------------------------ login

    def login(self) -> None:
        """Log a person in, as an operator does: open each address that is shown, and paste the code."""
        command = [sys.executable, "-P", "-m", "trigger_daemon", "globus", "login", "--config", str(self.site.config)]
        with subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, bufsize=0,
        ) as process:  # fmt: skip
            assert process.stderr is not None and process.stdin is not None
            shown, answered = b"", 0
            while part := process.stderr.read(4_096):
                shown += part
                addresses = re.findall(rb"(http\S+)\s", shown)
                for address in addresses[answered:]:
                    with urllib.request.urlopen(address.decode(), timeout=10) as page:
                        process.stdin.write(f"{json.load(page)['code']}\n".encode())
                answered = len(addresses)
            code = process.wait(30)
        assert code == 0, shown.decode()
