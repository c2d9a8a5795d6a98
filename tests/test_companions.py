"""Companions through the real daemon: in another root, with checks of their own, shared, late, over restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.site import Site
from trigger_daemon import simulator

STILL = {"pause": lambda seconds: None}


@pytest.fixture
def site(shm_path: Path) -> Iterator[Site]:
    made = Site(shm_path)
    for name in ("epu", "gain"):
        (made.base / name).mkdir()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def movies(site: Site, **xml: Any) -> None:
    """Movies that need their metadata from the microscope's host, and the gain reference of the camera's."""
    companions = [
        {"file": "{movie}.xml", "in": str(site.base / "epu"), "checks": ["xml"], **xml},
        {"file": "gain.mrc", "in": str(site.base / "gain"), "checks": ["mrc"], "shared": True},
    ]
    complete = {"quiescence": "300ms", "checks": [{"tiff": {"frames": 3}}], "with": companions}
    site.write_rules(site.rule("movies", match=["{movie}.tif"], complete=complete))


def movie(site: Site, name: str) -> None:
    simulator.tiff_movie(site.data / f"{name}.tif", frames=3, width=8, height=8, **STILL)


def xml(site: Site, name: str) -> Path:
    path = site.base / "epu" / f"{name}.xml"
    simulator.companion_xml(path, movie=name, **STILL)
    return path


def gain(site: Site, seed: int) -> bytes:
    path = site.base / "gain" / "gain.mrc"
    path.unlink(missing_ok=True)
    simulator.mrc_movie(path, frames=1, width=8, height=8, seed=seed, **STILL)
    return path.read_bytes()


def manifests(site: Site) -> list[list[tuple[str, str]]]:
    """Return name and role of the members of each batch."""
    rows = site.ask("SELECT manifest FROM batch ORDER BY id")
    return [sorted((row[2], row[5]) for row in json.loads(manifest)) for (manifest,) in rows]


def whole(name: str) -> list[tuple[str, str]]:
    return sorted([(f"{name}.tif", ""), (f"{name}.xml", "companion"), ("gain.mrc", "shared")])


def stage(site: Site, name: str) -> tuple[str, str]:
    told = site.json("explain", str(site.data / f"{name}.tif"))["rules"][0]
    return told["stage"], told["because"]


def test_movies_wait_for_whole_companions_of_other_hosts(site: Site) -> None:
    """A cut xml holds its movie, by name; a gain reference goes with every movie, each time as it is then."""
    movies(site)
    site.start()
    movie(site, "m1")
    cut = xml(site, "m1")
    text = cut.read_bytes()
    cut.write_bytes(text[:-20])
    site.until(lambda: "gain.mrc: not there yet" in stage(site, "m1")[1], 20, "the gain reference is missing")
    first = gain(site, 1)
    site.until(lambda: "m1.xml: does not end" in stage(site, "m1")[1] or "m1.xml: ends before" in stage(site, "m1")[1],
               20, "the xml is cut")
    cut.write_bytes(text)
    site.until_verified(3, rule="movies")
    assert (site.out / "gain.mrc").read_bytes() == first
    second = gain(site, 2)
    movie(site, "m2")
    xml(site, "m2")
    site.until_verified(6, rule="movies")

    assert manifests(site) == [whole("m1"), whole("m2")]
    assert (site.out / "gain.mrc").read_bytes() == second != first
    assert site.digests(site.out).keys() == {b"m1.tif", b"m1.xml", b"m2.tif", b"m2.xml", b"gain.mrc"}


def test_a_late_companion_comes_while_the_daemon_is_down(site: Site) -> None:
    """`missing: go`: the movie went without it before a crash; after it, it travels alone, once; `explain` knows it."""
    movies(site, wait="500ms", missing="go")
    gain(site, 1)
    site.start()
    movie(site, "m1")
    site.until_verified(2, rule="movies")
    site.kill()
    path = xml(site, "m1")
    site.start()
    site.until_verified(3, rule="movies", timeout_s=30)
    site.stop()
    site.start()
    told = site.json("explain", str(path))["rules"]

    assert manifests(site) == [sorted([("m1.tif", ""), ("gain.mrc", "shared")]), [("m1.xml", "companion")]]
    assert site.ask("SELECT reason FROM batch WHERE id = 2") == [("late companion of m1.tif, which batch 1 took",)]
    assert told and told[0]["stage"] == "verified"
    assert not site.ask("SELECT 1 FROM group_mark WHERE kind = 'late'")


def test_a_movie_without_its_companion_is_blocked_and_a_person_lets_it_go(site: Site) -> None:
    """`missing: block` says which file is missing and for how long it waited; `files go` sends the movie without it."""
    movies(site, wait="500ms")
    gain(site, 1)
    site.start()
    movie(site, "m1")
    site.until(lambda: stage(site, "m1")[0] == "blocked", 20, "it is blocked")
    assert "m1.xml: not there yet; waited 0.5 s" in stage(site, "m1")[1]
    site.cli("files", "go", str(site.data / "m1.tif"))
    site.until_verified(2, rule="movies")

    assert manifests(site) == [sorted([("m1.tif", ""), ("gain.mrc", "shared")])]
