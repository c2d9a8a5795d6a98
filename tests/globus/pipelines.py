"""Two beamlines' work from the detector to the index, against the emulated Globus: rules/globus-*.yaml as they stand.

    python -m tests.globus.pipelines [cryo-em] [ssx]        (`make demo-globus`)

Instruments, clusters and the service are simulated; the daemon, the rules, the
flows' definitions, the bytes and the checksums are real. Only directories are
filled in, and pauses shortened (`SHORTER`). What is printed was verified: the
end is 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.globus.emulator import Emulator
from tests.site import Site
from trigger_daemon import simulator

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT, SECRET = "4d1c9a52-7a1b-4e0b-9a53-0b6f3c1d2e4f", "not-a-secret"
KRIOS, I24 = "aaaaaaaa-0000-4000-8000-000000000001", "aaaaaaaa-0000-4000-8000-00000000000b"
ARCHIVE, CLUSTER = "bbbbbbbb-0000-4000-8000-000000000002", "bbbbbbbb-0000-4000-8000-000000000006"
GROUP, INDEX = "cccccccc-0000-4000-8000-000000000003", "eeeeeeee-0000-4000-8000-000000000005"
FLOWS = {
    "cryo-em": "dddddddd-0000-4000-8000-000000000004", "ssx-qc": "dddddddd-0000-4000-8000-000000000009",
    "ssx-batch": "dddddddd-0000-4000-8000-00000000000c",
}  # fmt: skip
FUNCTIONS = {
    "ffffffff-0000-4000-8000-000000000008": "motion_correction", "ffffffff-0000-4000-8000-00000000000a": "first_look",
    "ffffffff-0000-4000-8000-00000000000d": "find_hits",
}  # fmt: skip
SHORTER = {"30s": "1s", "5s": "1s", "10m": "3s", "5m": "20s", "2m": "4s", "1m": "3s"}  # of rules, in a demonstration
SQUARES, MOVIES = 2, 60
IMAGES, LATE_IMAGES, BAD_IMAGES = 1_000, 250, 100
BLANK, HIT = 8, 16  # pixels of an image's side: where there is a crystal, the simulated detector writes more
DEADLINE_S = 240.0


# ------------------------------------------------- what runs at the cluster, simulated


def motion_correction(items: Sequence[dict[str, str]], results: str) -> dict[str, Any]:
    """Read the movies that the flow has brought, and write one small result for each."""
    cluster = Path(os.environ["PIPELINES_CLUSTER"])
    out = cluster / results.strip("/")
    out.mkdir(parents=True, exist_ok=True)
    for item in items:
        movie = cluster / item["destination_path"].lstrip("/")
        (out / f"{movie.stem}.json").write_text(json.dumps({"movie": movie.name, "bytes": movie.stat().st_size}))
    return {"movies": len(items)}


def first_look(manifest: dict[str, Any]) -> dict[str, Any]:
    """Count hits where the images lie: the manifest says which."""
    instrument = Path(os.environ["PIPELINES_I24"])
    lines = (instrument / manifest["path"].lstrip("/")).read_text().splitlines()
    return _hits([instrument / json.loads(line)["path"] for line in lines])


def find_hits(items: Sequence[dict[str, str]], results: str) -> dict[str, Any]:
    """Count hits among the images that the flow has brought, and write which they are."""
    cluster = Path(os.environ["PIPELINES_CLUSTER"])
    found = _hits([cluster / item["destination_path"].lstrip("/") for item in items])
    out = cluster / results.strip("/")
    out.mkdir(parents=True, exist_ok=True)
    (out / "hits.json").write_text(json.dumps(found))
    return found


def _hits(images: Sequence[Path]) -> dict[str, Any]:
    size = re.compile(rb"X-Binary-Size-Fastest-Dimension: (\d+)")
    hits = sum(1 for image in images if int(size.search(image.read_bytes())[1]) == HIT)  # type: ignore[index]
    return {"images": len(images), "hits": hits, "hit_rate": hits / len(images)}


# ----------------------------------------------------------------------- the facility


class Facility:
    """Two instruments, an archive, a cluster, an account, and the daemon with the example rules."""

    def __init__(self, base: Path) -> None:
        self.site = Site(base, sweep="500ms")
        self.krios, self.i24 = self.site.data / "krios", self.site.data / "i24"
        self.archive, self.cluster = base / "archive", base / "cluster"
        os.environ |= {"PIPELINES_CLUSTER": str(self.cluster), "PIPELINES_I24": str(self.i24)}  # the functions read it
        self.globus = Emulator(base / "globus")

    def open(self, *examples: str) -> None:
        """Let the service know what the rules name, and start the daemon with them."""
        globus, site = self.globus, self.site
        globus.start()
        globus.client(CLIENT, SECRET)
        for key, directory in ((KRIOS, self.krios), (I24, self.i24), (ARCHIVE, self.archive), (CLUSTER, self.cluster)):
            globus.collection(key, directory)
        globus.group(GROUP)
        globus.index(INDEX, writers=[CLIENT])
        for name, key in FLOWS.items():
            files = (REPOSITORY / "rules" / "flows" / f"{name}{end}.json" for end in ("", ".schema"))
            definition, schema = (json.loads(file.read_text()) for file in files)
            globus.flow(definition, schema, id=key, title=name)
        for key, function in FUNCTIONS.items():
            globus.function(function_id=key, callable=f"tests.globus.pipelines:{function}")
        for example in examples:
            rules = (REPOSITORY / "rules" / f"globus-{example}.yaml").read_text()
            rules = rules.replace("/data/krios", str(self.krios)).replace("/data/i24", str(self.i24))
            shorter = re.sub(r"(?<=: )(\d+[sm])\b", lambda pause: SHORTER[pause[1]], rules)
            (site.rules_dir / f"{example}.yaml").write_text(shorter)
        site.settings["throttle"] = {"runs": 40}
        site.settings["globus"] = {
            "client_id": CLIENT, "poll": "200ms", "listed_after": "5s",
            "collections": {KRIOS: {str(self.krios): "/"}, I24: {str(self.i24): "/"}},
            "manifests": {"path": str(self.i24 / ".manifests"), "collection": I24},
        }  # fmt: skip
        site.start(env={**globus.environment(), "TRIGGER_DAEMON_GLOBUS__CLIENT_SECRET": SECRET})

    def close(self) -> None:
        self.site.stop()
        self.globus.kill()

    # ------------------------------------------------------------------ what came of it

    def states(self, rule: str) -> Counter[str]:
        rows = self.site.ask(
            "SELECT run.state FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule WHERE rule.name = ?",
            rule,
        )  # fmt: skip
        return Counter(state for (state,) in rows)

    def until(self, rule: str, state: str, files: int) -> None:
        """Wait until so many files of a rule are in runs of a state."""
        self.site.until(lambda: self.files(rule, state) >= files, DEADLINE_S, f"{files} files of {rule} are {state}")

    def files(self, rule: str, state: str) -> int:
        (row,) = self.site.ask(
            "SELECT sum(batch.files) FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule"
            " WHERE rule.name = ? AND run.state = ?", rule, state,
        )  # fmt: skip
        return int(row[0] or 0)

    def once(self, rule: str) -> int:
        """Return how many files a rule took; none may be in two batches."""
        taken = self.site.taken(rule)
        _must(max(taken.values(), default=1) == 1, f"{rule} took a file twice")
        return len(taken)

    def granted(self) -> set[str]:
        """Return the paths at the archive that the group may read."""
        return {rule["path"] for rule in self.globus.access(ARCHIVE) if rule["principal"] == GROUP}


class Broken(Exception):
    """The pipeline has not done what it promises."""


def _must(true: bool, otherwise: str) -> None:
    if not true:
        raise Broken(otherwise)


def _say(words: str) -> None:
    print(f"  {words}", flush=True)


def _pause(seconds: float) -> None:
    time.sleep(min(seconds, 0.001))


# ------------------------------------------------------------------------- cryo-EM


def cryo_em(facility: Facility) -> dict[str, Any]:
    """Two squares of movies: archived, analysed, results moved, opened, indexed. Raises Broken."""
    visit = facility.krios / "bi23047-1"
    for square in range(SQUARES):
        for number in range(MOVIES):
            movie = visit / f"square{square}" / f"foil_{number:03}.tiff"
            simulator.tiff_movie(movie, frames=40, width=8, height=8, pause=_pause, seed=square * 1_000 + number)
            simulator.companion_xml(movie.with_suffix(".xml"), movie=movie.name, pause=_pause)
    movies = SQUARES * MOVIES
    _say(f"the microscope wrote {movies} movies and as many XML files")
    facility.until("em-raw", "VERIFIED", movies)
    facility.until("em-analysis", "SUCCEEDED", movies)
    for rule in ("em-raw", "em-analysis"):
        _must(facility.once(rule) == movies, f"{rule} has not taken each movie")
    raw = facility.archive / "visits" / visit.name
    sent = facility.site.digests(visit)
    there = {name: digest for name, digest in facility.site.digests(raw).items() if not name.startswith(b"results/")}
    _must(there == sent, "the archive differs from what was written")
    _say(f"{len(sent)} raw files are at the archive, equal by SHA-256; {facility.states('em-raw')['VERIFIED']} tasks")
    runs = facility.states("em-analysis")["SUCCEEDED"]
    results = sorted(raw.glob("results/*/*.json"))
    _must(len(results) == movies, f"{len(results)} results of {movies} movies are at the archive")
    _say(f"{len(results)} results of {runs} flow runs were moved to the archive")
    opened = facility.granted()
    _must(opened == {f"/visits/{visit.name}/"}, f"the group may read {sorted(opened)}")
    _say(f"the visit's group may read {opened.pop()}, and nothing else")
    entries = facility.globus.entries(INDEX)
    kinds = Counter(entry["content"]["kind"] for entry in entries)
    wanted = {"raw": facility.states("em-raw")["VERIFIED"], "results": runs}
    _must(kinds == wanted, f"the index has {dict(kinds)}, not {wanted}")
    _say(f"the index has {kinds['raw']} entries of raw data and {kinds['results']} of results")
    return {"movies": movies, "results": len(results), "runs": runs, "entries": len(entries)}


# ---------------------------------------------------------------------------- SSX


def ssx(facility: Facility) -> dict[str, Any]:
    """A good chip and a bad one: judged first; the good one is archived and analysed, its hits published."""
    visit = facility.i24 / "mx31118-4"
    before = len(facility.globus.entries(INDEX))
    _images(visit / "bad", 1, BAD_IMAGES, lambda number: BLANK)
    _images(visit / "good", 1, IMAGES, lambda number: HIT if number % 4 == 0 else BLANK)
    facility.site.until(lambda: facility.states("ssx-qc").total() == 2, DEADLINE_S, "both chips are judged")
    _images(visit / "good", IMAGES + 1, IMAGES + LATE_IMAGES, lambda number: BLANK)
    images = IMAGES + LATE_IMAGES
    _say(f"the detector wrote {images:,} images of one chip and {BAD_IMAGES} of another")
    facility.until("ssx-raw", "VERIFIED", images)
    facility.until("ssx-analysis", "SUCCEEDED", images)
    facility.site.until(lambda: facility.states("ssx-qc")["HELD"] == 1, DEADLINE_S, "the bad chip is held")
    judged = dict(facility.site.ask(
        "SELECT run.state, batch.files FROM run JOIN batch USING (id) JOIN rule ON rule.id = batch.rule"
        " WHERE rule.name = 'ssx-qc'"
    ))  # fmt: skip
    _must(judged == {"SUCCEEDED": IMAGES, "HELD": BAD_IMAGES}, f"the quality control was of {judged}")
    _say(f"quality control: the first {IMAGES:,} images passed; the other chip is HELD, its images wait")
    for rule, done in (("ssx-raw", "VERIFIED"), ("ssx-analysis", "SUCCEEDED")):
        _must(facility.once(rule) == images + BAD_IMAGES, f"{rule} has not taken each image")
        _must(facility.files(rule, done) == images, f"{rule} went on with a chip that has failed")
    archived = facility.archive / "ssx" / visit.name
    same = facility.site.digests(visit / "good") == facility.site.digests(archived / "good")
    _must(same, "the archive differs from what was written")
    _must(not (archived / "bad").exists(), "a chip that has failed was archived")
    tasks, runs = facility.states("ssx-raw")["VERIFIED"], facility.states("ssx-analysis")["SUCCEEDED"]
    _say(f"{images:,} images are at the archive, equal by SHA-256, in {tasks} tasks; {runs} batches were analysed")
    found = [json.loads(path.read_text()) for path in facility.cluster.glob(f"results/{visit.name}/good/*/hits.json")]
    _must(sum(one["images"] for one in found) == images, "an image was analysed twice, or never")
    enough = sum(one["hit_rate"] >= 0.05 for one in found)
    published = facility.globus.entries(INDEX)[before:]
    _must(0 < enough < len(found), "the demonstration has batches above and below the threshold")
    _must(len(published) == enough, f"{len(published)} batches were published, {enough} have enough hits")
    there = list((facility.archive / "published" / visit.name / "good").glob("*/hits.json"))
    _must(len(there) == enough, f"{len(there)} results are at the archive")
    _must(f"/published/{visit.name}/" in facility.granted(), "the group may not read what was published")
    _say(f"{enough} batches had enough hits: published, opened to the group, indexed; {len(found) - enough} had not")
    return {"images": images, "tasks": tasks, "runs": runs, "published": enough, "not_published": len(found) - enough}


def _images(chip: Path, first: int, last: int, side: Any) -> None:
    for number in range(first, last + 1):
        path = chip / f"{chip.name}_{number:05}.cbf"
        simulator.cbf_image(path, width=side(number), height=side(number), pause=_pause, seed=number, number=number)


PIPELINES = {"cryo-em": cryo_em, "ssx": ssx}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", metavar="cryo-em|ssx")
    wanted = parser.parse_args(given).pipelines or list(PIPELINES)
    if unknown := set(wanted) - PIPELINES.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    print("Globus is emulated on this machine, and the instruments; daemon, rules and bytes are real.", flush=True)
    with tempfile.TemporaryDirectory(prefix="pipelines-") as base:
        facility = Facility(Path(base))
        try:
            facility.open(*wanted)
            for name in wanted:
                print(f"\n{name}: rules/globus-{name}.yaml", flush=True)
                PIPELINES[name](facility)
        except (Broken, AssertionError) as broken:
            print(f"NOT AS PROMISED: {broken}", file=sys.stderr)
            return 1
        finally:
            facility.close()
    print("\nAll of it is verified.\n\nWhere to go next")
    for name in wanted:
        print(f"  docs/tutorials/globus-{name}.md  the rules and flows of this pipeline, step by step")
    print("  docs/how-to/globus.md  an account for the daemon, what to grant it, and a first rule of your own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
