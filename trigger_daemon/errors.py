"""Errors that speak to the person who must act: what happened, to what, what to do next."""

from __future__ import annotations

from dataclasses import dataclass


class TriggerError(Exception):
    """Anything the project raises on purpose; `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class JournalError(TriggerError):
    """The journal cannot be used (locked by another daemon, on a network file system, damaged).

    `io`: the disk failed under it. What became of the last transaction is known only after `Journal.reopen()`.
    """

    io = False


class JournalFull(JournalError):
    """No room for the journal; nothing of the transaction stays, and it may be tried again as it is."""


class JournalIo(JournalError):
    """The disk failed under the journal; it must be reopened before it is written again."""

    io = True


class JournalDamaged(JournalIo):
    """The journal cannot be read any more: a person decides (`trigger-daemon journal recover`)."""


class JournalConflict(JournalError):
    """A record contradicts what the journal holds (a version claimed twice); nothing of the transaction stays."""


class NotRunning(TriggerError):
    """The command needs a running daemon."""


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """One fault in a settings or rule file. Lines and columns count from 1; 0 when there is none."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""
    quote: str = ""  # the offending line, without its newline


class ConfigError(TriggerError):
    """Settings or rules that cannot be used; carries every fault found."""

    def __init__(self, faults: list[ConfigFault]) -> None:
        first = faults[0]
        super().__init__(f"{first.file}:{first.line}:{first.column}: {first.message}", hint=first.hint)
        self.faults = faults
