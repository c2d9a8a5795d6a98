"""Daemon settings and rule files. Every fault is told as file:line:column with the line and a hint.

A rule set is used whole or not at all; all its faults are collected, because
nobody wants to mend a file one mistake at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trigger_daemon.config import across
from trigger_daemon.config.rules import RULES_MAX, Draft, read_file
from trigger_daemon.config.schema import rules_schema
from trigger_daemon.config.settings import MqttSettings, Settings, load_settings, read_text
from trigger_daemon.config.source import Source
from trigger_daemon.core.rules import Rule
from trigger_daemon.errors import ConfigError, ConfigFault

FILES_MAX = 1_000  # rule files; more is not a rules directory


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of all files. To be used only where there are no faults."""

    rules: tuple[Rule, ...]
    source: list[dict[str, str]] = field(default_factory=list)  # [{"file", "text"}], as the journal keeps it
    faults: list[ConfigFault] = field(default_factory=list)


def load_rules(directory: Path, settings: Settings | None = None) -> RuleSet:
    """Read every `*.yaml` of a directory, in the order of their names. Never raises: faults are in the result."""
    faults: list[ConfigFault] = []
    files: list[tuple[str, str]] = []
    try:
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = "create it, or set `rules_dir` (settings: --config FILE)" if missing else "let the daemon's user read it"
        return RuleSet((), [], [ConfigFault(str(directory), 0, 0, f"cannot be read: {error.strerror or error}", hint)])
    wanted = [name for name in names if name.endswith(".yaml")]
    faults.extend(
        ConfigFault(str(directory / name), 0, 0, "only *.yaml is read", f"rename it to {name[:-4]}.yaml")
        for name in names if name.endswith(".yml")
    )
    if len(wanted) > FILES_MAX:
        hint = f"at most {FILES_MAX:,} are read"
        faults.append(ConfigFault(str(directory), 0, 0, f"{len(wanted):,} rule files", hint))
        wanted = wanted[:FILES_MAX]
    for name in wanted:
        text = read_text(directory / name, faults, missing_is_fault=True)
        if text is not None:
            files.append((str(directory / name), text))
    read = parse_rules(files, settings=settings)
    return RuleSet(read.rules, read.source, [*faults, *read.faults])


def parse_rules(
    files: Sequence[tuple[str, str]], *, elsewhere: bool = False, settings: Settings | None = None
) -> RuleSet:
    """Read rules from (name, text) of each file. Never raises for what is written there.

    With `settings`, what rules need of them is checked, too: which directories a collection shows, say.

    `elsewhere`: their checks ran on another machine, and need nothing that is not installed on this one.
    """
    sources = [Source(name, text.removeprefix("\ufeff"), elsewhere) for name, text in files]
    drafts: list[Draft] = []
    for source in sources:
        drafts.extend(read_file(source))
    if len(drafts) > RULES_MAX:
        drafts[RULES_MAX].read.at.add(f"{len(drafts):,} rules", f"at most {RULES_MAX:,} are allowed over all files")
    else:
        across.check(drafts, settings.for_actions() if settings is not None else None)
    faults = [
        fault
        for source in sources
        for fault in sorted(source.faults, key=lambda fault: (fault.line, fault.column))
    ]
    return RuleSet(tuple(draft.rule for draft in drafts), [{"file": n, "text": t} for n, t in files], faults)


__all__ = [
    "ConfigError", "ConfigFault", "MqttSettings", "RuleSet", "Settings", "load_rules", "load_settings", "parse_rules",
    "rules_schema",
]
