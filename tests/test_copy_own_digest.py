"""`own_digest: verify` over kills, and from the check to the proof. Its laws one by one are in `test_copy.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_copy import DAEMON, MIB, PATIENCE_S, Lab, noise
from tests.site import Site
from trigger_daemon import failpoints, simulator
from trigger_daemon.actions import Request

OFFSET = 1_000
LARGE_BYTES = 20 * MIB + 12_345


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()
    failpoints.plan("")


def own(data: bytes) -> str:
    """What the detector wrote into the header: a digest of all but the ends."""
    part = data[OFFSET:-OFFSET]
    return f"md5:{hashlib.md5(part).hexdigest()}:{OFFSET}:{len(part)}"


def carrying(request: Request, **contents: str) -> Request:
    """Return the request with what its files carry, as the manifest has it."""
    files = (dataclasses.replace(file, content=contents.get(file.path, "")) for file in request.files)
    return dataclasses.replace(request, files=tuple(files))


def flipped(data: bytes) -> bytes:
    """Damage one bit in the middle of the part."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_mended_file_goes_with_its_next_attempt(lab: Lab) -> None:
    """The disk read wrongly once; nothing of the first attempt is believed."""
    data = noise(LARGE_BYTES)
    lab.write("x", flipped(data))
    first = carrying(lab.request("x", own_digest="verify"), x=own(data))
    assert lab.run(first).status == "failed"
    lab.write("x", data)
    again = carrying(lab.request("x", run=first.run, attempt=2, own_digest="verify"), x=own(data))

    assert lab.run(again).status == "succeeded"
    assert lab.there() == {"x": data}


@pytest.mark.parametrize("damaged", [True, False])
@pytest.mark.parametrize("point", ["large_segment:kill_parent@2", "verified:kill_parent@1", "proved:kill@1"])
def test_a_repetition_after_a_kill_skips_nothing_of_it(tmp_path: Path, point: str, damaged: bool) -> None:
    """What an earlier attempt left at the destination is read again, all of it, for its digest too."""
    data = noise(LARGE_BYTES)
    lab = Lab(tmp_path)
    lab.write("x", flipped(data) if damaged else data)
    request = carrying(lab.request("x", own_digest="verify"), x=own(data))
    told = {
        "run": request.run, "attempt": 1, "state": str(lab.state), "settings": lab.settings,
        "files": [dataclasses.astuple(file) for file in request.files], "options": dict(request.options),
    }  # fmt: skip
    argv = [sys.executable, "-c", DAEMON, json.dumps(told)]
    environment = {**os.environ, "TRIGGER_FAIL": f"copy.{point}"}
    subprocess.run(argv, env=environment, capture_output=True, timeout=PATIENCE_S, check=False)
    progress = lab.run(request)
    lab.close()

    assert progress.status == ("failed" if damaged else "succeeded"), progress
    assert lab.there() == ({} if damaged else {"x": data})


def test_a_journaled_digest_travels_from_the_check_to_the_proof(tmp_path: Path) -> None:
    """Through the daemon: `cbf` finds Content-MD5, the manifest keeps it, `copy` proves it, `runs show` tells it."""
    site = Site(tmp_path)
    site.write_rules(
        site.rule(
            "images", match=["{x}.cbf"], complete={"quiescence": "300ms", "checks": ["cbf"]},
            start={"copy": {"to": str(site.out), "own_digest": "verify"}},
        )
    )  # fmt: skip
    site.start()
    try:
        path = site.data / "good.cbf"
        simulator.cbf_image(path, width=40, height=40, pause=lambda seconds: None, seed=1)
        good = path.read_bytes()
        at = good.index(b"\x0c\x1a\x04\xd5") + 50  # in the image
        (site.data / "bad.cbf").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        site.until(lambda: sorted(site.states()) == ["HELD", "VERIFIED"], 60, "one is proved, the other held")
        runs = {run["state"]: site.json("runs", "show", str(run["id"])) for run in site.json("runs", "list")["runs"]}
    finally:
        site.stop()
    member: dict[str, Any] = runs["VERIFIED"]["manifest"][0]
    digest, offset, length = member["content"].removeprefix("md5:").split(":")
    payload = good[int(offset) : int(offset) + int(length)]

    assert hashlib.md5(payload).hexdigest() == digest
    assert member["content_proved"] is True
    assert "does not match its own Content-MD5" in runs["HELD"]["error"]
    assert sorted(file.name for file in site.out.iterdir()) == ["good.cbf"]
