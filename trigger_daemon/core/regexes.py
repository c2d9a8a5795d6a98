"""Judge the regular expressions that staff write in patterns.

Pure. A regex runs on every name an instrument writes, on the interpreter's one
lock: one that backtracks without end would stop the whole daemon. So what is
not needed in a capture (groups with names, backreferences, anchors, flags for
the whole) is refused, and so is a repetition inside a repetition that has no
separator. What is left is told apart by whether it can cross directories.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

REGEX_MAX = 500  # characters; the longest seen in real rules has 60

_TOKEN = re.compile(
    r"""
      (?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
    | (?P<escape>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[1-9][0-9]?|.))
    | (?P<comment>\(\?\#[^)]*\))
    | (?P<open>\((?:\?(?:P[<=>][^>)]*[>)]?|<[=!]|[=!:>]|\([^)]*\)|[a-zA-Z]*(?:-[a-zA-Z]+)?[:)]))?)
    | (?P<close>\))
    | (?P<repeat>(?:[*+?]|\{(?=[\d,])\d*(?:,\d*)?\})[?+]?)
    | (?P<alternative>\|)
    | (?P<anchor>[\^$])
    | (?P<char>.)
    """,
    re.VERBOSE | re.DOTALL,
)

# What single characters are tried on an atom to learn which it can match.
_ALPHABET = "".join(map(chr, range(32, 127))) + "\n\té"
_LOOSE_FROM = 10  # {1,9} inside a repetition stays cheap, {1,200} does not


class PatternError(ValueError):
    """A pattern, regex or template that cannot be used; `offset` counts from 0 in its text."""

    def __init__(self, message: str, offset: int = 0, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.hint = hint


class Vetted(NamedTuple):
    """A regex fit for a pattern: `source` has no capturing groups."""

    source: str
    crosses: bool  # can match a "/"
    looks: bool  # its match depends on what stands beside it (\b, lookarounds)


class _Item:
    """One atom of a sequence: a single character, or a group with all that it can hold."""

    __slots__ = ("chars", "group", "loose", "repeated", "single")

    def __init__(self, chars: frozenset[str], group: _Group | None = None) -> None:
        self.chars = chars
        self.group = group
        self.single = group is None
        self.repeated = False
        self.loose = group is not None and group.loose  # holds a part of changing length


class _Group:
    """A group being read: its alternatives, each a sequence of items."""

    __slots__ = ("alternatives", "atomic", "looks")

    def __init__(self, *, atomic: bool = False, looks: bool = False) -> None:
        self.alternatives: list[list[_Item]] = [[]]
        self.atomic = atomic
        self.looks = looks

    @property
    def loose(self) -> bool:
        return any(item.loose for items in self.alternatives for item in items)

    @property
    def chars(self) -> frozenset[str]:
        return frozenset().union(*(item.chars for items in self.alternatives for item in items))


@functools.lru_cache(maxsize=1_000)
def _chars(atom: str) -> frozenset[str]:
    regex = re.compile(atom, re.DOTALL | re.IGNORECASE)
    return frozenset(char for char in _ALPHABET if regex.fullmatch(char))


def end_of(text: str, start: int) -> int:
    """Return where the brace opened before `start` closes, -1 if nowhere; braces in sets and escapes do not count."""
    depth = 1
    while start < len(text):
        token = _TOKEN.match(text, start)
        assert token  # the last alternative takes any character
        if token.lastgroup in ("set", "escape"):
            start = token.end()
            continue
        if text[start] == "{":
            depth += 1
        elif text[start] == "}":
            depth -= 1
            if depth == 0:
                return start
        start += 1
    return -1


@functools.lru_cache(maxsize=1_000)
def vet(text: str) -> Vetted:
    """Return the regex ready for use; raise PatternError for one that is refused."""
    if not text:
        raise PatternError("the regular expression is empty", 0, "write {name} for any text within a name")
    if len(text) > REGEX_MAX:
        raise PatternError(f"the regular expression has {len(text)} characters", 0, f"at most {REGEX_MAX} are allowed")
    try:
        re.compile(text, re.DOTALL)
    except (re.error, OverflowError) as error:
        offset = getattr(error, "pos", None) or 0
        raise PatternError(
            f"the regular expression {text!r} is not valid: {getattr(error, 'msg', error)}",
            offset, "see https://docs.python.org/3/library/re.html#regular-expression-syntax",
        ) from None
    except RecursionError:
        raise PatternError("the regular expression is nested too deeply", 0, "write it with fewer groups") from None
    return _Reader().read(text)


class _Reader:
    """Reads one regex, token by token."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.stack = [_Group()]
        self.crosses = False
        self.looks = False

    def read(self, text: str) -> Vetted:
        for token in _TOKEN.finditer(text):
            kind, piece, offset = token.lastgroup, token[0], token.start()
            match kind:
                case "open":
                    self._open(piece, offset)
                case "close":
                    self._close()
                case "alternative":
                    self.stack[-1].alternatives.append([])
                case "repeat":
                    self._repeat(piece, offset)
                case "anchor":
                    raise self._anchor(piece, offset)
                case "escape":
                    self._escape(piece, offset)
                case "set" | "char":
                    self._atom(piece)
            self.out.append("(?:" if piece == "(" and kind == "open" else piece)
        return Vetted("".join(self.out), self.crosses, self.looks)

    def _atom(self, piece: str) -> None:
        chars = _chars(piece)
        self.crosses |= "/" in chars
        self.stack[-1].alternatives[-1].append(_Item(chars))

    def _escape(self, piece: str, offset: int) -> None:
        if piece[1] in "123456789":
            raise PatternError(
                f"{piece} refers to a group, which captures cannot do", offset,
                "use the same {capture} twice in the pattern: both must match the same text",
            )
        if piece in (r"\A", r"\Z"):
            raise self._anchor(piece, offset)
        if piece in (r"\b", r"\B"):
            self.looks = True
            return
        self._atom(piece)

    @staticmethod
    def _anchor(piece: str, offset: int) -> PatternError:
        return PatternError(
            f"{piece} is not needed: a capture always matches from its first to its last character", offset,
            f"leave it out, or write \\{piece} for the character" if piece in "^$" else "leave it out",
        )

    def _open(self, piece: str, offset: int) -> None:
        if piece.startswith("(?P"):
            raise PatternError("a group inside a capture cannot have a name", offset, "write (?:...)")
        if piece.startswith("(?("):
            raise PatternError("conditions are not understood in a capture", offset, "write the cases with |")
        if piece.startswith("(?") and piece.endswith(")"):
            raise PatternError(f"{piece} would change the whole pattern", offset, "set `case: fold` for any case")
        looks = piece in ("(?=", "(?!", "(?<=", "(?<!")
        self.looks |= looks
        self.stack.append(_Group(atomic=piece == "(?>", looks=looks))

    def _close(self) -> None:
        group = self.stack.pop()
        self.stack[-1].alternatives[-1].append(_Item(frozenset() if group.looks else group.chars, group))

    def _repeat(self, piece: str, offset: int) -> None:
        items = self.stack[-1].alternatives[-1]
        if not items:
            return  # after a lookaround at the beginning: repeats nothing
        item = items[-1]
        item.repeated = True
        low, high = _bounds(piece)
        if low == high or (len(piece) > 1 and piece.endswith("+")):
            return  # of one length, or never given back: nothing to try again
        many = high is None or high >= _LOOSE_FROM
        if many and item.group is not None and not item.group.atomic and _explodes(item.group):
            raise PatternError(
                "a repetition inside a repetition can take for ever on some names", offset,
                "write it with one repetition, such as [a-z0-9_]+, or make the inner part (?>...)",
            )
        item.loose = True


def _bounds(piece: str) -> tuple[int, int | None]:
    """Return the least and the greatest count of a repetition (None: no end)."""
    if piece[0] != "{":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[piece[0]]
    low, comma, high = piece[1 : piece.index("}")].partition(",")
    least = int(low or 0)
    return least, (int(high) if high else None) if comma else least


def _explodes(group: _Group) -> bool:
    """Can one text be cut into repetitions of this group in many ways?

    Not if every alternative of changing length holds a separator: a character
    that stands once and that nothing else in the group can match.
    """
    singles = [items[0].chars for items in group.alternatives if len(items) == 1 and items[0].single]
    if any(one & other for i, one in enumerate(singles) for other in singles[i + 1 :]):
        return True
    everything = [item for items in group.alternatives for item in items]
    for items in group.alternatives:
        if not any(item.loose for item in items):
            continue
        separated = any(
            item.single and not item.repeated
            and not any(item.chars & other.chars for other in everything if other is not item)
            for item in items
        )
        if not separated:
            return True
    return False
