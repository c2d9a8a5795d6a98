"""Does an XML file (EPU's .xml and .dm too) end where its first element ends?

Whole is not final: EpuSession.dm and its like are rewritten in place.
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

PARSE_MAX = 2**20  # bytes parsed as a whole; an EPU file is some 30 kB, a position list of Tomo 5 some 100 kB
HEAD_BYTES = 64 * 2**10  # where the first element of a larger file must begin
TAIL_BYTES = 4096  # where the last one must end, blanks and NULs left out
PADDING = b" \t\r\n\0"

_SKIPPED = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->|<![A-Za-z][^\[>]*(?:\[.*?\]\s*)?>", re.DOTALL)
_FIRST = re.compile(rb"<([A-Za-z_\x80-\xff][^\s/>]{0,255})[\s/>]")


class _Entities(Exception):
    """The document declares entities; they are never expanded."""


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Parse a small file, look at both ends of a large one."""
    if probe.size <= PARSE_MAX:
        return _small(probe.read(0, PARSE_MAX))
    return _large(probe.read(0, HEAD_BYTES), probe.read(probe.size - TAIL_BYTES, TAIL_BYTES), probe.size)


def _small(data: bytes) -> Outcome:
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # UTF-16: half of its bytes are NULs
    text = data if wide else data.rstrip(PADDING)
    if not text.strip(PADDING):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    parser = expat.ParserCreate()
    parser.EntityDeclHandler = _refuse
    try:
        parser.Parse(text, False)
    except _Entities:
        return _ends(text, text, len(data))
    except (expat.ExpatError, ValueError, LookupError) as error:
        ends = _ends(text, text, len(data))
        if ends.verdict is Verdict.INCOMPLETE:
            return ends
        return Outcome(Verdict.SUSPECT, f"not well-formed: {error}")
    try:
        parser.Parse(b"", True)
    except _Entities:  # the parser puts the last token off until it knows that no more will come
        return _ends(text, text, len(data))
    except expat.ExpatError:
        return Outcome(Verdict.INCOMPLETE, f"ends before its first element is closed, {amount(len(text))} so far")
    return Outcome(Verdict.COMPLETE, f"well-formed, {amount(len(data))}")


def _large(head: bytes, tail: bytes, size: int) -> Outcome:
    if not any(head):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    return _ends(head, tail, size)


def _ends(head: bytes, tail: bytes, size: int) -> Outcome:
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
    if re.search(rb"</" + re.escape(name) + rb"\s*>\Z", tail.rstrip(PADDING)):
        return Outcome(Verdict.COMPLETE, f"ends with </{shown}>, {amount(size)}")
    return Outcome(Verdict.INCOMPLETE, f"does not end with </{shown}>, {amount(size)} so far")


def _refuse(*_: object) -> None:
    raise _Entities
