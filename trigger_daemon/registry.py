"""Find actions and checks by the name that rules use.

`start: {tape: ...}` is `actions/tape.py`; `checks: [mrc]` is `checks/mrc.py`.
Out-of-tree ones come by the entry points `trigger_daemon.actions` and
`trigger_daemon.checks`; one of ours is never replaced by them. A provider is
imported when first asked for, and one that cannot be imported harms nobody
who does not ask for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import trigger_daemon.actions
import trigger_daemon.checks
from trigger_daemon.errors import TriggerError

# What importing somebody else's file may raise: it is run, so nearly anything that names a mistake in code.
_LOAD_ERRORS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError, RuntimeError,
    AssertionError, ArithmeticError,
)


class Unregistered(TriggerError):
    """Nothing has this name."""


class Unusable(TriggerError):
    """What has this name cannot be loaded, or does not keep the contract."""


def action_names() -> list[str]:
    """Return the names of all actions, sorted, without importing them."""
    return _names(trigger_daemon.actions)


def check_names() -> list[str]:
    """Return the names of all completeness checks, sorted, without importing them."""
    return _names(trigger_daemon.checks)


def find_action(name: str) -> type[Any]:
    """Return the class `Action` of a provider; raise Unregistered or Unusable."""
    found = _find(trigger_daemon.actions, "action", name)
    action = getattr(found, "Action", None) if isinstance(found, ModuleType) else found
    if not isinstance(action, type):
        raise Unusable(
            f"the action {name} cannot be used: it has no class `Action`",
            hint="see `trigger_daemon/actions/__init__.py` for what an action is",
        )
    _needs(action, "action", name, ("OPTIONS", "VERIFIES"))
    return action


def find_check(name: str) -> ModuleType:
    """Return the module of a completeness check; raise Unregistered or Unusable."""
    found = _find(trigger_daemon.checks, "check", name)
    _needs(found, "check", name, ("OPTIONS", "check"))
    module: ModuleType = found
    return module


def _needs(found: Any, noun: str, name: str, attributes: tuple[str, ...]) -> None:
    missing = [attribute for attribute in attributes if not hasattr(found, attribute)]
    if missing:
        raise Unusable(
            f"the {noun} {name} cannot be used: it lacks {' and '.join(missing)}",
            hint=f"see `trigger_daemon/{noun}s/__init__.py` for what a {noun} is",
        )


def _names(package: ModuleType) -> list[str]:
    return sorted({*_own(package), *_foreign(package)})


def _own(package: ModuleType) -> set[str]:
    return {found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_")}


def _foreign(package: ModuleType) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=package.__name__)}


def _find(package: ModuleType, noun: str, name: str) -> Any:
    own = name in _own(package)
    point = None if own else _foreign(package).get(name)
    if not own and point is None:
        raise Unregistered(f"there is no {noun} `{name}`", hint=f"known are: {', '.join(_names(package)) or 'none'}")
    try:
        return importlib.import_module(f"{package.__name__}.{name}") if point is None else point.load()
    except ModuleNotFoundError as error:
        raise Unusable(
            f"the {noun} {name} cannot be loaded: no module `{error.name}`",
            hint=f"install what it needs, for example with `pip install 'trigger-daemon[{name.partition('_')[0]}]'`",
        ) from error
    except _LOAD_ERRORS as error:
        raise Unusable(
            f"the {noun} {name} cannot be loaded: {type(error).__name__}: {error}",
            hint=f"its file has a fault; `python -c 'import {package.__name__}.{name}'` shows where" if own
            else f"ask who provides {point.value if point else name}",
        ) from error


def extra_names(action: type[Any], options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return names that this action fills into its strings itself, when it starts (`{manifest}`).

    Those that the options give themselves, too (`{TOKEN}`), where it has a static method `extra_names(options)`.
    """
    given = getattr(action, "extra_names", None)
    return (*getattr(action, "EXTRA_NAMES", ()), *(given(options) if given is not None and options else ()))
