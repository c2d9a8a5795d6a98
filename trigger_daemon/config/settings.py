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
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from trigger_daemon.broker import CREDENTIAL, Account, account
from trigger_daemon.config.source import FILE_BYTES_MAX, Bad, Source, Value
from trigger_daemon.core import grammar
from trigger_daemon.core.grammar import nearest
from trigger_daemon.core.storage import CRITICAL, LOW, Amount, Limits
from trigger_daemon.core.storage import Condition as CoreCondition
from trigger_daemon.core.telling import Pace, Ways
from trigger_daemon.errors import ConfigError, ConfigFault

DEFAULT_FILE = Path("/etc/trigger-daemon/config.yaml")
PREFIX = "TRIGGER_DAEMON_"
FILE_VARIABLE = "TRIGGER_DAEMON_CONFIG"  # names the file, as --config does

_SECRETS = {"globus": "client_secret", "mqtt": "password"}  # section -> its key that only the environment may set

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def _wrong(message: str, hint: str = "", *, key: str = "") -> PydanticCustomError:
    """Return what a validator raises: words for people, with a hint. `key`: which key of a mapping is to be shown."""
    return PydanticCustomError("setting", "{message}", {"message": message, "hint": hint, "key": key})


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
        raise ValueError(f"{text!r} is not a percentage from 0% to 100%")
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

    def limits(self) -> Limits:
        """Return them as the core knows them."""
        return Limits(
            self.path, self.reserve, self.low or LOW, self.enough, self.critical or CRITICAL, tuple(self.on_critical)
        )

    @model_validator(mode="after")
    def _ordered(self) -> VolumeSettings:
        if self.enough is not None and self.low is None:
            raise _wrong("`enough` without `low`: reclaim would end, but never begin", "set `low` too", key="enough")
        limits = self.limits()
        for below, above in (("critical", "low"), ("low", "enough")):
            least, most = getattr(limits, below), getattr(limits, above)
            if most is None or (least.bytes is None) != (most.bytes is None):
                continue  # of an amount and a percentage the daemon says it, which knows how large the disk is
            if (least.bytes or least.ratio or 0) > (most.bytes or most.ratio or 0):
                unset = next((key for key in (below, above) if getattr(self, key) is None), "")
                key = above if unset == below else below
                hint = "all three are free space: critical is the least of them, enough the most"
                if unset:
                    hint += f"; `{unset}` is {getattr(limits, unset).ratio:.0%} unless it is set: set it too"
                raise _wrong(f"`{below}` must not be more than `{above}`", hint, key=key)
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

    def plain(self) -> CoreCondition:
        """Return it as the core knows it."""
        if self.process is not None:
            return CoreCondition("process", self.process, self.bandwidth)
        if self.cpu_above is not None:
            return CoreCondition("cpu_above", self.cpu_above, self.bandwidth)
        assert self.io_pressure_above is not None
        return CoreCondition("io_pressure_above", self.io_pressure_above, self.bandwidth)


class ThrottleSettings(_Part):
    runs: int = Field(default=4, ge=1, le=1_000)
    per_destination: int | None = Field(default=None, ge=1, le=1_000)  # runs at once that go to one place
    bandwidth: Rate | None = None
    while_: tuple[Condition, ...] = Field(default=(), alias="while")

    @property
    def conditions(self) -> tuple[CoreCondition, ...]:
        return tuple(condition.plain() for condition in self.while_)


_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _uuid(value: Any) -> str:
    if not _UUID.fullmatch(str(value)):
        raise _wrong(f"{value!r} is not a UUID", "copy it from app.globus.org")
    return str(value).lower()


def _inside(value: Any) -> str:
    text = str(value)
    if not text.startswith("/"):
        raise _wrong(f"a path in a collection begins with /, not {text!r}", f"write /{text}")
    return text.rstrip("/") or "/"


Uuid = Annotated[str, BeforeValidator(_uuid)]


class ManifestSettings(_Part):
    path: Absolute  # where manifests of large batches are written
    collection: Uuid  # that shows this directory


class GlobusSettings(_Part):
    """Who the daemon is to Globus, and what of this machine its collections show."""

    client_id: Uuid | None = None
    client_secret: str | None = Field(default=None, repr=False)  # by the environment only; none: a person logs in
    client_secret_file: Absolute | None = None
    collections: dict[Uuid, dict[Absolute, Annotated[str, BeforeValidator(_inside)]]] = {}
    manifests: ManifestSettings | None = None
    poll_s: Duration = Field(default=2.0, alias="poll", gt=0)  # the shortest pause between two looks at one task
    listed_after_s: Duration = Field(default=300.0, alias="listed_after", gt=0)  # a run or flow is listed by then

    def plain(self) -> dict[str, Any]:
        """Return them as actions are given them."""
        return self.model_dump()


# What a message may order, as a person may: each only does what can be undone, or looked at before it goes on.
MqttVerb = Literal[
    "alarms.ack", "batches.close", "files.go", "files.skip", "pause", "resume", "rules.pause", "rules.resume",
    "runs.cancel", "runs.hold", "runs.retry",
]  # fmt: skip
_LEVEL = re.compile(r"[^/+#\x00-\x1f\x7f]{1,100}")  # of a topic


def _topic(value: Any) -> str:
    text = str(value)
    if not all(_LEVEL.fullmatch(level) for level in text.split("/")) or text.startswith("$") or len(text) > 200:
        raise _wrong(f"{text!r} cannot begin a topic", "names with / between them, without + and #")
    return text


def _level(value: Any) -> str:
    if not _LEVEL.fullmatch(str(value)) or str(value).startswith("$"):
        raise _wrong(f"{value!r} cannot be one level of a topic", "a name without /, + and #")
    return str(value)


def _host(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}|[0-9A-Fa-f:.]*::?[0-9A-Fa-f:.]*(%\w+)?", text) or text.count(":") == 1:
        raise _wrong(f"a name or an address is expected, not {text!r}", "the port goes to `port`, and TLS to `tls`")
    return text


def _tls(value: Any) -> Any:
    """Let `tls: true` mean the certificates that the system trusts."""
    return {} if value is True or value == "true" else None if value is False or value == "false" else value


class TlsSettings(_Part):
    ca: Absolute | None = None  # None: what the system trusts
    certificate: Absolute | None = None  # of ours, where the broker asks for one
    key: Absolute | None = None

    @model_validator(mode="after")
    def _both(self) -> TlsSettings:
        if (self.certificate is None) != (self.key is None):
            raise _wrong("`certificate` and `key` go together", "name both files, or none")
        return self


class MqttSettings(_Part):
    """The broker, what we are called there, and what a message may make us do. Without `host` it is off."""

    host: Annotated[str | None, BeforeValidator(_host)] = None
    port: int | None = Field(default=None, ge=1, le=65_535)
    tls: Annotated[TlsSettings | None, BeforeValidator(_tls)] = None
    user: str | None = None
    password: str | None = Field(default=None, repr=False)  # by the environment only
    password_file: Absolute | None = None
    prefix: Annotated[str, BeforeValidator(_topic)] = "trigger-daemon"
    workstation: Annotated[str, BeforeValidator(_level)] | None = None  # None: the host's name
    keepalive_s: Duration = Field(default=30.0, alias="keepalive", ge=5, le=3_600)
    spool: int = Field(default=10_000, ge=1, le=1_000_000)  # events that a broker which was away is told of later
    storage_every_s: Duration = Field(default=30.0, alias="storage_every", ge=1)
    hints: bool = False
    orders: tuple[MqttVerb, ...] = ()

    @model_validator(mode="after")
    def _somewhere(self) -> MqttSettings:
        if self.host is None and self.model_fields_set - {"host", "password"}:
            raise _wrong("it lacks the key `host`", "name the broker; without it nothing is told and nothing is heard")
        if self.password_file is not None and self.user is None:
            raise _wrong("`password_file` without `user`", "name the user that it belongs to")
        return self

    @property
    def password_or_file(self) -> bool:
        """Whether there is a password, or is to be one."""
        return bool(self.password or self.password_file)

    @property
    def at(self) -> str:
        """The broker, for people."""
        return self.account.at

    @property
    def port_or_default(self) -> int:
        return self.account.port

    @property
    def account(self) -> Account:
        """The broker and who we are there, where one is set."""
        return account(self.plain(), CREDENTIAL)

    def plain(self) -> dict[str, Any]:
        """Return them as actions are given them."""
        return self.model_dump()


def _port(value: Any) -> Any:
    """Let an address say what to write instead: metrics are never open to the network."""
    if isinstance(value, str) and not value.strip().isdigit():
        raise _wrong(f"{value!r} is no port", "a number alone: it is open on this machine (127.0.0.1), nowhere else")
    return value


class MetricsSettings(_Part):
    """Where figures are told in Prometheus' text format; nowhere, unless asked."""

    file: Absolute | None = None  # for the textfile collector of node_exporter
    every_s: Duration = Field(default=15.0, alias="every", ge=1)
    port: Annotated[int | None, BeforeValidator(_port)] = Field(default=None, ge=1, le=65_535)  # on 127.0.0.1

    @model_validator(mode="after")
    def _collected(self) -> MetricsSettings:
        if self.file is not None and not self.file.endswith(".prom"):
            raise _wrong(f"`file` must end in .prom, not {self.file!r}", "the collector reads no other")
        return self


def _address(value: Any) -> str:
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._%+=/-]*(@[A-Za-z0-9.-]+)?", text) or len(text) > 254:
        raise _wrong(f"{text!r} is not a mail address", "write it bare, such as oncall@example.org")
    return text


Address = Annotated[str, BeforeValidator(_address)]


def _some(value: Any) -> Any:
    if value in ([], ""):
        raise _wrong("it is empty", "name at least one, or leave the key out")
    return _argv(value)


class MailSettings(_Part):
    to: Annotated[tuple[Address, ...], BeforeValidator(_some)] = Field(max_length=20)
    from_: Address | None = Field(default=None, alias="from")  # None: as sendmail has it
    # It reads a whole message, and whom it is for, from its input.
    sendmail: Annotated[tuple[str, ...], BeforeValidator(_some)] = ("/usr/sbin/sendmail", "-t", "-oi")


class AlarmSettings(_Part):
    """How people are told of alarms; off where neither `command` nor `mail` stands."""

    command: Annotated[tuple[str, ...], BeforeValidator(_argv)] = ()  # as words; JSON on its input
    mail: MailSettings | None = None
    wait_s: Duration = Field(default=60.0, alias="wait", ge=0)  # alarms within it are one message
    every_s: Duration = Field(default=300.0, alias="every", gt=0)  # at most one message
    repeat_s: Duration = Field(default=43_200.0, alias="repeat", gt=0)  # of what nobody has acknowledged
    timeout_s: Duration = Field(default=30.0, alias="timeout", gt=0, le=600)  # of a program

    def ways(self) -> Ways:
        """Return them as the teller knows them."""
        mail, pace = self.mail, Pace(self.wait_s, self.every_s, self.repeat_s)
        to, sender, sendmail = (mail.to, mail.from_ or "", mail.sendmail) if mail else ((), "", ())
        return Ways(tuple(self.command), tuple(to), sender, tuple(sendmail), self.timeout_s, pace)


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
    mqtt: MqttSettings = MqttSettings()
    globus: GlobusSettings = GlobusSettings()
    metrics: MetricsSettings = MetricsSettings()
    alarms: AlarmSettings = AlarmSettings()
    log: LogSettings = LogSettings()
    keep_done_s: Duration = Field(default=7_776_000.0, alias="keep_done", gt=0)  # with their manifests

    def for_actions(self) -> dict[str, Any]:
        """Return what actions are given of them, by section."""
        return {"globus": self.globus.plain(), "mqtt": self.mqtt.plain()}

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
        raise ConfigError([_unquoted(fault) for fault in faults])

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
    if root is not None and root.kind == "map":
        _no_secrets(root)
    faults.extend(source.faults)
    return root if not source.faults else None


def _no_secrets(root: Value) -> None:
    """Refuse a secret in a file that many may read."""
    for key, value in root.pairs():
        secret = _SECRETS.get(key.node.value)
        if secret and value.kind == "map":
            for inner, _ in value.pairs():
                if inner.node.value == secret:
                    inner.add(
                        "a secret does not belong in this file",
                        f"write it into a file of mode 0600 that `{secret}_file` names, "
                        f"or set {PREFIX}{key.node.value.upper()}__{secret.upper()}",
                    )


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
    secret = _is_secret(names)
    message, hint = _secret_words(item, names) if secret else _words(item, names)
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
    if place.kind == "map" and (wanted := item.get("ctx", {}).get("key")):
        place = next((value for key, value in place.pairs() if key.node.value == wanted), place)
    told = place.fault(message, hint)
    return replace(told, quote="") if secret else _unquoted(told)


_WITH_SECRETS = ("globus", "mqtt")  # sections
_SECRET = re.compile("secret|password", re.IGNORECASE)


def _is_secret(names: list[str]) -> bool:
    """Say whether a secret may stand there, also by mistake: its value is shown to nobody."""
    if not names or names[0] not in _WITH_SECRETS:
        return False
    return len(names) == 1 or names[:2] == ["globus", "client_id"] or any(map(_SECRET.search, names))


def _secret_words(item: Any, names: list[str]) -> tuple[str, str]:
    """Return words without the value that was given."""
    key = names[-1]
    match item["type"]:
        case "extra_forbidden" | "missing" | "model_type" | "dict_type" | "model_attributes_type":
            return _words(item, names)
        case "setting" if len(names) == 1:  # of keys that do not go together: our words, without any value
            return _words(item, names)
        case _ if key == "client_id":
            return "`client_id` is not a UUID", "copy it from app.globus.org"
        case _ if key.endswith("_file"):
            return f"`{key}` is not an absolute path", "name the file that holds the secret, from / on"
        case _:
            return f"`{key}` is not what belongs there", "a secret is a text, in the environment or a file of mode 0600"


def _unquoted(fault: ConfigFault) -> ConfigFault:
    """Leave a line that may hold a secret out of what is shown."""
    return replace(fault, quote="") if _SECRET.search(fault.quote) else fault


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


__all__ = ["Amount", "MqttSettings", "Settings", "load_settings"]
