"""Match paths against the patterns of rules, and fill captures into templates.

Pure. Grammar: `*` and `?` within a name, `**` across directories, `{name}`
captures within a name (shortest match), `{name:REGEX}` captures what the regex
matches (a `/` too, if it says so), `{{` and `}}` are braces; everything else is
literal, `[` and `]` too. A capture written twice must match the same text.
Templates are read in `templates.py`, and found here too.

Paths are root-relative POSIX strings; names may hold newlines and surrogate
escapes.

Matching is the only work done for every file, so a directory is matched once
and then only base names are (`DirMatcher`). Wildcards commit to the first place
where what follows them fits, wherever that cannot lose a match, so that no
number of them takes long on any name; regexes are judged in `regexes.py`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from trigger_daemon.core.regexes import PatternError, end_of, vet
from trigger_daemon.core.rules import BUILT_IN_IGNORES, CANARY, HIDDEN, Rule
from trigger_daemon.core.templates import literally, render, render_all, template_names, wants_number

Case = Literal["exact", "fold"]

PATTERN_MAX = 1_000  # characters
WILDCARDS_MAX = 32  # in one pattern; real ones have up to 8
DIRECTORIES_MAX = 50_000  # matchers kept for directories seen last; about 100 bytes each where shapes are shared
SHAPES_MAX = 1_000  # different sets of base-name patterns; rules times layouts
COMPILED_MAX = 10_000  # patterns kept compiled: 1,000 rules with some of each

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WILD = frozenset({"star", "plus", "var", "re", "dirs", "any"})
_WITHIN = frozenset({"star", "plus", "var"})  # any text without "/"
_NONE: tuple[int, ...] = ()
_OURS = (f"{HIDDEN}*", f"{CANARY}*")  # ignored also where a rule drops the built-in patterns


class _Token(NamedTuple):
    """A piece of a pattern. Kinds: lit, sep, one (`?`), star, plus, var, re, back, dirs (`**/`), any (`**`)."""

    kind: str
    text: str = ""  # of a literal; the name of a capture
    offset: int = 0
    regex: str = ""
    crosses: bool = False
    looks: bool = False


# ------------------------------------------------------------------------ reading


def _parse(text: str) -> tuple[_Token, ...]:
    """Return the tokens of a pattern; raise PatternError."""
    if len(text) > PATTERN_MAX:
        raise PatternError(f"the pattern has {len(text)} characters", 0, f"at most {PATTERN_MAX} are allowed")
    tokens: list[_Token] = []
    regexes: dict[str, str] = {}
    at = 0
    while at < len(text):
        char = text[at]
        if text.startswith(("{{", "}}"), at):
            _literal(tokens, char, at)
            at += 2
        elif char == "{":
            at = _capture(text, at, tokens, regexes)
        elif char == "}":
            raise PatternError("there is a } without a {", at, "write }} for a brace in a name")
        elif char == "/":
            if not (tokens and tokens[-1].kind in ("sep", "dirs")):
                tokens.append(_Token("sep", "/", at))
            at += 1
        elif char == "*":
            at = _stars(text, at, tokens)
        elif char == "?":
            tokens.append(_Token("one", "?", at))
            at += 1
        else:
            _literal(tokens, char, at)
            at += 1
    _check_shape(text, tokens)
    return tuple(tokens)


def _literal(tokens: list[_Token], char: str, at: int) -> None:
    if tokens and tokens[-1].kind == "lit":
        tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + char)
    else:
        tokens.append(_Token("lit", char, at))


def _stars(text: str, at: int, tokens: list[_Token]) -> int:
    end = at
    while end < len(text) and text[end] == "*":
        end += 1
    begins = not tokens or tokens[-1].kind in ("sep", "dirs")
    if end - at == 1:
        tokens.append(_Token("star", "*", at))
    elif begins and text.startswith("/", end):
        if not (tokens and tokens[-1].kind == "dirs"):
            tokens.append(_Token("dirs", "**/", at))
    elif begins and end == len(text):
        if not (tokens and tokens[-1].kind == "dirs"):
            tokens.append(_Token("dirs", "**/", at))
        tokens.append(_Token("plus", "*", at))
    else:
        tokens.append(_Token("any", "**", at))
    return end


def _capture(text: str, at: int, tokens: list[_Token], regexes: dict[str, str]) -> int:
    found = _NAME.match(text, at + 1)
    end = found.end() if found else at + 1
    closing = text[end] if found and end < len(text) else ""
    if not found or closing not in ("}", ":"):
        raise _bad_capture(text, at, end, closing)
    name = found[0]
    if closing == "}":
        if name in regexes:
            tokens.append(_Token("back", name, at))
        else:
            regexes[name] = ""
            tokens.append(_Token("var", name, at))
        return end + 1
    stop = end_of(text, end + 1)
    if stop < 0:
        raise PatternError(
            f"the capture {{{name}:... is not closed", at, "braces in the regex must balance; \\{ is a brace",
        )
    regex = text[end + 1 : stop]
    try:
        vetted = vet(regex)
    except PatternError as error:
        raise PatternError(error.message, end + 1 + error.offset, error.hint) from None
    if name not in regexes:
        regexes[name] = regex
        tokens.append(_Token("re", name, at, vetted.source, vetted.crosses, vetted.looks))
    elif regexes[name] == regex:
        tokens.append(_Token("back", name, at))
    else:
        raise PatternError(
            f"the capture {name} is written twice with different regexes", at,
            "write the regex where the capture stands first, and only the name later",
        )
    return stop + 1


def _bad_capture(text: str, at: int, end: int, closing: str) -> PatternError:
    stop = text.find("}", at)
    if stop < 0:
        return PatternError("a { is not closed", at, "write {{ for a brace in a name")
    inside = text[at + 1 : stop]
    if closing == "|":
        return PatternError("`|int` cannot stand in a pattern", end, "it belongs into the options under `start`")
    if not inside:
        return PatternError("a capture needs a name", at, "write {name}, or {{}} for braces in a name")
    return PatternError(
        f"{inside!r} is not the name of a capture", at + 1, "use letters, digits and _, beginning with a letter",
    )


def _check_shape(text: str, tokens: Sequence[_Token]) -> None:
    if not tokens:
        raise PatternError("the pattern is empty", 0, "write for example '{session}/{movie}.tiff'")
    if tokens[0].kind == "sep":
        raise PatternError("a pattern is below the watched directory", 0, "leave out the / at its beginning")
    if tokens[-1].kind in ("sep", "dirs"):
        raise PatternError("the pattern names a directory, only files are matched", len(text) - 1, "add for example **")
    if sum(token.kind in _WILD for token in tokens) > WILDCARDS_MAX:
        raise PatternError(f"the pattern has more than {WILDCARDS_MAX} wildcards and captures", 0, "name more of it")
    for component in _components(tokens):
        if len(component) == 1 and component[0].kind == "lit" and component[0].text in (".", ".."):
            raise PatternError(
                f"{component[0].text!r} never occurs in the path of a file", component[0].offset, "leave it out",
            )


def _components(tokens: Iterable[_Token]) -> list[list[_Token]]:
    """Return the tokens between separators; a `**/` is a component of its own."""
    components: list[list[_Token]] = [[]]
    for token in tokens:
        if token.kind == "sep":
            components.append([])
        elif token.kind == "dirs":
            components[-1].append(token)
            components.append([])
        else:
            components[-1].append(token)
    return components


def with_slashes(text: str) -> str:
    """Return a pattern of a Windows root with `/` for each backslash that is no part of a regex; offsets stay."""
    out, at = [], 0
    while at < len(text):
        if text[at] == "{" and not text.startswith("{{", at):
            stop = end_of(text, at + 1)
            if stop > 0:
                out.append(text[at : stop + 1])
                at = stop + 1
                continue
        step = 2 if text.startswith("{{", at) else 1
        out.append(text[at : at + step].replace("\\", "/"))
        at += step
    return "".join(out)


# ---------------------------------------------------------------------- compiling


def _source(
    tokens: Sequence[_Token], names: Collection[str], *, prefix: str = "", char: str = "[^/]", greedy: bool = False,
) -> str:
    """Return regex source for tokens. Groups are made for `names`, called `prefix` + name.

    `char` matches one character of a name ("." where no "/" can come).
    `greedy`: the captured text does not matter, only whether there is a match.
    """
    twice = {token.text for token in tokens if token.kind == "back"}
    out: list[str] = []
    open_ = 0
    for i, token in enumerate(tokens):
        kind = token.kind
        if open_ and kind in _WILD | {"back"}:
            out.append(")")
            open_ = 0
        if kind in ("lit", "sep"):
            out.append(re.escape(token.text))
        elif kind == "one":
            out.append(char)
        elif kind == "back":
            out.append(f"(?P={prefix}{token.text})")
        elif kind == "dirs":
            out.append(r"(?:[^/]++/)*?" if not greedy else r"(?:[^/]++/)*")
        elif kind == "any":
            out.append(".*?" if not greedy else ".*")
        elif kind == "re":
            named = token.text in names or token.text in twice
            out.append(f"(?P<{prefix}{token.text}>{token.regex})" if named else f"(?:{token.regex})")
        else:
            fixed, commits = _follows(tokens, i, twice)
            if commits:
                out.append("(?>")
                open_ = 1
            text = char + ("*" if kind == "star" else "+") + ("" if fixed else "?")
            named = kind == "var" and (token.text in names or token.text in twice)
            out.append(f"(?P<{prefix}{token.text}>{text})" if named else text)
    return "".join(out) + ")" * open_


def _follows(tokens: Sequence[_Token], i: int, twice: Collection[str]) -> tuple[bool, bool]:
    """Return (where it ends is fixed by what follows, it may commit to the first place that fits).

    A run of text within a name, followed by literals that hold a separator or
    end the pattern, can end at one place only. Followed by a plain wildcard in
    the same name it may take the first place: whatever a later one would leave
    over, that wildcard can take instead.
    """
    for token in tokens[i + 1 :]:
        if token.kind == "sep":
            return True, True
        if token.kind in ("lit", "one"):
            continue
        plain = tokens[i].text not in twice or tokens[i].kind != "var"
        absorbs = token.kind in _WITHIN and (token.kind != "var" or token.text not in twice)
        return False, plain and (absorbs or token.kind == "any")
    return True, False


def _compile(source: str, case: Case) -> re.Pattern[str]:
    return re.compile(source, re.DOTALL | (re.IGNORECASE if case == "fold" else 0))


_Fullmatch = Callable[[str], re.Match[str] | None]


class Pattern:
    """One pattern, compiled. Raises PatternError."""

    __slots__ = (
        "_base", "_levels", "_match", "_names", "_open", "_parent", "_tokens", "captures", "case", "prefix", "text",
    )

    def __init__(self, text: str, case: Case = "exact") -> None:
        self.text = text
        self.case: Case = case
        self._tokens = _parse(text)
        self.captures: tuple[str, ...] = tuple(t.text for t in self._tokens if t.kind in ("var", "re"))
        self.prefix = _literal_prefix(self._tokens) if case == "exact" else ""
        self._match = _compile(_source(self._tokens, self.captures), case).fullmatch
        self._parent, self._base = self._split()
        self._names = _compile(self._base_source(), case).fullmatch if self._base is not None else None
        self._levels, self._open = self._prefixes()

    def match(self, path: str) -> dict[str, str] | None:
        """Return the captures of a path, None if it does not match."""
        found = self._match(path)
        return found.groupdict() if found else None

    def _split(self) -> tuple[_Fullmatch | None, tuple[_Token, ...] | None]:
        """Return a matcher of directories (with their final "/") and the base name's tokens, where independent."""
        cut = max((i + 1 for i, token in enumerate(self._tokens) if token.kind in ("sep", "dirs")), default=0)
        parent, base = self._tokens[:cut], self._tokens[cut:]
        known = {token.text for token in base if token.kind in ("var", "re")}
        if any(t.looks for t in self._tokens) or any(
            t.kind == "any" or t.crosses or (t.kind == "back" and t.text not in known) for t in base
        ):
            return None, None
        return _compile(_source(parent, (), greedy=True), self.case).fullmatch, base

    def _prefixes(self) -> tuple[tuple[_Fullmatch, ...], bool]:
        """Return matchers of the first 1, 2, ... directories, and whether anything may follow the last."""
        levels: list[_Fullmatch] = []
        for i, token in enumerate(self._tokens):
            if token.kind in ("dirs", "any") or token.crosses or token.looks:
                return tuple(levels), True
            if token.kind == "sep":
                levels.append(_compile(_source(self._tokens[:i], (), greedy=True), self.case).fullmatch)
        return tuple(levels), False

    def _base_source(self, prefix: str = "") -> str:
        assert self._base is not None
        return _source(self._base, (), prefix=prefix, char=".", greedy=True)

    @property
    def separable(self) -> bool:
        """Whether directory and base name can be matched one without the other."""
        return self._base is not None

    def in_directory(self, directory: str) -> bool:
        """Say whether a file right in this directory can match, by its directory alone."""
        if self._parent is None:
            return self.descends(directory)
        return self._parent(f"{directory}/" if directory else "") is not None

    def base_name(self, name: str) -> bool:
        """Say whether a base name fits, in a directory that does; for separable patterns."""
        assert self._names is not None
        return self._names(name) is not None

    def descends(self, directory: str) -> bool:
        """Say whether a file in this directory or anywhere below could match."""
        if not directory:
            return True
        depth = directory.count("/") + 1
        if depth <= len(self._levels):
            return self._levels[depth - 1](directory) is not None
        if not self._open:
            return False
        if not self._levels:
            return True
        return self._levels[-1]("/".join(directory.split("/", len(self._levels))[: len(self._levels)])) is not None

    @property
    def literal_suffix(self) -> str:
        """The text every match ends with; '' if there is none or it may come in other cases."""
        last = self._tokens[-1]
        return last.text if last.kind == "lit" and self.case == "exact" else ""

    def sample(self, fill: str) -> str | None:
        """Return a path that matches, `fill` wherever any text may stand; None where a regex decides."""
        if any(token.kind == "re" for token in self._tokens):
            return None
        blanks = {"one": fill[:1], "star": fill, "plus": fill, "var": fill, "back": fill, "dirs": "", "any": fill}
        return "".join(blanks.get(token.kind, token.text) for token in self._tokens)

    def filled(self, captures: Mapping[str, str]) -> str:
        """Return the pattern as it is written, but with the values of those captures that have one."""
        ends = [*(token.offset for token in self._tokens[1:]), len(self.text)]
        written = (self.text[token.offset : end] for token, end in zip(self._tokens, ends, strict=True))
        named = (captures.get(token.text) if token.kind in ("var", "re", "back") else None for token in self._tokens)
        return "".join(text if value is None else value for text, value in zip(written, named, strict=True))

    def plain_wildcard(self) -> _Token | None:
        """Return the first piece that is neither literal nor a plain capture: with it no path is determined."""
        return next((t for t in self._tokens if t.kind not in ("lit", "sep", "var", "back")), None)

    def explain(self, path: str) -> tuple[int, str]:
        """Return how many leading parts of a path that does not match do fit, and what does not, in words."""
        components = _components(self._tokens)
        texts = self._component_texts()
        parts = path.split("/")
        for i, level in enumerate(self._levels[: len(parts) - 1]):
            if not level("/".join(parts[: i + 1])):
                return i, f"directory `{parts[i]}` does not fit `{texts[i]}`"
        if self._open:
            return len(self._levels), "its end does not fit that"
        want, have = len(components) - 1, len(parts) - 1
        if want != have:
            lies, wants = _levels_words(have), _levels_words(want)
            return min(want, have), f"it lies {lies} below the root, the pattern wants {wants}"
        return want, f"name `{parts[-1]}` does not fit `{texts[-1]}`"

    def _component_texts(self) -> list[str]:
        cuts = [token.offset for token in self._tokens if token.kind == "sep"]
        edges = [-1, *cuts, len(self.text)]
        return [self.text[a + 1 : b].strip("/") for a, b in itertools.pairwise(edges)]


def _levels_words(count: int) -> str:
    return "directly" if count == 0 else f"{count} director{'y' if count == 1 else 'ies'}"


def _literal_prefix(tokens: Sequence[_Token]) -> str:
    out = []
    for component in _components(tokens)[:-1]:
        if len(component) != 1 or component[0].kind != "lit":
            break
        out.append(component[0].text)
    return "/".join(out)


@functools.lru_cache(maxsize=COMPILED_MAX)
def compiled(text: str, case: Case = "exact") -> Pattern:
    """Return the pattern, compiled once."""
    return Pattern(text, case)


# ----------------------------------------------------------------------- ignoring


class _Names:
    """Many patterns against one base name, at the price of about two comparisons.

    Most ignores are `.*`, `*.tmp` or `*_test_*`: those become one `startswith`,
    one `endswith` and an `in` each; the rest is one regex.
    """

    __slots__ = ("_patterns", "infixes", "prefixes", "rest", "suffixes")

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._patterns = tuple(patterns)
        self.prefixes: tuple[str, ...] = ()
        self.suffixes: tuple[str, ...] = ()
        self.infixes: tuple[str, ...] = ()
        others = []
        for pattern in self._patterns:
            kinds = [token.kind for token in pattern._base or ()]
            if pattern.case == "exact" and kinds == ["lit", "star"]:
                self.prefixes += (pattern._tokens[-2].text,)
            elif pattern.case == "exact" and kinds == ["star", "lit"]:
                self.suffixes += (pattern._tokens[-1].text,)
            elif pattern.case == "exact" and kinds == ["star", "lit", "star"]:
                self.infixes += (pattern._tokens[-2].text,)
            else:
                others.append(pattern)
        others = [p for p in others if not self._covered(p)]
        alternatives = "|".join(p._base_source(f"_{i}_") for i, p in enumerate(others))
        self.rest = _compile(alternatives, others[0].case).fullmatch if others else None

    def _covered(self, pattern: Pattern) -> bool:
        if pattern.case != "exact":
            return False
        base = pattern._base or ()
        first, last = base[0], base[-1]
        return (first.kind == "lit" and first.text.startswith(self.prefixes)) or (
            last.kind == "lit" and last.text.endswith(self.suffixes)
        )

    def hits(self, name: str) -> bool:
        if name.startswith(self.prefixes) or name.endswith(self.suffixes):
            return True
        for text in self.infixes:
            if text in name:
                return True
        return self.rest is not None and self.rest(name) is not None

    def which(self, name: str) -> str:
        """Return the text of the first pattern that hits."""
        return next(p.text for p in self._patterns if p.base_name(name))


class Ignore:
    """What a rule leaves out.

    A pattern without "/" is tried on the base name of the file and of every
    directory above it; one with "/" on the whole path. What lies in an ignored
    directory is ignored. A "/" at the beginning or the end only says that the
    whole path is meant.
    """

    __slots__ = ("_anywhere", "_by_name", "_names", "_whole", "below")

    def __init__(self, patterns: Iterable[str], case: Case = "exact") -> None:
        by_name, anywhere, whole = [], [], []
        for text in patterns:
            if "/" in text:
                whole.append((text, compiled(_stripped(text), case)))
            elif compiled(text, case).separable:
                by_name.append(compiled(text, case))
            else:
                anywhere.append(compiled(text, case))
        self._by_name = tuple(by_name)
        self._anywhere = tuple(anywhere)  # of one name too, but only as a whole: `a**b`, or a regex with a dot
        self._whole = tuple(whole)
        self._names = _names(self._by_name)
        # Every file of a directory asks the same about it.
        self.below: Callable[[str], str | None] = functools.lru_cache(maxsize=DIRECTORIES_MAX)(self._below)

    def ignores(self, path: str) -> str | None:
        """Return the text of the pattern that ignores this path, None if none does."""
        directory, _, name = path.rpartition("/")
        return (self.below(directory) if directory else None) or self._here(path, name)

    def _below(self, directory: str) -> str | None:
        """Return the pattern that ignores this directory or one above it ("" is the root: none)."""
        end = 0
        while end < len(directory):
            begin = end
            end = directory.find("/", begin)
            end = len(directory) if end < 0 else end
            found = self._here(directory[:end], directory[begin:end])
            if found is not None:
                return found
            end += 1
        return None

    def _here(self, path: str, name: str) -> str | None:
        if self._names.hits(name):
            return self._names.which(name)
        for pattern in self._anywhere:
            if pattern.match(name) is not None:
                return pattern.text
        for text, pattern in self._whole:
            if pattern.match(path) is not None:
                return text
        return None

    def within(self, directory: str) -> tuple[tuple[Pattern, ...], tuple[Pattern, ...], tuple[Pattern, ...]]:
        """Return what to try in a directory that is not ignored: on base names, on names as a whole, on paths."""
        whole = [pattern for _, pattern in self._whole if pattern.in_directory(directory)]
        names = self._by_name + tuple(p for p in whole if p.separable)
        return names, self._anywhere, tuple(p for p in whole if not p.separable)


def _stripped(text: str) -> str:
    """Return an ignore pattern without the slashes that only say "the whole path"."""
    core = text.strip("/")
    if not core:
        raise PatternError("this would ignore everything", 0, "name what is to be left out")
    return core


@functools.lru_cache(maxsize=SHAPES_MAX)
def _names(patterns: tuple[Pattern, ...]) -> _Names:
    return _Names(patterns)


@functools.lru_cache(maxsize=COMPILED_MAX)
def _ignore(patterns: tuple[str, ...], case: Case) -> Ignore:
    return Ignore(patterns if ".*" in patterns else (*patterns, *_OURS), case)


# ----------------------------------------------------------------- a root's rules


Wants = Callable[[str], tuple[int, ...]]


class DirMatcher:
    """The files of one directory: which rules want a base name."""

    __slots__ = ("any", "wants")

    def __init__(self, wants: Wants | None) -> None:
        self.any = wants is not None
        self.wants: Wants = wants or _nobody  # ids of rules, sorted; negative: as the marker of that rule


class Matcher:
    """All rules of one root."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        groups: dict[Ignore, list[tuple[Pattern, int]]] = {}
        for rule in rules:
            pairs = groups.setdefault(_ignore(rule.ignore, rule.case), [])
            pairs.extend((compiled(text, rule.case), rule.id) for text in rule.match)
            if rule.batch is not None and rule.batch.close_on is not None:
                pairs.append((compiled(rule.batch.close_on.file, rule.case), -rule.id))
        self._groups = [(ignore, tuple(pairs)) for ignore, pairs in groups.items()]
        self.directory: Callable[[str], DirMatcher] = functools.lru_cache(maxsize=DIRECTORIES_MAX)(self._directory)
        self.descends: Callable[[str], bool] = functools.lru_cache(maxsize=DIRECTORIES_MAX)(self._descends)

    def _descends(self, directory: str) -> bool:
        """Say whether anything in a directory or below it could match a rule or a marker."""
        return any(
            ignore.below(directory) is None and any(pattern.descends(directory) for pattern, _ in pairs)
            for ignore, pairs in self._groups
        )

    def _directory(self, directory: str) -> DirMatcher:
        """Return the matcher of the base names of a directory ("" is the root)."""
        parts: list[Wants] = []
        for ignore, pairs in self._groups:
            if ignore.below(directory) is not None:
                continue
            here = [(pattern, rule) for pattern, rule in pairs if pattern.in_directory(directory)]
            if not here:
                continue
            names, anywhere, paths = ignore.within(directory)
            prefix = f"{directory}/" if directory else ""
            quick = tuple((p, rule) for p, rule in here if p.separable)
            slow = tuple((p, rule) for p, rule in here if not p.separable)
            if quick:
                parts.append(_but_not(_by_base_name(quick, names), anywhere, paths, prefix))
            if slow:
                parts.append(_but_not(_by_path(slow, names, prefix), anywhere, paths, prefix))
        if len(parts) < 2:
            return DirMatcher(parts[0] if parts else None)
        return DirMatcher(_together(tuple(parts)))


def _nobody(name: str) -> tuple[int, ...]:
    return _NONE


@functools.lru_cache(maxsize=COMPILED_MAX)
def _shared(ids: frozenset[int]) -> tuple[int, ...]:
    return tuple(sorted(ids))


def _together(parts: tuple[Wants, ...]) -> Wants:
    def wants(name: str) -> tuple[int, ...]:
        found = [ids for part in parts if (ids := part(name))]
        if len(found) < 2:
            return found[0] if found else _NONE
        return _shared(frozenset().union(*found))

    return wants


def _by_path(pairs: tuple[tuple[Pattern, int], ...], ignored: tuple[Pattern, ...], prefix: str) -> Wants:
    hits = _names(ignored).hits

    def wants(name: str) -> tuple[int, ...]:
        path = prefix + name
        ids = frozenset(rule for pattern, rule in pairs if pattern.match(path) is not None)
        return _shared(ids) if ids and not hits(name) else _NONE

    return wants


def _but_not(wants: Wants, anywhere: tuple[Pattern, ...], paths: tuple[Pattern, ...], prefix: str) -> Wants:
    """Return `wants` without what those ignore patterns hit that need more than a base-name regex."""
    if not anywhere and not paths:
        return wants

    def fewer(name: str) -> tuple[int, ...]:
        ids = wants(name)
        if ids and (
            any(p.match(name) is not None for p in anywhere) or any(p.match(prefix + name) is not None for p in paths)
        ):
            return _NONE
        return ids

    return fewer


@functools.lru_cache(maxsize=SHAPES_MAX)
def _by_base_name(pairs: tuple[tuple[Pattern, int], ...], ignored: tuple[Pattern, ...]) -> Wants:
    """Return the matcher of base names for rules whose directory fits; shared by all directories alike.

    Patterns are found by the literal text they end with, in one table a
    length; those that end alike are one regex. So 50 rules cost little more
    than one.
    """
    entries: dict[tuple[str, Case], tuple[Pattern, set[int]]] = {}
    for pattern, rule in pairs:
        entries.setdefault((pattern._base_source(), pattern.case), (pattern, set()))[1].add(rule)
    by_end: dict[tuple[str, Case], list[_Entry]] = {}
    for pattern, ids in entries.values():
        entry = _Entry(pattern, _shared(frozenset(ids)))
        by_end.setdefault((pattern.literal_suffix, pattern.case), []).append(entry)
    names = _names(ignored)
    if len(entries) == 1:
        return _one(next(iter(by_end.values()))[0], names)
    tables: dict[int, dict[str, Wants]] = {}
    always: list[Wants] = []
    for (end, _), alike in by_end.items():
        if end:
            tables.setdefault(len(end), {})[end] = _any_of(alike)
        else:
            always.append(_any_of(alike))
    ends = tuple(sorted(tables.items()))

    def wants(name: str) -> tuple[int, ...]:
        found = _NONE
        for length, table in ends:
            part = table.get(name[-length:])
            if part is not None and (ids := part(name)):
                found = _shared(frozenset(found + ids)) if found else ids
        for part in always:
            if ids := part(name):
                found = _shared(frozenset(found + ids)) if found else ids
        return found if found and not names.hits(name) else _NONE

    return wants


class _Entry(NamedTuple):
    """A pattern, for its base name, and the rules that have it."""

    pattern: Pattern
    ids: tuple[int, ...]


def _one(entry: _Entry, names: _Names) -> Wants:
    """Return the matcher for a single pattern, the usual case, with everything inlined."""
    match, ids = entry.pattern._names, entry.ids
    assert match is not None
    prefixes, suffixes, infixes, rest = names.prefixes, names.suffixes, names.infixes, names.rest

    def wants(name: str) -> tuple[int, ...]:
        if match(name) is None or name.startswith(prefixes) or name.endswith(suffixes):
            return _NONE
        for text in infixes:
            if text in name:
                return _NONE
        return ids if rest is None or rest(name) is None else _NONE

    return wants


def _any_of(alike: Sequence[_Entry]) -> Wants:
    """Return one matcher for patterns of one case: a regex of alternatives, then those behind the first hit."""
    each = [(entry.pattern.base_name, entry.ids) for entry in alike]
    if len(each) == 1:
        only, ids = each[0]
        return lambda name: ids if only(name) else _NONE
    sources = [entry.pattern._base_source(f"_{i}_") for i, entry in enumerate(alike)]
    combined = _compile("|".join(f"(?:{source})()" for source in sources), alike[0].pattern.case)
    first: dict[int, int] = {}  # the group that closes an alternative -> its place
    groups = 0
    for i, source in enumerate(sources):
        groups += re.compile(source).groups + 1
        first[groups] = i
    match = combined.fullmatch

    def wants(name: str) -> tuple[int, ...]:
        found = match(name)
        if found is None:
            return _NONE
        place = first[found.lastindex or 0]
        ids = each[place][1]
        more = [other for also, other in each[place + 1 :] if also(name)]
        return _shared(frozenset(ids).union(*more)) if more else ids

    return wants


# --------------------------------------------------------------------- for a rule


def captures_of(rule: Rule, path: str) -> dict[str, str] | None:
    """Return the captures of the first pattern that matches; None if none does or the path is ignored."""
    if _ignore(rule.ignore, rule.case).ignores(path) is not None:
        return None
    for text in rule.match:
        found = compiled(text, rule.case).match(path)
        if found is not None:
            return found
    return None


def why_not(rule: Rule, path: str) -> tuple[Literal["unmatched", "ignored", "matched"], str]:
    """Say in words why a rule does not want a path, for `explain`; ("matched", pattern) if it does."""
    ignored = _ignore(rule.ignore, rule.case).ignores(path)
    if ignored is not None:
        by_whom = "built in" if ignored in (*BUILT_IN_IGNORES, *_OURS) else "of this rule"
        return "ignored", f"ignored by the pattern `{ignored}` ({by_whom})"
    best = (-1, "")
    for text in rule.match:
        pattern = compiled(text, rule.case)
        if pattern.match(path) is not None:
            return "matched", f"matched by `{text}`"
        if rule.case == "exact" and compiled(text, "fold").match(path) is not None:
            return "unmatched", f"differs from `{text}` only in upper and lower case: set `case: fold`"
        fits, words = pattern.explain(path)
        if fits > best[0]:
            best = (fits, f"{words} of `{text}`" if "fit" in words else f"{words} (`{text}`)")
    if rule.batch and (mark := rule.batch.close_on) and compiled(mark.file, rule.case).match(path) is not None:
        return "unmatched", "a marker of this rule (close_on): it closes the batches that it belongs to"
    others = len(rule.match) - 1
    return "unmatched", best[1] + (f"; nor do {others} other patterns fit" if others else "")


__all__ = [
    "DirMatcher", "Ignore", "Matcher", "Pattern", "PatternError", "captures_of", "compiled", "literally", "render",
    "render_all", "template_names", "wants_number", "why_not", "with_slashes",
]
