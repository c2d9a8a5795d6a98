"""Turn a page of docs/reference into a manual page: `man.py PAGE.md NAME SECTION VERSION "what it is"`.

One source for both: what the tests hold to the program in docs/reference is
what `man` shows. Knows the Markdown that those pages use, and nothing else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEE_ALSO = r"""
.SH FILES
.TP
.I /etc/trigger\-daemon/config.yaml
The settings.
.TP
.I /etc/trigger\-daemon/rules/*.yaml
The rules.
.TP
.I /var/lib/trigger\-daemon
The state directory: the journal, and what the daemon and its commands tell each other.
.TP
.I /usr/share/doc/trigger\-daemon
Documents, example rules, and a drop-in for the service.
.SH SEE ALSO
.BR trigger\-daemon (1),
.BR trigger\-daemon.conf (5),
.BR trigger\-daemon.rules (5),
.BR systemd.exec (5),
.BR journalctl (1)
"""

_PIECES = re.compile(
    r"`(?P<code>[^`]+)`|\[(?P<link>(?:[^\]`]|`[^`]*`)*)\]\([^)]*\)"
    r"|\*\*(?P<bold>.+?)\*\*|\*(?P<italic>[^*\s][^*]*)\*"
)
_ESCAPED = str.maketrans(
    {"\\": "\\e", "-": "\\-", "`": "\\(ga", "'": "\\(aq", "~": "\\(ti", "^": "\\(ha"}
)
_FENCE, _ITEM, _HEADING = re.compile(r"^ *```"), re.compile(r"^ *(?:[-*]|(\d+)\.) +"), re.compile(r"^(#+) +(.*)")


def page(markdown: str, *, name: str, section: int, version: str, what: str) -> str:
    """Return the manual page."""
    head = f'.TH {_plain(name)} {section} "" "trigger\\-daemon {_plain(version)}" "trigger\\-daemon"\n'
    head += f".nh\n.ad l\n.SH NAME\n{_plain(name)} \\- {_plain(what)}\n.SH DESCRIPTION\n"
    return head + "\n".join(_blocks(markdown.splitlines())) + SEE_ALSO


def _blocks(lines: list[str]) -> Iterator[str]:
    """Yield roff for each block: heading, table, code, list item, paragraph."""
    at = 0
    while at < len(lines):
        line = lines[at]
        end = at + 1
        if _FENCE.match(line):
            while not _FENCE.match(lines[end]):
                end += 1
            indent = len(line) - len(line.lstrip())
            yield ".PP\n.RS 4\n.nf"
            yield from (_line(_plain(code[indent:])) for code in lines[at + 1 : end])
            yield ".fi\n.RE"
            end += 1
        elif found := _HEADING.match(line):
            if len(found[1]) > 1:
                title = _inline(found[2])
                yield f".SH {title.upper() if '`' not in found[2] else title}" if len(found[1]) == 2 else f".SS {title}"
        elif line.startswith("|"):
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            yield from _table([_cells(row) for row in lines[at:end]])
        elif line.strip():
            while end < len(lines) and lines[end].strip() and not re.match(r"^ *(```|[-*] |\d+\. )|^[#|]", lines[end]):
                end += 1
            text = " ".join(part.strip() for part in lines[at:end])
            if item := _ITEM.match(text):
                yield f'.IP "{item[1] + "." if item[1] else chr(92) + "(bu"}" 4'
                text = text[item.end() :]
            else:
                yield ".PP"
            yield _line(_inline(text))
        at = end


def _cells(row: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Yield a tagged paragraph a row: terminals are too narrow for columns of sentences."""
    header = rows[0]
    for row in rows[2:]:
        yield f".TP\n{_line(_inline(row[0])) or chr(92) + '&'}"
        rest = [_inline(row[1])] if len(row) > 1 else []
        rest += [f"({_inline(header[n])}: {_inline(row[n])})" for n in range(2, len(row)) if row[n] not in ("", "–")]
        yield _line(" ".join(rest)) or "\\&"


def _inline(text: str) -> str:
    out, at = "", 0
    for found in _PIECES.finditer(text):
        out += _plain(text[at : found.start()])
        if found["code"]:
            out += rf"\fB{_plain(found['code'])}\fR"
        elif found["link"] is not None:
            out += _inline(found["link"])
        elif found["bold"]:
            out += rf"\fB{_plain(found['bold'])}\fR"
        else:
            out += rf"\fI{_plain(found['italic'])}\fR"
        at = found.end()
    return out + _plain(text[at:])


def _plain(text: str) -> str:
    return text.translate(_ESCAPED)


def _line(text: str) -> str:
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    source, name, section, version, what = sys.argv[1:]
    sys.stdout.write(
        page(Path(source).read_text(encoding="utf-8"), name=name, section=int(section), version=version, what=what)
    )
