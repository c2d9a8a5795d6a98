"""What is done to a network share, on the host and inside the guest alike: use it, lose it mid-way, bring it back.

The instrument writes on the server's side, or the copies go to the server's
side; the daemon sees only the mount. Nothing here judges: the record, the
journal and both trees are what the oracle judges by.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tests.prove.oracle import Promise, Scene
from tests.prove.stage import IDLE_S, Stage, Writer, content

Role = Literal["watched", "destination"]

LARGE_BYTES = 3_000_000
PACE = "1MB/s"  # so that a copy of LARGE_BYTES is under way for seconds
BEGUN_S = 30.0
UNDER_WAY_S = 0.4
TOLD_S = 150.0  # a root that hangs is given up after 30 s, a copy that gets nowhere after 120 s
DONE_S = 90.0
AWAY_S = 1.0  # and so long the share stays away after it was told


class Share(Protocol):
    """A share with a server of its own."""

    name: str
    point: Path  # where the daemon sees it
    tick_ns: int  # how finely it tells times
    quiet_s: float  # twice the time that its mount keeps attributes
    prefix: tuple[str, ...]  # put before the daemon's command, so that it sees the mount

    def lose(self) -> None:
        """Take the server away, now."""

    def bring_back(self) -> None:
        """Let the share be there again."""


class CoarseWriter(Writer):
    """An instrument on a server whose times are as coarse as its protocol tells them."""

    def __init__(self, source: Path, record: Path, tick_ns: int) -> None:
        super().__init__(source, record)
        self._tick_ns = tick_ns

    def _step(self, path: str, sha256: str | None) -> None:
        target = self._source / path
        if self._tick_ns > 1 and target.exists():
            mtime_ns = target.stat().st_mtime_ns
            os.utime(target, ns=(mtime_ns, mtime_ns - mtime_ns % self._tick_ns))
        super()._step(path, sha256)


class ShareStage(Stage):
    """The stage with a share in the place of the watched directory, or of the destination."""

    def __init__(self, base: Path, share: Share, role: Role) -> None:
        self.share, self.role = share, role
        self.told_s, self.done_s = TOLD_S, DONE_S
        self.environment: dict[str, str] = {}
        super().__init__(base, events="auto")
        self.writer.close()
        self.writer = CoarseWriter(self.site.data, self.record, share.tick_ns if role == "watched" else 1)

    @property
    def quiet_s(self) -> float:
        return self.share.quiet_s if self.role == "watched" else 0.5

    def rules(self) -> list[dict[str, Any]]:
        watch = self.share.point if self.role == "watched" else self.site.data
        to = self.share.point if self.role == "destination" else self.site.out
        common = {"watch": str(watch), "match": ["**/*.tif"], "complete": {"quiescence": f"{self.quiet_s:g}s"}}
        retry = {"initial": "500ms", "longest": "2s"}
        copy = {"copy": {"to": str(to), "bandwidth": PACE}}
        batch = {"files": 2, "idle": f"{IDLE_S:g}s"}
        return [
            self.site.rule("copy", batch=batch, start=copy, retry=retry, **common),
            self.site.rule("work", start={"command": {"run": self.program}}, **common),
        ]

    def scene(self, **keys: Any) -> Scene:
        return scene_of(self.base, self.quiet_s, **keys)

    def start(self, **keys: Any) -> None:
        self.site.start(prefix=self.share.prefix, env=self.environment, **keys)


def behind(base: Path, role: Role) -> Path:
    """Return the directory that the server must serve."""
    return base / ("data" if role == "watched" else "out")


def scene_of(base: Path, quiet_s: float, **keys: Any) -> Scene:
    """Return what there is to judge by, of a stage below `base` or of what was brought out of the guest."""
    promises = [
        Promise("copy", _takes, base / "out", quiet_s),
        Promise("work", _takes, None, quiet_s, frozenset({75})),
    ]
    return Scene(base / "data", base / "written", base / "executed", base / "state" / "journal.db", promises, **keys)


def _takes(path: str) -> bool:
    return path.endswith(".tif")


# ------------------------------------------------------------------------------ acts


@dataclass
class Told:
    """What came of a scene: rows for the report, seconds, and why it could not be played to its end."""

    rows: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    quiet_s: dict[str, float] = field(default_factory=dict)  # of the role


def play(stage: ShareStage, told: Told, *, restart: bool, tell: Callable[[str], None]) -> None:
    """Use the share; lose it while files arrive and a copy is under way; with `restart`, kill the daemon too."""
    share, role = stage.share, stage.role
    told.quiet_s[role] = stage.quiet_s
    acts: list[tuple[str, Callable[[], str]]] = [
        ("files before and during", lambda: _use(stage)),
        ("server gone mid-way", lambda: _lose(stage, "d", restart=False)),
    ]
    if restart:
        acts.append(("server gone, daemon killed and started meanwhile", lambda: _lose(stage, "e", restart=True)))
    for what, act in acts:
        began = time.monotonic()
        row = {"share": f"{share.name}, {role}", "what was done": what, "what status said": "", "result": ""}
        told.rows.append(row)
        try:
            row["what status said"] = act()
        except AssertionError as error:
            row["result"] = "not done"
            told.broken.append(f"{share.name}, {role}, {what}: {error}")
            return
        took = time.monotonic() - began
        row["result"] = f"all done after {took:.0f} s"
        told.seconds[f"{role}: {what}"] = round(took, 1)
        tell(f"{share.name}, {role}: {what}: {row['what status said']} ({took:.1f} s)")


def _use(stage: ShareStage) -> str:
    stage.before()
    stage.start()
    stage.meanwhile()
    stage.until_idle(stage.done_s)
    return ailing(stage) or "ok"


def _lose(stage: ShareStage, name: str, *, restart: bool) -> str:
    stage.writer.whole(f"{name}/1.tif", content(f"{name}1", LARGE_BYTES))
    stage.site.until(lambda: _copying(stage), BEGUN_S, "the copy is under way")
    time.sleep(UNDER_WAY_S)  # and let it get on: what it writes may be seen at the server only when it is synced
    stage.writer.whole(f"{name}/2.tif", content(f"{name}2", 5_000))
    stage.share.lose()
    stage.writer.parts(f"{name}/3.tif", content(f"{name}3", 3_000), content(f"{name}3b", 3_000), pause_s=0.2)
    if restart:
        stage.site.kill()
        stage.start(wait=False)  # of a root that hangs it knows nothing yet
    silent: AssertionError | None = None
    said = ""
    try:
        stage.site.until(lambda: bool(ailing(stage)), stage.told_s, "the heartbeat says what is wrong")
        said = said_by_status(stage)
    except AssertionError as error:
        silent = error  # go on all the same: what comes of a silent loss is to be judged too
    stage.writer.renamed(f"{name}/4.tif", content(f"{name}4", 4_000))
    time.sleep(AWAY_S)
    stage.share.bring_back()
    stage.until_idle(stage.done_s)
    if silent is not None:
        raise silent
    stage.site.until(lambda: not ailing(stage), stage.done_s, "the heartbeat says that all is well")
    return said


def _copying(stage: ShareStage) -> bool:
    """Say whether the large file is being copied: its run is active, and a part of it lies at the destination."""
    rows = stage.site.ask(
        "SELECT 1 FROM run JOIN batch ON batch.id = run.id JOIN rule ON rule.id = batch.rule"
        " WHERE rule.name = 'copy' AND run.state = 'ACTIVE' AND batch.bytes >= ?",
        LARGE_BYTES,
    )
    out, data = stage.site.out, stage.site.data
    return bool(rows) and any(not (data / path.relative_to(out)).exists() for path in out.rglob("*"))


def ailing(stage: ShareStage) -> str:
    """Return what the daemon's heartbeat says is wrong with the share, '' if nothing is."""
    beat = stage.site.heartbeat() or {}
    process = stage.site.process
    if process is None or beat.get("daemon", {}).get("pid") != process.pid:
        return ""  # not its own yet
    return _wrong(stage, beat)


def said_by_status(stage: ShareStage) -> str:
    """Return what `trigger-daemon status` says is wrong. Raises AssertionError if it says nothing."""
    said = _wrong(stage, stage.site.json("status"))
    assert said, "the command `status` says nothing of what the heartbeat says"
    return said.replace(str(stage.base), "")


def _wrong(stage: ShareStage, now: Mapping[str, Any]) -> str:
    """Read the words in a heartbeat or in a status, which share these parts."""
    if stage.role == "watched":
        sick = [root for root in now["roots"] if root["health"] in ("lost", "suspect")]
        return "; ".join(f"root {root['health']}: {root['why']}" for root in sick)
    if down := now["destinations_down"]:
        return "; ".join(f"destination down: {why}" for why in down.values())
    if any(rule["runs"].get("INACTIVE") for rule in now["rules"]):  # its provider cannot be asked, or cannot go on
        rows = stage.site.ask("SELECT because FROM run WHERE state = 'INACTIVE'")
        return "; ".join(f"run INACTIVE: {because}" for (because,) in rows)
    return ""
