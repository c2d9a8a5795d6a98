"""Laws of limited storage: the reserve is never promised away, states have hysteresis, each episode is told once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lab import Lab, rule
from trigger_daemon.core import model
from trigger_daemon.core.alarms import Alarms
from trigger_daemon.core.model import RECORDS_BYTES, RunState
from trigger_daemon.core.rules import Batch, Reclaim
from trigger_daemon.core.storage import STALE_S, Amount, Condition, Limits, Storage

GB, MIB = 10**9, 2**20
OUT = Limits("/out", reserve=Amount(bytes=10 * GB), low=Amount(ratio=0.2), enough=Amount(ratio=0.3),
             critical=Amount(ratio=0.05), on_critical=("/bin/pause",))  # fmt: skip
MOUNTS = {"/": "", "/out": "/out", "/data": "/data"}


def storage(*limits: Limits, conditions: tuple[Condition, ...] = (), bandwidth: int | None = None) -> Storage:
    out: list[model.Effect] = []
    made = Storage(limits, conditions, bandwidth, out=out, alarms=Alarms(out, lambda at: at))
    made.mounts(MOUNTS)
    made.seen = out  # type: ignore[attr-defined]
    return made




def gauged(free: float, at: float, *, total: float = 1_000 * GB, volume: str = "/out", **more: Any) -> model.Gauged:
    return model.Gauged(volume, int(free), int(total), at, **more)


def states(made: Storage, *free: float, step_s: float = 10.0, start: float = 0.0) -> list[str]:
    found = []
    for number, each in enumerate(free):
        made.gauged(gauged(each, start + number * step_s))
        found.append(made.volumes["/out"].state)
    return found


# ------------------------------------------------------------------------- states


def test_states_have_hysteresis():
    """Low ends at `enough`; critical ends a quarter of the way up to `low`; one file more changes nothing."""
    seen = states(storage(OUT), *(n * GB for n in (210, 199, 201, 299, 300, 199, 49, 51, 86, 88, 299, 301)))

    assert seen == [
        "ok", "low", "low", "low", "ok", "low", "critical", "critical", "critical", "low", "low", "ok",
    ]  # fmt: skip


def test_inodes_count_too():
    """A volume without inodes is full, whatever its bytes say."""
    made = storage(OUT)
    made.gauged(gauged(900 * GB, 0, inodes=1_000, free_inodes=40))
    assert made.volumes["/out"].state == "low"
    made.gauged(gauged(900 * GB, 10, inodes=1_000, free_inodes=9))

    assert made.volumes["/out"].state == "critical"


def test_an_episode_is_told_and_acted_on_once():
    """`on_critical` runs when it begins; the alarm goes when it ends; the next one is another."""
    made = storage(OUT)
    states(made, *(n * GB for n in (40, 39, 60, 300, 40)), step_s=10.0)
    effects = made.seen  # type: ignore[attr-defined]

    assert [effect.argv for effect in effects if isinstance(effect, model.OnCritical)] == [("/bin/pause",)] * 2
    raised = [effect.key for effect in effects if isinstance(effect, model.AlarmRaised)]
    assert raised.count("storage:/out:critical") == 2
    assert "storage:/out:critical" in [e.key for e in effects if isinstance(e, model.AlarmCleared)]


def test_an_episode_is_repeated_in_the_log_at_a_bounded_rate():
    """Six hours of it are not thousands of lines."""
    made = storage(OUT)
    states(made, *[40 * GB] * 2_160, step_s=10.0)
    lines = [e for e in made.seen if isinstance(e, model.Log)]  # type: ignore[attr-defined]

    assert len(lines) == 36


def test_space_is_wanted_while_it_is_low():
    """As much as is missing to `enough`, and nothing before it is low, nor when it is enough."""
    made = storage(OUT)
    wanted = []
    for number, free in enumerate((310, 250, 190, 200, 299, 310, 250)):
        states(made, free * GB, start=40.0 * number)
        wanted.append(made.wanted("/out") // GB)

    assert wanted == [0, 0, 110, 100, 1, 0, 0]
    assert made.wanted("/elsewhere") == 0


def alarms(made: Storage) -> dict[str, str]:
    return {key: alarm.what for key, alarm in made._alarms.open.items()}


def test_an_alarm_holds_no_figure_that_ages():
    """Its words are written anew at most once a minute, and stand beside fresh figures: they name limits only."""
    made = storage(OUT)
    states(made, *(n * GB for n in (40, 39, 38)), step_s=2.0)

    assert alarms(made) == {
        "storage:/out": "/out is low: free space fell below 200 GB of 1.0 TB, and it is low until 300 GB are free",
        "storage:/out:critical":
            "/out is critical: free space fell below 50 GB of 1.0 TB; nothing of ours writes there",
    }  # fmt: skip
    assert made.refuses(made.needs(["/out/x"], 1), 6.0) == "storage: /out is critical"
    made.gauged(gauged(900 * GB, 8.0, inodes=1_000, free_inodes=9))
    assert alarms(made)["storage:/out:critical"] == (
        "/out is critical: less than 1% of its 1,000 inodes are free; nothing of ours writes there"
    )


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"reserve": Amount(bytes=400 * GB)},
         "the `reserve` of /out, 400 GB, is more than the disk holds, 284 MB: nothing of ours is ever written there"),
        ({"low": Amount(bytes=400 * GB)},
         "the `low` of /out, 400 GB, is more than the disk holds, 284 MB: it is always low"),
        ({"low": Amount(bytes=200 * 10**6), "enough": Amount(ratio=0.01)},
         "`low` of /out, 200 MB, is more than `enough`, 1 % (2.8 MB): `enough` changes nothing"),
        ({"low": Amount(bytes=5 * 10**6)},
         "`critical` of /out, 5 % (14 MB), is more than `low`, 5.0 MB: all of ours stops there before it is low"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_on_a_disk_of_this_size_is_told(limits: dict[str, Amount], words: str) -> None:
    """At the first reading, which tells how large it is; until the settings, or the disk, are others."""
    made = storage(Limits("/out", **limits))
    made.gauged(gauged(264 * 10**6, 1.0, total=284 * 10**6))
    assert alarms(made)["storage:/out:limits"] == words
    made.use_settings([Limits("/out")], (), None)
    made.gauged(gauged(264 * 10**6, 3.0, total=284 * 10**6))

    assert "storage:/out:limits" not in alarms(made)


# ---------------------------------------------------------------------- admission


def test_a_path_belongs_to_the_volume_that_is_mounted_there():
    """The longest mount point decides; what is mounted below is another one."""
    made = storage(OUT)
    made.mounts({"/": "", "/out": "/out", "/out/usb": "", "/srv/out": "/out"})

    assert made.volume_of("/out/a/b") == "/out"
    assert made.volume_of("/out/usb/b") == ""
    assert made.volume_of("/srv/out/x") == "/out"
    assert made.volume_of("/outside") == ""


def test_the_larger_reserve_holds_where_a_file_system_is_named_twice():
    """The second path counted for nothing, in silence; now it is told, and what it keeps free is kept."""
    inside = Limits("/out/in", reserve=Amount(bytes=400 * GB))
    made = storage(OUT, inside)
    made.gauged(gauged(600 * GB, 1.0))
    made.gauged(gauged(600 * GB, 1.0, volume="/out/in"))
    needs = made.needs(["/out/in/x"], 250 * GB)
    (told,) = [e.what for e in made.seen if isinstance(e, model.AlarmRaised)]  # type: ignore[attr-defined]

    assert "above its reserve" in made.refuses(needs, 1.0)
    assert made.impossible(needs) == "" and made.reserve("/out/x") == 400 * GB
    assert "600 GB beside its reserve even when empty" in made.impossible(made.needs(["/out/in/x"], 700 * GB))
    assert made.reserves({"8:1": "/out"}) == {"8:1": Amount(bytes=400 * GB)}
    assert told.startswith("/out/in is on the file system of /out, which `volumes` names, too")
    made.mounts(MOUNTS | {"/out/in": "/out/in"})
    made.gauged(gauged(600 * GB, 2.0, volume="/out/in"))
    assert made.reserve("/out/x") == 10 * GB
    assert [e.key for e in made.seen if isinstance(e, model.AlarmCleared)] == [  # type: ignore[attr-defined]
        "storage:/out/in:limits"
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_reserve_is_never_promised_away(seed: int) -> None:
    """Whatever begins, writes, ends and is read when: what all running ones may still write fits above the reserve.

    The oracle knows the true free space; readings and reports are late. 500 histories for each seed.
    """
    dice = random.Random(seed)
    for _ in range(500):
        _history(dice)


def _history(dice: random.Random) -> None:
    reserve = dice.randrange(0, 40) * MIB
    made = storage(Limits("/out", reserve=Amount(bytes=reserve), low=Amount(bytes=0), critical=Amount(bytes=0)))
    total = 200 * MIB
    free = dice.randrange(60, 201) * MIB
    running: dict[int, list[int]] = {}  # run -> what it writes in all, what it has written
    reading: tuple[int, float] | None = None
    now = 0.0
    for number in range(60):
        now += 1.0
        match dice.randrange(7):
            case 0:
                reading = (free, now)
            case 1 if reading is not None:  # a reading arrives late
                made.gauged(model.Gauged("/out", reading[0], total, reading[1]))
                reading = None
            case 2:
                need = dice.randrange(0, 80) * MIB
                needs = made.needs(["/out/x"], need)
                if not made.refuses(needs, now):
                    made.hold(number, needs, needs)
                    running[number] = [need, 0]
            case 3 if running:  # one writes, and says so, or not yet
                run = dice.choice(list(running))
                more = dice.randrange(0, (running[run][0] - running[run][1]) // MIB + 1) * MIB
                free -= more
                running[run][1] += more
                if dice.random() < 0.5:
                    made.wrote(run, running[run][1], now)
            case 4 if running:
                run = dice.choice(list(running))
                del running[run]
                made.release(run, now)
            case 5 if running:  # its attempt fails; the next one goes on where it was, and says so late
                run = dice.choice(list(running))
                need, done = running.pop(run)
                made.wrote(run, done, now)
                made.release(run, now)
                left = made.needs(["/out/x"], need - done)
                if not made.refuses(left, now):
                    made.hold(run, left, made.needs(["/out/x"], need))
                    made.wrote(run, 0, now)
                    running[run] = [need, done]
            case 6 if dice.random() < 0.3:
                free = min(total, free + dice.randrange(0, 30) * MIB)  # something was removed
        left = sum(need - done for need, done in running.values())
        if running:
            assert free - left >= reserve, f"{free} free, {left} still to come, {reserve} reserved"


def test_a_reading_that_is_old_admits_nothing():
    """A dead mount, or a gauge that hangs: free space is not known."""
    made = storage(OUT)
    made.gauged(gauged(500 * GB, 0))
    needs = made.needs(["/out/x"], GB)
    assert made.refuses(needs, STALE_S - 1) == ""

    assert "not known" in made.refuses(needs, STALE_S + 1)


def test_a_volume_that_is_away_admits_nothing_at_once_and_stops_what_writes_there():
    """Its last reading, a second old, tells nothing any more; with the next one all goes on."""
    made = storage(OUT)
    made.gauged(gauged(900 * GB, 0.0))
    needs = made.needs(["/out/x"], 1)
    assert made.refuses(needs, 1.0) == ""

    assert made.gauged(model.Gauged("/out", 0, 0, 2.0, error="/out is not mounted", away="mount it"))
    assert made.refuses(needs, 2.0) == "storage: /out is away: /out is not mounted"
    assert alarms(made) == {
        "storage:/out:unread": "/out is away: /out is not mounted; nothing of ours writes there",
    }  # fmt: skip
    assert made._told.stopped == {"/out": "/out is away"}
    assert not made.gauged(model.Gauged("/out", 0, 0, 4.0, error="/out is not mounted", away="mount it"))

    assert made.gauged(gauged(900 * GB, 6.0))
    assert (made.refuses(needs, 6.0), alarms(made), made._told.stopped) == ("", {}, {})


def test_a_volume_that_cannot_be_read_is_told():
    """A path that is not there would keep all that is written on its disk waiting, in silence."""
    made = storage(OUT)
    made.gauged(model.Gauged("/out", 0, 0, 1.0, error="No such file or directory"))
    made.gauged(model.Gauged("/out", 0, 0, 3.0, error="No such file or directory"))
    raised = [e.what for e in made.seen if isinstance(e, model.AlarmRaised)]  # type: ignore[attr-defined]
    assert raised == ["free space of /out cannot be read: No such file or directory"]
    made.gauged(gauged(500 * GB, 5.0))

    assert [e.key for e in made.seen if isinstance(e, model.AlarmCleared)] == [  # type: ignore[attr-defined]
        "storage:/out:unread"
    ]


# ----------------------------------------------------------------------------- runs


def closed(lab: Lab, name: str, size: int) -> None:
    lab.write(name, size)
    lab.run_for(31)


def reading(lab: Lab, free: float, volume: str = "/out") -> None:
    lab.step(gauged(free, lab.at, volume=volume))


def starts(lab: Lab) -> list[int]:
    return [effect.run for effect in lab.asked if isinstance(effect, model.Start)]


def lab_of(*rules: Any, limits: tuple[Limits, ...] = (OUT,), **keys: Any) -> Lab:
    lab = Lab(*rules, auto=False, limits=limits, **keys)
    lab.step(model.Mounted(MOUNTS, lab.at))
    return lab


def test_a_run_waits_for_space_and_goes_when_there_is_some():
    """PENDING, with words that say how much is missing; later runs of its rule do not overtake it."""
    lab = lab_of(rule())
    closed(lab, "a.tif", 495 * GB)
    closed(lab, "b.tif", 1 * GB)
    reading(lab, 500 * GB)
    assert starts(lab) == []
    waits = lab.engine.runs.waiting_for(lab.engine.runs.open[1])
    assert waits == "storage: 495 GB are needed on /out, 490 GB lie above its reserve"
    reading(lab, 506 * GB + RECORDS_BYTES - 1)
    assert starts(lab) == [1]
    reading(lab, 506 * GB + RECORDS_BYTES)

    assert starts(lab) == [1, 2]


def test_two_runs_are_not_promised_the_same_bytes():
    """The second waits until the first has ended and a later reading shows what it left."""
    lab = lab_of(rule())
    reading(lab, 30 * GB + 60 * GB)
    closed(lab, "a.tif", 50 * GB)
    closed(lab, "b.tif", 50 * GB)
    assert starts(lab) == [1]
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at))
    assert starts(lab) == [1]
    lab.run_for(1)
    reading(lab, 90 * GB - 50 * GB)
    assert starts(lab) == [1]
    reading(lab, 90 * GB)

    assert starts(lab) == [1, 2]


def test_what_can_never_fit_is_held():
    """No waiting mends it."""
    lab = lab_of(rule())
    reading(lab, 900 * GB)
    closed(lab, "a.tif", 995 * GB)

    assert lab.ledger.states[1] == RunState.HELD
    assert "even when empty" in lab.engine.runs.open[1].error


def test_a_reserve_that_is_larger_than_the_disk_is_told_as_one():
    """No room below nothing."""
    made = storage(Limits("/out", reserve=Amount(bytes=400 * GB)))
    made.gauged(gauged(264 * 10**6, 1.0, total=284 * 10**6))

    assert made.impossible(made.needs(["/out/x"], 5 * 10**6)) == (
        "it needs 5.0 MB on /out, where the reserve, 400 GB, is all the disk holds, 284 MB, or more"
    )


def test_a_retry_asks_only_for_what_is_left():
    """What the last attempt has written lies there, and is in the gauge; to begin anew frees nothing."""
    lab = lab_of(rule(batch=Batch(files=1)), limits=(replace(OUT, critical=Amount(bytes=0)),))
    reading(lab, 110 * GB)
    closed(lab, "a.tif", 90 * GB)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "failed", lab.at, bytes_done=80 * GB, fault=model.Fault("transient", "EIO")))
    lab.run_for(1)
    reading(lab, 30 * GB)
    lab.run_for(60)
    reading(lab, 30 * GB)
    assert starts(lab) == [1, 1]
    closed(lab, "b.tif", 9 * GB)
    lab.step(model.Started(1, 2, "h", lab.at))
    lab.step(model.Polled(1, 2, "active", lab.at, bytes_done=0))
    lab.run_for(1)
    reading(lab, 30 * GB)
    assert starts(lab) == [1, 1, 2]
    assert lab.engine.storage.room("/out") == 20 * GB - 10 * GB - 9 * GB - RECORDS_BYTES
    lab.step(model.Polled(1, 2, "active", lab.at, bytes_done=85 * GB))
    lab.run_for(1)
    reading(lab, 25 * GB)

    assert lab.engine.storage.room("/out") == 15 * GB - 5 * GB - 9 * GB - RECORDS_BYTES


def test_a_copy_that_differs_is_written_again_and_needs_all_its_bytes():
    """The one that is there stays until the next takes its name."""
    lab = lab_of(rule(batch=Batch(files=1)))
    reading(lab, 190 * GB)
    closed(lab, "a.tif", 90 * GB)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.step(model.Polled(1, 1, "succeeded", lab.at, bytes_done=90 * GB))
    lab.step(model.Mismatch(1, 1, {"a.tif": "another digest"}, lab.at))
    lab.run_for(60)
    reading(lab, 110 * GB - 20 * GB)

    assert starts(lab) == [1]
    assert "90 GB are needed" in lab.engine.runs.waiting_for(lab.engine.runs.open[1])


def test_at_critical_nothing_writes_there_and_all_else_goes_on():
    """Other destinations are not concerned; what is under way is stopped where it stands."""
    here, there = rule("here", 1, options={"to": "/out/x"}), rule("there", 2, options={"to": "/elsewhere"})
    lab = lab_of(here, there)
    reading(lab, 40 * GB)
    closed(lab, "a.tif", 1)
    assert [lab.engine.runs.open[run].rule for run in starts(lab)] == ["there"]
    told = [effect for effect in lab.effects if isinstance(effect, model.Throttled)]
    assert list(told[-1].stopped) == ["/out"]
    reading(lab, 400 * GB)

    assert {lab.engine.runs.open[run].rule for run in starts(lab)} == {"here", "there"}
    assert [effect for effect in lab.effects if isinstance(effect, model.Throttled)][-1].stopped == {}


def test_what_frees_a_low_volume_goes_first_and_what_fills_it_last():
    """Whatever their priorities are."""
    data = Limits("/data", low=Amount(ratio=0.2))
    archive = rule("archive", 1, options={"to": "/elsewhere"}, reclaim=Reclaim(proven_by=("archive",)))
    local = rule("local", 2, options={"to": "/data-copy"}, priority=9)
    other = rule("other", 3, options={"to": "/third"}, priority=5)
    for free, order in ((150, ["archive", "other", "local"]), (900, ["local", "other", "archive"])):
        lab = lab_of(archive, local, other, limits=(data, OUT))
        lab.step(model.Mounted({"/": "", "/data": "/data", "/data-copy": "/data"}, lab.at))
        lab.step(gauged(free * GB, lab.at, volume="/data"))
        lab.engine.runs.runs_max = 0
        closed(lab, "a.tif", 1)
        lab.step(gauged(free * GB, lab.at, volume="/data"))
        lab.engine.runs.runs_max = 3
        lab.engine.runs.dirty = True
        lab.run_for(1)

        assert [lab.engine.runs.open[run].rule for run in starts(lab)] == order


def test_nothing_starts_while_the_instrument_needs_the_machine():
    """A process that was named, or a load; what waits says so, and goes when it is over."""
    serial = Condition("process", "SerialEM")
    lab = lab_of(rule(), conditions=(serial, Condition("cpu_above", 0.8)), limits=())
    lab.step(model.Pressed(0.1, None, ("SerialEM",), lab.at))
    closed(lab, "a.tif", 1)
    assert starts(lab) == []
    assert lab.engine.runs.waiting_for(lab.engine.runs.open[1]) == "the instrument: SerialEM is running"
    lab.step(model.Pressed(0.9, None, (), lab.at))
    assert starts(lab) == []
    lab.run_for(20)
    lab.step(model.Pressed(0.7, None, (), lab.at))
    assert starts(lab) == [], "it ends below a part of what began it"
    lab.step(model.Pressed(0.5, None, (), lab.at))
    lab.run_for(6)
    lab.step(model.Pressed(0.5, None, (), lab.at))

    assert starts(lab) == [1]


SERIAL = Condition("process", "SerialEM")
CPU = Condition("cpu_above", 0.8)


def beside(
    condition: Condition, met: Callable[[float, bool], bool], minutes: int = 10
) -> tuple[Lab, list[float], float]:
    """Let two runs be at work while a condition is met or not, each second.

    `met(second, whether ours stands still)`. As the daemon does, of a program only what is new is told.
    Returns also when all began to stand still, and for which share of the time it did not.
    """
    lab = lab_of(rule(), conditions=(condition,), limits=())
    closed(lab, "a.tif", 1)
    closed(lab, "b.tif", 1)
    assert starts(lab) == [1, 2]
    pauses, began, last, written, worked = [], lab.at, None, len(records(lab)), 0
    for second in range(60 * minutes):
        lab.run_until(began + second)
        still = bool(lab.engine.storage.instrument)
        now = met(second, still)
        if condition.kind != "process" or now != last:
            lab.step(model.Pressed(0.9 if now else 0.1, None, ("SerialEM",) if now else (), lab.at))
        last = now
        if lab.engine.storage.instrument and not still:
            pauses.append(lab.at)
        lab.run_for(0.75)
        worked += not lab.engine.storage.instrument
    assert len(records(lab)) == written, "nothing of it is worth a row of the journal"
    return lab, pauses, worked / (60 * minutes)


def records(lab: Lab) -> list[model.Effect]:
    return [effect for effect in lab.effects if isinstance(effect, model.RECORDS)]


def flips(lab: Lab) -> list[bool]:
    """Return of each change that was told whether it is one of many."""
    return [effect.often for effect in lab.effects if isinstance(effect, model.Throttled)]


def in_a_minute(instants: Sequence[float]) -> int:
    return max(sum(at <= other < at + 60.0 for other in instants) for at in instants)


ON_AND_OFF = {
    "a second each": (SERIAL, lambda second, still: second % 2 == 0),
    "now and then": (SERIAL, lambda second, still: second % 7 == 0),
    "by chance": (SERIAL, lambda second, still: random.Random(int(second)).random() < 0.3),
    "a load by chance": (CPU, lambda second, still: random.Random(int(second)).random() < 0.1),
    "a load that is ours": (CPU, lambda second, still: not still),
}


@pytest.mark.parametrize("how", ON_AND_OFF)
def test_what_comes_and_goes_does_not_stop_and_start_all_of_ours_each_time(how: str) -> None:
    """A few times in a minute, told in few lines; and work goes on in between, or it would stand still for ever."""
    lab, pauses, worked = beside(*ON_AND_OFF[how])
    warned = [e for e in lab.effects if isinstance(e, model.Log) and e.event == "work.throttled_often"]

    assert 2 <= in_a_minute(pauses) <= 7 and in_a_minute(pauses[10:]) <= 6
    assert worked > 0.05
    assert (len(warned), len(flips(lab)) - sum(flips(lab))) == (1, 4), "of the others each would be a line"


def test_what_comes_and_goes_is_called_so() -> None:
    """In the same words whether it is there at that very second, or not."""
    lab, *_ = beside(*ON_AND_OFF["a second each"], minutes=1)
    words = set()
    for second in range(30):
        lab.run_for(1)
        lab.step(model.Pressed(0.1, None, ("SerialEM",) if second % 2 else (), lab.at))
        words.add(lab.engine.storage.instrument)

    assert words == {"", "SerialEM is running (on and off: for 10 s at least each time)"}


def test_after_a_calm_minute_a_pause_ends_at_once_again() -> None:
    """What it did before is forgiven: the next end of the program is an end."""
    lab, *_ = beside(*ON_AND_OFF["a second each"], minutes=2)
    still = []
    for present in ((), ("SerialEM",), ()):
        lab.step(model.Pressed(0.1, None, present, lab.at))
        lab.run_for(75 if not still else 1)
        still.append(bool(lab.engine.storage.instrument))

    assert still == [False, True, False]
    assert flips(lab)[-2:] == [False, False]


def test_a_program_that_ended_is_not_waited_for_longer_than_that() -> None:
    """No reading comes any more that would end it: the core's own clock does."""
    lab, *_ = beside(SERIAL, lambda second, still: second in (0, 2, 4, 12, 14), minutes=1)

    assert lab.engine.storage.instrument == ""
    changes = [effect.paused for effect in lab.effects if isinstance(effect, model.Throttled)]
    assert [bool(paused) for paused in changes] == [True, False] * (len(changes) // 2)


def test_the_narrowest_bandwidth_holds():
    """Of the settings, and of each condition that is met."""
    made = storage(conditions=(Condition("process", "acquire", 5), Condition("io_pressure_above", 0.3, 3)), bandwidth=9)
    wanted = []
    for second, (io, processes) in enumerate([(0.0, ()), (0.0, ("acquire",)), (0.5, ("acquire",)), (0.5, ())]):
        made.pressed(model.Pressed(0.0, io, processes, float(second)))
        wanted.append([e for e in made.seen if isinstance(e, model.Throttled)][-1].bandwidth)  # type: ignore[attr-defined]

    assert wanted == [9, 5, 3, 3]


def test_a_restart_reserves_for_what_is_under_way():
    """A daemon that comes back knows what its runs may still write."""
    lab = lab_of(rule(batch=Batch(files=1)))
    reading(lab, 90 * GB)
    closed(lab, "a.tif", 50 * GB)
    lab.step(model.Started(1, 1, "h", lab.at))
    lab.crash()
    lab.step(model.Mounted(MOUNTS, lab.at))
    reading(lab, 90 * GB)
    closed(lab, "b.tif", 50 * GB)

    assert lab.engine.runs.waiting_for(lab.engine.runs.open[2]).startswith("storage: 50 GB are needed")


def test_who_is_behind_one_that_waits_for_space_says_so():
    """`its turn: 0 of 4 runs are at work` would send nobody to the disk that is full."""
    lab = lab_of(rule(batch=Batch(files=1)))
    reading(lab, 11 * GB)
    closed(lab, "a.tif", 50 * GB)
    closed(lab, "b.tif", 50 * GB)
    first, second = lab.engine.runs.open.values()

    assert lab.engine.runs.waiting_for(first).startswith("storage: ")
    words = f"its turn: run {first.id} is before it and waits for storage: "
    assert lab.engine.runs.waiting_for(second).startswith(words)


def test_who_waits_for_the_limit_of_its_own_rule_says_so():
    """With turns free over all rules, the words name the limit that holds."""
    lab = lab_of(rule(batch=Batch(files=1), runs_max=1), limits=())
    closed(lab, "a.tif", 1)
    closed(lab, "b.tif", 1)
    waits = [lab.engine.runs.waiting_for(run) for run in lab.engine.runs.open.values() if run.state == RunState.PENDING]

    assert waits == ["its turn: its rule has as many at work as it may, 1 (limits: runs)"]


def test_so_many_at_once_go_to_one_place():
    """Others go on elsewhere; who waits is told why."""
    here, there = rule("here", 1, options={"to": "/x"}), rule("there", 2, options={"to": "/y"})
    lab = lab_of(here, there, limits=())
    lab.engine.runs.destination_max = 1
    for name in ("a.tif", "b.tif"):
        lab.write(name, 1)
    lab.run_for(31)
    assert sorted(lab.engine.runs.open[run].rule for run in starts(lab)) == ["here", "there"]
    waits = [lab.engine.runs.waiting_for(run) for run in lab.engine.runs.open.values() if run.state == RunState.PENDING]
    assert sorted(waits) == ["its turn: /x has as many as may be, 1", "its turn: /y has as many as may be, 1"]
    first = next(run for run in starts(lab) if lab.engine.runs.open[run].rule == "here")
    lab.step(model.Started(first, 1, "h", lab.at))
    lab.step(model.Polled(first, 1, "failed", lab.at, fault=model.Fault("person", "no")))

    assert len(starts(lab)) == 3
