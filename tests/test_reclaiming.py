"""Laws of reclaim in a running daemon: what is proved goes, nothing else does, and each end is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.far import RsyncDaemon, rclone_on_the_path
from tests.prove.faulty_fuse import FaultyShare
from tests.test_reclaim import Store
from trigger_daemon.control import ControlClient

HIDDEN = ".trigger-daemon-reclaim-"


class Taking(Store):
    """A store whose daemon deletes what may go, at once."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.rules["disk"]["reclaim"]["only_under"] = "always"
        self.site.settings["reclaim"] = "enabled"
        self.open: list[Any] = []

    def names(self) -> list[str]:
        return sorted(path.name for path in self.site.data.rglob("*") if path.is_file())

    def sets(self) -> list[tuple[str, str]]:
        return list(self.site.ask("SELECT state, because FROM reclaim ORDER BY id"))

    def until_ended(self, number: int, state: str) -> None:
        """Wait until so many sets have come to this end, and none is under way."""
        self.site.until(
            lambda: [s for s, _ in self.sets()].count(state) >= number
            and not self.site.ask("SELECT 1 FROM reclaim WHERE state IN ('intended', 'confirmed')"),
            40, f"{number} {state}",
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Let the daemon live for so long."""
        beat = ControlClient(self.site.state).heartbeat
        began = beat()["reclaim"]["witnessed_s"]
        self.site.until(lambda: beat()["reclaim"]["witnessed_s"] > began + seconds, 60, "it lives")

    def beat(self) -> dict[str, Any]:
        beat = self.site.heartbeat()
        assert beat is not None
        return beat

    def reload(self) -> None:
        assert self.site.process is not None
        self.site.config.write_text(json.dumps(self.site.settings))
        self.site.process.send_signal(signal.SIGHUP)

    def hidden(self, name: str = "a.tif") -> Path | None:
        """Return where a file stands while it is under its hidden name: the first of its set."""
        return next(iter(sorted(self.site.data.glob(f"{HIDDEN}*-0"))), None)

    def attack_at(self, place: str, attack: Callable[[Taking], None]) -> None:
        """Start a daemon that stops at a step of its first set; do the worst; let it go on."""
        self.begin_with(place)
        process = self.site.process
        assert process is not None
        self.site.until(lambda: _is_stopped(process.pid), 30, f"it is at {place}")
        attack(self)
        process.send_signal(signal.SIGCONT)

    def begin_with(self, plan: str, *names: str) -> None:
        self.site.write_rules(*self.rules.values())
        self.site.start(env={"TRIGGER_FAIL": plan})
        for name in names or ("a.tif", "a.xml"):
            (self.site.data / name).write_bytes(os.urandom(1_000))

    def about(self, name: str) -> dict[str, Any]:
        told = self.site.json("explain", str(self.site.data / name))
        return {one["rule"]: one for one in told["rules"]}


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Taking]:
    made = Taking(tmp_path)
    yield made
    made.site.stop()


def test_what_is_proved_goes_and_explain_says_where_it_is(store: Taking) -> None:
    """With its companion, after every proof; what no rule matched stays; the audit names each copy."""
    (store.site.data / "notes.txt").write_text("of nobody")
    store.begin("a.tif", "a.xml", "b.tif", "b.xml")
    store.until_ended(2, "done")

    assert store.names() == ["notes.txt"]
    assert sorted(path.name for path in store.site.out.iterdir()) == ["a.tif", "a.xml", "b.tif", "b.xml"]
    for name in ("a.tif", "a.xml"):
        about = store.about(name)
        assert about["disk"]["stage"] == "reclaimed"
        for copy in (store.site.out / name, store.tape / name):
            assert str(copy) in about["disk"]["because"]
    told = store.site.cli("explain", str(store.site.data / "a.tif")).stdout
    assert "\n    version: 1.0 kB, run" in told and "earlier version" not in told
    shown = store.site.json("storage")["reclaim"]
    assert (shown["enabled"], shown["sets_in_24h"], shown["files_in_24h"], shown["bytes_in_24h"]) == (True, 2, 4, 4_000)
    assert store.site.json("journal", "check")["problems"] == []


def test_a_root_that_reclaim_empties_is_not_doubted(store: Taking) -> None:
    """All of it goes at once; no alarm, and what comes then is taken."""
    names = [f"{letter}.{suffix}" for letter in "abcdef" for suffix in ("tif", "xml")]
    store.begin(*names)
    store.until_ended(6, "done")
    assert store.names() == []
    store.wait(2.0)
    (store.site.data / "g.tif").write_bytes(os.urandom(1_000))
    (store.site.data / "g.xml").write_bytes(os.urandom(1_000))
    store.until_ended(7, "done")

    assert b"suspect" not in store.site.log.read_bytes()


def test_nothing_goes_unless_the_settings_say_so(store: Taking) -> None:
    """A rule's `reclaim` alone deletes nothing; a reload of the settings lets it."""
    store.site.settings["reclaim"] = "disabled"
    store.begin()
    store.site.until(lambda: store.told()[0] == [["a.tif", "a.xml"]], 10, "they could go")
    store.wait(3.0)
    assert store.names() == ["a.tif", "a.xml"] and store.sets() == []

    store.site.settings["reclaim"] = "enabled"
    store.reload()
    store.until_ended(1, "done")
    assert store.names() == []
    assert store.site.cli("storage", "reclaim", check=False).returncode == 1


def test_a_paused_daemon_takes_nothing_away(store: Taking) -> None:
    """`pause` is for all that is ours."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin()
    store.site.cli("pause")
    store.wait(7.0)
    assert store.names() == ["a.tif", "a.xml"] and store.sets() == []
    store.site.cli("resume")
    store.until_ended(1, "done")


def test_copies_that_were_moved_are_proved_again(store: Taking) -> None:
    """Another inode, or another time, is no proof and no fault: both sides are read once more."""
    store.rules["disk"]["reclaim"]["keep_for"] = "3s"
    store.begin()
    for copy in [*store.site.out.iterdir(), *store.tape.iterdir()]:
        content = copy.read_bytes()
        copy.unlink()
        copy.write_bytes(content)
    store.until_ended(1, "done")

    assert store.names() == []


def test_what_is_on_the_way_to_another_rule_stays(store: Taking) -> None:
    """A rule that wants the file and has not taken it yet holds it back; one that has its copy does not."""
    store.rules["late"] = store.site.rule("late", match=["*.tif"], complete={"quiescence": "8s"},
                                          start={"copy": {"to": str(store.site.base / "late")}})  # fmt: skip
    (store.site.base / "late").mkdir()
    store.begin()
    store.wait(3.0)
    assert store.names() == ["a.tif", "a.xml"] and store.sets() == []
    store.until_ended(1, "done")

    assert (store.site.base / "late" / "a.tif").exists()


def test_a_removed_rule_keeps_its_claim_until_it_is_waived(store: Taking) -> None:
    """Its run will never end: a person says that nobody needs it. At work again, the rule counts again."""
    store.rules["gone"] = store.site.rule("gone", match=["*.tif"], start={"copy": {"to": "/dev/null/nowhere"}},
                                          retry={"initial": "1h", "longest": "2h"})  # fmt: skip
    store.site.write_rules(*store.rules.values())
    store.site.start()
    (store.site.data / "a.tif").write_bytes(os.urandom(1_000))
    store.site.until(lambda: len(store.site.taken("gone")) == 1, 20, "the rule has it")
    assert store.site.cli("rules", "waive", "gone", check=False).returncode == 1, "it is at work"
    del store.rules["gone"]
    store.site.write_rules(*store.rules.values())
    store.site.until(lambda: "gone" not in [r["name"] for r in store.beat()["rules"] if r["state"] != "removed"],
                     20, "the rule is gone")  # fmt: skip
    store.wait(4.0)
    assert store.names() == ["a.tif"] and store.sets() == []
    assert "rules waive gone" in json.dumps(store.site.json("storage", "reclaim", "--dry-run"))

    assert store.site.cli("rules", "waive", "never", check=False).returncode == 1
    store.site.cli("rules", "waive", "gone")
    store.until_ended(1, "done")


# ------------------------------------------------------------------------ attacks


def rewritten(store: Taking) -> None:
    (store.hidden() or store.site.data / "a.tif").write_bytes(os.urandom(1_000))


def linked(store: Taking) -> None:
    os.link(store.hidden() or store.site.data / "a.tif", store.site.base / "other-name")


def opened(store: Taking) -> None:
    store.open.append((store.hidden() or store.site.data / "a.tif").open("ab"))


def replaced_by_a_link(store: Taking) -> None:
    path = store.hidden() or store.site.data / "a.tif"
    path.rename(store.site.base / "moved")
    path.symlink_to(store.site.base / "moved")


def copy_altered(store: Taking) -> None:
    (store.site.out / "a.tif").write_bytes(os.urandom(1_000))


def companion_copy_gone(store: Taking) -> None:
    (store.tape / "a.xml").unlink()


ATTACKS = {
    rewritten: "not what was proved any more", linked: "hard links", opened: "open for writing",
    replaced_by_a_link: "regular file", copy_altered: "not as it was proved", companion_copy_gone: "not as it was",
}  # fmt: skip


RENAME, AGAIN, JUDGE = "removal.rename:stop@1", "removal.again:stop@1", "reclaim.judge:stop@2"
CASES = [  # what happens to the file is looked for at each step, what happens to a copy when it is judged
    (RENAME, rewritten), (RENAME, linked), (AGAIN, rewritten), (AGAIN, opened), (AGAIN, replaced_by_a_link),
    (JUDGE, linked), (JUDGE, copy_altered), (JUDGE, companion_copy_gone),
]  # fmt: skip


@pytest.mark.parametrize(("place", "attack"), CASES)
def test_whatever_happens_between_choice_and_end_keeps_the_set(
    store: Taking, place: str, attack: Callable[[Taking], None]
) -> None:
    """The daemon is stopped at a step, attacked, and let go on: all is there under its name, and it is told why."""
    store.attack_at(place, attack)
    store.until_ended(1, "kept")

    assert {"a.tif", "a.xml"} <= set(store.names()), store.names()
    assert not store.hidden()
    ((_, because),) = store.sets()
    assert ATTACKS[attack] in because
    assert "reclaim left it here" in store.site.cli("explain", str(store.site.data / "a.tif")).stdout


@pytest.mark.parametrize("what", ["root", "directory"])
def test_a_path_that_leads_elsewhere_by_then_says_nothing_of_what_was_hidden(store: Taking, what: str) -> None:
    """That a hidden file is not where its path leads now is no deletion: it is told where it stands."""
    first, other = store.site.base / "first", store.site.base / "other"
    store.site.data.rename(first)
    for name in ("disk", "tape"):
        store.rules[name] |= {"match": ["*/*.tif"], "complete": {"quiescence": "100ms"}}
    (first / "s").mkdir()
    (other / "s").mkdir(parents=True)
    store.site.data.symlink_to(first)

    def lead(to: Path) -> None:
        link = store.site.base / "link"
        link.symlink_to(to)
        link.replace(store.site.data)

    store.begin_with("reclaim.judge:stop@3", "s/a.tif")
    process = store.site.process
    assert process is not None
    store.site.until(lambda: _is_stopped(process.pid), 30, "it was hidden, and is judged for the last time")
    if what == "root":
        lead(other)
    else:
        (first / "s").rename(first / "was")
        (first / "s").mkdir()
    process.send_signal(signal.SIGCONT)
    key = "reclaim:1" if what == "root" else "lost:reclaim:1"
    store.site.until(lambda: key in [alarm["key"] for alarm in store.beat()["alarms"]], 20, "the alarm")

    assert [path.name.startswith(HIDDEN) for path in first.rglob("*") if path.is_file()] == [True]
    assert store.sets()[0][0] == ("confirmed" if what == "root" else "kept")
    told = store.site.json("storage", "reclaim", "--set", "1")
    (file,) = told["files"]
    assert (file["path"], file["hidden"][: len(HIDDEN)], file["now"]) == (
        str(store.site.data / "s/a.tif"), HIDDEN, "under neither name",
    )  # fmt: skip
    shown = store.site.cli("storage", "reclaim", "--set", "1").stdout
    assert f"hidden as {file['hidden']}; now under neither name" in shown
    assert store.site.cli("storage", "reclaim", "--set", "2", check=False).returncode == 1
    if what == "root":
        lead(first)
        store.site.stop()
        store.site.start()
        store.until_ended(1, "done")


@contextlib.contextmanager
def on_a_disk_of_its_own(store: Taking, place: Path, *, in_memory: bool = True) -> Iterator[Callable[..., None]]:
    """Have a directory be a mount point, over files that somebody wrote there before; yield what can `umount`, `mount`.

    A copy in memory is no proof of what lies on a disk: without `in_memory` it is another directory of that.
    """
    for name in ("a.tif", "a.xml"):
        (place / name).write_bytes(b"beneath".ljust(1_000))
    disk = store.site.base / f"disk-{place.name}"
    disk.mkdir()

    def command(*words: str) -> None:
        subprocess.run([*words], check=True)

    def does(verb: str, *options: str) -> None:
        command(*(("mount", "--bind", str(disk)) if verb == "mount" else ("umount", *options)), str(place))

    if in_memory:
        command("mount", "-t", "tmpfs", "tmpfs", str(disk))
    try:
        does("mount")
        yield does
    finally:
        store.site.stop()
        for point in (place, disk):
            subprocess.run(["umount", "-l", str(point)], check=False, stderr=subprocess.DEVNULL)


def beneath(store: Taking, place: Path) -> bool:
    """Say whether what lies below the mount point is as it was."""
    return {path.name: path.read_bytes() for path in place.iterdir()} == {
        name: b"beneath".ljust(1_000) for name in ("a.tif", "a.xml")
    }


def called_gone(store: Taking, disk: Path) -> list[str]:
    """Return what stands on a disk although the journal says that it was deleted."""
    rows = store.site.ask("SELECT path, hidden FROM reclaim_file JOIN reclaim ON reclaim.id = reclaim"
                          " WHERE state = 'done' AND place IN ('gone', 'neither')")  # fmt: skip
    names = [os.fsdecode(name) for row in rows for name in row]
    return [name for name in names if (disk / name).exists()]


def is_told(store: Taking) -> bool:
    """Say whether each set has ended, or an alarm tells of it."""
    alarms = {alarm["key"] for alarm in store.beat()["alarms"]}
    left = store.site.ask("SELECT id FROM reclaim WHERE state IN ('intended', 'confirmed')")
    return bool(store.sets()) and all(f"reclaim:{id}" in alarms for (id,) in left)


ONLY_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")


@ONLY_ROOT
@pytest.mark.parametrize(
    ("place", "end"),
    [("reclaim.judge:stop@3", "lives"), ("reclaim.judge:stop@3", "killed"), ("removal.unlinked:stop@1", "lives")],
)
def test_a_root_that_is_unmounted_meanwhile_is_waited_for(store: Taking, place: str, end: str) -> None:
    """Nothing is deleted beneath, nothing is called deleted that stands there; once it is back, all of it goes.

    Also when the daemon is killed then, and knows no more in which directory the files were hidden.
    """
    data, disk = store.site.data, store.site.base / "disk-data"
    with on_a_disk_of_its_own(store, data) as does:

        def attack(store: Taking) -> None:
            does("umount", "-l")
            if end == "killed":
                store.site.kill()
                store.site.start(wait=False)

        store.attack_at(place, attack)
        store.site.until(lambda: {root["health"] for root in store.beat()["roots"]} == {"lost"}, 20, "it is missed")
        store.site.until(lambda: is_told(store), 20, "the set has ended, or an alarm tells of it")
        assert (beneath(store, data), called_gone(store, disk)) == (True, [])

        does("mount")
        store.site.stop()
        store.site.start()
        store.until_ended(1, "done")
        store.site.until(lambda: store.names() == [], 20, "all of it is gone")
        assert {path.name for path in store.tape.iterdir()} == {"a.tif", "a.xml"}
        assert "lost:reclaim:1" not in [alarm["key"] for alarm in store.beat()["alarms"]]
        store.site.stop()
        does("umount")

        assert beneath(store, data)


@ONLY_ROOT
def test_a_destination_that_is_unmounted_meanwhile_keeps_the_set(store: Taking) -> None:
    """What lies beneath under the copy's name is no copy, though it is as long; once it is back, all of it goes."""
    with on_a_disk_of_its_own(store, store.tape, in_memory=False) as does:
        store.attack_at("reclaim.judge:stop@3", lambda store: does("umount", "-l"))
        store.until_ended(1, "kept")
        assert store.names() == ["a.tif", "a.xml"] and beneath(store, store.tape)

        does("mount")
        store.site.stop()
        store.site.start()  # one that was put back is left alone for a while, by this life
        store.until_ended(1, "done")
        store.site.stop()
        does("umount")

        assert beneath(store, store.tape)


def test_storage_says_what_could_go_and_what_is_kept(store: Taking) -> None:
    """In short; and that nothing ever goes of a rule whose directory is on no volume of the settings."""
    store.site.settings["reclaim"] = "disabled"
    store.rules["disk"]["reclaim"] |= {"only_under": "low"}
    store.begin("a.tif", "a.xml", "b.tif", "b.xml")
    os.link(store.site.data / "b.tif", store.site.base / "other-name")
    told = store.site.json("storage")["reclaim"]

    assert (told["could_go_files"], told["could_go_bytes"], told["complete"]) == (2, 2_000, True)
    assert [(one["files"], one["such_as"]) for one in told["kept"]] == [(2, str(store.site.data / "b.tif"))]
    assert ["on none of the `volumes`" in why for why in told["never"]] == [True]
    shown = store.site.cli("storage").stdout
    assert "could go     2 files" in shown and "hard links" in shown and "disabled in the settings" in shown
    assert "disabled" in store.site.cli("storage", "reclaim", "--dry-run").stderr


def test_a_file_that_two_rules_may_give_back_goes_once(store: Taking) -> None:
    """One set, whoever asked first; nothing is told of a second one."""
    reclaim = {"proven_by": ["disk"], "keep_for": "1s", "only_under": "always"}
    store.rules["tape"] |= {"match": ["*.tif"], "reclaim": reclaim}
    store.rules["disk"]["complete"] = {"quiescence": "100ms"}
    store.rules["disk"]["match"] = ["*.tif"]
    store.begin("a.tif", "b.tif")
    store.until_ended(2, "done")
    store.wait(3.0)

    assert [state for state, _ in store.sets()] == ["done", "done"]


@pytest.mark.parametrize("place", ["removal.look", "removal.unlink"])
def test_a_disk_that_fails_ends_no_set_half_way(store: Taking, place: str) -> None:
    """An error at any step, once: the set is put back or goes; it is not forgotten, and nothing is hidden."""
    store.begin_with(f"{place}:eio@2")
    store.site.until(lambda: any(state in ("done", "kept") for state, _ in store.sets()), 60, "it has ended")

    assert not list(store.site.data.glob(f"{HIDDEN}*"))
    left = set(store.names())
    rows = store.site.ask("SELECT path FROM reclaim_file WHERE place IN ('gone', 'neither')")
    gone = {os.fsdecode(name) for (name,) in rows}
    assert left | gone >= {"a.tif", "a.xml"}
    for name in gone:
        assert (store.tape / name).exists() and (store.site.out / name).exists()


def alone(store: Taking) -> bytes:
    """Let the copies of a file be all that is left of it; return its content."""
    for name in ("disk", "tape"):
        store.rules[name] |= {"match": ["*.tif"], "complete": {"quiescence": "100ms"},
                              "retry": {"initial": "1s", "longest": "2s"}}  # fmt: skip
    store.rules["disk"]["start"]["copy"]["if_exists"] = "replace"
    store.begin("a.tif")
    store.until_ended(1, "done")
    return (store.site.out / "a.tif").read_bytes()


def test_a_name_that_is_used_again_does_not_replace_the_only_copy(store: Taking) -> None:
    """What was deleted here is in the archive alone: the new file of its name is held, whatever the rule says."""
    first = alone(store)
    (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
    store.site.until(lambda: store.site.states()["HELD"] == 2, 30, "both runs are held")

    assert (store.site.out / "a.tif").read_bytes() == (store.tape / "a.tif").read_bytes() == first
    assert "is all that is left of" in json.dumps(store.site.json("status")["alarms"])
    for copy in (store.site.out / "a.tif", store.tape / "a.tif"):
        copy.rename(copy.with_name("first.tif"))
    store.site.cli("runs", "retry", "--state", "HELD")
    store.until_ended(2, "done")
    assert (store.site.out / "first.tif").read_bytes() == first


def test_a_retry_that_moved_nothing_replaces_nothing(store: Taking) -> None:
    """It is looked again, and held again."""
    first = alone(store)
    (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
    store.site.until(lambda: store.site.states()["HELD"] == 2, 30, "both runs are held")
    store.site.cli("runs", "retry", "--state", "HELD")
    store.site.until(lambda: is_held_again(store, 2), 30, "both are held again")

    assert (store.site.out / "a.tif").read_bytes() == (store.tape / "a.tif").read_bytes() == first


def is_held_again(store: Taking, runs: int) -> bool:
    states = [row[0] for row in store.site.ask("SELECT state FROM run WHERE final = 0")]
    again = store.site.ask("SELECT run FROM transition WHERE to_state = 'HELD' GROUP BY run HAVING count(*) > 1")
    return states.count("HELD") == len(again) == runs


def test_a_destination_that_was_away_keeps_its_only_copy(store: Taking) -> None:
    """Whichever attempt finds it there."""
    first = alone(store)
    out = store.site.out
    away = out.rename(out.with_name("away"))
    (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
    tried = "SELECT 1 FROM run JOIN batch USING (id) WHERE final = 0 AND attempts > 0 AND destination = ?"
    store.site.until(lambda: bool(store.site.ask(tried, str(out))), 30, "it was tried in vain")
    away.rename(out)
    store.site.until(lambda: store.site.states()["HELD"] == 2, 40, "it is held")

    assert (out / "a.tif").read_bytes() == first


def test_an_only_copy_is_known_by_any_path(store: Taking) -> None:
    """A rule that reaches the archive through a link, or another mount of it, replaces nothing there."""
    first = alone(store)
    link = store.site.base / "archive"
    link.symlink_to(store.site.out)
    store.rules["disk"]["start"]["copy"] = {"to": str(link), "if_exists": "replace"}
    store.site.write_rules(*store.rules.values())
    store.reload()
    store.wait(2.0)
    (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
    store.site.until(lambda: store.site.states()["HELD"] == 2, 30, "both runs are held")

    assert (store.site.out / "a.tif").read_bytes() == first


def test_what_was_put_back_and_differs_does_not_replace_the_only_copy(store: Taking) -> None:
    """Sent again with its old size and time: the copy is what was proved, and stays."""
    first = alone(store)
    path = store.site.data / "a.tif"
    shutil.copy2(store.site.out / "a.tif", path)
    seen = path.stat()
    path.write_bytes(os.urandom(1_000))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    store.wait(1.0)
    store.site.cli("files", "resend", str(path))
    store.site.until(lambda: store.site.states()["HELD"] == 2, 30, "both runs are held")

    assert (store.site.out / "a.tif").read_bytes() == (store.tape / "a.tif").read_bytes() == first


def test_a_journal_from_a_backup_replaces_nothing_that_it_may_have_deleted(store: Taking) -> None:
    """It thinks that the first version was never deleted: its copy is kept until a person says otherwise."""
    store.rules["disk"]["reclaim"]["keep_for"] = "3s"
    store.rules["disk"]["start"]["copy"]["if_exists"] = "replace"
    for name in ("disk", "tape"):
        store.rules[name] |= {"match": ["*.tif"], "complete": {"quiescence": "100ms"}}
    store.begin("a.tif")
    store.site.stop()
    shutil.copytree(store.site.state, store.site.base / "backup")
    store.site.start()
    store.until_ended(1, "done")
    first = (store.site.out / "a.tif").read_bytes()
    store.site.stop()
    shutil.rmtree(store.site.state)
    shutil.copytree(store.site.base / "backup", store.site.state)
    (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
    store.site.start()
    store.site.until(lambda: store.site.states()["HELD"] == 2, 30, "both runs are held")

    assert (store.site.out / "a.tif").read_bytes() == (store.tape / "a.tif").read_bytes() == first
    for copy in (store.site.out / "a.tif", store.tape / "a.tif"):
        copy.rename(copy.with_name("first.tif"))
    store.site.cli("runs", "retry", "--state", "HELD")
    store.site.until(lambda: (store.site.out / "a.tif").exists(), 30, "it goes on")


@pytest.mark.parametrize("kind", ["overlay", "fuse", "stale"])
def test_a_pool_that_shows_the_source_holds_no_copy(store: Taking, kind: str) -> None:
    """Its file has another device and inode, and the same bytes: it is the file itself, and goes with it.

    `stale`: the share says of new names, from what it remembers, that they are not there.
    """
    pool = store.site.base / "pool"
    pool.mkdir()
    store.rules = {"disk": store.site.rule("disk", match=["*.tif"], start={"copy": {"to": str(pool)}},
                   reclaim={"proven_by": ["disk"], "keep_for": "1s", "only_under": "always"})}  # fmt: skip
    with shown(store, pool, kind):
        store.site.write_rules(*store.rules.values())
        store.site.start()
        (store.site.data / "a.tif").write_bytes(os.urandom(1_000))
        store.until_ended(1, "kept")
        assert "is the file itself, by another way" in store.sets()[0][1]
        assert store.names() == ["a.tif"]
        store.site.stop()


@pytest.mark.parametrize("layer", ["upper", "lower"])
def test_two_copies_of_which_a_pool_shows_one_are_one(store: Taking, layer: str) -> None:
    """The second rule finds its file there already, equal; with one disk both would be gone."""
    layers = {name: store.site.base / name for name in ("upper", "lower", "work", "pool")}
    for directory in layers.values():
        directory.mkdir()
    layers[layer] = store.tape
    options = f"lowerdir={layers['lower']},upperdir={layers['upper']},workdir={layers['work']}"
    store.rules["disk"] |= {"match": ["{movie}.tif"], "start": {"copy": {"to": str(layers["pool"])}},
                            "after": {"rule": "tape", "same": ["movie"]}}  # fmt: skip
    store.rules["disk"]["complete"] = {"quiescence": "100ms"}
    store.rules["tape"]["match"] = ["{movie}.tif"]
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(layers["pool"])], check=True)
    try:
        store.begin_with("", "a.tif")
        store.until_ended(1, "kept")
        assert "are one file, by another way" in store.sets()[0][1]
        assert store.names() == ["a.tif"]
        assert [path.name for path in store.tape.iterdir()] == ["a.tif"], "nothing is left over"
    finally:
        store.site.stop()
        subprocess.run(["umount", "-l", str(layers["pool"])], check=True)


def test_a_server_that_shows_the_source_holds_no_copy(store: Taking, tmp_path: Path) -> None:
    """What is sent to it, it calls equal: it is the file itself, and goes with it."""
    with RsyncDaemon(tmp_path / "far") as far:
        far.there.rmdir()
        far.there.symlink_to(store.site.data)
        start = {"rsync": far.options()}
        store.rules = {"disk": store.site.rule("disk", match=["*/*.tif"], start=start,
                       reclaim={"proven_by": ["disk"], "keep_for": "1s", "only_under": "always"})}  # fmt: skip
        (store.site.data / "one").mkdir()
        store.begin_with("", "one/a.tif")
        store.until_ended(1, "kept")
        assert "is the file itself, by another way" in store.sets()[0][1]
        assert store.names() == ["a.tif"]
        store.site.stop()


@pytest.mark.parametrize("leads_to", ["the source", "another directory"])
def test_a_remote_that_is_the_source_holds_no_copy(store: Taking, tmp_path: Path, leads_to: str) -> None:
    """With nothing below it in `to`: `there:a.tif` has no directory in its name."""
    far = tmp_path / "far"
    far.mkdir()
    if leads_to == "the source":
        subprocess.run(["mount", "--bind", str(store.site.data), str(far)], check=True)
    config = tmp_path / "rclone.conf"
    config.write_text(f"[there]\ntype = alias\nremote = {far}\n")
    config.chmod(0o600)
    start = {"rclone": {"to": "there:", "config": str(config)}}
    store.rules = {"disk": store.site.rule("disk", match=["*.tif"], start=start,
                   reclaim={"proven_by": ["disk"], "keep_for": "1s", "only_under": "always"})}  # fmt: skip
    try:
        with rclone_on_the_path():
            store.begin_with("", "a.tif")
            store.until_ended(1, "kept" if leads_to == "the source" else "done")
            store.site.stop()
        if leads_to == "the source":
            assert "is the file itself, by another way" in store.sets()[0][1]
            assert store.names() == ["a.tif"]
        else:
            assert store.names() == [] and (far / "a.tif").exists()
    finally:
        store.site.stop()
        if leads_to == "the source":
            subprocess.run(["umount", "-l", str(far)], check=True)


def test_a_copy_on_a_server_lets_its_source_go_and_its_name_is_free_once_it_was_moved(
    store: Taking, tmp_path: Path
) -> None:
    """No copy that is all that is left is replaced there; a retry after it was moved goes on."""
    with RsyncDaemon(tmp_path / "far") as far:
        store.rules = {"disk": store.site.rule("disk", match=["*.tif"], start={"rsync": far.options()},
                       reclaim={"proven_by": ["disk"], "keep_for": "1s", "only_under": "always"})}  # fmt: skip
        store.begin_with("", "a.tif")
        store.until_ended(1, "done")
        first = (far.there / "a.tif").read_bytes()
        (store.site.data / "a.tif").write_bytes(os.urandom(2_000))
        store.site.until(lambda: store.site.states()["HELD"] == 1, 30, "the new file is held")
        assert (far.there / "a.tif").read_bytes() == first
        (far.there / "a.tif").rename(far.there / "first.tif")
        store.site.cli("runs", "retry", "--state", "HELD")
        store.until_ended(2, "done")
        assert len((far.there / "a.tif").read_bytes()) == 2_000
        store.site.stop()


@contextlib.contextmanager
def shown(store: Taking, pool: Path, kind: str) -> Iterator[None]:
    """Show the watched directory at another place."""
    if kind == "overlay":
        work, lower = store.site.base / "work", store.site.base / "lower"
        work.mkdir()
        lower.mkdir()
        layers = f"lowerdir={lower},upperdir={store.site.data},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(pool)], check=True)
        try:
            yield
        finally:
            store.site.stop()
            subprocess.run(["umount", "-l", str(pool)], check=True)
        return
    share = FaultyShare(store.site.data, pool)
    if kind == "stale":
        share.rules({"op": "*", "name": f"{HIDDEN}*", "act": "ENOENT"})
    try:
        yield
    finally:
        store.site.stop()
        share.close()


def test_a_copy_that_was_altered_in_place_keeps_its_source(store: Taking) -> None:
    """Its size, inode and time are what they were; its ctime is not, so both sides are read."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    copy = store.tape / "a.tif"
    seen = copy.stat()
    with copy.open("r+b") as file:
        file.write(b"X" * 500)
    os.utime(copy, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    store.wait(6.0)

    assert store.names() == ["a.tif"]


def test_a_copy_that_was_only_touched_lets_its_source_go(store: Taking) -> None:
    """The archive's own programs set modes and links: it is read once more, and the source goes."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    (store.tape / "a.tif").chmod(0o440)
    store.until_ended(1, "done")


def test_no_clock_tells_whether_a_source_was_touched(store: Taking) -> None:
    """It was a day ahead for the copy and is right again; the source is rewritten with its size and time."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    store.site.stop()
    with closing(sqlite3.connect(store.site.state / "journal.db")) as journal:
        journal.execute("UPDATE attempt SET made_time = made_time + 86400")
        journal.execute("UPDATE proof SET time = time + 86400")
        journal.commit()
    path = store.site.data / "a.tif"
    seen, new = path.stat(), os.urandom(1_000)
    path.write_bytes(new)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    store.site.start()
    store.wait(7.0)

    assert path.read_bytes() == new


def test_a_rule_that_now_sends_elsewhere_has_to_prove_it_there(store: Taking) -> None:
    """Copies that went to the scratch disk are no proof for a rule that says archive."""
    archive = store.site.base / "archive"
    archive.mkdir()
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    store.rules["tape"]["start"]["copy"]["to"] = str(archive)
    store.site.write_rules(*store.rules.values())
    store.reload()
    store.wait(7.0)
    assert store.names() == ["a.tif"]
    assert "`tape` now sends elsewhere" in json.dumps(store.site.json("storage", "reclaim", "--dry-run"))

    store.site.cli("files", "resend", str(store.site.data / "a.tif"))
    store.until_ended(1, "done")
    assert (archive / "a.tif").exists()


def test_a_change_that_waits_for_a_person_keeps_what_it_would_send_again(store: Taking) -> None:
    """`rules apply` may say `all`."""
    store.rules["disk"]["reclaim"]["keep_for"] = "5s"
    store.begin("a.tif")
    link = store.site.base / "datalink"
    link.symlink_to(store.site.data)
    store.rules["tape"]["watch"] = str(link)
    store.site.write_rules(*store.rules.values())
    store.reload()
    store.site.until(lambda: "tape" in store.beat()["undecided"], 20, "it waits for an answer")
    store.wait(7.0)
    assert store.names() == ["a.tif"]
    assert "waits for a decision" in json.dumps(store.site.json("storage", "reclaim", "--dry-run"))

    store.site.cli("rules", "apply", "--choice", "same")
    store.until_ended(1, "done")


@pytest.mark.parametrize("what", ["rules", "settings"])
def test_nothing_goes_while_what_somebody_has_written_is_refused(store: Taking, what: str) -> None:
    """It may be a longer `keep_for`, or `reclaim: disabled`; after a restart too. Corrected, it goes on."""
    store.rules["disk"]["reclaim"]["keep_for"] = "12s"
    store.begin("a.tif")
    if what == "rules":
        (store.site.rules_dir / "more.yaml").write_text("rules: [{name: more}]")
        store.site.until(lambda: store.beat()["rules_fault"], 20, "it is refused")
        store.site.stop()
        store.site.start()
    else:
        store.site.settings["reclaim"] = "disbled"
        store.reload()
        store.site.settings["reclaim"] = "enabled"
    store.site.until(lambda: store.beat()["reclaim"]["held"], 20, "it is refused")
    store.wait(14.0)
    assert store.names() == ["a.tif"] and store.sets() == []
    alarm = next(alarm for alarm in store.beat()["alarms"] if alarm["key"] == what)
    assert "reclaim deletes nothing" in alarm["hint"]
    if what == "rules":
        assert "deletes nothing: the rule files have a fault" in store.site.cli("storage").stdout
        assert "the rule files have a fault: until" in store.about("a.tif")["disk"]["reclaim"]["because"]
        (store.site.rules_dir / "more.yaml").unlink()
    else:
        store.reload()

    store.until_ended(1, "done")


def test_new_contents_with_the_old_size_and_time_stay(store: Taking) -> None:
    """Proved again by reading both sides, they differ."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    path = store.site.data / "a.tif"
    seen = path.stat()
    new = os.urandom(1_000)
    path.write_bytes(new)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    store.wait(8.0)

    assert path.read_bytes() == new


def test_a_source_that_was_only_touched_goes_after_a_new_proof(store: Taking) -> None:
    """chmod changes no content: both sides are read once more, and it goes."""
    store.rules["disk"]["reclaim"]["keep_for"] = "4s"
    store.begin("a.tif")
    (store.site.data / "a.tif").chmod(0o640)
    store.until_ended(1, "done")


def test_a_file_that_was_put_back_stays(store: Taking) -> None:
    """Somebody wants it, and it would go the moment it is there."""
    store.begin("a.tif")
    store.until_ended(1, "done")
    shutil.copy2(store.site.out / "a.tif", store.site.data / "a.tif")
    store.wait(5.0)

    assert store.names() == ["a.tif"]
    assert "put it back" in json.dumps(store.site.json("storage", "reclaim", "--dry-run"))


def test_sets_that_cannot_go_hide_no_others(store: Taking) -> None:
    """However many are open for writing, those behind them go; and a link in the way hides nothing that is left."""
    for name in ("disk", "tape"):
        store.rules[name] |= {"match": ["*/*.tif"], "complete": {"quiescence": "100ms"}}
    for directory in ("s1", "s2", "s3"):
        (store.site.data / directory).mkdir()
    old = [f"s1/{number}.tif" for number in range(70)] + [f"s2/{number}.tif" for number in range(20)]
    store.rules["disk"]["reclaim"]["keep_for"] = "6s"
    store.site.write_rules(*store.rules.values())
    store.site.start()
    for name in [*old, *(f"s3/{number}.tif" for number in range(5))]:
        (store.site.data / name).write_bytes(os.urandom(1_000))
    store.site.until(lambda: store.site.states()["VERIFIED"] == 190, 60, "all is proved")
    store.open += [(store.site.data / name).open("ab") for name in old if name.startswith("s2")]
    (store.site.data / "s1").rename(store.site.base / "s1")
    (store.site.data / "s1").symlink_to(store.site.base / "s1")
    store.site.until(lambda: not list((store.site.data / "s3").iterdir()), 90, "the others have gone")

    assert len(list((store.site.base / "s1").iterdir())) == 70
    assert not [alarm for alarm in store.beat()["alarms"] if alarm["key"].startswith("reclaim:")]
