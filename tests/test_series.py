"""Serial crystallography whole: quality control on the first 1,000 complete images, then batches gated by it.

The real daemon, killed in between; images of a PILATUS as miniCBF. One frame
in a hundred never comes, one in a hundred comes cut and is mended late.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon import simulator

FRAMES, FIRST, BATCH = 10_000, 1_000, 512
MISSING = frozenset(range(77, FRAMES, 100))
CUT = frozenset(range(33, FRAMES, 100))


@pytest.fixture
def site(shm_path: Path) -> Iterator[Site]:
    made = Site(shm_path, sweep="2s")
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def series_rules(site: Site, first: int, batch: int, **qc: Any) -> None:
    """Write the two rules of a beamline: `qc` on the first images of a chip, `images` in batches once it succeeded."""
    complete = {"quiescence": "500ms", "checks": ["cbf"]}
    site.write_rules(
        site.rule(
            "qc", match=["{chip}/{image}.cbf"], complete=complete, proof="none",
            batch={"group_by": ["chip"], "only_first": first, **qc},
            start={"command": {"run": ["/bin/sh", "-c", f'echo x >> {site.base}/qc-$(basename "$0")', "{chip}"]}},
        ),
        site.rule(
            "images", match=["{chip}/{image}.cbf"], complete=complete,
            batch={"group_by": ["chip"], "files": batch, "idle": "4s"}, after={"rule": "qc", "same": ["chip"]},
        ),
    )  # fmt: skip


def write(path: Path, number: int) -> bytes:
    simulator.cbf_image(path, width=6, height=6, pause=lambda s: None, seed=number, number=number)
    return path.read_bytes()


def cut(path: Path) -> None:
    """Leave what a writer that stopped has written."""
    whole = path.read_bytes()
    path.unlink()
    path.with_name(path.name).write_bytes(whole[: len(whole) // 2])


def batches(site: Site, rule: str) -> list[dict[str, Any]]:
    rows = site.ask(
        "SELECT batch.id, batch.reason, batch.manifest, batch.captures, run.state, batch.closed_time FROM batch"
        " JOIN rule ON rule.id = batch.rule JOIN run ON run.id = batch.id WHERE rule.name = ? ORDER BY batch.id", rule,
    )  # fmt: skip
    return [
        {
            "id": number, "reason": reason, "names": [row[2] for row in json.loads(manifest)],
            "chip": json.loads(captures).get("chip"), "state": state, "time": time,
        }
        for number, reason, manifest, captures, state, time in rows
    ]  # fmt: skip


def started(site: Site, run: int) -> float:
    return float(site.ask("SELECT min(made_time) FROM attempt WHERE run = ?", run)[0][0])


def succeeded(site: Site, run: int) -> float:
    return float(site.ask("SELECT max(time) FROM transition WHERE run = ? AND to_state = 'SUCCEEDED'", run)[0][0])


@pytest.mark.timeout(240)
def test_a_series_of_ten_thousand_with_gaps_cuts_and_kills(site: Site) -> None:
    """QC fires once, at the thousandth complete frame; batches wait for it; no gap, no duplicate, a last by idle."""
    series_rules(site, FIRST, BATCH)
    site.start()
    names: set[str] = set()
    mend: dict[Path, bytes] = {}
    kills = {1_500, 4_000, 7_500}
    directory = site.data / "c1"
    for number in range(FRAMES):
        if number in kills:
            site.kill()
            site.start()
        if number in MISSING:
            continue
        path = directory / f"c1_1_{number:05d}.cbf"
        whole = write(path, number)
        names.add(path.name)
        if number in CUT:
            cut(path)
            mend[path] = whole
        if number == FIRST:  # a thousand were written, but not a thousand are complete
            site.until(lambda: site.json("status")["rules"][0]["complete"] >= 900, 60, "most of the first settled")
            assert not batches(site, "qc")
    site.until(lambda: [batch["state"] for batch in batches(site, "qc")] == ["SUCCEEDED"], 60, "QC succeeded")
    assert not {path.name for path in mend} & set(batches(site, "qc")[0]["names"])
    for path, whole in mend.items():
        path.write_bytes(whole)
    site.until(lambda: sum(len(b["names"]) for b in batches(site, "images")) >= len(names), 120, "all are batched")
    site.until(lambda: not site.ask("SELECT 1 FROM run WHERE final = 0"), 120, "all are done")
    qc, images = batches(site, "qc"), batches(site, "images")

    assert [(batch["reason"], len(batch["names"])) for batch in qc] == [("only_first: 1000 files complete", FIRST)]
    assert (site.base / "qc-c1").read_text() == "x\n"
    assert Counter(name for batch in images for name in batch["names"]) == Counter(names)
    assert {len(batch["names"]) for batch in images[:-1]} <= {BATCH} | _partial(images[:-1])
    assert images[-1]["reason"].startswith("idle")
    assert {batch["state"] for batch in images} == {"VERIFIED"}
    assert min(started(site, batch["id"]) for batch in images) >= succeeded(site, qc[0]["id"])
    assert site.digests(site.out) == site.digests(site.data)


def _partial(images: list[dict[str, Any]]) -> set[int]:
    """Sizes of batches that `idle` closed while the writer paused: a restart takes longer than the idle time."""
    return {len(batch["names"]) for batch in images if batch["reason"].startswith("idle")}


@pytest.mark.timeout(120)
def test_a_mini_chip_and_a_chip_whose_name_is_used_again(site: Site) -> None:
    """400 images close by idle; a day later (here: seconds) the same name begins anew, over a crash in between."""
    series_rules(site, 300, 128, idle="1s", new_group_after="6s")
    site.start()
    for number in range(400):
        write(site.data / "mini" / f"mini_1_{number:05d}.cbf", number)
    site.until(lambda: len(batches(site, "qc")) == 1, 60, "QC of the mini chip")
    site.until(lambda: sum(len(b["names"]) for b in batches(site, "images")) == 400, 60, "its images are batched")
    site.kill()
    for number in range(100):
        write(site.data / "small" / f"small_1_{number:05d}.cbf", number)
    site.start()
    site.until(lambda: len(batches(site, "qc")) == 2, 60, "a chip of fewer images than QC wants closes by idle")
    site.until(lambda: _idle_for(site, "mini", 7.0), 60, "the first chip is long idle")
    for number in range(400):
        write(site.data / "mini" / f"mini_2_{number:05d}.cbf", number)
    site.until(lambda: len(batches(site, "qc")) == 3, 60, "QC of the chip whose name is used again")
    site.until(lambda: sum(len(b["names"]) for b in batches(site, "images")) == 900, 60, "all images are batched")
    site.until(lambda: not site.ask("SELECT 1 FROM run WHERE final = 0"), 60, "all are done")
    qc = batches(site, "qc")

    assert [(batch["chip"], len(batch["names"])) for batch in qc] == [("mini", 300), ("small", 100), ("mini", 300)]
    assert all(name.startswith("mini_2") for name in qc[2]["names"])
    assert qc[1]["reason"].startswith("idle")
    assert Counter(name for batch in batches(site, "images") for name in batch["names"]).most_common(1)[0][1] == 1
    again = [batch for batch in batches(site, "images") if batch["names"][0].startswith("mini_2")]
    assert min(started(site, batch["id"]) for batch in again) >= succeeded(site, qc[2]["id"])


def _idle_for(site: Site, chip: str, seconds: float) -> bool:
    newest = max(batch["time"] for batch in batches(site, "qc") if batch["chip"] == chip)
    now = float(site.ask("SELECT (julianday('now') - 2440587.5) * 86400.0")[0][0])
    return now - newest > seconds
