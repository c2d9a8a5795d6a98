"""The commands of `on_critical`: whether they can be run, before a disk is critical, and how they ended.

Says it, and does nothing about it. Programs are looked at in a thread: they may lie on a share that hangs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping

LOOK_S = 10.0  # a disk that has not answered by then is told
HEAD_BYTES = 256  # of a script, as the kernel reads
WORDS_MAX = 200  # characters of a command in an alarm

Argv = tuple[str, ...]
_KEY = "on_critical:"


class Commands:
    """What stands against the commands of the settings. `standing`: alarms of an earlier life, key -> what."""

    def __init__(
        self, monotonic: Callable[[], float], commands: Mapping[str, Argv], standing: Mapping[str, str]
    ) -> None:
        self._monotonic = monotonic
        self._failed: dict[str, str] = {}  # volume -> how its command ended
        self._found: tuple[Mapping[str, Argv], dict[str, str]] = {}, {}  # of which commands: volume -> why it cannot be
        self._keys = {key for key in standing if key.startswith(_KEY)}
        self.use(commands)
        for volume, argv in commands.items():  # it failed, and is the same still
            told, begin = standing.get(_KEY + volume, ""), _failed(volume, argv, "")
            if told.startswith(begin):
                self._failed[volume] = told

    def use(self, commands: Mapping[str, Argv]) -> None:
        """Take what the settings say, and look at the programs anew; how they ended before is past."""
        self._commands = dict(commands)
        self._keys |= {_KEY + volume for volume in commands}
        self._failed.clear()
        self._asked_at = self._monotonic()
        threading.Thread(target=self._look, args=(self._commands,), name="on_critical", daemon=True).start()

    def _look(self, commands: Mapping[str, Argv]) -> None:
        found = {volume: unable(argv[0]) for volume, argv in commands.items()}
        if commands is self._commands:  # else whoever was asked later has answered, or will
            self._found = commands, found

    def ended(self, volume: str, argv: Argv, fault: str) -> None:
        """Take how a command ended, '' for well. Any thread."""
        if self._commands.get(volume) != argv:
            return
        if fault:
            self._failed[volume] = _failed(volume, argv, fault)
            return
        self._failed.pop(volume, None)
        self._found[1].pop(volume, None)

    def troubles(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, what ('' if all is well) and hint of an alarm for each volume; none while that is not known."""
        commands, unable = self._found
        if commands is not self._commands:
            if self._monotonic() - self._asked_at < LOOK_S:
                return
            unable = dict.fromkeys(self._commands, "its disk does not answer")
        for key in sorted(self._keys):
            volume = key.removeprefix(_KEY)
            what, hint = self._failed.get(volume, ""), "try it by hand, and mend it; then reload"
            if not what and (why := unable.get(volume)):
                what = f"the `on_critical` of {volume} cannot be run: {self._commands[volume][0]}: {why}"
                hint = "correct it, or `volumes` in the settings, and reload: else nothing is run when it is critical"
            yield key, what, hint


def _failed(volume: str, argv: Argv, fault: str) -> str:
    return f"the `on_critical` of {volume}, `{shlex.join(argv)[:WORDS_MAX]}`, has failed: {fault}"


def unable(program: str) -> str:
    """Return why a program cannot be run, '' if it can. May take as long as its disk does."""
    path = shutil.which(program)
    if path is None:
        if "/" not in program:
            return "no program of this name is in PATH"
        try:
            directory = stat.S_ISDIR(os.stat(program).st_mode)
        except OSError as error:
            return error.strerror or str(error)
        return "it is a directory" if directory else "it may not be executed (chmod +x)"
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""  # one may be allowed to run what one may not read
    if not head.startswith(b"#!"):
        return "" if b"\0" in head else "it is neither a program nor a script: one begins with #!, such as #!/bin/sh"
    interpreter = os.fsdecode(head[2:].splitlines()[0].split(maxsplit=1)[0]) if head[2:].split() else ""
    return "" if os.access(interpreter, os.X_OK) else f"its interpreter {interpreter or '(none)'} cannot be run"
