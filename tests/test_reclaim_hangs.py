"""A share that hangs keeps what is proved there, and nobody else: neither reclaim, nor a command, nor the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("FUSE is Linux", allow_module_level=True)

from tests.prove.faulty_fuse import FaultyShare, Unable
from tests.test_reclaiming import Taking


@pytest.fixture
def share(tmp_path: Path) -> Iterator[FaultyShare]:
    try:
        made = FaultyShare(tmp_path / "server", tmp_path / "share")
    except Unable as error:
        pytest.skip(f"needs FUSE: {error}")
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path, share: FaultyShare) -> Iterator[Taking]:
    """Movies that go to a share, and others of another root that do not."""
    made = Taking(tmp_path)
    reclaim = {"keep_for": "1s", "only_under": "always"}
    near, copies = tmp_path / "near", tmp_path / "copies"
    near.mkdir()
    copies.mkdir()
    made.rules["disk"]["reclaim"] = {"proven_by": ["disk", "tape"], **reclaim}
    made.rules["tape"]["start"]["copy"]["to"] = str(share.point)
    made.rule("near", copies, watch=str(near), match=["*.tif"], reclaim={"proven_by": ["near"], **reclaim})
    yield made
    share.close()  # first: what the daemon could not end is let go
    made.site.stop()


def test_a_destination_that_hangs_keeps_its_own_and_nobody_else(store: Taking, share: FaultyShare) -> None:
    """The server has taken the question and does not answer: not even SIGKILL ends who asked."""
    site, near = store.site, store.site.base / "near"
    site.settings["reclaim"] = "disabled"
    store.begin("a.tif", "b.tif")
    share.hang()
    site.settings["reclaim"] = "enabled"
    store.reload()
    (near / "1.tif").write_bytes(os.urandom(1_000))
    site.until(lambda: not list(near.iterdir()), 60, "what lies elsewhere goes")
    assert share.hits() > 0
    assert {"a.tif", "b.tif"} <= set(store.names())

    told = site.json("storage", "reclaim", "--dry-run")
    assert told["could_go"] == []
    assert [(one["files"], "its disk does not answer" in one["why"]) for one in told["kept"]] == [(2, True)]
    assert site.json("storage")["reclaim"]["could_go_files"] == 0
    about = {one["rule"]: one for one in site.json("explain", str(site.data / "a.tif"))["rules"]}
    assert "its disk does not answer" in about["disk"]["reclaim"]["because"]
    about = site.json("explain", str(share.point / "a.tif"))
    assert about["rules"] == []
    assert site.stop() == 0

    site.start()
    site.until(lambda: site.heartbeat() is not None, 20, "its locks are free: another daemon works")
    share.release()
    site.until(lambda: store.names() == [], 150, "what the share holds goes once it answers")
    assert site.stop() == 0


def test_a_source_that_hangs_keeps_nobody_else(store: Taking, share: FaultyShare) -> None:
    """It is looked at, in vain, and told; what lies on a share is never taken away."""
    site, near = store.site, store.site.base / "near"
    store.rules["tape"]["start"]["copy"]["to"] = str(store.tape)
    far = store.rules["far"] = dict(store.rules["near"], name="far", watch=str(share.point), match=["*.dat"])
    far["reclaim"] = {**far["reclaim"], "proven_by": ["far"]}
    site.write_rules(*store.rules.values())
    site.start()
    (share.point / "x.dat").write_bytes(os.urandom(1_000))
    site.until_verified(1, rule="far")
    store.wait(1.5)
    told = site.json("storage", "reclaim", "--dry-run", "--rule", "far")
    assert ["on a share (fuse)" in one["why"] for one in told["kept"]] == [True]

    share.hang()
    (near / "1.tif").write_bytes(os.urandom(1_000))
    site.until(lambda: not list(near.iterdir()), 60, "what lies elsewhere goes")
    told = site.json("storage", "reclaim", "--dry-run", "--rule", "far")
    assert ["its disk does not answer" in one["why"] for one in told["kept"]] == [True]
    about = site.cli("explain", str(share.point / "x.dat"), check=False)
    assert "has not answered" in about.stdout
    assert site.stop() == 0
