"""What may be given back: never without present proof, and each refusal has its reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon.control import ControlClient

OLD_S = 86_400.0


class Store:
    """A site with two copies of everything, and what `storage reclaim --dry-run` says of it."""

    def __init__(self, base: Path) -> None:
        self.site = Site(base, quiescence="100ms", sweep="500ms")
        self.tape = base / "tape"
        self.tape.mkdir()
        self.rules: dict[str, dict[str, Any]] = {}
        companion = {"file": "{movie}.xml", "wait": "1s", "missing": "go"}
        self.rule("disk", self.site.out, reclaim={"proven_by": ["disk", "tape"], "keep_for": "1s"},
                  complete={"quiescence": "100ms", "with": [companion]}, match=["{movie}.tif"])  # fmt: skip
        self.rule("tape", self.tape, match=["*.tif", "*.xml"])

    def rule(self, name: str, to: Path, **keys: Any) -> None:
        self.rules[name] = self.site.rule(name, start={"copy": {"to": str(to)}}, **keys)

    def begin(self, *names: str) -> None:
        self.site.write_rules(*self.rules.values())
        self.site.start()
        for name in names or ("a.tif", "a.xml"):
            (self.site.data / name).write_bytes(os.urandom(1_000))
        self.settle()

    def settle(self) -> None:
        wanted = {path.name for path in self.site.data.iterdir() if path.suffix == ".tif"}
        self.site.until(
            lambda: all(len(self.site.taken(rule)) >= len(wanted) for rule in ("disk", "tape") if rule in self.rules)
            and not self.site.ask("SELECT 1 FROM run WHERE final = 0 AND state != 'HELD'"), 30, "all is sent",
        )  # fmt: skip
        self.settle_proofs()

    def settle_proofs(self) -> None:
        """Let `keep_for` be over."""
        proved = self.site.ask("SELECT max(witnessed) FROM proof")[0][0] or 0.0
        beat = ControlClient(self.site.state).heartbeat
        self.site.until(lambda: beat()["reclaim"]["witnessed_s"] > proved + 1.0, 10, "`keep_for` is over")

    def told(self) -> tuple[list[list[str]], list[str]]:
        """Return the sets that could go, as names, and why others are kept."""
        found = self.site.json("storage", "reclaim", "--dry-run")
        sets = [[os.path.basename(path) for path in one["files"]] for one in found["could_go"]]
        return sorted(sets), [one["why"] for one in found["kept"]]

    def kept(self) -> str:
        sets, why = self.told()
        assert sets == []
        return "; ".join(why)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.site.stop()


def test_what_all_have_proved_could_go_with_its_companion(store: Store) -> None:
    """One set; nothing is deleted by asking, and the daemon need not run."""
    store.begin()
    assert store.told() == ([["a.tif", "a.xml"]], [])
    store.site.stop()
    assert store.told() == ([["a.tif", "a.xml"]], [])
    assert "could go: 2 files" in store.site.cli("storage", "reclaim", "--dry-run").stdout

    assert sorted(path.name for path in store.site.data.iterdir()) == ["a.tif", "a.xml"]


def rewritten(store: Store) -> None:
    (store.site.data / "a.tif").write_bytes(os.urandom(1_000))


def same_size_and_time(store: Store) -> None:
    path = store.site.data / "a.tif"
    seen = path.stat()
    path.unlink()
    path.symlink_to(store.site.out / "a.tif")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns), follow_symlinks=False)


def other_name(store: Store) -> None:
    os.link(store.site.data / "a.tif", store.site.base / "other-name")


def copy_changed(store: Store) -> None:
    copy = store.site.out / "a.tif"
    seen = copy.stat()
    copy.write_bytes(bytes(1_000))
    os.utime(copy, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))


def copy_replaced(store: Store) -> None:
    copy, other = store.tape / "a.tif", store.tape / "other"
    shutil.copy2(copy, other)
    other.rename(copy)


def copy_gone(store: Store) -> None:
    (store.tape / "a.tif").unlink()


def companion_copy_gone(store: Store) -> None:
    (store.site.out / "a.xml").unlink()


def companion_gone(store: Store) -> None:
    (store.site.data / "a.xml").unlink()


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (rewritten, "another version"), (same_size_and_time, "no regular file"), (other_name, "hard links"),
        (copy_changed, "was changed or replaced"), (copy_replaced, "was changed or replaced"), (copy_gone, "is gone"),
        (companion_copy_gone, "is gone"), (companion_gone, "companion a.xml is gone"),
    ],
)  # fmt: skip
def test_without_present_proof_nothing_goes(store: Store, attack: Callable[[Store], None], why: str) -> None:
    """Whatever happened to the file, its companion or a copy since: the set is kept, and it is said why."""
    store.begin()
    store.site.stop()
    assert store.told()[0] == [["a.tif", "a.xml"]]
    attack(store)

    assert why in store.kept()


def test_a_rule_that_proof_is_asked_of_must_be_in_force(store: Store) -> None:
    """Removed, it proves nothing."""
    store.begin()
    store.site.stop()
    store.rules["disk"]["reclaim"]["proven_by"] = ["disk"]
    del store.rules["tape"]
    store.site.write_rules(*store.rules.values())
    assert store.told()[0] == [["a.tif", "a.xml"]], "what it has sent and proved is finished with"


def test_a_rule_that_has_not_proved_keeps_the_file(store: Store) -> None:
    """Held at one destination: the other one's proof is not enough."""
    (store.tape / "a.tif").write_bytes(b"somebody else's")
    store.begin()

    assert "`tape` has not proved it: its run is HELD" in store.kept()


def test_a_rule_that_is_gone_keeps_what_it_has_not_finished(store: Store) -> None:
    """Its claim stands, whatever `proven_by` says now."""
    (store.tape / "a.tif").write_bytes(b"somebody else's")
    store.begin()
    store.site.stop()
    store.rules["disk"]["reclaim"]["proven_by"] = ["disk"]
    del store.rules["tape"]
    store.site.write_rules(*store.rules.values())

    assert "`tape`, which is gone, has not finished with it" in store.kept()


def test_another_rule_that_wants_the_file_keeps_it(store: Store) -> None:
    """Also one that proves nothing: a flow may still have to read it."""
    store.begin()
    store.site.stop()
    third = store.site.rule("look", match=["**/*.tif"], start={"command": {"run": ["/bin/true"]}}, proof="none")
    store.site.write_rules(*store.rules.values(), third)
    assert "the rule `look` wants it too, and has not taken it yet" in store.kept()
    store.site.start()
    store.site.until(lambda: bool(store.site.taken("look")), 20, "it has taken it")
    store.site.until(lambda: not store.site.ask("SELECT 1 FROM run WHERE final = 0"), 20, "it has ended")

    assert store.told()[0] == [["a.tif", "a.xml"]]


def test_it_is_kept_as_long_as_the_rule_says(store: Store) -> None:
    """`keep_for` counts from the last proof."""
    store.rules["disk"]["reclaim"]["keep_for"] = "1h"
    store.begin()

    assert "keep_for" in store.kept()


def test_a_companion_of_two_files_goes_with_neither(store: Store) -> None:
    """It is still needed by the other one."""
    store.rules["disk"]["match"] = ["{movie}_{part}.tif"]
    store.begin("a_1.tif", "a_2.tif", "a.xml")

    assert store.told()[0] == [["a_1.tif"], ["a_2.tif"]]


def test_it_deletes_nothing_by_itself(store: Store) -> None:
    """There is no order for it yet, and the command says so."""
    store.begin()
    done = store.site.cli("storage", "reclaim", check=False)

    assert (done.returncode, "--dry-run" in done.stderr) == (1, True)


# ----------------------------------------------------------------------- what explain says of one file


def said(store: Store, name: str, rule: str = "disk") -> dict[str, Any] | None:
    """Return what a rule's `reclaim` says of a file, by explain; text and JSON say the same."""
    path = str(store.site.data / name)
    told = next(one for one in store.site.json("explain", path)["rules"] if one["rule"] == rule)["reclaim"]
    if told is not None:
        shown = store.site.cli("explain", path).stdout.splitlines()
        first = told["because"].partition(" from ")[0]  # the time of day may be a minute further by then
        assert any(line.startswith(f"    reclaim: {first}") for line in shown)
    return told  # type: ignore[no-any-return]


def test_explain_says_whether_a_file_could_go_and_what_it_waits_for(store: Store) -> None:
    """As the dry run does, for this one: with its companion, and with what keeps another."""
    data = store.site.data
    store.site.settings |= {"reclaim": "enabled", "volumes": [{"path": str(data), "low": "1B", "critical": "0B"}]}
    store.begin("a.tif", "a.xml", "b.tif")
    os.link(data / "b.tif", store.site.base / "other-name")
    now = {"could_go": True, "because": f"could go now; {data} is not low", "until_time": None}
    assert said(store, "a.tif") == said(store, "a.xml") == now
    assert said(store, "a.tif", "tape") is None, "it has no `reclaim`"
    kept = "kept: it has more than one name (hard links) - remove the others, or leave it"
    assert said(store, "b.tif") == {"could_go": False, "because": kept, "until_time": None}
    store.site.cli("pause", "--why", "cleaning")
    store.site.until(lambda: bool((store.site.heartbeat() or {})["paused"]), 10, "the heartbeat tells it")
    assert said(store, "a.tif")["because"].startswith(f"{now['because']}; paused by ")
    store.site.stop()

    assert said(store, "a.tif")["because"] == f"could go, once {data} is low; the daemon is not running"
    assert sorted(path.name for path in data.iterdir()) == ["a.tif", "a.xml", "b.tif"]


def test_explain_says_from_when_on_a_file_may_go(store: Store) -> None:
    """`keep_for` is a time of day; where the settings let nothing go, or it is never low, that is said as well."""
    store.rules["disk"]["reclaim"]["keep_for"] = "1h"
    store.site.settings["volumes"] = [{"path": str(store.site.data), "low": "1B", "critical": "0B"}]
    store.begin()
    about = said(store, "a.tif")
    assert about is not None
    assert re.fullmatch(rf"may go from (\S+ )?\d\d:\d\d on, once {store.site.data} is low; but the settings do not"
                        " enable reclaim", about["because"])  # fmt: skip
    assert about["could_go"] is False
    assert 3_000 < datetime.fromisoformat(about["until_time"]).timestamp() - time.time() < 3_700
    store.site.settings["volumes"] = []
    store.site.stop()
    store.site.config.write_text(json.dumps(store.site.settings))

    assert "on none of the `volumes`" in said(store, "a.tif")["because"]


def test_explain_says_that_a_companion_of_several_never_goes(store: Store) -> None:
    """It belongs to none of them alone."""
    store.rules["disk"]["match"] = ["{movie}_{part}.tif"]
    store.begin("a_1.tif", "a_2.tif", "a.xml")

    assert "a companion that belongs to no file alone" in said(store, "a.xml")["because"]


# --------------------------------------------------------------------- copies beside their sources

ONE_DISK = "the copies of disk lie on the same disk as their sources: one broken disk takes both"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_a_proof_on_the_disk_of_the_source_is_told(store: Store) -> None:
    """Where all that is proof lies there: once, on stderr, and nothing is said of what is not there."""
    store.rules["disk"]["reclaim"]["proven_by"] = ["disk"]
    store.begin()
    site, config = store.site, str(store.site.config)
    told = {verbs: site.cli(*verbs).stderr for verbs in (
        ("storage",), ("storage", "reclaim", "--dry-run"), ("rules", "check", "--config", config))}  # fmt: skip
    assert {verbs: words.count(ONE_DISK) for verbs, words in told.items()} == dict.fromkeys(told, 1)
    assert [ONE_DISK in words for words in site.json("storage")["reclaim"]["one_disk"]] == [True]
    store.rules["disk"]["reclaim"]["proven_by"] = ["disk", "tape"]
    site.write_rules(*store.rules.values())
    assert ONE_DISK in site.cli("rules", "check").stderr
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(store.tape)], check=True)
    try:
        assert ONE_DISK not in site.cli("rules", "check").stderr, "one of two proofs lies elsewhere"
    finally:
        subprocess.run(["umount", "-l", str(store.tape)], check=True)
    store.tape.rename(store.tape.with_name("away"))

    assert ONE_DISK not in site.cli("rules", "check").stderr, "where it will lie is not known"


# --------------------------------------------------------- rules and copies that are not what they seem


def test_a_rule_that_knows_the_file_by_another_path_holds_it_back(store: Store, tmp_path: Path) -> None:
    """A link to the watched directory, or a root within it: the same file, and it has not taken it yet."""
    (tmp_path / "alias").symlink_to(store.site.data)
    slow = {"complete": {"quiescence": "1h"}, "match": ["*.tif"]}
    store.rule("slow", tmp_path / "slow", watch=str(tmp_path / "alias"), **slow)
    store.begin()
    assert "the rule `slow` wants it too" in store.kept()


def test_a_removed_rule_with_a_root_of_its_own_keeps_its_claim(store: Store, tmp_path: Path) -> None:
    """Wherever its root was, its run has not ended."""
    inner = store.site.data / "inner"
    inner.mkdir()
    store.rules["disk"] |= {"match": ["**/{movie}.tif"], "complete": {"quiescence": "100ms"}}
    store.rules["tape"] |= {"match": ["**/*.tif"]}
    store.rule("nested", tmp_path / "away", watch=str(inner), match=["*.tif"])
    store.site.write_rules(*store.rules.values())
    store.site.start()
    (inner / "a.tif").write_bytes(os.urandom(1_000))
    store.site.until(lambda: all(store.site.taken(name) for name in store.rules), 30, "all have it")
    store.rules.pop("nested")
    store.site.write_rules(*store.rules.values())
    store.settle_proofs()
    store.site.until(lambda: "nested" in store.kept(), 20, "it is kept for the rule that is gone")
    assert "which is gone, has not finished with it" in store.kept()


def test_what_another_rule_looks_for_as_a_companion_stays(store: Store, tmp_path: Path) -> None:
    """Also where its movie has not come yet, and where it is looked for from another root."""
    movies = tmp_path / "movies"
    movies.mkdir()
    companion = {"file": "{movie}.xml", "in": str(store.site.data), "wait": "1h", "missing": "block"}
    store.rules["disk"] |= {"match": ["*.xml"], "complete": {"quiescence": "100ms"}}
    store.rules["tape"] |= {"match": ["*.xml"]}
    store.rule("movies", tmp_path / "kept", watch=str(movies), match=["{movie}.tif"],
               complete={"quiescence": "100ms", "with": [companion]})  # fmt: skip
    store.site.write_rules(*store.rules.values())
    store.site.start()
    (store.site.data / "m.xml").write_bytes(b"x" * 50)
    store.site.until(lambda: store.site.states()["VERIFIED"] == 2, 30, "both copies are proved")
    store.settle_proofs()
    assert "the rule `movies` looks for it as a companion" in store.kept()


def test_two_rules_with_one_copy_are_one_proof(store: Store) -> None:
    """`proven_by` of two means two copies."""
    store.rules["tape"]["start"] = store.rules["disk"]["start"]
    store.begin()
    assert "are one file" in store.kept()


def test_a_companion_of_a_rule_with_several_patterns_stays(store: Store) -> None:
    """A file by the other pattern may come later, and need it."""
    store.rules["disk"]["match"] = ["{movie}.tif", "{movie}.mrc"]
    store.begin()
    assert store.told()[0] == [["a.tif"]]


def test_a_source_that_was_touched_since_its_copy_is_proved_again_first(store: Store) -> None:
    """Its size and time can be made what they were: its ctime cannot."""
    store.begin()
    path = store.site.data / "a.tif"
    seen = path.stat()
    path.write_bytes(os.urandom(1_000))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert "touched" in store.kept()


def test_what_a_check_may_ask_for_stays_until_it_has_been_taken(store: Store, tmp_path: Path) -> None:
    """Which data files belong to an Eiger set is known when its master is there."""
    store.rules["disk"] |= {"match": ["*.h5"], "complete": {"quiescence": "100ms"}, "ignore": ["*_master.h5"]}
    store.rules["tape"] |= {"match": ["*.h5"], "ignore": ["*_master.h5"]}
    checks = {"quiescence": "100ms", "checks": [{"eiger": {"images": 10}}]}
    (tmp_path / "sets").mkdir()
    store.rule("sets", tmp_path / "sets", match=["*_master.h5"], complete=checks)
    store.site.write_rules(*store.rules.values())
    store.site.start()
    (store.site.data / "x_data_000001.h5").write_bytes(b"x" * 50)
    store.site.until(lambda: store.site.states()["VERIFIED"] == 2, 30, "both copies are proved")
    store.settle_proofs()
    assert "the checks of the rule `sets` may ask for it" in store.kept()
