"""The laws of rule files and settings: what is written is what is meant, and every fault is shown where it stands."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from trigger_daemon import registry
from trigger_daemon.config import (
    ConfigError,
    ConfigFault,
    RuleSet,
    Settings,
    load_rules,
    load_settings,
    parse_rules,
    rules_schema,
)
from trigger_daemon.config.rules import COMPLETE, RULE
from trigger_daemon.config.settings import Amount
from trigger_daemon.core.rules import BUILT_IN_IGNORES, Batch, CloseOn, Complete, Reclaim, Retry, Rule

PROVIDERS = {
    "lab_send.py": """
        from trigger_daemon.core.grammar import Option, OptionFault

        class Action:
            OPTIONS = {
                "to": Option("texts", "directories", required=True, template=True),
                "path": Option("text", "below it", default="/", template=True),
                "level": Option("int", "level", template=True),
                "rate": Option("rate", "limit"),
                "body": Option("map", "sent along", default={}, template=True),
                "how": Option("enum", "how", default="keep", choices=("keep", "flat")),
            }
            VERIFIES = True
            PREPARES = False

            def __init__(self, context):
                raise RuntimeError("nothing of a daemon's life begins while rules are read")

            def check(self, options):
                if options["how"] == "flat" and options["path"] != "/":
                    raise OptionFault("path", "cannot be set when flat", "leave it out")

            def writes(self, options):
                return tuple(options["to"])
    """,
    "lab_run.py": """
        from trigger_daemon.core.grammar import Option

        class Action:
            OPTIONS = {
                "run": Option("texts", "argv", required=True, template=True),
                "verify": Option("texts", "argv", template=True),
            }
            VERIFIES = True
            EXTRA_NAMES = ("manifest",)

            def verifies(self, options):
                return bool(options["verify"])

            def check(self, options): ...
            def writes(self, options): return ()
    """,
    "lab_tell.py": """
        class Action:
            OPTIONS = {}
            VERIFIES = False
            def check(self, options): ...
            def writes(self, options): return ()
    """,
    "lab_broken.py": "import lab_library_nobody_has\n",
    "lab_half.py": "def f(:\n",
    "lab_empty.py": "",
    "lab_frames.py": """
        from trigger_daemon.core.grammar import Option
        OPTIONS = {"frames": Option("int", "how many", minimum=1), "exactly": Option("bool", "not more", default=False)}
        def check(probe, options, companions): ...
    """,
}


@pytest.fixture(autouse=True)
def laboratory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install actions and checks of somebody else, as their package would."""
    site = tmp_path_factory.mktemp("site")
    for name, text in PROVIDERS.items():
        (site / name).write_text(textwrap.dedent(text))
    info = site / "lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[trigger_daemon.actions]\nsend = lab_send:Action\nrun_it = lab_run:Action\ntell = lab_tell\n"
        "broken = lab_broken\nhalf = lab_half\nempty = lab_empty\n"
        "[trigger_daemon.checks]\nlab_frames = lab_frames\n"
    )
    monkeypatch.syspath_prepend(str(site))


RULE_TEXT = """\
rules:
  - name: krios
    watch: /data/krios1
    match: ['{session}/{square}/{movie}_fractions.tiff']
    existing: process
    start: {send: {to: /archive}}
"""


def parse(text: str) -> RuleSet:
    return parse_rules([("a.yaml", text)])


def rule_of(text: str) -> Rule:
    read = parse(text)
    assert read.faults == []
    return read.rules[0]


def with_lines(*lines: str, base: str = RULE_TEXT) -> str:
    """Return a rule file with lines added to its rule; each is in line 7 and later."""
    return base + "".join(f"    {line}\n" for line in lines)


def instead(old: str, new: str) -> str:
    assert old in RULE_TEXT
    return RULE_TEXT.replace(old, new)


def matching(pattern: str) -> str:
    """Return the rule file with another value of `match`."""
    return instead("['{session}/{square}/{movie}_fractions.tiff']", pattern)


def sending(options: str) -> str:
    """Return the rule file with other options of its action."""
    return instead("to: /archive", options)


# ---------------------------------------------------------------------- what is read


def test_a_short_rule_has_the_documented_defaults() -> None:
    """What is not written is what the table of keys says."""
    assert rule_of(RULE_TEXT) == Rule(
        name="krios", watch="/data/krios1", match=("{session}/{square}/{movie}_fractions.tiff",), existing="process",
        action="send",
        options={"to": ["/archive"], "path": "/", "level": None, "rate": None, "body": {}, "how": "keep"},
        ignore=BUILT_IN_IGNORES, proof="required", file="a.yaml", line=2,
    )


def test_every_key_is_read() -> None:
    """A rule with everything in it becomes just that rule."""
    text = """\
rules:
  - name: all-keys
    description: 5 words, or more
    watch: /data//krios1/
    match:
      - '{session}/{square}/{movie}_fractions.tiff'
      - '{session}/{square}/{movie:\\d+}_EER.eer'
    ignore: "**/*_test_*"
    built_in_ignores: false
    case: fold
    existing: ignore
    on_rewrite: block
    priority: -3
    after: {rule: other, same: [session]}
    complete:
      quiescence: 500ms
      trust: [close, rename]
      checks: [lab_frames, lab_frames: {frames: 40}]
      suspect: block
      with:
        - {file: '{session}/{square}/{movie}.xml', in: /mnt/epu, checks: [xml], wait: 1.5h, missing: go, shared: true}
        - file: '{session}/gain.dm4'
      allow_empty: true
      stalled_after: 2h
    batch:
      group_by: [session, square]
      files: 50
      bytes: 1.5GB
      oldest_waits: 10m
      idle: 7d
      expect: 1000
      close_on: {file: '{session}/*.done', checks: [xml], quiescence: 5s, include: true}
      only_first: 10
      new_group_after: 1d
      at: ["06:30", 18:00]
    start:
      send: {to: [/archive, "/b/{session}"], level: "{square|int}", rate: 2Gbit/s, body: {a: ["{batch}"], b: 010}}
    proof: none
    limits: {runs: 1, bandwidth: 200MB/s}
    retry: {initial: 1s, longest: 1m, give_up_after: 1d}
    reclaim: {proven_by: [other], keep_for: 3d, only_under: always}
  - {name: other, watch: /data, match: '{session}.x', existing: process, start: {send: {to: /archive}}}
"""
    text = text.replace("b: 010", "b: 10")
    rule = rule_of(text)

    assert rule.watch == "/data/krios1"
    assert rule.ignore == ("**/*_test_*",)
    assert (rule.case, rule.existing, rule.on_rewrite, rule.priority) == ("fold", "ignore", "block", -3)
    assert rule.after is not None
    assert (rule.after.rule, rule.after.same) == ("other", ("session",))
    first, second = rule.complete.companions
    assert (first.root, first.wait_s, first.missing, first.shared) == ("/mnt/epu", 5400.0, "go", True)
    assert first.checks == (("xml", {}),)
    assert (second.root, second.wait_s, second.missing) == ("/data/krios1", 600.0, "block")
    frames: Any = (("lab_frames", {"frames": None, "exactly": False}), ("lab_frames", {"frames": 40, "exactly": False}))
    assert rule.complete == Complete(
        quiescence_s=0.5, trust=frozenset({"close", "rename"}), checks=frames, suspect_s=None,
        companions=(first, second), allow_empty=True, stalled_after_s=7200.0,
    )
    assert rule.batch == Batch(
        group_by=("session", "square"), files=50, bytes=1_500_000_000, oldest_waits_s=600.0, idle_s=604_800.0,
        expect=1000, close_on=CloseOn("{session}/*.done", (("xml", {}),), 5.0, True), only_first=10,
        new_group_after_s=86_400.0, at=("06:30", "18:00"),
    )
    assert rule.options == {
        "to": ["/archive", "/b/{session}"], "path": "/", "level": "{square|int}", "rate": 250_000_000,
        "body": {"a": ["{batch}"], "b": 10}, "how": "keep",
    }
    assert (rule.proof, rule.runs_max, rule.bandwidth) == ("none", 1, 200_000_000)
    assert rule.retry == Retry(1.0, 60.0, 86_400.0)
    assert rule.reclaim == Reclaim(("other",), 259_200.0, "always")


def test_the_example_of_the_handbook_parses() -> None:
    """The rule that people copy first is one that works."""
    text = """\
rules:
  - name: krios-movies
    description: K3 movies to the cluster, checked, then freed here
    watch: /data/krios1
    match: ["{session}/Images-Disc{disc}/{square}/Data/{movie}_fractions.tiff"]
    ignore: ["**/*_test_*"]
    existing: process
    priority: 10
    complete:
      quiescence: 30s
      checks: [tiff: {frames: 40}]
      with:
        - {file: "{session}/Images-Disc{disc}/{square}/Data/{movie}.xml",
           in: /mnt/epu, checks: [xml], wait: 10m, missing: block}
    batch:
      group_by: [session, square]
      files: 50
      oldest_waits: 10m
    start:
      send: {to: /cryoem/raw}
    reclaim: {proven_by: [krios-movies], keep_for: 2d, only_under: low}
"""
    rule = rule_of(text)

    assert rule.complete.checks == (("tiff", {"frames": 40}),)
    assert rule.batch == Batch(group_by=("session", "square"), files=50, oldest_waits_s=600.0)


@pytest.mark.parametrize(
    ("start", "proof"),
    [("{send: {to: /a}}", "required"), ("tell", "none"), ("{run_it: {run: x}}", "none"),
     ("{run_it: {run: x, verify: [y]}}", "required")],
)  # fmt: skip
def test_proof_is_required_wherever_the_action_can_verify(start: str, proof: str) -> None:
    """Nobody forgets proof: it is asked for unless the action cannot give it."""
    assert rule_of(instead("{send: {to: /archive}}", start)).proof == proof


@pytest.mark.parametrize(
    ("written", "watch"),
    [(r"C:\data\krios", "C:/data/krios"), ("C:/data/", "C:/data"), ("X:\\", "X:/"),
     (r"\\server\share\d", "//server/share/d"),
     ("/data/./krios//x/", "/data/krios/x"), ("'/data/Lamella (2) [x]'", "/data/Lamella (2) [x]")],
)  # fmt: skip
def test_roots_are_written_one_way(written: str, watch: str) -> None:
    """Windows roots and doubled separators are understood."""
    assert rule_of(instead("/data/krios1", written)).watch == watch


def test_a_windows_root_has_windows_patterns() -> None:
    """Backslashes separate below a Windows root; elsewhere they are part of names."""
    text = instead("{session}/{square}/{movie}_fractions.tiff", r"{s}\{n:\d+}.tif")

    assert rule_of(text.replace("/data/krios1", r"X:\frames")).match == (r"{s}/{n:\d+}.tif",)
    assert rule_of(text).match == (r"{s}\{n:\d+}.tif",)


def test_aliases_are_understood() -> None:
    """What stands in several rules can be written once."""
    second = instead("rules:\n", "").replace("krios\n", "second\n") + "    complete: *c\n"
    text = with_lines("complete: &c {quiescence: 5s}") + second

    assert [rule.complete.quiescence_s for rule in parse(text).rules] == [5.0, 5.0]
    assert parse(text).faults == []


# -------------------------------------------------------------------------- faults


FAULTS: dict[str, tuple[str, int, int, str, str]] = {
    # what: text, line, column, words of the message, words of the hint
    "misspelt key": (with_lines("priorty: 3"), 7, 5, "unknown key `priorty`", "`priority`"),
    "key of a section": (with_lines("quiescence: 3s"), 7, 5, "unknown key `quiescence`", "under `complete:`"),
    "nested key": (with_lines("complete: {quiescense: 3s}"),
        7, 16, "unknown key `quiescense` in `complete`", "`quiescence`"),
    "key twice": (with_lines("existing: ignore"), 7, 5, "`existing` is written twice", "line 5"),
    "missing key": (instead("    existing: process\n", ""), 2, 5, "lacks the key `existing`", "process or ignore"),
    "bare number": (with_lines("complete: {quiescence: 30}"), 7, 28, "30 has no unit", "30s"),
    "bad duration": (with_lines("complete:", "  quiescence: 30 sec"), 8, 19, "'30 sec' is not a duration", "unit"),
    "bad size": (with_lines("batch: {bytes: 10 mb}"), 7, 20, "is not a size", "unit"),
    "bad rate": (with_lines("limits: {bandwidth: 200MB}"), 7, 25, "is not a rate", "unit"),
    "bad choice": (instead("process", "proces"), 5, 15, "`existing` must be one of", "`process`"),
    "yes for true": (with_lines("built_in_ignores: yes"), 7, 23, "true or false", "true"),
    "octal": (with_lines("priority: 010"), 7, 15, "leading 0", "write 10"),
    "underscore": (with_lines("batch: {files: 1_000}"), 7, 20, "whole number", "write 1000"),
    "too small": (with_lines("batch: {files: 0}"), 7, 20, "at least 1", ""),
    "empty value": (with_lines("complete:"), 7, 5, "`complete` is empty", "quiescence"),
    "sexagesimal": (with_lines("batch: {at: [6:30]}"), 7, 18, "not a time of day", '"06:30"'),
    "unquoted pattern": (matching("{s}/x"), 4, 12, "must be quoted", "'{s}/x'"),
    "unquoted in a list": (matching("[{s}/x, b]"), 4, 13, "must be quoted", "'{s}/x'"),
    "unquoted alone": (matching("{s}"), 4, 12, "must be quoted", "'{s}'"),
    "unquoted star": (matching("*.tif"), 4, 12, "must be quoted", "'*.tif'"),
    "double-quoted regex": (instead("'{session}/{square}/{movie}_fractions.tiff'", r'"{n:\d+}"'),
        4, 18, "backslash", "single quotes"),
    "tab": (RULE_TEXT + "\tpriority: 1\n", 7, 1, "'\\t'", "spaces"),
    "indentation": (RULE_TEXT + "   priority: 1\n", 7, 4, "block end", "indented"),
    "unclosed": (with_lines("complete: {quiescence: 3s"), 7, 30, "the end of the file", "closed"),
    "second document": (RULE_TEXT + "---\nrules: []\n", 7, 1, "second document", "---"),
    "a tag": (with_lines("priority: !!python/object:os.system 3"), 7, 15, "tags such as", "remove"),
    "own tag": (with_lines("priority: !number 3"), 7, 15, "tags", "remove"),
    "merge": (with_lines("<<: {priority: 1}"), 7, 5, "merge", "write the keys out"),
    "control character": ("rules: \x07\n", 1, 8, "U+0007", "damaged"),
    "no mapping": ("- name: x\n", 1, 1, "the key `rules`", "`rules:`"),
    "scalar file": ("rules\n", 1, 1, "the key `rules`", "`rules:`"),
    "empty file": ("", 1, 1, "empty", "rules: []"),
    "only comments": ("# nothing yet\n", 1, 1, "empty", "rules: []"),
    "no rules": ("rules:\n", 1, 1, "`rules` is empty", "rules: []"),
    "rules as mapping": ("rules:\n  krios: {}\n", 2, 3, "must be a list", "- name"),
    "rule outside": ("name: x\n", 1, 1, "unknown key `name`", "below `rules:`"),
    "bad name": (instead("krios\n", "Krios Movies\n"), 2, 11, "no name of a rule", "`krios-movies`"),
    "relative root": (instead("/data/krios1", "data"), 3, 12, "absolute path", "/data"),
    "whole disk": (instead("/data/krios1", "/"), 3, 12, "whole file system", "directory"),
    "root with parent": (instead("/data/krios1", "/data/../x"), 3, 12, "`..`", "itself"),
    "root with wildcard": (instead("/data/krios1", "/data/*"), 3, 12, "wildcards", "`match`"),
    "no pattern": (matching("[]"), 4, 12, "`match` is empty", "pattern"),
    "bad pattern": (instead("{square}", "it''s {sq-uare}"), 4, 31, "'sq-uare'", "letters"),
    "bad regex": (instead("{square}", r"{n:\d+(}"), 4, 30, "unterminated", "re.html"),
    "endless regex": (instead("{square}", r"{n:(a+)+}"), 4, 31, "repetition", "[a-z0-9_]+"),
    "pattern from the top": (instead("{session}/", "/data/"), 4, 14, "below the watched directory", "leave out"),
    "bad ignore": (with_lines("ignore: ['*.tmp', '{x']"), 7, 24, "not closed", "{{"),
    "never matches": (instead("{movie}_fractions.tiff", ".{movie}"),
        4, 13, "`.*` ignores all of it", "built_in_ignores: false"),
    "unknown check": (with_lines("complete: {checks: [tif]}"), 7, 25, "no check `tif`", "`tiff`"),
    "unknown check option": (with_lines("complete: {checks: [lab_frames: {frame: 3}]}"),
        7, 38, "no option `frame`", "`frames`"),
    "check option": (with_lines("complete: {checks: [lab_frames: {frames: 0}]}"), 7, 46, "at least 1", ""),
    "no space": (with_lines("complete: quiescence:30s"), 7, 15, "must be a mapping", "space after the colon"),
    "text for a mapping": (with_lines("complete: 30s"), 7, 15, "must be a mapping", "line of its own"),
    "checks as mapping": (with_lines("complete: {checks: {lab_frames: {frames: 4}}}"),
        7, 24, "must be a list", "- tiff"),
    "two checks in one": (with_lines("complete: {checks: [{tiff: , xml: }]}"), 7, 25, "exactly one check", "indented"),
    "unknown action": (instead("send", "sent"), 6, 13, "no action `sent`", "`send`"),
    "broken action": (instead("send", "broken"), 6, 13, "no module `lab_library_nobody_has`", "install"),
    "half-written action": (instead("send", "half"), 6, 13, "SyntaxError", "lab_half"),
    "empty action": (instead("send", "empty"), 6, 13, "no class `Action`", "actions/__init__.py"),
    "no action": (instead("{send: {to: /archive}}", "{}"), 6, 12, "names no action", "send"),
    "two actions": (instead("{send: {to: /archive}}", "{send: {to: /a}, tell: }"),
        6, 12, "exactly one action", "indented"),
    "unknown option": (sending("to: /archive, pth: x"), 6, 34, "no option `pth`", "`path`"),
    "missing option": (sending("path: x"), 6, 13, "needs the option `to`", "directories"),
    "options together": (sending("to: /a, path: /x, how: flat"), 6, 34, "cannot be set when flat", "leave it out"),
    "unknown template name": (sending("to: '/a/{sesion}'"), 6, 28, "nothing is called `sesion`", "`session`"),
    "template in depth": (sending("to: /a, body: {x: [1, '{squar}']}"), 6, 43, "nothing is called `squar`", "`square`"),
    "open template": (sending("to: '/a/{session'"), 6, 28, "name of a capture", "{{"),
    "number in a text": (sending("to: '{square|int}'"), 6, 25, "is a number", "'{square}'"),
    "manifest elsewhere": (sending("to: '/{manifest}'"), 6, 26, "nothing is called `manifest`", ""),
    "ambiguous name": (
        instead("{movie}", "{date}").replace("/archive", "'/{date}'"), 6, 26, "means both", "another name"),
    "never closes": (with_lines("batch: {group_by: [session]}"), 7, 12, "never closes", "files"),
    "unknown group": (with_lines("batch: {group_by: [session, squre], files: 3}"),
        7, 33, "no capture `squre`", "`square`"),
    "not in every pattern": (
        instead("['{session}", "['{session}/x', '{session}")
        .replace("existing", "batch: {group_by: square, files: 2}\n    existing"),
        5, 23, "not in every pattern", "two rules"),
    "differs in a batch": (
        sending("to: '/{movie}'") + "    batch: {group_by: session, files: 2}\n",
        6, 26, "different `movie`", "group_by"),
    "wildcard companion": (with_lines("complete: {with: [{file: '{session}/*.xml'}]}"),
        7, 41, "exactly one file", "captured"),
    "regex companion": (with_lines(r"complete: {with: [{file: '{session}/{n:\d+}.xml'}]}"),
        7, 41, "exactly one file", "captured"),
    "companion capture": (with_lines("complete: {with: [{file: '{sesion}.xml'}]}"),
        7, 31, "no capture `sesion`", "`session`"),
    "companion root": (with_lines("complete: {with: [{file: '{session}.xml', in: epu}]}"), 7, 51, "absolute path", "/"),
    "marker capture": (with_lines("batch: {close_on: {file: '{sesion}/done'}}"),
        7, 31, "no capture `sesion`", "`session`"),
    "bad marker": (with_lines("batch: {close_on: {file: 'a{'}}"), 7, 32, "not closed", "{{"),
    "proof impossible": (instead("{send: {to: /archive}}", "tell") + "    proof: required\n",
        7, 12, "cannot verify", "proof: none"),
    "proof needs an option": (
        instead("{send: {to: /archive}}", "{run_it: {run: x}}") + "    proof: required\n",
        7, 12, "with these options", "verifies"),
    "after nobody": (with_lines("after: {rule: krio}"), 7, 19, "no rule `krio`", "no other"),
    "after itself": (with_lines("after: {rule: krios}"), 7, 19, "circle: krios -> krios", "remove"),
    "proven by nobody": (with_lines("reclaim: {proven_by: [krio]}"), 7, 27, "no rule `krio`", "`krios`"),
    "proven by none": (with_lines("proof: none", "reclaim: {proven_by: [krios]}"),
        8, 27, "proves nothing", "proof: required"),
    "retry": (with_lines("retry: {initial: 5m, longest: 1m}"), 7, 22, "`initial`", "5s"),
    "endless loop": (sending("to: [/archive, /data/krios1/copies]"), 6, 35, "lies inside /data/krios1", "copies/"),
    "loop by a template": (sending("to: '/data/krios1/{session}'"), 6, 24, "lies inside", "elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_every_fault_is_shown_where_it_stands(what: str) -> None:
    """A fault names line and column, quotes the line, and says what to write instead; and comes alone."""
    text, line, column, words, hint = FAULTS[what]
    faults = parse(text).faults
    fault = faults[0]

    assert (fault.file, fault.line, fault.column) == ("a.yaml", line, column), fault
    assert words in fault.message
    assert hint in fault.hint
    assert fault.quote == (text.splitlines() or [""])[line - 1]
    if what != "rule outside":
        assert len(faults) == 1, faults


def test_all_faults_are_told_at_once() -> None:
    """Nobody mends a file one fault at a time."""
    text = with_lines(
        "priorty: 1", "complete: {quiescence: 30, checks: [tif, xml, lab_frames: {x: 1}]}", "batch: {files: x}",
    )
    faults = parse(text).faults

    assert [(fault.line, fault.column) for fault in faults] == [(7, 5), (8, 28), (8, 41), (8, 64), (9, 20)]


def two(first: str, second: str) -> list[ConfigFault]:
    base = RULE_TEXT.replace("krios\n", "{}\n")
    return parse_rules([
        ("a.yaml", base.replace("{}\n", "one\n") + first), ("b.yaml", base.replace("{}\n", "two\n") + second),
    ]).faults


def test_names_are_unique_over_all_files() -> None:
    """The second of two is told where the first one stands."""
    faults = parse_rules([("a.yaml", RULE_TEXT), ("b.yaml", RULE_TEXT)]).faults

    assert [(f.file, f.line, f.column) for f in faults] == [("b.yaml", 2, 11)]
    assert "a.yaml:2" in faults[0].hint


def test_after_must_not_go_in_a_circle() -> None:
    """Rules that wait for each other would wait for ever; both are told."""
    faults = two("    after: {rule: two}\n", "    after: {rule: one}\n")

    assert [(f.file, f.line, f.column) for f in faults] == [("a.yaml", 7, 19), ("b.yaml", 7, 19)]
    assert "one -> two -> one" in faults[0].message


def test_after_same_names_captures_of_both_groups() -> None:
    """A capture that one of the two lacks could never agree."""
    faults = two(
        "    after: {rule: two, same: [session, movie]}\n", "    batch: {group_by: [session, square], files: 3}\n",
    )

    assert [(f.file, f.line, f.column) for f in faults] == [("a.yaml", 7, 40)]
    assert "`group_by` of the rule `two` has no capture `movie`" in faults[0].message


def test_after_another_rule_is_fine() -> None:
    """What other files define can be waited for and proved by."""
    assert two("    after: {rule: two, same: [session]}\n    reclaim: {proven_by: [one, two]}\n", "") == []


def test_a_destination_in_another_rules_root_is_a_loop_too() -> None:
    """Copies would be new files of the other rule; where it ignores them, they are not."""
    base = RULE_TEXT.replace("/archive", "/data/krios2/from1/x")
    other = RULE_TEXT.replace("krios\n", "other\n").replace("krios1", "krios2")
    loop = parse_rules([("a.yaml", base), ("b.yaml", other)])
    ignored = parse_rules([("a.yaml", base), ("b.yaml", other + "    ignore: [from1/]\n")])

    assert [(f.file, f.line, f.column) for f in loop.faults] == [("a.yaml", 6, 24)]
    assert "`other`" in loop.faults[0].message
    assert ignored.faults == []


def test_a_copy_into_its_own_root_is_a_loop() -> None:
    """The action at hand is held to it, wherever its templates begin."""
    text = instead("{send: {to: /archive}}", "{copy: {to: [/archive, '/data/krios1/x/{session}']}}")

    assert [(f.line, f.column) for f in parse(text).faults] == [(6, 35)]


def test_nested_roots_are_allowed() -> None:
    """A file may match several rules, below several roots."""
    other = RULE_TEXT.replace("krios\n", "other\n").replace("/data/krios1", "/data")

    assert parse_rules([("a.yaml", RULE_TEXT), ("b.yaml", other)]).faults == []


def test_yaml_is_1_2_whatever_a_file_says() -> None:
    """`yes` and `1:30` are texts, and a directive changes nothing of it."""
    assert rule_of("%YAML 1.1\n---\n" + with_lines("description: yes")).description == "yes"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: " + "[" * 5_000, "nested"),
        ("rules: [" + "x" * 1_000_001, "larger than"),
        ("rules: &a [*a]\n", ""),
        ("rules: []\n" + "a: &a [x,x,x,x,x,x,x,x,x]\n"
         + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), ""),
        (with_lines("complete: &c", "  with: [*c]"), ""),
        ("rules:\n" + "".join(f"  - {{name: r{i}}}\n" for i in range(1_001)), "at most 1,000"),
    ],
)  # fmt: skip
def test_no_file_unfolds_without_end(text: str, words: str) -> None:
    """Whatever is written, reading ends with a fault and not with the memory."""
    faults = parse(text).faults

    assert faults
    assert any(words in fault.message + fault.hint for fault in faults)


def test_options_with_an_alias_bomb_are_refused() -> None:
    """Free mappings are the only place where a file could unfold into memory."""
    bomb = "&a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
        f"&{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(8)
    )
    faults = parse(sending(f"to: /a, body: {{x: [{bomb}]}}")).faults

    assert any("unfolds" in fault.message for fault in faults)


# --------------------------------------------------------------------------- files


def test_a_directory_of_rules(tmp_path: Path) -> None:
    """All `*.yaml`, in the order of their names; hidden files and leftovers of editors are not rules."""
    (tmp_path / "b.yaml").write_text(RULE_TEXT.replace("krios\n", "b\n"))
    (tmp_path / "a.yaml").write_text("\ufeff" + RULE_TEXT.replace("krios\n", "a\n").replace("\n", "\r\n"), newline="")
    for name in (".#a.yaml", "a.yaml~", "notes.txt"):
        (tmp_path / name).write_text("no rules")
    read = load_rules(tmp_path)

    assert read.faults == []
    assert [rule.name for rule in read.rules] == ["a", "b"]
    assert [Path(entry["file"]).name for entry in read.source] == ["a.yaml", "b.yaml"]
    assert parse_rules([(entry["file"], entry["text"]) for entry in read.source]).rules == read.rules


def test_files_that_cannot_be_read_are_faults(tmp_path: Path) -> None:
    """A file that is left out in silence would be a rule that is left out in silence."""
    (tmp_path / "a.yaml").write_bytes(RULE_TEXT.encode() + "    description: für\n".encode("latin-1"))
    (tmp_path / "b.yml").write_text(RULE_TEXT)
    (tmp_path / "c.yaml").mkdir()
    os.mkfifo(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").symlink_to(tmp_path / "gone")
    faults = {Path(fault.file).name: fault for fault in load_rules(tmp_path).faults}

    assert (faults["a.yaml"].line, faults["a.yaml"].column) == (7, 19)
    assert "UTF-8" in faults["a.yaml"].message
    assert "b.yaml" in faults["b.yml"].hint
    assert "regular file" in faults["c.yaml"].message
    assert "regular file" in faults["d.yaml"].message
    assert "cannot be read" in faults["e.yaml"].message


def test_a_missing_rules_directory_is_a_fault(tmp_path: Path) -> None:
    """No rules because of a wrong path is not the same as no rules."""
    faults = load_rules(tmp_path / "none").faults

    assert len(faults) == 1
    assert "rules_dir" in faults[0].hint


# ------------------------------------------------------------------------ registry


def test_providers_are_found_by_name() -> None:
    """Ours by their file name, others by their entry point; what is broken is only missed by who asks for it."""
    assert {"send", "run_it", "tell", "broken"} <= set(registry.action_names())
    assert {"tiff", "mrc", "lab_frames"} <= set(registry.check_names())
    assert not [name for name in registry.action_names() + registry.check_names() if name.startswith("_")]
    assert registry.find_check("tiff").__name__ == "trigger_daemon.checks.tiff"
    assert registry.extra_names(registry.find_action("run_it")) == ("manifest",)


# -------------------------------------------------------------------------- schema


def test_the_schema_and_the_reader_agree() -> None:
    """An editor accepts what the daemon accepts, and refuses the plain mistakes."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = rules_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid

    def plain(text: str) -> Any:
        return YAML(typ="safe", pure=True).load(text)

    assert valid(plain(RULE_TEXT))
    assert set(schema["$defs"]["rule"]["properties"]) == set(RULE)
    for what in (
        "misspelt key", "nested key", "missing key", "bare number", "bad duration", "bad size", "bad choice",
        "too small",
        "unknown check", "unknown check option", "unknown action", "unknown option", "missing option", "bad name",
        "relative root", "two actions", "no pattern",
    ):  # fmt: skip
        assert not valid(plain(FAULTS[what][0])), what


def test_example_rules_are_valid_and_satisfy_the_schema() -> None:
    """Every example in `rules/` is read without a fault, where its actions are there."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(rules_schema())
    for file in sorted((Path(__file__).parent.parent / "rules").glob("*.yaml")):
        faults = parse_rules([(file.name, file.read_text())]).faults
        if any("there is no" in fault.message for fault in faults):
            continue  # needs a provider that is not installed here

        assert faults == []
        assert list(validator.iter_errors(YAML(typ="safe", pure=True).load(file.read_text()))) == []


def test_the_documented_keys_are_all_there() -> None:
    """The table of keys in the handbook is the table the reader uses."""
    assert set(RULE) == {
        "name", "description", "watch", "match", "ignore", "built_in_ignores", "case", "existing", "on_rewrite",
        "priority",
        "after", "complete", "batch", "start", "proof", "limits", "retry", "reclaim",
    }  # fmt: skip
    assert set(COMPLETE.fields) == {"quiescence", "trust", "checks", "suspect", "with", "allow_empty", "stalled_after"}


# ------------------------------------------------------------------------ settings


SETTINGS = """\
state_dir: /var/x/
sweep: {every: 10s}
volumes:
  - path: /data
    reserve: 500GB
    low: 20%
    enough: 30%
    critical: 5%
    on_critical: ["/usr/local/bin/pause-acquisition"]
throttle:
  bandwidth: 2Gbit/s
  while: [{cpu_above: 80%}, {io_pressure_above: 30%}, {process: SerialEM, bandwidth: 200MB/s}]
globus: {collections: {AAAAAAAA-0000-4000-8000-000000000001: {/data: /krios1}}}
"""


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., Settings]:
    def load(text: str, **env: str) -> Settings:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load_settings(file, env)

    return load


def test_settings_have_the_documented_defaults(settings_of: Callable[..., Settings]) -> None:
    """An empty file changes nothing."""
    settings = settings_of("# nothing\n")

    assert (settings.state_dir, settings.rules_dir, settings.events) == (
        "/var/lib/trigger-daemon", "/etc/trigger-daemon/rules", "auto",
    )
    assert (settings.sweep.every_s, settings.sweep.full_s, settings.keep_done_s) == (30.0, 900.0, 7_776_000.0)
    assert (settings.throttle.runs, settings.reclaim, settings.time_zone) == (4, "disabled", None)
    assert settings.model_dump() == Settings().model_dump()


def test_settings_are_read(settings_of: Callable[..., Settings]) -> None:
    """Amounts are bytes or ratios, rates bytes per second; what is not written keeps its default."""
    settings = settings_of(SETTINGS)

    assert settings.state_dir == "/var/x"
    assert (settings.sweep.every_s, settings.sweep.full_s) == (10.0, 900.0)
    volume = settings.volumes[0]
    assert (volume.reserve, volume.low) == (Amount(bytes=500 * 10**9), Amount(ratio=0.2))
    assert volume.reserve.of(1) == 500 * 10**9
    assert volume.low is not None
    assert volume.low.of(1000) == 200
    assert settings.throttle.bandwidth == 250_000_000
    assert [(one.cpu_above, one.process, one.bandwidth) for one in settings.throttle.while_] == [
        (0.8, None, None), (None, None, None), (None, "SerialEM", 200_000_000),
    ]
    assert settings.globus.plain()["collections"] == {"aaaaaaaa-0000-4000-8000-000000000001": {"/data": "/krios1"}}


def test_the_environment_overrides_the_file(settings_of: Callable[..., Settings]) -> None:
    """Nested keys by a double underscore, lists as JSON; what stands beside stays."""
    settings = settings_of(
        SETTINGS, TRIGGER_DAEMON_SWEEP__FULL="1h", TRIGGER_DAEMON_THROTTLE__RUNS="8",
        TRIGGER_DAEMON_MQTT__HOST="broker",
        TRIGGER_DAEMON_VOLUMES='[{"path": "/other"}]', TRIGGER_DAEMON_RECLAIM="enabled", HOME="/x",
    )

    assert (settings.sweep.every_s, settings.sweep.full_s) == (10.0, 3600.0)
    assert (settings.throttle.runs, settings.throttle.bandwidth) == (8, 250_000_000)
    assert (settings.mqtt.host, settings.mqtt.port_or_default) == ("broker", 1883)
    assert [volume.path for volume in settings.volumes] == ["/other"]
    assert settings.reclaim == "enabled"


def test_only_what_is_passed_counts(settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """The process environment reaches settings only through the argument."""
    monkeypatch.setenv("TRIGGER_DAEMON_EVENTS", "none")
    monkeypatch.setenv("EVENTS", "none")

    assert settings_of("").events == "auto"


@pytest.mark.parametrize(
    ("text", "line", "column", "words", "hint"),
    [
        ("stat_dir: /x\n", 1, 1, "unknown setting `stat_dir`", "`state_dir`"),
        ("sweep: {ful: 3m}\n", 1, 9, "unknown setting `ful`", "`full`"),
        ("sweep: {every: 30}\n", 1, 16, "30 has no unit", "30s"),
        ("sweep: 3\n", 1, 8, "must be a mapping", "indent"),
        ("\nevents: inotfy\n", 2, 9, "must be one of", "`inotify`"),
        ("reclaim: true\n", 1, 10, "`true` is not understood", "enabled"),
        ("state_dir: var\n", 1, 12, "absolute path", "/data"),
        ("time_zone: Europe/Berln\n", 1, 12, "not a time zone", ""),
        ("throttle: {runs: many}\n", 1, 18, "whole number", "4"),
        ("throttle:\n  while: [{cpu_above: 80%, process: x}]\n", 2, 11, "exactly one condition", "cpu_above"),
        ("throttle:\n  while: [{cpu_above: 80}]\n", 2, 23, "80 has no unit", "80%"),
        ("volumes:\n  - reserve: 5GB\n", 2, 5, "lacks the key `path`", "add"),
        ("volumes:\n  - {path: /d, low: 5%, critical: 10%}\n", 2, 35, "`critical` must not be more", "free space"),
        ("volumes:\n  - {path: /d, low: 3%}\n", 2, 21, "`critical` must not be more", "`critical` is 5% unless"),
        ("volumes:\n  - {path: /d, critical: 30%}\n", 2, 26, "`critical` must not be more", "`low` is 20% unless"),
        ("volumes:\n  - {path: /d, low: 5 percent}\n", 2, 21, "is not a size", "unit"),
        ("volumes:\n  - {path: /d, low: 140%}\n", 2, 21, "from 0% to 100%", "number"),
        ("log: {level: loud}\n", 1, 14, "must be one of", "info"),
        ("keep_done: 0s\n", 1, 12, "greater than 0", ""),
        ("events: auto\nevents: none\n", 2, 1, "written twice", "line 1"),
        ("events: [\n", 1, 10, "end of the file", "closed"),
        ("- events\n", 1, 1, "mapping", "key: value"),
    ],
)
def test_faults_of_settings(
    settings_of: Callable[..., Settings], text: str, line: int, column: int, words: str, hint: str
) -> None:
    """Settings have faults as exact as rules have."""
    with pytest.raises(ConfigError) as caught:
        settings_of(text)
    fault = caught.value.faults[0]

    assert (fault.line, fault.column) == (line, column)
    assert words in fault.message
    assert hint in fault.hint
    assert fault.quote == text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TRIGGER_DAEMON_SWEEP__EVERY", "30", "30 has no unit"),
        ("TRIGGER_DAEMON_EVENT", "none", "unknown setting `event`"),
        ("TRIGGER_DAEMON_SWEEP__EVRY", "30s", "unknown setting `evry`"),
        ("TRIGGER_DAEMON_VOLUMES", "[{", "cannot be read"),
    ],
)
def test_faults_of_variables_name_the_variable(
    settings_of: Callable[..., Settings], variable: str, value: str, words: str
) -> None:
    """Who set a variable is told which one."""
    with pytest.raises(ConfigError) as caught:
        settings_of("", **{variable: value})
    fault = caught.value.faults[0]

    assert (fault.file, fault.line) == (variable, 0)
    assert words in fault.message


def test_a_missing_file_is_a_fault_only_if_it_was_named(tmp_path: Path) -> None:
    """The default file may be absent; a wrong --config may not."""
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none.yaml"))):
        load_settings(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError):
        load_settings(None, {"TRIGGER_DAEMON_CONFIG": str(tmp_path / "none.yaml")})


@pytest.mark.parametrize("text", ["!!set {a}\n", "&a !b\n", "!!binary xx\n"])
def test_a_tag_on_the_whole_document_is_a_fault(text):
    """It was an exception once, and the daemon did not start."""
    faults = parse_rules([("z.yaml", text)]).faults

    assert faults and faults[0].file == "z.yaml"


_SECRET = "c2VjcmV0LXZhbHVl"


@pytest.mark.parametrize(("text", "env"), [
    (f"globus: {_SECRET}\n", {}),
    (f"globus: [{_SECRET}]\n", {}),
    (f"globus: {{client_secret: {_SECRET}}}\n", {}),
    (f"globus:\n  client_secret: [{_SECRET}]\n", {}),
    (f"globus:\n  client_secrett: {_SECRET}\n", {}),
    (f"globus:\n  client_secret_file: {_SECRET}\n", {}),
    (f"globus:\n  client_secret_file: [{_SECRET}]\n", {}),
    (f"globus:\n  client_id: {_SECRET}\n", {}),
    (f"globus:\n  client_secret: {_SECRET}: x\n", {}),
    ("", {"TRIGGER_DAEMON_GLOBUS": _SECRET}),
    ("", {"TRIGGER_DAEMON_GLOBUS": f'{{"client_secret": "{_SECRET}"'}),
    ("", {"TRIGGER_DAEMON_GLOBUS": f'{{"client_id": 5, "client_secret": "{_SECRET}", "x": 1}}'}),
    ("", {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": f"[{_SECRET}"}),
    ("", {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": f'{{"a": "{_SECRET}"}}'}),
    ("", {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRETT": _SECRET}),
    ("", {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET__X": _SECRET}),
    ("", {"TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET_FILE": _SECRET}),
])  # fmt: skip
def test_a_secret_in_the_wrong_place_is_shown_to_nobody(tmp_path: Path, text: str, env: dict[str, str]) -> None:
    """The fault says which key is wrong, and never what stood there."""
    file = tmp_path / "daemon.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, env)

    assert _SECRET not in repr(caught.value.faults) + str(caught.value)


def test_a_duration_may_have_a_least() -> None:
    """What cannot be meant is told where it stands."""
    uuid = "5dc8f4c4-8b0b-4a8b-9d3a-0c1f6b0a1a11"
    text = (
        "rules:\n  - {name: a, watch: /data, match: ['*.tif'], existing: ignore,\n"
        f"     start: {{globus_transfer: {{from: {uuid}, to: {uuid}, deadline: 5s}}}}}}\n"
    )
    (fault,) = parse_rules([("rules.yaml", text)]).faults

    assert (fault.line, fault.message) == (3, "`deadline` must be at least 60s, not 5s")
