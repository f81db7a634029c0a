"""What is recorded of the authors' repositories: files that exist, reasons, every flag of theirs, the form."""

import re

import pytest

from scripts.tools import diff_upstream as diff
from scripts.tools.differences import TOOLS
from tests.scripts.test_diff_upstream import CHECKOUTS
from tests.support import checkouts
from tests.support.helpers import ROOT


@pytest.mark.parametrize("method", diff.METHODS)
def test_record__names_files_that_are_here(method):
    record = diff.read_record(method)
    for repository in record["repositories"]:
        files = repository["files"]
        places = [entry[0] for entry in files.values()]
        places += [part.get("here", "") for part in repository["flags"].values()]
        definitions = repository["definitions"]
        places += [part["here"] for names in definitions.values() for part in names.values()]
        places += list(repository["configs"].get("folders", {}).values())
        for path in filter(None, ", ".join(filter(None, places)).split(", ")):
            assert (ROOT / path.partition(":")[0]).exists(), path
        assert re.fullmatch("[0-9a-f]{7,40}", repository["commit"])
        for place in [*repository["flags"], *definitions]:
            assert any(diff.matches(checkouts.place(repository, place), pattern) for pattern in files), place
        for here in repository["configs"].get("folders", {}).values():
            for path in (ROOT / here).glob("*.py"):
                ours = diff.our_config(f"{here}/{path.name}")
                rules = [rule if isinstance(rule, str) else rule[0] for rule in record["values"].values()]
                assert len({rule for rule in rules if diff.at(ours, rule) is not None}) > 10, path


@pytest.mark.parametrize("method", diff.METHODS)
def test_record__reasons_are_ids_or_sentences(method):
    record = diff.read_record(method)
    known = {row["id"] for row in diff.differences(record)}
    for repository in record["repositories"]:
        parts = [*repository["flags"].values(), repository["configs"]]
        parts += [part for names in repository["definitions"].values() for part in names.values()]
        reasons = {reason for part in parts for reason in [part.get("why"), *part.get("differs", {})] if reason}
        assert {reason for reason in reasons if " " not in reason} <= known


@pytest.mark.parametrize(("method", "index"), CHECKOUTS)
def test_record__has_every_flag_of_the_golden_manifest(method, index):
    """The manifests hold the flags of the authors' parsers, read by running them."""
    recorded = diff.read_record(method)["repositories"][index]["flags"]
    given = checkouts.flags(method, index)
    assert set(recorded) == set(given)
    for file, options in given.items():
        assert "why" in recorded[file] or sorted(recorded[file]["names"]) == sorted(options), file


FORM = {  # keys of each part of upstream/<method>.json: those that it must have, then others
    "": "repositories differences : checkpoints values preface shared kept notes",
    "repositories": "name url commit licence marks : files unparsable flags definitions configs like read unread",
    "flags": " : here names more differs why",
    "definitions": "here : differs read why",
    "configs": "folders : absent differs",
    "checkpoints": "kind marks flags build : weights without holds infer set fixed recipe prefix rename ignore part "
    "names encoder",
    "differences": "id topic upstream here : ",
}


@pytest.mark.parametrize("method", diff.METHODS)
def test_record__has_the_keys_of_its_form(method):
    record = diff.read_record(method)
    parts = [("", record)]
    parts += [(key, part) for key in ("repositories", "checkpoints", "differences") for part in record.get(key, [])]
    for repository in record["repositories"]:
        parts += [("flags", part) for part in repository["flags"].values()]
        parts += [("definitions", part) for names in repository["definitions"].values() for part in names.values()]
        parts += [("configs", repository["configs"])] if repository["configs"] else []
    for kind, part in parts:
        required, optional = (set(words.split()) for words in FORM[kind].split(":"))
        assert required <= set(part) <= required | optional, (kind, part)


def test_readme__names_every_key():
    """The form of upstream/<method>.json is told beside it."""
    told = set(re.findall(r"\w+", (TOOLS / "upstream" / "README.md").read_text()))
    assert set(re.findall(r"\w+", " ".join(FORM.values()))) - told == set()
