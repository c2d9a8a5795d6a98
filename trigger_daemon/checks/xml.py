"""Does an XML file (EPU's .xml and .dm too) end where its first element ends?

Whole is not final: EpuSession.dm and its like are rewritten in place. Only a
file that was parsed from end to end is complete. One that is too large or too
deep for that, or has declarations (entities are never expanded), is unknown
when it ends as its first element would: one within may have the same name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.parsers import expat

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._words import amount
from trigger_daemon.core.grammar import Options
from trigger_daemon.core.model import Verdict

OPTIONS: Options = {}

# Bytes parsed, within a probe's budget; an EPU file is some 30 kB, a position list of Tomo 5 some 100 kB.
PARSE_MAX = 15 * 2**20
DEPTH_MAX = 1_000  # of elements in each other; each takes memory until it ends
HEAD_BYTES = 64 * 2**10  # where the first element of a larger file must begin
TAIL_BYTES = 4096  # where the last one must end, blanks and NULs left out
PADDING = b" \t\r\n\0"
WIDE = b"\xff\xfe", b"\xfe\xff"  # UTF-16: half of its bytes are NULs

_SKIPPED = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->|<![A-Za-z][^\[>]*(?:\[.*?\]\s*)?>", re.DOTALL)
_FIRST = re.compile(rb"<([A-Za-z_\x80-\xff][^\s/>]{0,255})[\s/>]")


class _NotParsed(Exception):
    """The document is not parsed to its end, for this reason."""


class _Depth:
    """Counts how deep elements lie in each other."""

    def __init__(self) -> None:
        self._depth = 0

    def begin(self, *_: object) -> None:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise _NotParsed(f"more than {DEPTH_MAX:,} elements in each other")

    def end(self, *_: object) -> None:
        self._depth -= 1


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Parse the whole file; look at both ends of a very large one."""
    if probe.size <= PARSE_MAX:
        return _small(probe.read(0, PARSE_MAX))
    head, tail = probe.read(0, HEAD_BYTES), probe.read(probe.size - TAIL_BYTES, TAIL_BYTES)
    if not any(head):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    return _ends(head, tail, probe.size, f"{amount(probe.size)} are too many to be parsed")


def _small(data: bytes) -> Outcome:
    text = data if data[:2] in WIDE else data.rstrip(PADDING)
    if not text.strip(PADDING):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    depth = _Depth()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _doctype
    parser.StartElementHandler, parser.EndElementHandler = depth.begin, depth.end
    try:
        parser.Parse(text, False)
    except _NotParsed as why:
        return _ends(text, text, len(data), str(why))
    except (expat.ExpatError, ValueError, LookupError) as error:
        ends = _ends(text, text, len(data), "")
        if ends.verdict is Verdict.INCOMPLETE:
            return ends
        return Outcome(Verdict.SUSPECT, f"not well-formed: {error}")
    try:
        parser.Parse(b"", True)
    except _NotParsed as why:  # the parser puts the last token off until it knows that no more will come
        return _ends(text, text, len(data), str(why))
    except expat.ExpatError:
        return Outcome(Verdict.INCOMPLETE, f"ends before its first element is closed, {amount(len(text))} so far")
    return Outcome(Verdict.COMPLETE, f"well-formed, {amount(len(data))}")


def _ends(head: bytes, tail: bytes, size: int, unparsed: str) -> Outcome:
    """Judge a file by its two ends; that is no proof that it is whole. `unparsed`: why it is not parsed."""
    if head[:2] in WIDE:
        return Outcome(Verdict.UNKNOWN, unparsed)
    at = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    while skipped := _SKIPPED.match(head, at):
        at = skipped.end()
    first = _FIRST.match(head, at)
    if first is None:
        if head[at : at + 1] not in (b"<", b""):
            return Outcome(Verdict.SUSPECT, "does not begin like XML")
        if size > HEAD_BYTES:
            return Outcome(Verdict.UNKNOWN, f"no element begins in its first {HEAD_BYTES:,} bytes")
        return Outcome(Verdict.INCOMPLETE, f"no element yet, {amount(size)} so far")
    name = first[1]
    shown = name.decode("utf-8", "replace")
    tail = tail.rstrip(PADDING)
    last = tail[tail.rfind(b"<") :]
    if last.startswith(b"</") and last.endswith(b">") and last[2:-1].rstrip() == name:
        ends = True
    else:  # a comment may follow, and the first element may be empty
        ends = tail.endswith((b"-->", b"?>")) or (last.startswith(b"<" + name) and last.endswith(b"/>"))
    if ends:
        return Outcome(Verdict.UNKNOWN, f"ends as <{shown}> may, but {unparsed}")
    return Outcome(Verdict.INCOMPLETE, f"does not end with </{shown}>, {amount(size)} so far")


def _doctype(name: str, system: str | None, public: str | None, has_declarations: int) -> None:
    if has_declarations:  # entities in entities, and a hundred thousand attributes, keep a parser busy for minutes
        raise _NotParsed("it has declarations of its own, which are not read here")
