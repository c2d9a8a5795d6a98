"""Is every binary section of a CBF image followed by its closing boundary?

Up to seven bytes may still be missing then (line ends and `;`); the payload
is there. A changed payload byte is only found with `md5: true`. The Content-MD5
of the first section that has one is handed on, so that a copy can be proved.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from trigger_daemon.checks import Outcome, Window
from trigger_daemon.checks._words import amount, progress
from trigger_daemon.core.grammar import Option, Options
from trigger_daemon.core.model import Verdict

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
_MD5 = re.compile(rb"^Content-MD5:[ \t]*([A-Za-z0-9+/=]{24})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)


def check(probe: Window, options: Mapping[str, Any], companions: Mapping[str, Window]) -> Outcome:
    """Walk the binary sections; two small reads each, and the payload once with `md5: true`."""
    at = payload_bytes = 0
    content = ""
    read_bytes, unread = 0, False
    for number in range(SECTIONS_MAX):
        text, marker = _header(probe, at)
        if marker < 0:
            if number and BOUNDARY not in text:
                tail = _tail(text, number, payload_bytes, probe.size, content)
                if not unread or tail.verdict is not Verdict.COMPLETE:
                    return tail
                more = f"more than the {amount(MD5_BYTES_MAX)} that are read for an MD5 here: let the copy verify it"
                return Outcome(Verdict.UNKNOWN, f"{tail.why}; {more}", content=content)
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
        if stated := _stated(text):
            content = content or f"md5:{stated.hex()}:{begins}:{int(size[1])}"
            if options.get("md5") and read_bytes + int(size[1]) > MD5_BYTES_MAX:
                unread = True
            elif options.get("md5") and (found := _digest(probe, begins, int(size[1]))) != stated:
                why = f"the image's MD5 is {found.hex()}, and its Content-MD5 says {stated.hex()}"
                return Outcome(Verdict.INCOMPLETE, why)
            else:
                read_bytes += int(size[1]) if options.get("md5") else 0
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


def _tail(text: bytes, number: int, payload_bytes: int, size: int, content: str) -> Outcome:
    if b"\0" in text:
        return Outcome(Verdict.SUSPECT, "bytes that are no text follow the last image")
    images = "the image is" if number == 1 else f"{number} images are"
    closed = f"{images} closed, {amount(payload_bytes)} payload in {amount(size)}"
    return Outcome(Verdict.COMPLETE, closed, content=content)


def _stated(text: bytes) -> bytes:
    """Return the MD5 that a section's header states, b'' if none that can be one."""
    found = _MD5.search(text)
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        return b""
    return digest if len(digest) == 16 else b""


def _digest(probe: Window, begins: int, length: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    for offset in range(0, length, CHUNK_BYTES):
        digest.update(probe.read(begins + offset, min(CHUNK_BYTES, length - offset)))
    return digest.digest()
