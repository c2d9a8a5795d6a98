"""What an operator is told: the true reason for every file, and every fault of a rule file with its place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.site import Site


@pytest.fixture
def here(shm_path):
    site = Site(shm_path)
    yield site
    if site.process is not None and site.process.poll() is None:
        site.kill()


def told(site: Site, path: Path, rule: str) -> dict:
    """Return what explain says of a path for one rule."""
    answer = site.json("explain", str(path))
    return next(one for one in answer["rules"] if one["rule"] == rule)


def test_explain_gives_the_true_reason(here):
    """Each stage is named, with words that name the cause."""
    data = here.data
    (data / "old.base").write_text("there before")
    (here.base / "twin").mkdir()
    here.write_rules(
        here.rule("copy", match=["{n}.tif"], ignore=["*_test*"]),
        here.rule("slow", match=["{n}.slow"], complete={"quiescence": "5m"}),
        here.rule(
            "pair",
            match=["{n}.mrc"],
            complete={"quiescence": "300ms", "with": [{"file": "{n}.xml", "wait": "10m", "missing": "block"}]},
        ),
        here.rule(
            "twin",
            match=["{n}.mrc"],
            complete={"quiescence": "300ms", "with": [{"file": "{n}.xml", "wait": "10m", "missing": "block"}]},
            start={"copy": {"to": str(here.base / "twin")}},
        ),
        here.rule("many", match=["{n}.cbf"], batch={"files": 10}),
        here.rule("stopped", match=["{n}.eer"]),
        here.rule("fixed", match=["{n}.fix"], on_rewrite="block"),
        here.rule("base", match=["{n}.base"], existing="ignore"),
        here.rule("first", match=["{n}.one"], batch={"only_first": 1}),
    )
    here.start()
    here.until(
        lambda: bool(here.ask("SELECT 1 FROM baseline JOIN rule ON rule.id = rule AND name = 'base'")), 20, "baseline"
    )
    here.cli("rules", "pause", "stopped")
    for name in ("a.tif", "a_test.tif", "a.txt", "a.slow", "a.mrc", "a.cbf", "a.eer", "a.fix", "a.one"):
        (data / name).write_text(name)
    here.until(lambda: here.states()["VERIFIED"] == 3, 20, "the runs of copy, fixed and first are verified")
    (data / "a.fix").write_text("rewritten")
    (data / "b.one").write_text("second")
    here.until(lambda: told(here, data / "a.fix", "fixed")["stage"] == "blocked", 20, "the rewritten file is blocked")
    here.until(lambda: told(here, data / "a.tif", "copy")["stage"] == "verified", 20, "a.tif is verified")
    here.until(lambda: told(here, data / "a.eer", "stopped")["stage"] == "batched", 20, "a.eer is batched")
    here.until(lambda: told(here, data / "a.mrc", "pair")["stage"] == "incomplete", 20, "a.mrc waits")

    assert told(here, data / "a.txt", "copy")["stage"] == "unmatched"
    ignored = told(here, data / "a_test.tif", "copy")
    assert ignored["stage"] == "ignored" and "*_test*" in ignored["because"]
    slow = told(here, data / "a.slow", "slow")
    assert slow["stage"] == "settling" and slow["until_time"].endswith("Z")
    assert "a.xml" in told(here, data / "a.mrc", "pair")["because"]
    many = told(here, data / "a.cbf", "many")
    assert many["stage"] == "waiting" and "9 missing" in many["because"]
    assert (
        "paused" in told(here, data / "a.eer", "stopped")["because"]
        or "resumed" in told(here, data / "a.eer", "stopped")["because"]
    )
    verified = told(here, data / "a.tif", "copy")
    assert verified["run"] is not None
    assert told(here, data / "old.base", "base")["stage"] == "baseline"
    assert told(here, data / "b.one", "first")["stage"] == "skipped"
    assert told(here, data / "a.xml", "pair")["because"] == "a companion of a.mrc: not there yet"
    (data / "a.xml").write_text("<a/>")
    here.until(lambda: told(here, data / "a.mrc", "pair")["stage"] == "verified", 20, "a.mrc went with its companion")
    assert told(here, data / "a.xml", "pair")["stage"] == "verified"
    here.until(lambda: told(here, data / "a.xml", "twin")["stage"] == "verified", 20, "it went for the other rule, too")
    assert told(here, data / "a.xml", "pair")["stage"] == "verified", "each rule that sent a companion is named"
    (data / "a.tif").write_text("rewritten, and longer")
    here.until(lambda: len(here.manifests("copy")) == 2, 20, "the new version is batched")
    here.until(lambda: told(here, data / "a.tif", "copy")["stage"] == "verified", 20, "and verified")
    here.stop()
    assert told(here, data / "old.base", "base")["stage"] == "baseline"
    assert told(here, data / "a.tif", "copy")["stage"] == "verified"


GOOD = """\
rules:
  - name: good
    watch: {data}
    match: ["{{name}}.tif"]
    existing: process
    start:
      copy: {{to: {out}}}
"""

# Each: what is replaced in the good file, by what, and a word that the message or hint must hold.
FAULTS = {
    "tab": ("    match:", "\tmatch:", "tab"),
    "misspelt key": ("existing:", "exsiting:", "existing"),
    "missing watch": ("    watch: {data}\n", "", "watch"),
    "missing match": ('    match: ["{{name}}.tif"]\n', "", "match"),
    "missing existing": ("    existing: process\n", "", "existing"),
    "bad choice": ("process", "proces", "process"),
    "relative watch": ("watch: {data}", "watch: data", "absolute"),
    "bad name": ("name: good", "name: Good Rule", "name"),
    "unknown action": ("copy:", "coppy:", "copy"),
    "two actions": ("      copy:", "      command: {{run: [/bin/true]}}\n      copy:", "one"),
    "unknown option": ("{{to:", "{{too:", "to"),
    "unknown capture": ("{{to: {out}}}", "{{to: '{out}/{{nam}}'}}", "name"),
    "bad pattern": ("{{name}}.tif", "{{name.tif", "not closed"),
    "bad regex": ("{{name}}.tif", "{{name:[}}.tif", "expression"),
    "no unit": ("existing: process", "existing: process\n    complete: {{quiescence: 30}}", "30s"),
    "bad duration": ("existing: process", "existing: process\n    complete: {{quiescence: soon}}", "duration"),
    "unknown check": ("existing: process", "existing: process\n    complete: {{checks: [tif]}}", "tiff"),
    "batch without an end": ("existing: process", "existing: process\n    batch: {{group_by: [name]}}", "clos"),
    "unknown group capture": (
        "existing: process",
        "existing: process\n    batch: {{files: 5, group_by: [nmae]}}",
        "name",
    ),
    "after nobody": ("existing: process", "existing: process\n    after: {{rule: godo}}", "no rule"),
    "duplicate key": ("existing: process", "existing: process\n    existing: ignore", "twice"),
    "into itself": ("{{to: {out}}}", "{{to: {data}/copies}}", "watch"),
    "no list": ("rules:\n  - name", "rules:\n    name", "list"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_kind_of_fault_is_told_with_its_place_and_a_hint(here, kind):
    """Exit code 3, file:line:column, and what to do."""
    old, new, word = FAULTS[kind]
    assert old in GOOD
    text = GOOD.replace(old, new, 1).format(data=here.data, out=here.out)
    (here.rules_dir / "bad.yaml").write_text(text)
    here.config.write_text(json.dumps(here.settings))
    told = here.cli("rules", "check", check=False)
    words = told.stdout + told.stderr

    assert told.returncode == 3
    assert re.search(r"bad\.yaml:[1-9]\d*:[1-9]\d*: ", words)
    assert word in words
    assert "hint" in words.lower()


def test_faults_are_json_too(here):
    """The interface for programs names the same."""
    (here.rules_dir / "bad.yaml").write_text(GOOD.replace("existing", "exsiting").format(data=here.data, out=here.out))
    here.config.write_text(json.dumps(here.settings))
    answer = here.cli("rules", "check", "-F", "json", check=False)
    faults = {(Path(f["file"]).name, f["line"], f["column"]): f["hint"] for f in json.loads(answer.stdout)["faults"]}

    assert answer.returncode == 3
    assert "existing" in faults[("bad.yaml", 5, 5)]


def test_explain_names_who_left_a_file_out_and_takes_several(here):
    """Who, when and why, from the order; two files in one answer; also with the daemon down."""
    for name in ("a.tif", "b.tif"):
        (here.data / name).write_text(name)
    here.write_rules(here.rule("first", match=["{n}.tif"], complete={"quiescence": "5m"}))
    here.start()
    here.until(lambda: here.heartbeat()["rules"][0]["settling"] == 2, 20, "both are seen")
    here.cli("files", "skip", str(here.data / "a.tif"), "--why", "bad gain")
    here.cli("files", "skip", str(here.data / "b.tif"))
    both = [str(here.data / name) for name in ("a.tif", "b.tif")]
    here.stop()
    told = here.json("explain", *both)["files"]
    shown = here.cli("explain", *both).stdout

    assert [one["path"] for one in told] == both
    because = [one["rules"][0]["because"] for one in told]
    when = r"left this version out at 20\d\d-\d\d-\d\dT[\d:.]+Z \(files skip\)"
    assert re.fullmatch(rf"\S+ {when}: bad gain", because[0])
    assert re.fullmatch(rf"\S+ {when}, without saying why", because[1])
    assert all(words in shown for words in (*both, *because)) and "\n\n" in shown


def test_what_the_text_notes_is_in_the_json_too(here):
    """Rules that ask for what the settings do not enable, and whose copies lie on the disk of their sources."""
    here.write_rules(here.rule("first", reclaim={"proven_by": ["first"]}))
    here.config.write_text(json.dumps(here.settings))
    notes = here.json("rules", "check")["notes"]
    shown = here.cli("rules", "check")

    assert any("the settings do not enable it" in words for words in notes)
    assert len(notes) == 2 and all(words in shown.stderr for words in notes)


def test_running_daemon_keeps_its_last_good_rules_and_says_so(here):
    """A fault refuses the whole set, over a restart too; status names its place."""
    here.write_rules(here.rule("first", match=["{n}.tif"]))
    here.start()
    (here.rules_dir / "rules.yaml").write_text("rules:\n  - nmae: first\n    wacht: /data\n")
    here.until(lambda: here.heartbeat()["rules_fault"] is not None, 20, "the fault is told")
    status = here.json("status")
    many = len(here.json("rules", "check", check=False)["faults"])
    assert many > 1 and status["rules_fault"]["faults"] == many
    assert f"have {many} faults" in here.cli("status").stdout
    assert status["rules_fault"]["line"] == 2 and status["rules_fault"]["file"].endswith("rules.yaml")
    (here.data / "a.tif").write_text("a")
    here.until_verified(1)
    here.kill()
    here.start()
    (here.data / "b.tif").write_text("b")
    here.until_verified(2)

    assert here.json("status")["rules_fault"]["line"] == 2
    here.write_rules(here.rule("first", match=["{n}.tif", "{n}.mrc"]))
    here.until(lambda: here.heartbeat()["rules_fault"] is None, 20, "the mended set is in force")
    (here.data / "c.mrc").write_text("c")
    here.until_verified(3)
    assert os.path.exists(here.out / "c.mrc")
