"""What do `rsync` and `rclone` of ours cost beside the bare programs? `ways_out.py [--megabytes N] [--files N]`.

One large file, and many small ones: by rsync to a local directory, over ssh and
to an rsync daemon, by rclone to a local directory, S3, SFTP and WebDAV, all on
loopback. The bare ones (`rsync -a`, `rclone copy`) deliver; ours look first,
deliver, and prove. So two ratios are told: until it is delivered, and until it
is proved. Medians of ROUNDS, in turns, the page cache as it comes. `--limit
MB/S` then transfers at a limit, and tells which part of it was used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the daemon is the installed one
from tests.far import FARS, REMOTES, Far, RcloneServer, Sshd, rclone_on_the_path
from trigger_daemon import actions
from trigger_daemon.actions import Context, File, Proof, Request, rclone, rsync
from trigger_daemon.actions._rsync_target import ssh_command, target_of

MB = 1_000_000
ROUNDS = 3
SMALL_BYTES = 20_000
PATIENCE_S = 600.0
POLL_S = 0.005


def made(directory: Path, count: int, size: int) -> list[File]:
    files = []
    for number in range(count):
        path = directory / f"d{number % 20:02d}" / f"{number:05d}.dat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
        stat = path.stat()
        files.append(File(str(directory), str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns))
    return files


def emptied(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.sync()


def bare(name: str, far: Far, source: Path) -> float:
    """Seconds of `rsync -a`, or of `rclone copy`."""
    if name == "rclone":
        told = far.options("x")
        began = time.monotonic()
        subprocess.run(["rclone", "--config", told["config"], "copy", "-q", str(source), told["to"]], check=True)
        return time.monotonic() - began
    target = target_of(far.options("x"))
    shell = ("--rsh", " ".join(ssh_command(far.options("x"), target))) if isinstance(far, Sshd) else ()
    began = time.monotonic()
    subprocess.run(["rsync", "-a", *shell, f"{source}/", target.argument(target.path)], check=True)
    return time.monotonic() - began


def ours(far: Far, action: actions.Action, files: list[File], run: int) -> tuple[float, float]:
    """Seconds until they are delivered, and until they are proved."""
    options = {name: option.default for name, option in action.OPTIONS.items()} | far.options("x")
    request = Request(run, 1, "bench", {}, {}, tuple(files), options, None, {"to": options["to"]})
    began = time.monotonic()
    handle = action.start(request, None)
    while (progress := action.poll(request, handle)).status == "active":
        if time.monotonic() - began > PATIENCE_S:
            raise SystemExit("it does not end")
        time.sleep(POLL_S)
    if progress.status != "succeeded":
        raise SystemExit(progress.why)
    delivered = time.monotonic() - began
    if not isinstance(said := action.verify(request, handle), Proof):
        raise SystemExit(f"no proof: {said}")
    return delivered, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=200, help="of the large file")
    parser.add_argument("--files", type=int, default=5_000, help="small ones")
    parser.add_argument("--limit", type=int, default=20, help="MB/s, for the last line; 0: none")
    parser.add_argument("--work", type=Path, help="a directory on the disk to be measured")
    parser.add_argument("--action", choices=("rsync", "rclone"), help="only this one")
    given = parser.parse_args()
    print("by      to      what            bare s   MB/s   delivered   proved   (times as long as bare)")
    with tempfile.TemporaryDirectory(dir=given.work) as work, rclone_on_the_path():
        base = Path(work)
        batches = {
            f"1 x {given.megabytes} MB": made(base / "large", 1, given.megabytes * MB),
            f"{given.files} x 20 kB": made(base / "small", given.files, SMALL_BYTES),
        }
        for name, fars in (("rsync", FARS), ("rclone", REMOTES)):
            if given.action in (None, name):
                for kind, far in sorted(fars.items()):
                    measure(name, kind, far(base / f"{name}-{kind}"), batches, given.limit)


def measure(name: str, kind: str, far: Far, batches: dict[str, list[File]], limit: int) -> None:
    """Print the lines of one way to one destination."""
    bytes_per_s: list[float | None] = [None]
    state = far.base / "state"
    state.mkdir()
    context = Context(str(state), lambda run, attempt: None, lambda: bytes_per_s[0])
    action: actions.Action = (rsync.Action if name == "rsync" else rclone.Action)(context)
    place = far.there / ("data/x" if name == "rclone" else "x")
    run = 0
    with far:
        for what, files in batches.items():
            seconds: list[tuple[float, float, float]] = []
            for _ in range(ROUNDS):
                run += 1
                renewed(name, far, place)
                alone = bare(name, far, Path(files[0].root))
                renewed(name, far, place)
                seconds.append((alone, *ours(far, action, files, run)))
            alone, *both = (statistics.median(column) for column in zip(*seconds, strict=True))
            rate = sum(file.size for file in files) / alone / MB
            shown = "   ".join(f"{one / alone:6.2f} x" for one in both)
            print(f"{name:7} {kind:7} {what:14} {alone:7.2f} {rate:6.0f}   {shown}", flush=True)
        if limit:
            bytes_per_s[0], run = float(limit * MB), run + 1
            renewed(name, far, place)
            large = next(iter(batches.values()))
            delivered, _ = ours(far, action, large, run)
            used = sum(file.size for file in large) / delivered / (limit * MB)
            print(f"{name:7} {kind:7} at {limit} MB/s: {used:.0%} of the limit, start and end included")
        action.close()


def renewed(name: str, far: Far, place: Path) -> None:
    """Empty it; servers of rclone remember what was there."""
    emptied(place)
    if isinstance(far, RcloneServer):
        far.look_again()


if __name__ == "__main__":
    main()
