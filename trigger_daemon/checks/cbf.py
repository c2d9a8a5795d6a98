"""Is every binary section of a CBF image followed by its closing boundary, and by nothing but the end of its text?

Up to seven bytes may still be missing then (line ends and `;`); the payload
is there. A file of several images does not say how many: it is unknown whether
more follow, and after the first of them only a `loop_` tells that there may
be. A changed payload byte is only found with `md5: true`. The Content-MD5
of the first section that has one is handed on, so that a copy can be proved.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._words import amount, progress
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict
from trigger_daemon.probe import ORDER

OPTIONS: Options = {
    "md5": Option("bool", "read the payload and compare it with Content-MD5, if the file has one", default=False),
}

MARKER = b"\x0c\x1a\x04\xd5"
BOUNDARY = b"--CIF-BINARY-FORMAT-SECTION--"
CLOSING = BOUNDARY + b"--"
HEADER_BYTES = 64 * 2**10  # text before a payload; miniCBF has about 2 kB, imgCIF with a full header about 10 kB
FIRST_READ_BYTES = 4096  # enough for miniCBF, so that the usual file costs two small reads
SECTIONS_MAX = 64  # an imgCIF holds a handful
MD5_BYTES_MAX = 15 * 2**20  # of payloads read for their MD5, within a probe's budget; a PILATUS 6M frame has 6 MB
CARRIES_DIGEST = True  # of the file's own content, for `own_digest` of actions
CHUNK_BYTES = 2**20  # of the payload at a time, for its MD5

_SIZE = re.compile(rb"^X-Binary-Size:[ \t]*(\d{1,18})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)
_PADDING = re.compile(rb"^X-Binary-Size-Padding:[ \t]*(\d{1,18})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)
_ANY_MD5 = re.compile(rb"^Content-MD5[ \t]*:", re.MULTILINE | re.IGNORECASE)
# Some writers leave the padding out, set quotes, or begin a new line for it.
_MD5 = re.compile(
    rb"""^Content-MD5[ \t]*:[ \t]*(?:\r?\n[ \t]+)?["']?([A-Za-z0-9+/]{22})={0,2}["']?[ \t]*\r?$""",
    re.MULTILINE | re.IGNORECASE,
)
_LOOP = re.compile(rb"(?<!\S)loop_(?:\s+_\S+)*?\s+_array_data\.data\s", re.IGNORECASE)
_TEXT_ENDS = re.compile(rb"\n*;\n*")  # a text field ends with a `;` that begins a line
_TEXT_BOUND = re.compile(rb"^;", re.MULTILINE)


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Walk the binary sections; two small reads each, and the payload once with `md5: true`."""
    at = payload_bytes = 0
    content = ""
    doubts: dict[str, Verdict] = {}  # what is in the way of `complete`
    read_bytes = 0
    for number in range(SECTIONS_MAX):
        text, marker = _header(probe, at)
        if marker < 0:
            if number and BOUNDARY not in text:
                images = "the image is" if number == 1 else f"{number} images are"
                closed = f"{images} closed, {amount(payload_bytes)} payload in {amount(probe.size)}"
                return _closed(closed, _tail(text, at + len(text) == probe.size), doubts, content)
            return _headless(text, at, probe.size, number)
        size, padding = _SIZE.search(text), _PADDING.search(text)
        if size is None:
            return Outcome(Verdict.SUSPECT, f"section {number + 1} has no X-Binary-Size")
        begins = at + marker + len(MARKER)
        ends = begins + int(size[1]) + (int(padding[1]) if padding else 0)
        closing = probe.read(ends, len(CLOSING) + 2)
        line = closing.lstrip(b"\r\n")
        if line != CLOSING and CLOSING.startswith(line) and len(closing) < len(CLOSING) + 2:
            return Outcome(Verdict.INCOMPLETE, f"the image ends early, {progress(probe.size, ends + 2 + len(CLOSING))}")
        if not line.startswith(CLOSING):
            if CLOSING.startswith(line.rstrip(b"\0")):  # a copy tool set the length first
                return Outcome(Verdict.INCOMPLETE, f"zeros where the image should end, at {amount(ends)}")
            return Outcome(Verdict.SUSPECT, f"no closing boundary where the image should end, at byte {ends:,}")
        if number or _LOOP.search(text):
            doubts["nothing says whether more will follow"] = Verdict.UNKNOWN
        stated = _stated(text)
        if stated:
            content = content or f"md5:{stated.hex()}:{begins}:{int(size[1])}"
        if options.get("md5") and stated and read_bytes + int(size[1]) > MD5_BYTES_MAX:
            more = f"more than the {amount(MD5_BYTES_MAX)} that are read for an MD5 here"
            doubts[f"{more}: let the copy verify it"] = Verdict.UNKNOWN
        elif options.get("md5") and stated:
            read_bytes += int(size[1])
            if (found := _digest(probe, begins, int(size[1]))) != stated:
                why = f"the image's MD5 is {found.hex()}, and its Content-MD5 says {stated.hex()}"
                return Outcome(Verdict.INCOMPLETE, why)
        elif options.get("md5") and _ANY_MD5.search(text):
            doubts["its Content-MD5 cannot be read"] = Verdict.SUSPECT
        payload_bytes += int(size[1])
        at = ends + closing.index(CLOSING) + len(CLOSING)
    return Outcome(Verdict.UNKNOWN, f"more than {SECTIONS_MAX} binary sections")


def _header(probe: Window, at: int) -> tuple[bytes, int]:
    """Return the text from `at` and where its section's marker is in it (-1: none)."""
    text = probe.read(at, FIRST_READ_BYTES)
    if (marker := text.find(MARKER)) < 0 and len(text) == FIRST_READ_BYTES:
        text += probe.read(at + FIRST_READ_BYTES, HEADER_BYTES - FIRST_READ_BYTES)
        marker = text.find(MARKER)
    return (text, marker) if marker < 0 else (text[:marker], marker)


def _headless(text: bytes, at: int, size: int, number: int) -> Outcome:
    if not any(text):
        return Outcome(Verdict.INCOMPLETE, "still empty")
    if size - at < HEADER_BYTES:
        return Outcome(Verdict.INCOMPLETE, f"section {number + 1} has no image yet, {amount(size)} so far")
    return Outcome(Verdict.SUSPECT, f"no binary section in {HEADER_BYTES:,} bytes from byte {at:,}")


def _closed(closed: str, tail: tuple[Verdict, str], doubts: Mapping[str, Verdict], content: str) -> Outcome:
    """Return the worst that is to be said of a file whose images are all closed."""
    said = [tail, *((verdict, why) for why, verdict in doubts.items())]
    worst = max((verdict for verdict, _ in said), key=ORDER.index)
    whys = "; ".join(why for verdict, why in said if verdict is worst and why)
    whole = worst in (Verdict.COMPLETE, Verdict.UNKNOWN)
    return Outcome(worst, f"{closed}; {whys}" if whys else closed, content=content if whole else "")


def _tail(text: bytes, to_the_end: bool) -> tuple[Verdict, str]:
    """Judge what follows the last image: in a whole file the end of its text field, line ends and one `;`."""
    lines = text.replace(b"\r", b"\n")
    if b"\0" in text:
        return Verdict.SUSPECT, "bytes that are no text follow"
    if not to_the_end:
        return Verdict.UNKNOWN, f"more than {amount(len(text))} of text follow"
    if not lines.strip(b"\n") or _TEXT_ENDS.fullmatch(lines):
        return Verdict.COMPLETE, ""
    last = lines.rpartition(b"\n")[2]
    open_text = _TEXT_ENDS.match(lines) and len(_TEXT_BOUND.findall(lines)) % 2 == 0
    if open_text or (last and BOUNDARY.startswith(last)):
        return Verdict.INCOMPLETE, "the next one has only begun"
    return Verdict.UNKNOWN, f"{amount(len(text))} of text follow, and nothing says whether more will"


def _stated(text: bytes) -> bytes:
    """Return the MD5 that a section's header states, b'' if there is none that can be read."""
    found = _MD5.search(text)
    return base64.b64decode(found[1] + b"==") if found else b""


def _digest(probe: Window, begins: int, length: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    for offset in range(0, length, CHUNK_BYTES):
        digest.update(probe.read(begins + offset, min(CHUNK_BYTES, length - offset)))
    return digest.digest()
