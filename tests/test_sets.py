"""Sets of an Eiger through the real daemon: one batch each, whatever comes first, and however often the daemon dies."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon import simulator_hdf5

FILES = ["_master.h5", *(f"_data_00000{number}.h5" for number in range(1, 5))]


@pytest.fixture
def site(shm_path: Path) -> Iterator[Site]:
    made = Site(shm_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def eiger_rule(site: Site, **options: Any) -> None:
    """One rule for the master; its check asks for the rest."""
    complete = {"quiescence": "300ms", "checks": [{"eiger": options} if options else "eiger"]}
    site.write_rules(site.rule("sets", match=["{series}_master.h5"], complete=complete))


def written(directory: Path, series: str, pause: Any = lambda seconds: None) -> None:
    simulator_hdf5.eiger_set(directory, series=series, images=14, per_file=4, width=8, height=8, pause=pause)


def names(series: str) -> list[str]:
    return sorted(series + name for name in FILES)


def batches(site: Site) -> list[list[str]]:
    manifests = site.ask("SELECT manifest FROM batch ORDER BY id")
    return [sorted(row[2] for row in json.loads(text)) for (text,) in manifests]


@pytest.mark.parametrize("options", [{}, {"images": 14, "per_file": 4}])
def test_a_set_written_under_a_running_daemon_is_one_batch(site: Site, options: dict[str, int]) -> None:
    """The master comes first, the last data file at disarm, kills between: nothing goes early, all go together."""
    eiger_rule(site, **options)
    site.start()
    steps = 0

    def pause(seconds: float) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.08)  # a writer of its own pace
        assert not batches(site), f"a batch at step {steps} of the writer"
        if steps in (12, 25):
            site.kill()
            site.start()

    written(site.data, "s1", pause)
    site.until_verified(5, rule="sets")

    assert batches(site) == [names("s1")]
    assert site.digests(site.out) == site.digests(site.data)


def test_the_master_may_come_last_and_a_set_with_a_gap_never_goes(site: Site) -> None:
    """Data files first; a set that lacks one waits, names it, and goes when it has come."""
    eiger_rule(site)
    site.start()
    made = site.base / "made"
    written(made, "s2")
    for name in reversed(names("s2")):
        if name != "s2_data_000003.h5":
            (made / name).rename(site.data / name)
    master = str(site.data / "s2_master.h5")

    def because() -> str:
        return str(site.json("explain", master)["rules"][0]["because"])

    site.until(lambda: "s2_data_000003.h5" in because(), 30, "the missing file is named")
    whole = (made / "s2_data_000003.h5").read_bytes()
    (site.data / "s2_data_000003.h5").write_bytes(whole[:-100])
    site.until(lambda: "s2_data_000003.h5: " in because() and "of" in because(), 30, "the cut file is named")
    assert not batches(site)
    (site.data / "s2_data_000003.h5").write_bytes(whole)
    site.until_verified(5, rule="sets")

    assert batches(site) == [names("s2")]
