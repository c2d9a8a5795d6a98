"""`own_digest: verify`: what a file says of itself (Content-MD5 of CBF) is proved before it gets its final name."""

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
from trigger_daemon.core.model import Scope

OFFSET = 1_000
SMALL_BYTES, LARGE_BYTES = 50_000, 20 * MIB + 12_345


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


@pytest.mark.parametrize("size", [SMALL_BYTES, LARGE_BYTES])
def test_a_file_that_is_what_it_says_is_proved_as_such(lab: Lab, size: int) -> None:
    """The proof tells that it was; small files and large ones."""
    data = noise(size)
    lab.write("x", data)
    request = carrying(lab.request("x", own_digest="verify"), x=own(data))

    assert lab.run(request).status == "succeeded"
    (member,) = lab.prove(request).members
    assert own(data).startswith(f"{member['content']}:{OFFSET}:")
    assert lab.there() == {"x": data}


@pytest.mark.parametrize("size", [SMALL_BYTES, LARGE_BYTES])
def test_a_file_damaged_before_it_was_copied_gets_no_name(lab: Lab, size: int) -> None:
    """A bit that flipped after the detector's digest: a person is asked; the others of the batch are there, proved."""
    data, other = noise(size), noise(3_000, seed=1)
    lab.write("x", flipped(data))
    lab.write("y", other)
    progress = lab.run(carrying(lab.request("x", "y", own_digest="verify"), x=own(data), y=own(other)))

    assert progress.status == "failed"
    assert progress.fault is not None
    assert (progress.fault.kind, progress.fault.scope) == ("person", Scope.FILE)
    assert "x: the image does not match its own Content-MD5: it was damaged before it was copied" in progress.fault.why
    assert lab.there() == {"y": other}


def test_without_the_option_the_file_is_copied_as_it_is(lab: Lab) -> None:
    """Then its digest is in the manifest, for whoever wants to look."""
    data = noise(SMALL_BYTES)
    lab.write("x", flipped(data))

    assert lab.run(carrying(lab.request("x"), x=own(data))).status == "succeeded"
    assert lab.there() == {"x": flipped(data)}


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
def test_equal_content_at_the_target_is_proof_only_if_it_is_what_it_says(lab: Lab, damaged: bool) -> None:
    """What somebody copied before may have been damaged before that."""
    data = noise(SMALL_BYTES)
    content = flipped(data) if damaged else data
    lab.write("x", content)
    (lab.archive / "x").write_bytes(content)
    progress = lab.run(carrying(lab.request("x", own_digest="verify"), x=own(data)))

    assert progress.status == ("failed" if damaged else "succeeded")
    assert lab.there() == {"x": content}


@pytest.mark.parametrize("content", ["md5:zz:0:1", "sha256:00:0:1", "x" * 10_000, f"md5:{'0' * 32}:0:99999999"])
def test_a_digest_that_makes_no_sense_is_the_files_fault_alone(lab: Lab, content: str) -> None:
    """Of a part that the file does not have, or no digest at all: told, and the other file is copied."""
    lab.write("x", noise(SMALL_BYTES))
    lab.write("y", b"y" * 10)
    progress = lab.run(carrying(lab.request("x", "y", own_digest="verify"), x=content))

    assert progress.fault is not None
    assert (progress.status, progress.fault.kind, progress.fault.scope) == ("failed", "permanent", Scope.FILE)
    assert lab.there() == {"y": b"y" * 10}


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
