"""The laws of patterns: what matches, what it captures, and that the quick way agrees with the slow one."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trigger_daemon.core.patterns import (
    Ignore,
    Matcher,
    Pattern,
    PatternError,
    captures_of,
    literally,
    render,
    render_all,
    template_names,
    why_not,
    with_slashes,
)
from trigger_daemon.core.regexes import vet
from trigger_daemon.core.rules import BUILT_IN_IGNORES, Batch, CloseOn, Rule

SEPARATOR = st.sampled_from(["_", "-", ".", "[30.0]_", " (2) ", "é", "/", "/Data/", "\n", "\udcff", "+", "^$"])
TEXT = st.text(alphabet="abz019\udc80\t(", min_size=1, max_size=6)  # shares nothing with a separator
ANY_NAME = st.text(alphabet=st.characters(exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
ANY_PATH = st.lists(ANY_NAME, min_size=1, max_size=3).map("/".join)
COMPONENT = st.lists(
    st.sampled_from(["a", "b", "_", ".", "*", "?", "{x}", "{y}", "{z:[ab]+}", "{w:.+}", "**", "ab"]),
    min_size=1, max_size=4,
).map("".join)
LOOSE = st.lists(st.one_of(COMPONENT, st.just("**")), min_size=1, max_size=4).map("/".join)
PATH = st.lists(st.text(alphabet="ab_.x\n", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join)

QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def rule(*match: str, number: int = 1, **keys: Any) -> Rule:
    return Rule(
        name=f"r{number}", watch="/data", match=match, existing="process", action="copy", options={}, id=number, **keys
    )


def pattern_or_reject(text: str) -> Pattern:
    try:
        return Pattern(text)
    except PatternError:
        assume(False)
        raise AssertionError from None


def naive(pattern: str, path: str) -> bool:
    """Match by plain backtracking, with none of the shortcuts: the model the real one is held to."""
    out, seen, at = "", set(), 0
    pattern = re.sub(r"\*{3,}", "**", pattern)  # more stars than two say no more
    for token in re.finditer(r"\*\*/|\*\*|\*|\?|\{(\w+)(?::((?:[^{}]|\{[^{}]*\})*))?\}|.", pattern, re.DOTALL):
        text, name = token[0], token[1]
        begins = token.start() == 0 or pattern[token.start() - 1] == "/"
        if text == "**/" and begins:
            out += "(?:[^/]+/)*"
        elif text == "**/":
            out += ".*/"
        elif text == "**" and begins and token.end() == len(pattern):
            out += "(?:[^/]+/)*[^/]+"
        elif text == "**":
            out += ".*"
        elif text in "*?":
            out += "[^/]*" if text == "*" else "[^/]"
        elif name in seen:
            out += f"(?P={name})"
        elif name:
            seen.add(name)
            out += f"(?P<{name}>{token[2] or '[^/]+'})"
        else:
            out += re.escape(text)
        at = token.end()
    assert at == len(pattern)
    return re.fullmatch(out, path, re.DOTALL) is not None


# ------------------------------------------------------------------------- matching


@QUICK
@given(st.lists(st.tuples(TEXT, SEPARATOR), min_size=1, max_size=5), TEXT)
def test_a_path_built_from_a_pattern_yields_its_captures(parts: list[tuple[str, str]], last: str) -> None:
    """What is put in for captures comes back, whatever bytes names are made of."""
    text = "".join(f"{{c{i}}}{literally(separator)}" for i, (_, separator) in enumerate(parts)) + "{end}"
    path = "".join(value + separator for value, separator in parts) + last

    assert Pattern(text).match(path) == {f"c{i}": value for i, (value, _) in enumerate(parts)} | {"end": last}


@QUICK
@given(LOOSE, PATH)
def test_captures_put_back_give_the_path(text: str, path: str) -> None:
    """Wherever a pattern of captures matches, filling them in gives the path again."""
    plain = re.sub(r"/+", "/", re.sub(r"[*?]+", "", re.sub(r"\{(\w+):[^}]*\}", r"{\1}", text)))
    found = pattern_or_reject(plain).match(path)

    assert found is None or render(plain, found) == path


@QUICK
@given(LOOSE, PATH)
def test_matching_agrees_with_plain_backtracking(text: str, path: str) -> None:
    """Committing to the first place that fits loses no match and finds none that is not there."""
    pattern = pattern_or_reject(text)

    assert (pattern.match(path) is not None) == naive(text, path)


@QUICK
@given(ANY_PATH, ANY_PATH)
def test_literal_text_matches_only_itself(one: str, other: str) -> None:
    """Brackets, dots, stars of no pattern: everything else is literal."""
    assume(not set("*?") & set(one))
    pattern = Pattern(literally(one))

    assert pattern.match(one) == {}
    assert (pattern.match(other) is not None) == (one == other)


@pytest.mark.parametrize(
    ("text", "path", "captures"),
    [
        ("{session}/Images-Disc{disc}/{square}/Data/{movie}_fractions.tiff",
         "s1/Images-Disc2/GridSquare_7/Data/FoilHole_1_Data_2_fractions.tiff",
         {"session": "s1", "disc": "2", "square": "GridSquare_7", "movie": "FoilHole_1_Data_2"}),
        ("Position_{p}_[30.0]_{t}.tiff", "Position_1_[30.0]_5.tiff", {"p": "1", "t": "5"}),
        ("{chip}_{run}.cbf", "a_b_c.cbf", {"chip": "a", "run": "b_c"}),  # the shortest first
        (r"{base}_{n:\d{4}}.cbf", "th_8_2_0001.cbf", {"base": "th_8_2", "n": "0001"}),
        (r"{a:(x|y)(\d+)}.tif", "y12.tif", {"a": "y12"}),
        (r"{scan:[^{}]+}.h5", "s1.h5", {"scan": "s1"}),
        ("{where:.+}/{name}.h5", "a/b/c.h5", {"where": "a/b", "name": "c"}),
        ("{{x}}_{n}", "{x}_1", {"n": "1"}),
        ("{{{n}}}", "{1}", {"n": "1"}),
        ("{s}/{s}_master.h5", "run1/run1_master.h5", {"s": "run1"}),
        ("**/{m}.mrc", "m.mrc", {"m": "m"}),
        ("**/{m}.mrc", "a/b/m.mrc", {"m": "m"}),
        ("a/**", "a/b/c", {}),
        ("a//b", "a/b", {}),
        ("{n}.tif", "a\nb.tif", {"n": "a\nb"}),
    ],
)  # fmt: skip
def test_grammar(text: str, path: str, captures: dict[str, str]) -> None:
    """Real names give the captures that people mean."""
    assert Pattern(text).match(path) == captures


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{s}/{s}_master.h5", "run1/run2_master.h5"),  # used twice: the same text
        ("*.tif", "a/b.tif"),
        ("?.tif", "ab.tif"),
        ("a/**", "a"),
        ("{m}.tif", ".tif"),  # a capture holds at least one character
        ("x_fractions.tiff", "x_Fractions.tiff"),
        ("a.b", "aXb"),
        ("{n}.tif", "a.tif\n"),
    ],
)
def test_what_does_not_match(text: str, path: str) -> None:
    """Each piece matches no more than the grammar says."""
    assert Pattern(text).match(path) is None


def test_case_fold() -> None:
    """`case: fold` takes names in any case, and keeps the text as it is."""
    pattern = Pattern("{M}_Fractions.{m}", "fold")

    assert pattern.match("Ab_FRACTIONS.Mrc") == {"M": "Ab", "m": "Mrc"}


@pytest.mark.parametrize(
    ("text", "prefix"), [("a/b/{c}.tif", "a/b"), ("a/b{c}/d", "a"), ("*/x", ""), ("a.txt", ""), ("a/**/b/c", "a")]
)
def test_prefix_is_the_literal_directory(text: str, prefix: str) -> None:
    """A sweep may begin at the prefix."""
    assert Pattern(text).prefix == prefix


@pytest.mark.parametrize(
    ("text", "offset", "words"),
    [
        ("", 0, "empty"),
        ("/a", 0, "below the watched directory"),
        ("a/", 1, "directory"),
        ("a/../b", 2, "'..'"),
        ("ab{c", 2, "not closed"),
        ("ab}c", 2, "without a {"),
        ("a{}", 1, "needs a name"),
        ("a{b-c}", 2, "'b-c'"),
        ("a{n|int}", 3, "|int"),
        (r"a{n:\d+(}", 7, "unterminated"),
        (r"{n:(?P<x>a)}", 3, "name"),
        (r"{n:(a)\1}", 6, r"\1"),
        (r"{n:^\d+$}", 3, "not needed"),
        (r"{n:(?i)a}", 3, "whole pattern"),
        (r"{n:(a+)+}", 7, "repetition"),
        (r"{n:(\w|\d)*}", 10, "repetition"),
        (r"{n:(?:\d+_?)+}", 12, "repetition"),
        (r"{n:a}_{n:b}", 6, "different regexes"),
        ("*" + "a*" * 40, 0, "wildcards"),
    ],
)
def test_faults_of_patterns(text: str, offset: int, words: str) -> None:
    """What cannot be used is refused at its place, with a hint."""
    with pytest.raises(PatternError) as caught:
        Pattern(text)

    assert caught.value.offset == offset
    assert words in caught.value.message
    assert caught.value.hint


def test_a_repetition_with_a_separator_is_taken() -> None:
    """Only what can be cut in many ways is refused."""
    assert Pattern(r"{n:(?:\d+_)+}x").match("1_22_x") == {"n": "1_22_"}


@pytest.mark.parametrize(
    "text", ["*a*a*a*a*a*a*a*a*a*a*b", "{a}_{b}_{c}_{d}_{e}_{f}_{g}_{h}_{i}.tif", "**/*a*a*a*a/**/*a*a*a*a*b"]
)
def test_no_name_takes_long(text: str) -> None:
    """However many wildcards, a name of the longest length is judged in milliseconds; backtracking would take years."""
    pattern = Pattern(text)
    matcher = Matcher([rule(text)]).directory("")
    begun = time.perf_counter()
    for char in "a_":
        assert pattern.match(char * 255) is None
        assert matcher.wants(char * 255) == ()

    assert time.perf_counter() - begun < 1.0


# ------------------------------------------------------------------ the quick way


RULE_SETS = st.lists(
    st.tuples(st.lists(LOOSE, min_size=1, max_size=2), st.lists(LOOSE, max_size=2), st.sampled_from(["exact", "fold"])),
    min_size=1, max_size=4,
)


def rules_of(sets: list[tuple[list[str], list[str], str]]) -> list[Rule]:
    for match, ignore, _ in sets:
        for text in (*match, *ignore):
            pattern_or_reject(text)
    return [
        rule(*match, number=i + 1, ignore=(*BUILT_IN_IGNORES, *ignore), case=case)
        for i, (match, ignore, case) in enumerate(sets)
    ]


@QUICK
@given(RULE_SETS, PATH)
def test_a_directory_matcher_agrees_with_captures_of(sets: list[tuple[list[str], list[str], str]], path: str) -> None:
    """Directory first and base name then finds just the rules that the whole path would."""
    rules = rules_of(sets)
    directory, _, name = path.rpartition("/")
    matcher = Matcher(rules)
    wanted = matcher.directory(directory).wants(name)

    assert wanted == tuple(r.id for r in rules if captures_of(r, path) is not None)
    if wanted:
        above = path
        while above:
            above = above.rpartition("/")[0]
            assert matcher.descends(above)
        assert matcher.directory(directory).any


@QUICK
@given(RULE_SETS, PATH)
def test_why_not_agrees_with_captures_of(sets: list[tuple[list[str], list[str], str]], path: str) -> None:
    """`explain` never gives another answer than the stage it explains."""
    for one in rules_of(sets):
        stage, words = why_not(one, path)

        assert (stage == "matched") == (captures_of(one, path) is not None)
        assert words


def test_fifty_rules_find_each_its_own() -> None:
    """Rules of one directory, alike in their ends or not, are told apart."""
    rules = [rule(f"{{a}}_{i}.tif", f"x{i}_*.tif", number=i) for i in range(1, 51)]
    wants = Matcher(rules).directory("").wants

    assert wants("q_7.tif") == (7,)
    assert wants("x3_y_9.tif") == (3, 9)
    assert wants("x51_y.tif") == ()


def test_rules_that_overlap_are_all_found() -> None:
    """The first alternative that matches does not hide those behind it."""
    rules = [rule(f"{{a}}_{i}_{{b}}.tif", number=i) for i in range(1, 51)]

    assert Matcher(rules).directory("").wants("x_7_31_9_y.tif") == (7, 9, 31)


def test_groups_inside_a_capture_capture_nothing() -> None:
    """Parentheses only group; the pattern's own captures are the only ones."""
    assert re.compile(vet(r"(a|b)(?:c)([)(]\()").source).groups == 0


def test_markers_are_wanted_as_negative() -> None:
    """A file can be a member for one rule and the marker of another, or of the same."""
    first = rule("{s}/{m}.tif", number=1, batch=Batch(group_by=("s",), close_on=CloseOn("{s}/done.tif")))
    second = rule("**/*.tif", number=2)

    assert Matcher([first, second]).directory("a").wants("done.tif") == (-1, 1, 2)


def test_answers_are_shared() -> None:
    """A million names do not make a million tuples."""
    wants = Matcher([rule("*.a", "*.b", number=1), rule("*.b", number=2)]).directory("").wants

    assert wants("x.b") is wants("y.b")
    assert wants("x.a") is wants("y.a")
    assert wants("x.c") is wants("y.d")


@pytest.mark.parametrize(
    ("directory", "down"),
    [("", True), ("s1", True), ("s1/Data", True), ("s1/Other", False), ("s1/Data/deeper", False), (".hidden", False),
     ("s1/Data/x", False)],
)  # fmt: skip
def test_only_directories_that_can_hold_matches_are_entered(directory: str, down: bool) -> None:
    """A sweep prunes by what patterns say of directories, and by what is ignored."""
    assert Matcher([rule("{s}/Data/*.tif", ignore=BUILT_IN_IGNORES)]).descends(directory) is down


# ------------------------------------------------------------------------ ignoring


@pytest.mark.parametrize(
    ("ignore", "path", "by"),
    [
        ((".*",), "a/.x.tif", ".*"),
        ((".*",), ".trash/x.tif", ".*"),
        (("*.tmp",), "a.tmp/x.tif", "*.tmp"),
        (("*_test_*",), "a/b_test_c.tif", "*_test_*"),
        (("**/*_test_*",), "a/b_test_c/d.tif", "**/*_test_*"),
        (("a/b",), "a/b/c/d", "a/b"),
        (("a/b",), "x/a/b", None),
        (("scratch/",), "scratch/x", "scratch/"),
        (("/scratch",), "a/scratch/x", None),
        (("textual",), "contextual.tiff", None),
        (("a**b",), "x/a_b", "a**b"),
        (BUILT_IN_IGNORES, "a/b.mrc.part", "*.part"),
        (BUILT_IN_IGNORES, "movie_downloading", "*downloading"),
        (BUILT_IN_IGNORES, "a/movie.tiff", None),
    ],
)
def test_ignoring(ignore: tuple[str, ...], path: str, by: str | None) -> None:
    """Without "/" every base name on the way is tried, with it the whole path; what lies below is ignored too."""
    assert Ignore(ignore).ignores(path) == by


@pytest.mark.parametrize(
    ("path", "stage", "words"),
    [
        ("s/Data/.m.tif", "ignored", "`.*` (built in)"),
        ("s/Data/m_test_1.tif", "ignored", "`*_test_*` (of this rule)"),
        ("s/Dato/m.tif", "unmatched", "directory `Dato` does not fit `Data`"),
        ("s/Data/m.jpg", "unmatched", "name `m.jpg` does not fit `{m}.tif`"),
        ("s/m.tif", "unmatched", "1 directory"),
        ("s/Data/m.TIF", "unmatched", "case: fold"),
        ("s/Data/m.tif", "matched", "{s}/Data/{m}.tif"),
    ],
)
def test_why_not_names_what_differs(path: str, stage: str, words: str) -> None:
    """An operator reads what is different, not a regular expression."""
    found = why_not(rule("{s}/Data/{m}.tif", ignore=(*BUILT_IN_IGNORES, "*_test_*")), path)

    assert found[0] == stage
    assert words in found[1]


# ----------------------------------------------------------------------- templates


@QUICK
@given(st.text(alphabet="ab{}/|\udc80 "))
def test_literal_text_renders_to_itself(text: str) -> None:
    """Doubled braces are braces."""
    assert render(literally(text), {}) == text


def test_rendering() -> None:
    """Names are filled in wherever they stand; only a lone `{n|int}` is a number."""
    values = {"run": "007", "s": "{x}"}

    assert render("/raw/{s}/{run}{{}}", values) == "/raw/{x}/007{}"
    assert render("{run|int}", values) == 7
    assert render_all({"{s}": ["{run|int}", 3, "{run}"]}, values) == {"{s}": [7, 3, "007"]}
    assert template_names("{a}{b}{a}{{c}}") == ("a", "b")


@pytest.mark.parametrize(("text", "offset"), [("a{b", 1), ("a}", 1), ("x{n|int}", 1), ("{n|float}", 0), ("{ n }", 0)])
def test_faults_of_templates(text: str, offset: int) -> None:
    """What is no template is refused at its place."""
    with pytest.raises(PatternError) as caught:
        template_names(text)

    assert caught.value.offset == offset


def test_a_number_must_be_one() -> None:
    """Text that is no number is a fault of the file's name, told as such."""
    with pytest.raises(ValueError, match="'x1', captured as"):
        render("{run|int}", {"run": "x1"})


def test_windows_separators() -> None:
    """Backslashes separate, but in a regex they mean what they mean there; nothing moves."""
    text = r"{s}\Data\{n:\d+}_{{a}}\*.tif"

    assert with_slashes(text) == r"{s}/Data/{n:\d+}_{{a}}/*.tif"
    assert len(with_slashes(text)) == len(text)


def test_a_pattern_is_filled_with_what_is_known() -> None:
    """What has no value stays as it is written; what has one stands wherever its name does."""
    pattern = Pattern(r"{day}/{s:[a-z]{2}}/{{x}}_{n}_{day}/**/*.{kind}")

    assert pattern.filled({"day": "mon", "s": "ab"}) == r"mon/ab/{{x}}_{n}_mon/**/*.{kind}"
    assert pattern.filled({}) == pattern.text


@pytest.mark.parametrize("ignore", [(), BUILT_IN_IGNORES, ("*.xml",)])
def test_no_rule_wants_a_file_under_a_name_that_reclaim_gives(ignore: tuple[str, ...]) -> None:
    """Also one that wants everything, without any ignores; other names with a dot are its own business."""
    wants = rule("**", ignore=ignore)
    hidden = ".trigger-daemon-reclaim-0123456789abcdef-0"

    assert captures_of(wants, f"a/{hidden}") is None
    assert Matcher([wants]).directory("a").wants(hidden) == ()
    assert why_not(wants, f"a/{hidden}")[0] == "ignored"
    assert (captures_of(wants, ".other") is not None) == (ignore != BUILT_IN_IGNORES)
