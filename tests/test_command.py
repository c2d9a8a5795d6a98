"""The action `command`: a program a batch, executed once, its outcome known after any crash."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trigger_daemon.actions import Action as Provider
from trigger_daemon.actions import (
    Context,
    Differs,
    File,
    Progress,
    Proof,
    Refused,
    Request,
    Unproven,
    _supervisor,
    command,
)
from trigger_daemon.core.grammar import OptionFault

PATIENCE_S = 60.0  # for a busy machine; nothing here takes a second on an idle one

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`command` needs Linux")


class Lab:
    """A state directory, a few files, and scripts to run."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.state = base / "state"
        self.data = base / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.nudges: list[tuple[int, int]] = []
        self.nudged = threading.Event()
        self.limit: float | None = None
        self.counter = base / "executions"
        self._actions: list[command.Action] = []

    def action(self) -> command.Action:
        """A new one, as after a restart."""
        made = command.Action(Context(state_dir=str(self.state), nudge=self._nudge, bandwidth=lambda: self.limit))
        self._actions.append(made)
        return made

    def _nudge(self, run: int, attempt: int) -> None:
        self.nudges.append((run, attempt))
        self.nudged.set()

    def file(self, name: str, content: bytes = b"frames") -> File:
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        stat = path.stat()
        return File(str(self.data), name, stat.st_size, stat.st_mtime_ns)

    def script(self, text: str, name: str = "script") -> str:
        """A shell script that counts its executions; returns its path."""
        path = self.base / name
        path.write_text(f"#!/bin/sh\necho x >> '{self.counter}'\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def executions(self) -> int:
        return len(self.counter.read_text().splitlines()) if self.counter.exists() else 0

    def request(
        self,
        text: str = "exit 0",
        *,
        run: int = 7,
        attempt: int = 1,
        files: tuple[File, ...] | None = None,
        captures: Mapping[str, str] | None = None,
        argv: tuple[str, ...] = (),
        **options: Any,
    ) -> Request:
        options["run"] = argv or (self.script(text), "{manifest}")
        return Request(
            run=run, attempt=attempt, rule="first-look", group={"session": "s1"},
            captures=captures or {"session": "s1"},
            files=(self.file("a.tif"),) if files is None else files,
            options={name: option.default for name, option in command.Action.OPTIONS.items()} | options,
        )

    def directory(self, request: Request) -> Path:
        return self.state / f"{request.run}-{request.attempt}"

    def close(self) -> None:
        for action in self._actions:
            action.close()
        for pid in below(self.state):
            os.kill(pid, signal.SIGKILL)


def below(state: Path) -> list[int]:
    """The supervisors that work in a state directory."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if b"_supervisor.py" in line and os.fsencode(state) + b"/" in line:
                found.append(int(name))
    return found


def alive(pid: int) -> bool:
    stat = _supervisor.stat_of(pid)
    return stat is not None and stat[0] not in "ZX"


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait for something another process does."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def ended(action: command.Action, request: Request, handle: Any) -> Progress:
    """Poll to the end."""

    def asked() -> Progress | None:
        progress = action.poll(request, handle)
        return None if progress.status == "active" else progress

    return until(asked, "the end of the attempt")  # type: ignore[no-any-return]


def run(lab: Lab, request: Request) -> Progress:
    action = lab.action()
    return ended(action, request, action.start(request, None))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


# ---------------------------------------------------------------------- what a program is given


def test_it_is_a_provider(lab: Lab) -> None:
    """The class fulfils the protocol of actions."""
    assert isinstance(lab.action(), Provider)


def test_a_program_learns_all_about_its_batch(lab: Lab) -> None:
    """Manifest, list of files and environment tell what the batch is, in any bytes a file name may have."""
    odd = os.fsdecode(b"sub dir/\xff{x}\n.tif")
    request = lab.request(
        'cat "$TRIGGER_MANIFEST" >&2; tr "\\0" "|" < "$TRIGGER_FILES"; echo "$1 $TRIGGER_SESSION $TRIGGER_RULE '
        '$TRIGGER_BATCH $TRIGGER_ATTEMPT $EXTRA $PWD"',
        files=(lab.file("a.tif"), lab.file(odd)), captures={"session": odd}, env={"EXTRA": "more"}, cwd=str(lab.base),
    )

    assert run(lab, request).status == "succeeded"

    directory = lab.directory(request)
    paths = [os.fsencode(lab.data / "a.tif"), os.fsencode(lab.data / odd)]
    said = f"{directory}/manifest.json {odd} first-look 7 1 more {lab.base}\n"
    assert (directory / "stdout").read_bytes() == b"".join(path + b"|" for path in paths) + os.fsencode(said)
    told = json.loads((directory / "stderr").read_text())
    assert [os.fsencode(file["absolute"]) for file in told["files"]] == paths
    assert told["files"][0] == {
        "root": str(lab.data), "path": "a.tif", "absolute": str(lab.data / "a.tif"), "size": 6,
        "mtime_ns": request.files[0].mtime_ns, "role": "",
    }
    assert (told["rule"], told["run"], told["attempt"], told["group"]) == ("first-look", 7, 1, {"session": "s1"})


@pytest.mark.parametrize(("settings", "rule", "told"), [
    (2e6, None, "2000000"), (2e6, 5e6, "2000000"), (2e6, 1e6, "1000000"), (None, 1e6, "1000000"), (None, None, "none"),
])  # fmt: skip
def test_a_program_is_told_the_rate_that_it_may_take(
    lab: Lab, settings: float | None, rule: float | None, told: str
) -> None:
    """The lower of the settings' limit at its start and its rule's; nothing where there is none."""
    lab.limit = settings
    request = dataclasses.replace(lab.request("echo ${TRIGGER_BANDWIDTH-none}"), bandwidth=rule)
    assert run(lab, request).status == "succeeded"

    assert (lab.directory(request) / "stdout").read_text() == told + "\n"


def test_the_daemons_secrets_do_not_reach_a_program(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment holds for the daemon alone is removed; the rest, the locale too, is kept."""
    ours = ("NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "WATCHDOG_USEC", "WATCHDOG_PID", "TRIGGER_DAEMON_MQTT__PASSWORD")
    for name in (*ours, "LC_ALL", "SITE"):
        monkeypatch.setenv(name, "C")
    request = lab.request("env")
    run(lab, request)

    names = {line.partition("=")[0] for line in (lab.directory(request) / "stdout").read_text().splitlines()}
    assert not names & set(ours)
    assert {"LC_ALL", "SITE"} <= names


def test_a_program_is_alone(lab: Lab) -> None:
    """No input, a session of its own, no descriptors of ours, default signals."""
    request = lab.request(
        "cat; readlink /proc/self/fd/0; ls /proc/$$/fd | wc -l; cut -d' ' -f6 /proc/$$/stat; echo $$; "
        "grep SigIgn /proc/$$/status"
    )
    run(lab, request)

    stdin, descriptors, session, pid, ignored = (lab.directory(request) / "stdout").read_text().splitlines()
    assert stdin == "/dev/null"
    assert int(descriptors) <= 5  # 0, 1, 2, and two of the shell itself
    assert session == pid
    assert int(ignored.split()[1], 16) & ~(0b11 << 31) == 0  # 32 and 33 are the C library's own, and cannot be set


# ---------------------------------------------------------------------- what its end means


@pytest.mark.parametrize(
    ("text", "status", "kind", "words"),
    [
        ("exit 0", "succeeded", None, ""),
        ("echo busy >&2; exit 75", "failed", "transient", "not now (exit code 75): busy"),
        ("exit 65", "failed", "person", "asks for a person (exit code 65)"),
        ("echo first >&2; echo 'no such gain' >&2; exit 3", "failed", "person", "exit code 3: first | no such gain"),
        ("kill -SEGV $$", "failed", "person", "killed by signal 11"),
        ("kill -TERM $$", "failed", "transient", "stopped by signal 15"),
        ("exec /nowhere/tool", "failed", "person", "failed with exit code 127"),
    ],
)
def test_the_exit_code_says_what_comes_next(lab: Lab, text: str, status: str, kind: str | None, words: str) -> None:
    """0 is success, `again` is later, everything else needs a person; the end of stderr says why."""
    progress = run(lab, lab.request(text))

    assert progress.status == status
    assert (progress.fault.kind if progress.fault else None) == kind
    assert words in progress.why


def test_a_rule_may_name_its_own_codes(lab: Lab) -> None:
    """`again` and `hold` are options."""
    progress = run(lab, lab.request("exit 3", again=(3, 4)))

    assert progress.fault is not None
    assert progress.fault.kind == "transient"


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("echo words; echo '{\"ice\": 3}'", {"ice": 3}),
        ("echo words; echo '{\"ice\": '", 'words\n{"ice":'),
        ("echo '[1]'", "[1]"),
        ("echo '{\"a\": NaN}'", {"a": None}),
        ("true", None),
    ],
)
def test_a_json_object_on_the_last_line_is_the_output(lab: Lab, text: str, output: Any) -> None:
    """Statistics reach people; anything else is passed on as words."""
    assert run(lab, lab.request(text)).output == output


def test_a_program_that_prints_for_ever_fills_no_disk(lab: Lab) -> None:
    """Of each stream the first and the last 64 KiB are kept, with the JSON of the last line."""
    request = lab.request(
        "echo begins; head -c 20000000 /dev/zero | tr '\\0' x; head -c 5000000 /dev/zero >&2; echo; echo '{\"n\": 1}'"
    )
    progress = run(lab, request)

    kept = (lab.directory(request) / "stdout").read_bytes()
    assert progress.output == {"n": 1}
    assert len(kept) <= 2 * _supervisor.KEPT_BYTES + 100
    assert kept.startswith(b"begins\n")
    assert b"bytes are not kept" in kept
    assert (lab.directory(request) / "stderr").stat().st_size <= 2 * _supervisor.KEPT_BYTES + 100


def test_a_program_that_prints_for_ever_fills_no_memory(lab: Lab) -> None:
    """What is not kept is not remembered either."""
    request = lab.request(f"head -c 100000000 /dev/zero; touch {lab.base}/said; while :; do sleep 1; done")
    action = lab.action()
    handle = action.start(request, None)
    until((lab.base / "said").exists, "100 MB")
    status = Path("/proc", str(below(lab.state)[0]), "status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    action.cancel(request, handle)

    assert ended(action, request, handle).status == "cancelled"
    assert peak_kib < 50_000


def test_the_timeout_ends_a_program_and_all_it_started(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grandchildren in sessions of their own and those that ignore TERM are ended too; then a person is needed."""
    monkeypatch.setattr(command, "GRACE_S", 0.3)
    pids = lab.base / "pids"
    request = lab.request(
        f"trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ >> {pids}; sleep 1000' & "
        f"(setsid setsid sh -c 'echo $$ >> {pids}; sleep 1000' &) ; echo $$ >> {pids}; while :; do sleep 1; done",
        timeout=1.0,
    )
    progress = run(lab, request)

    started = [int(line) for line in pids.read_text().split()]
    assert len(started) == 3
    assert not [pid for pid in started if alive(pid)]
    assert progress.fault is not None
    assert progress.fault.kind == "person"
    assert "did not end within 1 s" in progress.why


def test_what_a_program_leaves_behind_ends_with_it(lab: Lab) -> None:
    """An attempt is over only when nothing of it goes on: the next one must not meet its remains."""
    pids = lab.base / "pids"
    request = lab.request(
        f"setsid sh -c 'echo $$ > {pids}; sleep 1000' & while ! [ -s {pids} ]; do sleep 0.01; done; exit 0"
    )

    assert run(lab, request).status == "succeeded"
    assert not alive(int(pids.read_text()))


@pytest.mark.parametrize("words", ["/nowhere/tool", "no-such-tool", "plain", "no-interpreter"])
def test_a_program_that_cannot_be_executed_is_refused(lab: Lab, words: str) -> None:
    """Missing, not executable, or without its interpreter: a person is told what to do."""
    plain = lab.base / "plain"
    plain.write_text("#!/bin/sh\n")
    broken = lab.base / "no-interpreter"
    broken.write_text("#!/nowhere/sh\n")
    broken.chmod(0o755)
    program = str(lab.base / words) if (lab.base / words).exists() else words
    request = lab.request(argv=(program,))
    action = lab.action()

    for _ in range(2):  # the repetition says the same
        with pytest.raises(Refused) as refused:
            action.start(request, None)
        assert refused.value.fault.kind == "person"
        assert program in refused.value.fault.why
        assert refused.value.fault.hint


def test_a_missing_working_directory_is_refused(lab: Lab) -> None:
    """`cwd` is never made by us."""
    with pytest.raises(Refused, match="cannot run in /nowhere"):
        lab.action().start(lab.request(cwd="/nowhere"), None)

    assert not os.path.exists("/nowhere")


def test_arguments_too_long_for_the_system_are_refused(lab: Lab) -> None:
    """Big batches travel by manifest."""
    with pytest.raises(Refused) as refused:
        lab.action().start(lab.request(argv=("/bin/true", "x" * 1_000_000)), None)

    assert "{manifest}" in refused.value.fault.hint


def test_a_state_directory_that_cannot_be_written_refuses_for_now(tmp_path: Path, lab: Lab) -> None:
    """No record, no execution."""
    (tmp_path / "file").touch()
    action = command.Action(Context(state_dir=str(tmp_path / "file" / "x"), nudge=lambda *_: None))
    with pytest.raises(Refused) as refused:
        action.start(lab.request(), None)
    action.close()

    assert refused.value.fault.kind == "transient"
    assert lab.executions() == 0


# ---------------------------------------------------------------------- once


def test_a_repeated_start_executes_once(lab: Lab) -> None:
    """The same attempt, started again in this life, at the same time, and in the next: one execution, one handle."""
    request = lab.request("sleep 0.3")
    action = lab.action()
    handles: list[Any] = []
    threads = [threading.Thread(target=lambda: handles.append(action.start(request, None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handles.append(lab.action().start(request, None))
    ended(action, request, handles[0])
    handles.append(action.start(request, None))

    assert lab.executions() == 1
    assert handles[-1] == handles[-2]


def test_a_layout_is_never_replaced(lab: Lab) -> None:
    """Two threads that lay out one attempt at the same time: the first directory stands, a supervisor may be in it."""
    request = lab.request()
    action = lab.action()
    action._lay_out(request, str(lab.directory(request)))
    before = lab.directory(request).stat().st_ino
    action._lay_out(request, str(lab.directory(request)))

    assert lab.directory(request).stat().st_ino == before
    assert os.listdir(lab.state) == ["7-1"]


def test_another_attempt_executes_again(lab: Lab) -> None:
    """Attempts are told apart."""
    run(lab, lab.request())
    run(lab, lab.request(attempt=2))

    assert lab.executions() == 2


KILLED_AT_A_LINE = """
import os, pickle, signal, sys
from trigger_daemon.actions import Context, _supervisor, command
request = pickle.load(open({request!r}, "rb"))
left = [int(sys.argv[1])]
files = (command.__file__, _supervisor.__file__)

def trace(frame, event, argument):
    if frame.f_code.co_filename not in files:
        return None
    if event == "line":
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

action = command.Action(Context(state_dir={state!r}, nudge=lambda *_: None))
sys.settrace(trace)
action.start(request, None)
sys.settrace(None)
os._exit(0)
"""


def test_a_daemon_killed_at_any_line_of_start_executes_once(lab: Lab) -> None:
    """Before the layout, between layout and supervisor, after the exec: find or a repeated start complete it."""
    step, line, killed = 17, 1, 0
    while True:
        request = lab.request(run=line)
        program = KILLED_AT_A_LINE.format(request=pickled(lab, request), state=str(lab.state))
        code = subprocess.run([sys.executable, "-c", program, str(line)], env=environment(), check=False).returncode
        assert code in (0, -signal.SIGKILL)
        before = lab.executions()
        action = lab.action()
        handle = action.find(request, None) or action.start(request, None)
        assert ended(action, request, handle).status == "succeeded"
        assert action.start(request, None)
        assert lab.counter.read_text().count("x") == killed + 1, f"killed at line {line}; {before} executions before"
        killed += 1
        if code == 0:
            break
        line += step

    assert killed > 5


SUPERVISOR_KILLED_AT_A_LINE = """
import os, signal, sys
sys.path.append({folder!r})
import _supervisor
left, pid = [int(sys.argv.pop(1))], os.getpid()

def trace(frame, event, argument):
    if frame.f_code.co_filename != _supervisor.__file__ or os.getpid() != pid:
        return None
    if event == "line":
        left[0] -= 1
        if left[0] == 0:
            os.kill(pid, signal.SIGKILL)
    return trace

sys.settrace(trace)
_supervisor.main(sys.argv[1:])
"""


def test_a_supervisor_killed_at_any_line_is_never_mistaken(lab: Lab) -> None:
    """At most one execution; success only where the end is recorded; never "never executed" of what was."""
    program = lab.base / "killed.py"
    program.write_text(SUPERVISOR_KILLED_AT_A_LINE.format(folder=str(Path(_supervisor.__file__).parent)))
    line, seen, over = 1, set(), False
    while not over:
        lab.counter.unlink(missing_ok=True)
        request = lab.request(run=line)
        action = lab.action()
        action._lay_out(request, str(lab.directory(request)))
        argv = [sys.executable, "-I", "-S", str(program), str(line), str(lab.directory(request)), "60", "10"]
        script = str(request.options["run"][0])
        over = subprocess.run([*argv, script, "/", script], stdout=subprocess.PIPE, check=False).returncode == 0
        handle = action.find(request, None)
        progress = ended(action, request, handle)
        seen.add(progress.status)

        assert lab.executions() <= 1
        if progress.status == "succeeded":
            assert lab.executions() == 1
        else:
            assert progress.fault is not None
            kind, words = ("person", "outcome unknown: its supervisor was killed")
            if progress.fault.kind == "transient":  # killed between fork and record
                kind, words = ("transient", "never executed")
                assert lab.executions() == 0
            assert (progress.status, progress.fault.kind) == ("failed", kind)
            assert words in progress.why
        line += 7

    assert seen == {"succeeded", "failed"}


def pickled(lab: Lab, request: Request) -> str:
    import pickle

    path = lab.base / f"request-{request.run}"
    path.write_bytes(pickle.dumps(request))
    return str(path)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# ---------------------------------------------------------------------- after a crash


def test_a_program_goes_on_when_the_daemon_lets_go(lab: Lab) -> None:
    """close() leaves the command running; the next life is told of its end by asking."""
    request = lab.request(f"while ! [ -e {lab.base}/go ]; do sleep 0.01; done; echo done")
    former = lab.action()
    handle = former.start(request, None)
    former.close()
    action = lab.action()

    assert action.poll(request, handle).status == "active"
    (lab.base / "go").touch()
    assert ended(action, request, handle).output == "done"
    assert action.find(request, None) == handle


def test_a_killed_supervisor_leaves_the_outcome_unknown(lab: Lab) -> None:
    """The program is watched while it lives; then a person must look, and nothing is started again."""
    request = lab.request(f"while ! [ -e {lab.base}/go ]; do sleep 0.01; done")
    action = lab.action()
    handle = action.start(request, None)
    os.kill(below(lab.state)[0], signal.SIGKILL)
    assert lab.nudged.wait(PATIENCE_S)

    progress = action.poll(request, handle)
    assert (progress.status, "supervisor was killed" in progress.why) == ("active", True)
    assert action.start(request, None) == handle
    (lab.base / "go").touch()
    progress = ended(action, request, handle)
    assert progress.fault is not None
    assert progress.fault.kind == "person"
    assert "outcome unknown" in progress.why
    assert lab.executions() == 1


def test_a_program_without_its_supervisor_can_be_cancelled(lab: Lab) -> None:
    """The process group is ended by whoever polls."""
    request = lab.request("sleep 1000")
    action = lab.action()
    handle = action.start(request, None)
    os.kill(below(lab.state)[0], signal.SIGKILL)
    lab.nudged.wait(PATIENCE_S)
    action.cancel(request, handle)

    assert ended(action, request, handle).status == "cancelled"
    assert not alive(handle["pid"])


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        ({"boot": "another"}, "the machine was restarted while it ran"),
        ({"start": 1}, "its supervisor was killed while it ran"),
    ],
)
def test_a_used_again_process_number_is_not_mistaken(lab: Lab, begun: Mapping[str, Any], words: str) -> None:
    """A process counts only with the boot and the start that were recorded: this very test is none of ours."""
    request = lab.request()
    action = lab.action()
    action._lay_out(request, str(lab.directory(request)))
    stat = _supervisor.stat_of(os.getpid())
    assert stat is not None
    true = {"pid": os.getpid(), "start": stat[3], "boot": _supervisor.boot_id(), "ends_at": time.monotonic() + 1000}
    (lab.directory(request) / "begun.json").write_text(json.dumps(true))
    assert action.poll(request, {}).status == "active"

    (lab.directory(request) / "begun.json").write_text(json.dumps({**true, **begun}))
    progress = action.poll(request, {})
    assert (progress.status, words in progress.why) == ("failed", True)
    assert action.start(request, None)["pid"] == os.getpid()
    assert lab.executions() == 0


def test_a_stopped_machine_is_nobodys_fault(lab: Lab) -> None:
    """TERM to the supervisor ends the program in order; a new attempt may follow."""
    request = lab.request("sleep 1000")
    action = lab.action()
    handle = action.start(request, None)
    os.kill(below(lab.state)[0], signal.SIGTERM)
    progress = ended(action, request, handle)

    assert progress.fault is not None
    assert (progress.fault.kind, progress.fault.counts) == ("transient", False)


def test_the_end_is_told_at_once(lab: Lab) -> None:
    """A supervisor made in this life nudges, so that polls may be rare."""
    request = lab.request(f"while ! [ -e {lab.base}/go ]; do sleep 0.01; done")
    action = lab.action()
    handle = action.start(request, None)
    assert action.poll(request, handle).again_in_s == command.POLL_WATCHED_S
    (lab.base / "go").touch()

    assert lab.nudged.wait(PATIENCE_S)
    assert lab.nudges == [(7, 1)]
    assert action.poll(request, handle).status == "succeeded"


# ---------------------------------------------------------------------- cancel, changed, verify


def test_cancel_ends_all_processes(lab: Lab) -> None:
    """A wish; poll says when it has come true."""
    pids = lab.base / "pids"
    request = lab.request(f"sh -c 'echo $$ > {pids}; sleep 1000'")
    action = lab.action()
    handle = action.start(request, None)
    until(lambda: pids.exists() and pids.read_text(), "the program")
    action.cancel(request, handle)

    assert ended(action, request, handle).status == "cancelled"
    assert not alive(int(pids.read_text()))


def test_a_cancel_before_the_exec_prevents_it(lab: Lab) -> None:
    """The wish is in the directory; a late supervisor heeds it."""
    request = lab.request()
    action = lab.action()
    action._lay_out(request, str(lab.directory(request)))
    action.cancel(request, None)
    handle = action.find(request, None)

    assert ended(action, request, handle).status == "cancelled"
    assert not (lab.directory(request) / "begun.json").exists()
    assert lab.executions() == 0


def test_a_start_that_is_taken_back_is_never_executed(lab: Lab) -> None:
    """Refused means surely not: a supervisor that comes late finds nothing to run."""
    request = lab.request()
    action = lab.action()
    action._lay_out(request, str(lab.directory(request)))
    Path(request.options["run"][0]).unlink()

    assert action.find(request, None) is None
    assert os.listdir(lab.state) == []


def test_a_member_that_changed_is_reported(lab: Lab) -> None:
    """Gone, or another version: the run must not count for the one in the manifest."""
    files = (lab.file("a.tif"), lab.file("b.tif"), lab.file("c.tif"))
    request = lab.request(f"rm {lab.data}/a.tif; echo more >> {lab.data}/b.tif", files=files, verify=("/bin/true",))
    action = lab.action()
    progress = ended(action, request, action.start(request, None))
    proof = action.verify(request, None)

    assert (progress.status, progress.changed) == ("succeeded", ("a.tif", "b.tif"))
    assert isinstance(proof, Proof)
    assert proof.changed == ("a.tif", "b.tif")
    assert [member["path"] for member in proof.members] == ["c.tif"]


def test_only_a_verifying_program_proves(lab: Lab) -> None:
    """`proof: required` is possible exactly where the rule sets `verify`."""
    assert command.Action.verifies({"verify": ("tape-check",)})
    assert not command.Action.verifies({"verify": None})
    assert isinstance(lab.action().verify(lab.request(), None), Unproven)


def test_exit_0_of_the_verifying_program_proves(lab: Lab) -> None:
    """Every member of the manifest gets its record."""
    request = lab.request(verify=(lab.script('grep -q a.tif "$1"', "verify"), "{manifest}"))
    proof = lab.action().verify(request, None)

    assert isinstance(proof, Proof)
    assert proof.members[0]["by"] == "command"
    assert (proof.members[0]["path"], proof.members[0]["size"], proof.members[0]["digest"]) == ("a.tif", 6, "")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("echo busy >&2; exit 75", "transient", "not now"),
        ("exit 2", "person", "exit code 2"),
        ("kill -SEGV $$", "person", "signal 11"),
        ("sleep 1000", "person", "did not end within"),
    ],
)
def test_a_verifying_program_that_cannot_tell_proves_nothing(lab: Lab, text: str, kind: str, words: str) -> None:
    """Trouble is neither proof nor difference."""
    said = lab.action().verify(lab.request(verify=(lab.script(text, "verify"),), timeout=1.0), None)

    assert isinstance(said, Unproven)
    assert (said.fault.kind, words in said.fault.why) == (kind, True)


def test_exit_1_of_the_verifying_program_says_it_differs(lab: Lab) -> None:
    """As cmp and diff say it; the answer is asked for anew each time."""
    request = lab.request(verify=(lab.script(f"[ -e {lab.base}/whole ]", "verify"),))
    action = lab.action()

    said = action.verify(request, None)
    assert isinstance(said, Differs)
    assert set(said.which) == {"a.tif"}
    (lab.base / "whole").touch()
    assert isinstance(action.verify(request, None), Proof)


def test_a_missing_verifying_program_is_a_persons_work(lab: Lab) -> None:
    """And no mismatch."""
    said = lab.action().verify(lab.request(verify=("/nowhere/check",)), None)

    assert isinstance(said, Unproven)
    assert said.fault.kind == "person"


def test_close_ends_a_verification(lab: Lab) -> None:
    """It is asked for again after the restart; nothing of ours is left."""
    request = lab.request(verify=(lab.script(f"touch {lab.base}/runs; sleep 1000", "verify"),))
    action = lab.action()
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(action.verify(request, None)))
    thread.start()
    until((lab.base / "runs").exists, "the verification")
    action.close()
    thread.join(PATIENCE_S)

    assert isinstance(said[0], Unproven)
    assert said[0].fault.kind == "transient"
    assert below(lab.state) == []


# ---------------------------------------------------------------------- what is kept


def test_a_journaled_run_is_forgotten(lab: Lab) -> None:
    """Its directories go; those of other runs and of living programs stay."""
    action = lab.action()
    for attempt in (1, 2):
        request = lab.request(attempt=attempt)
        ended(action, request, action.start(request, None))
    other = lab.request("sleep 1000", run=77)
    handle = action.start(other, None)
    assert action.remembered() == [7, 77]
    action.forget(7)
    action.forget(77)

    assert sorted(os.listdir(lab.state)) == ["77-1"]
    action.cancel(other, handle)
    ended(action, other, handle)


def test_attempts_of_long_ago_are_not_kept(lab: Lab) -> None:
    """A run that is tried for a week keeps the last few directories."""
    action = lab.action()
    for attempt in range(1, 7):
        request = lab.request("exit 75", attempt=attempt)
        ended(action, request, action.start(request, None))

    assert sorted(os.listdir(lab.state)) == ["7-4", "7-5", "7-6"]


def test_what_a_crash_left_half_made_is_removed(lab: Lab) -> None:
    """Layouts that were never named."""
    (lab.state / ".tmpx").mkdir(parents=True)
    (lab.state / ".tmpx" / "files").touch()
    run(lab, lab.request())

    assert os.listdir(lab.state) == ["7-1"]


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"run": ()}, "run"),
        ({"run": "/opt/qc/look --all"}, "run"),
        ({"run": ("",)}, "run"),
        ({"run": "look", "again": (75,), "hold": (75,)}, "hold"),
        ({"run": "look", "again": (0,)}, "again"),
        ({"run": "look", "hold": (256,)}, "hold"),
        ({"run": "look", "timeout": 0.0}, "timeout"),
        ({"run": "look", "env": {"A=B": "x"}}, "env"),
        ({"run": "look", "env": {"TRIGGER_RULE": "x"}}, "env"),
        ({"run": "look", "verify": "check it"}, "verify"),
    ],
)
def test_options_that_can_never_work_are_told_at_load_time(lab: Lab, options: Mapping[str, Any], option: str) -> None:
    """With the option's name, so that line and column can be said."""
    with pytest.raises(OptionFault) as fault:
        lab.action().check(options)

    assert fault.value.option == option


def test_sound_options_pass(lab: Lab) -> None:
    """What the documentation shows is accepted."""
    lab.action().check({"run": ("/opt/qc/first-look", "--manifest", "{manifest}"), "again": 75, "hold": (65,)})
