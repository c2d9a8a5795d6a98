"""Documents lead where they say, and tell of what is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from trigger_daemon import registry
from trigger_daemon.config import parse_rules
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
NOT_WRITTEN = {rules.Rule: {"id", "file", "line"}, rules.Batch: {"files_max"}}  # what the reader of the file adds


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
        if field.name not in NOT_WRITTEN.get(record, ())
    }

    assert {key for key in keys if not re.search(rf"`{key}`|[{{ ]{key}: ", REFERENCE)} == set()


def test_built_in_ignores_are_in_the_reference():
    """The reference names each pattern that is ignored without being asked."""
    assert [pattern for pattern in rules.BUILT_IN_IGNORES if f"`{pattern}`" not in REFERENCE] == []


def test_states_of_a_run_are_in_the_json_reference():
    """The JSON reference names each state of a run."""
    text = (REPOSITORY / "docs" / "reference" / "json.md").read_text()

    assert [state for state in model.RunState if state not in text] == []


BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
HERE_DOCUMENT = re.compile(r"<<'END'\n(rules:\n.*?)^END$", re.DOTALL | re.MULTILINE)
NOT_YET = "# not in this version"  # the mark of an example that needs what is not there; readers are told by it too


def examples() -> list[tuple[str, str]]:
    """Return (where, text) of each whole rule file in the documents, but for those marked NOT_YET."""
    found = [("rules/movies.yaml", (REPOSITORY / "rules" / "movies.yaml").read_text())]
    for document in DOCUMENTS:
        text = document.read_text()
        for block in [*BLOCK.finditer(text), *HERE_DOCUMENT.finditer(text)]:
            if re.search(r"^rules:", block[1], re.MULTILINE) and NOT_YET not in block[1]:
                line = text.count("\n", 0, block.start(1)) + 1
                found.append((f"{document.relative_to(REPOSITORY)}:{line}", block[1]))
    return found


@pytest.mark.parametrize(("where", "text"), [pytest.param(*example, id=example[0]) for example in examples()])
def test_rules_in_documents_can_be_used(where, text):
    """A rule file that a document shows is accepted as it stands."""
    read = parse_rules([(where, text)])

    assert read.faults == [] and read.rules


def test_the_first_rule_and_the_reference_have_examples():
    """The test above looks where readers do: at the README's first rule, the reference, and the example file."""
    assert {where.partition(":")[0] for where, _ in examples()} >= {
        "README.md", "docs/reference/rules.md", "rules/movies.yaml",
    }  # fmt: skip


def test_checks_and_actions_are_in_the_reference():
    """The reference names each check and action that is there."""
    names = [*registry.check_names(), *registry.action_names()]

    assert [name for name in names if f"`{name}`" not in REFERENCE] == []
