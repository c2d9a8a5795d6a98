"""The daemon's settings: a YAML file, overridden by TRIGGER_DAEMON_* variables.

Shape and defaults are the model below; every fault names file, line and column,
or the variable. Durations are seconds, sizes bytes, rates bytes per second,
percentages ratios.
"""

from __future__ import annotations

import os
import re
import zoneinfo
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from trigger_daemon.config.source import FILE_BYTES_MAX, Bad, Source, Value, nearest
from trigger_daemon.core import grammar
from trigger_daemon.errors import ConfigError, ConfigFault

DEFAULT_FILE = Path("/etc/trigger-daemon/config.yaml")
PREFIX = "TRIGGER_DAEMON_"
FILE_VARIABLE = "TRIGGER_DAEMON_CONFIG"  # names the file, as --config does

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


class Amount(NamedTuple):
    """An amount of a volume: bytes, or a ratio of its size."""

    bytes: int | None = None
    ratio: float | None = None

    def of(self, total_bytes: int) -> int:
        """Return bytes on a volume of this size."""
        return self.bytes if self.bytes is not None else round(total_bytes * (self.ratio or 0.0))


def _wrong(message: str, hint: str = "") -> PydanticCustomError:
    """Return what a validator raises: words for people, with a hint."""
    return PydanticCustomError("setting", "{message}", {"message": message, "hint": hint})


def _quantity(read: Callable[[str], Any], unit: str, noun: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, bool) or value is None or isinstance(value, list | dict):
            raise _wrong(f"a {noun} is expected", f"write for example 30{unit}")
        if isinstance(value, int | float) or str(value).strip().isdigit():
            raise _wrong(f"{value} has no unit", f"write a {noun} with its unit, such as {str(value).strip()}{unit}")
        try:
            return read(str(value))
        except (ValueError, OverflowError) as error:
            raise _wrong(str(error), "a number, a dot for decimals, and a unit, nothing else") from None

    return convert


def _ratio(text: str) -> float:
    found = _PERCENT.fullmatch(text.strip())
    if not found or float(found[1]) > 100:
        raise ValueError(f"{text!r} is not a percentage; write for example 80%")
    return float(found[1]) / 100


def _amount(text: str) -> Amount:
    return Amount(ratio=_ratio(text)) if "%" in text else Amount(bytes=grammar.size_bytes(text))


def _absolute(value: Any) -> str:
    text = str(value) if isinstance(value, str | Path) else ""
    if not re.match(r"/|[A-Za-z]:[\\/]|\\\\", text):
        raise _wrong(f"an absolute path is expected, not {value!r}", "write it from the top, such as /data")
    return text.rstrip("/") or "/"


def _zone(value: Any) -> str | None:
    if value is None:
        return None
    try:
        zoneinfo.ZoneInfo(str(value))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise _wrong(
            f"{value!r} is not a time zone known here",
            nearest(str(value), zoneinfo.available_timezones(), "time zone"),
        ) from None
    return str(value)


def _switch(value: Any) -> Any:
    """Let `reclaim: true` say what to write instead, and nothing be enabled by accident."""
    if isinstance(value, bool):
        raise _wrong(f"`{str(value).lower()}` is not understood", "write enabled or disabled")
    return value


def _argv(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(_quantity(grammar.duration_s, "s", "duration"))]
Rate = Annotated[int, BeforeValidator(_quantity(grammar.rate_bytes_per_s, "MB/s", "rate"))]
Ratio = Annotated[float, BeforeValidator(_quantity(_ratio, "%", "percentage"))]
Limit = Annotated[Amount, BeforeValidator(_quantity(_amount, "GB", "size or percentage"))]
Absolute = Annotated[str, BeforeValidator(_absolute)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SweepSettings(_Part):
    every_s: Duration = Field(default=30.0, alias="every", gt=0)  # of what is new: directories that changed
    full_s: Duration = Field(default=900.0, alias="full", gt=0)  # of everything


class VolumeSettings(_Part):
    path: Absolute
    reserve: Limit = Amount(bytes=0)
    low: Limit | None = None
    enough: Limit | None = None
    critical: Limit | None = None
    on_critical: Annotated[tuple[str, ...], BeforeValidator(_argv)] = ()  # a command, as words

    @model_validator(mode="after")
    def _ordered(self) -> VolumeSettings:
        if self.enough is not None and self.low is None:
            raise _wrong("`enough` without `low`: reclaim would end, but never begin", "set `low` too")
        for below, above in (("critical", "low"), ("low", "enough")):
            least, most = getattr(self, below), getattr(self, above)
            if least is None or most is None:
                continue
            same_kind = (least.bytes is None) == (most.bytes is None)
            if same_kind and (least.bytes or least.ratio or 0) > (most.bytes or most.ratio or 0):
                raise _wrong(f"`{below}` must not be more than `{above}`", "critical, low and enough are free space")
        return self


class Condition(_Part):
    """While it holds, our own work is slowed to `bandwidth`, or stands still where that is absent."""

    cpu_above: Ratio | None = None
    io_pressure_above: Ratio | None = None
    process: str | None = None
    bandwidth: Rate | None = None

    @model_validator(mode="after")
    def _one(self) -> Condition:
        given = [key for key in ("cpu_above", "io_pressure_above", "process") if getattr(self, key) is not None]
        if len(given) != 1:
            raise _wrong(
                f"exactly one condition must stand here, not {len(given)}",
                "cpu_above, io_pressure_above, or process; begin each with `- `",
            )
        return self


class ThrottleSettings(_Part):
    runs: int = Field(default=4, ge=1, le=1_000)
    bandwidth: Rate | None = None
    while_: tuple[Condition, ...] = Field(default=(), alias="while")


class LogSettings(_Part):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"  # auto: text on a terminal, else JSON


class Settings(BaseSettings):
    """All settings; use `load_settings`, which knows where each came from."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=False,
    )

    state_dir: Absolute = "/var/lib/trigger-daemon"
    rules_dir: Absolute = "/etc/trigger-daemon/rules"
    events: Literal["auto", "inotify", "watchdog", "none"] = "auto"
    sweep: SweepSettings = SweepSettings()
    volumes: tuple[VolumeSettings, ...] = ()
    throttle: ThrottleSettings = ThrottleSettings()
    reclaim: Annotated[Literal["disabled", "enabled"], BeforeValidator(_switch)] = "disabled"
    time_zone: Annotated[str | None, BeforeValidator(_zone)] = None  # None: the machine's
    mqtt: dict[str, Any] = {}
    globus: dict[str, Any] = {}
    log: LogSettings = LogSettings()
    keep_done_s: Duration = Field(default=7_776_000.0, alias="keep_done", gt=0)  # with their manifests

    @property
    def zone(self) -> str:
        """The time zone that times of day are meant in: as set, else the machine's, UTC where it has none."""
        if self.time_zone is not None:
            return self.time_zone
        _, found, name = os.path.realpath("/etc/localtime").partition("zoneinfo/")
        try:
            return zoneinfo.ZoneInfo(name).key if found else "UTC"
        except (zoneinfo.ZoneInfoNotFoundError, ValueError):
            return "UTC"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing that was not passed: the environment is an argument of `load_settings`."""
        return (init_settings,)


class _Given(PydanticBaseSettingsSource):
    """Settings that were read already."""

    def __init__(self, settings_cls: type[BaseSettings], given: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._given = given

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._given.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._given


def load_settings(path: Path | None, env: Mapping[str, str]) -> Settings:
    """Return the settings of a file (None: the default one, which may be absent) and the environment over it.

    Raises ConfigError with every fault.
    """
    if path is None and env.get(FILE_VARIABLE):
        path = Path(env[FILE_VARIABLE])
    faults: list[ConfigFault] = []
    root = _file(path, faults)
    variables, overrides = _variables(env, faults)
    from_file: dict[str, Any] = {}
    if root is not None:
        try:
            from_file = root.plain()
        except Bad as bad:
            faults.append(bad.fault)
        faults.extend(fault for fault in root.source.faults if fault not in faults)
    if faults:
        raise ConfigError(faults)

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            *sources: PydanticBaseSettingsSource,
            **more: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return _Given(settings_cls, overrides), _Given(settings_cls, from_file)

    try:
        return Loaded()
    except ValidationError as error:
        name = str(path or DEFAULT_FILE)
        found = [_fault(item, root, variables, name) for item in error.errors(include_url=False)]
        raise ConfigError(sorted(found, key=lambda fault: (fault.line, fault.column))) from None


def _file(path: Path | None, faults: list[ConfigFault]) -> Value | None:
    """Return the root of the settings file; None where there is none, or it has a fault."""
    file = path or DEFAULT_FILE
    text = read_text(file, faults, missing_is_fault=path is not None)
    if text is None or not re.sub(r"#.*", "", text).strip():
        return None  # an empty file is all defaults
    source = Source(str(file), text)
    root = source.compose(empty="write settings as `key: value`")
    if root is not None and root.kind != "map":
        source.add(root.fault(f"settings are a mapping, not {root.words()}", "write `key: value`, with the space"))
    faults.extend(source.faults)
    return root if not source.faults else None


def read_text(file: Path, faults: list[ConfigFault], *, missing_is_fault: bool) -> str | None:
    """Return the text of a configuration file; None if it cannot be read, with the fault recorded."""
    try:
        if not file.exists() and not missing_is_fault:
            return None
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            faults.append(ConfigFault(str(file), 0, 0, "this is not a regular file"))
            return None
        with file.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        who = "let the daemon's user read it" if isinstance(error, PermissionError) else "check the path"
        faults.append(ConfigFault(str(file), 0, 0, f"cannot be read: {error.strerror or error}", who))
        return None
    if len(content) > FILE_BYTES_MAX:
        faults.append(ConfigFault(str(file), 0, 0, f"the file is larger than {FILE_BYTES_MAX:,} bytes", "split it"))
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.rpartition(b"\n")[2]
        faults.append(ConfigFault(
            str(file), before.count(b"\n") + 1, len(line.decode("utf-8", "replace")) + 1,
            f"the file is not UTF-8: byte 0x{content[error.start]:02X}", "save it as UTF-8",
        ))
        return None


def _variables(
    env: Mapping[str, str], faults: list[ConfigFault]
) -> tuple[dict[tuple[str, ...], str], dict[str, Any]]:
    """Return the variables by what they set, and what they set, nested."""
    variables: dict[tuple[str, ...], str] = {}
    overrides: dict[str, Any] = {}
    for variable, text in sorted(env.items()):
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE or text == "":
            continue
        keys = tuple(variable[len(PREFIX) :].lower().split("__"))
        value: Any = text
        if text.lstrip()[:1] in ("[", "{"):
            source = Source(variable, text)
            root = source.compose(empty="")
            try:
                value = root.plain() if root is not None else None
            except Bad as bad:
                source.add(bad.fault)
            if source.faults:
                first = source.faults[0]
                faults.append(ConfigFault(variable, 0, 0, f"cannot be read: {first.message}", "write JSON"))
                continue
        inner = overrides
        for key in keys[:-1]:
            deeper = inner.setdefault(key, {})
            inner = deeper if isinstance(deeper, dict) else {}
        inner[keys[-1]] = value
        variables[keys] = variable
    return variables, overrides


# ------------------------------------------------------------------------- faults


def _fault(item: Any, root: Value | None, variables: Mapping[tuple[str, ...], str], file: str) -> ConfigFault:
    """Return pydantic's error in our words, at its place."""
    keys = tuple(item["loc"])
    names = [str(key) for key in keys if not isinstance(key, int)]
    message, hint = _words(item, names)
    for variable_keys, variable in variables.items():
        if tuple(map(str, keys))[: len(variable_keys)] == variable_keys:
            return ConfigFault(variable, 0, 0, message, hint)
    if root is None:
        return ConfigFault(file, 0, 0, message, hint)
    place = root
    for key in keys:
        if place.kind == "list" and isinstance(key, int):
            place = place.items()[key]
        elif place.kind == "map":
            found = next(((k, v) for k, v in place.pairs() if k.node.value == key), None)
            if found is None:
                break
            place = found[0] if item["type"] == "extra_forbidden" and key == keys[-1] else found[1]
    return place.fault(message, hint)


def _words(item: Any, names: list[str]) -> tuple[str, str]:
    key = names[-1] if names else "settings"
    match item["type"]:
        case "setting":
            return f"`{key}`: {item['ctx']['message']}", str(item["ctx"]["hint"])
        case "extra_forbidden":
            return f"unknown setting `{key}`", nearest(key, _known(names[:-1]), "setting")
        case "missing":
            owner = f"`{names[-2]}`" if len(names) > 1 else "the settings"
            return f"{owner} lacks the key `{key}`", "add it"
        case "literal_error":
            given = str(item["input"])
            choices = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
            return f"`{key}` must be one of {', '.join(choices)}, not `{given}`", nearest(given, choices)
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"`{key}` must be a mapping (`key: value`)", "indent its keys below it"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"`{key}` must be a whole number, not `{item['input']}`", "write for example 4"
        case "string_type":
            return f"`{key}` must be a text", "write it in quotes"
        case "tuple_type" | "list_type":
            return f"`{key}` must be a list", "write each on a line of its own, after `- `"
        case _:
            return f"`{key}`: {item['msg'][:1].lower()}{item['msg'][1:]}", f"it was given {item['input']!r}"


def _known(names: list[str]) -> set[str]:
    """Return the keys of the section at a path of keys."""
    model: type[BaseModel] = Settings
    for name in names:
        for key, field in model.model_fields.items():
            if name in (key, field.alias):
                model = _model_of(field.annotation) or model
    return {field.alias or key for key, field in model.model_fields.items()}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_of(part)) is not None), None)


__all__ = ["Amount", "Settings", "load_settings"]
