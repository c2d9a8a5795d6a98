"""Laws of what the core decides about reclaim: which sets, how fast, and that none is forgotten. No clock, no file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.lab import rule
from trigger_daemon.core import model
from trigger_daemon.core.alarms import Alarms
from trigger_daemon.core.model import (
    AlarmRaised,
    Effect,
    ReclaimFile,
    ReclaimMoved,
    ReclaimSet,
    Remove,
    Removed,
    Selected,
)
from trigger_daemon.core.reclaims import AT_ONCE, EVERY_S, REFUSED_S, Reclaims
from trigger_daemon.core.rules import Complete, Reclaim, Rule
from trigger_daemon.core.saved import SavedReclaim
from trigger_daemon.core.storage import Amount, Limits, Storage
from trigger_daemon.core.timers import Timers

GB = 10**9
DATA = Limits("/data", low=Amount(bytes=400 * GB), enough=Amount(bytes=500 * GB), critical=Amount(bytes=50 * GB))


def asks(only_under: str = "low") -> Rule:
    return rule("r", 1, watch="/data", reclaim=Reclaim(("r",), 600.0, only_under))  # type: ignore[arg-type]


def a_set(number: int, size: int = 10 * GB, *, root: int = 1, always: bool = False) -> model.ReclaimSet:
    file = model.ReclaimFile(root, f"{number}.tif", (size, number, number, number), f".h{number}")
    return model.ReclaimSet(1, number, (file,), (), always)


class Bench:
    """The policy with a volume of 1 TB, roots that are believed, and a journal that is what went out."""

    def __init__(self, *rules: Rule, saved: tuple[SavedReclaim, ...] = ()) -> None:
        self.out: list[model.Effect] = []
        self.timers = Timers()
        self.alarms = Alarms(self.out, lambda at: at)
        self.storage = Storage([DATA], [], None, out=self.out, alarms=self.alarms)
        self.believed = {1: True}
        self.paused = False
        self.reclaims = Reclaims(
            out=self.out, alarms=self.alarms, timers=self.timers, utc=lambda at: at, storage=self.storage,
            root_path=lambda root: {1: "/data"}.get(root, "/other"),
            believed=lambda root: self.believed.get(root, False), paused=lambda: self.paused,
        )  # fmt: skip
        self.reclaims.enabled = True
        self.reclaims.restore(saved, 10)
        self.now = 0.0
        self.reclaims.use(list(rules), 0.0)

    def free(self, gigabytes: float) -> None:
        self.storage.gauged(model.Gauged("/data", round(gigabytes * GB), 1_000 * GB, self.now, 100, 100))
        self.reclaims.look(self.now)

    def go(self, seconds: float) -> None:
        end = self.now + seconds
        while (at := self.timers.next()) is not None and at <= end:
            self.now = at
            self.timers.run(at)
        self.now = end

    def took(self, kind: type[Any]) -> list[Any]:
        """Return what went out of one kind since the last time it was asked for."""
        found = [one for one in self.out if isinstance(one, kind)]
        self.out[:] = [one for one in self.out if not isinstance(one, kind)]
        return found

    def select(self, *sets: model.ReclaimSet) -> None:
        (asked,) = self.took(model.Select)
        self.reclaims.selected(model.Selected(sets, asked.rules_at, self.now))

    def answer(self, effect: model.Remove, place: str, *, ok: bool = True, why: str = "") -> None:
        self.reclaims.removed(model.Removed(effect.id, effect.phase, ok, (place,), why, "", self.now))

    def take(self, effect: model.Remove) -> None:
        """Answer as hands do when all is well, to the end of the set."""
        self.answer(effect, "aside")
        (gone,) = (one for one in self.out if isinstance(one, model.Remove) and one.id == effect.id)
        assert gone.phase == "gone"
        self.out.remove(gone)
        self.answer(gone, "gone")


def test_it_is_looked_for_sets_only_while_there_is_a_reason():
    """Not above `low`, not while paused, not while the settings forbid it, and not again and again in vain."""
    bench = Bench(asks())
    bench.free(450)
    bench.go(3 * EVERY_S)
    assert bench.took(model.Select) == []

    bench.paused = True
    bench.free(300)
    bench.paused, bench.reclaims.enabled = False, False
    bench.free(300)
    assert bench.took(model.Select) == []

    bench.reclaims.enabled = True
    bench.free(300)
    (asked,) = bench.took(model.Select)
    assert (asked.rules, asked.wanted_bytes) == (("r",), 200 * GB)
    bench.reclaims.selected(model.Selected((), asked.rules_at, bench.now))
    for _ in range(10):
        bench.go(2.0)
        bench.free(300)
    assert bench.took(model.Select) == []
    bench.go(EVERY_S)
    assert len(bench.took(model.Select)) == 1


def test_a_set_is_intended_then_confirmed_then_done():
    """Each step is a record before the hands are asked; each is judged by them."""
    bench = Bench(asks())
    bench.free(300)
    bench.select(a_set(1))
    intended, aside = bench.out[-2:]
    assert isinstance(intended, model.ReclaimIntended) and isinstance(aside, model.Remove)
    assert (intended.id, aside.id, aside.phase) == (11, 11, "aside")

    bench.out.clear()
    bench.answer(aside, "aside")
    confirmed, gone = bench.out
    assert isinstance(confirmed, model.ReclaimMoved) and isinstance(gone, model.Remove)
    assert (confirmed.state, gone.phase) == ("confirmed", "gone")
    bench.answer(gone, "gone")
    assert [one.state for one in bench.took(model.ReclaimMoved)] == ["confirmed", "done"]


def test_only_until_it_is_enough_and_the_oldest_first():
    """200 GB are missing: twenty sets of 10 GB, whatever more could go; then only a new reading leads on."""
    bench = Bench(asks())
    bench.reclaims.bytes_per_s = 10**15
    bench.free(300)
    bench.select(*(a_set(number) for number in range(1, 41)))
    begun: list[int] = []
    for _ in range(1_000):
        bench.go(0.1)
        for effect in bench.took(model.Remove):
            begun.append(effect.of.run)
            bench.take(effect)

    assert begun == list(range(1, 21))
    assert bench.took(model.Select) == []
    bench.free(500)
    assert bench.took(model.Select) == []


def test_no_faster_than_allowed_and_few_at_once():
    """500 MB and 100 sets in a second, so that a mistake can be stopped; a pause stops what has not begun."""
    for size, most in ((GB, 60 * 0.5 + 1), (1_000, 60 * 100 + 1)):
        bench = Bench(asks("always"))
        bench.go(1.0)
        bench.select(*(a_set(number, size, always=True) for number in range(10_000)))
        begun = []
        for _ in range(1_500):
            bench.go(0.04)
            for effect in bench.took(model.Remove):
                begun.append(effect)
                bench.take(effect)
            bench.out.clear()
        assert most * 0.9 <= len(begun) <= most

    bench = Bench(asks("always"))
    bench.go(1.0)
    bench.select(*(a_set(number, 1_000, always=True) for number in range(100)))
    bench.go(60.0)
    under_way = bench.took(model.Remove)
    assert len(under_way) == AT_ONCE
    bench.paused = True
    for effect in under_way:
        bench.answer(effect, "aside")
    assert {effect.phase for effect in bench.took(model.Remove)} == {"back"}
    bench.go(60.0)
    assert bench.took(model.ReclaimIntended)[AT_ONCE:] == []


def test_rules_that_change_meanwhile_put_it_back():
    """What was selected by others, or set aside under others, does not go."""
    bench = Bench(asks())
    bench.free(300)
    (asked,) = bench.took(model.Select)
    bench.reclaims.use([asks()], bench.now)
    bench.reclaims.selected(model.Selected((a_set(1),), asked.rules_at, bench.now))
    assert bench.took(model.Remove) == []

    bench = Bench(asks())
    bench.free(300)
    bench.select(a_set(1))
    (aside,) = bench.took(model.Remove)
    bench.reclaims.use([asks()], bench.now)
    bench.answer(aside, "aside")
    (back,) = bench.took(model.Remove)
    assert back.phase == "back"
    bench.answer(back, "at its name")
    assert [one.state for one in bench.took(model.ReclaimMoved)] == ["kept"]


def test_what_was_put_back_is_left_alone_for_a_while():
    """Else a file that a program holds open would be renamed twice a minute."""
    bench = Bench(asks())
    bench.free(300)
    bench.select(a_set(1))
    (aside,) = bench.took(model.Remove)
    bench.answer(aside, "at its name", ok=False, why="open for writing")
    assert [(one.state, one.because) for one in bench.took(model.ReclaimMoved)] == [("kept", "open for writing")]
    bench.go(EVERY_S)
    bench.free(300)
    bench.select(a_set(1), a_set(2))
    assert [effect.of.run for effect in bench.took(model.Remove)] == [2]

    bench.go(REFUSED_S)
    bench.reclaims.queue.clear()
    bench.reclaims.open.clear()
    bench.reclaims.look(bench.now)
    bench.free(300)
    bench.select(a_set(1))
    assert [effect.of.run for effect in bench.took(model.Remove)] == [1]


def test_after_a_crash_what_was_intended_goes_back_and_what_was_confirmed_is_judged():
    """Once the root is believed; until then it is told."""
    saved = (SavedReclaim(3, False, a_set(3)), SavedReclaim(4, True, a_set(4)))
    bench = Bench(asks(), saved=saved)
    bench.believed[1] = False
    bench.go(5.0)
    assert bench.took(model.Remove) == []
    assert {"reclaim:3", "reclaim:4"} <= bench.alarms.open.keys()

    bench.believed[1] = True
    bench.go(EVERY_S)
    asked = bench.took(model.Remove)
    assert [(one.id, one.phase) for one in asked] == [(3, "back"), (4, "gone")]
    bench.answer(asked[0], "at its name")
    bench.answer(asked[1], "neither")
    assert [(one.id, one.state) for one in bench.took(model.ReclaimMoved)] == [(3, "kept"), (4, "done")]
    assert bench.alarms.open == {}


def test_a_set_that_cannot_be_ended_is_tried_again_and_holds_up_no_other():
    """Its disk fails, or its root is away: it stays under way, and is told until it is ended."""
    bench = Bench(asks())
    bench.reclaims.bytes_per_s = 10**15
    bench.free(300)
    bench.select(a_set(1))
    (aside,) = bench.took(model.Remove)
    bench.answer(aside, "unknown", ok=False, why="Input/output error")
    assert bench.took(model.ReclaimMoved) == [] and "reclaim:11" in bench.alarms.open

    bench.go(0.5)
    bench.free(300)
    bench.select(a_set(2))
    other = next(one for one in bench.took(model.Remove) if one.id == 12)
    bench.take(other)
    bench.go(EVERY_S)
    (back,) = (one for one in bench.took(model.Remove) if one.id == 11)
    assert back.phase == "back"
    bench.answer(back, "at its name")
    assert [(one.id, one.state, one.because) for one in bench.took(model.ReclaimMoved)][-1] == (
        11, "kept", "Input/output error",
    )  # fmt: skip
    assert "reclaim:11" not in bench.alarms.open


def test_a_call_that_hangs_is_told_and_its_answer_counts_when_it_comes():
    """Nobody else touches the set meanwhile: two hands at one file would undo each other's work."""
    bench = Bench(asks())
    bench.free(300)
    bench.select(a_set(1))
    (aside,) = bench.took(model.Remove)
    bench.reclaims.removed(model.Removed(aside.id, "aside", False, (), "no answer", "", bench.now))
    assert "reclaim:11" in bench.alarms.open
    bench.go(10 * EVERY_S)
    assert [one for one in bench.took(model.Remove) if one.id == 11] == []
    bench.answer(aside, "aside")
    assert [one.phase for one in bench.took(model.Remove) if one.id == 11] == ["gone"]


def test_a_root_that_is_not_believed_is_left_alone():
    """The files may be another disk's."""
    bench = Bench(asks())
    bench.believed[2] = False
    bench.free(300)
    mixed = replace(a_set(1), files=(*a_set(1).files, *a_set(9, root=2).files))
    bench.select(mixed, a_set(2))

    assert [one.of.run for one in bench.took(model.ReclaimIntended)] == [2]


# ----------------------------------------------------- sets that were begun before

FILES = tuple(ReclaimFile(1, f"a.{n}", (9, 1, 1, 1), f".trigger-daemon-reclaim-0123456789abcdef-{n}") for n in (0, 1))
SET = ReclaimSet(1, 7, FILES, (), True)


@dataclass
class Begun:
    """The core's part with one rule, and what it asks for."""

    paused: bool = False
    away: bool = False
    out: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        alarms = Alarms(self.out, lambda at: at)
        self.timers = Timers()
        self.reclaims = Reclaims(
            out=self.out, alarms=alarms, timers=self.timers, utc=lambda at: at,
            storage=Storage((), (), None, out=self.out, alarms=alarms), root_path=lambda root: "/data",
            believed=lambda root: not self.away, paused=lambda: self.paused,
        )  # fmt: skip
        self.reclaims.enabled = True

    def restored(self, *, confirmed: bool) -> None:
        """A life begins that finds a set under way, takes its rules, and looks at it."""
        self.reclaims.restore([SavedReclaim(3, confirmed, SET)], 3)
        self.use(1.0)
        self.reclaims.run(2.0)

    def use(self, at: float) -> None:
        rule = Rule(
            name="r", id=1, watch="/data", match=("**",), existing="process", action="copy", options={},
            complete=Complete(), reclaim=Reclaim(("r",), 0.0, "always"),
        )  # fmt: skip
        self.reclaims.use([rule], at)

    def asked(self) -> list[str]:
        """Return the phases that were asked for since the last time."""
        found = [effect.phase for effect in self.out if isinstance(effect, Remove)]
        self.out.clear()
        return found

    def answer(self, phase: str, ok: bool, *places: str, why: str = "", at: float = 3.0) -> list[tuple[str, str]]:
        """Tell what a phase did; return what is journaled of the set then."""
        self.reclaims.removed(Removed(next(iter(self.reclaims.open)), phase, ok, places, why, "", at))  # type: ignore[arg-type]
        return [(effect.state, effect.because) for effect in self.out if isinstance(effect, ReclaimMoved)]


def test_after_a_restart_an_intended_set_goes_back_and_a_confirmed_one_is_judged_again() -> None:
    """What the journal knows of it decides."""
    for confirmed, asked in ((False, "back"), (True, "gone")):
        bench = Begun()
        bench.restored(confirmed=confirmed)
        assert bench.asked() == [asked]


@pytest.mark.parametrize("how", ["disabled", "paused"])
def test_a_confirmed_set_goes_back_when_nothing_is_to_be_deleted_any_more(how: str) -> None:
    """An operator who stops a mistake stops it also for what a crash left half-way."""
    bench = Begun(paused=how == "paused")
    bench.reclaims.enabled = how != "disabled"
    bench.restored(confirmed=True)
    assert bench.asked() == ["back"]

    ((state, because),) = bench.answer("back", True, "at its name", "at its name")
    assert state == "kept" and "paused" in because


@pytest.mark.parametrize(("places", "words"), [(("neither", "at its name"), "not all of it"), (("neither",) * 2, "")])
def test_what_was_unlinked_before_it_went_back_is_told_as_gone(places: tuple[str, ...], words: str) -> None:
    """A part of a confirmed set was gone already; the row says of each file where it is."""
    bench = Begun(paused=True)
    bench.restored(confirmed=True)
    bench.asked()

    ((state, because),) = bench.answer("back", True, *places)
    assert state == "done" and because.startswith("proved elsewhere")
    assert ("not all of it" in because) == bool(words)


def test_what_was_only_intended_and_is_not_there_is_no_deletion_of_ours() -> None:
    """The journal was put back from a backup, or somebody moved it: that it is not there is told."""
    bench = Begun()
    bench.restored(confirmed=False)
    bench.asked()

    ((state, because),) = bench.answer("back", True, "neither", "neither")
    assert state == "kept" and "not all of it is there any more" in because


def test_a_set_that_could_not_be_ended_is_judged_again_when_it_can() -> None:
    """Half a minute or a day after it was confirmed, its copies may be others."""
    bench = Begun()
    bench.use(1.0)
    bench.reclaims.selected(Selected((SET,), 1, 2.0))
    assert bench.asked() == ["aside"]
    assert bench.answer("aside", True, "aside", "aside") == [("confirmed", "")]
    assert bench.asked() == ["gone"]
    bench.answer("gone", False, "gone", "unknown", why="EIO")
    assert bench.asked() == []

    bench.reclaims.run(3.0 + EVERY_S)
    assert bench.asked() == ["gone"]


@pytest.mark.parametrize(("lost", "words"), [
    (1, "the directory of /data/a.0 went away while reclaim had hidden the file there"),
    (3, "the directories of 3 files went away while reclaim had hidden them there"),
    (5, "the directories of 5 files went away while reclaim had hidden them there"),
])  # fmt: skip
def test_files_whose_directory_went_away_are_counted_and_named(lost: int, words: str) -> None:
    """The first with their hidden names, under which alone they can be found; of more it is said what lists them."""
    files = tuple(replace(FILES[0], path=f"a.{n}", hidden=f".h-{n}") for n in range(6))
    bench = Begun()
    bench.use(1.0)
    bench.reclaims.selected(Selected((replace(SET, files=files),), 1, 2.0))
    bench.answer("aside", True, *["aside"] * 6)
    bench.answer("gone", False, *["lost"] * lost, *["gone"] * (6 - lost))
    (alarm,) = [effect for effect in bench.out if isinstance(effect, AlarmRaised)]

    assert (alarm.key, alarm.what) == ("lost:reclaim:1", words)
    assert [f".h-{n} (was /data/a.{n})" in alarm.hint for n in range(6)] == [n < min(lost, 3) for n in range(6)]
    assert ("and 2 more (`trigger-daemon storage reclaim --set 1` tells all)" in alarm.hint) == (lost == 5)


def test_a_rule_with_a_change_that_waits_gives_nothing_back() -> None:
    """Nor does one that relies on its proofs; what was on its way goes back."""
    bench = Bench(asks())
    bench.free(350)
    bench.select(a_set(1))
    (aside,) = bench.took(model.Remove)
    bench.reclaims.use([asks()], bench.now, ["r"])
    bench.answer(aside, "aside")
    (back,) = bench.took(model.Remove)
    assert back.phase == "back"
    bench.answer(back, "at its name")

    bench.go(1.0)
    bench.free(340)
    bench.go(3 * EVERY_S)
    assert bench.took(model.Select) == []
    bench.reclaims.use([asks()], bench.now)
    bench.go(EVERY_S)
    assert len(bench.took(model.Select)) == 1
