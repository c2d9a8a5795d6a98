"""Laws of the control file: orders are taken once and answered, and nobody who stands still delays the daemon."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trigger_daemon import control as control_module
from trigger_daemon.control import Control, ControlClient, Recreated
from trigger_daemon.core.model import Kept, Order
from trigger_daemon.database import alive
from trigger_daemon.errors import JournalError, NotRunning, TriggerError
from trigger_daemon.journal import Journal


class FakeClock:
    """Two clocks that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.wall = time.time()

    def monotonic(self) -> float:
        return self.now

    def utc(self) -> float:
        return self.wall

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """The daemon's journal, which holds the state directory's lock."""
    opened = Journal.open(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def told() -> list[Recreated]:
    return []


@pytest.fixture
def control(journal: Journal, clock: FakeClock, told: list[Recreated]) -> Iterator[Control]:
    opened = Control.open(journal.state_dir, clock, recreated=told.append)
    yield opened
    opened.close()


@pytest.fixture
def client(control: Control) -> ControlClient:
    return ControlClient(control.path.parent)


class Asking:
    """A command that gives an order, in a thread of its own."""

    def __init__(self, client: ControlClient, verb: str, timeout_s: float = 10.0, **args: Any) -> None:
        self.answer: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self._ask = lambda: client.ask(verb, args, "ana", "because", timeout_s)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._ask()
        except TriggerError as error:
            self.error = error

    def done(self) -> Asking:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self


def stopped_child(work: Callable[[], None]) -> int:
    """Fork a process that stops itself in `work`; return its pid once it stands still."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def stopped_writer(path: Path) -> int:
    """A command stopped by ^Z in the middle of writing an order."""

    def work() -> None:
        sql = sqlite3.connect(path, isolation_level=None)
        sql.execute("BEGIN IMMEDIATE")
        sql.execute("INSERT INTO orders (verb, args, who, why, asked_time) VALUES ('pause', '{}', '', '', 0)")
        os.kill(os.getpid(), signal.SIGSTOP)
        sql.execute("COMMIT")
        sql.close()

    return stopped_child(work)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ------------------------------------------------------------------ orders, answers


def test_an_order_reaches_the_daemon_once_and_its_answer_the_asker(
    control: Control, client: ControlClient, clock: FakeClock, wait_until: Callable[..., Any]
) -> None:
    """What was asked arrives as it was asked, with our own monotonic instant, and is not taken again."""
    asking = Asking(client, "explain", path="/data/\udcff.tif")

    (order,) = wait_until(control.take)
    assert order == Order(order.id, "explain", {"path": "/data/\udcff.tif"}, "ana", "because", clock.now)
    assert control.take() == []
    control.answer(order.id, {"ok": True, "stage": "settling \udcff"})
    assert control.flush()
    assert asking.done().answer == {"ok": True, "stage": "settling \udcff"}


def test_a_look_for_news_tells_new_orders_from_none(control: Control, client: ControlClient) -> None:
    """`changed` is true when something was asked, and stays true until it was taken."""
    control.take()
    quiet = control.changed()
    asking = Asking(client, "pause", timeout_s=10)
    deadline = time.monotonic() + 10
    while not control.changed() and time.monotonic() < deadline:
        pass

    assert not quiet and control.changed() and control.changed()
    (order,) = control.take()
    control.answer(order.id, {"ok": True})
    control.flush()
    asking.done()
    control.changed()
    control.take()
    assert not control.changed()


def test_the_serving_thread_answers_within_a_second(
    journal: Journal, client: ControlClient, wait_until: Callable[..., Any]
) -> None:
    """Orders, answers and the heartbeat go through `serve`, with the machine's own clock."""
    control = Control.open(journal.state_dir)
    stop = threading.Event()
    control.show({"settling": 3})
    serving = threading.Thread(
        target=control.serve, args=(lambda order: control.answer(order.id, {"verb": order.verb}), stop)
    )
    serving.start()
    try:
        begun = time.monotonic()
        answers = [client.ask(verb, {}, "ana") for verb in ("pause", "resume")]
        took = time.monotonic() - begun
        beat = wait_until(client.heartbeat)
    finally:
        control.show({"settling": 0})
        stop.set()
        serving.join()
        control.close()

    last = client.heartbeat()
    assert answers == [{"verb": "pause"}, {"verb": "resume"}] and took < 2.0
    assert beat["settling"] == 3 and abs(beat["time"] - time.time()) < 60
    assert last is not None and last["settling"] == 0, "the last word before the end is written"


def test_without_a_daemon_an_order_is_refused_at_once(tmp_path: Path) -> None:
    """A command says that the daemon is not running, and leaves no order for a later one."""
    journal = Journal.open(tmp_path / "state")
    Control.open(journal.state_dir).close()
    client = ControlClient(tmp_path / "state")
    assert client.alive() and client.pid() == os.getpid()
    journal.close()

    with pytest.raises(NotRunning, match="no daemon holds") as refused:
        client.ask("pause", {}, "ana")

    assert "systemctl start" in refused.value.hint
    assert not client.alive() and client.pid() is None
    assert not ControlClient(tmp_path / "nowhere").alive() and ControlClient(tmp_path / "nowhere").heartbeat() is None


def test_an_order_nobody_took_is_withdrawn(control: Control, client: ControlClient) -> None:
    """After the time limit the asker is told that nothing was done, and it is true."""
    with pytest.raises(NotRunning, match="withdrawn, nothing was done"):
        client.ask("cancel", {"run": 1}, "ana", timeout_s=0.1)

    assert control.take() == []


def test_an_order_taken_but_not_answered_may_still_be_carried_out(
    control: Control, client: ControlClient, wait_until: Callable[..., Any]
) -> None:
    """The asker is told so, not that it failed."""
    asking = Asking(client, "cancel", timeout_s=1.0)
    wait_until(control.take)

    assert "may still be carried out" in str(asking.done().error)


def test_what_an_earlier_daemon_left_is_refused_not_repeated(
    journal: Journal, control: Control, clock: FakeClock
) -> None:
    """An order taken before a crash may have been done; an old one has nobody waiting. A fresh one is served."""
    with sqlite3.connect(control.path) as sql:
        for verb, age_s, taken in (("taken", 1, 1), ("old", 3_600, 0), ("fresh", 1, 0)):
            sql.execute(
                "INSERT INTO orders (verb, args, who, why, asked_time, taken) VALUES (?, '{}', '', '', ?, ?)",
                (verb, clock.wall - age_s, taken),
            )
    control.close()

    again = Control.open(journal.state_dir, clock)
    orders = again.take()
    again.close()
    answers = dict(sql.execute("SELECT verb, answer FROM orders").fetchall())
    sql.close()

    assert [order.verb for order in orders] == ["fresh"]
    assert "stopped before it answered" in answers["taken"] and "not running when" in answers["old"]


def test_the_file_is_bounded(control: Control, client: ControlClient, clock: FakeClock) -> None:
    """Answered orders are kept to a number, unanswered ones to a day, waiting ones to a number, each to a size."""
    limit = control_module.ANSWERED_KEPT
    with sqlite3.connect(control.path) as sql:
        rows = [(clock.wall, clock.wall)] * (limit + 50)
        sql.executemany(
            "INSERT INTO orders (verb, args, who, why, asked_time, taken, answer, answered_time)"
            " VALUES ('x', '{}', '', '', ?, 1, '{}', ?)",
            rows,
        )
        waiting = [(clock.wall - 2 * control_module.ORDER_LIVES_S,), *[(clock.wall,)] * control_module.WAITING_MAX]
        sql.executemany("INSERT INTO orders (verb, args, who, why, asked_time) VALUES ('y', '{}', '', '', ?)", waiting)

    with pytest.raises(TriggerError, match="orders wait already"):
        client.ask("pause", {}, "ana")
    with pytest.raises(TriggerError, match="too large"):
        client.ask("pause", {"paths": "x" * control_module.ORDER_BYTES_MAX}, "ana")
    taken = control.take()
    control.answer(taken[0].id, {"ok": True})
    control.flush()

    assert len(taken) == control_module.TAKE_MAX and control.changed()
    total, answered = sql.execute("SELECT count(*), count(answered_time) FROM orders").fetchone()
    sql.close()
    assert answered == limit and total == limit + control_module.WAITING_MAX - 1


def test_an_order_that_is_no_json_object_is_answered_and_stops_nobody(control: Control) -> None:
    """Somebody with sqlite3 in hand cannot stop the orders of others."""
    with sqlite3.connect(control.path) as sql:
        for args in ("{", "7", '{"a": 1}'):
            sql.execute(
                "INSERT INTO orders (verb, args, who, why, asked_time) VALUES ('x', ?, '', '', ?)", (args, time.time())
            )

    orders = control.take()

    (refused,) = sql.execute("SELECT count(*) FROM orders WHERE answer LIKE '%not a JSON object%'").fetchone()
    sql.close()
    assert [order.args for order in orders] == [{"a": 1}] and refused == 2


# ------------------------------------------------------------------- standing still


def test_a_command_stopped_in_mid_write_delays_neither_journal_nor_loop(
    journal: Journal, control: Control, wait_until: Callable[..., Any]
) -> None:
    """While it holds the file, commits go on, `answer` returns at once, and nothing is lost when it lets go."""
    with sqlite3.connect(control.path) as sql:
        sql.execute("INSERT INTO orders (verb, args, who, why, asked_time) VALUES ('x', '{}', '', '', ?)", (1e12,))
    (order,) = control.take()
    pid = stopped_writer(control.path)
    try:
        begun = time.monotonic()
        for number in range(20):
            journal.append([Kept("k", number)])
            control.answer(order.id, {"number": number})
        took = time.monotonic() - begun
        locked = (control.beat({}), control.take(), control.flush())
    finally:
        end(pid)

    assert locked == (False, [], False)
    assert took < 5.0
    assert wait_until(control.flush) and control.beat({})
    answer = sql.execute("SELECT answer FROM orders WHERE id = ?", (order.id,)).fetchone()
    sql.close()
    assert answer == ('{"number":19}',)


def test_a_file_kept_locked_for_long_is_replaced_and_says_so(
    control: Control, client: ControlClient, clock: FakeClock, told: list[Recreated], wait_until: Callable[..., Any]
) -> None:
    """One stopped command does not leave everybody without orders; when it goes on it harms the new file not."""
    pid = stopped_writer(control.path)
    control.beat({})
    clock.move(control_module.LOCKED_MAX_S + 1)
    control.beat({})

    assert [recreated.why for recreated in told] == ["another program has kept it locked for 31 s"]
    assert control.beat({"n": 1})
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)
    asking = Asking(client, "pause")
    (order,) = wait_until(control.take)
    control.answer(order.id, {"ok": True})
    assert control.flush() and asking.done().answer == {"ok": True}
    beat = client.heartbeat()
    assert beat is not None and beat["n"] == 1


def test_a_reader_that_stands_still_delays_nothing_and_bounds_the_file(
    control: Control, client: ControlClient, told: list[Recreated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats go on beside it; before they fill the disk the file is made anew."""
    monkeypatch.setattr(control_module, "WAL_MAX_BYTES", 8 << 20)
    control.beat({})

    def read() -> None:
        sql = sqlite3.connect(control.path, isolation_level=None)
        sql.execute("BEGIN")
        sql.execute("SELECT * FROM heartbeat").fetchall()
        os.kill(os.getpid(), signal.SIGSTOP)

    pid = stopped_child(read)
    try:
        beaten = [control.beat({"settling": "x" * 500_000, "number": number}) for number in range(20)]
    finally:
        end(pid)
    beat = client.heartbeat()

    assert all(beaten) and len(told) == 1 and "grow" in told[0].why
    assert beat is not None and beat["number"] == 19


@pytest.mark.parametrize("content", [b"", b"no database " * 1000])
def test_a_damaged_file_is_made_anew_and_says_so(
    journal: Journal, content: bytes, told: list[Recreated], clock: FakeClock
) -> None:
    """It holds nothing durable, so nobody need be asked."""
    path = journal.state_dir / "control.db"
    path.write_bytes(content)

    control = Control.open(journal.state_dir, clock, recreated=told.append)

    assert control.beat({"n": 1}) and "damaged" in told[0].why
    control.close()


def test_a_file_damaged_while_in_use_is_made_anew(
    control: Control, client: ControlClient, told: list[Recreated]
) -> None:
    """A file that somebody overwrote does not end the control thread."""
    control.beat({"n": 1})
    sql = sqlite3.connect(control.path, isolation_level=None)
    sql.execute("DROP TABLE heartbeat")
    sql.close()

    control.beat({"n": 2})
    control.beat({"n": 3})
    beat = client.heartbeat()

    assert len(told) == 1 and "heartbeat" in told[0].why
    assert beat is not None and beat["n"] == 3


def test_a_deleted_file_is_made_anew(control: Control, client: ControlClient) -> None:
    """`rm control.db` under a running daemon: it is made anew at the next heartbeat."""
    control.beat({"n": 1})
    control.path.unlink()

    control.beat({"n": 2})
    control.beat({"n": 3})
    beat = client.heartbeat()

    assert beat is not None and beat["n"] == 3


# ---------------------------------------------------------------------- permissions


def test_the_file_is_for_the_group_whatever_the_umask(journal: Journal) -> None:
    """Operators write their orders; others do not even read."""
    before = os.umask(0o077)
    try:
        control = Control.open(journal.state_dir)
        control.beat({})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in journal.state_dir.glob("control.db*")}
        control.close()
    finally:
        os.umask(before)

    assert modes == dict.fromkeys(("control.db", "control.db-wal", "control.db-shm"), 0o660)


def test_one_outside_the_group_is_told_which_group(tmp_path: Path) -> None:
    """Neither the heartbeat nor an order: an error that names the group."""
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        journal = Journal.open(Path(place) / "state")
        Control.open(journal.state_dir).close()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                client = ControlClient(Path(place) / "state")
                for ask in (client.heartbeat, client.alive, lambda: client.ask("pause", {}, "ana")):
                    with pytest.raises(JournalError, match="no permission") as refused:
                        ask()
                    assert "group root" in refused.value.hint
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert alive(journal.state_dir)
        journal.close()

    assert code == 0
