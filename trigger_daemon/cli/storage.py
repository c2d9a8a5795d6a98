"""`storage`: free space, how it goes, and what waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trigger_daemon import points
from trigger_daemon.cli import text
from trigger_daemon.cli.commands import NOT_RUNNING, Group, Setup, pass_setup
from trigger_daemon.cli.reclaim import device, in_time, one_disk, show_set
from trigger_daemon.errors import ConfigError, TriggerError
from trigger_daemon.eyes import Eyes
from trigger_daemon.mounts import Places

if TYPE_CHECKING:
    from trigger_daemon.reclaim import Candidate

WAITING_MAX = 1_000  # runs that are looked through
DAY_S = 86_400.0
LOOK_S = 2.0  # that `storage` looks at files; `reclaim --dry-run` looks at all
SHARE_S = 5.0  # that the dry run waits for a share, once a minute
REASONS_MAX = 5
SHOWN_MAX = 20  # sets in the text
_BLOCKS = "▁▂▃▄▅▆▇█"


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
@pass_setup
def storage(setup: Setup, context: click.Context) -> None:
    """Show the volumes of the settings: free space and its trend, what is promised to runs, and what waits for space.

    With the daemon down, free space is read at once, and exit code 5 says so.
    """
    if context.invoked_subcommand is None:
        _storage(setup)


def _storage(setup: Setup) -> None:
    running = setup.client.alive()
    beat = setup.client.heartbeat() if running else None
    eyes = Eyes(deadline_s=LOOK_S)
    known = {} if beat else points.read(str(setup.state_dir / points.VOLUMES))
    volumes = list(beat["volumes"]) if beat else [_read(path, eyes, known.get(path, "")) for path in _paths(setup)]
    throttle = (beat or {}).get("throttle")
    reclaimed = _reclaimed(setup, beat, eyes)
    eyes.close()
    waiting = _waiting(setup) if beat else []
    if setup.json:
        setup.data(text.timed({
            "volumes": [{**one, "trend": [{"time": at, "free_bytes": free} for at, free in one.get("trend") or ()]}
                        for one in volumes],
            "waiting": waiting, "throttle": throttle, "reclaim": reclaimed,
        }))  # fmt: skip
    else:
        for volume in volumes:
            _show(volume)
        _show_throttle(throttle)
        _show_waiting(waiting)
        _show_reclaimed(reclaimed, short=any(volume["state"] != "ok" for volume in volumes))
    if not running:
        text.complain("the daemon does not run: nothing is told of trends and promises", "")
        raise click.exceptions.Exit(NOT_RUNNING)


def _reclaimed(setup: Setup, beat: Mapping[str, Any] | None, eyes: Eyes) -> dict[str, Any]:
    """Return what reclaim does, did in the last day, and could do now."""
    told: dict[str, Any] = {"enabled": setup.settings().reclaim == "enabled", "under_way": 0, "queued": 0, "held": ""}
    if beat:
        told |= {key: beat["reclaim"][key] for key in ("under_way", "queued", "held")}
    try:
        sets, files, size = setup.reader.reclaimed(time.time() - DAY_S)
        found = in_time(lambda: _look(setup, beat, eyes, within_s=LOOK_S), 2 * LOOK_S)
    except TriggerError as error:  # no journal yet, rules with a fault, or a share that does not answer
        return told | {"sets_in_24h": 0, "files_in_24h": 0, "bytes_in_24h": 0, "fault": error.message}
    asks = {"asks": bool(found.rules), "fault": None}
    return told | asks | {"sets_in_24h": sets, "files_in_24h": files, "bytes_in_24h": size} | found.words()


def _show_reclaimed(told: Mapping[str, Any], *, short: bool) -> None:
    if told["held"]:
        click.echo(f"\nreclaim  deletes nothing: {text.safe(told['held'])}")
    if told["fault"]:
        text.note(f"of reclaim nothing can be told: {told['fault']}")
        return
    if not told["asks"] and not told["sets_in_24h"]:
        if short:  # the alarm sends people here
            click.echo("\nreclaim  no rule permits it, so nothing is deleted from here: make room by hand")
        return
    words = "enabled" if told["enabled"] else "disabled in the settings"
    if told["under_way"] or told["queued"]:
        words += f", {text.counted(told['under_way'] + told['queued'], 'set')} under way"
    files, size = text.counted(told["files_in_24h"], "file"), text.size(told["bytes_in_24h"])
    least = "" if told["complete"] else "at least "
    go = f"{text.counted(told['could_go_files'], 'file')}, {text.size(told['could_go_bytes'])}"
    click.echo(f"\nreclaim  {words}")
    click.echo(f"  deleted      {files}, {size} in the last 24 h\n  could go     {least}{go}")
    for one in told["kept"][:REASONS_MAX]:
        what = f"{text.counted(one['files'], 'file')}, {text.size(one['bytes'])} of {one['rule']}"
        click.echo(f"  kept         {least}{what}: {text.safe(one['why'])}")
    if len(told["kept"]) > REASONS_MAX or not told["complete"]:
        click.echo("  `trigger-daemon storage reclaim --dry-run` looks at all of it")
    for words in (*told["never"], *told["one_disk"]):
        text.note(words)


def _paths(setup: Setup) -> list[str]:
    settings = setup.settings()
    return [volume.path for volume in settings.volumes] or [settings.state_dir]


def _read(path: str, eyes: Eyes, before: str) -> dict[str, Any]:
    """Return what is free; `before` is the mount point that it lay on, '' if that is not known."""
    words: dict[str, Any] = {"path": path, "total_bytes": 0, "free_bytes": 0, "state": "ok", "error": None}
    places = Places(eyes.beyond)
    try:
        mount, real = places.mount(path), places.real(path)
        if mount is not None and points.gone(real, before, mount.mountpoint):
            return words | {"error": f"{before} is not mounted"}
        found = eyes.statvfs(path)
        words |= {"total_bytes": found.f_frsize * found.f_blocks, "free_bytes": found.f_frsize * found.f_bavail}
    except OSError as error:
        words["error"] = error.strerror or str(error)
    return words


def _waiting(setup: Setup) -> list[dict[str, Any]]:
    """Return the runs that wait for space, the oldest first."""
    found = setup.reader.runs(state="PENDING", limit=WAITING_MAX)
    live: Mapping[str, Any] = {}
    if found:
        live = setup.ask("runs.waiting", timeout_s=2.0, ids=[run["id"] for run in found])["runs"]
    told = []
    for run in reversed(found):
        words = str((live.get(str(run["id"])) or {}).get("waiting_for") or "")
        if words.startswith("storage"):
            told.append({"run": run["id"], "rule": run["rule"], "group": run["group"], "files": run["files"],
                         "bytes": run["bytes"], "waiting_for": words})  # fmt: skip
    return told


def _show(volume: Mapping[str, Any]) -> None:
    if volume.get("error"):
        click.echo(f"{text.name(volume['path'])}  cannot be read: {text.safe(volume['error'])}\n")
        return
    click.echo(f"{text.name(volume['path'])}  {text.coloured(volume['state'])}")
    total, free = volume["total_bytes"], volume["free_bytes"]
    rows = [("free", f"{text.size(free)} of {text.size(total)}, {100 * free / max(1, total):.0f} %")]
    if volume.get("inodes"):
        rows.append(("inodes free", f"{volume['free_inodes']:,} of {volume['inodes']:,}"))
    rate = volume.get("fill_bytes_per_s") or 0
    if rate:
        rows.append(("fills" if rate > 0 else "empties", f"{text.size(abs(rate))}/s"))
    if volume.get("full_in_s"):
        rows.append(("full in", text.age(volume["full_in_s"])))
    if "reserve_bytes" in volume:
        rows += [(name, text.size(volume[f"{name}_bytes"])) for name in ("reserve", "low", "enough", "critical")]
        rows.append(("promised", f"{text.size(volume['promised_bytes'])} to running work"))
        rows.append(("room", f"{text.size(volume['room_bytes'])} for more"))
    elif "trend" in volume:
        rows.append(("limits", "none: `volumes` in the settings names none"))
    if trend := volume.get("trend"):
        rows.append(("trend", f"{plot([free for _, free in trend], total)}  {text.age(time.time() - trend[0][0])}"))
    click.echo("".join(f"  {key:<11}  {value}\n" for key, value in rows))


def plot(free: Sequence[int], total: int) -> str:
    """Return free space over time as one line of blocks; a full block is an empty volume."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, max(0, round(top * one / max(1, total))))] for one in free)


def _show_throttle(throttle: Mapping[str, Any] | None) -> None:
    if throttle and throttle["instrument"]:
        click.echo(f"all stands still: {text.safe(throttle['instrument'])}\n")
    elif throttle and throttle["bandwidth_bytes_per_s"]:
        click.echo(f"copies share {text.size(throttle['bandwidth_bytes_per_s'])}/s\n")


def _show_waiting(waiting: Sequence[Mapping[str, Any]]) -> None:
    if not waiting:
        click.echo("no run waits for space")
        return
    shown = text.table(("run", "right"), ("rule", "name"), ("size", "right"), ("waits for", "wide"))
    for run in waiting:
        text.row(shown, run["run"], run["rule"], text.size(run["bytes"]), run["waiting_for"])
    text.console().print(shown)


# ------------------------------------------------------------------------ reclaim


@storage.command("reclaim")
@click.option("--dry-run", is_flag=True, help="Only show what could go, and what stands in the way of the rest.")
@click.option("--rule", help="Of this rule only.")
@click.option("--set", "number", type=int, metavar="N", help="Show the files of one set, such as the N of an alarm "
              "`reclaim:N` or `lost:reclaim:N`: their hidden names, and where each is now.")  # fmt: skip
@pass_setup
def reclaim(setup: Setup, dry_run: bool, rule: str | None, number: int | None) -> None:
    """Show which source files are proved as their rule's `reclaim` demands, and could go.

    Nothing is deleted by this command: the daemon does that, where the settings say `reclaim: enabled`. Files and their
    copies are looked at, so it takes a while where there are many. Works when the daemon is down.
    """
    if number is not None:
        show_set(setup, number)
        return
    if not dry_run:
        raise TriggerError(
            "only the daemon deletes, by itself",
            hint="--dry-run shows what could go; `reclaim: enabled` in the settings lets the daemon do it",
        )
    beat = setup.client.heartbeat() if setup.client.alive() else None
    eyes = Eyes(deadline_s=SHARE_S)
    found = _look(setup, beat, eyes, rule=rule)
    eyes.close()
    if not found.rules:
        text.note("no rule has `reclaim`")
    if setup.json:
        setup.data(found.words() | {"could_go": found.sets})
        return
    click.echo(f"could go: {text.counted(found.files, 'file')}, {text.size(found.bytes)}")
    for one in found.sets[:SHOWN_MAX]:
        more = f" and {text.counted(len(one['files']) - 1, 'companion')}" if len(one["files"]) > 1 else ""
        proofs = ", ".join(one["proofs"])
        click.echo(f"  {text.size(one['bytes']):>9}  {text.name(one['files'][0])}{more}  ({proofs})")
    if len(found.sets) > SHOWN_MAX:
        click.echo(f"  and {text.counted(len(found.sets) - SHOWN_MAX, 'set')} more")
    _show_kept(found.kept_words())
    for words in (*found.never, *found.one_disk):
        text.note(words)
    text.note("nothing was deleted" + ("" if found.enabled else "; `reclaim` is disabled in the settings"))


class _Found:
    """What could go, and what is kept for which reason."""

    def __init__(self, enabled: bool, rules: Sequence[Any], never: Sequence[str], one_disk: Sequence[str]) -> None:
        self.enabled = enabled
        self.rules = rules  # that ask for reclaim
        self.never = never  # why nothing of some rule ever goes
        self.one_disk = one_disk  # of which rules the copies lie beside the sources
        self.complete = True
        self.files = self.bytes = 0
        self.sets: list[dict[str, Any]] = []
        self._kept: dict[tuple[str, str, str], list[Any]] = {}  # rule, why, hint -> files, bytes, an example

    def add(self, one: Candidate) -> None:
        if one.why:
            kept = self._kept.setdefault((one.rule, one.why, one.hint), [0, 0, one.parts[0].full])
            kept[0] += len(one.parts)
            kept[1] += one.bytes
            return
        self.files += len(one.parts)
        self.bytes += one.bytes
        self.sets.append({"rule": one.rule, "run": one.batch, "files": [part.full for part in one.parts],
                          "bytes": one.bytes, "proofs": list(one.proofs)})  # fmt: skip

    def kept_words(self) -> list[dict[str, Any]]:
        """Return the reasons, the one that keeps most first."""
        found = [{"rule": rule, "why": why, "hint": hint, "files": files, "bytes": size, "such_as": path}
                 for (rule, why, hint), (files, size, path) in self._kept.items()]  # fmt: skip
        return sorted(found, key=lambda one: -one["bytes"])

    def words(self) -> dict[str, Any]:
        return {"could_go_files": self.files, "could_go_bytes": self.bytes, "kept": self.kept_words(),
                "complete": self.complete, "never": list(self.never),
                "one_disk": list(self.one_disk)}  # fmt: skip


def _look(
    setup: Setup, beat: Mapping[str, Any] | None, eyes: Eyes, *, rule: str | None = None,
    within_s: float | None = None,
) -> _Found:  # fmt: skip
    """Look at what rules with `reclaim` have taken, for `within_s` at most. Raises ConfigError, JournalError."""
    from trigger_daemon.cli.rules import read_rules
    from trigger_daemon.reclaim import Selection

    settings = setup.settings()
    read = read_rules((Path(settings.rules_dir),), settings)
    if read.faults:
        raise ConfigError(read.faults)
    asking = [one for one in read.rules if one.reclaim]
    places = Places(eyes.beyond)
    devices = {device(volume.path, places) for volume in settings.volumes}
    never = [
        f"nothing of {one.name} goes: {one.watch} is on none of the `volumes` of the settings, so it is never low"
        for one in asking
        if one.reclaim and one.reclaim.only_under == "low" and device(one.watch, places) not in devices
    ]  # fmt: skip
    found = _Found(settings.reclaim == "enabled", asking, never, one_disk(read.rules))
    if not asking:
        return found
    witnessed = beat["reclaim"]["witnessed_s"] if beat else None
    roots = setup.reader.root_paths()
    end = math.inf if within_s is None else time.monotonic() + within_s
    with setup.reader.at_length() as reader:
        selection = Selection(
            reader, list(read.rules), roots, now=time.time(), witnessed=witnessed, eyes=eyes,
            undecided=(beat or {}).get("undecided", ()),
        )  # fmt: skip
        for one in selection.candidates(rules=None if rule is None else [rule]):
            found.add(one)
            if time.monotonic() > end:
                found.complete = False
                break
    return found


def _show_kept(kept: Sequence[Mapping[str, Any]]) -> None:
    for one in kept[:SHOWN_MAX]:
        what = f"{text.counted(one['files'], 'file')}, {text.size(one['bytes'])}"
        click.echo(f"kept of {one['rule']}: {what}: {text.safe(one['why'])}")
        click.echo(f"  such as {text.name(one['such_as'])}" + (f"; {text.safe(one['hint'])}" if one["hint"] else ""))
    if len(kept) > SHOWN_MAX:
        click.echo(f"kept for {text.counted(len(kept) - SHOWN_MAX, 'other reason')}: -F json tells all")
