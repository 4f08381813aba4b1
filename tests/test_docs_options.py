"""docs/options.md against the installed transformers: every argument and field has a verdict."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import GenerationConfig, GenerationMixin

from specdec import SpeculativeGenerator
from specdec.options import ASSISTANCE, REFUSED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
VERDICTS = {"honoured", "refused", "no effect"}


def rows(heading: str) -> dict[str, str]:
    """Name -> verdict of the table under ``heading``."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([*\w]+)` \| ([^|]+) \|", section, re.MULTILINE)
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), "a name stands twice"
    return dict(found)


@pytest.fixture(scope="module")
def fields():
    return rows("Fields of GenerationConfig")


@pytest.fixture(scope="module")
def arguments():
    return rows("Arguments")


def test_every_field_of_the_installed_config_has_a_row(fields):
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - fields.keys() == set(), "fields that the page does not name"
    assert fields.keys() - known == set(), "fields that transformers does not have"


def test_every_argument_has_a_row(arguments):
    for function in (GenerationMixin.generate, SpeculativeGenerator.generate):
        named = set(inspect.signature(function).parameters) - {"self", "kwargs"}
        assert named <= arguments.keys()


def test_arguments_of_the_constructor_have_a_row():
    section = PAGE.read_text().split("\n## Arguments of SpeculativeGenerator\n")[1]
    named = set(inspect.signature(SpeculativeGenerator).parameters) - {"target"}
    assert named == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| [^|]+", section, re.M))))


def test_what_the_page_says_is_refused_is_refused(fields, arguments):
    verdicts = {**fields, **arguments}
    assert set(verdicts.values()) == VERDICTS
    refused = {name for name, verdict in verdicts.items() if verdict == "refused"}
    assert refused == {*REFUSED, *ASSISTANCE, "num_beams", "cache_implementation"}
