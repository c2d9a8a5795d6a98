"""What every command shares: `--format` and `--config` on both sides of the noun, and how the daemon's files are found.

Loaded by each command, so it imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from trigger_daemon.cli import place

if TYPE_CHECKING:
    from trigger_daemon.config import Settings
    from trigger_daemon.control import ControlClient
    from trigger_daemon.reader import Reader

ANSWER_S = 5.0  # orders are answered within a second; a loaded machine gets more

OK, FAILURE, USAGE, CONFIGURATION, NEEDS_PERSON, NOT_RUNNING = range(6)


class Setup:
    """The common options of one call, and what follows from them."""

    def __init__(self) -> None:
        self.config: Path | None = None
        self.json = False
        self._state_dir: Path | None = None
        self._said = False  # something stands on stdout as JSON

    def settings(self) -> Settings:
        """Return all settings. Raises ConfigError."""
        from trigger_daemon.config import load_settings

        return load_settings(self.config, os.environ)

    @property
    def state_dir(self) -> Path:
        """Where journal and control file are. Raises ConfigError."""
        if self._state_dir is None:
            found = place.state_dir(self.config, os.environ)
            self._state_dir = Path(found if found is not None else self.settings().state_dir)
        return self._state_dir

    @property
    def reader(self) -> Reader:
        from trigger_daemon.reader import Reader

        return Reader(self.state_dir)

    @property
    def client(self) -> ControlClient:
        from trigger_daemon.control import ControlClient

        return ControlClient(self.state_dir)

    def ask(self, verb: str, why: str = "", *, timeout_s: float = ANSWER_S, **args: Any) -> dict[str, Any]:
        """Return the daemon's answer; arguments that are None are not said. Raises NotRunning, TriggerError."""
        said = {key: value for key, value in args.items() if value is not None}
        return self.client.ask(verb, said, who(), why, timeout_s)

    def tell_if_down(self) -> None:
        """Say that what is shown is of the past, if it is: without a daemon nothing raises an alarm or moves a run."""
        if not self.client.alive():
            words = "the daemon does not run: this is what the journal knows of before; see `trigger-daemon status`"
            click.echo(words, err=True)

    def order(self, verb: str, why: str = "", **args: Any) -> dict[str, Any]:
        """Give an order, print what became of it, and end the command with 1 if it was refused."""
        answer = self.ask(verb, why, **args)
        self.tell(answer)
        return answer

    def tell(self, answer: Mapping[str, Any]) -> None:
        """Print the answer to an order; end the command with 1 if it was refused."""
        from trigger_daemon.cli.text import safe

        if self.json:
            self.data(answer)
        elif answer.get("text"):
            click.echo(safe(str(answer["text"])))
        if not answer.get("ok"):
            self.fail(str(answer.get("error") or "the daemon refused"), str(answer.get("hint") or ""))
            raise click.exceptions.Exit(FAILURE)

    def data(self, value: Any, *, compact: bool = False) -> None:
        """Print JSON: ASCII, so that any byte of a name survives as its surrogate escape."""
        self._said = True
        click.echo(json.dumps(value, ensure_ascii=True, indent=None if compact else 2))
        sys.stdout.flush()

    def fail(self, message: str, hint: str = "", **more: Any) -> None:
        """Say on stderr what is wrong and what to do next; programs that were told nothing yet read it on stdout."""
        from trigger_daemon.cli.text import complain

        complain(message, hint)
        self.refuse(message, hint, **more)

    def refuse(self, message: str, hint: str = "", **more: Any) -> None:
        """Print for programs, if they were told nothing yet, that the command failed, as a refused order does."""
        if self.json and not self._said:
            self.data({"ok": False, "error": message, "hint": hint, **more})


def who() -> str:
    """Return who gives this order, for the journal: whoever called sudo, not root."""
    import pwd

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "") if os.getuid() == 0 else ""
    return f"{behind} (as {name})" if behind and behind != name else name


# ------------------------------------------------------------------------ options


class FileName(click.ParamType[str]):
    """A path as it was typed, which a shell completes; click.Path would look at it, and it may lie on a dead mount."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class FilePath(FileName):
    """The same, as a Path: what is read or walked later is looked at by who does it, who knows how long to wait."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path(value)


FILE_NAME = FileName()
FILE_PATH = FilePath()


class Asked(click.UsageError):
    """A command was called without what it is about; the hint says how to find it."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def _setup(context: click.Context) -> Setup:
    return context.ensure_object(Setup)


def _take_format(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        _setup(context).json = value == "json"


def _take_config(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        _setup(context).config = value


def _common() -> list[click.Parameter]:
    return [
        click.Option(
            ["-F", "--format"], type=click.Choice(["text", "json"]), expose_value=False, callback=_take_format,
            help="For people (text) or programs (json).",
        ),
        _config(),
    ]  # fmt: skip


def _config() -> click.Option:
    return click.Option(
        ["--config"], type=FILE_PATH, metavar="FILE", expose_value=False, callback=_take_config,
        help="Settings of the daemon; /etc/trigger-daemon/config.yaml if absent.",
    )  # fmt: skip


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Command(click.Command):
    """A command that takes the common options."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        keys.setdefault("context_settings", _CONTEXT)
        super().__init__(*args, **keys)
        self.params.extend(_common())


class OwnFormat(click.Command):
    """A command whose data has formats of its own: it declares `--format` itself."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        keys.setdefault("context_settings", _CONTEXT)
        super().__init__(*args, **keys)
        self.params.append(_config())


class Group(click.Group):
    """A noun. It takes the common options too, so that they may stand before the verb."""

    command_class = Command

    def __init__(self, *args: Any, **keys: Any) -> None:
        keys.setdefault("context_settings", _CONTEXT)
        super().__init__(*args, **keys)
        self.params.extend(_common())


Group.group_class = Group


class Lazy(Group):
    """Imports a noun's module when it is used; `modules` is name -> module. One that is absent is not listed."""

    def __init__(self, *args: Any, modules: Mapping[str, str], **keys: Any) -> None:
        super().__init__(*args, **keys)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, module in self._modules.items() if importlib.util.find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = self._modules.get(cmd_name)
        if module is None or importlib.util.find_spec(module) is None:
            return None
        command = getattr(importlib.import_module(module), cmd_name)
        assert isinstance(command, click.Command)
        if not isinstance(command, Command | OwnFormat | Group):
            command.params.extend(_common())
        return command


pass_setup: Callable[[Callable[..., Any]], Callable[..., Any]] = click.make_pass_decorator(Setup, ensure=True)

why_option = click.option("--why", default="", metavar="TEXT", help="Why; it is kept in the journal.")


def captures(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return `name=value` words as a mapping. Raises UsageError."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{pair!r} is not of the form capture=value")
        found[name] = value
    return found


def absolute(path: str) -> str:
    """Return a path as the rules name it: absolute, nothing resolved, also below a working directory behind a link."""
    here = os.environ.get("PWD", "")
    if not os.path.isabs(path) and os.path.isabs(here):
        try:
            if os.path.samefile(here, "."):
                path = os.path.join(here, path)
        except OSError:
            pass  # a stale PWD
    return os.path.abspath(path)
