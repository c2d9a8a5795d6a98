"""Documents lead where they say, and tell of what is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from trigger_daemon.core import model, rules

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
REFERENCE = (REPOSITORY / "docs" / "reference" / "rules.md").read_text()

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as code hosts make them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(FENCED.sub("", text)))
    return {words.replace(" ", "-") for words in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document):
    """A link within the repository names a file that is there, and a heading that is in it."""
    broken = []
    for link in LINK.findall(FENCED.sub("", document.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)

    assert broken == []


def test_every_document_can_be_reached_from_the_readme():
    """A document that no other leads to is not found by anybody."""
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in reached:
            continue
        reached.add(document)
        for link in LINK.findall(FENCED.sub("", document.read_text())):
            target = (document.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                waiting.append(target)

    assert [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS if path not in reached] == []


# What a rule's fields are called in a rule file, where the name differs.
WRITTEN_AS = {"companions": "with", "action": "start", "options": "start", "runs_max": "runs", "root": "in"}
NOT_WRITTEN = {"id", "file", "line"}


@pytest.mark.parametrize(
    "record",
    [rules.Rule, rules.Complete, rules.With, rules.Batch, rules.CloseOn, rules.After, rules.Retry, rules.Reclaim],
    ids=lambda record: record.__name__,
)
def test_every_key_of_a_rule_is_in_the_reference(record):
    """The reference names each key of the rule language."""
    keys = {
        WRITTEN_AS.get(field.name, field.name.removesuffix("_s"))
        for field in dataclasses.fields(record)
        if field.name not in NOT_WRITTEN or record is not rules.Rule
    }

    assert {key for key in keys if not re.search(rf"`{key}`|[{{ ]{key}: ", REFERENCE)} == set()


def test_built_in_ignores_are_in_the_reference():
    """The reference names each pattern that is ignored without being asked."""
    assert [pattern for pattern in rules.BUILT_IN_IGNORES if f"`{pattern}`" not in REFERENCE] == []


def test_states_of_a_run_are_in_the_json_reference():
    """The JSON reference names each state of a run."""
    text = (REPOSITORY / "docs" / "reference" / "json.md").read_text()

    assert [state for state in model.RunState if state not in text] == []
