"""The laws every action keeps, over every file in `trigger_daemon/actions`.

A new action needs a bench in `conformance.py`, and no test here. Everything a
provider has to remember passes through JSON, as it does through the journal.
"""

from __future__ import annotations

import json
import os
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trigger_daemon.actions
from conformance import BENCHES, PATIENCE_S, Bench, insist, poll_to_end, through_json
from trigger_daemon import actions, registry
from trigger_daemon.actions import Differs, File, Progress, Proof, Refused, Unproven
from trigger_daemon.core.grammar import Option

ACTIONS = sorted(found.name for found in pkgutil.iter_modules(trigger_daemon.actions.__path__) if found.name[0] != "_")
LARGE_BYTES = 3_000_000  # more than a bench can move while it is slow

MakeBench = Callable[..., Bench]


@pytest.fixture(params=ACTIONS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeBench]:
    """Make the bench of each action in turn; what it leaves running is told to end."""
    name = request.param
    if name not in BENCHES:
        pytest.fail(f"no bench for actions/{name}.py: add one to tests/conformance.py")
    with BENCHES[name].around(tmp_path):
        yield lambda **how: BENCHES[name](tmp_path, **how)
        (tmp_path / "go").touch()


def begin(bench: Bench, *files: File) -> tuple[actions.Action, actions.Request, Any]:
    """Prepare and start an attempt over these files."""
    action = bench.action()
    request = bench.request(files)
    action.check(request.options)
    prepared = through_json(action.prepare(request)) if action.PREPARES else None
    return action, request, through_json(action.start(request, prepared))


def done(bench: Bench, *files: File) -> tuple[actions.Action, actions.Request, Any, Progress]:
    """An attempt that ended."""
    action, request, handle = begin(bench, *files)
    return action, request, handle, poll_to_end(action, request, handle)


def some(bench: Bench) -> tuple[File, ...]:
    """Names and sizes as instruments make them."""
    return (
        bench.write("s1/a [1] é.tif", b"frames" * 1000),
        bench.write("s1/deep/er/b.tif", b""),
        bench.write(os.fsdecode(bench.ODD), b"x"),
        bench.write("-c.mrc", b"not an option"),
    )


def expected(bench: Bench, files: tuple[File, ...]) -> dict[str, bytes]:
    return {file.path: (bench.source / file.path).read_bytes() for file in files}


def ours() -> set[int]:
    """Our children but for the supervisors of commands, which outlive us on purpose."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path("/proc", name, "stat").read_text().rpartition(") ")[2].split()[1])
            line = Path("/proc", name, "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and line and b"_supervisor.py" not in line:
            found.add(int(name))
    return found


# ---------------------------------------------------------------------- what it declares


@pytest.mark.parametrize("name", ACTIONS)
def test_it_keeps_the_protocol(name: str, tmp_path: Path) -> None:
    """The class has every method of an action, and a word for its destination that is not empty."""
    bench = BENCHES[name](tmp_path)
    action = bench.action()
    options = bench.request(()).options

    assert isinstance(action, actions.Action)
    assert action.destination(options)
    assert all(os.path.isabs(directory) for directory in action.writes(options))
    action.close()


@pytest.mark.parametrize("name", ACTIONS)
def test_its_options_are_documented(name: str) -> None:
    """Each has words for people, and a default of its own kind or none."""
    kinds: dict[str, tuple[type, ...]] = {
        "text": (str,), "uuid": (str,),
        "int": (int,), "bool": (bool,), "size": (int,), "rate": (int,), "duration": (int, float),
        "enum": (str,), "texts": (str, tuple, list), "ints": (int, tuple, list),
        "list": (tuple, list), "map": (dict,),
    }  # fmt: skip
    for option_name, option in registry.find_action(name).OPTIONS.items():
        assert isinstance(option, Option)
        assert option_name.islower()
        assert len(option.doc.split()) >= 2, f"{option_name} is not documented"
        assert option.default is None or isinstance(option.default, kinds[option.kind]), option_name
        assert not (option.required and option.default is not None), f"{option_name} is required and has a default"
        if option.kind == "enum":
            assert option.default is None or option.default in option.choices


# ---------------------------------------------------------------------- the way that goes well


def test_it_delivers_and_proves(make: MakeBench) -> None:
    """All files, whole, nothing beside them; counted; and where it verifies, a record of each."""
    bench = make()
    files = some(bench)
    action, request, handle, progress = done(bench, *files)
    said = action.verify(request, handle) if action.VERIFIES else None
    action.close()

    assert progress.status == "succeeded", progress.why
    assert (progress.files_done, progress.bytes_done) == (len(files), sum(file.size for file in files))
    assert json.dumps(progress.output) is not None
    assert bench.delivered() == expected(bench, files)
    if said is not None:
        assert isinstance(said, Proof), said
        assert {member["path"]: member["size"] for member in said.members} == {file.path: file.size for file in files}
        assert all("digest" in member and "to" in member for member in said.members)
        assert json.dumps(list(said.members))
        assert said.changed == ()


def test_sources_are_only_read(make: MakeBench) -> None:
    """Names, content and times stay as the instrument left them."""
    bench = make()
    files = some(bench)
    before = {path: (path.stat(), path.read_bytes()) for path in bench.source.rglob("*") if path.is_file()}
    done(bench, *files)[0].close()

    after = {path: (path.stat(), path.read_bytes()) for path in bench.source.rglob("*") if path.is_file()}
    assert {path: (s.st_mtime_ns, s.st_ctime_ns, c) for path, (s, c) in before.items()} == {
        path: (s.st_mtime_ns, s.st_ctime_ns, c) for path, (s, c) in after.items()
    }


# ---------------------------------------------------------------------- once


def test_identical_repetition_does_the_work_once(make: MakeBench) -> None:
    """Start again in this life, after the end, and in the next life: one execution, one copy."""
    bench = make()
    files = some(bench)
    action, request = bench.action(), bench.request(files)
    prepared = through_json(action.prepare(request)) if action.PREPARES else None
    action.start(request, prepared)
    progress = poll_to_end(action, request, through_json(action.start(request, prepared)))
    action.close()
    later = bench.action()
    handle = insist(lambda: later.start(request, prepared))
    progress_later = poll_to_end(later, request, through_json(handle))
    later.close()

    assert (progress.status, progress_later.status) == ("succeeded", "succeeded")
    assert bench.executions() in (1, None)
    assert bench.delivered() == expected(bench, files)


def test_find_before_the_start_knows_of_nothing(make: MakeBench) -> None:
    """None: surely not started."""
    bench = make()
    action, request = bench.action(), bench.request(some(bench))
    prepared = through_json(action.prepare(request)) if action.PREPARES else None

    assert insist(lambda: action.find(request, prepared)) is None
    assert bench.executions() in (0, None)
    action.close()


def test_a_lost_answer_is_found_or_repeated(make: MakeBench) -> None:
    """The daemon died between start and journal: find returns the handle, or the start is repeated safely."""
    bench = make(slow=True)
    files = (bench.write("a.mrc", os.urandom(LARGE_BYTES)),)
    request = bench.request(files)
    prepared = bench.elsewhere("start", request)()["prepared"]
    now = type(bench)(bench.base)
    action = now.action()
    handle = insist(lambda: action.find(request, prepared))
    if handle is None:
        handle = action.start(request, prepared)
    progress = poll_to_end(action, request, through_json(handle))
    action.close()

    assert progress.status == "succeeded", progress.why
    assert now.executions() in (1, None)
    assert now.delivered() == expected(now, files)


# ---------------------------------------------------------------------- other lives


def test_another_process_polls_to_the_end(make: MakeBench) -> None:
    """All that is left after a crash is the JSON of the handle."""
    bench = make(slow=True)
    files = (bench.write("a.mrc", os.urandom(LARGE_BYTES)), *some(bench))
    request = bench.request(files)
    handle = bench.elsewhere("start", request)()["handle"]
    told = bench.elsewhere("poll", request, handle)()

    assert told["status"] == "succeeded", told
    assert bench.executions() in (1, None)
    assert bench.delivered() == expected(bench, files)


def test_close_in_the_middle_loses_nothing(make: MakeBench) -> None:
    """The daemon stops in order; the next life brings the attempt to its end."""
    bench = make(slow=True)
    files = (bench.write("a.mrc", os.urandom(LARGE_BYTES)),)
    action, request, handle = begin(bench, *files)
    assert action.poll(request, handle).status == "active"
    action.close()
    now = type(bench)(bench.base)
    later = now.action()
    progress = poll_to_end(later, request, handle)
    later.close()

    assert progress.status == "succeeded", progress.why
    assert now.executions() in (1, None)
    assert now.delivered() == expected(now, files)


def test_close_leaves_nothing_running(make: MakeBench) -> None:
    """Neither threads nor processes of ours, in the middle of the work; supervisors of commands may go on."""
    threads, processes = set(threading.enumerate()), ours()
    bench = make(slow=True)
    action, _, _ = begin(bench, bench.write("a.mrc", os.urandom(LARGE_BYTES)))
    action.close()
    patience = time.monotonic() + PATIENCE_S
    while (ours() - processes or set(threading.enumerate()) - threads) and time.monotonic() < patience:
        time.sleep(0.02)

    assert ours() - processes == set()
    assert set(threading.enumerate()) - threads == set()


# ---------------------------------------------------------------------- what goes otherwise


@pytest.mark.parametrize("restarted", [False, True])
def test_cancel_leads_to_cancelled(make: MakeBench, restarted: bool) -> None:
    """Also in another life; and nothing partial stands under a final name."""
    bench = make(slow=True)
    files = (bench.write("a.mrc", os.urandom(LARGE_BYTES)), bench.write("b.mrc", os.urandom(LARGE_BYTES)))
    action, request, handle = begin(bench, *files)
    if restarted:
        action.close()
        action = bench.action()
    action.cancel(request, handle)
    progress = poll_to_end(action, request, handle)
    action.close()

    assert progress.status == "cancelled"
    whole = expected(bench, files)
    for path, content in bench.delivered().items():
        assert bench.is_temporary(path) or content == whole[path], f"{path} is partial under its final name"


@pytest.mark.parametrize("how", ["overwritten", "truncated", "removed"])
def test_a_spoiled_destination_is_not_proved(make: MakeBench, how: str) -> None:
    """Between the end and the verification: it differs, or no proof can be had."""
    bench = make()
    files = some(bench)
    action, request, handle, _ = done(bench, *files)
    if not action.VERIFIES or not bench.READS_AGAIN:
        action.close()
        return  # it promises no proof, or one of what was delivered, and the reference says so
    bench.spoil(files[0].path, how)
    said = action.verify(request, handle)
    action.close()

    assert isinstance(said, Differs | Unproven)
    if isinstance(said, Differs):
        assert files[0].path in said.which


def test_what_is_only_claimed_is_not_proved(make: MakeBench) -> None:
    """A provider that says success without having delivered is not believed."""
    bench = make()
    if not bench.lie():
        return  # it does the work itself
    files = (bench.write("a.mrc", b"frames"), bench.write("b.mrc", b"more frames"))
    action, request, handle, progress = done(bench, *files)
    said = action.verify(request, handle)
    action.close()

    assert progress.status == "succeeded"
    assert isinstance(said, Differs | Unproven)
    if isinstance(said, Differs):
        assert set(said.which) == {file.path for file in files} - set(bench.delivered())


def test_an_action_that_does_not_verify_gives_no_proof(make: MakeBench) -> None:
    """Asked all the same, it says so: never a proof, however well the attempt went."""
    bench = make()
    action, request, handle, _ = done(bench, bench.write("a.mrc", b"frames"))
    said = Unproven if action.VERIFIES else type(action.verify(request, handle))
    action.close()

    assert said is Unproven


def test_a_name_that_the_provider_cannot_be_told_is_refused(make: MakeBench) -> None:
    """Before anything is started, with words for a person; the other names of the batch go nowhere either."""
    bench = make()
    if bench.REFUSED is None:
        return
    action = bench.action()
    request = bench.request((bench.write("a.mrc", b"x"), bench.write(os.fsdecode(bench.REFUSED), b"x")))
    with pytest.raises(Refused) as refused:
        if action.PREPARES:
            action.prepare(request)
        else:
            action.start(request, None)
    action.close()

    assert refused.value.fault.kind == "person"
    assert refused.value.fault.hint
    assert (bench.executions(), bench.delivered()) in [(0, {}), (None, {})]


@pytest.mark.parametrize("how", ["rewritten", "gone"])
def test_a_member_that_changed_is_reported(make: MakeBench, how: str) -> None:
    """By poll or by verify; and never proved as the version of the manifest."""
    bench = make()
    files = (bench.write("a.mrc", b"old"), bench.write("b.mrc", b"stays"))
    (bench.source / "a.mrc").unlink()
    if how == "rewritten":
        bench.write("a.mrc", b"newer version")
    action, request, handle, progress = done(bench, *files)
    changed = set(progress.changed)
    if action.VERIFIES and progress.status == "succeeded":
        said = action.verify(request, handle)
        changed |= set(() if isinstance(said, Unproven) else said.changed)
        assert not isinstance(said, Proof) or "a.mrc" not in {member["path"] for member in said.members}
    action.close()

    assert changed == {"a.mrc"}


def test_what_is_forgotten_leaves_no_trace(make: MakeBench) -> None:
    """Once a run's end is journaled, its provider keeps nothing: the state directory cannot grow for ever."""
    bench = make()
    before = sorted(path for path in bench.state.rglob("*"))
    action, request, _, _ = done(bench, bench.write("a.mrc", b"x"))
    forget = getattr(action, "forget", None)
    if forget is not None:
        forget(request.run)
    action.close()

    left = [path for path in bench.state.rglob("*") if path not in before]
    assert not [path for path in left if str(request.run) in path.name.split("-")], left
