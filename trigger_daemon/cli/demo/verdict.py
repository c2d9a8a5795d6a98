"""The verdict on a demo: every copy compared with its writer's own digest, every odd file explained.

The SHA-256 of each file comes from the simulated instrument that wrote it;
nothing of the daemon computes one, or has a part in the comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trigger_daemon.cli import text
from trigger_daemon.cli.demo.facility import Facility
from trigger_daemon.cli.demo.show import DONE, Show
from trigger_daemon.reader import Reader

if TYPE_CHECKING:
    from rich.console import Console

    from trigger_daemon.simulator import Written

NOT_FIRST = "00200.cbf"  # an image that the first look leaves out
_COLOURS = {"verified": "green", "blocked": "bold red", "incomplete": "yellow"}


def explained(facility: Facility, written: Sequence[Written]) -> list[dict[str, Any]]:
    """Ask `explain`, as an operator would, about each odd movie and about one image that the first look left out."""
    odd = [(item, item.odd) for item in written if item.odd and item.kind == "movie"]
    odd += [(i, "an image, but not among the first of its chip") for i in written if i.path.name.endswith(NOT_FIRST)]
    answers = [facility.command("explain", str(item.path)) for item, _ in odd]
    return [
        {
            "path": str(item.path), "odd": words, "arrives": item.arrives,
            "rules": [about for about in answer()["rules"] if about["stage"] not in ("unmatched", "ignored")],
        }
        for (item, words), answer in zip(odd, answers, strict=True)
    ]  # fmt: skip


def compare(facility: Facility, written: Sequence[Written]) -> dict[str, Any]:
    """Return which copies are equal to what was written, missing, different, or should not be there."""
    missing, different = [], []
    expected = {facility.copy_of(item.path): item for item in written if item.arrives}
    for copy, item in expected.items():
        try:
            with copy.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            missing.append(str(copy))
            continue
        if digest != item.sha256:
            different.append(str(copy))
    there = {path for top in (facility.krios, facility.chips) for path in top.rglob("*") if not path.is_dir()}
    return {
        "may_arrive": len(expected), "equal": len(expected) - len(missing) - len(different), "missing": missing,
        "different": different, "unexpected": sorted(map(str, there - expected.keys())),
    }  # fmt: skip


def summary(
    facility: Facility, show: Show, written: Sequence[Written], odd: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the verdict and all it rests on. `ok` only if nothing at all is wrong; `why` says what is."""
    reader = Reader(facility.state)
    oracle = compare(facility, written)
    batches = show.batches.values()
    copied = [batch for batch in batches if batch.copied]
    manifests = [(reader.run(batch.id) or {"manifest": ()})["manifest"] for batch in copied]
    digests = {str(member["digest"] or "none").partition(":")[0] for manifest in manifests for member in manifest}
    why = [] if written else ["the simulated session did not come to its end"]
    why += [f"{text.counted(len(oracle[k]), 'file')} {k}" for k in ("missing", "different", "unexpected") if oracle[k]]
    why += [f"batch {batch.id} of {batch.rule} is {batch.state}" for batch in batches if batch.state not in DONE]
    why += [f"{Path(item['path']).name} is not where it belongs" for item in odd if not _belongs(item)]
    why += [f"the journal: {problem}" for problem in reader.check()]
    return {
        "ok": not why,
        "why": why,
        "written": {"files": len(written), "bytes": sum(item.size for item in written)},
        "verified": {
            "files": sum(batch.files for batch in copied), "bytes": sum(batch.bytes for batch in copied),
            "batches": len(copied), "digests": sorted(digests),
        },
        "oracle": oracle,
        "rules": [
            {"rule": rule, "batches": sum(batch.rule == rule for batch in batches), "written": n.written,
             "batched": n.batched, "done": n.done, "bytes_done": n.done_bytes}
            for rule, n in show.numbers().items()
        ],
        "odd": list(odd),
        "events": show.events,
    }  # fmt: skip


def _belongs(odd: Mapping[str, Any]) -> bool:
    """Say whether an odd file is proved if it may go at all, and else waits."""
    stages = {about["stage"] for about in odd["rules"]}
    return "verified" in stages if odd["arrives"] else bool(stages) and stages <= {"blocked", "incomplete"}


# --------------------------------------------------------------------------- text


def tell(console: Console, found: Mapping[str, Any]) -> None:
    """Print the verdict for people."""
    from rich.text import Text

    def say(words: str, style: str = "") -> None:
        console.print(Text(words, style=style), soft_wrap=True)

    verified, oracle, written = found["verified"], found["oracle"], found["written"]
    say("\nCopied and proved", "bold")
    say(
        f"{verified['files']:,} files, {text.size(verified['bytes'])}, in {verified['batches']} batches. Each was "
        f"hashed ({', '.join(verified['digests'])}) while it was read, and again from the destination's disk."
    )
    say("\nFiles that did not simply go, and what `explain` says of them", "bold")
    for odd in found["odd"]:
        say(f"{text.name(Path(odd['path']).name)}: {odd['odd']}")
        for about in odd["rules"]:
            until = f" (until {about['until_time']})" if about["until_time"] else ""
            line = Text(f"    {about['rule']}: ")
            line.append(about["stage"], _COLOURS.get(about["stage"], ""))
            console.print(line.append(f" - {text.safe(about['because'])}{until}"), soft_wrap=True)
    say("\nCompared with what the instruments say they wrote", "bold")
    say(
        f"{written['files']:,} files written, {oracle['may_arrive']:,} of them may be sent: {oracle['equal']:,} copies "
        f"have the SHA-256 of their writer, {len(oracle['missing'])} are missing, {len(oracle['different'])} differ, "
        f"{len(oracle['unexpected'])} are there that should not be."
    )
    if found["ok"]:
        say(f"\nEverything arrived as it was written, and nothing else did. {found['seconds']:.0f} s.", "bold green")
    else:
        say(f"\nNOT as it should be: {text.safe('; '.join(found['why']))}", "bold red")
